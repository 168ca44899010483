"""Environments: Atari against a bare emulator and Pillow, the ends of episodes, mapping of actions and observations."""
from types import SimpleNamespace

import ale_py
import envs
import gymnasium
import numpy as np
import pytest
import tiny
import torch
from conftest import SCRIPTS, load
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Text
from PIL import Image

NAMES = [path.stem for path in SCRIPTS]
RESIZE = dict(dreamer_v1="bilinear", dreamer_v2="area", dreamer_v3="bilinear", iris="bilinear", twm="area",
              dllm="bilinear", genrl="bilinear")
SHARED = load(NAMES[0])  # the shared blocks are the same text in every file: one copy is enough


def make(name: str, env_id: str, num_envs: int = 1, **flags):
    """The environments of a script, made as its main does."""
    script = load(name)
    return script.make_envs(script.resolve(script.Args(env_id=env_id, **flags), torch.device("cpu")), num_envs, seed=3)


def one_hot(index, size: int) -> np.ndarray:
    return np.eye(size, dtype=np.float32)[np.atleast_1d(index)]


def pillow(frame: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR))


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


def native(env_id: str, size: tuple[int, int], gray: bool = False, sticky: float = 0.0):
    """ale-py's vector environment with Dreamer's options, set up here and not in a script."""
    return gymnasium.make_vec(env_id, num_envs=1, img_height=size[0], img_width=size[1], grayscale=gray, stack_num=1,
                              use_fire_reset=False, reward_clipping=False, repeat_action_probability=sticky)


ACTIONS = [int(a) for a in np.random.default_rng(0).integers(0, 9, 150)]  # Ms. Pac-Man: 9 actions, dots are worth 10


@pytest.mark.parametrize("name", NAMES)
def test_atari_frames_and_rewards(name):
    """64x64 RGB is the resized maximum of the last two of four frames; rewards are neither clipped nor lost; no action
    is repeated by chance.

    Torch's antialiased bilinear rounds a few values in ten thousand the other way than Pillow."""
    info = native("ALE/MsPacman-v5", (210, 160)).reset(seed=3)[1]
    colour = dict(grayscale=False) if tiny.has(name, "grayscale") else {}
    area, envs_ = native("ALE/MsPacman-v5", (64, 64)), make(name, "ALE/MsPacman-v5", sticky_actions=0.0, **colour)
    row, frames = envs_.reset(), area.reset(seed=3)[0]
    rewards = []
    bare = emulator("ms_pacman", int(info["episode_frame_number"][0]), ACTIONS)
    for action, (frame, reward) in zip([*ACTIONS, None], bare):
        if RESIZE[name] == "bilinear":
            off = np.abs(row["image"][0].astype(int) - pillow(frame, 64))
            assert off.max() <= 1 and off.mean() < 0.01
        else:
            np.testing.assert_array_equal(row["image"][0], frames[0, 0])
        assert row["image"].dtype == np.uint8 and row["reward"].dtype == np.float32 and row["reward"][0] == reward
        rewards.append(reward)
        if action is not None:
            row, frames = envs_.step(one_hot(action, 9)), area.step(np.array([action]))[0]
    assert max(rewards) >= 10, "the rollout should meet a reward that clipping would change"


@pytest.mark.parametrize("name", [n for n in NAMES if tiny.has(n, "grayscale") and RESIZE[n] == "area"])
def test_atari_native_gray(name):
    """64x64 gray: the area average of the maximum of the last two of four gray frames, as ale-py itself makes it."""
    info = native("ALE/MsPacman-v5", (210, 160)).reset(seed=3)[1]
    official = native("ALE/MsPacman-v5", (64, 64), gray=True)
    envs_ = make(name, "ALE/MsPacman-v5", sticky_actions=0.0, grayscale=True)
    assert envs_.shapes == {"image": (64, 64, 1)}
    image, want = envs_.reset()["image"][0], official.reset(seed=3)[0]
    bare = emulator("ms_pacman", int(info["episode_frame_number"][0]), ACTIONS[:40], gray=True)
    for action, (frame, _) in zip([*ACTIONS[:40], 0], bare):
        np.testing.assert_array_equal(image[..., 0], want[0, 0])
        np.testing.assert_array_equal(image, load(name).resize_area(frame[None], 64)[0])
        image, want = envs_.step(one_hot(action, 9))["image"][0], official.step(np.array([action]))[0]


@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(load(n).Args, "grayscale") and RESIZE[n] == "bilinear"])
def test_atari_grayscale(name):
    """Gray is made after maximum and resize, truncated."""
    gray, rgb = (make(name, "ALE/Breakout-v5", image_size=96, grayscale=flag) for flag in (True, False))
    assert gray.shapes == {"image": (96, 96, 1)} and rgb.shapes == {"image": (96, 96, 3)}
    frame, colour = gray.reset()["image"], rgb.reset()["image"]
    for action in ACTIONS[:30]:
        luma = colour @ [0.299, 0.587, 0.114]
        assert ((np.floor(luma - 1e-6) <= frame[..., 0]) & (frame[..., 0] <= np.floor(luma + 1e-6))).all()
        frame, colour = (e.step(one_hot(action % 4, 4))["image"] for e in (gray, rgb))
    assert len(np.unique(frame)) > 5


def test_resize_area_is_ale():
    """`resize_area` of the native frame is what ale-py's own resize gives."""
    raw, small = native("ALE/Breakout-v5", (210, 160)), native("ALE/Breakout-v5", (64, 64))
    big, want = raw.reset(seed=3)[0], small.reset(seed=3)[0]
    for action in ACTIONS[:60]:
        np.testing.assert_array_equal(SHARED.resize_area(big[:, 0], 64), want[:, 0])
        big, want = (e.step(np.array([action % 4]))[0] for e in (raw, small))


@pytest.mark.parametrize("name", NAMES)
def test_atari_sticky_actions(name):
    """Off: two runs with the same actions and seed are equal. On: they differ from those."""
    streams = {}
    for run, sticky in dict(first=0.0, again=0.0, sticky=0.25).items():
        envs_ = make(name, "ALE/Pong-v5", sticky_actions=sticky)
        envs_.reset()
        streams[run] = np.stack([envs_.step(one_hot(action % 6, 6))["image"] for action in ACTIONS[:60]])
    np.testing.assert_array_equal(streams["first"], streams["again"])
    assert (streams["first"] != streams["sticky"]).any()
    official = native("ALE/Pong-v5", (64, 64), gray=True, sticky=0.25)
    official.reset(seed=3)
    want = np.stack([official.step(np.array([action % 6]))[0] for action in ACTIONS[:60]])
    if RESIZE[name] == "area" and tiny.has(name, "grayscale"):
        np.testing.assert_array_equal(streams["sticky"][..., 0], want[:, :, 0])


@pytest.mark.parametrize("name", [name for name in NAMES if hasattr(load(name).Args, "full_action_space")])
def test_atari_action_sets(name):
    assert make(name, "ALE/Pong-v5").action_dim == 6
    assert make(name, "ALE/Pong-v5", full_action_space=True).action_dim == 18


@pytest.mark.parametrize("name", [name for name in NAMES if hasattr(load(name).Args, "pixels")])
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
    return SHARED.Envs(args, 2, 3, 16, img_height=16, img_width=16, grayscale=True, **options)


def rollout(envs_, steps: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Fields (T,N,...) of a random rollout."""
    rng = np.random.default_rng(seed)
    rows = [envs_.reset()]
    for _ in range(steps):
        rows.append(envs_.step(one_hot(rng.integers(0, envs_.action_dim, envs_.num_envs), envs_.action_dim)))
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


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
    """With `life_loss_info` a lost life is terminal, the game goes on: equal frames, the last of five lives resets."""
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
    return SHARED.Envs(args, num_envs, 3, size, pixels=pixels)


def probe(observation_space=Box(-1, 1, (2,)), action_space=Discrete(3)):
    """Environments (one copy) with these spaces, and the list of actions that arrive in it."""
    spaces = dict(observation_space=observation_space, action_space=action_space)
    gymnasium.register("Probe-v0", entry_point=Probe, kwargs=spaces)
    try:
        envs_ = gym_envs("Probe-v0", num_envs=1)
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
    """Vectors of any type and shape are flattened and joined in the order of their names; images are resized and
    stacked by channel in that order."""
    space = Dict(b=Box(0, 255, (16, 16, 1), np.uint8), a=Box(0, 255, (32, 24, 3), np.uint8),
                 w=Box(-9, 9, (3,), np.int64), v=Box(-1, 1, (2, 2), np.float64), s=Box(0, 1, (), np.float32),
                 u=Box(0, 255, (2,), np.uint8))
    envs_, _ = probe(observation_space=space)
    row = envs_.reset()
    space.seed(3)
    obs = space.sample()
    assert envs_.shapes == {"image": (16, 16, 4), "vector": (1, 2, 4, 3)}
    np.testing.assert_array_equal(row["image"][0, ..., 3:], obs["b"])
    np.testing.assert_array_equal(row["image"][..., :3], SHARED.resize_area(obs["a"][None], 16))
    joined = np.array([[obs["s"], *obs["u"], *obs["v"].flat, *obs["w"]]], np.float32)
    np.testing.assert_array_equal(row["vector"], joined)
    assert row["vector"].dtype == np.float32 and row["image"].dtype == np.uint8


@pytest.mark.parametrize("spaces, named", [
    (dict(observation_space=Box(0, 255, (3, 16, 16), np.uint8)), "(3, 16, 16)"),
    (dict(observation_space=Box(0, 1, (16, 16, 3), np.float32)), "float32"),
    (dict(observation_space=Dict(words=Text(5), vector=Box(-1, 1, (2,)))), "Text"),
    (dict(observation_space=Dict(number=Discrete(5), vector=Box(-1, 1, (2,)))), "Discrete(5)"),
    (dict(action_space=MultiDiscrete([2, 3])), "MultiDiscrete([2 3])"),
], ids=["channels first", "float image", "text", "discrete", "several actions"])
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
    np.testing.assert_array_equal(row["image"], SHARED.resize_area(frame[None], 64))
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
    frame = load(name).resize_area(envs_.envs.envs[0].render()[None], 64)
    np.testing.assert_array_equal(stream["image"][-1], frame)
    assert (stream["image"][0] != frame).any()


@PICTURES
def test_image_observations_are_taken_as_they_are(name):
    """16x16 pixels become 64x64 of the same colours."""
    envs_ = make(name, "envs:Catch-v0")
    image = envs_.reset()["image"]
    np.testing.assert_array_equal(image[0], envs_.envs.envs[0].unwrapped._image().repeat(4, 0).repeat(4, 1))
    assert envs_.shapes == {"image": (64, 64, 3)} and image.max() == 255


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
        (made,) = SHARED.Envs(args, 1, 0, size, pixels=True).envs.envs
        assert made.unwrapped.render_kwargs == dict(height=size, width=size, camera_id=camera)
    assert SHARED.Envs(args, 1, 0, 64, pixels=False).envs.envs[0].unwrapped.render_kwargs is None


def area(image: np.ndarray, size: int) -> np.ndarray:
    """Area average by definition: magnify so that source and target pixels consist of whole cells, then average."""
    y, x, channels = image.shape
    fine = image.astype(float).repeat(size, 0).repeat(size, 1).reshape(size, y, size, x, channels)
    return np.rint(fine.mean((1, 3)))


@pytest.mark.parametrize("shape", [(32, 32, 3), (20, 28, 1), (8, 12, 3)])
def test_resize_area_is_an_average(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    got = SHARED.resize_area(image[None], 16)[0].astype(float)
    off = np.abs(got - area(image, 16))
    assert off.max() <= 1 and off.mean() < 0.01  # halves may round either way


@pytest.mark.parametrize("shape", [(210, 160, 3), (64, 64, 3), (96, 64, 3), (16, 16, 1), (20, 28, 1), (400, 600, 4)])
def test_resize_is_bilinear(shape):
    """Antialiased as Pillow's, smaller or larger, channel by channel; an image of the right size stays."""
    images = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
    got = SHARED.resize(images, 64)
    assert got.shape == (2, 64, 64, shape[-1]) and got.dtype == np.uint8
    for image, small in zip(images, got):
        off = np.abs(small.astype(int) - np.stack([pillow(channel, 64) for channel in image.transpose(2, 0, 1)], -1))
        assert off.max() <= 1 and off.mean() < 0.01 and (shape[:2] != (64, 64) or off.max() == 0)


@pytest.mark.parametrize("name", [name for name in NAMES if hasattr(load(name), "Episodes")])
def test_episode_accounting(name):
    """Two environments with episodes of 3 and 2 steps; rows that only reset count for nothing."""
    episodes, ended = load(name).Episodes(2), []
    first = np.array([[1, 1], [0, 0], [0, 0], [0, 1], [1, 0], [0, 0]], bool)
    last = np.array([[0, 0], [0, 0], [0, 1], [1, 0], [0, 0], [0, 1]], bool)
    reward = np.array([[0, 0], [1, 10], [2, 20], [4, 0], [0, 40], [8, 80]], np.float32)
    for t in range(6):
        ended.append(episodes.update(dict(is_first=first[t], is_last=last[t], reward=reward[t])))
    assert ended == [[], [], [(1, 30, 2)], [(0, 7, 3)], [], [(1, 120, 2)]] and episodes.last == 120


@pytest.mark.parametrize("name", [name for name in NAMES if hasattr(load(name), "human_normalised")])
def test_human_normalised_score(name):
    script = load(name)
    for env_id, score, want in (("ALE/Pong-v5", -20.7, 0), ("ALE/Pong-v5", 14.6, 1), ("ALE/Breakout-v5", 16.1, 0.5)):
        assert script.human_normalised(env_id, score) == {"eval/human_normalised": pytest.approx(want)}
    assert script.human_normalised("ALE/Tetris-v5", 1) == script.human_normalised("CartPole-v1", 1) == {}
    assert len(script.ATARI_100K) == 26 and all(low < high for low, high in script.ATARI_100K.values())
    for game in script.ATARI_100K:
        gymnasium.spec(f"ALE/{game}-v5")  # raises for an unknown name
