"""Records of a file: lines or an array of JSON, rows of CSV or Parquet; one after the other, never the whole file at once.

Plain Python rather than the readers of ``datasets``: a problem is told with its line, nothing is copied into a cache, and an
array of JSON is not loaded whole.
"""

import csv
import json
import re
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from fasc.errors import CorpusError
from fasc.text.documents import FIELDS
from fasc.text.files import text_chunks, text_lines

Records = Iterator[tuple[int, Any]]
"""Values with the numbers of their lines, from 1."""

_SPACE = re.compile(r"\s*")

_NEAR_END = 16
"""Characters of a number, a word or an escape that the end of a chunk may have cut."""


def json_lines(file: Path) -> Records:
    """Values of a JSON-lines file.

    Raises:
        CorpusError: unreadable or not JSON; names the line.
    """
    for number, line in text_lines(file):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as problem:
                raise _not_json(file, number, problem) from problem


def json_values(file: Path) -> Records:
    """The elements of a JSON array, or the values of a file that holds one after the other, as lines or not.

    Raises:
        CorpusError: unreadable or not JSON; names the line.
    """
    buffer = _Buffer(file)
    if buffer.next_character() != "[":
        while buffer.next_character():
            yield buffer.line, buffer.value()
        return
    separator = "["
    while separator != "]":
        buffer.skip(1)
        if buffer.next_character() != "]":
            yield buffer.line, buffer.value()
        separator = buffer.next_character()
        if separator not in (",", "]"):
            raise _not_json(file, buffer.line, ValueError("Expecting ',' or ']'"))
    buffer.skip(1)
    if buffer.next_character():
        raise _not_json(file, buffer.line, ValueError("Extra data after the array"))


class _Buffer:
    """The part of a JSON text in hand."""

    def __init__(self, file: Path) -> None:
        self._file, self._chunks = file, text_chunks(file)
        self._text, self._position, self.line = "", 0, 1
        self._decoder = json.JSONDecoder()

    def next_character(self) -> str:
        """The first character that is no space, or nothing at the end."""
        while True:
            space = _SPACE.match(self._text, self._position)
            self.skip(space.end() - self._position if space else 0)
            if self._position < len(self._text) or not self._more(1):
                return self._text[self._position : self._position + 1]

    def skip(self, characters: int) -> None:
        """Pass over characters."""
        end = self._position + characters
        self.line += self._text.count("\n", self._position, end)
        self._position = end

    def value(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as problem:
                cut = problem.msg.startswith("Unterminated string") or problem.pos >= len(self._text) - _NEAR_END
                if cut and self._more(len(self._text) - self._position):
                    continue
                self.skip(problem.pos - self._position)
                raise _not_json(self._file, self.line, problem) from problem
            except (ValueError, RecursionError) as problem:
                raise _not_json(self._file, self.line, problem) from problem
            if end < len(self._text) or isinstance(value, (dict, list, str)) or not self._more(1):
                self.skip(end - self._position)
                return value

    def _more(self, characters: int) -> bool:
        """Take in at least so many more characters, unless the file ends; whether there were any."""
        parts = []
        for part in self._chunks:
            parts.append(part)
            characters -= len(part)
            if characters <= 0:
                break
        self._text, self._position = self._text[self._position :] + "".join(parts), 0
        return bool(parts)


def _not_json(file: Path, line: int, problem: Exception) -> CorpusError:
    if isinstance(problem, RecursionError):
        reason = "nested too deeply"
    else:
        reason = problem.msg if isinstance(problem, json.JSONDecodeError) else str(problem)
    return CorpusError(f"`{file}` line {line}: not JSON ({reason})", "a file holds one JSON object a line, or an array of them")


def table_rows(file: Path, delimiter: str) -> Records:
    """Rows of a CSV or TSV file, by the names in its first line.

    Raises:
        CorpusError: unreadable, no table, or a row with more cells than names; names the line.
    """
    rows = csv.DictReader((line for _, line in text_lines(file)), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses documents of 128 kB
    try:
        for row in rows:
            if None in row:
                raise CorpusError(
                    f"`{file}` line {rows.line_num}: more cells than the first line has names",
                    "quote cells that hold the separator or a line break",
                )
            yield rows.line_num, row
    except csv.Error as problem:
        raise CorpusError(
            f"`{file}` line {rows.reader.line_num}: no table ({problem})", "quote cells that hold quotes or breaks"
        ) from problem
    finally:
        csv.field_size_limit(limit)


def parquet_rows(file: Path) -> Records:
    """Rows of a Parquet file, those columns only that are read; numbered from 1.

    Raises:
        CorpusError: no Parquet file.
    """
    import pyarrow as pa  # noqa: PLC0415 - slow to import
    import pyarrow.parquet  # noqa: PLC0415

    try:
        with pa.parquet.ParquetFile(file) as stored:
            names = stored.schema_arrow.names
            columns = [name for name in names if name in FIELDS] or names
            batches = stored.iter_batches(batch_size=64, columns=columns)
            yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), start=1)
    except (OSError, ValueError, pa.ArrowException) as problem:
        first = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise CorpusError(f"cannot read `{file}`: {first[:200]}", "check the path, its permissions and the download") from problem
