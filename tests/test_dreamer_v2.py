"""What only DreamerV2 has: its formulas against plain versions written here, in float64, and what each loss trains."""
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import load
from naive_dreamer_v2 import NaiveUpdate
from test_golden_dreamer_v2 import spy
from torch import nn

v2 = load("dreamer_v2")
F64, CPU = torch.float64, torch.device("cpu")
T, B, H, A = 5, 3, 4, 3
SMALL = dict(stoch=4, classes=5, deter=8, hidden=7, cnn_depth=2, layers=2, units=9, batch_length=T, imag_horizon=H)
GRADIENTS = pytest.mark.parametrize("discrete, grad", [
    (True, "reinforce"), (True, "dynamics"), (False, "dynamics"), (False, "reinforce")])


def rand(*shape):
    return torch.randn(shape, dtype=F64)


def relative(ours, plain):
    assert ours.shape == plain.shape
    return (ours - plain).abs().max() / plain.abs().max().clamp(min=1e-30)


def shake(module):
    """float64, and no parameter at a value such as 0 or 1 that hides a mistake."""
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p += 0.2 * torch.randn_like(p)
    return module


def small_agent(discrete=True, **flags):
    torch.manual_seed(0)
    return shake(v2.Agent({"image": (64, 64, 1)}, A, discrete, replace(v2.Args(), **{**SMALL, **flags})))


def rows(discrete=True, seed=0):
    """Replay rows (T,B,...): a reset in the middle of column 0, a terminal row in column 1, a truncated one in 2."""
    torch.manual_seed(seed)
    flags = {k: torch.zeros(T, B, dtype=torch.bool) for k in ("is_first", "is_last", "is_terminal")}
    flags["is_first"][0] = flags["is_first"][3, 0] = True
    flags["is_last"][2, 0] = flags["is_terminal"][4, 1] = flags["is_last"][4, 1] = flags["is_last"][4, 2] = True
    action = F.one_hot(torch.randint(A, (T, B)), A).double() if discrete else rand(T, B, A).tanh()
    return dict(flags, image=torch.randint(256, (T, B, 64, 64, 1)).byte(), action=action, reward=rand(T, B))


def single(batch):
    return {k: v.float() if v.dtype == F64 else v for k, v in batch.items()}


def replay_of(batch):
    return SimpleNamespace(sample=lambda batch_size: dict(batch))


def use_noise(agent, steps=T):
    """Draw the noise of an update once, for all calls that follow."""
    rssm, behaviour, dreams = agent.world.rssm, agent.behaviour, (H, steps * B)
    noise = dict(post=rssm.noise(steps, B), action=behaviour.noise(*dreams), prior=rssm.noise(*dreams))
    noise = {k: x.to(rssm.gru.weight.dtype) for k, x in noise.items()}
    rssm.noise = lambda *lead: noise["post" if lead == (steps, B) else "prior"]
    behaviour.noise = lambda *lead: noise["action"]
    return noise


def dream(agent, post=None, coefs=(1e-2, 0.7)):
    """The behaviour's losses for the same rows and noise each time."""
    batch = rows(agent.behaviour.discrete)
    torch.manual_seed(1)
    if post is None:
        post = agent.world.loss(batch)[1]
    return agent.behaviour.loss(agent.world, post, batch, torch.tensor(coefs, dtype=F64))[0]


# ---- KL, samples ----


@pytest.mark.parametrize("share", [0.8, 0.3])
def test_kl_balancing_gives_the_prior_its_share(share):
    """Of the gradient of the plain KL, which is that of balance 0.5, the prior gets a and the posterior 1 - a."""
    torch.manual_seed(0)
    post, prior = (rand(3, 2, 4, 5).requires_grad_() for _ in range(2))
    q, p = post.softmax(-1), prior.softmax(-1)
    plain = (q * (q / p).log()).sum((-1, -2))
    wanted, results = torch.autograd.grad(plain.mean(), (post, prior)), {}
    for balance in (0.5, share):
        loss, kl = v2.kl_losses(post, prior, balance, 0.0)
        assert relative(kl, plain) < 1e-12 and relative(loss, plain.mean()) < 1e-12
        assert not kl.requires_grad
        results[balance] = torch.autograd.grad(loss, (post, prior))
    assert max(map(relative, results[0.5], wanted)) < 1e-12
    assert relative(results[share][0], (1 - share) * wanted[0]) < 1e-12
    assert relative(results[share][1], share * wanted[1]) < 1e-12


def test_free_nats_stop_both_sides_by_the_mean_of_the_batch():
    """1.1 times the mean KL of the batch trains nothing, 0.9 times it every state, also those with less KL."""
    torch.manual_seed(0)
    post, prior = (rand(3, 2, 4, 5).requires_grad_() for _ in range(2))
    _, kl = v2.kl_losses(post, prior, 0.8, 0.0)
    mean = kl.mean().item()
    assert kl.min() < 0.85 * mean
    state_by_state, _ = v2.kl_losses(post, prior, 0.5, mean)
    assert relative(state_by_state, kl.clamp(min=mean).mean()) < 1e-12
    for balance in (0.2, 0.8):
        loss, _ = v2.kl_losses(post, prior, balance, 1.1 * mean)
        assert loss.item() == pytest.approx(1.1 * mean, rel=1e-12)
        assert not any(g.any() for g in torch.autograd.grad(loss, (post, prior)))
        free, _ = v2.kl_losses(post, prior, balance, 0.9 * mean)
        whole, _ = v2.kl_losses(post, prior, balance, 0.0)
        for a, b in zip(torch.autograd.grad(free, (post, prior)), torch.autograd.grad(whole, (post, prior))):
            assert relative(a, b) < 1e-12


def test_straight_through_sample():
    """Exactly one-hot, with the softmax Jacobian times the cotangent as gradient."""
    torch.manual_seed(0)
    logits, cotangent = (3 * rand(50, 5)).requires_grad_(), rand(50, 5)
    sample = v2.sample_onehot(logits.softmax(-1), rand(50, 5).exponential_())
    assert set(sample.unique().tolist()) == {0, 1} and (sample.sum(-1) == 1).all()
    grad, = torch.autograd.grad((cotangent * sample).sum(), logits)
    p = logits.detach().softmax(-1)
    jacobian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    assert relative(grad, torch.einsum("nij,nj->ni", jacobian, cotangent)) < 1e-12


# ---- truncated normal ----


def integral(function, high):
    """Of function (n,...) over [-1, high] by 100 Gauss-Legendre nodes, `high` (...) -> (...)."""
    x, weight = torch.tensor(np.array(np.polynomial.legendre.leggauss(100))).view(2, 100, *[1] * high.dim())
    half = (high + 1) / 2
    return (half * weight * function((x + 1) * half - 1)).sum(0)


def truncated(exact_grad=False):
    """Seven policies of one action from wide to narrow, raw as a leaf."""
    raw = torch.tensor([[0, 0], [1, 0], [-3, 0], [0.3, -2], [2, -3], [-1, 2], [0, 5]], dtype=F64, requires_grad=True)
    return raw, v2.TruncatedNormal(raw, exact_grad)


def test_truncated_normal_is_a_distribution():
    """Its density has mass 1, its entropy is -E[ln p]; mean tanh(m), deviation 2 sigmoid(s / 2) + 0.1, at first 1.1."""
    raw, policy = truncated()
    one, density = torch.ones(7, dtype=F64), lambda x: policy.log_prob(x[..., None]).exp()
    assert torch.allclose(integral(density, one), one, rtol=1e-12)
    entropy = integral(lambda x: -density(x) * policy.log_prob(x[..., None]), one)
    assert torch.allclose(policy.entropy(), entropy, rtol=1e-10)
    assert torch.equal(policy.mean, raw[:, :1].tanh()) and policy.std[0].item() == pytest.approx(1.1)
    assert policy.std[:, 0].tolist() == pytest.approx([2 / (1 + math.exp(-s / 2)) + 0.1 for s in raw[:, 1].tolist()])
    assert policy.entropy()[0] > policy.entropy()[1] > policy.entropy()[2], "largest at mean 0"
    ratio = policy.log_prob(policy.mean) - policy.log_prob(policy.mean + 0.5 * policy.std)
    assert torch.allclose(ratio, 0.125 * one), "the shape is that of a normal of this deviation"
    joint = v2.TruncatedNormal(torch.cat([raw[:, :1].T, raw[:, 1:].T], 1), False)  # seven independent dimensions
    assert torch.allclose(joint.entropy(), policy.entropy().sum())
    assert torch.allclose(joint.log_prob(torch.zeros(1, 7)), policy.log_prob(torch.zeros(7, 1)).sum())


def test_truncated_normal_samples_by_inverse_cdf():
    """The probability below a sample is its noise; the ends are 1e-6 inside the limits."""
    _, policy = truncated()
    for u in (0.001, 0.1, 0.5, 0.77, 0.999):
        x = policy.sample(torch.full((7, 1), u, dtype=F64))
        below = integral(lambda x: policy.log_prob(x[..., None]).exp(), x[:, 0])
        assert torch.allclose(below, torch.full_like(below, u), rtol=1e-8)
    for u, end in ((0.0, -1 + 1e-6), (1.0, 1 - 1e-6)):
        x = policy.sample(torch.full((7, 1), u, dtype=F64))
        inside = (end - policy.mean).abs() < 6 * policy.std  # else the normal has no mass there
        assert torch.allclose(x[inside], torch.tensor(end, dtype=F64), rtol=1e-12) and inside.sum() >= 5


def test_gradient_of_a_truncated_normal_sample():
    """Official: 1 and (x - mean) / std, also at the clipped ends. Exact: that of the inverse CDF, by its density."""
    for u in (0.0, 0.2, 0.9):
        _, policy = truncated()
        x = policy.sample(torch.full((7, 1), u, dtype=F64))
        to_mean, to_std = torch.autograd.grad(x.sum(), (policy.mean, policy.std))
        assert torch.equal(to_mean, torch.ones_like(x))
        assert torch.allclose(to_std, (x - policy.mean) / policy.std, rtol=1e-12, atol=3e-6 if u == 0 else 0)
    raw, policy = truncated(exact_grad=True)
    x = policy.sample(torch.full((7, 1), 0.2, dtype=F64))
    below = integral(lambda x: policy.log_prob(x[..., None]).exp(), x[:, 0].detach())
    density = policy.log_prob(x.detach()).exp().detach()
    wanted, = torch.autograd.grad((-below / density).sum(), raw, retain_graph=True)
    assert relative(torch.autograd.grad(x.sum(), raw)[0], wanted) < 1e-9


@pytest.mark.parametrize("exact", [True, False])
def test_truncated_normal_stays_finite_in_float32(exact):
    """For saturated networks and the rarest noise: samples inside the limits, everything with finite gradients."""
    grid = torch.linspace(-50, 50, 101)
    raw = torch.cartesian_prod(grid, grid).requires_grad_()
    policy, noise = v2.TruncatedNormal(raw, exact), v2.Behaviour(4, 1, False, replace(v2.Args(), **SMALL)).noise
    rarest = noise(1_000_000).aminmax()
    assert rarest[0] > 0 and rarest[1] < 1 and (rarest[1] - rarest[0]) > 0.9999
    for u in rarest:
        sample = policy.sample(u.expand(len(raw), 1))
        assert sample.abs().max() < 1
        values = sample, policy.log_prob(sample.detach()), policy.entropy()
        grads = [torch.autograd.grad(x.sum(), raw, retain_graph=True)[0] for x in values]
        assert all(x.isfinite().all() for x in (*values, *grads))


# ---- returns, schedules ----


def test_lambda_return_equals_its_definition():
    """(1-lam) sum_n lam^(n-1) G_n with n-step returns G_n; nothing is symmetric in time."""
    torch.manual_seed(0)
    reward, value, discount, lam = rand(7, 3, 2), rand(7, 3, 2), torch.rand(7, 3, 2, dtype=F64), 0.95
    discount[3, 0] = 0
    target = v2.lambda_return(reward, value, discount, lam)
    assert target.shape == (6, 3, 2)
    for t in range(6):
        total, rewards, live = 0, 0, 1
        for n in range(1, 6 - t + 1):
            rewards = rewards + live * reward[t + n - 1]
            live = live * discount[t + n - 1]
            share = lam ** (n - 1) * (1 - lam if n < 6 - t else 1)
            total = total + share * (rewards + live * value[t + n])
        assert relative(target[t], total) < 1e-12


def test_the_last_state_lends_only_its_value():
    reward, value, discount = inputs = [torch.rand(5, 2, dtype=F64).requires_grad_() for _ in range(3)]
    target = v2.lambda_return(*inputs, 0.95)
    assert torch.allclose(target[-1], reward[-2] + discount[-2] * value[-1])
    to_reward, to_value, to_discount = torch.autograd.grad(target[-1].sum(), inputs)
    assert torch.allclose(to_value[-1], discount[-2]) and not to_value[:-1].any()
    assert not to_reward[-1].any() and not to_discount[-1].any() and not to_reward[:-2].any()


def test_schedule():
    cases = {"0.5": [0.5] * 4, "1e-3": [1e-3] * 4, "linear(1,3,10)": [1, 2, 3, 3], "warmup(10,4)": [0, 2, 4, 4],
             "exp(3,1,10)": [3, 1 + 2 * 0.5**0.5, 2, 1.5], "horizon(100,1000,10)": [0.99, 1 - 1 / 550, 0.999, 0.999]}
    for text, values in cases.items():
        assert [v2.schedule(text, step) for step in (0, 5, 10, 20)] == pytest.approx(values), text
    for text in ("", "fast", "linear(1,2)", "linear(1,2,3,4)", "warmup(1,2,3)", "exp(a,b,c)", "cosine(1,2,3)",
                 "linear(1,2,3", "2 linear(1,2,3)", "linear(1,2,3) 2"):
        with pytest.raises(ValueError):
            v2.schedule(text, 0)


# ---- behaviour ----


@pytest.mark.parametrize("discrete, grad", [(True, "reinforce"), (True, "both"), (True, "dynamics"),
                                            (False, "dynamics"), (False, "both")])
def test_which_reward_matters(discrete, grad, monkeypatch):
    """An action leads to its state's reward: r_0 came before the first one. Of the last state only the value counts."""
    agent = small_agent(discrete, actor_grad=grad)
    table, found = torch.zeros(H + 1, 1, 1, dtype=F64), []
    post = agent.world.loss(rows(discrete))[1]
    monkeypatch.setattr(agent.world.reward, "forward", lambda feat: table.expand(-1, feat.shape[1], 1))
    for k in (None, 0, 1, H - 1, H):
        table.zero_()
        if k is not None:
            table[k] = 10
        losses = dream(agent, post)
        found.append((losses["policy"].item(), losses["value"].item()))
    (actor, critic), *changed = found
    moved = [(a != actor, c != critic) for a, c in changed]
    assert moved == [(False, True), (True, True), (True, True), (False, False)]


def test_a_dream_from_a_terminal_state_teaches_only_its_first_state(monkeypatch):
    """w_0 = 1 and d_0 = 0 there: the gradient is zero from index 1 on, and nowhere else."""
    agent = small_agent()
    nets = agent.behaviour.actor[-1], agent.behaviour.critic  # the logits, the value
    actor, critic = (spy(monkeypatch, net, "forward") for net in nets)
    losses = dream(agent)
    alive = torch.ones(T * B, dtype=torch.bool)
    alive[4 * B + 1] = False
    for name, calls, count in (("policy", actor, H - 1), ("value", critic, H)):
        grad, = torch.autograd.grad(losses[name], calls[-1][1])
        used = grad.abs().sum(-1) != 0
        assert used[0].all() and torch.equal(used[1:], alive.expand(count - 1, -1)), name


@pytest.mark.parametrize("discrete", [True, False])
def test_rho_is_the_share_of_reinforce(discrete):
    """both: rho = 1 is reinforce, rho = 0 dynamics, and between them losses and gradients are mixed linearly."""
    results = {}
    for grad, rho in (("reinforce", 0.0), ("dynamics", 1.0), ("both", 1.0), ("both", 0.0), ("both", 0.7)):
        agent = small_agent(discrete, actor_grad=grad)
        loss = dream(agent, coefs=(1e-2, rho))["policy"]
        grads = torch.autograd.grad(loss, list(agent.behaviour.actor.parameters()))
        results[grad, rho] = torch.cat([loss.detach()[None], *[g.flatten() for g in grads]])
    reinforce, dynamics = results["reinforce", 0.0], results["dynamics", 1.0]
    assert relative(reinforce, dynamics) > 0.1
    assert relative(results["both", 1.0], reinforce) < 1e-12
    assert relative(results["both", 0.0], dynamics) < 1e-12
    assert relative(results["both", 0.7], 0.7 * reinforce + 0.3 * dynamics) < 1e-12


def test_gradient_estimator_by_default():
    assert small_agent(True).behaviour.actor_grad == "reinforce"
    assert small_agent(False).behaviour.actor_grad == "dynamics"


@GRADIENTS
def test_losses_of_a_dream_from_scratch(discrete, grad, monkeypatch):
    """The whole objective, term by term in loops, from the states and actions that were dreamt."""
    agent, bonus = small_agent(discrete, actor_grad=grad), 0.01
    dreams = spy(monkeypatch, agent.behaviour, "imagine")
    losses = dream(agent, coefs=(bonus, 0.7))
    feat, action = (x.detach() for x in dreams[0][1])
    world, behaviour = agent.world, agent.behaviour
    with torch.no_grad():
        reward, value, slow = (net(feat)[..., 0] for net in (world.reward, behaviour.critic, behaviour.slow_critic))
        discount, policy = world.discount(feat)[..., 0].sigmoid(), behaviour.policy(feat[:-2])
    discount[0] = 0.999 * (1 - rows()["is_terminal"].flatten().double())
    log_prob = (policy * action[:-1]).sum(-1) if discrete else policy.log_prob(action[:-1])
    entropy = v2.entropy(policy) if discrete else policy.entropy()
    actor_loss = critic_loss = 0
    for n in range(T * B):
        target, weight = [slow[H, n]], [1.0]
        for t in reversed(range(H)):
            target.insert(0, reward[t, n] + discount[t, n] * (0.05 * slow[t + 1, n] + 0.95 * target[0]))
        for t in range(H):
            critic_loss += weight[t] * (0.5 * (value[t, n] - target[t]) ** 2 + 0.5 * math.log(2 * math.pi))
            weight.append(weight[t] * discount[t, n])
        for t in range(H - 1):
            gain = target[t + 1] if grad == "dynamics" else log_prob[t, n] * (target[t + 1] - slow[t, n])
            actor_loss -= weight[t] * (gain + bonus * entropy[t, n])
    assert losses["policy"].item() == pytest.approx(actor_loss.item() / (T * B * (H - 1)), rel=1e-10)
    assert losses["value"].item() == pytest.approx(critic_loss.item() / (T * B * H), rel=1e-10)


def test_discount_head_learns_gamma_of_what_goes_on(monkeypatch):
    """Its gradient vanishes at gamma where no episode terminates, at 0 where one does; truncation is no end. What it
    predicts is the discount itself: no gamma on top. Without the head it is gamma."""
    agent, batch = small_agent(gamma=0.9), rows()
    logits = rand(T, B, 1).requires_grad_()
    monkeypatch.setattr(agent.world.discount, "forward", lambda feat: logits)
    loss, post, _ = agent.world.loss(batch)
    grad, = torch.autograd.grad(loss, logits)
    target = (logits.sigmoid() - grad * T * B / agent.args.discount_scale)[..., 0]
    wanted = torch.full((T, B), 0.9, dtype=F64)
    wanted[4, 1] = 0
    assert torch.allclose(target, wanted, atol=1e-12)
    feat = torch.cat([post["deter"], post["stoch"]], -1)
    assert torch.equal(agent.world.predict_discount(feat), logits[..., 0].sigmoid())
    without = small_agent(gamma=0.9, pred_discount=False).world
    assert without.discount is None
    assert torch.allclose(without.predict_discount(feat).double(), torch.full((T, B), 0.9, dtype=F64))


def test_discount_of_the_replayed_state_is_known(monkeypatch):
    """d_0 comes from the data, all later ones from the head."""
    agent = small_agent()
    returns, dreams = spy(monkeypatch, v2, "lambda_return"), spy(monkeypatch, agent.behaviour, "imagine")
    dream(agent)
    discount, feat = returns[0][0][2], dreams[0][1][0]
    assert torch.equal(discount[0], 0.999 * (1 - rows()["is_terminal"].flatten().double()))
    assert relative(discount[1:], agent.world.discount(feat[1:])[..., 0].sigmoid()) < 1e-12


# ---- what each loss trains ----


TABLE = dict(image="encoder rssm decoder", reward="encoder rssm reward", discount="encoder rssm discount",
             kl="encoder rssm", policy="actor", value="critic")


def reached(agent):
    """Modules with a gradient that is not zero."""
    modules = dict(agent.world.named_children()) | dict(agent.behaviour.named_children())
    return {k for k, net in modules.items() if any(p.grad is not None and p.grad.any() for p in net.parameters())}


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("loss", TABLE)
def test_reach(loss, discrete, monkeypatch):
    """Backward of one loss: non-zero where the table says so, exactly zero elsewhere. The policy's is Reinforce."""
    scales = dict(kl_scale=float(loss == "kl"), discount_scale=float(loss == "discount"))
    agent = small_agent(discrete, actor_grad="reinforce", **scales)
    if loss in ("policy", "value"):
        total = dream(agent)[loss]
    else:
        for name, shape in dict(decoder=(T, B, 64, 64, 1), reward=(T, B, 1)).items():
            if name != dict(image="decoder").get(loss, loss):
                constant = torch.zeros(shape, dtype=F64)
                monkeypatch.setattr(getattr(agent.world, name), "forward", lambda *_, constant=constant: constant)
        total = agent.world.loss(rows(discrete))[0]
    total.backward()
    assert reached(agent) == set(TABLE[loss].split())


def test_dynamics_gradient_passes_the_model_but_no_critic_and_no_past():
    """It goes through rewards, discounts and latents of the dream; not into what was replayed, nor into a critic."""
    for loss, modules in (("policy", {"actor", "rssm", "reward", "discount"}), ("value", {"critic"})):
        agent = small_agent(actor_grad="dynamics")
        dream(agent)[loss].backward()
        assert reached(agent) == modules


@GRADIENTS
def test_each_optimizer_moves_its_own_parameters(discrete, grad):
    """One update by each: every tensor of its modules changes, at its own rate, no other one, the slow critic never."""
    rates = dict(model_lr=1e-3, actor_lr=2e-3, critic_lr=3e-3)
    agent = small_agent(discrete, actor_grad=grad, adam_eps=1e-12, weight_decay=1e-9, grad_clip=50.0, **rates)
    optimizer, batch = v2.Optimizers(agent, agent.args), rows(discrete)
    assert {(part.eps, part.decay, part.clip) for part in optimizer.parts.values()} == {(1e-12, 1e-9, 50.0)}
    loss = dict(model=lambda: agent.world.loss(batch)[0],
                actor=lambda: dream(agent)["policy"], critic=lambda: dream(agent)["value"])
    for part, prefix in dict(model="world.", actor="behaviour.actor.", critic="behaviour.critic.").items():
        before = {k: v.detach().clone() for k, v in agent.named_parameters()}
        optimizer.parts[part].step(loss[part]())
        changed = {k: (v - before[k]).abs().max().item() for k, v in agent.named_parameters()}
        assert {k for k in changed if changed[k]} == {k for k in before if k.startswith(prefix)}, part
        assert max(changed.values()) == pytest.approx(rates[f"{part}_lr"], rel=1e-4), "Adam's first step is the rate"


def test_one_update(monkeypatch):
    """train_step: model, actor, critic, each by its own loss. The dream's start states come from before the model's
    step, its weights from after it."""
    agent, old, batch = small_agent(model_lr=0.01).float(), small_agent().float(), single(rows())
    optimizer, coefs = v2.Optimizers(agent, agent.args), torch.tensor([1e-3, 0.9])
    losses, moves = spy(monkeypatch, agent.world, "loss"), spy(monkeypatch, agent.behaviour, "loss")
    steps = {name: spy(monkeypatch, part, "step") for name, part in optimizer.parts.items()}
    dreams = spy(monkeypatch, agent.behaviour, "imagine")
    noise = use_noise(agent)
    v2.train_step(agent, optimizer, replay_of(batch), B, coefs)
    (_, (model, _, _)), = losses
    ((_, post, used, given), (behaviour, _)), = moves
    found = {name: calls[0][0][0].item() for name, calls in steps.items()}
    assert found == dict(model=model.item(), actor=behaviour["policy"].item(), critic=behaviour["value"].item())
    assert torch.equal(used["is_terminal"], batch["is_terminal"]) and torch.equal(given, coefs)
    old.world.rssm.noise = agent.world.rssm.noise
    assert torch.equal(post["deter"], old.world.loss(batch)[1]["deter"])
    (feat, action), = [result for _, result in dreams]
    start, made = [post[k].flatten(0, 1) for k in ("deter", "stoch")], []
    for rssm in (agent.world.rssm, old.world.rssm):
        made.append(rssm.imagine_step(rssm.scan_weights(torch.float32), *start, action[0], noise["prior"][0])[0])
    assert torch.equal(feat[0], torch.cat(start, -1)) and torch.allclose(feat[1, :, :8], made[0], atol=1e-6)
    assert not torch.allclose(feat[1, :, :8], made[1], atol=1e-3)


def test_naive_update_is_the_same():
    """The version that the benchmark runs for comparison: same losses and same gradients."""
    agent, batch, coefs = small_agent(), rows(), torch.tensor([1e-2, 0.9], dtype=F64)
    noise = use_noise(agent)
    naive, world, behaviour = NaiveUpdate(agent, None), agent.world, agent.behaviour
    total, post, metrics = world.loss(batch)
    plain, parts, feat = naive.world_loss(batch, noise["post"])
    ours, _ = behaviour.loss(world, post, batch, coefs)
    theirs = naive.behaviour_losses(feat, batch["is_terminal"], noise, coefs)
    assert relative(torch.cat([post["deter"], post["stoch"]], -1), feat) < 1e-12
    assert all(relative(metrics[f"losses/{name}"], loss.detach()) < 1e-12 for name, loss in parts.items())
    for a, b, net in ((total, plain, world), (ours["policy"], theirs["policy"], behaviour.actor),
                      (ours["value"], theirs["value"], behaviour.critic)):
        grads = (torch.autograd.grad(loss, list(net.parameters())) for loss in (a, b))
        assert relative(a, b) < 1e-12 and max(map(relative, *grads)) < 1e-10


def test_updates_of_a_run(tmp_path, monkeypatch):
    """1 + pretrain of them after the random steps, then one every train_every steps; coefficients follow the steps."""
    seen = []
    monkeypatch.setattr(v2, "train_step", lambda *inputs: seen.append(inputs[-1].tolist()) or {})
    tiny.run("dreamer_v2", tmp_path, learning_starts=8, train_every=4, pretrain=2, total_timesteps=24, eval_episodes=0,
             ent_coef="linear(1,0,100)", rho="warmup(100,0.5)")
    steps = [8, 8, 8, 12, 16, 20, 24]
    assert np.array(seen).shape == (7, 2) and np.allclose(seen, [[1 - step / 100, step / 200] for step in steps])


# ---- optimisers ----


@pytest.mark.parametrize("lr", [1e-5, 0.5])
def test_weight_decay_ignores_the_learning_rate(lr):
    torch.manual_seed(0)
    params = [nn.Parameter(rand(3, 4)), nn.Parameter(rand(4))]
    start = [p.detach().clone() for p in params]
    optimizer = v2.Adam(params, lr, 1e-5, 100.0, 1e-6)
    for k in range(1, 11):
        assert optimizer.step(sum(0 * p.sum() for p in params)) == 0
        for p, w in zip(params, start):
            assert (p / w - (1 - 1e-6) ** k).abs().max() < 1e-14


def test_optimiser_equals_its_scalar_form():
    """Joint clipping of two tensors, decay before the step, Keras' epsilon with gradients as small as it."""
    torch.manual_seed(0)
    params = [nn.Parameter(rand(2, 3)), nn.Parameter(rand(3))]
    optimizer = v2.Adam(params, 0.01, 1e-5, 10.0, 1e-3)
    plain = [dict(w=w, m=0.0, v=0.0) for p in params for w in p.flatten().tolist()]
    for k, scale in enumerate((1e-4, 100.0, 1e-5, 3.0), 1):
        grads = [scale * rand(*p.shape) for p in params]
        flat = [g for grad in grads for g in grad.flatten().tolist()]
        norm = math.sqrt(sum(g * g for g in flat))
        found = optimizer.step(sum((g * p).sum() for g, p in zip(grads, params)))
        assert found.item() == pytest.approx(norm) and (norm > 10) == (scale == 100)
        for x, g in zip(plain, flat):
            g = g * min(1, 10 / norm)
            x["m"], x["v"] = 0.9 * x["m"] + 0.1 * g, 0.999 * x["v"] + 0.001 * g * g
            step = x["m"] * math.sqrt(1 - 0.999**k) / (1 - 0.9**k) / (math.sqrt(x["v"]) + 1e-5)
            x["w"] = (1 - 1e-3) * x["w"] - 0.01 * step
        ours = [w for p in params for w in p.flatten().tolist()]
        assert ours == pytest.approx([x["w"] for x in plain], rel=1e-6, abs=1e-8)  # it counts in float32


def test_slow_critic_is_copied_after_updates_1_and_101():
    agent = v2.Agent({"image": (64, 64, 1)}, A, True, replace(v2.Args(), **SMALL))
    behaviour, copied = agent.behaviour, []
    online, slow = (list(net.parameters()) for net in (behaviour.critic, behaviour.slow_critic))
    assert not any(torch.equal(a, b) for a, b in zip(online, slow) if a.dim() == 2), "own weights at first"
    for update in range(1, 302):
        with torch.no_grad():
            for p in online:
                p.add_(torch.randn_like(p))
        before = [p.clone() for p in slow]
        behaviour.update_slow_critic()
        if all(map(torch.equal, slow, online)):
            copied.append(update)
        else:
            assert all(map(torch.equal, slow, before)), update
    assert copied == [1, 101, 201, 301]


def test_slow_critic_moves_by_its_rate_after_a_first_full_copy():
    agent = v2.Agent({"image": (64, 64, 1)}, A, True, replace(v2.Args(), **SMALL, slow_rate=0.25, slow_every=2))
    online, slow = agent.behaviour.critic[-1].weight, agent.behaviour.slow_critic[-1].weight
    for share in (1.0, 0.0, 0.25, 0.0, 0.25):
        online.data.normal_()
        wanted = (1 - share) * slow + share * online.detach()
        agent.behaviour.update_slow_critic()
        assert torch.allclose(slow, wanted)


def test_slow_critic_follows_the_update_of_the_critic():
    """After the first update it has the weights that the critic has got by it, and keeps them in the second."""
    agent, batch = small_agent().float(), single(rows())
    optimizer, coefs = v2.Optimizers(agent, agent.args), torch.tensor([1e-3, 0.9])
    online, slow = (list(net.parameters()) for net in (agent.behaviour.critic, agent.behaviour.slow_critic))
    v2.train_step(agent, optimizer, replay_of(batch), B, coefs)
    after = [p.detach().clone() for p in online]
    assert all(map(torch.equal, slow, after))
    v2.train_step(agent, optimizer, replay_of(batch), B, coefs)
    assert all(map(torch.equal, slow, after)) and not any(map(torch.equal, online, after))


# ---- networks ----


@pytest.mark.parametrize("preset, channels, actions, discrete, sizes, world, total", [
    ("default", 1, 18, True, (1_549_776, 5_664_848, 10_497_553, 1_131_601, 1_131_601, 1_138_418, 1_131_601),
     19_975_379, 22_245_398),
    ("dmc", 3, 6, False, (1_551_312, 1_247_248, 9_886_611, 971_601, 0, 976_012, 971_601), 13_656_772, 15_604_385)])
def test_parameter_counts_equal_the_official_ones(preset, channels, actions, discrete, sizes, world, total):
    with torch.device("meta"):
        args = replace(v2.Args(), **v2.PRESETS[preset])
        agent = v2.Agent({"image": (64, 64, channels)}, actions, discrete, args)
    names = "encoder rssm decoder reward discount actor critic".split()
    modules = dict(agent.world.named_children()) | dict(agent.behaviour.named_children())
    found = {name: sum(p.numel() for p in net.parameters()) for name, net in modules.items() if net is not None}
    assert tuple(found.get(name, 0) for name in names) == sizes
    assert found["slow_critic"] == found["critic"] and sum(found[k] for k in found if k in names[:5]) == world
    assert sum(p.numel() for p in agent.parameters() if p.requires_grad) == total


def test_initialisation_is_that_of_keras():
    """Uniform up to sqrt(6 / (inputs + outputs)), kernel positions counted in both; no bias; norm 1 and 0."""
    torch.manual_seed(0)
    layers = {v2.Linear(300, 200): (300, 200), v2.init(nn.Conv2d(48, 64, 4)): (768, 1024),
              v2.init(nn.ConvTranspose2d(64, 48, 5)): (1600, 1200)}
    for layer, (fan_in, fan_out) in layers.items():
        weight, bound = layer.weight.detach(), math.sqrt(6 / (fan_in + fan_out))
        assert 0.999 * bound < weight.abs().max() <= bound and not layer.bias.any()
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    agent = v2.Agent({"image": (64, 64, 1)}, A, True, replace(v2.Args(), **SMALL))
    norm = agent.world.rssm.gru_norm
    assert (norm.weight == 1).all() and not norm.bias.any()
    layers = [m for m in agent.modules() if list(m.parameters(recurse=False))]
    assert {type(m) for m in layers} == {v2.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.LayerNorm}
    for layer in layers:
        if layer is not norm:
            _, inputs, *kernel = layer.weight.shape
            bound = math.sqrt(6 / (math.prod(kernel) * (layer.weight.shape[0] + inputs)))
            assert layer.weight.abs().max() <= bound and not layer.bias.any(), "torch's own would have a bias"


def plain_cell(rssm, x, deter):
    """The recurrent cell after its first layer, one gate after the other."""
    gates = torch.cat([x, deter], -1) @ rssm.gru.weight.T + rssm.gru.bias
    centred = gates - gates.mean(-1, keepdim=True)
    gates = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    gates = gates * rssm.gru_norm.weight + rssm.gru_norm.bias
    n = rssm.deter
    reset, cand, update = gates[:, :n], gates[:, n : 2 * n], gates[:, 2 * n :]
    update = 1 / (1 + (1 - update).exp())
    return update * (cand / (1 + (-reset).exp())).tanh() + (1 - update) * deter


def test_cell_starts_by_keeping_its_memory():
    """With all pre-activations zero the update gate is sigmoid(-1) = 0.269 and the candidate 0."""
    rssm = v2.RSSM(8, 7, 4, 5, 3, 6).double()
    for p in rssm.gru.parameters():
        p.data.zero_()
    deter = rand(2, 8)
    after = rssm.core(rssm.scan_weights(F64), deter, rand(2, 20), rand(2, 7))
    assert torch.allclose(1 - after / deter, torch.tensor(0.26894142137, dtype=F64))


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_cell_has_the_epsilon_of_keras(scale):
    """1e-3 matters as soon as the pre-activations are small."""
    torch.manual_seed(0)
    rssm, deter, stoch, row = shake(v2.RSSM(8, 7, 4, 5, 3, 6)), rand(2, 8), rand(2, 20), rand(2, 7)
    for p in rssm.gru.parameters():
        p.data *= scale
    x = F.elu(stoch @ rssm.img_in.weight[:, :20].T + row)
    after = rssm.core(rssm.scan_weights(F64), deter, stoch, row)
    assert relative(after, plain_cell(rssm, x, deter)) < 1e-12


def rssm_case():
    """A small RSSM, seven steps of three sequences with resets inside, and leaves to differentiate."""
    torch.manual_seed(0)
    rssm = shake(v2.RSSM(8, 7, 4, 5, A, 6))  # deter, hidden, stoch, classes, actions, tokens
    first = torch.zeros(7, 3, dtype=torch.bool)
    first[3, 0] = first[0, 1] = first[6, 1] = True
    carry = F.one_hot(torch.randint(5, (3, 4)), 5).flatten(1).double()
    leaves = [x.requires_grad_() for x in (rand(7, 3, 6), rand(7, 3, A), rand(3, 8), carry)]
    return rssm, leaves, first, rand(7, 3, 4, 5).exponential_()


def gradients(rssm, leaves, outs):
    """Gradients of fixed random sums of h, z and logits for the inputs and all parameters but the prior's."""
    generator = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(x.shape, generator=generator, dtype=F64) * x).sum() for x in outs)
    params = [p for name, p in rssm.named_parameters() if not name.startswith("prior")]
    return torch.autograd.grad(loss, [*leaves, *params])


def naive_observe(rssm, tokens, action, first, deter, stoch, noise):
    """The RSSM as the paper and the official code lay it out, one step after the other."""
    outs = []
    for token, act, reset, e in zip(tokens, action, first, noise):
        keep = (~reset)[:, None].double()
        deter, stoch, act = deter * keep, stoch * keep, act * keep
        deter = plain_cell(rssm, F.elu(rssm.img_in(torch.cat([stoch, act], -1))), deter)
        logits = rssm.post_out(rssm.post_hid(torch.cat([deter, token], -1))).view(-1, rssm.stoch, rssm.classes)
        probs = logits.softmax(-1)
        sample = F.one_hot((probs / e).argmax(-1), rssm.classes) + probs - probs.detach()
        stoch = sample.flatten(1)
        outs.append((deter, stoch, logits))
    return [torch.stack(x) for x in zip(*outs)]


def test_hoisted_observe_equals_the_plain_scan():
    rssm, leaves, first, noise = rssm_case()
    tokens, action, deter, stoch = leaves
    rssm.noise = lambda *lead: noise
    ours = rssm.observe(tokens, action, first, deter, stoch)
    plain = naive_observe(rssm, tokens, action, first, deter, stoch, noise)
    assert max(map(relative, ours, plain)) < 1e-12
    assert max(map(relative, gradients(rssm, leaves, ours), gradients(rssm, leaves, plain))) < 1e-12


@pytest.mark.parametrize("discrete", [True, False])
def test_a_dream_is_made_of_prior_steps(discrete):
    """Actions come from the policy in the state before them, without gradient to that state; latents from the prior."""
    agent = small_agent(discrete)
    rssm, behaviour, noise = agent.world.rssm, agent.behaviour, use_noise(agent)
    deter, stoch = rand(T * B, 8), F.one_hot(torch.randint(5, (T * B, 4)), 5).flatten(1).double()
    feat, action = behaviour.imagine(rssm, deter, stoch)
    feats, actions = [torch.cat([deter, stoch], -1)], []
    for e, u in zip(noise["prior"], noise["action"]):
        actions.append(behaviour.sample(feats[-1].detach(), u))
        deter = plain_cell(rssm, F.elu(rssm.img_in(torch.cat([stoch, actions[-1]], -1))), deter)
        probs = rssm.prior(deter).softmax(-1)
        stoch = (F.one_hot((probs / e).argmax(-1), 5) + probs - probs.detach()).flatten(1)
        feats.append(torch.cat([deter, stoch], -1))
    assert relative(feat, torch.stack(feats)) < 1e-12 and relative(action, torch.stack(actions)) < 1e-12
    weight, params = rand(*feat.shape), [*behaviour.actor.parameters(), *rssm.prior.parameters()]
    for a, b in zip(*(torch.autograd.grad((weight * x).sum(), params) for x in (feat, torch.stack(feats)))):
        assert relative(a, b) < 1e-10


# ---- acting ----


@pytest.mark.parametrize("discrete", [True, False])
def test_acting_is_observing(discrete):
    """Latents and actions made step by step, across the start of an episode, are those of one scan of the rows."""
    agent, steps, envs = small_agent(discrete), 8, 2
    rng, state, kept, rssm = np.random.default_rng(0), agent.initial(2, CPU), [], agent.world.rssm
    noise, policy_noise = torch.empty(steps, envs, rssm.stoch, rssm.classes), []
    for t in range(steps):
        row = dict(image=rng.integers(0, 256, (envs, 64, 64, 1), np.uint8), is_first=np.array([t in (0, 5), t == 0]))
        torch.manual_seed(t)
        before, state = state, agent.act(row, state)
        torch.manual_seed(t)  # the same draws again: posterior first, then the action
        noise[t].exponential_()
        policy_noise.append(agent.behaviour.noise(envs))
        seen = (torch.as_tensor(row[k]) for k in ("image", "is_first"))
        kept.append([*seen, before["action"], state["deter"], state["stoch"], state["action"]])
    image, first, previous, deter, stoch, action = map(torch.stack, zip(*kept))
    with torch.no_grad():
        zero = agent.initial(envs, CPU)
        rssm.noise = lambda *lead: noise
        h, z, _ = rssm.observe(agent.world.encoder(image), previous, first, zero["deter"], zero["stoch"])
        chosen = agent.behaviour.sample(torch.cat([h, z], -1), torch.stack(policy_noise))
    assert relative(deter, h) < 1e-12 and torch.equal(stoch, z) and relative(action, chosen) < 1e-10
    assert len(action.flatten(0, 1).unique(dim=0)) > 1, "the actions differ, so that the comparison says something"


@pytest.mark.parametrize("discrete", [True, False])
def test_evaluation_takes_the_mode_of_the_policy_and_samples_the_latent(discrete):
    agent, envs = small_agent(discrete), 20
    torch.manual_seed(0)
    image = torch.randint(256, (1, 64, 64, 1)).byte().expand(envs, -1, -1, -1).numpy()
    row = dict(image=image, is_first=np.ones(envs, bool))
    seen = {}
    for training in (True, False):
        state = agent.train(training).act(row, agent.initial(envs, CPU))
        assert len(state["stoch"].unique(dim=0)) > 1, "the latent is sampled"
        hidden, out, *_ = agent.behaviour.actor
        raw = out(hidden(torch.cat([state["deter"], state["stoch"]], -1)))
        mode = F.one_hot(raw.argmax(-1), A).double() if discrete else raw.tanh()
        seen[training] = torch.isclose(state["action"], mode).all(-1)
    assert seen[False].all() and not seen[True].all()


def test_random_actions_are_uniform():
    torch.manual_seed(0)
    action = small_agent(True).behaviour.random_action(3000, CPU)
    assert torch.equal(action.sort(-1).values, torch.tensor([0.0, 0, 1]).expand(3000, 3))
    assert (action.mean(0) - 1 / 3).abs().max() < 0.03
    action = small_agent(False).behaviour.random_action(3000, CPU)
    assert action.shape == (3000, A) and 0.99 < action.max() <= 1 and -1 <= action.min() < -0.99
    assert action.mean(0).abs().max() < 0.04 and (action.square().mean(0) - 1 / 3).abs().max() < 0.02
