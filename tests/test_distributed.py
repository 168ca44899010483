"""Two gloo processes: each takes its share of the batch, the mean of their gradients is the gradient of the joint
batch; a run and its resume."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.multiprocessing as mp
from conftest import SCRIPTS, TESTS, load

NAMES = [path.stem for path in SCRIPTS]
# the updates whose batch can be split by sequences, in the order in which a run reaches them
UPDATES = {
    "iris": ["train_tokenizer", "train_world_model", "train_behaviour"],
    "twm": ["train_world_model"],  # its dreams start at randomly chosen states of the own share
    "genrl": ["train_world_model"],
}
BATCH = dict(batch_size=4, num_envs=2, total_timesteps=64, eval_episodes=0)
MORE = {"iris": dict(tokenizer_batch=4, dropout=0.0), "twm": dict(dropout=0.0, learning_starts=40)}


SINGLE = {"genrl"}  # keeps float32 embeddings in replay: not in float64


class Reached(Exception):
    """The last of the updates is about to be made."""


def reach(script, folder: Path) -> dict[str, tuple]:
    """Run the script's main up to these updates, without making them -> the arguments of their first calls."""
    name = script.__name__
    names = UPDATES.get(name, ["train_step"])
    calls = {}

    def wrap(update):
        original = getattr(script, update)

        def record(*args):
            calls.setdefault(update, args)
            if len(calls) == len(names):
                raise Reached
            return original(*args)

        return original, record

    kept = {}
    for update in names:
        kept[update], replaced = wrap(update)
        setattr(script, update, replaced)
    try:
        tiny.call(name, tiny.flags(name, folder, **{**BATCH, **MORE.get(name, {})}))
    except Reached:
        pass
    for update, original in kept.items():
        setattr(script, update, original)
    return calls


def without_chance(patch: pytest.MonkeyPatch) -> None:
    """Samples are modes, noise is nothing: one process draws what two draw."""
    patch.setattr(torch.Tensor, "exponential_", lambda x, *args, **options: x.fill_(1))
    patch.setattr(torch.Tensor, "uniform_", lambda x, *args, **options: x.fill_(0.5))
    patch.setattr(torch.Tensor, "normal_", lambda x, *args, **options: x.zero_())
    patch.setattr(torch, "randn_like", torch.zeros_like)
    patch.setattr(torch, "randn", torch.zeros)
    patch.setattr(torch, "normal", lambda mean, std, *args, **options: mean + 0 * std)


def share(batch, rank: int | None):
    """The sequences of one of two ranks, or all."""
    if rank is None:
        return batch
    if isinstance(batch, dict):
        return {key: value[:, rank::2] for key, value in batch.items()}
    return tuple(share(part, rank) if isinstance(part, dict) else part[:, rank::2] for part in batch)


def gradients(script, calls: dict, rank: int | None) -> list[torch.Tensor]:
    """What the optimisers get from three of each of the updates, from the joint batch or from a rank's share."""
    found = []
    average = script.average_ranks
    patch = pytest.MonkeyPatch()

    def watch(grads):
        average(grads)
        found.extend(grad.clone() for grad in grads)

    script.average_ranks = watch
    for update, args in calls.items():
        replay = next(value for value in args if isinstance(value, script.Storage))
        sample = replay.sample
        replay.write = lambda *options, **named: None
        for seed in range(1 if script.__name__ in SINGLE else 3):  # some have more ends of episodes in one share

            def joint(*options, **named):
                patch.undo()
                torch.manual_seed(seed)  # the same joint batch everywhere
                batch = share(sample(4, *options[1:], **named), rank)
                without_chance(patch)
                return batch

            replay.sample = joint
            without_chance(patch)
            getattr(script, update)(*args)
            patch.undo()
        replay.sample = sample
    script.average_ranks = average
    return found


def work(rank: int | None, name: str, port: int, folder: str) -> None:
    """A process: rank 0, rank 1, or the one (None) that has the joint batch."""
    if name not in SINGLE:
        torch.set_default_dtype(torch.float64)
    script = load(name)
    folder = Path(folder)
    calls = reach(script, folder / f"alone{rank}")  # the same networks and replay in all three
    result = {}
    if rank is not None:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        result["shares"] = [args[-1] for args in reach(script, folder / "ranks").values()]
    torch.manual_seed(1)
    with torch.no_grad():  # heads that begin at zero say something too: rewards and returns are not all equal
        agent = next(iter(calls.values()))[0]
        for param in agent.parameters():
            param.add_(torch.randn_like(param), alpha=0.05)
    result["gradients"] = gradients(script, calls, rank)
    if rank is not None:
        tensors = [torch.full((2, 3), rank + 1.0).t().contiguous().t(), torch.tensor([10.0 * (rank + 1)])]
        script.average_ranks(tensors)
        result["means"] = [tensor.tolist() for tensor in tensors]
        result["gathered"] = script.gather_ranks(torch.tensor([rank, rank + 5])).tolist()
        result["sums"] = script.sum_ranks([rank + 1, 7, True], torch.device("cpu"))
        script.dist.destroy_process_group()
    torch.save(result, folder / f"{rank}.pt")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module", params=NAMES)
def results(request, tmp_path_factory) -> dict:
    """What the three processes found, by rank."""
    folder = tmp_path_factory.mktemp(request.param)
    context = mp.get_context("spawn")
    port = free_port()
    ranks = (0, 1, None)
    processes = [context.Process(target=work, args=(rank, request.param, port, str(folder))) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    return {rank: torch.load(folder / f"{rank}.pt") for rank in ranks}


def test_gradients_are_those_of_the_joint_batch(results):
    joint = results[None]["gradients"]
    assert len(joint) > 10 and any(grad.abs().max() > 1e-3 for grad in joint)
    for rank in (0, 1):
        ours = results[rank]["gradients"]
        assert len(ours) == len(joint)
        for a, b in zip(ours, joint):
            double = b.dtype == torch.float64
            torch.testing.assert_close(a, b, rtol=1e-6 if double else 1e-3, atol=1e-9 if double else 1e-5)


def test_a_batch_is_split_over_the_ranks(results):
    assert results[0]["shares"] == results[1]["shares"]
    assert set(results[0]["shares"]) == {2}


def test_means_sums_and_gathering(results):
    for rank in (0, 1):
        assert results[rank]["means"] == [[[1.5] * 3] * 2, [15.0]]
        assert results[rank]["gathered"] == [0, 5, 1, 6]
        assert results[rank]["sums"] == [3, 14, 2]


@pytest.mark.parametrize("name", NAMES)
def test_alone_nothing_is_asked(name):
    script = load(name)
    x = torch.tensor([1.0, 2.0])
    script.average_ranks([x])
    assert x.tolist() == [1, 2]
    assert script.gather_ranks(x) is x
    assert script.sum_ranks([3, False], torch.device("meta")) == [3, 0]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_two_processes_and_its_resume(name, tmp_path):
    """Both count the same steps, hold the same weights, and go on together."""
    script = TESTS.parent / f"{name}.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    env = dict(os.environ, PYTHONPATH=str(TESTS), OMP_NUM_THREADS="1")
    changes = dict(num_envs=2, batch_size=4, total_timesteps=48)
    if tiny.has(name, "tokenizer_batch"):
        changes["tokenizer_batch"] = 4
    longer = ["--resume=auto", "--total-timesteps=64"]
    if name == "genrl":  # or it would be refused
        longer += ["--pretrain-updates=4", "--policy-updates=4"]
    for more in ([], longer):
        argv = tiny.flags(name, tmp_path, **changes)
        result = subprocess.run([*torchrun, *argv, *more], env=env, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
    (run,) = tmp_path.iterdir()
    saved = tiny.checkpoint(run)
    assert saved["step"] >= 64 and saved["updates"] > 0 and saved["life"] == 1
    rewards = [(run / f"replay{rank}" / "image.bin").read_bytes() for rank in (0, 1)]
    assert rewards[0] != rewards[1]  # other episodes on each
