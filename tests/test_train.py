"""train.py: the losses of a batch, one update, the settings of the paper, whole runs, and the faster step."""
import contextlib
import csv
import itertools
import json
import multiprocessing
import os
import re
import signal
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dukd
import models
import train
from samples import noise, save

TESTS = Path(__file__).resolve().parent
F = dukd.InvertibleAugmentation
STUDENTS = dict(edsr="edsr_c4b3", rcan="rcan_c8b1g1", swinir="swinir_c12s6")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a ×4 teacher of each family, a ×2 EDSR, four training pictures and a held-out one."""
    base = tmp_path_factory.mktemp("place")
    torch.manual_seed(1)
    for name, scale in (("edsr_c8b3", 4), ("edsr_c8b3", 2), ("rcan_c8b1g3", 4), ("swinir_c12s6", 4)):
        models.save(base / f"{name.split('_')[0]}_x{scale}.pt", models.build(name, scale))
    for folder, count in (("train", 4), ("val", 1)):
        (base / folder).mkdir()
        for i in range(count):
            save(noise(8, 9, 3, seed=10 * count + i).repeat(8, 0).repeat(8, 1), base / folder / f"im{i}.png")
    return base


def config(place, out, family="edsr", **changes):
    settings = dict(teacher=f"{place}/{family}_x4.pt", student=STUDENTS[family], data=[f"{place}/train"],
                    val=[f"{place}/val"], out=str(out), batch=2, patch=8, steps=4, device="cpu",
                    precision="float32")
    return train.Config(**(settings | changes))


def rows(out):
    return [*csv.DictReader((out / "log.csv").read_text("utf-8").splitlines())]


def equal(xs, ys):
    return all(map(torch.equal, xs, ys))


def patches_of(run):
    return train.draw_patches(run.patches, run.c, run.step)


class Pairs:
    """In place of data.Patches: an HR patch is its LR patch with each pixel s times as large."""

    def __init__(self, c, lr=None):
        self.c, self.lr = c, lr

    def sample(self, n):
        lr = torch.rand(n, 3, 12, 12) if self.lr is None else self.lr.expand(n, -1, -1, -1)
        return lr, lr.repeat_interleave(self.c.scale, 2).repeat_interleave(self.c.scale, 3)


def networks(teacher="edsr_c8b3", student="edsr_c6b3", scale=4, **changes):
    """A student, a teacher that is not frozen, and the completed Config of the two."""
    torch.manual_seed(0)
    teacher = models.build(teacher, scale).eval() if teacher else None
    c = train.complete(train.Config(**(dict(scale=scale, batch=2, patch=12) | changes)), teacher)
    return models.build(student, scale), teacher, c


def draw(step=0, **settings):
    """The Batch of a step with these settings."""
    c = networks(**settings)[2]
    return train.upcycle(*train.draw_patches(Pairs(c), c, step), c)


def edsr_taps(net, x):
    """The four tapped feature maps of an EDSR with one block or three."""
    first = net.conv_first((x - net.mean) * net.img_range)
    second, third = (net.body[:i * len(net.body) // 3 + 1](first) for i in (1, 2))
    return first, second, third, net.conv_after_body(net.body(first))


@pytest.mark.parametrize("feature, student", [
    ("fitnet", "edsr_c6b3"), ("at", "edsr_c6b3"), ("fakd", "edsr_c6b3"), ("fitnet", "edsr_c6b1")])
def test_terms_are_the_papers_equations(feature, student):
    """Each term with a forward of its own. F_in flips and transposes one sample, and inverts the other."""
    student, teacher, c = networks(student=student, feature=feature, lambda_feature=3.0, lambda_rec=5.0,
                                   lambda_kd=0.5, lambda_dukd=2.0)
    lr, hr, z_in, z_out = (torch.rand(2, 3, n, n) for n in (12, 48, 12, 3))
    F_in = F(("hflip", "transpose", "invert"), torch.tensor([[1, 0], [1, 0], [0, 1]]).bool())
    F_out = F(("vflip",), torch.tensor([[1, 0]]).bool())
    apply = lambda x: torch.stack([x[0].flip(-1).transpose(-1, -2), 1 - x[1]])
    invert = lambda y: torch.stack([y[0].transpose(-1, -2).flip(-1), 1 - y[1]])
    vflip = lambda x: torch.stack([x[0].flip(-2), x[1]])
    mae = lambda a, b: (a - b).abs().mean()
    distance = getattr(dukd, f"{feature}_loss")
    expected = dict(rec=5 * mae(student(lr), hr), kd=0.5 * mae(student(lr), teacher(lr)),
                    zoom_in=2 * mae(invert(student(apply(z_in))), teacher(z_in)),
                    zoom_out=2 * mae(vflip(student(vflip(z_out))), teacher(z_out)),
                    zoom_out_rec=10 * mae(vflip(student(vflip(z_out))), lr),
                    feature=3 * sum(map(distance, edsr_taps(student, lr), edsr_taps(teacher, lr))))
    terms = train.losses(student, teacher, train.Batch(lr, hr, z_in, z_out, F_in, F_out), c)
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5), name


@pytest.mark.parametrize("settings, expected", [  # expected: the λ of each term
    (dict(), dict(rec=1, kd=1, zoom_in=1, zoom_out=1, zoom_out_rec=1)),
    (dict(method="kd"), dict(rec=1, kd=1)), (dict(method="scratch"), dict(rec=1)),
    (dict(method="fitnet"), dict(rec=1, feature=1)), (dict(method="at"), dict(rec=1, feature=1)),
    (dict(method="fakd"), dict(rec=1, kd=1, feature=10)), (dict(lambda_dukd=0.0), dict(rec=1, kd=1)),
    (dict(feature="fakd"), dict(rec=1, kd=1, zoom_in=1, zoom_out=1, zoom_out_rec=1, feature=10)),
    (dict(method="fakd", lambda_feature=0.0), dict(rec=1, kd=1)),
    (dict(method="kd", lambda_dukd=1.0), dict(rec=1, kd=1, zoom_in=1, zoom_out=1, zoom_out_rec=1)),
    (dict(method="scratch", lambda_dukd=2.0, zoom_in=False, zoom_out=False, zoom_out_rec=True, teacher=None),
     dict(rec=1, zoom_out_rec=2)),
    (dict(lambda_rec=0.0, crops=3), dict(kd=1, zoom_in=1, zoom_out=1)),
    (dict(zoom_in=False), dict(rec=1, kd=1, zoom_out=1, zoom_out_rec=1)),
    (dict(zoom_out=False), dict(rec=1, kd=1, zoom_in=1)),
    (dict(zoom_out_rec=False, lambda_kd=0.0), dict(rec=1, zoom_in=1, zoom_out=1)),
    (dict(method="dukd_released"), dict(rec=5, kd=1, zoom_in=0.5, zoom_out=0.5, zoom_out_rec=2.5)),
    (dict(method="dukd_released", teacher="swinir_c12s6", student="swinir_c12s6"),
     dict(rec=5, kd=1, zoom_in=0.5))])
def test_terms_of_each_combination_and_what_they_ask_of_the_teacher(settings, expected):
    """The student gets gradient from each. The teacher, not frozen here, gets none, and sees z without F."""
    student, teacher, c = networks(**settings)
    batch, calls = draw(**settings), []
    if teacher:
        teacher.register_forward_hook(lambda module, inputs, output: calls.append((inputs[0], output)))
    terms = train.losses(student, teacher, batch, c)
    assert list(terms) == list(expected) and train.term_weights(c) == expected
    for name, term in terms.items():
        student.zero_grad()
        term.backward(retain_graph=True)
        assert student.conv_first.weight.grad.abs().sum() > 0, name
    asked = [batch.lr] * ("kd" in terms or "feature" in terms) + [batch.z_in] * ("zoom_in" in terms)
    asked += [batch.z_out] * ("zoom_out" in terms)
    together = lambda tensors: torch.cat([torch.empty(0), *map(torch.flatten, tensors)])
    assert torch.equal(together(x for x, _ in calls), together(asked))
    assert not any(label.requires_grad for _, label in calls)
    assert not teacher or all(p.grad is None for p in teacher.parameters())


def test_networks_run_in_bfloat16_and_losses_in_float32(place, tmp_path):
    totals, kinds = [], []
    for precision in ("float32", "bfloat16"):
        run = train.Run(config(place, tmp_path / "run", precision=precision, feature="at"))
        train.accelerate(run)
        for net in (run.student, run.teacher):
            net.body[1].register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
        terms = train.losses(run.student, run.teacher, train.upcycle(*patches_of(run), run.c), run.c)
        totals.append(sum(terms.values()).item())
        assert {x.dtype for x in (*terms.values(), *run.weights)} == {torch.float32}
    assert kinds == [torch.float32] * 4 + [torch.bfloat16] * 4
    assert totals[0] == pytest.approx(totals[1], rel=0.02) and totals[0] != totals[1]


def test_a_batch_is_a_function_of_seed_and_step_and_every_method_sees_the_same_patches():
    batch, again = draw(step=5, seed=3), draw(step=5, seed=3)
    for name in ("lr", "hr", "z_in", "z_out"):
        assert torch.equal(getattr(batch, name), getattr(again, name)), name
    assert torch.equal(batch.F_in.masks, again.F_in.masks)
    for method in train.METHODS:
        other = draw(step=5, seed=3, method=method)
        assert torch.equal(batch.lr, other.lr) and torch.equal(batch.hr, other.hr)
    assert not torch.equal(batch.lr, draw(step=6, seed=3).lr)
    assert not torch.equal(batch.lr, draw(step=5, seed=4).lr)


def test_the_patches_of_a_pair_are_turned_together_in_all_eight_ways():
    _, _, c = networks(method="scratch", batch=64)
    lr, hr = train.draw_patches(Pairs(c, torch.rand(1, 3, 12, 12)), c, 0)
    assert torch.equal(hr, lr.repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert len(lr.flatten(1).unique(dim=0)) == 8


def test_the_crops_of_a_patch_come_from_different_places_in_it():
    batch = draw(crops=2)
    crops = batch.hr.unfold(2, 12, 1).unfold(3, 12, 1)  # (2,3,37,37,12,12)
    found = [(crops[i // 2] == z[:, None, None]).flatten(3).all(3).all(0) for i, z in enumerate(batch.z_in)]
    places = [where.nonzero().tolist() for where in found]
    assert all(places) and places[0] != places[1] and places[2] != places[3]


def test_several_processes_share_the_patches_and_draw_the_rest_for_themselves():
    _, _, c = networks(batch=4, p=0.5)
    whole = train.draw_patches(Pairs(c), c, 0)
    parts, crops, masks = [], [], []
    for rank in range(2):
        parts.append(train.draw_patches(Pairs(c), c, 0, rank, world=2))
        batch = train.upcycle(whole[0][:2], whole[1][:2], c)  # of the same pairs
        crops.append(batch.z_in)
        masks.append(torch.rand(8))
    assert torch.equal(torch.cat([lr for lr, _ in parts]), whole[0])
    assert torch.equal(torch.cat([hr for _, hr in parts]), whole[1])
    assert not torch.equal(*crops) and not torch.equal(*masks)  # masks: as drop-path draws them


@pytest.mark.parametrize("consistency, counts", [
    ("zoom_in", (2, 0)), ("zoom_out", (0, 2)), ("both", (2, 2)), ("none", (0, 0))])
def test_f_has_the_operations_of_consistency_and_ops(consistency, counts):
    settings = dict(ops=["invert", "hflip"], p=1.0) if any(counts) else {}
    batch = draw(consistency=consistency, **settings)
    for f, count in zip((batch.F_in, batch.F_out), counts):
        assert f is None if count == 0 else f.ops == ("invert", "hflip") and f.masks.all()


@pytest.mark.parametrize("teacher, scale, rec, zoom_out, crops, p", [
    ("edsr_c4b2", 2, 5, True, 2, 0.3), ("edsr_c4b2", 3, 5, True, 1, 0.3), ("edsr_c4b2", 4, 5, True, 1, 0.3),
    ("rcan_c4b1g1", 2, 1, False, 1, 0), ("rcan_c4b1g1", 3, 2, True, 1, 0.3),
    ("rcan_c4b1g1", 4, 1, False, 1, 0), ("swinir_c12s6", 4, 5, False, 1, 0.3)])
def test_settings_of_the_released_code(teacher, scale, rec, zoom_out, crops, p):
    teacher = models.build(teacher, scale)
    c = train.complete(train.Config(method="dukd_released"), teacher)
    assert (c.scale, c.lambda_rec, c.lambda_kd, c.lambda_dukd, c.crops, c.p) == (scale, rec, 1, 0.5, crops, p)
    assert (c.zoom_in, c.zoom_out, c.zoom_out_rec, c.consistency) == (True, zoom_out, zoom_out, "zoom_in")
    assert tuple(c.ops) == F.OPERATIONS and c.feature == "none" and train.complete(c, teacher) == c


@pytest.mark.parametrize("teacher", ["edsr_c4b2", "rcan_c4b1g1", "swinir_c12s6"])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_dukd_is_the_papers_equation_for_every_network(teacher, scale):
    c = train.complete(train.Config(), models.build(teacher, scale))
    assert (c.lambda_rec, c.lambda_kd, c.lambda_dukd, c.crops, c.p) == (1, 1, 1, 1, 0.3)
    assert c.zoom_in and c.zoom_out and c.zoom_out_rec and (c.consistency, c.feature) == ("zoom_in", "none")


@pytest.mark.parametrize("name, value, settings", [
    ("zoom_in", True, dict(method="kd")), ("zoom_out", True, dict(method="kd")),
    ("consistency", "zoom_in", dict(method="kd")), ("ops", ["hflip"], dict(method="kd")),
    ("p", 0.5, dict(method="kd")), ("p", 0.5, dict(consistency="none")), ("crops", 2, dict(zoom_in=False)),
    ("lambda_feature", 1.0, {}), ("zoom_out_rec", True, dict(lambda_rec=0)),
    ("lambda_dukd", 2.0, dict(zoom_in=False, zoom_out=False))])
def test_a_flag_without_effect_is_refused(name, value, settings):
    with pytest.raises(train.ConfigError, match=f"{train.flag(name)} would have no effect"):
        networks(**settings, **{name: value})


def test_learning_rate_milestones_scale_with_the_steps():
    at = lambda *steps, **settings: [train.learning_rate(step, train.Config(**settings)) for step in steps]
    assert at(0, 99_999, 100_000, 199_999, 200_000) == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6])
    assert at(3, 4, 7, 8, steps=10) == pytest.approx([1e-4, 1e-5, 1e-5, 1e-6])
    assert at(0, 5, 10, steps=10, schedule="cosine") == pytest.approx([1e-4, 5e-5, 0], abs=1e-12)


def test_the_loop_is_adam_on_each_gradient_and_averages_the_weights(place, tmp_path, monkeypatch):
    """Ten steps with torch's Adam. The decay of the average is (1 + step) / (10 + step) until it is 0.4."""
    c = config(place, tmp_path / "run", steps=10, lr=1e-2, ema=0.4)
    other = train.Run(c)
    run = train.train(c)
    adam = torch.optim.Adam(other.weights, betas=(0.9, 0.99))
    average = [w.detach().clone() for w in other.weights]
    for step, rate in enumerate([1e-2] * 4 + [1e-3] * 4 + [1e-4] * 2):
        other.step = step
        batch = train.upcycle(*patches_of(other), other.c)
        loss = sum(train.losses(other.student, other.teacher, batch, other.c).values())
        adam.param_groups[0]["lr"] = rate
        adam.zero_grad()
        loss.backward()
        adam.step()
        decay = min(0.4, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * w.detach() for a, w in zip(average, other.weights)]
        assert float(rows(run.out)[step]["total"]) == pytest.approx(loss.item(), rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(run.weights, other.weights))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(run.averaged, average))
    assert not any(p.requires_grad for p in run.averaged)  # the average keeps no graph of the steps


def test_a_run_learns_logs_its_terms_and_keeps_what_it_was(place, tmp_path, monkeypatch):
    made, compute = [], train.forward_backward
    monkeypatch.setattr(train, "forward_backward", lambda *given: made.append(compute(*given)) or made[-1])
    c = config(place, tmp_path / "run", student="edsr_c8b3", steps=40, lr=2e-2, val_every=10, lambda_rec=5.0)
    run = train.train(c, "python train.py …")
    log, terms = rows(run.out), ["5·rec", "1·kd", "1·zoom_in", "1·zoom_out", "5·zoom_out_rec"]
    assert list(log[0]) == ["step", "lr", *terms, "total", "val_psnr"]
    for row, values in zip(log, made, strict=True):
        assert [float(row[name]) for name in (*terms, "total")] == pytest.approx(values.tolist(), rel=1e-6)
        assert sum(float(row[name]) for name in terms) == pytest.approx(float(row["total"]), rel=1e-5)
    scores = {int(row["step"]): float(row["val_psnr"]) for row in log if row["val_psnr"]}
    assert list(scores) == [10, 20, 30, 40] and scores[40] > scores[10] + 1
    assert run.best == pytest.approx(max(scores.values()), abs=1e-4)
    about = json.loads((run.out / "config.json").read_text())
    assert (about["config"]["p"], about["held_out"], about["command"]) == (0.3, ["im0"], "python train.py …")
    assert models.load(run.out / "best.pt").scale == 4 and iio.imread(run.out / "compare.png").shape[2] == 3


def test_the_best_weights_are_kept(place, tmp_path, monkeypatch):
    scores, averages = iter((30.0, 20.0, 25.0)), []

    def score(run, make, label):
        if label != "student":
            return 40.0
        averages.append({k: v.clone() for k, v in run.ema.state_dict().items()})
        return next(scores)
    monkeypatch.setattr(train.Run, "score", score)
    run = train.train(config(place, tmp_path / "run", steps=6, val_every=2))
    best, last = (models.load(run.out / f"{name}.pt").state_dict() for name in ("best", "student"))
    assert run.best == 30 and equal(best.values(), averages[0].values())
    assert equal(last.values(), averages[2].values()) and not equal(best.values(), last.values())


@pytest.mark.parametrize("family", STUDENTS)
def test_stopped_and_resumed_equals_uninterrupted(place, tmp_path, monkeypatch, family):
    """Byte for byte, SwinIR with its random drop-path too. With this rate the best step is not the last."""
    settings = dict(family=family, steps=7, val_every=3, lr=0.1, ema=0)
    train.train(config(place, tmp_path / "whole", **settings))
    draw = train.draw_patches

    def interrupted(patches, c, step, *where):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return draw(patches, c, step, *where)
    monkeypatch.setattr(train, "draw_patches", interrupted)
    with pytest.raises(SystemExit) as stop:
        train.train(config(place, tmp_path / "parts", **settings))
    monkeypatch.undo()
    assert stop.value.code == 128 + signal.SIGTERM
    train.main(["--resume", "--out", str(tmp_path / "parts")])
    for name in ("student.pt", "best.pt", "log.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name


def test_the_teacher_stays_as_it_was_and_validation_changes_nothing(place, tmp_path):
    runs = [train.train(config(place, tmp_path / str(n), "swinir", steps=3, val_every=n)) for n in (1, 3)]
    teacher = runs[0].teacher
    assert equal(runs[0].averaged, runs[1].averaged)
    assert equal(teacher.parameters(), models.load(place / "swinir_x4.pt").parameters())
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_init_takes_what_fits_of_another_scale(place, tmp_path):
    """All of a ×2 network but the upsampler's second stage."""
    run = train.Run(config(place, tmp_path / "run", student="edsr_c8b3", init=str(place / "edsr_x2.pt")))
    own, source = run.student.state_dict(), models.load(place / "edsr_x2.pt").state_dict()
    assert [k for k in own if k not in source] == ["upsample.2.weight", "upsample.2.bias"]
    assert all(torch.equal(own[k], value) for k, value in source.items()) and equal(run.weights, run.averaged)


def test_init_starts_with_the_function_of_the_file(place, tmp_path):
    """Weights mean another function under another residual scale, mean or range."""
    torch.manual_seed(2)
    given = models.EDSR(4, channels=8, blocks=3, res_scale=0.2, mean=(0.1, 0.2, 0.3), img_range=1.0).eval()
    models.save(tmp_path / "given.pt", given)
    c = config(place, tmp_path / "run", student="edsr_c8b3", init=str(tmp_path / "given.pt"))
    x = torch.rand(1, 3, 8, 8)
    assert torch.allclose(train.Run(c).student(x), given(x), atol=1e-6)
    run = train.train(c)
    again = train.Run(train.dataclasses.replace(run.c, resume=True))
    train.start(again, "")
    assert torch.equal(again.student(x), run.student(x)) and torch.equal(again.ema(x), run.ema(x))


def test_pictures_that_are_held_out_and_trained_on_are_said(place, capsys):
    (place / "link.png").symlink_to(place / "train" / "im1.png")
    c = train.Config(data=[f"{place}/train"], val=[f"{place}/link.png", f"{place}/val"], scale=4, patch=8)
    train.prepare_images(c)
    assert "note: 1 held-out pictures are trained on, too, such as link.png" in capsys.readouterr().err


def test_a_run_of_days_says_so_and_names_a_short_one(place, tmp_path, monkeypatch, capsys):
    seconds = itertools.count(0, 100_000)  # a day and more between two looks at the clock
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(seconds))
    train.train(config(place, tmp_path / "slow", steps=22))
    assert "the run will take 2 days. It can be stopped" in capsys.readouterr().err
    monkeypatch.undo()
    train.train(config(place, tmp_path / "fast", steps=22))
    assert "days" not in capsys.readouterr().err


@pytest.mark.parametrize("count, held", [(2, 1), (19, 1), (20, 2), (120, 10)])
def test_a_tenth_of_the_images_is_held_out(tmp_path, count, held):
    (tmp_path / "lr").mkdir()
    for i in range(count):
        save(noise(16, 16, 3), tmp_path / f"{i:03}.png")
        save(noise(8, 8, 3, seed=i), tmp_path / "lr" / f"{i:03}x2.png")
    config = train.Config(data=[tmp_path], lr_data=[tmp_path / "lr"], scale=2, patch=8)
    store, pairs = train.prepare_images(config)
    assert all((lr == noise(8, 8, 3, seed=int(name))).all() for name, lr, _ in pairs)
    held_out = {f"{name}.png" for name, _, _ in pairs}
    assert (len(held_out), len(store.names)) == (held, count - held) and not held_out & {*store.names}


def test_bench_writes_nothing_and_a_run_takes_the_next_free_name(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.train(config(place, "", bench=3))
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and json.loads(line)["ms_per_step"] > 0 and not any(tmp_path.iterdir())
    c = config(place, "", steps=1, lambda_rec=2.0, zoom_out=False)
    first, second = train.train(c), train.train(c)
    assert first.out == Path("runs/dukd_lambda-rec-2.0_no-zoom-out_edsr_c4b3_x4_s0")
    assert second.out == Path(f"{first.out}_2")
    assert "dukd --lambda-rec 2.0 --no-zoom-out (seed 0): L = 2·rec" in capsys.readouterr().out


def child(function, argument, log, before, environment):
    """What a process of `launch` does. Its output goes to the files log1 and log2."""
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(f"{log}{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    before()
    function(argument)


def launch(function, argument, log, before=bool, **environment):
    """Calls before() and function(argument) in a new process, forked from one that has imported train.py."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_train", "torch._dynamo"])  # the optimiser imports it
    process = context.Process(target=child, args=(function, argument, log, before, environment))
    process.start()
    return process


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot fork")
def test_two_processes_equal_one(place, tmp_path):
    """Without zoom-in, for which each process draws crops and F of its own."""
    settings = dict(batch=4, zoom_in=False)
    one = train.train(config(place, tmp_path / "one", **settings))
    group = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(29_000 + os.getpid() % 1000))
    c = config(place, tmp_path / "two", **settings)
    for process in [launch(train.train, c, tmp_path / f"log{rank}_", RANK=rank, **group) for rank in "01"]:
        process.join(60)
        assert process.exitcode == 0
    two = models.load(tmp_path / "two" / "student.pt")
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one.averaged, two.parameters(), strict=True))
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert float(a["total"]) == pytest.approx(float(b["total"]), rel=1e-5)


def results(run, count):
    """What forward_backward returns for the patches of the first steps, (count,k)."""
    terms = []
    for run.step in range(count):
        terms.append(run.forward_backward(*patches_of(run)))
    return torch.stack(terms)


def pretend_cuda(monkeypatch, sync=None, capture=None):
    """A stand-in for CUDA graphs. sync, capture: what is raised by a step under sync-debug, or by recording.
    A replay calls the function again on the recorded patches. Returns what was called, in order."""
    calls, mode = [], ["default"]

    class Graph:
        def replay(self):
            calls.append("replay")

    @contextlib.contextmanager
    def record(graph, stream):
        assert mode == ["default"]
        calls.append("record")
        if capture:
            raise capture
        yield

    def step(function):
        def checked(run, lr, hr):
            calls.append(f"step in mode {mode[0]}")
            if sync and mode[0] == "error":
                raise sync
            return function(run, lr, hr)
        return checked
    for name, stand_in in (("current_stream", lambda: None), ("CUDAGraph", Graph), ("graph", record),
                           ("set_sync_debug_mode", lambda new: mode.__setitem__(0, new))):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "compile", lambda forward, **settings: forward)
    monkeypatch.setattr(train, "forward_backward", step(train.forward_backward))
    return calls


def test_a_recorded_step_is_fed_with_each_batch(place, tmp_path, monkeypatch):
    calls = pretend_cuda(monkeypatch)
    c = config(place, tmp_path / "run", consistency="both", p=0.5, crops=2)
    plain, recorded = train.Run(c), train.Run(c)
    function, recorded.device = recorded.forward_backward, torch.device("cuda")
    train.accelerate(recorded)
    graph = recorded.forward_backward
    graph.graph.replay = lambda: graph.result.copy_(function(*graph.pair))
    assert calls[-3:] == ["step in mode error", "record", "step in mode default"]
    assert torch.equal(results(plain, 7), results(recorded, 7))
    assert equal([w.grad for w in plain.weights], [w.grad for w in recorded.weights])


def test_a_step_that_waits_for_the_gpu_is_not_recorded(place, tmp_path, monkeypatch, capsys):
    """It is found out before the recording: after one that fails, the generator of CUDA cannot draw."""
    calls = pretend_cuda(monkeypatch, sync=RuntimeError("called a synchronizing CUDA operation"))
    run = train.Run(config(place, tmp_path / "run"))
    run.device = torch.device("cuda")
    train.accelerate(run)
    assert "record" not in calls and "the step waits for the GPU" in capsys.readouterr().err
    assert results(run, 2).isfinite().all() and calls[-1] == "step in mode default"


def test_a_recording_that_fails_names_the_way_out(place, tmp_path, monkeypatch):
    pretend_cuda(monkeypatch, capture=RuntimeError("operation not permitted when stream is capturing"))
    run = train.Run(config(place, tmp_path / "run"))
    run.device = torch.device("cuda")
    with pytest.raises(train.ConfigError, match="give --no-compile"):
        train.accelerate(run)


@pytest.mark.parametrize("family", STUDENTS)
def test_a_step_reads_no_value_from_the_device(place, tmp_path, family):
    """A CUDA graph records no number that is read, no size that depends on data, and no copied constant."""
    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))
    c = config(place, tmp_path / "run", family, crops=2, zoom_out=True, consistency="both", feature="at")
    run = train.Run(c)
    patches, called = patches_of(run), []
    with Log():
        run.forward_backward(*patches)
    forbidden = "_local_scalar|lift_fresh|nonzero|unique|masked_select"
    assert len(called) > 100 and not [name for name in called if re.search(forbidden, name)]


@pytest.mark.parametrize("given, names", [
    ("", ["cuda:1"]), ("cuda", ["cuda:1"]), ("cuda:0", ["cuda:0"]), ("cpu", ["cpu"])])
def test_cuda_is_the_gpu_of_the_process_under_torchrun(monkeypatch, given, names):
    asked = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train.evaluate, "pick_device", lambda name: asked.append(name) or torch.device("cpu"))
    train.set_up_device(given)
    assert asked == names


@pytest.mark.parametrize("works", [True, False])
def test_compiled_blocks_give_the_same_run(place, tmp_path, monkeypatch, capsys, works):
    """Also where the compiler fails at the first call. The backend "eager" needs no compiler of C++."""
    compiled, original = [], torch.compile

    def stand_in(forward, **settings):
        compiled.append(forward)
        return original(forward, backend="eager", **settings) if works else lambda x: 1 / 0
    monkeypatch.setattr(torch, "compile", stand_in)
    plain = train.train(config(place, tmp_path / "plain"))
    other = train.train(config(place, tmp_path / "other", compile=True))
    assert len(compiled) == 6 and ("note: torch.compile fails" in capsys.readouterr().err) != works
    assert equal(plain.averaged, other.averaged)


def test_pictures_compile_nothing(place, tmp_path, monkeypatch):
    """Neither validation nor compare.png: their sizes are not those of training."""
    compiled, original = [], torch.compile

    def backend(graph, inputs):
        compiled.append(finished)
        return graph.forward
    compile_by = lambda forward, **settings: original(forward, backend=backend, **settings)
    monkeypatch.setattr(torch, "compile", compile_by)
    finish, finished = train.finish, False

    def finishing(run):
        nonlocal finished
        finished = True
        finish(run)
    monkeypatch.setattr(train, "finish", finishing)
    train.train(config(place, tmp_path / "run", compile=True, steps=4, val_every=2))
    assert compiled and not any(compiled)


def test_validation_searches_no_algorithms(place, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    run, seen = train.Run(config(place, tmp_path / "run")), []

    def make(name, lr):
        seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark))
        return lr.repeat(4, axis=0).repeat(4, axis=1)
    run.score(make, "student")
    assert seen == [(True, False)] and torch.backends.cudnn.benchmark


def test_bench_reads_the_terms_as_training_does(place, tmp_path, monkeypatch, capsys):
    """On a GPU after every ten steps: reading makes it wait."""
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(1) or tolist(x))
    run = train.Run(config(place, tmp_path / "run", bench=30))
    run.log_every, run.last_step = 10, 10 * (train.WARM_UP + 3)
    monkeypatch.setattr(train, "Run", lambda c: run)
    train.train(run.c)
    assert len(reads) == run.last_step // 10 and run.step == run.last_step
    line = json.loads(capsys.readouterr().out)
    assert line["ms_per_step"] * run.last_step / 1000 < 60


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", STUDENTS)
def test_on_a_gpu_the_recorded_step_gives_the_plain_one(place, tmp_path, family, precision):
    """Also after a validation, which computes other sizes between two replays."""
    c = config(place, tmp_path / "run", family, device="cuda", precision=precision, crops=2)
    plain, recorded = train.Run(c), train.Run(c)
    train.accelerate(recorded)
    assert recorded.forward_backward.graph
    for _ in range(2):
        tolerance = 1e-3 if precision == "float32" else 2e-2
        assert torch.allclose(results(plain, 8), results(recorded, 8), rtol=tolerance)
        recorded.score(train.evaluate.upscaler(recorded.ema), "student")


@needs_gpu
@pytest.mark.parametrize("family", STUDENTS)
def test_on_a_gpu_a_replay_draws_what_its_seed_says(place, tmp_path, family):
    """The crops, F, and SwinIR's drop-path are drawn inside the graph."""
    run = train.Run(config(place, tmp_path / "run", family, device="cuda"))
    train.accelerate(run)
    patches = [x.clone() for x in patches_of(run)]

    def loss(seed):
        torch.manual_seed(seed)
        return run.forward_backward(*patches)[-1].item()
    first, other, again = loss(1), loss(2), loss(1)
    assert first == pytest.approx(again, rel=1e-5) and abs(first - other) > 1e-4 * first


@needs_gpu
def test_on_a_gpu_a_run_is_resumed(place, tmp_path):
    run = train.train(config(place, tmp_path / "run", device="cuda", steps=20, val_every=10))
    again = train.Run(train.dataclasses.replace(run.c, resume=True))
    train.start(again, "")
    assert again.step == 20 and equal(run.weights, again.weights) and equal(run.averaged, again.averaged)
    state = next(iter(again.optimizer.state.values()))
    assert state["step"].device == again.device and again.optimizer.param_groups[0]["fused"]


@needs_gpu
def test_on_a_gpu_a_picture_is_the_cpus(place):
    network, lr = models.load(place / "edsr_x4.pt"), noise(40, 50, 3).repeat(2, 0)
    on_cpu = train.evaluate.upscaler(network, tile=32)("", lr)
    on_gpu = train.evaluate.upscaler(network.cuda(), tile=32)("", lr)
    assert abs(on_cpu.astype(int) - on_gpu).max() <= 1
