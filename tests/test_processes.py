"""What processes share, and what each of them is told when others end."""

import os
import sys
from itertools import product

import pytest
import torch

from fasc.errors import UsageError
from fasc.processes import Processes, current
from tests.processes import together


@pytest.mark.parametrize(("total", "rows", "count"), [(24, 2, 4), (5, 2, 4), (7, 3, 2), (12, 256, 3), (4, 1, 4), (9, 2, 1)])
def test_every_sequence_is_read_by_one_process_in_order_and_no_process_is_idle(total, rows, count):
    shares = [Processes(rank, count).batches(total, rows) for rank in range(count)]
    read = [one for share in shares for part in share for one in range(part.start, part.stop)]
    assert read == list(range(total))
    assert all(0 < part.stop - part.start <= rows for share in shares for part in share)
    assert {len(share) for share in shares} <= {len(shares[0]), len(shares[0]) + 1}


def test_batches_are_those_of_one_process_wherever_there_are_as_many_batches_as_processes():
    alone = Processes().batches(23, 3)
    assert [part for rank in range(4) for part in Processes(rank, 4).batches(23, 3)] == alone


def test_more_processes_than_sequences_are_refused():
    with pytest.raises(UsageError, match="4 processes cannot share 3 sequences"):
        Processes(0, 4).batches(3, 1)


def test_alone_nothing_is_sent_and_everything_comes_back_as_it_was():
    own = torch.arange(6).view(3, 2)
    alone = current()
    assert (alone.rank, alone.count, alone.first, alone.first_to_fail()) == (0, 1, True, True)
    assert alone.to_first(own) is own
    assert alone.gathered(own) is own
    assert alone.from_first(lambda: own) is own
    alone.require_same({"text": "this"})
    assert alone.sent == 0


def test_sums_meet_at_the_first_process_and_rows_meet_everywhere(tmp_path):
    def work(processes):
        total = processes.to_first(torch.full((2, 3), 10.0**processes.rank, dtype=torch.float64))
        rows = processes.gathered(torch.full((processes.rank, 2), processes.rank))
        flags = processes.gathered(torch.tensor([processes.rank == 1]))
        made = processes.from_first(lambda: torch.tensor([[7, 8]]))
        return total[0, 0].item() if processes.first else None, rows[:, 0].tolist(), flags.tolist(), made.tolist(), processes.sent

    said = together(3, tmp_path, work)
    assert said[0] == "(111.0, [1, 2, 2], [False, True, False], [[7, 8]], 48)"
    assert said[1] == said[2] == "(None, [1, 2, 2], [False, True, False], [[7, 8]], 48)"


@pytest.mark.parametrize("seed", range(6))
def test_dear_items_are_spread_so_that_nobody_has_much_more_than_the_least_possible(seed):
    costs = torch.rand(7, generator=torch.Generator().manual_seed(seed)).tolist()
    count = 3
    owners = [Processes(rank, count).owners(costs) for rank in range(count)]
    assert owners[0] == owners[1] == owners[2], "all answer alike"
    best = min(
        max(sum(cost for cost, at in zip(costs, places, strict=True) if at == rank) for rank in range(count))
        for places in product(range(count), repeat=len(costs))
    )
    loads = [sum(cost for cost, at in zip(costs, owners[0], strict=True) if at == rank) for rank in range(count)]
    assert max(loads) <= (4 / 3 - 1 / (3 * count)) * best + 1e-9, "Graham's bound for the dearest first"


def test_items_are_done_once_and_known_everywhere_in_their_order(tmp_path):
    def work(processes):
        done = []

        def one(item):
            done.append(item)
            return {f"b|{item}": torch.full((item,), 1.5), f"a|{item}": torch.tensor([item])}

        found = processes.each(("working", "items"), [1.0, 5.0], one)
        return list(found), [value.tolist() for value in found.values()], done, processes.agreed(processes.first)

    said = together(3, tmp_path, work)
    same = "(['b|0', 'a|0', 'b|1', 'a|1'], [[], [0], [1.5], [1]], "
    assert sorted(said) == sorted([f"{same}[1], True)", f"{same}[0], True)", f"{same}[], True)"])
    assert eval(said[0])[:2] == work(current())[:2]


def test_a_sum_is_the_same_bits_everywhere(tmp_path):
    def work(processes):
        own = torch.randn(1000, generator=torch.Generator().manual_seed(processes.rank))
        return processes.summed(own).double().sum().item()

    assert len(set(together(3, tmp_path, work))) == 1


def test_processes_that_were_given_different_things_are_refused_by_name(tmp_path):
    def work(processes):
        processes.require_same({"model": "one", "text": "same"})
        processes.require_same({"torch": "2.6" if processes.rank == 2 else "2.7", "text": "same"})

    said = together(3, tmp_path, work)
    assert said == ["error: process 2 has another torch than process 0 (2.6, not 2.7)"] * 3


def test_a_process_that_ends_ends_the_wait_of_the_others_and_one_of_them_speaks(tmp_path):
    def work(processes):
        if processes.rank == 1:
            (tmp_path / "said-1").write_text("gone")
            os._exit(1)
        processes.to_first(torch.zeros(2))

    assert together(2, tmp_path, work) == ["error: another process ended", "gone"]

    def spoken(processes):
        processes.gathered(torch.zeros(1))
        return processes.first_to_fail(), processes.gathered(torch.zeros(1)).shape

    assert sorted(text.split(",")[0] for text in together(3, tmp_path, spoken)) == ["(False", "(False", "(True"]


def test_all_but_the_first_process_print_nothing(tmp_path, capfd):
    def work(processes):
        from fasc.progress import say

        sys.stdout.write(f"printed by {processes.rank}\n")
        say(f"said by {processes.rank}")

    together(2, tmp_path, work)
    out, err = capfd.readouterr()
    assert (out, err) == ("printed by 0\n", "said by 0\n")
