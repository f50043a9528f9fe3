"""What is held out of a recovery's text has calibrated nothing."""

import pytest
import torch

from fasc.compression.options import RecoveryConfig
from fasc.model.load import LoadedModel
from fasc.model.options import ModelConfig
from fasc.recipe import read_recipe
from fasc.serving.checkpoint import RECIPE_FILE, read_provenance
from fasc.stages.compress import compress_checkpoint
from fasc.stages.recover import draw_for, kept_text, recover_checkpoint
from fasc.statistics.options import CalibrationConfig
from fasc.text.corpus import TextRequest, load_corpus
from tests.conftest import tiny_model

LENGTH = 16


def rows(tokens):
    return {tuple(row) for row in tokens.tolist()}


@pytest.fixture
def loaded(tokenizer):
    return LoadedModel(tiny_model(), tokenizer)


@pytest.fixture
def different(tmp_path):
    """A text whose sequences all differ."""
    file = tmp_path / "numbers.txt"
    file.write_text(" ".join(str(number) for number in range(900)))
    return file


def read(loaded, corpus, sequences, seed=0):
    request = TextRequest(corpus=str(corpus), sequences=sequences, sequence_length=LENGTH, seed=seed, role="calibration")
    return load_corpus(*loaded, request).tokens


def options(corpus, **more):
    return {"corpus": str(corpus), "sequence_length": LENGTH, **more}


def test_training_goes_on_where_the_calibration_ended_and_so_does_the_next_one(loaded, different, tmp_path):
    calibration = CalibrationConfig(**options(different, sequences=40, skip=5))
    first = draw_for(RecoveryConfig(**options(different, sequences=32)), calibration, [])
    assert (first.skip, first.unread) == (45, True)
    block, unread = kept_text(loaded, first, tmp_path)
    assert unread
    assert len(block.tokens) == 32
    assert not rows(block.tokens) & rows(read(loaded, different, 45))
    told = options(different, sequences=32, seed=0, skip=45)
    assert draw_for(RecoveryConfig(**options(different, sequences=32)), calibration, [told]).skip == 77


@pytest.mark.parametrize("other", [{"seed": 3}, {"sequence_length": 8}])
def test_another_draw_of_the_same_text_does_not_claim_to_be_unread(different, other):
    calibration = CalibrationConfig(**options(different, sequences=40))
    draw = draw_for(RecoveryConfig(**options(different, sequences=32) | other), calibration, [])
    assert (draw.skip, draw.unread) == (0, False)


def test_other_text_is_unread_also_where_the_calibration_s_is_gone(different, tmp_path):
    gone = CalibrationConfig(**options(tmp_path / "gone.txt", sequences=40))
    draw = draw_for(RecoveryConfig(**options(different, sequences=32)), gone, [])
    assert (draw.skip, draw.unread) == (0, True)


def test_a_model_s_own_words_are_sampled_anew_each_time():
    calibration = CalibrationConfig(corpus="self", seed=0)
    first = draw_for(RecoveryConfig(seed=0), calibration, [])
    assert (first.request.seed, first.unread) == (1, True)
    assert draw_for(RecoveryConfig(seed=0), calibration, [{"corpus": "self", "seed": 1, "sequences": 2}]).request.seed == 2


def test_a_text_too_short_for_other_sequences_is_used_again_and_that_is_said(loaded, different, tmp_path):
    whole = len(read(loaded, different, None))
    calibration = CalibrationConfig(**options(different, sequences=whole - 4))
    draw = draw_for(RecoveryConfig(**options(different, sequences=32)), calibration, [])
    for _ in range(2):  # drawn, and kept
        block, unread = kept_text(loaded, draw, tmp_path)
        assert not unread
        assert torch.equal(block.tokens, read(loaded, different, 32))


def test_the_checkpoint_tells_of_its_training(model_folder, different, tmp_path):
    small, trained = tmp_path / "small", tmp_path / "trained"
    asked = options(different, sequences=40) | {"rank_fraction": 0.5, "damping": 1e-2}
    compress_checkpoint(model_folder, out=small, **asked)
    recover_checkpoint(
        ModelConfig(model=str(small)), trained, RecoveryConfig(**options(different, sequences=32, batch_tokens=64))
    )
    made = read_provenance(trained)["recovery"]
    assert (made["skip"], made["held_out_is_unread"]) == (40, True)
    recovery = read_recipe(trained / RECIPE_FILE).recovery
    assert (recovery.sequences, recovery.corpus) == (32, str(different))
    assert "other text costs more" not in (trained / "README.md").read_text()
