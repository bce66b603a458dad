"""Repositories of the loopback Hub: commits, branches, tags and contents, in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Blob:
    data: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.is_lfs else git_oid(self.data)

    def entry(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": len(self.data), "oid": git_oid(self.data)}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.oid, "size": len(self.data), "pointerSize": 130}
        return entry


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repository:
    name: str
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    by_sha: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    altered: dict[tuple[str, str], bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.commit("main", "initial commit", {".gitattributes": Blob(attributes, False)})

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return sha if sha in self.by_sha else None

    def commit(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        seed = f"{self.name} {len(self.by_sha)} {branch} {parent} {title}"
        made = Commit(hashlib.sha1(seed.encode()).hexdigest(), parent, title, files)
        self.by_sha[made.sha], self.branches[branch] = made, made.sha
        return made

    def commits(self, revision: str = "main") -> list[Commit]:
        found, sha = [], self.resolve(revision)
        while sha is not None:
            found.append(self.by_sha[sha])
            sha = self.by_sha[sha].parent
        return found

    def files(self, revision: str = "main") -> dict[str, bytes]:
        sha = self.resolve(revision)
        assert sha is not None, revision
        return {path: blob.data for path, blob in self.by_sha[sha].files.items()}

    def corrupt(self, path: str, revision: str, data: bytes) -> None:
        """Serve other bytes under the same names and checksums."""
        sha = self.resolve(revision)
        assert sha is not None, revision
        assert path in self.by_sha[sha].files, path
        self.altered[sha, path] = data

    def read(self, sha: str, path: str) -> bytes:
        return self.altered.get((sha, path), self.by_sha[sha].files[path].data)
