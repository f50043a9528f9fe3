"""A tokenizer of transformers in the form that llama.cpp reads."""

import json
from collections.abc import Mapping
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from fasc.errors import UsageError

_SPACE = "▁"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: Mapping[tuple[str, ...], str] = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_CONTRACTIONS + r"\p{N}" + _REST,): "qwen2",
    (_CASED,): "tekken",
}
"""How text is split before byte pairs are merged ↦ llama.cpp's name for it."""


def write_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Tokens with their types, merges or scores, special tokens and the chat template.

    Args:
        writer: of the file.
        tokenizer: a fast one whose model is byte-pair encoding, over bytes or with a byte fallback.
        size: rows of the model's embedding; rows without a token are marked unused.

    Raises:
        UsageError: llama.cpp has no tokenizer like this one, or fasc does not know it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    if parts.get("model", {}).get("type") != "BPE":
        raise UsageError("the tokenizer is no byte-pair encoding", "fasc writes GGUF files with BPE tokenizers only")
    merges = [" ".join(one) if isinstance(one, list) else one for one in parts["model"]["merges"]]
    over_bytes = not parts["model"].get("byte_fallback")
    writer.add_tokenizer_model("gpt2" if over_bytes else "llama")
    writer.add_tokenizer_pre(_split_of(parts) if over_bytes else "default")
    tokens, types = _tokens(parts, size, over_bytes=over_bytes)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if over_bytes:
        writer.add_token_merges(merges)
    else:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix("".join(tokenizer.tokenize("a")).startswith(_SPACE))
    _write_special(writer, tokenizer)


def _split_of(parts: Mapping[str, Any]) -> str:
    given = parts.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", [given])
    words: list[str] = []
    for step in steps:
        if step.get("type") == "Split":
            words.append(step["pattern"].get("Regex", ""))
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            words.append("digits")
        elif step.get("type") == "ByteLevel" and step.get("use_regex", True) and not step.get("add_prefix_space"):
            words.append("bytes")
        elif step.get("type") != "ByteLevel" or step.get("add_prefix_space"):
            words.append(str(step.get("type")))
    name = SPLITS.get(tuple(words))
    if name is None:
        raise UsageError(
            f"the tokenizer splits text in a way that fasc has no llama.cpp name for: {words}",
            "compress with `--for plain` and use llama.cpp's own convert_hf_to_gguf.py on the folder",
        )
    return name


def _tokens(parts: Mapping[str, Any], size: int, *, over_bytes: bool) -> tuple[list[str], list[int]]:
    tokens, types = [f"[PAD{i}]" for i in range(size)], [int(TokenType.UNUSED)] * size
    unknown = parts["model"].get("unk_token")
    for token, index in parts["model"]["vocab"].items():
        byte = not over_bytes and len(token) == len("<0x00>") and token.startswith("<0x")
        kind = TokenType.BYTE if byte else TokenType.UNKNOWN if token == unknown and not over_bytes else TokenType.NORMAL
        tokens[index], types[index] = token, int(kind)
    for one in parts.get("added_tokens", ()):
        if one["id"] < size and types[one["id"]] != int(TokenType.UNKNOWN):
            kind = TokenType.CONTROL if one["special"] else TokenType.USER_DEFINED
            tokens[one["id"]], types[one["id"]] = one["content"], int(kind)
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """A token's score is minus the rank of the first merge that makes it: llama.cpp merges the highest first."""
    rank: dict[str, int] = {}
    for position, merge in enumerate(merges):
        rank.setdefault("".join(merge.split(" ")), position)
    return [-float(rank.get(token, 0)) for token in tokens]


def _write_special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    for kind in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{kind}_token_id", None)
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(int(index))
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
