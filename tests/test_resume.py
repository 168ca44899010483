"""Stop, kill, resume: k + k steps equal 2k, and a kill or a full disk costs the steps since the last checkpoint."""
import errno
import io
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import envs
import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, SCRIPTS, TESTS, digest, load

NAMES = [path.stem for path in SCRIPTS]
each_script = pytest.mark.parametrize("name", NAMES)
one_script = pytest.mark.parametrize("name", ["dreamer_v3"])  # for shared blocks, the same text in all
KILLS = int(os.environ.get("KILLS", 2))  # of test_kill_at_random_moments
# seven steps an episode, the same every time; the ratio leaves a fraction of an update over
SCRIPTED = {
    "iris": dict(env_id="tiny:ScriptedImage-v0", epoch_steps=1),
    "dreamer_v2": dict(env_id="tiny:ScriptedImage-v0", train_every=5),
    "dreamer_v3": dict(env_id="envs:Scripted-v0", train_ratio=5.0),
}


ENDLESS = dict(total_timesteps=1_000_000, buffer_size=1_000)  # a ring that needs little disk


def scripted(name: str, folder: Path, **changes) -> list[str]:
    return tiny.flags(name, folder, **{"eval_episodes": 0, "video_every": 0, **SCRIPTED[name], **changes})


def execute(name: str, *argv) -> int:
    """`python name.py argv` in this process -> exit status. What would print a traceback passes through."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    kept, sys.argv = sys.argv, [f"{name}.py", *map(str, argv)]
    try:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = kept
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def start(*command) -> subprocess.Popen:
    """A Python process with the toy environments on its path, one thread, output unbuffered."""
    env = dict(os.environ, PYTHONPATH=str(TESTS), OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, **pipes)


def wait_for(process: subprocess.Popen, text: str) -> None:
    assert any(text in line for line in process.stdout), process.stderr.read()


def finish(process: subprocess.Popen, seconds: float = 90) -> tuple[str, str]:
    """The rest of its output; a process that hangs is stopped, with its children, and fails the test."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        time.sleep(10)
        process.kill()
        raise


def messages(err: str) -> list[str]:
    """Lines on stderr beside the progress bar, which ends in no newline while it lives."""
    return [line for line in re.split(r"[\r\n]+", err) if line.strip() and "%|" not in line]


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def checkpoint(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)


def stored(run: Path, capacity: int, replay: str = "replay0") -> dict[str, np.ndarray]:
    """Replay files of a process with one environment -> field name: array (capacity,) or (capacity,n)."""
    types = dict.fromkeys("end frame is_first is_last is_terminal".split(), "?")
    types |= dict(number="i8", image="u1", stoch="u1")
    types |= dict(action="i2") if (run / replay / "end.bin").exists() else {}  # iris: a number, the others: one-hot
    fields = {path.stem: np.fromfile(path, types.get(path.stem, "f4")) for path in (run / replay).glob("*.bin")}
    return {name: values.reshape(capacity, -1).squeeze() for name, values in fields.items()}


@pytest.fixture(scope="module", params=NAMES)
def finished(request, tmp_path_factory) -> tuple[str, Path]:
    """(script name, directory of a finished run of 24 steps); copy it before changing it."""
    folder = tmp_path_factory.mktemp("finished")
    assert execute(request.param, *scripted(request.param, folder, save_every=10)) == 0
    return request.param, only(folder)


# ---- resumed = not interrupted ----


def differences(a, b, path: str = "") -> list[str]:
    """Where two nested structures of tensors and plain values are not equal, bit by bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in sorted(a.keys() | b.keys()) for d in differences(a.get(k), b.get(k), f"{path}/{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}/{i}")]
    tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    equal = torch.equal(a, b) if tensors else a == b
    return [] if equal else [path]


def everything(run: Path) -> dict:
    """Checkpoint, replay files and metrics of a run, without what may differ: its name and its speed, and that a run
    which ends twice has two last dream videos."""
    saved = {k: v for k, v in checkpoint(run).items() if k != "args"}
    rows = {path.name: path.read_bytes() for path in run.glob("replay*/*.bin")}
    scalars = {tag: points[-1:] if tag.startswith("dream/") else points
               for tag, points in tiny.events(run)[0].items() if tag not in ("charts/SPS", "charts/UPS")}
    assert saved["updates"] > 4 and rows and "losses/reward" in scalars
    return dict(saved=saved, rows=rows, scalars=scalars)


@each_script
@pytest.mark.parametrize("how", ["SIGTERM", "total"])
def test_k_plus_k_steps_are_2k(name, how, tmp_path, monkeypatch, k=35):
    """Stopped by a signal, or by a small --total-timesteps that is raised later, there with a ring that is full.

    After k steps a fraction of an update is due and, with 13 rows in a sequence of dreamer_v3, the 40 rows leave one in
    its queue."""
    calls, step = [], envs.Scripted.step
    flags = dict(log_every=7, total_timesteps=2 * k, buffer_size=24 if how == "total" else 1000)
    flags |= dict(batch_length=12) if name == "dreamer_v3" else {}
    assert execute(name, *scripted(name, tmp_path / "whole", **flags)) == 0

    def stop_at_k(self, action):
        calls.append(action)
        if len(calls) == k and how == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, action)

    monkeypatch.setattr(envs.Scripted, "step", stop_at_k)
    first = {**flags, **(dict(total_timesteps=k) if how == "total" else {})}
    assert execute(name, *scripted(name, tmp_path / "half", **first)) == 0
    run = only(tmp_path / "half")
    assert checkpoint(run)["step"] == k == len(calls)
    assert execute(name, "--resume", run, "--total-timesteps", 2 * k) == 0
    assert differences(everything(only(tmp_path / "whole")), everything(run)) == []


@each_script
def test_resumed_episodes_are_new(name, tmp_path, monkeypatch):
    """Not the first ones again: the environments begin with another seed."""
    seeds, reset = [], envs.Catch.reset

    def seen(self, *, seed=None, options=None):
        seeds.extend([] if seed is None else [seed])
        return reset(self, seed=seed, options=options)

    monkeypatch.setattr(envs.Catch, "reset", seen)
    flags = tiny.flags(name, tmp_path, total_timesteps=7, eval_episodes=0, video_every=0)
    assert execute(name, *flags) == 0
    assert execute(name, "--resume", only(tmp_path), "--total-timesteps", 14) == 0
    assert len(seeds) == len(set(seeds)) == 2


@each_script
def test_looking_changes_nothing(name, tmp_path):
    """Evaluations and dream videos draw other random numbers; else a checkpoint made before one goes on differently."""
    for folder, every in dict(blind=0, seeing=20).items():
        flags = tiny.flags(name, tmp_path / folder, total_timesteps=32, eval_every=every, video_every=every)
        assert execute(name, *flags) == 0
    blind, seeing = (checkpoint(only(tmp_path / folder)) for folder in ("blind", "seeing"))
    assert [d for d in differences(blind, seeing) if not d.startswith("/args")] == []


def test_checkpoints_are_plain_data(finished):
    """One file, loadable with weights_only=True; the random generators are in it."""
    _, run = finished
    saved = checkpoint(run)
    assert [path.name for path in run.glob("checkpoint*")] == ["checkpoint.pt"] and saved["step"] == 24
    assert [state.dtype for state in saved["rng"]] == [torch.uint8]


# ---- signals and kills ----


def check_rows(run: Path, kills: int = 0, replay: str = "replay0") -> dict:
    """The checkpoint; each replay row that it counts is what the scripted environment gave, in order."""
    saved = checkpoint(run)
    field, count = stored(run, saved["capacity"], replay), saved["replay"]["rows"]
    size = min(count, saved["capacity"])
    newest = np.arange(count - 1, count - 1 - size, -1)  # valid up to what a killed life overwrote
    kept = (field.pop("number")[newest % saved["capacity"]] == newest).cumprod().sum()
    rows = {k: v[np.arange(count - kept, count) % saved["capacity"]] for k, v in field.items()}
    step, code = rows["vector" if "vector" in rows else "image"][:, :2].T
    if "end" in rows:  # what came of the action stands beside it, and no frame beside an end
        assert len(step) > 8 and np.array_equal(rows["reward"], step + 1) and np.array_equal(code == 0, step == 0)
        assert np.array_equal(rows["end"], step == 6) and not step[1:][rows["end"][:-1]].any()
        goes_on = step[1:] > 0
        assert np.array_equal(step[1:][goes_on], step[:-1][goes_on] + 1)
        assert np.array_equal(code[1:][goes_on], rows["action"][:-1][goes_on] + 1)
        assert (~goes_on & ~rows["end"][:-1]).sum() <= kills, "an episode is abandoned at a kill only"
        return saved
    assert len(step) > 8 and np.array_equal(rows["reward"], step)
    assert np.array_equal(rows["is_first"], step == 0) and np.array_equal(code == 0, step == 0)
    assert np.array_equal(rows["is_last"], step == 7) and np.array_equal(rows["is_terminal"], step == 7)
    arrival = saved["algorithm"] in tiny.ARRIVAL
    assert np.array_equal(rows["action"].sum(-1), step != (0 if arrival else 7))
    assert all(np.isfinite(values).all() for values in rows.values())
    goes_on = ~rows["is_first"][1:]
    assert np.array_equal(step[1:][goes_on], step[:-1][goes_on] + 1)
    cause = rows["action"][1:] if arrival else rows["action"][:-1]
    assert np.array_equal(code[1:][goes_on], cause.argmax(-1)[goes_on] + 1)
    assert (rows["is_first"][1:] & ~rows["is_last"][:-1]).sum() <= kills, "an episode is abandoned at a kill only"
    return saved


@pytest.mark.parametrize("name, number", [  # each signal once: what listens to them is the same text in every script
    (NAMES[i % len(NAMES)], number) for i, number in enumerate(("SIGTERM", "SIGINT", "SIGUSR1"))])
def test_signals_save_and_exit_0(name, number, tmp_path):
    with start(ROOT / f"{name}.py", *scripted(name, tmp_path, **ENDLESS)) as process:
        wait_for(process, "global_step=14")
        process.send_signal(getattr(signal, number))
        out, err = finish(process)
    assert (process.returncode, messages(err)) == (0, [])
    run = only(tmp_path)
    assert check_rows(run)["step"] == int(re.search(rf"saved at step (\d+); continue with --resume {run}", out)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@one_script
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_second_signal(name, number):
    """A second Ctrl-C kills, where saving hangs. A second SIGTERM does not: torchrun passes on what its processes got
    themselves already."""
    script, number = load(name), getattr(signal, number)
    child = os.fork()
    if child == 0:
        received = script.stop_signals()
        for sent in (number, signal.SIGUSR1):
            os.kill(os.getpid(), sent)
        os.kill(os.getpid(), number if received == [number, signal.SIGUSR1] else signal.SIGKILL)
        os._exit(0 if received[2:] == [number] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (-number if number == signal.SIGINT else 0)


@each_script
def test_kill_at_random_moments(name, tmp_path):
    """kill -9 during start, steps, updates and saves; --resume auto goes on each time. KILLS=20 for a longer trial."""
    # 60 rows wrap around within seconds, and some lives end before their first checkpoint
    flags = scripted(name, tmp_path, **{**ENDLESS, "buffer_size": 60}, save_every=30)
    steps = [0]
    for kill in range(KILLS):
        with start(ROOT / f"{name}.py", *flags, "--resume", "auto") as process:
            if kill % 4 == 3:
                time.sleep(random.uniform(1, 4))
            else:
                wait_for(process, "run directory" if kill else "global_step=70")
                time.sleep(random.uniform(0, 1.5))
            assert process.poll() is None, process.stderr.read()
            process.kill()
        saved = check_rows(only(tmp_path), kill + 1)
        steps.append(saved["step"])
    assert steps == sorted(steps) and steps[-1] > 0
    assert execute(name, *flags, "--resume", "auto", "--total-timesteps", steps[-1] + 59) == 0
    assert check_rows(only(tmp_path), KILLS)["step"] == steps[-1] + 59


@one_script
def test_rows_overwritten_by_killed_lives_are_left_out(name, tmp_path):
    """A ring in files against a list: adding, saving and being killed in any order, also twice without a save, and in
    the middle of adding a row."""
    storage, draw = load(name).Storage, random.Random(0)

    def ring_of(new: bool):
        return storage(dict(x=((), torch.float32)), 10, 1, torch.device("cpu"), tmp_path / "replay", new)

    ring, rows, saved, lost, torn = ring_of(new=True), [], ({}, []), 0, 0
    for value in range(3000):
        action = draw.choices(("add", "save", "kill", "kill in add"), (16, 2, 1, 1))[0]
        if action == "add":
            ring.add(dict(x=np.array([value])))
            rows.append(value)
        elif action == "save":
            saved = (ring.state_dict(), list(rows))
        elif saved[0]:
            if action == "kill in add":
                torn += len(rows) == len(saved[1]) >= 10  # the row that it spoils is one that the checkpoint counts
                with pytest.raises(KeyError):  # as if the life ended after the first field
                    ring.add({})
            ring, rows, lost = ring_of(new=False), list(saved[1]), lost + len(rows) - len(saved[1])
            ring.load_state_dict(saved[0])
        oldest = ring.rows - max(ring.size, 0)
        assert ring.rows == len(rows)
        assert [int(ring.data["x"][i % 10, 0]) for i in range(oldest, ring.rows)] == rows[oldest:]
    assert lost > 100 and torn > 5


# ---- saving ----


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@one_script
def test_death_inside_save(name, tmp_path):
    """The process disappears at each call that save_checkpoint makes, and at every twentieth below it."""
    script, calls, die_at = load(name), [], None
    empty = SimpleNamespace(state_dict=dict)

    def on_call(frame, event, argument):
        calls.append((frame.f_code.co_name, Path(frame.f_code.co_filename).name))
        if len(calls) - 1 == die_at:
            os._exit(9)

    def save(folder, step):
        calls.clear()
        agent = SimpleNamespace(state_dict=lambda: dict(weight=torch.ones(1000)))
        sys.setprofile(on_call)
        script.save_checkpoint(folder, script.Args(), agent, empty, empty, torch.device("cpu"), step=step)
        sys.setprofile(None)

    (tmp_path / "good").mkdir()
    for step in (0, 1, 2):
        save(tmp_path / "good", step)
    moments = {i: file for i, (function, file) in enumerate(calls) if function == "save_checkpoint" or i % 20 == 0}
    assert len(moments) > 20
    for die_at, file in moments.items():
        folder = Path(shutil.copytree(tmp_path / "good", tmp_path / f"dead{die_at}"))
        child = os.fork()
        if child == 0:
            save(folder, 3)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert script.load_checkpoint(folder)["step"] in (2, 3)
        die_at = None
        save(folder, 4)
        assert script.load_checkpoint(folder)["step"] == 4


@pytest.mark.parametrize("room", [0, 0.001, 0.5])
def test_full_disk_while_saving(room, finished, tmp_path, monkeypatch, capfd):
    """Room for nothing, for the beginning, for half of a checkpoint: one line, and the old one is as good as before."""
    name, run = finished[0], Path(shutil.copytree(finished[1], tmp_path / "run"))
    size, saved, real_open = (run / "checkpoint.pt").stat().st_size, digest(run / "checkpoint.pt"), open

    class FullDisk(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > room * size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda file, mode="r", *rest, **more: (
            FullDisk(file, "w") if str(file).endswith(".tmp") else real_open(file, mode, *rest, **more)))
        assert execute(name, "--resume", run, "--total-timesteps", 40) == 2
    (line,) = messages(capfd.readouterr().err)
    assert line.startswith("error: ") and "No space left" in line
    assert digest(run / "checkpoint.pt") == saved
    assert execute(name, "--resume", run, "--total-timesteps", 40) == 0 and check_rows(run, 1)["step"] == 40


# ---- flags on resume ----


def test_flags_override_the_saved_ones(finished):
    """What is not given is as the run has it, not as the script's defaults."""
    name, run = finished
    args = load(name).parse_args(["--resume", str(run), "--total-timesteps", "99", "--log-every", "3"])
    saved = dict(checkpoint(run)["args"], resume=str(run), total_timesteps=99, log_every=3)
    assert asdict(args) == saved and args.save_every == 10 and args.env_id == SCRIPTED[name]["env_id"]


def test_resume_from(finished, tmp_path):
    """A run directory, wherever it is now."""
    name, run = finished[0], Path(shutil.copytree(finished[1], tmp_path / "run"))
    assert execute(name, "--resume", run, "--total-timesteps", 30) == 0
    assert check_rows(run, 1)["step"] == 30 and only(tmp_path) == run


def test_resume_auto(finished, tmp_path):
    """The newest run with a checkpoint, of the same environment, name and seed; without one, a new run."""
    name = finished[0]
    env_id = SCRIPTED[name]["env_id"].replace(":", "_")
    folders = [tmp_path / f"{env_id}__{name}__{end}" for end in ("1__4", "1__5", "11__2", "1__7")]
    _, newest, _, killed = folders  # the others: an older one, another seed
    for number, folder in enumerate(folders):
        shutil.copytree(finished[1], folder)
        os.utime(folder / "checkpoint.pt", (number, number))
        for path in folder.glob("*.pt") if folder == killed else ():  # before its first checkpoint
            path.unlink()
    parse = load(name).parse_args
    assert parse([*scripted(name, tmp_path), "--resume", "auto"]).resume == str(newest)
    assert execute(name, *scripted(name, tmp_path, seed=5), "--resume", "auto") == 0
    assert len(list(tmp_path.glob(f"*__{name}__5__*"))) == 1


@one_script
def test_run_the_copy_in_the_run_directory(name, tmp_path):
    """Each run keeps the script that made it: that copy can resume it."""
    assert execute(name, *scripted(name, tmp_path)) == 0
    run = only(tmp_path)
    with start(run / f"{name}.py", "--resume", run, "--total-timesteps", 30) as process:
        _, err = finish(process)
    assert (process.returncode, messages(err)) == (0, []) and checkpoint(run)["step"] == 30


def test_finished_run_is_evaluated(finished, tmp_path, capsys):
    """Three episodes of 1 + 2 + ... + 7, also with an interval between evaluations; nothing else happens to it."""
    name, run = finished[0], Path(shutil.copytree(finished[1], tmp_path / "run"))
    before = {path: digest(path) for path in (*run.glob("*.pt"), *run.glob("replay0/*"), *run.glob("videos/*"))}
    assert execute(name, "--resume", run, "--eval-episodes", 3, "--eval-every", 5) == 0
    assert "evaluation at step 24, 3 episodes: episodic_return 28," in capsys.readouterr().out
    assert tiny.events(run)[0]["eval/episodic_return"] == [(24, 28)]
    assert all(digest(path) == content for path, content in before.items())
