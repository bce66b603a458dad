"""An optional file of a model is absent only if the answer was that it is absent."""

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers.hub_runs import run_python
from helpers.loopback import LoopbackHub
from helpers.loopback_store import Blob, Repository
from helpers.tiny import save_tiny, tiny_backbone, tiny_tokenizer

from simcse_trainer import SimCSEModel

# Processes, seconds each.
pytestmark = pytest.mark.slow

READ = """
import json, sys
import huggingface_hub
from simcse_trainer import InputError, SimCSEModel
answers = []
wanted, downloaded = json.loads(sys.argv[1])
for name, options in wanted:
    try:
        model = SimCSEModel.from_pretrained(name, **options)
        answers.append([model.pooling_mode, model.head is not None])
    except InputError as error:
        answers.append(["refused", str(error)])
for name in downloaded:
    huggingface_hub.snapshot_download(name)
print(json.dumps(answers))
"""


def publish(hub: LoopbackHub, folder, *names: str) -> None:
    for name in names:
        repo = hub.repos[name] = Repository(name, False)
        files = {
            path.relative_to(folder).as_posix(): Blob(
                path.read_bytes(), path.suffix == ".safetensors"
            )
            for path in folder.rglob("*")
            if path.is_file()
        }
        repo.commit("main", "the model", files)


def save_trained(folder):
    """A model read by the mean, without a head."""
    model = SimCSEModel(tiny_backbone(), tiny_tokenizer(), pooling_mode="mean", max_seq_length=20)
    model.save_pretrained(folder)
    return folder


def read(*wanted: tuple[str, dict], downloaded: tuple[str, ...] = (), **environment: str) -> list:
    """What one process reads, by names and options; it also downloads some repositories."""
    done = run_python(READ, json.dumps([wanted, downloaded]), **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.field("17a")
def test_offline_only_what_the_hub_has_said_to_be_absent_is_absent(hub: LoopbackHub, tmp_path):
    names = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")
    trained = [f"me/read-{i}" for i in range(len(names))]
    publish(hub, save_trained(tmp_path / "read"), *trained)
    publish(hub, Path(save_tiny(tmp_path / "plain")), "me/plain", "me/all")
    online = read(*((name, {}) for name in (*trained, "me/plain")), downloaded=("me/all",))
    assert online == [["mean", False]] * len(names) + [["cls", True]]
    # Of each only some files have been downloaded.
    for repository, name in zip(trained, names, strict=True):
        folder = "models--" + repository.replace("/", "--")
        (path,) = (tmp_path / "hf_home").rglob(f"{folder}/snapshots/*/{name}")
        path.unlink()
    said = {"pooling_mode": "mean", "projection_head": "none"}
    asked = [(name, options) for name in trained for options in ({}, said)]
    *answers, plain, complete = read(*asked, ("me/plain", {}), ("me/all", {}), HF_HUB_OFFLINE="1")
    for name, answer, advised in zip(names, answers[::2], answers[1::2], strict=True):
        assert answer[0] == "refused", f"read by {answer} without {name}"
        assert name in answer[1]
        assert "pooling_mode and projection_head both" in answer[1]
        assert advised == ["mean", False], "the advice works"
    # The Hub was asked for each of its files, or has listed all there are.
    assert plain == complete == ["cls", True]


@pytest.mark.field("17b")
@pytest.mark.parametrize("kind", ["503", "reset"])
def test_a_hub_that_fails_for_one_file_is_not_taken_for_absence(kind, hub, tmp_path):
    publish(hub, save_trained(tmp_path / "read"), "me/read")
    hub.inject("download", kind, None)
    (answer,) = read(("me/read", {}), HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1")
    assert answer[0] == "refused", f"read by {answer}"
    assert "'me/read' is not on this machine" in answer[1]


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
