"""The READMEs: Python runs and prints what is shown, commands parse, links lead to files."""

import contextlib
import doctest
import importlib.util
import io
import itertools
import pathlib
import pkgutil
import re
import shlex
import shutil
import textwrap
import tomllib
from typing import NamedTuple

import pytest

from attention_jax.backends.native import library
from experiments.__main__ import main

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(
    file
    for pattern in ("README.md", ".github/*.md", "experiments/**/*.md")
    for file in ROOT.glob(pattern)
)
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)  # also within lists
PYTHON, SHELL, SHOWN = "python", ("bash", "sh"), ("text", "diff")
# What each command of ``python -m experiments`` calls once its options are parsed.
WORK = (
    "experiments.training.train.run",
    "experiments.training.runs.load",
    "experiments.report.tables.main",
    "experiments.bench.compare.main",
    "experiments.bench.attention.main",
    "experiments.tasks.fewshot.sweep.main",
    "experiments.training.sweep.main",
    "experiments.walkthrough.main",
    "experiments.plan.command.main",
    "experiments.serving.chat.main",
    "experiments.serving.server.main",
)
BUILTINS = {".", "cd", "curl", "export", "source"}
INSTALL_AND_TEST = re.compile(r"^python -m pip install .* && python -m pytest( -n \S+)?$", re.M)


class Block(NamedTuple):
    """A fenced code block."""

    file: pathlib.Path
    line: int
    language: str
    code: str

    @property
    def name(self):
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def blocks(file):
    text = file.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        _, language, code = found.groups()
        yield Block(file, text[: found.start()].count("\n") + 1, language, textwrap.dedent(code))


BLOCKS = [block for file in FILES for block in blocks(file)]
# Each Python block with the output shown below it, if any.
EXAMPLES = [
    pytest.param(block, after, id=block.name)
    for block, after in itertools.pairwise([*BLOCKS, None])
    if block.language == PYTHON
]
COMMANDS = [
    pytest.param(command, id=f"{block.name}: {command}")
    for block in BLOCKS
    if block.language in SHELL
    for line in block.code.replace("\\\n", " ").splitlines()
    for command in line.split("#")[0].split("&&")
    if command.strip()
]


def test_every_block_is_in_a_language_that_is_checked():
    assert {block.language for block in BLOCKS} <= {PYTHON, *SHELL, *SHOWN}


@pytest.mark.parametrize(("block", "after"), EXAMPLES)
def test_python_runs_and_prints_what_is_shown(block, after):
    names = {"__name__": "readme"}
    if ">>>" in block.code:
        test = doctest.DocTestParser().get_doctest(block.code, names, block.name, None, block.line)
        assert doctest.DocTestRunner().run(test).failed == 0
        return
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block.code, block.name, "exec"), names)
    if "native" in (after.code if after else "") and library.load().why_not is not None:
        pytest.skip("shows the native kernel, which is not there")
    if after and after.file == block.file and after.language == "text":
        assert printed.getvalue() == after.code


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command, monkeypatch):
    words = [word for word in shlex.split(command) if not re.match(r"[A-Z_]+=", word)]
    match words:
        case ["python", "-m", "pip", "install", *arguments]:
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            extras = re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*)\]", " ".join(arguments))))
            assert {*extras} <= {*known["optional-dependencies"]}
        case ["python", "-m", "pytest", *arguments]:
            assert all((ROOT / x.partition("::")[0]).exists() for x in arguments if ".py" in x)
        case ["python", "-m", "experiments", *arguments]:
            parse(arguments, monkeypatch)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module)
        case [program, *_]:
            ours = program in BUILTINS or (ROOT / program).is_file()
            assert ours or shutil.which(program) or importlib.util.find_spec(program)


def parse(arguments, monkeypatch):
    """Runs ``python -m experiments`` up to where its options are parsed and work would begin."""

    class Parsed(Exception):  # noqa: N818 - not an error
        pass

    def work(*args, **options):
        raise Parsed

    for name in WORK:
        monkeypatch.setattr(name, work)
    if not arguments:
        assert main([]) == 0
        return
    with pytest.raises(Parsed):
        main(arguments)


@pytest.mark.parametrize("file", ["README.md", ".github/CONTRIBUTING.md"])
def test_files_and_modules_named_in_the_text_exist(file):
    words = re.findall(r"`([^`\s]+)`", FENCE.sub("", (ROOT / file).read_text(encoding="utf-8")))
    paths = {word for word in words if word.endswith((".py", "/")) and "NAME" not in word}
    assert paths
    places = ROOT, ROOT / "attention_jax", ROOT / "attention_jax/models/pretrained"
    assert {path for path in paths if not any((place / path).exists() for place in places)} == set()
    for name in {word for word in words if word.startswith("attention_jax.")}:
        assert pkgutil.resolve_name(name), name


def test_the_install_and_test_command_stands_on_one_line_for_the_gate():
    assert len(INSTALL_AND_TEST.findall((ROOT / "README.md").read_text(encoding="utf-8"))) == 1


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_to_files(file):
    text = FENCE.sub("", file.read_text(encoding="utf-8"))
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    relative = [target for target in targets if target and "://" not in target]
    assert [target for target in relative if not (file.parent / target).exists()] == []
