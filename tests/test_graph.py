"""Updates as CUDA graphs, simulated on the CPU: the same bits as without, and what a graph would silently miss."""

import inspect
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import SCRIPTS, load
from simulated_graph import Simulation, memory
from test_resume import differences, stop_after
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = [path.stem for path in SCRIPTS if hasattr(load(path.stem), "captured")]
each_script = pytest.mark.parametrize("name", NAMES)
# tiny runs in which every kind of update is made 20 times
MORE = {
    "dreamer_v1": dict(train_every=2, total_timesteps=50),
    "dreamer_v2": dict(train_every=2, total_timesteps=50),
    "dreamer_v3": dict(total_timesteps=60, warmup=10),  # the learning rate rises, then stays
}
COMMON = dict(env_id="test_resume:Ten-v0", eval_episodes=0, log_every=10**6, save_every=10**6)


def updates(script) -> list[str]:
    """Names of the updates that become graphs."""
    return [name for name, f in inspect.getmembers(script, inspect.isfunction)
            if name == "update" or name.startswith("update_")]


def run(name: str, folder, **changes) -> dict:
    """The checkpoint of a tiny run."""
    return tiny.checkpoint(tiny.run(name, folder, **{**COMMON, **MORE.get(name, {}), **changes}))


@pytest.fixture(scope="module")
def eager(tmp_path_factory) -> dict:
    """Checkpoints of runs without graphs, by script."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = run(name, tmp_path_factory.mktemp("eager") / name)
        return made[name]

    return get


@pytest.fixture
def simulation(monkeypatch):
    """A function that lets a script record graphs -> the simulation."""
    def install(name):
        simulation = Simulation()
        simulation.install(monkeypatch, load(name))
        return simulation

    return install


IGNORED = ("/life", "/args/run_dir", "/args/resume")


@each_script
def test_replays_equal_what_they_replace(name, eager, simulation, tmp_path, capfd):
    plain = eager(name)
    recorded = simulation(name)
    assert differences(run(name, tmp_path / "run"), plain, IGNORED) == []
    assert len(recorded.graphs) == len(updates(load(name)))
    assert min(graph.replays for graph in recorded.graphs) >= 17  # three come before
    assert "without a CUDA graph" not in capfd.readouterr().out


@each_script
def test_a_resumed_run_records_anew(name, eager, simulation, tmp_path):
    plain = eager(name)
    recorded = simulation(name)
    argv = tiny.flags(name, tmp_path, **{**COMMON, **MORE.get(name, {})})
    stop_after(name, argv, 30)
    (folder,) = tmp_path.iterdir()
    before = len(recorded.graphs)
    tiny.call(name, ["--resume", str(folder)])
    assert len(recorded.graphs) > before > 0
    assert differences(tiny.checkpoint(folder), plain, IGNORED) == []


# ---- what a replay cannot repeat ----


def read_on_the_host(grads, memo):
    if grads[0].sum().item() > 1e9:
        raise ValueError


def bring_from_the_host(grads, memo):
    grads[0].mul_(torch.tensor(1.0))


def count_in_python(grads, memo):
    memo["calls"] = memo.get("calls", 0) + 1
    grads[0].mul_(1 / memo["calls"])


def replace_a_state(grads, memo):
    memo["state"] = memo.get("state", torch.ones(())) / 2  # elsewhere than the last one
    grads[0].mul_(memo["state"])


def plant(patch, script, fault) -> None:
    """A fault in every update, where it averages its gradients."""
    memo = {}
    original = script.average_ranks

    def average_ranks(grads):
        original(grads)
        fault(grads, memo)

    patch.setattr(script, "average_ranks", average_ranks)


@pytest.mark.parametrize("fault", [count_in_python, replace_a_state])
@each_script
def test_what_only_python_remembers_is_noticed(name, fault, simulation, tmp_path, monkeypatch):
    saved = []
    for captured in (False, True):
        with monkeypatch.context() as patch:
            if captured:
                Simulation().install(patch, load(name))
            plant(patch, load(name), fault)
            saved.append(run(name, tmp_path / str(captured)))
    assert differences(*saved, ("/args",))


@pytest.mark.parametrize("fault", [read_on_the_host, bring_from_the_host])
@each_script
def test_a_recording_that_fails_is_one_line(name, fault, eager, simulation, tmp_path, monkeypatch, capfd):
    plain = eager(name)
    recorded = simulation(name)
    plant(monkeypatch, load(name), fault)
    saved = run(name, tmp_path / "run")
    assert not recorded.graphs
    lines = [line for line in capfd.readouterr().out.splitlines() if "without a CUDA graph" in line]
    assert len(lines) == len(updates(load(name)))
    assert all("not permitted when a stream is capturing" in line for line in lines)
    assert differences(saved, plain, IGNORED) == []


@each_script
def test_graphs_are_for_one_process_on_cuda(name, monkeypatch):
    script = load(name)
    agents = {
        (device, compile): SimpleNamespace(device=torch.device(device), args=SimpleNamespace(compile=compile))
        for device in ("cuda", "cpu", "mps") for compile in ("auto", "on", "off")}
    assert [case for case, agent in agents.items() if script.can_capture(agent)] == [("cuda", "auto"), ("cuda", "on")]
    monkeypatch.setattr(script.dist, "is_initialized", lambda: True)
    assert not any(script.can_capture(agent) for agent in agents.values())


# ---- torch.compile ----


@each_script
def test_what_cannot_be_compiled_runs_as_it_is(name, eager, tmp_path, monkeypatch, capfd):
    plain = eager(name)
    made = []

    def no_compiler(function, **options):
        made.append(function)

        def fail(*args):
            raise RuntimeError("no compiler\nwas found")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    saved = run(name, tmp_path / "run", compile="on")
    assert differences(saved, plain, ("/args",)) == []
    lines = [line for line in capfd.readouterr().out.splitlines() if line.endswith("is not compiled: no compiler")]
    assert len(lines) == len(made) > 0


# ---- bf16 ----


class Casts(TorchDispatchMode):
    """How often each matrix or kernel of the agent is cast to bf16."""

    def __init__(self, agent):
        super().__init__()
        trained = {name: p for name, p in agent.named_parameters() if p.dim() > 1 and p.requires_grad}
        self.names = {memory(p): name for name, p in trained.items()}
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            name = self.names.get(memory(args[0]))
            if name:
                self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@each_script
def test_weights_are_cast_once_per_loss(name, tmp_path, monkeypatch):
    """Not once per step of a loop: at most once in a context with gradient and once in one without."""
    script = load(name)
    names = updates(script)
    found = {}

    def watch(update):
        original = getattr(script, update)

        def call(agent, optimizer, batch):
            with Casts(agent) as casts:
                results = original(agent, optimizer, batch)
            found[update] = casts.counts
            return results

        monkeypatch.setattr(script, update, call)

    for update in names:
        watch(update)
    run(name, tmp_path / "run", precision="bf16")
    assert set(found) == set(names)
    for update, counts in found.items():
        assert counts and max(counts.values()) <= 2, (update, counts)


@each_script
def test_gradients_in_bf16_equal_those_of_weights_cast_in_each_step(name, tmp_path, monkeypatch):
    """Sums over the steps are then made in bf16. Both update from the same gradients, so that samples stay equal."""
    script = load(name)
    average_ranks = script.average_ranks
    autocast = script.Agent.autocast

    def uncached(agent):
        context = autocast(agent)
        return torch.autocast("cpu", torch.bfloat16, enabled=context._enabled, cache_enabled=False)

    def gradients(folder, given=None) -> list:
        """All gradients of all updates of a run, which goes on with those given instead."""
        found = []

        def watch(grads):
            average_ranks(grads)
            found.append([grad.clone() for grad in grads])
            if given:
                for grad, value in zip(grads, given[len(found) - 1]):
                    grad.copy_(value)

        monkeypatch.setattr(script, "average_ranks", watch)
        run(name, folder, precision="bf16")
        return found

    cached = gradients(tmp_path / "cached")
    monkeypatch.setattr(script.Agent, "autocast", uncached)
    plain = gradients(tmp_path / "plain", given=cached)
    assert len(cached) == len(plain) >= 20
    for a, b in zip(cached, plain):
        assert [bool(x.any()) for x in a] == [bool(x.any()) for x in b]
        a, b = (torch.cat([x.flatten() for x in grads]) for grads in (a, b))
        assert (a - b).norm() < 0.03 * b.norm()
