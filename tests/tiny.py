"""The smallest useful run of each script: its flags, the run itself in this process, and what it wrote."""

import signal
from dataclasses import fields
from pathlib import Path

import envs  # registers the toy environments
import gymnasium
import torch
from conftest import load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COMMON = dict(env_id="envs:Catch-v0", device="cpu", total_timesteps=24, eval_episodes=1, log_every=1, video_every=0)
SMALL = {
    "dreamer_v1": dict(
        deter=16, hidden=16, stoch=4, cnn_depth=2, units=16, batch_size=2, batch_length=6, imag_horizon=5,
        learning_starts=8, pretrain=2, train_every=4, train_steps=1, eval_every=0),
    "dreamer_v2": dict(
        deter=16, hidden=16, stoch=4, classes=4, cnn_depth=2, layers=1, units=16, batch_size=2, batch_length=6,
        imag_horizon=5, learning_starts=8, train_every=4, eval_every=0),
    "dreamer_v3": dict(size="size1m", image_size=16, batch_size=2, batch_length=6, train_ratio=6.0),
    "dllm": dict(
        size="size1m", image_size=16, batch_size=2, batch_length=6, train_ratio=6.0, embedder="hashing", num_goals=2,
        goal_every=3),
    "iris": dict(
        image_size=16, epoch_steps=2, epoch_updates=1, extra_epochs=0, learning_starts=4, world_starts=4,
        behaviour_starts=6, tokenizer_batch=2, batch_size=2, batch_length=7, vocab_size=8, code_dim=4, channels=4,
        res_blocks=1, layers=1, heads=1, width=8, lstm_units=8, imag_horizon=3, burn_in=2, eval_every=0,
        perceptual_loss="pixel"),
    "twm": dict(
        learning_starts=7, pretrain_observation=12, pretrain_dynamics=24, pretrain_behaviour=12, train_every=3.0,
        batch_size=2, batch_length=3, latents=4, classes=4, cnn_depth=1, encoder_units=8, memory_length=3, layers=1,
        width=8, heads=1, head_dim=8, ff_units=8, head_layers=1, latent_units=8, scalar_units=8, imag_batch=4,
        imag_horizon=3, ac_layers=1, ac_units=8, eval_every=0),
    "genrl": dict(
        hidden=16, stoch=4, classes=4, cnn_depth=2, layers=1, batch_size=2, batch_length=8, policy_batch_size=2,
        policy_batch_length=6, imag_horizon=8, learning_starts=12, train_every=4, pretrain_updates=3, policy_updates=3,
        vlm="random"),
}
DISCRETE_ONLY = {"iris", "twm"}
VECTORS = {"dreamer_v3", "dllm"}  # learn from vectors; the others from pixels only

gymnasium.register("ScriptedImage-v0", entry_point=envs.Scripted, kwargs=dict(image=True))


def has(name: str, field: str) -> bool:
    """Whether the script has this flag."""
    return field in {f.name for f in fields(load(name).Args)}


def flag(field: str, value) -> str:
    """--field=value; booleans become --field or --no-field."""
    word = field.replace("_", "-")
    if isinstance(value, bool):
        return f"--{word}" if value else f"--no-{word}"
    return f"--{word}={value}"


def flags(name: str, folder: Path, **changes) -> list[str]:
    """The command line of a tiny run that writes below `folder`."""
    chosen = {**COMMON, **SMALL[name], "run_dir": folder, **changes}
    return [flag(field, value) for field, value in chosen.items()]


def call(name: str, argv: list[str]) -> None:
    """Parse the flags and call main in this process, with the signal handlers as before."""
    script = load(name)
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    kept = {number: signal.getsignal(number) for number in names}
    try:
        script.main(script.parse_args(argv))
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def run(name: str, folder: Path, **changes) -> Path:
    """A tiny run -> its run directory. `folder` must be new."""
    call(name, flags(name, folder, **changes))
    (made,) = folder.iterdir()
    return made


def checkpoint(run_dir: Path) -> dict:
    """The checkpoint of a run directory."""
    return torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)


def replay_field(run_dir: Path, name: str) -> torch.Tensor:
    """The file of a replay field, as far as rows were added (one environment): (rows,...)."""
    import numpy as np

    saved = checkpoint(run_dir)
    dtype = dict(reward=np.float32, is_first=bool, is_last=bool, is_terminal=bool, image=np.uint8)[name]
    values = np.fromfile(run_dir / "replay0" / f"{name}.bin", dtype)
    return torch.from_numpy(values.reshape(saved["capacity"], -1)[: saved["replay"]["rows"]])


def events(run_dir: Path) -> tuple[dict[str, list[tuple[int, float]]], set[str]]:
    """Scalars {tag: [(step, value), ...]} and the tags of images in the event files of a run directory."""
    log = EventAccumulator(str(run_dir), size_guidance=dict(scalars=0, images=0)).Reload()
    scalars = {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    return scalars, set(log.Tags()["images"])
