"""Tests of dukd.py, against values computed by hand or by a slow formula that is written here again."""
import inspect
import itertools
import math
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf

import dukd
from dukd import InvertibleAugmentation, bicubic_resize, zoom_in, zoom_out

OPS = InvertibleAugmentation.OPERATIONS
COMBINATIONS = list(itertools.product((False, True), repeat=4))  # of hflip, vflip, transpose, invert


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed))


def same(a, b, atol=1e-6):
    return torch.allclose(a, b, rtol=0, atol=atol)


def all_sixteen(ops=OPS):
    """A batch of 16 in which each sample has another subset of the operations."""
    return InvertibleAugmentation(ops, torch.tensor(COMBINATIONS).T)


def test_each_of_the_16_combinations_is_applied_pixel_by_pixel():
    x = uniform(16, 3, 5, 5)
    y = all_sixteen().apply(x)
    for n, (hflip, vflip, transpose, invert) in enumerate(COMBINATIONS):
        for row, column in itertools.product(range(5), repeat=2):
            i, j = (column, row) if transpose else (row, column)  # F transposes after it flips
            i = 4 - i if vflip else i
            j = 4 - j if hflip else j
            value = x[n, :, i, j]
            assert torch.equal(y[n, :, row, column], 1 - value if invert else value)


@pytest.mark.parametrize("scale", (1, 2, 3, 4))
def test_the_16_combinations_come_back_in_any_order_of_operations(scale):
    """F⁻¹ in forward order, as in the released code, would lose transposition with one flip."""
    def student(z):  # perfectly consistent: repeating pixels commutes with F
        return z.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    x = uniform(16, 3, 6, 6)
    for ops in itertools.permutations(OPS):
        F = all_sixteen(ops)
        back = F.invert(student(F.apply(x)))
        colours = F.masks[ops.index("invert")]
        assert torch.equal(back[~colours], student(x)[~colours])
        assert same(back, student(x))


def test_pictures_that_are_not_square_come_back_without_transpose_and_are_refused_with_it():
    x = uniform(16, 3, 4, 6)
    F = InvertibleAugmentation(("hflip", "vflip", "invert"), torch.tensor(COMBINATIONS).T[:3])
    assert same(F.invert(F.apply(x)), x)
    for p in (0, 1):  # refused whatever is drawn
        G = InvertibleAugmentation.sample(16, p=p)
        for operate in (G.apply, G.invert):
            with pytest.raises(ValueError, match="square patches, not 4x6"):
                operate(x)


@pytest.mark.parametrize("p", (0.1, 0.3, 0.9))
def test_operations_are_drawn_with_probability_p_each_by_itself(p):
    n = 40_000
    drawn = InvertibleAugmentation.sample(n, p=p, generator=seeded(1)).masks.double()
    assert drawn.shape == (4, n)
    assert (drawn.mean(1) - p).abs().max() < 5 * math.sqrt(p * (1 - p) / n)
    assert (torch.corrcoef(drawn) - torch.eye(4)).abs().max() < 5 / math.sqrt(n)  # of each two operations
    neighbours = ((drawn[:, 1:] - p) * (drawn[:, :-1] - p)).mean(1) / (p * (1 - p))  # of each two samples
    assert neighbours.abs().max() < 5 / math.sqrt(n)


def test_a_draw_has_the_papers_defaults_and_depends_on_its_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (InvertibleAugmentation.sample(20_000, generator=seeded(s)) for s in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.masks, again.masks) and not torch.equal(first.masks, other.masks)
    assert first.ops == OPS and first.masks.shape == (4, 20_000)
    assert (first.masks.double().mean(1) - 0.3).abs().max() < 0.02
    nothing = InvertibleAugmentation.sample(5, ops=())
    assert nothing.apply(x := uniform(5, 3, 4, 6)) is x and nothing.invert(x) is x


def test_masks_move_to_the_device_of_x():
    device = "cuda" if torch.cuda.is_available() else "meta"
    x, F = torch.rand(16, 3, 4, 4, device=device), all_sixteen()
    assert F.masks.device.type == "cpu"
    assert F.apply(x).device == x.device and F.invert(x).device == x.device
    assert InvertibleAugmentation.sample(16, device=device).masks.device.type == device


def coordinates(n, H, W):
    """Pictures (n,3,H,W) whose pixels hold (row, column, sample)."""
    sample, row, column = torch.meshgrid(*(torch.arange(float(k)) for k in (n, H, W)), indexing="ij")
    return torch.stack([row, column, sample], dim=1)


@pytest.mark.parametrize("H, W, size", [(11, 9, (4, 3)), (6, 6, 5), (5, 5, 5), (6, 3, (1, 3)), (1, 1, 1)])
def test_zoom_in_copies_crops_from_every_position_equally_often(H, W, size):
    n, (h, w) = 9000, (size, size) if isinstance(size, int) else size
    hr = coordinates(n, H, W)
    z = zoom_in(hr, size, seeded(5))
    assert z.shape == (n, 3, h, w) and z.is_contiguous()
    corner = z[:, :, :1, :1]
    assert torch.equal(z, corner + coordinates(1, h, w))  # the pixels beside the corner are those of the crop
    assert torch.equal(corner[:, 2].flatten(), torch.arange(float(n)))  # each crop comes from its own sample
    rooms = (H - h + 1) * (W - w + 1)
    counts = torch.bincount((corner[:, 0] * (W - w + 1) + corner[:, 1]).long().flatten(), minlength=rooms)
    assert len(counts) == rooms and counts.min() > 0  # the far edges too
    chi_square = (counts - n / rooms).square().sum() / (n / rooms)  # mean rooms − 1, variance 2·(rooms − 1)
    assert chi_square <= rooms - 1 + 6 * math.sqrt(2 * (rooms - 1))


def test_zoom_in_returns_a_copy_and_depends_on_its_generator_alone():
    hr = uniform(20, 5, 30, 30)
    before = torch.get_rng_state()
    first, again, other = (zoom_in(hr, 8, seeded(s)) for s in (6, 6, 7))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again) and not torch.equal(first, other)
    whole = zoom_in(hr, 30)
    assert torch.equal(whole, hr)
    whole.zero_()
    assert torch.equal(hr, uniform(20, 5, 30, 30))


def cubic(d):
    """The cubic kernel, a = −1/2."""
    d = abs(d)
    if d <= 1:
        return 3 * d**3 / 2 - 5 * d**2 / 2 + 1
    return -(d**3) / 2 + 5 * d**2 / 2 - 4 * d + 2 if d <= 2 else 0


def exact_matrix(n, factor):
    """Resizing along one axis as an (m,n) matrix, in exact fractions and then as floats."""
    stretch, rows = min(factor, Fraction(1)), []
    for x in range(1, math.ceil(factor * n) + 1):
        u = x / factor + (1 - 1 / factor) / 2
        support = range(math.floor(u - 2 / stretch), math.ceil(u + 2 / stretch) + 1)
        weights = [cubic((u - i) * stretch) for i in support]
        row = [Fraction(0)] * n
        for i, weight in zip(support, weights):
            while not 1 <= i <= n:  # … 2 1 | 1 2 … n | n n−1 …
                i = 1 - i if i < 1 else 2 * n + 1 - i
            row[i - 1] += weight / sum(weights)
        rows.append([float(weight) for weight in row])
    return torch.tensor(rows, dtype=torch.float64)


def resizing_weights(n, factor):
    """The (m,n) matrix by which bicubic_resize resizes one axis: what it makes of the unit vectors."""
    return bicubic_resize(torch.eye(n, dtype=torch.float64), factor, dims=(0,))


def test_the_weights_at_one_half_are_the_hand_computed_ones():
    """The distances are .25, .75, 1.25, 1.75 in the stretched kernel, which sums to 2 over both sides."""
    side = [-3 / 256, -9 / 256, 29 / 256, 111 / 256]
    assert resizing_weights(16, 0.5)[3].tolist() == [0] * 3 + side + side[::-1] + [0] * 5
    edge = [(111 + 29) / 256, (111 - 9) / 256, (29 - 3) / 256, (-9 - 3) / 256]  # … 2 1 | 1 2 3 4 | 4 3 …
    assert resizing_weights(4, 0.5)[0].tolist() == edge


def test_the_weights_at_2_3_and_one_third_are_the_hand_computed_ones():
    assert resizing_weights(9, 2)[7].tolist() == [0, 0, -9 / 128, 111 / 128, 29 / 128, -3 / 128, 0, 0, 0]
    rows = resizing_weights(9, 3)  # output 14 lies on input 5, output 15 on 5 1/3
    assert rows[13].tolist() == pytest.approx([0, 0, 0, 0, 1, 0, 0, 0, 0], abs=1e-15)
    assert rows[14].tolist() == pytest.approx([0, 0, 0, -2 / 27, 7 / 9, 1 / 3, -1 / 27, 0, 0], abs=1e-14)
    side = [7 / 27, 1 / 9, 0, -2 / 81, -1 / 81]  # output 5 lies on input 14: distances 0, 1/3, 2/3, …
    expected = [0] * 8 + side[::-1] + [1 / 3] + side + [0] * 8
    assert resizing_weights(27, 1 / 3)[4].tolist() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("factor", ("1/2", "1/3", "1/4", "2", "3", "4", "7/3"))
def test_the_weights_are_matlabs_at_any_size(factor):
    factor = Fraction(factor)
    for n in (1, 2, 3, 5, 8, 13, 27):  # 27·(7/3) is 63.00000000000001 in floats: 63 samples, not 64
        exact, weights = exact_matrix(n, factor), resizing_weights(n, float(factor))
        assert weights.shape == exact.shape and same(weights, exact, atol=1e-12)


@pytest.mark.parametrize("factor", (1 / 3, 1 / 4, 3))
def test_a_picture_is_resized_along_dims_and_hands_its_gradient_back(factor):
    x = torch.rand(2, 3, 7, 10, generator=seeded(), dtype=torch.float64).requires_grad_()
    rows, columns = (exact_matrix(n, Fraction(factor).limit_denominator(9)) for n in (7, 10))
    both = bicubic_resize(x, factor)
    assert same(both, rows @ x @ columns.T, atol=1e-12)
    assert same(bicubic_resize(x, factor, dims=(-1,)), x @ columns.T, atol=1e-12)
    assert same(bicubic_resize(x, factor, dims=(2,)), rows @ x, atol=1e-12)
    weight = uniform(*both.shape, seed=1).double()
    (both * weight).sum().backward()
    assert same(x.grad, rows.T @ weight @ columns, atol=1e-12)  # the transposed matrices
    single = bicubic_resize(x.detach().float(), factor)
    assert single.dtype == torch.float32 and same(single.double(), both.detach())


@pytest.mark.parametrize("scale", (2, 3, 4))
def test_zoom_out_reduces_by_s_and_keeps_constants(scale):
    lr = uniform(2, 3, 3 * scale, 4 * scale)
    z = zoom_out(lr, scale)
    rows, columns = (exact_matrix(n * scale, Fraction(1, scale)).float() for n in (3, 4))
    assert z.shape == (2, 3, 3, 4) and same(z, rows @ lr @ columns.T)
    assert torch.equal(lr, uniform(2, 3, 3 * scale, 4 * scale))
    assert same(zoom_out(torch.full_like(lr, 0.7), scale), torch.full_like(z, 0.7))


@pytest.mark.parametrize("message, function, arguments", [
    ("'rot'; known: hflip, vflip, transpose, invert", InvertibleAugmentation.sample, (2, ("hflip", "rot"))),
    ("twice: vflip, vflip", InvertibleAugmentation.sample, (2, ("vflip", "vflip"))),
    ("-0.1 is not a probability", InvertibleAugmentation.sample, (2, OPS, -0.1)),
    ("1.5 is not a probability", InvertibleAugmentation.sample, (2, OPS, 1.5)),
    ("nan is not a probability", InvertibleAugmentation.sample, (2, OPS, math.nan)),
    ("7x7 does not fit into patches of 6x8", zoom_in, (torch.zeros(2, 3, 6, 8), 7)),
    ("2x9 does not fit into patches of 6x8", zoom_in, (torch.zeros(2, 3, 6, 8), (2, 9))),
    ("9x8 are not a multiple of the scale 2", zoom_out, (torch.zeros(1, 3, 9, 8), 2)),
    ("8x9 are not a multiple of the scale 4", zoom_out, (torch.zeros(1, 3, 8, 9), 4))])
def test_mistakes_are_named(message, function, arguments):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def test_dukd_loss_by_hand():
    """F⁻¹ inverts, transposes, flips: [[0, 1], [.5, .25]], [[0, .5], [1, .25]], [[.5, 0], [.25, 1]]."""
    student = torch.tensor([[[[1.0, 0.0], [0.5, 0.75]]]])
    teacher = torch.tensor([[[[0.5, 0.25], [0.25, 1.0]]]])
    F = InvertibleAugmentation(("hflip", "transpose", "invert"), torch.tensor([[True]] * 3))
    assert dukd.dukd_loss(student, teacher, F).item() == 0.25 / 4
    assert dukd.dukd_loss(student, teacher).item() == (0.5 + 0.25 + 0.25 + 0.25) / 4


@pytest.mark.parametrize("h, w", [(8, 8), (4, 12)])
def test_all_of_l_dukd_for_a_network_that_makes_pixels_larger(h, w):
    """f_S is 0.9·f_T, and f_T repeats pixels. The draws are made again here, from the same generator."""
    lr, hr = uniform(6, 3, h, w), uniform(6, 3, 2 * h, 2 * w, seed=1)
    teacher = lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    scale = torch.tensor(0.9, requires_grad=True)
    loss = dukd.upcycling_loss(lambda x: scale * teacher(x), teacher, lr, hr, 0.5, seeded(3))
    generator = seeded(3)
    z_in, z_out = zoom_in(hr, (h, w), generator), zoom_out(lr, 2)
    ops = OPS if h == w else ("hflip", "vflip", "invert")
    F = InvertibleAugmentation.sample(6, ops, 0.5, generator)
    inverted = F.masks[-1].view(-1, 1, 1, 1)
    s_in = torch.where(inverted, 1 - 0.9 * (1 - z_in), 0.9 * z_in)  # F⁻¹ of 0.9·F(z)
    mae = lambda a, b: (a - b).abs().mean()
    expected = mae(s_in, z_in) + mae(0.9 * z_out, z_out) + mae(0.9 * teacher(z_out), lr)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert scale.grad != 0


def test_fitnet_by_hand():
    student = torch.tensor([[[[1.0, 2.0]], [[3.0, -2.0]]]])  # channel means 2, 0
    teacher = torch.tensor([[[[1.0, 3.0]], [[1.0, 3.0]], [[4.0, 0.0]]]])  # channel means 2, 2
    assert dukd.fitnet_loss(student, teacher).item() == (0 + 2) / 2


def test_attention_transfer_by_hand():
    """First sample: Σ_c f² = (3, 4), so q_S = (.6, .8). q_T = (1, 0): .4² + .8² = .8. The second agrees."""
    student = torch.tensor([[[[1.0, 2.0]], [[1.0, 0.0]], [[-1.0, 0.0]]], [[[1.0, 1.0]]] + [[[0.0, 0.0]]] * 2])
    teacher = torch.tensor([[[[5.0, 0.0]], [[-3.0, 0.0]]], [[[2.0, 2.0]], [[2.0, -2.0]]]])
    assert dukd.at_loss(student, teacher).item() == pytest.approx(0.8 / 2, abs=1e-6)


def test_fakd_by_hand():
    """The student's vectors are orthogonal, the teacher's have cosine 24/25. Two of four values differ."""
    student = torch.tensor([[[[2.0, 0.0]], [[0.0, 7.0]]]])
    teacher = torch.tensor([[[[3.0, 8.0]], [[4.0, 6.0]], [[0.0, 0.0]]]])
    assert dukd.fakd_loss(student, teacher).item() == pytest.approx(2 * 0.96 / 4, abs=1e-6)


LOSSES = {"dukd": dukd.dukd_loss, "dukd with F": lambda s, t: dukd.dukd_loss(s, t, all_sixteen()),
          "fitnet": dukd.fitnet_loss, "at": dukd.at_loss, "fakd": dukd.fakd_loss}


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_lowers_the_loss_of_the_student_and_never_reaches_the_teacher(name):
    student = uniform(16, 3, 4, 4).requires_grad_()
    teacher = uniform(16, 3, 4, 4, seed=1).requires_grad_()
    loss = LOSSES[name](student, teacher)
    loss.backward()
    assert loss.shape == () and teacher.grad is None
    step = 0.01 * loss.item() / student.grad.square().sum()  # to first order: 1 % less
    lower = LOSSES[name]((student - step * student.grad).detach(), teacher)
    assert 0.985 * loss.item() < lower.item() < 0.995 * loss.item()


@pytest.mark.parametrize("name", ("fitnet", "at", "fakd"))
def test_feature_losses_are_float32_and_finite_for_dead_features(name):
    student = torch.zeros(2, 4, 3, 3, dtype=torch.bfloat16).requires_grad_()
    loss = LOSSES[name](student, uniform(2, 4, 3, 3).bfloat16())
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and student.grad.isfinite().all()


def test_together_makes_one_forward_per_size_and_keeps_the_order():
    a, b, c = uniform(2, 3, 4, 4), uniform(1, 3, 6, 4, seed=1), uniform(3, 3, 4, 4, seed=2).requires_grad_()
    calls = []

    def net(x):
        calls.append(tuple(x.shape))
        return (2 * x).bfloat16()
    inputs = dict(a=a, b=b, c=c)
    outputs = dukd.together(net, inputs)
    assert calls == [(5, 3, 4, 4), (1, 3, 6, 4)] and outputs.keys() == inputs.keys()
    for name, x in inputs.items():
        assert outputs[name].dtype == torch.float32 and torch.equal(outputs[name], net(x).float())
    outputs["c"].sum().backward()
    assert torch.equal(c.grad, torch.full_like(c, 2))
    assert dukd.together(net, {}) == {}


def small_net():
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 1), torch.nn.ReLU(), torch.nn.Conv2d(5, 2, 1))
    return torch.nn.Sequential(body, torch.nn.Conv2d(2, 3, 1))


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_tapped_catches_the_first_forward_by_name_and_leaves_no_hooks():
    net, x = small_net(), uniform(2, 3, 4, 4)
    with dukd.tapped(net, ["0.2", "0.0"]) as features:
        assert features == {} and hooks(net) == 2
        plain = net(x)
        net(2 * x)
    assert hooks(net) == 0 and features.keys() == {"0.2", "0.0"}
    assert torch.equal(features["0.0"], net[0][0](x))
    assert torch.equal(features["0.2"], net[0](x)) and features["0.2"].requires_grad
    assert torch.equal(plain, net(x))


@pytest.mark.parametrize("names, error", [(["0", "1"], KeyError), (["0", "nowhere"], AttributeError)])
def test_tapped_leaves_no_hooks_after_an_exception(names, error):
    net = small_net()
    with pytest.raises(error, match="nowhere"), dukd.tapped(net, names):
        raise KeyError("nowhere")
    assert hooks(net) == 0


def copied(*names):
    """The last of some functions of dukd.py, run where only they and torch are known."""
    namespace = dict(torch=torch, nnf=nnf, math=math)
    for name in names:
        exec(inspect.getsource(getattr(dukd, name)), namespace)
    return namespace[names[-1]]


def test_each_part_of_the_method_can_be_copied_out():
    hr, lr = uniform(4, 3, 16, 16), uniform(4, 3, 8, 8)
    assert torch.equal(copied("zoom_in")(hr, 8, seeded(1)), zoom_in(hr, 8, seeded(1)))
    assert torch.equal(copied("bicubic_taps", "bicubic_matrix", "zoom_out")(lr, 2), zoom_out(lr, 2))
    F = copied("InvertibleAugmentation").sample(4, generator=seeded(2))
    G = InvertibleAugmentation.sample(4, generator=seeded(2))
    assert torch.equal(F.apply(hr), G.apply(hr)) and torch.equal(F.invert(hr), G.invert(hr))
    loss = copied("dukd_loss")
    assert loss(hr, hr.flip(0), G) == dukd.dukd_loss(hr, hr.flip(0), G)


def test_the_file_alone_in_an_empty_folder_works(tmp_path):
    """-E: no PYTHONPATH. The working folder holds nothing but the copy."""
    copy = Path(shutil.copy(dukd.__file__, tmp_path))
    script = "import dukd, torch; print(dukd.__file__); print(dukd.zoom_in(torch.zeros(2, 3, 9, 9), 4).shape)"
    ran = subprocess.run([sys.executable, "-E", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    file, shape = ran.stdout.splitlines()
    assert Path(file).samefile(copy) and shape == "torch.Size([2, 3, 4, 4])"
    imports = re.findall(r"^ *(?:import|from) (\w+)", copy.read_text(encoding="utf-8"), re.M)
    assert {*imports} - sys.stdlib_module_names == {"torch"}
