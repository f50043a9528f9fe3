"""Several processes, started here as torchrun would, without its launcher and without loading torch again."""

import os
import socket
from multiprocessing import get_context

import torch

from fasc.errors import FascError
from fasc.processes import joined


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def together(count, folder, work):
    """Let ``work(processes)`` run in each of several joined processes; give what each returned as text, or its error."""
    port = free_port()
    started = [get_context("fork").Process(target=_one, args=(rank, count, port, folder, work)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert not process.is_alive(), "a process waits for ever"
    return [(folder / f"said-{rank}").read_text() for rank in range(count)]


def _one(rank, count, port, folder, work):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.cuda.is_available = lambda: False  # a process that was forked cannot use one
    try:
        with joined() as processes:
            said = work(processes)
    except FascError as problem:
        said = f"error: {problem.message}"
    (folder / f"said-{rank}").write_text(str(said))
    os._exit(0)
