"""The sequence replay: what it gives, what it writes back, what survives a kill. Every field tells its row."""
import copy
import errno
import os
import re

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, load

CPU = torch.device("cpu")
MODULES = [load(path.stem) for path in SCRIPTS]
REPLAYS = pytest.mark.parametrize("m", [m for m in MODULES if hasattr(m, "SequenceReplay")], ids=lambda m: m.__name__)
SPECS = dict(image=((2, 2, 1), torch.uint8), deter=((3,), torch.bfloat16), stoch=((4,), torch.uint8),
             n=((), torch.float32), env=((), torch.float32), is_first=((), torch.bool), is_last=((), torch.bool))


def row(n, envs):
    """Row number n of every stream. Episodes have 5 rows, shifted by one from stream to stream."""
    number, env = torch.full((envs,), n), torch.arange(envs)
    return dict(image=torch.full((envs, 2, 2, 1), n % 256), deter=number[:, None].expand(-1, 3),
                stoch=number[:, None].expand(-1, 4) % 256, n=number, env=env,
                is_first=(number + env) % 5 == 0, is_last=(number + env) % 5 == 4)


def fill(m, capacity, envs, count, length=4, folder=None, start=0, replay=None):
    replay = replay or m.SequenceReplay(SPECS, capacity, envs, CPU, folder)
    for n in range(start, start + count):
        replay.add(row(n, envs), length)
    return replay


def heads(replay, batch, length):
    """(row, stream) of the first element of each sampled sequence, after a look at all the others."""
    data, index = replay.sample(batch, length)
    n, env = data["n"].long(), data["env"].long()
    assert n.shape == index.shape == (length, batch)
    assert torch.equal(n, n[0] + torch.arange(length)[:, None]) and torch.equal(env, env[0].expand(length, -1))
    assert n.min() >= replay.rows - replay.size and n.max() < replay.rows, "a row that is not there (any more)"
    for name in ("image", "stoch"):
        assert torch.equal(data[name].flatten(2), (n % 256).byte()[..., None].expand(data[name].flatten(2).shape))
    assert torch.equal(data["is_last"][:-1], (n + env)[:-1] % 5 == 4)
    assert torch.equal(data["is_first"][1:], (n + env)[1:] % 5 == 0) and data["is_first"][0].all()
    assert torch.equal(index, n % replay.capacity * replay.num_envs + env)
    return list(zip(n[0].tolist(), env[0].tolist()))


@REPLAYS
@pytest.mark.parametrize("count", [12, 20, 37, 45])  # a part of the ring, all of it, and wrapped around
def test_uniform_over_every_start(m, count):
    """Each valid start of each stream is equally likely: chi-square below mean + 5 sigma."""
    torch.manual_seed(0)
    length, envs = 4, 3
    replay = fill(m, 20, envs, count)
    replay.queue.clear()
    oldest, starts = max(count - 20, 0), replay.starts(length)
    assert starts == (min(count, 20) - length + 1) * envs
    counts = np.zeros((count, envs))
    for head in heads(replay, 400 * starts, length):
        counts[head] += 1
    window = counts[oldest : count - length + 1]
    assert window.sum() == counts.sum() == 400 * starts, "a start outside the window"
    assert ((window - 400) ** 2 / 400).sum() < starts - 1 + 5 * np.sqrt(2 * (starts - 1))


@REPLAYS
def test_never_across_the_write_head(m):
    """At every state of the ring, before and after it is full, sequences are runs of consecutive rows of one stream."""
    torch.manual_seed(0)
    replay = fill(m, 11, 2, 4)
    for n in range(4, 40):
        fill(m, 11, 2, 1, start=n, replay=replay)
        replay.queue.clear()
        assert min(heads(replay, 64, 4))[0] == max(n - 10, 0) and max(heads(replay, 64, 4))[0] == n - 3
    assert heads(replay, 4, 11)[0][0] == 29  # as long as the ring: one sequence per stream


@REPLAYS
def test_online_queue(m):
    """Rows 1-4, 5-8, ... of each stream are handed out exactly once, oldest first, before anything uniform."""
    replay, length, given, expected = fill(m, 100, 2, 1), 4, [], []
    for n in range(1, 40):
        fill(m, 100, 2, 1, start=n, replay=replay)
        if n % length == 0:
            expected += [(n - length + 1, 0), (n - length + 1, 1)]
        if n > 20 and n % 3 == 0:
            waiting = len(expected) - len(given)
            batch = heads(replay, 3, length)
            given += batch[: min(3, waiting)]
    assert given == expected[: len(given)] and len(given) >= len(expected) - 2
    assert replay.queue == expected[len(given) :]


@REPLAYS
def test_online_queue_forgets_what_the_ring_lost(m):
    """Queued sequences that were overwritten before they were sampled are dropped; the others are still given once."""
    replay = fill(m, 12, 1, 31)  # rows 19..30; queued: 1, 5, ..., 25
    assert [heads(replay, 1, 4)[0] for _ in range(2)] == [(21, 0), (25, 0)]
    assert replay.queue == []
    replay = fill(m, 12, 1, 33)
    assert heads(replay, 8, 4)[:3] == [(21, 0), (25, 0), (29, 0)] and replay.queue == []


@REPLAYS
def test_online_queue_with_another_length(m):
    """A sequence queued for length 4 (then resumed with a longer --batch-length) ends at the newest row."""
    replay = fill(m, 100, 1, 21)
    heads(replay, 10, 9)


@REPLAYS
def test_latents_written_back_at_their_rows_only(m):
    """`write` changes the T rows it was given and reads back; the context row, other streams and other fields stay."""
    torch.manual_seed(0)
    replay = fill(m, 20, 3, 33)
    before = {k: v.clone() for k, v in replay.data.items()}
    batch, index = replay.sample(1, 6)
    replay.write(index[1:], deter=torch.full((5, 1, 3), -1.0), stoch=torch.full((5, 1, 4), 200))
    n, env = batch["n"].long(), batch["env"].long()
    changed = torch.zeros(20, 3, dtype=torch.bool)
    changed[n[1:, 0] % 20, env[1:, 0]] = True
    for name, value in replay.data.items():
        differs = (value != before[name]).flatten(2).any(-1) if value.dim() > 2 else value != before[name]
        assert torch.equal(differs, changed if name in ("deter", "stoch") else torch.zeros_like(changed)), name
    again, _ = replay.gather(n, env)
    assert again["deter"][1:].eq(-1).all() and torch.equal(again["deter"][0], batch["deter"][0])


@REPLAYS
@pytest.mark.parametrize("rows, more", [(8, 3), (8, 13), (25, 0), (25, 4), (25, 40)])
def test_resume_after_a_kill(m, rows, more, tmp_path):
    """Rows 0..rows-1 belong to the checkpoint; a process that wrote `more` and died does no harm to what is left."""
    replay = fill(m, 15, 2, rows, folder=tmp_path)
    replay.flush()
    state = copy.deepcopy(replay.state_dict())
    fill(m, 15, 2, more, start=rows, replay=replay)
    del replay
    for life in range(3):  # killed again and again before the next checkpoint
        replay = m.SequenceReplay(SPECS, 15, 2, CPU, tmp_path)
        replay.load_state_dict(copy.deepcopy(state))
        assert (replay.rows, replay.size) == (rows, min(rows, max(15 - more, 0)))
        for extra in (0, life):
            fill(m, 15, 2, extra, start=rows, replay=replay)
            if replay.starts(4):
                heads(replay, 50, 4)
        more = max(more, life)
    fill(m, 15, 2, 20, start=rows + 2, replay=replay)
    assert replay.size == 15 and max(heads(replay, 50, 4))[0] == rows + 18


@REPLAYS
def test_announced_bytes_are_the_real_size(m, tmp_path, capsys):
    """The size printed before allocating is that of the tensors and of the files, whose disk space is taken at once."""
    place = m.replay_device(SPECS, 5000 * 2, m.Args(run_dir=str(tmp_path)), CPU)
    (tmp_path / "replay").mkdir()
    replay = m.SequenceReplay(SPECS, 5000, 2, place, tmp_path / "replay")
    announced = re.search(r"([\d,]+) rows x ([\d,]+) bytes", capsys.readouterr().out)
    rows, size = (int(x.replace(",", "")) for x in announced.groups())
    assert rows * size == sum(v.numel() * v.element_size() for v in replay.data.values())
    files = [(tmp_path / "replay" / f"{name}.npy").stat() for name in SPECS]
    assert rows * size == sum(f.st_size - 128 for f in files)  # a .npy header has 128 bytes
    if hasattr(os, "posix_fallocate"):
        assert all(f.st_blocks * 512 >= f.st_size for f in files)


@REPLAYS
@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no posix_fallocate on this system")
def test_full_disk_is_an_error_before_the_first_row(m, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError) as caught:
        m.SequenceReplay(SPECS, 15, 2, CPU, tmp_path)
    assert caught.value.errno == errno.ENOSPC


@REPLAYS
def test_annotate(m):
    """The first row begins an episode, a row before a beginning ends one; the last column and the input stay."""
    first = torch.tensor([[0, 0, 1, 0, 1], [1, 0, 0, 0, 0]]).bool().T
    last = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 0, 1]]).bool().T
    batch = dict(is_first=first.clone(), is_last=last.clone(), reward=torch.ones(5, 2))
    out = m.annotate(batch)
    assert out["is_first"].T.int().tolist() == [[1, 0, 1, 0, 1], [1, 0, 0, 0, 0]]
    assert out["is_last"].T.int().tolist() == [[0, 1, 0, 1, 0], [0, 0, 1, 0, 1]]
    assert torch.equal(batch["is_first"], first) and torch.equal(batch["is_last"], last) and len(out) == 3
