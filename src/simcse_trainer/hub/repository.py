"""One try at what a run wants of the Hub: check, push, download. Each can be repeated.

Whatever the outcome of an earlier try was (a commit whose answer got lost may have been made), the
next one starts by looking at what is there and does only what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
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

from simcse_trainer.evaluation.plots import TRAINING_CURVE
from simcse_trainer.hub.failures import HubFailure
from simcse_trainer.model_files import MODEL_FILES

TRAINING_STATE = "training-state"
SHA256 = "sha256.json"

# The client sends files of a commit together; from this size on each has a call of its own, so
# that there is progress to show and less to repeat.
_LARGE = 100 * 2**20
# What an earlier push may have left and this folder lacks; other files there are not ours.
_OURS = (*MODEL_FILES, TRAINING_CURVE)

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class FolderPush:
    """A folder that becomes one commit on a branch.

    Attributes:
        folder: All its files go up.
        message: Of the commit.
        branch: Made where it is missing.
        tag: For the commit.
        whole_branch: The branch holds this folder and nothing else, with the checksums of it.
    """

    folder: str
    message: str
    branch: str = "main"
    tag: str | None = None
    whole_branch: bool = False


@dataclass
class HubRepository:
    """A model repository on the Hub, seen by one user.

    Attributes:
        name: `name` or `namespace/name`; without one, the user's own is meant.
        token: None for the one that is stored on this machine.
        private: Of a repository that has still to be made; None leaves it to the Hub.
    """

    name: str
    token: str | None = None
    private: bool | None = None
    _full_name: str = ""
    _digests: dict[tuple[Any, ...], tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """The token goes into every request of this client."""
        self.api = HfApi(token=self.token)

    @property
    def full_name(self) -> str:
        """`namespace/name`."""
        if not self._full_name:
            bare = "/" not in self.name
            self._full_name = f"{self.api.whoami()['name']}/{self.name}" if bare else self.name
        return self._full_name

    def check(self) -> None:
        """Token, permission and repository (made if it is not there), before they matter."""
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
        """Whether the Hub takes a card's metadata."""
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

    def push(self, pushes: Iterable[FolderPush], report: Report) -> int:
        """Bring folders to their branches.

        Args:
            pushes: In this order.
            report: Told bytes done and bytes in all.

        Returns:
            The number of commits that were needed.
        """
        pushes = list(pushes)
        for one in pushes:
            if one.whole_branch:
                self._write_digests(Path(one.folder))
        total = sum(path.stat().st_size for one in pushes for path in _files(one.folder).values())
        done = commits = 0
        for one in pushes:
            size = sum(path.stat().st_size for path in _files(one.folder).values())
            commits += self._push_folder(one, partial(_report_from, report, done, total))
            done += size
            report(done, total)
        return commits

    def download(self, revision: str, folder: Path, report: Report) -> str:
        """A training state, each file checked against the checksums that came with it.

        Args:
            revision: Branch, tag or commit.
            folder: Where to.
            report: Told files done and files in all.

        Returns:
            The commit it is of.
        """
        commit = str(self.api.repo_info(self.full_name, revision=revision).sha)
        remote = self._tree(commit)
        if SHA256 not in remote:
            text = f"'{revision}' of {self.full_name} holds no training state"
            raise HubFailure(text, status=404, refused=True)
        self._fetch(SHA256, commit, folder, lambda path: _same(remote[SHA256], *self._digest(path)))
        digests: dict[str, str] = json.loads((folder / SHA256).read_text("utf-8"))["files"]
        for done, (name, sha256) in enumerate(sorted(digests.items())):
            report(done, len(digests))
            if name not in remote or not _is_inside(name):
                text = f"the training state is torn: {name} is listed in {SHA256} and not there"
                raise HubFailure(text, refused=True)
            self._fetch(name, commit, folder, partial(self._is_digest, sha256))
        return commit

    def _fetch(
        self, name: str, commit: str, folder: Path, is_right: Callable[[Path], bool]
    ) -> None:
        """Download; the client accepts altered bytes of the right length, so look at them."""
        for again in (False, True):
            path = self.api.hf_hub_download(
                self.full_name, name, revision=commit, local_dir=folder, force_download=again
            )
            if is_right(Path(path)):
                return
        text = f"{name} differs from its checksum: the training state was altered"
        raise HubFailure(text, refused=True)

    def _push_folder(self, push: FolderPush, report: Callable[[int], None]) -> int:
        head = self._head(push.branch)
        remote, local = self._tree(head), _files(push.folder)
        changed = [
            name
            for name, path in local.items()
            if name not in remote or not _same(remote[name], *self._digest(path))
        ]
        gone = [
            name
            for name in remote
            if name not in local
            and name != ".gitattributes"
            and (push.whole_branch or any(fnmatch(name, pattern) for pattern in _OURS))
        ]
        self._refuse_token(local[name] for name in changed)
        commit = head
        if changed or gone:
            adds = [CommitOperationAdd(name, str(local[name])) for name in changed]
            done = 0
            for add in adds:
                if add.upload_info.size >= _LARGE:
                    self.api.preupload_lfs_files(
                        self.full_name, [add], revision=push.branch, free_memory=False
                    )
                    done += add.upload_info.size
                    report(done)
            info = self.api.create_commit(
                self.full_name,
                [*adds, *map(CommitOperationDelete, gone)],
                commit_message=push.message,
                revision=push.branch,
                parent_commit=head,
            )
            commit = info.oid
        if push.tag:
            self._tag(push.tag, commit, local)
        return int(bool(changed or gone))

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

    def _tag(self, tag: str, commit: str, local: Mapping[str, Path]) -> None:
        """Set a tag, or move one that holds other weights; never from equal ones."""
        tags = self._tags()
        if tags.get(tag) == commit:
            return
        if tag in tags:
            there = self._tree(tags[tag])
            weights = [name for name in local if name.endswith(".safetensors")]
            if all(n in there and _same(there[n], *self._digest(local[n])) for n in weights):
                return
            self.api.delete_tag(self.full_name, tag=tag)
        self.api.create_tag(self.full_name, tag=tag, revision=commit)
        if self._tags().get(tag) != commit:  # the client takes any answer for a yes
            raise HubFailure(f"the Hub did not set the tag {tag}")

    def _tags(self) -> dict[str, str]:
        refs = self.api.list_repo_refs(self.full_name)
        return {ref.name: ref.target_commit for ref in refs.tags}

    def _tree(self, commit: str) -> dict[str, RepoFile]:
        tree = self.api.list_repo_tree(self.full_name, recursive=True, revision=commit)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def _write_digests(self, folder: Path) -> None:
        digests = {name: self._digest(path)[0] for name, path in _files(folder).items()}
        digests.pop(SHA256, None)
        text = json.dumps({"files": digests}, indent=2, sort_keys=True) + "\n"
        (folder / SHA256).write_text(text, encoding="utf-8")

    def _digest(self, path: Path) -> tuple[str, str]:
        """SHA-256 of the contents, and the SHA-1 that git names them by; once per file."""
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

    def _refuse_token(self, paths: Iterable[Path]) -> None:
        """A log or an argument file of the user's that holds the token must not become public."""
        token = (self.token or get_token() or "").encode()
        for path in paths:
            if token and path.stat().st_size < _LARGE and token in path.read_bytes():
                raise HubFailure(f"{path.name} contains the Hub token; remove it", refused=True)


def _reasons(text: str) -> str:
    """Of the Hub's answer about metadata."""
    try:
        return "; ".join(error["message"] for error in json.loads(text)["errors"])
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())


def _report_from(report: Report, done: int, total: int, more: int) -> None:
    report(done + more, total)


def _files(folder: str | Path) -> dict[str, Path]:
    """Name in the repository -> file."""
    root = Path(folder)
    paths = (path for path in sorted(root.rglob("*")) if path.is_file())
    named = {path.relative_to(root).as_posix(): path for path in paths}
    return {name: path for name, path in named.items() if not name.startswith(".cache/")}


def _same(remote: RepoFile, sha256: str, git: str) -> bool:
    return bool(remote.lfs.sha256 == sha256 if remote.lfs else remote.blob_id == git)


def _is_inside(name: str) -> bool:
    """A name in a list from elsewhere that stays in the folder."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts
