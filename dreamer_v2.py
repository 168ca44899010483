"""DreamerV2 in one file: learn a world model with discrete latents, then learn to act inside its dreams.

Paper  Hafner et al., "Mastering Atari with Discrete World Models", ICLR 2021, arXiv:2010.02193v4
Code   checked against danijar/dreamerv2 at 07d906e: same parameter counts, same losses (tests/golden)

    python dreamer_v2.py --env-id ALE/Pong-v5     # released Atari settings: gray, sticky actions
    python dreamer_v2.py --preset paper --env-id ALE/Breakout-v5
    python dreamer_v2.py --preset tiny            # everything once, two minutes on a CPU
    python dreamer_v2.py --resume auto            # go on after Ctrl-C, a crash or a requeue

How the pieces fit (T time, B batch, H imagination, N = T*B dreams; time is always axis 0):

    h_{t-1}, z_{t-1}, a_{t-1} --RSSM.core--> h_t --prior--> p(z_t | h_t)
                                              |
    obs_t --Encoder--> tokens_t --------------+--posterior--> q(z_t | h_t, tokens_t)
    s_t = [h_t, z_t] --> Decoder, reward head, discount head          (WorldModel.loss)
    s_0 -a_0-> s_1 -a_1-> ... s_H  imagined with the prior            (Behaviour.imagine, .loss)

Which obs, action and reward share an index. A replay row t holds

    obs_t  reward_t  is_first_t  is_last_t  is_terminal_t | action_t
    arrived together, caused by action_{t-1}              | chosen here

A training sequence is T rows of one episode; its row 0 counts as is_first: memory begins with zeros. In a
dream reward and discount belong to the state itself: V_t = r_t + d_t ((1-lam) v'_{t+1} + lam V_{t+1}),
V_H = v'_H.

Names: deter h, stoch z (some texts: s), feat s = [h, z], post_logits q, prior_logits p, cont the discount d,
value v, slow_value v' (the target critic), ret V. Axes: T time, B batch, H imagination, N envs or dreams,
S groups of K classes, D width of h, F feat, A action.

What changes from DreamerV1: 32 categoricals with straight-through gradients instead of a Gaussian; KL
balancing; a GRU with layer norm; the discount is predicted by default; a target critic; the critic also
learns at a dream's first state; Reinforce for discrete actions, a truncated instead of a tanh-transformed
normal for continuous ones; weight decay; ends of episodes are replayed more often.
Differences from the official code: float32 or bfloat16 instead of float16; feat is [h, z] instead of [z, h];
0 to 30 no-ops at reset instead of 1 to 30; the environment is not reset between random actions and policy;
replay counts rows, resetting rows too; --actor-grad both with continuous actions cuts the sample's gradient
in its log-probability, the official code does not.
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
    exp_name: str = "dreamer_v2"  # second part of the run directory's name
    env_id: str = "ALE/Pong-v5"  # any Gymnasium id, also module:Env-v0; what is no image is rendered
    seed: int = 1  # seed of weights, environments and sampling
    preset: Literal["default", "tiny", "paper", "dmc"] = "default"  # paper: Table D.1; dmc: control; or tiny
    total_timesteps: int = 50_000_000  # policy steps; frames = steps x action repeat (official: 200M frames)
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on CUDA (official: fp16)
    compile: Literal["auto", "on", "off"] = "auto"  # auto: CUDA graphs of updates; on: torch.compile too
    run_dir: str = "runs"  # where run directories go
    resume: str = ""  # run directory to continue, or auto: the newest one of this environment, name and seed
    save_every: int = 10_000  # policy steps between checkpoints
    eval_every: int = 250_000  # policy steps between evaluations (official); 0: only one at the end
    eval_episodes: int = 10  # episodes per evaluation (official: 1); 0: none
    video_every: int = 50_000  # policy steps between dream GIFs; 0: only at the end
    log_every: int = 1_000  # policy steps between metric logs
    # environment
    num_envs: int = 1  # parallel environments (official: 1)
    grayscale: bool = True  # Atari in gray (official)
    action_repeat: int = 0  # environment steps per policy step; 0: 4 on Atari, else 1 (official; control: 2)
    sticky_actions: float = 0.25  # Atari: probability that a frame repeats the last action (official)
    full_action_space: bool = False  # Atari: all 18 actions (official: off, paper: on)
    reward_transform: Literal["tanh", "identity"] = "tanh"  # of replayed rewards (official)
    # replay and schedule
    buffer_size: int = 2_000_000  # replay rows (official); fixed when a run begins
    learning_starts: int = 50_000  # policy steps with random actions before the first update (official)
    pretrain: int = 1  # further updates right after the first one (official; control: 100)
    train_every: int = 16  # policy steps per update (official; paper: 4)
    batch_size: int = 16  # sequences per update, B (official; paper: 50)
    batch_length: int = 50  # steps per sequence, T (official); shorter episodes are never replayed
    prioritize_ends: bool = True  # replay the ends of episodes more often (official on Atari)
    # world model
    deter: int = 600  # width of h (official Atari)
    hidden: int = 600  # width of the RSSM's hidden layers (official Atari)
    stoch: int = 32  # groups of latents, S (official)
    classes: int = 32  # classes per group, K (official)
    cnn_depth: int = 48  # channels of the first convolution; doubled by each further one (official)
    layers: int = 4  # hidden layers of each head, actor and critic (official)
    units: int = 400  # width of those layers (official)
    kl_scale: float = 0.1  # weight of the KL, beta (official Atari; paper's range 0.1, 0.3, 1, 3)
    kl_balance: float = 0.8  # share of the KL's gradient that trains the prior (official); 0.5: none
    free_nats: float = 0.0  # nats; the KL is not trained while its mean over the batch is below (official)
    pred_discount: bool = True  # predict episode ends, else the discount is always gamma (official on Atari)
    discount_scale: float = 5.0  # weight of the discount loss (official Atari)
    # behaviour
    imag_horizon: int = 15  # imagined steps, H (official)
    gamma: float = 0.999  # discount (official Atari; paper: 0.995)
    lam: float = 0.95  # lambda of the returns (official)
    actor_grad: Literal["auto", "reinforce", "dynamics", "both"] = "auto"  # auto: by kind of action
    rho: float = 0.9  # share of Reinforce with --actor-grad both (official: 1 - actor_grad_mix)
    ent_coef: float = 1e-3  # entropy bonus (official Atari); a CUDA graph keeps the first value
    slow_rate: float = 1.0  # step of the slow critic towards the critic (official); 1: a copy
    slow_every: int = 100  # updates between such steps (official)
    # optimiser
    model_lr: float = 2e-4  # learning rate of the world model (official Atari)
    actor_lr: float = 4e-5  # learning rate of the actor (official Atari)
    critic_lr: float = 1e-4  # learning rate of the critic (official Atari)
    adam_eps: float = 1e-5  # of Adam, added to sqrt(v) before bias correction, as in Keras (official)
    weight_decay: float = 1e-6  # share of every weight that an update takes away (official)
    grad_clip: float = 100.0  # largest gradient norm, for each optimiser (official)


PRESETS = {
    "default": {},
    "tiny": dict(
        deter=64, hidden=64, stoch=8, classes=8, cnn_depth=8, layers=2, units=64, total_timesteps=2_000,
        learning_starts=1_000, batch_size=8, batch_length=16, train_every=8, model_lr=1e-3, actor_lr=3e-4,
        critic_lr=3e-4, save_every=1_000, eval_every=0, video_every=0, log_every=100, eval_episodes=1),
    # Table D.1 and all 18 actions; the rest as released: discount_scale 5, one resize to 64x64
    "paper": dict(full_action_space=True, gamma=0.995, batch_size=50, train_every=4),
    "dmc": dict(  # released settings for control from pixels; the budget is ours
        action_repeat=2, reward_transform="identity", grayscale=False, sticky_actions=0.0, eval_every=10_000,
        total_timesteps=1_000_000, learning_starts=1_000, pretrain=100, train_every=5, prioritize_ends=False,
        deter=200, hidden=200, kl_scale=1.0, free_nats=1.0, pred_discount=False, gamma=0.99, ent_coef=1e-4,
        model_lr=3e-4, actor_lr=8e-5, critic_lr=8e-5),
}


# ======== 2. pure functions ========
def float32(x: torch.Tensor) -> torch.Tensor:
    """Norms, softmaxes, losses and returns run in float32 also under bf16; float64 stays, for tests."""
    return x.float() if x.dtype == torch.bfloat16 else x


class StraightThrough(torch.autograd.Function):
    """One-hot sample of probs (...,K) whose gradient goes to probs as it is. Algorithm 1
    (arXiv:2010.02193v4): sample = one_hot(draw(probs)); sample = sample + probs - stop_gradient(probs).
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


def kl_loss(post_logits: torch.Tensor, prior_logits: torch.Tensor, balance: float, free_nats: float) -> tuple:
    """balance * KL(sg(q) || p) + (1 - balance) * KL(q || sg(p)), a scalar, and the KL (T,B). Algorithm 2.
    Trap: free nats apply to the mean over the batch. With balance 0.5 the official code clips each state."""
    post = float32(post_logits).log_softmax(-1)
    prior = float32(prior_logits).log_softmax(-1)
    if balance == 0.5:
        kl = categorical_kl(post, prior)
        return kl.clamp(min=free_nats).mean(), kl.detach()
    dyn = categorical_kl(post.detach(), prior)  # trains only the prior
    rep = categorical_kl(post, prior.detach())  # trains only the posterior
    joint = gather_ranks(dyn.detach().mean()[None]).mean()  # over all ranks
    trained = joint >= free_nats
    dyn_loss = torch.where(trained, dyn.mean(), free_nats)
    rep_loss = torch.where(trained, rep.mean(), free_nats)
    return balance * dyn_loss + (1 - balance) * rep_loss, dyn.detach()


def lambda_return(reward, value, cont, lam) -> torch.Tensor:
    """V_t = r_t + d_t ((1-lam) v_{t+1} + lam V_{t+1}), V_H = v_H. Eq. 4 (arXiv:2010.02193v4).
    Inputs (H+1,...), result (H,...). `cont` is the discount d. Trap: reward and discount are those of the
    state itself; the paper prints V_H = r_H + d_H v_H, which counts r_H twice."""
    ret = value[-1]
    rets = []
    for t in reversed(range(len(value) - 1)):
        ret = reward[t] + cont[t] * ((1 - lam) * value[t + 1] + lam * ret)
        rets.append(ret)
    return torch.stack(rets[::-1])


def normal_nll(mean: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-ln N(target; mean, 1), element by element: half the squared error and a constant."""
    return 0.5 * (float32(mean) - target).square() + 0.5 * math.log(2 * math.pi)


class TruncatedNormal:
    """Continuous policy: Normal(tanh(m), 2 sigmoid(s / 2) + 0.1) cut to [-1, 1], for m, s (...,A).
    Source: `common.TruncNormalDist`, `DistLayer`."""

    def __init__(self, mean: torch.Tensor, std: torch.Tensor):
        self.mean = mean.tanh()  # also what evaluation acts with (official: mode)
        self.std = 2 * (std / 2).sigmoid() + 0.1
        self.low = (-1 - self.mean) / self.std  # bounds in units of std
        self.high = (1 - self.mean) / self.std
        self.mass = torch.special.ndtr(self.high) - torch.special.ndtr(self.low)

    def rsample(self) -> torch.Tensor:
        """By inverse CDF from uniform noise. Trap: TensorFlow leaves out how the cut moves with mean and std:
        the sample's gradient is 1 and (x - mean) / std. The exact gradient trains another actor."""
        noise = torch.empty_like(self.mean).uniform_(1e-6, 1 - 1e-6)
        unit = torch.special.ndtri(torch.special.ndtr(self.low) + noise * self.mass)
        x = self.mean + self.std * unit.detach()
        clipped = x.clamp(-1 + 1e-6, 1 - 1e-6)
        return x + (clipped - x).detach()  # the clip passes the gradient on (official)

    def log_prob(self, action: torch.Tensor) -> torch.Tensor:
        """(...,A) -> (...)."""
        unit = (action - self.mean) / self.std
        return (-normal_nll(unit, 0.0) - self.std.log() - self.mass.log()).sum(-1)

    def entropy(self) -> torch.Tensor:
        """(...), in closed form."""
        low = self.low * (-normal_nll(self.low, 0.0)).exp()  # bound times density
        high = self.high * (-normal_nll(self.high, 0.0)).exp()
        constant = 0.5 * math.log(2 * math.pi * math.e)
        return (constant + (self.std * self.mass).log() + (low - high) / (2 * self.mass)).sum(-1)


# ======== 3. networks ========
def init(layer: nn.Module) -> nn.Module:
    """Keras' initialisation: bias 0, weight Glorot uniform."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Float32Linear(nn.Linear):
    """Runs in float32 under autocast. Trap: bf16 numbers near 200 are 1 apart, too coarse for advantages."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(float32(x))


def mlp(inputs: int, units: int, layers: int, outputs: int = 0) -> nn.Sequential:
    """`layers` x [linear, ELU], then a linear layer to `outputs`, if any."""
    modules = []
    for _ in range(layers):
        modules += [init(nn.Linear(inputs, units)), nn.ELU()]
        inputs = units
    if outputs:
        modules += [init(nn.Linear(inputs, outputs))]
    return nn.Sequential(*modules)


def scalar_head(inputs: int, units: int, layers: int) -> nn.Sequential:
    """MLP to one number (...,1)."""
    return nn.Sequential(*mlp(inputs, units, layers), init(Float32Linear(units, 1)))


def deconvolve_pixel(x: torch.Tensor, conv: nn.ConvTranspose2d) -> torch.Tensor:
    """Transposed convolution of one pixel: `conv(x[:, :, None, None])`, (N,in) -> (N,out,k,k).
    It is a matrix product, and computed so it takes a quarter of the time on a CPU."""
    weight = conv.weight.permute(0, 2, 3, 1)  # (in,k,k,out)
    x = F.linear(x, weight.flatten(1).T).unflatten(-1, weight.shape[1:])
    return (x + conv.bias.to(x.dtype)).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """Images (T,B,64,64,C) -> tokens (T,B,E), E = 32 * depth, by 4 x [4x4 convolution of stride 2, ELU]."""

    def __init__(self, channels: int, depth: int):
        super().__init__()
        widths = [channels, depth, 2 * depth, 4 * depth, 8 * depth]
        self.convs = nn.ModuleList(init(nn.Conv2d(a, b, 4, stride=2)) for a, b in zip(widths, widths[1:]))
        self.tokens = 2 * 2 * widths[-1]  # E

    def forward(self, obs: dict) -> torch.Tensor:
        x = obs["image"].flatten(0, 1) / 255 - 0.5  # (T*B,Y,X,C)
        x = x.permute(0, 3, 1, 2)
        for conv in self.convs:
            x = F.elu(conv(x))
        x = x.permute(0, 2, 3, 1).flatten(1)  # in Y,X,C order (official)
        return x.unflatten(0, obs["image"].shape[:2])


class Decoder(nn.Module):
    """h (T,B,D), z (T,B,S*K) -> mean of the image (T,B,64,64,C); the target is in [-0.5, 0.5]."""

    def __init__(self, channels: int, feat: int, depth: int):
        super().__init__()
        widths = [32 * depth, 4 * depth, 2 * depth, depth, channels]
        layers = zip(widths, widths[1:], [5, 5, 6, 6])
        self.dense = init(nn.Linear(feat, widths[0]))
        self.convs = nn.ModuleList(init(nn.ConvTranspose2d(a, b, size, stride=2)) for a, b, size in layers)

    def forward(self, deter: torch.Tensor, stoch: torch.Tensor) -> torch.Tensor:
        x = self.dense(torch.cat([deter, stoch], -1)).flatten(0, 1)  # no activation (official)
        x = deconvolve_pixel(x, self.convs[0])
        for conv in self.convs[1:]:
            x = conv(F.elu(x))
        return x.permute(0, 2, 3, 1).unflatten(0, deter.shape[:2])


# ======== 4. world model ========
class RSSM(nn.Module):
    """Recurrent state-space model: h_t = core(h, z, a), prior p(z_t|h_t), posterior q(z_t|h_t,tokens_t)."""

    def __init__(self, deter, hidden, stoch, classes, action_dim, tokens):
        super().__init__()
        self.deter, self.stoch, self.classes = deter, stoch, classes
        self.img_in = mlp(stoch * classes + action_dim, hidden, 1)
        self.gru = init(nn.Linear(hidden + deter, 3 * deter))
        self.gru_norm = nn.LayerNorm(3 * deter, eps=1e-3)  # Keras' eps
        self.posterior = mlp(deter + tokens, hidden, 1, stoch * classes)
        self.prior = mlp(deter, hidden, 1, stoch * classes)

    def core(self, deter: torch.Tensor, stoch: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """GRU with layer norm: h (B,D), z (B,S*K), a (B,A) -> h' (B,D). Source: `nets.GRUCell`.
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
        """Logits (...,S,K) -> one-hot z (...,S*K) with straight-through gradient."""
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_()
        return sample_onehot(float32(logits).softmax(-1), noise).flatten(-2).to(logits.dtype)

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
    """Encoder, RSSM, decoder, reward and discount heads."""

    def __init__(self, shapes: dict, action_dim: int, args: Args):
        super().__init__()
        channels = shapes["image"][-1]
        self.args = args
        self.feat = args.deter + args.stoch * args.classes
        self.encoder = Encoder(channels, args.cnn_depth)
        self.rssm = RSSM(args.deter, args.hidden, args.stoch, args.classes, action_dim, self.encoder.tokens)
        self.decoder = Decoder(channels, self.feat, args.cnn_depth)
        self.reward = scalar_head(self.feat, args.units, args.layers)
        if args.pred_discount:
            self.cont = scalar_head(self.feat, args.units, args.layers)

    def predict_reward(self, feat: torch.Tensor) -> torch.Tensor:
        """feat (...,F) -> (...)."""
        return self.reward(feat)[..., 0]

    def predict_cont(self, feat: torch.Tensor) -> torch.Tensor:
        """gamma * p(the episode goes on): the discount is in the head's target."""
        if not self.args.pred_discount:
            return torch.full(feat.shape[:-1], self.args.gamma, device=feat.device)
        return self.cont(feat)[..., 0].sigmoid()

    def loss(self, rows: dict) -> tuple[torch.Tensor, dict, dict]:
        """Replay rows (T,B,...) -> scalar loss, posterior (T,B,...), metrics. Minus the evidence lower bound,
        Eq. 2 (arXiv:2010.02193v4), each term with its scale, averaged over T and B."""
        tokens = self.encoder(rows)
        deter = tokens.new_zeros(tokens.shape[1], self.rssm.deter)  # row 0 is_first: no memory before it
        stoch = tokens.new_zeros(tokens.shape[1], self.feat - self.rssm.deter)
        deter, stoch, post_logits = self.rssm.observe(
            tokens, rows["prev_action"], rows["is_first"], deter, stoch)
        prior_logits = self.rssm.groups(self.rssm.prior(deter))
        feat = torch.cat([deter, stoch], -1)

        losses = {}
        losses["kl"], kl = kl_loss(post_logits, prior_logits, self.args.kl_balance, self.args.free_nats)
        image = normal_nll(self.decoder(deter, stoch), rows["image"] / 255 - 0.5)
        losses["image"] = image.flatten(2).sum(-1).mean()  # summed over pixels
        reward = rows["reward"].tanh() if self.args.reward_transform == "tanh" else rows["reward"]
        losses["reward"] = normal_nll(self.predict_reward(feat), reward).mean()
        if self.args.pred_discount:
            cont = ~rows["is_terminal"] * self.args.gamma  # soft labels: the head learns the discount itself
            cont_logit = self.cont(feat)[..., 0]
            losses["cont"] = F.binary_cross_entropy_with_logits(cont_logit, cont.to(cont_logit))
        scales = dict(kl=self.args.kl_scale, cont=self.args.discount_scale)
        total = sum(scales.get(k, 1.0) * v for k, v in losses.items())

        with torch.no_grad():
            metrics = {
                "wm/kl": kl.mean(),
                "wm/post_entropy": entropy(float32(post_logits).log_softmax(-1)).sum(-1).mean(),
                "wm/prior_entropy": entropy(float32(prior_logits).log_softmax(-1)).sum(-1).mean(),
            }
        metrics.update({f"losses/{k}": v.detach() for k, v in losses.items()})
        # stop-gradient: where a dream begins is given, for the behaviour
        return total, dict(deter=deter.detach(), stoch=stoch.detach()), metrics


# ======== 5. behaviour ========
class Behaviour(nn.Module):
    """Actor, critic and slow critic on feat = [h, z], trained in dreams. Source: `ActorCritic`."""

    def __init__(self, feat: int, action_dim: int, discrete: bool, args: Args):
        super().__init__()
        self.args, self.discrete = args, discrete
        auto = "reinforce" if discrete else "dynamics"
        self.actor_grad = auto if args.actor_grad == "auto" else args.actor_grad
        self.actor = mlp(feat, args.units, args.layers)
        self.actor_mean = init(nn.Linear(args.units, action_dim))  # logits of discrete actions
        if not discrete:
            self.actor_std = init(nn.Linear(args.units, action_dim))
        self.critic = scalar_head(feat, args.units, args.layers)
        self.slow_critic = scalar_head(feat, args.units, args.layers).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def actor_parameters(self) -> list[nn.Parameter]:
        """Those that the actor's loss trains."""
        return [p for name, p in self.named_parameters() if name.startswith("actor")]

    def policy(self, feat: torch.Tensor):
        """Log-probabilities (...,A) of one-hot actions, or a TruncatedNormal."""
        x = self.actor(feat)
        mean = float32(self.actor_mean(x))
        if self.discrete:
            return mean.log_softmax(-1)
        return TruncatedNormal(mean, float32(self.actor_std(x)))

    def sample(self, feat: torch.Tensor) -> torch.Tensor:
        """feat (...,F) -> one-hot or continuous action (...,A); in evaluation the mode (official)."""
        policy = self.policy(feat)
        if not self.discrete:
            return policy.rsample() if self.training else policy.mean
        noise = torch.empty_like(policy).exponential_() if self.training else torch.ones_like(policy)
        return sample_onehot(policy.exp(), noise)

    def imagine(self, rssm: RSSM, deter: torch.Tensor, stoch: torch.Tensor) -> tuple:
        """Roll the policy out from h (N,D), z (N,S*K) -> feat (H+1,N,F), action (H,N,A)."""
        feats, actions = [torch.cat([deter, stoch], -1)], []
        for _ in range(self.args.imag_horizon):
            # stop-gradient: a return reaches an action through the states it leads to, not through the inputs
            # of later actions (official)
            action = self.sample(feats[-1].detach())
            deter, stoch = rssm.imagine_step(deter, stoch, action)
            feats.append(torch.cat([deter, stoch], -1))
            actions.append(action)
        return torch.stack(feats), torch.stack(actions)

    def returns(self, world: WorldModel, feat: torch.Tensor, is_terminal: torch.Tensor) -> tuple:
        """V_t (H,N), slow values v' (H+1,N), weights (H+1,N) of a dream feat (H+1,N,F). Eq. 4.

            states     s_0 -a_0-> s_1 -a_1-> s_2 -a_2-> s_3      H = 3
            returns    V_0        V_1        V_2        (V_3 = v'_3 only bootstraps)
            critic     v_0 - V_0  v_1 - V_1  v_2 - V_2
            actor      ln pi(a_0 | s_0) (V_1 - v'_0)   ln pi(a_1 | s_1) (V_2 - v'_1)
        V_t contains r_t, which came before a_t: the first return that a_t can change is V_{t+1} (the paper
        numbers actions otherwise). The slow critic bootstraps and is the baseline (official; paper: v)."""
        reward = world.predict_reward(feat)
        slow_value = self.slow_critic(feat)[..., 0]
        cont = world.predict_cont(feat)
        if self.args.pred_discount:  # known for the replayed state: no dream goes beyond an episode's end
            known = ~is_terminal * self.args.gamma
            cont = torch.cat([known[None].to(cont), cont[1:]])
        ret = lambda_return(reward, slow_value, cont, self.args.lam)
        # w_t = d_0 ... d_{t-1}: discounted probability that the dream gets to t; a weight, so no gradient
        weight = torch.cat([torch.ones_like(cont[:1]), cont[:-1]]).cumprod(0).detach()
        return ret, slow_value, weight

    def actor_loss(self, feat, action, ret, slow_value, weight) -> tuple[torch.Tensor, torch.Tensor]:
        """Eq. 6 (arXiv:2010.02193v4) -> loss, entropy (H-1,N):
        -w_t (rho ln pi(a_t | s_t) sg(V_{t+1} - v'_t) + (1 - rho) V_{t+1} + eta H(pi(. | s_t))),
        t = 0..H-2."""
        policy = self.policy(feat[:-2].detach())
        action = action[:-1].detach()  # Reinforce takes them as given
        if self.discrete:
            log_prob = (policy * action).sum(-1)
            bonus = entropy(policy)
        else:
            log_prob = policy.log_prob(action)
            bonus = policy.entropy()
        advantage = (ret[1:] - slow_value[:-2]).detach()
        rho = dict(reinforce=1.0, dynamics=0.0, both=self.args.rho)[self.actor_grad]
        objective = rho * log_prob * advantage + (1 - rho) * ret[1:]
        return -(weight[:-2] * (objective + self.args.ent_coef * bonus)).mean(), bonus

    def critic_loss(self, feat, ret, weight) -> tuple[torch.Tensor, torch.Tensor]:
        """Eq. 5: w_t (v_t - sg(V_t))^2 / 2 and a constant, t = 0..H-1 -> loss, v (H,N)."""
        value = self.critic(feat[:-1].detach())[..., 0]
        return (weight[:-1] * normal_nll(value, ret.detach())).mean(), value

    def loss(self, world: WorldModel, post: dict, rows: dict) -> tuple[dict, dict]:
        """Posterior of T x B rows -> actor and critic loss of dreams from every state, metrics."""
        start = {k: v.flatten(0, 1) for k, v in post.items()}
        with torch.set_grad_enabled(self.actor_grad != "reinforce"):  # Reinforce needs none through the dream
            feat, action = self.imagine(world.rssm, start["deter"], start["stoch"])
            ret, slow_value, weight = self.returns(world, feat, rows["is_terminal"].flatten())
        torch.clear_autocast_cache()  # bf16 copies of weights that may have no gradient
        actor_loss, bonus = self.actor_loss(feat, action, ret, slow_value, weight)
        critic_loss, value = self.critic_loss(feat, ret, weight)
        losses = dict(policy=actor_loss, value=critic_loss)
        metrics = {
            "ac/entropy": bonus.mean(),
            "ac/return": ret.mean(),
            "ac/value": value.mean(),
            "ac/slow_value": slow_value.mean(),
            "ac/weight": weight.mean(),
            **{f"losses/{k}": v for k, v in losses.items()},
        }
        return losses, {k: v.detach() for k, v in metrics.items()}

    @torch.no_grad()
    def update_slow_critic(self) -> None:
        """slow <- slow + rate (critic - slow) every `slow_every` updates; a copy after the first."""
        due = self.updates % self.args.slow_every == 0
        rate = torch.where(self.updates == 0, 1.0, self.args.slow_rate * due)
        for slow, fast in zip(self.slow_critic.parameters(), self.critic.parameters()):
            slow.lerp_(fast, rate.to(slow))
        self.updates += 1


# ======== 6. update ========
class Adam:
    """Adam in Keras' form after global-norm clipping, with weight decay that ignores the learning rate:
    g <- g min(1, clip / |g|);  m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2
    p <- p (1 - decay) - lr sqrt(1 - b2^k) / (1 - b1^k) m / (sqrt(v) + eps)
    Trap: torch divides by sqrt(v / (1-b2^k)) + eps, and AdamW multiplies its decay by lr.
    Source: `common.Optimizer`. The counter is a tensor: no host reads."""

    def __init__(self, params, lr: float, args: Args, beta1=0.9, beta2=0.999):
        self.params = list(params)
        self.lr = lr
        self.eps = args.adam_eps
        self.clip = args.grad_clip
        self.decay = args.weight_decay
        self.beta1 = beta1
        self.beta2 = beta2
        self.count = torch.zeros((), device=self.params[0].device)
        self.square = [torch.zeros_like(p) for p in self.params]
        self.momentum = [torch.zeros_like(p) for p in self.params]

    def step(self, loss: torch.Tensor) -> torch.Tensor:
        """One update of these parameters only, whatever else the loss depends on -> norm before clipping."""
        grads = list(torch.autograd.grad(loss, self.params))
        average_ranks(grads)
        with torch.no_grad():
            norm = torch.stack(torch._foreach_norm(grads)).norm()
            grads = torch._foreach_mul(grads, (self.clip / norm).clamp(max=1))

            self.count += 1
            correct1 = 1 - self.beta1 ** self.count
            correct2 = 1 - self.beta2 ** self.count
            torch._foreach_lerp_(self.momentum, grads, 1 - self.beta1)
            torch._foreach_mul_(self.square, self.beta2)
            torch._foreach_addcmul_(self.square, grads, grads, 1 - self.beta2)
            scale = torch._foreach_add(torch._foreach_sqrt(self.square), self.eps)
            change = torch._foreach_div(self.momentum, scale)
            torch._foreach_mul_(self.params, 1 - self.decay)
            torch._foreach_sub_(self.params, torch._foreach_mul(change, self.lr * correct2.sqrt() / correct1))
        return norm

    def state_dict(self) -> dict:
        return dict(count=self.count, square=self.square, momentum=self.momentum)

    def load_state_dict(self, saved: dict) -> None:
        self.count.copy_(saved["count"])
        torch._foreach_copy_(self.square, saved["square"])
        torch._foreach_copy_(self.momentum, saved["momentum"])


class Optimizers:
    """Three Adams, one per loss: none moves another's parameters."""

    def __init__(self, agent: Agent, args: Args):
        self.model = Adam(agent.world.parameters(), args.model_lr, args)
        self.actor = Adam(agent.behaviour.actor_parameters(), args.actor_lr, args)
        self.critic = Adam(agent.behaviour.critic.parameters(), args.critic_lr, args)

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
        self.action_dim = action_dim
        self.world = WorldModel(shapes, action_dim, args)
        self.behaviour = Behaviour(self.world.feat, action_dim, discrete, args)
        self.graphs = {}  # updates that became CUDA graphs

    @property
    def device(self) -> torch.device:
        return self.behaviour.updates.device

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
        """Row (N,...) and state -> new {deter, stoch, action}; z is sampled in evaluation too (official)."""
        obs = {k: torch.as_tensor(v, device=self.device)[None] for k, v in row.items()}
        with self.autocast():
            tokens = self.world.encoder(obs)
            deter, stoch, _ = self.world.rssm.observe(
                tokens, state["action"][None], obs["is_first"], state["deter"], state["stoch"])
            action = self.behaviour.sample(torch.cat([deter[0], stoch[0]], -1))
        return dict(deter=float32(deter[0]), stoch=float32(stoch[0]), action=action)

    def act_randomly(self, num_envs: int) -> dict:
        """Uniform actions, for the steps before the first update."""
        state = self.initial(num_envs)
        if self.behaviour.discrete:
            index = torch.randint(self.action_dim, (num_envs, 1), device=self.device)
            state["action"].scatter_(-1, index, 1.0)
        else:
            state["action"].uniform_(-1, 1)
        return state


def update(agent: Agent, optimizer: Optimizers, rows: dict) -> dict:
    """Rows (T,B,...): world model, then actor and critic in dreams of the new world model -> metrics."""
    with agent.autocast():
        loss, post, metrics = agent.world.loss(rows)
    metrics["grad/model_norm"] = optimizer.model.step(loss)

    with agent.autocast():  # dreams begin in the states from before the world model's step (official)
        losses, ac_metrics = agent.behaviour.loss(agent.world, post, rows)
    metrics.update(ac_metrics)
    metrics["grad/actor_norm"] = optimizer.actor.step(losses["policy"])
    metrics["grad/critic_norm"] = optimizer.critic.step(losses["value"])
    agent.behaviour.update_slow_critic()
    return metrics


def train_step(agent: Agent, optimizer: Optimizers, replay: Replay, batch_size: int) -> dict:
    """One update: sample, then all that learns -> metrics."""
    rows = replay.sample(batch_size, agent.args.batch_length)
    rows = {k: v.to(agent.device, non_blocking=True) for k, v in rows.items()}
    return captured(update, agent, optimizer, rows)


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


def make_envs(args: Args, num_envs: int, *key: int) -> Envs:
    """Anything with `reset`, `step`, `shapes`, `action_dim`, `discrete`, `ret` and `length` will do."""
    return Envs(
        args, num_envs, make_seeds(num_envs, args.seed, *key), 64, pixels=not shows_image(args.env_id),
        img_height=64, img_width=64, grayscale=args.grayscale, full_action_space=args.full_action_space)


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
    """Chunks of finished episodes: an episode uniformly, so steps of short ones come more often, then a start
    in it. With `prioritize_ends` that is min(randint(R - T + 1 + T), R - T) for an episode of R rows: its
    last chunk comes with probability (T + 1) / (R + 1). Source: `common/replay.py`."""

    def __init__(self, *args, length: int, prioritize_ends: bool, **options):
        super().__init__(*args, **options)
        self.length = length
        self.prioritize_ends = prioritize_ends
        self.begun = [0] * self.num_envs  # first row of the running episode
        self.episodes = []  # (first row, number of rows, environment), the oldest first
        self.unusable = 0  # consecutive episodes that were too short, or too long for the ring

    def add(self, row: dict) -> None:
        super().add(row)
        self.track(self.rows - 1, row["is_first"], row["is_last"])

    def track(self, number: int, is_first, is_last) -> None:
        """Note where episodes begin and end, by the flags (N,) of a row; forget those partly overwritten."""
        for env in range(self.num_envs):
            if is_first[env]:
                self.begun[env] = number
            if is_last[env]:
                rows = number - self.begun[env] + 1
                if self.length < rows <= self.size:
                    self.episodes.append((self.begun[env], rows, env))
                    self.episodes.sort()
                    self.unusable = 0
                else:
                    self.unusable += 1
        while self.episodes and self.episodes[0][0] < self.rows - self.size:
            self.episodes.pop(0)

    def check_usable(self) -> None:
        """Fail if nothing will ever be replayed."""
        running = self.rows - min(self.begun)
        if not self.episodes and (self.unusable >= 100 or running > self.capacity):
            fail(f"no episode can be replayed: they are shorter than --batch-length {self.length}, or longer "
                 f"than the replay of {self.capacity} rows per environment (--buffer-size), or have no end")

    def sample(self, batch_size: int, length: int) -> dict:
        """-> fields (length,batch_size,...); `prev_action` is the one that led to the row's observation."""
        chosen = torch.randint(len(self.episodes), (batch_size,))
        first, rows, env = torch.tensor([self.episodes[i] for i in chosen.tolist()]).T
        last = rows - length  # latest start
        choices = last + 1 + (length if self.prioritize_ends else 0)
        start = (torch.rand(batch_size, dtype=torch.float64) * choices).long().minimum(last)
        index = first + start + torch.arange(length)[:, None]
        batch = self.gather(index.to(self.device), env.to(self.device))
        batch["is_first"][0] = True  # memory begins with zeros
        action = batch.pop("action")
        batch["prev_action"] = torch.cat([torch.zeros_like(action[:1]), action[:-1]])
        return batch

    def load_state_dict(self, state: dict, lost: int) -> None:
        """Episodes are found again by their flags: each rank has other rows."""
        super().load_state_dict(state, lost)
        self.begun = [-math.inf] * self.num_envs  # the oldest rows may be of an episode without its beginning
        for number in range(self.rows - self.size, self.rows):
            row = number % self.capacity
            self.track(number, self.files["is_first"][row].tolist(), self.files["is_last"][row].tolist())
        self.begun = [max(begun, self.rows - self.size) for begun in self.begun]
        self.unusable = 0


def replay_specs(shapes: dict, action_dim: int) -> dict:
    """Fields of a replay row: name -> (shape, dtype)."""
    return {
        "image": (shapes["image"], torch.uint8),
        "reward": ((), torch.float32),
        "is_first": ((), torch.bool),
        "is_last": ((), torch.bool),
        "is_terminal": ((), torch.bool),
        "action": ((action_dim,), torch.float32),
    }


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
    batch = replay.sample(count, agent.args.batch_length)
    batch = {k: v.to(agent.device) for k, v in batch.items()}
    seen = {k: v[:context] for k, v in batch.items()}
    state = agent.initial(count)
    deter, stoch, _ = rssm.observe(
        agent.world.encoder(seen), seen["prev_action"], seen["is_first"], state["deter"], state["stoch"])
    states = list(zip(deter, stoch))
    for action in batch["prev_action"][context:]:
        states.append(rssm.imagine_step(*states[-1], action))
    deter = torch.stack([state[0] for state in states])
    stoch = torch.stack([state[1] for state in states])

    truth = batch["image"] / 255
    model = agent.world.decoder(deter, stoch) + 0.5  # (T,B,Y,X,C)
    error = (model - truth).square().flatten(2).sum(-1)
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
    check_positive(args, "total_timesteps num_envs batch_size train_every slow_every grad_clip save_every")
    check_positive(args, "deter hidden stoch classes cnn_depth layers units")
    check_shares(args, "gamma lam sticky_actions kl_balance rho slow_rate")
    if args.pretrain < 0:
        fail("--pretrain must not be negative")
    if args.imag_horizon < 2 or args.batch_length < 2:
        fail("--imag-horizon (H steps give H - 1 actor terms) and --batch-length must be at least 2")
    gpu = args.device.startswith("cuda") or args.device == "auto" and torch.cuda.is_available()
    if args.precision == "auto":
        args.precision = "bf16" if gpu else "fp32"
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
    trained = saved.get("trained", 0)  # policy step up to which updates were made
    life = saved.get("life", -1) + 1  # how often the run was resumed
    if args.num_envs % ranks or args.batch_size % ranks:
        fail(f"--num-envs and --batch-size must be multiples of the {ranks} processes")
    num_envs = args.num_envs // ranks
    batch_size = args.batch_size // ranks

    # ---- environments, agent, optimiser ----
    seed = seed_generators(args.seed, rank, life)
    envs = make_envs(args, num_envs, 0, rank, life)  # after a resume other episodes than before
    torch.manual_seed(args.seed)  # the same weights on every rank
    agent = Agent(envs.shapes, envs.action_dim, envs.discrete, args).to(device)
    torch.manual_seed(seed)  # other samples on every rank
    optimizer = Optimizers(agent, args)
    if args.compile == "on":
        agent.world.rssm.core = compiled(agent.world.rssm.core)
        agent.world.decoder.forward = compiled(agent.world.decoder.forward)

    # ---- run directory and replay, as they were where a run is resumed ----
    # an episode has one row more than steps: up to twice as many in all, on disk only once they are used
    capacity = saved.get("capacity") or min(args.buffer_size, 2 * args.total_timesteps) // args.num_envs
    if capacity <= args.batch_length:
        fail(f"replay of {capacity} rows per environment is not longer than --batch-length: "
             "raise --buffer-size or --total-timesteps")
    if not updates and args.learning_starts > args.total_timesteps:
        fail(f"--learning-starts {args.learning_starts} is beyond --total-timesteps")
    run = make_run(args, device)
    held = lock(run) if rank == 0 else None  # until the process ends
    specs = replay_specs(envs.shapes, envs.action_dim)
    if not saved:
        check_disk(run, specs, min(args.buffer_size, args.total_timesteps))
    replay = Replay(
        specs, capacity, num_envs, run / f"replay{rank}", device, new=not saved,
        length=args.batch_length, prioritize_ends=args.prioritize_ends)
    if saved:
        load_weights(agent, saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        replay.load_state_dict(saved["replay"], saved["at_risk"])
        if rank == 0:
            restore_rng(saved["rng"])

    if rank == 0:
        count = sum(p.numel() for p in agent.parameters() if p.requires_grad)
        print(f"{device}, {args.precision}: {count:,} parameters")
        print(f"1/{args.train_every} updates per policy step (batch {args.batch_size} x {args.batch_length})")
        print(f"run directory {run}")
        writer = start_log(run, args, step)

    def due(every: int) -> bool:
        return every > 0 and step // every > before // every

    def save() -> None:
        save_checkpoint(
            run, args, step=step, updates=updates, trained=trained, life=life, capacity=capacity,
            agent=agent.state_dict(), optimizer=optimizer.state_dict(), replay=replay.state_dict(),
            at_risk=0 if stopping else rows_at_risk(args, step))

    def dream() -> None:
        if replay.episodes:
            video, errors = dream_video(agent, replay)
            save_gif(video, writer, step)
            log_metrics(writer, errors, step)

    # ---- act, store, learn ----
    stop = stop_signals()
    stopping = False
    metrics = {}
    ret = math.nan
    bar = progress_bar(args, step, rank)
    row = envs.reset()
    state = agent.initial(num_envs)
    if saved and rank == 0:
        save()  # says how many rows this life puts at risk
    while step < args.total_timesteps and not stopping:
        state = agent.act(row, state) if updates else agent.act_randomly(num_envs)
        state["action"][torch.as_tensor(row["is_last"])] = 0  # no action follows an episode's end
        replay.add(row | state)
        ended = row["is_last"]
        episodes = list(zip(envs.ret[ended], envs.length[ended]))
        decisions, stopping, ready = sum_ranks(
            [(~row["is_first"]).sum(), len(stop), bool(replay.episodes)], device)
        before = step
        step += decisions
        row = envs.step(state["action"].cpu().numpy())

        if step >= args.learning_starts and ready == ranks:
            if updates:
                due_updates = (step - trained) // args.train_every
                trained += due_updates * args.train_every
            else:
                due_updates = 1 + args.pretrain
                trained = step
            for _ in range(due_updates):
                metrics = train_step(agent, optimizer, replay, batch_size)
            updates += due_updates
        elif step >= args.learning_starts:
            replay.check_usable()

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
            if due(args.eval_every) and args.eval_episodes:
                log_evaluation(writer, evaluate(agent, args, stop), step)

    # ---- the end ----
    bar.close()
    if not updates and not stopping:
        fail(f"no update in {step} steps: no episode of more than {args.batch_length} rows has ended, "
             f"or --learning-starts {args.learning_starts} is not below the budget")
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
