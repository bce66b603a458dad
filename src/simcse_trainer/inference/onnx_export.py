"""A trained model as an ONNX graph, in a folder that ONNX Runtime's users can load.

The graph computes all that `SimCSEModel.encode` does after the tokenizer. Its outputs are

    last_hidden_state [B, L, D]      the token embeddings that are pooled: of two layers their mean
    sentence_embedding [B, D']       pooled, with the projection head where inference uses it

so that a reader may pool by itself, as sentence-transformers does, or take what is there.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from simcse_trainer.errors import InputError
from simcse_trainer.model.io.saving import replaced_at_once, save_without_weights
from simcse_trainer.model.io.servers import GRAPH
from simcse_trainer.model.lora import has_adapter
from simcse_trainer.model.modeling import SimCSEModel
from simcse_trainer.model.packing import build_batch
from simcse_trainer.model.pooling import LAYER_PAIRS, select_layers

_INPUTS = ("input_ids", "attention_mask")
_OUTPUTS = ("last_hidden_state", "sentence_embedding")
# As transformers.js calls it.
QUANTIZED = "onnx/model_quantized.onnx"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# A graph with its weights is one file below what a message of protobuf can hold.
_MOST_BYTES_OF_A_FILE = 1.8e9
_LEAST_COSINE = 0.9999

# Of several lengths and scripts, an empty one, and one that is longer than most models can take.
_PROBE_TEXTS = (
    "A woman is reading a book in the garden.",
    "12 kg of rice",
    "",
    "서울은 오늘 비가 온다.",
    "a",
    "the big red cat runs on the small mat " * 80,
)


@dataclass(frozen=True)
class Exported:
    """What an export has measured.

    Attributes:
        files: Names of the graphs in the folder.
        cosine: The smallest of graph and model over the probe texts, batched and alone.
        int8_cosine: The same of the graph in 8 bits; None where there is none.
    """

    files: tuple[str, ...]
    cosine: float
    int8_cosine: float | None


def export_onnx(model: SimCSEModel, folder: Path, *, int8: bool = False) -> Exported:
    """Write a new folder with the model as a graph, its tokenizer and its layout.

    Args:
        model: In float32 and without an adapter; padded batches suffice.
        folder: One that does not exist, or an empty one. It is complete, or absent.
        int8: Also write a graph whose weights have 8 bits.

    Raises:
        InputError: The folder holds something, a package is missing, an adapter is not merged,
            torch cannot export such a backbone, or the graph embeds texts otherwise.
    """
    check_export(folder)
    _check_model(model)
    made = not folder.exists()
    files = (GRAPH, QUANTIZED) if int8 else (GRAPH,)
    try:
        with replaced_at_once(folder) as tmp_dir:
            (tmp_dir / GRAPH).parent.mkdir(parents=True)
            pair = model.pooling_mode in LAYER_PAIRS
            save_without_weights(model, tmp_dir, "mean" if pair else model.pooling_mode)
            _write_graph(model, tmp_dir / GRAPH)
            cosine = _compare(model, tmp_dir / GRAPH)
            if not cosine >= _LEAST_COSINE:
                raise InputError(
                    f"The graph of this {model.config.model_type} embeds texts otherwise: the "
                    f"smallest cosine is {cosine:.4f}, expected at least {_LEAST_COSINE}. Use the "
                    "folder as it is, with sentence-transformers or another server of PyTorch."
                )
            int8_cosine = None
            if int8:
                _quantize(tmp_dir / GRAPH, tmp_dir / QUANTIZED)
                int8_cosine = _compare(model, tmp_dir / QUANTIZED)
    except BaseException:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise
    return Exported(files, cosine, int8_cosine)


def check_export(folder: Path) -> None:
    """Raise InputError where a folder holds something, or a package is missing."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(
            f"Writing ONNX needs {' and '.join(missing)}. Run pip install 'simcse-trainer[onnx]'."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already; pass the name of a new folder.")


def _check_model(model: SimCSEModel) -> None:
    if has_adapter(model.backbone):
        raise InputError(
            "This model is an adapter on its base. Merge them first, by simcse-trainer merge MODEL "
            "MERGED, and export the merged folder."
        )
    if model.tokenizer is None:
        raise InputError("This model has no tokenizer; pass one: SimCSEModel(backbone, tokenizer).")


class _Graph(nn.Module):
    """The model on padded batches, by operations that ONNX has."""

    def __init__(self, model: SimCSEModel):
        super().__init__()
        self.backbone = model.backbone
        self.head = model.head if model.mlp_only_train is False else None
        self.pooling_mode = model.pooling_mode
        self.normalize = model.normalize_embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        out = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=self.pooling_mode in LAYER_PAIRS,
            **({"use_cache": False} if hasattr(self.backbone.config, "use_cache") else {}),
        )
        tokens = out.last_hidden_state
        if self.pooling_mode in LAYER_PAIRS:
            tokens = select_layers(out.hidden_states, self.pooling_mode)
        embeddings = _pool(tokens, attention_mask, self.pooling_mode)
        if self.head is not None:
            embeddings = self.head(embeddings)
        return tokens, normalize(embeddings, dim=1) if self.normalize else embeddings


def _pool(tokens: Tensor, mask: Tensor, mode: str) -> Tensor:
    """Compute `pooling.pool` of a batch [B, L, D] that is padded on the right."""
    if mode == "cls":
        return tokens[:, 0]
    if mode == "lasttoken":
        last = (mask.sum(1) - 1)[:, None, None].expand(-1, 1, tokens.shape[2])
        return tokens.gather(1, last)[:, 0]
    if mode == "max":
        return tokens.masked_fill(mask[:, :, None] == 0, torch.finfo(tokens.dtype).min).amax(1)
    weights = mask.to(tokens.dtype)
    if mode == "weightedmean":
        weights = weights * weights.cumsum(1)
    weights = weights[:, :, None]
    return (tokens * weights).sum(1) / weights.sum(1)


def _write_graph(model: SimCSEModel, path: Path) -> None:
    graph = _Graph(model).eval()
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    # Of two lengths, so that nothing is left out as unmasked.
    ids = torch.ones(2, 7, dtype=torch.int64, device=model.device)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    size = sum(x.numel() * x.element_size() for x in graph.parameters())
    with _quietly(), torch.no_grad():
        try:
            torch.onnx.export(
                graph,
                (ids, mask),
                path,
                dynamo=True,
                input_names=list(_INPUTS),
                output_names=list(_OUTPUTS),
                dynamic_shapes=dict.fromkeys(_INPUTS, axes),
                external_data=size > _MOST_BYTES_OF_A_FILE,
                verbose=False,
            )
        except (torch.onnx.errors.OnnxExporterError, NotImplementedError) as error:
            cause = error.__cause__ or error
            reason = next(filter(None, str(cause).splitlines()), type(cause).__name__)
            raise InputError(
                f"torch cannot write a {model.config.model_type} as ONNX ({reason.strip()}). Use "
                "the folder as it is, with sentence-transformers or another server of PyTorch."
            ) from error


def _quantize(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quietly():
        quantize_dynamic(
            source,
            target,
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=bool([*source.parent.glob("*.data")]),
        )


def _compare(model: SimCSEModel, path: Path) -> float:
    """Return the smallest cosine of graph and model over the probe texts, batched and alone."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    expected = model.encode(_PROBE_TEXTS)
    ids = model.tokenize(_PROBE_TEXTS)
    batched = _run(session, model, ids)
    alone = torch.cat([_run(session, model, [row]) for row in ids])
    cosines = [cosine_similarity(one, expected) for one in (batched, alone)]
    return float(torch.cat(cosines).nan_to_num(-1).min())


def _run(session: Any, model: SimCSEModel, ids: Sequence[Sequence[int]]) -> Tensor:
    batch = build_batch(ids, padding_free=False, pad_token_id=model.pad_token_id)
    given = {name: batch[name].to(torch.int64).numpy() for name in _INPUTS}
    return torch.from_numpy(session.run(["sentence_embedding"], given)[0])


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep to itself what exporters say about their own workings."""
    loggers = [logging.getLogger(name) for name in ("", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
