"""Data sets of the hub, as `datasets` hands them over; nothing is downloaded here."""

import types

import datasets
import huggingface_hub
import pytest
import torch

from fasc.errors import CorpusError, UsageError
from fasc.text import corpus
from fasc.text.hub import HubSet, is_hub_id
from fasc.text.sources import text_key
from tests.text.load import load


class Hub:
    """What stands on the hub: id → configuration → split → rows."""

    def __init__(self):
        self.sets = {"owner/words": {"default": {"train": 40, "test": 9}}}
        self.read, self.sha = 0, "abc"

    def info(self, name):
        if name not in self.sets:
            raise huggingface_hub.errors.OfflineModeIsEnabled(f"cannot reach {name}\nand more")
        return types.SimpleNamespace(sha=self.sha)

    def rows(self, name, config=None, *, split, streaming):
        assert streaming
        count = self.sets[name][config or "default"][split]
        for index in range(count):
            self.read += 1
            yield {"text": f"{split} row {index} of {config} " * 3, "n": index}


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda _api, name, **_: hub.info(name))
    monkeypatch.setattr(datasets, "load_dataset", hub.rows)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: list(hub.sets[name]))
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: list(hub.sets[name][config]))
    monkeypatch.delenv("FASC_DATA", raising=False)
    return hub


def text_of(tokenizer, name, role="calibration"):
    return tokenizer.decode(load(tokenizer, name, sequences=None, role=role).tokens.flatten())


def test_train_calibrates_and_test_evaluates(tokenizer, hub):
    assert text_of(tokenizer, "owner/words").startswith("train row 0 of default")
    assert text_of(tokenizer, "owner/words", "evaluation").startswith("test row 0 of default")


def test_documents_of_a_single_split_take_turns(tokenizer, hub):
    hub.sets["owner/words"] = {"default": {"train": 10}}
    calibration, evaluation = (text_of(tokenizer, "owner/words", role) for role in ("calibration", "evaluation"))
    for index in range(10):
        assert (f"row {index} of" in calibration, f"row {index} of" in evaluation) == (index % 2 == 0, index % 2 == 1)


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("owner/words:test", "test row 0 of default"),
        ("owner/words:fr", "train row 0 of fr"),
        ("owner/words:fr:extra", "extra row 0 of fr"),
    ],
)
def test_a_configuration_a_split_or_both_can_be_named(tokenizer, hub, name, start):
    hub.sets["owner/words"]["fr"] = {"train": 5, "extra": 6}
    assert text_of(tokenizer, name).startswith(start)


def test_one_of_several_configurations_must_be_named(tokenizer, hub):
    hub.sets["owner/words"] = {"en": {"train": 3}, "fr": {"train": 3}}
    with pytest.raises(UsageError, match="2 configurations: en, fr") as caught:
        load(tokenizer, "owner/words")
    assert "owner/words:en" in caught.value.hint


def test_no_more_rows_are_downloaded_than_a_draw_needs(tokenizer, hub, monkeypatch):
    hub.sets["owner/words"]["default"]["train"] = 10**9
    monkeypatch.setattr(corpus, "STAGE", 20_000)
    load(tokenizer, "owner/words", sequences=8)
    assert hub.read < 1500


def test_all_of_a_data_set_is_its_first_documents_and_that_is_said(tokenizer, hub, monkeypatch, capsys):
    hub.sets["owner/words"]["default"]["train"] = 10**9
    monkeypatch.setattr(corpus, "_HUB_DOCUMENTS", 50)
    block = load(tokenizer, "owner/words", sequences=None)
    assert hub.read == 50
    assert not block.whole
    assert "sequences from its first" in capsys.readouterr().err


def test_rows_without_text_are_named(tokenizer, hub, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"text": "fine"}, {"picture": 3}]))
    with pytest.raises(CorpusError, match=r"`owner/words` row 2: no text in it \(fields: picture\)"):
        load(tokenizer, "owner/words")


def test_a_data_set_that_cannot_be_had_is_one_line(tokenizer, hub, monkeypatch):
    with pytest.raises(
        CorpusError, match=r"cannot load `owner/nothing` from the hub: cannot reach owner/nothing \(hint"
    ) as caught:
        load(tokenizer, "owner/nothing")
    assert "and more" not in str(caught.value)

    def broken(*_, **__):
        yield {"text": "fine"}
        raise RuntimeError("Dataset scripts are no longer supported")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(CorpusError, match="Dataset scripts are no longer supported"):
        load(tokenizer, "owner/words")
    with pytest.raises(CorpusError, match="cannot load `Salesforce/wikitext` from the hub"):
        load(tokenizer, "wikitext2")


def test_the_lines_of_wikitext_are_one_text(tokenizer, hub):
    hub.sets["Salesforce/wikitext"] = {"wikitext-2-raw-v1": {"train": 7, "test": 5}}
    block = load(tokenizer, "wikitext2", sequences=None)
    assert tokenizer.eos_token_id not in block.tokens
    rows = [row["text"] for row in hub.rows("Salesforce/wikitext", "wikitext-2-raw-v1", split="train", streaming=True)]
    assert "".join(rows).startswith(tokenizer.decode(block.tokens.flatten()))


def test_both_parts_of_a_named_corpus_with_one_split_are_disjoint(tokenizer, hub):
    hub.sets["tatsu-lab/alpaca"] = {"default": {"train": 12}}
    parts = [load(tokenizer, "alpaca", sequences=None, role=role).tokens for role in ("calibration", "evaluation")]
    assert not torch.equal(*parts)
    assert "row 1 of" not in tokenizer.decode(parts[0].flatten())


def test_a_key_follows_the_revision_where_the_hub_says_it(hub):
    key = text_key("owner/words", "calibration")
    assert key == text_key("owner/words", "calibration")
    assert key != text_key("owner/words:test", "calibration")
    hub.sha = "def"
    assert key != text_key("owner/words", "calibration")
    del hub.sets["owner/words"]
    assert text_key("owner/words", "calibration") == text_key("owner/words", "calibration"), "offline"


def test_ids_of_the_hub_have_an_owner_and_a_name():
    assert all(is_hub_id(name) for name in ("a/b", "a-b/c.d_e", "a/b:c", "a/b:c:d"))
    assert not any(is_hub_id(name) for name in ("a", "a/b/c", "/a/b", "a/b:", "a/b:c:d:e", "a b/c", "../x/y"))
    assert HubSet("a/b:c", "calibration").id == "a/b"
