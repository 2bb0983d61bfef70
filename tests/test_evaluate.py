"""Metrics against hand-computed values, tiles against the whole picture, and the command line."""
import functools
import json
import math
import shutil
import types
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageCms  # imageio brings it

import data
import evaluate
import models
from samples import error_lines, noise, save


def smooth(h, w, channels=3, seed=0):
    """A picture (h,w,channels) with edges four pixels apart."""
    return data.imresize(noise(h // 4 + 1, w // 4 + 1, channels, seed=seed), 4)[:h, :w]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two ×4 networks, and a folder of three pictures."""
    base = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    models.save(base / "a.pt", models.build("edsr_c8b2", 4))
    models.save(base / "b.pt", models.build("edsr_c4b1", 4))
    (base / "set").mkdir()
    for i, (name, h, w) in enumerate((("baby", 45, 50), ("bird", 40, 64), ("head", 64, 41))):
        iio.imwrite(base / "set" / f"{name}.png", smooth(h, w, seed=i))
    return base


def run(capsys, *words):
    """What evaluate.py prints."""
    evaluate.main([*map(str, words), "--device", "cpu"])
    return capsys.readouterr().out


def error(capsys, *words):
    return error_lines(evaluate.main, [*words, "--device", "cpu"], capsys)[-1]


def test_uint8_luma_and_psnr_by_hand():
    """uint8 is rounded half up. A step of 255 in RGB is 219 in Y. One of the 4 pixels inside the border has
    it: the MSE is 219²/4."""
    x = torch.tensor([-1.0, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 9.0]).view(1, 1, 1, 6).repeat(1, 3, 1, 1)
    assert evaluate.to_uint8(x)[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]
    image = noise(300, 5, 3)
    assert np.array_equal(evaluate.to_uint8(evaluate.to_tensor(image)), image)
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    assert evaluate.luma(colours)[0] == pytest.approx([16, 235, 81.481, 144.553, 40.966])
    hr = np.zeros((6, 6, 3), np.uint8)
    sr = hr.copy()
    sr[2, 3] = 255
    sr[0, 0] = sr[5, 5] = 255  # in the border
    assert evaluate.psnr_y(sr, hr, 2) == pytest.approx(10 * math.log10(255 ** 2 / (219 ** 2 / 4)))
    assert evaluate.psnr_y(hr, hr, 2) == math.inf
    assert evaluate.psnr_y(hr + np.uint8(1), hr, 0) == pytest.approx(20 * math.log10(255 / (219 / 255)))


def test_ssim_against_its_definition():
    """Wang et al. (2004): the mean over the places of an 11×11 Gaussian window of σ 1.5."""
    hr = smooth(30, 26)
    sr = np.clip(hr + noise(30, 26, 3, seed=1, high=40).astype(int) - 20, 0, 255).astype(np.uint8)
    inside = [evaluate.luma(picture)[3:-3, 3:-3] for picture in (sr, hr)]
    p, q = (np.lib.stride_tricks.sliding_window_view(plane, (11, 11)) for plane in inside)
    i = np.arange(11) - 5
    weights = np.exp(-(i[:, None] ** 2 + i ** 2) / (2 * 1.5 ** 2))
    mean = lambda windows: (windows * weights).sum((2, 3)) / weights.sum()
    covariance = mean(p * q) - mean(p) * mean(q)
    variances = mean(p * p) - mean(p) ** 2 + mean(q * q) - mean(q) ** 2
    luminance = (2 * mean(p) * mean(q) + 2.55 ** 2) / (mean(p) ** 2 + mean(q) ** 2 + 2.55 ** 2)
    expected = np.mean(luminance * (2 * covariance + 7.65 ** 2) / (variances + 7.65 ** 2))
    assert evaluate.ssim_y(sr, hr, 3) == pytest.approx(expected, abs=1e-6)
    assert evaluate.ssim_y(hr, hr, 3) == pytest.approx(1)


@pytest.mark.parametrize("grey", [False, True])
def test_published_bicubic_resizes_the_rounded_luma_alone(tmp_path, grey):
    """A picture of one channel keeps its own values, which are not put on 16–235."""
    hr = skimage.data.astronaut()[:64, :80]
    expected = np.floor(evaluate.luma(hr) + 0.5)
    if grey:
        hr, expected = hr[..., 0], hr[..., 0].astype(float)
    up = data.imresize(data.imresize(torch.from_numpy(expected), 0.25), 4)
    up = (up.clamp(0, 255) + 0.5).floor().numpy()
    path = save(hr, tmp_path / "a.png")
    sr, plane = evaluate.published_bicubic(path, data.read_image(path), 4)
    assert np.array_equal(plane, expected) and np.array_equal(sr, up)
    mse = np.square(up - expected)[4:-4, 4:-4].mean()
    assert evaluate.psnr_y(sr, plane, 4) == pytest.approx(10 * math.log10(255 ** 2 / mse))


@pytest.mark.parametrize("name, scale, h, w, tile", [
    ("edsr_c4b2", 2, 1, 90, 8), ("edsr_c4b2", 3, 90, 1, 16), ("edsr_c4b2", 4, 57, 64, 9),
    ("edsr_c4b2", 2, 33, 80, 48), ("swinir_c12s6", 2, 150, 40, 64), ("rcan_c16b2g2", 2, 150, 40, 64)])
def test_tiles_of_edsr_equal_the_whole_picture_and_others_leave_no_seam(name, scale, h, w, tile):
    torch.manual_seed(0)
    net, x = models.build(name, scale).eval(), torch.rand(2, 3, h, w)
    whole, tiled = (evaluate.upscale(net, x, t) for t in (0, tile))
    difference = (whole - tiled).abs().max()
    assert whole.shape == (2, 3, h * scale, w * scale)
    assert difference < 2e-5 if "edsr" in name else 0 < difference < 1 / 255
    jump = lambda y: (y[..., 1:, :] - y[..., :-1, :]).abs().mean(dim=(0, 1, 3))
    assert (jump(tiled) - jump(whole)).abs().max() < 1e-3


def test_tiles_fade_evenly_on_both_sides_of_their_border_and_tables_are_of_whole_pictures():
    """Cores of 32 pixels. A tile's weight falls from 1, 16 pixels before its border, to 0, 16 behind it."""
    first, second = evaluate.tiles_along(64, 32, types.SimpleNamespace(receptive_radius=None, scale=2))
    assert first[:2] == (0, 64) and second[:2] == (0, 64)
    position = (np.arange(128) + 0.5) / 2  # of HR pixels' centres, in LR pixels
    assert np.allclose(first[2], ((48 - position) / 32).clip(0, 1), atol=1e-6)
    assert np.allclose(second[2], first[2].flip(0), atol=1e-6)
    assert evaluate.parse(["x.pt", "--data", "Set5"]).tile == 0
    assert evaluate.parse(["x.pt", "--data", "Set5", "--tile", "64"]).tile == 64
    assert evaluate.parse(["x.pt", "--input", "a.png", "--output", "b.png"]).tile == 256


def test_self_ensemble_by_hand():
    """f keeps the top row and blanks the rest: each edge is kept by 2 of 8 turns, each corner by 4."""
    x = torch.ones(1, 1, 3, 3)
    keep = torch.tensor([1.0, 0, 0]).view(1, 1, 3, 1)
    expected = torch.tensor([[4.0, 2, 4], [2, 0, 2], [4, 2, 4]]) / 8
    assert torch.equal(evaluate.mean_of_eight(lambda y: y * keep, x)[0, 0], expected)
    picture = torch.rand(1, 3, 5, 8)
    assert torch.allclose(evaluate.mean_of_eight(lambda y: y, picture), picture)


def test_table_json_and_figure(place, capsys, tmp_path, monkeypatch):
    file, words = tmp_path / "new" / "t.json", [place / "a.pt", "bicubic", "--data", place / "set"]
    out = run(capsys, *words, "--json", file, "--figure", tmp_path / "f.png")
    head, *lines = out.splitlines()
    assert head.startswith("model") and head.endswith(f"{place / 'set'} (3) PSNR/SSIM")
    assert [x.split()[0] for x in lines] == [str(place / "a.pt"), "bicubic"]
    report = json.loads(file.read_text())
    row = report["results"][str(place / "a.pt")][str(place / "set")]
    assert {"command", "git", "device", "versions"} <= report.keys()
    assert {*row["images"]} == {"baby", "bird", "head"}
    for key in ("psnr", "ssim"):
        assert row[key] == pytest.approx(np.mean([image[key] for image in row["images"].values()]))
    assert lines[0].split()[-1] == f"{row['psnr']:.2f}/{row['ssim']:.4f}"
    lr, hr = data.read_pair(place / "set" / "baby.png", 4)  # 45×50, cropped to 44×48
    sr = evaluate.to_uint8(models.load(place / "a.pt")(evaluate.to_tensor(lr)).detach())
    assert row["images"]["baby"]["psnr"] == pytest.approx(evaluate.psnr_y(sr, hr, 4), abs=1e-3)
    bicubic = report["results"]["bicubic"][str(place / "set")]["images"]["bird"]
    bird = place / "set" / "bird.png"
    expected = evaluate.published_bicubic(bird, data.read_pair(bird, 4)[1], 4)
    assert bicubic["psnr"] == pytest.approx(evaluate.psnr_y(*expected, 4))
    figure = iio.imread(tmp_path / "f.png")
    assert figure.shape == (3 * 44 + 64, 3 * (3 * 44 + 6) - 6, 3)  # of the first picture
    assert np.array_equal(figure[:132:3, :132:3], hr[:, :44])
    monkeypatch.setattr(evaluate, "score", None)  # a file that cannot be written is refused before it scores
    assert "set" in error(capsys, *words, "--json", place / "set")


def test_pictures_of_one_name_count_each(tmp_path):
    """As where several folders are held out."""
    pictures = [(Path(folder) / "1.png", np.zeros((4, 4, 3)), noise(16, 16, 3, seed=i))
                for i, folder in enumerate("ab")]
    upscaler = lambda lr: noise(16, 16, 3, seed=9)
    means = [evaluate.score(upscaler, part, 4, "", metrics=dict(psnr=evaluate.psnr_y))["psnr"]
             for part in (pictures, pictures[:1], pictures[1:])]
    assert means[0] == pytest.approx((means[1] + means[2]) / 2) and means[1] != means[2]


def test_against_scores_with_the_pictures_of_that_model(place, capsys, tmp_path):
    """JSON stays JSON: there is no infinity in it for equal pictures."""
    file, bird = tmp_path / "t.json", place / "set" / "bird.png"
    lr = data.read_pair(bird, 4)[0]
    upscalers = {"bicubic": functools.partial(data.imresize, factor=4)}
    for name in (place / "a.pt", place / "b.pt"):
        upscalers[str(name)] = evaluate.network_upscaler(models.load(name))
    for against in upscalers:
        out = run(capsys, *upscalers, "--against", against, "--data", place / "set", "--json", file)
        assert out.splitlines()[0].endswith(f"PSNR/SSIM, against {against}") and "inf/1.0000" in out
        assert "Infinity" not in file.read_text()
        for name, scores in json.loads(file.read_text())["results"].items():
            psnr = scores[str(place / "set")]["images"]["bird"]["psnr"]
            expected = evaluate.psnr_y(upscalers[name](lr), upscalers[against](lr), 4)
            assert psnr is None if name == against else psnr == pytest.approx(expected, abs=1e-3)


def test_bench_takes_turns(place, capsys, monkeypatch):
    turns = []
    monkeypatch.setattr(models.EDSR, "forward", lambda net, x: turns.append((net, x.shape)) or x)
    out = run(capsys, place / "a.pt", place / "b.pt", "--bench", "3", "--precision", "bfloat16")
    a, b = map(json.loads, out.splitlines())
    assert [a["model"], b["model"]] == [str(place / "a.pt"), str(place / "b.pt")]
    assert [net for net, _ in turns] == [turns[0][0], turns[1][0]] * 5 and turns[0][0] is not turns[1][0]
    assert {shape for _, shape in turns} == {(1, 3, 180, 320)}
    assert (a["input"], a["turns"], a["precision"]) == ([320, 180], 3, "bfloat16") and a["ms"] > 0


def test_figure_shows_one_crop_of_each_picture():
    """The only texture lies at rows and columns 160 to 255: bicubic errs most there."""
    hr = np.full((320, 320, 3), 128, np.uint8)
    hr[160:256, 160:256] = noise(96, 96, 3)
    other = hr // 2
    picture = evaluate.figure({"HR": hr, "half": other}, 4)
    assert picture.shape == (288 + 64, 2 * 288 + 6, 3) and picture.dtype == np.uint8
    for left, image in ((0, hr), (294, other)):
        crop = image[160:256, 160:256].repeat(3, 0).repeat(3, 1)
        assert np.array_equal(picture[:288, left:left + 288], crop)
    assert (picture[288:, :288] < 100).any() and (picture[288 + 32:, :288] == 255).all()  # HR has no PSNR
    assert (picture[288 + 32:, 294:] < 100).any()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_upscaled_pictures_are_rgb(place, capsys, tmp_path, channels):
    """Grey becomes three equal channels, which a network may tint. Alpha is left out."""
    image = smooth(20, 24, channels)
    save(image[..., 0] if channels == 1 else image, tmp_path / "in.png")
    run(capsys, place / "a.pt", "--input", tmp_path / "in.png", "--output", tmp_path / "new" / "out.png")
    big = iio.imread(tmp_path / "new" / "out.png")
    rgb = image[..., :3] if channels > 2 else image[..., :1].repeat(3, 2)
    whole = models.load(place / "a.pt")(evaluate.to_tensor(rgb)).detach()
    assert big.shape == (80, 96, 3) and np.abs(big.astype(int) - evaluate.to_uint8(whole)).max() <= 1


def test_a_folder_is_upscaled_but_for_bad_and_finished_pictures(place, capsys, tmp_path):
    source = shutil.copytree(place / "set", tmp_path / "in")
    big, long = tmp_path / "big", "a" * 250  # it comes first
    shutil.copy(source / "baby.png", source / f"{long}.png")
    for name in ("bad1.png", "bird.png"):
        (source / name).write_text("text")
    words = [place / "a.pt", "--input", source, "--output", big, "--self-ensemble", "--tile", 8]
    line = error(capsys, *words)
    assert "bad1.png is not a readable image" in line and "bird.png is not a readable image" in line
    assert f"{long}_x4.png cannot be written: File name too long" in line
    assert sorted(path.name for path in big.iterdir()) == ["baby_x4.png", "head_x4.png"]
    for name in ("bad1.png", f"{long}.png"):
        (source / name).unlink()
    shutil.copy(place / "set" / "bird.png", source)
    (big / "head_x4.png").write_text("kept")
    evaluate.main([*map(str, words)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert lines == [f"note: {big / name}_x4.png exists already and is kept" for name in ("baby", "head")]
    assert (big / "head_x4.png").read_text() == "kept"
    assert iio.imread(big / "bird_x4.png").shape == (160, 256, 3)


def test_an_error_has_a_line_of_its_own(place, capsys, tmp_path):
    """Also behind pictures that are kept, and behind a progress bar, which is cleared."""
    source = shutil.copytree(place / "set", tmp_path / "in")
    (source / "bad.png").write_text("text")
    words = [place / "a.pt", "--input", source, "--output", tmp_path / "out"]
    for _ in range(2):
        lines = error_lines(evaluate.main, words, capsys)
        assert not [line for line in lines if "error: " in line[1:]]
    with pytest.raises(SystemExit), evaluate.command_line():
        steps = iter(evaluate.tqdm(range(9), mininterval=0))
        next(steps)
        raise models.InputError("what is wrong")
    assert capsys.readouterr().err.endswith("\rerror: what is wrong\n")


@pytest.mark.parametrize("shape, file", [((1, 4100, 3), "out.webp"), ((16400, 1, 3), "out.gif")])
def test_what_a_format_cannot_hold_is_refused_first(place, capsys, tmp_path, monkeypatch, shape, file):
    monkeypatch.setattr(evaluate, "upscale", None)  # a call would fail
    source = save(noise(*shape), tmp_path / "in.png")
    line = error(capsys, place / "a.pt", "--input", source, "--output", tmp_path / file)
    assert f"{file} cannot be written" in line and "A .png holds any picture" in line
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


def test_outputs_are_files_or_folders_as_the_input_is(place, capsys, tmp_path):
    """In the folder of the pictures, results are passed over."""
    baby, own = place / "set" / "baby.png", shutil.copytree(place / "set", tmp_path / "own")
    for source, out, made in [(place / "set", "out_v1.0", 3), (baby, "out", 1), (baby, "out_v1.0", 3),
                              (own, "own", 3), (own, "own", 3)]:
        run(capsys, place / "a.pt", "--input", source, "--output", tmp_path / out)
        assert len(list((tmp_path / out).glob("*_x4.png"))) == made
    longest = "l" * 246 + "_x4.png"  # 253 letters: nothing longer is written on the way
    for name in ("big.png", longest):
        run(capsys, "bicubic", "--scale", "4", "--input", baby, "--output", tmp_path / name)
        assert np.array_equal(iio.imread(tmp_path / name), data.imresize(iio.imread(baby), 4))
    words = [place / "a.pt", "--input", place / "set", "--output", tmp_path / "big.png"]
    assert "big.png" in error(capsys, *words)


@pytest.mark.parametrize("ending", ["jpg", "jp2", "webp", "avif"])
def test_lossy_formats_are_written_nearly_without_loss(tmp_path, ending):
    if f".{ending}" not in Image.registered_extensions():
        pytest.skip(f"this Pillow does not know .{ending}")
    image = smooth(64, 64)
    (tmp_path / f"a.{ending}").write_bytes(evaluate.encoded(f"a.{ending}", image))
    assert evaluate.psnr_y(data.read_image(tmp_path / f"a.{ending}"), image, 0) > 40


RGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CMYK_PROFILE = bytes(16) + b"CMYK" + bytes(108)


@pytest.mark.parametrize("source, mode, profile, target, kept", [
    *(("a.png", "RGB", RGB_PROFILE, f"b.{ending}", RGB_PROFILE) for ending in ("png", "jpg", "tif", "webp")),
    ("a.png", "RGB", RGB_PROFILE, "b.bmp", None), ("a.jpg", "CMYK", CMYK_PROFILE, "b.png", None)])
def test_a_colour_profile_is_kept_where_it_fits(place, capsys, tmp_path, source, mode, profile, target, kept):
    """A .bmp has none. A CMYK picture becomes RGB."""
    save(noise(20, 24, 3), tmp_path / source, mode, icc_profile=profile)
    run(capsys, place / "a.pt", "--input", tmp_path / source, "--output", tmp_path / target)
    with Image.open(tmp_path / target) as written:
        assert written.mode == "RGB" and written.info.get("icc_profile") == kept


@pytest.mark.parametrize("kind, text, ends", [
    (MemoryError, "", True),
    (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", True),
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 9 GiB", True),
    (RuntimeError, "mat1 and mat2 shapes cannot be multiplied", False)])
def test_only_an_error_of_memory_is_called_so(capsys, kind, text, ends):
    with pytest.raises(SystemExit if ends else kind), evaluate.command_line():
        raise kind(text)
    assert ends == ("error: out of memory" in capsys.readouterr().err)
