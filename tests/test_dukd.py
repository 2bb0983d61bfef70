"""Tests of dukd.py: upcycling, invertible augmentation and every loss, against values computed by hand or by a slow
formula written here a second time. "Fault n" refers to the released code's faults, which the README lists as departures.
"""
import ast
import itertools
import math
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dukd

COMBINATIONS = [dict(zip(dukd.OPERATIONS, bits)) for bits in itertools.product((False, True), repeat=4)]
few = settings(max_examples=40, deadline=None, derandomize=True)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=seeded(seed))


def chi_square_is_plausible(counts):
    """Mean K−1 and variance 2(K−1) for K equally likely cells; six deviations leave no false alarm."""
    counts = torch.as_tensor(counts, dtype=torch.float64).flatten()
    expected = counts.sum() / len(counts)
    statistic = ((counts - expected) ** 2 / expected).sum()
    return statistic < len(counts) - 1 + 6 * math.sqrt(2 * (len(counts) - 1))


# ------------------------------------------------------------------------------------------------ the file by itself
ALONE = """
import torch, dukd
hr = torch.rand(2, 3, 16, 16)
z = dukd.zoom_in(hr, 8)
small = dukd.zoom_out(z, 2)
F = dukd.InvertibleAugmentation.sample(2)
assert torch.allclose(F.invert(F.apply(z)), z, atol=1e-6)
for loss in (dukd.reconstruction_loss, dukd.response_kd_loss, dukd.dukd_loss, dukd.fitnet_loss, dukd.at_loss, dukd.fakd_loss):
    assert loss(small, small).item() == 0
net = torch.nn.Sequential(*dukd.adapters([3], [4]))
with dukd.Taps(net, ['0']) as taps:
    net(hr)
print(tuple(z.shape), tuple(small.shape), tuple(taps.features[0].shape), dukd.__file__)
"""


def test_copied_alone_it_imports_and_works(tmp_path):
    """-E: no PYTHONPATH; of this repository nothing is on the path, since the working folder is the copy's own."""
    shutil.copy(dukd.__file__, tmp_path)
    ran = subprocess.run([sys.executable, "-E", "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("(2, 3, 8, 8) (2, 3, 4, 4) (2, 4, 16, 16)")
    assert Path(ran.stdout.split(") ")[-1].strip()).resolve() == (tmp_path / "dukd.py").resolve()


def test_it_imports_torch_and_the_standard_library_only():
    tree = ast.parse(Path(dukd.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}


# ------------------------------------------------------------------------------------------------ augmentation
def forced(combination, n=1):
    """The augmentation that applies exactly these operations to each of n samples."""
    return dukd.InvertibleAugmentation({op: torch.full((n, 1, 1, 1), on) for op, on in combination.items()})


def all_sixteen():
    """A batch of 16 in which sample i gets combination i."""
    return dukd.InvertibleAugmentation({op: torch.tensor([c[op] for c in COMBINATIONS]).view(-1, 1, 1, 1)
                                        for op in dukd.OPERATIONS})


def forward_order_inverse(F, y):
    """Fault 1: the released code's "inverse", which re-applies the operations in the order they were applied in."""
    return F.apply(y)


def expected(op, picture):
    """One operation on one sample (C,h,w), pixel by pixel."""
    C, h, w = picture.shape
    at = {"hflip": lambda i, j: (i, w - 1 - j), "vflip": lambda i, j: (h - 1 - i, j),
          "transpose": lambda i, j: (j, i), "invert": lambda i, j: (i, j)}[op]
    out = torch.empty_like(picture)
    for i in range(h):
        for j in range(w):
            out[:, i, j] = picture[(slice(None), *at(i, j))]
    return 1 - out if op == "invert" else out


def name_of(combination):
    return "+".join(op for op, on in combination.items() if on) or "none"


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
def test_each_of_the_16_combinations_comes_back(combination):
    x = uniform(3, 3, 5, 5)
    F = forced(combination, 3)
    by_hand = x
    for op, on in combination.items():
        by_hand = torch.stack([expected(op, sample) for sample in by_hand]) if on else by_hand
    assert torch.equal(F.apply(x), by_hand)
    back = F.invert(F.apply(x))
    if combination["invert"]:
        assert torch.allclose(back, x, rtol=0, atol=1e-6)
    else:
        assert torch.equal(back, x)


def test_all_16_at_once_come_back_each_as_if_alone():
    x = uniform(16, 3, 6, 6)
    F = all_sixteen()
    y = F.apply(x)
    for i, combination in enumerate(COMBINATIONS):
        assert torch.equal(y[i:i + 1], forced(combination).apply(x[i:i + 1])), name_of(combination)
    assert torch.allclose(F.invert(y), x, rtol=0, atol=1e-6)
    assert len({tuple(sample.flatten().tolist()) for sample in all_sixteen().apply(x[:1].expand(16, -1, -1, -1))}) == 16


@pytest.mark.parametrize("s", (2, 3, 4))
def test_the_inverse_undoes_on_the_networks_larger_output(s):
    """Nearest-neighbour enlargement commutes with F, so it stands for a perfectly consistent student."""
    x = uniform(16, 3, 4, 4)
    F = all_sixteen()

    def student(z):
        return z.repeat_interleave(s, -1).repeat_interleave(s, -2)
    assert torch.allclose(F.invert(student(F.apply(x))), student(x), rtol=0, atol=1e-6)


def test_an_inverse_in_forward_order_is_noticed_in_126_of_1000_samples():
    """Fault 1: exactly transposition with one of the two flips does not come back, 12.6 % of the samples at p = 0.3."""
    x = uniform(1, 3, 5, 5)
    lost = 0.0
    for combination in COMBINATIONS:
        F = forced(combination)
        back = torch.allclose(forward_order_inverse(F, F.apply(x)), x, atol=1e-6)
        assert back == (not (combination["transpose"] and combination["hflip"] != combination["vflip"])), name_of(combination)
        if not back:
            lost += math.prod(0.3 if on else 0.7 for on in combination.values())
    assert lost == pytest.approx(0.126)


@given(ops=st.permutations(dukd.OPERATIONS), k=st.integers(0, 4), n=st.integers(1, 6), size=st.integers(1, 7),
       p=st.floats(0, 1), seed=st.integers(0, 2**31))
@few
def test_any_subset_in_any_order_comes_back(ops, k, n, size, p, seed):
    F = dukd.InvertibleAugmentation.sample(n, ops[:k], p, seeded(seed))
    x = uniform(n, 3, size, size, seed=seed)
    assert list(F.masks) == list(ops[:k])
    y = F.apply(x)
    assert y.min() >= 0 and y.max() <= 1
    assert torch.allclose(F.invert(y), x, rtol=0, atol=1e-6)
    assert torch.allclose(F.apply(F.invert(x)), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("p", (0.1, 0.3, 0.5, 0.9))
def test_each_operation_is_drawn_with_probability_p_and_by_itself(p):
    n = 40_000
    F = dukd.InvertibleAugmentation.sample(n, p=p, generator=seeded(1))
    drawn = torch.stack([mask.flatten() for mask in F.masks.values()]).double()
    assert drawn.shape == (4, n)
    assert (drawn.mean(1) - p).abs().max() < 5 * math.sqrt(p * (1 - p) / n)
    correlation = torch.corrcoef(drawn)  # of each two operations: 0 ± 1/√n
    assert (correlation - torch.eye(4)).abs().max() < 5 / math.sqrt(n)
    neighbours = ((drawn[:, 1:] - p) * (drawn[:, :-1] - p)).mean(1) / (p * (1 - p))  # of one sample and the next
    assert neighbours.abs().max() < 5 / math.sqrt(n)


def test_the_default_probability_is_the_papers():
    F = dukd.InvertibleAugmentation.sample(20_000, generator=seeded(2))
    assert list(F.masks) == list(dukd.OPERATIONS)
    assert all(abs(mask.double().mean() - 0.3) < 0.02 for mask in F.masks.values())


def test_p_0_is_no_operation_and_p_1_is_every_one():
    x = uniform(5, 3, 4, 4)
    assert torch.equal(dukd.InvertibleAugmentation.sample(5, p=0).apply(x), x)
    F = dukd.InvertibleAugmentation.sample(5, p=1)
    assert all(mask.all() for mask in F.masks.values())
    assert torch.equal(F.apply(x), 1 - x.flip(-1, -2).transpose(-1, -2))


def test_a_generator_reproduces_and_leaves_the_global_stream_alone():
    before = torch.get_rng_state()
    first = dukd.InvertibleAugmentation.sample(64, generator=seeded(3))
    again = dukd.InvertibleAugmentation.sample(64, generator=seeded(3))
    other = dukd.InvertibleAugmentation.sample(64, generator=seeded(4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first.masks[op], again.masks[op]) for op in dukd.OPERATIONS)
    assert any(not torch.equal(first.masks[op], other.masks[op]) for op in dukd.OPERATIONS)


def test_without_operations_nothing_happens():
    F = dukd.InvertibleAugmentation.sample(3, ops=())
    x = uniform(3, 3, 4, 6)
    assert torch.equal(F.apply(x), x) and torch.equal(F.invert(x), x)


@pytest.mark.parametrize("ops, p, word", [(("hflip", "rotate"), 0.3, "'rotate'"), (("",), 0.3, "''"),
                                          (dukd.OPERATIONS, -0.1, "-0.1"), (dukd.OPERATIONS, 1.5, "1.5"),
                                          (dukd.OPERATIONS, math.nan, "nan")])
def test_wrong_arguments_of_sample_are_named(ops, p, word):
    with pytest.raises(ValueError, match=word):
        dukd.InvertibleAugmentation.sample(2, ops, p)


def test_an_unknown_operation_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="hflip, vflip, transpose, invert"):
        dukd.InvertibleAugmentation.sample(2, ("flip",))


def test_transposing_needs_squares_and_the_others_do_not():
    x = uniform(4, 3, 4, 6)
    with pytest.raises(ValueError, match="4x6"):
        dukd.InvertibleAugmentation.sample(4, p=0.5).apply(x)
    F = dukd.InvertibleAugmentation.sample(4, ("hflip", "vflip", "invert"), p=0.5, generator=seeded())
    assert torch.allclose(F.invert(F.apply(x)), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("samples", (slice(0, 4), slice(2, 16, 3), torch.tensor([15, 0, 7]), slice(5, 5)),
                         ids=("first", "strided", "index", "empty"))
def test_a_part_of_an_augmentation_treats_its_samples_alike(samples):
    x = uniform(16, 3, 4, 4)
    F = all_sixteen()
    assert torch.equal(F[samples].apply(x[samples]), F.apply(x)[samples])
    assert list(F[samples].masks) == list(F.masks)


def test_augmentation_leaves_its_arguments_alone_and_passes_the_gradient_through():
    x = uniform(16, 3, 4, 4).requires_grad_()
    kept = x.detach().clone()
    F = all_sixteen()
    masks = {op: mask.clone() for op, mask in F.masks.items()}
    y = F.apply(x)
    F.invert(y).sum().backward()
    assert torch.equal(x.detach(), kept)
    assert all(torch.equal(F.masks[op], masks[op]) for op in masks)
    assert torch.equal(x.grad, torch.ones_like(x))  # inverting twice: (−1)·(−1)


# ------------------------------------------------------------------------------------------------ zoom in
def coordinates(n, H, W):
    """Patches whose pixels hold (row, column, sample)."""
    grid = torch.stack(torch.meshgrid(torch.arange(float(H)), torch.arange(float(W)), indexing="ij"))
    return torch.cat([grid.expand(n, -1, -1, -1), torch.arange(float(n)).view(n, 1, 1, 1).expand(n, 1, H, W)], dim=1)


def places(z):
    """(top, left) of each crop of `coordinates`, after checking that it is a crop of its own sample."""
    n, _, h, w = z.shape
    top, left = z[:, 0, 0, 0], z[:, 1, 0, 0]
    here = torch.stack([top, left, torch.arange(float(n))], dim=1)[:, :, None, None]
    inside = torch.cat([coordinates(1, h, w)[:, :2], torch.zeros(1, 1, h, w)], dim=1)
    assert torch.equal(z, here + inside)
    return torch.stack([top, left], dim=1).long()


@pytest.mark.parametrize("H, W, size, shape", [(12, 12, 3, (3, 3)), (9, 14, (4, 7), (4, 7)), (5, 5, 5, (5, 5)),
                                               (6, 3, (1, 3), (1, 3)), (1, 1, 1, (1, 1))])
def test_zoom_in_gives_crops_of_the_size_asked_for(H, W, size, shape):
    hr = coordinates(20, H, W)
    z = dukd.zoom_in(hr, size)
    assert z.shape == (20, 3, *shape) and z.is_contiguous() and z.dtype == hr.dtype
    places(z)
    if shape == (H, W):
        assert torch.equal(z, hr)


def test_zoom_in_reaches_every_position_equally_often():
    """Fault 6: the released code's crops lay on the s×s grid of HR cells only, never at other offsets."""
    H, W, h, w, n = 11, 9, 4, 3, 9000
    found = places(dukd.zoom_in(coordinates(n, H, W), (h, w), seeded(5)))
    counts = torch.zeros(H - h + 1, W - w + 1)
    counts.index_put_((found[:, 0], found[:, 1]), torch.ones(n), accumulate=True)
    assert counts.min() > 0  # the last row and column too
    assert chi_square_is_plausible(counts)


def test_zoom_in_draws_each_sample_by_itself_and_reproducibly():
    hr = coordinates(50, 40, 40)
    before = torch.get_rng_state()
    first = places(dukd.zoom_in(hr, 8, seeded(6)))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, places(dukd.zoom_in(hr, 8, seeded(6))))
    assert not torch.equal(first, places(dukd.zoom_in(hr, 8, seeded(7))))
    assert len(set(map(tuple, first.tolist()))) > 40  # not one place for the whole batch
    assert len(set(first[:, 0].tolist())) > 15 and not torch.equal(first[:, 0], first[:, 1])


def test_zoom_in_is_a_copy_and_any_number_of_channels_goes():
    hr = uniform(2, 5, 6, 6)
    kept = hr.clone()
    z = dukd.zoom_in(hr, 6)
    assert torch.equal(z, hr)
    z.zero_()
    assert torch.equal(hr, kept)


@pytest.mark.parametrize("size", (7, (7, 2), (2, 9)))
def test_zoom_in_refuses_a_crop_that_does_not_fit(size):
    with pytest.raises(ValueError, match="6x8"):
        dukd.zoom_in(torch.zeros(2, 3, 6, 8), size)


# ------------------------------------------------------------------------------------------------ MATLAB's bicubic
def cubic(d):
    """The cubic kernel, a = −1/2."""
    d = abs(d)
    if d <= 1:
        return 3 * d**3 / 2 - 5 * d**2 / 2 + 1
    return -(d**3) / 2 + 5 * d**2 / 2 - 4 * d + 2 if d <= 2 else 0 * d


def slow_matrix(n, factor, number=float):
    """Bicubic resizing along one axis as an (m,n) matrix, in floats or in exact fractions, straight from the text:
    stretched kernel, centre u = x/f + ½(1 − 1/f) counted from 1, symmetric padding, weights of sum 1."""
    f = number(factor)
    stretch, m = min(f, number(1)), math.ceil(Fraction(factor) * n)
    rows = []
    for x in range(1, m + 1):
        u = x / f + (1 - 1 / f) / 2
        support = range(math.floor(u - 2 / stretch), math.ceil(u + 2 / stretch) + 1)
        weight = [cubic((u - i) * stretch) for i in support]
        row = [number(0)] * n
        for i, w in zip(support, weight):
            while not 1 <= i <= n:  # … 2 1 | 1 2 … n | n n−1 …
                i = 1 - i if i < 1 else 2 * n + 1 - i
            row[i - 1] += w / sum(weight)
        rows.append(row)
    return rows


def as_matrix(weights, index, n):
    """`bicubic_taps` as an (m,n) list of lists, added up one by one."""
    rows = [[0.0] * n for _ in range(len(weights))]
    for row, ws, js in zip(rows, weights.tolist(), index.tolist()):
        for w, j in zip(ws, js):
            row[j] += w
    return rows


def slow_resize(picture, factor):
    """One channel (H,W) in float64, loop by loop."""
    A, B = slow_matrix(picture.shape[0], factor), slow_matrix(picture.shape[1], factor)
    x = picture.double().tolist()
    half = [[sum(a * x[i][j] for i, a in enumerate(row)) for j in range(len(x[0]))] for row in A]
    return torch.tensor([[sum(b * line[j] for j, b in enumerate(row)) for row in B] for line in half], dtype=torch.float64)


def test_the_weights_at_one_half_are_the_hand_computed_ones():
    """Distances .25, .75, 1.25, 1.75 of the stretched kernel: 111/128, 29/128, −9/128, −3/128, which sum to 2 over both
    sides. −3/256 = −0.0117…, −9/256 = −0.0352…, 29/256 = 0.1133…, 111/256 = 0.4336…"""
    weights, index = dukd.bicubic_taps(16, 0.5)
    side = [Fraction(-3, 256), Fraction(-9, 256), Fraction(29, 256), Fraction(111, 256)]
    taps = {j: w for j, w in zip(index[3].tolist(), weights[3].tolist()) if w}  # output 4: centred between inputs 7 and 8
    assert taps == {j: float(w) for j, w in zip(range(3, 11), side + side[::-1])}
    assert sum(side) == Fraction(1, 2)


def test_the_weights_at_2_3_and_one_third_are_the_hand_computed_ones():
    weights, index = dukd.bicubic_taps(9, 2.0)  # output 8 is centred at 4.25: distances 1.25, .25, .75, 1.75
    assert {j: w for j, w in zip(index[7].tolist(), weights[7].tolist()) if w} == {
        2: -9 / 128, 3: 111 / 128, 4: 29 / 128, 5: -3 / 128}
    weights, index = dukd.bicubic_taps(9, 3.0)  # output 14 falls on input 5, output 15 on 5 1/3
    assert as_matrix(weights, index, 9)[13] == pytest.approx([0, 0, 0, 0, 1, 0, 0, 0, 0], abs=1e-15)
    assert as_matrix(weights, index, 9)[14] == pytest.approx([0, 0, 0, -2/27, 7/9, 1/3, -1/27, 0, 0], abs=1e-14)
    weights, index = dukd.bicubic_taps(27, 1 / 3)  # output 5 is centred on input 14: distances 0, 1/3, 2/3, …
    side = [7/27, 1/9, 0, -2/81, -1/81]
    row = [*side[::-1], 1/3, *side]
    assert as_matrix(weights, index, 27)[4] == pytest.approx([0] * 8 + row + [0] * 8, abs=1e-14)


@given(n=st.integers(1, 60), p=st.integers(1, 8), q=st.integers(1, 8))
@example(n=27, p=7, q=3)  # 27·(7/3) is 63.00000000000001 in floats: 63 samples, not 64
@few
def test_taps_are_matlabs_for_any_length_and_factor(n, p, q):
    weights, index = dukd.bicubic_taps(n, p / q)
    assert weights.dtype == torch.float64 and index.dtype == torch.int64
    assert weights.shape == index.shape and len(weights) == math.ceil(Fraction(n * p, q))
    assert index.min() >= 0 and index.max() < n
    assert torch.allclose(weights.sum(1), torch.ones(len(weights), dtype=torch.float64), rtol=0, atol=1e-14)
    exact = slow_matrix(n, Fraction(p, q), Fraction)
    got = torch.tensor(as_matrix(weights, index, n), dtype=torch.float64)
    assert torch.allclose(got, torch.tensor([[float(w) for w in row] for row in exact], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("s", (2, 3, 4, 8))
def test_zoom_out_is_matlabs_bicubic(s):
    lr = torch.rand(2, 2, 3 * s, 4 * s, generator=seeded(s), dtype=torch.float64)
    z = dukd.zoom_out(lr, s)
    assert z.shape == (2, 2, 3, 4) and z.dtype == torch.float64
    for sample, small in zip(lr.flatten(0, 1), z.flatten(0, 1)):
        assert torch.allclose(small, slow_resize(sample, Fraction(1, s)), rtol=0, atol=1e-12)
    assert torch.allclose(dukd.zoom_out(lr.float(), s).double(), z, rtol=0, atol=1e-6)


@pytest.mark.parametrize("h, w, s", [(9, 8, 2), (8, 9, 4), (8, 8, 3), (2, 2, 4)])
def test_zoom_out_refuses_sizes_that_the_scale_does_not_divide(h, w, s):
    with pytest.raises(ValueError, match=f"{h}x{w}.*{s}"):
        dukd.zoom_out(torch.zeros(1, 3, h, w), s)


@pytest.mark.parametrize("s", (2, 3, 4))
def test_zoom_out_keeps_constants_its_argument_and_the_gradient(s):
    lr = torch.full((1, 3, 4 * s, 2 * s), 0.7).requires_grad_()
    z = dukd.zoom_out(lr, s)
    assert torch.allclose(z, torch.full_like(z, 0.7), rtol=0, atol=1e-6)
    z.sum().backward()
    assert torch.equal(lr.detach(), torch.full((1, 3, 4 * s, 2 * s), 0.7))
    assert lr.grad.sum().item() == pytest.approx(z.numel(), rel=1e-5)  # weights of sum 1: each output hands back 1
    assert (lr.grad != 0).all()


def test_bicubic_resize_computes_in_float32_whatever_surrounds_it():
    x = uniform(2, 3, 8, 12)
    exact = dukd.bicubic_resize(x.double(), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = dukd.bicubic_resize(x, 0.5)
    assert inside.dtype == torch.float32 and (inside - exact).abs().max() < 1e-6
    low = x.bfloat16()
    out = dukd.bicubic_resize(low, 0.5)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, dukd.bicubic_resize(low.float(), 0.5).bfloat16())  # rounded once, at the end
    assert torch.equal(dukd.bicubic_resize(x[0, 0], 2.0), dukd.bicubic_resize(x, 2.0)[0, 0])


# ------------------------------------------------------------------------------------------------ losses
def test_l1_losses_by_hand():
    a = torch.tensor([[[[0.0, 0.5], [1.0, 0.25]]]])
    b = torch.tensor([[[[0.5, 0.5], [0.0, 0.75]]]])
    for loss in (dukd.l1, dukd.reconstruction_loss, dukd.response_kd_loss, dukd.dukd_loss):
        assert loss(a, b).item() == (0.5 + 0 + 1 + 0.5) / 4
        assert loss(b, b).item() == 0


def test_dukd_loss_by_hand_with_an_augmentation():
    """The student's answer to F(z) is turned back before it is compared: transposition, then colour inversion."""
    teacher = torch.tensor([[[[0.0, 0.25], [0.5, 1.0]]]])
    student = torch.tensor([[[[1.0, 0.5], [0.5, 0.0]]]])  # F⁻¹: 1 − y, then transposed: [[0, 0.5], [0.5, 1]]
    F = forced({"transpose": True, "invert": True})
    assert dukd.dukd_loss(student, teacher, F).item() == 0.25 / 4
    assert dukd.dukd_loss(student, teacher).item() == (1 + 0.25 + 0 + 1) / 4


def test_dukd_loss_of_a_consistent_student_is_zero_for_all_16():
    z = uniform(16, 3, 6, 6)
    F = all_sixteen()
    assert dukd.dukd_loss(F.apply(z), z, F).item() < 1e-7
    assert dukd.l1(forward_order_inverse(F, F.apply(z)), z).item() > 0.01  # fault 1 would show in the loss


def test_fitnet_by_hand_mean_and_full():
    student = torch.tensor([[[[1.0, 2.0]], [[3.0, -2.0]]]])  # channel means 2, 0
    teacher = torch.tensor([[[[1.0, 3.0]], [[1.0, 3.0]], [[4.0, 0.0]]]])  # channel means 2, 2: another width is fine
    assert dukd.fitnet_loss(student, teacher).item() == (0 + 2) / 2
    assert dukd.fitnet_loss(student, teacher[:, :2], full=True).item() == (0 + 1 + 2 + 5) / 4


def test_attention_transfer_by_hand():
    """First sample: Σ_c f² = (3, 4), so q_S = (.6, .8), and q_T = (1, 0): .4² + .8² = .8; the second is equal: 0."""
    student = torch.tensor([[[[1.0, 2.0]], [[1.0, 0.0]], [[-1.0, 0.0]]], [[[1.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]]])
    teacher = torch.tensor([[[[5.0, 0.0]], [[-3.0, 0.0]]], [[[2.0, 2.0]], [[2.0, -2.0]]]])
    assert dukd.at_loss(student, teacher).item() == pytest.approx(0.8 / 2, abs=1e-6)


def test_fakd_by_hand():
    """Student: orthogonal feature vectors; teacher: cosine 24/25. Two of four affinities differ by .96."""
    student = torch.tensor([[[[2.0, 0.0]], [[0.0, 7.0]]]])
    teacher = torch.tensor([[[[3.0, 8.0]], [[4.0, 6.0]], [[0.0, 0.0]]]])
    assert dukd.fakd_loss(student, teacher).item() == pytest.approx(2 * 0.96 / 4, abs=1e-6)
    assert dukd.fakd_loss(student, 5 * student).item() == pytest.approx(0, abs=1e-6)


LOSSES = {"l1": dukd.l1, "rec": dukd.reconstruction_loss, "kd": dukd.response_kd_loss, "dukd": dukd.dukd_loss,
          "dukd with F": lambda a, b: dukd.dukd_loss(a, b, all_sixteen()), "fitnet": dukd.fitnet_loss,
          "fitnet full": lambda a, b: dukd.fitnet_loss(a, b, full=True), "at": dukd.at_loss, "fakd": dukd.fakd_loss}
DISTILLING = {name: loss for name, loss in LOSSES.items() if name not in ("l1", "rec")}


@pytest.mark.parametrize("name", DISTILLING)
def test_the_gradient_reaches_the_student_and_never_the_teacher(name):
    """Faults 3 and 5: the teacher was differentiated through, and FAKD's loss had no gradient at all."""
    student, teacher = uniform(16, 3, 4, 4).requires_grad_(), uniform(16, 3, 4, 4, seed=1).requires_grad_()
    kept = student.detach().clone(), teacher.detach().clone()
    loss = DISTILLING[name](student, teacher)
    assert loss.shape == () and loss.requires_grad
    loss.backward()
    assert teacher.grad is None
    assert student.grad.isfinite().all() and student.grad.abs().max() > 0
    assert torch.equal(student.detach(), kept[0]) and torch.equal(teacher.detach(), kept[1])  # no in-place edits


@pytest.mark.parametrize("name", LOSSES)
def test_following_the_gradient_lowers_the_loss(name):
    student, teacher = uniform(16, 3, 4, 4).requires_grad_(), uniform(16, 3, 4, 4, seed=1)
    loss = LOSSES[name](student, teacher)
    loss.backward()
    step = 0.01 * loss.item() / student.grad.square().sum()  # to first order: 1 % less
    lower = LOSSES[name]((student - step * student.grad).detach(), teacher)
    assert 0.985 * loss.item() < lower.item() < 0.995 * loss.item()


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_outputs_give_float32_losses(name):
    student, teacher = uniform(16, 3, 4, 4).bfloat16(), uniform(16, 3, 4, 4, seed=1).bfloat16()
    loss = LOSSES[name](student, teacher)
    assert loss.dtype == torch.float32
    # the colour inversion 1 − y of the student's own bfloat16 output is rounded once more, to 2⁻⁹
    assert loss.item() == pytest.approx(LOSSES[name](student.float(), teacher.float()).item(),
                                        abs=2**-9 if name == "dukd with F" else 1e-6)


@pytest.mark.parametrize("name", ("at", "fakd"))
def test_dead_features_give_no_nan(name):
    """A ReLU's output may be all zeros; the L2 normalisation must not divide by that."""
    student = torch.zeros(2, 4, 3, 3, requires_grad=True)
    loss = LOSSES[name](student, uniform(2, 4, 3, 3))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------ feature taps
def small_net():
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 1), torch.nn.ReLU(), torch.nn.Conv2d(5, 2, 1))
    return torch.nn.Sequential(body, torch.nn.Conv2d(2, 3, 1))


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_taps_catch_features_in_the_order_of_the_names():
    net, x = small_net(), uniform(2, 3, 4, 4)
    with dukd.Taps(net, ["0.2", "0.0"]) as taps:
        assert taps.features == [None, None] and hooks(net) == 2
        out = net(x)
        assert torch.equal(out, net(x))
    first = net[0][0](x)
    assert torch.equal(taps.features[1], first)
    assert torch.equal(taps.features[0], net[0][2](first.relu()))
    assert taps.features[0].requires_grad  # the student's features carry the gradient
    assert hooks(net) == 0
    net(2 * x)
    assert torch.equal(taps.features[1], first)  # nothing is caught after the exit


def test_taps_are_removed_after_an_exception_too():
    net = small_net()
    with pytest.raises(KeyError), dukd.Taps(net, ["0", "1"]):
        assert hooks(net) == 2
        raise KeyError
    assert hooks(net) == 0


def test_taps_can_be_entered_again_and_nested():
    net, x = small_net(), uniform(1, 3, 4, 4)
    outer = dukd.Taps(net, ["0"])
    with outer:
        with dukd.Taps(net, ["0", "0.0"]) as inner:
            net(x)
        assert hooks(net) == 1
        assert torch.equal(outer.features[0], inner.features[0])
    with outer:
        assert outer.features == [None]
        net(x)
    assert outer.features[0].shape == (1, 2, 4, 4) and hooks(net) == 0


def test_an_unknown_tap_is_named_and_leaves_no_hooks():
    net = small_net()
    with pytest.raises(ValueError) as error:
        dukd.Taps(net, ["0", "nowhere"])
    message = str(error.value)
    assert "'nowhere'" in message and "Sequential" in message and "\n" not in message and "  " not in message
    assert hooks(net) == 0


def test_adapters_widen_only_where_the_widths_differ():
    made = dukd.adapters([4, 4, 8], [4, 8, 4])
    assert [type(m) for m in made] == [torch.nn.Identity, torch.nn.Conv2d, torch.nn.Conv2d]
    assert made[1].kernel_size == (1, 1) and made[1](uniform(2, 4, 5, 6)).shape == (2, 8, 5, 6)
    assert made[2](uniform(2, 8, 5, 6)).shape == (2, 4, 5, 6)
    x = uniform(2, 4, 5, 6)
    assert made[0](x) is x
    assert sum(p.numel() for p in made.parameters()) == (4 * 8 + 8) + (8 * 4 + 4)


def test_an_adapter_is_trained_by_the_full_fitnet_loss():
    student, teacher = uniform(2, 4, 3, 3).requires_grad_(), uniform(2, 6, 3, 3)
    adapter = dukd.adapters([4], [6])
    dukd.fitnet_loss(adapter[0](student), teacher, full=True).backward()
    assert student.grad.abs().max() > 0 and all(p.grad.abs().max() > 0 for p in adapter.parameters())
