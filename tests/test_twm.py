"""twm.py by definition: Transformer, masks, losses, dreams, replay, schedule, and which loss trains what."""

import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from conftest import load

m = load("twm")
SHAPES = {"image": (64, 64, 1)}
SMALL = dict(
    precision="fp32", action_repeat=4, latents=3, classes=4, cnn_depth=1, encoder_units=8, memory_length=4, layers=2,
    width=12, heads=2, head_dim=4, ff_units=16, dropout=0.0, head_layers=1, latent_units=16, scalar_units=8,
    ac_layers=1, ac_units=8, batch_size=3, batch_length=5, imag_batch=6, imag_horizon=4, frame_stack=2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_agent(**changes):
    return m.Agent(SHAPES, 3, True, m.Args(**{**SMALL, **changes})).eval()


def make_batch(steps: int = 6, batch: int = 3, channels: int = 2) -> dict:
    """Random arguments of `WorldModel.loss`: `steps` steps with context, ends among them."""
    is_terminal = torch.zeros(steps, batch, dtype=torch.bool)
    is_terminal[2, 0] = True
    is_last = is_terminal.clone()
    is_last[3, 1] = True  # a time limit
    return {
        "obs": torch.rand(steps + 1, batch, 64, 64, channels),
        "action": torch.randint(3, (steps, batch)),
        "reward": torch.randn(steps, batch),
        "is_terminal": is_terminal,
        "is_last": is_last,
    }


def sequence(steps: int, batch: int = 2) -> tuple:
    """z, a, r, is_last (T,B,...) for `Dynamics`, ends inside."""
    index = torch.randint(4, (steps, batch, 3))
    latent = torch.nn.functional.one_hot(index, 4).flatten(2).to(torch.get_default_dtype())
    is_last = torch.rand(steps, batch) < 0.2
    return latent, torch.randint(3, (steps, batch)), torch.randn(steps, batch), is_last


def step_by_step(dynamics, latent, action, reward, is_last) -> torch.Tensor:
    cache = dynamics.empty_cache(latent.shape[1], len(latent))
    hidden = [dynamics.step(cache, 0, latent[0], action[0])]
    begun = torch.zeros(2, latent.shape[1], dtype=torch.long)
    for t in range(1, len(latent)):
        begun = torch.stack([begun[1], torch.where(is_last[t - 1], t, begun[1])])
        hidden.append(dynamics.step(cache, t, latent[t], action[t], reward[t - 1], begun))
    return torch.stack(hidden)


# ---- sizes ----
@pytest.mark.parametrize("actions", [6, 18])
def test_parameter_counts(actions):
    agent = m.Agent(SHAPES, actions, True, m.Args())

    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())

    world = agent.world
    assert count(world.encoder) == 3_126_992
    assert count(world.decoder) == 5_107_540
    assert count(world.dynamics) == 10_777_858 + 256 * actions
    assert count(agent.behaviour.actor) == 1_312_768 + 513 * actions
    assert count(agent.behaviour.critic) == 1_313_281
    if actions == 6:
        assert count(agent) == 21_643_053
        assert count(world.encoder, agent.behaviour.actor) == 4_442_838
    assert world.dynamics.cont[-1].bias.sigmoid().item() == pytest.approx(0.729, abs=1e-3)


# ---- Transformer ----
@torch.no_grad()
def test_cache_is_the_full_sequence(double):
    """Longer than the memory, with ends inside."""
    dynamics = make_agent().world.dynamics
    inputs = sequence(14)
    assert inputs[-1].any()
    assert (dynamics(*inputs) - step_by_step(dynamics, *inputs)).abs().max() < 1e-12


@torch.no_grad()
def test_nothing_is_seen_over_an_end():
    dynamics = make_agent().world.dynamics
    latent, action, reward, is_last = sequence(8)
    is_last[:] = False
    is_last[3] = True
    hidden = dynamics(latent, action, reward, is_last)
    changed = latent.clone()
    changed[3] = 1 - changed[3]
    after = dynamics(changed, action, reward, is_last)
    assert torch.equal(hidden[4:], after[4:])
    assert not torch.equal(hidden[3], after[3])
    changed = reward.clone()
    changed[3] += 1  # the reward of the end itself is seen by nobody
    assert torch.equal(hidden, dynamics(latent, action, changed, is_last))
    changed[4] += 1
    assert not torch.equal(hidden[5], dynamics(latent, action, changed, is_last)[5])


@torch.no_grad()
def test_predictions_are_causal_and_remember():
    dynamics = make_agent(layers=1).world.dynamics
    latent, action, reward, is_last = sequence(9, 1)
    is_last[:] = False
    hidden = dynamics(latent, action, reward, is_last)
    for t in range(9):
        changed = action.clone()
        changed[t] = (changed[t] + 1) % 3
        moved = (dynamics(latent, changed, reward, is_last) - hidden).abs().amax((1, 2)) > 0
        # with one layer, a step sees exactly memory_length + 1 steps back to the same kind of token
        assert moved.tolist() == [t <= k <= t + 5 for k in range(9)]


def test_attention_by_definition():
    """Softmax of ((q + u) k + (q + v) R) / sqrt(D), one pair of tokens after the other."""
    transformer = make_agent().world.dynamics.transformer.double()
    attention = transformer.layers[0].attention
    x = torch.randn(1, 5, 12).double()
    sinusoids = transformer.sinusoids[torch.arange(4, -1, -1)]
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    out = attention(x, sinusoids, transformer.u[:, None], transformer.v[:, None], mask)
    query, key, value = [attention.split(part)[0] for part in attention.qkv(x).chunk(3, -1)]
    heads = []
    for h in range(2):
        rows = []
        for i in range(5):
            scores = []
            for j in range(i + 1):
                distance = attention.position(transformer.sinusoids[i - j])[4 * h : 4 * h + 4]
                score = (query[h, i] + transformer.u[h]) @ key[h, j] + (query[h, i] + transformer.v[h]) @ distance
                scores.append(score / math.sqrt(12))
            rows.append(torch.stack(scores).softmax(0) @ value[h, : i + 1])
        heads.append(torch.stack(rows))
    expected = attention.out(torch.cat(heads, -1))
    assert (out[0] - expected).abs().max() < 1e-10


# ---- losses ----
def gradients(loss, agent) -> dict[str, bool]:
    """Name -> whether the gradient of the loss is not zero."""
    names, parameters = zip(*agent.named_parameters())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {name: grad is not None and bool((grad != 0).any()) for name, grad in zip(names, grads)}


def test_each_loss_trains_its_part():
    agent = make_agent()
    observation, dynamics, _, _ = agent.world.loss(**make_batch())
    reached = gradients(sum(dynamics.values()), agent)
    for name, reaches in reached.items():
        assert reaches == name.startswith("world.dynamics"), name
    reached = gradients(sum(observation.values()), agent)
    for name, reaches in reached.items():
        assert reaches == name.startswith(("world.encoder", "world.decoder")), name


def test_latent_prediction_is_trained():
    """The official code skips this loss; here every parameter of the latent head must move by it, and only by it."""
    agent = make_agent()
    _, dynamics, _, _ = agent.world.loss(**make_batch())
    assert set(dynamics) == {"latent", "reward", "cont"}
    assert dynamics["latent"] > 0
    reached = gradients(dynamics["latent"], agent)
    without = gradients(dynamics["reward"] + dynamics["cont"], agent)
    for name, reaches in reached.items():
        if name.startswith("world.dynamics.latent."):
            assert reaches and not without[name], name


def test_latent_predictor_learns():
    """A latent that follows from the action is predicted: the loss falls far below its start, chance is 3 ln 4."""
    agent = make_agent(model_clip=100.0)
    dynamics = agent.world.dynamics
    adam = m.Adam(dynamics.parameters(), 3e-3, 100.0, 0.0)
    losses = []
    for _ in range(150):
        action = torch.randint(3, (6, 16))
        target = torch.nn.functional.one_hot(action[..., None].expand(-1, -1, 3), 4).float()  # the next z
        latent = torch.cat([target[:1] * 0, target[:-1]]).flatten(2)
        none = torch.zeros_like(action, dtype=torch.bool)
        hidden = dynamics(latent, action, torch.zeros(6, 16), none)
        terms = agent.world.dynamics_losses(dynamics.heads(hidden), 20 * target, torch.zeros(6, 16), none, none)
        losses.append(terms["latent"].item())
        adam.step(sum(terms.values()))
    assert losses[0] > 0.7 * 3 * math.log(4)
    assert losses[-1] < 0.1 * 3 * math.log(4)


def test_what_an_end_masks():
    """The prediction over an end is not trained; its reward and discount are. The context has no loss."""
    agent = make_agent()
    batch = make_batch()
    batch.pop("obs")
    prior = torch.randn(5, 3, 3, 4, requires_grad=True)
    reward = torch.randn(5, 3, requires_grad=True)
    cont = torch.randn(5, 3, requires_grad=True)
    target = torch.randn(5, 3, 3, 4)
    losses = agent.world.dynamics_losses(
        (prior, reward, cont), target, batch["reward"][1:], batch["is_terminal"][1:], batch["is_last"][1:])
    grads = torch.autograd.grad(sum(losses.values()), [prior, reward, cont])
    trained = grads[0].abs().sum((-2, -1)) > 0
    assert torch.equal(trained, ~batch["is_last"][1:])
    assert (grads[1] != 0).all()
    assert (grads[2] != 0).all()
    # mean over what counts: by definition
    weight = ~batch["is_last"][1:]
    terms = -(target.softmax(-1) * prior.log_softmax(-1)).sum((-2, -1))
    assert losses["latent"].item() == pytest.approx(terms[weight].mean().item(), rel=1e-5)


def test_context_has_no_loss_but_a_prediction():
    agent = make_agent()
    batch = make_batch()
    torch.manual_seed(1)
    first = agent.world.loss(**batch)
    batch["reward"] = batch["reward"].clone()
    batch["is_terminal"] = batch["is_terminal"].clone()
    batch["is_terminal"][0] = True  # of the context: only is_last would hide it
    torch.manual_seed(1)
    second = agent.world.loss(**batch)
    assert first[1]["cont"].item() == second[1]["cont"].item()
    batch["action"] = (batch["action"] + 1) % 3
    batch["action"][1:] -= 1
    batch["action"][1:] %= 3
    torch.manual_seed(1)
    third = agent.world.loss(**batch)
    assert first[0]["consistency"].item() != third[0]["consistency"].item()  # h_0 predicts z_1


def test_discount_converges_to_gamma_times_survival():
    logit = torch.zeros(1, requires_grad=True)
    target = m.to_discount(torch.arange(10) < 3, 0.99).float()  # terminal with probability 0.3
    adam = m.Adam([logit], 0.05, 1e9, 0.0)
    for _ in range(400):
        adam.step(torch.nn.functional.binary_cross_entropy_with_logits(logit.expand(10), target))
    assert logit.sigmoid().item() == pytest.approx(0.99 * 0.7, abs=0.003)


def test_straight_through():
    logits = torch.randn(5, 3, 4, requires_grad=True)
    sample = m.sample_latent(logits)
    assert sample.shape == (5, 12)
    assert torch.equal(sample.detach().unflatten(-1, (3, 4)).sum(-1), torch.ones(5, 3))
    weight = torch.randn(5, 12)
    (grad,) = torch.autograd.grad((sample * weight).sum(), logits)
    (expected,) = torch.autograd.grad((logits.softmax(-1).flatten(1) * weight).sum(), logits)
    assert torch.allclose(grad, expected, atol=1e-6)


def test_entropy_hinge():
    for share, expected in ((0.05, 0.05), (0.2, 0.0)):
        x = torch.tensor(share, requires_grad=True)
        loss = m.entropy_hinge(x, 0.1)
        assert loss.item() == pytest.approx(expected)
        (grad,) = torch.autograd.grad(loss, x)
        assert grad.item() == (-1 if expected else 0)


# ---- behaviour ----
def test_advantage_is_the_discounted_sum():
    """With lambda 1 and no ends, A + v is the sum of rewards and what remains at the horizon."""
    reward = torch.randn(6, 2).double()
    value = torch.randn(7, 2).double()
    ret = m.gae(reward, torch.full_like(reward, 0.9), value, 1.0) + value[:-1]
    for t in range(6):
        expected = sum(0.9 ** (k - t) * reward[k] for k in range(t, 6)) + 0.9 ** (6 - t) * value[6]
        assert torch.allclose(ret[t], expected)
    cut = m.gae(reward, torch.zeros_like(reward), value, 0.95)  # an end everywhere: its reward counts
    assert torch.allclose(cut, reward - value[:-1])


def test_actor_and_critic_are_trained_apart():
    agent = make_agent(ent_threshold=2.0)  # above the greatest entropy: the hinge is active
    start, restart = dream_inputs(agent)
    losses, _ = agent.behaviour.losses(agent.behaviour.imagine(agent.world, start, restart))
    for loss, part in (("value", "behaviour.critic"), ("policy", "behaviour.actor")):
        for name, reaches in gradients(losses[loss], agent).items():
            assert reaches == name.startswith(part), (loss, name)


def dream_inputs(agent, count: int = 6) -> tuple[dict, torch.Tensor]:
    latent, action, reward, is_last = sequence(2, count)
    start = {
        "context": latent[0], "latent": latent[1], "action": action[0], "reward": reward[0], "is_last": is_last[0]}
    return start, sequence(1, count)[0][0]


def test_a_dream_is_the_full_sequence(double):
    """h, reward and discount of a dream with ends inside: those of the whole sequence at once."""
    agent = make_agent(end_threshold=0.5, imag_horizon=7)
    start, restart = dream_inputs(agent)
    start["is_last"][:3] = True
    dream = agent.behaviour.imagine(agent.world, start, restart)
    assert dream["end"].any() and not dream["end"].all()
    latent = torch.cat([start["context"][None], dream["latent"][:-1]])
    action = torch.cat([start["action"][None], dream["action"]])
    reward = torch.cat([start["reward"][None], dream["reward"]])
    is_last = torch.cat([start["is_last"][None], dream["end"]])
    with torch.no_grad():
        hidden = agent.world.dynamics(latent, action, reward, is_last)[1:]
    assert (hidden - dream["hidden"]).abs().max() < 1e-12
    _, mean, cont = agent.world.dynamics.heads(hidden)
    assert torch.allclose(mean, dream["reward"])
    assert torch.allclose(cont.sigmoid(), dream["cont"])


def test_weights_and_restarts():
    agent = make_agent(end_threshold=0.5, imag_horizon=9)
    start, restart = dream_inputs(agent)
    dream = agent.behaviour.imagine(agent.world, start, restart)
    weight = torch.ones(6)
    for t in range(9):
        assert torch.allclose(dream["weight"][t], weight)
        weight = weight * dream["cont"][t]
        assert torch.equal(dream["end"][t], weight < 0.5)
        weight = torch.where(dream["end"][t], 1.0, weight)
        for i in torch.nonzero(dream["end"][t])[:, 0]:
            assert any(torch.equal(dream["latent"][t + 1, i], other) for other in restart)


def test_dream_without_ends():
    agent = make_agent(end_threshold=0.0, imag_horizon=9)
    start, restart = dream_inputs(agent)
    dream = agent.behaviour.imagine(agent.world, start, restart)
    assert not dream["end"].any()


def test_dream_starts():
    """Pairs of steps: the first is context, with its own action, reward and end."""
    latent = torch.arange(6.0)[:, None, None] * 10 + torch.arange(3.0)[:, None]
    step = (torch.arange(6)[:, None] * 10 + torch.arange(3)).float()
    rows = dict(action=step, reward=step, is_last=step)
    start = m.dream_starts(latent, rows)
    assert len(start["reward"]) == 15
    assert torch.equal(start["context"][:, 0], start["action"])
    assert torch.equal(start["latent"][:, 0], start["action"] + 10)
    assert torch.equal(start["reward"], start["action"])
    assert start["latent"].max() == 52


# ---- acting ----
def make_row(image: int, first: bool = False, last: bool = False, **more) -> dict:
    row = {
        "image": np.full((1, 64, 64, 1), image, np.uint8), "reward": np.zeros(1, np.float32),
        "is_first": np.array([first]), "is_last": np.array([last]), "is_terminal": np.array([last])}
    return {**row, **{k: np.array([v]) for k, v in more.items()}}


def test_acting_needs_no_transformer(monkeypatch):
    agent = make_agent(frame_stack=3)
    monkeypatch.setattr(m.Transformer, "forward", None)
    state = agent.initial(1)
    seen = []
    rows = [make_row(1, first=True), make_row(2), make_row(3), make_row(4), make_row(5, last=True), make_row(6)]
    for row in rows:
        state = agent.act(row, state)
        seen.append(state["stack"][0, 0, 0].tolist())
        assert state["action"].sum() == 1
    assert seen == [[1, 1, 1], [1, 1, 2], [1, 2, 3], [2, 3, 4], [5, 5, 5], [5, 5, 6]]


def test_acting_takes_the_mode_of_the_latent(monkeypatch):
    agent = make_agent()
    seen = []
    monkeypatch.setattr(agent.behaviour.actor, "forward", lambda z: seen.append(z) or torch.zeros(1, 3))
    state = agent.act(make_row(100, first=True), agent.initial(1))
    logits = agent.world.encoder(state["stack"] / 255)
    assert torch.equal(seen[0].unflatten(-1, (3, 4)).argmax(-1), logits.argmax(-1))


def test_fire_is_obeyed():
    agent = make_agent()
    for act in (agent.act, agent.act_randomly):
        actions = [act(make_row(0, fire=True), agent.initial(1))["action"].argmax().item() for _ in range(20)]
        assert set(actions) == {1}
        actions = [act(make_row(0, fire=False), agent.initial(1))["action"].argmax().item() for _ in range(60)]
        assert set(actions) == {0, 1, 2}


def test_lives():
    """A lost life ends an episode for replay, not the game; FIRE is asked for once; evaluation sees whole games."""
    args = replace(m.Args(), env_id="ALE/Breakout-v5", action_repeat=4)
    for key, ends in (((0, 0, 0), True), ((1,), False)):
        envs = m.make_envs(args, 1, *key)
        row = envs.reset()
        assert row["image"].shape == (1, 64, 64, 1)
        losses = 0
        for _ in range(300):
            action = np.eye(4)[[1 if row["fire"][0] else 0]]
            lives = envs.lives.copy()
            row = envs.step(action)
            if envs.last[0]:
                break
            if (envs.lives < lives)[0] and not row["is_first"][0]:
                losses += 1
                assert row["fire"][0]
                assert row["is_last"][0] == row["is_terminal"][0] == ends
            else:
                assert not row["fire"][0] and not row["is_last"][0]
        assert losses >= 2


# ---- replay ----
def make_replay(folder, rows: list[dict], num_envs: int = 1, capacity: int = 4_000, frames: int = 1, **options):
    """Rows are dicts of flags and one number per environment, which image, reward and action repeat."""
    specs = m.replay_specs({"image": (1, 1, 1)}, 250)
    replay = m.Replay(
        specs, capacity, num_envs, folder, torch.device("cpu"), frames=frames,
        **{"temperature": 20.0, **options})
    for row in rows:
        replay.add(row)
    return replay


def numbered(number, first=False, last=False, terminal=False, num_envs: int = 1) -> dict:
    number = np.broadcast_to(number, num_envs).copy()
    flags = {"is_first": first, "is_last": last, "is_terminal": terminal}
    row = {name: np.broadcast_to(flag, num_envs).copy() for name, flag in flags.items()}
    row["image"] = number.astype(np.uint8).reshape(num_envs, 1, 1, 1)
    row["reward"] = number.astype(np.float32)
    row["action"] = torch.nn.functional.one_hot(torch.as_tensor(number).long() % 250, 250).float()
    return row


def episodes() -> list[dict]:
    """0 to 3 end by death at 3; 4 to 9, with a lost life at 6 and a time limit at 9; 10 to 13 go on."""
    return [
        numbered(0, first=True), numbered(1), numbered(2), numbered(3, last=True, terminal=True),
        numbered(4, first=True), numbered(5), numbered(6, last=True, terminal=True), numbered(7), numbered(8),
        numbered(9, last=True), numbered(10, first=True), numbered(11), numbered(12), numbered(13)]


def test_line_and_outcomes(tmp_path):
    """The last observation of a game is no step; flags and reward are what the action led to."""
    replay = make_replay(tmp_path, episodes())
    assert replay.line[0, : replay.count[0]].tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12, 13]
    start = torch.tensor([1])
    step, batch = replay.sequences(torch.zeros(1, dtype=torch.long), start, 10)
    images = replay.stacks(torch.zeros_like(step), step)[:, 0, 0, 0, 0].tolist()
    assert images == [0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12, 13]
    assert batch["action"][:, 0].tolist() == images[:-1]
    assert batch["reward"][:, 0].tolist() == [1, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13]
    assert batch["is_last"][:, 0].nonzero()[:, 0].tolist() == [2, 4, 7]
    assert batch["is_terminal"][:, 0].nonzero()[:, 0].tolist() == [2, 4]


def test_stacks_repeat_the_first_frame(tmp_path):
    replay = make_replay(tmp_path, episodes(), frames=3)
    step = torch.arange(replay.count[0])
    stacks = replay.stacks(torch.zeros_like(step), step)[:, 0, 0].tolist()
    assert stacks[:5] == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [4, 4, 4], [4, 4, 5]]
    assert stacks[5:8] == [[6, 6, 6], [6, 6, 7], [6, 7, 8]]  # also after a lost life
    assert stacks[-1] == [11, 12, 13]


def test_stacks_are_what_the_policy_saw(tmp_path):
    agent = m.Agent({"image": (1, 1, 1)}, 3, True, m.Args(**{**SMALL, "frame_stack": 4}))
    replay = make_replay(tmp_path, episodes(), frames=4)
    state = agent.initial(1)
    seen = {}
    for row in episodes():
        state = agent.act_randomly(row, state)
        seen[row["image"].item()] = state["stack"][0, 0, 0].tolist()
    for position in range(replay.count[0]):
        stack = replay.stacks(torch.tensor(0), torch.tensor(position))[0, 0].tolist()
        assert stack == seen[stack[-1]]


def test_context_before_the_beginning(tmp_path):
    replay = make_replay(tmp_path, episodes())
    step, batch = replay.sequences(torch.tensor([0]), torch.tensor([0]), 2)
    assert step[:, 0].tolist() == [0, 0, 1, 2]
    assert batch["action"][:, 0].tolist() == [0, 0, 1]
    assert batch["reward"][:, 0].tolist() == [0, 1, 2]
    assert not batch["is_last"].any()  # the context is seen


def test_sampler_draws_in_proportion(tmp_path):
    """Chi-square of 20,000 first draws against softmax(-v / tau); the newest start is the last admissible."""
    replay = make_replay(tmp_path, [numbered(i % 250, first=i == 0) for i in range(21)])
    visits = torch.tensor([0, 0, 1, 2, 5, 10, 20, 40, 60, 100, 130, 131, 125, 90, 50, 25, 12])
    counts = torch.zeros(17)
    for _ in range(20_000):
        replay.visits[0, :17] = visits
        replay.sample(1, 4)
        counts += replay.visits[0, :17] - visits
    assert replay.visits[0, 17:].sum() == 0
    expected = 20_000 * torch.softmax(-visits / 20.0, 0)
    statistic = ((counts - expected).square() / expected).sum().item()
    assert statistic < 39.3  # 16 degrees of freedom, p = 0.001


def test_sampler_without_replacement_counts_starts_only(tmp_path):
    replay = make_replay(tmp_path, [numbered(i % 250, first=i == 0) for i in range(21)], temperature=math.inf)
    for draw in range(1, 30):
        batch = replay.sample(17, 4)
        assert replay.visits[0, :17].tolist() == [draw] * 17
        assert sorted(batch["action"][1].tolist()) == list(range(17))
    assert batch["image"].shape == (6, 17, 1, 1, 1)
    assert batch["reward"].shape == (5, 17)


def test_several_environments(tmp_path):
    """Each has its line; a sequence never changes the environment."""
    rows = []
    for i in range(30):
        first = np.array([i == 0, i in (0, 11)])
        last = np.array([False, i == 10])
        rows.append(numbered(np.array([i, 100 + i]), first, last, last, num_envs=2))
    replay = make_replay(tmp_path, rows, num_envs=2)
    assert replay.count == [30, 29]
    for _ in range(20):
        batch = replay.sample(8, 4)
        images = batch["image"][..., 0, 0, 0].long()
        assert torch.equal(batch["action"][1:], images[1:-1])
        assert ((images < 50).all(0) | (images >= 100).all(0)).all()
        assert not (images == 110).any()
    assert replay.visits.sum(1).min() > 0


def test_visits_and_line_survive_a_checkpoint(tmp_path):
    replay = make_replay(tmp_path, episodes())
    for _ in range(5):
        replay.sample(3, 2)
    state = replay.state_dict()
    again = m.Replay(
        m.replay_specs({"image": (1, 1, 1)}, 250), 4_000, 1, tmp_path, torch.device("cpu"), new=False, frames=1,
        temperature=20.0)
    again.load_state_dict(state, lost=0)
    assert again.count == replay.count
    assert torch.equal(again.line[:, :12], replay.line[:, :12])
    assert torch.equal(again.visits, replay.visits)
    # another life begins another game: the step that was not finished is dropped, what precedes it is an end
    again.add(numbered(50, first=True))
    again.add(numbered(51))
    again.add(numbered(52))
    _, batch = again.sequences(torch.tensor([0]), torch.tensor([9]), 3)
    assert batch["action"][1:, 0].tolist() == [11, 12, 50]
    assert batch["is_last"][1:, 0].tolist() == [False, True, False]
    assert not batch["is_terminal"][1:].any()


def test_epochs_of_the_pretraining(tmp_path):
    replay = make_replay(tmp_path, [numbered(i % 250, first=i == 0) for i in range(51)])
    images = [replay.next_images(16) for _ in range(4)]
    assert [len(part) for part in images] == [16, 16, 16, 2]
    assert sorted(torch.cat(images).flatten().tolist()) == list(range(50))

    replay.logits = torch.arange(51.0)[None, :, None, None].expand(1, 51, 3, 4)
    phases = set()
    for _ in range(40):
        seen = []
        while replay.queue is not None or not seen:
            batch, logits = replay.next_sequences(4, 8)
            seen += batch["action"][1].tolist()
            expected = torch.cat([batch["action"], batch["action"][-1:] + 1]).float()
            assert torch.equal(logits[..., 0, 0][1:], expected[1:])
        phases.add(min(seen))
        assert sorted(seen) == list(range(min(seen), 43, 8))
    assert phases == set(range(8))
    assert replay.visits.sum() == 0


# ---- schedule and updates ----
def test_default_schedule():
    """124,999 joint updates in 95,000 steps, 1.316 per step, the first three steps one each."""
    args = m.Args()
    credit = 0.0
    counts = []
    for _ in range(args.total_timesteps - args.learning_starts):
        count, credit = m.updates_due(credit + 1, args.train_every)
        counts.append(count)
    assert sum(counts) == 124_999
    assert counts[:7] == [1, 1, 1, 2, 1, 1, 2]


def numbered_images(folder, rows: int):
    """A replay of images of the size that the networks need, in one game."""
    specs = m.replay_specs({"image": (64, 64, 1)}, 250)
    replay = m.Replay(specs, 64, 1, folder, torch.device("cpu"), frames=2, temperature=20.0)
    for i in range(rows):
        replay.add(dict(numbered(i, first=i == 0), image=np.full((1, 64, 64, 1), i, np.uint8)))
    return replay


def test_a_video_is_told_the_context_only(tmp_path, monkeypatch):
    """Two steps with image and reward, then the model's own latents and rewards; no dropout after an evaluation."""
    agent = m.Agent({"image": (64, 64, 1)}, 250, True, m.Args(**{**SMALL, "dropout": 0.5})).train()
    replay = numbered_images(tmp_path, 6)  # of five steps one sequence
    dynamics = agent.world.dynamics
    step = dynamics.step
    heads = dynamics.heads
    told = []
    predicted = []

    def watch_step(cache, t, latent, action, reward, begun):
        told.append((latent, reward))
        return step(cache, t, latent, action, reward, begun)

    def watch_heads(hidden):
        logits, reward, cont = heads(hidden)
        predicted.append((m.mode_latent(logits), reward))
        return logits, reward, cont

    monkeypatch.setattr(dynamics, "step", watch_step)
    monkeypatch.setattr(dynamics, "heads", watch_heads)
    video, _ = m.dream_video(agent, replay, count=1)
    assert video.shape == (5, 3 * 64, 64, 1)
    assert told[1][1].item() == pytest.approx(math.tanh(1))  # the reward of the first action
    for t in (2, 3, 4):
        assert torch.equal(told[t][0], predicted[t - 1][0])
        assert torch.equal(told[t][1], predicted[t - 1][1])
    again, _ = m.dream_video(agent.train(), replay, count=1)
    assert torch.equal(video, again)


def test_ranks_pretrain_together(tmp_path, monkeypatch):
    """`seen` is of all ranks, whose epochs are not equally long: with another one that has seen as much, half the
    updates are due."""
    updates = []
    for others in (1, 2):
        args = m.Args(**SMALL, pretrain_observation=240, pretrain_dynamics=120, pretrain_behaviour=120)
        agent = m.Agent({"image": (64, 64, 1)}, 250, True, args).eval()
        replay = numbered_images(tmp_path / str(others), 40)
        monkeypatch.setattr(m, "sum_ranks", lambda counts, device: [others * count for count in counts])
        seen = dict.fromkeys(m.PHASES, 0)
        phases = []
        m.pretrain(agent, m.Optimizers(agent, args), replay, seen, 3, lambda phase, metrics: phases.append(phase))
        assert all(seen[phase] >= getattr(args, f"pretrain_{phase}") for phase in m.PHASES)
        updates.append(len(phases))
    assert 0.4 < updates[1] / updates[0] < 0.65


def test_pretraining_stops_and_goes_on(tmp_path, monkeypatch):
    args = m.Args(**SMALL, pretrain_observation=100, pretrain_dynamics=60, pretrain_behaviour=40)
    agent = m.Agent({"image": (64, 64, 1)}, 250, True, args).eval()
    replay = numbered_images(tmp_path, 40)
    optimizer = m.Optimizers(agent, args)
    seen = dict.fromkeys(m.PHASES, 0)
    before = {name: p.clone() for name, p in agent.named_parameters()}
    phases = []

    def report(phase, metrics):
        phases.append(phase)
        return len(phases) in (2, 9)

    runs = 0
    while not m.pretrain(agent, optimizer, replay, seen, 3, report):
        runs += 1
    assert runs == 2
    assert all(seen[phase] >= getattr(args, f"pretrain_{phase}") for phase in m.PHASES)
    assert phases == sorted(phases, key=list(m.PHASES).index)
    assert replay.visits.sum() == 0
    moved = {name for name, p in agent.named_parameters() if not torch.equal(p, before[name])}
    for part in ("world.encoder", "world.decoder", "world.dynamics", "behaviour.actor", "behaviour.critic"):
        assert any(name.startswith(part) for name in moved), part


def test_resume_in_each_phase(tmp_path, monkeypatch):
    """A signal in each phase of the pre-training, then one while everything trains: each life goes on where the last
    one stopped, with the visits."""
    import tiny

    phases = dict(m.PHASES)
    lives = [*m.PHASES, "joint"]
    calls = []

    def kill_in(life: str, name: str, function):
        def call(*args):
            calls.append(name)
            if name == life:
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*args)
        return call

    train_step = m.train_step
    for life in lives:
        for name, function in phases.items():
            monkeypatch.setitem(m.PHASES, name, kill_in(life, name, function))
        monkeypatch.setattr(m, "train_step", kill_in(life, "joint", train_step))
        calls.clear()
        flags = tiny.flags("twm", tmp_path, resume="auto", total_timesteps=30)
        tiny.call("twm", flags)
        (run,) = tmp_path.iterdir()
        saved = tiny.checkpoint(run)
        # what an earlier life has done is not done again
        assert all(lives.index(name) >= lives.index(life) - 1 for name in calls)
        assert saved["pretrained"] == (life == "joint")
        assert saved["step"] == (7 if life != "joint" else saved["step"])
        visits = saved["replay"]["visits"].sum().item()
        assert visits == 2 * saved["updates"]
    assert 0 < saved["step"] < 30
    monkeypatch.setattr(m, "train_step", train_step)
    tiny.call("twm", tiny.flags("twm", tmp_path, resume="auto", total_timesteps=30))
    last = tiny.checkpoint(run)
    assert last["step"] == 30
    assert last["replay"]["visits"].sum().item() == 2 * last["updates"] > visits


def test_a_signal_to_another_rank_stops_the_pretraining(tmp_path, monkeypatch):
    """This one saves and ends too, although it got none."""
    import tiny

    original = m.sum_ranks
    monkeypatch.setattr(
        m, "sum_ranks", lambda counts, device: [1] if counts == [0] and len(counts) == 1 else original(counts, device))
    saved = tiny.checkpoint(tiny.run("twm", tmp_path))
    assert saved["step"] == 7 and not saved["pretrained"]
    assert saved["seen"]["observation"] > 0 and saved["seen"]["dynamics"] == 0


def test_curves_of_the_pretraining_survive_a_resume(tmp_path, monkeypatch):
    """They count images, far beyond the policy step from which on a resume purges what a killed life wrote."""
    import tiny

    monkeypatch.setitem(m.PHASES, "observation", lambda *args: ({"losses/recon": torch.ones(())}, 6))
    run = tiny.run("twm", tmp_path, pretrain_observation=3_000, eval_episodes=0)
    for _ in range(2):
        scalars, _ = tiny.events(run / "pretraining")
        assert len(scalars["observation/losses/recon"]) == 1
        tiny.call("twm", ["--resume", str(run), "--total-timesteps=30"])


@pytest.mark.parametrize("field, value", [
    ("layers", 0), ("latents", 0), ("classes", 1), ("heads", 0), ("cnn_depth", 0), ("dropout", 1.0), ("width", 7)])
def test_sizes_that_cannot_work(field, value, capfd):
    with pytest.raises(SystemExit) as end:
        m.check_args(replace(m.Args(), **{field: value}))
    assert end.value.code == 2
    assert f"--{field.replace('_', '-')}" in capfd.readouterr().err


def test_the_first_evaluation_is_of_the_pretrained_policy(tmp_path, monkeypatch):
    """As soon as it is there, then every `eval_every` steps (official)."""
    calls = []
    pretrain = m.pretrain
    monkeypatch.setattr(m, "pretrain", lambda *args: calls.append("pretrain") or pretrain(*args))
    monkeypatch.setattr(m, "evaluate", lambda *args: calls.append("evaluate") or {})
    tiny.run("twm", tmp_path, eval_every=5, eval_episodes=1, total_timesteps=24)
    assert calls[0] == "pretrain" and calls[1:] == ["evaluate"] * len(calls[1:])
    assert len(calls) >= 5


# ---- breakages that the tests must see ----
def replaced(owner: str, name: str, function):
    """Patch attribute `name` of class or module by function(original)."""
    def patch(monkeypatch, module):
        target = getattr(module, owner) if owner else module
        monkeypatch.setattr(target, name, function(getattr(target, name)))
    return patch


def without_latent_loss(original):
    def broken(self, *args):
        losses = original(self, *args)
        return {"latent": 0.0 * losses["latent"], "reward": losses["reward"], "cont": losses["cont"]}
    return broken


def with_hard_labels(original):
    return lambda is_terminal, gamma: (~is_terminal).float()


def seeing_over_ends(original):
    return lambda begin, memory, step=0: original(0 * begin, memory, step)


def training_the_encoder(original):
    return lambda self, post, prior: self.args.consistency_coef * m.cross_entropy(post.softmax(-1), prior).mean()


def ignoring_ends_in_returns(original):
    return lambda reward, cont, value, lam: original(reward, 0.9 + 0 * cont, value, lam)


MUTATIONS = {
    "no latent loss": (replaced("WorldModel", "dynamics_losses", without_latent_loss), test_latent_prediction_is_trained),
    "hard discount labels": (
        replaced("", "to_discount", with_hard_labels), test_discount_converges_to_gamma_times_survival),
    "attention over ends": (replaced("", "first_visible", seeing_over_ends), test_nothing_is_seen_over_an_end),
    "consistency trains the dynamics": (
        replaced("WorldModel", "consistency_loss", training_the_encoder), test_each_loss_trains_its_part),
    "returns over ends": (replaced("", "gae", ignoring_ends_in_returns), test_advantage_is_the_discounted_sum),
    "no shift of positions": (
        replaced("", "relative_shift", lambda original: lambda x: x), test_attention_by_definition),
}
