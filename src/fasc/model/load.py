"""A model and its tokenizer from a hub id, a folder, a GGUF file or an alias."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from fasc.errors import FascError, ModelError, NonFiniteError, UsageError
from fasc.model import embedded
from fasc.model.experts import is_fused
from fasc.model.inspection import inspect_config, inspect_folder
from fasc.model.offload import DeviceMap, all_numbers, numbers_of, read_device_map, require_whole_blocks, whole_parts
from fasc.model.quiet import quiet_transformers
from fasc.options import DType
from fasc.processes import current
from fasc.progress import say
from fasc.provenance import digest

_LOADING_PROBLEMS = Exception
"""Whatever the parsers of other people's files raise: a Rust tokenizer a bare ``Exception``, a config a class of its own."""


class LoadedModel(NamedTuple):
    """A causal language model in evaluation mode and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_model(
    spec: str | Path, *, dtype: DType = "auto", device: str = "auto", device_map: DeviceMap | None = None
) -> LoadedModel:
    """Load a causal language model, dense or compressed.

    Only safetensors and GGUF are read: nothing is unpickled, and no code from a checkpoint is run.

    Args:
        spec: a hub id, a local Hugging Face folder, a ``.gguf`` file, or the alias ``smollm2-135m``.
        dtype: precision of the weights; ``auto`` takes the checkpoint's.
        device: ``cpu``, ``cuda``, …; ``auto`` takes a GPU where there is one.
        device_map: for a model larger than the device: ``auto``, a JSON file of it, or part ↦ place.

    Raises:
        ModelError: it does not exist, is damaged, or lacks weights; a device map that splits a block.
        NonFiniteError: a weight holds NaN or infinity.
        UsageError: a device and a device map, or a device map that cannot be read.
    """
    if device_map is not None:
        return _load_placed(str(spec), dtype, device, read_device_map(device_map))
    place = _device(device)
    loaded = _load_path(str(spec), dtype)
    require_causal(loaded.model, str(spec))
    model = loaded.model.to(place)
    _require_finite(model)
    return LoadedModel(model.eval(), loaded.tokenizer)


def _load_placed(spec: str, dtype: DType, device: str, device_map: DeviceMap) -> LoadedModel:
    """Load a model part by part, each where the map says."""
    if device != "auto":
        raise UsageError(f"a device (`{device}`) and a device map were given", "leave --device out: the map says where parts go")
    if current().count > 1:
        raise UsageError("each of several processes holds a whole model", "leave --device-map or --nproc out")
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        raise ModelError(f"`{spec}` cannot be loaded with a device map", "make a safetensors checkpoint of it first")
    if isinstance(device_map, Mapping):
        place = embedded.pull(spec) if spec in embedded.EMBEDDED and not path.exists() else spec
        device_map = whole_parts(model_of_config(place), device_map)
    loaded = _load_path(spec, dtype, device_map=device_map)
    model = loaded.model
    require_causal(model, spec)
    placed = getattr(model, "hf_device_map", None) or {}
    require_whole_blocks(model, placed)
    if model.device.type == "meta":
        raise ModelError("the device map leaves the embedding on disk or offloaded", "give the embedding a device, or `cpu`")
    if any(is_fused(module) and hasattr(module, "_hf_hook") for module in model.modules()):
        raise ModelError(f"the experts of {type(model).__name__} cannot be offloaded", "leave --device-map out")
    _require_finite(model)
    return LoadedModel(model.eval(), loaded.tokenizer)


def model_of_config(spec: str | Path, *, dtype: DType = "auto") -> PreTrainedModel:
    """The model that a config describes, on the meta device: names and shapes of its layers, and no numbers.

    Args:
        spec: a hub id, an alias, a folder with a config.json, or such a file.
        dtype: precision of the weights; ``auto`` takes the config's.

    Raises:
        ModelError: there is no config, or it is of no causal model that transformers knows.
    """
    path = Path(spec).expanduser()
    place = str(path) if path.exists() else str(spec)
    if place in embedded.EMBEDDED and not path.exists():
        place = str(embedded.pull(place))
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"`{spec}` holds no config.json", "name a folder of a model, its config.json, or a hub id")
    try:
        with quiet_transformers():
            config = inspect_config(place)
            precision = getattr(config, "dtype", None) or torch.float32 if dtype == "auto" else getattr(torch, dtype)
            with torch.device("meta"):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=precision, attn_implementation="eager")
    except FascError:
        raise
    except _LOADING_PROBLEMS as problem:
        raise _explain(str(spec), problem) from problem
    require_causal(model, str(spec))
    return model.eval()


def require_causal(model: PreTrainedModel, spec: str) -> None:
    """Refuse an encoder: a token sees the ones after it, so nothing is predicted.

    Raises:
        ModelError: it is one.
    """
    config = model.config.get_text_config()
    if False in (getattr(config, "is_decoder", None), getattr(config, "causal", None)) and any(
        getattr(module, "is_decoder", None) is False for module in model.modules()
    ):
        raise ModelError(
            f"`{spec}` is an encoder: in {type(model).__name__} a token sees those after it",
            "give a causal language model; if it is one, its config.json says so by `is_decoder`",
        )


def _load_path(spec: str, dtype: DType, **options: Any) -> LoadedModel:
    path = Path(spec).expanduser()
    spec = str(path) if path.exists() else spec
    if spec in embedded.EMBEDDED and not path.exists():
        return _load_alias(spec, dtype, **options)
    _require_place(spec, path)
    if path.suffix == ".gguf":
        return load_gguf(path, dtype)
    if path.is_dir():
        inspect_folder(path)
    return _from_pretrained(spec, dtype, **options)


def _require_place(spec: str, path: Path) -> None:
    """See that something may be there: a folder, a file, or a hub id."""
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"`{spec}` does not exist", "check the path of the .gguf file")
    elif not path.is_dir() and (path.exists() or spec.startswith((".", "/", "~")) or spec.count("/") != 1):
        aliases = ", ".join(embedded.EMBEDDED)
        raise ModelError(
            f"unknown model `{spec}`: no such folder, .gguf file or alias",
            f"aliases: {aliases}; a hub id looks like `owner/name`",
        )


def require_same_tokenizer(specs: Sequence[str]) -> None:
    """See that models split text alike, before any of them is loaded.

    Args:
        specs: as :func:`load_model` takes them; the first is what the others are held against.

    Raises:
        UsageError: one splits it otherwise; log-probabilities of differently split answers cannot be compared.
        ModelError: one has no tokenizer that loads.
    """
    first = _tokenizer_alone(specs[0])
    for spec in specs[1:]:
        other = _tokenizer_alone(spec)
        if other.get_vocab() != first.get_vocab():
            raise UsageError(
                f"`{spec}` and `{specs[0]}` have different tokenizers: {len(other)} and {len(first)} tokens",
                "compare models of one tokenizer: the log-probability of an answer depends on how it is split",
            )


def _tokenizer_alone(spec: str) -> PreTrainedTokenizerBase:
    path = Path(spec).expanduser()
    if spec in embedded.EMBEDDED and not path.exists():
        with suppress(ModelError), current().first_alone():
            return _tokenizer(str(embedded.pull(spec)), {})
        spec = embedded.EMBEDDED[spec].hub_id
    _require_place(spec, path)
    with quiet_transformers():
        if path.suffix == ".gguf":
            return _tokenizer(str(path.parent), {"gguf_file": path.name})
        if path.exists():
            return _tokenizer(str(path), {})
        try:
            return _tokenizer(spec, {})
        except ModelError as problem:
            try:
                AutoConfig.from_pretrained(spec, trust_remote_code=False)
            except _LOADING_PROBLEMS as absent:  # the model is not there at all
                raise _explain(spec, absent) from absent
            raise problem


def _load_alias(alias: str, dtype: DType, **options: Any) -> LoadedModel:
    try:
        with current().first_alone():
            folder = str(embedded.pull(alias))
    except ModelError as problem:
        hub_id = embedded.EMBEDDED[alias].hub_id
        say(f"{problem.message}; trying the hub: {hub_id}")
        try:
            return _from_pretrained(hub_id, dtype, **options)
        except ModelError:
            raise problem from None
    return _from_pretrained(folder, dtype, **options)


def load_gguf(path: Path, dtype: DType = "auto") -> LoadedModel:
    """Load a GGUF file, dequantised to float32 (or ``dtype``).

    Raises:
        ModelError: the file is damaged or of an architecture that transformers cannot dequantise.
    """
    options = {"quantization_config": GgufConfig(dequantize=True), "gguf_file": path.name}
    return _from_pretrained(str(path.parent), "float32" if dtype == "auto" else dtype, **options)


def _from_pretrained(spec: str, dtype: DType, **options: Any) -> LoadedModel:
    gguf = {key: value for key, value in options.items() if key == "gguf_file"}
    precision = dtype if dtype == "auto" else getattr(torch, dtype)
    own: dict[str, Any] = gguf or {"use_safetensors": True}
    try:
        with quiet_transformers():
            if not gguf:
                inspect_config(spec)
            model, info = AutoModelForCausalLM.from_pretrained(
                spec, dtype=precision, output_loading_info=True, trust_remote_code=False, **(own | options)
            )
            tokenizer = _tokenizer(spec, gguf)
    except NonFiniteError:
        raise
    except FascError as problem:  # our quantizer's, which does not know the folder
        message = problem.message if spec in problem.message else f"`{spec}`: {problem.message}"
        raise ModelError(message, problem.hint) from problem
    except _LOADING_PROBLEMS as problem:
        raise _explain(spec, problem) from problem
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(f"`{spec}` is a LoRA adapter, not a model", "merge it into its model first: peft's merge_and_unload")
    absent = sorted(info.get("missing_keys", ()))
    if absent:
        raise ModelError(
            f"`{spec}`: {len(absent)} weights are missing, the first is `{absent[0]}`",
            "the checkpoint is incomplete or its config.json belongs to another model",
        )
    if gguf:
        model.config.quantization_config = None
        del model.config.quantization_config
    return LoadedModel(model, tokenizer)


def _tokenizer(spec: str, gguf: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(spec, trust_remote_code=False, **gguf)
        tokenizer.decode(tokenizer("a").input_ids)  # a damaged one may load and fail at its first word
    except _LOADING_PROBLEMS as problem:
        first = next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise ModelError(
            f"`{spec}` has no tokenizer that loads: {first[:200]}", "copy its tokenizer files into the folder"
        ) from problem
    return tokenizer


def _explain(spec: str, problem: Exception) -> ModelError:
    if "out of memory" in str(problem).lower() or isinstance(problem, MemoryError):
        raise problem
    text = str(problem)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(problem).__name__)
    hint = "check the folder: config.json may be damaged, or a safetensors file missing, truncated or of another model"
    if "couldn't connect" in text or "not a local folder" in text or "offline" in text.lower():
        hint = "give a local folder, or connect to the hub; `smollm2-135m` needs only a package index"
    elif "ignore_mismatched_sizes" in text:
        first = "its weights have other shapes than its config.json says"
        hint = "the checkpoint is damaged, or its config.json belongs to another model"
    elif "trust_remote_code" in text:
        hint = "fasc runs no code from a checkpoint; use an architecture that transformers knows"
    return ModelError(f"cannot load `{spec}`: {first[:300]}", hint)


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as problem:
        raise ModelError(f"unknown device `{device}`", "cpu, cuda, cuda:1, …") from problem
    if chosen.type == "cpu":
        return chosen
    usable = getattr(torch, chosen.type, None) if chosen.type != "meta" else None
    count = usable.device_count() if usable is not None and hasattr(usable, "device_count") and usable.is_available() else 0
    if (chosen.index or 0) >= count:
        raise ModelError(f"device `{device}` is not available on this machine", "use --device cpu")
    return chosen


def _require_finite(model: PreTrainedModel) -> None:
    for name, _ in model.named_parameters():
        parent, _, key = name.rpartition(".")
        if not bool(torch.isfinite(numbers_of(model.get_submodule(parent), key)).all()):
            raise NonFiniteError(f"weight `{name}`", "the checkpoint is damaged; load another copy")


def model_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over the names, shapes and values of all weights."""

    def parts() -> Iterator[bytes]:
        for name, tensor in all_numbers(model):
            yield f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode()
            yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data

    return digest(parts())
