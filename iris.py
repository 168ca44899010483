"""IRIS in one file: learns a discrete autoencoder and a GPT of its tokens from pixels, and a policy in their dreams.

Paper    Micheli, Alonso, Fleuret, "Transformers are Sample-Efficient World Models", ICLR 2023, arXiv:2209.00588v2
Code     compared number by number with eloialonso/iris at commit 24326aa; parameter counts are equal

Run      python iris.py --env-id ALE/Pong-v5                            Atari 100k protocol: RGB, no sticky actions
         python iris.py --preset tiny --env-id ALE/Breakout-v5          every phase in two minutes on a CPU
         python iris.py --lpips-weights FOLDER                          perceptual loss with VGG16 and LPIPS weights
         python iris.py --resume auto                                   go on after Ctrl-C, SIGTERM or a crash
         python iris.py --resume runs/NAME --eval-episodes 100          a run that has ended is evaluated again
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
         - evaluations are rarer, and play one whole episode in each environment.
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
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import ale_py  # noqa: F401  registers the ALE/ ids
import gymnasium
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from gymnasium.spaces import Box, Dict, Discrete
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.tensorboard import SummaryWriter, summary
from tqdm import tqdm

# ======== 2. arguments ========
@dataclass
class Args:
    """IRIS: tokenizer, Transformer world model and actor-critic in one file. Counts accept 1_000_000 and 1e6."""

    exp_name: str = "iris"  # second part of the run directory's name
    env_id: str = "ALE/Pong-v5"  # any Gymnasium id with discrete actions, also module:Env-v0; not one image: rendered
    seed: int = 1  # seed of weights, environments and sampling
    preset: Literal["default", "tiny"] = "default"  # for flags left alone; tiny: all phases in two minutes on two cores
    total_timesteps: int = 100_000  # policy steps over all environments; x action repeat = frames (official: 100_000)
    num_envs: int = 1  # parallel environments (official: 1)
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # weights stay fp32; auto: fp32, on CUDA with TF32 (official)
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile losses, on CUDA record the dream; auto: on CUDA only
    run_dir: str = "runs"  # where run directories go
    resume: str = ""  # run directory to continue, or auto: the newest one of this environment, name and seed
    save_every: int = 2_000  # policy steps between checkpoints (official: 200)
    eval_every: int = 10_000  # policy steps between evaluations (official: 1_000); one at the end in any case
    eval_episodes: int = 16  # episodes per evaluation (official: 16, at the end 100); 0: none
    video_every: int = 10_000  # policy steps between open-loop videos; 0: one at the end
    log_every: int = 1_000  # policy steps between metric logs

    image_size: int = 64  # side of the square image, a multiple of 16: K = (side / 16)^2 tokens (official: 64)
    action_repeat: int | None = None  # environment steps per policy step; None: 4 on Atari, 1 elsewhere (official)
    sticky_actions: float = 0.0  # Atari: probability that a frame repeats the last action (official)
    life_loss: bool = True  # Atari: in training a lost life ends an episode (official); evaluations play whole games

    buffer_size: int = 200_000  # replay rows over all environments; at most what the budget at the start needs
    epoch_steps: int = 200  # policy steps per epoch, which then trains tokenizer, world model and policy (official)
    epoch_updates: int = 200  # updates of each of the three per epoch (official)
    extra_epochs: int = 100  # epochs that only train, after the last policy step (official)
    learning_starts: int = 1_000  # the tokenizer learns in epochs that end beyond this policy step (official)
    world_starts: int = 5_000  # the same for the world model (official: after 25 epochs)
    behaviour_starts: int = 10_000  # the same for the actor-critic (official: after 50 epochs)
    tokenizer_batch: int = 256  # images per tokenizer update (official)
    batch_size: int = 64  # sequences per update of the world model, dreams per update of the actor-critic, B (official)
    batch_length: int = 20  # frames per sequence, T: what the Transformer can look back on (official)

    vocab_size: int = 512  # words in the codebook, V (official)
    code_dim: int = 512  # width of a word, E (official)
    channels: int = 64  # channels of all convolutions of encoder and decoder, even (official)
    res_blocks: int = 2  # residual blocks per resolution in the encoder; one more in the decoder (official)
    perceptual_loss: Literal["auto", "lpips", "pixel", "none"] = "auto"  # auto: lpips (official) with weights, or pixel
    lpips_weights: str = ""  # .pth file or folder with VGG16 and LPIPS weights; empty: torch.hub's checkpoint folder
    lpips_dropout: bool = True  # dropout in LPIPS while the tokenizer trains (official, by accident)
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
    temperature: float = 1.0  # divides policy logits while collecting (official; less on Freeway, paper appendix)
    eval_temperature: float = 0.5  # the same in evaluation (official)
    lr: float = 1e-4  # learning rate of all three optimisers (official)
    weight_decay: float = 0.01  # AdamW's, on the matrices of the Transformer (official)
    grad_clip: float = 10.0  # gradient norm allowed per optimiser (official)


PRESETS = dict(default={}, tiny=dict(
    total_timesteps=600, epoch_steps=50, epoch_updates=8, extra_epochs=2, learning_starts=100, world_starts=200,
    behaviour_starts=300, tokenizer_batch=16, batch_size=8, batch_length=8, vocab_size=128, code_dim=64, channels=16,
    res_blocks=1, layers=2, heads=2, width=64, lstm_units=64, imag_horizon=8, burn_in=4, lr=1e-3, save_every=300,
    eval_every=0, video_every=300, log_every=50, eval_episodes=1))


# ==== shared: device and ranks ====
def fail(message: str):
    """For everything the user can mend: one clear line on stderr, exit status 2, no traceback."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own beside a progress bar
    raise SystemExit(2)


def autocast(args, device: torch.device):
    """bf16 for matrix products and convolutions where --precision says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16", cache_enabled=False)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Norms, softmaxes, losses and returns run in float32 also under bf16; float64 stays (tests)."""
    return x if x.dtype == torch.float64 else x.float()


def start_ranks(name: str) -> tuple[int, int, torch.device]:
    """(rank, world size, device) of this process for --device; torchrun's form a group: nccl on CUDA, else gloo."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name} is not usable here ({str(error).splitlines()[0]}); try --device auto")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    elif sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        # glibc: keep freed memory (no mmap, no trim); page faults on what was given back cost 2 to 17 % of an update
        ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, -1)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:  # hours: rank 0 evaluates while the others wait
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    return int(os.environ.get("RANK", 0)), world_size, device


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
            t.copy_(part.view_as(t))  # keeps the strides
# ==== end shared ====


# ======== 3. pure functions ========
def sample(logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Indices (...) from softmax(logits (...,V)): argmax(p / e) with e ~ Exp(1) is an exact draw (exponential race).
    No checks and no host reads: a default update makes 362 draws, one after the other; noise of ones gives the mode."""
    return (at_least_float32(logits).softmax(-1) / noise).argmax(-1)


def nearest_code(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index (...) of the codebook row (V,E) nearest to z (...,E): argmin_i |z - e_i|^2, the lowest of equals.
    Eq. 1 (arXiv:1711.00937v2), of VQ-VAE; |z|^2 is the same for all i and left out. In float32 also under autocast, as
    bf16 cannot tell neighbours apart; on CUDA in TF32, as in the official runs."""
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
class Envs:
    """`num_envs` copies of an environment; a row of arrays (N,...) per step. Edit here for anything unusual.
    The step after an episode's end ignores its action and returns the next episode's first observation (NEXT_STEP), so
    is_first_{t+1} = is_last_t. A time limit is an end, but not terminal. Rewards are raw.
    Observations: uint8 images, resized and stacked by channel, are `image`; other Boxes, joined, are `vector`.
    Actions: Discrete, or Box: clipped to [-1, 1], then mapped to the bounds where they are finite.
    ALE/ ids are ale-py's own vector environment, options in `atari`; with life_loss_info a lost life is terminal, but
    the game goes on. `pixels`: other ids are seen by their rendered image; None: if they do not show one image.
    `ret`, `length`: of the running episode of each environment; the resetting row counts for neither."""

    def __init__(self, args, num_envs: int, seed: int, size: int, pixels: bool | None = None, **atari):
        self.num_envs, self.seed, self.size, self.atari = num_envs, seed, size, args.env_id.startswith("ALE/")
        self.life_loss = self.atari and atari.get("life_loss_info", False)
        wrappers = [lambda env: gymnasium.wrappers.RepeatAction(env, args.action_repeat)]
        options = dict(vectorization_mode="sync", wrappers=wrappers, vector_kwargs=dict(autoreset_mode="NextStep"))
        try:
            if self.atari:
                options = dict(img_height=210, img_width=160, grayscale=False, stack_num=1, maxpool=True, noop_max=30,
                               frameskip=args.action_repeat, repeat_action_probability=args.sticky_actions,
                               use_fire_reset=False, reward_clipping=False, episodic_life=False,
                               max_num_frames_per_episode=108_000, autoreset_mode="NextStep") | atari
            elif pixels is None:
                with gymnasium.make(args.env_id) as probe:
                    pixels = len(getattr(probe.observation_space, "shape", None) or ()) != 3
            if pixels and not self.atari:
                wrappers.append(gymnasium.wrappers.AddRenderObservation)
                options["render_mode"] = "rgb_array"
                if "dm_control/" in args.env_id:  # official: small images, the camera that follows
                    options["render_kwargs"] = dict(height=size, width=size, camera_id=2 * ("quadruped" in args.env_id))
            self.envs = gymnasium.make_vec(args.env_id, num_envs, **options)
        except (gymnasium.error.Error, ImportError, AssertionError, TypeError, ValueError) as error:
            fail(f"--env-id {args.env_id}: {(str(error) or repr(error)).splitlines()[0]}")  # such as: did you mean ...
        space, self.act = self.envs.single_observation_space, self.envs.single_action_space
        if self.atari:  # as `_row` returns it
            space = Box(0, 255, (size, size, 1 if options["grayscale"] else 3), np.uint8)
        spaces = dict(space) if isinstance(space, Dict) else {"obs": space}
        boxes = [(k, s.shape, s.dtype == np.uint8) for k, s in sorted(spaces.items()) if isinstance(s, Box)]
        self.images = [k for k, shape, byte in boxes if byte and len(shape) == 3 and shape[0] > 4]  # not (C,Y,X)
        self.vectors = [k for k, shape, byte in boxes if len(shape) < (2 if byte else 3)]
        self.discrete = isinstance(self.act, Discrete)
        if len(self.images + self.vectors) < len(spaces) or not (self.discrete or isinstance(self.act, Box)):
            fail(f"{args.env_id}: {space} with actions {self.act} is not supported; uint8 (Y,X,C) images, Box vectors "
                 "and Dicts of them are, with Discrete or Box actions (wrap the environment, or edit Envs)")
        self.action_dim = int(self.act.n) if self.discrete else math.prod(self.act.shape)
        self.shapes = dict(image=(size, size, sum(spaces[k].shape[-1] for k in self.images))) if self.images else {}
        if self.vectors:
            self.shapes["vector"] = tuple(math.prod(spaces[k].shape) for k in self.vectors)  # the length of each part

    def reset(self) -> dict[str, np.ndarray]:
        self.ret = self.length = self.over = zeros = np.zeros(self.num_envs, bool)
        return self._row(self.envs.reset(seed=self.seed)[0], zeros, zeros, ~zeros)

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
        over = terminated & (info["lives"] == 0) if self.life_loss else terminated
        first, self.over = self.over, truncated | over  # then the next step resets
        return self._row(obs, reward, terminated, first)

    def _row(self, obs, reward, death, first):
        self.ret = np.where(first, 0, self.ret + reward)
        self.length = np.where(first, 0, self.length + 1)
        if self.atari:
            obs = obs[:, 0] if obs.ndim == 5 else obs[:, 0, ..., None]
        obs, row = obs if isinstance(obs, dict) else {"obs": obs}, {}
        if self.images:  # antialiased as Pillow's BILINEAR, to one gray level (official: V1, V3, IRIS)
            x = [torch.from_numpy(obs[k]).permute(0, 3, 1, 2) for k in self.images]
            x = torch.cat([F.interpolate(i, (self.size, self.size), mode="bilinear", antialias=True) for i in x], 1)
            row["image"] = x.permute(0, 2, 3, 1).numpy()
        if self.vectors:
            parts = [np.reshape(obs[k], (self.num_envs, -1)) for k in self.vectors]
            row["vector"] = np.concatenate(parts, -1, dtype=np.float32)
        return dict(row, reward=reward.astype(np.float32), is_first=first, is_last=self.over | death, is_terminal=death)
# ==== end shared ====


def make_envs(args: Args, num_envs: int, seed: int) -> Envs:
    """Any other with `reset`, `step`, `shapes`, `action_dim`, `discrete`, `ret`, `length` and `over` will do."""
    envs = Envs(args, num_envs, seed, args.image_size, life_loss_info=args.life_loss)
    if not envs.discrete:
        fail(f"{args.env_id}: IRIS needs discrete actions, not {envs.act}; dreamer_v3.py learns continuous ones")
    return envs


# ======== 5. replay ========
# ==== shared: replay storage ====
class Storage:
    """Ring of `capacity` rows for each of `num_envs` endless streams: tensors (capacity,num_envs,...) by field name.
    `specs`: name -> (shape, dtype). Each field is a memory-mapped file in `folder`, made if `new`: it takes no RAM of
    its own and survives a kill. `data`: a copy on the GPU if it fits in half of its free memory, else the files. New
    rows go to both. `beside`: bytes per row that someone else keeps on the same device.
    `rows` counts all rows ever added; the newest `size` of them are valid."""

    def __init__(self, specs, capacity: int, num_envs: int, device: torch.device, folder: Path, new=True, beside=0):
        self.capacity, self.num_envs, self.rows, self.size, self.files = capacity, num_envs, 0, 0, {}
        row, rows = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values()), capacity * num_envs
        fits = device.type == "cuda" and (row + beside) * rows <= torch.cuda.mem_get_info(device)[0] / 2
        self.device = device if fits else torch.device("cpu")
        print(f"replay: {rows:,} rows x {row:,} bytes = {row * rows / 2**30:.2f} GiB, {self.device}")
        folder.mkdir(exist_ok=True)
        # the row's number comes first: a row whose overwriting was cut off by a kill does not pass for the old one
        for name, (shape, dtype) in dict(number=((), torch.int64), **specs).items():
            path, count = folder / f"{name}.bin", rows * math.prod(shape)
            if new:
                with open(path, "wb") as file:
                    if hasattr(os, "posix_fallocate"):  # takes the disk space: an OSError now, not a crash later
                        os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
            elif path.stat().st_size != count * dtype.itemsize:
                fail(f"{path} is damaged, or of other --num-envs, --precision, sizes or number of processes")
            file = torch.from_file(str(path), shared=True, size=count, dtype=dtype)  # makes an empty file long enough
            self.files[name] = file.view(capacity, num_envs, *shape)
        self.data = {name: file.to(self.device) for name, file in self.files.items()}

    def add(self, row: dict) -> None:
        """Append one row: arrays or tensors (num_envs,...) for every field."""
        row, at = dict(row, number=self.rows), self.rows % self.capacity
        for name, file in self.files.items():
            file[at] = self.data[name][at] = torch.as_tensor(row[name])
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

    def state_dict(self) -> dict:
        return dict(rows=self.rows)

    def load_state_dict(self, state: dict) -> None:
        """Continue at a checkpoint, without old rows that were overwritten after it was made: their numbers differ."""
        vars(self).update(state)
        newest = torch.arange(self.rows - 1, max(self.rows - self.capacity, 0) - 1, -1)
        self.size = int((self.files["number"][newest % self.capacity, 0] == newest).cumprod(0).sum())
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
        self.begun = torch.zeros(self.num_envs, dtype=torch.int64)  # of the running episodes, as the field `begun`
        self.table = self.tokens = self.recon = None

    def add(self, row: dict, action: np.ndarray, outcome: dict) -> None:
        """Append what was seen, (num_envs,...), the action's index, and the row that it led to. The field `begun` tells
        episodes apart: 1 + the number of the first row, 0 for no frame: the action only resets."""
        none, end = (torch.as_tensor(x["is_last"]) for x in (row, outcome))
        begun = torch.where(self.begun > 0, self.begun, self.rows + 1) * ~none
        super().add(dict(image=row["image"], action=action, reward=outcome["reward"], end=end, begun=begun))
        self.begun = begun * ~end
        self.table = self.tokens = self.recon = None

    def refresh(self) -> None:
        """Table of the episodes, without overwritten rows: number of the first row, frames, environment."""
        oldest = self.rows - self.size
        begun = self.data["begun"][torch.arange(oldest, self.rows, device=self.device) % self.capacity]
        env = torch.arange(self.num_envs, device=self.device).expand_as(begun)
        (begun, env), frames = torch.stack([begun, env])[:, begun > 0].unique(dim=1, return_counts=True)
        self.table = torch.stack([(begun - 1).clamp(min=oldest), frames, env], 1)

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
        first = (self.begun - 1).clamp(min=self.rows - self.size).to(self.device)
        frames = (self.rows - first) * (self.begun > 0).to(self.device)
        env = torch.arange(self.num_envs, device=self.device)
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
        """Fill in the weights from a .pth file or a folder -> what is missing, empty if nothing is. Known names:
        torchvision's vgg16 (`features.N.`), LPIPS (`linK.model.1.`), both in IRIS checkpoints (`sliceS.N.`)."""
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
        weight, heads = self.position.weight, self.args.heads
        shape = len(self.blocks), 2, batch, heads, self.positions, weight.shape[1] // heads
        return torch.zeros(shape, dtype=torch.bfloat16 if self.args.precision == "bf16" else weight.dtype,
                           device=weight.device)

    def forward(self, x: torch.Tensor, start: int = 0, cache=None, dropout: float = 0.0) -> torch.Tensor:
        """Embedded tokens (B,n,W) at positions start..start+n -> outputs (B,n,W).
        The position is given and never counted from the input: a single token would always be at 0."""
        count, mask = x.shape[1], None
        x = F.dropout(x + self.position.weight[start : start + count], dropout, dropout > 0)
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
        tokens, action, reward, end, mask = (
            x.transpose(0, 1) for x in (*(batch[k] for k in ("tokens", "action", "reward", "end")), mask))
        logits = self.logits(tokens, action, dropout)
        labels = (tokens.flatten(1)[:, 1:],  # token 0 of frame 0 is never predicted, and the last output has no
                  (reward.sign() + 1).long(), end.long())  # successor; rewards -1, 0, 1 are classes 0, 1, 2
        masks = mask.repeat_interleave(self.tokens, 1)[:, 1:], mask, mask
        logits = [at_least_float32(x) for x in (logits[0][:, :-1], *logits[1:])]
        errors = [F.cross_entropy(x.mT, y, reduction="none") for x, y in zip(logits, labels)]
        errors[1] = errors[1] + 0 * reward  # the sign of NaN is 0: do not let it go unnoticed
        losses = {k: masked_mean(*pair) for k, pair in zip(("token", "reward", "end"), zip(errors, masks))}
        # where the losses come from, as the means hide what matters: tokens that change, rewards, ends
        first = self.tokens - 1  # label of the second frame's first token
        changed = (tokens[:, 1:] != tokens[:, :-1]).flatten(1) & masks[0][:, first:]
        return losses, {"wm/token_loss_changed": masked_mean(errors[0].detach()[:, first:], changed),
                        "wm/reward_loss_nonzero": masked_mean(errors[1].detach(), mask & (labels[1] != 1)),
                        "wm/end_loss_end": masked_mean(errors[2].detach(), mask & (labels[2] == 1))}


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
        self.convs = nn.ModuleList(conv(*pair) for pair in zip(widths, widths[1:]))
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
    def imagine(self, tokenizer: Tokenizer, world: WorldModel, inputs: dict) -> dict:
        """`noise` and recon (burn_in+1,B,C,Y,X) of real frames, mask (burn_in+1,B), tokens (B,K) of the last frame ->
        frames (H,B,C,Y,X), action (H,B), reward, end (H-1,B), the policy's state at the start, hidden, cell (B,units).
        The LSTM is warmed up on the real frames but the last, which is where the dream begins: the Transformer sees
        nothing before it. Sampled ends change nothing here (official); the return takes them into account."""
        recon, mask, tokens = inputs["recon"], inputs["mask"], inputs["tokens"]
        start, frames = self.initial(len(tokens), tokens.device), recon[-1]
        if len(recon) > 1:
            _, _, start = self(recon[:-1], start, mask[:-1])
        state, dream, out = start, Dream(world, tokens), dict(frames=[], action=[], reward=[], end=[])
        for t, noise in enumerate(inputs["action"]):
            logits, _, state = self(frames[None], state)
            action = sample(logits[0], noise)
            out["frames"].append(frames), out["action"].append(action)
            if t < len(inputs["reward"]):  # the last frame is only valued
                reward, end = dream.step(action, {k: inputs[k][t] for k in ("token", "reward", "end")})
                out["reward"].append(reward), out["end"].append(end)
                frames = tokenizer.decode(dream.tokens)
        return dict({k: torch.stack(v) for k, v in out.items()}, hidden=start[0], cell=start[1])

    def loss(self, dream: dict) -> tuple[dict, dict]:
        """What `imagine` returned -> losses (), metrics. Section 2.3, App. B. Gradients reach the dream's start.
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
        return losses, {"ac/entropy": entropy.mean().detach(), "ac/return": ret.mean(),
                        "ac/value": value.mean().detach(), "ac/imag_reward": reward.float().mean(),
                        "ac/imag_end": end.float().mean()}


# ======== 9. update ========
PARTS = ("tokenizer", "world", "behaviour")  # in the order of an epoch


class Optimizers:
    """One Adam for each part; AdamW for the Transformer, whose matrices decay, but not its embeddings, norms, biases.
    Source: `configure_optimizer`."""

    def __init__(self, agent: Agent, args: Args):
        self.clip = args.grad_clip
        matrices = {m.weight: None for m in agent.world.modules() if isinstance(m, nn.Linear)}  # an ordered set
        kept = [p for p in agent.world.parameters() if p not in matrices]
        fused = dict(lr=args.lr, fused=kept[0].device.type in ("cpu", "cuda"))  # in one kernel, no host reads
        self.parts = dict(
            tokenizer=torch.optim.Adam(agent.tokenizer.parameters(), **fused),
            world=torch.optim.AdamW([dict(params=list(matrices)), dict(params=kept, weight_decay=0.0)],
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
        height, width, channels = shapes["image"]
        self.args = args
        self.tokenizer = Tokenizer(channels, args)
        self.world = WorldModel(height // 16 * (width // 16), action_dim, args)
        self.behaviour = Behaviour(shapes["image"], action_dim, args)
        self.dream = partial(self.behaviour.imagine, self.tokenizer, self.world)

    def initial(self, num_envs: int, device: torch.device) -> dict:
        """Policy state before the first observation."""
        return dict(zip(("hidden", "cell"), self.behaviour.initial(num_envs, device)))

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
        if self.args.burn_in:
            image, mask = replay.recent(self.args.burn_in)
            frames = torch.stack([self.decode(self.encode(x)) for x in image])
            with autocast(self.args, device):
                _, _, memory = self.behaviour(frames, tuple(state.values()), mask.to(device))
            state = dict(zip(state, memory))
        return state

    def compile_regions(self) -> None:
        """Compile what is large, with its gradient; record what is many small steps."""
        self.tokenizer.loss = torch.compile(self.tokenizer.loss, dynamic=False)
        self.world.logits = torch.compile(self.world.logits, dynamic=False)
        self.dream = Recorded(self.dream) if self.world.rows.is_cuda else self.dream


def train_step(part: str, agent: Agent, optimizers: Optimizers, replay: SegmentReplay, batch_size: int,
               perceptual=None) -> dict:
    """One update of one part: sample, loss, backward, optimiser. No host reads; -> metrics ()."""
    args, device = agent.args, agent.world.rows.device
    length, names, last = dict(
        tokenizer=(1, "image", False), world=(args.batch_length, "tokens action reward end", False),
        behaviour=(args.burn_in + 1, "recon tokens", True))[part]
    batch, mask = replay.sample(batch_size, length, names, last)
    batch, mask = {k: v.to(device, non_blocking=True) for k, v in batch.items()}, mask.to(device, non_blocking=True)
    with autocast(args, device):
        if part == "tokenizer":
            losses, metrics = agent.tokenizer.loss(to_frames(batch["image"][0]), perceptual)
        elif part == "world":
            losses, metrics = agent.world.loss(dict(batch, action=batch["action"].long()), mask, args.dropout)
        else:
            noise = agent.behaviour.noise(agent.world.tokens, batch_size, device)
            dream = agent.dream(dict(noise, recon=batch["recon"], mask=mask, tokens=batch["tokens"][-1]))
            losses, metrics = agent.behaviour.loss(dream)
    norm = optimizers.step(part, sum(losses.values()))
    return {**metrics, **{f"losses/{k}": v.detach() for k, v in losses.items()}, f"grad/{part}": norm}


# ======== 10. evaluate and dream ========
# ==== shared: evaluation ====
def evaluate(agent, args, device: torch.device, step: int) -> dict[str, float]:
    """Metrics of `eval_episodes` whole episodes, equally many in each environment, so that short ones don't prevail."""
    num_envs = min(args.eval_episodes, 16)
    quota, done = -(-args.eval_episodes // num_envs), [[] for _ in range(num_envs)]
    envs = make_envs(args, num_envs, args.seed + 10_000)
    state, row = agent.eval().initial(num_envs, device), envs.reset()  # eval: some agents are greedy then
    while min(map(len, done)) < quota:
        for i in np.flatnonzero(row["is_last"]):
            done[i].append((envs.ret[i], envs.length[i]))
        state = agent.act(row, state)
        row = envs.step(state["action"].cpu().numpy())
    agent.train()
    returns, lengths = np.concatenate([episodes[:quota] for episodes in done]).T
    metrics = dict(episodic_return=returns.mean(), return_std=returns.std(), episodic_length=lengths.mean())
    print(f"evaluation at step {step}, {len(returns)} episodes:", ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
    return {f"eval/{name}": value for name, value in metrics.items()}


def dream_video(truth: torch.Tensor, model: torch.Tensor, context: int, **numbers: torch.Tensor) -> tuple:
    """Image errors, and GIF frames with rows truth, model, error (T,B,Y,X,C) in [0,1] and the `numbers` (T,B) below."""
    error = (model - truth).square().flatten(2).sum(-1)
    grid = torch.stack([truth, model, (model - truth + 1) / 2], 1).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    grid = grid[..., np.arange(3).clip(max=grid.shape[-1] - 1)]  # (T,3*Y,B*X,3); gray is repeated
    grid = F.pad((grid * 255).byte().repeat_interleave(2, 1).repeat_interleave(2, 2), (0, 0, 0, 0, 0, 14))
    frames = [Image.fromarray(frame) for frame in grid.cpu().numpy()]
    for t, b in np.ndindex(*truth.shape[:2]):
        words = ["imag" if t >= context else "post", *(f"{k[0]}{v[t, b]:.2f}" for k, v in numbers.items())]
        ImageDraw.Draw(frames[t]).text((2 + 2 * b * truth.shape[3], 6 * truth.shape[2]), " ".join(words))
    return {"dream/image_error_posterior": error[:context].mean().item(),
            "dream/image_error_imagined": error[context:].mean().item()}, frames


def log_results(writer: SummaryWriter, step: int, metrics: dict, frames: list | None = None) -> None:
    """Scalars, and frames as a GIF file that is also an image summary (TensorBoard plays it)."""
    for name, value in metrics.items():
        writer.add_scalar(name, value, step)
    if frames:
        path = Path(writer.log_dir, "videos", f"dream_{step}.gif")
        path.parent.mkdir(exist_ok=True)
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=66, loop=0)
        gif = dict(height=frames[0].height, width=frames[0].width, colorspace=3, encoded_image_string=path.read_bytes())
        writer._get_file_writer().add_summary(summary.Summary(value=[dict(tag="dream/open_loop", image=gif)]), step)
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
        dream, numbers = Dream(agent.world, tokens[-1]), [torch.zeros(2, count, device=device)] * context
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
    """checkpoint.pt with everything a resumed run needs. A kill or a full disk leaves the old one in its place."""
    rng = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    buffer = io.BytesIO()  # torch.save into a file on a full disk raises its own errors, write an OSError
    torch.save(dict(algorithm=Path(__file__).stem, args=asdict(args), agent=agent.state_dict(), rng=rng,
                    optimizer=optimizer.state_dict(), replay=replay.state_dict(), **counters), buffer)
    with open(run / "checkpoint.tmp", "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(run / "checkpoint.tmp", run / "checkpoint.pt")


def load_checkpoint(run: Path) -> dict:
    """The checkpoint of a run directory, plain data. Missing, damaged or foreign: one line, exit status 2."""
    try:
        saved = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
        if saved["algorithm"] != Path(__file__).stem or saved["args"].keys() != {f.name for f in fields(Args)}:
            raise ValueError(f"made by {saved['algorithm']}.py, or by another version of this script")
    except Exception as error:  # damaged pickles raise anything
        fail(f"{run / 'checkpoint.pt'} is missing, damaged or foreign: {error!r:.150}")
    return saved


def stop_signals() -> list[int]:
    """A list in which SIGINT, SIGTERM and SIGUSR1 (Slurm) appear: save and exit 0. A second Ctrl-C kills."""
    received = []

    def receive(number, frame) -> None:
        received.append(number)
        if number == signal.SIGINT:  # trap: torchrun passes on a SIGTERM that its processes also got themselves
            signal.signal(number, signal.SIG_DFL)

    for name in {"SIGINT", "SIGTERM", "SIGUSR1"} & set(dir(signal)):  # Windows has no SIGUSR1
        signal.signal(getattr(signal, name), receive)
    return received
# ==== end shared ====


# ======== 12. main ========
# ==== shared: command line ====
def parse_args(argv: list[str] | None = None) -> Args:
    """Flags, over the arguments of the run that is resumed, or over the preset. Bad ones: one line, exit status 2."""
    argv = [re.sub(r"(?<![^=])\d+[eE]\d\d?$", lambda number: f"{float(number[0]):.0f}", word)  # tyro's int refuses 1e6
            for word in (sys.argv[1:] if argv is None else argv)]
    first = tyro.cli(Args, args=argv)
    run = first.resume
    if run == "auto":
        files = Path(first.run_dir).glob(f"{run_name(first)}*/checkpoint.pt")
        run = os.path.dirname(max(files, key=os.path.getmtime, default=""))
    default = Args(**load_checkpoint(Path(run))["args"]) if run else replace(Args(), **PRESETS[first.preset])
    return validate(replace(tyro.cli(Args, args=argv, default=default), resume=run))


def run_name(args) -> str:
    """Name of the run directory, without the time that ends it."""
    return f"{re.sub('[/:]', '_', args.env_id)}__{args.exp_name}__{args.seed}__"
# ==== end shared ====


def validate(args: Args) -> Args:
    """The arguments, if each makes sense and they fit together; else one line and exit status 2."""
    may_be_zero = ("seed eval_every video_every eval_episodes extra_epochs learning_starts world_starts "
                   "behaviour_starts burn_in").split()
    for f in fields(args):
        value, least = getattr(args, f.name), int("int" in f.type and f.name not in may_be_zero)
        if type(value) in (int, float) and not least <= value <= 1e9:  # not bool; ale-py has 32-bit seeds
            fail(f"--{f.name.replace('_', '-')} must be a number from {least} to 1e9, got {value}")
    if args.image_size % 16 or args.channels % 2 or args.width % args.heads:
        fail("--image-size must be a multiple of 16 (four halvings), --channels even, --width a multiple of --heads")
    if min(args.batch_length, args.imag_horizon) < 2 or not args.temperature * args.eval_temperature * args.grad_clip:
        fail("--batch-length and --imag-horizon are at least 2 (a frame and the one that follows), --temperature, "
             "--eval-temperature and --grad-clip positive")
    if max(args.gamma, args.lam, args.epsilon, args.sticky_actions) > 1 or args.dropout >= 1:
        fail("--gamma, --lam, --epsilon and --sticky-actions are at most 1, --dropout is less")
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
                end=((), torch.bool), begun=((), torch.int64))


def main(args: Args) -> None:
    # ---- set-up: processes, device, environments, networks ----
    rank, world_size, device = start_ranks(args.device)
    cuda = device.type == "cuda"
    auto = dict(precision="fp32", compile="on" if cuda else "off")
    args = replace(args, action_repeat=args.action_repeat or (4 if args.env_id.startswith("ALE/") else 1),
                   **{k: v for k, v in auto.items() if getattr(args, k) == "auto"})
    if any(n % world_size for n in (args.num_envs, args.batch_size, args.tokenizer_batch)):
        fail(f"--num-envs {args.num_envs}, --batch-size {args.batch_size} and --tokenizer-batch {args.tokenizer_batch} "
             f"must be multiples of {world_size} ranks")
    num_envs = args.num_envs // world_size
    saved = load_checkpoint(Path(args.resume)) if args.resume else None
    # an epoch, begun at step `begun`, collects until `goal`, then makes 3 x epoch_updates, `done` so far (-1: it has
    # not begun); `extra` epochs have only trained
    step, updates, extra, begun, goal, done = (
        (saved[k] for k in ("step", "updates", "extra", "begun", "goal", "done")) if saved else (0, 0, 0, 0, 0, -1))
    extra = extra if step >= args.total_timesteps else 0  # of a finished run that is to collect more
    envs = make_envs(args, num_envs, args.seed + rank * num_envs + step)  # after a resume other episodes than at first
    torch.manual_seed(args.seed)  # the same weights on every rank
    agent = Agent(envs.shapes, envs.action_dim, envs.discrete, args).to(device)
    args, perceptual = choose_perceptual(args, envs.shapes["image"][-1], device)
    if args.compile == "on":
        agent.compile_regions()
    optimizers = Optimizers(agent, args)
    whole_games = replace(args, life_loss=False)

    # ---- the state of a run: everything that a checkpoint holds ----
    stamp = gather_ranks(torch.tensor([time.time_ns() // 1_000_000], device=device))[0]  # the same on all ranks
    run = Path(args.resume or f"{args.run_dir}/{run_name(args)}{stamp}")
    # an episode of n decisions takes n + 1 rows where several environments go on without it
    wanted = min(args.buffer_size, (2 if num_envs > 1 else 1) * args.total_timesteps)
    rows = saved["capacity"] if saved else max(args.batch_length + 1, -(-wanted // args.num_envs))
    run.mkdir(parents=True, exist_ok=True)
    specs, folder = replay_specs(envs.shapes, agent, args), run / f"replay{rank}"
    decoded = 4 * math.prod(envs.shapes["image"])  # bytes, see `SegmentReplay.reconstruct`
    replay = SegmentReplay(specs, rows, num_envs, device, folder, new=not saved, beside=decoded)
    torch.manual_seed(args.seed + 1000 * rank + step)  # other noise on every rank
    if saved:
        try:
            agent.load_state_dict(saved["agent"])
        except RuntimeError as error:
            fail(f"the run has other networks than these flags make ({' '.join(str(error).split())[:200]})")
        optimizers.load_state_dict(saved["optimizer"])
        replay.load_state_dict(saved["replay"])
        if rank == 0:  # the others must not draw what it draws
            torch.set_rng_state(saved["rng"][0])
            if cuda and saved["rng"][1:]:
                torch.cuda.set_rng_state(saved["rng"][1], device)

    def now() -> int:
        """The policy step, and as if they went on in the epochs that only train."""
        return step + extra * args.epoch_steps

    def goes_on() -> bool:
        return step < args.total_timesteps or extra < args.extra_epochs or done >= 0

    if rank == 0:
        flags = json.dumps(asdict(args), indent=1)
        (run / "args.json").write_text(flags)
        (run / Path(__file__).name).write_bytes(Path(__file__).read_bytes())
        writer = SummaryWriter(str(run), purge_step=now() + 1)  # without the points that a killed life left
        writer.add_text("hyperparameters", f"```\n{flags}\n```")
        counts = {name: sum(p.numel() for p in module.parameters()) for name, module in agent.named_children()}
        parts = ", ".join(f"{k} {v:,}" for k, v in counts.items())
        print(f"run directory: {run}\ndevice: {device}, {args.precision}, compile {args.compile}\n"
              f"parameters: {sum(counts.values()):,} ({parts})\nperceptual loss: {args.perceptual_loss}\n"
              f"gradient steps per policy step: {3 * args.epoch_updates / args.epoch_steps:g} (of which a third each: "
              f"tokenizer, world model, actor-critic)")

    # ---- the loop: epochs that step all environments, act, store; then learn ----
    def due(every: int) -> bool:
        return every > 0 and now() // every > begun // every or not goes_on()

    metrics = {k: torch.tensor(v, device=device) for k, v in saved["metrics"].items()} if saved else {}
    stop, stopping, values, ret, first = stop_signals(), False, {}, math.nan, (step, updates)
    bar = tqdm(total=args.total_timesteps + args.extra_epochs * args.epoch_steps, initial=now(), unit="step",
               disable=rank > 0, mininterval=1 if sys.stderr.isatty() else 10)  # steps/s, the measured time left
    row = envs.reset()
    while goes_on():
        if done < 0:
            begun, goal, done = now(), min(step + args.epoch_steps, args.total_timesteps), 0
        state = agent.warm_up(replay, device) if step < goal else None
        while step < goal and not stopping:
            state = agent.act(row, state)
            # action 0, nothing, after an end: it resets, or after a lost life lets the game go on (official)
            action = (state["action"] * torch.as_tensor(~row["is_last"], device=device)[:, None]).cpu().numpy()
            outcome = envs.step(action)
            replay.add(row, action.argmax(-1), outcome)
            news = torch.tensor([(~row["is_last"]).sum(), bool(stop)], device=device)
            decisions, stopping = gather_ranks(news).view(-1, 2).sum(0).tolist()  # all ranks must agree
            step += decisions
            while True:
                for ret, steps in zip(envs.ret[envs.over], envs.length[envs.over]) if rank == 0 else ():
                    tqdm.write(f"global_step={step}, episodic_return={ret:g}")
                    log_results(writer, step, {"charts/episodic_return": ret, "charts/episodic_length": steps})
                row = dict(outcome, is_first=row["is_last"])  # an episode begins, also after a lost life
                if not row["is_last"].all():
                    break
                outcome = envs.step(np.zeros_like(action))  # nothing to decide
            bar.set_postfix(ret=f"{ret:.4g}", updates=updates, refresh=False)
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
                stopping = gather_ranks(torch.tensor([len(stop)], device=device)).any().item()
            done += 1
        if not stopping:
            extra, done = extra + (now() == begun), -1

        if rank == 0:
            bar.update(now() - bar.n)
            if metrics and (due(args.save_every) or due(args.log_every) or stopping):  # one transfer to the host
                values = dict(zip(metrics, torch.stack([m.float() for m in metrics.values()]).tolist()))
                for name, value in values.items():
                    if name.startswith(("losses/", "grad/")) and not math.isfinite(value):
                        fail(f"{name} is {value} at step {step}; stopped, the last good checkpoint stays in {run}")
            if due(args.save_every) or stopping:
                save_checkpoint(run, args, agent, optimizers, replay, device, step=step, updates=updates, extra=extra,
                                begun=begun, goal=goal, done=done, metrics=values, capacity=rows)
            if due(args.log_every) and metrics and not stopping:
                seconds = bar.format_dict["elapsed"]
                speed = {"charts/SPS": (step - first[0]) / seconds, "charts/UPS": (updates - first[1]) / seconds}
                log_results(writer, now(), {**speed, "charts/frames": step * args.action_repeat, **values})
            with torch.random.fork_rng([device] if cuda else []):  # looking changes nothing
                if due(args.video_every) and not stopping:
                    log_results(writer, now(), *open_loop_video(agent, replay, args))
                if due(args.eval_every) and args.eval_episodes and goes_on() and not stopping:
                    log_results(writer, now(), evaluate(agent, whole_games, device, now()))
        if stopping:
            break
    bar.close()
    if rank == 0:
        if stopping:
            print(f"saved at step {step}; continue with --resume {run}")
        elif args.eval_episodes:  # also after the resume of a run that had ended
            log_results(writer, now(), evaluate(agent, whole_games, device, now()))
        writer.close()
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(parse_args())
    except OSError as error:  # a full disk, a missing file of the replay
        fail(f"{error}; the last checkpoint is as it was")
