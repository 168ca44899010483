"""The docstring's index diagram, by an environment whose observations tell their step and the action that led to them."""
import itertools

import gymnasium
import numpy as np
import pytest
import torch
from conftest import load
from envs import Scripted
from tiny import run

ENDS = {5: "terminate", 8: "truncate", 6: "terminate"}  # episode length -> how it ends
lengths = itertools.cycle(ENDS)
for name, continuous in (("Staggered-v0", False), ("StaggeredContinuous-v0", True)):  # every copy gets the next length
    gymnasium.register(name, lambda c=continuous: Scripted((n := next(lengths)), ENDS[n], continuous=c))
gymnasium.register("Truncated-v0", lambda: Scripted(8, "truncate"))

CASES = [("envs:Scripted-v0", 1), ("Truncated-v0", 1), ("Staggered-v0", 3), ("StaggeredContinuous-v0", 3)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def played(request, tmp_path_factory):
    """A run of 200 policy steps with a few updates on the way: environment id, checkpoint, run directory, replay arrays."""
    env_id, num_envs = request.param
    folder = run("dreamer_v3", tmp_path_factory.mktemp("run"), env_id=env_id, num_envs=num_envs, total_timesteps=200, eval_episodes=0,
                 learning_starts=180, train_ratio=2.0, log_every=1000)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    ring, count = {path.stem: np.load(path) for path in (folder / "replay0").glob("*.npy") if path.stem != "rows"}, saved["replay"]["rows"]
    # resetting rows are not steps, so that the ring has wrapped around: put the rows into their order
    return env_id, saved, folder, {k: v[np.arange(count - len(v), count) % len(v)] for k, v in ring.items()}


def code(action, continuous):
    """What the environment writes into the next observation. (...,A) -> (...)"""
    return 128 + 127 * action[..., 0].clip(-1, 1) if continuous else action.argmax(-1) + 1


def test_rows_in_replay(played):
    """obs, reward and flags of a row arrived together, caused by the action of the row before; its own action was chosen on them."""
    env_id, saved, _, rows = played
    step, seen, _ = np.moveaxis(rows["obs"], -1, 0)
    first, last, action = rows["is_first"], rows["is_last"], rows["action"]
    assert np.array_equal(first[1:], last[:-1]), "the row after an end begins"
    assert (step[first] == 0).all() and (seen[first] == 0).all() and (rows["reward"][first] == 0).all()
    assert np.array_equal(step[1:][~first[1:]], step[:-1][~first[1:]] + 1)
    assert np.allclose(seen[1:], np.where(first[1:], 0, code(action[:-1], "Continuous" in env_id)))
    assert np.array_equal(rows["reward"], step), "the environment's reward is its step number"
    assert not action[last].any(), "no action is chosen on the last observation"
    if "Continuous" not in env_id:
        assert np.array_equal(np.sort(action[~last], -1), np.broadcast_to([0, 0, 1], action[~last].shape)) and action.any((0, 1)).all()
    for env in range(first.shape[1]):
        length = set(step[last[:, env], env])
        assert len(length) == 1 and step[:, env].max() == min(length), "an episode goes on after its end"
        end = ENDS[int(*length)] if env_id.startswith("Staggered") else "truncate" if "Truncated" in env_id else "terminate"
        assert np.array_equal(rows["is_terminal"][:, env], last[:, env] & (end == "terminate")), "a time limit is not a death"


def test_steps_are_decisions(played):
    """The step counter, hence the budget, counts environment steps and not the rows that only reset."""
    _, saved, _, rows = played
    count, period = saved["replay"]["rows"], np.where(rows["is_last"], rows["obs"][..., 0], 0).max(0).astype(int) + 1
    decisions = [sum(n - -(-n // period)) for n in (count - 1, count)]  # without rows 0, period, 2 * period, ... of each environment
    assert decisions[0] < 200 <= decisions[1] == saved["step"]


def test_training_sequences(played):
    """`sample` and `split_context`: the action at step t of the carry caused observation t, and row 0 lends its latents."""
    env_id, saved, folder, rows = played
    m = load("dreamer_v3")
    specs = {k: (v.shape[2:], torch.from_numpy(v[:1]).dtype) for k, v in rows.items()}
    capacity, num_envs = saved["capacity"], rows["reward"].shape[1]
    replay = m.SequenceReplay(specs, capacity, num_envs, torch.device("cpu"), folder / "replay0")
    replay.load_state_dict(saved["replay"])
    torch.manual_seed(0)
    batch, index = replay.sample(200, 9)
    carry, obs = m.split_context(batch)
    assert carry["action"].shape[:2] == obs["reward"].shape == (8, 200)
    step, seen, _ = obs["obs"].unbind(-1)
    inside = ~obs["is_first"]
    assert torch.equal(obs["is_first"], step == 0) and not inside.all() and obs["is_last"].any()
    assert torch.allclose(seen[inside], code(carry["action"], "Continuous" in env_id)[inside].to(seen))
    assert torch.equal(obs["reward"], step)
    assert torch.equal(step[1:][inside[1:]], step[:-1][inside[1:]] + 1)
    assert torch.equal(obs["is_terminal"], batch["is_terminal"][1:])
    for key in ("deter", "stoch"):
        assert torch.equal(carry[key], batch[key][0]) and torch.equal(carry[key], replay.data[key].flatten(0, 1)[index[0]])
