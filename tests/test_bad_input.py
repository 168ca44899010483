"""What a user can get wrong: exit status 2, one line `error: ...` and no traceback, nothing made, nothing lost."""
import errno
import math
import os
import shutil
import sys
import types
from dataclasses import fields
from pathlib import Path

import envs
import gymnasium
import numpy as np
import pytest
import tiny
import torch
from conftest import SCRIPTS, load
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Text
from test_resume import check_rows, checkpoint, execute, finished, messages, only, scripted  # noqa: F401  a fixture

NAMES = [path.stem for path in SCRIPTS]
each_script = pytest.mark.parametrize("name", NAMES)


def refused(capfd, name: str, *argv) -> str:
    """Run the script; it must end with status 2 and one line on stderr -> that line without `error: `."""
    capfd.readouterr()
    assert execute(name, *argv) == 2
    (line,) = messages(capfd.readouterr().err)
    assert line.startswith("error: ") and len(line) < 500
    return line.removeprefix("error: ")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(finished, tmp_path) -> tuple[str, Path]:  # noqa: F811
    """(script name, a copy of the run directory of a finished run of 24 steps)."""
    return finished[0], Path(shutil.copytree(finished[1], tmp_path / "run"))


# ---- environments ----

VECTOR = Box(-1, 1, (2,), np.float32)
SPACES = {
    "MultiDiscrete": (VECTOR, MultiDiscrete([2, 3])),
    "Text": (Dict(words=Text(5), vector=VECTOR), Discrete(2)),
    "Nested": (Dict(inner=Dict(vector=VECTOR)), Discrete(2)),
    "DiscreteObs": (Discrete(5), Discrete(2)),
    "FloatImage": (Box(0, 1, (16, 16, 3), np.float32), Discrete(2)),
}
for kind, (observation, action) in SPACES.items():
    spaces = dict(observation_space=observation, action_space=action)
    gymnasium.register(f"Bad{kind}-v0", entry_point=type(kind, (gymnasium.Env,), spaces))

ENVIRONMENTS = {  # flags, what the line must name
    "unknown id": (["--env-id", "CartPol-v1"], "CartPole"),
    "unknown game": (["--env-id", "ALE/Pongg-v5"], "Pong`"),
    "unknown version": (["--env-id", "CartPole-v9"], "v1"),
    "unknown id in a module": (["--env-id", "envs:Cetch-v0"], "Catch"),
    "malformed id": (["--env-id", "no such thing"], "no such thing"),
    "missing module": (["--env-id", "no_such_module:Env-v0"], "no_such_module"),
    "missing mujoco": (["--env-id", "HalfCheetah-v5"], "pip install"),
    "action space": (["--env-id", "BadMultiDiscrete-v0"], "MultiDiscrete"),
    "text in a Dict": (["--env-id", "BadText-v0"], "'words'"),
    "Dict in a Dict": (["--env-id", "BadNested-v0"], "'inner'"),
    "discrete observation": (["--env-id", "BadDiscreteObs-v0"], "Discrete(5)"),
    "float image": (["--env-id", "BadFloatImage-v0"], "float32"),
    "nothing to render": (["--env-id", "envs:Scripted-v0", "--pixels"], "render_mode"),
    "no pygame": (["--env-id", "CartPole-v1", "--pixels"], "pip install"),
}


@each_script
@pytest.mark.filterwarnings("ignore:.*render_mode")
@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_environment(name, case, tmp_path, monkeypatch, capfd):
    argv, named = ENVIRONMENTS[case]
    if "--pixels" in argv and "pixels" not in {f.name for f in fields(load(name).Args)}:
        pytest.skip("the script has no such flag")
    for package in ("pygame", "mujoco"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    line = refused(capfd, name, *tiny.flags(name, tmp_path / "runs"), *argv)
    assert named in line and argv[1] in line
    assert not (tmp_path / "runs").exists()


# ---- flags ----

FLAGS = {  # field values, what the line must name
    "cuda": (dict(device="cuda"), "--device cuda"),
    "cuda 99": (dict(device="cuda:99"), "--device cuda:99"),
    "nonsense device": (dict(device="gpu"), "--device gpu"),
    "device of torch, not ours": (dict(device="meta"), "--device meta"),
    "no device": (dict(device=""), "--device"),
    "replay on an absent GPU": (dict(buffer_device="cuda"), "--buffer-device"),
    "sequence longer than the replay": (dict(buffer_size=64, batch_length=64), "--buffer-size"),
    "sequence longer than each replay": (dict(buffer_size=100, num_envs=10, batch_length=10), "--buffer-size"),
    "sequence without a next step": (dict(batch_length=1), "--batch-length"),
    "image size": (dict(image_size=40), "--image-size"),
    "gamma above 1": (dict(gamma=1.5), "--gamma"),
    "lambda above 1": (dict(lam=1.01), "--lam"),
    "probability above 1": (dict(sticky_actions=2.0), "--sticky-actions"),
    "no training": (dict(train_ratio=0.0), "--train-ratio"),
    "nothing to evaluate": (dict(eval_only=True), "--checkpoint"),
    "missing run": (dict(resume="no/such/run"), "no/such/run"),
    "missing policy": (dict(eval_only=True, checkpoint="no/such/run"), "no/such/run"),
}


@each_script
@pytest.mark.parametrize("case", FLAGS)
def test_flags(name, case, tmp_path, capfd):
    values, named = FLAGS[case]
    if not set(values) <= {f.name for f in fields(load(name).Args)}:
        pytest.skip("the script has no such flag")
    if "cuda" in str(values) and torch.cuda.is_available() and "99" not in str(values):
        pytest.skip("about machines without a GPU")
    assert named in refused(capfd, name, *tiny.flags(name, tmp_path / "runs", **values))
    assert not (tmp_path / "runs").exists()


@each_script
def test_numbers_that_make_no_sense(name, capfd):
    """Every number: not negative, not NaN, not infinite; every size and count: not zero either."""
    may_be_zero = {"seed", "learning_starts", "eval_every", "video_every", "warmup", "eval_episodes"}
    for field in fields(load(name).Args):
        if not any(kind in str(field.type) for kind in ("int", "float")):
            continue
        whole, flag = "int" in str(field.type), f"--{field.name.replace('_', '-')}"
        for value in (("-1", *(["0"] if field.name not in may_be_zero else [])) if whole else ("-0.5", "nan", "inf")):
            with pytest.raises(SystemExit) as end:
                load(name).parse_args([f"{flag}={value}"])
            (line,) = capfd.readouterr().err.splitlines()
            assert end.value.code == 2 and line.startswith("error: ") and flag in line


@each_script
@pytest.mark.parametrize("argv", ["--no-such-flag 1", "--num-envs many", "--precision fp8", "--total-timesteps 1.5"])
def test_the_parser_refuses(name, argv, tmp_path, capfd):
    """tyro's own message, longer than a line."""
    assert execute(name, *tiny.flags(name, tmp_path / "runs"), *argv.split()) == 2
    err = capfd.readouterr().err
    assert argv.split()[0] in err and "Traceback" not in err and not (tmp_path / "runs").exists()


@each_script
def test_run_directory_cannot_be_made(name, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert "file" in refused(capfd, name, *scripted(name, tmp_path / "file" / "runs"))


# ---- runs to resume ----


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def edit(run: Path, **changes) -> None:
    torch.save({**checkpoint(run), **changes}, run / "checkpoint.pt")


def without(saved: dict, key: str) -> dict:
    return {k: v for k, v in saved.items() if k != key}


def other_flags(run: Path) -> None:
    edit(run, args={**checkpoint(run)["args"], "flag_of_another_version": 1})


def other_processes(run: Path) -> None:
    rows = np.load(run / "replay0" / "reward.npy")
    np.save(run / "replay0" / "reward.npy", rows.repeat(2, 1))


DAMAGE = {  # what happens to the run, what the line must name
    "empty checkpoint": (lambda run: cut(run / "checkpoint.pt", 0), "checkpoint_prev.pt"),
    "cut checkpoint": (lambda run: cut(run / "checkpoint.pt", 100_000), "checkpoint_prev.pt"),
    "text": (lambda run: (run / "checkpoint.pt").write_text("hello"), "damaged"),
    "pickled code": (lambda run: torch.save(types.SimpleNamespace(), run / "checkpoint.pt"), "damaged"),
    "foreign tensors": (lambda run: torch.save([torch.ones(2)], run / "checkpoint.pt"), "damaged"),
    "no arguments": (lambda run: torch.save(without(checkpoint(run), "args"), run / "checkpoint.pt"), "damaged"),
    "another algorithm": (lambda run: edit(run, algorithm="another"), "another.py"),
    "another version": (other_flags, "flag_of_another_version"),
    "no checkpoint": (lambda run: [path.unlink() for path in run.glob("checkpoint*.pt")], "no checkpoint.pt"),
    "policy only": (lambda run: shutil.copy(run / "policy.pt", run / "checkpoint.pt"), "policy"),
    "no replay": (lambda run: shutil.rmtree(run / "replay0"), "replay"),
    "a part of the replay": (lambda run: (run / "replay0" / "reward.npy").unlink(), "reward.npy"),
    "an empty file in the replay": (lambda run: cut(run / "replay0" / "reward.npy", 0), "reward.npy"),
    "replay of two processes": (other_processes, "replay"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_run(case, run, capfd):
    name, folder = run
    damage, named = DAMAGE[case]
    damage(folder)
    before = contents(folder)
    assert named in refused(capfd, name, "--resume", folder, "--total-timesteps", 40)
    after = contents(folder)
    changed = {path.name for path in before if after.get(path) != before[path]}
    assert not {path for path in changed if path.endswith((".pt", ".npy"))}


def test_policy_without_an_actor(run, capfd):
    """Not played with random weights in place of the missing ones."""
    name, folder = run
    saved = checkpoint(folder, "policy.pt")
    actor = [key for key in saved["agent"] if "actor" in key]
    torch.save(dict(saved, agent={k: v for k, v in saved["agent"].items() if k not in actor}), folder / "policy.pt")
    assert actor and str(folder) in refused(capfd, name, "--eval-only", "--checkpoint", folder, "--eval-episodes", 1)


def test_policy_is_no_run(run, capfd):
    name, folder = run
    assert "--eval-only" in refused(capfd, name, "--resume", folder / "policy.pt")


def test_changed_architecture(run, capfd):
    name, folder = run
    before = contents(folder)
    assert "--image-size cannot change" in refused(capfd, name, "--resume", folder, "--image-size", 32)
    assert contents(folder) == before


def test_sequence_longer_than_the_resumed_replay(run, capfd):
    """The ring has as many rows as the first life could fill, whatever --buffer-size says."""
    name, folder = run
    before = checkpoint(folder)
    assert "--batch-length" in refused(capfd, name, "--resume", folder, "--batch-length", 30, "--total-timesteps", 40)
    assert checkpoint(folder)["step"] == before["step"]


# ---- disks ----


@each_script
def test_no_room_for_replay(name, tmp_path, monkeypatch, capfd):
    """Said before anything is written, with a size that would fit."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(total=10**6, used=0, free=10**5))
    line = refused(capfd, name, *scripted(name, tmp_path / "runs", total_timesteps=200))
    fits = int(line.split("--buffer-size ")[1].split()[0])
    assert not (tmp_path / "runs").exists()
    assert execute(name, *scripted(name, tmp_path / "runs", buffer_size=fits)) == 0, "the advice is good"


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_full_disk_under_replay(run, monkeypatch, capfd):
    """Replay files ask for their disk space: a full disk is an error in time, not a crash at a later write."""
    name, folder = run
    before = contents(folder)

    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert "disk is full" in refused(capfd, name, *scripted(name, folder.parent))
    assert contents(folder) == before


# ---- NaN ----


def nan_reward(monkeypatch, after: int) -> None:
    step, calls = envs.Scripted.step, []

    def patched(self, action):
        calls.append(action)
        obs, reward, *rest = step(self, action)
        return obs, math.nan if len(calls) > after else reward, *rest

    monkeypatch.setattr(envs.Scripted, "step", patched)


@each_script
def test_nan_loss(name, tmp_path, monkeypatch, capfd):
    """The line names the term and the step, and the last good checkpoint goes on where the environment is mended."""
    with monkeypatch.context() as patch:
        nan_reward(patch, after=30)
        line = refused(capfd, name, *scripted(name, tmp_path, total_timesteps=1_000, save_every=20, log_every=1))
    folder = only(tmp_path)
    assert "losses/reward is nan at step" in line and str(folder) in line
    assert 30 < int(line.split("at step ")[1].split(";")[0]) < 60
    assert checkpoint(folder)["step"] == 20
    assert execute(name, "--resume", folder, "--total-timesteps", 60) == 0 and check_rows(folder, 1)["step"] == 60


def test_diverged_run_can_go_on(run, capfd):
    """NaN weights write no NaN latents into replay rows that the last good checkpoint needs."""
    name, folder = run
    rate = next(f"--{f.name.replace('_', '-')}" for f in fields(load(name).Args) if f.name in ("lr", "model_lr"))
    resume, rarely = ("--resume", folder, "--total-timesteps", 60), ("--log-every", 20, "--save-every", 1000)
    assert "is nan at step 40" in refused(capfd, name, *resume, *rarely, rate, "1e30")
    assert checkpoint(folder)["step"] == 24
    assert execute(name, *resume, rate, "1e-5") == 0 and check_rows(folder, 1)["step"] == 60


def test_nan_weights_are_not_saved(run, monkeypatch, capfd):
    """An infinite gradient behind finite losses, in the only update before a save."""
    name, folder = run
    saved, backward, calls = (folder / "checkpoint.pt").read_bytes(), torch.Tensor.backward, []

    def explode(loss, *_):
        calls.append(loss.item())
        backward(loss, torch.full_like(loss, math.inf))

    monkeypatch.setattr(torch.Tensor, "backward", explode)
    flags = ("--total-timesteps", 45, "--train-ratio", 1, "--save-every", 1000)
    assert "grad" in refused(capfd, name, "--resume", folder, *flags)
    assert len(calls) == 1 and math.isfinite(calls[0])
    assert (folder / "checkpoint.pt").read_bytes() == saved
