"""Heads from a model folder: the projection head, and those that only training uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simcse_trainer.errors import InputError
from simcse_trainer.model.heads import MLMHead, ProjectionHead
from simcse_trainer.model.layout import Layout, find_file, read_tensors

TRAINING_HEADS = "training_heads.safetensors"


def saved_heads(path: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    """What `training_heads.safetensors` of a checkpoint holds."""
    found = find_file(path, TRAINING_HEADS, **hub)
    return {} if found is None else read_tensors(found)


def head_sizes(
    layout: Layout | None, projection_head: str | None, pooling_mode: str, hidden_size: int
) -> tuple[int, int] | None:
    """Features in and out of the head that a model is given; None: it gets none.

    A trained pooling layer has the sizes of a new head.
    """
    if projection_head == "none":
        return None
    if layout is not None and layout.dense is not None:
        out_features, in_features = layout.dense["linear.weight"].shape
        return in_features, out_features
    if projection_head is None and (layout is not None or pooling_mode != "cls"):
        return None
    return hidden_size, hidden_size


def load_head(
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
    sizes = head_sizes(layout, projection_head, pooling_mode, size)
    if sizes is not None and layout is not None and layout.dense is not None:
        head = ProjectionHead(*sizes)
        head.dense.load_state_dict(
            {name.removeprefix("linear."): tensor for name, tensor in layout.dense.items()}
        )
        return head.to(_type_of(backbone)), False
    weights = {name[5:]: tensor for name, tensor in saved.items() if name.startswith("head.")}
    if sizes is None and not weights:
        return None, None
    head = ProjectionHead(size, std=getattr(backbone.config, "initializer_range", 0.02))
    if weights:
        head.load_state_dict(weights)
    return head.to(_type_of(backbone)), True if weights else None


def _type_of(backbone: PreTrainedModel) -> torch.dtype:
    """At least float32: an optimizer's small steps are lost in fewer digits."""
    return torch.promote_types(backbone.dtype, torch.float32)


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
    return head.to(_type_of(backbone))


def load_mlm_head(
    backbone: PreTrainedModel,
    path: str,
    saved: dict[str, Tensor],
    wanted: bool,
    options: dict[str, Any],
) -> MLMHead | None:
    """The checkpoint's, else the pretrained one where it is wanted."""
    weights = {name[9:]: tensor for name, tensor in saved.items() if name.startswith("mlm_head.")}
    if weights:
        head = MLMHead.from_config(backbone.config)
        head.load_state_dict(weights, strict=False)  # a shared parameter is stored once
        return head.to(_type_of(backbone))
    if not wanted:
        return None
    return MLMHead.from_pretrained(path, backbone.config, **options).to(_type_of(backbone))
