"""The environment of each script: rows, flags, spaces, seeds, numbers from outside."""

import random

import envs
import gymnasium
import numpy as np
import pytest
import tiny
from conftest import SCRIPTS, load
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

NAMES = [path.stem for path in SCRIPTS]
CONTINUOUS = [name for name in NAMES if name not in tiny.DISCRETE_ONLY]
VECTORS = [name for name in NAMES if name in tiny.VECTORS]
IMAGE = Box(0, 255, (16, 16, 3), np.uint8)


class Any(gymnasium.Env):
    """Samples of any observation and action space; keeps the actions; episodes of five steps."""

    actions = []

    def __init__(self, observation_space=IMAGE, action_space=Discrete(3), reward=0.0):
        self.observation_space = observation_space
        self.action_space = action_space
        self.reward = reward

    def observe(self):
        return self.observation_space.sample()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        Any.actions.append(np.array(action))
        self.steps += 1
        return self.observe(), self.reward, self.steps == 5, False, {}


def make(name: str, env_id: str, num_envs: int = 1, key=(0, 0, 0), **changes):
    """The environments that a run of the script would make."""
    script = load(name)
    args = script.parse_args(tiny.flags(name, "runs", env_id=env_id, num_envs=num_envs, **changes))
    return script.make_envs(args, num_envs, *key)


def register(make_env, **spaces) -> str:
    """A new environment id."""
    env_id = f"New{len(gymnasium.registry)}-v0"
    gymnasium.register(env_id, entry_point=lambda **options: make_env(**spaces))
    return env_id


def onehot(envs, index: int) -> np.ndarray:
    return np.eye(envs.action_dim)[[index] * envs.num_envs]


# ---- rows ----


@pytest.mark.parametrize("end", ["terminate", "truncate"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_scripted_episode(name, end):
    """Observation t tells step and action that led to it; the row after an end is the next episode's first."""
    env_id = register(envs.Scripted, image=True, end=end, length=3)
    made = make(name, env_id)
    rows = [made.reset()]
    for action in (2, 0, 1, 2, 1):
        rows.append(made.step(onehot(made, action)))
    steps = [row["image"][0, 8, 8, 0] for row in rows]
    codes = [row["image"][0, 8, 8, 1] for row in rows]
    assert steps == [0, 1, 2, 3, 0, 1]
    assert codes == [0, 3, 1, 2, 0, 2]  # the action of the resetting step is ignored
    assert [row["reward"][0] for row in rows] == [0, 1, 2, 3, 0, 1]
    assert [row["is_first"][0] for row in rows] == [True, False, False, False, True, False]
    assert [row["is_last"][0] for row in rows] == [False, False, False, True, False, False]
    assert [row["is_terminal"][0] for row in rows] == [False, False, False, end == "terminate", False, False]
    assert made.ret[0] == 1 and made.length[0] == 1


@pytest.mark.parametrize("name", NAMES)
def test_action_repeat_sums_rewards(name):
    made = make(name, register(envs.Scripted, image=True, length=4), action_repeat=3)
    made.reset()
    row = made.step(onehot(made, 0))
    assert row["reward"][0] == 1 + 2 + 3
    row = made.step(onehot(made, 0))
    assert row["reward"][0] == 4 and row["is_terminal"][0]


@pytest.mark.parametrize("name", NAMES)
def test_atari(name):
    """Native environment: images of the right size, actions as they are, a game that goes on."""
    made = make(name, "ALE/Breakout-v5", num_envs=2)
    row = made.reset()
    assert row["image"].shape == (2, *made.shapes["image"]) and row["image"].dtype == np.uint8
    assert made.action_dim == 4 and made.discrete or name == "dreamer_v1"
    for _ in range(3):
        row = made.step(np.eye(made.action_dim)[[1, 0]] if made.discrete else np.zeros((2, made.action_dim)))
    assert row["image"].std() > 0
    assert row["reward"].shape == (2,)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("env_id", ["PongNoFrameskip-v4", "Pong-v4"])
def test_other_protocols_are_refused(name, env_id, capfd):
    with pytest.raises(SystemExit):
        make(name, env_id)
    assert "ALE/Pong-v5" in capfd.readouterr().err


def test_atari_by_its_module():
    assert make(NAMES[0], "ale_py:ALE/Pong-v5").atari


# ---- seeds ----


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_never_shared(name):
    script = load(name)
    seeds = []
    for seed in (1, 2):
        for key in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1,), (2, 0, 0)):
            seeds.extend(script.make_seeds(16, seed, *key).tolist())
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 0 and max(seeds) < 2**31


@pytest.mark.parametrize("name", NAMES)
def test_environments_differ_and_repeat(name):
    def columns(key):
        made = make(name, "envs:Catch-v0", num_envs=8, key=key)
        return made.reset()["image"][:, 0, :, 0].argmax(1).tolist()

    first = columns((0, 0, 0))
    assert len(set(first)) > 1
    assert columns((0, 0, 0)) == first
    assert columns((1,)) != first


@pytest.mark.parametrize("name", NAMES)
def test_global_generators_are_seeded(name):
    script = load(name)
    drawn = []
    for seed in (5, 5, 6):
        script.seed_generators(seed, 0, 0)
        drawn.append((random.random(), np.random.rand()))
    assert drawn[0] == drawn[1] != drawn[2]


# ---- actions ----


@pytest.mark.parametrize("name", CONTINUOUS)
def test_integer_boxes_have_equal_shares(name):
    env_id = register(Any, observation_space=IMAGE, action_space=Box(-2, 3, (1,), np.int64))
    made = make(name, env_id)
    made.reset()
    Any.actions.clear()
    for unit in np.linspace(-1, 1, 600):
        made.step(np.array([[unit]]))
    values = np.concatenate(Any.actions)
    counts = [int((values == value).sum()) for value in range(-2, 4)]
    assert min(counts) > 70 and max(counts) < 105  # of about 500 steps with an action
    assert values.max() == 3


@pytest.mark.parametrize("name", CONTINUOUS)
def test_bounds_of_boxes(name):
    low = np.array([-2, -3.4e38, -np.inf, 0], np.float32)
    high = np.array([6, 3.4e38, np.inf, 1], np.float32)
    made = make(name, register(Any, action_space=Box(low, high)))
    made.reset()
    Any.actions.clear()
    made.step(np.array([[1.0, 1.0, 1.0, 1.0]]))
    made.step(np.array([[-1.0, 0.5, 0.5, 0.0]]))
    made.step(np.array([[0.0, 9.0, -9.0, -9.0]]))
    assert np.allclose(Any.actions, [[6, 1, 1, 1], [-2, 0.5, 0.5, 0.5], [2, 1, -1, 0]])


@pytest.mark.parametrize("name", NAMES)
def test_discrete_actions_may_start_elsewhere(name):
    made = make(name, register(Any, action_space=Discrete(3, start=5)))
    made.reset()
    Any.actions.clear()
    made.step(onehot(made, 2))
    assert Any.actions == [7]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("space", [MultiDiscrete([2, 3]), MultiBinary(3), Box(-1, 1, (0,))], ids=str)
def test_unsupported_actions(name, space, capfd):
    with pytest.raises(SystemExit):
        make(name, register(Any, action_space=space))
    assert str(space).split("(")[0] in capfd.readouterr().err


# ---- observations ----


@pytest.mark.parametrize("name", NAMES)
def test_stacked_frames_become_channels(name):
    made = make(name, register(Any, observation_space=Box(0, 255, (4, 16, 16, 1), np.uint8)))
    if name in tiny.VECTORS or not getattr(load(name).Args, "grayscale", False):
        assert made.shapes["image"][-1] == 4
    assert made.reset()["image"].shape == (1, *made.shapes["image"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("space", [
    Box(0, 255, (12, 64, 64), np.uint8), Box(0, 1, (16, 16, 3), np.float32), Box(0, 255, (16, 16), np.uint8)], ids=str)
def test_what_looks_like_an_image_and_is_none(name, space, capfd):
    """Never a guess: one line."""
    with pytest.raises(SystemExit) as end:
        make(name, register(Any, observation_space=space))
    assert end.value.code == 2
    assert "error: " in capfd.readouterr().err


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("space, width", [
    (Discrete(5), 5), (MultiDiscrete([2, 3]), 5), (Tuple((Discrete(2), Box(-1, 1, (3,)))), 5),
    (Dict(a=Dict(b=Box(-1, 1, (2, 2)), c=Discrete(3)), d=MultiBinary(2)), 9)], ids=str)
def test_flattened_observations(name, space, width):
    made = make(name, register(Any, observation_space=space))
    row = made.reset()
    assert sum(made.shapes["vector"]) == width
    assert row["vector"].shape == (1, width) and row["vector"].dtype == np.float32


@pytest.mark.parametrize("name", VECTORS)
def test_image_and_vectors_of_a_dict(name):
    made = make(name, "envs:CountingDict-v0", num_envs=2)
    row = made.reset()
    assert made.shapes == {"image": (16, 16, 3), "vector": (1, 4)}  # keys in order: scalar, vector
    assert row["image"].shape == (2, 16, 16, 3)
    row = made.step(onehot(made, 0))
    assert row["vector"][:, 0].tolist() == [1, 1]


@pytest.mark.parametrize("name", VECTORS)
def test_an_empty_observation(name, capfd):
    with pytest.raises(SystemExit):
        make(name, register(Any, observation_space=Box(-1, 1, (0,))))
    assert "nothing to observe" in capfd.readouterr().err


# ---- numbers from outside ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reward", [np.nan, np.inf, 1e300])
def test_a_reward_that_is_not_finite_stops_the_run(name, reward, capfd):
    made = make(name, register(Any, reward=reward), num_envs=2)
    made.reset()
    with pytest.raises(SystemExit) as end, np.errstate(over="ignore"):
        made.step(onehot(made, 0))
    assert end.value.code == 2
    line = capfd.readouterr().err
    assert "reward of environment 0" in line and "step 1" in line


@pytest.mark.parametrize("name", VECTORS)
def test_an_observation_that_is_not_finite_stops_the_run(name, capfd):
    class Nan(Any):
        def observe(self):
            return np.array([0, np.nan if self.steps == 2 else 1], np.float32)

    made = make(name, register(Nan, observation_space=Box(-1, 1, (2,))))
    made.reset()
    made.step(onehot(made, 0))
    with pytest.raises(SystemExit):
        made.step(onehot(made, 0))
    line = capfd.readouterr().err
    assert "vector of environment 0" in line and "step 2" in line


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("error", [TypeError, AssertionError, OSError, ValueError])
@pytest.mark.parametrize("where", ["__init__", "reset", "step"])
def test_errors_of_the_users_environment_stay_tracebacks(name, error, where, tmp_path):
    def fails(self, *args, **options):
        raise error("in the user's code")

    broken = type("Broken", (Any,), {where: fails})
    env_id = register(broken)
    with pytest.raises(error, match="in the user's code"):
        tiny.call(name, tiny.flags(name, tmp_path / "runs", env_id=env_id))


@pytest.mark.parametrize("name", NAMES)
def test_the_resize_is_that_of_pillow(name):
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (2, 210, 160, 3), np.uint8)
    ours = load(name).resize(image, 64)
    theirs = [np.asarray(Image.fromarray(x).resize((64, 64), Image.BILINEAR)) for x in image]
    error = np.abs(ours.astype(int) - theirs)
    assert error.max() <= 1  # how a half is rounded depends on the CPU
    assert (error > 0).mean() < 0.01
