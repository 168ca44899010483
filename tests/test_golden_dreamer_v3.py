"""dreamer_v3.py against numbers that the functions of danijar/dreamerv3 (e3f0224) gave.

`given` reads an input, `close` and `equal` compare an output; the last test fails if an array of the file was neither.
Official arrays are (B,T,...), ours time first. What float32 can get wrong is compared in float32 too."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import golden, load
from test_math import reconstruction_losses
from torch import nn

v3 = load("dreamer_v3")
GOLDEN = golden("dreamer_v3")
INPUTS, COMPARED = set(), set()
F32, F64 = torch.float32, torch.float64
ARGS = v3.Args(size="size1m")
PARAMS = ("a_kernel", "a_bias", "b_scale")


def given(name, dtype=F64):
    INPUTS.add(name)
    x = torch.tensor(GOLDEN[name])
    return x.to(dtype) if x.is_floating_point() else x


def time_first(name, dtype=F64):
    return given(name, dtype).transpose(0, 1)


def expected(name):
    COMPARED.add(name)
    return torch.tensor(GOLDEN[name])


def close(ours, name, tolerance=1e-4):
    ours, theirs = torch.as_tensor(ours).detach().double(), expected(name).double()
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    error = ((ours - theirs).abs() / (1 + theirs.abs())).max()
    assert error <= tolerance, f"{name}: relative error {error:.3g}"


def equal(ours, name):
    ours, theirs = torch.as_tensor(ours), expected(name)
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    wrong = (ours != theirs).sum().item()
    assert wrong == 0, f"{name}: {wrong} of {theirs.numel()} entries differ"


def fill(layer, name):
    """Official parameters into one of our layers; kernels are (in,out), (kh,kw,in,out) or (blocks,in,out)."""
    if isinstance(layer, v3.NormSiLU):
        return layer.load_state_dict(dict(weight=given(name + "norm/scale")))
    kernel = given(name + "/kernel")
    if not isinstance(layer, v3.BlockLinear):
        kernel = kernel.T if kernel.dim() == 2 else kernel.permute(3, 2, 0, 1)
    layer.load_state_dict(dict(weight=kernel, bias=given(name + "/bias")))


def force(onehot):
    """Noise for which an exponential race has this outcome."""
    return torch.where(onehot > 0, 1e-30, 1.0).double()


def onehot(index, classes):
    return F.one_hot(index.long(), classes).double()


@pytest.fixture(scope="module")
def rssm():
    net = v3.RSSM(16, 6, 3, 4, 4, 3, 5, 0.01).double()  # deter, hidden, stoch, classes, blocks, actions, tokens, mix
    layers = dict(
        dynin0=net.in_deter, dynin1=net.in_stoch, dynin2=net.in_action,
        dynhid0=(net.hid, net.hid_norm), dyngru=(net.gru,), obs0=net.post_hid,
        obslogit=(net.post_out,), prior0=net.prior[:2], prior1=net.prior[2:4],
        priorlogit=(net.prior[4],))
    for name, pair in layers.items():
        for layer in pair:
            fill(layer, f"rssm_w:dyn/{name}")
    return net


def make_behaviour(feat, action_dim, discrete=True, **flags):
    return v3.Behaviour(feat, action_dim, discrete, v3.Args(size="size1m", **flags)).double()


def blank_rows(count, dtype):
    """Replay rows (count,1,...) for size1m with a vector of three and two actions."""
    sizes = dict(vector=(3,), action=(2,), deter=(512,), stoch=(128,)) | dict.fromkeys(
        ("reward", "is_first", "is_last", "is_terminal"), ())
    return {k: torch.zeros(count, 1, *size, dtype=torch.bool if k[:3] == "is_" else dtype) for k, size in sizes.items()}


# ---- pure functions ----


@pytest.mark.parametrize("dtype", [F32, F64])
def test_symlog_symexp_bins(dtype):
    close(v3.symlog(given("symlog_x", dtype)), "symlog_y")
    close(v3.symlog(given("symexp_y", dtype)), "symexp_x")
    for count in (255, 8, 5):
        close(v3.symexp_bins(count), f"bins_{count}")
    assert (v3.symexp_bins() == -v3.symexp_bins().flip(0)).all()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_twohot(dtype):
    bins, target = v3.symexp_bins().to(dtype), given("twohot_target", dtype)
    logits = given("twohot_logits", dtype).requires_grad_()
    loss = v3.twohot_loss(logits, target, bins)
    close(loss, "twohot_loss")
    grad, = torch.autograd.grad(loss.sum(), logits)
    close(logits.softmax(-1) - grad, "twohot_vec")
    close(v3.twohot_loss(torch.zeros_like(logits), target, bins), "twohot_loss_zero_logits")
    mean = v3.twohot_mean(given("twohot_dec_logits", dtype), bins)
    assert mean[0] == 0
    close(mean, "twohot_dec_pred")
    close(mean, "twohot_dec_naive_f32")


@pytest.mark.parametrize("dtype", [F32, F64])
def test_unimix_and_straight_through(dtype):
    logits, other = given("unimix_logits", dtype), given("unimix_logits2", dtype)
    event = onehot(given("unimix_event"), 5).to(dtype)
    mixed, plain = v3.log_unimix(logits, 0.01), v3.log_unimix(logits, 0.0)
    close(v3.unimix(logits, 0.01).log(), "unimix_mixed_logits")
    close(v3.entropy(mixed), "unimix_entropy")
    close((mixed * event).sum(-1), "unimix_logp")
    close(v3.entropy(plain), "nomix_entropy")
    close((plain * event).sum(-1), "nomix_logp")
    close(v3.categorical_kl(*(v3.log_unimix(x, 0.01)[..., None, :] for x in (logits, other))), "unimix_kl")
    logits.requires_grad_()
    sample = v3.sample_onehot(v3.unimix(logits, 0.01), force(event).to(dtype))
    equal(sample, "st_value")
    (given("st_w", dtype) * sample).sum().backward()
    close(logits.grad, "st_grad")


def test_kl_losses():
    post, prior = given("kl_post").requires_grad_(), given("kl_prior").requires_grad_()
    dyn, rep, raw = v3.kl_losses(post, prior, 0.01, 1.0)
    close(dyn, "kl_dyn")
    close(rep, "kl_rep")
    close(raw, "kl_raw")
    (dyn.mean() + 0.1 * rep.mean()).backward()
    close(post.grad, "kl_grad_post")
    close(prior.grad, "kl_grad_prior")
    assert (post.grad[raw < 1] == 0).all() and (raw < 1).any()


def test_lambda_return():
    con, rew, val = (time_first(f"lam_img_{k}") for k in ("con", "rew", "val"))
    close(v3.lambda_return(rew, val, con, torch.full_like(con, 0.95)).T, "lam_img_ret")
    last, term, rew, boot = (time_first(f"lam_rep_{k}").double() for k in ("last", "term", "rew", "boot"))
    close(v3.lambda_return(rew, boot, (1 - term) * (1 - 1 / 333), (1 - last) * 0.95).T, "lam_rep_ret")


# ---- environment and replay ----


def test_atari_image():
    """The official gray levels (of the 200M protocol, which is not offered here) are made after the resize."""
    frame = torch.maximum(given("atari_frame1"), given("atari_frame2")).numpy()  # the maximum is ale-py's part
    for size, name in ((64, "atari_rgb64"), (96, "atari_gray96")):
        envs, zero = object.__new__(v3.Envs), np.zeros(1)
        vars(envs).update(size=size, atari=True, images=["obs"], vectors=[], over=zero > 0, ret=zero, length=zero)
        image = envs._row(frame[None, None], zero, zero > 0, zero > 0)["image"][0]
        gray = (image * [0.299, 0.587, 1 - (0.299 + 0.587)]).sum(-1, keepdims=True).astype(np.uint8)
        equal(image if size == 64 else gray, name)


def test_annotate(tmp_path):
    batch = dict(is_first=time_first("ann_is_first_in"), is_last=time_first("ann_is_last_in"))
    replay = make_replay(tmp_path)
    replay.add(dict(is_first=[False], is_last=[False]))
    replay.gather = lambda rows, envs: ({k: v.clone() for k, v in batch.items()}, None)
    batch, _ = replay.sample(1, 1)
    equal(batch["is_first"].T, "ann_is_first_out")
    equal(batch["is_last"].T, "ann_is_last_out")


def make_replay(folder, **specs):
    flags = {k: ((), torch.bool) for k in ("is_first", "is_last")}
    return v3.SequenceReplay(dict(flags, **specs), 100, 1, torch.device("cpu"), folder)


def test_online_queue(tmp_path):
    replay = make_replay(tmp_path, record=((), torch.int64))
    while max(replay.size - 2, 0) < expected("online_items"):
        replay.add(dict(is_first=[False], is_last=[False], record=[replay.rows]))
    batch, _ = replay.sample(50, 3)
    equal(batch["record"].T[: replay.online], "online_queue_seqs")


def test_replay_context(tmp_path):
    replay = make_replay(tmp_path, action=((), torch.int64), reward=((), F32), deter=((2,), F32), stoch=((), F32))
    rows = {k: given(f"ctx_{k}", F32)[0] for k in ("action", "reward", "is_first", "deter")}
    for row in zip(*rows.values()):
        replay.add(dict({k: v[None] for k, v in zip(rows, row)}, is_last=[False], stoch=[0.0]))
    batch, index = replay.sample(1, 6)
    obs, carry = v3.split_context(batch)
    equal(carry["prev_action"].T, "ctx_out_prevact")
    equal(carry["deter"], "ctx_out_carry_deter")
    equal(obs["reward"].T, "ctx_out_reward")
    equal(obs["is_first"].T, "ctx_out_is_first")
    equal(index[1:].T, "ctx_out_stepid")  # where fresh latents are written


def test_ratio(tmp_path, monkeypatch):
    """Updates after each new row, from a run of main whose updates do nothing; with 9 rows a sequence is complete."""
    rows = []
    monkeypatch.setattr(v3, "train_step", lambda agent, optimizer, replay, batch_size: rows.append(replay.rows) or {})
    for name, ratio in dict(r32_e16=32, r256_e1=256, r1024_e1=1024, r512_e4=512).items():
        rows.clear()
        tiny.run("dreamer_v3", tmp_path / name, env_id="envs:Scripted-v0", total_timesteps=190, learning_starts=1,
                 train_ratio=ratio / 64, eval_episodes=0)  # B T = 16, official 1024
        equal(np.bincount(rows, minlength=209)[9:209], f"ratio_{name}")


# ---- networks ----


def test_rms_norm():
    norm = v3.NormSiLU(8).double()
    norm.load_state_dict(dict(weight=given("rms_scale")))
    y = expected("rms_y").double()
    assert torch.allclose(norm(given("rms_x")), F.silu(y), rtol=1e-4, atol=1e-6)


def test_initialisation():
    torch.manual_seed(0)
    layers = v3.init(nn.Linear(512, 300)), v3.init(nn.Conv2d(16, 32, 5)), v3.BlockLinear(2048, 512, 8)
    for layer, (fan_in, std, largest, target_std, bound) in zip(layers, expected("init_stats").tolist()):
        weight = layer.weight.detach().double()
        assert math.isclose(weight.std(), std, rel_tol=0.02) and math.isclose(weight.std(), target_std, rel_tol=0.02)
        assert math.isclose(weight.abs().max(), largest, rel_tol=0.01) and weight.abs().max() <= bound * (1 + 1e-6)
        assert math.isclose(1.1368 * 2 / bound, fan_in ** 0.5, rel_tol=1e-6) and not layer.bias.any()


def test_zero_head():
    logits = v3.mlp(7, 8, 1, 255, 0.0)(torch.randn(1, 2, 7))
    equal(v3.twohot_mean(logits, v3.symexp_bins()), "zero_head_pred")
    close(v3.twohot_loss(logits, torch.randn(1, 2), v3.symexp_bins()), "zero_head_loss")


def test_encoder():
    net = v3.Encoder({"vector": (3,), "image": (48, 48, 3)}, units=6, depth=2, layers=2).double()
    for i in range(4):
        fill(net.convs[i], f"enc_w:enc/cnn{i}")
        fill(net.norms[i], f"enc_w:enc/cnn{i}")
    for i in range(2):
        fill(net.mlp[2 * i], f"enc_w:enc/mlp{i}")
        fill(net.mlp[2 * i + 1], f"enc_w:enc/mlp{i}")
    close(net(dict(image=given("enc_image")[None], vector=given("enc_vec")[None]))[0], "enc_tokens")


def test_decoder():
    net = v3.Decoder({"vector": (3,), "image": (48, 48, 3)}, deter=16, stoch=12, units=6, depth=2, layers=2).double()
    for i in range(2):
        fill(net.mlp[2 * i], f"dec_w:dec/mlp/linear{i}")
        net.mlp[2 * i + 1].load_state_dict(dict(weight=given(f"dec_w:dec/mlp/norm{i}/scale")))
    layers = {"vec/vec/pred": net.mlp_outs[0], "imgout": net.convs[3],
              "sp0": net.from_deter, "sp1": net.from_stoch[0], "sp2": net.from_stoch[2]}
    norms = {"sp1": net.from_stoch[1], "sp": net.norms[0]}
    for i in range(3):  # the official convolutions count down
        layers[f"conv{i}"], norms[f"conv{i}"] = net.convs[2 - i], net.norms[3 - i]
    for name, layer in [*layers.items(), *norms.items()]:
        fill(layer, f"dec_w:dec/{name}")
    deter, stoch = given("dec_deter")[None], given("dec_stoch").flatten(1)[None]
    obs = dict(image=given("enc_image")[None], vector=given("enc_vec")[None])
    out, loss = net(deter, stoch), reconstruction_losses(v3, net, deter, stoch, obs)
    for key, name in dict(image="dec_image", vector="dec_vec").items():
        close(out[key][0], name)
        close(loss[key][0], f"{name}_loss")


def test_rssm_cell_and_prior(rssm):
    weights, rows = rssm.scan_weights(F64)
    deter, stoch = given("core_deter"), given("core_stoch").flatten(1)
    for action, out in (("core_action_onehot", "core_out"), ("core_action_cont", "core_out_cont")):
        dense = rssm.in_action(given(action).clamp(-1, 1)) @ weights["action"]
        close(rssm.core(weights, dict(rows, dense=dense), deter, stoch), out)
    close(rssm.prior(deter), "prior_logit")


def test_rssm_sequence(rssm, monkeypatch):
    samples = time_first("seq_stoch")
    monkeypatch.setattr(rssm, "noise", lambda *lead: force(samples))
    deter, stoch, logits = rssm.observe(
        time_first("seq_tokens"), onehot(time_first("seq_prevact"), 3), time_first("seq_reset"),
        given("seq_carry_deter"), given("seq_carry_stoch").flatten(1))
    assert (stoch == samples.flatten(2)).all()
    close(deter.transpose(0, 1), "seq_deter")
    close(logits.transpose(0, 1), "seq_post_logit")
    close(rssm.prior(deter).transpose(0, 1), "seq_prior_logit")


def test_imagination(rssm, monkeypatch):
    samples, actions = time_first("img_stoch"), onehot(time_first("img_actions"), 3)
    behaviour = make_behaviour(28, 3)
    for net, outcome in ((rssm, samples), (behaviour, actions)):
        monkeypatch.setattr(net, "noise", lambda *lead, outcome=outcome: force(outcome))
    feat, action = behaviour.imagine(rssm, given("core_deter"), given("core_stoch").flatten(1))
    assert (action == actions).all() and (feat[1:, :, 16:] == samples.flatten(2)).all()
    close(feat[1:, :, :16].transpose(0, 1), "img_deter")
    close(rssm.prior(feat[1:, :, :16]).transpose(0, 1), "img_logit")


# ---- losses ----


def test_continue(monkeypatch):
    world, behaviour = v3.WorldModel({"vector": (3,)}, 2, ARGS).double(), make_behaviour(640, 2, imag_horizon=5)
    logits, terminal = given("con_logit")[:, None, None].requires_grad_(), given("con_is_terminal")[:, None]
    monkeypatch.setattr(world.cont, "forward", lambda feat: logits)
    batch = blank_rows(7, F64)
    batch["is_terminal"][1:] = terminal
    losses, post, _ = world.loss(*v3.split_context(batch))
    close(losses["cont"][:, 0], "con_loss")
    grad, = torch.autograd.grad(losses["cont"].sum(), logits)

    seen, original = [], behaviour.imagination_losses  # what the dream makes of the same logits
    monkeypatch.setattr(behaviour, "imagination_losses", lambda *a: seen.append(a[-1]) or original(*a))
    behaviour.loss(world, {k: v[:2] for k, v in post.items()}, {k: v[1:3] for k, v in batch.items()})
    close(seen[0][:, 0], "con_prob")
    close((seen[0] - grad[..., 0])[:, 0], "con_target")


@pytest.mark.parametrize("dtype", [F32, F64])
def test_return_norm(dtype):
    norm = make_behaviour(2, 2).to(dtype)
    steps = [(norm.return_scale(x), *norm.percentiles.clone()) for x in given("retnorm_x", dtype)]
    scale, low, high = map(torch.stack, zip(*steps))
    close(scale, "retnorm_scale")
    close(low, "retnorm_lo")
    close(low, "retnorm_offset")
    close(high, "retnorm_hi")
    steps = [(norm.return_scale(x, 1.0), *norm.percentiles.clone())[1:] for x in given("retnorm_x", dtype)]
    close(torch.tensor(steps), "retnorm_batch_perc")


def imagination(behaviour, policy, action):
    """Our losses on the official inputs, and the value logits; compares what does not depend on the policy."""
    value = time_first("il_value_logits").requires_grad_()
    slow = time_first("il_slow_logits")
    behaviour.percentiles.copy_(torch.stack([given("il_retnorm_lo0"), given("il_retnorm_hi0")]))
    losses, ret, metrics = behaviour.imagination_losses(
        policy, action, value, slow, time_first("il_rew"), time_first("il_con"))
    close(v3.twohot_mean(value, behaviour.bins).T, "il_val")
    close(v3.twohot_mean(slow, behaviour.bins).T, "il_slowval")
    close(ret.T, "il_ret")
    close(losses["value"].T, "il_value_loss")
    close(behaviour.percentiles[0], "il_retnorm_lo1")
    close(behaviour.percentiles[1], "il_retnorm_hi1")
    close(((ret - v3.twohot_mean(value, behaviour.bins)[:-1]) / metrics["ac/return_scale"]).mean(), "il_adv_mean")
    return losses, value


@pytest.mark.parametrize("mix", [0, 1])
def test_imagination_losses_discrete(mix):
    behaviour, logits = make_behaviour(2, 4, actor_unimix=0.01 * mix), time_first("il_policy_logits").requires_grad_()
    behaviour.actor = nn.ModuleList([nn.Identity(), nn.Identity()])
    action = onehot(time_first("il_action"), 4)
    losses, value = imagination(behaviour, behaviour.policy(logits[:-1]), action[:-1])
    close(losses["policy"].T, f"il_um{mix}_policy_loss")
    (losses["policy"].mean() + losses["value"].mean()).backward()
    close(logits.grad.transpose(0, 1), f"il_um{mix}_grad_policy")
    close(value.grad.abs().sum(-1).T, "il_grad_value_abs_sum")
    equal(value.grad[-1].abs().max(), "il_grad_value_last_step_max")


def test_imagination_losses_continuous():
    behaviour, action = make_behaviour(2, 2, discrete=False), time_first("ilc_action")
    del behaviour.actor
    behaviour.actor = nn.Identity(), lambda x: x[..., :2], lambda x: x[..., 2:]
    raw = torch.cat([time_first("ilc_mean_raw"), time_first("ilc_std_raw")], -1)
    policy = behaviour.policy(raw)
    close(policy.log_prob(action).sum(-1).T, "ilc_logp")
    close(policy.entropy().sum(-1).T, "ilc_entropy")
    losses, _ = imagination(behaviour, behaviour.policy(raw[:-1]), action[:-1])
    close(losses["policy"].T, "ilc_policy_loss")


def test_replay_losses():
    behaviour = make_behaviour(2, 2)
    value, slow, boot, rew, last, term = (
        time_first(f"rl_{k}") for k in ("value_logits", "slow_logits", "boot", "rew", "last", "term"))
    loss, ret = behaviour.replay_loss(value, slow, boot, dict(reward=rew, is_last=last, is_terminal=term))
    close(loss.T, "rl_loss")
    close(ret.T, "rl_ret")


# ---- update ----


def optimise(**options):
    """Our optimiser on the official parameters and gradients; (optimiser, parameters) after each of six steps."""
    params = [nn.Parameter(given(f"opt_p0_{name}")) for name in PARAMS]
    optimizer = v3.LaProp(params, **options)
    for k in range(6):
        for p, name in zip(params, PARAMS):
            p.grad = given(f"opt_g_{name}")[k]
        optimizer.step()
        yield optimizer, params


def test_optimiser():
    for k, (_, params) in enumerate(optimise(lr=1e-2, warmup=4, agc=0.3)):
        for p, name in zip(params, PARAMS):
            close_step(p, f"opt_params_{name}", k)
    # clipping alone: with no memory (beta1 -> 0) and an epsilon that drowns the normaliser, momentum is the gradient
    for k, (optimizer, _) in enumerate(optimise(lr=0.0, warmup=0, agc=0.3, beta1=1e-99, eps=1e12)):
        for m, name in zip(optimizer.momentum, PARAMS):
            close_step(m * 1e12, f"opt_agc_{name}", k)
    # normaliser and momentum alone: the distance travelled with learning rate 1 and no clipping
    before = [given(f"opt_p0_{name}") for name in PARAMS]
    for k, (_, params) in enumerate(optimise(lr=1.0, warmup=0, agc=math.inf)):
        for p, old, name in zip(params, before, PARAMS):
            close_step(old - p, f"opt_laprop_{name}", k)
            old.copy_(p.detach())


def close_step(ours, name, k):
    theirs = expected(name)[k].double()
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6), f"{name}[{k}]: {ours} instead of {theirs}"


def test_learning_rate():
    for step, lr in zip(given("lr_step"), expected("lr_value").double()):
        p = nn.Parameter(torch.zeros(1, dtype=F64))
        optimizer = v3.LaProp([p], ARGS.lr, ARGS.warmup, math.inf, beta1=1e-99, beta2=1e-99)  # no memory: a step is lr
        optimizer.count.fill_(step)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert torch.allclose(-p.detach(), lr, rtol=1e-4, atol=1e-12)


def test_slow_critic():
    """Through train_step with learning rate 0; the official numbers are a corner of one layer."""
    agent = v3.Agent({"vector": (3,)}, 2, True, v3.Args(size="size1m", batch_length=2, imag_horizon=2))
    critic, slow = agent.behaviour.critic[-1].weight.data[:3, :5], agent.behaviour.slow_critic[-1].weight.data[:3, :5]
    critic.copy_(given("slow_fast", F32))
    slow.copy_(given("slow_before", F32))
    optimizer = v3.LaProp([p for p in agent.parameters() if p.requires_grad], 0.0, 0, 0.3)
    rows = SimpleNamespace(sample=lambda *a: (blank_rows(3, F32), torch.zeros(3, 1)), write=lambda *a, **k: None,
                           device=torch.device("cpu"))
    close(agent.args.slow_rate, "slow_rate")
    for name in ("slow_after1", "slow_after2"):
        v3.train_step(agent, optimizer, rows, 1)
        close(slow, name)
    assert all(p.is_leaf for p in agent.behaviour.slow_critic.parameters()), "each update is kept in an autograd graph"


def test_every_array_is_used(request):
    tests = {name for name in globals() if name.startswith("test_")}
    run = {item.originalname for item in request.session.items if item.module.__name__ == __name__}
    if request.session.testsfailed or tests != run:
        pytest.skip("a test failed, or only a part of this file was selected")
    print(f"dreamer_v3.npz: {len(COMPARED)} arrays compared, {len(INPUTS - COMPARED)} as inputs, of {len(GOLDEN)}")
    assert INPUTS | COMPARED == set(GOLDEN)
