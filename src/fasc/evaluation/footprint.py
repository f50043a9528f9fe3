"""What a model weighs: load time and memory, looked at in a process that holds nothing else, and bytes on disk."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from fasc.errors import ModelError
from fasc.model.embedded import EMBEDDED, cache_folder
from fasc.model.load import load_model
from fasc.model.offload import DeviceMap
from fasc.options import DType


class Footprint(NamedTuple):
    """Of a model that is alone in its process."""

    load_seconds: float
    resident_bytes: float
    """When loaded, above what the process had before; on a GPU, what is allocated there."""

    peak_bytes: float
    """The most of the whole process, or of the GPU, up to the end of a prefill."""


def footprint(
    model: str | Path, prefill: int, *, dtype: DType = "auto", device: str = "auto", device_map: DeviceMap | None = None
) -> Footprint:
    """Load a model in a process of its own, and run it once on a prompt.

    Args:
        model: as for :func:`~fasc.model.load.load_model`.
        prefill: tokens of the prompt.
        dtype: precision of the weights.
        device: where it lies.
        device_map: where its parts lie, instead.

    Raises:
        ModelError: it cannot be loaded, or there is not enough memory.
    """
    told: dict[str, Any] = {"dtype": dtype, "device": device, "device_map": device_map}
    options = json.dumps({"spec": str(model), "prefill": prefill, **told})
    done = subprocess.run([sys.executable, "-m", __name__, options], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise ModelError(f"cannot look at `{model}` in a process of its own: {last[:300]}", "check that there is memory for it")
    return Footprint(*json.loads(done.stdout.splitlines()[-1]))


def bytes_on_disk(model: str | Path) -> int:
    """Of the safetensors files of a local folder or of a pulled alias; 0 where the files are not known."""
    folder = cache_folder(str(model)) if str(model) in EMBEDDED and not Path(model).exists() else Path(model)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0


def peak_memory() -> int:
    """The most bytes this process had resident so far.

    On Linux not ``getrusage``'s: a process inherits that of the one that started it.
    """
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


_STATUS = Path("/proc/self/status")
"""Where Linux tells of a process's memory, in kB."""


def prompt_of(model: torch.nn.Module, batch: int, length: int) -> torch.Tensor:
    """Tokens drawn by a fixed seed, [batch, length], on the model's device."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(embeddings.num_embeddings, (batch, length), generator=generator).to(embeddings.weight.device)


def _look(spec: str, prefill: int, dtype: DType, device: str, device_map: DeviceMap | None) -> Footprint:
    """In the process of its own."""
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    model = load_model(spec, dtype=dtype, device=device, device_map=device_map).model
    seconds = time.perf_counter() - start
    for parameter in model.parameters():  # weights mapped from a file count only once they have been read
        parameter.data.view(-1)[:: max(1, parameter.numel() // 1000)].sum()
    on_gpu = model.device.type == "cuda"
    loaded = torch.cuda.memory_allocated(model.device) if on_gpu else psutil.Process().memory_info().rss - before
    with torch.no_grad():
        model(input_ids=prompt_of(model, 1, prefill), use_cache=False)
    peak = torch.cuda.max_memory_allocated(model.device) if on_gpu else peak_memory()
    return Footprint(seconds, float(loaded), float(peak))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_look(**json.loads(sys.argv[1]))) + "\n")
