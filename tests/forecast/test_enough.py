"""How many tokens a forecast needs."""

from dataclasses import replace

import pytest

from fasc.forecast.enough import ENOUGH, too_few_tokens


def heard(statistics, count):
    """The same moments, said to be of so many tokens."""
    return replace(statistics, groups={name: replace(group, tokens=count) for name, group in statistics.groups.items()})


def test_four_tokens_for_each_input_of_the_widest_group_are_enough_and_one_fewer_is_not(statistics):
    groups = [group.group for group in statistics.groups.values()]
    widest = max(groups, key=lambda group: group.d_in)
    assert too_few_tokens(groups, heard(statistics, ENOUGH * widest.d_in)) is None
    said = too_few_tokens(groups, heard(statistics, ENOUGH * widest.d_in - 1))
    assert said is not None
    assert f"{widest.d_in} inputs" in said


@pytest.mark.parametrize("count", [1, 7, 16])
def test_the_sequences_that_it_asks_for_are_enough(statistics, count):
    groups = [group.group for group in statistics.groups.values()]
    said = too_few_tokens(groups, heard(statistics, count))
    sequences = next(iter(statistics.groups.values())).sequences
    asked = int(said.partition("--sequences ")[2].split()[0].replace(",", ""))
    assert too_few_tokens(groups, heard(statistics, count * asked // sequences)) is None
    assert too_few_tokens(groups, heard(statistics, count * (asked - 1) // sequences)) is not None
