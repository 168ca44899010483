"""iris.py: what its tokenizer, Transformer, dreams and losses must do, and when each is trained."""
import itertools
import os
import signal
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import envs
import gymnasium
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import load
from test_dispatch import check_no_host_reads
from test_resume import checkpoint, differences, only, execute, scripted

m = load("iris")
CPU = torch.device("cpu")
SHAPES = {"image": (32, 32, 3)}  # four tokens a frame
SMALL = dict(vocab_size=11, code_dim=6, channels=4, res_blocks=1, layers=2, heads=2, width=8, lstm_units=5,
             batch_length=4, imag_horizon=4, burn_in=3, precision="fp32")
gymnasium.register("Uneven-v0", lambda lengths=itertools.cycle([3, 5]): envs.Scripted(next(lengths), image=True))


def agent(dtype=torch.float64, **changes):
    """Small networks for 3 actions; the last layers are scaled up, so that predictions differ."""
    torch.manual_seed(0)
    agent = m.Agent(SHAPES, 3, True, m.Args(**{**SMALL, **changes})).to(dtype)
    with torch.no_grad():
        agent.tokenizer.codebook.weight.normal_()
        for name, p in agent.world.named_parameters():
            p.mul_(10 if p.dim() > 1 and "position" not in name else 1)
    return agent


def new_replay(image, rows, envs):
    """Its files go when it goes."""
    folder = tempfile.TemporaryDirectory()
    replay = m.SegmentReplay(m.replay_specs({"image": image}, None, None), rows, envs, CPU, Path(folder.name))
    replay.kept = folder
    return replay


def episodes(replay) -> list[list[int]]:
    """[first row, frames, environment] of each."""
    replay.refresh()
    return replay.table.tolist()


def filled_replay(envs=2, rows=60, ends=0.2, image=(32, 32, 3)):
    """Random rows; each action may end its episode, and the row after an end only resets."""
    rng = np.random.default_rng(0)
    replay = new_replay(image, rows, envs)
    last = np.zeros(envs, bool)
    for _ in range(rows):
        over = ~last & (rng.random(envs) < ends)
        picture = rng.integers(0, 256, (envs, *image), np.uint8)
        outcome = dict(reward=rng.integers(-2, 3, envs).astype(np.float32), is_last=over)
        replay.add(dict(image=picture, is_last=last), rng.integers(0, 3, envs), outcome)
        last = over
    return replay


def noise(world, batch, horizon, action_dim=3, dtype=torch.float64):
    steps = horizon - 1
    shapes = dict(action=(horizon, batch, action_dim), reward=(steps, batch, 3), end=(steps, batch, 2),
                  token=(steps, world.tokens, batch, world.args.vocab_size))
    return {k: torch.empty(shape, dtype=dtype).exponential_() for k, shape in shapes.items()}


def tokens_of(a, *shape):
    return torch.randint(a.args.vocab_size, (*shape, a.world.tokens))


# ---- networks ----


@pytest.mark.parametrize("actions, world, behaviour", [(6, 8_448_005, 3_218_983), (18, 8_451_077, 3_225_139)])
def test_parameter_counts(actions, world, behaviour):
    """Those of the official code."""
    full = m.Agent({"image": (64, 64, 3)}, actions, True, m.Args())
    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())
    t, w, b = full.tokenizer, full.world, full.behaviour
    assert [count(x) for x in (t.encoder, t.pre_quant, t.codebook, t.post_quant, t.decoder)] == [
        1_418_240, 262_656, 262_144, 262_656, 1_821_827]
    assert count(t) == 4_027_523 and count(w) == world and count(b) == behaviour
    assert [count(w.blocks, w.norm), count(w.position)] == [7_898_112, 87_040]
    assert [count(x) for x in (w.token_head, w.reward_head, w.end_head)] == [197_376, 66_563, 66_306]
    assert [count(b.convs), count(b.lstm), count(b.critic), count(b.actor)] == [65_568, 3_149_824, 513, 513 * actions]
    assert count(m.LPIPS()) == 14_716_160


def test_initial_weights():
    world = m.WorldModel(16, 6, m.Args(layers=2))
    for name, p in world.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            assert abs(p.std() / 0.02 - 1) < 0.1 and abs(p.mean()) < 0.003, name
    words = m.Tokenizer(3, m.Args(channels=2, res_blocks=1)).codebook.weight
    assert words.abs().max() <= 1 / 512 and words.std().item() == pytest.approx(1 / 512 / 3**0.5, rel=0.01)


def test_downsampling_pads_right_and_bottom():
    encoder = m.make_encoder(3, 2, 1, 4)
    i = next(i for i, layer in enumerate(encoder) if isinstance(layer, torch.nn.ZeroPad2d))
    down, conv = encoder[i : i + 2], encoder[i + 1]
    x = torch.zeros(1, 2, 4, 4)
    x[..., 0, 0] = 1
    with torch.no_grad():
        torch.testing.assert_close(down(x)[0, :, 0, 0], conv.weight[:, :, 0, 0].sum(1) + conv.bias)
        assert torch.equal(down(x)[0, :, 1, 1], conv.bias), "the corner reaches the first output only"


def test_sampler():
    """100,000 draws follow the softmax; temperature divides the logits."""
    torch.manual_seed(0)
    logits, count = torch.tensor([2.0, 0.0, -1.0, 1.0]), 100_000
    for temperature in (1.0, 0.5):
        index = m.sample((logits / temperature).expand(count, 4), torch.empty(count, 4).exponential_())
        expected = (logits / temperature).softmax(0) * count
        chi = ((torch.bincount(index, minlength=4) - expected).square() / expected).sum()
        assert chi < 16.3, "p > 0.001 with three degrees of freedom"


def test_nearest_code():
    z, words = torch.randn(50, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    assert torch.equal(m.nearest_code(z, words), torch.cdist(z, words).argmin(-1))
    assert m.nearest_code(z[:1], z[:1].expand(3, -1)).item() == 0, "of equals the lowest"


def test_nearest_code_under_autocast():
    """Words that lie close together are told apart: no bf16 here."""
    torch.manual_seed(0)
    z = torch.randn(50, 6)
    words = z[:1] + 0.01 * torch.randn(9, 6)
    plain = m.nearest_code(z, words)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(m.nearest_code(z, words), plain) and len(plain.unique()) > 3


def test_decoded_frames_are_clamped():
    """To [0,1], from the decoder's [-1,1] and beyond."""
    tokenizer = agent().tokenizer
    tokenizer.reconstruct = lambda words: torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])
    assert tokenizer.decode(tokens_of(agent(), 1)).tolist() == [0, 0, 0.5, 1, 1]


# ---- losses ----


def test_stop_gradients_of_the_tokenizer():
    """The codebook term moves words only, the commitment term the encoder only; the reconstruction passes straight
    through from the decoder's input to z and leaves the codebook alone."""
    a = agent()
    tokenizer, seen = a.tokenizer, []
    embed, reconstruct = tokenizer.embed, tokenizer.reconstruct
    tokenizer.embed = lambda x: seen.append(embed(x)) or seen[-1]
    tokenizer.reconstruct = lambda x: seen.append(x) or reconstruct(x)
    losses, _ = tokenizer.loss(torch.rand(3, 3, 32, 32, dtype=torch.float64))
    z, through = seen
    words = tokenizer.codebook.weight
    def grads(name):
        return torch.autograd.grad(losses[name], (z, words, through), retain_graph=True, allow_unused=True)
    for name, reached in ("codebook", (False, True)), ("commit", (True, False)), ("image", (True, False)):
        assert tuple(g is not None and bool(g.any()) for g in grads(name)[:2]) == reached, name
    assert torch.equal(grads("image")[0], grads("image")[2])
    z_q = tokenizer.words(m.nearest_code(z.flatten(2).mT, words))
    torch.testing.assert_close(through, z_q)
    torch.testing.assert_close(grads("commit")[0], 2 * (z - z_q) / z.numel())


def test_perceptual_term():
    """The mean over images of a distance between reconstruction and target, both in [-1,1]."""
    frames, seen = torch.rand(2, 3, 32, 32, dtype=torch.float64), []
    losses, _ = agent().tokenizer.loss(frames, lambda *pair: seen.append(pair) or torch.tensor([1.0, 3.0]))
    (recon, target), = seen
    assert losses["perceptual"] == 2 and torch.equal(target, 2 * frames - 1)
    assert losses["image"] == (recon - target).abs().mean()


def test_each_part_trains_itself_only():
    """Which loss reaches which parameters; all of its own, and exactly none of the others."""
    a, replay = agent(torch.float32), filled_replay()
    replay.tokenize(a), replay.reconstruct(a)
    optimizers = m.Optimizers(a, a.args)
    for part in m.PARTS:
        before = {k: v.clone() for k, v in a.named_parameters()}
        metrics = m.train_step(part, a, optimizers, replay, 16, m.pixel_distance)
        moved = {k for k, v in a.named_parameters() if not torch.equal(v, before[k])}
        own = {f"{part}.{k}" for k, _ in getattr(a, part).named_parameters()}
        assert moved == own, moved ^ own
        assert all(p.grad is None for p in a.parameters()) and metrics[f"grad/{part}"] > 0
    assert not any(p.requires_grad for p in m.LPIPS().parameters())


def test_only_the_transformer_decays():
    """Of three Adams with the same rates."""
    groups = {k: v.param_groups for k, v in m.Optimizers(agent(), m.Args()).parts.items()}
    assert {k: [group["weight_decay"] for group in v] for k, v in groups.items()} == dict(
        tokenizer=[0], world=[0.01, 0], behaviour=[0])
    for group in sum(groups.values(), []):
        assert (group["lr"], group["betas"], group["eps"]) == (1e-4, (0.9, 0.999), 1e-8)


def test_gradients_are_averaged_then_clipped(monkeypatch):
    """Each part by itself; the norm is the one before clipping."""
    a = agent()
    optimizers = m.Optimizers(a, a.args)
    monkeypatch.setattr(m, "average_ranks", lambda grads: [grad.mul_(1000) for grad in grads])
    for part in m.PARTS:
        params = list(getattr(a, part).parameters())
        norm = optimizers.step(part, sum(p.sum() for p in params))
        moment = torch.stack([optimizers.parts[part].state[p]["exp_avg"].norm() for p in params]).norm()
        assert norm.item() == pytest.approx(1000 * sum(p.numel() for p in params) ** 0.5)
        assert moment.item() == pytest.approx((1 - 0.9) * a.args.grad_clip)


def test_where_the_losses_come_from():
    """Of two samples with one token that changes, one step with a reward and one end, the losses of just these."""
    a = agent()
    tokens, reward, end = torch.zeros(3, 2, a.world.tokens).long(), torch.zeros(3, 2), torch.zeros(3, 2).bool()
    tokens[1:, 0, 2], reward[1, 1], end[2, 1] = 5, -3.0, True
    batch = dict(tokens=tokens, action=torch.zeros(3, 2).long(), reward=reward, end=end)
    mask = torch.ones(3, 2).bool()
    _, found = a.world.loss(batch, mask, 0.0)
    token, rewards, ends = a.world.logits(tokens.transpose(0, 1), batch["action"].T)
    position = a.world.tokens + 2  # of the changed token in the sequence; the output before it is about it
    for name, logits in (("token_loss_changed", token[0, position - 1, 5] - token[0, position - 1].logsumexp(-1)),
                         ("reward_loss_nonzero", rewards[1, 1].log_softmax(-1)[0]),
                         ("end_loss_end", ends[1, 2].log_softmax(-1)[1])):
        torch.testing.assert_close(found[f"wm/{name}"], -logits.detach())


def test_labels_per_segment(monkeypatch):
    """K * T - 1 tokens of a whole segment are predicted; none in the padding."""
    a, counts = agent(), []
    mean = m.masked_mean
    monkeypatch.setattr(m, "masked_mean", lambda x, mask: counts.append(mask.sum(1).tolist()) or mean(x, mask))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool().T
    batch = dict(tokens=tokens_of(a, 4, 2), action=torch.randint(3, (4, 2)), reward=torch.randn(4, 2),
                 end=torch.zeros(4, 2).bool())
    losses, _ = a.world.loss(batch, mask, 0.0)
    assert counts[:3] == [[4 * 4 - 1, 4 * 2 - 1], [4, 2], [4, 2]]
    for k, v in batch.items():  # what is padded may be anything
        v[2:, 1] = {"tokens": 3, "action": 2, "reward": 7.0, "end": True}[k]
    other, _ = a.world.loss(batch, mask, 0.0)
    assert all(torch.equal(losses[k], other[k]) for k in losses)


def test_losses_of_the_joint_batch(monkeypatch):
    """Two ranks whose segments are not equally long: the mean of their losses is that of the joint batch."""
    a, size = agent(), 2
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]).bool().T
    batch = dict(tokens=tokens_of(a, 4, 4), action=torch.randint(3, (4, 4)), reward=torch.randn(4, 4),
                 end=torch.rand(4, 4) < 0.3)
    joint, _ = a.world.loss(batch, mask, 0.0)
    shards = [({k: v[:, i : i + size] for k, v in batch.items()}, mask[:, i : i + size]) for i in (0, size)]
    counts = []
    with monkeypatch.context() as patch:
        patch.setattr(m, "gather_ranks", lambda x: counts.append(x) or x)
        for shard in shards:
            a.world.loss(*shard, 0.0)
    both = iter(2 * [torch.cat(pair) for pair in zip(counts[: len(counts) // 2], counts[len(counts) // 2 :])])
    monkeypatch.setattr(m, "gather_ranks", lambda x: next(both))
    parts = [a.world.loss(*shard, 0.0)[0] for shard in shards]
    for k in joint:
        torch.testing.assert_close((parts[0][k] + parts[1][k]) / 2, joint[k])


def test_rewards_are_classes_of_their_sign():
    a = agent()
    batch = dict(tokens=tokens_of(a, 4, 2), action=torch.randint(3, (4, 2)), end=torch.zeros(4, 2).bool())
    mask = torch.ones(4, 2).bool()
    reward = torch.tensor([[-3.0, 0.0], [0.2, 5.0], [0.0, -0.1], [1.0, 0.0]])
    one, two = (a.world.loss(dict(batch, reward=r), mask, 0.0)[0] for r in (reward, reward.sign()))
    assert torch.equal(one["reward"], two["reward"])


def test_reward_of_nan_is_seen():
    """Though it has a class like any other."""
    a = agent()
    batch = dict(tokens=tokens_of(a, 4, 2), action=torch.zeros(4, 2).long(), end=torch.zeros(4, 2).bool())
    losses, _ = a.world.loss(dict(batch, reward=torch.full((4, 2), torch.nan)), torch.ones(4, 2).bool(), 0.0)
    assert losses["reward"].isnan() and losses["end"].isfinite()


def test_lambda_return_against_its_definition():
    """Mean of n-step returns by weight (1-lam) lam^(n-1), rows with and without an end; an end cuts what follows."""
    torch.manual_seed(0)
    H, gamma, lam = 6, 0.9, 0.7
    reward, value, end = torch.randn(H - 1, 3).double(), torch.randn(H, 3).double(), torch.zeros(H - 1, 3).bool()
    end[2, 1] = end[4, 2] = True
    live = gamma * (1 - end.double())
    def n_step(t, n):
        total, weight = torch.zeros(3).double(), torch.ones(3).double()
        for i in range(t, t + n):
            total, weight = total + weight * reward[i], weight * live[i]
        return total + weight * value[t + n]
    def ret(t):
        most = H - 1 - t
        mixed = sum((1 - lam) * lam ** (n - 1) * n_step(t, n) for n in range(1, most))
        return mixed + lam ** (most - 1) * n_step(t, most)
    ours = m.lambda_return(reward, value, end, gamma, lam)
    torch.testing.assert_close(ours, torch.stack([ret(t) for t in range(H - 1)]))
    cut = m.lambda_return(reward.index_fill(0, torch.tensor([3, 4]), 9.0), value, end, gamma, lam)
    assert torch.equal(cut[:3, 1], ours[:3, 1]) and not torch.equal(cut[:3, 0], ours[:3, 0])


def behaviour_losses(a, logits, value, **dream):
    """What `Behaviour.loss` makes of a dream on whose frames the policy says this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(a.behaviour, "forward", lambda frames, state: (logits, value, state))
        return a.behaviour.loss(dict(dream, frames=None, hidden=None, cell=None))[0]


def test_behaviour_losses():
    """The last frame has no own term, but bootstraps; the baseline gets no gradient from the actor."""
    a = agent()
    logits = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    value = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    dream = dict(action=torch.randint(3, (4, 2)), reward=torch.ones(3, 2), end=torch.zeros(3, 2).bool())
    losses = behaviour_losses(a, logits, value, **dream)
    policy = torch.autograd.grad(losses["policy"], (logits, value), retain_graph=True, allow_unused=True)
    assert policy[1] is None and policy[0][:3].any() and not policy[0][3].any()
    critic, = torch.autograd.grad(losses["value"], value, retain_graph=True)
    assert critic[:3].all() and not critic[3].any(), "targets are constants"
    moved = torch.cat([value[:3], value[3:] + 1]).detach()
    assert behaviour_losses(a, logits, moved, **dream)["policy"] != losses["policy"]


def test_perceptual_losses(tmp_path):
    """LPIPS is zero for equal images; its dropout is on if asked for; weights load under all known names."""
    torch.manual_seed(0)
    source, x, y = m.LPIPS(), torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    assert source(x, x).abs().max() == 0 and torch.equal(source(x, y), source(x, y))
    source.dropout = 0.5
    assert not torch.equal(source(x, y), source(x, y))
    source.dropout = 0.0
    vgg = {f"features.{i}.{k}": v for i, layer in source.convs.items() for k, v in layer.state_dict().items()}
    heads = {f"lin{i}.model.1.weight": layer.weight.data for i, layer in enumerate(source.heads)}
    (tmp_path / "two").mkdir()
    torch.save(vgg, tmp_path / "two" / "vgg16-397923af.pth")
    torch.save(heads, tmp_path / "two" / "vgg.pth")
    official = {f"tokenizer.lpips.net.slice{1 + sum(int(i) > n for n in (3, 8, 15, 22))}.{i}.{k}": v
                for i, layer in source.convs.items() for k, v in layer.state_dict().items()}
    official |= {f"tokenizer.lpips.{k}": v for k, v in heads.items()}
    torch.save(official, tmp_path / "last.pt")
    for path in (tmp_path / "two", tmp_path / "last.pt"):
        copy = m.LPIPS()
        assert copy.load(str(path)) == "" and torch.equal(copy(x, y), source(x, y))
    assert "LPIPS heads not found" in m.LPIPS().load(str(tmp_path / "two" / "vgg16-397923af.pth"))
    assert "26 of 26" in m.LPIPS().load(str(tmp_path / "absent"))
    square = (x - y).square().flatten(1) / 4
    torch.testing.assert_close(m.pixel_distance(x, y), square.mean(1) + 0.01 * square.max(1)[0])


def test_dropout_of_lpips_is_a_flag(monkeypatch):
    """On by default, as in the official code."""
    assert m.Args().lpips_dropout
    monkeypatch.setattr(m.LPIPS, "load", lambda self, path: "")
    for flag, dropout in (True, 0.5), (False, 0.0):
        args, loss = m.choose_perceptual(m.Args(lpips_dropout=flag), 3, CPU)
        assert (args.perceptual_loss, loss.dropout) == ("lpips", dropout)


def test_choice_of_the_perceptual_loss(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    args, loss = m.choose_perceptual(m.Args(), 3, CPU)
    assert (args.perceptual_loss, loss) == ("pixel", m.pixel_distance)
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert m.choose_perceptual(m.Args(perceptual_loss="none"), 3, CPU)[1] is None
    for flags in (dict(perceptual_loss="lpips"), dict(lpips_weights="nowhere.pth")):
        with pytest.raises(SystemExit):
            m.choose_perceptual(m.Args(**flags), 3, CPU)
        assert capsys.readouterr().err.count("\n") == 1


# ---- Transformer and dreams ----


def test_causality():
    """A changed token j leaves outputs before j alone and changes all others."""
    a = agent()
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    y = a.world(x)
    for j in (0, 4, 11, 19):
        other = x.clone()
        other[0, j] += torch.randn(8)
        changed = (a.world(other) != y).any(-1)[0]
        assert not changed[:j].any() and changed[j:].all()


def test_positions_that_predict():
    """Token k of frame t+1 is scored by the output at action t for k = 0, else at token k - 1 of its own frame."""
    a = agent()
    tokens, action = tokens_of(a, 1, 3), torch.zeros(1, 3).long()
    rows = torch.arange(15).view(1, 15, 1).double()
    a.world.forward = lambda x, dropout: rows
    a.world.token_head, a.world.reward_head, a.world.end_head = (torch.nn.Identity() for _ in range(3))
    pred, reward, end = a.world.logits(tokens, action)
    assert pred.flatten().tolist() == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 14]
    assert reward.flatten().tolist() == end.flatten().tolist() == [4, 9, 14]


@pytest.mark.parametrize("chunks", [[16] + 324 * [1], [17] + 161 * [2] + [1], [340], [3, 200, 137]])
def test_cache_equals_full_attention(chunks):
    """The official 340 positions, in float64, in any pieces."""
    torch.manual_seed(0)
    world = m.WorldModel(16, 3, m.Args(layers=2, width=8, heads=2, vocab_size=5, dropout=0.1)).double()
    x, cache, start, outs = torch.randn(2, 340, 8).double(), world.empty_cache(2), 0, []
    for n in chunks:
        outs.append(world(x[:, start : start + n], start, cache))
        start += n
    assert start == 340
    torch.testing.assert_close(torch.cat(outs, 1), world(x), rtol=0, atol=1e-12)


def imagine(a, tokens, mask, draws):
    """A batch of dreams that begin after these real tokens (T,B,K)."""
    with torch.no_grad():
        recon = torch.stack([a.tokenizer.decode(step) for step in tokens])
    return a.dream(dict(draws, recon=recon, mask=mask, tokens=tokens[-1]))


def literal_dream(a, tokens, mask, noise):
    """The same by the book: one token per pass, no cache, everything so far read again; a new policy step per frame."""
    state, frames, out = a.behaviour.initial(tokens.shape[1], CPU), [], dict(action=[], reward=[], end=[], tokens=[])
    for image, valid in zip(tokens[:-1], mask[:-1]):
        _, _, new = a.behaviour(a.tokenizer.decode(image)[None], state)
        state = tuple(torch.where(valid[:, None], n, torch.zeros_like(n)) for n in new)
    current = tokens[-1]
    sequence = a.world.token(current)
    for t in range(len(noise["action"])):
        frames.append(a.tokenizer.decode(current))
        logits, _, state = a.behaviour(frames[-1][None], state)
        action = m.sample(logits[0], noise["action"][t])
        out["action"].append(action)
        if t == len(noise["reward"]):
            break
        if sequence.shape[1] + a.world.tokens + 1 > a.world.positions:
            sequence = a.world.token(current)
        sequence = torch.cat([sequence, a.world.action(action)[:, None]], 1)
        y = a.world(sequence)[:, -1]
        out["reward"].append(m.sample(a.world.reward_head(y), noise["reward"][t]) - 1)
        out["end"].append(m.sample(a.world.end_head(y), noise["end"][t]))
        drawn = []
        for k in range(a.world.tokens):
            drawn.append(m.sample(a.world.token_head(a.world(sequence)[:, -1]), noise["token"][t, k]))
            sequence = torch.cat([sequence, a.world.token(drawn[-1])[:, None]], 1)
        current = torch.stack(drawn, 1)
    return dict({k: torch.stack(v) for k, v in out.items() if v}, frames=torch.stack(frames))


@pytest.mark.parametrize("horizon", [2, 4, 7])
@torch.no_grad()
def test_dream_equals_the_literal_one(horizon):
    """Also where the horizon is longer than the context of four frames."""
    a = agent()
    tokens, draws = tokens_of(a, 4, 5), noise(a.world, 5, horizon)
    mask = torch.tensor([[1, 0, 0, 0, 1], [1, 1, 0, 0, 1], [1, 1, 1, 0, 1], [1, 1, 1, 1, 1]]).bool()
    ours = imagine(a, tokens, mask, draws)
    literal = literal_dream(a, tokens, mask, draws)
    for k in ("action", "reward", "end"):
        assert torch.equal(ours[k], literal[k]), k
    torch.testing.assert_close(ours["frames"], literal["frames"])
    assert len(set(ours["reward"].flatten().tolist())) > 1 or horizon == 2
    assert ours["frames"].shape == (horizon, 5, 3, 32, 32) and ours["reward"].shape == (horizon - 1, 5)


def size(dream) -> int:
    """Positions of its sequence so far."""
    return dream.written + dream.waiting.shape[1]


def test_number_of_passes():
    """17 queries, then 15 passes of one; then 2 and 15: 16 passes per imagined step, none for the last frame."""
    world, passes = m.WorldModel(16, 3, m.Args(layers=1, width=8, heads=2, vocab_size=5)), []
    world.forward = lambda x, start, cache: passes.append((x.shape[1], start)) or x
    dream = m.Dream(world, torch.zeros(2, 16).long())
    draws = {k: v[0] for k, v in noise(world, 2, 2).items()}
    for _ in range(19):
        dream.step(torch.zeros(2).long(), draws)
    assert len(passes) == 19 * 16 == 304 and size(dream) == 339
    assert [n for n, _ in passes[:16]] == [17] + 15 * [1] and [n for n, _ in passes[16:32]] == [2] + 15 * [1]
    assert [start for _, start in passes] == np.cumsum([0, *[n for n, _ in passes[:-1]]]).tolist()
    dream.forward(torch.zeros(2, 2, 8))
    assert dream.written == 340, "the last token and a last action fit"
    dream = m.Dream(world, torch.zeros(2, 16).long())
    for _ in range(20):
        dream.step(torch.zeros(2).long(), draws)
    assert size(dream) == 33 and passes[-16:] == [(17, 0), *[(1, 17 + k) for k in range(15)]], "cut down to one frame"


def test_dropout_in_training_only():
    """Dreams and the policy never drop anything, in train mode either; the world model's loss does."""
    a = agent(dropout=0.5).train()
    tokens, mask, draws = tokens_of(a, 4, 3), torch.ones(4, 3).bool(), noise(a.world, 3, 4)
    one, two = (imagine(a, tokens, mask, draws) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    batch = dict(tokens=tokens, action=torch.zeros(4, 3).long(), reward=torch.zeros(4, 3), end=torch.zeros(4, 3).bool())
    losses = [a.world.loss(batch, mask, 0.5)[0]["token"] for _ in range(2)]
    assert losses[0] != losses[1]
    for name in ("scaled_dot_product_attention", "dropout"):
        assert name in m.Block.forward.__code__.co_names


def test_everything_that_drops(monkeypatch):
    """While the world model learns: embeddings, then of each block attention and both residuals."""
    a, replay, seen = agent(torch.float32, dropout=0.3), filled_replay(), []
    replay.tokenize(a), replay.reconstruct(a)
    for name, place in ("dropout", slice(1, 3)), ("scaled_dot_product_attention", slice(4, 5)):
        monkeypatch.setattr(m.F, name, lambda *args, function=getattr(F, name), place=place: (
            seen.append(args[place]) or function(*args)))
    m.train_step("world", a, m.Optimizers(a, a.args), replay, 2)
    assert seen == [(0.3, True)] + 2 * [(0.3,), (0.3, True), (0.3, True)]


def test_burn_in():
    """Padding leaves the state at zero, a padded sample is as one that begins later, and no gradient gets there."""
    a = agent()
    frames = torch.rand(5, 3, 3, 32, 32, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1], [0, 0, 1], [0, 1, 1], [0, 1, 1], [0, 1, 1]]).bool()
    _, _, state = a.behaviour(frames, a.behaviour.initial(3, CPU), mask)
    _, _, short = a.behaviour(frames[2:, 1:2], a.behaviour.initial(1, CPU))
    assert not state[0][0].any() and not state[1][0].any()
    for x, y in zip(state, short):
        torch.testing.assert_close(x[1:2], y)
    dream = imagine(a, tokens_of(a, 4, 2), torch.ones(4, 2).bool(), noise(a.world, 2, 4))
    assert not any(v.requires_grad for v in dream.values()) and dream["hidden"].any()


def test_memory_at_the_start_of_a_dream():
    """That of the real frames but the last one, and of no padding."""
    a = agent()
    tokens, mask = tokens_of(a, 4, 2), torch.tensor([[0, 1], [0, 1], [1, 1], [1, 1]]).bool()
    dream = imagine(a, tokens, mask, noise(a.world, 2, 4))
    for column, first in (0, 2), (1, 0):
        frames = a.tokenizer.decode(tokens[first:3, column])[:, None]
        _, _, memory = a.behaviour(frames, a.behaviour.initial(1, CPU))
        for k, alone in zip(("hidden", "cell"), memory):
            torch.testing.assert_close(dream[k][column], alone[0])


def test_policy_is_evaluated_as_it_dreamt():
    """From the memory with which the dream began, on its frames: the same logits again, now with a gradient."""
    a, seen = agent(), []
    a.behaviour.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    dream = imagine(a, tokens_of(a, 4, 5), torch.ones(4, 5).bool(), noise(a.world, 5, 4))
    a.behaviour.loss(dream)
    burn_in, *steps, again = seen
    torch.testing.assert_close(torch.cat(steps), again.detach())
    assert len(burn_in) == 3 and again.shape == (4, 5, 3) and again.requires_grad


def test_dreams_begin_at_the_last_frame():
    """Of burn_in + 1 real ones: it is always there, the others are not; its tokens are those of its picture."""
    a, replay, seen = agent(torch.float32), filled_replay(), []
    with torch.no_grad():
        a.tokenizer.pre_quant.weight.mul_(30)  # frames differ in their tokens
    replay.tokenize(a), replay.reconstruct(a)
    dream = a.dream
    a.dream = lambda inputs: seen.append(inputs) or dream(inputs)
    m.train_step("behaviour", a, m.Optimizers(a, a.args), replay, 50)
    recon, mask, tokens = (seen[0][k] for k in ("recon", "mask", "tokens"))
    assert recon.shape[:2] == mask.shape == (4, 50) and mask[-1].all() and not mask[0].all()
    torch.testing.assert_close(a.tokenizer.decode(tokens), recon[-1])


def test_actions_of_the_open_loop_video(monkeypatch):
    """The dream begins at the last context frame, with the action that was taken on it."""
    a, seen, step = agent(torch.float32, batch_length=6), [], m.Dream.step
    replay = filled_replay(envs=1, rows=6, ends=0.0)
    replay.data["action"].copy_(torch.tensor([0, 0, 2, 1, 1, 0])[:, None])
    replay.sample = lambda count, *args: replay.segment(*torch.tensor([0, 6, 0, 0])[:, None].repeat(1, count), *args)
    monkeypatch.setattr(m.Dream, "step", lambda self, *args: seen.append((self.tokens, args[0])) or step(self, *args))
    m.open_loop_video(a, replay, a.args)
    assert [action.tolist() for _, action in seen] == [4 * [2], 4 * [1], 4 * [1]]
    assert torch.equal(seen[0][0], a.tokenizer.encode(m.to_frames(replay.data["image"][2].repeat(4, 1, 1, 1))))


# ---- replay ----


def test_segments_by_brute_force():
    """1,000 segments of each kind against the rows; none crosses a border, padding is zero and at the right end."""
    replay = filled_replay()
    image, reward, end = (replay.data[k] for k in ("image", "reward", "end"))
    where = {image[r, e, 0, 0].numpy().tobytes() + image[r, e, 1].numpy().tobytes(): (r, e)
             for r in range(60) for e in range(2)}
    for last in (False, True):
        batch, mask = replay.sample(1000, 5, "image reward end", last)
        assert mask[-1 if last else 0].all(), "the drawn step is a frame"
        assert (mask[1:] <= mask[:-1]).all() if not last else (mask[1:] >= mask[:-1]).all()
        for k, v in batch.items():
            assert not v[~mask].any(), k
        assert (batch["end"].sum(0) <= 1).all()
        for b in range(0, 1000, 10):
            rows = [where[batch["image"][t, b, 0, 0].numpy().tobytes() + batch["image"][t, b, 1].numpy().tobytes()]
                    for t in range(5) if mask[t, b]]
            (r, e), n = rows[0], len(rows)
            assert rows == [(r + i, e) for i in range(n)]
            assert torch.equal(batch["reward"][mask[:, b], b], reward[r : r + n, e])
            assert not end[r : r + n - 1, e].any(), "nothing follows an end"
            assert n == 5 or last or end[r + n - 1, e] or r + n == 60
            assert n == 5 or not last or r == 0 or end[r - 2, e], "the row between episodes is none"


def test_uniform_over_episodes():
    """Of episodes with 1 and 99 steps each gives half of the segments; every step of a long one is drawn."""
    replay = new_replay((1,), 200, 1)
    for t in range(100):
        row = dict(image=np.full((1, 1), t), is_last=[False])
        replay.add(row, np.zeros(1), dict(reward=np.zeros(1), is_last=np.array([t == 0])))
    assert episodes(replay) == [[0, 1, 0], [1, 99, 0]] and replay.recent(100)[1].sum() == 99
    for last in (False, True):
        image = replay.sample(20_000, 4, "image", last)[0]["image"][-1 if last else 0, :, 0]
        assert abs((image == 0).float().mean() - 0.5) < 0.015
        assert Counter(image.tolist()).keys() == set(range(100))
        rest = image[image > 0].double()
        assert rest.mean() == pytest.approx(50, abs=1)


def test_ring_cuts_episodes():
    """Overwritten rows leave their episode, which goes on with the others; recent frames are those of running ones."""
    replay = filled_replay(envs=1, rows=30, ends=0.1)
    for t in range(20):
        row = dict(image=np.full((1, 32, 32, 3), t), is_last=[False])
        replay.add(row, np.zeros(1), dict(reward=np.zeros(1), is_last=np.array([False])))
    found = episodes(replay)
    assert min(first for first, *_ in found) >= 20 and replay.rows == 50
    assert sum(found[-1][:2]) == 50 and all(frames > 0 for _, frames, _ in found)
    image, mask = replay.recent(4)
    assert mask.all() and image[:, 0, 0, 0, 0].tolist() == [16, 17, 18, 19]
    assert replay.recent(30)[1].sum() == found[-1][1]
    row = dict(image=np.zeros((1, 32, 32, 3)), is_last=[False])
    replay.add(row, np.zeros(1), dict(reward=np.zeros(1), is_last=np.array([True])))
    assert not replay.recent(4)[1].any(), "none is running"


def test_new_rows_are_sampled():
    """Also when rows were sampled before; a time limit is an end like any other."""
    replay = new_replay(SHAPES["image"], 20, 1)
    for t in range(3):
        outcome = dict(reward=np.zeros(1), is_last=np.array([t == 2]), is_terminal=np.array([False]))
        replay.add(dict(image=np.full((1, 32, 32, 3), t), is_last=[False]), np.zeros(1), outcome)
        batch, _ = replay.sample(200, 1, "image end")
        number = batch["image"][..., 0, 0, 0]
        assert set(number.flatten().tolist()) == set(range(t + 1)) and torch.equal(batch["end"], number == 2)


def test_endless_episode_in_a_ring():
    """It has as many frames as the ring has rows."""
    replay, picture = filled_replay(envs=1, rows=10, ends=0.0), np.zeros((1, 32, 32, 3))
    for first in (4, 8):
        for _ in range(4):
            replay.add(dict(image=picture, is_last=[False]), np.zeros(1), dict(reward=np.zeros(1), is_last=[False]))
        assert episodes(replay) == [[first, 10, 0]] and replay.recent(12)[1].sum() == 10


def test_tokens_in_replay():
    """Those of every frame, as the tokenizer is now; new rows and a new tokenizer make them invalid."""
    a, replay = agent(torch.float32), filled_replay()
    replay.tokenize(a, chunk=7), replay.reconstruct(a, chunk=7)
    batch, mask = replay.sample(50, 3, "image tokens recon")
    with torch.no_grad():
        fresh = a.tokenizer.encode(m.to_frames(batch["image"].flatten(0, 1))).unflatten(0, (3, 50))
        frames = a.tokenizer.decode(fresh.flatten(0, 1)).unflatten(0, (3, 50))
    assert torch.equal(fresh[mask], batch["tokens"][mask])
    torch.testing.assert_close(frames * mask[..., None, None, None], batch["recon"])
    replay.add(dict(image=np.zeros((2, 32, 32, 3)), is_last=[False, False]), np.zeros(2),
               dict(reward=np.zeros(2), is_last=np.zeros(2, bool)))
    assert replay.tokens is None and replay.recon is None


def test_a_dream_that_cannot_be_recorded_runs_eagerly(monkeypatch, capsys):
    def broken():
        raise RuntimeError("no stream here\nand more")

    monkeypatch.setattr(torch.cuda, "Stream", broken)
    dream = m.Recorded(lambda inputs: dict(y=inputs["x"] + 1))
    assert [int(dream(dict(x=torch.tensor(x)))["y"]) for x in (1, 5)] == [2, 6]
    assert capsys.readouterr().out == "no CUDA graph of a dream, it runs eagerly: no stream here\n"


def test_precision_of_frames_in_replay():
    """That of acting and dreaming, also in bf16, where other tokens are nearest."""
    a, replay = agent(torch.float32, precision="bf16"), filled_replay()
    replay.tokenize(a), replay.reconstruct(a)
    image = replay.data["image"].flatten(0, 1)
    with torch.no_grad(), m.autocast(a.args, CPU):
        tokens = a.tokenizer.encode(m.to_frames(image))
        frames = a.tokenizer.decode(tokens)
    assert torch.equal(tokens, replay.tokens) and torch.equal(frames, replay.recon)
    assert not torch.equal(a.tokenizer.decode(tokens), frames)


def test_rows_tell_the_episodes():
    """Those of each process by itself: found again after a resume, also in a ring that was overwritten."""
    for rows in (25, 60):
        replay = filled_replay(envs=3, rows=60)
        replay.files["number"][: 60 - rows] += 60  # as if overwritten after the checkpoint
        again = m.SegmentReplay(m.replay_specs(SHAPES, None, None), 60, 3, CPU, Path(replay.kept.name), new=False)
        again.load_state_dict(dict(rows=60))
        replay.size = rows
        assert episodes(replay) == episodes(again) and len(again.table) > 10
        assert not again.recent(5)[1].any(), "none is running"


def test_an_episode_that_a_resume_cut_off():
    """The next one begins after it: also for those who read the rows again."""
    replay = new_replay((1,), 20, 1)
    def add(replay, count):
        for t in range(count):
            row = dict(image=np.full((1, 1), t), is_last=[False])
            replay.add(row, np.zeros(1), dict(reward=np.zeros(1), is_last=np.array([False])))
    add(replay, 3)
    for expected in ([[0, 3, 0], [3, 4, 0]], [[0, 3, 0], [3, 4, 0], [7, 4, 0]]):
        again = m.SegmentReplay(m.replay_specs({"image": (1,)}, None, None), 20, 1, CPU, Path(replay.kept.name), False)
        again.load_state_dict(replay.state_dict())
        again.kept, replay = replay.kept, again
        add(replay, 4)
        assert episodes(replay) == expected and replay.recent(9)[1].sum() == 4


# ---- acting ----


def test_acting(monkeypatch):
    """Zero state at is_first; exploration and its temperature in training only."""
    a = agent(torch.float32, epsilon=1.0, eval_temperature=1e-4)
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    row = dict(image=image, is_first=np.array([True, False]))
    state = dict(a.initial(2, CPU), hidden=torch.ones(2, 5), cell=torch.ones(2, 5))
    one, two = a.act(row, state), a.act(row, dict(state, hidden=torch.zeros(2, 5), cell=torch.zeros(2, 5)))
    assert torch.equal(one["hidden"][0], two["hidden"][0]) and not torch.equal(one["hidden"][1], two["hidden"][1])
    drawn = torch.stack([a.act(row, state)["action"] for _ in range(300)])
    assert (drawn.sum(-1) == 1).all() and (drawn.mean(0) - 1 / 3).abs().max() < 0.1, "epsilon 1 is uniform"
    a.eval()
    assert len({tuple(a.act(row, state)["action"].flatten().tolist()) for _ in range(20)}) == 1, "nearly greedy"


def test_temperature_and_exploration():
    """Collecting and evaluating divide by temperatures of their own; random actions in collecting only."""
    a = agent(torch.float32, temperature=1e-4, eval_temperature=1e4, epsilon=0.0)
    row = dict(image=np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8), is_first=np.ones(2, bool))
    def drawn():
        return {tuple(a.act(row, a.initial(2, CPU))["action"].flatten().tolist()) for _ in range(30)}
    assert len(drawn()) == 1
    a.args = replace(a.args, epsilon=1.0)
    assert len(drawn()) > 5
    a.eval()
    assert len(drawn()) > 5
    a.args = replace(a.args, eval_temperature=1e-4)
    assert len(drawn()) == 1, "nothing is explored"


def test_memory_of_the_running_episode():
    """The policy sees reconstructions; what it remembers is what `warm_up` makes of the same frames."""
    a, rng = agent(torch.float32, burn_in=5), np.random.default_rng(0)
    replay = new_replay(SHAPES["image"], 20, 2)
    state, images = a.initial(2, CPU), rng.integers(0, 256, (4, 2, 32, 32, 3), np.uint8)
    for t, image in enumerate(images):
        row = dict(image=image, is_first=np.array([t == 0, t in (0, 2)]), is_last=[False, False])
        state = a.act(row, state)
        replay.add(row, np.zeros(2), dict(reward=np.zeros(2), is_last=np.array([False, t == 1])))
    with torch.no_grad():
        recon = a.tokenizer.decode(a.tokenizer.encode(m.to_frames(torch.from_numpy(images[:, 0]))))
        _, _, memory = a.behaviour(recon[:, None], a.behaviour.initial(1, CPU))
    warm = a.warm_up(replay, CPU)
    for k, alone in zip(("hidden", "cell"), memory):
        torch.testing.assert_close(state[k][:1], alone)
        torch.testing.assert_close(warm[k], state[k])


# ---- the run ----


def stored(folder):
    """The replay of a run, from its files."""
    saved = checkpoint(folder)
    size, num_envs = saved["args"]["image_size"], saved["args"]["num_envs"]
    specs = m.replay_specs({"image": (size, size, 3)}, None, None)
    replay = m.SegmentReplay(specs, saved["capacity"], num_envs, CPU, folder / "replay0", new=False)
    replay.load_state_dict(saved["replay"])
    return replay


def watch(monkeypatch) -> list:
    """(part, frames in replay) of every update of a run."""
    calls, train_step = [], m.train_step

    def watched(part, agent, optimizers, replay, *args):
        calls.append((part, sum(frames for _, frames, _ in episodes(replay))))
        return train_step(part, agent, optimizers, replay, *args)

    monkeypatch.setattr(m, "train_step", watched)
    return calls


def test_schedule(tmp_path, monkeypatch):
    """The official one divided by 100: 5 epochs collect before the tokenizer's first, and so on; the last ones only
    train. Every frame counts in the epoch in which it was seen, its reward and end included."""
    calls = watch(monkeypatch)
    folder = tiny.run("iris", tmp_path / "run", epoch_steps=2, epoch_updates=3, extra_epochs=2, learning_starts=10,
                      world_starts=14, behaviour_starts=18, total_timesteps=24, eval_episodes=0)
    expected = []
    for epoch in range(1, 15):
        steps = min(2 * epoch, 24)
        for part, start in zip(m.PARTS, (10, 14, 18)):
            expected += 3 * [(part, steps)] if steps > start else []
    assert calls == expected
    saved = checkpoint(folder)
    assert saved["step"] == 24 and saved["extra"] == 2 and saved["updates"] == len(calls)
    scalars, _ = tiny.events(folder)
    assert scalars["losses/token"][-1][0] == 28, "as if steps went on"
    assert scalars["charts/frames"][-1] == (28, 24)


def test_tokens_are_made_anew_in_each_epoch(tmp_path, monkeypatch):
    """When its tokenizer is done, once, and decoded when the policy learns; also in epochs that only train."""
    calls, replay, train_step = [], m.SegmentReplay, m.train_step
    tokenize, reconstruct = replay.tokenize, replay.reconstruct
    monkeypatch.setattr(replay, "tokenize", lambda *args: calls.append("tokenize") or tokenize(*args))
    monkeypatch.setattr(replay, "reconstruct", lambda *args: calls.append("decode") or reconstruct(*args))
    monkeypatch.setattr(m, "train_step", lambda part, *args: calls.append(part) or train_step(part, *args))
    tiny.run("iris", tmp_path / "run", epoch_steps=6, total_timesteps=12, extra_epochs=2, learning_starts=0,
             world_starts=0, behaviour_starts=0, eval_episodes=0)
    assert calls == 4 * ["tokenizer", "tokenize", "world", "decode", "behaviour"]


def test_memory_at_the_start_of_an_epoch(tmp_path, monkeypatch):
    """In the middle of an episode it is not empty."""
    seen, act = [], m.Agent.act
    monkeypatch.setattr(m.Agent, "act", lambda agent, row, state: seen.append((row, state)) or act(agent, row, state))
    tiny.run("iris", tmp_path / "run", epoch_steps=2, total_timesteps=12, learning_starts=12, eval_episodes=0)
    assert [bool(row["is_first"]) for row, _ in seen] == [t % 7 == 0 for t in range(12)]
    assert all(state["hidden"].any() for row, state in seen if not row["is_first"])


def test_action_repeat(tmp_path):
    """Seven steps are four decisions; metrics count frames, and no epoch goes beyond the last step."""
    folder = tiny.run("iris", tmp_path / "run", env_id="tiny:ScriptedImage-v0", action_repeat=2, total_timesteps=9,
                      eval_episodes=0, save_every=4)
    scalars = tiny.events(folder)[0]
    assert scalars["charts/episodic_length"] == [(4, 4), (8, 4)] and scalars["charts/frames"][-1] == (9, 18)
    assert checkpoint(folder)["step"] == 9


def test_nothing_is_decided_after_an_end(tmp_path, monkeypatch):
    """While another environment goes on: action 0, and no step of the budget."""
    calls, step = [], m.Envs.step
    monkeypatch.setattr(m.Envs, "step", lambda self, action: calls.append((self.over, action)) or step(self, action))
    folder = tiny.run("iris", tmp_path / "run", env_id="Uneven-v0", num_envs=2, total_timesteps=60, epoch_steps=30,
                      learning_starts=60, eval_episodes=0, video_every=0)
    idle = np.concatenate([action[over].argmax(-1) for over, action in calls])
    assert len(idle) > 10 and not idle.any()
    assert checkpoint(folder)["step"] == sum((~over).sum() for over, _ in calls)


def test_a_lost_life_begins_a_new_episode(tmp_path, monkeypatch):
    """The third step costs one: the policy forgets, the next step is not stored; the return is the whole game's."""
    seen, act = [], m.Agent.act

    class Lives(m.Envs):
        def step(self, action):
            row = super().step(action)
            return dict(row, is_last=row["is_last"] | (row["reward"] == 3))

    monkeypatch.setattr(m, "Envs", Lives)
    monkeypatch.setattr(m.Agent, "act", lambda agent, row, state: seen.append(row) or act(agent, row, state))
    folder = tiny.run("iris", tmp_path / "run", env_id="tiny:ScriptedImage-v0", total_timesteps=12, eval_episodes=0)
    assert [int(row["image"][0, 0, 0, 0]) for row in seen] == 2 * [0, 1, 2, 4, 5, 6]
    assert [bool(row["is_first"]) for row in seen] == 4 * [True, False, False]
    assert episodes(stored(folder)) == [[3 * i, 3, 0] for i in range(4)]
    assert tiny.events(folder)[0]["charts/episodic_return"] == [(6, 28), (12, 28)]


def test_rows_in_replay(tmp_path):
    """What a scripted game tells: observation t, action on it, reward and end that followed; none after an end."""
    folder = tiny.run("iris", tmp_path / "run", env_id="tiny:ScriptedImage-v0", total_timesteps=24, eval_episodes=0)
    replay = stored(folder)
    rows = {name: field[: replay.rows, 0].numpy() for name, field in replay.data.items()}
    step, code = rows["image"][:, 0, 0, 0], rows["image"][:, 0, 0, 1]
    assert replay.rows == 24 and rows["number"].tolist() == [*range(24)] and step.tolist() == [i % 7 for i in range(24)]
    assert np.array_equal(rows["reward"], step + 1) and np.array_equal(rows["end"], step == 6)
    assert np.array_equal(code[1:], np.where(step[1:] == 0, 0, rows["action"][:-1] + 1))
    assert episodes(replay) == [[0, 7, 0], [7, 7, 0], [14, 7, 0], [21, 3, 0]]


def test_decoded_frames_are_announced_beside_replay(tmp_path, monkeypatch):
    seen, make = [], m.Storage.__init__
    monkeypatch.setattr(m.Storage, "__init__", lambda *args, beside=0, **kwargs: (
        seen.append(beside) or make(*args, beside=beside, **kwargs)))
    folder = tiny.run("iris", tmp_path / "run", total_timesteps=1)
    assert seen[:1] == [4 * stored(folder).data["image"][0, 0].numel()], "bytes of a frame in float32"


def test_lives(tmp_path, monkeypatch):
    """Each life is an episode in replay, without the frame after the loss; returns are those of whole games, and an
    evaluation plays them to the end."""
    seen, make = [], m.Envs
    monkeypatch.setattr(m, "Envs", lambda *args, life_loss_info: (
        seen.append(life_loss_info) or make(*args, life_loss_info=life_loss_info)))
    folder = tiny.run("iris", tmp_path / "run", env_id="ALE/Breakout-v5", total_timesteps=300, epoch_steps=300,
                      temperature=1.0, eval_episodes=1)
    assert seen == [True, False]
    replay, scalars = stored(folder), tiny.events(folder)[0]
    found, ends = episodes(replay), replay.data["end"]
    assert len(found) >= 5 and replay.rows == 300, "with one environment no row is lost"
    for first, frames, _ in found[:-1]:
        assert ends[first + frames - 1] and ends[first : first + frames].sum() == 1
    assert sum(frames for _, frames, _ in found) == 300
    assert len(scalars.get("charts/episodic_length", [])) < len(found)


def test_continuous_actions_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        m.make_envs(m.Args(env_id="envs:Track-v0", action_repeat=1), 1, 0)
    assert end.value.code == 2 and "dreamer_v3.py" in capsys.readouterr().err


@pytest.mark.parametrize("part", m.PARTS)
def test_no_host_reads(part, monkeypatch):
    """An update of any part never waits for a value."""
    a, replay = agent(torch.float32), filled_replay()
    replay.tokenize(a), replay.reconstruct(a)
    optimizers = m.Optimizers(a, a.args)
    m.train_step(part, a, optimizers, replay, 4, m.pixel_distance)  # makes the optimiser's state
    check_no_host_reads(lambda: m.train_step(part, a, optimizers, replay, 4, m.pixel_distance), monkeypatch)


@pytest.mark.parametrize("number", [1, 3, 8, 17, 29])
def test_stopped_within_an_epoch(number, tmp_path, monkeypatch):
    """A signal during any update of any part, then --resume: the same checkpoint as without it."""
    flags = dict(epoch_steps=7, epoch_updates=3, extra_epochs=1, total_timesteps=35, learning_starts=7, world_starts=7,
                 behaviour_starts=14)
    argv = lambda folder: scripted("iris", folder, **flags)  # noqa: E731
    assert execute("iris", *argv(tmp_path / "whole")) == 0
    calls, step = [], torch.optim.Optimizer.zero_grad

    def stop(self, *args):
        calls.append(self)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", stop)
    assert execute("iris", *argv(tmp_path / "parts")) == 0
    monkeypatch.undo()
    run = only(tmp_path / "parts")
    assert checkpoint(run)["updates"] == number and checkpoint(run)["done"] > 0
    assert execute("iris", f"--resume={run}") == 0
    one, two = ({k: v for k, v in checkpoint(r).items() if k != "args"} for r in (only(tmp_path / "whole"), run))
    assert not differences(one, two)


def test_finished_run_resumed(tmp_path):
    """There is nothing to do, the last epochs are not repeated: the same checkpoint."""
    flags = dict(epoch_steps=6, total_timesteps=6, extra_epochs=2, learning_starts=0, world_starts=0,
                 behaviour_starts=0)
    assert execute("iris", *scripted("iris", tmp_path, **flags)) == 0
    saved = checkpoint(only(tmp_path))
    assert (saved["updates"], saved["extra"]) == (9, 2)
    assert execute("iris", f"--resume={only(tmp_path)}") == 0
    assert not differences(saved, checkpoint(only(tmp_path)))


ONE_EPOCH = dict(epoch_steps=6, total_timesteps=6, learning_starts=0, world_starts=0, behaviour_starts=0, log_every=1)


def test_finished_run_collects_more(tmp_path):
    """With a larger budget: another epoch, and the last ones again."""
    assert execute("iris", *scripted("iris", tmp_path, **ONE_EPOCH, extra_epochs=2)) == 0
    assert execute("iris", f"--resume={only(tmp_path)}", "--total-timesteps=12") == 0
    saved = checkpoint(only(tmp_path))
    assert (saved["step"], saved["extra"], saved["updates"]) == (12, 2, 9 + 9)


def test_curves_of_the_last_epochs(tmp_path, monkeypatch):
    """They are complete after a stop among them and a resume."""
    calls, step = [], torch.optim.Optimizer.zero_grad

    def stop(self, *args):
        calls.append(self)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", stop)
    assert execute("iris", *scripted("iris", tmp_path, **ONE_EPOCH, extra_epochs=3)) == 0
    assert checkpoint(only(tmp_path))["extra"] == 1
    assert execute("iris", f"--resume={only(tmp_path)}") == 0
    assert [step for step, _ in tiny.events(only(tmp_path))[0]["losses/token"]] == [6, 12, 18, 24]


@pytest.mark.filterwarnings("ignore:.*render_mode")
def test_without_burn_in(tmp_path):
    folder = tiny.run("iris", tmp_path / "run", burn_in=0)
    assert checkpoint(folder)["step"] == 24


def test_stopped_while_collecting(tmp_path, monkeypatch):
    """A signal at an episode's end in the middle of an epoch, then --resume: the same checkpoint as without it."""
    flags = dict(epoch_steps=10, epoch_updates=2, total_timesteps=30, learning_starts=0, world_starts=0,
                 behaviour_starts=0)
    calls, step = [], envs.Scripted.step
    assert execute("iris", *scripted("iris", tmp_path / "whole", **flags)) == 0

    def stop(self, action):
        calls.append(action)
        if len(calls) == 14:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, action)

    monkeypatch.setattr(envs.Scripted, "step", stop)
    assert execute("iris", *scripted("iris", tmp_path / "parts", **flags)) == 0
    run = only(tmp_path / "parts")
    assert checkpoint(run)["step"] == 14
    assert execute("iris", f"--resume={run}") == 0
    one, two = ({k: v for k, v in checkpoint(r).items() if k != "args"} for r in (only(tmp_path / "whole"), run))
    assert not differences(one, two)
