"""Tasks of MTEB, by the package mteb: it loads their data, and computes their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from simcse_trainer.errors import InputError
from simcse_trainer.evaluation.sts import Encoder
from simcse_trainer.model.progress import is_watched

# What a result's name starts with; the rest is the task's name in mteb.
PREFIX = "mteb/"
# Texts that mteb hands over at a time; `encode` has batches of its own.
_BATCH_SIZE = 128


def load_mteb_tasks(names: Sequence[str]) -> dict[str, Any]:
    """Load tasks with their data, which mteb takes from the Hub or its cache.

    Args:
        names: As mteb calls tasks, such as STS12 or SciFact, or benchmarks, such as
            MTEB(eng, v2), which stand for their tasks.

    Returns:
        Name of a task -> task.

    Raises:
        InputError: mteb is not installed, does not know a task, or cannot load its data.
    """
    if find_spec("mteb") is None:
        raise InputError("--mteb needs mteb, which is not installed. Run: pip install 'mteb>=2'")
    import mteb

    if not hasattr(mteb, "evaluate"):
        raise InputError("--mteb needs mteb 2, an older one is here. Run: pip install -U 'mteb>=2'")
    loaded: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        for task in _find_tasks(name):
            found = task.metadata
            if set(found.modalities) != {"text"}:
                kinds = ", ".join(found.modalities)
                raise InputError(
                    f"--mteb: {found.name} is a task of {kinds}; expected one of text alone."
                )
            loaded[found.name] = task
    for name, task in loaded.items():
        for part in getattr(task, "tasks", [task]):  # an aggregate has no data of its own
            _load_data(name, part)
    return loaded


def _find_tasks(name: str) -> list[Any]:
    """Return the task of that name, or the tasks of a benchmark, in the languages it has them."""
    import mteb

    try:
        return [mteb.get_task(name)]
    except KeyError as error:
        unknown = error
    try:
        return list(mteb.get_benchmark(name).tasks)
    except KeyError as error:
        reason = (error if "(" in name else unknown).args[0].removeprefix("KeyError: ")
        raise InputError(
            f"--mteb: mteb knows no task or benchmark of this name: {reason} See `mteb "
            'available-tasks` and `mteb available-benchmarks`; quote names with brackets: "MTEB'
            '(eng, v2)".'
        ) from error


def _load_data(name: str, task: Any) -> None:
    try:
        task.load_data()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"The data of the MTEB task {name} could not be loaded from the Hub "
            f"({task.metadata.dataset['path']}): {reason}. Check the network, or leave {name} out "
            "of --mteb."
        ) from error


def evaluate_mteb(encode: Encoder, tasks: Mapping[str, Any]) -> dict[str, float]:
    """Compute the main score of each task, times 100, as mteb computes it.

    Args:
        encode: Texts to embeddings [n, D]; of queries and documents alike, without a prompt.
        tasks: Name -> task, from `load_mteb_tasks`.

    Returns:
        `mteb/<name>` -> mean of the main score over the task's splits and subsets.
    """
    import mteb

    wrapped = _wrap(encode)
    options: Any = {"batch_size": _BATCH_SIZE, "show_progress_bar": is_watched()}
    results = {}
    for name, task in tasks.items():
        found = mteb.evaluate(
            wrapped,
            task,
            cache=None,
            co2_tracker=False,
            encode_kwargs=options,
            show_progress_bar=is_watched(),
        )
        results[PREFIX + name] = 100 * float(found[0].get_score())
    return results


def describe_tasks(tasks: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a score depends on: name -> main score, splits and revision of the data.

    Args:
        tasks: Name -> task, from `load_mteb_tasks`.
    """
    return {
        name: {
            "main_score": task.metadata.main_score,
            "splits": list(task.eval_splits),
            "revision": task.metadata.dataset.get("revision"),
        }
        for name, task in tasks.items()
    }


def _wrap(encode: Encoder) -> Any:
    """Wrap as mteb's encoders are; a class of its base class exists only where mteb is."""
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ScoringFunction

    class Wrapped(AbsEncoder):
        mteb_model_meta = ModelMeta.create_empty({"similarity_fn_name": ScoringFunction.COSINE})

        def encode(self, inputs: Any, **_: Any) -> Any:
            return encode([text for batch in inputs for text in batch["text"]]).float().numpy()

    return Wrapped()
