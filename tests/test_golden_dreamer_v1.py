"""dreamer_v1.py against numbers that the functions of danijar/dreamer (56d4d44) and google-research/dreamer gave.

`given` reads an input, `close` compares an output; the last test fails if an array of the file was neither. Official
arrays are (B,T,...), ours time first; an official dream is number b * T + t, ours t * B + b; an official feature is
[z, h], ours [h, z]."""
import math

import pytest
import torch
from conftest import golden, load

v1 = load("dreamer_v1")
GOLDEN = golden("dreamer_v1")
INPUTS, COMPARED = set(), set()
F32, F64 = torch.float32, torch.float64
TOLERANCE = {F32: 1e-4, F64: 1e-9}
B, T, H, DETER, STOCH, ACTIONS = 2, 3, 4, 8, 4, 2
TINY = dict(deter=DETER, stoch=STOCH, hidden=8, cnn_depth=2, units=10, imag_horizon=H)
CASES = dict(
    dmc=dict(free_nats=0.1),
    pcont=dict(free_nats=0.1, pred_discount=True),
    free50=dict(free_nats=50.0),
)
DTYPES = pytest.mark.parametrize("dtype", [F32, F64])


def given(name, dtype=F64):
    INPUTS.add(name)
    x = torch.tensor(GOLDEN[name])
    return x.to(dtype) if x.is_floating_point() else x


def expected(name):
    COMPARED.add(name)
    return torch.tensor(GOLDEN[name]).double()


def close(ours, name, tolerance=1e-9):
    """Every entry, relative to itself or, where it is small, to a tenth of the largest one."""
    ours = torch.as_tensor(ours).detach().double()
    theirs = expected(name)
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    size = theirs.abs()
    floor = max(0.1 * size.max().item(), 1e-12)
    error = ((ours - theirs).abs() / size.clamp(min=floor)).max()
    assert error <= tolerance, f"{name}: relative error {error:.3g}"


def force_noise(monkeypatch, *noises):
    """The next draws of a Normal use these numbers, one after the other; later ones are random again."""
    queue = list(noises)
    original = v1.sample_normal

    def draw(mean, std):
        return mean + std * queue.pop(0) if queue else original(mean, std)

    monkeypatch.setattr(v1, "sample_normal", draw)


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
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_lambda_return(lam, dtype):
    """The official function gets the value of the last state apart; ours has it as the last row."""
    reward, value, cont = (given(f"lr_{name}", dtype) for name in ("reward", "value", "pcont"))
    last = given("lr_bootstrap", dtype)[None]
    value = torch.cat([value, last])
    extra = torch.full_like(last, math.nan)  # reward and discount of the last state must not matter
    close(v1.lambda_return(torch.cat([reward, extra]), value, torch.cat([cont, extra]), lam),
          f"lr_out_lambda{lam}", TOLERANCE[dtype])
    if lam == 0.95:
        constant = torch.full_like(value, 0.99)
        close(v1.lambda_return(torch.cat([reward, extra]), value, constant, lam), "lr_out_gamma0.99", TOLERANCE[dtype])


def test_weights():
    """Weights of `target` where the discounts are given: a behaviour whose networks are not asked."""
    cont = given("lr_pcont")
    behaviour = v1.Behaviour(3, 2, False, v1.Args(units=4)).double()
    world = type("World", (), {})()
    world.predict_reward = lambda feat: feat[..., 0]
    world.predict_cont = lambda feat: torch.cat([cont, cont[-1:]])
    _, weight = behaviour.returns(world, torch.zeros(len(cont) + 1, cont.shape[1], 3).double())
    close(weight, "lr_weights")


def test_bootstrap_of_the_first_code():
    """Its action values bootstrap with the last value but one; ours with the last, as the second code."""
    reward, value = given("tf1_reward").T, given("tf1_value").T
    cont = torch.full_like(value, 0.99)
    weight = 0.99 ** torch.arange(4.0)[:, None].double()
    ours = v1.lambda_return(reward, value, cont, 0.95)
    close((weight * ours).T, "tf1_action_values_correct_bootstrap", 1e-6)  # its discounts are float32
    slip = v1.lambda_return(reward, torch.cat([value[:-1], value[-2:-1]]), cont, 0.95)
    close((weight * slip).T, "tf1_action_values", 1e-6)


@DTYPES
def test_gru(dtype):
    """Keras orders the blocks update, reset, candidate; torch reset, update, candidate."""
    cell = v1.RSSM(deter=6, hidden=5, stoch=2, action_dim=1, tokens=1).gru.to(dtype)
    load_gru(cell, *(given(f"gru_{name}", dtype) for name in ("kernel", "recurrent", "bias")))
    close(cell(given("gru_x", dtype), given("gru_h", dtype)), "gru_out", 1e-5 if dtype == F32 else 1e-6)


@DTYPES
def test_tanh_normal(dtype, monkeypatch):
    mean, std = given("tn_raw", dtype).chunk(2, -1)
    policy = v1.TanhNormal(mean, std)
    close(policy.mean, "tn_mean", TOLERANCE[dtype])
    close(policy.std, "tn_std", TOLERANCE[dtype])
    samples = given("tn_samples_eps", dtype)
    force_noise(monkeypatch, given("tn_eps", dtype), samples, samples)
    action = policy.rsample()
    close(action, "tn_action", TOLERANCE[dtype])
    close(policy.mode(), "tn_mode", 1e-5)
    # near a bound one float32 step of the action changes atanh by percents
    tolerance = 2e-2 if dtype == F32 else 1e-5
    close(policy.entropy(), "tn_entropy", tolerance)
    close(policy.log_prob(action), "tn_logp", tolerance)
    edge = torch.tensor([1.0, -1.0, 0.5], dtype=dtype).expand_as(mean)
    close(policy.log_prob(edge), "tn_logp_edge", 1e-5)


def test_tanh_normal_cuts_saturated_actions():
    """Without the cut at the last float32 below one the density would be another."""
    mean, std = given("tn_raw").chunk(2, -1)
    policy = v1.TanhNormal(mean, std)
    u = policy.mean + policy.std * given("tn_eps")
    slope = 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
    exact = (torch.distributions.Normal(policy.mean, policy.std).log_prob(u) - slope).sum(-1)
    close(exact, "tn_logp_exact_from_pretanh", 1e-6)
    assert (exact - expected("tn_logp")).abs().max() > 1e-3


def test_mode_is_of_each_row(monkeypatch):
    """The official batched mode gives every row the sample that is best in row 0."""
    policy = v1.TanhNormal(*given("tn_raw").chunk(2, -1))
    samples = given("tn_samples_eps")
    force_noise(monkeypatch, samples, samples)
    action, log_prob = policy.draw(100)
    official = action[log_prob[:, 0].argmax()]
    close(official, "tn_mode_batched_tf2", 1e-5)
    assert (policy.mode() - official).abs().max() > 0.01


@DTYPES
def test_kl(dtype):
    post, prior = (tuple(given(f"kl_{side}_{x}", dtype) for x in ("mean", "std")) for side in ("post", "prior"))
    close(v1.gaussian_kl(post, prior), "kl_per_step", TOLERANCE[dtype])
    post = given("kl2_post_mean", dtype), given("kl2_post_std", dtype)
    free = given("kl2_free_nats").item()
    loss, kl = v1.kl_loss(post, prior, free)
    close(kl, "kl2_per_step", TOLERANCE[dtype])
    close(loss, "kl2_tf2_max_of_mean", TOLERANCE[dtype])
    close((kl - free).clamp(min=0).mean(), "kl2_tf1_mean_of_relu", TOLERANCE[dtype])  # the first code's; not offered


def test_contrastive():
    """Ours sums over images; the released code, in all its modes, over states. Its numbers are float32."""
    feat, mean, std = (given(f"cpc_{name}").flatten(0, 1) for name in ("feat", "mean", "std"))
    batch, time = 3, 4
    density = v1.pair_log_density(feat, mean, std)
    own = density.diagonal()
    score = own - density.logsumexp(1)
    close(score.view(batch, time), "cpc_paper_sum_over_obs")
    assert torch.allclose(-v1.nce_loss(feat, mean, std), score.mean())
    close((own - density.logsumexp(0)).view(batch, time), "cpc_code_sum_over_states")
    close((own - density.logsumexp(0)).view(batch, time), "cpc_window", 1e-4)

    b, t = (x.flatten() for x in torch.meshgrid(torch.arange(batch), torch.arange(time), indexing="ij"))
    for name, mask in dict(batch=t[:, None] == t, time=b[:, None] == b).items():
        some = density.masked_fill(~mask, -math.inf)
        close((own - some.logsumexp(0)).view(batch, time), f"cpc_{name}", 1e-4)
    # a window of 2 x 3 cyclic shifts
    grid = torch.arange(batch * time).view(batch, time)
    shifted = [grid.roll((i, j), (0, 1)).flatten() for i in (-1, 0) for j in (-1, 0, 1)]
    some = torch.stack([density[index, grid.flatten()] for index in shifted])
    close((own - some.logsumexp(0)).view(batch, time), "cpc_window_small", 1e-4)


def test_straight_through():
    logits = given("oh_logits").requires_grad_()
    index = given("oh_forced_index")
    noise = torch.ones_like(logits).scatter(-1, index[:, None], 1e-30)
    sample = v1.sample_onehot(logits.log_softmax(-1).exp(), noise)
    close(sample, "oh_sample")
    grad, = torch.autograd.grad((given("oh_cotangent") * sample).sum(), logits)
    close(grad, "oh_grad_logits")


# ---- end to end ----


def linear(kernel):
    return kernel.T


def on_feature(kernel):
    """Rows of [z, h] to columns of [h, z]."""
    return kernel.roll(DETER, 0).T


def conv(kernel):
    return kernel.permute(3, 2, 0, 1)


def gates(x):
    """Blocks update, reset, candidate (3*D,...) to reset, update, candidate."""
    update, reset, candidate = x.chunk(3)
    return torch.cat([reset, update, candidate])


@torch.no_grad()
def load_gru(cell, kernel, recurrent, bias):
    cell.weight_ih.copy_(gates(kernel.T))
    cell.weight_hh.copy_(gates(recurrent.T))
    cell.bias_ih.copy_(gates(bias[0]))
    cell.bias_hh.copy_(gates(bias[1]))


def layers_of(world, behaviour):
    """Official layer name -> (our layer, how its kernel is laid out)."""
    rssm, found = world.rssm, {}
    found.update({f"encoder.h{i + 1}": (layer, conv) for i, layer in enumerate(world.encoder.convs)})
    found.update({f"decoder.h{i + 2}": (layer, conv) for i, layer in enumerate(world.decoder.convs)})
    found["decoder.h1"] = world.decoder.dense, on_feature
    layers = dict(
        img1=rssm.img_in[0], img2=rssm.prior[0], img3=rssm.prior[2], obs1=rssm.posterior[0], obs2=rssm.posterior[2])
    for name, layer in layers.items():
        found[f"rssm.{name}"] = layer, linear
    heads = dict(reward=world.reward, value=behaviour.critic, actor=behaviour.actor)
    if world.args.pred_discount:
        heads["pcont"] = world.cont
    for name, net in heads.items():
        layers = [layer for layer in net if isinstance(layer, torch.nn.Linear)]
        for i, layer in enumerate(layers):
            last = "out" if i == len(layers) - 1 else i
            found[f"{name}.h{last}"] = layer, linear if i else on_feature
    return found


def build(case):
    """Our networks with the official weights, and official tensor name -> our parameters of that tensor."""
    args = v1.Args(**TINY, **CASES[case])
    world = v1.WorldModel({"image": (64, 64, 3)}, ACTIONS, args).double()
    behaviour = v1.Behaviour(world.feat, ACTIONS, False, args).double()
    gru = world.rssm.gru
    load_gru(gru, *(given(f"e2e_w.rssm.gru.{name}") for name in ("kernel", "recurrent_kernel", "bias")))
    params = {
        "rssm.gru.kernel": [gru.weight_ih],
        "rssm.gru.recurrent_kernel": [gru.weight_hh],
        "rssm.gru.bias": [gru.bias_ih, gru.bias_hh],
    }
    with torch.no_grad():
        for name, (layer, layout) in layers_of(world, behaviour).items():
            params[f"{name}.kernel"] = [layer.weight]
            params[f"{name}.bias"] = [layer.bias]
            kernel = layout(given(f"e2e_w.{name}.kernel"))
            assert kernel.shape == layer.weight.shape, name
            layer.weight.copy_(kernel)
            layer.bias.copy_(given(f"e2e_w.{name}.bias"))
    ours = [p for net in (world, behaviour) for p in net.parameters()]
    assert {id(p) for group in params.values() for p in group} == {id(p) for p in ours}
    return world, behaviour, params


def batch_first(x):
    return x.transpose(0, 1)


def official_feature(ours):
    return ours.roll(STOCH, -1)


def our_dreams(official):
    """(H,B*T,...) with dream b * T + t to t * B + b."""
    return official.unflatten(1, (B, -1)).transpose(1, 2).flatten(1, 2)


def official_dreams(ours):
    return ours.unflatten(1, (-1, B)).transpose(1, 2).flatten(1, 2)


def dream_noise(case):
    """Noise of action and latent, one after the other; with a discount head no dream begins in a last row."""
    noises = [given("e2e_eps_action"), given("e2e_eps_imag")]
    if case == "pcont":
        noises = [x.unflatten(1, (B, T))[:, :, :-1].flatten(1, 2) for x in noises]
    return [x for pair in zip(*map(our_dreams, noises)) for x in pair]


def close_gradient_norms(loss, params, case, part):
    """Gradient norm of each tensor that the official optimiser of this part trains, and of all together."""
    names = [str(name) for name in GOLDEN[f"e2e_{case}_{part}_gradnames"]]
    COMPARED.add(f"e2e_{case}_{part}_gradnames")
    roles = dict(actor=["actor"], value=["value"], model=["encoder", "rssm", "decoder", "reward", "pcont"])[part]
    assert set(names) == {name for name in params if name.split(".")[0] in roles}
    norms = []
    for name in names:
        grads = torch.autograd.grad(loss, params[name], retain_graph=True)
        norms.append(torch.stack([grad.norm() for grad in grads]).norm())
    close(torch.stack(norms), f"e2e_{case}_{part}_gradnorms")
    close(torch.stack(norms).norm(), f"e2e_{case}_{part}_gradnorm")
    return dict(zip(names, norms))


@pytest.fixture
def double():
    """Images and flags become float64 too."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(F32)


@pytest.mark.parametrize("case", CASES)
def test_losses(case, monkeypatch, double):
    world, behaviour, params = build(case)
    rows = dict(
        image=batch_first(given("e2e_image")),
        prev_action=batch_first(given("e2e_action")),
        reward=batch_first(given("e2e_reward")),
        is_terminal=batch_first(given("e2e_discount")) == 0,
        is_first=torch.zeros(T, B, dtype=torch.bool),  # the action before the sequence counts
    )
    given("e2e_eps_prior")  # the official code also draws from the prior there, and drops the draw
    force_noise(monkeypatch, *given("e2e_eps_post"), *dream_noise(case))
    encoded, kls = spy(monkeypatch, world.encoder, "forward"), spy(monkeypatch, v1, "kl_loss")
    nlls, images = spy(monkeypatch, v1, "normal_nll"), spy(monkeypatch, world.decoder, "forward")
    entropies = spy(monkeypatch, v1.F, "binary_cross_entropy_with_logits")
    losses, post, metrics = world.loss(rows)
    assert losses.keys() == {"model"}
    close(losses["model"], f"e2e_{case}_model_loss")
    norms = close_gradient_norms(losses["model"], params, case, "model")
    prior_only = [norms[f"rssm.{layer}.{kind}"] for layer in ("img2", "img3") for kind in ("kernel", "bias")]
    assert all(bool(norm == 0) is (case == "free50") for norm in prior_only)

    if case == "dmc":
        ((_, embed),), (((q, p, _), (_, kl)),) = encoded, kls
        close(batch_first(embed), "e2e_embed")
        close(batch_first(q[0]), "e2e_post_mean")
        close(batch_first(q[1]), "e2e_post_std")
        close(batch_first(p[0]), "e2e_prior_mean")
        close(batch_first(p[1]), "e2e_prior_std")
        close(batch_first(post["stoch"]), "e2e_post_stoch")
        close(batch_first(post["deter"]), "e2e_post_deter")
        close(batch_first(kl), "e2e_kl")
        close(batch_first(images[0][1])[:, :, ::16, ::16], "e2e_image_mean_corner")
        ((prediction, _), reward), (_, image) = nlls
        close(batch_first(prediction), "e2e_reward_mode")
        close(-batch_first(reward), "e2e_reward_logprob")
        close(-batch_first(image.flatten(2).sum(-1)), "e2e_image_logprob")
    if case == "pcont":
        (((logits, target), _),) = entropies
        close(batch_first(logits), "e2e_pcont_logits")
        each = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        close(-batch_first(each), "e2e_pcont_logprob")

    dreams, returns = spy(monkeypatch, behaviour, "imagine"), spy(monkeypatch, v1, "lambda_return")
    losses, _ = behaviour.loss(world, post)
    close(losses["policy"], f"e2e_{case}_actor_loss")
    close(losses["value"], f"e2e_{case}_value_loss")
    close_gradient_norms(losses["policy"], params, case, "actor")
    close_gradient_norms(losses["value"], params, case, "value")
    if case == "free50":
        return
    ((_, feat),), (((reward, value, cont, _), target),) = dreams, returns
    close(official_dreams(official_feature(feat)), f"e2e_{case}_imag_feat")
    close(official_dreams(reward), f"e2e_{case}_imag_reward")
    close(official_dreams(value), f"e2e_{case}_imag_value")
    close(official_dreams(cont), f"e2e_{case}_imag_pcont")
    close(official_dreams(target), f"e2e_{case}_returns")


@pytest.mark.parametrize("actions, discrete, counts", [
    (6, False, dict(encoder=690_144, rssm=557_920, decoder=3_795_555, reward=253_201, cont=413_601, critic=413_601,
                    actor=578_412)),
    (18, True, dict(critic=413_601, actor=580_818)),
])
def test_parameter_counts(actions, discrete, counts):
    agent = v1.Agent({"image": (64, 64, 3)}, actions, discrete, v1.Args(pred_discount=True))
    for name, count in counts.items():
        net = getattr(agent.behaviour if name in ("critic", "actor") else agent.world, name)
        assert sum(p.numel() for p in net.parameters()) == count, name


def test_every_array_is_used(request):
    tests = {name for name in globals() if name.startswith("test_")}
    run = {item.originalname for item in request.session.items if item.module.__name__ == __name__}
    if request.session.testsfailed or tests != run:
        pytest.skip("a test failed, or only a part of this file was selected")
    print(f"dreamer_v1.npz: {len(COMPARED)} arrays compared, {len(INPUTS - COMPARED)} as inputs, of {len(GOLDEN)}")
    assert INPUTS | COMPARED == set(GOLDEN)
