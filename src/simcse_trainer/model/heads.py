"""What stands on top of the backbone: the projection head, and the head that predicts tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from simcse_trainer.errors import InputError
from simcse_trainer.files import TRAINING_HEADS
from simcse_trainer.model.backbone import load_quietly
from simcse_trainer.model.decoders import is_decoder
from simcse_trainer.model.io.layout import Layout, read_tensors
from simcse_trainer.model.io.lookup import find_file
from simcse_trainer.objective.mlm import IGNORED, mlm_loss

# Of a vocabulary of 262,144 words the logits of a batch take gigabytes: no more at once than this.
_MOST_LOGITS = 2**26


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

    Attributes:
        predicts_next: A token is predicted from the position before it.
    """

    predicts_next = False

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

    def forward(self, hidden: Tensor, words: Any = None) -> Tensor:
        """Map hidden states [M, D] of M tokens to [M, vocabulary].

        Args:
            hidden: [M, D].
            words: The backbone's word embeddings, for a head that shares them.
        """
        hidden = hidden.to(next(self.parameters()).dtype)
        logits: Tensor = self.masked_lm(inputs_embeds=hidden[None]).logits[0]
        return logits

    def loss(self, hidden: Tensor, labels: Tensor, words: Any = None) -> Tensor:
        """Compute the mean loss over the predicted tokens; 0 if there are none.

        Args:
            hidden: [T, D], of all tokens.
            labels: [T], -100 where nothing is predicted.
            words: As `forward` takes them.
        """
        predicted = labels != IGNORED
        hidden, labels = hidden[predicted], labels[predicted]
        rows = max(1, _MOST_LOGITS // self.masked_lm.config.get_text_config().vocab_size)
        if len(labels) <= rows:
            return mlm_loss(self(hidden, words), labels)

        def summed(hidden: Tensor, labels: Tensor) -> Tensor:
            return mlm_loss(self(hidden, words), labels) * len(labels)

        parts = [
            checkpoint(summed, *part, use_reentrant=False)
            for part in zip(hidden.split(rows), labels.split(rows), strict=True)
        ]
        total: Tensor = torch.stack(parts).sum()
        return total / len(labels)


class NextTokenHead(MLMHead):
    """The output layer of a decoder (masked next-token prediction, BehnamGhader et al. 2024).

    Where a family ties it to the word embeddings, it has no weights: it computes with those of the
    backbone.
    """

    predicts_next = True

    def __init__(self, causal_lm: PreTrainedModel):
        super().__init__(causal_lm)
        self.is_tied = _is_tied(causal_lm)
        if self.is_tied:
            causal_lm.set_output_embeddings(nn.Identity())

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, config: PreTrainedConfig, **options: Any
    ) -> NextTokenHead:
        """Load the output layer of a checkpoint.

        Raises:
            InputError: The family is no causal language model, or the checkpoint has no such layer.
        """
        head = cls.from_config(config)
        if head.is_tied:
            return head
        options["output_loading_info"] = True
        found: Any = AutoModelForCausalLM.from_pretrained(name_or_path, **options)
        loaded, info = found
        layer = loaded.get_output_embeddings()
        if any(loaded.get_submodule(n.rpartition(".")[0]) is layer for n in info["missing_keys"]):
            raise InputError(
                f"mlm_weight predicts tokens with the output layer of the language model, and "
                f"'{name_or_path}' has none. Set --mlm_weight 0, or name the language model that "
                "it was made of."
            )
        return cls(loaded)

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> NextTokenHead:
        """Make a head with new weights, or with none where the family ties them."""
        try:
            with torch.device("meta"):
                head = cls(AutoModelForCausalLM.from_config(config))
            if not head.is_tied:
                head = cls(AutoModelForCausalLM.from_config(config))
        except ValueError as error:
            raise _no_mlm(config) from error
        return head

    def forward(self, hidden: Tensor, words: Any = None) -> Tensor:
        """Map hidden states as `MLMHead.forward`."""
        if not self.is_tied:
            return super().forward(hidden)
        weight = words.weight
        if hasattr(weight, "device_mesh"):  # a DTensor, of FSDP2; frozen, or refused beforehand
            weight = weight.full_tensor()
        products = nn.functional.linear(hidden.to(weight.dtype), weight)
        # Some families scale or bound what their layer gives.
        logits: Tensor = self.masked_lm(inputs_embeds=products[None]).logits[0]
        return logits


def _is_tied(causal_lm: PreTrainedModel) -> bool:
    output: Any = causal_lm.get_output_embeddings()
    tied = causal_lm.config.get_text_config().tie_word_embeddings
    return bool(tied) and getattr(output, "bias", None) is None


class _GivenHiddenStates(nn.Module):
    """Stands where a backbone was and returns what it is given."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


def _no_mlm(config: PreTrainedConfig) -> InputError:
    return InputError(
        f"mlm_weight needs a language model that predicts tokens, and {config.model_type} has none "
        "in transformers. Set --mlm_weight 0, or use an encoder such as BERT or RoBERTa."
    )


def build_mlm_head(config: PreTrainedConfig) -> MLMHead:
    """Make the head of a family with new weights."""
    return (NextTokenHead if is_decoder(config) else MLMHead).from_config(config)


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
        if sizes[0] != size:
            raise InputError(
                f"The Dense module takes {sizes[0]} features, and the backbone gives {size}. Use "
                "another checkpoint."
            )
        head = ProjectionHead(*sizes)
        head.dense.load_state_dict(
            {name.removeprefix("linear."): tensor for name, tensor in layout.dense.items()}
        )
        return head.to(_get_head_dtype(backbone)), False
    weights = {name[5:]: tensor for name, tensor in saved.items() if name.startswith("head.")}
    if sizes is None and not weights:
        return None, None
    if weights:
        out_features, in_features = weights["dense.weight"].shape
        head = ProjectionHead(in_features, out_features)
        head.load_state_dict(weights)
        return head.to(_get_head_dtype(backbone)), True
    head = ProjectionHead(size, std=getattr(backbone.config, "initializer_range", 0.02))
    return head.to(_get_head_dtype(backbone)), None


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
        head = build_mlm_head(backbone.config)
        head.load_state_dict(weights, strict=False)  # a shared parameter is stored once
        return head.to(_get_head_dtype(backbone))
    if not wanted:
        return None
    kind = NextTokenHead if is_decoder(backbone.config) else MLMHead
    return kind.from_pretrained(path, backbone.config, **options).to(_get_head_dtype(backbone))
