"""dreamer_v2.py against numbers that the functions of danijar/dreamerv2 (07d906e) gave, in float64.

Official arrays are (B,T,...), ours time first; an official dream is number b * T + t, ours t * B + b; an official
feature is [z, h], ours [h, z]. Official actions are stored with the observation they led to: our `prev_action`."""
import functools
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden, load
from torch import nn

v2 = load("dreamer_v2")
GOLDEN = golden("dreamer_v2")
B, T, H = 2, 3, 4
DETER, STOCH, CLASSES = 8, 4, 5
SIZES = dict(deter=DETER, stoch=STOCH, classes=CLASSES, hidden=7, cnn_depth=2, layers=2, units=9, imag_horizon=H)


def float64(test):
    """Run a test with float64 as torch's default."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        torch.set_default_dtype(torch.float64)
        try:
            test(*args, **kwargs)
        finally:
            torch.set_default_dtype(torch.float32)

    return run


@contextmanager
def forced_samples(*onehots, uniforms=()):
    """Within, categorical draws have these outcomes and uniform noise has these values, in the order of drawing."""
    onehots = list(onehots)
    uniforms = list(uniforms)

    def sample_onehot(probs, noise):
        outcome = onehots.pop(0)
        assert outcome.shape == probs.shape
        return v2.StraightThrough.apply(probs, torch.where(outcome > 0, 1e-30, 1.0))

    def uniform_(x, low=0, high=1):
        return x.copy_(uniforms.pop(0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v2, "sample_onehot", sample_onehot)
        patch.setattr(torch.Tensor, "uniform_", uniform_)
        yield
    assert not onehots and not uniforms, "fewer draws than expected"


def given(name):
    x = torch.tensor(GOLDEN[name])
    return x.double() if x.is_floating_point() else x


def onehot(index, classes):
    return F.one_hot(index.long(), classes).double()


def close(ours, name, tolerance=1e-6):
    """Every entry, relative to itself or, where it is small, to a tenth of the largest one: the official layer norm
    in the recurrent cell runs in float32."""
    ours = torch.as_tensor(ours).detach().double()
    theirs = torch.tensor(GOLDEN[name]).double()
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    size = theirs.abs()
    smallest = max(0.1 * size.max().item(), 1e-12)
    error = ((ours - theirs).abs() / size.clamp(min=smallest)).max()
    assert error <= tolerance, f"{name}: relative error {error:.3g}"


# ---- pure functions ----


@float64
def test_lambda_return():
    """The paper prints V_H = r_H + d_H v_H: that is our return of a dream whose last state comes twice."""
    inputs = [given(f"lr_{name}") for name in ("reward", "value", "disc")]
    ours = v2.lambda_return(*inputs, 0.95)
    close(ours, "lr_target")
    twice = [torch.cat([x, x[-1:]]) for x in inputs]
    printed = v2.lambda_return(*twice, 0.95)
    close(printed, "lr_target_as_printed")
    assert (ours - printed[:-1]).abs().max() > 0.5


@float64
@pytest.mark.parametrize("free, balance", [(0.0, 0.8), (2.0, 0.8), (0.0, 0.5)])
def test_kl_loss(free, balance):
    post = given("kl_post_logit").requires_grad_()
    prior = given("kl_prior_logit").requires_grad_()
    loss, kl = v2.kl_loss(post, prior, balance, free)
    grad_post, grad_prior = torch.autograd.grad(loss, (post, prior), materialize_grads=True)
    name = f"kl_free{free}_avg1_bal{balance}_fwd0"
    close(kl, "kl_value")
    close(loss, f"{name}_loss")
    close(grad_post, f"{name}_gpost")
    close(grad_prior, f"{name}_gprior")


@float64
@pytest.mark.parametrize("name, free, forward", [
    ("kl_free1.0_avg0_bal0.8_fwd0", 1.0, False), ("kl_free0.0_avg1_bal0.8_fwd1", 0.0, True)])
def test_other_settings_of_the_official_kl(name, free, forward):
    """Free nats per state and exchanged sides are no options here; put together from the KL they are the same."""
    post = given("kl_post_logit").requires_grad_()
    prior = given("kl_prior_logit").requires_grad_()
    p = (prior if forward else post).log_softmax(-1)
    q = (post if forward else prior).log_softmax(-1)
    to_p = v2.categorical_kl(p, q.detach()).clamp(min=free).mean()
    to_q = v2.categorical_kl(p.detach(), q).clamp(min=free).mean()
    loss = 0.8 * to_p + 0.2 * to_q if forward else 0.2 * to_p + 0.8 * to_q
    grad_post, grad_prior = torch.autograd.grad(loss, (post, prior))
    close(loss, f"{name}_loss")
    close(grad_post, f"{name}_gpost")
    close(grad_prior, f"{name}_gprior")


@float64
def test_gru():
    """The cell alone: its first layer hands the given input on."""
    x = given("gru_x")
    inputs = x.shape[-1]
    rssm = v2.RSSM(deter=6, hidden=inputs, stoch=1, classes=1, action_dim=inputs, tokens=1)
    rssm.img_in = nn.Identity()
    rssm.gru.weight.data = given("gru_kernel").T
    rssm.gru.bias.data = given("gru_bias")
    rssm.gru_norm.weight.data = given("gru_gamma")
    rssm.gru_norm.bias.data = given("gru_beta")
    nothing = x[:, :0]
    close(rssm.core(given("gru_h"), nothing, x), "gru_out")


@float64
def test_straight_through():
    logits = given("st_logits").requires_grad_()
    with forced_samples(onehot(given("st_index"), 5)):
        sample = v2.sample_onehot(logits.softmax(-1), None)
    close(sample, "st_sample", 0)
    loss = (given("st_cotangent") * sample).sum()
    close(torch.autograd.grad(loss, logits)[0], "st_grad")


@float64
def test_truncated_normal():
    """Six policies of one action each. The mean of the distribution is integrated from our log-probability."""
    mean, std = given("trunc_raw")[..., None].unbind(-2)
    policy = v2.TruncatedNormal(mean.requires_grad_(), std.requires_grad_())
    close(policy.mean[:, 0], "trunc_mean")
    close(policy.mean[:, 0], "trunc_mode")  # what evaluation acts with
    close(policy.std[:, 0], "trunc_std")
    close(policy.log_prob(given("trunc_x")[:, None]), "trunc_logp")
    close(policy.entropy(), "trunc_entropy")

    nodes, weights = np.polynomial.legendre.leggauss(50)
    x = torch.tensor(nodes)[:, None]
    density = policy.log_prob(x[..., None]).exp()  # (50,6)
    close((torch.tensor(weights)[:, None] * x * density).sum(0), "trunc_mean_of_dist")

    with forced_samples(uniforms=[given("trunc_u")[:, None]]):
        sample = policy.rsample()
    close(sample[:, 0], "trunc_sample")
    to_mean, to_std = torch.autograd.grad(sample.sum(), (policy.mean, policy.std))
    close(to_mean[:, 0], "trunc_dsample_dmean")
    close(to_std[:, 0], "trunc_dsample_dstd")
    exact = torch.tensor(GOLDEN["trunc_dsample_dmean_exact"])
    assert (to_mean[:, 0] - exact).abs().min() > 0.3, "the exact derivative would train another actor"


@float64
def test_optimizer():
    """A gradient as that of a product; the norm of the fourth is above the clipping threshold."""
    args = v2.Args()
    w = nn.Parameter(given("opt_w0"))
    optimizer = v2.Adam([w], args.model_lr, args)
    grads = given("opt_grads")
    history = []
    norms = []
    for grad in grads:
        norms.append(optimizer.step((w * grad).sum()))
        history.append(w.detach().clone())
    close(torch.stack(history), "opt_hist")
    assert torch.allclose(torch.stack(norms), grads.norm(dim=1))
    assert max(norms) > args.grad_clip


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
    rssm = world.rssm
    found = {
        "decoder.convin": (world.decoder.dense, on_feature),
        "rssm.img_in": (rssm.img_in[0], linear),
        "rssm.gru": (rssm.gru, linear),
        "rssm.img_out_0": (rssm.prior[0], linear),
        "rssm.img_dist_0": (rssm.prior[2], linear),
        "rssm.obs_out": (rssm.posterior[0], linear),
        "rssm.obs_dist": (rssm.posterior[2], linear),
        "actor.dense0": (behaviour.actor[0], on_feature),
        "actor.dense1": (behaviour.actor[2], linear),
        "actor.out.out": (behaviour.actor_mean, linear),
    }
    if not behaviour.discrete:
        found["actor.out.std"] = behaviour.actor_std, linear
    for i in range(4):
        found[f"encoder.conv{i}"] = world.encoder.convs[i], conv
        found[f"decoder.conv{i}"] = world.decoder.convs[i], conv
    heads = dict(reward=world.reward, critic=behaviour.critic, slow=behaviour.slow_critic)
    if world.args.pred_discount:
        heads["discount"] = world.cont
    for name, net in heads.items():
        found[f"{name}.dense0"] = net[0], on_feature
        found[f"{name}.dense1"] = net[2], linear
        found[f"{name}.out.out"] = net[4], linear
    return found


def build(domain, **flags):
    """Our networks with the official weights, and official tensor name -> our parameter."""
    preset = dict(atari="default", dmc_vision="dmc")[domain]
    channels = dict(atari=1, dmc_vision=3)[domain]
    action_dim = dict(atari=3, dmc_vision=2)[domain]
    args = replace(v2.Args(), **{**v2.PRESETS[preset], **SIZES, **flags})
    agent = v2.Agent({"image": (64, 64, channels)}, action_dim, domain == "atari", args)
    world = agent.world
    params = {
        "rssm.gru.gamma": world.rssm.gru_norm.weight,
        "rssm.gru.beta": world.rssm.gru_norm.bias,
    }
    for name, parameter in params.items():
        parameter.data.copy_(given(f"{domain}_w.{name}"))
    for name, (layer, layout) in layers_of(world, agent.behaviour).items():
        kernel = layout(given(f"{domain}_w.{name}.kernel"))
        assert kernel.shape == layer.weight.shape, name
        layer.weight.data.copy_(kernel)
        layer.bias.data.copy_(given(f"{domain}_w.{name}.bias"))
        params[f"{name}.kernel"] = layer.weight
        params[f"{name}.bias"] = layer.bias
    assert {id(p) for p in params.values()} == {id(p) for p in agent.parameters()}, "some have no official weights"
    return agent, params


def batch_first(x):
    return x.transpose(0, 1)


def official_feature(ours):
    return ours.roll(-DETER, -1)


def our_dreams(official):
    """(H,N,...) with dream b * T + t to t * B + b."""
    return official.unflatten(1, (B, T)).transpose(1, 2).flatten(1, 2)


def official_dreams(ours):
    return ours.unflatten(1, (T, B)).transpose(1, 2).flatten(1, 2)


def close_gradient_norms(loss, params, case, part):
    """Gradient norm of each tensor that the official optimiser of this part trains: all of ours."""
    names = [str(name) for name in GOLDEN[f"{case}_{part}_gradnames"]]
    behaviour = ("actor", "critic", "slow")
    if part == "model":
        ours = {name for name in params if not name.startswith(behaviour)}
    else:
        ours = {name for name in params if name.startswith(part)}
    assert set(names) == ours
    grads = torch.autograd.grad(loss, [params[name] for name in names], retain_graph=True)
    close(torch.stack([grad.norm() for grad in grads]), f"{case}_{part}_gradnorms")


def rows_of(domain):
    """Replay rows (T,B,...)."""
    names = ("image", "reward", "is_terminal", "is_first")
    rows = {name: batch_first(given(f"{domain}_{name}")) for name in names}
    return dict(rows, prev_action=batch_first(given(f"{domain}_action")))


def posterior_of(domain):
    """The sampled latents (B,S,K) of T steps."""
    return onehot(given(f"{domain}_idx_post"), CLASSES)


def observe(agent, rows, domain):
    """Tokens, deter, stoch and logits of the official samples."""
    tokens = agent.world.encoder(rows)
    start = agent.initial(B)
    with forced_samples(*posterior_of(domain)):
        return tokens, *agent.world.rssm.observe(
            tokens, rows["prev_action"], rows["is_first"], start["deter"], start["stoch"])


@float64
@pytest.mark.parametrize("domain", ["atari", "dmc_vision"])
def test_observe_and_heads(domain):
    agent, _ = build(domain)
    world = agent.world
    rows = rows_of(domain)
    tokens, deter, stoch, post_logits = observe(agent, rows, domain)
    feat = torch.cat([deter, stoch], -1)
    close(batch_first(tokens), f"{domain}_embed")
    close(batch_first(deter), f"{domain}_deter")
    close(batch_first(official_feature(feat)), f"{domain}_feat")
    close(batch_first(post_logits), f"{domain}_post_logit")
    close(batch_first(world.rssm.groups(world.rssm.prior(deter))), f"{domain}_prior_logit")

    image = v2.normal_nll(world.decoder(deter, stoch), rows["image"] / 255 - 0.5)
    close(-batch_first(image.flatten(2).sum(-1)), f"{domain}_like_image")
    target = rows["reward"].tanh() if domain == "atari" else rows["reward"]
    reward = v2.normal_nll(world.predict_reward(feat), target)
    close(-batch_first(reward), f"{domain}_like_reward")
    if domain == "atari":
        cont = world.predict_cont(feat)
        target = 0.999 * (1 - rows["is_terminal"].double())
        like = target * cont.log() + (1 - target) * (1 - cont).log()
        close(batch_first(like), f"{domain}_like_discount")


@float64
@pytest.mark.parametrize("domain", ["atari", "dmc_vision"])
def test_world_model_loss(domain):
    agent, params = build(domain)
    with forced_samples(*posterior_of(domain)):
        loss, post, metrics = agent.world.loss(rows_of(domain))
    close(batch_first(post["deter"]), f"{domain}_deter")
    assert torch.equal(post["stoch"], posterior_of(domain).flatten(-2))
    close(metrics["losses/kl"], f"{domain}_met_kl_loss")
    close(metrics["losses/image"], f"{domain}_met_image_loss")
    close(metrics["losses/reward"], f"{domain}_met_reward_loss")
    if domain == "atari":
        close(metrics["losses/cont"], f"{domain}_met_discount_loss")
    close(metrics["wm/kl"], f"{domain}_met_model_kl")
    close(metrics["wm/prior_entropy"], f"{domain}_met_prior_ent")
    close(metrics["wm/post_entropy"], f"{domain}_met_post_ent")
    close(loss, f"{domain}_model_loss")
    close_gradient_norms(loss, params, domain, "model")


def dream_noise(domain):
    """Forced draws of a dream: an action, then a latent, H times."""
    latents = our_dreams(onehot(given(f"{domain}_idx_imag"), CLASSES))
    if domain == "dmc_vision":
        return dict(onehots=list(latents), uniforms=list(our_dreams(given("dmc_vision_u_action"))))
    actions = our_dreams(onehot(given("atari_idx_action"), 3))
    pairs = [draw for pair in zip(actions, latents) for draw in pair]
    return dict(onehots=pairs, uniforms=[])


@contextmanager
def forced_dream(domain):
    noise = dream_noise(domain)
    with forced_samples(*noise["onehots"], uniforms=noise["uniforms"]):
        yield


def posterior(agent, rows, domain):
    _, deter, stoch, _ = observe(agent, rows, domain)
    return dict(deter=deter.detach(), stoch=stoch.detach())


@float64
@pytest.mark.parametrize("domain", ["atari", "dmc_vision"])
def test_dream(domain):
    """States, actions, rewards, discounts, weights and targets of a dream from every replayed state."""
    agent, _ = build(domain)
    world = agent.world
    behaviour = agent.behaviour
    rows = rows_of(domain)
    post = posterior(agent, rows, domain)
    with forced_dream(domain):
        feat, action = behaviour.imagine(world.rssm, post["deter"].flatten(0, 1), post["stoch"].flatten(0, 1))
    target, slow_value, weight = behaviour.returns(world, feat, rows["is_terminal"].flatten())
    reward = world.predict_reward(feat)
    cont = world.predict_cont(feat)
    if domain == "atari":
        cont = torch.cat([weight[1:2], cont[1:]])  # that of a replayed state is known

    shifted = torch.cat([torch.zeros_like(action[:1]), action])
    close(official_dreams(official_feature(feat)), f"{domain}_seq_feat")
    close(official_dreams(shifted), f"{domain}_seq_action")
    close(official_dreams(cont), f"{domain}_seq_discount")
    close(official_dreams(weight), f"{domain}_seq_weight")
    close(official_dreams(reward), f"{domain}_seq_reward")
    close(official_dreams(target), f"{domain}_seq_target")
    close(official_dreams(slow_value), f"{domain}_seq_slowvalue")

    _, bonus = behaviour.actor_loss(feat, action, target, slow_value, weight)
    close(official_dreams(bonus), f"{domain}_policy_entropy")
    close(reward.mean(), f"{domain}_acmet_reward_mean")
    close(reward.std(correction=0), f"{domain}_acmet_reward_std")
    close(reward.mean(), f"{domain}_acmet_reward_normed_mean")  # divided by 1 + 1e-8
    close(reward.std(correction=0), f"{domain}_acmet_reward_normed_std")
    close(agent.args.ent_coef, f"{domain}_acmet_actor_ent_scale")


CASES = {
    "atari": {},
    "atari_both": dict(actor_grad="both"),
    "atari_dyn": dict(actor_grad="dynamics"),
    "dmc_vision": {},
    "dmc_vision_reinforce": dict(actor_grad="reinforce"),
}


@float64
@pytest.mark.parametrize("case", CASES)
def test_actor_and_critic_loss(case):
    domain = "atari" if case.startswith("atari") else "dmc_vision"
    agent, params = build(domain, **CASES[case])
    rows = rows_of(domain)
    post = posterior(agent, rows, domain)
    with forced_dream(domain):
        losses, metrics = agent.behaviour.loss(agent.world, post, rows)
    close(losses["policy"], f"{case}_actor_loss")
    close(losses["value"], f"{case}_critic_loss")
    close_gradient_norms(losses["policy"], params, case, "actor")
    if case == domain:  # the variants share the rest
        close_gradient_norms(losses["value"], params, case, "critic")
        close(metrics["ac/slow_value"], f"{case}_acmet_critic_slow")
        close(metrics["ac/return"], f"{case}_acmet_critic_target")
        close(metrics["ac/entropy"], f"{case}_acmet_actor_ent")
        close(metrics["ac/value"], f"{case}_acmet_critic")
