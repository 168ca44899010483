"""Every script learns small tasks from scratch: run with `python -m pytest -m learning`.

A case trains with the script's own main() until the mean return of the last 20 episodes passes its threshold, then
stops. `python tests/test_learning.py SCRIPT CASE SEED` runs one by hand and writes its curve to tests/results/.

For iris also: the tokenizer's image loss at its first and last update, and the share of tokens of following frames that
the world model finds likeliest and are right, against that of the most frequent token of each place."""

import csv
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path

import pytest
import torch
from conftest import ALGORITHMS, TESTS, load

pytestmark = pytest.mark.learning

QUIET = dict(device="cpu", eval_episodes=0, video_every=0, save_every=10**9)
FAST = dict(
    QUIET,
    size="size1m",
    image_size=16,
    batch_size=16,
    lr=3e-4,
    warmup=100,
    ent_coef=3e-3,
    total_timesteps=14_000,
    buffer_size=50_000,
)
FAST_V1 = dict(
    QUIET,
    deter=128,
    hidden=128,
    stoch=16,
    cnn_depth=8,
    units=64,
    batch_size=8,
    pretrain=50,
    train_every=20,
    train_steps=10,
    learning_starts=500,
    model_lr=1e-3,
    actor_lr=1e-4,
    critic_lr=3e-4,
    expl_noise=0.1,
    expl_eps=0.1,
    eval_every=0,
    buffer_size=50_000,
)
TRACK_V1 = dict(
    FAST_V1,
    env_id="envs:Track-v0",
    batch_length=12,
    imag_horizon=8,
    gamma=0.95,
    total_timesteps=30_000,
)
FAST_V2 = dict(
    QUIET,
    deter=128,
    hidden=128,
    stoch=32,
    classes=16,
    cnn_depth=8,
    layers=2,
    units=64,
    batch_size=16,
    train_every=2,
    learning_starts=500,
    kl_scale=0.3,
    slow_every=50,
    model_lr=4e-4,
    actor_lr=2e-4,
    critic_lr=3e-4,
    eval_every=0,
    buffer_size=50_000,
)
FAST_IRIS = dict(
    QUIET,
    image_size=32,
    epoch_steps=50,
    epoch_updates=50,
    learning_starts=100,
    world_starts=500,
    behaviour_starts=1_000,
    tokenizer_batch=32,
    batch_size=32,
    vocab_size=64,
    code_dim=32,
    channels=16,
    res_blocks=1,
    layers=2,
    heads=2,
    width=64,
    dropout=0.0,
    lstm_units=64,
    gamma=0.99,
    lr=3e-4,
    ent_coef=0.01,
    perceptual_loss="pixel",
    total_timesteps=6_000,
    extra_epochs=0,
    eval_every=0,
)
CASES = {  # script: {case: (threshold on the mean of 20 returns, flags)}; random play: -0.5, 6.5, 3.3, 22 and 0
    "dreamer_v1": dict(
        track=(20.0, TRACK_V1),
        track_contrastive=(20.0, dict(TRACK_V1, representation="contrastive")),
        catch=(
            0.8,
            dict(
                FAST_V1,
                env_id="envs:Catch-v0",
                batch_length=8,
                imag_horizon=8,
                pred_discount=True,
                kl_scale=0.1,
                total_timesteps=20_000,
            ),
        ),
    ),
    "dreamer_v2": dict(
        catch=(
            0.8,
            dict(
                FAST_V2,
                env_id="envs:Catch-v0",
                batch_length=7,
                imag_horizon=7,
                ent_coef="linear(5e-2,3e-3,6e3)",
                gamma=0.99,
                total_timesteps=14_000,
            ),
        ),
        track=(
            20.0,
            dict(
                FAST_V2,
                env_id="envs:Track-v0",
                batch_length=12,
                imag_horizon=8,
                ent_coef="1e-3",
                gamma=0.95,
                pred_discount=False,
                reward_transform="identity",
                prioritize_ends=False,
                total_timesteps=7_000,
            ),
        ),
    ),
    "dreamer_v3": dict(
        catch=(0.8, dict(FAST, env_id="envs:Catch-v0", batch_length=8, imag_horizon=7, train_ratio=64)),
        track=(
            20.0,
            dict(FAST, env_id="envs:Track-v0", batch_length=12, imag_horizon=8, train_ratio=64, total_timesteps=22_000),
        ),
        lock=(8.0, dict(FAST, env_id="envs:Lock-v0", batch_length=12, imag_horizon=8, train_ratio=64)),
        cartpole=(150.0, dict(FAST, env_id="CartPole-v1", batch_length=16, imag_horizon=15, train_ratio=128)),
    ),
    "iris": dict(
        catch=(0.9, dict(FAST_IRIS, env_id="envs:CatchSmall-v0", batch_length=4, imag_horizon=4, burn_in=1)),
    ),
}


class Reached(Exception):
    """The mean of the last 20 returns has passed the threshold."""


class TokenAccuracy:
    """Watches the updates of iris.py -> what its tokenizer and world model have learned."""

    def __init__(self, script):
        self.train_step, self.errors = script.train_step, []

    def __call__(self, part, agent, optimizers, replay, *args):
        self.agent, self.replay = agent, replay
        metrics = self.train_step(part, agent, optimizers, replay, *args)
        self.errors += [float(metrics["losses/image"])] if part == "tokenizer" else []
        return metrics

    @torch.no_grad()
    def result(self) -> dict[str, float]:
        world = self.agent.world
        self.replay.tokenize(self.agent)
        batch, mask = self.replay.sample(500, self.agent.args.batch_length, "tokens action")
        tokens = batch["tokens"].transpose(0, 1)
        guess = world.logits(tokens, batch["action"].long().T)[0].argmax(-1)
        guess = guess.roll(1, 1).unflatten(1, tokens.shape[1:])  # each output is about the following token
        right = guess[:, 1:] == tokens[:, 1:]
        valid = mask.T[:, 1:]
        frames = tokens[:, 1:][valid]
        return dict(first_image_loss=sum(self.errors[:10]) / 10, last_image_loss=sum(self.errors[-10:]) / 10,
                    token_accuracy=right[valid].float().mean().item(),
                    majority=(frames == frames.mode(0)[0]).float().mean().item())


def learn(script, threshold: float, flags: dict, run_dir: Path) -> tuple[list[tuple[int, float]], dict[str, float]]:
    """Train until the threshold is passed or the budget is used up -> curve of (policy steps, mean of 20 returns), and
    what TokenAccuracy found."""
    returns, curve, steps = deque(maxlen=20), [], 0
    tokens = TokenAccuracy(script) if hasattr(script, "PARTS") else None

    class Watch(script.Envs):
        def row(self, *args, **flags):
            nonlocal steps
            row = super().row(*args, **flags)
            steps += int((~row["is_first"]).sum())
            for ret in self.ret[row["is_last"]]:
                returns.append(float(ret))
                curve.append((steps, sum(returns) / len(returns)))
                if len(returns) == 20 and curve[-1][1] >= threshold:
                    raise Reached
            return row

    original, script.Envs = (script.Envs, script.train_step), Watch
    script.train_step = tokens or script.train_step
    kept = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        args = script.Args(**flags, run_dir=str(run_dir))
        script.check_args(args)
        script.main(args)
    except Reached:
        pass
    finally:
        script.Envs, script.train_step = original
        for number, handler in kept.items():
            signal.signal(number, handler)
    return curve, tokens.result() if tokens else {}


@pytest.mark.parametrize("name, case", [(name, case) for name in ALGORITHMS if name in CASES for case in CASES[name]])
def test_learns(name, case, tmp_path):
    threshold, flags = CASES[name][case]
    start = time.process_time()
    curve, found = learn(load(name), threshold, flags, tmp_path)
    best = max(mean for _, mean in curve[19:])
    print(
        f"{name} {case}: mean of 20 returns {best:.2f} after {curve[-1][0]} steps, {time.process_time() - start:.0f} s"
    )
    assert best >= threshold
    if found:
        print(text(found))
        assert found["last_image_loss"] < 0.2 * found["first_image_loss"]
        assert 1 - found["token_accuracy"] < 0.5 * (1 - found["majority"])


def text(found: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.3f}" for k, v in found.items())


if __name__ == "__main__":
    name, case, seed = sys.argv[1:4]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    threshold, flags = CASES[name][case]
    start, results = time.time(), TESTS / "results"
    curve, found = learn(
        load(name), threshold, dict(flags, seed=int(seed)), Path(sys.argv[4] if len(sys.argv) > 4 else "runs")
    )
    results.mkdir(exist_ok=True)
    with open(results / f"{name}_{case}_seed{seed}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["policy_steps", "mean_return_of_last_20_episodes"])
        writer.writerows((steps, round(mean, 3)) for steps, mean in curve)
    print(
        f"{name} {case} seed {seed}: {curve[-1][1]:.2f} (threshold {threshold}) after {curve[-1][0]} steps, "
        f"{(time.time() - start) / 60:.1f} min {text(found)}"
    )
