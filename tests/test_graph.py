"""Updates as CUDA graphs, simulated on the CPU: the same bits as without, and what a graph would silently miss.
Weights in bf16: cast once."""

import copy
import inspect
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import SCRIPTS, load
from simulated_graph import Graph, Simulation, memory
from test_resume import differences, stop_after
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = [path.stem for path in SCRIPTS]
each_script = pytest.mark.parametrize("name", NAMES)
# tiny runs in which every kind of update is made at least 20 times
COMMON = dict(env_id="test_resume:Ten-v0", eval_episodes=0, log_every=10**6, save_every=10**6)
MORE = {
    "dreamer_v1": dict(train_every=2, total_timesteps=50),
    "dreamer_v2": dict(train_every=2, total_timesteps=50),
    "dreamer_v3": dict(train_ratio=24.0, total_timesteps=30, warmup=10),  # the learning rate rises, then stays
    "dllm": dict(train_ratio=24.0, total_timesteps=30, warmup=10),
    "genrl": dict(train_every=2, total_timesteps=60, pretrain_updates=20, policy_updates=20),
    "iris": dict(total_timesteps=30, epoch_updates=2),
    "twm": dict(train_every=2.0, total_timesteps=50),
}
IGNORED = ("/life", "/args/run_dir", "/args/resume")


def run(name: str, folder, **changes) -> dict:
    """The checkpoint of a tiny run."""
    return tiny.checkpoint(tiny.run(name, folder, **{**COMMON, **MORE.get(name, {}), **changes}))


@pytest.fixture(autouse=True, scope="module")
def adam_as_on_cuda():
    """torch's own Adam reads its counter on the host, unless it is capturable, which it refuses to be on a CPU. Nor
    is it copied with all that belongs to it."""
    make = torch.optim.Adam.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "__init__", lambda *args, **named: make(*args, **{**named, "capturable": True}))
        patch.setattr(torch.compiler, "is_compiling", lambda: True)  # then it does not ask for the device
        patch.setattr(torch.optim.Optimizer, "__getstate__", lambda optimizer: dict(vars(optimizer)))
        yield


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """A function of a script's name -> the checkpoint of a run without graphs, and of every update in it
    (agent, optimizer, batch) as they were before the first."""
    made = {}

    def get(name):
        if name in made:
            return made[name]
        script = load(name)
        captured = script.captured
        firsts = {}

        def record(update, *args):
            if update not in firsts:
                firsts[update] = copy.deepcopy(args)
            return captured(update, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "captured", record)
            made[name] = run(name, tmp_path_factory.mktemp("eager") / name), firsts
        return made[name]

    return get


@pytest.fixture
def simulate(monkeypatch):
    """A function that lets a script record graphs -> the simulation."""
    def install(name):
        simulation = Simulation()
        simulation.install(monkeypatch, load(name))
        return simulation

    return install


# ---- whole runs ----


@each_script
def test_every_update_can_become_a_graph(name, eager):
    _, firsts = eager(name)
    functions = inspect.getmembers(load(name), inspect.isfunction)
    assert {update.__name__ for update in firsts} == {
        key for key, _ in functions if key == "update" or key.startswith("update_")}


@each_script
def test_replays_equal_what_they_replace(name, eager, simulate, tmp_path, capfd):
    plain, firsts = eager(name)
    simulation = simulate(name)
    saved = run(name, tmp_path / "run")
    assert differences(saved, plain, IGNORED) == []
    assert len(simulation.graphs) == len(firsts)
    assert min(graph.replays for graph in simulation.graphs) >= 17  # three ordinary ones come before
    assert "without a CUDA graph" not in capfd.readouterr().out


@each_script
def test_a_resumed_run_records_anew(name, eager, simulate, tmp_path):
    plain, _ = eager(name)
    simulation = simulate(name)
    stop_after(name, tiny.flags(name, tmp_path, **{**COMMON, **MORE.get(name, {})}), 20)
    (folder,) = tmp_path.iterdir()
    before = len(simulation.graphs)
    tiny.call(name, ["--resume", str(folder)])
    assert len(simulation.graphs) > before > 0
    assert differences(tiny.checkpoint(folder), plain, IGNORED) == []


@pytest.mark.parametrize("name", [name for name in NAMES if name not in tiny.DISCRETE_ONLY])
def test_continuous_actions_can_be_recorded(name, simulate, tmp_path, capfd):
    simulation = simulate(name)
    more = dict(pretrain_updates=5, policy_updates=5) if name == "genrl" else {}
    tiny.run(name, tmp_path, env_id="envs:Track-v0", total_timesteps=60, eval_episodes=0, log_every=10**6, **more)
    assert simulation.graphs
    assert "without a CUDA graph" not in capfd.readouterr().out


@each_script
def test_each_set_of_shapes_has_a_graph(name, simulate):
    simulation = simulate(name)
    script = load(name)
    agent = SimpleNamespace(graphs={}, args=SimpleNamespace(compile="auto"), zero_grad=lambda: None)

    def update(agent, optimizer, batch):
        return batch["x"] * 2

    for step in range(6):
        for size in (2, 5):
            x = torch.arange(size) + step
            assert torch.equal(script.captured(update, agent, None, dict(x=x)), 2 * x)
    assert [graph.replays for graph in simulation.graphs] == [3, 3]


@each_script
def test_graphs_are_for_one_process_on_cuda(name, monkeypatch):
    script = load(name)
    agents = {
        (device, compile): SimpleNamespace(device=torch.device(device), args=SimpleNamespace(compile=compile))
        for device in ("cuda", "cpu", "mps") for compile in ("auto", "on", "off")}
    assert [case for case, agent in agents.items() if script.can_capture(agent)] == [("cuda", "auto"), ("cuda", "on")]
    monkeypatch.setattr(script.dist, "is_initialized", lambda: True)
    assert not any(script.can_capture(agent) for agent in agents.values())


@each_script
def test_what_cannot_be_compiled_runs_as_it_is(name, eager, tmp_path, monkeypatch, capfd):
    plain, _ = eager(name)
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


# ---- what a graph cannot repeat, planted where an update averages its gradients ----


def repeat(name: str, firsts: dict, count: int = 8, fault=None) -> dict:
    """All that each kind of update has changed after `count` of them, from the first one's state."""
    script = load(name)
    changed = {}
    for update, first in firsts.items():
        agent, optimizer, batch = copy.deepcopy(first)
        memo = {}
        average_ranks = script.average_ranks

        def planted(grads):
            average_ranks(grads)
            if fault:
                fault(grads, memo)

        torch.manual_seed(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "average_ranks", planted)
            for _ in range(count):
                script.captured(update, agent, optimizer, batch)
        state = dict(agent=agent.state_dict(), optimizer=optimizer.state_dict(), rng=torch.get_rng_state())
        changed[update.__name__] = copy.deepcopy(state)
    return changed


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


@pytest.mark.parametrize("fault", [count_in_python, replace_a_state])
@each_script
def test_what_only_python_remembers_is_noticed(name, fault, eager, simulate):
    _, firsts = eager(name)
    plain = repeat(name, firsts, fault=fault)
    simulate(name)
    replayed = repeat(name, firsts, fault=fault)
    for update, state in plain.items():
        assert differences(replayed[update], state, ()), update


@pytest.mark.parametrize("fault", [read_on_the_host, bring_from_the_host])
@each_script
def test_a_recording_that_fails_is_one_line(name, fault, eager, simulate, capfd):
    _, firsts = eager(name)
    plain = repeat(name, firsts)
    simulation = simulate(name)
    capfd.readouterr()
    replayed = repeat(name, firsts, fault=fault)
    assert not simulation.graphs
    assert differences(replayed, plain, ()) == []
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == len(firsts)
    for line in lines:
        assert "without a CUDA graph: " in line and "not permitted when a stream is capturing" in line


# ---- the simulation itself ----


@pytest.mark.parametrize("forbidden", [
    lambda x: x[0].item(),
    lambda x: x.tolist(),
    lambda x: x.cpu(),
    lambda x: x.numpy(),
    lambda x: bool(x[0] > 0),
    lambda x: x[x > 0],
    lambda x: x.nonzero(),
    lambda x: x[[0, 2]],
    lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    lambda x: x * torch.ones(3).numpy(),
    lambda x: torch.normal(x, x.abs()),
])
def test_the_simulation_refuses_what_cuda_would(forbidden):
    x = torch.arange(3.0)
    with pytest.raises(RuntimeError) as error:
        with Simulation().graph(Graph()):
            forbidden(x)
    assert "not permitted when a stream is capturing" in str(error.value.__cause__)


def test_a_simulated_recording_computes_nothing_and_a_replay_all():
    state, batch, graph, simulation = torch.zeros(3), torch.ones(3), Graph(), Simulation()
    torch.manual_seed(1)
    with simulation.graph(graph):
        state[:2].add_(batch[:2]).mul_(2)
        noise = torch.rand(3)
        result = (state + batch).sum() + 0 * noise.sum()
    assert state.tolist() == [0, 0, 0]
    torch.manual_seed(1)
    for state_then, result_then in (([2, 2, 0], 7), ([6, 6, 0], 15)):
        graph.replay()
        before = noise.clone()
        assert state.tolist() == state_then and result == result_then
    graph.replay()
    assert not torch.equal(noise, before)
    batch.fill_(0)
    graph.replay()
    assert state.tolist() == [28, 28, 0]
    torch.manual_seed(1)
    torch.rand(3), torch.rand(3), torch.rand(3)
    assert torch.equal(noise, torch.rand(3))


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


def in_bf16(first: tuple) -> tuple:
    agent, optimizer, batch = copy.deepcopy(first)
    agent.args.precision = "bf16"
    return agent, optimizer, batch


@each_script
def test_weights_are_cast_once_per_loss(name, eager):
    """Not once per step of a loop: at most once with gradient and once without, for each time they change."""
    _, firsts = eager(name)
    for update, first in firsts.items():
        agent, optimizer, batch = in_bf16(first)
        with Casts(agent) as casts:
            load(name).captured(update, agent, optimizer, batch)
        assert casts.counts and max(casts.counts.values()) <= 2, (update, casts.counts)


@each_script
def test_gradients_in_bf16_equal_those_of_weights_cast_in_each_step(name, eager, monkeypatch):
    """But for the sum over the steps, which is made in bf16. Both update with the same gradients, so that samples of
    later losses stay the same."""
    script = load(name)
    _, firsts = eager(name)
    autocast = script.Agent.autocast
    average_ranks = script.average_ranks

    def uncached(agent):
        assert autocast(agent).fast_dtype == torch.bfloat16
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)

    def gradients(update, first, given=None) -> list:
        found = []

        def watch(grads):
            average_ranks(grads)
            found.append([grad.clone() for grad in grads])
            if given:
                for grad, value in zip(grads, given[len(found) - 1]):
                    grad.copy_(value)

        torch.manual_seed(1)
        with monkeypatch.context() as patch:
            patch.setattr(script, "average_ranks", watch)
            if given:
                patch.setattr(script.Agent, "autocast", uncached)
            script.captured(update, *in_bf16(first))
        return found

    for update, first in firsts.items():
        cached = gradients(update, first)
        plain = gradients(update, first, given=cached)
        assert len(cached) == len(plain) > 0
        for a, b in zip(cached, plain):
            assert [bool(x.any()) for x in a] == [bool(x.any()) for x in b]
            a, b = (torch.cat([x.flatten() for x in grads]) for grads in (a, b))
            assert (a - b).norm() < 0.03 * b.norm()
