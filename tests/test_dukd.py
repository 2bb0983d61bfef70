"""Tests of dukd.py, against values computed by hand or by a slow formula that is written here again."""
import functools
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
    ("multiple of the scale 2, not 9x8", zoom_out, (torch.zeros(1, 3, 9, 8), 2)),
    ("multiple of the scale 4, not 8x9", zoom_out, (torch.zeros(1, 3, 8, 9), 4))])
def test_mistakes_are_named(message, function, arguments):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


class Net(torch.nn.Module):
    """A network that repeats pixels, with two feature maps to tap. It notes what it is given."""

    def __init__(self, channels, scale=2, seed=0):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, channels, 3, padding=1), torch.nn.Conv2d(channels, 3, 1)
        for k, p in enumerate(self.parameters()):
            p.data = uniform(*p.shape, seed=10 * seed + k) - 0.4
        self.scale, self.given, self.answers = scale, [], []

    def forward(self, x):
        y = self.second(self.first(x)).repeat_interleave(self.scale, -1).repeat_interleave(self.scale, -2)
        self.given.append(x.detach())
        self.answers.append(y)
        return y


def networks(scale=2):
    """A student, and a teacher that is not frozen; their modules to compare."""
    student, teacher = Net(4, scale, seed=1), Net(6, scale, seed=2)
    return student, teacher, [(student.first, teacher.first), (student.second, teacher.second)]


def pairs(n=6, h=8, w=8, scale=2):
    return uniform(n, 3, h, w), uniform(n, 3, scale * h, scale * w, seed=1)


def mae(a, b):
    return (a - b).abs().mean()


EVERY = dict.fromkeys(dukd.TERMS, 1)


@pytest.mark.parametrize("augment_zoom_out", (False, True))
def test_terms_are_the_papers_equations(augment_zoom_out):
    """Each term with forwards of its own. The draws are made again here, from the same generator."""
    student, teacher, taps = networks()
    lr, hr = pairs()
    terms = dukd.losses(student, teacher, lr, hr, EVERY, crops=2, p=0.5, augment_zoom_out=augment_zoom_out,
                        taps=taps, generator=seeded(3))
    draw = seeded(3)
    z_in = zoom_in(hr.repeat_interleave(2, 0), 8, draw)
    F_in = InvertibleAugmentation.sample(12, p=0.5, generator=draw)
    z_out, F_out = zoom_out(lr, 2), InvertibleAugmentation.sample(6, p=0.5, generator=draw)
    s_out = F_out.invert(student(F_out.apply(z_out))) if augment_zoom_out else student(z_out)
    maps = [(student.first(lr), teacher.first(lr)), (student.second(student.first(lr)), teacher(lr)[..., ::2, ::2])]
    expected = dict(rec=mae(student(lr), hr), kd=mae(student(lr), teacher(lr)),
                    zoom_in=mae(F_in.invert(student(F_in.apply(z_in))), teacher(z_in)),
                    zoom_out=mae(s_out, teacher(z_out)), zoom_out_rec=mae(s_out, lr),
                    fitnet=sum(dukd.fitnet_loss(s, t) for s, t in maps),
                    at=sum(dukd.at_loss(s, t) for s, t in maps), fakd=sum(dukd.fakd_loss(s, t) for s, t in maps))
    assert tuple(terms) == tuple(expected) == dukd.TERMS
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5), name


@pytest.mark.parametrize("on, asked", [  # asked: the inputs that the student and the teacher see
    (["rec"], ("lr", "")), (["kd"], ("lr", "lr")), (["rec", "kd"], ("lr", "lr")), (["zoom_in"], ("in", "in")),
    (["zoom_out"], ("out", "out")), (["zoom_out_rec"], ("out", "")), (["fakd"], ("lr", "lr")),
    (["rec", "zoom_out_rec"], ("lr out", "")), (["rec", "zoom_out", "zoom_out_rec"], ("lr out", "out")),
    (["rec", "kd", "zoom_in"], ("lr in", "lr in")), (["fitnet", "at", "zoom_in"], ("lr in", "lr in")),
    ([*EVERY], ("lr in out", "lr in out"))])
def test_what_has_no_weight_is_not_computed_and_the_teacher_gets_no_gradient(on, asked, monkeypatch):
    """Each term that is on gives the student gradient. The teacher sees z without F."""
    student, teacher, taps = networks()
    lr, hr = pairs()
    weights = dict.fromkeys(dukd.TERMS, 0) | dict.fromkeys(on, 0.5)
    made = dict(lr=lr, out=zoom_out(lr, 2))
    made["in"] = zoom_in(hr, 8, seeded(3))
    if "in" not in asked[0]:
        monkeypatch.setattr(dukd, "zoom_in", None)
    if "out" not in asked[0]:
        monkeypatch.setattr(dukd, "zoom_out", None)
    terms = dukd.losses(student, teacher if asked[1] else None, lr, hr, weights, taps=taps, generator=seeded(3))
    assert [*terms] == [term for term in dukd.TERMS if term in on]
    for term in terms.values():
        student.zero_grad()
        term.backward(retain_graph=True)
        assert student.first.weight.grad.abs().sum() > 0 and term.shape == ()
    together = torch.cat([x.flatten() for x in [torch.empty(0), *teacher.given]])
    assert torch.equal(together, torch.cat([made[name].flatten() for name in asked[1].split()] or [torch.empty(0)]))
    assert sum(map(len, student.given)) == 6 * len(asked[0].split())
    assert not any(y.requires_grad for y in teacher.answers)


def test_the_crops_of_a_patch_come_from_different_places_in_it():
    student, teacher, _ = networks()
    lr, hr = pairs(n=2)
    dukd.losses(student, teacher, lr, hr, dict(zoom_in=1), crops=2, generator=seeded())
    crops = hr.unfold(2, 8, 1).unfold(3, 8, 1)  # (2,3,9,9,8,8)
    found = [(crops[i // 2] == z[:, None, None]).flatten(3).all(3).all(0) for i, z in enumerate(*teacher.given)]
    places = [where.nonzero().tolist() for where in found]
    assert all(places) and places[0] != places[1] and places[2] != places[3]


def test_p_is_the_strength_of_f_and_other_patches_than_squares_are_not_transposed():
    lr, hr = pairs(h=4, w=12)
    for p, ops in ((0, OPS), (1, OPS), (1, ("invert",))):
        student, teacher, _ = networks()
        dukd.losses(student, teacher, lr, hr, dict(zoom_in=1), p=p, ops=ops, generator=seeded())
        z, seen = teacher.given[0], student.given[0]
        expected = {0: z, 1: 1 - z.flip(-1, -2) if ops == OPS else 1 - z}[p]
        assert same(seen, expected)


def test_inputs_of_one_size_share_a_forward():
    """Zoom-in's share the one of I_LR, zoom-out's have another."""
    student, teacher, _ = networks()
    dukd.losses(student, teacher, *pairs(), dukd.METHODS["dukd"])
    assert [tuple(x.shape) for x in student.given] == [(12, 3, 8, 8), (6, 3, 4, 4)]
    assert [tuple(x.shape) for x in teacher.given] == [(12, 3, 8, 8), (6, 3, 4, 4)]


def test_the_generator_alone_decides_and_autocast_is_left_to_the_caller():
    student, teacher, taps = networks()
    lr, hr = pairs()
    before = torch.get_rng_state()
    first, again, other = (dukd.losses(student, teacher, lr, hr, EVERY, taps=taps, generator=seeded(s))
                           for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert first == again and first["zoom_in"] != other["zoom_in"] and first["rec"] == other["rec"]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = dukd.losses(student, teacher, lr, hr, EVERY, taps=taps, generator=seeded(1))
        assert torch.equal(zoom_out(lr, 2), zoom_out(lr.clone(), 2)) and zoom_out(lr, 2).dtype == torch.float32
        assert torch.equal(dukd.fakd_loss(lr, hr[..., ::2, ::2]), fakd_in_float32(lr, hr[..., ::2, ::2]))
    for name, term in rounded.items():
        assert term.dtype == torch.float32 and term.item() == pytest.approx(first[name].item(), rel=0.05)
    assert rounded["rec"] != first["rec"]


def fakd_in_float32(student, teacher):
    with torch.autocast("cpu", enabled=False):
        return dukd.fakd_loss(student, teacher)


@pytest.mark.parametrize("message, changes", [
    ("unknown term 'zoom'; known: rec, kd, zoom_in", dict(weights=dict(rec=1, zoom=1))),
    ("kd needs a teacher", dict(weights=dict(rec=1, kd=1), teacher=None)),
    ("fitnet needs a teacher", dict(weights=dict(fitnet=1), teacher=None)),
    ("at needs taps", dict(weights=dict(at=1))),
    ("multiple of the scale 2, not 7x8", dict(weights=dict(zoom_out=1), lr=torch.rand(1, 3, 7, 8)))])
def test_what_does_not_fit_is_named(message, changes):
    student, teacher, _ = networks()
    lr, hr = pairs(n=1)
    given = dict(student=student, teacher=teacher, lr=lr, hr=hr) | changes
    with pytest.raises(ValueError, match=message):
        dukd.losses(**given)


def test_feature_maps_of_different_size_are_named_and_no_hook_is_left():
    student, teacher, _ = networks()
    teacher.first = torch.nn.Conv2d(3, 6, 3, padding=2)
    taps = [(student.first, teacher.first)]
    with pytest.raises(ValueError, match=r"8x8 \(student\) and 10x10 \(teacher\)"):
        dukd.losses(student, teacher, *pairs(), dict(at=1), taps=taps)
    student.second = None  # the forward fails
    with pytest.raises(TypeError):
        dukd.losses(student, teacher, *pairs(), dict(at=1), taps=taps)
    assert not any(module._forward_hooks for net in (student, teacher) for module in net.modules())


def test_methods_are_weights_of_known_terms():
    """DUKD is the paper's equation, with zoom-out's ground truth. λ_dukd is three weights alike."""
    assert dukd.METHODS["dukd"] == dict(rec=1, kd=1, zoom_in=1, zoom_out=1, zoom_out_rec=1)
    assert dukd.METHODS["kd"] == dict(rec=1, kd=1) and dukd.METHODS["scratch"] == dict(rec=1)
    assert dukd.METHODS["fakd"] == dict(rec=1, kd=1, fakd=10)
    assert all(weights.keys() <= {*dukd.TERMS} for weights in dukd.METHODS.values())


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


LOSSES = {"fitnet": dukd.fitnet_loss, "at": dukd.at_loss, "fakd": dukd.fakd_loss}


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


@pytest.mark.parametrize("name", LOSSES)
def test_feature_losses_are_float32_and_finite_for_dead_features(name):
    student = torch.zeros(2, 4, 3, 3, dtype=torch.bfloat16).requires_grad_()
    loss = LOSSES[name](student, uniform(2, 4, 3, 3).bfloat16())
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and student.grad.isfinite().all()


def copied(*names):
    """The last of some functions of dukd.py, run where only they and their imports are known."""
    namespace = dict(torch=torch, nnf=nnf, math=math, functools=functools)
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
    for name in LOSSES:
        assert copied(f"{name}_loss")(hr, hr.flip(0)) == LOSSES[name](hr, hr.flip(0))


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
