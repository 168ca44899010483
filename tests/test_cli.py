"""Flags: presets, resumed flags, and the commands of the README."""

import re
import shlex

import pytest
import tiny
from conftest import ROOT, SCRIPTS, load

NAMES = [path.stem for path in SCRIPTS]
each_script = pytest.mark.parametrize("name", NAMES)


@each_script
def test_a_preset_fills_only_what_was_left_alone(name):
    script = load(name)
    for preset, values in script.PRESETS.items():
        args = script.parse_args([f"--preset={preset}", "--total-timesteps=77", "--device=cpu"])
        assert args.total_timesteps == 77
        for field, value in values.items():
            if field != "total_timesteps":
                assert getattr(args, field) == value


@each_script
def test_plain_numbers_and_names(name):
    args = load(name).parse_args(["--total-timesteps=1_000_000", "--exp-name=1e5", "--device=cpu"])
    assert args.total_timesteps == 1_000_000
    assert args.exp_name == "1e5"


@each_script
def test_action_repeat_depends_on_the_environment(name):
    script = load(name)
    assert script.parse_args(["--env-id=ALE/Pong-v5", "--device=cpu"]).action_repeat == 4
    assert script.parse_args(["--env-id=ale_py:ALE/Pong-v5", "--device=cpu"]).action_repeat == 4
    assert script.parse_args(["--env-id=ALE/Pong-v5", "--action-repeat=2", "--device=cpu"]).action_repeat == 2
    assert script.parse_args(["--env-id=envs:Catch-v0", "--device=cpu"]).action_repeat == 1


@each_script
def test_the_parser_refuses_what_it_does_not_know(name, capfd):
    for word in ("--no-such-flag=1", "--num-envs=many", "--precision=fp8", "--total-timesteps=1.5"):
        with pytest.raises(SystemExit) as end:
            load(name).parse_args([word])
        assert end.value.code == 2
        assert word.split("=")[0] in capfd.readouterr().err


@each_script
def test_resume_auto_takes_the_newest_run_of_the_same_kind(name, tmp_path):
    for seed in (1, 2):
        tiny.call(name, tiny.flags(name, tmp_path, seed=seed, total_timesteps=8, eval_episodes=0))
    args = load(name).parse_args(["--resume=auto", "--env-id=envs:Catch-v0", f"--run-dir={tmp_path}", "--seed=2"])
    assert args.seed == 2 and "__2__" in args.resume
    assert args.batch_size == tiny.SMALL[name]["batch_size"]  # flags of the run
    fresh = load(name).parse_args(["--resume=auto", "--env-id=envs:Catch-v0", f"--run-dir={tmp_path}", "--seed=3"])
    assert fresh.resume == ""


def commands() -> list[list[str]]:
    """Command lines of scripts in the README's code blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    words = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    found = []
    for line in words:
        for i, word in enumerate(line):
            if word.endswith(".py") and (ROOT / word).exists() and not word.startswith("tests/"):
                found.append(line[i:])
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_of_the_readme_parse(command):
    script, *flags = command
    if "--resume" in flags:
        flags = flags[: flags.index("--resume")]  # there is no such run here
    end = [i for i, word in enumerate(flags) if word in ("&&", "|", ";")]
    load(script.removesuffix(".py")).parse_args(flags[: end[0]] if end else flags)


def test_the_readme_has_commands_of_every_script():
    assert {command[0] for command in commands()} == {path.name for path in SCRIPTS}
