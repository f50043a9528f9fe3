"""Memory is that of the process that is asked, and what cannot be looked at is said in one line."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
from safetensors.torch import load_file

from fasc.errors import ModelError
from fasc.evaluation.footprint import bytes_on_disk, footprint, peak_memory


def test_the_peak_memory_of_a_process_is_not_that_of_the_one_that_started_it():
    ballast = b"1" * 600_000_000
    assert peak_memory() > len(ballast)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        child = pool.submit(peak_memory).result()
    assert 10_000_000 < child < peak_memory() - len(ballast) / 2


def test_the_bytes_on_disk_are_those_of_the_weights(model_folder, tmp_path):
    weights = sum(tensor.numel() * tensor.element_size() for tensor in load_file(model_folder / "model.safetensors").values())
    assert weights < bytes_on_disk(model_folder) < 1.2 * weights
    assert bytes_on_disk("owner/name") == bytes_on_disk(tmp_path) == 0


def test_a_model_that_cannot_be_looked_at_is_an_error_of_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"process of its own: .*absent") as caught:
        footprint(tmp_path / "absent", 8)
    assert "\n" not in str(caught.value)
