"""The smallest useful run of each script: its flags, the run itself in this process, and what it wrote."""
import signal
from dataclasses import fields
from pathlib import Path

import envs  # registers the toy environments
import gymnasium
from conftest import load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COMMON = dict(env_id="envs:Catch-v0", device="cpu", total_timesteps=24, eval_episodes=1, log_every=1)
SMALL = {
    "dreamer_v1": dict(deter=16, hidden=16, stoch=4, cnn_depth=2, units=16, batch_size=2, batch_length=6, imag_horizon=5,
                       learning_starts=8, pretrain=2, train_every=4, train_steps=1, eval_every=0),
    "dreamer_v2": dict(deter=16, hidden=16, stoch=4, classes=4, cnn_depth=2, layers=1, units=16, batch_size=2,
                       batch_length=6, imag_horizon=5, learning_starts=8, train_every=4, eval_every=0),
    "iris": dict(image_size=16, epoch_steps=2, epoch_updates=1, extra_epochs=0, learning_starts=4, world_starts=4,
                 behaviour_starts=6, tokenizer_batch=2, batch_size=2, batch_length=7, vocab_size=8, code_dim=4,
                 channels=4, res_blocks=1, layers=1, heads=1, width=8, lstm_units=8, imag_horizon=3, burn_in=2,
                 eval_every=0, perceptual_loss="pixel"),
    "dreamer_v3": dict(size="size1m", image_size=16, batch_size=2, batch_length=8, learning_starts=16, train_ratio=16),
}
# whose replay keeps with an observation the action that led to it; for the others, the one that was chosen on it
DISCRETE_ONLY = {"iris"}
ARRIVAL = {"dreamer_v1", "dreamer_v2"}

gymnasium.register("ScriptedImage-v0", entry_point=envs.Scripted, kwargs=dict(image=True))


def has(name: str, *names: str) -> bool:
    """Whether the script has all these flags."""
    return {field.name for field in fields(load(name).Args)} >= set(names)


def flag(field: str, value) -> str:
    """--field=value; booleans become --field or --no-field."""
    word = field.replace("_", "-")
    return f"--{word}={value}" if not isinstance(value, bool) else f"--{word}" if value else f"--no-{word}"


def flags(name: str, folder: Path, **changes) -> list[str]:
    """The command line of a tiny run that writes below `folder`."""
    return [flag(*pair) for pair in {**COMMON, **SMALL[name], "run_dir": folder, **changes}.items()]


def run(name: str, folder: Path, **changes) -> Path:
    """Parse the flags and call main in this process -> the run directory. `folder` must be new."""
    script, kept = load(name), {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        script.main(script.parse_args(flags(name, folder, **changes)))
    finally:
        for number, handler in kept.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)
    (made,) = folder.iterdir()
    return made


def events(run_dir: Path) -> tuple[dict[str, list[tuple[int, float]]], set[str]]:
    """Scalars {tag: [(step, value), ...]} and the tags of images in the event files of a run directory."""
    log = EventAccumulator(str(run_dir), size_guidance=dict(scalars=0, images=0)).Reload()
    scalars = {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    return scalars, set(log.Tags()["images"])


# ---- an agent alone, for the scripts that learn from 64x64 images only ----

IMAGE = {"image": (64, 64, 3)}


def agent(m, discrete: bool = True, **changes):
    """A tiny agent of module `m` for 3 actions, or actions of 3 dimensions; weights from torch's present seed."""
    small = {k: v for k, v in SMALL[Path(m.__file__).stem].items() if k != "learning_starts"}
    return m.Agent(IMAGE, 3, discrete, m.Args(**{**small, "precision": "fp32", "imag_horizon": 4, **changes}))
