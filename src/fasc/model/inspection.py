"""What a checkpoint is, seen before anything of it is loaded. Nothing is unpickled, and no code of it is run."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

from fasc.errors import ModelError
from fasc.storage import read_json

_INDEX = "model.safetensors.index.json"

_CONVERT = (
    "convert it once where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other) writes safetensors"
)


def inspect_folder(folder: Path) -> None:
    """See that a folder holds a model that may be loaded.

    Raises:
        ModelError: it holds no model, an adapter, pickles, a damaged file, or an index that names files outside of it.
        StorageError: a JSON file is damaged; names the line.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(f"`{folder}` is a LoRA adapter, not a model", "merge it into its model first: peft's merge_and_unload")
    if not (folder / "config.json").is_file():
        raise ModelError(f"`{folder}` holds no config.json", "name a folder written by save_pretrained or fasc compress")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"`{folder}` holds a LoRA adapter beside the model",
            "merge it first (peft's merge_and_unload), or remove the adapter's files",
        )
    if (folder / _INDEX).is_file():
        _inspect_index(folder)
    elif not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
        if pickles:
            raise ModelError(f"`{folder}` holds pickles only ({pickles[0]}), and fasc unpickles nothing", _CONVERT)
        raise ModelError(f"`{folder}` holds no safetensors file", "copy the whole folder, or download it again")
    for file in sorted(folder.glob("*.safetensors")):
        _require_readable(file)


def _require_readable(file: Path) -> None:
    """See that a file's header can be read and that the file is as long as it says."""
    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except (OSError, SafetensorError) as problem:
        raise ModelError(f"`{file}` is damaged: {' '.join(str(problem).split())[:200]}", "copy the file again") from problem


def _inspect_index(folder: Path) -> None:
    content = read_json(folder / _INDEX)
    shards = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(shards, Mapping) or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(f"`{folder / _INDEX}` lists no shards", "the checkpoint is damaged; copy it again")
    for name in sorted(set(shards.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"`{folder / _INDEX}` names `{name}`, which is no safetensors file of the folder", _CONVERT)
        if not (folder / name).is_file():
            raise ModelError(f"`{folder}` lacks the shard `{name}`", "copy the whole folder again")


_MOST_BLOCKS = 10_000


def inspect_config(spec: str) -> PretrainedConfig:
    """The config of a folder or hub id, without its code.

    Raises:
        ModelError: the model is quantised by somebody else, or its config names code to run.
        OSError, ValueError, KeyError: transformers' own, for the caller to explain.
    """
    raw, _ = PretrainedConfig.get_config_dict(spec)
    for key, value in raw.items():
        if key.endswith("attn_implementation") and isinstance(value, str) and "/" in value:
            raise ModelError(
                f"`{spec}`: config.json asks for the kernel `{value}`", "fasc runs no code from a checkpoint; remove that line"
            )
    blocks = raw.get("num_hidden_layers")
    if isinstance(blocks, int) and not 0 < blocks <= _MOST_BLOCKS:
        raise ModelError(f"`{spec}`: config.json asks for {blocks:,} blocks", "the config is damaged")
    quantized = raw.get("quantization_config")
    if isinstance(quantized, Mapping) and quantized.get("quant_method") != "fasc":
        method = quantized.get("quant_method", "in an unknown way")
        raise ModelError(f"`{spec}` is quantised already ({method})", "give the unquantised model that it was made from")
    config: PretrainedConfig = AutoConfig.from_pretrained(spec, trust_remote_code=False)
    return config
