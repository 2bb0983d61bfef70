"""Tests of dukd.py, against values computed by hand or by a slow formula that is written here again."""
import functools
import inspect
import itertools
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf

import dukd
from dukd import InvertibleAugmentation, bicubic_resize, zoom_in, zoom_out

OPS = InvertibleAugmentation.OPERATIONS
COMBINATIONS = list(itertools.product((False, True), repeat=4))  # of hflip, vflip, transpose, invert
MASKS = torch.tensor(COMBINATIONS).T  # of a batch of 16 in which each sample has another combination


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed))


def same(a, b, atol=1e-6):
    return torch.allclose(a, b, rtol=0, atol=atol)


def test_each_of_the_16_combinations_is_applied_pixel_by_pixel():
    x = uniform(16, 3, 5, 5)
    y = InvertibleAugmentation(OPS, MASKS).apply(x)
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
        F = InvertibleAugmentation(ops, MASKS)
        back = F.invert(student(F.apply(x)))
        colours = F.masks[ops.index("invert")]
        assert torch.equal(back[~colours], student(x)[~colours])
        assert same(back, student(x))


def test_pictures_that_are_not_square_are_not_transposed():
    x = uniform(16, 3, 4, 6)
    nothing = InvertibleAugmentation.sample(16, ops=())
    assert nothing.apply(x) is x and nothing.invert(x) is x
    for p in (0, 1):  # refused whatever is drawn
        G = InvertibleAugmentation.sample(16, p=p)
        for operate in (G.apply, G.invert):
            with pytest.raises(ValueError, match="square patches, not 4x6"):
                operate(x)


@pytest.mark.parametrize("p, given", [(0.3, {}), (0.1, dict(p=0.1)), (0.9, dict(p=0.9))])
def test_operations_are_drawn_with_probability_p_each_by_itself(p, given):
    n = 40_000
    F = InvertibleAugmentation.sample(n, **given, generator=seeded(1))
    drawn = F.masks.double()
    assert F.ops == OPS and drawn.shape == (4, n)
    assert (drawn.mean(1) - p).abs().max() < 5 * math.sqrt(p * (1 - p) / n)
    assert (torch.corrcoef(drawn) - torch.eye(4)).abs().max() < 5 / math.sqrt(n)  # of each two operations
    neighbours = ((drawn[:, 1:] - p) * (drawn[:, :-1] - p)).mean(1) / (p * (1 - p))  # of each two samples
    assert neighbours.abs().max() < 5 / math.sqrt(n)


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
    z.zero_()
    assert torch.equal(hr, coordinates(n, H, W))  # z was a copy


@pytest.mark.parametrize("factor", (1 / 3, 1 / 4, 3))
def test_a_picture_is_resized_along_dims_and_hands_its_gradient_back(factor):
    """test_data.py and test_released.py compare the weights with exact ones, and with the released code's."""
    x = torch.rand(2, 3, 7, 10, generator=seeded(), dtype=torch.float64).requires_grad_()
    dukd.bicubic_neighbours.cache_clear()
    with torch.inference_mode():  # the kept weights serve a gradient all the same
        bicubic_resize(x, factor)
    units = (torch.eye(n, dtype=torch.float64) for n in (7, 10))
    rows, columns = (bicubic_resize(unit, factor, dims=(0,)) for unit in units)  # (m,n): an axis's weights
    both = bicubic_resize(x, factor)
    assert same(both, rows @ x @ columns.T, atol=1e-12)
    assert same(bicubic_resize(x, factor, dims=(-1,)), x @ columns.T, atol=1e-12)
    assert same(bicubic_resize(x, factor, dims=(2,)), rows @ x, atol=1e-12)
    weight = uniform(*both.shape, seed=1).double()
    (both * weight).sum().backward()
    assert same(x.grad, rows.T @ weight @ columns, atol=1e-12)  # the transposed matrices
    single = bicubic_resize(x.detach().float(), factor)
    assert single.dtype == torch.float32 and same(single.double(), both.detach())


class Net(torch.nn.Module):
    """A network that repeats pixels, with two feature maps to tap. It notes what it is given."""

    def __init__(self, channels, seed=0):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, channels, 3, padding=1), torch.nn.Conv2d(channels, 3, 1)
        for k, p in enumerate(self.parameters()):
            p.data = uniform(*p.shape, seed=10 * seed + k) - 0.4
        self.given, self.answers = [], []

    def forward(self, x):
        y = self.second(self.first(x)).repeat_interleave(2, -1).repeat_interleave(2, -2)
        self.given.append(x.detach())
        self.answers.append(y)
        return y


def setting(h=8, w=8):
    """A student, and a teacher that is not frozen; their modules to compare; six training pairs."""
    student, teacher = Net(4, seed=1), Net(6, seed=2).eval()
    taps = [(student.first, teacher.first), (student.second, teacher.second)]
    return student, teacher, taps, uniform(6, 3, h, w), uniform(6, 3, 2 * h, 2 * w, seed=1)


mae = nnf.l1_loss
EVERY = dict.fromkeys(dukd.TERMS, 1)
LOSSES = {"fitnet": dukd.fitnet_loss, "at": dukd.at_loss, "fakd": dukd.fakd_loss}


@pytest.mark.parametrize("augment_zoom_out", (False, True))
def test_terms_are_the_papers_equations_and_methods_are_sums_of_them(augment_zoom_out):
    """Each term with forwards of its own. The draws are made again here, from the same generator.
    The weights are those of each method's paper or of its released option file."""
    student, teacher, taps, lr, hr = setting()

    def terms_of(weights):
        return dukd.losses(student, teacher, lr, hr, weights, crops=2, p=0.5, taps=iter(taps),
                           augment_zoom_out=augment_zoom_out, generator=seeded(3))
    draw = seeded(3)
    z_in = zoom_in(hr.repeat_interleave(2, 0), 8, draw)
    F_in = InvertibleAugmentation.sample(12, p=0.5, generator=draw)
    z_out, F_out = zoom_out(lr, 2), InvertibleAugmentation.sample(6, p=0.5, generator=draw)
    s_out = F_out.invert(student(F_out.apply(z_out))) if augment_zoom_out else student(z_out)
    rec, kd = mae(student(lr), hr), mae(student(lr), teacher(lr))
    new_in = mae(F_in.invert(student(F_in.apply(z_in))), teacher(z_in))
    new_out, out_rec = mae(s_out, teacher(z_out)), mae(s_out, lr)
    maps = [(student.first(lr), teacher.first(lr)), (student(lr)[..., ::2, ::2], teacher(lr)[..., ::2, ::2])]
    fitnet, at, fakd = (sum(distance(s, t) for s, t in maps) for distance in LOSSES.values())
    expected = dict(rec=rec, kd=kd, zoom_in=new_in, zoom_out=new_out, zoom_out_rec=out_rec, fitnet=fitnet,
                    at=at, fakd=fakd)
    terms = terms_of(EVERY)
    assert [*terms] == [*expected] == [*dukd.TERMS]
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5), name
    sums = dict(dukd=rec + kd + new_in + new_out + out_rec, zoom_in=rec + kd + new_in, kd=rec + kd,
                scratch=rec, fitnet=rec + fitnet, at=rec + at, fakd=rec + kd + 10 * fakd)
    for method, weights in dukd.METHODS.items():
        total = sum(weights[name] * term for name, term in terms_of(weights).items())
        assert total.item() == pytest.approx(sums[method].item(), rel=1e-5), method


@pytest.mark.parametrize("on, asked", [  # asked: the inputs that the student and the teacher see
    (["rec"], ("lr", "")), (["kd"], ("lr", "lr")), (["rec", "kd"], ("lr", "lr")), (["zoom_in"], ("in", "in")),
    (["zoom_out"], ("out", "out")), (["zoom_out_rec"], ("out", "")), (["fakd"], ("lr", "lr")),
    (["rec", "zoom_out_rec"], ("lr out", "")), (["rec", "zoom_out", "zoom_out_rec"], ("lr out", "out")),
    (["rec", "kd", "zoom_in"], ("lr in", "lr in")), (["fitnet", "at", "zoom_in"], ("lr in", "lr in")),
    ([*EVERY], ("lr in out", "lr in out"))])
def test_what_has_no_weight_is_not_computed_and_the_teacher_gets_no_gradient(on, asked, monkeypatch):
    """Each term that is on gives the student gradient. The teacher sees z without F."""
    student, teacher, taps, lr, hr = setting()
    weights = dict.fromkeys(dukd.TERMS, 0) | dict.fromkeys(on, 0.5)
    made = {"lr": lr, "in": zoom_in(hr, 8, seeded(3)), "out": zoom_out(lr, 2)}
    for name in {"in", "out"} - {*asked[0].split()}:
        monkeypatch.setattr(dukd, f"zoom_{name}", None)
    frozen = teacher if asked[1] else None
    terms = dukd.losses(student, frozen, lr, hr, weights, taps=taps, generator=seeded(3))
    assert [*terms] == [term for term in dukd.TERMS if term in on]
    for term in terms.values():
        student.zero_grad()
        term.backward(retain_graph=True)
        assert student.first.weight.grad.abs().sum() > 0 and term.shape == ()
    given = [z for batch in teacher.given for z in batch]
    expected = [z for name in asked[1].split() for z in made[name]]
    assert len(given) == len(expected) and all(map(torch.equal, given, expected))
    assert sum(map(len, student.given)) == 6 * len(asked[0].split())
    for net, seen in zip((student, teacher), asked):  # I_LR and a crop have one size: they share a forward
        assert len(net.given) == ("lr" in seen or "in" in seen) + ("out" in seen)
    assert not any(y.requires_grad for y in teacher.answers)


def test_p_is_the_strength_of_f_and_other_patches_than_squares_are_not_transposed():
    for p, ops in ((0, OPS), (1, OPS), (1, ("invert",))):
        student, teacher, _, lr, hr = setting(4, 12)
        dukd.losses(student, teacher, lr, hr, dict(zoom_in=1), p=p, ops=ops, generator=seeded())
        z, seen = teacher.given[0], student.given[0]
        expected = {0: z, 1: 1 - z.flip(-1, -2) if ops == OPS else 1 - z}[p]
        assert same(seen, expected)


def test_the_generator_alone_decides_what_is_drawn_and_autocast_rounds_the_networks_alone():
    student, teacher, taps, lr, hr = setting()

    def terms_of(seed):
        return dukd.losses(student, teacher, lr, hr, EVERY, taps=taps, generator=seeded(seed))
    before = torch.get_rng_state()
    precise, again, other = terms_of(1), terms_of(1), terms_of(2)
    assert torch.equal(before, torch.get_rng_state())
    assert precise == again and precise["zoom_in"] != other["zoom_in"] and precise["rec"] == other["rec"]
    z, fakd = zoom_out(lr, 2), dukd.fakd_loss(lr, hr[..., ::2, ::2])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = terms_of(1)
        assert torch.equal(zoom_out(lr, 2), z) and torch.equal(dukd.fakd_loss(lr, hr[..., ::2, ::2]), fakd)
    for name, term in rounded.items():
        assert term.dtype == torch.float32 and term.item() == pytest.approx(precise[name].item(), rel=0.05)
    assert rounded["rec"] != precise["rec"]


def losses_of(weights, lr=(1, 3, 8, 8), hr=(1, 3, 16, 16), **changes):
    """The losses of pictures of these shapes."""
    given = dict(student=Net(4), teacher=Net(6).eval(), lr=uniform(*lr), hr=uniform(*hr), weights=weights)
    return dukd.losses(**given | changes)


@pytest.mark.parametrize("message, call", [
    ("'rot'; known: hflip, vflip, transpose", lambda: InvertibleAugmentation.sample(2, ("hflip", "rot"))),
    ("twice: vflip, vflip", lambda: InvertibleAugmentation.sample(2, ("vflip", "vflip"))),
    ("-0.1 is not a probability", lambda: InvertibleAugmentation.sample(2, OPS, -0.1)),
    ("1.5 is not a probability", lambda: InvertibleAugmentation.sample(2, OPS, 1.5)),
    ("nan is not a probability", lambda: InvertibleAugmentation.sample(2, OPS, math.nan)),
    ("7x7 does not fit into patches of 6x8", lambda: zoom_in(torch.zeros(2, 3, 6, 8), 7)),
    ("2x9 does not fit into patches of 6x8", lambda: zoom_in(torch.zeros(2, 3, 6, 8), (2, 9))),
    ("multiple of the scale 2, not 9x8", lambda: zoom_out(torch.zeros(1, 3, 9, 8), 2)),
    ("multiple of the scale 4, not 8x9", lambda: zoom_out(torch.zeros(1, 3, 8, 9), 4)),
    ("unknown term 'zoom'; known: rec, kd, zoom_in", lambda: losses_of(dict(rec=1, zoom=0))),
    ("kd needs a teacher", lambda: losses_of(dict(rec=1, kd=1), teacher=None)),
    ("fitnet needs a teacher", lambda: losses_of(dict(fitnet=1), teacher=None)),
    ("at needs taps", lambda: losses_of(dict(at=1))),
    ("no pairs of one scale", lambda: losses_of(dict(rec=1), hr=(2, 3, 16, 16))),
    ("no pairs of one scale", lambda: losses_of(dict(zoom_out=1), hr=(1, 3, 4, 4))),
    ("no pairs of one scale", lambda: losses_of(dict(rec=1), hr=(1, 3, 16, 15))),
    ("no pairs of one scale", lambda: losses_of(dict(rec=1), lr=(1, 1, 8, 8))),
    ("scale 2, not 7x8", lambda: losses_of(dict(zoom_out=1), lr=(1, 3, 7, 8), hr=(1, 3, 14, 16))),
    ("-1 zoom-in crops", lambda: losses_of(dict(zoom_in=1), crops=-1)),
    ("a tap is no module of its network", lambda: losses_of(dict(at=1), taps=[(Net(3), Net(3))])),
    ("teacher is in training mode", lambda: losses_of(dict(kd=1), teacher=Net(6))),
    ("makes a tuple of", lambda: losses_of(dict(kd=1), teacher=lambda x: (x,))),
    (r"makes \(1, 3, 8, 8\) of .* x2 is", lambda: losses_of(dict(kd=1), teacher=lambda x: x)),
    (r"makes \(1, 1, 16, 16\) of", lambda: losses_of(dict(rec=1), student=lambda x: Net(4)(x)[:, :1]))])
def test_mistakes_are_named(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_feature_maps_of_different_size_are_named_and_no_hook_is_left():
    student, teacher, _, lr, hr = setting()
    teacher.first, teacher.second = torch.nn.Conv2d(3, 6, 3, padding=2), torch.nn.Conv2d(6, 3, 3)
    taps = [(student.first, teacher.first)]
    with pytest.raises(ValueError, match=r"8x8 \(student\) and 10x10 \(teacher\)"):
        dukd.losses(student, teacher, lr, hr, dict(at=1), taps=taps)
    student.second = None  # the forward fails
    with pytest.raises(TypeError):
        dukd.losses(student, teacher, lr, hr, dict(at=1), taps=taps)
    assert not any(module._forward_hooks for net in (student, teacher) for module in net.modules())


@pytest.mark.parametrize("name", LOSSES)
def test_feature_losses_are_float32_and_finite_for_dead_features_and_never_move_the_teacher(name):
    student = torch.zeros(2, 4, 3, 3, dtype=torch.bfloat16).requires_grad_()
    teacher = uniform(2, 4, 3, 3).bfloat16().requires_grad_()
    loss = LOSSES[name](student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and loss.shape == ()
    assert student.grad.isfinite().all() and teacher.grad is None


def copied(*names):
    """The last of some functions of dukd.py, run where only they and their imports are known."""
    namespace = dict(torch=torch, nnf=nnf, math=math, functools=functools)
    for name in names:
        exec(inspect.getsource(getattr(dukd, name)), namespace)
    return namespace[names[-1]]


def test_the_file_needs_torch_alone_and_each_part_of_the_method_can_be_copied_out():
    source = Path(dukd.__file__).read_text(encoding="utf-8")
    imports = re.findall(r"^ *(?:import|from) (\w+)", source, re.M)
    assert {*imports} - sys.stdlib_module_names == {"torch"}
    hr, lr = uniform(4, 3, 16, 16), uniform(4, 3, 8, 8)
    assert torch.equal(copied("zoom_in")(hr, 8, seeded(1)), zoom_in(hr, 8, seeded(1)))
    assert torch.equal(copied("bicubic_neighbours", "bicubic_resize", "zoom_out")(lr, 2), zoom_out(lr, 2))
    F = copied("InvertibleAugmentation").sample(4, generator=seeded(2))
    G = InvertibleAugmentation.sample(4, generator=seeded(2))
    assert torch.equal(F.apply(hr), G.apply(hr)) and torch.equal(F.invert(hr), G.invert(hr))
    for name in LOSSES:
        assert copied(f"{name}_loss")(hr, hr.flip(0)) == LOSSES[name](hr, hr.flip(0))
