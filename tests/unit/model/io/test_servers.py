"""What servers make of a folder: our warnings, and the rules of text-embeddings-inference."""

from __future__ import annotations

import json

import pytest
from helpers.command_line import run
from helpers.folders import make
from helpers.tiny import save_tiny, tiny_tokenizer
from tokenizers import Tokenizer

from simcse_trainer import SimCSEModel
from simcse_trainer.model.io.servers import GRAPH, list_server_warnings
from simcse_trainer.model.lora import lora_config
from simcse_trainer.model.pooling import POOLING_MODES

HEAD, LAYERS, REFUSED, MPNET = "projection head", "without a word, by text", "is refused", "MPNet"


def save(folder, family="bert", **options):
    options = {"pooling_mode": "mean", "max_seq_length": 24, **options}
    model = SimCSEModel.from_pretrained(save_tiny(folder / "base", family), **options)
    model.save_pretrained(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("bert", {}, []),
        ("bert", {"pooling_mode": "cls", "mlp_only_train": True}, []),
        ("bert", {"pooling_mode": "cls", "mlp_only_train": False}, [HEAD]),
        ("bert", {"pooling_mode": "avg_first_last"}, [LAYERS]),
        ("roberta", {"pooling_mode": "avg_top2"}, [LAYERS]),
        ("bert", {"pooling_mode": "max"}, [REFUSED]),
        ("bert", {"pooling_mode": "weightedmean"}, [REFUSED]),
        ("mpnet", {}, [MPNET]),
        (
            "mpnet",
            {"pooling_mode": "max", "projection_head": "mlp", "mlp_only_train": False},
            [HEAD, REFUSED, MPNET],
        ),
        ("qwen3", {"pooling_mode": "lasttoken"}, []),
    ],
)
def test_what_is_read_wrongly_or_refused_is_said(family, options, said, tmp_path):
    found = list_server_warnings(save(tmp_path, family, **options))
    assert len(found) == len(said)
    assert all(part in text for part, text in zip(said, found, strict=True))


@pytest.mark.parametrize("both_sides", [True, None])
def test_an_adapter_has_to_be_merged(both_sides, tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    options = {"lora": lora_config(r=2), "bidirectional_attention": both_sides}
    model = SimCSEModel.from_pretrained(base, **options)
    model.save_pretrained(tmp_path / "saved", lora_save="adapter")
    (warning,) = list_server_warnings(tmp_path / "saved")
    assert f"simcse-trainer merge {tmp_path / 'saved'} MERGED" in warning
    model.save_pretrained(tmp_path / "both", lora_save="both")
    assert list_server_warnings(tmp_path / "both") == []


def test_merging_ends_with_the_warnings(tmp_path, monkeypatch, capsys):
    base = save_tiny(tmp_path / "base", "llama")
    model = SimCSEModel.from_pretrained(base, lora=lora_config(r=2), pooling_mode="weightedmean")
    model.save_pretrained(tmp_path / "adapter", lora_save="adapter")
    merged = tmp_path / "merged"
    assert run(monkeypatch, "merge", tmp_path / "adapter", merged) == 0
    (warning,) = list_server_warnings(merged)
    said = capsys.readouterr()
    assert f"warning: {warning}\n" in said.err
    assert "warning" not in said.out


def test_a_graph_is_not_read_by_llama_cpp_and_has_its_embedding(tmp_path):
    folder = save(tmp_path, "mpnet", projection_head="mlp", mlp_only_train=False)
    (folder / GRAPH).parent.mkdir()
    (folder / GRAPH).touch()
    (warning,) = list_server_warnings(folder)
    assert "llama.cpp" not in warning
    assert "sentence_embedding" in warning


def test_a_plain_backbone_promises_nothing(tmp_path):
    folder = tmp_path / "base"
    save_tiny(folder, tokenizer=tiny_tokenizer())
    assert list_server_warnings(folder) == []


def load_as_inference_server(folder):
    """Apply the rules by which text-embeddings-inference's router loads a folder.

    Returns its pooling and its longest input, or raises what it lacks.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert all(isinstance(name, str) for name in config["architectures"])
    assert not any(name.endswith("Classification") for name in config["architectures"])
    assert isinstance(config["model_type"], str)
    assert isinstance(config.get("max_position_embeddings", config.get("n_positions")), int)
    # A missing one is 0; null is no number.
    assert isinstance(config.get("pad_token_id", 0), int)
    pooling = json.loads((folder / "1_Pooling/config.json").read_text(encoding="utf-8"))
    required = ["cls_token", "mean_tokens", "max_tokens"]
    assert all(isinstance(pooling[f"pooling_mode_{name}"], bool) for name in required)
    chosen = [name for name, on in pooling.items() if "_mode_" in name and on is True]
    assert len(chosen) == 1
    known = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_lasttoken": "last-token",
    }
    Tokenizer.from_file(str(folder / "tokenizer.json"))
    reading = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
    assert isinstance(reading["max_seq_length"], int)
    weights = ("model.safetensors", "model.safetensors.index.json")
    assert any((folder / name).is_file() for name in weights)
    return known[chosen[0]], reading["max_seq_length"]


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [
        ("bert, cls and head", "cls"),
        ("bert, mean", "mean"),
        ("bert, prompt", "mean"),
        ("bert, length 1", "mean"),
        ("qwen3, last", "last-token"),
        ("qwen3, both sides", "mean"),
    ],
)
def test_a_trained_folder_has_what_text_embeddings_inference_asks_for(kind, pooling, tmp_path):
    _, folder = make(tmp_path, kind)
    assert load_as_inference_server(folder) == (pooling, 24)


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_what_it_does_not_read_has_a_warning(mode, tmp_path):
    folder = save(tmp_path, pooling_mode=mode, projection_head="none")
    try:
        pooling, _ = load_as_inference_server(folder)
    except (KeyError, FileNotFoundError):
        pooling = None
    assert (pooling is None) == any("text-embeddings" in x for x in list_server_warnings(folder))
