"""Progress of long work on stderr: what, how far, how fast, how long still."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a program to end."""


class Interrupt:
    """Ctrl-C that cannot get lost.

    Python drops an exception that is raised inside a finaliser or a weak-reference callback, and a KeyboardInterrupt lands
    wherever the program happens to be. So the signal is remembered, and the next reported step of any long work raises it again.
    """

    def __init__(self) -> None:
        self.asked = False
        self.parent: int | None = None
        """The process whose end is ours too: torchrun's, where it was killed and could not tell us."""

    def install(self) -> None:
        """Take over Ctrl-C, SIGTERM and SIGHUP, from the main thread, unless whoever started us wants one ignored (nohup)."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def ignore(self) -> None:
        """Let the program end by itself, which is about to say why; of several processes, others are told to end meanwhile."""
        for number in _ENDING:
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise ``KeyboardInterrupt`` if the person asked for it, or whoever started us is gone."""
        if self.asked or (self.parent is not None and os.getppid() != self.parent):
            raise KeyboardInterrupt


INTERRUPT = Interrupt()


class Advance(Protocol):
    """Callable that reports finished work."""

    def __call__(self, amount: int = 1, /) -> None:
        """Report ``amount`` more units as done."""


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else "", style="dim")


class _Lines:
    """Progress for logs: a line at most every ten seconds, and one at the end."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self.start = self.printed = time.monotonic()

    def __call__(self, amount: int = 1, /) -> None:
        INTERRUPT.check()
        self.done += amount
        now = time.monotonic()
        if now - self.printed >= 10 or self.done - amount < self.total <= self.done:
            self.printed = now
            rate = self.done / max(now - self.start, 1e-9)
            left = max(0, self.total - self.done) / max(rate, 1e-9)
            line = f"{self.what}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.1f} {self.unit}/s, {left:,.0f} s left"
            if self.done > self.total:  # the total was a guess
                line = f"{self.what}: {self.done:,} {self.unit}, {rate:,.1f} {self.unit}/s"
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Advance]:
    """Show progress of ``total`` units on stderr: a bar on a terminal, sparse lines elsewhere.

    Args:
        what: what is being done, as a verb in -ing.
        total: how many units there are.
        unit: name of a unit, plural.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(what, total, unit)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,}/{task.total:,}"))
    with Progress(*columns, _Rate(), TimeRemainingColumn(), console=console, transient=False) as bar:
        task = bar.add_task(what, total=total, unit=unit)

        def advance(amount: int = 1, /) -> None:
            INTERRUPT.check()
            bar.advance(task, amount)

        yield advance


def say(text: str) -> None:
    """Print one line for the person watching, on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
