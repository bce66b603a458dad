"""ONNX graphs: the embeddings of the model, or nothing."""

import json

import numpy as np
import pytest
import torch
from helpers.checks import fails
from helpers.command_line import error, run
from helpers.folders import TEXTS
from helpers.tiny import save_tiny

from simcse_trainer import SimCSEModel
from simcse_trainer.inference import onnx_export
from simcse_trainer.inference.onnx_export import _Graph, check_export, export_onnx
from simcse_trainer.model.lora import lora_config
from simcse_trainer.model.packing import build_batch
from simcse_trainer.model.pooling import POOLING_MODES


def make(folder, family="bert", changes=None, **options):
    base = save_tiny(folder / "base", family, **(changes or {}))
    options = {"max_seq_length": 24, "padding_free": False, **options}
    return SimCSEModel.from_pretrained(base, **options).eval()


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("options", [{}, {"projection_head": "mlp", "mlp_only_train": False}])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_graph_computes_what_encode_does(mode, options, normalize, tmp_path):
    model = make(tmp_path, pooling_mode=mode, normalize_embeddings=normalize, **options)
    ids = model.tokenize(TEXTS)
    batch = build_batch(ids, padding_free=False, pad_token_id=model.pad_token_id)
    with torch.no_grad():
        _, found = _Graph(model)(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(found, model.encode(TEXTS), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_exported_is_one_line_and_no_folder(tmp_path, monkeypatch, capsys):
    adapted = make(tmp_path, "llama", lora=lora_config(r=2))
    fails(lambda: export_onnx(adapted, tmp_path / "out"), "simcse-trainer merge MODEL MERGED")
    assert not (tmp_path / "out").exists()
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    fails(lambda: check_export(full), "is there already", "new folder")
    monkeypatch.chdir(tmp_path)
    words = ("export", "base", "out", "--format", "gguf")
    assert "expected onnx" in error(monkeypatch, capsys, *words)
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None)
    said = error(monkeypatch, capsys, "export", "base", "out")
    assert "onnx and onnxscript and onnxruntime" in said
    assert "pip install 'simcse-trainer[onnx]'" in said
    assert [path.name for path in full.iterdir()] == ["notes.txt"]


def read_session(folder, name="model.onnx"):
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(folder / "onnx" / name, providers=["CPUExecutionProvider"])


@pytest.mark.slow
def test_export_of_a_head_in_8_bits_at_the_command_line(tmp_path, monkeypatch, capsys):
    model = make(tmp_path, pooling_mode="cls", mlp_only_train=False)
    model.save_pretrained(tmp_path / "trained")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "export", "trained", "out", "--format", "onnx", "--int8") == 0
    said = capsys.readouterr()
    assert "onnx/model.onnx, onnx/model_quantized.onnx" in said.out
    assert "Smallest cosine with the model's own embeddings: 1.000000" in said.out
    assert float(said.out.split("cosine in 8 bits: ")[1].split(".\n")[0]) > 0.99
    assert "Traceback" not in said.err
    assert "is there already" in error(monkeypatch, capsys, "export", "trained", "out")
    folder = tmp_path / "out"
    weights = [path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")]
    assert weights == ["2_Dense/model.safetensors"]
    assert not list(folder.glob(".simcse-tmp-*"))
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertModel"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes", "options"),
    [
        ("bert", {}, {"pooling_mode": "avg_first_last", "projection_head": "none"}),
        ("roberta", {}, {"pooling_mode": "cls", "mlp_only_train": False}),
        # A layer of each kind.
        (
            "gemma3_text",
            {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
            {"bidirectional_attention": True, "pooling_mode": "lasttoken"},
        ),
    ],
)
def test_readers_of_the_folder_get_our_embeddings(family, changes, options, tmp_path, monkeypatch):
    """By the outputs of the graph alone, and as sentence-transformers pools its tokens."""
    modules = pytest.importorskip("sentence_transformers.models")
    from transformers import AutoTokenizer

    model = make(tmp_path, family, changes, **options)
    folder = tmp_path / "out"
    if family == "gemma3_text":  # as of a model too large for one file
        monkeypatch.setattr(onnx_export, "_MOST_BYTES_OF_A_FILE", 1)
    assert export_onnx(model, folder).cosine > 0.999999
    assert (folder / "onnx/model.onnx.data").is_file() == (family == "gemma3_text")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="np")
    given = {name: batch[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    tokens, embeddings = map(torch.from_numpy, read_session(folder).run(None, given))
    expected = model.encode(TEXTS)
    torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-4)
    features = {"token_embeddings": tokens, "attention_mask": torch.tensor(batch["attention_mask"])}
    for module in json.loads((folder / "modules.json").read_text())[1:]:
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Dense":
            features["sentence_embedding"] = model.head(features["sentence_embedding"])
        else:
            features = getattr(modules, kind).load(str(folder / module["path"]))(features)
    torch.testing.assert_close(features["sentence_embedding"], expected, rtol=1e-4, atol=1e-4)


def test_a_graph_that_embeds_otherwise_is_not_kept(tmp_path, monkeypatch):
    model = make(tmp_path, "distilbert", pooling_mode="mean")
    monkeypatch.setattr(onnx_export, "_write_graph", lambda _, path: path.write_bytes(b"graph"))
    monkeypatch.setattr(onnx_export, "_compare", lambda *_: 0.98)
    fails(lambda: export_onnx(model, tmp_path / "out"), "smallest cosine is 0.9800", "0.9999")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(onnx_export, "_compare", lambda *_: float("nan"))
    (tmp_path / "empty").mkdir()
    fails(lambda: export_onnx(model, tmp_path / "empty"), "smallest cosine is nan")
    assert list((tmp_path / "empty").iterdir()) == []


def test_what_torch_cannot_export_is_one_line(tmp_path, monkeypatch):
    model = make(tmp_path, pooling_mode="mean")

    def fail(*_, **__):
        raise torch.onnx.errors.OnnxExporterError("first\nsecond") from ValueError("no\nsuch op")

    monkeypatch.setattr(torch.onnx, "export", fail)
    fails(lambda: export_onnx(model, tmp_path / "out"), "cannot write a bert as ONNX (no)")
    assert not (tmp_path / "out").exists()
