"""Every script runs end to end, and with every value of every flag that has few."""

from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import tiny
from conftest import SCRIPTS, load

NAMES = [path.stem for path in SCRIPTS]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_leaves_checkpoint_log_and_video(name, tmp_path, capfd):
    run = tiny.run(name, tmp_path)
    saved = tiny.checkpoint(run)
    assert saved["step"] == 24
    assert saved["updates"] > 0
    scalars, images = tiny.events(run)
    assert {"charts/episodic_return", "charts/frames", "eval/episodic_return"} <= set(scalars)
    assert any(tag.startswith("losses/") for tag in scalars)
    assert "dream/open_loop" in images
    assert list(run.glob("videos/*.gif"))
    assert (run / f"{name}.py").exists()
    out = capfd.readouterr().out
    assert "global_step=" in out
    assert "evaluation at step" in out
    assert "np.float" not in out


def choices(name: str):
    """(field, value) of every boolean and every Literal that is not the default of a tiny run."""
    args = load(name).Args
    hints = get_type_hints(args)
    for field in fields(args):
        hint = hints[field.name]
        values = [True, False] if hint is bool else get_args(hint)
        for value in values:
            if field.name not in ("preset", "compile", "size") and value != field.default:
                yield field.name, value


CASES = [(name, field, value) for name in NAMES for field, value in choices(name)]
# needs weights, or is tried with a server and a model of its own in tests/test_dllm_words.py
SKIPPED = {("iris", "perceptual_loss", "lpips"), ("dllm", "goal_source", "http"), ("dllm", "goal_source", "hf")}


@pytest.mark.parametrize("name, field, value", CASES)
def test_every_choice_makes_an_update(name, field, value, tmp_path):
    if (name, field, value) in SKIPPED:
        pytest.skip("needs what is not here")
    dynamics = value == "dynamics" and name not in tiny.DISCRETE_ONLY
    env = "envs:Track-v0" if dynamics else "envs:Catch-v0"
    if field == "pixels":
        pytest.importorskip("pygame")
        env = "CartPole-v1"
    changes = {field: value}
    if dynamics:
        changes["total_timesteps"] = 80  # episodes have 32
    run = tiny.run(name, tmp_path, env_id=env, eval_episodes=0, log_every=1000, **changes)
    assert tiny.checkpoint(run)["updates"] > 0


@pytest.mark.parametrize("name", [name for name in NAMES if name not in tiny.DISCRETE_ONLY])
def test_continuous_actions(name, tmp_path):
    run = tiny.run(name, tmp_path, env_id="envs:Track-v0", eval_episodes=0, total_timesteps=80)
    assert tiny.checkpoint(run)["updates"] > 0
