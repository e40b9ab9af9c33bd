import json
import sys
from pathlib import Path

import pytest

from lipnext.core.errors import TrainingError
from lipnext.training.log import RunLog, epochs


def test_each_event_is_a_line_that_is_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with RunLog(path, 0) as log:
        log.write(3, "epoch", loss=0.5, validation={"clean": 0.25})
        assert json.loads(path.read_text()) == {
            "step": 3,
            "event": "epoch",
            "loss": 0.5,
            "validation": {"clean": 0.25},
        }
        log.write(6, "epoch", loss=0.25)
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "tail",
    ['{"step": 6, "ev', "\0\0\0", '{"event": "epoch"}', "[1]", "6", "", '{"step": null}', "\udcff"],
)
def test_what_a_crash_left_and_what_came_after_the_checkpoint_is_dropped(tail: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    kept = ['{"step": 3, "event": "epoch"}', '{"step": 6, "event": "epoch"}']
    text = "\n".join([*kept, '{"step": 7, "event": "epoch"}', tail])
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with RunLog(path, 6) as log:
        assert path.read_text().splitlines() == kept
        log.write(9, "epoch")
    assert path.read_text().splitlines() == [*kept, '{"step": 9, "event": "epoch"}']


def test_epochs_are_read_back_without_other_events_and_half_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with RunLog(path, 0) as log:
        log.write(3, "epoch", loss=0.5)
        log.write(3, "stopped")
        log.write(6, "epoch", loss=0.25)
    with path.open("a") as file:
        file.write('{"step": 9, "event": "epo')
    assert [epoch["loss"] for epoch in epochs(path)] == [0.5, 0.25]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(TrainingError) as error, RunLog(tmp_path / "log.jsonl", 0) as log:  # noqa: PT012
        log._file.close()
        log._file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115
        log.write(1, "epoch")
    assert str(error.value) == "cannot write /dev/full: No space left on device"


def test_tensorboard_mirrors_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    calls: list[object] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def close(self) -> None:
            calls.append("closed")

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    with RunLog(tmp_path / "log.jsonl", 4, tmp_path / "board") as log:
        log.write(5, "epoch", loss=0.5, name="text", validation={"cra": {"36/255": 0.25}})
    assert calls == [
        (str(tmp_path / "board"), 5),
        ("epoch/loss", 0.5, 5),
        ("epoch/validation/cra/36/255", 0.25, 5),
        "closed",
    ]


def test_missing_tensorboard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        TrainingError, match=r"TensorBoard is not installed; run: pip install 'lipnext\[log\]'"
    ):
        RunLog(tmp_path / "log.jsonl", 0, tmp_path / "board")
