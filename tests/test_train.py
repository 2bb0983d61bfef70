"""The training script: losses of a batch, the update, the run folder, resuming, several processes, and its errors."""
import contextlib
import copy
import csv
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import dukd
import models
import train

ROOT = Path(__file__).resolve().parent.parent
QUICK = dict(batch=2, patch=12, steps=4, device="cpu", log_every=1, precision="float32")


def pictures(folder, sizes, seed=0):
    """Smooth random pictures, so that a network can learn something from them."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i, (h, w) in enumerate(sizes):
        coarse = rng.integers(0, 256, (h // 8 + 1, w // 8 + 1, 3), dtype=np.uint8)
        iio.imwrite(folder / f"im{i}.png", data.imresize(coarse, 8)[:h, :w])
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a ×4 teacher of each family, a ×2 one, training and validation pictures."""
    base = tmp_path_factory.mktemp("place")
    torch.manual_seed(1)
    for name, scale in (("edsr_c12b3", 4), ("rcan_c16b2g3", 4), ("swinir_c12s12", 4), ("edsr_c12b3", 2), ("edsr_c12b3", 3)):
        models.save(base / f"{name.split('_')[0]}_x{scale}.pt", models.build(name, scale))
    pictures(base / "train", [(64, 80), (72, 64), (100, 60)])
    pictures(base / "val", [(48, 56)], seed=1)
    return base


def config(place, out, **changes):
    defaults = dict(QUICK, teacher=str(place / "edsr_x4.pt"), student="edsr_c6b3", data=[str(place / "train")],
                    val=[str(place / "val")], out=str(out), cache=str(place / "cache"))
    return train.Config(**{**defaults, **changes})


def rows(out):
    with open(Path(out) / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


def weights(out, key="params"):
    return torch.load(Path(out) / "student.pt", weights_only=True)[key]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run_command(*words, cwd=ROOT, env=None, **more):
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=120,
                          env={**os.environ, **(env or {})}, **more)


# ------------------------------------------------------------------------------------------------ one batch
def batch_and_config(scale=4, teacher_name="edsr_c12b3", **changes):
    torch.manual_seed(0)
    teacher, student = models.build(teacher_name, scale).eval(), models.build("edsr_c6b3", scale)
    c = train.complete(train.Config(scale=scale, **changes), teacher)
    lr, hr = (torch.randint(256, (2, 3, n, n)).float() / 255 for n in (12, 12 * scale))
    return student, teacher, lr, hr, c


class Pairs:
    """In place of data.Patches: the same pairs in every draw."""
    resident = False

    def __init__(self, lr, hr):
        self.found = {k: (x.permute(0, 2, 3, 1) * 255).round().byte() for k, x in (("lr", lr), ("hr", hr))}

    def draw(self, n, generator):
        return torch.zeros(n, 3, dtype=torch.long)

    def fetch(self, where):
        return dict(self.found)


def terms_of(student, teacher, lr, hr, c, seed=0, rank=0, world=1, features=None, label=None):
    """The terms on the pairs (lr, hr), left as they are (not turned)."""
    amp = torch.autocast("cpu", enabled=False)
    pairs, c = Pairs(lr, hr), dataclasses.replace(c, batch=len(lr), patch=lr.shape[-1])
    drawn = train.draw(pairs, c, torch.Generator().manual_seed(seed))
    drawn["turn"] = drawn["turn"].map(torch.zeros_like)
    x = train.upcycle(pairs, train.share(drawn, rank, world) | ({} if label is None else dict(label=label)), c)
    with features.watch() if features else contextlib.nullcontext():
        return train.loss_terms(student, x, train.labels(teacher, x, c, amp), c, amp, features)


@pytest.mark.parametrize("consistency", ["zoom_in", "zoom_out", "both", "none"])
def test_every_term_gives_the_student_gradient_and_the_teacher_none(consistency):
    student, teacher, lr, hr, c = batch_and_config(consistency=consistency)
    assert any(p.requires_grad for p in teacher.parameters())  # not frozen here: the step itself must not reach it
    terms = terms_of(student, teacher, lr, hr, c)
    assert list(terms) == ["rec", "kd", "zoom_in", "zoom_out", "zoom_out_rec"] == train.term_names(c)
    for name, term in terms.items():
        student.zero_grad(set_to_none=True)
        term.backward(retain_graph=True)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters()), name
    assert all(p.grad is None for p in teacher.parameters())


def test_terms_are_the_papers_equations():
    """The same draws by hand, one term after the other, with a forward for each: the equations as they stand."""
    student, teacher, lr, hr, c = batch_and_config(consistency="both", p=0.5)
    terms = terms_of(student, teacher, lr, hr, c, seed=3)
    g = torch.Generator().manual_seed(3)
    dukd.InvertibleAugmentation.sample(2, ("hflip", "vflip", "transpose"), 0.5, g)  # of the training pairs
    z_in, z_out = dukd.zoom_in(hr, 12, g), dukd.zoom_out(lr, 4)
    F_in = dukd.InvertibleAugmentation.sample(2, p=0.5, generator=g)
    F_out = dukd.InvertibleAugmentation.sample(2, p=0.5, generator=g)
    with torch.no_grad():
        mae = lambda a, b: (a - b).abs().mean()
        expected = dict(rec=5 * mae(student(lr), hr), kd=mae(student(lr), teacher(lr)),
                        zoom_in=mae(F_in.invert(student(F_in.apply(z_in))), teacher(z_in)),
                        zoom_out=mae(F_out.invert(student(F_out.apply(z_out))), teacher(z_out)),
                        zoom_out_rec=5 * mae(F_out.invert(student(F_out.apply(z_out))), lr))
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.parametrize("changes, names", [
    (dict(method="scratch"), ["rec"]), (dict(method="kd"), ["rec", "kd"]),
    (dict(zoom_in=False), ["rec", "kd", "zoom_out", "zoom_out_rec"]), (dict(zoom_out=False), ["rec", "kd", "zoom_in"]),
    (dict(lambda_kd=0.0), ["rec", "zoom_in", "zoom_out", "zoom_out_rec"]), (dict(lambda_rec=0.0), ["kd", "zoom_in", "zoom_out"]),
    (dict(lambda_dukd=0.0), ["rec", "kd", "zoom_out_rec"]), (dict(crops=3), ["rec", "kd", "zoom_in", "zoom_out", "zoom_out_rec"]),
    (dict(ops=["hflip"], p=1.0), ["rec", "kd", "zoom_in", "zoom_out", "zoom_out_rec"])])
def test_each_ablation_is_one_setting(changes, names):
    student, teacher, lr, hr, c = batch_and_config(**changes)
    assert list(terms_of(student, teacher, lr, hr, c)) == names == train.term_names(c)


@pytest.mark.parametrize("changes, asked", [
    (dict(), [(4, 12), (2, 3)]), (dict(method="kd"), [(2, 12)]), (dict(method="scratch"), []), (dict(method="at"), [(2, 12)]),
    (dict(lambda_dukd=0.0), [(2, 12)]), (dict(lambda_kd=0.0), [(2, 12), (2, 3)]), (dict(method="at", lambda_feature=0.0), [])])
def test_the_teacher_answers_only_what_a_term_asks(changes, asked):
    student, teacher, lr, hr, c = batch_and_config(**changes)
    seen = []
    teacher.register_forward_hook(lambda m, x, y: seen.append((len(x[0]), x[0].shape[-1])))
    terms_of(student, teacher, lr, hr, c)
    assert seen == asked


def test_crops_multiply_the_zoom_in_inputs():
    student, teacher, lr, hr, c = batch_and_config(crops=3, zoom_out=False)
    sizes = []
    student.register_forward_hook(lambda m, x, y: sizes.append(len(x[0])))
    terms_of(student, teacher, lr, hr, c)
    assert sizes == [2 + 3 * 2]


def test_shares_of_a_batch_average_to_the_whole():
    """What several processes compute, each on its part, is what one computes on all."""
    student, teacher, lr, hr, c = batch_and_config(crops=2)
    whole = terms_of(student, teacher, lr, hr, c)
    parts = [terms_of(student, teacher, lr, hr, c, rank=i, world=2) for i in range(2)]
    for name in whole:
        assert (sum(p[name] for p in parts) / 2).item() == pytest.approx(whole[name].item(), rel=1e-5), name


def test_the_papers_weights():
    weights_of = lambda arch, scale: [getattr(train.complete(train.Config(scale=scale), models.build(arch, scale)), k)
                                      for k in ("lambda_rec", "lambda_kd", "lambda_dukd", "p", "zoom_in", "zoom_out")]
    assert weights_of("edsr_c8b2", 4) == [5, 1, 1, 0.3, True, True]
    assert weights_of("rcan_c16b1g1", 4) == [1, 1, 1, 0, True, False]
    assert weights_of("rcan_c16b1g1", 3) == [2, 1, 1, 0.3, True, True]
    assert weights_of("swinir_c12s6", 2) == [5, 1, 1, 0.3, True, False]


# ------------------------------------------------------------------------------------------------ the update
def test_learning_rate_milestones_scale_with_the_steps():
    at = lambda step, **k: train.learning_rate(step, train.Config(**k))
    assert [at(s) for s in (0, 99_999, 100_000, 199_999, 200_000)] == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6])
    assert [at(s, steps=10) for s in (3, 4, 7, 8)] == pytest.approx([1e-4, 1e-5, 1e-5, 1e-6])
    assert [at(s, steps=10, schedule="cosine") for s in (0, 5, 10)] == pytest.approx([1e-4, 5e-5, 0], abs=1e-12)


def test_each_update_uses_its_own_gradient_alone():
    """Two updates with Adam, against Adam written out (Kingma & Ba, algorithm 1); an old gradient left in would show."""
    c = train.Config(steps=100, ema=0.5)
    net = torch.nn.Linear(1, 1, bias=False)
    ema = torch.nn.Linear(1, 1, bias=False)
    for m in (net, ema):
        torch.nn.init.constant_(m.weight, 1.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, betas=(0.9, 0.99))
    w, average, m1, m2 = 1.0, 1.0, 0.0, 0.0
    for step, slope in enumerate((2.0, -3.0)):
        optimizer.zero_grad()
        (slope * net.weight.sum()).backward()
        train.update(net, optimizer, ema, torch.tensor(train.blend(step, c)))
        m1, m2 = 0.9 * m1 + 0.1 * slope, 0.99 * m2 + 0.01 * slope ** 2
        w -= 0.1 * (m1 / (1 - 0.9 ** (step + 1))) / (math.sqrt(m2 / (1 - 0.99 ** (step + 1))) + 1e-8)
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * w
        assert net.weight.item() == pytest.approx(w, rel=1e-5)
        assert ema.weight.item() == pytest.approx(average, rel=1e-5)


# ------------------------------------------------------------------------------------------------ runs
@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_trains_and_logs_terms_that_sum_to_the_total(place, tmp_path, method):
    run = train.train(config(place, tmp_path / "run", method=method))
    log = rows(tmp_path / "run")
    assert [int(r["step"]) for r in log] == [1, 2, 3, 4]
    for row in log:
        terms = [float(v) for k, v in row.items() if k not in ("step", "lr", "total", "val_psnr")]
        assert sum(terms) == pytest.approx(float(row["total"]), rel=1e-5) and min(terms) > 0
    assert log[-1]["val_psnr"] and run.best > 0
    assert not same(weights(run.out), weights(run.out, "params_ema"))
    for name in ("config.json", "log.csv", "student.pt", "best.pt", "last.ckpt", "val/im0_x4.png"):
        assert (run.out / name).is_file(), name
    assert iio.imread(run.out / "val" / "im0_x4.png").shape == (48, 56, 3)


@pytest.mark.parametrize("teacher, student", [("rcan", "rcan_c16b1g3"), ("swinir", "swinir_c12s6"), ("edsr", "small")])
def test_every_family_trains(place, tmp_path, teacher, student):
    run = train.train(config(place, tmp_path / "run", teacher=str(place / f"{teacher}_x4.pt"), student=student, steps=2))
    assert models.load(run.out / "student.pt").config["arch"] == teacher


def test_bfloat16_keeps_weights_and_losses_in_float32_and_close(place, tmp_path):
    for precision in ("float32", "bfloat16"):
        train.train(config(place, tmp_path / precision, precision=precision, steps=2))
    a, b = (rows(tmp_path / p) for p in ("float32", "bfloat16"))
    assert float(a[0]["total"]) == pytest.approx(float(b[0]["total"]), rel=0.02) and a[0]["total"] != b[0]["total"]
    assert {v.dtype for v in weights(tmp_path / "bfloat16").values()} == {torch.float32}


@pytest.mark.parametrize("scale", [2, 3])
def test_other_scales(place, tmp_path, scale):
    run = train.train(config(place, tmp_path / "run", teacher=str(place / f"edsr_x{scale}.pt"), steps=2))
    assert models.load(run.out / "best.pt").scale == scale


def test_training_learns(place, tmp_path):
    run = train.train(config(place, tmp_path / "run", steps=40, lr=5e-3, val_every=10, log_every=10))
    figures = [float(r["val_psnr"]) for r in rows(run.out)]
    assert figures[-1] > figures[0] + 1


@pytest.mark.parametrize("student, teacher, threads", [("edsr_c6b3", "edsr", 1), ("edsr_c6b3", "edsr", 2), ("swinir_c12s6", "swinir", 1)])
def test_stopped_and_resumed_equals_uninterrupted(place, tmp_path, request, student, teacher, threads):
    """Bit for bit, SwinIR with its random drop-path too, and the log as well."""
    request.addfinalizer(lambda before=torch.get_num_threads(): torch.set_num_threads(before))
    torch.set_num_threads(threads)
    settings = dict(student=student, teacher=str(place / f"{teacher}_x4.pt"), steps=6, log_every=2, val_every=5)
    train.train(config(place, tmp_path / "whole", **settings))
    train.train(config(place, tmp_path / "parts", stop_at=3, **settings))
    torch.rand(7)  # what else happened in the process must not matter
    train.main(["--resume", "--out", str(tmp_path / "parts"), "--stop-at", "0"])
    for key in ("params", "params_ema"):
        assert same(weights(tmp_path / "whole", key), weights(tmp_path / "parts", key))
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


def test_validation_does_not_touch_training(place, tmp_path):
    swin = dict(teacher=str(place / "swinir_x4.pt"), student="swinir_c12s6")
    for name, every in (("often", 1), ("once", 4)):
        train.train(config(place, tmp_path / name, val_every=every, **swin))
    assert same(weights(tmp_path / "often"), weights(tmp_path / "once"))


def test_the_teacher_stays_frozen_and_in_eval(place, tmp_path, monkeypatch):
    seen = []
    load = train.load_teacher
    monkeypatch.setattr(train, "load_teacher", lambda c: seen.append(load(c)) or seen[0])
    train.train(config(place, tmp_path / "run", teacher=str(place / "swinir_x4.pt"), student="swinir_c12s6", steps=2))
    teacher, fresh = seen[0], models.load(place / "swinir_x4.pt")
    assert not any(m.training for m in teacher.modules()) and not any(p.requires_grad for p in teacher.parameters())
    assert same(teacher.state_dict(), fresh.state_dict())


def test_the_run_folder_tells_what_was_run(place, tmp_path):
    c = config(place, tmp_path / "run", steps=1)
    train.train(c, command="python train.py …")
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["config"]["lambda_rec"] == 5 and about["config"]["scale"] == 4 and about["command"] == "python train.py …"
    assert about["versions"]["torch"] == torch.__version__ and about["device"] == "cpu" and about["held_out"] == ["im0"]


def test_report_names_networks_costs_and_held_out_figures(place, tmp_path, capsys):
    train.train(config(place, tmp_path / "run", steps=1))
    text = capsys.readouterr().out
    assert re.search(r"teacher .*edsr_x4.pt: edsr .*channels=12.* M parameters, .* G multiply-adds .*held-out \d+\.\d\d dB", text)
    assert re.search(r"student edsr_c6b3: .*channels=6", text) and re.search(r"held out 1, bicubic \d+\.\d\d dB", text)


def test_default_data_needs_no_folder(place, tmp_path):
    run = train.train(config(place, tmp_path / "run", data=[], val=[], steps=1, student="edsr_c4b1"))
    assert json.loads((run.out / "config.json").read_text())["held_out"] == ["chelsea", "coffee", "coins"]


def test_holdout_images_are_not_trained_on(place, tmp_path):
    store, held = train.prepare_data(train.complete(config(place, tmp_path, val=[], holdout=1, scale=4), None))
    assert [h[0] for h in held] == ["im0"] and store.names == ["im1.png", "im2.png"]


# ------------------------------------------------------------------------------------------------ feature baselines
def test_feature_taps_pair_thirds_and_adapters_are_trained_but_not_saved(place, tmp_path, capsys):
    run = train.train(config(place, tmp_path / "run", method="fitnet", full_maps=True, steps=2))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tap ")]
    assert lines == [f"tap     body.{i} (6, 16, 16) ~ body.{i} (12, 16, 16)" for i in range(3)]
    assert len(run.adapters) == 3 and all(a.weight.grad.abs().sum() > 0 for a in run.adapters)
    assert weights(run.out).keys() == models.build("edsr_c6b3", 4).state_dict().keys()


@pytest.mark.parametrize("method", ["fitnet", "at", "fakd"])
def test_feature_terms_reach_the_student(place, method):
    student, teacher, lr, hr, _ = batch_and_config()
    c = train.complete(train.Config(scale=4, method=method, taps=["body.0:body.1"]), teacher)
    features = train.FeatureLoss(student, teacher, c)
    terms = terms_of(student, teacher, lr, hr, c, features=features)
    terms["feature"].backward()
    assert student.body[0].conv1.weight.grad.abs().sum() > 0 and student.body[1].conv1.weight.grad is None
    assert all(p.grad is None for p in teacher.parameters())


# ------------------------------------------------------------------------------------------------ starting points
def test_init_from_another_scale_takes_all_but_the_upsampler():
    torch.manual_seed(0)
    source, student = models.build("edsr_c6b2", 2), models.build("edsr_c6b2", 4)
    own = {k: v.clone() for k, v in student.state_dict().items()}
    train.initialise(student, source, "x2.pt")
    for key, value in student.state_dict().items():
        assert torch.equal(value, own[key] if key.startswith("upsample.") else source.state_dict()[key]), key


def test_init_from_the_teacher_gives_the_teacher(place, tmp_path):
    c = config(place, tmp_path, student="edsr_c12b3", init=str(place / "edsr_x4.pt"), scale=4)
    teacher = train.load_teacher(c)
    x = torch.rand(1, 3, 9, 9)
    assert torch.equal(train.build_student(c, teacher).eval()(x), teacher(x))


# ------------------------------------------------------------------------------------------------ several processes
def test_two_processes_equal_one(place, tmp_path):
    common = ["--teacher", place / "edsr_x4.pt", "--student", "edsr_c6b3", "--data", place / "train", "--val", place / "val",
              "--batch", "4", "--patch", "12", "--steps", "4", "--log-every", "1", "--device", "cpu", "--cache", place / "cache",
              "--precision", "float32"]
    one = run_command("train.py", *common, "--out", tmp_path / "one")
    two = run_command("-m", "torch.distributed.run", "--nproc_per_node=2", "--master-port=0", "--rdzv-backend=c10d",
                      "--rdzv-endpoint=127.0.0.1:0", "train.py", *common, "--out", tmp_path / "two", env=dict(OMP_NUM_THREADS="1"))
    assert one.returncode == 0, one.stderr[-2000:]
    assert two.returncode == 0, two.stderr[-2000:]
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=2e-6) for k in a)
    for x, y in zip(rows(tmp_path / "one"), rows(tmp_path / "two")):
        assert float(x["total"]) == pytest.approx(float(y["total"]), rel=1e-4)


# ------------------------------------------------------------------------------------------------ as a user runs it
def test_train_stop_resume_evaluate_upscale(place, tmp_path):
    words = ["train.py", "--teacher", place / "edsr_x4.pt", "--student", "edsr_c6b3", "--data", place / "train", "--val", place / "val",
             "--batch", "2", "--patch", "12", "--steps", "100000", "--out", tmp_path / "run", "--device", "cpu"]
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (log := tmp_path / "run" / "log.csv").exists() or len(log.read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "--resume --out" in out
    done = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["step"]
    again = run_command("train.py", "--resume", "--out", tmp_path / "run", "--stop-at", done + 3)
    assert again.returncode == 0 and f"stopped after step {done + 3} of 100000" in again.stdout

    table = run_command("evaluate.py", tmp_path / "run" / "student.pt", "bicubic", "--data", place / "val", "--device", "cpu")
    assert table.returncode == 0 and re.search(r"student\.pt +0\.\d\d M .* \d+\.\d\d/", table.stdout)
    big = run_command("evaluate.py", tmp_path / "run" / "student.pt", "--input", place / "val", "--output", tmp_path / "big")
    assert big.returncode == 0 and iio.imread(tmp_path / "big" / "im0_x4.png").shape == (192, 224, 3)


def error_of(capsys, *words):
    """The one line that a wrong command line ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([str(w) for w in words])
    text = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and text.startswith("error: ") and "\n" not in text, text
    return text


@pytest.mark.parametrize("words, named", [
    (["--studnt", "x"], "did you mean --student"), (["--method", "foo"], "dukd"), (["--steps", "many"], "--steps"),
    (["--teacher", "nowhere.pt"], "nowhere.pt does not exist"), ([], "--teacher"), (["--method", "kd"], "--teacher"),
    (["--method", "scratch"], "name a size"), (["--method", "scratch", "--student", "edsr_basline"], "edsr_baseline"),
    (["--method", "scratch", "--student", "edsr_c4b1", "--data", "nowhere"], "nowhere does not exist"),
    (["--method", "scratch", "--student", "edsr_c4b1", "--steps", "-3"], "--steps"),
    (["--method", "scratch", "--student", "edsr_c4b1", "--lr", "nan"], "--lr"),
    (["--method", "scratch", "--student", "edsr_c4b1", "--device", "cuda:99"], "cuda:99"),
    (["--method", "scratch", "--student", "edsr_c4b1", "--scale", "5"], "--scale"), (["--resume"], "--out")])
def test_wrong_commands_end_with_one_line(capsys, tmp_path, monkeypatch, words, named):
    monkeypatch.chdir(tmp_path)
    assert named in error_of(capsys, *words)
    assert not any(tmp_path.iterdir())  # and leave nothing behind


def test_errors_about_files_name_them(place, capsys, tmp_path):
    base = ["--teacher", place / "edsr_x4.pt", "--student", "edsr_c6b3", "--out", tmp_path / "run", "--device", "cpu"]
    assert "x4" in error_of(capsys, *base, "--scale", "2")
    assert "multiple" in error_of(capsys, *base, "--patch", "13")
    assert "im0.png" in error_of(capsys, *base, "--data", place / "train", "--val", place / "val", "--patch", "64")
    assert "holdout" in error_of(capsys, *base, "--data", place / "train")
    assert "channels=6" in error_of(capsys, *base, "--init", place / "edsr_x4.pt")
    assert "body.9" in error_of(capsys, *base, "--method", "at", "--taps", "body.9:body.0")
    (tmp_path / "full").mkdir()
    assert "--resume" in error_of(capsys, *base[:-4], "--out", tmp_path / "full")
    assert "no run to resume" in error_of(capsys, "--resume", "--out", tmp_path / "full")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_is_never_overwritten_and_resume_may_not_contradict(place, capsys, tmp_path):
    run = train.train(config(place, tmp_path / "run", steps=2, stop_at=1))
    before = {p.name: p.read_bytes() for p in run.out.iterdir() if p.is_file()}
    assert "exists already" in error_of(capsys, "--teacher", place / "edsr_x4.pt", "--out", run.out)
    assert "--batch 4 contradicts" in error_of(capsys, "--resume", "--out", run.out, "--batch", "4")
    assert before == {p.name: p.read_bytes() for p in run.out.iterdir() if p.is_file()}


def test_the_checkpoint_before_the_last_is_an_earlier_one_and_serves_where_the_last_is_broken(place, tmp_path, capsys):
    run = train.train(config(place, tmp_path / "run", val_every=2))
    step = lambda name: torch.load(run.out / name, weights_only=True)["step"]
    assert (step("previous.ckpt"), step("last.ckpt")) == (2, 4)
    whole = weights(run.out)
    (run.out / "last.ckpt").write_bytes((run.out / "last.ckpt").read_bytes()[:999])
    train.main(["--resume", "--out", str(run.out)])
    assert "last.ckpt is not a whole" in capsys.readouterr().err and same(weights(run.out), whole)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(place, tmp_path, capsys):
    bad = models.load(place / "edsr_x4.pt")
    with torch.no_grad():
        bad.conv_last.bias.fill_(3e38)  # finite, but its mean error is not
    models.save(tmp_path / "bad.pt", bad)
    with pytest.raises(train.ConfigError, match=r"term kd is no finite number at step 1, on patches of im\d"):
        train.train(config(place, tmp_path / "run", teacher=str(tmp_path / "bad.pt")))


# ------------------------------------------------------------------------------------------------ the same step, faster
@pytest.fixture
def drawn_run(place, tmp_path):
    """A Run that is ready to step, and its draws."""
    made = []

    def make(**changes):
        c = config(place, tmp_path / f"run{len(made)}", **changes)
        teacher = train.load_teacher(c)
        c = train.complete(dataclasses.replace(c, scale=4), teacher)
        torch.manual_seed(0)
        student, device = models.build(c.student, 4).train(), torch.device(c.device)
        store, _ = train.prepare_data(c)
        precision = "bfloat16" if c.precision == "bfloat16" else "float32"
        if c.label_once:
            train.label_images(teacher, store, train.autocast(device, precision), c)
        features = train.FeatureLoss(student, teacher, c) if c.method in train.FEATURE_LOSSES else None
        run = train.Run(c, student.train(), teacher, data.Patches(store, c.patch, 4), features, device, precision)
        made.append(run)
        return run
    return make


def steps(run, advance, n):
    rows = []
    for _ in range(n):
        run.set_rates()
        drawn = train.draw(run.patches, run.c, run.generator)
        rows.append(advance(run, drawn))
        run.add(rows[-1], drawn["images"])
    return torch.stack(rows)


@pytest.fixture
def graphs(monkeypatch):
    """A stand-in for torch.cuda's graph on a machine without a GPU: recording leaves the state as it was, and replaying
    runs the recorded function again, on its recorded inputs, and puts the result where it was recorded."""
    class Graph:
        replays, refuse = 0, False

        def replay(self):
            Graph.replays += 1
            recorder, run = Graph.recorded
            recorder.result.copy_(recorder.function(run, recorder.inputs))

    @contextlib.contextmanager
    def capture(graph, stream):
        if Graph.refuse:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        kept = Graph.recorded[1]
        before = [t.clone() for t in state_of(kept)]
        yield
        with torch.no_grad():  # recording computes nothing
            for t, b in zip(state_of(kept), before):
                t.copy_(b)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t)
    return Graph


def state_of(run):
    adam = [v for s in run.optimizer.state.values() for v in s.values()]
    return [*run.student.parameters(), *run.ema.parameters(), *adam]


def test_a_recorded_step_is_fed_with_each_draw_and_its_results_are_kept(drawn_run, graphs):
    plain, recorded = drawn_run(), drawn_run()
    advance = train.Recorded(train.step)
    graphs.recorded = (advance, recorded)
    a, b = steps(plain, train.step, 8), steps(recorded, advance, 8)
    assert graphs.replays == 5 and torch.equal(a, b) and len(b.unique()) > 30
    assert all(torch.equal(x, y) for x, y in zip(state_of(plain), state_of(recorded)))


def test_where_a_step_cannot_be_recorded_it_goes_on_unrecorded_and_says_so(drawn_run, graphs, capsys):
    plain, other = drawn_run(), drawn_run()
    graphs.recorded, graphs.refuse = (None, other), True
    a, b = steps(plain, train.step, 7), steps(other, train.Recorded(train.step), 7)
    assert torch.equal(a, b) and graphs.replays == 0
    assert capsys.readouterr().err.count("note: the step cannot be recorded as a CUDA graph (operation not permitted when") == 1


def test_where_the_networks_cannot_be_compiled_they_run_uncompiled(drawn_run, monkeypatch, capsys):
    def refusing(function, **settings):
        def call(*args):
            raise RuntimeError("no C++ compiler")
        return call
    monkeypatch.setattr(torch, "compile", refusing)
    plain, other = drawn_run(), drawn_run(compile=True)
    before = torch.get_rng_state()
    advance = train.accelerate(other)
    assert "note: torch.compile does not work here (no C++ compiler)" in capsys.readouterr().err and not other.compiled
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(steps(plain, train.step, 3), steps(other, advance, 3))


@pytest.mark.parametrize("family", ["edsr", "rcan", "swinir"])
def test_a_teacher_held_in_bfloat16_gives_the_labels_that_autocast_gives(place, drawn_run, family):
    """To the rounding of the last convolution, bit for bit where that stays in float32."""
    run = drawn_run(teacher=str(place / f"{family}_x4.pt"), student="edsr_c6b3", precision="bfloat16")
    x = train.upcycle(run.patches, train.draw(run.patches, run.c, run.generator), run.c)
    label = lambda: [t for t in train.labels(run.teacher, x, run.c, run.amp) if t is not None]
    before, last = label(), copy.deepcopy(run.teacher.conv_last)
    train.accelerate(run)
    held = label()
    assert run.teacher.conv_last.weight.dtype == torch.bfloat16 and {t.dtype for t in held} == {torch.float32}
    span = max(float(t.max() - t.min()) for t in before)
    assert all((a - b).abs().max() < 2 ** -7 * span for a, b in zip(before, held))
    run.teacher.conv_last = last
    assert all(torch.equal(a, b) for a, b in zip(before, label()))


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_blocks_give_the_same_steps(drawn_run, capsys):
    plain, compiled = drawn_run(), drawn_run(compile=True)
    advance = train.accelerate(compiled)
    assert compiled.compiled and "note:" not in capsys.readouterr().err
    assert torch.allclose(steps(plain, train.step, 3), steps(compiled, advance, 3), rtol=1e-4)


def test_labels_made_once_are_the_teachers_on_whole_images(drawn_run):
    """Beyond a patch's own border the whole image gives the teacher its surroundings; far from it both are the same."""
    run = drawn_run(label_once=True)
    store, (first, h, w), (to, H, W) = run.patches.store, *(t[0].tolist() for t in (run.patches.store.lr, run.patches.store.hr))
    lr = data.to_float(store.pixels[first:first + h * w].view(1, h, w, 3))
    with torch.no_grad():
        whole = run.teacher(lr)
    assert torch.allclose(data.to_float(store.labels[to:to + H * W].view(1, H, W, 3)), whole, atol=1e-3)
    found = run.patches.fetch(torch.tensor([[0, 1, 2]]))
    assert torch.allclose(data.to_float(found["label"]), whole[..., 4:4 + 48, 8:8 + 48], atol=1e-3)


def test_labels_made_once_replace_the_teachers_answer_to_the_patch(drawn_run):
    student, teacher, lr, hr, c = batch_and_config()
    with torch.no_grad():
        label = teacher(lr).permute(0, 2, 3, 1)
    asked = []
    teacher.register_forward_hook(lambda m, x, y: asked.append(len(x[0])))
    given = terms_of(student, teacher, lr, hr, c, label=label)
    assert asked == [2, 2]  # z_in and z_out alone
    for name, value in terms_of(student, teacher, lr, hr, c).items():
        assert given[name].item() == pytest.approx(value.item(), rel=1e-6), name
    shifted = terms_of(student, teacher, lr, hr, c, label=label + 1)
    assert shifted["kd"] > given["kd"] and shifted["zoom_in"] == given["zoom_in"]


def test_labels_larger_than_ram_lie_in_a_file_without_a_name(drawn_run, tmp_path):
    store = drawn_run().patches.store
    labels = data.room_for_labels(store, 10, tmp_path / "cache")
    assert labels.shape == store.pixels.shape and labels.dtype == torch.float16 and not any((tmp_path / "cache").iterdir())
    labels.fill_(0.5)
    assert (labels == 0.5).all()


def test_label_once_trains_and_resumes(place, tmp_path):
    for name, stop in (("whole", 0), ("parts", 2)):
        train.train(config(place, tmp_path / name, label_once=True, stop_at=stop))
    train.main(["--resume", "--out", str(tmp_path / "parts"), "--stop-at", "0"])
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    train.train(config(place, tmp_path / "each"))
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "each"))


def test_losses_looked_at_late_still_name_the_step(drawn_run):
    """On a GPU several steps pass before their losses are looked at."""
    run = drawn_run()
    steps(run, train.step, 2)
    with torch.no_grad():
        run.student.conv_last.bias.fill_(math.nan)
    steps(run, train.step, 2)
    with pytest.raises(train.ConfigError, match=r"term rec is no finite number at step 3, on patches of im\d"):
        run.collect()


def test_the_clock_counts_work_and_waiting_apart(monkeypatch):
    times = iter([0.0, 1, 3, 4, 8, 10, 10, 20, 25, 27, 30, 30])  # begin; two steps; look; skip; skip; one step; look; skip
    monkeypatch.setattr(train.time, "monotonic", lambda: next(times))
    clock = train.Clock(torch.device("cpu"))
    for _ in range(2):
        with clock:
            pass
    clock.look()
    assert (clock.busy, clock.wall, clock.steps) == (6, 10, 2)
    clock.skip()  # a validation until 20
    with clock:
        pass
    clock.look()
    assert (clock.busy, clock.wall, clock.steps) == (8, 20, 3)


def test_bench_prints_one_line_and_writes_nothing(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--teacher", place / "edsr_x4.pt", "--student", "edsr_c6b3", "--data", place / "train", "--val", place / "val",
             "--batch", "2", "--patch", "12", "--device", "cpu", "--cache", tmp_path / "cache", "--bench", "3"]
    train.main([str(w) for w in words])
    out = capsys.readouterr().out
    result = json.loads(out)
    assert out.count("\n") == 1 and not any(tmp_path.iterdir())
    assert result["ms_per_step"]["min"] <= result["ms_per_step"]["median"] and result["steps"] == 3 and not result["recorded"]
    assert result["images_per_s"] == pytest.approx(2000 / result["ms_per_step"]["median"], rel=1e-2)
    assert list(result["share"]) == ["data", "teacher", "student", "optimiser"] and sum(result["share"].values()) == pytest.approx(1, abs=0.01)
    assert result["versions"]["torch"] == torch.__version__ and result["peak_memory_gib"] > 0 and result["warm_up_s"] > 0


def test_operations_are_counted_as_by_hand(drawn_run):
    """Teacher: forwards of 2 + 2 patches of 12² and 2 of 3²; student: the same, and backwards of twice as much but for
    the input of the first convolution, which needs no gradient. Convolutions alone; resizing is a few thousand more."""
    run = drawn_run()
    forward = lambda net, n, size: 2 * n * size ** 2 * models.multiply_adds(net, 4, 4)
    first = 2 * 3 * 9 * 6 * (4 * 12 ** 2 + 2 * 3 ** 2)
    passes = lambda net: forward(net, 4, 12) + forward(net, 2, 3)
    counted = train.count_flops(run, train.draw(run.patches, run.c, run.generator))
    assert counted == pytest.approx(passes(run.teacher) + 3 * passes(run.student) - first, rel=0.01)


@pytest.mark.parametrize("family, changes", [
    ("edsr", dict(crops=2, consistency="both")), ("rcan", dict(student="rcan_c16b1g3")), ("swinir", dict(student="swinir_c12s6")),
    ("edsr", dict(method="at")), ("edsr", dict(label_once=True))])
def test_a_step_asks_the_device_for_no_value_and_brings_none_along(place, drawn_run, family, changes):
    """Else it could not be recorded as a CUDA graph: no reading of a number, no size that depends on data, and no tensor
    made out of Python's numbers, once the first step has filled what is kept."""
    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))
    run, called = drawn_run(teacher=str(place / f"{family}_x4.pt"), **changes), []
    run.patches.resident = True  # as on a GPU: the patches are cut inside the step
    steps(run, train.step, 1)
    drawn = train.draw(run.patches, run.c, run.generator)
    with Log():
        train.step(run, drawn)
    assert len(called) > 200 and "aten.index.Tensor" in called
    assert not [name for name in called if re.search(r"_local_scalar_dense|lift_fresh|nonzero|is_nonzero|unique|masked_select", name)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family, student", [("edsr", "edsr_c6b3"), ("rcan", "rcan_c16b1g3"), ("swinir", "swinir_c12s6")])
def test_on_a_gpu_recording_changes_nothing_and_resuming_goes_on(place, tmp_path, family, student):
    common = dict(device="cuda", teacher=str(place / f"{family}_x4.pt"), student=student, steps=12, compile=False)
    for name, changes in (("recorded", {}), ("plain", dict(record=False)), ("parts", dict(stop_at=6))):
        train.train(config(place, tmp_path / name, **{**common, **changes}))
    train.main(["--resume", "--out", str(tmp_path / "parts"), "--stop-at", "0"])
    totals = {n: torch.tensor([float(r["total"]) for r in rows(tmp_path / n)]) for n in ("recorded", "plain", "parts")}
    assert torch.allclose(totals["recorded"], totals["plain"], rtol=1e-3)
    assert torch.allclose(totals["recorded"], totals["parts"], rtol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_deterministic_run_resumes_to_the_same_weights(place, tmp_path, device="cuda"):
    words = ["--teacher", place / "edsr_x4.pt", "--student", "edsr_c6b3", "--data", place / "train", "--val", place / "val",
             "--batch", "2", "--patch", "12", "--steps", "12", "--device", device, "--cache", place / "cache", "--deterministic"]
    for command in ([*words, "--out", tmp_path / "whole"], [*words, "--out", tmp_path / "parts", "--stop-at", "6"],
                    ["--resume", "--out", tmp_path / "parts"]):
        done = run_command("train.py", *command)
        assert done.returncode == 0, done.stderr[-2000:]
    for key in ("params", "params_ema"):
        assert same(weights(tmp_path / "whole", key), weights(tmp_path / "parts", key))
