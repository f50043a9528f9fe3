"""Benchmarks are found by name, and looking at what there is loads no torch."""

import subprocess
import sys

import pytest

from fasc.errors import UnknownNameError
from fasc.evaluation import BENCHMARKS, benchmark, get_benchmark


def test_every_file_registers_its_benchmark_and_says_what_it_is():
    assert set(BENCHMARKS) >= {"perplexity", "kl", "facts", "lama"}
    for name, one in BENCHMARKS.items():
        assert one.name == name
        assert one.reference
        assert one.summary.endswith(".") or ":" in one.summary
    assert {name for name, one in BENCHMARKS.items() if one.needs_dense} == {"kl"}


def test_a_benchmark_of_another_file_is_found_and_a_wrong_name_gets_the_nearest():
    @benchmark("toy", reference="here")
    def toy(subject, config):
        """Nothing."""
        return []

    try:
        assert get_benchmark("toy").measure is toy
        with pytest.raises(UnknownNameError, match="did you mean `toy`"):
            get_benchmark("tog")
    finally:
        BENCHMARKS.remove("toy")


def test_importing_the_package_loads_no_torch():
    program = "import sys, fasc.evaluation, fasc.evaluation.options; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
