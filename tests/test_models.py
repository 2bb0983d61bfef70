"""models.py: the networks, their names, the checkpoint formats of other codes, and files that are refused."""
import os
import re
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import models
from samples import raises

CONFIGS = {
    "edsr": dict(arch="edsr", channels=6, blocks=3, res_scale=0.3),
    "rcan": dict(arch="rcan", channels=8, blocks=2, groups=2, reduction=4),
    "swinir": dict(arch="swinir", channels=12, stages=2, layers=2, heads=3),
    "lightweight": dict(arch="swinir", channels=22, stages=1, layers=2, heads=2, window=4, mlp_ratio=15 / 22,
                        head="pixelshuffledirect"),  # 22·(15/22) is 14.999… in floats
}
EVERY = [(kind, scale) for kind in CONFIGS for scale in models.SCALES]
UNTOLD = dict(edsr=dict(res_scale=0.3), rcan={}, swinir={}, lightweight={})  # what shapes do not tell


def make(kind, scale=2, seed=0, **more):
    """A small network in eval mode. All its weights, biases and norms, are random numbers from a seed."""
    net = models.from_config(CONFIGS[kind] | dict(scale=scale) | more)
    rng = np.random.RandomState(seed)
    for p in net.parameters():
        p.data = torch.tensor(rng.randn(*p.shape) / max(p[0].numel(), 4) ** 0.5, dtype=torch.float32)
    return net.eval()


def picture(*size, seed=0):
    return torch.tensor(np.random.RandomState(seed).rand(*size), dtype=torch.float32)


def same(a, b, size=(2, 3, 9, 13), tolerance=1e-5):
    with torch.no_grad():
        x = picture(*size)
        expected = b(x)
        assert expected.std() > 0.05  # a flat output agrees with anything
        assert (a(x) - expected).abs().max() < tolerance


def refused(path, *words, **override):
    raises(models.InputError, lambda: models.load(path, **override), path, *words)


def stored(tmp_path, content, name="net.pt", **options):
    torch.save(content, tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("name, counts", [
    ("edsr", (40_729_603, 43_680_003, 43_089_923)), ("edsr_baseline", (1_369_859, 1_554_499, 1_517_571)),
    ("rcan", (15_444_643, 15_629_283, 15_592_355)), ("swinir", (11_752_487, 11_937_127, 11_900_199))])
def test_parameters_as_published(name, counts):
    with torch.device("meta"):
        assert tuple(models.parameters(models.build(name, scale)) for scale in (2, 3, 4)) == counts


@pytest.mark.parametrize("kind, pixel, middle", [
    ("edsr", [0.2712, 0.9998, 0.0670], ["body.1", "body.2"]),
    ("rcan", [1.5699, 2.3713, 0.5020], ["body.0", "body.1"]),
    ("swinir", [1.6642, 1.1376, -0.1439], ["layers.0.conv", "layers.1.conv"]),
    ("lightweight", [0.1217, 0.7775, -1.1465], ["layers.0.conv", "layers.0.conv"])])
def test_outputs_are_what_they_always_were_and_taps_are_four_maps_of_the_inputs_size(kind, pixel, middle):
    """An output pixel was computed by an earlier version of the networks."""
    net, shapes = make(kind), []
    with torch.no_grad():
        assert net(picture(2, 3, 9, 13))[0, :, 5, 7].tolist() == pytest.approx(pixel, abs=2e-4)
    assert net.taps == [net.get_submodule(name) for name in ("conv_first", *middle, "conv_after_body")]
    for tap in net.taps:
        tap.register_forward_hook(lambda module, x, y: shapes.append(tuple(y.shape)))
    net(picture(2, 3, 8, 16))
    assert shapes == [(2, net.config["channels"], 8, 16)] * 4


@pytest.mark.parametrize("kind, scale", EVERY)
def test_any_size_of_input_and_bfloat16(kind, scale):
    """Outputs are s times as large, the pictures of a batch do not mix, and the input stays as it was.
    Autocast gives the same picture and gradient but for rounding."""
    net = make(kind, scale)
    for h, w in [(8, 8), (7, 5), (1, 9), (1, 1)]:
        x = picture(3, 3, h, w)
        with torch.no_grad():
            y, alone = net(x), net(x[1:2])
        assert y.shape == (3, 3, scale * h, scale * w) and y.dtype == torch.float32
        assert (y[1:2] - alone).abs().max() < 1e-4
        assert torch.equal(x, picture(3, 3, h, w))
    x, answers = picture(1, 3, 9, 14), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled):
            y = net(x)
        last = net.upsample[0] if kind == "lightweight" else net.conv_last
        answers.append([y, *torch.autograd.grad(y.mean(), [last.weight, net.conv_first.weight])])
    for exact, rounded in zip(*answers):
        assert rounded.dtype == torch.float32
        assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("r", [2, 3])
def test_a_convolution_after_a_shuffle_is_computed_before_it(r):
    """Values and gradients, at sizes where all pixels lie at a border and where most do not."""
    torch.manual_seed(r)
    conv = models.conv3x3(5, 3).double()
    for h, w in [(1, 1), (2, 5), (13, 7)]:
        x = torch.randn(2, 5 * r * r, h, w, dtype=torch.float64, requires_grad=True)
        given, results = (x, conv.weight, conv.bias), []
        for y in (conv(F.pixel_shuffle(x, r)), models.shuffle_then_conv(x, r, conv)):
            results.append([y, *torch.autograd.grad(y.square().sum(), given)])
        for plain, ours in zip(*results):
            assert (plain - ours).abs().max() < 1e-12 * plain.abs().max()


def test_padding_is_numpys_reflection():
    for n in range(200):
        rng = np.random.RandomState(n)
        (h, w), multiple = rng.randint(1, 20, 2), int(rng.randint(1, 20))
        x = picture(1, 2, h, w, seed=n)
        expected = np.pad(x.numpy(), ((0, 0), (0, 0), (0, -h % multiple), (0, -w % multiple)), mode="reflect")
        assert np.array_equal(models.mirror(x, multiple).numpy(), expected)


def test_drop_path_drops_whole_samples_in_training_only():
    """The second of two layers drops either branch with p = 0.5: a quarter of the samples stay unchanged."""
    net, calls = make("swinir", stages=1, drop_path=0.5).train(), []
    layer = net.layers[0].residual_group["blocks"][1]
    layer.register_forward_hook(lambda module, args, y: calls.append((*args, y)))
    torch.manual_seed(0)
    net(picture(1, 3, 8, 8).expand(400, -1, -1, -1))
    net.eval()(picture(1, 3, 8, 8))
    (x, _, keep, y), (_, _, in_eval_mode, _) = calls
    assert in_eval_mode is None and set(keep.unique().tolist()) == {0, 2}  # 2 = 1/(1 − p) keeps the mean
    unchanged = (x == y).flatten(1).all(1)
    assert torch.equal(unchanged, (keep == 0).all(0).flatten()) and 70 < unchanged.sum() < 130


@pytest.mark.parametrize("name, description", [
    ("edsr", "edsr scale=3 channels=256 blocks=32 res_scale=0.1"),
    ("edsr_c32b31", "edsr scale=3 channels=32 blocks=31 res_scale=1.0"),
    ("rcan_c8b6g5", "rcan scale=3 channels=8 blocks=6 groups=5 reduction=8"),
    ("swinir_c60s24", "swinir scale=3 channels=60 stages=4 layers=6 heads=6 window=8 mlp_ratio=2.0 "
     "head=pixelshuffle")])
def test_names(name, description):
    with torch.device("meta"):
        img_range = 1.0 if "swinir" in name else 255.0
        description = f"arch={description} mean=[0.4488, 0.4371, 0.404] img_range={img_range}"
        described = models.describe(models.build(name, 3).config)
        assert described.replace(" drop_path=0.1", "") == description


@pytest.mark.parametrize("name, scale, message", [
    ("vdsr_deep", 4, "unknown model 'vdsr_deep'; known: edsr, "), ("edsr_c64b16 ", 4, "unknown"),
    ("rcan_c64b6", 4, "unknown"), ("edsr_c64b0", 4, "unknown"), ("edsr_c64b16r", 4, "unknown"),
    ("rcan_c64b6g10r0.1", 4, "unknown"), ("edsr_basline", 4, "unknown"), ("smal", 4, "unknown"),
    ("swinir_c12s5", 4, "'swinir_c12s5': the Swin layers must be a multiple of six"),
    ("swinir_c20s6", 4, "(20) must be a multiple of its 6 heads"),
    ("edsr_c4b1", 5, "scale 5 is not one of 2, 3, 4, 8"), ("rcan_c4b1g1", None, "2, 3, 4, 8")])
def test_names_that_are_refused(name, scale, message):
    raises(models.InputError, lambda: models.build(name, scale), message)


@pytest.mark.parametrize("teacher, student", [
    ("edsr", "edsr_c64b32"), ("rcan", "rcan_c64b6g10"), ("swinir", "swinir_c60s24"),
    ("edsr_baseline", "edsr_c32b16"), ("rcan_c64b6g10", "rcan_c32b6g10"), ("swinir_c60s24", "swinir_c30s24"),
    ("edsr_c1b1", "edsr_c1b1"), ("swinir_c54s6", "swinir_c24s6"), ("rcan_c16b1g1", "rcan_c8b1g1")])
def test_small_is_the_papers_student_or_half_the_width(teacher, student):
    with torch.device("meta"):
        config = models.small(models.build(teacher, 3))
        assert models.from_config(config).config == models.build(student, 3).config


BLOCKS = [f"layers.0.residual_group.blocks.{i}" for i in range(6)]
SWIN_LAYER = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
RCAB = "body.0.residual_group.0.rcab"


@pytest.mark.parametrize("name, layers", [
    ("edsr_c4b1", ["body.0.conv1", "body.0.conv2"]),
    ("rcan_c4b1g1", ["body.0.conv", *[f"{RCAB}.{i}" for i in ("0", "2", "3.attention.1", "3.attention.3")]]),
    ("swinir_c6s6", ["patch_embed.norm", "layers.0.conv", "norm", "conv_before_upsample.0",
                     *[f"{block}.{layer}" for block in BLOCKS for layer in SWIN_LAYER]])])
def test_saved_files_have_the_published_names(tmp_path, name, layers):
    """Those of BasicSR, and of SwinIR's authors."""
    models.save(tmp_path / "net.pt", models.build(name, 4))
    content = torch.load(tmp_path / "net.pt", weights_only=True)
    layers = [*layers, "conv_first", "conv_after_body", "upsample.0", "upsample.2", "conv_last"]
    expected = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    if name == "swinir_c6s6":  # also the authors' constants, for a 48×48 input
        tables = ("relative_position_bias_table", "relative_position_index")
        expected |= {f"{block}.attn.{table}" for block in BLOCKS for table in tables}
        expected |= {f"{block}.attn_mask" for block in BLOCKS[1::2]}
        assert content["params"][f"{BLOCKS[1]}.attn_mask"].shape == (36, 64, 64)
    assert set(content["params"]) == set(content["params_ema"]) == expected


@pytest.mark.parametrize("kind, scale", EVERY)
def test_files_come_back(tmp_path, kind, scale):
    """With the settings in the file; bare, as other codes write it, shapes tell all but res_scale."""
    net, raw, path = make(kind, scale), make(kind, scale, seed=1), tmp_path / "net.pt"
    models.save(path, net.train(), params=raw.state_dict())
    again = models.load(path)
    assert again.config == net.config and not again.training
    same(again, net.eval())
    bare = torch.load(path, weights_only=True)["params"]
    again = models.load(stored(tmp_path, bare), **UNTOLD[kind])
    assert again.config == net.config
    same(again, raw)


def authors_file(core, mean, trained):
    """A state dict under EDSR's or RCAN's authors' names, with their mean shifts around `core`; its function.
    trained: the shifts, which are 1×1 convolutions, are more than the identity and a mean."""
    blocks = core.config["blocks"]
    renames = {"conv_first": "head.0", "conv_last": "tail.1", "upsample": "tail.0",
               "conv_after_body": f"body.{core.config.get('groups', blocks)}", ".conv.": f".body.{blocks}.",
               ".conv1": ".body.0", ".conv2": ".body.2", "residual_group": "body", "rcab": "body",
               "attention.1": "conv_du.0", "attention.3": "conv_du.2"}
    state = core.state_dict()
    for ours, theirs in renames.items():
        state = {k.replace(ours, theirs): v for k, v in state.items()}
    wobble = (torch.tensor(np.random.RandomState(1).randn(2, 3, 3, 1, 1)) * (0.1 if trained else 0)).float()
    for i, name in enumerate(("sub_mean", "add_mean")):
        state[f"{name}.weight"] = torch.eye(3).view(3, 3, 1, 1) + wobble[i]
        state[f"{name}.bias"] = (2 * i - 1) * torch.tensor(mean) * 255 + 20 * wobble[i, 0].flatten()

    def forward(x):
        y = core(F.conv2d(255 * x, state["sub_mean.weight"], state["sub_mean.bias"]))
        return F.conv2d(y, state["add_mean.weight"], state["add_mean.bias"]) / 255
    return state, forward


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("scale", models.SCALES)
@pytest.mark.parametrize("kind", ["edsr", "rcan"])
def test_the_authors_files_answer_as_the_authors_code(tmp_path, kind, scale, trained):
    """The mean shifts are folded exactly, also at the border, where convolutions meet the zero padding.
    Other codes train without them: no mean, range 1. BasicSR's names keep BasicSR's mean."""
    mean = (0.51, 0.02, 0.004) if scale == 3 else models.DIV2K_MEAN
    core = make(kind, scale, mean=(0, 0, 0), img_range=1.0)
    state, forward = authors_file(core, mean, trained)
    net = models.load(stored(tmp_path, state), **UNTOLD[kind])
    assert net.scale == scale and net.img_range == 255
    assert trained or net.config["mean"] == pytest.approx(mean, abs=1e-6)
    same(net, forward)
    models.save(tmp_path / "ours.pt", net)
    same(models.load(tmp_path / "ours.pt"), forward)
    if kind == "edsr":  # spandrel takes such an RCAN as it is
        refused(stored(tmp_path, state | {"sub_mean.weight": torch.zeros(3, 3, 1, 1)}))  # it has no inverse
        refused(stored(tmp_path, state | {"add_mean.weight": torch.ones(3)}))
    path = stored(tmp_path, {k: v for k, v in state.items() if "_mean" not in k})
    same(models.load(path, **UNTOLD[kind]), core)
    same(models.load(path, mean=models.DIV2K_MEAN, img_range=255.0, **UNTOLD[kind]), make(kind, scale))
    same(models.load(stored(tmp_path, core.state_dict()), **UNTOLD[kind]), make(kind, scale))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "net_g.", "netG.", "generator.",
                                    "module._orig_mod.", "module.model.net_g."])
@pytest.mark.parametrize("kind", ["rcan", "swinir"])
def test_wrappers_prefixes_and_counters_beside_the_weights(tmp_path, kind, prefix):
    """Counters are those of thop, one in each module, and of torch.optim.swa_utils, without the prefix."""
    net, other = make(kind), make(kind, seed=1).state_dict()
    counters = ("total_ops", "conv_first.total_ops", "conv_first.total_params")
    state = net.state_dict() | {name: torch.zeros(1).double() for name in counters}
    state = {f"{prefix}{name}": v for name, v in state.items()}
    for content in (state | {"n_averaged": torch.tensor(7)}, {"epoch": 3, "state_dict": state},
                    {"params": other, "params_ema": state},
                    {"params": state, "config": {"mean": [0, 0, 0]}},  # other codes' settings
                    {"params": state, "config": {"arch": kind, "n_feats": 8}},
                    {"model": state, "optimizer": {"state": {}}, "config": {"arch": "unet"}}):
        same(models.load(stored(tmp_path, content)), net)


@pytest.mark.parametrize("number", [np.float64(31.5), np.float32(31.5), np.int64(31), np.bool_(True)])
def test_numpys_numbers_beside_the_weights(tmp_path, number):
    """Also under the module names of another numpy: numpy.core (1) or numpy._core (2)."""
    net = make("edsr")
    content = {"params": net.state_dict(), "best_psnr": number}
    same(models.load(stored(tmp_path, content), res_scale=0.3), net)
    path = stored(tmp_path, content, _use_new_zipfile_serialization=False)
    written = path.read_bytes()
    for core in (b"numpy.core", b"numpy._core"):
        path.write_bytes(re.sub(rb"numpy\._?core", core, written))
        assert core in path.read_bytes() and models.read_file(path)["best_psnr"] == number


def test_settings_that_shapes_do_not_tell(tmp_path):
    """The override beats the file's own setting, which beats the published one."""
    net = make("edsr")
    models.save(tmp_path / "net.pt", net)
    assert models.load(tmp_path / "net.pt", res_scale=0.7).config["res_scale"] == 0.7
    assert models.load(stored(tmp_path, net.state_dict(), "bare.pt")).config["res_scale"] == 1
    for other in (dict(blocks=5), dict(scale=4), dict(res_scael=1.0), dict(mean=(0.5, 0.5))):
        refused(tmp_path / "bare.pt", **other)


class Found:
    """A stand-in for what the package spandrel finds. It edits its input, and answers in inference mode."""
    purpose, scale, input_channels, output_channels = "SR", 2, 3, 3
    architecture = types.SimpleNamespace(name="X")

    def __init__(self, state):
        assert list(state) == ["body.0.weight", "body.1.weight"]
        self.model = torch.nn.Identity()

    @torch.inference_mode()
    def __call__(self, x):
        return F.interpolate(x.mul_(2), scale_factor=2)


def test_another_packages_network_and_why_it_is_not_read(tmp_path, monkeypatch):
    """The package is not installed, does not work, or does not know the weights either. Where it does, the
    prefix module. is taken off, but no part of the network's own names."""
    path = stored(tmp_path, {f"module.body.{i}.weight": torch.zeros(2) for i in (0, 1)})
    monkeypatch.setitem(sys.modules, "spandrel", None)
    refused(path, "For other networks: pip install spandrel")
    (tmp_path / "spandrel.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "spandrel")
    monkeypatch.syspath_prepend(tmp_path)
    refused(path, "fails to import (operator torchvision::nms does not exist)", "install both from one")
    monkeypatch.setitem(sys.modules, "spandrel", types.SimpleNamespace(ModelLoader=None))
    refused(path, "spandrel does not know it either")
    loader = types.SimpleNamespace(load_from_state_dict=Found)
    monkeypatch.setitem(sys.modules, "spandrel", types.SimpleNamespace(ModelLoader=lambda device: loader))
    net, x = models.load(path), picture(2, 3, 9, 5)
    assert torch.equal(net(x), F.interpolate(x * 2, scale_factor=2)) and torch.equal(x, picture(2, 3, 9, 5))
    assert (net.scale, net.config["arch"], net.taps, net.receptive_radius) == (2, "X", [], None)
    assert list(net.children()) == [net.model]  # .to(device) reaches it
    F.mse_loss(picture(2, 3, 18, 10).requires_grad_(), net(x)).backward()  # it serves as a label
    raises(models.InputError, lambda: models.small(net), "X")
    refused(path, res_scale=0.1)
    monkeypatch.setattr(Found, "input_channels", 1)
    refused(path, "from 1 to 3 channels")


@pytest.mark.filterwarnings("ignore")
def test_spandrels_networks_are_read_and_spandrel_reads_our_files(tmp_path):
    spandrel = pytest.importorskip("spandrel")
    theirs = spandrel.architectures.Compact.Compact(num_feat=8, upscale=2)
    weights = {f"model.{name}": v for name, v in theirs.state_dict().items()}
    net, x = models.load(stored(tmp_path, weights)), picture(2, 3, 9, 5)
    assert torch.allclose(net(x), theirs(x).clamp(0, 1), atol=1e-6)
    for kind in ("swinir", "lightweight"):
        net = make(kind, mlp_ratio=2.0)
        models.save(tmp_path / "net.pt", net)
        found = spandrel.ModelLoader(device="cpu").load_from_file(tmp_path / "net.pt").eval()
        same(lambda x: found.model(x.clone()), net, (1, 3, 16, 24), 1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, scale", [("lightweight", 2), ("edsr", 3), ("rcan", 4)])
def test_onnx_export_takes_any_size_and_keeps_weights_as_such(kind, scale):
    """Other programs refuse a convolution whose weights the file computes."""
    pytest.importorskip("onnxscript")
    onnx, free = pytest.importorskip("onnx.reference"), torch.export.Dim.DYNAMIC
    net, sizes = make(kind, scale), {2: free, 3: free}
    program = torch.onnx.export(net, (picture(1, 3, 8, 10),), dynamo=True, dynamic_shapes=(sizes,))
    graph = program.model_proto.graph
    weights = {weight.name for weight in graph.initializer}
    assert weights.issuperset(node.input[1] for node in graph.node if node.op_type == "Conv")
    evaluator = onnx.ReferenceEvaluator(program.model_proto)
    for size in [(1, 3, 6, 11), (1, 3, 8, 10)]:
        same(lambda x: torch.tensor(evaluator.run(None, {"x": x.numpy()})[0]), net, size)


def test_content_that_is_no_network(tmp_path):
    whole = stored(tmp_path, make("edsr").state_dict()).read_bytes()
    for content in (b"", b"PK\3\4", b"a text\n", whole[:1000], whole[:-1000], whole[:-1]):
        (tmp_path / "net.pt").write_bytes(content)
        refused(tmp_path / "net.pt", "empty, truncated or damaged")
    bare = {"conv_first.weight": torch.zeros(4, 3, 3, 3), "upsample.0.weight": torch.zeros(())}
    for content, words in [
            ([1, 2], "list"), ({"epoch": 3}, "epoch"), ({"params": {}}, "no weights"), (bare, "is no EDSR"),
            ({"fc.weight": torch.zeros(4)}, "conv_first.weight"),
            ({"head.0.weight": torch.zeros(())}, "is no EDSR")]:
        refused(stored(tmp_path, content), words)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, zipped):
    sprung = tmp_path / "sprung"
    trap = type("Trap", (), {"__reduce__": lambda self: (open, (str(sprung), "w"))})()
    content = {"params": make("edsr").state_dict(), "note": trap}
    path = stored(tmp_path, content, _use_new_zipfile_serialization=zipped)
    refused(path, "wants to run code", "open")
    assert not sprung.exists()
    torch.load(path, weights_only=False)  # the trap was live
    assert sprung.exists()


@pytest.mark.parametrize("kind, key", [("edsr", "body.1.conv2.bias"), ("rcan", "body.1.conv.weight"),
                                       ("swinir", "patch_embed.norm.bias"), ("lightweight", "norm.weight")])
def test_weights_that_do_not_fit_are_named_and_nan_is_refused(tmp_path, kind, key):
    state = make(kind).state_dict()
    refused(stored(tmp_path, {k: v for k, v in state.items() if k != key}), key, "Missing")
    refused(stored(tmp_path, state | {"more": state[key]}), "more", "Unexpected")
    refused(stored(tmp_path, state | {key: torch.zeros(5, 3)}), key, "5, 3")
    state[key][0] = float("nan")
    refused(stored(tmp_path, state), "weights that are NaN or infinite")


def test_a_file_takes_the_old_ones_place_only_once_it_is_on_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "net.pt"
    path.write_text("old")
    monkeypatch.delattr(os, "fsync")  # a call fails
    with pytest.raises(AttributeError):
        models.save(path, make("edsr"))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["net.pt"]
