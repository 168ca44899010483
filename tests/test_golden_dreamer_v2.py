"""dreamer_v2.py against numbers that the functions of danijar/dreamerv2 (07d906e) gave.

`given` reads an input, `close` compares an output; the last test fails if an array of the file was neither. Official
arrays are (B,T,...), ours time first; an official dream is number b * T + t, ours t * B + b; an official feature is
[z, h], ours [h, z]. Everything is compared in float64, the pure functions in float32 too."""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden, load
from torch import nn

v2 = load("dreamer_v2")
GOLDEN = golden("dreamer_v2")
INPUTS, COMPARED = set(), set()
F32, F64 = torch.float32, torch.float64
TOLERANCE = {F32: 1e-4, F64: 1e-6}
B, T, H, DETER, STOCH, CLASSES = 2, 3, 4, 8, 4, 5
TINY = dict(deter=DETER, stoch=STOCH, classes=CLASSES, hidden=7, cnn_depth=2, layers=2, units=9, imag_horizon=H)
DTYPES = pytest.mark.parametrize("dtype", [F32, F64])


def given(name, dtype=F64):
    INPUTS.add(name)
    x = torch.tensor(GOLDEN[name])
    return x.to(dtype) if x.is_floating_point() else x


def expected(name):
    COMPARED.add(name)
    return torch.tensor(GOLDEN[name]).double()


def close(ours, name, tolerance=1e-6):
    """Every entry, relative to itself or, where it is small, to a tenth of the largest one: the official layer norm in
    the recurrent cell runs in float32."""
    ours, theirs = torch.as_tensor(ours).detach().double(), expected(name)
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    size = theirs.abs()
    error = ((ours - theirs).abs() / size.clamp(min=max(0.1 * size.max().item(), 1e-12))).max()
    assert error <= tolerance, f"{name}: relative error {error:.3g}"


def force(onehot):
    """Noise for which an exponential race has this outcome."""
    return torch.where(onehot > 0, 1e-30, 1.0).double()


def force_samples(monkeypatch, *outcomes):
    """The next categorical samples of the script have these outcomes, one after the other."""
    queue = iter(outcomes)
    original = v2.sample_onehot
    monkeypatch.setattr(v2, "sample_onehot", lambda probs, noise: original(probs, force(next(queue))))


def force_uniform(monkeypatch, *numbers):
    """The next uniform numbers are these."""
    queue = iter(numbers)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda x, *bounds: x.copy_(next(queue)))


def onehot(index, classes):
    return F.one_hot(index.long(), classes).double()


def spy(monkeypatch, owner, name):
    """List that collects (arguments, result) of every call of owner.name."""
    calls, original = [], getattr(owner, name)

    def call(*args, **kwargs):
        calls.append((args, original(*args, **kwargs)))
        return calls[-1][1]

    monkeypatch.setattr(owner, name, call)
    return calls


# ---- pure functions ----


@DTYPES
def test_lambda_return(dtype):
    """The paper prints V_H = r_H + d_H v_H; that is our return of a dream whose last state comes twice."""
    inputs = [given(f"lr_{name}", dtype) for name in ("reward", "value", "disc")]
    ours = v2.lambda_return(*inputs, 0.95)
    close(ours, "lr_target", TOLERANCE[dtype])
    printed = v2.lambda_return(*(torch.cat([x, x[-1:]]) for x in inputs), 0.95)
    close(printed, "lr_target_as_printed", TOLERANCE[dtype])
    assert (ours - printed[:-1]).abs().max() > 0.5


@DTYPES
@pytest.mark.parametrize("free, average, balance, forward", [
    (0.0, 1, 0.8, 0), (2.0, 1, 0.8, 0), (0.0, 1, 0.5, 0), (1.0, 0, 0.8, 0), (0.0, 1, 0.8, 1)])
def test_kl_loss(free, average, balance, forward, dtype):
    """The last two are no options of the script (free nats per state, exchanged sides): put together from its KL."""
    name, leaves = f"kl_free{free}_avg{average}_bal{balance}_fwd{forward}", ("kl_post_logit", "kl_prior_logit")
    post, prior = (given(leaf, dtype).requires_grad_() for leaf in leaves)
    if average and not forward:
        loss, kl = v2.kl_loss(post, prior, balance, free)
        close(kl, "kl_value", TOLERANCE[dtype])
    else:
        p, q = (x.log_softmax(-1) for x in ((prior, post) if forward else (post, prior)))
        share = balance if forward else 1 - balance
        halves = (share, v2.categorical_kl(p, q.detach())), (1 - share, v2.categorical_kl(p.detach(), q))
        loss = sum(weight * kl.clamp(min=free).mean() for weight, kl in halves)
    close(loss, f"{name}_loss", TOLERANCE[dtype])
    grads = torch.autograd.grad(loss, (post, prior), allow_unused=True)
    for grad, leaf, side in zip(grads, (post, prior), ("post", "prior")):
        close(torch.zeros_like(leaf) if grad is None else grad, f"{name}_g{side}", TOLERANCE[dtype])


@DTYPES
def test_gru(dtype):
    """The cell alone: no latent, the given input instead of the first layer."""
    rssm = v2.RSSM(deter=6, hidden=5, stoch=2, classes=2, action_dim=1, tokens=1).to(dtype)
    rssm.img_in = nn.Identity()
    rssm.gru.load_state_dict(dict(weight=given("gru_kernel", dtype).T, bias=given("gru_bias", dtype)))
    rssm.gru_norm.load_state_dict(dict(weight=given("gru_gamma", dtype), bias=given("gru_beta", dtype)))
    nothing = torch.zeros(4, 0, dtype=dtype)
    close(rssm.core(given("gru_h", dtype), nothing, given("gru_x", dtype)), "gru_out", TOLERANCE[dtype])


@DTYPES
def test_straight_through(dtype):
    logits = given("st_logits", dtype).requires_grad_()
    noise = force(onehot(given("st_index"), 5)).to(dtype)
    for probs in (logits.log_softmax(-1).exp(), logits.softmax(-1)):  # of actions, of latents
        sample = v2.sample_onehot(probs, noise)
        assert torch.equal(sample.detach().double(), expected("st_sample"))
        grad, = torch.autograd.grad((given("st_cotangent", dtype) * sample).sum(), logits)
        close(grad, "st_grad", TOLERANCE[dtype])


@DTYPES
def test_truncated_normal(dtype, monkeypatch):
    """Six policies of one action each. The mean of the distribution is integrated from our log-probability."""
    mean, std = given("trunc_raw", dtype).requires_grad_().chunk(2, -1)
    policy = v2.TruncatedNormal(mean, std)
    close(policy.mean[:, 0], "trunc_mean", TOLERANCE[dtype])
    close(policy.std[:, 0], "trunc_std", TOLERANCE[dtype])
    close(policy.mean[:, 0], "trunc_mode", TOLERANCE[dtype])  # what evaluation acts with
    close(policy.log_prob(given("trunc_x", dtype)[:, None]), "trunc_logp", TOLERANCE[dtype])
    close(policy.entropy(), "trunc_entropy", TOLERANCE[dtype])
    x, weight = torch.tensor(np.array(np.polynomial.legendre.leggauss(50)), dtype=dtype)[..., None]
    close((weight * x * policy.log_prob(x[:, None]).exp()).sum(0), "trunc_mean_of_dist", TOLERANCE[dtype])

    force_uniform(monkeypatch, given("trunc_u", dtype)[:, None])
    sample = policy.rsample()
    close(sample[:, 0], "trunc_sample", TOLERANCE[dtype])
    grads = torch.autograd.grad(sample.sum(), (policy.mean, policy.std))
    for grad, name in zip(grads, ("mean", "std")):
        close(grad[:, 0], f"trunc_dsample_d{name}", TOLERANCE[dtype])
        exact = given(f"trunc_dsample_d{name}_exact", dtype)  # by differentiating the inverse CDF: another gradient
        assert (grad[:, 0] - exact).abs().max() > 0.01


@DTYPES
def test_optimiser(dtype):
    """Keras' Adam: a gradient as that of a product; the norm of the fourth is above the clipping threshold."""
    args, w = v2.Args(), nn.Parameter(given("opt_w0", dtype))
    optimizer = v2.Adam([w], args.model_lr, args)
    history, norms = [], []
    for grad in given("opt_grads", dtype):
        norms.append(optimizer.step((w * grad).sum()))
        history.append(w.detach().clone())
    close(torch.stack(history), "opt_hist", TOLERANCE[dtype])
    assert torch.allclose(torch.stack(norms), given("opt_grads", dtype).norm(dim=1)) and max(norms) > args.grad_clip


# ---- end to end ----


def linear(kernel):
    return kernel.T


def on_feature(kernel):
    """Rows of [z, h] to columns of [h, z]."""
    return kernel.roll(DETER, 0).T


def conv(kernel):
    return kernel.permute(3, 2, 0, 1)


def layers_of(world, behaviour):
    """Official layer name -> (our layer, how its kernel is laid out)."""
    rssm, found = world.rssm, {}
    found.update({f"encoder.conv{i}": (layer, conv) for i, layer in enumerate(world.encoder.convs)})
    found.update({f"decoder.conv{i}": (layer, conv) for i, layer in enumerate(world.decoder.convs)})
    found["decoder.convin"] = world.decoder.dense, on_feature
    for name, layer in dict(img_in=rssm.img_in[0], gru=rssm.gru, img_out_0=rssm.prior[0], img_dist_0=rssm.prior[2],
                            obs_out=rssm.posterior[0], obs_dist=rssm.posterior[2]).items():
        found[f"rssm.{name}"] = layer, linear
    heads = dict(reward=world.reward, actor=behaviour.actor, critic=behaviour.critic, slow=behaviour.slow_critic)
    if world.args.pred_discount:
        heads["discount"] = world.cont
    for name, net in heads.items():
        found[f"{name}.dense0"] = net[0], on_feature
        found[f"{name}.dense1"] = net[2], linear
        if name != "actor":
            found[f"{name}.out.out"] = net[-1], linear
    found["actor.out.out"] = behaviour.actor_mean, linear
    if not behaviour.discrete:
        found["actor.out.std"] = behaviour.actor_std, linear
    return found


def build(domain, **flags):
    """Our networks with the official weights, and official tensor name -> our parameter."""
    preset, channels, actions = ("default", 1, 3) if domain == "atari" else ("dmc", 3, 2)
    args = replace(v2.Args(), **{**v2.PRESETS[preset], **TINY, **flags})
    world = v2.WorldModel({"image": (64, 64, channels)}, actions, args).double()
    behaviour = v2.Behaviour(world.feat, actions, domain == "atari", args).double()
    params = {"rssm.gru.gamma": world.rssm.gru_norm.weight, "rssm.gru.beta": world.rssm.gru_norm.bias}
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(given(f"{domain}_w.{name}"))
        for name, (layer, layout) in layers_of(world, behaviour).items():
            params.update({f"{name}.kernel": layer.weight, f"{name}.bias": layer.bias})
            kernel = layout(given(f"{domain}_w.{name}.kernel"))
            assert kernel.shape == layer.weight.shape, name
            layer.weight.copy_(kernel)
            layer.bias.copy_(given(f"{domain}_w.{name}.bias"))
    ours = {id(p) for net in (world, behaviour) for p in net.parameters()}
    assert {id(p) for p in params.values()} == ours and len(params) == len(ours), "weights of ours are left alone"
    return args, world, behaviour, params


def batch_first(x):
    return x.transpose(0, 1)


def our_feature(official):
    return official.roll(DETER, -1)


def official_feature(ours):
    return ours.roll(-DETER, -1)


def our_dreams(official):
    """(H,N,...) with dream b * T + t to t * B + b."""
    return official.unflatten(1, (B, T)).transpose(1, 2).flatten(1, 2)


def official_dreams(ours):
    return ours.unflatten(1, (T, B)).transpose(1, 2).flatten(1, 2)


def close_gradient_norms(loss, params, case, part):
    """Gradient norm of each tensor that the official optimiser of this part trains, which must be all of ours."""
    names = [str(name) for name in GOLDEN[f"{case}_{part}_gradnames"]]
    COMPARED.add(f"{case}_{part}_gradnames")
    ours = [name for name in params if (name.split(".")[0] in ("actor", "critic", "slow")) is (part != "model")]
    assert set(names) == {name for name in ours if part == "model" or name.startswith(part)}
    grads = torch.autograd.grad(loss, [params[name] for name in names], retain_graph=True)
    close(torch.stack([grad.norm() for grad in grads]), f"{case}_{part}_gradnorms")


def rows(domain):
    """Replay rows (T,B,...); the official action is the one that led to the observation."""
    names = dict(image="image", prev_action="action", reward="reward", is_terminal="is_terminal", is_first="is_first")
    return {ours: batch_first(given(f"{domain}_{name}")) for ours, name in names.items()}


def posterior(domain):
    """Recorded samples (T,B,S,K)."""
    given(f"{domain}_idx_prior")  # the official code also draws from the prior there, and drops the draw
    return onehot(given(f"{domain}_idx_post"), CLASSES)


@pytest.fixture
def double():
    """Images and flags become float64 too."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(F32)


@pytest.mark.parametrize("domain", ["atari", "dmc_vision"])
def test_world_model(domain, monkeypatch, double):
    args, world, _, params = build(domain)
    batch, samples = rows(domain), posterior(domain)
    encoded, kls = spy(monkeypatch, world.encoder, "forward"), spy(monkeypatch, v2, "kl_loss")
    likes, entropies = spy(monkeypatch, v2, "normal_nll"), spy(monkeypatch, v2.F, "binary_cross_entropy_with_logits")
    force_samples(monkeypatch, *samples)
    loss, post, metrics = world.loss(batch)

    assert torch.equal(post["stoch"].unflatten(-1, (STOCH, CLASSES)), samples)
    close(batch_first(post["deter"]), f"{domain}_deter")
    close(batch_first(official_feature(torch.cat([post["deter"], post["stoch"]], -1))), f"{domain}_feat")
    ((_, embed),), (((post_logits, prior_logits, *_), (_, kl)),) = encoded, kls
    close(batch_first(embed), f"{domain}_embed")
    close(batch_first(post_logits), f"{domain}_post_logit")
    close(batch_first(prior_logits), f"{domain}_prior_logit")
    close(batch_first(kl), f"{domain}_kl")
    (_, image), (_, reward) = likes
    close(-batch_first(image.flatten(2).sum(-1)), f"{domain}_like_image")
    close(-batch_first(reward), f"{domain}_like_reward")
    if args.pred_discount:
        (((logits, target), _),) = entropies
        each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        close(-batch_first(each), f"{domain}_like_discount")
        close(metrics["losses/cont"], f"{domain}_met_discount_loss")
    for name in ("kl", "image", "reward"):
        close(metrics[f"losses/{name}"], f"{domain}_met_{name}_loss")
    close(metrics["wm/kl"], f"{domain}_met_model_kl")
    close(metrics["wm/prior_entropy"], f"{domain}_met_prior_ent")
    close(metrics["wm/post_entropy"], f"{domain}_met_post_ent")
    close(loss, f"{domain}_model_loss")
    close_gradient_norms(loss, params, domain, "model")


VARIANTS = dict(
    atari={}, dmc_vision={}, atari_both=dict(actor_grad="both"), atari_dyn=dict(actor_grad="dynamics"),
    dmc_vision_reinforce=dict(actor_grad="reinforce"))


@pytest.mark.parametrize("case", VARIANTS)
def test_actor_and_critic(case, monkeypatch, double):
    domain = "atari" if case.startswith("atari") else "dmc_vision"
    args, world, behaviour, params = build(domain, **VARIANTS[case])
    batch = rows(domain)
    latents = our_dreams(onehot(given(f"{domain}_idx_imag"), CLASSES))
    if domain == "atari":
        actions = our_dreams(onehot(given("atari_idx_action"), 3))
        steps = [sample for pair in zip(actions, latents) for sample in pair]
        force_samples(monkeypatch, *posterior(domain), *steps)
    else:
        force_samples(monkeypatch, *posterior(domain), *latents)
        force_uniform(monkeypatch, *our_dreams(given("dmc_vision_u_action")))
    _, post, _ = world.loss(batch)
    dreams, policies = spy(monkeypatch, behaviour, "imagine"), spy(monkeypatch, behaviour, "policy")
    returns, values = spy(monkeypatch, v2, "lambda_return"), spy(monkeypatch, behaviour.critic, "forward")
    losses, metrics = behaviour.loss(world, post, batch)
    close(losses["policy"], f"{case}_actor_loss")
    close(losses["value"], f"{case}_critic_loss")
    close_gradient_norms(losses["policy"], params, case, "actor")
    if case != domain:
        return  # the variants share the rest

    close_gradient_norms(losses["value"], params, case, "critic")
    ((_, (feat, action)),), ((_, value),) = dreams, values
    (((reward, slow_value, discount, _), target),) = returns
    assert torch.equal(feat[1:, :, DETER:].unflatten(-1, (STOCH, CLASSES)).detach(), latents)
    close(official_dreams(official_feature(feat)), f"{case}_seq_feat")
    close(official_dreams(torch.cat([torch.zeros_like(action[:1]), action])), f"{case}_seq_action")
    close(official_dreams(discount), f"{case}_seq_discount")
    close(official_dreams(reward), f"{case}_seq_reward")
    close(official_dreams(target), f"{case}_seq_target")
    close(official_dreams(slow_value), f"{case}_seq_slowvalue")
    # the weights are those by which the critic's loss listens to its values; the loss does not need the last one
    grad, = torch.autograd.grad(losses["value"], value)
    weight = (grad[..., 0] * target.numel() / (value[..., 0] - target)).detach()
    close(official_dreams(torch.cat([weight, weight[-1:] * discount[-2:-1]])), f"{case}_seq_weight")
    policy = policies[-1][1]
    close(official_dreams(v2.entropy(policy) if domain == "atari" else policy.entropy()), f"{case}_policy_entropy")
    for ours, name in ((reward.mean(), "reward_mean"), (reward.std(correction=0), "reward_std"),
                       (reward.mean(), "reward_normed_mean"),  # divided by 1 + 1e-8 in the official code
                       (reward.std(correction=0), "reward_normed_std"), (metrics["ac/slow_value"], "critic_slow"),
                       (metrics["ac/return"], "critic_target"), (metrics["ac/entropy"], "actor_ent"),
                       (args.ent_coef, "actor_ent_scale"), (metrics["ac/value"], "critic")):
        close(ours, f"{case}_acmet_{name}")


def test_every_array_is_used(request):
    tests = {name for name in globals() if name.startswith("test_")}
    run = {item.originalname for item in request.session.items if item.module.__name__ == __name__}
    if request.session.testsfailed or tests != run:
        pytest.skip("a test failed, or only a part of this file was selected")
    INPUTS.update(name for name in GOLDEN if name.startswith("dmc_vision_exactgrad"))  # a gradient that is not offered
    print(f"dreamer_v2.npz: {len(COMPARED)} arrays compared, {len(INPUTS - COMPARED)} as inputs, of {len(GOLDEN)}")
    assert INPUTS | COMPARED == set(GOLDEN)
