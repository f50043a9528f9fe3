"""Which model, how it is loaded, and which of its layers are compressed."""

from fasc.options import DType, Options


class ModelConfig(Options):
    """Which model, and how it is loaded."""

    model: str = "smollm2-135m"
    """A hub id, a Hugging Face folder, a .gguf file, or the alias `smollm2-135m`."""

    dtype: DType = "auto"
    """Precision of the weights; `auto` takes the checkpoint's."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; `auto` takes a GPU where there is one."""

    device_map: str | None = None
    """For a model larger than the device: `auto` fills devices, then memory, then leaves the rest on disk, by whole blocks; or
    a JSON file of part and place, such as `{"model.layers.0": 0, "": "disk"}`."""


class LayersConfig(Options):
    """Which layers are compressed, by shell patterns on their qualified names."""

    include: tuple[str, ...] = ("*",)
    """Layers to compress; the output head and layers outside the blocks are never compressed."""

    exclude: tuple[str, ...] = ()
    """Layers to leave as they are."""
