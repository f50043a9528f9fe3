"""Reading stops when there is enough, and a draw stays the same."""

import json
import random

import pytest
import torch

from fasc.errors import CorpusError
from fasc.text import corpus, stream
from fasc.text.documents import Piece
from fasc.text.stream import TokenStream
from tests.text.load import load


@pytest.fixture
def long_file(tmp_path):
    """250,000 characters in which no window comes twice."""
    file = tmp_path / "long.txt"
    choose = random.Random(0)
    file.write_text("".join(f"{choose.random()} is {'no ' * choose.randrange(3)}number.\n" for _ in range(7500)))
    return file


@pytest.fixture
def short_stages(monkeypatch):
    monkeypatch.setattr(corpus, "STAGE", 60_000)


def overread(limit, length):
    """Documents that nobody may read beyond a limit."""
    for index in range(0, 10 * limit, length):
        assert index <= limit, "read too far"
        yield Piece(f"{index:>{length}}", f"line {index}")


@pytest.mark.parametrize("length", [10, 400, 9000, 100_000])
def test_no_more_is_read_than_the_stage_and_one_batch(tokenizer, length):
    tokens = TokenStream(tokenizer, overread(200_000 + 40_000 + length, length))
    tokens.read(200_000)
    assert tokens.characters >= 200_000
    assert not tokens.whole
    assert len(tokens) > tokens.characters - 2 * max(length, 8192)


def test_eight_sequences_of_an_endless_corpus_take_one_stage(tokenizer, monkeypatch):
    class Endless:
        def documents(self):
            return overread(corpus.STAGE + 100_000, 4000)

    monkeypatch.setattr(corpus, "STAGE", 500_000)
    monkeypatch.setattr(corpus, "find_source", lambda *_: Endless())
    block = load(tokenizer, "endless", sequences=8)
    assert not block.whole
    assert 500_000 <= block.characters < 600_000


def test_how_much_was_read_is_said(tokenizer, long_file, short_stages, capsys):
    block = load(tokenizer, long_file)
    assert not block.whole
    assert f"4 sequences from its first {block.characters:,} characters" in capsys.readouterr().err
    whole = load(tokenizer, long_file, sequences=None)
    assert whole.whole
    assert whole.characters == len(long_file.read_text())
    assert whole.text_digest != block.text_digest, "the digest is that of what was read"
    assert not capsys.readouterr().err


def test_a_corpus_shorter_than_a_stage_is_drawn_from_as_a_whole(tokenizer, text_file):
    """As it was before corpora were read in stages."""
    ids = tokenizer(text_file.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 16)
    expected = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(5))[:7]]
    assert torch.equal(load(tokenizer, text_file, sequences=7, seed=5).tokens, expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_longer_draw_begins_with_a_shorter_one_over_every_stage(tokenizer, long_file, short_stages, seed):
    """So the sequences after those that calibrate were never among them."""
    draws = [load(tokenizer, long_file, sequences=n, sequence_length=128, seed=seed) for n in (3, 400, 900, 1900)]
    assert draws[0].characters < draws[1].characters or draws[1].characters < draws[2].characters
    for shorter, longer in zip(draws, draws[1:], strict=False):
        assert torch.equal(longer.tokens[: len(shorter.tokens)], shorter.tokens)
    rows = {tuple(row) for row in draws[-1].tokens.tolist()}
    assert len(rows) == 1900, "without replacement"


def test_all_of_a_corpus_is_every_stage_in_order(tokenizer, long_file, short_stages):
    tokens = load(tokenizer, long_file, sequences=None, role="evaluation").tokens
    text = long_file.read_text()
    assert tokenizer.decode(tokens.flatten()) == text[: tokens.numel()]
    assert tokens.numel() > len(text) - 16


def test_a_limit_of_evaluation_is_at_most_what_there_is(tokenizer, long_file, short_stages):
    everything = load(tokenizer, long_file, sequences=None, role="evaluation").tokens
    assert len(load(tokenizer, long_file, sequences=10**6, role="evaluation").tokens) == len(everything)
    with pytest.raises(CorpusError, match="too short"):
        load(tokenizer, long_file, sequences=10**6)


def test_long_and_short_documents_are_each_ended_once(tokenizer):
    texts = ["a" * 10, "b" * 20_000, "", "c" * 8192, "d" * 8193, "e"]
    pieces = [Piece(text, "x") for text in texts[:1]]
    pieces += [Piece("b" * 5000, "x", last=False)] * 3 + [Piece("b" * 5000, "x")]
    pieces += [Piece(text, "x") for text in texts[2:]]
    tokens = TokenStream(tokenizer, iter(pieces))
    tokens.read()
    assert tokens.whole
    assert tokens.documents == 6
    assert tokenizer.decode(tokens.tokens()).split(tokenizer.eos_token) == [*texts, ""]


def test_text_is_read_aloud_if_it_takes_long(tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(stream, "_QUIET", -1.0)
    tokens = TokenStream(tokenizer, overread(400_000, 4000))
    tokens.read(300_000)
    assert "reading text" in capsys.readouterr().err


def test_the_memory_of_a_draw_is_that_of_its_stage(tokenizer, tmp_path, monkeypatch):
    """Of 12 MB of text, not ten times as much: a tokenizer needs some hundred bytes for each token that it returns at once."""
    import tracemalloc

    monkeypatch.setattr(corpus, "STAGE", 1_000_000)
    file = tmp_path / "big.jsonl"
    line = json.dumps({"text": "twelve megabytes of text " * 100}) + "\n"
    file.write_text(line * 5000)
    tracemalloc.start()
    load(tokenizer, file, sequences=8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12e6
