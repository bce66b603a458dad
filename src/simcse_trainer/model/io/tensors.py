"""A model's files, as they are on disk: downloaded, readable, finite. Needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from simcse_trainer.errors import InputError

_POINTER = b"version https://git-lfs"
# Of floating-point numbers in safetensors: the integer of their size, and the bits of the exponent,
# which are all set where the number is infinite or NaN (IEEE 754).
_EXPONENTS = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
_CHUNK = 2**24


def hash_file(path: Path) -> str:
    """Compute SHA-256 of what a file holds, hexadecimal."""
    digest = sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_downloaded(path: Path) -> None:
    """Raise InputError where a file is a Git LFS pointer instead of what it points to."""
    with open(path, "rb") as file:
        start = file.read(len(_POINTER))
    if start == _POINTER:
        raise InputError(
            f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` in its folder, "
            "or download the model with `hf download`."
        )


@contextmanager
def writing_tensors(folder: Path) -> Iterator[None]:
    """Raise `OSError` where safetensors cannot write: a full disk is an error of its own to it."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{folder} cannot be written: {error}") from error


def read_json(path: Path, kind: type[Any] = dict) -> Any:
    """Return what a file of JSON holds: an object, or a list where `kind` is one.

    Raises:
        InputError: A Git LFS pointer, a damaged file, or one that holds something else.
    """
    check_downloaded(path)
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise explain_damage(path, error) from None
    if not isinstance(said, kind):
        expected = "a list" if kind is list else "an object"
        raise explain_damage(path, TypeError(f"expected {expected}, found {str(said)[:40]}"))
    return said


def explain_damage(path: Path, error: Exception) -> InputError:
    """Return what to say of a file that cannot be read."""
    reason = " ".join(str(error).split())
    return InputError(
        f"{path} is incomplete or damaged ({path.stat().st_size:,} bytes: {reason}). Download or "
        "save it again."
    )


def check_files(folder: Path) -> None:
    """Raise InputError where a file in a folder is a pointer, or weights are damaged."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file():
            check_downloaded(path)
        if path.suffix == ".safetensors":
            read_header(path)


def follow_umask(folder: Path) -> None:
    """Give files of safetensors below a folder the mode of any new file.

    safetensors makes them readable for their owner alone, whatever the umask says.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def find_not_finite(path: Path) -> tuple[str, str] | None:
    """Look for NaN and infinity in a file of safetensors.

    Returns:
        Name and type (such as `F16`) of the first tensor that holds one, or None.

    Raises:
        InputError: A pointer, or a damaged file.
    """
    check_downloaded(path)
    for name, kind, numbers in _read_numbers(path):
        if kind not in _EXPONENTS:
            continue
        width, bits = _EXPONENTS[kind]
        integers = numbers.view(width)
        for start in range(0, len(integers), _CHUNK):
            if ((integers[start : start + _CHUNK] & bits) == bits).any():
                return name, kind
    return None


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where the numbers of a file of safetensors begin, and what it says of each tensor.

    Raises:
        InputError: It is damaged, or shorter than it says.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if 8 + length > size:
                raise ValueError("its header is cut")
            header = json.loads(file.read(length))
        tensors = {name: said for name, said in header.items() if name != "__metadata__"}
        end = max((said["data_offsets"][1] for said in tensors.values()), default=0)
        if 8 + length + end > size:
            raise ValueError("its tensors are cut")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise explain_damage(path, error) from None
    return 8 + length, tensors


def _read_numbers(path: Path) -> Iterator[tuple[str, str, Any]]:
    """Name, type and bytes of each tensor."""
    start, tensors = read_header(path)
    if path.stat().st_size == start:
        return
    body = np.memmap(path, dtype=np.uint8, mode="r", offset=start)
    for name, said in tensors.items():
        yield name, said["dtype"], body[slice(*said["data_offsets"])]
