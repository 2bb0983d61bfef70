"""models.py: published sizes, any input, the formats of other codes against stand-ins of those codes (foreign.py),
files that are saved and read back, names, and files that are broken, foreign or hostile."""
import functools
import os
import pickle
import sys
import types

import foreign
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import models
from samples import damaged

TINY = ["edsr_c6b2", "rcan_c16b1g2", "swinir_c12s6"]  # the smallest that the grammar spells
QUICK = dict(deadline=None, derandomize=True, database=None, phases=[hypothesis.Phase.generate])


@functools.cache
def on_meta(name, scale):
    """Built without memory: for counting."""
    with torch.device("meta"):
        return models.build(name, scale)


def tiny(name, scale=2, seed=0):
    return foreign.randomise(models.build(name, scale), seed)


def picture(*size, seed=0):
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(net, x):
    """The network's output in [0,1], also where the network counts in [0,255]."""
    return net(255 * x) / 255 if isinstance(net, foreign.AuthorsNetwork) else net(x)


def stored(tmp_path, content, name="net.pt", **kw):
    path = tmp_path / name
    torch.save(content, path, **kw)
    return path


def refused(path, *words, **override):
    """The message with which `path` is refused: one line that names the file and holds all `words`."""
    with pytest.raises(models.CheckpointError) as caught:
        models.load(path, **override)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for word in words:
        assert word in message
    return message


# -------------------------------------------------------------------------------- sizes
@pytest.mark.parametrize("name, scale, count", [
    ("edsr", 2, 40_729_603), ("edsr", 3, 43_680_003), ("edsr", 4, 43_089_923),
    ("edsr_baseline", 2, 1_369_859), ("edsr_baseline", 3, 1_554_499), ("edsr_baseline", 4, 1_517_571),
    ("rcan", 2, 15_444_643), ("rcan", 3, 15_629_283), ("rcan", 4, 15_592_355),  # less the 24 mean-shift constants
    ("swinir", 2, 11_752_487), ("swinir", 3, 11_937_127), ("swinir", 4, 11_900_199)])
def test_parameter_counts_as_published(name, scale, count):
    assert models.parameters(on_meta(name, scale)) == count


@pytest.mark.parametrize("name, width", [("edsr", 256), ("edsr_baseline", 64), ("rcan", 64), ("swinir", 64)])
def test_x8_has_one_more_upsampling_stage_than_x4(name, width):
    more = models.parameters(on_meta(name, 8)) - models.parameters(on_meta(name, 4))
    assert more == width * 4 * width * 9 + 4 * width


@pytest.mark.parametrize("name, millions", [("edsr_c64b32", 2.7), ("rcan_c64b6g10", 5.2), ("swinir_c60s24", 1.2)])
def test_the_papers_students_have_the_papers_size(name, millions):
    assert models.parameters(on_meta(name, 4)) / 1e6 == pytest.approx(millions, abs=0.06)


def test_multiply_adds_by_the_fields_convention():
    model = models.build("edsr_baseline", 4).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert round(models.multiply_adds(model) / 1e9, 1) == 114.2
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_multiply_adds_by_hand():
    """3→6 and 2·2+1 6→6 convolutions and the upsampler's at LR size, the last one at HR size, each 9 taps."""
    per_lr_pixel = 9 * (3 * 6 + 5 * 6 * 6 + 6 * 24 + 4 * 6 * 3)
    assert models.multiply_adds(models.build("edsr_c6b2", 2), 128, 64) == per_lr_pixel * 64 * 32


# -------------------------------------------------------------------------------- inputs and outputs
@pytest.mark.parametrize("scale", models.SCALES)
@pytest.mark.parametrize("name", TINY)
def test_output_is_scale_times_the_input(name, scale):
    model = tiny(name, scale)
    assert model.scale == scale and model.config["arch"] == name.split("_")[0]
    for n, h, w in [(1, 8, 8), (2, 7, 5), (1, 1, 1)]:
        y = run(model, picture(n, 3, h, w))
        assert y.shape == (n, 3, scale * h, scale * w) and y.dtype == torch.float32 and y.isfinite().all()


@pytest.mark.parametrize("h, w", [(1, 1), (3, 5), (12, 12), (17, 9), (1, 9), (16, 8)])
def test_swinir_takes_any_size(h, w):
    assert run(tiny("swinir_c12s6", 3), picture(2, 3, h, w)).shape == (2, 3, 3 * h, 3 * w)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("r", [2, 3])
def test_shuffling_pixels_in_channels_last_order(r, order):
    x = torch.rand(2, 5 * r * r, 4, 6).contiguous(memory_format=order).requires_grad_()
    y, expected = models.shuffle_channels_last(x, r), F.pixel_shuffle(x, r)
    assert torch.equal(y, expected) and y.is_contiguous(memory_format=torch.channels_last)
    weights = torch.rand_like(expected)
    assert torch.equal(*(torch.autograd.grad((out * weights).sum(), x)[0] for out in (y, expected)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", TINY)
def test_on_a_gpu_a_network_answers_as_on_the_cpu(name):
    net, x = tiny(name).eval(), picture(2, 3, 16, 16)
    expected = run(net, x)
    found = run(net.to("cuda", memory_format=torch.channels_last), x.cuda())
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found.cpu() - expected).abs().max() < 5e-3 * expected.abs().max()  # the GPU's convolutions are in tf32


@pytest.mark.parametrize("name", TINY)
def test_samples_of_a_batch_do_not_touch_each_other(name):
    model, x = tiny(name), picture(3, 3, 11, 19)
    alone = torch.cat([run(model, x[i:i + 1]) for i in range(3)])
    assert (run(model, x) - alone).abs().max() < 1e-5


@pytest.mark.parametrize("name", TINY)
def test_the_input_is_left_as_it_was(name):
    x = picture(1, 3, 8, 8)
    run(tiny(name), x)
    assert torch.equal(x, picture(1, 3, 8, 8))


@pytest.mark.parametrize("h, w", [(12, 12), (17, 14), (8, 16), (5, 13)])
def test_swinir_pads_as_its_authors_where_they_can(h, w):
    x = picture(1, 3, h, w)
    expected = F.pad(x, (0, -w % 8, 0, -h % 8), mode="reflect")
    assert torch.equal(models.build("swinir_c12s6", 2).pad(x), expected)


@pytest.mark.parametrize("h, w", [(1, 1), (1, 7), (2, 3), (3, 5), (4, 1), (17, 9)])
def test_swinir_pads_tiny_inputs_by_repeated_mirroring(h, w):
    x = picture(1, 3, h, w)
    expected = np.pad(x.numpy(), ((0, 0), (0, 0), (0, -h % 8), (0, -w % 8)), mode="reflect")
    assert np.array_equal(models.build("swinir_c12s6", 2).pad(x).numpy(), expected)


def test_swinir_crops_the_padding_away():
    model, x = tiny("swinir_c12s6", 3), picture(1, 3, 13, 10)
    whole = run(model, F.pad(x, (0, 6, 0, 3), mode="reflect"))
    assert torch.equal(run(model, x), whole[..., :39, :30])


@pytest.mark.parametrize("scale", models.SCALES)
@pytest.mark.parametrize("blocks", [1, 3])
def test_edsr_receptive_radius(scale, blocks):
    """With positive weights every path carries gradient, so its reach is the true receptive field."""
    model = models.build(f"edsr_c2b{blocks}", scale)
    for p in model.parameters():
        p.data = p.data.abs() + 0.1
    radius = model.receptive_radius
    x = torch.ones(1, 3, 2 * radius + 9, 2 * radius + 9, requires_grad=True)
    centre, s = radius + 4, scale
    model(x)[..., s * centre:s * centre + s, s * centre:s * centre + s].sum().backward()
    reached = x.grad.abs().sum((0, 1)).nonzero()
    reach = (reached - centre).abs().max().item()
    assert radius - 2 <= reach <= radius  # no farther, and no overlap wasted on a guess


@pytest.mark.parametrize("name", TINY)
def test_taps_are_feature_maps_of_the_input_size(name):
    model, seen = tiny(name), []
    for tap in model.taps:
        model.get_submodule(tap).register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape)))
    run(model, picture(2, 3, 8, 16))
    assert len(seen) == len(model.taps) > 0
    assert set(seen) == {(2, model.config["channels"], 8, 16)}


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_autocast(name):
    """The output stays float32 in type and in fineness, near the full-precision one."""
    model, x = tiny(name), picture(1, 3, 16, 24)
    last = model.conv_last
    last.weight.data *= 0.25  # the spread of a picture, about 0.2
    full = run(model, x)
    assert 0.05 < full.std() < 0.4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(model, x)
    assert y.dtype == torch.float32
    assert (y - full).abs().max() < 0.01
    above = (y - model.mean) * model.img_range  # what the last convolution gave: not on bfloat16's grid, coarser than uint8's
    assert ((above - above.bfloat16()).abs() > 1e-4 * above.abs()).float().mean() > 0.8


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", TINY)
def test_a_network_converted_as_a_whole(name, dtype):
    """model.double() and model.bfloat16() work as for any module."""
    model, x = tiny(name), picture(1, 3, 9, 10)
    expected = run(model, x)
    y = run(model.to(dtype), x.to(dtype))
    assert (y - expected).abs().mean() < (1e-6 if dtype == torch.float64 else 0.02)


# -------------------------------------------------------------------------------- drop path
def swinir(drop_path, **kw):
    net = models.SwinIR(2, **dict(channels=12, stages=1, layers=2, heads=3, drop_path=drop_path) | kw)
    return foreign.randomise(net)


def test_drop_path_acts_in_training_only():
    model, x = swinir(0.5), picture(4, 3, 8, 8)
    torch.manual_seed(0)
    assert torch.equal(run(model, x), run(model, x))
    model.train()
    assert not torch.equal(run(model, x), run(model, x))
    off = swinir(0.0).train()
    assert torch.equal(run(off, x), run(off.eval(), x))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    model = swinir(0.25, stages=2).train()
    torch.manual_seed(0)
    paths = torch.stack([keep for stage in model.draw_paths(4000) for keep in stage])
    assert paths.shape == (4, 2, 4000, 1, 1, 1)
    for rate, layer in zip(torch.linspace(0, 0.25, 4).tolist(), paths):  # deeper layers drop more often
        assert set(layer.unique().tolist()) <= {0, layer.max().item()} and layer.max().item() == pytest.approx(1 / (1 - rate))
        assert (layer == 0).float().mean().item() == pytest.approx(rate, abs=0.02)
        assert [branch.mean().item() for branch in layer] == pytest.approx([1, 1], abs=0.03)
    layer, x = model.layers[1].residual_group["blocks"][0], torch.rand(2, 8, 8, 12)
    dropped = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1).expand(2, -1, -1, -1, -1)
    y, whole = layer(x, None, dropped), layer(x, None, None)
    assert torch.equal(y[0], x[0]) and torch.allclose(y[1], whole[1], atol=1e-6)


@pytest.mark.parametrize("shift", [0, 2])
def test_window_attention_is_the_published_formula(shift):
    """softmax(qkᵀ/√d + bias + mask)v, one window and one head at a time."""
    torch.manual_seed(0)
    attention, mask = models.WindowAttention(6, 2, 4), models.shift_mask(8, 8, 4, shift) if shift else None
    x = torch.rand(2 * 4, 16, 6)
    y = attention(x, mask)
    q, k, v = attention.qkv(x).split(6, dim=-1)
    for window in range(8):
        heads = []
        for head in range(2):
            cut = slice(3 * head, 3 * head + 3)
            bias = attention.relative_position_bias_table[:, head][models.relative_position_index(4)]
            scores = q[window, :, cut] @ k[window, :, cut].T / 3 ** 0.5 + bias + (mask[window % 4] if shift else 0)
            heads.append(scores.softmax(1) @ v[window, :, cut])
        assert torch.allclose(y[window], attention.proj(torch.cat(heads, 1)), atol=1e-6)


# -------------------------------------------------------------------------------- formats of other codes
FOREIGN = {
    "edsr authors": foreign.AuthorsEDSR,
    "edsr authors, 32 blocks scaled by 0.1": lambda s, **kw: foreign.AuthorsEDSR(s, c=4, n=32, res_scale=0.1, **kw),
    "edsr authors, range 1": lambda s, **kw: foreign.AuthorsEDSR(s, **dict(img_range=1.0) | kw),
    "rcan authors": foreign.AuthorsRCAN,
    "rcan authors, one block": lambda s, **kw: foreign.AuthorsRCAN(s, c=20, n=1, groups=3, r=16, **kw),
    "edsr basicsr": foreign.BasicSREDSR,
    "edsr basicsr, 32 blocks scaled by 0.1": lambda s, **kw: foreign.BasicSREDSR(s, c=4, n=32, res_scale=0.1, **kw),
    "rcan basicsr": foreign.BasicSRRCAN,
    "swinir": foreign.AuthorsSwinIR,
    "swinir lightweight": lambda s, **kw: foreign.AuthorsSwinIR(s, head="pixelshuffledirect", **kw),
    "swinir, other sizes": lambda s, **kw: foreign.AuthorsSwinIR(s, c=10, stages=1, layers=3, heads=2, win=4, ratio=1.5, **kw),
}


def same_output(net, model, size=(2, 3, 11, 14)):
    x = picture(*size)
    if isinstance(net, foreign.AuthorsNetwork) and model.img_range == 1:
        expected = net(x).detach()
    else:
        expected = run(net, x)
    assert expected.std() > 0.05  # a flat output would agree with anything
    assert (run(model, x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("scale", models.SCALES)
@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_networks_load_and_answer_the_same(tmp_path, kind, scale):
    net = foreign.randomise(FOREIGN[kind](scale), seed=scale)
    model = models.load(stored(tmp_path, net.state_dict()))
    assert model.scale == scale and not model.training
    assert model.config["arch"] == kind.split()[0].rstrip(",")
    same_output(net, model)


@pytest.mark.parametrize("kind", ["edsr authors", "rcan authors"])
def test_mean_shifts_of_another_data_set(tmp_path, kind):
    """The mean is the file's own, to float32's last digits."""
    net = foreign.randomise(FOREIGN[kind](2, mean=(0.511237, 0.498761, 0.333333)))
    model = models.load(stored(tmp_path, net.state_dict()))
    assert model.config["mean"] == pytest.approx([0.511237, 0.498761, 0.333333], abs=1e-6)
    same_output(net, model)


def test_a_black_mean_does_not_hide_the_range(tmp_path):
    """Means far below 1/255 of the range are no reason to take [0,255] for [0,1]."""
    net = foreign.randomise(foreign.AuthorsEDSR(2, mean=(0.02, 0.01, 0.03)))
    same_output(net, models.load(stored(tmp_path, net.state_dict())))


def test_swinir_at_the_size_of_its_stored_masks(tmp_path):
    """48×48 is the size for which the authors' files hold masks."""
    net = foreign.randomise(foreign.AuthorsSwinIR(2))
    same_output(net, models.load(stored(tmp_path, net.state_dict())), (1, 3, 48, 48))


def test_half_precision_files_load_as_float32(tmp_path):
    net = foreign.randomise(foreign.BasicSREDSR(2)).half().float()  # weights that float16 holds exactly
    model = models.load(stored(tmp_path, {k: v.half() for k, v in net.state_dict().items()}))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    same_output(net, model)


WRAPPERS = {
    "bare": lambda s, other: s,
    "params": lambda s, other: {"params": s},
    "params_ema wins": lambda s, other: {"params": other, "params_ema": s},
    "state_dict": lambda s, other: {"epoch": 3, "state_dict": s, "optimizer": {"state": {}, "param_groups": []}},
    "model": lambda s, other: {"iteration": 7, "model": s},
    "module.": lambda s, other: {f"module.{k}": v for k, v in s.items()},
    "state_dict, module.": lambda s, other: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "params, model.": lambda s, other: {"params": {f"model.{k}": v for k, v in s.items()}},
    "compiled and parallel": lambda s, other: {"model": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", ["edsr authors", "rcan authors", "edsr basicsr", "rcan basicsr", "swinir"])
def test_wrappers_around_the_weights(tmp_path, kind, wrapper):
    net, other = foreign.randomise(FOREIGN[kind](2), 1), FOREIGN[kind](2)
    same_output(net, models.load(stored(tmp_path, WRAPPERS[wrapper](net.state_dict(), other.state_dict()), "net.pth")))


@pytest.mark.parametrize("kind", ["edsr authors", "rcan basicsr", "swinir"])
def test_files_from_before_torch_1_6(tmp_path, kind):
    net = foreign.randomise(FOREIGN[kind](2))
    same_output(net, models.load(stored(tmp_path, net.state_dict(), _use_new_zipfile_serialization=False)))


@pytest.mark.parametrize("kind", ["edsr authors", "rcan authors", "rcan basicsr", "swinir", "swinir lightweight"])
def test_safetensors(tmp_path, kind):
    safetensors = pytest.importorskip("safetensors.torch")
    net = foreign.randomise(FOREIGN[kind](2))
    safetensors.save_file(net.state_dict(), tmp_path / "net.safetensors")
    same_output(net, models.load(tmp_path / "net.safetensors"))


# -------------------------------------------------------------------------------- saving
OWN = TINY + ["edsr_c4b32", "edsr_c6b2r0.3", "edsr_c4b32r1.0"]


@pytest.mark.parametrize("scale", models.SCALES)
@pytest.mark.parametrize("name", OWN)
def test_saved_and_loaded_is_the_same_network(tmp_path, name, scale):
    model, x = tiny(name, scale), picture(1, 3, 9, 10)
    models.save(tmp_path / "net.pt", model.train())  # saving does not depend on the mode
    again = models.load(tmp_path / "net.pt")
    assert not again.training and again.scale == scale and again.config == model.config
    assert torch.equal(run(again, x), run(model.eval(), x))


def test_stored_settings_beat_what_the_shapes_suggest(tmp_path):
    model = foreign.randomise(models.EDSR(2, 6, 2, res_scale=0.3, mean=(0.5, 0.4, 0.3), img_range=1.0))
    models.save(tmp_path / "net.pt", model)
    assert models.load(tmp_path / "net.pt").config == model.config
    assert models.load(tmp_path / "net.pt", res_scale=0.7).config["res_scale"] == 0.7  # and an override beats both


def test_a_lightweight_swinir_comes_back(tmp_path):
    model, x = swinir(0.2, head="pixelshuffledirect"), picture(1, 3, 9, 10)
    models.save(tmp_path / "net.pt", model)
    again = models.load(tmp_path / "net.pt")
    assert again.config == model.config and torch.equal(run(again, x), run(model, x))


@pytest.mark.parametrize("channels, hidden", [(60, 120), (22, 15), (58, 29 + 1), (46, 47)])
def test_any_mlp_width_comes_back(tmp_path, channels, hidden):
    """The ratio hidden/channels, found in the shapes, must give `hidden` again, in spite of float rounding."""
    model = swinir(0.1, channels=channels, heads=2, mlp_ratio=hidden / channels)
    state = model.state_dict()
    assert state["layers.0.residual_group.blocks.0.mlp.fc1.weight"].shape[0] == hidden
    assert models.load(stored(tmp_path, state)).config["channels"] == channels


@pytest.mark.parametrize("name", TINY)
def test_saved_files_hold_what_other_codes_look_for(tmp_path, name):
    model = tiny(name)
    models.save(tmp_path / "net.pt", model)
    content = torch.load(tmp_path / "net.pt", weights_only=True)
    assert content["config"] == model.config
    assert set(content["params_ema"]) == set(content["params"]) >= set(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(content["params_ema"][key], value) and torch.equal(content["params"][key], value)


def test_raw_weights_go_to_params(tmp_path):
    averaged, raw = tiny("swinir_c12s6", seed=1), tiny("swinir_c12s6", seed=2)
    models.save(tmp_path / "net.pt", averaged, raw=raw.state_dict())
    content, x = torch.load(tmp_path / "net.pt", weights_only=True), picture(1, 3, 8, 8)
    assert set(content["params"]) == set(content["params_ema"])
    assert torch.equal(content["params"]["conv_first.weight"], raw.conv_first.weight)
    assert torch.equal(content["params_ema"]["conv_first.weight"], averaged.conv_first.weight)
    assert torch.equal(run(models.load(tmp_path / "net.pt"), x), run(averaged, x))
    stored(tmp_path, {"params": content["params"]}, "raw.pt")
    assert torch.equal(run(models.load(tmp_path / "raw.pt"), x), run(raw, x))


@pytest.mark.parametrize("ours, theirs", [
    (lambda: tiny("edsr_c6b2"), lambda: foreign.BasicSREDSR(2, c=6, n=2)),
    (lambda: tiny("rcan_c16b1g2"), lambda: foreign.BasicSRRCAN(2, c=16, n=1, groups=2, r=16)),
    (lambda: tiny("swinir_c12s6"), lambda: foreign.AuthorsSwinIR(2, c=12, stages=1, layers=6, heads=6)),
    (lambda: swinir(0.1, head="pixelshuffledirect"), lambda: foreign.AuthorsSwinIR(2, stages=1, head="pixelshuffledirect")),
], ids=["edsr", "rcan", "swinir", "lightweight"])
@pytest.mark.parametrize("key", ["params", "params_ema"])
def test_other_codes_load_our_files_strictly(tmp_path, ours, theirs, key):
    model, net = ours(), theirs().eval()
    models.save(tmp_path / "net.pt", model)
    net.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True)[key], strict=True)
    same_output(net, model)
    same_output(net, model, (1, 3, 48, 48))  # where SwinIR's stored masks are used


def test_swinir_files_carry_the_authors_constants(tmp_path):
    models.save(tmp_path / "net.pt", tiny("swinir_c12s6"))
    params = torch.load(tmp_path / "net.pt", weights_only=True)["params_ema"]
    for j in range(6):
        block = f"layers.0.residual_group.blocks.{j}"
        assert torch.equal(params[f"{block}.attn.relative_position_index"], foreign.position_index(8))
        if j % 2:
            assert torch.equal(params[f"{block}.attn_mask"], foreign.slice_mask(48, 48, 8, 4))
            assert params[f"{block}.attn_mask"].shape == (36, 64, 64)
        else:
            assert f"{block}.attn_mask" not in params


def test_saving_replaces_the_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "net.pt"
    for seed in (1, 2):
        models.save(path, tiny("edsr_c6b2", seed=seed))
    assert torch.equal(models.load(path).conv_first.weight, tiny("edsr_c6b2", seed=2).conv_first.weight)
    assert os.listdir(tmp_path) == ["net.pt"]


def test_a_save_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.pt"
    models.save(path, tiny("edsr_c6b2"))
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(models.CheckpointError, match="net.pt cannot be written: No space left on device"):
        models.save(path, tiny("edsr_c6b2", seed=1))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["net.pt"]


# -------------------------------------------------------------------------------- overrides
def test_res_scale_override(tmp_path):
    net = foreign.randomise(foreign.AuthorsEDSR(2, res_scale=0.4))
    path = stored(tmp_path, net.state_dict())
    assert models.load(path).config["res_scale"] == 1.0
    same_output(net, models.load(path, res_scale=0.4))


@pytest.mark.parametrize("kind, settings", [
    ("edsr basicsr", dict(mean=(0.1, 0.2, 0.3))), ("edsr basicsr", dict(img_range=1.0)),
    ("rcan basicsr", dict(mean=(0.5, 0.5, 0.5), img_range=1.0)), ("swinir", dict(mean=(0, 0, 0), img_range=2.0)),
    ("edsr authors", dict(mean=(0.6, 0.5, 0.4)))])
def test_mean_and_range_override(tmp_path, kind, settings):
    net = foreign.randomise(FOREIGN[kind](2, **settings))
    model = models.load(stored(tmp_path, net.state_dict()), **settings)
    assert {k: model.config[k] for k in settings} == {k: list(v) if k == "mean" else v for k, v in settings.items()}
    same_output(net, model)


@pytest.mark.parametrize("override", [dict(blocks=3), dict(scale=4), dict(drop_path=0.5), dict(res_scael=1.0)])
def test_other_overrides_are_refused(tmp_path, override):
    path = stored(tmp_path, tiny("edsr_c6b2").state_dict())
    refused(path, *override, "res_scale, mean, img_range", **override)


def test_a_res_scale_for_a_network_that_has_none_is_refused(tmp_path):
    refused(stored(tmp_path, tiny("rcan_c16b1g2").state_dict()), "res_scale", res_scale=0.1)


def test_a_mean_must_have_three_colours(tmp_path):
    refused(stored(tmp_path, tiny("edsr_c6b2").state_dict()), "mean", mean=(0.5, 0.5))


def test_another_codes_config_is_not_taken_for_ours(tmp_path):
    """Training codes store settings of their own under "config"; only ours names the architecture there."""
    net = foreign.randomise(foreign.BasicSREDSR(2))
    path = stored(tmp_path, {"params": net.state_dict(), "config": {"mean": [0.5, 0.5, 0.5], "drop_path": 0.1}})
    same_output(net, models.load(path))


# -------------------------------------------------------------------------------- names
@pytest.mark.parametrize("name, sizes", [
    ("edsr", dict(arch="edsr", channels=256, blocks=32, res_scale=0.1)),
    ("edsr_baseline", dict(arch="edsr", channels=64, blocks=16, res_scale=1.0)),
    ("rcan", dict(arch="rcan", channels=64, blocks=20, groups=10, reduction=16)),
    ("swinir", dict(arch="swinir", channels=180, stages=6, layers=6, heads=6, window=8, mlp_ratio=2.0, drop_path=0.1)),
    ("edsr_c64b32", dict(arch="edsr", channels=64, blocks=32, res_scale=0.1)),
    ("edsr_c64b16", dict(arch="edsr", channels=64, blocks=16, res_scale=1.0)),
    ("edsr_c32b4r0.5", dict(arch="edsr", channels=32, blocks=4, res_scale=0.5)),
    ("edsr_c32b40r1", dict(arch="edsr", channels=32, blocks=40, res_scale=1.0)),
    ("rcan_c64b6g10", dict(arch="rcan", channels=64, blocks=6, groups=10, reduction=16)),
    ("swinir_c60s24", dict(arch="swinir", channels=60, stages=4, layers=6, heads=6, window=8, head="pixelshuffle"))])
def test_names(name, sizes):
    model = on_meta(name, 3)
    assert model.scale == model.config["scale"] == 3
    assert {k: model.config[k] for k in sizes} == sizes


def test_a_config_is_enough_to_build_the_network_again():
    for name in TINY:
        model = tiny(name, 3)
        again = models.from_config(model.config)
        again.load_state_dict(model.state_dict())
        assert again.config == model.config
        assert torch.equal(run(again.eval(), picture(1, 3, 8, 8)), run(model, picture(1, 3, 8, 8)))


@pytest.mark.parametrize("name, near", [("edsr_basline", "edsr_baseline"), ("edrs", "edsr"), ("swinr", "swinir"),
                                        ("rcan_c64b6", "rcan_c64b6g10"), ("swinir_c60s2x", "swinir_c60s24")])
def test_an_unknown_name_suggests_the_nearest(name, near):
    with pytest.raises(models.CheckpointError, match=f"'{name}'.*did you mean {near}\\?.*rcan_c64b6g10") as e:
        models.build(name, 4)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["", "vdsr_deep", "edsr_c64b16 ", "edsr_c64", "edsr_c-4b2", "rcan_c64b6g10r0.1", "../edsr.pt",
                                  "edsr_c64b16r", "edsr_c64b16r-1"])
def test_names_outside_the_grammar_are_refused(name):
    with pytest.raises(models.CheckpointError, match="unknown model"):
        models.build(name, 4)


@pytest.mark.parametrize("name, why", [
    ("edsr_c99999b16", "between 1 and"), ("edsr_c64b0", "between 1 and"), ("rcan_c64b99999g10", "between 1 and"),
    ("swinir_c60s999996", "between 1 and"), ("edsr_c0b4", "between 1 and"), ("rcan_c8b1g1", "16"),
    ("swinir_c60s20", "six"), ("swinir_c60s0", "between 1 and"), ("swinir_c20s6", "multiple"),
    ("edsr_c4096b4096", "."), ("rcan_c4096b90g9", ".")])
def test_absurd_sizes_are_refused(name, why):
    """Refused by their config alone: each would take minutes or terabytes to build."""
    with torch.device("meta"), pytest.raises(models.CheckpointError, match=why) as e:
        models.build(name, 4)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("scale", [0, 1, 5, 6, 16, -2, 2.5, None])
@pytest.mark.parametrize("name", TINY)
def test_other_scales_are_refused(name, scale):
    with pytest.raises(models.CheckpointError, match="2, 3, 4, 8"):
        models.build(name, scale)


@pytest.mark.parametrize("teacher, student", [
    ("edsr", "edsr_c64b32"), ("rcan", "rcan_c64b6g10"), ("swinir", "swinir_c60s24"), ("edsr_baseline", "edsr_c32b16"),
    ("rcan_c64b6g10", "rcan_c32b6g10"), ("swinir_c60s24", "swinir_c30s24"), ("edsr_c64b32", "edsr_c32b32"),
    ("edsr_c16b4r0.5", "edsr_c8b4r0.5"), ("swinir_c54s6", "swinir_c24s6")])
def test_small_is_the_papers_student_or_half_the_width(teacher, student):
    with torch.device("meta"):
        config = models.from_config(models.small(on_meta(teacher, 3))).config
    assert config == on_meta(student, 3).config


@pytest.mark.parametrize("teacher", ["rcan_c16b1g1", "swinir_c6s6", "edsr_c1b1"])
def test_small_of_the_smallest(teacher):
    """Where half the width is no network, that is said."""
    try:
        model = models.from_config(models.small(models.build(teacher, 2)))
    except models.CheckpointError as e:
        assert "\n" not in str(e)
    else:
        assert models.parameters(model) <= models.parameters(models.build(teacher, 2))


def test_small_is_refused_for_other_families():
    teacher = types.SimpleNamespace(config=dict(arch="SPAN", scale=2), scale=2)
    with pytest.raises(models.CheckpointError, match="SPAN.*student"):
        models.small(teacher)


# -------------------------------------------------------------------------------- broken files
def test_what_is_no_file(tmp_path):
    refused(tmp_path / "nowhere.pt", "does not exist")
    refused(tmp_path, "folder")
    refused(str(tmp_path / "nowhere.safetensors"), "does not exist")


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", [b"", b"\0", b"PK\x03\x04", b"\x80\x02.", b"hello\nI am a text\n", b'{"a": 1}',
                                     b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_checkpoint(tmp_path, content, ending):
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"net.{ending}"
    path.write_bytes(content)
    refused(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file(tmp_path, zipped):
    path = stored(tmp_path, tiny("edsr_c6b2").state_dict(), _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for share in (0.01, 0.3, 0.6, 0.99):
        path.write_bytes(whole[:int(share * len(whole))])
        refused(path, "truncated")


@pytest.mark.parametrize("content, words", [
    (torch.zeros(3), ["Tensor"]), ([1, 2], ["list"]), (None, ["NoneType"]), ({}, []),
    ({"epoch": 3, "lr": 0.1}, ["epoch", "lr"]),
    ({"params": {}}, []), ({"params": torch.zeros(3)}, ["params"]), ({"state_dict": {"a": "b"}}, ["a"]),
    ({3: torch.zeros(3)}, ["3"]), ({"conv_first.weight": "text"}, ["conv_first.weight"]),
    ({"fc.weight": torch.zeros(4, 4), "fc.bias": torch.zeros(4), "bn.weight": torch.zeros(4)}, ["fc.weight", "fc.bias"]),
    ({"conv_first.weight": torch.zeros(()), "upsample.0.weight": torch.zeros(())}, ["conv_first.weight"]),
    ({"head.0.weight": torch.zeros(8, 3, 3, 3)}, ["first"]), ({"two\nlines": torch.zeros(1)}, [])])
def test_content_that_is_no_network(tmp_path, content, words):
    refused(stored(tmp_path, content), *words)


def edited(kind, edit):
    state = dict(foreign.randomise(FOREIGN[kind](2)).state_dict())
    edit(state)
    return state


@pytest.mark.parametrize("kind, key", [
    ("edsr basicsr", "body.1.conv2.bias"), ("edsr basicsr", "conv_last.weight"),
    ("rcan basicsr", "body.1.residual_group.1.rcab.0.bias"), ("swinir", "layers.1.residual_group.blocks.1.mlp.fc2.bias"),
    ("swinir", "norm.weight"), ("swinir", "conv_after_body.weight"), ("swinir", "patch_embed.norm.bias")])
def test_missing_extra_and_misshaped_keys_are_named(tmp_path, kind, key):
    refused(stored(tmp_path, edited(kind, lambda s: s.pop(key))), key, "missing")
    refused(stored(tmp_path, edited(kind, lambda s: s.update({key + "2": s[key]}))), key + "2")
    shape = tuple(edited(kind, lambda s: None)[key].shape)
    wrong = (shape[0] + 1, *shape[1:])
    refused(stored(tmp_path, edited(kind, lambda s: s.update({key: torch.zeros(wrong)}))), key, str(wrong), str(shape))


@pytest.mark.parametrize("kind", FOREIGN)
def test_networks_for_grey_pictures_are_refused(tmp_path, kind):
    first = "head.0.weight" if "authors" in kind else "conv_first.weight"
    refused(stored(tmp_path, edited(kind, lambda s: s.update({first: s[first][:, :1]}))), "3, 3, 3")


@pytest.mark.parametrize("edit", [
    lambda s: s.update({"sub_mean.weight": torch.zeros(3, 3, 1, 1)}),  # nothing passes
    lambda s: s.update({"sub_mean.weight": torch.ones(1, 1, 1, 1), "sub_mean.bias": torch.ones(1)}),
    lambda s: s.update({"sub_mean.weight": torch.eye(3)[0]}),
    lambda s: s.update({"sub_mean.weight": torch.tensor(1.0)}),
    lambda s: s.update({"sub_mean.bias": torch.full((3,), float("nan"))}),
    lambda s: s.pop("sub_mean.weight"),
], ids=["zero", "one colour", "a vector", "a number", "not a number", "no weight"])
def test_a_wrong_mean_shift_is_refused(tmp_path, edit):
    refused(stored(tmp_path, edited("edsr authors", edit)), "sub_mean")


@pytest.mark.parametrize("edit", [
    lambda net: net.add_mean.bias.data.add_(3.0),
    lambda net: net.sub_mean.bias.data.mul_(1.01),
    lambda net: net.add_mean.weight.data.mul_(0.9),
    lambda net: net.sub_mean.weight.data.add_(0.01),
], ids=["add_mean.bias", "sub_mean.bias", "add_mean.weight", "sub_mean.weight"])
def test_mean_shifts_that_were_trained_are_never_ignored(tmp_path, edit):
    """In old EDSR-PyTorch and RCAN code the shifts were not frozen: such a file is answered for exactly, or refused."""
    net = foreign.randomise(foreign.AuthorsEDSR(2))
    edit(net)
    path = stored(tmp_path, net.state_dict())
    try:
        model = models.load(path)
    except models.CheckpointError:
        refused(path, "_mean")
    else:
        same_output(net, model)


def test_attention_without_heads_is_refused(tmp_path):
    key = "layers.0.residual_group.blocks.0.attn.relative_position_bias_table"
    refused(stored(tmp_path, edited("swinir", lambda s: s.update({key: s[key][:, :0]}))))


class Hostile:
    """Pickles as a call, which an ordinary unpickler makes."""

    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name, hostile", [
    ("system", lambda marker: Hostile(os.system, f"touch {marker}")),
    ("eval", lambda marker: Hostile(eval, f"open({str(marker)!r}, 'w')")),
    ("open", lambda marker: Hostile(open, str(marker), "w"))], ids=["system", "eval", "open"])
def test_a_file_that_wants_to_run_code_is_refused_by_name(tmp_path, name, hostile, zipped):
    marker = tmp_path / "marker"
    content = {"params_ema": tiny("edsr_c6b2").state_dict(), "note": hostile(marker)}
    path = stored(tmp_path, content, _use_new_zipfile_serialization=zipped)
    message = refused(path, "run code", name)
    assert "whole" not in message and not marker.exists()
    torch.load(path, weights_only=False)  # the trap was a live one
    assert marker.exists()


def test_a_bare_hostile_pickle_is_refused(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "net.pt"
    path.write_bytes(pickle.dumps(Hostile(os.system, f"touch {marker}"), protocol=2))
    refused(path)
    assert not marker.exists()


def test_a_whole_pickled_network_is_refused_by_name(tmp_path):
    refused(stored(tmp_path, foreign.AuthorsEDSR(2)), "AuthorsEDSR", "state dict")


# -------------------------------------------------------------------------------- fuzz
def loads_or_refuses(path):
    """Any file either loads as a network that works, or raises CheckpointError in one line."""
    try:
        model = models.load(path)
    except models.CheckpointError as e:
        assert "\n" not in str(e)
    else:
        assert run(model, picture(1, 3, 3, 2)).shape == (1, 3, 3 * model.scale, 2 * model.scale)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def whole_file(folder, kind):
    net = {"edsr": foreign.AuthorsEDSR(2, c=2, n=1), "own": models.build("edsr_c2b1", 2)}[kind.split()[0]]
    path = folder / "whole.pt"
    if kind == "own":
        models.save(path, net)
    elif "safetensors" in kind:
        path = folder / "whole.safetensors"
        pytest.importorskip("safetensors.torch").save_file(net.state_dict(), path)
    else:
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization="legacy" not in kind)
    return path


@pytest.mark.parametrize("kind", ["own", "edsr zip", "edsr legacy", "edsr safetensors"])
@pytest.mark.filterwarnings("ignore")  # torch's remarks on the damage
def test_damaged_bytes(folder, kind):
    path = whole_file(folder, kind)
    whole = path.read_bytes()
    assert models.load(path).scale == 2
    broken = folder / f"broken{path.suffix}"
    place = st.integers(0, len(whole) - 1)
    edit = st.tuples(st.sampled_from(["flip", "cut", "insert", "end"]), place, st.integers(1, 255))
    edits = st.lists(edit, min_size=1, max_size=4)

    @hypothesis.settings(max_examples=60, **QUICK)
    @hypothesis.given(edits)
    def check(edits):
        broken.write_bytes(damaged(whole, edits))
        loads_or_refuses(broken)
    check()


DAMAGE = {
    "remove": lambda v: None, "number": lambda v: v.flatten()[0], "flat": lambda v: v.flatten(), "empty": lambda v: v[:0],
    "first": lambda v: v[:1], "deeper": lambda v: v[None], "turned": lambda v: v.transpose(0, -1),
    "twice": lambda v: torch.cat([v, v]),
    "text": lambda v: "text", "whole numbers": lambda v: v.round().int(), "complex": lambda v: v.to(torch.complex64),
    "sparse": lambda v: v.float().to_sparse(), "double": lambda v: v.double(), "no columns": lambda v: v[..., :0],
}


@pytest.mark.parametrize("kind", ["edsr authors", "rcan authors", "rcan basicsr", "swinir", "swinir lightweight"])
@pytest.mark.filterwarnings("ignore")  # torch warns of the complex numbers and empty tensors that are meant here
def test_damaged_entries(folder, kind):
    state = foreign.randomise(FOREIGN[kind](2)).state_dict()
    damages = st.dictionaries(st.sampled_from(sorted(state)), st.sampled_from(sorted(DAMAGE)), min_size=1, max_size=4)

    @hypothesis.settings(max_examples=40, **QUICK)
    @hypothesis.given(damages)
    def check(damages):
        new = {k: DAMAGE[damages[k]](v) if k in damages else v for k, v in state.items()}
        loads_or_refuses(stored(folder, {k: v for k, v in new.items() if v is not None}, "entries.pt"))
    check()


@pytest.mark.parametrize("kind", ["edsr authors", "rcan authors", "rcan basicsr", "swinir lightweight"])
def test_every_entry_counts(folder, kind):
    """Without any one of its weights a file is refused, and named is what it lacks."""
    smallest = dict(stages=1) if "swinir" in kind else dict(n=1, groups=1) if "rcan" in kind else dict(n=1)
    state = foreign.randomise(FOREIGN[kind](2, **smallest)).state_dict()
    for key in state:
        if not key.endswith(("attn_mask", "relative_position_index")) and "_mean." not in key:
            refused(stored(folder, {k: v for k, v in state.items() if k != key}, "lacking.pt"))


@pytest.mark.parametrize("damage", ["number", "flat", "empty", "no columns"])
@pytest.mark.filterwarnings("ignore")
def test_every_entrys_shape_counts(folder, damage):
    state = foreign.randomise(foreign.AuthorsEDSR(2, n=1)).state_dict()
    for key, value in state.items():
        if value.shape != DAMAGE[damage](value).shape and "_mean.weight" not in key:
            refused(stored(folder, state | {key: DAMAGE[damage](value)}, "reshaped.pt"))


# -------------------------------------------------------------------------------- other architectures, by spandrel
class InPlace(torch.nn.Module):
    """×2 by repetition; like spandrel's RCAN, it scribbles on its input."""

    def forward(self, x):
        self.seen = x.clone()
        x *= 255
        return F.interpolate(x, scale_factor=2) / 255


@pytest.mark.parametrize("h, w, padded", [(8, 12, (8, 12)), (1, 1, (8, 8)), (9, 15, (12, 16)), (6, 20, (8, 20))])
def test_a_foreign_network_pads_crops_and_spares_its_input(h, w, padded):
    needs = types.SimpleNamespace(multiple_of=4, minimum=8)
    descriptor = types.SimpleNamespace(model=InPlace(), scale=2, architecture=types.SimpleNamespace(name="X"),
                                       size_requirements=needs)
    model, x = models.Foreign(descriptor), picture(2, 3, h, w)
    y = run(model, x)
    assert torch.equal(x, picture(2, 3, h, w))
    assert (y - F.interpolate(x, scale_factor=2)).abs().max() < 1e-6
    mirrored = np.pad(x.numpy(), ((0, 0), (0, 0), (0, padded[0] - h), (0, padded[1] - w)), mode="reflect")
    assert np.array_equal(model.model.seen.numpy(), mirrored)  # as spandrel pads
    assert model.scale == 2 and model.config["arch"] == "X" and model.taps == []


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError"])
def test_a_spandrel_that_cannot_be_imported(tmp_path, monkeypatch, error):
    """A torchvision that does not match torch makes spandrel's import raise RuntimeError."""
    (tmp_path / "spandrel.py").write_text(f"raise {error}('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "spandrel", raising=False)
    refused(stored(tmp_path, {"odd.weight": torch.zeros(2)}), "odd.weight", "spandrel")


def span():
    spandrel = pytest.importorskip("spandrel.architectures.SPAN")
    return spandrel.SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2).eval()


def hat():  # has all of SwinIR's names, and more
    spandrel = pytest.importorskip("spandrel.architectures.HAT")
    return spandrel.HAT(embed_dim=36, depths=(2, 2), num_heads=(2, 2), window_size=8, upscale=2, img_size=16,
                        upsampler="pixelshuffle", compress_ratio=3, squeeze_factor=9).eval()


def safmn():  # takes multiples of eight
    return pytest.importorskip("spandrel.architectures.SAFMN").SAFMN(dim=8, n_blocks=2, upscaling_factor=2).eval()


def esrgan():  # all its keys begin with "model.": no prefix to remove
    spandrel = pytest.importorskip("spandrel.architectures.ESRGAN.__arch.RRDB")
    return spandrel.RRDBNet(in_nc=3, out_nc=3, num_filters=8, num_blocks=1, scale=2).eval()


@pytest.mark.parametrize("make", [span, hat, safmn, esrgan])
@pytest.mark.filterwarnings("ignore")
def test_other_architectures_load_through_spandrel(tmp_path, make):
    net = make()
    path = stored(tmp_path, {"params": net.state_dict()})
    model = models.load(path)
    assert isinstance(model, models.Foreign) and model.scale == 2 and not model.training
    x = picture(1, 3, 16, 24)
    assert (run(model, x) - run(net, x.clone())).abs().max() < 1e-5
    x = picture(1, 3, 19, 26)  # spandrel pads and clips
    theirs = pytest.importorskip("spandrel").ModelLoader(device="cpu").load_from_file(path)
    assert (run(model, x).clamp(0, 1) - theirs(x.clone())).abs().max() < 1e-5
    assert run(model, picture(2, 3, 5, 9)).shape == (2, 3, 10, 18)


@pytest.mark.parametrize("head", ["pixelshuffle", "pixelshuffledirect"])
@pytest.mark.filterwarnings("ignore")
def test_spandrel_reads_our_swinir(tmp_path, head):
    spandrel = pytest.importorskip("spandrel")
    model, x = swinir(0.1, head=head), picture(1, 3, 19, 26)
    models.save(tmp_path / "net.pt", model)
    descriptor = spandrel.ModelLoader(device="cpu").load_from_file(tmp_path / "net.pt").eval()
    assert descriptor.scale == 2 and (run(descriptor.model, x) - run(model, x)).abs().max() < 1e-5
