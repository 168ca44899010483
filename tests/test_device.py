"""Each script on a device that is not the CPU, simulated: no operation mixes tensors of both, no host read in between."""

import os
import subprocess
import sys

import pytest
import tiny
from conftest import SCRIPTS, TESTS


def run_simulated(name: str, *flags: str, code: str = "") -> subprocess.CompletedProcess:
    """The script in a process of its own; `code` runs before, with the script as `m`."""
    before = f"from conftest import load; m = load({name!r}); {code}; " if code else ""
    command = f"{before}import sys, simulated_device; simulated_device.main({name!r}, sys.argv[1:])"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", command, *flags], cwd=TESTS, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("name", [path.stem for path in SCRIPTS])
def test_a_run_and_the_resume_of_one_of_the_cpu(name, tmp_path):
    """Acting, learning, evaluation, dream and checkpoint; then 24 more steps of a run that the CPU has made."""
    result = run_simulated(name, *tiny.flags(name, tmp_path / "simulated", eval_every=20, video_every=20))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "simulated" in result.stdout
    (run,) = (tmp_path / "simulated").iterdir()
    assert tiny.checkpoint(run)["updates"] > 0

    run = tiny.run(name, tmp_path / "cpu", eval_episodes=0)
    updates = tiny.checkpoint(run)["updates"]
    more = ["--pretrain-updates=4", "--policy-updates=4"] if name == "genrl" else []  # or it would be refused
    result = run_simulated(name, f"--resume={run}", "--total-timesteps=48", "--device=simulated", *more)
    assert result.returncode == 0, result.stderr[-3000:]
    resumed = tiny.checkpoint(run)
    assert resumed["step"] == 48
    assert resumed["updates"] > updates


def test_it_notices_what_a_gpu_would_refuse(tmp_path):
    """Samples that are drawn on the CPU."""
    noise = "m.sample_onehot = lambda probs, noise: __import__('torch').ones(probs.shape)"
    result = run_simulated("dreamer_v3", *tiny.flags("dreamer_v3", tmp_path), code=noise)
    assert result.returncode == 1
    assert "tensors of two devices" in result.stderr
