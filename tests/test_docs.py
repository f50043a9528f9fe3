"""The documentation: its example runs, its links lead somewhere, its options exist."""

import re
import runpy
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

import fasc
from fasc.layouts import LAYOUTS
from fasc.linalg.decomposition import Factorization
from fasc.model.groups import Unit
from fasc.model.layers import Layer

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
RECORDS = {"log.md"}
"""Pages that say what was true when they were written."""

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"\bfasc ([a-z-]+)((?:[^`\n#]|\\\n)*)")
_OPTION = re.compile(r"(?<!\S)--[a-z][a-z-]+")


def relative(page):
    return str(page.relative_to(ROOT))


def is_record(page):
    return page.name in RECORDS or page.parent.name == "decisions"


def test_the_example_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(DOCS / "example.py"))
    printed = capsys.readouterr().out
    assert str(names["plan"]).splitlines()[0] in printed
    assert names["difference"] == 0
    assert names["loaded"].num_parameters() < names["dense"].num_parameters()
    assert names["small"] is not None and (tmp_path / "small" / "config.json").is_file()
    assert {score.benchmark for score in names["scores"]} == {"perplexity", "kl"}
    bounded = [score for score in names["scores"] if None not in (score.low, score.high)]
    assert {score.benchmark for score in bounded} == {"perplexity", "kl"}
    assert all(score.low <= score.value <= score.high for score in bounded)
    assert (tmp_path / "small-in-one-call" / "config.json").is_file()


def anchors(page):
    """Of the headings of a page, as GitHub and the site make them."""
    found = set()
    for heading in re.findall(r"^#{1,6} (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        plain = re.sub(r"[`*]", "", heading).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_link_leads_somewhere(page):
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in _LINK.findall(text):
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{relative(page)}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{relative(page)}: {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if not is_record(page) and page.name != "cli.md"], ids=relative)
def test_every_option_on_a_page_exists(page):
    sections = re.split(r"^## fasc ", (DOCS / "cli.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    options = {section.split()[0]: set(re.findall(r"--[a-z][a-z-]+", section)) for section in sections}
    every = set().union(*options.values())
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for verb, rest in _COMMAND.findall(text):
        if verb in options:
            assert set(_OPTION.findall(rest)) <= options[verb], f"{relative(page)}: fasc {verb} {rest.strip()}"
    for span in re.findall(r"`(--[^`]+)`", text):
        assert set(_OPTION.findall(span)) <= every, f"{relative(page)}: {span}"


def test_the_layout_of_the_how_to_stores_what_it_says_and_computes_the_product():
    code = re.search(
        r"^```python\n(.*?)^```", (DOCS / "adding-a-layout.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    try:
        exec(compile(code[1], "adding-a-layout.md", "exec"), {})
        twins = LAYOUTS["twins"]
        unit = Unit("q+k", (Layer("q", 12, 10, bias=False), Layer("k", 12, 6, bias=False)))
        draw = torch.Generator().manual_seed(0)
        up, down, bias, x = (torch.randn(size, generator=draw) for size in ((16, 4), (4, 12), (16,), (5, 12)))
        encoded = twins.encode(unit, Factorization(up=up, down=down, offset=torch.zeros(16)), bias, inputs=None)
        modules = twins.build(unit, 4, encoded.facts)
        for module, state in zip(modules, encoded.states, strict=True):
            module.load_state_dict(state)
        torch.testing.assert_close(torch.cat([module(x) for module in modules], dim=1), x @ (up @ down).mT + bias)
        torch.testing.assert_close(torch.cat([twins.dense(module)[0] for module in modules]), up @ down)
        assert sum(parameter.numel() for module in modules for parameter in module.parameters()) == twins.parameters(unit, 4)
        twins.check(unit, 4, encoded.facts)
    finally:
        LAYOUTS.remove("twins")


def test_the_reference_has_every_public_name():
    names = re.findall(r"^::: fasc\.(?:\w+\.)?(\w+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(names) == sorted(set(fasc.__all__))


def test_the_index_of_decisions_lists_every_page():
    index = (DOCS / "decisions" / "index.md").read_text(encoding="utf-8")
    for page in sorted((DOCS / "decisions").glob("0*.md")):
        title = re.sub(r"^# \d+\s*[:·]\s*", "", page.read_text(encoding="utf-8").splitlines()[0])
        assert f"[{page.name[:4]}]({page.name}) | {title} |" in index


def test_the_pages_name_the_model_that_was_measured():
    for page in (ROOT / "README.md", DOCS / "results.md", DOCS / "results-paper.md"):
        assert "SmolLM2-135M-Instruct, dequantised from Q4_1" in page.read_text(encoding="utf-8")
