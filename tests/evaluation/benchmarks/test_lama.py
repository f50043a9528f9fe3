"""LAMA asks up to the object, among the objects of the relation."""

import gzip
import json

import pytest

from fasc.errors import CorpusError
from fasc.evaluation.benchmarks.lama import read_trex
from fasc.evaluation.evaluate import evaluate
from tests.conftest import tiny_model

CAPITALS = [
    {"relation": "P36", "type": "geographic", "template": "The capital of [X] is [Y] .", "subject": s, "object": o}
    for s, o in [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid")]
]
OBJECT_FIRST = {"relation": "P1", "type": "other", "template": "[Y] contains [X] .", "subject": "a", "object": "b"}


def write_trex(folder, rows):
    (folder / "lama").mkdir(parents=True)
    with gzip.open(folder / "lama" / "trex.jsonl.gz", "wt") as stream:
        stream.write("\n".join(json.dumps(row) for row in rows))
    return folder


def test_it_asks_up_to_the_object_among_the_relations_objects(tokenizer, config, tmp_path):
    folder = write_trex(tmp_path / "data", [*CAPITALS, OBJECT_FIRST])
    items = read_trex(folder / "lama" / "trex.jsonl.gz")
    assert [item.prompt for item in items] == [
        "The capital of France is",
        "The capital of Italy is",
        "The capital of Spain is",
    ]
    assert items[1].candidates == ("Paris", "Rome", "Madrid")
    assert items[1].answer == 1
    scores = evaluate(tiny_model(), tokenizer, config("lama", data_dir=folder))
    assert {score.metric for score in scores} == {"accuracy", "accuracy/type=geographic", "accuracy/relation=P36"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "lama/trex.jsonl.gz"),
        ([OBJECT_FIRST], "`lama` has no items"),
        ([*CAPITALS, {"relation": "P36", "template": "[X] is [Y]", "subject": "a"}], "line 4: no object"),
    ],
)
def test_data_that_cannot_be_asked_is_refused(tokenizer, config, tmp_path, rows, message):
    folder = tmp_path if rows is None else write_trex(tmp_path / "data", rows)
    with pytest.raises(CorpusError, match=message):
        evaluate(tiny_model(), tokenizer, config("lama", data_dir=folder))
