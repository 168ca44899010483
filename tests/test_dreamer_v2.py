"""What only DreamerV2 has, in float64 and with its samples given: formulas against their definitions, what each loss
trains, which index meets which, and how it replays."""
import copy
import math
import signal
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import envs
import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load
from test_golden_dreamer_v2 import float64, forced_samples
from torch import nn

v2 = load("dreamer_v2")
T, B, H, A = 5, 3, 4, 3
S, K, D = 4, 5, 8
SIZES = dict(deter=D, hidden=7, stoch=S, classes=K, cnn_depth=2, layers=2, units=9, batch_length=T, imag_horizon=H)
IMAGE = {"image": (64, 64, 1)}
DISCRETE = pytest.mark.parametrize("discrete", [True, False])
ESTIMATORS = pytest.mark.parametrize("discrete, grad", [
    (True, "reinforce"), (True, "dynamics"), (True, "both"), (False, "reinforce"), (False, "dynamics")])


def relative(ours, plain):
    assert ours.shape == plain.shape
    return (ours - plain).abs().max() / plain.abs().max().clamp(min=1e-30)


def make_agent(discrete=True, **flags):
    """Small, with no parameter at a value such as 0 or 1 that hides a mistake."""
    torch.manual_seed(0)
    agent = v2.Agent(IMAGE, A, discrete, replace(v2.Args(), **{**SIZES, **flags}))
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return agent


def make_rows(discrete=True):
    """Replay rows (T,B,...): a reset inside column 0, a terminal row in column 1, a truncated one in column 2."""
    torch.manual_seed(1)
    flags = {name: torch.zeros(T, B, dtype=torch.bool) for name in ("is_first", "is_last", "is_terminal")}
    flags["is_first"][0] = True
    flags["is_last"][2, 0] = True
    flags["is_first"][3, 0] = True
    flags["is_last"][4, 1] = True
    flags["is_terminal"][4, 1] = True
    flags["is_last"][4, 2] = True
    index = torch.randint(A, (T, B))
    return dict(
        flags,
        image=torch.randint(256, (T, B, 64, 64, 1), dtype=torch.uint8),
        prev_action=F.one_hot(index, A).double() if discrete else torch.randn(T, B, A).tanh(),
        reward=torch.randn(T, B))


def latents(*lead, seed=2):
    """One-hot groups (...,S,K)."""
    generator = torch.Generator().manual_seed(seed)
    return F.one_hot(torch.randint(K, (*lead, S), generator=generator), K).double()


def dream_draws(discrete, count=T * B):
    """An action, then a latent, H times: what `forced_samples` takes."""
    generator = torch.Generator().manual_seed(3)
    states = latents(H, count, seed=4)
    if not discrete:
        noise = torch.rand(H, count, A, generator=generator, dtype=torch.float64)
        return dict(onehots=list(states), uniforms=list(noise))
    actions = F.one_hot(torch.randint(A, (H, count), generator=generator), A).double()
    return dict(onehots=[draw for pair in zip(actions, states) for draw in pair], uniforms=[])


def forced_dream(discrete):
    draws = dream_draws(discrete)
    return forced_samples(*draws["onehots"], uniforms=draws["uniforms"])


def world_loss(agent, rows):
    with forced_samples(*latents(T, B)):
        return agent.world.loss(rows)


def dream_losses(agent):
    rows = make_rows(agent.behaviour.discrete)
    _, post, _ = world_loss(agent, rows)
    with forced_dream(agent.behaviour.discrete):
        losses, _ = agent.behaviour.loss(agent.world, post, rows)
    return losses


# ---- KL, samples, returns ----


@float64
def test_kl_balancing_gives_the_prior_its_share():
    """Of the gradient of the plain KL, which is that of balance 0.5, the prior gets 0.8 and the posterior 0.2."""
    torch.manual_seed(0)
    post = torch.randn(3, 2, S, K, requires_grad=True)
    prior = torch.randn(3, 2, S, K, requires_grad=True)
    q = post.softmax(-1)
    plain = (q * (q / prior.softmax(-1)).log()).sum((-1, -2))
    to_post, to_prior = torch.autograd.grad(plain.mean(), (post, prior))
    for balance, share_post, share_prior in [(0.8, 0.2, 0.8), (0.3, 0.7, 0.3), (0.5, 1.0, 1.0)]:
        loss, kl = v2.kl_loss(post, prior, balance, 0.0)
        ours_post, ours_prior = torch.autograd.grad(loss, (post, prior))
        assert relative(kl, plain) < 1e-12
        assert relative(loss, plain.mean()) < 1e-12
        assert relative(ours_post, share_post * to_post) < 1e-12
        assert relative(ours_prior, share_prior * to_prior) < 1e-12


@float64
def test_free_nats_stop_both_sides_by_the_mean_of_the_batch():
    """1.1 times the mean KL trains nothing, 0.9 times it trains every state, also those with less KL."""
    torch.manual_seed(0)
    post = torch.randn(3, 2, S, K, requires_grad=True)
    prior = torch.randn(3, 2, S, K, requires_grad=True)
    whole, kl = v2.kl_loss(post, prior, 0.8, 0.0)
    mean = kl.mean().item()
    assert kl.min() < 0.85 * mean

    off, _ = v2.kl_loss(post, prior, 0.8, 1.1 * mean)
    assert off.item() == pytest.approx(1.1 * mean, rel=1e-12)
    grads = torch.autograd.grad(off, (post, prior), materialize_grads=True)
    assert not grads[0].any() and not grads[1].any()

    on, _ = v2.kl_loss(post, prior, 0.8, 0.9 * mean)
    grads = torch.autograd.grad(on, (post, prior))
    wanted = torch.autograd.grad(whole, (post, prior))
    assert relative(grads[0], wanted[0]) < 1e-12
    assert relative(grads[1], wanted[1]) < 1e-12


@float64
def test_straight_through_sample():
    """Exactly one-hot, drawn with its probabilities, with softmax Jacobian times cotangent as gradient."""
    torch.manual_seed(0)
    logits = (2 * torch.randn(6, K)).requires_grad_()
    probs = logits.softmax(-1)
    cotangent = torch.randn(6, K)
    sample = v2.sample_onehot(probs, torch.empty_like(probs).exponential_())
    assert set(sample.unique().tolist()) == {0, 1}
    assert (sample.sum(-1) == 1).all()
    grad, = torch.autograd.grad((cotangent * sample).sum(), logits)
    p = logits.detach().softmax(-1)
    jacobian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    assert relative(grad, torch.einsum("nij,nj->ni", jacobian, cotangent)) < 1e-12

    many = p.expand(20_000, 6, K)
    frequency = v2.sample_onehot(many, torch.empty_like(many).exponential_()).mean(0)
    assert (frequency - p).abs().max() < 0.015


@float64
def test_lambda_return_equals_its_definition():
    """(1-lam) sum_n lam^(n-1) G_n with n-step returns G_n; nothing is symmetric in time."""
    torch.manual_seed(0)
    reward = torch.randn(7, 3)
    value = torch.randn(7, 3)
    cont = torch.rand(7, 3)
    cont[3, 0] = 0
    lam = 0.95
    ours = v2.lambda_return(reward, value, cont, lam)
    assert ours.shape == (6, 3)
    for t in range(6):
        total = 0
        rewards = 0
        live = 1
        steps = 6 - t
        for n in range(1, steps + 1):
            rewards = rewards + live * reward[t + n - 1]
            live = live * cont[t + n - 1]
            share = (1 - lam) * lam ** (n - 1) if n < steps else lam ** (n - 1)
            total = total + share * (rewards + live * value[t + n])
        assert relative(ours[t], total) < 1e-12


@float64
def test_the_last_state_lends_only_its_value():
    reward, value, cont = inputs = [torch.rand(5, 2, requires_grad=True) for _ in range(3)]
    ours = v2.lambda_return(*inputs, 0.95)[-1]
    to_reward, to_value, to_cont = torch.autograd.grad(ours.sum(), inputs)
    assert torch.allclose(ours, reward[-2] + cont[-2] * value[-1])
    assert not to_reward[-1].any()
    assert not to_cont[-1].any()
    assert torch.equal(to_value[-1], cont[-2])


# ---- truncated normal ----


def integral(function, high):
    """Of function (n,...) over [-1, high] by 100 Gauss-Legendre nodes, for `high` (...)."""
    nodes, weights = np.polynomial.legendre.leggauss(100)
    x = torch.tensor(nodes).view(100, *[1] * high.dim())
    weight = torch.tensor(weights).view_as(x)
    half = (high + 1) / 2
    return (half * weight * function((x + 1) * half - 1)).sum(0)


def policies():
    """Seven policies of one action, from wide to narrow."""
    mean = torch.tensor([0, 1, -3, 0.3, 2, -1, 0]).double()[:, None]
    std = torch.tensor([0, 0, 0, -2, -3, 2, 5]).double()[:, None]
    return v2.TruncatedNormal(mean.requires_grad_(), std.requires_grad_())


@float64
def test_truncated_normal_is_a_distribution():
    """Its density has mass 1, its entropy is -E[ln p], its shape is that of a normal; dimensions are independent."""
    policy = policies()
    one = torch.ones(7)
    density = lambda x: policy.log_prob(x[..., None]).exp()
    assert torch.allclose(integral(density, one), one, rtol=1e-12)
    surprise = lambda x: -density(x) * policy.log_prob(x[..., None])
    assert torch.allclose(policy.entropy(), integral(surprise, one), rtol=1e-10)
    ratio = policy.log_prob(policy.mean) - policy.log_prob(policy.mean + 0.5 * policy.std)
    assert torch.allclose(ratio, 0.125 * one)
    assert policy.std[0].item() == pytest.approx(1.1)
    assert policy.entropy()[0] > policy.entropy()[1] > policy.entropy()[2], "largest at mean 0"

    two = v2.TruncatedNormal(torch.tensor([[0.0, 0.3]]), torch.tensor([[0.0, -2.0]]))
    assert torch.allclose(two.entropy()[0], policy.entropy()[0] + policy.entropy()[3])
    x = torch.tensor([[0.2], [0.4]])
    each = policy.log_prob(x[:, None])  # (2,7)
    assert torch.allclose(two.log_prob(x.T)[0], each[0, 0] + each[1, 3])


@float64
@pytest.mark.parametrize("noise", [0.001, 0.1, 0.5, 0.77, 0.999])
def test_truncated_normal_samples_by_inverse_cdf(noise):
    """The probability below a sample is its noise. Its gradient is the official one: 1 and (x - mean) / std."""
    policy = policies()
    with forced_samples(uniforms=[torch.full((7, 1), noise)]):
        x = policy.rsample()
    below = integral(lambda x: policy.log_prob(x[..., None]).exp(), x[:, 0])
    assert torch.allclose(below, torch.full_like(below, noise), rtol=1e-8)
    to_mean, to_std = torch.autograd.grad(x.sum(), (policy.mean, policy.std))
    assert torch.equal(to_mean, torch.ones_like(x))
    assert torch.allclose(to_std, (x - policy.mean) / policy.std, rtol=1e-10)


def test_truncated_normal_stays_finite_in_float32():
    """Also for saturated networks: samples inside the limits, everything with finite gradients."""
    torch.manual_seed(0)
    grid = torch.linspace(-50, 50, 101)
    raw = torch.cartesian_prod(grid, grid).requires_grad_()
    policy = v2.TruncatedNormal(raw[:, :1], raw[:, 1:])
    for _ in range(20):
        sample = policy.rsample()
        assert sample.abs().max() < 1
        for x in (sample, policy.log_prob(sample.detach()), policy.entropy()):
            grad, = torch.autograd.grad(x.sum(), raw, retain_graph=True)
            assert x.isfinite().all()
            assert grad.isfinite().all()


# ---- networks ----


@pytest.mark.parametrize("preset, channels, actions, discrete, sizes, total", [
    ("default", 1, 18, True, (1_549_776, 5_664_848, 10_497_553, 1_131_601, 1_131_601, 1_138_418), 22_245_398),
    ("dmc", 3, 6, False, (1_551_312, 1_247_248, 9_886_611, 971_601, 0, 976_012), 15_604_385)])
def test_parameter_counts_equal_the_official_ones(preset, channels, actions, discrete, sizes, total):
    args = replace(v2.Args(), **v2.PRESETS[preset])
    with torch.device("meta"):
        agent = v2.Agent({"image": (64, 64, channels)}, actions, discrete, args)
    world = {name: sum(p.numel() for p in net.parameters()) for name, net in agent.world.named_children()}
    found = [world.get(name, 0) for name in ("encoder", "rssm", "decoder", "reward", "cont")]
    actor = sum(p.numel() for p in agent.behaviour.actor_parameters())
    assert (*found, actor) == sizes
    assert sum(p.numel() for p in agent.parameters() if p.requires_grad) == total


def test_initialisation_is_that_of_keras():
    """Uniform up to sqrt(6 / (inputs + outputs)), kernel positions counted in both; no bias; norm 1 and 0."""
    torch.manual_seed(0)
    agent = v2.Agent(IMAGE, A, False, replace(v2.Args(), deter=200, hidden=200))
    layers = 0
    for module in agent.modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()
        elif isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            layers += 1
            kernel = math.prod(module.weight.shape[2:])
            bound = math.sqrt(6 / (kernel * (module.weight.shape[0] + module.weight.shape[1])))
            assert module.weight.abs().max() <= bound
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
            assert not module.bias.any()
    assert layers == 4 + 6 + 5 + 5 + 5 + 6 + 5 + 5  # encoder, RSSM, decoder, reward, discount, actor, two critics


@float64
def test_deconvolution_of_one_pixel_as_a_matrix_product():
    """Value and gradients of `conv(x[:, :, None, None])`."""
    torch.manual_seed(0)
    conv = nn.ConvTranspose2d(6, 4, 5, stride=2)
    x = torch.randn(7, 6, requires_grad=True)
    ours = v2.deconvolve_pixel(x, conv)
    plain = conv(x[:, :, None, None])
    assert relative(ours, plain) < 1e-12
    cotangent = torch.randn_like(plain)
    leaves = (x, conv.weight, conv.bias)
    grads = torch.autograd.grad(ours, leaves, cotangent)
    wanted = torch.autograd.grad(plain, leaves, cotangent)
    assert max(map(relative, grads, wanted)) < 1e-12


def plain_core(rssm, deter, stoch, action):
    """The recurrent step, one gate after the other."""
    x = F.elu(torch.cat([stoch, action], -1) @ rssm.img_in[0].weight.T + rssm.img_in[0].bias)
    gates = torch.cat([x, deter], -1) @ rssm.gru.weight.T + rssm.gru.bias
    centred = gates - gates.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    gates = centred / (variance + 1e-3).sqrt() * rssm.gru_norm.weight + rssm.gru_norm.bias
    reset = gates[:, :D].sigmoid()
    cand = (reset * gates[:, D : 2 * D]).tanh()
    update = (gates[:, 2 * D :] - 1).sigmoid()
    return update * cand + (1 - update) * deter


@float64
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_cell(scale):
    """Keras' epsilon of 1e-3 shows where pre-activations are small."""
    rssm = make_agent().world.rssm
    rssm.gru.weight.data *= scale
    rssm.gru.bias.data *= scale
    inputs = (torch.randn(2, D), torch.randn(2, S * K), torch.randn(2, A))
    assert relative(rssm.core(*inputs), plain_core(rssm, *inputs)) < 1e-12


@float64
def test_cell_starts_by_keeping_its_memory():
    """With all pre-activations zero the update gate is sigmoid(-1) = 0.269 and the candidate 0."""
    rssm = v2.RSSM(D, 7, S, K, A, 6)
    nn.init.zeros_(rssm.gru.weight)
    deter = torch.randn(2, D)
    after = rssm.core(deter, torch.randn(2, S * K), torch.randn(2, A))
    assert torch.allclose(after, (1 - 0.26894142137) * deter)


# ---- one sequence ----


def observe(agent, rows, samples):
    start = agent.initial(rows["is_first"].shape[1])
    tokens = agent.world.encoder(rows)
    with forced_samples(*samples):
        return agent.world.rssm.observe(
            tokens, rows["prev_action"], rows["is_first"], start["deter"], start["stoch"])


@float64
def test_observe_is_a_chain_of_cell_and_posterior():
    agent = make_agent()
    rssm = agent.world.rssm
    rows = make_rows()
    samples = latents(T, B)
    deters, stochs, logits = observe(agent, rows, samples)
    tokens = agent.world.encoder(rows)
    deter = torch.zeros(B, D)
    stoch = torch.zeros(B, S * K)
    for t in range(T):
        keep = 1.0 - rows["is_first"][t].double()[:, None]
        deter = plain_core(rssm, deter * keep, stoch * keep, rows["prev_action"][t] * keep)
        plain = rssm.posterior(torch.cat([deter, tokens[t]], -1))
        stoch = samples[t].flatten(1)
        assert relative(deters[t], deter) < 1e-12
        assert relative(logits[t].flatten(1), plain) < 1e-12
        assert torch.equal(stochs[t], stoch)


@float64
def test_nothing_passes_the_beginning_of_an_episode():
    """Rows before a reset, and the action that the reset ignored, have no influence on what follows."""
    agent = make_agent()
    rows = make_rows()
    samples = latents(T, B)
    deter, _, logits = observe(agent, rows, samples)
    rows["image"][:3, 0] = 255 - rows["image"][:3, 0]
    rows["prev_action"][:4, 0] = rows["prev_action"][:4, 0].roll(1, -1)
    changed, _, changed_logits = observe(agent, rows, samples)
    assert torch.equal(deter[3:, 0], changed[3:, 0])
    assert torch.equal(logits[3:, 0], changed_logits[3:, 0])
    assert not torch.allclose(deter[2, 0], changed[2, 0])
    rows["prev_action"][4, 0] = rows["prev_action"][4, 0].roll(1, -1)
    moved, _, _ = observe(agent, rows, samples)
    assert not torch.allclose(moved[4, 0], changed[4, 0])


@float64
@DISCRETE
def test_acting_is_observing(discrete):
    """Latents and actions made step by step, across the start of an episode, are those of one scan of the rows."""
    agent = make_agent(discrete)
    agent.eval()  # actions without noise
    rows = make_rows(discrete)
    samples = latents(T, B)
    state = agent.initial(B)
    kept = []
    before = []
    for t in range(T):
        before.append(state["action"])
        row = {name: rows[name][t].numpy() for name in ("image", "is_first")}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(v2.RSSM, "sample", lambda rssm, logits: samples[t].flatten(-2))
            state = agent.act(row, state)
        kept.append(state)
    rows["prev_action"] = torch.stack(before)
    deter, stoch, _ = observe(agent, rows, samples)
    action = agent.behaviour.sample(torch.cat([deter, stoch], -1))
    assert relative(torch.stack([state["deter"] for state in kept]), deter) < 1e-12
    assert torch.equal(torch.stack([state["stoch"] for state in kept]), stoch)
    assert relative(torch.stack([state["action"] for state in kept]), action) < 1e-10
    assert len(action.flatten(0, 1).unique(dim=0)) > 1, "actions differ, so the comparison says something"


@float64
@DISCRETE
def test_evaluation_takes_the_mode_of_the_policy_and_samples_the_latent(discrete):
    agent = make_agent(discrete)
    torch.manual_seed(0)
    image = torch.randint(256, (1, 64, 64, 1), dtype=torch.uint8).expand(20, -1, -1, -1)
    row = dict(image=image.numpy(), is_first=np.ones(20, bool))
    greedy = {}
    for training in (True, False):
        agent.train(training)
        state = agent.act(row, agent.initial(20))
        assert len(state["stoch"].unique(dim=0)) > 1, "the latent is sampled"
        policy = agent.behaviour.policy(torch.cat([state["deter"], state["stoch"]], -1))
        mode = F.one_hot(policy.argmax(-1), A).double() if discrete else policy.mean
        greedy[training] = torch.isclose(state["action"], mode).all(-1)
    assert greedy[False].all()
    assert not greedy[True].all()


def test_random_actions_are_uniform():
    torch.manual_seed(0)
    action = make_agent(True).act_randomly(3000)["action"]
    assert torch.equal(action.sort(-1).values, torch.tensor([0.0, 0.0, 1.0]).expand(3000, 3))
    assert (action.mean(0) - 1 / 3).abs().max() < 0.03
    action = make_agent(False).act_randomly(3000)["action"]
    assert -1 <= action.min() < -0.99
    assert 0.99 < action.max() <= 1
    assert action.mean(0).abs().max() < 0.04


# ---- dreams ----


def dream(agent):
    """Posterior start states, feat (H+1,N,F), action (H,N,A) of given samples."""
    discrete = agent.behaviour.discrete
    _, post, _ = world_loss(agent, make_rows(discrete))
    start = [post[name].flatten(0, 1) for name in ("deter", "stoch")]
    with forced_dream(discrete):
        feat, action = agent.behaviour.imagine(agent.world.rssm, *start)
    return start, feat, action


@float64
@DISCRETE
def test_a_dream_is_made_of_prior_steps(discrete):
    """Actions come from the state before them, without gradient to it; the gradient goes on through latents."""
    agent = make_agent(discrete)
    rssm = agent.world.rssm
    start, feat, action = dream(agent)
    draws = dream_draws(discrete)
    deter, stoch = start
    plain = [torch.cat(start, -1)]
    for t in range(H):
        draw = draws["onehots"][2 * t : 2 * t + 1] if discrete else []
        with forced_samples(*draw, uniforms=draws["uniforms"][t : t + 1]):
            chosen = agent.behaviour.sample(plain[-1].detach())
        assert relative(action[t], chosen) < 1e-12
        deter = plain_core(rssm, deter, stoch, chosen)
        probs = rssm.groups(rssm.prior(deter)).softmax(-1)
        sample = draws["onehots"][2 * t + 1 if discrete else t]
        stoch = (sample + probs - probs.detach()).flatten(1)
        plain.append(torch.cat([deter, stoch], -1))
    plain = torch.stack(plain)
    assert relative(feat, plain) < 1e-12
    cotangent = torch.randn_like(feat)
    params = [*agent.behaviour.actor_parameters(), *rssm.prior.parameters()]
    grads = torch.autograd.grad(feat, params, cotangent)
    wanted = torch.autograd.grad(plain, params, cotangent)
    assert max(map(relative, grads, wanted)) < 1e-10


@float64
@ESTIMATORS
def test_losses_of_a_dream_from_scratch(discrete, grad):
    """The whole objective, term by term in loops, from the states and actions that were dreamt."""
    agent = make_agent(discrete, actor_grad=grad, ent_coef=0.01, rho=0.7)
    losses = dream_losses(agent)
    _, feat, action = dream(agent)
    behaviour = agent.behaviour
    with torch.no_grad():
        reward = agent.world.reward(feat)[..., 0]
        value = behaviour.critic(feat)[..., 0]
        slow = behaviour.slow_critic(feat)[..., 0]
        cont = agent.world.cont(feat)[..., 0].sigmoid()
        policy = behaviour.policy(feat[:-1])
        log_prob = (policy * action).sum(-1) if discrete else policy.log_prob(action)
        bonus = v2.entropy(policy) if discrete else policy.entropy()
    cont[0] = 0.999 * (1 - make_rows()["is_terminal"].flatten().double())
    rho = dict(reinforce=1.0, dynamics=0.0, both=0.7)[grad]
    actor_loss = 0
    critic_loss = 0
    for n in range(T * B):
        target = [None] * H + [slow[H, n]]
        for t in reversed(range(H)):
            target[t] = reward[t, n] + cont[t, n] * (0.05 * slow[t + 1, n] + 0.95 * target[t + 1])
        weight = 1.0
        for t in range(H):
            critic_loss += weight * (0.5 * (value[t, n] - target[t]) ** 2 + 0.5 * math.log(2 * math.pi))
            if t < H - 1:
                reinforce = log_prob[t, n] * (target[t + 1] - slow[t, n])
                gain = rho * reinforce + (1 - rho) * target[t + 1]
                actor_loss -= weight * (gain + 0.01 * bonus[t, n])
            weight = weight * cont[t, n]
    assert losses["policy"].item() == pytest.approx(actor_loss.item() / (T * B * (H - 1)), rel=1e-10)
    assert losses["value"].item() == pytest.approx(critic_loss.item() / (T * B * H), rel=1e-10)


@float64
@ESTIMATORS
def test_which_reward_matters(discrete, grad):
    """An action changes only what comes after it: r_0 does not. Of the last state only the value counts."""
    agent = make_agent(discrete, actor_grad=grad)
    table = torch.zeros(H + 1, 1)
    agent.world.predict_reward = lambda feat: table.expand(feat.shape[:-1])
    found = []
    for k in (None, 0, 1, H - 1, H):
        table.zero_()
        if k is not None:
            table[k] = 10
        found.append(dream_losses(agent))
    plain, *changed = found
    moved = [(x["policy"] != plain["policy"], x["value"] != plain["value"]) for x in changed]
    assert moved == [(False, True), (True, True), (True, True), (False, False)]


@float64
def test_a_dream_from_a_terminal_state_teaches_only_its_first_state():
    """w_0 = 1 and d_0 = 0 there: the gradient is zero from index 1 on, and nowhere else."""
    agent = make_agent()
    alive = torch.ones(T * B, dtype=torch.bool)
    alive[4 * B + 1] = False
    rows = make_rows()
    _, feat, action = dream(agent)
    target, slow_value, weight = agent.behaviour.returns(agent.world, feat, rows["is_terminal"].flatten())
    assert not weight.requires_grad
    assert torch.equal(weight[0], torch.ones(T * B))
    assert torch.equal(weight[1:] != 0, alive.expand(H, -1))
    assert torch.equal(weight[1], 0.999 * alive.double()), "known from the replay, not predicted"
    predicted = agent.world.predict_cont(feat)
    assert relative(weight[2], weight[1] * predicted[1]) < 1e-12

    feat = feat.detach().requires_grad_()
    seen = []
    for net in (agent.behaviour.actor, agent.behaviour.critic):
        net.register_forward_hook(lambda net, inputs, output: seen.append(output))
    policy_loss, _ = agent.behaviour.actor_loss(feat, action, target.detach(), slow_value, weight)
    value_loss, _ = agent.behaviour.critic_loss(feat, target, weight)
    for loss, output in ((policy_loss, seen[0]), (value_loss, seen[1])):
        grad, = torch.autograd.grad(loss, output)
        used = grad.abs().sum(-1) != 0
        assert used[0].all()
        assert torch.equal(used[1:], alive.expand(len(used) - 1, -1))


@float64
@DISCRETE
def test_rho_is_the_share_of_reinforce(discrete):
    """both: rho = 1 is reinforce, rho = 0 dynamics; between them losses and gradients are mixed linearly."""
    results = {}
    for grad, rho in [("reinforce", 0.0), ("dynamics", 1.0), ("both", 1.0), ("both", 0.0), ("both", 0.7)]:
        agent = make_agent(discrete, actor_grad=grad, rho=rho)
        loss = dream_losses(agent)["policy"]
        grads = torch.autograd.grad(loss, agent.behaviour.actor_parameters())
        results[grad, rho] = torch.cat([loss.detach()[None], *[g.flatten() for g in grads]])
    reinforce = results["reinforce", 0.0]
    dynamics = results["dynamics", 1.0]
    assert relative(reinforce, dynamics) > 0.1
    assert relative(results["both", 1.0], reinforce) < 1e-12
    assert relative(results["both", 0.0], dynamics) < 1e-12
    assert relative(results["both", 0.7], 0.7 * reinforce + 0.3 * dynamics) < 1e-12


@DISCRETE
def test_estimator_by_default(discrete):
    automatic = make_agent(discrete).behaviour.actor_grad
    assert automatic == ("reinforce" if discrete else "dynamics")


@float64
def test_discount_head_learns_gamma_of_what_goes_on():
    """The gradient vanishes at gamma where no episode terminates, at 0 where one does; a time limit is no end. What
    it predicts is the discount itself, no gamma on top; without the head it is always gamma."""
    agent = make_agent(gamma=0.9)
    rows = make_rows()
    logits = torch.randn(T, B, 1, requires_grad=True)
    agent.world.cont.forward = lambda feat: logits
    loss, _, _ = world_loss(agent, rows)
    grad, = torch.autograd.grad(loss, logits)
    target = (logits.sigmoid() - grad * T * B / agent.args.discount_scale)[..., 0]
    assert torch.allclose(target, 0.9 * (1 - rows["is_terminal"].double()))
    feat = torch.zeros(T, B, agent.world.feat)
    assert torch.equal(agent.world.predict_cont(feat), logits[..., 0].sigmoid())
    without = make_agent(gamma=0.9, pred_discount=False)
    assert torch.equal(without.world.predict_cont(feat), torch.full((T, B), 0.9))


@float64
@pytest.mark.parametrize("transform", ["tanh", "identity"])
def test_replayed_rewards_are_squashed_on_request(transform):
    agent = make_agent(reward_transform=transform)
    rows = make_rows()
    predicted = torch.randn(T, B, requires_grad=True)
    agent.world.predict_reward = lambda feat: predicted
    loss, _, _ = world_loss(agent, rows)
    grad, = torch.autograd.grad(loss, predicted)
    target = predicted - grad * T * B
    wanted = rows["reward"].tanh() if transform == "tanh" else rows["reward"]
    assert torch.allclose(target, wanted)


# ---- what each loss trains ----


PARTS = ("encoder", "rssm.prior", "rssm", "decoder", "reward", "cont", "actor", "slow_critic", "critic")


def reached(agent):
    """Parts with a gradient that is not zero."""
    found = set()
    for name, parameter in agent.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            found.add(next(part for part in PARTS if part in name))
    return found


@float64
@pytest.mark.parametrize("loss, parts", [
    ("image", "encoder rssm decoder"), ("reward", "encoder rssm reward"), ("cont", "encoder rssm cont"),
    ("kl", "encoder rssm rssm.prior")])
def test_reach_of_the_world_models_losses(loss, parts):
    agent = make_agent(kl_scale=float(loss == "kl"), discount_scale=float(loss == "cont"))
    if loss != "image":
        agent.world.decoder.forward = lambda deter, stoch: torch.zeros(T, B, 64, 64, 1)
    if loss != "reward":
        agent.world.predict_reward = lambda feat: torch.zeros(T, B)
    total, post, _ = world_loss(agent, make_rows())
    total.backward()
    assert reached(agent) == set(parts.split())
    assert not post["deter"].requires_grad and not post["stoch"].requires_grad


@float64
@pytest.mark.parametrize("discrete, grad, loss, parts", [
    (True, "reinforce", "policy", "actor"),
    (False, "reinforce", "policy", "actor"),
    (True, "dynamics", "policy", "actor rssm rssm.prior reward cont"),
    (False, "dynamics", "policy", "actor rssm rssm.prior reward cont"),
    (True, "dynamics", "value", "critic"),
    (True, "reinforce", "value", "critic")])
def test_reach_of_the_behaviours_losses(discrete, grad, loss, parts):
    """Dynamics goes through rewards, discounts and latents, not into what was replayed, nor into a critic."""
    agent = make_agent(discrete, actor_grad=grad)
    dream_losses(agent)[loss].backward()
    assert reached(agent) == set(parts.split())


@float64
@ESTIMATORS
def test_each_optimizer_moves_its_own_parameters(discrete, grad):
    """Every tensor of its part changes by its own rate, no other one does; the slow critic never."""
    rates = dict(model_lr=1e-3, actor_lr=2e-3, critic_lr=3e-3)
    agent = make_agent(discrete, actor_grad=grad, adam_eps=1e-12, weight_decay=0.0, **rates)
    optimizer = v2.Optimizers(agent, agent.args)
    losses = {
        "model": lambda: world_loss(agent, make_rows(discrete))[0],
        "actor": lambda: dream_losses(agent)["policy"],
        "critic": lambda: dream_losses(agent)["value"],
    }
    prefixes = dict(model="world.", actor="behaviour.actor", critic="behaviour.critic.")
    for part, prefix in prefixes.items():
        before = copy.deepcopy(agent.state_dict())
        getattr(optimizer, part).step(losses[part]())
        changed = {k: (p - before[k]).abs().max().item() for k, p in agent.named_parameters()}
        assert {k for k in changed if changed[k]} == {k for k in changed if k.startswith(prefix)}
        assert max(changed.values()) == pytest.approx(rates[f"{part}_lr"], rel=1e-4), "Adam's first step is the rate"


def replay_of(rows):
    return SimpleNamespace(sample=lambda batch_size, length: dict(rows))


@float64
def test_one_update():
    """Dreams begin in the states from before the world model's step and run in the weights from after it; the slow
    critic gets the weights that the critic has after its step."""
    agent = make_agent(model_lr=0.01)
    old = copy.deepcopy(agent)
    rows = make_rows()
    seen = {}
    imagine = agent.behaviour.imagine

    def watch(rssm, deter, stoch):
        seen["start"] = deter, stoch
        seen["feat"], seen["action"] = imagine(rssm, deter, stoch)
        return seen["feat"], seen["action"]

    agent.behaviour.imagine = watch
    draws = dream_draws(True)["onehots"]
    with forced_samples(*latents(T, B), *draws):
        v2.train_step(agent, v2.Optimizers(agent, agent.args), replay_of(rows), B)
    _, post, _ = world_loss(old, rows)
    assert torch.equal(seen["start"][0], post["deter"].flatten(0, 1))
    assert torch.equal(seen["start"][1], post["stoch"].flatten(0, 1))
    new_deter = plain_core(agent.world.rssm, *seen["start"], seen["action"][0])
    old_deter = plain_core(old.world.rssm, *seen["start"], seen["action"][0])
    assert relative(seen["feat"][1, :, :D], new_deter) < 1e-12
    assert relative(seen["feat"][1, :, :D], old_deter) > 1e-3

    for slow, critic, before in zip(
            agent.behaviour.slow_critic.parameters(), agent.behaviour.critic.parameters(),
            old.behaviour.critic.parameters()):
        assert torch.equal(slow, critic)
        assert not torch.equal(critic, before)


@DISCRETE
def test_an_update_in_bf16_moves_every_network(discrete):
    """Values and rewards stay float32; actor and world model get gradients although the dream ran without."""
    for grad in ("reinforce", "dynamics"):
        agent = make_agent(discrete, actor_grad=grad, precision="bf16", weight_decay=0.0)
        before = copy.deepcopy(agent.state_dict())
        rows = {k: v.float() if v.is_floating_point() else v for k, v in make_rows(discrete).items()}
        metrics = v2.train_step(agent, v2.Optimizers(agent, agent.args), replay_of(rows), B)
        assert all(torch.as_tensor(value).isfinite() for value in metrics.values())
        assert not [k for k, p in agent.named_parameters() if torch.equal(p, before[k])]
        with agent.autocast():
            feat = torch.zeros(2, agent.world.feat, dtype=torch.bfloat16)
            assert agent.world.predict_reward(feat).dtype == torch.float32
            assert agent.behaviour.critic(feat).dtype == torch.float32
            assert agent.behaviour.slow_critic(feat).dtype == torch.float32


# ---- optimiser ----


@float64
@pytest.mark.parametrize("lr", [1e-5, 0.5])
def test_weight_decay_ignores_the_learning_rate(lr):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(3, 4))
    start = w.detach().clone()
    optimizer = v2.Adam([w], lr, v2.Args())
    for k in range(1, 11):
        assert optimizer.step(0 * w.sum()) == 0
        assert (w / start - (1 - 1e-6) ** k).abs().max() < 1e-14


@float64
def test_optimizer_equals_its_scalar_form():
    """Joint clipping of two tensors, decay before the step, Keras' epsilon with gradients as small as it."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(3))]
    args = replace(v2.Args(), grad_clip=10.0, weight_decay=1e-3)
    optimizer = v2.Adam(params, 0.01, args)
    w = torch.cat([p.detach().flatten() for p in params])
    m = torch.zeros(9)
    v = torch.zeros(9)
    for k, scale in enumerate((1e-4, 100.0, 1e-5, 3.0), 1):
        g = scale * torch.randn(9)
        loss = (g[:6] * params[0].flatten()).sum() + (g[6:] * params[1]).sum()
        norm = optimizer.step(loss)
        assert norm.item() == pytest.approx(g.norm().item())
        assert (norm > 10) == (scale == 100)
        g = g * min(1, 10 / g.norm())
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        step = m * math.sqrt(1 - 0.999**k) / (1 - 0.9**k) / (v.sqrt() + 1e-5)
        w = (1 - 1e-3) * w - 0.01 * step
        ours = torch.cat([p.detach().flatten() for p in params])
        assert relative(ours, w) < 1e-12


def test_slow_critic_is_copied_after_updates_1_and_101():
    behaviour = make_agent().behaviour
    copied = []
    for update in range(1, 302):
        with torch.no_grad():
            for p in behaviour.critic.parameters():
                p.add_(torch.randn_like(p))
        before = copy.deepcopy(behaviour.slow_critic.state_dict())
        behaviour.update_slow_critic()
        after = behaviour.slow_critic.state_dict()
        if all(torch.equal(after[k], p) for k, p in behaviour.critic.state_dict().items()):
            copied.append(update)
        else:
            assert all(torch.equal(after[k], before[k]) for k in before)
    assert copied == [1, 101, 201, 301]


def test_slow_critic_moves_by_its_rate_after_a_first_full_copy():
    behaviour = make_agent(slow_rate=0.25, slow_every=2).behaviour
    fast = next(behaviour.critic.parameters())
    slow = next(behaviour.slow_critic.parameters())
    for share in (1.0, 0.0, 0.25, 0.0, 0.25):
        fast.data.normal_()
        wanted = (1 - share) * slow + share * fast.detach()
        behaviour.update_slow_critic()
        assert torch.allclose(slow, wanted)


# ---- replay ----


def make_replay(folder, capacity=1000, num_envs=1, length=5, prioritize_ends=True, new=True):
    specs = v2.replay_specs({"image": (1, 1, 1)}, 1)
    return v2.Replay(specs, capacity, num_envs, folder, torch.device("cpu"), new=new, length=length,
                     prioritize_ends=prioritize_ends)


def add_episode(replay, rows, begin=True, end=True):
    """`rows` rows in all environments; the reward is the row's number in replay, the action one more."""
    for t in range(rows):
        number = np.full(replay.num_envs, replay.rows, np.float32)
        last = np.full(replay.num_envs, end and t == rows - 1)
        replay.add(dict(
            image=np.zeros((replay.num_envs, 1, 1, 1), np.uint8), reward=number, action=number[:, None] + 1,
            is_first=np.full(replay.num_envs, begin and t == 0), is_last=last, is_terminal=last))


def test_sampled_rows_are_aligned_and_of_one_episode(tmp_path):
    """The stored action was chosen on its row: that of the row before led to an observation."""
    torch.manual_seed(0)
    replay = make_replay(tmp_path)
    for rows in (9, 12, 7):
        add_episode(replay, rows)
    batch = replay.sample(500, 5)
    number = batch["reward"]
    assert number.shape == (5, 500)
    assert torch.equal(number, number[:1] + torch.arange(5)[:, None])
    assert torch.equal(batch["prev_action"][1:, :, 0], number[:-1] + 1)
    assert not batch["prev_action"][0].any()
    assert batch["is_first"][0].all()
    assert not batch["is_first"][1:].any()
    assert not batch["is_last"][:-1].any()
    assert set(number[0].int().tolist()) == {*range(0, 5), *range(9, 17), *range(21, 24)}


@pytest.mark.parametrize("prioritize_ends", [True, False])
def test_an_episode_uniformly_then_a_start_in_it(prioritize_ends, tmp_path):
    """The last chunk of an episode of R rows has probability (L+1)/(R+1), or 1/(R-L+1) without prioritised ends."""
    torch.manual_seed(0)
    replay = make_replay(tmp_path, prioritize_ends=prioritize_ends)
    add_episode(replay, 9)
    add_episode(replay, 29)
    start = replay.sample(20_000, 5)["reward"][0]
    short = start < 9
    assert short.float().mean().item() == pytest.approx(0.5, abs=0.02)
    for rows, chunk in ((9, start[short]), (29, start[~short] - 9)):
        last = chunk == rows - 5
        wanted = 6 / (rows + 1) if prioritize_ends else 1 / (rows - 4)
        assert last.float().mean().item() == pytest.approx(wanted, abs=0.02)
        others = chunk[~last].long().bincount(minlength=rows - 5) / (~last).sum()
        assert others.max() - others.min() < 0.06


def test_old_episodes_leave_as_a_whole(tmp_path):
    torch.manual_seed(0)
    replay = make_replay(tmp_path, capacity=20)
    for _ in range(3):
        add_episode(replay, 8)
        first = replay.sample(100, 5)["reward"][0]
        assert first.min() >= max(replay.rows - 16, 0), "an episode of which a row was overwritten is gone"
    add_episode(replay, 5)
    first = replay.sample(100, 5)["reward"][0]
    assert set(first.int().tolist()) == {16, 17, 18, 19}, "nor is one of five rows used, which has four steps"


def test_episodes_are_found_again_after_a_resume(tmp_path):
    replay = make_replay(tmp_path, num_envs=2)
    for rows in (8, 3, 9):
        add_episode(replay, rows)
    add_episode(replay, 4, end=False)
    again = make_replay(tmp_path, num_envs=2, new=False)
    again.load_state_dict(replay.state_dict(), lost=0)
    assert again.episodes == replay.episodes
    assert len(again.episodes) == 4
    add_episode(again, 6)
    assert len(again.episodes) == 6


@pytest.mark.parametrize("rows, end, allowed", [(5, True, 99), (10, False, 5)])
def test_episodes_that_can_never_be_replayed(rows, end, allowed, tmp_path, capsys):
    """A hundred that are too short, or one that goes on although it has filled the replay."""
    replay = make_replay(tmp_path, capacity=50)
    for k in range(allowed):
        add_episode(replay, rows, end=end, begin=end or k == 0)
        replay.check_usable()
    add_episode(replay, rows, end=end, begin=end)
    with pytest.raises(SystemExit) as exit:
        replay.check_usable()
    assert exit.value.code == 2
    assert "no episode can be replayed" in capsys.readouterr().err
    add_episode(replay, 6)
    replay.check_usable()


# ---- a run ----


class Longer(envs.Scripted):
    """Two episodes of seven steps, then one without end."""

    def __init__(self):
        super().__init__(image=True)
        self.resets = 0

    def reset(self, *, seed=None, options=None):
        self.resets += 1
        if self.resets > 2:
            self.length = 10**9
        return super().reset(seed=seed)


gymnasium.register("V2Scripted-v0", entry_point=envs.Scripted, kwargs=dict(image=True))
gymnasium.register("V2Longer-v0", entry_point=Longer)


def run(folder, **flags):
    """`main` of a tiny run, with signals as they were afterwards."""
    small = dict(
        SIZES, env_id="V2Scripted-v0", device="cpu", run_dir=folder, eval_episodes=0, eval_every=0, video_every=0,
        batch_size=2, learning_starts=8, train_every=4, total_timesteps=24)
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in {**small, **flags}.items()]
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        v2.main(v2.parse_args(argv))
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)


@pytest.mark.parametrize("num_envs, wanted", [
    (1, [8, 8, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48]), (3, [21, 21, 21, 27, 30, 33, 39, 42, 45])])
def test_updates_of_a_run(num_envs, wanted, tmp_path):
    """1 + pretrain after the random steps and the first episode, then one every `train_every` policy steps."""
    steps = []

    def train_step(agent, optimizer, replay, batch_size):
        resets = -(-replay.rows // 8)  # one row in eight is no step
        steps.append(num_envs * (replay.rows - resets))
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v2, "train_step", train_step)
        run(tmp_path, pretrain=2, num_envs=num_envs, total_timesteps=48)
    assert steps == wanted


@pytest.mark.parametrize("flags", [dict(), dict(learning_starts=40)])
def test_an_episode_without_end_stops_a_run_with_a_message(flags, tmp_path, capsys):
    """Before and after the first update."""
    with pytest.raises(SystemExit) as exit:
        run(tmp_path, env_id="V2Longer-v0", buffer_size=30, total_timesteps=200, **flags)
    assert exit.value.code == 2
    assert "no episode can be replayed" in capsys.readouterr().err


# ---- breakages, each of which a test above must see ----


def swap_kl_shares(patch, m):
    kl_loss = m.kl_loss
    patch.setattr(m, "kl_loss", lambda post, prior, balance, free: kl_loss(post, prior, 1 - balance, free))


def flip_time(patch, m):
    lambda_return = m.lambda_return
    patch.setattr(m, "lambda_return", lambda reward, value, cont, lam: lambda_return(
        reward, value, cont, lam).flip(0))


def keep_the_chosen_action(patch, m):
    sample = m.Replay.sample

    def unshifted(self, batch_size, length):
        batch = sample(self, batch_size, length)
        batch["prev_action"] = batch["prev_action"].roll(-1, 0)
        return batch

    patch.setattr(m.Replay, "sample", unshifted)


def skip_resets(patch, m):
    observe = m.RSSM.observe
    patch.setattr(m.RSSM, "observe", lambda self, tokens, action, first, deter, stoch: observe(
        self, tokens, action, first & False, deter, stoch))


def let_the_critic_train_the_model(patch, m):
    def critic_loss(self, feat, target, weight):
        value = self.critic(feat[:-1])[..., 0]
        return (weight[:-1] * m.normal_nll(value, target.detach())).mean(), value

    patch.setattr(m.Behaviour, "critic_loss", critic_loss)


def pair_action_with_its_own_state(patch, m):
    actor_loss = m.Behaviour.actor_loss
    patch.setattr(m.Behaviour, "actor_loss", lambda self, feat, action, target, slow_value, weight: actor_loss(
        self, feat, action, target.roll(1, 0), slow_value, weight))


def predict_known_ends(patch, m):
    returns = m.Behaviour.returns
    patch.setattr(m.Behaviour, "returns", lambda self, world, feat, is_terminal: returns(
        self, world, feat, is_terminal & False))


def invert_rho(patch, m):
    init = m.Behaviour.__init__

    def inverted(self, feat, action_dim, discrete, args):
        init(self, feat, action_dim, discrete, replace(args, rho=1 - args.rho))

    patch.setattr(m.Behaviour, "__init__", inverted)


def scale_decay_by_the_rate(patch, m):
    init = m.Adam.__init__

    def scaled(self, params, lr, args):
        init(self, params, lr, replace(args, weight_decay=lr * args.weight_decay))

    patch.setattr(m.Adam, "__init__", scaled)


def multiply_gamma_twice(patch, m):
    predict_cont = m.WorldModel.predict_cont
    patch.setattr(m.WorldModel, "predict_cont", lambda self, feat: self.args.gamma * predict_cont(self, feat))


def in_a_folder(test):
    with tempfile.TemporaryDirectory() as folder:
        test(Path(folder))


MUTATIONS = {
    "action left with the row it was chosen on": (
        keep_the_chosen_action, lambda: in_a_folder(test_sampled_rows_are_aligned_and_of_one_episode)),
    "shares of the KL swapped": (swap_kl_shares, test_kl_balancing_gives_the_prior_its_share),
    "time flipped in the returns": (flip_time, test_lambda_return_equals_its_definition),
    "no reset inside a sequence": (skip_resets, test_nothing_passes_the_beginning_of_an_episode),
    "critic's loss bends the world model": (
        let_the_critic_train_the_model, lambda: test_reach_of_the_behaviours_losses(True, "dynamics", "value", "critic")),
    "action paired with its own state's target": (
        pair_action_with_its_own_state, lambda: test_which_reward_matters(True, "reinforce")),
    "known ends ignored": (predict_known_ends, test_a_dream_from_a_terminal_state_teaches_only_its_first_state),
    "rho inverted": (invert_rho, lambda: test_rho_is_the_share_of_reinforce(True)),
    "weight decay times learning rate": (
        scale_decay_by_the_rate, lambda: test_weight_decay_ignores_the_learning_rate(1e-5)),
    "gamma on top of the predicted discount": (
        multiply_gamma_twice, test_discount_head_learns_gamma_of_what_goes_on),
}
