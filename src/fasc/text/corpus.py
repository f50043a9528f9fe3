"""A named corpus, a file, or text sampled from the model → sequences of tokens of one length.

A named corpus has two disjoint parts: what calibrates is never what evaluates.
"""

import gzip
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.text.sampling import sample_text
from fasc.text.statements import lama_statements, shipped_statements
from fasc.errors import CorpusError, UnknownNameError
from fasc.provenance import digest
from fasc.storage import new_file

Role = Literal["calibration", "evaluation"]

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".txt.gz")
_FIELDS = ("text", "content")
_INSTRUCTION = ("instruction", "input", "output")


@dataclass(frozen=True, slots=True)
class NamedCorpus:
    """Where a named corpus lies in a data folder and on the hub."""

    files: dict[Role, str]
    """Path in the data folder; the same path for both roles means alternate documents."""

    hub: tuple[str, str | None]
    """Data set id and configuration."""

    splits: dict[Role, str]
    """Split on the hub; the same for both roles means alternate documents."""

    rows_are_lines: bool = False
    """Whether the hub's rows are the lines of one text, to be joined again, and not documents."""


NAMED = {
    "wikitext2": NamedCorpus(
        files={"calibration": "wikitext2/wiki.valid.raw.txt", "evaluation": "wikitext2/wiki.test.raw.txt"},
        hub=("Salesforce/wikitext", "wikitext-2-raw-v1"),
        splits={"calibration": "train", "evaluation": "test"},
        rows_are_lines=True,
    ),
    "c4": NamedCorpus(
        files=dict.fromkeys(("calibration", "evaluation"), "c4/c4_docs.jsonl.gz"),
        hub=("allenai/c4", "en"),
        splits={"calibration": "train", "evaluation": "validation"},
    ),
    "alpaca": NamedCorpus(
        files=dict.fromkeys(("calibration", "evaluation"), "alpaca/alpaca_subset.jsonl.gz"),
        hub=("tatsu-lab/alpaca", None),
        splits=dict.fromkeys(("calibration", "evaluation"), "train"),
    ),
}

STATEMENTS = ("facts", "negated-facts", "lama", "negated-lama")
"""Corpora made of facts, to compare subspaces on; a model calibrated on one must not be scored on the facts in it."""

_HUB_DOCUMENTS = 20_000
"""Documents streamed from the hub at most: more than any calibration here needs."""


@dataclass(frozen=True, slots=True)
class TokenBlock:
    """Sequences of tokens and where they came from."""

    tokens: Tensor
    """int64 [sequences, sequence_length], without padding."""

    corpus: str
    """Name or path as it was asked for."""

    text_digest: str
    """SHA-256 of the whole source text, the same whichever sequences were drawn."""

    @property
    def token_digest(self) -> str:
        """SHA-256 of the very tokens used."""
        return digest([self.tokens.numpy().tobytes()])

    def save(self, file: Path) -> None:
        """Write it to a safetensors file, whole or not at all."""
        with new_file(file) as scratch:
            save_file({"tokens": self.tokens.contiguous()}, scratch, {"corpus": self.corpus, "text_digest": self.text_digest})

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read what ``save`` wrote."""
        with safe_open(file, framework="pt") as stored:
            return cls(stored.get_tensor("tokens"), **stored.metadata())


def data_folder(given: Path | None) -> Path | None:
    """The folder of the named corpora: the option, else ``FASC_DATA``, else none (the hub).

    Raises:
        CorpusError: the folder does not exist.
    """
    folder = given or (Path(os.environ["FASC_DATA"]) if os.environ.get("FASC_DATA") else None)
    if folder is not None and not folder.is_dir():
        raise CorpusError(f"data folder `{folder}` does not exist", "check --data-dir or FASC_DATA")
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """Which text, and how it is cut."""

    corpus: str
    """``self``, a key of ``NAMED``, or a .txt/.jsonl file (or .gz) or a folder of them; a relative path may also lie in the
    data folder."""

    sequences: int | None
    """How many (at most so many, for evaluation); ``None`` takes all, in order."""

    sequence_length: int
    """Tokens in each."""

    seed: int
    """Of the draw, and of the sampling of ``self``."""

    role: Role
    """Which part of a named corpus."""

    data_dir: Path | None = None
    """Folder of the named corpora; the hub is asked if neither this nor FASC_DATA is set."""


def load_corpus(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: TextRequest) -> TokenBlock:
    """Text of a corpus packed into sequences of one length.

    Documents are joined (with the end-of-text token where the corpus has documents), cut into windows that do not overlap,
    and ``sequences`` of them are drawn without replacement. A tokenizer that begins every text with a beginning-of-text
    token has it at the head of each sequence.

    Args:
        model: samples the text of the corpus ``self``; otherwise unused.
        tokenizer: the model's own.
        request: which text, and how it is cut.

    Raises:
        UnknownNameError: not a corpus we know and not a path that exists.
        CorpusError: empty, too short, or not UTF-8; names the file and the line.
    """
    corpus, length = request.corpus, request.sequence_length
    names = [name.strip() for name in corpus.split(",") if name.strip()]
    if len(names) > 1 and not Path(corpus).exists():
        return _mixture(model, tokenizer, request, names)
    if corpus == "self":
        tokens = sample_text(model, tokenizer, request.sequences or 64, length, request.seed)
        return TokenBlock(tokens, corpus, digest([tokens.numpy().tobytes()]))
    documents = list(_documents(corpus, request.role, request.data_dir))
    text_digest = digest(document.encode() for document in documents)
    stream = _tokenize(tokenizer, documents)
    head = _prefix(tokenizer)
    body = length - len(head)
    available = len(stream) // body if body > 0 else 0
    wanted = request.sequences or max(available, 1)
    if request.role == "evaluation":  # a limit says how many at most; calibration gets what it asked for or an error
        wanted = max(1, min(wanted, available))
    if available < wanted:
        raise CorpusError(
            f"corpus `{corpus}` is too short: {len(stream):,} tokens, {wanted} sequences of {length} need {wanted * body:,}",
            "give more text, or lower --sequences or --sequence-length",
        )
    windows = stream[: available * body].view(available, body)
    if request.sequences is not None:
        generator = torch.Generator().manual_seed(request.seed)
        windows = windows[torch.randperm(available, generator=generator)[:wanted]]
    prefix = torch.tensor(head, dtype=torch.long).expand(windows.shape[0], -1)
    return TokenBlock(torch.cat([prefix, windows], dim=1), corpus, text_digest)


def _mixture(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: TextRequest, names: Sequence[str]
) -> TokenBlock:
    """Sequences of several corpora in turn, so that a longer draw begins with a shorter one.

    A corpus that is named twice has two turns in each round and is drawn from once, so none of its sequences comes twice.
    """
    if request.sequences is None or request.sequences < len(names):
        raise CorpusError(
            f"{request.sequences or 'all'} sequences cannot be shared out among {len(names)} corpora", "raise --sequences"
        )
    turns = [names[position % len(names)] for position in range(request.sequences)]
    blocks = {
        name: load_corpus(model, tokenizer, replace(request, corpus=name, sequences=turns.count(name)))
        for name in dict.fromkeys(names)
    }
    drawn = {name: iter(block.tokens) for name, block in blocks.items()}
    rows = [row for name in turns for row in islice(drawn[name], 1)]  # evaluation takes what there is of a short one
    return TokenBlock(torch.stack(rows), request.corpus, digest(block.text_digest.encode() for block in blocks.values()))


def _documents(corpus: str, role: Role, data_dir: Path | None) -> Iterator[str]:
    path = Path(corpus)
    folder = data_folder(data_dir)
    if not path.exists() and corpus not in (*NAMED, *STATEMENTS) and folder is not None and (folder / corpus).exists():
        path = folder / corpus
    if corpus in NAMED and not path.exists():
        yield from _named_documents(corpus, role, folder)
    elif corpus in STATEMENTS and not path.exists():
        yield _statements(corpus, role, folder)
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
        if not files:
            raise CorpusError(f"folder `{corpus}` holds no text", f"fasc reads {', '.join(SUFFIXES)}")
        for file in files:
            yield from read_documents(file)
    elif path.is_file():
        yield from read_documents(path)
    else:
        raise UnknownNameError("corpus", corpus, ["self", *NAMED, *STATEMENTS], or_else=", or the path of a text file or folder")


def _named_documents(name: str, role: Role, folder: Path | None) -> Iterator[str]:
    source = NAMED[name]
    if folder is None:
        rows = _hub_documents(source, source.splits[role])
        documents: Iterable[str] = ["".join(rows)] if source.rows_are_lines else rows
        shared = len(set(source.splits.values())) == 1
    else:
        file = folder / source.files[role]
        if not file.is_file():
            raise CorpusError(
                f"data folder `{folder}` has no {source.files[role]}",
                f"without --data-dir and FASC_DATA, `{name}` is taken from the hub",
            )
        documents = read_documents(file)
        shared = len(set(source.files.values())) == 1
    for index, document in enumerate(documents):
        if not shared or (index % 2 == 0) == (role == "calibration"):
            yield document


def _statements(name: str, role: Role, folder: Path | None) -> str:
    """Every second fact, joined to one text."""
    negated = name.startswith("negated-")
    made = shipped_statements(negated=negated) if name.endswith("facts") else lama_statements(folder, read_rows, negated=negated)
    return " ".join(made[0 if role == "calibration" else 1 :: 2])


def _hub_documents(source: NamedCorpus, split: str) -> Iterator[str]:
    from datasets import load_dataset  # noqa: PLC0415 - slow to import, needed for the hub only
    from datasets.exceptions import DatasetsError  # noqa: PLC0415

    try:
        rows = load_dataset(source.hub[0], source.hub[1], split=split, streaming=True)
        for index, row in enumerate(rows):
            if index >= _HUB_DOCUMENTS:
                return
            yield _row_text(row, source.hub[0], index + 1)
    except (OSError, DatasetsError, ValueError) as problem:
        first = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise CorpusError(
            f"cannot load `{source.hub[0]}` from the hub: {first[:200]}",
            "give --data-dir (or FASC_DATA), a text file, or --corpus self",
        ) from problem


def read_documents(file: Path) -> Iterator[str]:
    """Documents of a text file (the whole file is one) or of a JSON-lines file (one per line).

    Raises:
        CorpusError: unreadable, not UTF-8, not JSON, or a line without text; names the file and the line.
    """
    try:
        if file.name.removesuffix(".gz").endswith(".jsonl"):
            for number, row in read_rows(file):
                yield _row_text(row, str(file), number)
        else:
            with _open(file) as stream:
                yield stream.read().decode("utf-8")
    except UnicodeDecodeError as problem:
        line = bytes(problem.object)[: problem.start].count(b"\n") + 1
        raise CorpusError(
            f"`{file}` line {line}: not UTF-8 (byte 0x{problem.object[problem.start]:02x})",
            "convert the file, e.g. `iconv -t UTF-8`",
        ) from problem


def read_rows(file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Objects of a JSON-lines file with their line numbers, from 1.

    Raises:
        CorpusError: unreadable, not UTF-8 or not JSON; names the line.
    """
    number = 0
    try:
        with _open(file) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as problem:
        raise CorpusError(
            f"`{file}` line {number}: not UTF-8 (byte 0x{problem.object[problem.start]:02x})",
            "convert the file, e.g. `iconv -t UTF-8`",
        ) from problem
    except json.JSONDecodeError as problem:
        raise CorpusError(f"`{file}` line {number}: not JSON ({problem.msg})", "one JSON object per line") from problem
    except (OSError, EOFError) as problem:
        raise CorpusError(f"cannot read `{file}`: {problem}", "check the path, its permissions and the download") from problem


def _open(file: Path):  # type: ignore[no-untyped-def]  # noqa: ANN202 - gzip and plain files share no type but this
    return gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb")


def _row_text(row: object, where: str, number: int) -> str:
    if isinstance(row, dict):
        for field in _FIELDS:
            if isinstance(row.get(field), str):
                return str(row[field])
        if isinstance(row.get("output"), str):
            return "\n".join(str(row[field]) for field in _INSTRUCTION if row.get(field))
    raise CorpusError(
        f"`{where}` line {number}: no text in it",
        f"each line needs a field {' or '.join(_FIELDS)}, or instruction/input/output",
    )


def _tokenize(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> Tensor:
    if not any(document.strip() for document in documents):
        raise CorpusError("the corpus is empty", "give a file with some text in it")
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if len(documents) == 1 or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return torch.tensor([token for ids in encoded for token in [*ids, *end]], dtype=torch.long)


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token, if this tokenizer begins every text with it."""
    first = tokenizer("a")["input_ids"][0]
    return [first] if first == tokenizer.bos_token_id else []
