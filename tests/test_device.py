"""Each script on a device that is not the CPU, simulated: results are those of the CPU, and no operation mixes both."""
import os
import subprocess
import sys

import pytest
import tiny
import torch
from conftest import SCRIPTS, TESTS

FAST = dict(dreamer_v3=dict(lr=1e-3, warmup=1))  # otherwise ten updates move its weights by less than the tolerance


def run_simulated(name: str, *flags: str, code: str = "") -> subprocess.CompletedProcess:
    """The script in a process of its own; `code` runs before, with the script as `m`."""
    before = f"from conftest import load; m = load({name!r}); {code}; " if code else ""
    command = f"{before}import sys, simulated_device; simulated_device.main({name!r}, sys.argv[1:])"
    return subprocess.run([sys.executable, "-c", command, *flags], cwd=TESTS, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("name", [path.stem for path in SCRIPTS])
def test_a_run_and_its_resume(name, tmp_path):
    """Acting, learning, evaluation, dream and checkpoint; then 24 more steps of the run that the CPU has made."""
    changes = dict(eval_every=20, video_every=20, save_every=20, **FAST.get(name, {}))
    run = tiny.run(name, tmp_path / "cpu", **changes)
    result = run_simulated(name, *tiny.flags(name, tmp_path / "simulated", **changes))
    assert result.returncode == 0 and "device: simulated" in result.stdout, result.stderr[-3000:]
    (other,) = (tmp_path / "simulated").iterdir()
    ours, theirs = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (run, other))
    assert ours["updates"] == theirs["updates"] > 0 and ours["agent"].keys() == theirs["agent"].keys()
    for key, value in ours["agent"].items():
        torch.testing.assert_close(theirs["agent"][key], value, rtol=0, atol=1e-4, msg=key)
    result = run_simulated(name, f"--resume={run}", "--total-timesteps=48")
    assert result.returncode == 0, result.stderr[-3000:]
    resumed = torch.load(run / "checkpoint.pt", weights_only=True)
    assert resumed["step"] == 48 and resumed["updates"] > ours["updates"]


def test_it_notices_what_a_gpu_would_refuse(tmp_path):
    """Noise that is drawn on the CPU."""
    noise = "m.RSSM.noise = lambda self, *n: __import__('torch').ones(*n, self.stoch, self.classes)"
    result = run_simulated("dreamer_v3", *tiny.flags("dreamer_v3", tmp_path), code=noise)
    assert result.returncode == 1 and "tensors of two devices" in result.stderr
