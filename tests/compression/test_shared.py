"""What several processes make of a plan together is what one makes of it, bit by bit."""

import json

import pytest
import torch

from fasc.compression.compress import carried_out
from fasc.compression.parts import recorded
from fasc.compression.shared import chains_of
from fasc.edits.factor import Factor
from fasc.edits.structure import structure_of
from fasc.errors import NonFiniteError
from fasc.model.experts import expert_layers
from fasc.planning.needs import needs_for
from fasc.planning.options import MethodConfig
from fasc.processes import current
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from tests.conftest import tiny_model
from tests.processes import together

MANY = ("dense", "factors", "shared", "channels", "heads", "values", "skip")


def measured(model, tokens, **more):
    with expert_layers(model):
        return collect_moments(model, tokens, needs_for(MethodConfig(name="fasc", **more), None))


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_by_processes(count, make, statistics, tmp_path, **options):
    """Plan and compress in one process and in several."""

    def work(processes):
        model = make()
        made = plan(model, statistics, **options)
        shared = None if processes is None else tmp_path
        done, _ = carried_out(model, statistics, made, shared=shared)
        if current().first:
            torch.save(weights(model), tmp_path / f"weights-{current().count}.pt")
        return json.dumps(
            [made.to_dict(), done.to_dict() if current().first else None, structure_of(model).edits if current().first else None]
        )

    (alone,) = [work(None)]
    said = together(count, tmp_path, work)
    assert said[0] == alone, "plan, result and structure"
    assert all(json.loads(one)[0] == json.loads(alone)[0] for one in said), "every process plans the same"
    one, several = (torch.load(tmp_path / f"weights-{number}.pt", weights_only=True) for number in (1, count))
    assert list(one) == list(several)
    assert all(torch.equal(value, several[name]) for name, value in one.items())
    return json.loads(alone)[2]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_plan_is_carried_out_by_several_processes(count, architecture, tokens, tmp_path):
    statistics = measured(tiny_model(architecture), tokens)
    edits = same_by_processes(count, lambda: tiny_model(architecture), statistics, tmp_path, param_fraction=0.6, overhead=0)
    assert len(edits) > 2


def test_edits_of_one_layer_stay_together_and_every_kind_can_be_shared(tokens, tmp_path):
    def make():
        return tiny_model(layers=3)

    statistics = measured(make(), tokens, layouts=MANY, bits=(4, 8))
    edits = same_by_processes(
        3, make, statistics, tmp_path, max_bytes="60KB", overhead=0, layouts=MANY, bits=(4, 8), bits_group=16
    )
    assert len({edit["edit"] for edit in edits}) > 1


def test_experts_are_taken_apart_everywhere_and_shared(mixture, tokens, tmp_path):
    import copy

    statistics = measured(mixture, tokens)
    edits = same_by_processes(2, lambda: copy.deepcopy(mixture), statistics, tmp_path, param_fraction=0.5, overhead=0)
    assert edits[0]["edit"] == "unfuse"


def test_processes_without_any_edit_wait_for_those_that_have_one(tokens, tmp_path):
    statistics = measured(tiny_model(), tokens)
    edits = same_by_processes(4, tiny_model, statistics, tmp_path, param_fraction=0.985, overhead=0, layouts=("dense", "factors"))
    assert len(edits) == 1


def test_an_edit_that_fails_in_one_process_is_named_there_and_ends_the_others(tokens, tmp_path):
    model = tiny_model()
    statistics = measured(model, tokens)
    made = plan(model, statistics, param_fraction=0.6, overhead=0)

    def fail(edit, *_):
        raise NonFiniteError(f"`{edit.unit.name}`", "raise --damping")

    def work(processes):
        if processes.rank == 1:
            Factor.apply = fail  # in this process alone
        carried_out(model, statistics, made, shared=tmp_path)

    first, second = together(2, tmp_path, work)
    assert first == "error: another process ended"
    assert second.startswith("error: `model.layers.")


def test_processes_with_other_plans_are_refused_before_an_edit_is_made(tokens, tmp_path):
    model = tiny_model()
    statistics = measured(model, tokens)

    def work(processes):
        made = plan(model, statistics, param_fraction=0.6 + 0.1 * processes.rank, overhead=0, damping=1e-3)
        carried_out(model, statistics, made, shared=tmp_path)

    said = together(2, tmp_path, work)
    assert said[0] == said[1]
    assert said[0].startswith("error: process 1 has another plan than process 0")


def test_chains_part_the_edits_and_no_layer_is_in_two(tokens):
    model = tiny_model(layers=4)
    made = plan(model, measured(model, tokens), param_fraction=0.5, overhead=0)
    chains = chains_of(made.edits)
    assert sorted(place for chain in chains for place in chain) == list(range(len(made.edits)))
    layers = [{name for place in chain for name in made.edits[place].touches} for chain in chains]
    assert sum(map(len, layers)) == len(set().union(*layers))
    assert len(chains) > 1
    assert recorded(model) == []
