"""Where a script departs from its predecessor the code has a tag `# D<number>`; the docstring lists exactly those."""
import ast
import re
from difflib import SequenceMatcher

import pytest
from conftest import ROOT, SCRIPTS

CHAIN = ("dreamer_v1", "dreamer_v2", "dreamer_v3", "dllm")
PAIRS = [pair for pair in zip(CHAIN, CHAIN[1:]) if all((ROOT / f"{name}.py").exists() for name in pair)]


def own_lines(text: str) -> dict[int, str]:
    """Line number -> line, without the module docstring, the Args dataclass and the shared blocks."""
    body, skipped, shared = ast.parse(text).body, set(), False
    for node in body:
        if (node is body[0] and isinstance(node, ast.Expr)) or getattr(node, "name", None) == "Args":
            skipped.update(range(node.lineno, node.end_lineno + 1))
    for number, line in enumerate(text.split("\n"), 1):
        shared = shared or line.startswith("# ==== shared:")
        if shared:
            skipped.add(number)
        shared = shared and line != "# ==== end shared ===="
    return {number: line for number, line in enumerate(text.split("\n"), 1) if number not in skipped}


def tags(line: str) -> list[str]:
    """`x = 1  # D3, D5: why` has D3 and D5."""
    return [tag for match in re.findall(r"# (D\d+(?:, D\d+)*)\b", line) for tag in match.split(", ")]


def list_problems(text: str) -> list[str]:
    """Differences between the docstring's delta list and the tags of the code. The list is what starts with D<number>:
    lines, and in such lines further columns, which begin after two spaces."""
    lines = (ast.get_docstring(ast.parse(text)) or "").split("\n")
    names = [n for line in lines if re.match(r"\s*D\d", line) for n in re.findall(r"(?:^|\s\s)\s*(D\d+)\b", line)]
    used = {tag for line in own_lines(text).values() for tag in tags(line)}
    return ([f"{tag} is listed twice" for tag in sorted(set(names)) if names.count(tag) > 1]
            + [f"{tag} is listed but not in the code" for tag in sorted(set(names) - used)]
            + [f"{tag} is in the code but not listed" for tag in sorted(used - set(names))])


def untagged(old: str, new: str) -> list[str]:
    """Hunks of `new` against `old` that have no tag on the first line or the three lines above it.

    The first line of a deletion is the one after it. Blank lines and tags are no difference (each script numbers its
    own). Changes at most two lines apart are one hunk, as in `diff -U1`."""
    code = [{n: plain for n, line in own_lines(text).items() if (plain := re.sub(r"\s*# D\d.*", "", line)).strip()}
            for text in (old, new)]
    before, after, numbers = list(code[0].values()), list(code[1].values()), list(code[1])
    own, found = own_lines(new), []
    for group in SequenceMatcher(None, before, after, autojunk=False).get_grouped_opcodes(1):
        kind, i1, i2, j1, j2 = next(op for op in group if op[0] != "equal")
        side, i, j = (after, j1, j2) if kind == "insert" else (before, i1, i2)
        while kind != "replace" and j < len(side) and side[i] == side[j]:  # of equal positions the last, as git does:
            i, j, j1 = i + 1, j + 1, j1 + 1  # a new function starts at its def, not at the return of the one above
        first = numbers[j1] if j1 < len(numbers) else max(own) + 1
        if not any(tags(own.get(n, "")) for n in range(first - 3, first + 1)):
            found.append(f"line {first}: {'deleted ' + before[i] if kind == 'delete' else after[j1]}")
    return found


@pytest.mark.parametrize("old, new", PAIRS)
def test_every_hunk_is_tagged(old, new):
    found = untagged(*((ROOT / f"{name}.py").read_text() for name in (old, new)))
    assert not found, f"{new}.py against {old}.py, hunks without a tag:\n" + "\n".join(found)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_docstring_lists_the_tags(path):
    assert list_problems(path.read_text()) == []


OLD = '''"""Old."""
@dataclass
class Args:
    lr: float = 1.0
# ==== shared: a ====
x = 1
# ==== end shared ====
def f(x):
    y = x + 1
    return y
def g(x):
    y = x * 2
    return y
def h(x):
    z = x - 1
    z = z * z
    return z
'''


@pytest.mark.parametrize("change, count", [
    (("y = x + 1", "y = x + 2"), 1),
    (("y = x + 1", "y = x + 2  # D1"), 0),
    (("y = x + 1", "y = x + 2  # D1, D2: why"), 0),
    (("y = x + 1", "y = x + 1  # D7"), 0),  # nothing but a tag
    (("y = x + 1", "\n\n    y = x + 1"), 0),
    (("    y = x + 1", "    # D1\n\n\n    y = x + 2"), 0),  # three lines above
    (("    y = x + 1", "    # D1\n\n\n\n    y = x + 2"), 1),  # four lines above
    (("y = x + 1", "y = x + 2\n    y = x + 3  # D1"), 1),  # not on the first line
    (("    y = x + 1\n", ""), 1),
    (("    y = x + 1\n    return y", "    return y  # D1"), 0),
    (("    z = z * z\n    return z\n", ""), 1),
    (("def h(x):", "def new(x):\n    y = x / 2\n    return y\ndef h(x):"), 1),
    (("def h(x):", "def new(x):  # D1\n    y = x / 2\n    return y\ndef h(x):"), 0),
    (("def g(x):\n    y = x * 2\n    return y\ndef h(x):", "def h(x):  # D1"), 0),
    (('"""Old."""', '"""New."""'), 0),
    (("lr: float = 1.0", "lr: float = 2.0\n    b: int = 3"), 0),
    (("x = 1\n#", "x = 3\n#"), 0),  # shared
    (("@dataclass", "import os\n@dataclass"), 1),
])
def test_untagged(change, count):
    assert OLD.count(change[0]) == 1
    assert len(untagged(OLD, OLD.replace(*change))) == count


def test_untagged_reports_each_hunk():
    new = OLD.replace("y = x + 1", "y = x + 2  # D1").replace("z = x - 1", "z = x - 2").replace("z * z", "z * z + 1")
    assert untagged(OLD, new) == ["line 15:     z = x - 2"]


DOC = '"""Doc.\n\nDelta\n    D1  one, not D9    D10 two columns\n    D2  three\n"""\n'


@pytest.mark.parametrize("text, expected", [
    (DOC + "x = 1  # D1, D10\ny = 2  # D2: why\nz = 3  # D2\n", []),
    (DOC + "x = 1  # D1\ny = 2  # D2\n", ["D10 is listed but not in the code"]),
    (DOC + "x = 1  # D1, D10\ny = 2  # D2, D3\n", ["D3 is in the code but not listed"]),
    (DOC + "class Args:\n    x = 1  # D1\n# ==== shared: a ====\ny = 2  # D2\n# ==== end shared ====\nz = 3  # D10\n",
     ["D1 is listed but not in the code", "D2 is listed but not in the code"]),
    (DOC.replace("D10", "D1") + "x = 1  # D1\ny = 2  # D2\n", ["D1 is listed twice"]),
    ('"""No list."""\nx = 1\n', []),
    ("x = 1  # D1\n", ["D1 is in the code but not listed"]),
])
def test_list_problems(text, expected):
    assert list_problems(text) == expected
