"""Tests of data.py: MATLAB's imresize against exact fractions, every kind of picture file good and bad, the store and
its cache, and the patches drawn from it. All files read here are made here, but for scikit-image's own pictures.
"""
import math
import os
import sys
import time
import warnings
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image  # imageio brings it

import data
from samples import cut, noise, png, png16, save

try:
    import resource
except ImportError:  # Windows
    resource = None

few = settings(max_examples=40, deadline=None, derandomize=True)


def batch_of(patches, where):
    """I_LR and I_HR as training makes them of the stored pixels."""
    found = patches.fetch(where)
    return data.to_float(found["lr"]), data.to_float(found["hr"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def photograph(name="chelsea.png"):
    return data.read_image(data.embedded([name])[0])


def peak_memory():
    """The most memory this process has held so far, in MiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
    return most / 2**20 if sys.platform == "darwin" else most / 2**10


def one_line(error, *words):
    """Every refusal is one line that names the file."""
    message = str(error.value)
    assert "\n" not in message and len(message) < 400, message
    for word in words:
        assert str(word) in message, message


# ------------------------------------------------------------------------------------------------ imresize, slow and exact
def cubic(d):
    """The cubic kernel, a = −1/2, of a fraction."""
    d = abs(d)
    if d <= 1:
        return Fraction(3, 2) * d**3 - Fraction(5, 2) * d**2 + 1
    return -Fraction(1, 2) * d**3 + Fraction(5, 2) * d**2 - 4 * d + 2 if d <= 2 else Fraction(0)


def exact_weights(n, factor):
    """For each output sample its {input: weight}, as fractions: no rounding anywhere, so no doubt about halves."""
    stretch, rows = min(factor, Fraction(1)), []
    for x in range(1, math.ceil(n * factor) + 1):
        u = x / factor + (1 - 1 / factor) / 2
        near = range(math.ceil(u - 2 / stretch), math.floor(u + 2 / stretch) + 1)
        weights = [cubic((u - i) * stretch) for i in near]
        row = {}
        for i, w in zip(near, weights):
            while not 1 <= i <= n:  # symmetric padding
                i = 1 - i if i < 1 else 2 * n + 1 - i
            row[i - 1] = row.get(i - 1, 0) + w / sum(weights)
        rows.append(row)
    return rows


def exact_pass(image, factor):
    """One resizing along axis 0 as an object array of fractions, not rounded."""
    lines = [line.astype(object) for line in image]
    return np.array([sum(w * lines[i] for i, w in row.items()) for row in exact_weights(len(image), factor)], dtype=object)


def half_up(values):
    """Fractions to uint8: clipped, halves upwards."""
    floor = np.frompyfunc(lambda v: math.floor(min(max(v, 0), 255) + Fraction(1, 2)), 1, 1)
    return floor(values).astype(np.uint8)


def exact_imresize(image, factor):
    """MATLAB on uint8: the rows first, rounded to uint8, then the columns, rounded again."""
    factor = Fraction(factor)
    rows = half_up(exact_pass(image, factor))
    return half_up(exact_pass(rows.swapaxes(0, 1), factor)).swapaxes(0, 1)


def single_rounding(image, factor):
    """What the known Python ports do: both axes unrounded (the shipped float path), and one rounding at the end."""
    planes = torch.from_numpy(image.astype(np.float64)).permute(2, 0, 1)
    return np.floor(data.imresize(planes, float(factor)).permute(1, 2, 0).numpy().clip(0, 255) + 0.5).astype(np.uint8)


# At these factors no sum can come nearer to a half than 1/162 without being one, and halves are dyadic, which floats hold
# exactly: the fractions and MATLAB's double arithmetic agree on every single value.
SAFE = [Fraction(f) for f in ("1/2", "1/3", "1/4", "1/8", "2", "3", "4")]


@pytest.mark.parametrize("factor", SAFE, ids=str)
@pytest.mark.parametrize("shape", [
    (16, 16, 3), (13, 9, 3), (7, 10), (8, 5, 1), (6, 6, 4), (1, 1, 3), (1, 11, 3), (10, 1), (1, 1)], ids=str)
def test_imresize_is_bit_exact(factor, shape):
    image = noise(*shape, seed=sum(shape))
    kept = image.copy()
    out = data.imresize(image, float(factor))
    assert out.dtype == np.uint8 and out.flags.c_contiguous and out.flags.writeable
    assert np.array_equal(out, exact_imresize(image, factor))
    assert np.array_equal(image, kept)


@pytest.mark.parametrize("factor", SAFE, ids=str)
def test_imresize_is_bit_exact_on_a_photograph_with_extremes(factor):
    """Text-like black and white edges overshoot on both sides; the middle holds a real photograph."""
    image = photograph()[100:124, 100:124].copy()
    image[:, :6:2], image[:, 1:6:2], image[::2, -6:], image[1::2, -6:] = 0, 255, 255, 0
    assert np.array_equal(data.imresize(image, float(factor)), exact_imresize(image, factor))


def test_imresize_by_hand_one_axis():
    """Factor 1/2: weights (−3, −9, 29, 111, 111, 29, −9, −3)/256. Of a step 0 0 0 0 255 255 255 255 the outputs are
    −3·255/256 → clipped to 0, 17·255/256 = 16.93, 239·255/256 = 238.07 and 259·255/256 → clipped to 255."""
    step = np.repeat(np.uint8([0, 255]), 4)
    assert data.imresize(step[:, None], 0.5).tolist() == [[0], [17], [238], [255]]
    assert data.imresize(step[None, :], 0.5).tolist() == [[0, 17, 238, 255]]


@pytest.mark.parametrize("image, result", [
    ([[0, 0], [1, 0]], 1),  # rows: (.5, 0) → (1, 0), then .5 → 1; the unrounded mean is .25
    ([[1, 0], [1, 2]], 1),  # rows: (1, 1), then 1; columns first would give (.5, 1.5) → (1, 2) → 2
    ([[1, 1], [0, 2]], 2),  # rows: (.5, 1.5) → (1, 2), then 1.5 → 2; columns first gives (1, 1) → 1
    ([[254, 255], [255, 255]], 255)])
def test_imresize_by_hand_rounds_after_the_rows_and_after_the_columns(image, result):
    """A 2x2 picture reduced to one pixel is the mean, by symmetric padding."""
    assert data.imresize(np.uint8(image), 0.5).tolist() == [[result]]


@pytest.mark.parametrize("name", ("chelsea.png", "astronaut.png", "gravel.png"))
def test_a_single_rounding_would_be_noticed_on_a_photograph(name):
    """10–15 % of the values of a ×4 or ×2 LR picture would be off, by one or two: the Python ports' known fault."""
    image = photograph(name)[:160, :160]
    for factor, least, most in ((Fraction(1, 4), 0.09, 0.14), (Fraction(1, 2), 0.13, 0.18)):
        off = np.abs(data.imresize(image, float(factor)).astype(int) - single_rounding(image, factor))
        assert least < (off > 0).mean() < most and off.max() <= 2
    corner = image[:32, :32]  # and it is not the shipped code that is off
    assert np.array_equal(data.imresize(corner, 0.25), exact_imresize(corner, Fraction(1, 4)))
    assert not np.array_equal(single_rounding(corner, Fraction(1, 4)), exact_imresize(corner, Fraction(1, 4)))


@given(h=st.integers(1, 17), w=st.integers(1, 17), factor=st.sampled_from(SAFE), seed=st.integers(0, 999),
       channels=st.sampled_from([(), (1,), (3,), (4,)]), extreme=st.booleans())
@few
def test_imresize_is_bit_exact_at_any_size(h, w, factor, seed, channels, extreme):
    h, w = (min(h, 6), min(w, 6)) if factor > 1 else (h, w)  # keeps the fractions few
    image = noise(h, w, *channels, seed=seed)
    image = np.where(image < 128, 0, 255).astype(np.uint8) if extreme else image
    assert np.array_equal(data.imresize(image, float(factor)), exact_imresize(image, factor))


@given(n=st.integers(1, 30), p=st.integers(1, 7), q=st.integers(1, 7), seed=st.integers(0, 999))
@few
def test_imresize_at_any_factor_is_exact_but_for_halves(n, p, q, seed):
    """A column one pixel wide goes through one rounding only. At 1/6 or 2/3 some sums are halves of which floats,
    MATLAB's too, fall short by 1e-14: there either neighbour is right."""
    factor, column = Fraction(p, q), noise(n, 1, seed=seed)
    exact = exact_pass(column, factor)
    out = data.imresize(column, p / q)
    assert out.shape == (math.ceil(n * factor), math.ceil(factor))
    for got, value in zip(out, exact[:, 0]):
        near = {int(half_up(np.array([value + e], dtype=object))[0]) for e in (-Fraction(1, 10**9), 0, Fraction(1, 10**9))}
        assert set(got.tolist()) <= near


@pytest.mark.parametrize("value", (0, 1, 127, 254, 255))
@pytest.mark.parametrize("factor", (1 / 2, 1 / 3, 1 / 4, 2, 3, 4, 1, 2 / 3))
def test_constants_stay_constant(value, factor):
    out = data.imresize(np.full((9, 6, 3), value, dtype=np.uint8), factor)
    assert out.shape == (math.ceil(9 * factor), math.ceil(6 * factor), 3) and (out == value).all()


def test_factor_1_and_views_and_flipped_pictures():
    image = noise(8, 12, 3)
    out = data.imresize(image, 1)
    assert np.array_equal(out, image) and not np.shares_memory(out, image)
    view = image[::-1, ::2]
    assert np.array_equal(data.imresize(view, 0.5), data.imresize(view.copy(), 0.5))
    image.setflags(write=False)
    assert np.array_equal(data.imresize(image, 0.5), exact_imresize(image, Fraction(1, 2)))


def test_overshoot_is_clipped_for_uint8_and_kept_for_floats():
    step = np.repeat(np.uint8([0, 255]), 8)[:, None].repeat(4, 1)
    whole = data.imresize(torch.from_numpy(step.astype(np.float64)), 2.0)
    assert whole.min() < -5 and whole.max() > 260
    out = data.imresize(step, 2)
    assert out.min() == 0 and out.max() == 255
    assert np.array_equal(out, exact_imresize(step, 2))


@pytest.mark.parametrize("factor", (Fraction(1, 2), Fraction(1, 3), Fraction(3, 4), Fraction(2), Fraction(3)), ids=str)
def test_a_float_tensor_is_resized_without_rounding_and_differentiably(factor):
    image = noise(7, 10, seed=3)
    exact = exact_pass(exact_pass(image, factor).swapaxes(0, 1), factor).swapaxes(0, 1).astype(np.float64)
    x = torch.from_numpy(image.astype(np.float64)).requires_grad_()
    out = data.imresize(x, float(factor))
    assert np.allclose(out.detach().numpy(), exact, rtol=0, atol=1e-9)
    assert np.allclose(data.imresize(x.detach().float().expand(2, 3, -1, -1), float(factor))[1, 2], exact, rtol=0, atol=1e-3)
    out.sum().backward()
    assert x.grad.isfinite().all() and x.grad.sum().item() == pytest.approx(out.numel())


@pytest.mark.parametrize("image", [np.zeros((4, 4)), np.zeros((4, 4), np.uint16), np.zeros((4, 4), bool), [[1, 2], [3, 4]],
                                   torch.zeros(4, 4, dtype=torch.uint8), None], ids=lambda x: str(getattr(x, "dtype", x)))
def test_imresize_refuses_other_kinds(image):
    with pytest.raises(TypeError, match="uint8 arrays and float tensors"):
        data.imresize(image, 2)


@pytest.mark.parametrize("factor", (0, -1, -0.5, math.nan))
@pytest.mark.parametrize("image", (np.zeros((4, 4), np.uint8), torch.zeros(4, 4)), ids=("uint8", "float"))
def test_imresize_refuses_factors_that_are_not_positive(image, factor):
    with pytest.raises(ValueError, match="positive"):
        data.imresize(image, factor)


# ------------------------------------------------------------------------------------------------ reading good pictures
def rounded_to_8_bits(image):
    return np.floor(image / 257 + 0.5).astype(np.uint8)


RGB = noise(6, 8, 3, seed=11)


@pytest.mark.parametrize("name", ("a.png", "a.bmp", "a.tif", "a.ppm", "a.TIFF", "a.webp"))
def test_lossless_rgb_comes_as_it_is(tmp_path, name, recwarn):
    path = save(RGB, tmp_path / name, **dict(lossless=True) if name.endswith("webp") else {})
    assert np.array_equal(data.read_picture(path), RGB) and np.array_equal(data.read_picture(str(path)), RGB)
    assert np.array_equal(data.read_image(path), RGB) and data.read_image(path).flags.c_contiguous
    assert not recwarn.list


@pytest.mark.parametrize("mode, channels", [("L", 1), ("1", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4)])
def test_png_modes_and_their_channels(tmp_path, mode, channels, recwarn):
    picture = Image.fromarray(RGB).convert(mode)
    if channels in (2, 4):
        picture.putalpha(Image.fromarray(noise(6, 8, seed=5)))
    image = data.read_picture(save(picture, tmp_path / "a.png"))
    whole = np.asarray(picture).astype(np.uint8).reshape(6, 8, channels) * (255 if mode == "1" else 1)
    assert image.dtype == np.uint8 and np.array_equal(image, whole)
    colours = whole[..., :3] if channels >= 3 else whole[..., :1].repeat(3, 2)
    assert np.array_equal(data.read_image(tmp_path / "a.png"), colours)  # alpha is left out, grey is repeated
    assert not recwarn.list


@pytest.mark.parametrize("depth, values", [(1, [0, 0, 0, 255, 255, 0, 255, 255]), (2, [0, 85, 170, 255]), (4, [17, 187])])
def test_grey_of_few_bits_is_stretched_to_255(tmp_path, depth, values):
    (tmp_path / "a.png").write_bytes(png(len(values), 1, zlib.compress(b"\0\x1b"), depth, 0))
    assert data.read_picture(tmp_path / "a.png").ravel().tolist() == values


def test_a_palette_is_resolved(tmp_path, recwarn):
    picture = Image.fromarray(RGB).quantize(16)
    assert picture.mode == "P"
    image = data.read_picture(save(picture, tmp_path / "a.png"))
    assert np.array_equal(image, np.asarray(picture.convert("RGB")))
    assert np.array_equal(data.read_image(save(picture, tmp_path / "a.gif")), image)
    assert not recwarn.list


@pytest.mark.parametrize("transparency", (3, bytes([0, 128, 255, 7])), ids=("one colour", "a table"))
def test_a_palette_with_transparency_gives_its_colours(tmp_path, transparency):
    picture = Image.fromarray(RGB).quantize(4)
    path = save(picture, tmp_path / "a.png", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(data.read_image(path), np.asarray(picture.convert("RGB")))


def test_a_palette_with_transparency_keeps_its_alpha(tmp_path, recwarn):
    path = save(Image.fromarray(RGB).quantize(4), tmp_path / "a.png", transparency=bytes([0, 128, 255, 7]))
    image = data.read_picture(path)
    assert not recwarn.list
    assert np.array_equal(image, np.asarray(Image.open(path).convert("RGBA")))


@pytest.mark.parametrize("mode, transparency, alpha", [("L", 3, "LA"), ("RGB", (1, 2, 3), "RGBA")])
def test_one_transparent_colour_becomes_alpha(tmp_path, mode, transparency, alpha):
    image = RGB.copy()
    image[0, 0] = (1, 2, 3) if mode == "RGB" else 3
    path = save(Image.fromarray(image).convert(mode), tmp_path / "a.png", transparency=transparency)
    assert np.array_equal(data.read_picture(path), np.asarray(Image.open(path).convert(alpha)))


@pytest.mark.parametrize("name", ("a.png", "a.tif"))
def test_16_bit_grey_is_rounded_to_8_bits(tmp_path, name, recwarn):
    image = np.random.default_rng(0).integers(0, 65536, (6, 8), dtype=np.uint16)
    image[0, :5] = 0, 65535, 128, 129, 65535 - 128  # 128/257 is below a half, 129/257 above it
    got = data.read_picture(save(image, tmp_path / name))
    assert got.shape == (6, 8, 1) and np.array_equal(got[..., 0], rounded_to_8_bits(image))
    assert got[0, :5, 0].tolist() == [0, 255, 0, 1, 255]
    assert not recwarn.list


@pytest.mark.parametrize("colour, channels", [(2, 3), (6, 4), (4, 2)], ids=("RGB", "RGBA", "LA"))
def test_16_bit_colour_and_alpha_are_brought_to_8_bits(tmp_path, colour, channels, recwarn):
    """Pillow gives the high byte of each value, one below the rounded one at most; grey and alpha may come as RGBA."""
    image = np.random.default_rng(1).integers(0, 65536, (6, 8, channels), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png16(image, colour))
    got = data.read_picture(tmp_path / "a.png").astype(int)
    wanted = rounded_to_8_bits(image).astype(int)
    wanted = wanted[..., [0, 0, 0, 1]] if channels == 2 and got.shape[2] == 4 else wanted
    assert got.shape == wanted.shape and np.abs(got - wanted).max() <= 1
    assert not recwarn.list


def test_16_bits_held_in_32_are_read_and_more_is_refused(tmp_path):
    image = np.random.default_rng(2).integers(0, 65536, (4, 4)).astype(np.int32)
    got = data.read_picture(save(image, tmp_path / "a.tif"))
    assert np.array_equal(got[..., 0], rounded_to_8_bits(image))
    for name, value in (("large.tif", 70_000), ("negative.tif", -1)):
        save(np.full((4, 4), value, np.int32), tmp_path / name)
        with pytest.raises(data.DataError) as error:
            data.read_picture(tmp_path / name)
        one_line(error, tmp_path / name, "int32", "convert")


@pytest.mark.parametrize("name, mode", [("a.jpg", "CMYK"), ("a.tif", "CMYK"), ("a.tif", "LAB"),
                                        ("a.jpg", "RGB"), ("a.jpeg", "L"), ("a.JPG", "RGB")])
def test_other_colour_spaces_and_jpegs_become_rgb_or_grey(tmp_path, name, mode):
    smooth = np.linspace(40, 200, 16 * 16 * 3).reshape(16, 16, 3).astype(np.uint8)
    options = dict(quality=95) if "j" in name.lower() else {}
    image = data.read_picture(save(smooth, tmp_path / name, mode, **options))
    assert image.shape == (16, 16, 1 if mode == "L" else 3)
    assert np.abs(data.read_image(tmp_path / name).astype(int) - smooth).max() < 12


UPRIGHT_TO_STORED = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
                     6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1)}


@pytest.mark.parametrize("orientation", UPRIGHT_TO_STORED)
@pytest.mark.parametrize("mode", ("RGB", "L", "CMYK"))
def test_a_jpeg_rotated_by_exif_comes_upright(tmp_path, orientation, mode):
    """Orientation 6, a telephone's portrait: stored turned anticlockwise, to be shown turned clockwise."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8], upright[8:, :8] = 255, 128  # bright top left, grey bottom left
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(UPRIGHT_TO_STORED[orientation](upright))
    save(stored, tmp_path / "a.jpg", mode, quality=95, subsampling=0, exif=exif)
    image = data.read_image(tmp_path / "a.jpg")
    assert image.shape == upright.shape and np.abs(image.astype(int) - upright).max() < 12


def test_the_smallest_pictures(tmp_path):
    for shape in ((1, 1), (1, 1, 3), (1, 5, 3), (5, 1, 4), (2, 3, 2), (1, 4), (3, 3), (4, 4)):
        image = noise(*shape, seed=7)
        got = data.read_picture(save(image, tmp_path / "a.png"))
        assert np.array_equal(got, image.reshape(*shape[:2], -1))
        assert data.read_image(tmp_path / "a.png").shape == (*shape[:2], 3)


def test_a_telephones_jpeg_with_a_second_picture_inside_gives_the_first(tmp_path):
    """MPO, as telephones write it: a JPEG with a preview or a depth map behind it."""
    first = np.full((16, 16, 3), 200, np.uint8)
    save(first, tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[Image.fromarray(0 * first)])
    assert np.abs(data.read_image(tmp_path / "a.jpg").astype(int) - first).max() < 3


# ------------------------------------------------------------------------------------------------ refusing bad ones
def frames(path, **options):
    return save(RGB, path, save_all=True, append_images=[Image.fromarray(255 - RGB)], **options)


def flipped_bit(path):
    content = bytearray(save(noise(64, 64, 3), path).read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


BAD = {
    "animated.gif": (frames, "2 frames"),
    "animated.png": (frames, "2 frames"),
    "animated.webp": (frames, "2 frames"),
    "pages.tif": (frames, "2 frames"),
    "float.tif": (lambda p: save(np.full((4, 4), 0.5, np.float32), p), "float32"),
    "zero.png": (lambda p: p.write_bytes(b""), "empty"),
    "text.png": (lambda p: p.write_text("not a picture,\nbut two lines"), "not a readable image"),
    "address.png": (lambda p: p.write_text("https://example.com/picture.png"), "not a readable image"),
    "name.png": (lambda p: p.write_text("imageio:chelsea.png"), "not a readable image"),
    "header only.png": (lambda p: cut(p, 0.002), "not a readable image"),
    "cut.png": (lambda p: cut(p, 0.5), "truncated"),
    "nearly whole.png": (lambda p: cut(p, 0.97), "truncated"),
    "cut.jpg": (lambda p: cut(p, 0.5), "truncated"),
    "nearly whole.jpg": (lambda p: cut(p, 0.97), "truncated"),
    "start.jpg": (lambda p: cut(p, 0.01), "not a readable image"),
    "cut.tif": (lambda p: cut(p, 0.5), "truncated"),
    "cut.bmp": (lambda p: cut(p, 0.5), "truncated"),
    "cut.gif": (lambda p: cut(p, 0.5), "truncated"),
    "cut.webp": (lambda p: cut(p, 0.5), "not a readable image"),
    "flipped bit.png": (flipped_bit, "not a readable image"),
    "no width.png": (lambda p: p.write_bytes(png(0, 0, zlib.compress(b""))), "not a readable image"),
    "bomb.png": (lambda p: p.write_bytes(png(50_000, 50_000, zlib.compress(bytes(1000)))), "not a readable image"),
    "missing.png": (lambda p: None, "No such file"),
    "folder.png": (lambda p: p.mkdir(), "directory"),
    "missing folder/a.png": (lambda p: None, "No such file"),
    "file.txt/a.png": (lambda p: p.parent.write_text("a file in place of the folder"), "directory"),
    "circle.png": (lambda p: p.symlink_to(p), "cannot be read"),
    "dangling.png": (lambda p: p.symlink_to(p.parent / "nothing"), "No such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path, name, recwarn):
    make, words = BAD[name]
    make(tmp_path / name)
    began, peak = time.process_time(), peak_memory()
    for read in (data.read_picture, data.read_image):
        with pytest.raises(data.DataError) as error:
            read(tmp_path / name)
        one_line(error, tmp_path / name, words)
        assert "BytesIO" not in str(error.value) and "bytes>" not in str(error.value)
    assert time.process_time() - began < 5
    assert peak_memory() - peak < 300  # the bomb would be 7 GiB
    assert not recwarn.list


@pytest.mark.parametrize("name", ("text.png", "start.jpg", "bomb.png"))
def test_the_reason_given_is_not_imageios_general_one(tmp_path, name):
    BAD[name][0](tmp_path / name)
    with pytest.raises(data.DataError) as error:
        data.read_picture(tmp_path / name)
    assert "pillow" not in str(error.value) and "unknown error" not in str(error.value)
    assert name != "bomb.png" or "2500000000 pixels" in str(error.value)


def test_an_animation_named_jpg_is_refused_too(tmp_path):
    frames(tmp_path / "a.gif").rename(tmp_path / "a.jpg")
    with pytest.raises(data.DataError, match="2 frames"):
        data.read_picture(tmp_path / "a.jpg")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path):
    path = save(RGB, tmp_path / "a.png")
    path.chmod(0)
    with pytest.raises(data.DataError) as error:
        data.read_picture(path)
    one_line(error, path, "ermission")


# ------------------------------------------------------------------------------------------------ finding files
def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def test_find_images_sorts_and_knows_extensions_in_any_case(tmp_path):
    folder = touch(tmp_path / "a", "c.png", "B.JPG", "a.Tiff", "d.webp", "e.bmp", "notes.txt", "png", ".hidden.png", "f.npy")
    touch(folder / "sub.png", "inside.png")  # a folder, whatever its name
    assert [p.name for p in data.find_images([folder])] == sorted(["c.png", "B.JPG", "a.Tiff", "d.webp", "e.bmp"])
    assert data.find_images([str(folder)]) == data.find_images([folder])


def test_find_images_keeps_the_order_of_the_places_and_takes_files_as_named(tmp_path):
    a, b = touch(tmp_path / "a", "2.png", "1.png"), touch(tmp_path / "b", "0.png", "odd.dat")
    found = data.find_images([b / "odd.dat", a, b])
    assert found == [b / "odd.dat", a / "1.png", a / "2.png", b / "0.png"]
    assert data.find_images([]) == []


@pytest.mark.parametrize("names, words", [([], "no images"), (["readme.txt", ".hidden.png"], "no images")])
def test_a_folder_without_images_is_named(tmp_path, names, words):
    folder = touch(tmp_path / "empty", *names)
    with pytest.raises(data.DataError) as error:
        data.find_images([folder])
    one_line(error, folder, words)
    assert "folder inside" not in str(error.value)


def test_a_folder_of_folders_is_answered_with_their_names(tmp_path):
    folder = tmp_path / "DIV2K"
    for name in ("train_HR", "valid_HR", "x", "y"):
        touch(folder / name, "0001.png")
    with pytest.raises(data.DataError) as error:
        data.find_images([folder])
    one_line(error, folder, "train_HR", "valid_HR")


def test_a_place_that_is_missing_is_named_even_among_others(tmp_path):
    folder = touch(tmp_path / "a", "1.png")
    for missing in (tmp_path / "nowhere", folder / "2.png", folder / "1.png" / "x"):
        with pytest.raises(data.DataError) as error:
            data.find_images([folder, missing])
        one_line(error, missing)


# ------------------------------------------------------------------------------------------------ pairs
@pytest.mark.parametrize("shape, s", [((13, 10), 2), ((13, 10), 3), ((13, 10), 4), ((8, 16), 8), ((4, 7), 4)])
def test_a_pair_is_cropped_at_the_bottom_and_right_and_reduced(shape, s):
    image = noise(*shape, 3)
    lr, hr = data.pair(image, s)
    h, w = shape[0] // s, shape[1] // s
    assert np.array_equal(hr, image[:h * s, :w * s]) and hr.flags.c_contiguous
    assert lr.shape == (h, w, 3) and np.array_equal(lr, exact_imresize(hr, Fraction(1, s)))


def test_read_pair_makes_the_lr_image_or_reads_the_given_one(tmp_path):
    image, given_lr = noise(13, 10, 3), noise(3, 2, 3, seed=9)
    hr_file, lr_file = save(image, tmp_path / "a.png"), save(given_lr, tmp_path / "ax4.png")
    lr, hr = data.read_pair(hr_file, None, 4)
    assert np.array_equal(hr, image[:12, :8]) and np.array_equal(lr, data.imresize(image[:12, :8], 1 / 4))
    lr, hr = data.read_pair(hr_file, lr_file, 4)
    assert np.array_equal(hr, image[:12, :8]) and np.array_equal(lr, given_lr)


def test_read_pair_names_both_files_and_sizes_where_they_do_not_match(tmp_path):
    hr_file = save(noise(12, 8, 3), tmp_path / "a.png")
    for shape in ((3, 3, 3), (2, 3, 3), (12, 8, 3), (6, 4, 3)):  # (6,4): LR of another scale
        lr_file = save(noise(*shape), tmp_path / "ax4.png")
        with pytest.raises(data.DataError) as error:
            data.read_pair(hr_file, lr_file, 4)
        one_line(error, hr_file, lr_file, "8x12", f"{shape[1]}x{shape[0]}", "2x3")


def test_read_pair_names_the_size_of_an_image_that_is_too_small(tmp_path):
    path = save(noise(15, 40, 3), tmp_path / "a.png")
    assert data.read_pair(path, None, 4, least=3)[0].shape == (3, 10, 3)
    with pytest.raises(data.DataError) as error:
        data.read_pair(path, None, 4, least=4)
    one_line(error, path, "40x15", "16x16", "--patch")
    path = save(noise(3, 40, 3), tmp_path / "b.png")  # not one LR pixel
    with pytest.raises(data.DataError) as error:
        data.read_pair(path, None, 4)
    one_line(error, path, "40x3", "4x4")


@pytest.mark.parametrize("naming", ("{}x4.png", "{}_x4.png", "{}.png", "{}x4.jpg"))
def test_lr_files_are_matched_by_div2ks_and_the_usual_names(tmp_path, naming):
    hr = touch(tmp_path / "hr", "0001.png", "0002.png", "0010.png")
    lr = touch(tmp_path / "lr", *(naming.format(n) for n in ("0010", "0002", "0001", "0003")))
    matched = data.match_lr(data.find_images([hr]), [lr], 4)
    assert matched == [lr / naming.format(n) for n in ("0001", "0002", "0010")]


def test_lr_files_may_lie_in_several_folders_or_be_absent_altogether(tmp_path):
    hr = data.find_images([touch(tmp_path / "hr", "a.png", "b.png")])
    one, two = touch(tmp_path / "one", "bx2.png"), touch(tmp_path / "two", "ax2.png", "ax4.png", "a.png")
    assert data.match_lr(hr, [one, two], 2) == [two / "ax2.png", one / "bx2.png"]
    assert data.match_lr(hr, [], 2) == [None, None] and data.match_lr(hr, None, 2) == [None, None]


def test_a_missing_lr_file_is_named_with_the_names_looked_for(tmp_path):
    hr = data.find_images([touch(tmp_path / "hr", "0001.png", "0002.png")])
    lr = touch(tmp_path / "lr", "0001x4.png", "0002x2.png")
    with pytest.raises(data.DataError) as error:
        data.match_lr(hr, [lr], 4)
    one_line(error, hr[1], "0002x4", "0002_x4", lr)


def test_two_lr_files_of_the_same_name_are_not_mixed_up(tmp_path):
    hr = data.find_images([touch(tmp_path / "A", "0001.png"), touch(tmp_path / "B", "0001.png")])
    with pytest.raises(data.DataError, match="0001x4"):
        data.match_lr(hr, [touch(tmp_path / "LA", "0001x4.png"), touch(tmp_path / "LB", "0001x4.png")], 4)


# ------------------------------------------------------------------------------------------------ the store
SHAPES = [(9, 12), (8, 8), (17, 10), (8, 31)]


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    return [save(noise(*shape, 3, seed=i), folder / f"{i}.png") for i, shape in enumerate(SHAPES)]


@pytest.fixture
def no_decoding(monkeypatch):
    """After a call of this, reading any image is an error."""
    def forbid():
        def refuse(*arguments):
            raise AssertionError("an image was decoded")
        monkeypatch.setattr(data, "read_pair", refuse)
    return forbid


def build(paths, cache, lr_paths=None, scale=2, least=4, ram_limit=0, **options):
    return data.build_store(paths, lr_paths or [None] * len(paths), scale, least, ram_limit, cache, **options)


def image_of(store, table, i):
    first, h, w = table[i].tolist()
    return store.pixels[first:first + h * w].view(h, w, 3).numpy()


def assert_holds(store, paths, scale=2):
    """The store holds exactly these images, in order, without gaps."""
    assert len(store) == len(paths) and store.names == [p.name for p in paths]
    assert store.pixels.dtype == torch.uint8 and store.pixels.shape[1] == 3
    assert store.hr.dtype == store.lr.dtype == torch.int64
    for i, path in enumerate(paths):
        lr, hr = data.read_pair(path, None, scale)
        assert np.array_equal(image_of(store, store.lr, i), lr) and np.array_equal(image_of(store, store.hr, i), hr)
    covered = sorted((first, first + h * w) for first, h, w in torch.cat([store.lr, store.hr]).tolist())
    assert covered[0][0] == 0 and covered[-1][1] == len(store.pixels)
    assert all(end == begin for (_, end), (begin, _) in zip(covered, covered[1:]))


def leftovers(cache):
    """What lies in the cache beside whole stores."""
    return [p.name for p in cache.glob("*") if p.suffix not in (".pixels", ".json")] if cache.exists() else []


def test_a_store_in_memory_holds_exactly_the_images(tmp_path, files, recwarn):
    store = build(files, tmp_path / "cache", ram_limit=2**30)
    assert_holds(store, files)
    assert store.file is None and not (tmp_path / "cache").exists()  # nothing is written where memory is enough
    assert store.pixels.is_contiguous() and not recwarn.list


@pytest.mark.parametrize("ram_limit", (0, 700, 2000))  # from the first image on, from the second, from the third
def test_a_store_on_disk_equals_the_one_in_memory(tmp_path, files, ram_limit):
    store = build(files, tmp_path / "deep" / "cache", ram_limit=ram_limit)
    assert_holds(store, files)
    assert store.file.is_file() and store.file.stat().st_size == store.pixels.numel()
    in_memory = build(files, tmp_path / "other", ram_limit=2**30)
    assert torch.equal(store.pixels, in_memory.pixels)
    assert torch.equal(store.hr, in_memory.hr) and torch.equal(store.lr, in_memory.lr) and store.names == in_memory.names
    assert not leftovers(tmp_path / "deep" / "cache")


def test_given_lr_images_are_stored(tmp_path, files):
    lr_files = [save(noise(h // 2, w // 2, 3, seed=50 + i), tmp_path / f"{i}x2.png") for i, (h, w) in enumerate(SHAPES)]
    store = build(files, tmp_path / "cache", lr_files)
    for i, path in enumerate(lr_files):
        assert np.array_equal(image_of(store, store.lr, i), data.read_image(path))
        h, w = store.lr[i, 1:].tolist()
        assert np.array_equal(image_of(store, store.hr, i), data.read_image(files[i])[:2 * h, :2 * w])


def test_the_next_run_over_the_same_files_decodes_nothing(tmp_path, files, no_decoding):
    first = build(files, tmp_path / "cache")
    no_decoding()
    again = build(files, tmp_path / "cache")
    assert torch.equal(first.pixels, again.pixels) and torch.equal(first.hr, again.hr) and torch.equal(first.lr, again.lr)
    assert first.names == again.names and first.file == again.file


def test_the_cache_goes_by_path_size_and_time(tmp_path, files):
    """Not by content, which would have to be read: a file garbled in place, with its size and time kept, is not noticed."""
    first = build(files, tmp_path / "cache")
    stat = files[0].stat()
    files[0].write_bytes(b"?" * stat.st_size)
    os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert torch.equal(build(files, tmp_path / "cache").pixels, first.pixels)
    os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(data.DataError, match="0.png"):
        build(files, tmp_path / "cache")


def change_time(files):
    os.utime(files[1], ns=(0, 12345))


def change_size(files):
    stat = files[1].stat()
    files[1].write_bytes(files[1].read_bytes() + b"\0")  # behind the PNG's end: the same picture
    os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", (change_time, change_size, list.reverse, list.pop))
def test_other_files_are_decoded_anew(tmp_path, files, change):
    first = build(files, tmp_path / "cache")
    change(files)
    second = build(files, tmp_path / "cache")
    assert second.file != first.file
    assert_holds(second, files)


def test_other_scales_and_lr_files_have_stores_of_their_own(tmp_path, files):
    lr_files = [save(noise(h // 2, w // 2, 3), tmp_path / f"{i}x2.png") for i, (h, w) in enumerate(SHAPES)]
    stores = [build(files, tmp_path / "cache", least=2), build(files, tmp_path / "cache", scale=4, least=2),
              build(files, tmp_path / "cache", least=3), build(files, tmp_path / "cache", lr_files, least=2)]
    assert len({store.file for store in stores}) == 4
    assert_holds(stores[1], files, scale=4)


def damage_pixels(file):
    file.write_bytes(file.read_bytes()[:-1])


def damage_index(file):
    file.with_suffix(".json").write_text("{")


@pytest.mark.parametrize("damage", (damage_pixels, damage_index, lambda file: file.unlink(),
                                    lambda file: file.with_suffix(".json").unlink(), lambda file: file.write_bytes(b"")),
                         ids=("pixels cut", "index cut", "no pixels", "no index", "pixels empty"))
def test_a_damaged_cache_is_built_again(tmp_path, files, damage):
    damage(build(files, tmp_path / "cache").file)
    store = build(files, tmp_path / "cache")
    assert_holds(store, files)
    assert data.open_store(store.file, 2, 4) is not None and not leftovers(tmp_path / "cache")


def spoil(files):
    """One file that is no image, one that is too small for a patch."""
    files[1].write_text("no image")
    save(noise(6, 30, 3), files[3])
    return [files[0], files[2]]


@pytest.mark.parametrize("ram_limit", (0, 2**30), ids=("disk", "memory"))
def test_skip_bad_leaves_unusable_images_out_and_names_them(tmp_path, files, ram_limit, capsys):
    good = spoil(files)
    store = build(files, tmp_path / "cache", ram_limit=ram_limit, skip_bad=True)
    assert_holds(store, good)
    lines = [line for line in "".join(capsys.readouterr()).splitlines() if line.strip()]
    assert len(lines) == 2 and str(files[1]) in lines[0] and str(files[3]) in lines[1] and "30x6" in lines[1]


@pytest.mark.parametrize("ram_limit", (0, 2**30), ids=("disk", "memory"))
def test_without_skip_bad_the_first_bad_image_ends_it_and_nothing_is_left_behind(tmp_path, files, ram_limit):
    spoil(files)
    with pytest.raises(data.DataError) as error:
        build(files, tmp_path / "cache", ram_limit=ram_limit)
    one_line(error, files[1])
    assert not list((tmp_path / "cache").glob("*"))


def test_a_run_without_skip_bad_does_not_take_the_store_of_one_with_it(tmp_path, files, capsys):
    spoil(files)
    build(files, tmp_path / "cache", skip_bad=True)
    with pytest.raises(data.DataError, match="1.png"):
        build(files, tmp_path / "cache")


def test_no_usable_image_at_all_is_an_error(tmp_path, files, capsys):
    for path in files:
        path.write_text("no image")
    with pytest.raises(data.DataError, match="no usable image"):
        build(files, tmp_path / "cache", skip_bad=True)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, files):
    """A file in place of the folder: that stops root too."""
    (tmp_path / "cache").write_text("a file")
    for cache in (tmp_path / "cache", tmp_path / "cache" / "inside"):
        with pytest.raises(data.DataError) as error:
            build(files, cache)
        one_line(error, cache, "--cache")
    assert_holds(build(files, tmp_path / "cache", ram_limit=2**30), files)  # which nothing needs in memory


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path, files, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(data.DataError) as error:
        build(files, tmp_path / "cache")
    one_line(error, tmp_path / "cache", "No space left", "--cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_an_index_that_cannot_be_written_is_named_too(tmp_path, files, monkeypatch):
    key = data.store_key(files, [None] * 4, 2, 4)
    monkeypatch.setattr(data.secrets, "token_hex", lambda n: "token")
    (tmp_path / "cache" / f"{key}.token.json.tmp").mkdir(parents=True)
    with pytest.raises(data.DataError, match="--cache"):
        build(files, tmp_path / "cache")


def test_an_image_that_has_gone_is_named(tmp_path, files):
    files[2].unlink()
    with pytest.raises(data.DataError, match="2.png"):
        build(files, tmp_path / "cache")


def test_many_images_keep_their_order_through_the_threads(tmp_path):
    paths = [save(np.full((2 + i % 5, 2 + i % 3, 3), i, np.uint8), tmp_path / f"{i:03}.bmp") for i in range(60)]
    store = build(paths, tmp_path / "cache", least=1, ram_limit=2**30)
    assert [image_of(store, store.hr, i)[0, 0, 0] for i in range(60)] == list(range(60))
    assert store.names == [p.name for p in paths]


# ------------------------------------------------------------------------------------------------ patches
def coded_store(shapes, s):
    """A store of LR shapes whose pixels tell (row, column, image), the HR ones in HR rows and columns from 128 on for the
    image: no two pixels of it are the same."""
    pixels, tables, done = [], ([], []), 0
    for i, (h, w) in enumerate(shapes):
        for table, k, tag in ((tables[0], 1, i), (tables[1], s, 128 + i)):
            rows, columns = np.indices((h * k, w * k))
            pixels.append(np.stack([rows, columns, np.full_like(rows, tag)], axis=2).astype(np.uint8).reshape(-1, 3))
            table.append((done, h * k, w * k))
            done += len(pixels[-1])
    return data.Store(torch.from_numpy(np.concatenate(pixels)), torch.tensor(tables[1]), torch.tensor(tables[0]),
                      [f"{i}.png" for i in range(len(shapes))])


def values(batch):
    """A batch back in uint8, and checked to be floats in [0,1]."""
    assert batch.dtype == torch.float32 and batch.min() >= 0 and batch.max() <= 1
    return (batch * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_a_batch_is_the_crops_that_numpy_cuts(tmp_path, files):
    store = build(files, tmp_path / "cache")
    patches = data.Patches(store, 4, 2)
    where = patches.draw(100, seeded())
    assert where.shape == (100, 3) and where.dtype == torch.int64 and where.device.type == "cpu"
    lr, hr = batch_of(patches, where)
    assert lr.shape == (100, 3, 4, 4) and hr.shape == (100, 3, 8, 8)
    pairs = [data.read_pair(path, None, 2) for path in files]
    for (i, top, left), small, large in zip(where.tolist(), lr, hr):
        cut_lr = pairs[i][0][top:top + 4, left:left + 4]
        cut_hr = pairs[i][1][2 * top:2 * top + 8, 2 * left:2 * left + 8]
        assert torch.equal(small, torch.from_numpy(cut_lr).permute(2, 0, 1).float() / 255)
        assert torch.equal(large, torch.from_numpy(cut_hr).permute(2, 0, 1).float() / 255)


@given(shapes=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5), patch=st.integers(1, 6),
       s=st.sampled_from((2, 3, 4)), seed=st.integers(0, 999))
@few
def test_patches_are_aligned_and_never_leave_their_image(shapes, patch, s, seed):
    """0 means that the image is exactly as large as a patch."""
    patches = data.Patches(coded_store([(patch + h, patch + w) for h, w in shapes], s), patch, s)
    where = patches.draw(40, seeded(seed))
    lr, hr = (values(batch) for batch in batch_of(patches, where))
    rows, columns = np.indices((patch, patch))
    large_rows, large_columns = np.indices((s * patch, s * patch))
    for (i, top, left), small, large in zip(where.tolist(), lr, hr):
        assert 0 <= top <= shapes[i][0] and 0 <= left <= shapes[i][1]
        assert np.array_equal(small, np.stack([rows + top, columns + left, 0 * rows + i], 2))
        assert np.array_equal(large, np.stack([large_rows + s * top, large_columns + s * left, 0 * large_rows + 128 + i], 2))


def test_patches_are_uniform_over_images_and_over_positions():
    """Images are drawn alike whatever their size, and every position inside them, the last included, too."""
    shapes = [(4, 4), (6, 5), (4, 9), (8, 8)]
    where = data.Patches(coded_store(shapes, 2), 4, 2).draw(12_000, seeded(8)).numpy()

    def plausible(counts):
        """Mean K−1 and variance 2(K−1) for K equally likely cells, six deviations allowed."""
        expected = counts.sum() / counts.size
        return ((counts - expected) ** 2 / expected).sum() <= counts.size - 1 + 6 * math.sqrt(2 * (counts.size - 1))
    assert plausible(np.bincount(where[:, 0], minlength=4))
    for i, (h, w) in enumerate(shapes):
        mine = where[where[:, 0] == i]
        counts = np.zeros((h - 3, w - 3))
        np.add.at(counts, (mine[:, 1], mine[:, 2]), 1)
        assert counts.min() > 0 and plausible(counts), shapes[i]


def test_drawing_is_reproducible_and_leaves_the_global_stream_alone():
    patches = data.Patches(coded_store([(20, 20), (15, 30)], 2), 4, 2)
    before = torch.get_rng_state()
    generator = seeded(1)
    first, second = patches.draw(50, generator), patches.draw(50, generator)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, patches.draw(50, seeded(1))) and not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(batch_of(patches, first), batch_of(patches, first)))


def test_a_store_goes_where_it_is_told(tmp_path, files):
    store = build(files, tmp_path / "cache")
    there = store.to("cpu")
    assert torch.equal(there.pixels, store.pixels) and there.names == store.names and there.file == store.file
    assert data.Patches(store, 4, 2).device == torch.device("cpu")


# ------------------------------------------------------------------------------------------------ the embedded pictures
def test_the_embedded_pictures_are_there_and_decode():
    names = data.EMBEDDED_TRAIN + data.EMBEDDED_VAL
    for path in data.embedded(names):
        image = data.read_image(path)
        assert image.ndim == 3 and image.shape[2] == 3 and min(image.shape[:2]) >= 48 * 4 and image.std() > 5, path


def test_training_and_validation_pictures_are_disjoint():
    assert not set(data.EMBEDDED_TRAIN) & set(data.EMBEDDED_VAL)
    assert len(set(data.EMBEDDED_TRAIN)) == len(data.EMBEDDED_TRAIN) and len(set(data.EMBEDDED_VAL)) == len(data.EMBEDDED_VAL)


def test_an_embedded_picture_that_a_version_lacks_is_named():
    with pytest.raises(data.DataError) as error:
        data.embedded(["chelsea.png", "nowhere.png"])
    one_line(error, "nowhere.png", "--data")
