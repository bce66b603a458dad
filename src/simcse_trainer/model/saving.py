"""One folder, loaded by everyone: reading and writing a SimCSE model.

The backbone and the tokenizer write their own files, `layout` the ones beside them. Checkpoints
also hold what only training uses, in `training_heads.safetensors`, so that a run can go on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from simcse_trainer.errors import InputError
from simcse_trainer.model.backbones import load_backbone
from simcse_trainer.model.heads import MLMHead, ProjectionHead
from simcse_trainer.model.layout import Layout, find_file, read_layout, write_layout
from simcse_trainer.model.modeling import SimCSEModel
from simcse_trainer.model.packaged import resolve_packaged
from simcse_trainer.model.pooling import LAYER_PAIRS

logger = logging.getLogger(__name__)

TRAINING_HEADS = "training_heads.safetensors"
PROJECTION_HEADS = ("mlp", "none", "pooler")

# What tokenizers and configurations say when they know no limit is some number above this.
_UNLIMITED = 10**9

# The original project's checkpoints carry a trained pooler either way and no sentence-transformers
# files; only the name tells that the unsupervised ones are to be read before it.
_RELEASED = {"unsup-simcse-": "none", "sup-simcse-": "pooler"}


def load_model(
    name_or_path: str,
    *,
    pooling_mode: str | None = None,
    projection_head: str | None = None,
    mlp_only_train: bool | None = None,
    mlm_head: bool = False,
    max_seq_length: int | None = None,
    padding_free: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> SimCSEModel:
    """Load a trained folder, a sentence-transformers model or a plain backbone.

    Args:
        name_or_path: A folder, a name on the Hub, or a key of `PACKAGED_MODELS`.
        pooling_mode: By default what the folder says, else `cls`.
        projection_head: `mlp`: a linear layer with tanh (the folder's, else a new one); `pooler`:
            the backbone's own trained pooling layer as that head; `none`. By default what the
            folder says; for a plain backbone read by `cls`, `mlp` as in the paper, else `none`.
        mlp_only_train: Whether the head is left out at inference. By default what the folder
            says; for a new head the Trainer decides by the data.
        mlm_head: Also load the checkpoint's masked-language-model head.
        max_seq_length: By default what the folder says, else all that the backbone has room for.
        padding_free: Pack batches where that is exact.
        revision: Of the Hub repository.
        token: For the Hub.
        options: For the backbone's `from_pretrained`: dtype, trust_remote_code, ...

    Raises:
        InputError: Nothing there, or something that SimCSE cannot represent.
    """
    path = resolve_packaged(name_or_path)
    hub = {"revision": revision, "token": token}
    layout = read_layout(path, **hub)
    if projection_head is None and layout is None:
        projection_head = _released_head(path)
    if projection_head not in (None, *PROJECTION_HEADS):
        expected = ", ".join(PROJECTION_HEADS)
        raise InputError(f"projection_head is '{projection_head}'; expected one of {expected}.")
    backbone = load_backbone(path, pooling_layer=projection_head == "pooler", **hub, **options)
    tokenizer = _load_tokenizer(path, hub, options)
    saved = _saved_heads(path, hub)
    pooling_mode = pooling_mode or (layout.pooling_mode if layout else "cls")
    head, decided = _load_head(backbone, layout, saved, projection_head, pooling_mode)
    model = SimCSEModel(
        backbone,
        tokenizer,
        pooling_mode=pooling_mode,
        head=head,
        mlp_only_train=decided if mlp_only_train is None else mlp_only_train,
        mlm_head=_load_mlm_head(backbone, path, saved, mlm_head, hub | options),
        padding_free=padding_free,
    )
    model.max_seq_length = _max_length(max_seq_length, layout, model)
    _log_choices(model, name_or_path, asked=padding_free)
    return model


def save_model(
    model: SimCSEModel,
    folder: Path,
    *,
    training_heads: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a folder that SimCSEModel, AutoModel and SentenceTransformer load.

    Two saves of one model are byte-identical.

    Args:
        model: The model.
        folder: Made if it is not there.
        training_heads: Also write what only training uses, for resuming.
        state_dict: The model's, gathered from the processes where it is spread over them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if state_dict is None else state_dict
    backbone, head = _part(state, "backbone."), _part(state, "head.")
    exported = head if model.mlp_only_train is False else {}
    if model.pooling_mode == "cls" and has_tanh_pooler(model.backbone):
        # As the released checkpoints do: AutoModel's pooler_output is the sentence embedding.
        backbone |= {f"pooler.{name}": tensor for name, tensor in exported.items()}
    _save_backbone(model, folder, backbone)
    if model.tokenizer is not None:
        model.tokenizer.model_max_length = model.max_seq_length
        model.tokenizer.save_pretrained(folder)
    dense = {name.replace("dense.", "linear."): tensor for name, tensor in exported.items()}
    write_layout(
        folder,
        Layout(model.pooling_mode, model.max_seq_length, dense or None),
        hidden_size=model.config.hidden_size,
        num_layers=model.config.num_hidden_layers,
    )
    if training_heads:
        _save_training_heads(model, folder, state)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor.detach().contiguous()
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def _save_backbone(model: SimCSEModel, folder: Path, state: dict[str, Tensor]) -> None:
    config = model.backbone.config
    read_layers = config.output_hidden_states
    config.output_hidden_states = model.pooling_mode in LAYER_PAIRS
    model.backbone.save_pretrained(folder, state_dict=state)
    config.output_hidden_states = read_layers


def _save_training_heads(model: SimCSEModel, folder: Path, state: Mapping[str, Tensor]) -> None:
    """What the rest of the folder does not hold; named_parameters lists shared ones once."""
    prefixes = ("mlm_head.",) if model.mlp_only_train is False else ("mlm_head.", "head.")
    names = [name for name, _ in model.named_parameters() if name.startswith(prefixes)]
    if names:
        heads = {name: state[name].detach().contiguous() for name in names}
        save_file(heads, folder / TRAINING_HEADS)


def has_tanh_pooler(backbone: PreTrainedModel) -> bool:
    """Whether `AutoModel` of this family has a pooling layer of a linear layer and tanh."""
    with torch.device("meta"):
        names = dict(type(backbone)(backbone.config).named_parameters())
    weight = names.get("pooler.dense.weight")
    size = backbone.config.hidden_size
    return weight is not None and weight.shape == (size, size)


def _saved_heads(path: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    found = find_file(path, TRAINING_HEADS, **hub)
    return {} if found is None else load_file(found)


def _released_head(path: str) -> str | None:
    name = Path(path).name
    return next((head for prefix, head in _RELEASED.items() if name.startswith(prefix)), None)


def _load_head(
    backbone: PreTrainedModel,
    layout: Layout | None,
    saved: dict[str, Tensor],
    projection_head: str | None,
    pooling_mode: str,
) -> tuple[ProjectionHead | None, bool | None]:
    """The head, and whether it is for training only (None: not decided yet)."""
    if projection_head == "pooler":
        return _take_pooler(backbone), False
    if projection_head == "none":
        return None, None
    size = backbone.config.hidden_size
    if layout is not None and layout.dense is not None:
        head = ProjectionHead(*reversed(layout.dense["linear.weight"].shape))
        head.dense.load_state_dict(
            {name.removeprefix("linear."): tensor for name, tensor in layout.dense.items()}
        )
        return head.to(backbone.dtype), False
    weights = {name[5:]: tensor for name, tensor in saved.items() if name.startswith("head.")}
    plain = layout is None and pooling_mode == "cls"
    if not weights and projection_head is None and not plain:
        return None, None
    head = ProjectionHead(size, std=getattr(backbone.config, "initializer_range", 0.02))
    if weights:
        head.load_state_dict(weights)
    return head.to(backbone.dtype), True if weights else None


def _take_pooler(backbone: Any) -> ProjectionHead:
    dense = getattr(getattr(backbone, "pooler", None), "dense", None)
    if dense is None:
        raise InputError(
            f"projection_head is 'pooler', but {type(backbone).__name__} has no pooling layer. "
            "Pass --projection_head mlp or none."
        )
    head = ProjectionHead(dense.in_features, dense.out_features)
    head.dense.load_state_dict(dense.state_dict())
    backbone.pooler = None
    return head.to(backbone.dtype)


def _load_mlm_head(
    backbone: PreTrainedModel,
    path: str,
    saved: dict[str, Tensor],
    wanted: bool,
    options: dict[str, Any],
) -> MLMHead | None:
    weights = {name[9:]: tensor for name, tensor in saved.items() if name.startswith("mlm_head.")}
    if weights:
        head = MLMHead.from_config(backbone.config)
        head.load_state_dict(weights, strict=False)  # a shared parameter is stored once
        return head
    return MLMHead.from_pretrained(path, backbone.config, **options) if wanted else None


def _load_tokenizer(
    path: str, hub: dict[str, Any], options: dict[str, Any]
) -> PreTrainedTokenizerBase:
    trust = {"trust_remote_code": options.get("trust_remote_code", False)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **hub, **trust)
    except (OSError, ValueError) as error:
        raise InputError(
            f"No tokenizer could be loaded from '{path}': {str(error).strip().splitlines()[0]} "
            "A model folder needs its tokenizer files beside config.json."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _max_length(asked: int | None, layout: Layout | None, model: SimCSEModel) -> int:
    """What is asked for, else what the folder says, else what backbone and tokenizer allow."""
    positions = getattr(model.config, "max_position_embeddings", None) or _UNLIMITED
    table = getattr(getattr(model.backbone, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    # RoBERTa's relatives count from behind their padding token's number, packed or not.
    room = positions - (0 if padding is None else padding + 1)
    if asked is not None and not 2 <= asked <= room:
        raise InputError(f"max_seq_length is {asked}; this backbone has room for 2 to {room}.")
    said = layout.max_seq_length if layout is not None else None
    assert model.tokenizer is not None
    tokenizer_limit = min(room, model.tokenizer.model_max_length)
    default = tokenizer_limit if tokenizer_limit < _UNLIMITED else 512
    return min(asked or said or default, room)


def _log_choices(model: SimCSEModel, name: str, *, asked: bool) -> None:
    use = {None: "as training decides", True: "in training only", False: "at inference too"}
    logger.info(
        "%s: pooling '%s', projection head %s, at most %d tokens, %s batches.",
        name,
        model.pooling_mode,
        "none" if model.head is None else f"used {use[model.mlp_only_train]}",
        model.max_seq_length,
        "padding-free" if model.padding_free else "padded",
    )
    if asked and not model.padding_free:
        logger.warning(
            "%s does not compute the same without padding: its batches are padded, and slower.",
            type(model.backbone).__name__,
        )
