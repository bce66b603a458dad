"""What a run needs, the largest chunk for a given memory, and what to change if none fits."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.training_args import OptimizerNames

from simcse_trainer.arguments import ModelArguments, SimCSETrainingArguments
from simcse_trainer.model.batching import build_batch
from simcse_trainer.model.modeling import SimCSEModel
from simcse_trainer.planning.fake_kernels import FakeKernels
from simcse_trainer.planning.fake_model import Source, build_fake_model
from simcse_trainer.planning.fake_quantization import FakeQuantizedLinear
from simcse_trainer.planning.optimizers import state_bytes, step_bytes
from simcse_trainer.planning.step import Batch, Step, StepMemory
from simcse_trainer.planning.tracking import MemoryTracker


@dataclass(frozen=True)
class Workload:
    """What a step computes on.

    Attributes:
        views: Texts per row of the data, 2 for unsupervised SimCSE.
        batch: Rows.
        chunk: Texts that are embedded at a time; None: all of them.
        longest: Tokens of the longest text.
        tokens: Of all others.
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
        parameters: All of them.
        trained: Those with a gradient.
        weights: Of all parameters and buffers, in the types and bits they are kept in.
        optimizer: State, from the first step on.
        gradients: Of all trained parameters.
        step: What comes and goes within a step, gradients included.
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
        model_args: Of the run.
        args: Of the run.
        source: From `read_source`.
        workload: The step.
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
        """The run as it is, or with another chunk."""
        workload = replace(self.workload, chunk=chunk or self.workload.chunk)
        if workload.size not in self._plans:
            self._plans[workload.size] = self._simulate(workload)
        return self._plans[workload.size]

    @property
    def packed(self) -> bool:
        """Whether batches have no padding."""
        return self._model.padding_free

    def largest_chunk(self, memory: int) -> int | None:
        """The most texts at a time that leave the peak within `memory` bytes; None: no number."""
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
        """Where the peak would cross the memory if it grew evenly: it nearly does."""
        below, above = self.plan(low).peak, self.plan(high).peak
        share = (memory - below) / max(above - below, 1)
        return min(max(low + int(share * (high - low)), low + 1), high - 1)

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
        share = self.args.mlm_probability
        with FakeKernels(gpu=workload.gpu, tokens={shape: tokens}, masked=share):
            yield

    def _batch(self, workload: Workload, chunk: dict[str, Any]) -> Batch:
        fake = {
            name: self._mode.from_tensor(x) if isinstance(x, Tensor) else x
            for name, x in chunk.items()
        }
        if self.args.mlm_weight:
            fake |= {f"mlm_{n}": fake["input_ids"].clone() for n in ("input_ids", "labels")}
        text_ids = torch.zeros(workload.views, workload.batch, dtype=torch.long)
        return Batch(fake, workload.size, text_ids)


def chunk_lengths(workload: Workload) -> list[int]:
    """Tokens of each text of a chunk: one of the longest, the others of the usual length."""
    lengths = [workload.longest, *[workload.tokens] * (workload.size - 1)]
    if workload.size > 1 and workload.tokens == workload.longest > 1:
        lengths[-1] -= 1  # all of one length would need no padding around the attention
    return lengths


def make_chunk(workload: Workload, *, packed: bool) -> dict[str, Any]:
    """Inputs of the model for the texts of a chunk."""
    texts = [[1] * n for n in chunk_lengths(workload)]
    return build_batch(texts, padding_free=packed, pad_token_id=0, grouped=not workload.gpu)


def _count_parameters(model: SimCSEModel) -> int:
    """Of the model that it stands for: quantised weights are fewer bytes than parameters."""
    quantized = [x for x in model.modules() if isinstance(x, FakeQuantizedLinear)]
    hidden = sum(x.in_features * x.out_features - x.weight.numel() for x in quantized)
    return sum(x.numel() for x in model.parameters()) + hidden
