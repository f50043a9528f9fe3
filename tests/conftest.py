"""Tiny models of real architectures, built here from their configs; nothing is downloaded."""

import copy
import os
import subprocess
import sys
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from fasc.methods import METHODS
from fasc.planning.options import BudgetConfig
from fasc.statistics.collect import collect_moments
from fasc.storage import cache_root

torch.set_num_threads(1)  # models are tiny and tests run side by side: a second thread only waits
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

VOCABULARY = 128
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 16}
CONFIGS = {
    "llama": LlamaConfig(**_COMMON, tie_word_embeddings=True),
    "mistral": MistralConfig(**_COMMON),
    "qwen2": Qwen2Config(**_COMMON),
    "qwen3": Qwen3Config(**_COMMON),
    "gemma2": Gemma2Config(**_COMMON, **_GEMMA),
    "gemma3": Gemma3TextConfig(**_COMMON, **_GEMMA),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1),
    "phi3": Phi3Config(**_COMMON),
}
_SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
PARALLEL = {
    "cohere": CohereConfig(**{name: value for name, value in _COMMON.items() if name != "head_dim"}),
    "phi": PhiConfig(**{name: value for name, value in _COMMON.items() if name != "head_dim"}),
    "falcon": FalconConfig(**_SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=48),
    "gptj": GPTJConfig(**_SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=128, n_inner=48, rotary_dim=4),
}
"""Attention and MLP of a block read the same tensor, so that all their first layers are one group."""


def tiny_model(architecture="llama", seed=0, dtype=torch.float32, layers=None):
    """A random model whose weights are large enough for its layers to matter, biases and norms included."""
    torch.manual_seed(seed)
    config = copy.deepcopy((CONFIGS | PARALLEL)[architecture])
    if layers is not None:
        config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed" not in name and "wte" not in name:
                parameter.normal_(std=0.25)
            else:
                parameter.normal_(std=0.7)
    return model.to(dtype).eval()


@pytest.fixture(scope="session", autouse=True)
def products_are_free():
    """The default penalty of a product is more than the whole of a tiny model, whose plans would then have no factors."""
    field = BudgetConfig.model_fields["overhead"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(field, "default", 0)
        BudgetConfig.model_rebuild(force=True)
        yield
    BudgetConfig.model_rebuild(force=True)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What tests keep does not push out what the user kept; models that were pulled are shared."""
    folder = tmp_path_factory.mktemp("cache")
    pulled = cache_root() / "models"
    pulled.mkdir(parents=True, exist_ok=True)
    (folder / "models").symlink_to(pulled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASC_CACHE", str(folder))
        yield folder


@pytest.fixture(params=sorted(CONFIGS))
def architecture(request):
    return request.param


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def tokens():
    return torch.randint(3, VOCABULARY, (24, 20), generator=torch.Generator().manual_seed(1))


def byte_tokenizer():
    """Bytes as tokens: any text can be encoded, as with a real byte-level tokenizer."""
    known = pre_tokenizers.ByteLevel.alphabet()
    ascii_first = sorted(known, key=lambda character: (character not in "ĠĊ", not character.isascii(), character))
    alphabet = ascii_first[: VOCABULARY - 3]
    vocabulary = {"<bos>": 0, "<eos>": 1, "<pad>": 2} | {character: 3 + i for i, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "five",
        "wizards",
        "mix",
        "jugs",
        "of",
        "black",
        "quartz",
    ]
    generator = torch.Generator().manual_seed(3)
    picks = torch.randint(len(words), (900,), generator=generator)
    file.write_text(" ".join(words[i] for i in picks), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def measured(tokens):
    """The moments that any method asks for, of the tiny model of an architecture; each is measured once."""
    needs = frozenset().union(*(method.needs_in(method.scopes) for method in METHODS.values()))
    known = {}

    def of(architecture="llama"):
        if architecture not in known:
            known[architecture] = collect_moments(tiny_model(architecture), tokens, needs)
        return known[architecture]

    return of


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def in_new_process(script, *arguments):
    """Run a Python script that must succeed; its output."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["mixtral", "qwen3_moe", "gpt_oss"])
def mixture(request):
    """A tiny mixture of experts whose fused weights lie in one of the ways transformers knows."""
    sizes = _COMMON | {"num_experts_per_tok": 2}
    config = {
        "mixtral": lambda: MixtralConfig(**sizes, num_local_experts=4),
        "qwen3_moe": lambda: Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=24),
        "gpt_oss": lambda: GptOssConfig(**sizes, num_local_experts=4),
    }[request.param]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def kill_when(command, folder, pattern):
    """Start a program and kill it (SIGKILL) as soon as a file of this pattern stands in the folder."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any(folder.glob(pattern)) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
