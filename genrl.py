"""GenRL in one file: learn a world model from video, tie it to a vision-language model, act from a prompt.

Paper  Mazzaglia et al., "GenRL: Multimodal-foundation world models for generalization in embodied agents",
       NeurIPS 2024, arXiv:2406.18043
Code   checked against mazpie/genrl at 4cd8394: same parameter counts, same losses (tests/golden)

    python genrl.py --env-id ALE/Pong-v5 --prompt "a paddle hitting the ball"
    python genrl.py --env-id dm_control/walker-walk-v0 --data-dir episodes    # bring a dataset
    python genrl.py --resume runs/NAME --prompt dance.gif     # same world model, new prompt: a video
    python genrl.py --preset tiny                 # every phase once, two minutes on a CPU

Phases: collect (Plan2Explore) -> embed clips with the frozen VLM -> pre-train -> prompt -> dream -> evaluate.
How the pieces fit (T time, B batch, H imagination, N dreams; time is always axis 0):

    obs_t --Encoder--> tokens_t --posterior--> q(s_t | obs_t)       sees the image only
    h_{t-1}, s_{t-1}, prev_action_t --RSSM.core--> h_t --prior--> p(s_t | h_t)
    s_t --> Decoder p(obs_t | s_t)        sees the sample only: s_t alone says what an image shows
    s_{t-1}, e_t, own h --Connector--> p(s_t | s_{t-1}, e)    the same s, from an embedding
    text --VLM--> e --Aligner--> e as of a video --Connector--> target s_0 .. s_H
    reward of a dream: how much its s_t resemble the target's     (similarity, align_target)

Which obs, action, reward and embedding share an index. A replay row t holds

    prev_action_t -> obs_t  reward_t  is_first_t  is_last_t  is_terminal_t  vl_embed_t = VLM(obs_{t-7..t})

A training sequence is T rows of one episode; it starts with h = s = 0. Its clip i is rows 8i .. 8i+7, and
vl_embed_{8i+7} stands for all of them. In a dream V_t = r_t + gamma ((1-lam) v_{t+1} + lam V_{t+1}).

Names: deter h, stoch s, feat = [h, s], post_logits q, prior_logits p, vl_embed e, ret V, target what the
prompt asks for. Axes: T time, B batch, H imagination, N dreams, S groups of K classes, D width of h, E of e,
U of an image's tokens, A action.

What changes from DreamerV3: posterior and decoder without h; no continue head, and the reward head is only
logged; the dream's reward comes from the prompt; gradients through the dream for continuous actions.
Differences from the official code: the connector has no 8 dead inputs; Plan2Explore has this file's networks,
batch and return scale, not DreamerV2's, and its world model is kept; starts are uniform over all rows; a
running episode is replayed too; rows before the first whole clip are never a label; bfloat16, not float16;
CLIP instead of InternVideo2 by default (untested in the paper: it sees single frames); discrete actions by
Reinforce, whose advantage is detached; feat is [h, s], not [s, h].
SPDX-License-Identifier: MIT
"""
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6", "gymnasium>=1.3", "ale-py>=0.12.1", "tyro>=1.0", "tensorboard>=2.16", "tqdm>=4.60",
#     "sentence-transformers>=5.0",
# ]
# ///
from __future__ import annotations

import ctypes
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
import textwrap
import time
import urllib.error
import urllib.request
import uuid
import zipfile
import zlib
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
from gymnasium.spaces import Box, Discrete, flatdim
from PIL import Image, ImageDraw, ImageSequence
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import Summary
from tqdm import tqdm

# ======== 1. arguments ========
CLIP = 8  # frames that the VLM sees at once, and steps of a target that are aligned (official)


@dataclass
class Args:
    # run
    exp_name: str = "genrl"  # second part of the run directory's name
    env_id: str = "ALE/Pong-v5"  # any Gymnasium id, also module:Env-v0; what is no image is rendered
    seed: int = 1  # seed of weights, environments and sampling
    preset: Literal["default", "tiny", "paper"] = "default"  # paper: official numbers of updates; tiny: quick
    total_timesteps: int = 10_000  # policy steps of collection (paper: datasets of 2 to 4 million)
    pretrain_updates: int = 5_000  # updates of world model and connector (official: 500_000); 0: skip
    policy_updates: int = 2_000  # updates of actor and critic (official: 50_000); 0: skip
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on CUDA (official: fp16)
    compile: Literal["auto", "on", "off"] = "auto"  # auto: CUDA graphs of updates; on: torch.compile too
    run_dir: str = "runs"  # where run directories go
    resume: str = ""  # run directory to continue, or auto: the newest one of this environment, name and seed
    save_every: int = 2_000  # steps of a phase between checkpoints
    eval_every: int = 0  # policy updates between evaluations (official: 5_000); 0: only one at the end
    eval_episodes: int = 10  # episodes per evaluation (official); 0: none
    video_every: int = 1_000  # updates between GIFs; 0: only at the ends of phases
    log_every: int = 100  # steps of a phase between metric logs
    # environment
    num_envs: int = 1  # parallel environments (official: 1)
    action_repeat: int = 0  # environment steps per policy step; 0: Atari 4, dm_control 2 (official), else 1
    sticky_actions: float = 0.25  # Atari: probability that a frame repeats the last action
    # data
    data_dir: str = ""  # folder of episode files in the official format; replaces collection
    write_episodes: bool = False  # write the replay as such files to episodes0/ in the run directory
    buffer_size: int = 20_000_000  # replay rows (official)
    collect_policy: Literal["plan2explore", "random"] = "plan2explore"  # who acts, after --learning-starts
    learning_starts: int = 2_500  # random policy steps before Plan2Explore begins (official: 2_000)
    train_every: int = 5  # policy steps per update during collection (official)
    # prompt
    vlm: str = "clip-ViT-B-32"  # sentence-transformers model, FILE.py:FACTORY, or random: no meaning
    prompt: str = ""  # text, or a .png .jpg .webp .gif .npy file; empty: the environment's own
    # world model
    batch_size: int = 48  # sequences per update, B (official)
    batch_length: int = 48  # steps per sequence, T, whole clips of 8 (official)
    hidden: int = 1024  # width of h and of all hidden layers (official)
    stoch: int = 32  # groups of latents, S (official)
    classes: int = 32  # classes per group, K (official)
    cnn_depth: int = 48  # channels of the first convolution; doubled by each further one (official)
    layers: int = 4  # hidden layers of reward head, actor and critic (official)
    unimix: float = 0.01  # uniform share of all categoricals (official)
    kl_scale: float = 0.6  # weight of the KL (official)
    kl_balance: float = 0.85  # share of the KL's gradient that trains the prior (official)
    free_nats: float = 1.0  # KL below which a state is not trained (official)
    # connector and aligner
    connector_balance: float = 0.8  # factor of the connector's gradient (official)
    connector_updates: int = 2  # connector steps per batch (official command)
    align_noise: float = 0.5  # share of noise in the embeddings that the aligner restores (official)
    # behaviour
    policy_batch_size: int = 32  # sequences per policy update (official)
    policy_batch_length: int = 32  # steps per sequence; every state is the start of a dream (official)
    imag_horizon: int = 16  # imagined steps, H (official)
    reward_fn: Literal[  # how much a dream resembles the target (official: max_cosine; paper: cosine)
        "max_cosine", "cosine", "neg_kl", "neg_mse", "exp_neg_mse", "max_like", "combo"] = "max_cosine"
    align: Literal["sequence", "initial", "none"] = "sequence"  # where a target begins (official: sequence)
    data_free: bool = False  # start the policy's dreams from latents made without data
    gamma: float = 0.99  # discount (official)
    lam: float = 0.95  # lambda of the returns (official)
    ent_coef: float = -1.0  # entropy bonus; -1: 0 for continuous actions (official), 3e-4 for discrete ones
    slow_every: int = 100  # updates between copies of the critic to the slow critic (official)
    # optimiser
    model_lr: float = 1e-4  # learning rate of world model and connector (official)
    model_eps: float = 1e-8  # epsilon of their Adam (official)
    model_clip: float = 1000.0  # largest gradient norm of the world model (official)
    actor_lr: float = 3e-5  # learning rate of the actors (official)
    critic_lr: float = 3e-5  # learning rate of the critics (official)
    ac_eps: float = 1e-5  # epsilon of their Adam (official)
    ac_clip: float = 100.0  # largest gradient norm of actor and critic (official)
    weight_decay: float = 1e-6  # share of every weight that an update takes away (official)


PRESETS = {
    "default": {},
    "tiny": dict(
        hidden=64, stoch=8, classes=8, cnn_depth=8, layers=2, batch_size=8, batch_length=16,
        policy_batch_size=8, policy_batch_length=8, total_timesteps=600, learning_starts=400, train_every=10,
        pretrain_updates=100, policy_updates=60, model_lr=1e-3, actor_lr=3e-4, critic_lr=3e-4, save_every=200,
        video_every=0, log_every=20, eval_episodes=1, vlm="random"),
    "paper": dict(
        total_timesteps=1_000_000, pretrain_updates=500_000, policy_updates=50_000, eval_every=5_000,
        save_every=5_000, video_every=10_000),
}
# image, GIF, .npy of frames (T,Y,X,3) uint8 or of an embedding (E,); other videos: `ffmpeg -i x.mp4 x.gif`
PROMPT_FILES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".npy")
# official prompts, and the returns that count as 0 and as 1
PROMPTS = {
    "dm_control/walker-stand-v0": ("standing up straight", 150, 970),
    "dm_control/walker-walk-v0": ("walk fast clean", 45, 960),
    "dm_control/walker-run-v0": ("run fast clean", 30, 770),
    "dm_control/quadruped-walk-v0": ("spider walking fast", 10, 960),
    "dm_control/quadruped-run-v0": ("spider running fast", 10, 930),
    "dm_control/cheetah-run-v0": ("running like a quadruped", 9, 890),
    "ALE/Pong-v5": ("a paddle hitting the ball", None, None),
}


# ======== 2. pure functions ========
def float32(x: torch.Tensor) -> torch.Tensor:
    """Norms, softmaxes, losses and returns run in float32 also under bf16; float64 stays, for tests."""
    return x.float() if x.dtype == torch.bfloat16 else x


def symlog(x: torch.Tensor) -> torch.Tensor:
    """Compresses large magnitudes; symexp is its inverse."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: torch.Tensor) -> torch.Tensor:
    """Inverse of symlog."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def twohot_loss(logits: torch.Tensor, target: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """Cross entropy of softmax(logits (...,K)) with twohot(symlog(target (...))). Source: `TwoHotDist`.
    Trap: bins are equidistant in symlog space, not symexp of such bins as in today's DreamerV3."""
    logits = float32(logits)
    target = symlog(target).clamp(bins[0], bins[-1])
    above = torch.bucketize(target, bins, right=True).clamp(max=len(bins) - 1)
    below = above - 1
    weight = (target - bins[below]) / (bins[above] - bins[below])  # of the bin above
    logit_below = logits.gather(-1, below[..., None])[..., 0]
    logit_above = logits.gather(-1, above[..., None])[..., 0]
    return logits.logsumexp(-1) - torch.lerp(logit_below, logit_above, weight)


def twohot_mean(logits: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """symexp of the mean bin of softmax(logits (...,K))."""
    return symexp((float32(logits).softmax(-1) * bins).sum(-1))


def unimix(logits: torch.Tensor, mix: float) -> torch.Tensor:
    """Probabilities (...,K) with a uniform share; sample, KL, entropy and gradient all use these."""
    return (1 - mix) * float32(logits).softmax(-1) + mix / logits.shape[-1]


def log_unimix(logits: torch.Tensor, mix: float) -> torch.Tensor:
    """Their logarithms. Without a uniform share a probability can be 0, so log_softmax."""
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
    """Entropy in nats of log-probabilities (...,K)."""
    return -(log_probs.exp() * log_probs).sum(-1)


def categorical_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats of log-probabilities (...,S,K), summed over the independent groups S."""
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))


def kl_loss(post_logits, prior_logits, mix: float, balance: float, free_nats: float) -> tuple:
    """balance * KL(sg(q) || p) + (1 - balance) * KL(q || sg(p)), a scalar, and the KL (T,B).
    Free nats apply to each state, after the sum over groups."""
    post = log_unimix(post_logits, mix)
    prior = log_unimix(prior_logits, mix)
    dyn = categorical_kl(post.detach(), prior)  # trains only the prior
    rep = categorical_kl(post, prior.detach())  # trains only the posterior
    dyn_loss = dyn.clamp(min=free_nats).mean()
    rep_loss = rep.clamp(min=free_nats).mean()
    return balance * dyn_loss + (1 - balance) * rep_loss, dyn.detach()


def lambda_return(reward, value, cont, lam) -> torch.Tensor:
    """V_t = r_t + d_t ((1-lam) v_{t+1} + lam V_{t+1}), V_H = v_H. Inputs (H+1,...), result (H,...).
    `cont` is the discount d. Trap: reward and discount are those of the state itself; r_H is not used."""
    ret = value[-1]
    rets = []
    for t in reversed(range(len(value) - 1)):
        ret = reward[t] + cont[t] * ((1 - lam) * value[t + 1] + lam * ret)
        rets.append(ret)
    return torch.stack(rets[::-1])


def normalize(x: torch.Tensor) -> torch.Tensor:
    """Unit vectors along the last axis."""
    return F.normalize(float32(x), dim=-1)


def corrupt_embedding(embed: torch.Tensor, noise: torch.Tensor, share: float) -> torch.Tensor:
    """Unit vectors (...,E) mixed with the directions of `noise` (...,E), a stand-in for the text of a video.
    Share 0.5 turns e by 45 degrees; share w by atan(w / (1 - w)). Source: `VideoSSM.update`."""
    return normalize((1 - share) * embed + share * normalize(noise))


def clip_labels(vl_embed: torch.Tensor) -> torch.Tensor:
    """(T,...) -> (T,...): each clip's own embedding, that of its last row, for all of its rows.
    Trap: row 8i, or a sliding window for every row, would describe frames that came before."""
    return vl_embed[CLIP - 1 :: CLIP].repeat_interleave(CLIP, 0)


# -- the reward: a dream against the trajectory that the prompt asks for --
# A view of states is a dict: stoch (T,N,S*K), and what the reward compares: project (T,N,P), log_probs
# (T,N,S,K).


def similarity(kind: str, agent: dict, target: dict) -> torch.Tensor:
    """How much states resemble the target's: two views (T,N,...) -> (T,N). Source: `compute_reward`."""
    if kind == "combo":
        return similarity("cosine", agent, target) + similarity("neg_kl", agent, target)
    if kind == "neg_kl":  # trap: the agent's distribution comes first; nats per group, relative to ln K
        groups, classes = agent["log_probs"].shape[-2:]
        return -categorical_kl(agent["log_probs"], target["log_probs"]) / (groups * math.log(classes))
    if kind == "max_like":  # how probable the agent's dynamics find the target's sample
        return (agent["log_probs"].flatten(-2) * target["stoch"]).sum(-1)

    u = float32(agent["project"])
    v = float32(target["project"])
    if kind in ("neg_mse", "exp_neg_mse"):  # the root of the mean square, in spite of the name (official)
        distance = (u - v).norm(dim=-1) / math.sqrt(u.shape[-1])
        return -distance if kind == "neg_mse" else torch.exp(-distance)
    dot = (u * v).sum(-1)
    if kind == "cosine":
        return dot / (u.norm(dim=-1) * v.norm(dim=-1))
    # max_cosine: the length counts too; 1 only if u = v
    return dot / torch.maximum(u.norm(dim=-1), v.norm(dim=-1)).square()


@torch.no_grad()  # the moment is chosen, not trained
def align_target(kind: str, mode: str, agent: dict, target: dict) -> torch.Tensor:
    """Which target step each dream step is compared with: two views (T,N,...) -> index (T,N) into the target.

        1. b = 8 states of the target      2. t_a = the step of the dream from where they fit best
        3. before t_a: target 0            4. from t_a on: target t - t_a
    so that a dream may first have to get to where the target begins. Source: `video_text_reward`."""
    steps, count = agent["stoch"].shape[:2]
    now = torch.arange(steps, device=agent["stoch"].device)[:, None]
    if mode == "none":
        return now.expand(steps, count)
    window = CLIP if mode == "sequence" else 1
    # trap: the official loop leaves out the last window that would fit
    candidates = steps - CLIP if mode == "sequence" else steps
    begin = {name: x[:window] for name, x in target.items()}
    scores = []
    for t in range(candidates):
        part = {name: x[t : t + window] for name, x in agent.items()}
        scores.append(similarity(kind, part, begin).mean(0))
    start = torch.stack(scores).argmax(0)  # t_a (N,), the first of equals
    return (now - start).clamp(min=0)


# ======== 3. networks ========
class Float32Linear(nn.Linear):
    """Runs in float32 under autocast. Trap: bf16 numbers near 200 are 1 apart, too coarse for advantages."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(float32(x))


class NormSiLU(nn.LayerNorm):
    """LayerNorm over the last axis in float32, then SiLU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(super().forward(float32(x))).to(x.dtype)


def mlp(inputs: int, units: int, layers: int, outputs: int = 0) -> nn.Sequential:
    """`layers` x [linear, LayerNorm, SiLU], then a linear layer to `outputs`, if any. PyTorch's weights."""
    modules = []
    for _ in range(layers):
        modules += [nn.Linear(inputs, units), NormSiLU(units)]  # a bias before the norm too (official)
        inputs = units
    if outputs:
        modules += [nn.Linear(inputs, outputs)]
    return nn.Sequential(*modules)


def scalar_head(inputs: int, units: int, layers: int) -> nn.Sequential:
    """MLP to the logits (...,255) of a two-hot number, exactly 0 at first."""
    last = Float32Linear(units, 255)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*mlp(inputs, units, layers), last)


def deconvolve_pixel(x: torch.Tensor, conv: nn.ConvTranspose2d) -> torch.Tensor:
    """Transposed convolution of one pixel: `conv(x[:, :, None, None])`, (N,in) -> (N,out,k,k).
    It is a matrix product, and computed so it takes a quarter of the time on a CPU."""
    weight = conv.weight.permute(0, 2, 3, 1)  # (in,k,k,out)
    x = F.linear(x, weight.flatten(1).T).unflatten(-1, weight.shape[1:])
    return (x + conv.bias.to(x.dtype)).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """Images (T,B,64,64,C) -> tokens (T,B,U), U = 32 * depth, by 4 x [4x4 conv, stride 2, norm, SiLU]."""

    def __init__(self, channels: int, depth: int):
        super().__init__()
        widths = [channels, depth, 2 * depth, 4 * depth, 8 * depth]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2) for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(NormSiLU(width, eps=1e-3) for width in widths[1:])
        self.tokens = 2 * 2 * widths[-1]  # E

    def forward(self, obs: dict) -> torch.Tensor:
        x = obs["image"].flatten(0, 1) / 255 - 0.5  # (T*B,Y,X,C)
        for conv, norm in zip(self.convs, self.norms):
            x = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            x = norm(x)  # over channels
        x = x.permute(0, 3, 1, 2).flatten(1)  # in C,Y,X order (official)
        return x.unflatten(0, obs["image"].shape[:2])


class Decoder(nn.Module):
    """s (T,B,S*K) -> mean of the image (T,B,64,64,C); the target is in [-0.5, 0.5]."""

    def __init__(self, channels: int, stoch: int, depth: int):
        super().__init__()
        widths = [32 * depth, 4 * depth, 2 * depth, depth, channels]
        layers = zip(widths, widths[1:], [5, 5, 6, 6])
        self.project = nn.Linear(stoch, widths[0])  # g: also the space in which rewards compare states
        self.convs = nn.ModuleList(nn.ConvTranspose2d(a, b, size, stride=2) for a, b, size in layers)
        self.norms = nn.ModuleList(NormSiLU(width, eps=1e-3) for width in widths[1:-1])

    def forward(self, stoch: torch.Tensor) -> torch.Tensor:
        x = self.project(stoch).flatten(0, 1)  # no activation (official)
        x = deconvolve_pixel(x, self.convs[0])
        for norm, conv in zip(self.norms, self.convs[1:]):
            x = norm(x.permute(0, 2, 3, 1))  # over channels
            x = conv(x.permute(0, 3, 1, 2))
        return x.permute(0, 2, 3, 1).unflatten(0, stoch.shape[:2])


# ======== 4. world model ========
class Dynamics(nn.Module):
    """h_t = core(h_{t-1}, s_{t-1}, input_t), prior p(s_t | h_t). The input is an action, or an embedding."""

    def __init__(self, deter, hidden, stoch, classes, inputs, mix):
        super().__init__()
        self.deter, self.stoch, self.classes, self.mix = deter, stoch, classes, mix
        self.img_in = mlp(stoch * classes + inputs, hidden, 1)
        self.gru = nn.Linear(hidden + deter, 3 * deter, bias=False)
        self.gru_norm = nn.LayerNorm(3 * deter)
        self.prior = mlp(deter, hidden, 1, stoch * classes)

    def core(self, deter: torch.Tensor, stoch: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """GRU with layer norm: h (B,D), s (B,S*K), a (B,A) -> h' (B,D). Source: `GRUCell`.
        Trap: unlike torch's GRU cell one norm covers all gates, reset acts on the whole candidate, update on
        the new value, and it starts at sigmoid(-1)."""
        x = self.img_in(torch.cat([stoch, action.to(deter.dtype)], -1))
        gates = self.gru(torch.cat([x, deter], -1))
        gates = self.gru_norm(float32(gates)).to(x.dtype)
        reset, cand, update = gates.chunk(3, -1)
        cand = torch.tanh(reset.sigmoid() * cand)
        update = (update - 1).sigmoid()
        return torch.lerp(deter, cand, update)  # update * cand + (1 - update) * h

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (...,S,K) -> one-hot s (...,S*K) with straight-through gradient."""
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_()
        return sample_onehot(unimix(logits, self.mix), noise).flatten(-2).to(logits.dtype)

    def mode(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (...,S,K) -> the likeliest one-hot s (...,S*K)."""
        return F.one_hot(logits.argmax(-1), self.classes).flatten(-2).to(logits.dtype)

    def groups(self, logits: torch.Tensor) -> torch.Tensor:
        """(...,S*K) -> (...,S,K)."""
        return logits.unflatten(-1, (self.stoch, self.classes))

    def imagine_step(self, deter, stoch, action) -> tuple:
        """One step without observation: h (N,D), s (N,S*K), action (N,A) -> h', s' ~ p(s' | h'), logits."""
        deter = self.core(deter, stoch, action)
        logits = self.groups(self.prior(deter))
        return deter, self.sample(logits), logits


class RSSM(Dynamics):
    """Dynamics of actions, with the posterior q(s_t | obs_t) that sees nothing but the image."""

    def __init__(self, deter, hidden, stoch, classes, action_dim, tokens, mix):
        super().__init__(deter, hidden, stoch, classes, action_dim, mix)
        self.posterior = mlp(tokens, hidden, 1, stoch * classes)

    def observe(self, tokens, prev_action, is_first, deter, stoch) -> tuple:
        """Posterior of a sequence: tokens (T,B,U), prev_action (T,B,A), is_first (T,B), h (B,D), s (B,S*K)
        -> h (T,B,D), s (T,B,S*K), logits (T,B,S,K). With T = 1 it is the policy's step."""
        deter, stoch = deter.to(tokens.dtype), stoch.to(tokens.dtype)
        keep = (~is_first).to(tokens.dtype)[..., None]
        post_logits = self.groups(self.posterior(tokens))  # of all steps at once: no h in it
        stochs = self.sample(post_logits)
        deters = []
        for s, action, k in zip(stochs.unbind(), prev_action.unbind(), keep.unbind()):
            deter = self.core(deter * k, stoch * k, action * k)  # all three start from zero in an episode
            stoch = s
            deters.append(deter)
        return torch.stack(deters), stochs, post_logits


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, and a reward head that nothing learns from."""

    def __init__(self, shapes: dict, action_dim: int, args: Args):
        super().__init__()
        channels = shapes["image"][-1]
        stoch = args.stoch * args.classes
        self.args = args
        self.feat = args.hidden + stoch
        self.encoder = Encoder(channels, args.cnn_depth)
        self.rssm = RSSM(
            args.hidden, args.hidden, args.stoch, args.classes, action_dim, self.encoder.tokens, args.unimix)
        self.decoder = Decoder(channels, stoch, args.cnn_depth)
        self.reward = scalar_head(self.feat, args.hidden, args.layers)
        self.register_buffer("bins", torch.linspace(-20, 20, 255), persistent=False)

    def observe(self, rows: dict) -> tuple[dict, torch.Tensor]:
        """Replay rows (T,B,...) -> posterior {deter, stoch, logits} (T,B,...), tokens.
        Memory begins with zeros, also within an episode."""
        tokens = self.encoder(rows)
        deter = tokens.new_zeros(tokens.shape[1], self.rssm.deter)
        stoch = tokens.new_zeros(tokens.shape[1], self.feat - self.rssm.deter)
        deter, stoch, logits = self.rssm.observe(tokens, rows["prev_action"], rows["is_first"], deter, stoch)
        return dict(deter=deter, stoch=stoch, logits=logits), tokens

    def loss(self, rows: dict) -> tuple[torch.Tensor, dict, dict]:
        """Replay rows (T,B,...) -> scalar loss, posterior and tokens (T,B,...) without gradient, metrics.
        Minus the evidence lower bound, E_q[-ln p(obs_t | s_t)] + KL(q(s_t | obs_t) || p(s_t | h_t))."""
        post, tokens = self.observe(rows)
        prior_logits = self.rssm.groups(self.rssm.prior(post["deter"]))

        losses = {}
        losses["kl"], kl = kl_loss(
            post["logits"], prior_logits, self.args.unimix, self.args.kl_balance, self.args.free_nats)
        recon = float32(self.decoder(post["stoch"]))
        error = (recon - (rows["image"] / 255 - 0.5)).square()
        losses["image"] = error.flatten(2).sum(-1).mean()  # summed over pixels; no 1/2
        # stop-gradient: the latents must not know rewards; this head is there to be looked at
        feat = torch.cat([post["deter"], post["stoch"]], -1).detach()
        losses["reward"] = twohot_loss(self.reward(feat), rows["reward"], self.bins).mean()
        total = losses["image"] + self.args.kl_scale * losses["kl"] + losses["reward"]

        with torch.no_grad():
            metrics = {
                "wm/kl": kl.mean(),
                "wm/post_entropy": entropy(log_unimix(post["logits"], self.args.unimix)).sum(-1).mean(),
                "wm/prior_entropy": entropy(log_unimix(prior_logits, self.args.unimix)).sum(-1).mean(),
            }
        metrics.update({f"losses/{k}": v.detach() for k, v in losses.items()})
        # stop-gradient: connector, explorer and behaviour must not bend the world model
        post = {k: v.detach() for k, v in dict(post, tokens=tokens).items()}
        return total, post, metrics


class Residual(nn.Module):
    """act(LN(W x)) + skip; the skip is a linear map where widths differ."""

    def __init__(self, inputs: int, outputs: int, act: bool = True):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.norm = NormSiLU(outputs) if act else nn.Identity()
        self.skip = nn.Identity() if inputs == outputs else nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(x)) + self.skip(x)


class Aligner(nn.Module):
    """Embedding of a text, or a corrupted one of a video (...,E) -> unit embedding as a video would have.
    A U-Net of linear layers. Source: `UNetDenoiser`."""

    def __init__(self, embed: int):
        super().__init__()
        half = embed // 2
        self.down = nn.ModuleList([Residual(embed, embed), Residual(embed, half)])
        self.mid = nn.ModuleList([Residual(half, half), Residual(half, half)])
        self.up = nn.ModuleList([Residual(2 * half, embed, act=False), Residual(2 * embed, embed)])

    def raw(self, embed: torch.Tensor) -> torch.Tensor:
        """Before it is normalised."""
        x0 = self.down[0](embed)
        x1 = self.down[1](x0)
        x = self.mid[1](self.mid[0](x1))
        x = self.up[0](torch.cat([x, x1], -1))
        return self.up[1](torch.cat([x, x0], -1))

    def forward(self, embed: torch.Tensor) -> torch.Tensor:
        return normalize(self.raw(embed))


class Connector(Dynamics):
    """p(s_t | s_{t-1}, e): embeddings of the VLM -> sequences of the world model's latents, and the aligner.
    It has an h of its own, which begins as init_net(e). Source: `VideoSSM`."""

    def __init__(self, embed: int, args: Args):
        super().__init__(args.hidden, args.hidden, args.stoch, args.classes, embed, args.unimix)
        self.args = args
        self.init_net = mlp(embed, args.hidden, 2, args.hidden)
        self.aligner = Aligner(embed)

    def scale(self, vl_embed: torch.Tensor) -> torch.Tensor:
        """Unit vectors (...,E) -> entries of size 1."""
        return vl_embed * math.sqrt(vl_embed.shape[-1])

    def initial(self, vl_embed: torch.Tensor) -> tuple:
        """Scaled e (B,E) -> h, and s sampled from the prior. The gradient passes through the sample."""
        deter = self.init_net(vl_embed)
        return deter, self.sample(self.groups(self.prior(deter)))

    def predict(self, vl_embed: torch.Tensor, stoch: torch.Tensor) -> torch.Tensor:
        """Prior logits (T,B,S,K) of p(s_t | s_{t-1}, e_t), given e (T,B,E) and the posterior's s (T,B,S*K).
        Trap: s is the posterior's; trained on its own samples the connector collapses. h goes on from clip to
        clip."""
        inputs = self.scale(vl_embed)
        deter, first = self.initial(inputs[0])
        previous = torch.cat([first[None].to(stoch), stoch[:-1]])
        deters = []
        for s, e in zip(previous.unbind(), inputs.unbind()):
            deter = self.core(deter, s, e)
            deters.append(deter)
        return self.groups(self.prior(torch.stack(deters)))

    def rollout(self, vl_embed: torch.Tensor, sample: bool) -> tuple:
        """Latents (T,N,S*K) that e (T,N,E) describes, from its own samples or modes, their logits and h."""
        inputs = self.scale(vl_embed)
        deter, stoch = self.initial(inputs[0])
        states = []
        for e in inputs.unbind():
            deter = self.core(deter, stoch, e)
            logits = self.groups(self.prior(deter))
            stoch = self.sample(logits) if sample else self.mode(logits)
            states.append((stoch, logits, deter))
        stoch, logits, deter = zip(*states)
        return torch.stack(stoch), torch.stack(logits), torch.stack(deter)

    def loss(self, vl_embed: torch.Tensor, post: dict) -> tuple[torch.Tensor, dict]:
        """e (T,B,E) of replay rows, posterior (T,B,...) -> scalar loss, metrics:

            connector   KL(p(s_t | s_{t-1}, e) || sg(q(s_t | obs_t)))
            aligner     1 - cos(aligner(corrupted e), e)          = |.|^2 / 2 of unit vectors
        The connector gets the clean e, never the aligned one."""
        vl_embed = clip_labels(vl_embed)
        log_probs = log_unimix(self.predict(vl_embed, post["stoch"]), self.mix)
        kl = categorical_kl(log_probs, log_unimix(post["logits"].detach(), self.mix)).mean()
        # the rest of the KL has no gradient (official): the loss is the KL, its gradient 0.8 of the KL's
        balance = self.args.connector_balance
        connector = balance * kl + (1 - balance) * kl.detach()

        noise = torch.randn_like(vl_embed)  # another one for each row of a clip (official)
        noised = corrupt_embedding(vl_embed, noise, self.args.align_noise)
        aligner = 1 - (self.aligner(noised) * vl_embed).sum(-1).mean()
        metrics = {
            "losses/connector": connector.detach(),
            "losses/aligner": aligner.detach(),
            "wm/aligner_of_a_constant": 1 - vl_embed.flatten(0, -2).mean(0).norm(),  # what it has to beat
        }
        return connector + aligner, metrics


# ======== 5. behaviour ========
class Behaviour(nn.Module):
    """Actor, critic and slow critic on feat = [h, s], trained in dreams for any reward.
    Source: `ActorCritic`."""

    def __init__(self, feat: int, action_dim: int, discrete: bool, args: Args):
        super().__init__()
        self.args, self.discrete = args, discrete
        self.ent_coef = args.ent_coef if args.ent_coef >= 0 else 3e-4 * discrete
        self.actor = mlp(feat, args.hidden, args.layers)
        self.actor_mean = nn.Linear(args.hidden, action_dim)  # logits of discrete actions
        if not discrete:
            self.actor_std = nn.Linear(args.hidden, action_dim)
        self.critic = scalar_head(feat, args.hidden, args.layers)
        self.slow_critic = scalar_head(feat, args.hidden, args.layers).requires_grad_(False)
        self.slow_critic.load_state_dict(self.critic.state_dict())
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("percentiles", torch.zeros(2))
        self.register_buffer("bins", torch.linspace(-20, 20, 255), persistent=False)

    def actor_parameters(self) -> list[nn.Parameter]:
        """Those that the actor's loss trains."""
        return [p for name, p in self.named_parameters() if name.startswith("actor")]

    def policy(self, feat: torch.Tensor):
        """Log-probabilities (...,A) of one-hot actions, or a Normal; the environment clips its samples."""
        x = self.actor(feat)
        mean = float32(self.actor_mean(x))
        if self.discrete:
            return log_unimix(mean, self.args.unimix)
        std = 0.9 * (float32(self.actor_std(x)) + 2).sigmoid() + 0.1
        return torch.distributions.Normal(mean.tanh(), std, validate_args=False)

    def sample(self, feat: torch.Tensor) -> torch.Tensor:
        """feat (...,F) -> one-hot or continuous action (...,A); in evaluation the mode (official)."""
        policy = self.policy(feat)
        if not self.discrete:
            return policy.rsample() if self.training else policy.mean
        noise = torch.empty_like(policy).exponential_() if self.training else torch.ones_like(policy)
        return sample_onehot(policy.exp(), noise)

    def imagine(self, rssm: RSSM, start: dict) -> tuple:
        """Roll the policy out from states (N,...) -> {deter, stoch, logits} (H+1,N,...), action (H,N,A)."""
        deter, stoch = start["deter"], start["stoch"]
        deters, stochs, logits, actions = [deter], [stoch], [start["logits"]], []
        for _ in range(self.args.imag_horizon):
            # stop-gradient: an action moves later states, not the view that later actions take
            action = self.sample(torch.cat([deter, stoch], -1).detach())
            deter, stoch, prior = rssm.imagine_step(deter, stoch, action)
            deters.append(deter)
            stochs.append(stoch)
            logits.append(prior)
            actions.append(action)
        states = dict(deter=torch.stack(deters), stoch=torch.stack(stochs), logits=torch.stack(logits))
        return states, torch.stack(actions)

    def returns(self, feat: torch.Tensor, reward: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """V_t (H,N) and slow values (H+1,N) of a dream feat (H+1,N,F) with reward (H+1,N).

            states     s_0 -a_0-> s_1 -a_1-> s_2 -a_2-> s_3      H = 3
            returns    V_0        V_1        V_2        (V_3 = v_3 only bootstraps)
            critic     v_0 - V_0  v_1 - V_1  v_2 - V_2
            actor      a_0: V_1   a_1: V_2
        V_t contains r_t, which came before a_t: the first return that a_t can change is V_{t+1}.
        There is no end of an episode in a dream."""
        slow_value = twohot_mean(self.slow_critic(feat), self.bins)
        cont = torch.full_like(slow_value, self.args.gamma)
        return lambda_return(reward, slow_value, cont, self.args.lam), slow_value

    @torch.no_grad()  # a unit of measurement
    def return_scale(self, ret: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Per5 and max(1, Per95 - Per5) of the returns, EMA 0.99 that starts at 0."""
        ret = gather_ranks(ret.flatten())
        percentiles = torch.stack([ret.quantile(0.05), ret.quantile(0.95)])
        self.percentiles.lerp_(percentiles, 0.01)
        low, high = self.percentiles
        return low, (high - low).clamp(min=1)

    def actor_loss(self, feat, action, ret, slow_value) -> tuple[torch.Tensor, torch.Tensor]:
        """-> loss, entropy (H-1,N). For t = 0..H-2, with return and value in units of the return scale:
        continuous -V_{t+1}, through the dream; discrete -ln pi(a_t | s_t) sg(V_{t+1} - v_{t+1}).
        Trap: the baseline is the value of the state that a_t leads to (official)."""
        policy = self.policy(feat[:-2].detach())
        low, scale = self.return_scale(ret)
        if self.discrete:
            log_prob = (policy * action[:-1].detach()).sum(-1)
            advantage = (ret[1:] - slow_value[1:-1]).detach() / scale
            objective = log_prob * advantage
            bonus = entropy(policy)
        else:
            objective = (ret[1:] - low) / scale
            bonus = policy.entropy().sum(-1)
        return -(objective + self.ent_coef * bonus).mean(), bonus

    def critic_loss(self, feat, ret) -> torch.Tensor:
        """Two-hot regression of v_t on sg(V_t), t = 0..H-1. Stop-gradient: it must not move the dream."""
        return twohot_loss(self.critic(feat[:-1].detach()), ret.detach(), self.bins).mean()

    def loss(self, world: WorldModel, start: dict, reward_fn) -> tuple[dict, dict]:
        """Start states (N,...) -> actor and critic loss of dreams, metrics.
        `reward_fn(states, action)` gives the reward (H+1,N), and the gradient goes through it."""
        with torch.set_grad_enabled(not self.discrete):  # Reinforce needs none through the dream
            states, action = self.imagine(world.rssm, start)
            feat = torch.cat([states["deter"], states["stoch"]], -1)
            reward = reward_fn(states, action)
            ret, slow_value = self.returns(feat, reward)
        torch.clear_autocast_cache()  # bf16 copies of weights that may have no gradient
        policy_loss, bonus = self.actor_loss(feat, action, ret, slow_value)
        losses = dict(policy=policy_loss, value=self.critic_loss(feat, ret))
        metrics = {
            "ac/reward": reward.mean(),
            "ac/return": ret.mean(),
            "ac/slow_value": slow_value.mean(),
            "ac/entropy": bonus.mean(),
            **{f"losses/{k}": v for k, v in losses.items()},
        }
        return losses, {k: v.detach() for k, v in metrics.items()}

    @torch.no_grad()
    def update_slow_critic(self) -> None:
        """slow <- critic every `slow_every` updates."""
        due = self.updates % self.args.slow_every == 0
        for slow, fast in zip(self.slow_critic.parameters(), self.critic.parameters()):
            slow.lerp_(fast, due.to(slow))
        self.updates += 1


class Disagreement(nn.Module):
    """Plan2Explore: five networks predict the next image's tokens; where they differ there is much to learn.
    Source: `plan2explore.Disagreement`."""

    def __init__(self, inputs: int, tokens: int, count: int = 5):
        super().__init__()
        self.nets = nn.ModuleList()
        for _ in range(count):
            self.nets.append(nn.Sequential(nn.Linear(inputs, tokens), nn.ReLU(), nn.Linear(tokens, tokens)))
        self.register_buffer("scale", torch.zeros(()))

    def predict(self, feat: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """feat (...,F), action (...,A) -> tokens (5,...,U) of the image that follows."""
        x = torch.cat([feat, action.to(feat)], -1)
        return torch.stack([net(x) for net in self.nets])

    def loss(self, feat: torch.Tensor, action: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Mean over networks and states of the distance. Trap: the norm, not its square (official)."""
        return float32(self.predict(feat, action) - tokens).norm(dim=-1).mean()

    def reward(self, feat: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Variance (...) over the networks, mean over token dimensions."""
        return float32(self.predict(feat, action)).var(0).mean(-1)

    def dream_reward(self, states: dict, action: torch.Tensor) -> torch.Tensor:
        """Reward (H+1,N) of a dream: r_{t+1} is the variance at (s_t, a_t), r_0 = 0, in units of its mean."""
        feat = torch.cat([states["deter"], states["stoch"]], -1)[:-1]
        # stop-gradient: an action is to change where the dream goes (official)
        reward = self.reward(feat, action.detach())
        reward = torch.cat([torch.zeros_like(reward[:1]), reward])
        with torch.no_grad():  # EMA 0.95 of its size, r_0 included, beginning with the first batch (official)
            size = gather_ranks(reward.abs().mean()[None]).mean()
            self.scale.copy_(torch.where(self.scale == 0, size, 0.95 * self.scale + 0.05 * size))
        return reward / self.scale


# ======== 6. update ========
class Adam(torch.optim.Adam):
    """Adam after global-norm clipping, with weight decay that ignores the learning rate: p <- p (1 - decay)
    before each step, for all parameters (official)."""

    def __init__(self, params, lr: float, eps: float, clip: float, decay: float):
        self.params = list(params)
        self.clip = clip
        self.decay = decay
        super().__init__(self.params, lr=lr, eps=eps, foreach=True, capturable=self.params[0].is_cuda)

    def update(self, loss: torch.Tensor) -> torch.Tensor:
        """One step of these parameters only, whatever else the loss depends on -> norm before clipping."""
        grads = list(torch.autograd.grad(loss, self.params))
        average_ranks(grads)
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        torch._foreach_mul_(grads, (self.clip / (norm + 1e-6)).clamp(max=1))
        with torch.no_grad():
            torch._foreach_mul_(self.params, 1 - self.decay)
        for param, grad in zip(self.params, grads):
            param.grad = grad
        self.step()
        self.zero_grad()
        return norm


class Optimizers:
    """One Adam per loss: none moves another's parameters. (The official world model's also decays the
    connector's weights, by one part in a million.)"""

    def __init__(self, agent: Agent, args: Args):
        model = partial(
            Adam, lr=args.model_lr, eps=args.model_eps, clip=args.model_clip, decay=args.weight_decay)
        actor = partial(Adam, lr=args.actor_lr, eps=args.ac_eps, clip=args.ac_clip, decay=args.weight_decay)
        critic = partial(Adam, lr=args.critic_lr, eps=args.ac_eps, clip=args.ac_clip, decay=args.weight_decay)
        self.world = model(agent.world.parameters())
        self.connector = model(agent.connector.parameters())
        self.actor = actor(agent.behaviour.actor_parameters())
        self.critic = critic(agent.behaviour.critic.parameters())
        self.disagreement = model(agent.disagreement.parameters())
        self.explorer_actor = actor(agent.explorer.actor_parameters())
        self.explorer_critic = critic(agent.explorer.critic.parameters())

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in vars(self).items()}

    def load_state_dict(self, saved: dict) -> None:
        """Moments; learning rate and `capturable` are those of the present flags and device."""
        for name, part in vars(self).items():
            groups = part.state_dict()["param_groups"]
            part.load_state_dict(dict(state=saved[name]["state"], param_groups=groups))


class Agent(nn.Module):
    """World model, connector, and two behaviours: one for the prompt, one that explores."""

    def __init__(self, shapes: dict, action_dim: int, discrete: bool, args: Args, vl_dim: int = 512):
        super().__init__()
        self.args = args
        self.action_dim = action_dim
        self.vl_dim = vl_dim
        self.exploring = False  # which of the two acts
        self.world = WorldModel(shapes, action_dim, args)
        self.connector = Connector(vl_dim, args)
        self.behaviour = Behaviour(self.world.feat, action_dim, discrete, args)
        self.disagreement = Disagreement(self.world.feat + action_dim, self.world.encoder.tokens)
        self.explorer = Behaviour(self.world.feat, action_dim, discrete, args)
        self.target = {}  # view (H+1,N,...) of the trajectory that the prompt asks for
        self.graphs = {}  # updates that became CUDA graphs

    @property
    def device(self) -> torch.device:
        return self.behaviour.updates.device

    def autocast(self):
        """bf16 for matrix products and convolutions. Each weight is cast once and kept until the end, not
        once per step. Trap: where the first use was under no_grad, the kept copy has no gradient."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16")

    def initial(self, num_envs: int) -> dict:
        """State before the first observation: h, s and the previous action are zero."""
        deter = self.world.rssm.deter
        stoch = self.world.feat - deter
        return {
            "deter": torch.zeros(num_envs, deter, device=self.device),
            "stoch": torch.zeros(num_envs, stoch, device=self.device),
            "action": torch.zeros(num_envs, self.action_dim, device=self.device),
        }

    @torch.no_grad()
    def act(self, row: dict, state: dict) -> dict:
        """Row (N,...) and state -> new {deter, stoch, logits, action}.
        s is sampled in evaluation too (official)."""
        obs = {k: torch.as_tensor(v, device=self.device)[None] for k, v in row.items()}
        behaviour = self.explorer if self.exploring else self.behaviour
        with self.autocast():
            tokens = self.world.encoder(obs)
            deter, stoch, logits = self.world.rssm.observe(
                tokens, state["action"][None], obs["is_first"], state["deter"], state["stoch"])
            action = behaviour.sample(torch.cat([deter[0], stoch[0]], -1))
        state = dict(deter=float32(deter[0]), stoch=float32(stoch[0]), logits=float32(logits[0]))
        return dict(state, action=action)

    def random_actions(self, count: int) -> torch.Tensor:
        """Uniform actions (count,A)."""
        action = torch.zeros(count, self.action_dim, device=self.device)
        if self.behaviour.discrete:
            index = torch.randint(self.action_dim, (count, 1), device=self.device)
            return action.scatter_(-1, index, 1.0)
        return action.uniform_(-1, 1)

    def act_randomly(self, num_envs: int) -> dict:
        """Uniform actions, for the first steps of collection."""
        return dict(self.initial(num_envs), action=self.random_actions(num_envs))

    def view(self, stoch: torch.Tensor, logits: torch.Tensor) -> dict:
        """What the reward compares of states (T,N,...)."""
        view = dict(stoch=stoch)
        if self.args.reward_fn in ("neg_kl", "max_like", "combo"):
            view["log_probs"] = log_unimix(logits, self.args.unimix)
        if self.args.reward_fn not in ("neg_kl", "max_like"):
            view["project"] = self.world.decoder.project(stoch)  # the gradient goes on to stoch
        return view

    @torch.no_grad()  # a goal is given
    def set_prompt(self, vl_embed: torch.Tensor, count: int) -> None:
        """Unit embedding (E,) of a text or video -> targets of `count` dreams, for all updates to come: a
        CUDA graph reads these tensors ever after.
        Videos pass the aligner too (official). Each dream has its own first sample; then modes follow."""
        aligned = self.connector.aligner(vl_embed)
        steps = self.args.imag_horizon + 2  # the first step is left out (official)
        stoch, logits, _ = self.connector.rollout(aligned.expand(steps, count, -1), sample=False)
        self.target = self.view(stoch[1:], logits[1:])

    def match(self, stoch: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States (H+1,N,...) -> how much they resemble the target (H+1,N), index (H+1,N) into the target."""
        kind = self.args.reward_fn
        count = stoch.shape[1]
        view = self.view(stoch, logits)
        target = {name: x[:, :count] for name, x in self.target.items()}
        index = align_target(kind, self.args.align, view, target)
        dream = torch.arange(count, device=stoch.device)
        aligned = {name: x[index, dream] for name, x in target.items()}
        return similarity(kind, view, aligned), index

    @torch.no_grad()
    def data_free_start(self, count: int, length: int, warmup: int = 5) -> dict:
        """States (count,...) to dream from, made without data: each begins with a random latent or, by a
        coin, with what the connector makes of a random embedding; then `warmup` steps, of one half of the
        states by random actions, of the other by policy."""
        rssm = self.world.rssm
        half = count // 2
        uniform = torch.zeros(half, rssm.stoch, rssm.classes, device=self.device)
        # a new direction in every step, as the official code has it
        embed = normalize(torch.randn(length, math.ceil(half / length), self.vl_dim, device=self.device))
        described, _, _ = self.connector.rollout(self.connector.aligner(embed), sample=True)
        coin = torch.rand(half, 1, device=self.device) < 0.5
        described = described.flatten(0, 1)[:half]
        stoch = torch.where(coin, rssm.sample(uniform).to(described), described)
        deter = described.new_zeros(half, rssm.deter)

        ends = []
        for by_policy in (False, True):
            state = (deter, stoch, uniform)
            for _ in range(warmup):
                feat = torch.cat(state[:2], -1)
                action = self.behaviour.sample(feat) if by_policy else self.random_actions(half)
                state = rssm.imagine_step(*state[:2], action)
            ends.append(state)
        deter, stoch, logits = (torch.cat(parts) for parts in zip(*ends))
        return dict(deter=deter, stoch=stoch, logits=logits)


def get_rows(agent: Agent, replay: Replay, batch_size: int, length: int) -> dict:
    """Sampled rows (length,batch_size,...) on the agent's device."""
    rows = replay.sample(batch_size, length)
    return {k: v.to(agent.device, non_blocking=True) for k, v in rows.items()}


def update_world_model(agent: Agent, optimizer: Optimizers, rows: dict) -> dict:
    """Rows (T,B,...): the world model, then the connector on its posteriors -> metrics."""
    with agent.autocast():
        loss, post, metrics = agent.world.loss(rows)
    metrics["grad/model_norm"] = optimizer.world.update(loss)
    for _ in range(agent.args.connector_updates):
        with agent.autocast():
            loss, connector_metrics = agent.connector.loss(rows["vl_embed"], post)
        metrics.update(connector_metrics)
        metrics["grad/connector_norm"] = optimizer.connector.update(loss)
    return metrics


def train_world_model(agent: Agent, optimizer: Optimizers, replay: Replay, batch_size: int) -> dict:
    """One pre-training update: sample, then world model and connector -> metrics."""
    rows = get_rows(agent, replay, batch_size, agent.args.batch_length)
    return captured(update_world_model, agent, optimizer, rows)


def update_explorer(agent: Agent, optimizer: Optimizers, rows: dict) -> dict:
    """Rows (T,B,...): world model, disagreement, then the explorer in dreams -> metrics."""
    with agent.autocast():
        loss, post, metrics = agent.world.loss(rows)
    metrics["grad/model_norm"] = optimizer.world.update(loss)

    feat = torch.cat([post["deter"], post["stoch"]], -1)
    with agent.autocast():  # prev_action[t+1] was chosen in state t
        loss = agent.disagreement.loss(feat[:-1], rows["prev_action"][1:], post["tokens"][1:])
    metrics["losses/disagreement"] = loss.detach()
    metrics["grad/disagreement_norm"] = optimizer.disagreement.update(loss)

    start = {k: v.flatten(0, 1) for k, v in post.items()}
    with agent.autocast():
        losses, ac_metrics = agent.explorer.loss(agent.world, start, agent.disagreement.dream_reward)
    metrics.update(ac_metrics)
    metrics["grad/actor_norm"] = optimizer.explorer_actor.update(losses["policy"])
    metrics["grad/critic_norm"] = optimizer.explorer_critic.update(losses["value"])
    agent.explorer.update_slow_critic()
    return metrics


def train_explorer(agent: Agent, optimizer: Optimizers, replay: Replay, batch_size: int) -> dict:
    """One update of Plan2Explore: sample, then all that learns -> metrics."""
    rows = get_rows(agent, replay, batch_size, agent.args.batch_length)
    return captured(update_explorer, agent, optimizer, rows)


def update_behaviour(agent: Agent, optimizer: Optimizers, batch: dict) -> dict:
    """Actor and critic in dreams that should resemble the target, from the states of replayed rows (T,B,...)
    or from states (N,...) made without data -> metrics. World model and connector are frozen."""
    args = agent.args
    start = batch
    if not args.data_free:
        with torch.no_grad(), agent.autocast():
            post, _ = agent.world.observe(batch)
        start = {k: v.flatten(0, 1) for k, v in post.items()}

    metrics = {}

    def reward_fn(states: dict, action: torch.Tensor) -> torch.Tensor:
        reward, index = agent.match(states["stoch"], states["logits"])
        begin = args.imag_horizon - index[-1]  # t_a
        metrics["ac/target_begin"] = begin.float().mean()
        metrics["ac/target_at_once"] = (begin == 0).float().mean()
        metrics["ac/match_last"] = reward[-1].mean().detach()
        return reward

    with agent.autocast():
        losses, ac_metrics = agent.behaviour.loss(agent.world, start, reward_fn)
    metrics.update(ac_metrics)
    metrics["grad/actor_norm"] = optimizer.actor.update(losses["policy"])
    metrics["grad/critic_norm"] = optimizer.critic.update(losses["value"])
    agent.behaviour.update_slow_critic()
    return metrics


def train_behaviour(agent: Agent, optimizer: Optimizers, replay: Replay, batch_size: int) -> dict:
    """One policy update: sampled rows, or states made without data, then all that learns -> metrics."""
    length = agent.args.policy_batch_length
    if agent.args.data_free:
        with torch.no_grad(), agent.autocast():
            batch = agent.data_free_start(batch_size * length, 2 * CLIP)
    else:
        batch = get_rows(agent, replay, batch_size, length)
    return captured(update_behaviour, agent, optimizer, batch)


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


# ==== shared: observations, images ====
class Observation:
    """Batched observations -> `image` (N,size,size,C) uint8; frames of a stack become channels."""

    def __init__(self, space: gymnasium.Space, size: int):
        if not is_image(space):
            fail(f"{space} is no uint8 image (Y,X,C) with 1 to 4 channels; "
                 "make it one with gymnasium.wrappers.TransformObservation")
        self.size = size
        channels = space.shape[-1] * (space.shape[0] if len(space.shape) == 4 else 1)
        self.shapes = {"image": (size, size, channels)}

    def __call__(self, obs: np.ndarray) -> dict[str, np.ndarray]:
        if obs.ndim == 5:
            obs = np.concatenate(obs.swapaxes(0, 1), -1)
        return {"image": resize(obs, self.size)}


def shows_image(env_id: str) -> bool:
    """Whether the environment's own observation is an image; what is none is seen by its rendered image."""
    spec = find_spec(env_id)
    if spec.id.startswith("ALE/"):
        return True
    try:
        with gymnasium.make(spec.id) as env:
            return is_image(env.observation_space)
    except gymnasium.error.DependencyNotInstalled as error:
        fail(f"--env-id {env_id}: {str(error).splitlines()[0]}")
# ==== end shared ====


# ==== shared: dm_control ====
def register_dm_control() -> None:
    """shimmy registers the dm_control/ ids when it is imported. Trap: MUJOCO_GL counts only before that, and
    without a display only egl (or osmesa) can draw, which other systems do not have."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import shimmy  # noqa: F401
        import dm_control.suite  # noqa: F401
    except (ImportError, AttributeError, RuntimeError) as error:
        fail(f"dm_control cannot be loaded ({str(error).splitlines()[0]}); it needs "
             'pip install "shimmy[dm-control]==2.0.1" "dm_control==1.0.50" "mujoco==3.17.0" '
             "and, where there is no display, apt install libegl1 libgl1")
# ==== end shared ====


def make_envs(args: Args, num_envs: int, *key: int) -> Envs:
    """Anything with `reset`, `step`, `shapes`, `action_dim`, `discrete`, `ret` and `length` will do."""
    if "dm_control/" in args.env_id:
        register_dm_control()
    return Envs(
        args, num_envs, make_seeds(num_envs, args.seed, *key), 64, pixels=not shows_image(args.env_id))


# ======== 8. data and language ========
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


class Replay(Storage):
    """Episodes, finished or running; every sequence of `length` rows of one episode is equally likely.
    On episodes of equal length that is the official law: an episode, then a start in it."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.begun = [None] * self.num_envs  # first row of the running episode
        self.finished = []  # (first row, number of rows, environment)

    def add(self, row: dict) -> None:
        super().add(row)
        self.track(self.rows - 1, row["is_first"], row["is_last"])

    def track(self, number: int, is_first, is_last) -> None:
        """Note where episodes begin and end, by the flags (N,) of a row; forget those partly overwritten."""
        for env in range(self.num_envs):
            if is_first[env]:
                self.close(env, number)  # an episode that a resume cut off
                self.begun[env] = number
            if is_last[env]:
                self.close(env, number + 1)
        while self.finished and self.finished[0][0] < self.rows - self.size:
            self.finished.pop(0)

    def close(self, env: int, end: int) -> None:
        """The running episode ends before row `end`."""
        if self.begun[env] is not None:
            self.finished.append((self.begun[env], end - self.begun[env], env))
            self.finished.sort()
        self.begun[env] = None

    def episodes(self) -> list[tuple[int, int, int]]:
        """(first row, number of rows, environment) of finished and running episodes. Trap: without the
        running ones there would be nothing of Pong for the first thousand steps."""
        oldest = self.rows - self.size
        running = []
        for env, first in enumerate(self.begun):
            if first is not None:
                first = max(first, oldest)
                running.append((first, self.rows - first, env))
        return self.finished + running

    def longest(self) -> int:
        """Rows of the longest episode."""
        return max((rows for _, rows, _ in self.episodes()), default=0)

    def sample(self, batch_size: int, length: int) -> dict:
        """-> fields (length,batch_size,...); prev_action is the one that led to the row's image."""
        first, rows, env = torch.tensor(self.episodes()).T
        starts = (rows - length + 1).clamp(min=0)  # official: the same number for every episode
        last = starts.cumsum(0)
        number = torch.randint(int(last[-1]), (batch_size,))
        episode = torch.searchsorted(last, number, right=True)
        start = first[episode] + number - (last - starts)[episode]
        index = start + torch.arange(length)[:, None]
        batch = self.gather(index.to(self.device), env[episode].to(self.device))
        return batch

    def load_state_dict(self, state: dict, lost: int) -> None:
        """Episodes are found again by their flags: each rank has other rows."""
        super().load_state_dict(state, lost)
        oldest = self.rows - self.size
        self.begun = [oldest] * self.num_envs if self.size else [None] * self.num_envs
        self.finished = []
        for number in range(oldest, self.rows):
            row = number % self.capacity
            self.track(number, self.files["is_first"][row].tolist(), self.files["is_last"][row].tolist())
        for env in range(self.num_envs):
            self.close(env, self.rows)  # a resumed environment begins anew
        self.finished = [episode for episode in self.finished if episode[1] > 0]

    def episode(self, first: int, rows: int, env: int) -> dict:
        """All rows (L,...) of an episode, from the files."""
        at = (first + torch.arange(rows)) % self.capacity
        return {name: file[at, env] for name, file in self.files.items()}

    def label(self, first: int, env: int, vl_embed: torch.Tensor) -> None:
        """Write the embeddings (L,E) of an episode."""
        at = (first + torch.arange(len(vl_embed))) % self.capacity
        self.files["vl_embed"][at, env] = vl_embed
        self.data["vl_embed"][at.to(self.device), env] = vl_embed.to(self.device)


def replay_specs(shapes: dict, action_dim: int, vl_dim: int) -> dict:
    """Fields of a replay row: name -> (shape, dtype)."""
    return {
        "image": (shapes["image"], torch.uint8),
        "reward": ((), torch.float32),
        "is_first": ((), torch.bool),
        "is_last": ((), torch.bool),
        "is_terminal": ((), torch.bool),
        "prev_action": ((action_dim,), torch.float32),
        "vl_embed": ((vl_dim,), torch.float32),
    }


# -- episode files: one compressed .npz each, {number}-{time}-{uuid}-{rows}.npz (official format) --


def find_episodes(folder: str, buffer_size: int, shortest: int, vlm: str) -> list[tuple[Path, int, int]]:
    """(file, rows, width of its embeddings by `vlm` or 0) of the last files in order of their paths, up to
    `buffer_size` rows. What cannot be read, or is shorter than a sequence, is named, counted and left out."""
    if not Path(folder).is_dir():
        fail(f"--data-dir {folder} is no folder")
    found = []
    total = 0
    skipped = 0
    unnamed = 0
    for path in sorted(Path(folder).rglob("*.npz"), reverse=True):
        if total >= buffer_size:
            break
        try:
            with np.load(path) as arrays:
                rows = len(arrays["is_first"])
                width = arrays["clip_video"].shape[-1] if "clip_video" in arrays else 0
                unnamed += width > 0 and "vlm" not in arrays
                if "vlm" in arrays and str(arrays["vlm"]) != vlm:
                    width = 0  # embedded anew
        except Exception as error:  # a damaged file raises anything
            say(f"skipped {path}: {type(error).__name__} {error}")
            skipped += 1
            continue
        if rows < shortest:
            say(f"skipped {path}: {rows} rows are less than the {shortest} of a sequence")
            skipped += 1
            continue
        found.append((path, rows, width))
        total += rows
    print(f"{folder}: {len(found)} episodes, {total:,} rows; {skipped} files skipped")
    if unnamed:  # trap: two models' embeddings may have one width, and nothing else in common
        say(f"{unnamed} files do not name the model of their embeddings: taken for those of --vlm")
    if not found:
        fail(f"--data-dir {folder} has no episode that can be read")
    return found[::-1]


def read_episode(path: Path, shapes: dict, action_dim: int, vlm: str, vl_dim: int) -> dict:
    """Rows (L,...) of an episode file; raises ValueError where something does not fit. Embeddings of another
    VLM, or of none, are left zero."""
    with np.load(path) as arrays:
        wanted = "observation action reward is_first is_last is_terminal clip_video vlm".split()
        file = {name: arrays[name] for name in wanted if name in arrays}
    size = len(file["is_first"])
    image = file["observation"].transpose(0, 2, 3, 1)  # (L,C,Y,X) -> (L,Y,X,C)
    if image.dtype != np.uint8 or image.shape != (size, *shapes["image"]):
        raise ValueError(f"images are {image.dtype} {image.shape[1:]}, not uint8 {shapes['image']}")
    if file["action"].shape != (size, action_dim):
        raise ValueError(f"actions have {file['action'].shape[1:]} numbers, the environment's {action_dim}")
    rows = {
        "image": image,
        "prev_action": file["action"].astype(np.float32),
        "reward": file["reward"].reshape(size).astype(np.float32),
        "is_first": file["is_first"].reshape(size).copy(),
        "is_last": file["is_last"].reshape(size).copy(),
        "is_terminal": file["is_terminal"].reshape(size),
        "vl_embed": np.zeros((size, vl_dim), np.float32),
    }
    labels = file.get("clip_video", rows["vl_embed"])
    for numbers in (rows["reward"], rows["prev_action"], labels):
        if not np.isfinite(numbers).all():
            raise ValueError("a reward, action or embedding is not finite")
    if labels.shape == (size, vl_dim) and str(file.get("vlm", vlm)) == vlm and labels[-1].any():
        rows["vl_embed"] = normalize(torch.from_numpy(labels)).numpy()
        # trap: shipped files have 8 rows without an embedding; a sequence from row 0 would take that of row 7
        start = max(int((labels != 0).any(-1).argmax()) - (CLIP - 1), 0)
        rows = {name: x[start:] for name, x in rows.items()}
    rows["is_first"][0] = True  # also of a file that begins within an episode
    rows["is_last"][-1] = True
    return rows


def write_episode(folder: Path, number: int, rows: dict, vlm: str) -> Path:
    """Rows (L,...) of an episode as a file."""
    size = len(rows["is_first"])
    now = time.strftime("%Y%m%dT%H%M%S")
    path = folder / f"{number:08d}-{now}-{uuid.uuid4().hex}-{size}.npz"
    folder.mkdir(exist_ok=True)
    with open(path.with_suffix(".tmp"), "wb") as file:
        np.savez_compressed(
            file, observation=rows["image"].permute(0, 3, 1, 2), action=rows["prev_action"],
            reward=rows["reward"][:, None], discount=1 - rows["is_terminal"][:, None].float(),
            is_first=rows["is_first"], is_last=rows["is_last"], is_terminal=rows["is_terminal"],
            clip_video=rows["vl_embed"], vlm=vlm)
    os.replace(path.with_suffix(".tmp"), path)
    return path


# -- vision-language models: `dim`, embed_text(texts) -> (n,E), and embed_frames(uint8 (n,Y,X,3)) -> (n,E),
# or, of models of video, embed_clips(uint8 (n,8,Y,X,3)) -> (n,E); NumPy arrays --


class SentenceVLM:
    """Image-text model of sentence-transformers, such as CLIP: frame by frame."""

    def __init__(self, name: str, device: torch.device):
        missing = missing_model(name)
        if missing:
            fail(f"--vlm {name}: {missing}")
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            fail("--vlm needs sentence-transformers: pip install sentence-transformers")
        try:
            self.model = SentenceTransformer(name, device=str(device))
            self.dim = self.embed_text(["a"]).shape[-1]
            self.embed_frames(np.zeros((1, 64, 64, 3), np.uint8))  # a model of text alone fails here
        except Exception as error:  # anything, by the library's version
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            fail(f"--vlm {name} cannot be used for texts and images: {reason}")

    def embed_text(self, texts: list[str]) -> np.ndarray:
        return self.model.encode(texts, show_progress_bar=False)

    def embed_frames(self, frames: np.ndarray) -> np.ndarray:
        images = [Image.fromarray(frame) for frame in frames]  # trap: an array (n,Y,X,3) is taken for a video
        return self.model.encode(images, batch_size=128, show_progress_bar=False)


class RandomVLM:
    """A stand-in without weights, for trying things out: texts have no meaning."""

    dim = 64

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(3 * 8 * 8, self.dim, generator=generator)

    def embed_text(self, texts: list[str]) -> np.ndarray:
        seeds = [zlib.crc32(text.encode()) for text in texts]
        return np.stack([np.random.default_rng(seed).standard_normal(self.dim) for seed in seeds])

    def embed_frames(self, frames: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255 - 0.5
        x = F.adaptive_avg_pool2d(x, 8).flatten(1)
        return (x @ self.weight.to(x)).numpy()


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


def load_vlm(name: str, device: torch.device):
    """--vlm: a sentence-transformers model, FILE.py:FACTORY, or random."""
    if name == "random":
        say("WARNING: --vlm random knows no language and no images: a prompt means nothing")
        return RandomVLM()
    path, _, factory = name.rpartition(":")
    if factory.endswith(".py"):
        fail(f"--vlm {name}: which class or function? FILE.py:FACTORY")
    if path.endswith(".py"):
        if not Path(path).exists():
            fail(f"--vlm: there is no {path}")
        spec = importlib.util.spec_from_file_location("vlm", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, factory):
            fail(f"--vlm: there is no {factory} in {path}")
        return getattr(module, factory)()
    return SentenceVLM(name, device)


def embed_clips(vlm, frames: np.ndarray) -> torch.Tensor:
    """Frames (L,Y,X,C) uint8 -> unit embeddings (L,E) of the 8 frames that end in each; 7 rows are zero.
    Single frames c: e_t = normalize(mean of normalize(c_{t-7}) .. normalize(c_t)); their order is lost."""
    if frames.shape[-1] % 3 == 0:
        frames = frames[..., -3:]  # of a stack the last
    else:
        frames = frames[..., -1:].repeat(3, -1)  # gray
    result = torch.zeros(len(frames), vlm.dim)
    if len(frames) < CLIP:
        return result
    if hasattr(vlm, "embed_frames"):
        each = normalize(torch.as_tensor(vlm.embed_frames(frames)).float().cpu())
        clips = each.unfold(0, CLIP, 1).mean(-1)  # (L-7,E)
    else:
        windows = np.lib.stride_tricks.sliding_window_view(frames, CLIP, 0)  # (L-7,Y,X,C,8)
        windows = windows.transpose(0, 4, 1, 2, 3)
        parts = []
        for i in range(0, len(windows), 64):
            parts.append(torch.as_tensor(vlm.embed_clips(np.ascontiguousarray(windows[i : i + 64]))))
        clips = torch.cat(parts).float().cpu()
    result[CLIP - 1 :] = normalize(clips)
    return result


def prompt_text(args: Args) -> str:
    """The prompt: of the flag, of the table, or the environment's name."""
    name = re.sub(r".*[/:]|-v\d+$", "", args.env_id).replace("-", " ")
    text, _, _ = PROMPTS.get(args.env_id.rpartition(":")[2], (name, None, None))
    return args.prompt or text


def read_prompt(args: Args) -> np.ndarray | None:
    """What is in the file that --prompt names, if it does: frames (T,Y,X,3) uint8, or an embedding (E,)."""
    suffix = Path(args.prompt).suffix.lower()
    if suffix not in PROMPT_FILES and not os.path.isfile(args.prompt):
        return None
    try:
        if suffix == ".npy":
            content = np.load(args.prompt)
        else:
            with Image.open(args.prompt) as image:
                frames = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
            content = np.stack(frames)
    except FileNotFoundError:
        fail(f"--prompt: there is no {args.prompt}")
    except Exception as error:  # a damaged file raises anything
        fail(f"--prompt {args.prompt} cannot be read as one of {', '.join(PROMPT_FILES)}: {error}")
    is_video = content.dtype == np.uint8 and content.ndim == 4 and content.shape[-1] == 3
    is_embedding = content.dtype.kind == "f" and content.ndim > 0 and content.size == content.shape[-1]
    if not (is_video or is_embedding) or content.size == 0:
        fail(f"--prompt {args.prompt} has {content.dtype} {content.shape}, "
             "not uint8 frames (T,Y,X,3) or floats (E,)")
    return content


def prompt_clip(frames: np.ndarray) -> np.ndarray:
    """Frames (T,Y,X,3) -> 8 of them, as the official code takes them: a still is repeated, of a long video
    every (length / 128)th frame, and the first 8 of those."""
    if len(frames) < CLIP:
        return frames[np.arange(CLIP) * len(frames) // CLIP]
    return frames[:: max(len(frames) // 128, 1)][:CLIP]


def embed_prompt(args: Args, get_vlm, vl_dim: int) -> torch.Tensor:
    """Unit embedding (E,) of the prompt. `get_vlm()` loads the model only where it is needed."""
    content = read_prompt(args)
    if content is None:
        embed = torch.as_tensor(get_vlm().embed_text([prompt_text(args)])[0]).float().cpu()
    elif content.dtype == np.uint8:
        embed = embed_clips(get_vlm(), prompt_clip(content))[-1]
    else:
        embed = torch.from_numpy(content).float().flatten()
    if embed.shape != (vl_dim,) or not embed.isfinite().all() or not embed.any():
        fail(f"the prompt's embedding has {len(embed)} numbers, or some not finite; the data's have {vl_dim}")
    return normalize(embed)


@torch.no_grad()
def report_gap(agent: Agent, replay: Replay, embed: torch.Tensor) -> dict[str, float]:
    """How far the prompt's embedding (E,) is from those of the data, before and after the aligner.
    The aligner is trained to restore what is atan(w / (1 - w)) away, w = --align-noise."""
    data = replay.data["vl_embed"].flatten(0, 1)[: replay.rows * replay.num_envs]
    data = data[torch.randint(len(data), (100_000,), device=data.device)].to(agent.device)  # enough draws
    data = data[data.any(-1)]  # the first rows of an episode have none
    before = (data @ embed).max().item()
    after = (data @ agent.connector.aligner(embed)).max().item()
    noise = agent.args.align_noise
    trained = (1 - noise) / math.hypot(1 - noise, noise)
    say(f"prompt: cosine {before:.2f} with the nearest clip of the data, {after:.2f} once aligned")
    if before < trained - 0.15:
        tan = math.sqrt(max(1 - before**2, 0)) / max(before, 1e-3)
        noise = min(tan / (1 + tan), 0.8)  # 1 would leave nothing of an embedding
        say(f"the aligner was trained at cosine {trained:.2f}: --align-noise {noise:.2f} may do better")
    return {"prompt/cosine": before, "prompt/cosine_aligned": after}


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
    batch = get_rows(agent, replay, count, agent.args.batch_length)
    seen = {k: v[:context] for k, v in batch.items()}
    post, _ = agent.world.observe(seen)
    states = list(zip(post["deter"], post["stoch"]))
    for action in batch["prev_action"][context:]:
        deter, stoch, _ = rssm.imagine_step(*states[-1], action)
        states.append((deter, stoch))
    stoch = torch.stack([state[1] for state in states])

    truth = batch["image"] / 255
    model = agent.world.decoder(stoch) + 0.5  # (T,B,Y,X,C)
    error = (model - truth).square().flatten(2).sum(-1)
    video = torch.cat([truth, model, (model - truth + 1) / 2], 2)  # from top to bottom
    video = torch.cat(video.unbind(1), 2)  # sequences side by side
    return video, {
        "dream/image_error_posterior": error[:context].mean().item(),
        "dream/image_error_imagined": error[context:].mean().item(),
    }


def prompt_frames(args: Args, channels: int) -> torch.Tensor:
    """The prompt to look at, (T,64,64,C) in [0,1]: 8 frames, or its words."""
    content = read_prompt(args)
    if content is not None and content.dtype == np.uint8:
        frames = [Image.fromarray(frame).resize((64, 64)) for frame in prompt_clip(content)]
    else:
        frames = [Image.new("RGB", (64, 64))]
        words = "\n".join(textwrap.wrap(prompt_text(args), 10))
        ImageDraw.Draw(frames[0]).text((2, 2), words, fill="white")
    video = torch.from_numpy(np.stack([np.array(frame) for frame in frames])) / 255
    return video if channels == 3 else video[..., :1].expand(-1, -1, -1, channels)


@torch.no_grad()
def prompt_video(agent: Agent, args: Args, limit: int = 68) -> tuple[torch.Tensor, dict]:
    """Frames (T,Y,3*X,C): prompt, decoded target, and the policy in the environment for up to `limit` steps;
    and how much what really happens resembles the target: for a task without a reward the only score."""
    envs = make_envs(args, 1, 3)
    agent.eval()
    row = envs.reset()
    state = agent.initial(1)
    frames, stochs, logits = [], [], []
    while len(frames) < limit:
        state = agent.act(row, state)
        frames.append(torch.from_numpy(row["image"][0]) / 255)
        stochs.append(state["stoch"])
        logits.append(state["logits"])
        if row["is_last"][0]:
            break
        row = envs.step(state["action"].cpu().numpy())
    agent.train()

    steps = args.imag_horizon + 1
    windows = min(len(stochs) // steps, agent.target["stoch"].shape[1])
    results = {}
    if windows:  # (H+1,N,...): one after the other, as if they were dreams
        cut = steps * windows
        stoch = torch.cat(stochs[:cut]).unflatten(0, (windows, steps)).transpose(0, 1)
        logit = torch.cat(logits[:cut]).unflatten(0, (windows, steps)).transpose(0, 1)
        results["eval/match"] = agent.match(stoch, logit)[0].mean().item()
    target = agent.world.decoder(agent.target["stoch"][:, :1])[:, 0].cpu() + 0.5
    prompt = prompt_frames(args, target.shape[-1])
    t = torch.arange(len(frames))
    panels = [prompt[t % len(prompt)], target[t % len(target)], torch.stack(frames)]
    return torch.cat(panels, 2), results


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
    check_positive(args, "total_timesteps num_envs batch_size policy_batch_size policy_batch_length")
    check_positive(args, "train_every slow_every save_every log_every buffer_size model_clip ac_clip")
    check_positive(args, "connector_updates model_lr actor_lr critic_lr")
    check_shares(args, "gamma lam sticky_actions unimix kl_balance align_noise")
    check_positive(args, "hidden stoch classes cnn_depth layers")
    if args.batch_length % CLIP or args.batch_length <= 0:
        fail(f"--batch-length {args.batch_length} must be a multiple of {CLIP}, the frames of a clip")
    if args.imag_horizon < 2:
        fail("--imag-horizon must be at least 2: H steps train H - 1 actions")
    if args.imag_horizon < CLIP and args.align == "sequence":
        fail(f"--imag-horizon must be at least {CLIP}, the steps that are aligned")
    if args.data_free and (args.policy_batch_size * args.policy_batch_length) % 2:
        fail("--data-free needs an even number of states: --policy-batch-size times --policy-batch-length")
    gpu = args.device.startswith("cuda") or args.device == "auto" and torch.cuda.is_available()
    if args.precision == "auto":
        args.precision = "bf16" if gpu else "fp32"
    if not args.action_repeat:
        repeats = {"ALE": 4, "dm_control": 2}
        args.action_repeat = repeats.get(args.env_id.split(":")[-1].split("/")[0], 1)


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


def choose_capacity(args: Args, files: list, ranks: int) -> int:
    """Replay rows per environment, or per rank for the rows of all episode files."""
    # an episode has one row more than steps: up to twice as many in all, on disk only once they are used
    capacity = min(args.buffer_size, 2 * args.total_timesteps) // args.num_envs
    if files:
        capacity = max(sum(rows for _, rows, _ in files[rank::ranks]) for rank in range(ranks))
    if capacity < max(args.batch_length, args.policy_batch_length):
        fail(f"replay of {capacity} rows per environment is shorter than --batch-length and "
             "--policy-batch-length: --buffer-size, --total-timesteps")
    return capacity


def load_data(replay: Replay, episodes: list, shapes: dict, action_dim: int, vlm: str, vl_dim: int) -> None:
    """Episode files into the replay, which then holds nothing else. What does not fit is left out, named."""
    skipped = 0
    for path, _, _ in tqdm(episodes, desc="read"):
        try:
            rows = read_episode(path, shapes, action_dim, vlm, vl_dim)
        except Exception as error:  # a damaged file raises anything
            say(f"skipped {path}: {type(error).__name__} {error}")
            skipped += 1
            continue
        for t in range(len(rows["is_first"])):
            replay.add({name: x[t : t + 1] for name, x in rows.items()})
    if skipped:
        say(f"{skipped} of {len(episodes)} files skipped")


def check_lengths(args: Args, replay: Replay) -> None:
    """Fail if no episode, finished or running, can ever be replayed."""
    needed = max(args.batch_length, args.policy_batch_length)
    if replay.longest() < needed:
        fail(f"no episode has the {needed} rows of --batch-length and --policy-batch-length")


def embed_replay(replay: Replay, get_vlm, stop: list) -> None:
    """Embeddings for all episodes that have none; one after the other, so it can be interrupted."""
    for first, rows, env in tqdm(replay.episodes(), desc="embed", unit="episode"):
        if stop:
            return
        episode = replay.episode(first, rows, env)
        if rows >= CLIP and not episode["vl_embed"][-1].any():
            replay.label(first, env, embed_clips(get_vlm(), episode["image"].numpy()))


def write_episodes(replay: Replay, folder: Path, vlm: str, stop: list) -> None:
    """All finished episodes as files, but for those that are there. A file's number tells its first row."""
    written = {int(path.name.split("-")[0]) for path in folder.glob("*.npz")}
    for first, rows, env in tqdm(replay.finished, desc="write", unit="episode"):
        if stop:
            return
        number = first * replay.num_envs + env
        if number not in written:
            write_episode(folder, number, replay.episode(first, rows, env), vlm)


def read_inputs(args: Args, saved: dict, get_vlm) -> tuple[list, int, torch.Tensor, bool]:
    """Episode files, width of the embeddings, the prompt's embedding, and whether it is another than before.
    All that needs the VLM's weights or the user's files comes first: hours later would be too late."""
    for name in ("vlm", "data_dir"):
        if saved and getattr(args, name) != saved["args"][name]:
            flag = name.replace("_", "-")
            fail(f"{args.resume} was made with --{flag} {saved['args'][name]!r}: its data cannot change")
    files = []
    if args.data_dir and not saved:
        files = find_episodes(args.data_dir, args.buffer_size, args.batch_length, args.vlm)
    widths = {width for _, _, width in files}
    vl_dim = saved.get("vl_dim") or (widths.pop() if len(widths) == 1 else 0) or get_vlm().dim
    content = read_prompt(args)  # of a file, which may have changed
    known = content is None and prompt_text(args) == saved.get("prompt")
    embed = saved["embed"] if known else embed_prompt(args, get_vlm, vl_dim)
    new_prompt = bool(saved) and not torch.allclose(embed, saved["embed"], atol=1e-3)
    return files, vl_dim, embed, new_prompt


def resume(saved: dict, new_prompt: bool, agent: Agent, optimizer: Optimizers) -> None:
    """Weights and optimisers as they were; for a new prompt a new actor and critic."""
    weights = dict(saved["agent"])
    states = dict(saved["optimizer"])
    if new_prompt:
        weights.update({k: v for k, v in agent.state_dict().items() if k.startswith("behaviour")})
        states.update(actor=optimizer.actor.state_dict(), critic=optimizer.critic.state_dict())
    load_weights(agent, weights)
    optimizer.load_state_dict(states)


def due(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` was reached."""
    return every > 0 and now // every > before // every


def evaluate_prompt(agent: Agent, args: Args, stop: list) -> dict[str, float]:
    """`evaluate`, and the score of tasks whose 0 and 1 are known."""
    results = evaluate(agent, args, stop)
    _, low, high = PROMPTS.get(args.env_id.rpartition(":")[2], (None, None, None))
    if results and high is not None:
        results["eval/normalized_score"] = (results["eval/episodic_return"] - low) / (high - low)
    return results


class Session:
    """What the phases share: the agent and what trains it, its data, how far it is, its log (of rank 0)."""

    def __init__(self, args, agent, optimizer, replay, run: Path, rank: int, ranks: int, saved: dict):
        self.args = args
        self.agent = agent
        self.optimizer = optimizer
        self.replay = replay
        self.run = run
        self.rank = rank
        self.ranks = ranks
        self.device = agent.device
        self.step = saved.get("step", 0)  # policy steps of collection, over all environments and ranks
        self.done = dict(saved.get("done", dict(explore=0, pretrain=0, policy=0)))  # updates of each kind
        self.stop = stop_signals()
        self.stopping = False  # the same on all ranks
        self.kept = {}  # what the checkpoint holds besides
        self.writer = None

    @property
    def clock(self) -> int:
        """Where metrics are drawn: policy steps of collection, then updates."""
        return self.step + self.done["pretrain"] + self.done["policy"]

    def log(self, metrics: dict, bar: tqdm, step: int, updates: int) -> None:
        """`step`, `updates`: how far the bar is in policy steps, and updates since it began."""
        values = read_metrics(metrics, self.clock, self.run)
        values["charts/frames"] = self.step * self.args.action_repeat
        values.update(speeds(bar, step, updates))
        log_metrics(self.writer, values, self.clock)

    def save(self) -> None:
        ended = self.args.data_dir or self.stopping
        save_checkpoint(
            self.run, self.args, step=self.step, done=self.done, updates=sum(self.done.values()), **self.kept,
            agent=self.agent.state_dict(), optimizer=self.optimizer.state_dict(),
            replay=self.replay.state_dict(), at_risk=0 if ended else rows_at_risk(self.args, self.step))

    def fork_rng(self):
        """Evaluations and videos change nothing of what follows."""
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    def look(self, phase: str) -> None:
        """Save a video and log its numbers."""
        with self.fork_rng():
            if phase == "pretrain":
                video, results = dream_video(self.agent, self.replay)
            else:
                video, results = prompt_video(self.agent, self.args)
        save_gif(video, self.writer, self.clock)
        log_metrics(self.writer, results, self.clock)

    def score(self) -> None:
        """Evaluate the policy."""
        if self.args.eval_episodes:
            with self.fork_rng():
                results = evaluate_prompt(self.agent, self.args, self.stop)
            log_evaluation(self.writer, results, self.clock)

    def collect(self, envs: Envs, batch_size: int) -> None:
        """Act, store, and learn to explore, up to `total_timesteps`."""
        args, agent, replay, done = self.args, self.agent, self.replay, self.done
        agent.exploring = True
        metrics = {}
        explored = done["explore"]
        ret = math.nan
        bar = progress_bar(args, self.step, self.rank)
        row = envs.reset()
        state = agent.initial(envs.num_envs)
        no_label = torch.zeros(envs.num_envs, agent.vl_dim)  # until the clips are embedded
        while self.step < args.total_timesteps and not self.stopping:
            replay.add(row | {"prev_action": state["action"], "vl_embed": no_label})
            state = agent.act(row, state) if done["explore"] else agent.act_randomly(envs.num_envs)
            ended = row["is_last"]
            state["action"][torch.as_tensor(ended)] = 0  # no action follows an episode's end
            episodes = list(zip(envs.ret[ended], envs.length[ended]))
            ready = replay.longest() >= args.batch_length
            counts = [(~row["is_first"]).sum(), len(self.stop), ready]
            decisions, self.stopping, ready = sum_ranks(counts, self.device)
            before = self.step
            self.step += decisions
            row = envs.step(state["action"].cpu().numpy())

            begun = self.step >= args.learning_starts
            if begun and before < args.learning_starts and replay.finished:
                check_lengths(args, replay)
            if args.collect_policy == "plan2explore" and begun and ready == self.ranks:
                if due(args.train_every, before, self.step) or not done["explore"]:
                    metrics = train_explorer(agent, self.optimizer, replay, batch_size)
                    done["explore"] += 1

            if self.rank > 0:
                continue
            for ret, length in episodes:
                say(f"global_step={self.step}, episodic_return={ret}")
                results = {"charts/episodic_return": ret, "charts/episodic_length": length}
                log_metrics(self.writer, results, self.step)
            bar.set_postfix(episodic_return=ret, updates=done["explore"], refresh=False)
            bar.update(self.step - before)
            if metrics and due(args.log_every, before, self.step):
                self.log(metrics, bar, self.step, done["explore"] - explored)
            if due(args.save_every, before, self.step):
                self.save()
        bar.close()
        agent.exploring = False

    def learn(self, phase: str, total: int, train, batch_size: int) -> None:
        """Updates of a phase up to `total`."""
        args, done = self.args, self.done
        bar = progress_bar(replace(args, total_timesteps=total), done[phase], self.rank)
        bar.set_description(phase)
        bar.unit = "update"
        while done[phase] < total and not self.stopping:
            metrics = train(self.agent, self.optimizer, self.replay, batch_size)
            (self.stopping,) = sum_ranks([len(self.stop)], self.device)
            before = done[phase]
            done[phase] += 1
            if self.rank > 0:
                continue
            bar.update(1)
            end = done[phase] == total
            if end or due(args.log_every, before, done[phase]):
                self.log(metrics, bar, bar.initial, bar.n - bar.initial)
            if end or due(args.save_every, before, done[phase]):
                self.save()
            first = phase == "policy" and before == 0  # what the prompt is understood to mean
            if first or end or due(args.video_every, before, done[phase]):
                self.look(phase)
            if phase == "policy" and not end and due(args.eval_every, before, done[phase]):
                self.score()
        bar.close()


def main(args: Args) -> None:
    rank, ranks, device = start_ranks(args.device)
    keep_freed_memory()
    saved = load_checkpoint(Path(args.resume)) if args.resume else {}
    life = saved.get("life", -1) + 1  # how often the run was resumed
    if args.num_envs % ranks or args.batch_size % ranks or args.policy_batch_size % ranks:
        fail(f"--num-envs, --batch-size and --policy-batch-size must be multiples of the {ranks} processes")
    num_envs = args.num_envs // ranks
    batch_size = args.batch_size // ranks
    policy_batch_size = args.policy_batch_size // ranks

    # ---- environments, language, agent, optimiser ----
    seed = seed_generators(args.seed, rank, life)
    envs = make_envs(args, num_envs, 0, rank, life)  # after a resume other episodes than before
    get_vlm = cache(partial(load_vlm, args.vlm, device))
    files, vl_dim, embed, new_prompt = read_inputs(args, saved, get_vlm)
    torch.manual_seed(args.seed)  # the same weights on every rank
    agent = Agent(envs.shapes, envs.action_dim, envs.discrete, args, vl_dim).to(device)
    torch.manual_seed(seed)  # other samples on every rank
    optimizer = Optimizers(agent, args)
    if args.compile == "on":
        agent.world.rssm.core = compiled(agent.world.rssm.core)
        agent.connector.core = compiled(agent.connector.core)
        agent.world.decoder.forward = compiled(agent.world.decoder.forward)

    # ---- run directory and replay, as they were where a run is resumed ----
    capacity = saved.get("capacity") or choose_capacity(args, files, ranks)
    run = make_run(args, device)
    held = lock(run) if rank == 0 else None  # until the process ends
    specs = replay_specs(envs.shapes, envs.action_dim, vl_dim)
    streams = 1 if args.data_dir else num_envs
    if not saved:
        check_disk(run, specs, capacity * streams * ranks)
    replay = Replay(specs, capacity, streams, run / f"replay{rank}", device, new=not saved)
    if files:
        load_data(replay, files[rank::ranks], envs.shapes, envs.action_dim, args.vlm, vl_dim)
    session = Session(args, agent, optimizer, replay, run, rank, ranks, saved)
    session.kept = dict(life=life, capacity=capacity, vl_dim=vl_dim, prompt=prompt_text(args), embed=embed)
    if saved:
        resume(saved, new_prompt, agent, optimizer)
        replay.load_state_dict(saved["replay"], saved["at_risk"])
        if rank == 0:
            restore_rng(saved["rng"])
    if new_prompt:
        session.done["policy"] = 0

    if rank == 0:
        count = sum(p.numel() for p in agent.parameters() if p.requires_grad)
        print(f"{device}, {args.precision}: {count:,} parameters, embeddings of {vl_dim} numbers")
        print(f"1/{args.train_every} updates per policy step (batch {args.batch_size} x {args.batch_length})")
        print(f"then {args.pretrain_updates} updates of the world model, {args.policy_updates} of the policy")
        print(f"run directory {run}\nprompt: {prompt_text(args)}", flush=True)
        session.writer = start_log(run, args, session.clock)

    # ---- collect, embed the clips, pre-train world model and connector ----
    if session.step < args.total_timesteps and 0 < args.pretrain_updates <= session.done["pretrain"]:
        fail("more steps would change the world model under its connector and policy: "
             "raise --pretrain-updates and --policy-updates too, or begin a new run")
    if saved and rank == 0:
        session.save()  # says how many rows this life puts at risk
    if not args.data_dir:
        session.collect(envs, batch_size)
    if not session.stopping:
        check_lengths(args, replay)
        embed_replay(replay, get_vlm, session.stop)
        if args.write_episodes:
            write_episodes(replay, run / f"episodes{rank}", args.vlm, session.stop)
        (session.stopping,) = sum_ranks([len(session.stop)], device)
    session.learn("pretrain", args.pretrain_updates, train_world_model, batch_size)

    # ---- what the prompt asks for, then learn in dreams to do it ----
    if not session.stopping:
        with session.fork_rng():
            torch.manual_seed(args.seed)  # the same target after a resume
            agent.set_prompt(embed.to(device), policy_batch_size * args.policy_batch_length)
        if rank == 0 and not session.done["policy"]:
            log_metrics(session.writer, report_gap(agent, replay, embed.to(device)), session.clock)
    session.learn("policy", args.policy_updates, train_behaviour, policy_batch_size)

    # ---- the end ----
    if rank == 0:
        session.save()
        if session.done["policy"] and not session.stopping:  # also after the resume of a run that had ended
            session.score()
        print(f"saved at step {session.step} with updates {session.done} in {run}")
        session.writer.close()
    if ranks > 1:
        dist.barrier()  # nobody leaves while rank 0 is still evaluating
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
