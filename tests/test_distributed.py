"""Two gloo processes compute what one computes on the joint batch; torchrun makes one run, to stop and to resume."""
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
from benchmark import synthetic_rows
from conftest import ROOT, SCRIPTS, load
from test_resume import ENDLESS, check_rows, checkpoint, differences, execute, finish, only, scripted, start, wait_for

NAMES = [path.stem for path in SCRIPTS]
each_script = pytest.mark.parametrize("name", NAMES)
RANKS, STEPS, BATCH = 2, 5, 4  # processes, T, joint B
SHAPES, ACTIONS = {"image": (16, 16, 3), "vector": (2,)}, 3
CPU = torch.device("cpu")


def shard(batch: dict, noise: dict, rank: int | None) -> tuple[dict, dict]:
    """This rank's columns, or all of them. Rollouts are (T,B) flattened, time first."""
    if rank is None:
        return batch, noise

    def take(x, axis):
        return x.chunk(RANKS, axis)[rank]
    rollouts = {k: take(noise[k].unflatten(1, (STEPS, BATCH)), 2).flatten(1, 2) for k in ("action", "prior")}
    return {k: take(v, 1) for k, v in batch.items()}, dict(post=take(noise["post"], 1), **rollouts)


def draw_noise(agent) -> dict:
    """All noise of an update of the joint batch; the policy's and the prior's for one dream from each state."""
    rssm, dreams = agent.world.rssm, (agent.args.imag_horizon, STEPS * BATCH)
    noise = dict(post=rssm.noise(STEPS, BATCH), action=agent.behaviour.noise(*dreams), prior=rssm.noise(*dreams))
    return {k: v.double() for k, v in noise.items()}


def use_noise(agent, noise: dict) -> None:
    agent.world.rssm.noise = lambda *lead: noise["post" if lead == noise["post"].shape[:2] else "prior"]
    agent.behaviour.noise = lambda *lead: noise["action"]


def state(agent) -> dict:
    return {k: v.clone() for k, v in agent.state_dict().items()}


# ---- dreamer_v2: three optimisers, which average by themselves ----

COEFS = torch.tensor([0.01, 0.5])


def free_nats(script) -> dict[str, float]:
    """None; and two between what the ranks see alone and what they see together: there one alone decides otherwise."""
    kl = [float(three_steps(script, rank, 0.0)["wm/kl"]) for rank in (0, 1, None)]
    assert min(kl[:2]) < kl[2] < max(kl[:2])
    return dict(none=0.0, below=(min(kl) + kl[2]) / 2, above=(max(kl) + kl[2]) / 2)


def three_steps(script, rank: int | None, free: float) -> dict[str, torch.Tensor]:
    """One train_step in float64 on the joint batch, or on one rank's shard: metrics, and gradients by parameter, after
    clipping, as each optimiser's momentum shows them."""
    torch.manual_seed(0)
    flags = dict(batch_size=BATCH, batch_length=STEPS, actor_grad="both", grad_clip=0.01, free_nats=free)
    agent = tiny.agent(script, **flags).double()
    optimizer, shape = script.Optimizers(agent, agent.args), (STEPS, BATCH)
    batch = dict(
        image=torch.randint(256, (*shape, *tiny.IMAGE["image"]), dtype=torch.uint8), reward=torch.randn(shape).double(),
        is_first=torch.rand(shape) < 0.3, is_terminal=torch.rand(shape) < 0.3,
        action=torch.eye(3)[torch.randint(3, shape)].double())
    batch, noise = shard(batch, draw_noise(agent), rank)
    use_noise(agent, noise)
    replay = SimpleNamespace(sample=lambda batch_size: batch)
    metrics = script.train_step(agent, optimizer, replay, len(batch["reward"][0]), COEFS.double())
    nets = dict(model=agent.world, actor=agent.behaviour.actor, critic=agent.behaviour.critic)
    momentum = {f"{part} {name}": value for part, net in nets.items()
                for (name, _), value in zip(net.named_parameters(), optimizer.parts[part].momentum, strict=True)}
    return metrics | momentum


def gradients_v2(script, rank: int | None = None, cases: dict | None = None) -> dict[str, torch.Tensor]:
    found = {case: three_steps(script, rank, free) for case, free in (cases or free_nats(script)).items()}
    return {f"{case} {k}": v for case, part in found.items() for k, v in part.items() if "/" not in k or "grad/" in k}


def work_v2(script, rank: int, folder: Path) -> dict:
    cases = free_nats(script)  # both alone: before the process group exists
    own = gradients_v2(script, rank, cases)
    yield
    result = dict(own=own, mean=gradients_v2(script, rank, cases))
    torch.manual_seed(0)
    agent = tiny.agent(script, batch_length=STEPS)
    result["before"] = state(agent)
    replay = script.EpisodeReplay(script.replay_specs(tiny.IMAGE, agent, agent.args), 60, 1, CPU, folder, length=STEPS,
                                  prioritize_ends=True)
    optimizer, rows = script.Optimizers(agent, agent.args), synthetic_rows(replay, 9, seed=rank)
    torch.manual_seed(rank)  # each rank its own experience and its own noise, as in main
    for _ in range(60):
        replay.add(next(rows))
    for _ in range(4):
        metrics = script.train_step(agent, optimizer, replay, BATCH // RANKS, COEFS)
    yield result | dict(after=state(agent), optimizer=optimizer.state_dict(), loss=metrics["losses/image"])


# ---- dreamer_v3: one loss ----


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
        image=torch.randint(256, (*shape, 16, 16, 3), dtype=torch.uint8), vector=torch.randn(*shape, 2).double(),
        is_first=torch.rand(shape) < 0.3, is_last=last, is_terminal=last & (torch.rand(shape) < 0.5),
        reward=torch.randn(shape), action=torch.eye(ACTIONS)[torch.randint(ACTIONS, shape)].double(),
        deter=torch.rand(*shape, rssm.deter).double() * 2 - 1,
        stoch=F.one_hot(torch.randint(rssm.classes, (*shape, rssm.stoch)), rssm.classes).flatten(-2).byte())


def joint_loss(script, rank: int | None = None):
    """Agent after the backward pass of the joint batch, or of one rank's shard of it."""
    agent = make_agent(script)
    batch, noise = shard(make_rows(agent, STEPS + 1, BATCH), draw_noise(agent), rank)
    use_noise(agent, noise)
    agent.loss(batch)[0].backward()
    return agent


def gradients_v3(script, agent=None) -> dict[str, torch.Tensor]:
    """And the statistics of returns, which are those of the joint batch too."""
    agent = agent or joint_loss(script)
    found = {k: p.grad.clone() for k, p in agent.named_parameters() if p.requires_grad}
    return found | dict(percentiles=agent.behaviour.percentiles.clone())


def work_v3(script, rank: int, folder: Path) -> dict:
    own = gradients_v3(script, joint_loss(script, rank))
    yield
    agent = joint_loss(script, rank)
    script.average_ranks([p.grad for p in agent.parameters() if p.requires_grad])
    result = dict(own=own, mean=gradients_v3(script, agent))

    agent = make_agent(script).float()
    result["before"] = state(agent)
    specs = {k: (v.shape[2:], v.float().dtype if v.is_floating_point() else v.dtype)
             for k, v in make_rows(agent, 1, 1).items()}
    replay = script.SequenceReplay(specs, 40, 1, CPU, folder)
    optimizer = script.LaProp([p for n, p in agent.named_parameters() if "slow_critic" not in n], 1e-3, 0, 0.3)
    torch.manual_seed(rank)  # each rank its own experience and its own noise, as in main
    for row in range(40):
        replay.add({k: v[0] for k, v in make_rows(agent, 1, 1).items()})
    for _ in range(4):
        metrics = script.train_step(agent, optimizer, replay, BATCH // RANKS)
    yield result | dict(after=state(agent), optimizer=optimizer.state_dict(), loss=metrics["losses/dyn"])


# ---- iris: three optimisers, one part of the agent each; means over masks ----


def gradients_iris(script, rank: int | None = None) -> dict[str, torch.Tensor]:
    """One train_step of each part in float64 on the joint batch, or on one rank's shard: gradient norms, and gradients
    by parameter, after clipping, as Adam's first moment shows them. The shards' episodes differ in length."""
    def take(x, axis=1):
        return x if rank is None else x.chunk(RANKS, axis)[rank]
    torch.manual_seed(0)
    agent = tiny.agent(script, batch_size=BATCH, batch_length=STEPS, grad_clip=0.01, dropout=0.0).double()
    optimizers, shape, first = script.Optimizers(agent, agent.args), (STEPS, BATCH), agent.args.burn_in + 1
    fields = dict(
        image=torch.randint(256, (1, BATCH, *tiny.IMAGE["image"]), dtype=torch.uint8),
        tokens=torch.randint(8, (*shape, agent.world.tokens)), action=torch.randint(3, shape),
        reward=torch.randint(-1, 2, shape).double(), end=torch.rand(shape) < 0.3,
        recon=torch.rand(first, BATCH, 3, 64, 64).double())
    right = torch.arange(STEPS)[:, None] < torch.tensor([5, 2, 4, 1])
    left = torch.arange(first)[:, None] >= torch.tensor([0, 2, 1, 0])
    noise = agent.behaviour.noise(agent.world.tokens, BATCH, CPU)
    agent.behaviour.noise = lambda *_: {k: take(v.double(), 2 if k == "token" else 1) for k, v in noise.items()}

    def sample(batch_size, length, names, last):
        return {k: take(fields[k][:length]) for k in names.split()}, take((left if last else right)[:length])

    found = {}
    for part in script.PARTS:
        count = BATCH if rank is None else BATCH // RANKS
        replay = SimpleNamespace(sample=sample)
        found |= script.train_step(part, agent, optimizers, replay, count, script.pixel_distance)
        for name, p in getattr(agent, part).named_parameters():
            found[f"{part} {name}"] = optimizers.parts[part].state[p]["exp_avg"].clone()
    return {k: v for k, v in found.items() if "/" not in k or "grad/" in k}


def work_iris(script, rank: int, folder: Path) -> dict:
    own = gradients_iris(script, rank)
    yield
    result = dict(own=own, mean=gradients_iris(script, rank))
    torch.manual_seed(0)
    agent = tiny.agent(script)
    result["before"] = state(agent)
    replay = script.SegmentReplay(script.replay_specs(tiny.IMAGE, agent, agent.args), 30, 1, CPU, folder)
    optimizers = script.Optimizers(agent, agent.args)
    torch.manual_seed(rank)  # each rank its own experience and its own noise, as in main
    for t in range(30):
        row = dict(image=torch.randint(256, (1, *tiny.IMAGE["image"]), dtype=torch.uint8), is_last=[False])
        replay.add(row, torch.randint(3, (1,)), dict(reward=torch.randn(1), is_last=[t % 9 == 8]))
    for part in script.PARTS * 2:
        replay.tokenize(agent), replay.reconstruct(agent)
        metrics = script.train_step(part, agent, optimizers, replay, 2)
        result["loss"] = metrics.get("losses/token", result.get("loss"))
    yield result | dict(after=state(agent), optimizer=optimizers.state_dict())


# ---- all three: what two processes find ----

JOINT = dict(dreamer_v2=gradients_v2, dreamer_v3=gradients_v3, iris=gradients_iris)
WORK = dict(dreamer_v2=work_v2, dreamer_v3=work_v3, iris=work_iris)


def worker(rank: int, folder: str, name: str) -> None:
    script = load(name)
    work = WORK[name](script, rank, Path(folder, f"replay{rank}"))
    next(work)  # alone
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    result = next(work)
    result["sums"] = script.gather_ranks(torch.tensor([rank + 1, 10, True])).view(-1, 3).sum(0).tolist()
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[name for name in NAMES if name in WORK])
def ranks(request, tmp_path_factory) -> list[dict]:
    """What each of the processes found, and one alone on the joint batch."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder), request.param), RANKS)
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    return found + [JOINT[request.param](load(request.param))]


def test_gradient_is_that_of_the_joint_batch(ranks):
    """Every tensor of every optimiser to 1e-6, the norm that clips included, also where free nats decide."""
    *ranks, joint = ranks
    assert differences(ranks[0]["mean"], ranks[1]["mean"]) == []
    for name, gradient in joint.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(ranks[0]["mean"][name], gradient, rtol=1e-6, atol=1e-6 * scale, msg=name)
        untrained = "above" in name and ".prior." in name  # all that trains the prior is the KL
        assert (scale == 0) == untrained, name
        assert untrained or any(not torch.equal(rank["own"][name], gradient) for rank in ranks), "as one rank alone"


def test_ranks_stay_equal(ranks):
    """After updates on different experience: parameters, slow critic, statistics, optimiser, bit by bit."""
    assert ranks[0]["loss"] != ranks[1]["loss"]
    for part in ("before", "after", "optimizer"):
        assert differences(ranks[0][part], ranks[1][part]) == []
    assert len(differences(ranks[0]["before"], ranks[0]["after"])) == len(ranks[0]["after"]), "each tensor has moved"


def test_messages(ranks):
    """Sums are whole numbers; a new run has one directory, though the ranks' clocks differ."""
    assert [repr(rank["sums"]) for rank in ranks[:2]] == ["[3, 20, 2]"] * 2


# ---- all scripts: main ----


@each_script
def test_ranks_begin_equal_in_different_environments(name, tmp_path, monkeypatch):
    """The same weights, from which every update moves them equally; the other environments have other seeds."""
    script, weights, seeds = load(name), [], []
    make_envs = script.make_envs

    class Begun(Exception):
        pass

    def seen(args, num_envs, seed):
        seeds.extend(range(seed, seed + num_envs))
        return make_envs(args, num_envs, seed)

    def stop(shapes, agent, args):
        weights.append(state(agent))
        raise Begun

    monkeypatch.setattr(script, "make_envs", seen)
    monkeypatch.setattr(script, "replay_specs", stop)
    for rank in range(RANKS):
        monkeypatch.setattr(script, "start_ranks", lambda device, rank=rank: (rank, RANKS, CPU))
        torch.manual_seed(rank)
        with pytest.raises(Begun):
            script.main(script.parse_args(tiny.flags(name, tmp_path, num_envs=4)))
    assert differences(*weights) == [] and len(weights[0]) > 20
    assert len(seeds) == len(set(seeds)) == 4


@each_script
def test_random_numbers_of_ranks(name, tmp_path, monkeypatch):
    """After a resume the first rank goes on where it was; the others must not draw what it draws."""
    script, states = load(name), []

    class Begun(Exception):
        pass

    def stop(*_):
        states.append(torch.get_rng_state())
        raise Begun

    def as_rank(rank, *argv):
        monkeypatch.setattr(script, "start_ranks", lambda device: (rank, RANKS, CPU))
        script.main(script.parse_args([str(word) for word in argv]))

    monkeypatch.setattr(script, "gather_ranks", lambda x: x.repeat(RANKS))  # as if the other rank had the same
    monkeypatch.setattr(script.dist, "destroy_process_group", lambda: None)
    as_rank(0, *scripted(name, tmp_path, num_envs=2, total_timesteps=48))
    run = only(tmp_path)
    shutil.copytree(run / "replay0", run / "replay1")
    monkeypatch.setattr(script.Agent, "initial", stop)
    for rank in range(RANKS):
        with pytest.raises(Begun):
            as_rank(rank, "--resume", run, "--total-timesteps", 60)
    assert torch.equal(states[0], checkpoint(run)["rng"][0]) and not torch.equal(*states)


# ---- all scripts: torchrun ----


def torchrun(name: str, *flags):
    return start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / f"{name}.py", *flags)


@each_script
def test_torchrun_stop_and_resume(name, tmp_path, capfd):
    with torchrun(name, *scripted(name, tmp_path, num_envs=2, **ENDLESS)) as process:
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
    assert "is damaged, or of " in capfd.readouterr().err, "one process cannot go on with the replay of two"
