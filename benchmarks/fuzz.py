"""Many damaged inputs and many kill points; writes the tables of docs/security.md.

    make fuzz                     # 2,100 inputs and 12 points for each verb, some minutes
    python benchmarks/fuzz.py --inputs 7000 --points 40

A case that fails is printed with its name; ``FASC_FUZZ_CASE=plan:37 pytest tests/fuzz/test_fuzz.py`` repeats it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PAGE, RESULTS = ROOT / "docs" / "security.md", ROOT / "benchmarks" / "results" / "fuzz.json"


def inputs(count: int) -> tuple[dict[str, dict[str, int]], int]:
    """Outcomes by what was damaged, and the exit code of the tests."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as out:
        environment = os.environ | {"FASC_FUZZ": str(count), "FASC_FUZZ_OUT": out.name, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "0", "--tb=line", str(ROOT / "tests" / "fuzz" / "test_fuzz.py")],
            env=environment, cwd=ROOT, check=False,
        )  # fmt: skip
        return json.load(out), done.returncode


def kills(points: int) -> list[dict[str, object]]:
    """Every kill point and what became of it."""
    import dataclasses

    from tests import conftest
    from tests.fuzz.kills import kill_everywhere

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        conftest.tiny_model().save_pretrained(folder)
        conftest.byte_tokenizer().save_pretrained(folder)
        done = []
        for kill in kill_everywhere(Path(scratch), folder, points):
            done.append(dataclasses.asdict(kill))
            if not kill.survived:
                print(kill, flush=True)
        return done


def tables(counts: dict[str, dict[str, int]], killed: list[dict[str, object]]) -> dict[str, list[str]]:
    """Both tables in Markdown."""
    columns = list(next(iter(counts.values())))
    first = [f"| damaged | cases | {' | '.join(columns)} |", "|---|--:" + "|--:" * len(columns) + "|"]
    first += [
        f"| {name} | {sum(row.values())} | {' | '.join(str(row[one]) for one in columns)} |" for name, row in counts.items()
    ]
    total = Counter[str]()
    for row in counts.values():
        total.update(row)
    first.append(f"| **all** | **{sum(total.values())}** | {' | '.join(f'**{total[one]}**' for one in columns)} |")
    second = ["| verb | kill points | ended as undisturbed |", "|---|--:|--:|"]
    verbs = dict.fromkeys(str(one["verb"]) for one in killed)
    for verb in verbs:
        own = [one for one in killed if one["verb"] == verb]
        second.append(f"| `{verb}` | {len(own)} of {own[0]['of']} | {sum(bool(one['survived']) for one in own)} |")
    second.append(f"| **all** | **{len(killed)}** | **{sum(bool(one['survived']) for one in killed)}** |")
    return {"inputs": first, "kills": second}


def main() -> None:
    """Run both, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2100)
    parser.add_argument("--points", type=int, default=12)
    options = parser.parse_args()
    counts, code = inputs(options.inputs)
    killed = kills(options.points)
    page = PAGE.read_text(encoding="utf-8")
    for name, lines in tables(counts, killed).items():
        start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
        before, _, rest = page.partition(start)
        page = before + "\n".join((start, "", *lines, "", end)) + rest.partition(end)[2]
        print("\n".join(lines))
    PAGE.write_text(page, encoding="utf-8")
    RESULTS.write_text(json.dumps({"inputs": counts, "kills": killed}, indent=1) + "\n", encoding="utf-8")
    sys.exit(code or any(not one["survived"] for one in killed))


if __name__ == "__main__":
    main()
