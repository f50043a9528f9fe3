"""What every registered layout owes as part of a model: the ordinary life of a checkpoint of transformers."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from fasc.edits.structure import edited_layers, structure_of
from fasc.layouts import LAYOUTS
from tests.conftest import in_new_process, logits
from tests.layouts.units import FACTORED

pytestmark = pytest.mark.parametrize("name", FACTORED)

OFFLOADED = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}

READER = """
import sys
import fasc, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, out, *names = sys.argv[1:]
tokens = load_file(folder + "/tokens.safetensors")["tokens"]
given = {}
for name in names:
    model = AutoModelForCausalLM.from_pretrained(folder + "/" + name)
    with torch.no_grad():
        given[name] = model(input_ids=tokens).logits
save_file(given, out)
"""


@pytest.fixture(scope="module")
def checkpoints(in_layout, tokens, tmp_path_factory):
    """A folder for each layout, and the logits that two new processes compute from it."""
    folder = tmp_path_factory.mktemp("layouts")
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    for name in FACTORED:
        in_layout(name)[0].save_pretrained(folder / name)
    for out in ("first", "second"):
        in_new_process(READER, folder, folder / out, *FACTORED)
    return folder, [load_file(folder / out) for out in ("first", "second")]


@pytest.fixture
def model(in_layout, name):
    return in_layout(name)[0]


def load(checkpoints, name, **options):
    return AutoModelForCausalLM.from_pretrained(checkpoints[0] / name, **options)


def test_every_unit_lies_in_it(in_layout, name):
    model, plan = in_layout(name)
    assert len(plan.edits) == (14 if LAYOUTS[name].asks_for == "layer" else 8)
    assert {edit.layout for edit in plan.edits} <= {name, LAYOUTS[name].suited(plan.edits[1].unit).name}
    assert len(edited_layers(model)) == 14


def test_the_model_computes_what_its_dense_products_compute(model, name, tokens):
    plain = copy.deepcopy(model)
    for layer in edited_layers(model):
        weight, bias = LAYOUTS[name].dense(model.get_submodule(layer))
        dense = nn.Linear(weight.shape[1], weight.shape[0])
        dense.weight, dense.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
        plain.set_submodule(layer, dense)
    torch.testing.assert_close(logits(model, tokens), logits(plain, tokens), rtol=1e-4, atol=1e-4)


def test_the_plan_weighs_the_model(in_layout, name):
    model, plan = in_layout(name)
    orders = sum(buffer.numel() for key, buffer in model.named_buffers() if key.endswith(".order"))
    assert model.num_parameters() + orders == plan.totals["parameters"]
    state = model.state_dict()
    del state["lm_head.weight"]  # tied
    assert plan.totals["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def test_two_new_processes_compute_the_very_bits(model, name, tokens, checkpoints):
    expected = logits(model, tokens)
    for elsewhere in checkpoints[1]:
        assert torch.equal(elsewhere[name], expected)


def test_the_folder_holds_nothing_that_is_unpickled(name, checkpoints):
    assert {file.name for file in (checkpoints[0] / name).iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_saving_what_was_loaded_gives_the_same_bytes(name, checkpoints, tmp_path):
    load(checkpoints, name).save_pretrained(tmp_path)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / file).read_bytes() == (checkpoints[0] / name / file).read_bytes()


def test_shards_load_like_one_file(model, name, tokens, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), logits(model, tokens))


@pytest.mark.parametrize("buffers", [False, True], ids=["weights offloaded", "and buffers"])
@pytest.mark.parametrize("places", ["auto", {"": "disk"}, OFFLOADED], ids=["auto", "disk", "cpu and disk"])
def test_it_loads_by_a_device_map(name, tokens, checkpoints, tmp_path, places, buffers):
    loaded = load(checkpoints, name, device_map=places, offload_folder=tmp_path, offload_buffers=buffers)
    if places != "auto":
        assert any(parameter.device.type == "meta" for parameter in loaded.parameters())
    assert torch.equal(logits(loaded, tokens).cpu(), checkpoints[1][0][name])


def test_accelerate_offloads_it(model, name, tokens):
    expected = logits(model, tokens)
    cpu_offload(model, execution_device="cpu")
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert torch.equal(logits(model, tokens), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_it_loads_in_half_precision(model, name, tokens, checkpoints, dtype):
    loaded = load(checkpoints, name, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert all(not buffer.is_floating_point() for key, buffer in loaded.named_buffers() if key.endswith("order"))
    expected = logits(model, tokens)
    assert float((logits(loaded, tokens).float() - expected).norm() / expected.norm()) < 0.1


def test_generation_with_a_cache_and_in_a_batch_equals_one_without(model, name, tokens):
    prompts = tokens[:3, :8]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    cached = model.generate(prompts, attention_mask=torch.ones_like(prompts), use_cache=True, **options)
    assert torch.equal(model.generate(prompts, attention_mask=torch.ones_like(prompts), use_cache=False, **options), cached)
    by_itself = model.generate(prompts[1:2], attention_mask=torch.ones_like(prompts[1:2]), use_cache=True, **options)
    assert torch.equal(by_itself[0], cached[1])


def test_decoding_token_by_token_gives_what_one_pass_gives(model, name, tokens):
    cache, steps = None, []
    with torch.no_grad():
        for position in range(tokens.shape[1]):
            given = model(input_ids=tokens[:1, position : position + 1], past_key_values=cache, use_cache=True)
            cache = given.past_key_values
            steps.append(given.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), logits(model, tokens[:1]), rtol=0, atol=1e-3)


def test_it_compiles_into_one_graph(model, name, tokens):
    model.requires_grad_(False)
    expected = logits(model, tokens)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(compiled(input_ids=tokens, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_it_exports(model, name, tokens):
    model.requires_grad_(False)
    program = torch.export.export(model, (), {"input_ids": tokens, "use_cache": False}, strict=False)
    torch.testing.assert_close(
        program.module()(input_ids=tokens, use_cache=False).logits, logits(model, tokens), rtol=1e-4, atol=1e-4
    )


def test_it_trains(model, name, tokens, checkpoints):
    """As loaded: every weight of the edited layers gets a gradient, and a step along it lowers the loss."""
    loaded = load(checkpoints, name)
    losses = []
    for _ in range(2):
        loss = loaded(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        loaded.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in loaded.parameters())
        assert all(
            float(parameter.grad.abs().max()) > 0
            for layer in edited_layers(loaded)
            for parameter in loaded.get_submodule(layer).parameters()
        )
        scale = sum(float(parameter.grad.square().sum()) for parameter in loaded.parameters())
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter.sub_(parameter.grad, alpha=1e-3 * losses[0] / scale)
    assert losses[1] < losses[0]


@pytest.mark.parametrize("trained", ["everything", "the embeddings alone"])
def test_activation_checkpointing_changes_no_gradient(model, name, tokens, trained):
    """Frozen layers hand their projection on; when a block is run again for its gradients they must do so again."""
    model.train().requires_grad_(trained == "everything")
    model.model.embed_tokens.requires_grad_(True)
    gradients = []
    for on in (False, True):
        if on:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_copies_of_the_model_share_nothing(model, name, tokens):
    expected = logits(model, tokens)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, tokens), expected)
    with torch.no_grad():
        for parameter in twin.model.layers[0].self_attn.q_proj.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, tokens), expected)
    assert not torch.equal(logits(twin, tokens), expected)
    assert structure_of(twin).edits == structure_of(model).edits


def test_gpt2_layers_that_store_their_weight_the_other_way_round_can_lie_in_it(in_layout, name, tokens):
    model, plan = in_layout(name, "gpt2")
    assert len(plan.edits) == 8
    assert logits(model, tokens).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_computes_what_the_processor_computes(name, checkpoints, tokens):
    loaded = load(checkpoints, name, device_map="cuda")
    torch.testing.assert_close(logits(loaded, tokens.cuda()).cpu(), checkpoints[1][0][name], rtol=0, atol=1e-2)
