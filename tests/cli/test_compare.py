"""``fasc compare``: item by item, into the card as well, refused before the work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fasc.errors import UsageError
from fasc.evaluation.compared import Compared
from fasc.evaluation.options import EvaluationConfig
from fasc.model.options import ModelConfig
from fasc.reporting.kept_card import with_section, write_certificates
from fasc.stages.compare import compare
from fasc.stages.emergence import of_checkpoints
from fasc.stages.evaluate import evaluate
from fasc.statistics.options import CalibrationConfig
from tests.conftest import byte_tokenizer, tiny_model


@pytest.fixture
def models(tmp_path, tokenizer):
    folders = []
    for seed in range(3):
        folder = tmp_path / f"m{seed}"
        tiny_model(seed=seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(str(folder))
    return folders


def fasc(*arguments):
    return subprocess.run([sys.executable, "-m", "fasc", *map(str, arguments)], capture_output=True, text=True, check=False)


def test_it_prints_writes_and_draws(models, tmp_path):
    done = fasc(
        "compare", *models[1:], "--dense", models[0], "--benchmarks", "facts", "--limit", 60,
        "--json", tmp_path / "c.json", "--figure", tmp_path / "c.png",
        "--report", tmp_path / "c.html",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "lost" in done.stdout
    found = json.loads((tmp_path / "c.json").read_text())
    assert [(one["model"], one["reference"]) for one in found["pairs"]] == [
        (models[1], models[0]),
        (models[2], models[0]),
        (models[1], models[2]),
    ]
    assert all(one["lost"] >= 0 and one["n"] == 60 for one in found["pairs"])
    page = (tmp_path / "c.html").read_text()
    assert "What was kept, item by item" in page and "facts, n = 60" in page
    assert all(f"<td>{one['verdict']}</td>" in page for one in found["pairs"])
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_compared_is_refused(models, tmp_path):
    config = EvaluationConfig(benchmarks=("facts",), limit=5)
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(models[:1], config)
    with pytest.raises(UsageError, match="named twice"):
        compare([models[0], models[0]], config)
    other = byte_tokenizer()
    other.add_tokens(["another"])
    other.save_pretrained(models[1])
    (Path(models[0]) / "model.safetensors").unlink()  # seen before weights are read
    with pytest.raises(UsageError, match="different tokenizers"):
        compare(models[:2], config)
    with pytest.raises(UsageError, match="different tokenizers"):
        evaluate(models[1], benchmarks="kl", dense=models[0])
    with pytest.raises(UsageError, match="different tokenizers"):
        of_checkpoints(models[:2], CalibrationConfig(), config, ModelConfig())


def test_the_perplexity_of_every_model_is_printed_with_its_text_and_stands_on_the_page(models, text_file, tmp_path):
    page = tmp_path / "page.html"
    text = ["--corpus", text_file, "--context", 16, "--windows", 2]
    done = fasc("compare", *models[:2], "--benchmarks", "perplexity", *text, "--no-card", "--report", page)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "│ perplexity" in line]
    assert [row.split("│")[1].strip() for row in rows] == ["m0", "m1"]
    assert "too few items to tell" in " ".join(done.stdout.split()), "of two windows nobody can tell"
    assert "<h3>scores</h3>" in page.read_text()


def test_a_model_that_is_not_there_is_said_as_everywhere(models):
    done = fasc("compare", models[0], "owner/nothing", "--benchmarks", "facts", "--no-card")
    assert done.returncode == 2
    assert "`owner/nothing`" in done.stderr
    assert "give a local folder, or connect to the hub" in " ".join(done.stderr.split())
    done = fasc("compare", models[0], "nothing", "--benchmarks", "facts", "--no-card")
    assert "unknown model `nothing`" in done.stderr


def test_the_divergence_of_each_model_is_printed(models, text_file):
    done = fasc("compare", *models[:2], "--benchmarks", "kl", "--corpus", text_file, "--context", 16, "--windows", 2, "--no-card")
    assert done.returncode == 0, done.stderr
    assert "scores" in done.stdout
    assert [line.split("│")[1].strip() for line in done.stdout.splitlines() if "│ kl/p99" in line] == ["m1"]
    assert "McNemar" not in done.stdout, "nothing is paired"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("emergence", "--people", 5, "--checkpoints", "a,b"), "--people means nothing beside --checkpoints"),
        (("emergence", "--limit", 5), "--limit means nothing without --checkpoints"),
        (("validate", "m", "--limit", 5), "--limit means nothing without --benchmarks"),
        (("run", "r.toml", "--keep"), "--keep means nothing without --verdicts"),
        (("run", "r.toml", "--verdicts", "--model", "m"), "--model means nothing beside --verdicts"),
        (("compress", "m", "--out", "o", "--selection-else", "svd2"), "--selection-else means nothing beside --selection none"),
    ],
)
def test_what_would_be_passed_over_is_refused(arguments, message):
    done = fasc(*arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())


def test_a_comparison_without_pairs_leaves_the_card_as_it_was(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    write_certificates(Compared(("dense", str(tmp_path)), {"dense": [], str(tmp_path): []}, []))
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_section_of_the_card_is_replaced_and_nothing_else():
    marks = ("<a>", "</a>")
    once = with_section("# Card\n\ntext\n", "<a>\n| one |\n</a>", marks)
    assert once == "# Card\n\ntext\n\n<a>\n| one |\n</a>\n"
    twice = with_section(once + "\nmore\n", "<a>\n| two |\n</a>", marks)
    assert twice == "# Card\n\ntext\n\n<a>\n| two |\n</a>\n\nmore\n"


def test_a_certificate_keeps_the_rows_of_benchmarks_that_are_not_asked_again(done, compressed, model_folder, text_file):
    card = compressed / "README.md"
    text = ["--corpus", text_file, "--context", "16", "--limit", "40"]

    def rows(name):
        section = card.read_text().partition("## What was kept of")[2]
        return [line for line in section.splitlines() if line.startswith(f"| {name} |")]

    done("compare", compressed, "--dense", model_folder, "--benchmarks", "facts,perplexity,kl", *text)
    facts = rows("facts")
    assert [len(rows(name)) for name in ("facts", "perplexity", "kl")] == [1, 1, 1]
    done("compare", compressed, "--dense", model_folder, "--benchmarks", "perplexity", *text)
    assert rows("facts") == facts
    assert [len(rows(name)) for name in ("facts", "perplexity", "kl")] == [1, 1, 1]
