"""The blocks of docs/deploy.md: they run, and give what the model gives."""

import ast

import numpy as np
import pytest
from helpers import ROOT
from helpers.documents import read_page
from helpers.tiny import save_tiny

from simcse_trainer import SimCSE, SimCSEModel
from simcse_trainer.inference.onnx_export import export_onnx

BLOCKS = [b for b in read_page(ROOT / "docs/deploy.md").blocks if b.language == "python"]
QUERY = "Where is my order?"


def packages(block):
    """What a block imports, in order; the first names it."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def name(block):
    return next(p for p in packages(block) if p != "numpy").split(".")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page's folders, of a model as small as it can be."""
    folder = tmp_path_factory.mktemp("deploy")
    (folder / "outputs").mkdir()
    base = save_tiny(folder / "base")
    model = SimCSEModel.from_pretrained(base, pooling_mode="mean", padding_free=False)
    model.save_pretrained(folder / "outputs/quickstart")
    pytest.importorskip("onnxscript", reason="the folder of a graph needs onnxscript")
    export_onnx(model, folder / "outputs/quickstart_onnx")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=name)
def test_a_block_gives_our_embeddings_or_our_nearest_text(block, folder, monkeypatch):
    for package in packages(block):
        pytest.importorskip(package, reason=f"pip install {package.split('.')[0]}")
    monkeypatch.chdir(folder)
    namespace = {}
    exec(compile(block.text, f"deploy.md, line {block.line}", "exec"), namespace)
    assert {"embeddings", "nearest"} & {*namespace}
    model, texts = SimCSE("outputs/quickstart"), namespace["texts"]
    expected = model.encode(texts, return_numpy=True)
    if "embeddings" in namespace:
        found = np.array(namespace["embeddings"])
        found = found / np.linalg.norm(found, axis=1, keepdims=True)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    if "nearest" in namespace:
        scores = expected @ model.encode(QUERY, return_numpy=True)
        assert scores[texts.index(namespace["nearest"])] == pytest.approx(scores.max(), abs=1e-6)


def test_every_tool_is_on_the_page():
    text = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    tools = """sentence-transformers|text-embeddings-inference|vLLM|infinity|ONNX Runtime|fastembed
        |transformers.js|llama.cpp|Ollama|LangChain|FAISS|Qdrant|Chroma|pgvector|Elasticsearch"""
    assert [tool.strip() for tool in tools.split("|") if tool.strip() not in text] == []
