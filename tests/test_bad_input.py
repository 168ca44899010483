"""What a user can get wrong: exit status 2, one line `error: ...` and no traceback, nothing lost."""

import gc
import math
import sys
from pathlib import Path

import envs
import gymnasium
import pytest
import tiny
import torch
from conftest import SCRIPTS, digest, load

NAMES = [path.stem for path in SCRIPTS]
each_script = pytest.mark.parametrize("name", NAMES)


def refused(capfd, name: str, argv: list) -> str:
    """The script must end with status 2 and one line on stderr -> that line without `error: `."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        tiny.call(name, [str(word) for word in argv])
    assert end.value.code == 2
    lines = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "error: " in line]
    assert len(lines) == 1 and len(lines[0]) < 600
    return lines[0].split("error: ")[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run directories of finished runs, made once for each script."""
    made = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tiny.run(name, tmp_path_factory.mktemp(name), eval_episodes=0)
        return made[name]

    return get


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run of a script."""
    import shutil

    return lambda name: Path(shutil.copytree(finished(name), tmp_path / "run"))


ENVIRONMENTS = {  # id, what the line must name
    "unknown id": ("CartPol-v1", "CartPole"),
    "unknown game": ("ALE/Pongg-v5", "Pong"),
    "unknown version": ("CartPole-v9", "v1"),
    "malformed id": ("no such thing", "no such thing"),
    "missing module": ("no_such_module:Env-v0", "no_such_module"),
    "missing mujoco": ("HalfCheetah-v5", "pip install"),
}


@each_script
@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_environment(name, case, tmp_path, monkeypatch, capfd):
    env_id, named = ENVIRONMENTS[case]
    for package in ("mujoco", "mujoco_py"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    line = refused(capfd, name, tiny.flags(name, tmp_path / "runs", env_id=env_id))
    assert named in line
    assert not list(tmp_path.glob("runs/*/checkpoint.pt"))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in tiny.VECTORS])
def test_nothing_to_see(name, tmp_path, capfd):
    assert "render_mode" in refused(capfd, name, tiny.flags(name, tmp_path, env_id="envs:Scripted-v0"))


@pytest.mark.parametrize("name", [name for name in NAMES if name in tiny.DISCRETE_ONLY])
def test_continuous_actions_name_a_script_that_has_them(name, tmp_path, capfd):
    assert "dreamer_v3.py" in refused(capfd, name, tiny.flags(name, tmp_path, env_id="envs:Track-v0"))


FLAGS = {
    "cuda": dict(device="cuda"),
    "cuda 99": dict(device="cuda:99"),
    "nonsense device": dict(device="gpu"),
    "no sequence fits": dict(buffer_size=3),
    "short sequence": dict(batch_length=1),
    "image size": dict(image_size=40),
    "no steps": dict(total_timesteps=0),
    "negative steps": dict(total_timesteps=-5),
    "no environments": dict(num_envs=0),
    "no batch": dict(batch_size=0),
    "no training": dict(train_ratio=0.0),
    "negative seed": dict(seed=-1),
    "fewer than no episodes": dict(eval_episodes=-1),
    "never saved": dict(save_every=0),
    "no warm-up": dict(warmup=0),
    "missing run": dict(resume="no/such/run"),
    "growing values": dict(gamma=1.5),
    "impossible probability": dict(sticky_actions=2.0),
    "backwards": dict(action_repeat=-1),
    "no hidden layers": dict(layers=0),
    "nobody learns": dict(learning_starts=10**6),
}


@each_script
@pytest.mark.parametrize("case", FLAGS)
def test_flags(name, case, tmp_path, capfd):
    if not all(tiny.has(name, field) for field in FLAGS[case]):
        pytest.skip("the script has no such flag")
    if case == "cuda" and torch.cuda.is_available():
        pytest.skip("about machines without a GPU")
    if case == "nobody learns" and name not in ("dreamer_v1", "dreamer_v2"):
        pytest.skip("it may only collect")
    line = refused(capfd, name, tiny.flags(name, tmp_path / "runs", **FLAGS[case]))
    if case != "missing run":
        assert any(f"--{field.replace('_', '-')}" in line for field in FLAGS[case])
    assert not list(tmp_path.glob("runs/*/checkpoint.pt"))


# ---- runs to resume ----


def edit(run: Path, **changes) -> None:
    torch.save({**tiny.checkpoint(run), **changes}, run / "checkpoint.pt")


def flip_byte(run: Path) -> None:
    """In the middle of the weights."""
    data = bytearray((run / "checkpoint.pt").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (run / "checkpoint.pt").write_bytes(data)


def other_flags(run: Path) -> None:
    edit(run, args={**tiny.checkpoint(run)["args"], "flag_of_another_version": 1})


DAMAGE = {
    "empty": lambda run: (run / "checkpoint.pt").write_bytes(b""),
    "cut": lambda run: (run / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:-100]),
    "flipped byte": flip_byte,
    "text": lambda run: (run / "checkpoint.pt").write_text("hello"),
    "other tensors": lambda run: torch.save([torch.ones(2)], run / "checkpoint.pt"),
    "another script": lambda run: edit(run, script="another"),
    "another version": other_flags,
    "gone": lambda run: (run / "checkpoint.pt").unlink(),
    "no replay": lambda run: (run / "replay0" / "reward.bin").unlink(),
    "cut replay": lambda run: (run / "replay0" / "reward.bin").write_bytes(b"123"),
}


@each_script
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_run(name, case, copy, capfd):
    run = copy(name)
    DAMAGE[case](run)
    refused(capfd, name, ["--resume", run, "--total-timesteps", 40])


@each_script
def test_missing_weights(name, copy, capfd):
    """The run does not go on with random weights in their place."""
    run = copy(name)
    weights = tiny.checkpoint(run)["agent"]
    key = next(key for key in weights if key.endswith("weight"))
    edit(run, agent={k: v for k, v in weights.items() if k != key})
    assert "other networks" in refused(capfd, name, ["--resume", run, "--total-timesteps", 40])


@each_script
def test_another_environment_on_resume(name, copy, capfd):
    line = refused(capfd, name, ["--resume", copy(name), "--env-id", "envs:Lock-v0"])
    assert "envs:Catch-v0" in line and "envs:Lock-v0" in line


@each_script
def test_other_networks_on_resume(name, copy, capfd):
    changes = {"dreamer_v3": "--size=size12m", "iris": "--vocab-size=16"}.get(name, "--units=20")
    if not tiny.has(name, changes[2:].split("=")[0].replace("-", "_")):
        pytest.skip("the script has no such flag")
    line = refused(capfd, name, ["--resume", copy(name), changes, "--total-timesteps", 40])
    assert "other networks" in line or ".bin" in line


@each_script
def test_another_preset_on_resume(name, copy, capfd):
    """It would only fill the flags that were left alone, which are those of the run."""
    assert "--preset" in refused(capfd, name, ["--resume", copy(name), "--preset=tiny"])


@each_script
def test_nothing_to_resume_is_said(name, tmp_path, capsys):
    assert load(name).parse_args([f"--run-dir={tmp_path}", "--resume=auto", "--device=cpu"]).resume == ""
    assert "nothing to resume" in capsys.readouterr().out


@each_script
def test_a_run_directory_that_cannot_be_made(name, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert "run directory" in refused(capfd, name, tiny.flags(name, tmp_path / "file" / "runs"))


def test_iris_attends_with_as_many_heads_as_before(copy, capfd):
    """Their number leaves no trace in the shapes of the weights."""
    assert "--heads" in refused(capfd, "iris", ["--resume", copy("iris"), "--heads=2", "--total-timesteps=40"])


def test_genrl_keeps_the_world_model_that_others_were_trained_on(copy, capfd):
    line = refused(capfd, "genrl", ["--resume", copy("genrl"), "--total-timesteps=40"])
    assert "--pretrain-updates" in line


def test_twm_can_be_resumed_after_a_resume_that_was_refused(copy, capfd):
    """Networks are compared before files grow."""
    run = copy("twm")
    more = ["--total-timesteps=60", "--eval-episodes=0"]
    assert "other networks" in refused(capfd, "twm", ["--resume", run, "--frame-stack=2", *more])
    gc.collect()  # ends the lock that the traceback keeps
    tiny.call("twm", ["--resume", str(run)])
    tiny.call("twm", ["--resume", str(run), *more])
    tiny.call("twm", ["--resume", str(run)])
    assert tiny.checkpoint(run)["step"] == 60


@each_script
def test_two_processes_on_one_run(name, copy, capfd):
    run = copy(name)
    held = load(name).lock(run)
    assert held is not None
    before = digest(run / "checkpoint.pt")
    assert "another process" in refused(capfd, name, ["--resume", run, "--total-timesteps", 40])
    assert digest(run / "checkpoint.pt") == before
    held.close()


# ---- losses that are not finite ----


@each_script
def test_a_loss_that_is_not_finite(name, tmp_path, capfd):
    script = load(name)
    metrics = {"wm/kl": torch.tensor(math.nan), "losses/reward": torch.tensor(math.nan)}
    with pytest.raises(SystemExit) as end:
        script.read_metrics(metrics, 7, tmp_path)
    assert end.value.code == 2
    line = capfd.readouterr().err
    assert "losses/reward is nan at step 7" in line and "checkpoint" not in line
    (tmp_path / "checkpoint.pt").write_text("")
    with pytest.raises(SystemExit):
        script.read_metrics(metrics, 7, tmp_path)
    assert "checkpoint" in capfd.readouterr().err
    assert script.read_metrics({"losses/x": torch.tensor(2)}, 7, tmp_path) == {"losses/x": 2.0}


@each_script
def test_a_nan_reward_is_not_stored(name, tmp_path, capfd):
    class Nan(envs.Scripted):
        def step(self, action):
            obs, reward, *rest = super().step(action)
            return obs, math.nan if self.steps == 4 else reward, *rest

    gymnasium.register("NanReward-v0", entry_point=lambda **options: Nan(image=True)) if "NanReward-v0" not in gymnasium.registry else None
    line = refused(capfd, name, tiny.flags(name, tmp_path, env_id="NanReward-v0"))
    assert "reward of environment 0 is not finite at step 4" in line
    (run,) = tmp_path.iterdir()
    import numpy as np

    stored = np.fromfile(run / "replay0" / "reward.bin", np.float32)
    assert np.isfinite(stored).all() and stored.max() == 3
