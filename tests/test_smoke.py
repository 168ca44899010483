"""One tiny run of each script from start to end: metrics, files, warnings, and the same again for the same seed."""
import json
import math
import re
import warnings

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, SCRIPTS, load
from PIL import Image

LOSSES = dict(
    iris={"codebook", "commit", "image", "perceptual", "token", "reward", "end", "policy", "value", "entropy"},
    dreamer_v2={"image", "kl", "reward", "discount", "policy", "value"},
    dreamer_v3={"image", "dyn", "rep", "reward", "cont", "policy", "value", "repval"})
UPDATES = dict(iris=29, dreamer_v2=6, dreamer_v3=10)  # of the run below
CHARTS = {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/UPS", "charts/frames"}
EVAL = {"eval/episodic_return", "eval/episodic_length", "eval/return_std"}
DREAM = {"dream/image_error_posterior", "dream/image_error_imagined"}
PERIODIC = dict(eval_every=10, video_every=20, save_every=10)


@pytest.fixture(scope="module", params=[path.stem for path in SCRIPTS])
def smoke(request, tmp_path_factory):
    """(script name, run directory, scalars, image tags, warnings) of one run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = tiny.run(request.param, tmp_path_factory.mktemp("smoke") / "run", **PERIODIC)
    return request.param, run, *tiny.events(run), caught


def test_metrics(smoke):
    """All expected ones, each finite, each of a known family, as often and at the steps that the flags say."""
    name, _, scalars, images, _ = smoke
    assert {f"losses/{term}" for term in LOSSES[name]} == {tag for tag in scalars if tag.startswith("losses/")}
    assert CHARTS | EVAL | DREAM <= set(scalars) and images == {"dream/open_loop"}
    assert all(re.match(r"(losses|wm|ac|grad|perf|charts|eval|dream)/\w+$", tag) for tag in scalars)
    assert {tag.split("/")[0] for tag in scalars} >= {"wm", "ac", "grad"}
    assert all(math.isfinite(value) for series in scalars.values() for _, value in series)
    assert len(scalars["losses/reward"]) >= 8
    assert scalars["charts/frames"] == [(step, step) for step, _ in scalars["losses/reward"]]
    assert [step for step, _ in scalars["eval/episodic_return"]] == [10, 20, 24]
    assert [step for step, _ in scalars["dream/image_error_imagined"]] == [20, 24]


def test_episodes(smoke):
    """Catch has seven steps, the row that resets is none of them; the score is -1 or 1."""
    scalars = smoke[2]
    assert [step for step, _ in scalars["charts/episodic_return"]] == [7, 14, 21]
    assert {value for _, value in scalars["charts/episodic_length"] + scalars["eval/episodic_length"]} == {7}
    assert {abs(value) for _, value in scalars["charts/episodic_return"] + scalars["eval/episodic_return"]} == {1}


def test_files(smoke):
    name, run, *_ = smoke
    assert {path.name for path in run.iterdir() if "events" not in path.name} >= {
        "args.json", f"{name}.py", "checkpoint.pt", "replay0", "videos"}
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 24 and checkpoint["updates"] == UPDATES[name]
    assert checkpoint["args"] == json.loads((run / "args.json").read_text())
    assert "auto" not in [checkpoint["args"].get(field) for field in ("precision", "compile", "size")]


def test_gifs(smoke):
    """Several different frames, at the steps that the flags say."""
    paths = {path.name: path for path in (smoke[1] / "videos").iterdir()}
    assert set(paths) == {"dream_20.gif", "dream_24.gif"}
    for path in paths.values():
        with Image.open(path) as gif:
            frames = []
            for number in range(gif.n_frames):
                gif.seek(number)
                frames.append(gif.convert("RGB").tobytes())
        assert len(set(frames)) >= 6


def test_no_warnings(smoke):
    name, *_, caught = smoke
    assert not [str(w.message) for w in caught if w.filename == str(ROOT / f"{name}.py")]


def test_same_seed_same_numbers(smoke, tmp_path):
    name, _, scalars, *_ = smoke
    def numbers(found):
        return {tag: series for tag, series in found.items() if tag not in ("charts/SPS", "charts/UPS")}
    again, other = (tiny.events(tiny.run(name, tmp_path / str(seed), seed=seed, **PERIODIC))[0] for seed in (1, 2))
    assert numbers(again) == numbers(scalars)
    assert all(other[f"losses/{term}"] != scalars[f"losses/{term}"] for term in LOSSES[name])


def watch(m, monkeypatch) -> tuple[list, list]:
    """Two lists that a run fills: the step of each update, as its entropy schedule tells it, and each policy state."""
    updates, states, train_step, act = [], [], m.train_step, m.Agent.act

    def counted(agent, optimizer, replay, batch_size, coefs):
        updates.append(round(float(coefs[0])))
        return train_step(agent, optimizer, replay, batch_size, coefs)

    monkeypatch.setattr(m, "train_step", counted)
    monkeypatch.setattr(m.Agent, "act", lambda agent, row, state: states.append(state) or act(agent, row, state))
    return updates, states


every = pytest.mark.parametrize("name", [path.stem for path in SCRIPTS if tiny.has(path.stem, "train_every")])


@every
def test_when_it_learns_and_acts(name, tmp_path, monkeypatch):
    """1 + pretrain updates at learning_starts, then one every train_every steps; random actions until learning_starts.

    Catch has seven steps: 24 of them, and 4 rows that reset, are 28 rows. The policy acts on those after step 8."""
    updates, states = watch(load(name), monkeypatch)
    flags = dict(eval_episodes=0, ent_coef="linear(0,1000,1000)", pretrain=3)
    run = tiny.run(name, tmp_path / "run", **flags)
    assert updates == [8, 8, 8, 8, 12, 16, 20, 24] and len(states) == 24 - 8 + 2
    assert states[0]["action"].sum() == 1 and not states[0]["deter"].any(), "memory begins where the policy takes over"
    assert all(state["deter"].any() and state["stoch"].sum() == 4 for state in states[1:]), "and is handed on"
    assert torch.load(run / "checkpoint.pt", weights_only=True)["updates"] == 8
    assert tiny.events(run)[0]["ac/ent_coef"][-1] == (24, 24), "schedules run over policy steps"


@every
def test_learning_waits_for_a_whole_episode(name, tmp_path, monkeypatch):
    """Three environments of seven steps: the first update after 21 steps, whatever learning_starts says, and random
    actions until then, on the first 8 of 19 rows."""
    updates, states = watch(load(name), monkeypatch)
    flags = dict(eval_episodes=0, ent_coef="linear(0,1000,1000)", learning_starts=3, total_timesteps=48, num_envs=3)
    tiny.run(name, tmp_path / "run", **flags)
    assert updates == [21, 21, 27, 30, 33, 39, 42, 45], "what is left of four steps is carried"
    assert len(states) == 19 - 8


@pytest.mark.parametrize("name", [path.stem for path in SCRIPTS])
def test_layout_of_a_dream(name):
    """Truth above model above their difference, both sequences side by side; below each the same words."""
    truth, model = torch.zeros(3, 2, 8, 64, 3), torch.ones(3, 2, 8, 64, 3)
    metrics, frames = load(name).dream_video(truth, model, 2, reward=torch.ones(3, 2))
    video = torch.stack([torch.from_numpy(np.array(frame)) for frame in frames])
    assert video.shape == (3, 6 * 8 + 14, 4 * 64, 3)
    assert (video[:, :16] == 0).all() and (video[:, 16:48] == 255).all()
    left, right = video[:, 48:].chunk(2, 2)
    assert torch.equal(left, right) and left.amax((1, 2, 3)).min() > 0
    assert torch.equal(left[0], left[1]) and not torch.equal(left[1], left[2]), "post, post, imag"
    assert metrics["dream/image_error_posterior"] == metrics["dream/image_error_imagined"] == 8 * 64 * 3
