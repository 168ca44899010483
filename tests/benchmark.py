"""Speed of one script: `python tests/benchmark.py dreamer_v3.py [--updates 20] [--threads 1] [flags of the script]`.

Runs the script's own main on an environment of random images and times every complete update (each function whose name
begins with `train_`: sampling, loss, backward, optimiser, write-back) and the policy step, without the first three of each.
Prints a line for people and one of JSON for each. Compare only figures of one run on one machine."""

import argparse
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import gymnasium
import numpy as np
import torch
from conftest import load
from gymnasium.spaces import Box, Discrete

WARMUP = 3


class Noise(gymnasium.Env):
    """Random images, rewards N(0,1), episodes of 100 steps of which one in five terminates; 6 actions."""

    observation_space = Box(0, 255, (64, 64, 3), np.uint8)
    action_space = Discrete(6)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.image(), {}

    def step(self, action):
        self.steps += 1
        over = self.steps == 100
        terminated = over and self.np_random.random() < 0.2
        return self.image(), self.np_random.normal(), terminated, over and not terminated, {}

    def image(self):
        return self.np_random.integers(0, 256, (64, 64, 3), np.uint8)


class Done(Exception):
    """All kinds of updates were timed often enough."""


class Stopwatch:
    """Times the calls of functions by name: wall time until the device is done, in milliseconds."""

    def __init__(self, wanted: int):
        self.wanted = wanted
        self.times = {}

    def wrap(self, name: str, function):
        self.times[name] = []

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times[name].append(1e3 * (time.perf_counter() - start))
            if all(len(times) >= self.wanted + WARMUP for times in self.times.values()):
                raise Done
            return result

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    own, flags = parser.parse_known_args()
    torch.set_num_threads(own.threads)
    gymnasium.register("Noise-v0", Noise)
    script = load(Path(own.file).stem)
    watch = Stopwatch(own.updates)
    for name in [name for name in vars(script) if name.startswith("train_")]:
        setattr(script, name, watch.wrap(name, getattr(script, name)))
    script.Agent.act = watch.wrap("act", script.Agent.act)

    with tempfile.TemporaryDirectory() as folder:
        args = script.parse_args(["--env-id", "Noise-v0", "--eval-episodes", "0", "--run-dir", folder, *flags])
        try:
            script.main(args)
        except Done:
            pass
    for name, times in watch.times.items():
        times = sorted(times[WARMUP:])
        if not times:
            print(f"{own.file} {name}: never called {WARMUP} times, more --total-timesteps?", file=sys.stderr)
            continue
        result = dict(
            script=own.file, name=name, flags=flags, ms=statistics.median(times), ms_p10=times[len(times) // 10],
            ms_p90=times[len(times) * 9 // 10], calls=len(times), threads=own.threads, torch=torch.__version__,
            peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor())
        print(f"{own.file} {name}: median {result['ms']:.1f} ms, p10 {result['ms_p10']:.1f}, "
              f"p90 {result['ms_p90']:.1f}, {len(times)} calls, peak {result['peak_rss_mb']:.0f} MB")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
