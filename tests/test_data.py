"""Tests of data.py: MATLAB's imresize against exact fractions, picture files good and bad, LR/HR pairs, the
store in memory, on disk and found again, and the patches drawn from it."""
import math
import multiprocessing
import os
import signal
import struct
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image  # imageio brings it

import data
from samples import cut, noise, save

RGB = noise(6, 8, 3, seed=11)
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # a mapped store


def refused(call, *words):
    """The call raises a DataError of one line, which has these words."""
    with pytest.raises(data.DataError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


def cubic(d):
    """The cubic kernel, a = −1/2, of a fraction."""
    d = abs(d)
    if d <= 1:
        return Fraction(3, 2) * d**3 - Fraction(5, 2) * d**2 + 1
    return -Fraction(1, 2) * d**3 + Fraction(5, 2) * d**2 - 4 * d + 2 if d <= 2 else Fraction(0)


def exact_rows(image, factor):
    """One resizing along axis 0 in fractions, rounded once: clipped to uint8, halves upwards."""
    n, stretch, out = len(image), min(factor, Fraction(1)), []
    for x in range(1, math.ceil(n * factor) + 1):
        u = x / factor + (1 - 1 / factor) / 2
        near = range(math.ceil(u - 2 / stretch), math.floor(u + 2 / stretch) + 1)
        weights = [cubic((u - i) * stretch) for i in near]
        mirrored = [(i - 1) % (2 * n) for i in near]  # symmetric edges: …, n−2, n−1, n−1, n−2, …
        lines = [image[i if i < n else 2 * n - 1 - i].astype(object) for i in mirrored]
        out.append(sum(w / sum(weights) * line for w, line in zip(weights, lines)))
    half_up = np.frompyfunc(lambda v: math.floor(min(max(v, 0), 255) + Fraction(1, 2)), 1, 1)
    return half_up(np.array(out, dtype=object)).astype(np.uint8)


def exact_imresize(image, factor):
    """MATLAB on uint8: the rows first, rounded, then the columns, rounded again."""
    return exact_rows(exact_rows(image, factor).swapaxes(0, 1), factor).swapaxes(0, 1)


# At these factors a sum is a half, which floats hold exactly, or at least 1/162 away from one. So fractions
# and MATLAB's double arithmetic agree on every value.
FACTORS = [Fraction(f) for f in ("1/2", "1/3", "1/4", "1/8", "2", "3", "4")]


@pytest.mark.parametrize("factor", FACTORS, ids=str)
def test_imresize_is_bit_exact_at_any_size(factor):
    random = np.random.default_rng(int(100 * factor))
    shapes = [(1, 1), (1, 11, 3), (10, 1), (8, 5, 1), (3, 130)]  # the last one takes two strips
    shapes += [(*random.integers(2, 14, 2), 3) for _ in range(6)]
    for seed, shape in enumerate(shapes):
        image = noise(*shape, seed=seed)
        image = image if seed % 2 else np.where(image < 128, 0, 255).astype(np.uint8)
        out = data.imresize(image, float(factor))
        assert out.dtype == np.uint8 and np.array_equal(out, exact_imresize(image, factor)), shape


def test_imresize_by_hand():
    """Factor 1/2: weights (−3, −9, 29, 111, 111, 29, −9, −3)/256. Of a step 0 0 0 0 255 255 255 255 come
    −3·255/256 → clipped to 0, 17·255/256 = 16.93, 239·255/256 = 238.07 and 259·255/256 → clipped to 255."""
    step = np.repeat(np.uint8([0, 255]), 4)
    assert data.imresize(step[:, None], 0.5).tolist() == [[0], [17], [238], [255]]
    assert data.imresize(step[None, :], 0.5).tolist() == [[0, 17, 238, 255]]


@pytest.mark.parametrize("image, result", [
    ([[0, 0], [1, 0]], 1),  # rows: (.5, 0) → (1, 0), then .5 → 1; rounded once, the mean .25 would be 0
    ([[1, 0], [1, 2]], 1),  # rows: (1, 1), then 1; columns first would give (.5, 1.5) → (1, 2) → 2
    ([[1, 1], [0, 2]], 2)])  # rows: (.5, 1.5) → (1, 2), then 1.5 → 2; columns first would give (1, 1) → 1
def test_imresize_rounds_after_the_rows_and_after_the_columns(image, result):
    """By symmetric edges, a 2x2 picture reduced to one pixel is the mean."""
    assert data.imresize(np.uint8(image), 0.5).tolist() == [[result]]


def test_imresize_takes_views_and_float_tensors_and_nothing_else():
    image = noise(8, 12, 3)
    view, kept = image[::-1, ::2], image.copy()
    assert np.array_equal(data.imresize(view, 0.5), data.imresize(view.copy(), 0.5))
    assert np.array_equal(data.imresize(image, 1), image) and np.array_equal(image, kept)
    step = torch.tensor([[0.0, 0, 0, 0, 1, 1, 1, 1]]).repeat(2, 1)  # as above, neither rounded nor clipped
    assert torch.allclose(data.imresize(step, 0.5), torch.tensor([[-3, 17, 239, 259]]) / 256)
    with pytest.raises(TypeError, match="uint8 arrays and float tensors"):
        data.imresize(np.zeros((4, 4)), 2)


@pytest.mark.parametrize("name, mode", [("a.png", mode) for mode in ("1", "L", "LA", "RGB", "RGBA")] + [
    (name, "RGB") for name in ("a.bmp", "a.tif", "a.ppm", "a.TIFF")])
def test_pictures_are_read_as_they_are(tmp_path, name, mode, recwarn):
    picture = Image.fromarray(RGB).convert(mode)
    if mode[-1] == "A":
        picture.putalpha(Image.fromarray(noise(6, 8, seed=5)))
    path = save(picture, tmp_path / name)
    whole = np.asarray(picture.convert("L" if mode == "1" else mode)).reshape(6, 8, -1)
    assert np.array_equal(data.read_picture(path), whole)
    colours = whole[..., :3] if "RGB" in mode else whole[..., :1].repeat(3, 2)
    assert np.array_equal(data.read_image(str(path)), colours)  # alpha is left out, grey is repeated
    assert not recwarn.list


@pytest.mark.parametrize("mode, options", [("RGB", {}), ("RGBA", dict(transparency=b"\0\x80\xff\7"))])
def test_palettes_are_resolved_with_their_alpha(tmp_path, mode, options):
    path = save(Image.fromarray(RGB).quantize(4), tmp_path / "a.png", **options)
    assert np.array_equal(data.read_picture(path), np.asarray(Image.open(path).convert(mode)))


def save_with_transparent_value(image, path, value):
    """Writes a grey PNG in which `value` is transparent: the chunk tRNS follows the 33 bytes up to IHDR."""
    content = save(image, path).read_bytes()
    chunk = b"tRNS" + struct.pack(">H", value)
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(content[:33] + chunk + content[33:])
    return path


def test_grey_with_a_transparent_value_is_grey_with_alpha(tmp_path):
    """In 16 bits, 19788 and 19789 both become 77, and only one of them is transparent."""
    for dtype, values in ((np.uint16, [0, 65535, 19788, 19789]), (np.uint8, [0, 255, 76, 77])):
        path = save_with_transparent_value(np.array([values], dtype), tmp_path / "a.png", values[-1])
        grey = [0, 255, 77, 77] if dtype == np.uint16 else values
        assert data.read_picture(path).tolist() == [[[v, a] for v, a in zip(grey, (255, 255, 255, 0))]]
        assert data.read_image(path)[0].tolist() == [[v, v, v] for v in grey]


@pytest.mark.parametrize("name, dtype", [("a.png", np.uint16), ("a.tif", np.uint16), ("a.tif", np.int32)])
def test_16_bit_grey_is_rounded_to_8_bits(tmp_path, name, dtype):
    image = np.array([[0, 65535, 128, 129, 257 * 77]], dtype)  # 128/257 is below a half, 129/257 above it
    assert data.read_picture(save(image, tmp_path / name))[0, :, 0].tolist() == [0, 255, 0, 1, 77]


@pytest.mark.parametrize("mode, name", [("CMYK", "a.jpg"), ("LAB", "a.tif")])
def test_other_colour_spaces_become_rgb(tmp_path, name, mode):
    smooth = np.linspace(40, 200, 16 * 16 * 3).reshape(16, 16, 3).astype(np.uint8)
    options = dict(quality=95) if "j" in name else {}
    image = data.read_picture(save(smooth, tmp_path / name, mode, **options))
    assert image.shape == (16, 16, 3) and np.abs(image.astype(int) - smooth).max() < 12


STORED = {2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
          6: np.rot90, 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, 3)}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("mode", ("RGB", "L"))
def test_a_telephones_jpeg_is_read_upright_without_its_preview(tmp_path, orientation, mode):
    """Orientation 6, a portrait, is stored turned anticlockwise. MPO is a JPEG with further pictures."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8], upright[8:, :8] = 255, 128  # bright top left, grey bottom left
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](upright))
    more = dict(format="MPO", save_all=True, append_images=[Image.fromarray(RGB)], exif=exif, subsampling=0)
    image = data.read_image(save(stored, tmp_path / "a.jpg", mode, quality=95, **more))
    assert image.shape == upright.shape and np.abs(image.astype(int) - upright).max() < 12


def test_a_picture_of_182_megapixels_is_read(tmp_path):
    path = save(Image.new("L", (13500, 13500), 7), tmp_path / "a.png", compress_level=1)
    picture = data.read_picture(path)
    assert picture.shape == (13500, 13500, 1) and (picture[::999, ::999] == 7).all()


def test_a_picture_that_does_not_fit_into_memory_is_named(tmp_path, monkeypatch):
    def no_memory(*args, **options):
        raise MemoryError
    path = save(RGB, tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", no_memory)
    refused(lambda: data.read_picture(path), f"{path} is not a readable image (MemoryError)")


def frames(path):
    save(RGB, path, save_all=True, append_images=[Image.fromarray(255 - RGB)])


BAD = {
    "animated.gif": (frames, "2 frames"),
    "animated.png": (frames, "2 frames"),
    "float.tif": (lambda p: save(np.full((4, 4), 0.5, np.float32), p), "float32"),
    "large.tif": (lambda p: save(np.full((4, 4), 70_000, np.int32), p), "int32"),
    "zero.png": (lambda p: p.write_bytes(b""), "empty"),
    "address.png": (lambda p: p.write_text("https://example.com/picture.png"), "not a readable image"),
    "cut.png": (lambda p: cut(p, 0.97), "truncated"),
    "cut.jpg": (lambda p: cut(p, 0.5), "truncated"),
    "start.jpg": (lambda p: cut(p, 0.01), "Truncated"),
    "zeros.png": (lambda p: p.write_bytes(save(RGB, p).read_bytes()[:60] + bytes(99)), "not a readable"),
    "missing.png": (lambda p: None, "missing"),
    "folder.png": (lambda p: p.mkdir(), "not a file"),
    "pipe.png": (lambda p: os.mkfifo(p), "not a file"),  # it would be waited for
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path, name, recwarn):
    make, words = BAD[name]
    make(tmp_path / name)
    refused(lambda: data.read_picture(tmp_path / name), tmp_path / name, words)
    assert not recwarn.list


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def test_find_images_sorts_folders_and_names_a_place_without_images(tmp_path):
    a = touch(tmp_path / "a", "2.png", "1.JPG", "notes.txt", ".hidden.png", "f.npy")
    b = touch(tmp_path / "b", "0.Tiff", "odd.dat")
    touch(a / "folder.png", "inside.png")
    found = data.find_images([str(b / "odd.dat"), a, b])
    assert found == [b / "odd.dat", a / "1.JPG", a / "2.png", b / "0.Tiff"]
    empty, missing = touch(tmp_path / "empty", "readme.txt", ".hidden.png"), tmp_path / "3.png"
    refused(lambda: data.find_images([a, empty]), f"{empty} has no images")
    refused(lambda: data.find_images([a, missing]), f"{missing} does not exist")


def test_all_that_pillow_reads_as_a_picture_is_found(tmp_path):
    """Pillow opens drawings, films and arrays, too, but they are no pictures."""
    names = ["a.jfif", "b.jp2", "c.tga", "d.Webp", "e.pgm"]
    folder = touch(tmp_path / "a", *names, "f.eps", "f.h5", "f.mpg", "f.pdf", "f.txt")
    assert [path.name for path in data.find_images([folder])] == names
    save(RGB, folder / "b.jp2")
    assert np.array_equal(data.read_picture(folder / "b.jp2"), RGB)


def test_a_note_tells_once_how_many_files_are_left_out(tmp_path, capsys):
    a = touch(tmp_path / "a", "1.png", "notes.txt", "odd.dat", ".hidden", ".hidden.dat")
    b = touch(tmp_path / "b", "1.png", ".hidden")
    touch(b / "folder.dat", "inside.dat")
    for _ in range(2):
        data.find_images([a, b])
    assert capsys.readouterr().err == (
        f"note: files of unknown type in {a} are left out: 2, such as notes.txt\n")


def test_a_link_to_a_missing_picture_is_named(tmp_path):
    folder = touch(tmp_path / "a", "1.png")
    (folder / "2.png").symlink_to(tmp_path / "gone.png")
    refused(lambda: data.find_images([folder]), f"{folder / '2.png'} does not exist, or is a link")
    (tmp_path / "gone.png").write_bytes(b"x")
    assert data.find_images([folder]) == [folder / "1.png", folder / "2.png"]


def test_a_file_in_several_places_is_found_once_in_the_first(tmp_path, monkeypatch):
    a, b = touch(tmp_path / "a", "1.png", "2.png"), touch(tmp_path / "b", "0.png")
    (b / "3.png").symlink_to(a / "2.png")
    monkeypatch.chdir(tmp_path)
    assert data.find_images([b / "0.png", a, "a", b, a / "1.png"]) == [b / "0.png", a / "1.png", a / "2.png"]


def test_the_embedded_photographs(monkeypatch, tmp_path):
    train, held_out = data.embedded_train(), data.embedded_val()
    assert len(train) == 10 and len(held_out) == 3 and not set(train) & set(held_out)
    assert all(min(data.read_image(path).shape[:2]) >= 48 * 4 for path in train + held_out)
    monkeypatch.setattr(data, "PHOTOGRAPHS", tmp_path)
    refused(data.embedded_val, "coffee.png does not exist")


@pytest.mark.parametrize("s, h, w", [(2, 6, 5), (3, 4, 3), (4, 3, 2)])
def test_a_pair_is_cropped_at_the_bottom_and_right_and_its_lr_made_or_read(tmp_path, s, h, w):
    image, given = noise(13, 10, 3), noise(h, w, 3, seed=9)
    hr_file, lr_file = save(image, tmp_path / "a.png"), save(given, tmp_path / "b.png")
    made = exact_imresize(image[:h * s, :w * s], Fraction(1, s))
    for lr_path, expected in ((None, made), (lr_file, given)):
        lr, hr = data.read_pair(hr_file, lr_path, s)
        assert np.array_equal(hr, image[:h * s, :w * s]) and np.array_equal(lr, expected)


def test_read_pair_names_files_and_sizes_that_do_not_fit(tmp_path):
    hr_file, lr_file = save(noise(12, 8, 3), tmp_path / "a.png"), save(noise(6, 4, 3), tmp_path / "ax4.png")
    refused(lambda: data.read_pair(hr_file, lr_file, 4), hr_file, lr_file, "8x12", "4x6", "2x3")
    assert data.read_pair(hr_file, None, 4, least=2)[0].shape == (3, 2, 3)
    refused(lambda: data.read_pair(hr_file, None, 4, least=3), hr_file, "8x12", "2x3", "3x3")


@pytest.mark.parametrize("naming", ("{}x4.png", "{}_x4.png", "{}.png", "{}x4.jpg"))
def test_lr_files_are_matched_by_name(tmp_path, naming):
    hr = data.find_images([touch(tmp_path / "hr", "0001.png", "0002.png")])
    one, two = (touch(tmp_path / name, naming.format(name)) for name in ("0001", "0002"))
    assert data.match_lr(hr, [two, one], 4) == [one / naming.format("0001"), two / naming.format("0002")]
    assert data.match_lr(hr, [two, one, two], 4) == data.match_lr(hr, [two, one], 4)
    assert data.match_lr(hr, [], 4) == [None, None]


def test_lr_files_that_are_missing_or_named_alike_are_named(tmp_path):
    hr = data.find_images([touch(tmp_path / "hr", "0001.png", "0002.png")])
    one, two = touch(tmp_path / "1", "0001x4.png", "0002x2.png"), touch(tmp_path / "2", "0001x4.png")
    refused(lambda: data.match_lr(hr, [one], 4), hr[1], "0002x4", "0002_x4", one)
    refused(lambda: data.match_lr(hr, [one, two], 4), one / "0001x4.png", two / "0001x4.png")
    refused(lambda: data.match_lr([hr[0], tmp_path / "0001.png"], [one], 4), "two HR images")


@pytest.fixture
def files(tmp_path):
    shapes = [(9, 12), (8, 8), (17, 10), (8, 31)] * 3
    folder = touch(tmp_path / "images")
    return [save(noise(*shape, 3, seed=i), folder / f"{i}.png") for i, shape in enumerate(shapes)]


@pytest.fixture
def build(files, tmp_path, monkeypatch):
    """Builds the files' store at x2 for 4x4 patches, on disk."""
    monkeypatch.setattr(data, "RAM", 0)
    return lambda: data.build_store(files, [None] * len(files), 2, 4, tmp_path / "cache")


def at_the_ninth_image(monkeypatch, act):
    """Calls `act` before the ninth image is read. The first eight are in the cache then."""
    def read_pair(path, *rest):
        if path.name == "8.png":
            act()
        return original(path, *rest)
    original = data.read_pair
    monkeypatch.setattr(data, "read_pair", read_pair)


def assert_holds(store, files):
    """The store holds exactly these images, in order."""
    assert store.names == [path.name for path in files] and store.pixels.dtype == torch.uint8
    assert len(store.pixels) == sum((table[:, 1] * table[:, 2]).sum() for table in (store.hr, store.lr))
    for path, *places in zip(files, store.lr.tolist(), store.hr.tolist()):
        for image, (first, h, w) in zip(data.read_pair(path, None, 2), places):
            assert np.array_equal(store.pixels[first:first + h * w].view(h, w, 3), image)


@pytest.mark.parametrize("limit, written", [(0, 1), (2000, 1), (2**30, 0)])  # 2000: from the third image on
def test_a_store_in_memory_on_disk_and_found_again(tmp_path, files, build, monkeypatch, limit, written):
    monkeypatch.setattr(data, "RAM", limit)
    assert_holds(build(), files)
    assert len(list(tmp_path.glob("cache/*"))) == written
    if written:
        with monkeypatch.context() as context:
            context.delattr(data, "read_pair")  # nothing can be decoded
            found = build()
        assert_holds(found, files)
    save(noise(20, 20, 3), files[0])
    assert_holds(build(), files)  # other files are decoded anew


def test_a_picture_is_not_taken_for_lr_where_it_was_hr(tmp_path, build):
    """The same two files: first as two HR images, then as an HR image and its LR."""
    hr, lr = tmp_path / "images" / "0.png", save(noise(4, 6, 3), tmp_path / "lr.png")
    data.build_store([hr, lr], [None, None], 2, 2, tmp_path / "cache")
    store = data.build_store([hr], [lr], 2, 2, tmp_path / "cache")
    assert np.array_equal(store.pixels[:24].view(4, 6, 3), data.read_image(lr))


def test_the_default_cache_is_needed_only_for_a_large_set(tmp_path, files, monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")
    build = lambda: data.build_store(files, [None] * len(files), 2, 4)
    monkeypatch.setattr(data.Path, "home", unknown)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert_holds(build(), files)  # it fits into memory
    monkeypatch.setattr(data, "RAM", 0)
    refused(build, "no home folder", "--cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert_holds(build(), files)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(data.Path, "home", lambda: tmp_path / "home")
    assert_holds(build(), files)
    for place in ("xdg/dukd", "home/.cache/dukd"):
        assert len(list(tmp_path.glob(f"{place}/*.pixels"))) == 1


def test_a_bad_image_or_a_full_disk_is_named_and_leaves_nothing(tmp_path, files, build, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        refused(build, tmp_path / "cache", "No space left", "--cache")
    files[8].write_text("no image")
    refused(build, files[8])
    assert not list(tmp_path.glob("cache/*"))


def test_a_run_killed_half_way_leaves_nothing_that_is_taken_for_whole(tmp_path, files, build, monkeypatch):
    with monkeypatch.context() as context:
        at_the_ninth_image(context, lambda: os.kill(os.getpid(), signal.SIGKILL))
        killed = multiprocessing.get_context("fork").Process(target=build)
        killed.start()
        killed.join()
    assert killed.exitcode == -signal.SIGKILL and list(tmp_path.glob("cache/*"))
    assert_holds(build(), files)


def test_two_runs_at_once_do_not_disturb_each_other(files, build, monkeypatch):
    def another_run():
        context.undo()
        context.setattr(os, "getpid", lambda: 0)
        stores.append(build())
    stores = []
    with monkeypatch.context() as context:
        at_the_ninth_image(context, another_run)
        stores.append(build())
    for store in stores:
        assert_holds(store, files)


def coded_patches(shapes, patch, s, device="cpu"):
    """Patches of pictures whose pixels are (row, column, image); in HR, images count from 128."""
    pixels, tables, first = [], ([], []), 0
    for image, shape in enumerate(shapes):
        for table, scale, code in ((tables[0], 1, image), (tables[1], s, 128 + image)):
            rows, columns = np.indices((shape[0] * scale, shape[1] * scale))
            pixels.append(np.stack([rows, columns, np.full_like(rows, code)], axis=2).reshape(-1, 3))
            table.append((first, *rows.shape))
            first += rows.size
    pixels = torch.from_numpy(np.concatenate(pixels).astype(np.uint8))
    store = data.Store(pixels, torch.tensor(tables[1]), torch.tensor(tables[0]), names=[])
    return data.Patches(store, patch, s, device)


@pytest.mark.parametrize("patch, s", [(1, 2), (4, 2), (4, 3), (4, 4)])
def test_patches_are_aligned_and_uniform_over_images_and_their_positions(patch, s):
    """Every position comes up, the edges included, and none beyond."""
    shapes = [(patch, patch), (patch + 2, patch + 1), (patch, patch + 5), (patch + 4, patch + 4)]
    torch.manual_seed(8)
    lr, hr = coded_patches(shapes, patch, s).sample(12_000)
    assert lr.dtype == hr.dtype == torch.float32
    lr, hr = (lr * 255).round().int(), (hr * 255).round().int()  # (n,3,h,w): row, column, image
    grid, large = (torch.from_numpy(np.indices((n, n))).int() for n in (patch, s * patch))
    corner, image = lr[:, :2, :1, :1], lr[:, 2:, :1, :1]
    assert torch.equal(lr[:, :2], corner + grid) and torch.equal(hr[:, :2], s * corner + large)
    assert (lr[:, 2:] == image).all() and (hr[:, 2:] == 128 + image).all()
    for i, (h, w) in enumerate(shapes):
        tops, lefts = corner[image.flatten() == i].flatten(1).T
        cells = (h - patch + 1) * (w - patch + 1)
        counts = np.bincount(tops * (w - patch + 1) + lefts, minlength=cells)
        assert len(counts) == cells and lefts.max() == w - patch
        assert np.abs(counts - 3000 / cells).max() < 6 * math.sqrt(3000 / cells)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("free", (0, 2**30))
@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=on_gpu)))
def test_the_seed_alone_decides_the_patches(monkeypatch, device, free):
    """Also on a GPU, where nothing synchronises, whether its free memory holds the pixels or not.
    A GPU may compute x/255 as x·(1/255), which differs in the last bit."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    drawn = []
    for seed, place in ((1, "cpu"), (1, device), (2, device)):
        patches = coded_patches([(20, 20), (15, 30)], 4, 2, place)
        torch.manual_seed(seed)
        if place == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        batch = patches.sample(50)
        if place == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        drawn.append([x.cpu() for x in batch])
    for x, y in zip(drawn[0], drawn[1]):
        assert torch.allclose(x, y, rtol=0, atol=1e-7)
    assert not torch.allclose(drawn[0][0], drawn[2][0])
