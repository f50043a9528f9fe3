"""One budget, many ways to spend it (benchmarks/budget.py): rows, and facts beside divergences."""

import argparse
import json
import sys

import pytest
import torch

from fasc.evaluation.paired import paired
from fasc.model.load import LoadedModel
from tests.conftest import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def budget(script):
    return script("budget")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Twelve facts of two relations, and some text under the names of the corpora."""
    rows = [
        {"relation": f"P{kind}", "relation_label": "", "cardinality": "N-1", "type": "place", "template": "[X] is in [Y] ."}
        | {"subject": f"s{number}", "object": "abcd"[number % 4], "uuid": f"{kind}{number}"}
        for kind in range(2)
        for number in range(6)
    ]
    (tmp_path / "lama").mkdir()
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "c4").mkdir()
    import gzip

    with gzip.open(tmp_path / "lama" / "trex.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    text = "".join(f"the number {number} comes before {number + 1}, and so on.\n" for number in range(120))
    for part in ("valid", "test"):
        (tmp_path / "wikitext2" / f"wiki.{part}.raw.txt").write_text(text)
    with gzip.open(tmp_path / "c4" / "c4_docs.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text[start : start + 400]}) + "\n" for start in range(0, 4000, 400))
    monkeypatch.setenv("FASC_DATA", str(tmp_path))
    return tmp_path


def _names(budget, patterns):
    return [row.name for row in budget._named(patterns, argparse.ArgumentParser())]


def test_rows_have_names_of_their_own_and_are_asked_for_by_name_or_pattern(budget):
    every = [row.name for row in budget.rows()]
    assert len(every) == len(set(every))
    assert _names(budget, "*") == every
    assert _names(budget, "params 0.8") == ["params 0.8"]  # and not "params 0.8, everything"
    assert _names(budget, "bits 8*; params 0.8; bits 8 alone") == ["bits 8 alone", "params 0.8"]  # in the order asked, once each


def test_a_row_that_does_not_exist_is_refused(budget, capsys):
    with pytest.raises(SystemExit):
        _names(budget, "params 0.8;bits 7 alone")
    assert "no row is named `bits 7 alone`" in capsys.readouterr().err


def test_a_model_beside_itself_neither_loses_nor_gains(budget, data):
    loaded = LoadedModel(tiny_model(), byte_tokenizer())
    first, second = budget.answers(loaded, 8), budget.answers(loaded, 8)
    found = paired("lama", ("one", "other"), second, first)
    assert (found.n, found.lost, found.gained, found.accuracy_difference, found.log_probability_difference) == (8, 0, 0, 0, 0)


def test_rows_carry_facts_of_the_compressed_model_beside_the_dense_one(budget, data, tmp_path, monkeypatch):
    dense = tiny_model()
    dense.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    out = tmp_path / "out.json"
    asked = ["--model", str(tmp_path / "dense"), "--rows", "params 0.6", "--facts", "10", "--out", str(out), "--device", "cpu"]
    asked += ["--sequences", "8", "--sequence-length", "32", "--windows", "2", "--context", "32"]
    monkeypatch.setattr(sys, "argv", ["budget.py", *asked])
    kept, carry_out = [], budget.carry_out

    def carried(model, *rest):
        carry_out(model, *rest)
        kept.append(model)

    monkeypatch.setattr(budget, "carry_out", carried)
    budget.main()
    row = json.loads(out.read_text())["rows"]["params 0.6"]
    facts, (small,) = row["facts"], kept
    answered, reference = (budget.answers(LoadedModel(one, byte_tokenizer()), 10) for one in (small, dense.eval()))
    log = torch.tensor([a.log_probability - b.log_probability for a, b in zip(answered, reference, strict=True)])
    assert facts["n"] == 10
    assert facts["reference_accuracy"] == pytest.approx(sum(one.right for one in reference) / 10)
    assert facts["accuracy"] == pytest.approx(sum(one.right for one in answered) / 10)
    assert facts["log_probability_difference"] == pytest.approx(float(log.mean()), abs=1e-4)
    assert abs(facts["log_probability_difference"]) > 1e-3  # the small model is another one
    assert row["scores"]["wikitext2"]["kl"] > 0


def test_a_row_is_read_off_the_line_through_the_others_of_its_kind(budget):
    def row(forecast, kl):
        return {"predicted_loss": forecast, "scores": {"wikitext2": {"kl": kl}, "c4": {"kl": kl}}}

    bits = {f"bits {number} alone": row(forecast, 1.3 * forecast**0.9) for number, forecast in enumerate((0.01, 0.05, 0.2, 0.6))}
    ranks = {"params 0.9": row(0.03, 0.06), "params 0.8": row(0.1, 0.2), "params 0.6": row(0.3, 0.9)}
    duplicate = {"params 0.6, everything": row(0.3, 0.9)}
    found = budget.left_out(bits | ranks | duplicate | {"flops 0.8, channels": row(0.2, 5.0)})
    assert set(found) == {*bits, *ranks}
    for name in bits:  # they lie on one line
        assert found[name]["ratio"] == pytest.approx(1)
    assert found["params 0.6"]["kl"] == pytest.approx(0.6)  # twice the forecast, as the two others were
    assert found["params 0.6"]["ratio"] == pytest.approx(1.5)


def test_a_second_row_is_trained_before_it_is_rounded(budget, data, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    out = tmp_path / "out.json"
    asked = ["--model", str(tmp_path / "dense"), "--rows", "bits 2.75 joint", "--train", "8", "--out", str(out)]
    asked += ["--sequences", "8", "--sequence-length", "32", "--windows", "2", "--context", "32"]
    monkeypatch.setattr(sys, "argv", ["budget.py", *asked])
    budget.main()
    rows = json.loads(out.read_text())["rows"]
    plain, trained = rows["bits 2.75 joint"], rows["bits 2.75 joint, trained before rounding"]
    assert trained["made_of"] == plain["made_of"]
    assert trained["file_bytes"] == pytest.approx(plain["file_bytes"], rel=1e-3), "trained weights are rounded like others"
    assert trained["training"]["tokens"] == 8 * 128
    assert trained["training"]["kl_after"] <= trained["training"]["kl_before"]
    assert trained["scores"]["c4"]["kl"] != plain["scores"]["c4"]["kl"]
