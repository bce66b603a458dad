"""A plan as a short table."""

from __future__ import annotations

from simcse_trainer.planning.run import RESERVE, Choice, RunPlan


def format_plan(run: RunPlan) -> str:
    """What `simcse-trainer plan` prints."""
    plan, step, work = run.plan, run.plan.step, run.workload
    share = 100 * plan.trained / plan.parameters
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
        f"  {plan.parameters:,} parameters, {plan.trained:,} of them trained ({share:.2f} percent)",
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
    """In MiB below one GiB."""
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
