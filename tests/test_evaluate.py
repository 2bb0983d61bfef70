"""Metrics against hand-computed and slow values, tiles against the whole picture, and the command line."""
import json
import math
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import evaluate
import models


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two ×4 networks and a folder of three pictures."""
    base = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    models.save(base / "a.pt", models.build("edsr_c8b2", 4))
    models.save(base / "b.pt", models.build("edsr_c4b1", 4))
    models.save(base / "x2.pt", models.build("edsr_c4b1", 2))
    rng = np.random.default_rng(0)
    (base / "set").mkdir()
    for name, (h, w) in dict(baby=(45, 50), bird=(40, 64), head=(64, 41)).items():
        iio.imwrite(base / "set" / f"{name}.png", picture(rng, h, w))
    return base


def picture(rng, h, w, channels=3):
    coarse = rng.integers(0, 256, (h // 4 + 1, w // 4 + 1, channels), dtype=np.uint8)
    return data.imresize(coarse, 4)[:h, :w]


# ------------------------------------------------------------------------------------------------ metrics
def test_luma_is_bt601():
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    assert evaluate.luma(colours)[0] == pytest.approx([16, 235, 81.481, 144.553, 40.966])


def test_psnr_by_hand():
    """A grey step of 255 in RGB is 219 in Y; on one of the 4 pixels inside the border the MSE is 219²/4."""
    hr = np.zeros((6, 6, 3), np.uint8)
    sr = hr.copy()
    sr[2, 3] = 255
    sr[0, 0] = 255  # in the border: shaved
    assert evaluate.psnr_y(sr, hr, 2) == pytest.approx(10 * math.log10(255 ** 2 / (219 ** 2 / 4)))
    assert evaluate.psnr_y(hr, hr, 2) == math.inf
    one = evaluate.psnr_y(hr + np.uint8(1), hr, 0)  # one grey level everywhere
    assert one == pytest.approx(20 * math.log10(255 / (219 / 255)))


def test_psnr_refuses_what_cannot_be_compared():
    a = np.zeros((8, 8, 3), np.uint8)
    for b, border in ((np.zeros((8, 9, 3), np.uint8), 1), (a, 4)):
        with pytest.raises(ValueError):
            evaluate.psnr_y(a, b, border)


def slow_ssim(a, b):
    """Wang et al. (2004) as written: an 11×11 Gaussian window of σ 1.5, at each place where it fits."""
    i = np.arange(11) - 5
    w = np.exp(-(i[:, None] ** 2 + i[None] ** 2) / (2 * 1.5 ** 2))
    w, values = w / w.sum(), []
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y:y + 11, x:x + 11], b[y:y + 11, x:x + 11]
            mp, mq = (w * p).sum(), (w * q).sum()
            vp, vq, cov = (w * p * p).sum() - mp ** 2, (w * q * q).sum() - mq ** 2, (w * p * q).sum() - mp * mq
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp ** 2 + mq ** 2 + c1) * (vp + vq + c2)))
    return np.mean(values)


def test_ssim_against_its_definition():
    rng = np.random.default_rng(1)
    hr = picture(rng, 30, 26)
    sr = np.clip(hr + rng.integers(-20, 20, hr.shape), 0, 255).astype(np.uint8)
    expected = slow_ssim(*(evaluate.luma(p)[3:-3, 3:-3] for p in (sr, hr)))
    assert evaluate.ssim_y(sr, hr, 3) == pytest.approx(expected, abs=1e-6)
    assert evaluate.ssim_y(hr, hr, 3) == pytest.approx(1)


def test_published_bicubic_works_on_rounded_luma_without_rounding_the_lr():
    hr = picture(np.random.default_rng(2), 24, 28)
    y = torch.from_numpy(np.floor(evaluate.luma(hr) + 0.5))
    up = data.imresize(data.imresize(y, 0.25), 4).numpy()
    a, b = evaluate.published_bicubic(hr, 4)
    assert np.array_equal(b, y.numpy()[4:-4, 4:-4])
    assert np.array_equal(a, np.floor(up.clip(0, 255) + 0.5)[4:-4, 4:-4])


# ------------------------------------------------------------------------------------------------ tiles
@settings(max_examples=12, deadline=None)
@given(h=st.integers(1, 90), w=st.integers(1, 90), tile=st.integers(1, 50), scale=st.sampled_from([2, 3, 4]))
def test_tiles_equal_the_whole_picture(h, w, tile, scale):
    torch.manual_seed(0)
    net = models.build("edsr_c4b2", scale).eval()
    x = torch.rand(1, 3, h, w)
    whole, tiled = (evaluate.upscale(net, x, t) for t in (0, tile))
    assert whole.shape == (1, 3, h * scale, w * scale)
    assert torch.allclose(whole, tiled, atol=2e-5)


def test_tiles_leave_no_seam_in_swinir():
    """SwinIR sees more than a margin, but its windows stay in place, and what is left fades."""
    torch.manual_seed(0)
    net = models.build("swinir_c12s6", 2).eval()
    x = torch.rand(1, 3, 150, 40)
    whole, tiled = (evaluate.upscale(net, x, t) for t in (0, 64))
    assert (whole - tiled).abs().max() < 1 / 255
    jump = lambda y: (y[..., 1:, :] - y[..., :-1, :]).abs().mean(dim=(0, 1, 3))
    assert (jump(tiled) - jump(whole)).abs().max() < 1e-3


def test_no_tile_is_larger_than_promised():
    net, sizes = models.build("edsr_c4b1", 2).eval(), []
    net.register_forward_hook(lambda m, x, y: sizes.append(max(x[0].shape[-2:])))
    evaluate.upscale(net, torch.rand(1, 3, 300, 200), 64)
    assert max(sizes) <= 64 + 2 * (evaluate.RAMP + 8)


@pytest.mark.parametrize("n, tile, scale", [(1, 1, 2), (300, 64, 4), (65, 64, 3), (40, 32, 8), (57, 8, 2)])
def test_tiles_share_every_pixel_once(n, tile, scale):
    """Their weights sum to 1, also where many overlap, and SwinIR's windows of 8 stay where they were."""
    for radius in (None, 7):
        total = torch.zeros(n * scale)
        for a, b, c, d, weights in evaluate.spans(n, tile, SimpleNamespace(scale=scale, receptive_radius=radius), "cpu"):
            assert 0 <= a <= c < d <= b <= n and weights.min() >= 0
            assert radius or (a % 8 == 0 and (b % 8 == 0 or b == n))
            assert d - c <= -(-tile // 8) * 8 + (0 if radius else 2 * evaluate.RAMP)
            total[c * scale:d * scale] += weights
        assert torch.allclose(total, torch.ones_like(total), atol=1e-6)


@pytest.mark.parametrize("name", ["edsr_c4b2", "swinir_c6s6"])
def test_bands_hold_one_row_of_tiles_and_make_up_the_picture(name):
    torch.manual_seed(0)
    net = models.build(name, 2).eval()
    x = torch.rand(2, 3, 150, 40)
    bands = list(evaluate.bands(net, x, 48))
    assert len(bands) == 4 and max(b.shape[2] for b in bands) <= 2 * (48 + 2 * evaluate.RAMP)
    assert torch.equal(torch.cat(bands, 2), evaluate.upscale(net, x, 48))
    whole, tiled = (np.stack([evaluate.to_uint8(y[None]) for y in f]).astype(int) for f in (net(x).detach(), torch.cat(bands, 2)))
    assert abs(whole - tiled).max() <= (0 if name.startswith("edsr") else 1)


@pytest.mark.parametrize("tile", [0, 16])
def test_a_batch_gives_each_picture_as_if_alone(tile):
    """Also where RCAN pools over the whole picture, and where self-ensemble swaps height and width."""
    torch.manual_seed(0)
    lrs = [picture(np.random.default_rng(i), 17, 26) for i in range(3)]
    x = evaluate.to_tensor(lrs[0])
    for name in ("edsr_c4b2", "rcan_c16b1g1", "swinir_c6s6"):
        net = models.build(name, 2).eval()
        for ensemble in (False, True):
            options = SimpleNamespace(device=torch.device("cpu"), tile=tile, self_ensemble=ensemble, precision="float32")
            together = evaluate.upscaled(net, lrs, options)
            assert len(together) == 3 and together[0].shape == (34, 52, 3)
            for lr, sr in zip(lrs, together):
                assert np.array_equal(sr, evaluate.upscaled(net, [lr], options)[0])
            if name.startswith("edsr"):  # whose tiles are exact
                whole = evaluate.to_uint8((evaluate.self_ensemble(net, x) if ensemble else net(x)).detach())
                assert np.array_equal(together[0], whole)


def test_batches_hold_equal_sizes_and_at_most_a_tile():
    shapes = [(4, 4)] * 5 + [(4, 8)] * 2 + [(9, 9), (4, 4)]
    items = [(np.zeros((*shape, 3)), i) for i, shape in enumerate(shapes)]
    at = lambda device, items: [[i for _, i in b] for b in evaluate.batches(items, SimpleNamespace(device=torch.device(device), tile=8))]
    assert at("cuda", items) == [[0, 1, 2, 3], [4], [5, 6], [7], [8]]  # 64 pixels; a larger picture goes alone
    assert at("cpu", items) == [[i] for i in range(9)] and at("cuda", []) == []

    def broken():
        yield from items[:3]
        raise data.DataError("the fourth")
    batches = evaluate.batches(broken(), SimpleNamespace(device=torch.device("cuda"), tile=8))
    assert len(next(batches)) == 3
    with pytest.raises(data.DataError, match="the fourth"):
        next(batches)


def test_self_ensemble_commutes_with_flips_and_transposition():
    torch.manual_seed(0)
    net = models.build("edsr_c4b1", 2).eval()
    x = torch.rand(1, 3, 9, 14)
    y = evaluate.self_ensemble(net, x)
    assert y.shape == (1, 3, 18, 28) and not torch.allclose(y, net(x), atol=1e-4)
    assert torch.allclose(evaluate.self_ensemble(net, x.flip(-1)).flip(-1), y, atol=1e-5)
    assert torch.allclose(evaluate.self_ensemble(net, x.transpose(-1, -2)).transpose(-1, -2), y, atol=1e-5)


def test_to_uint8_rounds_half_up_and_clips():
    x = torch.tensor([-1.0, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 9.0]).view(1, 1, 1, 6).repeat(1, 3, 1, 1)
    assert evaluate.to_uint8(x)[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


# ------------------------------------------------------------------------------------------------ the command line
def run(capsys, *words):
    evaluate.main([str(w) for w in words])
    return capsys.readouterr().out


def test_table_has_a_row_a_model_and_a_column_a_set(place, capsys, tmp_path):
    out = run(capsys, place / "a.pt", place / "b.pt", "bicubic", "--data", place / "set", "--json", tmp_path / "t.json", "--device", "cpu")
    head, *lines = out.splitlines()
    assert head.split()[:4] == ["model", "params", "madds", "set"] and [line.split()[0] for line in lines] == ["a.pt", "b.pt", "bicubic"]
    results = json.loads((tmp_path / "t.json").read_text())["results"]
    assert set(results["a.pt"]["set"]["images"]) == {"baby", "bird", "head"}
    values = [v["psnr"] for v in results["a.pt"]["set"]["images"].values()]
    assert results["a.pt"]["set"]["psnr"] == pytest.approx(np.mean(values)) and f"{np.mean(values):.2f}" in lines[0]
    hr = data.read_image(place / "set" / "bird.png")
    sr = evaluate.to_uint8(models.load(place / "a.pt")(evaluate.to_tensor(data.imresize(hr, 0.25))))
    assert results["a.pt"]["set"]["images"]["bird"]["psnr"] == pytest.approx(evaluate.psnr_y(sr, hr, 4), abs=1e-3)


def test_pictures_made_elsewhere_are_scored(place, capsys, tmp_path):
    """Under each naming that other tools use."""
    for name, target in (("baby", "babyx4.png"), ("bird", "bird_x4.png"), ("head", "head_MYNET_x4.png")):
        hr = data.read_image(place / "set" / f"{name}.png")
        hr = hr[:hr.shape[0] // 4 * 4, :hr.shape[1] // 4 * 4]
        iio.imwrite(tmp_path / target, np.clip(hr.astype(int) + 1, 0, 255).astype(np.uint8))
    out = run(capsys, "--sr", tmp_path, "--data", place / "set", "--scale", "4")
    assert 49 < float(out.splitlines()[1].split()[3].split("/")[0]) < 50  # about one grey level: 49.45 dB


def test_longer_names_keep_their_own_pictures(tmp_path):
    for name in ("img_x4.png", "img_2_x4.png"):
        iio.imwrite(tmp_path / name, np.zeros((4, 4, 3), np.uint8))
    found = evaluate.match_results(tmp_path, ["img", "img_2"], 4)
    assert {k: v.name for k, v in found.items()} == {"img": "img_x4.png", "img_2": "img_2_x4.png"}


def test_figure(place, capsys, tmp_path):
    out = run(capsys, place / "a.pt", "bicubic", "--data", place / "set", "--figure", tmp_path / "f.png", "--image", "1")
    assert "figure: bird" in out and "HR, a.pt, bicubic" in out
    assert iio.imread(tmp_path / "f.png").shape == (3 * 40, 3 * 3 * 40 + 2 * 6, 3)


@pytest.mark.parametrize("mode, shape, kept", [("grey", (20, 24), (80, 96)), ("rgb", (20, 24, 3), (80, 96, 3)),
                                               ("rgba", (20, 24, 4), (80, 96, 4)), ("la", (20, 24, 2), (80, 96, 2))])
def test_upscaling_keeps_grey_and_alpha(place, capsys, tmp_path, mode, shape, kept):
    image = picture(np.random.default_rng(3), 20, 24, shape[2] if len(shape) > 2 else 1)
    iio.imwrite(tmp_path / "in.png", image[..., 0] if mode == "grey" else image)
    run(capsys, place / "a.pt", "--input", tmp_path / "in.png", "--output", tmp_path / "out.png")
    big = iio.imread(tmp_path / "out.png")
    assert big.shape == kept
    if mode in ("rgba", "la"):
        assert np.array_equal(big[..., -1], data.imresize(image[..., -1], 4))


def test_upscaling_a_folder_overwrites_nothing(place, capsys, tmp_path):
    run(capsys, place / "a.pt", "--input", place / "set", "--output", tmp_path / "big", "--self-ensemble", "--tile", "8")
    assert sorted(p.name for p in (tmp_path / "big").iterdir()) == ["baby_x4.png", "bird_x4.png", "head_x4.png"]
    assert "exists already" in error_of(capsys, place / "a.pt", "--input", place / "set", "--output", tmp_path / "big")


@pytest.fixture
def batched(monkeypatch):
    """Batches as on a GPU; the list of their lengths."""
    original, lengths = evaluate.batches, []

    def batches(items, options):
        for batch in original(items, SimpleNamespace(device=torch.device("cuda"), tile=options.tile)):
            lengths.append(len(batch))
            yield batch
    return lambda: monkeypatch.setattr(evaluate, "batches", batches) or lengths


def test_batches_change_no_figure_and_no_order(place, capsys, tmp_path, batched):
    (tmp_path / "set").mkdir()
    for i, (h, w) in enumerate([(48, 40), (40, 48), (48, 40), (48, 40), (40, 48)]):
        iio.imwrite(tmp_path / "set" / f"{i}.png", picture(np.random.default_rng(i), h, w))
    found = []
    for gpu in (False, True):
        lengths = batched() if gpu else []
        run(capsys, place / "a.pt", "bicubic", "--data", tmp_path / "set", "--json", tmp_path / "t.json", "--device", "cpu")
        results = json.loads((tmp_path / "t.json").read_text())["results"]
        found.append([(row["set"]["psnr"], row["set"]["ssim"], list(row["set"]["images"].items())) for row in results.values()])
    assert found[0] == found[1] and lengths == [2, 3] * 2 and [k for k, _ in found[1][0][2]] == list("01234")


@pytest.mark.parametrize("gpu", [False, True])
def test_a_broken_picture_loses_none_before_it(place, capsys, tmp_path, batched, gpu):
    lengths = batched() if gpu else [1]
    for i, channels in enumerate((3, 1, 4)):
        image = picture(np.random.default_rng(i), 12, 16, channels)
        iio.imwrite(tmp_path / f"{i}.png", image[..., 0] if channels == 1 else image)
    (tmp_path / "3.png").write_bytes(b"no picture")
    assert "3.png" in error_of(capsys, place / "a.pt", "--input", tmp_path, "--output", tmp_path / "big", "--device", "cpu")
    assert max(lengths) == (3 if gpu else 1)
    assert [iio.imread(tmp_path / "big" / f"{i}_x4.png").shape for i in range(3)] == [(48, 64, 3), (48, 64), (48, 64, 4)]
    run(capsys, place / "a.pt", "--input", tmp_path / "0.png", "--output", tmp_path / "alone.png", "--device", "cpu")
    assert np.array_equal(iio.imread(tmp_path / "alone.png"), iio.imread(tmp_path / "big" / "0_x4.png"))


def test_bench_takes_turns_and_prints_a_line_a_network(place, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original, seen = evaluate.bands, []
    monkeypatch.setattr(evaluate, "bands", lambda row, x, **k: seen.append((row, tuple(x.shape))) or original(row, x[..., :9, :9], **k))
    out = run(capsys, place / "a.pt", place / "b.pt", "bicubic", "--bench", "3", "--precision", "bfloat16", "--device", "cpu")
    a, b, bicubic = map(json.loads, out.splitlines())
    rows = [row for row, _ in seen[:3]]
    assert [row for row, _ in seen] == rows * 5 and len(set(rows)) == 3 and {shape for _, shape in seen} == {(1, 3, 180, 320)}
    assert [r["model"] for r in (a, b, bicubic)] == ["a.pt", "b.pt", "bicubic"] and a["precision"] == "bfloat16"
    assert a["ratio"] == 1 and b["ratio"] == pytest.approx(b["ms"] / a["ms"], rel=0.02) and a["ms_min"] <= a["ms"]
    assert a["gflops_per_s"] == pytest.approx(2 * models.multiply_adds(rows[0]) / a["ms"] / 1e6, rel=0.02)
    assert bicubic["gflops_per_s"] is None and a["peak_mib"] > 50 and a["input"] == [320, 180] and a["turns"] == 3
    assert not list(tmp_path.iterdir())


def test_bench_refuses_what_it_cannot_time(place, capsys):
    for n in ("0", "-3", "many", "1.5"):
        assert "--bench" in error_of(capsys, place / "a.pt", "--bench", n)
    assert "--sr" in error_of(capsys, place / "a.pt", "--bench", "--sr", place / "set")


def test_half_precision(place, capsys, tmp_path):
    """bfloat16 is near; float16 needs a GPU; values that are not finite are no black picture but an error."""
    assert "float16 needs a GPU" in error_of(capsys, place / "a.pt", "--data", place / "set", "--precision", "float16", "--device", "cpu")
    made = []
    for kind in ("float32", "bfloat16"):
        run(capsys, place / "a.pt", "--input", place / "set" / "baby.png", "--output", tmp_path / f"{kind}.png", "--precision", kind)
        made.append(iio.imread(tmp_path / f"{kind}.png").astype(int))
    assert 0 < abs(made[0] - made[1]).max() < 12
    net = models.load(place / "a.pt")
    net.conv_last.weight.data[0] = 3e38
    models.save(tmp_path / "huge.pt", net)
    assert "not finite" in error_of(capsys, tmp_path / "huge.pt", "--data", place / "set")


def test_bicubic_upscales_too(place, capsys, tmp_path):
    run(capsys, "bicubic", "--scale", "2", "--input", place / "set" / "baby.png", "--output", tmp_path / "b.png")
    own, matlab = iio.imread(tmp_path / "b.png").astype(int), data.imresize(iio.imread(place / "set" / "baby.png"), 2).astype(int)
    assert own.shape == (90, 100, 3) and abs(own - matlab).max() <= 2  # one rounding instead of two


def error_of(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(w) for w in words])
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and text.startswith("error: ")
    return text


def test_errors_are_one_line(place, capsys, tmp_path):
    (tmp_path / "sr").mkdir()
    iio.imwrite(tmp_path / "sr" / "baby.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "text.pt").write_text("no checkpoint")
    ps = place / "set"
    assert "--scale" in error_of(capsys, "bicubic", "--data", ps)
    assert "nowhere does not exist" in error_of(capsys, place / "a.pt", "--data", "nowhere")
    assert "x2" in error_of(capsys, place / "a.pt", place / "x2.pt", "--data", ps)
    assert "text.pt" in error_of(capsys, tmp_path / "text.pt", "--data", ps)
    assert "bird" in error_of(capsys, "--sr", tmp_path / "sr", "--data", ps, "--scale", "4")
    iio.imwrite(tmp_path / "sr" / "bird.png", np.zeros((8, 8, 3), np.uint8))
    iio.imwrite(tmp_path / "sr" / "head.png", np.zeros((8, 8, 3), np.uint8))
    assert "8x8" in error_of(capsys, "--sr", tmp_path / "sr", "--data", ps, "--scale", "4")
    assert "cuda:77" in error_of(capsys, place / "a.pt", "--data", ps, "--device", "cuda:77")
    assert "--output" in error_of(capsys, place / "a.pt", "--input", ps)
    assert "bicubic" in error_of(capsys, "--data", ps)
    assert "--tile" in error_of(capsys, place / "a.pt", "--data", ps, "--tile", "-1")
    iio.imwrite(tmp_path / "tiny.png", np.zeros((9, 9, 3), np.uint8))
    assert "8x8 when cropped" in error_of(capsys, place / "a.pt", "--data", tmp_path / "tiny.png")
