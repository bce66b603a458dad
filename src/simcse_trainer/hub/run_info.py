"""What is known of a run, as plain data; and the data of a model card made of it."""

from __future__ import annotations

import csv
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from subprocess import DEVNULL, SubprocessError, check_output
from typing import Any

import torch
import transformers
from datasets import Dataset, IterableDataset
from transformers import TrainingArguments

from simcse_trainer.analysis.figures import describe_training_curve
from simcse_trainer.data.schema import POSITIVES, resolve_text_columns
from simcse_trainer.data.tokenization import INPUT_IDS
from simcse_trainer.evaluation.sts import SPACE_METRICS, TASKS
from simcse_trainer.evaluation.tasks import split_retrieval_metric
from simcse_trainer.evaluation.verdict import judge
from simcse_trainer.files import CARD
from simcse_trainer.hub.card_data import LOADERS, CardData, EvaluatedOn, is_repo_id
from simcse_trainer.hub.model_card import render_card
from simcse_trainer.model.decoders import is_bidirectional
from simcse_trainer.model.io.folder import add_documents
from simcse_trainer.model.io.resolve import find_packaged
from simcse_trainer.model.io.saving import choose_lora_save, has_tanh_pooler
from simcse_trainer.model.io.terms import Terms
from simcse_trainer.model.lora import get_base_model, has_adapter
from simcse_trainer.model.modeling import SimCSEModel
from simcse_trainer.model.pooling import LAYER_PAIRS
from simcse_trainer.model.quantization import quantization_bits
from simcse_trainer.model.tokenizer import get_prompt
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


@dataclass(frozen=True)
class Examples:
    """The first rows of training data, as texts.

    Attributes:
        columns: Names of the text columns.
        rows: A text per column.
    """

    columns: list[str]
    rows: list[list[str]]


@dataclass
class RunInfo:
    """What is known of a run. The trainer keeps it up to date, and model cards read nothing else.

    Up to `started` it is said by who starts the run, and may be left out.

    Attributes:
        model_name: As given: a name on the Hub, a folder, or a package.
        datasets: Names of the training data on the Hub.
        files: Training files, as given.
        evaluated_on: Task -> where its pairs come from.
        options: Further options that differ from their defaults.
        command: The words of the command line.
        before: What `evaluate_tasks` gives before training.
        after: The same of the final model; during training the log has them.
        verdict: What happened to the final model, in a sentence.
        started: When the run began, in seconds of `time.time`.
        loaded_from: What the model's configuration says.
        views: Texts per row of the training data.
        rows: Of the training data; None of a stream.
        examples: First rows of the training data.
        training_options: Of `SimCSETrainingArguments`, by `describe_options`.
        objective: The objective of the training, in words.
        language: ISO 639 codes of the training texts.
        license: Of the trained model.
        output_dir: The folder of the run.
        hub_model_id: The repository, once that is known.
        seed: The seed of the run.
        hardware: What the run computed on, in words.
        resumed: Training went on from a checkpoint.
        log_history: The log, of the `TrainerState`.
        steps: How many optimizer steps were done.
        weights_step: The optimizer steps that the weights in memory have seen.
        model: What the final folder holds, by `describe_model`.
        checkpoint_model: What a checkpoint holds: an adapter as it is.
    """

    model_name: str = ""
    datasets: Sequence[str] = ()
    files: Sequence[str] = ()
    evaluated_on: Mapping[str, EvaluatedOn] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    command: Sequence[str] = ()
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    verdict: str = ""
    started: float = field(default_factory=time.time)
    loaded_from: str = ""
    views: int = 0
    rows: int | None = None
    examples: Examples = field(default_factory=lambda: Examples([], []))
    training_options: dict[str, Any] = field(default_factory=dict)
    objective: str = ""
    language: Sequence[str] = ()
    license: str = ""
    output_dir: str = ""
    hub_model_id: str = ""
    seed: int | None = None
    hardware: str = ""
    resumed: bool = False
    log_history: Sequence[Mapping[str, Any]] = ()
    steps: int = 0
    weights_step: int = 0
    model: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_model: Mapping[str, Any] = field(default_factory=dict)

    def update(self, model: SimCSEModel, args: Any, state: Any) -> None:
        """Take what a run is now.

        Args:
            model: The model, a `SimCSEModel`.
            args: The training options, `SimCSETrainingArguments`.
            state: The state of the training, a `TrainerState`.
        """
        self.loaded_from = str(model.config._name_or_path or "")
        self.model = describe_model(model, args.lora_save)
        self.checkpoint_model = describe_model(model, "adapter")
        self.training_options = describe_options(args)
        self.objective = describe_objective(self.views, args)
        self.language, self.license = list(args.language), args.license or ""
        self.output_dir, self.seed = str(args.output_dir), args.seed
        self.hardware = describe_hardware(args)
        self.steps, self.log_history = state.global_step, state.log_history


def make_card_data(
    info: RunInfo,
    model_id: str | None = None,
    *,
    in_checkpoint: bool = False,
    step: int | None = None,
) -> CardData:
    """Return what a card says, at any time before, during and after training.

    Args:
        info: What is known of the run.
        model_id: What users will load; by default the repository, else the run's folder.
        in_checkpoint: The card is of a checkpoint, which holds an adapter as it is.
        step: The optimizer steps that the described weights have seen; by default those in memory.
    """
    step = info.weights_step if step is None else step
    before, after = _find_scores(info, step)
    sources = [*info.datasets, *(_portable(file) for file in info.files)]
    # Of a resumed run only the last part was timed.
    began = float("inf") if info.resumed else info.started
    energy, emissions = read_emissions(Path(info.output_dir), began)
    return CardData(
        model_id=model_id or info.hub_model_id or info.output_dir,
        **_add_known(
            info.checkpoint_model if in_checkpoint else info.model,
            base_model=_find_base_model(info.model_name or info.loaded_from),
            license=info.license,
        ),
        objective=info.objective,
        language=list(info.language),
        datasets=[name for name in info.datasets if is_repo_id(name)],
        sources=", ".join(sources),
        rows=info.rows,
        columns=info.examples.columns,
        examples=info.examples.rows,
        steps=info.steps,
        best_step=step if step != info.steps else None,
        scores=_correlations(after),
        scores_before=_correlations(before),
        retrieval={name: x for name, x in after.items() if split_retrieval_metric(name)},
        retrieval_before={name: x for name, x in before.items() if split_retrieval_metric(name)},
        evaluated_on=_evaluated_on(after, info),
        verdict=_find_verdict(info, step, before, after),
        space={name: after[name] for name in SPACE_METRICS if name in after},
        space_before={name: before[name] for name in SPACE_METRICS if name in before},
        options={**info.training_options, **info.options},
        command=[_portable(word) for word in info.command],
        seed=info.seed,
        versions={
            "simcse-trainer": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "Python": platform.python_version(),
        },
        commit=find_commit(),
        hardware=info.hardware,
        training_time=None if info.resumed else _find_runtime(info.log_history),
        energy=energy,
        emissions=emissions,
        figure=describe_training_curve(info.log_history),
    )


def take_examples(
    dataset: Dataset | IterableDataset, model: SimCSEModel, count: int = 3
) -> Examples:
    """Take the first rows of text columns, or of `input_ids` decoded."""
    rows: list[dict[str, Any]] = list(dataset.take(count))
    names = list(rows[0]) if rows else []
    if INPUT_IDS not in names:
        roles = resolve_text_columns(names, source="train_dataset") if names else {}
        # A row that cannot be used is refused in its turn.
        shown = [[_show_cell(row[name]) for name in roles.values()] for row in rows]
        return Examples(list(roles), shown)
    if POSITIVES in names:
        return Examples([], [])
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


def describe_objective(views: int, args: Any) -> str:
    """Return what tells a positive, in words; or what is trained where nothing is contrasted."""
    if not args.uses_embeddings:
        return "masked tokens are predicted, and nothing is contrasted"
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
    """Return the options that differ from their defaults and say something of the model."""
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


def describe_options(args: Any) -> dict[str, Any]:
    """Return the options of the training that every card has, and those that were changed."""
    length = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    always = {name: getattr(args, name) for name in (*_ALWAYS, length)}
    changed = changed_options(args)
    if args.max_steps > 0:
        changed.pop("num_train_epochs", None)
    return always | changed


def write_merged_card(model: SimCSEModel, folder: Path) -> None:
    """Write the card of an adapter that was merged after its run, from what the model says."""
    base = model.base_weights.name if model.base_weights else ""
    facts = CardData(
        model_id=str(folder),
        **_add_known(describe_model(model, "merged"), base_model=_find_base_model(base)),
    )
    (folder / CARD).write_text(render_card(facts), encoding="utf-8")
    add_documents(folder, [CARD])


def _find_narrow_dtype(model: SimCSEModel) -> str:
    dtype = get_base_model(model.backbone).dtype
    return str(dtype).removeprefix("torch.") if dtype.itemsize == 2 else ""


def describe_model(model: SimCSEModel, lora_save: str | None) -> dict[str, Any]:
    """Return what a card says of a model, by the names of `CardData`.

    Args:
        model: The model, a `SimCSEModel`.
        lora_save: As `save_model` takes it.
    """
    form = choose_lora_save(model, lora_save) if has_adapter(model.backbone) else None
    at_inference = model.head is not None and model.mlp_only_train is False
    by_cls = model.pooling_mode == "cls"
    module = 3 if model.pooling_mode in LAYER_PAIRS else 2
    terms = model.terms or Terms()
    return {
        "pooling_mode": model.pooling_mode,
        "dimensions": model.embedding_dimension,
        "max_seq_length": model.max_seq_length,
        "weights_dtype": "" if form == "adapter" else _find_narrow_dtype(model),
        "normalized": model.normalize_embeddings,
        "projection_head": _HEADS[model.mlp_only_train is not False if model.head else None],
        "head_folder": f"{module}_Dense" if at_inference else "",
        "pooler_output": at_inference
        and by_cls
        and form != "adapter"
        and has_tanh_pooler(get_base_model(model.backbone)),
        "pads_left": getattr(model.tokenizer, "padding_side", "right") == "left",
        "prompt": get_prompt(model.tokenizer) or "",
        "loaders": _find_loaders(model) if form == "adapter" else LOADERS,
        "base_model": terms.base_model,
        "license": terms.license,
        "origin": terms.origin,
        "notice": terms.notice_text,
        "base_model_relation": {None: "finetune", "adapter": "adapter"}.get(form, "merge"),
    }


def _add_known(model: Mapping[str, Any], **known: str) -> dict[str, Any]:
    """Put what a run knows over what the terms of its base model say."""
    return {**model, **{name: value for name, value in known.items() if value}}


def _find_loaders(model: SimCSEModel) -> Sequence[str]:
    """List the loaders of an adapter; `AutoModel` puts it on the base model as that is."""
    if is_bidirectional(model.config):
        return LOADERS[1:2]
    return LOADERS[:2] if quantization_bits(get_base_model(model.backbone)) else LOADERS


_HEADS = {None: "none", True: "in training only", False: "linear and tanh"}


def _find_base_model(name: str) -> str:
    """Find the name on the Hub of the base; a folder has none, unless a package's."""
    packaged = find_packaged(name)
    if packaged is not None:
        return packaged.hub_name
    return name if name and not Path(name).exists() and is_repo_id(name) else ""


def log_evaluation(
    log_history: list[dict[str, Any]], step: int, metrics: Mapping[str, float]
) -> None:
    """Log what was measured outside of training, where the log has no evaluation of that step.

    Args:
        log_history: Of the `TrainerState`, to which an entry is added.
        step: Of the weights.
        metrics: From `evaluate_tasks`; empty where nothing was evaluated.
    """
    if not metrics or any(_is_evaluation(e) and e.get("step") == step for e in log_history):
        return
    entry = {f"eval_{name}": value for name, value in metrics.items()} | {"step": step}
    later = (i for i, other in enumerate(log_history) if other.get("step", 0) > step)
    log_history.insert(next(later, len(log_history)), entry)


def _is_evaluation(entry: Mapping[str, Any]) -> bool:
    return "eval_avg_sts" in entry or "eval_ndcg_at_10" in entry


def _find_scores(info: RunInfo, step: int) -> tuple[dict[str, float], dict[str, float]]:
    """Find the scores before training and after the weights' step, where they were measured."""
    evaluations = {
        entry["step"]: {
            key.removeprefix("eval_"): value
            for key, value in entry.items()
            if key.endswith(("_spearman", "_avg_sts", *SPACE_METRICS))
            or split_retrieval_metric(key)
        }
        for entry in info.log_history
        if _is_evaluation(entry)
    }
    before = dict(info.before) or evaluations.get(0, {})
    after = dict(info.after) if step == info.weights_step else {}
    return before, after or (evaluations.get(step, {}) if step else {})


def _find_verdict(
    info: RunInfo, step: int, before: Mapping[str, float], after: Mapping[str, float]
) -> str:
    """Return what was said of the final model; of another step what the scores alone say."""
    if info.verdict and step == info.weights_step:
        return info.verdict
    losses = [e["loss"] for e in info.log_history if "loss" in e and e.get("step", 0) <= step]
    return str(judge(before, after, losses=losses) or "")


def _correlations(metrics: Mapping[str, float]) -> dict[str, float]:
    return {
        name.removesuffix("_spearman"): value
        for name, value in metrics.items()
        if name not in SPACE_METRICS and not split_retrieval_metric(name)
    }


def _evaluated_on(metrics: Mapping[str, float], info: RunInfo) -> dict[str, EvaluatedOn]:
    known = {task: EvaluatedOn(hub.dataset, hub.config or "") for task, hub in TASKS.items()}
    found = {task: known[task] for task in _correlations(metrics) if task in known}
    return found | dict(info.evaluated_on)


def _find_runtime(log_history: Sequence[Mapping[str, Any]]) -> float | None:
    logged = (entry["train_runtime"] for entry in log_history if "train_runtime" in entry)
    return next(logged, None)


def _show_cell(value: Any) -> str:
    """Return a text; of a list, of which one is drawn, all."""
    return " / ".join(map(str, value)) if isinstance(value, list) else str(value)


def _portable_value(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_portable_value(item) for item in value]
    return _portable(value) if isinstance(value, str) else value


def _portable(text: str) -> str:
    """Shorten absolute paths, which are of one machine: to the working folder, or the name."""
    name, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
    path = Path(value)
    if not path.is_absolute():
        return text
    here = Path.cwd()
    return name + equals + (str(path.relative_to(here)) if path.is_relative_to(here) else path.name)


def describe_hardware(args: TrainingArguments) -> str:
    """Describe the hardware, such as "8 x NVIDIA H100 80GB HBM3"."""
    count = args.world_size
    device = args.device
    if device.type == "cuda":
        return f"{count} x {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        machine = f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
        return machine if count == 1 else f"{machine}, {count} processes"
    return f"{count} x {device.type}"


def read_emissions(folder: Path, since: float) -> tuple[float | None, float | None]:
    """Read energy in kWh and grams of CO2 equivalent that codecarbon measured.

    Args:
        folder: Where it writes `emissions.csv`, a row per run.
        since: When this run began, in seconds of `time.time`; an older file is of another.
    """
    try:
        if (folder / "emissions.csv").stat().st_mtime < since:
            return None, None
        with open(folder / "emissions.csv", encoding="utf-8", newline="") as file:
            last = list(csv.DictReader(file))[-1]
        return float(last["energy_consumed"]), 1000 * float(last["emissions"])
    except (OSError, IndexError, KeyError, ValueError, TypeError):
        return None, None


@cache
def find_commit() -> str:
    """Find the commit of the checkout that this package runs from; empty where it is installed."""
    package = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(package)]
    try:
        top, commit = _run([*git, "rev-parse", "--show-toplevel", "HEAD"]).split("\n")
        if Path(top).resolve() != package.parents[1]:
            return ""  # somebody's repository with our package in it
        changed = _run([*git, "status", "--porcelain", "--untracked-files=no"])
    except (OSError, SubprocessError, ValueError):
        return ""
    return f"{commit} (with local changes)" if changed else commit


def _run(command: list[str]) -> str:
    return check_output(command, stderr=DEVNULL, text=True, timeout=10).strip()
