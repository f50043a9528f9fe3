"""Bytes and lines of a file, plain or compressed; whatever is wrong with them is one line with the file and the line in it."""

import codecs
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from gzip import GzipFile
from pathlib import Path
from typing import IO

from fasc.errors import CorpusError

_GZIP = b"\x1f\x8b"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BINARY = bytes([*range(9), *range(14, 27), *range(28, 32)])
"""Control characters that text does not have: neither space nor escape."""

_CHUNK = 32_768
"""Bytes that are read at a time."""


@contextmanager
def reading(file: Path) -> Iterator[IO[bytes]]:
    """Open a file, decompressed if it is gzip, whatever its name says.

    Raises:
        CorpusError: it cannot be opened or decompressed, also while the body reads.
    """
    try:
        with file.open("rb") as raw:
            compressed = raw.read(2) == _GZIP
            raw.seek(0)
            if compressed:
                with GzipFile(fileobj=raw) as stream:
                    yield stream
            else:
                yield raw
    except (OSError, EOFError, zlib.error) as problem:
        raise CorpusError(f"cannot read `{file}`: {problem}", "check the path, its permissions and the download") from problem


def text_chunks(file: Path) -> Iterator[str]:
    """The text of a file, part by part, without a byte-order mark.

    Raises:
        CorpusError: unreadable, no text, or not UTF-8; names the line.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    with reading(file) as stream:
        while True:
            chunk = stream.read(_CHUNK)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as problem:
                raise _not_text(file, line, problem) from problem
            if "\0" in text:
                raise _binary(file, line + text[: text.index("\0")].count("\n"))
            if text:
                yield text
            if not chunk:
                return
            line += text.count("\n")


def text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers, from 1, without a byte-order mark.

    Raises:
        CorpusError: unreadable, no text, or not UTF-8; names the line.
    """
    with reading(file) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as problem:
                raise _not_text(file, number, problem, first=number) from problem
            if "\0" in text:
                raise _binary(file, number)
            yield number, text


def _not_text(file: Path, line: int, problem: UnicodeDecodeError, first: int | None = None) -> CorpusError:
    content = bytes(problem.object)
    line = first or line + content[: problem.start].count(b"\n")
    if content.startswith(_UTF16):
        return CorpusError(f"`{file}` is UTF-16", "convert the file: `iconv -f UTF-16 -t UTF-8`")
    if any(byte in _BINARY for byte in content):
        return _binary(file, line)
    return CorpusError(
        f"`{file}` line {line}: not UTF-8 (byte 0x{content[problem.start]:02x})", "convert the file, e.g. `iconv -t UTF-8`"
    )


def _binary(file: Path, line: int) -> CorpusError:
    return CorpusError(f"`{file}` line {line}: binary data, not text", "give a file of text")
