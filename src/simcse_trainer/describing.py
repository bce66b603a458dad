"""What is known of a run, gathered for its model card."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, IterableDataset

from simcse_trainer.arguments import SimCSETrainingArguments
from simcse_trainer.data.schema import resolve_text_columns
from simcse_trainer.data.tokenization import INPUT_IDS
from simcse_trainer.evaluation.plots import describe_training_curve
from simcse_trainer.evaluation.sts import SPACE_METRICS, TASKS
from simcse_trainer.files import CARD
from simcse_trainer.hub.facts import LOADERS, CardFacts, EvaluatedOn
from simcse_trainer.hub.metadata import is_repo_id
from simcse_trainer.hub.model_card import render_card
from simcse_trainer.model.adapters import base_of, has_adapter
from simcse_trainer.model.decoders import is_bidirectional
from simcse_trainer.model.modeling import SimCSEModel
from simcse_trainer.model.packaged import PACKAGED_MODELS
from simcse_trainer.model.pooling import LAYER_PAIRS
from simcse_trainer.model.prompts import prompt_of
from simcse_trainer.model.quantization import bits_of
from simcse_trainer.model.saving import choose_lora_save, has_tanh_pooler
from simcse_trainer.output_folder import add_documents
from simcse_trainer.provenance import describe_hardware, find_commit, read_emissions
from simcse_trainer.version import __version__

# Told of every run; the others only where they differ from their defaults.
_ALWAYS = ("per_device_train_batch_size", "learning_rate", "temperature", "seed")
# Where a run's files and messages go, and what the card says elsewhere.
_UNTOLD = """
    output_dir logging_dir run_name project report_to disable_tqdm log_level log_level_replica
    log_on_each_node resume_from_checkpoint push_to_hub accelerator_config debug local_rank
    ddp_timeout language license model_card_template do_train do_eval do_predict neighbor_queries
    model_name_or_path sts_data_dir preprocessing_num_workers dataloader_pin_memory
""".split()  # noqa: SIM905
_UNTOLD_PREFIXES = ("hub_", "trackio_")
_SECRETS = ("hub_token",)


@dataclass
class RunDescription:
    """What only the caller of a trainer knows; all of it may be left out.

    Attributes:
        model_name: As given: a name on the Hub, a folder, or a package.
        datasets: Names of the training data on the Hub.
        files: Training files, as given.
        evaluated_on: Task -> where its pairs come from.
        options: Further options that differ from their defaults.
        command: The words of the command line.
        before: From `evaluate_sts` before training.
        after: The same of the final model; during training the log has them.
        started: When the run began, in seconds of `time.time`.
    """

    model_name: str = ""
    datasets: Sequence[str] = ()
    files: Sequence[str] = ()
    evaluated_on: Mapping[str, EvaluatedOn] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    command: Sequence[str] = ()
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Examples:
    """The first rows of training data, as texts.

    Attributes:
        columns: Names of the text columns.
        rows: A text per column.
    """

    columns: list[str]
    rows: list[list[str]]


def take_examples(
    dataset: Dataset | IterableDataset, model: SimCSEModel, count: int = 3
) -> Examples:
    """The first rows of text columns, or of `input_ids` decoded."""
    rows: list[dict[str, Any]] = list(dataset.take(count))
    names = list(rows[0]) if rows else []
    if INPUT_IDS not in names:
        roles = resolve_text_columns(names, source="train_dataset") if names else {}
        # A row that cannot be used is refused in its turn.
        return Examples(list(roles), [[str(row[n]) for n in roles.values()] for row in rows])
    tokenizer: Any = model.tokenizer
    views = len(rows[0][INPUT_IDS])
    negatives = [f"hard_neg{i}" if views > 3 else "hard_neg" for i in range(1, views - 1)]
    columns = ["sent0", "sent1", *negatives][:views]
    if tokenizer is None:
        return Examples(columns, [])
    return Examples(
        columns,
        [[tokenizer.decode(ids, skip_special_tokens=True) for ids in r[INPUT_IDS]] for r in rows],
    )


def collect_facts(
    trainer: Any,
    model_id: str | None = None,
    *,
    in_checkpoint: bool = False,
    step: int | None = None,
) -> CardFacts:
    """All that is known of a trainer's run, at any time before, during and after training.

    Args:
        trainer: A `SimCSETrainer`.
        model_id: What users will load; by default `hub_model_id`, else `output_dir`.
        in_checkpoint: The card is of a checkpoint, which holds an adapter as it is.
        step: The optimizer steps that the described weights have seen; by default those in memory.
    """
    step = trainer.weights_step if step is None else step
    args, state, said = trainer.args, trainer.state, trainer.description
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    examples: Examples = trainer.examples
    before, after = _find_scores(trainer, step)
    sources = [*said.datasets, *(_portable(file) for file in said.files)]
    # Of a resumed run only the last part was timed.
    whole = not trainer.resumed
    energy, emissions = read_emissions(
        Path(str(args.output_dir)), said.started if whole else float("inf")
    )
    sized = trainer.train_dataset is not None and hasattr(trainer.train_dataset, "__len__")
    return CardFacts(
        model_id=str(model_id or trainer.hub_model_id or args.hub_model_id or args.output_dir),
        **_describe_model(model, "adapter" if in_checkpoint else args.lora_save),
        base_model=_find_base_model(said.model_name or str(model.config._name_or_path or "")),
        objective=_describe_objective(trainer.views, args),
        language=list(args.language),
        license=args.license or "",
        datasets=[name for name in said.datasets if is_repo_id(name)],
        sources=", ".join(sources),
        rows=len(trainer.train_dataset) if sized else None,
        columns=examples.columns,
        examples=examples.rows,
        steps=state.global_step,
        best_step=step if step != state.global_step else None,
        scores=_correlations(after),
        scores_before=_correlations(before),
        evaluated_on=_evaluated_on(after, said),
        space={name: after[name] for name in SPACE_METRICS if name in after},
        space_before={name: before[name] for name in SPACE_METRICS if name in before},
        options=_describe_options(args)
        | {"per_device_train_batch_size": trainer.train_batch_size}
        | dict(said.options),
        command=[_portable(word) for word in said.command],
        seed=args.seed,
        versions={
            "simcse-trainer": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "Python": platform.python_version(),
        },
        commit=find_commit(),
        hardware=describe_hardware(args),
        training_time=_find_runtime(state.log_history) if whole else None,
        energy=energy,
        emissions=emissions,
        figure=describe_training_curve(state.log_history),
    )


def _describe_objective(views: int, args: SimCSETrainingArguments) -> str:
    if views == 1:
        return f"unsupervised: {_POSITIVES[args.augmentation].format(args.augmentation_rate)}"
    return {0: "", 2: "supervised, on pairs"}.get(views, "supervised, with hard negatives")


_POSITIVES = {
    "dropout": "each sentence is its own positive, under dropout",
    "crop": "each sentence, cut short by {:.0%} of its words, is its own positive",
    "word_deletion": "each sentence, without {:.0%} of its words, is its own positive",
    "word_shuffle": "each sentence, with {:.0%} of its words out of place, is its own positive",
    "none": "each sentence is its own positive, without dropout",
}


def changed_options(options: Any) -> dict[str, Any]:
    """The options of a dataclass that differ from their defaults and say something of the model."""
    changed = {}
    for option in fields(options):
        name, value = option.name, getattr(options, option.name)
        default = (
            option.default_factory() if option.default_factory is not MISSING else option.default
        )
        # transformers turns unset options into empty ones.
        if value != default and not (default is None and value in (False, [], {}, "")):
            changed[name] = value
    return {
        name: _portable_value(value)
        for name, value in changed.items()
        if value is not None
        and name not in _UNTOLD
        and not name.startswith(_UNTOLD_PREFIXES)
        and name not in _SECRETS
    }


def _describe_options(args: SimCSETrainingArguments) -> dict[str, Any]:
    length = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    always = {name: getattr(args, name) for name in (*_ALWAYS, length)}
    changed = changed_options(args)
    if args.max_steps > 0:
        changed.pop("num_train_epochs", None)
    return always | changed


def write_merged_card(model: SimCSEModel, folder: Path) -> None:
    """The card of an adapter that was merged after its run, from what the model itself says."""
    base = model.base_weights.name if model.base_weights else ""
    facts = CardFacts(
        model_id=str(folder), **_describe_model(model, "merged"), base_model=_find_base_model(base)
    )
    (folder / CARD).write_text(render_card(facts), encoding="utf-8")
    add_documents(folder, [CARD])


def _describe_model(model: SimCSEModel, lora_save: str | None) -> dict[str, Any]:
    form = choose_lora_save(model, lora_save) if has_adapter(model.backbone) else None
    at_inference = model.head is not None and model.mlp_only_train is False
    by_cls = model.pooling_mode == "cls"
    module = 3 if model.pooling_mode in LAYER_PAIRS else 2
    return {
        "pooling_mode": model.pooling_mode,
        "dimensions": model.embedding_dimension,
        "max_seq_length": model.max_seq_length,
        "normalized": model.normalize_embeddings,
        "projection_head": _HEADS[model.mlp_only_train is not False if model.head else None],
        "head_folder": f"{module}_Dense" if at_inference else "",
        "pooler_output": at_inference
        and by_cls
        and form != "adapter"
        and has_tanh_pooler(base_of(model.backbone)),
        "pads_left": getattr(model.tokenizer, "padding_side", "right") == "left",
        "prompt": prompt_of(model.tokenizer) or "",
        "loaders": _find_loaders(model) if form == "adapter" else LOADERS,
        "base_model_relation": {None: "finetune", "adapter": "adapter"}.get(form, "merge"),
    }


def _find_loaders(model: SimCSEModel) -> Sequence[str]:
    """Of an adapter; `AutoModel` puts it on the base model as that is."""
    if is_bidirectional(model.config):
        return LOADERS[1:2]
    return LOADERS[:2] if bits_of(base_of(model.backbone)) else LOADERS


_HEADS = {None: "none", True: "in training only", False: "linear and tanh"}


def _find_base_model(name: str) -> str:
    """The name on the Hub of what was loaded; a folder has none, unless a package's."""
    for package, packaged in PACKAGED_MODELS.items():
        if name == package or Path(name).parts[-2:] == (packaged.module, packaged.folder):
            return packaged.hub_name
    return name if name and not Path(name).exists() and is_repo_id(name) else ""


def _find_scores(trainer: Any, step: int) -> tuple[dict[str, float], dict[str, float]]:
    """Before training, and of the weights after a step; what was not measured is not told."""
    said = trainer.description
    evaluations = {
        entry["step"]: {
            key.removeprefix("eval_"): value
            for key, value in entry.items()
            if key.endswith(("_spearman", "_avg_sts", *SPACE_METRICS))
        }
        for entry in trainer.state.log_history
        if "eval_avg_sts" in entry
    }
    before = dict(said.before) or evaluations.get(0, {})
    after = dict(said.after) if step == trainer.weights_step else {}
    return before, after or (evaluations.get(step, {}) if step else {})


def _correlations(metrics: Mapping[str, float]) -> dict[str, float]:
    return {
        name.removesuffix("_spearman"): value
        for name, value in metrics.items()
        if name not in SPACE_METRICS
    }


def _evaluated_on(metrics: Mapping[str, float], said: RunDescription) -> dict[str, EvaluatedOn]:
    known = {task: EvaluatedOn(hub.dataset, hub.config or "") for task, hub in TASKS.items()}
    return {task: known[task] for task in _correlations(metrics) if task in known} | dict(
        said.evaluated_on
    )


def _find_runtime(log_history: Sequence[Mapping[str, Any]]) -> float | None:
    logged = (entry["train_runtime"] for entry in log_history if "train_runtime" in entry)
    return next(logged, None)


def _portable_value(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_portable_value(item) for item in value]
    return _portable(value) if isinstance(value, str) else value


def _portable(text: str) -> str:
    """Absolute paths are of one machine: from the working folder, or the name alone."""
    name, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
    path = Path(value)
    if not path.is_absolute():
        return text
    here = Path.cwd()
    return name + equals + (str(path.relative_to(here)) if path.is_relative_to(here) else path.name)
