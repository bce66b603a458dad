"""One try at what a run wants of the Hub: check, push, download. Each can be repeated.

Whatever the outcome of an earlier try was (a commit whose answer got lost may have been made), the
next one starts by looking at what is there and does only what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from simcse_trainer.errors import InputError
from simcse_trainer.files import CARD, MANIFEST, OLD_CHECKSUMS, STATE, TRAINING_ARGS, is_inside
from simcse_trainer.hub.commit_plan import Plan, plan_commit
from simcse_trainer.hub.errors import HubFailure
from simcse_trainer.hub.published_files import is_deepspeed, is_resumed
from simcse_trainer.hub.stage import FolderPush
from simcse_trainer.model.io.manifest import FileRecord, Manifest, parse_manifest

# No list of files is as long; what is longer is not read.
_LONGEST_LIST = 10 * 2**20

# The client sends files of a commit together; from this size on each has a call of its own, so
# that there is progress to show and less to repeat.
_LARGE = 100 * 2**20

Report = Callable[[int, int], None]


@dataclass
class HubRepository:
    """A model repository on the Hub, seen by one user.

    Attributes:
        name: `name` or `namespace/name`; without one, the user's own is meant.
        token: None for the one that is stored on this machine.
        private: Of a repository that has still to be made; None leaves it to the Hub.
        notes: What the user should know of the last push: other people's changes.
    """

    name: str
    token: str | None = None
    private: bool | None = None
    _full_name: str = ""
    notes: list[str] = field(default_factory=list)
    _digests: dict[tuple[Any, ...], tuple[str, str]] = field(default_factory=dict)
    _manifests: dict[str, str] = field(default_factory=dict)
    _state: str | None = None

    def __post_init__(self) -> None:
        """Build the client: the token is sent with every request of it."""
        self.api = HfApi(token=self.token)

    @property
    def full_name(self) -> str:
        """`namespace/name`."""
        if not self._full_name:
            bare = "/" not in self.name
            self._full_name = f"{self.api.whoami()['name']}/{self.name}" if bare else self.name
        return self._full_name

    @property
    def known_name(self) -> str:
        """The same as far as it is known, without asking."""
        return self._full_name or self.name

    def check(self) -> None:
        """Check token, permission and repository (made if it is not there), before they matter."""
        try:
            user = self.api.whoami()
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code == 401:
                raise HubFailure(
                    "the Hub does not know the token", status=401, refused=True
                ) from None
            raise
        if "/" not in self.name:
            self._full_name = f"{user['name']}/{self.name}"
        self.create()
        # For a repository that exists, being allowed to create it is not being allowed to write.
        self.api.auth_check(self.full_name, write=True)

    def check_card(self, content: str) -> None:
        """Check that the Hub takes a card's metadata."""
        try:
            ModelCard(content).validate(repo_type="model")
        except json.JSONDecodeError:
            raise  # not the Hub's answer
        except ValueError as error:
            text = f"the Hub refuses the model card's metadata: {_reasons(str(error))}"
            raise HubFailure(text, status=400, refused=True) from error

    def create(self) -> None:
        """Make the repository, unless it is there."""
        self.api.create_repo(self.full_name, private=self.private, exist_ok=True)

    def push(self, folder: Path, pushes: Iterable[FolderPush], report: Report) -> int:
        """Bring folders to their branches.

        Args:
            folder: The folder that holds the files.
            pushes: The commits to make, in this order.
            report: Told bytes done and bytes in all.

        Returns:
            The number of commits that were needed.
        """
        self.notes, refusal = [], None
        pushes = list(pushes)
        total = sum(path.stat().st_size for one in pushes for path in _files(folder, one).values())
        done = commits = 0
        self._state = None
        for one in pushes:
            size = sum(path.stat().st_size for path in _files(folder, one).values())
            try:
                report_part = partial(_report_from, report, done, total)
                commits += self._push_folder(folder, one, report_part)
            except HubFailure as failure:
                if not failure.is_final:
                    raise
                refusal = refusal or failure  # of this branch; the others are no part of it
            done += size
            report(done, total)
        if refusal is not None:
            raise refusal
        return commits

    def download(self, revision: str, folder: Path, report: Report) -> str:
        """Download a training state, each file checked against the checksums that came with it.

        Args:
            revision: Branch, commit, or tag; that of a model stands for its training state.
            folder: The folder that is written into.
            report: Told files done and files in all.

        Returns:
            The commit it is of.

        Raises:
            HubFailure: There is none, or one that may not be fetched.
        """
        commit, remote = self._find_state(revision)
        name = MANIFEST if MANIFEST in remote else OLD_CHECKSUMS
        text = self._read_list(name, commit, remote)
        if name == MANIFEST:
            records = _parse(text, f"{MANIFEST} of {self.full_name}").files
            (folder / MANIFEST).write_text(text, encoding="utf-8")
            digests = {name: record.sha256 for name, record in records.items()}
        else:
            digests = _parse_sha256(text)
        for name in digests:
            self._check_name(name, remote)
        for done, (name, sha256) in enumerate(sorted(digests.items())):
            report(done, len(digests))
            if sha256 is None:
                raise HubFailure(f"its {MANIFEST} has no checksum of {name}", refused=True)
            self._fetch(name, commit, folder, partial(self._is_digest, sha256))
        return commit

    def _find_state(self, revision: str) -> tuple[str, dict[str, RepoFile]]:
        commit: str | None = revision
        for _ in range(2):
            commit = str(self.api.repo_info(self.full_name, revision=commit).sha)
            remote = self._tree(commit)
            if STATE in remote and {MANIFEST, OLD_CHECKSUMS} & {*remote}:
                return commit, remote
            # Of a model, whose commit says where its training state is.
            if MANIFEST not in remote:
                break
            text = self._read_list(MANIFEST, commit, remote)
            commit = _parse(text, f"{MANIFEST} of {self.full_name}").training_state
            if commit is None:
                break
        raise HubFailure(
            f"'{revision}' of {self.full_name} holds no training state", status=404, refused=True
        )

    def _check_name(self, name: str, remote: Mapping[str, RepoFile]) -> None:
        """Refuse what no state of ours holds, and what would be written or executed elsewhere."""
        if not is_inside(name) or name not in remote:
            text = f"the training state is incomplete: {name} is listed in it and not there"
        elif is_deepspeed(name):
            text = (
                f"it is a state of DeepSpeed ({name}), which executes what it reads. Resume from "
                "your own copy of the checkpoint, or with DDP or FSDP from the start"
            )
        elif not is_resumed(name):
            text = f"the training state holds {name}, which is no file of a state"
        else:
            return
        raise HubFailure(text, refused=True)

    def _fetch(
        self, name: str, commit: str, folder: Path, is_right: Callable[[Path], bool]
    ) -> None:
        """Download a file and check it: the client accepts altered bytes of the right length."""
        for again in (False, True):
            path = self.api.hf_hub_download(
                self.full_name, name, revision=commit, local_dir=folder, force_download=again
            )
            if is_right(Path(path)):
                return
        text = f"{name} differs from its checksum: the training state was altered"
        raise HubFailure(text, refused=True)

    def _read_list(self, name: str, commit: str, remote: Mapping[str, RepoFile]) -> str:
        """Return a list of files as the Hub has it; its contents are known by their checksum."""
        entry = remote[name]
        if entry.size > _LONGEST_LIST:
            raise HubFailure(f"{name} of {self.full_name} is too long", refused=True)
        if entry.blob_id not in self._manifests:
            with TemporaryDirectory() as tmp:
                is_right = partial(self._is_entry, entry)
                self._fetch(name, commit, Path(tmp), is_right)
                data = (Path(tmp) / name).read_bytes()
            self._manifests[entry.blob_id] = data.decode("utf-8", errors="replace")
        return self._manifests[entry.blob_id]

    def _push_folder(self, folder: Path, push: FolderPush, report: Callable[[int], None]) -> int:
        head = self._head(push.branch)
        remote, local = self._tree(head), _files(folder, push)
        known = self._read_manifest(push, head, remote)
        records = {name: self._record(path) for name, path in local.items()}
        plan = plan_commit(
            records,
            remote,
            lambda name, record: _same(remote[name], record),
            known=known,
            by_old_version=known is None and self._is_of_old_version(push, head, remote),
            is_state=push.is_state,
            overwrite=push.overwrite,
        )
        self._note(push, plan, known)
        self._refuse_token(local[name] for name in plan.add)
        state = None if push.is_state else self._state
        manifest = Manifest(plan.records, push.run, push.step, training_state=state)
        if known is not None and not push.run and known.files == plan.records:
            manifest = known  # the folder does not say of which run the same files are
        text = manifest.as_text()
        entry, blob = remote.get(MANIFEST), _git_name(text.encode())
        commit = head
        changed = bool(plan.add or plan.delete or entry is None or entry.blob_id != blob)
        if changed:
            commit = self._commit(push, head, plan, local, text, report)
            self._manifests[blob] = text
        if push.is_state:
            self._state = commit
        for tag in push.tags:
            self._tag(tag, commit, push, local)
        return int(changed)

    def _commit(
        self,
        push: FolderPush,
        head: str,
        plan: Plan,
        local: Mapping[str, Path],
        manifest: str,
        report: Callable[[int], None],
    ) -> str:
        adds = [CommitOperationAdd(name, str(local[name])) for name in plan.add]
        done = 0
        for add in adds:
            if add.upload_info.size >= _LARGE:
                self.api.preupload_lfs_files(
                    self.full_name, [add], revision=push.branch, free_memory=False
                )
                done += add.upload_info.size
                report(done)
        adds.append(CommitOperationAdd(MANIFEST, manifest.encode()))
        info = self.api.create_commit(
            self.full_name,
            [*adds, *map(CommitOperationDelete, plan.delete)],
            commit_message=push.message,
            revision=push.branch,
            parent_commit=head,
        )
        return str(info.oid)

    def _read_manifest(
        self, push: FolderPush, commit: str, remote: Mapping[str, RepoFile]
    ) -> Manifest | None:
        if MANIFEST not in remote:
            return None
        try:
            text = self._read_list(MANIFEST, commit, remote)
            return _parse(text, f"{MANIFEST} of {self.full_name}, {push.branch}")
        except HubFailure as failure:
            if push.overwrite and failure.refused:
                return None
            failure.options = "--overwrite"
            raise

    def _is_of_old_version(
        self, push: FolderPush, commit: str, remote: Mapping[str, RepoFile]
    ) -> bool:
        """Return whether version 0.1.0 has pushed there: it left no manifest."""
        if TRAINING_ARGS in remote or (push.is_state and OLD_CHECKSUMS in remote):
            return True
        if CARD not in remote or remote[CARD].size > _LONGEST_LIST:
            return False
        return "simcse-trainer" in self._read_list(CARD, commit, remote)

    def _note(self, push: FolderPush, plan: Plan, known: Manifest | None) -> None:
        where = f"{push.branch} of {self.full_name}"
        if known is not None and known.run and push.run and known.run != push.run:
            step = "" if known.step is None else f" at step {known.step}"
            self.notes.append(
                f"Another run ({known.run[:8]}{step}) has pushed to {where}; what it wrote is "
                "replaced, and stays in the history. Give each run a --hub_revision of its own to "
                "keep both."
            )
        if plan.kept:
            self.notes.append(
                f"{', '.join(plan.kept)} on {where} was written by somebody else and is kept. To "
                "replace it: simcse-trainer push ... --overwrite"
            )
        if plan.foreign:
            self.notes.append(
                f"Somebody else has committed to {where} since the last push: "
                f"{', '.join(plan.foreign[:5])}. What was added stays."
            )

    def _head(self, branch: str) -> str:
        try:
            return str(self.api.repo_info(self.full_name, revision=branch).sha)
        except RevisionNotFoundError:
            self.api.create_branch(self.full_name, branch=branch, exist_ok=True)
        except RepositoryNotFoundError:
            self.create()
            if branch != "main":
                self.api.create_branch(self.full_name, branch=branch, exist_ok=True)
        return str(self.api.repo_info(self.full_name, revision=branch).sha)

    def _tag(self, tag: str, commit: str, push: FolderPush, local: Mapping[str, Path]) -> None:
        """Set a tag, or move one of this run that holds other weights; never from equal ones."""
        tags = self._tags()
        if tag in tags and tags[tag] != commit:
            there = self._tree(tags[tag])
            weights = [name for name in local if name.endswith(".safetensors")]
            if all(n in there and _same(there[n], self._record(local[n])) for n in weights):
                return
            if not self._is_of_run(push.run, tags[tag], there):
                own = f"-{push.run[:8]}"
                if not push.run or tag.endswith(own):
                    self.notes.append(f"The tag {tag} is of another run and stays.")
                    return
                return self._tag(tag + own, commit, push, local)
            self.api.delete_tag(self.full_name, tag=tag)
        if tags.get(tag) == commit:
            return
        self.api.create_tag(self.full_name, tag=tag, revision=commit)
        if self._tags().get(tag) != commit:  # the client takes any answer for a yes
            raise HubFailure(f"the Hub did not set the tag {tag}")

    def _is_of_run(self, run: str, commit: str, remote: Mapping[str, RepoFile]) -> bool:
        if MANIFEST not in remote:
            return False
        text = self._read_list(MANIFEST, commit, remote)
        return bool(run) and _parse(text, f"{MANIFEST} at {commit[:8]}").run == run

    def _tags(self) -> dict[str, str]:
        refs = self.api.list_repo_refs(self.full_name)
        return {ref.name: ref.target_commit for ref in refs.tags}

    def _tree(self, commit: str) -> dict[str, RepoFile]:
        tree = self.api.list_repo_tree(self.full_name, recursive=True, revision=commit)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def _record(self, path: Path) -> FileRecord:
        return FileRecord(path.stat().st_size, *self._digest(path))

    def _digest(self, path: Path) -> tuple[str, str]:
        """Compute SHA-256 of the contents, and the SHA-1 that git names them by; once per file."""
        stat = path.stat()
        key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if key not in self._digests:
            sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % stat.st_size)
            with path.open("rb") as file:
                while chunk := file.read(2**20):
                    sha256.update(chunk)
                    git.update(chunk)
            self._digests[key] = (sha256.hexdigest(), git.hexdigest())
        return self._digests[key]

    def _is_digest(self, sha256: str, path: Path) -> bool:
        return self._digest(path)[0] == sha256

    def _is_entry(self, entry: RepoFile, path: Path) -> bool:
        return _same(entry, self._record(path))

    def _refuse_token(self, paths: Iterable[Path]) -> None:
        """Refuse a log or an argument file that holds the token: it must not become public."""
        token = (self.token or get_token() or "").encode()
        for path in paths:
            if token and path.stat().st_size < _LARGE and token in path.read_bytes():
                raise HubFailure(f"{path.name} contains the Hub token; remove it", refused=True)


def _reasons(text: str) -> str:
    """Return the reasons in the Hub's answer about metadata."""
    try:
        return "; ".join(error["message"] for error in json.loads(text)["errors"])
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())


def _report_from(report: Report, done: int, total: int, more: int) -> None:
    report(done + more, total)


def _files(folder: Path, push: FolderPush) -> dict[str, Path]:
    """Name in the repository -> file, as they were staged: what has gone since is an error."""
    named = {name: folder / push.folder / name for name in push.files}
    missing = [name for name, path in named.items() if not path.is_file()]
    if missing:
        raise HubFailure(f"{missing[0]} was deleted before it was pushed")
    return named


def _same(remote: RepoFile, record: FileRecord) -> bool:
    if remote.lfs:
        return record.sha256 is not None and remote.lfs.sha256 == record.sha256
    return record.git_sha1 is not None and remote.blob_id == record.git_sha1


def _git_name(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _parse(text: str, source: str) -> Manifest:
    try:
        return parse_manifest(text, source)
    except InputError as error:
        raise HubFailure(str(error), refused=True) from None


def _parse_sha256(text: str) -> dict[str, str | None]:
    try:
        files = json.loads(text)["files"]
    except (ValueError, KeyError, TypeError):
        files = None
    if not isinstance(files, dict) or not all(isinstance(one, str) for one in files.values()):
        raise HubFailure(
            f"its {OLD_CHECKSUMS} is malformed: expected a table 'files' of text", refused=True
        )
    return dict(files)
