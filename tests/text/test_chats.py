"""Chats are read as the model was trained to read them."""

import copy
import json

import pytest

from fasc.errors import CorpusError
from fasc.statistics.options import CalibrationConfig
from tests.text.load import load

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
)
QUESTION, ANSWER = "How high is it?", "Ninety metres."
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
CHATS = {
    "messages": {"messages": TURNS},
    "conversations": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "prompt and completion": {"prompt": QUESTION, "completion": ANSWER},
    "turns on both sides": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "instruction and output": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}, {"type": "image"}]}, TURNS[1]]},
}


@pytest.fixture
def chatty(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def text_of(tokenizer, tmp_path, row, **options):
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps(row))
    return tokenizer.decode(load(tokenizer, file, sequences=None, sequence_length=8, **options).tokens.flatten())


@pytest.mark.parametrize("kind", CHATS)
def test_a_chat_goes_through_the_tokenizers_template_however_it_is_written(chatty, tmp_path, kind):
    text = text_of(chatty, tmp_path, CHATS[kind])
    assert f"<user>{QUESTION}<assistant>{ANSWER}".startswith(text)
    assert len(text) > 32


@pytest.mark.parametrize("kind", CHATS)
def test_without_a_template_the_turns_are_lines_and_that_is_said(tokenizer, tmp_path, capsys, kind):
    text = text_of(tokenizer, tmp_path, CHATS[kind])
    assert f"{QUESTION}\n{ANSWER}".startswith(text)
    assert len(text) > 16
    assert capsys.readouterr().err.count("no chat template") == 1


def test_the_template_can_be_refused_or_required(chatty, tokenizer, tmp_path, capsys):
    assert "<user>" not in text_of(chatty, tmp_path, CHATS["messages"], chat_template=False)
    assert not capsys.readouterr().err
    with pytest.raises(CorpusError, match=r"chats.jsonl` line 1: a chat, and the tokenizer has no chat template"):
        text_of(tokenizer, tmp_path, CHATS["messages"], chat_template=True)
    assert CalibrationConfig().chat_template is None


def test_an_input_follows_its_instruction(chatty, tmp_path):
    row = {"instruction": "Sum up.", "input": "A long tale.", "output": "Short."}
    assert "<user>Sum up.\nA long tale.<assistant>Short.".startswith(text_of(chatty, tmp_path, row))


def test_plain_text_is_no_chat_and_text_wins(chatty, tmp_path):
    assert "plain words".startswith(text_of(chatty, tmp_path, {"text": "plain words", "messages": TURNS}))
    assert "only an output".startswith(text_of(chatty, tmp_path, {"output": "only an output"}))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user"}, {"content": 3}]}, "a turn has no role or no content"),
        ({"messages": ["hello"]}, "a turn has no role"),
        ({"conversations": [{"from": None, "value": "x"}]}, "a turn has no role"),
        ({"messages": []}, "no text in it"),
        ({"prompt": 3, "completion": "x"}, "neither text nor turns"),
        ({"messages": [{"role": "observation", "content": "x"}]}, "template refuses it .*no tools"),
    ],
)
def test_a_broken_chat_is_named_by_its_line(chatty, tmp_path, row, message):
    with pytest.raises(CorpusError, match=f"chats.jsonl` line 1: .*{message}"):
        text_of(chatty, tmp_path, row)


def test_a_named_corpus_is_plain_text_whatever_the_tokenizer(chatty, tmp_path):
    """Its draws are those of the papers, and of every result here."""
    (tmp_path / "alpaca").mkdir()
    row = json.dumps({"instruction": "Count to three.", "input": "", "output": "One, two, three."})
    (tmp_path / "alpaca" / "alpaca_subset.jsonl.gz").write_text("\n".join([row] * 4))
    text = chatty.decode(load(chatty, "alpaca", sequences=None, data_dir=tmp_path).tokens.flatten())
    assert text.startswith("Count to three.\nOne, two, three.")


def test_a_chat_that_its_template_ends_is_not_ended_again(chatty, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join([json.dumps(CHATS["messages"])] * 3 + [json.dumps({"text": "plain words"})] * 2))
    end = chatty.eos_token_id
    chat = len(f"<user>{QUESTION}<assistant>{ANSWER}")
    for template, counts in ((TEMPLATE, [chat, chat, chat, 11, 11]), (TEMPLATE + "{{ eos_token }}", [chat, chat, chat, 11, 11])):
        chatty.chat_template = template
        tokens = load(chatty, file, sequences=None, sequence_length=2).tokens.flatten()
        places = (tokens == end).nonzero().flatten().tolist()
        lengths = [after - before - 1 for before, after in zip([-1, *places], places, strict=False)]
        assert lengths == counts[: len(lengths)]
        assert len(lengths) >= 4
