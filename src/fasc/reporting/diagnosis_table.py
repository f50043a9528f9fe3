"""A diagnosis on the terminal."""

from rich.console import Console
from rich.table import Table

from fasc.diagnosis.diagnose import Diagnosis


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """A row per group: ρ and its noise floor, spectra, and per method the rank for 95 % of the energy and ½J."""
    methods = list(diagnosis.rows[0]["methods"])
    table = Table(title=f"forecast at rank fraction {diagnosis.meta['rank_fraction']:g}", title_justify="left")
    columns = ["group", "d_in", "ρ", "ρ₀ (noise)", "effective rank x", "stable rank x", "effective rank g", "stable rank g"]
    for title in [*columns, *(f"{name}: rank for 95 %" for name in methods), *(f"{name}: ½J" for name in methods)]:
        table.add_column(title, justify="left" if title == "group" else "right", overflow="fold")
    for row in diagnosis.rows:
        x, g = row["input"], row.get("gradient")
        scores = ["–" if row[key] is None else f"{row[key]:.3f}" for key in ("rho", "rho_floor")]
        cells = [row["group"], str(row["d_in"]), *scores, f"{x['effective_rank']:.0f}", f"{x['stable_rank']:.1f}"]
        cells += ["–", "–"] if g is None else [f"{g['effective_rank']:.0f}", f"{g['stable_rank']:.1f}"]
        found = [row["methods"][name] for name in methods]
        losses = [values.get("predicted_loss") for values in found]
        cells += [f"{values['rank_95']}/{values['directions']}" for values in found]
        table.add_row(*cells, *("–" if loss is None else f"{loss:.5f}" for loss in losses))
    Console().print(table)
