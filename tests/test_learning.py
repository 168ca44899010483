"""Every script learns small tasks from scratch: run with `python -m pytest -m learning`.

A case trains with the script's own main() until the mean return of the last 20 episodes passes its threshold, then
stops as at SIGTERM, with a checkpoint. `python tests/test_learning.py SCRIPT CASE SEED [VARIANT]` runs one by hand and
writes its curve to tests/results/; `PYTHONPATH=tests python SCRIPT.py --resume runs/NAME --total-timesteps 1` shows
what it dreams.

For iris also: the tokenizer's image loss at its first and last update, and the share of tokens of following frames that
the world model finds likeliest and are right, against that of the most frequent token of each place."""

import csv
import math
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
    kl_scale=0.1,
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
FAST_TWM = dict(
    QUIET,
    frame_stack=1,
    learning_starts=600,
    pretrain_observation=16_000,
    pretrain_dynamics=20_000,
    pretrain_behaviour=5_000,
    train_every=1.5,
    batch_size=16,
    batch_length=8,
    latents=8,
    classes=8,
    cnn_depth=6,
    encoder_units=64,
    memory_length=8,
    layers=2,
    width=64,
    heads=2,
    head_dim=32,
    ff_units=128,
    dropout=0.0,
    head_layers=1,
    latent_units=64,
    scalar_units=64,
    imag_batch=64,
    imag_horizon=7,
    ac_layers=2,
    ac_units=64,
    model_lr=1e-3,
    actor_lr=1e-3,
    critic_lr=1e-3,
    eval_every=0,
    total_timesteps=12_000,
)
CASES = {  # script: {case: (threshold on the mean of 20 returns, flags)}; random play: see envs.py
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
                actor_lr=3e-5,
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
                ent_coef=1e-2,
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
                ent_coef=1e-3,
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
    "twm": dict(catch=(0.8, dict(FAST_TWM, env_id="envs:Catch-v0"))),
    "dllm": dict(
        errand=(
            0.8,
            dict(
                FAST,
                env_id="envs:Errand-v0",
                captioner=f"{TESTS / 'captions.py'}:ErrandCaptions",
                embedder="hashing",
                num_goals=1,
                goal_every=1,
                batch_size=8,
                batch_length=8,
                imag_horizon=6,
                train_ratio=32,
                language_loss="catxent",  # 1 step in 30 is an event: a squared error is long blind to it
                rnd_lr=1e-5,  # at 3e-4 four phrases are known exactly, and nothing is novel, after 350 updates
                gamma=0.97,
                lr=1e-3,
                warmup=50,
                total_timesteps=4_500,
            ),
        ),
    ),
}
VARIANTS = {  # for comparison only, by hand: they may fail to reach the threshold
    "": {},
    "reward": dict(representation="reward", total_timesteps=12_000),  # of dreamer_v1
    "without_goals": dict(intrinsic_scale=0.0),
    "random_goals": dict(captioner=f"{TESTS / 'captions.py'}:RandomGoals"),
}


class TokenAccuracy:
    """Watches the tokenizer's updates of iris.py -> what tokenizer and world model have learned."""

    def __init__(self, script):
        self.script = script
        self.train_tokenizer = script.train_tokenizer
        self.errors = []

    def __call__(self, agent, optimizers, replay, *args):
        self.agent = agent
        self.replay = replay
        metrics = self.train_tokenizer(agent, optimizers, replay, *args)
        self.errors.append(float(metrics["losses/image"]))
        return metrics

    @torch.no_grad()
    def result(self) -> dict[str, float]:
        world = self.agent.world
        self.replay.tokenize(self.agent)
        batch = self.replay.sample(500, self.agent.args.batch_length, "tokens action")
        tokens = batch["tokens"].transpose(0, 1)  # (B,T,K)
        logits, _, _ = world.logits(tokens, batch["action"].argmax(-1).T)
        guess = logits.argmax(-1).roll(1, 1).unflatten(1, tokens.shape[1:])  # each output is about the next token
        valid = batch["mask"].T[:, 1:]
        frames = tokens[:, 1:][valid]
        right = (guess[:, 1:] == tokens[:, 1:])[valid]
        return {
            "first_image_loss": sum(self.errors[:10]) / 10,
            "last_image_loss": sum(self.errors[-10:]) / 10,
            "token_accuracy": right.float().mean().item(),
            "majority": (frames == frames.mode(0)[0]).float().mean().item(),
        }


class LatentPrediction:
    """Watches the updates of twm.py -> how well its dynamics predict the latent, whose loss the published code leaves
    out, and the rewards of a scripted policy in new games of catch: two steps are seen, the other five dreamed. The
    policy goes to one of seven places and stays, wherever the ball is: actions alone say nothing about the reward."""

    def __init__(self, script):
        self.script, self.train_step, self.losses = script, script.train_step, []

    def __call__(self, agent, optimizer, replay, batch_size):
        self.agent = agent
        metrics = self.train_step(agent, optimizer, replay, batch_size)
        self.losses.append(float(metrics["losses/latent"]))
        return metrics

    @torch.no_grad()
    def result(self) -> dict[str, float]:
        agent, args, world = self.agent, self.agent.args, self.agent.world.eval()
        count = 140
        envs = self.script.make_envs(args, count, 9)  # seeds of its own
        games = [env.unwrapped for env in envs.envs.envs]
        row, state = envs.reset(), agent.initial(count)
        cache = world.dynamics.empty_cache(count, 7)
        begun = torch.zeros(2, count, dtype=torch.long)
        for t in range(7):
            state["stack"] = agent.push(row, state)
            if t < 2:
                latent = self.script.mode_latent(world.encoder(state["stack"] / 255))
                reward = torch.as_tensor(row["reward"]).tanh()
            way = torch.tensor([number % 7 - game.paddle for number, game in enumerate(games)])
            action = 1 + way.sign()
            hidden = world.dynamics.step(cache, t, latent, action, reward, begun)
            logits, reward, _ = world.dynamics.heads(hidden)
            latent = self.script.mode_latent(logits)
            row = envs.step(torch.nn.functional.one_hot(action, 3).numpy())
        caught = torch.as_tensor(row["reward"] > 0)
        greatest = args.latents * math.log(args.classes)
        return dict(
            latent_loss=sum(self.losses[-50:]) / 50 / greatest,
            # how often the dream of a catch has a higher last reward than that of a miss; by chance 0.5
            reward_order=(reward[caught][:, None] > reward[~caught]).float().mean().item(),
            reward_right=(reward.sign() == torch.as_tensor(row["reward"]).sign()).float().mean().item(),
            majority=(~caught).float().mean().item(),
        )


WATCHERS = dict(iris=(TokenAccuracy, "train_tokenizer"), twm=(LatentPrediction, "train_step"))


def learn(script, threshold: float, flags: dict, run_dir: Path) -> tuple[list[tuple[int, float]], dict[str, float]]:
    """Train until the threshold is passed or the budget is used up -> curve of (policy steps, mean of 20 returns), and
    what a watcher found."""
    returns = deque(maxlen=20)
    curve = []
    steps = 0
    reached = False
    original = script.Envs.row

    def row(self, *args, **options):
        nonlocal steps, reached
        made = original(self, *args, **options)
        steps += int((~made["is_first"]).sum())
        for ret in self.ret[made["is_last"]]:
            if not reached:
                returns.append(float(ret))
                curve.append((steps, sum(returns) / len(returns)))
            if not reached and len(returns) == 20 and curve[-1][1] >= threshold:
                reached = True
                signal.raise_signal(signal.SIGTERM)
        return made

    script.Envs.row = row
    watcher, watched = WATCHERS.get(script.__name__, (None, ""))
    if watcher:
        kept_update = getattr(script, watched)
        watcher = watcher(script)
        setattr(script, watched, watcher)
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    args = script.Args(**flags, run_dir=str(run_dir))
    script.check_args(args)
    try:
        script.main(args)
    finally:
        script.Envs.row = original
        if watcher:
            setattr(script, watched, kept_update)
        for number, handler in kept.items():
            signal.signal(number, handler)
    return curve, watcher.result() if watcher else {}


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
    print(text(found))
    if name == "twm":
        assert found["latent_loss"] < 0.25  # of that of chance
        assert found["reward_order"] > 0.7
    elif found:
        assert found["last_image_loss"] < 0.2 * found["first_image_loss"]
        assert 1 - found["token_accuracy"] < 0.5 * (1 - found["majority"])


def text(found: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.3f}" for k, v in found.items())


if __name__ == "__main__":
    name, case, seed = sys.argv[1:4]
    variant = sys.argv[4] if len(sys.argv) > 4 else ""
    run_dir = sys.argv[5] if len(sys.argv) > 5 else "runs"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    threshold, flags = CASES[name][case]
    start, results = time.process_time(), TESTS / "results"
    curve, found = learn(load(name), threshold, {**flags, **VARIANTS[variant], "seed": int(seed)}, Path(run_dir))
    results.mkdir(exist_ok=True)
    task = "_".join([name, case, *([variant] if variant else [])])
    with open(results / f"{task}_seed{seed}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["policy_steps", "mean_return_of_last_20_episodes"])
        writer.writerows((steps, round(mean, 3)) for steps, mean in curve)
    print(
        f"{task} seed {seed}: {curve[-1][1]:.2f} (threshold {threshold}) after {curve[-1][0]} steps, "
        f"{(time.process_time() - start) / 60:.1f} CPU-minutes {text(found)}"
    )
