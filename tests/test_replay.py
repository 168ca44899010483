"""Replay of sequences or episodes: what it gives, what it writes back, what survives a kill. Fields tell their row."""
import copy
import errno
import io
import os
import re

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, digest, load

CPU = torch.device("cpu")
MODULES = [load(path.stem) for path in SCRIPTS]
STORAGE = pytest.mark.parametrize("m", [m for m in MODULES if hasattr(m, "Storage")], ids=lambda m: m.__name__)
REPLAYS = pytest.mark.parametrize("m", [m for m in MODULES if hasattr(m, "SequenceReplay")], ids=lambda m: m.__name__)
SPECS = dict(image=((2, 2, 1), torch.uint8), deter=((3,), torch.bfloat16), stoch=((4,), torch.uint8),
             n=((), torch.float32), env=((), torch.float32), is_first=((), torch.bool), is_last=((), torch.bool))


def row(n, envs):
    """Row number n of every stream. Episodes have 5 rows, shifted by one from stream to stream."""
    number, env = torch.full((envs,), n), torch.arange(envs)
    return dict(image=torch.full((envs, 2, 2, 1), n % 256), deter=number[:, None].expand(-1, 3),
                stoch=number[:, None].expand(-1, 4) % 256, n=number, env=env,
                is_first=(number + env) % 5 == 0, is_last=(number + env) % 5 == 4)


def fill(m, capacity, envs, count, folder=None, start=0, replay=None):
    replay = replay or m.SequenceReplay(SPECS, capacity, envs, CPU, folder)
    for n in range(start, start + count):
        replay.add(row(n, envs))
    return replay


def heads(replay, batch, length, **options):
    """(row, stream) of the first element of each sampled sequence, after a look at all the others."""
    data, index = replay.sample(batch, length, **options)
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
def test_uniform_over_every_start(m, count, tmp_path):
    """Each valid start of each stream is equally likely: chi-square below mean + 5 sigma."""
    torch.manual_seed(0)
    length, envs = 4, 3
    replay = fill(m, 20, envs, count, tmp_path)
    oldest, starts = max(count - 20, 0), (replay.size - length + 1) * envs
    assert starts == (min(count, 20) - length + 1) * envs
    counts = np.zeros((count, envs))
    for head in heads(replay, 400 * starts, length, online=False):
        counts[head] += 1
    window = counts[oldest : count - length + 1]
    assert window.sum() == counts.sum() == 400 * starts, "a start outside the window"
    assert ((window - 400) ** 2 / 400).sum() < starts - 1 + 5 * np.sqrt(2 * (starts - 1))


@REPLAYS
def test_never_across_the_write_head(m, tmp_path):
    """At every state of the ring, before and after it is full, sequences are runs of consecutive rows of one stream."""
    torch.manual_seed(0)
    replay = fill(m, 11, 2, 4, tmp_path)
    for n in range(4, 40):
        fill(m, 11, 2, 1, start=n, replay=replay)
        found = heads(replay, 128, 4, online=False)
        assert min(found)[0] == max(n - 10, 0) and max(found)[0] == n - 3
    assert heads(replay, 4, 11, online=False)[0][0] == 29  # as long as the ring: one sequence per stream


def reopened(m, replay, folder):
    """A replay on the same files at the state of another, as a checkpoint holds it."""
    file = io.BytesIO()
    torch.save(replay.state_dict(), file)
    file.seek(0)
    replay = m.SequenceReplay(SPECS, replay.capacity, replay.num_envs, CPU, folder, new=False)
    replay.load_state_dict(torch.load(file, weights_only=True))
    return replay


@REPLAYS
@pytest.mark.parametrize("envs", [1, 2, 3])
@pytest.mark.parametrize("saves", [False, True])
def test_online_queue(m, envs, saves, tmp_path):
    """Rows 1-4, 5-8, ... of each stream are handed out exactly once, oldest first, before anything uniform, whoever
    looks at others meanwhile and however often the run is resumed."""
    replay, length, given, expected = fill(m, 100, envs, 1, tmp_path), 4, [], []
    for n in range(1, 60):
        fill(m, 100, envs, 1, start=n, replay=replay)
        expected += [(n - length + 1, env) for env in range(envs)] if n % length == 0 else []
        if n > 20 and n % 3 == 0:
            heads(replay, 5, length, online=False)
            replay = reopened(m, replay, tmp_path) if saves else replay
            waiting = len(expected) - len(given)
            batch = heads(replay, envs + 1, length)
            given += batch[:waiting]
    assert given == expected[: len(given)] and len(expected) - envs <= len(given) == replay.online
    rest = len(expected) - len(given)
    assert heads(replay, 50, length)[:rest] == expected[len(given) :] and replay.online == len(expected)
    assert len({*heads(replay, 50, length)}) > 10 and replay.online == len(expected), "nothing is handed out again"


@REPLAYS
def test_online_queue_forgets_what_the_ring_lost(m, tmp_path):
    """Sequences that were overwritten before they were sampled are skipped; the others are still given once."""
    replay = fill(m, 12, 1, 31, tmp_path / "a")  # rows 19..30; never given: 1, 5, ..., 25
    assert [heads(replay, 1, 4)[0] for _ in range(2)] == [(21, 0), (25, 0)]
    assert replay.online == 7 and len({*heads(replay, 200, 4)}) > 5
    replay = fill(m, 12, 1, 33, tmp_path / "b")
    assert heads(replay, 8, 4)[:3] == [(21, 0), (25, 0), (29, 0)] and replay.online == 8
    replay = fill(m, 12, 2, 9, tmp_path / "c")
    assert heads(replay, 3, 4) == [(1, 0), (1, 1), (5, 0)]  # in the middle of those that begin at 5
    fill(m, 12, 2, 20, start=9, replay=replay)  # rows 17..28
    assert heads(replay, 9, 4)[:6] == [(17, 0), (17, 1), (21, 0), (21, 1), (25, 0), (25, 1)] and replay.online == 14
    fill(m, 12, 2, 12, start=29, replay=replay)  # rows 29..40, all of them new
    assert heads(replay, 9, 4)[:6] == [(29, 0), (29, 1), (33, 0), (33, 1), (37, 0), (37, 1)]


@REPLAYS
def test_online_queue_after_a_kill(m, tmp_path):
    """What a dead process was given after the checkpoint is given again, from the rows of the next one."""
    replay = fill(m, 100, 2, 25, tmp_path)
    assert heads(replay, 5, 4) == [(1, 0), (1, 1), (5, 0), (5, 1), (9, 0)]
    state = copy.deepcopy(replay.state_dict())
    heads(fill(m, 100, 2, 20, start=25, replay=replay), 50, 4)
    replay = m.SequenceReplay(SPECS, 100, 2, CPU, tmp_path, new=False)
    replay.load_state_dict(state)
    assert heads(replay, 50, 4)[:7] == [(9, 1), *((n, env) for n in (13, 17, 21) for env in (0, 1))]
    fill(m, 100, 2, 4, start=25, replay=replay)
    assert heads(replay, 50, 4)[:2] == [(25, 0), (25, 1)] and replay.online == 14


@REPLAYS
@pytest.mark.parametrize("length", [3, 9, 21])
def test_online_queue_with_another_length(m, length, tmp_path):
    """Resumed with another --batch-length, all sequences have it and lie in the ring, also while it wraps around."""
    replay = fill(m, 30, 2, 21, tmp_path)
    heads(replay, 7, 4)
    replay = reopened(m, replay, tmp_path)
    for n in range(21, 80):
        heads(fill(m, 30, 2, 1, start=n, replay=replay), 3, length)


@REPLAYS
def test_latents_written_back_at_their_rows_only(m, tmp_path):
    """`write` changes the T rows it was given and reads back; the context row, other streams and other fields stay."""
    torch.manual_seed(0)
    replay = fill(m, 20, 3, 33, tmp_path)
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
    replay = fill(m, 15, 2, rows, tmp_path)
    state = copy.deepcopy(replay.state_dict())
    fill(m, 15, 2, more, start=rows, replay=replay)
    del replay
    for life in range(3):  # killed again and again before the next checkpoint
        replay = m.SequenceReplay(SPECS, 15, 2, CPU, tmp_path, new=False)
        replay.load_state_dict(copy.deepcopy(state))
        assert (replay.rows, replay.size) == (rows, min(rows, max(15 - more, 0)))
        for extra in (0, life):
            fill(m, 15, 2, extra, start=rows, replay=replay)
            if replay.size >= 4:
                heads(replay, 50, 4)
        more = max(more, life)
    fill(m, 15, 2, 20, start=rows + 2, replay=replay)
    assert replay.size == 15 and max(heads(replay, 50, 4))[0] == rows + 18


@STORAGE
def test_rows_that_never_reached_the_disk(m, tmp_path):
    """After a power loss what comes before a missing row does not pass for its neighbour."""
    storage = m.Storage(SPECS, 15, 2, CPU, tmp_path)
    for n in range(10):
        storage.add(row(n, 2))
    storage.files["number"][6] = 0
    again = m.Storage(SPECS, 15, 2, CPU, tmp_path, new=False)
    again.load_state_dict(copy.deepcopy(storage.state_dict()))
    assert (again.rows, again.size) == (10, 3)


@STORAGE
@pytest.mark.parametrize("written", range(len(SPECS)))
@pytest.mark.parametrize("rows, more", [(8, 0), (8, 7), (25, 0), (25, 3), (25, 14), (25, 15), (25, 40)])
def test_row_that_a_kill_tore(m, rows, more, written, tmp_path):
    """A process wrote `more` rows after the checkpoint, then of one row its number and some of its fields: neither
    those rows nor that one pass for the old ones in their places."""
    storage = m.Storage(SPECS, 15, 2, CPU, tmp_path)
    for n in range(rows):
        storage.add(row(n, 2))
    state = copy.deepcopy(storage.state_dict())
    for n in range(rows, rows + more):
        storage.add(row(n, 2))
    with pytest.raises(KeyError):
        storage.add({name: row(rows + more, 2)[name] for name in list(SPECS)[:written]})
    storage = m.Storage(SPECS, 15, 2, CPU, tmp_path, new=False)
    storage.load_state_dict(state)
    assert (storage.rows, storage.size) == (rows, min(rows, max(15 - more - 1, 0)))
    left = torch.arange(rows - storage.size, rows)
    data, _ = storage.gather(left[:, None].expand(-1, 2), torch.arange(2).expand(len(left), -1))
    for n, *values in zip(left.tolist(), *(data[name] for name in SPECS)):
        assert all(torch.equal(x.long(), torch.as_tensor(row(n, 2)[k]).long()) for k, x in zip(SPECS, values))


class Elsewhere(str):
    """A GPU by name, memory of the CPU in truth."""

    type = "cuda"


@STORAGE
def test_rows_go_to_the_files_too(m, tmp_path, monkeypatch):
    """With the data on a GPU (here: a second place in memory) every row is in the files at once, and found there after
    a kill; what `write` changes is on the GPU only."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 0))
    storage = m.Storage(SPECS, 15, 2, Elsewhere("cpu"), tmp_path)
    storage.data = {name: values.clone() for name, values in storage.data.items()}
    for n in range(40):
        storage.add(row(n, 2))
        if n in (3, 14, 39):
            again = m.Storage(SPECS, 15, 2, CPU, tmp_path, new=False)
            again.load_state_dict(storage.state_dict())
            assert (again.rows, again.size) == (storage.rows, storage.size) == (n + 1, min(n + 1, 15))
            assert all(torch.equal(again.data[name], storage.data[name]) for name in ("number", *SPECS))
    storage.write(torch.tensor([[4]]), deter=torch.full((1, 1, 3), -1.0))
    changed = (storage.data["deter"] != storage.files["deter"]).any(-1).flatten()
    assert changed.nonzero().tolist() == [[4]]


@STORAGE
def test_files_of_another_size_are_refused(m, tmp_path, capsys):
    """A file that is too short or too long, other numbers of rows and environments, another type: one line."""
    m.Storage(SPECS, 15, 2, CPU, tmp_path)
    m.Storage(SPECS, 15, 2, CPU, tmp_path, new=False)
    path = tmp_path / "deter.bin"
    whole = path.read_bytes()
    other = dict(SPECS, deter=((3,), torch.float32))
    cases = [(content, SPECS, 15, 2) for content in (whole[:-1], whole + b"0", b"")]
    cases += [(whole, SPECS, 16, 2), (whole, SPECS, 15, 1), (whole, other, 15, 2)]
    for content, specs, rows, num_envs in cases:
        path.write_bytes(content)
        before = digest(path)
        with pytest.raises(SystemExit) as end:
            m.Storage(specs, rows, num_envs, CPU, tmp_path, new=False)
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and line.startswith(f"error: {tmp_path}") and "damaged" in line
        assert digest(path) == before


@STORAGE
@pytest.mark.parametrize("name", ["number", *SPECS])
def test_missing_file_is_an_error(m, name, tmp_path):
    """And not a new, empty one. A new run makes all files new, whatever lies there."""
    storage = m.Storage(SPECS, 15, 2, CPU, tmp_path)
    storage.add(row(200, 2))
    (tmp_path / f"{name}.bin").unlink()
    with pytest.raises(FileNotFoundError):
        m.Storage(SPECS, 15, 2, CPU, tmp_path, new=False)
    assert not (tmp_path / f"{name}.bin").exists()
    assert not any(values.any() for values in m.Storage(SPECS, 15, 2, CPU, tmp_path).data.values())


@STORAGE
def test_announced_bytes_are_the_real_size(m, tmp_path, capsys):
    """The size printed before allocating is that of the tensors and of the files, whose disk space is taken at once."""
    replay = m.Storage(SPECS, 5000, 2, CPU, tmp_path / "replay")
    announced = re.search(r"([\d,]+) rows x ([\d,]+) bytes", capsys.readouterr().out)
    rows, size = (int(x.replace(",", "")) for x in announced.groups())
    assert rows * size == sum(replay.data[name].nbytes for name in SPECS)
    files = {path.stem: path.stat() for path in (tmp_path / "replay").iterdir()}
    assert files.keys() == {"number", *SPECS}, "the rows' numbers come on top"
    assert {name: file.st_size for name, file in files.items()} == {k: v.nbytes for k, v in replay.data.items()}
    if hasattr(os, "posix_fallocate"):
        assert all(file.st_blocks * 512 >= file.st_size for file in files.values())


@STORAGE
def test_files_are_whole_without_posix_fallocate(m, tmp_path, monkeypatch):
    """On macOS and Windows."""
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    replay = m.Storage(SPECS, 5, 2, torch.device("cpu"), tmp_path / "replay")
    for name, file in replay.files.items():
        assert (tmp_path / "replay" / f"{name}.bin").stat().st_size == file.nbytes > 0


@STORAGE
def test_replay_is_on_a_gpu_where_it_fits_in_half_of_the_memory(m, tmp_path, monkeypatch, capsys):
    """With what is kept beside the rows; else in files."""
    specs, gpu = dict(image=((10, 10, 1), torch.uint8)), Elsewhere("cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 0))
    for rows, beside, device, place in ((5, 0, gpu, gpu), (6, 0, gpu, CPU), (5, 1, gpu, CPU), (5, 0, CPU, CPU)):
        storage = m.Storage(specs, rows, 1, device, tmp_path, beside=beside)  # 500 bytes are half of the memory
        assert storage.device == place and capsys.readouterr().out.endswith(f", {place}\n")


@STORAGE
@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no posix_fallocate on this system")
def test_full_disk_is_an_error_before_the_first_row(m, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError) as caught:
        m.Storage(SPECS, 15, 2, CPU, tmp_path)
    assert caught.value.errno == errno.ENOSPC


@REPLAYS
def test_annotate(m, tmp_path):
    """The first row begins an episode, a row before a beginning ends one; the last column stays."""
    first = torch.tensor([[0, 0, 1, 0, 1], [1, 0, 0, 0, 0]]).bool().T
    last = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 0, 1]]).bool().T
    replay = m.SequenceReplay(SPECS, 5, 1, CPU, tmp_path)
    replay.rows = replay.size = 5
    replay.gather = lambda rows, envs: (dict(is_first=first, is_last=last, reward=torch.ones(5, 2)), rows)
    out, _ = replay.sample(2, 5, online=False)
    assert out["is_first"].T.int().tolist() == [[1, 0, 1, 0, 1], [1, 0, 0, 0, 0]]
    assert out["is_last"].T.int().tolist() == [[0, 1, 0, 1, 0], [0, 0, 1, 0, 1]]
    assert len(out) == 3


# ---- whole episodes ----

EPISODES = pytest.mark.parametrize("m", [m for m in MODULES if hasattr(m, "EpisodeReplay")], ids=lambda m: m.__name__)
FIELDS = dict(n=((), torch.int32), env=((), torch.int32), first=((), torch.int32), is_first=((), torch.bool),
              is_last=((), torch.bool))


class Streams:
    """Environments whose episodes have the given numbers of rows, each its own, over and over; row after row into a
    replay, and beside it what that replay should know. A row tells its number and that of its episode's first."""

    def __init__(self, m, folder, capacity, lengths, length, prioritize_ends=True):
        self.make = lambda new=False: m.EpisodeReplay(
            FIELDS, capacity, len(lengths), CPU, folder, new=new, length=length, prioritize_ends=prioritize_ends)
        self.replay, self.lengths, self.length, self.capacity = self.make(new=True), lengths, length, capacity
        self.first, self.count = [0] * len(lengths), [0] * len(lengths)  # of the running episode: first row, which one
        self.n, self.whole = 0, []  # whole episodes: (first row, rows, environment)

    def add(self, rows=1):
        for _ in range(rows):
            last = [self.n - self.first[e] + 1 == x[self.count[e] % len(x)] for e, x in enumerate(self.lengths)]
            first, number = torch.tensor(self.first), torch.full((len(last),), self.n)
            self.replay.add(dict(n=number, env=torch.arange(len(last)), first=first, is_first=number == first,
                                 is_last=np.array(last)))
            for e in np.flatnonzero(last).tolist():
                self.whole.append((self.first[e], self.n - self.first[e] + 1, e))
                self.first[e], self.count[e] = self.n + 1, self.count[e] + 1
            self.n += 1

    @property
    def known(self):
        """What may be sampled: episodes of at least `length` steps, all of whose rows are there."""
        return {e for e in self.whole if e[1] > self.length and e[0] >= self.n - self.capacity}

    def sample(self, batch):
        """Chunks as (episode's first row, start in the episode, environment), after a look at every row of them."""
        stored = {k: v.clone() for k, v in self.replay.data.items()}
        data = self.replay.sample(batch)
        assert all(torch.equal(v, stored[k]) for k, v in self.replay.data.items()), "sampling changes nothing"
        n, steps = data["n"], torch.arange(self.length)[:, None]
        assert n.shape == (self.length, batch) and torch.equal(n, n[0] + steps), "rows of one stream, in order"
        assert all(torch.equal(data[k], data[k][0].expand(self.length, -1)) for k in ("env", "first")), "one episode"
        assert torch.equal(data["is_first"], (steps == 0).expand(-1, batch)), "at row 0, and there only"
        assert not data["is_last"][:-1].any()
        return list(zip(data["first"][0].tolist(), (n - data["first"])[0].tolist(), data["env"][0].tolist()))


def within(count, total, p):
    """A count of `total` draws, five standard deviations from what probability p gives at most."""
    return abs(count - total * p) <= 5 * np.sqrt(total * p * (1 - p)) + 1e-9


@EPISODES
@pytest.mark.parametrize("rows", [6, 7, 12, 40])
@pytest.mark.parametrize("ends", [True, False])
def test_starts_in_an_episode(m, rows, ends, tmp_path):
    """Without prioritize_ends each start is equally likely; with it the last chunk has (L + 1) / (T + 1) of all."""
    torch.manual_seed(0)
    streams, length, total = Streams(m, tmp_path, 100, [[rows]], 5, ends), 5, 20_000
    streams.add(rows)
    starts = np.bincount([start for _, start, _ in streams.sample(total)], minlength=rows)
    p = np.full(rows - length + 1, 1 / (rows + 1 if ends else rows - length + 1))
    p[-1] = (length + 1) / (rows + 1) if ends else p[-1]
    assert p.sum() == pytest.approx(1) and starts[len(p) :].sum() == 0
    assert all(within(count, total, share) for count, share in zip(starts, p)), starts


@EPISODES
@pytest.mark.parametrize("ends", [True, False])
def test_episodes_are_equally_likely(m, ends, tmp_path):
    """However long they are and whichever environment they come from; a row of a short one comes more often."""
    torch.manual_seed(0)
    streams, total = Streams(m, tmp_path, 200, [[6, 40], [20], [9, 3, 50]], 5, ends), 30_000
    streams.add(100)
    chosen, known = streams.sample(total), streams.known
    assert len(known) >= 8 and {env for _, _, env in known} == {0, 1, 2}
    for first, _, env in known:
        assert within(sum(f == first and e == env for f, _, e in chosen), total, 1 / len(known))


@EPISODES
@pytest.mark.parametrize("capacity", [20, 23, 24])
@pytest.mark.parametrize("lengths", [[[8]], [[6, 11, 7]], [[7, 9], [6], [13, 6, 8, 3]]], ids=str)
def test_ring_of_episodes(m, capacity, lengths, tmp_path):
    """At every row: sampled are all whole episodes and no others. One is forgotten when its first row is overwritten,
    also in the very step in which another ends."""
    torch.manual_seed(0)
    streams, together = Streams(m, tmp_path, capacity, lengths, 5), 0
    for _ in range(150):
        before = streams.known
        streams.add()
        known = streams.known
        together += bool(known - before and before - known)
        assert sorted(streams.replay.episodes) == sorted(known)
        if known:
            chosen = streams.sample(20 * len(known))
            assert {(first, env) for first, _, env in chosen} == {(first, env) for first, _, env in known}
    assert together or capacity != 23, "an end and a loss in one step"


@EPISODES
def test_short_episodes_are_dropped(m, tmp_path):
    """An episode of T rows has T - 1 steps: with sequences of 5 the one of 6 rows is the shortest that counts."""
    streams = Streams(m, tmp_path, 100, [[5, 6, 2, 7, 4]], 5)
    streams.add(48)
    assert sorted(streams.replay.episodes) == [(5, 6, 0), (13, 7, 0), (29, 6, 0), (37, 7, 0)]
    assert {first for first, _, _ in streams.sample(200)} == {5, 13, 29, 37}


@EPISODES
def test_abandoned_episodes_are_never_given(m, tmp_path):
    """A process that is killed leaves an episode without an end: the next one begins at its own first row."""
    streams = Streams(m, tmp_path, 100, [[30], [9]], 5)
    streams.add(12)
    streams.first, streams.count = [12, 12], [0, 0]  # both start again
    streams.add(31)
    assert sorted(streams.replay.episodes) == [(0, 9, 1), (12, 9, 1), (12, 30, 0), (21, 9, 1), (30, 9, 1)]
    assert {first for first, _, env in streams.sample(200) if env == 0} == {12}


@EPISODES
def test_each_process_resumes_its_own_episodes(m, tmp_path):
    """The checkpoint is the first process's; the rows of the others lie in their files, as do their episodes' ends."""
    first, second = (Streams(m, tmp_path / f, 30, x, 5) for f, x in (("0", [[7, 9]]), ("1", [[8]])))
    for streams in (first, second):
        streams.add(50)
    second.replay = second.make()
    second.replay.load_state_dict(copy.deepcopy(first.replay.state_dict()))
    assert first.known != second.known and sorted(second.replay.episodes) == sorted(second.known)
    for _ in range(40):
        second.add()
        assert sorted(second.replay.episodes) == sorted(second.known)
        second.sample(50)


@EPISODES
@pytest.mark.parametrize("rows, more", [(12, 3), (18, 0), (18, 5), (60, 0), (60, 4), (60, 10), (60, 40)])
def test_episodes_after_a_kill(m, rows, more, tmp_path):
    """Rows 0..rows-1 belong to the checkpoint; episodes that a dead process has overwritten in part are left out, the
    running one goes on."""
    torch.manual_seed(0)
    streams = Streams(m, tmp_path, 30, [[7, 9], [8]], 5)
    streams.add(rows)
    saved = copy.deepcopy((streams.replay.state_dict(), streams.first, streams.count, streams.whole))
    streams.add(more)
    for life in range(3):
        streams.replay, streams.n = streams.make(), rows
        state, streams.first, streams.count, streams.whole = copy.deepcopy(saved)
        streams.replay.load_state_dict(state)
        left = {episode for episode in streams.known if episode[0] >= rows + more - 30}
        assert sorted(streams.replay.episodes) == sorted(left)
        assert not left or {(f, e) for f, _, e in streams.sample(200)} == {(f, e) for f, _, e in left}
        streams.add(life)
        more = max(more, life)
    assert bool(left) == (more < 30), "the case says something"
    for _ in range(60):
        streams.add()
        if streams.n >= rows + more:  # what was lost is past
            assert sorted(streams.replay.episodes) == sorted(streams.known)
    assert len(streams.sample(300)) == 300
