"""GradCache: the gradient of a large batch in the memory of a small one (Gao et al. 2021b).

The loss needs all embeddings at once, but their graphs need not exist at once:

1. embed every chunk without a graph;
2. compute the loss, and its gradient with respect to the embeddings;
3. embed every chunk again, with a graph, and send its share of that gradient back.

In unsupervised SimCSE dropout is the augmentation, so the third step draws the masks of the first:
each chunk's random state is kept and put back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from simcse_trainer.objective.logits import upcast

Chunk = dict[str, Tensor]


@dataclass(frozen=True)
class RandomState:
    """The random generators of the CPU and of the devices that hold a chunk."""

    cpu: Tensor
    devices: Any
    states: list[Tensor]

    @classmethod
    def capture(cls, chunk: Chunk) -> RandomState:
        """Keep the state as it is now."""
        return cls(torch.get_rng_state(), *get_device_states(*chunk.values()))

    def restore(self) -> None:
        """Put the state back."""
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states)


def embed_without_graph(
    chunks: Sequence[Chunk], embed: Callable[[Chunk], Tensor]
) -> tuple[Tensor, list[RandomState]]:
    """Take step 1.

    Args:
        chunks: Inputs of the model.
        embed: A chunk to its embeddings [n, D].

    Returns:
        The embeddings [N, D], at least float32, and the random state before each chunk.
    """
    states, embeddings = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(RandomState.capture(chunk))
            embeddings.append(upcast(embed(chunk)))
    return torch.cat(embeddings), states


def loss_and_gradient(
    embeddings: Tensor, get_loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Take step 2.

    Args:
        embeddings: [N, D], an embedding a row.
        get_loss: The embeddings to a scalar.

    Returns:
        The loss, and its gradient [N, D].
    """
    leaf = embeddings.detach().requires_grad_()
    loss = get_loss(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def embed_with_graph(
    chunk: Chunk, state: RandomState, gradient: Tensor, embed: Callable[[Chunk], Tensor]
) -> Tensor:
    """Take step 3 for one chunk.

    Args:
        chunk: Inputs of the model.
        state: The random state that step 1 drew this chunk's masks from.
        gradient: [n, D], this chunk's rows of what step 2 gave.
        embed: A chunk to its embeddings [n, D], now with a graph.

    Returns:
        A scalar whose gradient with respect to the parameters is this chunk's share.
    """
    state.restore()
    return (upcast(embed(chunk)) * gradient).sum()
