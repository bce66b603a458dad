"""What stands on top of the backbone: the projection head, and the masked-language-model head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from simcse_trainer.errors import InputError
from simcse_trainer.files import TRAINING_HEADS
from simcse_trainer.model.backbone import load_quietly
from simcse_trainer.model.io.layout import Layout, read_tensors
from simcse_trainer.model.io.lookup import find_file


class ProjectionHead(nn.Module):
    """A linear layer and tanh over the sentence embedding (Gao et al. 2021, section 3 and 6.3)."""

    def __init__(self, in_features: int, out_features: int | None = None, std: float = 0.02):
        super().__init__()
        self.dense = nn.Linear(in_features, out_features or in_features)
        nn.init.normal_(self.dense.weight, std=std)
        nn.init.zeros_(self.dense.bias)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map [N, D] to [N, D of the output]."""
        out: Tensor = self.dense(embeddings).tanh()
        return out


class MLMHead(nn.Module):
    """The part of a family's masked language model that comes after its backbone.

    Families build that part in different ways and under different names, so theirs is run as it
    is, with a stand-in where their backbone was. Its output weights are a copy of the word
    embeddings where the family ties them, as in the original SimCSE code: two parameters.
    """

    def __init__(self, masked_lm: PreTrainedModel):
        super().__init__()
        setattr(masked_lm, masked_lm.base_model_prefix, _GivenHiddenStates())
        self.masked_lm = masked_lm

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, config: PreTrainedConfig, **options: Any
    ) -> MLMHead:
        """Load the pretrained head of a checkpoint; new weights where the checkpoint has none.

        Raises:
            InputError: The family has no masked language model.
        """
        try:
            return cls(load_quietly(AutoModelForMaskedLM, name_or_path, **options))
        except ValueError as error:
            raise _no_mlm(config) from error

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> MLMHead:
        """Make a head with new weights."""
        try:
            return cls(AutoModelForMaskedLM.from_config(config))
        except ValueError as error:
            raise _no_mlm(config) from error

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states [M, D] of M tokens to [M, vocabulary]."""
        hidden = hidden.to(next(self.parameters()).dtype)
        logits: Tensor = self.masked_lm(inputs_embeds=hidden[None]).logits[0]
        return logits


class _GivenHiddenStates(nn.Module):
    """Stands where a backbone was and returns what it is given."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=inputs_embeds)


def _no_mlm(config: PreTrainedConfig) -> InputError:
    return InputError(
        f"mlm_weight needs a masked language model, and {config.model_type} has none in "
        "transformers. Set --mlm_weight 0, or use an encoder such as BERT or RoBERTa."
    )


def saved_heads(path: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    """Read the heads that `training_heads.safetensors` of a checkpoint holds."""
    found = find_file(path, TRAINING_HEADS, **hub)
    return {} if found is None else read_tensors(found)


def head_sizes(
    layout: Layout | None, projection_head: str | None, pooling_mode: str, hidden_size: int
) -> tuple[int, int] | None:
    """Return the features in and out of the head that a model is given; None: it gets none.

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
    """Load the head, and whether it is for training only (None: not decided yet)."""
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
        return head.to(_get_head_dtype(backbone)), False
    weights = {name[5:]: tensor for name, tensor in saved.items() if name.startswith("head.")}
    if sizes is None and not weights:
        return None, None
    head = ProjectionHead(size, std=getattr(backbone.config, "initializer_range", 0.02))
    if weights:
        head.load_state_dict(weights)
    return head.to(_get_head_dtype(backbone)), True if weights else None


def _get_head_dtype(backbone: PreTrainedModel) -> torch.dtype:
    """Return a dtype of at least float32: an optimizer's small steps are lost in fewer digits."""
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
    return head.to(_get_head_dtype(backbone))


def load_mlm_head(
    backbone: PreTrainedModel,
    path: str,
    saved: dict[str, Tensor],
    wanted: bool,
    options: dict[str, Any],
) -> MLMHead | None:
    """Load the checkpoint's head, else the pretrained one where it is wanted."""
    weights = {name[9:]: tensor for name, tensor in saved.items() if name.startswith("mlm_head.")}
    if weights:
        head = MLMHead.from_config(backbone.config)
        head.load_state_dict(weights, strict=False)  # a shared parameter is stored once
        return head.to(_get_head_dtype(backbone))
    if not wanted:
        return None
    return MLMHead.from_pretrained(path, backbone.config, **options).to(_get_head_dtype(backbone))
