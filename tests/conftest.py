"""What all tests share: where the scripts are, how to import them, golden values, and the `learning` marker."""
import functools
import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
ALGORITHMS = ("dreamer_v1", "dreamer_v2", "dreamer_v3", "iris", "twm", "dllm", "genrl")
SCRIPTS = [path for path in (ROOT / f"{name}.py" for name in ALGORITHMS) if path.exists()]

if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))  # for `envs` in --env-id envs:Catch-v0
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "learning: trains until a task is learned; only with -m learning")
    config.option.markexpr = config.option.markexpr or "not learning"


@functools.cache
def load(name: str) -> ModuleType:
    """The script `name`.py as a module, executed once."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before execution: dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


def digest(path: Path) -> str:
    """Of a file's content: where CI is set, pytest explains in full, and for hours, how two long `bytes` differ."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    """Inputs and outputs of the official implementation's functions, from golden/`name`.npz."""
    with np.load(TESTS / "golden" / f"{name}.npz") as arrays:
        return dict(arrays)
