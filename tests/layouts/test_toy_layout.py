"""A layout that no file of fasc knows goes all the way: plan, compress, save, load, merge, evaluate.

It is registered here and nowhere else. Its ranks are even, its structure has facts, it holds an index, and one layer of a unit reads
what another holds: all that a layout may do.
"""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import fasc
from fasc.errors import FascError, ModelError
from fasc.layouts import LAYOUTS, Encoded, FactoredLayout, Replacement, layout
from fasc.planning.plan import Plan
from tests.conftest import logits

NAME = "toy-halves"


class Halves(Replacement):
    """``x ↦ Σ up_i down_i x`` for two halves of the directions, the outputs in an order of their own."""

    def __init__(self, d_in, d_out, rank, first):
        super().__init__(d_in, d_out)
        self.downs = nn.ModuleList([nn.Linear(d_in, part, bias=False) for part in (first, rank - first)])
        self.ups = nn.ModuleList(
            [nn.Linear(part, d_out, bias=position == 0) for position, part in enumerate((first, rank - first))]
        )
        self.register_buffer("turned", torch.arange(d_out, dtype=torch.int32))

    def forward(self, x):
        return sum(up(down(x)) for up, down in zip(self.ups, self.downs, strict=True))[..., self.turned.long()]


class ToyHalves(FactoredLayout):
    """Two pairs of factors for each layer, and the order of the outputs."""

    extra_products = 3

    def ranks(self, unit, step):
        return range(2 * step, min(unit.d_in, unit.d_out), 2 * step)

    def parameters(self, unit, rank):
        return sum(rank * (unit.d_in + one.d_out) + 2 * one.d_out for one in unit.layers)

    def indices(self, unit, rank):
        return unit.d_out

    def multiply_adds(self, unit, rank):
        return sum(rank * (unit.d_in + one.d_out) for one in unit.layers)

    def encode(self, unit, factors, bias, inputs):
        rank = factors.down.shape[0]
        first, states, sizes = rank // 2 - 1 or 1, [], [one.d_out for one in unit.layers]
        for up, own in zip(factors.up.split(sizes), bias.split(sizes), strict=True):
            state = {"ups.0.bias": own.flip(0), "turned": torch.arange(len(own) - 1, -1, -1, dtype=torch.int32)}
            for position, part in enumerate((slice(first), slice(first, None))):
                state |= {f"downs.{position}.weight": factors.down[part], f"ups.{position}.weight": up[:, part].flip(0)}
            states.append(state)
        return Encoded(states, {"first": first})

    def build(self, unit, rank, facts):
        return [Halves(unit.d_in, one.d_out, rank, facts["first"]) for one in unit.layers]

    def check(self, unit, rank, facts):
        super().check(unit, rank, facts)
        first = facts.get("first")
        if type(first) is not int or not 0 < first < rank:
            raise ModelError(f"`{unit.name}`: the first half of rank {rank} is {first}", "the checkpoint is damaged")

    def dense(self, module):
        product = sum(up.weight @ down.weight for up, down in zip(module.ups, module.downs, strict=True))
        order = module.turned.long()
        return product[order], module.ups[0].bias[order]


@pytest.fixture
def toy():
    layout(NAME)(ToyHalves)
    yield LAYOUTS[NAME]
    LAYOUTS.remove(NAME)


@pytest.fixture
def corpus(text_file):
    return {"corpus": str(text_file), "sequences": 24, "sequence_length": 20}


@pytest.fixture
def statistics(model_folder, corpus):
    return fasc.collect(*fasc.load_model(model_folder), corpus["corpus"], sequences=24, sequence_length=20)


@pytest.fixture
def small(toy, statistics, model_folder):
    model, tokenizer = fasc.load_model(model_folder)
    plan = fasc.plan(model, statistics, param_fraction=0.6, layouts=("dense", NAME), damping=1e-2)
    compressed = fasc.compress(model, statistics, plan)
    return compressed, tokenizer


def test_a_plan_takes_it_at_ranks_that_it_has_and_weighs_it(toy, statistics, model_folder, tmp_path):
    model, _ = fasc.load_model(model_folder)
    plan = fasc.plan(model, statistics, param_fraction=0.6, layouts=("dense", NAME), damping=1e-2)
    assert {edit.layout for edit in plan.edits} == {NAME}
    assert all(edit.rank % 2 == 0 for edit in plan.edits)
    assert 0.55 < plan.totals["param_fraction"] <= 0.6
    assert plan.predicted_loss > 0
    assert NAME in str(plan)
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan


def test_it_competes_with_the_others_by_its_size(toy, statistics, model_folder):
    """It is larger than every other layout at each rank; nobody takes it who may take another."""
    model, _ = fasc.load_model(model_folder)
    plan = fasc.plan(model, statistics, param_fraction=0.6, damping=1e-2)
    assert NAME in [one.name for one in fasc.layouts.layouts_named(None)]
    assert NAME not in {getattr(edit, "layout", None) for edit in plan.edits}


def test_the_model_is_made_of_it_and_weighs_what_the_plan_says(small):
    compressed, _ = small
    made = [module for module in compressed.model.modules() if isinstance(module, Halves)]
    assert len(made) == sum(len(edit.layers) for edit in compressed.plan.edits) > 0
    orders = sum(module.turned.numel() for module in made)
    assert compressed.model.num_parameters() + orders == compressed.plan.totals["parameters"]
    assert all(edit.facts["first"] >= 1 for edit in compressed.plan.edits)


def test_it_computes_what_factors_compute(small, statistics, model_folder, tokens):
    compressed, _ = small
    model, _ = fasc.load_model(model_folder)
    edits = [edit.model_copy(update={"layout": "merged", "facts": None}) for edit in compressed.plan.edits]
    other = fasc.compress(model, statistics, compressed.plan.with_edits(edits))
    torch.testing.assert_close(logits(other.model, tokens), logits(compressed.model, tokens), rtol=0, atol=1e-3)


def test_propagation_stores_it_and_goes_on_with_it(toy, statistics, model_folder, tokens, tmp_path):
    from fasc.compression.compress import carry_out

    runs = []
    for _ in range(2):
        model, _ = fasc.load_model(model_folder)
        plan = fasc.plan(model, statistics, param_fraction=0.6, layouts=("dense", NAME), damping=1e-2)
        carry_out(model, statistics, plan, propagate=True, work=tmp_path / "work")
        runs.append(logits(model, tokens))
    assert torch.equal(*runs)


def test_it_is_saved_and_loaded_by_plain_transformers(small, tokens, tmp_path):
    compressed, tokenizer = small
    folder = compressed.save(tmp_path / "small", tokenizer=tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded, tokens), logits(compressed.model, tokens))
    assert AutoTokenizer.from_pretrained(folder).vocab_size == tokenizer.vocab_size


def test_where_nobody_registers_it_loading_ends_in_one_line(small, tmp_path):
    compressed, tokenizer = small
    folder = compressed.save(tmp_path / "small", tokenizer=tokenizer)
    LAYOUTS.remove(NAME)
    with pytest.raises(FascError, match=f"`{NAME}`") as problem:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(problem.value)


def test_facts_that_its_check_refuses_are_refused_on_loading(small, tmp_path):
    compressed, tokenizer = small
    folder = compressed.save(tmp_path / "small", tokenizer=tokenizer)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["edits"][0]["facts"]["first"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is 99"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_it_merges_into_an_ordinary_checkpoint(toy, model_folder, corpus, tokens, tmp_path):
    merged = fasc.compress_checkpoint(
        model_folder, out=tmp_path / "merged", merge=True, param_fraction=0.6, layouts=("dense", NAME), damping=1e-2, **corpus
    )
    assert {edit.layout for edit in merged.plan.edits} == {NAME}
    LAYOUTS.remove(NAME)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(loaded.config, "quantization_config")
    assert torch.equal(logits(loaded, tokens), logits(merged.model, tokens))


def test_it_is_evaluated_like_any_checkpoint(small, model_folder, text_file, tmp_path):
    compressed, tokenizer = small
    folder = compressed.save(tmp_path / "small", tokenizer=tokenizer)
    options = {"benchmarks": ("perplexity", "kl"), "corpus": str(text_file), "context": 16, "windows": 8, "limit": 8}
    scores = {score.benchmark: score for score in fasc.evaluate(folder, dense=model_folder, **options)}
    assert scores["kl"].value > 0
    assert scores["perplexity"].value > 1


def test_the_command_line_takes_it(toy, model_folder, text_file, tmp_path):
    from typer.testing import CliRunner

    from fasc.cli.app import app

    words = ["compress", str(model_folder), "--corpus", str(text_file), "--sequences", "16", "--sequence-length", "16"]
    words += ["--param-fraction", "0.6", "--layouts", f"dense,{NAME}", "--damping", "0.01", "--out", str(tmp_path / "small")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    edits = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]["edits"]
    assert {edit["layout"] for edit in edits} == {NAME}
