"""dreamer_v3.py against numbers that the functions of danijar/dreamerv3 (e3f0224) gave.

`given` reads an input, `close` and `equal` compare an output; the last test fails if an array of the file was
neither. Official arrays are (B,T,...), ours time first. What float32 can get wrong is tested in it too."""
import functools
import math
from types import SimpleNamespace

import envs  # noqa: F401  registers the toy environments
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden, load
from torch import nn

v3 = load("dreamer_v3")
GOLDEN = golden("dreamer_v3")
INPUTS, COMPARED = set(), set()
F32, F64 = torch.float32, torch.float64
BOTH = pytest.mark.parametrize("dtype", [F32, F64])
ARGS = v3.Args(size="size1m", precision="fp32")
CPU = torch.device("cpu")


def float64(test):
    """The test runs with float64 as torch's default type."""
    @functools.wraps(test)
    def wrapped(*args, **kwargs):
        before = torch.get_default_dtype()
        torch.set_default_dtype(F64)
        try:
            return test(*args, **kwargs)
        finally:
            torch.set_default_dtype(before)
    return wrapped


def given(name, dtype=F64):
    INPUTS.add(name)
    x = torch.tensor(GOLDEN[name])
    return x.to(dtype) if x.is_floating_point() else x


def time_first(name, dtype=F64):
    return given(name, dtype).transpose(0, 1)


def expected(name):
    COMPARED.add(name)
    return torch.tensor(GOLDEN[name])


def close(ours, name, tolerance=1e-4, index=...):
    """Error of each entry at most `tolerance` of itself, and 5 % of that of the largest entry."""
    ours = torch.as_tensor(ours).detach().double()
    theirs = expected(name)[index].double()
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    allowed = tolerance * (theirs.abs() + 0.05 * theirs.abs().max())
    excess = (ours - theirs).abs() - allowed
    worst = excess.argmax()
    assert excess.max() <= 0, f"{name}: {ours.flatten()[worst]}, not {theirs.flatten()[worst]}"


def equal(ours, name):
    ours = torch.as_tensor(ours)
    theirs = expected(name)
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    wrong = (ours != theirs).sum().item()
    assert wrong == 0, f"{name}: {wrong} of {theirs.numel()} entries differ"


def fill(layer, name):
    """Official parameters into one of our layers; kernels are (in,out), (kh,kw,in,out) or (blocks,in,out)."""
    if isinstance(layer, v3.NormSiLU):
        layer.load_state_dict(dict(weight=given(name + "norm/scale")))
        return
    kernel = given(name + "/kernel")
    if not isinstance(layer, v3.BlockLinear):
        kernel = kernel.T if kernel.dim() == 2 else kernel.permute(3, 2, 0, 1)
    layer.load_state_dict(dict(weight=kernel, bias=given(name + "/bias")))


def onehot(index, classes):
    return F.one_hot(index.long(), classes).double()


class Given(nn.Module):
    """A network whose output is known."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, *inputs):
        return self.output


def sampled(module, *draws):
    """`module.sample` returns these, one after the other."""
    draws = iter(draws)
    module.sample = lambda inputs: next(draws)


def make_behaviour(feat, action_dim, discrete=True, **flags):
    return v3.Behaviour(feat, action_dim, discrete, v3.Args(size="size1m", **flags)).double()


def make_replay(folder, capacity=100, num_envs=1, **fields):
    """`fields`: name -> values (rows,num_envs,...), all of which are added."""
    zeros = torch.zeros(len(next(iter(fields.values()))), num_envs, dtype=torch.bool)
    fields = dict(is_first=zeros, is_last=zeros) | fields
    specs = {name: (x.shape[2:], x.dtype) for name, x in fields.items()}
    replay = v3.Replay(specs, capacity, num_envs, folder, CPU)
    for t in range(len(zeros)):
        replay.add({name: x[t] for name, x in fields.items()})
    return replay


# ---- pure functions ----


@BOTH
def test_symlog_and_bins(dtype):
    close(v3.symlog(given("symlog_x", dtype)), "symlog_y")
    close(v3.symlog(given("symexp_y", dtype)), "symexp_x")
    for count in (255, 8, 5):
        close(v3.symexp_bins(count), f"bins_{count}")
    assert (v3.symexp_bins() == -v3.symexp_bins().flip(0)).all()


@BOTH
def test_twohot_loss(dtype):
    bins = v3.symexp_bins().to(dtype)
    target = given("twohot_target", dtype)
    logits = given("twohot_logits", dtype).requires_grad_()
    loss = v3.twohot_loss(logits, target, bins)
    close(loss, "twohot_loss")
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    close(logits.softmax(-1) - grad, "twohot_vec", 5e-4)  # bins of 1e8 are rounded differently
    close(v3.twohot_loss(torch.zeros_like(logits), target, bins), "twohot_loss_zero_logits")


@BOTH
def test_twohot_mean(dtype):
    mean = v3.twohot_mean(given("twohot_dec_logits", dtype), v3.symexp_bins().to(dtype))
    assert mean[0] == 0
    close(mean, "twohot_dec_pred")
    naive = expected("twohot_dec_naive_f32")  # the sum in order, which the file shows to be worse
    assert (mean - naive).abs().max() <= 1e-4 * (1 + naive.abs().max())


@BOTH
def test_unimix(dtype):
    logits = given("unimix_logits", dtype)
    other = given("unimix_logits2", dtype)
    event = onehot(given("unimix_event"), 5).to(dtype)
    mixed = v3.log_unimix(logits, 0.01)
    plain = v3.log_unimix(logits, 0.0)
    close(v3.unimix(logits, 0.01).log(), "unimix_mixed_logits")
    close(mixed, "unimix_mixed_logits")
    close(v3.entropy(mixed), "unimix_entropy")
    close((mixed * event).sum(-1), "unimix_logp")
    close(v3.entropy(plain), "nomix_entropy")
    close((plain * event).sum(-1), "nomix_logp")
    kl = v3.categorical_kl(mixed[..., None, :], v3.log_unimix(other, 0.01)[..., None, :])
    close(kl, "unimix_kl")


@BOTH
def test_straight_through(dtype):
    logits = given("unimix_logits", dtype).requires_grad_()
    event = onehot(given("unimix_event"), 5).to(dtype)
    noise = torch.where(event > 0, 1e-30, 1.0)  # an exponential race that the event wins
    sample = v3.sample_onehot(v3.unimix(logits, 0.01), noise)
    equal(sample, "st_value")
    (given("st_w", dtype) * sample).sum().backward()
    close(logits.grad, "st_grad")


def test_kl_losses():
    post = given("kl_post").requires_grad_()
    prior = given("kl_prior").requires_grad_()
    dyn, rep, kl = v3.kl_losses(post, prior, 0.01, 1.0)
    close(dyn, "kl_dyn", 1e-5)
    close(rep, "kl_rep", 1e-5)
    close(kl, "kl_raw", 1e-5)
    (dyn.mean() + 0.1 * rep.mean()).backward()
    close(post.grad, "kl_grad_post", 1e-5)
    close(prior.grad, "kl_grad_prior", 1e-5)
    clipped = kl < 1
    assert clipped.any() and not clipped.all()
    assert not post.grad[clipped].any() and not prior.grad[clipped].any()


def test_lambda_return():
    cont = time_first("lam_img_con")
    ret = v3.lambda_return(
        time_first("lam_img_rew"), time_first("lam_img_val"), cont, torch.full_like(cont, 0.95))
    close(ret.T, "lam_img_ret")
    live = (1 - time_first("lam_rep_term").double()) * (1 - 1 / 333)
    lam = (1 - time_first("lam_rep_last").double()) * 0.95
    close(v3.lambda_return(time_first("lam_rep_rew"), time_first("lam_rep_boot"), live, lam).T, "lam_rep_ret")


# ---- environment and replay ----


def test_atari_image():
    """The gray levels of the official 200M protocol, which is not offered here, are made after the resize."""
    frame = torch.maximum(given("atari_frame1"), given("atari_frame2"))  # the maximum is ale-py's part
    equal(v3.resize(frame[None].numpy(), 64)[0], "atari_rgb64")
    image = v3.resize(frame[None].numpy(), 96)[0]
    gray = (image * [0.299, 0.587, 1 - (0.299 + 0.587)]).sum(-1, keepdims=True)
    equal(gray.astype(np.uint8), "atari_gray96")


def test_flags_of_a_sampled_sequence(tmp_path):
    """Three streams of six rows; a sample is a whole stream."""
    replay = make_replay(
        tmp_path, 6, 3, is_first=time_first("ann_is_first_in"), is_last=time_first("ann_is_last_in"))
    batch, index = replay.sample(100, 6, online=False)
    stream = (index[0] % 3).tolist()
    columns = [stream.index(number) for number in range(3)]
    equal(batch["is_first"].T[columns], "ann_is_first_out")
    equal(batch["is_last"].T[columns], "ann_is_last_out")


def test_online_queue(tmp_path):
    rows = int(expected("online_items")) + 2  # an item is a place where three rows can begin
    replay = make_replay(tmp_path, record=torch.arange(rows)[:, None])
    batch, _ = replay.sample(50, 3)
    equal(batch["record"].T[: replay.queued], "online_queue_seqs")


def test_replay_context(tmp_path):
    """Which row's action, latents and flags the world model gets, and where fresh latents are written."""
    replay = make_replay(
        tmp_path,
        action=time_first("ctx_action", F32),
        reward=time_first("ctx_reward", F32),
        is_first=time_first("ctx_is_first"),
        deter=time_first("ctx_deter", F32),
        stoch=torch.zeros(6, 1))
    agent = v3.Agent({"vector": (3,)}, 2, True, ARGS)
    seen = {}

    def world_loss(rows, context):
        seen.update(rows, **context)
        return {}, {}, {}

    agent.world.loss = world_loss
    agent.behaviour.loss = lambda world, post, rows: ({}, {})
    batch, index = replay.sample(1, 6)
    agent.loss(batch)
    equal(seen["prev_action"].T, "ctx_out_prevact")
    equal(seen["deter"], "ctx_out_carry_deter")
    equal(seen["reward"].T, "ctx_out_reward")
    equal(seen["is_first"].T, "ctx_out_is_first")
    equal(index[1:].T, "ctx_out_stepid")


@pytest.mark.parametrize("name, ratio", [
    ("r32_e16", 32), ("r256_e1", 256), ("r1024_e1", 1024), ("r512_e4", 512)])
def test_train_ratio(name, ratio, tmp_path, monkeypatch):
    """Updates after each row of a run of main whose updates do nothing. The first comes when a sequence can
    begin at B T = 16 rows; it does not make up for the rows before it."""
    rows = []

    def train_step(agent, optimizer, replay, batch_size):
        rows.append(replay.rows)
        return {}

    monkeypatch.setattr(v3, "train_step", train_step)
    monkeypatch.setattr(v3, "stop_signals", list)
    v3.main(v3.parse_args([
        "--env-id=envs:Scripted-v0", f"--run-dir={tmp_path}", "--total-timesteps=190", "--device=cpu",
        "--size=size1m", "--eval-episodes=0",
        "--batch-size=2", "--batch-length=8", f"--train-ratio={ratio / 64}"]))  # official: 16 x 64
    assert rows[0] == 16 + 8
    updates = np.bincount(rows)[rows[0] :]
    official = expected(f"ratio_{name}")[: len(updates)]
    assert len(updates) > 150
    assert updates.tolist() == official.tolist()


# ---- networks ----


def test_rms_norm():
    norm = v3.NormSiLU(8).double()
    norm.load_state_dict(dict(weight=given("rms_scale")))
    wanted = F.silu(expected("rms_y").double())
    assert torch.allclose(norm(given("rms_x")), wanted, rtol=1e-4, atol=1e-6)


def test_initialisation():
    torch.manual_seed(0)
    layers = v3.init(nn.Linear(512, 300)), v3.init(nn.Conv2d(16, 32, 5)), v3.BlockLinear(2048, 512, 8)
    for layer, (fan_in, std, largest, target_std, bound) in zip(layers, expected("init_stats").tolist()):
        weight = layer.weight.detach().double()
        assert math.isclose(weight.std(), std, rel_tol=0.02)
        assert math.isclose(weight.std(), target_std, rel_tol=0.02)
        assert math.isclose(weight.abs().max(), largest, rel_tol=0.01)
        assert weight.abs().max() <= bound * (1 + 1e-6)
        assert math.isclose(2 * 1.1368 / fan_in**0.5, bound, rel_tol=1e-6)
        assert not layer.bias.any()


def test_twohot_head_at_first():
    logits = v3.twohot_head(7, 8, 1)(torch.randn(1, 2, 7))
    equal(v3.twohot_mean(logits, v3.symexp_bins()), "zero_head_pred")
    close(v3.twohot_loss(logits, torch.randn(1, 2), v3.symexp_bins()), "zero_head_loss")


@float64
def test_encoder():
    net = v3.Encoder({"vector": (3,), "image": (48, 48, 3)}, units=6, depth=2, layers=2)
    for i in range(4):
        fill(net.convs[i], f"enc_w:enc/cnn{i}")
        fill(net.norms[i], f"enc_w:enc/cnn{i}")
    for i in range(2):
        fill(net.mlp[2 * i], f"enc_w:enc/mlp{i}")
        fill(net.mlp[2 * i + 1], f"enc_w:enc/mlp{i}")
    obs = dict(image=given("enc_image")[None], vector=given("enc_vec")[None])
    close(net(obs)[0], "enc_tokens")


def reconstruction_losses(decoder, deter, stoch, obs):
    """The losses of `WorldModel.loss` where all but the decoder is a stub."""
    logits = torch.zeros(*deter.shape[:2], 3, 4)
    flat = torch.zeros(*deter.shape[:2], 255)
    rssm = SimpleNamespace(
        observe=lambda tokens: (deter, stoch, logits), prior=lambda deter: logits, groups=lambda x: x)
    world = SimpleNamespace(
        args=ARGS, encoder=lambda rows: None, rssm=rssm, decoder=decoder, bins=v3.symexp_bins(),
        reward=lambda feat: flat, cont=lambda feat: flat[..., :1])
    rows = dict(obs, reward=flat[..., 0], is_terminal=flat[..., 0].bool())
    return v3.WorldModel.loss(world, rows, {})[0]


@float64
def test_decoder():
    net = v3.Decoder({"vector": (3,), "image": (48, 48, 3)}, deter=16, stoch=12, units=6, depth=2, layers=2)
    for i in range(2):
        fill(net.mlp[2 * i], f"dec_w:dec/mlp/linear{i}")
        net.mlp[2 * i + 1].load_state_dict(dict(weight=given(f"dec_w:dec/mlp/norm{i}/scale")))
    fill(net.vectors[0], "dec_w:dec/vec/vec/pred")
    fill(net.from_deter, "dec_w:dec/sp0")
    fill(net.from_stoch[0], "dec_w:dec/sp1")
    fill(net.from_stoch[1], "dec_w:dec/sp1")
    fill(net.from_stoch[2], "dec_w:dec/sp2")
    fill(net.norms[0], "dec_w:dec/sp")
    for i in range(3):  # the official convolutions count down
        fill(net.convs[2 - i], f"dec_w:dec/conv{i}")
        fill(net.norms[3 - i], f"dec_w:dec/conv{i}")
    fill(net.convs[3], "dec_w:dec/imgout")
    deter = given("dec_deter")[None]
    stoch = given("dec_stoch").flatten(1)[None]
    out = net(deter, stoch)
    obs = dict(image=given("enc_image")[None], vector=given("enc_vec")[None])
    losses = reconstruction_losses(net, deter, stoch, obs)
    close(out["image"][0], "dec_image")
    close(out["vector"][0], "dec_vec")
    close(losses["image"][0], "dec_image_loss")
    close(losses["vector"][0], "dec_vec_loss")


def make_rssm():
    net = v3.RSSM(
        deter=16, hidden=6, stoch=3, classes=4, blocks=4, action_dim=3, tokens=5, mix=0.01).double()
    layers = dict(
        dynin0=net.in_deter, dynin1=net.in_stoch, dynin2=net.in_action, dynhid0=(net.hid, net.hid_norm),
        dyngru=(net.gru,), obs0=net.posterior[:2], obslogit=net.posterior[2:],
        prior0=net.prior[:2], prior1=net.prior[2:4], priorlogit=net.prior[4:])
    for name, pair in layers.items():
        for layer in pair:
            fill(layer, f"rssm_w:dyn/{name}")
    return net


def test_rssm_cell_and_prior():
    rssm = make_rssm()
    deter = given("core_deter")
    stoch = given("core_stoch").flatten(1)
    close(rssm.core(deter, stoch, given("core_action_onehot")), "core_out")
    close(rssm.core(deter, stoch, given("core_action_cont")), "core_out_cont")
    close(rssm.groups(rssm.prior(deter)), "prior_logit")


def test_rssm_sequence():
    rssm = make_rssm()
    samples = time_first("seq_stoch").flatten(2)
    sampled(rssm, *samples)
    deter, stoch, logits = rssm.observe(
        time_first("seq_tokens"), onehot(time_first("seq_prevact"), 3), time_first("seq_reset"),
        given("seq_carry_deter"), given("seq_carry_stoch").flatten(1))
    assert torch.equal(stoch, samples)
    close(deter.transpose(0, 1), "seq_deter")
    close(logits.transpose(0, 1), "seq_post_logit")
    close(rssm.groups(rssm.prior(deter)).transpose(0, 1), "seq_prior_logit")


def test_imagination():
    rssm = make_rssm()
    samples = time_first("img_stoch").flatten(2)
    actions = onehot(time_first("img_actions"), 3)
    behaviour = make_behaviour(28, 3, imag_horizon=3)
    sampled(rssm, *samples)
    sampled(behaviour, *actions)
    start = given("core_deter"), given("core_stoch").flatten(1)
    feat, action = behaviour.imagine(rssm, *start)
    assert torch.equal(feat[0], torch.cat(start, -1))
    assert torch.equal(action, actions)
    assert torch.equal(feat[1:, :, 16:], samples)
    close(feat[1:, :, :16].transpose(0, 1), "img_deter")
    close(rssm.groups(rssm.prior(feat[1:, :, :16])).transpose(0, 1), "img_logit")


# ---- losses ----


@float64
def test_continue():
    world = v3.WorldModel({"vector": (3,)}, 2, ARGS)
    logits = given("con_logit")[:, None, None].requires_grad_()
    world.cont = Given(logits)
    terminal = given("con_is_terminal")[:, None]
    rows = dict(vector=torch.zeros(6, 1, 3), reward=torch.zeros(6, 1), is_terminal=terminal)
    context = dict(
        prev_action=torch.zeros(6, 1, 2), is_first=torch.zeros(6, 1, dtype=torch.bool),
        deter=torch.zeros(1, 512), stoch=torch.zeros(1, 128))
    losses, _, _ = world.loss(rows, context)
    close(losses["cont"][:, 0], "con_loss")
    close(world.predict_cont(torch.zeros(6, 1, 640))[:, 0], "con_prob")
    (grad,) = torch.autograd.grad(losses["cont"].sum(), logits)
    close(logits.sigmoid()[:, 0, 0] - grad[:, 0, 0], "con_target")


@BOTH
def test_return_scale(dtype):
    behaviour = make_behaviour(2, 2).to(dtype)
    scales = []
    percentiles = [torch.zeros(2, dtype=dtype)]
    for ret in given("retnorm_x", dtype):
        scales.append(behaviour.return_scale(ret))
        percentiles.append(behaviour.percentiles.clone())
    percentiles = torch.stack(percentiles)
    close(torch.stack(scales), "retnorm_scale")
    close(percentiles[1:, 0], "retnorm_lo")
    close(percentiles[1:, 0], "retnorm_offset")
    close(percentiles[1:, 1], "retnorm_hi")
    if dtype == F64:  # the percentiles of each batch, before averaging
        close(100 * (percentiles[1:] - 0.99 * percentiles[:-1]), "retnorm_batch_perc")


def imagination_losses(behaviour, feat, action):
    """Our losses and value logits on the official inputs; `feat` is what the policy's heads give."""
    value_logits = time_first("il_value_logits").requires_grad_()
    slow_logits = time_first("il_slow_logits")
    reward = time_first("il_rew")
    cont = time_first("il_con")
    behaviour.critic = Given(value_logits)
    behaviour.slow_critic = Given(slow_logits)
    behaviour.imagine = lambda rssm, deter, stoch: (feat, action[:-1])
    behaviour.percentiles.copy_(torch.stack([given("il_retnorm_lo0"), given("il_retnorm_hi0")]))
    world = SimpleNamespace(rssm=None, predict_reward=lambda feat: reward, predict_cont=lambda feat: cont)
    losses, ret, metrics = behaviour.imagination_losses(world, dict(deter=None, stoch=None))
    value = v3.twohot_mean(value_logits, behaviour.bins)
    close(value.T, "il_val")
    close(v3.twohot_mean(slow_logits, behaviour.bins).T, "il_slowval")
    close(ret.T, "il_ret")
    close(losses["value"].T, "il_value_loss")
    close(behaviour.percentiles[0], "il_retnorm_lo1")
    close(behaviour.percentiles[1], "il_retnorm_hi1")
    close(((ret - value[:-1]) / metrics["ac/return_scale"]).mean(), "il_adv_mean")
    return losses, value_logits


@pytest.mark.parametrize("mix", [0, 1])
def test_imagination_losses_discrete(mix):
    behaviour = make_behaviour(2, 4, actor_unimix=0.01 * mix)
    behaviour.actor = nn.Identity()
    behaviour.actor_mean = nn.Identity()
    logits = time_first("il_policy_logits").requires_grad_()
    losses, value_logits = imagination_losses(behaviour, logits, onehot(time_first("il_action"), 4))
    close(losses["policy"].T, f"il_um{mix}_policy_loss")
    (losses["policy"].mean() + losses["value"].mean()).backward()
    close(logits.grad.transpose(0, 1), f"il_um{mix}_grad_policy")
    close(value_logits.grad.abs().sum(-1).T, "il_grad_value_abs_sum")
    equal(value_logits.grad[-1].abs().max(), "il_grad_value_last_step_max")


class Part(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return x[..., self.part]


def test_imagination_losses_continuous():
    behaviour = make_behaviour(2, 2, discrete=False)
    behaviour.actor = nn.Identity()
    behaviour.actor_mean = Part(slice(0, 2))
    behaviour.actor_std = Part(slice(2, 4))
    action = time_first("ilc_action")
    raw = torch.cat([time_first("ilc_mean_raw"), time_first("ilc_std_raw")], -1)
    policy = behaviour.policy(raw)
    close(policy.log_prob(action).sum(-1).T, "ilc_logp")
    close(policy.entropy().sum(-1).T, "ilc_entropy")
    losses, _ = imagination_losses(behaviour, raw, action)
    close(losses["policy"].T, "ilc_policy_loss")


@float64
def test_replay_loss():
    behaviour = make_behaviour(2, 2)
    behaviour.critic = Given(time_first("rl_value_logits"))
    behaviour.slow_critic = Given(time_first("rl_slow_logits"))
    rows = dict(
        reward=time_first("rl_rew"), is_last=time_first("rl_last"), is_terminal=time_first("rl_term"))
    targets = []
    value_loss = behaviour.value_loss
    behaviour.value_loss = lambda logits, slow, ret: targets.append(ret) or value_loss(logits, slow, ret)
    nothing = torch.zeros(6, 3, 1)
    loss = behaviour.replay_loss(dict(deter=nothing, stoch=nothing), time_first("rl_boot"), rows)
    close(loss.T, "rl_loss")
    close(targets[0].T, "rl_ret")


# ---- update ----
PARAMS = ("a_kernel", "a_bias", "b_scale")


def optimise(**options):
    """Our optimiser on the official parameters and gradients; its state after each of six steps."""
    params = [nn.Parameter(given(f"opt_p0_{name}")) for name in PARAMS]
    optimizer = v3.LaProp(params, **options)
    for k in range(6):
        for p, name in zip(params, PARAMS):
            p.grad = given(f"opt_g_{name}")[k]
        optimizer.step()
        yield k, optimizer, params


def test_optimiser():
    for k, _, params in optimise(lr=1e-2, warmup=4, agc=0.3):
        for p, name in zip(params, PARAMS):
            close(p, f"opt_params_{name}", index=k)


def test_adaptive_gradient_clipping_alone():
    """With no memory and an epsilon that drowns the normaliser, the momentum is the clipped gradient."""
    for k, optimizer, _ in optimise(lr=0.0, warmup=1, agc=0.3, beta1=0.0, eps=1e12):
        for m, name in zip(optimizer.state_dict()["momentum"], PARAMS):
            close(1e12 * m, f"opt_agc_{name}", index=k)


def test_normaliser_and_momentum_alone():
    for k, optimizer, _ in optimise(lr=0.0, warmup=1, agc=math.inf):
        for m, name in zip(optimizer.state_dict()["momentum"], PARAMS):
            close(m / (1 - 0.9 ** (k + 1)), f"opt_laprop_{name}", index=k)


def test_learning_rate():
    """Without memory, an update has the size of the learning rate."""
    for step, rate in zip(given("lr_step").tolist(), expected("lr_value").tolist()):
        p = nn.Parameter(torch.zeros(1, dtype=F64))
        optimizer = v3.LaProp([p], ARGS.lr, ARGS.warmup, math.inf, beta1=0.0, beta2=0.0)
        optimizer.count.fill_(step)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert -p.item() == pytest.approx(rate, rel=1e-4, abs=1e-12)


def test_slow_critic():
    """Through train_step with learning rate 0; the official numbers are a corner of one layer."""
    args = v3.Args(size="size1m", precision="fp32", batch_length=2, imag_horizon=2)
    agent = v3.Agent({"vector": (3,)}, 2, True, args)
    fast = agent.behaviour.critic[-1].weight.data[:3, :5]
    slow = agent.behaviour.slow_critic[-1].weight.data[:3, :5]
    fast.copy_(given("slow_fast", F32))
    slow.copy_(given("slow_before", F32))
    batch = dict(
        vector=torch.zeros(3, 1, 3), action=torch.zeros(3, 1, 2), reward=torch.zeros(3, 1),
        deter=torch.zeros(3, 1, 512), stoch=torch.zeros(3, 1, 128))
    batch.update(dict.fromkeys(("is_first", "is_last", "is_terminal"), torch.zeros(3, 1, dtype=torch.bool)))
    replay = SimpleNamespace(
        sample=lambda *sizes: (batch, torch.zeros(3, 1)), write=lambda *index, **post: None, device=CPU)
    optimizer = v3.LaProp(agent.parameters(), lr=0.0, warmup=1, agc=0.3)
    close(agent.args.slow_rate, "slow_rate")
    v3.train_step(agent, optimizer, replay, 1)
    close(slow, "slow_after1")
    v3.train_step(agent, optimizer, replay, 1)
    close(slow, "slow_after2")
    leaves = [p.is_leaf for p in agent.behaviour.slow_critic.parameters()]
    assert all(leaves), "each update is kept in an autograd graph"


def test_every_array_is_used(request):
    tests = {name for name in globals() if name.startswith("test_")}
    run = {item.originalname for item in request.session.items if item.module.__name__ == __name__}
    if request.session.testsfailed or tests != run:
        pytest.skip("a test failed, or only a part of this file was selected")
    print(f"{len(COMPARED)} arrays compared, {len(INPUTS - COMPARED)} as inputs, of {len(GOLDEN)}")
    assert INPUTS | COMPARED == set(GOLDEN)
