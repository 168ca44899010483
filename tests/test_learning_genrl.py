"""genrl.py from words to behaviour: run with `python -m pytest -m learning`.

One world model is learned from random play in envs.Goals, whose images do not show which corner is wanted. Then each
prompt makes a policy, in dreams, without any reward from the environment. It is scored in all four corners: the mean
return of random play is 1.6 in each, the best possible one 29.0.
`python tests/test_learning_genrl.py SEED [FOLDER]` runs all four prompts, with the whole algorithm, without the aligner
and without alignment in time, on one world model, and writes the curves to tests/results/."""
import csv
import signal
import sys
import time
from pathlib import Path

import envs
import gymnasium
import pytest
import torch
from conftest import TESTS, load

pytestmark = pytest.mark.learning
CORNERS = list(envs.Goals.CORNERS)
IDS = {corner: f"Goals-{corner.replace(' ', '')}-v0" for corner in CORNERS}
for corner, name in IDS.items():
    gymnasium.register(name, entry_point=envs.Goals, kwargs=dict(corner=corner))

FLAGS = dict(
    env_id=IDS["top left"],
    vlm=f"{TESTS / 'goal_words.py'}:GoalWords",
    device="cpu",
    action_repeat=1,
    collect_policy="random",
    total_timesteps=10_000,
    hidden=128,
    stoch=8,
    classes=16,
    cnn_depth=8,
    layers=2,
    batch_size=16,
    batch_length=16,
    pretrain_updates=600,
    policy_batch_size=16,
    policy_batch_length=8,
    policy_updates=200,
    model_lr=1e-3,
    actor_lr=3e-4,
    critic_lr=1e-3,
    slow_every=20,
    video_every=0,
    save_every=10**9,
    eval_episodes=16,
    eval_every=50,
)


def follow(script, run_dir: Path, prompts: list[str], **changes) -> dict[str, list[tuple[int, dict]]]:
    """One world model, then a policy for each prompt -> {prompt: [(policy updates, {corner: mean return}), ...]}.
    A world model that is there is used again."""
    curves = {}
    original = script.evaluate

    def evaluate(agent, args, stop):
        scores = {}
        for corner, name in IDS.items():
            results = original(agent, script.replace(args, env_id=name), stop)
            scores[corner] = results["eval/episodic_return"]
        curves.setdefault(args.prompt, []).append((int(agent.behaviour.updates), scores))
        return results

    script.evaluate = evaluate
    kept = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        for prompt in prompts:
            args = script.Args(**{**FLAGS, "run_dir": str(run_dir), "prompt": f"the light is at the {prompt}", **changes})
            args.resume = str(next(run_dir.glob("*"), ""))
            script.check_args(args)
            script.main(args)
    finally:
        script.evaluate = original
        for number, handler in kept.items():
            signal.signal(number, handler)
    return dict(zip(prompts, curves.values()))


def test_prompts_lead_to_their_corners(tmp_path):
    curves = follow(load("genrl"), tmp_path, ["top left", "bottom right"])
    for prompt, curve in curves.items():
        scores = curve[-1][1]
        print(prompt, scores)
        others = [score for corner, score in scores.items() if corner != prompt]
        assert scores[prompt] >= 18
        assert max(others) <= 9


def without_aligner(script):
    """It is trained, but the prompt does not go through it."""
    forward = script.Aligner.forward
    script.Aligner.forward = lambda self, embed: forward(self, embed) if torch.is_grad_enabled() else embed


def write_curves(name: str, curves: dict) -> None:
    with open(TESTS / "results" / f"{name}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "policy_updates", *CORNERS])
        for prompt, curve in curves.items():
            for updates, scores in curve:
                writer.writerow([prompt, updates, *(round(scores[corner], 2) for corner in CORNERS)])
                print(prompt, updates, scores, flush=True)


if __name__ == "__main__":
    seed = int(sys.argv[1])
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else "runs") / f"goals{seed}"
    genrl = load("genrl")
    start = time.process_time()
    for variant in ("", "without_aligner_", "without_alignment_"):
        original = genrl.Aligner.forward
        if variant == "without_aligner_":
            without_aligner(genrl)
        align = "none" if variant == "without_alignment_" else "sequence"
        curves = follow(genrl, folder, CORNERS, seed=seed, align=align)
        genrl.Aligner.forward = original
        write_curves(f"genrl_goals_{variant}seed{seed}", curves)
        print(f"{(time.process_time() - start) / 60:.1f} CPU-minutes", flush=True)
