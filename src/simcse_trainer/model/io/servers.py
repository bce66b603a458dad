"""What common servers and libraries make of a model folder, by the files in it."""

from __future__ import annotations

from pathlib import Path

from simcse_trainer.files import ADAPTER_CONFIG, CONFIG, HIDDEN_ADAPTER
from simcse_trainer.model.io.layout import read_layout
from simcse_trainer.model.io.tensors import read_json
from simcse_trainer.model.pooling import LAYER_PAIRS

# Where sentence-transformers, transformers.js and others look for a graph.
GRAPH = "onnx/model.onnx"

_HEAD = (
    "The projection head is left out without a word by {readers}, which then give other "
    "embeddings. For them train with --projection_head none{instead}."
)
_POOLING = {
    **dict.fromkeys(
        LAYER_PAIRS,
        "Pooling '{mode}' is read as the first token or the last layer, without a word, by "
        "text-embeddings-inference and vLLM. For them train with --pooling_mode mean, or export "
        "the folder to ONNX, which computes it.",
    ),
    **dict.fromkeys(
        ("max", "weightedmean"),
        "Pooling '{mode}' is refused by text-embeddings-inference and vLLM. For them train with "
        "--pooling_mode mean.",
    ),
}


def list_server_warnings(folder: Path) -> list[str]:
    """List what readers other than sentence-transformers would read wrongly, or refuse.

    Args:
        folder: Of a model: trained, merged, or exported to ONNX.

    Returns:
        A sentence or two for each, with what to do; docs/deploy.md has the rest.
    """
    if any((folder / part / ADAPTER_CONFIG).is_file() for part in ("", HIDDEN_ADAPTER)):
        return [
            "An adapter is read by no server without its base. For text-embeddings-inference, vLLM "
            f"and llama.cpp merge it: simcse-trainer merge {folder} MERGED."
        ]
    layout = read_layout(str(folder))
    if layout is None:
        return []
    found = []
    is_graph = (folder / GRAPH).is_file()
    if layout.dense is not None:
        readers = "fastembed and transformers.js"
        readers = readers if is_graph else f"llama.cpp, {readers}"
        instead = ", or take the graph's output sentence_embedding" if is_graph else ""
        found.append(_HEAD.format(readers=readers, instead=instead))
    if layout.pooling_mode in _POOLING:
        text = _POOLING[layout.pooling_mode]
        found.append(text.format(mode=layout.pooling_mode))
    if read_json(folder / CONFIG).get("model_type") == "mpnet" and not is_graph:
        found.append("MPNet is not read by llama.cpp. For it train another backbone.")
    return found
