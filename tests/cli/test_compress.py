"""``fasc compress``."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fasc.errors import UsageError
from fasc.recipe import read_recipe
from fasc.stages.compress import compress_checkpoint
from fasc.statistics.moments import Statistics
from fasc.statistics.options import CalibrationConfig
from tests.cli.conftest import CALIBRATION, refused

TRIAL = [*CALIBRATION, "--damping", "1e-3"]


def test_it_ends_with_what_was_made_and_what_to_do_next(done, model_folder, text_file, tmp_path):
    out, err = done("compress", model_folder, "--param-fraction", "0.8", "--corpus", text_file, *TRIAL, "--out", tmp_path / "o")
    lines = out.strip().splitlines()
    assert lines[-1] == str(tmp_path / "o"), "scripts read the last line"
    assert "of the dense model's" in out
    assert f"fasc evaluate {tmp_path / 'o'}" in out
    assert "measuring moments" in err
    assert {file.name for file in tmp_path.iterdir()} == {"o", "text.txt"}
    assert json.loads((tmp_path / "o" / "fasc_provenance.json").read_text())["model"] == str(model_folder)


def test_stored_statistics_and_an_edited_plan_are_carried_out(fasc, done, model_folder, statistics, tmp_path):
    plan = tmp_path / "plan.json"
    done("plan", model_folder, "--rank-fraction", "0.5", "--damping", "1e-3", "--json", plan)
    raw = json.loads(plan.read_text())
    raw["edits"][0]["rank"] = 3
    plan.write_text(json.dumps(raw))
    _, err = done("compress", model_folder, "--statistics", statistics, "--plan", plan, "--out", tmp_path / "o")
    assert "measuring" not in err
    stored = load_file(tmp_path / "o" / "model.safetensors")
    assert stored["model.layers.0.self_attn.q_proj.up.weight"].shape == (32, 3)
    assert json.loads((tmp_path / "o" / "fasc_plan.json").read_text())["edits"][0]["options"] == {"damping": 1e-3}
    refused(
        fasc("compress", model_folder, "--statistics", statistics, "--method", "fasc-eq6", "--out", tmp_path / "p"),
        "lack",
        "cross",
    )
    refused(fasc("compress", model_folder, "--method", "svd", "--plan", plan, "--out", tmp_path / "p"), "plan for `fasc`")
    for option in (["--param-fraction", "0.5"], ["--selection", "rho"], ["--damping", "1e-2"], ["--exclude", "*.q_proj"]):
        refused(fasc("compress", model_folder, *option, "--plan", plan, "--out", tmp_path / "p"), f"{option[0]} and --plan")
    assert not (tmp_path / "p").exists()


def test_statistics_of_another_model_are_refused(fasc, model_folder, statistics, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    refused(fasc("compress", other, "--method", "svd", "--statistics", statistics, "--out", tmp_path / "o"), "another model")


def test_merge_writes_a_dense_checkpoint(done, model_folder, text_file, tmp_path):
    out, _ = done("compress", model_folder, "--corpus", text_file, *TRIAL, "--merge", "--out", tmp_path / "o")
    assert "quantization_config" not in json.loads((tmp_path / "o" / "config.json").read_text())
    dense, merged = (load_file(folder / "model.safetensors") for folder in (model_folder, tmp_path / "o"))
    biases = {name for name in merged if name.endswith(".bias")}
    assert {name: value.shape for name, value in merged.items() if name not in biases} == {
        name: value.shape for name, value in dense.items()
    }
    assert "loads in any program" in out


def test_it_takes_the_options_of_plan(done, model_folder, statistics, tmp_path):
    out = tmp_path / "o"
    options = ["--param-fraction", "0.7", "--allocation", "uniform", "--layouts", "shared,pivoted", "--damping", "1e-2"]
    done("compress", model_folder, *options, "--statistics", statistics, "--selection", "predicted", "--out", out)
    raw = json.loads((out / "fasc_plan.json").read_text())
    assert {edit["layout"] for edit in raw["edits"]} == {"pivoted"}
    assert {edit["method"] for edit in raw["edits"]} == {"fasc"}, "fasc has the lower forecast everywhere"
    assert all(edit["selection"]["score"] <= 0 for edit in raw["edits"])


def test_an_option_of_the_method_itself_reaches_it(fasc, done, model_folder, text_file, tmp_path):
    options = ["--method", "fasc-eq6", "--corpus", text_file, *CALIBRATION]
    weights = {}
    for reading in ("orthonormal", "oblique"):
        out = tmp_path / reading
        done("compress", model_folder, *options, "--method-option", f"reading={reading}", "--out", out)
        weights[reading] = load_file(out / "model.safetensors")["model.layers.0.mlp.down_proj.up.weight"]
        assert json.loads((out / "fasc_plan.json").read_text())["edits"][0]["options"]["reading"] == reading
    assert not torch.equal(*weights.values())
    for given, words in (
        ("reading=other", ["`reading`", "orthonormal"]),
        ("readings=oblique", ["`readings`", "no such field"]),
        ("oblique", ["--method-option", "name=value"]),
    ):
        refused(fasc("compress", model_folder, *options, "--method-option", given, "--out", tmp_path / "x"), *words)


def test_an_existing_output_is_refused_before_any_work(fasc, model_folder, text_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    lines = refused(fasc("compress", model_folder, "--corpus", text_file, "--out", out), "already exists", "--overwrite")
    assert len(lines) == 2, "no work was started"
    assert (out / "mine.txt").read_text() == "precious"


def test_a_failed_overwrite_leaves_the_old_output(fasc, done, compressed, model_folder, text_file):
    before = (compressed / "model.safetensors").read_bytes()
    refused(
        fasc("compress", model_folder, "--corpus", text_file, "--sequences", "99999", "--out", compressed, "--overwrite"),
        "too short",
    )
    assert (compressed / "model.safetensors").read_bytes() == before
    done("compress", model_folder, "--corpus", text_file, "--rank-fraction", "0.25", *TRIAL, "--out", compressed, "--overwrite")
    assert (compressed / "model.safetensors").read_bytes() != before
    assert {file.name for file in compressed.parent.iterdir()} == {"compressed", "text.txt"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(fasc, damage, text_file, tmp_path, value):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    refused(
        fasc("compress", damage(change), "--corpus", text_file, "--out", tmp_path / "o"),
        "model.layers.1.mlp.up_proj.weight",
        "not finite",
    )


def test_a_batch_that_overflows_is_named(fasc, damage, text_file, tmp_path):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e30)
        tensors["model.layers.1.mlp.gate_proj.weight"].mul_(1e30)

    folder = damage(change)
    refused(
        fasc("compress", folder, "--corpus", text_file, *TRIAL, "--out", tmp_path / "o"), "calibration sequences 0-", "not finite"
    )
    refused(
        fasc("evaluate", folder, "--benchmarks", "perplexity", "--corpus", text_file, "--context", "16"),
        "windows 0-",
        "not finite",
    )
    assert not (tmp_path / "o").exists()


@pytest.fixture
def damage(model_folder, tmp_path):
    """Copy the model's folder and change its weights."""

    def make(change):
        folder = tmp_path / "damaged"
        shutil.copytree(model_folder, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def test_damaged_checkpoints_are_refused(fasc, compressed, text_file):
    file = compressed / "model.safetensors"
    content = file.read_bytes()
    evaluate = ["evaluate", compressed, "--benchmarks", "perplexity", "--corpus", text_file, "--context", "16"]
    file.write_bytes(content[: len(content) // 2])
    refused(fasc(*evaluate), "model.safetensors")
    file.unlink()
    refused(fasc(*evaluate), "no safetensors file")
    file.write_bytes(content)
    original = json.loads((compressed / "config.json").read_text())
    changes = [
        ({"rank": 7}, ["k_proj.up.weight` is 16×16 in the weights and 16×7 by config.json"]),
        ({"rank": 0}, ["rank"]),
        ({"layers": ["model.layers.0.self_attn.x_proj", *original["quantization_config"]["edits"][0]["layers"][1:]]}, ["x_proj"]),
        ({"layout": "folded"}, ["folded"]),
        ({"edit": "fold"}, ["unknown edit `fold`"]),
        ({"d_in": 31}, ["31"]),
    ]
    for change, words in changes:
        config = json.loads(json.dumps(original))
        config["quantization_config"]["edits"][0] |= change
        (compressed / "config.json").write_text(json.dumps(config))
        refused(fasc(*evaluate), *words)
    config = json.loads(json.dumps(original))
    del config["quantization_config"]["edits"][0]
    (compressed / "config.json").write_text(json.dumps(config))
    refused(fasc(*evaluate), "its weights have other shapes than its config.json says")


def test_pickled_weights_are_never_loaded(fasc, model_folder, text_file, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(model_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(fasc("evaluate", folder, "--benchmarks", "perplexity", "--corpus", text_file))


def test_what_is_read_is_never_replaced(fasc, model_folder, statistics, text_file, tmp_path):
    """The model, its folder, the moments, the corpus, a plan; and nothing is written into the model's folder."""
    before = {file: file.read_bytes() for file in [*model_folder.iterdir(), statistics, text_file]}
    budget = ["--param-fraction", "0.8"]
    (tmp_path / "link").symlink_to(model_folder)
    for out in (model_folder, model_folder.parent, tmp_path / "link", model_folder / "small"):
        lines = refused(fasc("compress", model_folder, *budget, "--corpus", text_file, "--out", out, "--overwrite"), "reads")
        assert len(lines) == 2, "no work was started"
    refused(fasc("compress", model_folder, *budget, "--statistics", statistics, "--out", tmp_path, "--overwrite"), "reads")
    refused(fasc("collect", model_folder, "--corpus", text_file, "--out", text_file, "--overwrite"), "what the command reads")
    refused(fasc("plan", model_folder, *budget, "--statistics", statistics, "--json", statistics), "what the command reads")
    refused(fasc("evaluate", model_folder, "--json", model_folder / "config.json"), "reads")
    assert {file: file.read_bytes() for file in before} == before


def test_a_folder_of_the_users_is_not_replaced(fasc, compressed, model_folder, text_file, tmp_path):
    command = ["compress", model_folder, "--corpus", text_file, *TRIAL, "--overwrite", "--out"]
    (compressed / "notes.txt").write_text("precious")
    refused(fasc(*command, compressed), "`notes.txt`, which fasc did not write")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "main.py").write_text("precious")
    refused(fasc(*command, tmp_path / "project"), "no checkpoint that fasc wrote")
    assert (compressed / "notes.txt").read_text() == (tmp_path / "project" / "main.py").read_text() == "precious"


def test_a_link_leads_to_where_the_checkpoint_goes(done, compressed, model_folder, text_file, tmp_path):
    (tmp_path / "latest").symlink_to(compressed)
    before = (compressed / "model.safetensors").read_bytes()
    options = ["--rank-fraction", "0.25", "--corpus", text_file, *TRIAL, "--overwrite"]
    done("compress", model_folder, *options, "--out", tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert (compressed / "model.safetensors").read_bytes() != before


def test_of_two_calls_at_once_the_second_is_told(fasc, model_folder, text_file, tmp_path):
    from fasc.outputs import output

    with output(tmp_path / "o", overwrite=False, folder=True):
        refused(
            fasc("compress", model_folder, "--corpus", text_file, *TRIAL, "--out", tmp_path / "o"), "another process is writing"
        )


def test_files_have_the_mode_that_umask_gives(done, model_folder, text_file, statistics, tmp_path):
    mask = os.umask(0o027)
    try:
        done("compress", model_folder, "--corpus", text_file, *TRIAL, "--out", tmp_path / "o")
        done("collect", model_folder, "--corpus", text_file, *CALIBRATION, "--out", statistics, "--overwrite")
    finally:
        os.umask(mask)
    files = [file for file in (tmp_path / "o").rglob("*") if file.is_file()] + [statistics]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}
    assert (tmp_path / "o").stat().st_mode & 0o777 == 0o750


def test_layers_that_lie_on_disk_are_compressed_to_the_same_weights(done, places, model_folder, statistics, tmp_path):
    options = ["--param-fraction", "0.6", "--damping", "1e-3", "--statistics", statistics]
    done("compress", model_folder, *options, "--out", tmp_path / "memory")
    done("compress", model_folder, *options, "--device-map", places, "--max-shard-size", "30kB", "--out", tmp_path / "disk")
    files = sorted((tmp_path / "disk").glob("*.safetensors"))
    assert len(files) > 1
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = load_file(tmp_path / "memory" / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.items())


def test_files_of_no_size_are_refused_before_the_work(fasc, model_folder, statistics, tmp_path):
    command = ["compress", model_folder, "--param-fraction", "0.6", "--statistics", statistics, "--out", tmp_path / "o"]
    for size in ("0", "large"):
        refused(fasc(*command, "--max-shard-size", size), "--max-shard-size")
    assert not (tmp_path / "o").exists()


def test_what_is_written_tells_of_the_text_that_the_statistics_were_measured_on(done, model_folder, statistics, tmp_path):
    own = Statistics.load(statistics).calibration
    assert own != CalibrationConfig(), "otherwise this shows nothing"
    done("compress", model_folder, "--method", "svd", "--statistics", statistics, "--out", tmp_path / "o")
    recipe = read_recipe(tmp_path / "o" / "fasc_recipe.toml")
    assert recipe.calibration == own
    card = (tmp_path / "o" / "README.md").read_text()
    assert f"{own.sequences} × {own.sequence_length} tokens of `{own.corpus}`, {own.labels} labels" in card


@pytest.mark.parametrize("option", [["--corpus", "self"], ["--sequences", "8"], ["--labels", "sampled"], ["--seed", "1"]])
def test_how_to_measure_means_nothing_beside_statistics(fasc, model_folder, statistics, tmp_path, option):
    given = [model_folder, "--statistics", statistics, *option]
    refused(fasc("compress", *given, "--out", tmp_path / "o"), f"{option[0]} means nothing beside --statistics")
    refused(fasc("diagnose", *given), f"{option[0]} means nothing beside --statistics")
    refused(
        fasc("export", *given, "--max-bytes", "1MB", "--out", tmp_path / "o.gguf"),
        f"{option[0]} means nothing beside --statistics",
    )
    with pytest.raises(UsageError, match="means nothing beside statistics"):
        compress_checkpoint(model_folder, corpus="other.txt", out=tmp_path / "o", statistics=statistics)
    assert not list(tmp_path.glob("o*"))


def test_layers_that_are_left_out_stay_dense_beside_statistics_too(done, model_folder, statistics, tmp_path):
    out = tmp_path / "o"
    given = ["--statistics", statistics, "--method", "svd", "--rank-fraction", "0.5", "--exclude", "*.mlp.*"]
    done("compress", model_folder, *given, "--out", out)
    edits = json.loads((out / "fasc_plan.json").read_text())["edits"]
    assert edits
    assert not [edit for edit in edits if ".mlp." in json.dumps(edit)]
