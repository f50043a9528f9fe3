"""Pruning methods are found beside the others."""

import pytest

from fasc.errors import UnknownNameError
from fasc.pruning import PRUNINGS, Structured, find_method, get_structured, get_unstructured


def test_both_kinds_of_method_are_found_by_name():
    assert find_method("fasc").name == "fasc"
    assert find_method("wanda").name == "wanda"
    with pytest.raises(UnknownNameError, match="did you mean `magnitude`"):
        find_method("magnitud")


def test_a_method_of_the_other_kind_is_refused():
    for name, pruning in PRUNINGS.items():
        wrong = get_unstructured if isinstance(pruning, Structured) else get_structured
        with pytest.raises(UnknownNameError, match=f"unknown .*structured pruning method `{name}`"):
            wrong(name)
