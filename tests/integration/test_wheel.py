"""The wheel: all of the package and nothing else, and a run with what it installs."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "src/simcse_trainer"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves its intermediate files beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(
        ".*", "outputs", "build", "dist", "*.egg-info", "__pycache__", "report"
    )
    shutil.copytree(ROOT, folder / "checkout", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "."]
    subprocess.run([*pip, *options, "./checkout"], cwd=folder, check=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    sources = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    for name in ("py.typed", "report_template.html"):
        assert f"simcse_trainer/{name}" in sources
    sources.add("simcse_trainer/model_card_template.md")  # which stands beside src/
    recipes = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/**/*.yaml")}
    assert "configs/sup_bert_base.yaml" in recipes
    sources |= {f"simcse_trainer/{name}" for name in recipes}
    others = {name for name in names if ".dist-info/" not in name}
    assert others == sources


@pytest.fixture
def python(wheel, tmp_path) -> Path:
    """An environment with the wheel in it, and these tests' libraries behind it.

    Those are found through a .pth file, which adds their folder without what is said in its own
    .pth files: a package that is installed as a link to a checkout is not there.
    """
    venv.create(tmp_path / "env", with_pip=False)
    found = tmp_path / "env/bin/python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(found)]
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=120)
    (place,) = (tmp_path / "env/lib").glob("python*/site-packages")
    (place / "libraries.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return found


@pytest.mark.real_weights
@pytest.mark.slow
def test_the_installed_wheel_runs_the_quickstart(python, minilm, tmp_path):
    work = tmp_path / "work"
    (work / "configs").mkdir(parents=True)
    shutil.copy(ROOT / "train_simcse.py", work)
    shutil.copy(ROOT / "configs/quickstart.yaml", work / "configs")
    shutil.copytree(ROOT / "examples", work / "examples")
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: object) -> str:
        command = list(map(str, words))
        done = subprocess.run(
            command, cwd=work, env=alone, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import simcse_trainer; print(simcse_trainer.__file__)"
    assert Path(run(python, "-c", where).strip()).is_relative_to(tmp_path / "env")
    short = ["--max_steps", 2, "--per_device_train_batch_size", 4, "--use_cpu", "true"]
    out = run(python, "train_simcse.py", "configs/quickstart.yaml", *short)
    assert "The model after 2 steps is in outputs/quickstart" in out
    assert "simcse" in (work / "outputs/quickstart/README.md").read_text(encoding="utf-8")
    pairs = "examples/customer_support/eval.csv"
    shutil.rmtree(work / "configs")
    words = ["--output_dir", "outputs/by_name", *short]
    out = run(python.parent / "simcse-trainer", "train", "quickstart", *words)
    assert "The model after 2 steps is in outputs/by_name" in out
    out = run(python.parent / "simcse-trainer", "evaluate", "outputs/quickstart", "--tasks", pairs)
    assert "alignment" in out.lower()
