"""How many operations an update launches, counted without a GPU, and that none waits for a value on the host."""
from collections import Counter
from contextlib import contextmanager

import pytest
import tiny as small
import torch
import torch.nn.functional as F
from benchmark import make_update
from conftest import SCRIPTS, load
from test_gradients import SHAPES as TINY_SHAPES
from test_gradients import V3, optimizer_of, random_replay, tiny
from torch.utils._python_dispatch import TorchDispatchMode

BATCH, LENGTH, SHAPES = 2, 64, {"image": (64, 64, 3)}
HOST_OPS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_consecutive"}
INDEXING = {"index", "index_put_", "_index_put_impl_"}
HOST_METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")


class Count(TorchDispatchMode):
    """Counts aten calls that are not views, by phase and name; remembers those that read a tensor on the host."""

    def __init__(self):
        super().__init__()
        self.calls, self.phase, self.muted, self.host_reads = Counter(), "rest", False, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        masked = name in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in HOST_OPS or masked:
            self.host_reads.append(name)
        if not self.muted and not func.is_view:
            self.calls[self.phase, name] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def inside(self, **values):
        before = {k: getattr(self, k) for k in values}
        vars(self).update(values)
        yield
        vars(self).update(before)


def count_norm_as_one(m, mode, monkeypatch):
    """Counts RMSNorm and SiLU as one operation each, forward and backward, as fused GPU kernels are."""

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, scale):
            ctx.save_for_backward(x, scale)
            mode.calls.update({(mode.phase, "rms_norm"): 1, (mode.phase, "silu"): 1})
            with mode.inside(muted=True):
                return F.silu(F.rms_norm(x, scale.shape, scale, 1e-4))

        @staticmethod
        def backward(ctx, grad):
            mode.calls.update({(mode.phase, "rms_norm_backward"): 1, (mode.phase, "silu_backward"): 1})
            with mode.inside(muted=True), torch.enable_grad():
                x, scale = (v.detach().requires_grad_() for v in ctx.saved_tensors)
                return torch.autograd.grad(F.silu(F.rms_norm(x, scale.shape, scale, 1e-4)), (x, scale), grad)

    def norm(self, x):
        return Norm.apply(m.at_least_float32(x), self.weight).to(x.dtype)

    monkeypatch.setattr(m.NormSiLU, "forward", norm)


def make(m, folder):
    torch.manual_seed(0)
    args = m.Args(size="size1m", precision="fp32", batch_size=BATCH, batch_length=LENGTH)
    agent = m.Agent(SHAPES, 3, True, args)
    return agent, optimizer_of(m, agent), random_replay(m, agent, SHAPES, LENGTH + 20, folder)


def show(mode, phases):
    """Print the counts by phase."""
    for phase in phases:
        part = Counter({name: n for (p, name), n in mode.calls.items() if p == phase})
        print(f"{phase:9s} {part.total():5d}  " + ", ".join(f"{k} {n}" for k, n in part.most_common(14)))
    print(f"update    {mode.calls.total():5d}")


def in_phase(mode, owner, name, monkeypatch):
    method = getattr(owner, name)

    def counted(*args, **kwargs):
        with mode.inside(phase=name):
            return method(*args, **kwargs)
    monkeypatch.setattr(owner, name, counted)


@V3
def test_dispatches_per_update(m, monkeypatch, tmp_path):
    """At most 7,500 operations for T = 64 and H = 15 (TorchRL: about 7,500 launches after compilation)."""
    mode, (agent, optimizer, replay) = Count(), make(m, tmp_path)
    count_norm_as_one(m, mode, monkeypatch)
    phases = dict(observe=agent.world.rssm, imagine=agent.behaviour, backward=torch.Tensor, step=optimizer)
    for name, owner in phases.items():
        in_phase(mode, owner, name, monkeypatch)
    m.train_step(agent, optimizer, replay, BATCH)  # everything that is made once
    mode.calls.clear()
    with mode:
        m.train_step(agent, optimizer, replay, BATCH)
    show(mode, [*phases, "rest"])
    assert mode.calls.total() <= 7_500


def posterior_step(agent, mode):
    """What one more step of the posterior costs going forward."""
    rssm, counts = agent.world.rssm, []
    for steps in (4, 5):
        tokens, action = torch.zeros(steps, BATCH, agent.world.encoder.tokens), torch.zeros(steps, BATCH, 3)
        state = torch.zeros(BATCH, rssm.deter), torch.zeros(BATCH, rssm.stoch * rssm.classes)
        mode.calls.clear()
        with mode:
            rssm.observe(tokens, action, torch.zeros(steps, BATCH, dtype=torch.bool), *state)
        counts.append(mode.calls.copy())
    step = counts[1] - counts[0]
    print(f"posterior step {step.total()}: " + ", ".join(f"{k} {n}" for (_, k), n in step.most_common()))
    return step.total()


@V3
def test_dispatches_per_posterior_step(m, monkeypatch, tmp_path):
    """What one more step of the posterior costs going forward: at most 40 operations."""
    mode, agent = Count(), make(m, tmp_path)[0]
    count_norm_as_one(m, mode, monkeypatch)
    assert 20 < posterior_step(agent, mode) <= 40


def check_no_host_reads(update, monkeypatch):
    """Run it twice under guard: no operation with a result on the host, no method that needs one."""
    mode = Count()

    def forbidden(*_):
        raise AssertionError("an update waits for a value")

    for name in HOST_METHODS:
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    with mode:
        metrics = update()
        update()
    monkeypatch.undo()
    assert not mode.host_reads
    assert all(torch.is_tensor(v) and v.shape == () and not v.requires_grad for v in metrics.values())


@V3
def test_no_host_reads(m, monkeypatch, tmp_path):
    """An update never waits for a value: none of its operations has a result on the host. And it leaves no history."""
    agent = tiny(m)
    optimizer, replay = optimizer_of(m, agent), random_replay(m, agent, TINY_SHAPES, 20, tmp_path)
    check_no_host_reads(lambda: m.train_step(agent, optimizer, replay, BATCH), monkeypatch)
    assert replay.online == 2  # the first update took sequences from the online queue
    assert not any(p.requires_grad for p in agent.behaviour.slow_critic.parameters()), "its graph grows for ever"


# ---- scripts that learn from episodes, in dreams of which each part has an optimiser of its own ----

EPISODES = pytest.mark.parametrize("m", ids=lambda m: m.__name__, argvalues=[
    load(path.stem) for path in SCRIPTS if hasattr(load(path.stem), "EpisodeReplay")])


@EPISODES
@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("actor_grad", ["reinforce", "dynamics", "both"])
def test_no_host_reads_with_any_gradient(m, discrete, actor_grad, monkeypatch):
    agent = small.agent(m, discrete, actor_grad=actor_grad, free_nats=0.1)
    update, _ = make_update(m, agent, small.IMAGE, agent.args, torch.device("cpu"))
    sample, kept = m.EpisodeReplay.sample, []  # which episodes it takes is found on the host, without a wait
    monkeypatch.setattr(m.EpisodeReplay, "sample", lambda *args: (kept or kept.append(sample(*args)) or kept)[0])
    update()
    check_no_host_reads(update, monkeypatch)


@EPISODES
@pytest.mark.parametrize("discrete, most", [(True, 4_500), (False, 6_200)])
def test_dispatches_of_an_update(m, discrete, most, monkeypatch):
    """For T = 50 and H = 15, by phase; continuous actions are learned through the dream's gradient."""
    mode, agent = Count(), small.agent(m, discrete, batch_length=50, imag_horizon=15, layers=4)
    update, _ = make_update(m, agent, small.IMAGE, agent.args, torch.device("cpu"))
    phases = dict(observe=agent.world.rssm, imagine=agent.behaviour, grad=torch.autograd, step=m.Adam)
    for name, owner in phases.items():
        in_phase(mode, owner, name, monkeypatch)
    update()  # everything that is made once
    mode.calls.clear()
    with mode:
        update()
    show(mode, [*phases, "rest"])
    assert mode.calls.total() <= most


@EPISODES
def test_dispatches_of_a_posterior_step(m):
    """What one more step of the posterior costs going forward: at most 30 operations."""
    assert 15 < posterior_step(small.agent(m), Count()) <= 30
