"""Formulas of the scripts against plain versions written here, mostly in float64, and exact parameter counts."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS, load
from torch import nn

F64 = torch.float64


@pytest.fixture(params=["dreamer_v3"])  # the scripts with DreamerV3's functions, networks and optimiser
def v3(request):
    torch.manual_seed(0)
    return load(request.param)


def rand(*shape):
    return torch.randn(shape, dtype=F64)


def relative(ours, plain):
    return (ours - plain).abs().max() / plain.abs().max().clamp(min=1e-30)


def shake(module):
    """float64, and no parameter at a value such as 0 or 1 that hides a mistake."""
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p += 0.2 * torch.randn_like(p)
    return module


# ---- two-hot, samples, KL ----


def test_twohot_by_index_equals_dense_twohot(v3):
    bins = v3.symexp_bins().double()
    between = bins[:-1] + torch.rand(254, dtype=F64) * bins.diff()
    outside = torch.tensor([-math.inf, -1e9, bins[0] - 1, bins[-1] + 1, 1e9, math.inf], dtype=F64)
    target = torch.cat([bins, between, outside])
    logits = (3 * rand(len(target), 255)).requires_grad_()
    dense = torch.zeros_like(logits)
    for row, x in zip(dense, target.clamp(bins[0], bins[-1])):
        low = min(int((bins <= x).sum()) - 1, 253)
        row[low + 1] = (x - bins[low]) / (bins[low + 1] - bins[low])
        row[low] = 1 - row[low + 1]
    plain, ours = -(dense * logits.log_softmax(-1)).sum(-1), v3.twohot_loss(logits, target, bins)
    assert relative(ours, plain) < 1e-12
    weight = rand(len(target))
    grads = [torch.autograd.grad((weight * loss).sum(), logits)[0] for loss in (ours, plain)]
    assert relative(*grads) < 1e-12
    assert torch.allclose(v3.twohot_mean(dense.log(), bins), target.clamp(bins[0], bins[-1]), rtol=1e-12, atol=1e-6)


def test_sample_is_onehot_and_its_gradient_that_of_the_mixed_probabilities(v3):
    logits, noise, weight = (10 * rand(50, 4, 8)).requires_grad_(), rand(50, 4, 8).exponential_(), rand(50, 4, 8)
    sample = v3.sample_onehot(v3.unimix(logits, 0.01), noise)
    assert set(sample.unique().tolist()) == {0, 1} and (sample.sum(-1) == 1).all()
    mixed = 0.99 * logits.softmax(-1) + 0.01 / 8
    assert (sample.argmax(-1) == (mixed.log() - noise.log()).argmax(-1)).all()  # Gumbel-max, the same draw
    grads = [torch.autograd.grad((weight * x).sum(), logits)[0] for x in (sample, mixed)]
    assert relative(*grads) < 1e-12


def test_sample_frequencies(v3):
    probs = torch.tensor([0.5, 0.25, 0.15, 0.08, 0.015, 0.005])
    count = v3.sample_onehot(probs.expand(400_000, 6), torch.empty(400_000, 6).exponential_()).sum(0)
    chi_square = ((count - 400_000 * probs) ** 2 / (400_000 * probs)).sum()
    assert chi_square < 20.5  # 5 degrees of freedom: exceeded with probability 0.001, and the seed is fixed


def test_an_impossible_class_is_drawn_at_the_uniform_share(v3):
    logits = torch.zeros(16)
    logits[3] = -50
    sample = v3.sample_onehot(v3.unimix(logits, 0.01).expand(500_000, 16), torch.empty(500_000, 16).exponential_())
    assert sample[:, 3].mean().item() == pytest.approx(0.01 / 16, rel=0.2)  # 312 draws expected, standard deviation 6 %


def test_free_nats_apply_to_the_sum_over_groups(v3):
    """Two groups with a KL of 0.6 each: 1.2 with gradient. Clipped one by one they would give 2 and no gradient."""
    p = torch.linspace(0.5, 0.99, 100_001, dtype=F64)
    kl = p * (2 * p).log() + (1 - p) * (2 - 2 * p).log()  # of (p, 1 - p) from uniform
    p = p[(kl - 0.6).abs().argmin()]
    post = torch.stack([p, 1 - p]).log().expand(1, 1, 2, 2).clone().requires_grad_()
    prior = torch.zeros_like(post).requires_grad_()
    dyn, rep, _ = v3.kl_losses(post, prior, 0.0, 1.0)
    assert dyn.item() == rep.item() == pytest.approx(1.2, abs=1e-3)
    to_post, to_prior = torch.autograd.grad(dyn.sum(), (post, prior), allow_unused=True)
    assert to_post is None and to_prior.abs().min() > 0.01
    to_post, to_prior = torch.autograd.grad(rep.sum(), (post, prior), allow_unused=True)
    assert to_prior is None and to_post.abs().min() > 0.01


def test_no_uniform_share_and_a_certain_distribution(v3):
    """Without the uniform share a probability can underflow to 0; official code stays finite."""
    logits = torch.tensor([[[0.0, 200.0, 1.0]]], requires_grad=True)
    policy = v3.log_unimix(logits, 0.0)
    dyn, rep, kl = v3.kl_losses(logits[None], torch.zeros(1, 1, 1, 3), 0.0, 0.0)
    assert kl.item() == pytest.approx(math.log(3)) and v3.entropy(policy).item() == pytest.approx(0)
    (v3.entropy(policy) + policy[..., 1] + dyn + rep).sum().backward()
    assert logits.grad.isfinite().all()


# ---- returns ----


def test_lambda_return_equals_its_definition(v3):
    """(1-lam) sum_n lam^(n-1) G_n with n-step returns G_n, generalised to a lambda and a continuation per step."""
    steps, shape = 9, (10, 3, 2)
    reward, value, live, lam = rand(*shape), rand(*shape), torch.rand(shape, dtype=F64), torch.rand(shape, dtype=F64)
    live[4, 0], live[7] = 0, 0  # terminal states
    for t in range(steps):
        total, rewards, discount, mass = 0, 0, 1, 1  # mass: product of the lambdas so far
        for k in range(t + 1, steps + 1):
            rewards = rewards + discount * reward[k]
            discount = discount * live[k]
            share = 1 - lam[k] if k < steps else 1
            total = total + mass * share * (rewards + discount * value[k])
            mass = mass * lam[k]
        assert relative(v3.lambda_return(reward, value, live, lam)[t], total) < 1e-12


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_lambda_return_of_a_chain(v3, lam):
    """s0 -> s1 -> s2 (terminal); entering s1 pays 1, entering s2 pays 10; the critic says 5 everywhere; gamma 0.9."""
    reward, value, live = torch.tensor([[7.0, 1, 10], [5, 5, 5], [0.9, 0.9, 0]], dtype=F64)[..., None]
    ret = v3.lambda_return(reward, value, live, torch.full_like(reward, lam))
    assert ret[:, 0].tolist() == pytest.approx([1 + 0.9 * ((1 - lam) * 5 + lam * 10), 10])


def test_return_scale_starts_small_and_takes_all_returns_together(v3):
    behaviour = v3.Behaviour(2, 2, True, v3.Args(size="size1m"))
    ramp = torch.linspace(-0.05, 1.05, 1101).reshape(3, 367)  # 5 % of it below 0.005, 95 % below 0.995
    assert behaviour.return_scale(2.9 / 0.99 * ramp) == 1
    assert behaviour.percentiles[0].item() == pytest.approx(0.01 * 2.9 / 0.99 * 0.005, rel=1e-3)
    assert behaviour.return_scale(320 / 0.99 * ramp).item() == pytest.approx(0.01 * (0.99 * 2.9 + 320), rel=1e-4)


# ---- networks ----


@pytest.mark.parametrize("m", ids=lambda m: m.__name__, argvalues=[
    load(path.stem) for path in SCRIPTS if hasattr(load(path.stem), "linear")])
@pytest.mark.parametrize("rows, slow_mkl, by_convolution", [
    (512, True, True), (512, False, False), (496, True, False), (520, True, False)])
@pytest.mark.parametrize("bias", [None, rand(5)])
def test_dense_layer_of_many_rows(m, monkeypatch, rows, slow_mkl, by_convolution, bias):
    used = []
    monkeypatch.setattr(m.F, "conv2d", lambda *args, plain=F.conv2d: used.append(1) or plain(*args))
    monkeypatch.setattr(m, "SLOW_MKL", slow_mkl)
    x, weight = rand(4, rows // 4, 7).requires_grad_(), rand(9, 5).requires_grad_()
    inputs, out = (x[..., 1:], weight.T[:, :6], bias), rand(4, rows // 4, 5)  # nothing is contiguous
    ours, plain = m.linear(*inputs), F.linear(*inputs)
    assert ours.shape == plain.shape and bool(used) is by_convolution
    assert relative(ours, plain) < 1e-12
    for a, b in zip(*(torch.autograd.grad((out * y).sum(), (x, weight)) for y in (ours, plain))):
        assert relative(a, b) < 1e-12


def test_upsampling_in_the_kernel(v3):
    conv, x = shake(nn.Conv2d(3, 5, 5, padding=2)), rand(2, 3, 4, 6).requires_grad_()
    plain = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    ours, weight = v3.upsample_convolve(x, conv), rand(2, 5, 8, 12)
    assert relative(ours, plain) < 1e-11
    inputs = (x, conv.weight, conv.bias)
    for a, b in zip(*(torch.autograd.grad((weight * y).sum(), inputs) for y in (ours, plain))):
        assert relative(a, b) < 1e-11


def test_norm_and_activation_in_one(v3):
    layer, x, weight = shake(v3.NormSiLU(5)), (0.02 * rand(4, 3, 5)).requires_grad_(), rand(4, 3, 5)
    plain = F.silu(x / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt() * layer.weight)
    assert relative(layer(x), plain) < 1e-12
    for a, b in zip(*(torch.autograd.grad((weight * y).sum(), (x, layer.weight)) for y in (layer(x), plain))):
        assert relative(a, b) < 1e-12


def test_decoder_reads_blocks_row_by_row(v3):
    """The block layer's output is (block, y, x, channel of the block), and the blocks' channels lie side by side."""
    net = shake(v3.Decoder({"image": (48, 32, 1)}, deter=16, stoch=12, units=6, depth=4))
    deter, stoch = rand(1, 2, 16), rand(1, 2, 12)
    parts = torch.einsum("bgi,gio->bgo", deter[0].unflatten(1, (8, 2)), net.from_deter.weight)
    parts = (parts.flatten(1) + net.from_deter.bias).view(2, 8, 3, 2, 2)
    x = torch.cat([parts[:, g] for g in range(8)], -1) + net.from_stoch(stoch[0]).view(2, 3, 2, 16)
    for norm, conv in zip(net.norms, net.convs):
        x = v3.upsample_convolve(norm(x).permute(0, 3, 1, 2), conv).permute(0, 2, 3, 1)
    assert relative(net(deter, stoch)["image"][0], x.sigmoid()) < 1e-12


def test_each_part_of_a_vector_has_its_own_output_layer(v3):
    """Gradients are clipped per tensor: parts that share one would be clipped together. The encoder needs one layer."""
    net = shake(v3.Decoder({"vector": (2, 1, 4)}, deter=16, stoch=12, units=6, depth=4, layers=2))
    hidden, outs = net.mlp, net.mlp_outs
    assert [tuple(p.shape) for p in outs.parameters()] == [(2, 6), (2,), (1, 6), (1,), (4, 6), (4,)]
    deter, stoch, target = rand(3, 2, 16), rand(3, 2, 12), 3 * rand(3, 2, 7)
    x = hidden(torch.cat([stoch, deter], -1))
    plain = torch.cat([x @ layer.weight.T + layer.bias for layer in outs], -1)
    assert relative(net(deter, stoch)["vector"], plain) < 1e-12
    loss = (plain - target.sign() * (1 + target.abs()).log()).square().sum(-1)
    assert relative(reconstruction_losses(v3, net, deter, stoch, dict(vector=target))["vector"], loss) < 1e-12
    encoder = shake(v3.Encoder({"vector": (2, 1, 4)}, units=6, depth=4, layers=2))
    assert encoder.mlp[0].weight.shape == (6, 7) and encoder(dict(vector=target)).shape == (3, 2, 6)


def reconstruction_losses(v3, decoder, deter, stoch, obs):
    """The losses of `WorldModel.loss` where all but the decoder is a stub."""
    logits, flat = torch.zeros(*deter.shape[:2], 3, 4), torch.zeros(*deter.shape[:2], 255)
    rssm = SimpleNamespace(observe=lambda tokens: (deter, stoch, logits), prior=lambda deter: logits)
    world = SimpleNamespace(args=v3.Args(), encoder=lambda rows: None, rssm=rssm, decoder=decoder,
                            bins=v3.symexp_bins(), reward=lambda feat: flat, cont=lambda feat: flat[..., :1])
    rows = dict(obs, reward=flat[..., 0], is_terminal=flat[..., 0])
    return v3.WorldModel.loss(world, rows, {})[0]


def rssm_case(v3):
    """A small RSSM, seven steps of three sequences with resets inside, leaves to differentiate, actions beyond +-1."""
    rssm = shake(v3.RSSM(16, 6, 3, 4, 4, 2, 5, 0.01))  # deter, hidden, stoch, classes, blocks, actions, tokens, mix
    first = torch.zeros(7, 3, dtype=bool)
    first[3, 0] = first[0, 1] = first[6, 1] = True
    carry = F.one_hot(torch.randint(4, (3, 3)), 4).flatten(1).double()
    leaves = [x.requires_grad_() for x in (rand(7, 3, 5), rand(3, 16), carry)]
    return rssm, leaves, 2 * rand(7, 3, 2), first, rand(7, 3, 3, 4).exponential_()


def gradients(rssm, leaves, outs):
    """Gradients of fixed random sums of h, z and logits for the inputs and all parameters but the prior's."""
    generator = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(x.shape, generator=generator, dtype=F64) * x).sum() for x in outs)
    params = [p for name, p in rssm.named_parameters() if not name.startswith("prior")]
    return torch.autograd.grad(loss, [*leaves, *params])


def naive_observe(rssm, tokens, action, first, deter, stoch, noise):
    """The RSSM as the paper and the official code lay it out, one step after the other."""
    def norm(x, scale):
        return F.silu(x / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt() * scale)

    def blockwise(layer, x):  # (B,G*in) -> (B,G,out)
        x, bias = x.unflatten(1, (rssm.blocks, -1)), layer.bias.unflatten(0, (rssm.blocks, -1))
        return torch.einsum("bgi,gio->bgo", x, layer.weight) + bias

    outs = []
    for token, act, reset, e in zip(tokens, action, first, noise):
        keep = (~reset)[:, None].double()
        deter, stoch, act = deter * keep, stoch * keep, act * keep
        act = act / act.abs().clamp(min=1).detach()
        x = torch.cat([
            norm(rssm.in_deter[0](deter), rssm.in_deter[1].weight),
            norm(rssm.in_stoch[0](stoch), rssm.in_stoch[1].weight),
            norm(rssm.in_action[0](act), rssm.in_action[1].weight)], -1)
        own = deter.unflatten(1, (rssm.blocks, -1))
        x = torch.cat([own, x[:, None].repeat(1, rssm.blocks, 1)], -1).flatten(1)
        x = norm(blockwise(rssm.hid, x).flatten(1), rssm.hid_norm.weight)
        reset, cand, update = (gate.flatten(1) for gate in blockwise(rssm.gru, x).chunk(3, -1))
        update = (update - 1).sigmoid()
        deter = update * (reset.sigmoid() * cand).tanh() + (1 - update) * deter
        x = norm(rssm.post_hid[0](torch.cat([deter, token], -1)), rssm.post_hid[1].weight)
        logits = rssm.post_out(x).unflatten(-1, (rssm.stoch, rssm.classes))
        probs = (1 - rssm.mix) * logits.softmax(-1) + rssm.mix / rssm.classes
        index = (probs / e).argmax(-1)
        stoch = (F.one_hot(index, rssm.classes) + probs - probs.detach()).flatten(1)
        outs.append((deter, stoch, logits))
    return [torch.stack(x) for x in zip(*outs)]


def test_hoisted_observe_equals_the_plain_scan(v3):
    rssm, leaves, action, first, noise = rssm_case(v3)
    tokens, deter, stoch = leaves
    rssm.noise = lambda *_: noise
    ours = rssm.observe(tokens, action, first, deter, stoch)
    plain = naive_observe(rssm, tokens, action, first, deter, stoch, noise)
    assert max(map(relative, ours, plain)) < 1e-11
    assert max(map(relative, gradients(rssm, leaves, ours), gradients(rssm, leaves, plain))) < 1e-11


def test_a_new_agent_predicts_zero_and_acts_at_random(v3):
    agent = v3.Agent({"vector": (3,)}, 18, True, v3.Args(size="size1m"))
    world, behaviour, feat = agent.world, agent.behaviour, torch.randn(100, agent.world.feat)
    for net in (world.reward, behaviour.critic, behaviour.slow_critic):
        assert (v3.twohot_mean(net(feat), world.bins) == 0).all()
        assert torch.allclose(v3.twohot_loss(net(feat), torch.randn(100), world.bins), torch.tensor(math.log(255)))
    assert v3.entropy(behaviour.policy(feat)).min() > 0.999 * math.log(18)


def test_total_loss_and_which_critic_state_and_row_each_term_uses(v3):
    agent = shake(v3.Agent({"vector": (3,)}, 2, True, v3.Args(size="size1m", batch_length=4, imag_horizon=3)))
    flags = {k: torch.rand(5, 2) < 0.3 for k in ("is_first", "is_last", "is_terminal")}
    batch = dict(flags, vector=rand(5, 2, 3), action=rand(5, 2, 2), reward=rand(5, 2), deter=rand(5, 2, 512),
                 stoch=F.one_hot(torch.randint(4, (5, 2, 32)), 4).flatten(-2))
    world, behaviour = agent.world, agent.behaviour
    draws = dict(post=world.rssm.noise(4, 2), action=behaviour.noise(3, 8), prior=world.rssm.noise(3, 8))
    world.rssm.noise = lambda *lead: draws["post" if lead == (4, 2) else "prior"]
    behaviour.noise = lambda *lead: draws["action"]
    total, post, metrics = agent.loss(batch)
    found = {k[7:]: v for k, v in metrics.items() if k.startswith("losses/")}
    scales = dict(vector=1, reward=1, cont=1, dyn=1, rep=0.1, policy=1, value=1, repval=0.3)
    assert found.keys() == scales.keys()
    assert total.item() == pytest.approx(sum(scale * found[k].item() for k, scale in scales.items()))

    start = post["deter"].flatten(0, 1), post["stoch"].flatten(0, 1)
    feat, action = behaviour.imagine(world.rssm, *start)
    for k in range(3):
        assert torch.equal(action[k], behaviour.sample(feat[k], draws["action"][k]))
    heads = world.reward, behaviour.critic, behaviour.slow_critic
    reward, value, slow = (v3.twohot_mean(net(feat), world.bins) for net in heads)
    cont, ret = world.cont(feat)[..., 0].sigmoid(), [value[3]]
    for k in (2, 1, 0):
        ret.insert(0, reward[k + 1] + cont[k + 1] * (0.05 * value[k + 1] + 0.95 * ret[0]))
    ret, weight = torch.stack(ret[:3]), cont.cumprod(0)[:3]
    policy = behaviour.policy(feat[:3])
    scale = max(1, 0.01 * (ret.quantile(0.95) - ret.quantile(0.05)))
    objective = (policy * action).sum(-1) * (ret - value[:3]) / scale + 3e-4 * v3.entropy(policy)
    assert found["policy"].item() == pytest.approx(-(weight * objective).mean().item(), rel=1e-6)
    regression = sum(v3.twohot_loss(behaviour.critic(feat[:3]), target, world.bins) for target in (ret, slow[:3]))
    assert found["value"].item() == pytest.approx((weight * regression).mean().item())

    boot, value, slow = ret[0].view(4, 2), behaviour.critic(feat[0]).view(4, 2, 255), slow[0].view(4, 2)
    last, live = batch["is_last"][1:].double(), (1 - batch["is_terminal"][1:].double()) * (1 - 1 / 333)
    goal = [boot[3]]
    for t in (2, 1, 0):
        lam = 0.95 * (1 - last[t + 1])
        goal.insert(0, batch["reward"][t + 2] + live[t + 1] * ((1 - lam) * boot[t + 1] + lam * goal[0]))
    regression = sum(v3.twohot_loss(value[:3], target, world.bins) for target in (torch.stack(goal[:3]), slow[:3]))
    assert found["repval"].item() == pytest.approx(((1 - last[:3]) * regression).mean().item())


def counts(v3, shapes, actions, discrete=True, size="size12m"):
    """Trained parameters by module, with the official module names; nothing is allocated."""
    with torch.device("meta"):
        agent = v3.Agent(shapes, actions, discrete, v3.Args(size=size))
    world, behaviour = agent.world, agent.behaviour
    modules = dict(enc=world.encoder, dyn=world.rssm, dec=world.decoder, rew=world.reward, con=world.cont,
                   pol=behaviour.actor, val=behaviour.critic)
    found = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    assert sum(found.values()) == sum(p.numel() for p in agent.parameters() if p.requires_grad)
    return found


RGB, GRAY = {"image": (64, 64, 3)}, {"image": (96, 96, 1)}


@pytest.mark.parametrize("size, rgb18, rgb6, gray18", [
    ("size1m", 688_004, 686_456, 769_762),
    ("size12m", 10_498_772, 10_492_616, 11_808_850),
    ("size25m", 23_496_244, 23_487_016, 26_444_402),
    ("size50m", 41_659_284, 41_646_984, 46_900_882),
    ("size100m", 93_482_068, 93_463_624, 105_276_626),
    ("size200m", 165_967_124, 165_942_536, 186_936_082),
    ("size400m", 372_924_052, 372_887_176, 420_106_130)])
def test_parameter_counts_equal_the_official_ones(v3, size, rgb18, rgb6, gray18):
    found = [sum(counts(v3, *case, size=size).values()) for case in ((RGB, 18), (RGB, 6), (GRAY, 18))]
    assert found == [rgb18, rgb6, gray18]


@pytest.mark.parametrize("size, expected", [
    ("size1m", (14_304, 377_472, 80_595, 57_663, 41_153, 50_706, 66_111)),
    ("size12m", (220_416, 5_982_720, 1_272_003, 721_407, 656_129, 792_594, 853_503)),
    ("size200m", (3_492_864, 95_496_192, 20_282_115, 10_749_183, 10_488_833, 12_607_506, 12_850_431))])
def test_parameter_counts_by_module(v3, size, expected):
    assert counts(v3, RGB, 18, size=size) == dict(zip(("enc", "dyn", "dec", "rew", "con", "pol", "val"), expected))


@pytest.mark.parametrize("size, proprio, vision", [
    ("size1m", 640_867, None), ("size12m", 9_738_019, 10_494_158), ("size200m", None, 165_948_686)])
def test_parameter_counts_of_walker(v3, size, proprio, vision):
    """DeepMind Control walker: six continuous actions, and three vectors or an image."""
    vectors = (1, 14, 9)  # height, orientations, velocity
    for shapes, expected in (({"vector": vectors}, proprio), (RGB, vision)):
        assert expected in (None, sum(counts(v3, shapes, 6, discrete=False, size=size).values()))


# ---- optimiser ----


def scalar_laprop(p, g, square, momentum, k, lr, warmup, agc=0.3, beta1=0.9, beta2=0.999, eps=1e-20):
    """Step k = 1, 2, ... for one tensor as lists of numbers; `square` and `momentum` are updated in place."""
    def norm(x):
        return math.sqrt(sum(v * v for v in x))

    clip = max(1.0, norm(g) / (agc * max(1e-3, norm(p))))
    for i in range(len(p)):
        grad = g[i] / clip
        square[i] = beta2 * square[i] + (1 - beta2) * grad * grad
        momentum[i] = beta1 * momentum[i] + (1 - beta1) * grad / (math.sqrt(square[i] / (1 - beta2**k)) + eps)
        p[i] -= lr * min(1.0, (k - 1) / warmup) * momentum[i] / (1 - beta1**k)


def test_optimiser_equals_its_scalar_form(v3):
    """Five steps of warm-up: clipped and unclipped tensors, zero weights, a zero gradient, a single number."""
    start = [rand(3, 4), 100 * rand(5), torch.zeros(4, dtype=F64), rand(2), rand()]
    params = [nn.Parameter(p.clone()) for p in start]
    optimizer = v3.LaProp(params, lr=0.01, warmup=3, agc=0.3)
    plain = [dict(p=p.flatten().tolist(), square=[0.0] * p.numel(), momentum=[0.0] * p.numel()) for p in start]
    for k in range(1, 6):
        for i, (p, state) in enumerate(zip(params, plain)):
            p.grad = rand(*p.shape) * (0 if i == 3 else k)
            scalar_laprop(g=p.grad.flatten().tolist(), k=k, lr=0.01, warmup=3, **state)
        share = optimizer.step()["grad/clipped_share"]
        for p, old, state in zip(params, start, plain):
            assert p.flatten().tolist() == pytest.approx(state["p"], rel=1e-6, abs=1e-7)  # it counts in float32
            assert k > 1 or torch.equal(p, old)
        assert 0 < share < 1 and torch.equal(params[3], start[3])


def test_first_update_changes_nothing_and_the_second_everything(v3):
    agent = v3.Agent({"vector": (3,)}, 2, True, v3.Args(size="size1m"))
    args, params = agent.args, dict(agent.named_parameters())
    optimizer = v3.LaProp(params.values(), args.lr, args.warmup, args.agc)
    for changed in (False, True):
        before = {k: p.detach().clone() for k, p in params.items()}
        for p in optimizer.params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        for name, p in params.items():
            assert torch.equal(p, before[name]) != (changed and "slow_critic" not in name), name


def test_optimiser_ignores_the_scale_of_gradients_and_caps_large_ones(v3):
    """Gradients near 1e-8, where an epsilon of 1e-8 would halve the step."""
    start, grads, ends = rand(6, 6), 1e-8 * rand(5, 6, 6), []
    for factor in (1.0, 1e-3):
        p = nn.Parameter(start.clone())
        optimizer = v3.LaProp([p], lr=0.01, warmup=0, agc=0.3)
        for g in grads:
            p.grad = factor * g
            assert optimizer.step()["grad/clipped_share"] == 0
        ends.append(p.detach() - start)
    assert relative(*ends) < 1e-4
    for weight in (start, 1e-6 * start):
        p = nn.Parameter(weight.clone())
        optimizer = v3.LaProp([p], lr=0.0, warmup=0, agc=0.3)
        p.grad = 1e3 * rand(6, 6)
        assert optimizer.step()["grad/clipped_share"] == 1
        clipped = (optimizer.square[0].sum() / (1 - 0.999)).sqrt().item()
        assert clipped == pytest.approx(0.3 * max(1e-3, weight.norm().item()))
