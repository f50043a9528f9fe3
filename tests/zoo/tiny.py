"""A tiny config of any causal architecture of transformers: its own defaults, with every size made small by its name."""

import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 256

RULES: tuple[tuple[str, int], ...] = (
    # first match wins; names are whole
    (r"(text_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"hidden_size_per_layer_input|linear_(key|value)_head_dim|linear_head_dim|mamba_head(_)?dim|mamba_headdim|mamba_d_head", 16),
    (r"hidden_size|d_model|n_embd|emb(edding)?_(dim|size)|word_embed_proj_dim|lru_width|attention_hidden_size", 64),
    (r"(num_)?(hidden_layers|layers|blocks)|n_layers?|decoder_layers|num_decoder_layers|max_window_layers", 3),
    (r"(num_)?encoder_layers", 2),
    (r"num_key_value_heads|linear_num_key_heads|index_n_heads", 2),
    (r"mamba_n_heads|n_mamba_heads|mamba_num_heads", 8),
    (r"(num_|n_|decoder_|encoder_|num_decoder_|num_encoder_)?(attention_)?heads?|linear_num_value_heads|linear_num_heads", 4),
    (r"(global_|swa_)?head_dim|d_head|dim_head|v_head_dim|qk_nope_head_dim|index_head_dim|kv_lora_rank|attention_head_size", 16),
    (r"q_lora_rank|o_lora_rank", 32),
    (r"qk_rope_head_dim|rotary_dim|laurel_rank|adapter_rank", 8),
    (r"(moe_|shared_|moe_shared_)(expert_|experts_)?intermediate_size|shared_experts?_intermediate_size|expert_ffn_hidden_size", 32),
    (r".*intermediate_size(_mlp)?|(encoder_|decoder_)?ffn_dim|d_inner|dff|dim_ff|(ffn_)?feed_forward_size|ffn_hidden_size|mamba_d_ssm", 128),
    (r"(num_|n_|moe_num_)(local_|routed_)?experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|o_groups|type_vocab_size", 2),
    (r"n_group|topk_group|num_expert_group|(n_|num_|moe_num_)shared_experts|zero_expert_num|num_dense_layers|first_k_dense_replace", 1),
    (r"mamba_ngroups|mamba_n_groups|n_groups", 1),
    (r"num_kv_shared_layers|num_nextn_predict_layers", 0),
    (r"index_topk|mamba_d_state|(ssm_)?state_size|(mamba_)?chunk_size|block_size|block_multiple_of|router_hidden_size|query_pre_attn_scalar", 16),
    (r"index_topk_blocks", 2),
    (r"index_block_size|mamba_dt_rank|time_step_rank", 8),
    (r"sliding_window|local_attention|attention_window_size|attention_chunk_size", 32),
    (r"(original_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_sequence_length", 256),
    (r"dim_model_base", 64),
    (r"bos_token_id|decoder_start_token_id", 0),
    (r"eos_token_id", 1),
    (r"pad_token_id", 2),
)  # fmt: skip

DEFAULT = object()
"""Leaves the family's own default."""

_LATENT = {"num_key_value_heads": 4, "head_dim": 8}
_FOUR = {"num_hidden_layers": 4}
_HYBRID_ATTENTION = {"attention_hidden_size": 128, "attention_head_dim": 32, "head_dim": DEFAULT}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "axk1", "axk2", "glm4_moe_lite", "glm_moe_dsa", "youtu", "minicpm3"), _LATENT
    ),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "gemma3n_text", "llama4_text"), _FOUR),
    "minimax": _FOUR,
    "bailing_hybrid": {"num_hidden_layers": 6, "num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 3,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {"per_layer_config": None, "num_key_value_heads": 4},
    **dict.fromkeys(  # noqa: RUF024 - nobody changes it
        ("gemma4_text", "gemma4_unified_text"),
        {**_FOUR, "per_layer_config": None, "global_head_dim": 16, "num_global_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_FOUR, **_LATENT},
    "laguna": {"num_attention_heads_per_layer": [4, 4, 4]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {**_LATENT, "num_layers": 2, "num_hidden_layers": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron_h": {"num_hidden_layers": DEFAULT},
    "qwen4_exp_text": {
        **_FOUR, "hc_lowrank": 8, "ple_embed_dim": 16, "ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"], "axial_pos_embds": False, "num_buckets": 4, "num_hidden_layers": 2, "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8, "is_decoder": True,
    },
    "xlstm": {"num_heads": 4, "num_blocks": 3},
    "zaya": {**_FOUR, "num_experts_per_tok": 1},
    "zamba": {
        **_FOUR, **_HYBRID_ATTENTION, "n_mamba_heads": 2,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
    },
    "zamba2": {
        **_FOUR, **_HYBRID_ATTENTION, "num_key_value_heads": 4, "num_mem_blocks": 1, "kv_channels": 16, "num_query_groups": 4,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
    },
}  # fmt: skip
"""What a family wants beside the rules."""

DECODERS = {"bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert"} | {
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""Encoders that are causal when they are told so."""


def causal_types() -> list[str]:
    """Every ``model_type`` that has a causal class in the installed transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A config of a few thousand parameters."""
    kind = CONFIG_MAPPING[model_type]
    own = OWN.get(model_type, {})
    given = _with(_sizes(kind), own)
    if model_type in DECODERS:
        given["is_decoder"] = True
    parts = {name: value for name, value in _parts(kind).items() if name not in given}
    config: PreTrainedConfig = kind(**parts, **given)
    return config


def _with(sizes: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**sizes, **own}.items() if value is not DEFAULT}


def _sizes(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Each size that the rules know; of two names of one field, the newer."""
    sizes = {name: value for name in _fields(kind) if (value := _small(name)) is not None}
    for one, other in getattr(kind, "attribute_map", {}).items():
        if one in sizes and other in sizes:
            del sizes[one]
    return sizes


def _parts(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """The same for the configs inside a config: of a text decoder, or of a tower."""
    try:
        whole = kind()
    except Exception:  # noqa: BLE001 - some configs have no defaults
        return {}
    parts = {}
    for name in getattr(kind, "sub_configs", {}):
        part = getattr(whole, name, None)
        if isinstance(part, PreTrainedConfig):
            own = OWN.get(part.model_type, {})
            parts[name] = {"model_type": part.model_type, **_with(_sizes(type(part)), own)}
    return parts


def _fields(kind: type[PreTrainedConfig]) -> set[str]:
    try:
        named = set(kind().to_dict())
    except Exception:  # noqa: BLE001 - some configs have no defaults
        named = set()
    return named | set(getattr(kind, "attribute_map", {})) | set(getattr(kind, "__dataclass_fields__", {}))


def _small(name: str) -> int | None:
    return next((value for pattern, value in RULES if re.fullmatch(pattern, name)), None)
