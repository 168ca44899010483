"""Environments: Atari against a bare emulator and Pillow, the ends of episodes, mapping of actions and observations."""
from types import SimpleNamespace

import ale_py
import envs
import gymnasium
import numpy as np
import pytest
import tiny
from conftest import SCRIPTS, load
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Text
from PIL import Image

NAMES = [path.stem for path in SCRIPTS]
AREA = ("dreamer_v2", "twm")  # take ale-py's own 64x64, as their authors; the others resize the whole frame
SHARED = "dreamer_v3"  # the shared blocks are the same text in every file: one copy is enough


def make(name: str, env_id: str, num_envs: int = 1, **flags):
    """The environments of a script, made as its main does."""
    script, repeat = load(name), 4 if env_id.startswith("ALE/") else 1
    return script.make_envs(script.Args(env_id=env_id, action_repeat=repeat, **flags), num_envs, seed=3)


def one_hot(index, size: int) -> np.ndarray:
    return np.eye(size, dtype=np.float32)[np.atleast_1d(index)]


def check_resized(images: np.ndarray, frames: np.ndarray) -> None:
    """(...,Y,X,C) and (...,y,x,C): as Pillow's antialiased bilinear, channel by channel, up to the rounding of a few
    values; an image that has the size already is itself."""
    assert images.dtype == np.uint8 and images.shape[-1] == frames.shape[-1]
    images, frames = (x.reshape(-1, *x.shape[-3:]).transpose(0, 3, 1, 2) for x in (images, frames))
    (y, x), channels = images.shape[2:], frames.reshape(-1, *frames.shape[2:])
    small = np.stack([Image.fromarray(channel).resize((x, y), Image.Resampling.BILINEAR) for channel in channels])
    off = np.abs(images.reshape(small.shape).astype(int) - small)
    assert off.max() <= 1 and off.mean() < 0.01 and (images.shape != frames.shape or off.max() == 0)


def area(frame: np.ndarray, size: int) -> np.ndarray:
    """(Y,X,C) -> (size,size,C), not rounded: the average over the area of each pixel."""
    def overlap(n: int) -> np.ndarray:
        edges, pixel = np.arange(size + 1)[:, None] * n / size, np.arange(n)
        return (np.minimum(edges[1:], pixel + 1) - np.maximum(edges[:-1], pixel)).clip(0) * size / n
    return np.einsum("iy,yxc,jx->ijc", overlap(len(frame)), frame, overlap(frame.shape[1]), optimize=True)


def emulator(game: str, noops: int, actions: list[int], gray: bool = False):
    """Maxed raw frame (210,160,C) and summed reward after reset and after each action, from ale-py's bare emulator."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(ale_py.roms.get_rom_path(game))
    for _ in range(noops):
        ale.act(ale_py.Action.NOOP)
    screen = (lambda: ale.getScreenGrayscale()[..., None]) if gray else ale.getScreenRGB
    yield screen(), 0
    for action in actions:
        screens, reward = [], 0
        for _ in range(4):
            reward += ale.act(ale.getMinimalActionSet()[action])
            screens.append(screen())
        yield np.maximum(*screens[-2:]), reward


def native(env_id: str, sticky: float = 0.0, **options):
    """ale-py's vector environment with Dreamer's options, set up here and not in a script."""
    options = dict(img_height=210, img_width=160, grayscale=False) | options
    return gymnasium.make_vec(env_id, num_envs=1, stack_num=1, use_fire_reset=False, reward_clipping=False,
                              repeat_action_probability=sticky, **options)


ACTIONS = [int(a) for a in np.random.default_rng(0).integers(0, 9, 150)]  # Ms. Pac-Man: 9 actions, dots are worth 10


@pytest.mark.parametrize("name, gray", [(name, gray) for name in NAMES for gray in (False, True)
                                        if not gray or tiny.has(name, "grayscale")])
def test_atari_frames_and_rewards(name, gray):
    """64x64 RGB or gray is the resized maximum of the last two of four frames; rewards are neither clipped nor lost;
    no action is repeated by chance."""
    noops = int(native("ALE/MsPacman-v5").reset(seed=3)[1]["episode_frame_number"][0])
    colour = dict(grayscale=gray) if tiny.has(name, "grayscale") else {}
    envs_ = make(name, "ALE/MsPacman-v5", sticky_actions=0.0, **colour)
    assert envs_.shapes == {"image": (64, 64, 1 if gray else 3)}
    row, rewards = envs_.reset(), []
    for action, (frame, reward) in zip([*ACTIONS, 0], emulator("ms_pacman", noops, ACTIONS, gray)):
        if name in AREA:
            assert row["image"].dtype == np.uint8 and np.abs(row["image"][0] - area(frame, 64)).max() < 0.51
        else:
            check_resized(row["image"][0], frame)
        assert row["reward"].dtype == np.float32 and row["reward"][0] == reward
        rewards.append(reward)
        row = envs_.step(one_hot(action, 9))
    assert len(rewards) == 151 and max(rewards) >= 10, "the rollout should meet a reward that clipping would change"


@pytest.mark.parametrize("name", NAMES)
def test_atari_sticky_actions(name):
    """Off: no action is repeated. On: with the emulator's own random numbers."""
    streams, options = {}, dict(img_height=64, img_width=64) if name in AREA else {}
    colour = dict(grayscale=False) if tiny.has(name, "grayscale") else {}
    for sticky in (0.0, 0.25):
        envs_ = make(name, "ALE/Pong-v5", sticky_actions=sticky, **colour)
        official = native("ALE/Pong-v5", sticky, **options)
        envs_.reset(), official.reset(seed=3)
        streams[sticky] = np.stack([envs_.step(one_hot(action % 6, 6))["image"][0] for action in ACTIONS[:60]])
        check_resized(streams[sticky], np.stack([official.step(np.array([a % 6]))[0][0, 0] for a in ACTIONS[:60]]))
    assert (streams[0.0] != streams[0.25]).any()


@pytest.mark.parametrize("name", [name for name in NAMES if tiny.has(name, "full_action_space")])
def test_atari_action_sets(name):
    assert make(name, "ALE/Pong-v5").action_dim == 6
    assert make(name, "ALE/Pong-v5", full_action_space=True).action_dim == 18


@pytest.mark.parametrize("name", [name for name in NAMES if tiny.has(name, "pixels")])
def test_atari_is_pixels_already(name):
    """--pixels changes nothing on Atari: sticky actions, frame skip and action set stay those of the flags."""
    plain, pixels = make(name, "ALE/Pong-v5"), make(name, "ALE/Pong-v5", pixels=True)
    np.testing.assert_array_equal(plain.reset()["image"], pixels.reset()["image"])
    for action in ACTIONS[:40]:
        np.testing.assert_array_equal(*(e.step(one_hot(action % 6, 6))["image"] for e in (plain, pixels)))


@pytest.mark.parametrize("name", NAMES)
def test_atari_actions_are_in_range(name, monkeypatch):
    """ale-py hangs for ever on an action out of range: whatever the policy gives, the emulator gets a legal one."""
    envs_, seen = make(name, "ALE/Pong-v5", num_envs=2), []
    step = envs_.envs.step
    monkeypatch.setattr(envs_.envs, "step", lambda action: seen.extend(action) or step(np.clip(action, 0, 5)))
    envs_.reset()
    for action in (0.0, -1.0, 1e9, np.nan, np.inf, -np.inf):
        envs_.step(np.full((2, 6), action, np.float32))
    envs_.step(one_hot([5, 0], 6))
    assert set(seen) <= set(range(6)) and seen[-2:] == [5, 0]


def atari(**options):
    args = SimpleNamespace(env_id="ALE/Breakout-v5", action_repeat=4, sticky_actions=0.0)
    return load(SHARED).Envs(args, 2, 3, 16, img_height=16, img_width=16, grayscale=True, **options)


def rollout(envs_, steps: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Fields (T,N,...) of a random rollout, and what `envs_` says of return and length after each row."""
    rng = np.random.default_rng(seed)
    rows, told = [envs_.reset()], [(envs_.ret, envs_.length)]
    for _ in range(steps):
        rows.append(envs_.step(one_hot(rng.integers(0, envs_.action_dim, envs_.num_envs), envs_.action_dim)))
        told.append((envs_.ret, envs_.length))
    check_accounts(stream := {key: np.stack([row[key] for row in rows]) for key in rows[0]}, *map(np.stack, zip(*told)))
    return stream


def check_accounts(stream: dict, ret: np.ndarray, length: np.ndarray) -> None:
    """Return and length are those since the episode's first row, which counts for neither."""
    assert ret.shape == length.shape == stream["is_first"].shape
    for env, first in enumerate(stream["is_first"].T):
        begin = np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))
        total = stream["reward"][:, env].cumsum()
        np.testing.assert_array_equal(length[:, env], np.arange(len(first)) - begin)
        np.testing.assert_allclose(ret[:, env], total - total[begin], rtol=1e-6)


def check_flags(stream: dict) -> None:
    """The first row of an episode follows the last one of the one before, brings no reward and is not an end itself."""
    first, last = stream["is_first"], stream["is_last"]
    assert first[0].all() and last.any() and (stream["is_terminal"] <= last).all()
    np.testing.assert_array_equal(first[1:], last[:-1])
    assert not (first & last).any() and (stream["reward"][first] == 0).all()


def test_atari_game_over_is_terminal():
    stream = rollout(atari(), 200)
    check_flags(stream)
    np.testing.assert_array_equal(stream["is_terminal"], stream["is_last"])


def test_atari_time_limit_is_no_death(monkeypatch):
    make_vec = gymnasium.make_vec
    limit = dict(max_num_frames_per_episode=80)
    monkeypatch.setattr(gymnasium, "make_vec", lambda *args, **options: make_vec(*args, **{**options, **limit}))
    stream = rollout(atari(), 60)
    check_flags(stream)
    assert not stream["is_terminal"].any()


def test_atari_lost_life():
    """With `life_loss_info` a lost life is terminal, the game goes on: equal frames, the last of five lives resets and
    only there return and length begin anew (`rollout` looks at them)."""
    plain, lives = rollout(atari(), 200), rollout(atari(life_loss_info=True), 200)
    for field in ("image", "reward", "is_first"):
        np.testing.assert_array_equal(plain[field], lives[field])
    np.testing.assert_array_equal(lives["is_terminal"], lives["is_last"])
    ends, over = lives["is_last"].sum(0), plain["is_last"].sum(0)
    assert (over > 0).all() and (ends >= 5 * over).all() and (ends < 5 * (over + 1)).all()


class Probe(gymnasium.Env):
    """Remembers the actions it gets."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space, self.seen = observation_space, action_space, []

    def reset(self, *, seed=None, options=None):
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.seen.append(action)
        return self.observation_space.sample(), 0.0, False, False, {}


for env_id, kwargs in dict(Truncated=dict(end="truncate"), Terminated={}).items():
    gymnasium.register(f"{env_id}-v0", entry_point=envs.Scripted, kwargs=kwargs)
gymnasium.register("ShortCartPole-v0", entry_point="gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=5)


def gym_envs(env_id: str, num_envs: int = 2, size: int = 16, action_repeat: int = 1, pixels: bool = False):
    args = SimpleNamespace(env_id=env_id, action_repeat=action_repeat)
    return load(SHARED).Envs(args, num_envs, 3, size, pixels=pixels)


def probe(observation_space=Box(-1, 1, (2,)), action_space=Discrete(3), size: int = 16):
    """Environments (one copy) with these spaces, and the list of actions that arrive in it."""
    spaces = dict(observation_space=observation_space, action_space=action_space)
    gymnasium.register("Probe-v0", entry_point=Probe, kwargs=spaces)
    try:
        envs_ = gym_envs("Probe-v0", num_envs=1, size=size)
    finally:
        del gymnasium.registry["Probe-v0"]
    return envs_, envs_.envs.envs[0].unwrapped.seen


@pytest.mark.parametrize("env_id, terminal", [
    ("Terminated-v0", True), ("Truncated-v0", False), ("ShortCartPole-v0", False)])
def test_termination_is_not_truncation(env_id, terminal):
    stream = rollout(gym_envs(env_id), 20)
    check_flags(stream)
    np.testing.assert_array_equal(stream["is_terminal"], stream["is_last"] & terminal)


def test_rows_are_aligned_with_their_cause():
    """obs_t and reward_t are caused by action_{t-1}; the step after an end ignores its action and shows the reset."""
    envs_ = gym_envs("Terminated-v0", num_envs=1)
    row, told = envs_.reset(), []
    for t in range(16):
        told.append((row["vector"][0].tolist(), float(row["reward"][0])))
        row = envs_.step(one_hot(t % 3, 3))
    within = [(t % 8, t // 8) for t in range(16)]  # seven steps and the reset: each episode takes eight rows
    assert told == [([step, (8 * episode + step - 1) % 3 + 1 if step else 0, 1], step) for step, episode in within]


def test_seeds():
    """The same seed gives the same start, each environment its own."""
    first, again = (gym_envs("CartPole-v1").reset()["vector"] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).any() and first.dtype == np.float32 and first.shape == (2, 4)


def test_box_actions_are_mapped_to_their_bounds():
    """[-1, 1] covers finite bounds, larger values are clipped first; an unbounded dimension gets the clipped value."""
    space = Box(np.array([-2, 0, -np.inf, 10], np.float32), np.array([4, 1, np.inf, 20], np.float32))
    envs_, seen = probe(action_space=space)
    envs_.reset()
    assert not envs_.discrete and envs_.action_dim == 4
    for action in ([0, 0, 0, 0], [-1, -1, -1, -1], [1, 1, 1, 1], [9, -9, 9, -9], [0.5, 0.5, 0.5, 0.5]):
        envs_.step(np.array([action], np.float32))
    want = [[1, 0.5, 0, 15], [-2, 0, -1, 10], [4, 1, 1, 20], [4, 0, 1, 10], [2.5, 0.75, 0.5, 17.5]]
    np.testing.assert_allclose(seen, want, rtol=1e-6)
    assert all(space.contains(action) for action in seen)


def test_box_actions_of_any_shape():
    envs_, seen = probe(action_space=Box(-1, 3, (2, 2)))
    envs_.reset()
    envs_.step(np.array([[-1, 0, 0.5, 1]], np.float32))
    np.testing.assert_allclose(seen, [[[-1, 1], [2, 3]]])


def test_discrete_actions_with_an_offset():
    envs_, seen = probe(action_space=Discrete(3, start=5))
    envs_.reset()
    for action in range(3):
        envs_.step(one_hot(action, 3))
    assert envs_.discrete and envs_.action_dim == 3 and [int(action) for action in seen] == [5, 6, 7]


def test_dict_observations():
    """Vectors of any type, and of up to two axes if they are no bytes, are flattened and joined in the order of their
    names; images are resized and stacked by channel in that order."""
    space = Dict(b=Box(0, 255, (16, 16, 1), np.uint8), a=Box(0, 255, (32, 24, 3), np.uint8),
                 w=Box(-9, 9, (3,), np.int64), v=Box(-1, 1, (2, 2), np.float64), s=Box(0, 1, (), np.float32),
                 u=Box(0, 255, (2,), np.uint8))
    envs_, _ = probe(observation_space=space)
    row = envs_.reset()
    space.seed(3)
    obs = space.sample()
    assert envs_.shapes == {"image": (16, 16, 4), "vector": (1, 2, 4, 3)}
    np.testing.assert_array_equal(row["image"][0, ..., 3:], obs["b"])
    check_resized(row["image"][0, ..., :3], obs["a"])
    joined = np.array([[obs["s"], *obs["u"], *obs["v"].flat, *obs["w"]]], np.float32)
    np.testing.assert_array_equal(row["vector"], joined)
    assert row["vector"].dtype == np.float32


@pytest.mark.parametrize("shape", [(210, 160, 3), (64, 64, 3), (96, 64, 3), (16, 16, 1), (20, 28, 1), (400, 600, 4)])
def test_images_of_any_size(shape):
    """Smaller or larger, from one channel to four."""
    space = Box(0, 255, shape, np.uint8)
    row = probe(observation_space=space, size=64)[0].reset()
    space.seed(3)
    assert set(row) == {"image", "reward", "is_first", "is_last", "is_terminal"}
    check_resized(row["image"][0], space.sample())


@pytest.mark.parametrize("spaces, named", [
    (dict(observation_space=Box(0, 255, (3, 16, 16), np.uint8)), "(3, 16, 16)"),
    (dict(observation_space=Box(0, 255, (16, 16), np.uint8)), "(16, 16)"),
    (dict(observation_space=Box(0, 1, (16, 16, 3), np.float32)), "float32"),
    (dict(observation_space=Dict(words=Text(5), vector=Box(-1, 1, (2,)))), "Text"),
    (dict(observation_space=Dict(number=Discrete(5), vector=Box(-1, 1, (2,)))), "Discrete(5)"),
    (dict(action_space=MultiDiscrete([2, 3])), "MultiDiscrete([2 3])"),
], ids=["channels first", "no channels", "float image", "text", "discrete", "several actions"])
def test_other_spaces_are_refused(spaces, named, capsys):
    with pytest.raises(SystemExit) as end:
        probe(**spaces)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: Probe-v0: ") and named in line


def test_toy_dict():
    stream = rollout(gym_envs("CountingDict-v0"), 9)
    shapes = {key: value.shape[2:] for key, value in stream.items() if value.ndim > 2}
    assert shapes == dict(image=(16, 16, 3), vector=(1 + 4,))
    np.testing.assert_array_equal(stream["vector"][:, 0, 0], [*range(8), 0, 1])


def test_action_repeat():
    """Rewards (1, 2, 3, ...) are summed; the episode of seven steps ends in the middle of the third repetition."""
    stream = rollout(gym_envs("Terminated-v0", num_envs=1, action_repeat=3), 4)
    assert stream["reward"][:, 0].tolist() == [0, 1 + 2 + 3, 4 + 5 + 6, 7, 0]
    assert stream["vector"][:, 0, 0].tolist() == [0, 3, 6, 7, 0]
    assert stream["is_last"][:, 0].tolist() == [False, False, False, True, False]


def test_pixels():
    """--pixels shows the rendered picture, and nothing else."""
    pytest.importorskip("pygame")
    envs_ = gym_envs("CartPole-v1", num_envs=1, size=64, pixels=True)
    row, frame = envs_.reset(), envs_.envs.envs[0].render()
    assert envs_.shapes == {"image": (64, 64, 3)} and envs_.action_dim == 2
    assert set(row) == {"image", "reward", "is_first", "is_last", "is_terminal"}
    check_resized(row["image"][0], frame)
    for _ in range(8):
        moved = envs_.step(one_hot(0, 2))["image"]
    assert (row["image"] != moved).any()


class RenderedDict(envs.CountingDict):
    """Its observations count the steps, its picture is brighter with each of them."""

    metadata = dict(render_modes=["rgb_array"], render_fps=1)

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        return np.full((32, 48, 3), 10 * self.steps, np.uint8)


gymnasium.register("RenderedDict-v0", entry_point=RenderedDict)
gymnasium.register("ShortPendulum-v0", entry_point="gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=8)
PICTURES = pytest.mark.parametrize("name", [name for name in NAMES if not tiny.has(name, "pixels")])


@PICTURES
def test_dicts_and_vectors_are_rendered(name):
    """Who learns from pixels only sees the picture and nothing of the observation; the rest of a row is the same."""
    stream = rollout(make(name, "RenderedDict-v0", num_envs=2), 9)
    check_flags(stream)
    assert set(stream) == {"image", "reward", "is_first", "is_last", "is_terminal"}
    steps = np.array([*range(8), 0, 1])[:, None].repeat(2, 1)
    np.testing.assert_array_equal(stream["reward"], np.where(stream["is_first"], 0, steps))
    np.testing.assert_array_equal(stream["image"], np.zeros((10, 2, 64, 64, 3)) + 10 * steps[..., None, None, None])


@PICTURES
@pytest.mark.parametrize("env_id, actions", [("CartPole-v1", 2), ("ShortPendulum-v0", 1)])
def test_classic_control_is_rendered(name, env_id, actions):
    pytest.importorskip("pygame")
    if name in tiny.DISCRETE_ONLY and "Pendulum" in env_id:
        pytest.skip("discrete actions only")
    envs_ = make(name, env_id)
    stream = rollout(envs_, 3)
    assert envs_.shapes == {"image": (64, 64, 3)} and envs_.action_dim == actions
    assert set(stream) == {"image", "reward", "is_first", "is_last", "is_terminal"}
    check_resized(stream["image"][-1, 0], envs_.envs.envs[0].render())
    assert (stream["image"][0] != stream["image"][-1]).any()


@PICTURES
def test_image_observations_are_taken_as_they_are(name):
    """And not rendered."""
    envs_ = make(name, "envs:Catch-v0")
    check_resized(envs_.reset()["image"][0], envs_.envs.envs[0].unwrapped._image())
    assert envs_.shapes == {"image": (64, 64, 3)}


class Control(gymnasium.Env):
    """Takes how to render, as DeepMind Control's environments do."""

    metadata = dict(render_modes=["rgb_array"])
    observation_space, action_space = Dict(a=Box(-1, 1, (2,), np.float32)), Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode=None, render_kwargs=None):
        self.render_mode, self.render_kwargs = render_mode, render_kwargs

    def reset(self, *, seed=None, options=None):
        return dict(a=np.zeros(2, np.float32)), {}

    def render(self):
        return np.zeros((self.render_kwargs["height"], self.render_kwargs["width"], 3), np.uint8)


@pytest.mark.parametrize("task, camera", [("walker-walk", 0), ("quadruped-run", 2)])
def test_control_is_rendered_small_by_the_official_camera(task, camera, monkeypatch):
    env_id = f"dm_control/{task}-v0"
    monkeypatch.setitem(gymnasium.registry, env_id, gymnasium.envs.registration.EnvSpec(env_id, Control))
    args = SimpleNamespace(env_id=env_id, action_repeat=1)
    for size in (64, 32):
        (made,) = load(SHARED).Envs(args, 1, 0, size, pixels=True).envs.envs
        assert made.unwrapped.render_kwargs == dict(height=size, width=size, camera_id=camera)
    assert load(SHARED).Envs(args, 1, 0, 64, pixels=False).envs.envs[0].unwrapped.render_kwargs is None
