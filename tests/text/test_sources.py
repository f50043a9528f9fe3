"""What a corpus is called, and what stands for its content."""

import json
import os

import pytest

from fasc.errors import CorpusError, UnknownNameError
from fasc.text.sources import find_source, names_of, text_key


def test_a_key_is_of_the_content_and_not_of_the_path(tmp_path):
    one, two, other = (tmp_path / name for name in ("one.txt", "two.txt", "other.txt"))
    one.write_text("the same text")
    two.write_text("the same text")
    other.write_text("another text")
    keys = [text_key(str(file), "calibration") for file in (one, two, other)]
    assert keys[0] == keys[1] != keys[2]
    stat = one.stat()
    one.write_text("the same size")
    os.utime(one, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert text_key(str(one), "calibration") != keys[0], "whatever the clock says"


def test_the_key_of_a_folder_is_that_of_the_files_that_are_read(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("some text")
        (tmp_path / name / "y.jsonl").write_text("{}")
    (tmp_path / "b" / "z.png").write_text("no text")
    first = text_key(str(tmp_path / "a"), "calibration")
    assert first == text_key(str(tmp_path / "b"), "calibration")
    (tmp_path / "b" / "x.txt").write_text("other text")
    assert first != text_key(str(tmp_path / "b"), "calibration")
    assert not capsys.readouterr().err


def test_every_part_of_a_mixture_counts(tmp_path):
    (tmp_path / "x.txt").write_text("some text")
    file = str(tmp_path / "x.txt")
    keys = {text_key(corpus, "calibration", sampled_by="model") for corpus in (file, f"{file},self", f"self,{file}", "self")}
    assert len(keys) == 4
    assert text_key("self", "calibration", sampled_by="model") != text_key("self", "calibration", sampled_by="other")
    (tmp_path / "x.txt").write_text("more text")
    assert text_key(f"{file},self", "calibration", sampled_by="model") not in keys


def test_a_named_corpus_has_a_key_for_each_role(tmp_path):
    (tmp_path / "c4").mkdir()
    file = tmp_path / "c4" / "c4_docs.jsonl.gz"
    file.write_text(json.dumps({"text": "some"}))
    keys = [text_key("c4", role, tmp_path) for role in ("calibration", "evaluation")]
    assert keys[0] != keys[1]
    file.write_text(json.dumps({"text": "other"}))
    assert text_key("c4", "calibration", tmp_path) != keys[0]
    assert text_key("facts", "calibration") != text_key("negated-facts", "calibration") != text_key("facts", "evaluation")


def test_a_key_of_nothing_is_an_error(tmp_path):
    for corpus in (str(tmp_path / "none.txt"), "wikitext2"):
        with pytest.raises(CorpusError):
            text_key(corpus, "calibration", tmp_path)
    with pytest.raises(UnknownNameError):
        text_key("no-such-name", "calibration")


def test_a_path_with_a_comma_is_one_corpus_if_it_exists(tmp_path):
    file = tmp_path / "a,b.txt"
    assert names_of(str(file)) == [f"{tmp_path}/a", "b.txt"]
    file.write_text("x")
    assert names_of(str(file)) == [str(file)]


def test_a_path_beside_us_wins_over_a_name_and_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_source("facts", "calibration", None).name == "facts"
    (tmp_path / "facts").write_text("my own facts")
    assert find_source("facts", "calibration", None).path.name == "facts"
    assert find_source("~/facts", "calibration", None).path == tmp_path / "facts"


def test_a_relative_path_may_lie_in_the_data_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x.txt").write_text("text")
    assert find_source("deep/x.txt", "calibration", tmp_path).path == tmp_path / "deep" / "x.txt"
    with pytest.raises(CorpusError, match="does not exist"):
        find_source("deep/y.txt", "calibration", tmp_path)
