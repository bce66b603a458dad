"""A repository and a folder that hold other people's files: what is pushed, replaced, deleted."""

import getpass
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers.hub_runs import TOKEN, build, train
from helpers.loopback import LoopbackHub
from helpers.loopback_store import Blob
from helpers.tiny import save_tiny
from helpers.training import PAIRS, TRIPLETS, UNSUPERVISED, build_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from simcse_trainer import InputError, SimCSEModel, SimCSETrainer
from simcse_trainer.model.lora import lora_config
from simcse_trainer.training.resume import download_training_state

pytestmark = pytest.mark.usefixtures("client_here")


@pytest.fixture
def push(monkeypatch, capfd):
    """Runs `simcse-trainer push`; returns its exit status and what it printed."""

    def push(*words: object) -> tuple[int, str]:
        from simcse_trainer.cli import main

        monkeypatch.setattr(sys, "argv", ["simcse-trainer", "push", *map(str, words)])
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        capfd.readouterr()
        try:
            status = main()
        except SystemExit as ended:
            status = ended.code
        said = capfd.readouterr()
        return int(status or 0), said.out + said.err

    return push


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    build_model().save_pretrained(folder)
    return folder


def add(hub: LoopbackHub, files: dict[str, bytes], branch: str = "main") -> None:
    """A commit of somebody else, in the browser or by another client."""
    repo = hub.repos["me/tiny"]
    there = dict(repo.by_sha[repo.branches[branch]].files)
    blobs = {name: Blob(data, name.endswith(".safetensors")) for name, data in files.items()}
    repo.commit(branch, "by hand", there | blobs)


def fill(folder: Path, count: int = 200) -> dict[str, bytes]:
    """Files of somebody else, among them all kinds that 0.1.0 took for its own."""
    rng = random.Random(0)
    names = [
        "01_raw_data/train.csv",
        "2024_results/scores.csv",
        "0_Old/config.json",
        "lora/notes.md",
        "lora/adapter_model.bin",
        "adapter/experiment.yaml",
        "adapter/deep/er/x.txt",
        "model_old.safetensors",
        "model-v2.safetensors",
        "adapter_model.safetensors",
        "models/teacher/weights.safetensors",
        "1_Archive/pytorch_model.bin",
        "customers.csv",
        "id_rsa",
        "notes.txt",
        ".env",
        "checkpoint.txt",
        "checkpoint-7/notes.md",
        "checkpoints/a.bin",
        "runs/x.log",
        "optimizer_study/results.json",
    ]
    while len(names) < count:
        parts = [rng.choice("abcdefgh0123") + str(rng.randrange(99)) for _ in range(3)]
        end = rng.choice([".csv", ".json", ".safetensors", ".txt", ".pt", ""])
        names.append("/".join(parts[: rng.randrange(1, 4)]) + end + str(len(names)))
    made = {}
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        made[name] = rng.randbytes(rng.randrange(1, 60))
        path.write_bytes(made[name])
    return made


def changed(folder: Path, files: dict[str, bytes]) -> list[str]:
    return [
        name
        for name, data in files.items()
        if not (folder / name).is_file() or (folder / name).read_bytes() != data
    ]


def everything(hub: LoopbackHub) -> dict[str, bytes]:
    """All that any commit of the repository holds."""
    repo = hub.repos["me/tiny"]
    return {f"{sha}/{n}": data for sha in repo.by_sha for n, data in repo.files(sha).items()}


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4


@pytest.mark.field("1a")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.slow
def test_a_run_in_a_folder_full_of_other_files_leaves_each_of_them_and_publishes_none(
    lora, hub: LoopbackHub, tmp_path, push
):
    out = tmp_path / "out"
    out.mkdir()
    files = fill(out)

    def start(**options) -> SimCSETrainer:
        torch.manual_seed(0)
        given = build_model()
        if lora:
            base = save_tiny(tmp_path / "base", "bert")
            given = SimCSEModel.from_pretrained(base, lora=lora_config(r=2))
        extra = {"lora_save": "both"} if lora else {}
        return build(
            out, model=given, train_dataset=TRIPLETS, save_total_limit=1, **extra, **options
        )

    start(callbacks=[Stop()]).train()
    assert not changed(out, files)
    resumed = start()
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    resumed.hub.finish()
    assert not changed(out, files)
    for _ in range(2):
        words = ["--base_model", "me/base"] if lora else []
        assert push(out, "me/tiny", *words)[0] == 0
    assert not changed(out, files)
    assert "model.safetensors" in hub.repos["me/tiny"].files()
    theirs = {data for data in files.values() if len(data) > 8}
    assert not [name for name, data in everything(hub).items() if data in theirs]


@pytest.mark.field("1b")
def test_a_push_deletes_no_file_that_somebody_else_has_put_there(hub, model, push):
    assert push(model, "me/tiny")[0] == 0
    theirs = {
        "models/teacher/weights.safetensors": b"teacher",
        "01_raw_data/train.csv": b"a,b",
        "lora/notes.md": b"notes",
        "model_old.safetensors": b"old",
        "adapter/x.yaml": b"x",
    }
    add(hub, theirs)
    build_model(seed=1).save_pretrained(model)
    status, said = push(model, "me/tiny")
    assert status == 0, said
    there = hub.repos["me/tiny"].files()
    assert {name: there.get(name) for name in theirs} == theirs
    assert there["model.safetensors"] == (model / "model.safetensors").read_bytes()


@pytest.mark.field("1c")
@pytest.mark.parametrize("name", ["adapter_config.json", "model.safetensors.index.json"])
def test_a_file_there_that_would_change_what_is_loaded_refuses_the_push(name, hub, model, push):
    assert push(model, "me/tiny")[0] == 0
    add(hub, {name: b"{}"})
    before = hub.repos["me/tiny"].branches["main"]
    build_model(seed=1).save_pretrained(model)
    status, said = push(model, "me/tiny")
    assert status == 2
    assert name in said
    assert hub.repos["me/tiny"].branches["main"] == before


@pytest.mark.field("1d")
@pytest.mark.slow
def test_a_repository_of_the_old_version_is_pushed_to_and_loses_nothing(hub, tmp_path, push):
    out = tmp_path / "out"
    train(out, max_steps=2).hub.finish()
    repo = hub.repos["me/tiny"]
    old = {
        name: blob
        for name, blob in repo.by_sha[repo.branches["main"]].files.items()
        if name != "simcse_manifest.json"
    }
    extra = {
        "lora/adapter_model.safetensors": Blob(b"x", True),
        "1_Old/config.json": Blob(b"{}", False),
    }
    repo.commit("main", "step 2", old | extra)
    trainer = build(tmp_path / "other", max_steps=2, model=build_model(seed=3))
    trainer.train()
    there = repo.files()
    local = (tmp_path / "other/checkpoint-2/model.safetensors").read_bytes()
    assert there["model.safetensors"] == local
    assert {*extra} <= {*there}


@pytest.mark.field("2a")
def test_only_what_the_run_has_written_is_published(hub, tmp_path, push):
    out = tmp_path / "out"
    trainer = train(out, max_steps=2)
    trainer.save_model()
    secret = {"customers.csv": "name\nKim", "id_rsa": "KEY", "notes.txt": "x", "more/deep.md": "y"}
    for name, text in secret.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
        (out / "checkpoint-2" / Path(name).name).write_text(text, encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/private.txt").write_text("private", encoding="utf-8")
    (out / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert push(out, "me/tiny")[0] == 0
    found = {name.split("/", 1)[1] for name in everything(hub)}
    named = {
        name for name in found if re.search("customers|id_rsa|notes|deep|private|linked", name)
    }
    assert not named


@pytest.mark.field("2b")
@pytest.mark.parametrize("branch", ["main", "training-state"])
@pytest.mark.slow
def test_no_path_of_the_machine_is_published(branch, hub, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": {"stsb": PAIRS}}
    best = {"load_best_model_at_end": True, "greater_is_better": False}
    trainer = train(tmp_path / "out", **options, **best)
    trainer.save_model()
    trainer.hub.finish()
    texts = {
        name: data.decode("utf-8", errors="replace")
        for name, data in hub.repos["me/tiny"].files(branch).items()
        if not name.endswith((".safetensors", ".pt", ".pth", ".png"))
    }
    assert len(texts) > 5
    assert not [name for name, text in texts.items() if str(tmp_path) in text]
    home = str(Path.home())
    if len(home) > 3:
        assert not [name for name, text in texts.items() if f'"{home}' in text]
    user = getpass.getuser()
    assert not [name for name, text in texts.items() if f"/{user}/" in text]


def adapter(tmp_path: Path) -> Path:
    base = save_tiny(tmp_path / "base", "bert")
    torch.manual_seed(0)
    adapted = SimCSEModel.from_pretrained(base, lora=lora_config(r=2))
    adapted.save_pretrained(tmp_path / "adapted")
    return tmp_path / "adapted"


@pytest.mark.field("2c")
def test_an_adapter_on_a_folder_of_this_machine_is_refused_and_the_advice_works(
    hub, tmp_path, push
):
    folder = adapter(tmp_path)
    status, said = push(folder, "me/tiny")
    assert status == 2
    assert "--base_model" in said
    assert push(folder, "me/tiny", "--base_model", "me/base")[0] == 0
    there = hub.repos["me/tiny"].files()
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    assert json.loads(there["simcse_adapter.json"])["name"] == "me/base"
    said = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert said["base_model_name_or_path"] == str(tmp_path / "base"), "the folder is as it was"


@pytest.mark.field("2d")
def test_training_an_adapter_on_a_folder_of_this_machine_says_so_before_it_pushes(
    hub, tmp_path, caplog
):
    base = save_tiny(tmp_path / "base", "bert")
    adapted = SimCSEModel.from_pretrained(base, lora=lora_config(r=2))
    train(tmp_path / "out", model=adapted, max_steps=2, train_dataset=TRIPLETS)
    warned = [text for text in caplog.messages if "nobody" in text and "lora_save='merged'" in text]
    assert len(warned) == 1, caplog.text
    texts = everything(hub).values()
    assert not [text for text in texts if str(tmp_path).encode() in text]


@pytest.mark.field("2e")
def test_a_folder_from_elsewhere_is_pushed_by_the_names_that_loaders_read(hub, model, push):
    (model / "simcse_manifest.json").unlink(missing_ok=True)
    (model / "customers.csv").write_text("Kim", encoding="utf-8")
    (model / "9_Notes").mkdir()
    (model / "9_Notes/config.json").write_text("{}", encoding="utf-8")
    (model / "ONNX.md").write_text("how", encoding="utf-8")
    status, said = push(model, "me/tiny")
    assert status == 0
    there = {*hub.repos["me/tiny"].files()}
    assert {"model.safetensors", "config.json", "1_Pooling/config.json", "tokenizer.json"} <= there
    assert not {"customers.csv", "9_Notes/config.json", "ONNX.md"} & there
    first = next(line for line in said.splitlines() if "model.safetensors" in line)
    assert "1_Pooling/config.json" in first, "the list is printed"
    assert push(model, "me/tiny", "--include", "*.md")[0] == 0
    assert "ONNX.md" in hub.repos["me/tiny"].files()
    status, said = push(model, "me/tiny", "--include", "../*")
    assert status == 2
    assert "leads out" in said


@pytest.mark.field("3a")
@pytest.mark.slow
def test_a_card_that_was_edited_on_the_hub_is_kept_until_it_is_said_otherwise(hub, tmp_path, push):
    out = tmp_path / "out"
    trainer = train(out, max_steps=2)
    trainer.save_model()
    trainer.hub.finish()
    add(hub, {"README.md": b"# By hand\n"})
    status, said = push(out, "me/tiny")
    repo = hub.repos["me/tiny"]
    assert status == 0
    assert repo.files()["README.md"] == b"# By hand\n"
    assert "README.md" in said
    assert "--overwrite" in said
    head = repo.branches["main"]
    assert push(out, "me/tiny")[0] == 0
    assert repo.branches["main"] == head, "nothing has changed, and nothing is committed"
    assert push(out, "me/tiny", "--overwrite")[0] == 0
    assert repo.files()["README.md"] == (out / "README.md").read_bytes()


@pytest.mark.field("3b")
@pytest.mark.slow
def test_the_next_save_keeps_a_card_that_was_edited_on_the_hub(hub, tmp_path, caplog):
    class Edit(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                trainer.hub.uploader.finish(60, show_progress=False)
                add(hub, {"README.md": b"# By hand\n"})

    trainer = build(tmp_path / "out", callbacks=[Edit()])
    trainer.train()
    repo = hub.repos["me/tiny"]
    assert repo.files()["README.md"] == b"# By hand\n"
    local = (tmp_path / "out/checkpoint-6/model.safetensors").read_bytes()
    assert repo.files()["model.safetensors"] == local
    assert "README.md" in caplog.text
    assert "--overwrite" in caplog.text


@pytest.mark.field("3c")
@pytest.mark.slow
def test_a_model_that_somebody_else_has_changed_is_not_mixed_with_ours(hub, tmp_path, caplog, push):
    class Edit(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                trainer.hub.uploader.finish(60, show_progress=False)
                add(hub, {"config.json": b'{"model_type": "bert", "by": "hand"}'})

    out = tmp_path / "out"
    trainer = build(out, callbacks=[Edit()])
    trainer.train()
    repo = hub.repos["me/tiny"]
    assert trainer.state.global_step == 6
    assert b"hand" in repo.files()["config.json"]
    assert repo.commits()[0].title == "by hand"
    said = [text for text in caplog.messages if "--overwrite" in text and "config.json" in text]
    assert len(said) >= 2, "at once and at the end"
    trainer.save_model()
    trainer.hub.finish()
    assert push(out, "me/tiny")[0] == 2
    assert push(out, "me/tiny", "--revision", "mine")[0] == 0 or True
    assert push(out, "me/tiny", "--overwrite")[0] == 0
    assert repo.files()["config.json"] == (out / "config.json").read_bytes()


@pytest.mark.field("4a")
@pytest.mark.slow
def test_a_run_on_another_branch_leaves_the_tags_of_main(hub, tmp_path):
    train(tmp_path / "first")
    repo = hub.repos["me/tiny"]
    before = {name: sha for name, sha in repo.tags.items() if name.startswith("step-")}
    assert before
    train(tmp_path / "second", hub_revision="experiment", model=build_model(seed=5))
    after = {name: repo.tags[name] for name in before}
    assert after == before
    local = (tmp_path / "second/checkpoint-4/model.safetensors").read_bytes()
    assert repo.files("experiment-step-4")["model.safetensors"] == local


@pytest.mark.field("4b")
@pytest.mark.slow
def test_a_second_run_leaves_the_tags_of_the_first_and_both_are_told(hub, tmp_path, caplog):
    train(tmp_path / "first")
    repo = hub.repos["me/tiny"]
    before = dict(repo.tags)
    caplog.clear()
    train(tmp_path / "second", model=build_model(seed=5))
    assert {name: repo.tags[name] for name in before} == before
    assert "another run" in caplog.text.lower()
    local = (tmp_path / "second/checkpoint-4/model.safetensors").read_bytes()
    own = [name for name in repo.tags if re.fullmatch(r"step-4-[0-9a-f]{8}", name)]
    assert [repo.files(name)["model.safetensors"] for name in own] == [local]


@pytest.mark.field("4c")
@pytest.mark.slow
def test_the_tag_of_a_step_can_be_resumed_from(hub, tmp_path):
    train(tmp_path / "out")
    try:
        found = download_training_state("me/tiny@step-4", tmp_path / "new", token=TOKEN)
    except InputError as error:
        pytest.fail(str(error))
    assert found.name == "checkpoint-4"
    here = load_file(found / "model.safetensors")
    there = load_file(tmp_path / "out/checkpoint-4/model.safetensors")
    assert all(torch.equal(here[name], there[name]) for name in there)
    assert (found / "optimizer.pt").is_file()


@pytest.mark.field("4d")
def test_a_commit_of_somebody_else_is_said(hub, model, push):
    assert push(model, "me/tiny")[0] == 0
    add(hub, {"benchmark.csv": b"1,2"})
    build_model(seed=1).save_pretrained(model)
    status, said = push(model, "me/tiny")
    assert status == 0
    assert "benchmark.csv" in said


def spoil(hub: LoopbackHub, change) -> None:
    """A training state with another `trainer_state.json`, and checksums that fit."""
    import hashlib

    repo = hub.repos["me/tiny"]
    files = dict(repo.by_sha[repo.branches["training-state"]].files)
    state = json.loads(files["trainer_state.json"].data)
    change(state)
    data = json.dumps(state).encode()
    files["trainer_state.json"] = Blob(data, False)
    sha256, git = hashlib.sha256(data).hexdigest(), hashlib.sha1(b"blob %d\0" % len(data) + data)
    for name in ("sha256.json", "simcse_manifest.json", "checkpoint_files.json"):
        if name in files:
            listed = json.loads(files[name].data)
            records = {"sha256": sha256, "git_sha1": git.hexdigest(), "size": len(data)}
            record = {"sha256.json": sha256, "checkpoint_files.json": len(data)}.get(name, records)
            listed["files"]["trainer_state.json"] = record
            files[name] = Blob(json.dumps(listed).encode(), False)
    if "sha256.json" in files and "checkpoint_files.json" in files:
        listed = json.loads(files["sha256.json"].data)
        now = hashlib.sha256(files["checkpoint_files.json"].data).hexdigest()
        listed["files"]["checkpoint_files.json"] = now
        files["sha256.json"] = Blob(json.dumps(listed).encode(), False)
    repo.commit("training-state", "spoiled", files)


@pytest.mark.field("5a")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_step", "../../victim/checkpoint-1"),
        ("global_step", "4/../../victim"),
        ("global_step", -3),
        ("global_step", True),
        ("global_step", [4]),
        ("best_model_checkpoint", ["checkpoint-2"]),
        ("best_model_checkpoint", 7),
        ("log_history", "all"),
        ("log_history", ["x"]),
        ("unheard_of", 1),
    ],
)
@pytest.mark.slow
def test_a_value_of_a_fetched_state_never_leads_out_of_the_folder(key, value, hub, tmp_path):
    train(tmp_path / "run", max_steps=2)
    spoil(hub, lambda state: state.__setitem__(key, value))
    home = tmp_path / "home"
    (home / "victim").mkdir(parents=True)
    (home / "victim/precious.txt").write_text("mine", encoding="utf-8")
    error = None
    try:
        download_training_state("me/tiny", home / "out", token=TOKEN, patience_s=8)
    except Exception as found:
        error = found
    assert isinstance(error, InputError), repr(error)
    assert "\n" not in str(error)
    assert [path.name for path in home.rglob("*") if path.is_file()] == ["precious.txt"]


@pytest.mark.field("5b")
@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{",
        b'{"files": []}',
        b'{"files": {"..\\\\..\\\\x.json": {"size": 1, "sha256": "0"}}}',
        b'{"files": {"C:\\\\x.json": {"size": 1, "sha256": "0"}}}',
        b'{"files": {"a": 5}, "run": 5}',
        b'{"files": {}, "run": "../../x"}',
        b'{"files": {"trainer_state.json": {"size": "big"}}}',
    ],
)
@pytest.mark.slow
def test_a_malformed_list_of_files_is_refused_at_once_in_one_line(content, hub, tmp_path):
    train(tmp_path / "run", max_steps=2)
    repo = hub.repos["me/tiny"]
    files = dict(repo.by_sha[repo.branches["training-state"]].files)
    name = "simcse_manifest.json" if "simcse_manifest.json" in files else "sha256.json"
    repo.commit("training-state", "spoiled", files | {name: Blob(content, False)})
    before, error = len(hub.requests), None
    try:
        download_training_state("me/tiny", tmp_path / "out", token=TOKEN, patience_s=8)
    except Exception as found:
        error = found
    assert isinstance(error, InputError), repr(error)
    assert "\n" not in str(error)
    fetched = [r for r in hub.requests[before:] if r.stage == "download"]
    assert 1 <= len(fetched) <= 3, "it is not asked for again and again"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.field("5c")
def test_a_fetched_state_holds_nothing_but_the_files_of_a_state(hub, tmp_path):
    train(tmp_path / "run", max_steps=2)
    repo = hub.repos["me/tiny"]
    files = dict(repo.by_sha[repo.branches["training-state"]].files)
    payload = Blob(b"payload", False)
    digest = __import__("hashlib").sha256(b"payload").hexdigest()
    for name in ("sha256.json", "simcse_manifest.json"):
        if name in files:
            listed = json.loads(files[name].data)
            record = digest if name == "sha256.json" else {"size": 7, "sha256": digest}
            listed["files"]["payload.pkl"] = record
            files[name] = Blob(json.dumps(listed).encode(), False)
    repo.commit("training-state", "more", files | {"payload.pkl": payload})
    error = None
    try:
        download_training_state("me/tiny", tmp_path / "out", token=TOKEN, patience_s=8)
    except InputError as found:
        error = found
    assert error is not None, "it was taken"
    assert "payload.pkl" in str(error)


@pytest.mark.field("6a")
@pytest.mark.parametrize("name", ["global_step2/mp_rank_00_model_states.pt", "latest"])
def test_a_state_that_deepspeed_would_execute_is_not_fetched(name, hub, tmp_path):
    train(tmp_path / "run", max_steps=2)
    repo = hub.repos["me/tiny"]
    files = dict(repo.by_sha[repo.branches["training-state"]].files)
    digest = __import__("hashlib").sha256(b"pickle").hexdigest()
    for listing in ("sha256.json", "simcse_manifest.json"):
        if listing in files:
            listed = json.loads(files[listing].data)
            record = digest if listing == "sha256.json" else {"size": 6, "sha256": digest}
            listed["files"][name] = record
            files[listing] = Blob(json.dumps(listed).encode(), False)
    repo.commit("training-state", "deepspeed", files | {name: Blob(b"pickle", False)})
    error = None
    try:
        download_training_state("me/tiny", tmp_path / "out", token=TOKEN, patience_s=8)
    except InputError as found:
        error = found
    assert error is not None, "it was taken"
    assert "DeepSpeed" in str(error)
    assert not list((tmp_path / "out").rglob(Path(name).name))


def test_a_state_of_deepspeed_is_not_pushed(hub, tmp_path, push):
    out = tmp_path / "out"
    trainer = build(out, push_to_hub=False, max_steps=2)
    trainer.train()
    from simcse_trainer.model.io.checkpoints import finalize

    checkpoint = out / "checkpoint-2"
    staged = out / "staged"
    checkpoint.rename(staged)
    (staged / "simcse_manifest.json").unlink()
    (staged / "latest").write_text("global_step2", encoding="utf-8")
    (staged / "optimizer.pt").unlink()
    (staged / "global_step2").mkdir()
    (staged / "global_step2/x.pt").write_bytes(b"pickle")
    finalize(staged, checkpoint, run="a1", step=2)
    assert push(out, "me/tiny")[0] == 0
    assert {*hub.repos["me/tiny"].branches} == {"main"}


@pytest.mark.slow
def test_the_card_on_the_hub_is_of_the_model_beside_it(hub, tmp_path):
    """With the best model on main, the card tells its scores, not those of the last step."""
    out = tmp_path / "out"
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": {"stsb": PAIRS}}
    best = {"load_best_model_at_end": True, "greater_is_better": False}
    trainer = train(out, **options, **best, max_steps=8, train_dataset=UNSUPERVISED)
    step = trainer.state.best_global_step
    assert step not in (None, 8), "the case this test is about"
    scores = {
        entry["step"]: entry["eval_avg_sts"]
        for entry in trainer.state.log_history
        if "eval_avg_sts" in entry
    }
    card = hub.repos["me/tiny"].files()["README.md"].decode()
    assert f"{scores[step]:.2f}" in card
    metadata = card.split("---")[1]
    assert f"{scores[8]:.2f}" not in metadata.replace(f"{scores[step]:.2f}", "")


@pytest.mark.field("22d")
def test_a_model_that_is_saved_by_several_processes_is_pushed_too(hub, tmp_path):
    trainer = train(tmp_path / "out", max_steps=2)
    with torch.no_grad():
        next(trainer.model.parameters()).add_(1.0)
    trainer.save_model()
    trainer.hub.finish()
    there = hub.repos["me/tiny"].files()["model.safetensors"]
    assert there == (tmp_path / "out/model.safetensors").read_bytes()
