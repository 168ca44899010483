"""What only DreamerV3 has: formulas against their definitions, what each loss trains, one pass against single
steps, which row meets which, replay, precision. At the end, breakages that the tests must see."""
import itertools
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import pytest
import test_replay
import torch
import torch.nn.functional as F
from conftest import load
from envs import Scripted
from test_golden_dreamer_v3 import float64, make_replay, reconstruction_losses
from test_golden_dreamer_v3 import test_initialisation as initialisation
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

v3 = load("dreamer_v3")
CPU = torch.device("cpu")
T, B, H, A = 6, 3, 4, 3
D, S, K = 512, 32, 4  # of size1m
SHAPES = {"image": (16, 16, 3), "vector": (2, 1, 2)}
DISCRETE = pytest.mark.parametrize("discrete", [True, False])


def relative(ours, plain):
    assert ours.shape == plain.shape
    return (ours - plain).abs().max() / plain.abs().max().clamp(min=1e-30)


def shake(module, size=0.2):
    """No parameter stays at a value such as 0 or 1 that hides a mistake."""
    with torch.no_grad():
        for p in module.parameters():
            p += size * torch.randn_like(p)
    return module


def make_agent(discrete=True, shapes=SHAPES, **flags):
    """Every path carries a gradient; two-hot heads favour bins near 0, so that values are about 1."""
    torch.manual_seed(0)
    flags = dict(batch_size=B, batch_length=T, imag_horizon=H, free_nats=0.0, precision="fp32") | flags
    agent = shake(v3.Agent(shapes, A, discrete, v3.Args(size="size1m", **flags)), 0.1)
    for head in (agent.world.reward, agent.behaviour.critic, agent.behaviour.slow_critic):
        head[-1].bias.data -= 3 * torch.linspace(-20, 20, 255).abs()
    return agent


def make_rows(discrete=True, seed=1):
    """Replay rows (T+1,B,...), as sampled: column 0 terminates at row 2, column 1 is truncated at row 3."""
    torch.manual_seed(seed)
    lead = (T + 1, B)
    flags = {name: torch.zeros(lead, dtype=torch.bool) for name in ("is_first", "is_last", "is_terminal")}
    flags["is_first"][0] = True
    flags["is_last"][2, 0] = True
    flags["is_terminal"][2, 0] = True
    flags["is_first"][3, 0] = True
    flags["is_last"][3, 1] = True
    flags["is_first"][4, 1] = True
    return dict(
        flags,
        image=torch.randint(256, (*lead, 16, 16, 3), dtype=torch.uint8),
        vector=torch.randn(*lead, 5),
        reward=torch.randn(lead),
        action=torch.eye(A)[torch.randint(A, lead)] if discrete else 2 * torch.randn(*lead, A),
        deter=torch.randn(*lead, D),
        stoch=latents(*lead))


def latents(*lead):
    """One-hot groups (...,S*K)."""
    return torch.eye(K)[torch.randint(K, (*lead, S))].flatten(-2)


def split(batch):
    """What `WorldModel.loss` takes: rows 1 to T, and what row 0 lends."""
    rows = {name: x[1:] for name, x in batch.items()}
    context = dict(
        prev_action=batch["action"][:-1], is_first=rows["is_first"],
        deter=batch["deter"][0], stoch=batch["stoch"][0])
    return rows, context


def all_losses(agent, batch, seed=2):
    """Every loss before its mean, from one forward pass."""
    torch.manual_seed(seed)
    rows, context = split(batch)
    losses, post, _ = agent.world.loss(rows, context)
    return losses | agent.behaviour.loss(agent.world, post, rows)[0]


def reached(agent):
    """Names of the modules with a gradient that is not exactly zero."""
    modules = dict(agent.world.named_children()) | dict(agent.behaviour.named_children())
    names = set()
    for name, module in modules.items():
        if any(p.grad is not None and p.grad.any() for p in module.parameters()):
            names.add(name)
    return names


# ---- two-hot, samples, KL ----


def dense_twohot(target, bins):
    """Eq. 11 as it is written: the weights of the two bins around each target."""
    dense = torch.zeros(len(target), len(bins))
    for row, x in zip(dense, target.clamp(bins[0], bins[-1])):
        low = min(int((bins <= x).sum()) - 1, len(bins) - 2)
        row[low + 1] = (x - bins[low]) / (bins[low + 1] - bins[low])
        row[low] = 1 - row[low + 1]
    return dense


@float64
def test_twohot_equals_its_definition():
    torch.manual_seed(0)
    bins = v3.symexp_bins()
    between = bins[:-1] + torch.rand(254) * bins.diff()
    outside = torch.tensor([-math.inf, -1e9, bins[0] - 1, bins[-1] + 1, 1e9, math.inf])
    target = torch.cat([bins, between, outside])
    dense = dense_twohot(target, bins)
    logits = (3 * torch.randn(len(target), 255)).requires_grad_()
    plain = -(dense * logits.log_softmax(-1)).sum(-1)
    ours = v3.twohot_loss(logits, target, bins)
    assert relative(ours, plain) < 1e-12
    weight = torch.randn(len(target))
    (ours_grad,) = torch.autograd.grad((weight * ours).sum(), logits)
    (plain_grad,) = torch.autograd.grad((weight * plain).sum(), logits)
    assert relative(ours_grad, plain_grad) < 1e-12
    mean = v3.twohot_mean(dense.log(), bins)
    assert torch.allclose(mean, target.clamp(bins[0], bins[-1]), rtol=1e-12, atol=1e-6)


def test_an_impossible_class_is_drawn_at_its_uniform_share():
    torch.manual_seed(0)
    rssm = v3.RSSM(8, 2, 2, 16, 2, 1, 1, mix=0.01)
    logits = torch.zeros(200_000, 2, 16)
    logits[..., 3] = -50
    sample = rssm.sample(logits).unflatten(-1, (2, 16))
    assert (sample.sum(-1) == 1).all() and ((sample == 0) | (sample == 1)).all()
    share = sample[..., 3].mean().item()
    assert share == pytest.approx(0.01 / 16, rel=0.25)  # 250 draws expected, standard deviation 6 %
    assert sample[..., 0].mean().item() == pytest.approx(0.99 / 15 + 0.01 / 16, rel=0.02)


def groups_with_kl(nats):
    """Logits (1,1,2,2) of two groups, each with this KL from uniform."""
    p = torch.linspace(0.5, 0.999, 100_001)
    kl = p * (2 * p).log() + (1 - p) * (2 - 2 * p).log()
    p = p[(kl - nats).abs().argmin()]
    return torch.stack([p, 1 - p]).log().expand(1, 1, 2, 2).clone().requires_grad_()


@float64
def test_free_nats_apply_to_the_sum_over_groups():
    """Two groups of 0.6 nats: 1.2 with gradient. Clipped one by one they would give 2 and no gradient."""
    post = groups_with_kl(0.6)
    prior = torch.zeros_like(post).requires_grad_()
    dyn, rep, kl = v3.kl_losses(post, prior, 0.0, 1.0)
    assert dyn.item() == rep.item() == kl.item() == pytest.approx(1.2, abs=1e-3)
    to_post, to_prior = torch.autograd.grad(dyn.sum(), (post, prior), allow_unused=True)
    assert to_post is None and to_prior.abs().min() > 0.01, "dyn trains the prior alone"
    to_post, to_prior = torch.autograd.grad(rep.sum(), (post, prior), allow_unused=True)
    assert to_prior is None and to_post.abs().min() > 0.01, "rep trains the posterior alone"
    dyn, rep, _ = v3.kl_losses(post, prior, 0.0, 1.3)
    (dyn + rep).sum().backward()
    assert dyn.item() == rep.item() == 1.3
    assert not post.grad.any() and not prior.grad.any(), "below the free nats nothing is trained"


def test_a_certain_distribution_without_uniform_share_stays_finite():
    logits = torch.tensor([[[0.0, 200.0, 1.0]]], requires_grad=True)
    policy = v3.log_unimix(logits, 0.0)
    dyn, rep, kl = v3.kl_losses(logits[None], torch.zeros(1, 1, 1, 3), 0.0, 0.0)
    assert kl.item() == pytest.approx(math.log(3))
    assert v3.entropy(policy).item() == pytest.approx(0)
    (v3.entropy(policy) + policy[..., 1] + dyn + rep).sum().backward()
    assert logits.grad.isfinite().all()


# ---- returns ----


@float64
def test_lambda_return_equals_its_definition():
    """(1-lam) sum_n lam^(n-1) G_n with n-step returns G_n; here each step has its own lambda and live."""
    torch.manual_seed(0)
    steps = 9
    reward, value = torch.randn(2, steps + 1, 3)
    live, lam = torch.rand(2, steps + 1, 3)
    live[4, 0] = 0  # terminal
    live[7] = 0
    ours = v3.lambda_return(reward, value, live, lam)
    for t in range(steps):
        total = 0
        rewards = 0
        discount = 1
        mass = 1  # product of the lambdas so far
        for k in range(t + 1, steps + 1):
            rewards = rewards + discount * reward[k]
            discount = discount * live[k]
            share = 1 - lam[k] if k < steps else 1
            total = total + mass * share * (rewards + discount * value[k])
            mass = mass * lam[k]
        assert relative(ours[t], total) < 1e-12


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_lambda_return_of_a_chain(lam):
    """s0 -> s1 -> s2 (terminal); entering s1 pays 1, entering s2 pays 10; values 4, 5, 6; gamma 0.9."""
    reward = torch.tensor([[7.0], [1.0], [10.0]])
    value = torch.tensor([[4.0], [5.0], [6.0]])
    live = torch.tensor([[0.9], [0.9], [0.0]])
    ret = v3.lambda_return(reward, value, live, torch.full_like(reward, lam))
    assert ret[:, 0].tolist() == pytest.approx([1 + 0.9 * ((1 - lam) * 5 + lam * 10), 10])


def test_return_scale_starts_small_and_takes_all_returns_together():
    behaviour = v3.Behaviour(2, 2, True, v3.Args(size="size1m"))
    ramp = torch.linspace(-0.05, 1.05, 1101).reshape(3, 367)  # 5 % of it below 0.005, 95 % below 0.995
    assert behaviour.return_scale(2.9 / 0.99 * ramp) == 1
    assert behaviour.percentiles[0].item() == pytest.approx(0.01 * 2.9 / 0.99 * 0.005, rel=1e-3)
    scale = behaviour.return_scale(320 / 0.99 * ramp).item()
    assert scale == pytest.approx(0.01 * (0.99 * 2.9 + 320), rel=1e-4)


# ---- networks ----


@float64
def test_upsampling_in_the_kernel_equals_upsampling_first():
    torch.manual_seed(0)
    conv = shake(nn.Conv2d(3, 5, 5, padding=2))
    x = torch.randn(2, 3, 4, 6, requires_grad=True)
    plain = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    ours = v3.upsample_convolve(x, conv)
    assert relative(ours, plain) < 1e-11
    weight = torch.randn(2, 5, 8, 12)
    inputs = (x, conv.weight, conv.bias)
    ours_grads = torch.autograd.grad((weight * ours).sum(), inputs)
    plain_grads = torch.autograd.grad((weight * plain).sum(), inputs)
    for ours_grad, plain_grad in zip(ours_grads, plain_grads):
        assert relative(ours_grad, plain_grad) < 1e-11


@float64
def test_each_part_of_a_vector_has_its_own_output_layer():
    """Gradients are clipped per tensor: parts that share a layer would be clipped together."""
    torch.manual_seed(0)
    net = shake(v3.Decoder({"vector": (2, 1, 4)}, deter=16, stoch=12, units=6, depth=4, layers=2))
    shapes = [tuple(p.shape) for p in net.parameters()]
    assert shapes[-6:] == [(2, 6), (2,), (1, 6), (1,), (4, 6), (4,)]
    deter = torch.randn(3, 2, 16)
    stoch = torch.randn(3, 2, 12)
    target = 3 * torch.randn(3, 2, 7)
    recon = net(deter, stoch)["vector"]
    error = recon - target.sign() * (1 + target.abs()).log()
    parts = [part.square().sum(-1) for part in error.split([2, 1, 4], -1)]
    losses = reconstruction_losses(net, deter, stoch, dict(vector=target))
    assert relative(losses["vector"], sum(parts)) < 1e-12


def test_a_new_agent_predicts_zero_and_acts_at_random():
    torch.manual_seed(0)
    agent = v3.Agent({"vector": (3,)}, 18, True, v3.Args(size="size1m"))
    feat = torch.randn(100, agent.world.feat)
    for head in (agent.world.reward, agent.behaviour.critic, agent.behaviour.slow_critic):
        assert (v3.twohot_mean(head(feat), agent.world.bins) == 0).all()
        loss = v3.twohot_loss(head(feat), torch.randn(100), agent.world.bins)
        assert torch.allclose(loss, torch.tensor(math.log(255)))
    assert v3.entropy(agent.behaviour.policy(feat)).min() > 0.999 * math.log(18)


def counts(shapes, actions, discrete=True, size="size12m"):
    """Trained parameters by module; nothing is allocated."""
    with torch.device("meta"):
        agent = v3.Agent(shapes, actions, discrete, v3.Args(size=size))
    modules = dict(agent.world.named_children()) | dict(agent.behaviour.named_children())
    found = dict.fromkeys(("encoder", "rssm", "decoder", "reward", "cont", "actor", "critic"), 0)
    for name, module in modules.items():
        name = name.split("_")[0]  # the actor's output layers belong to it
        if name in found:
            found[name] += sum(p.numel() for p in module.parameters())
    assert sum(found.values()) == sum(p.numel() for p in agent.parameters() if p.requires_grad)
    return found


RGB = {"image": (64, 64, 3)}
GRAY = {"image": (96, 96, 1)}


@pytest.mark.parametrize("size, rgb18, rgb6, gray18", [
    ("size1m", 688_004, 686_456, 769_762),
    ("size12m", 10_498_772, 10_492_616, 11_808_850),
    ("size25m", 23_496_244, 23_487_016, 26_444_402),
    ("size50m", 41_659_284, 41_646_984, 46_900_882),
    ("size100m", 93_482_068, 93_463_624, 105_276_626),
    ("size200m", 165_967_124, 165_942_536, 186_936_082),
    ("size400m", 372_924_052, 372_887_176, 420_106_130)])
def test_parameter_counts_equal_the_official_ones(size, rgb18, rgb6, gray18):
    assert sum(counts(RGB, 18, size=size).values()) == rgb18
    assert sum(counts(RGB, 6, size=size).values()) == rgb6
    assert sum(counts(GRAY, 18, size=size).values()) == gray18


@pytest.mark.parametrize("size, wanted", [
    ("size1m", [14_304, 377_472, 80_595, 57_663, 41_153, 50_706, 66_111]),
    ("size12m", [220_416, 5_982_720, 1_272_003, 721_407, 656_129, 792_594, 853_503]),
    ("size200m", [3_492_864, 95_496_192, 20_282_115, 10_749_183, 10_488_833, 12_607_506, 12_850_431])])
def test_parameter_counts_by_module(size, wanted):
    assert list(counts(RGB, 18, size=size).values()) == wanted


@pytest.mark.parametrize("shapes, size, wanted", [
    ({"vector": (1, 14, 9)}, "size1m", 640_867), ({"vector": (1, 14, 9)}, "size12m", 9_738_019),
    (RGB, "size12m", 10_494_158), (RGB, "size200m", 165_948_686)])
def test_parameter_counts_of_walker(shapes, size, wanted):
    """DeepMind Control walker: six continuous actions; height, orientations and velocity, or an image."""
    assert sum(counts(shapes, 6, discrete=False, size=size).values()) == wanted


# ---- the losses from scratch ----


@float64
def test_losses_of_dreams_and_replay_from_scratch():
    """Which critic, state and row each term uses, on the dream that was dreamt."""
    agent = make_agent()
    world, behaviour = agent.world, agent.behaviour
    batch = make_rows()
    rows, _ = split(batch)
    dream = {}
    acted = []
    imagine, sample = behaviour.imagine, behaviour.sample

    def spied_imagine(rssm, deter, stoch):
        dream["feat"], dream["action"] = imagine(rssm, deter, stoch)
        return dream["feat"], dream["action"]

    behaviour.imagine = spied_imagine
    behaviour.sample = lambda feat: acted.append(feat) or sample(feat)
    total, post, metrics = agent.loss(batch)
    found = {name[7:]: x for name, x in metrics.items() if name.startswith("losses/")}
    scales = dict(image=1, vector=1, reward=1, cont=1, dyn=1, rep=0.1, policy=1, value=1, repval=0.3)
    assert found.keys() == scales.keys()
    assert total.item() == pytest.approx(sum(scale * found[name].item() for name, scale in scales.items()))

    # dreams
    feat, action = dream["feat"], dream["action"]
    assert torch.equal(feat[0], torch.cat([post["deter"], post["stoch"]], -1).flatten(0, 1)), "from all rows"
    assert torch.equal(torch.stack(acted), feat[:-1]), "an action is chosen on the state that it leaves"
    reward = v3.twohot_mean(world.reward(feat), world.bins)
    value = v3.twohot_mean(behaviour.critic(feat), world.bins)
    slow_value = v3.twohot_mean(behaviour.slow_critic(feat), world.bins)
    cont = world.cont(feat)[..., 0].sigmoid()
    ret = [value[H]]
    for k in reversed(range(H)):
        ret.insert(0, reward[k + 1] + cont[k + 1] * (0.05 * value[k + 1] + 0.95 * ret[0]))
    ret = torch.stack(ret[:H])
    weight = cont.cumprod(0)[:H]
    policy = behaviour.policy(feat[:H])
    scale = max(1, 0.01 * (ret.quantile(0.95) - ret.quantile(0.05)))
    gain = (policy * action).sum(-1) * (ret - value[:H]) / scale + 3e-4 * v3.entropy(policy)
    assert found["policy"].item() == pytest.approx(-(weight * gain).mean().item())
    logits = behaviour.critic(feat[:H])
    regression = v3.twohot_loss(logits, ret, world.bins) + v3.twohot_loss(logits, slow_value[:H], world.bins)
    assert found["value"].item() == pytest.approx((weight * regression).mean().item())

    # replay
    boot = ret[0].view(T, B)
    last = rows["is_last"].double()
    live = (1 - rows["is_terminal"].double()) * (1 - 1 / 333)
    goal = [boot[T - 1]]
    for t in reversed(range(T - 1)):
        lam = 0.95 * (1 - last[t + 1])
        goal.insert(0, rows["reward"][t + 1] + live[t + 1] * ((1 - lam) * boot[t + 1] + lam * goal[0]))
    goal = torch.stack(goal[: T - 1])
    logits = behaviour.critic(feat[0]).view(T, B, 255)[: T - 1]
    slow_value = slow_value[0].view(T, B)[: T - 1]
    regression = v3.twohot_loss(logits, goal, world.bins) + v3.twohot_loss(logits, slow_value, world.bins)
    assert found["repval"].item() == pytest.approx(((1 - last[: T - 1]) * regression).mean().item())


@float64
def test_a_dream_from_a_terminal_state_teaches_nothing():
    """w_0 = c_0: policy and value loss are exactly zero; later weights are products from c_0 on."""
    torch.manual_seed(0)
    agent = make_agent()
    behaviour = agent.behaviour
    feat = torch.randn(H + 1, 4, agent.world.feat)
    action = torch.eye(A)[torch.randint(A, (H, 4))]
    cont = torch.rand(H + 1, 4)
    cont[0, 1] = 0  # dream 1 starts dead
    cont[2, 2] = 0  # dream 2 dies in its third state
    reward = torch.randn(H + 1, 4)
    behaviour.imagine = lambda rssm, deter, stoch: (feat, action)
    world = SimpleNamespace(rssm=None, predict_reward=lambda feat: reward, predict_cont=lambda feat: cont)
    losses, _, _ = behaviour.imagination_losses(world, dict(deter=None, stoch=None))
    alive = torch.ones(H, 4, dtype=torch.bool)
    alive[:, 1] = False
    alive[2:, 2] = False
    assert torch.equal(losses["policy"] != 0, alive)
    assert torch.equal(losses["value"] != 0, alive)
    cont[0] /= 2  # the returns stay, as c_0 is in none of them
    half, _, _ = behaviour.imagination_losses(world, dict(deter=None, stoch=None))
    assert relative(half["policy"], losses["policy"] / 2) < 1e-12
    assert relative(half["value"], losses["value"] / 2) < 1e-12


@float64
def test_replay_critic_at_the_ends_of_episodes():
    """A truncated row has weight 0, the row before it bootstraps from its dream; a terminal row gives nothing."""
    torch.manual_seed(0)
    agent = make_agent()
    behaviour, gamma, lam = agent.behaviour, agent.args.gamma, agent.args.lam
    post = dict(deter=torch.randn(5, 3, D, requires_grad=True), stoch=latents(5, 3))
    boot, reward = torch.randn(2, 5, 3)
    last, terminal = torch.zeros(2, 5, 3, dtype=torch.bool)
    last[2, 0] = True  # column 0 is truncated
    last[2, 1] = True  # column 1 terminates, column 2 goes on
    terminal[2, 1] = True
    targets = []
    value_loss = behaviour.value_loss
    behaviour.value_loss = lambda logits, slow, ret: targets.append(ret) or value_loss(logits, slow, ret)
    loss = behaviour.replay_loss(post, boot, dict(reward=reward, is_last=last, is_terminal=terminal))
    ret = targets[0]
    assert loss.shape == ret.shape == (4, 3)
    assert relative(ret[1, 0], reward[2, 0] + gamma * boot[2, 0]) < 1e-12
    assert relative(ret[1, 1], reward[2, 1]) < 1e-12
    assert relative(ret[1, 2], reward[2, 2] + gamma * ((1 - lam) * boot[2, 2] + lam * ret[2, 2])) < 1e-12
    assert relative(ret[3], reward[4] + gamma * boot[4]) < 1e-12
    loss.sum().backward()
    trained = post["deter"].grad.abs().sum(-1) != 0
    assert torch.equal(trained[:-1], ~last[:-1]) and not trained[-1].any()
    assert torch.equal(loss != 0, ~last[:-1])


# ---- which loss trains what ----

# official behaviour, measured; dyn reaches the encoder through the samples of earlier steps
REACH = dict(
    image="encoder rssm decoder", vector="encoder rssm decoder", reward="encoder rssm reward",
    cont="encoder rssm cont", dyn="encoder rssm", rep="encoder rssm",
    policy="actor actor_mean", value="critic", repval="encoder rssm critic")


@DISCRETE
@pytest.mark.parametrize("loss", REACH)
@float64
def test_reach(loss, discrete):
    """Backward of one loss alone: non-zero where the table says so, exactly zero elsewhere."""
    agent = make_agent(discrete)
    losses = all_losses(agent, make_rows(discrete))
    assert losses.keys() == REACH.keys()
    losses[loss].mean().backward()
    wanted = set(REACH[loss].split())
    if loss == "policy" and not discrete:
        wanted.add("actor_std")
    assert reached(agent) == wanted


@float64
def test_total_gradient_is_the_weighted_sum():
    """Only gradients tell dyn and rep, equal in value, apart."""
    agent = make_agent(beta_dyn=0.7, beta_rep=0.2, beta_repval=0.4)
    batch = make_rows()
    params = [p for p in agent.parameters() if p.requires_grad]
    torch.manual_seed(2)
    agent.loss(batch)[0].backward()
    agent.behaviour.percentiles.zero_()
    scales = dict(dyn=0.7, rep=0.2, repval=0.4)
    losses = all_losses(agent, batch, seed=2)
    wanted = torch.autograd.grad(sum(scales.get(k, 1) * x.mean() for k, x in losses.items()), params)
    for p, grad in zip(params, wanted):
        assert relative(p.grad, grad) < 1e-9


@float64
def test_gradient_through_time_ends_at_a_reset():
    """h of the last step depends on the tokens of the steps since its episode began, and on no others."""
    agent = make_agent()
    torch.manual_seed(0)
    tokens = torch.randn(T, B, agent.world.encoder.tokens, requires_grad=True)
    _, context = split(make_rows())
    context["deter"].requires_grad_()
    deter, stoch, _ = agent.world.rssm.observe(tokens, **context)
    (torch.randn(B, D) * deter[-1]).sum().backward()
    seen = tokens.grad.abs().sum(-1) != 0
    assert seen.T.tolist() == [
        [False, False, True, True, True, False],  # the episode begins at row 3, hence step 2
        [False, False, False, True, True, False],
        [True, True, True, True, True, False]]
    assert (context["deter"].grad.abs().sum(-1) != 0).tolist() == [False, False, True]


@float64
def test_a_dream_leaves_the_world_model_alone():
    """It changes no weight or buffer but the return normaliser's, and nothing in it has a gradient."""
    agent = make_agent()
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    _, post, _ = agent.loss(make_rows())
    changed = {name for name, x in agent.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {"behaviour.percentiles"}
    assert not any(x.requires_grad for x in post.values()), "latents for replay keep the graph alive"
    deter = torch.randn(5, D, requires_grad=True)
    feat, action = agent.behaviour.imagine(agent.world.rssm, deter, latents(5))
    assert not feat.requires_grad and not action.requires_grad


# ---- one pass and single steps ----


def scan_inputs(agent):
    """Inputs of `RSSM.observe`; an episode begins in the middle of column 0 and at the start of column 1."""
    torch.manual_seed(3)
    first = torch.zeros(T, B, dtype=torch.bool)
    first[3, 0] = True
    first[0, 1] = True
    return dict(
        tokens=torch.randn(T, B, agent.world.encoder.tokens), prev_action=3 * torch.randn(T, B, A),
        is_first=first, deter=torch.randn(B, D), stoch=latents(B))


def part(inputs, begin, end, deter, stoch):
    cut = {name: inputs[name][begin:end] for name in ("tokens", "prev_action", "is_first")}
    return dict(cut, deter=deter, stoch=stoch)


@float64
def test_scan_is_its_steps():
    """T calls of one step give what one call over T steps gives."""
    agent = make_agent()
    rssm = agent.world.rssm
    inputs = scan_inputs(agent)
    torch.manual_seed(4)
    whole = rssm.observe(**inputs)
    torch.manual_seed(4)
    deter, stoch = inputs["deter"], inputs["stoch"]
    steps = []
    for t in range(T):
        steps.append(rssm.observe(**part(inputs, t, t + 1, deter, stoch)))
        deter, stoch = steps[-1][0][0], steps[-1][1][0]
    for ours, parts in zip(whole, zip(*steps)):
        assert relative(torch.cat(parts), ours) < 1e-12


@float64
def test_a_sequence_with_a_reset_is_two_sequences():
    """An episode that begins within a sequence is what it would be alone, whatever it is started from."""
    agent = make_agent()
    rssm = agent.world.rssm
    inputs = scan_inputs(agent)
    inputs["is_first"][3] = True
    torch.manual_seed(4)
    whole = rssm.observe(**inputs)
    torch.manual_seed(4)
    first = rssm.observe(**part(inputs, 0, 3, inputs["deter"], inputs["stoch"]))
    second = rssm.observe(**part(inputs, 3, T, torch.full((B, D), 9.0), torch.full((B, S * K), 9.0)))
    for ours, one, two in zip(whole, first, second):
        assert relative(torch.cat([one, two]), ours) < 1e-12


@float64
def test_nothing_crosses_a_reset():
    """Other rows before a reset, the last action included, change no loss or latent after it."""
    agent = make_agent()
    batch = make_rows()
    other = make_rows(seed=5)
    batch["is_first"][3] = True  # row 3 is step 2 of the losses
    changed = dict(batch)
    for name in ("image", "vector", "reward", "action", "deter", "stoch"):
        changed[name] = torch.cat([other[name][:3], batch[name][3:]])
    results = []
    for rows in (batch, changed):
        torch.manual_seed(4)
        losses, post, _ = agent.world.loss(*split(rows))
        results.append(losses | post)
    for name, one in results[0].items():
        two = results[1][name]
        assert relative(one[2:], two[2:]) < 1e-12, name
        assert relative(one[:2], two[:2]) > 1e-6, name


@float64
def test_batch_elements_are_independent():
    """Another sequence 1 changes all of its own losses and none of the others (the return scale is 1)."""
    agent = make_agent()
    batch = make_rows()
    other = make_rows(seed=5)
    changed = dict(batch)
    for name in ("image", "vector", "reward", "action", "deter", "stoch"):
        changed[name] = torch.stack([batch[name][:, 0], other[name][:, 1], batch[name][:, 2]], 1)
    losses = all_losses(agent, batch)
    agent.behaviour.percentiles.zero_()
    others = all_losses(agent, changed)
    for name in losses:
        one = losses[name].unflatten(-1, (-1, B))  # dreams are numbered t * B + b
        two = others[name].unflatten(-1, (-1, B))
        same = torch.isclose(one, two, rtol=1e-9, atol=1e-9).flatten(0, -2).all(0)
        assert same.tolist() == [True, False, True], name


@DISCRETE
def test_acting_is_observing(discrete):
    """Latents and actions that the policy made step by step, across episode ends, are those of one scan."""
    agent = make_agent(discrete)
    rssm = agent.world.rssm
    steps = 12
    torch.manual_seed(0)
    rows = dict(
        image=torch.randint(256, (steps, 2, 16, 16, 3), dtype=torch.uint8), vector=torch.randn(steps, 2, 5),
        is_first=torch.zeros(steps, 2, dtype=torch.bool))
    rows["is_first"][0] = True
    rows["is_first"][5, 0] = True
    rows["is_first"][8, 1] = True
    state = agent.initial(2)
    states = []
    for t in range(steps):
        torch.manual_seed(t)
        state = agent.act({name: x[t].numpy() for name, x in rows.items()}, state)
        states.append(state)
    states = {name: torch.stack([x[name] for x in states]) for name in state}

    after = []  # random states once a latent is drawn
    numbers = itertools.count(1)
    sample = rssm.sample

    def same_draw(logits):
        torch.manual_seed(next(numbers))
        z = sample(logits)
        after.append(torch.get_rng_state())
        return z

    rssm.sample = same_draw
    with torch.no_grad():
        tokens = agent.world.encoder(rows)[1:]
        deter, stoch, _ = rssm.observe(
            tokens, states["action"][:-1], rows["is_first"][1:], states["deter"][0], states["stoch"][0])
    torch.testing.assert_close(deter, states["deter"][1:], rtol=1e-4, atol=1e-5)
    assert torch.equal(stoch, states["stoch"][1:])
    feat = torch.cat([deter, stoch], -1)
    for t, rng in enumerate(after):
        torch.set_rng_state(rng)
        action = agent.behaviour.sample(feat[t])
        torch.testing.assert_close(action, states["action"][t + 1], rtol=1e-4, atol=1e-5)
    assert len(states["action"].unique(dim=0)) > 3  # they differ, so the comparison says something


# ---- which row meets which ----

ENDS = {6: "terminate", 9: "truncate", 7: "terminate"}  # episode length -> how it ends


def register(name, **options):
    """Environments whose episodes are, in turn, 6, 9 and 7 steps long."""
    lengths = itertools.cycle(ENDS)

    def make():
        length = next(lengths)
        return Scripted(length, ENDS[length], **options)

    gymnasium.register(name, make)


register("V3Vector-v0")
register("V3Continuous-v0", continuous=True)
register("V3Image-v0", image=True)


def play(env_id, folder):
    """The replay of a run of main whose updates do nothing, and the agent."""
    seen = {}

    def train_step(agent, optimizer, replay, batch_size):
        seen.update(agent=agent, replay=replay)
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v3, "train_step", train_step)
        patch.setattr(v3, "stop_signals", list)
        v3.main(v3.parse_args([
            f"--env-id={env_id}", f"--run-dir={folder}", "--num-envs=3", "--total-timesteps=200",
            "--device=cpu", "--size=size1m", "--image-size=16", "--batch-size=2", "--batch-length=8",
            "--eval-episodes=0"]))
    return seen["replay"], seen["agent"]


def observed(rows):
    """(step, code) that the observations show; code tells the action that led there."""
    obs = rows["vector"] if "vector" in rows else rows["image"][..., 0, 0, :].float()
    return obs[..., 0], obs[..., 1]


def code(action, env_id):
    """What the environment shows after this action."""
    if "Continuous" in env_id:
        return 128 + 127 * action[..., 0].clip(-1, 1)
    return action.argmax(-1).float() + 1


IDS = pytest.mark.parametrize("env_id", ["V3Vector-v0", "V3Continuous-v0", "V3Image-v0"])


@IDS
def test_rows_in_replay(env_id, tmp_path):
    """What a row holds arrived together; its action was chosen on it and led to the next row."""
    replay, _ = play(env_id, tmp_path)
    rows = {name: x[: replay.rows] for name, x in replay.data.items()}
    step, seen = observed(rows)
    first, last, action = rows["is_first"], rows["is_last"], rows["action"]
    assert first[0].all() and torch.equal(first[1:], last[:-1]), "the row after an end begins"
    assert not step[first].any() and not seen[first].any()
    assert torch.equal(step[1:][~first[1:]], step[:-1][~first[1:]] + 1)
    assert torch.equal(rows["reward"], step), "the environment's reward is its step number"
    caused = torch.where(first[1:], 0.0, code(action[:-1], env_id))
    torch.testing.assert_close(seen[1:], caused)
    assert not action[last].any(), "no action crosses the border of episodes"
    for env in range(3):
        (length,) = step[last[:, env], env].unique().tolist()
        dies = ENDS[int(length)] == "terminate"
        assert torch.equal(rows["is_terminal"][:, env], last[:, env] & dies), "a time limit is no death"
    latent = rows["stoch"].unflatten(-1, (S, K))
    assert (latent.sum(-1) == 1).all() and rows["deter"][~first].any(-1).all()


@IDS
def test_rows_in_training(env_id, tmp_path):
    """The action at step t is the one that led to observation t; row 0 lends its latents."""
    replay, agent = play(env_id, tmp_path)
    got = {}
    agent.world.loss = lambda rows, context: got.update(rows=rows, context=context) or ({}, {}, {})
    agent.behaviour.loss = lambda world, post, rows: ({}, {})
    torch.manual_seed(0)
    batch, index = replay.sample(200, 9)
    agent.loss(batch)
    rows, context = got["rows"], got["context"]
    step, seen = observed(rows)
    inside = step > 0
    assert step.shape == (8, 200) and inside[0].any() and not inside[0].all()
    torch.testing.assert_close(seen[inside], code(context["prev_action"], env_id)[inside])
    assert torch.equal(rows["reward"], step)
    assert torch.equal(context["is_first"], step == 0), "within an episode no reset"
    assert torch.equal(context["deter"], replay.data["deter"].flatten(0, 1)[index[0]])
    assert torch.equal(context["stoch"], replay.data["stoch"].flatten(0, 1)[index[0]])


# ---- replay ----


def test_samples_are_uniform_consecutive_and_of_one_stream(tmp_path):
    """Every row carries its number; the ring has wrapped around."""
    numbers = torch.arange(50)[:, None] * 10 + torch.arange(2)
    replay = make_replay(tmp_path, capacity=20, num_envs=2, number=numbers)
    torch.manual_seed(0)
    batch, _ = replay.sample(14_000, 7, online=False)
    number = batch["number"]
    assert (number[1:] - number[:-1] == 10).all()
    starts, count = number[0].unique(return_counts=True)
    possible = (torch.arange(30, 44)[:, None] * 10 + torch.arange(2)).flatten()
    assert torch.equal(starts, possible)
    chi_square = ((count - 500) ** 2 / 500).sum()
    assert chi_square < 55.5  # 27 degrees of freedom: exceeded with probability 0.001, and the seed is fixed
    assert batch["is_first"][0].all() and not batch["is_first"][1:].any()


def test_online_queue_hands_out_new_rows_once(tmp_path):
    """Sequences do not overlap, streams take turns, and what the ring has lost is skipped."""
    numbers = torch.arange(13)[:, None] * 10 + torch.arange(2)
    replay = make_replay(tmp_path, capacity=9, num_envs=2, number=numbers)
    batch, _ = replay.sample(8, 3)
    queued = batch["number"][:, :8].T.tolist()
    assert [40, 50, 60] in queued and [41, 51, 61] in queued
    assert [70, 80, 90] in queued and [71, 81, 91] in queued
    assert [100, 110, 120] in queued and [101, 111, 121] in queued
    assert replay.queued == 8  # rows 1 to 3 were lost, in both streams
    replay.sample(8, 3)
    assert replay.queued == 8


def random_replay(folder, rows, num_envs=1):
    """Episodes of 9 rows."""
    torch.manual_seed(0)
    first = (torch.arange(rows) % 9 == 0)[:, None].expand(rows, num_envs)
    last = (torch.arange(rows) % 9 == 8)[:, None].expand(rows, num_envs)
    lead = (rows, num_envs)
    return make_replay(
        folder, rows, num_envs, is_first=first, is_last=last, is_terminal=last,
        image=torch.randint(256, (*lead, 16, 16, 3), dtype=torch.uint8), vector=torch.randn(*lead, 5),
        reward=torch.randn(lead), action=torch.eye(A)[torch.randint(A, lead)],
        deter=torch.randn(*lead, D), stoch=latents(*lead).byte())


@pytest.mark.parametrize("rows", [60, 9])  # with 9 rows, three sequences of 7 overlap
def test_an_update_writes_its_latents_back(rows, tmp_path):
    """Replay then holds the new posterior at rows 1 to T of the sequences, and is unchanged elsewhere."""
    agent = make_agent()
    replay = random_replay(tmp_path, rows)
    optimizer = v3.LaProp(agent.parameters(), 0.0, 1, 0.3)
    plain = {name: x.clone() for name, x in replay.data.items()}
    seen = {}
    sample, loss = replay.sample, agent.loss

    def spied_sample(*size):
        seen["batch"], seen["index"] = sample(*size)
        return seen["batch"], seen["index"]

    def spied_loss(batch):
        seen["loss"] = loss(batch)
        return seen["loss"]

    replay.sample = spied_sample
    agent.loss = spied_loss
    v3.train_step(agent, optimizer, replay, B)
    index = seen["index"][1:]
    overlapping = len(index.unique()) < index.numel()
    assert overlapping or rows == 60
    for name in ("deter", "stoch"):
        post = seen["loss"][1][name]
        for b in range(B):
            plain[name][index[:, b], 0] = post[:, b].to(plain[name].dtype)
    for name, x in replay.data.items():
        assert torch.equal(x, plain[name]), name


# ---- update ----


def scalar_laprop(p, g, square, momentum, k, lr, warmup, agc=0.3, beta1=0.9, beta2=0.999, eps=1e-20):
    """Step k = 1, 2, ... for one tensor as lists of numbers, in place."""
    def norm(x):
        return math.sqrt(sum(v * v for v in x))

    clip = max(1.0, norm(g) / (agc * max(1e-3, norm(p))))
    for i in range(len(p)):
        grad = g[i] / clip
        square[i] = beta2 * square[i] + (1 - beta2) * grad * grad
        scaled = grad / (math.sqrt(square[i] / (1 - beta2**k)) + eps)
        momentum[i] = beta1 * momentum[i] + (1 - beta1) * scaled
        p[i] -= lr * min(1.0, (k - 1) / warmup) * momentum[i] / (1 - beta1**k)


@float64
def test_optimiser_equals_its_scalar_form():
    """Five steps with warm-up: clipped and unclipped tensors, zero weights, a zero gradient, one number."""
    torch.manual_seed(0)
    start = [torch.randn(3, 4), 100 * torch.randn(5), torch.zeros(4), torch.randn(2), torch.randn(())]
    params = [nn.Parameter(p.clone()) for p in start]
    optimizer = v3.LaProp(params, lr=0.01, warmup=3, agc=0.3)
    plain = []
    for p in start:
        zeros = [0.0] * p.numel()
        plain.append(dict(p=p.flatten().tolist(), square=list(zeros), momentum=zeros))
    for k in range(1, 6):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p) * (0 if i == 3 else k)
            scalar_laprop(g=p.grad.flatten().tolist(), k=k, lr=0.01, warmup=3, **plain[i])
        share = optimizer.step()["grad/clipped_share"]
        assert 0 < share < 1
        for p, numbers in zip(params, plain):
            assert p.flatten().tolist() == pytest.approx(numbers["p"], rel=1e-6, abs=1e-7)
        assert torch.equal(params[3], start[3])


def test_the_first_update_changes_nothing_and_the_second_everything(tmp_path):
    agent = make_agent(lr=0.1)
    args = agent.args
    optimizer = v3.LaProp(agent.parameters(), args.lr, args.warmup, args.agc)
    replay = random_replay(tmp_path, 40)
    params = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    assert not any("slow_critic" in name for name in params)
    for changed in (False, True):
        before = {name: p.detach().clone() for name, p in params.items()}
        v3.train_step(agent, optimizer, replay, B)
        for name, p in params.items():
            assert torch.equal(p, before[name]) != changed, name


@float64
def test_optimiser_ignores_the_scale_of_gradients():
    """Also near 1e-8, where an epsilon of 1e-8 would halve the step."""
    torch.manual_seed(0)
    start = torch.randn(6, 6)
    grads = 1e-8 * torch.randn(5, 6, 6)
    ends = []
    for factor in (1.0, 1e-3):
        p = nn.Parameter(start.clone())
        optimizer = v3.LaProp([p], lr=0.01, warmup=1, agc=0.3)
        for grad in grads:
            p.grad = factor * grad
            assert optimizer.step()["grad/clipped_share"] == 0
        ends.append(p.detach() - start)
    assert relative(*ends) < 1e-4


@pytest.mark.parametrize("size", [1.0, 1e-6])
@float64
def test_large_gradients_are_capped_relative_to_the_weights(size):
    torch.manual_seed(0)
    p = nn.Parameter(size * torch.randn(6, 6))
    optimizer = v3.LaProp([p], lr=0.0, warmup=1, agc=0.3, beta2=0.0)
    p.grad = 1e3 * torch.randn(6, 6)
    assert optimizer.step()["grad/clipped_share"] == 1
    clipped = optimizer.state_dict()["square"][0].sum().sqrt().item()
    assert clipped == pytest.approx(0.3 * max(1e-3, p.norm().item()))


class HostReads(TorchDispatchMode):
    """Names of operations that wait for a value on the host."""

    waiting = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2"}

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        masked = name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple))
        masked = masked and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in self.waiting or masked:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_an_update_reads_nothing_on_the_host(tmp_path):
    agent = make_agent(batch_length=T)
    optimizer = v3.LaProp(agent.parameters(), 1e-4, 1, 0.3)
    replay = random_replay(tmp_path, 40)
    v3.train_step(agent, optimizer, replay, B)
    with HostReads() as mode:
        v3.train_step(agent, optimizer, replay, B)
    assert not mode.found
    with HostReads() as mode:
        torch.zeros(3)[torch.ones(3, dtype=torch.bool)].sum().item()
    assert mode.found == ["index", "_local_scalar_dense"]


@float64
def test_compiled_regions_equal_the_plain_ones():
    """One update's loss and gradients, traced as one graph per region, without a C++ compiler."""
    results = []
    for compiled in (False, True):
        agent = make_agent()
        core, decoder = agent.world.rssm.core, agent.world.decoder
        if compiled:
            agent.world.rssm.core = torch.compile(core, dynamic=False, fullgraph=True, backend="aot_eager")
            decoder.compile(dynamic=False, fullgraph=True, backend="aot_eager")
        torch.manual_seed(2)
        total, _, _ = agent.loss(make_rows())
        total.backward()
        grads = [p.grad for p in agent.parameters() if p.requires_grad]
        results.append([total.detach(), *grads])
    for plain, compiled in zip(*results):
        assert relative(compiled, plain) < 1e-9


# ---- bf16 ----


@pytest.mark.parametrize("name", ["world.reward", "behaviour.critic", "behaviour.slow_critic"])
def test_numbers_near_200_keep_their_precision_in_bf16(name):
    """The output layer against itself in float64, on the hidden units that bf16 made."""
    agent = make_agent(precision="bf16")
    head = agent.get_submodule(name)
    bins = v3.symexp_bins()
    spread = (v3.symlog(bins) - v3.symlog(torch.tensor(200.0))).square()
    head[-1].bias.data = -4 * spread
    feat = torch.randn(200, agent.world.feat).bfloat16()
    with torch.no_grad(), agent.autocast():
        value = v3.twohot_mean(head(feat), bins)
        hidden = head[:-1](feat)
        exact = hidden.double() @ head[-1].weight.double().T + head[-1].bias.double()
    assert hidden.dtype == torch.bfloat16 and value.dtype == torch.float32
    exact = v3.twohot_mean(exact, bins.double())
    assert 100 < exact.median() < 400 and exact.std() > 5
    assert ((value - exact).abs() / exact).max() < 1e-4


def test_losses_in_bf16_are_close_to_those_in_fp32():
    """With the samples given. Trap: weights that are used without gradient first would stay without it."""
    batch = make_rows()
    torch.manual_seed(6)
    states = latents(T, B)
    dreams = latents(H, T * B)
    actions = torch.eye(A)[torch.randint(A, (H, T * B))]
    results = []
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        agent = make_agent(precision=precision)
        draws = iter([*states, *dreams])
        acts = iter(actions)
        agent.world.rssm.sample = lambda logits: next(draws).to(logits.dtype) + 0 * logits.flatten(-2)
        agent.behaviour.sample = lambda feat: next(acts)
        total, post, metrics = agent.loss(batch)
        total.backward()
        assert total.dtype == torch.float32 and post["deter"].dtype == dtype
        grads = [p.grad for p in agent.parameters() if p.requires_grad]
        assert all(grad is not None and grad.any() for grad in grads)
        losses = {name: x for name, x in metrics.items() if name.startswith("losses/")}
        results.append((losses, torch.cat([grad.flatten() for grad in grads])))
    (full, full_grad), (half, half_grad) = results
    for name in full:
        torch.testing.assert_close(half[name], full[name], rtol=0.02, atol=0.01)
    assert torch.cosine_similarity(full_grad, half_grad, dim=0) > 0.99


def test_norms_and_softmaxes_run_in_fp32_under_bf16():
    """What enters in bf16 is normalised in float32 and rounded once."""
    torch.manual_seed(0)
    x = torch.randn(50, 32).bfloat16()
    norm = v3.NormSiLU(32)
    bins = v3.symexp_bins(31)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), norm(x.float()).bfloat16())
        assert torch.equal(v3.unimix(x, 0.01), v3.unimix(x.float(), 0.01))
        assert torch.equal(v3.twohot_mean(x[:, 1:], bins), v3.twohot_mean(x[:, 1:].float(), bins))
        target = x[:, 0].float()
        loss = v3.twohot_loss(x[:, 1:].float(), target, bins)
        assert torch.equal(v3.twohot_loss(x[:, 1:], target, bins), loss)


# ---- breakages, each of which a test above must see ----


def flip_time(patch, m):
    lambda_return = m.lambda_return
    patch.setattr(m, "lambda_return", lambda *args: lambda_return(*(x.flip(0) for x in args)).flip(0))


def bootstrap_one_state_early(patch, m):
    lambda_return = m.lambda_return
    patch.setattr(m, "lambda_return", lambda reward, value, live, lam: lambda_return(
        reward, torch.cat([value[:1], value[:-1]]), live, lam))


def clip_each_group(patch, m):
    def kl(log_p, log_q):
        return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=1).sum(-1)

    patch.setattr(m, "categorical_kl", kl)


def swap_kl_sides(patch, m):
    kl_losses = m.kl_losses

    def swapped(*args):
        dyn, rep, kl = kl_losses(*args)
        return rep, dyn, kl

    patch.setattr(m, "kl_losses", swapped)


def skip_resets(patch, m):
    observe = m.RSSM.observe
    patch.setattr(m.RSSM, "observe", lambda self, tokens, prev_action, is_first, deter, stoch: observe(
        self, tokens, prev_action, is_first & False, deter, stoch))


def shift_the_action(patch, m):
    loss = m.Agent.loss
    patch.setattr(m.Agent, "loss", lambda self, batch: loss(
        self, dict(batch, action=batch["action"].roll(-1, 0))))


def sample_without_uniform_share(patch, m):
    sample = m.RSSM.sample

    def unmixed(self, logits):
        self.mix = 0.0
        return sample(self, logits)

    patch.setattr(m.RSSM, "sample", unmixed)


def dream_with_gradient(patch, m):
    patch.setattr(m.Behaviour, "imagine", m.Behaviour.imagine.__wrapped__)


def detach_replay_states(patch, m):
    replay_loss = m.Behaviour.replay_loss
    patch.setattr(m.Behaviour, "replay_loss", lambda self, post, boot, rows: replay_loss(
        self, {name: x.detach() for name, x in post.items()}, boot, rows))


def discount_twice(patch, m):
    predict_cont = m.WorldModel.predict_cont
    patch.setattr(m.WorldModel, "predict_cont", lambda self, feat: self.args.gamma * predict_cont(self, feat))


def start_weights_with_one(patch, m):
    losses = m.Behaviour.imagination_losses

    def broken(self, world, start):
        def predict_cont(feat):
            cont = world.predict_cont(feat)
            return torch.cat([torch.ones_like(cont[:1]), cont[1:]])

        return losses(self, SimpleNamespace(
            rssm=world.rssm, predict_reward=world.predict_reward, predict_cont=predict_cont), start)

    patch.setattr(m.Behaviour, "imagination_losses", broken)


def treat_a_time_limit_as_death(patch, m):
    replay_loss = m.Behaviour.replay_loss
    patch.setattr(m.Behaviour, "replay_loss", lambda self, post, boot, rows: replay_loss(
        self, post, boot, dict(rows, is_terminal=rows["is_last"])))


def correct_the_bias_of_the_scale(patch, m):
    return_scale = m.Behaviour.return_scale
    patch.setattr(m.Behaviour, "return_scale", lambda self, ret: return_scale(self, ret) / 0.01)


def fan_in_of_one_block(patch, m):
    init = m.init
    patch.setattr(m, "init", lambda layer, scale=1.0, fan_in=None: init(
        layer, scale, fan_in and layer.weight.shape[1]))


def clip_all_tensors_together(patch, m):
    def norm(tensors):
        total = torch.cat([x.flatten() for x in tensors]).norm()
        return [total] * len(tensors)

    patch.setattr(torch, "_foreach_norm", norm)


def round_outputs(patch, m):
    patch.setattr(m.Float32Linear, "forward", nn.Linear.forward)


def let_the_first_sequence_win(patch, m):
    write = m.Replay.write
    patch.setattr(m.Replay, "write", lambda self, index, **values: write(
        self, index.flip(1), **{name: x.flip(1) for name, x in values.items()}))


def in_a_folder(test, *args):
    """A test that takes a temporary folder last."""
    with tempfile.TemporaryDirectory() as folder:
        test(*args, Path(folder))


MUTATIONS = {
    "time flipped in the returns": (flip_time, test_lambda_return_equals_its_definition),
    "bootstrap one state early": (bootstrap_one_state_early, lambda: test_lambda_return_of_a_chain(0.0)),
    "free nats of each group": (clip_each_group, test_free_nats_apply_to_the_sum_over_groups),
    "weights of the KL swapped": (swap_kl_sides, test_free_nats_apply_to_the_sum_over_groups),
    "no reset inside a sequence": (skip_resets, test_nothing_crosses_a_reset),
    "the action that was chosen on a row": (
        shift_the_action, lambda: in_a_folder(test_rows_in_training, "V3Vector-v0")),
    "samples without uniform share": (
        sample_without_uniform_share, test_an_impossible_class_is_drawn_at_its_uniform_share),
    "dreams with gradient": (dream_with_gradient, lambda: test_reach("policy", True)),
    "replay critic on detached states": (detach_replay_states, lambda: test_reach("repval", True)),
    "discount twice": (discount_twice, test_losses_of_dreams_and_replay_from_scratch),
    "w_0 = 1": (start_weights_with_one, test_a_dream_from_a_terminal_state_teaches_nothing),
    "a time limit is death": (treat_a_time_limit_as_death, test_replay_critic_at_the_ends_of_episodes),
    "bias correction of the return scale": (
        correct_the_bias_of_the_scale, test_return_scale_starts_small_and_takes_all_returns_together),
    "fan-in of one block": (fan_in_of_one_block, initialisation),
    "one clip for all tensors": (clip_all_tensors_together, test_optimiser_equals_its_scalar_form),
    "values rounded to bf16": (
        round_outputs, lambda: test_numbers_near_200_keep_their_precision_in_bf16("behaviour.critic")),
    "the first of overlapping sequences wins": (
        let_the_first_sequence_win,
        lambda: in_a_folder(test_replay.test_the_last_of_overlapping_sequences_wins, "dreamer_v3")),
}
