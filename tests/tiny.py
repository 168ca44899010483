"""The smallest useful run of each script: its flags, the run itself in this process, and what it wrote."""
import signal
from pathlib import Path

import envs  # noqa: F401  registers the toy environments
from conftest import load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COMMON = dict(env_id="envs:Catch-v0", device="cpu", total_timesteps=24, eval_episodes=1, log_every=1)
SMALL = {
    "dreamer_v3": dict(size="size1m", image_size=16, batch_size=2, batch_length=8, learning_starts=16, train_ratio=16),
}


def flags(name: str, folder: Path, **changes) -> list[str]:
    """The command line of a tiny run that writes below `folder`; booleans become --flag or --no-flag."""
    values = {**COMMON, **SMALL[name], "run_dir": folder, **changes}

    def word(key: str, value) -> str:
        return f"--{key}={value}" if not isinstance(value, bool) else f"--{key}" if value else f"--no-{key}"

    return [word(key.replace("_", "-"), value) for key, value in values.items()]


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
