"""Breakages of the scripts, made in memory, each of which a test must see.

Each tests/test_<algorithm>.py ends with MUTATIONS: name -> (patch, test). `patch(monkeypatch, module)` replaces a
function by a broken one; then `test()`, which passes on the script as it is, must fail."""
import importlib

import pytest
from conftest import SCRIPTS, load

NAMES = [path.stem for path in SCRIPTS]
MUTATIONS = {name: importlib.import_module(f"test_{name}").MUTATIONS for name in NAMES}
CASES = [(script, name) for script in NAMES for name in MUTATIONS[script]]


@pytest.mark.parametrize("script", NAMES)
def test_a_script_has_breakages(script):
    assert len(MUTATIONS[script]) >= 6


@pytest.mark.parametrize("script, name", CASES)
def test_a_breakage_is_seen(script, name, monkeypatch):
    patch, test = MUTATIONS[script][name]
    test()
    patch(monkeypatch, load(script))
    with pytest.raises(AssertionError):
        test()
