"""Text becomes sequences; bad text becomes one clear line."""

import gzip
import json
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from fasc.text.corpus import TextRequest, load_corpus
from fasc.errors import CorpusError, UnknownNameError
from tests.conftest import tiny_model


def load(tokenizer, corpus, **options):
    settings = {"sequences": 4, "sequence_length": 16, "seed": 0, "role": "calibration"} | options
    return load_corpus(tiny_model(), tokenizer, TextRequest(corpus=str(corpus), **settings))


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


def test_json_lines_compressed_files_and_folders_are_read(tokenizer, tmp_path):
    rows = [
        {"text": "alpha beta gamma delta epsilon " * 3},
        {"instruction": "do it", "input": "", "output": "done and dusted " * 4},
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write(lines)
    plain = load(tokenizer, tmp_path / "a.jsonl", sequences=None).tokens
    assert torch.equal(plain, load(tokenizer, tmp_path / "b.jsonl.gz", sequences=None).tokens)
    assert tokenizer.eos_token_id in plain, "documents are separated"
    assert load(tokenizer, tmp_path, sequences=None).tokens.shape[0] >= 2 * plain.shape[0]


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


def test_text_sampled_from_the_model_follows_the_seed_and_leaves_the_random_state(tokenizer):
    model = tiny_model()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    block = load_corpus(model, tokenizer, TextRequest(corpus="self", sequences=5, sequence_length=12, seed=0, role="calibration"))
    assert torch.equal(torch.get_rng_state(), state)
    assert block.tokens.shape == (5, 12)
    assert (block.tokens[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(block.tokens, load(tokenizer, "self", sequences=5, sequence_length=12).tokens)
    assert not torch.equal(block.tokens, load(tokenizer, "self", sequences=5, sequence_length=12, seed=1).tokens)


def test_sampled_text_has_the_models_own_distribution(tokenizer):
    """One step from the first token: frequencies are the softmax of its logits, special tokens included."""
    model = tiny_model()
    tokens = load_corpus(
        model, tokenizer, TextRequest(corpus="self", sequences=4000, sequence_length=2, seed=0, role="calibration")
    ).tokens
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[0]])).logits[0, -1].softmax(-1)
    found = torch.bincount(tokens[:, 1], minlength=expected.shape[0]) / 4000
    assert (found - expected).abs().max() < 0.03


def test_sampled_text_is_at_temperature_one_whatever_the_models_own_settings_are(tokenizer):
    model = tiny_model()
    request = TextRequest(corpus="self", sequences=5, sequence_length=12, seed=0, role="calibration")
    plain = load_corpus(model, tokenizer, request)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=2,
        top_p=0.5,
        min_p=0.5,
        repetition_penalty=2.0,
        num_beams=2,
        eos_token_id=[1, 2, 3],
    )
    assert torch.equal(load_corpus(model, tokenizer, request).tokens, plain.tokens)


def test_too_short_text_says_how_much_is_there_and_how_much_is_needed(tokenizer, text_file):
    with pytest.raises(CorpusError, match=r"too short: [\d,]+ tokens, 100000 sequences of 16 need 1,600,000"):
        load(tokenizer, text_file, sequences=100_000)
    assert load(tokenizer, text_file, sequences=100_000, role="evaluation").tokens.shape[0] > 100, "a limit is at most"


@pytest.mark.parametrize("content", ["", "  \n \n"])
def test_empty_text_is_an_error(tokenizer, tmp_path, content):
    (tmp_path / "e.txt").write_text(content)
    with pytest.raises(CorpusError, match="empty"):
        load(tokenizer, tmp_path / "e.txt")


def test_bad_files_name_the_line(tokenizer, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"fine\nfine\ncaf\xe9\n")
    with pytest.raises(CorpusError, match=r"latin.txt` line 3: not UTF-8 \(byte 0xe9\)"):
        load(tokenizer, tmp_path / "latin.txt")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(CorpusError, match=r"latin.jsonl` line 2: not UTF-8"):
        load(tokenizer, tmp_path / "latin.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(CorpusError, match=r"broken.jsonl` line 2: not JSON"):
        load(tokenizer, tmp_path / "broken.jsonl")
    (tmp_path / "other.jsonl").write_text('{"title": "no text here"}\n')
    with pytest.raises(CorpusError, match=r"other.jsonl` line 1: no text"):
        load(tokenizer, tmp_path / "other.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}\n' * 100)[:30])
    with pytest.raises(CorpusError, match=r"cannot read `.*cut.jsonl.gz`"):
        load(tokenizer, tmp_path / "cut.jsonl.gz")


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
