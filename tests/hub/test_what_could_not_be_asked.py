"""An optional file of a model is absent only if the answer was that it is absent."""

import json
import os
import shutil

import pytest
from helpers.hub_runs import run_python
from helpers.loopback import LoopbackHub
from helpers.loopback_store import Blob
from helpers.tiny import tiny_backbone, tiny_tokenizer

from simcse_trainer import SimCSEModel

# Processes, seconds each.
pytestmark = pytest.mark.slow

READ = """
import json, logging, sys
from simcse_trainer import InputError, SimCSEModel
answers = []
for options in json.loads(sys.argv[1]):
    try:
        model = SimCSEModel.from_pretrained("me/read", **options)
        answers.append([model.pooling_mode, model.head is not None])
    except InputError as error:
        answers.append(["refused", str(error)])
print(json.dumps(answers))
"""


@pytest.fixture
def published(hub: LoopbackHub, tmp_path):
    """A model read by the mean, without a head, on the Hub."""
    model = SimCSEModel(tiny_backbone(), tiny_tokenizer(), pooling_mode="mean", max_seq_length=20)
    model.save_pretrained(tmp_path / "read")
    put(hub, tmp_path / "read")
    return hub


def put(hub: LoopbackHub, folder) -> None:
    repo = hub.repos.get("me/read")
    if repo is None:
        from helpers.loopback_store import Repository

        repo = hub.repos["me/read"] = Repository("me/read", False)
    files = {
        path.relative_to(folder).as_posix(): Blob(path.read_bytes(), path.suffix == ".safetensors")
        for path in folder.rglob("*")
        if path.is_file()
    }
    repo.commit("main", "the model", files)


def read(**environment: str) -> list:
    (answer,) = read_by({}, **environment)
    return answer


def read_by(*options: dict, **environment: str) -> list[list]:
    """What one process reads by each of some options."""
    done = run_python(READ, json.dumps(options), **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def forget(tmp_path, *names: str) -> None:
    """Take files out of the cache, as where only some have been downloaded."""
    for name in names:
        for path in (tmp_path / "hf_home").rglob(f"snapshots/*/{name}"):
            path.unlink()


OFFLINE = {"HF_HUB_OFFLINE": "1"}


@pytest.mark.field("17a")
@pytest.mark.parametrize(
    "name", ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json"]
)
def test_a_file_that_is_not_in_an_offline_cache_is_not_taken_for_absent(name, published, tmp_path):
    assert read() == ["mean", False]
    forget(tmp_path, name)
    said = {"pooling_mode": "mean", "projection_head": "none"}
    answer, advised = read_by({}, said, **OFFLINE)
    assert answer[0] == "refused", f"read by {answer}"
    assert name in answer[1]
    assert "pooling_mode and projection_head both" in answer[1]
    assert advised == ["mean", False], "the advice works"


@pytest.mark.field("17b")
@pytest.mark.parametrize("kind", ["503", "reset"])
def test_a_hub_that_fails_for_one_file_is_not_taken_for_absence(kind, published, tmp_path):
    published.inject("download", kind, None)
    answer = read(HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1")
    assert answer[0] == "refused", f"read by {answer}"


def test_what_the_hub_has_said_to_be_absent_is_absent_offline_too(hub, tmp_path):
    """A plain backbone, once read with the Hub in reach."""
    folder = tmp_path / "plain"
    tiny_backbone().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    put(hub, folder)
    assert read() == ["cls", True]
    assert read(**OFFLINE) == ["cls", True]


def test_what_a_download_of_everything_lists_is_all_there_is(hub, tmp_path):
    folder = tmp_path / "plain"
    tiny_backbone().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    put(hub, folder)
    code = "import huggingface_hub; print(huggingface_hub.snapshot_download('me/read'))"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert read(**OFFLINE) == ["cls", True]


@pytest.mark.field("17c")
def test_a_link_to_a_file_that_is_gone_is_not_taken_for_absent(tmp_path):
    model = SimCSEModel(tiny_backbone(), tiny_tokenizer(), pooling_mode="mean")
    model.save_pretrained(tmp_path / "model")
    shutil.move(tmp_path / "model/modules.json", tmp_path / "blob")
    os.symlink(tmp_path / "blob", tmp_path / "model/modules.json")
    (tmp_path / "blob").unlink()
    said = ""
    try:
        SimCSEModel.from_pretrained(tmp_path / "model")
    except Exception as error:
        said = str(error)
    assert "modules.json" in said
