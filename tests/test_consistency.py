"""The same result by another way: parallel or in steps, one sequence or two, one element alone, bf16, compiled."""
import copy
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from test_gradients import SHAPES, V3, all_losses, optimizer_of, random_replay, random_rows, tiny

T, B = 6, 3


def scan_inputs(agent, seed=0):
    """float64 inputs of `RSSM.observe` with a reset in the middle of column 0 and at the start of column 1."""
    torch.manual_seed(seed)
    rssm = agent.world.rssm
    first = torch.zeros(T, B, dtype=torch.bool)
    first[3, 0] = first[0, 1] = True
    x = dict(tokens=torch.randn(T, B, agent.world.encoder.tokens), prev_action=3 * torch.randn(T, B, 3), is_first=first,
             deter=torch.randn(B, rssm.deter), stoch=torch.randn(B, rssm.stoch * rssm.classes),
             noise=torch.empty(T, B, rssm.stoch, rssm.classes).exponential_())
    return {k: v if v.dtype == torch.bool else v.double() for k, v in x.items()}


def observe(rssm, noise, **inputs):
    """`RSSM.observe` with this noise."""
    with mock.patch.object(rssm, "noise", lambda *_: noise):
        return rssm.observe(**inputs)


def part(inputs, t0, t1, state=None):
    """Steps t0..t1-1 of the inputs, from another state if one is given."""
    cut = {k: v if k in ("deter", "stoch") else v[t0:t1] for k, v in inputs.items()}
    return cut if state is None else dict(cut, deter=state[0], stoch=state[1])


@V3
def test_scan_is_its_steps(m):
    """T calls of one step give what one call over T steps gives."""
    agent = tiny(m).double()
    inputs = scan_inputs(agent)
    whole = observe(agent.world.rssm, **inputs)
    state, steps = None, []
    for t in range(T):
        steps.append(observe(agent.world.rssm, **part(inputs, t, t + 1, state)))
        state = steps[-1][0][-1], steps[-1][1][-1]
    for one, many in zip(whole, zip(*steps)):
        torch.testing.assert_close(one, torch.cat(many), rtol=1e-12, atol=1e-12)


@V3
def test_sequence_with_a_reset_is_two_sequences(m):
    """An episode that begins in the middle of a sequence is what it would be alone, whatever it is started from."""
    agent = tiny(m).double()
    inputs = scan_inputs(agent)
    inputs["is_first"][3] = True
    whole = observe(agent.world.rssm, **inputs)
    junk = torch.randn_like(inputs["deter"]), torch.randn_like(inputs["stoch"])
    halves = observe(agent.world.rssm, **part(inputs, 0, 3)), observe(agent.world.rssm, **part(inputs, 3, T, junk))
    for one, two in zip(whole, zip(*halves)):
        torch.testing.assert_close(one, torch.cat(two), rtol=1e-12, atol=1e-12)


@V3
def test_nothing_crosses_a_reset(m):
    """Changing every field of the rows before a reset, the last action included, changes no loss or latent after."""
    agent = tiny(m)
    batch, other = random_rows(agent), random_rows(agent, seed=1)
    batch["is_first"][3] = True  # row 3 is step 2 of the losses
    changed = {k: v if k.startswith("is_") else torch.cat([other[k][:3], v[3:]]) for k, v in batch.items()}
    noise = agent.world.rssm.noise(T, B)
    agent.world.rssm.noise = lambda *_: noise
    (losses, post, _), (others, latents, _) = (agent.world.loss(*m.split_context(x)) for x in (batch, changed))
    for name, x, y in [(k, losses[k], others[k]) for k in losses] + [(k, post[k], latents[k]) for k in post]:
        torch.testing.assert_close(x[2:], y[2:], rtol=1e-6, atol=1e-6, msg=lambda text: f"{name}: {text}")
        assert not torch.equal(x[:2], y[:2]), name


@V3
def test_batch_elements_are_independent(m):
    """Changing every field of sequence 1 changes all of its losses and none of the others (the return scale is 1)."""
    agent = tiny(m)
    batch, other = random_rows(agent), random_rows(agent, seed=1)
    changed = {k: v if k[:3] == "is_" else torch.stack([v[:, 0], other[k][:, 1], v[:, 2]], 1) for k, v in batch.items()}
    torch.manual_seed(2)
    losses = all_losses(agent, batch)
    torch.manual_seed(2)
    others = all_losses(copy.deepcopy(agent), changed)
    for name in losses:
        x, y = (v.unflatten(-1, (-1, B)) for v in (losses[name], others[name]))  # dreams are numbered t * B + b
        same = torch.isclose(x, y, rtol=1e-5, atol=1e-5).flatten(0, -2).all(0)
        assert same.tolist() == [True, False, True], name


@V3
@pytest.mark.parametrize("discrete", [True, False])
def test_acting_is_observing(m, discrete):
    """Latents and actions that the policy made step by step, across episode ends, are those of one scan of the rows."""
    agent, envs, steps = tiny(m, discrete), 2, 12
    rng, device = np.random.default_rng(0), torch.device("cpu")
    state, rows, policy_noise = agent.initial(envs, device), [], []
    rssm, post_noise = agent.world.rssm, torch.empty(steps, envs, agent.world.rssm.stoch, agent.world.rssm.classes)
    for t in range(steps):
        first = np.array([t in (0, 5), t in (0, 8)])
        row = dict(image=rng.integers(0, 256, (envs, 16, 16, 3), np.uint8), is_first=first,
                   is_last=np.zeros(envs, bool), vector=rng.normal(size=(envs, 5)).astype(np.float32))
        torch.manual_seed(t)
        state = agent.act(row, state)
        torch.manual_seed(t)  # the same draws again: posterior first, then the action
        post_noise[t].exponential_()
        policy_noise.append(agent.behaviour.noise(envs))
        stored = {k: torch.as_tensor(v) for k, v in row.items()}
        rows.append(dict(stored, action=state["action"], deter=state["deter"], stoch=state["stoch"].byte()))
    obs, context = m.split_context({k: torch.stack([row[k] for row in rows]) for k in rows[0]})
    with torch.no_grad():
        deter, stoch, _ = observe(rssm, post_noise[1:], tokens=agent.world.encoder(obs), **context)
        action = agent.behaviour.sample(torch.cat([deter, stoch], -1), torch.stack(policy_noise)[1:])
    torch.testing.assert_close(deter, obs["deter"], rtol=1e-4, atol=1e-5)
    assert torch.equal(stoch, obs["stoch"].float())
    torch.testing.assert_close(action, obs["action"], rtol=1e-4, atol=1e-5)
    assert len(action.unique(dim=0)) > 3  # the actions differ, so the comparison says something


@V3
def test_dreaming_is_observing_without_tokens(m):
    """A dream's step has the h of an observed step, and draws z from the prior with its uniform share."""
    agent, count = tiny(m).double(), 300
    rssm = agent.world.rssm
    rssm.prior[-2].weight.data *= 100  # near certainty, where the uniform share is what is left
    sizes = rssm.deter, rssm.stoch * rssm.classes, 3, agent.world.encoder.tokens
    deter, stoch, action, tokens = (torch.randn(count, n).double() for n in sizes)
    noise, alive = torch.empty(count, 32, 2).double().exponential_(), torch.zeros(1, count, dtype=torch.bool)
    rssm.noise = lambda *_: noise[None]
    seen, _, _ = rssm.observe(tokens[None], action[None], alive, deter, stoch)
    dreamt, sample = rssm.imagine_step(*rssm.scan_weights(torch.float64), deter, stoch, action, noise)
    torch.testing.assert_close(dreamt, seen[0], rtol=1e-12, atol=1e-12)
    probs = 0.99 * rssm.prior(dreamt).softmax(-1) + 0.01 / 2
    assert torch.equal(sample.unflatten(1, (32, 2)).argmax(-1), (probs / noise).argmax(-1))


@V3
def test_update_writes_its_latents_back(m, tmp_path):
    """After an update, replay holds the new posterior at rows 1..T of the sequence, and is unchanged elsewhere."""
    agent, flat = tiny(m), {}
    replay, optimizer = random_replay(m, agent, SHAPES, 40, tmp_path), optimizer_of(m, agent, lr=0.0)
    before = {k: v.clone() for k, v in replay.data.items()}
    sample, loss = replay.sample, agent.loss
    replay.sample = lambda *size: flat.setdefault("batch", sample(*size))
    agent.loss = lambda *inputs: flat.setdefault("loss", loss(*inputs))
    m.train_step(agent, optimizer, replay, 1)
    index, post = flat["batch"][1][1:, 0], flat["loss"][1]
    assert len(index.unique()) == T and torch.equal(replay.data["deter"][index, 0], post["deter"][:, 0])
    assert torch.equal(replay.data["stoch"][index, 0].float(), post["stoch"][:, 0])
    for name, value in replay.data.items():
        changed = (value != before[name]).flatten(1).any(1).nonzero()[:, 0]
        assert torch.equal(changed, index.sort().values if name in ("deter", "stoch") else index[:0]), name


@V3
def test_bf16_is_close_to_fp32(m):
    """Half precision: every loss close to fp32, every gradient finite and in the same direction."""
    results = []
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        agent = tiny(m, precision=precision)
        batch = random_rows(agent)
        torch.manual_seed(0)
        total, post, metrics = agent.loss(batch)
        total.backward()
        assert total.dtype == torch.float32 and post["deter"].dtype == dtype
        results.append((metrics, torch.cat([p.grad.flatten() for p in agent.parameters() if p.requires_grad])))
    (full, grad), (half, half_grad) = results
    assert half_grad.isfinite().all()
    for k in full:
        if k.startswith("losses/"):
            torch.testing.assert_close(half[k], full[k], rtol=0.01, atol=0.005, msg=lambda text: f"{k}: {text}")
    assert torch.cosine_similarity(grad, half_grad, dim=0) > 0.99


@V3
def test_norms_and_softmaxes_are_fp32_in_bf16(m):
    """What enters in bf16 is normalised in float32 and rounded once."""
    x, norm, bins = torch.randn(50, 32).bfloat16(), m.NormSiLU(32), m.symexp_bins(31)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), norm(x.float()).bfloat16())
        behaviour = m.Behaviour(32, 16, False, m.Args(size="size1m"))
        for y in (m.unimix(x, 0.01), behaviour.policy(x).log_prob(x[:, :16])):
            assert y.dtype == torch.float32
        target, x = x[:, 0].float(), x[:, 1:]
        assert torch.equal(m.twohot_mean(x, bins), m.twohot_mean(x.float(), bins))
        assert torch.equal(m.twohot_loss(x, target, bins), m.twohot_loss(x.float(), target, bins))


@V3
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_is_eager(m, tmp_path):
    """Three updates with compiled regions: same losses, latents and weights as without, and no region falls apart."""
    torch._dynamo.utils.counters.clear()
    runs = []
    for compiled in (False, True):
        agent = tiny(m, shapes={"vector": (5,)}, free_nats=1.0)
        if compiled:
            agent.compile_regions()
        replay = random_replay(m, agent, {"vector": (5,)}, 40, tmp_path / f"{compiled}")
        optimizer = optimizer_of(m, agent)
        start = torch.cat([p.detach().flatten() for p in optimizer.params])
        metrics = [m.train_step(agent, optimizer, replay, B) for _ in range(3)]
        change = torch.cat([p.detach().flatten() for p in optimizer.params]) - start
        runs.append((torch.tensor([list(x.values()) for x in metrics]), replay.data["deter"], change / optimizer.lr))
    for eager, compiled in zip(*runs):
        assert (compiled - eager).norm() < 1e-4 * eager.norm()
    assert not torch._dynamo.utils.counters["graph_break"]
