"""What stands on top of the backbone: the projection head, and the masked-language-model head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from simcse_trainer.errors import InputError
from simcse_trainer.model.backbones import load_quietly


class ProjectionHead(nn.Module):
    """A linear layer and tanh over the sentence embedding (Gao et al. 2021, section 3 and 6.3)."""

    def __init__(self, in_features: int, out_features: int | None = None, std: float = 0.02):
        super().__init__()
        self.dense = nn.Linear(in_features, out_features or in_features)
        nn.init.normal_(self.dense.weight, std=std)
        nn.init.zeros_(self.dense.bias)

    def forward(self, embeddings: Tensor) -> Tensor:
        """[N, D] -> [N, D of the output]."""
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
        """The pretrained head of a checkpoint; new weights where the checkpoint has none.

        Raises:
            InputError: The family has no masked language model.
        """
        try:
            return cls(load_quietly(AutoModelForMaskedLM, name_or_path, **options))
        except ValueError as error:
            raise _no_mlm(config) from error

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> MLMHead:
        """A head with new weights."""
        try:
            return cls(AutoModelForMaskedLM.from_config(config))
        except ValueError as error:
            raise _no_mlm(config) from error

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [M, D] of M tokens -> [M, vocabulary]."""
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
