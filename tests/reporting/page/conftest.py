"""Runs as `fasc run` leaves them, written by hand for a tiny model, and a browser."""

import json
import os
import shutil
import subprocess

import pytest

from fasc.diagnosis.diagnose import diagnose
from fasc.planning.options import MethodConfig
from fasc.provenance import provenance
from fasc.stages.plan import plan
from tests.conftest import tiny_model

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
_OFF = ("gpu", "quic", "background-networking", "component-update", "sync")
FLAGS = ["--headless", "--no-sandbox", "--no-first-run", "--enable-logging=stderr", "--virtual-time-budget=8000"]
FLAGS += [f"--disable-{what}" for what in _OFF]
PROMPT = "Once <upon> a & time"
HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=document.title='broken'>"


def score(benchmark, metric, value, n=100, half=0.1):
    low, high = value * (1 - half), value * (1 + half)
    return {"benchmark": benchmark, "metric": metric, "value": value, "low": low, "high": high, "n": n, "protocol": "as it is"}


def scores_of(quality, *, dense=False):
    """Of a model that is right so often."""
    rows = [score("perplexity", "mean", 20 / quality)]
    rows += [] if dense else [score("kl", "mean", 1 - quality + 1e-3), score("kl", "top-1 agreement", quality)]
    rows += [score("lama", "accuracy", quality / 2)]
    rows += [score("lama", f"accuracy/type={kind}", quality / 3, n=20) for kind in ("geographic", "temporal")]
    return [*rows, score("lama", "accuracy/relation=born in", quality / 4, n=10)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_run(folder, measured, *, text="a dog", fractions=(0.8, 0.5)):
    """A dense model, and one compressed by two methods at each budget."""
    model, statistics = tiny_model(), measured("llama")
    write(folder / "dense" / "scores.json", {"scores": scores_of(0.9, dense=True)})
    write(folder / "dense" / "samples.json", {"samples": [{"prompt": PROMPT, "continuation": "there was"}]})
    for fraction in fractions:
        for method, quality in (("fasc", fraction), ("svd", fraction / 2)):
            place = folder / f"{method}@params{fraction:g}"
            made = plan(model, statistics, method=method, param_fraction=fraction, damping=1e-2)
            write(place / "plan.json", made.to_dict())
            write(place / "scores.json", {"scores": scores_of(quality)})
            write(place / "samples.json", {"samples": [{"prompt": PROMPT, "continuation": text}]})
            row = {"what": "decode, batch 1", "unit": "tokens/s", "dense": 10.0, "compressed": 12.0}
            write(place / "speed.json", {"comparisons": [row | {"ratio": 1.2, "low": 1.1, "high": 1.3}]})
    found = diagnose(model, statistics, [MethodConfig(name="fasc"), MethodConfig(name="svd")], rank_fraction=0.5)
    found.save(folder / "diagnosis.json")
    write(folder / "provenance.json", provenance(model="owner/model", statistics={"token_digest": "abc", "tokens": 480}))
    (folder / "recipe.toml").write_text('[source]\nmodel = "owner/model"\n', encoding="utf-8")
    return folder


@pytest.fixture
def run(measured, tmp_path):
    return write_run(tmp_path / "first", measured, text=HOSTILE)


@pytest.fixture
def browse(tmp_path):
    """Open a page, run a script in it, and give back what the script returns and what the console said."""
    if BROWSER is None:
        pytest.skip("there is no Chromium on this machine")

    def call(page, script, *flags, size=(1280, 900), shot=None):
        probe = page.with_name("probe.html")
        checks = f"""<script>(async () => {{
          const pause = (ms) => new Promise((go) => setTimeout(go, ms));
          while (!document.body.dataset.drawn) await pause(20);
          let result; try {{ result = await (async () => {{ {script} }})(); }} catch (problem) {{ result = String(problem); }}
          const found = document.body.appendChild(document.createElement("script"));
          found.type = "application/json"; found.id = "found"; found.textContent = JSON.stringify(result ?? null).replaceAll("<", "\\\\u003c");
        }})();</script></body>"""
        head, _, tail = page.read_text(encoding="utf-8").rpartition("</body>")
        probe.write_text(head + checks + tail, encoding="utf-8")
        command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size[0]},{size[1]}", *flags]
        command += [f"--screenshot={shot}"] if shot else ["--dump-dom"]
        done = subprocess.run(
            [*command, probe.as_uri()], capture_output=True, text=True, timeout=120, check=False, env=os.environ
        )
        said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        head = '<script type="application/json" id="found">'
        found = done.stdout.partition(head)[2].partition("</script>")[0] if head in done.stdout else "null"
        return json.loads(found), said

    return call
