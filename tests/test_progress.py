"""Progress, and an interrupt that cannot get lost."""

import signal

import pytest

from fasc import progress


def test_an_interrupt_that_was_swallowed_is_raised_at_the_next_step(monkeypatch):
    interrupt = progress.Interrupt()
    monkeypatch.setattr(progress, "INTERRUPT", interrupt)
    with pytest.raises(KeyboardInterrupt):
        interrupt._on_signal(2, None)
    with progress.progress("work", 3, "steps") as advance, pytest.raises(KeyboardInterrupt):
        advance()


def test_a_signal_that_somebody_wants_ignored_stays_ignored(monkeypatch):
    """``nohup`` ignores SIGHUP, a shell's background job SIGINT."""
    taken = {}
    ignored = {signal.SIGHUP}
    monkeypatch.setattr(progress.signal, "getsignal", lambda number: signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    monkeypatch.setattr(progress.signal, "signal", taken.__setitem__)
    progress.Interrupt().install()
    assert set(taken) == {signal.SIGINT, signal.SIGTERM}


def test_a_log_gets_a_line_at_the_end_with_the_rate(capsys):
    with progress.progress("counting", 3, "sheep") as advance:
        for _ in range(3):
            advance()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("counting: 3/3 sheep, ")
    assert "0 s left" in line


def test_a_total_that_was_a_guess_is_not_claimed_beyond_it(capsys, monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress("counting", 3, "sheep") as advance:
        for _ in range(9):
            advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("counting: 3/3 sheep, ")
    assert [line.split(",")[0] for line in lines[1:]] == ["counting: 6 sheep", "counting: 9 sheep"]
