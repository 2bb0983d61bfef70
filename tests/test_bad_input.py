"""Nothing silently wrong: every kind of bad input, through the real command lines, ends with one line and exit code 2 and
leaves nothing behind; strangers' files run no code, take no more memory than they hold, and reach nothing outside.
"""
import ast
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import skimage.color
import skimage.metrics
import torch
from hypothesis import strategies as st
from PIL import Image  # imageio brings it

import data
import dukd
import evaluate
import models
import train
from samples import chunk, cut, damaged, noise, png, png16, save

ROOT = Path(__file__).resolve().parent.parent
QUICK = dict(deadline=None, derandomize=True, database=None,
             suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow])
needs_links = pytest.mark.skipif(os.name == "nt", reason="Windows has other links, and no pipes among files")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A ×2 teacher and a ×4 one, four good pictures to train on and one to validate with."""
    base = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    for scale in (2, 4):
        models.save(base / f"x{scale}.pt", models.build("edsr_c4b2", scale))
    for folder, n in (("train", 4), ("val", 1)):
        (base / folder).mkdir()
        for i in range(n):
            save(noise(32, 36, 3, seed=i), base / folder / f"good{i}.png")
    return base


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, so that whatever a command leaves behind shows."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here" / "cache"))
    return tmp_path / "here"


def training(place, *words, **paths):
    """The words of a small training run, later ones over earlier ones."""
    paths = dict(data=place / "train", val=place / "val", teacher=place / "x2.pt") | paths
    flags = [w for k, v in paths.items() if v for w in (f"--{k}", v)]
    small = ["--student", "edsr_c2b1", "--batch", 1, "--patch", 8, "--steps", 1, "--device", "cpu", "--out", "run"]
    return [str(w) for w in (*small, *flags, *words)]


def refused(capfd, main, words):
    """The one line that a command ends with; progress bars apart, nothing else may be said."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(w) for w in words])
    lines = said(capfd)
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 2500, lines
    return lines[0]


def works(capfd, main, words):
    """What a command that must not fail says on stderr beside its progress bars."""
    capfd.readouterr()
    main([str(w) for w in words])
    return said(capfd)


def said(capfd):
    """The lines on stderr without the progress bars."""
    return [line for line in re.split(r"[\r\n]+", capfd.readouterr().err) if line.strip() and "%|" not in line]


# ------------------------------------------------------------------------------------------------ bad pictures
@functools.cache
def zeros(n):
    """n zero bytes as zlib writes them, made in pieces: a gigabyte is a megabyte."""
    packer, piece = zlib.compressobj(9), bytes(2**20)
    return b"".join(packer.compress(piece[:min(2**20, n - i)]) for i in range(0, n, 2**20)) + packer.flush()


def animated(path):
    save(noise(32, 32, 3), path, save_all=True, append_images=[Image.fromarray(noise(32, 32, 3, seed=1))])


def tiff(tags):
    """A little-endian TIFF of these tags {number: value}, with nothing behind them."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def archive(path):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("../../outside.png", b"a")


def to_itself(path):
    path.symlink_to(path.name)


def outside(path):
    """A link to a good picture beside the folder."""
    path.symlink_to(save(noise(32, 32, 3), path.parent.parent / "private.png"))


def unix_socket(path):
    old = os.getcwd()
    os.chdir(path.parent)  # a socket's whole path may only have a hundred letters
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as s:
        s.bind(path.name)
    os.chdir(old)


HUGE = {256: 50_000, 257: 50_000, 258: 8, 259: 1, 262: 1, 277: 1}
write = lambda content: lambda path: path.write_bytes(content)
# name: how it is made, what the line says; ANY: refused wherever pictures are read
BAD_PICTURES = {
    "text.png": (write(b"no picture,\nbut two lines"), "not a readable image"),
    "address.png": (write(b"https://example.com/a.png"), "not a readable image"),
    "archive.png": (archive, "not a readable image"),
    "zero.png": (write(b""), "zero bytes"),
    "cut.png": (lambda p: cut(p, 0.6), "truncated"),
    "cut.jpg": (lambda p: cut(p, 0.6), "truncated"),
    "nearly.jpg": (lambda p: cut(p, 0.999), "truncated"),
    "cut.webp": (lambda p: cut(p, 0.6), "not a readable image"),
    "cut.tif": (lambda p: cut(p, 0.6), "truncated"),
    "animated.gif": (animated, "2 frames"),
    "animated.webp": (animated, "2 frames"),
    "pages.tif": (animated, "2 frames"),
    "bomb.png": (write(png(50_000, 50_000, zlib.compress(bytes(99)))), "2500000000 pixels"),
    "real bomb.png": (lambda p: p.write_bytes(png(50_000, 50_000, zeros(2**27))), "2500000000 pixels"),
    "wide.png": (write(png(2**31 - 1, 2**31 - 1, b"")), "not a readable image"),
    "bomb.bmp": (write(b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0)), "pixels"),
    "bomb.gif": (write(b"GIF89a" + struct.pack("<HH", 50_000, 50_000) + b"\x80\0\0" + bytes(6) + b","
                       + struct.pack("<HHHH", 0, 0, 50_000, 50_000) + b"\0\x02\x02\x4c\x01\0;"), "pixels"),
    "bomb.ppm": (write(b"P6 50000 50000 255\n"), "pixels"),
    "bomb.tif": (write(tiff(HUGE | {273: 8, 278: 50_000, 279: 99})), "pixels"),
    "tiles.tif": (write(tiff(HUGE | {256: 64, 257: 64, 259: 5, 322: 2**31 - 16, 323: 2**31 - 16, 324: 8, 325: 99})), "readable"),
    "bomb.webp": (write(b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4)
                        + b"\xff\xff\x3f\xff\xff\x3f" + b"VP8L" + bytes(8)), "not a readable image"),
    "text bomb.png": (lambda p: p.write_bytes(png(9, 9, b"", before=chunk(b"zTXt", b"a\0\0" + zeros(2**27)))), "too large"),
    "profile bomb.png": (lambda p: p.write_bytes(png(9, 9, b"", before=chunk(b"iCCP", b"a\0\0" + zeros(2**27)))), "too large"),
    "large.tif": (lambda p: save(np.full((32, 32), 70_000, np.int32), p), "8 or 16 bits"),
    "float.tif": (lambda p: save(np.ones((32, 32), np.float32), p), "float32"),
    "loop.png": (to_itself, "not a file"),
    "dangling.png": (lambda p: p.symlink_to("nothing.png"), "not a file"),
    "link.png": (outside, "outside its folder"),
    "device.png": (lambda p: p.symlink_to("/dev/zero"), "outside its folder"),
    "pipe.png": (lambda p: os.mkfifo(p), "not a file"),
    "socket.png": (unix_socket, "not a file"),
}
TOO_SMALL = {"1x1.png": (1, 1), "narrow.png": (32, 7), "smaller than a patch.png": (32, 15)}  # rows, columns


def set_with(here, name):
    """A folder with a good picture and the one called `name`."""
    folder = here.parent / "pictures"
    folder.mkdir()
    save(noise(32, 32, 3), folder / "a.png")
    if name in TOO_SMALL:
        save(noise(*TOO_SMALL[name], 3), folder / name)
    else:
        BAD_PICTURES[name][0](folder / name)
    return folder


@needs_links
@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_is_named_by_every_command(place, here, capfd, name):
    folder, began = set_with(here, name), time.monotonic()
    commands = {"data": (train.main, training(place, data=folder)), "val": (train.main, training(place, val=folder)),
                "score": (evaluate.main, [place / "x2.pt", "--data", folder]),
                "sr": (evaluate.main, ["--sr", folder, "--data", place / "val", "--scale", 2]),
                "input": (evaluate.main, ["bicubic", "--scale", 2, "--input", folder, "--output", "out"])}
    for kind, (main, words) in commands.items():
        if kind == "sr" and BAD_PICTURES[name][1] not in ("outside its folder", "not a file"):
            continue  # of a folder of results only those that belong to an HR picture are read
        line = refused(capfd, main, words)
        assert str(folder / name) in line and BAD_PICTURES[name][1] in line, (kind, line)
        assert all(p.parent.name == "out" and p.name == "a_x2.png" for p in here.rglob("*") if p.is_file()), kind
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("name", TOO_SMALL)
def test_a_picture_that_is_too_small_is_named_with_its_size(place, here, capfd, name):
    folder, (h, w) = set_with(here, name), TOO_SMALL[name]
    assert f"{folder / name} is {w}x{h}, smaller than 16x16" in refused(capfd, train.main, training(place, data=folder))
    line = refused(capfd, evaluate.main, [place / "x2.pt", "--data", folder]) if min(h, w) < 15 else str(folder / name)
    assert str(folder / name) in line and not any(here.iterdir())
    evaluate.main([str(w) for w in (place / "x2.pt", "--input", folder / name, "--output", "big.png")])
    assert data.read_picture("big.png").shape == (2 * h, 2 * w, 3)  # any size can be upscaled


@needs_links
def test_a_device_is_never_read():
    with pytest.raises(data.DataError, match="is not a file"):
        data.read_picture("/dev/null")  # as /dev/zero, which has no end


@needs_links
@pytest.mark.parametrize("name", ["cut.jpg", "bomb.png", "link.png", "pipe.png", "dangling.png", "animated.gif", "1x1.png"])
def test_skip_bad_leaves_each_of_them_out_with_a_line(place, here, capfd, name):
    folder = set_with(here, name)
    assert works(capfd, train.main, training(place, "--skip-bad", data=folder)) == []
    assert (here / "run" / "student.pt").is_file()


def test_skip_bad_says_what_it_leaves_out(place, here, capfd):
    folder = set_with(here, "zero.png")
    train.main(training(place, "--skip-bad", data=folder))
    assert f"left out: {folder / 'zero.png'} is empty" in capfd.readouterr().out


def test_one_bad_file_among_thousands_is_named(place, here, capfd):
    """A bar runs while they are decoded; the bad one ends it."""
    folder = here.parent / "many"
    folder.mkdir()
    content = save(noise(16, 16, 3), here.parent / "a.bmp").read_bytes()
    for i in range(2000):
        (folder / f"{i:04}.bmp").write_bytes(content if i != 1500 else content[:300])
    line = refused(capfd, train.main, training(place, data=folder))
    assert str(folder / "1500.bmp") in line and "truncated" in line and not any(here.iterdir())


def test_a_picture_between_pillows_two_limits_brings_no_warning(place, here):
    """Of 90 million pixels, in a process of its own, where warnings would reach the terminal."""
    width, height = 30_000_000, 3
    (here / "large.png").write_bytes(png(width, height, zeros((width // 8 + 1) * height), depth=1, colour=0))
    done = subprocess.run([sys.executable, ROOT / "train.py", *training(place, data=here / "large.png")], capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    assert "large.png is 30000000x3, smaller than" in done.stderr and not done.stdout
    assert [p.name for p in here.iterdir()] == ["large.png"]


# ------------------------------------------------------------------------------------------------ pictures of every kind
def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


SMOOTH = np.stack([*np.meshgrid(np.linspace(20, 230, 36), np.linspace(200, 40, 32)), np.full((32, 36), 90.0)], 2).astype(np.uint8)
GREY = SMOOTH[..., :1].repeat(3, 2)
KINDS = {  # name: how it is written, and the RGB it must be read as, with a tolerance
    "16-bit.png": (lambda p: p.write_bytes(png16(SMOOTH.astype(np.uint16) * 257)), SMOOTH, 0),
    "16-bit grey.png": (lambda p: save((GREY[..., 0].astype(np.uint16) * 257), p), GREY, 0),
    "palette.gif": (lambda p: save(Image.fromarray(GREY // 40 * 40).quantize(16), p), GREY // 40 * 40, 1),
    "palette.png": (lambda p: save(Image.fromarray(GREY // 40 * 40).quantize(16), p), GREY // 40 * 40, 1),
    "cmyk.jpg": (lambda p: save(Image.fromarray(SMOOTH).convert("CMYK"), p, quality=98), SMOOTH, 6),
    "grey.png": (lambda p: save(GREY[..., 0], p), GREY, 0),
    "grey and alpha.png": (lambda p: save(np.stack([GREY[..., 0], noise(32, 36)], 2), p), GREY, 0),
    "alpha.png": (lambda p: save(np.concatenate([SMOOTH, noise(32, 36, 1)], 2), p), SMOOTH, 0),
    "clear.png": (lambda p: save(np.concatenate([SMOOTH, np.zeros((32, 36, 1), np.uint8)], 2), p), SMOOTH, 0),
    "turned.jpg": (lambda p: save(np.rot90(SMOOTH).copy(), p, quality=98, subsampling=0, exif=exif(6)), SMOOTH, 4),
    "turned.png": (lambda p: save(np.rot90(SMOOTH, 2).copy(), p, exif=exif(3)), SMOOTH, 0),
    "bits.png": (lambda p: save(SMOOTH[..., 0] > 128, p), np.where(SMOOTH[..., :1] > 128, 255, 0).repeat(3, 2), 0),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture_trains_and_scores_as_its_own_rgb(place, here, capfd, monkeypatch, name):
    make, rgb, tolerance = KINDS[name]
    folder, seen, patches = here.parent / "kind", [], data.Patches
    folder.mkdir()
    make(folder / name)
    monkeypatch.setattr(data, "Patches", lambda store, *rest: seen.append(store) or patches(store, *rest))
    assert works(capfd, train.main, training(place, data=folder)) == []
    first, h, w = seen[0].hr[0].tolist()
    got = seen[0].pixels[first:first + h * w].view(h, w, 3).numpy().astype(int)
    assert got.shape == rgb.shape and np.abs(got - rgb).max() <= tolerance
    (here / "sr").mkdir()
    save(rgb.astype(np.uint8), here / "sr" / f"{Path(name).stem}.png")
    evaluate.main([str(w) for w in ("--sr", "sr", "--data", folder, "--scale", 2, "--json", "t.json")])
    figures = json.loads((here / "t.json").read_text())["results"]["sr"]["kind"]
    assert figures["psnr"] > (30 if tolerance else 1000)  # infinite where every pixel is the same


def test_alpha_changes_nothing_in_training(place, here):
    weights = []
    for i, alpha in enumerate((0, 255)):
        (here / f"{i}").mkdir()
        save(np.concatenate([SMOOTH, np.full((32, 36, 1), alpha, np.uint8)], 2), here / f"{i}" / "a.png")
        train.main(training(place, "--out", f"run{i}", data=here / f"{i}"))
        weights.append(torch.load(here / f"run{i}" / "student.pt", weights_only=True)["params"])
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


# ------------------------------------------------------------------------------------------------ folders
@needs_links
def test_links_that_stay_inside_and_a_linked_folder_are_fine(place, here, capfd):
    real = here.parent / "real"
    real.mkdir()
    save(noise(32, 32, 3), real / "a.png")
    (real / "b.png").symlink_to("a.png")
    (real / "c.png").symlink_to(real / "b.png")
    (here.parent / "linked").symlink_to(real)
    assert len(data.find_images([here.parent / "linked"])) == 3
    assert works(capfd, train.main, training(place, data=here.parent / "linked")) == []


@needs_links
def test_archives_and_folders_named_like_pictures_are_passed_over(here):
    folder = here.parent / "mixed"
    (folder / "folder.png").mkdir(parents=True)
    archive(folder / "pictures.zip")
    (folder / "up.png").symlink_to("..")
    save(noise(8, 8, 3), folder / "a.png")
    assert data.find_images([folder]) == [folder / "a.png"]


@needs_links
def test_nothing_is_written_through_a_link_in_the_output_folder(place, here, capfd):
    (here / "out").mkdir()
    (here / "out" / "good0_x2.png").symlink_to(here.parent / "elsewhere.png")
    line = refused(capfd, evaluate.main, ["bicubic", "--scale", 2, "--input", place / "val", "--output", "out"])
    assert "good0_x2.png exists already" in line and not (here.parent / "elsewhere.png").exists()


@pytest.mark.parametrize("name", ("imageio:chelsea.png", "<bytes>.png", "a.zip", "http:", "-rf.png", "ä\n\x1b[31mb.png"))
def test_strange_names_are_names_of_files(place, here, capfd, name):
    """imageio would take some of these for addresses and archives."""
    folder = here.parent / "strange"
    target = folder / name if name.endswith(".png") else folder / name / "x.png"
    target.parent.mkdir(parents=True)
    save(noise(32, 32, 3), target)
    evaluate.main([str(w) for w in ("bicubic", "--scale", 2, "--input", target, "--output", here / "out" / name / "x.png")])
    assert data.read_picture(here / "out" / name / "x.png").shape == (64, 64, 3)
    target.write_bytes(b"no picture")
    line = refused(capfd, train.main, training(place, data=target.parent))
    assert line.isprintable() and "not a readable image" in line


def test_disagreeing_pairs_are_named_with_both_sizes(place, here, capfd):
    for name in ("lr", "half"):
        (here.parent / name).mkdir()
        for i in range(4 if name == "lr" else 2):
            save(noise(16, 17 if i == 2 else 18, 3), here.parent / name / f"good{i}x2.png")
    line = refused(capfd, train.main, training(place, "--lr-data", here.parent / "lr"))
    assert all(w in line for w in ("good2x2.png is 17x16", str(place / "train" / "good2.png"), "36x32", "18x16"))
    line = refused(capfd, train.main, training(place, "--lr-data", here.parent / "half"))
    assert str(place / "train" / "good2.png") in line and "good2x2" in line and not any(here.iterdir())


def test_two_pictures_of_one_name_are_not_scored_as_one(place, here, capfd):
    folder = here.parent / "twins"
    folder.mkdir()
    for name in ("a.png", "a.bmp"):
        save(noise(32, 32, 3), folder / name)
    line = refused(capfd, evaluate.main, [place / "x2.pt", "--data", folder])
    assert "a.bmp" in line and "a.png" in line


def test_two_sets_of_one_name_are_two_columns(place, here, capfd):
    for i, base in enumerate(("A", "B")):
        (here / base / "HR").mkdir(parents=True)
        save(noise(32, 32, 3, seed=i), here / base / "HR" / "a.png")
    evaluate.main([str(w) for w in (place / "x2.pt", "--data", "A/HR", "B/HR", "--json", "t.json")])
    assert set(json.loads((here / "t.json").read_text())["results"]["x2.pt"]) == {"A/HR", "B/HR"}


# ------------------------------------------------------------------------------------------------ words and numbers
@pytest.mark.parametrize("words, named", [
    (["--data", "nowhere"], "nowhere does not exist"), (["--data", "{empty}"], "no images"), (["--val", "{empty}"], "no images"),
    (["--lr-data", "nowhere"], "nowhere does not exist"), (["--data", "{file}"], "file.txt is not a readable image"),
    (["--data", "{file}/sub"], "file.txt/sub"), (["--data", "/dev/null"], "/dev/null"),
    (["--data", "x" * 300], "File name too long"),
    (["--scale", "4"], "x2 network, not x4"), (["--teacher", "nowhere.pt"], "nowhere.pt does not exist"),
    (["--teacher", "{empty}"], "folder"), (["--teacher", "{file}"], "file.txt"), (["--teacher", "/dev/null"], "not a file"),
    (["--init", "{x4}"], "--init"), (["--init", "{file}"], "file.txt"),
    (["--student", "edsr_basline"], "did you mean edsr_baseline"), (["--student", "edsr_c9999999b1"], "between 1 and 4096"),
    (["--method", "dukdd"], "did you mean dukd?"), (["--precision", "float23"], "did you mean float32?"),
    (["--ops", "hflip", "transpse"], "did you mean transpose?"), (["--schedule", "cosin"], "did you mean cosine?"),
    (["--consistency", "zoomin"], "did you mean zoom_in?"), (["--stpes", "3"], "did you mean --steps?"),
    (["--ops", "hflip", "hflip"], "twice"), (["--method", "at", "--taps", "a:b:c"], "STUDENT:TEACHER"),
    (["--method", "at", "--taps", "body.0:x"], "--taps"), (["--device", "cuda:77"], "cuda:77"),
    (["--device", "abacus"], "abacus"),
    (["--device", "meta"], "meta"), (["--device", "cuda:-1"], "cuda:-1"), (["--device", "cuda:" + "9" * 30], "9999"),
    (["--batch", "65536", "--patch", "1024"], "million HR pixels"),
    (["--crops", "1024", "--batch", "65536"], "million HR pixels"),
    (["--out", "{empty}"], "exists already"), (["--out", "{file}"], "exists already"), (["--out", "{file}/run"], "not a folder"),
    (["--out", "{dangling}"], "exists already"), (["--out", "{dangling}/run"], "not a folder"),
    (["--out", "/dev/null/run"], "not a folder"),
    (["--cache", "{file}", "--ram", "0"], "--cache"), (["--resume", "--out", "{empty}"], "no run to resume"),
    (["--holdout", "4", "--val"], "--val"), (["--data", "{x4}"], "x4.pt is not a readable image")])
def test_wrong_words_of_training(place, here, capfd, words, named):
    (here.parent / "empty").mkdir()
    (here.parent / "file.txt").write_text("text")
    (here.parent / "dangling").symlink_to("nothing")
    paths = dict(empty=here.parent / "empty", file=here.parent / "file.txt", dangling=here.parent / "dangling",
                 x4=place / "x4.pt")
    words = [w.format(**paths) for w in words]
    assert named in refused(capfd, train.main, words if "--resume" in words else training(place, *words))
    assert not any(here.iterdir()) and not any((here.parent / "empty").iterdir())
    assert sorted(p.name for p in here.parent.iterdir()) == ["dangling", "empty", "file.txt", "here"]


def test_a_student_larger_than_its_teacher_is_warned_of_and_trains(place, here, capfd):
    train.main(training(place, "--student", "edsr_c8b2"))
    assert "warning: the student is larger than its teacher" in capfd.readouterr().out and (here / "run" / "student.pt").is_file()


@pytest.mark.parametrize("words, named", [
    (["--data", "nowhere"], "nowhere does not exist"), (["--data", "{empty}"], "no images"), (["--data", "{file}"], "file.txt"),
    (["--data", "{val}", "--json", "{empty}"], "is a folder"), (["--data", "{val}", "--json", "{file}/t.json"], "no folder"),
    (["--data", "{val}", "--json", "nowhere/t.json"], "no folder nowhere"),
    (["--data", "{val}", "--figure", "{empty}"], "is a folder"),
    (["--data", "{val}", "--figure", "f.txt"], "--figure f.txt"), (["--data", "{val}", "--figure", "figure"], "--figure figure"),
    (["--data", "{val}", "--figure", "nowhere/f.png"], "no folder nowhere"),
    (["--data", "{val}", "--figure", "f.png", "--image", "99"], "99"),
    (["--data", "{val}", "--tile", "-1"], "--tile"), (["--data", "{val}", "--tile", "nan"], "--tile"),
    (["--data", "{val}", "--tile", "1e9"], "--tile"), (["--data", "{val}", "--tile", "9" * 5000], "--tile"),
    (["--data", "{val}", "--image", "-1"], "--image"), (["--data", "{val}", "--image", "abc"], "--image"),
    (["--data", "{val}", "--scale", "0"], "--scale"), (["--data", "{val}", "--scale", "-2"], "--scale"),
    (["--data", "{val}", "--scale", "4"], "x4"),
    *((["--data", "{val}", "--res-scale", v], "--res-scale") for v in ("0", "-1", "nan", "inf", "1e999", "1" + "0" * 30, "abc")),
    (["--data", "{val}", "--precision", "bfloat15"], "did you mean bfloat16?"),
    (["--data", "{val}", "--devise", "cpu"], "did you mean --device?"), (["bicubc", "--data", "{val}"], "did you mean bicubic?"),
    (["--bench", "0"], "--bench"), (["--bench", "-1"], "--bench"), (["--bench", "1e9"], "--bench"),
    (["--data", "{val}", "--device", "abacus"], "abacus"), (["--data", "{val}", "--device", "meta"], "meta"),
    (["--data", "{val}", "--device", "cuda:77"], "cuda:77"), (["--sr", "{empty}", "--data", "{val}"], "no images"),
    (["--sr", "nowhere", "--data", "{val}"], "nowhere does not exist"),
    (["--input", "{val}", "--output", "{file}"], "not a folder"),
    (["--input", "{val}", "--output", "{file}/sub"], "not a folder"),
    (["--input", "{val}", "--output", "a.png"], "is a folder: name a folder"),
    (["--input", "nowhere", "--output", "o"], "nowhere"),
    (["--input", "{picture}", "--output", "{picture}"], "exists already"),
    (["--input", "{file}", "--output", "o.png"], "file.txt"),
    (["--input", "{alpha}", "--output", "o.jpg"], "alpha"), (["--input", "{alpha}", "--output", "o.ppm"], "alpha")])
def test_wrong_words_of_evaluation(place, here, capfd, words, named):
    (here.parent / "empty").mkdir()
    (here.parent / "file.txt").write_text("text")
    save(noise(9, 9, 4), here.parent / "alpha.png")
    paths = dict(empty=here.parent / "empty", file=here.parent / "file.txt", val=place / "val",
                 picture=place / "val" / "good0.png",
                 alpha=here.parent / "alpha.png")
    assert named in refused(capfd, evaluate.main, [place / "x2.pt", *(w.format(**paths) for w in words)])
    assert not any(here.iterdir()) and sorted(p.name for p in here.parent.iterdir()) == ["alpha.png", "empty", "file.txt", "here"]
    assert data.read_picture(place / "val" / "good0.png").shape == (32, 36, 3)


def test_absurd_numbers_that_mean_something(place, here, capfd):
    """A tile larger than any picture is the whole picture; an existing table is replaced when asked for by name."""
    (here / "t.json").write_text("old")
    works(capfd, evaluate.main, [place / "x2.pt", "--data", place / "val", "--tile", 10**12, "--image", 0, "--json", "t.json"])
    assert "results" in json.loads((here / "t.json").read_text())


NUMBERS = [f.name for f in dataclasses.fields(train.Config) if f.type in (int, float)]
ODD = ("0", "-1", "nan", "inf", "-inf", "1e999", str(10**30), str(2**70), "1e30", "abc", "", "9" * 5000)
MAY_BE_0 = {"bench", "holdout", "ema", "seed", "lambda_rec", "lambda_kd", "lambda_dukd", "lambda_feature", "p", "ram", "val_every",
            "save_minutes", "stop_at"}


@pytest.mark.parametrize("name", NUMBERS)
def test_odd_numbers_are_refused_for_every_flag_of_training(place, here, capfd, name):
    for value in ODD:
        words = training(place, train.flag(name), value)
        if value == "0" and name in MAY_BE_0:
            assert works(capfd, train.main, words) == [] and (here / "run" / "student.pt").is_file()
            (here / "run").rename(here.parent / "done")
        else:
            assert train.flag(name) in refused(capfd, train.main, words), value
            assert not (here / "run").exists()


def test_the_machines_memory_bounds_what_is_kept_in_it(place, here, capfd, monkeypatch):
    monkeypatch.setattr(data, "machine_memory", lambda: 2 * 2**30)
    assert "--ram 3.0 is more than this machine has: 2 GiB" in refused(capfd, train.main, training(place, "--ram", 3))
    monkeypatch.setattr(data, "machine_memory", lambda: 30_000)
    line = refused(capfd, evaluate.main, [place / "x2.pt", "--input", place / "val", "--output", "big"])
    assert "good0.png, 36x32, would become 0 million pixels" in line


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."),
                                   OSError(28, "No space left on device", "x.csv"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")],
                                   ids=repr)
def test_full_memories_and_disks_are_one_line(place, here, capfd, monkeypatch, error):
    def fail(*a, **k):
        raise error
    monkeypatch.setattr(train, "loss_terms", fail)
    line = refused(capfd, train.main, training(place))
    assert "memory is full" in line or "x.csv cannot be read or written: No space left" in line


# ------------------------------------------------------------------------------------------------ without permission
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to become nobody")
def test_places_without_permission(place):
    """As nobody, in one process of its own: an unreadable folder and file, a read-only folder for every kind of output."""
    with tempfile.TemporaryDirectory() as base:
        base = Path(base)
        os.chmod(base, 0o755)
        for name in ("closed", "readonly", "home"):
            (base / name).mkdir()
        save(noise(32, 36, 3), base / "good0.png")
        save(noise(32, 36, 3), base / "closed" / "b.png")
        save(noise(32, 36, 3), base / "unreadable.png")
        (base / "x2.pt").write_bytes((place / "x2.pt").read_bytes())
        (base / "sealed.pt").write_bytes(b"x")
        (base / "readonly" / "old.json").write_text("old")
        for name, mode in (("closed", 0), ("unreadable.png", 0), ("sealed.pt", 0), ("readonly", 0o755), ("home", 0o777)):
            os.chmod(base / name, mode)
        common = training(place, data=base / "good0.png", val=base / "good0.png", teacher=base / "x2.pt")
        score = [base / "x2.pt", "--data", base / "good0.png"]
        cases = [("train", [*common, "--data", base / "closed"], "closed cannot be read: Permission"),
                 ("train", [*common, "--data", base / "closed" / "b.png"], "Permission"),
                 ("train", [*common, "--data", base / "unreadable.png"], "unreadable.png cannot be read: Permission"),
                 ("train", [*common, "--teacher", base / "sealed.pt"], "sealed.pt cannot be read: Permission"),
                 ("train", [*common, "--out", base / "readonly" / "run"], "readonly cannot be written to"),
                 ("train", [*common, "--ram", 0, "--cache", base / "readonly" / "cache"], "--cache"),
                 ("evaluate", [*score, "--json", base / "readonly" / "t.json"], "readonly cannot be written to"),
                 ("evaluate", [*score, "--json", base / "readonly" / "old.json"], "old.json cannot be written to"),
                 ("evaluate", [*score, "--figure", base / "readonly" / "f.png"], "readonly cannot be written to"),
                 ("evaluate", [base / "x2.pt", "--input", base / "good0.png", "--output", base / "readonly" / "o"],
                  "cannot be written to"),
                 ("evaluate", [base / "x2.pt", "--data", base / "closed"], "closed cannot be read: Permission")]
        whole = [("train", [*common, "--out", base / "whole"], ""), ("evaluate", score, "")]
        (base / "cases.json").write_text(json.dumps([(m, [str(w) for w in words]) for m, words, _ in whole + cases]))
        script = """
import json, os, sys
import evaluate, train
whole_training, whole_scoring, *cases = json.load(open("cases.json"))
train.main(whole_training[1])  # what Python loads late, nobody might not be allowed to read
evaluate.main(whole_scoring[1])
os.setgroups([]), os.setgid(65534), os.setuid(65534), os.chdir("home")
print("begin", file=sys.stderr)
for module, words in cases:
    try:
        dict(train=train, evaluate=evaluate)[module].main(words)
    except SystemExit as e:
        print("exit", e.code, file=sys.stderr)
print("end", file=sys.stderr)  # and not what torch tidies up after itself
"""
        done = subprocess.run([sys.executable, "-c", script], cwd=base, env={**os.environ, "PYTHONPATH": str(ROOT)},
                              capture_output=True, text=True)
        told = done.stderr.partition("begin\n")[2].partition("end\n")[0]
        lines = [line for line in re.split(r"[\r\n]+", told) if line.strip() and "%|" not in line]
        assert len(lines) == 2 * len(cases), done.stderr
        for (_, words, expected), line, code in zip(cases, lines[::2], lines[1::2]):
            assert line.startswith("error: ") and expected in line and code == "exit 2", (words, line)
        assert not any((base / "home").iterdir()) and (base / "readonly" / "old.json").read_text() == "old"


# ------------------------------------------------------------------------------------------------ strangers' checkpoints
def test_no_source_loads_more_than_data():
    """torch.load only with weights_only=True, and nothing else that could run what a file says."""
    loads = 0
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "os.system", "pickle.load", "pickle.loads", "np.load", "numpy.load",
                                "torch.jit.load",
                                "torch.hub.load", "yaml.load", "__import__", "marshal.loads"), (path.name, node.lineno)
            assert not any(k.arg in ("shell", "allow_pickle") for k in node.keywords), (path.name, node.lineno)
            if name == "torch.load":
                loads += 1
                assert any(k.arg == "weights_only" and k.value.value is True for k in node.keywords), (path.name, node.lineno)
    assert loads


class Hostile:
    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


@pytest.fixture
def stopped(place, here, capfd):
    """A run folder that can be gone on with, after one of two steps."""
    train.main(training(place, "--steps", 2, "--stop-at", 1, "--out", "run"))
    (here / "run" / "previous.ckpt").write_bytes((here / "run" / "last.ckpt").read_bytes())
    return here / "run"


@pytest.mark.parametrize("zipped", (True, False))
def test_no_command_runs_the_code_in_a_checkpoint(place, here, capfd, stopped, zipped):
    trap = {"step": 1, "params": models.build("edsr_c2b1", 2).state_dict(), "note": Hostile(open, str(here / "marker"), "w")}
    for name in ("hostile.pt", "run/last.ckpt"):
        torch.save(trap, here / name, _use_new_zipfile_serialization=zipped)
    for main, words in ((train.main, training(place, "--out", "new", "--teacher", "hostile.pt")),
                        (train.main, training(place, "--out", "new", "--init", "hostile.pt")),
                        (train.main, ["--resume", "--out", "run", "--stop-at", 0]),
                        (evaluate.main, ["hostile.pt", "--data", place / "val"])):
        line = refused(capfd, main, words)
        assert "wants to run code (" in line and "open)" in line and ("hostile.pt" in line or "last.ckpt" in line)
        assert not (here / "marker").exists() and not (here / "new").exists()
    torch.load(here / "hostile.pt", weights_only=False)["note"].close()  # the trap was a live one
    assert (here / "marker").exists()


def repacked(path, compression):
    """A checkpoint's parts in an archive that is compressed, say."""
    with zipfile.ZipFile(path) as old:
        parts = {i.filename: old.read(i) for i in old.infolist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in parts.items():
            new.writestr(name, content)


def zip_bomb(path):
    torch.save({"conv_first.weight": torch.zeros(30_000_000)}, path)
    repacked(path, zipfile.ZIP_DEFLATED)


def growing_pickle(path):
    """Two kilobytes that would double themselves thirty times."""
    text = Hostile(__import__("_codecs").encode, "a" * 1000, "latin1")
    for _ in range(30):
        text = Hostile(__import__("_codecs").encode, text, "hex_codec")
    torch.save({"params": {"conv_first.weight": torch.zeros(1)}, "note": text}, path)


def grown_network(path, c=20_000, **options):
    """A whole EDSR's entries, 29 GB as it declares them, each expanded from one number."""
    grown = {4: c, 16: 4 * c, 3: 3}
    state = models.build("edsr_c4b1", 2).state_dict()
    torch.save({k: torch.zeros(1).expand(*(grown[n] for n in v.shape)) for k, v in state.items()}, path, **options)


def shared_storage(path):
    weight = torch.zeros(500, 500)
    torch.save({f"body.{i}.conv1.weight": weight for i in range(5000)}, path)


def many_layers(path):
    """Two thousand names that spell one million layers."""
    part = "body.0.residual_group.0.rcab"
    state = {"conv_first.weight": torch.zeros(4, 3, 3, 3), "upsample.0.weight": torch.zeros(16, 4, 3, 3),
             f"{part}.0.weight": torch.zeros(4, 4, 3, 3),
             f"{part}.3.attention.1.weight": torch.zeros(1, 4, 1, 1)}
    torch.save(state | {k: torch.zeros(0) for i in range(1000) for k in (f"body.{i}.conv.weight",
                                                                         f"body.0.residual_group.{i}.x")}, path)


def wide_window(path):
    """A bias table of a megabyte whose table of positions would have 34 GB."""
    block = "layers.0.residual_group.blocks.0"
    torch.save({"conv_first.weight": torch.zeros(4, 3, 3, 3), "upsample.0.weight": torch.zeros(16, 4, 3, 3),
                f"{block}.attn.qkv.weight": torch.zeros(1),
                f"{block}.attn.relative_position_bias_table": torch.zeros(511**2, 1),
                f"{block}.mlp.fc1.weight": torch.zeros(8, 4)}, path)


def with_config(**config):
    return lambda path: torch.save({"params": models.build("edsr_c2b1", 2).state_dict(), "config": {"arch": "edsr"} | config},
                                   path)


def of_nan(path):
    torch.save({k: v * math.nan for k, v in models.build("edsr_c2b1", 2).state_dict().items()}, path)


def safetensors_header(edit=lambda header: None, length=None):
    """A .safetensors file of one tensor of 16 bytes, its header edited."""
    def make(path):
        header = {"conv_first.weight": dict(dtype="F32", shape=[4], data_offsets=[0, 16])}
        edit(header["conv_first.weight"])
        text = json.dumps(header).encode()
        path.write_bytes((length or len(text)).to_bytes(8, "little") + text + bytes(16))
    return make


HOSTILE = {
    "zip bomb.pt": (zip_bomb, "compressed"), "growing.pt": (growing_pickle, "_codecs.encode"),
    "expanded.pt": (grown_network, "more than the file"),
    "expanded legacy.pt": (lambda p: grown_network(p, _use_new_zipfile_serialization=False), "more than the file"),
    "shared.pt": (shared_storage, "more numbers than the file holds"), "layers.pt": (many_layers, "1000000 layers"),
    "window.pt": (wide_window, "window of 256"), "nan.pt": (of_nan, "NaN"),
    "text.pt": (with_config(res_scale="1"), "res_scale"), "nan res.pt": (with_config(res_scale=math.nan), "res_scale"),
    "large.pt": (with_config(res_scale=10**400), "res_scale"), "mean.pt": (with_config(mean=[0, 0, math.inf]), "mean"),
    "nested.pt": (with_config(mean=[[0], [0], [0]]), "mean"), "two colours.pt": (with_config(mean=[0, 0]), "three colours"),
    "range.pt": (with_config(img_range=0), "img_range"), "no range.pt": (with_config(img_range=None), "img_range"),
    "huge.safetensors": (safetensors_header(lambda t: t.update(shape=[10**12])), "not a whole"),
    "far.safetensors": (safetensors_header(lambda t: t.update(shape=[10**12], data_offsets=[0, 4 * 10**12])), "not a whole"),
    "header.safetensors": (safetensors_header(length=2**63), "not a whole"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_declared_sizes_are_checked_before_memory_is_taken(place, here, capfd, name):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    resource = pytest.importorskip("resource")
    make, words = HOSTILE[name]
    make(here.parent / name)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for main, command in ((evaluate.main, [here.parent / name, "--data", place / "val"]),
                          (train.main, training(place, teacher=here.parent / name))):
        line = refused(capfd, main, command)
        assert name in line and words in line
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024 and time.monotonic() - began < 5
    assert not any(here.iterdir())


def test_an_archive_whose_parts_lie_over_each_other_is_refused(here):
    """Its directory lists the one part a hundred times."""
    with zipfile.ZipFile(here / "over.pt", "w") as z:
        z.writestr("archive/data/0", bytes(10_000))
        z.filelist *= 100
    assert (here / "over.pt").stat().st_size < 20_000
    with pytest.raises(models.CheckpointError, match="holds less than it declares|not a whole checkpoint"):  # Python 3.13 looks too
        models.read_file(here / "over.pt")


# ------------------------------------------------------------------------------------------------ strangers' run folders
def edited_config(run, **changes):
    about = json.loads((run / "config.json").read_text())
    about["config"].update(changes)
    (run / "config.json").write_text(json.dumps(about))


@pytest.mark.parametrize("changes, named", [
    (dict(steps=10**30), "--steps"), (dict(steps="many"), "steps"), (dict(steps=2.5), "steps"), (dict(steps=True), "steps"),
    (dict(steps=None), "steps"), (dict(batch=10**9), "--batch"), (dict(lr=math.nan), "--lr"), (dict(lr=math.inf), "--lr"),
    (dict(lr="1"), "lr"),
    (dict(ram=10**400), "--ram"), (dict(seed=-1), "--seed"), (dict(scale=5), "scale"), (dict(scale=[2]), "scale"),
    (dict(scale=4), "x4"),
    (dict(method="abc"), "method"), (dict(method=["dukd"]), "method"), (dict(ops="hflip"), "ops"),
    (dict(ops=["hflip", 3]), "ops"),
    (dict(ops=["rotate"]), "ops"), (dict(data="folder"), "data"), (dict(data=[None]), "data"), (dict(data=["a\0b"]), "data"),
    (dict(data=["nowhere"]), "nowhere"), (dict(teacher=7), "teacher"), (dict(teacher="nowhere"), "nowhere"),
    (dict(student="../x"), "../x"),
    (dict(student={}), "student"), (dict(zoom_in="no"), "zoom_in"), (dict(zoom_in=1), "zoom_in"),
    (dict(skip_bad="x"), "skip_bad"),
    (dict(device="abacus"), "abacus"), (dict(unknown=3), "config.json"), (dict(lambda_rec=-1), "--lambda-rec")], ids=str)
def test_a_runs_config_is_checked_when_it_is_gone_on_with(capfd, here, stopped, changes, named):
    edited_config(stopped, **changes)
    before = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}
    assert named in refused(capfd, train.main, ["--resume", "--out", "run", "--stop-at", 0])
    assert before == {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"config": 3}', '{"config": {"steps": ' + "9" * 5000 + "}}",
                                     "[" * 50_000, "\0", "{}"])
def test_a_config_that_is_none_is_named(capfd, here, stopped, content):
    (stopped / "config.json").write_text(content)
    assert "config.json" in refused(capfd, train.main, ["--resume", "--out", "run"])


@pytest.mark.parametrize("edit", [
    lambda s: s.clear(), lambda s: s.pop("ema"), lambda s: s.update(step=10**9), lambda s: s.update(step="x"),
    lambda s: s.update(best=None),
    lambda s: s.update(sums=3), lambda s: s.update(generator=torch.zeros(3)),
    lambda s: s.update(random=torch.zeros(5, dtype=torch.uint8)),
    lambda s: s["student"].popitem(), lambda s: s["student"].update({"conv_first.weight": torch.zeros(9)}),
    lambda s: s.update(student=[1]),
    lambda s: s["optimizer"].clear(), lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(10**4)),
    lambda s: s["optimizer"]["state"].update({0: {}})], ids=range(14))
def test_a_checkpoint_of_another_run_is_named(capfd, here, stopped, edit):
    state = torch.load(stopped / "last.ckpt", weights_only=True)
    edit(state)
    torch.save(state, stopped / "last.ckpt")
    (stopped / "previous.ckpt").unlink(missing_ok=True)  # else it would serve
    line = refused(capfd, train.main, ["--resume", "--out", "run", "--stop-at", 0])
    assert "last.ckpt holds no state of this run" in line


def test_the_optimizers_own_settings_come_from_the_run(capfd, here, stopped):
    """A file that says maximize would train backwards."""
    state = torch.load(stopped / "last.ckpt", weights_only=True)
    train.main(["--resume", "--out", "run", "--stop-at", "0"])
    expected = torch.load(stopped / "last.ckpt", weights_only=True)["student"]
    state["optimizer"]["param_groups"][0] |= dict(maximize=True, weight_decay=9.0, betas=("a", None))
    torch.save(state, stopped / "last.ckpt")
    train.main(["--resume", "--out", "run", "--stop-at", "0"])
    got = torch.load(stopped / "last.ckpt", weights_only=True)["student"]
    assert all(torch.equal(expected[k], got[k]) for k in expected)


@pytest.mark.parametrize("content", [b"step,lr\n", b"\0\0", b"\xff\xfe", b"x,1,2,3,4,5,6,7,8\n" * 3, None])
def test_a_broken_log_is_named_or_begun_again(capfd, here, stopped, content):
    (stopped / "log.csv").unlink() if content is None else (stopped / "log.csv").write_bytes(content)
    try:
        train.main(["--resume", "--out", "run", "--stop-at", "0"])
    except SystemExit as stop:
        assert stop.code == 2 and "log.csv" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------ strangers' caches
@pytest.fixture
def cached(here):
    """A cached store of two pictures, and how to open it."""
    paths = [save(noise(16, 20, 3, seed=i), here.parent / f"{i}.png") for i in range(2)]
    store = data.build_store(paths, [None] * 2, 2, 4, 0, here / "cache")
    return store.file, lambda: data.build_store(paths, [None] * 2, 2, 4, 0, here / "cache")


@pytest.mark.parametrize("edit", [
    lambda i: i["hr"][0].__setitem__(0, 10**6), lambda i: i["hr"][1].__setitem__(0, -1),
    lambda i: i["lr"][0].__setitem__(0, 2**62),
    lambda i: i["lr"][0].__setitem__(1, 10**6), lambda i: i["hr"][0].__setitem__(1, 10**6),
    lambda i: i["hr"][0].__setitem__(2, 2**62),
    lambda i: i["lr"][1].__setitem__(2, 0), lambda i: i["lr"][1].__setitem__(1, -8), lambda i: i["lr"][1].__setitem__(1, 3),
    lambda i: i["lr"][1].__setitem__(1, 8.0), lambda i: i["lr"][1].__setitem__(1, True),
    lambda i: i["lr"][1].__setitem__(1, 10**30),
    lambda i: i.update(hr=i["lr"]), lambda i: i.update(lr=i["hr"]), lambda i: i.update(names=["a"]),
    lambda i: i.update(names="ab"),
    lambda i: i.update(names=[], hr=[], lr=[]), lambda i: i.update(hr=None), lambda i: i.update(bytes=10**15),
    lambda i: i.update(bytes="x"),
    lambda i: i.clear(), lambda i: i["hr"].append([0, 16, 20]),
    lambda i: [i[k][1].__setitem__(1, n) for k, n in (("lr", 3), ("hr", 6))],  # smaller than a patch
    lambda i: [i[k][1].__setitem__(1, n) for k, n in (("lr", -8), ("hr", -16))]], ids=range(24))
def test_a_caches_index_that_leads_outside_its_pixels_is_built_again(cached, edit):
    file, again = cached
    whole = again()
    index = json.loads(file.with_suffix(".json").read_text())
    edit(index)
    file.with_suffix(".json").write_text(json.dumps(index))
    assert data.open_store(file, 2, 4) is None
    store = again()
    assert torch.equal(store.hr, whole.hr) and torch.equal(store.lr, whole.lr) and torch.equal(store.pixels, whole.pixels)


# ------------------------------------------------------------------------------------------------ fuzz
EDITS = st.lists(st.tuples(st.sampled_from(["flip", "flip", "cut", "insert", "end"]), st.integers(0, 10**6),
                           st.integers(1, 255)), min_size=1, max_size=4)
FORMATS = {"a.png": {}, "a.jpg": {}, "b.jpg": dict(progressive=True, exif=exif(6)), "a.gif": {}, "a.bmp": {}, "a.tif": {},
           "b.tif": dict(compression="tiff_lzw"), "a.webp": {}, "a.ppm": {}, "p.png": {}}


@pytest.mark.filterwarnings("ignore")  # pytest brings back Pillow's remarks
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_picture_is_read_or_refused(tmp_path, name):
    """Never another exception, and never an array that is no picture."""
    image = Image.fromarray(noise(12, 14, 3))
    whole = save(image.quantize(8) if name[0] == "p" else image, tmp_path / name, **FORMATS[name]).read_bytes()

    @hypothesis.settings(max_examples=60, **QUICK)
    @hypothesis.given(EDITS, st.booleans())
    def check(edits, in_header):
        edits = [(what, at % 64 if in_header else at, value) for what, at, value in edits]
        (tmp_path / name).write_bytes(damaged(whole, edits))
        try:
            picture = data.read_picture(tmp_path / name)
        except data.DataError as e:
            assert name in str(e) and str(e).isprintable()
        else:
            assert picture.dtype == np.uint8 and picture.ndim == 3 and 1 <= picture.shape[2] <= 4 and picture.size
    check()


def test_a_jpeg_cut_anywhere_is_refused_not_half_grey(tmp_path):
    for options in (dict(quality=60), dict(quality=60, progressive=True)):
        whole = save(noise(24, 24, 3), tmp_path / "a.jpg", **options).read_bytes()
        for n in range(1, len(whole), 7):
            (tmp_path / "a.jpg").write_bytes(whole[:n])
            with pytest.raises(data.DataError):
                data.read_picture(tmp_path / "a.jpg")


def test_a_damaged_run_goes_on_or_is_refused(capfd, here, stopped):
    """Its config, its checkpoint and its log, damaged byte by byte: one line, a warning and the checkpoint before, or a run."""
    originals = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}

    @hypothesis.settings(max_examples=30, **QUICK)
    @hypothesis.given(st.sampled_from(["config.json", "last.ckpt", "log.csv"]), EDITS)
    def check(name, edits):
        for p, content in originals.items():
            p.write_bytes(content)
        (stopped / name).write_bytes(damaged(originals[stopped / name], edits))
        try:
            train.main(["--resume", "--out", "run", "--stop-at", "1"])
        except SystemExit as stop:
            assert stop.code == 2
    check()


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
                    lambda x: st.lists(x, max_size=3), max_leaves=5)


def test_a_config_with_anything_in_it_is_read_or_refused(here, stopped):
    original = json.loads((stopped / "config.json").read_text())

    @hypothesis.settings(max_examples=150, **QUICK)
    @hypothesis.given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(train.Config)]), JSON, min_size=1,
                                      max_size=3))
    def check(changes):
        (stopped / "config.json").write_text(json.dumps(dict(config={**original["config"], **changes})))
        with contextlib.suppress(train.ConfigError):
            c = train.parse(["--resume", "--out", "run"])
            assert all(isinstance(getattr(c, n), (int, float, type(None))) for n in NUMBERS)
            train.check(dataclasses.replace(c, scale=c.scale or 4), 1)
    check()


def test_an_index_with_anything_in_it_never_leads_outside(cached):
    """Whatever numbers it holds, patches drawn from it lie inside the pixels."""
    file, _ = cached
    index = json.loads(file.with_suffix(".json").read_text())
    numbers = st.integers(-1, 30) | st.integers(-2**65, 2**65)

    @hypothesis.settings(max_examples=150, **QUICK)
    @hypothesis.given(st.sampled_from(["hr", "lr"]), st.integers(0, 1), st.integers(0, 2), numbers)
    def check(table, i, column, value):
        new = json.loads(json.dumps(index))
        new[table][i][column] = value
        file.with_suffix(".json").write_text(json.dumps(new))
        if (store := data.open_store(file, 2, 4)) is not None:
            patches = data.Patches(store, 4, 2)
            patches.fetch(patches.draw(50, torch.Generator().manual_seed(0)))
    check()


# ------------------------------------------------------------------------------------------------ properties
@hypothesis.settings(max_examples=60, **QUICK)
@hypothesis.given(h=st.integers(1, 40), w=st.integers(1, 40), p=st.integers(1, 9), q=st.integers(1, 9), value=st.integers(0, 255))
def test_resizing_weights_are_a_partition_of_unity_and_constants_stay(h, w, p, q, value):
    weights, index = dukd.bicubic_taps(h, p / q)
    assert torch.allclose(weights.sum(1), torch.ones(len(weights), dtype=weights.dtype), atol=1e-12)
    assert index.min() >= 0 and index.max() < h
    out = data.imresize(np.full((h, w, 3), value, np.uint8), p / q)
    assert out.shape == (-(-h * p // q), -(-w * p // q), 3) and (out == value).all()
    floats = data.imresize(torch.full((1, h, w), value / 255), p / q)
    assert (floats - value / 255).abs().max() < 1e-5


@hypothesis.settings(max_examples=40, **QUICK)
@hypothesis.given(h=st.integers(1, 30), w=st.integers(1, 30), border=st.integers(0, 4), spread=st.integers(0, 255),
                  seed=st.integers(0, 999))
def test_the_metrics_agree_with_scikit_image(h, w, border, spread, seed):
    h, w = h + 11 + 2 * border - 1, w + 11 + 2 * border - 1
    rng = np.random.default_rng(seed)
    hr = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
    sr = np.clip(hr + rng.integers(-spread, spread + 1, hr.shape), 0, 255).astype(np.uint8)
    luma = lambda image: skimage.color.rgb2ycbcr(image)[..., 0][border:h - border, border:w - border]
    with np.errstate(divide="ignore"):
        psnr = skimage.metrics.peak_signal_noise_ratio(luma(hr), luma(sr), data_range=255)
    ssim = skimage.metrics.structural_similarity(luma(hr), luma(sr), data_range=255, gaussian_weights=True, sigma=1.5,
                                                 use_sample_covariance=False)
    assert evaluate.psnr_y(sr, hr, border) == pytest.approx(psnr, abs=1e-6)
    assert evaluate.ssim_y(sr, hr, border) == pytest.approx(ssim, abs=1e-6)
