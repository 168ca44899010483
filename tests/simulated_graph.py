"""What a script uses of CUDA graphs, on the CPU. Operations are recorded with the memory they read and write; a replay
runs them again on the same memory. As on a GPU, recording computes nothing that lasts, values cannot be read on the
host nor come from there, and what Python does besides happens once."""

import contextlib
import gc
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# operations that wait for a value; the last ones check or count on the host, but only on CUDA
WAITING = {
    "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_dim",
    "unique_consecutive", "normal.Tensor_Tensor", "normal.float_Tensor", "multinomial"}
FRESH = {"lift_fresh", "lift_fresh_copy"}  # torch.tensor, torch.as_tensor, torch.from_numpy
TO_HOST = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__}


def tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def memory(x: torch.Tensor) -> int:
    """What tells the memory of one tensor from that of another."""
    return x.untyped_storage()._cdata


def refuse(func, args) -> None:
    """What a stream that is recorded does not permit."""
    name = func.name().removeprefix("aten::")
    masks = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)) else []
    masked = any(mask is not None and mask.dtype == torch.bool for mask in masks)
    if masked or not WAITING.isdisjoint({name, name.split(".")[0]}):
        raise RuntimeError(f"{name} is not permitted when a stream is capturing")
    if name.split(".")[0] in FRESH:
        raise RuntimeError("a value of the host is not permitted when a stream is capturing")


class HostCalls(TorchFunctionMode):
    """Refuses methods that reach the host without an operation, where the device is the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in TO_HOST:
            raise RuntimeError(f"{func.__name__} is not permitted when a stream is capturing")
        return func(*args, **(kwargs or {}))


class Graph(TorchDispatchMode):
    """torch.cuda.CUDAGraph."""

    def __init__(self):
        super().__init__()
        self.steps = []  # (operation, args, kwargs, what it returned)
        self.made = set()  # memory that came into being while recording
        self.before = {}  # other memory that was written to: as it was
        self.known = set()  # all other memory
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        refuse(func, args)
        for x in tensors((args, kwargs)):
            if x.dim() and memory(x) not in self.made and memory(x) not in self.known:  # x[[0, 1]], NumPy's arrays
                raise RuntimeError(f"{func} of a value of the host is not permitted when a stream is capturing")
        written = [arg.name for arg in func._schema.arguments if arg.alias_info and arg.alias_info.is_write]
        for argument, value in zip(func._schema.arguments, args):
            if argument.name in written:
                self.keep(value)
        self.keep([value for name, value in kwargs.items() if name in written])
        out = func(*args, **kwargs)
        known = {memory(x) for x in tensors((args, kwargs))}
        self.made |= {memory(x) for x in tensors(out)} - known
        detach = lambda x: x.detach() if isinstance(x, torch.Tensor) else x  # noqa: E731  not the graph of gradients
        self.steps.append((func, *tree_map(detach, (args, kwargs, out))))
        return out

    def keep(self, values) -> None:
        """Remember memory as it is before it is written to for the first time."""
        for x in tensors(values):
            if memory(x) not in self.made and memory(x) not in self.before:
                self.before[memory(x)] = (x.untyped_storage(), x.untyped_storage().clone())

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.steps:
            known = {memory(x) for x in tensors((args, kwargs))}
            fresh = [memory(x) not in known for x in tensors(out)]
            if not any(fresh) and not func._schema.is_mutable:
                continue  # a view
            again = func(*args, **kwargs)
            for x, value, new in zip(tensors(out), tensors(again), fresh):
                if new:
                    x.copy_(value)


class Simulation:
    """torch.cuda as far as the scripts record updates with it. `graphs`: all that were recorded to their end."""

    def __init__(self):
        self.graphs = []

    @contextlib.contextmanager
    def graph(self, graph: Graph, stream=None):
        """torch.cuda.graph: after an error, the random numbers are in disorder, and its end is another error."""
        state = torch.get_rng_state()
        graph.known = {memory(x) for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}
        try:
            with HostCalls(), graph:
                yield
        except RuntimeError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error
        finally:
            for storage, value in graph.before.values():
                storage.copy_(value)
        torch.set_rng_state(state)
        self.graphs.append(graph)

    def install(self, patch, script) -> None:
        """Let the script take the CPU for CUDA where it decides about graphs."""
        generator = SimpleNamespace(clone_state=torch.get_rng_state, graphsafe_set_state=torch.set_rng_state)
        stream = SimpleNamespace(wait_stream=lambda other: None)
        patch.setattr(script, "can_capture", lambda agent: agent.args.compile != "off")
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", self.graph)
        patch.setattr(torch.cuda, "Stream", lambda: stream)
        patch.setattr(torch.cuda, "current_stream", lambda: stream)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "default_generators", [generator])
