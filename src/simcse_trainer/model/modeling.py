"""SimCSEModel: a backbone, a pooling mode and a projection head."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from simcse_trainer.errors import InputError
from simcse_trainer.model.backbone import enable_packing, run_packed, scaled_noise
from simcse_trainer.model.decoders import check_pooling, is_decoder
from simcse_trainer.model.encoding import encode
from simcse_trainer.model.heads import MLMHead, ProjectionHead
from simcse_trainer.model.io.adapter import BaseWeights
from simcse_trainer.model.io.loading import load_components
from simcse_trainer.model.io.saving import check_base_stays, replaced_at_once, save_model
from simcse_trainer.model.io.terms import Terms
from simcse_trainer.model.lora import has_adapter
from simcse_trainer.model.pooling import LAYER_PAIRS, POOLING_MODES, pool, select_layers
from simcse_trainer.model.tokenizer import count_word_embeddings, tokenize

if TYPE_CHECKING:
    from peft import LoraConfig
    from typing_extensions import Self


logger = logging.getLogger(__name__)


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
        prompts: Named prompts of a sentence-transformers model, which only pass through.
        include_prompt: The tokens of such a prompt are pooled too; passes through.
        base_weights: What an adapter was trained on, for the folder that it is saved in.
        terms: What the backbone's licence asks of all that is made from it, for that folder too.

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
        prompts: dict[str, str] | None = None,
        include_prompt: bool = True,
        base_weights: BaseWeights | None = None,
        terms: Terms | None = None,
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
        self.prompts = prompts or {}
        self.include_prompt = include_prompt
        self.base_weights = base_weights
        self.terms = terms
        # Decoders would keep keys and values for tokens to come.
        self._call_options = {"use_cache": False} if is_decoder(backbone.config) else {}
        self.position_offset = enable_packing(backbone) if padding_free else None
        # accelerate wraps `forward` in autocast for good; only from inside can it be switched off.
        self.full_precision = False
        self.head_use_is_a_guess = False
        # Known once a merge has failed: `choose_lora_save` then keeps the adapter.
        self.cannot_merge = False
        self.dropout = True
        self.use_cpu_kernels = True

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        pooling_mode: str | None = None,
        projection_head: str | None = None,
        mlp_only_train: bool | None = None,
        mlm_head: bool = False,
        max_seq_length: int | None = None,
        padding_free: bool = True,
        normalize_embeddings: bool | None = None,
        prompt: str | None = None,
        append_eos_token: bool | None = None,
        lora: LoraConfig | None = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool | None = None,
        base_model: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> Self:
        """Load a trained folder, an adapter, a sentence-transformers model or a plain backbone.

        Args:
            name_or_path: A folder, a `.gguf` file, a name on the Hub, or a key of
                `PACKAGED_MODELS`.
            pooling_mode: By default what the folder says, else that of `default_pooling`.
            projection_head: `mlp`: a linear layer with tanh (the folder's, else a new one);
                `pooler`: the backbone's own trained pooling layer as that head; `none`. By default
                what the folder says; for a plain backbone read by `cls`, `mlp` as in the paper,
                else `none`.
            mlp_only_train: Whether the head is left out at inference. By default what the folder
                says; for a new head the Trainer decides by the data.
            mlm_head: Also load the checkpoint's masked-language-model head.
            max_seq_length: By default what the folder says, else what the backbone can take.
            padding_free: Pack batches where that is exact.
            normalize_embeddings: Give them the length 1. By default what the folder says, else not:
                so that `AutoModel` and pooling give the same embedding.
            prompt: A template with `{text}` that is put around every text from now on.
            append_eos_token: End texts with the end-of-text token; by default for plain decoders.
            lora: Freeze the backbone and train an adapter: a new one, or that of the folder.
            load_in_4bit: Quantise the backbone; by default as its adapter was trained.
            load_in_8bit: The same in 8 bits.
            base_model: The backbone of an adapter, where it is not where it was.
            revision: Of the Hub repository.
            token: The token that the Hub is asked with.
            options: For `load_backbone` and transformers' `from_pretrained`: dtype, device,
                bidirectional_attention, attention_dropout, trust_remote_code, ...

        Raises:
            InputError: Nothing there, or something that SimCSE cannot represent.
        """
        components = load_components(
            str(name_or_path),
            pooling_mode=pooling_mode,
            projection_head=projection_head,
            mlp_only_train=mlp_only_train,
            mlm_head=mlm_head,
            max_seq_length=max_seq_length,
            padding_free=padding_free,
            normalize_embeddings=normalize_embeddings,
            prompt=prompt,
            append_eos_token=append_eos_token,
            lora=lora,
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            base_model=base_model,
            revision=revision,
            token=token,
            **options,
        )
        model = cls(**vars(components))
        _log_choices(model, str(name_or_path), asked=padding_free)
        return model

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        training_heads: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        lora_save: str | None = None,
    ) -> None:
        """Write a folder that every loader reads, at once; an earlier model there is replaced.

        Args:
            folder: Made if it is not there; other files in it stay.
            training_heads: As `save_model` takes it.
            state_dict: As `save_model` takes it.
            lora_save: As `save_model` takes it.

        Raises:
            InputError: The folder holds files of the same names, or that would be loaded with the
                model, which no save has written, or the base of the adapter; or as `save_model`.
        """
        check_base_stays(self, Path(folder), lora_save)
        with replaced_at_once(Path(folder)) as tmp_dir:
            save_model(
                self,
                tmp_dir,
                training_heads=training_heads,
                state_dict=state_dict,
                lora_save=lora_save,
            )

    def extra_repr(self) -> str:
        """Return what `repr` says beside the layers."""
        return (
            f"pooling_mode={self.pooling_mode!r}, mlp_only_train={self.mlp_only_train}, "
            f"max_seq_length={self.max_seq_length}, padding_free={self.padding_free}"
        )

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
        path = next((n for n, m in self.backbone.named_modules() if m is embeddings), "").split(".")
        holders = [self.backbone.get_submodule(".".join(path[:i])) for i in range(len(path) + 1)]
        around = {type(module).__name__ for module in holders}
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
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        mlm_input_ids: Tensor | None = None,
        mlm_labels: Tensor | None = None,
        **indices: Tensor,
    ) -> SimCSEOutput:
        """Embed a batch as `build_batch` makes it.

        Args:
            input_ids: Packed [1, T], or padded [N, L]; None: no embeddings are wanted.
            attention_mask: [N, L] of a padded batch.
            lengths: [N] of a packed batch.
            mlm_input_ids: As input_ids, corrupted; predicted in a second pass of the backbone.
            mlm_labels: As input_ids, -100 where nothing is predicted; of a decoder the tokens that
                come next.
            indices: The rest of a packed batch, from `packing_indices`.
        """
        with self._precision(self.device):
            out = SimCSEOutput()
            if input_ids is not None:
                hidden, lengths = self._hidden(input_ids, attention_mask, lengths, indices)
                out.embeddings = self._embed(hidden, lengths)
            if mlm_input_ids is not None and mlm_labels is not None:
                hidden, _ = self._hidden(mlm_input_ids, attention_mask, lengths, indices, last=True)
                if attention_mask is not None:
                    mlm_labels = mlm_labels[attention_mask.bool()]
                assert self.mlm_head is not None
                words = self.get_input_embeddings()
                out.mlm_loss = self.mlm_head.loss(hidden, mlm_labels.flatten(), words)
            return out

    def _embed(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        embeddings = pool(hidden, lengths, self.pooling_mode)
        if self.head is not None and self._uses_head(self.training):
            # Of a layer that torch has quantised, `weight` is a method.
            dtype = getattr(self.head.dense.weight, "dtype", torch.float32)
            embeddings = self.head(embeddings.to(dtype))
        if self.normalize_embeddings and not self.training:
            embeddings = normalize(embeddings, dim=1)
        return embeddings

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        **indices: Tensor,
    ) -> list[Tensor]:
        """Compute the states of each layer for a batch of `build_batch`.

        Returns:
            The embedding output and the output of each layer: [T, D] of the real tokens, sentence
            by sentence.
        """
        out = self._run_backbone(input_ids, attention_mask, indices, all_layers=True)
        if attention_mask is None:
            return [state[0] for state in out.hidden_states]
        return [state[attention_mask.bool()] for state in out.hidden_states]

    def get_input_embeddings(self) -> nn.Module:
        """Return the backbone's, which the Trainer asks for with `neftune_noise_alpha`."""
        embeddings: nn.Module = self.backbone.get_input_embeddings()
        return embeddings

    def train(self, mode: bool = True) -> SimCSEModel:
        """Switch between training and inference, as any module."""
        super().train(mode)
        if not self.dropout:
            # Not by probabilities: many backbones keep those of the attention as plain numbers.
            self.backbone.eval()
        return self

    def encode(
        self,
        sentences: Sequence[str] | str,
        *,
        batch_size: int = 128,
        show_progress_bar: Any = False,
        shard: tuple[int, int] = (0, 1),
    ) -> Tensor:
        """Embed sentences, in the order given; the model is in evaluation mode meanwhile.

        Computed in the precision of the weights, also by a model in mixed-precision training: the
        embeddings are those that the saved folder will give.

        Args:
            sentences: n texts, or one; those over `max_seq_length` tokens are cut.
            batch_size: At most so many sentences per forward pass, of like lengths; on a CPU also
                no more tokens than it computes fast.
            show_progress_bar: Whether to show a progress bar on stderr; a text is its label, and a
                bar of tqdm is advanced by the sentences that are done.
            shard: Which of how many processes this is, where they share the work: the rows of the
                others are zero, and their sum is the result. Each process runs the model equally
                often, as engines want it that spread the weights.

        Returns:
            [n, D], or [D] for one text; float32 (float64 for a float64 model), on the CPU; of
            length 1 only where `normalize_embeddings` says so.

        Raises:
            InputError: The model has no tokenizer, something that is no text, or an embedding
                that is not finite.
        """
        return encode(
            self,
            sentences,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            shard=shard,
        )

    def tokenize(self, sentences: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, cut to `max_seq_length`; see `tokenizer.tokenize`.

        Raises:
            InputError: The model has no tokenizer, or no embedding for a token.
        """
        if self.tokenizer is None:
            raise InputError(
                "This model has no tokenizer; pass one: SimCSEModel(backbone, tokenizer)."
            )
        return tokenize(
            self.tokenizer,
            sentences,
            self.max_seq_length,
            vocab_size=count_word_embeddings(self.backbone),
        )

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
        """Compute hidden states [T, D] of the real tokens, and the lengths [N] of their sentences.

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
        with scaled_noise(self.get_input_embeddings(), input_ids, indices):
            return run_packed(self.backbone, input_ids, indices, self.position_offset, **layers)


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
