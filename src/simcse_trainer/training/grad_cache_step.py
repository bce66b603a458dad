"""A training step in chunks: GradCache in the Trainer, and what to do when memory runs out."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from accelerate.utils import DistributedType, send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from transformers.training_args import OptimizerNames

from simcse_trainer.errors import InputError
from simcse_trainer.model.packing import plan_chunks, split_batch
from simcse_trainer.objective.grad_cache import (
    Chunk,
    RandomState,
    embed_with_graph,
    embed_without_graph,
    loss_and_gradient,
)

logger = logging.getLogger(__name__)


class GradCacheStep:
    """Replaces `Trainer.training_step` where `mini_batch_size` is set.

    With `mini_batch_size: auto` the chunk begins as the whole batch. When memory runs out in a
    step, it is halved and the step repeated from the same random state and the same gradients:
    the run continues as if it had had the smaller chunk from that step on.

    Args:
        trainer: The `SimCSETrainer`, whose objective, precision and engine the step uses.

    Attributes:
        chunk: Sentences per forward pass; None: the whole batch.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.adaptive = trainer.args.mini_batch_size == "auto"
        self.chunk: int | None = trainer.args.chunk_size
        if trainer.args.optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO):
            raise InputError(
                f"mini_batch_size cannot be used with {trainer.args.optim.value}, which updates "
                "the weights at each backward pass. Use adamw_torch, or leave mini_batch_size out."
            )
        if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise InputError(
                "mini_batch_size cannot be used with DeepSpeed, which updates the weights at each "
                "backward pass. Use configs/accelerate/fsdp2.yaml, or leave mini_batch_size out."
            )

    def __call__(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Compute forward and backward of one batch.

        Args:
            model: The model as the engine wraps it.
            inputs: A batch, from `SimCSECollator`.

        Returns:
            The loss, detached, divided by the number of accumulated batches.
        """
        trainer = self.trainer
        every = trainer.args.torch_empty_cache_steps
        if every is not None and trainer.state.global_step % every == 0:
            clear_device_cache()
        model.train()
        set_optimizer_mode(trainer.optimizer, "train")
        inputs = trainer._prepare_inputs(inputs)
        random_state = RandomState.capture(inputs)
        while True:
            # Gradients of earlier batches of this update are kept where memory is not short.
            earlier = self._copy_gradients(model) if self.adaptive else None
            sentences = len(inputs["lengths" if "lengths" in inputs else "attention_mask"])
            size = min(self.chunk or sentences, sentences)
            try:
                if size == sentences:
                    return self._at_once(model, inputs)
                return self._in_chunks(model, inputs, size)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                self._shrink(size, error)
            # Outside of the handler, which would keep the failed step's tensors alive.
            clear_device_cache(garbage_collection=True)
            self._put_gradients_back(model, earlier or {})
            random_state.restore()

    def _at_once(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Take the plain step: one chunk needs no cache."""
        trainer = self.trainer
        with trainer.compute_loss_context_manager():
            loss: Tensor = trainer.compute_loss(model, inputs)
        loss = loss / trainer.current_gradient_accumulation_steps
        trainer.accelerator.backward(loss)
        return loss.detach()

    def _in_chunks(self, model: nn.Module, inputs: dict[str, Tensor], size: int) -> Tensor:
        trainer = self.trainer
        features, text_ids = trainer.mlm.split_inputs(inputs)
        chunks = split_batch(features, self._plan(inputs, size))
        # Before the first forward, as in `compute_loss`: processes with a short last batch take
        # the plain step, and all have to come to each collective in the same order.
        weights = trainer.mlm.count_masked(chunks) if trainer.args.mlm_weight else None

        def embed(chunk: Chunk) -> Tensor:
            # The auxiliary loss needs no look at other chunks: it waits for the second pass.
            inputs = {n: x for n, x in chunk.items() if not n.startswith("mlm_")}
            with trainer.compute_loss_context_manager():
                embeddings: Tensor = model(**inputs).embeddings
            return embeddings

        loss: Any = 0.0
        states: list[Any] = [None] * len(chunks)
        rows: Any = states
        if trainer.args.uses_embeddings:
            embeddings, states = embed_without_graph(chunks, embed)
            loss, gradient = loss_and_gradient(
                embeddings,
                lambda e: trainer.objective(e.unflatten(0, (-1, text_ids.shape[1])), text_ids),
            )
            del embeddings  # from here on only their gradient is needed
            rows = gradient.split(size)
        accumulated = trainer.current_gradient_accumulation_steps
        for i, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
            last = i == len(chunks) - 1
            # DDP sums gradients over the processes once, with the last chunk's.
            with contextlib.nullcontext() if last else trainer.accelerator.no_sync(model):
                part = self._part(model, chunk, state, rows[i], weights[i] if weights else None)
                trainer.accelerator.backward(part["total"] / accumulated)
                loss = loss + part["mlm"]
        result: Tensor = loss / accumulated
        return result

    def _plan(self, inputs: dict[str, Any], size: int) -> Any:
        """Return the chunks that the collator planned; of another size since, plan them again."""
        planned = inputs.get("chunks")
        if planned and planned[0]["sentences"][1] == size:
            return planned
        form = {"padding_free": "lengths" in inputs, "grouped": "group_shapes" in inputs}
        lengths = inputs.get("sentence_lengths")
        if lengths is None:  # another collator's
            found = inputs["lengths"] if form["padding_free"] else inputs["attention_mask"].sum(1)
            lengths = found.tolist()
        planned = plan_chunks(lengths, size, **form)
        return send_to_device(planned, self.trainer.args.device)

    def _part(
        self,
        model: nn.Module,
        chunk: Chunk,
        state: RandomState | None,
        gradient: Tensor | None,
        weight: tuple[Tensor, Tensor] | None,
    ) -> dict[str, Tensor]:
        """Return a chunk's contribution to the backward pass, and to the logged auxiliary loss."""
        mlm: Any = torch.zeros(())

        def embed(inputs: Chunk) -> Tensor:
            nonlocal mlm
            with self.trainer.compute_loss_context_manager():
                output: Any = model(**inputs)
                if weight is not None:
                    mlm = self.trainer.args.mlm_weight * output.mlm_loss * weight[0] / weight[1]
            embeddings: Tensor = output.embeddings
            return embeddings

        if state is None or gradient is None:  # nothing is contrasted
            embed(self.trainer.mlm.drop_unused(chunk))
            return {"total": mlm, "mlm": mlm.detach()}
        total = embed_with_graph(chunk, state, gradient, embed) + mlm.to(gradient)
        return {"total": total, "mlm": mlm.detach().to(gradient)}

    def _shrink(self, size: int, error: RuntimeError) -> None:
        if not self.adaptive:
            raise InputError(
                f"Out of memory with mini_batch_size {size}. Pass --mini_batch_size "
                f"{max(size // 2, 1)}, or auto."
            ) from error
        if self.trainer.args.world_size > 1:
            raise InputError(
                "Out of memory in one of several processes, which cannot repeat a step alone. "
                f"Pass --mini_batch_size {max(size // 2, 1)}."
            ) from error
        if size == 1:
            raise InputError(
                "Out of memory with a single sentence at a time. Pass a smaller --max_seq_length, "
                "or use a smaller model."
            ) from error
        self.chunk = size // 2
        logger.warning(
            "Out of memory: the step is repeated, and training continues, with %d sentences at a "
            "time instead of %d.",
            self.chunk,
            size,
        )

    def _copy_gradients(self, model: nn.Module) -> dict[str, Tensor]:
        return {
            name: parameter.grad.to("cpu", copy=True)
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }

    def _put_gradients_back(self, model: nn.Module, earlier: dict[str, Tensor]) -> None:
        for name, parameter in model.named_parameters():
            kept = earlier.get(name)
            parameter.grad = None if kept is None else kept.to(parameter.device)


def set_optimizer_mode(optimizer: Any, mode: str) -> None:
    """Let a schedule-free optimizer hold the weights it trains at, or those that it is about.

    Args:
        optimizer: Of the trainer; others have no modes.
        mode: `train` or `eval`, as its methods are called.
    """
    change = getattr(optimizer, mode, None)
    if callable(change):
        change()
