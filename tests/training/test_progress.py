import io

import pytest
from rich.console import Console

from lipnext.training import progress
from lipnext.training.progress import Silent, reporter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_without_a_terminal_there_is_a_line_every_ten_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with reporter("training", 100) as report:
        for _ in range(40):
            clock.now += 1
            report.advance(1, "loss 0.5")
        report.line("done")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "training 10/100, about 90 s left loss 0.5",
        "training 20/100, about 80 s left loss 0.5",
        "training 30/100, about 70 s left loss 0.5",
        "training 40/100, about 60 s left loss 0.5",
        "done",
    ]


def test_steps_of_an_earlier_run_do_not_count_towards_the_speed(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with reporter("training", 100) as report:
        clock.now += 50
        report.resume(80)
        for _ in range(10):
            clock.now += 1
            report.advance(1)
    assert capsys.readouterr().err == "training 90/100, about 10 s left\n"


def test_on_a_terminal_a_bar_is_drawn_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = io.StringIO()

    def terminal(stderr: bool) -> Console:
        assert stderr
        return Console(file=screen, force_terminal=True, width=100)

    monkeypatch.setattr(progress, "Console", terminal)
    with reporter("training", 100) as report:
        report.resume(20)
        report.advance(30, "loss [0.5]")
        report.line("epoch [1]/2")
    assert "training" in screen.getvalue()
    assert "50/100" in screen.getvalue()
    assert "epoch [1]/2" in screen.getvalue()
    assert capsys.readouterr() == ("", "")


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    report = Silent()
    report.resume(1)
    report.advance(1, "note")
    report.line("line")
    assert capsys.readouterr() == ("", "")
