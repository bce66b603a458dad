"""One training step, with the memory of each of its stages.

It is the step of `SimCSETrainer`, on real tensors or fake ones, with as few chunks as there are
different ones: all but the first of a batch meet gradients that are there already.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simcse_trainer.arguments import SimCSETrainingArguments
from simcse_trainer.model.modeling import SimCSEModel
from simcse_trainer.objective.grad_cache import (
    embed_with_graph,
    embed_without_graph,
    loss_and_gradient,
)


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
        size: Number of sentences in `chunk`.
        text_ids: [V, B], of all sentences.
    """

    chunk: dict[str, Tensor]
    size: int
    text_ids: Tensor


class Step:
    """A step of a model in training mode.

    Args:
        model: The model, of real or of fake tensors.
        args: The training options, `SimCSETrainingArguments`.
        tracker: Entered, and given the model's tensors.
    """

    def __init__(self, model: SimCSEModel, args: SimCSETrainingArguments, tracker: MemoryTracker):
        self.model, self.args, self.tracker = model, args, tracker
        self.objective = replace(args.build_objective(), gather_across_devices=False)

    def run(self, batch: Batch) -> StepMemory:
        """Run forward and backward, twice where gradients are accumulated."""
        self.model.train()
        at_once = batch.size == batch.text_ids.numel() or not self.args.uses_embeddings
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

    def _forward(self, batch: Batch, inputs: dict[str, Tensor]) -> Any:
        output: Any = self.model(**inputs)
        loss: Any = 0.0
        if output.embeddings is not None:
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
        """Return the peak of the stage that ends here."""
        peak = self.tracker.peak
        memory.peak = max(memory.peak, peak)
        self.tracker.restart()
        return peak

    def _gradients(self) -> int:
        return sum(x.grad.nbytes for x in self.model.parameters() if x.grad is not None)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = torch.float16 if self.args.fp16 else torch.bfloat16
        return torch.autocast("cpu", dtype=dtype, enabled=self.args.bf16 or self.args.fp16)


class MemoryTracker(TorchDispatchMode):
    """While it is entered: bytes of all storages that operations have made and that still live.

    It counts what autograd keeps and what backward makes. What a kernel needs inside, and what the
    allocator wastes, it does not see.

    Args:
        known: Tensors that were there before, which are not counted.

    Attributes:
        live: Bytes that are in use now.
        peak: The most there were since `restart`.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak = self.live

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Carry the operation out, and count what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:  # a view, or changed in place
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata).atexit = False

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


# Elements of state per trained parameter and bytes of each; None: as wide as the parameter.
_STATES: dict[str, tuple[int, int | None]] = {
    "adamw_torch": (2, None),
    "adamw_torch_fused": (2, None),
    "adamw_bnb_8bit": (2, 1),
    "adamw_8bit": (2, 1),
    "paged_adamw_32bit": (2, 4),
    "paged_adamw_8bit": (2, 1),
    "adamw_torch_8bit": (2, 1),
    "ademamix": (3, 4),
    "ademamix_8bit": (3, 1),
    "paged_ademamix_32bit": (3, 4),
    "paged_ademamix_8bit": (3, 1),
    "lion_32bit": (1, 4),
    "lion_8bit": (1, 1),
    "paged_lion_32bit": (1, 4),
    "paged_lion_8bit": (1, 1),
    "adagrad": (1, None),
    "rmsprop": (1, None),
    "rmsprop_bnb": (1, 4),
    "rmsprop_bnb_32bit": (1, 4),
    "rmsprop_bnb_8bit": (1, 1),
    "sgd": (0, None),
}
# bitsandbytes leaves smaller parameters in 32 bits, and has a float32 constant for each block.
_SMALL, _BLOCK = 4096, 256


def is_known(optim: str) -> bool:
    """Return whether the size of an optimizer's state is known; else it is taken to be AdamW's."""
    return optim in _STATES or optim == "adafactor"


def state_bytes(optim: str, trained: Sequence[Tensor]) -> int:
    """Count the bytes that an optimizer keeps from step to step.

    Args:
        optim: Name of the optimizer, `TrainingArguments.optim`.
        trained: The parameters that are trained.
    """
    return sum(_state_bytes(optim, parameter) for parameter in trained)


def _state_bytes(optim: str, parameter: Tensor) -> int:
    size = parameter.numel()
    if optim == "adafactor":  # a row and a column instead of the matrix (Shazeer and Stern 2018)
        return 4 * (sum(parameter.shape) if parameter.ndim > 1 else size)
    count, width = _STATES.get(optim, (2, None))
    if width == 1:
        return count * (4 * size if size < _SMALL else size + 4 * -(-size // _BLOCK))
    return count * size * (width or parameter.element_size())


def step_bytes(optim: str, trained: Sequence[Tensor], *, gpu: bool) -> int:
    """Count the bytes that the update needs beside gradients and state, while it lasts."""
    if optim in ("adamw_torch_fused", "sgd") or not trained:
        return 0
    sizes = [parameter.nbytes for parameter in trained]
    if optim == "adamw_torch" and gpu:  # all parameters at once
        return sum(sizes)
    return 2 * max(sizes)
