"""LAMBADA: the last word of a passage."""

from collections.abc import Sequence

from fasc.evaluation.choices import score_continuations
from fasc.evaluation.files import benchmark_rows
from fasc.evaluation.limits import limited
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.outcome import Outcome
from fasc.evaluation.registry import Subject, benchmark
from fasc.evaluation.score import Score, accuracy, exponential, mean_interval

FILE = "lambada/test.jsonl.gz"


@benchmark("lambada_openai", reference="arXiv:1606.06031 (LAMBADA), OpenAI's text", files=(FILE,))
def lambada(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """LAMBADA: whether greedy decoding gives the last word of a passage, and its perplexity; needs --data-dir."""
    rows = limited(
        "lambada_openai", list(benchmark_rows("lambada_openai", FILE, config, {"context": str, "target": str})), config
    )
    pairs = [(row["context"], f" {row['target']}") for row in rows]
    scored = score_continuations(subject, pairs, ["lambada"] * len(pairs), "lambada_openai", config.batch_tokens)
    outcomes = [
        Outcome(f"{context}{target}", "lambada", "", "", one.greedy, one.log_probability)
        for (context, target), one in zip(pairs, scored, strict=True)
    ]
    subject.keep("lambada_openai", outcomes)
    losses = [-one.log_probability for one in scored]
    mean = sum(losses) / len(losses)
    low, high = map(exponential, mean_interval(losses))
    value = exponential(mean)
    protocol = "greedy decoding of the last word"
    scores = [accuracy("lambada_openai", "accuracy", [one.greedy for one in scored], protocol)]
    if value is not None:
        scores.append(
            Score("lambada_openai", "perplexity", value, low, high, len(losses), "exp of the mean loss of the whole word")
        )
    return scores
