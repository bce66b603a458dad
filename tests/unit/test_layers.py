"""The tree is the architecture: a layer imports only from those before it, without circles."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT

import simcse_trainer

PACKAGE = ROOT / "src/simcse_trainer"
LAYERS = [
    "errors",
    "version",
    "files",
    "objective",
    "model",
    "data",
    "evaluation",
    "analysis",
    "hub",
    "arguments",
    "training",
    "planning",
    "inference",
    "cli",
]
FOLDERS = [name for name in LAYERS if (PACKAGE / name).is_dir()]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
# What has a single importer outside of cli/ and training/ says why it is a module of its own.
MOST_SINGLE_IMPORTERS = 15


def get_module(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {get_module(path): path for path in FILES}


@cache
def imports(path: Path) -> frozenset[str]:
    """Our modules that a file imports, also inside of functions and for types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "simcse_trainer":
                found.add(rest if rest in MODULES else rest.rpartition(".")[0])
    return frozenset(found - {""})


def names(paths) -> list[str]:
    return [str(path.relative_to(PACKAGE)) for path in paths]


def test_only_these_stand_loose_at_the_top_level():
    loose = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert loose == {"arguments", "errors", "files", "version"}


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_a_layer_imports_only_from_those_before_it(path: Path):
    if path.name == "__main__.py":
        return
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    assert not [module for module in imports(path) if module.split(".")[0] not in allowed]


def test_no_imports_go_in_a_circle():
    state: dict[str, str] = {}

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert state.get(module) != "under way", " -> ".join([*way, module])
        if module in state:
            return
        state[module] = "under way"
        for other in sorted(imports(MODULES[module])):
            if other in MODULES and other != module:
                visit(other, (*way, module))
        state[module] = "done"

    for module in MODULES:
        visit(module, ())


def test_planning_is_for_the_command_line():
    importers = {module for module, path in MODULES.items() if "planning" in str(imports(path))}
    assert {name.split(".")[0] for name in importers} <= {"planning", "cli"}


def test_few_modules_have_a_single_importer():
    importers: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, path in MODULES.items():
        for other in imports(path):
            if other in importers and other != module:
                importers[other].add(module)
    single = [
        module
        for module, found in importers.items()
        if len(found) == 1 and module.split(".")[0] not in ("cli", "training")
    ]
    assert len(single) <= MOST_SINGLE_IMPORTERS, single


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_files_and_functions_stay_short(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name


def run_python(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.mark.parametrize(
    "module", ["simcse_trainer", "simcse_trainer.hub.push", "simcse_trainer.cli"]
)
def test_what_needs_no_torch_imports_none_and_is_silent(module):
    """The child that speaks to the Hub is started for every push; torch would cost it seconds."""
    run = run_python(f"import {module}, sys; print({{'torch'}} & {{*sys.modules}})")
    assert run.stdout.strip() == "set()"
    assert run.stderr == ""


@pytest.mark.parametrize("package", ["", *FOLDERS, "model.io", "model.cpu"])
def test_public_names_are_listed_and_there(package):
    if package == "cli":
        return
    module = __import__(f"simcse_trainer.{package}".rstrip("."), fromlist=["x"])
    listed = [name for name in dir(module) if not name.startswith("_")]
    assert listed
    assert not {"annotations", "sys", "Any", "import_module", "attach_lazily"} & {*listed}
    for name in listed:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = module.Nonsense


def test_what_the_package_offers_is_there():
    for name in simcse_trainer.__all__:
        assert getattr(simcse_trainer, name) is not None
