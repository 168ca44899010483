"""DreamerV2 in one file: learns a world model with discrete latents from pixels, and a policy inside its dreams.

Paper    Hafner et al., "Mastering Atari with Discrete World Models", ICLR 2021, arXiv:2010.02193v4
Code     compared number by number with danijar/dreamerv2 at commit 07d906e; parameter counts are equal

Run      python dreamer_v2.py --env-id ALE/Pong-v5                      released Atari settings: gray, sticky actions
         python dreamer_v2.py --preset tiny                             every phase in two minutes on a CPU
         python dreamer_v2.py --preset paper --env-id ALE/Breakout-v5   Table D.1 of the paper where the code differs
         python dreamer_v2.py --preset dmc --env-id shimmy:dm_control/walker-walk-v0     MUJOCO_GL=egl
         python dreamer_v2.py --resume auto                             go on after Ctrl-C, SIGTERM or a crash
         python dreamer_v2.py --resume runs/NAME --eval-episodes 100    a run that has ended is evaluated again

Index    One replay row t holds what arrived together:
            action_t -> obs_t  reward_t  is_first_t  is_last_t  is_terminal_t
            action_t is the one that led to obs_t (a_{t-1} in the paper); it is zero where is_first_t
         A training sequence is T rows of one episode. Its row 0 counts as is_first, so memory begins with zeros:
            h_t = f(h_{t-1}, z_{t-1}, action_t)       z_t ~ q(z_t | h_t, obs_t)       h, z, action zeroed at is_first_t
         In a dream, s_0 is a replayed state; reward and discount belong to the state itself:
            s_0 -a_1-> s_1 -a_2-> ... s_H             V_t = r_t + d_t ((1-lam) v_{t+1} + lam V_{t+1}), V_H = v_H
         a_{t+1}, chosen in s_t, gets V_{t+1}: r_t came before it. Hence H-1 actor terms and H critic terms.

Symbols  paper  code          shape                |  paper  code       shape
         x_t    obs           (T,B,Y,X,C)          |  a_t    action     (T,B,A)  one-hot, or in [-1, 1]
         h_t    deter         (T,B,D)              |  r_t    reward     (T,B)
         z_t    stoch         (T,B,S*K) one-hot    |  g_t    discount   (H+1,N)  gamma * p(going on)
         s_t    feat = [h,z]  (T,B,F)              |  v_t    slow_value (H+1,N)  target critic
         q, p   post_logits, prior_logits (T,B,S,K)|  V_t    target     (H,N)
         T time, B batch, H imagination, N rollouts = T*B (environments in section 4), S groups of K classes.
         Time is always the first axis. Some texts write s_t for the latent; here it is the pair {h_t, z_t}.
         The six parts: recurrent, representation and transition model (RSSM: z is S one-hot categoricals), image and
         reward predictor (Gaussians of variance 1, as the critic), discount predictor (Bernoulli with a soft label).
         rho = 1 is Reinforce (the default for discrete actions), rho = 0 dynamics back-propagation (continuous).

Delta    the first of the chain in this collection, so there is no delta list.

Differences from the official code, each on purpose:
         - float32 or bfloat16 instead of float16 with a loss scale;
         - feat is [h, z] (official [z, h]): the same networks with their input columns in another order;
         - no-ops at reset are 0..29 (official 1..30), drawn by ale-py;
         - --preset paper resizes 210x160 to 64x64 at once (paper: over 84x84), as the released code does;
         - the environment is not reset between the random actions and the policy; the first training makes 1 + pretrain
           updates (official: one more, to build the networks);
         - replay counts rows, resetting rows included, and drops an episode when its first row is overwritten;
         - logged losses are those of the last update; --preset paper keeps --discount-scale 5 (not in the paper).
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
@dataclass
class Args:
    """DreamerV2: world model, imagination and actor-critic in one file. Counts accept 1_000_000 and 1e6."""

    exp_name: str = "dreamer_v2"  # second part of the run directory's name
    env_id: str = "ALE/Pong-v5"  # any Gymnasium id, also module:Env-v0; what is not one image is rendered
    seed: int = 1  # seed of weights, environments and sampling
    # values for the flags left alone; default: released Atari; paper: Table D.1; dmc: released control from pixels
    preset: Literal["default", "tiny", "paper", "dmc"] = "default"
    total_timesteps: int = 50_000_000  # policy steps over all environments; x action repeat = frames (official: 200M)
    num_envs: int = 1  # parallel environments (official: 1)
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # weights stay fp32; auto: bf16 on CUDA (ours), else fp32
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile the steps and the large regions; auto: on CUDA only
    run_dir: str = "runs"  # where run directories go
    resume: str = ""  # run directory to continue, or auto: the newest one of this environment, name and seed
    save_every: int = 10_000  # policy steps between checkpoints
    eval_every: int = 250_000  # policy steps between evaluations (official); one at the end in any case
    eval_episodes: int = 10  # episodes per evaluation (official: 1); 0: none
    video_every: int = 50_000  # policy steps between open-loop videos; 0: one at the end
    log_every: int = 1_000  # policy steps between metric logs

    grayscale: bool = True  # Atari in gray (official)
    action_repeat: int | None = None  # environment steps per policy step; None: Atari 4, else 1 (official; control 2)
    sticky_actions: float = 0.25  # Atari: probability that a frame repeats the last action (official)
    full_action_space: bool = False  # Atari: all 18 actions (paper)
    # applied to replayed rewards, never to logged returns (official: tanh on Atari, identity for control)
    reward_transform: Literal["tanh", "identity"] = "tanh"

    buffer_size: int = 2_000_000  # replay rows over all environments (official); at most total_timesteps, also resumed
    learning_starts: int = 50_000  # policy steps with uniformly random actions before the first update (official)
    pretrain: int = 1  # additional updates at the first one (official)
    batch_size: int = 16  # sequences per update, B (official; paper: 50)
    batch_length: int = 50  # steps per sequence, T (official); episodes with fewer steps are never replayed
    prioritize_ends: bool = True  # replay the ends of episodes more often (official on Atari)
    train_every: int = 16  # policy steps per update (official; paper: 4)

    stoch: int = 32  # groups of latents, S (official)
    classes: int = 32  # classes per group, K (official)
    deter: int = 600  # width of h (official Atari)
    hidden: int = 600  # width of the RSSM's hidden layers (official Atari)
    cnn_depth: int = 48  # channels of the first convolution; doubled by each further one (official)
    layers: int = 4  # hidden layers of each head, actor and critic (official)
    units: int = 400  # width of those layers (official)
    kl_scale: float = 0.1  # weight of the KL, beta (official Atari; paper's tuning range 0.1, 0.3, 1, 3)
    kl_balance: float = 0.8  # share of the KL's gradient that trains the prior, alpha (official); 0.5: no balancing
    free_nats: float = 0.0  # KL, mean of the batch, below which it is not trained (official: 0 on Atari, 1 for control)
    pred_discount: bool = True  # predict episode ends, else the discount is always gamma (official on Atari)
    discount_scale: float = 5.0  # weight of the discount loss (official Atari)
    imag_horizon: int = 15  # imagined steps, H (official)
    gamma: float = 0.999  # discount (official Atari; paper: 0.995; its tuning range 0.99, 0.999)
    lam: float = 0.95  # lambda of the returns (official)
    # gradient of the actor; auto: reinforce for discrete, dynamics for continuous actions (official)
    actor_grad: Literal["auto", "reinforce", "dynamics", "both"] = "auto"
    rho: str = "0.9"  # share of Reinforce with --actor-grad both (official: 1 - actor_grad_mix); may be a schedule
    # entropy bonus (official Atari; range 3e-5 to 1e-3); or linear(a,b,n) warmup(n,a) exp(a,b,n) horizon(a,b,n)
    ent_coef: str = "1e-3"
    exact_trunc_grad: bool = False  # continuous actions: exact gradient of a sample instead of TensorFlow's (ours)
    slow_rate: float = 1.0  # step of the slow critic towards the critic (official)
    slow_every: int = 100  # updates between such steps; the first comes after the first update (official)
    model_lr: float = 2e-4  # learning rate of the world model (official Atari)
    actor_lr: float = 4e-5  # learning rate of the actor (official Atari)
    critic_lr: float = 1e-4  # learning rate of the critic (official Atari)
    adam_eps: float = 1e-5  # Adam's epsilon in Keras' form (official)
    weight_decay: float = 1e-6  # share of every weight that an update takes away, whatever the learning rate (official)
    grad_clip: float = 100.0  # gradient norm allowed per optimiser (official)


PRESETS = dict(
    default={},
    tiny=dict(
        deter=64, hidden=64, stoch=8, classes=8, cnn_depth=8, layers=2, units=64, total_timesteps=2_000,
        learning_starts=1_000, batch_size=8, batch_length=16, train_every=8, model_lr=1e-3, actor_lr=3e-4,
        critic_lr=3e-4, save_every=1_000, eval_every=0, video_every=0, log_every=100, eval_episodes=1),
    paper=dict(full_action_space=True, gamma=0.995, batch_size=50, train_every=4),
    dmc=dict(
        action_repeat=2, reward_transform="identity", grayscale=False, sticky_actions=0.0, eval_every=10_000,
        total_timesteps=1_000_000, learning_starts=1_000, pretrain=100, train_every=5, prioritize_ends=False,
        deter=200, hidden=200, kl_scale=1.0, free_nats=1.0, pred_discount=False, gamma=0.99, ent_coef="1e-4",
        model_lr=3e-4, actor_lr=8e-5, critic_lr=8e-5))


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


def kl_losses(post_logits: torch.Tensor, prior_logits: torch.Tensor, balance: float, free_nats: float) -> tuple:
    """(1-a) max(free, mean KL(q || sg p)) + a max(free, mean KL(sg q || p)), a scalar, and the KL (T,B). Algorithm 2.
    The stop-gradients let the first term train only the posterior, the second only the prior, faster: a = 0.8. The mean
    over the whole batch (all ranks) is compared with the free nats. a = 0.5 is the plain KL with its full gradient,
    each state compared on its own (official)."""
    post, prior = at_least_float32(post_logits).log_softmax(-1), at_least_float32(prior_logits).log_softmax(-1)
    if balance == 0.5:
        kl = categorical_kl(post, prior)
        return kl.clamp(min=free_nats).mean(), kl.detach()
    dyn, rep = categorical_kl(post.detach(), prior), categorical_kl(post, prior.detach())
    trained = gather_ranks(dyn.detach().mean()[None]).mean() >= free_nats
    rep_loss, dyn_loss = (torch.where(trained, kl.mean(), free_nats) for kl in (rep, dyn))
    return (1 - balance) * rep_loss + balance * dyn_loss, dyn.detach()


def lambda_return(reward: torch.Tensor, value: torch.Tensor, discount: torch.Tensor, lam: float) -> torch.Tensor:
    """V_t = r_t + d_t ((1-lam) v_{t+1} + lam V_{t+1}), V_H = v_H. Eq. 4 (arXiv:2010.02193v4).
    Inputs (H+1,...), result (H,...). Reward and discount are those of the state itself, index t. The paper prints
    V_H = r_H + d_H v_H, which counts r_H twice. Source: `common.lambda_return`, `ActorCritic.target`."""
    rets, step = [value[-1]], reward[:-1] + discount[:-1] * (1 - lam) * value[1:]
    for r, decay in zip(step.flip(0), (discount[:-1] * lam).flip(0)):
        rets.append(torch.addcmul(r, decay, rets[-1]))
    return torch.stack(rets[:0:-1])  # in order of time, without V_H


def normal_nll(mean: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-ln N(target; mean, 1), element by element: half the squared error and a constant."""
    return 0.5 * (at_least_float32(mean) - target).square() + 0.5 * math.log(2 * math.pi)


def schedule(text: str, step: int) -> float:
    """A number, or a schedule over policy steps: linear(from,to,steps), warmup(steps,value), exp(from,to,half-life),
    horizon(from,to,steps), a discount with linear horizon. ValueError for anything else. Source: `common.schedule`."""
    match = re.fullmatch(r"(linear|warmup|exp|horizon)\((.*)\)", text)
    if not match:
        return float(text)
    kind, values = match[1], [float(value) for value in match[2].split(",")]
    initial, final, steps = (0, *values[::-1]) if kind == "warmup" else values
    if kind == "exp":
        return (initial - final) * 0.5 ** (step / steps) + final
    mix = min(step / steps, 1)
    linear = (1 - mix) * initial + mix * final
    return 1 - 1 / linear if kind == "horizon" else linear


class TruncatedNormal:
    """Continuous policy: Normal(tanh m, 2 sigmoid(s / 2) + 0.1) cut to [-1, 1], over raw = [m, s] (...,2A).
    Its mode is the mean of the uncut one. Source: `common.TruncNormalDist`, `DistLayer`, TensorFlow Probability."""

    def __init__(self, raw: torch.Tensor, exact_grad: bool):
        mean, std = at_least_float32(raw).chunk(2, -1)
        self.mean, self.std, self.exact_grad = mean.tanh(), 2 * (std / 2).sigmoid() + 0.1, exact_grad
        self.low, self.high = (-1 - self.mean) / self.std, (1 - self.mean) / self.std
        self.mass = torch.special.ndtr(self.high) - torch.special.ndtr(self.low)

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """By inverse CDF from uniform noise. Trap: TensorFlow drops how the cut moves with mean and std, its gradient
        is 1 and (x - mean) / std; differentiating the inverse CDF (`exact_grad`) trains another actor."""
        unit = torch.special.ndtri(torch.special.ndtr(self.low) + noise * self.mass)
        x = self.mean + self.std * (unit if self.exact_grad else unit.detach())
        return x + (x.clamp(-1 + 1e-6, 1 - 1e-6) - x).detach()  # the clip passes the gradient on

    def log_prob(self, action: torch.Tensor) -> torch.Tensor:
        unit = (action - self.mean) / self.std
        return (-normal_nll(unit, 0.0) - self.std.log() - self.mass.log()).sum(-1)

    def entropy(self) -> torch.Tensor:
        low, high = (x * (-normal_nll(x, 0.0)).exp() for x in (self.low, self.high))
        constant = 0.5 * math.log(2 * math.pi * math.e)
        return (constant + (self.std * self.mass).log() + (low - high) / (2 * self.mass)).sum(-1)


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
    return Envs(args, num_envs, seed, 64, img_height=64, img_width=64, grayscale=args.grayscale,
                full_action_space=args.full_action_space)


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


class EpisodeReplay(Storage):
    """Chunks of finished episodes: an episode uniformly, so steps of short ones come more often, then a start in it.
    With `prioritize_ends` the start is min(randint(T - L + 1 + L), T - L): the last chunk of an episode of T rows has
    probability (L + 1) / (T + 1). Episodes with fewer than `length` steps, or more than fit, are `unusable`.
    Source: `common/replay.py`."""

    def __init__(self, *args, length: int, prioritize_ends: bool, **options):
        super().__init__(*args, **options)
        self.length, self.prioritize_ends, self.unusable = length, prioritize_ends, 0
        self.begun, self.episodes = [0] * self.num_envs, []  # (first row, rows, environment), the oldest first

    def add(self, row: dict) -> None:
        super().add(row)
        self.track(self.rows - 1, row["is_first"], row["is_last"])

    def track(self, number: int, is_first, is_last) -> None:
        """Note where episodes begin and end, by the flags (N,) of row `number`; forget those partly overwritten."""
        for env in range(self.num_envs):
            self.begun[env] = number if is_first[env] else self.begun[env]
            if is_last[env]:
                rows = number - self.begun[env] + 1
                if self.length < rows <= self.size:
                    self.episodes.append((self.begun[env], rows, env))
                    if self.episodes[-2:-1] > self.episodes[-1:]:  # that of another environment began later
                        self.episodes.sort()
                else:
                    self.unusable += 1
        while self.episodes and self.episodes[0][0] < self.rows - self.size:
            del self.episodes[0]

    def sample(self, batch_size: int) -> dict:
        """-> fields (length,batch_size,...) on the device; every row 0 is an episode's first, the chunks are whole."""
        episode, start = torch.rand((2, batch_size), dtype=torch.float64)
        episode = (episode * len(self.episodes)).long().tolist()
        first, rows, env = torch.tensor([self.episodes[i] for i in episode]).T
        last = rows - self.length
        start = (start * (last + 1 + (self.length if self.prioritize_ends else 0))).long().minimum(last)
        steps = first + start + torch.arange(self.length)[:, None]
        batch, _ = self.gather(steps.to(self.device), env.expand_as(steps).to(self.device))
        batch["is_first"][0] = True
        return batch

    def load_state_dict(self, state: dict) -> None:
        """Continue at a checkpoint. Episodes are found again by their flags: each rank has other rows."""
        super().load_state_dict(state)
        self.begun = [-math.inf] * self.num_envs  # the oldest rows may belong to an episode without its beginning
        rows = torch.arange(self.rows - self.size, self.rows)
        first, last = (self.files[k][rows % self.capacity] for k in ("is_first", "is_last"))
        for i in (first | last).any(-1).nonzero()[:, 0].tolist():
            self.track(int(rows[i]), first[i], last[i])


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


def init(layer: nn.Module) -> nn.Module:
    """Keras' initialisation: bias 0, weight Glorot uniform."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Linear(nn.Linear):
    """(...,in) -> (...,out) with Keras' initialisation."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        init(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def mlp(inputs: int, units: int, layers: int, outputs: int = 0) -> nn.Sequential:
    """`layers` x [linear, ELU], then a linear layer to `outputs`, if any; (...,inputs) -> (...,outputs)."""
    hidden = [m for i in range(layers) for m in (Linear(units if i else inputs, units), nn.ELU())]
    return nn.Sequential(*hidden, *([Linear(units, outputs)] if outputs else []))


class Encoder(nn.Module):
    """Images (T,B,64,64,C) uint8 -> tokens (T,B,E), E = 32 * depth, by 4 x [4x4 convolution of stride 2, ELU]."""

    def __init__(self, channels: int, depth: int):
        super().__init__()
        widths = [channels, depth, 2 * depth, 4 * depth, 8 * depth]
        self.convs = nn.ModuleList(init(nn.Conv2d(*pair, 4, stride=2)) for pair in zip(widths, widths[1:]))
        self.tokens = 2 * 2 * widths[-1]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image.flatten(0, 1).to(self.convs[0].weight.dtype) / 255 - 0.5
        x = x.permute(0, 3, 1, 2)
        for conv in self.convs:
            x = F.elu(conv(x))
        return x.permute(0, 2, 3, 1).flatten(1).unflatten(0, image.shape[:2])  # in Y,X,C order, as the official code


class Decoder(nn.Module):
    """Latents (T,B,D), (T,B,S*K) -> mean of the image, (T,B,64,64,C); the target is in [-0.5, 0.5]."""

    def __init__(self, channels: int, feat: int, depth: int):
        super().__init__()
        widths = [32 * depth, 4 * depth, 2 * depth, depth, channels]
        self.dense = Linear(feat, widths[0])
        layers = zip(widths, widths[1:], (5, 5, 6, 6))
        self.convs = nn.ModuleList(init(nn.ConvTranspose2d(*layer, stride=2)) for layer in layers)

    def forward(self, deter: torch.Tensor, stoch: torch.Tensor) -> torch.Tensor:
        x, first = self.dense(torch.cat([deter, stoch], -1)).flatten(0, -2), self.convs[0]  # no activation (official)
        # from 1x1 pixels the first one is a matrix product, and computed so it takes a quarter of the time on a CPU
        weight = first.weight.permute(0, 2, 3, 1)  # (in,5,5,out)
        x = linear(x, weight.flatten(1).T).unflatten(-1, weight.shape[1:]) + first.bias.to(x.dtype)
        x = x.permute(0, 3, 1, 2)
        for conv in self.convs[1:]:
            x = conv(F.elu(x))
        return x.permute(0, 2, 3, 1).unflatten(0, deter.shape[:-1])


# ======== 7. world model ========
class RSSM(nn.Module):
    """Recurrent state-space model: h_t = f(h, z, a), prior p(z_t | h_t), posterior q(z_t | h_t, tokens_t).
    What does not depend on the recurrence is taken out of the scan, with the same sums: the token part of the
    posterior's first layer, the action part of the cell's, the prior, all noise."""

    def __init__(self, deter, hidden, stoch, classes, action_dim, tokens):
        super().__init__()
        self.deter, self.stoch, self.classes = deter, stoch, classes
        self.img_in = Linear(stoch * classes + action_dim, hidden)
        self.gru, self.gru_norm = Linear(hidden + deter, 3 * deter), nn.LayerNorm(3 * deter, eps=1e-3)  # Keras' eps
        self.post_hid, self.post_out = mlp(deter + tokens, hidden, 1), Linear(hidden, stoch * classes)
        self.prior = nn.Sequential(*mlp(deter, hidden, 1, stoch * classes), nn.Unflatten(-1, (stoch, classes)))

    def noise(self, *lead: int) -> torch.Tensor:
        """Exp(1) for the samples of latents, (*lead,S,K)."""
        return torch.empty(*lead, self.stoch, self.classes, device=self.gru.bias.device).exponential_()

    def scan_weights(self, dtype: torch.dtype) -> dict:
        """name -> what a step multiplies with, (in,out), or adds, in computation precision, packed once per scan."""
        weights = dict(
            in_stoch=self.img_in.weight[:, : self.stoch * self.classes].T,
            gru=self.gru.weight.T, gru_bias=self.gru.bias,
            post_hid=self.post_hid[0].weight[:, : self.deter].T,
            post_out=self.post_out.weight.T, post_out_bias=self.post_out.bias)
        return {k: weight.to(dtype) for k, weight in weights.items()}

    def action_row(self, action: torch.Tensor) -> torch.Tensor:
        """The action's share of the cell's first layer, (...,A) -> (...,hidden)."""
        return F.linear(action, self.img_in.weight[:, self.stoch * self.classes :], self.img_in.bias)

    def core(self, weights: dict, deter: torch.Tensor, stoch: torch.Tensor, action_row: torch.Tensor) -> torch.Tensor:
        """h' = f(h, z, a), a GRU with layer norm: (B,D), (B,S*K), (B,hidden) -> (B,D). Source: `nets.GRUCell`.
        Trap: unlike torch's GRU cell one norm covers all gates, reset acts on the whole candidate, update on the new
        value, and it starts at sigmoid(-1)."""
        x = F.elu(torch.addmm(action_row, stoch, weights["in_stoch"]))
        gates = torch.addmm(weights["gru_bias"], torch.cat([x, deter], -1), weights["gru"])
        reset, cand, update = self.gru_norm(at_least_float32(gates)).to(x.dtype).chunk(3, -1)
        cand = torch.tanh(reset.sigmoid() * cand)
        return torch.lerp(deter, cand, (update - 1).sigmoid())  # u * cand + (1 - u) * h

    def observe_step(self, weights: dict, deter, stoch, action_row, token_row, noise) -> tuple:
        """One posterior step: (B,D), (B,S*K), rows (B,hidden) twice, noise (B,S,K) -> h', z', logits (B,S,K)."""
        deter = self.core(weights, deter, stoch, action_row)
        x = self.post_hid[1](torch.addmm(token_row, deter, weights["post_hid"]))
        logits = torch.addmm(weights["post_out_bias"], x, weights["post_out"]).unflatten(-1, (self.stoch, self.classes))
        stoch = sample_onehot(at_least_float32(logits).softmax(-1), noise).to(deter.dtype).flatten(1)
        return deter, stoch, logits

    def observe(self, tokens, prev_action, is_first, deter, stoch) -> tuple:
        """Posterior of a sequence: tokens (T,B,E), prev_action (T,B,A), is_first (T,B), carry h (B,D), z (B,S*K)
        -> h (T,B,D), z (T,B,S*K), logits (T,B,S,K). With T = 1 it is the policy's step."""
        dtype, weights = tokens.dtype, self.scan_weights(tokens.dtype)
        keep = (~is_first).to(dtype)[..., None]  # trap: h, z and the previous action all start from zero in an episode
        action_rows = self.action_row(prev_action.to(dtype) * keep)
        token_rows = linear(tokens, self.post_hid[0].weight[:, self.deter :], self.post_hid[0].bias)
        deter, stoch, outs = deter.to(dtype), stoch.to(dtype), []
        # unbind: the backward pass of rows[t] would write a full-size gradient for every t
        for k, *rows in zip(keep.unbind(), action_rows.unbind(), token_rows.unbind(), self.noise(*is_first.shape)):
            deter, stoch, logits = self.observe_step(weights, deter * k, stoch * k, *rows)
            outs.append((deter, stoch, logits))
        return tuple(map(torch.stack, zip(*outs)))

    def imagine_step(self, weights: dict, deter, stoch, action, noise) -> tuple:
        """One step without observation: (N,D), (N,S*K), action (N,A), noise (N,S,K) -> h', z' ~ p(z' | h')."""
        deter = self.core(weights, deter, stoch, self.action_row(action.to(deter.dtype)))
        return deter, sample_onehot(at_least_float32(self.prior(deter)).softmax(-1), noise).to(deter.dtype).flatten(1)


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward and discount heads."""

    def __init__(self, shapes: dict, action_dim: int, args: Args):
        super().__init__()
        channels, latent = shapes["image"][-1], args.stoch * args.classes
        self.args, self.feat = args, args.deter + latent
        self.encoder = Encoder(channels, args.cnn_depth)
        self.rssm = RSSM(args.deter, args.hidden, args.stoch, args.classes, action_dim, self.encoder.tokens)
        self.decoder = Decoder(channels, self.feat, args.cnn_depth)
        self.reward = mlp(self.feat, args.units, args.layers, 1)
        self.discount = mlp(self.feat, args.units, args.layers, 1) if args.pred_discount else None

    def predict_discount(self, feat: torch.Tensor) -> torch.Tensor:
        """gamma * p(the episode goes on) in states (...,F), (...); the head has gamma in its target already."""
        if self.discount is None:
            return torch.full(feat.shape[:-1], self.args.gamma, device=feat.device)
        return at_least_float32(self.discount(feat))[..., 0].sigmoid()

    def loss(self, rows: dict) -> tuple[torch.Tensor, dict, dict]:
        """Replay rows (T,B,...) -> scalar loss, posterior {deter, stoch} (T,B,...), metrics.
        Minus the evidence lower bound, Eq. 2 (arXiv:2010.02193v4), each term with its scale, averaged over T and B."""
        tokens, rssm = self.encoder(rows["image"]), self.rssm
        zero = tokens.new_zeros(tokens.shape[1], self.feat)  # row 0 is_first: there is no memory before it
        deter, stoch, post_logits = rssm.observe(
            tokens, rows["action"], rows["is_first"], zero[:, : rssm.deter], zero[:, rssm.deter :])
        prior_logits = rssm.prior(deter)
        kl_loss, kl = kl_losses(post_logits, prior_logits, self.args.kl_balance, self.args.free_nats)
        feat = torch.cat([deter, stoch], -1)
        reward = rows["reward"].tanh() if self.args.reward_transform == "tanh" else rows["reward"]
        pixels = rows["image"].to(reward.dtype) / 255 - 0.5
        losses = dict(kl=kl_loss, image=normal_nll(self.decoder(deter, stoch), pixels).flatten(2).sum(-1).mean(),
                      reward=normal_nll(self.reward(feat)[..., 0], reward).mean())
        if self.discount is not None:
            # soft target: the head learns gamma * (1 - is_terminal), so a dream needs no other discount
            target = (1 - rows["is_terminal"].to(reward.dtype)) * self.args.gamma
            logits = at_least_float32(self.discount(feat))[..., 0]
            losses["discount"] = F.binary_cross_entropy_with_logits(logits, target)
        scales = dict(kl=self.args.kl_scale, discount=self.args.discount_scale)  # all others 1
        total = sum(scales.get(k, 1.0) * v for k, v in losses.items())
        metrics = {"wm/kl": kl.mean(), **{f"losses/{k}": v.detach() for k, v in losses.items()}}
        for name, logits in (("post", post_logits), ("prior", prior_logits)):
            metrics[f"wm/{name}_entropy"] = entropy(at_least_float32(logits.detach()).log_softmax(-1)).sum(-1).mean()
        return total, dict(deter=deter.detach(), stoch=stoch.detach()), metrics


# ======== 8. behaviour ========
class Behaviour(nn.Module):
    """Actor, critic and slow critic on feat = [h, z], trained in dreams. Source: `ActorCritic`."""

    def __init__(self, feat: int, action_dim: int, discrete: bool, args: Args):
        super().__init__()
        self.args, self.discrete, self.action_dim = args, discrete, action_dim
        auto = "reinforce" if discrete else "dynamics"
        self.actor_grad = auto if args.actor_grad == "auto" else args.actor_grad
        outs = [Linear(args.units, action_dim) for _ in range(1 if discrete else 2)]  # logits, or mean and std
        self.actor = nn.ModuleList([mlp(feat, args.units, args.layers), *outs])
        self.critic = mlp(feat, args.units, args.layers, 1)
        self.slow_critic = mlp(feat, args.units, args.layers, 1).requires_grad_(False)  # own weights until update 1
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def noise(self, *lead: int) -> torch.Tensor:
        """What `sample` consumes, (*lead,A): Exp(1) for a categorical race, uniform for an inverse CDF."""
        noise = torch.empty(*lead, self.action_dim, device=self.updates.device)
        return noise.exponential_() if self.discrete else noise.uniform_(1e-6, 1 - 1e-6)

    def policy(self, feat: torch.Tensor) -> torch.Tensor | TruncatedNormal:
        """Log-probabilities (...,A) of one-hot actions, or a distribution of continuous ones."""
        hidden, *outs = self.actor
        x = hidden(feat)
        raw = at_least_float32(torch.cat([out(x) for out in outs], -1))
        return raw.log_softmax(-1) if self.discrete else TruncatedNormal(raw, self.args.exact_trunc_grad)

    def sample(self, feat: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Actions (...,A) of the policy; its mode in evaluation (`agent.eval()`), as the official code."""
        policy = self.policy(feat)
        if self.discrete:
            return sample_onehot(policy.exp(), noise if self.training else torch.ones_like(noise))
        return policy.sample(noise) if self.training else policy.mean

    def random_action(self, num_envs: int, device: torch.device) -> torch.Tensor:
        """Uniform actions (N,A)."""
        if self.discrete:
            return F.one_hot(torch.randint(self.action_dim, (num_envs,), device=device), self.action_dim).float()
        return torch.empty(num_envs, self.action_dim, device=device).uniform_(-1, 1)

    def imagine(self, rssm: RSSM, deter, stoch) -> tuple[torch.Tensor, torch.Tensor]:
        """Roll the policy out from (N,D), (N,S*K) -> feat (H+1,N,F), action (H,N,A); action[k] leads to feat[k+1].
        The policy sees states without gradient: an action moves later states, not the view that later actions take."""
        lead, weights = (self.args.imag_horizon, len(deter)), rssm.scan_weights(deter.dtype)
        feats, actions = [torch.cat([deter, stoch], -1)], []
        for action_noise, stoch_noise in zip(self.noise(*lead), rssm.noise(*lead)):
            actions.append(self.sample(feats[-1].detach(), action_noise))
            deter, stoch = rssm.imagine_step(weights, deter, stoch, actions[-1], stoch_noise)
            feats.append(torch.cat([deter, stoch], -1))
        return torch.stack(feats), torch.stack(actions)

    def loss(self, world: WorldModel, post: dict, rows: dict, coefs: torch.Tensor) -> tuple[dict, dict]:
        """Actor and critic loss from the posterior (T,B,...) of replayed rows, coefs [entropy bonus, rho]; metrics.
        Both minimised, Eq. 5, 6 (arXiv:2010.02193v4), eta is the entropy bonus, w_t the product of discounts before t:
        policy  -w_t (rho ln pi(a_{t+1} | s_t) sg(V_{t+1} - v_t) + (1 - rho) V_{t+1} + eta H(pi(. | s_t))), t = 0..H-2
        value    w_t 1/2 (v_t - sg V_t)^2 and a constant, t = 0..H-1
        Every state starts one dream, terminal ones too: their discount 0 leaves them their first target only."""
        with torch.set_grad_enabled(self.actor_grad != "reinforce"):  # Reinforce needs no gradient through the dream
            feat, action = self.imagine(world.rssm, post["deter"].flatten(0, 1), post["stoch"].flatten(0, 1))
            reward, slow_value = (at_least_float32(net(feat))[..., 0] for net in (world.reward, self.slow_critic))
            discount = world.predict_discount(feat)
            if world.discount is not None:  # known for the replayed state: no dream beyond an episode's end
                known = (1 - rows["is_terminal"].flatten().to(discount.dtype)) * self.args.gamma
                discount = torch.cat([known[None], discount[1:]])
            target = lambda_return(reward, slow_value, discount, self.args.lam)
        weight = torch.cat([torch.ones_like(discount[:1]), discount[:-1]]).cumprod(0).detach()  # 1, d_0, d_0 d_1, ...

        policy, action = self.policy(feat[:-2].detach()), action[:-1].detach()  # whether they carry a gradient or not
        if self.discrete:
            bonus, log_prob = entropy(policy), (policy * action).sum(-1)
        else:
            bonus, log_prob = policy.entropy(), policy.log_prob(action)
        # trap: V_{t+1} against v_t is meant so; a_{t+1}, chosen in s_t, cannot change r_t, which is part of V_t
        advantage = (target[1:] - slow_value[:-2]).detach()
        rho = dict(reinforce=1, dynamics=0, both=coefs[1])[self.actor_grad]
        objective = rho * log_prob * advantage + (1 - rho) * target[1:]
        value = at_least_float32(self.critic(feat[:-1].detach()))[..., 0]
        losses = dict(policy=-(weight[:-2] * (objective + coefs[0] * bonus)).mean(),
                      value=(weight[:-1] * normal_nll(value, target.detach())).mean())
        metrics = {"losses/policy": losses["policy"], "losses/value": losses["value"], "ac/entropy": bonus.mean(),
                   "ac/target": target.mean(), "ac/value": value.mean(), "ac/slow_value": slow_value.mean(),
                   "ac/advantage_abs": advantage.abs().mean(), "ac/imag_reward": reward.mean(),
                   "ac/imag_discount": discount.mean(), "ac/ent_coef": coefs[0]}
        return losses, {k: v.detach() for k, v in metrics.items()}

    @torch.no_grad()
    def update_slow_critic(self) -> None:
        """slow <- (1 - rate) slow + rate critic after update 1 + n every; after the first a full copy."""
        rate = torch.where(self.updates == 0, 1.0, self.args.slow_rate * (self.updates % self.args.slow_every == 0))
        for slow, online in zip(self.slow_critic.parameters(), self.critic.parameters()):
            slow.lerp_(online, rate)
        self.updates += 1


# ======== 9. update ========
class Adam:
    """Adam in Keras' form after global-norm clipping, with weight decay that ignores the learning rate.
    w *= 1 - decay;  m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  w -= lr sqrt(1-b2^k)/(1-b1^k) m / (sqrt(v) + eps).
    Trap: torch divides by sqrt(v / (1-b2^k)) + eps, AdamW's decay is lr times smaller. Source: `common.Optimizer`."""

    def __init__(self, params, lr: float, eps: float, clip: float, decay: float, beta1=0.9, beta2=0.999):
        self.params = list(params)
        self.lr, self.eps, self.clip, self.decay, self.beta1, self.beta2 = lr, eps, clip, decay, beta1, beta2
        self.count = torch.zeros((), device=self.params[0].device)
        self.square, self.momentum = ([torch.zeros_like(p) for p in self.params] for _ in range(2))

    def step(self, loss: torch.Tensor) -> torch.Tensor:
        """One update of these parameters only, whatever else the loss depends on -> gradient norm before clipping."""
        grads = torch.autograd.grad(loss, self.params)
        with torch.no_grad():
            average_ranks(grads)
            norm = torch.stack(torch._foreach_norm(grads)).norm()
            grads = torch._foreach_mul(grads, (self.clip / norm).clamp(max=1))
            self.count += 1
            correct1, correct2 = (-torch.expm1(self.count * math.log(b)) for b in (self.beta1, self.beta2))  # 1 - b^k
            torch._foreach_lerp_(self.momentum, grads, 1 - self.beta1)
            torch._foreach_mul_(self.square, self.beta2)
            torch._foreach_addcmul_(self.square, grads, grads, 1 - self.beta2)
            scale = torch._foreach_add(torch._foreach_sqrt(self.square), self.eps)
            torch._foreach_mul_(self.params, 1 - self.decay)
            change = torch._foreach_div(self.momentum, scale)
            torch._foreach_sub_(self.params, torch._foreach_mul(change, self.lr * correct2.sqrt() / correct1))
        return norm

    def state_dict(self) -> dict:
        return dict(state=[self.count, *self.square, *self.momentum])

    def load_state_dict(self, saved: dict) -> None:
        torch._foreach_copy_(self.state_dict()["state"], saved["state"])


class Optimizers:
    """Three Adams, one per loss, so that no loss moves another's parameters."""

    def __init__(self, agent: Agent, args: Args):
        parts = dict(model=(agent.world, args.model_lr), actor=(agent.behaviour.actor, args.actor_lr),
                     critic=(agent.behaviour.critic, args.critic_lr))
        self.parts = {name: Adam(net.parameters(), lr, args.adam_eps, args.grad_clip, args.weight_decay)
                      for name, (net, lr) in parts.items()}

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, saved: dict) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])


class Agent(nn.Module):
    """World model and behaviour: the policy for the environment, and what an update trains."""

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
    def act(self, row: dict, state: dict) -> dict:
        """Row (N,...) and state -> new {deter, stoch, action}; the latent is sampled in evaluation too (official)."""
        obs = {k: torch.as_tensor(v, device=state["deter"].device)[None] for k, v in row.items()}
        with autocast(self.args, state["deter"].device):
            (deter,), (stoch,), _ = self.world.rssm.observe(
                self.world.encoder(obs["image"]), state["action"][None], obs["is_first"], state["deter"],
                state["stoch"])
            action = self.behaviour.sample(torch.cat([deter, stoch], -1), self.behaviour.noise(len(deter)))
        return dict(deter=deter, stoch=stoch, action=action)

    def compile_regions(self) -> None:
        """The steps and the decoder. Not the unrolled scan (minutes, no faster), not encoder and heads (no gain)."""
        rssm = self.world.rssm
        rssm.observe_step = torch.compile(rssm.observe_step, dynamic=False)
        rssm.imagine_step = torch.compile(rssm.imagine_step, dynamic=False)
        self.world.decoder.compile(dynamic=False)


def train_step(agent: Agent, optimizer: Optimizers, replay: EpisodeReplay, batch_size: int, coefs) -> dict:
    """One update: sample, world model, then actor and critic in dreams of the new world model. No host reads;
    coefs [entropy bonus, rho] (2,) -> metrics ()."""
    rows = {k: v.to(coefs.device, non_blocking=True) for k, v in replay.sample(batch_size).items()}
    with autocast(agent.args, coefs.device):
        loss, post, metrics = agent.world.loss(rows)
    metrics["grad/model_norm"] = optimizer.parts["model"].step(loss)
    with autocast(agent.args, coefs.device):  # the states are those from before the world model's step (official)
        losses, ac_metrics = agent.behaviour.loss(agent.world, post, rows, coefs)
    metrics.update(ac_metrics)
    metrics["grad/actor_norm"] = optimizer.parts["actor"].step(losses["policy"])
    metrics["grad/critic_norm"] = optimizer.parts["critic"].step(losses["value"])
    agent.behaviour.update_slow_critic()
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


@torch.no_grad()
def open_loop_video(agent: Agent, replay: EpisodeReplay, args: Args, count: int = 4, context: int = 5) -> tuple:
    """Image errors, and GIF frames with rows truth, model, error for `count` replayed sequences: `context` steps from
    the posterior, the rest imagined with the recorded actions; below them the predicted reward and discount."""
    context, world, rssm = min(context, args.batch_length // 2), agent.world, agent.world.rssm
    start = agent.initial(count, rssm.gru.bias.device)
    batch = {k: v.to(rssm.gru.bias.device) for k, v in replay.sample(count).items()}
    tokens, actions = world.encoder(batch["image"][:context]), batch["action"]
    deter, stoch, _ = rssm.observe(
        tokens, actions[:context], batch["is_first"][:context], start["deter"], start["stoch"])
    states, weights, actions = list(zip(deter, stoch)), rssm.scan_weights(deter.dtype), actions[context:]
    for action, noise in zip(actions, rssm.noise(len(actions), count)):
        states.append(rssm.imagine_step(weights, *states[-1], action, noise))
    deter, stoch = map(torch.stack, zip(*states))
    feat = torch.cat([deter, stoch], -1)
    return dream_video(batch["image"] / 255, (world.decoder.forward(deter, stoch) + 0.5).clamp(0, 1), context,
                       reward=world.reward(feat)[..., 0], discount=world.predict_discount(feat))


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
    may_be_zero = "seed learning_starts eval_every video_every eval_episodes pretrain".split()
    for f in fields(args):
        value, least = getattr(args, f.name), int("int" in f.type and f.name not in may_be_zero)
        if type(value) in (int, float) and not least <= value <= 1e9:  # not bool; ale-py has 32-bit seeds
            fail(f"--{f.name.replace('_', '-')} must be a number from {least} to 1e9, got {value}")
    for name, most in dict(ent_coef=math.inf, rho=1).items():
        try:
            values = [schedule(getattr(args, name), step) for step in (0, args.total_timesteps)]
        except (ValueError, ArithmeticError):
            values = [math.nan]
        if not all(0 <= value <= most and value < math.inf for value in values):
            fail(f"--{name.replace('_', '-')} must be a number (rho: 0 to 1) or a schedule such as "
                 f"linear(1e-3,1e-4,1e6), got {getattr(args, name)!r}")
    if min(args.imag_horizon, args.batch_length) < 2 or args.grad_clip == 0:
        fail("--imag-horizon (H steps give H - 1 actor terms) and --batch-length are at least 2, --grad-clip positive")
    if max(args.gamma, args.lam, args.kl_balance, args.slow_rate, args.sticky_actions) > 1:
        fail("--gamma, --lam, --kl-balance, --slow-rate and --sticky-actions are at most 1")
    return args


def replay_specs(shapes: dict, agent: Agent, args: Args) -> dict:
    """Fields of a replay row: name -> (shape, dtype)."""
    flag, number = ((), torch.bool), torch.float32
    obs = dict(image=(shapes["image"], torch.uint8))
    return dict(obs, reward=((), number), is_first=flag, is_last=flag, is_terminal=flag,
                action=((agent.behaviour.action_dim,), number))


def main(args: Args) -> None:
    # ---- set-up: processes, device, environments, networks ----
    rank, world_size, device = start_ranks(args.device)
    cuda = device.type == "cuda"
    auto = dict(precision="bf16" if cuda else "fp32", compile="on" if cuda else "off")
    args = replace(args, action_repeat=args.action_repeat or (4 if args.env_id.startswith("ALE/") else 1),
                   **{k: v for k, v in auto.items() if getattr(args, k) == "auto"})
    if args.num_envs % world_size or args.batch_size % world_size:
        fail(f"--num-envs {args.num_envs} and --batch-size {args.batch_size} must be multiples of {world_size} ranks")
    num_envs, batch_size = args.num_envs // world_size, args.batch_size // world_size
    length = args.batch_length
    saved = load_checkpoint(Path(args.resume)) if args.resume else None
    step, updates, learned = (saved[k] for k in ("step", "updates", "learned")) if saved else (0, 0, 0)
    envs = make_envs(args, num_envs, args.seed + rank * num_envs + step)  # after a resume other episodes than at first
    torch.manual_seed(args.seed)  # the same weights on every rank
    agent = Agent(envs.shapes, envs.action_dim, envs.discrete, args).to(device)
    if args.compile == "on":
        agent.compile_regions()
    optimizer = Optimizers(agent, args)

    # ---- the state of a run: everything that a checkpoint holds ----
    stamp = gather_ranks(torch.tensor([time.time_ns() // 1_000_000], device=device))[0]  # the same on all ranks
    run = Path(args.resume or f"{args.run_dir}/{run_name(args)}{stamp}")
    total = args.total_timesteps + args.total_timesteps // length + args.num_envs  # and the rows that reset
    wanted = min(args.buffer_size, max(total, (length + 1) * args.num_envs))
    rows = saved["capacity"] if saved else -(-wanted // args.num_envs)
    if rows <= length:
        fail(f"--batch-length {length} needs {length + 1} rows per environment, has {rows} (--buffer-size)")
    run.mkdir(parents=True, exist_ok=True)
    specs, folder = replay_specs(envs.shapes, agent, args), run / f"replay{rank}"
    replay = EpisodeReplay(specs, rows, num_envs, device, folder, new=not saved,
                           length=length, prioritize_ends=args.prioritize_ends)
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

    ratio = 1 / args.train_every
    if rank == 0:
        flags = json.dumps(asdict(args), indent=1)
        (run / "args.json").write_text(flags)
        (run / Path(__file__).name).write_bytes(Path(__file__).read_bytes())
        writer = SummaryWriter(str(run), purge_step=step + 1)  # without the points that a killed life left
        writer.add_text("hyperparameters", f"```\n{flags}\n```")
        counts = {name: sum(p.numel() for p in module.parameters() if p.requires_grad)
                  for part in agent.children() for name, module in part.named_children()}
        parts = ", ".join(f"{k} {v:,}" for k, v in counts.items() if v)
        print(f"run directory: {run}\ndevice: {device}, {args.precision}, compile {args.compile}\n"
              f"parameters: {sum(counts.values()):,} ({parts})\ngradient steps per policy step: {ratio:g} "
              f"(batch {args.batch_size} x {args.batch_length}, after {args.learning_starts:,} random steps)")

    # ---- the loop: step all environments, act, store, learn ----
    def due(every: int) -> bool:
        return every > 0 and step // every > before // every or step >= args.total_timesteps

    stop, stopping, metrics, ret, first = stop_signals(), False, {}, math.nan, updates
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=rank > 0,
               mininterval=1 if sys.stderr.isatty() else 10)  # shows steps/s and the measured time left
    state, row = agent.initial(num_envs, device), envs.reset()
    while step < args.total_timesteps and not stopping:
        replay.add(row | dict(action=state["action"]))  # that led here
        if step < args.learning_starts or not updates:
            state = dict(agent.initial(num_envs, device), action=agent.behaviour.random_action(num_envs, device))
        else:
            state = agent.act(row, state)
        state["action"] *= torch.as_tensor(~row["is_last"], device=device)[:, None]  # none follows an episode's end
        action = state["action"].cpu().numpy()
        news = torch.tensor([(~row["is_first"]).sum(), bool(stop), bool(replay.episodes)], device=device)
        decisions, stopping, ready = gather_ranks(news).view(-1, 3).sum(0).tolist()  # all ranks must agree
        before, step = step, step + decisions
        if ready == world_size and step >= args.learning_starts:
            # 1 + pretrain updates at first, then floor(new steps x ratio), the remainder carried
            count = int((step - learned) * ratio) if updates else 1 + args.pretrain
            learned = learned + count / ratio if updates else step
            coefs = torch.tensor([schedule(text, step) for text in (args.ent_coef, args.rho)]).to(device)
            for _ in range(count):
                metrics = train_step(agent, optimizer, replay, batch_size, coefs)
            updates += count
        elif step >= args.learning_starts and replay.unusable >= 100 and not (replay.episodes or updates):
            fail(f"none of {replay.unusable} episodes can be replayed: shorter than --batch-length {length}, or "
                 f"longer than the replay of {rows} rows")

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
                if due(args.video_every) and replay.episodes and not stopping:
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
