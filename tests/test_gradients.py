"""Which loss trains which module, and what must never be trained. The first functions also serve other test files."""
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import load

SCRIPT = load("dreamer_v3")
SHAPES = {"image": (16, 16, 3), "vector": (5,)}
SMALL = -3 * torch.linspace(-20, 20, 255).abs()  # two-hot logits that favour bins near zero


def tiny(m, discrete=True, seed=0, shapes=SHAPES, **flags):
    """A DreamerV3 agent of width 32 (h 256, z 32 x 2). Weights are moved off their initial zeros, so that every path
    carries a gradient; the biases SMALL keep rewards and values of the order of 1."""
    torch.manual_seed(seed)
    flags = dict(size="tiny", precision="fp32", batch_size=3, batch_length=6, imag_horizon=4, free_nats=0.0) | flags
    with mock.patch.dict(m.SIZES, tiny=32):
        agent = m.Agent(shapes, 3, discrete, m.Args(**flags))
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for head in (agent.world.reward, agent.behaviour.critic, agent.behaviour.slow_critic):
            head[-1].bias.add_(SMALL)
    return agent


def random_rows(agent, steps=6, batch=3, seed=0):
    """Replay rows (steps+1,batch,...) as `sample` gives them: column 0 terminates at row 2, 1 is truncated at row 3."""
    torch.manual_seed(seed)
    lead, rssm = (steps + 1, batch), agent.world.rssm
    flags = {k: torch.zeros(lead, dtype=torch.bool) for k in ("is_first", "is_last", "is_terminal")}
    flags["is_first"][0] = flags["is_first"][3, 0] = flags["is_first"][4, 1] = True
    flags["is_last"][2, 0] = flags["is_last"][3, 1] = flags["is_terminal"][2, 0] = True
    action = torch.randn(*lead, 3)
    action = torch.eye(3)[action.argmax(-1)] if agent.behaviour.discrete else action
    return dict(flags, image=torch.randint(256, (*lead, 16, 16, 3)).byte(), vector=torch.randn(*lead, 5), action=action,
                reward=torch.randn(lead), deter=torch.randn(*lead, rssm.deter),
                stoch=F.one_hot(torch.randint(2, (*lead, rssm.stoch)), 2).flatten(-2).byte())


def random_replay(m, agent, shapes, count, folder):
    """A new replay with `count` random rows of one environment whose episodes have 9 rows."""
    replay = m.SequenceReplay(m.replay_specs(shapes, agent, agent.args), count, 1, torch.device("cpu"), folder)
    rssm = agent.world.rssm
    torch.manual_seed(0)
    for i in range(count):
        first, last = torch.tensor([i % 9 == 0]), torch.tensor([i % 9 == 8])
        row = {k: torch.randint(256, (1, *s)).byte() if k == "image" else torch.randn(1, *s) for k, s in shapes.items()}
        row.update(is_first=first, is_last=last, is_terminal=last, reward=torch.randn(1),
                   action=torch.eye(3)[i % 3][None], deter=torch.randn(1, rssm.deter),
                   stoch=F.one_hot(torch.randint(rssm.classes, (1, rssm.stoch)), rssm.classes).flatten(-2))
        replay.add(row)
    return replay


def optimizer_of(m, agent, lr=4e-5, warmup=0):
    return m.LaProp([p for n, p in agent.named_parameters() if "slow_critic" not in n], lr, warmup, agent.args.agc)


def all_losses(agent, batch):
    """Every loss before its mean, from one forward pass."""
    rows, context = SCRIPT.split_context(batch)
    losses, post, _ = agent.world.loss(rows, context)
    return losses | agent.behaviour.loss(agent.world, post, rows)[0]


def has_gradient(module):
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


# official behaviour, measured (`agent.py`); dyn reaches the encoder through the samples of earlier steps
TABLE = dict(
    image="encoder rssm decoder", vector="encoder rssm decoder", reward="encoder rssm reward", cont="encoder rssm cont",
    dyn="encoder rssm", rep="encoder rssm", policy="actor", value="critic", repval="encoder rssm critic")
V3 = pytest.mark.parametrize("m", [pytest.param(load("dreamer_v3"), id="dreamer_v3")])


@V3
@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("loss", TABLE)
def test_reach(m, loss, discrete):
    """Backward of one loss alone: non-zero where the table says so, exactly zero elsewhere."""
    agent = tiny(m, discrete)
    losses = all_losses(agent, random_rows(agent))
    assert losses.keys() == TABLE.keys()
    losses[loss].mean().backward()
    modules = dict(agent.world.named_children()) | dict(agent.behaviour.named_children())
    reached = {name for name, module in modules.items() if has_gradient(module)}
    assert reached == set(TABLE[loss].split()), f"{loss} reaches {reached}"


@V3
def test_total_gradient_is_the_weighted_sum(m):
    """One backward of the total gives each loss its weight. Only gradients tell dyn and rep, equal in value, apart."""
    scales = dict.fromkeys(TABLE, 1.0) | dict(dyn=0.7, rep=0.2, repval=0.4)
    agent = tiny(m, beta_dyn=0.7, beta_rep=0.2, beta_repval=0.4)
    params, batch = [p for p in agent.parameters() if p.requires_grad], random_rows(agent)
    torch.manual_seed(1)
    agent.loss(batch)[0].backward()
    torch.manual_seed(1)
    losses = all_losses(agent, batch)
    wanted = torch.autograd.grad(sum(scales[k] * v.mean() for k, v in losses.items()), params)
    for (name, p), gradient in zip([(n, p) for n, p in agent.named_parameters() if p.requires_grad], wanted):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


@V3
def test_kl_sides(m):
    """dyn trains the prior head and not its own posterior, rep the posterior and not the prior head."""
    agent = tiny(m)
    for loss, trains_prior in (("dyn", True), ("rep", False)):
        agent.zero_grad()
        all_losses(agent, random_rows(agent))[loss].mean().backward()
        assert has_gradient(agent.world.rssm.prior) == trains_prior, loss
    post, prior = (torch.randn(1, 1, 4, 3, requires_grad=True) for _ in range(2))
    dyn, rep, _ = m.kl_losses(post, prior, 0.01, 0.0)
    for loss, trained in ((dyn, prior), (rep, post)):
        got = torch.autograd.grad(loss.sum(), [post, prior], allow_unused=True)
        assert [g is not None for g in got] == [x is trained for x in (post, prior)]


@V3
def test_free_nats_stop_the_gradient(m):
    """Below the free nats, counted on the sum over groups, neither side of the KL is trained."""
    agent = tiny(m, free_nats=1e6)
    losses = all_losses(agent, random_rows(agent))
    (losses["dyn"] + losses["rep"]).mean().backward()
    assert not has_gradient(agent)


@V3
def test_straight_through_gradient_is_that_of_the_probabilities(m):
    torch.manual_seed(0)
    logits, weight = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    probs = m.unimix(logits, 0.01)
    sample = m.sample_onehot(probs, torch.empty(5, 4).exponential_())
    assert sample.detach().eq(sample.detach().round()).all() and sample.detach().sum(-1).eq(1).all()
    got, want = (torch.autograd.grad((x * weight).sum(), logits, retain_graph=True)[0] for x in (sample, probs))
    torch.testing.assert_close(got, want)


@V3
def test_dream_leaves_the_world_model_alone(m):
    """Imagination changes no weight, no buffer and carries no gradient; only the return normaliser moves."""
    agent = tiny(m)
    batch = random_rows(agent)
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    all_losses(agent, batch)
    changed = {k for k, v in agent.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"behaviour.percentiles"}
    rssm = agent.world.rssm
    deter, stoch = torch.randn(6, rssm.deter, requires_grad=True), torch.randn(6, rssm.stoch * rssm.classes)
    feat, action = agent.behaviour.imagine(rssm, deter, stoch)
    assert not feat.requires_grad and not action.requires_grad


@V3
def test_slow_critic_has_no_gradient(m):
    agent = tiny(m)
    total, post, _ = agent.loss(random_rows(agent))
    total.backward()
    assert all(p.grad is None and not p.requires_grad for p in agent.behaviour.slow_critic.parameters())
    untrained = [n for n, p in agent.named_parameters() if "slow_critic" not in n and p.grad is None]
    assert not untrained
    assert not any(v.requires_grad for v in post.values()), "latents for replay keep the graph alive"


def dream(m, seed=0):
    """A loss function of the policy's and critic's logits, slow logits, reward and continue of N = 4 dreams of H = 5
    steps, and these arguments; the logits are leaves."""
    torch.manual_seed(seed)
    agent = tiny(m)
    logits, value = torch.randn(5, 4, 3, requires_grad=True), (torch.randn(6, 4, 255) + SMALL).requires_grad_()
    action = torch.eye(3)[torch.randint(3, (5, 4))]
    slow = torch.randn(6, 4, 255) + SMALL

    def losses(logits, *predictions):
        return agent.behaviour.imagination_losses(m.log_unimix(logits, 0.01), action, *predictions)[0]
    return losses, logits, value, slow, torch.randn(6, 4), torch.rand(6, 4)


@V3
def test_dream_from_a_terminal_state_teaches_nothing(m):
    """w_0 = c_0: policy and value loss and their gradients are exactly zero; later weights are products from c_0 on."""
    loss, logits, value, slow, reward, cont = dream(m)
    cont[0, 1] = 0  # dream 1 starts dead
    cont[2, 2] = 0  # dream 2 dies in its third state
    losses = loss(logits, value, slow, reward, cont)
    alive = torch.ones(5, 4, dtype=torch.bool)
    alive[:, 1] = alive[2:, 2] = False
    (losses["policy"] + losses["value"]).sum().backward()
    for x in (losses["policy"], losses["value"], logits.grad.abs().sum(-1), value.grad[:-1].abs().sum(-1)):
        assert torch.equal(x != 0, alive)
    assert not value.grad[-1].any(), "the last imagined state is only a target"
    # the weight itself: losses are proportional to it, and it begins with c_0
    cont[0] /= 2
    half = loss(logits, value, slow, reward, cont)
    for k in losses:
        torch.testing.assert_close(half[k], losses[k] / 2)


@V3
def test_targets_of_actor_and_critic_are_constants(m):
    """policy reaches only the policy's logits, value only the value's: advantage, return, slow value are constants."""
    loss, logits, value, slow, reward, cont = dream(m)
    inputs = [x.requires_grad_() for x in (logits, value, slow, reward)]
    losses = loss(logits, value, slow, reward, cont)
    for name, only in (("policy", 0), ("value", 1)):
        got = torch.autograd.grad(losses[name].sum(), inputs, allow_unused=True, retain_graph=True)
        assert [g is not None and bool(g.any()) for g in got] == [i == only for i in range(4)], name


@V3
def test_replay_critic_at_episode_ends(m):
    """A truncated row has weight 0, the row before it bootstraps from the dream there; a terminal row gives nothing."""
    agent, (T, B) = tiny(m), (5, 3)
    behaviour, gamma, lam = agent.behaviour, agent.args.gamma, agent.args.lam
    logits, slow = torch.randn(T, B, 255, requires_grad=True), torch.randn(T, B, 255)
    boot, reward = torch.randn(2, T, B)
    last, terminal = torch.zeros(2, T, B, dtype=torch.bool)
    last[2, 0] = last[2, 1] = terminal[2, 1] = True  # column 0 truncated, 1 terminated, 2 goes on
    loss, ret = behaviour.replay_loss(
        logits, slow, boot, dict(reward=reward, is_last=last, is_terminal=terminal))
    assert loss.shape == ret.shape == (T - 1, B)
    torch.testing.assert_close(ret[1, 0], reward[2, 0] + gamma * boot[2, 0])
    torch.testing.assert_close(ret[1, 1], reward[2, 1])
    torch.testing.assert_close(ret[3], reward[4] + gamma * boot[4])
    torch.testing.assert_close(ret[1, 2], reward[2, 2] + gamma * ((1 - lam) * boot[2, 2] + lam * ret[2, 2]))
    loss.sum().backward()
    weight = ~last[:-1]
    assert torch.equal(loss != 0, weight) and torch.equal(logits.grad[:-1].abs().sum(-1) != 0, weight)
    assert not logits.grad[-1].any()
