"""IRIS in one file: learn a discrete autoencoder and a GPT over its tokens, then act in their dreams.

Paper  Micheli et al., "Transformers are Sample-Efficient World Models", arXiv:2209.00588v2 (ICLR 2023)
Code   checked against eloialonso/iris at 24326aa: same parameter counts, same losses (tests/golden)

    python iris.py --env-id ALE/Pong-v5
    python iris.py --lpips-weights FOLDER    # with the paper's perceptual loss
    python iris.py --preset tiny             # everything once, two minutes on a CPU
    python iris.py --resume auto             # go on after Ctrl-C, a crash or a requeue

How the pieces fit (T time, B batch, H imagination; time is axis 0, inside the Transformer axis 1):

    x_t --Encoder, nearest words--> z_t (K tokens) --Decoder--> x^_t       (Tokenizer.loss)
    z_0 a_0 z_1 a_1 ... --Transformer--> next token, reward, end           (WorldModel.loss)
    x^_0 -a_0-> x^_1 -a_1-> ... x^_{H-1}  imagined token by token          (Behaviour.imagine, .loss)

Which obs, action and reward share an index. A replay row t holds

    obs_t  reward_t  is_first_t  is_last_t   | action_t
    arrived together, caused by action_{t-1} | chosen here

The paper's r_t and d_t follow a_t: sampling takes them from row t+1. The row that arrives with an end is no
frame. The Transformer reads blocks of K tokens and an action; what its outputs predict (K = 16):

    input    z_t^0  z_t^1  ...  z_t^14  z_t^15   a_t                    | z_{t+1}^0  ...
    output   z_t^1  z_t^2  ...  z_t^15  nothing  z_{t+1}^0, r_t and d_t | z_{t+1}^1  ...

In a dream L_t = r_t + g (1-d_t) ((1-lam) v_{t+1} + lam L_{t+1}), L_{H-1} = v_{H-1}.

Names: frames x, tokens z, codebook e, recon x^, end d, ret L, gamma g; encoder E, decoder D, world G. The
policy pi(a_t | x^_{<=t}) is a CNN with an LSTM, the value its second head. Axes: N images or envs, K tokens
of a vocabulary of V words of width E, W width of the Transformer, A actions.

Differences from the official code. With the same numbers: frames of replay are encoded and decoded once per
epoch; a frame's last token passes the Transformer together with the next action; dreams run without gradient,
then the policy sees their frames again; the last action of a dream, whose outcome enters no loss, is not
given to the world model. With others: the maximum of two frames is taken before the resize; 0 to 30 no-ops at
reset (official: 1 to 30, in evaluation 1); games end after 108,000 frames in training too (official: 20,000);
a bounded replay; without LPIPS weights only pixels train the tokenizer.
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
    exp_name: str = "iris"  # second part of the run directory's name
    env_id: str = "ALE/Pong-v5"  # any Gymnasium id with discrete actions, also module:Env-v0
    seed: int = 1  # seed of weights, environments and sampling
    preset: Literal["default", "tiny"] = "default"  # tiny: every phase in two minutes on a CPU
    total_timesteps: int = 100_000  # policy steps; frames = steps x action repeat (official)
    device: str = "auto"  # auto, cpu, cuda, cuda:N, mps
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: fp32, with TF32 on CUDA (official)
    compile: Literal["auto", "on", "off"] = "auto"  # auto: CUDA graphs of updates; on: torch.compile too
    run_dir: str = "runs"  # where run directories go
    resume: str = ""  # run directory to continue, or auto: the newest one of this environment, name and seed
    save_every: int = 2_000  # policy steps between checkpoints; like the next ones, at ends of epochs
    eval_every: int = 10_000  # policy steps between evaluations (official: 1_000); 0: only one at the end
    eval_episodes: int = 16  # episodes per evaluation (official: 16, at the end 100); 0: none
    video_every: int = 10_000  # policy steps between dream GIFs; 0: only at the end
    log_every: int = 1_000  # policy steps between metric logs
    # environment
    num_envs: int = 1  # parallel environments (official: 1)
    image_size: int = 64  # side of the image, a multiple of 16: K = (side / 16)^2 tokens (official)
    action_repeat: int = 0  # environment steps per policy step; 0: 4 on Atari, else 1 (official)
    sticky_actions: float = 0.0  # Atari: probability that a frame repeats the last action (official)
    life_loss: bool = True  # Atari: in training a lost life ends an episode (official)
    # replay and schedule; an epoch collects, then updates tokenizer, world model and behaviour
    buffer_size: int = 200_000  # replay rows (enough for 100k steps; official: all); fixed at the start
    epoch_steps: int = 200  # policy steps per epoch (official)
    epoch_updates: int = 200  # updates of each of the three per epoch (official)
    extra_epochs: int = 100  # epochs after the last policy step, which only train (official)
    learning_starts: int = 1_000  # epochs that end beyond this policy step train the tokenizer (official)
    world_starts: int = 5_000  # the same for the world model (official, 25 epochs)
    behaviour_starts: int = 10_000  # the same for the behaviour (official, 50 epochs)
    tokenizer_batch: int = 256  # images per tokenizer update (official)
    batch_size: int = 64  # sequences per update of world model and behaviour, B (official)
    batch_length: int = 20  # frames per sequence, T, and what the Transformer can look back on (official)
    # tokenizer
    vocab_size: int = 512  # words in the codebook, V (official)
    code_dim: int = 512  # width of a word, E (official)
    channels: int = 64  # channels of all convolutions in encoder and decoder, even (official)
    res_blocks: int = 2  # residual blocks per resolution in the encoder; the decoder has one more (official)
    perceptual_loss: Literal["auto", "lpips", "pixel", "none"] = "auto"  # auto: lpips (official) or pixel
    lpips_weights: str = ""  # folder of vgg16-397923af.pth and vgg.pth; empty: caches of torch.hub and IRIS
    # world model
    layers: int = 10  # Transformer blocks (official)
    heads: int = 4  # attention heads (official)
    width: int = 256  # width of the Transformer, W (official)
    dropout: float = 0.1  # of embeddings, attention and residuals while the world model trains (official)
    # behaviour
    lstm_units: int = 512  # width of the policy's LSTM (official)
    imag_horizon: int = 20  # imagined frames, H (official)
    burn_in: int = 20  # real frames before a dream, which warm up the LSTM only (official)
    gamma: float = 0.995  # discount (official)
    lam: float = 0.95  # lambda of the returns (official)
    ent_coef: float = 0.001  # entropy bonus (official)
    epsilon: float = 0.01  # probability of a uniformly random action while collecting (official)
    temperature: float = 1.0  # divides policy logits while collecting (official; App. H: lower on Freeway)
    eval_temperature: float = 0.5  # the same in evaluation (official)
    # optimiser
    lr: float = 1e-4  # learning rate of all three Adams (official)
    weight_decay: float = 0.01  # weight decay of the Transformer's matrices (official)
    grad_clip: float = 10.0  # largest gradient norm, for each of the three (official)


PRESETS = {
    "default": {},
    "tiny": dict(
        total_timesteps=600, epoch_steps=50, epoch_updates=8, extra_epochs=2, learning_starts=100,
        world_starts=200, behaviour_starts=300, tokenizer_batch=16, batch_size=8, batch_length=8,
        vocab_size=128, code_dim=64, channels=16, res_blocks=1, layers=2, heads=2, width=64, lstm_units=64,
        imag_horizon=8, burn_in=4, lr=1e-3, save_every=300, eval_every=0, video_every=300, log_every=50,
        eval_episodes=1),
}


# ======== 2. pure functions ========
def float32(x: torch.Tensor) -> torch.Tensor:
    """Norms, softmaxes, losses and returns need it under autocast; float64 stays (tests)."""
    return x if x.dtype == torch.float64 else x.float()


def to_frames(image: torch.Tensor) -> torch.Tensor:
    """Images (...,Y,X,C) uint8 -> frames (...,C,Y,X) in [0,1]."""
    return image.movedim(-1, -3) / 255


def sample(logits: torch.Tensor) -> torch.Tensor:
    """Draw indices (...) from softmax(logits (...,V)). argmax(p / e) with e ~ Exp(1) is an exact categorical
    draw, without the checks and host reads of torch.distributions: a dream makes hundreds in a row."""
    probs = float32(logits).softmax(-1)
    noise = torch.empty_like(probs).exponential_()
    return (probs / noise).argmax(-1)


def nearest_code(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index (...) of the word (V,E) nearest to z (...,E). Eq. 1 (arXiv:1711.00937v2): argmin_i |z - e_i|^2.
    |z|^2 is the same for all words and left out. Trap: bf16 cannot tell neighbours apart. On CUDA the
    product is in TF32, as it was for the authors (torch 1.11)."""
    with torch.autocast(z.device.type, enabled=False):
        z = float32(z)
        codebook = float32(codebook)
        distance = codebook.square().sum(-1) - 2 * z @ codebook.T  # (...,V)
        return distance.argmin(-1)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of -log softmax(logits (B,n,V)) at the labels (B,n), without those that are -100. The mean is that
    of the joint batch of all ranks, once their gradients are averaged."""
    total = F.cross_entropy(float32(logits).flatten(0, 1), labels.flatten(), reduction="sum")
    count = (labels != -100).sum().to(total.dtype)
    return total / gather_ranks(count[None]).mean().clamp(min=1e-8)


def lambda_return(reward, value, end, gamma: float, lam: float) -> torch.Tensor:
    """L_t = r_t + gamma (1-d_t) ((1-lam) v_{t+1} + lam L_{t+1}), L_{H-1} = v_{H-1}.
    Sec. 2.3 (arXiv:2209.00588v2). Reward and end (H-1,B) are those of the action at t, value (H,B) is that of
    the frame; result (H-1,B)."""
    ret = value[-1]
    rets = []
    for t in reversed(range(len(reward))):
        live = gamma * (1 - end[t].to(value.dtype))
        ret = reward[t] + live * ((1 - lam) * value[t + 1] + lam * ret)
        rets.append(ret)
    return torch.stack(rets[::-1])


def pixel_distance(recon: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """In place of LPIPS (ours, after Delta-IRIS, arXiv:2406.19320): mean squared error plus 0.01 times the
    worst pixel's (N,). Images (N,C,Y,X) in [-1,1], hence the 1/4: weights are those for images in [0,1]."""
    square = (recon - target).square().flatten(1) / 4
    return square.mean(1) + 0.01 * square.amax(1)


# ======== 3. networks ========
def conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    """'Same' convolution (N,in,Y,X) -> (N,out,Y,X)."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def norm(channels: int) -> nn.GroupNorm:
    """Groups of two channels (official: 32 groups of 64 channels)."""
    return nn.GroupNorm(channels // 2, channels, eps=1e-6)


class Float32Linear(nn.Linear):
    """Runs in float32 under autocast. Trap: bf16 numbers near 200 are 1 apart, too coarse for advantages."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(float32(x))


class ResBlock(nn.Module):
    """x + two times [norm, SiLU, conv], (N,C,Y,X). Source: `nets.ResnetBlock`."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = norm(channels)
        self.conv1 = conv(channels, channels)
        self.norm2 = norm(channels)
        self.conv2 = conv(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return x + y


class PixelAttention(nn.Module):
    """x + one head of attention between all Y*X places, (N,C,Y,X). Source: `nets.AttnBlock`."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.qkv = conv(channels, 3 * channels, 1)
        self.out = conv(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2).mT  # (N,Y*X,3*C)
        q, k, v = qkv.chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v)  # scale 1/sqrt(C)
        return x + self.out(y.mT.unflatten(-1, x.shape[-2:]))


class Downsample(nn.Module):
    """Halve the resolution. Trap: zeros at the right and bottom only; padding=1 would shift everything."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))


def stage(channels: int, blocks: int, level: int) -> nn.Sequential:
    """The blocks of one resolution, side / 2^level; with attention at 1/4 and 1/8 of the image (16 and 8)."""
    layers = []
    for _ in range(blocks):
        layers.append(ResBlock(channels))
        if level in (2, 3):
            layers.append(PixelAttention(channels))
    return nn.Sequential(*layers)


def middle(channels: int) -> nn.Sequential:
    """The blocks of the lowest resolution, side / 16."""
    return nn.Sequential(ResBlock(channels), PixelAttention(channels), ResBlock(channels))


class Encoder(nn.Module):
    """(N,image,Y,X) in [-1,1] -> (N,E,Y/16,X/16). Source: `nets.Encoder`."""

    def __init__(self, image: int, channels: int, blocks: int, code_dim: int):
        super().__init__()
        self.conv_in = conv(image, channels)
        self.stages = nn.ModuleList(stage(channels, blocks, level) for level in range(5))
        self.downs = nn.ModuleList(Downsample(channels) for _ in range(4))
        self.middle = middle(channels)
        self.norm_out = norm(channels)
        self.conv_out = conv(channels, code_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in range(5):
            x = self.stages[level](x)
            if level < 4:
                x = self.downs[level](x)
        x = self.middle(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(N,E,Y/16,X/16) -> (N,image,Y,X), about [-1,1], without output activation. Source: `nets.Decoder`."""

    def __init__(self, image: int, channels: int, blocks: int, code_dim: int):
        super().__init__()
        self.conv_in = conv(code_dim, channels)
        self.middle = middle(channels)
        blocks = blocks + 1  # one more than in the encoder
        self.stages = nn.ModuleList(stage(channels, blocks, level) for level in range(5))
        self.ups = nn.ModuleList(Upsample(channels) for _ in range(4))
        self.norm_out = norm(channels)
        self.conv_out = conv(channels, image)

    def forward(self, z_q: torch.Tensor) -> torch.Tensor:
        x = self.middle(self.conv_in(z_q))
        for level in (4, 3, 2, 1, 0):
            x = self.stages[level](x)
            if level > 0:
                x = self.ups[level - 1](x)
        return self.conv_out(F.silu(self.norm_out(x)))


# The convolutions of VGG16 by their number in torchvision's `features`, and those whose outputs are compared
# after their ReLU: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3. A pooling follows each but the last.
VGG16 = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
TAPS = (2, 7, 14, 21, 28)


class LPIPS(nn.Module):
    """Distance of VGG16 features, version 0.1. Eq. 1 (arXiv:1801.03924v2). Source: `lpips.LPIPS`.
    `weights`: `features.N.weight` and `.bias` of torchvision's VGG16, `linK.model.1.weight` of LPIPS. They
    are buffers outside of checkpoints: nothing here is trained."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        for name, weight in weights.items():
            self.register_buffer(name.replace(".", "_"), weight, persistent=False)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Images (N,3,Y,X) in [-1,1] -> five feature maps."""
        x = (x - self.shift) / self.scale
        found = []
        for i in VGG16:
            weight = getattr(self, f"features_{i}_weight")
            bias = getattr(self, f"features_{i}_bias")
            x = F.relu(F.conv2d(x, weight, bias, padding=1))
            if i in TAPS:
                found.append(x)
                if i != TAPS[-1]:
                    x = F.max_pool2d(x, 2)
        return found

    def forward(self, recon: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Two batches of images (N,3,Y,X) in [-1,1] -> distance (N,)."""
        total = 0
        for k, (a, b) in enumerate(zip(self.features(recon), self.features(target))):
            # unit vectors in channel space; the epsilon stands outside the root, as in the weights' own code
            a = a / (a.square().sum(1, keepdim=True).sqrt() + 1e-10)
            b = b / (b.square().sum(1, keepdim=True).sqrt() + 1e-10)
            # the official training loop switches this dropout on, by accident; it is unbiased
            square = F.dropout((a - b).square(), 0.5, self.training)
            head = getattr(self, f"lin{k}_model_1_weight")
            total = total + F.conv2d(square, head).mean((1, 2, 3))
        return total


def load_lpips(folder: str) -> tuple[LPIPS | None, str]:
    """LPIPS with the weights of two files, or None and what is missing. Without a folder: where torch.hub
    keeps torchvision's VGG16, and where the official code keeps the heads. They are vgg16-397923af.pth of
    download.pytorch.org/models and lpips/weights/v0.1/vgg.pth of richzhang/PerceptualSimilarity."""
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    official = Path.home() / ".cache" / "iris" / "tokenizer_pretrained_vgg"
    folders = [Path(folder)] if folder else [hub, official]
    wanted = [f"features.{i}.{kind}" for i in VGG16 for kind in ("weight", "bias")]
    wanted += [f"lin{k}.model.1.weight" for k in range(5)]
    found = {}
    for name in ("vgg16-397923af.pth", "vgg.pth"):
        paths = [place / name for place in folders if (place / name).is_file()]
        if not paths:
            return None, f"{name} is not in {' or '.join(map(str, folders))}"
        try:
            found.update(torch.load(paths[0], map_location="cpu", weights_only=True))
        except Exception as error:  # a damaged file raises anything
            return None, f"{paths[0]} cannot be read ({type(error).__name__})"
    missing = [name for name in wanted if name not in found]
    if missing:
        return None, f"{missing[0]} is in none of the two files"
    return LPIPS({name: found[name] for name in wanted}), ""


def choose_perceptual_loss(args: Args, channels: int):
    """What --perceptual-loss stands for here: LPIPS, `pixel_distance` or None."""
    if args.perceptual_loss == "none":
        return None
    if args.perceptual_loss == "pixel":
        return pixel_distance
    lpips, problem = load_lpips(args.lpips_weights)
    if channels != 3:
        problem = f"LPIPS is for images of 3 channels, not {channels}"
    if not problem:
        return lpips
    if args.perceptual_loss == "lpips" or args.lpips_weights:
        fail(f"--perceptual-loss lpips: {problem}; see --lpips-weights, or use --perceptual-loss pixel")
    print(f"no LPIPS: {problem}; the tokenizer learns with --perceptual-loss pixel (see --lpips-weights)")
    return pixel_distance


# ======== 4. world model ========
class Tokenizer(nn.Module):
    """Image -> K words of a codebook -> image, both ways deterministic. Sec. 2.1 (arXiv:2209.00588v2).
    As a variational autoencoder its posterior is one-hot, q(z|x) = 1 for the nearest words, and its prior
    uniform: the KL of the ELBO is the constant K ln V and not in the loss. What is left is -ln p(x|z)."""

    def __init__(self, image: int, args: Args):
        super().__init__()
        self.encoder = Encoder(image, args.channels, args.res_blocks, args.code_dim)
        self.pre_quant = conv(args.code_dim, args.code_dim, 1)
        self.codebook = nn.Embedding(args.vocab_size, args.code_dim)
        self.post_quant = conv(args.code_dim, args.code_dim, 1)
        self.decoder = Decoder(image, args.channels, args.res_blocks, args.code_dim)
        nn.init.uniform_(self.codebook.weight, -1 / args.vocab_size, 1 / args.vocab_size)

    def embed(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames (N,C,Y,X) in [0,1] -> z before quantisation (N,E,y,x)."""
        return float32(self.pre_quant(self.encoder(2 * frames - 1)))

    def quantize(self, z: torch.Tensor) -> torch.Tensor:
        """z (N,E,y,x) -> tokens (N,K), row by row of the grid."""
        return nearest_code(z.flatten(2).mT, self.codebook.weight)

    def lookup(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (N,K) -> z_q (N,E,y,x), their words on the grid."""
        side = math.isqrt(tokens.shape[-1])
        return self.codebook(tokens).mT.unflatten(-1, (side, side))

    def reconstruct(self, z_q: torch.Tensor) -> torch.Tensor:
        """z_q (N,E,y,x) -> recon (N,C,Y,X), about [-1,1]."""
        return float32(self.decoder(self.post_quant(z_q)))

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames (N,C,Y,X) in [0,1] -> tokens (N,K)."""
        return self.quantize(self.embed(frames))

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (N,K) -> frames (N,C,Y,X) in [0,1]: all that the policy ever sees."""
        recon = self.reconstruct(self.lookup(tokens))
        return ((recon + 1) / 2).clamp(0, 1)

    def loss(self, frames: torch.Tensor, perceptual=None) -> tuple[dict, dict]:
        """Frames (N,C,Y,X) in [0,1] -> losses (), metrics. `perceptual`: (recon, target) in [-1,1] -> (N,).
        Eq. 3 (arXiv:1711.00937v2), beta = 1. The papers' sums are means over all elements; all weights 1."""
        z = self.embed(frames)
        tokens = self.quantize(z)
        z_q = self.lookup(tokens)
        through = z + (z_q - z).detach()  # straight-through: the value is z_q, the gradient goes to z
        recon = self.reconstruct(through)
        target = 2 * frames - 1
        losses = {
            "codebook": (z.detach() - z_q).square().mean(),  # moves words only: no moving average, no revival
            "commit": (z - z_q.detach()).square().mean(),  # moves the encoder only
            "image": (recon - target).abs().mean(),  # -ln p(x|z) of a Laplace distribution
        }
        if perceptual is not None:
            losses["perceptual"] = perceptual(recon, target).mean()
        used = torch.zeros(len(self.codebook.weight), device=z.device).index_fill_(0, tokens.flatten(), 1.0)
        return losses, {"wm/words_used": used.mean()}


class Block(nn.Module):
    """Pre-norm Transformer block on (B,n,W). Source: `transformer.Block`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, start: int, mask, cache, dropout: float) -> torch.Tensor:
        """x (B,n,W) is at positions start..start+n of a sequence. `cache`: two tensors
        (B,heads,positions,W/heads) with the keys and values of earlier positions; those of x are added."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (B,n,3,heads,W/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            stop = start + x.shape[1]
            keys = cache[0]
            values = cache[1]
            keys[:, :, start:stop] = k
            values[:, :, start:stop] = v
            k = keys[:, :, :stop]
            v = values[:, :, :stop]
        # trap: is_causal compares row and column numbers, so it is right only where no cache precedes
        # trap: functional dropout knows no eval mode, hence the argument
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=start == 0)
        x = x + F.dropout(self.out(y.transpose(1, 2).flatten(2)), dropout)
        return x + F.dropout(self.mlp(self.norm2(x)), dropout)


def head(width: int, classes: int) -> nn.Sequential:
    """(...,W) -> logits (...,classes)."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), Float32Linear(width, classes))


class WorldModel(nn.Module):
    """GPT over blocks of K tokens and one action: p(z_{t+1}, r_t, d_t | z_{<=t}, a_{<=t}), the tokens of a
    frame one after the other. Sec. 2.2 (arXiv:2209.00588v2). Source: `WorldModel`, `Transformer`."""

    def __init__(self, num_tokens: int, action_dim: int, args: Args):
        super().__init__()
        width = args.width
        self.args = args
        self.num_tokens = num_tokens  # K
        self.positions = (num_tokens + 1) * args.batch_length
        self.position = nn.Embedding(self.positions, width)  # absolute: each sequence and dream begins at 0
        self.action = nn.Embedding(action_dim, width)
        self.token = nn.Embedding(args.vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, args.heads) for _ in range(args.layers))
        self.norm = nn.LayerNorm(width)
        self.token_head = head(width, args.vocab_size)
        self.reward_head = head(width, 3)  # -1, 0, 1
        self.end_head = head(width, 2)
        # places in a block that predict a token: all but the last token, whose successor is the action
        places = torch.tensor([*range(num_tokens - 1), num_tokens])
        self.register_buffer("places", places, persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, 0.0, 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def empty_cache(self, batch: int) -> torch.Tensor:
        """Keys and values of all layers, (layers,2,B,heads,positions,W/heads)."""
        weight = self.position.weight
        heads = self.args.heads
        dtype = torch.bfloat16 if self.args.precision == "bf16" else weight.dtype
        shape = (len(self.blocks), 2, batch, heads, self.positions, weight.shape[1] // heads)
        return torch.zeros(shape, dtype=dtype, device=weight.device)

    def forward(self, x: torch.Tensor, start: int = 0, cache=None, dropout: float = 0.0) -> torch.Tensor:
        """Embedded tokens (B,n,W) at positions start..start+n -> outputs (B,n,W).
        Trap: the position is an argument; counted from the input, a single token would always be at 0."""
        count = x.shape[1]
        x = F.dropout(x + self.position.weight[start : start + count], dropout)
        mask = None  # one token sees the whole cache; a sequence from position 0 uses is_causal, in Block
        if start > 0 and count > 1:  # row i sees columns up to start + i
            mask = torch.ones(count, start + count, dtype=torch.bool, device=x.device).tril(start)
        for i, block in enumerate(self.blocks):
            x = block(x, start, mask, None if cache is None else cache[i], dropout)
        return self.norm(x)

    def logits(self, tokens: torch.Tensor, action: torch.Tensor, dropout: float = 0.0) -> tuple:
        """Tokens (B,T,K), action (B,T) -> logits of next tokens (B,T*K,V), rewards (B,T,3), ends (B,T,2)."""
        x = torch.cat([self.token(tokens), self.action(action)[:, :, None]], 2)  # (B,T,K+1,W)
        y = self(x.flatten(1, 2), dropout=dropout).unflatten(1, x.shape[1:3])
        before_tokens = y[:, :, self.places].flatten(1, 2)  # (B,T*K,W)
        at_action = y[:, :, -1]  # (B,T,W)
        return self.token_head(before_tokens), self.reward_head(at_action), self.end_head(at_action)

    def labels(self, tokens, reward, end, mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What is to be predicted: tokens (B,T*K-1), reward and end (B,T), -100 where mask (B,T) is false.
        Token 0 of the first frame has no predecessor; its others are learned without any past (official)."""
        token_mask = mask.repeat_interleave(self.num_tokens, 1)
        token_labels = torch.where(token_mask, tokens.flatten(1), -100)[:, 1:]
        reward_labels = torch.where(mask, reward.sign().long() + 1, -100)  # the size of a reward is lost
        end_labels = torch.where(mask, end.long(), -100)
        return token_labels, reward_labels, end_labels

    def loss(self, batch: dict, dropout: float) -> tuple[dict, dict]:
        """Tokens (T,B,K), action (T,B,A), reward, end, mask (T,B) -> losses (), metrics.
        Steps beyond an episode's end count for nothing; they are on the right, where nothing sees them."""
        tokens = batch["tokens"].transpose(0, 1)
        action = batch["action"].argmax(-1).T
        labels = self.labels(tokens, batch["reward"].T, batch["end"].T, batch["mask"].T)
        token_labels, reward_labels, end_labels = labels

        token_logits, reward_logits, end_logits = self.logits(tokens, action, dropout)
        token_logits = token_logits[:, :-1]  # the last output has no successor in the sequence
        losses = {  # three cross-entropies, unweighted
            "token": cross_entropy(token_logits, token_labels),
            "reward": cross_entropy(reward_logits, reward_labels),
            "end": cross_entropy(end_logits, end_labels),
        }
        with torch.no_grad():  # the means hide what matters: tokens that change, rewards, ends
            changed = (tokens[:, 1:] != tokens[:, :-1]).flatten(1)  # (B,(T-1)*K), without the first frame
            skip = self.num_tokens - 1
            changed_labels = torch.where(changed, token_labels[:, skip:], -100)
            metrics = {
                "wm/token_loss_changed": cross_entropy(token_logits[:, skip:], changed_labels),
                "wm/reward_loss_nonzero": cross_entropy(
                    reward_logits, torch.where(reward_labels == 1, -100, reward_labels)),
                "wm/end_loss_end": cross_entropy(end_logits, torch.where(end_labels == 0, -100, end_labels)),
            }
        return losses, metrics


class Dream:
    """The world model as an environment: B dreams in step, each begun from the tokens (B,K) of one real
    frame. Source: `WorldModelEnv`. A frame's last token predicts nothing, so it waits and passes the
    Transformer together with the next action: a step is one pass of two tokens (the first step: of K + 1) and
    K-1 passes of one token."""

    def __init__(self, world: WorldModel, tokens: torch.Tensor):
        self.world = world
        self.tokens = tokens  # of the present frame (B,K)
        self.waiting = tokens  # those that have not passed yet (B,n)
        self.cache = world.empty_cache(len(tokens))
        self.size = 0  # positions of the cache in use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Append embedded tokens (B,n,W) -> the last output (B,W)."""
        y = self.world(x, self.size, self.cache)
        self.size += x.shape[1]
        return y[:, -1]

    def step(self, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Action (B,) -> reward and end (B,), both drawn, not expected (official); `tokens` is the next
        frame. Where the context is full, memory is cut down to the present frame, at position 0 again
        (official). That never happens within H = T frames: K + (H-1)(K+1) + 1 = T(K+1)."""
        world = self.world
        if self.size + self.waiting.shape[1] + 1 + world.num_tokens > world.positions:
            self.size = 0
            self.waiting = self.tokens
        x = torch.cat([world.token(self.waiting), world.action(action)[:, None]], 1)
        y = self.forward(x)
        reward = sample(world.reward_head(y)) - 1
        end = sample(world.end_head(y))

        drawn = [sample(world.token_head(y))]  # the output at the action predicts token 0
        while len(drawn) < world.num_tokens:
            y = self.forward(world.token(drawn[-1])[:, None])  # that at token k predicts token k + 1
            drawn.append(sample(world.token_head(y)))
        self.tokens = torch.stack(drawn, 1)
        self.waiting = self.tokens[:, -1:]
        return reward, end


# ======== 5. behaviour ========
class Behaviour(nn.Module):
    """Actor and critic: a CNN and an LSTM with two heads on reconstructions, trained in dreams. Sec. 2.3."""

    def __init__(self, shape: tuple, action_dim: int, args: Args):
        super().__init__()
        height, width, channels = shape
        widths = [channels, 32, 32, 64, 64]
        self.args = args
        self.convs = nn.ModuleList(conv(a, b) for a, b in zip(widths, widths[1:]))
        self.lstm = nn.LSTMCell((height // 16) * (width // 16) * widths[-1], args.lstm_units)
        self.actor = nn.Linear(args.lstm_units, action_dim)
        self.critic = Float32Linear(args.lstm_units, 1)
        self.to(memory_format=torch.channels_last)  # max pooling is faster so

    def initial(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden and cell state (B,units) before anything was seen."""
        weight = self.actor.weight
        zeros = torch.zeros(batch, weight.shape[1], dtype=weight.dtype, device=weight.device)
        return zeros, zeros

    def forward(self, frames: torch.Tensor, state: tuple, mask: torch.Tensor | None = None) -> tuple:
        """Frames (T,B,C,Y,X) in [0,1], state (B,units) twice -> logits (T,B,A), value (T,B), state.
        Where mask (T,B) is false the state stays zero: padding comes before an episode."""
        x = 2 * frames.flatten(0, 1) - 1
        for layer in self.convs:
            x = F.relu(F.max_pool2d(layer(x), 2))
        features = x.flatten(1).unflatten(0, frames.shape[:2])
        hidden, cell = state
        outs = []
        for t, feature in enumerate(features.unbind()):
            hidden, cell = self.lstm(feature, (hidden, cell))
            if mask is not None:
                hidden = hidden * mask[t, :, None]
                cell = cell * mask[t, :, None]
            outs.append(hidden)
        out = torch.stack(outs)
        return float32(self.actor(out)), self.critic(out)[..., 0], (hidden, cell)

    @torch.no_grad()  # REINFORCE needs no gradient through the dream; `loss` evaluates the policy again
    def imagine(
            self, tokenizer: Tokenizer, world: WorldModel, tokens: torch.Tensor, recon: torch.Tensor,
            mask: torch.Tensor) -> dict:
        """Dream from the tokens (B,K) of real frames. recon (burn_in+1,B,C,Y,X) and mask (burn_in+1,B) are of
        the frames before them and, as the last one, their own. -> frames (H,B,C,Y,X), action (H,B), reward
        and end (H-1,B), and the policy's state at the start, hidden and cell (B,units).
        The burn-in is for the LSTM only: the Transformer sees nothing before the first frame. A sampled end
        changes nothing here (official); the return takes it into account."""
        _, _, start = self(recon[:-1], self.initial(len(tokens)), mask[:-1])
        dream = Dream(world, tokens)
        state = start
        frame = recon[-1]
        frames, actions, rewards, ends = [], [], [], []
        for t in range(self.args.imag_horizon):
            logits, _, state = self(frame[None], state)
            action = sample(logits[0])
            frames.append(frame)
            actions.append(action)
            if t < self.args.imag_horizon - 1:  # the last frame is only valued
                reward, end = dream.step(action)
                rewards.append(reward)
                ends.append(end)
                frame = tokenizer.decode(dream.tokens)
        torch.clear_autocast_cache()  # bf16 copies of weights that have no gradient
        return dict(
            frames=torch.stack(frames), action=torch.stack(actions), reward=torch.stack(rewards),
            end=torch.stack(ends), hidden=start[0], cell=start[1])

    def loss(self, dream: dict) -> tuple[dict, dict]:
        """What `imagine` returned -> losses (), metrics. Sec. 2.3, App. B. The value is baseline, bootstrap
        and what is learned: no target network, and advantages are not normalised."""
        args = self.args
        logits, value, _ = self(dream["frames"], (dream["hidden"], dream["cell"]))  # (H,B,A), (H,B)
        fixed = value.detach()  # the actor does not train the value, and the value's target is a constant
        ret = lambda_return(dream["reward"], fixed, dream["end"], args.gamma, args.lam)  # (H-1,B)
        log_probs = logits[:-1].log_softmax(-1)
        log_prob = log_probs.gather(-1, dream["action"][:-1, :, None])[..., 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        losses = {
            "policy": -(log_prob * (ret - fixed[:-1])).mean(),
            "value": (value[:-1] - ret).square().mean(),
            "entropy": -args.ent_coef * entropy.mean(),
        }
        metrics = {
            "ac/entropy": entropy.mean().detach(),
            "ac/return": ret.mean(),
            "ac/value": fixed.mean(),
            "ac/imag_reward": float32(dream["reward"]).mean(),
            "ac/imag_end": float32(dream["end"]).mean(),
        }
        return losses, metrics


# ======== 6. update ========
class Optimizers:
    """Three Adams, one per part: none moves another's parameters. The Transformer's matrices decay, its
    embeddings, norms and biases do not. Source: `configure_optimizer`."""

    def __init__(self, agent: Agent, args: Args):
        matrices = [module.weight for module in agent.world.modules() if isinstance(module, nn.Linear)]
        known = {id(p) for p in matrices}
        others = [p for p in agent.world.parameters() if id(p) not in known]
        groups = [
            dict(params=matrices, weight_decay=args.weight_decay),
            dict(params=others, weight_decay=0.0),
        ]
        fused = agent.device.type in ("cpu", "cuda")  # in one kernel, without host reads
        options = dict(fused=fused, capturable=agent.device.type == "cuda")
        self.grad_clip = args.grad_clip
        self.parts = {
            "tokenizer": torch.optim.Adam(agent.tokenizer.parameters(), args.lr, **options),
            "world": torch.optim.AdamW(groups, args.lr, **options),
            "behaviour": torch.optim.Adam(agent.behaviour.parameters(), args.lr, **options),
        }

    def step(self, name: str, losses: dict) -> dict:
        """One update of a part with the sum of its losses -> metrics."""
        optimizer = self.parts[name]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        sum(losses.values()).backward()
        average_ranks([p.grad for p in params])
        grad_norm = nn.utils.clip_grad_norm_(params, self.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        metrics = {f"losses/{k}": v.detach() for k, v in losses.items()}
        metrics[f"grad/{name}_norm"] = grad_norm  # before clipping
        return metrics

    def state_dict(self) -> dict:
        return {name: part.state_dict()["state"] for name, part in self.parts.items()}

    def load_state_dict(self, saved: dict) -> None:
        """Moments; learning rate and decay are those of the present flags."""
        for name, part in self.parts.items():
            part.load_state_dict(dict(state=saved[name], param_groups=part.state_dict()["param_groups"]))


class Agent(nn.Module):
    """Tokenizer, world model and behaviour: the policy for the environment, and what the updates train."""

    def __init__(self, shapes: dict, action_dim: int, discrete: bool, args: Args):
        super().__init__()
        height, width, channels = shapes["image"]
        self.args = args
        self.action_dim = action_dim
        self.tokenizer = Tokenizer(channels, args)
        self.world = WorldModel((height // 16) * (width // 16), action_dim, args)
        self.behaviour = Behaviour(shapes["image"], action_dim, args)
        self.perceptual = choose_perceptual_loss(args, channels)
        self.graphs = {}  # updates that became CUDA graphs

    @property
    def device(self) -> torch.device:
        return self.world.places.device

    def autocast(self):
        """bf16 for matrix products and convolutions. Each weight is cast once and kept until the end, not
        once per step. Trap: where the first use was under no_grad, the kept copy has no gradient."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16")

    def initial(self, num_envs: int) -> dict:
        """Policy state before the first observation."""
        hidden, cell = self.behaviour.initial(num_envs)
        return dict(hidden=hidden, cell=cell)

    @torch.no_grad()
    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """Images (N,Y,X,C) uint8, on any device -> tokens (N,K)."""
        with self.autocast():
            return self.tokenizer.encode(to_frames(image.to(self.device)))

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (N,K), on any device -> frames (N,C,Y,X) in [0,1]."""
        with self.autocast():
            return self.tokenizer.decode(tokens.to(self.device))

    @torch.no_grad()
    def act(self, row: dict, state: dict) -> dict:
        """Row (N,...) and state -> new {hidden, cell, action (N,A) one-hot}. Sampled from the policy, now and
        then uniformly; in evaluation (`agent.eval()`) at another temperature, never uniformly (official)."""
        args = self.args
        recon = self.decode(self.encode(torch.as_tensor(row["image"])))
        keep = ~torch.as_tensor(row["is_first"], device=self.device)[:, None]
        hidden = state["hidden"] * keep
        cell = state["cell"] * keep
        with self.autocast():
            logits, _, (hidden, cell) = self.behaviour(recon[None], (hidden, cell))
        temperature = args.temperature if self.training else args.eval_temperature
        index = sample(logits[0] / temperature)
        if self.training:  # with probability epsilon all environments act at random: one draw (official)
            explore = torch.rand((), device=self.device) < args.epsilon
            index = torch.where(explore, torch.randint_like(index, self.action_dim), index)
        action = F.one_hot(index, self.action_dim).to(logits.dtype)
        return dict(hidden=float32(hidden), cell=float32(cell), action=action)

    @torch.no_grad()
    def warm_up(self, replay: Replay) -> dict:
        """Policy state after the last `burn_in` frames of the running episodes, as the networks are now."""
        batch = replay.recent(self.args.burn_in)
        recon = torch.stack([self.decode(self.encode(image)) for image in batch["image"]])
        start = self.behaviour.initial(replay.num_envs)
        with self.autocast():
            _, _, (hidden, cell) = self.behaviour(recon, start, batch["mask"].to(self.device))
        return dict(hidden=float32(hidden), cell=float32(cell))


def update_tokenizer(agent: Agent, optimizer: Optimizers, batch: dict) -> dict:
    """Images (1,B,Y,X,C) -> metrics."""
    with agent.autocast():
        losses, metrics = agent.tokenizer.loss(to_frames(batch["image"][0]), agent.perceptual)
    return metrics | optimizer.step("tokenizer", losses)


def train_tokenizer(agent: Agent, optimizer: Optimizers, replay: Replay, batch_size: int) -> dict:
    """One update of the tokenizer on single frames -> metrics."""
    batch = replay.sample(batch_size, 1, "image")
    batch = {k: v.to(agent.device, non_blocking=True) for k, v in batch.items()}
    return captured(update_tokenizer, agent, optimizer, batch)


def update_world_model(agent: Agent, optimizer: Optimizers, batch: dict) -> dict:
    """Sequences (T,B,...) -> metrics."""
    with agent.autocast():
        losses, metrics = agent.world.loss(batch, agent.args.dropout)
    return metrics | optimizer.step("world", losses)


def train_world_model(agent: Agent, optimizer: Optimizers, replay: Replay, batch_size: int) -> dict:
    """One update of the Transformer on sequences of tokens, which `replay.tokenize` has made -> metrics."""
    batch = replay.sample(batch_size, agent.args.batch_length, "tokens action reward end")
    batch = {k: v.to(agent.device, non_blocking=True) for k, v in batch.items()}
    return captured(update_world_model, agent, optimizer, batch)


def update_behaviour(agent: Agent, optimizer: Optimizers, batch: dict) -> dict:
    """Frames (burn_in+1,B,...): actor and critic in dreams that begin at the last one -> metrics."""
    with agent.autocast():
        dream = agent.behaviour.imagine(
            agent.tokenizer, agent.world, batch["tokens"][-1], batch["recon"], batch["mask"])
        losses, metrics = agent.behaviour.loss(dream)
    return metrics | optimizer.step("behaviour", losses)


def train_behaviour(agent: Agent, optimizer: Optimizers, replay: Replay, batch_size: int) -> dict:
    """One update of actor and critic in dreams, begun at the last frame of sampled sequences -> metrics."""
    batch = replay.sample(batch_size, agent.args.burn_in + 1, "tokens recon", last=True)
    batch = {k: v.to(agent.device, non_blocking=True) for k, v in batch.items()}
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


class LifeEnvs(Envs):
    """Atari in training: a lost life ends an episode of replay, the row after it begins the next one. The
    game goes on; `ret`, `length` and `last` are those of whole games. twm.py has another class: there one row
    ends a life and begins the next, and FIRE is asked for, in evaluations too (both official)."""

    def __init__(self, *args, **options):
        super().__init__(*args, life_loss_info=True, **options)  # a lost life is terminated, without a reset

    def reset(self) -> dict[str, np.ndarray]:
        self.lost = np.zeros(self.num_envs, bool)
        return super().reset()

    def step(self, action: np.ndarray) -> dict[str, np.ndarray]:
        obs, reward, terminated, truncated, info = self.envs.step(self.native(action))
        is_first = self.last | self.lost
        self.ret = np.where(self.last, 0, self.ret + reward)
        self.length = np.where(self.last, 0, self.length + 1)
        self.last = truncated | (terminated & (info["lives"] == 0))
        self.lost = terminated & ~self.last
        is_last = terminated | truncated
        return self.row(obs, reward, is_first=is_first, is_last=is_last, is_terminal=terminated)


def make_envs(args: Args, num_envs: int, *key: int) -> Envs:
    """Anything with `reset`, `step`, `shapes`, `action_dim`, `discrete`, `ret`, `length` and `last` will do.
    Key 0 is training, in which lives end episodes; evaluations play whole games (official)."""
    seeds = make_seeds(num_envs, args.seed, *key)
    atari = find_spec(args.env_id).id.startswith("ALE/")
    if atari and args.life_loss and key[0] == 0:
        envs = LifeEnvs(args, num_envs, seeds, args.image_size)
    else:
        envs = Envs(args, num_envs, seeds, args.image_size, pixels=not shows_image(args.env_id))
    if not envs.discrete:
        fail(f"{args.env_id}: IRIS needs discrete actions, not {envs.action_space}; dreamer_v3.py has others")
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
    """Sequences of episodes: an episode uniformly, so that steps of short ones come more often, then a place
    in it. Source: `EpisodesDataset`, `Episode.segment`. Running episodes can be sampled too. A sequence that
    reaches over a border of its episode is padded with zeros there, and `mask` says where.
    A frame is a row whose action has an outcome: reward and end, which arrive with the row after it. So the
    row that arrives with an end (game over, time limit, lost life) is none, nor is the newest row."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.begun = [0] * self.num_envs  # first row of the running episode
        self.episodes = []  # (first row, row after the last frame, environment) of those that have ended
        self.table = None  # the same as a tensor, running ones included
        self.tokens = None  # (rows*num_envs,K) of all images, see `tokenize`
        self.recon = None  # (rows*num_envs,C,Y,X), see `reconstruct`

    def add(self, row: dict) -> None:
        super().add(row)
        self.track(self.rows - 1, row["is_first"], row["is_last"])

    def track(self, number: int, is_first, is_last) -> None:
        """Note where episodes begin and end, by the flags (N,) of a row; forget overwritten ones."""
        for env in range(self.num_envs):
            if is_first[env] and number > self.begun[env]:  # a resume has cut off what was running
                self.episodes.append((self.begun[env], number - 1, env))
                self.begun[env] = number
            if is_last[env]:
                self.episodes.append((self.begun[env], number, env))
                self.begun[env] = number + 1
        while self.episodes and self.episodes[0][1] <= self.rows - self.size:
            self.episodes.pop(0)
        self.table = None

    def make_table(self) -> torch.Tensor:
        """Episodes with frames (episodes,3): first row that is left, row after the last, environment."""
        running = [(begun, self.rows - 1, env) for env, begun in enumerate(self.begun)]
        table = torch.tensor(self.episodes + running, device=self.device)
        table[:, 0].clamp_(min=self.rows - self.size)
        return table[table[:, 0] < table[:, 1]]

    def sequence(self, start, first, stop, env, length: int, names: str) -> dict:
        """Named fields (length,B,...), mask (length,B) from row `start` of the episodes first..stop (B)."""
        row = start + torch.arange(length, device=self.device)[:, None]  # (length,B)
        mask = (first <= row) & (row < stop)
        row = row.clamp(first, stop - 1)
        index = row % self.capacity * self.num_envs + env
        after = (row + 1) % self.capacity * self.num_envs + env
        batch = dict(mask=mask)
        for name in names.split():
            if name == "tokens":
                value = self.tokens[index]
            elif name == "recon":
                value = self.recon[index]
            elif name == "reward":
                value = self.data["reward"].flatten()[after]
            elif name == "end":
                value = self.data["is_last"].flatten()[after]  # a time limit too (official)
            else:
                value = self.data[name].flatten(0, 1)[index]
            batch[name] = value * mask.view(*mask.shape, *[1] * (value.dim() - 2))
        return batch

    def sample(self, batch_size: int, length: int, names: str, last: bool = False) -> dict:
        """-> named fields (length,batch_size,...) and mask. The frame that is drawn uniformly is the first of
        its sequence, or with `last` the last one; padding is at the other end."""
        if self.table is None:
            self.table = self.make_table()
        which, place = torch.rand((2, batch_size), dtype=torch.float64, device=self.device)
        first, stop, env = self.table[(which * len(self.table)).long()].T
        drawn = first + (place * (stop - first)).long()
        start = drawn - (length - 1) if last else drawn
        return self.sequence(start, first, stop, env, length, names)

    def recent(self, length: int) -> dict:
        """The last images (length,num_envs,...) of the running episodes, and their mask."""
        env = torch.arange(self.num_envs, device=self.device)
        begun = torch.tensor(self.begun, device=self.device)
        first = begun.clamp(min=self.rows - self.size)
        stop = torch.full_like(first, self.rows)
        return self.sequence(stop - length, first, stop, env, length, "image")

    def tokenize(self, agent: Agent, chunk: int = 256) -> None:
        """Encode all images. Once per epoch, after the tokenizer was trained: until it is again, each frame
        has the same tokens in every batch."""
        count = min(self.rows, self.capacity) * self.num_envs
        images = self.data["image"].flatten(0, 1)[:count]
        self.tokens = torch.cat([agent.encode(image).to(self.device) for image in images.split(chunk)])

    def reconstruct(self, agent: Agent, chunk: int = 256) -> None:
        """Decode the tokens of all images, for the burn-in of the policy, likewise."""
        height, width, channels = self.data["image"].shape[2:]
        self.recon = None  # 48 KiB per image of 64 x 64: not twice
        self.recon = torch.empty(len(self.tokens), channels, height, width, device=self.device)
        for tokens, recon in zip(self.tokens.split(chunk), self.recon.split(chunk)):
            recon.copy_(agent.decode(tokens))

    def load_state_dict(self, state: dict, lost: int) -> None:
        """Episodes are found again by their flags: each rank has other rows."""
        super().load_state_dict(state, lost)
        self.begun = [self.rows - self.size] * self.num_envs
        for number in range(self.rows - self.size, self.rows):
            row = number % self.capacity
            self.track(number, self.files["is_first"][row].tolist(), self.files["is_last"][row].tolist())


def replay_specs(shapes: dict, action_dim: int) -> dict:
    """Fields of a replay row: name -> (shape, dtype)."""
    return {
        "image": (shapes["image"], torch.uint8),
        "reward": ((), torch.float32),
        "is_first": ((), torch.bool),
        "is_last": ((), torch.bool),
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
    The first `context` frames are reconstructions, the rest is dreamed from the last of them with the
    recorded actions."""
    args = agent.args
    context = min(context, args.batch_length // 2)
    batch = replay.sample(16 * count, args.batch_length, "image action")
    longest = batch["mask"].sum(0).argsort(descending=True)[:count]  # beyond an episode's end it is black
    batch = {k: v[:, longest].to(agent.device) for k, v in batch.items()}
    action = batch["action"].argmax(-1)

    with agent.autocast():
        tokens = [agent.encode(image) for image in batch["image"][:context]]
        dream = Dream(agent.world, tokens[-1])
        for t in range(context - 1, args.batch_length - 1):
            dream.step(action[t])
            tokens.append(dream.tokens)
    model = torch.stack([agent.decode(x) for x in tokens]).movedim(2, -1)  # (T,B,Y,X,C)
    model = model * batch["mask"][..., None, None, None]
    truth = batch["image"] / 255
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
        args, "total_timesteps num_envs image_size epoch_steps epoch_updates tokenizer_batch batch_size "
        "vocab_size code_dim channels res_blocks layers heads width lstm_units burn_in temperature "
        "eval_temperature grad_clip lr save_every")
    check_shares(args, "gamma lam sticky_actions dropout epsilon")
    if args.extra_epochs < 0:
        fail("--extra-epochs must not be negative")
    if args.image_size % 16:
        fail("--image-size must be a multiple of 16")
    if args.channels % 2 or args.width % args.heads:
        fail("--channels must be even (norms of two channels), --width a multiple of --heads")
    if min(args.batch_length, args.imag_horizon) < 2:
        fail("--batch-length and --imag-horizon must be at least 2: a frame and the one that follows")
    if not args.learning_starts <= args.world_starts <= args.behaviour_starts:
        fail("--learning-starts, --world-starts and --behaviour-starts must not decrease")
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


def main(args: Args) -> None:
    rank, ranks, device = start_ranks(args.device)
    keep_freed_memory()
    saved = load_checkpoint(Path(args.resume)) if args.resume else {}
    step = saved.get("step", 0)  # policy steps over all environments and ranks
    updates = saved.get("updates", 0)
    epoch = saved.get("epoch", 0)  # epochs that are complete
    done = saved.get("done", dict(tokenizer=0, world=0, behaviour=0))  # updates in the running epoch
    life = saved.get("life", -1) + 1  # how often the run was resumed
    if args.num_envs % ranks or args.batch_size % ranks or args.tokenizer_batch % ranks:
        fail(f"--num-envs, --batch-size and --tokenizer-batch must be multiples of the {ranks} processes")
    num_envs = args.num_envs // ranks

    # ---- environments, agent, optimiser ----
    seed = seed_generators(args.seed, rank, life)
    envs = make_envs(args, num_envs, 0, rank, life)  # after a resume other episodes than before
    torch.manual_seed(args.seed)  # the same weights on every rank
    agent = Agent(envs.shapes, envs.action_dim, envs.discrete, args).to(device)
    torch.manual_seed(seed)  # other samples on every rank
    optimizer = Optimizers(agent, args)
    if args.compile == "on":
        agent.tokenizer.loss = compiled(agent.tokenizer.loss)
        agent.world.logits = compiled(agent.world.logits)

    # ---- run directory and replay, as they were where a run is resumed ----
    # an episode has one row more than steps: up to twice as many in all, on disk only once they are used
    capacity = saved.get("capacity") or min(args.buffer_size, 2 * args.total_timesteps) // args.num_envs
    if capacity <= args.batch_length:
        fail(f"replay of {capacity} rows per environment is not longer than --batch-length: "
             "raise --buffer-size or --total-timesteps")
    run = make_run(args, device)
    held = lock(run) if rank == 0 else None  # until the process ends
    specs = replay_specs(envs.shapes, envs.action_dim)
    if not saved:
        check_disk(run, specs, min(args.buffer_size, args.total_timesteps))
    replay = Replay(specs, capacity, num_envs, run / f"replay{rank}", device, new=not saved)
    if saved:
        if (args.heads, args.epoch_steps) != (saved["args"]["heads"], saved["args"]["epoch_steps"]):
            fail("--heads and --epoch-steps of a run cannot change")
        load_weights(agent, saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        replay.load_state_dict(saved["replay"], saved["at_risk"])
        if rank == 0:
            restore_rng(saved["rng"])

    # ---- schedule ----
    collecting = math.ceil(args.total_timesteps / args.epoch_steps)  # epochs; those after them only train
    epochs = collecting + args.extra_epochs
    if step < args.total_timesteps:  # a finished run that is to collect more goes back from its extra epochs
        epoch = min(epoch, step // args.epoch_steps)
    starts = dict(tokenizer=args.learning_starts, world=args.world_starts, behaviour=args.behaviour_starts)
    train = dict(tokenizer=train_tokenizer, world=train_world_model, behaviour=train_behaviour)
    batch_size = args.batch_size // ranks
    batch_sizes = dict(tokenizer=args.tokenizer_batch // ranks, world=batch_size, behaviour=batch_size)

    def now() -> int:
        """The policy step, which goes on in epochs that only train."""
        return step + max(epoch - collecting, 0) * args.epoch_steps

    if rank == 0:
        count = sum(p.numel() for p in agent.parameters())
        print(f"{device}, {args.precision}: {count:,} parameters")
        ratio = 3 * args.epoch_updates / args.epoch_steps  # epochs end at multiples of epoch_steps
        print(f"{ratio:g} updates per policy step, a third for each part")
        frames = 4 * math.prod(envs.shapes["image"]) * min(capacity * num_envs, args.total_timesteps // ranks)
        print(f"decoded frames, once the behaviour learns: up to {frames / 2**30:.2f} GiB on {replay.device}")
        if args.total_timesteps <= args.behaviour_starts:
            print("the policy stays untrained: --total-timesteps is not beyond --behaviour-starts")
        print(f"run directory {run}")
        writer = start_log(run, args, now())

    def due(every: int) -> bool:
        return every > 0 and now() // every > before // every

    def save() -> None:
        at_risk = rows_at_risk(args, step, more=args.epoch_steps)  # checkpoints come at the end of an epoch
        save_checkpoint(
            run, args, step=step, updates=updates, epoch=epoch, done=done, life=life, capacity=capacity,
            agent=agent.state_dict(), optimizer=optimizer.state_dict(), replay=replay.state_dict(),
            at_risk=0 if stopping else at_risk)

    def dream() -> None:
        video, errors = dream_video(agent, replay)
        save_gif(video, writer, now())
        log_metrics(writer, errors, now())

    # ---- epochs: collect, then update the three parts one after another ----
    stop = stop_signals()
    stopping = False
    metrics = {}
    ret = math.nan
    budget = args.total_timesteps + args.extra_epochs * args.epoch_steps
    bar = progress_bar(replace(args, total_timesteps=budget), now(), rank)
    row = envs.reset()
    if saved and rank == 0:
        save()  # says how many rows this life puts at risk
    while epoch < epochs and not stopping:
        before = now()
        for phase in ("collect", "tokenizer", "world", "behaviour"):
            if phase == "collect":
                # the policy remembers the running episodes as the newest networks see them (official)
                state = agent.warm_up(replay) if replay.size else agent.initial(num_envs)
                while step < min((epoch + 1) * args.epoch_steps, args.total_timesteps) and not stopping:
                    state = agent.act(row, state)
                    # after an end follows action 0 (on Atari: nothing): it resets, or the game goes on after
                    # a lost life
                    state["action"][torch.as_tensor(row["is_last"])] = 0
                    replay.add(row | state)
                    ended = envs.last
                    episodes = list(zip(envs.ret[ended], envs.length[ended]))
                    decisions, stopping = sum_ranks([(~row["is_first"]).sum(), len(stop)], device)
                    step += decisions
                    row = envs.step(state["action"].cpu().numpy())
                    if rank > 0:
                        continue
                    for ret, steps in episodes:
                        say(f"global_step={step}, episodic_return={ret}")
                        numbers = {"charts/episodic_return": ret, "charts/episodic_length": steps}
                        log_metrics(writer, numbers, step)
                    bar.set_postfix(episodic_return=ret, updates=updates, refresh=False)
                    bar.update(now() - bar.n)

            elif step > starts[phase] and not stopping:
                if phase == "world":
                    replay.tokenize(agent)
                if phase == "behaviour":
                    replay.reconstruct(agent)
                while done[phase] < args.epoch_updates and not stopping:
                    metrics.update(train[phase](agent, optimizer, replay, batch_sizes[phase]))
                    done[phase] += 1
                    updates += 1
                    (stopping,) = sum_ranks([len(stop)], device)  # all ranks end with the same update
                    if updates % 50 == 0:  # epochs can be long
                        bar.set_postfix(episodic_return=ret, updates=updates)

        if not stopping:
            epoch += 1
            done = dict.fromkeys(done, 0)

        # ---- now and then: log, save, dream, evaluate; rank 0 alone ----
        if rank > 0 or stopping:
            continue
        bar.update(now() - bar.n)
        if metrics and (due(args.log_every) or due(args.save_every)):
            values = read_metrics(metrics, now(), run)
            values["charts/frames"] = step * args.action_repeat
            values.update(speeds(bar, now(), updates - saved.get("updates", 0)))
            log_metrics(writer, values, now())
        if due(args.save_every):
            save()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # training does not notice
            if due(args.video_every):
                dream()
            if due(args.eval_every) and args.eval_episodes:
                log_evaluation(writer, evaluate(agent, args, stop), now())

    # ---- the end ----
    bar.close()
    if rank == 0:
        if metrics:
            log_metrics(writer, read_metrics(metrics, now(), run), now())
        save()
        if not stopping:
            dream()
        if not stopping and args.eval_episodes:  # also after the resume of a run that had ended
            log_evaluation(writer, evaluate(agent, args, stop), now())
        print(f"saved at step {step} in {run}")
        writer.close()
    if ranks > 1:
        dist.barrier()  # nobody leaves while rank 0 is still evaluating
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
