"""What ``import fasc`` gives, and what its verbs take."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest
import torch
from transformers import AutoModelForCausalLM

import fasc
from fasc.errors import StorageError, UnknownNameError, UsageError
from tests.conftest import tiny_model

CALIBRATION = {"sequences": 20, "sequence_length": 16}
DAMPED = {"damping": 1e-2, "rank_multiple": 1}


def run(script):
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_every_name_is_shown_and_exists():
    assert sorted(fasc.__all__) == sorted(set(fasc.__all__))
    assert set(fasc.__all__) | {"__version__"} == set(dir(fasc))
    for name in fasc.__all__:
        assert getattr(fasc, name) is not None
    verbs = {"load_model", "collect", "plan", "compress", "compress_checkpoint", "evaluate", "diagnose", "report", "run"}
    nouns = {"Statistics", "Plan", "Score", "Recipe", "Diagnosis", "FascError", "METHODS", "LAYOUTS", "BENCHMARKS"}
    assert verbs | nouns <= set(fasc.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fasc.no_such_name


def test_the_stubs_for_type_checkers_name_the_same_things():
    stub = (Path(fasc.__file__).parent / "__init__.pyi").read_text(encoding="utf-8")
    lines = [line.split() for line in stub.splitlines() if " as " in line]  # from MODULE import NAME as NAME
    assert set(fasc.__all__) == {line[-1] for line in lines}
    for _from, module, _import, name, _as, _name in lines:
        assert getattr(import_module(module), name) is getattr(fasc, name), f"{module}.{name}"


def test_importing_is_light():
    run("import sys, fasc; assert not {'torch', 'transformers', 'matplotlib', 'datasets', 'scipy'} & set(sys.modules)")
    run("import sys, fasc; fasc.Recipe(); assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)")
    run("import sys, fasc; fasc.compress, fasc.evaluate; assert 'matplotlib' not in sys.modules")


def test_the_quantizer_is_registered_whichever_is_imported_first():
    mapped = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m"
    run(f"import fasc, transformers; {mapped}; assert 'fasc' in m")
    run(f"{mapped}; import fasc; assert 'fasc' in m")
    run(f"import fasc.serving.quantizer; {mapped}; assert 'fasc' in m")


def test_no_module_can_take_the_place_of_a_public_name():
    """``import fasc.x`` sets the attribute ``x`` of the package: no public name may be that of a module."""
    modules = {module.name for module in iter_modules(fasc.__path__)}
    assert not modules & set(fasc.__all__)
    run("import fasc.runner, fasc.stages.plan, fasc.reporting.report, fasc; assert type(fasc.run) is type(lambda: 0), fasc.run")


@pytest.fixture(scope="module")
def statistics(tokens):
    return fasc.collect(tiny_model(), corpus=tokens)


class TestCollect:
    def test_a_path_and_its_name_and_a_list_of_one_are_the_same_corpus(self, model, tokenizer, text_file):
        ones = [
            fasc.collect(model, tokenizer, corpus=corpus, **CALIBRATION)
            for corpus in (text_file, str(text_file), [str(text_file)])
        ]
        assert len({one.meta["token_digest"] for one in ones}) == 1

    def test_several_corpora_are_a_list_or_one_string(self, model, tokenizer, text_file):
        both = [
            fasc.collect(model, tokenizer, corpus=corpus, **CALIBRATION)
            for corpus in ([text_file, "facts"], (str(text_file), "facts"), f"{text_file},facts")
        ]
        alone = fasc.collect(model, tokenizer, corpus=text_file, **CALIBRATION)
        digests = {one.meta["token_digest"] for one in both}
        assert len(digests) == 1
        assert alone.meta["token_digest"] not in digests

    def test_a_path_with_a_comma_is_one_path(self, model, tokenizer, text_file, tmp_path):
        other = tmp_path / "a,b.txt"
        other.write_bytes(text_file.read_bytes())
        digests = {
            fasc.collect(model, tokenizer, corpus=corpus, **CALIBRATION).meta["token_digest"] for corpus in (text_file, other)
        }
        assert len(digests) == 1

    def test_one_method_or_several_in_any_form(self, model, tokens):
        one, same = (fasc.collect(model, corpus=tokens, methods=given).meta["needs"] for given in ("svd", ["svd"]))
        assert sorted(map(tuple, one)) == sorted(map(tuple, same))
        forms = [
            fasc.collect(model, corpus=tokens, methods=given).meta["needs"]
            for given in ("svd,fasc", ("svd", "fasc"), ["svd", "fasc"])
        ]
        assert len({tuple(sorted(map(tuple, needs))) for needs in forms}) == 1
        assert len(forms[0]) > len(one)

    def test_the_default_is_enough_for_every_budget(self, statistics, model):
        for budget in (
            {"param_fraction": 0.8},
            {"model_fraction": 0.9},
            {"max_bytes": "90kB"},
            {"max_kl": 0.5},
            {"rank_fraction": 0.5},
        ):
            made = fasc.plan(model, statistics, **budget, **DAMPED)
            assert made.edits
            assert made.predicted_loss > 0

    def test_an_option_may_be_one_name_or_a_list(self, model, tokens):
        one, same = (fasc.collect(model, corpus=tokens, include=given).groups for given in ("*down_proj", ["*down_proj"]))
        assert list(one) == list(same) == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]

    def test_what_is_misspelt_or_missing_is_said(self, model, tokens, text_file):
        with pytest.raises(UnknownNameError, match="unknown argument `sequence`.*did you mean `sequences`"):
            fasc.collect(model, corpus=tokens, sequence=3)
        with pytest.raises(UnknownNameError, match="did you mean `fasc`"):
            fasc.collect(model, corpus=tokens, methods="facs")
        with pytest.raises(UsageError, match="no tokenizer"):
            fasc.collect(model, corpus=text_file)


class TestPlan:
    def test_a_plan_prints_as_a_table(self, statistics, model):
        text = str(fasc.plan(model, statistics, param_fraction=0.7, **DAMPED))
        assert "of dense" in text
        assert "nats/token" in text or "perplexity" in text

    def test_layouts_may_be_one_name_several_in_one_string_or_a_list(self, statistics, model):
        one, same = (
            fasc.plan(model, statistics, param_fraction=0.7, layouts=given, **DAMPED) for given in ("shared", ["shared"])
        )
        assert one.edits == same.edits
        several = [
            fasc.plan(model, statistics, param_fraction=0.7, layouts=given, **DAMPED).edits
            for given in ("dense,shared", ("dense", "shared"))
        ]
        assert several[0] == several[1]

    def test_a_misspelt_option_is_refused(self, statistics, model):
        with pytest.raises(UsageError, match="param_fracton"):
            fasc.plan(model, statistics, param_fracton=0.5)
        with pytest.raises(UnknownNameError, match="unknown method `facs`"):
            fasc.plan(model, statistics, method="facs")
        with pytest.raises(UsageError, match="are both budgets"):
            fasc.plan(model, statistics, param_fraction=0.5, max_kl=0.1)


class TestCompress:
    def test_the_three_calls_of_the_front_door_make_a_checkpoint_that_transformers_loads(
        self, model_folder, text_file, tmp_path, tokens
    ):
        model, tokenizer = fasc.load_model(model_folder)
        statistics = fasc.collect(model, tokenizer, corpus=text_file, **CALIBRATION)
        made = fasc.plan(model, statistics, param_fraction=0.8, **DAMPED)
        small = fasc.compress(model, statistics, made)
        for folder in (tmp_path / "a", str(tmp_path / "b")):
            assert small.save(folder, tokenizer=tokenizer) == Path(folder)
            loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
            with torch.no_grad():
                assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)

    def test_a_budget_is_as_good_as_a_plan(self, statistics, model, tokens):
        other = tiny_model()
        fasc.compress(model, statistics, param_fraction=0.8, **DAMPED)
        fasc.compress(other, statistics, fasc.plan(other, statistics, param_fraction=0.8, **DAMPED))
        with torch.no_grad():
            assert torch.equal(model(input_ids=tokens).logits, other(input_ids=tokens).logits)

    def test_a_plan_and_a_budget_together_are_refused(self, statistics, model):
        with pytest.raises(UsageError, match="a plan and `param_fraction`"):
            fasc.compress(model, statistics, fasc.plan(model, statistics, param_fraction=0.8, **DAMPED), param_fraction=0.8)

    def test_all_of_it_in_one_call_with_names_or_paths(self, model_folder, text_file, tmp_path):
        plans = []
        for kind, number in ((str, 0), (Path, 1)):
            out = kind(tmp_path / str(number))
            small = fasc.compress_checkpoint(
                kind(model_folder), corpus=kind(text_file), out=out, param_fraction=0.8, **CALIBRATION, **DAMPED
            )
            assert (Path(out) / "model.safetensors").is_file()
            plans.append(small.plan)
        assert plans[0].edits == plans[1].edits
        file = fasc.collect(*fasc.load_model(str(model_folder)), corpus=[text_file], **CALIBRATION).save(
            tmp_path / "s.safetensors"
        )
        for kind in (str, Path):
            again = fasc.compress_checkpoint(
                model_folder, statistics=kind(file), out=tmp_path / "again", overwrite=True, param_fraction=0.8, **DAMPED
            )
            assert [edit.rank for edit in again.plan.edits if edit.edit == "factor"] == [
                edit.rank for edit in plans[0].edits if edit.edit == "factor"
            ]

    def test_what_is_read_and_what_is_the_users_is_not_replaced_in_python_either(self, model_folder, text_file, tmp_path):
        options = {"corpus": text_file, "param_fraction": 0.8, "overwrite": True, **CALIBRATION, **DAMPED}
        before = {file: file.read_bytes() for file in model_folder.iterdir()}
        with pytest.raises(StorageError, match="what the command reads"):
            fasc.compress_checkpoint(model_folder, out=model_folder, **options)
        assert {file: file.read_bytes() for file in model_folder.iterdir()} == before
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("precious")
        with pytest.raises(StorageError, match="no checkpoint that fasc wrote"):
            fasc.compress_checkpoint(model_folder, out=tmp_path / "mine", **options)
        assert (tmp_path / "mine" / "notes.txt").read_text() == "precious"

    def test_a_tilde_is_the_users_home(self, model_folder, text_file, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        options = {"corpus": text_file, "param_fraction": 0.8, **CALIBRATION, **DAMPED}
        small = fasc.compress_checkpoint(model_folder, out="~/small", **options)
        assert (tmp_path / "small" / "model.safetensors").is_file()
        assert small.save("~/again") == tmp_path / "again"
        assert {file.name for file in tmp_path.iterdir()} == {"small", "again", "text.txt"}


class TestEvaluate:
    @pytest.fixture(scope="class")
    def checkpoint(self, model_folder, tokens, tmp_path_factory):
        model, tokenizer = fasc.load_model(model_folder)
        small = fasc.compress(model, fasc.collect(model, corpus=tokens), param_fraction=0.7, **DAMPED)
        return small.save(tmp_path_factory.mktemp("small") / "small", tokenizer=tokenizer)

    def test_checkpoints_and_corpora_may_be_names_or_paths_and_benchmarks_one_name_or_a_list(
        self, checkpoint, model_folder, text_file
    ):
        scores = [
            fasc.evaluate(kind(checkpoint), benchmarks=names, dense=kind(model_folder), corpus=corpus, context=16, windows=4)
            for kind, names, corpus in (
                (str, "kl", str(text_file)),
                (Path, ["kl"], text_file),
                (Path, ("kl",), [text_file]),
            )
        ]
        assert scores[0] == scores[1] == scores[2]
        assert scores[0][0].value > 0
        both = fasc.evaluate(checkpoint, benchmarks="kl,perplexity", corpus=text_file, context=16, windows=4)
        assert list(dict.fromkeys(score.benchmark for score in both)) == ["kl", "perplexity"]

    def test_a_loaded_model_is_as_good_as_its_folder(self, checkpoint, model_folder, text_file):
        model, tokenizer = fasc.load_model(checkpoint)
        dense, _ = fasc.load_model(model_folder)
        options = {"benchmarks": "kl", "corpus": text_file, "context": 16, "windows": 4}
        loaded = fasc.evaluate(model, tokenizer, dense=dense, **options)
        stored = fasc.evaluate(checkpoint, dense=model_folder, **options)
        assert loaded[0].value == pytest.approx(stored[0].value)
        with pytest.raises(UsageError, match="no tokenizer"):
            fasc.evaluate(model, dense=dense, **options)

    def test_a_misspelt_argument_or_benchmark_is_named(self, checkpoint):
        with pytest.raises(UnknownNameError, match="did you mean `windows`"):
            fasc.evaluate(checkpoint, window=4)
        with pytest.raises(UnknownNameError, match="did you mean `facts`"):
            fasc.evaluate(checkpoint, benchmarks="fact")


def test_diagnose_takes_one_method_or_several(statistics, model):
    one = fasc.diagnose(model, statistics, "fasc")
    several = fasc.diagnose(model, statistics, ["fasc", "two-sided"])
    assert set(one.rows[0]["methods"]) == {"fasc"}
    assert set(several.rows[0]["methods"]) == {"fasc", "two-sided"}


def test_a_run_and_its_report_take_names_paths_and_recipes(model_folder, text_file, tmp_path):
    recipe = fasc.Recipe.model_validate(
        {
            "source": {"model": str(model_folder)},
            "calibration": {"corpus": str(text_file), **CALIBRATION},
            "methods": [{"name": "svd"}],
            "evaluation": {"benchmarks": ["perplexity"], "corpus": str(text_file), "context": 16, "windows": 4},
        }
    )
    path = fasc.run(recipe, str(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.md"
    assert "| svd |" in path.read_text()
    pytest.importorskip("vl_convert", reason="the report's plots need vl-convert-python")
    for folder in (str(path.parent), path.parent):
        path.unlink()
        assert fasc.report(folder) == path.with_name("report.html")
        assert path.is_file()
    assert fasc.run(str(path.parent / "recipe.toml"), path.parent) == path, "it is that run: nothing is done again"
