"""What happens in envs.Errand, in words: `--captioner tests/captions.py:ErrandCaptions`."""
import numpy as np


class ErrandCaptions:
    """Four goals without a word in common, and which of them is next."""

    goal_phrases = ("fetch bucket", "fill water", "feed horse", "ride home")
    rules = "A bucket, a well, a horse and the way home, one after the other."
    threshold = 0.7

    def __init__(self, env):
        self.env = env
        self.happened = set()

    def transition(self, action, reward: float, terminal: bool, info: dict) -> str:
        before = 0 if action is None else self.done
        self.done = self.env.done
        if self.done > before:
            return self.goal_phrases[before]
        if action is None or action == 1:
            return "stand still"
        return "walk left" if action == 0 else "go right"

    def state(self) -> str:
        return f"Things done: {self.done}."

    def goals(self, count: int) -> list[str]:
        """The next thing to do."""
        return [phrase for phrase in self.goal_phrases if phrase not in self.happened][:count]


class RandomGoals(ErrandCaptions):
    """Phrases at random instead."""

    def goals(self, count: int) -> list[str]:
        return list(np.random.choice(self.goal_phrases, count, replace=False))
