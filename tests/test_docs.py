"""What README and docstrings say is true: commands parse, tables agree with the code; and scripts keep to their form.

The README holds, as Markdown tables: the files (each row links its script; columns Lines and Parameters); under a
heading with the word Flags a row per flag, with a column per script whose heading is the script's name and whose cell
is the default, empty where the script has no such flag; under a heading with the word Metrics rows whose first cell
lists keys and whose column Scripts names the scripts that write them, empty for all."""
import ast
import dataclasses
import fnmatch
import math
import re
import shlex
import tokenize
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT, SCRIPTS, load

NAMES = [path.stem for path in SCRIPTS]
each_script = pytest.mark.parametrize("name", NAMES)


def readme() -> str:
    return (ROOT / "README.md").read_text()


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


def definitions(name: str, kinds=(ast.FunctionDef, ast.ClassDef)) -> list:
    return [node for node in ast.walk(ast.parse(source(name))) if isinstance(node, kinds)]


# ---- commands ----


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, arguments) of each command that runs a script: with python, uv or torchrun, alone or in loops and pipes.

    Two spaces end a command (a remark follows), shell variables stand for some number."""
    found = []
    for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
        line = re.sub(r"(\s\d?>.*)|(\$\{?\w+\}?)", lambda match: "1" if match[2] else "", line)
        for command in re.findall(r"(?<!\S)(?:\S*python3?|uv run|torchrun) +[^ ].*?(?=\s{2}|$)", line):
            lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
            lexer.whitespace_split, words = True, []
            for word in [*lexer, ";"]:
                if not set(word) <= set(";&|()"):
                    words.append(word)
                    continue
                program = next((i for i, w in enumerate(words) if w.endswith(".py")), None)
                if program is not None and Path(words[program]).stem in NAMES:
                    found.append((Path(words[program]).stem, words[program + 1 :]))
                words = []
    return found


def readme_commands() -> list[tuple[str, list[str]]]:
    code = re.findall(r"^ *```\w*\n(.*?)^ *```", readme(), re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^ *```\w*\n.*?^ *```", "", readme(), flags=re.MULTILINE | re.DOTALL)
    return commands("\n".join(code + re.findall(r"`([^`\n]+)`", prose)))


def check_command(name: str, argv: list[str], monkeypatch, folder: Path) -> None:
    """It parses; a run that it names is taken to exist."""
    script = load(name)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(script, "load_checkpoint", lambda run: dict(args=dataclasses.asdict(script.Args())))
    try:
        script.parse_args(argv)
    except SystemExit as end:
        assert end.code == 0, f"python {name}.py {shlex.join(argv)}"  # 0: --help


def test_commands_are_found():
    text = """Run   python {0}.py --seed 1     what it does, python too
          for s in 1 2; do python {0}.py --env-id "ALE/$game-v5" \\
            --seed ${{s}}; done
          .venv/bin/python tests/benchmark.py {0}.py --size size1m
          torchrun --nproc_per_node=2 {0}.py --lr 1e-3 2>&1 | tee log && cp {0}.py project/  # {0}.py --x
          uv run {0}.py >log &""".format(NAMES[0])
    want = [["--seed", "1"], ["--env-id", "ALE/1-v5", "--seed", "1"], ["--lr", "1e-3"], []]
    assert commands(text) == [(NAMES[0], argv) for argv in want]


@each_script
def test_docstring_commands(name, monkeypatch, tmp_path):
    found = commands(ast.get_docstring(ast.parse(source(name))))
    assert 4 <= len(found) and {script for script, _ in found} == {name}
    for _, argv in found:
        check_command(name, argv, monkeypatch, tmp_path)


def test_readme_commands(monkeypatch, tmp_path):
    found = readme_commands()
    assert {script for script, _ in found} == set(NAMES)
    for name, argv in found:
        check_command(name, argv, monkeypatch, tmp_path)


def test_readme_code(tmp_path, monkeypatch):
    """What loads a policy and acts works as it is printed."""
    monkeypatch.syspath_prepend(ROOT)
    (code,) = [code for code in re.findall(r"^```python\n(.*?)^```", readme(), re.M | re.S) if "checkpoint.pt" in code]
    (name,) = re.findall(r"import .*?(\w+) as \w+", code)
    code = code.replace("runs/NAME", str(tiny.run(name, tmp_path / "run"))).replace("range(1000)", "range(10)")
    found = {}
    exec(code, found)
    assert found["row"].keys() >= {"image", "reward"} and found["state"]["deter"].any()


# ---- tables ----


def tables(text: str) -> list[dict[str, str]]:
    """Rows of all Markdown tables in a text as {lower-case column: cell}; the first column is also under ''."""
    rows, header = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if not line.strip().startswith("|"):
            header = None
        elif header is None:
            header = [cell.lower() for cell in cells]
        elif not re.fullmatch(r"[-:|\s]+", line.strip()):
            rows.append({"": cells[0], **dict(zip(header, cells))})
    return rows


def section(word: str) -> str:
    """Text under the README's heading with that word, down to the next heading."""
    parts = re.split(r"^(#+ .*)$", readme(), flags=re.MULTILINE)
    found = [body for title, body in zip(parts[1::2], parts[2::2]) if re.search(rf"\b{word}\b", title)]
    assert len(found) == 1, f"README has {len(found)} headings with the word {word}"
    return found[0]


def shows(cell: str, default) -> bool:
    """Whether a cell gives the default as Python or a user would write it: 1_000_000, 4e-5, None, "" or a bare word."""
    text = cell.strip("`")
    if isinstance(default, str):
        return text in (default, repr(default)) if default else text in ('""', "''")
    value = ast.literal_eval(text)
    return math.isclose(value, default, rel_tol=1e-3) if type(default) is float else value == default


def column(row: dict[str, str], name: str) -> str:
    """The cell below the script's name, with or without .py and quotes."""
    (cell,) = [cell for title, cell in row.items() if title.strip("`").removesuffix(".py") == name]
    return cell


@each_script
def test_flags_table(name):
    cells = {match[0]: column(row, name) for row in tables(section("Flags"))
             if (match := re.search(r"--[\w-]+", row[""]))}
    defaults = {"--" + f.name.replace("_", "-"): f.default for f in dataclasses.fields(load(name).Args) if f.init}
    assert {flag for flag, cell in cells.items() if cell} == set(defaults)
    for flag, default in defaults.items():
        assert shows(cells[flag], default), f"{flag}: {cells[flag]!r} in the README, {default!r} in the script"


def test_flags_table_has_no_orphans():
    """Each flag of the table belongs to some script and stands there once; each has a meaning."""
    rows = [row for row in tables(section("Flags")) if "--" in row[""]]
    assert rows and all(any(column(row, name) for name in NAMES) and [*row.values()][-1] for row in rows)
    assert len({row[""] for row in rows}) == len(rows)


@each_script
def test_metrics_table(name, tmp_path):
    """What a tiny run writes, with images and vectors where the script learns from both."""
    both = dict(env_id="envs:CountingDict-v0") if tiny.has(name, "pixels") else {}
    scalars, images = tiny.events(tiny.run(name, tmp_path / "run", **both))
    listed = [key for row in tables(section("Metrics")) if not row["scripts"] or name in row["scripts"]
              for key in re.findall(r"[a-z]+/\w+", row[""])]
    assert sorted(listed) == sorted({*scalars, *images})


def parameters(name: str) -> list[int]:
    """Trained parameters of each size on Pong, with its six actions."""
    script, counts = load(name), []
    image = {"image": (64, 64, 1 if getattr(script.Args, "grayscale", False) else 3)}
    for size in getattr(script, "SIZES", [None]):
        with torch.device("meta"):
            args = dataclasses.replace(script.Args(), **({"size": size} if size else {}))
            agent = script.Agent(image, 6, True, args)
        counts.append(sum(p.numel() for p in agent.parameters() if p.requires_grad))
    return counts


@each_script
def test_files_table(name):
    """Number of lines, and of parameters (10,492,616 or 10.5M) to the digits shown; size12m is a name, not a number."""
    (row,) = [row for row in tables(readme()) if f"]({name}.py)" in row[""] and "lines" in row]
    assert int(row["lines"].replace(",", "")) == len(source(name).splitlines())
    numbers = re.findall(r"([\d,]+)(\.\d+)?( ?M)?\b", re.sub(r"size\d+m", "", row["parameters"]))
    assert numbers
    for whole, part, million in numbers:
        shown, unit, digits = float(whole.replace(",", "") + part), 1e6 if million else 1, max(len(part) - 1, 0)
        assert any(round(count / unit, digits) == shown for count in parameters(name)), f"{whole}{part}{million}"


# ---- form of the scripts ----

SECTIONS = {2: "arguments", 3: "pure functions", 4: "environment", 5: "replay", 6: "networks", 7: "world model",
            8: "behaviour", 9: "update", 10: "evaluate and dream", 11: "checkpoint and logging", 12: "main"}
PLACES = dict(Args=2, make_envs=4, train_step=9, evaluate=10, open_loop_video=10, load_checkpoint=11, main=12)


@each_script
def test_sections(name):
    lines = source(name).splitlines()
    banners = [(int(match[1]), match[2], number) for number, line in enumerate(lines, 1)
               if (match := re.fullmatch(r"# ={8} (\d+)\. (.*) ={8}", line))]
    assert [banner[:2] for banner in banners] == list(SECTIONS.items())
    top = {node.name: node.lineno for node in ast.parse(source(name)).body if hasattr(node, "name")}
    for what, section_number in PLACES.items():
        above = [number for number, _, start in banners if start < top[what]]
        assert above[-1] == section_number, f"{what} belongs to section {section_number}"


@each_script
def test_functions_are_short(name):
    for node in definitions(name, ast.FunctionDef):
        length = node.end_lineno - node.lineno + 1
        assert length <= (180 if node.name == "main" else 60), f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", [*SCRIPTS, *sorted((ROOT / "tests").glob("*.py"))], ids=lambda path: path.name)
def test_lines(path):
    """At most 120 characters, no left-overs, no silenced warnings."""
    lines = path.read_text().splitlines()
    assert not [f"line {number} has {len(line)}" for number, line in enumerate(lines, 1) if len(line) > 120]
    for number, line in enumerate(lines, 1):
        assert line == line.rstrip() and "\t" not in line, f"line {number}: white space"
        if path in SCRIPTS:
            assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line), line
            assert not re.search(r"\bwarnings\b|\bWARN\b|set_verbosity|setLevel", line), line


@each_script
def test_excepts_are_narrow_or_explained(name):
    lines = source(name).splitlines()
    for node in definitions(name, ast.ExceptHandler):
        broad = node.type is None or re.search(r"\b(Base)?Exception\b", ast.unparse(node.type))
        assert not broad or "#" in lines[node.lineno - 1], f"line {node.lineno} needs a reason"


@each_script
def test_equations_name_their_paper(name):
    """Each `Eq.` in a comment or docstring is followed by numbers and the arXiv id with its version."""
    with open(ROOT / f"{name}.py", "rb") as file:
        texts = [t.string for t in tokenize.tokenize(file.readline) if t.type in (tokenize.COMMENT, tokenize.STRING)]
    cited = [text[match.start() : match.start() + 60] for text in texts for match in re.finditer(r"\bEqs?\b\.?", text)]
    assert cited
    for text in cited:
        assert re.match(r"Eq\. \d+((-| to |, | and )\d+)* \(arXiv:\d{4}\.\d{4,5}v\d+\)", text), text


@each_script
def test_script_stands_alone(name):
    """It says what it is and under which licence, and imports no neighbour."""
    docstring = ast.get_docstring(ast.parse(source(name)))
    assert "SPDX-License-Identifier: MIT" in docstring and re.search(r"arXiv:\d{4}\.\d{4,5}", docstring)
    imported = {alias.name for node in definitions(name, ast.Import) for alias in node.names}
    imported |= {node.module for node in definitions(name, ast.ImportFrom)}
    neighbours = {path.stem for path in [*SCRIPTS, *(ROOT / "tests").glob("*.py")]}
    assert not {module.split(".")[0] for module in imported} & neighbours


@each_script
def test_definitions_have_docstrings(name):
    """Classes and public functions at the top level say what they do."""
    silent = [node.name for node in ast.parse(source(name)).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
              and not ast.get_docstring(node) and node.end_lineno - node.lineno > 8 and node.name != "main"]
    assert not silent


def test_top_level():
    """README, requirements, scripts and tests, nothing else; what is hidden or named in .gitignore does not count."""
    ignored = [".*", *(line.strip("/ ") for line in (ROOT / ".gitignore").read_text().splitlines())]
    entries = {path.name for path in ROOT.iterdir() if not any(fnmatch.fnmatch(path.name, i) for i in ignored)}
    assert entries == {"README.md", "requirements.txt", "tests", *(path.name for path in SCRIPTS)}
    assert "runs" in ignored
