"""The tree is the architecture: a room imports only from the rooms above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "src/simcse_trainer"
ROOMS = [
    "version",
    "errors",
    "files",
    "manifest",
    "tensor_files",
    "output_folder",
    "run_lock",
    "objective",
    "model",
    "data",
    "evaluation",
    "inference",
    "checkpoints",
    "output_check",
    "hub",
    "arguments",
    "config",
    "interruptions",
    "preparation",
    "refusals",
    "same_run",
    "cached_step",
    "provenance",
    "describing",
    "pushing_trainer",
    "trainer",
    "summary",
    "launching",
    "train",
    "entry",
    "planning",
    "cli",
]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_from_above(path: Path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = ROOMS[: ROOMS.index(room) + 1]
    for module in imports(path):
        if module.startswith("simcse_trainer."):
            assert module.split(".")[1] in allowed, module


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name


def test_importing_the_package_is_silent_and_light():
    code = "import simcse_trainer, sys; print('torch' in sys.modules, simcse_trainer.__version__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split()[0] == "False"
    assert run.stderr == ""


def test_the_process_that_talks_to_the_hub_starts_without_torch():
    """It is started for every run that pushes; torch would cost it seconds and memory."""
    code = "import sys, simcse_trainer.hub.worker; print({'torch'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_what_the_package_offers_is_there():
    import simcse_trainer

    for name in simcse_trainer.__all__:
        assert getattr(simcse_trainer, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = simcse_trainer.Nonsense
