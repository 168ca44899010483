"""IRIS in one file: learns a discrete autoencoder and a GPT of its tokens from pixels, and a policy in their dreams.

Paper    Micheli, Alonso, Fleuret, "Transformers are Sample-Efficient World Models", ICLR 2023, arXiv:2209.00588v2
Code     compared number by number with eloialonso/iris at commit 24326aa; parameter counts are equal

Run      python iris.py --env-id ALE/Pong-v5                            Atari 100k protocol: RGB, no sticky actions
         python iris.py --preset tiny --env-id ALE/Breakout-v5          every phase in two minutes on a CPU
         python iris.py --lpips-weights FOLDER                          perceptual loss with VGG16 and LPIPS weights
         python iris.py --resume auto                                   go on after Ctrl-C, SIGTERM or a crash
         python iris.py --eval-only --checkpoint runs/NAME              play with a trained policy
         torchrun --standalone --nproc_per_node=2 iris.py --num-envs 2            two GPUs, or two CPU processes

Index    One replay row t is one decision and what came of it:

            obs_t  action_t | reward_t  end_t            obs_{t+1} is the next row, unless end_t
            '- seen, chosen '- arrived together after it

         The Transformer reads blocks of K + 1 tokens, one block a frame. What each output predicts (K = 16):

            input    z_t^0   z_t^1   ...  z_t^14   z_t^15   a_t                        | z_{t+1}^0  ...
            output   z_t^1   z_t^2   ...  z_t^15   -        z_{t+1}^0, reward_t, end_t | z_{t+1}^1  ...

         In a dream of H frames, reward and end belong to the action, so that H frames have H-1 of them that count:
            x_0 -a_0-> r_0 d_0 x_1 ... x_{H-1}
            L_t = r_t + g (1-d_t) ((1-lam) v_{t+1} + lam L_{t+1}), L_{H-1} = v_{H-1}

Symbols  paper  code          shape                |  paper  code       shape
         x_t    obs, frames   (N,C,Y,X) in [0,1]   |  a_t    action     (T,B) index, (N,A) one-hot for environments
         E, D   encoder, decoder                   |  r_t    reward     (T,B) its sign is what is learned
         z_t    tokens        (T,B,K) in 0..V-1    |  d_t    end        (T,B)
         e      codebook      (V,E)                |  v_t    value      (H,B)
         x^_t   recon         (N,C,Y,X)            |  L_t    ret        (H-1,B)
         G      world         (B,positions,W)      |  g      gamma
         T time, B batch, H imagination, N images (in section 4 environments), K tokens per frame, V words of width E,
         W width of the Transformer. Time is the first axis, but inside the Transformer the second.
         The paper writes the policy as a function of x^_{<=t}: a CNN and an LSTM, of which the value is a second head.

Delta    another line than the Dreamers: no recurrent latent, no KL, no gradient through the world model.

Differences from the official code, each on purpose:
         - real frames are encoded and decoded once per epoch, not once per batch: the tokenizer does not change there;
         - a frame's last token and the next action go through the Transformer together: same numbers, fewer passes;
         - the dream runs without gradient, the policy is then evaluated again on its frames: same gradients;
         - the last action of a dream is not given to the world model: its reward and end enter no loss;
         - the maximum of two frames is taken before the resize, by ale-py (official: after it); no-ops at reset are
           0..29 (official 1..30, in evaluation 1); games end after 108,000 frames in training too (official: 20,000);
         - without LPIPS weights the tokenizer learns from pixels only (--perceptual-loss says what happens);
         - evaluations are rarer, and play whole episodes in each environment.
SPDX-License-Identifier: MIT
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "gymnasium>=1.3", "ale-py>=0.12.1", "tyro>=1.0", "tensorboard>=2.16", "tqdm>=4.60"]
# ///
from __future__ import annotations

import ctypes
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

import ale_py  # noqa: F401  registers the ALE/ ids
import gymnasium
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import Summary
from tqdm import tqdm

# ======== 2. arguments ========

@dataclass
class Args:
    """IRIS: tokenizer, Transformer world model and actor-critic in one file. Counts accept 1_000_000 and 1e6."""

    exp_name: str = "iris"  # second part of the run directory's name
    # any Gymnasium id with discrete actions, also module:Env-v0; what is not one image is rendered
    env_id: str = "ALE/Pong-v5"
    seed: int = 1  # seed of weights, environments and sampling
    # values for the flags left alone; tiny: all phases in two minutes on two CPU cores
    preset: Literal["default", "tiny"] = "default"
    # policy steps over all environments; frames = steps x action repeat (official: 100_000)
    total_timesteps: int = 100_000
    num_envs: int = 1  # parallel environments (official: 1)
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    # computation (weights stay fp32); auto: fp32, on CUDA with TF32 (official)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # torch.compile the losses, on CUDA record the dream as a graph; auto: on CUDA only
    compile: Literal["auto", "on", "off"] = "auto"
    run_dir: str = "runs"  # where run directories go
    resume: str = ""  # run directory to continue, or auto: the newest one of this environment, name and seed
    save_every: int = 2_000  # policy steps between checkpoints (official: 200)
    eval_every: int = 10_000  # policy steps between evaluations (official: 1_000); 0: one at the end
    eval_episodes: int = 16  # episodes per evaluation (official: 16, at the end 100)
    eval_only: bool = False  # evaluate --checkpoint and stop
    checkpoint: str = ""  # run directory or checkpoint file for --eval-only
    video_every: int = 10_000  # policy steps between open-loop videos; 0: one at the end
    log_every: int = 1_000  # policy steps between metric logs

    image_size: int = 64  # side of the square image, a multiple of 16: K = (side / 16)^2 tokens (official: 64)
    action_repeat: int | None = None  # environment steps per policy step; None: 4 on Atari, 1 elsewhere (official)
    sticky_actions: float = 0.0  # Atari: probability that a frame repeats the last action (official)
    # Atari: in training a lost life ends an episode (official); an evaluation always plays whole games
    life_loss: bool = True

    # replay rows over all environments; at most what the budget at the start needs (official: keeps everything)
    buffer_size: int = 200_000
    # where replay lives; auto: GPU memory if it fits in half of what is free, else memory-mapped files
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"
    # policy steps per epoch, which then trains tokenizer, world model and policy, in this order (official)
    epoch_steps: int = 200
    epoch_updates: int = 200  # updates of each of the three per epoch (official)
    extra_epochs: int = 100  # epochs that only train, after the last policy step (official)
    # tokenizer: first update in the first epoch that ends beyond this policy step (official: after 5 epochs)
    learning_starts: int = 1_000
    world_starts: int = 5_000  # the same for the world model (official: after 25 epochs)
    behaviour_starts: int = 10_000  # the same for the actor-critic (official: after 50 epochs)
    tokenizer_batch: int = 256  # images per tokenizer update (official)
    batch_size: int = 64  # sequences per update of the world model, dreams per update of the actor-critic, B (official)
    batch_length: int = 20  # frames per sequence, T: what the Transformer can look back on (official)

    vocab_size: int = 512  # words in the codebook, V (official)
    code_dim: int = 512  # width of a word, E (official)
    channels: int = 64  # channels of all convolutions of encoder and decoder, even (official)
    res_blocks: int = 2  # residual blocks per resolution in the encoder; one more in the decoder (official)
    # lpips (official): VGG16 features; pixel: squared errors instead (ours); auto: lpips if weights are found
    perceptual_loss: Literal["auto", "lpips", "pixel", "none"] = "auto"
    # .pth file, or folder of them, with VGG16 and LPIPS weights; empty: the checkpoint folder of torch.hub
    lpips_weights: str = ""
    # dropout in the linear layers of LPIPS while the tokenizer trains (official, by accident)
    lpips_dropout: bool = True
    layers: int = 10  # Transformer blocks (official)
    heads: int = 4  # attention heads (official)
    width: int = 256  # width of the Transformer, W (official)
    dropout: float = 0.1  # of embeddings, attention and residuals while the world model trains (official)
    lstm_units: int = 512  # width of the policy's LSTM (official)

    imag_horizon: int = 20  # imagined frames, H (official)
    burn_in: int = 20  # real frames before a dream, which warm up the policy's LSTM only (official)
    gamma: float = 0.995  # discount (official)
    lam: float = 0.95  # lambda of the returns (official)
    ent_coef: float = 0.001  # entropy bonus (official)
    epsilon: float = 0.01  # probability of a uniformly random action while collecting (official)
    # policy logits are divided by it while collecting (official; less on Freeway, paper appendix)
    temperature: float = 1.0
    eval_temperature: float = 0.5  # the same in evaluation (official)
    lr: float = 1e-4  # learning rate of all three optimisers (official)
    weight_decay: float = 0.01  # AdamW's, on the matrices of the Transformer (official)
    grad_clip: float = 10.0  # gradient norm allowed per optimiser (official)


PRESETS = dict(
    default={},
    tiny=dict(total_timesteps=600, epoch_steps=50, epoch_updates=8, extra_epochs=2, learning_starts=100,
              world_starts=200, behaviour_starts=300, tokenizer_batch=16, batch_size=8, batch_length=8, vocab_size=128,
              code_dim=64, channels=16, res_blocks=1, layers=2, heads=2, width=64, lstm_units=64, imag_horizon=8,
              burn_in=4, lr=1e-3, save_every=300, eval_every=0, video_every=300, log_every=50, eval_episodes=1),
)


# ==== shared: device ====
def fail(message: str):
    """For everything the user can mend: one clear line on stderr, exit status 2, no traceback."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own beside a progress bar
    raise SystemExit(2)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The torch device for --device; naming an absent one is an error."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("cpu, cuda and mps are supported")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name} is not usable here ({str(error).splitlines()[0]}); try --device auto")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    elif sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        # glibc: keep freed memory (no mmap, no trim); page faults on what was given back cost 8 % of an update
        ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, -1)
    return device


def autocast(args, device: torch.device):
    """bf16 for matrix products and convolutions where --precision says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16", cache_enabled=False)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Norms, softmaxes, losses and returns run in float32 also under bf16; float64 stays (tests)."""
    return x if x.dtype == torch.float64 else x.float()
# ==== end shared ====


# ======== 3. pure functions ========

def sample(logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Indices (...) from softmax(logits (...,V)): argmax(p / e) with e ~ Exp(1) is an exact draw (exponential race).

    No checks and no host reads: a default update makes 362 draws, one after the other; noise of ones gives the mode."""
    return (at_least_float32(logits).softmax(-1) / noise).argmax(-1)


def nearest_code(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index (...) of the codebook row (V,E) nearest to z (...,E): argmin_i |z - e_i|^2, the lowest of equals.
    Eq. 1 (arXiv:1711.00937v2), of VQ-VAE.

    |z|^2 is the same for all i and left out. In float32 also under autocast, as bf16 cannot tell neighbours apart; on
    CUDA in TF32, as in the official runs."""
    with torch.autocast(z.device.type, enabled=False):
        z, codebook = at_least_float32(z), at_least_float32(codebook)
        return (codebook.square().sum(-1) - 2 * z @ codebook.T).argmin(-1)


def lambda_return(reward: torch.Tensor, value: torch.Tensor, end: torch.Tensor, gamma: float, lam: float):
    """L_t = r_t + gamma (1-d_t) ((1-lam) v_{t+1} + lam L_{t+1}), L_{H-1} = v_{H-1}. Section 2.3 (arXiv:2209.00588v2).

    Reward and end (H-1,...) are those of the action at t, value (H,...) that of the frame; result (H-1,...)."""
    live = gamma * (1 - end.to(value.dtype))
    step, decay = reward + live * (1 - lam) * value[1:], live * lam
    ret, rets = value[-1], []
    for r, d in zip(reversed(step.unbind(0)), reversed(decay.unbind(0))):
        ret = torch.addcmul(r, d, ret)
        rets.append(ret)
    return torch.stack(rets[::-1])


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of x over the entries of mask, (): of the batch of all ranks, once gradients are averaged over ranks."""
    return (x * mask).sum() / gather_ranks(mask.sum(dtype=x.dtype)[None]).mean().clamp(min=1e-8)


def to_frames(image: torch.Tensor) -> torch.Tensor:
    """(...,Y,X,C) uint8 -> (...,C,Y,X) in [0,1]."""
    return image.movedim(-1, -3).float() / 255


# ======== 4. environment ========

# ==== shared: environment ====
def resize(images: np.ndarray, size: int) -> np.ndarray:
    """(N,Y,X,C) uint8 -> (N,size,size,C), antialiased: Pillow's BILINEAR (official: V1, V3, IRIS) to one gray level."""
    if images.shape[1:3] == (size, size):
        return images
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True).permute(0, 2, 3, 1).numpy()


def area_weights(source: int, target: int) -> np.ndarray:
    """(target, source) weights of an exact area average: the overlap of target cells with source pixels."""
    edges, pixels = np.arange(target + 1)[:, None] * source / target, np.arange(source)
    overlap = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return overlap.clip(0) * target / source


def resize_area(frames: np.ndarray, size: int) -> np.ndarray:
    """(N,Y,X,C) uint8 -> (N,size,size,C) by area average, as OpenCV's INTER_AREA."""
    if frames.shape[1:3] == (size, size):
        return frames
    rows, cols = area_weights(frames.shape[1], size), area_weights(frames.shape[2], size)
    return np.rint(np.einsum("yh,nhwc,xw->nyxc", rows, frames, cols, optimize=True)).astype(np.uint8)


class Envs:
    """`num_envs` copies of an environment; a row of arrays (N,...) per step. Edit here for anything unusual.

    The step after an episode's end ignores its action and returns the next episode's first observation (NEXT_STEP), so
    is_first_{t+1} = is_last_t. A time limit is an end, but not terminal. Rewards are raw.
    Observations: uint8 images, resized and stacked by channel, are `image`; other Boxes, joined, are `vector`.
    Actions: Discrete, or Box: clipped to [-1, 1], then mapped to the bounds where they are finite.
    ALE/ ids are ale-py's own vector environment, options in `atari`; with life_loss_info a lost life is terminal, but
    the game goes on. Other ids run one after the other in this process; `pixels`: seen by their rendered image, if it
    is None those that do not show one image."""

    def __init__(self, args, num_envs: int, seed: int, size: int, gray=False, pixels: bool | None = None, **atari):
        self.num_envs, self.seed, self.size, self.atari = num_envs, seed, size, args.env_id.startswith("ALE/")
        self.gray, self.life_loss = gray and self.atari, atari.get("life_loss_info", False) and self.atari
        next_step = gymnasium.vector.AutoresetMode.NEXT_STEP
        try:
            if self.atari:
                options = dict(
                    img_height=210, img_width=160, grayscale=False, stack_num=1, frameskip=args.action_repeat,
                    maxpool=True, noop_max=30, use_fire_reset=False, reward_clipping=False, episodic_life=False,
                    repeat_action_probability=args.sticky_actions, max_num_frames_per_episode=108_000,
                    autoreset_mode=next_step) | atari
            else:
                if pixels is None:
                    with gymnasium.make(args.env_id) as probe:
                        pixels = len(getattr(probe.observation_space, "shape", None) or ()) != 3
                wrappers = [lambda env: gymnasium.wrappers.RepeatAction(env, args.action_repeat)]
                wrappers += [gymnasium.wrappers.AddRenderObservation] if pixels else []
                options = dict(vectorization_mode="sync", wrappers=wrappers,
                               vector_kwargs=dict(autoreset_mode=next_step))
                options |= dict(render_mode="rgb_array") if pixels else {}
                if pixels and "dm_control/" in args.env_id:  # official: small images, the camera that follows
                    camera = 2 if "quadruped" in args.env_id else 0
                    options["render_kwargs"] = dict(height=size, width=size, camera_id=camera)
            self.envs = gymnasium.make_vec(args.env_id, num_envs, **options)
        except (gymnasium.error.Error, ImportError, AssertionError, TypeError, ValueError) as error:
            fail(f"--env-id {args.env_id}: {(str(error) or repr(error)).splitlines()[0]}")  # such as: did you mean ...
        space, self.act = self.envs.single_observation_space, self.envs.single_action_space
        if self.atari:  # as `_row` returns it
            space = gymnasium.spaces.Box(0, 255, (size, size, 1 if options["grayscale"] else 3), np.uint8)
        spaces = dict(space) if isinstance(space, gymnasium.spaces.Dict) else {"obs": space}
        dims = {k: len(s.shape) if isinstance(s, gymnasium.spaces.Box) else 9 for k, s in spaces.items()}
        self.images = sorted(k for k, s in spaces.items() if dims[k] == 3 and s.dtype == np.uint8 and s.shape[0] > 4)
        self.vectors = sorted(spaces.keys() - self.images)
        for key in self.vectors:
            if dims[key] > 2 or dims[key] == 2 and spaces[key].dtype == np.uint8:
                fail(f"{args.env_id}: observation {spaces[key]} is not supported; uint8 (Y,X,C) images, Box vectors "
                     "and Dicts of them are (gymnasium.wrappers.FlattenObservation may help, or edit Envs)")
        if not isinstance(self.act, (gymnasium.spaces.Discrete, gymnasium.spaces.Box)):
            fail(f"{args.env_id}: action space {self.act} is not supported; Discrete and Box are")
        self.discrete = isinstance(self.act, gymnasium.spaces.Discrete)
        self.action_dim = int(self.act.n) if self.discrete else math.prod(self.act.shape)
        channels = 1 if self.gray else sum(spaces[k].shape[-1] for k in self.images)
        self.shapes = {"image": (size, size, channels)} if self.images else {}
        if self.vectors:
            self.shapes["vector"] = tuple(math.prod(spaces[k].shape) for k in self.vectors)  # the length of each part

    def reset(self) -> dict[str, np.ndarray]:
        obs, _ = self.envs.reset(seed=self.seed)
        self.over = zeros = np.zeros(self.num_envs, bool)
        return self._row(obs, zeros, zeros, ~zeros)

    def step(self, action: np.ndarray) -> dict[str, np.ndarray]:
        """One policy step; `action` (N,A) one-hot, or raw continuous."""
        if self.discrete:
            native = action.argmax(-1) + self.act.start  # trap: ale-py hangs for ever on an action out of range
        else:
            finite = self.act.bounded_below & self.act.bounded_above
            unit = action.reshape(-1, *self.act.shape).clip(-1, 1)
            low, high = np.where(finite, self.act.low, -1), np.where(finite, self.act.high, 1)
            native = (low + (unit + 1) / 2 * (high - low)).clip(self.act.low, self.act.high).astype(self.act.dtype)
        obs, reward, terminated, truncated, info = self.envs.step(native)
        # over: the next step resets
        first, self.over = self.over, truncated | (terminated & (info["lives"] == 0) if self.life_loss else terminated)
        return self._row(obs, reward, terminated, first)

    def _row(self, obs, reward, terminated, first):
        if self.atari:
            obs = obs[:, 0] if obs.ndim == 5 else obs[:, 0, ..., None]
        obs, row = obs if isinstance(obs, dict) else {"obs": obs}, {}
        if self.images:
            to_size = resize if self.atari else resize_area
            image = np.concatenate([to_size(obs[k], self.size) for k in self.images], -1)
            if self.gray:  # after max and resize, truncated to uint8 as `embodied.envs.atari` does
                image = (image * np.array([0.299, 0.587, 1 - (0.299 + 0.587)])).sum(-1, keepdims=True).astype(np.uint8)
            row["image"] = image
        if self.vectors:
            parts = [np.reshape(obs[k], (self.num_envs, -1)) for k in self.vectors]
            row["vector"] = np.concatenate(parts, -1, dtype=np.float32)
        return dict(row, reward=reward.astype(np.float32), is_first=first,
                    is_last=self.over | terminated, is_terminal=terminated)
# ==== end shared ====


def make_envs(args: Args, num_envs: int, seed: int) -> Envs:
    """The one place that knows which environment it is: anything with `reset`, `step`, `shapes`, `action_dim`,
    `discrete`, `seed` and `over` as in Envs will do."""
    envs = Envs(args, num_envs, seed, args.image_size, life_loss_info=args.life_loss)
    if not envs.discrete:
        fail(f"{args.env_id}: IRIS needs discrete actions, not {envs.act}; dreamer_v3.py learns continuous ones")
    return envs


# ======== 5. replay ========

# ==== shared: replay storage ====
class Storage:
    """Ring of `capacity` rows for each of `num_envs` endless streams: tensors (capacity,num_envs,...) by field name.

    `specs`: name -> (shape, dtype). Each field is a memory-mapped file in `folder`, made if `new`: it takes no RAM of
    its own and survives a kill. On a GPU the fields live there, and `flush` copies new rows to the files.
    `rows` counts all rows ever added; the newest `size` of them are valid."""

    def __init__(self, specs: dict, capacity: int, num_envs: int, device: torch.device, folder: Path, new: bool = True):
        self.capacity, self.num_envs, self.device, self.folder = capacity, num_envs, device, folder
        self.rows = self.size = self.flushed = 0
        folder.mkdir(exist_ok=True)
        self.data, self.files = {}, {}
        # the row's number comes first: a row whose overwriting was cut off by a kill does not pass for the old one
        for name, (shape, dtype) in dict(number=((), torch.int64), **specs).items():
            path, count = folder / f"{name}.bin", capacity * num_envs * math.prod(shape)
            if new:  # takes all its disk space: a full disk is an OSError now, not a crash later
                with open(path, "wb") as file:
                    allocate = getattr(os, "posix_fallocate", lambda number, _, size: os.truncate(number, size))
                    try:
                        allocate(file.fileno(), 0, count * dtype.itemsize)
                    except OSError:
                        shutil.rmtree(folder)  # half a replay would keep the disk full
                        raise
            if path.stat().st_size != count * dtype.itemsize:
                fail(f"{path} is damaged, or of other --num-envs, --precision, sizes or number of processes")
            file = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
            self.files[name] = file.view(capacity, num_envs, *shape)
            self.data[name] = self.files[name].to(device)

    def add(self, row: dict) -> None:
        """Append one row: arrays or tensors (num_envs,...) for every field."""
        row = dict(row, number=self.rows)
        for name, tensor in self.data.items():
            tensor[self.rows % self.capacity] = torch.as_tensor(row[name])
        self.rows, self.size = self.rows + 1, min(self.size + 1, self.capacity)

    def gather(self, rows: torch.Tensor, envs: torch.Tensor) -> tuple[dict, torch.Tensor]:
        """Row numbers and streams (T,B) -> fields (T,B,...), and their flat positions for `write`."""
        index = rows % self.capacity * self.num_envs + envs
        return {k: v.flatten(0, 1)[index] for k, v in self.data.items()}, index

    def write(self, index: torch.Tensor, **values: torch.Tensor) -> None:
        """Overwrite fields at positions that `gather` returned."""
        for name, value in values.items():
            field = self.data[name].flatten(0, 1)  # trap: must be a view; writing to an indexed copy is lost
            field.index_copy_(0, index.flatten(), value.flatten(0, index.dim() - 1).to(field))

    def flush(self) -> None:
        """Bring the files up to date, so that a checkpoint may count on all rows."""
        new = torch.arange(self.flushed, self.rows) % self.capacity
        for name, file in self.files.items():
            if self.device.type != "cpu":
                file[new] = self.data[name][new.to(self.device)].cpu()
            with open(self.folder / f"{name}.bin", "r+b") as opened:
                os.fsync(opened.fileno())
        self.flushed = self.rows

    def state_dict(self) -> dict:
        return dict(rows=self.rows, size=self.size)

    def load_state_dict(self, state: dict) -> None:
        """Continue at a checkpoint, without the old rows that were overwritten after it was made."""
        self.rows = self.flushed = state["rows"]
        saved = torch.arange(self.rows - state["size"], self.rows)
        self.size = int((self.files["number"][saved % self.capacity, 0] == saved).sum())


def replay_device(specs: dict, rows: int, args, device: torch.device, beside: int = 0) -> torch.device:
    """Where replay goes: the GPU if it fits in half of the free memory, else files. Says how large it is.

    `beside`: bytes per row that are kept in the same memory and never in files."""
    row = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())
    fits = device.type == "cuda" and (row + beside) * rows <= torch.cuda.mem_get_info(device)[0] / 2
    if args.buffer_device == "cuda" and not fits:
        free = (row + beside) * rows / 2**29
        fail(f"--buffer-device cuda needs a GPU with {free:.1f} GiB of free memory, or a smaller --buffer-size")
    device = device if fits and args.buffer_device != "cpu" else torch.device("cpu")
    print(f"replay: {rows:,} rows x {row:,} bytes = {row * rows / 2**30:.2f} GiB, {device.type}")
    return device
# ==== end shared ====


class SegmentReplay(Storage):
    """Segments of episodes: an episode uniformly, so steps of short ones come more often, then a place in it.
    Source: `EpisodesDataset`, `Episode.segment`.

    An episode ends where `is_last` says so: game over, time limit, a lost life. The observation that arrives with an
    end is no frame of it. The running episode can be sampled too. A segment that reaches over a border of its episode
    is padded with zeros, and `mask` says where.

    When the tokenizer is done with its epoch, `tokenize` makes the field `tokens` of all frames and `reconstruct` the
    field `recon`, what they decode to: both stay as they are until the tokenizer is trained again."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.episodes, self.running = [], [None] * self.num_envs  # [first row, frames, environment]; the growing ones
        self.table = self.tokens = self.recon = None

    def add(self, row: dict, action: np.ndarray, outcome: dict) -> None:
        """Append what was seen, (num_envs,...), the action's index, and the row that it led to."""
        frame = ~np.asarray(row["is_last"])  # else this action only resets, and this row is never sampled
        super().add(dict(image=row["image"], action=action, reward=outcome["reward"], end=outcome["is_last"],
                         frame=frame))
        self._extend(self.rows - 1, frame, outcome["is_last"])
        self.table = self.tokens = self.recon = None

    def _extend(self, row: int, frame, end) -> None:
        """Account for a row's frames and ends (num_envs,)."""
        for env in range(self.num_envs):
            if frame[env] and self.running[env] is None:
                self.running[env] = [row, 0, env]
                self.episodes.append(self.running[env])
            if frame[env]:
                self.running[env][1] += 1
            if end[env]:
                self.running[env] = None

    def refresh(self) -> None:
        """Cut off rows that were overwritten, and put the episodes where sampling happens."""
        for episode in self.episodes:
            lost = max(self.rows - self.size - episode[0], 0)
            episode[:2] = episode[0] + lost, episode[1] - lost
        self.episodes = [episode for episode in self.episodes if episode[1] > 0]
        self.table = torch.tensor(sorted(self.episodes), device=self.device)

    def segment(self, first, frames, env, start, length: int, names: str) -> tuple[dict, torch.Tensor]:
        """The named fields (length,B,...) of `length` steps from `start` of the episodes (B), zero outside; mask."""
        step = start + torch.arange(length, device=self.device)[:, None]
        mask = (step >= 0) & (step < frames)
        index = (first + step.clamp(min=0).minimum(frames - 1)) % self.capacity * self.num_envs + env
        made = dict(tokens=self.tokens, recon=self.recon)
        found = {k: (made[k] if k in made else self.data[k].flatten(0, 1))[index] for k in names.split()}
        return {k: v * mask.view(*mask.shape, *[1] * (v.dim() - 2)) for k, v in found.items()}, mask

    def sample(self, batch_size: int, length: int, names: str, last: bool = False) -> tuple[dict, torch.Tensor]:
        """-> fields (length,batch_size,...), mask (length,batch_size). The step that is drawn uniformly is the first of
        the segment, or with `last` its last one: every step of an episode occurs there, padding is at the far end."""
        if self.table is None:
            self.refresh()
        episode, place = torch.rand((2, batch_size), dtype=torch.float64, device=self.device)
        first, frames, env = self.table[(episode * len(self.table)).long()].T
        start = (place * frames).long() - (length - 1 if last else 0)
        return self.segment(first, frames, env, start, length, names)

    def recent(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The last `length` images of each environment's running episode, (length,num_envs,...), and their mask."""
        episodes = [episode or [0, 0, env] for env, episode in enumerate(self.running)]
        first, frames, env = torch.tensor(episodes, device=self.device).T
        found, mask = self.segment(first, frames, env, frames - length, length, "image")
        return found["image"], mask

    def tokenize(self, agent: Agent, chunk: int = 256) -> None:
        """Encode every frame in replay."""
        images = self.data["image"].flatten(0, 1)[: min(self.rows, self.capacity) * self.num_envs]
        self.tokens = torch.cat([agent.encode(x).to(self.device) for x in images.split(chunk)])

    def reconstruct(self, agent: Agent, chunk: int = 256) -> None:
        """Decode the tokens of every frame. Memory is that of a full replay, so that it serves the next epoch too."""
        height, width, channels = self.data["image"].shape[2:]
        self.recon = torch.empty(self.capacity * self.num_envs, channels, height, width, device=self.device)
        for tokens, recon in zip(self.tokens.split(chunk), self.recon.split(chunk)):
            recon[: len(tokens)] = agent.decode(tokens)

    def load_state_dict(self, state: dict) -> None:
        """Continue at a checkpoint; the rows tell the episodes. The environments begin anew, so none is running."""
        super().load_state_dict(state)
        for row in range(self.rows - self.size, self.rows):
            self._extend(row, *(self.data[k][row % self.capacity].tolist() for k in ("frame", "end")))
        self.running = [None] * self.num_envs


# ======== 6. networks ========

# ==== shared: dense layer ====
CPU_INFO = Path("/proc/cpuinfo")
SLOW_MKL = CPU_INFO.exists() and {"AuthenticAMD", "avx512f"} <= set(CPU_INFO.read_text().split())


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`, (...,in) with (out,in) -> (...,out). Where MKL leaves AVX-512 unused (on AMD, pytorch/builder#1245)
    many rows become the pixels of 16 images in a 1x1 convolution by oneDNN, in half the time."""
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or not SLOW_MKL or rows < 512 or rows % 16:
        return F.linear(x, weight, bias)
    images = x.reshape(16, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    return F.conv2d(images, weight[..., None, None], bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
# ==== end shared ====


class Linear(nn.Linear):
    """(...,in) -> (...,out) with PyTorch's initialisation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    """'Same' convolution with PyTorch's initialisation, (N,in,Y,X) -> (N,out,Y,X)."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def norm(channels: int) -> nn.GroupNorm:
    """Groups of two channels (official: 32 groups of 64 channels)."""
    return nn.GroupNorm(channels // 2, channels, eps=1e-6)


class ResBlock(nn.Sequential):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (N,C,Y,X). Source: `nets.ResnetBlock`."""

    def __init__(self, channels: int):
        super().__init__(norm(channels), nn.SiLU(), conv(channels, channels),
                         norm(channels), nn.SiLU(), conv(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class PixelAttention(nn.Module):
    """x + one head of attention between all Y*X places, (N,C,Y,X). Source: `nets.AttnBlock`."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.qkv, self.out = norm(channels), conv(channels, 3 * channels, 1), conv(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT.chunk(3, -1)  # each (N,Y*X,C)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).mT.unflatten(-1, x.shape[-2:]))


def stage(channels: int, level: int, blocks: int) -> list[nn.Module]:
    """The blocks of one resolution, image size / 2^level; with attention at 1/4 and 1/8 of the size (16 and 8)."""
    kinds = (ResBlock, PixelAttention) if level in (2, 3) else (ResBlock,)
    return [kind(channels) for _ in range(blocks) for kind in kinds]


def make_encoder(image: int, channels: int, blocks: int, code_dim: int) -> nn.Sequential:
    """(N,image,Y,X) in [-1,1] -> (N,E,Y/16,X/16). Source: `nets.Encoder`."""
    layers = [conv(image, channels)]
    for level in range(5):
        layers += stage(channels, level, blocks)
        if level < 4:  # halve. Trap: zeros at the right and bottom only; padding=1 would shift everything
            layers += [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)]
    return nn.Sequential(*layers, ResBlock(channels), PixelAttention(channels), ResBlock(channels),
                         norm(channels), nn.SiLU(), conv(channels, code_dim))


def make_decoder(image: int, channels: int, blocks: int, code_dim: int) -> nn.Sequential:
    """(N,E,Y/16,X/16) -> (N,image,Y,X), about [-1,1], without output activation. Source: `nets.Decoder`."""
    layers = [conv(code_dim, channels), ResBlock(channels), PixelAttention(channels), ResBlock(channels)]
    for level in (4, 3, 2, 1, 0):
        layers += stage(channels, level, blocks + 1)  # one block more than in the encoder
        layers += [nn.Upsample(scale_factor=2), conv(channels, channels)] if level else []
    return nn.Sequential(*layers, norm(channels), nn.SiLU(), conv(channels, image))


class LPIPS(nn.Module):
    """Distance of VGG16 features, frozen, version 0.1. Eq. 1 (arXiv:1801.03924v2). Source: `lpips.LPIPS`.

    `convs`: the 13 of VGG16 by their number in torchvision's `features`; the features are what leaves `taps`."""

    CONVS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
             17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}
    TAPS = (2, 7, 14, 21, 28)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.convs = nn.ModuleDict({str(i): conv(*widths) for i, widths in self.CONVS.items()})
        self.heads = nn.ModuleList(nn.Conv2d(self.CONVS[i][1], 1, 1, bias=False) for i in self.TAPS)
        self.dropout = dropout
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Images (N,3,Y,X) in [-1,1] -> five feature maps."""
        x, found = (x - self.shift) / self.scale, []
        for i, layer in self.convs.items():
            x = F.relu(layer(x))
            if int(i) in self.TAPS:
                found.append(x)
                x = F.max_pool2d(x, 2) if i != "28" else x
        return found

    def forward(self, recon: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Two batches of images (N,3,Y,X) in [-1,1] -> distance (N,)."""
        total = 0
        for a, b, head in zip(self.features(recon), self.features(target), self.heads):
            # unit vectors in channel space; the epsilon stands outside the root, as in the published weights' code
            a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
            total = total + head(F.dropout((a - b).square(), self.dropout)).mean((1, 2, 3))
        return total

    def load(self, path: str) -> str:
        """Fill in the weights from a .pth file or a folder -> what is missing, empty if nothing is.

        Known names: torchvision's vgg16 (`features.N.`), LPIPS (`linK.model.1.`), and both inside official IRIS
        checkpoints (`tokenizer.lpips.net.sliceS.N.`)."""
        place = Path(path or Path(torch.hub.get_dir()) / "checkpoints")
        # without a path only the usual files: torchvision's VGG16, and the heads that the official code downloads
        files = sorted(place.glob("*.p*t*")) if path and place.is_dir() else [place] if path else [
            place / "vgg16-397923af.pth", place / "vgg.pth"]
        wanted = {rf"(features|slice\d)\.{i}\.{part}": getattr(layer, part)
                  for i, layer in self.convs.items() for part in ("weight", "bias")}
        wanted |= {rf"lin{i}\.model\.1\.weight": layer.weight for i, layer in enumerate(self.heads)}
        for file in filter(Path.is_file, files):
            try:
                saved = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # damaged pickles raise anything
                return f"{file} cannot be read ({type(error).__name__})"
            for key in saved if isinstance(saved, dict) else ():
                name = next((name for name in wanted if re.search(rf"(^|\.){name}$", key)), None)
                if name and saved[key].shape == wanted[name].shape:
                    wanted.pop(name).copy_(saved[key])
        vgg = sum("lin" not in name for name in wanted)
        missing = [f"VGG16 ({vgg} of 26 tensors)"] * (vgg > 0) + ["LPIPS heads"] * (len(wanted) > vgg)
        return f"{' and '.join(missing)} not found in {place}" if missing else ""


def pixel_distance(recon: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """In place of LPIPS (ours, after Delta-IRIS, arXiv:2406.19320): mean square and 0.01 of the worst one, (N,).

    Images in [-1,1], hence the 1/4: the weights are those for images in [0,1]."""
    square = (recon - target).square().flatten(1) / 4
    return square.mean(1) + 0.01 * square.amax(1)


# ======== 7. world model ========

class Tokenizer(nn.Module):
    """Image -> K words of a codebook -> image. Both ways are deterministic. Section 2.1 (arXiv:2209.00588v2).

    As a variational autoencoder its posterior is one-hot, q(z|x) = 1 for the nearest word, and its prior uniform, so
    the KL of the ELBO is the constant K ln V and does not appear in the loss: what is left is -ln p(x | z)."""

    def __init__(self, image_channels: int, args: Args):
        super().__init__()
        sizes = image_channels, args.channels, args.res_blocks, args.code_dim
        self.encoder, self.decoder = make_encoder(*sizes), make_decoder(*sizes)
        self.pre_quant, self.post_quant = (conv(args.code_dim, args.code_dim, 1) for _ in range(2))
        self.codebook = nn.Embedding(args.vocab_size, args.code_dim)
        nn.init.uniform_(self.codebook.weight, -1 / args.vocab_size, 1 / args.vocab_size)

    def embed(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames (N,C,Y,X) in [0,1] -> z, what the encoder says before quantisation, (N,E,y,x)."""
        return self.pre_quant(self.encoder((2 * frames - 1).to(self.codebook.weight.dtype)))

    def words(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (N,K) -> their codebook rows as a grid (N,E,y,x)."""
        side = math.isqrt(tokens.shape[-1])
        return self.codebook(tokens).mT.unflatten(-1, (side, side))

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames (N,C,Y,X) in [0,1] -> tokens (N,K), row by row of the grid."""
        return nearest_code(self.embed(frames).flatten(2).mT, self.codebook.weight)

    def reconstruct(self, z_q: torch.Tensor) -> torch.Tensor:
        """Words (N,E,y,x) -> image (N,C,Y,X) in about [-1,1]."""
        return self.decoder(self.post_quant(z_q))

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (N,K) -> frames (N,C,Y,X) in [0,1]: all that the policy ever sees."""
        return ((at_least_float32(self.reconstruct(self.words(tokens))) + 1) / 2).clamp(0, 1)

    def loss(self, frames: torch.Tensor, perceptual=None) -> tuple[dict, dict]:
        """Frames (N,C,Y,X) in [0,1] -> losses (), metrics. `perceptual`: (recon, target) in [-1,1] -> (N,), or None.

        Eq. 3 (arXiv:1711.00937v2) with beta = 1. Sums and norms in the papers are means over all elements in the code;
        -ln p(x|z) is an L1. All weights are 1."""
        z = at_least_float32(self.embed(frames))
        tokens = nearest_code(z.flatten(2).mT, self.codebook.weight)
        z_q = self.words(tokens)
        # straight-through: the value is z_q, the gradient goes to z as if there were no codebook
        recon, target = at_least_float32(self.reconstruct(z + (z_q - z).detach())), 2 * frames - 1
        losses = dict(
            codebook=(z.detach() - z_q).square().mean(),  # moves words towards z: no moving average, no revival
            commit=(z - z_q.detach()).square().mean(),  # keeps z near its word
            image=(recon - target).abs().mean())
        if perceptual:
            losses["perceptual"] = perceptual(recon, target).mean()
        used = torch.zeros(len(self.codebook.weight), device=z.device).index_fill(0, tokens.flatten(), 1.0)
        return losses, {"wm/words_used": used.mean()}


class Block(nn.Module):
    """Pre-norm Transformer block on (B,n,W). Source: `transformer.Block`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.mlp = nn.Sequential(Linear(width, 4 * width), nn.GELU(), Linear(4 * width, width))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, start: int, cache, dropout: float) -> torch.Tensor:
        """Positions start..start+n of the sequence; those before are in `cache` (2,B,heads,positions,W/heads)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            stop = start + x.shape[1]
            cache[0, :, :, start:stop], cache[1, :, :, start:stop] = k, v
            k, v = cache[:, :, :, :stop]
        # trap: SDPA's is_causal means the first n keys, so it is right only where no cache precedes
        causal = mask is None and x.shape[1] > 1
        # trap: this dropout knows no eval mode, hence the argument
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        x = x + F.dropout(self.out(y.transpose(1, 2).flatten(2)), dropout, dropout > 0)
        return x + F.dropout(self.mlp(self.norm2(x)), dropout, dropout > 0)


class WorldModel(nn.Module):
    """GPT over blocks of K tokens and one action: p(z_{t+1}, r_t, d_t | z_{<=t}, a_{<=t}), the tokens of a frame one
    after the other. Section 2.2 (arXiv:2209.00588v2). Source: `WorldModel`, `Transformer`."""

    def __init__(self, tokens: int, action_dim: int, args: Args):
        super().__init__()
        width = args.width
        self.args, self.tokens, self.positions = args, tokens, (tokens + 1) * args.batch_length
        self.position = nn.Embedding(self.positions, width)  # learned, absolute: every sequence and dream begins at 0
        self.action, self.token = nn.Embedding(action_dim, width), nn.Embedding(args.vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, args.heads) for _ in range(args.layers))
        self.norm = nn.LayerNorm(width)
        self.token_head, self.reward_head, self.end_head = (
            nn.Sequential(Linear(width, width), nn.ReLU(), Linear(width, n)) for n in (args.vocab_size, 3, 2))
        # what predicts a token: all but the last token of a frame, whose successor, the action, nobody predicts
        self.register_buffer("rows", torch.tensor([*range(tokens - 1), tokens]), persistent=False)
        for module in self.modules():  # minGPT's initialisation, without its smaller residual layers
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, 0.0, 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def empty_cache(self, batch: int) -> torch.Tensor:
        """Keys and values of all layers, (layers,2,B,heads,positions,W/heads)."""
        weight, (block, *_) = self.position.weight, self.blocks
        shape = len(self.blocks), 2, batch, block.heads, self.positions, weight.shape[1] // block.heads
        return torch.zeros(shape, dtype=torch.bfloat16 if self.args.precision == "bf16" else weight.dtype,
                           device=weight.device)

    def forward(self, x: torch.Tensor, start: int = 0, cache=None, dropout: float = 0.0) -> torch.Tensor:
        """Embedded tokens (B,n,W) at positions start..start+n -> outputs (B,n,W).

        The position is given and never counted from the input: a single token would always be at 0."""
        count = x.shape[1]
        x = F.dropout(x + self.position.weight[start : start + count], dropout, dropout > 0)
        mask = None
        if start and count > 1:  # row i may see everything up to position start + i
            mask = torch.ones(count, start + count, dtype=torch.bool, device=x.device).tril(start)
        for i, block in enumerate(self.blocks):
            x = block(x, mask, start, None if cache is None else cache[i], dropout)
        return self.norm(x)

    def logits(self, tokens: torch.Tensor, action: torch.Tensor, dropout: float = 0.0) -> tuple:
        """Tokens (B,T,K), action (B,T) -> logits of the next tokens (B,T*K,V), of rewards (B,T,3) and ends (B,T,2)."""
        x = torch.cat([self.token(tokens), self.action(action)[:, :, None]], 2)  # (B,T,K+1,W)
        y = self(x.flatten(1, 2), dropout=dropout).unflatten(1, x.shape[1:3])
        at_action = y[:, :, -1]
        return self.token_head(y[:, :, self.rows].flatten(1, 2)), self.reward_head(at_action), self.end_head(at_action)

    def loss(self, batch: dict, mask: torch.Tensor, dropout: float) -> tuple[dict, dict]:
        """Tokens (T,B,K), action, reward, end, mask (T,B) -> losses (), metrics. Three cross-entropies, unweighted.

        The tokens of a segment's first frame are learned too, but for the first one, without anything before them.
        Steps beyond the episode's end count for nothing; they are on the right, so no other step sees them."""
        batch = {k: v.transpose(0, 1) for k, v in dict(batch, mask=mask).items()}
        logits = self.logits(batch["tokens"], batch["action"], dropout)
        labels = (batch["tokens"].flatten(1)[:, 1:],  # token 0 of frame 0 is never predicted, and the last
                  (batch["reward"].sign() + 1).long(),  # output has no successor; -1, 0, 1 are classes 0, 1, 2
                  batch["end"].long())
        masks = batch["mask"].repeat_interleave(self.tokens, 1)[:, 1:], batch["mask"], batch["mask"]
        logits = at_least_float32(logits[0][:, :-1]), at_least_float32(logits[1]), at_least_float32(logits[2])
        errors = [F.cross_entropy(x.mT, y, reduction="none") for x, y in zip(logits, labels)]
        errors[1] = errors[1] + 0 * batch["reward"]  # the sign of NaN is 0: do not let it go unnoticed
        losses = {k: masked_mean(*pair) for k, pair in zip(("token", "reward", "end"), zip(errors, masks))}
        # where the losses come from, as the means hide what matters: tokens that change, rewards, ends
        token, reward, end = (error.detach() for error in errors)
        token = token[:, self.tokens - 1 :]  # from the second frame's first token
        changed = (batch["tokens"][:, 1:] != batch["tokens"][:, :-1]).flatten(1) & masks[0][:, self.tokens - 1 :]
        return losses, {"wm/token_loss_changed": masked_mean(token, changed),
                        "wm/reward_loss_nonzero": masked_mean(reward, batch["mask"] & (labels[1] != 1)),
                        "wm/end_loss_end": masked_mean(end, batch["mask"] & (labels[2] == 1))}


class Dream:
    """The world model as an environment: B dreams in step, each begun from the tokens (B,K) of one real frame.
    Source: `WorldModelEnv`.

    A frame's last token predicts nothing, so it waits and goes through the Transformer with the next action: a step is
    one pass of two tokens (the first one of all K + 1) and K - 1 passes of one. Keys and values of a step are kept."""

    def __init__(self, world: WorldModel, tokens: torch.Tensor):
        self.world, self.tokens, self.waiting = world, tokens, tokens
        self.cache, self.written = world.empty_cache(len(tokens)), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Append embedded tokens (B,n,W) -> the last output (B,W)."""
        y = self.world(x, self.written, self.cache)
        self.written += x.shape[1]
        return y[:, -1]

    def step(self, action: torch.Tensor, noise: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Action (B,), noise {token (K,B,V), reward (B,3), end (B,2)} -> reward, end (B,), both drawn, not expected
        (official); the next frame is in `tokens`.

        When the context is full, memory is cut down to the present frame (official), at position 0 again. That never
        happens within H = T frames: K + (H-1)(K+1) + 1 = T(K+1)."""
        world = self.world
        if self.written + self.waiting.shape[1] + 1 + world.tokens > world.positions:
            self.written, self.waiting = 0, self.tokens
        y = self.forward(torch.cat([world.token(self.waiting), world.action(action)[:, None]], 1))
        reward, end = sample(world.reward_head(y), noise["reward"]) - 1, sample(world.end_head(y), noise["end"])
        tokens = []
        for k in range(world.tokens):
            # the output at the action predicts the next frame's token 0, that at token k its token k + 1
            y = self.forward(world.token(tokens[-1])) if k else y
            tokens.append(sample(world.token_head(y), noise["token"][k])[:, None])
        self.tokens, self.waiting = torch.cat(tokens, 1), tokens[-1]
        return reward, end


# ======== 8. behaviour ========

class Behaviour(nn.Module):
    """Actor and critic: one CNN and LSTM with two heads, on reconstructions only, trained in dreams. Section 2.3."""

    def __init__(self, shape: tuple, action_dim: int, args: Args):
        super().__init__()
        height, width, channels = shape
        widths = [channels, 32, 32, 64, 64]
        self.args, self.action_dim = args, action_dim
        self.convs = nn.ModuleList(conv(i, o) for i, o in zip(widths[:-1], widths[1:]))
        self.lstm = nn.LSTMCell(height // 16 * (width // 16) * widths[-1], args.lstm_units)
        self.actor, self.critic = nn.Linear(args.lstm_units, action_dim), nn.Linear(args.lstm_units, 1)
        self.to(memory_format=torch.channels_last)  # pooling is faster: up to 17 % less time per update on a CPU

    def initial(self, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden and cell state (B,units) before anything was seen."""
        return torch.zeros(2, batch, self.lstm.hidden_size, dtype=self.actor.weight.dtype, device=device).unbind()

    def forward(self, frames: torch.Tensor, state: tuple, mask: torch.Tensor | None = None) -> tuple:
        """Frames (T,B,C,Y,X) in [0,1], state (B,units) twice -> logits (T,B,A), value (T,B), state.

        Where `mask` (T,B) is false the state is zero afterwards: padding comes before an episode."""
        x = (2 * frames.flatten(0, 1) - 1).to(self.actor.weight.dtype)
        for layer in self.convs:  # not the recurrent part: all frames at once
            x = F.relu(F.max_pool2d(layer(x), 2))
        outs = []
        for t, features in enumerate(x.flatten(1).unflatten(0, frames.shape[:2]).unbind()):
            state = self.lstm(features, state)
            state = state if mask is None else tuple(s * mask[t, :, None] for s in state)
            outs.append(state[0])
        y = torch.stack(outs)
        return at_least_float32(self.actor(y)), at_least_float32(self.critic(y))[..., 0], state

    def noise(self, tokens: int, batch: int, device: torch.device) -> dict:
        """All random numbers of one batch of dreams, Exp(1), drawn at once."""
        steps = self.args.imag_horizon - 1
        shapes = dict(action=(steps + 1, batch, self.action_dim), token=(steps, tokens, batch, self.args.vocab_size),
                      reward=(steps, batch, 3), end=(steps, batch, 2))
        return {k: torch.empty(shape, device=device).exponential_() for k, shape in shapes.items()}

    @torch.no_grad()  # REINFORCE needs no gradient through the dream; the policy is evaluated again for its own
    def imagine(self, tokenizer: Tokenizer, world: WorldModel, recon, mask, tokens, noise: dict) -> dict:
        """Reconstructions (burn_in+1,B,C,Y,X) of real frames, mask (burn_in+1,B), tokens (B,K) of the last of them ->
        frames (H,B,C,Y,X), action (H,B), reward, end (H-1,B), and the policy's state at the start, hidden, cell
        (B,units).

        The LSTM is warmed up on the real frames but the last, which is where the dream begins: the Transformer sees
        nothing before it. Sampled ends change nothing here (official); the return takes them into account."""
        start, frames = self.initial(len(tokens), tokens.device), recon[-1]
        if len(recon) > 1:
            _, _, start = self(recon[:-1], start, mask[:-1])
        state, dream, out = start, Dream(world, tokens), dict(frames=[], action=[], reward=[], end=[])
        for t, action_noise in enumerate(noise["action"]):
            logits, _, state = self(frames[None], state)
            action = sample(logits[0], action_noise)
            out["frames"].append(frames), out["action"].append(action)
            if t < len(noise["reward"]):  # the last frame is only valued
                reward, end = dream.step(action, {k: noise[k][t] for k in ("token", "reward", "end")})
                out["reward"].append(reward), out["end"].append(end)
                frames = tokenizer.decode(dream.tokens)
        return dict({k: torch.stack(v) for k, v in out.items()}, hidden=start[0], cell=start[1])

    def loss(self, dream: dict) -> tuple[dict, dict]:
        """What `imagine` returned -> losses (), metrics. Section 2.3, App. B. Gradients go back through the LSTM to the
        dream's start.

        The value is baseline, bootstrap and what is learned: no target network, no normalisation of advantages."""
        action, reward, end = (dream[k] for k in ("action", "reward", "end"))
        logits, value, _ = self(dream["frames"], (dream["hidden"], dream["cell"]))  # (H,B,A), (H,B)
        ret = lambda_return(reward, value.detach(), end, self.args.gamma, self.args.lam)  # a constant for all losses
        log_probs = logits[:-1].log_softmax(-1)
        taken = log_probs.gather(-1, action[:-1, :, None])[..., 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        losses = dict(policy=-(taken * (ret - value[:-1].detach())).mean(),  # the baseline is not trained by the actor
                      value=(value[:-1] - ret).square().mean(),
                      entropy=-self.args.ent_coef * entropy.mean())
        metrics = {"ac/entropy": entropy.mean(), "ac/return": ret.mean(), "ac/value": value.mean(),
                   "ac/imag_reward": reward.float().mean(), "ac/imag_end": end.float().mean()}
        return losses, {k: v.detach() for k, v in metrics.items()}


# ======== 9. update ========

# ==== shared: distributed ====
def start_ranks(device: str) -> tuple[int, int, int]:
    """(rank, local rank, world size); under torchrun starts the process group, nccl on CUDA and gloo elsewhere."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        dist.init_process_group("nccl" if cuda else "gloo")
    return int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0)), world_size


def gather_ranks(x: torch.Tensor) -> torch.Tensor:
    """(n,) of every rank -> (world_size*n,), for statistics of the joint batch and what all ranks must agree on."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def average_ranks(tensors: list[torch.Tensor]) -> None:
    """Mean over ranks in place, as one flat message: with equal shards, the gradient of the joint batch."""
    if dist.is_initialized():
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, part in zip(tensors, (flat / dist.get_world_size()).split([t.numel() for t in tensors])):
            t.copy_(part.view_as(t))


def sum_ranks(values: list, device: torch.device) -> list[int]:
    """Sums over ranks, of whole numbers that all ranks must agree on."""
    return gather_ranks(torch.tensor(values, device=device)).view(-1, len(values)).sum(0).tolist()
# ==== end shared ====


PARTS = ("tokenizer", "world", "behaviour")  # in the order of an epoch


class Optimizers:
    """One Adam for each part; AdamW for the Transformer, whose matrices decay, but not its embeddings, norms, biases.
    Source: `configure_optimizer`."""

    def __init__(self, agent: Agent, args: Args):
        self.clip = args.grad_clip
        world = list(agent.world.parameters())
        matrices = [m.weight for m in agent.world.modules() if isinstance(m, nn.Linear)]
        kept = [p for p in world if all(p is not m for m in matrices)]
        fused = dict(lr=args.lr, fused=world[0].device.type in ("cpu", "cuda"))  # in one kernel, no host reads
        self.parts = dict(
            tokenizer=torch.optim.Adam(agent.tokenizer.parameters(), **fused),
            world=torch.optim.AdamW([dict(params=matrices), dict(params=kept, weight_decay=0.0)],
                                    weight_decay=args.weight_decay, **fused),
            behaviour=torch.optim.Adam(agent.behaviour.parameters(), **fused))

    def step(self, part: str, loss: torch.Tensor) -> torch.Tensor:
        """One update of that part -> gradient norm before clipping."""
        optimizer = self.parts[part]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        loss.backward()
        average_ranks([p.grad for p in params])
        norm = nn.utils.clip_grad_norm_(params, self.clip)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def state_dict(self) -> dict:
        return {k: v.state_dict() for k, v in self.parts.items()}

    def load_state_dict(self, state: dict) -> None:
        for k, v in self.parts.items():  # moments; rates and groups are those of this run's flags
            v.load_state_dict(dict(state=state[k]["state"], param_groups=v.state_dict()["param_groups"]))


class Recorded:
    """`function(dict of tensors)` of fixed shapes as a CUDA graph: recorded at the first call, then replayed.

    A dream is some 40,000 small kernels, which take longer to launch than to run. Weights change in place, so that the
    graph sees them. What is returned is overwritten by the next call."""

    def __init__(self, function):
        self.function, self.graph = function, None

    def record(self, inputs: dict) -> None:
        self.inputs = {k: v.clone() for k, v in inputs.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once without recording: libraries set themselves up
            self.function(self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self.function(self.inputs)

    def __call__(self, inputs: dict) -> dict:
        if self.graph is None:
            try:
                self.record(inputs)
            except RuntimeError as error:
                self.graph = False
                print(f"no CUDA graph of a dream, it runs eagerly: {str(error).splitlines()[0]}")
        if not self.graph:
            return self.function(inputs)
        for k, v in inputs.items():
            self.inputs[k].copy_(v)
        self.graph.replay()
        return self.outputs


class Agent(nn.Module):
    """Tokenizer, world model and behaviour: the policy for the environment, and the losses of an update."""

    def __init__(self, shapes: dict, action_dim: int, discrete: bool, args: Args):
        super().__init__()
        assert discrete, "section 4 lets no other environment through"
        height, width, channels = shapes["image"]
        self.args = args
        self.tokenizer = Tokenizer(channels, args)
        self.world = WorldModel(height // 16 * (width // 16), action_dim, args)
        self.behaviour = Behaviour(shapes["image"], action_dim, args)
        self.dream = self.imagine

    def initial(self, num_envs: int, device: torch.device) -> dict:
        """Policy state before the first observation."""
        hidden, cell = self.behaviour.initial(num_envs, device)
        return dict(hidden=hidden, cell=cell, action=torch.zeros(num_envs, self.behaviour.action_dim, device=device))

    @torch.no_grad()
    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Images (N,Y,X,C) uint8, on any device -> tokens (N,K)."""
        device = self.world.rows.device
        with autocast(self.args, device):
            return self.tokenizer.encode(to_frames(image.to(device)))

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (N,K), on any device -> frames (N,C,Y,X) in [0,1], as in a dream."""
        device = self.world.rows.device
        with autocast(self.args, device):
            return self.tokenizer.decode(tokens.to(device))

    @torch.no_grad()
    def act(self, row: dict, state: dict) -> dict:
        """Row (N,...) and state -> new {hidden, cell, action (N,A) one-hot}; the LSTM is zeroed at is_first. Always
        sampled; the temperature is another one, and no action random, in evaluation (`agent.eval()`; official)."""
        device, args = state["hidden"].device, self.args
        image, first = (torch.as_tensor(row[k], device=device) for k in ("image", "is_first"))
        hidden, cell = (state[k] * ~first[:, None] for k in ("hidden", "cell"))
        with autocast(args, device):
            logits, _, (hidden, cell) = self.behaviour(self.decode(self.encode(image))[None], (hidden, cell))
        logits = logits[0] / (args.temperature if self.training else args.eval_temperature)
        index = sample(logits, torch.empty_like(logits).exponential_())
        if self.training:  # one draw for all environments
            explore = torch.rand((), device=device) < args.epsilon
            index = torch.where(explore, torch.randint_like(index, logits.shape[-1]), index)
        return dict(hidden=hidden, cell=cell, action=F.one_hot(index, logits.shape[-1]).float())

    @torch.no_grad()
    def warm_up(self, replay: SegmentReplay, device: torch.device) -> dict:
        """Policy state after the last `burn_in` frames of the running episodes, as tokenizer and policy are now."""
        state = self.initial(replay.num_envs, device)
        if not self.args.burn_in:
            return state
        image, mask = replay.recent(self.args.burn_in)
        frames = torch.stack([self.decode(self.encode(x)) for x in image])
        with autocast(self.args, device):
            _, _, (hidden, cell) = self.behaviour(frames, (state["hidden"], state["cell"]), mask.to(device))
        return dict(state, hidden=hidden, cell=cell)

    def imagine(self, inputs: dict) -> dict:
        """What `Behaviour.imagine` takes as one dict of tensors -> a batch of dreams."""
        with autocast(self.args, inputs["tokens"].device):
            return self.behaviour.imagine(self.tokenizer, self.world, *(inputs[k] for k in ("recon", "mask", "tokens")),
                                          inputs)

    def compile_regions(self) -> None:
        """Compile what is large, with its gradient; record what is many small steps."""
        self.tokenizer.loss = torch.compile(self.tokenizer.loss, dynamic=False)
        self.world.logits = torch.compile(self.world.logits, dynamic=False)
        self.dream = Recorded(self.imagine) if self.world.rows.is_cuda else self.imagine


def train_step(part: str, agent: Agent, optimizers: Optimizers, replay: SegmentReplay, batch_size: int,
               perceptual=None) -> dict:
    """One update of one part: sample, loss, backward, optimiser. No host reads; -> metrics ()."""
    args, device = agent.args, agent.world.rows.device
    length, names, last = dict(
        tokenizer=(1, "image", False), world=(args.batch_length, "tokens action reward end", False),
        behaviour=(args.burn_in + 1, "recon tokens", True))[part]
    batch, mask = replay.sample(batch_size, length, names, last)
    batch, mask = {k: v.to(device, non_blocking=True) for k, v in batch.items()}, mask.to(device, non_blocking=True)
    if part == "behaviour":
        noise = agent.behaviour.noise(agent.world.tokens, batch_size, device)
        dream = agent.dream(dict(noise, recon=batch["recon"], mask=mask, tokens=batch["tokens"][-1]))
    with autocast(args, device):
        if part == "tokenizer":
            losses, metrics = agent.tokenizer.loss(to_frames(batch["image"][0]), perceptual)
        elif part == "world":
            losses, metrics = agent.world.loss(dict(batch, action=batch["action"].long()), mask, args.dropout)
        else:
            losses, metrics = agent.behaviour.loss(dream)
    norm = optimizers.step(part, sum(losses.values()))
    return {**metrics, **{f"losses/{k}": v.detach() for k, v in losses.items()}, f"grad/{part}": norm}


# ======== 10. evaluate and dream ========

# ==== shared: evaluation ====
class Episodes:
    """Return and length of the running episode of each environment; the resetting row counts for neither."""

    def __init__(self, num_envs: int):
        self.ret, self.length, self.last = np.zeros(num_envs), np.zeros(num_envs, int), math.nan

    def update(self, row: dict) -> list[tuple[int, float, int]]:
        """Take one row (N,...); -> (environment, return, length) of each episode that ended with it."""
        self.ret = np.where(row["is_first"], 0, self.ret + row["reward"])
        self.length = np.where(row["is_first"], 0, self.length + 1)
        ended = [(int(i), float(self.ret[i]), int(self.length[i])) for i in np.flatnonzero(row["is_last"])]
        self.last = ended[-1][1] if ended else self.last
        return ended


ATARI_100K = dict(  # random and human score of the 26 games
    Alien=(227.8, 7127.7), Amidar=(5.8, 1719.5), Assault=(222.4, 742.0), Asterix=(210.0, 8503.3),
    BankHeist=(14.2, 753.1), BattleZone=(2360.0, 37187.5), Boxing=(0.1, 12.1), Breakout=(1.7, 30.5),
    ChopperCommand=(811.0, 7387.8), CrazyClimber=(10780.5, 35829.4), DemonAttack=(152.1, 1971.0), Freeway=(0.0, 29.6),
    Frostbite=(65.2, 4334.7), Gopher=(257.6, 2412.5), Hero=(1027.0, 30826.4), Jamesbond=(29.0, 302.8),
    Kangaroo=(52.0, 3035.0), Krull=(1598.0, 2665.5), KungFuMaster=(258.5, 22736.3), MsPacman=(307.3, 6951.6),
    Pong=(-20.7, 14.6), PrivateEye=(24.9, 69571.3), Qbert=(163.9, 13455.0), RoadRunner=(11.5, 7845.0),
    Seaquest=(68.4, 42054.7), UpNDown=(533.4, 11693.2))


def human_normalised(env_id: str, score: float) -> dict[str, float]:
    """0 is random play, 1 a human; empty for other environments than the 26 games."""
    low, high = ATARI_100K.get(env_id.removeprefix("ALE/").removesuffix("-v5"), (0, 0))
    return {"eval/human_normalised": (score - low) / (high - low)} if high else {}


def evaluate(agent, args, device: torch.device, step: int) -> tuple[dict[str, float], list]:
    """`eval_episodes` whole episodes in fresh environments -> metrics, and the first one's frames if it has images.

    Every environment plays the same number of episodes, so short ones are not favoured."""
    num_envs = min(args.eval_episodes, 16)
    quota, envs = -(-args.eval_episodes // num_envs), make_envs(args, num_envs, args.seed + 10_000)
    episodes, state, row = Episodes(num_envs), agent.initial(num_envs, device), envs.reset()
    done, frames = [[] for _ in range(num_envs)], []
    agent.eval()  # an agent that is greedy in evaluation looks at this
    while min(map(len, done)) < quota:
        if "image" in row and not done[0] and len(frames) < 3000:
            frames.append(to_rgb(row["image"][0]))
        for env, ret, length in episodes.update(row):
            done[env].append((ret, length))
        state = agent.act(row, state)
        row = envs.step(state["action"].cpu().numpy())
    agent.train()
    returns, lengths = zip(*[episode for env in done for episode in env[:quota]])
    score = float(np.mean(returns))
    metrics = {"eval/episodic_return": score, "eval/return_std": float(np.std(returns)),
               "eval/episodic_length": float(np.mean(lengths)), **human_normalised(args.env_id, score)}
    print(f"evaluation at step {step}, {len(returns)} episodes: "
          + ", ".join(f"{k.removeprefix('eval/')} {v:.3g}" for k, v in metrics.items()))
    return metrics, frames


def to_rgb(image: np.ndarray) -> np.ndarray:
    """(Y,X,C) uint8 with any C -> (Y,X,3): gray is repeated, of stacked images the first is shown."""
    return image[..., :3] if image.shape[-1] >= 3 else image[..., :1].repeat(3, -1)


def dream_video(truth: torch.Tensor, model: torch.Tensor, context: int, **numbers: torch.Tensor) -> tuple:
    """Image errors, and GIF frames with rows truth, model, error (T,B,Y,X,C) in [0,1] and the `numbers` (T,B) below."""
    error = (model - truth).square().flatten(2).sum(-1)
    metrics = {"dream/image_error_posterior": error[:context].mean().item(),
               "dream/image_error_imagined": error[context:].mean().item()}
    rows = [(x * 255).byte().cpu().numpy() for x in (truth, model, (model - truth + 1) / 2)]
    frames = []
    for t in range(len(truth)):
        grid = np.concatenate([np.concatenate([to_rgb(image) for image in row[t]], 1) for row in rows], 0)
        grid = grid.repeat(2, 0).repeat(2, 1)
        frame = Image.fromarray(np.pad(grid, ((0, 14), (0, 0), (0, 0))))
        for b in range(truth.shape[1]):
            words = ["imag" if t >= context else "post", *(f"{k[0]}{v[t, b]:.2f}" for k, v in numbers.items())]
            place = 2 + b * grid.shape[1] // truth.shape[1], grid.shape[0]
            ImageDraw.Draw(frame).text(place, " ".join(words), fill="white")
        frames.append(np.asarray(frame))
    return metrics, frames


def log_results(metrics: dict, frames: list, tag: str, writer: SummaryWriter, step: int) -> None:
    """Scalars, and RGB frames (Y,X,3) uint8 as a GIF file that is also an image summary (TensorBoard plays it)."""
    for name, value in metrics.items():
        writer.add_scalar(name, value, step)
    if frames:
        images = [Image.fromarray(f).quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE) for f in frames]
        buffer = io.BytesIO()
        images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=66, loop=0)
        path = Path(writer.log_dir, "videos", f"{tag.split('/')[0]}_{step}.gif")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(buffer.getvalue())
        height, width, _ = frames[0].shape
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())
        writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
# ==== end shared ====


@torch.no_grad()
def open_loop_video(agent: Agent, replay: SegmentReplay, args: Args, count: int = 4, context: int = 5) -> tuple:
    """Image errors, and GIF frames with rows truth, model, error for `count` replayed sequences: `context` frames are
    reconstructions, the rest is a dream from the last of these with the recorded actions; below them the drawn reward
    and end of the action that led to the frame."""
    context, device = min(context, args.batch_length // 2), agent.world.rows.device
    batch, mask = replay.sample(16 * count, args.batch_length, "image action")
    longest = mask.sum(0).argsort(descending=True)[:count]  # episodes may be short: black where there is no more
    image, action, mask = (x[:, longest].to(device) for x in (batch["image"], batch["action"].long(), mask))
    with autocast(args, device):
        tokens = [agent.tokenizer.encode(to_frames(x)) for x in image[:context]]
        dream, numbers = Dream(agent.world, tokens[-1]), [(torch.zeros(2, count, device=device))] * context
        for step in action[context - 1 : -1]:
            shapes = dict(token=(agent.world.tokens, count, args.vocab_size), reward=(count, 3), end=(count, 2))
            noise = {k: torch.empty(shape, device=device).exponential_() for k, shape in shapes.items()}
            numbers.append(torch.stack(dream.step(step, noise)).float())
            tokens.append(dream.tokens)
        model = torch.stack([agent.tokenizer.decode(x) for x in tokens]).movedim(2, -1)
    reward, end = torch.stack(numbers, 1)
    return dream_video(image / 255, model * mask[..., None, None, None], context, reward=reward, end=end)


# ======== 11. checkpoint and logging ========

# ==== shared: checkpoint ====
def save_checkpoint(run: Path, args, agent, optimizer, replay, device: torch.device, **counters) -> None:
    """checkpoint.pt with everything a resumed run needs: written, fsynced, then put in place of the old one, which
    stays as checkpoint_prev.pt. A kill or a full disk always leaves a loadable file."""
    rng = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    buffer = io.BytesIO()  # torch.save into a file on a full disk raises its own errors, write an OSError
    torch.save(dict(algorithm=Path(__file__).stem, args=asdict(args), agent=agent.state_dict(), rng=rng,
                    optimizer=optimizer.state_dict(), replay=replay.state_dict(), **counters), buffer)
    path, part = run / "checkpoint.pt", run / "checkpoint.tmp"
    with open(part, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        shutil.copy(path, run / "checkpoint_prev.pt")
    os.replace(part, path)


def load_checkpoint(path: Path) -> dict:
    """A checkpoint file or the one in a run directory, plain data. Damaged, foreign: one line, exit status 2."""
    file = path / "checkpoint.pt" if path.is_dir() else path
    if not file.exists():
        fail(f"no checkpoint at {file}")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        algorithm, flags = saved["algorithm"], saved["args"].keys()
    except Exception as error:  # damaged pickles raise anything
        fail(f"{file} is damaged ({type(error).__name__}); checkpoint_prev.pt beside it is the one before")
    if algorithm != Path(__file__).stem or flags != {f.name for f in fields(Args)}:
        fail(f"{file} was made by {algorithm}.py, or by another version of this script")
    return saved


def load_agent(saved: dict, agent) -> None:
    """The networks of a checkpoint; if they are others than these: one line, exit status 2."""
    try:
        agent.load_state_dict(saved["agent"])
    except RuntimeError as error:
        fail(f"the run has other networks than these flags make ({' '.join(str(error).split())[:200]})")


def restore(saved: dict, optimizer, replay, device: torch.device, rank: int) -> None:
    """Continue where `save_checkpoint` was called; ranks but the first go on with fresh random numbers."""
    optimizer.load_state_dict(saved["optimizer"])
    replay.load_state_dict(saved["replay"])
    if rank == 0:
        torch.set_rng_state(saved["rng"][0])
        if device.type == "cuda" and len(saved["rng"]) > 1:
            torch.cuda.set_rng_state(saved["rng"][1], device)


def run_name(args) -> str:
    return f"{re.sub('[/:]', '_', args.env_id)}__{args.exp_name}__{args.seed}__"


def find_run(args) -> Path | None:
    """What --checkpoint or --resume names; with `auto` the newest checkpoint of this run name; None for a new run."""
    name = args.checkpoint if args.eval_only else args.resume
    if name == "auto":
        found = Path(args.run_dir).glob(f"{run_name(args)}*/checkpoint.pt")
        return max(found, key=lambda path: path.stat().st_mtime, default=None)
    return Path(name) if name else None


def run_folder(args, device: torch.device) -> Path:
    """The directory of the run that is resumed or evaluated, or a new one, the same on all ranks."""
    stamp = gather_ranks(torch.tensor([time.time_ns() // 1_000_000], device=device))[0]
    run = find_run(args) or Path(args.run_dir) / f"{run_name(args)}{stamp}"
    return run.parent if run.is_file() else run


def start_log(args, run: Path, step: int | None) -> SummaryWriter:
    """Arguments, a copy of the script, versions; TensorBoard, without the points after `step` that a kill left."""
    flags = json.dumps(asdict(args), indent=1)
    (run / "args.json").write_text(flags)
    (run / Path(__file__).name).write_bytes(Path(__file__).read_bytes())
    (run / "versions.txt").write_text("".join(sorted(f"{d.name}=={d.version}\n" for d in distributions())))
    writer = SummaryWriter(str(run), purge_step=None if step is None else step + 1)
    writer.add_text("hyperparameters", f"```\n{flags}\n```")
    return writer


def check_finite(metrics: dict, step: int, run: Path) -> dict[str, float]:
    """Metrics as floats, in one transfer to the host. A loss that is not finite stops the run before it is saved."""
    values = dict(zip(metrics, torch.stack([m.float() for m in metrics.values()]).tolist())) if metrics else {}
    for name, value in values.items():
        if name.startswith(("losses/", "grad/")) and not math.isfinite(value):
            fail(f"{name} is {value} at step {step}; stopped, the last good checkpoint stays in {run}")
    return values


def stop_signals() -> list[int]:
    """A list in which SIGINT, SIGTERM and SIGUSR1 (Slurm) appear: save and exit 0. A second Ctrl-C kills."""
    received = []

    def receive(number, frame) -> None:
        received.append(number)
        if number == signal.SIGINT:  # trap: torchrun passes on a SIGTERM that its processes also got themselves
            signal.signal(number, signal.SIG_DFL)

    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), receive)
    return received
# ==== end shared ====


# ======== 12. main ========

# ==== shared: command line ====
def parse_args(argv: list[str] | None = None) -> Args:
    """Flags, over the arguments of the run that is resumed or evaluated, or over the preset. Bad ones: status 2."""
    argv = [re.sub(r"(?<![^=])\d+[eE]\d\d?$", lambda number: f"{float(number[0]):.0f}", word)  # tyro's int refuses 1e6
            for word in (sys.argv[1:] if argv is None else argv)]
    first = tyro.cli(Args, args=argv)
    path = find_run(first)
    default = Args(**load_checkpoint(path)["args"]) if path else replace(Args(), **PRESETS[first.preset])
    args = replace(tyro.cli(Args, args=argv, default=default), resume="" if first.eval_only else str(path or ""))
    if args.eval_only and not (path and args.eval_episodes):
        fail("--eval-only needs --checkpoint PATH and --eval-episodes")
    return validate(args)


def check_numbers(args, may_be_zero: str) -> None:
    """Counts are positive except those named, all other numbers finite and not negative."""
    for f in fields(args):
        value, positive = getattr(args, f.name), "int" in f.type and f.name not in may_be_zero.split()
        if type(value) in (int, float) and not (math.isfinite(value) and value >= positive):  # not bool
            fail(f"--{f.name.replace('_', '-')} must be {'positive' if positive else 'zero or more'}, got {value}")


def resolve(args, device: torch.device, **auto):
    """Replace `auto` by what it stands for here, so that checkpoints and logs hold plain values."""
    auto |= dict(compile="on" if device.type == "cuda" else "off")
    values = {k: v for k, v in auto.items() if getattr(args, k) == "auto"}
    return replace(args, action_repeat=args.action_repeat or (4 if args.env_id.startswith("ALE/") else 1), **values)
# ==== end shared ====


def validate(args: Args) -> Args:
    """The arguments, if each makes sense and they fit together; else one line and exit status 2."""
    check_numbers(args, "seed eval_every video_every eval_episodes extra_epochs learning_starts world_starts "
                        "behaviour_starts burn_in")
    if args.image_size % 16:
        fail(f"--image-size must be a multiple of 16 (four halvings), got {args.image_size}")
    if args.channels % 2 or args.width % args.heads:
        fail("--channels must be even, and --width a multiple of --heads")
    if min(args.batch_length, args.imag_horizon) < 2:
        fail("--batch-length and --imag-horizon must be at least 2: a frame and the one that follows")
    if max(args.gamma, args.lam, args.epsilon, args.sticky_actions) > 1 or args.dropout >= 1:
        fail("--gamma, --lam, --epsilon and --sticky-actions are at most 1, --dropout is less")
    if not (args.temperature and args.eval_temperature and args.grad_clip):
        fail("--temperature, --eval-temperature and --grad-clip must be positive")
    if args.buffer_size // args.num_envs <= args.batch_length:
        need = (args.batch_length + 1) * args.num_envs
        fail(f"--batch-length {args.batch_length} needs {need} rows of --buffer-size")
    return args


def choose_perceptual(args: Args, channels: int, device: torch.device) -> tuple[Args, LPIPS | None]:
    """What --perceptual-loss stands for here -> arguments that say so, and the loss."""
    if args.perceptual_loss in ("auto", "lpips"):
        lpips = LPIPS(0.5 if args.lpips_dropout else 0.0)
        problem = lpips.load(args.lpips_weights) if channels == 3 else f"images have {channels} channels, not 3"
        if not problem:
            return replace(args, perceptual_loss="lpips"), lpips.to(device)
        if args.perceptual_loss == "lpips" or args.lpips_weights:
            fail(f"--perceptual-loss lpips: {problem}; see --lpips-weights, or use --perceptual-loss pixel")
        print(f"perceptual loss: {problem}; using --perceptual-loss pixel instead (see --lpips-weights)")
        args = replace(args, perceptual_loss="pixel")
    return args, pixel_distance if args.perceptual_loss == "pixel" else None


def replay_specs(shapes: dict, agent: Agent, args: Args) -> dict:
    """Fields of a replay row: name -> (shape, dtype)."""
    return dict(image=(shapes["image"], torch.uint8), action=((), torch.int16), reward=((), torch.float32),
                end=((), torch.bool), frame=((), torch.bool))


def main(args: Args) -> None:
    # ---- set-up: processes, device, environments, networks ----
    rank, local_rank, world_size = start_ranks(args.device)
    device = pick_device(args.device, local_rank)
    args = resolve(args, device, precision="fp32")
    if any(n % world_size for n in (args.num_envs, args.batch_size, args.tokenizer_batch)):
        fail(f"--num-envs {args.num_envs}, --batch-size {args.batch_size} and --tokenizer-batch {args.tokenizer_batch} "
             f"must be multiples of {world_size} ranks")
    num_envs = args.num_envs // world_size
    envs = make_envs(args, num_envs, args.seed + rank * num_envs)
    whole_games = replace(args, life_loss=False)
    torch.manual_seed(args.seed)  # the same weights on every rank
    agent = Agent(envs.shapes, envs.action_dim, envs.discrete, args).to(device)
    run, saved = run_folder(args, device), load_checkpoint(find_run(args)) if find_run(args) else None
    if saved:
        load_agent(saved, agent)
    if args.eval_only:
        with SummaryWriter(str(run)) as writer:
            log_results(*evaluate(agent, whole_games, device, saved["step"]), "play/episode", writer, saved["step"])
        return
    args, perceptual = choose_perceptual(args, envs.shapes["image"][-1], device)
    if args.compile == "on":
        agent.compile_regions()
    optimizers = Optimizers(agent, args)

    # ---- the state of a run: everything that a checkpoint holds ----
    # an episode of n decisions takes n + 1 rows where several environments go on without it
    useful = min(args.buffer_size, (2 if num_envs > 1 else 1) * args.total_timesteps)
    rows = saved["capacity"] if saved else max(args.batch_length + 1, -(-useful // args.num_envs))
    specs = replay_specs(envs.shapes, agent, args)
    decoded = 4 * math.prod(envs.shapes["image"])  # bytes, see `SegmentReplay.reconstruct`
    place = replay_device(specs, rows * num_envs, args, device, decoded)
    run.mkdir(parents=True, exist_ok=True)
    replay = SegmentReplay(specs, rows, num_envs, place, run / f"replay{rank}", new=not saved)
    # an epoch, begun at step `begun`, collects until `goal`, then makes 3 x epoch_updates, `done` so far (-1: it has
    # not begun); `extra` epochs have only trained
    step, updates, extra, begun, goal, done, metrics = 0, 0, 0, 0, 0, -1, {}
    torch.manual_seed(args.seed + 1000 * rank + (saved["step"] if saved else 0))
    if saved:
        restore(saved, optimizers, replay, device, rank)
        step, updates, extra, begun, goal, done = (saved[k] for k in "step updates extra begun goal done".split())
        extra = extra if step >= args.total_timesteps else 0  # of a finished run that is to collect more
        metrics = {k: torch.tensor(v, device=device) for k, v in saved["metrics"].items()}
        envs.seed += step  # other episodes than the first ones again

    def now() -> int:
        """The policy step, and as if they went on in the epochs that only train."""
        return step + extra * args.epoch_steps

    def goes_on() -> bool:
        return step < args.total_timesteps or extra < args.extra_epochs or done >= 0

    if rank == 0:
        writer = start_log(args, run, now() if saved else None)
        counts = {name: sum(p.numel() for p in module.parameters()) for name, module in agent.named_children()}
        parts = ", ".join(f"{k} {v:,}" for k, v in counts.items())
        print(f"run directory: {run}\ndevice: {device}, {args.precision}, compile {args.compile}\n"
              f"parameters: {sum(counts.values()):,} ({parts})\nperceptual loss: {args.perceptual_loss}\n"
              f"gradient steps per policy step: {3 * args.epoch_updates / args.epoch_steps:g} (of which a third each: "
              f"tokenizer, world model, actor-critic)")

    # ---- the loop: epochs that step all environments, act, store; then learn ----
    stop, episodes, clock = stop_signals(), Episodes(num_envs), (time.time(), step, updates)
    bar = tqdm(total=args.total_timesteps + args.extra_epochs * args.epoch_steps, initial=now(), unit="step",
               disable=rank > 0, mininterval=1 if sys.stderr.isatty() else 10)  # steps/s, the measured time left
    row, stopping = envs.reset(), False

    def arrive(outcome: dict) -> dict:
        """Account for finished games; the row with is_first where an episode begins, also after a lost life."""
        for _, ret, steps in episodes.update(dict(outcome, is_last=envs.over)):
            if rank == 0:
                tqdm.write(f"global_step={step}, episodic_return={ret:g}")
                log_results({"charts/episodic_return": ret, "charts/episodic_length": steps}, [], "", writer, step)
        return dict(outcome, is_first=row["is_last"])

    while goes_on():
        if done < 0:
            begun, goal, done = now(), min(step + args.epoch_steps, args.total_timesteps), 0
        state = agent.warm_up(replay, device) if step < goal else None
        while step < goal and not stopping:
            state = agent.act(row, state)
            # action 0, nothing, after an end: it resets, or after a lost life lets the game go on (official)
            action = (state["action"] * torch.as_tensor(~row["is_last"], device=device)[:, None]).cpu().numpy()
            outcome = envs.step(action)
            decisions, stopping = sum_ranks([int((~row["is_last"]).sum()), bool(stop)], device)
            step += decisions
            replay.add(row, action.argmax(-1), outcome)
            row = arrive(outcome)
            while row["is_last"].all():  # nothing to decide
                row = arrive(envs.step(np.zeros_like(action)))
            bar.set_postfix(dict(ret=f"{episodes.last:.4g}", updates=updates), refresh=False)
            bar.update(now() - bar.n)

        while done < 3 * args.epoch_updates and not stopping:
            part = done // args.epoch_updates
            if step > (args.learning_starts, args.world_starts, args.behaviour_starts)[part]:
                if part == 0:
                    replay.tokens = replay.recon = None  # they were the old tokenizer's
                elif replay.tokens is None:
                    replay.tokenize(agent)
                if PARTS[part] == "behaviour" and replay.recon is None:
                    replay.reconstruct(agent)
                batch_size = (args.tokenizer_batch if part == 0 else args.batch_size) // world_size
                metrics.update(train_step(PARTS[part], agent, optimizers, replay, batch_size, perceptual))
                updates += 1
                stopping = sum_ranks([bool(stop)], device)[0]  # all ranks must agree
            done += 1
        if not stopping:
            extra, done = extra + (now() == begun), -1
            bar.update(now() - bar.n)

        def due(every: int) -> bool:
            return every > 0 and now() // every > begun // every or not goes_on()

        if due(args.save_every) or stopping:
            values = check_finite(metrics, step, run)
            replay.flush()
            sum_ranks([0], device)  # wait until every rank has flushed
            if rank == 0:
                save_checkpoint(run, args, agent, optimizers, replay, device, step=step, updates=updates, extra=extra,
                                begun=begun, goal=goal, done=done, metrics=values, capacity=rows)
        if stopping:
            if rank == 0:
                tqdm.write(f"saved at step {step}; continue with --resume {run}")
            break
        if rank == 0 and due(args.log_every) and metrics:
            seconds, steps, count = (new - old for new, old in zip((time.time(), step, updates), clock))
            clock = (time.time(), step, updates)
            scalars = {"charts/SPS": steps / max(seconds, 1e-9), "charts/UPS": count / max(seconds, 1e-9),
                       "charts/frames": step * args.action_repeat, **check_finite(metrics, step, run)}
            log_results(scalars, [], "", writer, now())
        if rank == 0:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):  # looking changes nothing
                if due(args.video_every):
                    log_results(*open_loop_video(agent, replay, args), "dream/open_loop", writer, now())
                if due(args.eval_every) and args.eval_episodes:
                    log_results(*evaluate(agent, whole_games, device, now()), "eval/episode", writer, now())
    bar.close()
    if rank == 0:
        writer.close()
        if not updates:
            print("no update was made: --learning-starts was not reached")
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(parse_args())
    except OSError as error:  # a full disk, a missing file of the replay
        fail(f"{error}; the last checkpoint is as it was")
