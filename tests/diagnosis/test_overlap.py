"""Overlaps of subspaces against their chance level; the Hessian against autograd's own."""

import json
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fasc.statistics.collect import collect
from fasc.text.corpus import TextRequest, load_corpus
from fasc.text.statements import negate, shipped_relations, shipped_statements
from fasc.cli.app import main
from fasc.model.options import LayersConfig
from fasc.planning.options import MethodConfig
from fasc.statistics.options import CalibrationConfig
from fasc.diagnosis.curvature import compare_with_hessian, hessian_product, leading_eigenvectors
from fasc.diagnosis.diagnose import DEPENDENCE_NEEDS
from fasc.diagnosis.overlap import chance, compare_subspaces, overlap, reading_bases, summarise_overlaps
from fasc.errors import CorpusError, StatisticsError
from fasc.methods import METHODS
from fasc.model.groups import find_groups
from tests.conftest import tiny_model


def random_basis(d, k, generator):
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0]


def test_equal_spaces_overlap_wholly_and_orthogonal_ones_not_at_all():
    generator = torch.Generator().manual_seed(0)
    basis = random_basis(20, 20, generator)
    a, b = basis[:, :6], basis[:, 6:12]
    mixed = a @ torch.randn(6, 6, generator=generator, dtype=torch.float64)
    assert overlap(a, mixed) == pytest.approx(1)
    assert overlap(a, b) == pytest.approx(0, abs=1e-12)
    half = torch.cat([a[:, :3], b[:, :3]], dim=1)
    assert overlap(a, half) == pytest.approx(0.5)


@pytest.mark.parametrize(("d", "k"), [(16, 8), (40, 5)])
def test_random_spaces_overlap_by_chance(d, k):
    generator = torch.Generator().manual_seed(1)
    found = [overlap(random_basis(d, k, generator), random_basis(d, k, generator)) for _ in range(200)]
    assert sum(found) / len(found) == pytest.approx(chance(k, d), rel=0.05)


def measured(model, tokens, needs=METHODS["fasc"].needs):
    return collect(model, tokens, needs, calibration=CalibrationConfig(batch_tokens=160))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_same_text_chooses_the_same_subspaces_and_other_text_others(architecture, tokens):
    model = tiny_model(architecture)
    one, other = measured(model, tokens[:12]), measured(model, tokens[12:])
    options = MethodConfig(damping=1e-3)
    ours, theirs = reading_bases(model, one, options), reading_bases(model, other, options)
    rows = compare_subspaces(one, {"a": ours, "again": ours, "b": theirs}, [0.25, 1.0])
    short = {label: reading_bases(model, found, options, 0.25) for label, found in (("a", one), ("b", other))}
    for row in compare_subspaces(one, short, [0.25]):
        same = next(r for r in rows if (r["a"], r["b"], r["group"], r["rank"]) == ("a", "b", row["group"], row["rank"]))
        assert row["overlap"] == pytest.approx(same["overlap"], abs=1e-5), "bases need not be kept beyond the largest rank"
    assert len(rows) == len(one.groups) * 3 * 2
    for row in rows:
        if row["rank_fraction"] == 1.0 or {row["a"], row["b"]} == {"a", "again"}:
            assert row["overlap"] == pytest.approx(
                1 if row["rank"] == row["d"] or "again" in (row["b"],) else row["overlap"], abs=1e-6
            )
        assert -1e-6 <= row["overlap"] <= 1 + 1e-6
        assert row["chance"] == row["rank"] / row["d"]
    summary = {(row["a"], row["b"], row["rank_fraction"]): row for row in summarise_overlaps(rows)}
    assert summary["a", "again", 0.25]["above_chance"] == pytest.approx(1)
    assert summary["a", "b", 0.25]["overlap"] < 0.99
    assert summary["a", "b", 0.25]["low"] <= summary["a", "b", 0.25]["overlap"] <= summary["a", "b", 0.25]["high"]


def test_statistics_of_other_layers_are_refused(model, tokens):
    some = collect(model, tokens, METHODS["fasc"].needs, layers=LayersConfig(include=("*.mlp.*",)))
    with pytest.raises(StatisticsError, match="other layers"):
        compare_subspaces(measured(model, tokens), {"b": reading_bases(model, some, MethodConfig())}, [0.5])


@pytest.mark.parametrize("kind", ["q_proj+k_proj+v_proj", "down_proj"])
def test_the_product_is_that_of_the_whole_hessian_with_signs(kind, tokens):
    model = tiny_model().double()
    text = tokens[:1, :4]
    group = next(one for one in find_groups(model, LayersConfig()) if one.kind == kind and one.block == 1)

    def loss(shift):
        handles = [
            model.get_submodule(layer.name).register_forward_pre_hook(lambda _m, args: (args[0] + shift, *args[1:]))
            for layer in group.layers
        ]
        logits = model(input_ids=text, use_cache=False).logits
        for handle in handles:
            handle.remove()
        return torch.nn.functional.cross_entropy(logits[0, :-1], text[0, 1:], reduction="sum")

    d = group.d_in
    with sdpa_kernel(SDPBackend.MATH):
        whole = torch.autograd.functional.hessian(loss, torch.zeros(1, 4, d, dtype=torch.float64)).view(4, d, 4, d)
    vector = torch.randn(d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    diagonal = sum(whole[t, :, t] for t in range(4)) @ vector / 4
    draws, total = 64, torch.zeros(d, dtype=torch.float64)
    for seed in range(draws):
        signs = (torch.randint(2, (1, 4, 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1).double().view(4)
        expected = torch.einsum("t,tisj,s,j->i", signs, whole, signs, vector) / 4
        with hessian_product(model, text, group, seed=seed) as product:
            found = product(vector)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # norms compute in float32
        total += found
    spread = float((total / draws - diagonal).norm() / diagonal.norm())
    assert spread < 0.5
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_lanczos_finds_the_leading_eigenvectors():
    generator = torch.Generator().manual_seed(0)
    basis = random_basis(30, 30, generator)
    values = torch.linspace(-3, 8, 30, dtype=torch.float64)
    matrix = basis @ torch.diag(values) @ basis.mT
    found, vectors = leading_eigenvectors(lambda v: matrix @ v, 30, 4, what="a test")
    torch.testing.assert_close(found, values.flip(0)[:4], rtol=1e-3, atol=1e-3)
    assert overlap(vectors, basis[:, -4:]) == pytest.approx(1, abs=1e-4)


def test_the_comparison_with_the_hessian_names_every_group(model, tokens):
    statistics = measured(model, tokens, DEPENDENCE_NEEDS)
    names = list(statistics.groups)[-2:]
    rows = compare_with_hessian(model, statistics, tokens[:4], names, 5)
    assert [row["group"] for row in rows] == names
    for row in rows:
        assert 0 <= row["fisher"] <= 1 + 1e-9
        assert row["chance"] == 5 / statistics.groups[row["group"]].group.d_in
        assert row["eigenvalues"] == sorted(row["eigenvalues"], reverse=True)


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


def test_the_verb_compares_corpora_and_seeds(model_folder, text_file, tmp_path, monkeypatch, capsys):
    out = tmp_path / "overlap.json"
    arguments = ["subspace-overlap", model_folder, "--corpora", f"{text_file},facts", "--seeds", "0,1", "--sequences", "20"]
    arguments += ["--sequence-length", "16", "--damping", "1e-3", "--hessian", "3", "--hessian-groups", "2", "--json", out]
    monkeypatch.setattr(sys, "argv", ["fasc", *map(str, arguments)])
    monkeypatch.setattr("fasc.cli.app.INTERRUPT.install", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code, capsys.readouterr().err
    found = json.loads(out.read_text())
    assert len(found["summary"]) == 6 * 3
    assert len(found["hessian"]) == 2
    assert "chance" in capsys.readouterr().out
