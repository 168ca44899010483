"""Text between `# ==== shared: NAME ====` and `# ==== end shared ====` is the same in every script that has it."""
import difflib
import re

import pytest
from conftest import SCRIPTS


def problems(files: dict[str, str]) -> list[str]:
    """Everything wrong with the shared blocks of {filename: text}, one message each."""
    found, blocks = [], {}  # block name -> {filename: text}
    for file, text in files.items():
        name = None
        for number, line in enumerate(text.split("\n"), 1):
            where = f"{file}:{number}"
            if start := re.fullmatch(r"# ==== shared: (\S|\S.*\S) ====", line):
                if name is not None:
                    found.append(f"{where}: {start[1]!r} starts inside {name!r}")
                name = start[1]
                if file in blocks.setdefault(name, {}):
                    found.append(f"{where}: duplicate {name!r}")
                blocks[name][file] = ""
            elif line == "# ==== end shared ====":
                if name is None:
                    found.append(f"{where}: an end without a start")
                name = None
            elif re.search(r"#\s*=+\s*(end\s*)?shared\b", line, re.IGNORECASE):
                found.append(f"{where}: malformed marker {line!r}")
            elif name is not None:
                blocks[name][file] += line + "\n"
        if name is not None:
            found.append(f"{file}: unclosed {name!r}")
    for name, copies in blocks.items():
        (first, text), *others = copies.items()
        for file, other in others:
            if other != text:
                diff = difflib.unified_diff(text.splitlines(), other.splitlines(), first, file, n=0, lineterm="")
                found.append(f"{name!r} differs\n" + "\n".join(diff))
        if not others and len(files) >= 7:
            found.append(f"{name!r} lives in {first} only")
    return found


def test_scripts():
    assert SCRIPTS, "no script found"
    found = problems({path.name: path.read_bytes().decode() for path in SCRIPTS})  # bytes: line endings count too
    assert not found, "\n".join(found)


START, END = "# ==== shared: a ====\n", "# ==== end shared ====\n"
GOOD = f"x = 1\n{START}y = 2\n{END}z = 3\n"


@pytest.mark.parametrize("files, message", [
    ([f"{START}# ==== shared: b ====\n{END}"], "f0:2: 'b' starts inside 'a'"),
    ([GOOD + GOOD], "f0:7: duplicate 'a'"),
    ([START + "y = 2\n"], "f0: unclosed 'a'"),
    (["y = 2\n" + END], "f0:2: an end without a start"),
    (["    " + START + END], "f0:1: malformed marker"),
    ([START.replace("====\n", "===\n") + END], "f0:1: malformed marker"),
    ([START + END.replace("\n", "  \n")], "f0:2: malformed marker"),
    ([GOOD.replace("\n", "\r\n")], "f0:2: malformed marker"),
    ([GOOD, GOOD.replace("y = 2", "y = 20")], "'a' differs"),
    ([GOOD, GOOD.replace("y = 2", "y = 2 ")], "'a' differs"),
    ([GOOD, GOOD.replace("y = 2", "y = 2\n")], "'a' differs"),
    ([GOOD, *[""] * 6], "'a' lives in f0 only"),
])
def test_checker_reports(files, message):
    found = problems({f"f{i}": text for i, text in enumerate(files)})
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize("files", [[GOOD], [GOOD, ""], [GOOD, GOOD, "x = 2\n"], [GOOD, GOOD.replace("x = 1", "x = 5")]])
def test_checker_accepts(files):
    assert problems({f"f{i}": text for i, text in enumerate(files)}) == []
