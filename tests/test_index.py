"""The docstring's index diagram, by environments whose observations tell their step and the action that led there."""
import itertools
from unittest import mock

import gymnasium
import numpy as np
import pytest
import tiny
import torch
from conftest import SCRIPTS, load
from envs import Scripted

ENDS = {6: "terminate", 9: "truncate", 7: "terminate"}  # episode length -> how it ends
lengths = itertools.cycle(ENDS)
for kind in ({}, dict(continuous=True), dict(image=True), dict(image=True, continuous=True)):
    text = "".join(word.title() for word in kind)
    gymnasium.register(f"{text}Staggered-v0", lambda kind=kind: Scripted((n := next(lengths)), ENDS[n], **kind))
    gymnasium.register(f"{text}Once-v0", lambda kind=kind: Scripted(9, "truncate", **kind))

CASES = {
    "dreamer_v2": [("tiny:ScriptedImage-v0", 1), ("ImageOnce-v0", 1), ("ImageStaggered-v0", 3),
                   ("ImageContinuousStaggered-v0", 3)],
    "dreamer_v3": [("envs:Scripted-v0", 1), ("Once-v0", 1), ("Staggered-v0", 3), ("ContinuousStaggered-v0", 3),
                   ("ImageStaggered-v0", 3)],
}
MUTATED = {name: (name, *cases[2]) for name, cases in CASES.items()}  # the case that shows the most


def play(folder, name, env_id, num_envs):
    """A run of 200 policy steps, with a few updates -> module, environment id, checkpoint, what opens its replay, and
    the rows in that."""
    flags = dict(train_every=10) if tiny.has(name, "train_every") else dict(train_ratio=2)
    folder = tiny.run(name, folder, env_id=env_id, num_envs=num_envs, total_timesteps=200, eval_episodes=0,
                      video_every=0, learning_starts=180, log_every=1000, **flags)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    m, args = load(name), load(name).Args(**saved["args"])
    envs = m.make_envs(args, 1, 0)
    specs = m.replay_specs(envs.shapes, m.Agent(envs.shapes, envs.action_dim, envs.discrete, args), args)
    place = specs, saved["capacity"], num_envs, torch.device("cpu"), folder / "replay0"
    count, size = saved["replay"]["rows"], min(saved["replay"]["rows"], saved["capacity"])
    # resetting rows are not steps, so that a ring may have wrapped around: put the rows into their order
    order = np.arange(count - size, count) % saved["capacity"]
    rows = {k: v[order].numpy() for k, v in m.Storage(*place, new=False).data.items()}
    assert (rows.pop("number").T == np.arange(count - size, count)).all()
    return m, env_id, saved, place, rows


@pytest.fixture(scope="module", ids=lambda case: "-".join(map(str, case)), params=[
    (path.stem, *case) for path in SCRIPTS for case in CASES.get(path.stem, [])])
def played(request, tmp_path_factory):
    return play(tmp_path_factory.mktemp("run"), *request.param)


def observed(rows):
    """(step, code) of the rows' observations, vectors or images; an image shows the same everywhere."""
    obs = rows["vector"] if "vector" in rows else rows["image"][..., 0, 0, :]
    return obs[..., 0], obs[..., 1]


def code(action, env_id):
    """What the environment writes into the next observation. (...,A) -> (...); an image has whole numbers only."""
    if "Continuous" not in env_id:
        return action.argmax(-1) + 1
    value = 128 + 127 * action[..., 0].clip(-1, 1)
    return value.round() if "Image" in env_id else value


def test_rows_in_replay(played):
    """What a row holds arrived together. Its action is the one that led there, or else the one that was chosen on it;
    the first row of an episode has none, or else the last one."""
    m, env_id, saved, _, rows = played
    step, seen = observed(rows)
    first, last, action = rows["is_first"], rows["is_last"], rows["action"]
    assert np.array_equal(first[1:], last[:-1]), "the row after an end begins"
    assert (step[first] == 0).all() and (seen[first] == 0).all() and (rows["reward"][first] == 0).all()
    assert np.array_equal(step[1:][~first[1:]], step[:-1][~first[1:]] + 1)
    assert np.array_equal(rows["reward"], step), "the environment's reward is its step number"
    arrival = saved["algorithm"] in tiny.ARRIVAL
    cause, none = (action[1:], first) if arrival else (action[:-1], last)
    assert np.allclose(seen[1:], np.where(first[1:], 0, code(cause, env_id)))
    assert not action[none].any(), "no action crosses the border of episodes"
    if "Continuous" not in env_id:
        assert (np.sort(action[~none], -1) == [0, 0, 1]).all() and action.any((0, 1)).all(), "one-hot, and each occurs"
    for env in range(first.shape[1]):
        length = set(step[last[:, env], env])
        assert len(length) == 1 and step[:, env].max() == min(length), "an episode goes on after its end"
        truncates = "Once" in env_id or ("Staggered" in env_id and ENDS[int(*length)] == "truncate")
        assert np.array_equal(rows["is_terminal"][:, env], last[:, env] & (not truncates)), "truncation is no death"


def test_steps_are_decisions(played):
    """The step counter, hence the budget, counts environment steps and not the rows that only reset."""
    _, _, saved, _, rows = played
    count, period = saved["replay"]["rows"], np.where(rows["is_last"], observed(rows)[0], 0).max(0).astype(int) + 1
    decisions = [sum(n - -(-n // period)) for n in (count - 1, count)]  # without an environment's rows 0, period, ...
    assert decisions[0] < 200 <= decisions[1] == saved["step"]


def test_training_sequences(played):
    """What the world model gets: the action at step t is the one that led to observation t."""
    m, env_id, saved, place, _ = played
    arrival = saved["algorithm"] in tiny.ARRIVAL
    torch.manual_seed(0)
    if arrival:
        replay = m.EpisodeReplay(*place, new=False, length=6, prioritize_ends=True)
        replay.load_state_dict(saved["replay"])
        obs = replay.sample(200)
        action = obs["action"]
        assert obs["reward"].shape == (6, 200)
        assert torch.equal(obs["is_first"][0], torch.ones(200).bool()) and not obs["is_first"][1:].any()
    else:
        replay = m.SequenceReplay(*place, new=False)
        replay.load_state_dict(saved["replay"])
        batch, index = replay.sample(200, 9)
        obs, carry = m.split_context(batch)
        action = carry["prev_action"]
        assert action.shape[:2] == obs["reward"].shape == (8, 200)
        assert torch.equal(obs["is_first"], observed(obs)[0] == 0)
        assert torch.equal(obs["is_terminal"], batch["is_terminal"][1:])
        for key in ("deter", "stoch"):
            assert torch.equal(carry[key], replay.data[key].flatten(0, 1)[index[0]]), "row 0 lends its latents"
    step, seen = (x.float() for x in observed(obs))
    inside = step > 0  # a row 0 in the middle of an episode has an action; its memory begins with zeros all the same
    assert not inside.all() and (inside[0] if arrival else inside).any() and obs["is_last"].any()
    assert torch.allclose(seen[inside], code(action, env_id)[inside].float())
    assert torch.equal(obs["reward"], step)
    follows = ~obs["is_first"][1:]
    assert torch.equal(step[1:][follows], step[:-1][follows] + 1)
    if arrival:
        assert not action[~inside].any() and torch.equal(obs["is_last"][:-1], torch.zeros(5, 200).bool())


@pytest.mark.parametrize("name", [name for name in CASES if name in tiny.ARRIVAL])
@pytest.mark.parametrize("discrete", [True, False])
def test_acting_is_observing(name, discrete):
    """Latents and actions that the policy made step by step, across episode ends, are those of one scan of the rows."""
    m, envs, steps = load(name), 2, 12
    torch.manual_seed(0)
    rng, device = np.random.default_rng(0), torch.device("cpu")
    agent = tiny.agent(m, discrete)
    state, rows, policy_noise = agent.initial(envs, device), [], []
    rssm, post_noise = agent.world.rssm, torch.empty(steps, envs, agent.world.rssm.stoch, agent.world.rssm.classes)
    for t in range(steps):
        row = dict(image=rng.integers(0, 256, (envs, *tiny.IMAGE["image"]), np.uint8),
                   is_first=np.array([t in (0, 5), t in (0, 8)]))
        torch.manual_seed(t)
        before, state = state, agent.act(row, state)
        torch.manual_seed(t)  # the same draws again: posterior first, then the action
        post_noise[t].exponential_()
        policy_noise.append(agent.behaviour.noise(envs))
        rows.append({**{k: torch.as_tensor(v) for k, v in row.items()}, **state, "previous": before["action"]})
    rows = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
    with torch.no_grad(), mock.patch.object(rssm, "noise", lambda *_: post_noise):
        deter, stoch, _ = rssm.observe(
            agent.world.encoder(rows["image"]), rows["previous"], rows["is_first"],
            *(torch.full_like(rows[k][0], 9.0) for k in ("deter", "stoch")))  # is_first must clear them
        feat = torch.cat([deter, stoch], -1)
        action, policy = agent.behaviour.sample(feat, torch.stack(policy_noise)), agent.behaviour.policy(feat)
    torch.testing.assert_close(deter, rows["deter"], rtol=1e-4, atol=1e-5)
    assert torch.equal(stoch, rows["stoch"])
    torch.testing.assert_close(action, rows["action"], rtol=1e-4, atol=1e-5)
    assert len(rows["action"].unique(dim=0)) > 3  # the actions differ, so the comparison says something

    mode = torch.eye(3)[policy.argmax(-1)] if discrete else policy.mean
    agent.eval()
    torch.manual_seed(steps - 1)
    last = {k: v[-1].numpy() for k, v in rows.items()}
    greedy = agent.act(last, {k: rows[k][-2] for k in state})
    torch.testing.assert_close(greedy["action"], mode[-1], rtol=1e-4, atol=1e-5)
    assert torch.equal(greedy["stoch"], rows["stoch"][-1]), "in evaluation too the latent is sampled"
    assert not torch.allclose(mode[-1], rows["action"][-1])


@pytest.mark.parametrize("name", [path.stem for path in SCRIPTS if tiny.has(path.stem, "train_every")])
def test_random_actions_are_uniform(name):
    """Before learning_starts: each discrete action equally often, each continuous one evenly in [-1, 1]."""
    m, device = load(name), torch.device("cpu")
    torch.manual_seed(0)
    discrete, continuous = (tiny.agent(m, d).behaviour.random_action(3000, device) for d in (True, False))
    assert (discrete.sum(-1) == 1).all() and (discrete.sum(0) - 1000).abs().max() < 130
    hist = torch.stack([torch.histc(column, 4, -1, 1) for column in continuous.T])
    assert continuous.abs().max() <= 1 and (hist.sum(-1) == 3000).all() and (hist - 750).abs().max() < 120
