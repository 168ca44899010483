"""DreamerV2's update as one writes it first: every head and the prior inside the time loops, distribution objects,
channels first, nothing hoisted, torch's allocation as it is. tests/test_dreamer_v2.py compares its losses with the
script's: weights and optimisers are those of the script, and with given noise both draw the same. Its speed is
measured as one writes it first: distributions that draw for themselves, torch's AdamW and clip_grad_norm_.

`python tests/naive_dreamer_v2.py --batch-size 16 --batch-length 50` prints CPU ms per update; compare it with the
cpu_ms_per_update of tests/benchmark.py and the same flags, run in turns on one machine."""
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Independent, Normal, OneHotCategoricalStraightThrough, kl_divergence


class Latent(Independent):
    """S independent one-hot variables of K classes with straight-through samples, from exponential noise if given."""

    def __init__(self, logits: torch.Tensor):
        super().__init__(OneHotCategoricalStraightThrough(logits=logits), 1)

    def draw(self, noise: torch.Tensor | None) -> torch.Tensor:
        if noise is None:
            return self.rsample()
        probs = self.base_dist.probs
        return F.one_hot((probs / noise).argmax(-1), probs.shape[-1]) + (probs - probs.detach())


class LibraryAdam:
    """torch's AdamW behind the interface of the script's Adam, with the same rates (its epsilon differs slightly)."""

    def __init__(self, net: nn.Module, lr: float, args):
        self.params, self.clip = [p for p in net.parameters() if p.requires_grad], args.grad_clip
        self.adam = torch.optim.AdamW(self.params, lr, eps=args.adam_eps, weight_decay=args.weight_decay / lr)

    def step(self, loss: torch.Tensor) -> None:
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, self.clip)
        self.adam.step()


class NaiveUpdate:
    """`step(batch, noise, coefs)` does what the script's `train_step` does after sampling; Reinforce only."""

    def __init__(self, agent, optimizers: dict):
        self.agent, self.optimizers, self.world, self.behaviour = agent, optimizers, agent.world, agent.behaviour

    def cell(self, deter, stoch, action):
        rssm = self.world.rssm
        x = F.elu(rssm.img_in(torch.cat([stoch, action], -1)))
        reset, cand, update = rssm.gru_norm(rssm.gru(torch.cat([x, deter], -1))).chunk(3, -1)
        update = torch.sigmoid(update - 1)
        return update * torch.tanh(torch.sigmoid(reset) * cand) + (1 - update) * deter

    def encode(self, image):
        x = image.flatten(0, 1).permute(0, 3, 1, 2).to(self.world.rssm.gru.weight.dtype) / 255 - 0.5
        for conv in self.world.encoder.convs:
            x = F.elu(conv(x))
        return x.permute(0, 2, 3, 1).flatten(1).unflatten(0, image.shape[:2])

    def decode(self, feat):
        x = self.world.decoder.dense(feat).flatten(0, 1)[:, :, None, None]
        for i, conv in enumerate(self.world.decoder.convs):
            x = conv(F.elu(x) if i else x)
        return x.permute(0, 2, 3, 1).unflatten(0, feat.shape[:2])

    def world_loss(self, batch, noise):
        world, rssm, args = self.world, self.world.rssm, self.agent.args
        tokens, size = self.encode(batch["image"]), batch["reward"].shape[1]
        deter, stoch = tokens.new_zeros(size, rssm.deter), tokens.new_zeros(size, rssm.stoch * rssm.classes)
        feats, posts, priors, rewards, discounts = [], [], [], [], []
        for t in range(len(tokens)):
            keep = (~batch["is_first"][t]).to(deter.dtype)[:, None]
            deter = self.cell(deter * keep, stoch * keep, batch["action"][t] * keep)
            x = rssm.post_hid(torch.cat([deter, tokens[t]], -1))
            posts.append(rssm.post_out(x).unflatten(-1, (rssm.stoch, rssm.classes)))
            priors.append(rssm.prior(deter))
            stoch = Latent(posts[-1]).draw(noise[t]).flatten(1)
            feats.append(torch.cat([deter, stoch], -1))
            rewards.append(world.reward(feats[-1])[:, 0])
            discounts.append(world.discount(feats[-1])[:, 0])
        feat, post, prior = torch.stack(feats), torch.stack(posts), torch.stack(priors)
        left = kl_divergence(Latent(post), Latent(prior.detach())).mean()
        right = kl_divergence(Latent(post.detach()), Latent(prior)).mean()
        image = batch["image"].to(feat.dtype) / 255 - 0.5
        losses = dict(
            kl=(1 - args.kl_balance) * left + args.kl_balance * right,
            image=-Independent(Normal(self.decode(feat), 1.0), 3).log_prob(image).mean(),
            reward=-Normal(torch.stack(rewards), 1.0).log_prob(batch["reward"].tanh()).mean(),
            discount=F.binary_cross_entropy_with_logits(
                torch.stack(discounts), (1 - batch["is_terminal"].to(feat.dtype)) * args.gamma))
        total = args.kl_scale * losses["kl"] + losses["image"] + losses["reward"]
        return total + args.discount_scale * losses["discount"], losses, feat.detach()

    def behaviour_losses(self, feat, is_terminal, noise, coefs):
        world, behaviour, rssm, args = self.world, self.behaviour, self.world.rssm, self.agent.args
        feat = feat.flatten(0, 1)
        deter, stoch = feat.split([rssm.deter, feat.shape[-1] - rssm.deter], -1)
        feats, actions = [feat], []
        rewards, values = [world.reward(feat)[:, 0]], [behaviour.slow_critic(feat)[:, 0]]
        discounts = [(1 - is_terminal.flatten().to(feat.dtype)) * args.gamma]
        for action_noise, stoch_noise in zip(noise["action"], noise["prior"]):
            policy = OneHotCategoricalStraightThrough(logits=behaviour.policy(feats[-1].detach()))
            actions.append(policy.sample() if action_noise is None else
                           F.one_hot((policy.probs / action_noise).argmax(-1), action_noise.shape[-1]))
            deter = self.cell(deter, stoch, actions[-1].to(deter.dtype))
            stoch = Latent(rssm.prior(deter)).draw(stoch_noise).flatten(1)
            feats.append(torch.cat([deter, stoch], -1))
            rewards.append(world.reward(feats[-1])[:, 0])
            values.append(behaviour.slow_critic(feats[-1])[:, 0])
            discounts.append(torch.sigmoid(world.discount(feats[-1])[:, 0]))
        target, targets, weights = values[-1], [], [torch.ones_like(discounts[0])]
        for t in reversed(range(args.imag_horizon)):
            target = rewards[t] + discounts[t] * ((1 - args.lam) * values[t + 1] + args.lam * target)
            targets.insert(0, target)
        for discount in discounts[:-1]:
            weights.append(weights[-1] * discount)
        feat, target, weight = torch.stack(feats).detach(), torch.stack(targets).detach(), torch.stack(weights).detach()
        policy = OneHotCategoricalStraightThrough(logits=behaviour.policy(feat[:-2]))
        advantage = (target[1:] - torch.stack(values)[:-2]).detach()
        objective = policy.log_prob(torch.stack(actions)[:-1]) * advantage + coefs[0] * policy.entropy()
        value = Normal(behaviour.critic(feat[:-1])[..., 0], 1.0)
        return dict(policy=-(weight[:-2] * objective).mean(), value=-(weight[:-1] * value.log_prob(target)).mean())

    def step(self, batch: dict, noise: dict | None, coefs: torch.Tensor) -> dict[str, float]:
        """One update -> its losses."""
        steps, horizon = len(batch["reward"]), self.agent.args.imag_horizon
        noise = noise or dict(post=[None] * steps, action=[None] * horizon, prior=[None] * horizon)
        total, losses, feat = self.world_loss(batch, noise["post"])
        self.optimizers["model"].step(total)
        losses.update(self.behaviour_losses(feat, batch["is_terminal"], noise, coefs))
        self.optimizers["actor"].step(losses["policy"])
        self.optimizers["critic"].step(losses["value"])
        self.behaviour.update_slow_critic()
        return {name: value.item() for name, value in losses.items()}


if __name__ == "__main__":
    from benchmark import synthetic_rows
    from conftest import load

    script, device, cpu_ms = load("dreamer_v2"), torch.device("cpu"), []
    torch.set_num_threads(1)
    script.Linear.forward = nn.Linear.forward
    args = replace(script.parse_args(sys.argv[1:]), precision="fp32")
    agent = script.Agent({"image": (64, 64, 1)}, 6, True, args)
    specs, folder = script.replay_specs({"image": (64, 64, 1)}, agent, args), tempfile.TemporaryDirectory()
    replay = script.EpisodeReplay(specs, 10 * args.batch_length, 1, device, Path(folder.name),
                                  length=args.batch_length, prioritize_ends=args.prioritize_ends)
    rows = synthetic_rows(replay, 2 * args.batch_length, args.seed)
    for _ in range(10 * args.batch_length):
        replay.add(next(rows))
    parts = dict(model=(agent.world, args.model_lr), actor=(agent.behaviour.actor, args.actor_lr),
                 critic=(agent.behaviour.critic, args.critic_lr))
    naive = NaiveUpdate(agent, {name: LibraryAdam(net, lr, args) for name, (net, lr) in parts.items()})
    coefs = torch.tensor([1e-3, 0.9])
    for _ in range(5):
        start = time.process_time()
        naive.step(replay.sample(args.batch_size), None, coefs)
        cpu_ms.append(1000 * (time.process_time() - start))
    print(f"naive update: {statistics.median(cpu_ms[1:]):.0f} CPU ms, median of {len(cpu_ms) - 1}")
