"""Every boolean and every choice of every flag runs an update; so does every kind of observation and action."""
import dataclasses
import typing
from functools import partial
from types import SimpleNamespace

import envs
import gymnasium
import numpy as np
import pytest
import tiny
import torch
from conftest import SCRIPTS, load
from gymnasium.spaces import Box, Dict, Discrete
from test_env import Probe  # and its environments

NAMES = [path.stem for path in SCRIPTS]
each_script = pytest.mark.parametrize("name", NAMES)
SHORT = dict(total_timesteps=11, learning_starts=9, eval_episodes=0)  # two or three updates
WHOLE = dict(SHORT, total_timesteps=16)  # room in the ring for a whole episode at the end
BIG = ("size25m", "size50m", "size100m", "size200m", "size400m")
AUTO_ON_CPU = dict(precision="fp32", compile="off", size="size1m", perceptual_loss="pixel")
NEEDS = {  # where Catch cannot show what a flag does
    "pixels=True": dict(env_id="CartPole-v1"), "grayscale=True": dict(env_id="ALE/Pong-v5"),
    "full_action_space=True": dict(env_id="ALE/Pong-v5"), "exact_trunc_grad=True": dict(env_id="ShortTrack-v0"),
    "preset=dmc": dict(env_id="envs:Track-v0", pretrain=2, total_timesteps=20),
}
gymnasium.register("ShortTrack-v0", entry_point=envs.Track, kwargs=dict(length=7))
gymnasium.register("ShortCart-v0", entry_point="gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=7)


@pytest.fixture(autouse=True)
def short_games(monkeypatch):
    """Some scripts learn from whole episodes only: games of Atari end after seven policy steps."""
    make_vec = gymnasium.make_vec
    monkeypatch.setattr(gymnasium, "make_vec", lambda env_id, *args, **options: make_vec(
        env_id, *args, **{**options, **(dict(max_num_frames_per_episode=28) if env_id.startswith("ALE/") else {})}))


def choices() -> list:
    """(script, flag, value) for each value of each boolean and Literal that has no test of its own below."""
    found = []
    for name in NAMES:
        for field, hint in typing.get_type_hints(load(name).Args).items():
            literal = typing.get_origin(hint) is typing.Literal
            values = (False, True) if hint is bool else typing.get_args(hint) if literal else ()
            found += [pytest.param(name, field, value, id=f"{name}-{field}={value}") for value in values
                      if value not in (*BIG, "cuda")]
    return found


def short(name: str) -> dict:
    return WHOLE if hasattr(load(name), "EpisodeReplay") else SHORT


def updates(run) -> int:
    return torch.load(run / "checkpoint.pt", weights_only=True)["updates"]


@pytest.mark.parametrize("name, field, value", choices())
def test_every_choice_updates(name, field, value, tmp_path, monkeypatch):
    if (field, value) == ("pixels", True):
        pytest.importorskip("pygame")
    if (field, value) == ("perceptual_loss", "lpips"):
        pytest.skip("needs weights of 500 MB; test_iris loads made-up ones")
    if (field, value) == ("compile", "on"):  # the graph is captured; generating machine code for it takes minutes
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    flags = {**short(name), **NEEDS.get(f"{field}={value}", {}), field: value}
    run = tiny.run(name, tmp_path / "run", **flags)
    assert updates(run) > 0
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["args"]
    assert saved[field] == (AUTO_ON_CPU.get(field, "auto") if value == "auto" else value)


@each_script
def test_every_size_builds(name):
    """Each larger than the one before; built without memory, as the largest need more than a test machine has."""
    script, counts = load(name), []
    for size in getattr(script, "SIZES", ()):
        with torch.device("meta"):
            agent = script.Agent({"image": (64, 64, 3)}, 6, True, dataclasses.replace(script.Args(), size=size))
        counts.append(sum(p.numel() for p in agent.parameters()))
    assert counts == sorted(set(counts))


@each_script
@pytest.mark.parametrize("flags", [
    dict(device="cuda"), dict(device="mps"), dict(device="gpu")], ids=str)
def test_absent_devices(name, flags, tmp_path, capfd):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("about machines without an accelerator")
    with pytest.raises(SystemExit) as end:
        tiny.run(name, tmp_path / "run", **flags)
    (line,) = capfd.readouterr().err.splitlines()
    ((field, value),) = flags.items()
    assert end.value.code == 2 and line.startswith(f"error: --{field.replace('_', '-')} {value}")


ENVIRONMENTS = {
    "images, continuous": dict(env_id="ShortTrack-v0"),
    "vectors": dict(env_id="ShortCart-v0"),
    "vectors, continuous": dict(env_id="ShortPendulum-v0"),
    "images and vectors": dict(env_id="RenderedDict-v0"),
    "Atari, sticky": dict(
        env_id="ALE/Pong-v5", sticky_actions=0.25, num_envs=2, total_timesteps=28, learning_starts=18),
    "Atari, gray, all actions": dict(env_id="ALE/Pong-v5", grayscale=True, full_action_space=True),
    "action repeat": dict(env_id="envs:Track-v0", action_repeat=3, total_timesteps=23, learning_starts=20),
    "three environments": dict(num_envs=3, total_timesteps=42, learning_starts=27),
}


@each_script
@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_every_kind_of_environment(name, kind, tmp_path):
    flags = {**short(name), "eval_episodes": 0 if "Atari" in kind else 1, **ENVIRONMENTS[kind]}
    if not tiny.has(name, *flags):
        pytest.skip("the script has no such flag")
    if name in tiny.DISCRETE_ONLY and ("continuous" in kind or "Track" in flags.get("env_id", "")):
        pytest.skip("discrete actions only; test_bad_input has the line it prints")
    if "vectors" in kind and not tiny.has(name, "pixels"):
        pytest.importorskip("pygame")
    run = tiny.run(name, tmp_path / "run", **flags)
    assert updates(run) > 0
    scalars, images = tiny.events(run)
    pictures = kind not in ("vectors", "vectors, continuous") or not tiny.has(name, "pixels")
    assert ("dream/open_loop" in images) == pictures and ("losses/image" in scalars) == pictures
    if "action_repeat" in flags:  # an episode of 32 environment steps is 11 decisions
        assert {value for _, value in scalars["charts/episodic_length"]} == {11}
        assert all(value == 3 * step for step, value in scalars["charts/frames"])


NAMED = ("reward", "action", "deter", "is_first", "dyn", "image", "a.b", "keys")  # vectors
gymnasium.register("Names-v0", entry_point=Probe, kwargs=dict(
    observation_space=Dict({key: Box(-1, 1, (2,)) for key in NAMED}), action_space=Discrete(2)))


@pytest.mark.parametrize("name", [name for name in NAMES if tiny.has(name, "actor_grad")])
@pytest.mark.parametrize("env_id", ["envs:Catch-v0", "ShortTrack-v0"])
def test_every_gradient_for_all_actions(name, env_id, tmp_path):
    """Each actor gradient moves the actor of either kind of action, each its own way; `auto` is one of them."""
    actors = {}
    for kind in ("auto", "reinforce", "dynamics", "both"):
        run = tiny.run(name, tmp_path / kind, **SHORT, env_id=env_id, actor_grad=kind, video_every=0)
        assert updates(run) == 2
        weights = torch.load(run / "checkpoint.pt", weights_only=True)["agent"]
        actors[kind] = torch.cat([value.flatten() for key, value in weights.items() if "actor" in key])
    auto = "reinforce" if env_id == "envs:Catch-v0" else "dynamics"
    same = {kind for kind in actors if torch.equal(actors[kind], actors["auto"])}
    assert same == {"auto", auto} and not torch.equal(actors["both"], actors["dynamics"])


@pytest.mark.parametrize("name", [name for name in NAMES if tiny.has(name, "pixels")])
def test_names_of_observations(name, tmp_path):
    """Entries of a Dict may be named like something in replay, losses or PyTorch."""
    assert updates(tiny.run(name, tmp_path / "run", **SHORT, env_id="Names-v0")) > 0


@each_script
def test_evaluation_of_a_run_that_has_ended(name, tmp_path, capsys):
    """--resume plays with its checkpoint, at the step of the checkpoint, and trains nothing."""
    run, steps = tiny.run(name, tmp_path / "run", **short(name)), short(name)["total_timesteps"]
    before = {path: path.stat().st_mtime_ns for path in run.glob("*.pt")}
    for episodes in (2, 3):
        script = load(name)
        script.main(script.parse_args([f"--resume={run}", f"--eval-episodes={episodes}"]))
        assert f"evaluation at step {steps}, {episodes} episodes" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.glob("*.pt")} == before
    assert [step for step, _ in tiny.events(run)[0]["eval/episodic_return"]] == 2 * [steps]


class Clocks:
    """Environment i ends all i + 1 steps, then resets; its return is 10 i."""

    def __init__(self, num_envs: int):
        self.number, self.time = np.arange(num_envs), 0

    def reset(self) -> dict:
        self.length, self.ret = self.time % (self.number + 2), 10.0 * self.number
        return dict(is_last=self.length == self.number + 1)

    def step(self, action) -> dict:
        self.time += 1
        return self.reset()


@pytest.mark.parametrize("episodes, num_envs", [(1, 1), (10, 10), (16, 16), (20, 16)])
@each_script
def test_evaluation_favours_no_environment(name, episodes, num_envs, monkeypatch):
    """Short episodes count no more than long ones, and the agent knows that it is evaluated."""
    class Agent(torch.nn.Module):
        def initial(self, num_envs, device):
            return {}

        def act(self, row, state):
            assert not self.training
            return dict(action=torch.zeros(1))

    agent, args = Agent(), SimpleNamespace(eval_episodes=episodes, seed=0)
    monkeypatch.setattr(load(name), "make_envs", lambda args, num_envs, seed: Clocks(num_envs))
    metrics = load(name).evaluate(agent, args, torch.device("cpu"), 0)
    assert metrics["eval/episodic_return"] == 10 * (num_envs - 1) / 2 and agent.training
    assert metrics["eval/episodic_length"] == (num_envs + 1) / 2


@each_script
def test_no_evaluation_episodes(name, tmp_path):
    """--eval-episodes 0 switches evaluation off, also the periodic one."""
    run = tiny.run(name, tmp_path / "run", **{**short(name), "eval_every": 5})
    assert updates(run) > 0 and "eval/episodic_return" not in tiny.events(run)[0]
