"""Every format of text is read, and what is no text is one line that names the file and the place."""

import codecs
import gzip
import json
import random
import zlib

import pyarrow
import pyarrow.parquet
import pytest
import torch

from fasc.errors import CorpusError, FascError
from fasc.text.folder import TextFile
from tests.text.load import load

TEXTS = ["Ten green bottles, “quoted”\nand broken.", "é " * 50, 'with "quotes", commas;\tand tabs', "", "the end " * 400]


def rows(extra=()):
    return [{"id": i, "text": text, **dict(extra)} for i, text in enumerate(TEXTS)]


def write_csv(file, delimiter=","):
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    file.write_text("\n".join([f"id{delimiter}text", *(f"{i}{delimiter}{text}" for i, text in enumerate(quoted))]), newline="")


WRITERS = {
    "lines.jsonl": lambda file: file.write_text("\n".join(json.dumps(row) for row in rows())),
    "blank_lines.jsonl": lambda file: file.write_text("\n\n".join(json.dumps(row) for row in rows()) + "\n\n"),
    "array.json": lambda file: file.write_text(json.dumps(rows())),
    "pretty.json": lambda file: file.write_text(json.dumps(rows(), indent=2, ensure_ascii=False)),
    "strings.json": lambda file: file.write_text(json.dumps(TEXTS)),
    "lines.json": lambda file: file.write_text("\n".join(json.dumps(row) for row in rows())),
    "several.json": lambda file: file.write_text("".join(json.dumps(row, indent=1) for row in rows())),
    "content.jsonl": lambda file: file.write_text("\n".join(json.dumps({"content": text}) for text in TEXTS)),
    "table.csv": write_csv,
    "table.tsv": lambda file: write_csv(file, "\t"),
    "table.parquet": lambda file: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows()), file),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("coat", ["plain", "bom", "gz"])
def test_the_same_documents_are_read_from_every_format(tmp_path, name, coat):
    file = tmp_path / name
    WRITERS[name](file)
    if coat != "plain":
        if name.endswith(".parquet"):
            pytest.skip("binary")
        content = file.read_bytes()
        file = file.with_name(name + ".gz") if coat == "gz" else file
        file.write_bytes(gzip.compress(content) if coat == "gz" else codecs.BOM_UTF8 + content)
    assert [document.text for document in TextFile(file).documents()] == TEXTS


@pytest.mark.parametrize("name", ["book.txt", "book", "book.md", "BOOK.TXT", "book.txt.gz"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_text_file_is_one_document_without_its_byte_order_mark(tmp_path, name, start):
    text = "Grüße, 你好\r\nund 🐙 " * 30_000
    content = (start + text).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    pieces = list(TextFile(tmp_path / name).documents())
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) > 10
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_compressed_files_are_known_by_their_content(tokenizer, tmp_path):
    (tmp_path / "named.txt").write_bytes(gzip.compress(b"compressed without saying so " * 9))
    assert tokenizer.decode(load(tokenizer, tmp_path / "named.txt", sequences=None).tokens[0]).startswith("compressed ")


def test_every_cut_of_a_json_array_gives_the_values_before_it_and_one_line(tmp_path):
    """Chunks end anywhere: in a number, an escape, a word, between elements."""
    values = ['caf\u00e9 \\ " \n 😀', "", "x" * 100]
    content = json.dumps(values, indent=1)
    file = tmp_path / "cut.json"
    for end in range(1, len(content)):
        file.write_text(content[:end])
        read = []
        with pytest.raises(CorpusError, match=r"cut.json` line \d+: not JSON"):
            for document in TextFile(file).documents():
                read.append(document.text)
        assert read == values[: len(read)]
    file.write_text(content)
    assert [document.text for document in TextFile(file).documents()] == values


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_json_is_read_alike_in_chunks_of_any_size(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("fasc.text.files._CHUNK", chunk)
    for name in ("array.json", "pretty.json", "several.json", "lines.json"):
        WRITERS[name](tmp_path / name)
        assert [document.text for document in TextFile(tmp_path / name).documents()] == TEXTS


def test_the_line_of_a_record_without_text_is_that_where_it_begins(tmp_path):
    file = tmp_path / "pretty.json"
    file.write_text(json.dumps([{"text": "a"}, {"title": "b"}], indent=2))
    with pytest.raises(CorpusError, match=r"pretty.json` line 5: no text in it \(fields: title\)"):
        list(TextFile(file).documents())


def deep(depth):
    return b"[" * depth + b"]" * depth


BAD = {
    "latin.txt": (b"fine\nfine\ncaf\xe9\n", r"latin.txt` line 3: not UTF-8 \(byte 0xe9\)"),
    "latin.jsonl": (b'{"text": "fine"}\n{"text": "caf\xe9"}\n', r"latin.jsonl` line 2: not UTF-8"),
    "latin.csv": (b"text\nfine\ncaf\xe9\n", r"latin.csv` line 3: not UTF-8"),
    "utf16.txt": ("wide text".encode("utf-16"), r"utf16.txt` is UTF-16"),
    "nul.txt": (b"fine\nfine\0fine", r"nul.txt` line 2: binary data"),
    "nul.jsonl": (b'{"text": "fine"}\n\0\n', r"nul.jsonl` line 2: binary data"),
    "nul.csv": (b"text\n\0\n", r"nul.csv` line 2: binary data"),
    "picture.txt": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)), r"picture.txt` line 1: binary data"),
    "broken.jsonl": (b'{"text": "fine"}\n{"text": \n', r"broken.jsonl` line 2: not JSON"),
    "deep.jsonl": (b'{"text": "fine"}\n' + deep(100_000), r"deep.jsonl` line 2: not JSON \(nested too deeply\)"),
    "deep.json": (deep(100_000), r"deep.json` line 1: not JSON \(nested too deeply\)"),
    "number.jsonl": (b'{"text": "fine"}\n' + b"9" * 9999, r"number.jsonl` line 2: not JSON"),
    "number.json": (b"[" + b"9" * 9999 + b"]", r"number.json` line 1: not JSON"),
    "cut.json": (b'[{"text": "fine"},\n{"text": "fi', r"cut.json` line 2: not JSON"),
    "comma.json": (b'[{"text": "fine"}\n{"text": "fine"}]', r"comma.json` line 2: not JSON"),
    "open.json": (b"[", r"open.json` line 1: not JSON"),
    "more.json": (b'[{"text": "fine"}]\n]', r"more.json` line 2: not JSON"),
    "word.json": (b"fine", r"word.json` line 1: not JSON"),
    "other.jsonl": (b'{"title": "no text here"}\n', r"other.jsonl` line 1: no text in it \(fields: title\)"),
    "null.jsonl": (b'{"text": null}\n', r"null.jsonl` line 1: no text"),
    "list.jsonl": (b"[1, 2]\n", r"list.jsonl` line 1: no text"),
    "columns.csv": (b"id,title\n1,x\n", r"columns.csv` line 2: no text in it \(fields: id, title\)"),
    "cells.csv": (b"id,text\n1,one, two\n", r"cells.csv` line 2: more cells than the first line has names"),
    "quote.csv": (b'id,text\n1,"open\n', r"quote.csv` line 2: no table"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "abc"}\n' * 100)[:30], r"cannot read `.*cut.jsonl.gz`"),
    "cut.txt.gz": (gzip.compress(random.Random(0).randbytes(99_999).hex().encode())[:-9000], r"cannot read `.*cut.txt.gz`"),
    "rotten.txt.gz": (gzip.compress(b"abc" * 99)[:12] + b"\xff" * 40, r"cannot read `.*rotten.txt.gz`"),
    "tail.txt.gz": (gzip.compress(b"abc") + b"and more", r"cannot read `.*tail.txt.gz`"),
    "not.txt.gz": (zlib.compress(b"abc" * 99), r"not.txt.gz` line 1: "),
    "cut.parquet": (b"PAR1" + b"x" * 99, r"cannot read `.*cut.parquet`"),
    "empty.parquet": (b"", r"cannot read `.*empty.parquet`"),
    "book.pdf": (b"%PDF-1.7", r"book.pdf`: `.pdf` is no kind of file that fasc reads"),
    "rows.lines": (b'{"text": "fine"}', r"rows.lines`: `.lines` is no kind of file that fasc reads"),
    "surrogate.jsonl": (b'{"text": "fine"}\n{"text": "half \\ud83d"}', r"surrogate.jsonl` line 2: half of a character \(\\ud83d\)"),
    "surrogate.json": (b'[\n{"messages": [{"role": "user", "content": "\\udc00"}]}]', r"surrogate.json` line 2: half of a character"),
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b"  \n \n", "is empty"),
    "mark.txt": (codecs.BOM_UTF8, "is empty"),
    "empty.jsonl": (b"", "is empty"),
    "empty.json": (b"\n", "is empty"),
    "none.json": (b"[ ]", "is empty"),
    "header.csv": (b"text\n", "is empty"),
    "blank.jsonl": (b'{"text": ""}\n{"text": " "}', "is empty"),
    "nothing.txt.gz": (gzip.compress(b""), "is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_text_is_refused_in_one_line_with_the_file_and_the_place(tokenizer, tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message) as caught:
        load(tokenizer, tmp_path / name)
    assert name in caught.value.message
    assert "\n" not in str(caught.value)


def test_a_file_without_permission_is_refused(tokenizer, tmp_path, monkeypatch):
    file = tmp_path / "secret.txt"
    file.write_text("x" * 99)
    monkeypatch.setattr("pathlib.Path.open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(CorpusError, match="Permission denied"):
        load(tokenizer, file)


def test_files_changed_at_random_are_read_or_refused(tokenizer, tmp_path):
    """Never another kind of error, whatever the bytes."""
    choose = random.Random(0)
    refused = 0
    for name in WRITERS:
        WRITERS[name](tmp_path / name)
        content = (tmp_path / name).read_bytes()
        for _ in range(25):
            changed = bytearray(content)
            for _ in range(choose.choice([1, 8])):
                changed[choose.randrange(len(content))] = choose.randrange(256)
            (tmp_path / name).write_bytes(changed[: choose.choice([len(content), choose.randrange(len(content))])])
            try:
                load(tokenizer, tmp_path / name)
            except FascError as problem:
                refused += 1
                assert "\n" not in str(problem)
    assert refused > 100


def test_a_folder_is_read_file_by_file_and_what_is_skipped_is_said(tokenizer, tmp_path, capsys):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.jsonl").write_text(json.dumps({"text": "from lines " * 9}))
    (folder / "a.txt").write_text("from a text " * 9)
    (folder / "deep" / "c.csv").write_text("text\n" + "from a table " * 9)
    for name in ("x.pdf", "y.png", "z.bin", "LICENSE"):
        (folder / name).write_bytes(b"\0")
    tokens = load(tokenizer, folder, sequences=None).tokens
    text = tokenizer.decode(tokens.flatten())
    assert text.index("from a text") < text.index("from lines") < text.index("from a table")
    assert tokenizer.eos_token_id in tokens, "documents are separated"
    said = capsys.readouterr().err
    assert "skipped LICENSE, x.pdf, y.png and 1 more; read 3 of 7 files" in said
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "x.pdf").write_bytes(b"x")
    with pytest.raises(CorpusError, match="holds no text"):
        load(tokenizer, tmp_path / "none")


def test_a_broken_file_in_a_folder_is_named(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("fine " * 99)
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(CorpusError, match=r"b.json` line 1: not JSON"):
        load(tokenizer, tmp_path)


def test_a_single_document_is_not_ended_and_several_are(tokenizer, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "a" * 40}))
    (tmp_path / "two.jsonl").write_text("\n".join(json.dumps({"text": "a" * 7}) for _ in range(6)))
    end = tokenizer.eos_token_id
    one, two = (load(tokenizer, tmp_path / f"{name}.jsonl", sequences=None, sequence_length=8).tokens for name in ("one", "two"))
    assert end not in one
    assert torch.equal(two[:, -1], torch.full((6,), end))
    assert end not in two[:, :-1]
