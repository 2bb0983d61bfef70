"""The command lines: a mistake ends with exit code 2 and one line that names it. It leaves no file."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import models
import train
from samples import cut, error_lines, noise, save

ROOT = Path(__file__).resolve().parent.parent
SCORE = "evaluate.py bicubic --scale 2 --data val train"
NEW = "--teacher x2.pt --student edsr_c2b1 --batch 1 --patch 8 --steps 1 --device cpu --out new --cache ../c"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with good and bad checkpoints, folders of pictures and a damaged run."""
    base = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    for scale in (2, 4):
        models.save(base / f"x{scale}.pt", models.build("edsr_c4b2", scale))
    (base / "damaged.pt").write_bytes((base / "x2.pt").read_bytes()[:-999])
    torch.save({"fc.weight": torch.zeros(2, 2)}, base / "other.pt")
    (base / "file.txt").write_text("text")
    for folder, count in dict(train=4, val=1, one=1, small=0, cut=2, empty=0, pair=1, twins=1, run=0).items():
        (base / folder).mkdir()
        for i in range(count):
            save(noise(32, 36, 3, seed=i), base / folder / f"im{i}.png")
    save(noise(12, 12, 3), base / "small" / "im0.png")
    cut(base / "cut" / "im1.png", 0.6)
    save(noise(16, 18, 3), base / "pair" / "im0x2.png")
    save(noise(16, 18, 3), base / "twins" / "im0.bmp")
    (base / "run" / "last.ckpt").write_bytes((base / "x2.pt").read_bytes()[:999])
    return base


RUN_MISTAKES = [  # what follows NEW, and what the line names
    *((f"--{name} {value}", f"--{name}") for name, value in [
        ("scale", 5), ("method", "dukdd"), ("ops", "hflip transpse"), ("steps", 0), ("steps", "many"),
        ("steps", "1e9"), ("batch", 0), ("crops", 0), ("val-every", -1), ("lr", "nan"), ("lr", 2), ("ema", 1),
        ("p", 1.5), ("lambda-kd", -1), ("lambda-zoom-in", "inf"), ("device", "abacus"), ("device", "cuda:77"),
        ("device", "meta")]),
    ("--teacher nowhere.pt", "nowhere.pt"), ("--init nowhere.pt", "nowhere.pt"),
    ("--teacher other.pt", "other.pt"), ("--teacher file.txt", "file.txt is no checkpoint"),
    ("--teacher damaged.pt", "damaged.pt is no checkpoint"),
    ("--teacher run", "run cannot be read: Is a directory"),
    ("--scale 4", "x2.pt is for x2, not x4: leave --scale out"),
    ("--student x2.pt", "unknown model 'x2.pt'"), ("--init x2.pt", "x2.pt does not fit the student: "),
    ("--data nowhere", "nowhere does not exist"), ("--data empty", "empty has no images"),
    ("--data one", "all pictures are held out"), ("--data train --val empty", "empty has no images"),
    ("--data train --val train", "all pictures are held out"),
    ("--data file.txt --val val", "file.txt is not a readable image"),
    ("--data cut --val val", "cut/im1.png is not a readable image"),
    ("--data train --val small", "small/im0.png is too small"),
    ("--data train --val val --patch 20", "train/im0.png is too small"),
    ("--data pair --val val", "pair/im0.png and pair/im0x2.png look like one picture twice"),
    ("--data train --val pair", "pair/im0.png and pair/im0x2.png look like one picture twice"),
    ("--patch 9", "zoom-out needs patches of a multiple of the scale 2, not 9x9"),
    ("--student swinir_c12s6 --method fitnet --patch 12", "feature maps of 16x16 (student) and 12x12 "
     "(teacher) cannot be compared. SwinIR pads to a multiple of its window (8)"),
    ("--ops hflip hflip", "an operation is named twice"),
    ("--method scratch --lambda-rec 0", "nothing to learn from"),
    ("--stpes 3", "unrecognized arguments: --stpes 3"),
    ("--out file.txt", "file.txt is not an empty folder"),
    ("--out run", "run is not an empty folder: give another --out. If a run is there, it goes on with "
                  "--resume run"),
    ("--out file.txt/new --data train --val val", "file.txt/new cannot be read or written: Not a directory"),
    ("--teacher= --data train --val val", "kd needs a teacher"),
    ("--teacher= --method scratch --student small", "--student small needs a --teacher"),
    ("--resume nowhere", "nowhere/last.ckpt cannot be read: No such file")]
EVALUATE_MISTAKES = [
    ("", "required: MODEL"), ("x2.pt", "--data"), ("nowhere.pt --data val", "nowhere.pt"),
    ("x2.pt x4.pt --data val", "x4.pt is a x4 network, but x2 is wanted"),
    ("bicubic --data val", "give --scale"), ("x2.pt --data val --scale 5", "--scale"),
    ("x2.pt --data val --tile nan", "--tile"), ("x2.pt --data val --device cuda:77", "--device cuda:77"),
    ("x2.pt --data val --devise cpu", "unrecognized arguments: --devise cpu"),
    ("x2.pt --data nowhere", "nowhere does not exist"), ("x2.pt --data small", "small/im0.png"),
    ("x2.pt --data pair", "pair/im0.png and pair/im0x2.png look like one picture twice"),
    ("x2.pt --data val --json empty", "empty cannot be read or written"),
    ("x2.pt --data val --figure new.psd", "new.psd cannot be written"),
    ("x2.pt --json new.json --bench 1", "--json"), ("x2.pt --bench 0", "--bench"),
    ("x2.pt --input val", "--output is missing"),
    ("x2.pt bicubic --input val --output new", "--input takes one model"),
    ("x2.pt --input nowhere --output new", "nowhere does not exist"),
    ("x2.pt --input twins --output new", "twins holds two pictures of the same name"),
    ("x2.pt --input file.txt --output new.png", "file.txt is not a readable image"),
    ("x2.pt --input val/im0.png --output new.xyz", "new.xyz cannot be written: its ending names no known"),
    ("x2.pt --input val/im0.png --output file.txt/new", "file.txt/new/im0_x2.png cannot be written"),
    ("x2.pt --input val --output file.txt", "file.txt")]


@pytest.mark.parametrize("main, words, named", [
    *((train.main, f"{NEW} {words}", named) for words, named in RUN_MISTAKES),
    (train.main, "--resume run --device cpu", "run/last.ckpt is no checkpoint"),
    *((evaluate.main, words, named) for words, named in EVALUATE_MISTAKES)])
def test_a_mistake_is_one_line_and_changes_no_file(place, monkeypatch, capfd, main, words, named):
    monkeypatch.chdir(place)
    snapshot = lambda: {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in place.rglob("*")}
    before = snapshot()
    lines = error_lines(main, words.split(), capfd)
    assert len(lines) == 1 and named in lines[0] and snapshot() == before


def script(name, *words, **options):
    """A script in a process of its own."""
    return subprocess.run([sys.executable, ROOT / name, *words], capture_output=True, **options)


@pytest.mark.parametrize("name, words, named", [
    ("train.py", "--dvice cpu", "error: unrecognized arguments: --dvice cpu (see --help)"),
    ("results/study.py", "", "name studies"), ("results/study.py", "Z", "name studies"),
    ("results/study.py", "L --data .", "has no train/ or no highres/")])
def test_the_scripts_themselves_end_with_one_line_and_exit_code_2(tmp_path, name, words, named):
    done = script(name, *words.split(), cwd=tmp_path, text=True)
    assert done.returncode == 2 and named in done.stderr and len(done.stderr.splitlines()) == 1
    assert not done.stdout and not any(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="bash")
@pytest.mark.parametrize("command, code, words", [
    (f"{SCORE} >&-", 0, ""), (f"{SCORE} 2>&-", 0, "bicubic"),
    (f"{SCORE} | head -1; exit ${{PIPESTATUS[0]}}", 0, ""),
    ("evaluate.py bicubic --scale 2 --data nowhere >&-", 2, "error: nowhere"),
    ("evaluate.py bicubic --scale 2 --data nowhere 2>&1 | true; exit ${PIPESTATUS[0]}", 2, ""),
    (f"train.py {NEW} --data train --val val --out OUT >&-", 0, ""),
    (f"train.py {NEW} --data train --val val --out OUT 2>&-", 0, "held-out PSNR"),
    (f"train.py {NEW} --data train --val val --out OUT 2>&1 | true; exit ${{PIPESTATUS[0]}}", 0, "")])
def test_streams_may_be_closed(place, tmp_path, command, code, words):
    """As a service's may be, or a pipe to head. A run is whole all the same."""
    command = command.replace("OUT", f"{tmp_path}/run").replace("../c", f"{tmp_path}/c")
    command = ["bash", "-c", f"{sys.executable} {ROOT}/{command}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place)
    assert done.returncode == code and words in done.stdout + done.stderr and "Exception" not in done.stderr
    assert ("train.py" in command[2]) == (tmp_path / "run" / "compare.png").exists()


def test_a_tilde_is_the_home_folder(place, tmp_path, monkeypatch):
    """The shell leaves it alone behind an equals sign."""
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("USERPROFILE", str(place))  # Windows
    monkeypatch.chdir(tmp_path)
    evaluate.main("~/x2.pt --input=~/val/im0.png --output=~/big.png".split())
    evaluate.main("~/x2.pt --data ~/val --json=~/table.json --figure=~/f.png".split())
    train.main(f"{NEW} --teacher=~/x2.pt --data=~/train --val=~/val --cache=~/c --out=~/new_run".split())
    train.main("--resume=~/new_run --device cpu".split())
    assert all((place / made).exists() for made in ("big.png", "table.json", "f.png", "new_run", "c"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "ascii"])
def test_scripts_print_on_any_terminal(place, tmp_path, encoding):
    terminal = os.environ | dict(PYTHONIOENCODING=encoding)
    for name in ("evaluate.py", "train.py"):
        done = script(name, "--help", env=terminal)
        assert done.returncode == 0 and not done.stderr and b"--device" in done.stdout
    words = f"{NEW} --data train --val val --out {tmp_path}/run".split()
    done = script("train.py", *words, cwd=place, env=terminal)
    assert done.returncode == 0 and "L = 1·rec + 1·kd".encode(encoding, "replace") in done.stdout
