"""Tiny environments, registered on import: `PYTHONPATH=tests python dreamer_v3.py --env-id envs:Catch-v0`.

id               actions          observation                                     episode
Catch-v0         Discrete(3)      uint8 image (size,size,3), size=16              7 steps, terminates
CatchSmall-v0    the same, on a 4x4 grid, with areas filled                      3 steps, terminates
Track-v0         Box(-1,1,(1,))   uint8 image (size,size,3), size=16              length=32 steps, truncates
Lock-v0          Discrete(3)      uint8 image (size,size,3), size=16, always      6 to 14 steps, truncates
                                  the same
Scripted-v0      Discrete(3), or  float32 vector (3,), or with image=True         length=7 steps, end="terminate"
                 continuous=True  uint8 image (16,16,3)                           or "truncate"
Goals-v0         Box(-1,1,(2,))   uint8 image (16,16,3)                           length=32 steps, truncates
Errand-v0        Discrete(3)      uint8 image (size,size,3), size=16              length=24 steps, truncates, or
                                                                                  terminates with the reward
CountingDict-v0  Discrete(3)      Dict: image (16,16,3), vector (4,), scalar ()   length=7 steps, terminates
"""
import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete


class Catch(gymnasium.Env):
    """A ball falls down a random column of a grid, one row a step; +1 on the paddle (2 cells wide), -1 beside it.

    Actions: left, stay, right. The only reward comes with the last step, the seventh of an 8x8 grid.
    Mean return: every policy that does not look at the image, random included, -0.5 exactly (2 columns of 8;
    measured -0.496 over 100,000 episodes), on a 4x4 grid 0; optimal +1 (measured 1.0: the paddle always has the time).
    With `filled`, all that is above and left of the ball is lit, and all that is left of the paddle: an absolute error
    is least for a black image as long as single cells are lit.
    """

    def __init__(self, size: int = 16, grid: int = 8, filled: bool = False):
        assert size % grid == 0, f"size {size} must be a multiple of {grid}"
        self.grid, self.cell, self.filled = grid, size // grid, filled
        self.observation_space, self.action_space = Box(0, 255, (size, size, 3), np.uint8), Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.column, self.paddle = 0, int(self.np_random.integers(self.grid)), self.grid // 2 - 1
        return self._image(), {}

    def step(self, action):
        self.row += 1
        self.paddle = min(max(self.paddle + int(action) - 1, 0), self.grid - 2)
        over = self.row == self.grid - 1
        caught = self.paddle <= self.column <= self.paddle + 1
        return self._image(), (1.0 if caught else -1.0) if over else 0.0, over, False, {}

    def _image(self):
        cells = np.zeros((self.grid, self.grid, 3), np.uint8)
        if self.filled:
            cells[: self.row, : self.column + 1, 0] = cells[-1, : self.paddle, 1] = 255
        cells[self.row, self.column, 0] = 255
        cells[-1, self.paddle : self.paddle + 2, 1] = 255
        return cells.repeat(self.cell, 0).repeat(self.cell, 1)


class Track(gymnasium.Env):
    """A dot (red, upper half) swings with period 24, phase and direction are random; a cursor follows it.

    The action moves the cursor by up to 0.5 on an axis of [-1, 1]; then reward max(0, 1 - 2 |cursor - dot|).
    One image does not show where the dot is going: the best policy remembers. The end is a time limit, not a death.
    Mean return of 32 steps, measured over 10,000 episodes: random 6.5, standing still 5.2, going where the dot is seen
    21.1, going where it will be (optimal) 31.6.
    """

    def __init__(self, size: int = 16, length: int = 32):
        self.length, self.axis = length, np.linspace(-1, 1, size)
        self.observation_space, self.action_space = Box(0, 255, (size, size, 3), np.uint8), Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.cursor = 0, 0.0
        self.phase, self.speed = self.np_random.uniform(0, 2 * np.pi), self.np_random.choice([-1, 1]) * 2 * np.pi / 24
        return self._image(), {}

    @property
    def dot(self) -> float:
        return float(np.sin(self.phase + self.speed * self.steps))

    def step(self, action):
        self.steps += 1
        self.cursor = float(np.clip(self.cursor + 0.5 * action[0], -1, 1))
        reward = max(0.0, 1 - 2 * abs(self.cursor - self.dot))
        return self._image(), reward, False, self.steps == self.length, {}

    def _image(self):
        image, half = np.zeros(self.observation_space.shape, np.uint8), len(self.axis) // 2
        # two neighbouring pixels share the light, so that the position is visible below one pixel
        image[:half, :, 0], image[half:, :, 1] = (
            255 * np.clip(1 - 7.5 * abs(self.axis - x), 0, 1) for x in (self.dot, self.cursor))
        return image


class Lock(gymnasium.Env):
    """The right action is 0, 1, 2, 0, 1, 2, ... counted from the episode's start; +1 for each. The image is black.

    The length is random, so only `is_first` tells where to begin counting, and an action that is moved by one step is
    never right: whoever mixes up either cannot learn it. Mean return, measured over 20,000 episodes: random 3.3,
    always the first action 3.7; optimal 10.
    """

    def __init__(self, size: int = 16):
        self.image = np.zeros((size, size, 3), np.uint8)
        self.observation_space, self.action_space = Box(0, 255, self.image.shape, np.uint8), Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.length = 0, int(self.np_random.integers(6, 15))
        return self.image, {}

    def step(self, action):
        reward = float(action == self.steps % 3)
        self.steps += 1
        return self.image, reward, False, self.steps == self.length, {}


class Scripted(gymnasium.Env):
    """Deterministic: each observation tells its step number, the action that led to it, and a constant.

    Vector (step, code, 1) or image with channels (step, code, 255); code is 0 after reset, else action + 1, or
    128 + 127 * action where continuous. The reward equals the step number in the episode: 1 for the first step.
    """

    def __init__(self, length: int = 7, end: str = "terminate", image: bool = False, continuous: bool = False):
        assert end in ("terminate", "truncate"), end
        self.length, self.end, self.image, self.running = length, end, image, False
        self.observation_space = Box(0, 255, (16, 16, 3), np.uint8) if image else Box(0, 255, (3,), np.float32)
        self.action_space = Box(-1, 1, (1,), np.float32) if continuous else Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.running = 0, True
        return self._obs(0), {}

    def step(self, action):
        assert self.running, "step after the end of the episode: reset was not called"
        assert self.action_space.contains(action), f"action {action!r} is not in {self.action_space}"
        self.steps += 1
        over = self.steps == self.length
        self.running = not over
        code = action + 1 if isinstance(self.action_space, Discrete) else 128 + 127 * action[0]
        return self._obs(code), float(self.steps), over and self.end == "terminate", over and self.end == "truncate", {}

    def _obs(self, code):
        if self.image:
            return np.full((16, 16, 3), [self.steps, np.rint(code), 255], np.uint8)
        return np.array([self.steps, code, 1], np.float32)


class Goals(gymnasium.Env):
    """A white square in a dark room; the action moves it by up to 0.25 on both axes of [-1, 1].

    Reward 1 for each step in the named corner (both coordinates beyond 0.5), nothing for the other three. The image does
    not say which corner counts: whoever gets there has been told. The end is a time limit, not a death.
    Mean return of 32 steps, measured over 500 episodes: random 1.6; going there at once (optimal) 29.0.
    """

    CORNERS = {"top left": (-1, -1), "top right": (1, -1), "bottom left": (-1, 1), "bottom right": (1, 1)}

    def __init__(self, corner: str = "top left", length: int = 32):
        self.corner, self.length = np.array(self.CORNERS[corner]), length
        self.observation_space, self.action_space = Box(0, 255, (16, 16, 3), np.uint8), Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.place = 0, self.np_random.uniform(-1, 1, 2)
        return self._image(), {}

    def step(self, action):
        self.steps += 1
        self.place = np.clip(self.place + 0.25 * np.asarray(action), -1, 1)
        reward = float((self.place * self.corner > 0.5).all())
        return self._image(), reward, False, self.steps == self.length, {}

    def _image(self):
        # a square of four pixels; those at its rim share the light, so that its place is visible below one pixel
        columns, rows = (np.clip(2.5 - abs(np.arange(16) - 7.5 - 5.5 * x), 0, 1) for x in self.place)
        return (255 * (rows[:, None] * columns)[..., None]).astype(np.uint8).repeat(3, -1)


class Errand(gymnasium.Env):
    """A path of five cells with a shed (left end) and a well (right end), between which four things are to be done.

    Actions: left, stay, right; it begins in the middle. To fetch the bucket (left), fill it (right), water the horse
    (left) and ride away (right) it is enough to get there in this order. The only reward, +1, comes with the last one,
    which ends the episode. The image shows where one is (red) and how many things are done (green).
    Mean return, measured over 20,000 episodes: random 0.001 (the first thing is done in 69 % of them, two in 23 %, three
    in 2.6 %, all four in 0.08 %); optimal 1 (14 steps).
    """

    def __init__(self, size: int = 16, length: int = 24):
        self.size, self.length = size, length
        self.observation_space, self.action_space = Box(0, 255, (size, size, 3), np.uint8), Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.place, self.done = 0, 2, 0
        return self._image(), {}

    def step(self, action):
        self.steps += 1
        self.place = min(max(self.place + int(action) - 1, 0), 4)
        self.done += self.place == (4 if self.done % 2 else 0)
        over = self.done == 4
        return self._image(), float(over), over, self.steps == self.length and not over, {}

    def _image(self):
        image, width = np.zeros((self.size, self.size, 3), np.uint8), self.size // 5
        image[: self.size // 2, self.place * width : (self.place + 1) * width, 0] = 255
        image[self.size // 2 :, : self.done * width, 1] = 255
        return image


class CountingDict(gymnasium.Env):
    """Image and vector are random (seeded by reset), the scalar and the reward count the steps of the episode."""

    def __init__(self, length: int = 7):
        self.length, self.action_space = length, Discrete(3)
        self.observation_space = Dict(image=Box(0, 255, (16, 16, 3), np.uint8), vector=Box(-1, 1, (4,), np.float32),
                                      scalar=Box(0, length, (), np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._obs(), {}

    def step(self, action):
        self.steps += 1
        return self._obs(), float(self.steps), self.steps == self.length, False, {}

    def _obs(self):
        return dict(image=self.np_random.integers(0, 256, (16, 16, 3), np.uint8),
                    vector=self.np_random.uniform(-1, 1, 4).astype(np.float32),
                    scalar=np.array(self.steps, np.float32))


for env in (Catch, Track, Lock, Scripted, Goals, Errand, CountingDict):
    gymnasium.register(f"{env.__name__}-v0", entry_point=env)
gymnasium.register("CatchSmall-v0", entry_point=Catch, kwargs=dict(grid=4, filled=True))
