"""Two gloo processes compute what one computes on the joint batch; torchrun makes one run, to stop and to resume."""
import re
import signal

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SCRIPTS, load
from test_resume import check_rows, checkpoint, differences, execute, finish, only, scripted, start, wait_for

NAMES = [path.stem for path in SCRIPTS]
each_script = pytest.mark.parametrize("name", NAMES)
RANKS, STEPS, BATCH = 2, 5, 4  # processes, T, joint B
SHAPES, ACTIONS = {"image": (16, 16, 3), "speed": (2,)}, 3


# ---- dreamer_v3: the arithmetic ----


def make_agent(script):
    """The same on every rank and in the parent; float64, and no layer at zero, so that every gradient counts."""
    torch.manual_seed(0)
    args = script.Args(size="size1m", image_size=16, batch_size=BATCH, batch_length=STEPS, imag_horizon=3)
    agent = script.Agent(SHAPES, ACTIONS, True, args).double()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return agent


def make_rows(agent, steps: int, columns: int) -> dict:
    """Random replay rows (steps,columns,...) with starts and both kinds of episode ends, as an agent stores them."""
    rssm, shape = agent.world.rssm, (steps, columns)
    last = torch.rand(shape) < 0.3
    return dict(
        image=torch.randint(256, (*shape, 16, 16, 3), dtype=torch.uint8), speed=torch.randn(*shape, 2).double(),
        is_first=torch.rand(shape) < 0.3, is_last=last, is_terminal=last & (torch.rand(shape) < 0.5),
        reward=torch.randn(shape), action=torch.eye(ACTIONS)[torch.randint(ACTIONS, shape)].double(),
        deter=torch.rand(*shape, rssm.deter).double() * 2 - 1,
        stoch=torch.randint(rssm.classes, (*shape, rssm.stoch), dtype=torch.uint8))


def shard(batch: dict, noise: dict, rank: int) -> tuple[dict, dict]:
    """This rank's columns. Rollouts are (T,B) flattened, time first."""
    def take(x, axis):
        return x.chunk(RANKS, axis)[rank]
    rollouts = {k: take(noise[k].unflatten(1, (STEPS, BATCH)), 2).flatten(1, 2) for k in ("action", "prior")}
    return {k: take(v, 1) for k, v in batch.items()}, dict(post=take(noise["post"], 1), **rollouts)


def gradients(agent) -> dict[str, torch.Tensor]:
    return {k: p.grad.clone() for k, p in agent.named_parameters() if p.requires_grad}


def state(agent) -> dict:
    return {k: v.clone() for k, v in agent.state_dict().items()}


def joint_loss(rank: int | None = None):
    """Agent after the backward pass of the joint batch, or of one rank's shard of it."""
    agent = make_agent(load("dreamer_v3"))
    batch = make_rows(agent, STEPS + 1, BATCH)
    noise = {k: v.double() for k, v in agent.noise(BATCH, torch.device("cpu")).items()}
    batch, noise = (batch, noise) if rank is None else shard(batch, noise, rank)
    agent.loss(batch, noise)[0].backward()
    return agent


def worker(rank: int, folder: str) -> None:
    script = load("dreamer_v3")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    agent = joint_loss(rank)
    own = gradients(agent)
    script.average_ranks([p.grad for p in agent.parameters() if p.requires_grad])
    norm = agent.behaviour.return_norm
    result = dict(own=own, mean=gradients(agent), norm=[norm.low, norm.high])

    agent = make_agent(script).float()
    result["before"] = state(agent)
    specs = {k: (v.shape[2:], v.float().dtype if v.is_floating_point() else v.dtype)
             for k, v in make_rows(agent, 1, 1).items()}
    replay = script.SequenceReplay(specs, 40, 1, torch.device("cpu"), None)
    optimizer = script.LaProp([p for n, p in agent.named_parameters() if "slow_critic" not in n], 1e-3, 0, 0.3)
    torch.manual_seed(rank)  # each rank its own experience and its own noise, as in main
    for row in range(40):
        replay.add({k: v[0] for k, v in make_rows(agent, 1, 1).items()}, STEPS + 1)
    for _ in range(4):
        metrics = script.train_step(agent, optimizer, replay, BATCH // RANKS)
    result |= dict(after=state(agent), optimizer=optimizer.state_dict(), loss=metrics["losses/dyn"],
                   sums=script.sum_ranks([rank + 1, 10], torch.device("cpu")), text=script.share_text(f"from {rank}"))
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of the processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder),), RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_gradient_is_that_of_the_joint_batch(ranks):
    joint = gradients(joint_loss())
    assert differences(ranks[0]["mean"], ranks[1]["mean"]) == []
    for name, gradient in joint.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(ranks[0]["mean"][name], gradient, rtol=1e-6, atol=1e-6 * scale, msg=name)
        assert scale > 0, name
    assert len(differences(ranks[0]["own"], joint)) == len(joint), "one rank alone has another gradient"


def test_return_statistics_are_those_of_the_joint_batch(ranks):
    norm = joint_loss().behaviour.return_norm
    assert norm.high > norm.low
    for rank in ranks:
        torch.testing.assert_close(rank["norm"], [norm.low, norm.high], rtol=1e-9, atol=0)


def test_ranks_stay_equal(ranks):
    """After updates on different experience: parameters, slow critic, return statistics, optimiser, bit by bit."""
    assert ranks[0]["loss"] != ranks[1]["loss"]
    for part in ("before", "after", "optimizer"):
        assert differences(ranks[0][part], ranks[1][part]) == []
    assert len(differences(ranks[0]["before"], ranks[0]["after"])) == len(ranks[0]["after"]), "each tensor has moved"


def test_messages(ranks):
    assert [rank["sums"] for rank in ranks] == [[3, 20]] * 2 and [rank["text"] for rank in ranks] == ["from 0"] * 2


# ---- all scripts: torchrun ----


def torchrun(name: str, *flags):
    return start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / f"{name}.py", *flags)


@each_script
def test_torchrun_stop_and_resume(name, tmp_path, capfd):
    with torchrun(name, *scripted(name, tmp_path, num_envs=2, total_timesteps=1_000_000)) as process:
        wait_for(process, "global_step=28")
        process.send_signal(signal.SIGTERM)  # torchrun passes it on
        out, _ = finish(process)
    run = only(tmp_path)
    steps = [check_rows(run, replay=f"replay{rank}")["step"] for rank in range(RANKS)]
    assert re.findall(r"saved at step (\d+)", out) == [str(steps[0])] and steps[0] >= 28
    first = checkpoint(run)

    with torchrun(name, "--resume", run, "--total-timesteps", steps[0] + 28) as process:
        out, err = finish(process)
    assert process.returncode == 0 and out.count("run directory") == 1, err
    assert only(tmp_path) == run and len(list(run.glob("events*"))) == 2, "only the first rank writes"
    for rank in range(RANKS):
        saved = check_rows(run, 1, f"replay{rank}")
        assert saved["step"] == steps[0] + 28 and saved["updates"] > first["updates"]

    assert execute(name, "--resume", run, "--total-timesteps", steps[0] + 56) == 2
    assert "processes" in capfd.readouterr().err, "one process cannot go on with the replay of two"
    assert execute(name, "--eval-only", "--checkpoint", run, "--eval-episodes", 2) == 0
