"""The processes that share the work of one verb: ``torch.distributed`` as torchrun starts it, or one process and nothing of it.

Every process holds the model and takes a share of the text; process 0 alone prints, writes and ends with the result. Work is
shared only inside :func:`joined`, which the command line enters where several processes were started: a library call in
somebody's own training job waits for nobody.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from fasc.errors import ProcessError, UsageError
from fasc.progress import INTERRUPT, progress

_PATIENCE = timedelta(days=7)
"""A process may sample text for hours while others wait; whoever dies closes its connections, and that ends the wait."""


_BETWEEN = "|"
"""Separates a number from a tensor's name on its way."""


class ProcessLostError(ProcessError):
    """Another process ended while this one waited for it; why is said there."""


class Processes:
    """This process among those that share its work. Alone, every method gives back what it was given."""

    def __init__(self, rank: int = 0, count: int = 1, store: Store | None = None) -> None:
        self.rank, self.count = rank, count
        self.sent = 0
        """Bytes that this process has given to sums."""
        self._store = store
        self._asked = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that prints, writes and gets the sums."""
        return self.rank == 0

    def batches(self, total: int, rows: int) -> list[slice]:
        """Which batches are this process's own: consecutive ones, as many as any other's or one fewer.

        Args:
            total: sequences.
            rows: sequences of a batch, at most; fewer where there would be fewer batches than processes.

        Raises:
            UsageError: there are more processes than sequences.
        """
        if total < self.count:
            raise UsageError(f"{self.count} processes cannot share {total} sequences", "start fewer processes, or give more text")
        rows = max(1, min(rows, total // self.count))
        starts = range(0, total, rows)
        own = starts[len(starts) * self.rank // self.count : len(starts) * (self.rank + 1) // self.count]
        return [slice(start, min(start + rows, total)) for start in own]

    def shares(self, total: int) -> list[range]:
        """Which of so many items each process has: every ``count``-th, so that what costs more is spread; may be none."""
        return [range(rank, total, self.count) for rank in range(self.count)]

    def shared(self, total: int, work: Callable[[range], Tensor]) -> Tensor:
        """Do a share of so many items in each process, and give all of them all results.

        Args:
            total: items.
            work: gives a row for each of the items it is asked for.

        Returns:
            [total, …], in the order of the items, on the processor.

        Raises:
            ProcessLostError: another process has ended.
        """
        shares = self.shares(total)
        rows = self.gathered(work(shares[self.rank]))
        order = torch.tensor([index for share in shares for index in share], dtype=torch.int64)
        return rows[order.argsort()]

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Which process does each item: the dearest first, each to whoever has least; the same answer in every process."""
        load, found = [0.0] * self.count, [0] * len(costs)
        for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
            found[item] = min(range(self.count), key=lambda rank: (load[rank], rank))
            load[found[item]] += costs[item]
        return found

    def each(
        self, what: tuple[str, str], costs: Sequence[float], work: Callable[[int], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Do each item in one of the processes, and give all of them all results.

        Args:
            what: name and noun of the progress.
            costs: of each item, in any unit.
            work: gives tensors by name for an item; no two items give the same name.

        Returns:
            By name, in the order of the items, on the processor.

        Raises:
            ProcessLostError: another process has ended.
        """
        own = [item for item, rank in enumerate(self.owners(costs)) if rank == self.rank]
        found: dict[str, Tensor] = {}
        with progress(what[0], len(own), what[1]) as advance:
            for item in own:
                found |= {f"{item}{_BETWEEN}{name}": value.detach().cpu() for name, value in work(item).items()}
                advance()
        every = [pair for part in self.exchanged(found) for pair in part.items()]
        every.sort(key=lambda pair: int(pair[0].partition(_BETWEEN)[0]))  # stable: an item's own order stays
        return {name.partition(_BETWEEN)[2]: value for name, value in every}

    def exchanged(self, own: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """The named tensors of every process, at each of them.

        Raises:
            ProcessLostError: another process has ended.
        """
        if self.count == 1:
            return [own]
        order = [f"{place:09}{_BETWEEN}{name}" for place, name in enumerate(own)]  # safetensors sorts by name
        packed = torch.frombuffer(
            bytearray(save(dict(zip(order, map(Tensor.contiguous, own.values()), strict=True)))), dtype=torch.uint8
        )
        lengths = self.gathered(torch.tensor([len(packed)])).tolist()
        parts = [load(part.numpy().tobytes()) for part in self.gathered(packed).split(lengths)]
        return [{name.partition(_BETWEEN)[2]: part[name] for name in sorted(part)} for part in parts]

    def summed(self, own: Tensor) -> Tensor:
        """The sum over all processes, at each of them the same bits. Changes ``own``.

        Raises:
            ProcessLostError: another process has ended.
        """
        return self._added(own, dist.all_reduce)

    def agreed(self, answer: bool) -> bool:  # noqa: FBT001 - what is asked has no other argument
        """What the first process answers, at each of them: whether a file is there, which may come between two looks.

        Raises:
            ProcessLostError: another process has ended.
        """
        return bool(self.from_first(lambda: torch.tensor([[answer]], dtype=torch.int64)).item())

    def wait(self) -> None:
        """Until all are here.

        Raises:
            ProcessLostError: another process has ended.
        """
        self.gathered(torch.zeros(1))

    def require_one_machine(self, what: str) -> None:
        """Refuse work whose parts meet in files.

        Raises:
            UsageError: the processes run on several machines.
        """
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.count))
        if here < self.count:
            raise UsageError(f"{what} lies in files, and {self.count} processes run on several machines", "use one machine")

    def to_first(self, own: Tensor) -> Tensor:
        """The sum over all processes, at process 0; elsewhere the result means nothing. Changes ``own``.

        Raises:
            ProcessLostError: another process has ended.
        """
        return self._added(own, partial(dist.reduce, dst=0))

    def _added(self, own: Tensor, add: Callable[[Tensor], object]) -> Tensor:
        if self.count > 1:
            own = own.contiguous()
            self.sent += own.numel() * own.element_size()
            with _together():
                add(own)
        return own

    def gathered(self, own: Tensor) -> Tensor:
        """The rows of all processes, [Σ n, …], in their order, at each of them; on the processor.

        Args:
            own: [n, …]; ``n`` may differ, and may be 0.

        Raises:
            ProcessLostError: another process has ended.
        """
        if self.count == 1:
            return own
        own = own.cpu()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        with _together():
            dist.all_gather(lengths, torch.tensor([len(own)]))
            longest = max(int(length) for length in lengths)
            padded = torch.zeros(longest, *own.shape[1:], dtype=torch.uint8 if own.dtype == torch.bool else own.dtype)
            padded[: len(own)] = own
            parts = [torch.empty_like(padded) for _ in lengths]
            dist.all_gather(parts, padded)
        return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)]).to(own.dtype)

    def from_first(self, make: Callable[[], Tensor]) -> Tensor:
        """What process 0 makes, at each of them; the others wait.

        Args:
            make: gives int64 [rows, columns], on the processor.

        Raises:
            ProcessLostError: another process has ended.
        """
        if self.count == 1:
            return make()
        made = make() if self.first else torch.empty(0, 0, dtype=torch.int64)
        shape = torch.tensor(made.shape)
        with _together():
            dist.broadcast(shape, 0)
            made = made.contiguous() if self.first else torch.empty(*shape.tolist(), dtype=torch.int64)
            dist.broadcast(made, 0)
        return made

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """What process 0 does before all others, which find it done: filling a cache that they share.

        Raises:
            ProcessLostError: another process has ended.
        """
        if not self.first:
            self.wait()
        try:
            yield
        finally:
            if self.first:
                self.wait()

    def require_same(self, facts: Mapping[str, str]) -> None:
        """See that all processes are to do the same work, before it is done.

        Args:
            facts: what must be the same, by what it is called; the same names in all processes.

        Raises:
            UsageError: one differs; names the process and the first fact.
            ProcessLostError: another process has ended.
        """
        if self._store is None:
            return
        self._asked += 1
        with _together():
            for what, value in facts.items():
                self._store.set(f"{self._asked}/{what}/{self.rank}", value)
            self.gathered(torch.zeros(1))  # waits by connections, which break when a process ends; the store would wait on
            said = [
                {what: self._store.get(f"{self._asked}/{what}/{rank}").decode() for what in facts} for rank in range(self.count)
            ]
            self.gathered(torch.zeros(1))  # who keeps the store may end when all have read
        for rank, what in product(range(1, self.count), facts):
            if said[rank][what] != said[0][what]:
                raise UsageError(
                    f"process {rank} has another {what} than process 0 ({said[rank][what][:40]}, not {said[0][what][:40]})",
                    "give all processes the same programs, files and options",
                )

    def first_to_fail(self) -> bool:
        """Whether no other process has asked this before: then it is this one that says why all of them end."""
        if self._store is None:
            return True
        try:
            return self._store.add("failed", 1) == 1
        except RuntimeError:  # whoever kept the store has ended: torchrun, which tells of the others itself
            return False


_ALONE = Processes()
_current = _ALONE


def current() -> Processes:
    """Those that were joined; one process alone otherwise."""
    return _current


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun has started, and share work with them inside; nothing where it has started one.

    Gloo carries what is on the processor, NCCL what is on GPUs; each process of a machine has a GPU of its own. What any
    process but the first prints goes nowhere. After an error the processes stay joined: the program is about to end.

    Raises:
        UsageError: they cannot be joined, or there are more of them than GPUs.
    """
    global _current
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield _ALONE
        return
    backend = _backend()
    try:
        store, rank, count = next(iter(rendezvous("env://", timeout=_PATIENCE)))
        dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=count, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as problem:
        words = " ".join(str(problem).split())[:200]
        raise UsageError(f"the processes cannot be joined: {words}", "start them by torchrun, or unset WORLD_SIZE") from problem
    INTERRUPT.parent = os.getppid()
    _current = Processes(rank, count, PrefixStore("fasc", store))
    with nullcontext() if _current.first else _silent():
        yield _current
    dist.destroy_process_group()
    INTERRUPT.parent = None
    _current = _ALONE


def _backend() -> str:
    if not torch.cuda.is_available():
        return "gloo"
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if here > gpus:
        raise UsageError(
            f"{here} processes and {gpus} GPU(s) on this machine", "start one process a GPU; CUDA_VISIBLE_DEVICES= hides them"
        )
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return "cpu:gloo,cuda:nccl"


@contextmanager
def _silent() -> Iterator[None]:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@contextmanager
def _together() -> Iterator[None]:
    """Waiting for others; a connection that breaks is their end and no fault of ours."""
    try:
        yield
    except RuntimeError as problem:
        if "out of memory" in str(problem).lower():
            raise
        raise ProcessLostError("another process ended", "it may have run out of memory, or was killed") from problem
