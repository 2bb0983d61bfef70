"""Metrics against hand-computed values, tiles against the whole picture, and the command line."""
import json
import math
import os
import shutil
import subprocess
import sys
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
from samples import noise, save

PROGRAMS = ["evaluate.py", "train.py"]


def smooth(h, w, channels=3, seed=0):
    """A picture (h,w,channels) with edges four pixels apart."""
    return data.imresize(noise(h // 4 + 1, w // 4 + 1, channels, seed=seed), 4)[:h, :w]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two ×4 networks, a ×2 one, and a folder of three pictures."""
    base = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    for name, spelled, scale in (("a", "edsr_c8b2", 4), ("b", "edsr_c4b1", 4), ("x2", "edsr_c4b1", 2)):
        models.save(base / f"{name}.pt", models.build(spelled, scale))
    (base / "set").mkdir()
    for i, (name, h, w) in enumerate((("baby", 45, 50), ("bird", 40, 64), ("head", 64, 41))):
        iio.imwrite(base / "set" / f"{name}.png", smooth(h, w, seed=i))
    return base


def run(capsys, *words):
    """What evaluate.py prints."""
    evaluate.main([*map(str, words), "--device", "cpu"])
    return capsys.readouterr().out


def error(capsys, *words):
    """The one line that evaluate.py ends with."""
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*map(str, words), "--device", "cpu"])
    text = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(text) == 1
    return text[0]


def test_luma_is_bt601():
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    assert evaluate.luma(colours)[0] == pytest.approx([16, 235, 81.481, 144.553, 40.966])


def test_psnr_by_hand():
    """A step of 255 in RGB is 219 in Y. One of the 4 pixels inside the border has it: the MSE is 219²/4."""
    hr = np.zeros((6, 6, 3), np.uint8)
    sr = hr.copy()
    sr[2, 3] = 255
    sr[0, 0] = sr[5, 5] = 255  # in the border
    assert evaluate.psnr_y(sr, hr, 2) == pytest.approx(10 * math.log10(255 ** 2 / (219 ** 2 / 4)))
    assert evaluate.psnr_y(hr, hr, 2) == math.inf
    assert evaluate.psnr_y(hr + np.uint8(1), hr, 0) == pytest.approx(20 * math.log10(255 / (219 / 255)))


def slow_ssim(a, b):
    """Wang et al. (2004) as written: an 11×11 Gaussian window of σ 1.5, at each place where it fits."""
    i = np.arange(11) - 5
    weights = np.exp(-(i[:, None] ** 2 + i ** 2) / (2 * 1.5 ** 2))
    weights, values = weights / weights.sum(), []
    mean = lambda p: (weights * p).sum()
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y:y + 11, x:x + 11], b[y:y + 11, x:x + 11]
            covariance = mean(p * q) - mean(p) * mean(q)
            variances = mean(p * p) - mean(p) ** 2 + mean(q * q) - mean(q) ** 2
            luminance = (2 * mean(p) * mean(q) + 2.55 ** 2) / (mean(p) ** 2 + mean(q) ** 2 + 2.55 ** 2)
            values.append(luminance * (2 * covariance + 7.65 ** 2) / (variances + 7.65 ** 2))
    return np.mean(values)


def test_ssim_against_its_definition():
    hr = smooth(30, 26)
    sr = np.clip(hr + noise(30, 26, 3, seed=1, high=40).astype(int) - 20, 0, 255).astype(np.uint8)
    expected = slow_ssim(*(evaluate.luma(p)[3:-3, 3:-3] for p in (sr, hr)))
    assert evaluate.ssim_y(sr, hr, 3) == pytest.approx(expected, abs=1e-6)
    assert evaluate.ssim_y(hr, hr, 3) == pytest.approx(1)


@pytest.mark.parametrize("grey", [False, True])
def test_published_bicubic_resizes_the_rounded_luma_alone(tmp_path, grey):
    """A picture of one channel keeps its own values. One of three equal channels is put on 16–235."""
    hr = skimage.data.astronaut()[:64, :80]
    expected = np.floor(evaluate.luma(hr) + 0.5)
    if grey:
        hr, expected = hr[..., 0], hr[..., 0].astype(float)
    y = torch.from_numpy(expected)
    up = data.imresize(data.imresize(y, 0.25), 4).clamp(0, 255)
    sr, plane = evaluate.published_bicubic(path := save(hr, tmp_path / "a.png"), data.read_image(path), 4)
    assert np.array_equal(plane, expected) and np.array_equal(sr, torch.floor(up + 0.5).numpy())
    mse = ((up + 0.5).floor() - y)[4:-4, 4:-4].square().mean().item()
    assert evaluate.psnr_y(sr, plane, 4) == pytest.approx(10 * math.log10(255 ** 2 / mse))
    if grey:
        as_rgb = save(np.stack([hr] * 3, axis=2), tmp_path / "b.png")
        assert np.array_equal(evaluate.published_bicubic(as_rgb, data.read_image(as_rgb), 4)[1], np.floor(expected * 219 / 255 + 16.5))


def test_to_uint8_rounds_half_up_and_clips():
    x = torch.tensor([-1.0, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 9.0]).view(1, 1, 1, 6).repeat(1, 3, 1, 1)
    assert evaluate.to_uint8(x)[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]
    image = noise(300, 5, 3)
    assert np.array_equal(evaluate.to_uint8(evaluate.to_tensor(image)), image)


@pytest.mark.parametrize("h,w,tile,scale", [(1, 90, 8, 2), (90, 1, 16, 3), (57, 64, 9, 4), (33, 80, 48, 2)])
def test_edsr_in_tiles_equals_the_whole_picture(h, w, tile, scale):
    torch.manual_seed(0)
    net, x = models.build("edsr_c4b2", scale).eval(), torch.rand(2, 3, h, w)
    whole, tiled = (evaluate.upscale(net, x, t) for t in (0, tile))
    assert whole.shape == (2, 3, h * scale, w * scale) and torch.allclose(whole, tiled, atol=2e-5)


@pytest.mark.parametrize("name", ["swinir_c12s6", "rcan_c16b2g2"])
def test_tiles_leave_no_seam_where_the_network_sees_farther(name):
    torch.manual_seed(0)
    net, x = models.build(name, 2).eval(), torch.rand(1, 3, 150, 40)
    whole, tiled = (evaluate.upscale(net, x, t) for t in (0, 64))
    assert 0 < (whole - tiled).abs().max() < 1 / 255
    jump = lambda y: (y[..., 1:, :] - y[..., :-1, :]).abs().mean(dim=(0, 1, 3))
    assert (jump(tiled) - jump(whole)).abs().max() < 1e-3


def test_no_tile_is_larger_than_its_core_and_margins():
    net, sizes = models.build("edsr_c4b1", 2).eval(), []
    net.register_forward_hook(lambda module, inputs, y: sizes.append(max(inputs[0].shape[-2:])))
    evaluate.upscale(net, torch.rand(1, 3, 300, 200), 64)
    assert len(sizes) == 5 * 4 and max(sizes) == 64 + 2 * net.receptive_radius


def test_self_ensemble_by_hand():
    """f keeps the top row and blanks the rest: each edge is kept by 2 of 8 turns, each corner by 4."""
    x = torch.ones(1, 1, 3, 3)
    keep = torch.tensor([1.0, 0, 0]).view(1, 1, 3, 1)
    expected = torch.tensor([[4.0, 2, 4], [2, 0, 2], [4, 2, 4]]) / 8
    assert torch.equal(evaluate.mean_of_eight(lambda y: y * keep, x)[0, 0], expected)
    picture = torch.rand(1, 3, 5, 8)
    assert torch.allclose(evaluate.mean_of_eight(lambda y: y, picture), picture)


def test_table_and_json(place, capsys, tmp_path):
    file = tmp_path / "new" / "t.json"
    out = run(capsys, place / "a.pt", "bicubic", "--data", place / "set", "--json", file)
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


def test_pictures_of_other_tools_are_scored(place, capsys, tmp_path):
    """One grey level is 49.45 dB, a little more where white gets less. The file names are those of tools."""
    files = [("baby", "babyx4"), ("baby", "baby_old"), ("bird", "bird_x4"), ("head", "head_MYNET_x4")]
    for name, file in files:
        hr = data.pair(data.read_image(place / "set" / f"{name}.png"), 4)[1]
        near = np.where(hr < 255, hr + 1, hr - 1) if file != "baby_old" else hr * 0
        iio.imwrite(tmp_path / f"{file}.png", near.astype(np.uint8))
    words = ["--sr", tmp_path, "--data", place / "set", "--scale", "4"]
    out = run(capsys, *words)
    assert float(out.splitlines()[1].split()[-1].split("/")[0]) == pytest.approx(49.45, abs=0.05)
    (tmp_path / "bird_x4.png").unlink()
    assert "no picture for bird" in error(capsys, *words)
    iio.imwrite(tmp_path / "bird.png", noise(8, 8, 3))
    assert "(8, 8, 3)" in error(capsys, *words)


@pytest.mark.parametrize("files", [("head_bicubic.png", "head_mine.png"), ("head.png", "headx2.png")])
def test_two_results_for_one_picture_are_refused(place, capsys, tmp_path, files):
    for file in files:
        iio.imwrite(tmp_path / file, data.read_image(place / "set" / "head.png")[:, :40])
    line = error(capsys, "--sr", tmp_path, "--data", place / "set" / "head.png", "--scale", "2")
    assert f"{files[0]} and {files[1]} for head" in line


@pytest.mark.parametrize("files, found", [
    (["coffeex4_x4", "night_sky_x4", "night_x4"], ["coffeex4_x4", "night_x4", "night_sky_x4"]),
    (["coffeex4_SwinIR", "nightx4", "night_sky", "night_old"], ["coffeex4_SwinIR", "nightx4", "night_sky"]),
    (["coffee_x4", "coffee_other", "night_sky_a_b", "night_a_b"], ["coffee_x4", "night_a_b", "night_sky_a_b"]),
    (["coffee", "night_sky_x4"], ["coffee", None, "night_sky_x4"]), (["coffees_x4", "nightx2", "x4"], [None] * 3)])
def test_results_are_found_by_name(tmp_path, files, found):
    """Exact forms count first. What is another picture's never counts: night_sky_x4 is not night's."""
    for i, file in enumerate(files):
        iio.imwrite(tmp_path / f"{file}.png", np.full((4, 4, 3), i, np.uint8))
    make = evaluate.reader(tmp_path, 4, ["coffee", "night", "night_sky"])
    for name, file in zip(("coffee", "night", "night_sky"), found):
        if file:
            assert make(Path(name), np.zeros((1, 1, 3)))[0, 0, 0] == files.index(file)
        else:
            with pytest.raises(data.DataError, match=f"no picture for {name}: it needs one"):
                make(Path(name), np.zeros((1, 1, 3)))


def test_a_json_that_cannot_be_written_ends_before_the_scoring(place, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "score", lambda *rest: pytest.fail("it has scored"))
    assert "set" in error(capsys, "bicubic", "--data", place / "set", "--scale", "4", "--json", place / "set")


def test_json_stays_json_for_equal_pictures(place, capsys, tmp_path):
    file = tmp_path / "t.json"
    out = run(capsys, place / "a.pt", "--against", place / "a.pt", "--data", place / "set", "--json", file)
    text = file.read_text()
    row = json.loads(text)["results"][str(place / "a.pt")][str(place / "set")]
    assert "Infinity" not in text and "inf/1.0000" in out
    assert row["psnr"] is None and row["images"]["baby"]["psnr"] is None


def test_against_scores_with_the_pictures_of_that_model(place, capsys, tmp_path):
    file, words = tmp_path / "t.json", ["--data", place / "set", "--json", tmp_path / "t.json"]
    for against in ("bicubic", place / "b.pt"):
        out = run(capsys, place / "a.pt", "bicubic", "--against", against, *words)
        assert out.splitlines()[0].endswith(f"PSNR/SSIM, against {against}")
        make = evaluate.resizer(4) if against == "bicubic" else evaluate.upscaler(models.load(against))
        results = json.loads(file.read_text())["results"]
        lr = data.read_pair(place / "set" / "bird.png", 4)[0]
        for label, own in ((place / "a.pt", evaluate.upscaler(models.load(place / "a.pt"))),
                           ("bicubic", evaluate.resizer(4))):
            psnr = results[str(label)][str(place / "set")]["images"]["bird"]["psnr"]
            expected = evaluate.psnr_y(own("", lr), make("", lr), 4)
            assert psnr == pytest.approx(expected, abs=1e-3) if expected < math.inf else psnr is None


def test_mean_psnr_of_a_maker():
    pictures = [(f"{i}", *data.pair(smooth(40, 48, seed=i), 4)) for i in range(20)]
    expected = np.mean([evaluate.psnr_y(data.imresize(lr, 4), hr, 4) for _, lr, hr in pictures])
    assert evaluate.mean_psnr(evaluate.resizer(4), pictures, 4, "bicubic") == pytest.approx(expected)


def test_bench_takes_turns(place, capsys, monkeypatch):
    turns = []
    monkeypatch.setattr(models.EDSR, "forward", lambda net, x: turns.append((net, x.shape)) or x)
    out = run(capsys, place / "a.pt", place / "b.pt", "--bench", "3", "--precision", "bfloat16")
    a, b = map(json.loads, out.splitlines())
    assert [a["model"], b["model"]] == [str(place / "a.pt"), str(place / "b.pt")]
    assert [net for net, _ in turns] == [turns[0][0], turns[1][0]] * 5 and turns[0][0] is not turns[1][0]
    assert {shape for _, shape in turns} == {(1, 3, 180, 320)}
    assert a["input"] == [320, 180] and a["turns"] == 3
    assert a["ms"] > 0 and a["precision"] == "bfloat16"


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


def test_figure_shows_the_first_picture(place, capsys, tmp_path):
    run(capsys, place / "a.pt", "bicubic", "--data", place / "set", "--figure", tmp_path / "f.png")
    picture, hr = iio.imread(tmp_path / "f.png"), data.read_pair(place / "set" / "baby.png", 4)[1]
    assert picture.shape == (3 * 44 + 64, 3 * (3 * 44 + 6) - 6, 3)
    assert np.array_equal(picture[:132:3, :132:3], hr[:, :44])


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


def test_a_folder_is_upscaled_and_finished_pictures_are_kept(place, capsys, tmp_path):
    big = tmp_path / "big"
    words = [place / "a.pt", "--input", place / "set", "--output", big, "--self-ensemble", "--tile", 8]
    run(capsys, *words)
    assert sorted(path.name for path in big.iterdir()) == ["baby_x4.png", "bird_x4.png", "head_x4.png"]
    (big / "bird_x4.png").unlink()
    (big / "head_x4.png").write_text("kept")
    lines = run(capsys, *words).splitlines()
    assert lines == [f"{big / name}_x4.png exists already and is kept" for name in ("baby", "head")]
    assert (big / "head_x4.png").read_text() == "kept"
    assert iio.imread(big / "bird_x4.png").shape == (160, 256, 3)


def test_bad_pictures_do_not_stop_the_others(place, capsys, tmp_path):
    shutil.copytree(place / "set", tmp_path / "in")
    for name in ("bad1.png", "bird.png"):
        (tmp_path / "in" / name).write_text("text")
    line = error(capsys, place / "a.pt", "--input", tmp_path / "in", "--output", tmp_path / "big")
    assert "bad1.png is not a readable image" in line and "bird.png is not a readable image" in line
    assert "2 of 4 pictures cannot be used" in line
    assert sorted(path.name for path in (tmp_path / "big").iterdir()) == ["baby_x4.png", "head_x4.png"]


def test_two_pictures_of_one_name_are_refused(place, capsys, tmp_path):
    for name in ("a.png", "a.bmp"):
        iio.imwrite(tmp_path / name, smooth(32, 32))
    assert "one picture twice" in error(capsys, place / "a.pt", "--data", tmp_path)
    assert "same name" in error(capsys, place / "a.pt", "--input", tmp_path, "--output", tmp_path / "big")
    assert not (tmp_path / "big").exists()


@pytest.mark.parametrize("shape, file, reason", [
    ((1, 4100, 3), "out.webp", "A .png holds any picture"),
    ((16400, 1, 3), "out.gif", "A .png holds any picture"),
    ((20, 24, 3), "out.xyz", "its ending names no known format"),
    ((20, 24, 3), "out.psd", "its ending names no known format")])
def test_what_a_format_cannot_hold_is_refused_before_the_work(place, capsys, tmp_path, monkeypatch,
                                                             shape, file, reason):
    monkeypatch.setattr(evaluate, "upscale", None)  # a call would fail
    iio.imwrite(tmp_path / "in.png", noise(*shape))
    line = error(capsys, place / "a.pt", "--input", tmp_path / "in.png", "--output", tmp_path / file)
    assert f"{file} cannot be written" in line and reason in line
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


def test_errors_of_a_writer_are_one_line(tmp_path):
    sizes = {"a.webp": (1, 16384, 3), "a.gif": (1, 65536, 3), "a.psd": (8, 8, 3), "a": (8, 8, 3)}
    for file, shape in sizes.items():
        with pytest.raises(data.DataError, match=f"{file} cannot be written"):
            evaluate.write_picture(tmp_path / file, np.zeros(shape, np.uint8))
    assert not any(tmp_path.iterdir())


def test_outputs_are_files_or_folders_as_the_input_is(place, capsys, tmp_path):
    baby = place / "set" / "baby.png"
    run(capsys, place / "a.pt", "--input", baby, "--output", tmp_path / "big.jp2")
    assert (tmp_path / "big.jp2").is_file()
    assert "exists already and is kept" in run(capsys, place / "a.pt", "--input", baby, "--output", tmp_path / "big.jp2")
    for source, out, made in [(place / "set", "out_v1.0", 3), (baby, "out", 1), (baby, "out_v1.0", 3)]:
        run(capsys, place / "a.pt", "--input", source, "--output", tmp_path / out)
        assert len(list((tmp_path / out).glob("*_x4.png"))) == made
    assert "big.jp2" in error(capsys, place / "a.pt", "--input", place / "set", "--output", tmp_path / "big.jp2")


@pytest.mark.parametrize("ending", ["jpg", "webp", "avif"])
def test_lossy_formats_are_written_nearly_without_loss(tmp_path, ending):
    image = smooth(64, 64)
    evaluate.write_picture(tmp_path / f"a.{ending}", image)
    assert evaluate.psnr_y(data.read_image(tmp_path / f"a.{ending}"), image, 0) > 40


@pytest.mark.parametrize("file", ["out.png", "out.jpg", "out.tif", "out.webp", "out.bmp"])
def test_the_colour_profile_is_kept(place, capsys, tmp_path, file):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    save(noise(20, 24, 3), tmp_path / "in.png", icc_profile=profile)
    run(capsys, place / "a.pt", "--input", tmp_path / "in.png", "--output", tmp_path / file)
    with Image.open(tmp_path / file) as written:
        assert written.info.get("icc_profile") == (None if file == "out.bmp" else profile)


def test_the_colour_profile_of_a_converted_picture_is_left_out(place, capsys, tmp_path):
    profile = bytes(16) + b"CMYK" + bytes(108)
    save(noise(20, 24, 3), tmp_path / "in.jpg", mode="CMYK", icc_profile=profile)
    run(capsys, place / "a.pt", "--input", tmp_path / "in.jpg", "--output", tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as written:
        assert written.mode == "RGB" and "icc_profile" not in written.info


def test_bicubic_is_a_model_too(place, capsys, tmp_path):
    baby = place / "set" / "baby.png"
    run(capsys, "bicubic", "--scale", "2", "--input", baby, "--output", tmp_path / "b.png")
    lr = data.read_image(baby)
    assert np.array_equal(iio.imread(tmp_path / "b.png"), data.imresize(lr, 2))


def test_bfloat16_is_near(place, capsys, tmp_path):
    made = []
    for kind in ("float32", "bfloat16"):
        words = ["--input", place / "set" / "baby.png", "--output", tmp_path / f"{kind}.png"]
        run(capsys, place / "a.pt", *words, "--precision", kind)
        made.append(iio.imread(tmp_path / f"{kind}.png").astype(int))
    assert 0 < np.abs(made[0] - made[1]).max() < 12


@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "ascii"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_printed_in_any_encoding(program, encoding):
    words = [sys.executable, Path(evaluate.__file__).with_name(program), "--help"]
    done = subprocess.run(words, capture_output=True, env=os.environ | dict(PYTHONIOENCODING=encoding))
    assert done.returncode == 0 and not done.stderr and b"--device" in done.stdout


@pytest.mark.parametrize("kind, text, ends", [
    (MemoryError, "", True),
    (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", True),
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 9 GiB", True),
    (RuntimeError, "mat1 and mat2 shapes cannot be multiplied", False)])
def test_only_an_error_of_memory_is_called_so(capsys, kind, text, ends):
    with pytest.raises(SystemExit if ends else kind), evaluate.command_line():
        raise kind(text)
    assert ends == ("error: out of memory" in capsys.readouterr().err)
