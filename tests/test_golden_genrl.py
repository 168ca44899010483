"""genrl.py against numbers that the functions of mazpie/genrl (4cd8394) gave, on the CPU in float32.

`given` reads an input, `close` compares an output; the last test fails if an array of the file was neither. Official
arrays are (B,T,...), ours time first, except those of dreams; an official feature is [s, h], ours [h, s]; official images
are (C,Y,X). The official connector has eight more inputs, which it multiplies by zero. All is compared in float64."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden, load

m = load("genrl")
GOLDEN = golden("genrl")
INPUTS, COMPARED = set(), set()
S = K = 4
DETER, EMBED, ACTIONS = 12, 16, 3
ARGS = m.Args(hidden=DETER, stoch=S, classes=K, cnn_depth=2, layers=2, precision="fp32", ent_coef=0.0)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def given(name):
    INPUTS.add(name)
    x = torch.tensor(GOLDEN[name])
    return x.double() if x.is_floating_point() else x


def close(ours, name):
    COMPARED.add(name)
    theirs = torch.tensor(GOLDEN[name]).double()
    ours = torch.as_tensor(ours).detach().double()
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


def swap(x):
    """(B,T,...) to (T,B,...) or back."""
    return x.transpose(0, 1)


def fill(module, *names):
    """Load weights, in order of the module's parameters, from w.NAME.weight and w.NAME.bias."""
    params = dict(module.named_parameters())
    wanted = [f"w.{name}.{kind}" for name in names for kind in ("weight", "bias") if f"w.{name}.{kind}" in GOLDEN]
    assert len(params) == len(wanted), (list(params), wanted)
    for param, name in zip(params.values(), wanted):
        value = given(name)
        param.data.copy_(value[:, : param.shape[1]] if param.shape != value.shape else value)


def fill_dynamics(module, name):
    fill(module.img_in, f"{name}.img_in", f"{name}.img_in_ln")
    fill(module.gru, f"{name}.gru")
    fill(module.gru_norm, f"{name}.gru_ln")
    fill(module.prior, f"{name}.img_out", f"{name}.img_out_ln", f"{name}.img_dist")


def world_model():
    world = m.WorldModel({"image": (64, 64, 3)}, ACTIONS, ARGS)
    fill(world.encoder.convs, *(f"enc.conv{i}" for i in (0, 3, 6, 9)))
    fill(world.encoder.norms, *(f"enc.conv{i}" for i in (1, 4, 7, 10)))
    fill_dynamics(world.rssm, "rssm")
    fill(world.rssm.posterior, "rssm.obs_out", "rssm.obs_out_ln", "rssm.obs_dist")
    fill(world.decoder.project, "dec.in")
    fill(world.decoder.convs, *(f"dec.conv{i}" for i in (0, 3, 6, 9)))
    fill(world.decoder.norms, *(f"dec.conv{i}" for i in (1, 4, 7)))
    return world


def connector():
    connector = m.Connector(EMBED, ARGS)
    fill_dynamics(connector, "conn")
    fill(connector.init_net, *(f"conn.init.{i}" for i in (0, 1, 3, 4, 6)))
    for name, block in connector.aligner.named_modules():
        if isinstance(block, m.Residual):
            path = f"conn.aligner.{name}"
            fill(block.layer, f"{path}.layer")
            fill(block.norm, *([f"{path}.ln"] if f"w.{path}.ln.weight" in GOLDEN else []))
            fill(block.skip, *([f"{path}.res_proj"] if f"w.{path}.res_proj.weight" in GOLDEN else []))
    return connector


def behaviour(discrete=False):
    behaviour = m.Behaviour(DETER + S * K, ACTIONS, discrete, ARGS)
    dense = ["dense0", "norm0", "dense1", "norm1"]
    fill(behaviour.actor, *(f"actor.{name}" for name in dense))
    fill(behaviour.actor_mean, "actor.out")
    if not discrete:
        fill(behaviour.actor_std, "actor.out_std")
    for critic in (behaviour.critic, behaviour.slow_critic):
        fill(critic, *(f"critic.{name}" for name in dense), "critic.out")
    # features come in another order
    for first in (behaviour.actor[0], behaviour.critic[0], behaviour.slow_critic[0]):
        first.weight.data.copy_(reorder(first.weight.data))
    behaviour.percentiles.copy_(given("ac.ema_before"))
    return behaviour


def reorder(feat):
    """[s, h] to [h, s]."""
    return torch.cat([feat[..., S * K :], feat[..., : S * K]], -1)


def force_samples(monkeypatch, *outcomes):
    """The next categorical samples of the script have these outcomes, one after the other."""
    queue = iter(outcomes)
    original = m.sample_onehot
    noise = lambda onehot: torch.where(onehot > 0, 1e-30, 1.0)
    monkeypatch.setattr(m, "sample_onehot", lambda probs, _: original(probs, noise(next(queue))))


def rows():
    return {
        "image": swap(given("wm.obs")).permute(0, 1, 3, 4, 2),
        "prev_action": swap(given("wm.action")),
        "is_first": swap(given("wm.is_first")),
        "reward": torch.zeros(3, 2),
    }


def test_gru(monkeypatch):
    cell = connector()
    cell.img_in = torch.nn.Identity()
    nothing = torch.zeros(3, 0)
    close(cell.core(given("gru.h"), given("gru.x"), nothing), "gru.out")


def test_unimix():
    close(m.unimix(given("unimix.logits"), 0.01), "unimix.probs")


def test_world_model(monkeypatch):
    world = world_model()
    stoch = swap(given("wm.post_stoch"))
    force_samples(monkeypatch, stoch, stoch)
    batch = rows()
    post, tokens = world.observe(batch)
    close(swap(tokens), "wm.embed")
    close(swap(post["logits"]), "wm.post_logit")
    close(swap(post["stoch"]).unflatten(-1, (S, K)), "wm.post_stoch")
    close(swap(post["deter"]), "wm.deter")
    prior = world.rssm.groups(world.rssm.prior(post["deter"]))
    close(swap(prior), "wm.prior_logit")
    recon = world.decoder(post["stoch"]).permute(1, 0, 4, 2, 3)
    close(recon[..., ::8, ::8], "wm.recon_sub")

    total, kl = m.kl_loss(post["logits"], prior, 0.01, ARGS.kl_balance, 1.0)
    close(swap(kl), "wm.kl_value")
    close(total, "wm.kl_loss")
    close(m.kl_loss(post["logits"], prior, 0.01, ARGS.kl_balance, 0.0)[0], "wm.kl_loss_free0")
    loss, post, metrics = world.loss(batch)
    close(metrics["losses/image"], "wm.recon_loss")
    close(loss - metrics["losses/reward"], "wm.loss_kl_plus_recon")


def test_connector(monkeypatch):
    model = connector()
    embed = swap(given("conn.video_embed"))
    post = dict(stoch=swap(given("conn.post_stoch")).flatten(-2), logits=swap(given("conn.post_logit")))
    noise = swap(given("conn.noise"))
    labels = m.clip_labels(embed)
    noised = m.corrupt_embedding(labels, noise, ARGS.align_noise)
    close(swap(noised), "conn.noised")
    close(swap(model.aligner.raw(noised)), "conn.aligner_raw")

    first = given("conn.init_stoch")
    force_samples(monkeypatch, first, first, first)
    deter, stoch = model.initial(model.scale(labels[0]))
    close(deter, "conn.init_deter")
    close(stoch.unflatten(-1, (S, K)), "conn.init_stoch")
    deters = []
    core = model.core
    monkeypatch.setattr(model, "core", lambda *args: deters.append(core(*args)) or deters[-1])
    prior = model.predict(labels, post["stoch"])
    close(swap(prior), "conn.prior_logit")
    close(swap(torch.stack(deters)), "conn.prior_deter")
    kl = m.categorical_kl(m.log_unimix(prior, 0.01), m.log_unimix(post["logits"], 0.01))
    close(swap(kl), "conn.kl_value")

    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    total, metrics = model.loss(embed, post)
    close(metrics["losses/connector"], "conn.kl_loss")
    close(metrics["losses/aligner"], "conn.aligner_loss")
    close(total, "conn.total_loss")
    total.backward()
    grad = model.img_in[0].weight.grad
    close(F.pad(grad, (0, 8)), "conn.grad.img_in.weight")
    close(model.init_net[-1].bias.grad, "conn.grad.init.6.bias")
    close(model.aligner.up[1].layer.weight.grad, "conn.grad.aligner.up.1.layer.weight")


def test_target(monkeypatch):
    model = connector()
    aligned = model.aligner(given("tgt.text"))
    first = given("tgt.init_stoch")
    force_samples(monkeypatch, first, first)
    deter, stoch = model.initial(model.scale(aligned).expand(4, -1))
    close(deter, "tgt.init_deter")
    close(stoch.unflatten(-1, (S, K)), "tgt.init_stoch")
    stoch, logits, deter = model.rollout(aligned.expand(18, 4, -1), sample=False)
    close(swap(stoch).unflatten(-1, (S, K)), "tgt.stoch")
    close(swap(logits), "tgt.logit")
    close(swap(deter), "tgt.deter")


KINDS = ["cosine", "max_cosine", "neg_mse", "exp_neg_mse", "neg_kl", "max_like", "combo"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode, short", [("none", "none"), ("sequence", "seq"), ("initial", "init")])
def test_reward(monkeypatch, kind, mode, short):
    agent = m.Agent({"image": (64, 64, 3)}, ACTIONS, False, m.replace(ARGS, reward_fn=kind, align=mode), EMBED)
    fill(agent.world.decoder.project, "dec.in")
    stoch, logits = given("rew.agent_stoch"), given("rew.agent_logit")
    agent.target = agent.view(given("rew.target_stoch").flatten(-2), given("rew.target_logit"))
    reward, index = agent.match(stoch.flatten(-2), logits)
    close(reward[..., None], f"rew.{short}.{kind}")
    if mode == "sequence":
        close(16 - index[-1], f"rew.seq.{kind}.ta")
        view = agent.view(stoch.flatten(-2), logits)
        if f"rew.seq.{kind}.score" in GOLDEN:
            begin = {k: v[:8] for k, v in agent.target.items()}
            windows = [{k: v[t : t + 8] for k, v in view.items()} for t in range(9)]
            scores = [m.similarity(kind, window, begin).mean(0) for window in windows]
            close(torch.stack(scores), f"rew.seq.{kind}.score")
        if kind == "max_cosine":
            close(index, "rew.seq.max_cosine.index")
            close(view["project"], "rew.proj_agent")


@pytest.mark.parametrize("discrete", [False, True])
def test_actor_critic(discrete):
    """The official Reinforce branch was run with the Normal; the discrete policy stands in for it below."""
    model = behaviour()
    feat, reward = reorder(given("ac.feat")), given("ac.reward")[..., 0]
    target, value = model.returns(feat, reward)
    close(value[..., None], "ac.value")
    close(target[..., None], "ac.target")
    policy = model.policy(feat)
    close(policy.mean, "ac.actor_mean")
    close(policy.stddev, "ac.actor_std")
    close(model.critic_loss(feat, target), "ac.critic_loss")

    action = given("ac.action")[1:]  # the official row holds the action that led to it
    if not discrete:
        loss, _ = model.actor_loss(feat, action, target, value)
        close(loss, "ac.actor_loss_dynamics")
    else:  # a categorical "policy" whose log-probability is that of the Normal: (policy * action).sum(-1)
        log_prob = policy.log_prob(torch.cat([action, action[-1:]])).sum(-1)
        model.discrete = True
        model.policy = lambda _: log_prob[:-2, :, None].expand(-1, -1, ACTIONS)
        loss, _ = model.actor_loss(feat, torch.full_like(action, 1 / ACTIONS), target, value)
        close(loss, "ac.actor_loss_reinforce")
    close(model.percentiles, "ac.ema_after")


def test_twohot():
    bins = torch.linspace(-20, 20, 255)
    logits = given("twohot.logits")
    close(-m.twohot_loss(logits, given("twohot.target")[:, 0], bins), "twohot.log_prob")
    close(m.twohot_mean(logits, bins)[:, None], "twohot.mean")


def test_plan2explore():
    nets = m.Disagreement(10, 6)
    for i, net in enumerate(nets.nets):
        net[0] = torch.nn.Linear(10, 5)  # hidden width of the golden file
        net[2] = torch.nn.Linear(5, 6)
        fill(net, f"p2e.ensemble.{i}.0", f"p2e.ensemble.{i}.2")
    obs, action, following = given("p2e.obs"), given("p2e.action"), given("p2e.next")
    error = (nets.predict(obs, action) - following).norm(dim=-1)
    close(error.T, "p2e.error")
    torch.testing.assert_close(nets.loss(obs, action, following), error.mean())
    close(nets.reward(obs, action), "p2e.reward")


def test_parameter_counts():
    """Official sizes; the connector without 2 x 8 x 1024 weights that only see zeros."""
    count = lambda module: sum(p.numel() for p in module.parameters())
    with torch.device("meta"):
        agent = m.Agent({"image": (64, 64, 3)}, 6, False, m.Args())
        other = m.Agent({"image": (64, 64, 3)}, 10, False, m.Args(), vl_dim=768)
    assert count(agent.world.encoder) == 1_552_752
    assert count(agent.world.rssm) == 12_082_176
    assert count(other.world.rssm) == 12_086_272
    assert count(agent.world.rssm.gru) + count(agent.world.rssm.gru_norm) == 6_297_600
    assert count(agent.world.decoder) == 9_580_083
    assert count(agent.world.reward) == 5_516_543
    assert count(agent.connector.aligner) == 1_972_736
    assert count(agent.connector.init_net) + 8 * 1024 == 2_636_800
    dead = 2 * 8 * 1024
    assert count(agent.connector) + dead == 14_592_512
    assert count(other.connector) + dead == 17_577_728
    assert count(other.connector.aligner) == 4_433_664
    assert sum(p.numel() for p in agent.behaviour.actor_parameters()) == 5_267_468
    assert sum(p.numel() for p in other.behaviour.actor_parameters()) == 5_275_668
    assert count(agent.behaviour.critic) == count(agent.behaviour.slow_critic) == 5_516_543
    assert count(agent.world) + count(agent.connector) + dead == 43_324_066


def test_all_arrays_were_used(request):
    if len(request.session.items) < 30:
        pytest.skip("only with the other tests of this file")
    assert set(GOLDEN) == INPUTS | COMPARED
