"""iris.py: what its tokenizer, Transformer, dreams and losses must do, and when each is trained."""
import contextlib
import io
import os
import signal
import tempfile
from collections import Counter
from pathlib import Path

import envs
import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load

m = load("iris")
CPU = torch.device("cpu")
IMAGE = (32, 32, 3)  # four tokens a frame
A = 3
SMALL = dict(
    image_size=32, vocab_size=11, code_dim=6, channels=4, res_blocks=1, layers=2, heads=2, width=8, lstm_units=5,
    batch_length=4, imag_horizon=4, burn_in=3, precision="fp32", perceptual_loss="pixel")
gymnasium.register("IrisScripted-v0", entry_point=envs.Scripted, kwargs=dict(image=True))


def make_agent(dtype=torch.float64, **changes):
    """Small networks; the weights are scaled up, so that predictions differ."""
    torch.manual_seed(0)
    agent = m.Agent({"image": IMAGE}, A, True, m.Args(**{**SMALL, **changes})).to(dtype)
    with torch.no_grad():
        agent.tokenizer.codebook.weight.normal_()
        agent.tokenizer.pre_quant.weight.mul_(30)
        for name, p in agent.world.named_parameters():
            if p.dim() > 1 and "position" not in name:
                p.mul_(10)
    return agent


def make_replay(rows, num_envs, image=IMAGE):
    folder = tempfile.TemporaryDirectory()
    replay = m.Replay(m.replay_specs({"image": image}, A), rows, num_envs, Path(folder.name), CPU)
    replay.folder = folder  # it goes when the replay goes
    return replay


def add(replay, image, is_first, is_last):
    """One row; rewards and actions are 0."""
    count = replay.num_envs
    action = F.one_hot(torch.zeros(count).long(), A)
    replay.add(dict(image=image, reward=[0.0] * count, is_first=is_first, is_last=is_last, action=action))


def random_replay(num_envs=2, rows=60, ends=0.2):
    """Each row may end its episode; the next one begins another."""
    rng = np.random.default_rng(0)
    replay = make_replay(rows, num_envs)
    last = np.ones(num_envs, bool)
    for _ in range(rows):
        first = last
        last = ~first & (rng.random(num_envs) < ends)
        image = rng.integers(0, 256, (num_envs, *IMAGE), np.uint8)
        reward = rng.integers(-2, 3, num_envs).astype(np.float32)
        action = np.eye(A)[rng.integers(A, size=num_envs)]
        replay.add(dict(image=image, reward=reward, is_first=first, is_last=last, action=action))
    return replay


def prepared_replay(agent):
    replay = random_replay()
    replay.tokenize(agent)
    replay.reconstruct(agent)
    return replay


def random_tokens(agent, *shape):
    return torch.randint(agent.args.vocab_size, (*shape, agent.world.num_tokens))


def random_batch(agent, steps, batch):
    """What the world model learns from."""
    return dict(
        tokens=random_tokens(agent, steps, batch), action=F.one_hot(torch.randint(A, (steps, batch)), A),
        reward=torch.randn(steps, batch), end=torch.rand(steps, batch) < 0.3,
        mask=torch.ones(steps, batch, dtype=torch.bool))


# ---- networks ----


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize("actions, world, behaviour", [(6, 8_448_005, 3_218_983), (18, 8_451_077, 3_225_139)])
def test_parameter_counts(actions, world, behaviour):
    """Those of the official code."""
    agent = m.Agent({"image": (64, 64, 3)}, actions, True, m.Args(perceptual_loss="none"))
    t, w, b = agent.tokenizer, agent.world, agent.behaviour
    assert [count(x) for x in (t.encoder, t.pre_quant, t.codebook)] == [1_418_240, 262_656, 262_144]
    assert [count(x) for x in (t.post_quant, t.decoder)] == [262_656, 1_821_827]
    assert [count(w), count(b)] == [world, behaviour]
    assert [count(w.blocks, w.norm), count(w.position)] == [7_898_112, 87_040]
    assert [count(b.convs), count(b.lstm), count(b.critic)] == [65_568, 3_149_824, 513]


def test_initial_weights():
    world = m.WorldModel(16, 6, m.Args(layers=2))
    for name, p in world.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            assert abs(p.std() / 0.02 - 1) < 0.1, name
    words = m.Tokenizer(3, m.Args(channels=2, res_blocks=1)).codebook.weight
    assert words.abs().max() <= 1 / 512
    assert words.std().item() == pytest.approx(1 / 512 / 3**0.5, rel=0.01)


def test_sampler():
    """100,000 draws follow the softmax."""
    torch.manual_seed(0)
    draws = 100_000
    for temperature in (1.0, 0.5):
        logits = torch.tensor([2.0, 0.0, -1.0, 1.0]) / temperature
        index = m.sample(logits.expand(draws, 4))
        expected = logits.softmax(0) * draws
        chi = ((torch.bincount(index, minlength=4) - expected).square() / expected).sum()
        assert chi < 16.3, "p > 0.001 with three degrees of freedom"


def test_nearest_code():
    torch.manual_seed(0)
    z = torch.randn(50, 6, dtype=torch.float64)
    words = torch.randn(9, 6, dtype=torch.float64)
    assert torch.equal(m.nearest_code(z, words), torch.cdist(z, words).argmin(-1))
    near = (z[:1] + 0.01 * words).float()  # bf16 would not tell them apart
    plain = m.nearest_code(z.float(), near)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(m.nearest_code(z.float(), near), plain)
    assert len(plain.unique()) > 3


def test_decoded_frames():
    """Are in [0,1], from the decoder's [-1,1] and beyond."""
    tokenizer = make_agent().tokenizer
    tokenizer.reconstruct = lambda z_q: torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])
    assert tokenizer.decode(torch.zeros(1, 4).long()).tolist() == [0, 0, 0.5, 1, 1]


# ---- losses ----


def test_stop_gradients_of_the_tokenizer():
    """The codebook term moves words only, the commitment term the encoder only; the reconstruction's gradient passes
    straight through from the decoder's input to z and leaves the codebook alone."""
    tokenizer = make_agent().tokenizer
    embed, reconstruct = tokenizer.embed, tokenizer.reconstruct
    seen = []

    def keep(x):
        seen.append(x)
        return x

    tokenizer.embed = lambda frames: keep(embed(frames))
    tokenizer.reconstruct = lambda z_q: reconstruct(keep(z_q))
    losses, _ = tokenizer.loss(torch.rand(3, 3, 32, 32, dtype=torch.float64))
    z, through = seen
    words = tokenizer.codebook.weight
    grads = {}
    for name, loss in losses.items():
        grads[name] = torch.autograd.grad(loss, (z, words, through), retain_graph=True, allow_unused=True)
    reached = {name: [g is not None and bool(g.any()) for g in pair[:2]] for name, pair in grads.items()}
    assert reached == dict(codebook=[False, True], commit=[True, False], image=[True, False])
    assert torch.equal(grads["image"][0], grads["image"][2])
    z_q = tokenizer.lookup(tokenizer.quantize(z))
    torch.testing.assert_close(through, z_q)
    torch.testing.assert_close(grads["commit"][0], 2 * (z - z_q) / z.numel())


def test_perceptual_term():
    """The mean over images of a distance between reconstruction and target, both in [-1,1]."""
    frames = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    seen = []

    def distance(recon, target):
        seen.append((recon, target))
        return torch.tensor([1.0, 3.0])

    losses, _ = make_agent().tokenizer.loss(frames, distance)
    recon, target = seen[0]
    assert losses["perceptual"] == 2
    assert torch.equal(target, 2 * frames - 1)
    assert losses["image"] == (recon - target).abs().mean()
    square = (recon - target).square().flatten(1) / 4
    torch.testing.assert_close(m.pixel_distance(recon, target), square.mean(1) + 0.01 * square.max(1)[0])


def test_each_part_trains_itself_only():
    """All of its own parameters, and exactly none of the others."""
    agent = make_agent(torch.float32)
    replay = prepared_replay(agent)
    optimizers = m.Optimizers(agent, agent.args)
    updates = dict(tokenizer=m.train_tokenizer, world=m.train_world_model, behaviour=m.train_behaviour)
    for part, update in updates.items():
        before = {name: p.clone() for name, p in agent.named_parameters()}
        metrics = update(agent, optimizers, replay, 16)
        moved = {name for name, p in agent.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if name.startswith(part)}
        assert all(p.grad is None for p in agent.parameters())
        assert metrics[f"grad/{part}_norm"] > 0


def test_gradients_are_averaged_then_clipped():
    """Each part by itself; the logged norm is the one before clipping. Only the Transformer's matrices decay."""
    agent = make_agent()
    optimizers = m.Optimizers(agent, agent.args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "average_ranks", lambda grads: [grad.mul_(1000) for grad in grads])
        for part, optimizer in optimizers.parts.items():
            params = list(getattr(agent, part).parameters())
            metrics = optimizers.step(part, {"loss": sum(p.sum() for p in params)})
            moment = torch.stack([optimizer.state[p]["exp_avg"].norm() for p in params]).norm()
            assert metrics[f"grad/{part}_norm"].item() == pytest.approx(1000 * count(getattr(agent, part)) ** 0.5)
            assert moment.item() == pytest.approx(0.1 * agent.args.grad_clip)
    decays = {part: [g["weight_decay"] for g in optim.param_groups] for part, optim in optimizers.parts.items()}
    assert decays == dict(tokenizer=[0], world=[0.01, 0], behaviour=[0])


def test_world_losses_by_definition():
    """Each label with the output that predicts it, one by one."""
    torch.manual_seed(1)
    agent = make_agent()
    batch = random_batch(agent, 4, 2)
    losses, metrics = agent.world.loss(batch, 0.0)
    tokens, action = batch["tokens"].transpose(0, 1), batch["action"].argmax(-1).T
    x = torch.cat([agent.world.token(tokens), agent.world.action(action)[:, :, None]], 2).flatten(1, 2)
    y = agent.world(x)
    found = dict(token=[], reward=[], end=[], changed=[], nonzero=[], over=[])
    for b in range(2):
        for t in range(4):
            for k in range(4):
                place = 5 * t + k - 1 if k else 5 * t - 1  # token k - 1 of its frame, or the action before it
                if place >= 0:
                    logits = agent.world.token_head(y[b, place])
                    found["token"].append(F.cross_entropy(logits, tokens[b, t, k]))
                    if t and tokens[b, t, k] != tokens[b, t - 1, k]:
                        found["changed"].append(found["token"][-1])
            at_action = y[b, 5 * t + 4]
            label = torch.sign(batch["reward"][t, b]).long() + 1
            found["reward"].append(F.cross_entropy(agent.world.reward_head(at_action), label))
            end = batch["end"][t, b].long()
            found["end"].append(F.cross_entropy(agent.world.end_head(at_action), end))
            if end:
                found["over"].append(found["end"][-1])
    mean = {name: torch.stack(values).mean() for name, values in found.items() if values}
    for name in ("token", "reward", "end"):
        torch.testing.assert_close(losses[name], mean[name])
    torch.testing.assert_close(metrics["wm/token_loss_changed"], mean["changed"].detach())
    torch.testing.assert_close(metrics["wm/end_loss_end"], mean["over"].detach())


def test_padding_counts_for_nothing():
    """What is padded may be anything; K T - 1 tokens of a whole sequence are predicted."""
    agent = make_agent()
    batch = random_batch(agent, 4, 2)
    batch["mask"] = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 0]]).bool()
    first, _ = agent.world.loss(batch, 0.0)
    labels = agent.world.labels(batch["tokens"].transpose(0, 1), *(batch[k].T for k in ("reward", "end", "mask")))
    assert [(label != -100).sum(1).tolist() for label in labels] == [[15, 7], [4, 2], [4, 2]]
    batch["tokens"][2:, 1] = 3
    batch["reward"][2:, 1] = 7.0
    batch["end"][2:, 1] = True
    batch["action"][2:, 1] = torch.tensor([0, 0, 1])
    second, _ = agent.world.loss(batch, 0.0)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_losses_of_the_joint_batch():
    """Two ranks whose sequences are not equally long: the mean of their losses is that of the joint batch."""
    torch.manual_seed(2)
    logits = torch.randn(4, 5, 3)
    labels = torch.randint(3, (4, 5))
    labels[0, 1:] = labels[3, 2:] = -100
    joint = m.cross_entropy(logits, labels)
    counts = torch.stack([(part != -100).sum() for part in labels.split(2)]).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "gather_ranks", lambda count: counts)
        parts = [m.cross_entropy(*pair) for pair in zip(logits.split(2), labels.split(2))]
    torch.testing.assert_close(sum(parts) / 2, joint)
    assert counts[0] != counts[1]


def test_lambda_return_by_definition():
    """The mean of n-step returns by weight (1-lam) lam^(n-1), with and without an end, which cuts what follows."""
    torch.manual_seed(0)
    H, gamma, lam = 6, 0.9, 0.7
    reward = torch.randn(H - 1, 3).double()
    value = torch.randn(H, 3).double()
    end = torch.zeros(H - 1, 3).bool()
    end[2, 1] = end[4, 2] = True
    live = gamma * (1 - end.double())

    def n_step(t, n):
        total = torch.zeros(3).double()
        weight = torch.ones(3).double()
        for i in range(t, t + n):
            total = total + weight * reward[i]
            weight = weight * live[i]
        return total + weight * value[t + n]

    def mixed(t):
        most = H - 1 - t
        short = sum((1 - lam) * lam ** (n - 1) * n_step(t, n) for n in range(1, most))
        return short + lam ** (most - 1) * n_step(t, most)

    ours = m.lambda_return(reward, value, end, gamma, lam)
    torch.testing.assert_close(ours, torch.stack([mixed(t) for t in range(H - 1)]))
    reward[3:] = 9.0
    cut = m.lambda_return(reward, value, end, gamma, lam)
    assert torch.equal(cut[:3, 1], ours[:3, 1])
    assert not torch.equal(cut[:3, 0], ours[:3, 0])


def behaviour_losses(agent, logits, value, **dream):
    """Of a dream on whose frames the policy says this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent.behaviour, "forward", lambda frames, state: (logits, value, state))
        return agent.behaviour.loss(dict(dream, frames=None, hidden=None, cell=None))[0]


def test_behaviour_losses():
    """The last frame has no own term, but bootstraps; actor and critic do not train each other."""
    torch.manual_seed(0)
    agent = make_agent()
    logits = torch.randn(4, 2, A, dtype=torch.float64, requires_grad=True)
    value = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    dream = dict(action=torch.randint(A, (4, 2)), reward=torch.ones(3, 2), end=torch.zeros(3, 2).bool())
    losses = behaviour_losses(agent, logits, value, **dream)
    policy = torch.autograd.grad(losses["policy"], (logits, value), retain_graph=True, allow_unused=True)
    assert policy[1] is None
    assert policy[0][:3].any() and not policy[0][3].any()
    critic = torch.autograd.grad(losses["value"], (logits, value), retain_graph=True, allow_unused=True)
    assert critic[0] is None
    ret = m.lambda_return(dream["reward"], value.detach(), dream["end"], agent.args.gamma, agent.args.lam)
    torch.testing.assert_close(critic[1][:3], 2 * (value[:3] - ret) / 6)
    assert not critic[1][3].any()
    advantage = ret - value[:3]
    log_prob = torch.distributions.Categorical(logits=logits[:3]).log_prob(dream["action"][:3])
    torch.testing.assert_close(losses["policy"], -(log_prob * advantage).mean())
    entropy = torch.distributions.Categorical(logits=logits[:3]).entropy().mean()
    torch.testing.assert_close(losses["entropy"], -agent.args.ent_coef * entropy)


# ---- LPIPS ----


def lpips_weights():
    torch.manual_seed(0)
    widths = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    vgg = {}
    for i, inputs, outputs in zip(m.VGG16, widths, widths[1:]):
        vgg[f"features.{i}.weight"] = torch.randn(outputs, inputs, 3, 3) / (3 * inputs**0.5)
        vgg[f"features.{i}.bias"] = torch.zeros(outputs)
    heads = {f"lin{k}.model.1.weight": torch.rand(1, n, 1, 1) for k, n in enumerate((64, 128, 256, 512, 512))}
    return vgg, heads


def test_lpips(tmp_path, monkeypatch, capsys):
    """Weights are found in a folder, or where torch and the official code keep them; dropout in training only."""
    vgg, heads = lpips_weights()
    hub = tmp_path / "hub" / "checkpoints"
    cache = tmp_path / "home" / ".cache" / "iris" / "tokenizer_pretrained_vgg"
    one = tmp_path / "one"
    for folder in (hub, cache, one):
        folder.mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub.parent))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    args = m.Args(perceptual_loss="auto")
    assert m.choose_perceptual_loss(args, 3) is m.pixel_distance
    assert "vgg16-397923af.pth" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        m.choose_perceptual_loss(m.Args(perceptual_loss="lpips"), 3)
    assert m.choose_perceptual_loss(m.Args(perceptual_loss="none"), 3) is None

    torch.save(vgg, hub / "vgg16-397923af.pth")
    assert m.load_lpips("")[0] is None
    torch.save(heads, cache / "vgg.pth")
    torch.save(vgg, one / "vgg16-397923af.pth")
    torch.save(heads, one / "vgg.pth")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    y = torch.rand(2, 3, 32, 32) * 2 - 1
    found = m.choose_perceptual_loss(args, 3).eval()
    given = m.choose_perceptual_loss(m.Args(lpips_weights=str(one)), 3).eval()
    assert torch.equal(found(x, y), given(x, y))
    assert found(x, x).abs().max() == 0
    assert not list(found.parameters()) and not found.state_dict()
    found.train()
    assert not torch.equal(found(x, y), found(x, y))
    assert m.choose_perceptual_loss(args, 1) is m.pixel_distance


# ---- Transformer and dreams ----


def test_causality():
    """A changed token j leaves outputs before j alone and changes all others."""
    agent = make_agent()
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    y = agent.world(x)
    for j in (0, 4, 11, 19):
        other = x.clone()
        other[0, j] += torch.randn(8)
        changed = (agent.world(other) != y).any(-1)[0]
        assert not changed[:j].any()
        assert changed[j:].all()


@torch.no_grad()
def test_cache_equals_full_attention():
    """The official 340 positions, in float64, in any pieces."""
    torch.manual_seed(0)
    world = m.WorldModel(16, A, m.Args(layers=2, width=8, heads=2, vocab_size=5)).double()
    x = torch.randn(2, 340, 8).double()
    full = world(x)
    for chunks in ([16] + 324 * [1], [17] + 161 * [2] + [1], [340], [3, 200, 137]):
        cache = world.empty_cache(2)
        start = 0
        for n in chunks:
            piece = world(x[:, start : start + n], start, cache)
            torch.testing.assert_close(piece, full[:, start : start + n], rtol=0, atol=1e-12)
            start += n
        assert start == 340


def imagine(agent, tokens, mask):
    """Dreams that begin after these real tokens (T,B,K)."""
    with torch.no_grad():
        recon = torch.stack([agent.tokenizer.decode(step) for step in tokens])
    return agent.behaviour.imagine(agent.tokenizer, agent.world, tokens[-1], recon, mask)


def literal_dream(agent, tokens, mask):
    """By the book: one token per pass, no cache, everything so far read again; draws come in the same order."""
    world, behaviour, decode = agent.world, agent.behaviour, agent.tokenizer.decode
    state = behaviour.initial(tokens.shape[1])
    for image, valid in zip(tokens[:-1], mask[:-1]):
        _, _, (hidden, cell) = behaviour(decode(image)[None], state)
        state = (hidden * valid[:, None], cell * valid[:, None])
    current = tokens[-1]
    sequence = world.token(current)
    out = dict(frames=[], action=[], reward=[], end=[])
    for t in range(agent.args.imag_horizon):
        out["frames"].append(decode(current))
        logits, _, state = behaviour(out["frames"][-1][None], state)
        action = m.sample(logits[0])
        out["action"].append(action)
        if t == agent.args.imag_horizon - 1:
            break
        if sequence.shape[1] + world.num_tokens + 1 > world.positions:
            sequence = world.token(current)
        sequence = torch.cat([sequence, world.action(action)[:, None]], 1)
        y = world(sequence)[:, -1]
        out["reward"].append(m.sample(world.reward_head(y)) - 1)
        out["end"].append(m.sample(world.end_head(y)))
        drawn = []
        for _ in range(world.num_tokens):
            drawn.append(m.sample(world.token_head(world(sequence)[:, -1])))
            sequence = torch.cat([sequence, world.token(drawn[-1])[:, None]], 1)
        current = torch.stack(drawn, 1)
    return {name: torch.stack(values) for name, values in out.items()}


@torch.no_grad()
def test_dream_equals_the_literal_one():
    """In float64, from the same noise; also where the horizon is longer than the context of four frames."""
    mask = torch.tensor([[1, 0, 0, 0, 1], [1, 1, 0, 0, 1], [1, 1, 1, 0, 1], [1, 1, 1, 1, 1]]).bool()
    for horizon in (2, 4, 7):
        agent = make_agent(imag_horizon=horizon)
        tokens = random_tokens(agent, 4, 5)
        torch.manual_seed(3)
        ours = imagine(agent, tokens, mask)
        torch.manual_seed(3)
        literal = literal_dream(agent, tokens, mask)
        for name in ("action", "reward", "end"):
            assert torch.equal(ours[name], literal[name]), name
        torch.testing.assert_close(ours["frames"], literal["frames"])
        assert ours["frames"].shape == (horizon, 5, 3, 32, 32)
        assert ours["reward"].shape == (horizon - 1, 5)
    assert len(ours["reward"].unique()) > 1
    assert ours["end"].any()


def test_number_of_passes():
    """17 queries and 15 of one token, then 2 and 15: 16 passes per step; 20 frames of 17 fit into 340 positions."""
    world = m.WorldModel(16, A, m.Args(layers=1, width=8, heads=2, vocab_size=5))
    dream = m.Dream(world, torch.zeros(2, 16).long())
    passes = []

    def forward(x):
        passes.append(x.shape[1])
        dream.size += x.shape[1]
        return x[:, -1]

    dream.forward = forward
    for _ in range(20):
        dream.step(torch.zeros(2).long())
    assert passes == [17] + 15 * [1] + 18 * ([2] + 15 * [1]) + [17] + 15 * [1], "the last step is cut down to one frame"


def test_dropout_in_training_only():
    """Dreams never drop anything, though the agent is in train mode; the world model's loss does."""
    agent = make_agent(dropout=0.5).train()
    tokens = random_tokens(agent, 4, 3)
    mask = torch.ones(4, 3).bool()
    dreams = []
    for _ in range(2):
        torch.manual_seed(0)
        dreams.append(imagine(agent, tokens, mask))
    assert all(torch.equal(dreams[0][name], dreams[1][name]) for name in dreams[0])
    batch = random_batch(agent, 4, 3)
    losses = [agent.world.loss(batch, 0.5)[0]["token"] for _ in range(2)]
    assert losses[0] != losses[1]


def test_burn_in():
    """Padding leaves the state at zero, a padded sample is as one that begins later, and no gradient gets there;
    the last real frame, where the dream begins, is not part of it."""
    agent = make_agent()
    tokens = random_tokens(agent, 4, 3)
    mask = torch.tensor([[0, 0, 1], [0, 0, 1], [0, 1, 1], [1, 1, 1]]).bool()
    dream = imagine(agent, tokens, mask)
    assert not any(value.requires_grad for value in dream.values())
    for column, first in (0, 3), (1, 2), (2, 0):
        state = agent.behaviour.initial(1)
        if first < 3:
            frames = agent.tokenizer.decode(tokens[first:3, column])[:, None]
            _, _, state = agent.behaviour(frames, state)
        torch.testing.assert_close(dream["hidden"][column], state[0][0])
        torch.testing.assert_close(dream["cell"][column], state[1][0])


# ---- replay ----


def test_sequences_by_brute_force():
    """Against the rows: none crosses a border; reward and end are those of the next row; padding is zero."""
    replay = random_replay()
    data = replay.data
    where = {data["image"][r, e].numpy().tobytes(): (r, e) for r in range(60) for e in range(2)}
    for last in (False, True):
        batch = replay.sample(200, 5, "image reward end action", last)
        mask = batch["mask"]
        assert mask[-1 if last else 0].all(), "the drawn step is a frame"
        for name, value in batch.items():
            assert not value[~mask].any(), name
        for b in range(200):
            rows = [where[batch["image"][t, b].numpy().tobytes()] for t in range(5) if mask[t, b]]
            row, env = rows[0]
            n = len(rows)
            assert rows == [(row + i, env) for i in range(n)]
            assert torch.equal(batch["reward"][mask[:, b], b], data["reward"][row + 1 : row + n + 1, env])
            assert torch.equal(batch["end"][mask[:, b], b], data["is_last"][row + 1 : row + n + 1, env])
            assert torch.equal(batch["action"][mask[:, b], b], data["action"][row : row + n, env])
            assert not data["is_last"][row : row + n, env].any(), "what arrives with an end is no frame"
            assert n == 5 or last or data["is_last"][row + n, env] or row + n == 59, "padded at the end only"
            assert n == 5 or not last or data["is_first"][row, env], "padded at the beginning only"


def test_uniform_over_episodes():
    """Of episodes with 1 and 99 steps each gives half of the sequences; every step of the long one is drawn."""
    torch.manual_seed(0)
    replay = make_replay(200, 1, (1,))
    for t in range(102):
        add(replay, [[t]], is_first=[t in (0, 2)], is_last=[t == 1])
    assert replay.make_table().tolist() == [[0, 1, 0], [2, 101, 0]]
    for last in (False, True):
        image = replay.sample(20_000, 4, "image", last)["image"][-1 if last else 0, :, 0]
        assert abs((image == 0).float().mean() - 0.5) < 0.015
        assert Counter(image.tolist()).keys() == {0, *range(2, 101)}
        assert image[image > 0].double().mean() == pytest.approx(51, abs=1)


def test_ring_cuts_episodes():
    """Overwritten rows leave their episode, which goes on with the others; one that a resume cut off has ended."""
    replay = make_replay(10, 1, (1,))
    for t in range(25):
        add(replay, [[t]], is_first=[t in (0, 18)], is_last=[False])
    assert replay.make_table().tolist() == [[15, 17, 0], [18, 24, 0]]
    recent = replay.recent(10)
    assert recent["image"][recent["mask"]].flatten().tolist() == [*range(18, 25)]
    add(replay, [[25]], is_first=[False], is_last=[True])
    assert not replay.recent(4)["mask"].any(), "none is running"
    copy = m.Replay(m.replay_specs({"image": (1,)}, A), 10, 1, Path(replay.folder.name), CPU, new=False)
    copy.load_state_dict(replay.state_dict(), lost=0)
    assert copy.make_table().tolist() == replay.make_table().tolist() == [[16, 17, 0], [18, 25, 0]]


@torch.no_grad()
def test_tokens_in_replay():
    """Those of every frame, as acting makes them, also in bf16; a new tokenizer makes others."""
    for precision in ("fp32", "bf16"):
        agent = make_agent(torch.float32, precision=precision)
        replay = random_replay()
        replay.tokenize(agent, chunk=7)
        replay.reconstruct(agent, chunk=7)
        batch = replay.sample(50, 3, "image tokens recon")
        mask = batch["mask"]
        fresh = agent.encode(batch["image"][mask])
        assert (fresh == batch["tokens"][mask]).float().mean() > 0.99, "but for rounding in other batches"
        torch.testing.assert_close(agent.decode(batch["tokens"][mask]), batch["recon"][mask], atol=0.02, rtol=0)
        before = replay.tokens
        agent.tokenizer.encoder.conv_out.bias.add_(torch.randn(6))
        replay.tokenize(agent)
        assert not torch.equal(before, replay.tokens)


# ---- acting ----


def random_row(num_envs=2, first=True):
    image = np.random.default_rng(0).integers(0, 256, (num_envs, *IMAGE), np.uint8)
    return dict(image=image, is_first=np.full(num_envs, first))


def test_memory_of_the_policy():
    """It is kept between the steps of an episode, `warm_up` makes the same again, and is_first makes it zero."""
    agent = make_agent(torch.float32, burn_in=5)
    replay = make_replay(20, 2)
    rng = np.random.default_rng(0)
    state = agent.initial(2)
    for t in range(4):
        row = dict(image=rng.integers(0, 256, (2, *IMAGE), np.uint8), is_first=np.array([t == 0, t in (0, 2)]))
        state = agent.act(row, state)
        add(replay, **row, is_last=[False, t == 1])
    warm = agent.warm_up(replay)
    for name in ("hidden", "cell"):
        torch.testing.assert_close(warm[name], state[name])
    fresh = agent.act(random_row(), agent.initial(2))
    again = agent.act(random_row(), state)
    later = agent.act(random_row(first=False), state)
    torch.testing.assert_close(again["hidden"], fresh["hidden"])
    assert not torch.allclose(later["hidden"], fresh["hidden"])


def test_temperature_and_exploration():
    """Collecting and evaluating divide by temperatures of their own; random actions in collecting only."""

    def drawn(training, **flags):
        agent = make_agent(torch.float32, **flags).train(training)
        actions = [agent.act(random_row(), agent.initial(2))["action"] for _ in range(30)]
        assert all((action.sum(-1) == 1).all() for action in actions)
        return len({tuple(action.flatten().tolist()) for action in actions})

    cold = dict(temperature=1e-5, eval_temperature=1e5, epsilon=0.0)
    assert drawn(True, **cold) == 1
    assert drawn(False, **cold) > 5
    assert drawn(True, **dict(cold, epsilon=1.0)) > 5
    assert drawn(False, **dict(cold, eval_temperature=1e-5, epsilon=1.0)) == 1


# ---- the run ----

TINY_RUN = dict(
    env_id="IrisScripted-v0", device="cpu", image_size=16, epoch_steps=7, epoch_updates=3, extra_epochs=1,
    learning_starts=0, world_starts=7, behaviour_starts=7, total_timesteps=21, tokenizer_batch=2, batch_size=2,
    eval_episodes=0, video_every=0, save_every=1, log_every=1, compile="off", action_repeat=1)


def run(folder, **changes):
    """main() in this process -> (run directory, what it printed). The next run makes other handlers of signals."""
    args = m.Args(**{**SMALL, **TINY_RUN, "run_dir": str(folder), **changes})
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            m.main(args)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return (Path(changes["resume"]) if "resume" in changes else next(Path(folder).iterdir())), out.getvalue()


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def watch_updates(patch, then=lambda calls: None):
    """List of (part, policy steps in replay) of every update of a run."""
    calls = []

    def watched(part, update):
        def call(agent, optimizers, replay, batch_size):
            table = replay.make_table()
            calls.append((part, int((table[:, 1] - table[:, 0]).sum())))
            then(calls)
            return update(agent, optimizers, replay, batch_size)
        return call

    for part, name in dict(tokenizer="tokenizer", world="world_model", behaviour="behaviour").items():
        patch.setattr(m, f"train_{name}", watched(part, getattr(m, f"train_{name}")))
    return calls


def test_schedule(tmp_path, monkeypatch):
    """The official one divided by 100: the tokenizer's first update in epoch 6, and so on; the last epochs only
    train. Every frame counts in the epoch in which it was seen."""
    calls = watch_updates(monkeypatch)
    folder, out = run(
        tmp_path, epoch_steps=2, extra_epochs=2, learning_starts=10, world_starts=14, behaviour_starts=18,
        total_timesteps=23)
    expected = []
    for epoch in range(1, 15):
        steps = min(2 * epoch, 23)
        for part, start in ("tokenizer", 10), ("world", 14), ("behaviour", 18):
            if steps > start:
                expected += 3 * [(part, steps)]
    assert calls == expected
    saved = checkpoint(folder)
    assert (saved["step"], saved["epoch"], saved["updates"]) == (23, 14, len(calls))
    assert "4.5 updates per policy step" in out


def test_updates_per_step_of_several_environments(tmp_path, monkeypatch):
    """Epochs end at multiples of epoch_steps, also where they are no multiple of the environments."""
    calls = watch_updates(monkeypatch)
    _, out = run(
        tmp_path, num_envs=3, epoch_steps=4, epoch_updates=4, extra_epochs=0, total_timesteps=48, behaviour_starts=0,
        world_starts=0)
    assert "3 updates per policy step" in out
    assert len(calls) == 3 * 48


def test_frames_are_encoded_once_per_epoch(tmp_path, monkeypatch):
    """When the tokenizer is done, and decoded when the policy learns; also in epochs that only train."""
    calls = watch_updates(monkeypatch)
    for name in ("tokenize", "reconstruct"):
        original = getattr(m.Replay, name)
        monkeypatch.setattr(
            m.Replay, name, lambda *args, name=name, original=original: (calls.append((name, 0)), original(*args)))
    run(tmp_path, epoch_updates=1, total_timesteps=14, world_starts=0, behaviour_starts=0)
    assert [part for part, _ in calls] == 3 * ["tokenizer", "tokenize", "world", "reconstruct", "behaviour"]


def test_rows_of_a_scripted_game(tmp_path):
    """Observation t, the action on it, then reward and end that followed; nothing is decided after an end."""
    folder, _ = run(tmp_path, total_timesteps=24)
    saved = checkpoint(folder)
    replay = m.Replay(
        m.replay_specs({"image": (16, 16, 3)}, A), saved["capacity"], 1, folder / "replay0", CPU, new=False)
    replay.load_state_dict(saved["replay"], lost=0)
    assert replay.make_table().tolist() == [[0, 7, 0], [8, 15, 0], [16, 23, 0], [24, 27, 0]]
    batch = replay.sample(300, 7, "image action reward end")
    mask = batch["mask"]
    step, code = batch["image"][..., 0, 0, 0].long(), batch["image"][..., 0, 0, 1].long()
    assert torch.equal(batch["reward"][mask].long(), step[mask] + 1)
    assert torch.equal(batch["end"][mask], step[mask] == 6)
    going = mask[1:] & mask[:-1]
    assert torch.equal(code[1:][going], batch["action"].argmax(-1)[:-1][going] + 1)


@pytest.mark.parametrize("number", [1, 8, 14])
def test_stopped_within_an_epoch(number, tmp_path):
    """A signal during an update of any part, then --resume: the same weights as without it."""
    with pytest.MonkeyPatch.context() as patch:
        whole_calls = watch_updates(patch)
        whole, _ = run(tmp_path / "whole")

    def stop(calls):
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        calls = watch_updates(patch, stop)
        parts, _ = run(tmp_path / "parts")
    assert checkpoint(parts)["updates"] == len(calls) == number
    with pytest.MonkeyPatch.context() as patch:
        calls += watch_updates(patch)
        rest = watch_updates(patch)
        run(tmp_path, resume=str(parts))
    assert calls + rest == whole_calls
    one, two = checkpoint(whole), checkpoint(parts)
    assert all(torch.equal(one["agent"][name], two["agent"][name]) for name in one["agent"])
    assert (one["step"], one["epoch"], one["updates"]) == (two["step"], two["epoch"], two["updates"])


def test_finished_run_collects_more(tmp_path):
    """Resumed there is nothing to do; with a larger budget come another epoch and the last ones again."""
    folder, _ = run(tmp_path, total_timesteps=14)
    saved = checkpoint(folder)
    run(tmp_path, total_timesteps=14, resume=str(folder))
    assert checkpoint(folder)["updates"] == saved["updates"]
    run(tmp_path, total_timesteps=21, resume=str(folder))
    assert checkpoint(folder)["step"] == 21
    assert checkpoint(folder)["updates"] == saved["updates"] + 2 * 3 * 3


def test_lives():
    """In Breakout a lost life ends an episode of replay, but not the game; evaluations play whole games."""
    args = m.Args(env_id="ALE/Breakout-v5", action_repeat=4)
    assert not isinstance(m.make_envs(args, 1, 1), m.LifeEnvs)
    game = m.make_envs(args, 1, 0, 0, 0)
    rows = [game.reset()]
    length = lost = over = 0
    while not over:
        before = rows[-1]
        length += 1
        rows.append(game.step(np.eye(4)[[length % 4]]))
        assert rows[-1]["is_first"] == before["is_last"], "the next row begins an episode"
        assert game.length == length, "the game's length goes on"
        lost += int(rows[-1]["is_last"][0])
        over = game.last[0]
    assert lost == 5
    assert game.ret == sum(float(row["reward"][0]) for row in rows)
    game.step(np.eye(4)[[0]])
    assert game.length == game.ret == 0


def test_continuous_actions_are_refused():
    with pytest.raises(SystemExit):
        m.make_envs(m.Args(env_id="envs:Track-v0", action_repeat=1), 1, 0, 0, 0)


# ---- breakages that test_mutations.py makes, and the tests that notice them ----


def patch_lambda_return(patch, module):
    original = module.lambda_return

    def flipped(reward, value, end, gamma, lam):
        return original(reward.flip(0), value.flip(0), end.flip(0), gamma, lam).flip(0)

    patch.setattr(module, "lambda_return", flipped)


def patch_straight_through(patch, module):
    """The reconstruction trains the codebook and not the encoder."""
    original = module.Tokenizer.reconstruct

    def reconstruct(tokenizer, z_q):
        return original(tokenizer, tokenizer.lookup(tokenizer.quantize(z_q)))

    patch.setattr(module.Tokenizer, "reconstruct", reconstruct)


def patch_labels(patch, module):
    """Rewards of the step before."""
    original = module.WorldModel.labels
    patch.setattr(
        module.WorldModel, "labels",
        lambda world, tokens, reward, end, mask: original(world, tokens, reward.roll(1, 1), end, mask))


def patch_memory(patch, module):
    """A full context begins again with an empty memory one step too early."""
    original = module.Dream.step

    def step(dream, action):
        if dream.size + 2 * dream.world.num_tokens > dream.world.positions:
            dream.size = 0
            dream.waiting = dream.tokens
        return original(dream, action)

    patch.setattr(module.Dream, "step", step)


def patch_positions(patch, module):
    """Positions are counted from the input."""
    original = module.WorldModel.forward

    def forward(world, x, start=0, cache=None, dropout=0.0):
        if start:
            x = x + world.position.weight[: x.shape[1]] - world.position.weight[start : start + x.shape[1]]
        return original(world, x, start, cache, dropout)

    patch.setattr(module.WorldModel, "forward", forward)


def patch_burn_in(patch, module):
    """Padding is burnt in like frames."""
    original = module.Behaviour.forward
    patch.setattr(
        module.Behaviour, "forward", lambda self, frames, state, mask=None: original(self, frames, state, None))


def patch_outcomes(patch, module):
    """Reward and end of the row itself, which arrived with its frame."""
    original = module.Replay.sequence

    def sequence(replay, start, first, stop, env, length, names):
        kept = replay.data
        replay.data = dict(kept, reward=kept["reward"].roll(1, 0), is_last=kept["is_last"].roll(1, 0))
        batch = original(replay, start, first, stop, env, length, names)
        replay.data = kept
        return batch

    patch.setattr(module.Replay, "sequence", sequence)


MUTATIONS = {
    "lambda-return runs forwards": (patch_lambda_return, test_lambda_return_by_definition),
    "no straight-through gradient": (patch_straight_through, test_stop_gradients_of_the_tokenizer),
    "reward of the step before": (patch_labels, test_world_losses_by_definition),
    "memory is cut down too early": (patch_memory, test_dream_equals_the_literal_one),
    "positions counted from the input": (patch_positions, test_cache_equals_full_attention),
    "padding is burnt in": (patch_burn_in, test_burn_in),
    "outcome arrives with the frame": (patch_outcomes, test_sequences_by_brute_force),
}
