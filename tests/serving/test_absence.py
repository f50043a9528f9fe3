"""A checkpoint loads right or not at all."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fasc.edits.structure import edited_layers
from fasc.serving.model_type import MODEL_TYPE
from tests.conftest import tiny_model
from tests.serving.small import small_of

LOAD = """
from transformers import AutoModelForCausalLM, LlamaForCausalLM
import sys, torch
kind = {"auto": AutoModelForCausalLM, "llama": LlamaForCausalLM}[sys.argv[2]]
kind.from_pretrained(sys.argv[1])
print("LOADED")
"""


def logits_of(folder, tokens):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(input_ids=tokens).logits


@pytest.fixture
def saved(tokens, tokenizer, tmp_path):
    small = small_of("llama", tokens)
    return small, small.save(tmp_path / "small", tokenizer=tokenizer)


def test_transformers_without_us_says_what_to_install(saved, python):
    result = python(LOAD, saved[1], "auto", without_us=True)
    assert "LOADED" not in result.stdout
    assert "pip install fasc" in result.stderr.strip().splitlines()[-1] or "pip install fasc" in result.stderr


def test_a_model_class_named_by_hand_stops_at_the_sizes_without_us(saved, python):
    result = python(LOAD, saved[1], "llama", without_us=True)
    assert "LOADED" not in result.stdout
    assert "mismatch" in result.stderr.lower()


def test_what_save_pretrained_wrote_stops_at_the_sizes_without_us(tokens, layouts, tmp_path, python):
    small_of("llama", tokens, layouts=layouts).model.save_pretrained(tmp_path / "plain")
    result = python(LOAD, tmp_path / "plain", "auto", without_us=True)
    assert "LOADED" not in result.stdout
    assert "mismatch" in result.stderr.lower()


def test_every_replaced_layer_holds_a_tensor_that_no_dense_layer_fits(tokens, architecture, layouts):
    small = small_of(architecture, tokens, layouts=layouts)
    dense = {name: tensor.shape for name, tensor in tiny_model(architecture).state_dict().items()}
    state = small.model.state_dict()
    assert edited_layers(small.model)
    for name in edited_layers(small.model):
        assert state[f"{name}.weight"].shape != dense[f"{name}.weight"], name


def test_a_process_that_never_imports_us_loads_it(saved, tokens, tmp_path, python):
    small, folder = saved
    torch.save(tokens, tmp_path / "tokens.pt")
    code = (
        "import sys, torch\n"
        "assert 'fasc' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.save(model(input_ids=torch.load(sys.argv[2])).logits.detach(), sys.argv[3])"
    )
    if not _hook_is_installed(python):
        code = "import _fasc_transformers\n" + code
    result = python(code, folder, tmp_path / "tokens.pt", tmp_path / "logits.pt")
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        expected = small.model(input_ids=tokens).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


def _hook_is_installed(python):
    return "True" in python("import sys; print('_fasc_transformers' in sys.modules)").stdout


def test_the_config_comes_back_as_the_dense_models_own(saved):
    config = AutoConfig.from_pretrained(saved[1])
    assert type(config) is LlamaConfig
    assert config.model_type == "llama"
    assert not hasattr(config, "dense_model_type")
    assert json.loads((saved[1] / "config.json").read_text())["model_type"] == MODEL_TYPE


def test_a_model_class_named_by_hand_loads_with_its_own_type(saved, tokens):
    model = LlamaForCausalLM.from_pretrained(saved[1])
    assert model.config.model_type == "llama"
    assert not hasattr(model.config, "dense_model_type")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, saved[0].model(input_ids=tokens).logits)


def test_saving_a_loaded_model_again_keeps_it_loadable(saved, tokens, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved[1])
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "llama"
    torch.testing.assert_close(logits_of(tmp_path / "again", tokens), logits_of(saved[1], tokens))


def test_the_tokenizer_loads_beside_it(saved, tokenizer):
    assert AutoTokenizer.from_pretrained(saved[1])("knowledge").input_ids == tokenizer("knowledge").input_ids


def test_an_unknown_dense_model_is_refused(saved):
    content = json.loads((saved[1] / "config.json").read_text())
    (saved[1] / "config.json").write_text(json.dumps(content | {"dense_model_type": "no-such-model"}))
    with pytest.raises(Exception, match="no-such-model"):
        AutoConfig.from_pretrained(saved[1])


def test_the_hook_takes_less_than_a_millisecond(python):
    code = (
        "import time; start = time.perf_counter(); import _fasc_transformers; seconds = time.perf_counter() - start\n"
        "import sys; print(seconds, 'fasc' in sys.modules, 'transformers' in sys.modules)"
    )
    if _hook_is_installed(python):
        code = "import sys; del sys.modules['_fasc_transformers']\n" + code
    tries = []
    for _ in range(5):
        seconds, *imported = python(code).stdout.split()
        tries.append(float(seconds))
        assert imported == ["False", "False"]
    assert min(tries) < 1e-3


def test_the_hook_leaves_transformers_alone_where_we_cannot_be_imported(python):
    result = python(
        "import sys; import _fasc_transformers; sys.modules['fasc'] = None\n"
        "import warnings; warnings.simplefilter('always')\n"
        "from transformers import LlamaConfig; print(LlamaConfig().model_type)"
    )
    assert result.stdout.strip() == "llama", result.stderr
    assert "cannot be imported" in result.stderr
