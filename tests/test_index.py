"""The docstring's index diagram, by environments whose observations tell their step and the action that led there."""
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
VARIANTS = {"Staggered-v0": {}, "StaggeredContinuous-v0": dict(continuous=True), "StaggeredImage-v0": dict(image=True)}
for name, variant in VARIANTS.items():  # every copy gets the next length
    gymnasium.register(name, lambda variant=variant: Scripted((n := next(lengths)), ENDS[n], **variant))
gymnasium.register("Truncated-v0", lambda: Scripted(8, "truncate"))

CASES = [("dreamer_v3", "envs:Scripted-v0", 1), ("dreamer_v3", "Truncated-v0", 1), ("dreamer_v3", "Staggered-v0", 3),
         ("dreamer_v3", "StaggeredContinuous-v0", 3), ("dreamer_v3", "StaggeredImage-v0", 3)]


def play(folder, name, env_id, num_envs):
    """A run of 200 policy steps, with a few updates -> module, environment id, checkpoint, directory, replay arrays."""
    folder = run(name, folder, env_id=env_id, num_envs=num_envs, total_timesteps=200, eval_episodes=0, video_every=0,
                 learning_starts=180, train_ratio=2, log_every=1000)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    ring = {path.stem: np.load(path) for path in (folder / "replay0").glob("*.npy") if path.stem != "rows"}
    count = saved["replay"]["rows"]
    # resetting rows are not steps, so that the ring has wrapped around: put the rows into their order
    rows = {k: v[np.arange(count - len(v), count) % len(v)] for k, v in ring.items()}
    return load(name), env_id, saved, folder, rows


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def played(request, tmp_path_factory):
    return play(tmp_path_factory.mktemp("run"), *request.param)


def observed(rows):
    """(step, code) of the rows' observations, vectors or images."""
    obs = rows["obs"] if "obs" in rows else rows["image"][..., 0, 0, :]
    return obs[..., 0], obs[..., 1]


def code(action, continuous):
    """What the environment writes into the next observation. (...,A) -> (...)"""
    return 128 + 127 * action[..., 0].clip(-1, 1) if continuous else action.argmax(-1) + 1


def test_rows_in_replay(played):
    """What a row holds arrived together, caused by the action of the row before; its own action was chosen on it."""
    _, env_id, saved, _, rows = played
    step, seen = observed(rows)
    first, last, action = rows["is_first"], rows["is_last"], rows["action"]
    assert np.array_equal(first[1:], last[:-1]), "the row after an end begins"
    assert (step[first] == 0).all() and (seen[first] == 0).all() and (rows["reward"][first] == 0).all()
    assert np.array_equal(step[1:][~first[1:]], step[:-1][~first[1:]] + 1)
    assert np.allclose(seen[1:], np.where(first[1:], 0, code(action[:-1], "Continuous" in env_id)))
    assert np.array_equal(rows["reward"], step), "the environment's reward is its step number"
    assert not action[last].any(), "no action is chosen on the last observation"
    if "Continuous" not in env_id:
        assert (np.sort(action[~last], -1) == [0, 0, 1]).all() and action.any((0, 1)).all(), "one-hot, and each occurs"
    for env in range(first.shape[1]):
        length = set(step[last[:, env], env])
        assert len(length) == 1 and step[:, env].max() == min(length), "an episode goes on after its end"
        truncates = "Truncated" in env_id or ("Staggered" in env_id and ENDS[int(*length)] == "truncate")
        assert np.array_equal(rows["is_terminal"][:, env], last[:, env] & (not truncates)), "truncation is no death"


def test_steps_are_decisions(played):
    """The step counter, hence the budget, counts environment steps and not the rows that only reset."""
    _, _, saved, _, rows = played
    count, period = saved["replay"]["rows"], np.where(rows["is_last"], observed(rows)[0], 0).max(0).astype(int) + 1
    decisions = [sum(n - -(-n // period)) for n in (count - 1, count)]  # without an environment's rows 0, period, ...
    assert decisions[0] < 200 <= decisions[1] == saved["step"]


def test_training_sequences(played):
    """`sample` and `split_context`: the carry's action at step t caused observation t, and row 0 lends its latents."""
    m, env_id, saved, folder, rows = played
    specs = {k: (v.shape[2:], torch.from_numpy(v[:1]).dtype) for k, v in rows.items()}
    capacity, num_envs = saved["capacity"], rows["reward"].shape[1]
    replay = m.SequenceReplay(specs, capacity, num_envs, torch.device("cpu"), folder / "replay0")
    replay.load_state_dict(saved["replay"])
    torch.manual_seed(0)
    batch, index = replay.sample(200, 9)
    carry, obs = m.split_context(batch)
    assert carry["action"].shape[:2] == obs["reward"].shape == (8, 200)
    step, seen = observed(obs)
    inside = ~obs["is_first"]
    assert torch.equal(obs["is_first"], step == 0) and not inside.all() and obs["is_last"].any()
    assert torch.allclose(seen[inside], code(carry["action"], "Continuous" in env_id)[inside].to(seen))
    assert torch.equal(obs["reward"], step)
    assert torch.equal(step[1:][inside[1:]], step[:-1][inside[1:]] + 1)
    assert torch.equal(obs["is_terminal"], batch["is_terminal"][1:])
    for key in ("deter", "stoch"):
        assert torch.equal(carry[key], replay.data[key].flatten(0, 1)[index[0]])
