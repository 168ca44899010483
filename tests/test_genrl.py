"""genrl.py: its mathematics by definition, which loss reaches which parameters, prompts, episode files, mutations."""
import json
import math
from dataclasses import replace
from importlib.util import find_spec

import envs
import gymnasium
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import load
from PIL import Image, ImageSequence

m = load("genrl")
S, K, E, A, H = 4, 5, 12, 3, 16
SMALL = dict(hidden=8, stoch=S, classes=K, cnn_depth=2, layers=1, precision="fp32", policy_batch_length=4)
SHAPES = {"image": (64, 64, 3)}
if "ScriptedVideo-v0" not in gymnasium.registry:
    gymnasium.register("ScriptedVideo-v0", entry_point=envs.Scripted, kwargs=dict(image=True, length=19, continuous=True))


def make_agent(discrete=False, **changes):
    torch.manual_seed(0)
    agent = m.Agent(SHAPES, A, discrete, m.Args(**{**SMALL, **changes}), E)
    for critic in (agent.behaviour.critic, agent.behaviour.slow_critic, agent.explorer.critic):
        torch.nn.init.normal_(critic[-1].weight, std=0.1)  # zero at first: gradients would be zero too
    return agent


def onehots(*shape):
    return F.one_hot(torch.randint(K, (*shape, S)), K).float().flatten(-2)


def unit(*shape):
    return F.normalize(torch.randn(*shape, E), dim=-1)


def make_rows(length=8, batch=2):
    return {
        "image": torch.randint(256, (length, batch, 64, 64, 3), dtype=torch.uint8),
        "prev_action": torch.randn(length, batch, A),
        "is_first": torch.zeros(length, batch, dtype=torch.bool),
        "reward": torch.randn(length, batch),
        "vl_embed": unit(length, batch),
    }


class Rows:
    """A replay that always gives the same rows."""

    def __init__(self, rows):
        self.rows = rows

    def sample(self, batch_size, length):
        return {k: v[:length] for k, v in self.rows.items()}


# ---- pure functions ----


def test_lambda_return_equals_its_definition():
    """A reward at k alone, with values of zero, is worth (gamma lam)^(k - t); r_H is never used."""
    gamma, lam = 0.9, 0.8
    for k in range(5):
        reward = torch.zeros(5)
        reward[k] = 1.0
        ret = m.lambda_return(reward, torch.zeros(5), torch.full((5,), gamma), lam)
        expected = [(gamma * lam) ** (k - t) if t <= k < 4 else 0.0 for t in range(4)]
        torch.testing.assert_close(ret, torch.tensor(expected))
    value = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    ret = m.lambda_return(torch.zeros(5), value, torch.full((5,), gamma), lam)
    torch.testing.assert_close(ret[3], torch.tensor(gamma))
    torch.testing.assert_close(ret[2], torch.tensor(gamma * lam * gamma))


def test_corruption_turns_by_45_degrees():
    torch.manual_seed(0)
    embed = F.normalize(torch.randn(1000, 512), dim=-1)
    noised = m.corrupt_embedding(embed, torch.randn(1000, 512), 0.5)
    torch.testing.assert_close(noised.norm(dim=-1), torch.ones(1000))
    cosine = (noised * embed).sum(-1)
    assert abs(cosine.mean() - math.sqrt(0.5)) < 0.01
    assert (cosine - math.sqrt(0.5)).abs().max() < 0.08
    for share in (0.3, 0.7):
        cosine = (m.corrupt_embedding(embed, torch.randn(1000, 512), share) * embed).sum(-1)
        assert abs(cosine.mean() - math.cos(math.atan(share / (1 - share)))) < 0.02


def test_a_clip_is_labelled_by_its_last_row():
    rows = torch.arange(24)[:, None]
    assert m.clip_labels(rows)[:, 0].tolist() == [7] * 8 + [15] * 8 + [23] * 8


def test_similarities_of_equal_and_of_doubled_states():
    u = torch.randn(3, 2, 7)
    logs = torch.randn(3, 2, S, K).log_softmax(-1)
    same = dict(project=u, log_probs=logs, stoch=onehots(3, 2))
    double = dict(same, project=2 * u)
    for kind, value in dict(cosine=1, max_cosine=1, neg_mse=0, exp_neg_mse=1, neg_kl=0, combo=1).items():
        torch.testing.assert_close(m.similarity(kind, same, same), torch.full((3, 2), float(value)), msg=kind)
    torch.testing.assert_close(m.similarity("max_cosine", double, same), torch.full((3, 2), 0.5))
    torch.testing.assert_close(m.similarity("cosine", double, same), torch.ones(3, 2))


def test_neg_kl_has_the_agent_first():
    p, q = torch.randn(2, 1, 1, S, K).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum()
    ours = m.similarity("neg_kl", dict(log_probs=p), dict(log_probs=q))
    torch.testing.assert_close(ours, -kl[None, None] / (S * math.log(K)))


def test_alignment_finds_where_the_target_begins():
    """A target hidden in a dream: found at 0 to 8, not at 9; before it the first target is what counts."""
    torch.manual_seed(0)
    steps = H + 1
    target = torch.randn(steps, 10, 6)
    dream = torch.randn(steps, 10, 6)
    for n in range(10):
        dream[n:, n] = target[: steps - n, n]
    views = [dict(stoch=x, project=x) for x in (dream, target)]
    index = m.align_target("max_cosine", "sequence", *views)
    begin = H - index[-1]
    assert begin[:9].tolist() == list(range(9))
    assert begin[9] != 9
    for n in range(9):
        assert index[:, n].tolist() == [max(t - n, 0) for t in range(steps)]
    assert (H - m.align_target("max_cosine", "initial", *views)[-1]).tolist() == list(range(10))
    assert (m.align_target("max_cosine", "none", *views) == torch.arange(steps)[:, None]).all()


def test_reward_after_alignment():
    """1 from t_a on; before it the similarity with target 0; the gradient goes to the dream alone."""
    agent = make_agent()
    target = onehots(H + 1, 1)
    dream = torch.cat([onehots(3, 1), target[:-3]]).requires_grad_()
    agent.target = agent.view(target, torch.zeros(H + 1, 1, S, K))
    reward, index = agent.match(dream, torch.zeros(H + 1, 1, S, K))
    torch.testing.assert_close(reward[3:], torch.ones(H - 2, 1))
    project = agent.world.decoder.project
    early = m.similarity("max_cosine", dict(project=project(dream[:3])), dict(project=project(target[:1])))
    torch.testing.assert_close(reward[:3], early)
    reward.sum().backward()
    assert dream.grad[:3].abs().sum() > 0


# ---- world model ----


def test_posterior_and_decoder_do_not_see_memory():
    agent = make_agent()
    world = agent.world
    tokens = torch.randn(1, 2, world.encoder.tokens)
    rest = (torch.randn(1, 2, A), torch.zeros(1, 2, dtype=torch.bool))
    results = []
    for deter in (torch.zeros(2, 8), torch.ones(2, 8)):
        torch.manual_seed(1)
        results.append(world.rssm.observe(tokens, *rest, deter, onehots(2)))
    torch.testing.assert_close(results[0][2], results[1][2])
    torch.testing.assert_close(world.decoder(results[0][1]), world.decoder(results[1][1]))
    assert not torch.allclose(results[0][0], results[1][0])
    actor = [agent.behaviour.policy(torch.cat([deter[0], results[0][1][0]], -1)).mean for deter, _, _ in results]
    assert not torch.allclose(*actor)


def test_a_sequence_equals_its_steps_and_is_first_forgets(monkeypatch):
    monkeypatch.setattr(m.Dynamics, "sample", m.Dynamics.mode)
    rssm = make_agent().world.rssm
    tokens = torch.randn(5, 2, 64)
    action = torch.randn(5, 2, A)
    first = torch.zeros(5, 2, dtype=torch.bool)
    first[3, 0] = True
    state = (torch.zeros(2, 8), torch.zeros(2, S * K))
    deters, stochs, _ = rssm.observe(tokens, action, first, *state)
    for t in range(5):
        deter, stoch, _ = rssm.observe(tokens[t : t + 1], action[t : t + 1], first[t : t + 1], *state)
        state = (deter[0], stoch[0])
        torch.testing.assert_close(deters[t], state[0])
        torch.testing.assert_close(stochs[t], state[1])
    fresh, _, _ = rssm.observe(tokens[3:4], action[3:4] * 7, first[3:4], torch.zeros(2, 8), torch.zeros(2, S * K))
    torch.testing.assert_close(deters[3, 0], fresh[0, 0])
    assert not torch.allclose(deters[3, 1], fresh[0, 1])


def test_action_of_a_row_led_to_it():
    agent = make_agent()
    rows = make_rows()
    deters = []
    for _ in range(2):
        torch.manual_seed(1)
        deters.append(agent.world.observe(rows)[0]["deter"])
        rows["prev_action"][4] += 1
    changed = (deters[0] != deters[1]).flatten(1).any(-1)
    assert changed.tolist() == [False] * 4 + [True] * 4


def test_free_nats_apply_to_each_state():
    post = torch.zeros(1, 2, S, K)
    prior = torch.zeros(1, 2, S, K)
    post[0, 0, :, 0] = 10.0  # one state far away, one equal
    loss, kl = m.kl_loss(post, prior, 0.01, 0.85, 1.0)
    assert kl[0, 1] < 1e-5 and kl[0, 0] > 1
    torch.testing.assert_close(loss, (kl[0, 0] + 1) / 2)


def reached(loss, agent) -> set[str]:
    """Parts of the agent whose parameters get a gradient that is not zero."""
    agent.zero_grad()
    loss.backward()
    found = set()
    for name, p in agent.named_parameters():
        if p.grad is not None and p.grad.abs().max() > 0:
            found.add(".".join(name.split(".")[:2]))
    return found


def test_reach_of_the_world_model():
    agent = make_agent()
    loss, _, _ = agent.world.loss(make_rows())
    assert reached(loss, agent) == {"world.encoder", "world.rssm", "world.decoder", "world.reward"}
    grads = []
    for scale in (1.0, 100.0):  # rewards must not form the latents
        rows = make_rows()
        torch.manual_seed(3)
        rows = {k: (v if k != "reward" else torch.full_like(v, scale)) for k, v in rows.items()}
        rows["image"].zero_()
        rows["prev_action"].zero_()
        agent.zero_grad()
        agent.world.loss(rows)[0].backward()
        grads.append([p.grad.clone() for name, p in agent.world.named_parameters() if "reward" not in name])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- connector and aligner ----


def test_reach_and_size_of_the_connector_loss():
    """Nothing reaches the world model; the gradient is 0.8 of a plain KL's."""
    agent = make_agent()
    rows = make_rows()
    _, post, _ = agent.world.loss(rows)
    assert not any(x.requires_grad for x in post.values())
    grads = []
    for balance in (0.8, 1.0):
        agent.connector.args = replace(agent.args, connector_balance=balance)
        torch.manual_seed(1)
        loss, metrics = agent.connector.loss(rows["vl_embed"], post)
        parts = {"connector.img_in", "connector.gru", "connector.gru_norm", "connector.prior", "connector.init_net"}
        assert reached(loss, agent) == parts | {"connector.aligner"}
        grads.append((metrics["losses/connector"], agent.connector.img_in[0].weight.grad.clone()))
    torch.testing.assert_close(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], 0.8 * grads[1][1])


def test_connector_sees_the_clip_of_its_rows():
    """Row 7 of the embeddings says what rows 0 to 7 show; row 3 is never looked at."""
    agent = make_agent()
    embed = unit(16, 2)
    post = onehots(16, 2)
    logits = []
    for row in (None, 3, 7, 15):
        changed = embed.clone()
        if row is not None:
            changed[row] = unit(2)
        torch.manual_seed(1)
        logits.append(agent.connector.predict(m.clip_labels(changed), post))
    assert torch.equal(logits[0], logits[1])
    assert (logits[0] != logits[2]).flatten(1).any(-1).all()
    assert (logits[0] != logits[3]).flatten(1).any(-1).tolist() == [False] * 8 + [True] * 8


def test_connector_is_given_the_posterior_of_the_step_before():
    agent = make_agent()
    embed = unit(8, 2)
    post = onehots(8, 2)
    other = post.clone()
    other[4] = onehots(2)
    logits = []
    for stoch in (post, other):
        torch.manual_seed(1)
        logits.append(agent.connector.predict(embed, stoch))
    assert (logits[0] != logits[1]).flatten(1).any(-1).tolist() == [False] * 5 + [True] * 3


def test_aligner_is_not_fed_to_the_connector():
    agent = make_agent()
    rows = make_rows()
    _, post, _ = agent.world.loss(rows)
    values = []
    for _ in range(2):
        torch.manual_seed(1)
        values.append(agent.connector.loss(rows["vl_embed"], post)[1])
        for p in agent.connector.aligner.parameters():
            p.data.add_(0.3 * torch.randn_like(p))
    assert values[0]["losses/connector"] == values[1]["losses/connector"]
    assert values[0]["losses/aligner"] != values[1]["losses/aligner"]


def test_aligner_learns_more_than_the_mean():
    """Embeddings as a VLM gives them: a common direction, and few of their own."""
    torch.manual_seed(0)
    basis = torch.randn(4, 32)
    data = F.normalize(3 * torch.randn(32) + torch.randn(512, 4) @ basis, dim=-1)
    aligner = m.Aligner(32)
    adam = torch.optim.Adam(aligner.parameters(), 2e-3)
    for _ in range(300):
        noised = m.corrupt_embedding(data, torch.randn_like(data), 0.5)
        loss = 1 - (aligner(noised) * data).sum(-1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert loss < 0.7 * (1 - data.mean(0).norm())
    torch.testing.assert_close(aligner(data).norm(dim=-1), torch.ones(512))


# ---- behaviour ----


def start_states(count=3):
    return dict(deter=torch.randn(count, 8), stoch=onehots(count), logits=torch.zeros(count, S, K))


@pytest.mark.parametrize("discrete", [False, True])
def test_reach_of_actor_and_critic(discrete):
    agent = make_agent(discrete)
    agent.set_prompt(unit(), 3)
    reward_fn = lambda states, action: agent.match(states["stoch"], states["logits"])[0]
    losses, _ = agent.behaviour.loss(agent.world, start_states(), reward_fn)
    names = {"behaviour.actor", "behaviour.actor_mean"} | (set() if discrete else {"behaviour.actor_std"})
    actor = agent.behaviour.actor_parameters()
    assert all((g != 0).any() for g in torch.autograd.grad(losses["policy"], actor, retain_graph=True))
    if discrete:  # Reinforce reaches the actor alone
        assert reached(losses["policy"], agent) == names
    assert reached(losses["value"], agent) == {"behaviour.critic"}


def test_dynamics_gradient_equals_finite_differences(monkeypatch):
    """A linear world of one number: the actor's gradient through the dream, by two evaluations of the loss."""
    torch.set_default_dtype(torch.float64)
    try:
        agent = make_agent(imag_horizon=3)
        behaviour = agent.behaviour
        shift = torch.zeros(A, requires_grad=True)
        world = torch.nn.Module()
        world.rssm = torch.nn.Module()

        def imagine_step(deter, stoch, action):
            return 0.9 * deter + action.sum(-1, keepdim=True), stoch, torch.zeros(len(deter), S, K)

        world.rssm.imagine_step = imagine_step
        monkeypatch.setattr(behaviour, "policy", lambda feat: torch.distributions.Normal(shift.expand(*feat.shape[:-1], A), 0.1))
        monkeypatch.setattr(behaviour, "return_scale", lambda target: (torch.tensor(0.0), torch.tensor(1.0)))
        start = start_states()

        def loss():
            torch.manual_seed(1)
            reward_fn = lambda states, action: -(states["deter"] - 1).square().mean(-1)
            return behaviour.loss(world, start, reward_fn)[0]["policy"]

        (grad,) = torch.autograd.grad(loss(), shift)
        for i in range(A):
            values = []
            for sign in (1, -1):
                shift.data[i] += sign * 1e-5
                values.append(loss().item())
                shift.data[i] -= sign * 1e-5
            assert abs((values[0] - values[1]) / 2e-5 - grad[i]) < 1e-6
        assert grad.abs().min() > 1e-3
    finally:
        torch.set_default_dtype(torch.float32)


def test_two_prompts_have_two_targets_and_other_counts_work():
    agent = make_agent()
    targets = []
    for embed, count in ((unit(), 3), (unit(), 3), (unit(), 5)):
        agent.set_prompt(embed, count)
        assert agent.target["stoch"].shape == (H + 1, count, S * K)
        assert not agent.target["project"].requires_grad
        assert agent.match(onehots(H + 1, count), torch.zeros(H + 1, count, S, K))[0].shape == (H + 1, count)
        targets.append(agent.target["project"])
    assert not torch.allclose(targets[0], targets[1])


def test_a_prompt_goes_through_the_aligner(monkeypatch):
    agent = make_agent()
    seen = []
    rollout = agent.connector.rollout
    monkeypatch.setattr(agent.connector, "rollout", lambda embed, sample: seen.append((embed, sample)) or rollout(embed, sample))
    embed = unit()
    agent.set_prompt(embed, 2)
    aligned = F.normalize(agent.connector.aligner.raw(embed), dim=-1)
    torch.testing.assert_close(seen[0][0], aligned.expand(H + 2, 2, E))
    assert seen[0][1] is False


def test_data_free_starts(monkeypatch):
    agent = make_agent()
    monkeypatch.setattr(agent.behaviour, "sample", lambda feat: torch.full((len(feat), A), 9.0))
    calls = []
    step = agent.world.rssm.imagine_step
    monkeypatch.setattr(agent.world.rssm, "imagine_step", lambda *args: calls.append(args) or step(*args))
    start = agent.data_free_start(24, 3)
    assert start["deter"].shape == (24, 8) and start["stoch"].shape == (24, S * K)
    assert (start["stoch"].unflatten(-1, (S, K)).sum(-1) == 1).all()
    assert len(calls) == 10
    for first in (calls[0], calls[5]):
        assert not first[0].any()  # no memory before the first step
    torch.testing.assert_close(calls[0][1], calls[5][1])  # both halves begin with the same latents
    assert all((action.abs() <= 1).all() for _, _, action in calls[:5])
    assert all((action == 9).all() for _, _, action in calls[5:])


def test_disagreement_belongs_to_the_state_that_follows():
    agent = make_agent()
    states = dict(deter=torch.randn(5, 3, 8), stoch=onehots(5, 3))
    action = torch.randn(4, 3, A)
    reward = agent.disagreement.dream_reward(states, action)
    assert not reward[0].any()
    torch.testing.assert_close(reward.abs().mean(), torch.tensor(1.0))
    feat = torch.cat([states["deter"], states["stoch"]], -1)
    variance = agent.disagreement.predict(feat[1], action[1]).var(0).mean(-1)
    torch.testing.assert_close(reward[2] / reward[1:].mean(), variance / agent.disagreement.reward(feat[:-1], action).mean())


# ---- updates ----


UPDATES = {
    "train_world_model": {"world", "connector"},
    "train_explorer": {"world", "disagreement", "explorer"},
    "train_behaviour": {"behaviour"},
}


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("discrete", [False, True])
def test_what_an_update_moves(name, discrete):
    agent = make_agent(discrete, weight_decay=0.0, batch_length=8, policy_batch_length=8, connector_updates=2)
    optimizer = m.Optimizers(agent, agent.args)
    agent.set_prompt(unit(), 16)
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    metrics = getattr(m, name)(agent, optimizer, Rows(make_rows()), 2)
    assert all(torch.isfinite(v).all() for v in metrics.values())
    moved = {k.split(".")[0] for k, v in agent.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == UPDATES[name]
    if name == "train_world_model":
        steps = [int(optim.state[optim.params[0]]["step"]) for optim in (optimizer.world, optimizer.connector)]
        assert steps == [1, 2]


def test_weight_decay_ignores_the_learning_rate():
    p = torch.nn.Parameter(torch.tensor([2.0]))
    adam = m.Adam([p], lr=0.0, eps=1e-8, clip=1.0, decay=0.1)
    norm = adam.update((3 * p).sum())
    torch.testing.assert_close(p.data, torch.tensor([1.8]))
    torch.testing.assert_close(norm, torch.tensor(3.0))


@pytest.mark.parametrize("name", UPDATES)
def test_updates_in_bf16_are_close_to_those_in_fp32(name):
    losses = []
    for precision in ("fp32", "bf16"):
        agent = make_agent(precision=precision, batch_length=8, policy_batch_length=8)
        agent.set_prompt(unit(), 16)
        torch.manual_seed(1)
        rows = make_rows()
        metrics = getattr(m, name)(agent, m.Optimizers(agent, agent.args), Rows(rows), 2)
        losses.append(float(metrics["losses/connector" if "world" in name else "losses/value"]))
    assert abs(losses[0] - losses[1]) < 0.05 * abs(losses[0])


@pytest.mark.parametrize("precision, length", [("fp32", 4), ("bf16", 4), ("fp32", 1)])
def test_data_free_update_needs_no_replay(precision, length):
    agent = make_agent(data_free=True, precision=precision, policy_batch_length=length)
    agent.set_prompt(unit(), 8)
    metrics = m.train_behaviour(agent, m.Optimizers(agent, agent.args), None, 2)
    assert torch.isfinite(metrics["losses/policy"])


# ---- replay and episode files ----


def make_replay(folder, lengths, action_dim=1):
    """A stream of episodes of these lengths; the image's first pixel tells episode and row."""
    specs = m.replay_specs({"image": (64, 64, 3)}, action_dim, E)
    replay = m.Replay(specs, sum(lengths), 1, folder, torch.device("cpu"))
    for number, length in enumerate(lengths):
        for t in range(length):
            image = np.zeros((1, 64, 64, 3), np.uint8)
            image[0, 0, 0] = (number, t, 0)
            flags = dict(is_first=[t == 0], is_last=[t == length - 1], is_terminal=[t == length - 1])
            replay.add({
                "image": image, "reward": np.array([t], np.float32), "prev_action": np.full((1, action_dim), t / 100, np.float32),
                "vl_embed": np.zeros((1, E), np.float32), **{k: np.array(v) for k, v in flags.items()}})
    return replay


def test_every_sequence_is_equally_likely_and_within_an_episode(tmp_path):
    replay = make_replay(tmp_path, [5, 9, 3, 12])
    torch.manual_seed(0)
    batch = replay.sample(5_000, 5)
    number = batch["image"][:, :, 0, 0, 0].long()
    start = batch["image"][0, :, 0, 0, 1].long()
    assert (number == number[0]).all()
    assert (batch["image"][:, :, 0, 0, 1].long() == start + torch.arange(5)[:, None]).all()
    counts = torch.zeros(4, 12)
    counts.index_put_((number[0], start), torch.ones(5_000), accumulate=True)
    sequences = [1, 5, 0, 8]
    for episode, possible in enumerate(sequences):
        assert not counts[episode, possible:].any()
        if possible:
            assert (counts[episode, :possible] / 5_000 - 1 / 14).abs().max() < 0.02


def test_a_running_episode_is_replayed(tmp_path):
    replay = make_replay(tmp_path, [5, 9])
    replay.finished.pop()
    replay.begun[0] = 5
    assert replay.episodes() == [(0, 5, 0), (5, 9, 0)]
    assert replay.sample(3, 9)["reward"][:, 0].tolist() == list(range(9))


def test_episode_files_keep_everything(tmp_path):
    """Written with the official keys, types and name; read again they are the same rows."""
    replay = make_replay(tmp_path / "replay", [20])
    replay.label(0, 0, m.embed_clips(FrameVLM(), replay.episode(0, 20, 0)["image"].numpy()))
    rows = replay.episode(0, 20, 0)
    path = m.write_episode(tmp_path / "files", 3, rows, "some-vlm")
    with np.load(path) as file:
        shapes = {name: (file[name].dtype.name, file[name].shape) for name in file if name != "vlm"}
    assert shapes == {
        "observation": ("uint8", (20, 3, 64, 64)), "action": ("float32", (20, 1)), "reward": ("float32", (20, 1)),
        "discount": ("float32", (20, 1)), "is_first": ("bool", (20,)), "is_last": ("bool", (20,)),
        "is_terminal": ("bool", (20,)), "clip_video": ("float32", (20, E))}
    number, date, code, size = path.stem.split("-")
    assert (int(number), len(date), len(code), int(size)) == (3, 15, 32, 20)
    read = m.read_episode(path, SHAPES, 1, "some-vlm", E)
    for name, value in rows.items():
        assert np.allclose(value.numpy(), read[name], rtol=0, atol=1e-6), name
    assert not m.read_episode(path, SHAPES, 1, "another-vlm", E)["vl_embed"].any()


def test_shipped_files_with_eight_unlabelled_rows(tmp_path):
    """The first label of every sequence must be there."""
    rows = make_replay(tmp_path / "replay", [20]).episode(0, 20, 0)
    rows["vl_embed"][8:] = unit(12)
    path = m.write_episode(tmp_path / "files", 0, rows, "vlm")
    read = m.read_episode(path, SHAPES, 1, "vlm", E)
    assert len(read["is_first"]) == 19
    assert read["is_first"][0]
    assert read["vl_embed"][7].any() and not read["vl_embed"][:7].any()


def broken(path, **changes):
    with np.load(path) as file:
        arrays = {**dict(file), **changes}
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "text": lambda path: path.write_text("hello"),
    "no actions": lambda path: broken(path, action=None),
    "no flags": lambda path: broken(path, is_first=None),
    "other actions": lambda path: broken(path, action=np.zeros((20, 5), np.float32)),
    "other images": lambda path: broken(path, observation=np.zeros((20, 3, 32, 32), np.uint8)),
    "float images": lambda path: broken(path, observation=np.zeros((20, 3, 64, 64), np.float32)),
    "nan reward": lambda path: broken(path, reward=np.full((20, 1), np.nan, np.float32)),
    "nan embedding": lambda path: broken(path, clip_video=np.full((20, E), np.nan, np.float32)),
    "one number": lambda path: broken(path, clip_video=np.float32(1)),
    "short": lambda path: broken(path, is_first=np.zeros(3, bool)),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_named_and_left_out(case, tmp_path, capfd):
    rows = make_replay(tmp_path / "replay", [20]).episode(0, 20, 0)
    good = m.write_episode(tmp_path / "files", 0, rows, "vlm")
    bad = m.write_episode(tmp_path / "files", 1, rows, "vlm")
    DAMAGE[case](bad)
    files = m.find_episodes(str(tmp_path / "files"), 10**6, 16, "vlm")
    replay = m.Replay(m.replay_specs(SHAPES, 1, E), 40, 1, tmp_path / "new", torch.device("cpu"))
    m.load_data(replay, files, SHAPES, 1, "vlm", E)
    out = capfd.readouterr().out
    assert replay.finished == [(0, 20, 0)]
    assert f"skipped {bad}" in out and f"skipped {good}" not in out
    assert "1 files skipped" in out or "1 of 2 files skipped" in out


def test_labels_without_a_name_are_taken_and_made_unit_vectors(tmp_path, capfd):
    rows = make_replay(tmp_path / "replay", [20]).episode(0, 20, 0)
    rows["vl_embed"][7:] = 5 * unit(13)
    path = m.write_episode(tmp_path / "files", 0, rows, "vlm")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file if name != "vlm"}
    np.savez(path, **arrays)
    assert m.find_episodes(str(tmp_path / "files"), 100, 16, "random") == [(path, 20, E)]
    assert "1 files do not name the model" in capfd.readouterr().out
    read = m.read_episode(path, SHAPES, 1, "another-vlm", E)["vl_embed"]
    assert np.allclose(np.linalg.norm(read, axis=-1), [0] * 7 + [1] * 13, atol=1e-6)


def test_files_that_an_earlier_life_wrote_are_kept(tmp_path):
    replay = make_replay(tmp_path / "replay", [20, 9, 12])
    folder = tmp_path / "files"
    m.write_episodes(replay, folder, "vlm", [])
    written = sorted(folder.iterdir())
    assert [int(path.stem.split("-")[-1]) for path in written] == [20, 9, 12]
    written[1].unlink()
    m.write_episodes(replay, folder, "vlm", [True])  # a signal has come
    assert sorted(folder.iterdir()) == [written[0], written[2]]
    m.write_episodes(replay, folder, "vlm", [])
    again = sorted(folder.iterdir())
    assert len(again) == 3 and again[0] == written[0] and again[2] == written[2]


def test_episodes_too_short_are_noticed_before_the_collection_ends(tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        tiny.run("genrl", tmp_path, batch_length=16, total_timesteps=100_000)  # episodes of Catch have 8 rows
    assert end.value.code == 2
    assert "no episode has the 16 rows" in capfd.readouterr().err


@pytest.mark.parametrize("flags, named", [
    (dict(imag_horizon=1, align="none"), "--imag-horizon"), (dict(imag_horizon=7), "--imag-horizon"), (dict(layers=0), "--layers"),
    (dict(batch_length=12), "--batch-length"), (dict(data_free=True, policy_batch_size=1, policy_batch_length=3), "--data-free")])
def test_sizes_that_cannot_work(flags, named, capfd):
    with pytest.raises(SystemExit) as end:
        m.check_args(replace(m.Args(device="cpu"), **flags))
    assert end.value.code == 2
    assert named in capfd.readouterr().err


def test_no_dataset(tmp_path, capfd):
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(SystemExit) as end:
            m.find_episodes(str(folder), 10, 16, "random")
        assert end.value.code == 2
        assert str(folder) in capfd.readouterr().err


def test_actions_of_a_run_lead_to_their_images(tmp_path):
    """In an environment whose image tells the action: from collection to files, and from files to a second run."""
    flags = dict(env_id="test_genrl:ScriptedVideo-v0", total_timesteps=40, eval_episodes=0, write_episodes=True, learning_starts=20)
    first = tiny.run("genrl", tmp_path / "a", **flags)
    files = sorted((first / "episodes0").glob("*.npz"))
    assert len(files) == 2
    with np.load(files[0]) as file:
        image, action, reward = file["observation"], file["action"], file["reward"]
        assert file["is_first"].tolist() == [True] + [False] * 19
        assert file["is_terminal"].tolist() == [False] * 19 + [True]
        assert np.allclose(np.linalg.norm(file["clip_video"], axis=-1), [0] * 7 + [1] * 13, atol=1e-5)
    assert image[:, 0, 5, 5].tolist() == list(range(20))
    assert reward[:, 0].tolist() == list(range(20))
    assert not action[0].any()
    code = np.rint(128 + 127 * action[1:, 0].clip(-1, 1))
    assert np.abs(code - image[1:, 1, 5, 5]).max() <= 1
    second = tiny.run("genrl", tmp_path / "b", **{**flags, "data_dir": str(first / "episodes0"), "write_episodes": False})
    assert tiny.checkpoint(second)["step"] == 0
    assert tiny.checkpoint(second)["replay"]["rows"] == 40


# ---- language ----


class FrameVLM:
    """Frame by frame: the mean colour in a fixed basis, not normalised."""

    dim = E

    def embed_frames(self, frames):
        rng = np.random.default_rng(0)
        return (frames.reshape(len(frames), -1)[:, :48] / 255 + 0.1) @ rng.standard_normal((48, E)) * 5

    def embed_text(self, texts):
        return np.ones((len(texts), E))


def test_embedding_of_a_clip_is_the_mean_of_its_frames():
    frames = np.random.default_rng(1).integers(0, 256, (21, 4, 4, 3), np.uint8)
    ours = m.embed_clips(FrameVLM(), frames)
    each = FrameVLM().embed_frames(frames)
    each /= np.linalg.norm(each, axis=-1, keepdims=True)
    assert not ours[:7].any()
    for t in range(7, 21):
        mean = each[t - 7 : t + 1].mean(0)
        assert np.allclose(ours[t], mean / np.linalg.norm(mean), atol=1e-5)
    assert not m.embed_clips(FrameVLM(), frames[:5]).any()
    stack = np.concatenate([frames[::-1], frames], -1)
    assert torch.equal(m.embed_clips(FrameVLM(), stack), ours)  # the last image of a stack


class Video:
    dim = E

    def embed_clips(self, clips):
        assert clips.shape[1:] == (8, 4, 4, 3)
        return np.stack([FrameVLM().embed_frames(clip[-1:])[0] for clip in clips])


def test_models_of_video_get_the_eight_frames_up_to_a_row():
    frames = np.random.default_rng(1).integers(0, 256, (90, 4, 4, 3), np.uint8)
    ours = m.embed_clips(Video(), frames)
    last = torch.as_tensor(FrameVLM().embed_frames(frames)).float()
    torch.testing.assert_close(ours[7:], F.normalize(last, dim=-1)[7:])


def test_prompts_of_every_kind(tmp_path):
    args = m.Args(env_id="envs:Catch-v0")
    vlm = lambda: FrameVLM()
    red = Image.new("RGB", (4, 4), "red")
    blue = Image.new("RGB", (4, 4), "blue")
    red.save(tmp_path / "still.png")
    red.save(tmp_path / "one.gif")
    film = [Image.new("RGB", (4, 4), (20 * i, 0, 255 - 20 * i)) for i in range(12)]  # a GIF joins equal frames
    film[0].save(tmp_path / "film.gif", save_all=True, append_images=film[1:])
    np.save(tmp_path / "film.npy", np.stack([np.array(red)] * 4 + [np.array(blue)] * 4))
    np.save(tmp_path / "embedding.npy", np.full(E, 2.0))
    embeds = {
        name: m.embed_prompt(replace(args, prompt=str(tmp_path / name)), vlm, E)
        for name in ("still.png", "one.gif", "film.gif", "film.npy")}
    colours = F.normalize(torch.as_tensor(FrameVLM().embed_frames(np.stack([np.array(red), np.array(blue)]))).float(), dim=-1)
    mix = lambda share: F.normalize(share * colours[0] + (1 - share) * colours[1], dim=-1)
    torch.testing.assert_close(embeds["still.png"], mix(1.0))
    torch.testing.assert_close(embeds["one.gif"], mix(1.0))
    torch.testing.assert_close(embeds["film.npy"], mix(0.5))
    first = m.embed_clips(FrameVLM(), np.stack([np.array(frame) for frame in film[:8]]))[-1]
    assert embeds["film.gif"] @ first > 0.999
    text = m.embed_prompt(replace(args, prompt="words"), vlm, E)
    given = m.embed_prompt(replace(args, prompt=str(tmp_path / "embedding.npy")), None, E)
    torch.testing.assert_close(text, torch.full((E,), E**-0.5))
    torch.testing.assert_close(given, text)
    assert m.prompt_text(args) == "Catch"
    assert m.prompt_text(m.Args(env_id="shimmy:dm_control/walker-walk-v0")) == "walk fast clean"


def test_few_frames_are_repeated_and_many_are_thinned():
    for count, expected in ((1, [0] * 8), (4, [0, 0, 1, 1, 2, 2, 3, 3]), (100, list(range(8))), (256, list(range(0, 16, 2)))):
        frames = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(3, -1)
        assert m.prompt_clip(frames)[:, 0, 0, 0].tolist() == expected


@pytest.mark.parametrize("name, content, named", [
    ("gone.gif", None, "there is no"), ("text.gif", b"hello", "cannot be read"), ("film.mp4", b"hello", ".gif"),
    ("text.npy", b"hello", "cannot be read"), ("short.npy", np.ones(7), "7 numbers"), ("nan.npy", np.full(64, np.nan), "not finite"),
    ("number.npy", np.ones(()), "uint8 frames"), ("empty.npy", np.zeros((0, 4, 4, 3), np.uint8), "uint8 frames"),
    ("float.npy", np.zeros((9, 4, 4, 3)), "uint8 frames")])
def test_prompts_that_cannot_be_used(name, content, named, tmp_path, capfd):
    """Found before anything is collected."""
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(SystemExit) as end:
        tiny.run("genrl", tmp_path / "runs", prompt=str(path))
    assert end.value.code == 2
    assert named in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


def tiny_clip(folder):
    """A CLIP of random weights, as transformers stores it."""
    transformers = pytest.importorskip("transformers")
    symbols = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
    words = symbols + [s + "</w>" for s in symbols] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=32)
    config = transformers.CLIPConfig(
        text_config=dict(size, vocab_size=len(words), bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1),
        vision_config=dict(size, image_size=32, patch_size=8), projection_dim=32)
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)


def test_a_clip_model_through_sentence_transformers(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_clip(tmp_path)
    vlm = m.load_vlm(str(tmp_path), torch.device("cpu"))
    assert vlm.dim == 32
    texts = torch.as_tensor(vlm.embed_text(["a dog runs", "a paddle hits the ball"]))
    assert texts.shape == (2, 32)
    assert not torch.allclose(*texts)
    frames = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
    clips = m.embed_clips(vlm, frames)
    torch.testing.assert_close(clips[7:].norm(dim=-1), torch.ones(5))
    each = F.normalize(torch.cat([torch.as_tensor(vlm.embed_frames(frame[None])) for frame in frames]), dim=-1)
    torch.testing.assert_close(clips[9], F.normalize(each[2:10].mean(0), dim=-1), rtol=1e-4, atol=1e-5)
    assert m.embed_clips(vlm, frames[..., :1]).shape == (12, 32)  # gray images too
    embed = m.embed_prompt(m.Args(prompt="a dog runs"), lambda: vlm, 32)
    torch.testing.assert_close(embed, F.normalize(texts[0], dim=-1), rtol=1e-4, atol=1e-5)


def test_missing_weights_without_network(monkeypatch, capfd):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as end:
        m.load_vlm("no-such-model-of-anyone", torch.device("cpu"))
    assert end.value.code == 2
    assert "no-such-model-of-anyone" in capfd.readouterr().err


def test_a_model_of_text_alone(tmp_path, monkeypatch, capfd):
    """Found when it is loaded, not after the collection."""
    library = pytest.importorskip("sentence_transformers")

    class TextOnly:
        def __init__(self, name, device):
            pass

        def encode(self, inputs, **options):
            if not isinstance(inputs[0], str):
                raise ValueError("no images")
            return np.ones((len(inputs), 3))

    monkeypatch.setattr(library, "SentenceTransformer", TextOnly)
    with pytest.raises(SystemExit) as end:
        m.load_vlm(str(tmp_path), torch.device("cpu"))
    assert end.value.code == 2
    assert "no images" in capfd.readouterr().err


def test_own_factory(tmp_path, capfd):
    (tmp_path / "mine.py").write_text("class Mine:\n    dim = 5\n")
    assert m.load_vlm(f"{tmp_path}/mine.py:Mine", torch.device("cpu")).dim == 5
    for name, named in (("mine.py:Yours", "Yours"), ("mine.py", "FACTORY"), ("gone.py:Mine", "gone.py")):
        with pytest.raises(SystemExit) as end:
            m.load_vlm(f"{tmp_path}/{name}", torch.device("cpu"))
        assert end.value.code == 2
        assert named in capfd.readouterr().err


def test_a_new_prompt_keeps_the_world_and_begins_a_new_policy(tmp_path, capfd):
    run = tiny.run("genrl", tmp_path / "runs", eval_episodes=0, prompt="one thing", total_timesteps=40)
    before = tiny.checkpoint(run)
    tiny.call("genrl", ["--resume", str(run), "--prompt=another thing", "--policy-updates=5"])
    after = tiny.checkpoint(run)
    assert before["done"]["policy"] == 3 and after["done"]["policy"] == 5
    assert before["done"]["pretrain"] == after["done"]["pretrain"]
    assert after["agent"]["behaviour.updates"] == 5
    changed = {name.split(".")[0] for name, value in before["agent"].items() if not torch.equal(value, after["agent"][name])}
    assert changed == {"behaviour"}
    tiny.call("genrl", ["--resume", str(run), "--policy-updates=6"])
    assert tiny.checkpoint(run)["agent"]["behaviour.updates"] == 6
    film_of(tmp_path / "film.gif", size=48)
    tiny.call("genrl", ["--resume", str(run), f"--prompt={tmp_path}/film.gif"])  # a video in the place of words
    first = tiny.checkpoint(run)
    assert first["prompt"] == f"{tmp_path}/film.gif"
    tiny.call("genrl", ["--resume", str(run)])
    same = tiny.checkpoint(run)
    assert torch.equal(same["embed"], first["embed"]) and same["done"] == first["done"]
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "yellow", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])  # another one of this name
    tiny.call("genrl", ["--resume", str(run)])
    assert not torch.allclose(tiny.checkpoint(run)["embed"], first["embed"], atol=0.1)
    (tmp_path / "film.gif").unlink()
    for flags, named in (["--policy-updates=7"], "film.gif"), (["--vlm=other"], "--vlm"), (["--data-dir=."], "--data-dir"):
        with pytest.raises(SystemExit) as end:
            tiny.call("genrl", ["--resume", str(run), *flags])
        assert end.value.code == 2
        assert named in capfd.readouterr().err


def film_of(path, count=10, size=64):
    """A GIF of a square that moves, and its frames."""
    frames = []
    for i in range(count):
        frame = np.zeros((size, size, 3), np.uint8)
        frame[20:30, 4 * i : 4 * i + 10] = (250, 120, 10)
        frames.append(Image.fromarray(frame))
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return np.stack([np.array(frame) for frame in frames])


def test_dm_control_with_a_video_as_prompt(tmp_path):
    """Walker from pixels, end to end; the last GIF shows prompt, decoded target and policy side by side."""
    if not (find_spec("dm_control") and find_spec("shimmy")):  # importing them would be too early for MUJOCO_GL
        pytest.skip("dm_control is not installed")
    frames = film_of(tmp_path / "prompt.gif")
    run = tiny.run(
        "genrl", tmp_path / "runs", env_id="dm_control/walker-walk-v0", prompt=str(tmp_path / "prompt.gif"),
        total_timesteps=30, learning_starts=20, pretrain_updates=2, policy_updates=1, eval_episodes=0)
    saved = tiny.checkpoint(run)
    assert saved["step"] == 30 and saved["done"] == dict(explore=3, pretrain=2, policy=1)
    assert saved["args"]["action_repeat"] == 2
    with Image.open(max(run.glob("videos/*.gif"), key=lambda path: int(path.stem.split("_")[1]))) as film:
        panels = np.stack([np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)])
    assert panels.shape[1:] == (64, 192, 3)
    assert np.abs(panels[:8, :, :64].astype(int) - frames[:8]).mean() < 3  # a GIF has few colours
    policy = panels[:, :, 128:]
    assert policy.std() > 10 and (policy[0] != policy[-1]).any()


# ---- breakages that these tests see ----


def put(owner, name, broken):
    """Patch that puts `broken(original)` in the place of a function or method."""

    def patch(monkeypatch, module):
        holder = getattr(module, owner) if owner else module
        monkeypatch.setattr(holder, name, broken(getattr(holder, name)))

    return patch


def labels_of_the_first_row(original):
    return lambda embed: embed[::8].repeat_interleave(8, 0)


def kl_the_other_way(original):
    return lambda p, q: original(q, p)


def without_aligner(original):
    return lambda self, embed: embed


def own_samples(original):
    return lambda self, embed, stoch: original(self, embed, stoch.roll(-1, 0))


def posterior_with_memory(original):
    def observe(self, tokens, prev_action, is_first, deter, stoch):
        return original(self, tokens + deter.mean(), prev_action, is_first, deter, stoch)

    return observe


def no_reset(original):
    return lambda self, tokens, action, first, *state: original(self, tokens, action, torch.zeros_like(first), *state)


def last_window_too(original):
    def align(kind, mode, agent, target):
        longer = {k: torch.cat([v, v[-1:]]) for k, v in agent.items()}
        return original(kind, mode, longer, target)[:-1]

    return align


def late_disagreement(original):
    return lambda self, states, action: original(self, states, action).roll(-1, 0)


def earlier_return(original):
    return lambda reward, value, cont, lam: original(reward.roll(-1, 0), value, cont, lam)


def with_patch(test):
    """A test that wants pytest's monkeypatch."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        test(monkeypatch)


MUTATIONS = {
    "label of a clip's first row": (
        put("", "clip_labels", labels_of_the_first_row), test_connector_sees_the_clip_of_its_rows),
    "divergence the other way": (put("", "categorical_kl", kl_the_other_way), test_neg_kl_has_the_agent_first),
    "prompt without aligner": (put("Aligner", "forward", without_aligner), lambda: with_patch(test_a_prompt_goes_through_the_aligner)),
    "connector sees the present": (
        put("Connector", "predict", own_samples), test_connector_is_given_the_posterior_of_the_step_before),
    "posterior with memory": (put("RSSM", "observe", posterior_with_memory), test_posterior_and_decoder_do_not_see_memory),
    "no reset": (
        put("RSSM", "observe", no_reset), lambda: with_patch(test_a_sequence_equals_its_steps_and_is_first_forgets)),
    "one candidate more": (put("", "align_target", last_window_too), test_alignment_finds_where_the_target_begins),
    "disagreement one step early": (
        put("Disagreement", "dream_reward", late_disagreement), test_disagreement_belongs_to_the_state_that_follows),
    "reward one step early": (put("", "lambda_return", earlier_return), test_lambda_return_equals_its_definition),
}
