"""Text becomes sequences, drawn by a seed."""

import gzip
import json
from dataclasses import replace

import pytest
import torch

from fasc.errors import CorpusError, UnknownNameError
from fasc.text.corpus import TextRequest, TokenBlock, load_corpus
from tests.text.load import load


def test_sequences_are_windows_of_the_text_drawn_by_the_seed(tokenizer, text_file):
    block = load(tokenizer, text_file)
    assert block.tokens.shape == (4, 16)
    text = text_file.read_text()
    for row in block.tokens:
        assert tokenizer.decode(row) in text
    assert torch.equal(block.tokens, load(tokenizer, text_file).tokens)
    other = load(tokenizer, text_file, seed=1)
    assert not torch.equal(block.tokens, other.tokens)
    assert other.text_digest == block.text_digest
    assert other.token_digest != block.token_digest
    everything = load(tokenizer, text_file, sequences=None, role="evaluation").tokens
    assert tokenizer.decode(everything.flatten()) == text[: everything.numel()]


def test_calibration_and_evaluation_parts_of_a_named_corpus_are_disjoint(tokenizer, tmp_path):
    (tmp_path / "c4").mkdir()
    documents = [f"document number {i} says {chr(97 + i) * 30} and no more" for i in range(10)]
    with gzip.open(tmp_path / "c4" / "c4_docs.jsonl.gz", "wt") as stream:
        stream.write("\n".join(json.dumps({"text": text}) for text in documents))
    parts = {}
    for role in ("calibration", "evaluation"):
        tokens = load(tokenizer, "c4", sequences=None, role=role, data_dir=tmp_path).tokens
        text = tokenizer.decode(tokens.flatten())
        parts[role] = {i for i in range(10) if f"document number {i} says" in text}
    assert parts["calibration"] == {0, 2, 4, 6, 8}
    assert parts["evaluation"] == {1, 3, 5, 7, 9}


def test_too_short_text_says_how_much_is_there_and_how_much_is_needed(tokenizer, text_file):
    with pytest.raises(CorpusError, match=r"too short: [\d,]+ tokens, 100000 sequences of 16 need 1,600,000"):
        load(tokenizer, text_file, sequences=100_000)
    assert load(tokenizer, text_file, sequences=100_000, role="evaluation").tokens.shape[0] > 100, "a limit is at most"


def test_unknown_names_suggest_the_nearest(tokenizer):
    with pytest.raises(UnknownNameError) as caught:
        load(tokenizer, "wikitxt2")
    assert "did you mean `wikitext2`?" in caught.value.hint


def test_a_data_folder_that_lacks_the_corpus_is_named(tokenizer, tmp_path):
    with pytest.raises(CorpusError, match="has no wikitext2/wiki.valid.raw.txt"):
        load(tokenizer, "wikitext2", data_dir=tmp_path)
    with pytest.raises(CorpusError, match="does not exist"):
        load(tokenizer, "wikitext2", data_dir=tmp_path / "nowhere")


def test_several_corpora_take_turns(model, tokenizer, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("zyx " * 400, encoding="utf-8")
    both = f"{text_file}, {other}"

    def load(corpus, sequences):
        return load_corpus(
            model, tokenizer, TextRequest(corpus=corpus, sequences=sequences, sequence_length=16, seed=0, role="calibration")
        )

    mixed = load(both, 7)
    one, two = load(str(text_file), 4), load(str(other), 3)
    assert torch.equal(mixed.tokens[0::2], one.tokens)
    assert torch.equal(mixed.tokens[1::2], two.tokens)
    assert torch.equal(load(both, 12).tokens[:7], mixed.tokens), "a longer draw begins with a shorter one"
    assert mixed.text_digest not in (one.text_digest, two.text_digest)
    weighted = load(f"{both},{other}", 7)
    assert torch.equal(weighted.tokens[0::3], load(str(text_file), 3).tokens)
    twice = weighted.tokens[[1, 2, 4, 5]]
    assert torch.equal(twice, load(str(other), 4).tokens), "a corpus named twice is drawn from once, without replacement"
    assert weighted.text_digest == mixed.text_digest
    request = TextRequest(corpus=both, sequences=10_000, sequence_length=16, seed=0, role="evaluation")
    whole = [len(load_corpus(model, tokenizer, replace(request, corpus=str(name))).tokens) for name in (text_file, other)]
    assert whole[0] != whole[1]
    assert len(load_corpus(model, tokenizer, request).tokens) == sum(whole), "evaluation takes what there is of a short corpus"
    with pytest.raises(CorpusError, match="cannot be shared out"):
        load(both, 1)


@pytest.mark.parametrize("corpus", ["", " ", ",", "\0", "x" * 5000, "no-such-name", "no/such.txt", "no/such/folder"])
def test_what_is_no_corpus_is_said_in_one_line(tokenizer, corpus):
    with pytest.raises((CorpusError, UnknownNameError)) as caught:
        load(tokenizer, corpus)
    assert "\n" not in str(caught.value)


def test_a_text_survives_the_disk_and_a_damaged_file_is_refused(tokenizer, text_file, tmp_path):
    block = load(tokenizer, text_file)
    file = tmp_path / "text.safetensors"
    block.save(file)
    again = TokenBlock.load(file)
    assert torch.equal(again.tokens, block.tokens)
    assert (again.corpus, again.text_digest, again.characters, again.whole) == (
        str(text_file), block.text_digest, len(text_file.read_text()), True
    )  # fmt: skip
    file.write_bytes(file.read_bytes()[:-8])
    for damaged in (file, tmp_path / "nothing", tmp_path):
        with pytest.raises(CorpusError, match="holds no text of ours"):
            TokenBlock.load(damaged)
