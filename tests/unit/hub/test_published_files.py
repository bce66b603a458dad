"""What of a folder is published, and without the paths of this machine."""

import json

import pytest

from simcse_trainer.hub.model_card import cut_paths
from simcse_trainer.hub.published_files import is_deepspeed, is_resumed, link_files, list_published


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/my runs/out", "out"),
        (r"C:\Users\me\out", "out"),
        ("--output_dir=/home/me/out/", "--output_dir=out"),
        ("saved in ~/runs/out and ~/x", "saved in out and x"),
        ("file:///home/me/a.csv", "a.csv"),
        (r"\\server\share\a.csv", "a.csv"),
        ("https://hf.co/me/out", "https://hf.co/me/out"),
        ("me/out", "me/out"),
        ("0.1/0.2", "0.1/0.2"),
    ],
)
def test_paths_are_cut_to_their_last_name(text, shown):
    assert cut_paths({"a": [text]}) == {"a": [shown]}


def test_configurations_lose_paths_and_vocabularies_keep_slashes(tmp_path):
    config = {"_name_or_path": "/home/me/bert", "sep_token": "/", "pad_token": "~"}
    tokens = {"vocab": {"/home": 0, "/": 1}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens), encoding="utf-8")
    link_files(tmp_path, tmp_path / "out", ["tokenizer_config.json", "tokenizer.json"])
    written = [
        json.loads((tmp_path / "out" / name).read_text(encoding="utf-8"))
        for name in ("tokenizer_config.json", "tokenizer.json")
    ]
    assert written == [config | {"_name_or_path": "bert"}, tokens]


def test_a_folder_of_modules_is_read_where_modules_json_says_and_stays_inside(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("pooling/config.json", "elsewhere/config.json", "../outside/config.json"):
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text("{}", encoding="utf-8")
    modules = [{"path": path} for path in ("", "pooling", "../outside", 7)]
    text = json.dumps([*modules, "x"])
    (tmp_path / "model/modules.json").write_text(text, encoding="utf-8")
    found = list_published(tmp_path / "model")
    assert sorted(found) == ["modules.json", "pooling/config.json"]


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("optimizer.pt", True),
        ("rng_state_1.pth", True),
        ("model.safetensors", True),
        ("best_model/1_Pooling/config.json", True),
        ("payload.pkl", False),
        ("best_model/optimizer.pt", False),
        ("optimizer.pt.sh", False),
        ("pytorch_model.bin", False),
    ],
)
def test_a_state_holds_known_names_only(name, allowed):
    assert is_resumed(name) is allowed


def test_what_deepspeed_reads_is_known():
    assert is_deepspeed("global_step2/mp_rank_00_model_states.pt")
    assert is_deepspeed("latest")
    assert not is_deepspeed("optimizer.pt")
