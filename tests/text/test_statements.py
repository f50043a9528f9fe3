"""Facts as sentences, plain and negated."""

import pytest

from fasc.errors import CorpusError
from fasc.text.corpus import TextRequest, load_corpus
from fasc.text.statements import negate, shipped_relations, shipped_statements


def test_negated_facts_are_the_same_facts_in_the_same_order():
    plain, negated = shipped_statements(negated=False), shipped_statements(negated=True)
    assert len(plain) == len(negated) == sum(len(relation["facts"]) for relation in shipped_relations().values())
    for one, other in zip(plain, negated, strict=True):
        assert one != other
        assert one.split()[-1] == other.split()[-1]
        assert any(word in other.split() for word in ("not", "never"))
        assert not any(word in one.split() for word in ("not", "never"))


@pytest.mark.parametrize(
    ("template", "opposite"),
    [
        ("[X] is part of [Y] .", "[X] is not part of [Y] ."),
        ("[X] plays [Y] music .", "[X] does not play [Y] music ."),
        ("[X] and [Y] are twin cities .", "[X] and [Y] are not twin cities ."),
        ("[Y] participated in the [X] .", None),
    ],
)
def test_templates_are_negated_by_rule(template, opposite):
    assert negate(template) == opposite


def test_corpora_of_facts_have_two_disjoint_parts(model, tokenizer, monkeypatch):
    monkeypatch.delenv("FASC_DATA", raising=False)
    request = {"corpus": "facts", "sequences": None, "sequence_length": 64, "seed": 0}
    parts = [load_corpus(model, tokenizer, TextRequest(role=role, **request)) for role in ("calibration", "evaluation")]
    assert parts[0].text_digest != parts[1].text_digest
    with pytest.raises(CorpusError, match=r"trex\.jsonl\.gz"):
        load_corpus(model, tokenizer, TextRequest(role="calibration", **request | {"corpus": "negated-lama"}))
