"""Files to lines of text: compression, encoding, and what another encoding looks like."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from simcse_trainer.data.foreign import describe_content
from simcse_trainer.errors import InputError

# What is looked at to tell an encoding.
_HEAD_BYTES, _SAMPLE_LINES = 8192, 1000

_PRINTABLE = {*map(chr, range(32, 127)), "\r", "\n", "\t"}
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class FileOptions:
    """How to read files where they do not tell by themselves.

    Attributes:
        encoding: Of text files; None: UTF-8.
        delimiter: What separates the cells of tables; None: by the name, and the header.
        column_names: Of tables without a header line.
        in_training: Errors name the options of training, which other commands do not have.
    """

    encoding: str | None = None
    delimiter: str | None = None
    column_names: tuple[str, ...] = ()
    in_training: bool = False


def open_bytes(path: Path) -> Any:
    """Open a file, decompressed by its suffix."""
    return COMPRESSIONS.get(path.suffix.lower(), partial(open, mode="rb"))(path)


def _open_zstd(path: Path) -> IO[bytes]:
    # pyarrow always comes with datasets, and unlike zstandard it notices a truncated file.
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def file_format(path: Path) -> str:
    """Return the suffix that decides on the reader: `.csv` for `train.CSV.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSIONS), "")


def check_encoding(name: str) -> None:
    """Check that Python can decode texts of this encoding.

    Raises:
        InputError: It cannot.
    """
    try:
        b"".decode(name)
        codecs.lookup(name)
    except (LookupError, ValueError):
        raise InputError(
            f"encoding is '{name}'; expected one that Python knows, such as utf-8, cp949, cp1252 "
            "or utf-16."
        ) from None


def split_lines(file: IO[bytes], encoding: str = "utf-8") -> Iterator[bytes]:
    """Split a file at line ends of bytes; an encoding without such is written anew in UTF-8."""
    if _has_ascii(encoding):
        # bytes.splitlines knows \n, \r\n and \r; str.splitlines would also cut at U+2028.
        return (part for line in file for part in line.splitlines(keepends=True))
    decoder: Any = io.TextIOWrapper(file, encoding=encoding, newline="")
    return (line.encode() for line in decoder)


def _has_ascii(encoding: str) -> bool:
    try:
        return b'\r\n",'.decode(encoding) == '\r\n",' and b"a".decode(encoding) == "a"
    except UnicodeDecodeError:
        return False


class Lines(Iterator[str]):
    """Lines with their ends, decoded one by one so that an error knows its line.

    Args:
        file: The bytes, from their beginning.
        source: Its name in errors.
        options: The encoding, if it is not UTF-8.

    Raises:
        InputError: The file is in another encoding, as far as that can be told.
    """

    def __init__(self, file: IO[bytes], source: str, options: FileOptions):
        self._source, self._options = source, options
        given = options.encoding or "utf-8"
        self._check_head(file)
        self._lines = self._read(file, given)
        self._encoding = given if _has_ascii(given) else "utf-8"
        self._problem: str | None = None
        self._decoded = 0  # lines of other than ASCII letters
        self._judged = False
        self.number = 0
        self.last = ""
        self.at_end = False

    def __next__(self) -> str:
        line = next(self._lines, None)
        if line is None:
            self.at_end = True
            raise StopIteration
        self.number += 1
        if self.number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            self.last = line.decode(self._encoding)
            self._decoded += not line.isascii()
        except UnicodeDecodeError as error:
            where = f"byte 0x{line[error.start]:02x} at position {error.start + 1} of the line"
            self._judge(line, where)
            self._problem = self._problem or f"{where} is not {_call(self._encoding)}"
            self.last = line.decode(self._encoding, errors="replace")
        return self.last

    def take_problem(self) -> str | None:
        """Return the problem with the lines since the last call, if any."""
        problem, self._problem = self._problem, None
        return problem

    def _read(self, file: IO[bytes], encoding: str) -> Iterator[bytes]:
        try:
            yield from split_lines(file, encoding)
        except UnicodeError as error:
            raise InputError(
                f"{self._source} cannot be read as {encoding} ({error}). Pass the --encoding it is "
                "in, or save it as UTF-8 and leave --encoding out."
            ) from None

    def _check_head(self, file: Any) -> None:
        # Standard input is none in tests of other libraries, and may not look ahead.
        head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES] if hasattr(file, "peek") else b""
        foreign = describe_content(Path(self._source), head)
        if foreign is not None:
            raise InputError(foreign)
        if self._options.encoding is None:
            wide = find_wide_encoding(head)
            if wide is not None:
                raise InputError(describe_encoding(self._source, wide, self._options))
        elif not _is_utf8(self._options.encoding) and _is_surely_utf8(head):
            raise InputError(
                f"{self._source} is UTF-8, not {self._options.encoding}. Leave --encoding out; it "
                "is for all files, so save those that are not UTF-8 as such."
            )

    def _judge(self, line: bytes, where: str) -> None:
        """Raise InputError where it is not this line alone that is in another encoding."""
        if self._judged or self._options.encoding is not None:
            return
        self._judged = True
        ahead = list(islice(self._lines, _SAMPLE_LINES))
        self._lines = chain(ahead, self._lines)
        foreign = [other for other in [line, *ahead] if not other.isascii()]
        decoded = sum(map(_is_valid_utf8, foreign))
        if len(foreign) - decoded <= self._decoded + decoded:
            return
        encoding = guess_encoding(b"".join(x for x in foreign if not _is_valid_utf8(x)))
        if encoding is not None:
            where = f" (row {self.number}: {where})"
            raise InputError(describe_encoding(self._source, encoding, self._options, where))


def find_wide_encoding(head: bytes) -> str | None:
    """Find UTF-16 or UTF-32, by the mark at the beginning or the zeros of spaces and line ends."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    for encoding, zero in (("utf-16-le", 1), ("utf-16-be", 0)):
        pairs = zip(head[zero::2], head[1 - zero :: 2], strict=False)
        spaced = sum(high == 0 and chr(low) in _PRINTABLE for high, low in pairs)
        try:
            text = head[: len(head) // 2 * 2].decode(encoding)
        except UnicodeDecodeError as error:
            text = head[: error.start].decode(encoding) if error.start > len(head) - 4 else "\0"
        # Units that are no letters of that order, such as of the other one, are private or none.
        if spaced > 2 and all(char.isprintable() or char in _PRINTABLE for char in text):
            return encoding
    return None


# Encoding, its letters, how much of the letters other than ASCII they are at least, how much of
# all letters those are: Latin bytes are also letters of Asian encodings, but only few in a line.
_LEGACY = (
    ("cp949", re.compile("[가-힣]"), 0.8, 0.0),
    ("cp932", re.compile("[ぁ-ヿ一-龥]"), 0.9, 0.2),
    ("gb18030", re.compile("[一-龥]"), 0.9, 0.2),
    ("cp1251", re.compile("[А-яЁё]"), 0.95, 0.4),
    ("cp1252", re.compile("[À-ÖØ-Üß-öø-üŒœŠšŽžŸƒªº]"), 1.0, 0.0),
)
# Fewer may be any byte.
_FEWEST_CYRILLIC = 4
_CP1252_SIGNS = re.compile(r"[\xa0¡¢£¥§©«®°±²³´¶·¹»¼½¾¿×€‚„…†‡‰‹‘’“”•–—™›]")
LANGUAGES = {
    "cp949": "Korean",
    "cp932": "Japanese",
    "gb18030": "Chinese",
    "cp1251": "Cyrillic",
    "cp1252": "Western European",
}


def guess_encoding(data: bytes) -> str | None:
    """Guess an encoding other than UTF-8 by the letters it would give; None if none is likely."""
    for encoding, known, least, of_all in _LEGACY:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        letters = [char for char in text if char.isalpha()]
        foreign = [char for char in letters if not char.isascii()]
        found = sum(bool(known.match(char)) for char in foreign)
        if encoding == "cp1252":
            signs = [c for c in text if not c.isascii() and not known.match(c)]
            if all(map(_CP1252_SIGNS.match, signs)):
                return encoding
        elif foreign and found >= least * len(foreign) and len(foreign) >= of_all * len(letters):
            if encoding == "cp949" and not _is_common_hangul(foreign):
                continue
            if encoding == "cp1251" and len(foreign) < _FEWEST_CYRILLIC:
                continue
            if encoding == "cp932" and not re.search("[ぁ-ヿ]", text):
                continue
            return encoding
    return None


def _is_common_hangul(letters: list[str]) -> bool:
    """Return whether most are of EUC-KR; an accented letter and an ASCII one give others."""
    common = sum(1 for char in letters if len(char.encode("euc_kr", errors="ignore")) == 2)
    return 2 * common > len(letters)


def describe_encoding(source: str, encoding: str, options: FileOptions, where: str = "") -> str:
    """Return the error of a file that is not UTF-8, with what reads it."""
    language = f" ({LANGUAGES[encoding]})" if encoding in LANGUAGES else ""
    found = f"{source} is not UTF-8{where}; it looks like {encoding}{language}."
    if options.in_training:
        return f"{found} Pass --encoding {encoding}"
    path = Path(source)
    if path.suffix.lower() in COMPRESSIONS or not path.is_file():
        return f"{found} Save it as UTF-8."
    new = str(path.with_name(f"{path.stem}-utf8{path.suffix}"))
    return (
        f"{found} Save it as UTF-8, and name the new file: python -c \"open({new!r}, 'w', "
        f"encoding='utf-8').write(open({str(path)!r}, encoding='{encoding}').read())\""
    )


def _is_valid_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


def _is_surely_utf8(head: bytes) -> bool:
    """Return whether it begins with the mark, or has letters which only UTF-8 would have."""
    text = codecs.getincrementaldecoder("utf-8")()
    try:
        found = text.decode(head)
    except UnicodeDecodeError:
        return False
    return head.startswith(codecs.BOM_UTF8) or sum(not char.isascii() for char in found) > 2


def _call(encoding: str) -> str:
    return "UTF-8" if _is_utf8(encoding) else encoding
