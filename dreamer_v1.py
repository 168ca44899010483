"""Dreamer (v1) in one file: learn a world model, then act by back-propagating returns through its dreams.

Paper  Hafner et al., "Dream to Control: Learning Behaviors by Latent Imagination", arXiv:1912.01603v3
Code   checked against danijar/dreamer at 56d4d44: same parameter counts, same losses (tests/golden);
       contrastive and reward-only objectives, absent there: google-research/dreamer at d517542 (TF1)

    python dreamer_v1.py                             # ALE/Pong-v5 with continuous actions
    python dreamer_v1.py --env-id dm_control/walker-walk-v0 --representation contrastive
    python dreamer_v1.py --preset discrete --env-id ALE/Boxing-v5
    python dreamer_v1.py --preset tiny               # everything once, two minutes on a CPU

How the pieces fit (T time, B batch, H imagination, N = T*B dreams; time is always axis 0):

    h_{t-1}, z_{t-1}, a_{t-1} --RSSM.core--> h_t --prior--> p(z_t | h_t)
                                              |
    obs_t --Encoder--> tokens_t --------------+--posterior--> q(z_t | h_t, tokens_t)
    s_t = [h_t, z_t] --> reward head, discount head, Decoder                  (WorldModel.loss)
    tokens_t --> StateModel q(s_t | obs_t) if contrastive: the Decoder then only shows what s_t knows
    s_0 -a_0-> s_1 -a_1-> ... s_H  imagined with the prior                    (Behaviour.imagine, .loss)

Which obs, action and reward share an index. A replay row t holds

    obs_t  reward_t  is_first_t  is_last_t  is_terminal_t | action_t
    arrived together, caused by action_{t-1}              | chosen here

A training sequence is T rows of one episode and the action before them; memory begins with zeros. In a dream
reward and discount belong to the state itself: V_t = r_t + d_t ((1-lam) v_{t+1} + lam V_{t+1}), V_H = v_H.

Names: deter h, stoch z, feat s = [h, z], post q, prior p, cont the discount d, value v, ret V. Axes:
T time, B batch, H imagination, N envs or dreams, S latents, D width of h, F feat, A action.

Relatives: DDPG, an actor-critic without a model, maximises a one-step Q; PlaNet plans anew at each step and
sees no further than its horizon. Dreamer's actor learns from the gradient of the model's multi-step returns
(straight-through where actions are discrete), and its value function reaches beyond the horizon.
Differences from danijar/dreamer: noise is drawn for each sequence (there one draw serves the whole batch);
the last step of an episode is replayed too; each environment is evaluated with its own best sample (there the
first one's serves all); feat is [h, z]; epsilon decays as in the paper (there 0.3); whole Atari games, not
lives; 0 to 30 no-ops, not 1 to 30; no reset between random actions and policy; float32 or bfloat16, not
float16. From TF1: contrastive with the paper's sum, over all pairs, in float64.
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
    exp_name: str = "dreamer_v1"  # second part of the run directory's name
    env_id: str = "ALE/Pong-v5"  # any Gymnasium id, also module:Env-v0; what is no image is rendered
    seed: int = 1  # seed of weights, environments and sampling
    preset: Literal["default", "tiny", "discrete"] = "default"  # discrete: paper's Atari; tiny: every phase
    total_timesteps: int = 2_500_000  # policy steps; frames = steps x action repeat (official: 5M frames)
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on CUDA (official: fp16)
    compile: Literal["auto", "on", "off"] = "auto"  # auto: CUDA graphs of updates; on: torch.compile too
    run_dir: str = "runs"  # where run directories go
    resume: str = ""  # run directory to continue, or auto: the newest one of this environment, name and seed
    save_every: int = 10_000  # policy steps between checkpoints
    eval_every: int = 50_000  # policy steps between evaluations (official: 5_000); 0: only one at the end
    eval_episodes: int = 10  # episodes per evaluation (official: 1); 0: none
    video_every: int = 50_000  # policy steps between dream GIFs; 0: only at the end
    log_every: int = 1_000  # policy steps between metric logs
    # environment
    num_envs: int = 1  # parallel environments (official: 1)
    continuous: bool = True  # Atari: radius, angle and fire of a joystick, not buttons (ours)
    action_repeat: int = 0  # environment steps per policy step; 0: 4 on Atari, 2 on dm_control, else 1
    sticky_actions: float = 0.25  # Atari: probability that a frame repeats the last action (official)
    reward_transform: Literal["tanh", "identity"] = "identity"  # of replayed rewards (official; Atari: tanh)
    # replay and schedule
    buffer_size: int = 1_000_000  # replay rows (official: all); fixed when a run begins
    learning_starts: int = 2_500  # random policy steps before the first update (official: 5,000 frames)
    pretrain: int = 100  # updates of the first block (official)
    train_every: int = 500  # policy steps between blocks of updates (official: 1,000 frames)
    train_steps: int = 100  # updates per block (official)
    batch_size: int = 50  # sequences per update, B (official)
    batch_length: int = 50  # steps per sequence, T (official); shorter episodes are never replayed
    # world model
    representation: Literal["reconstruction", "contrastive", "reward"] = "reconstruction"  # paper Section 4
    deter: int = 200  # width of h (official)
    hidden: int = 200  # width of the RSSM's hidden layers (official)
    stoch: int = 30  # Gaussian latents, S (official)
    cnn_depth: int = 32  # channels of the first convolution; doubled by each further one (official)
    units: int = 400  # width of the hidden layers of heads, actor and critic (official; paper: 300)
    kl_scale: float = 1.0  # weight of the KL, beta (official; Atari: 0.1)
    free_nats: float = 3.0  # nats; the KL is not trained while its mean over the batch is below (official)
    pred_discount: bool = False  # predict episode ends, else the discount is gamma (official; Atari: True)
    discount_scale: float = 10.0  # weight of the discount loss (official)
    # behaviour
    imag_horizon: int = 15  # imagined steps, H (official; Atari: 10)
    gamma: float = 0.99  # discount (official)
    lam: float = 0.95  # lambda of the returns (official)
    expl_noise: float = 0.3  # std of the noise on continuous actions (official)
    expl_eps: float = 0.4  # share of random discrete actions, down to a quarter after 200,000 updates (paper)
    # optimiser
    model_lr: float = 6e-4  # learning rate of the world model (official)
    actor_lr: float = 8e-5  # learning rate of the actor (official)
    critic_lr: float = 8e-5  # learning rate of the critic (official)
    adam_eps: float = 1e-7  # of Adam, added to sqrt(v) before bias correction, as in Keras (official)
    grad_clip: float = 100.0  # largest gradient norm, for each optimiser (official)


PRESETS = {
    "default": {},
    "tiny": dict(
        deter=64, hidden=64, stoch=16, cnn_depth=8, units=64, total_timesteps=2_000, learning_starts=1_000,
        batch_size=8, batch_length=16, pretrain=25, train_every=200, train_steps=25, model_lr=1e-3,
        actor_lr=3e-4, critic_lr=3e-4, save_every=1_000, eval_every=0, video_every=0, log_every=100,
        eval_episodes=1),
    "discrete": dict(
        continuous=False, reward_transform="tanh", kl_scale=0.1, pred_discount=True, imag_horizon=10),
}


# ======== 2. pure functions ========
def float32(x: torch.Tensor) -> torch.Tensor:
    """Softmaxes, losses and returns run in float32 also under bf16; float64 stays, for tests."""
    return x.float() if x.dtype == torch.bfloat16 else x


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


def sample_normal(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Reparameterised: the gradient goes to mean and std. Trap: the noise has the full shape; the official
    code draws one vector that all sequences and all dreams share."""
    return mean + std * torch.randn_like(mean)


def gaussian(stats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Network output (...,2*S) -> mean and standard deviation (...,S) of a latent's distribution."""
    mean, std = float32(stats).chunk(2, -1)
    return mean, F.softplus(std) + 0.1  # never sharper than 0.1 (official)


def gaussian_kl(p: tuple, q: tuple) -> torch.Tensor:
    """KL(p || q) in nats of diagonal Gaussians (mean, std), each (...,S), summed over the latents S."""
    ratio = (p[1] / q[1]).square()
    distance = ((p[0] - q[0]) / q[1]).square()
    return 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1)


def kl_loss(post: tuple, prior: tuple, free_nats: float) -> tuple[torch.Tensor, torch.Tensor]:
    """max(free nats, mean of KL(q || p)), a scalar, and the KL (T,B); both sides are trained. Eq. 10 (J_D).
    Trap: free nats apply to the mean over the batch. The TF1 code takes the mean of max(0, KL - 3) instead;
    the author calls either fine."""
    kl = gaussian_kl(post, prior)
    joint = gather_ranks(kl.detach().mean()[None]).mean()  # over all ranks
    return torch.where(joint >= free_nats, kl.mean(), free_nats), kl.detach()


def lambda_return(reward, value, cont, lam) -> torch.Tensor:
    """V_t = r_t + d_t ((1-lam) v_{t+1} + lam V_{t+1}), V_H = v_H. Eq. 5, 6 (arXiv:1912.01603v3) as a
    recursion: a mixture of V^k = r_t + ... + d^{k-1} r_{t+k-1} + d^k v_{t+k}, k = 1..n, n = H - t, with
    weights (1-lam) lam^{k-1} for k < n, and lam^{n-1} for k = n.
    Inputs (H,...), result (H-1,...). `cont` is the discount d. Trap: reward and discount are those of the
    state itself, and the last state only bootstraps."""
    ret = value[-1]
    rets = []
    for t in reversed(range(len(value) - 1)):
        ret = reward[t] + cont[t] * ((1 - lam) * value[t + 1] + lam * ret)
        rets.append(ret)
    return torch.stack(rets[::-1])


def normal_nll(mean: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-ln N(target; mean, 1), element by element: half the squared error and a constant."""
    return 0.5 * (float32(mean) - target).square() + 0.5 * math.log(2 * math.pi)


def pair_log_density(feat: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """ln N(s_i; mu_j, sigma_j), for all pairs (N,N) of feat, mean, std (N,F). The square is expanded,
    s^2 / sigma^2 - 2 s mu / sigma^2 + mu^2 / sigma^2: two matrix products instead of N*N*F numbers.
    Trap: with sigma near 0.01 the terms are millions that cancel: float64, never bf16 or TF32."""
    wide = torch.float32 if feat.device.type == "mps" else torch.float64
    feat, mean, std = feat.to(wide), mean.to(wide), std.to(wide)
    with torch.autocast(feat.device.type, enabled=False):
        precision = std.square().reciprocal()
        square = feat.square() @ precision.T - 2 * feat @ (mean * precision).T
        square = square + (mean.square() * precision).sum(-1)
        constant = std.log().sum(-1) + 0.5 * math.log(2 * math.pi) * feat.shape[-1]
        return -0.5 * square - constant


def nce_loss(feat: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """-mean of ln q(s_i | o_i) - ln sum_j q(s_i | o_j), over all N images, also its own. Eq. 12 (J_S).
    With several processes the images are those of the own one.
    Trap: the TF1 code fixes the image and sums over states: logsumexp over the other axis."""
    density = pair_log_density(feat, mean, std)  # (states, images)
    return -(density.diagonal() - density.logsumexp(1)).mean()


class TanhNormal:
    """Continuous policy: tanh(u), u ~ Normal(5 tanh(m/5), softplus(s + ln(e^5 - 1)) + 1e-4), m, s (...,A).
    A new actor has std 5: six of ten actions lie within 0.01 of a bound.
    Source: `ActionDecoder`, `SampleDist`."""

    def __init__(self, mean: torch.Tensor, std: torch.Tensor):
        self.mean = 5 * (mean / 5).tanh()
        self.std = F.softplus(std + math.log(math.exp(5) - 1)) + 1e-4

    def rsample(self) -> torch.Tensor:
        """Reparameterised: Eq. 3 (arXiv:1912.01603v3)."""
        return sample_normal(self.mean, self.std).tanh()

    def log_prob(self, action: torch.Tensor) -> torch.Tensor:
        """(...,A) -> (...). Trap: atanh(1) is infinite; cut to the last float32 below 1 (official)."""
        limit = 1 - 2**-24
        u = action.float().clamp(-limit, limit).atanh().to(self.mean)
        slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # ln of da/du
        return (-normal_nll((u - self.mean) / self.std, 0.0) - self.std.log() - slope).sum(-1)

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` actions (count,...,A), and their log-probabilities (count,...)."""
        shape = count, *self.mean.shape
        action = sample_normal(self.mean.expand(shape), self.std.expand(shape)).tanh()
        return action, self.log_prob(action)

    def mode(self) -> torch.Tensor:
        """The likeliest of 100 samples. Trap: of each row; the official code takes the first row's winner."""
        action, log_prob = self.draw(100)
        best = log_prob.argmax(0, keepdim=True)[..., None]
        return action.take_along_dim(best, 0)[0]

    def entropy(self) -> torch.Tensor:
        """(...), from 100 samples: only logged."""
        return -self.draw(100)[1].mean(0)


# ======== 3. networks ========
def init(layer: nn.Module) -> nn.Module:
    """Keras' initialisation: bias 0, weight Glorot uniform."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def init_gru(cell: nn.GRUCell) -> nn.GRUCell:
    """Keras' initialisation: biases 0, input weights Glorot uniform, recurrent weights orthogonal."""
    nn.init.xavier_uniform_(cell.weight_ih)
    nn.init.orthogonal_(cell.weight_hh)
    nn.init.zeros_(cell.bias_ih)
    nn.init.zeros_(cell.bias_hh)
    return cell


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
    """Images (T,B,64,64,C) -> tokens (T,B,E), E = 32 * depth, by 4 x [4x4 convolution of stride 2, ReLU]."""

    def __init__(self, channels: int, depth: int):
        super().__init__()
        widths = [channels, depth, 2 * depth, 4 * depth, 8 * depth]
        self.convs = nn.ModuleList(init(nn.Conv2d(a, b, 4, stride=2)) for a, b in zip(widths, widths[1:]))
        self.tokens = 2 * 2 * widths[-1]  # E

    def forward(self, obs: dict) -> torch.Tensor:
        x = obs["image"].flatten(0, 1) / 255 - 0.5  # (T*B,Y,X,C)
        x = x.permute(0, 3, 1, 2)
        for conv in self.convs:
            x = F.relu(conv(x))
        x = x.permute(0, 2, 3, 1).flatten(1)  # in Y,X,C order (official)
        return x.unflatten(0, obs["image"].shape[:2])


class Decoder(nn.Module):
    """h (T,B,D), z (T,B,S) -> mean of the image (T,B,64,64,C), std 1; the target is in [-0.5, 0.5]."""

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
            x = conv(F.relu(x))
        return x.permute(0, 2, 3, 1).unflatten(0, deter.shape[:2])


class StateModel(nn.Module):
    """Tokens (T,B,E) -> mean and standard deviation (T,B,F) of q(s | obs), over h and z, for J_NCE."""

    def __init__(self, tokens: int, feat: int, units: int):
        super().__init__()
        self.mlp = mlp(tokens, units, 3, 2 * feat)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = float32(self.mlp(tokens)).chunk(2, -1)
        return mean, F.softplus(std + math.log(math.e - 1)) + 0.01  # begins at 1.01 (TF1)


# ======== 4. world model ========
class RSSM(nn.Module):
    """Recurrent state-space model: h_t = core(h, z, a), prior p(z_t|h_t), posterior q(z_t|h_t,tokens_t);
    both are diagonal Gaussians. The paper's transition p(s_t|s_{t-1},a_{t-1}) is core and prior."""

    def __init__(self, deter, hidden, stoch, action_dim, tokens):
        super().__init__()
        self.deter, self.stoch = deter, stoch
        self.img_in = mlp(stoch + action_dim, hidden, 1)
        self.gru = init_gru(nn.GRUCell(hidden, deter))
        self.posterior = mlp(deter + tokens, hidden, 1, 2 * stoch)
        self.prior = mlp(deter, hidden, 1, 2 * stoch)

    def core(self, deter: torch.Tensor, stoch: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """h (B,D), z (B,S), a (B,A) -> h' (B,D). torch's cell is Keras' one, with other block order."""
        x = self.img_in(torch.cat([stoch, action.to(deter.dtype)], -1))
        return self.gru(x, deter.to(x.dtype))

    def sample(self, stats: torch.Tensor) -> torch.Tensor:
        """Statistics (...,2*S) -> z (...,S), reparameterised."""
        return sample_normal(*gaussian(stats)).to(stats.dtype)

    def observe(self, tokens, prev_action, is_first, deter, stoch) -> tuple:
        """Posterior of a sequence: tokens (T,B,E), prev_action (T,B,A), is_first (T,B), h (B,D), z (B,S)
        -> h (T,B,D), z (T,B,S), statistics (T,B,2*S). With T = 1 it is the policy's step."""
        deter, stoch = deter.to(tokens.dtype), stoch.to(tokens.dtype)
        keep = (~is_first).to(tokens.dtype)[..., None]
        deters, stochs, post_stats = [], [], []
        for token, action, k in zip(tokens.unbind(), prev_action.unbind(), keep.unbind()):
            deter = self.core(deter * k, stoch * k, action * k)  # all three start from zero in an episode
            stats = self.posterior(torch.cat([deter, token], -1))
            stoch = self.sample(stats)
            deters.append(deter)
            stochs.append(stoch)
            post_stats.append(stats)
        return torch.stack(deters), torch.stack(stochs), torch.stack(post_stats)

    def imagine_step(self, deter, stoch, action) -> tuple:
        """One step without observation: h (N,D), z (N,S), action (N,A) -> h', z' ~ p(z' | h')."""
        deter = self.core(deter, stoch, action)
        return deter, self.sample(self.prior(deter))


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward and discount heads, state model. Layers of the heads: official."""

    def __init__(self, shapes: dict, action_dim: int, args: Args):
        super().__init__()
        channels = shapes["image"][-1]
        self.args = args
        self.feat = args.deter + args.stoch
        self.encoder = Encoder(channels, args.cnn_depth)
        self.rssm = RSSM(args.deter, args.hidden, args.stoch, action_dim, self.encoder.tokens)
        self.decoder = Decoder(channels, self.feat, args.cnn_depth)
        self.reward = scalar_head(self.feat, args.units, 2)
        if args.pred_discount:
            self.cont = mlp(self.feat, args.units, 3, 1)
        if args.representation == "contrastive":
            self.state_model = StateModel(self.encoder.tokens, self.feat, args.units)

    def model_parameters(self) -> list[nn.Parameter]:
        """Those that the representation's objective trains: all, or all but the decoder."""
        probe = self.args.representation != "reconstruction"
        return [p for name, p in self.named_parameters() if not (probe and name.startswith("decoder"))]

    def predict_reward(self, feat: torch.Tensor) -> torch.Tensor:
        """feat (...,F) -> (...), the mean of a Gaussian with std 1."""
        return self.reward(feat)[..., 0]

    def predict_cont(self, feat: torch.Tensor) -> torch.Tensor:
        """gamma * p(the episode goes on): the discount is in the head's target."""
        if not self.args.pred_discount:
            return torch.full(feat.shape[:-1], self.args.gamma, device=feat.device)
        return self.cont(feat)[..., 0].sigmoid()

    def loss(self, rows: dict) -> tuple[dict, dict, dict]:
        """Replay rows (T,B,...) -> scalar losses {model, probe}, posterior (T,B,...), metrics. Each term is
        averaged over T and B. The three representations of the paper's Section 4, with J_D = -beta KL:
            reconstruction   J_REC = J_O + J_R + J_D,  J_O = ln p(obs | s)        Eq. 10
            contrastive      J_NCE = J_S + J_R + J_D,  J_S as in `nce_loss`       Eq. 12
            reward           J_R + J_D,  J_R = ln p(reward | s)
        Where the decoder is no part of the objective it is a probe: it shows what the state knows."""
        tokens = self.encoder(rows)
        deter = tokens.new_zeros(tokens.shape[1], self.rssm.deter)  # no memory before row 0
        stoch = tokens.new_zeros(tokens.shape[1], self.rssm.stoch)
        deter, stoch, post_stats = self.rssm.observe(
            tokens, rows["prev_action"], rows["is_first"], deter, stoch)
        post = gaussian(post_stats)
        prior = gaussian(self.rssm.prior(deter))
        feat = torch.cat([deter, stoch], -1)

        losses = {}
        losses["kl"], kl = kl_loss(post, prior, self.args.free_nats)
        reward = rows["reward"].tanh() if self.args.reward_transform == "tanh" else rows["reward"]
        losses["reward"] = normal_nll(self.predict_reward(feat), reward).mean()
        if self.args.pred_discount:
            cont = ~rows["is_terminal"] * self.args.gamma  # soft labels: the head learns the discount itself
            cont_logit = self.cont(feat)[..., 0]
            losses["cont"] = F.binary_cross_entropy_with_logits(cont_logit, cont.to(cont_logit))
        if self.args.representation == "contrastive":
            mean, std = self.state_model(tokens)
            losses["nce"] = nce_loss(feat.flatten(0, 1), mean.flatten(0, 1), std.flatten(0, 1))
        image = self.image_loss(deter, stoch, rows)
        if self.args.representation == "reconstruction":
            losses["image"] = image
        scales = dict(kl=self.args.kl_scale, cont=self.args.discount_scale)
        total = {"model": sum(scales.get(k, 1.0) * v for k, v in losses.items())}
        if self.args.representation != "reconstruction":
            total["probe"] = image

        metrics = {
            "wm/kl": kl.mean(),
            "wm/post_std": post[1].detach().mean(),
            "wm/prior_std": prior[1].detach().mean(),
            "losses/image": image.detach(),
        }
        metrics.update({f"losses/{k}": v.detach() for k, v in losses.items()})
        # stop-gradient: where a dream begins is given, for the behaviour
        return total, dict(deter=deter.detach(), stoch=stoch.detach()), metrics

    def image_loss(self, deter: torch.Tensor, stoch: torch.Tensor, rows: dict) -> torch.Tensor:
        """-ln p(obs | s), summed over pixels and channels, a scalar."""
        if self.args.representation != "reconstruction":  # stop-gradient: a probe forms no representation
            deter, stoch = deter.detach(), stoch.detach()
        image = normal_nll(self.decoder(deter, stoch), rows["image"] / 255 - 0.5)
        return image.flatten(2).sum(-1).mean()


# ======== 5. behaviour ========
class Behaviour(nn.Module):
    """Actor and critic on feat = [h, z], trained in dreams. Source: `Dreamer._train`."""

    def __init__(self, feat: int, action_dim: int, discrete: bool, args: Args):
        super().__init__()
        self.args, self.discrete = args, discrete
        outputs = action_dim if discrete else 2 * action_dim  # logits, or mean and std
        self.actor = mlp(feat, args.units, 4, outputs)
        self.critic = scalar_head(feat, args.units, 3)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def policy(self, feat: torch.Tensor):
        """Log-probabilities (...,A) of one-hot actions, or a TanhNormal."""
        x = float32(self.actor(feat))
        if self.discrete:
            return x.log_softmax(-1)
        return TanhNormal(*x.chunk(2, -1))

    def sample(self, feat: torch.Tensor) -> torch.Tensor:
        """feat (...,F) -> one-hot or continuous action (...,A); in evaluation the mode (official)."""
        policy = self.policy(feat)
        if not self.discrete:
            return policy.rsample() if self.training else policy.mode()
        noise = torch.empty_like(policy).exponential_() if self.training else torch.ones_like(policy)
        return sample_onehot(policy.exp(), noise)

    def explore(self, action: torch.Tensor) -> torch.Tensor:
        """Exploration in the environment: Normal noise on continuous actions (N,A), or epsilon-greedy. The
        noisy action is what replay and memory get."""
        if not self.discrete:
            return (action + self.args.expl_noise * torch.randn_like(action)).clamp(-1, 1)
        progress = (self.updates / 200_000).clamp(max=1)
        eps = self.args.expl_eps * (1 - 0.75 * progress)
        noise = torch.empty_like(action).exponential_()
        random = sample_onehot(torch.ones_like(action), noise)
        return torch.where(torch.rand_like(action[:, :1]) < eps, random, action)

    def imagine(self, rssm: RSSM, deter: torch.Tensor, stoch: torch.Tensor) -> torch.Tensor:
        """Roll the policy out from h (N,D), z (N,S) -> feat (H,N,F) of the states entered."""
        feat = torch.cat([deter, stoch], -1)
        feats = []
        for _ in range(self.args.imag_horizon):
            # stop-gradient: a return reaches an action through the states it leads to, not through the inputs
            # of later actions (official)
            action = self.sample(feat.detach())
            deter, stoch = rssm.imagine_step(deter, stoch, action)
            feat = torch.cat([deter, stoch], -1)
            feats.append(feat)
        return torch.stack(feats)

    def returns(self, world: WorldModel, feat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """V_t (H-1,N), weights (H-1,N) of a dream feat (H,N,F). Eq. 6.

            states     s_0 -a_0-> s_1 -a_1-> s_2 -a_2-> s_3      H = 3
            returns               V_1        V_2        (V_3 = v_3 only bootstraps)
            critic                v_1 - V_1  v_2 - V_2
        V_t contains r_t, for arriving in s_t, so V_1 is the first return that a_0 can change: the replayed
        state s_0 takes part in neither loss."""
        reward = world.predict_reward(feat)
        value = self.critic(feat)[..., 0]
        cont = world.predict_cont(feat)
        ret = lambda_return(reward, value, cont, self.args.lam)
        # w_t = d_1 ... d_{t-1}: discounted probability that the dream gets to t; a weight, so no gradient
        weight = torch.cat([torch.ones_like(cont[:1]), cont[:-2]]).cumprod(0).detach()
        return ret, weight

    def actor_loss(self, ret: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Eq. 7 (arXiv:1912.01603v3): -w_t V_t, t = 1..H-1 (official; the paper sums from s_0, without w_t).
        The gradient goes through reward, value, discount and dynamics to the actions: no baseline, no
        likelihood ratio, no entropy bonus."""
        return -(weight * ret).mean()

    def critic_loss(self, feat, ret, weight) -> tuple[torch.Tensor, torch.Tensor]:
        """Eq. 8: w_t (v_t - sg(V_t))^2 / 2 and a constant, t = 1..H-1 -> loss, v (H-1,N)."""
        value = self.critic(feat[:-1].detach())[..., 0]
        return (weight * normal_nll(value, ret.detach())).mean(), value

    def loss(self, world: WorldModel, post: dict) -> tuple[dict, dict]:
        """Posterior of T x B rows -> actor and critic loss of dreams from every state, metrics."""
        if self.args.pred_discount:  # the last row may be an episode's end: no dream goes beyond it
            post = {k: v[:-1] for k, v in post.items()}
        start = {k: v.flatten(0, 1) for k, v in post.items()}
        feat = self.imagine(world.rssm, start["deter"], start["stoch"])
        ret, weight = self.returns(world, feat)
        actor_loss = self.actor_loss(ret, weight)
        critic_loss, value = self.critic_loss(feat, ret, weight)
        losses = dict(policy=actor_loss, value=critic_loss)
        with torch.no_grad():
            policy = self.policy(torch.cat([start["deter"], start["stoch"]], -1))
            spread = entropy(policy) if self.discrete else policy.entropy()
        metrics = {
            "ac/entropy": spread.mean(),
            "ac/return": ret.mean(),
            "ac/value": value.mean(),
            "ac/weight": weight.mean(),
            **{f"losses/{k}": v for k, v in losses.items()},
        }
        return losses, {k: v.detach() for k, v in metrics.items()}


# ======== 6. update ========
class Adam:
    """Adam in Keras' form after global-norm clipping:
    g <- g min(1, clip / |g|);  m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2
    p <- p - lr sqrt(1 - b2^k) / (1 - b1^k) m / (sqrt(v) + eps)
    Trap: torch divides by sqrt(v / (1-b2^k)) + eps. Source: `tools.Adam`. The counter is a tensor: no host
    reads."""

    def __init__(self, params, lr: float, eps: float, clip: float, beta1=0.9, beta2=0.999):
        self.params = list(params)
        self.lr = lr
        self.eps = eps
        self.clip = clip
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
            torch._foreach_sub_(self.params, torch._foreach_mul(change, self.lr * correct2.sqrt() / correct1))
        return norm

    def state_dict(self) -> dict:
        return dict(count=self.count, square=self.square, momentum=self.momentum)

    def load_state_dict(self, saved: dict) -> None:
        self.count.copy_(saved["count"])
        torch._foreach_copy_(self.square, saved["square"])
        torch._foreach_copy_(self.momentum, saved["momentum"])


class Optimizers:
    """Three Adams, one per loss, and one of a decoder that is a probe: none moves another's parameters."""

    def __init__(self, agent: Agent, args: Args):
        eps, clip = args.adam_eps, args.grad_clip
        self.model = Adam(agent.world.model_parameters(), args.model_lr, eps, clip)
        self.actor = Adam(agent.behaviour.actor.parameters(), args.actor_lr, eps, clip)
        self.critic = Adam(agent.behaviour.critic.parameters(), args.critic_lr, eps, clip)
        if args.representation != "reconstruction":
            self.probe = Adam(agent.world.decoder.parameters(), 1e-3, eps, 1000.0)  # (TF1)

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in vars(self).items()}

    def load_state_dict(self, saved: dict) -> None:
        if saved.keys() != vars(self).keys():  # the same networks, but another one trains the decoder
            fail("the run was trained with another --representation")
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
        if self.training:
            action = self.behaviour.explore(action)
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
    """Rows (T,B,...): the losses of world model, actor and critic, all of the same weights, then the steps
    -> metrics."""
    with agent.autocast():
        model_losses, post, metrics = agent.world.loss(rows)
        losses, ac_metrics = agent.behaviour.loss(agent.world, post)
    metrics.update(ac_metrics)

    # the actor's gradient goes through critic and world model: trap, they must not have moved before it
    metrics["grad/actor_norm"] = optimizer.actor.step(losses["policy"])
    metrics["grad/critic_norm"] = optimizer.critic.step(losses["value"])
    metrics["grad/model_norm"] = optimizer.model.step(model_losses["model"])
    if "probe" in model_losses:
        metrics["grad/probe_norm"] = optimizer.probe.step(model_losses["probe"])
    agent.behaviour.updates += 1
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
    if "dm_control/" in args.env_id:  # also shimmy:dm_control/
        register_dm_control()
    return Envs(
        args, num_envs, make_seeds(num_envs, args.seed, *key), 64, pixels=not shows_image(args.env_id),
        continuous=args.continuous)


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
    in it, uniform in 0..R - T for an episode of R rows. Source: `tools.load_dataset`.
    Trap: there it is below R - T, so the last row, the only one that can be terminal, is never seen."""

    def __init__(self, *args, length: int, **options):
        super().__init__(*args, **options)
        self.length = length
        self.begun = [0] * self.num_envs  # first row of the running episode
        self.episodes = []  # (first row, number of rows, environment), the oldest first
        self.unusable = 0  # episodes in a row that were too short, or too long for the ring

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
                if self.length <= rows <= self.size:
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
        choices = rows - length + 1
        start = (torch.rand(batch_size, dtype=torch.float64) * choices).long()
        index = first + start + torch.arange(-1, length)[:, None]  # one row earlier: it holds the action
        batch = self.gather(index.to(self.device), env.to(self.device))
        prev_action = batch.pop("action")[:-1]
        batch = {name: field[1:] for name, field in batch.items()}
        # before an episode's first row is another episode, or a row that was overwritten
        batch["prev_action"] = prev_action * ~batch["is_first"][..., None]
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
    check_positive(
        args, "total_timesteps num_envs batch_size pretrain train_every train_steps grad_clip save_every")
    check_positive(args, "deter hidden stoch cnn_depth units")
    check_shares(args, "gamma lam sticky_actions expl_eps")
    if args.imag_horizon < 2 or args.batch_length < 2:
        fail("--imag-horizon (H steps give H - 1 returns) and --batch-length must be at least 2")
    gpu = args.device.startswith("cuda") or args.device == "auto" and torch.cuda.is_available()
    if args.precision == "auto":
        args.precision = "bf16" if gpu else "fp32"
    if not args.action_repeat:
        args.action_repeat = 2 if "dm_control/" in args.env_id else 1
        if args.env_id.startswith(("ALE/", "ale_py:ALE/")):
            args.action_repeat = 4


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
    trained = saved.get("trained", 0)  # policy step up to which updates were ordered
    debt = saved.get("debt", 0)  # updates that were ordered but not made
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
    if capacity < args.batch_length:
        fail(f"replay of {capacity} rows per environment is shorter than --batch-length: "
             "raise --buffer-size or --total-timesteps")
    if not updates and args.learning_starts > args.total_timesteps:
        fail(f"--learning-starts {args.learning_starts} is beyond --total-timesteps")
    run = make_run(args, device)
    held = lock(run) if rank == 0 else None  # until the process ends
    specs = replay_specs(envs.shapes, envs.action_dim)
    if not saved:
        check_disk(run, specs, min(args.buffer_size, args.total_timesteps))
    replay = Replay(
        specs, capacity, num_envs, run / f"replay{rank}", device, new=not saved, length=args.batch_length)
    if saved:
        load_weights(agent, saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        replay.load_state_dict(saved["replay"], saved["at_risk"])
        (ready,) = sum_ranks([bool(replay.episodes)], device)
        if ready < ranks:
            debt = 0  # no episode is left, or long enough: wait for a new one
        if rank == 0:
            restore_rng(saved["rng"])

    if rank == 0:
        count = sum(p.numel() for p in agent.parameters() if p.requires_grad)
        print(f"{device}, {args.precision}: {count:,} parameters")
        print(f"{args.train_steps}/{args.train_every} updates per policy step "
              f"(batch {args.batch_size} x {args.batch_length})")
        print(f"run directory {run}")
        writer = start_log(run, args, step)

    def due(every: int) -> bool:
        return every > 0 and step // every > before // every

    def save() -> None:
        save_checkpoint(
            run, args, step=step, updates=updates, trained=trained, debt=debt, life=life, capacity=capacity,
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
    while (step < args.total_timesteps or debt) and not stopping:
        before = step
        episodes = []
        if debt:  # a block of updates takes minutes on a CPU: a signal must not wait for its end
            metrics = train_step(agent, optimizer, replay, batch_size)
            updates += 1
            debt -= 1
            (stopping,) = sum_ranks([len(stop)], device)
        else:
            state = agent.act(row, state) if updates else agent.act_randomly(num_envs)
            state["action"][torch.as_tensor(row["is_last"])] = 0  # no action follows an episode's end
            replay.add(row | state)
            ended = row["is_last"]
            episodes = list(zip(envs.ret[ended], envs.length[ended]))
            decisions, stopping, ready = sum_ranks(
                [(~row["is_first"]).sum(), len(stop), bool(replay.episodes)], device)
            step += decisions
            row = envs.step(state["action"].cpu().numpy())

            if step >= args.learning_starts and ready == ranks:
                blocks = (step - trained) // args.train_every
                trained += blocks * args.train_every
                debt = blocks * args.train_steps
                if not updates:
                    debt = args.pretrain
                    trained = step
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
        fail(f"no update in {step} steps: no episode of {args.batch_length} rows or more has ended, "
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
