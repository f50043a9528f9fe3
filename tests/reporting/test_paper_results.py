"""The numbers of the paper's tables are read off results that are known."""

import json

import pytest

from fasc.evaluation.outcome import Outcome
from fasc.reporting import claims
from fasc.reporting.paper_results import Results
from fasc.reporting.verdicts import gather, page

MADE = {"versions": {}, "command": [], "created": "2026-11-27T05:00:00+00:00", "git_revision": "0123456789"}
PLACE = {"machine": {"processor": "a processor", "cores": 2}}


def put(folder, name, value):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def answers(right, log):
    """Facts of which so many of forty are known; the log-probability of each."""
    rows = [Outcome(f"item {i}", f"r{i % 4}", f"s{i}", "t", i < right, log).to_dict() for i in range(40)]
    return {"items": {"lama": rows}}


def run(folder, **models):
    for name, (right, log) in models.items():
        place = name.replace("_", "-")
        put(folder, f"{place}/scores.json", {"scores": []})
        put(folder, f"{place}/items.json", answers(right, log))
        put(folder, f"{place}/timing.json", {"seconds": {"plan": 1.0}, "provenance": PLACE})


@pytest.fixture
def gains(tmp_path):
    """Groups whose gain is the number of the group, and whose ρ grows with it."""
    rows = [
        {"group": f"g{i}", "rank_fraction": 0.5, "method": method, "kl": kl, "half_j": kl, "rho": i / 20, "block": i}
        for i in range(10)
        for method, kl in (("fasc", 1.0), ("svd", 2.0**i))
    ]
    put(tmp_path, "table-9/result.json", {"rows": rows})
    return tmp_path


def seed(folder, number, rho):
    groups = [{"group": f"g{i}", "rho": value, "excluded": None} for i, value in enumerate(rho)]
    put(folder, f"table-9-seeds-{number}/result.json", {"groups": groups})


def test_the_spread_over_draws_is_that_of_rho_with_the_same_gains(gains):
    seed(gains, 1, [i / 20 for i in range(10)])
    with pytest.raises(FileNotFoundError, match="table-9-seeds was not run"):
        Results(gains).seeds()
    seed(gains, 2, [(9 - i) / 20 for i in range(10)])
    up, down = Results(gains).seeds()
    assert (up["r"], down["r"]) == (pytest.approx(1), pytest.approx(-1))
    assert 0.2 <= up["threshold"] < 0.25, "between the fifth ρ and the sixth"
    assert claims.spread(Results(gains)).verdict == claims.NOT
    seed(gains, 2, [i / 20 for i in range(10)])
    assert claims.spread(Results(gains)).verdict == claims.REPRODUCED


def test_table_7_compares_the_methods_in_each_fifth(gains):
    models = {"critical_fasc": (30, -1.0), "critical_svd": (4, -3.0), "safe_fasc": (31, -1.0), "safe_svd": (31, -1.0)}
    run(gains / "table-7", dense=(32, -0.5), **models)
    rows = Results(gains).layer_types()
    assert rows["critical"]["gain"].accuracy_difference == pytest.approx(26 / 40)
    assert rows["critical"]["svd"].log_probability_difference == pytest.approx(-2.5)
    assert rows["safe"]["gain"].accuracy_difference == 0
    assert claims.critical(Results(gains)).verdict == claims.REPRODUCED
    run(gains / "table-7", safe_svd=(4, -3.0))
    assert claims.critical(Results(gains)).verdict == claims.NOT
    text = page(gather(gains, MADE))
    assert "| critical | svd | 40 | 80.0 % | 10.0 % | 28 | 0 |" in text
    assert "- table-7: a processor, 2 cores" in text


def test_figure_2_is_judged_by_thirds_of_the_blocks(tmp_path):
    def kept(log):
        return {"lama": {"accuracy": 0.3, "reference_accuracy": 0.4, "log_probability_difference": log, "n": 40}}

    def rows(svd):
        return [
            {"block": block, "method": method, "kl": -log, "kept": kept(log)}
            for block, bad in enumerate(svd)
            for method, log in (("svd", bad), ("fasc", bad / 10))
        ]

    for row in (found := rows([-0.1, -0.1, -2.0, -3.0, -1.0, -1.0])):
        row["kept"]["lama"]["log_probability_interval"] = [-1, 1]
    put(tmp_path, "figure-2/result.json", {"rows": found})
    one = claims.sensitivity(Results(tmp_path))
    assert one.verdict == claims.CORRECTED
    assert "svd -0.10, -2.50, -1.00; fasc -0.01, -0.25, -0.10" in one.ours
    assert "6 of 6 blocks (n = 40 facts)" in one.ours
    text = page(gather(tmp_path, MADE))
    assert "](figures/sensitivity.png)" in text
    assert (tmp_path / "figures" / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "figures" / "gains.png").exists(), "table-9 was not run"
    for row in (found := rows([-3.0, -2.0, -0.1, -0.1, -0.1, -0.1])):
        row["kept"]["lama"]["log_probability_interval"] = [-1, 1]
    put(tmp_path, "figure-2/result.json", {"rows": found})
    assert claims.sensitivity(Results(tmp_path)).verdict == claims.NOT


def test_tables_of_several_models_are_found_and_compared(tmp_path):
    for name in ("first", "second"):
        run(tmp_path / f"table-1 {name}", dense=(36, -0.5), fasc=(30, -1.0), svd=(10, -2.0))
    put(tmp_path / "table-1 first", "provenance.json", {"model": "owner/first"})
    results = Results(tmp_path)
    assert set(results.gains_by_model()) == {"first", "second"}
    assert claims.architectures(results).verdict == claims.CORRECTED
    assert claims.facts(results).protocol.startswith("first for Mistral-7B")
    with pytest.raises(FileNotFoundError, match="one model"):
        Results(tmp_path / "table-1 first").gains_by_model()


def test_widths_of_rho_are_by_tokens_whatever_the_folders_are_called(tmp_path):
    for name, tokens, half in (("8", 1024, 0.05), ("64", 8192, 0.01)):
        groups = [
            {"group": f"g{i}", "excluded": None, "rho": i / 10, "rho_low": i / 10 - half, "rho_high": i / 10 + half}
            for i in range(6)
        ]
        put(tmp_path, f"appendix-e-{name}/result.json", {"groups": groups, "meta": {"tokens_by_process": [tokens // 2] * 2}})
    widths = Results(tmp_path).rho_widths()
    assert list(widths) == [1024, 8192]
    assert widths[1024] == {"width": pytest.approx(0.1), "r": pytest.approx(1)}
    assert claims.sizes(Results(tmp_path)).verdict == claims.REPRODUCED


@pytest.mark.parametrize(("known", "verdict"), [(29, claims.CORRECTED), (40, claims.NOT)])
def test_a_larger_dense_model_is_compared_fact_by_fact(tmp_path, known, verdict):
    run(tmp_path / "table-1", dense=(32, -0.5), fasc=(30, -1.0), large=(known, -1.0))
    put(tmp_path, "table-1/fasc/plan.json", {"totals": {"bytes": 14_000_000}})
    for name in ("large", "fasc", "dense"):
        row = {"benchmark": "lama", "metric": "accuracy", "value": 0.5, "low": 0.4, "high": 0.6}
        put(tmp_path, f"table-1/{name}/scores.json", {"scores": [row]})
    assert claims.larger(Results(tmp_path)).verdict == claims.OPEN
    put(tmp_path, "table-1/large/rival.json", {"model": "owner/large", "parameters": 13, "bytes": 26_000_000})
    one = claims.larger(Results(tmp_path))
    assert one.verdict == verdict
    assert "14 MB compressed; large 26 MB as it is" in one.protocol


def test_rates_are_read_off_the_names_of_the_results(tmp_path):
    run(tmp_path / "table-1", dense=(36, -0.5), fasc=(30, -1.0), svd=(10, -2.0))
    other = {"fasc@0.4": (20, -1.0), "svd@0.4": (4, -2.0), "fasc@0.8": (34, -1.0), "svd@0.8": (33, -2.0)}
    run(tmp_path / "table-4", dense=(36, -0.5), **other)
    gains = {rate: one.accuracy_difference for rate, one in Results(tmp_path).rates("lama").items()}
    assert gains == {0.4: pytest.approx(16 / 40), 0.5: pytest.approx(20 / 40), 0.8: pytest.approx(1 / 40)}


def test_facts_are_judged_by_the_table_of_all_methods_where_it_was_run(tmp_path):
    run(tmp_path / "table-1", dense=(36, -0.5), fasc=(30, -1.0), svd=(10, -2.0))
    assert "Eq. 6 as printed: not in this run" in claims.facts(Results(tmp_path)).ours
    models = {"dense": (36, -0.5), "fasc": (30, -1.0), "svd": (10, -2.0), "fasc_eq6": (31, -1.0), "grad_weighted": (30, -1.0)}
    run(tmp_path / "table-1-methods", **models)
    assert claims.facts(Results(tmp_path)).verdict == claims.REPRODUCED, "Eq. 6 wins here, too"
    assert claims.first_order(Results(tmp_path)).verdict == claims.NOT
    assert "Table 1: every method at half rank" in gather(tmp_path, MADE)["sections"]


def test_a_run_that_was_only_begun_is_no_result(tmp_path):
    (tmp_path / "table-1-methods").mkdir()
    (tmp_path / "table-1-methods" / "provenance.json").write_text("{}")
    assert gather(tmp_path, MADE)["sections"] == {}
    run(tmp_path / "table-1", dense=(36, -0.5), fasc=(30, -1.0), svd=(10, -2.0))
    assert claims.facts(Results(tmp_path)).verdict == claims.CORRECTED, "Table 1 itself"
    run(tmp_path / "table-1-methods", dense=(36, -0.5))
    assert claims.facts(Results(tmp_path)).verdict == claims.CORRECTED, "the dense model was scored so far, and nothing else"
    run(tmp_path / "table-1-equal-size", dense=(36, -0.5), fasc=(30, -1.0))
    assert "equal_size" not in gather(tmp_path, MADE)["verdicts"], "nothing was compared"
    put(
        tmp_path,
        "subspaces/result.json",
        {"summary": [{"rank_fraction": 0.5, "a": "c4", "b": "lama", "overlap": 1, "chance": 0.5}]},
    )
    assert "corpora" in gather(tmp_path, MADE)["missing"], "one thin table does not end the page"


@pytest.mark.parametrize(("pruned", "verdict"), [(10, claims.CORRECTED), (30, claims.OPEN), (36, claims.NOT)])
def test_at_equal_bytes_every_rival_counts(tmp_path, pruned, verdict):
    run(tmp_path / "table-1-equal-size", dense=(40, -0.5), fasc=(30, -1.0), svd=(10, -2.0), magnitude=(pruned, -1.0))
    one = claims.equal_size(Results(tmp_path))
    assert one.verdict == verdict
    assert one.reason.startswith("FASC is ahead of svd")
    for name, size in {"fasc": 100, "svd": 100, "magnitude": 150}.items():
        put(tmp_path, f"table-1-equal-size/{name}/plan.json", {"totals": {"bytes": size}})
    alone = claims.equal_size(Results(tmp_path))
    assert alone.verdict == claims.CORRECTED, "zeros are not fewer bytes"
    assert "of the dense model: magnitude" in alone.reason


def test_a_page_keeps_what_it_says_of_parts_that_are_not_there_and_names_them(gains, tmp_path_factory):
    run(gains / "table-1", dense=(36, -0.5), fasc=(30, -1.0), svd=(10, -2.0))
    first = gather(gains, MADE)
    assert {"facts", "correlation"} <= set(first["verdicts"])
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    run(elsewhere / "table-1", dense=(36, -0.5), fasc=(9, -1.0), svd=(10, -2.0))
    later = {**MADE, "created": "2026-11-28T05:00:00+00:00"}
    alone = gather(elsewhere, later)
    assert "correlation" not in alone["verdicts"]
    both = gather(elsewhere, later, first)
    assert both["verdicts"]["correlation"] == first["verdicts"]["correlation"]
    assert both["verdicts"]["facts"] == alone["verdicts"]["facts"] != first["verdicts"]["facts"]
    assert both["kept"]["correlation"] == "2026-11-27, revision 0123456"
    assert "facts" not in both["kept"]
    assert "- 2026-11-27, revision 0123456: Figure 4, Table 9 (correlation)" in page(both)
    assert set(both["missing"]) == set(first["missing"])
    assert gather(elsewhere, {**MADE, "created": "2026-11-29"}, both)["kept"] == both["kept"], (
        "the page that measured it is named"
    )
    assert gather(gains, later, both)["kept"] == {}
