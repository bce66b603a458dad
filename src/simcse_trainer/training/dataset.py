"""Training data for the trainer: checked, tokenized, grouped, put into batches and masked."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import IterableDataset as TorchIterableDataset

from simcse_trainer.arguments import SimCSETrainingArguments
from simcse_trainer.data.augmentation import DISCRETE, DiscreteAugmentation
from simcse_trainer.data.loading import check_format, prepare_dataset
from simcse_trainer.data.profile import find_problems, profile_data, summarize, take_columns
from simcse_trainer.data.schema import ANCHOR, POSITIVES
from simcse_trainer.data.tokenization import INPUT_IDS, tokenize_dataset
from simcse_trainer.errors import InputError, for_caller
from simcse_trainer.hub.run_info import Examples, take_examples
from simcse_trainer.model.modeling import SimCSEModel
from simcse_trainer.model.packing import build_batch, plan_chunks
from simcse_trainer.model.tokenizer import count_word_embeddings, find_mask_token
from simcse_trainer.objective.mlm import (
    IGNORED,
    MaskedTokens,
    label_position_before,
    mask_tokens,
)
from simcse_trainer.training.drawing import ListDraws
from simcse_trainer.training.evaluation_data import list_pairs, tasks_by_name
from simcse_trainer.training.validation import (
    check_dropout,
    check_size,
    check_tokenized,
    choose_head,
    count_views,
    warn_about_settings,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on.

    Attributes:
        dataset: Has `input_ids`: V lists of token ids in every row.
        views: V, the texts in a row.
        examples: The first rows as texts, for the model card; in the first process.
    """

    dataset: Any
    views: int
    examples: Examples


def prepare_training_data(
    dataset: Any,
    model: SimCSEModel,
    args: SimCSETrainingArguments,
    num_proc: int | None,
    columns: Sequence[str] | None = None,
    evaluation: Any = None,
) -> TrainingData:
    """Check and tokenize data, and fit the model to what kind of data it is.

    Args:
        dataset: Of text columns, or of `input_ids`.
        model: Its use of the head and its dropout are decided here.
        args: The training options, `SimCSETrainingArguments`.
        num_proc: Number of processes that tokenize.
        columns: The text columns in order: anchor, positive, hard negatives; by default by name.
        evaluation: Scored pairs, by task or of one, that are looked for in the data.

    Raises:
        InputError: It cannot be trained on.
    """
    if columns:
        check_type(dataset)
        dataset = prepare_dataset(dataset, columns=columns)
    texts = dataset
    dataset = tokenize_if_text(dataset, model, args, num_proc)
    check_size(dataset, args)
    dataset = group_by_length(dataset, args)
    views = count_views(dataset, args)
    examples = take_examples(texts, model) if args.should_save else Examples([], [])
    set_up_augmentation(model, args, views)
    if views == 1 and args.augmentation == "dropout" and args.uses_embeddings:
        check_dropout(model)
    choose_head(model, views)
    has_lists = POSITIVES in next(iter(dataset))
    warn_about_settings(args, views, has_lists=has_lists)
    if args.process_index == 0 and args.uses_embeddings and not has_lists:
        report_data(texts, model, evaluation)
    if not isinstance(dataset, Dataset):
        dataset = prepare_stream(dataset, args)
    return TrainingData(dataset, views, examples)


# Of more rows these are looked at, in a second or two.
_PROFILED_ROWS, _PROFILED_TEXTS = 20_000, 1_000


def report_data(dataset: Any, model: SimCSEModel, evaluation: Any = None) -> None:
    """Log the facts of text columns, and warn of what a run would suffer from; no stream is read.

    Args:
        dataset: Of text columns; one of `input_ids` is left as it is.
        model: Its tokenizer and length are those that the texts are looked at with.
        evaluation: Scored pairs, or queries and passages, by task or of one.
    """
    if not isinstance(dataset, Dataset) or INPUT_IDS in dataset.column_names:
        return
    tasks = tasks_by_name(evaluation).values() if evaluation is not None else ()
    first = dataset.select(range(min(len(dataset), _PROFILED_ROWS + 1)))
    columns, complete = take_columns(prepare_dataset(first), _PROFILED_ROWS)
    profile = profile_data(
        columns,
        tokenizer=model.tokenizer,
        max_seq_length=model.max_seq_length,
        evaluation=[pair for task in tasks for pair in list_pairs(task)],
        complete=complete,
        tokenized=_PROFILED_TEXTS,
    )
    for line in summarize(profile):
        logger.info(line)
    for problem in find_problems(profile):
        logger.warning(for_caller(problem.text))


def tokenize_if_text(
    dataset: Dataset | IterableDataset,
    model: SimCSEModel,
    args: SimCSETrainingArguments,
    num_proc: int | None,
) -> Dataset | IterableDataset:
    """Check and tokenize text columns; take `input_ids` as they are."""
    check_type(dataset)
    check_format(dataset, source="train_dataset")
    if INPUT_IDS in (dataset.column_names or next(iter(dataset), {})):
        check_tokenized(dataset, model)
        if args.augmentation in DISCRETE:
            raise InputError(
                f"augmentation is '{args.augmentation}', which changes words, but train_dataset "
                f"is tokenized ('{INPUT_IDS}'). Pass its text column."
            )
        return dataset
    if model.tokenizer is None:
        raise InputError("train_dataset has text columns, but the model has no tokenizer.")
    with args.main_process_first(desc="tokenization"):
        return tokenize_dataset(
            prepare_dataset(dataset),
            model.tokenizer,
            max_seq_length=model.max_seq_length,
            vocab_size=count_word_embeddings(model.backbone),
            num_proc=num_proc,
            keep_texts=args.augmentation in DISCRETE,
        )


def check_type(dataset: Any) -> None:
    """Raise InputError for what is no data set."""
    if not isinstance(dataset, Dataset | IterableDataset):
        raise InputError(
            f"train_dataset is a {type(dataset).__name__}; expected a datasets.Dataset, such as "
            "Dataset.from_dict({'sent0': texts})."
        )


def group_by_length(dataset: Any, args: SimCSETrainingArguments) -> Any:
    """Add the tokens of each row, by which `train_sampling_strategy group_by_length` groups.

    transformers would take the number of texts in a row for its length.

    Raises:
        InputError: A stream, of which only the order can be taken.
    """
    if args.train_sampling_strategy == "random":
        return dataset
    if not isinstance(dataset, Dataset):
        raise InputError(
            f"train_sampling_strategy is {args.train_sampling_strategy}, but a stream comes in its "
            "own order. Leave it out, or pass --streaming false."
        )
    column = str(args.length_column_name)
    if args.train_sampling_strategy != "group_by_length" or column in dataset.column_names:
        return dataset
    lengths = [sum(map(len, views)) for views in dataset[INPUT_IDS]]
    return dataset.add_column(column, lengths)


def prepare_stream(dataset: IterableDataset, args: SimCSETrainingArguments) -> Any:
    """Let each process read a stream by itself: batches differ in width between processes."""
    accelerator_config: Any = args.accelerator_config
    accelerator_config.dispatch_batches = False
    return UnsplitStream(dataset) if args.world_size > 1 else dataset


def set_up_augmentation(model: SimCSEModel, args: SimCSETrainingArguments, views: int) -> None:
    """Set up what tells the two views of a sentence apart; `none` switches the model's dropout off.

    Raises:
        InputError: The data has positives of its own.
    """
    if args.augmentation != "dropout" and views != 1:
        raise InputError(
            f"augmentation is '{args.augmentation}', which is for unsupervised data (one text "
            f"column), but train_dataset has {views}. Leave it out, or pass one column: --columns "
            "sent0"
        )
    model.dropout = args.augmentation != "none"
    if not model.dropout:
        logger.info(
            "augmentation none: all dropout is off, so the two views of a sentence are identical "
            "and training only drives different sentences apart."
        )


def build_collator(model: SimCSEModel, args: SimCSETrainingArguments, views: int) -> SimCSECollator:
    """Build the collator for a model's batches, with what changes texts or draws from lists.

    Args:
        model: Its tokenizer and its length are those of the batches.
        args: The training options, `SimCSETrainingArguments`.
        views: The texts in a row of a batch, as `TrainingData` has it.
    """
    augmentation = None
    if args.augmentation in DISCRETE and model.tokenizer is not None:
        augmentation = DiscreteAugmentation(
            args.augmentation,
            args.augmentation_rate,
            args.seed,
            model.tokenizer,
            model.max_seq_length,
        )
    return SimCSECollator(
        model.pad_token_id,
        model.padding_free,
        grouped=args.device.type == "cpu" and model.use_cpu_kernels,
        max_seq_length=model.max_seq_length,
        vocab_size=count_word_embeddings(model.backbone),
        augmentation=augmentation,
        draws=ListDraws(args.seed, max(views - 2, 0)),
        chunk_size=args.chunk_size,
        keep_lengths=args.mini_batch_size is not None,
        twice=args.uses_embeddings,
    )


def begin_epoch(collator: Any, epoch: int) -> None:
    """Let a collator draw from lists anew.

    Args:
        collator: A `SimCSECollator`; of another one nothing is changed.
        epoch: The pass over the data, from 0.
    """
    draws = getattr(collator, "draws", None)
    if draws is not None:
        draws.epoch = epoch


class UnsplitStream(TorchIterableDataset):
    """Hides the files of a stream, by which accelerate would split it among the processes.

    Files are of different lengths: the processes would come to the end of a pass at different
    steps, and wait for each other for ever. Each reads all rows instead, and takes its own of each
    batch.

    Args:
        dataset: The stream of rows, as loaded.
    """

    def __init__(self, dataset: IterableDataset):
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        """Yield all rows of a pass."""
        return iter(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass: each has an order of its own."""
        self.dataset.set_epoch(epoch)

    def take(self, count: int) -> IterableDataset:
        """Return the first rows."""
        return self.dataset.take(count)


@dataclass(frozen=True)
class SimCSECollator:
    """Makes batches of B examples with V views each, view-major: all anchors, all positives, ...

    An example of one sentence becomes two views of it: dropout tells them apart, or the second is
    a changed copy.

    Attributes:
        pad_token_id: The id that fills padded batches.
        padding_free: Pack the batch instead of padding it.
        grouped: Pack it for a CPU that trains; see `build_batch`.
        max_seq_length: A text of more tokens is refused; None: not looked at.
        vocab_size: So is a token id of this or above, which has no embedding.
        augmentation: From the texts of a batch to token ids of changed copies, such as a
            `DiscreteAugmentation`.
        draws: From the lists of a row to its texts; needed where examples have lists.
        chunk_size: Sentences per chunk, whose indices are made here too; None: no chunks.
        keep_lengths: Also give what chunks of another size would be made of.
        twice: Encode an example of one sentence twice; False where nothing is contrasted.
    """

    pad_token_id: int
    padding_free: bool = True
    grouped: bool = False
    max_seq_length: int | None = None
    vocab_size: int | None = None
    augmentation: Callable[[Sequence[str]], list[list[int]]] | None = None
    draws: ListDraws | None = None
    chunk_size: int | None = None
    keep_lengths: bool = False
    twice: bool = True

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Build the inputs of `SimCSEModel.forward`, and `text_ids`.

        Args:
            examples: Each with `input_ids`: V lists of token ids, or one for unsupervised SimCSE;
                for augmentation also the text `sent0`. With `positives` they are the anchor,
                so many positives and any number of negatives, of which some are drawn.

        Raises:
            InputError: Token ids that no check has seen, as those of a stream, do not fit.

        Returns:
            What `build_batch` makes of the V * B sentences, and `text_ids` [V, B]: equal
            texts, equal integers, in every process; of lists [V + P, B], with those of texts that
            are no negatives. In chunks also `chunks` of `plan_chunks`, and `sentence_lengths`.
        """
        others: list[list[int]] = []
        if self.draws is not None and POSITIVES in examples[0]:
            views, others = _draw(self.draws, examples)
        else:
            views = list(zip(*(example[INPUT_IDS] for example in examples), strict=True))
        if len(views) == 1 and self.augmentation:
            views.append(tuple(self.augmentation([example[ANCHOR] for example in examples])))
        elif len(views) == 1 and self.twice:
            views *= 2
        identities = [[_identify(ids) for ids in view] for view in views]
        filler = views[0][0][:1]
        sentences = [filler if ids is None else ids for view in views for ids in view]
        self._check(sentences)
        form: dict[str, bool] = {"padding_free": self.padding_free, "grouped": self.grouped}
        batch = build_batch(sentences, pad_token_id=self.pad_token_id, **form)
        lengths = tuple(map(len, sentences))
        if self.chunk_size is not None and len(lengths) > self.chunk_size:
            batch["chunks"] = plan_chunks(lengths, self.chunk_size, **form)
        if self.keep_lengths:
            batch["sentence_lengths"] = lengths
        return {**batch, "text_ids": torch.tensor(identities + others)}

    def _check(self, sentences: Sequence[Sequence[int]]) -> None:
        lengths = [len(ids) for ids in sentences]
        most = self.max_seq_length or max(lengths)
        if min(lengths) < 1 or max(lengths) > most:
            raise InputError(
                f"train_dataset: a row of '{INPUT_IDS}' has {min(lengths)} to {max(lengths)} "
                f"tokens in a text; expected 1 to {most}."
            )
        highest = max(map(max, sentences))
        if self.vocab_size is not None and highest >= self.vocab_size:
            raise InputError(
                f"train_dataset: a row of '{INPUT_IDS}' has the token id {highest}; expected 0 to "
                f"{self.vocab_size - 1}: the model has no other word embeddings."
            )


# Of a negative that a row does not have: a token stands for it, and is no anchor's negative.
_NO_TEXT = 0


def _draw(
    draws: ListDraws, examples: Sequence[Mapping[str, Any]]
) -> tuple[list[Any], list[list[int]]]:
    """Draw from the lists of a batch.

    Returns:
        V views of B texts, None for a negative too few; and [P, B] ids of texts that are no
        negatives of the rows' anchors.
    """
    drawn = [draws(example[INPUT_IDS], example[POSITIVES]) for example in examples]
    others = [[_NO_TEXT, *map(_identify, texts)] for _, texts in drawn]
    most = max(map(len, others))
    padded = [ids + [_NO_TEXT] * (most - len(ids)) for ids in others]
    return list(zip(*(texts for texts, _ in drawn), strict=True)), [
        list(ids) for ids in zip(*padded, strict=True)
    ]


def _identify(ids: Sequence[int] | None) -> int:
    if ids is None:
        return _NO_TEXT
    digest = blake2b(array("l", ids).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# Of a batch of `SimCSECollator`: what the objective and the step in chunks take.
_NOT_FEATURES = ("text_ids", "chunks", "sentence_lengths")


class MLMInputs:
    """Masks the tokens of batches, with `mlm_weight`.

    Args:
        trainer: The `SimCSETrainer` that it belongs to.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def split_inputs(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Return what the model takes, masked tokens included, and the `text_ids`.

        Args:
            inputs: A batch, from `SimCSECollator`.
        """
        features = {name: tensor for name, tensor in inputs.items() if name not in _NOT_FEATURES}
        if self._trainer.args.mlm_weight:
            input_ids = features["input_ids"]
            masked = self._mask(input_ids)
            if self._trainer._model.mlm_head.predicts_next:
                masked = label_position_before(masked, input_ids, _find_starts(features))
            features |= {"mlm_input_ids": masked.input_ids, "mlm_labels": masked.labels}
        return features, inputs["text_ids"]

    def drop_unused(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leave out the tokens as they are, where nothing is contrasted."""
        if self._trainer.args.uses_embeddings:
            return features
        return {name: tensor for name, tensor in features.items() if name != "input_ids"}

    def count_masked(self, chunks: Sequence[Mapping[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Count the share that each chunk's auxiliary loss, a mean over its masked tokens, has.

        Args:
            chunks: Of the features of one batch.

        Returns:
            Per chunk a numerator and a denominator: the sum over chunks of loss * numerator /
            denominator, averaged over processes, is the mean over all masked tokens of the whole
            batch. Integers, so that the quotient has the precision of the loss.
        """
        args = self._trainer.args
        counts = torch.stack([(chunk["mlm_labels"] != IGNORED).sum() for chunk in chunks])
        total = counts.sum()
        if args.gather_across_devices and args.world_size > 1:
            total = self._trainer.accelerator.reduce(total, reduction="sum")
            counts = counts * args.world_size
        return [(count, total.clamp(min=1)) for count in counts]

    @cached_property
    def _vocab_size(self) -> int | None:
        return count_word_embeddings(self._trainer._model.backbone)

    def _mask(self, input_ids: Tensor) -> MaskedTokens:
        tokenizer: Any = self._trainer.processing_class
        mask: Any = find_mask_token(tokenizer, self._trainer._model.backbone)
        return mask_tokens(
            input_ids,
            special_ids=torch.tensor(tokenizer.all_special_ids, device=input_ids.device),
            mask_token_id=mask,
            vocab_size=min(len(tokenizer), self._vocab_size or len(tokenizer)),
            probability=self._trainer.args.mlm_probability,
        )


def _find_starts(features: Mapping[str, Tensor]) -> Tensor:
    """Return where in a batch sentences begin: True, in the shape of its `input_ids`."""
    starts = torch.zeros_like(features["input_ids"], dtype=torch.bool)
    if "lengths" in features:
        lengths = features["lengths"]
        starts[0, lengths.cumsum(0) - lengths] = True
    else:
        starts[:, 0] = True
    return starts
