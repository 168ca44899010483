"""Speed of one script: `python tests/benchmark.py dreamer_v3.py [--updates 20] [--threads 1] [--real 60] [its flags]`.

Times complete updates (replay sampling, loss, backward, optimiser, slow critic, write-back) on seeded random data in a
real replay, the policy step, and the Atari environment alone; with --real also that many seconds of real training. For
iris.py, of each part by itself, after all frames were encoded and decoded, which happens once per epoch and is timed
too. Prints the size of replay, a line for people and one of JSON. Compare only figures of one run on one machine."""

import argparse
import dataclasses
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT, load
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

VIEWS = {
    "view",
    "_unsafe_view",
    "expand",
    "t",
    "transpose",
    "permute",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "unbind",
    "split",
    "split_with_sizes",
    "detach",
    "alias",
    "as_strided",
    "empty_like",
    "_reshape_alias",
}


class CountDispatches(TorchDispatchMode):
    """Number of operator calls that launch work; about the number of kernels of an eager update."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name.removeprefix("aten::") not in VIEWS
        return function(*args, **(kwargs or {}))


def synthetic_rows(replay, episode: int, seed: int):
    """Endless rows for a replay: random images (never zeros), numbers N(0,1), episodes of `episode` rows, one in five
    of which terminates; latents are 0 or 1."""
    rng, count = np.random.default_rng(seed), 0
    shapes = {name: tuple(field.shape[1:]) for name, field in replay.data.items() if name != "number"}
    while True:
        first, last = (np.full(replay.num_envs, count % episode == end) for end in (0, episode - 1))
        action = np.eye(shapes["action"][-1])[rng.integers(shapes["action"][-1], size=replay.num_envs)]
        if hasattr(replay, "episodes"):  # keeps with a row the action that led to it
            action *= ~first[:, None]
        row = dict(is_first=first, is_last=last, is_terminal=last & (rng.random(replay.num_envs) < 0.2), action=action)
        row["reward"] = rng.normal(size=replay.num_envs)
        for name, shape in shapes.items():
            if name not in row:
                whole = replay.data[name].dtype == torch.uint8
                high = 256 if name == "image" else 2
                value = rng.integers(0, high, shape) if whole else rng.normal(size=shape) / 3
                row[name] = value.astype(np.uint8 if whole else np.float32)
        yield row
        count += 1


def make_replay(kind, *args, **options):
    """A new replay; its files are gone from the folder at once, mapped they live on as long as it does."""
    with tempfile.TemporaryDirectory() as folder:
        return kind(*args, Path(folder), **options)


def make_parts(script, agent, shapes: dict, args, device: torch.device):
    """The same for iris.py -> ({part: its update}, endless rows, once per epoch: encode and decode all frames)."""
    frames, rng = 10 * args.batch_length, np.random.default_rng(args.seed)
    replay = make_replay(script.SegmentReplay, script.replay_specs(shapes, agent, args), frames, 1, device)
    rows = iter(lambda: dict(image=rng.integers(0, 256, (1, *shapes["image"]), np.uint8), is_first=[False],
                             is_last=[False]), None)  # fmt: skip
    for t in range(frames):
        outcome = dict(reward=rng.integers(-1, 2, 1), is_last=[t % (5 * args.batch_length) == 0])
        replay.add(next(rows), rng.integers(agent.behaviour.action_dim, size=1), outcome)

    def once() -> int:
        replay.tokenize(agent), replay.reconstruct(agent)
        return frames

    args, perceptual = script.choose_perceptual(args, shapes["image"][-1], device)
    optimizers, batch = script.Optimizers(agent, args), dict(tokenizer=args.tokenizer_batch)
    parts = {part: partial(script.train_step, part, agent, optimizers, replay, batch.get(part, args.batch_size),
                           perceptual) for part in script.PARTS}  # fmt: skip
    return parts, rows, once


def make_update(script, agent, shapes: dict, args, device: torch.device):
    """What an update needs, as main makes it -> (complete update without arguments, endless replay rows)."""
    specs = script.replay_specs(shapes, agent, args)
    if hasattr(script, "EpisodeReplay"):
        options = dict(length=args.batch_length, prioritize_ends=args.prioritize_ends)
        replay = make_replay(
            script.EpisodeReplay, specs, 10 * args.batch_length, args.num_envs, device, **options
        )
        optimizer, rows = script.Optimizers(agent, args), synthetic_rows(replay, 2 * args.batch_length, args.seed)
        coefs = torch.tensor([script.schedule(text, 0) for text in (args.ent_coef, args.rho)]).to(device)
        for _ in range(10 * args.batch_length):
            replay.add(next(rows))
        return lambda: script.train_step(agent, optimizer, replay, args.batch_size, coefs), rows
    length = args.batch_length + 1
    replay = make_replay(script.SequenceReplay, specs, 10 * length, args.num_envs, device)
    params = [p for n, p in agent.named_parameters() if "slow" not in n]
    optimizer = script.LaProp(params, args.lr, args.warmup, args.agc)
    rows = synthetic_rows(replay, 100, args.seed)
    for _ in range(10 * length):
        replay.add(next(rows))
    return lambda: script.train_step(agent, optimizer, replay, args.batch_size), rows


def timed(function, device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of a call: wall time until the device is done, CPU time of the process, host time until return."""
    times = dict(wall=[], cpu=[], host=[])
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        times["host"].append(1e3 * (time.perf_counter() - wall))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times["wall"].append(1e3 * (time.perf_counter() - wall))
        times["cpu"].append(1e3 * (time.process_time() - cpu))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    for name, default in (("updates", 20), ("threads", 1), ("real", 0), ("peak-tflops", 0.0)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    own, flags = parser.parse_known_args()
    torch.set_num_threads(own.threads)
    script = load(Path(own.file).stem)
    args = script.parse_args(flags)
    _, _, device = script.start_ranks(args.device)
    cuda = device.type == "cuda"
    auto = dict(precision="bf16" if cuda and not hasattr(script, "PARTS") else "fp32",
                compile="on" if cuda else "off", size="size12m" if cuda else "size1m")  # fmt: skip  # as in main
    args = dataclasses.replace(args, action_repeat=args.action_repeat or (4 if args.env_id.startswith("ALE/") else 1),
                               **{k: v for k, v in auto.items() if getattr(args, k, "") == "auto"})  # fmt: skip
    torch.manual_seed(args.seed)
    size, gray = getattr(args, "image_size", 64), getattr(args, "grayscale", False)
    shapes, discrete, actions = {"image": (size, size, 1 if gray else 3)}, True, 6
    if not args.env_id.startswith("ALE/"):
        envs = script.make_envs(args, 1, args.seed)
        shapes, discrete, actions = envs.shapes, envs.discrete, envs.action_dim
    agent = script.Agent(shapes, actions, discrete, args).to(device)
    shared = dict(
        script=Path(own.file).name,
        size=getattr(args, "size", None),
        params=sum(p.numel() for p in agent.parameters() if p.requires_grad),
        precision=args.precision,
        compile=args.compile,
        threads=own.threads,
        torch=torch.__version__,
        seed=args.seed,
        device_name=torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        git_sha=subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
    )
    if hasattr(script, "PARTS"):
        updates, rows, once = make_parts(script, agent, shapes, args, device)
        once()
        epoch = timed(once, device, 3)
        shared["encode_and_decode_ms_per_frame"] = statistics.median(epoch["wall"]) / once()
    else:
        update, rows = make_update(script, agent, shapes, args, device)
        updates = {"update": update}
    row, state = next(rows), agent.initial(args.num_envs, device)
    acting = timed(lambda: agent.act(row, state)["action"].cpu(), device, 50)
    shared["act_ms"] = statistics.median(acting["wall"])
    shared["env_steps_per_s_acting"] = 1e3 * args.num_envs / shared["act_ms"]
    if args.env_id.startswith("ALE/"):
        envs = script.make_envs(args, args.num_envs, args.seed)
        envs.reset()
        action = np.eye(envs.action_dim)[np.zeros(args.num_envs, int)]
        shared["env_only_steps_per_s"] = (
            1e3 * args.num_envs / statistics.median(timed(lambda: envs.step(action), device, 300)["wall"])
        )
    if own.real:
        shared["end_to_end_steps_per_s"] = real_training(own, flags)
    counts = {}
    for name, update in updates.items():  # before anything is compiled
        update()
        with FlopCounterMode(display=False) as flops, CountDispatches() as dispatches:
            update()
        counts[name] = flops.get_total_flops() / 1e9, dispatches.count
    if args.compile == "on":
        agent.compile_regions()
    for name, update in updates.items():
        report(own, args, device, name, update, *counts[name], shared)


def report(own, args, device: torch.device, name: str, update, gflop: float, dispatches: int, shared: dict) -> None:
    """Time one kind of update and print what was found."""
    start = time.perf_counter()
    for _ in range(3):
        update()
    warmup = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ms = timed(update, device, own.updates)
    median = statistics.median(ms["wall"])
    low, *_, high = statistics.quantiles(ms["wall"], n=10)
    batch = [args.tokenizer_batch] if name == "tokenizer" else [args.batch_size, args.batch_length, args.imag_horizon]
    losses = ("losses/dyn", "losses/kl", "losses/image", "losses/token", "losses/value")
    metrics = update()
    result = dict(
        shared,
        update=name,
        batch=batch,
        ms_per_update=median,
        ms_p10=low,
        ms_p90=high,
        cpu_ms_per_update=statistics.median(ms["cpu"]),
        host_ms_per_update=statistics.median(ms["host"]),
        updates_per_s=1e3 / median,
        replayed_frames_per_s=1e3 * math.prod(batch[:2]) / median,
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        peak_mem_alloc_mb=torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None,
        warmup_s=warmup,
        warmup_updates=3,
        dispatches_per_update=dispatches,
        gflop_per_update=gflop,
        cpu_ms_per_gflop=statistics.median(ms["cpu"]) / gflop,
        tflops=gflop / median,
        mfu=gflop / median / own.peak_tflops if own.peak_tflops else None,
        final_loss=next(float(metrics[k]) for k in losses if k in metrics),
    )
    print(
        f"{result['script']} {result['size'] or 'default'} B{'xT'.join(map(str, batch[:2]))} {device.type} "
        f"{args.precision}, compile {args.compile}: "
        f"{median:.1f} ms per {name} ({result['cpu_ms_per_update']:.1f} CPU ms), {gflop:.1f} GFLOP, "
        f"{dispatches} dispatches, act {result['act_ms']:.2f} ms, peak {result['peak_rss_mb']:.0f} MB"
    )
    print(json.dumps(result))


def real_training(own, flags: list[str]) -> float:
    """Policy steps per second over `--real` seconds of the script itself, prefill included."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(ROOT / own.file), *flags, "--run-dir", folder],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(own.real)
        process.terminate()
        process.wait()
        saved = torch.load(next(Path(folder).rglob("checkpoint.pt")), weights_only=True)
        return saved["step"] / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
