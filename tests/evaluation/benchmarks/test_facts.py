"""The shipped facts are many, plain and answerable."""

from fasc.evaluation.benchmarks.facts import read_facts
from fasc.evaluation.evaluate import evaluate
from tests.conftest import tiny_model


def test_facts_are_many_plain_and_answerable():
    items = read_facts()
    relations = {item.relation for item in items}
    assert len(items) >= 400
    assert len(relations) >= 10
    assert len({(item.relation, item.prompt) for item in items}) == len(items)
    for item in items:
        assert "[X]" not in item.prompt
        assert item.prompt == item.prompt.strip()
        assert len(item.candidates) == len(set(item.candidates)) >= 5


def test_facts_report_every_relation_and_their_limit(tokenizer, config):
    scores = evaluate(tiny_model(), tokenizer, config("facts", limit=30))
    assert scores[0].metric == "accuracy"
    assert scores[0].n == 30
    by_relation = [score for score in scores if score.metric.startswith("accuracy/relation=")]
    assert sum(score.n for score in by_relation) == 30
    assert scores == evaluate(tiny_model(), tokenizer, config("facts", limit=30))


def test_fewer_than_thirty_items_are_said_to_be_few(tokenizer, config, capsys):
    evaluate(tiny_model(), tokenizer, config("facts", limit=30))
    assert "warning" not in capsys.readouterr().err
    evaluate(tiny_model(), tokenizer, config("facts", limit=29))
    assert "`facts` asks 29 items" in capsys.readouterr().err
