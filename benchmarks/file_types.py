"""Types of llama.cpp chosen by ½J against llama.cpp's own mixes, at the size of each mix.

    python benchmarks/file_types.py --statistics stats.safetensors --corpus wikitext2,c4 [--device cuda] [--mixes Q4_K_M,Q2_K]

Every mix is made as llama.cpp makes it: its quantiser says which type each matrix gets, and the matrices are rounded by ggml with an
importance matrix from the same text as ours. Ours is then asked for no more bytes than that file has. Divergences are those of the
weights in the files, dequantised, on held-out windows, both files and the dense model on the same ones.
"""

import argparse
import ctypes
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from gguf import GGUFReader, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES

import fasc
from fasc.model.load import load_model
from fasc.provenance import provenance
from fasc.serving.llama_cpp import export_gguf, room_for_the_rest
from fasc.serving.tensor_types import TensorTypes, TypeLosses
from fasc.stages.plan import stored_statistics
from fasc.storage import write_json

MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")


def types_of_mix(dense: Path, mix: str, folder: Path) -> dict[str, int]:
    """What llama.cpp's own quantiser gives every tensor, by llama.cpp's names."""
    import llama_cpp

    out = folder / f"{mix}-own.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mix}")
    params.nthread = 2
    # Some mixes ask for an importance matrix before they give 2 bits: types are what matters here.
    failed = llama_cpp.llama_model_quantize(str(dense).encode(), str(out).encode(), ctypes.byref(params))
    if failed:
        raise SystemExit(f"llama.cpp cannot write {mix}")
    return {tensor.name: tensor.tensor_type for tensor in GGUFReader(out).tensors}


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--statistics", type=Path, required=True)
    parser.add_argument("--corpus", default="wikitext2,c4")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--mixes", default=",".join(MIXES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    loaded = load_model(options.model, device="cpu")
    statistics = stored_statistics(options.statistics, loaded.model)
    losses = TypeLosses.of(loaded.model, statistics)
    room = room_for_the_rest(loaded.model, loaded.tokenizer)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        graph = export_gguf(loaded.model, loaded.tokenizer, folder / "dense.gguf")
        kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
        names = get_tensor_name_map(kinds[graph.name], loaded.model.config.num_hidden_layers)
        place = {name: names.get_name(name, try_suffixes=(".weight",)) for name, _ in loaded.model.named_parameters()}

        def divergence(file: Path) -> dict[str, list[float]]:
            scores = fasc.evaluate(
                str(file),
                benchmarks="kl",
                corpus=options.corpus,
                dense=options.model,
                windows=options.windows,
                device=options.device,
            )
            return {score.protocol: [score.value, score.low, score.high] for score in scores if score.metric == "kl"}

        for mix in options.mixes.split(","):
            given = types_of_mix(folder / "dense.gguf", mix, folder)
            types = TensorTypes({name: given[target] for name, target in place.items() if target in given}, losses.importance)
            theirs = folder / f"{mix}.gguf"
            export_gguf(loaded.model, loaded.tokenizer, theirs, types=types)
            size = theirs.stat().st_size
            ours = folder / f"{mix}-fasc.gguf"
            chosen = losses.choose(max_bytes=size - room)
            export_gguf(loaded.model, loaded.tokenizer, ours, types=chosen)
            kinds_used = Counter(kind.name for kind in chosen.kinds.values())
            row = {
                "mix": mix,
                "bytes": size,
                "our_bytes": ours.stat().st_size,
                "types": kinds_used,
                "forecast": chosen.predicted_loss,
            }
            row |= {"theirs": divergence(theirs), "ours": divergence(ours)}
            row["ratio"] = {text: row["ours"][text][0] / row["theirs"][text][0] for text in row["ours"]}
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.json:
        write_json(options.json, {"rows": rows, "provenance": provenance(command=sys.argv)})


if __name__ == "__main__":
    main()
