"""What the page computes from files: fronts, places in the model, sentences, rows."""

import random
from dataclasses import replace

import pytest

from fasc.edits.factor import Factor
from fasc.edits.quantise import Quantise
from fasc.outputs import is_ours
from fasc.reporting.entries import Entry, Rival
from fasc.reporting.page.cells import fields_of
from fasc.reporting.page.comparison import comparison_of, score_cell
from fasc.reporting.page.pareto import front_of, pareto_charts, span_of
from fasc.reporting.page.rows import highlights, models_of
from fasc.reporting.page.sources import Model, read_source
from fasc.reporting.page.spectra import spectra_of
from fasc.reporting.page.words import summary_of, title_of
from fasc.reporting.page.write import distinct
from tests.reporting.page.conftest import score


@pytest.mark.parametrize("rising", [False, True])
def test_the_front_holds_exactly_what_none_beats(rising):
    dice = random.Random(0)
    rows = [{"cost": dice.randrange(12), "value": dice.randrange(12)} for _ in range(60)]
    sign = -1 if rising else 1

    def beats(one, other):
        mine, theirs = (one["cost"], sign * one["value"]), (other["cost"], sign * other["value"])
        return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1]

    expected = {tuple(row.values()) for row in rows if not any(beats(other, row) for other in rows)}
    assert [tuple(row.values()) for row in front_of(rows, rising=rising)] == sorted(expected)


def test_equal_sizes_stand_on_an_axis_that_does_not_tell_them_apart():
    low, high = span_of([453.1, 453.2])
    assert low < 453.1 and high > 453.2 and high - low > 40


def test_the_heat_maps_hold_every_layer_and_the_whole_forecast(run):
    source = read_source(run)
    models = models_of([source])
    fields = {field.name: field for field in fields_of([source], models)}
    for model in models:
        if model.plan is None:
            continue
        losses = fields["loss"].subjects[model.name]
        assert sum(cell[2] for cell in losses) == pytest.approx(model.plan.predicted_loss, rel=1e-2)
        ranks = {(block, kind): value for block, kind, value, _ in fields["rank"].subjects[model.name]}
        assert len(ranks) == len(model.plan.layers)
        for edit in model.plan.edits:
            if isinstance(edit, Factor):
                for layer in edit.unit.layers:
                    assert ranks[layer.block, layer.kind] == pytest.approx(min(1, edit.rank / edit.unit.full_rank), rel=1e-3)
    assert {cell[:2] for cell in fields["rho"].subjects[source.name]} == {
        (row["block"], row["kind"]) for row in source.diagnosis["groups"]
    }


def test_bits_of_a_layer_that_is_not_rounded_are_those_of_its_type(run):
    model = read_source(run).models[1]
    one = model.plan.layers[0]
    rounded = Quantise(group=one.name, layers=(one.name,), maps=((one.d_in, one.d_out),), bits=4)
    made = replace(model, plan=model.plan.with_edits([rounded]))
    field = next(field for field in fields_of([], [made]) if field.name == "bits")
    found = {(block, kind): value for block, kind, value, _ in field.subjects[made.name]}
    assert found.pop((one.block, one.kind)) == 4
    assert set(found.values()) == {32} and len(found) == len(made.plan.layers) - 1


def test_spectra_fall_from_all_to_nothing(run):
    for methods in spectra_of(read_source(run)).values():
        assert set(methods) == {"fasc", "svd"}
        for curve in methods.values():
            assert curve[0] == 1 and curve[-1] == 0 and curve == sorted(curve, reverse=True)


def test_a_difference_inside_the_intervals_is_called_no_difference(run):
    models = models_of([read_source(run)])
    dense = models[0]
    entry = replace(models[1].entry, scores=[score("lama", "accuracy", 0.44)])
    near, far = replace(models[1], entry=entry), replace(models[1], entry=replace(entry, scores=[score("lama", "accuracy", 0.1)]))
    assert "overlap" in summary_of(near, [dense, near]).kept
    assert "lie apart" in summary_of(far, [dense, far]).kept
    slow = replace(entry, speeds=[{"what": "decode, batch 1", "ratio": 1.1, "low": 0.9, "high": 1.2}])
    assert "no difference that can be told" in summary_of(replace(near, entry=slow), [dense, near]).speed


def test_sentences_say_how_small_how_good_and_how_fast(run):
    models = models_of([read_source(run)])
    best = highlights(models)[0]
    words = title_of(best, models)
    assert f"weighs {best.bytes / best.dense_bytes:.0%}" in words and "right answers on lama" in words and "1.20 ×" in words
    assert "decode 1.20" in summary_of(best, models).speed.lower() and "faster" in summary_of(best, models).speed


def test_many_models_are_spoken_of_by_the_closest_the_smallest_and_the_fastest(run):
    models = models_of([read_source(run)])
    first = highlights(models)
    compressed = [model for model in models if not model.is_dense]
    assert len(compressed) == 4 and 1 <= len(first) <= 3
    assert first[0].name == "fasc@params0.8"
    assert min(compressed, key=lambda model: model.bytes).name in {model.name for model in first}


def test_a_merged_model_weighs_and_computes_what_the_dense_one_does(run):
    model = read_source(run).models[1]
    merged = replace(model, merged=True)
    assert merged.bytes == model.dense_bytes > model.bytes
    assert merged.multiply_adds == model.as_dense().multiply_adds > model.multiply_adds


def test_names_stay_apart_where_runs_share_them(run):
    source = read_source(run)
    sources = distinct([source, source])
    names = [model.name for model in models_of(sources)]
    assert len(names) == len(set(names)) == 2 * len(source.models) - 1, "the dense model is there once"


def test_every_row_has_a_cell_for_every_title_and_numbers_to_sort_by(run):
    columns, rows = comparison_of(models_of([read_source(run)]))
    for _, cells in rows:
        assert len(cells) == len(columns)
        assert all(cell.key is None if cell.text == "–" else isinstance(cell.key, (int, float)) for cell in cells)


def test_an_interval_without_a_bound_says_so():
    assert score_cell(score("kl", "mean", 0.5) | {"low": None}).plain == "0.500 […, 0.550]"
    assert score_cell(score("kl", "mean", 0.5) | {"low": None, "high": None}).plain == "0.500"


def test_a_page_is_ours_by_what_its_head_says(tmp_path):
    ours, other = tmp_path / "a.html", tmp_path / "b.html"
    ours.write_text('<!doctype html>\n<meta name="generator" content="fasc 0.1.0">')
    other.write_text('<!doctype html>\n<meta name="generator" content="other">')
    assert is_ours(ours) and not is_ours(other)


def test_a_plot_names_the_runs_that_have_points_in_it_each_by_the_same_sign():
    dense_score = {"benchmark": "lama", "metric": "accuracy", "value": 0.5, "low": 0.4, "high": 0.6, "n": 40, "protocol": ""}
    kl = dense_score | {"benchmark": "kl", "metric": "mean"}

    def model(name, *scores):
        rival = Rival(model=name, parameters=10**6, bytes=4 * 10**6)
        return Model(name, name, Entry(name, scores, None, rival=rival))

    rows = [model("first", dense_score), model("second", kl), model("third", dense_score, kl)]
    places = {"first": "circle", "second": "square", "third": "triangle-up"}
    for title, here in (("lama (%) ↑", ["first", "third"]), ("KL (nats) ↓", ["second", "third"])):
        scale = pareto_charts(rows)[title][0].spec["layer"][2]["encoding"]["shape"]["scale"]
        assert dict(zip(scale["domain"], scale["range"], strict=True)) == {run: places[run] for run in here}
