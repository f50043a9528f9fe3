"""Several processes for one verb: torchrun's own launcher, what they share, and which of them says why all of them end."""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import typer

from fasc.errors import ProcessError, UsageError
from fasc.outputs import Inputs, Owned, output, resolved

SHARED = ("collect", "compress", "evaluate", "plan", "recover")
"""Verbs whose work several processes share."""

INTERRUPTED = 130
"""Exit code of what was told to end."""

SILENT = 75
"""Exit code of a process that ends because another did, which says why."""

_OWN = "fasc"
"""What torchrun's launcher calls a run that we have started: we tell how it ended."""


def started() -> int:
    """How many processes run this command, by what torchrun has told each of them."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdigit() and "RANK" in os.environ else 1


def require_shared(verb: str | None) -> None:
    """Refuse a verb whose work several processes would each do all of.

    Raises:
        UsageError: it is one.
    """
    count = started()
    if count > 1 and verb is not None and verb not in SHARED:
        raise UsageError(
            f"`fasc {verb}` works in one process, and {count} were started",
            f"start it without torchrun; {', '.join(SHARED)} share their work (or unset WORLD_SIZE)",
        )


def joined() -> AbstractContextManager[Any]:
    """The processes that were started, joined for the length of a ``with``; torch is loaded only where there are several."""
    if started() == 1:
        return nullcontext()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its sockets tell of every connection that closes
    from fasc import processes

    return processes.joined()


def together(command: Callable[[], int | None]) -> int | None:
    """Run a command in the processes that were started.

    Args:
        command: gives its exit code; typer makes 130 of Ctrl-C.

    Raises:
        KeyboardInterrupt: it was interrupted, so that the processes are not taken for done.
    """
    with joined():
        code = command()
        if code == INTERRUPTED:
            raise KeyboardInterrupt
    return code


def first() -> bool:
    """Whether this process prints and writes."""
    return int(os.environ["RANK"]) == 0 if started() > 1 else True


def output_of_the_first(
    out: Path, *, overwrite: bool, inputs: Inputs, folder: bool, owned: Owned | None = None
) -> AbstractContextManager[Path]:
    """Where the first process writes, seen to as :func:`fasc.outputs.output` does; the others only learn the place."""
    if first():
        return output(out, overwrite=overwrite, inputs=inputs, folder=folder, owned=owned)
    return nullcontext(resolved(out))


def launched(nproc: int | None, device: str, sequences: int | None = None) -> bool:
    """Do the verb in ``nproc`` processes of this machine, if this is not one of them.

    Args:
        nproc: as typed.
        device: as typed.
        sequences: that there are to share, where that is known.

    Returns:
        Whether it is done; the caller does it, or its share of it, otherwise.

    Raises:
        UsageError: another number of processes was started, there are more than sequences, or they would share one GPU.
        ProcessError: one was killed.
        typer.Exit: one failed and has said why.
    """
    count = started()
    if nproc is not None and count > 1 and nproc != count:
        raise UsageError(f"--nproc is {nproc}, and {count} processes were started", "give --nproc, or start torchrun; not both")
    wanted = max(count, nproc or 1)
    if sequences is not None and wanted > sequences:
        raise UsageError(f"{wanted} processes cannot share {sequences} sequences", "lower --nproc, or raise --sequences")
    if wanted > 1 and ":" in device:
        raise UsageError(
            f"{wanted} processes cannot share the device `{device}`", "give --device cuda: each takes a GPU of its own"
        )
    if wanted == count:
        return False
    _launch(wanted)
    return True


def _launch(count: int) -> None:
    """The same command once more, in each of so many processes."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from fasc.provenance import machine

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, machine()["cores"] // count)))
    logging.disable(logging.CRITICAL)  # the launcher's own reports of what we say in a line
    with tempfile.TemporaryDirectory(prefix="fasc-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=_OWN,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "fasc", *sys.argv[1:])
        except SignalException as asked:
            raise KeyboardInterrupt from asked
        except ChildFailedError as failed:
            codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
            _tell(codes, count)
        finally:
            logging.disable(logging.NOTSET)


def _tell(codes: dict[int, int], count: int) -> None:
    """Say which process was killed; one that failed has spoken itself, and the launcher ends the others with SIGTERM."""
    spoken = [code for code in codes.values() if code > 0 and code != SILENT]
    if spoken:
        raise typer.Exit(spoken[0])
    killed = [(rank, code) for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM]
    if not killed:  # all were told to end
        raise KeyboardInterrupt
    rank, code = killed[0]
    raise ProcessError(
        f"process {rank} (of {count}, counted from 0) was killed: {signal.Signals(-code).name}",
        "it may have run out of memory: lower --batch-tokens or --nproc",
    )


def leave(code: int) -> NoReturn:
    """End this program.

    One of several processes ends at once: torch's threads may wait for others that have ended, and a signal would find
    nobody to take it while the interpreter is closed.
    """
    if started() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def voice(message: str, problem: Exception | None, *, interrupted: bool) -> str | None:
    """An error as this process tells it, or nothing where another process tells why all of them end.

    Args:
        message: what went wrong.
        problem: the error, if it is one.
        interrupted: whether this process was told to end.
    """
    if started() == 1:
        return message
    from fasc.processes import ProcessLostError, current

    ours = os.environ.get("TORCHELASTIC_RUN_ID") == _OWN
    told = ours and (interrupted or isinstance(problem, ProcessLostError))  # by whoever started us
    if told or not current().first_to_fail():
        return None
    return f"process {os.environ['RANK']} (of {started()}, counted from 0): {message}"
