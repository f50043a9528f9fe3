"""A compressed model goes to the hub with its own card, and loads from what was uploaded."""

import shutil

import pytest
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

from fasc import collect, compress
from fasc.errors import UsageError
from tests.conftest import tiny_model


@pytest.fixture
def small(tokenizer, text_file):
    model = tiny_model()
    statistics = collect(model, tokenizer, corpus=text_file, sequences=8, sequence_length=16)
    return compress(model, statistics, param_fraction=0.8)


def test_what_is_uploaded_holds_our_card_and_loads(small, tokenizer, tmp_path, monkeypatch):
    class Commit:
        commit_url = "https://hub/owner/name/commit/1"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, tmp_path / repo_id)
        return Commit

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: None)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert small.push_to_hub("owner/name", tokenizer=tokenizer) == Commit.commit_url
    folder = tmp_path / "owner" / "name"
    assert "compressed with fasc" in (folder / "README.md").read_text(encoding="utf-8")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in small.model.parameters())


def test_a_refusal_of_the_hub_is_one_line(small, tokenizer, monkeypatch):
    def refuse(self, repo_id, **options):
        raise OSError("no connection")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(UsageError, match="`owner/name` could not be uploaded: no connection"):
        small.push_to_hub("owner/name", tokenizer=tokenizer)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="`a/b/c` could not be uploaded"):
        small.push_to_hub("a/b/c", tokenizer=tokenizer)
