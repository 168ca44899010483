"""TWM in one file: a Transformer-XL world model over latents, actions and rewards, and a policy on z alone.

Paper  Robine et al., "Transformer-based World Models Are Happy With 100k Interactions", arXiv:2303.07109
Code   checked against jrobine/twm at e6a8e59: same parameter counts, same losses (tests/golden)

    python twm.py --env-id ALE/Pong-v5         # Atari 100k protocol
    python twm.py --preset tiny                # everything once, two minutes on a CPU
    python twm.py --resume auto                # go on after Ctrl-C, a crash or a requeue
    python twm.py --replay-temperature inf     # uniform replay, the paper's ablation

How the pieces fit (T time, B batch, H imagination, N dreams; time is always axis 0):

    o_t, a stack of 4 frames --Encoder--> p(z_t | o_t) --sample--> z_t --Decoder--> o_t
    z_0 a_0 r_0 z_1 a_1 r_1 ... z_t a_t --Transformer--> h_t --heads--> p(z_{t+1} | h_t), r_t, g_t
    z_t --actor--> a_t, --critic--> v_t, trained in dreams of the Transformer

h_t = f(z_{t-l:t}, a_{t-l:t}, r_{t-l:t-1}), read at the token of a_t. The discount g_t is 0 or gamma as a
target and a mean in a dream. New against an RNN: the last l steps are seen as they were; rewards are inputs;
the policy needs only the encoder; the entropies of z and of the policy have a floor; replay favours what it
rarely drew.

Which obs, action and reward share an index. A training step pairs the observation and action
of a row with the reward and flags of the next one:

    replay row t   obs_t  reward_t  is_first_t  is_last_t  is_terminal_t | action_t
                   arrived together, caused by action_{t-1}              | chosen here
    sequence k     obs_k  action_k | reward_k  is_terminal_k  is_last_k: what the action led to
                   k = 0 is context; losses run on 1..T; obs_{T+1} is only the target of step T

Names: latent z, hidden h, post_logits p(z | o), prior_logits p(z | h), cont the discount g, value v. Paper:
phi observation model, psi dynamics, theta actor, xi critic. Axes: S groups of K classes (Z = S*K), D width
of h, L tokens, A actions.

Differences from the official code: the latent-prediction loss is computed (a wrong key leaves it out there).
FIRE after a lost life is the next counted step, and no step lies between lives; at reset FIRE is one frame,
then 0 to 29 frames of no-op, without FIRE 0 to 30 (official: FIRE and action 2 for four frames each, then 1
to 30 no-ops of four frames, without FIRE of one); the time limit is per game. The layers start with different
weights. A dream keeps keys and values instead of layer inputs (same numbers), and takes its restarts from one
pool.
SPDX-License-Identifier: MIT
"""
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6", "gymnasium>=1.3", "ale-py>=0.12.1", "tyro>=1.0", "tensorboard>=2.16", "tqdm>=4.60",
# ]
# ///
from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import zipfile
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
from gymnasium.spaces import Box, Discrete, flatdim
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import Summary
from tqdm import tqdm

# ======== 1. arguments ========
@dataclass
class Args:
    # run
    exp_name: str = "twm"  # second part of the run directory's name
    env_id: str = "ALE/Pong-v5"  # any Gymnasium id with discrete actions; what is no image is rendered
    seed: int = 1  # seed of weights, environments and sampling
    preset: Literal["default", "tiny"] = "default"  # tiny: every phase in two minutes on a CPU
    total_timesteps: int = 100_000  # policy steps; frames = steps x action repeat (official)
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: fp32, with TF32 on CUDA (official: fp32)
    compile: Literal["auto", "on", "off"] = "auto"  # auto: CUDA graphs of updates; on: torch.compile too
    run_dir: str = "runs"  # where run directories go
    resume: str = ""  # run directory to continue, or auto: the newest one of this environment, name and seed
    save_every: int = 5_000  # policy steps between checkpoints
    eval_every: int = 5_000  # policy steps between evaluations (official); 0: only one at the end
    eval_episodes: int = 10  # episodes per evaluation (official: 10, and 100 at the end); 0: none
    video_every: int = 10_000  # policy steps between dream GIFs; 0: only at the end
    log_every: int = 1_000  # policy steps between metric logs
    # environment
    num_envs: int = 1  # parallel environments (official: 1)
    grayscale: bool = True  # Atari in gray (official)
    frame_stack: int = 4  # frames that are one observation (official)
    action_repeat: int = 0  # environment steps per policy step; 0: 4 on Atari, else 1 (official)
    sticky_actions: float = 0.0  # Atari: probability that a frame repeats the last action (official)
    life_loss: bool = True  # Atari: in training a lost life ends an episode (official)
    # replay and schedule
    learning_starts: int = 5_000  # random policy steps, then pre-training (official)
    pretrain_observation: int = 30_000_000  # images that pre-train the observation model (official)
    pretrain_dynamics: int = 15_000_000  # steps that pre-train the dynamics (official)
    # 0.7 of 5e7, where 1 - 0.6 - 0.3 = 0.1 seems meant and 1 - 0.6 + 0.3 is written
    pretrain_behaviour: int = 35_000_000  # steps that pre-train actor and critic (official)
    train_every: float = 0.76  # policy steps per update (official: 95,000 steps for 125,000 updates)
    batch_size: int = 100  # sequences per update, B (official)
    batch_length: int = 16  # steps per sequence, T (official)
    replay_temperature: float = 20.0  # tau of the balanced sampling (official); inf: uniform
    # world model
    latents: int = 32  # groups of z, S (official)
    classes: int = 32  # classes per group, K (official)
    cnn_depth: int = 48  # channels of the first convolution; doubled by each further one (official)
    encoder_units: int = 512  # width of the encoder's two hidden layers (official)
    memory_length: int = 16  # past steps in the attention window, l; z and a see one more (official)
    layers: int = 10  # Transformer layers (official)
    width: int = 256  # width of the Transformer, D (official)
    heads: int = 4  # attention heads (official)
    head_dim: int = 64  # width of an attention head (official)
    ff_units: int = 1024  # width of its feed-forward layers (official)
    dropout: float = 0.1  # in Transformer and heads while the world model trains (official)
    head_layers: int = 4  # hidden layers of each output head: latent, reward, discount (official)
    latent_units: int = 512  # width of the latent head's hidden layers (official)
    scalar_units: int = 256  # width of those of reward and discount head (official)
    enc_entropy_coef: float = 5.0  # alpha_1, weight of what the encoder's entropy lacks (official)
    enc_entropy_threshold: float = 0.1  # share of S ln K that is enough (official)
    consistency_coef: float = 0.01  # alpha_2, encoder towards the dynamics' prediction (official)
    latent_coef: float = 1.0  # weight of the latent prediction (official)
    reward_coef: float = 10.0  # weight of the reward loss, beta_1 (official)
    discount_coef: float = 50.0  # weight of the discount loss, beta_2 (official)
    # behaviour
    imag_batch: int = 400  # dreams per update, N (official)
    imag_horizon: int = 15  # imagined steps, H (official)
    gamma: float = 0.99  # discount, which the dynamics learn to predict (official)
    lam: float = 0.95  # lambda of the generalised advantage (official)
    end_threshold: float = 0.1  # a dream ends where its cumulative discount falls below this (official)
    ent_coef: float = 0.01  # eta, weight of what the policy's entropy lacks (official)
    ent_threshold: float = 0.1  # Gamma, share of ln A that is enough (official)
    ac_layers: int = 4  # hidden layers of actor and critic (official)
    ac_units: int = 512  # width of actor's and critic's hidden layers (official)
    # optimiser
    model_lr: float = 1e-4  # learning rate of observation model and dynamics (official)
    actor_lr: float = 1e-4  # learning rate of the actor (official)
    critic_lr: float = 1e-5  # learning rate of the critic (official)
    weight_decay: float = 1e-6  # L2, added to the gradient (official)
    model_clip: float = 100.0  # largest gradient norm of observation model and dynamics (official)
    ac_clip: float = 1.0  # largest gradient norm of actor and critic (official)


PRESETS = {
    "default": {},
    "tiny": dict(
        total_timesteps=600, learning_starts=300, pretrain_observation=48_000, pretrain_dynamics=16_000,
        pretrain_behaviour=8_000, train_every=4.0, batch_size=8, batch_length=8, latents=8, classes=8,
        cnn_depth=8, encoder_units=64, memory_length=8, layers=2, width=64, heads=2, head_dim=32,
        ff_units=128, head_layers=2, latent_units=64, scalar_units=64, imag_batch=32, imag_horizon=5,
        ac_layers=2, ac_units=64, model_lr=1e-3, actor_lr=3e-4, critic_lr=3e-4, save_every=300, eval_every=0,
        video_every=0, log_every=100, eval_episodes=1),
}


# ======== 2. pure functions ========
def float32(x: torch.Tensor) -> torch.Tensor:
    """Norms, softmaxes, losses and returns run in float32 also under bf16; float64 stays, for tests."""
    return x.float() if x.dtype == torch.bfloat16 else x


def race_noise(like: torch.Tensor) -> torch.Tensor:
    """Exp(1) noise of that shape: argmax(p / e) is an exact categorical draw, without host reads."""
    return torch.empty_like(like).exponential_()


class StraightThrough(torch.autograd.Function):
    """One-hot sample of probs (...,K) whose gradient goes to probs as it is."""

    @staticmethod
    def forward(ctx, probs, noise):
        index = (probs / noise).argmax(-1, keepdim=True)
        return torch.zeros_like(probs).scatter_(-1, index, 1.0)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def sample_latent(logits: torch.Tensor) -> torch.Tensor:
    """Logits (...,S,K) -> one-hot z (...,S*K) with straight-through gradient."""
    probs = float32(logits).softmax(-1)
    return StraightThrough.apply(probs, race_noise(probs)).flatten(-2).to(logits.dtype)


def mode_latent(logits: torch.Tensor) -> torch.Tensor:
    """Logits (...,S,K) -> the likeliest one-hot z (...,S*K)."""
    return F.one_hot(logits.argmax(-1), logits.shape[-1]).flatten(-2).to(logits.dtype)


def sample_action(logits: torch.Tensor) -> torch.Tensor:
    """Logits (...,A) -> index (...) at temperature 1."""
    probs = float32(logits).softmax(-1)
    return (probs / race_noise(probs)).argmax(-1)


def entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of log-probabilities (...,K)."""
    return -(log_probs.exp() * log_probs).sum(-1)


def cross_entropy(probs: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """H(p, q) = -sum_k p_k log q_k in nats, summed over the groups S: p (...,S,K), logits of q (...,S,K) ->
    (...)."""
    return -(probs * float32(logits).log_softmax(-1)).sum((-2, -1))


def normal_nll(mean: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-ln N(target; mean, 1), element by element: half the squared error and a constant."""
    return 0.5 * (float32(mean) - target).square() + 0.5 * math.log(2 * math.pi)


def entropy_hinge(share: torch.Tensor, threshold: float) -> torch.Tensor:
    """max(0, threshold - share) of the entropy's mean over the batch, as a share of its maximum.
    Trap: the hinge is on the mean of the whole batch, of all ranks, not on each state (official)."""
    joint = gather_ranks(share.detach()[None]).mean()
    return torch.where(joint < threshold, threshold - share, 0.0)


def to_discount(is_terminal: torch.Tensor, gamma: float) -> torch.Tensor:
    """Target of the discount head: gamma, or 0 after a terminal step; a time limit keeps gamma. With this
    soft label the cross entropy is least at sigmoid(logit) = gamma (1 - p(terminal)). A dream uses that mean
    as it is, neither rounded nor sampled. DreamerV2 predicts its discount so too; DreamerV3 a flag, times a
    constant gamma."""
    return gamma * (~is_terminal)


def gae(reward: torch.Tensor, cont: torch.Tensor, value: torch.Tensor, lam: float) -> torch.Tensor:
    """A_t = delta_t + c_t lam A_{t+1}, delta_t = r_t + c_t v_{t+1} - v_t, A_H = 0. arXiv:1506.02438.
    reward, cont (H,...), value (H+1,...) -> (H,...). `cont` is the discount, 0 where an episode ended."""
    advantage = torch.zeros_like(value[0])
    advantages = []
    for t in reversed(range(len(reward))):
        delta = reward[t] + cont[t] * value[t + 1] - value[t]
        advantage = delta + cont[t] * lam * advantage
        advantages.append(advantage)
    return torch.stack(advantages[::-1])


def visit_logits(visits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Balanced sampling: p = softmax(-v / tau). v counts how often a step was drawn as the START of a
    sequence; the other steps of that sequence are not counted, nor are draws of the pre-training. With tau =
    inf it is uniform, as in the paper (the official code's 'inf' is 1 - v / sum v)."""
    return -visits / temperature


def first_visible(begin: torch.Tensor, memory: int, step: int = 0) -> torch.Tensor:
    """The first token that each token sees. begin (B,T): the step at which the episode of step t began, for
    steps step..step+T-1 -> (B,3*T). Token 3t is z_t, 3t+1 a_t, 3t+2 r_t. Within `memory` steps (official):
    z_t and a_t see 3 (memory + 1) tokens before them, r_t those from z_{t-memory} on. Each layer reaches that
    much further back; a training sequence of a context and T = memory steps is seen whole.
    r_t still belongs to the episode of step t, z_{t+1} to the next one: no token sees over an episode's
    end."""
    steps = step + torch.arange(begin.shape[1], device=begin.device)
    oldest = 3 * (steps - memory)
    window = torch.stack([oldest - 3, oldest - 2, oldest], -1)  # (T,3)
    return torch.maximum(window, 3 * begin[..., None]).flatten(1)


def relative_shift(x: torch.Tensor) -> torch.Tensor:
    """(...,Q,L) by distance L-1..0 -> (...,Q,L) by key 0..L-1, for the last Q of L tokens: entry (i, j)
    becomes the one of distance i - j. Entries with j after i are meaningless. Appendix B
    (arXiv:1901.02860)."""
    queries, length = x.shape[-2:]
    x = F.pad(x, (1, 0)).flatten(-2)
    return x[..., queries:].unflatten(-1, (queries, length))


# ======== 3. networks ========
def init(layer: nn.Module, gain: float) -> nn.Module:
    """Bias 0, weight uniform with standard deviation gain / sqrt(inputs)."""
    bound = gain * math.sqrt(3 / layer.weight[0].numel())
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)
    return layer


class Float32Linear(nn.Linear):
    """Runs in float32 under autocast. Trap: bf16 numbers near 200 are 1 apart, too coarse for advantages."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(float32(x))


def mlp(inputs: int, units: int, layers: int, output: nn.Module, dropout: float = 0.0) -> nn.Sequential:
    """`layers` x [linear, SiLU, dropout], then the layer `output`."""
    modules = []
    for _ in range(layers):
        modules += [init(nn.Linear(inputs, units), math.sqrt(2)), nn.SiLU(), nn.Dropout(dropout)]
        inputs = units
    return nn.Sequential(*modules, init(output, 1.0))


def orthogonal_mlp(inputs: int, units: int, layers: int, output: nn.Module) -> nn.Sequential:
    """Actor and critic: `mlp` with orthogonal weights."""
    network = mlp(inputs, units, layers, output)
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, math.sqrt(2))
    nn.init.orthogonal_(output.weight, 1.0)
    return network


def deconvolve_pixel(x: torch.Tensor, conv: nn.ConvTranspose2d) -> torch.Tensor:
    """Transposed convolution of one pixel: `conv(x[:, :, None, None])`, (N,in) -> (N,out,k,k).
    It is a matrix product, and computed so it takes a quarter of the time on a CPU."""
    weight = conv.weight.permute(0, 2, 3, 1)  # (in,k,k,out)
    x = F.linear(x, weight.flatten(1).T).unflatten(-1, weight.shape[1:])
    return (x + conv.bias.to(x.dtype)).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """Images (...,64,64,C) in [0,1] -> logits of p(z | o), (...,S,K). C counts the channels of the whole
    stack, so that z has one shape, stack or not: 4 x [4x4 convolution of stride 2, SiLU], two hidden
    layers."""

    def __init__(self, channels: int, args: Args):
        super().__init__()
        depth = args.cnn_depth
        widths = [channels, depth, 2 * depth, 4 * depth, 8 * depth]
        convs = [nn.Conv2d(a, b, 4, stride=2) for a, b in zip(widths, widths[1:])]
        self.convs = nn.ModuleList(init(conv, math.sqrt(2)) for conv in convs)
        self.groups = (args.latents, args.classes)
        output = nn.Linear(args.encoder_units, args.latents * args.classes)
        self.mlp = mlp(2 * 2 * widths[-1], args.encoder_units, 2, output)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        x = obs.flatten(0, -4).permute(0, 3, 1, 2)  # (N,C,Y,X)
        for conv in self.convs:
            x = F.silu(conv(x))
        logits = self.mlp(x.flatten(1))
        return logits.unflatten(0, obs.shape[:-3]).unflatten(-1, self.groups)


class Decoder(nn.Module):
    """z (...,Z) -> mean of the image (...,64,64,C), all frames of the stack."""

    def __init__(self, channels: int, args: Args):
        super().__init__()
        depth = args.cnn_depth
        widths = [16 * depth, 4 * depth, 2 * depth, depth, channels]
        layers = zip(widths, widths[1:], [5, 5, 6, 6])
        self.dense = init(nn.Linear(args.latents * args.classes, widths[0]), math.sqrt(2))
        self.convs = nn.ModuleList(nn.ConvTranspose2d(a, b, size, stride=2) for a, b, size in layers)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.dense(latent.flatten(0, -2)))
        x = deconvolve_pixel(x, self.convs[0])
        for conv in self.convs[1:]:
            x = conv(F.silu(x))
        return x.permute(0, 2, 3, 1).unflatten(0, latent.shape[:-1])


class Attention(nn.Module):
    """Attention with relative positions, section 3.3 (arXiv:1901.02860):
    score(i, j) = ((q_i + u) k_j + (q_i + v) R_{i-j}) / sqrt(D), R the projected sinusoids of the distance.
    Trap: the root is of the model's width D, not of the head's (official)."""

    def __init__(self, args: Args):
        super().__init__()
        width = args.heads * args.head_dim
        self.heads = args.heads
        self.dropout = args.dropout
        self.scale = 1 / math.sqrt(args.width)
        self.qkv = nn.Linear(args.width, 3 * width, bias=False)
        self.position = nn.Linear(args.width, width, bias=False)
        self.out = nn.Linear(width, args.width, bias=False)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(...,L,heads*d) -> (...,heads,L,d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def forward(self, x, sinusoids, u, v, visible, cache=None) -> torch.Tensor:
        """x (B,Q,D), the last Q of L tokens -> (B,Q,D). sinusoids (L,D) of distances L-1..0; u, v
        (heads,1,d); visible (B,1,Q,L). `cache` (2,B,heads,L,d) holds keys and values of the tokens before,
        and takes those of x."""
        query, key, value = [self.split(part) for part in self.qkv(x).chunk(3, -1)]
        if cache is not None:
            cache[0, :, :, -x.shape[1] :] = key
            cache[1, :, :, -x.shape[1] :] = value
            key, value = cache
        position = self.split(self.position(sinusoids))  # (heads,L,d)
        bias = relative_shift((query + v) @ position.transpose(-2, -1)) * self.scale
        bias = bias.masked_fill(~visible, -math.inf)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(query + u, key, value, bias, dropout, scale=self.scale)
        return self.out(x.transpose(-3, -2).flatten(-2))


class Layer(nn.Module):
    """Attention and feed-forward network, each followed by dropout, the residual, and only then LayerNorm."""

    def __init__(self, args: Args):
        super().__init__()
        self.attention = Attention(args)
        self.linear1 = nn.Linear(args.width, args.ff_units)
        self.linear2 = nn.Linear(args.ff_units, args.width)
        self.norm1 = nn.LayerNorm(args.width)
        self.norm2 = nn.LayerNorm(args.width)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x, *context) -> torch.Tensor:
        """(B,Q,D) and what `Attention` needs -> (B,Q,D)."""
        x = self.norm1(x + self.dropout(self.attention(x, *context)))
        hidden = self.dropout(F.silu(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))


class Transformer(nn.Module):
    """Transformer-XL over tokens (B,L,D), each of which sees those from `first` (B,L) to itself."""

    def __init__(self, args: Args):
        super().__init__()
        self.layers = nn.ModuleList(Layer(args) for _ in range(args.layers))
        self.u = nn.Parameter(torch.empty(args.heads, args.head_dim))  # shared by all layers
        self.v = nn.Parameter(torch.empty(args.heads, args.head_dim))
        nn.init.xavier_uniform_(self.u)
        nn.init.xavier_uniform_(self.v)
        self.dropout = nn.Dropout(args.dropout)
        distance = torch.arange(3 * (args.memory_length + 1) + 2, dtype=torch.float32)
        pair = torch.arange(0, args.width, 2, dtype=torch.float32)
        angle = distance[:, None] * torch.exp(pair * (-math.log(10_000) / args.width))
        sinusoids = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
        self.register_buffer("sinusoids", sinusoids, persistent=False)

    def forward(self, x: torch.Tensor, first: torch.Tensor, start: int = 0, cache=None) -> torch.Tensor:
        """Tokens start..start+Q-1, (B,Q,D), and their first visible ones (B,Q) -> (B,Q,D). `cache`
        (layers,2,B,heads,L,d) holds the tokens before `start`, as keys and values of each layer: those are
        linear in the layer's inputs, so that they are as exact as the paper's memory of inputs."""
        length = start + x.shape[1]
        key = torch.arange(length, device=x.device)
        query = key[start:, None]
        visible = (key <= query) & (key >= first[..., None])
        distance = key.flip(0).clamp(max=len(self.sinusoids) - 1)  # those beyond are not visible
        # dropout of the table itself: one mask per pass, the same for the batch and all layers (official)
        sinusoids = self.dropout(self.sinusoids.to(x.dtype)[distance])
        for i, layer in enumerate(self.layers):
            memory = None if cache is None else cache[i, :, :, :, :length]
            x = layer(x, sinusoids, self.u[:, None], self.v[:, None], visible[:, None], memory)
        return x


# ======== 4. world model ========
class Dynamics(nn.Module):
    """psi: tokens z, a, r -> h, and the three heads on h."""

    def __init__(self, action_dim: int, args: Args):
        super().__init__()
        self.args = args
        latent = args.latents * args.classes
        self.in_latent = init(nn.Linear(latent, args.width), math.sqrt(2))
        self.in_action = nn.Embedding(action_dim, args.width)  # no activation (official)
        self.in_reward = init(nn.Linear(1, args.width), math.sqrt(2))
        self.transformer = Transformer(args)
        self.latent = self.head(args.latent_units, nn.Linear(args.latent_units, latent))
        self.reward = self.head(args.scalar_units, Float32Linear(args.scalar_units, 1))
        self.cont = self.head(args.scalar_units, Float32Linear(args.scalar_units, 1))
        nn.init.constant_(self.cont[-1].bias, args.gamma)  # a logit: sigmoid(0.99) = 0.729 (official)

    def head(self, units: int, output: nn.Module) -> nn.Sequential:
        return mlp(self.args.width, units, self.args.head_layers, output, self.args.dropout)

    def tokens(self, latent: torch.Tensor, action: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
        """z (T,B,Z), a (T,B) index, r (T,B) -> tokens (B,3*T,D) in the order z, a, r of each step."""
        latent = F.silu(self.in_latent(latent))
        action = self.in_action(action).to(latent.dtype)
        reward = F.silu(self.in_reward(reward[..., None].to(latent.dtype)))
        return torch.stack([latent, action, reward], 2).transpose(0, 1).flatten(1, 2)

    def forward(self, latent, action, reward, is_last) -> torch.Tensor:
        """z (T,B,Z), a, r, is_last (T,B) -> h (T,B,D), read at the tokens of a. r_{T-1} is seen by nobody.
        3 T - 1 tokens give T predictions; with l past steps and the present one, that is 50 for l = 16."""
        steps = torch.arange(len(is_last), device=is_last.device)[:, None]
        is_first = torch.cat([torch.zeros_like(is_last[:1]), is_last[:-1]])
        begin = (steps * is_first).cummax(0).values
        first = first_visible(begin.T, self.args.memory_length)
        tokens = self.tokens(latent, action, reward)[:, :-1]
        hidden = self.transformer(tokens, first[:, :-1])
        return hidden[:, 1::3].transpose(0, 1)

    def empty_cache(self, batch: int, steps: int) -> torch.Tensor:
        """Room for `steps` steps: keys and values (layers,2,batch,heads,3*steps,d)."""
        args = self.args
        shape = (args.layers, 2, batch, args.heads, 3 * steps, args.head_dim)
        return torch.zeros(shape, device=self.in_latent.weight.device, dtype=self.in_latent.weight.dtype)

    def step(self, cache, step: int, latent, action, reward=None, begin=None) -> torch.Tensor:
        """h (B,D) of step `step`, whose z (B,Z) and a (B,) are appended to the cache, after the r (B,) of
        the step before. begin (2,B): the steps at which the episodes of the step before and of this one
        began."""
        if step == 0:
            tokens = self.tokens(latent[None], action[None], torch.zeros_like(action[None]))[:, :2]
            first = torch.zeros(len(latent), 2, dtype=torch.long, device=latent.device)
            return self.transformer(tokens, first, 0, cache)[:, -1]
        tokens = self.tokens(latent[None], action[None], reward[None]).roll(1, 1)
        first = first_visible(begin.T, self.args.memory_length, step - 1)[:, 2:5]  # r, z, a
        return self.transformer(tokens, first, 3 * step - 1, cache)[:, -1]

    def heads(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """h (...,D) -> logits of the next z (...,S,K), independent categoricals; mean of the reward (...), a
        normal of deviation 1; logit of the discount (...), a Bernoulli with the label of `to_discount`."""
        x = F.silu(hidden)  # a LayerNorm comes before it (official)
        latent = self.latent(x).unflatten(-1, (self.args.latents, self.args.classes))
        return latent, self.reward(x)[..., 0], self.cont(x)[..., 0]


class WorldModel(nn.Module):
    """Observation model phi (encoder, decoder) and dynamics psi, each with a loss and an optimiser of its
    own."""

    def __init__(self, shapes: dict, action_dim: int, args: Args):
        super().__init__()
        self.args = args
        channels = args.frame_stack * shapes["image"][-1]
        self.encoder = Encoder(channels, args)
        self.decoder = Decoder(channels, args)
        self.dynamics = Dynamics(action_dim, args)

    def observation_parameters(self) -> list[nn.Parameter]:
        return [*self.encoder.parameters(), *self.decoder.parameters()]

    def decoder_loss(self, recon: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        """-ln p(o | z), summed over the pixels of all frames, mean over (T,B). Trap: a mean over pixels
        would leave the other terms to decide what z is."""
        return normal_nll(recon, obs).flatten(2).sum(-1).mean()

    def entropy_loss(self, post_logits: torch.Tensor) -> torch.Tensor:
        """alpha_1 max(0, 0.1 - H): the encoder keeps a tenth of the greatest entropy, in the mean of the
        batch (official). The term as it is mostly written, -alpha_1 H, is that of a threshold of 1.
        Trap: it is too weak for the first updates, when the decoder's error is largest. On Pong H falls to 0,
        and one z stands for all images, within 75 updates; so does the official code's."""
        nats = entropy(float32(post_logits).log_softmax(-1))
        share = nats.mean() / math.log(self.args.classes)
        return self.args.enc_entropy_coef * entropy_hinge(share, self.args.enc_entropy_threshold)

    def consistency_loss(self, post_logits: torch.Tensor, prior_logits: torch.Tensor) -> torch.Tensor:
        """alpha_2 H(p(z | h), p(z | o)): the encoder stays near what the dynamics predicted. The prediction
        is only a target here, so the gradient is alpha_2 (p(z | o) - p(z | h)). This is the official order of
        arguments; texts on the paper mostly print the other one, the same term as the dynamics' own."""
        target = float32(prior_logits.detach()).softmax(-1)
        return self.args.consistency_coef * cross_entropy(target, post_logits).mean()

    def dynamics_losses(self, predicted: tuple, target_logits, reward, is_terminal, is_last) -> dict:
        """Predictions of steps 1..T (T,B,...), the encoder's logits of o_2..o_{T+1}, and what steps 1..T led
        to."""
        prior_logits, reward_mean, cont_logit = predicted
        # H(p(z | o), p(z | h)): the encoder's whole distribution is the target, not its sample, and is not
        # trained by its own prediction
        target = float32(target_logits.detach()).softmax(-1)
        # what follows an end is another episode: nothing to predict. Reward and discount of the end itself
        # count
        weight = (~is_last).to(target.dtype)
        count = gather_ranks(weight.sum()[None]).mean()  # of the joint batch
        # trap: the official code skips this term by a wrong key, so that its latent head is never trained
        latent_loss = (weight * cross_entropy(target, prior_logits)).sum() / count.clamp(min=1)
        reward_loss = normal_nll(reward_mean, reward).mean()
        discount = to_discount(is_terminal, self.args.gamma).to(cont_logit.dtype)
        cont_loss = F.binary_cross_entropy_with_logits(cont_logit, discount)
        return {
            "latent": self.args.latent_coef * latent_loss,
            "reward": self.args.reward_coef * reward_loss,
            "cont": self.args.discount_coef * cont_loss,
        }

    def observation_losses(self, obs: torch.Tensor) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """Images (T,B,Y,X,C) -> losses without consistency, logits (T,B,S,K), straight-through z (T,B,Z)."""
        post_logits = self.encoder(obs)
        latent = sample_latent(post_logits)
        losses = {
            "recon": self.decoder_loss(self.decoder(latent), obs),
            "entropy": self.entropy_loss(post_logits),
        }
        return losses, post_logits, latent

    def loss(self, obs, action, reward, is_terminal, is_last) -> tuple[dict, dict, torch.Tensor, dict]:
        """obs (T+2,B,Y,X,C) in [0,1], the others (T+1,B) -> losses of phi, losses of psi, z (T+1,B,Z),
        metrics. Step 0 is context: it is seen, and its prediction is used, but it has no loss of its own."""
        with torch.no_grad():  # of context and last observation only z and the logits are needed
            edge_logits = self.encoder(torch.stack([obs[0], obs[-1]]))
            context = sample_latent(edge_logits[:1])
        torch.clear_autocast_cache()  # bf16 copies of weights that have no gradient
        observation, post_logits, latent = self.observation_losses(obs[1:-1])

        # the dynamics do not train the encoder: gradients of the two meet only in the consistency loss
        latent = torch.cat([context, latent.detach()])
        hidden = self.dynamics(latent, action, reward, is_last)
        prior_logits, reward_mean, cont_logit = self.dynamics.heads(hidden)
        target_logits = torch.cat([post_logits[1:], edge_logits[1:]]).detach()
        predicted = (prior_logits[1:], reward_mean[1:], cont_logit[1:])
        dynamics = self.dynamics_losses(predicted, target_logits, reward[1:], is_terminal[1:], is_last[1:])
        observation["consistency"] = self.consistency_loss(post_logits, prior_logits[:-1])  # h_0 predicts z_1

        with torch.no_grad():
            metrics = {
                "wm/post_entropy": entropy(float32(post_logits).log_softmax(-1)).sum(-1).mean(),
                "wm/prior_entropy": entropy(float32(prior_logits).log_softmax(-1)).sum(-1).mean(),
                "wm/reward_error": (reward_mean[1:] - reward[1:]).abs().mean(),
                "wm/hidden_norm": hidden.norm(dim=-1).mean(),
            }
        return observation, dynamics, latent, metrics


# ======== 5. behaviour ========
class Behaviour(nn.Module):
    """theta and xi: actor and critic on z alone, trained in dreams. Their input could be [z, h] (an option of
    the official code) or the decoded image (IRIS); acting would need the Transformer or the decoder then."""

    def __init__(self, action_dim: int, args: Args):
        super().__init__()
        self.args = args
        self.action_dim = action_dim
        latent = args.latents * args.classes
        units = args.ac_units
        self.actor = orthogonal_mlp(latent, units, args.ac_layers, nn.Linear(units, action_dim))
        self.critic = orthogonal_mlp(latent, units, args.ac_layers, Float32Linear(units, 1))

    def value(self, latent: torch.Tensor) -> torch.Tensor:
        """z (...,Z) -> v (...)."""
        return self.critic(latent)[..., 0]

    @torch.no_grad()  # Reinforce needs no gradient through the dream
    def imagine(self, world: WorldModel, start: dict, restart: torch.Tensor) -> dict:
        """Roll the policy out. start: context z_{-1}, a_{-1}, r_{-1}, is_last_{-1} (N,...), and z_0, one
        step of a training sequence; restart (N,Z): latents of any replayed observations. -> latent (H+1,N,Z)
        and hidden, action, reward, cont, end, weight (H,N,...). The policy sees samples here, in the
        environment the mode of z. The caller sets eval mode: no dropout."""
        args = self.args
        horizon = args.imag_horizon
        dynamics = world.dynamics
        cache = dynamics.empty_cache(len(restart), 1 + horizon)
        dynamics.step(cache, 0, start["context"], start["action"])
        begun = torch.zeros_like(start["action"])
        now_begun = 1 * start["is_last"]  # step 0 is the context, the dream begins at step 1
        latent = start["latent"]
        reward = start["reward"]
        weight = torch.ones_like(reward)  # an end before the dream only hides the context
        steps = []
        for t in range(1, 1 + horizon):
            action = sample_action(self.actor(latent))
            begin = torch.stack([begun, now_begun])
            hidden = dynamics.step(cache, t, latent, action, reward, begin)
            prior_logits, reward, cont_logit = dynamics.heads(hidden)
            cont = float32(cont_logit).sigmoid()
            # a low cumulative discount means that the imagined episode has ended: go on from a replayed
            # observation. Both are always computed, so that nothing is read on the host; a roll, so that two
            # ends of one dream go on from different observations
            cumulative = weight * cont
            end = cumulative < args.end_threshold
            next_latent = torch.where(end[:, None], restart.roll(t, 0), sample_latent(prior_logits))
            steps.append(dict(
                latent=latent, hidden=hidden, action=action, reward=reward, cont=cont, end=end,
                weight=weight))
            latent = next_latent
            weight = torch.where(end, 1.0, cumulative)
            begun = now_begun
            now_begun = torch.where(end, t + 1, begun)
        dream = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
        dream["latent"] = torch.cat([dream["latent"], latent[None]])
        torch.clear_autocast_cache()  # bf16 copies of weights that have no gradient
        return dream

    @torch.no_grad()
    def targets(self, latent, reward, cont, end) -> tuple[torch.Tensor, torch.Tensor]:
        """latent (H+1,N,Z), the others (H,N) -> advantages and returns (H,N), with the critic as it is. The
        reward of an end counts, what follows does not."""
        value = self.value(latent)
        torch.clear_autocast_cache()  # bf16 copies of weights that have no gradient
        advantage = gae(reward, cont * ~end, value, self.args.lam)
        return advantage, advantage + value[:-1]

    def critic_loss(self, value, ret, weight) -> torch.Tensor:
        """Values, returns and weights (H,N) -> a scalar: -ln N(G; v, 1), weighted by the cumulative discount
        with which the dream came to each step."""
        return (weight * normal_nll(value, ret)).mean()

    def actor_loss(self, logits, action, advantage, weight) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (H,N,A), the others (H,N) -> Reinforce with the entropy hinge, and the entropy's share of
        ln A. Gamma keeps the policy from becoming deterministic; above it, nothing pushes it to chance."""
        log_probs = float32(logits).log_softmax(-1)
        log_prob = log_probs.gather(-1, action[..., None])[..., 0]
        share = (weight * entropy(log_probs)).mean() / math.log(self.action_dim)
        bonus = self.args.ent_coef * entropy_hinge(share, self.args.ent_threshold)
        return bonus - (weight * log_prob * advantage).mean(), share

    def losses(self, dream: dict) -> tuple[dict, dict]:
        """A dream -> losses of actor and critic, metrics."""
        latent = dream["latent"]
        advantage, ret = self.targets(latent, dream["reward"], dream["cont"], dream["end"])
        value = self.value(latent[:-1])
        actor, share = self.actor_loss(self.actor(latent[:-1]), dream["action"], advantage, dream["weight"])
        losses = {"value": self.critic_loss(value, ret, dream["weight"]), "policy": actor}
        metrics = {
            "ac/entropy_share": share.detach(),
            "ac/return": ret.mean(),
            "ac/value": value.detach().mean(),
            "ac/imag_reward": dream["reward"].mean(),
            "ac/imag_ends": dream["end"].sum(0).to(ret.dtype).mean(),
        }
        return losses, metrics


# ======== 6. update ========
class Adam:
    """torch.optim.Adam after clipping the norm of all gradients, with L2 decay (not AdamW):
    g <- g min(1, clip / |g|) + decay p;  m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2
    p <- p - lr m / (1-b1^k) / (sqrt(v / (1-b2^k)) + eps).  The counter is a tensor: no host reads."""

    def __init__(self, params, lr: float, clip: float, decay: float, beta1=0.9, beta2=0.999, eps=1e-5):
        self.params = list(params)
        self.lr = lr
        self.clip = clip
        self.decay = decay
        self.beta1 = beta1
        self.beta2 = beta2
        self.eps = eps
        self.count = torch.zeros((), device=self.params[0].device)
        self.square = [torch.zeros_like(p) for p in self.params]
        self.momentum = [torch.zeros_like(p) for p in self.params]

    def step(self, loss: torch.Tensor) -> torch.Tensor:
        """One update of these parameters only, whatever else the loss depends on -> norm before clipping."""
        grads = list(torch.autograd.grad(loss, self.params))
        average_ranks(grads)
        with torch.no_grad():
            norm = torch.stack(torch._foreach_norm(grads)).norm()
            torch._foreach_mul_(grads, (self.clip / (norm + 1e-6)).clamp(max=1))
            torch._foreach_add_(grads, self.params, alpha=self.decay)

            self.count += 1
            correct1 = 1 - self.beta1 ** self.count
            correct2 = 1 - self.beta2 ** self.count
            torch._foreach_lerp_(self.momentum, grads, 1 - self.beta1)
            torch._foreach_mul_(self.square, self.beta2)
            torch._foreach_addcmul_(self.square, grads, grads, 1 - self.beta2)
            scale = torch._foreach_sqrt(torch._foreach_div(self.square, correct2))
            torch._foreach_add_(scale, self.eps)
            change = torch._foreach_div(self.momentum, scale)
            torch._foreach_sub_(self.params, torch._foreach_mul(change, self.lr / correct1))
        return norm

    def state_dict(self) -> dict:
        return dict(count=self.count, square=self.square, momentum=self.momentum)

    def load_state_dict(self, saved: dict) -> None:
        self.count.copy_(saved["count"])
        torch._foreach_copy_(self.square, saved["square"])
        torch._foreach_copy_(self.momentum, saved["momentum"])


class Optimizers:
    """Four Adams, one per loss: none moves another's parameters."""

    def __init__(self, agent: Agent, args: Args):
        decay = args.weight_decay
        self.observation = Adam(agent.world.observation_parameters(), args.model_lr, args.model_clip, decay)
        self.dynamics = Adam(agent.world.dynamics.parameters(), args.model_lr, args.model_clip, decay)
        self.actor = Adam(agent.behaviour.actor.parameters(), args.actor_lr, args.ac_clip, decay)
        self.critic = Adam(agent.behaviour.critic.parameters(), args.critic_lr, args.ac_clip, decay)

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in vars(self).items()}

    def load_state_dict(self, saved: dict) -> None:
        for name, part in vars(self).items():
            part.load_state_dict(saved[name])


class Agent(nn.Module):
    """World model and behaviour: the policy for the environment, and what an update trains."""

    def __init__(self, shapes: dict, action_dim: int, discrete: bool, args: Args):
        super().__init__()
        self.args = args
        self.shapes = shapes
        self.action_dim = action_dim
        self.world = WorldModel(shapes, action_dim, args)
        self.behaviour = Behaviour(action_dim, args)
        self.graphs = {}  # updates that became CUDA graphs

    @property
    def device(self) -> torch.device:
        return self.world.dynamics.transformer.u.device

    def autocast(self):
        """bf16 for matrix products and convolutions. Each weight is cast once and kept until the end, not
        once per step. Trap: where the first use was under no_grad, the kept copy has no gradient."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16")

    def prepare(self, rows: dict) -> dict:
        """Replayed fields, on the device; the reward becomes tanh(reward) (official)."""
        rows = {k: v.to(self.device, non_blocking=True) for k, v in rows.items()}
        return dict(rows, reward=rows["reward"].tanh())

    def initial(self, num_envs: int) -> dict:
        """State before the first observation: an empty stack of frames."""
        height, width, channels = self.shapes["image"]
        stack = torch.zeros(num_envs, height, width, self.args.frame_stack * channels, dtype=torch.uint8)
        return {"stack": stack.to(self.device)}

    def push(self, row: dict, state: dict) -> torch.Tensor:
        """Row (N,...) -> stack (N,Y,X,frames*C), oldest frame first. An episode begins with equal frames,
        also after a lost life."""
        frame = torch.as_tensor(row["image"], device=self.device)
        begins = torch.as_tensor(row["is_first"] | row["is_last"], device=self.device)
        moved = torch.cat([state["stack"][..., frame.shape[-1] :], frame], -1)
        return torch.where(begins[:, None, None, None], frame.repeat(1, 1, 1, self.args.frame_stack), moved)

    @torch.no_grad()
    def act(self, row: dict, state: dict) -> dict:
        """Row (N,...) and state -> new {stack, action}: the mode of z, a sampled action, in evaluation too
        (official). The Transformer is not asked: the encoder has o_t, and z_t is all that the policy saw in
        its dreams."""
        stack = self.push(row, state)
        with self.autocast():
            latent = mode_latent(self.world.encoder(stack / 255))
            index = sample_action(self.behaviour.actor(latent))
        return dict(stack=stack, action=self.to_onehot(index, row))

    def act_randomly(self, row: dict, state: dict) -> dict:
        """Uniform actions, for the steps before the first update."""
        index = torch.randint(self.action_dim, (len(row["reward"]),), device=self.device)
        return dict(stack=self.push(row, state), action=self.to_onehot(index, row))

    def to_onehot(self, index: torch.Tensor, row: dict) -> torch.Tensor:
        """(N,) -> (N,A); where the row asks for it, FIRE, which is action 1: the game goes on only then."""
        if "fire" in row:
            index = torch.where(torch.as_tensor(row["fire"], device=self.device), 1, index)
        return F.one_hot(index, self.action_dim).to(torch.get_default_dtype())


def update_world_model(agent: Agent, optimizer: Optimizers, batch: dict) -> tuple[dict, dict]:
    """Prepared rows (T+1,B,...), images (T+2,B,...): one step of psi, then of phi -> states where dreams can
    start (T*B,...), metrics."""
    world = agent.world
    rows = dict(batch)
    obs = rows.pop("image") / 255
    world.train()  # with dropout, also where predictions are the target of the consistency loss (official)
    with agent.autocast():
        observation, dynamics, latent, metrics = world.loss(obs, **rows)
    metrics["grad/dynamics_norm"] = optimizer.dynamics.step(sum(dynamics.values()))
    metrics["grad/observation_norm"] = optimizer.observation.step(sum(observation.values()))
    world.eval()
    metrics.update({f"losses/{k}": v.detach() for k, v in {**observation, **dynamics}.items()})
    return dream_starts(latent, rows), metrics


def train_world_model(agent: Agent, optimizer: Optimizers, replay: Replay, batch_size: int) -> tuple:
    """One update of the world model: sample, then all that learns -> starts of dreams, metrics."""
    rows = agent.prepare(replay.sample(batch_size, agent.args.batch_length))
    return captured(update_world_model, agent, optimizer, rows)


def dream_starts(latent: torch.Tensor, rows: dict) -> dict:
    """z (T+1,B,Z) and fields (T+1,B) -> for each of T*B pairs of steps, the first as context. The z are
    those of the training batch: samples of the encoder before its step, so dreams start where replay
    looks."""
    return {
        "context": latent[:-1].flatten(0, 1),
        "latent": latent[1:].flatten(0, 1),
        "action": rows["action"][:-1].flatten(),
        "reward": rows["reward"][:-1].flatten(),
        "is_last": rows["is_last"][:-1].flatten(),
    }


def update_behaviour(agent: Agent, optimizer: Optimizers, batch: dict) -> dict:
    """States where dreams start (N,...), images (N,Y,X,C) where they go on after an end: one step of the
    critic, one of the actor -> metrics."""
    with agent.autocast():
        with torch.no_grad():
            restart = sample_latent(agent.world.encoder(batch["image"] / 255))
        dream = agent.behaviour.imagine(agent.world, batch, restart)
        losses, metrics = agent.behaviour.losses(dream)
    metrics["grad/critic_norm"] = optimizer.critic.step(losses["value"])
    metrics["grad/actor_norm"] = optimizer.actor.step(losses["policy"])
    metrics.update({f"losses/{k}": v.detach() for k, v in losses.items()})
    return metrics


def train_behaviour(agent: Agent, optimizer: Optimizers, replay: Replay, start: dict, imag_batch: int):
    """One update of the behaviour in dreams from `imag_batch` of the start states, without replacement ->
    metrics."""
    chosen = torch.randperm(len(start["reward"]), device=agent.device)[:imag_batch]
    batch = {k: v[chosen] for k, v in start.items()}
    batch["image"] = replay.sample_images(imag_batch).to(agent.device, non_blocking=True)
    return captured(update_behaviour, agent, optimizer, batch)


def train_step(agent: Agent, optimizer: Optimizers, replay: Replay, batch_size: int) -> dict:
    """One update of everything: world model, then actor and critic in dreams of it -> metrics. Fixed shapes
    and no host reads."""
    start, metrics = train_world_model(agent, optimizer, replay, batch_size)
    imag_batch = agent.args.imag_batch * batch_size // agent.args.batch_size  # of this rank
    return metrics | train_behaviour(agent, optimizer, replay, start, imag_batch)


def updates_due(credit: float, train_every: float) -> tuple[int, float]:
    """Policy steps that are not paid for yet -> updates, and what remains. 95,000 steps at 0.76 give
    124,999."""
    count = 0
    while credit >= train_every:
        credit -= train_every
        count += 1
    return count, credit


# ---- pre-training, on the random steps; nothing of it counts as a visit. The last batch of an epoch is
# smaller, so these updates are no CUDA graphs ----
def pretrain_observation(agent: Agent, optimizer: Optimizers, replay: Replay, batch_size: int) -> tuple:
    """The observation model alone, without consistency, on a batch of images -> metrics, images."""
    images = replay.next_images(batch_size * agent.args.batch_length).to(agent.device)
    with agent.autocast():
        losses, _, _ = agent.world.observation_losses((images / 255)[None])
    metrics = {"grad/observation_norm": optimizer.observation.step(sum(losses.values()))}
    metrics.update({f"losses/{k}": v.detach() for k, v in losses.items()})
    return metrics, len(images)


def pretrain_dynamics(agent: Agent, optimizer: Optimizers, replay: Replay, batch_size: int) -> tuple:
    """The dynamics alone; z is sampled anew from the logits that replay keeps, as the encoder stays as it
    is."""
    length = agent.args.batch_length
    rows, logits = replay.next_sequences(batch_size, length)
    rows = agent.prepare(rows)
    world = agent.world
    world.train()
    with agent.autocast():
        latent = sample_latent(logits[:-1])
        hidden = world.dynamics(latent, rows["action"], rows["reward"], rows["is_last"])
        predicted = [part[1:] for part in world.dynamics.heads(hidden)]
        outcome = [rows[k][1:] for k in ("reward", "is_terminal", "is_last")]
        losses = world.dynamics_losses(predicted, logits[2:], *outcome)
    metrics = {"grad/dynamics_norm": optimizer.dynamics.step(sum(losses.values()))}
    world.eval()
    metrics.update({f"losses/{k}": v.detach() for k, v in losses.items()})
    return metrics, rows["reward"][1:].numel()


def pretrain_behaviour(agent: Agent, optimizer: Optimizers, replay: Replay, batch_size: int) -> tuple:
    """Critic on the random policy's real returns; the actor only towards chance, without threshold
    (official)."""
    args = agent.args
    behaviour = agent.behaviour
    imag_batch = args.imag_batch * batch_size // args.batch_size
    rows, logits = replay.next_sequences(imag_batch, args.imag_horizon)
    rows = {k: v[1:] for k, v in agent.prepare(rows).items()}
    latent = sample_latent(logits[1:])
    discount = torch.full_like(rows["reward"], args.gamma)
    with agent.autocast():
        _, ret = behaviour.targets(latent, rows["reward"], discount, rows["is_last"])
        losses = {"value": behaviour.critic_loss(behaviour.value(latent[:-1]), ret, 1.0)}
        nats = entropy(float32(behaviour.actor(latent)).log_softmax(-1))
        losses["policy"] = -args.ent_coef * nats.mean() / math.log(agent.action_dim)
    metrics = {"grad/critic_norm": optimizer.critic.step(losses["value"])}
    metrics["grad/actor_norm"] = optimizer.actor.step(losses["policy"])
    metrics.update({f"losses/{k}": v.detach() for k, v in losses.items()})
    return metrics, ret.numel()


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


class LifeEnvs(Envs):
    """Atari. With `life_loss` a lost life ends an episode of replay: the row is_last and is_terminal, the
    game goes on, as do `ret` and `length`; `last` is true only where the game is over. In a game with FIRE,
    `fire` in the row asks for it after a lost life, as the game would stand still."""

    def __init__(self, *args, life_loss: bool, **options):
        super().__init__(*args, **options)
        self.life_loss = life_loss
        with gymnasium.make(find_spec(args[0].env_id).id) as game:
            self.has_fire = game.unwrapped.get_action_meanings()[1:2] == ["FIRE"]

    def reset(self) -> dict[str, np.ndarray]:
        self.lives = np.zeros(self.num_envs, int)
        row = super().reset()
        row["fire"] = np.zeros(self.num_envs, bool)
        return row

    def step(self, action: np.ndarray) -> dict[str, np.ndarray]:
        obs, reward, terminated, truncated, info = self.envs.step(self.native(action))
        is_first = self.last
        self.last = terminated | truncated
        lost = (info["lives"] < self.lives) & ~is_first
        self.lives = info["lives"].copy()
        self.ret = np.where(is_first, 0, self.ret + reward)
        self.length = np.where(is_first, 0, self.length + 1)
        death = lost & self.life_loss
        return self.row(
            obs, reward, is_first=is_first, is_last=self.last | death, is_terminal=terminated | death,
            fire=lost & ~self.last & self.has_fire)


def make_envs(args: Args, num_envs: int, *key: int) -> Envs:
    """Anything with `reset`, `step`, `shapes`, `action_dim`, `discrete`, `ret`, `length` and `last` will
    do."""
    seeds = make_seeds(num_envs, args.seed, *key)
    evaluation = key[0] == 1  # whole games, without no-ops (official)
    if find_spec(args.env_id).id.startswith("ALE/"):
        # ale-py resizes by area, as the official code does
        envs = LifeEnvs(
            args, num_envs, seeds, 64, life_loss=args.life_loss and not evaluation, use_fire_reset=True,
            noop_max=0 if evaluation else 31, img_height=64, img_width=64, grayscale=args.grayscale)
    else:
        envs = Envs(args, num_envs, seeds, 64, pixels=not shows_image(args.env_id))
    if not envs.discrete or envs.action_dim < 2:
        fail(f"{args.env_id} has actions {envs.action_space}: TWM needs two or more discrete ones; "
             "dreamer_v3.py learns others")
    return envs


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


class Replay(Storage):
    """One endless line of policy steps for each environment, drawn from in proportion to exp(-visits / tau).
    The last observation of a game is no step: it is thrown away, and the next one in line is the first of
    the next game (official). `line` (N,capacity): the row of each step, `count` (N): steps in line. Of the
    newest step only the observation is known yet. Frames are stored once; stacks are put together when they
    are drawn."""

    def __init__(self, *args, frames: int, temperature: float, **options):
        super().__init__(*args, **options)
        self.frames = frames
        self.temperature = temperature
        self.line = torch.zeros(self.num_envs, self.capacity, dtype=torch.long, device=self.device)
        self.visits = torch.zeros(self.num_envs, self.capacity, dtype=torch.long, device=self.device)
        self.count = [0] * self.num_envs
        self.age = np.zeros(self.num_envs, int)  # frames of the running episode before the newest
        self.queue = None  # what is left of an epoch of the pre-training
        self.logits = None  # the encoder's, of all steps, while it does not change

    def add(self, row: dict) -> None:
        begins = row["is_first"] | row["is_last"]  # as in Agent.push
        self.age = np.where(begins, 0, self.age + 1)
        super().add(dict(row, age=self.age))
        self.track(self.rows - 1, row["is_first"])

    def track(self, number: int, is_first) -> None:
        """Put the row in line, by its flags (N,)."""
        for env in range(self.num_envs):
            if is_first[env] and self.count[env]:
                self.count[env] -= 1  # the row before was the last observation of a game
            self.line[env, self.count[env]] = number
            self.count[env] += 1

    def starts(self, length: int) -> list[int]:
        """How many sequences of `length` steps with known outcome each environment has."""
        return [max(count - length, 0) for count in self.count]

    def is_ready(self, batch_size: int, *lengths: int) -> bool:
        """Whether there are `batch_size` different sequences of each of these lengths."""
        return all(sum(self.starts(length)) >= batch_size for length in lengths)

    def stacks(self, env: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Observations (...,Y,X,frames*C) of steps in line (...): frames of before an episode repeat its
        first."""
        rows = self.line[env, step]
        age = self.data["age"][rows, env].long()
        back = torch.arange(self.frames - 1, -1, -1, device=self.device)
        rows = rows[..., None] - torch.minimum(back, age[..., None])
        images = self.data["image"][rows, env[..., None]]  # (...,frames,Y,X,C)
        return images.movedim(-4, -2).flatten(-2)

    def sequences(self, env: torch.Tensor, start: torch.Tensor, length: int) -> tuple[torch.Tensor, dict]:
        """Starts (B,) -> steps start-1..start+length in line, (length+2,B), and what all but the last led
        to. Before the first step of all it is repeated, with action 0 and reward 0 (official)."""
        step = start - 1 + torch.arange(length + 2, device=self.device)[:, None]
        known = step[:-1] >= 0
        step = step.clamp(min=0)
        rows = self.line[env, step]
        outcome = rows[:-1] + 1
        action = self.data["action"][rows[:-1], env].argmax(-1)
        reward = self.data["reward"][outcome, env]
        # where a life of the run ended without an end of the game, another game follows all the same
        is_last = self.data["is_last"][outcome, env] | self.data["is_first"][rows[1:], env] & known
        return step, {
            "action": action * known,
            "reward": reward * known,
            "is_terminal": self.data["is_terminal"][outcome, env],
            "is_last": is_last,
        }

    def sample(self, batch_size: int, length: int) -> dict:
        """Balanced sampling without replacement -> image (length+2,B,Y,X,frames*C), other fields
        (length+1,B). The largest of logits + Gumbel noise are a draw without replacement, without host
        reads."""
        starts = torch.tensor(self.starts(length), device=self.device)
        size = max(self.starts(length))
        logits = visit_logits(self.visits[:, :size], self.temperature)
        keys = logits - race_noise(logits).log()
        usable = torch.arange(size, device=self.device) < starts[:, None]
        keys = keys.masked_fill(~usable, -math.inf)
        chosen = keys.flatten().topk(batch_size).indices
        env = chosen // size
        start = chosen % size
        self.visits[env, start] += 1
        step, batch = self.sequences(env, start, length)
        return dict(batch, image=self.stacks(env, step))

    def sample_images(self, count: int) -> torch.Tensor:
        """Observations (count,Y,X,frames*C), uniformly."""
        env = torch.randint(self.num_envs, (count,), device=self.device)
        size = torch.tensor(self.count, device=self.device)[env] - 1
        step = (torch.rand(count, device=self.device) * size).long()
        return self.stacks(env, step)

    # ---- pre-training: epochs without replacement ----
    def next_epoch(self, starts: list[torch.Tensor]) -> None:
        """Shuffle (env, start) pairs, given as one tensor of starts per environment."""
        pairs = [torch.stack([torch.full_like(start, env), start]) for env, start in enumerate(starts)]
        pairs = torch.cat(pairs, 1)
        self.queue = pairs[:, torch.randperm(pairs.shape[1], device=self.device)]

    def take(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next (env, start) of the epoch, `count` or what is left of it."""
        env, start = self.queue[:, :count]
        self.queue = self.queue[:, count:] if count < self.queue.shape[1] else None
        return env, start

    def next_images(self, count: int) -> torch.Tensor:
        """Observations (count or less,Y,X,frames*C) of an epoch over all steps."""
        if self.queue is None:
            self.next_epoch([torch.arange(size, device=self.device) for size in self.starts(1)])
        return self.stacks(*self.take(count))

    def next_sequences(self, count: int, length: int) -> tuple[dict, torch.Tensor]:
        """Fields (length+1,count or less) and logits (length+2,count or less,S,K) of an epoch over sequences
        that do not overlap, from a random phase on."""
        if self.queue is None:
            sizes = self.starts(length)
            phase = int(torch.randint(min(length, max(sizes)), ()))
            ends = [max(size, phase) for size in sizes]
            self.next_epoch([torch.arange(phase, end, length, device=self.device) for end in ends])
        env, start = self.take(count)
        step, batch = self.sequences(env, start, length)
        return batch, self.logits[env.to(self.logits.device), step.to(self.logits.device)]

    @torch.no_grad()
    def encode(self, agent: Agent) -> None:
        """Keep the encoder's logits (N,steps,S,K) of all steps, for the pre-training of what builds on it."""
        step = torch.arange(max(self.count), device=self.device)
        logits = []
        for env in range(self.num_envs):
            parts = []
            for part in step.split(256):
                images = self.stacks(torch.full_like(part, env), part).to(agent.device)
                with agent.autocast():
                    parts.append(agent.world.encoder(images / 255))
            logits.append(torch.cat(parts))
        self.logits = torch.stack(logits)

    def state_dict(self) -> dict:
        return dict(super().state_dict(), visits=self.visits[:, : max(self.count)].cpu())

    def load_state_dict(self, state: dict, lost: int) -> None:
        """The line is found again by the flags. The visits are in the checkpoint, for all ranks those of
        rank 0: they differ by chance only."""
        super().load_state_dict(state, lost)
        for number in range(self.rows):
            self.track(number, self.files["is_first"][number].tolist())
        self.visits[:, : state["visits"].shape[1]] = state["visits"].to(self.device)


def replay_specs(shapes: dict, action_dim: int) -> dict:
    """Fields of a replay row: name -> (shape, dtype)."""
    return {
        "image": (shapes["image"], torch.uint8),
        "age": ((), torch.int32),
        "reward": ((), torch.float32),
        "is_first": ((), torch.bool),
        "is_last": ((), torch.bool),
        "is_terminal": ((), torch.bool),
        "action": ((action_dim,), torch.float32),
    }


def lengthen(folder: Path, specs: dict, num_envs: int, before: int, after: int) -> None:
    """Room for more rows in the files of a run that is resumed, perhaps with a larger budget."""
    for name, (shape, dtype) in specs.items():
        path = folder / f"{name}.bin"
        size = num_envs * math.prod(shape) * dtype.itemsize
        if path.exists() and path.stat().st_size == before * size:
            os.truncate(path, after * size)


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
    The first `context` steps see images, rewards and ends, the rest are dreamed with nothing but the recorded
    actions; the newest frame of each stack is shown."""
    args = agent.args
    world = agent.world.eval()  # no dropout; an evaluation may have been before
    context = min(context, args.batch_length // 2)
    starts = torch.tensor(replay.starts(args.batch_length))
    env = torch.multinomial(starts / starts.sum(), count, replacement=True)
    start = (torch.rand(count) * starts[env]).long()
    env = env.to(replay.device)
    start = start.to(replay.device)
    step, batch = replay.sequences(env, start, args.batch_length)
    batch = agent.prepare(batch)
    truth = replay.stacks(env, step)[1:-1].to(agent.device) / 255  # (T,count,Y,X,frames*C)
    seen = mode_latent(world.encoder(truth[:context]))
    cache = world.dynamics.empty_cache(count, args.batch_length)
    begun = torch.zeros(2, count, dtype=torch.long, device=agent.device)  # of the step before, of this one
    latent = seen[0]
    reward = None  # no step comes before the first
    latents = []
    for t in range(args.batch_length):  # t = 0 is step 1 of the sequence
        latents.append(latent)
        hidden = world.dynamics.step(cache, t, latent, batch["action"][1 + t], reward, begun)
        prior_logits, reward, _ = world.dynamics.heads(hidden)
        latent = mode_latent(prior_logits)
        now_begun = begun[1]
        if t + 1 < context:
            latent = seen[t + 1]
            reward = batch["reward"][1 + t]
            now_begun = torch.where(batch["is_last"][1 + t], t + 1, now_begun)
        begun = torch.stack([begun[1], now_begun])

    model = world.decoder(torch.stack(latents))
    error = (model - truth).square().flatten(2).sum(-1)
    channels = agent.shapes["image"][-1]
    truth = truth[..., -channels:]
    model = model[..., -channels:]
    video = torch.cat([truth, model, (model - truth + 1) / 2], 2)  # from top to bottom
    video = torch.cat(video.unbind(1), 2)  # sequences side by side
    return video, {
        "dream/image_error_posterior": error[:context].mean().item(),
        "dream/image_error_imagined": error[context:].mean().item(),
    }


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
    check_positive(args, "total_timesteps num_envs batch_size batch_length imag_batch imag_horizon")
    check_positive(args, "memory_length train_every frame_stack replay_temperature latents cnn_depth layers")
    check_positive(args, "encoder_units width heads head_dim ff_units latent_units scalar_units ac_units")
    check_positive(args, "model_clip ac_clip save_every head_layers ac_layers")
    check_shares(args, "gamma lam sticky_actions end_threshold")
    if args.imag_batch > args.batch_size * args.batch_length:
        fail("--imag-batch must be at most --batch-size x --batch-length: dreams start in different states")
    if args.batch_length < 2 or args.classes < 2 or args.width % 2:
        fail("--batch-length and --classes must be at least 2, --width even")
    if not 0 <= args.dropout < 1:
        fail(f"--dropout must be at least 0 and below 1, got {args.dropout}")
    if args.precision == "auto":
        args.precision = "fp32"
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


PHASES = {"observation": pretrain_observation, "dynamics": pretrain_dynamics, "behaviour": pretrain_behaviour}


def pretrain(agent: Agent, optimizer: Optimizers, replay: Replay, seen: dict, batch_size: int, report):
    """Train each part on the random steps until it has seen its budget. `seen`: images or steps so far, by
    phase, of all ranks: their epochs differ in length, but they must make the same number of updates.
    report(phase, metrics) -> whether to stop -> whether all phases are done."""
    for phase, train in PHASES.items():
        budget = getattr(agent.args, f"pretrain_{phase}")
        replay.queue = None
        if seen[phase] < budget and not (dist.is_initialized() and dist.get_rank()):
            say(f"pre-training of the {phase}: {seen[phase]:,} of {budget:,}")
        if phase != "observation" and seen[phase] < budget and replay.logits is None:
            replay.encode(agent)
        while seen[phase] < budget:
            metrics, count = train(agent, optimizer, replay, batch_size)
            seen[phase] += sum_ranks([count], agent.device)[0]
            if report(phase, metrics):
                return False
    replay.queue = None
    replay.logits = None
    return True


def main(args: Args) -> None:
    rank, ranks, device = start_ranks(args.device)
    keep_freed_memory()
    saved = load_checkpoint(Path(args.resume)) if args.resume else {}
    step = saved.get("step", 0)  # policy steps over all environments and ranks
    updates = saved.get("updates", 0)
    pretrained = saved.get("pretrained", False)
    seen = saved.get("seen", dict.fromkeys(PHASES, 0))  # by the pre-training
    credit = saved.get("credit", 0.0)  # policy steps that updates are still due for
    life = saved.get("life", -1) + 1  # how often the run was resumed
    if args.num_envs % ranks or args.batch_size % ranks or args.imag_batch % ranks:
        fail(f"--num-envs, --batch-size and --imag-batch must be multiples of the {ranks} processes")
    num_envs = args.num_envs // ranks
    batch_size = args.batch_size // ranks

    # ---- environments, agent, optimiser ----
    seed = seed_generators(args.seed, rank, life)
    envs = make_envs(args, num_envs, 0, rank, life)  # after a resume other episodes than before
    torch.manual_seed(args.seed)  # the same weights on every rank
    agent = Agent(envs.shapes, envs.action_dim, envs.discrete, args).to(device)
    agent.eval()  # dropout only where the world model trains
    torch.manual_seed(seed)  # other samples on every rank
    optimizer = Optimizers(agent, args)
    if args.compile == "on":
        agent.world.decoder.forward = compiled(agent.world.decoder.forward)
        for layer in agent.world.dynamics.transformer.layers:
            layer.forward = compiled(layer.forward, dynamic=None)

    # ---- run directory and replay, as they were where a run is resumed ----
    # the whole run is kept: an episode has one row more than steps, and rows are on disk only once they are
    # used
    capacity = max(2 * args.total_timesteps // args.num_envs + 1, saved.get("capacity", 0))
    run = make_run(args, device)
    held = lock(run) if rank == 0 else None  # until the process ends
    specs = replay_specs(envs.shapes, envs.action_dim)
    check_disk(run, specs, args.total_timesteps - step)
    if saved:
        load_weights(agent, saved["agent"])  # other networks end here, before the files change
        optimizer.load_state_dict(saved["optimizer"])
        lengthen(run / f"replay{rank}", specs, num_envs, saved["capacity"], capacity)
    replay = Replay(
        specs, capacity, num_envs, run / f"replay{rank}", device, new=not saved,
        frames=args.frame_stack, temperature=args.replay_temperature)
    if saved:
        replay.load_state_dict(saved["replay"], lost=0)
        if rank == 0:
            restore_rng(saved["rng"])

    if rank == 0:
        count = sum(p.numel() for p in agent.parameters() if p.requires_grad)
        print(f"{device}, {args.precision}: {count:,} parameters")
        print(f"{1 / args.train_every:g} updates per policy step (batch {args.batch_size} x "
              f"{args.batch_length}, {args.imag_batch} dreams x {args.imag_horizon})")
        print(f"run directory {run}")
        writer = start_log(run, args, step)
        pretrain_writer = SummaryWriter(str(run / "pretraining"))  # beyond the step, which a resume purges

    def due(every: int) -> bool:
        return every > 0 and step // every > before // every

    def save() -> None:
        save_checkpoint(
            run, args, step=step, updates=updates, pretrained=pretrained, seen=seen, credit=credit,
            life=life, capacity=capacity, agent=agent.state_dict(), optimizer=optimizer.state_dict(),
            replay=replay.state_dict())

    def dream() -> None:
        if max(replay.starts(args.batch_length)) > 0:
            video, errors = dream_video(agent, replay)
            save_gif(video, writer, step)
            log_metrics(writer, errors, step)

    def report(phase: str, metrics: dict) -> bool:
        """After each update of the pre-training: log and save every 500. -> whether a signal has come."""
        nonlocal pretrain_updates
        pretrain_updates += 1
        if rank == 0 and pretrain_updates % 500 == 0:
            values = read_metrics(metrics, step, run)
            log_metrics(pretrain_writer, {f"{phase}/{k}": v for k, v in values.items()}, seen[phase])
            bar.set_postfix({phase: f"{seen[phase]:,}"})
            save()
        (stopping,) = sum_ranks([len(stop)], device)
        return stopping > 0

    # ---- act, store, learn ----
    stop = stop_signals()
    stopping = False
    pretrain_updates = 0
    metrics = {}
    ret = math.nan
    bar = progress_bar(args, step, rank)
    row = envs.reset()
    state = agent.initial(num_envs)
    if saved and rank == 0:
        save()  # with the size that the files have now
    while step < args.total_timesteps and not stopping:
        if step >= args.learning_starts and not pretrained:
            ready = replay.is_ready(batch_size, args.batch_length, args.imag_horizon)
            if sum_ranks([ready], device) == [ranks]:
                pretrained = pretrain(agent, optimizer, replay, seen, batch_size, report)
                if not pretrained:
                    stopping = True
                    break
                if rank == 0 and args.eval_every and args.eval_episodes:  # the pre-trained policy (official)
                    with torch.random.fork_rng([device] if device.type == "cuda" else []):
                        log_evaluation(writer, evaluate(agent, args, stop), step)
        state = agent.act(row, state) if pretrained else agent.act_randomly(row, state)
        replay.add(row | state)
        ended = envs.last  # a lost life is no end of the game
        episodes = list(zip(envs.ret[ended], envs.length[ended]))
        decisions, stopping = sum_ranks([(~row["is_first"]).sum(), len(stop)], device)
        before = step
        step += decisions
        row = envs.step(state["action"].cpu().numpy())

        if pretrained:
            due_updates, credit = updates_due(credit + decisions, args.train_every)
            for _ in range(due_updates):
                metrics = train_step(agent, optimizer, replay, batch_size)
            updates += due_updates

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
            values.update(speeds(bar, step, updates - saved.get("updates", 0)))
            log_metrics(writer, values, step)
        if due(args.save_every):
            save()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # training does not notice
            if due(args.video_every):
                dream()
            if pretrained and due(args.eval_every) and args.eval_episodes:
                log_evaluation(writer, evaluate(agent, args, stop), step)

    # ---- the end ----
    bar.close()
    if not pretrained and not stopping:
        fail(f"no update in {step} steps: --learning-starts {args.learning_starts} is not below the budget, "
             f"or too small for {args.batch_size} sequences")
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
        pretrain_writer.close()
    if ranks > 1:
        dist.barrier()  # nobody leaves while rank 0 is still evaluating
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
