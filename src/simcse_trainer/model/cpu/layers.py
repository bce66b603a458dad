"""Layers that compute what torch's, peft's and transformers' do, faster on a CPU.

Dropout masks cost more to draw than all that they are applied to: torch draws a Bernoulli variate
an element, while here 64 random bits of the same generator serve four. Masks still follow
`torch.manual_seed`, and are drawn again for a restored state.

Linear layers in float32 go through oneDNN, as those in bfloat16 do anyway, rather than through MKL.

A linear layer with a LoRA adapter is one operation, `lora_linear`: by peft the adapter's input is
copied to float32, masked, multiplied and copied back, which takes longer than the layer. A norm by
the root mean square is one operation too, `rms_norm`, instead of eight that each read all tokens.

Shapes: T tokens, `in` features of a layer's input, `out` of its output, r the rank of an adapter.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_STEPS = 2**16  # of a random number of 16 bits


@contextmanager
def use_cpu_kernels(module: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Let the linear layers and dropouts within compute by those of this file for a while.

    Afterwards they are torch's again: what quantizes, traces or compiles a model looks at classes.

    Args:
        module: No name and no weight of it changes.
        enabled: False: change nothing. Nor is anything changed where a part of it is compiled.
    """
    found = [(layer, _faster_class(type(layer))) for layer in module.modules()] if enabled else []
    if any(map(_is_compiled, module.modules())):
        found = []
    replaced = [(layer, faster) for layer, faster in found if faster is not None]
    for layer, faster in replaced:
        layer.__class__ = faster
    try:
        yield
    finally:
        for layer, _ in replaced:
            # An engine may have made something else of it.
            layer.__class__ = _THEIRS.get(type(layer), type(layer))


def dropout_mask(shape: Sequence[int], p: float, dtype: torch.dtype) -> Tensor:
    """Draw a mask to multiply with, on the CPU (Srivastava et al. 2014, in the inverted form).

    Args:
        shape: The shape of the result.
        p: Share of zeros, kept to 1/65536.
        dtype: The type of the result.

    Returns:
        0, or what keeps the mean at 1: 1 / (1 - p).
    """
    dropped = round(p * _STEPS)
    if dropped >= _STEPS:
        return torch.zeros(*shape, dtype=dtype)
    size = math.prod(shape)
    bits = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[:size] >= dropped - _STEPS // 2
    return kept.to(dtype).mul_(_STEPS / (_STEPS - dropped)).view(*shape)


class CPUDropout(nn.Dropout):
    """`nn.Dropout` with masks by `dropout_mask`."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of x in training mode."""
        if not self.training or self.p == 0 or self.inplace or x.device.type != "cpu":
            return super().forward(x)
        return x * dropout_mask(x.shape, self.p, x.dtype)


class CPULinear(nn.Linear):
    """`nn.Linear` through oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        if not _suits_onednn(x, self.weight):
            return super().forward(x)
        # Flat, for what a Function returns must be no view: some models change it in place.
        out: Tensor = _Linear.apply(x.flatten(0, -2), self.weight, self.bias)
        return out.view(*x.shape[:-1], -1)


_FASTER: dict[type[nn.Module], type[nn.Module]] = {nn.Dropout: CPUDropout, nn.Linear: CPULinear}
_THEIRS = {ours: theirs for theirs, ours in _FASTER.items()}


def _faster_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return the class that computes what this one does, faster; None: there is none, or it is."""
    if kind in _THEIRS:
        return None
    if kind not in _FASTER:
        forward: Callable[..., Tensor] | None = None
        # By name, for importing peft would take seconds where nothing is adapted.
        if (kind.__module__, kind.__name__) == ("peft.tuners.lora.layer", "Linear"):
            forward = _forward_adapted
        elif kind.__name__.endswith("RMSNorm"):
            forward = _forward_norm
        if forward is None:
            return None
        _FASTER[kind] = type(f"CPU{kind.__name__}", (kind,), {"forward": forward})
        _THEIRS[_FASTER[kind]] = kind
    return _FASTER[kind]


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        _are_plain(x, weight)
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
        and x.dim() > 1
        and torch.backends.mkldnn.is_available()
        # What torch's own compiler calls, for want of a public name.
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _are_plain(*tensors: Tensor) -> bool:
    """Return whether all are on the CPU, and neither fake nor spread over processes."""
    return all(type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" for x in tensors)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _multiply(gradient, weight.T) if of_x else None,
            gradient.T @ x if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


# --- LoRA ----------------------------------------------------------------------------------------


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Compute a frozen linear layer and its adapter (Hu et al. 2021, eq. 3) at once.

    x W^T + bias + scaling * dropout(x) A^T B^T. The adapter's small products have the precision of
    x, as under autocast, whatever the adapter's own is; its gradient has its own.

    Args:
        x: [..., in], in the dtype of the weight.
        weight: [out, in]; it gets no gradient.
        bias: [out] or None; it gets no gradient.
        a: [r, in], in the dtype of x or in float32.
        b: [out, r], in the dtype of a.
        scaling: Factor of the adapter's output.
        dropout: Share of the adapter's input that is dropped, less than 1.

    Returns:
        [..., out].
    """
    dropped = _draw_dropped(x.numel(), dropout) if dropout else None
    out: Tensor = _LoRALinear.apply(
        x.flatten(0, -2), weight, bias, a, b, scaling / (1 - dropout), dropped
    )
    return out.view(*x.shape[:-1], -1)


def _draw_dropped(size: int, p: float) -> Tensor:
    """Draw which of `size` elements are dropped, each with probability p and independently.

    As many throws as a Poisson variate of the right mean says, each at an element by chance: then
    the hits of each element are Poisson variates, independent of each other (Kingman 1993, Poisson
    Processes, section 2.4), of which 0 has the probability 1 - p. For a small p far fewer random
    numbers are drawn than there are elements.

    Returns:
        Indices; some come twice.
    """
    throws = int(torch.poisson(torch.tensor(-size * math.log1p(-p), dtype=torch.float64)))
    return torch.randint(size, (throws,))


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropped: Tensor | None,
    ) -> Tensor:
        down, up = a.to(x.dtype), b.to(x.dtype)
        inner = (_drop_elements(x, dropped) @ down.T).mul_(scaling)
        # The input is kept as it is, for it is the input of other layers too.
        ctx.save_for_backward(x, weight, down, up, inner, dropped)
        ctx.scaling, ctx.dtype = scaling, a.dtype
        low = inner @ up.T
        return _add_product(low if bias is None else low.add_(bias), x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, inner, dropped = ctx.saved_tensors
        of_inner = (gradient @ up).mul_(ctx.scaling)
        of_x = None
        if ctx.needs_input_grad[0]:
            low = _drop_elements(of_inner @ down, dropped, in_place=True)
            of_x = _add_product(low, gradient, weight.T)
        of_a = of_inner.T @ _drop_elements(x, dropped)
        of_b = gradient.T @ inner
        return of_x, None, None, of_a.to(ctx.dtype), of_b.to(ctx.dtype), None, None


def _add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return x + a b^T, perhaps in the memory of x.

    The adapter's part is what is added to, so that the larger part is rounded only once.
    """
    if _suits_onednn(a, b):
        return _multiply(a, b).add_(x)
    return x.addmm_(a, b.T)


def _drop_elements(x: Tensor, dropped: Tensor | None, *, in_place: bool = False) -> Tensor:
    if dropped is None:
        return x
    kept = x if in_place else x.clone(memory_format=torch.contiguous_format)
    kept.view(-1).index_fill_(0, dropped, 0)
    return kept


def _forward_adapted(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute as peft's `Linear`, the layer of an adapter; the usual case at once."""
    found = None if args or kwargs else _plain_adapter(self, x)
    if found is None:
        theirs: Tensor = _THEIRS[type(self)].forward(self, x, *args, **kwargs)
        return theirs
    return lora_linear(x, *found[0], **found[1])


def _plain_adapter(layer: Any, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return what `lora_linear` takes; None where the layer computes something else than that."""
    base, names = layer.base_layer, layer.active_adapters
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] not in layer.lora_A:
        return None
    (name,) = names
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    tensors = [x, base.weight, a.weight, b.weight]
    suits = (
        type(base) in (nn.Linear, CPULinear)
        and name not in getattr(layer, "lora_variant", {})
        and isinstance(dropout, nn.Dropout | nn.Identity)
        and a.bias is None
        and b.bias is None
        and _are_plain(*tensors)
        and x.dtype == base.weight.dtype
        and {x.dtype, torch.float32} >= {a.weight.dtype, b.weight.dtype}
        and a.weight.dtype == b.weight.dtype
        and not any(p.requires_grad for p in base.parameters())
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
        and x.dim() > 1
        # An engine's, which expects to be called.
        and not any(m._forward_hooks or m._forward_pre_hooks for m in (base, a, b, dropout))
    )
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    if not suits or p >= 1:
        return None
    given = (base.weight, base.bias, a.weight, b.weight)
    return given, {"scaling": layer.scaling[name], "dropout": p}


# --- Norms ---------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    """Divide each row by the root of its mean square (Zhang and Sennrich 2019, eq. 4).

    Args:
        x: [..., in]; computed in float32.
        weight: [in], a factor of each feature.
        eps: Added to the mean square.
        offset: Added to the weight, as Gemma's norms do with 1.

    Returns:
        [..., in], in the dtype of x.
    """
    out: Tensor = _RMSNorm.apply(x, weight, eps, offset)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        scale = weight.float() + offset
        ctx.save_for_backward(x, inverse, scale)
        ctx.dtype = weight.dtype
        # Products of two dtypes would not be vectorised.
        return x.float().mul(inverse).mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, scale = ctx.saved_tensors
        normed, outer = x.float() * inverse, gradient.float()
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (outer * normed).flatten(0, -2).sum(0).to(ctx.dtype)
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None, None
        inner = outer * scale
        along = torch.linalg.vecdot(inner, normed).div_(x.shape[-1])
        of_x = inner.addcmul_(normed, along[..., None], value=-1).mul_(inverse)
        return of_x.to(x.dtype), of_weight, None, None


def _forward_norm(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute as a family's norm does, at once where it has been found to be the usual one."""
    theirs: Any = _THEIRS[type(self)]
    weight: Any = getattr(self, "weight", None)
    eps: Any = getattr(self, "variance_epsilon", getattr(self, "eps", None))
    suits = (
        not (args or kwargs)
        and isinstance(weight, Tensor)
        and isinstance(eps, float)
        and _are_plain(x, weight)
        and {x.dtype, weight.dtype} <= {torch.float32, torch.bfloat16}
        and x.numel() > 0
    )
    offset = _find_offset(theirs, x.shape[-1], eps) if suits else None
    if offset is None:
        out: Tensor = theirs.forward(self, x, *args, **kwargs)
        return out
    return rms_norm(x, weight, eps=eps, offset=offset)


@functools.cache
def _find_offset(kind: Any, size: int, eps: float) -> float | None:
    """Return the offset by which `rms_norm` computes what this class does; None: by none.

    Found by trying, as names promise nothing.
    """
    if len(inspect.signature(kind.forward).parameters) != 2:
        return None
    with torch.random.fork_rng([]):
        try:
            layer: Any = kind(size, eps=eps)
        except TypeError:  # made in another way
            return None
        x = torch.randn(3, size)
        nn.init.normal_(layer.weight)
        with torch.no_grad():
            expected = layer(x)
            for offset in (0.0, 1.0):
                if torch.allclose(expected, rms_norm(x, layer.weight, eps=eps, offset=offset)):
                    return offset
    return None
