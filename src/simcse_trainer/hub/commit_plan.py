"""Which of a branch's files a push may replace or delete; needs no torch.

What the manifest of our last commit lists, unchanged since, is ours. A text that somebody else has
changed is kept. A file of the model that somebody else has changed, or one that would change how
the model is loaded, ends the push: committing around it would mix two models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from simcse_trainer.files import DOCUMENTS, MANIFEST, is_read_by_loaders
from simcse_trainer.hub.errors import HubFailure
from simcse_trainer.model.io.manifest import FileRecord, Manifest

_UNTOUCHED = (".gitattributes", MANIFEST)


@dataclass(frozen=True)
class Plan:
    """What a commit changes.

    Attributes:
        add: Names of files that are new or other than those on the branch.
        delete: Names that an earlier push of ours has written and this one lacks.
        kept: Texts that somebody else has written, which this push would have replaced.
        foreign: What else somebody else has added or deleted since our last commit.
        records: What the manifest lists afterwards.
    """

    add: list[str]
    delete: list[str]
    kept: list[str]
    foreign: list[str]
    records: dict[str, FileRecord]


def plan_commit(
    local: Mapping[str, FileRecord],
    remote: Collection[str],
    is_there: Callable[[str, FileRecord], bool],
    *,
    known: Manifest | None,
    by_old_version: bool = False,
    is_state: bool = False,
    overwrite: bool = False,
) -> Plan:
    """Decide what a push does to a branch.

    Args:
        local: Name -> the file that is to be there.
        remote: Names of the branch's files.
        is_there: Whether the branch's file of a name has these contents.
        known: The manifest that our last commit left there; None if there is none.
        by_old_version: Version 0.1.0, which wrote no manifest, has pushed there: what has the same
            name is ours, and nothing is deleted.
        is_state: The branch is for resuming, not for loading: other files do no harm.
        overwrite: The user said that other people's changes may be replaced.

    Raises:
        HubFailure: Other people's files are in the way.
    """
    recorded = known.files if known is not None else {}

    def is_ours(name: str) -> bool:
        record = recorded.get(name)
        return by_old_version or (record is not None and is_there(name, record))

    changed = [n for n, one in local.items() if n in remote and not is_there(n, one)]
    add = [n for n in local if n not in remote or (n in changed and (overwrite or is_ours(n)))]
    gone = [n for n in recorded if n in remote and n not in local and n not in _UNTOUCHED]
    delete = [n for n in gone if is_ours(n) or (overwrite and n not in DOCUMENTS)]
    theirs = {*changed, *gone} - {*add} - {*delete}
    kept = sorted(name for name in theirs if name in DOCUMENTS)
    conflicts = sorted(theirs - {*kept})
    others = [n for n in remote if n not in local and n not in recorded and n not in _UNTOUCHED]
    if not is_state:
        _refuse_strangers([name for name in others if is_read_by_loaders(name)])
    if conflicts:
        raise HubFailure(
            f"somebody else has changed {', '.join(conflicts[:5])} there since the last push of "
            "this model, so nothing is committed to that branch: it would hold parts of two models",
            refused=True,
            options="--overwrite",
        )
    records = {name: record for name, record in local.items() if name not in kept}
    records |= {name: recorded[name] for name in kept if name in recorded}
    missing = [f"{name} (deleted)" for name in recorded if name not in remote]
    foreign = sorted([*others, *missing]) if known is not None and not is_state else []
    return Plan(add, delete, kept, foreign, records)


def _refuse_strangers(names: list[str]) -> None:
    if names:
        raise HubFailure(
            f"{', '.join(names[:5])} there is of another model and would be loaded with this one. "
            "Delete it on the Hub, or push to another branch",
            refused=True,
            options="--revision NAME",
        )
