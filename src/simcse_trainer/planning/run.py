"""From the options of a run to its plan, and to what could be changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers.training_args import OptimizerNames

from simcse_trainer.arguments import DataArguments, ModelArguments, SimCSETrainingArguments
from simcse_trainer.config import parse_for_another_machine
from simcse_trainer.data.loading import load_training_data
from simcse_trainer.errors import InputError
from simcse_trainer.planning.fake_model import Source, read_source
from simcse_trainer.planning.optimizers import is_known
from simcse_trainer.planning.plan import Plan, Planner, Workload

# What is there besides tensors, taken for granted: on a GPU the CUDA context, kernels' workspaces
# and the allocator's gaps; on the CPU Python and its libraries.
RESERVE = {True: 2**30, False: 3 * 2**28}


@dataclass(frozen=True)
class Choice:
    """Options to add, and what the run then needs.

    Attributes:
        options: As on the command line; empty: the run as it is.
        plan: With the chunk below.
        chunk: The largest that fits; None: none does.
    """

    options: str
    plan: Plan
    chunk: int | None


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run.

    Attributes:
        name: Of the model.
        plan: The run as its options say.
        workload: What its step computes on.
        packed: Without padding.
        notes: What was taken for granted.
        memory: Bytes that there are, where they were given.
        fits: Whether the run as it is needs no more than that, `RESERVE` included.
        choices: The largest chunk, and where that does not do, what else to change.
    """

    name: str
    plan: Plan
    workload: Workload
    packed: bool
    notes: list[str] = field(default_factory=list)
    memory: int | None = None
    fits: bool = True
    choices: list[Choice] = field(default_factory=list)


def plan_run(
    argv: Sequence[str],
    *,
    memory: int | None = None,
    tokens: int | None = None,
    views: int | None = None,
    backbone_config: str | None = None,
) -> RunPlan:
    """Plan what `train_simcse.py` would do with the same words.

    Args:
        argv: `[CONFIG.yaml] [--option value ...]`.
        memory: Bytes of the device.
        tokens: Mean length of a text; by default all are as long as `max_seq_length`.
        views: Texts per row, where the data is not here.
        backbone_config: A config.json, where the model is out of reach.

    Raises:
        InputError: Options, model or data cannot be used.
    """
    (model_args, data_args, args), on_cpu = parse_for_another_machine(argv)
    source = read_source(model_args, backbone_config)
    return plan_arguments(
        model_args,
        data_args,
        args,
        source,
        gpu=not on_cpu,
        memory=memory,
        tokens=tokens,
        views=views,
    )


def plan_arguments(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: SimCSETrainingArguments,
    source: Source,
    *,
    gpu: bool,
    memory: int | None = None,
    tokens: int | None = None,
    views: int | None = None,
) -> RunPlan:
    """`plan_run`, of options that are parsed and a configuration that is read."""
    notes: list[str] = []
    longest = model_args.max_seq_length or source.max_seq_length
    if tokens is not None and not 0 < tokens <= longest:
        raise InputError(f"tokens is {tokens}; expected 1 to {longest}, the longest text.")
    workload = Workload(
        views=views or _count_views(data_args, notes),
        batch=args.per_device_train_batch_size,
        chunk=args.chunk_size,
        longest=longest,
        tokens=tokens or longest,
        gpu=gpu,
    )
    optim = OptimizerNames(args.optim).value
    if not is_known(optim):
        notes.append(f"The state of {optim} is taken to be as large as AdamW's.")
    planner = Planner(model_args, args, source, workload)
    plan = planner.plan()
    result = RunPlan(
        model_args.model_name_or_path, plan, workload, planner.packed, notes, memory=memory
    )
    if memory is None:
        return result
    room = memory - RESERVE[gpu]
    choices = [_choose("", planner, room)]
    if plan.peak > room:
        choices += [
            _choose(options, Planner(other, changed, source, workload), room)
            for options, other, changed in _changes(model_args, args)
        ]
    return replace(result, fits=plan.peak <= room, choices=choices)


def _choose(options: str, planner: Planner, room: int) -> Choice:
    chunk = planner.largest_chunk(room)
    return Choice(options, planner.plan(chunk or 1), chunk)


def _changes(
    model_args: ModelArguments, args: SimCSETrainingArguments
) -> Iterator[tuple[str, ModelArguments, SimCSETrainingArguments]]:
    """What needs less memory, from the mildest change on, each with those before it."""
    words: list[str] = []
    if not args.activation_checkpointing:
        words.append("--activation_checkpointing true")
        args = copy.copy(args)  # `replace` would check again what only the run's machine has
        args.activation_checkpointing = True
        yield " ".join(words), model_args, args
    if not model_args.use_lora:
        words.append("--use_lora true")
        model_args = replace(model_args, use_lora=True)
        yield " ".join(words), model_args, args
    if not model_args.load_in_4bit:
        words.append("--load_in_4bit true")
        model_args = replace(model_args, load_in_4bit=True, load_in_8bit=False)
        yield " ".join(words), model_args, args


def _count_views(data_args: DataArguments, notes: list[str]) -> int:
    """Texts per row: what the options say, else the data if it is here."""
    if data_args.nli_triplets:
        return 3
    if data_args.columns:
        return max(2, len(data_args.columns))
    files = data_args.train_file
    if files and data_args.dataset_name is None and Path(files[0]).is_file():
        rows = load_training_data(files[:1], streaming=True)
        return max(2, len(rows.column_names or next(iter(rows))))
    if files and all(".txt" in Path(name).suffixes for name in files):
        return 2
    notes.append("The data is not here: 3 texts a row are taken for granted; or pass --views.")
    return 3
