"""From options to a trained, evaluated and saved model: the one place where all parts meet."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from rich.cells import cell_len, set_cell_size
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback, set_seed

from simcse_trainer.arguments import DataArguments, ModelArguments, SimCSETrainingArguments
from simcse_trainer.data.loading import load_training_data
from simcse_trainer.data.retrieval import RetrievalData
from simcse_trainer.errors import CollectedErrors, InputError, at_command_line
from simcse_trainer.evaluation.sts import SPACE_METRICS, TASKS, get_task_name
from simcse_trainer.evaluation.suite import (
    bootstrap_tasks,
    encode_once,
    load_training_tasks,
    score_tasks,
)
from simcse_trainer.evaluation.tasks import RETRIEVAL_METRICS, label_metric, split_retrieval_metric
from simcse_trainer.evaluation.verdict import Verdict, judge
from simcse_trainer.files import CARD, RESULTS, STATE, TRAINING_ARGS, TRAINING_CURVE
from simcse_trainer.hub.card_data import EvaluatedOn
from simcse_trainer.hub.run_info import RunInfo, changed_options, log_evaluation
from simcse_trainer.model.io.checkpoints import read_checkpoint
from simcse_trainer.model.io.servers import list_server_warnings
from simcse_trainer.model.modeling import SimCSEModel
from simcse_trainer.model.progress import announce, is_watched
from simcse_trainer.training.callbacks import HubCheckpointCallback
from simcse_trainer.training.evaluation_data import check_evaluation, check_metric
from simcse_trainer.training.output_dir import check_output_dir, hold_folder
from simcse_trainer.training.processes import check_processes
from simcse_trainer.training.resume import find_resume_checkpoint
from simcse_trainer.training.trainer import SimCSETrainer
from simcse_trainer.training.validation import check_options

logger = logging.getLogger(__name__)


@at_command_line
def run_training(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: SimCSETrainingArguments,
    *,
    command: Sequence[str] = (),
) -> SimCSETrainer:
    """Train, evaluate before and after, save, and print the summary.

    A run that SIGTERM interrupts ends with its checkpoint: see `SimCSETrainer.interrupted`.

    Args:
        model_args: The options of the model, `ModelArguments`.
        data_args: The options of the data, `DataArguments`.
        args: The training options, `SimCSETrainingArguments`.
        command: The words of the command line, for the model card.

    Raises:
        InputError: The options, the data or the model cannot be used.
    """
    _set_up_logging(args)
    check_processes(args.world_size)
    folder = Path(str(args.output_dir))
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file; pass the name of a folder.")
    with hold_folder(folder) if args.process_index == 0 else nullcontext():
        return _run(model_args, data_args, args, command)


def _run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: SimCSETrainingArguments,
    command: Sequence[str],
) -> SimCSETrainer:
    folder = Path(str(args.output_dir))
    tell = announce if args.process_index == 0 else _tell_nobody
    tell("Reading the data")
    checkpoint, hub = None, None
    # Said together, once: who corrects one thing should not come back for the next.
    problems = CollectedErrors()
    with problems:
        checkpoint = find_resume_checkpoint(args.resume_from_checkpoint, folder, hub=args)
        _check_output_dir(args, folder, checkpoint)
    with problems:
        check_options(args)
    with problems:
        # The final model gets its last scores and its card before it is pushed, below.
        hub = HubCheckpointCallback(args, pushes_final_model=False) if args.push_to_hub else None
    if args.push_to_hub and hub is None:
        problems.raise_all()  # data may take long to read
    tasks, train_dataset = _read_data(data_args, args, problems)
    problems.raise_all()
    set_seed(args.seed)
    tell(f"Loading {model_args.model_name_or_path}")
    model = _load_model(model_args, args)
    tell("Preparing the training data")
    trainer = _build_trainer(
        model,
        args,
        train_dataset,
        tasks or None,
        preprocessing_num_workers=data_args.preprocessing_num_workers,
        callbacks=[hub] if hub else None,
    )
    _describe_run(trainer.run_info, model_args, data_args, command)
    model.to(args.device)
    evaluate = partial(evaluate_model, tasks=tasks, queries=data_args.neighbor_queries)
    before = evaluate(partial(trainer.encode, label="Evaluating before training"))
    trainer.run_info.before = before.metrics
    result = _train(trainer, checkpoint)
    if not trainer.interrupted:
        tell("Saving the model")
        trainer.save_model()
        after = evaluate(partial(trainer.encode, label="Evaluating after training"))
        trainer.run_info.after = after.metrics
        verdict = judge_run(before, after, tasks, trainer.state.log_history)
        trainer.run_info.verdict = str(verdict or "")
        _save_results(trainer, result, after)
        if trainer.is_world_process_zero():
            steps = trainer.state.global_step
            print("\n" + format_summary(before, after, folder, steps, verdict))
            for warning in list_server_warnings(folder):
                print(f"warning: {warning}", file=sys.stderr)
            if hub:
                hub.push_folder(folder)
    if hub:
        hub.finish()
    return trainer


def _tell_nobody(step: str) -> None:
    """Say nothing: the first process has said it."""


def _read_data(
    data_args: DataArguments, args: SimCSETrainingArguments, problems: CollectedErrors
) -> tuple[dict[str, Any], Any]:
    """Read what is evaluated on, by task, and what is trained on."""
    tasks: dict[str, Any] | None = None
    train_dataset = None
    with problems:
        if data_args.neighbor_queries and not data_args.eval_tasks:
            raise InputError(
                "neighbor_queries are searched in the evaluation data; pass --eval_tasks."
            )
        tasks = load_training_tasks(
            data_args.eval_tasks,
            split=data_args.eval_split,
            data_dir=data_args.sts_data_dir,
            columns=data_args.columns,
            corpus=data_args.eval_corpus,
        )
    with problems:
        if tasks is None:  # of what kind they are is not known
            names = [get_task_name(task) for task in data_args.eval_tasks]
            check_metric(args, names, names)
        else:
            check_evaluation(args, tasks)
    with problems:
        train_dataset = _load_train_dataset(data_args, args.data_seed or args.seed)
    return tasks or {}, train_dataset


def _save_results(trainer: SimCSETrainer, result: Any, after: ModelEvaluation) -> None:
    trainer.save_metrics("train", result.metrics)
    if after.scores:
        metrics = {f"eval_{name}": value for name, value in after.metrics.items()}
        trainer.save_metrics("eval", metrics)
    log_evaluation(trainer.state.log_history, trainer.weights_step, after.metrics)
    trainer.save_state()
    trainer.create_model_card()


def _set_up_logging(args: SimCSETrainingArguments) -> None:
    level = args.get_process_log_level()
    transformers.utils.logging.set_verbosity(level)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    if args.log_level == "passive":  # not set: say what was chosen, once
        level = logging.INFO if args.process_index == 0 else logging.WARNING
    logging.getLogger("simcse_trainer").setLevel(level)
    # The Trainer's own bar asks for no terminal.
    args.disable_tqdm = bool(args.disable_tqdm) or not is_watched()


def _check_output_dir(args: SimCSETrainingArguments, folder: Path, checkpoint: Path | None) -> None:
    """Refuse other work in `output_dir` before minutes of preparation; `train` looks again."""
    if args.process_index or args.overwrite_output_dir:
        return
    run = read_checkpoint(checkpoint).run if checkpoint else ""
    check_output_dir(
        folder,
        [CARD, TRAINING_CURVE, TRAINING_ARGS, STATE, *RESULTS],
        run=run,
        resumed=checkpoint is not None,
        overwrite=False,
        set_aside=checkpoint is not None and not run,
    )


def _build_trainer(*args: Any, **kwargs: Any) -> SimCSETrainer:
    try:
        return SimCSETrainer(*args, **kwargs)
    except (ValueError, ImportError, RuntimeError, TypeError) as error:
        raise _explain(error) from error


def _explain(error: Exception) -> Exception:
    """Turn what libraries refuse into an error for users; a bug of ours keeps its traceback."""
    if isinstance(error, InputError) or not _is_raised_by(error, _CHECKING):
        return error
    return InputError(f"These options do not go together: {error}")


# They look at combinations of options, and for libraries that are missing.
_CHECKING = ("transformers", "accelerate", "torch.optim", "bitsandbytes")


def _is_raised_by(error: BaseException, packages: tuple[str, ...]) -> bool:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    name = place.tb_frame.f_globals.get("__name__", "") if place is not None else ""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


class _Beginning(TrainerCallback):
    """Logs the scores before training as those of step 0, and remembers that training began."""

    def __init__(self, before: Mapping[str, float]) -> None:
        self.before = before
        self.happened = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.happened = True
        if not args.eval_on_start:
            log_evaluation(state.log_history, 0, self.before)


def _train(trainer: SimCSETrainer, checkpoint: Path | None) -> Any:
    beginning = _Beginning(trainer.run_info.before)
    trainer.add_callback(beginning)
    try:
        return trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (ValueError, ImportError, TypeError, OverflowError) as error:
        # Optimizer, schedule and batches are made first, by libraries that look at options then.
        if beginning.happened:
            raise
        raise _explain(error) from error


def _load_train_dataset(data_args: DataArguments, seed: int) -> Any:
    dataset: Any = load_training_data(
        data_args.train_file,
        dataset_name=data_args.dataset_name,
        dataset_config_name=data_args.dataset_config_name,
        dataset_split=data_args.dataset_split,
        columns=data_args.columns or None,
        file_options=data_args.file_options,
        nli_triplets=data_args.nli_triplets,
        drop_invalid_rows=data_args.drop_invalid_rows,
        streaming=data_args.streaming,
    )
    if data_args.streaming and data_args.shuffle_buffer_size:
        # A corpus in order would have neighbours, often of one topic, as all the negatives.
        return dataset.shuffle(seed=seed, buffer_size=data_args.shuffle_buffer_size)
    return dataset


def _load_model(model_args: ModelArguments, args: SimCSETrainingArguments) -> SimCSEModel:
    return SimCSEModel.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        base_model=model_args.base_model,
        normalize_embeddings=model_args.normalize_embeddings,
        pooling_mode=model_args.pooling_mode,
        projection_head=model_args.projection_head,
        mlp_only_train=model_args.mlp_only_train,
        max_seq_length=model_args.max_seq_length,
        padding_free=model_args.padding_free,
        prompt=model_args.prompt,
        append_eos_token=model_args.append_eos_token,
        bidirectional_attention=model_args.bidirectional_attention,
        attention_dropout=model_args.attention_dropout,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.weights_dtype,
        lora=model_args.new_adapter(),
        load_in_4bit=model_args.load_in_4bit or None,
        load_in_8bit=model_args.load_in_8bit or None,
        device=args.device,
        trust_remote_code=model_args.trust_remote_code,
        mlm_head=args.mlm_weight > 0,
    )


def _describe_run(
    info: RunInfo, model_args: ModelArguments, data_args: DataArguments, command: Sequence[str]
) -> None:
    """Say what only the options tell, for the model card."""
    name = data_args.dataset_name
    on_hub = bool(name) and not Path(str(name)).exists()
    info.evaluated_on = {
        task: EvaluatedOn(TASKS[task].dataset, TASKS[task].config or "", data_args.eval_split)
        for task in data_args.eval_tasks
        if task in TASKS
    }
    info.model_name = model_args.model_name_or_path
    info.datasets = [str(name)] if on_hub else []
    info.files = [*data_args.train_file, *([str(name)] if name and not on_hub else [])]
    info.options = changed_options(model_args) | changed_options(data_args)
    info.command = command


Neighbors = dict[str, list[tuple[float, str]]]


@dataclass(frozen=True)
class ModelEvaluation:
    """A model's scores, and the nearest sentences of some queries, at one moment.

    Attributes:
        scores: What `evaluate_tasks` gives but the space; empty without evaluation data.
        neighbors: Query -> (cosine, sentence), nearest first.
        space: Alignment, uniformity and anisotropy from `evaluate_sts`.
        cosines: Task -> cosine of each pair.
        gains: Task of retrieval -> nDCG@10 of each query, from 0 to 1.
    """

    scores: dict[str, float]
    neighbors: Neighbors
    space: dict[str, float] = field(default_factory=dict)
    cosines: dict[str, list[float]] = field(default_factory=dict)
    gains: dict[str, list[float]] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """Scores and space together, as `evaluate_tasks` gives them."""
        return self.scores | self.space


def evaluate_model(
    encode: Callable[[Sequence[str]], Tensor],
    tasks: Mapping[str, Any],
    queries: Sequence[str],
    *,
    neighbors: int = 3,
) -> ModelEvaluation:
    """Evaluate, and search the evaluation sentences for the queries.

    Args:
        encode: Texts to embeddings [n, D].
        tasks: Name -> scored pairs, or queries and passages.
        queries: Texts whose neighbours are searched.
        neighbors: Sentences per query; the query itself is not among them.
    """
    if not tasks:
        return ModelEvaluation({}, {})
    found: Neighbors = {}
    if queries:
        corpus = _list_texts(tasks)
        searched = [task for task in tasks.values() if isinstance(task, RetrievalData)]
        asked = [query for task in searched for query in task.queries]
        encode = encode_once(encode, [*corpus, *queries, *asked])
        rows = F.normalize(encode(corpus), dim=-1)
        cosines = F.normalize(encode(queries), dim=-1) @ rows.T
        for query, row in zip(queries, cosines, strict=True):
            others = [i for i in row.argsort(descending=True).tolist() if corpus[i] != query]
            found[query] = [(float(row[i]), corpus[i]) for i in others[:neighbors]]
    scored = score_tasks(encode, tasks)
    space = {name: scored.metrics.pop(name) for name in SPACE_METRICS if name in scored.metrics}
    return ModelEvaluation(scored.metrics, found, space, scored.cosines, scored.gains)


def judge_run(
    before: ModelEvaluation,
    after: ModelEvaluation,
    tasks: Mapping[str, Any],
    log_history: Sequence[Mapping[str, Any]] = (),
) -> Verdict | None:
    """Say what training has done to the model.

    Args:
        before: Of the model that training began with.
        after: Of the trained one.
        tasks: Name -> scored pairs, or queries and passages, of both.
        log_history: The log of the run, with its losses.
    """
    return judge(
        before.metrics,
        after.metrics,
        interval=bootstrap_tasks(before, after, tasks),
        losses=[entry["loss"] for entry in log_history if "loss" in entry],
    )


def _list_texts(tasks: Mapping[str, Any]) -> list[str]:
    """List the different texts that a neighbour may be: of pairs both sides, else the passages."""
    searched = [task for task in tasks.values() if isinstance(task, RetrievalData)]
    scored = [task for task in tasks.values() if not isinstance(task, RetrievalData)]
    found = dict.fromkeys(s for side in _SIDES for task in scored for s in task[side])
    for task in searched:
        found |= dict.fromkeys(text for _, text in task.read_passages())
    return list(found)


_SIDES = ("sentence1", "sentence2")


def format_summary(
    before: ModelEvaluation,
    after: ModelEvaluation,
    folder: Path,
    steps: int,
    verdict: Verdict | None = None,
) -> str:
    """Format the text that ends a run."""
    parts = []
    if after.scores:
        parts.append(_score_table(before, after))
    if verdict is not None:
        parts.append(f"{verdict}\n")
    if after.neighbors:
        parts.append(_neighbor_list(before.neighbors, after.neighbors))
    parts.append(f"The model after {steps} steps is in {folder}. Load it with any of\n")
    parts.append(_loading(folder))
    return "\n".join(parts)


def _score_table(before: ModelEvaluation, after: ModelEvaluation) -> str:
    searched = [name for name in after.scores if split_retrieval_metric(name)]
    scored = [name for name in after.scores if name not in searched]
    several = len(searched) > 2 * len(RETRIEVAL_METRICS)  # one task has its own and the means
    sections = {
        "Spearman x 100": [n for n in scored if n != "avg_sts" or len(scored) > 2],
        "Retrieval x 100": [n for n in searched if several or n not in RETRIEVAL_METRICS],
        "Lower is better": [name for name in after.space if name in before.space],
    }
    sections = {heading: names for heading, names in sections.items() if names}
    labels = {name: label_metric(name) for names in sections.values() for name in names}
    # In cells of a terminal, of which a letter of Hangul fills two.
    width = max(cell_len(label) for label in [*labels.values(), *sections])
    titles = f"  {'before':>7}  {'after':>7}  {'change':>7}"
    lines: list[str] = []
    for heading, names in sections.items():
        lines.append(f"{heading:<{width}}{titles}" if not lines else heading)
        for name in names:
            old, new = before.metrics[name], after.metrics[name]
            label = set_cell_size(labels[name], width)
            lines.append(f"{label}  {old:7.2f}  {new:7.2f}  {new - old:+7.2f}")
    return "\n".join([*lines, ""])


def _neighbor_list(before: Neighbors, after: Neighbors) -> str:
    lines = ["Nearest sentences of the evaluation data (cosine)"]
    for query in after:
        lines.append(f"\n  {query}")
        for moment, neighbors in (("before", before[query]), ("after", after[query])):
            for rank, (cosine, sentence) in enumerate(neighbors):
                lines.append(f"    {moment if rank == 0 else '':<6}  {cosine:.2f}  {sentence}")
    return "\n".join([*lines, ""])


def _loading(folder: Path) -> str:
    path = repr(str(folder))
    return (
        f"  from simcse_trainer import SimCSEModel\n"
        f"  SimCSEModel.from_pretrained({path}).encode(['a sentence'])\n\n"
        f"  from sentence_transformers import SentenceTransformer\n"
        f"  SentenceTransformer({path}).encode(['a sentence'])\n\n"
        f"  from transformers import AutoModel, AutoTokenizer\n"
        f"  AutoModel.from_pretrained({path}), AutoTokenizer.from_pretrained({path})\n"
    )
