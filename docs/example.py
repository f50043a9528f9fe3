"""All public calls on a tiny model that this file builds itself; needs no network and takes seconds."""

# %% [markdown]
# # From a model to a smaller one
#
# The model is random and the text is made of templates, so the numbers mean nothing. The calls are those for a real model.

# %%
import copy
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fasc

# %% [markdown]
# ## A text
#
# Two files of the same kind: one to calibrate on, one to score on.

# %%
SUBJECTS = ["river", "mountain", "city", "island", "lake", "road", "bridge", "harbour", "forest", "valley"]
VERBS = ["crosses", "feeds", "hides", "borders", "faces", "follows"]
PLACES = ["north", "south", "east", "west", "coast", "desert", "plain", "border"]


def write_text(path: str, sentences: int, seed: int) -> None:
    """Sentences such as `the river faces the north .`, one after the other."""
    draw = random.Random(seed)
    lines = [f"the {draw.choice(SUBJECTS)} {draw.choice(VERBS)} the {draw.choice(PLACES)} ." for _ in range(sentences)]
    Path(path).write_text(" ".join(lines), encoding="utf-8")


write_text("my-text.txt", sentences=1000, seed=0)
write_text("other-text.txt", sentences=400, seed=1)

# %% [markdown]
# ## A model
#
# `fasc.load_model("owner/model")` gives the same pair. A causal language model that you have loaded with transformers will do.

# %%
words = ["<unk>", "<bos>", "<eos>", "the", ".", *SUBJECTS, *VERBS, *PLACES]
backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(words),
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.2,  # large enough for the layers to matter
)
model = LlamaForCausalLM(config).eval()
dense = copy.deepcopy(model)  # compressing changes the model in place

# %% [markdown]
# ## Statistics
#
# Measured once. They hold means and covariances of what each group of layers reads and of the gradients there.

# %%
statistics = fasc.collect(model, tokenizer, corpus="my-text.txt", sequences=32, sequence_length=32)
print(f"{len(statistics.groups)} groups of layers")

# %% [markdown]
# ## Forecast and plan
#
# A plan is a list of edits. It knows what the model will weigh and what it is expected to lose, before anything is changed.

# %%
for fraction in (0.9, 0.8, 0.6):
    forecast = fasc.plan(model, statistics, param_fraction=fraction).predicted_loss
    print(f"{fraction:.0%} of the parameters: forecast loss {forecast:.4f} nats per token")

plan = fasc.plan(model, statistics, param_fraction=0.8)
print(plan)

# %% [markdown]
# The other way round: the smallest model whose forecast loss stays within a limit.

# %%
limit = 2 * plan.predicted_loss
print(fasc.plan(model, statistics, max_kl=limit).totals)

# %% [markdown]
# ## Compress, save, load
#
# The folder is a Hugging Face checkpoint: after `import fasc`, transformers loads it like any other.

# %%
small = fasc.compress(model, statistics, plan)
small.save("small")

loaded = AutoModelForCausalLM.from_pretrained("small")
tokens = torch.tensor([tokenizer.encode("the river crosses the north . the lake hides the west .")])
with torch.no_grad():
    difference = (loaded(tokens).logits - model(tokens).logits).abs().max().item()
print(f"largest difference after loading: {difference:.1g}")
print(f"parameters: {dense.num_parameters():,} → {loaded.num_parameters():,}")

# %% [markdown]
# ## Evaluate
#
# On text that did not calibrate. Every score has its n and a 95 % interval.

# %%
scores = fasc.evaluate(
    loaded,
    tokenizer,
    dense=dense,
    benchmarks=["perplexity", "kl"],
    corpus="other-text.txt",
    windows=16,
    context=32,
)
for score in scores:
    low, high = ("–" if bound is None else f"{bound:.3f}" for bound in (score.low, score.high))
    print(f"{score.benchmark} {score.metric}: {score.value:.3f} [{low}, {high}], n = {score.n:,}")

# %% [markdown]
# ## All of it in one call

# %%
dense.save_pretrained("dense")
tokenizer.save_pretrained("dense")
fasc.compress_checkpoint(
    "dense", corpus="my-text.txt", sequences=32, sequence_length=32, param_fraction=0.8, out="small-in-one-call"
)
print(sorted(path.name for path in Path("small-in-one-call").iterdir()))
