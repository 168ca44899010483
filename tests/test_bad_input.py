"""What a user can get wrong: exit status 2, one line `error: ...` and no traceback, nothing made, nothing lost."""
import itertools
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
from conftest import SCRIPTS, digest, load
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

VECTOR, IMAGE = Box(-1, 1, (2,), np.float32), Box(0, 255, (16, 16, 3), np.uint8)
SPACES = {
    "MultiDiscrete": (IMAGE, MultiDiscrete([2, 3])),
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
    "module without a name": (["--env-id", ":Env-v0"], ":Env-v0"),
    "missing module": (["--env-id", "no_such_module:Env-v0"], "no_such_module"),
    "missing mujoco": (["--env-id", "HalfCheetah-v5"], "pip install"),
    "missing dm_control": (["--env-id", "shimmy:dm_control/walker-walk-v0"], "shimmy"),
    "action space": (["--env-id", "BadMultiDiscrete-v0"], "MultiDiscrete"),
    "text in a Dict": (["--env-id", "BadText-v0"], "Text("),
    "Dict in a Dict": (["--env-id", "BadNested-v0"], "Dict("),
    "discrete observation": (["--env-id", "BadDiscreteObs-v0"], "Discrete(5)"),
    "float image": (["--env-id", "BadFloatImage-v0"], "float32"),
    "nothing to render": (["--env-id", "envs:Scripted-v0", "--pixels"], "render_mode"),
    "no pygame": (["--env-id", "CartPole-v1", "--pixels"], "pip install"),
}
UNSEEN = ("text in a Dict", "Dict in a Dict", "discrete observation")  # who learns from pixels asks for a picture


@each_script
@pytest.mark.filterwarnings("ignore:.*render_mode")
@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_environment(name, case, tmp_path, monkeypatch, capfd):
    argv, named = ENVIRONMENTS[case]
    if not tiny.has(name, "pixels"):
        argv, named = [word for word in argv if word != "--pixels"], "render" if case in UNSEEN else named
    for package in ("pygame", "mujoco", "shimmy"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    line = refused(capfd, name, *tiny.flags(name, tmp_path / "runs"), *argv)
    assert named in line and argv[1] in line
    assert not (tmp_path / "runs").exists()


# ---- flags ----

FLAGS = {  # field values, what the line must name, and the scripts it is about if not all with such fields
    "cuda": (dict(device="cuda"), "--device cuda"),
    "cuda 99": (dict(device="cuda:99"), "--device cuda:99"),
    "nonsense device": (dict(device="gpu"), "--device gpu"),
    "no device": (dict(device=""), "--device"),
    "device of torch, not ours": (dict(device="meta"), "--device meta"),
    "sequence longer than the replay": (dict(buffer_size=64, batch_length=64), "--buffer-size"),
    "sequence longer than each replay": (dict(buffer_size=100, num_envs=10, batch_length=10), "--buffer-size"),
    "sequence without a next step": (dict(batch_length=1), "--batch-length"),
    "image size": (dict(image_size=40), "--image-size"),
    "no training": (dict(train_ratio=0.0), "--train-ratio"),
    "no updates": (dict(train_every=0), "--train-every"),
    "dreams too short for an actor term": (dict(imag_horizon=1), "--imag-horizon", "dreamer_v1", "dreamer_v2"),
    "no gradient": (dict(grad_clip=0.0), "--grad-clip"),
    "share above 1": (dict(kl_balance=1.5), "--kl-balance"),
    "rate above 1": (dict(slow_rate=1.5), "--slow-rate", "dreamer_v2"),
    "missing run": (dict(resume="no/such/run"), "no/such/run"),
}


@each_script
@pytest.mark.parametrize("case", FLAGS)
def test_flags(name, case, tmp_path, capfd):
    values, named, *scripts = FLAGS[case]
    if not tiny.has(name, *values) or name not in (scripts or NAMES):
        pytest.skip("the script has no such flag, or not this limit")
    if "cuda" in str(values) and torch.cuda.is_available() and "99" not in str(values):
        pytest.skip("about machines without a GPU")
    assert named in refused(capfd, name, *tiny.flags(name, tmp_path / "runs", **values))
    assert not (tmp_path / "runs").exists()


SCHEDULES = [name for name in NAMES if hasattr(load(name), "schedule")]
NO_SCHEDULE = ("", "many", "1e-3,1e-4", "linear", "linear()", "linear(1,2)", "linear(1,2,3,4)", "linear(a,b,c)",
               "linear(1,0,0)", "warmup(1)", "warmup(0,1)", "exp(1,0,0)", "horizon(0,1,5)", "cosine(1,0,5)",
               "linear(1,0,5", "linear(1,0,5)x", "nan", "inf", "-1e-3", "linear(nan,0,5)", "linear(-1,1,5)",
               "linear(1,-1,5)", "linear(0,1,-5)", "horizon(10,0,5)", "exp(1,0,-5)")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("text", NO_SCHEDULE)
def test_schedules_that_make_no_sense(name, text, capfd):
    """Neither a number nor a schedule, or one that becomes negative or infinite."""
    for field in ("ent_coef", "rho") if tiny.has(name, "rho") else ("ent_coef",):
        with pytest.raises(SystemExit) as end:
            load(name).parse_args([tiny.flag(field, text)])
        (line,) = capfd.readouterr().err.splitlines()
        assert end.value.code == 2 and line.startswith(f"error: --{field.replace('_', '-')} ") and text in line


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_that_make_sense(name):
    for text in ("0", "1e-3", "linear(1e-3,1e-4,1e6)", "warmup(1e5,1e-3)", "exp(1,0.1,1e4)", "horizon(10,100,1e6)"):
        assert load(name).parse_args([tiny.flag("ent_coef", text)]).ent_coef == text


@pytest.mark.parametrize("name", [name for name in SCHEDULES if tiny.has(name, "rho")])
def test_rho_is_a_share(name, capfd):
    assert load(name).parse_args(["--rho", "linear(0,1,1e6)"]).rho == "linear(0,1,1e6)"
    for text in ("1.5", "linear(0.5,2,100)"):
        with pytest.raises(SystemExit) as end:
            load(name).parse_args(["--rho", text])
        assert end.value.code == 2 and capfd.readouterr().err.startswith("error: --rho ")


@each_script
def test_numbers_that_make_no_sense(name, capfd):
    """Every number: not negative, not NaN, infinite or beyond 32 bits; every size and count: not zero."""
    may_be_zero = {"seed", "learning_starts", "eval_every", "video_every", "warmup", "eval_episodes", "pretrain",
                   "extra_epochs", "world_starts", "behaviour_starts", "burn_in"}
    for field in fields(load(name).Args):
        if not any(kind in str(field.type) for kind in ("int", "float")):
            continue
        whole, flag = "int" in str(field.type), f"--{field.name.replace('_', '-')}"
        wrong = ("-1", "3_000_000_000", *(["0"] if field.name not in may_be_zero else []))
        for value in wrong if whole else ("-0.5", "nan", "inf"):
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


def two_processes(run: Path) -> None:
    """As if each of two had its own half of the environments."""
    edit(run, capacity=2 * checkpoint(run)["capacity"])


DAMAGE = {  # what happens to the run, what the line must name
    "empty checkpoint": (lambda run: cut(run / "checkpoint.pt", 0), "damaged"),
    "cut checkpoint": (lambda run: cut(run / "checkpoint.pt", 100_000), "damaged"),
    "text": (lambda run: (run / "checkpoint.pt").write_text("hello"), "damaged"),
    "pickled code": (lambda run: torch.save(types.SimpleNamespace(), run / "checkpoint.pt"), "damaged"),
    "foreign tensors": (lambda run: torch.save([torch.ones(2)], run / "checkpoint.pt"), "damaged"),
    "no arguments": (lambda run: torch.save(without(checkpoint(run), "args"), run / "checkpoint.pt"), "damaged"),
    "another algorithm": (lambda run: edit(run, algorithm="another"), "another.py"),
    "another version": (other_flags, "another version"),
    "an older version": (lambda run: edit(run, args=without(checkpoint(run)["args"], "gamma")), "another version"),
    "no checkpoint": (lambda run: (run / "checkpoint.pt").unlink(), "missing"),
    "no replay": (lambda run: shutil.rmtree(run / "replay0"), "replay0"),
    "a part of the replay": (lambda run: (run / "replay0" / "reward.bin").unlink(), "reward.bin"),
    "an empty file in the replay": (lambda run: cut(run / "replay0" / "reward.bin", 0), "reward.bin"),
    "a cut file in the replay": (lambda run: cut(run / "replay0" / "reward.bin", 90), "reward.bin"),
    "replay of two processes": (two_processes, "is damaged, or of "),
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
    assert not {path for path in changed if path.endswith((".pt", ".bin"))}


@pytest.mark.parametrize("part", ["actor", "encoder"])
def test_checkpoint_without_some_weights(part, run, capfd):
    """The run does not go on with random weights in place of the missing ones."""
    name, folder = run
    weights = checkpoint(folder)["agent"]
    kept = {key: value for key, value in weights.items() if part not in key}
    edit(folder, agent=kept)
    before, line = digest(folder / "checkpoint.pt"), refused(capfd, name, "--resume", folder, "--total-timesteps", 40)
    assert len(kept) < len(weights) and "other networks" in line and part in line
    assert digest(folder / "checkpoint.pt") == before


CHANGED = {  # flags that make other networks, or another replay; the scripts it is about
    "image size": (dict(image_size=32),),
    "size": (dict(size="size12m"),),
    "width": (dict(deter=32),),
    "vocabulary": (dict(vocab_size=16),),
    "environments": (dict(num_envs=2),),
    "precision": (dict(precision="bf16"), "dreamer_v3"),  # whose replay has h in it
    "environment": (dict(env_id="CartPole-v1"), "dreamer_v3"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_changed_on_resume(case, run, capfd):
    name, folder = run
    values, *scripts = CHANGED[case]
    if not tiny.has(name, *values) or name not in (scripts or NAMES):
        pytest.skip("the script has no such flag, or may change it")
    if name == "dreamer_v3" and "image_size" in values:  # a run that learns from images
        assert execute(name, *scripted(name, folder.parent / "images", env_id="tiny:ScriptedImage-v0")) == 0
        folder = only(folder.parent / "images")
    before = contents(folder)
    flags = [tiny.flag(*pair) for pair in values.items()]
    line = refused(capfd, name, "--resume", folder, *flags, "--total-timesteps", 40)
    assert "other networks" in line or ".bin is damaged, or of " in line
    assert contents(folder) == before


def test_sequence_longer_than_the_resumed_replay(run, capfd):
    """The ring has as many rows as the first life could fill, whatever --buffer-size says; iris' length is fixed."""
    name, folder = run
    before, fixed = contents(folder), name == "iris"  # whose Transformer has a weight for each place
    line = refused(capfd, name, "--resume", folder, "--batch-length", 30, "--total-timesteps", 40)
    assert ("networks" if fixed else "--batch-length") in line
    assert contents(folder) == before


# ---- disks ----


@each_script
def test_replay_takes_its_disk_space(name, tmp_path):
    """All blocks are there, not only the length of the files."""
    script = load(name)
    script.Storage(dict(x=((1000,), torch.float32)), 1000, 1, torch.device("cpu"), tmp_path / "replay")
    assert (tmp_path / "replay" / "x.bin").stat().st_blocks * 512 >= 4_000_000


# ---- episodes that replay cannot give ----

EPISODES = [name for name in NAMES if hasattr(load(name), "EpisodeReplay")]


@pytest.mark.parametrize("name", EPISODES)
@pytest.mark.parametrize("flags", [dict(batch_length=8), dict(batch_length=5, buffer_size=7)], ids=["short", "long"])
def test_no_episode_fits(name, flags, tmp_path, capfd):
    """Seven steps are fewer than a sequence, or more than the replay holds: said after 100 episodes, not never."""
    flags = dict(total_timesteps=900, learning_starts=690, **flags)
    line = refused(capfd, name, *scripted(name, tmp_path / "runs", **flags))
    assert " 100 episodes" in line and "--batch-length" in line
    (numbers,) = tmp_path.glob("runs/*/replay0/number.bin")
    assert np.fromfile(numbers, np.int64).max() + 1 == 800, "rows of 100 episodes"


@pytest.mark.parametrize("name", EPISODES)
def test_some_episodes_fit(name, tmp_path):
    """Short ones are left out, as long as there are others."""
    gymnasium.register("Mixed-v0", lambda lengths=itertools.cycle([3, 7, 3]): envs.Scripted(next(lengths), image=True))
    flags = scripted(name, tmp_path, env_id="Mixed-v0", num_envs=3, batch_length=7, total_timesteps=500)
    assert execute(name, *flags, "--train-every", 100) == 0
    assert checkpoint(only(tmp_path))["updates"] == 6


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
    # an episode that begins with step 22 is replayed from step 28 on, and hardly missed by two samples a step
    after, flags = (21, dict(train_every=1)) if name in EPISODES else (30, {})
    with monkeypatch.context() as patch:
        nan_reward(patch, after)
        line = refused(capfd, name, *scripted(name, tmp_path, total_timesteps=1_000, save_every=20, **flags))
    folder = only(tmp_path)
    assert "losses/reward is nan at step" in line and str(folder) in line
    assert after < int(line.split("at step ")[1].split(";")[0]) < 60
    assert checkpoint(folder)["step"] == 20
    assert execute(name, "--resume", folder, "--total-timesteps", 60) == 0 and check_rows(folder, 1)["step"] == 60


def test_diverged_run_can_go_on(run, capfd):
    """NaN weights write no NaN latents into replay rows that the last good checkpoint needs."""
    name, folder = run
    rate = next(f"--{f.name.replace('_', '-')}" for f in fields(load(name).Args) if f.name in ("lr", "model_lr"))
    resume, rarely = ("--resume", folder, "--total-timesteps", 60), ("--log-every", 20, "--save-every", 1000)
    assert "is nan at step 40" in refused(capfd, name, *resume, *rarely, rate, "1e9")
    assert checkpoint(folder)["step"] == 24
    assert execute(name, *resume, rate, "1e-5") == 0 and check_rows(folder, 1)["step"] == 60


def test_nan_weights_are_not_saved(run, monkeypatch, capfd):
    """An infinite gradient behind finite losses, in the only update before a save."""
    name, folder = run
    saved, losses = digest(folder / "checkpoint.pt"), []
    backward, grad = torch.Tensor.backward, torch.autograd.grad

    def explode(loss, *_):
        losses.append(loss.item())
        backward(loss, torch.full_like(loss, math.inf if name == "dreamer_v3" or len(losses) == 3 else 1.0))

    def explode_last(loss, params):  # of the three losses of an update
        losses.append(loss.item())
        return grad(loss, params, torch.full_like(loss, math.inf if len(losses) == 3 else 1.0))

    monkeypatch.setattr(torch.Tensor, "backward", explode)
    monkeypatch.setattr(torch.autograd, "grad", explode_last)
    once = (("--train-every", 20) if tiny.has(name, "train_every") else
            ("--epoch-steps", 50) if tiny.has(name, "epoch_steps") else ("--train-ratio", 1))
    flags = ("--total-timesteps", 45, *once, "--save-every", 1000, "--log-every", 1000)
    assert "grad" in refused(capfd, name, "--resume", folder, *flags)
    assert len(losses) in (1, 3) and all(map(math.isfinite, losses))
    assert digest(folder / "checkpoint.pt") == saved
