"""A long text has the tokens of one call, whatever the tokenizer and wherever the windows end."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fasc.text import windows
from fasc.text.windows import encode_long

WORDS = ["the", "quick", "brown", "fox", "don't", "1234", "x=3;", "Ärger", "你好世界", "🐙", "<eos>", "a" * 40, "—", "\t", "\n\n"]


def text_of(seed, length):
    choose = random.Random(seed)
    parts = []
    while sum(map(len, parts)) < length:
        parts += [choose.choice(WORDS), choose.choice([" ", " ", " ", "\n", "  ", ", ", "."])]
    return "".join(parts)


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )


def digits_apart():
    tokenizer, trainer = byte_level()
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    return tokenizer, trainer


def with_prefix():
    """Llama 2: a text begins with a space that is not there, and nothing is cut into words before merging."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return tokenizer, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer, trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)


def word_pieces():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)


@pytest.fixture(
    scope="module", params=[byte_level, digits_apart, with_prefix, unigram, word_pieces], ids=lambda make: make.__name__
)
def trained(request):
    backend, trainer = request.param()
    backend.train_from_iterator([text_of(seed, 500) for seed in range(20)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(windows, "WINDOW", 400)
    monkeypatch.setattr(windows, "_OVERLAP", 160)


@pytest.mark.parametrize("length", [0, 10, 399, 400, 401, 640, 641, 5000])
@pytest.mark.parametrize("part", [1, 37, 10_000])
def test_windows_give_the_tokens_of_one_call(trained, small_windows, length, part):
    for seed in range(3):
        text = text_of(seed, length)[:length]
        parts = [text[start : start + part] for start in range(0, len(text), part)]
        whole = trained(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert [token for ids in encode_long(trained, parts) for token in ids] == whole


def test_windows_of_one_long_word_lose_no_character(tokenizer, small_windows):
    """There is no place where the windows agree for sure; every character is still there once."""
    for text in ("a" * 3000, "ab" * 1500, "字" * 3000):
        ids = [token for part in encode_long(tokenizer, [text]) for token in part]
        assert ids == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def test_a_tokenizer_that_does_not_know_places_gets_whole_lines(small_windows):
    class Slow:
        is_fast = False

        def __call__(self, text, **_):
            seen.append(text)
            return {"input_ids": [ord(character) for character in text]}

    seen = []
    text = text_of(0, 3000)
    assert "".join(chr(token) for part in encode_long(Slow(), [text]) for token in part) == text
    assert all(len(part) <= 400 for part in seen)
    assert all(part.endswith("\n") or later.startswith(" ") for part, later in zip(seen, seen[1:], strict=False))


def test_few_windows_are_held_at_a_time(tokenizer):
    """Of a text without end."""
    read = 0

    def parts():
        nonlocal read
        while True:
            read += 1000
            yield "endless text " * 100

    stream = encode_long(tokenizer, parts())
    for _ in range(3):
        next(stream)
    assert read < 100_000
