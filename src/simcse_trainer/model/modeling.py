"""SimCSEModel: a backbone, a pooling mode and a projection head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from simcse_trainer.errors import InputError
from simcse_trainer.model.adapters import has_adapter
from simcse_trainer.model.backbones import enable_packing, run_packed
from simcse_trainer.model.decoders import check_pooling, is_decoder
from simcse_trainer.model.heads import MLMHead, ProjectionHead
from simcse_trainer.model.pooling import LAYER_PAIRS, POOLING_MODES, pool, select_layers
from simcse_trainer.objective import mlm_loss
from simcse_trainer.objective.mlm import IGNORED

if TYPE_CHECKING:
    from simcse_trainer.model.adapter_folder import BaseWeights


@dataclass
class SimCSEOutput(ModelOutput):
    """What a forward pass gives.

    Attributes:
        embeddings: [N, D], one per sentence; of length 1 only where the model says so.
        mlm_loss: Scalar, only if masked tokens were given.
    """

    embeddings: Tensor | None = None
    mlm_loss: Tensor | None = None


class SimCSEModel(nn.Module):
    """A sentence encoder (Gao et al. 2021, sections 3, 4 and 6.3).

    Args:
        backbone: Any encoder or decoder of transformers, without a pooling layer of its own; or
            such a one with a LoRA adapter, a `peft.PeftModel`.
        tokenizer: Needed by `encode`, by saving and by the Trainer on text.
        pooling_mode: A key of `POOLING_MODES`.
        head: The projection head, or None.
        mlp_only_train: True: the head is used in training only (unsupervised SimCSE). False: at
            inference too (supervised). None: not decided yet; the Trainer decides by the data,
            and until then an untrained head is not used at inference.
        mlm_head: For the auxiliary objective, or None.
        max_seq_length: Longer texts are cut, in tokens, special ones included.
        padding_free: Pack batches if the backbone then computes the same as with padding.
        normalize_embeddings: Give embeddings the length 1 at inference; training is by cosine.

    Attributes:
        dropout: False switches all dropout off, also in training.
        use_cpu_kernels: Let `encode` and the Trainer compute faster on a CPU; see `cpu_layers`.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        pooling_mode: str = "cls",
        head: ProjectionHead | None = None,
        mlp_only_train: bool | None = None,
        mlm_head: MLMHead | None = None,
        max_seq_length: int = 512,
        padding_free: bool = True,
        normalize_embeddings: bool = False,
    ):
        super().__init__()
        if pooling_mode not in POOLING_MODES:
            raise InputError(
                f"pooling_mode is '{pooling_mode}'; expected one of {', '.join(POOLING_MODES)}."
            )
        check_pooling(backbone.config, pooling_mode)
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.pooling_mode = pooling_mode
        self.head = head
        self.mlp_only_train = mlp_only_train
        self.mlm_head = mlm_head
        self.max_seq_length = max_seq_length
        self.normalize_embeddings = normalize_embeddings
        # Named prompts of a sentence-transformers model, which only pass through.
        self.prompts: dict[str, str] = {}
        # What an adapter was trained on, for the folder that it is saved in.
        self.include_prompt = True
        self.base_weights: BaseWeights | None = None
        # Decoders would keep keys and values for tokens to come.
        self._call_options = {"use_cache": False} if is_decoder(backbone.config) else {}
        self.position_offset = enable_packing(backbone) if padding_free else None
        # accelerate wraps `forward` in autocast for good; only from inside can it be switched off.
        self.full_precision = False
        self.head_use_is_a_guess = False
        self.dropout = True
        self.use_cpu_kernels = True

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options: Any) -> SimCSEModel:
        """Load a trained folder or a plain backbone; see `loading.load_model` for the options."""
        from simcse_trainer.model.loading import load_model

        return load_model(str(name_or_path), **options)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write a folder that every loader reads; see `saving.replace_model` for the options."""
        from simcse_trainer.model.saving import replace_model

        replace_model(self, Path(folder), **options)

    @property
    def config(self) -> Any:
        """The backbone's configuration."""
        return self.backbone.config

    @property
    def _no_split_modules(self) -> Any:
        """The backbone's layers, which FSDP's automatic wrapping asks for.

        Without what holds the word embeddings: accelerate shards these by themselves, which torch
        refuses inside of a module that is sharded already.
        """
        embeddings = self.backbone.get_input_embeddings()
        around = {type(m).__name__ for m in self.backbone.modules() if embeddings in m.modules()}
        return [n for n in self.backbone._no_split_modules or () if n not in around]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def padding_free(self) -> bool:
        """Whether batches are packed; False if the backbone only computes the same when padded."""
        return self.position_offset is not None

    @property
    def pad_token_id(self) -> int:
        """What fills padded batches."""
        found = getattr(self.tokenizer, "pad_token_id", None)
        found = getattr(self.config, "pad_token_id", None) if found is None else found
        return found or 0

    @property
    def embedding_dimension(self) -> int:
        """D of the embeddings that `encode` returns."""
        if self.head is not None and self._uses_head(training=False):
            return self.head.dense.out_features
        return int(self.config.hidden_size)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        mlm_input_ids: Tensor | None = None,
        mlm_labels: Tensor | None = None,
        **indices: Tensor,
    ) -> SimCSEOutput:
        """Embed a batch as `build_batch` makes it.

        Args:
            input_ids: Packed [1, T], or padded [N, L].
            attention_mask: [N, L] of a padded batch.
            lengths: [N] of a packed batch.
            mlm_input_ids: As input_ids, corrupted; predicted in a second pass of the backbone.
            mlm_labels: As input_ids, -100 where nothing is predicted.
            indices: The rest of a packed batch, from `packing_indices`.
        """
        with self._precision(input_ids.device):
            hidden, lengths = self._hidden(input_ids, attention_mask, lengths, indices)
            embeddings = pool(hidden, lengths, self.pooling_mode)
            if self.head is not None and self._uses_head(self.training):
                # Of a layer that torch has quantised, `weight` is a method.
                dtype = getattr(self.head.dense.weight, "dtype", torch.float32)
                embeddings = self.head(embeddings.to(dtype))
            if self.normalize_embeddings and not self.training:
                embeddings = normalize(embeddings, dim=1)
            if mlm_input_ids is None or mlm_labels is None:
                return SimCSEOutput(embeddings=embeddings)
            hidden, _ = self._hidden(mlm_input_ids, attention_mask, lengths, indices, last=True)
            if attention_mask is not None:
                mlm_labels = mlm_labels[attention_mask.bool()]
            loss = self._predict_masked(hidden, mlm_labels.flatten())
            return SimCSEOutput(embeddings=embeddings, mlm_loss=loss)

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        **indices: Tensor,
    ) -> list[Tensor]:
        """What each layer makes of a batch as `build_batch` makes it.

        Returns:
            The embedding output and the output of each layer: [T, D] of the real tokens, sentence
            by sentence.
        """
        out = self._run_backbone(input_ids, attention_mask, indices, all_layers=True)
        if attention_mask is None:
            return [state[0] for state in out.hidden_states]
        return [state[attention_mask.bool()] for state in out.hidden_states]

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's, which the Trainer asks for with `neftune_noise_alpha`."""
        embeddings: nn.Module = self.backbone.get_input_embeddings()
        return embeddings

    def train(self, mode: bool = True) -> SimCSEModel:
        """Switch between training and inference, as any module."""
        super().train(mode)
        if not self.dropout:
            # Not by probabilities: many backbones keep those of the attention as plain numbers.
            self.backbone.eval()
        return self

    def encode(self, sentences: Sequence[str] | str, **options: Any) -> Tensor:
        """Embed texts; see `encoding.encode` for the options."""
        from simcse_trainer.model.encoding import encode

        return encode(self, sentences, **options)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute the backbone's activations in the backward pass instead of keeping them."""
        self.backbone.activation_checkpointing_enable(**kwargs)
        if has_adapter(self.backbone):
            # Of a frozen first layer nothing would ask for a gradient, and so for no recomputation.
            self.backbone.enable_input_require_grads()

    def _precision(self, device: torch.device) -> AbstractContextManager[None]:
        if self.full_precision:
            return torch.autocast(device.type, enabled=False)
        return nullcontext()

    def _predict_masked(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The auxiliary loss, from hidden states [T, D] and labels [T]."""
        assert self.mlm_head is not None
        predicted = labels != IGNORED
        return mlm_loss(self.mlm_head(hidden[predicted]), labels[predicted])

    def _uses_head(self, training: bool) -> bool:
        return training or self.mlp_only_train is False

    def _hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        lengths: Tensor | None,
        indices: dict[str, Tensor],
        last: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [T, D] of the real tokens, and the lengths [N] of their sentences.

        Of the last layer if `last`, else of the layers that the pooling mode reads.
        """
        pair = self.pooling_mode in LAYER_PAIRS and not last
        out = self._run_backbone(input_ids, attention_mask, indices, all_layers=pair)
        hidden = out.last_hidden_state
        if pair:
            hidden = select_layers(out.hidden_states, self.pooling_mode)
        if attention_mask is None:
            assert lengths is not None
            return hidden[0], lengths
        return hidden[attention_mask.bool()], attention_mask.sum(1)

    def _run_backbone(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        indices: dict[str, Tensor],
        *,
        all_layers: bool,
    ) -> Any:
        layers = {"output_hidden_states": all_layers, **self._call_options}
        if attention_mask is not None:
            return self.backbone(input_ids=input_ids, attention_mask=attention_mask, **layers)
        assert self.position_offset is not None
        with _scaled_noise(self.get_input_embeddings(), input_ids, indices):
            return run_packed(self.backbone, input_ids, indices, self.position_offset, **layers)


@contextmanager
def _scaled_noise(embeddings: Any, input_ids: Tensor, indices: dict[str, Any]) -> Iterator[None]:
    """Let the Trainer's NEFTune draw the noise that the padded batch would get.

    Its size is alpha / sqrt(L * D) (Jain et al. 2023, algorithm 1), where transformers takes for L
    the second dimension of its input: of a packed batch the tokens of all sentences.
    """
    alpha = getattr(embeddings, "neftune_noise_alpha", None)
    if alpha is None:
        yield
        return
    shapes = indices.get("group_shapes") or (indices["pad_index"].shape,)
    longest = max(length for _, length in shapes)
    embeddings.neftune_noise_alpha = alpha * (input_ids.shape[1] / longest) ** 0.5
    try:
        yield
    finally:
        embeddings.neftune_noise_alpha = alpha
