"""What the recipes of the paper left in their folders, read for the verdicts."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from fasc.errors import StorageError
from fasc.evaluation.outcome import Outcome, outcomes_from
from fasc.evaluation.paired import Paired, by_group, paired
from fasc.reporting.compared import difference, share
from fasc.reporting.entries import DENSE, Entry, read_entries
from fasc.reporting.scores import ITEMS
from fasc.reporting.table import format_score, markdown_table
from fasc.storage import read_json

TABLE_1, TABLE_4, TABLE_7, TABLE_8, TABLE_9 = "table-1", "table-4", "table-7", "table-8", "table-9"
FIGURE_2, FIGURE_3, SUBSPACES, EMERGENCE = "figure-2", "figure-3", "subspaces", "emergence"
EQUAL_SIZE, METHODS = "table-1-equal-size", "table-1-methods"
SEEDS, APPENDIX_E = "table-9-seeds", "appendix-e"
"""A folder for each value of the sweep."""

_FIFTH = 5

MISSING = (KeyError, FileNotFoundError, ValueError, IndexError, ZeroDivisionError)
"""What reading numbers raises that are not there, or of which there are too few: median of none."""


class Results:
    """The numbers of a run of ``recipes/paper.toml``.

    Args:
        folder: with a folder for each table.

    Every method raises ``KeyError`` or ``FileNotFoundError`` where what it reads was not made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries = cache(self._read_entries)
        self._outcomes = cache(self._read_outcomes)
        self._result = cache(self._read_result)

    def _of(self, table: str) -> Path:
        """The folder of a table; where it was made of several models, that of the first by name."""
        several = sorted(self._folder.glob(f"{table} *"))
        return self._folder / table if (self._folder / table).is_dir() or not several else several[0]

    def _read_entries(self, table: str) -> dict[str, Entry]:
        folder = self._of(table)
        if not folder.is_dir():
            raise FileNotFoundError(f"{table} was not run")
        try:
            return {entry.name: entry for entry in read_entries(folder)}
        except StorageError as problem:  # it was begun
            raise FileNotFoundError(f"{table} has no scores yet") from problem

    def _read_outcomes(self, table: str, name: str) -> dict[str, list[Outcome]]:
        file = self._of(table) / name / ITEMS
        if not file.is_file():
            raise FileNotFoundError(f"{table} has no items of {name}")
        return {benchmark: outcomes_from(rows) for benchmark, rows in read_json(file)["items"].items()}

    def _read_result(self, table: str) -> dict[str, Any]:
        file = self._of(table) / "result.json"
        if not file.is_file():
            raise FileNotFoundError(f"{table} was not run")
        found: dict[str, Any] = read_json(file)
        return found

    def score(self, name: str, benchmark: str) -> Mapping[str, Any]:
        """The headline score of a model of Table 1."""
        found = self._entries(TABLE_1)[name].score(benchmark)
        if found is None:
            raise KeyError(f"{benchmark} of {name}")
        return found

    def shown(self, name: str, benchmark: str) -> str:
        """The same in words."""
        return format_score(self.score(name, benchmark))

    def paired(self, benchmark: str, model: str, reference: str, table: str = TABLE_1) -> Paired:
        """Two models of a run, item by item."""
        both = [self._outcomes(table, name)[benchmark] for name in (model, reference)]
        return paired(benchmark, (model, reference), *both)

    def paired_if_run(self, benchmark: str, model: str, reference: str, table: str = TABLE_1) -> Paired | None:
        """The same, or ``None`` where one of them was not run."""
        try:
            return self.paired(benchmark, model, reference, table)
        except (KeyError, FileNotFoundError):
            return None

    def methods_table(self, *models: str) -> str:
        """The table of all methods on facts; Table 1 itself where that one does not hold these models yet."""
        with suppress(FileNotFoundError):
            if set(models) <= set(self._entries(METHODS)):
                return METHODS
        return TABLE_1

    def others(self, name: str, table: str) -> list[str]:
        """The compressed models of a table, but for one."""
        return [other for other in self._entries(table) if other not in (DENSE, name)]

    def outsizes(self, name: str, table: str) -> list[str]:
        """Models of a table whose weights take a twentieth more bytes than this one's, or yet more."""
        sizes = {other: (entry.plan or {}).get("totals", {}).get("bytes") for other, entry in self._entries(table).items()}
        own = sizes.pop(name)
        return [other for other, size in sizes.items() if own and size and size > 1.05 * own]

    def machines(self) -> dict[str, list[str]]:
        """Which machines made each table, of a run those of its results."""
        found: dict[str, list[str]] = {}
        for name in ("*/result.json", "*/*/timing.json"):
            for file in sorted(self._folder.glob(name)):
                made = _made(read_json(file))
                if "machine" in made:
                    one = made["machine"]
                    gpu = f", {one['accelerator']}" if "accelerator" in one else ""
                    machines = found.setdefault(file.relative_to(self._folder).parts[0], [])
                    text = f"{one['processor']}, {one['cores']} cores{gpu}"
                    machines += [] if text in machines else [text]
        return found

    def model(self) -> str:
        """The model of Table 1, or of the first table that was made."""
        for table in _RUNS:
            file = self._of(table) / "provenance.json"
            if file.is_file() and (named := read_json(file).get("model")):
                return Path(named).name
        return "the model of this run"

    def gains_by_model(self) -> dict[str, Paired]:
        """FASC against SVD on LAMA, for each model that Table 1 was made of (Table 2)."""
        folders = sorted(self._folder.glob(f"{TABLE_1} *"))
        if not folders:
            raise FileNotFoundError(f"{TABLE_1} was run on one model")
        return {folder.name.removeprefix(f"{TABLE_1} "): self.paired("lama", "fasc", "svd", folder.name) for folder in folders}

    def rivals(self) -> dict[str, Entry]:
        """The other dense models of Table 1."""
        return {name: entry for name, entry in self._entries(TABLE_1).items() if entry.rival is not None}

    def rates(self, benchmark: str) -> dict[float, Paired]:
        """FASC against SVD at each rate, the smallest first."""
        found = {0.5: self.paired(benchmark, "fasc", "svd")}
        for name in self._entries(TABLE_4):
            if name.startswith("fasc@"):
                rate = float(name.partition("@")[2].removeprefix("rank "))
                found[rate] = self.paired(benchmark, name, f"svd@{name.partition('@')[2]}", TABLE_4)
        if len(found) < 2:
            raise KeyError("rates of table-4")
        return dict(sorted(found.items()))

    def types(self, benchmark: str) -> dict[str, dict[str, Paired]]:
        """FASC and SVD against the dense model, by type of relation."""
        all_of = {name: self._outcomes(TABLE_1, name)[benchmark] for name in (DENSE, "fasc", "svd")}
        groups = by_group(all_of[DENSE], "type")
        parts = {kind: {name: [some[i] for i in index] for name, some in all_of.items()} for kind, index in groups.items()}
        return {
            kind: {name: paired(kind, (name, DENSE), part[name], part[DENSE]) for name in ("svd", "fasc")}
            for kind, part in parts.items()
        }

    def speeds(self) -> dict[str, dict[str, float]]:
        """Speed of FASC and SVD, as ratios to the dense model measured in turn."""
        rows: dict[str, dict[str, float]] = {}
        for name in ("fasc", "svd"):
            for row in self._entries(TABLE_1)[name].speeds:
                rows.setdefault(row["what"], {})[name] = row["ratio"]
        found = {what: row for what, row in rows.items() if len(row) == 2 and ("decode" in what or "prefill" in what)}
        if not found:
            raise KeyError("speeds of table-1")
        return found

    def megabytes(self, name: str) -> float:
        """Weights of a model of Table 1."""
        plan = self._entries(TABLE_1)["fasc" if name == DENSE else name].plan or {}
        size: float = plan["totals"]["dense_bytes" if name == DENSE else "bytes"] / 1e6
        return size

    def groups(self, table: str = FIGURE_3) -> list[Mapping[str, Any]]:
        """Rows of a diagnosis that have ρ and are not excluded."""
        rows = [row for row in self._result(table)["groups"] if row["rho"] is not None and not row["excluded"]]
        if not rows:
            raise KeyError(f"ρ of {table}")
        return rows

    def diagnosed(self) -> tuple[list[Mapping[str, Any]], list[str] | None]:
        """Rows of every group, and between which methods the angles are."""
        found = self._result(FIGURE_3)
        return found["groups"], found["meta"]["angles_between"]

    def rho_by_third(self) -> dict[str, float]:
        """Mean debiased ρ of the early, middle and late third of the blocks."""
        rows = self.groups()
        blocks = 1 + max(row["block"] for row in rows)
        parts: dict[str, list[float]] = {"early": [], "middle": [], "late": []}
        for row in rows:
            parts[("early", "middle", "late")[min(2, 3 * row["block"] // blocks)]].append(row["rho_debiased"])
        return {name: mean(values) for name, values in parts.items()}

    def gains(self, rho: Mapping[str, float] | None = None) -> list[dict[str, float]]:
        """Of each group: ρ, and the logarithm of KL of svd ÷ KL of fasc, and of the same ratio of ½J; medians over ranks.

        Args:
            rho: of each group, instead of that of the text on which the gains were measured.
        """
        cases: dict[tuple[str, float], dict[str, Mapping[str, Any]]] = {}
        for row in self._result(TABLE_9)["rows"]:
            cases.setdefault((row["group"], row["rank_fraction"]), {})[row["method"]] = row
        found: dict[str, list[dict[str, float]]] = {}
        for (group, _), both in cases.items():
            ours, theirs = both.get("fasc"), both.get("svd")
            if ours is None or theirs is None or ours["rho"] is None or min(ours["kl"], theirs["kl"]) <= 0:
                continue
            if rho is not None and group not in rho:
                continue
            gain = float(np.log(theirs["kl"] / ours["kl"]))
            forecast = float(np.log(theirs["half_j"] / ours["half_j"]))
            score = ours["rho"] if rho is None else rho[group]
            found.setdefault(group, []).append({"rho": score, "gain": gain, "half_j": forecast})
        if len(found) < _FIFTH:
            raise KeyError("rows of table-9")
        return [{key: median(row[key] for row in rows) for key in rows[0]} for rows in found.values()]

    def correlation(self, what: str) -> dict[str, Any]:
        """Pearson's r of a forecast with the gain, over groups, with Fisher's interval."""
        rows = self.gains()
        r = _correlation(rows, what)
        half = 1.96 / np.sqrt(len(rows) - 3)
        z = np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12))
        return {"r": r, "n": len(rows), "interval": (float(np.tanh(z - half)), float(np.tanh(z + half)))}

    def seeds(self) -> list[dict[str, float]]:
        """By draw of calibration text: r of ρ with the gains, and the best threshold (Table 9)."""
        found = []
        for folder in sorted(self._folder.glob(f"{SEEDS}-*")):
            rho = {row["group"]: row["rho"] for row in self._result(folder.name)["groups"] if row["rho"] is not None}
            rows = self.gains(rho)
            found.append({"r": _correlation(rows, "rho"), "threshold": _best_threshold(rows)})
        if len(found) < 2:
            raise FileNotFoundError(f"{SEEDS} was not run")
        return found

    def best_threshold(self) -> float:
        """The ρ that tells best where FASC gains more than the median (the paper's grid search)."""
        return _best_threshold(self.gains())

    def critical(self) -> dict[str, dict[str, float]]:
        """Median KL of svd ÷ KL of fasc in the fifth of the groups with the highest and with the lowest ρ."""
        rows = sorted(self.gains(), key=lambda row: row["rho"])
        fifth = max(1, len(rows) // _FIFTH)
        return {
            name: {"ratio": float(np.exp(median(row["gain"] for row in part))), "n": fifth}
            for name, part in (("critical", rows[-fifth:]), ("safe", rows[:fifth]))
        }

    def layer_types(self) -> dict[str, dict[str, Paired]]:
        """The fifths of the groups with the highest and the lowest ρ, each alone: FASC against SVD, both against dense."""
        pairs = (("gain", "fasc", "svd"), ("fasc", "fasc", None), ("svd", "svd", None))
        return {
            kind: {
                name: self.paired("lama", f"{kind}-{method}", DENSE if other is None else f"{kind}-{other}", TABLE_7)
                for name, method, other in pairs
            }
            for kind in ("critical", "safe")
        }

    def sensitivity(self) -> dict[int, dict[str, dict[str, Any]]]:
        """What one block compressed alone at half rank costs, by method (Figure 2): KL, and facts beside the dense model's."""
        found: dict[int, dict[str, dict[str, Any]]] = {}
        for row in self._result(FIGURE_2)["rows"]:
            facts = row["kept"]["lama"]
            found.setdefault(int(row["block"]), {})[row["method"]] = {
                "kl": row["kl"],
                "accuracy": facts["accuracy"],
                "dense": facts["reference_accuracy"],
                "log_probability": facts["log_probability_difference"],
                "interval": facts["log_probability_interval"],
                "n": facts["n"],
            }
        return dict(sorted(found.items()))

    def thresholds(self) -> dict[str, dict[str, float]]:
        """KL and seconds of each threshold of Table 8."""
        found = {}
        for name, entry in sorted(self._entries(TABLE_8).items()):
            score = entry.score("kl")
            timing = self._of(TABLE_8) / name / "timing.json"
            if score is not None and timing.is_file():
                found[name] = {"kl": score["value"], "seconds": sum(read_json(timing)["seconds"].values())}
        return found

    def angles(self) -> tuple[float, float]:
        """Median angle between FASC and SVD, degrees, in the fifth with the highest and with the lowest ρ."""
        rows = sorted((row for row in self.groups() if row["angle"] is not None), key=lambda row: row["rho"])
        fifth = max(1, len(rows) // _FIFTH)
        return median(row["angle"] for row in rows[-fifth:]), median(row["angle"] for row in rows[:fifth])

    def rho_widths(self) -> dict[int, dict[str, float]]:
        """By tokens of calibration: median width of ρ's interval, and correlation with ρ at the most tokens."""
        tables = [folder.name for folder in self._folder.glob(f"{APPENDIX_E}-*")]
        if len(tables) < 2:
            raise FileNotFoundError(f"{APPENDIX_E} was not run")
        sizes = {_tokens(self._result(table)): {row["group"]: row for row in self.groups(table)} for table in tables}
        most = sizes[max(sizes)]
        found: dict[int, dict[str, float]] = {}
        for tokens, rows in sorted(sizes.items()):
            common = [name for name in rows if name in most]
            r = np.corrcoef([rows[name]["rho"] for name in common], [most[name]["rho"] for name in common])[0, 1]
            width = median(row["rho_high"] - row["rho_low"] for row in rows.values())
            found[tokens] = {"width": width, "r": float(r)}
        return found

    def overlaps(self) -> dict[str, dict[str, float]]:
        """Median overlap at half rank: other sequences of a corpus, other corpora, facts and negated facts."""
        rows = [row for row in self._result(SUBSPACES)["summary"] if row["rank_fraction"] == 0.5]
        kinds: dict[str, list[Mapping[str, Any]]] = {"same corpus": [], "other corpora": [], "negated": []}
        for row in rows:
            a, b = (row[key].partition(" #")[0] for key in ("a", "b"))
            kind = "same corpus" if a == b else "negated" if {a, b} == {"lama", "negated-lama"} else "other corpora"
            kinds[kind].append(row)
        return {
            name: {"overlap": median(row["overlap"] for row in some), "chance": median(row["chance"] for row in some)}
            for name, some in kinds.items()
        }

    def hessian(self) -> dict[str, float]:
        """Overlap of the Fisher moments' leading directions with the Hessian's, by group."""
        return {row["group"]: row["fisher"] for row in self._result(SUBSPACES)["hessian"]}

    def emergence(self) -> dict[str, float]:
        """Debiased ρ and accuracy at the first and last checkpoint, with facts and with shuffled ones; means over seeds."""
        found = self._result(EMERGENCE)
        seeds = len({row["seed"] for row in found["rows"]})
        return {"seeds": seeds} | {key: float(value) for key, value in found["summary"].items()}

    def numbers(self) -> dict[str, Any]:
        """Every table as plain values, for benchmarks/results."""
        found: dict[str, Any] = {}
        for table in _RUNS:
            with suppress(FileNotFoundError):
                found[table] = {
                    name: {"scores": list(entry.scores), "totals": (entry.plan or {}).get("totals"), "speeds": list(entry.speeds)}
                    for name, entry in self._entries(table).items()
                }
        parts = {
            "correlation": lambda: {what: self.correlation(what) for what in ("rho", "half_j")},
            "best_threshold": self.best_threshold,
            "critical": self.critical,
            "seeds": self.seeds,
            "layer_types": lambda: {
                kind: {name: one.to_dict() for name, one in row.items()} for kind, row in self.layer_types().items()
            },
            "sensitivity": self.sensitivity,
            "rho_by_third": self.rho_by_third,
            "rho_widths": self.rho_widths,
            "overlaps": self.overlaps,
            "hessian": self.hessian,
            "emergence": self.emergence,
        }
        for name, make in parts.items():
            with suppress(*MISSING):
                found[name] = make()
        return found

    def tables(self) -> dict[str, str]:
        """The tables of scores in Markdown, and those that are compared item by item, by title."""
        found: dict[str, str] = {}
        for table, title in _RUNS.items():
            with suppress(FileNotFoundError):
                found[title] = _scores_table(list(self._entries(table).values()))
        for title, make in {
            "Table 3, item by item against the dense model": self._table_3,
            "Table 6, item by item against the dense model": self._table_6,
            "Table 1 at equal bytes, LAMA item by item": self._equal_size,
            "Table 7, LAMA item by item against the dense model": self._table_7,
            "Figure 2: one block at a time": self._figure_2,
        }.items():
            with suppress(*MISSING):
                found[title] = make()
        return found

    def _equal_size(self) -> str:
        """Every model against the dense one, on facts."""
        rows = [[name, *_paired_cells(self.paired("lama", name, DENSE, EQUAL_SIZE))] for name in self.others(DENSE, EQUAL_SIZE)]
        return markdown_table(("", *_PAIRED), rows)

    def _table_3(self) -> str:
        """Grammar and facts, both methods against the dense model."""
        rows = []
        for benchmark in ("blimp", "mlama", "nq_open"):
            for method in ("fasc", "svd"):
                rows.append([benchmark, method, *_paired_cells(self.paired(benchmark, method, DENSE))])
        return markdown_table(("", "", *_PAIRED), rows)

    def _table_6(self) -> str:
        """Types of relations, likewise."""
        rows = [
            [kind, name, *_paired_cells(one)] for kind, row in self.types("relation_types").items() for name, one in row.items()
        ]
        return markdown_table(("", "", *_PAIRED), rows)

    def _table_7(self) -> str:
        rows = [
            [kind, name, *_paired_cells(one)]
            for kind, row in self.layer_types().items()
            for name, one in row.items()
            if name != "gain"
        ]
        return markdown_table(("", "", *_PAIRED), rows)

    def _figure_2(self) -> str:
        """A row per block."""
        rows = []
        for block, methods in self.sensitivity().items():
            cells = [str(block)]
            for name in ("svd", "fasc"):
                one = methods[name]
                low, high = one["interval"]
                cells += [
                    f"{one['kl']:.4f}",
                    f"{100 * one['accuracy']:.1f} %",
                    f"{one['log_probability']:+.3f} [{low:+.3f}, {high:+.3f}]",
                ]
            rows.append(cells)
        header = ["block"]
        for name in ("svd", "fasc"):
            header += [f"{name}: KL", "LAMA", "Δ log-probability, nats"]
        return markdown_table(header, rows)


_RUNS = {
    TABLE_1: "Tables 1, 3 and 6: half rank",
    METHODS: "Table 1: every method at half rank",
    EQUAL_SIZE: "Table 1 at equal bytes",
    TABLE_4: "Table 4: other rates",
    TABLE_7: "Table 7: the fifths with the highest and the lowest ρ, each compressed alone",
    TABLE_8: "Table 8: thresholds of ρ",
}
"""Tables that are runs of methods."""

_PAIRED = ("n", "dense", "kept", "lost", "gained", "Δ points", "Δ log-probability")


def _paired_cells(one: Paired) -> list[str]:
    return [
        f"{one.n:,}",
        share(one.reference_accuracy),
        share(one.accuracy),
        str(one.lost),
        str(one.gained),
        difference(one.accuracy_difference, one.accuracy_interval, 100, 1),
        difference(one.log_probability_difference, one.log_probability_interval),
    ]


def _correlation(rows: Sequence[Mapping[str, float]], what: str) -> float:
    return float(np.corrcoef([row[what] for row in rows], [row["gain"] for row in rows])[0, 1])


def _best_threshold(rows: Sequence[Mapping[str, float]]) -> float:
    """By balanced accuracy."""
    middle = median(row["gain"] for row in rows)

    def accuracy(at: float) -> float:
        above = [row["rho"] > at for row in rows if row["gain"] > middle]
        below = [row["rho"] <= at for row in rows if row["gain"] <= middle]
        return (mean(above) + mean(below)) / 2

    return max((step / 50 for step in range(1, 30)), key=accuracy)


def _made(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The provenance of a result; a diagnosis has it among its facts."""
    for inner in (found.get("meta", {}), found):
        if "provenance" in inner:
            made: Mapping[str, Any] = inner["provenance"]
            return made
    return {}


def _tokens(result: Mapping[str, Any]) -> int:
    """Of calibration."""
    return int(sum(result["meta"]["tokens_by_process"]))


def _scores_table(entries: Sequence[Entry]) -> str:
    names = list(dict.fromkeys(score["benchmark"] for entry in entries for score in entry.scores))
    header = ["", *names, "weights"]
    rows = []
    for entry in entries:
        weighs = entry.plan["totals"] if entry.plan else {} if entry.rival is None else entry.rival.model_dump()
        size = f"{weighs['bytes'] / 1e6:,.0f} MB" if weighs else ""
        rows.append([entry.name, *(format_score(entry.score(name)) for name in names), size])
    return markdown_table(header, rows)
