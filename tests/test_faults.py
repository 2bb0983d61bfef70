"""Kills, signals, damage, full disks and NaN. A run that is resumed afterwards ends with the same files."""
import itertools
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import data
import models
import train
from test_train import at_the_draw_of, launch, place, refused, rows, words  # noqa: F401 (place is a fixture)

KILLS = int(os.environ.get("DUKD_KILLS", 12))  # DUKD_KILLS=100 python -m pytest … kills a hundred times
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills and full disks of Linux")


def settings(place, out):
    """The command line of a short run. Its learning rate is so high that the best step is not the last."""
    init = place / "edsr_x2.pt"
    return words(place, out, student="edsr_c8b3", init=init, steps=8, val_every=3, lr=0.1, ema=0)


def run(argv, out, before=bool, killed_after=60):
    """Starts or resumes a run in a process of its own. Returns its exit code, output and errors."""
    log = f"{out}.log"
    if Path(out, "config.json").exists():
        argv = ["--resume", str(out)]
    else:
        shutil.rmtree(out, ignore_errors=True)  # it holds nothing yet
    process = launch(argv, log, before)
    process.join(killed_after)
    process.kill()
    process.join()
    return process.exitcode, Path(f"{log}1").read_text(), Path(f"{log}2").read_text()


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """The folder of the run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(settings(place, out), out)[0] == 0
    return out


@pytest.fixture
def stopped(place, tmp_path):
    """The folder of the same run after a Ctrl-C in its fifth step."""
    out = tmp_path / "run"
    code, output, _ = run(settings(place, out), out, partial(signal_in_a_step, signal.SIGINT))
    assert code == 128 + signal.SIGINT and models.read_file(out / "last.ckpt")["step"] == 5
    assert f"python train.py --resume {out}" in output.splitlines()[-1]
    return out


def assert_same_outcome(whole, out):
    """The same files, bit for bit, but for the times in the log."""
    for name in ("student.pt", "best.pt", "compare.png"):
        assert (whole / name).read_bytes() == (out / name).read_bytes(), name
    assert [row | dict(ms="") for row in rows(whole)] == [row | dict(ms="") for row in rows(out)]


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(place, whole, tmp_path):
    rng, kills, code, began = random.Random(KILLS), 0, None, time.monotonic()
    run(settings(place, tmp_path / "timed"), tmp_path / "timed")
    duration, out = time.monotonic() - began, tmp_path / "run"
    while kills < KILLS or code != 0:
        patience = rng.uniform(0, duration) if kills < KILLS else 60
        code, _, errors = run(settings(place, out), out, killed_after=patience)
        assert code in (0, -signal.SIGKILL), errors
        kills += code != 0
        if code == 0:
            assert_same_outcome(whole, out)
            shutil.rmtree(out)


def die(number, folder):
    """Has the process kill itself before the nth time that it writes or renames a file in the folder."""
    def hook(event, arguments, times=itertools.count(1)):
        writing = event == "open" and arguments[1] and arguments[1].strip("rbt")
        if (writing or event == "os.rename") and str(arguments[0]).startswith(folder):
            if next(times) == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)


def test_killed_before_a_file_is_written_and_resumed_equals_uninterrupted(place, whole, tmp_path):
    """Every fourth file, or each where DUKD_KILLS asks for more."""
    for number in range(1, 100, 1 if KILLS > 12 else 4):
        out = tmp_path / f"run{number}"
        if run(settings(place, out), out, partial(die, number, f"{out}{os.sep}"))[0] == 0:
            break
        assert run(settings(place, out), out)[0] == 0
        assert_same_outcome(whole, out)
    assert number > 16


def signal_in_a_step(*numbers):
    """Has the process send itself signals within its fifth step."""
    def send():
        for number in numbers:
            os.kill(os.getpid(), number)
    data.Patches.__getitem__ = at_the_draw_of(4, send)


def test_a_second_signal_ends_the_program_at_once(place, whole, tmp_path):
    out = tmp_path / "run"
    killed = run(settings(place, out), out, partial(signal_in_a_step, signal.SIGTERM, signal.SIGTERM))
    assert killed[0] == -signal.SIGTERM and models.read_file(out / "last.ckpt")["step"] == 3
    assert run(settings(place, out), out)[0] == 0
    assert_same_outcome(whole, out)


@pytest.mark.parametrize("name", ["student.pt", "last.ckpt"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(whole, stopped, capsys, name):
    (stopped / f"{name}.tmp").symlink_to("/dev/full")
    assert f"{name} cannot be read or written: No space left on device" in refused(["--resume", stopped], capsys)
    assert models.read_file(stopped / "last.ckpt")["step"] >= 5 and not list(stopped.glob("*.tmp"))
    train.main(["--resume", str(stopped)])
    assert_same_outcome(whole, stopped)


def test_nan_stops_the_run_and_the_last_checkpoint_stays(whole, stopped, capsys, monkeypatch):
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, args: float("nan") if step == 6 else rate(step, args))
    assert "the weights are not finite after step 7" in refused(["--resume", stopped], capsys)
    monkeypatch.undo()
    train.main(["--resume", str(stopped)])
    assert_same_outcome(whole, stopped)
