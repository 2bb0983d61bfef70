"""The losses against those of the authors' released code, which was run unedited for released.json.

What went into it is made of formulas, so that it can be made again here: see `wave`. Only combinations of F
were run that the released F⁻¹ undoes.
"""
import json
from pathlib import Path

import pytest
import torch

import dukd
import models

CASES = json.loads(Path(__file__).with_name("released.json").read_text())["cases"]


def wave(shape, a, b):
    """sin(a·i² + b) at entry i of the flattened tensor, rounded to float32."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(a * i * i + b).float().view(*shape)


def setting(case, dtype):
    """f_S, f_T, I_LR and I_HR of a case."""
    networks, size = [], 12 * case["scale"]
    for role, a in (("student", 0.01), ("teacher", 0.013)):
        net = models.build(case[role], case["scale"])
        state = net.state_dict()
        for k, key in enumerate(sorted(state)):
            state[key] = 0.15 * wave(state[key].shape, a, k)
        net.load_state_dict(state)
        networks.append(net.to(dtype).eval())
    lr = 0.5 + 0.5 * wave((4, 3, 12, 12), 0.02, 4)
    hr = 0.5 + 0.5 * wave((4, 3, size, size), 0.003, 4)
    return *networks, lr.to(dtype), hr.to(dtype)


def gradient(loss, student):
    """{name: gradient} of the student's parameters, and the norm of all."""
    names, parameters = zip(*student.named_parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return dict(zip(names, found)), torch.stack([g.double().norm() for g in found]).norm().item()


@pytest.mark.parametrize("dtype, far, far_of_terms", [
    (torch.float64, 3e-7, 3e-7), (torch.float32, 5e-6, 1e-6)])
@pytest.mark.parametrize("scale", CASES)
def test_terms_and_gradients_are_those_of_the_released_code(monkeypatch, scale, dtype, far, far_of_terms):
    """With the crop and the F of the case, and the reduced I_LR. released_update: the sum of the two
    gradients that one iteration of that code hands to Adam, halved."""
    case = CASES[scale]
    top, left = case["crop"]
    ops = dukd.InvertibleAugmentation.OPERATIONS
    F = dukd.InvertibleAugmentation(ops, torch.tensor([case["masks"][op] for op in ops]).bool())
    no_F = dukd.InvertibleAugmentation((), ())
    monkeypatch.setattr(dukd, "zoom_in", lambda hr, size, *rest: hr[:, :, top:top + 12, left:left + 12])
    monkeypatch.setattr(F.__class__, "sample", lambda n, ops, *rest: F if ops else no_F)
    student, teacher, lr, hr = setting(case, dtype)
    z = dukd.zoom_out(lr, case["scale"])
    assert z.norm().item() == pytest.approx(case["z_out"]["norm"], rel=1e-6)
    for place, value in case["z_out"]["entries"]:
        assert z.flatten()[place].item() == pytest.approx(value, abs=1e-6)
    terms = dukd.losses(student, teacher, lr, hr, dukd.METHODS["dukd"])
    assert terms.keys() == case["terms"].keys()
    for name, expected in case["terms"].items():
        assert terms[name].item() == pytest.approx(expected, rel=far_of_terms), name
        norm = gradient(terms[name], student)[1]
        assert norm == pytest.approx(case["gradient_of_each_term"][name], rel=far), name
    for update in ("one_loss", "released_update"):
        weights, total = case[update]["weights"], case[update]["total"]
        loss = sum(weights[name] * terms[name] for name in weights)
        assert loss.item() == pytest.approx(total, rel=far_of_terms)
        found, norm = gradient(loss, student)
        expected = case[update]["gradient"]
        assert norm == pytest.approx(expected["norm"], rel=far)
        for name, place, value in expected["entries"]:
            assert found[name].flatten()[place].item() == pytest.approx(value, rel=far, abs=1e-8)


@pytest.mark.parametrize("name", ["fitnet", "at", "fakd"])
@pytest.mark.parametrize("scale", CASES)
def test_feature_losses_are_those_of_the_released_code(scale, name):
    """Of the map behind `conv_after_body` they are not: there it holds the long skip."""
    student, teacher, lr, hr = setting(CASES[scale], torch.float64)
    taps = [("conv_first", "conv_first"), ("body.0", "body.1"), ("body.1", "body.2")]
    expected = CASES[scale]["features"][name]
    for (s_tap, t_tap), value, length in zip(taps, expected["values"], expected["gradient_norms"]):
        modules = [(student.get_submodule(s_tap), teacher.get_submodule(t_tap))]
        loss = dukd.losses(student, teacher, lr, hr, {name: 1}, taps=modules)[name]
        assert loss.item() == pytest.approx(value, rel=1e-6)
        assert gradient(loss, student)[1] == pytest.approx(length, rel=1e-5)
