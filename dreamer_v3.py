"""DreamerV3 in one file: learns a world model from pixels or vectors, and a policy inside its dreams.

Paper    Hafner et al., "Mastering diverse control tasks through world models", Nature 2025, arXiv:2301.04104v2
Code     compared number by number with danijar/dreamerv3 at commit e3f0224; parameter counts are equal

Run      python dreamer_v3.py --env-id ALE/Pong-v5                      Atari 100k protocol: RGB, no sticky actions
         python dreamer_v3.py --preset tiny                             every phase in two minutes on a CPU
         python dreamer_v3.py --env-id CartPole-v1 --train-ratio 512    vectors (--pixels: the rendered image)
         python dreamer_v3.py --resume auto                             go on after Ctrl-C, SIGTERM or a crash
         python dreamer_v3.py --resume runs/NAME --eval-episodes 100    a run that has ended is evaluated again
         torchrun --standalone --nproc_per_node=2 dreamer_v3.py --num-envs 2      two GPUs, or two CPU processes

Index    One replay row t holds what belongs to one moment:
            obs_t  reward_t  is_first_t  is_last_t  is_terminal_t | action_t         (h_t, z_t)
            '---------- arrived together, caused by action_{t-1}  '- chosen on obs_t '- posterior that chose it
         A training sequence is T+1 rows. Row 0 only lends (h_0, z_0) and action_0; losses run on rows 1..T:
            h_t = f(h_{t-1}, z_{t-1}, action_{t-1})   z_t ~ q(z_t | h_t, obs_t)   h, z, action zeroed at is_first_t
         In a dream, reward and continue belong to the state that is entered:
            s_0 -a_0-> s_1 -a_1-> ... s_H             R_k = r_{k+1} + c_{k+1} ((1-lam) v_{k+1} + lam R_{k+1}), R_H = v_H

Symbols  paper  code          shape                |  paper  code       shape
         x_t    obs           (T,B,Y,X,C), (T,B,n) |  a_t    action     (T,B,A)  one-hot, or raw continuous
         h_t    deter         (T,B,D)              |  r_t    reward     (T,B)
         z_t    stoch         (T,B,S*K) one-hot    |  c_t    cont       (H+1,N)  gamma * p(going on)
         s_t    feat = [h,z]  (T,B,F)              |  v_t    value      (H+1,N)
         q, p   post_logits, prior_logits (T,B,S,K)|  R_t    ret        (H,N)
         T time, B batch, H imagination, N rollouts = T*B (environments in section 4), S groups of K classes.
         Time is always the first axis. Some texts write s_t for the latent; here it is the pair {h_t, z_t}.

Delta    against DreamerV2 (tags in the code):
         D1  vectors are squashed with symlog          D6  one LaProp optimiser, adaptive gradient clipping
         D2  reward and critic are two-hot             D7  returns are scaled by their 5th-95th percentile range
         D3  KL: free nats and two fixed weights       D8  the critic also learns on replay; slow critic regularises
         D4  1 % uniform mix in latents and actor      D9  replay keeps latents, hands out the newest sequences first
         D5  block GRU, RMSNorm + SiLU, max-pooling    D10 one loss, one backward pass; REINFORCE for all actions
         D11 one width d sizes all; vectors too        D12 a_t stored beside x_t, r and c of the state entered
         D13 train ratio; no random start; sampled actions in evaluation

Differences from the official code, each on purpose:
         - the discrete actor has the paper's 1 % uniform mix (--actor-unimix 0: today's official behaviour);
         - a time limit is not a death: is_terminal is set only where the environment says so;
         - no-ops at reset are 0..29 (official 0..30), drawn by ale-py; the first frame of an episode is never black;
         - fresh latents are written back at once (official: one update later), the policy acts with the newest weights;
         - rows that only reset an environment are in replay but are not counted as policy steps.
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
SIZES = dict(size1m=64, size12m=256, size25m=384, size50m=512, size100m=768, size200m=1024, size400m=1536)  # D11: d


@dataclass
class Args:
    """DreamerV3: world model, imagination and actor-critic in one file. Counts accept 1_000_000 and 1e6."""

    exp_name: str = "dreamer_v3"  # second part of the run directory's name
    env_id: str = "ALE/Pong-v5"  # any Gymnasium id, also module:Env-v0
    seed: int = 1  # seed of weights, environments and sampling
    preset: Literal["default", "tiny"] = "default"  # for flags left alone; tiny: all phases in two minutes on two cores
    total_timesteps: int = 1_000_000  # policy steps over all environments; x action repeat = frames (official: 110_000)
    num_envs: int = 1  # parallel environments (official: 1 for Atari 100k, 16 elsewhere)
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # weights stay fp32; auto: bf16 on CUDA (official), else fp32
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile the steps and the decoder; auto: on CUDA only
    run_dir: str = "runs"  # where run directories go
    resume: str = ""  # run directory to continue, or auto: the newest one of this environment, name and seed
    save_every: int = 10_000  # policy steps between checkpoints
    eval_every: int = 0  # policy steps between evaluations; one at the end in any case
    eval_episodes: int = 10  # episodes per evaluation, or a few more: equally many per environment; 0: none
    video_every: int = 50_000  # policy steps between open-loop videos; 0: one at the end
    log_every: int = 1_000  # policy steps between metric logs

    image_size: int = 64  # side of the square image, a multiple of 16 (official: 64; Atari 200M: 96)
    action_repeat: int | None = None  # environment steps per policy step; None: 4 on Atari, 1 elsewhere (official)
    sticky_actions: float = 0.0  # Atari: probability that a frame repeats the last action (official; 200M: 0.25)
    pixels: bool = False  # learn from the rendered image instead of the environment's own observation

    buffer_size: int = 5_000_000  # replay rows over all environments (official); never above total_timesteps
    learning_starts: int = 0  # policy steps before the first update; 0: B*T + T*num_envs (official)
    batch_size: int = 16  # sequences per update, B (official)
    batch_length: int = 64  # steps per sequence, T, plus one of context (official)
    train_ratio: float = 256.0  # replayed steps per policy step (official; 200M: 32, proprio: 1024; paper: 128)

    size: Literal[("auto", *SIZES)] = "auto"  # official default: size200m; auto: size12m on a GPU, else size1m
    free_nats: float = 1.0  # KL below which neither prior nor posterior is trained, in nats per step (official)
    beta_dyn: float = 1.0  # weight of the prior's KL (official; 0.5 in 2023)
    beta_rep: float = 0.1  # weight of the posterior's KL (official)
    unimix: float = 0.01  # uniform share of the latent distributions (official)
    imag_horizon: int = 15  # imagined steps, H (official)
    gamma: float = 1 - 1 / 333  # discount: in the continue target and the critic's replay loss (official)
    lam: float = 0.95  # lambda of the returns (official)
    ent_coef: float = 3e-4  # entropy bonus (official)
    actor_unimix: float = 0.01  # uniform share of the discrete policy (paper; 0 in today's official code)
    beta_repval: float = 0.3  # weight of the critic's replay loss (official)
    slow_rate: float = 0.02  # step of the slow critic towards the critic, per update (official)
    lr: float = 4e-5  # learning rate of all networks (official)
    warmup: int = 1_000  # updates of linear warm-up; the first has learning rate 0 (official)
    agc: float = 0.3  # gradient norm allowed per tensor, relative to the tensor's norm; 0: no clipping (official)


PRESETS = dict(default={}, tiny=dict(  # D11
    size="size1m", total_timesteps=1_200, batch_size=8, batch_length=16, train_ratio=32.0, lr=3e-4, warmup=50,
    save_every=600, video_every=600, log_every=100, eval_episodes=1, buffer_size=100_000))


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
def symlog(x: torch.Tensor) -> torch.Tensor:  # D1
    """sign(x) ln(|x| + 1), the squashing of vector inputs. Eq. 9 (arXiv:2301.04104v2)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp_bins(count: int = 255) -> torch.Tensor:  # D2
    """(count,) bins sign(x) (exp|x| - 1), x in [-20, 20], exactly antisymmetric. Eq. 10 (arXiv:2301.04104v2)."""
    half = -torch.expm1(-torch.linspace(-20, 0, (count + 1) // 2))
    return torch.cat([half, -half[: count // 2].flip(0)])


def twohot_loss(logits: torch.Tensor, target: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """Cross entropy of softmax(logits (...,K)) with twohot(target (...)), (...). Eq. 11 (arXiv:2301.04104v2).
    Weights are linear in raw space. The dense target is never built: -sum twohot * log_softmax = logsumexp - lerp."""
    logits, target = at_least_float32(logits), target.clamp(bins[0], bins[-1])
    above = torch.bucketize(target, bins, right=True).clamp(max=len(bins) - 1)
    low, high = bins[above - 1], bins[above]
    picked = logits.gather(-1, torch.stack([above - 1, above], -1))
    return logits.logsumexp(-1) - torch.lerp(picked[..., 0], picked[..., 1], (target - low) / (high - low))


def twohot_mean(logits: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """Expected value of softmax(logits (...,K)) over the bins, (...). Eq. 10 (arXiv:2301.04104v2).
    Trap: bins reach 4.85e8, so a plain sum gives -0.4 instead of 0 at initialisation. Subtracting mirrored
    probabilities first is exactly 0 for a uniform distribution (the middle bin is 0)."""
    probs, half = at_least_float32(logits).softmax(-1), len(bins) // 2
    return ((probs[..., half + 1 :] - probs[..., :half].flip(-1)) * bins[half + 1 :]).sum(-1)


# ==== shared: categorical latents ====
def entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of log-probabilities (...,K), (...)."""
    return -(log_probs.exp() * log_probs).sum(-1)


class StraightThrough(torch.autograd.Function):
    """Categorical sample of probs (...,K) as exact one-hot vectors, whose gradient is passed to probs as it is.
    argmax(p / e) with e ~ Exp(1) is an exact draw (exponential race); the noise carries no gradient."""

    @staticmethod
    def forward(ctx, probs, noise):
        return torch.zeros_like(probs).scatter_(-1, (probs / noise).argmax(-1, keepdim=True), 1.0)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


sample_onehot = StraightThrough.apply


def categorical_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats, (...), of log-probabilities (...,S,K): summed over the groups S, which are independent."""
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))
# ==== end shared ====


def unimix(logits: torch.Tensor, mix: float) -> torch.Tensor:  # D4
    """Probabilities (...,K) with a uniform share `mix`; sample, KL, entropy and gradient all use these, not logits."""
    return (1 - mix) * at_least_float32(logits).softmax(-1) + mix / logits.shape[-1]


def log_unimix(logits: torch.Tensor, mix: float) -> torch.Tensor:
    """log unimix(logits), finite also for mix 0, where a probability can be too small for its float."""
    return unimix(logits, mix).log() if mix else at_least_float32(logits).log_softmax(-1)


def kl_losses(post_logits: torch.Tensor, prior_logits: torch.Tensor, mix: float, free_nats: float) -> tuple:  # D3
    """dyn = max(free, KL(sg q || p)), rep = max(free, KL(q || sg p)), and the KL, (T,B). Eq. 3 (arXiv:2301.04104v2).
    The stop-gradients let dyn train only the prior, rep only the posterior. Free nats apply to the KL summed over the
    groups, which avoids the solution where both collapse; per group, nothing below 32 nats would be trained."""
    post, prior = log_unimix(post_logits, mix), log_unimix(prior_logits, mix)
    dyn, rep = categorical_kl(post.detach(), prior), categorical_kl(post, prior.detach())
    return dyn.clamp(min=free_nats), rep.clamp(min=free_nats), dyn.detach()


def lambda_return(reward: torch.Tensor, value: torch.Tensor, live: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """R_k = r_{k+1} + live_{k+1} ((1-lam_{k+1}) v_{k+1} + lam_{k+1} R_{k+1}), R_H = v_H. Eq. 7 (arXiv:2301.04104v2).
    Inputs (H+1,...), result (H,...). `live` contains the discount; reward and live are those of the state entered."""
    rets, step = [value[-1]], reward[1:] + live[1:] * (1 - lam[1:]) * value[1:]
    for r, decay in zip(step.flip(0), (live[1:] * lam[1:]).flip(0)):
        rets.append(torch.addcmul(r, decay, rets[-1]))
    return torch.stack(rets[:0:-1])  # in order of time, without R_H


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
    """Anything with `reset`, `step`, `shapes`, `action_dim`, `discrete`, `ret` and `length` as in Envs will do."""
    return Envs(args, num_envs, seed, args.image_size, args.pixels)  # D11


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


class SequenceReplay(Storage):  # D9
    """Uniform sequences of endless streams that may cross episode borders. Source: `Replay`, `selectors.Uniform`.
    Online queue: once a stream has `length` new rows they are handed out once, before the uniform samples."""

    online = 0  # sequences that were handed out so

    def sample(self, batch_size: int, length: int, online: bool = True) -> tuple[dict, torch.Tensor]:
        """-> fields (length,batch_size,...) on the device, and their positions for `write`."""
        oldest = self.rows - self.size
        start, env = torch.rand((2, batch_size), dtype=torch.float64, device=self.device)
        start, env = oldest + (start * (self.size - length + 1)).long(), (env * self.num_envs).long()
        if online:  # sequence k of a stream begins at row 1 + k * length (official)
            first = max(self.online, -(-(oldest - 1) // length) * self.num_envs)
            self.online = max(first, min(first + batch_size, (self.rows - 1) // length * self.num_envs))
            fresh = torch.arange(first, self.online, device=self.device)
            start[: len(fresh)], env[: len(fresh)] = 1 + fresh // self.num_envs * length, fresh % self.num_envs
        batch, index = self.gather(start + torch.arange(length, device=self.device)[:, None], env.expand(length, -1))
        batch["is_first"][0] = True  # a sequence begins as an episode does, and an abandoned episode ends (official)
        batch["is_last"][:-1] |= batch["is_first"][1:]
        return batch, index

    def state_dict(self) -> dict:
        return dict(super().state_dict(), online=self.online)


def split_context(batch: dict) -> tuple[dict, dict]:  # D9, D12
    """Rows 0..T (T+1,B,...) -> rows 1..T to train on, and what `RSSM.observe` needs beside their tokens.
    Row 0 lends its stored latents and its action. The forced is_first sits on row 0, so it does not reset row 1."""
    return {k: v[1:] for k, v in batch.items()}, dict(prev_action=batch["action"][:-1], is_first=batch["is_first"][1:],
                                                      deter=batch["deter"][0], stoch=batch["stoch"][0])


# ======== 6. networks ========
def init(layer: nn.Module, scale: float = 1.0, fan_in: int | None = None) -> nn.Module:
    """Bias 0, weight normal truncated at 2 sigma, std scale/sqrt(fan_in). Source: `Initializer` (trunc_normal_in)."""
    sigma = 1.1368 / math.sqrt(fan_in or layer.weight[0].numel())
    nn.init.trunc_normal_(layer.weight, 0.0, sigma, -2 * sigma, 2 * sigma)  # trap: the bounds are values, not multiples
    layer.weight.data *= scale
    nn.init.zeros_(layer.bias)
    return layer


class BlockLinear(nn.Module):  # D5
    """(N,in) -> (N,out) as G independent maps of in/G to out/G features; weight (G,in/G,out/G)."""

    def __init__(self, inputs: int, outputs: int, blocks: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, inputs // blocks, outputs // blocks))
        self.bias = nn.Parameter(torch.empty(outputs))
        init(self, fan_in=inputs)  # trap: that of a block would give sqrt(blocks) times larger weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ngi,gio->ngo", x.unflatten(-1, self.weight.shape[:2]), self.weight).flatten(1) + self.bias


class NormSiLU(nn.RMSNorm):  # D5
    """RMSNorm over the last axis with a scale and eps 1e-4, in float32, then SiLU. Source: `nets.Norm`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(F.rms_norm(at_least_float32(x), self.weight.shape, self.weight, 1e-4)).to(x.dtype)


def mlp(inputs: int, units: int, layers: int, outputs: int = 0, scale: float = 1.0) -> nn.Sequential:
    """`layers` x [linear, RMSNorm, SiLU], then a linear layer to `outputs`, if any; (...,inputs) -> (...,outputs)."""
    hidden = [m for i in range(layers) for m in (init(nn.Linear(units if i else inputs, units)), NormSiLU(units))]
    return nn.Sequential(*hidden, *([init(nn.Linear(units, outputs), scale)] if outputs else []))


def upsample_convolve(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:  # D5
    """Nearest upsampling x2, then the 5x5 convolution; (N,in,Y,X) -> (N,out,2Y,2X).
    Computed at low resolution: summed over the 2x2 pixels that share an input, the kernel is 6x6, and each of the four
    output phases sees 3x3 of it. Plain form: `conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))`."""
    kernel = 4 * F.avg_pool2d(conv.weight, 2, stride=1, padding=1)  # (out,in,6,6)
    phases = torch.stack([kernel[:, :, a::2, b::2] for a in (1, 0) for b in (1, 0)], 1).flatten(0, 1)
    return F.pixel_shuffle(F.conv2d(x, phases, conv.bias.repeat_interleave(4), padding=1), 2)


class Encoder(nn.Module):
    """Observations -> tokens (T,B,E): vectors through an MLP, the image through 4 x [conv, max-pool, norm, SiLU]."""

    def __init__(self, shapes: dict, units: int, depth: int, layers: int = 3):
        super().__init__()
        self.tokens = 0  # E
        if "vector" in shapes:
            self.mlp = mlp(sum(shapes["vector"]), units, layers)
            self.tokens += units
        if "image" in shapes:
            height, width, channels = shapes["image"]
            widths = [channels, 2 * depth, 3 * depth, 4 * depth, 4 * depth]
            self.convs = nn.ModuleList(init(nn.Conv2d(*pair, 5, padding=2)) for pair in zip(widths, widths[1:]))
            self.norms = nn.ModuleList(map(NormSiLU, widths[1:]))
            self.tokens += height // 16 * (width // 16) * widths[-1]

    def forward(self, obs: dict) -> torch.Tensor:
        outs = []
        if "vector" in obs:
            outs.append(self.mlp(symlog(obs["vector"])))  # D1
        if "image" in obs:
            x = obs["image"].flatten(0, 1).to(self.convs[0].weight.dtype) / 255 - 0.5
            for conv, norm in zip(self.convs, self.norms):  # channels last, as the norm and NumPy want them
                x = norm(F.max_pool2d(conv(x.permute(0, 3, 1, 2)), 2).permute(0, 2, 3, 1))  # D5
            outs.append(x.flatten(1).unflatten(0, obs["image"].shape[:2]))  # in Y,X,C order, as the official code
        return torch.cat(outs, -1)


class Decoder(nn.Module):
    """Latents (T,B,D), (T,B,S*K) -> predicted observations: image in [0,1], vectors in symlog space."""

    def __init__(self, shapes: dict, deter: int, stoch: int, units: int, depth: int, layers: int = 3):
        super().__init__()
        self.shapes = shapes
        if "vector" in shapes:  # one output layer for each part, because gradients are clipped per tensor
            self.mlp = mlp(stoch + deter, units, layers)
            self.mlp_outs = nn.ModuleList(init(nn.Linear(units, n)) for n in shapes["vector"])
        if "image" in shapes:
            height, width, channels = shapes["image"]
            widths, blocks = [4 * depth, 4 * depth, 3 * depth, 2 * depth, channels], 8
            self.grid = (blocks, height // 16, width // 16, 4 * depth // blocks)
            self.from_deter = BlockLinear(deter, math.prod(self.grid), blocks)
            self.from_stoch = mlp(stoch, 2 * units, 1, math.prod(self.grid))
            self.convs = nn.ModuleList(init(nn.Conv2d(*pair, 5, padding=2)) for pair in zip(widths, widths[1:]))
            self.norms = nn.ModuleList(map(NormSiLU, widths[:-1]))

    def forward(self, deter: torch.Tensor, stoch: torch.Tensor) -> dict:
        out = {}
        if "vector" in self.shapes:
            x = self.mlp(torch.cat([stoch, deter], -1))
            out["vector"] = torch.cat([layer(x) for layer in self.mlp_outs], -1)
        if "image" in self.shapes:
            x = self.from_deter(deter.flatten(0, -2)).unflatten(-1, self.grid).permute(0, 2, 3, 1, 4)  # (N,y,x,G,C/G)
            x = (x + self.from_stoch(stoch.flatten(0, -2)).view(x.shape)).flatten(3)
            for norm, conv in zip(self.norms, self.convs):
                x = upsample_convolve(norm(x).permute(0, 3, 1, 2), conv).permute(0, 2, 3, 1)
            out["image"] = at_least_float32(x).sigmoid().unflatten(0, deter.shape[:-1])
        return out


# ======== 7. world model ========
class RSSM(nn.Module):  # D5
    """Recurrent state-space model: h_t = f(h, z, a), prior p(z_t | h_t), posterior q(z_t | h_t, tokens_t).
    In the official cell each block reads its slice of h and all of [x_h, x_z, x_a]; for the latter the weights are
    one dense matrix, only the slice needs blocks. What does not depend on the recurrence is taken out of the scan: the
    token part of the posterior's first layer, the action part of the cell, the prior, all noise."""

    def __init__(self, deter, hidden, stoch, classes, blocks, action_dim, tokens, mix):
        super().__init__()
        self.deter, self.stoch, self.classes, self.blocks, self.mix = deter, stoch, classes, blocks, mix
        self.in_deter, self.in_stoch, self.in_action = (mlp(n, hidden, 1) for n in (deter, stoch * classes, action_dim))
        self.hid, self.hid_norm = BlockLinear(deter + blocks * 3 * hidden, deter, blocks), NormSiLU(deter)
        self.gru = BlockLinear(deter, 3 * deter, blocks)
        self.post_hid, self.post_out = mlp(deter + tokens, hidden, 1), init(nn.Linear(hidden, stoch * classes))
        self.prior = nn.Sequential(*mlp(deter, hidden, 2, stoch * classes), nn.Unflatten(-1, (stoch, classes)))

    def noise(self, *lead: int) -> torch.Tensor:
        """Exp(1) for the samples of latents, (*lead,S,K)."""
        return torch.empty(*lead, self.stoch, self.classes, device=self.gru.bias.device).exponential_()

    def scan_weights(self, dtype: torch.dtype) -> tuple[dict, dict]:  # D5
        """The products of a step, packed once per scan, in computation precision: matrices, and biases (rows), by name.
        The caller adds the rows `dense` (action; official: a / sg(max(1, |a|)), equal) and `post_hid` (tokens)."""
        part, hidden = self.deter // self.blocks, self.in_deter[0].out_features
        joint = self.hid.weight[:, part:].transpose(0, 1).flatten(1)  # rows [x_h, x_z, x_a], columns in block order
        reset, cand, update = self.gru.bias.view(self.blocks, 1, -1).chunk(3, -1)  # official: sigmoid(update - 1)
        weights = dict(in_deter=self.in_deter[0].weight.T, in_stoch=self.in_stoch[0].weight.T, gru=self.gru.weight,
                       own=self.hid.weight[:, :part], dense=joint[: 2 * hidden], action=joint[2 * hidden :],
                       post_hid=self.post_hid[0].weight[:, : self.deter].T, post_out=self.post_out.weight.T)
        biases = dict(in_deter=self.in_deter[0].bias[None], in_stoch=self.in_stoch[0].bias[None],
                      own=self.hid.bias.view(self.blocks, 1, -1), gru=torch.cat([reset, cand, update - 1], -1),
                      post_out=self.post_out.bias[None])
        return tuple({k: v.to(dtype) for k, v in group.items()} for group in (weights, biases))

    def core(self, weights: dict, biases: dict, deter: torch.Tensor, stoch: torch.Tensor) -> torch.Tensor:
        """h' = f(h, z, a), a block-diagonal GRU: (B,D), (B,S*K) -> (B,D); a is in the bias `dense`."""  # D5
        x_h = self.in_deter[1](torch.addmm(biases["in_deter"], deter, weights["in_deter"]))
        x_z = self.in_stoch[1](torch.addmm(biases["in_stoch"], stoch, weights["in_stoch"]))
        x = torch.addmm(biases["dense"], torch.cat([x_h, x_z], -1), weights["dense"])
        blocks = deter.unflatten(-1, (self.blocks, -1))
        own = torch.baddbmm(biases["own"], blocks.transpose(0, 1), weights["own"]).transpose(0, 1)  # (B,G,D/G)
        x = self.hid_norm((x.view_as(blocks) + own).flatten(1)).view_as(blocks)
        gates = torch.baddbmm(biases["gru"], x.transpose(0, 1), weights["gru"]).transpose(0, 1)  # (B,G,3*D/G)
        reset, cand, update = gates.chunk(3, -1)  # thirds of each block; h' = u tanh(r c) + (1 - u) h
        return torch.lerp(blocks, torch.tanh(reset.sigmoid() * cand), update.sigmoid()).flatten(1)

    def observe_step(self, weights: dict, biases: dict, deter, stoch, noise) -> tuple:
        """One posterior step: (B,D), (B,S*K), noise (B,S,K) -> h', z', logits (B,S,K)."""
        deter = self.core(weights, biases, deter, stoch)
        x = self.post_hid[1](torch.addmm(biases["post_hid"], deter, weights["post_hid"]))
        logits = torch.addmm(biases["post_out"], x, weights["post_out"]).unflatten(-1, (self.stoch, self.classes))
        return deter, sample_onehot(unimix(logits, self.mix), noise).to(deter.dtype).flatten(1), logits

    def observe(self, tokens, prev_action, is_first, deter, stoch) -> tuple:
        """Posterior of a sequence: tokens (T,B,E), prev_action (T,B,A), is_first (T,B), carry h (B,D), z (B,S*K)
        -> h (T,B,D), z (T,B,S*K), logits (T,B,S,K). With T = 1 it is the policy's step."""
        dtype, (weights, biases) = tokens.dtype, self.scan_weights(tokens.dtype)  # D5
        keep = (~is_first).to(dtype)[..., None]  # trap: h, z and the previous action all start from zero in an episode
        # of all steps, (T,...,B,out): one sum is a bias's gradient; `unbind`: bias[t] makes a full-size one for every t
        biases = {k: bias.expand(len(tokens), *bias.shape[:-2], keep.shape[1], -1) for k, bias in biases.items()}
        biases["dense"] = self.in_action(prev_action.to(dtype).clamp(-1, 1) * keep) @ weights["action"]
        biases["post_hid"] = F.linear(tokens, self.post_hid[0].weight[:, self.deter :], self.post_hid[0].bias)
        deter, stoch, outs = deter.to(dtype), stoch.to(dtype), []
        for *bias, k, noise in zip(*(x.unbind() for x in biases.values()), keep.unbind(), self.noise(*is_first.shape)):
            deter, stoch, logits = self.observe_step(weights, dict(zip(biases, bias)), deter * k, stoch * k, noise)
            outs.append((deter, stoch, logits))
        return tuple(map(torch.stack, zip(*outs)))

    def imagine_step(self, weights: dict, biases: dict, deter, stoch, action, noise) -> tuple:  # D5
        """One step without observation: (N,D), (N,S*K), action (N,A), noise (N,S,K) -> h', z' ~ p(z' | h')."""
        biases = dict(biases, dense=self.in_action(action.to(deter.dtype).clamp(-1, 1)) @ weights["action"])
        deter = self.core(weights, biases, deter, stoch)
        return deter, sample_onehot(unimix(self.prior(deter), self.mix), noise).to(deter.dtype).flatten(1)


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward and continue heads of width d: h has 8d units, z 32 groups of d/16 classes."""

    def __init__(self, shapes: dict, action_dim: int, args: Args):
        super().__init__()
        d, stoch = SIZES[args.size], 32
        deter, classes = 8 * d, d // 16
        self.args, self.feat = args, deter + stoch * classes
        self.encoder = Encoder(shapes, d, d // 16)
        self.rssm = RSSM(deter, d, stoch, classes, 8, action_dim, self.encoder.tokens, args.unimix)
        self.decoder = Decoder(shapes, deter, stoch * classes, d, d // 16)
        self.reward = mlp(self.feat, d, 1, 255, scale=0.0)  # D2: predicts exactly 0 at first
        self.cont = mlp(self.feat, d, 1, 1)
        self.register_buffer("bins", symexp_bins(), persistent=False)

    def loss(self, rows: dict, context: dict) -> tuple[dict, dict, dict]:
        """Of `split_context` -> losses (T,B), posterior {deter, stoch} (T,B,...), metrics."""
        deter, stoch, post_logits = self.rssm.observe(self.encoder(rows), **context)
        prior_logits = self.rssm.prior(deter)
        dyn, rep, kl = kl_losses(post_logits, prior_logits, self.args.unimix, self.args.free_nats)
        feat, losses = torch.cat([deter, stoch], -1), {}
        for key, recon in self.decoder(deter, stoch).items():  # summed over pixels and channels or entries; no 1/2
            target = rows[key].to(recon.dtype) / 255 if key == "image" else symlog(rows[key])
            losses[key] = (at_least_float32(recon) - target).square().flatten(2).sum(-1)
        target = (1 - rows["is_terminal"].float()) * self.args.gamma  # soft: a dream needs no other discount
        cont = at_least_float32(self.cont(feat))[..., 0]
        losses.update(dyn=dyn, rep=rep, reward=twohot_loss(self.reward(feat), rows["reward"], self.bins),
                      cont=F.binary_cross_entropy_with_logits(cont, target, reduction="none"))
        entropies = {f"wm/{k}_entropy": entropy(log_unimix(logits.detach(), self.args.unimix)).sum(-1).mean()
                     for k, logits in (("post", post_logits), ("prior", prior_logits))}
        return losses, dict(deter=deter, stoch=stoch), {"wm/kl": kl.mean(), **entropies}


# ======== 8. behaviour ========
class Behaviour(nn.Module):
    """Actor, critic and slow critic on feat = [h, z], trained in dreams. Source: `imag_loss`, `repl_loss`."""

    def __init__(self, feat: int, action_dim: int, discrete: bool, args: Args):
        super().__init__()
        self.args, self.discrete, self.action_dim, d = args, discrete, action_dim, SIZES[args.size]
        outs = [init(nn.Linear(d, action_dim), 0.01) for _ in range(1 if discrete else 2)]  # logits, or mean and std
        self.actor = nn.ModuleList([mlp(feat, d, 3), *outs])
        self.critic = mlp(feat, d, 3, 255, scale=0.0)
        self.slow_critic = mlp(feat, d, 3, 255, scale=0.0).requires_grad_(False)
        self.slow_critic.load_state_dict(self.critic.state_dict())
        self.register_buffer("percentiles", torch.zeros(2))
        self.register_buffer("bins", symexp_bins(), persistent=False)

    def noise(self, *lead: int) -> torch.Tensor:
        """What `sample` consumes, (*lead,A): Exp(1) for a categorical race, N(0,1) for a Gaussian."""
        noise = torch.empty(*lead, self.action_dim, device=self.bins.device)
        return noise.exponential_() if self.discrete else noise.normal_()

    def policy(self, feat: torch.Tensor) -> torch.Tensor | torch.distributions.Normal:
        """Log-probabilities (...,A) of one-hot actions, or Normal(tanh m, 0.1 + 0.9 sigmoid(s + 2)). Source: `outs.py`.
        Not squashed: log_prob is that of the raw continuous sample, which the environment clips to [-1, 1]."""
        hidden, *outs = self.actor
        x = hidden(feat)
        raw = at_least_float32(torch.cat([out(x) for out in outs], -1))
        if self.discrete:  # D4
            return log_unimix(raw, self.args.actor_unimix)
        mean, std = raw.chunk(2, -1)  # D10
        return torch.distributions.Normal(mean.tanh(), 0.1 + 0.9 * (std + 2).sigmoid(), validate_args=False)

    def sample(self, feat: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Actions (...,A) of the policy; needs no gradient."""
        policy = self.policy(feat)
        return sample_onehot(policy.exp(), noise) if self.discrete else policy.mean + policy.stddev * noise

    @torch.no_grad()  # REINFORCE needs no gradient through the dream: states and actions are constants of both losses
    def imagine(self, rssm: RSSM, deter, stoch) -> tuple[torch.Tensor, torch.Tensor]:
        """Roll the policy out from (N,D), (N,S*K) -> feat (H+1,N,F), action (H,N,A)."""
        lead, weights = (self.args.imag_horizon, len(deter)), rssm.scan_weights(deter.dtype)
        feats, actions = [torch.cat([deter, stoch], -1)], []
        for action_noise, stoch_noise in zip(self.noise(*lead), rssm.noise(*lead)):
            actions.append(self.sample(feats[-1], action_noise))  # D10
            deter, stoch = rssm.imagine_step(*weights, deter, stoch, actions[-1], stoch_noise)
            feats.append(torch.cat([deter, stoch], -1))
        return torch.stack(feats), torch.stack(actions)

    @torch.no_grad()  # D7
    def return_scale(self, ret: torch.Tensor, rate: float = 0.01) -> torch.Tensor:
        """Advantages are divided by max(1, S), S = EMA(Per95 - Per5, 0.99) of all returns. Eq. 8 (arXiv:2301.04104v2).
        0.99 is the share of the old value. Both percentiles are averaged on their own, from 0, without bias correction
        (official), so the divisor is 1 at first. Takes the returns of all ranks, any shape; -> divisor ()."""
        ret = gather_ranks(ret.flatten())
        self.percentiles.lerp_(torch.stack([ret.quantile(0.05), ret.quantile(0.95)]), rate)
        return (self.percentiles[1] - self.percentiles[0]).clamp(min=1)

    def value_loss(self, logits: torch.Tensor, slow_logits: torch.Tensor, ret: torch.Tensor) -> torch.Tensor:  # D8
        """Two-hot regression on the return, and on the slow critic's mean as regulariser; targets carry no gradient."""
        slow_value = twohot_mean(slow_logits.detach(), self.bins)
        return twohot_loss(logits, ret.detach(), self.bins) + twohot_loss(logits, slow_value, self.bins)

    def imagination_losses(self, policy, action, value_logits, slow_logits, reward, cont) -> tuple:
        """Actor and critic losses (H,N), returns (H,N), metrics; from `policy` in s_0..s_{H-1}, action (H,N,A), and the
        predictions for s_0..s_H, (H+1,N). Eq. 5 to 7 (arXiv:2301.04104v2) as losses, weighted by continuation."""
        if self.discrete:
            bonus, log_prob = entropy(policy), (policy * action).sum(-1)
        else:
            bonus, log_prob = policy.entropy().sum(-1), policy.log_prob(action).sum(-1)  # D10
        value = twohot_mean(value_logits.detach(), self.bins)
        ret = lambda_return(reward, value, cont, torch.full_like(cont, self.args.lam))  # cont contains gamma
        weight = cont.cumprod(0)[:-1]  # w_0 = c_0, not 1: a dream that starts at a terminal state teaches nothing
        scale = self.return_scale(ret)  # D7: updated before use
        advantage = ((ret - value[:-1]) / scale).detach()  # a constant for the actor
        losses = dict(policy=-weight * (log_prob * advantage + self.args.ent_coef * bonus),  # D10
                      value=weight * self.value_loss(value_logits[:-1], slow_logits[:-1], ret))
        return losses, ret, {"ac/entropy": bonus.mean().detach(), "ac/return": ret.mean(), "ac/return_scale": scale,
                             "ac/value": value.mean()}

    def replay_loss(self, value_logits, slow_logits, boot, rows: dict) -> tuple:  # D8
        """Critic on replayed states (T,B), `boot` = R_0 of the dream from each state; -> loss, return (T-1,B).
        Gamma is explicit, the flag hard. An episode's last step has weight 0; truncated, it is bootstrapped from."""
        live, going_on = (1 - rows["is_terminal"].float()) * self.args.gamma, 1 - rows["is_last"].float()
        ret = lambda_return(rows["reward"], boot, live, going_on * self.args.lam)
        return going_on[:-1] * self.value_loss(value_logits[:-1], slow_logits[:-1], ret), ret

    def loss(self, world: WorldModel, post: dict, rows: dict) -> tuple[dict, dict]:
        """All behaviour losses from the posterior (T,B,...) of replayed rows; every state starts one dream."""
        feat, action = self.imagine(world.rssm, post["deter"].flatten(0, 1), post["stoch"].flatten(0, 1))
        with torch.no_grad():  # the behaviour must not bend the world model
            reward = twohot_mean(world.reward(feat), world.bins)
            cont = at_least_float32(world.cont(feat))[..., 0].sigmoid()
        losses, ret, metrics = self.imagination_losses(
            self.policy(feat[:-1]), action, self.critic(feat), self.slow_critic(feat), reward, cont)
        feat = torch.cat([post["deter"], post["stoch"]], -1)  # not detached: on replay it trains the world model too
        losses["repval"], _ = self.replay_loss(
            self.critic(feat), self.slow_critic(feat.detach()), ret[0].unflatten(0, feat.shape[:2]), rows)
        return losses, metrics


# ======== 9. update ========
class LaProp:  # D6
    """Adaptive gradient clipping, RMS normalisation, then momentum. Source: `opt.py`, `Agent._make_opt`.
    Per tensor: g /= max(1, |g| / (agc max(1e-3, |p|)));  v <- b2 v + (1-b2) g^2;  m <- b1 m + (1-b1) g / sqrt(v');
    p -= lr_k m', where ' is bias correction. The step counter is a tensor: no host reads. b2: the code's, paper .99."""

    def __init__(self, params, lr: float, warmup: int, agc: float, beta1=0.9, beta2=0.999, eps=1e-20):
        self.params = [p for p in params if p.requires_grad]
        self.lr, self.warmup, self.agc, self.beta1, self.beta2, self.eps = lr, warmup, agc, beta1, beta2, eps
        self.count = torch.zeros((), device=self.params[0].device)
        self.square, self.momentum = ([torch.zeros_like(p) for p in self.params] for _ in range(2))

    @torch.no_grad()
    def step(self) -> dict[str, torch.Tensor]:
        """One update from `p.grad`. Metrics: gradient norm before clipping, share of tensors clipped."""
        grads = [p.grad for p in self.params]
        grad_norm, param_norm = (torch.stack(torch._foreach_norm(x)) for x in (grads, self.params))
        clip = grad_norm / ((self.agc or math.inf) * param_norm.clamp(min=1e-3))
        torch._foreach_div_(grads, list(clip.clamp(min=1).unbind()))
        self.count += 1
        correct1, correct2 = (-torch.expm1(self.count * math.log(b)) for b in (self.beta1, self.beta2))  # 1 - b^k
        torch._foreach_mul_(self.square, self.beta2)
        torch._foreach_addcmul_(self.square, grads, grads, 1 - self.beta2)
        scale = torch._foreach_sqrt(torch._foreach_div(self.square, correct2))
        torch._foreach_div_(grads, torch._foreach_add(scale, self.eps))
        torch._foreach_lerp_(self.momentum, grads, 1 - self.beta1)
        lr = self.lr * ((self.count - 1) / self.warmup).clamp(max=1) if self.warmup else self.lr  # 0 first: official
        torch._foreach_sub_(self.params, torch._foreach_mul(self.momentum, lr / correct1))
        return {"grad/norm": grad_norm.norm(), "grad/clipped_share": (clip > 1).float().mean()}

    def state_dict(self) -> dict:
        return dict(state=[self.count, *self.square, *self.momentum])

    def load_state_dict(self, saved: dict) -> None:
        torch._foreach_copy_(self.state_dict()["state"], saved["state"])


class Agent(nn.Module):  # D10
    """World model and behaviour: the policy for the environment, and the one loss of an update."""

    def __init__(self, shapes: dict, action_dim: int, discrete: bool, args: Args):
        super().__init__()
        self.args = args
        self.world = WorldModel(shapes, action_dim, args)
        self.behaviour = Behaviour(self.world.feat, action_dim, discrete, args)

    def initial(self, num_envs: int, device: torch.device) -> dict:
        """State before the first observation: h, z and the previous action are zero."""
        deter = self.world.rssm.deter
        sizes = dict(deter=deter, stoch=self.world.feat - deter, action=self.behaviour.action_dim)
        return {k: torch.zeros(num_envs, n, device=device) for k, n in sizes.items()}

    @torch.no_grad()
    def act(self, row: dict, state: dict) -> dict:  # D13
        """Row (N,...) and state -> new {deter, stoch, action}; always sampled, in evaluation too (official)."""
        obs = {k: torch.as_tensor(v, device=state["deter"].device)[None] for k, v in row.items()}
        with autocast(self.args, state["deter"].device):
            (deter,), (stoch,), _ = self.world.rssm.observe(
                self.world.encoder(obs), state["action"][None], obs["is_first"], state["deter"], state["stoch"])  # D11
            action = self.behaviour.sample(torch.cat([deter, stoch], -1), self.behaviour.noise(len(deter)))
        return dict(deter=deter, stoch=stoch, action=action)

    def loss(self, batch: dict) -> tuple[torch.Tensor, dict, dict]:  # D10
        """Replay rows (T+1,B,...) -> scalar loss, posterior latents for replay, metrics. Eq. 2 (arXiv:2301.04104v2)."""
        rows, context = split_context(batch)
        with autocast(self.args, batch["deter"].device):
            losses, post, metrics = self.world.loss(rows, context)
            ac_losses, ac_metrics = self.behaviour.loss(self.world, post, rows)
        scales = dict(dyn=self.args.beta_dyn, rep=self.args.beta_rep, repval=self.args.beta_repval)  # all others 1
        means = {k: v.mean() for k, v in {**losses, **ac_losses}.items()}
        total = sum(scales.get(k, 1.0) * v for k, v in means.items())  # D10
        metrics.update(ac_metrics, **{f"losses/{k}": v.detach() for k, v in means.items()})
        return total, {k: v.detach() for k, v in post.items()}, metrics

    def compile_regions(self) -> None:
        """The steps and the decoder. Not the unrolled scan (minutes, no faster), not encoder and heads (no gain)."""
        self.world.rssm.observe_step = torch.compile(self.world.rssm.observe_step, dynamic=False)
        self.world.rssm.imagine_step = torch.compile(self.world.rssm.imagine_step, dynamic=False)
        self.world.decoder.compile(dynamic=False)


def train_step(agent: Agent, optimizer: LaProp, replay: SequenceReplay, batch_size: int) -> dict:  # D10
    """One update: sample, loss, backward, optimiser, slow critic, latents to replay. No host reads; -> metrics ()."""
    batch, index = replay.sample(batch_size, agent.args.batch_length + 1)
    loss, post, metrics = agent.loss({k: v.to(optimizer.count.device, non_blocking=True) for k, v in batch.items()})
    loss.backward()
    average_ranks([p.grad for p in optimizer.params])
    metrics.update(optimizer.step())
    agent.zero_grad()
    slow, online = ([p.data for p in m.parameters()] for m in (agent.behaviour.slow_critic, agent.behaviour.critic))
    torch._foreach_lerp_(slow, online, agent.args.slow_rate)  # trap: without .data its graph grows with every update
    replay.write(index[1:], **{k: v.nan_to_num() for k, v in post.items()})  # D9; no NaN in rows a checkpoint counts on
    return metrics


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


@torch.no_grad()  # D9
def open_loop_video(agent: Agent, replay: SequenceReplay, args: Args, count: int = 4, context: int = 5) -> tuple:
    """Image errors, and GIF frames with rows truth, model, error for `count` replayed sequences: `context` steps from
    the posterior, the rest imagined with the recorded actions; below them the predicted reward and continue."""
    context, world, rssm = min(context, args.batch_length // 2), agent.world, agent.world.rssm
    batch, _ = replay.sample(count, args.batch_length + 1, online=False)
    batch = {k: v.to(world.bins.device) for k, v in batch.items()}
    rows, before = split_context({k: v[: context + 1] for k, v in batch.items()})
    deter, stoch, _ = rssm.observe(world.encoder(rows), **before)
    states, weights, actions = list(zip(deter, stoch)), rssm.scan_weights(deter.dtype), batch["action"][context:-1]
    for action, noise in zip(actions, rssm.noise(len(actions), count)):
        states.append(rssm.imagine_step(*weights, *states[-1], action, noise))
    deter, stoch = map(torch.stack, zip(*states))
    feat = torch.cat([deter, stoch], -1)
    return dream_video(batch["image"][1:] / 255, world.decoder.forward(deter, stoch)["image"], context,  # D11
                       reward=twohot_mean(world.reward(feat), world.bins), cont=world.cont(feat)[..., 0].sigmoid())


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
    may_be_zero = "seed learning_starts eval_every video_every eval_episodes warmup".split()  # D13
    for f in fields(args):
        value, least = getattr(args, f.name), int("int" in f.type and f.name not in may_be_zero)
        if type(value) in (int, float) and not least <= value <= 1e9:  # not bool; ale-py has 32-bit seeds
            fail(f"--{f.name.replace('_', '-')} must be a number from {least} to 1e9, got {value}")
    if args.batch_length == 1 or args.image_size % 16:  # D8, D11
        fail("--batch-length is at least 2 (the critic bootstraps from the next step), --image-size a multiple of 16")
    if args.train_ratio == 0 or max(args.gamma, args.lam, args.unimix, args.actor_unimix, args.sticky_actions) > 1:
        fail("--train-ratio must be positive; --gamma, --lam, --sticky-actions and the unimix shares are at most 1")
    return args


def replay_specs(shapes: dict, agent: Agent, args: Args) -> dict:  # D9
    """Fields of a replay row: name -> (shape, dtype). Nothing is lost: h in computation precision, z is one-hot."""
    flag, real, rssm = ((), torch.bool), torch.float32, agent.world.rssm
    obs = {k: (n, torch.uint8) if k == "image" else ((sum(n),), real) for k, n in shapes.items()}
    return dict(obs, reward=((), real), is_first=flag, is_last=flag, is_terminal=flag,
                action=((agent.behaviour.action_dim,), real), stoch=((rssm.stoch * rssm.classes,), torch.uint8),
                deter=((rssm.deter,), torch.bfloat16 if args.precision == "bf16" else real))


def main(args: Args) -> None:
    # ---- set-up: processes, device, environments, networks ----
    rank, world_size, device = start_ranks(args.device)
    cuda = device.type == "cuda"
    auto = dict(precision="bf16" if cuda else "fp32", compile="on" if cuda else "off",  # D11
                size="size12m" if cuda else "size1m")
    args = replace(args, action_repeat=args.action_repeat or (4 if args.env_id.startswith("ALE/") else 1),
                   **{k: v for k, v in auto.items() if getattr(args, k) == "auto"})
    if args.num_envs % world_size or args.batch_size % world_size:
        fail(f"--num-envs {args.num_envs} and --batch-size {args.batch_size} must be multiples of {world_size} ranks")
    num_envs, batch_size = args.num_envs // world_size, args.batch_size // world_size
    length = args.batch_length + 1  # D12: one row lends its latents and action
    saved = load_checkpoint(Path(args.resume)) if args.resume else None
    step, updates, learned = (saved[k] for k in ("step", "updates", "learned")) if saved else (0, 0, 0)
    envs = make_envs(args, num_envs, args.seed + rank * num_envs + step)  # after a resume other episodes than at first
    torch.manual_seed(args.seed)  # the same weights on every rank
    agent = Agent(envs.shapes, envs.action_dim, envs.discrete, args).to(device)
    if args.compile == "on":
        agent.compile_regions()
    optimizer = LaProp(agent.parameters(), args.lr, args.warmup, args.agc)  # D6

    # ---- the state of a run: everything that a checkpoint holds ----
    stamp = gather_ranks(torch.tensor([time.time_ns() // 1_000_000], device=device))[0]  # the same on all ranks
    run = Path(args.resume or f"{args.run_dir}/{run_name(args)}{stamp}")
    wanted = min(args.buffer_size, max(args.total_timesteps, length * args.num_envs))  # D9
    rows = saved["capacity"] if saved else -(-wanted // args.num_envs)
    if rows < length:  # D12
        fail(f"--batch-length {args.batch_length} needs {length} rows per environment, has {rows} (--buffer-size)")
    run.mkdir(parents=True, exist_ok=True)
    specs, folder = replay_specs(envs.shapes, agent, args), run / f"replay{rank}"
    replay = SequenceReplay(specs, rows, num_envs, device, folder, new=not saved)  # D9
    torch.manual_seed(args.seed + 1000 * rank + step)  # other noise on every rank
    if saved:
        try:
            agent.load_state_dict(saved["agent"])
        except RuntimeError as error:
            fail(f"the run has other networks than these flags make ({' '.join(str(error).split())[:200]})")
        optimizer.load_state_dict(saved["optimizer"])
        replay.load_state_dict(saved["replay"])
        if rank == 0:  # the others must not draw what it draws
            torch.set_rng_state(saved["rng"][0])
            if cuda and saved["rng"][1:]:
                torch.cuda.set_rng_state(saved["rng"][1], device)

    ratio = args.train_ratio / (args.batch_size * args.batch_length)  # D13
    if rank == 0:
        flags = json.dumps(asdict(args), indent=1)
        (run / "args.json").write_text(flags)
        (run / Path(__file__).name).write_bytes(Path(__file__).read_bytes())
        writer = SummaryWriter(str(run), purge_step=step + 1)  # without the points that a killed life left
        writer.add_text("hyperparameters", f"```\n{flags}\n```")
        counts = {name: sum(p.numel() for p in module.parameters() if p.requires_grad)
                  for part in agent.children() for name, module in part.named_children()}
        parts = ", ".join(f"{k} {v:,}" for k, v in counts.items() if v)
        print(f"run directory: {run}\ndevice: {device}, {args.precision}, compile {args.compile}, {args.size}\n"  # D11
              f"parameters: {sum(counts.values()):,} ({parts})\ngradient steps per policy step: {ratio:g} "
              f"(batch {args.batch_size} x {args.batch_length}, train ratio {args.train_ratio:g})")  # D13

    # ---- the loop: step all environments, act, store, learn ----
    def due(every: int) -> bool:
        return every > 0 and step // every > before // every or step >= args.total_timesteps

    stop, stopping, metrics, ret, first = stop_signals(), False, {}, math.nan, updates
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=rank > 0,
               mininterval=1 if sys.stderr.isatty() else 10)  # shows steps/s and the measured time left
    state, row = agent.initial(num_envs, device), envs.reset()
    enough = min(args.batch_size * args.batch_length, (rows - length + 1) * args.num_envs)  # D13, official: B*T
    enough = args.num_envs if args.learning_starts else enough
    while step < args.total_timesteps and not stopping:
        state = agent.act(row, state)  # D13
        state["action"] *= torch.as_tensor(~row["is_last"], device=device)[:, None]  # none follows an episode's end
        action = state["action"].cpu().numpy()  # before updates are queued: they run while the environment steps
        replay.add(row | state)  # D9, D12
        news = torch.tensor([(~row["is_first"]).sum(), len(stop), (replay.size - length + 1) * num_envs], device=device)
        decisions, stopping, starts = gather_ranks(news).view(-1, 3).sum(0).tolist()  # all ranks must agree
        before, step = step, step + decisions
        if starts >= enough and step >= args.learning_starts:  # D9, D13
            stored = replay.rows * args.num_envs  # one update first, then floor(new rows x ratio); `when.Ratio`
            count = int((stored - learned) * ratio) if updates else 1
            learned = learned + count / ratio if updates else stored  # the remainder is carried
            for _ in range(count):
                metrics = train_step(agent, optimizer, replay, batch_size)
            updates += count

        if rank == 0:
            for ret, steps in zip(envs.ret[row["is_last"]], envs.length[row["is_last"]]):
                tqdm.write(f"global_step={step}, episodic_return={ret:g}")
                log_results(writer, step, {"charts/episodic_return": ret, "charts/episodic_length": steps})
            bar.set_postfix(ret=f"{ret:.4g}", updates=updates, refresh=False)
            bar.update(step - before)
            if metrics and (due(args.save_every) or due(args.log_every) or stopping):  # one transfer to the host
                values = dict(zip(metrics, torch.stack([m.float() for m in metrics.values()]).tolist()))
                for name, value in values.items():
                    if name.startswith(("losses/", "grad/")) and not math.isfinite(value):
                        fail(f"{name} is {value} at step {step}; stopped, the last good checkpoint stays in {run}")
            if due(args.save_every) or stopping:
                save_checkpoint(run, args, agent, optimizer, replay, device, step=step, updates=updates,
                                learned=learned, capacity=rows)
            if due(args.log_every) and metrics:
                seconds = bar.format_dict["elapsed"]
                speed = {"charts/SPS": (step - bar.initial) / seconds, "charts/UPS": (updates - first) / seconds}
                log_results(writer, step, {**speed, "charts/frames": step * args.action_repeat, **values})
            with torch.random.fork_rng([device] if cuda else []):  # looking changes nothing
                if due(args.video_every) and "image" in replay.data and starts > 0 and not stopping:  # D9
                    log_results(writer, step, *open_loop_video(agent, replay, args))
                if due(args.eval_every) and args.eval_episodes and step < args.total_timesteps and not stopping:
                    log_results(writer, step, evaluate(agent, args, device, step))
        row = envs.step(action)
    bar.close()
    if rank == 0:
        if stopping:
            print(f"saved at step {step}; continue with --resume {run}")
        elif args.eval_episodes:  # also after the resume of a run that had ended
            log_results(writer, step, evaluate(agent, args, device, step))
        writer.close()
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(parse_args())
    except OSError as error:  # a full disk, a missing file of the replay
        fail(f"{error}; the last checkpoint is as it was")
