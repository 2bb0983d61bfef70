"""data.py: MATLAB's imresize against exact fractions, picture files good and bad, the cache, the patches."""
import functools
import gc
import math
import multiprocessing
import os
import signal
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image  # imageio brings it

import data
import models
from samples import cut, noise, raises, save

RGB = noise(6, 8, 3, seed=11)
refused = functools.partial(raises, models.InputError)


def cubic(d):
    """The cubic kernel, a = −1/2, of a fraction."""
    d = abs(d)
    if d <= 1:
        return Fraction(3, 2) * d**3 - Fraction(5, 2) * d**2 + 1
    return -Fraction(1, 2) * d**3 + Fraction(5, 2) * d**2 - 4 * d + 2 if d <= 2 else Fraction(0)


def exact_imresize(image, factor):
    """MATLAB on uint8, in fractions: the rows, rounded, then the columns, rounded again; halves upwards."""
    half_up = np.frompyfunc(lambda v: math.floor(min(max(v, 0), 255) + Fraction(1, 2)), 1, 1)
    stretch = min(factor, Fraction(1))
    for _ in range(2):
        n, out = len(image), []
        for x in range(1, math.ceil(n * factor) + 1):
            u = x / factor + (1 - 1 / factor) / 2
            near = range(math.ceil(u - 2 / stretch), math.floor(u + 2 / stretch) + 1)
            weights = [cubic((u - i) * stretch) for i in near]
            mirrored = [(i - 1) % (2 * n) for i in near]  # symmetric edges: …, n−2, n−1, n−1, n−2, …
            lines = [image[i if i < n else 2 * n - 1 - i].astype(object) for i in mirrored]
            out.append(sum(w / sum(weights) * line for w, line in zip(weights, lines)))
        image = half_up(np.array(out, dtype=object)).astype(np.uint8).swapaxes(0, 1)
    return image


@pytest.mark.parametrize("factor", [*map(Fraction, ("1/2", "1/3", "1/4", "1/8", "2", "3", "4"))], ids=str)
def test_imresize_is_bit_exact_at_any_size(factor):
    """At these factors a sum is a half, which floats hold exactly, or at least 1/162 away from one. So
    fractions and MATLAB's double arithmetic agree on every value."""
    random = np.random.default_rng(int(100 * factor))
    shapes = [(1, 1), (1, 11, 3), (10, 1), (8, 5, 1), (3, 130)]  # the last one takes two strips
    shapes += [(*random.integers(2, 14, 2), 3) for _ in range(6)]
    for seed, shape in enumerate(shapes):
        image = noise(*shape, seed=seed)
        image = image if seed % 2 else np.where(image < 128, 0, 255).astype(np.uint8)
        out = data.imresize(image, float(factor))
        assert out.dtype == np.uint8 and np.array_equal(out, exact_imresize(image, factor)), shape


def test_imresize_by_hand_and_of_views_and_float_tensors_but_of_nothing_else():
    """At 1/2, the weights are (−3, −9, 29, 111, 111, 29, −9, −3)/256. uint8 is rounded and clipped."""
    step = np.repeat(np.uint8([0, 255]), 4)[None]
    assert data.imresize(step, 0.5).tolist() == [[0, 17, 238, 255]]
    floats = torch.tensor(step / 255).repeat(2, 1)
    assert torch.allclose(data.imresize(floats, 0.5), torch.tensor([[-3, 17, 239, 259]]).double() / 256)
    with pytest.raises(TypeError, match="uint8 arrays and float tensors"):
        data.imresize(step / 255, 2)
    image = noise(8, 12, 3)
    view, kept = image[::-1, ::2], image.copy()
    assert np.array_equal(data.imresize(view, 0.5), data.imresize(view.copy(), 0.5))
    assert np.array_equal(data.imresize(image, 1), image) and np.array_equal(image, kept)


@pytest.mark.parametrize("name, mode, options", [
    *(("a.png", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
    *((name, "RGB", {}) for name in ("a.bmp", "a.tif", "a.ppm", "a.TIFF")),
    ("clear.png", "P", dict(transparency=b"\0\x80\xff\7")), ("a.jp2", "RGB", dict(irreversible=False)),
    ("a.tif", "LAB", {}), ("a.jpg", "CMYK", dict(quality=100))])
def test_pictures_are_read_as_rgb(tmp_path, name, mode, options, capsys):
    """Alpha is left out with a note: the colours under it stay. Grey is repeated, palettes are resolved."""
    data.NOTES.clear()
    picture = Image.fromarray(RGB).convert(mode)
    if mode[-1] == "A":
        picture.putalpha(Image.fromarray(noise(6, 8, seed=5)))
    path = save(picture, tmp_path / name, **options)
    colours = np.asarray(picture.convert("RGBA"))[..., :3]
    image = data.read_image(str(path))
    assert image.shape == (6, 8, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - colours).max() <= (3 if name == "a.jpg" else 0)  # which is lossy
    assert ("transparency is left out" in capsys.readouterr().err) == (mode[-1] == "A" or name == "clear.png")


@pytest.mark.parametrize("orientation, turn", [(2, np.fliplr), (3, np.flip), (4, np.flipud), (6, np.rot90)])
@pytest.mark.parametrize("mode", ("RGB", "L"))
def test_a_telephones_jpeg_is_read_upright_without_its_preview(tmp_path, orientation, turn, mode):
    """Orientation 6, a portrait, is stored turned anticlockwise. MPO is a JPEG with further pictures."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8], upright[8:, :8] = 255, 128  # bright top left, grey bottom left
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(turn(upright))
    more = dict(format="MPO", save_all=True, append_images=[Image.fromarray(RGB)], exif=exif, subsampling=0)
    image = data.read_image(save(stored, tmp_path / "a.jpg", mode, quality=95, **more))
    assert image.shape == upright.shape and np.abs(image.astype(int) - upright).max() < 12


def test_a_picture_of_182_megapixels_is_read(tmp_path):
    path = save(Image.new("L", (13500, 13500), 7), tmp_path / "a.png", compress_level=1)
    picture = data.read_image(path)
    assert picture.shape == (13500, 13500, 3) and (picture[::999, ::999] == 7).all()


PNG_OF_16_BITS = bytes.fromhex(  # a black pixel in RGB; Pillow writes none
    "89504e470d0a1a0a0000000d4948445200000001000000011002000000c0e78f9d"
    "0000000b49444154789c636000030000070001b286acf40000000049454e44ae426082")


@pytest.mark.parametrize("name, make, words", [
    *((name, lambda p: save(RGB, p, save_all=True, append_images=[Image.fromarray(255 - RGB)]), "2 frames")
      for name in ("animated.gif", "animated.png")),
    ("grey.png", lambda p: save(noise(4, 4).astype(np.uint16) * 16, p), "-depth 8"),
    ("grey.tif", lambda p: save(noise(4, 4).astype(np.uint16) * 257, p), "more than 8 bits a value"),
    ("colour.png", lambda p: p.write_bytes(PNG_OF_16_BITS), "more than 8 bits a value; convert it: magick"),
    ("colour.ppm", lambda p: p.write_bytes(b"P6 4 4 4095\n" + bytes(96)), "more than 8 bits a value"),
    ("float.tif", lambda p: save(np.full((4, 4), 0.5, np.float32), p), "more than 8 bits"),
    ("int.tif", lambda p: save(np.full((4, 4), 7, np.int32), p), "more than 8 bits"),
    ("zero.png", lambda p: p.write_bytes(b""), "not a readable image"),
    ("address.png", lambda p: p.write_text("https://example.com/picture.png"), "not a readable image"),
    ("cut.png", lambda p: cut(p, 0.97), "truncated"), ("cut.jpg", lambda p: cut(p, 0.5), "truncated"),
    ("start.jpg", lambda p: cut(p, 0.01), "not a readable image"),
    ("zeros.png", lambda p: p.write_bytes(save(RGB, p).read_bytes()[:60] + bytes(99)), "not a readable"),
    ("missing.png", lambda p: None, "missing"), ("folder.png", lambda p: p.mkdir(), "not a file"),
    ("pipe.png", lambda p: os.mkfifo(p), "not a file")])  # it would be waited for
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path, name, make, words, recwarn):
    make(tmp_path / name)
    refused(lambda: data.read_image(tmp_path / name), tmp_path / name, words)
    assert not recwarn.list


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def test_find_images_sorts_folders_and_says_once_what_it_leaves_out(tmp_path, capsys):
    a = touch(tmp_path / "a", "2.png", "1.JPG", "notes.txt", ".hidden.png", "f.npy")
    b = touch(tmp_path / "b", "0.Tiff", "odd.dat", ".hidden")
    touch(a / "folder.png", "inside.png")
    for _ in range(2):
        found = data.find_images([str(b / "odd.dat"), a, b])
        assert found == [b / "odd.dat", a / "1.JPG", a / "2.png", b / "0.Tiff"]
    text = "note: {} others in {} are left out, such as {}\n"
    assert capsys.readouterr().err == text.format(3, a, "f.npy") + text.format(1, b, "odd.dat")
    empty, missing = touch(tmp_path / "empty", "readme.txt", ".hidden.png"), tmp_path / "3.png"
    refused(lambda: data.find_images([a, empty]), f"{empty} has no images")
    refused(lambda: data.find_images([a, missing]), f"{missing} does not exist")


@pytest.mark.parametrize("first, second", [
    ("img_001_SRF_4_HR.png", "img_001_SRF_4_LR.png"),  # SelfExSR's
    ("Canon_001_HR.png", "Canon_001_LR4.png"),  # RealSR's
    ("a_HR_x4.png", "a_LRBI_x4.png"), ("a_hr.png", "a_lr.png"), ("baby.png", "babyx4.png"),
    ("a.png", "a_x4_LR.png"), ("b_x4_HR.png", "b_x4_SR.png"), ("0801.png", "0801x4.png"),
    ("a.png", "a_x2.png"), ("a.bmp", "a.png")])
def test_lr_beside_hr_is_refused(tmp_path, first, second):
    folder = touch(tmp_path / "a", "before.png", first, second)
    refused(lambda: data.find_hr([folder]), folder / first, folder / second, "keep HR in a folder")
    assert len(data.find_images([folder])) == 3  # to upscale them


def test_other_names_and_folders_are_other_pictures(tmp_path):
    """Also 20,000 of them, as sub-images of DIV2K. Searching the list of names for each name took hours."""
    names = ["0001.png", "0002.png", "sea.png", "sea_shore.png", "x2.png", "HR.png", "a_LRT.png", "ax4b.png",
             "fox1.png", "fox2.png", "box2_HR.png", "box3_HR.png",
             "P1_x4.png", "P1_x1.png", "scene_y0_x1.png", "scene_y0_x2.png", "0x1.png", "0x2.png",
             "r0-x1.png", "r0-x2.png", "paper_2x3.png", "paper_2x4.png"]  # tiles
    a, b = touch(tmp_path / "a", *names), touch(tmp_path / "b", "0001.png", "0002x4.png")
    touch(b, *(f"{i:05}.png" for i in range(20_000)))
    began = time.process_time()
    assert len(data.find_hr([a, b])) == len(names) + 2 + 20_000
    assert time.process_time() - began < 10


def test_a_file_in_several_places_is_found_once_and_a_dangling_link_is_named(tmp_path, monkeypatch, capsys):
    """Content stores make links to one file. They are counted in a note."""
    a, b = touch(tmp_path / "a", "1.png", "2.png"), touch(tmp_path / "b", "0.png")
    (b / "3.png").symlink_to(a / "2.png")
    monkeypatch.chdir(tmp_path)
    assert data.find_images([b / "0.png", a, "a", b, a / "1.png"]) == [b / "0.png", a / "1.png", a / "2.png"]
    for name in ("3.png", "4.png"):
        (a / name).symlink_to(a / "1.png")
    assert len(data.find_images([a])) == 2
    assert "note: 2 pictures are left out, as they are the files of others" in capsys.readouterr().err
    (a / "2.png").unlink()
    refused(lambda: data.find_images([b]), f"{b / '3.png'} does not exist, or is a link")


def test_pictures_of_one_colour_are_not_scored(tmp_path, capsys):
    paths = [save(noise(16, 16, 3), tmp_path / "a.png")]
    paths += [save(np.full((16, 16, 3), level, np.uint8), tmp_path / f"{level}.png") for level in (0, 128)]
    assert [path for path, *_ in data.read_all(paths, 4)] == paths[:1]
    printed = capsys.readouterr().err
    assert all(f"note: {path} is of one colour, and is not scored" in printed for path in paths[1:3])
    refused(lambda: data.read_all(paths[1:], 4), f"{paths[1]} is of one colour")
    assert len(data.Patches(paths, 2, 4, 1, 0, None).paths) == 3  # they may be trained on


def test_threads_may_have_notes_while_a_bar_is_made(capsys):
    """tqdm knows a bar before the bar has its attributes."""
    bar = data.tqdm.__new__(data.tqdm)
    assert data.for_each(range(8), lambda number: data.note("once")) == [None] * 8
    assert capsys.readouterr().err.count("note: once") == 1
    bar.disable = True  # there is nothing to close


def test_the_embedded_photographs():
    train, held_out = data.find_images(data.TRAIN), data.find_images(data.VAL)
    assert len(train) == 10 and len(held_out) == 3 and not set(train) & set(held_out)
    assert all(min(data.read_image(path).shape[:2]) >= 48 * 4 for path in train + held_out)


def test_a_pair_is_cropped_at_the_bottom_and_right_and_is_made_anew_for_another_picture(tmp_path):
    """Also where its size and its time of modification are as before, as after `cp -p` or rsync."""
    image, cache = noise(13, 10, 3), tmp_path / "new" / "cache"  # of all scales
    path = save(image, tmp_path / "a.bmp")
    for s, h, w in [(2, 6, 5), (3, 4, 3), (4, 3, 2)]:
        for folder in (None, cache, cache):  # made, and found
            lr, hr = data.read_pair(path, s, cache=folder)
            assert np.array_equal(hr, image[:h * s, :w * s])
            assert np.array_equal(lr, exact_imresize(image[:h * s, :w * s], Fraction(1, s)))
        assert not hr.flags.writeable  # it is mapped
    times = os.stat(path)
    time.sleep(0.05)  # a tick of a file's times
    save(image[::-1], path)
    if os.name != "nt":  # whose st_ctime is the time of creation
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert np.array_equal(data.read_pair(path, 2, cache=cache)[1], image[::-1][:12])


def test_small_pictures_are_named_all_at_once(tmp_path):
    """Also where they are in the cache already, for other patches."""
    shapes = [(12, 8), (30, 30), (3, 20), (40, 11)]
    paths = [save(noise(*shape, 3), tmp_path / f"{i}.png") for i, shape in enumerate(shapes)]
    named = [f"{paths[i]} is too small: its LR is {size}, and 3x3 or more"
             for i, size in ((0, "2x3"), (2, "5x0"), (3, "2x10"))]
    refused(lambda: data.read_all(paths, 4, 3), *named)
    assert [hr.shape for _, _, hr in data.read_all(paths[1:2], 4, 3)] == [(28, 28, 3)]
    for path in paths:
        data.read_pair(path, 4, 0, tmp_path / "cache")
    refused(lambda: data.Patches(paths, 3, 4, 1, 0, tmp_path / "cache"), *named)


@pytest.fixture
def patches(tmp_path):
    """The patches of twelve files at x2, by way of a cache or of none."""
    shapes = [(9, 12), (8, 8), (17, 10), (8, 31)] * 3
    files = [save(noise(*shape, 3, seed=i), tmp_path / f"{i}.png") for i, shape in enumerate(shapes)]
    return lambda cache=tmp_path / "cache": data.Patches(files, 4, 2, 32, 0, cache)


def same_patches(one, other):
    return all(map(torch.equal, one[0], other[0]))


def test_pictures_are_decoded_once_and_mapped_when_they_are_drawn(tmp_path, patches, monkeypatch):
    """What is drawn is what decoding gives. Few files are open, however many pictures there are.
    In threads, Python 3.11 may fail to parse a cache file. It is made anew then."""
    def fails(*words, **more):
        raise SystemError("AST constructor recursion depth mismatch")
    expected = [patches(None)[0]]
    maps = Path("/proc/self/maps")  # on Linux
    first = patches()
    if maps.exists():
        gc.collect()
        assert str(tmp_path) not in maps.read_text()  # none is open before the first draw
    assert len(list(tmp_path.glob("cache/*.npy"))) == len(list(tmp_path.glob("cache/*"))) == 24
    with monkeypatch.context() as context:
        context.delattr(data, "read_image")  # nothing can be decoded
        second = patches()
        assert same_patches(first, expected) and same_patches(second, expected)
    assert first.read.cache_info().maxsize * 2 < 200  # macOS gives a process 256 file descriptors
    monkeypatch.setattr(np.lib.format, "open_memmap", fails)
    assert same_patches(patches(), expected)


@pytest.mark.parametrize("damage", [
    lambda file: file.unlink(), lambda file: file.write_bytes(b""), lambda file: os.truncate(file, 140),
    lambda file: file.write_bytes(b"PK\3\4" + bytes(300)), lambda file: file.write_bytes(bytes(900))])
def test_a_damaged_cache_is_made_anew_at_the_start_and_at_the_draw(tmp_path, patches, damage):
    expected, begun = patches(None), patches()
    for start in (patches, lambda: begun):
        for file in tmp_path.glob("cache/*"):
            damage(file)
        assert same_patches(start(), expected)


def test_a_bad_image_or_a_full_disk_is_named_and_leaves_no_half_file(tmp_path, patches, monkeypatch):
    def full(*names):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as context:
        context.setattr(os, "replace", full)
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'cache'}"):
            patches()
    assert not list(tmp_path.glob("cache/*"))
    for name in ("8.png", "9.png"):
        (tmp_path / name).write_text("no image")
    refused(patches, tmp_path / "8.png", tmp_path / "9.png")
    assert len(list(tmp_path.glob("cache/*.npy"))) == len(list(tmp_path.glob("cache/*"))) == 20


def test_processes_may_be_killed_while_they_write_or_decode_at_once(tmp_path, patches, monkeypatch):
    """No half-written file is taken for whole."""
    fork = multiprocessing.get_context("fork").Process
    with monkeypatch.context() as context:
        context.setattr(os, "replace", lambda *names: os.kill(os.getpid(), signal.SIGKILL))
        killed = fork(target=patches)
        killed.start()
        killed.join()
    assert killed.exitcode == -signal.SIGKILL and list(tmp_path.glob("cache/.*"))
    processes = [fork(target=patches), fork(target=patches)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert same_patches(patches(), patches(None))


def coded(monkeypatch, shapes, s):
    """The paths 0, 1, … of pictures whose pixels are (row, column, image); in HR, images count from 128."""
    def picture(h, w, code):
        return np.stack([*np.indices((h, w)), np.full((h, w), code)], axis=2).astype(np.uint8)
    found = [(picture(h, w, i), picture(s * h, s * w, 128 + i)) for i, (h, w) in enumerate(shapes)]
    monkeypatch.setattr(data, "read_pair", lambda path, **settings: found[path])
    return range(len(found))


@pytest.mark.parametrize("patch, s", [(1, 2), (4, 2), (4, 3), (4, 4)])
def test_patches_are_aligned_and_uniform_over_images_positions_and_turns(monkeypatch, patch, s):
    """Every position comes up, the edges included, and none beyond; so does each of the eight turns."""
    shapes = [(patch, patch), (patch + 2, patch + 1), (patch, patch + 5), (patch + 4, patch + 4)]
    lr, hr = data.Patches(coded(monkeypatch, shapes, s), patch, s, 12_000, 8, None)[0]
    assert lr.dtype == hr.dtype == torch.float32 and lr.shape == (12_000, 3, patch, patch)
    lr, hr = (lr * 255).round().int(), (hr * 255).round().int()  # (n,3,h,w): row, column, image
    rows, columns = (hr[:, i] // s for i in (0, 1))
    assert torch.equal(rows[:, ::s, ::s], lr[:, 0]) and torch.equal(columns[:, ::s, ::s], lr[:, 1])
    image = lr[:, 2:, :1, :1]
    assert (lr[:, 2:] == image).all() and (hr[:, 2:] == 128 + image).all()
    corner = lr[:, :2].flatten(2).amin(2)
    for i, (h, w) in enumerate(shapes):
        tops, lefts = corner[image.flatten() == i].T
        cells = (h - patch + 1) * (w - patch + 1)
        counts = np.bincount(tops * (w - patch + 1) + lefts, minlength=cells)
        assert len(counts) == cells and lefts.max() == w - patch
        assert np.abs(counts - 3000 / cells).max() < 6 * math.sqrt(3000 / cells)
    turned = hr[:, :2] - hr[:, :2].flatten(2).amin(2)[..., None, None]
    turns, counts = turned.flatten(1).unique(dim=0, return_counts=True)
    assert len(turns) == 8 and (counts - 1500).abs().max() < 6 * math.sqrt(1500)


@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))))
def test_seed_and_step_alone_decide_the_patches_and_processes_share_them(monkeypatch, device):
    """Nothing synchronises with a GPU. It may compute x/255 as x·(1/255), which is off in the last bit."""
    paths = coded(monkeypatch, [(20, 20), (15, 30)], 2)

    def patches(seed=1, **share):
        return data.Patches(paths, 4, 2, 6, seed, None, **share)
    before = torch.get_rng_state()
    there = patches(device=device)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = there[7]
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(before, torch.get_rng_state())
    for x, again, other, later in zip(drawn, patches()[7], patches(seed=2)[7], patches()[8]):
        assert torch.allclose(x.cpu(), again, rtol=0, atol=1e-7)
        assert not torch.allclose(again, other) and not torch.allclose(again, later)
    parts = [patches(rank=rank, world=3)[7] for rank in range(3)]
    for whole, share in zip(patches()[7], zip(*parts)):
        assert torch.equal(whole, torch.cat(share)) and len(share[0]) == 2
