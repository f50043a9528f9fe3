"""Every benchmark over a file of the data folder: asked as its protocol says, refused where the file is wrong."""

import gzip
import json

import pytest

from fasc.errors import CorpusError
from fasc.evaluation import BENCHMARKS
from fasc.evaluation.benchmarks.bbh import answers_only
from fasc.evaluation.benchmarks.kamel import TYPES, read_kamel
from fasc.evaluation.benchmarks.lama import read_google_re, read_pararel
from fasc.evaluation.benchmarks.mlama import read_mlama
from fasc.evaluation.benchmarks.mmlu import read_mmlu
from fasc.evaluation.benchmarks.nq import f1, normalised
from fasc.evaluation.evaluate import Record, evaluate
from tests.conftest import tiny_model

QUESTION = {"question": "Which is one?", "choices": ["one", "two", "three", "four"], "answer": 0}
TREX = [
    {"relation": "P36", "type": kind, "template": "The capital of [X] is [Y] .", "subject": s, "object": o}
    for kind in ("geographic", "taxonomic")
    for s, o in [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid")]
]
LANGUAGES = {"en": "[X] is in [Y]", "ja": "[X]は[Y]です"}
ROWS = {
    "blimp/blimp.jsonl.gz": [{"phenomenon": "a", "field": "syntax", "good": "She is here.", "bad": "She are here."}] * 3,
    "mmlu/dev.jsonl.gz": [QUESTION | {"subject": "high_school"}] * 5,
    "mmlu/test.jsonl.gz": [QUESTION | {"subject": "high_school"}] * 3,
    "arc/easy_test.jsonl.gz": [QUESTION] * 3,
    "arc/challenge_test.jsonl.gz": [QUESTION] * 3,
    "piqa/valid.jsonl.gz": [QUESTION | {"choices": ["this", "that"]}] * 3,
    "hellaswag/valid_subset.jsonl.gz": [{"query": "He", "choices": ["ran", "sat", "is", "was"], "answer": 1}] * 3,
    "winogrande/valid.jsonl.gz": [{"sentence": "Ann saw Bea but _ left.", "choices": ["Ann", "Bea"], "answer": 1}] * 3,
    "lambada/test.jsonl.gz": [{"context": "The last word is", "target": "word"}] * 3,
    "bbh/bbh.jsonl.gz": [{"task": "t", "input": "not True is", "target": target} for target in ("True", "False")]
    + [{"task": "long", "input": "sort", "target": f"a{i}"} for i in range(25)],
    "bbh/cot_prompts.jsonl.gz": [
        {"task": name, "prompt": "Do it.\n\nQ: one\nA: Think.\nMore. So the answer is 1.\n\nQ: two\nA: So the answer is 2."}
        for name in ("t", "long")
    ],
    "lama/trex.jsonl.gz": TREX,
    "lama/pararel_patterns.jsonl.gz": [
        {"relation": "P36", "pattern": pattern}
        for pattern in ("The capital of [X] is [Y].", "[X]'s capital is [Y].", "[Y] is the capital of [X].")
    ],
    "lama/google_re.jsonl.gz": [
        {"relation": "date_of_birth", "type": "temporal", "template": "[X] (born [Y]).", "subject": f"P{i}", "object": f"19{i}0"}
        for i in range(4)
    ],
    "kamel/test.jsonl.gz": [
        {"relation": "P1", "question": "How many has [S]?", "subject": f"S{i}", "objects": [str(i), str(i + 1)], "type": kind}
        for kind in TYPES
        for i in range(3)
    ],
    "mpararel/facts.jsonl.gz": [
        {
            "lang": lang,
            "relation": "P1",
            "subject": f"{lang}s{i}",
            "object": f"{lang}o{i % 2}",
            "sub_uri": f"Q{i}",
            "obj_uri": f"Q9{i % 2}",
        }
        for lang in LANGUAGES
        for i in range(4)
    ]
    + [{"lang": "en", "relation": "P1", "subject": "alone", "object": "here", "sub_uri": "Q7", "obj_uri": "Q8"}],
    "mpararel/patterns.jsonl.gz": [
        {"lang": lang, "relation": "P1", "pattern": pattern, "reviewed": True} for lang, pattern in LANGUAGES.items()
    ],
    "nq_open/dev.jsonl.gz": [{"question": f"who is number {i}", "answers": ["the one", "two"]} for i in range(9)],
}
FROM_FILES = sorted(name for name, one in BENCHMARKS.items() if one.files)


@pytest.fixture
def data(tmp_path):
    for name, rows in ROWS.items():
        write(tmp_path, name, rows)
    return tmp_path


def write(folder, name, rows):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wt", encoding="utf-8") as stream:
        stream.write("\n".join(json.dumps(row) for row in rows))


@pytest.mark.parametrize("name", FROM_FILES)
def test_it_gives_finite_scores_with_protocol_and_outcomes(name, data, tokenizer, config):
    record = Record(keep=False)
    shots = 2 if name == "bbh" else None
    scores = evaluate(tiny_model(), tokenizer, config(name, data_dir=data, shots=shots), record=record)
    assert scores[0].benchmark == name
    assert scores[0].protocol
    assert all(score.n > 0 and score.low is not None and score.low <= score.value <= score.high for score in scores)
    outcomes = record.outcomes[name]
    assert len({one.item for one in outcomes}) > 0
    assert sum(one.right for one in outcomes) / len(outcomes) == pytest.approx(scores[0].value)
    assert name == "blimp" or all(one.log_probability <= 0 for one in outcomes)


@pytest.mark.parametrize("name", FROM_FILES)
def test_a_missing_file_is_refused_before_anything_is_run(name, data, tokenizer, config):
    file = BENCHMARKS[name].files[0]
    (data / file).unlink()
    with pytest.raises(CorpusError, match=file):
        evaluate(None, tokenizer, config("facts", name, data_dir=data))


@pytest.mark.parametrize("name", FROM_FILES)
def test_a_row_without_its_fields_is_refused_with_its_line(name, data, tokenizer, config):
    for file in BENCHMARKS[name].files:
        write(data, file, [{"nothing": 1}])
    with pytest.raises(CorpusError, match=r"line 1: no "):
        evaluate(tiny_model(), tokenizer, config(name, data_dir=data))


@pytest.mark.parametrize("file", ["mmlu/test.jsonl.gz", "arc/easy_test.jsonl.gz", "winogrande/valid.jsonl.gz"])
def test_an_answer_that_is_no_choice_is_refused(file, data, tokenizer, config):
    write(data, file, [ROWS[file][0] | {"answer": 9}])
    name = {"mmlu": "mmlu", "arc": "arc_easy", "winogrande": "winogrande"}[file.split("/")[0]]
    with pytest.raises(CorpusError, match=r"answer 9 of \d choices"):
        evaluate(tiny_model(), tokenizer, config(name, data_dir=data))


def test_mmlu_puts_worked_questions_of_the_subject_first(data, config):
    none, two = read_mmlu(config("mmlu", data_dir=data))[0], read_mmlu(config("mmlu", data_dir=data, shots=2))[0]
    assert none.pairs[0][0].startswith("The following are multiple choice questions (with answers) about high school.\n\n")
    assert none.pairs[0][0].endswith("D. four\nAnswer:")
    assert two.pairs[0][0].count("Answer:") == 3
    assert [end for _, end in two.pairs] == [" A", " B", " C", " D"]


def test_bbh_leaves_the_thoughts_out():
    assert answers_only(ROWS["bbh/cot_prompts.jsonl.gz"][0]["prompt"], 2) == "Do it.\n\nQ: one\nA: 1\n\nQ: two\nA: 2\n\n"
    with pytest.raises(CorpusError, match="2 worked examples of 3"):
        answers_only(ROWS["bbh/cot_prompts.jsonl.gz"][0]["prompt"], 3)


def test_mlama_asks_the_same_facts_in_each_language_and_scores_what_follows(data, config):
    items = read_mlama(config("mlama", data_dir=data))
    by_language = {language: [one for one in items if one.type == language] for language in LANGUAGES}
    assert [one.subject for one in by_language["en"]] == [one.subject for one in by_language["ja"]]
    japanese = by_language["ja"][0]
    assert (japanese.prompt, japanese.suffix, japanese.space) == ("jas0は", "です", False)
    assert by_language["en"][0].prompt == "ens0 is in"
    assert "here" in by_language["en"][0].candidates
    assert len(read_mlama(config("mlama", data_dir=data, limit=3))) == 4  # two of each language


def test_kamel_takes_any_of_a_questions_objects_and_google_re_the_year(data, config):
    item = read_kamel(config("kamel", data_dir=data))[0]
    assert {item.candidates[one] for one in item.right} == {"0", "1"}
    assert item.prompt == "Question: How many has S0?\nAnswer:"
    assert read_google_re(config("google_re", data_dir=data))[1].prompt == "P1 (born"


def test_pararel_asks_each_fact_in_every_wording_that_ends_with_the_object(data, config):
    items = read_pararel(config("pararel", data_dir=data))
    assert [one.prompt for one in items[:2]] == ["The capital of France is", "France's capital is"]
    assert len(items) == 2 * len(TREX)


def test_relation_types_shares_the_limit_evenly(data, tokenizer, config):
    scores = evaluate(tiny_model(), tokenizer, config("relation_types", data_dir=data, limit=8))
    assert {one.metric.partition("=")[2]: one.n for one in scores if "type=" in one.metric} == dict.fromkeys(TYPES, 2)


@pytest.mark.parametrize(
    ("answer", "gold", "value"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0),
        ("tower", "eiffel tower", 2 / 3),
        ("a house", "tower", 0.0),
        ("the", "the", 0.0),
    ],
)
def test_f1_is_the_overlap_of_words_after_normalising(answer, gold, value):
    assert f1(answer, gold) == pytest.approx(value)
    assert normalised(normalised(answer)) == normalised(answer)
