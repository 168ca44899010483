"""Two gloo processes: the mean of their gradients is the gradient of the joint batch; a run and its resume."""

import os
import subprocess
import sys

import pytest
import tiny
import torch
import torch.multiprocessing as mp
from conftest import SCRIPTS, TESTS, load

NAMES = [path.stem for path in SCRIPTS]


def average(rank: int, name: str, port: int, queue) -> None:
    """One of two processes: each has its own share of the tensors."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    script = load(name)
    got_rank, ranks, _ = script.start_ranks("cpu")
    grads = [torch.full((2, 3), float(rank + 1)).t().contiguous().t(), torch.tensor([10.0 * (rank + 1)])]
    script.average_ranks(grads)
    gathered = script.gather_ranks(torch.tensor([rank, rank + 5]))
    total = script.sum_ranks([rank + 1, 7, True], torch.device("cpu"))
    queue.put((got_rank, ranks, [grad.tolist() for grad in grads], gathered.tolist(), total))
    script.dist.destroy_process_group()


def free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.mark.parametrize("name", NAMES)
def test_means_sums_and_gathering(name):
    context = mp.get_context("spawn")
    queue = context.Queue()
    port = free_port()
    processes = [context.Process(target=average, args=(rank, name, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = sorted(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    for rank, (got_rank, ranks, grads, gathered, total) in enumerate(results):
        assert (got_rank, ranks) == (rank, 2)
        assert grads == [[[1.5] * 3] * 2, [15.0]]
        assert gathered == [0, 5, 1, 6]
        assert total == [3, 14, 2]


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
    for more in ([], ["--resume=auto", "--total-timesteps=64"]):
        argv = tiny.flags(name, tmp_path, **changes)
        result = subprocess.run([*torchrun, *argv, *more], env=env, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
    (run,) = tmp_path.iterdir()
    saved = tiny.checkpoint(run)
    assert saved["step"] >= 64 and saved["updates"] > 0 and saved["life"] == 1
    rewards = [(run / f"replay{rank}" / "image.bin").read_bytes() for rank in (0, 1)]
    assert rewards[0] != rewards[1]  # other episodes on each
