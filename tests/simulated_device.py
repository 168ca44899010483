"""`python simulated_device.py SCRIPT flags`: run a script on a device that is made of CPU memory.

For machines without a GPU: like one, it refuses operations on tensors of two devices and `numpy` of its own tensors,
which a run on the CPU cannot notice."""
import sys

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}  # a CPU index is allowed


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


class OnDevice(torch.Tensor):
    """A tensor of the device; `inner` is its memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device("simulated", 0))
        self.inner = inner
        return self

    def tolist(self):
        return self.inner.tolist()

    def __format__(self, spec):
        return format(self.inner, spec)

    def __reduce_ex__(self, protocol):
        return self.inner.detach().__reduce_ex__(protocol)  # torch.save

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class Simulated(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def lstm_cell(self, x, state):
    """nn.LSTMCell.forward; on a GPU it is one kernel that the CPU does not have."""
    h, cell = state
    i, f, g, o = (F.linear(x, self.weight_ih, self.bias_ih) + F.linear(h, self.weight_hh, self.bias_hh)).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def gru_cell(self, x, hidden):
    """nn.GRUCell.forward, likewise."""
    reset_x, update_x, new_x = F.linear(x, self.weight_ih, self.bias_ih).chunk(3, -1)
    reset_h, update_h, new_h = F.linear(hidden, self.weight_hh, self.bias_hh).chunk(3, -1)
    update = (update_x + update_h).sigmoid()
    new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
    return (1 - update) * new + update * hidden


def dispatch(func, args, kwargs):
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    here, device = [x for x in tensors if isinstance(x, OnDevice)], kwargs.get("device")
    other = [x for x in (args[::2] if func in INDEXING else tensors)
             if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice) and x.dim()]
    if here and other and func not in COPIES:
        raise RuntimeError(f"{func} got tensors of two devices")
    to_here = bool(here) if device is None else torch.device(device).type == "simulated"
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x, (args, kwargs))
    if device is not None:
        kwargs["device"] = "cpu"
    out = func(*args, **kwargs)
    if func is aten._to_copy.default and out is args[0]:
        out = out.clone()
    known = {id(x.inner): x for x in here}  # what was changed in place is returned itself

    def wrap(x):
        return known.get(id(x), OnDevice(x)) if isinstance(x, torch.Tensor) and to_here else x

    return tree_map(wrap, out)


def main(name: str, argv: list[str]) -> None:
    from conftest import load

    _setup_privateuseone_for_python_backend("simulated", Backend())
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...)
    script = load(name)
    make = script.Storage.__init__

    def on_device(self, specs, capacity, num_envs, folder, device, **more):
        """As on a GPU that has room for a copy."""
        make(self, specs, capacity, num_envs, folder, device, **more)
        self.device = device
        self.data = {k: v.to(device) for k, v in self.data.items()}

    script.Storage.__init__ = on_device
    torch.nn.LSTMCell.forward = lstm_cell
    torch.nn.GRUCell.forward = gru_cell
    with Simulated():
        script.main(script.parse_args([*argv, "--device=simulated"]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
