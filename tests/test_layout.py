"""What imports what, what is public, and what stands at the top of the repository."""

import ast
import doctest
import graphlib
import importlib
import inspect
import pathlib
import subprocess
import sys
import tomllib

import pytest

import attention_jax

PACKAGE = pathlib.Path(attention_jax.__file__).parent
ROOT = PACKAGE.parent

# Imports go one way: a package imports only from those before it. "" is the top package itself.
LIBRARY_RANKS = [
    {"core", "reference"},
    {"masks"},
    {"scores"},
    {"positions"},
    {"backends"},
    {"api"},
    {"parallel"},
    {"cache"},
    {"mechanisms"},
    {"nn"},
    {"models"},
    {"testing"},
    {""},
]
EXPERIMENTS_RANKS = [
    {"options", "programs"},
    {"datasets"},
    {"training"},
    {"models"},
    {"tasks"},
    {"bench", "card", "plan", "serving"},
    {"report"},
    {"walkthrough"},
    {"__main__", ""},
]
RANK = {
    f"{top}.{name}".rstrip("."): rank
    for top, ranks in (("attention_jax", LIBRARY_RANKS), ("experiments", EXPERIMENTS_RANKS))
    for rank, names in enumerate(ranks)
    for name in names
}

# Packages and modules that users import from.
PUBLIC = ["", "masks", "mechanisms", "models", "models.pretrained", "nn", "positions", "scores"]
PUBLIC += ["cache", "parallel", "testing"]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TOPS = [PACKAGE, ROOT / "experiments"]
MODULES = {module_name(path): path for top in TOPS for path in sorted(top.rglob("*.py"))}


def imported(path):
    """The full names of what a file imports: for ``from a import b`` that of ``b`` if a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                # A function that has the name of its module hides it.
                yield full if full in MODULES and not hides(full) else node.module


def hides(name):
    """Whether a package has a function or class by the name of one of its modules."""
    parent, _, last = name.rpartition(".")
    return parent in sys.modules and not inspect.ismodule(getattr(sys.modules[parent], last, ast))


def package_of(name):
    """The ranked package that a module is in: ``attention_jax.masks``, for example."""
    return ".".join(name.split(".")[:2])


def test_every_package_has_a_rank():
    assert set(RANK) == {package_of(name) for name in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_from_packages_before_its_own(module):
    top = module.partition(".")[0]
    for name in imported(MODULES[module]):
        other = name.partition(".")[0]
        assert other not in ("tests", "conftest")
        assert top == "experiments" or other != "experiments", f"{module} imports {name}"
        if other not in ("attention_jax", "experiments"):
            continue
        assert name in MODULES, f"{name} is not a module of ours"
        if other == top:
            mine, theirs = package_of(module), package_of(name)
            assert mine == theirs or RANK[theirs] < RANK[mine], f"{module} imports {name}"


def test_no_imports_go_in_circles():
    graph = {name: {x for x in imported(MODULES[name]) if x in MODULES} for name in MODULES}
    order = graphlib.TopologicalSorter(graph)
    order.prepare()  # raises CycleError, which names the modules


def test_every_folder_of_modules_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    folders = {path.parent for top in TOPS for path in top.rglob("__init__.py")}
    assert sorted(packages) == sorted(str(f.relative_to(ROOT)).replace("/", ".") for f in folders)


def test_the_reference_is_numpy_and_the_standard_library():
    tops = {name.partition(".")[0] for name in imported(MODULES["attention_jax.reference"])}
    assert tops <= {"numpy", *sys.stdlib_module_names}


def test_importing_the_package_starts_no_backend():
    # The number of devices is fixed once a backend starts.
    code = (
        "import attention_jax, jax; jax.config.update('jax_num_cpu_devices', 3); "
        "assert jax.device_count('cpu') == 3"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def public(module):
    return importlib.import_module(f"attention_jax.{module}".rstrip("."))


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_listed_and_there(module):
    assert len(set(public(module).__all__)) == len(public(module).__all__)
    missing = [name for name in public(module).__all__ if not hasattr(public(module), name)]
    assert not missing


@pytest.mark.parametrize(
    ("module", "name"),
    [(m, n) for m in PUBLIC for n in public(m).__all__ if n not in PUBLIC],
)
def test_public_functions_have_docstrings_and_examples_that_run(module, name):
    thing = getattr(public(module), name)
    if inspect.ismodule(thing):
        assert thing.__doc__
        return
    if isinstance(thing, dict):  # a table of functions
        assert all(inspect.getdoc(function) for function in thing.values())
        return
    doc = inspect.getdoc(thing)
    assert doc, f"{name} has no docstring"
    assert doc.splitlines()[0].endswith((".", ":"))
    if inspect.isfunction(thing):
        assert doctest.DocTestParser().get_examples(doc), f"{name} has no example"


def test_nothing_else_stands_at_the_top():
    listed = subprocess.run(
        ["git", "ls-files", "--cached"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git repository")
    tops = {line.split("/")[0] for line in listed.stdout.splitlines()}
    allowed = {"attention_jax", "experiments", "tests", "pyproject.toml"}
    allowed |= {"README.md", "LICENSE", "CHANGELOG.md"}
    assert {top for top in tops if not top.startswith(".")} <= allowed
