"""Runs that are stopped or killed go on; k + k steps equal 2k; two runs of one seed are equal."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import envs
import gymnasium
import pytest
import tiny
import torch
from conftest import SCRIPTS, TESTS, load

NAMES = [path.stem for path in SCRIPTS]
each_script = pytest.mark.parametrize("name", NAMES)
gymnasium.register("Ten-v0", entry_point=envs.Scripted, kwargs=dict(image=True, length=10))
gymnasium.register("Endless-v0", entry_point=envs.Scripted, kwargs=dict(image=True, length=10**9))


def tensors(value, path=""):
    """All tensors and numbers of nested dicts and lists, by their path."""
    if isinstance(value, dict):
        for key in value:
            yield from tensors(value[key], f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from tensors(item, f"{path}/{i}")
    else:
        yield path, value


def differences(a: dict, b: dict, ignored: tuple) -> list[str]:
    """Paths at which two checkpoints differ."""
    a, b = dict(tensors(a)), dict(tensors(b))
    found = sorted(a.keys() ^ b.keys())
    for path in a.keys() & b.keys():
        same = torch.equal(a[path], b[path]) if isinstance(a[path], torch.Tensor) else a[path] == b[path]
        if not same:
            found.append(path)
    return [path for path in found if not path.startswith(ignored)]


@each_script
def test_half_and_half_equals_the_whole(name, tmp_path):
    """The first half ends with an episode, so that the resumed life sees what the other one sees."""
    steps = 20
    common = dict(env_id="test_resume:Ten-v0", eval_episodes=0, log_every=10**6, save_every=10**6)
    whole = tiny.run(name, tmp_path / "whole", total_timesteps=2 * steps, **common)
    half = tiny.flags(name, tmp_path / "half", total_timesteps=2 * steps, **common)
    stopped = stop_after(name, half, steps)
    assert stopped["step"] == steps
    (run,) = (tmp_path / "half").iterdir()
    tiny.call(name, ["--resume", str(run)])
    a, b = tiny.checkpoint(whole), tiny.checkpoint(run)
    assert a["step"] == 2 * steps and a["updates"] > 2
    assert differences(a, b, ("/life", "/args/run_dir", "/args/resume")) == []


def stop_after(name: str, argv: list[str], steps: int) -> dict:
    """Run until `steps` decisions, then as if a signal had come; -> the checkpoint."""
    script = load(name)
    original = script.sum_ranks
    taken = 0

    def count(values, device):
        nonlocal taken
        if len(values) > 1:  # decisions, signals, ...
            taken += int(values[0])
            values = [values[0], int(taken >= steps), *values[2:]]
        return original(values, device)

    script.sum_ranks = count
    try:
        tiny.call(name, argv)
    finally:
        script.sum_ranks = original
    folder = next(word.split("=", 1)[1] for word in argv if word.startswith("--run-dir="))
    (run,) = Path(folder).iterdir()
    return tiny.checkpoint(run)


@each_script
def test_two_runs_of_one_seed_are_equal(name, tmp_path):
    """With two threads, whatever they do at the same time."""
    torch.set_num_threads(2)
    try:
        saved = []
        for folder in ("a", "b"):
            run = tiny.run(name, tmp_path / folder, total_timesteps=40, eval_episodes=0, log_every=10**6)
            saved.append(tiny.checkpoint(run))
    finally:
        torch.set_num_threads(1)
    assert saved[0]["updates"] > 2
    assert differences(*saved, ("/args/run_dir",)) == []


@each_script
def test_another_seed_is_another_run(name, tmp_path):
    runs = [tiny.run(name, tmp_path / str(seed), seed=seed, eval_episodes=0) for seed in (1, 2)]
    assert differences(*map(tiny.checkpoint, runs), ("/args",))


def start(name: str, *argv) -> subprocess.Popen:
    env = dict(os.environ, PYTHONPATH=str(TESTS), OMP_NUM_THREADS="1")
    return subprocess.Popen(
        [sys.executable, str(TESTS.parent / f"{name}.py"), *argv], env=env, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True)


def wait_for(path, pattern: str, process: subprocess.Popen) -> None:
    deadline = time.time() + 120
    while not list(path.glob(pattern)):
        assert process.poll() is None, process.stderr.read()[-2000:]
        assert time.time() < deadline
        time.sleep(0.05)


@each_script
def test_kill_and_signal(name, tmp_path):
    """kill -9 at random moments, then SIGTERM, which saves and exits 0, then the rest of the run."""
    flags = tiny.flags(name, tmp_path, total_timesteps=100_000, save_every=5, eval_episodes=0)
    process = start(name, *flags)
    wait_for(tmp_path, "*/checkpoint.pt", process)
    kills = int(os.environ.get("KILLS", 1))
    for _ in range(kills):
        time.sleep(random.random())
        process.kill()
        process.wait()
        process = start(name, "--resume=auto", "--env-id=envs:Catch-v0", f"--run-dir={tmp_path}")
        wait_for(tmp_path, "*/lock", process)
        time.sleep(2)
    deadline = time.time() + 60
    while "run directory" not in process.stdout.readline():
        assert time.time() < deadline
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err[-2000:]
    (run,) = tmp_path.iterdir()
    saved = tiny.checkpoint(run)
    assert 1 <= saved["life"] <= kills  # a life that was killed before its first checkpoint leaves no trace
    assert saved["step"] > 0
    is_first, is_last = tiny.replay_field(run, "is_first")[:, 0], tiny.replay_field(run, "is_last")[:, 0]
    assert is_first[0] and is_first[1:][is_last[:-1]].all()
    tiny.call(name, ["--resume", str(run), f"--total-timesteps={saved['step'] + 10}"])
    assert tiny.checkpoint(run)["step"] == saved["step"] + 10


@each_script
@pytest.mark.parametrize("end", ["stopped", "finished"])
def test_a_run_that_ended_keeps_its_replay(name, end, tmp_path):
    """Only what a killed life may have overwritten is given up, however long the next one is to be."""
    flags = tiny.flags(name, tmp_path, total_timesteps=24, eval_episodes=0, save_every=10**4)
    if end == "finished":
        tiny.call(name, flags)
    else:
        stop_after(name, flags, 18)
    (run,) = tmp_path.iterdir()
    before = tiny.checkpoint(run)
    more = ["--total-timesteps=30"]
    if name == "genrl" and end == "finished":
        more += ["--pretrain-updates=4", "--policy-updates=4"]
    tiny.call(name, ["--resume", str(run), *more])
    after = tiny.checkpoint(run)
    added = after["replay"]["rows"] - before["replay"]["rows"]
    assert added > 0
    assert before["replay"]["size"] == before["replay"]["rows"]
    kept = min(before["replay"]["size"] + added, after["capacity"])
    assert after["replay"]["size"] >= kept - 2


@each_script
def test_a_killed_life_puts_rows_at_risk(name, tmp_path):
    """Those of one --save-every, which may lie over the oldest ones of a full ring."""
    if name == "twm":
        pytest.skip("its replay is never full")
    script = load(name)
    kept = script.save_checkpoint
    saves = []
    script.save_checkpoint = lambda run, args, **state: saves.append(state)
    try:
        tiny.run(name, tmp_path, total_timesteps=40, save_every=6, eval_episodes=0)
    finally:
        script.save_checkpoint = kept
    first = next(state for state in saves if state["step"])
    assert first["at_risk"] >= 6
    assert saves[-1]["at_risk"] <= (5 if name == "iris" else 1)


@each_script
def test_a_run_goes_on_with_its_own_copy_of_the_script(name, tmp_path):
    run = tiny.run(name, tmp_path, eval_episodes=0)
    process = subprocess.run(
        [sys.executable, run / f"{name}.py", "--resume", run], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=dict(os.environ, PYTHONPATH=str(TESTS), OMP_NUM_THREADS="1"))
    assert process.returncode == 0, process.stderr[-2000:]


@each_script
def test_an_episode_as_long_as_the_limit_is_whole(name, tmp_path, capfd):
    """It ends with the very step at which the evaluation would have ended it."""
    script = load(name)
    args = script.parse_args(tiny.flags(name, tmp_path, env_id="test_resume:Ten-v0", action_repeat=1))
    args.action_repeat = 10_800  # for the limit alone: 10 steps
    made = script.make_envs(script.replace(args, action_repeat=1), 1, 0)
    agent = script.Agent(made.shapes, made.action_dim, made.discrete, args)
    make_envs = script.make_envs
    script.make_envs = lambda args, *key: make_envs(script.replace(args, action_repeat=1), *key)
    try:
        results = script.evaluate(agent, args, [])
    finally:
        script.make_envs = make_envs
    assert results["eval/episodic_length"] == 10
    assert "did not end" not in capfd.readouterr().out


@each_script
def test_an_evaluation_obeys_a_signal(name, tmp_path):
    """In an environment without end."""
    script = load(name)
    args = script.parse_args(tiny.flags(name, tmp_path, env_id="test_resume:Endless-v0"))
    made = script.make_envs(args, 1, 0)
    agent = script.Agent(made.shapes, made.action_dim, made.discrete, args)
    calls = []

    class Stop(list):
        def __bool__(self):
            calls.append(1)
            return len(calls) > 5

    assert script.evaluate(agent, args, Stop()) == {}
    assert len(calls) < 20


@each_script
def test_an_evaluation_without_end_has_a_result(name, tmp_path, capfd):
    script = load(name)
    args = script.parse_args(tiny.flags(name, tmp_path, env_id="test_resume:Endless-v0", action_repeat=6_000))
    made = script.make_envs(args, 1, 0)
    agent = script.Agent(made.shapes, made.action_dim, made.discrete, args)
    results = script.evaluate(agent, args, [])
    assert results["eval/episodic_length"] == 18  # 108,000 frames
    assert "did not end" in capfd.readouterr().out


@each_script
def test_a_finished_run_is_evaluated_again(name, tmp_path, capfd):
    run = tiny.run(name, tmp_path, eval_episodes=0)
    before = tiny.checkpoint(run)["agent"]
    tiny.call(name, ["--resume", str(run), "--eval-episodes=2"])
    assert "evaluation at step" in capfd.readouterr().out
    assert differences(before, tiny.checkpoint(run)["agent"], ("-",)) == []
