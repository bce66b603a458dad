"""One training step, with the memory of each of its stages.

It is the step of `SimCSETrainer`, on real tensors or fake ones, with as few chunks as there are
different ones: all but the first of a batch meet gradients that are there already.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simcse_trainer.arguments import SimCSETrainingArguments
from simcse_trainer.model.modeling import SimCSEModel
from simcse_trainer.objective import ContrastiveObjective
from simcse_trainer.objective.grad_cache import (
    embed_with_graph,
    embed_without_graph,
    loss_and_gradient,
)
from simcse_trainer.planning.tracking import MemoryTracker


@dataclass
class StepMemory:
    """Bytes beside weights and optimizer state, of everything that lives at the same time.

    Attributes:
        first_pass: Peak of the pass without graph (GradCache), 0 where there is none.
        kept: What the forward pass of a chunk leaves for the backward pass, and its output.
        loss: Peak of the loss of the whole batch and of its gradient; 0 in a step at once, which
            has it in its `peak`.
        peak: The most at any time.
    """

    first_pass: int = 0
    kept: int = 0
    loss: int = 0
    peak: int = 0


@dataclass(frozen=True)
class Batch:
    """What a step is carried out on.

    Attributes:
        chunk: Inputs of the model for as many sentences as are embedded at a time.
        size: Sentences of `chunk`.
        text_ids: [V, B], of all sentences.
    """

    chunk: dict[str, Tensor]
    size: int
    text_ids: Tensor


class Step:
    """A step of a model in training mode.

    Args:
        model: Real or fake.
        args: Of the run.
        tracker: Entered, and told of the model's tensors.
    """

    def __init__(self, model: SimCSEModel, args: SimCSETrainingArguments, tracker: MemoryTracker):
        self.model, self.args, self.tracker = model, args, tracker
        self.objective = ContrastiveObjective(
            temperature=args.temperature,
            hard_negative_weight=args.hard_negative_weight,
            mask_duplicate_negatives=args.mask_duplicate_negatives,
            gather_across_devices=False,
        )

    def run(self, batch: Batch) -> StepMemory:
        """Forward and backward, twice where gradients are accumulated."""
        self.model.train()
        at_once = batch.size == batch.text_ids.numel()
        memory = StepMemory()
        for _ in range(min(self.args.gradient_accumulation_steps, 2)):
            if at_once:
                self._at_once(batch, memory)
            else:
                self._in_chunks(batch, memory)
        return memory

    def _at_once(self, batch: Batch, memory: StepMemory) -> None:
        self.tracker.restart()
        with self._autocast():
            loss = self._forward(batch, batch.chunk)
        memory.kept = self.tracker.live - self._gradients()
        loss.backward()
        memory.peak = max(memory.peak, self.tracker.peak)

    def _forward(self, batch: Batch, inputs: dict[str, Tensor]) -> Tensor:
        output: Any = self.model(**inputs)
        embeddings = output.embeddings.float()
        loss = self.objective(embeddings.unflatten(0, batch.text_ids.shape), batch.text_ids)
        if output.mlm_loss is not None:
            loss = loss + self.args.mlm_weight * output.mlm_loss
        return loss

    def _in_chunks(self, batch: Batch, memory: StepMemory) -> None:
        mlm: Tensor | None = None

        def embed(inputs: dict[str, Tensor]) -> Tensor:
            nonlocal mlm
            with self._autocast():
                output: Any = self.model(**inputs)
                mlm = output.mlm_loss
            embeddings: Tensor = output.embeddings.float()
            return embeddings

        self.tracker.restart()
        without_mlm = {n: x for n, x in batch.chunk.items() if not n.startswith("mlm_")}
        first, states = embed_without_graph([without_mlm], embed)
        rest = first.new_empty(batch.text_ids.numel() - batch.size, first.shape[1])
        embeddings = torch.cat([first, rest])
        del first, rest
        memory.first_pass = self._stage(memory)
        _, gradient = loss_and_gradient(
            embeddings,
            lambda e: self.objective(e.unflatten(0, batch.text_ids.shape), batch.text_ids),
        )
        del embeddings
        memory.loss = self._stage(memory)
        rows = gradient[: batch.size]
        for parameter in self.model.parameters():  # as an earlier chunk leaves it
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        total = embed_with_graph(batch.chunk, states[0], rows, embed)
        if mlm is not None:
            total = total + self.args.mlm_weight * mlm
        memory.kept = self.tracker.live - self._gradients()
        total.backward()
        self._stage(memory)

    def _stage(self, memory: StepMemory) -> int:
        """The peak of the stage that ends here."""
        peak = self.tracker.peak
        memory.peak = max(memory.peak, peak)
        self.tracker.restart()
        return peak

    def _gradients(self) -> int:
        return sum(x.grad.nbytes for x in self.model.parameters() if x.grad is not None)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = torch.float16 if self.args.fp16 else torch.bfloat16
        return torch.autocast("cpu", dtype=dtype, enabled=self.args.bf16 or self.args.fp16)
