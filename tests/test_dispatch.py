"""How many operations an update launches, counted without a GPU, and that none of them waits for a value on the host."""
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_gradients import V3, optimizer_of, random_replay
from torch.utils._python_dispatch import TorchDispatchMode

BATCH, LENGTH, SHAPES = 2, 64, {"image": (64, 64, 3)}
HOST_OPS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_consecutive", "unique_dim"}
HOST_METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")


class Count(TorchDispatchMode):
    """Counts aten calls that are not views, by phase and name; remembers those that read a tensor on the host."""

    def __init__(self):
        super().__init__()
        self.calls, self.phase, self.muted, self.host_reads = Counter(), "rest", False, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        masked = name in ("index", "index_put_", "_index_put_impl_") and any(x is not None and x.dtype == torch.bool for x in args[1])
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
    """RMSNorm and SiLU are one operation each, forward and backward, as the fused kernels of a GPU (the CPU takes a norm apart)."""

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

    monkeypatch.setattr(m.NormSiLU, "forward", lambda self, x: Norm.apply(m.at_least_float32(x), self.scale).to(x.dtype))


def make(m):
    torch.manual_seed(0)
    agent = m.Agent(SHAPES, 3, True, replace(m.Args(), size="size1m", precision="fp32", batch_size=BATCH, batch_length=LENGTH))
    return agent, optimizer_of(m, agent), random_replay(m, agent, SHAPES, LENGTH + 20, LENGTH)


def in_phase(mode, owner, name, monkeypatch):
    method = getattr(owner, name)

    def counted(*args, **kwargs):
        with mode.inside(phase=name):
            return method(*args, **kwargs)
    monkeypatch.setattr(owner, name, counted)


@V3
def test_dispatches_per_update(m, monkeypatch):
    """At most 7,500 operations for T = 64 and H = 15 (TorchRL: about 7,500 launches after compilation)."""
    mode, (agent, optimizer, replay) = Count(), make(m)
    count_norm_as_one(m, mode, monkeypatch)
    for owner, name in ((agent.world.rssm, "observe"), (agent.behaviour, "imagine"), (torch.Tensor, "backward"), (optimizer, "step")):
        in_phase(mode, owner, name, monkeypatch)
    m.train_step(agent, optimizer, replay, BATCH)  # everything that is made once
    mode.calls.clear()
    with mode:
        m.train_step(agent, optimizer, replay, BATCH)
    for phase in ("observe", "imagine", "backward", "step", "rest"):
        part = Counter({name: n for (p, name), n in mode.calls.items() if p == phase})
        print(f"{phase:9s} {part.total():5d}  " + ", ".join(f"{k} {n}" for k, n in part.most_common(14)))
    print(f"update    {mode.calls.total():5d}")
    assert mode.calls.total() <= 7_500


@V3
def test_dispatches_per_posterior_step(m, monkeypatch):
    """What one more step of the posterior costs: at most 40 operations forward."""
    mode, agent = Count(), make(m)[0]
    count_norm_as_one(m, mode, monkeypatch)
    rssm, totals = agent.world.rssm, {}
    for steps in (4, 5):
        zeros = torch.zeros(steps, BATCH, agent.world.encoder.tokens, requires_grad=True), torch.zeros(steps, BATCH, 3)
        state = torch.zeros(BATCH, rssm.deter), torch.zeros(BATCH, rssm.stoch * rssm.classes)
        noise = torch.ones(steps, BATCH, rssm.stoch, rssm.classes)
        for phase in ("forward", "backward"):
            mode.calls.clear()
            with mode:
                if phase == "forward":
                    outs = rssm.observe(*zeros, torch.zeros(steps, BATCH, dtype=torch.bool), *state, noise)
                else:
                    sum(x.sum() for x in outs).backward()
            totals[phase, steps] = mode.calls.copy()
    forward, backward = (totals[p, 5] - totals[p, 4] for p in ("forward", "backward"))
    for name, part in (("forward", forward), ("backward", backward)):
        print(f"posterior step {name}: {part.total()}  " + ", ".join(f"{k} {n}" for (_, k), n in part.most_common(20)))
    assert forward.total() <= 40


@V3
def test_no_host_reads(m, monkeypatch):
    """An update never waits for a value: none of its operations has a result on the host."""
    mode, (agent, optimizer, replay) = Count(), make(m)
    assert replay.queue  # the first update below also takes a sequence from the online queue
    for name in HOST_METHODS:
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} in an update"))
    with mode:
        metrics = m.train_step(agent, optimizer, replay, BATCH)
        m.train_step(agent, optimizer, replay, BATCH)
    monkeypatch.undo()
    assert not mode.host_reads
    assert all(torch.is_tensor(v) and v.shape == () and not v.requires_grad for v in metrics.values())
