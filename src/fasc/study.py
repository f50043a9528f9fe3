"""Recipes of the paper's tables and figures: files that name a verb, files that list other files, and two scales of each.

Any recipe may hold tables ``[scale.small]`` and ``[scale.paper]``, which are laid over the rest. A recipe with ``verb`` runs a
verb of the command line with its ``[options]``, once for each value of the option in its ``[sweep]``; one with ``parts`` runs
others, and then writes the verdicts.
"""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Mapping
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from fasc import runner
from fasc.errors import StorageError, UsageError
from fasc.evaluation.registry import get_benchmark
from fasc.outputs import existing_paths, is_ours, write_artifact
from fasc.progress import say
from fasc.provenance import digest, file_digest, provenance, versions
from fasc.recipe import Recipe, recipe_of, recipe_values
from fasc.reporting.verdicts import FIGURES, gather, page
from fasc.runfolder import require_name, run_folder
from fasc.storage import new_file, read_json
from fasc.text.named import data_folder
from fasc.text.sources import text_key

SCALES = ("small", "paper")
_VERBS = ("bench", "compare", "diagnose", "emergence", "evaluate", "subspace-overlap", "validate")
"""Verbs that write what they measured as JSON."""

RESULT = "result.json"

_TEXTS = ("--corpus", "--corpora")
_READ = ("--statistics", "--held-out", "--plan", "--dense", "--checkpoints", "--validation")
"""Options that name what a verb reads from this machine, beside its model and the texts."""

_PR_SET_PDEATHSIG = 1


class Work(NamedTuple):
    """One thing to do for one model."""

    name: str
    model: str
    recipe: Recipe | None
    """A run, or ``None``."""

    command: tuple[str, ...]
    """Otherwise a verb with its arguments."""


def run_study(path: Path, out: Path, *, scale: str = "small", model: str | None = None, overwrite: bool = False) -> Path:
    """Carry out a recipe of one table, or one that lists several and ends with the verdicts; goes on where it stopped.

    Args:
        path: of the recipe.
        out: its folder; each table has one of its own in it.
        scale: ``small`` or ``paper``.
        model: instead of the recipes' own.
        overwrite: start runs over.

    Returns:
        The page of verdicts, or the folder of the table.

    Raises:
        UsageError: a recipe is not valid; all are read before anything is done.
        StorageError: a folder holds something else, or what was made of other contents (without ``overwrite``).
        FascError: any stage's own.
    """
    values = recipe_values(path)
    lists = "parts" in values
    planned = [work for part in (parts_of(path, values) if lists else [path]) for work in works(part, scale, model)]
    several = {work.name for work in planned if sum(other.name == work.name for other in planned) > 1}
    alone = len(planned) == 1 and not lists
    folders = [out if alone else out / folder_of(work, several=work.name in several) for work in planned]
    if lists:
        _require_own_page(out)
    kept = _kept(out / RESULTS)
    for work, folder in zip(planned, folders, strict=True):
        say(f"{work.name}, {work.model}")
        if work.recipe is not None:
            runner.run(work.recipe, folder, overwrite=overwrite)
        else:
            carry_out_verb(work, folder, overwrite=overwrite)
        if lists:  # after each part, so that one that fails later takes nothing away
            made = provenance(recipe=path.name, scale=scale, models=sorted({work.model for work in planned}))
            write_verdicts(out, made, kept)
    return out / VERDICTS if lists else out


def judge_study(path: Path, out: Path, *, scale: str = "small", keep: bool = False) -> Path:
    """Only write the verdicts, on what results there are.

    Args:
        path: of a recipe that lists others.
        out: the folder of their results.
        scale: that they were made at.
        keep: what the page in the folder says of parts that have no result there: the parts of a study may be run in several
            places, at several times.

    Raises:
        UsageError: the recipe lists no others, the folder does not exist, or has no page of that scale to keep.
    """
    if "parts" not in recipe_values(path):
        raise UsageError(f"recipe `{path}` lists no others, and has no verdicts", "recipes/paper.toml does")
    if not out.is_dir():
        raise UsageError(f"`{out}` holds no results", f"run `fasc run {path} --out {out}` first")
    _require_own_page(out)
    if not keep and (held := _kept(out / RESULTS)) is not None:
        raise StorageError(
            f"`{out / RESULTS}` holds {len(held['kept'])} verdicts of parts that have no result here",
            "give --keep, or another --out",
        )
    write_verdicts(out, provenance(recipe=path.name, scale=scale), _earlier(out / RESULTS, scale) if keep else None)
    return out / VERDICTS


def _kept(file: Path) -> dict[str, Any] | None:
    """A page that holds what was measured elsewhere, which exists nowhere else."""
    found: dict[str, Any] = read_json(file) if file.is_file() else {}
    return found if found.get("kept") else None


def _earlier(file: Path, scale: str) -> dict[str, Any]:
    """What the page says so far.

    Raises:
        UsageError: there is none of this version and scale.
    """
    found: dict[str, Any] = read_json(file) if file.is_file() else {}
    if "sections" not in found:
        raise UsageError(f"`{file}` is no page that could be kept", "leave --keep away")
    if found["provenance"].get("scale") != scale:
        raise UsageError(
            f"`{file}` is of scale {found['provenance'].get('scale')}, not {scale}", "leave --keep away, or give its --scale"
        )
    return found


VERDICTS = "verdicts.md"


RESULTS = "results.json"


def _require_own_page(out: Path) -> None:
    """See that the page of verdicts and its numbers replace none but ours.

    Raises:
        StorageError: names the file.
    """
    for file in (out / VERDICTS, out / RESULTS, *(out / FIGURES).glob("*.png")):
        if file.exists() and not is_ours(file):
            raise StorageError(f"`{file}` already exists and was not written by fasc", "choose another --out, or move the file")


def write_verdicts(out: Path, made: dict[str, Any], earlier: dict[str, Any] | None = None) -> None:
    """Write the page of verdicts and the numbers it was made from, of whatever parts have a result."""
    found = gather(out, made, earlier)
    write_artifact(out / RESULTS, "verdicts", found)
    with new_file(out / VERDICTS) as scratch:
        scratch.write_text(page(found), encoding="utf-8")


def is_study(values: Mapping[str, Any]) -> bool:
    """Whether a recipe's values name a verb or other recipes."""
    return "verb" in values or "parts" in values


def at_scale(values: Mapping[str, Any], scale: str, path: Path) -> dict[str, Any]:
    """The values with those of a scale laid over them.

    Raises:
        UsageError: there is no such scale.
    """
    found = deepcopy(dict(values))
    scales = found.pop("scale", {})
    if not isinstance(scales, dict) or not all(isinstance(one, dict) for one in scales.values()):
        raise UsageError(f"recipe `{path}`: `scale` is no table of tables", "[scale.paper] with the values that differ")
    if scale not in SCALES or not set(scales) <= set(SCALES):
        raise UsageError(f"recipe `{path}`: scale `{scale}` of {', '.join(scales) or 'none'}", f"known: {', '.join(SCALES)}")
    return _laid_over(found, scales.get(scale, {}), path)


def _laid_over(below: dict[str, Any], above: Mapping[str, Any], path: Path) -> dict[str, Any]:
    for key, value in above.items():
        under = below.get(key, {} if isinstance(value, dict) else value)
        if isinstance(value, dict) and not isinstance(under, dict):
            raise UsageError(f"recipe `{path}`: `{key}` is no table", f"[{key}] with its values")
        below[key] = _laid_over(under, value, path) if isinstance(value, dict) else value
    return below


def works(path: Path, scale: str, model: str | None) -> list[Work]:
    """What a recipe of one table asks for: once for each of its models.

    Args:
        path: of the recipe.
        scale: ``small`` or ``paper``.
        model: instead of the recipe's.

    Raises:
        UsageError: no valid recipe; names the file.
    """
    values = at_scale(recipe_values(path), scale, path)
    source = values.get("source", {})
    if not isinstance(source, dict):
        raise UsageError(f"recipe `{path}`: `source` is no table", '[source] with a line model = "owner/name"')
    models = values.pop("models", None) or [source.get("model") or values.pop("model", None) or "smollm2-135m"]
    models = [model] if model is not None else models
    if not isinstance(models, list) or not all(isinstance(one, str) and one and not one.startswith("-") for one in models):
        raise UsageError(f"recipe `{path}`: its models are no list of names", 'models = ["owner/name", …]')
    values.pop("model", None)
    if "verb" in values:
        sweep = _sweep(values.pop("sweep", {}), path)
        return [
            Work(path.stem + name, one, None, _command(_laid_over(deepcopy(values), more, path), one, path))
            for name, more in sweep.items()
            for one in models
        ]
    return [
        Work(path.stem, one, recipe_of(_laid_over(deepcopy(values), {"source": {"model": one}}, path), path), ())
        for one in models
    ]


def _sweep(asked: Any, path: Path) -> dict[str, dict[str, Any]]:
    """What each value of a sweep adds to a recipe's name, and lays over its values; without one nothing, once.

    Raises:
        UsageError: it is no option with a list of numbers or words.
    """
    if asked == {}:
        return {"": {}}
    values = next(iter(asked.values())) if isinstance(asked, dict) and len(asked) == 1 else None
    if not isinstance(values, list) or not values or not all(isinstance(one, (int, float, str)) for one in values):
        raise UsageError(
            f"recipe `{path}`: `sweep` is no option with its values", "[sweep] with one line, such as seed = [1, 2, 3]"
        )
    return {f"-{value}": {"options": {option: value}} for option in asked for value in values}


def _command(values: Mapping[str, Any], model: str, path: Path) -> tuple[str, ...]:
    verb, options = values["verb"], values.get("options", {})
    unknown = sorted(set(values) - {"verb", "options"})
    if verb not in _VERBS or unknown:
        what = f"unknown key `{unknown[0]}`" if unknown else f"unknown verb `{verb}`"
        raise UsageError(
            f"recipe `{path}`: {what}", f"verbs: {', '.join(_VERBS)}; keys: verb, model, models, options, sweep, scale"
        )
    if not isinstance(options, dict):
        raise UsageError(f"recipe `{path}`: `options` is no table", "[options] with one line per option")
    flags: list[str] = []
    for key, value in options.items():
        if key in ("json", "help") or not isinstance(value, (str, int, float)) or value is False:
            raise UsageError(f"recipe `{path}`: option `{key}` cannot be {value!r}", "a number, words in quotes, or true")
        flags += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return (verb, *(() if verb == "emergence" else (model,)), *flags)


def folder_of(work: Work, *, several: bool) -> str:
    """Name of a work's folder: the recipe's, and the model's where there are several.

    Raises:
        UsageError: the model's name gives no name of a folder.
    """
    last = work.model.rstrip("/").rpartition("/")[2]
    return require_name(f"{work.name} {last}" if several else work.name, ())


def carry_out_verb(work: Work, folder: Path, *, overwrite: bool = False) -> None:
    """Run a verb in a process of its own, unless its result on the same contents stands.

    Raises:
        UsageError: it failed; what it said stands above. What stood before is left as it was.
        StorageError: the folder holds something else, or a result of other contents.
    """
    identity = {"command": list(work.command), "model": work.model, "contents": _contents(work)}
    with run_folder(folder, identity, [RESULT], overwrite=overwrite) as (place, goes_on):
        result = place / RESULT
        if goes_on and result.is_file():
            say(f"{folder} holds this result already")
            return
        asked = [sys.executable, "-m", "fasc", *work.command, "--json", str(result)]
        done = subprocess.run(asked, stdout=subprocess.DEVNULL, check=False, preexec_fn=_end_with_the_parent)
        if done.returncode != 0:
            raise UsageError(
                f"`fasc {' '.join(work.command)}` failed with exit code {done.returncode}", "its own message stands above"
            )
        if not result.is_file():
            raise UsageError(
                f"`fasc {' '.join(work.command)}` wrote no result", "leave options out that print and end, such as help"
            )


def _end_with_the_parent() -> None:
    """A child that outlives a killed run would write into what is another's by then. Linux alone can say this."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _contents(work: Work) -> dict[str, str]:
    """Digests of what a verb reads from this machine, and the program's version: what changes them makes another result."""
    options = dict(pairwise(work.command))
    found = {"fasc": versions()["fasc"]}
    found |= {str(path): _digest_of(path) for path in existing_paths([work.model, *(options.get(read) for read in _READ)])}
    data = Path(options["--data-dir"]) if "--data-dir" in options else None
    for corpus in _TEXTS:
        if corpus in options:
            found[corpus] = text_key(options[corpus], "calibration", data)
    place = data_folder(data)
    for name in (part.strip() for part in options.get("--benchmarks", "").split(",")):
        for file in get_benchmark(name).files if name else ():
            if place is not None and (place / file).is_file():
                found[file] = file_digest(place / file)
    return found


def _digest_of(path: Path) -> str:
    """Of a file, or of a model's or a statistics' folder; of another folder nothing but that it is there."""
    if path.is_file():
        return file_digest(path)
    files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".safetensors", ".gguf"))
    return digest(f"{file.name} {file_digest(file)}".encode() for file in files)


def parts_of(path: Path, values: Mapping[str, Any]) -> list[Path]:
    """The recipes that a recipe lists, found beside it.

    Raises:
        UsageError: one does not exist, or two have one name.
    """
    parts = values["parts"]
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) for part in parts):
        raise UsageError(f"recipe `{path}`: `parts` is no list of files", 'parts = ["paper/table-1.toml", …]')
    if len(values) > 1:
        other = next(key for key in values if key != "parts")
        raise UsageError(f"recipe `{path}` lists others, and `{other}` means nothing there", "write it into these")
    found = [path.parent / part for part in parts]
    for file in found:
        if not file.is_file():
            raise UsageError(f"recipe `{path}` lists `{file}`, which does not exist", "paths count from the recipe's own folder")
    stems = [file.stem for file in found]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None:
        raise UsageError(f"recipe `{path}` lists two files called `{twice}`", "each part needs a name of its own")
    return found
