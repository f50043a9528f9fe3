"""vLLM's plugin: checkpoints of ours run in its Transformers backend, every layout; narrower Llamas in its own Llama.

The entry point ``vllm.general_plugins`` calls :func:`register` in each of vLLM's processes; nothing of vLLM is imported before.
"""

from fasc.serving import model_type
from fasc.serving.block_configs import register_config

ARCHITECTURE = "FascForCausalLM"
"""What vLLM is told a compressed checkpoint is."""

NATIVE_ARCHITECTURE = "FascLlamaForCausalLM"
"""What it is told where only MLPs are narrower."""


def register() -> None:
    """Make vLLM understand our checkpoints; harmless when repeated."""
    from vllm import ModelRegistry  # noqa: PLC0415 - only vLLM calls this
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config  # noqa: PLC0415

    register_config()
    model_type.architecture_for_vllm(ARCHITECTURE, NATIVE_ARCHITECTURE)
    ModelRegistry.register_model(ARCHITECTURE, "fasc.serving.vllm_model:FascForCausalLM")
    ModelRegistry.register_model(NATIVE_ARCHITECTURE, "fasc.serving.vllm_native:FascLlamaForCausalLM")
    if "fasc" not in QUANTIZATION_METHODS:
        from fasc.serving.vllm_model import FascVllmConfig  # noqa: PLC0415

        register_quantization_config("fasc")(FascVllmConfig)
