"""lm-evaluation-harness and our own benchmarks agree item by item where both have the task."""

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'fasc[eval]'")

from fasc.errors import UsageError
from fasc.evaluation import get_benchmark
from fasc.evaluation.evaluate import Record, evaluate
from fasc.evaluation.harness import local_task
from tests.conftest import tiny_model
from tests.evaluation.benchmarks.test_files import QUESTION, ROWS, write

QUESTIONS = [QUESTION | {"question": f"Which of these is number {i}?", "answer": i % 4} for i in range(40)]
DATA = {
    "arc/easy_test.jsonl.gz": QUESTIONS,
    "piqa/valid.jsonl.gz": [row | {"choices": row["choices"][:2], "answer": row["answer"] % 2} for row in QUESTIONS],
    "hellaswag/valid_subset.jsonl.gz": [
        row | {"query": row["question"], "choices": [f"{row['choices'][0]}{' ' * (i % 9)}", *row["choices"][1:]]}
        for i, row in enumerate(QUESTIONS)
    ],
    "winogrande/valid.jsonl.gz": [
        {"sentence": f"Ann saw Bea {'x' * i} but _ left the house.", "choices": ["Ann", "Bea"], "answer": i % 2}
        for i in range(40)
    ],
    "blimp/blimp.jsonl.gz": [
        ROWS["blimp/blimp.jsonl.gz"][0] | {"good": f"She is{' x' * i}.", "bad": f"She are{' x' * i}."} for i in range(40)
    ],
    "mmlu/test.jsonl.gz": [row | {"subject": "high_school"} for row in QUESTIONS],
    "mmlu/dev.jsonl.gz": ROWS["mmlu/dev.jsonl.gz"],
    "lambada/test.jsonl.gz": [{"context": f"The last word {'of all ' * i}is", "target": "word"} for i in range(40)],
}


@pytest.fixture
def data(tmp_path):
    for name, rows in DATA.items():
        write(tmp_path, name, rows)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["arc_easy", "piqa", "hellaswag", "winogrande", "blimp", "mmlu", "lambada_openai"])
def test_both_give_the_same_answers_to_the_same_items(task, data, tokenizer, config):
    record = Record(keep=False)
    options = config(task, f"harness/{task}", data_dir=data, limit=None)
    scores = evaluate(tiny_model(), tokenizer, options, record=record)
    ours, theirs = ([one for one in scores if one.benchmark == name] for name in (task, f"harness/{task}"))
    by_metric = {one.metric: one for one in theirs}
    assert ours[0].value == pytest.approx(by_metric["accuracy"].value)
    assert ours[0].n == by_metric["accuracy"].n == 40
    for one in ours[1:]:
        if one.metric in by_metric:
            assert one.value == pytest.approx(by_metric[one.metric].value, rel=1e-3)
    right = [[one.right for one in record.outcomes[name]] for name in (task, f"harness/{task}")]
    assert right[0] == right[1]


def test_a_task_that_does_not_exist_gets_the_nearest_and_one_without_data_says_where_to_get_it(data, tokenizer, config):
    with pytest.raises(UsageError, match="did you mean `arc_easy`"):
        evaluate(tiny_model(), tokenizer, config("harness/arc_eazy", data_dir=data))
    assert local_task("arc_challenge", config("harness/arc_challenge", data_dir=data)) is None
    assert get_benchmark("gsm8k").name == "harness/gsm8k"
