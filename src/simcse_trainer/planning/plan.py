"""What a run needs, the largest chunk for a given memory, and what to change if none fits."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import List
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.training_args import OptimizerNames

from simcse_trainer.arguments import DataArguments, ModelArguments, SimCSETrainingArguments
from simcse_trainer.data.loading import load_training_data
from simcse_trainer.errors import InputError
from simcse_trainer.model.modeling import SimCSEModel
from simcse_trainer.model.packing import build_batch
from simcse_trainer.planning.fake_kernels import FakeKernels, FakeQuantizedLinear
from simcse_trainer.planning.fake_model import Source, build_fake_model
from simcse_trainer.planning.step import (
    Batch,
    MemoryTracker,
    Step,
    StepMemory,
    is_known,
    state_bytes,
    step_bytes,
)


@dataclass(frozen=True)
class Workload:
    """What a step computes on.

    Attributes:
        views: Texts per row of the data, 2 for unsupervised SimCSE.
        batch: Rows of a batch on one device.
        chunk: Texts that are embedded at a time; None: all of them.
        longest: Tokens of the longest text.
        tokens: Tokens of all other texts.
        gpu: On a GPU, else on the CPU.
    """

    views: int
    batch: int
    chunk: int | None
    longest: int
    tokens: int
    gpu: bool

    @property
    def texts(self) -> int:
        """Of a step."""
        return self.views * self.batch

    @property
    def size(self) -> int:
        """Texts that are embedded at a time."""
        return min(self.chunk or self.texts, self.texts)


@dataclass(frozen=True)
class Plan:
    """Bytes, but for the first two.

    Attributes:
        parameters: Number of all parameters.
        trained: Those with a gradient.
        weights: Of all parameters and buffers, in the types and bits they are kept in.
        optimizer: State, from the first step on.
        gradients: Of all trained parameters.
        step: What is made and freed within a step, gradients included.
        peak: The most of all together.
    """

    parameters: int
    trained: int
    weights: int
    optimizer: int
    gradients: int
    step: StepMemory
    peak: int


class Planner:
    """Plans a run, and runs that differ in their chunk.

    Args:
        model_args: The options of the model, `ModelArguments`.
        args: The training options, `SimCSETrainingArguments`.
        source: What `read_source` has read of the model.
        workload: What a step computes on.
    """

    def __init__(
        self,
        model_args: ModelArguments,
        args: SimCSETrainingArguments,
        source: Source,
        workload: Workload,
    ):
        self.model_args, self.args, self.source = model_args, args, source
        self.workload = workload
        self._plans: dict[int, Plan] = {}

    def plan(self, chunk: int | None = None) -> Plan:
        """Return the run as it is, or with another chunk."""
        workload = replace(self.workload, chunk=chunk or self.workload.chunk)
        if workload.size not in self._plans:
            self._plans[workload.size] = self._simulate(workload)
        return self._plans[workload.size]

    @property
    def packed(self) -> bool:
        """Whether batches have no padding."""
        return self._model.padding_free

    def largest_chunk(self, memory: int) -> int | None:
        """Find the most texts at a time with a peak within `memory` bytes; None: no number."""
        low, high = 1, self.workload.texts
        if self.plan(high).peak <= memory:
            return high
        if self.plan(low).peak > memory:
            return None
        for turn in itertools.count():
            if high - low == 1:
                break
            middle = (low + high) // 2 if turn % 3 == 2 else self._crossing(low, high, memory)
            low, high = (middle, high) if self.plan(middle).peak <= memory else (low, middle)
        return low

    def _crossing(self, low: int, high: int, memory: int) -> int:
        """Return where the peak would cross the memory if it grew evenly: it nearly does."""
        below, above = self.plan(low).peak, self.plan(high).peak
        fraction = (memory - below) / max(above - below, 1)
        return min(max(low + int(fraction * (high - low)), low + 1), high - 1)

    @cached_property
    def _mode(self) -> FakeTensorMode:
        return FakeTensorMode()

    @cached_property
    def _model(self) -> SimCSEModel:
        model = build_fake_model(
            self.model_args, self.source, self._mode, mlm_head=self.args.mlm_weight > 0
        )
        with self._mode:
            if self.args.activation_checkpointing:
                options: Any = self.args.activation_checkpointing_kwargs or {}
                # The backward pass, which computes layers again, is outside of function modes.
                again = {"use_reentrant": False, "context_fn": self._computed_again}
                model.activation_checkpointing_enable(
                    every_n_layers=options.get("every_n_layers", 1),
                    activation_checkpointing_kwargs=again,
                )
        return model

    def _computed_again(self) -> tuple[contextlib.AbstractContextManager[None], FakeKernels]:
        return contextlib.nullcontext(), FakeKernels(gpu=self.workload.gpu, tokens={}, masked=1)

    def _simulate(self, workload: Workload) -> Plan:
        model = self._model
        trained = [x for x in model.parameters() if x.requires_grad]
        tensors = [*model.parameters(), *model.buffers()]
        gradients = sum(x.nbytes for x in trained)
        weights = sum(x.nbytes for x in tensors)
        optim = OptimizerNames(self.args.optim).value
        optimizer = state_bytes(optim, trained)
        chunk = make_chunk(workload, packed=model.padding_free)
        with self._on_device(workload), self._mode:
            batch = self._batch(workload, chunk)
            tracker = MemoryTracker(tensors)
            with tracker:
                step = Step(model, self.args, tracker).run(batch)
            model.zero_grad(set_to_none=True)
        update = gradients + step_bytes(optim, trained, gpu=workload.gpu)
        return Plan(
            parameters=_count_parameters(model),
            trained=sum(x.numel() for x in trained),
            weights=weights,
            optimizer=optimizer,
            gradients=gradients,
            step=step,
            peak=weights + optimizer + max(step.peak, update),
        )

    @contextlib.contextmanager
    def _on_device(self, workload: Workload) -> Iterator[None]:
        tokens = sum(chunk_lengths(workload))
        shape = torch.Size((workload.size, workload.longest))
        fraction = self.args.mlm_probability
        with FakeKernels(gpu=workload.gpu, tokens={shape: tokens}, masked=fraction):
            yield

    def _batch(self, workload: Workload, chunk: dict[str, Any]) -> Batch:
        fake = {
            name: self._mode.from_tensor(x) if isinstance(x, Tensor) else x
            for name, x in chunk.items()
        }
        if self.args.mlm_weight:
            fake |= {f"mlm_{n}": fake["input_ids"].clone() for n in ("input_ids", "labels")}
        if not self.args.uses_embeddings:
            del fake["input_ids"]
        text_ids = torch.zeros(workload.views, workload.batch, dtype=torch.long)
        return Batch(fake, workload.size, text_ids)


def chunk_lengths(workload: Workload) -> list[int]:
    """Return the tokens of each text of a chunk: one has the most, the others the usual length."""
    lengths = [workload.longest, *[workload.tokens] * (workload.size - 1)]
    if workload.size > 1 and workload.tokens == workload.longest > 1:
        lengths[-1] -= 1  # all of one length would need no padding around the attention
    return lengths


def make_chunk(workload: Workload, *, packed: bool) -> dict[str, Any]:
    """Make the inputs of the model for the texts of a chunk."""
    texts = [[1] * n for n in chunk_lengths(workload)]
    return build_batch(texts, padding_free=packed, pad_token_id=0, grouped=not workload.gpu)


def _count_parameters(model: SimCSEModel) -> int:
    """Count what the model stands for: quantised weights are fewer bytes than parameters."""
    quantized = [x for x in model.modules() if isinstance(x, FakeQuantizedLinear)]
    hidden = sum(x.in_features * x.out_features - x.weight.numel() for x in quantized)
    return sum(x.numel() for x in model.parameters()) + hidden


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
        name: The name of the model, as given.
        plan: The run as its options say.
        workload: What its step computes on.
        packed: Batches are packed, without padding.
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
    """Plan what `train_simcse.py` would do with the same options.

    Args:
        model_args: The options of the model, `ModelArguments`.
        data_args: The options of the data, `DataArguments`.
        args: The training options, `SimCSETrainingArguments`.
        source: What `read_source` has read of the model.
        gpu: It will be on one.
        memory: Bytes of the device.
        tokens: Mean length of a text; by default all are as long as `max_seq_length`.
        views: Texts per row, where the data is not here.

    Raises:
        InputError: Options, model or data cannot be used.
    """
    notes: list[str] = []
    longest = model_args.max_seq_length or source.max_seq_length
    if tokens is not None and not 0 < tokens <= longest:
        raise InputError(f"tokens is {tokens}; expected 1 to {longest}, the longest text.")
    workload = Workload(
        views=views
        or _count_views(
            data_args,
            notes,
            least=2 if args.uses_embeddings else 1,
            negatives=args.num_hard_negatives,
        ),
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
    available = memory - RESERVE[gpu]
    choices = [_choose("", planner, available)]
    if plan.peak > available:
        choices += [
            _choose(options, Planner(other, changed, source, workload), available)
            for options, other, changed in _changes(model_args, args)
        ]
    return replace(result, fits=plan.peak <= available, choices=choices)


def _choose(options: str, planner: Planner, available: int) -> Choice:
    chunk = planner.largest_chunk(available)
    return Choice(options, planner.plan(chunk or 1), chunk)


def _changes(
    model_args: ModelArguments, args: SimCSETrainingArguments
) -> Iterator[tuple[str, ModelArguments, SimCSETrainingArguments]]:
    """List what needs less memory, from the mildest change on, each with those before it."""
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


def _count_views(data_args: DataArguments, notes: list[str], *, least: int, negatives: int) -> int:
    """Count the texts per row: as the options say, else as the data has them if it is here.

    At least `least`: a sentence that is contrasted is encoded twice; of lists so many negatives.
    """
    if data_args.nli_triplets:
        return 3
    if data_args.columns:
        return max(least, len(data_args.columns))
    files = data_args.train_file
    if files and data_args.dataset_name is None and Path(files[0]).is_file():
        options = data_args.file_options
        rows = load_training_data(files[:1], file_options=options, streaming=True)
        names = rows.column_names or list(next(iter(rows)))
        has_lists = isinstance((rows.features or {}).get(names[-1]), List)
        return 2 + negatives * (len(names) > 2) if has_lists else max(least, len(names))
    if files and all(".txt" in Path(name).suffixes for name in files):
        return least
    notes.append("The data is not here: 3 texts a row are taken for granted; or pass --views.")
    return 3


def format_plan(run: RunPlan) -> str:
    """Format what `simcse-trainer plan` prints."""
    plan, step, work = run.plan, run.plan.step, run.workload
    fraction = 100 * plan.trained / plan.parameters
    rows = [
        ("weights", plan.weights),
        ("optimizer state", plan.optimizer),
        ("gradients", plan.gradients),
        ("activations", step.kept),
        ("loss of the batch", step.loss),
        ("peak", plan.peak),
    ]
    lines = [
        f"{run.name} on {'a GPU' if work.gpu else 'the CPU'}",
        f"  {work.batch:,} rows of {work.views} texts a step, {work.size:,} texts at a time, "
        f"{_lengths(run)}, {'without padding' if run.packed else 'padded'}",
        f"  {plan.parameters:,} parameters, {plan.trained:,} of them trained "
        f"({fraction:.2f} percent)",
        "",
        *(f"  {name:<18}{format_bytes(size):>12}" for name, size in rows if size),
        "",
        "Not all of it is there at once: the peak is of a step carried out without values. "
        f"Besides tensors, count {format_bytes(RESERVE[work.gpu])} for "
        + ("the CUDA context and the allocator." if work.gpu else "Python and its libraries."),
        *run.notes,
        *_advice(run),
    ]
    return "\n".join(lines)


def format_bytes(size: int) -> str:
    """Format a size, in MiB below one GiB."""
    return f"{size / 2**20:,.0f} MiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"


def _lengths(run: RunPlan) -> str:
    work = run.workload
    if work.tokens == work.longest:
        return f"{work.longest} tokens each"
    return f"{work.tokens} tokens on average, {work.longest} at most"


def _advice(run: RunPlan) -> list[str]:
    if run.memory is None:
        return []
    head = f"{format_bytes(run.memory)}: "
    as_it_is = run.choices[0]
    if run.fits and as_it_is.chunk == run.workload.texts:
        return [head + "fits, also with the whole batch at a time."]
    if run.fits:
        return [f"{head}fits. The largest chunk is --mini_batch_size {as_it_is.chunk}."]
    return [head + "does not fit. Add one of", *(f"  {_line(x)}" for x in run.choices)]


def _line(choice: Choice) -> str:
    peak = format_bytes(choice.plan.peak)
    if choice.chunk is None:
        return f"{choice.options or 'a smaller chunk'}: not enough, {peak} with one text at a time"
    return f"{choice.options} --mini_batch_size {choice.chunk}".strip() + f": {peak}"
