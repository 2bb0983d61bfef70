"""Kills, signals, damage, full disks and NaN. A run that is resumed afterwards ends with the same files."""
import itertools
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import pytest

import models
import train
from test_train import assert_same_outcome, launch, place, refusal, signals_at, words  # noqa: F401

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills and full disks of Linux")


def run(place, out, before=bool):
    """Starts or resumes a short run in a process of its own. Returns its exit code and output.
    Its learning rate is so high that the best step is not the last."""
    if Path(out, "last.ckpt").exists():
        argv = ["--resume", str(out)]
    else:
        shutil.rmtree(out, ignore_errors=True)  # it holds nothing yet
        argv = words(place, out, student="edsr_c8b3", init=place / "edsr_x2.pt", steps=8, val_every=3, lr=0.1,
                     ema=0)
    process = launch(argv, f"{out}.log", before)
    process.join(120)
    process.kill()
    return process.exitcode, Path(f"{out}.log1").read_text()


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """The folder of the run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(place, out)[0] == 0
    return out


def die(number, folder):
    """Has the process kill itself before the nth time that it writes or renames a file in the folder."""
    def hook(event, arguments, times=itertools.count(1)):
        writing = event == "open" and arguments[1] and arguments[1].strip("rbt")
        if (writing or event == "os.rename") and str(arguments[0]).startswith(folder):
            if next(times) == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)


def test_killed_and_resumed_equals_uninterrupted(place, whole, tmp_path):
    """By a second signal, which ends the program at once, and before a file is written."""
    out = tmp_path / "run"
    stop = partial(signals_at, 4, pytest.MonkeyPatch(), signal.SIGTERM, signal.SIGTERM)
    assert run(place, out, stop)[0] == -signal.SIGTERM
    assert models.read_file(out / "last.ckpt")["step"] == 3
    assert run(place, out)[0] == 0
    assert_same_outcome(whole, out)
    for number in range(1, 100, 3):  # every third file or renaming
        out = tmp_path / f"run{number}"
        if run(place, out, partial(die, number, f"{out}{os.sep}"))[0] == 0:
            break
        assert run(place, out)[0] == 0
        assert_same_outcome(whole, out)
    assert number > 16


@pytest.mark.parametrize("fault", ["student.pt", "last.ckpt", "nan"])
def test_a_full_disk_and_nan_leave_the_last_checkpoint(place, whole, tmp_path, capsys, monkeypatch, fault):
    """Here it is of a Ctrl-C in the fifth step."""
    def full(source, target, replace=os.replace):
        if Path(target).name == fault:
            raise OSError(28, "No space left on device")
        replace(source, target)
    out, named = tmp_path / "run", f"{fault} cannot be read or written: No space left on device"
    code, output = run(place, out, partial(signals_at, 4, pytest.MonkeyPatch(), signal.SIGINT))
    assert code == 128 + signal.SIGINT and models.read_file(out / "last.ckpt")["step"] == 5
    assert f"python train.py --resume {out}" in output.splitlines()[-1]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        if fault == "nan":
            named = "the loss or the weights are not finite after step 6"
            patch.setattr(train, "learning_rate", lambda step, args: float("nan"))
        assert named in refusal(capsys, "--resume", out)
    assert models.read_file(out / "last.ckpt")["step"] >= 5 and not list(out.glob(".*"))
    train.main(["--resume", str(out)])
    assert_same_outcome(whole, out)


def test_a_checkpoint_that_is_cut_off_is_one_line(place, tmp_path):
    """No file may have more than 20,000 bytes. It fails as on a full disk, in the midst of a write."""
    import resource  # not on Windows
    out = tmp_path / "run"
    code, _ = run(place, out, partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000)))
    lines = Path(f"{out}.log2").read_text().splitlines()
    assert code == 2 and lines[-1].endswith("last.ckpt cannot be read or written: File too large"), lines
    assert not list(out.glob("*.pt")) and not list(out.glob(".*"))
