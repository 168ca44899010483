"""The command line: help, names and defaults, number formats, presets, and importing without side effects."""
import ast
import dataclasses
import os
import re
import subprocess
import sys
import typing

import pytest
import tiny
from conftest import ROOT, SCRIPTS, load
from packaging.requirements import Requirement

NAMES = [path.stem for path in SCRIPTS]
each_script = pytest.mark.parametrize("name", NAMES)

EVERY_FILE = dict(  # DESIGN of the command line: these flags mean the same in all scripts
    env_id="ALE/Pong-v5", seed=1, num_envs=1, action_repeat=None, device="auto", precision="auto", compile="auto",
    run_dir="runs", resume="", preset="default")
PRESENT = ("total_timesteps", "exp_name", "buffer_size", "learning_starts", "batch_size", "batch_length",
           "imag_horizon", "gamma", "lam", "ent_coef", "save_every", "eval_every", "eval_episodes", "video_every",
           "log_every")
OFFICIAL = dict(
    iris=dict(
        total_timesteps=100_000, buffer_size=200_000, image_size=64, sticky_actions=0,
        life_loss=True, epoch_steps=200, epoch_updates=200, extra_epochs=100, learning_starts=1000, world_starts=5000,
        behaviour_starts=10_000, tokenizer_batch=256, batch_size=64, batch_length=20, vocab_size=512, code_dim=512,
        channels=64, res_blocks=2, perceptual_loss="auto", lpips_weights="", lpips_dropout=True, layers=10, heads=4,
        width=256, dropout=0.1, lstm_units=512, imag_horizon=20, burn_in=20, gamma=0.995, lam=0.95, ent_coef=0.001,
        epsilon=0.01, temperature=1, eval_temperature=0.5, lr=1e-4, weight_decay=0.01, grad_clip=10),
    dreamer_v2=dict(
        total_timesteps=50_000_000, grayscale=True, sticky_actions=0.25, full_action_space=False,
        reward_transform="tanh", buffer_size=2_000_000, learning_starts=50_000, pretrain=1,
        train_every=16, batch_size=16, batch_length=50, prioritize_ends=True, stoch=32, classes=32, deter=600,
        hidden=600, cnn_depth=48, layers=4, units=400, kl_scale=0.1, kl_balance=0.8, free_nats=0, pred_discount=True,
        discount_scale=5, imag_horizon=15, gamma=0.999, lam=0.95, actor_grad="auto", rho="0.9", ent_coef="1e-3",
        exact_trunc_grad=False, slow_rate=1, slow_every=100, model_lr=2e-4, actor_lr=4e-5, critic_lr=1e-4,
        adam_eps=1e-5, weight_decay=1e-6, grad_clip=100, eval_every=250_000),
    dreamer_v3=dict(
        total_timesteps=1_000_000, batch_size=16, batch_length=64, train_ratio=256, buffer_size=5_000_000, size="auto",
        imag_horizon=15, gamma=1 - 1 / 333, lam=0.95, ent_coef=3e-4, slow_rate=0.02, free_nats=1, beta_dyn=1,
        beta_rep=0.1, beta_repval=0.3, unimix=0.01, actor_unimix=0.01, lr=4e-5, warmup=1000, agc=0.3, image_size=64,
        sticky_actions=0, pixels=False),
)
# the other settings of the authors; every field of the preset is here
PRESETS = dict(
    dreamer_v2=dict(
        paper=dict(full_action_space=True, gamma=0.995, batch_size=50, train_every=4),
        dmc=dict(
            action_repeat=2, grayscale=False, sticky_actions=0, reward_transform="identity", learning_starts=1_000,
            pretrain=100, train_every=5, prioritize_ends=False, deter=200, hidden=200, kl_scale=1, free_nats=1,
            pred_discount=False, gamma=0.99, ent_coef="1e-4", model_lr=3e-4, actor_lr=8e-5, critic_lr=8e-5,
            eval_every=10_000, total_timesteps=1_000_000)),
)


def flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def fields(name: str) -> list[dataclasses.Field]:
    return list(dataclasses.fields(load(name).Args))


def parse(name: str, *argv: str):
    return load(name).parse_args(list(argv))


def args_class(name: str) -> ast.ClassDef:
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")


@each_script
def test_help_shows_every_field(name, capsys):
    with pytest.raises(SystemExit) as end:
        parse(name, "--help")
    assert end.value.code == 0
    shown = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    assert {flag(f.name) for f in fields(name) if f.init} <= shown
    assert not {flag(f.name) for f in fields(name) if not f.init} & shown, "derived fields are no flags"


@each_script
def test_every_flag_has_a_help_line(name):
    """A remark behind the field, or above it where the line is too long."""
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    assert ast.get_docstring(args_class(name)), "tyro prints the class's docstring"
    for node in args_class(name).body:
        if isinstance(node, ast.AnnAssign):
            text = re.match(r".*?  # (.*)|", lines[node.lineno - 1])[1] or lines[node.lineno - 2].partition("    # ")[2]
            assert len(text) > 10, f"{node.target.id} has no help line"


@each_script
def test_every_field_is_used(name):
    """As args.field, first.field, self.args.field, ... outside the Args class."""
    tree, used = ast.parse((ROOT / f"{name}.py").read_text()), set()
    for node in tree.body:
        if not (isinstance(node, ast.ClassDef) and node.name == "Args"):
            used |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)
                     and getattr(n.value, "attr", getattr(n.value, "id", None)) in ("args", "first")}
    assert not {f.name for f in fields(name)} - used


@each_script
def test_names_and_defaults(name):
    defaults = {f.name: f.default for f in fields(name)}
    for field, value in {**EVERY_FILE, "exp_name": name, **OFFICIAL.get(name, {})}.items():
        assert defaults[field] == value, field
    assert not set(PRESENT) - set(defaults)
    choices = typing.get_type_hints(load(name).Args)
    assert typing.get_args(choices["precision"]) == ("auto", "bf16", "fp32")
    assert {"default", "tiny"} <= set(typing.get_args(choices["preset"]))


@each_script
@pytest.mark.parametrize("argv, field, value", [
    (["--total-timesteps", "1_000_000"], "total_timesteps", 1_000_000),
    (["--total-timesteps", "1e6"], "total_timesteps", 1_000_000),
    (["--total-timesteps=1e6"], "total_timesteps", 1_000_000),
    (["--total_timesteps=25E4"], "total_timesteps", 250_000),
    (["--num-envs", "3"], "num_envs", 3),
    (["--gamma", "5e-1"], "gamma", 0.5),
    (["--gamma=9.5e-1"], "gamma", 0.95),
    (["--ent-coef", "2.5e0"], "ent_coef", 2.5),
    (["--ent-coef=1.25e1"], "ent_coef", 12.5),
])
def test_number_formats(name, argv, field, value):
    got = getattr(parse(name, *argv), field)
    got = load(name).schedule(got, 0) if isinstance(got, str) else got  # a number is the simplest schedule
    assert got == value and type(got) is type(value)


@each_script
@pytest.mark.parametrize("text", ["1.5", "1.5e0", "2.5e5", "1e-3", "1e400", "many"])
def test_integers_are_integers(name, text, capsys):
    with pytest.raises(SystemExit) as end:
        parse(name, "--total-timesteps", text)
    assert end.value.code == 2 and "total-timesteps" in capsys.readouterr().err


@each_script
def test_floats_are_unaffected(name):
    rates = [f.name for f in fields(name) if f.name.endswith("lr")]
    assert rates
    for field in rates:
        for argv in ([flag(field), "4e-5"], [f"{flag(field)}=4e-5"]):
            assert getattr(parse(name, *argv), field) == 4e-5


@each_script
def test_presets_fill_only_what_was_left_alone(name):
    script, default = load(name), load(name).Args()
    for preset, values in script.PRESETS.items():
        assert values == PRESETS.get(name, {}).get(preset, values)
        want = dataclasses.replace(default, preset=preset, **values)
        assert parse(name, "--preset", preset) == want
        for field, value in values.items():  # a flag wins over the preset, even where it repeats the default
            got = parse(name, "--preset", preset, tiny.flag(field, getattr(default, field)))
            assert got == dataclasses.replace(want, **{field: getattr(default, field)})
    assert set(script.PRESETS) == set(typing.get_args(typing.get_type_hints(script.Args)["preset"]))
    assert script.PRESETS["tiny"] and not script.PRESETS["default"]


@each_script
def test_unknown_flag_gets_a_suggestion(name, capsys):
    with pytest.raises(SystemExit) as end:
        parse(name, "--totl-timesteps", "5")
    assert end.value.code == 2 and "--total-timesteps" in capsys.readouterr().err


IMPORT = """
import os, random, signal, sys, threading
import numpy as np, torch
def state():
    return dict(
        python_rng=random.getstate(), numpy_rng=np.random.get_state()[1].tolist(),
        torch_rng=torch.get_rng_state().tolist(), dtype=torch.get_default_dtype(),
        threads=(torch.get_num_threads(), threading.active_count()),
        signals=[signal.getsignal(number) for number in signal.valid_signals()], files=os.listdir())
before = state()
import {name}
after = state()
sys.exit(", ".join(key for key in before if before[key] != after[key]))
"""


@each_script
def test_import_has_no_side_effects(name, tmp_path):
    """No file, no random number, no thread, no signal handler, no word; a warning from the script is an error."""
    env = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1", PYTHONWARNINGS=f"error:::{name}")
    command = [sys.executable, "-c", IMPORT.format(name=name), "--seed", "x"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout + done.stderr.strip() == ""


def pep723(name: str) -> dict[str, Requirement]:
    """Package name -> range, from the `# /// script` block."""
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", (ROOT / f"{name}.py").read_text(), re.MULTILINE)
    text = re.sub(r"^# ?", "", block[1], flags=re.MULTILINE)
    assert re.search(r'^requires-python = ">=3.10"$', text, re.MULTILINE)
    listed = re.search(r"^dependencies = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)[1]
    return {requirement.name: requirement for requirement in map(Requirement, ast.literal_eval(listed))}


def pinned() -> dict[str, str]:
    """Package name -> version, from requirements.txt."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


@each_script
def test_pep723_block_is_requirements(name):
    """The same packages; the script's ranges admit the tested versions. Only two scripts need sentence embeddings."""
    block, pins = pep723(name), pinned()
    language = {"sentence-transformers"} if name in ("dllm", "genrl") else set()
    assert set(block) == set(pins) - {"pytest", "sentence-transformers"} | language
    for package, requirement in block.items():
        assert requirement.specifier and requirement.specifier.contains(pins[package]), requirement
