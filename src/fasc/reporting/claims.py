"""Each claim of the paper beside what was measured of it, and the rule that says what became of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from fasc.evaluation.paired import Paired
from fasc.reporting.paper_results import EQUAL_SIZE, Results
from fasc.reporting.table import format_score

REPRODUCED = "reproduced"
CORRECTED = "reproduced by the corrected objective"
NOT = "not reproduced"
OPEN = "cannot be told at this scale"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim and what became of it."""

    where: str
    """In the paper."""

    claim: str
    paper: str
    """Its number."""

    ours: str
    """Ours, with n and interval."""

    protocol: str
    """What differs."""

    verdict: str
    reason: str


Judge = Callable[[Results], Verdict]
JUDGES: list[Judge] = []
"""Every claim, in the order of the page."""


def judge(function: Judge) -> Judge:
    """Register a claim; the page has them in order."""
    JUDGES.append(function)
    return function


def _instead(results: Results) -> str:
    """The first thing that differs: the model."""
    model = results.model()
    return "the paper's model" if "mistral-7b" in model.lower() else f"{model} for Mistral-7B"


def _gain(one: Paired) -> float:
    """Difference of the accuracies, model minus reference."""
    if one.accuracy_difference is None:
        raise KeyError(f"accuracy of {one.benchmark}")
    return one.accuracy_difference


def _wins(one: Paired) -> bool:
    """Whether the whole interval of the difference is above zero."""
    low = one.accuracy_interval[0]
    return low is not None and low > 0


def _loses(one: Paired) -> bool:
    """Whether the whole interval is below zero."""
    high = one.accuracy_interval[1]
    return high is not None and high < 0


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _share(value: float | None) -> float:
    return 0.0 if value is None else value


def _points(one: Paired) -> str:
    """A paired difference with its interval."""
    low, high = one.accuracy_interval
    bounds = "" if low is None or high is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{100 * _gain(one):+.1f} points{bounds}, n = {one.n:,}"


@judge
def facts(results: Results) -> Verdict:
    """Table 1, LAMA."""
    table = results.methods_table("fasc", "svd")
    one, printed = results.paired("lama", "fasc", "svd", table), results.paired_if_run("lama", "fasc-eq6", "svd", table)
    eq6 = "not in this run" if printed is None else _points(printed)
    both = printed is not None and _wins(printed)
    return Verdict(
        "Table 1",
        "At half rank, FASC keeps more facts than SVD (LAMA)",
        "+7.6 points",
        f"Eq. 1 solved: {_points(one)}; Eq. 6 as printed: {eq6}",
        f"{_instead(results)}; candidates are the relation's objects",
        REPRODUCED if both else CORRECTED if _wins(one) else NOT,
        "Eq. 6 does not minimise Eq. 1 (docs/method.md); `fasc` is the minimiser of Eq. 1",
    )


@judge
def knowledge(results: Results) -> Verdict:
    """Table 1, MMLU and BBH."""
    mmlu, bbh = results.paired("mmlu", "fasc", "svd"), results.paired("bbh", "fasc", "svd")
    dense = results.score("dense", "mmlu")
    guess = dense["low"] <= 0.25
    better = _wins(mmlu)
    return Verdict(
        "Table 1",
        "FASC keeps more of MMLU and BBH than SVD",
        "+6.3 and +4.3 points",
        f"MMLU {_points(mmlu)}; BBH {_points(bbh)}; dense MMLU {results.shown('dense', 'mmlu')}",
        f"{_instead(results)}; BBH answered without chains of thought",
        OPEN if guess else CORRECTED if better else NOT,
        "the dense model does not beat a guess of one in four, so nothing can be lost"
        if guess
        else "paired on the same questions",
    )


@judge
def equal_size(results: Results) -> Verdict:
    """Table 1 at equal bytes."""
    larger = results.outsizes("fasc", EQUAL_SIZE)
    others = [name for name in results.others("fasc", EQUAL_SIZE) if name not in larger]
    rows = {name: results.paired("lama", "fasc", name, EQUAL_SIZE) for name in others}
    if not rows:
        raise KeyError("rivals of its size")
    ahead, behind = ([name for name, one in rows.items() if wins(one)] for wins in (_wins, _loses))
    even = [name for name in rows if name not in (*ahead, *behind)]
    return Verdict(
        "Table 1",
        "FASC keeps more facts than its rivals, at equal bytes instead of equal rank",
        "no number: equal rank is no size",
        "; ".join(f"beside {name} {_points(one)}" for name, one in rows.items()),
        f"{_instead(results)}; 0.6 of the parameters of the layers, the same rank everywhere where a method has ranks",
        CORRECTED if len(ahead) == len(rows) else NOT if behind else OPEN,
        f"FASC is ahead of {_listed(ahead)}, behind {_listed(behind)}, and cannot be told from {_listed(even)}"
        + (f"; left aside, because their zeros take the bytes of the dense model: {_listed(larger)}" if larger else ""),
    )


@judge
def first_order(results: Results) -> Verdict:
    """Table 1, the first-order rival."""
    table = results.methods_table("fasc", "svd", "grad-weighted")
    one, svd = (results.paired("lama", *pair, table) for pair in (("fasc", "grad-weighted"), ("grad-weighted", "svd")))
    wins = _wins(one)
    return Verdict(
        "Table 1",
        "FASC keeps more facts than gradient-weighted SVD",
        "+3.9 points",
        _points(one),
        _instead(results),
        CORRECTED if wins else NOT,
        f"gradient-weighted SVD weights tokens by their gradient; beside SVD it has {_points(svd)}",
    )


@judge
def larger(results: Results) -> Verdict:
    """Table 1, the 13B model."""
    where, claim = "Table 1, abstract", "A compressed 7B model matches the facts of a dense 13B model"
    number = "50.4 against 51.2 % on LAMA"
    ours = f"compressed: {results.shown('fasc', 'lama')}; dense: {results.shown('dense', 'lama')}"
    rivals = results.rivals()
    if not rivals:
        reason = "it compares two families of different training; at half rank the small model keeps far less than it had"
        return Verdict(where, claim, number, ours, "no other model was scored (`rivals` in the recipe)", OPEN, reason)
    pairs = {name: results.paired("lama", "fasc", name) for name in rivals}
    beside = "; ".join(
        f"{name}: {format_score(entry.score('lama'))}, fasc {_points(pairs[name])}" for name, entry in rivals.items()
    )
    behind = [one for one in pairs.values() if (high := one.accuracy_interval[1]) is not None and high < 0]
    sizes = ", ".join(f"{name} {entry.rival.bytes / 1e6:,.0f} MB" for name, entry in rivals.items() if entry.rival)
    return Verdict(
        where,
        claim,
        number,
        f"{ours}; {beside}",
        f"{_instead(results)}, {results.megabytes('fasc'):,.0f} MB compressed; {sizes} as it is",
        NOT if behind else CORRECTED,
        "paired on the same facts; it compares two families of different training, so it says as much of these as of compression",
    )


@judge
def architectures(results: Results) -> Verdict:
    """Table 2."""
    rows = results.gains_by_model()
    wins = sum(_wins(one) for one in rows.values())
    return Verdict(
        "Table 2",
        "The gain over SVD is the same in six architectures",
        "LAMA +7.2 to +7.7 points at half rank",
        "; ".join(f"{name}: {_points(one)}" for name, one in rows.items()),
        "the models of this run",
        CORRECTED if wins == len(rows) else NOT,
        f"FASC is above SVD by more than its interval in {wins} of {len(rows)} models",
    )


@judge
def grammar(results: Results) -> Verdict:
    """Table 3."""
    rows = {name: results.paired(name, "svd", "dense") for name in ("blimp", "mlama", "nq_open")}
    ours = results.paired("mlama", "fasc", "svd")
    kept = {name: _share(one.accuracy) / one.reference_accuracy for name, one in rows.items() if one.reference_accuracy}
    syntax = kept.get("blimp", 0) > max(kept.get("mlama", 0), kept.get("nq_open", 0))
    wins = _wins(ours)
    return Verdict(
        "Table 3",
        "SVD keeps syntax (BLiMP) and loses facts (mLAMA, NQ); FASC keeps both",
        "SVD keeps 97 % of BLiMP, 76 % of mLAMA, 79 % of NQ; FASC mLAMA +7.5",
        "SVD keeps "
        + ", ".join(f"{100 * share:.0f} % of {name}" for name, share in kept.items())
        + f"; FASC mLAMA {_points(ours)}",
        f"{_instead(results)}; BLiMP of 50 % is a guess",
        CORRECTED if syntax and wins else NOT,
        "a share of accuracy, of which half is a guess on BLiMP, and next to nothing on the others",
    )


@judge
def rates(results: Results) -> Verdict:
    """Table 4."""
    found = results.rates("lama")
    gains = {rate: _gain(one) for rate, one in found.items()}
    least, most = min(gains), max(gains)
    return Verdict(
        "Table 4",
        "The gain over SVD is largest at aggressive rates and vanishes at 80 %",
        "LAMA +8.7 at 40 %, +7.6 at 50 %, +3.9 at 60 %, +0.4 at 80 %",
        "; ".join(f"{100 * rate:.0f} %: {_points(one)}" for rate, one in found.items()),
        _instead(results),
        REPRODUCED if gains[least] == max(gains.values()) and gains[most] == min(gains.values()) else NOT,
        f"the gain is largest at {max(gains, key=gains.__getitem__):.0%}: "
        "where a method keeps next to nothing there is little to gain",
    )


@judge
def speed(results: Results) -> Verdict:
    """Table 5."""
    rows = results.speeds()
    close = all(0.8 <= one["fasc"] / one["svd"] <= 1.25 for one in rows.values())
    return Verdict(
        "Table 5",
        "FASC is as fast as SVD at the same rank, and takes as much memory",
        "142 against 143 tokens/s; 8.1 GB both",
        "; ".join(f"{what}: fasc {one['fasc']:.2f} ×, svd {one['svd']:.2f} × of dense" for what, one in rows.items())
        + f"; weights {results.megabytes('fasc'):.0f} and {results.megabytes('svd'):.0f} MB of {results.megabytes('dense'):.0f}",
        f"{_instead(results)}; this machine for an A100",
        REPRODUCED if close else NOT,
        "both store the same two factors at the same rank",
    )


@judge
def types(results: Results) -> Verdict:
    """Table 6."""
    rows = results.types("relation_types")
    lost = {kind: _gain(one["svd"]) for kind, one in rows.items()}
    order = sorted(lost, key=lambda kind: lost[kind])
    expected = set(order[:2]) == {"temporal", "numerical"}
    return Verdict(
        "Table 6",
        "SVD loses temporal and numerical facts most, taxonomic ones least; FASC keeps them",
        "SVD: temporal −22.1, numerical −17.0, geographic −11.1, taxonomic −4.2",
        "; ".join(
            f"{kind}: dense {100 * _share(one['svd'].reference_accuracy):.1f} %, svd {_points(one['svd'])}, "
            f"fasc {100 * _gain(one['fasc']):+.1f}"
            for kind, one in rows.items()
        ),
        f"{_instead(results)}; years from Google-RE, numbers from KAMEL, types grouped by us",
        REPRODUCED if expected else NOT,
        "the small model knows few years and numbers to begin with: what is not known cannot be lost",
    )


@judge
def where(results: Results) -> Verdict:
    """Figure 3."""
    means = results.rho_by_third()
    late = max(means["middle"], means["late"]) > means["early"] and means["middle"] >= means["late"]
    return Verdict(
        "Figure 3",
        "ρ is high in middle-to-late blocks and low in early and very late ones",
        "a heatmap",
        "mean debiased ρ of the early, middle and late third: " + ", ".join(f"{value:.3f}" for value in means.values()),
        _instead(results),
        REPRODUCED if late else NOT,
        "means over the groups of each third of the blocks",
    )


@judge
def correlation(results: Results) -> Verdict:
    """Figure 4 and Table 9."""
    row = results.correlation("rho")
    low, high = row["interval"]
    half_j = results.correlation("half_j")
    return Verdict(
        "Figure 4, Table 9",
        "ρ predicts where FASC beats SVD",
        "r = 0.73 (0.69 to 0.75 over models)",
        f"r = {row['r']:.2f} [{low:.2f}, {high:.2f}], n = {row['n']}; the ratio of ½J: r = {half_j['r']:.2f}",
        "the gain is log(KL of svd ÷ KL of fasc) of one group at a time, not points of LAMA",
        REPRODUCED if low > 0.3 else NOT,
        "½J measures what is lost; ρ measures dependence, whatever it costs",
    )


@judge
def critical(results: Results) -> Verdict:
    """Table 7."""
    rows, one_by_one = results.layer_types(), results.critical()
    top, bottom = rows["critical"]["gain"], rows["safe"]["gain"]
    ours = "; ".join(
        f"{kind}: {_points(row['gain'])}, Δ log-probability of svd {_mean(row['svd'])}, of fasc {_mean(row['fasc'])} nats"
        for kind, row in rows.items()
    )
    ratios = ", ".join(f"{kind} {row['ratio']:.2f}" for kind, row in one_by_one.items())
    return Verdict(
        "Table 7",
        "In the 20 % of layers with the highest ρ FASC is far better than SVD, in the lowest 20 % no better",
        "+11.8 to +13.5 points against +0.3",
        f"{ours}; median KL of svd ÷ fasc, one group at a time: {ratios}",
        f"{_instead(results)}; groups that share an input for layers",
        REPRODUCED if _wins(top) and not _wins(bottom) else NOT,
        "what the two methods lose is not told by ρ: see the log-probabilities of both fifths",
    )


def _mean(one: Paired) -> str:
    return "–" if one.log_probability_difference is None else f"{one.log_probability_difference:+.2f}"


@judge
def sensitivity(results: Results) -> Verdict:
    """Figure 2."""
    blocks = results.sensitivity()
    count = len(blocks)
    lost = {
        method: {
            part: sum(blocks[at][method]["log_probability"] for at in some) / len(some)
            for part, some in _thirds(sorted(blocks)).items()
        }
        for method in ("svd", "fasc")
    }
    svd, fasc = lost["svd"], lost["fasc"]
    better = sum(row["fasc"]["log_probability"] > row["svd"]["log_probability"] for row in blocks.values())
    late = min(svd["middle"], svd["late"]) < svd["early"]
    return Verdict(
        "Figure 2",
        "SVD loses facts where middle-to-late blocks are compressed; FASC stays stable everywhere",
        "LAMA below 30 % for SVD, above 45 % for FASC",
        "mean Δ log-probability of the right answer, nats, one block at a time, early, middle and late third: "
        + "; ".join(f"{name} {', '.join(f'{value:+.2f}' for value in row.values())}" for name, row in lost.items())
        + f"; FASC loses less in {better} of {count} blocks (n = {next(iter(blocks.values()))['svd']['n']:,} facts)",
        f"{_instead(results)}; whole blocks at half rank",
        CORRECTED if late and better > 0.9 * count and min(fasc.values()) > min(svd.values()) else NOT,
        "which third loses most stands beside; ranks of whole blocks, MLP and attention",
    )


def _thirds(blocks: list[int]) -> dict[str, list[int]]:
    """Blocks in the early, middle and late third."""
    found: dict[str, list[int]] = {"early": [], "middle": [], "late": []}
    for place, block in enumerate(blocks):
        found[("early", "middle", "late")[min(2, 3 * place // len(blocks))]].append(block)
    return {name: some for name, some in found.items() if some}


@judge
def spread(results: Results) -> Verdict:
    """Table 9, over draws of calibration text."""
    rows = results.seeds()
    r, at = [row["r"] for row in rows], [row["threshold"] for row in rows]
    return Verdict(
        "Table 9",
        "r and the best threshold of ρ hardly vary",
        "standard deviation of r 0.02 to 0.03; best threshold 0.29 to 0.33",
        f"r = {mean(r):.2f}, standard deviation {stdev(r):.3f}; best threshold {min(at):.2f} to {max(at):.2f}; {len(rows)} draws",
        f"{_instead(results)}; ρ of each draw beside the gains of one",
        REPRODUCED if stdev(r) <= 0.03 and mean(r) > 0.3 else NOT,
        "a small spread around a correlation that is not the paper's" if stdev(r) <= 0.03 else "ρ depends on the draw",
    )


@judge
def threshold(results: Results) -> Verdict:
    """Table 8."""
    rows = results.thresholds()
    everything, none = rows["no-selection"], rows["svd"]
    kept = {name: (none["kl"] - row["kl"]) / (none["kl"] - everything["kl"]) for name, row in rows.items()}
    third = kept.get("rho-0.3", 0.0)
    return Verdict(
        "Table 8",
        "FASC where ρ > 0.3 and SVD elsewhere keeps 95 % of the gain in 40 % of the time",
        "95 % of the gain, 104 of 278 s",
        "; ".join(
            f"{name}: KL {row['kl']:.2f}, {100 * kept[name]:.0f} % of the gain, {row['seconds']:.0f} s"
            for name, row in rows.items()
        ),
        f"{_instead(results)}; KL for MMLU",
        REPRODUCED if third >= 0.9 else NOT,
        "ρ needs the same moments as FASC, so nothing is saved, and what it leaves to SVD is lost",
    )


@judge
def angles(results: Results) -> Verdict:
    """Figure 5."""
    high, low = results.angles()
    return Verdict(
        "Figure 5",
        "FASC's and SVD's subspaces differ where ρ is high and agree where it is low",
        "45° against 12°",
        f"median angle {high:.0f}° in the highest fifth of ρ, {low:.0f}° in the lowest",
        _instead(results),
        REPRODUCED if high > low + 15 else NOT,
        "the angle is that of the subspaces at half rank",
    )


@judge
def sizes(results: Results) -> Verdict:
    """Appendix E."""
    widths = results.rho_widths()
    largest = max(widths)
    return Verdict(
        "Appendix E",
        "4,096 tokens give ρ to 0.04; estimates at different sizes agree",
        "median width 0.08 at 1,024, 0.04 at 4,096, 0.03 at 8,192; correlation above 0.95",
        "; ".join(f"{tokens:,} tokens: width {row['width']:.3f}, r = {row['r']:.2f}" for tokens, row in widths.items())
        + f" with ρ at {largest:,}",
        "bootstrap over sequences, whose tokens are dependent",
        REPRODUCED if widths[largest]["width"] <= 0.05 and min(row["r"] for row in widths.values()) > 0.9 else NOT,
        "part of ρ is noise that falls with the number of tokens (docs/method.md)",
    )


@judge
def corpora(results: Results) -> Verdict:
    """§2.2, corpora and negated facts."""
    rows = results.overlaps()
    own = rows["same corpus"]["overlap"] - rows["same corpus"]["chance"]
    above = {name: (row["overlap"] - row["chance"]) / own for name, row in rows.items()}
    return Verdict(
        "§3",
        "Subspaces agree across corpora (> 85 %) and differ for negated facts (< 60 %)",
        "> 85 % and < 60 %",
        "; ".join(f"{name}: {row['overlap']:.2f} (chance {row['chance']:.2f})" for name, row in rows.items()),
        f"{_instead(results)}, half rank",
        NOT if rows["negated"]["overlap"] > 0.6 else REPRODUCED,
        f"of what lies above chance between draws of one corpus, other corpora share {above['other corpora']:.0%} "
        f"and negated facts {above['negated']:.0%}",
    )


@judge
def hessian(results: Results) -> Verdict:
    """§2.2, the Hessian."""
    rows = results.hessian()
    return Verdict(
        "§2.2",
        "The Fisher matrix sees the Hessian's leading directions",
        "87 % overlap in layers of high ρ, 72 % in others",
        "; ".join(f"{name}: {value:.2f}" for name, value in rows.items()),
        f"{_instead(results)}; eight directions by Lanczos",
        REPRODUCED if min(rows.values()) > 0.7 else NOT,
        f"from {min(rows.values()):.2f} to {max(rows.values()):.2f}; part of the distance is noise of the Hessian",
    )


@judge
def emergence(results: Results) -> Verdict:
    """The abstract's last claim."""
    row = results.emergence()
    grows = row["gain"] > 2 * row["control_gain"] and row["gain"] > 0.02
    return Verdict(
        "Abstract, §4.4",
        "High ρ emerges only when facts are internalised in training",
        "no number",
        f"mean debiased ρ from first to last checkpoint: {row['first']:.3f} → {row['last']:.3f} while facts rise to "
        f"{100 * row['accuracy']:.0f} %; with shuffled facts {row['control_first']:.3f} → {row['control_last']:.3f} at "
        f"{100 * row['control_accuracy']:.0f} %; means over {row['seeds']:.0f} seed(s)",
        "a small transformer trained on synthetic biographies",
        REPRODUCED if grows else NOT,
        "ρ falls in both runs as they are trained, whether or not there are facts to learn"
        if row["last"] < row["first"] and row["control_last"] < row["control_first"]
        else "the control reads the same words and has nothing to learn by heart",
    )
