"""A copy of each script alone in an empty folder runs to the end and leaves a complete run directory."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from conftest import SCRIPTS, TESTS, digest


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_runs_alone(script, tmp_path):
    shutil.copy(script, tmp_path)
    env = dict(os.environ, PYTHONPATH=str(TESTS), OMP_NUM_THREADS="1")  # the tests' folder for --env-id envs:Catch-v0
    command = [sys.executable, script.name, *tiny.flags(script.stem, "runs")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "global_step=7, episodic_return=" in done.stdout and "error" not in done.stderr.lower()
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {script.name, "runs"}
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith(f"envs_Catch-v0__{script.stem}__1__")
    assert json.loads((run / "args.json").read_text())["env_id"] == "envs:Catch-v0"
    assert digest(run / script.name) == digest(script)
    assert list(run.glob("events.*")) and list(run.glob("videos/*.gif"))
    assert torch.load(run / "checkpoint.pt", weights_only=True)["algorithm"] == script.stem
