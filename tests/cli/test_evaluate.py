"""``fasc evaluate``."""

import json

import pytest

from tests.cli.conftest import refused


def test_scores_are_printed_and_written_with_intervals(done, compressed, model_folder, text_file, tmp_path):
    scores = tmp_path / "scores.json"
    benchmarks = ["--benchmarks", "facts,perplexity,kl", "--corpus", text_file, "--context", "16", "--limit", "20"]
    out, err = done("evaluate", compressed, *benchmarks, "--dense", model_folder, "--json", scores)
    raw = json.loads(scores.read_text())
    assert raw["written_by"] == "fasc scores"
    assert raw["provenance"]["evaluation"]["limit"] == 20
    assert {"benchmark", "metric", "value", "low", "high", "n"} <= set(raw["scores"][0])
    assert {row["benchmark"] for row in raw["scores"]} == {"facts", "perplexity", "kl"}
    bounded = [row for row in raw["scores"] if row["low"] is not None and row["high"] is not None]
    assert {row["benchmark"] for row in bounded} == {"facts", "perplexity", "kl"}
    assert all(row["low"] <= row["value"] <= row["high"] for row in bounded)
    assert any(row["low"] < row["high"] for row in bounded)
    assert "facts" in out
    assert "warning" in err, "the text is the one it was calibrated on"


def test_kl_finds_the_dense_model_by_itself(done, compressed, model_folder, text_file):
    options = ["--benchmarks", "kl", "--corpus", text_file, "--context", "16", "--limit", "4"]
    assert done("evaluate", compressed, *options)[0] == done("evaluate", compressed, *options, "--dense", model_folder)[0]


def test_an_option_that_is_misspelt_is_refused_before_the_model_is_loaded(fasc, compressed, monkeypatch):
    monkeypatch.setattr("fasc.stages.evaluate.load", lambda _: pytest.fail("the model was loaded"))
    refused(fasc("evaluate", compressed, "--benchmarks", "fact"), "unknown benchmark `fact`", "did you mean `facts`?")
    refused(fasc("evaluate", compressed, "--windows", "0"), "--windows")


def test_layers_that_lie_on_disk_score_the_same(done, compressed, places, text_file):
    options = ["--benchmarks", "kl,perplexity", "--corpus", text_file, "--context", "16", "--limit", "4"]
    assert done("evaluate", compressed, *options, "--device-map", places)[0] == done("evaluate", compressed, *options)[0]


def test_a_dense_model_is_scored_without_the_divergence_from_itself(fasc, done, model_folder, text_file):
    out, err = done("evaluate", model_folder, "--corpus", text_file, "--context", "16", "--limit", "4")
    assert "perplexity" in out
    assert "kl is left out" in err
    refused(fasc("evaluate", model_folder, "--benchmarks", "kl", "--corpus", text_file), "--dense")


def test_a_card_keeps_the_scores_that_are_not_measured_again(done, compressed, text_file):
    card = compressed / "README.md"
    text = ["--corpus", text_file, "--context", "16"]

    def rows(name):
        return [line for line in card.read_text().splitlines() if line.startswith(f"| {name} |")]

    done("evaluate", compressed, "--benchmarks", "facts", "--limit", "40")
    facts = rows("facts")
    done("evaluate", compressed, "--benchmarks", "perplexity", *text, "--limit", "2")
    (first,) = rows("perplexity")
    done("evaluate", compressed, "--benchmarks", "perplexity", *text, "--limit", "2")
    assert rows("perplexity") == [first], "the same again stands once"
    done("evaluate", compressed, "--benchmarks", "perplexity", *text, "--limit", "4")
    assert first in rows("perplexity"), "another number of windows is another measurement"
    assert len(rows("perplexity")) == 2
    assert card.read_text().count("## Scores") == 1
    assert rows("facts") == facts


def test_a_file_of_scores_keeps_other_benchmarks_of_the_same_weights(fasc, done, compressed, model_folder, text_file, tmp_path):
    file, text = tmp_path / "scores.json", ["--corpus", text_file, "--context", "16", "--limit", "2"]

    def names():
        return [score["benchmark"] for score in json.loads(file.read_text())["scores"] if "=" not in score["metric"]]

    done("evaluate", compressed, "--benchmarks", "facts", "--limit", "40", "--json", file)
    done("evaluate", compressed, "--benchmarks", "perplexity", *text, "--json", file)
    assert names() == ["perplexity", "facts"]
    assert len(json.loads(file.read_text())["earlier"]) == 1
    _, err = done("evaluate", compressed, "--benchmarks", "facts", "--limit", "35", "--json", file)
    assert "held facts of another text, protocol or number of items: replaced" in err
    before = file.read_text()
    lines = refused(fasc("evaluate", model_folder, "--benchmarks", "perplexity", *text, "--json", file), "would be lost")
    assert len(lines) == 2, "before the work"
    plan = tmp_path / "plan.json"
    done("plan", model_folder, "--param-fraction", "0.8", "--json", plan)
    refused(fasc("evaluate", compressed, "--benchmarks", "perplexity", *text, "--json", plan), "holds the plan of fasc")
    assert file.read_text() == before


def test_a_card_keeps_what_a_user_has_written_into_it(done, compressed, text_file):
    card = compressed / "README.md"
    asked = ["--benchmarks", "perplexity", "--corpus", text_file, "--context", "16", "--limit", "2"]
    done("evaluate", compressed, *asked)
    quoted = "We write between `<!-- fasc: scores -->` and `<!-- fasc: end of scores -->`."
    own = ["our note", "    indented", "|bench|of ours|", "| mine | accuracy | 3 % | 10 | by hand |"]
    edited = card.read_text().replace("<!-- fasc: end of scores -->", "\n".join([*own, "<!-- fasc: end of scores -->"]))
    edited = edited.replace("<!-- fasc: scores -->", f"{quoted}\n\n<!-- fasc: scores -->")
    card.write_bytes(edited.replace("\n", "\r\n").encode())
    card.chmod(0o600)
    done("evaluate", compressed, *asked)
    done("evaluate", compressed, *asked)
    raw = card.read_bytes()
    lines = raw.decode().split("\r\n")
    assert [lines.count(line) for line in (quoted, *own)] == [1] * 5
    assert b"\n" not in raw.replace(b"\r\n", b"")
    assert card.stat().st_mode & 0o777 == 0o600
    card.write_bytes(b"M\xfcnchen\n")
    out, err = done("evaluate", compressed, *asked)
    assert "perplexity" in out
    assert "is not UTF-8 and stays as it is" in err
    assert card.read_bytes() == b"M\xfcnchen\n"
