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

import models
import train
from test_train import config, launch, place  # noqa: F401 (a fixture)

KILLS = int(os.environ.get("DUKD_KILLS", 12))  # DUKD_KILLS=100 python -m pytest … kills a hundred times
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills and full disks of Linux")


def settings(place, out):
    """A short run. Its learning rate is so high that the best step is not the last."""
    init = str(place / "edsr_x2.pt")
    return config(place, out, student="edsr_c8b3", init=init, steps=8, val_every=3, lr=0.1, ema=0)


def run(c, before=bool, killed_after=60):
    """Starts or resumes the run of c in a process of its own. Returns its exit code, output and errors."""
    function, argument, log = train.main, ["--resume", "--out", c.out], f"{c.out}.log"
    if not Path(c.out, "config.json").exists():
        shutil.rmtree(c.out, ignore_errors=True)  # it holds nothing yet
        function, argument = train.train, c
    process = launch(function, argument, log, before)
    process.join(killed_after)
    process.kill()
    process.join()
    return process.exitcode, Path(f"{log}1").read_text(), Path(f"{log}2").read_text()


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """The folder of the run that nothing interrupts."""
    c = settings(place, tmp_path_factory.mktemp("whole") / "run")
    assert run(c)[0] == 0
    return Path(c.out)


@pytest.fixture
def stopped(place, tmp_path):
    """The folder of the same run after a Ctrl-C in its fifth step."""
    c = settings(place, tmp_path / "run")
    code, output, _ = run(c, partial(signal_in_a_step, signal.SIGINT))
    assert code == 128 + signal.SIGINT and models.read_file(f"{c.out}/last.ckpt")["step"] == 5
    assert f"python train.py --resume --out {c.out}" in output.splitlines()[-1]
    return Path(c.out)


def assert_same_outcome(whole, out):
    for name in ("student.pt", "best.pt", "log.csv", "compare.png"):
        assert (whole / name).read_bytes() == (out / name).read_bytes(), name


def error(capsys, out):
    """The line with which a resumed run ends."""
    with pytest.raises(SystemExit) as end:
        train.main(["--resume", "--out", str(out)])
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and line.startswith("error: ")
    return line


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(place, whole, tmp_path):
    rng, kills, code, began = random.Random(KILLS), 0, None, time.monotonic()
    run(settings(place, tmp_path / "timed"))
    duration, c = time.monotonic() - began, settings(place, tmp_path / "run")
    while kills < KILLS or code != 0:
        code, _, errors = run(c, killed_after=rng.uniform(0, duration) if kills < KILLS else 60)
        assert code in (0, -signal.SIGKILL), errors
        kills += code != 0
        if code == 0:
            assert_same_outcome(whole, Path(c.out))
            shutil.rmtree(c.out)


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
        c = settings(place, tmp_path / f"run{number}")
        if run(c, partial(die, number, c.out + os.sep))[0] == 0:
            break
        assert run(c)[0] == 0
        assert_same_outcome(whole, Path(c.out))
    assert number > 16


def signal_in_a_step(*numbers):
    """Has the process send itself signals within its fifth step."""
    draw = train.draw_patches

    def interrupted(patches, c, step, *where):
        for number in numbers if step == 4 else ():
            os.kill(os.getpid(), number)
        return draw(patches, c, step, *where)
    train.draw_patches = interrupted


def test_a_second_signal_ends_the_program_at_once(place, whole, tmp_path):
    c = settings(place, tmp_path / "run")
    assert run(c, partial(signal_in_a_step, signal.SIGTERM, signal.SIGTERM))[0] == -signal.SIGTERM
    assert models.read_file(tmp_path / "run" / "last.ckpt")["step"] == 3
    assert run(c)[0] == 0
    assert_same_outcome(whole, tmp_path / "run")


def test_one_flipped_bit_in_a_checkpoint_is_found(stopped, capsys):
    path = stopped / "last.ckpt"
    content = bytearray(path.read_bytes())
    content[content.index(models.read_file(path)["student"]["conv_first.bias"].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert "last.ckpt" in error(capsys, stopped)


@pytest.mark.parametrize("name", ["student.pt", "last.ckpt"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(whole, stopped, capsys, name):
    (stopped / f"{name}.tmp").symlink_to("/dev/full")
    assert f"{name} cannot be read or written: No space left on device" in error(capsys, stopped)
    assert models.read_file(stopped / "last.ckpt")["step"] >= 5 and not list(stopped.glob("*.tmp"))
    train.main(["--resume", "--out", str(stopped)])
    assert_same_outcome(whole, stopped)


def test_nan_stops_the_run_and_the_last_checkpoint_stays(whole, stopped, capsys, monkeypatch):
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda step, c: float("nan") if step == 6 else rate(step, c))
    assert "the weights are not finite after step 7" in error(capsys, stopped)
    monkeypatch.undo()
    train.main(["--resume", "--out", str(stopped)])
    assert_same_outcome(whole, stopped)
