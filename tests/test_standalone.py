"""Each script alone in an empty folder: help, and a run."""

import re
import shutil
import subprocess
import sys
import time

import pytest
import tiny
from conftest import ROOT, SCRIPTS, TESTS

each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)


def python(folder, *argv, **options):
    env = dict(PYTHONPATH=str(TESTS), PATH="/usr/bin:/bin", HOME=str(folder), OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, *map(str, argv)], cwd=folder, env=env, capture_output=True, text=True, **options)


@each_script
def test_runs_alone(path, tmp_path):
    shutil.copy(path, tmp_path)
    result = python(tmp_path, path.name, *tiny.flags(path.stem, "runs"), timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert list(tmp_path.glob("runs/*/checkpoint.pt"))


@each_script
def test_help(path, tmp_path):
    start = time.time()
    result = python(tmp_path, path, "--help", timeout=120)
    assert result.returncode == 0
    assert "--env-id" in result.stdout and "--resume" in result.stdout
    assert time.time() - start < 30  # about three seconds on an idle machine


@each_script
def test_dependencies_are_those_of_requirements(path):
    """The PEP 723 block names the packages that requirements.txt pins, within its ranges."""
    block = re.search(r"# dependencies = \[(.*?)^# \]", path.read_text(), re.S | re.M)[1]
    ranges = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', block))
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M))
    assert {"torch", "gymnasium", "ale-py", "tyro", "tensorboard", "tqdm"} <= set(ranges)
    for package, least in ranges.items():
        numbers = [int(number) for number in pins[package].split(".")]
        assert numbers >= [int(number) for number in least.split(".")], package


@each_script
def test_importing_has_no_effects(path, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(path.parent)!r}); import {path.stem} as m; print(m.Args().exp_name)"
    result = python(tmp_path, "-c", code, timeout=120)
    assert result.stdout.split() == [path.stem]
    assert not list(tmp_path.iterdir())
