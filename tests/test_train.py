"""train.py: settings in layers, one update, whole runs, resuming, several processes, and the faster step."""
import contextlib
import csv
import datetime
import functools
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch

import data
import dukd
import models
import train
from samples import Watch, error_lines, noise, save

TESTS = Path(__file__).resolve().parent
STUDENTS = dict(edsr="edsr_c4b3", rcan="rcan_c8b1g1", swinir="swinir_c12s6")


@pytest.fixture(autouse=True)
def signals_as_before():
    """train.py's program does not put them back at its end."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


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


def words(place, out, family="edsr", **changes):
    """The command line of a short run."""
    given = dict(teacher=f"{place}/{family}_x4.pt", student=STUDENTS[family], data=f"{place}/train",
                 val=f"{place}/val", cache=f"{place}/cache", out=out, batch=2, patch=8, steps=4, device="cpu",
                 precision="float32")
    return [f"--{name.replace('_', '-')}={value}" for name, value in (given | changes).items()]


@pytest.fixture
def settings(place, tmp_path):
    """Makes the settings of a short run in a folder of that name."""
    return lambda out="run", *more, **changes: train.parse([*words(place, tmp_path / out, **changes), *more])


def rows(out):
    return [*csv.DictReader((Path(out) / "log.csv").read_text("utf-8").splitlines())]


def equal(xs, ys):
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def close(xs, ys):
    return all(torch.allclose(x, y, atol=1e-6) for x, y in zip(xs, ys, strict=True))


def refusal(capsys, *words):
    """The line that train.py ends with."""
    return error_lines(train.main, words, capsys)[-1]


def test_defaults_come_in_layers_and_what_is_typed_counts(capsys):
    """The help shows the defaults of the method."""
    weights = lambda args: {term: getattr(args, f"lambda_{term}") for term in dukd.TERMS
                            if getattr(args, f"lambda_{term}")}
    args = train.parse([])
    assert weights(args) == dukd.METHODS["dukd"]
    defaults = dict(steps=250_000, batch=16, patch=48, lr=1e-4, schedule="step", ema=0.999, crops=1, p=0.3,
                    ops=[*dukd.InvertibleAugmentation.OPERATIONS], augment_zoom_out=False)
    assert defaults.items() <= vars(args).items()
    for method, expected in dukd.METHODS.items():
        assert weights(train.parse(["--method", method])) == expected
        with pytest.raises(SystemExit):
            train.parse(["--method", method, "--help"])
        text = capsys.readouterr().out
        zoom_in = float(expected.get("zoom_in", 0))
        assert f"z is a crop of I_HR, as large as I_LR [{zoom_in}]" in " ".join(text.split())
        assert "  fakd     L = 1·rec + 1·kd + 10·fakd\n" in text
    args = train.parse("--method zoom_in --quick --lambda-kd 0 --lambda-fakd=2 --batch 5".split())
    assert weights(args) == dict(rec=1, zoom_in=1, fakd=2)
    assert (args.steps, args.batch, args.patch, args.lr, args.schedule) == (1300, 5, 24, 1.4e-3, "cosine")


def test_learning_rate_milestones_scale_with_the_steps():
    at = lambda words, *steps: [train.learning_rate(step, train.parse(words.split())) for step in steps]
    assert at("", 0, 99_999, 100_000, 199_999, 200_000) == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6])
    assert at("--steps 10 --schedule cosine", 0, 5, 10) == pytest.approx([1e-4, 5e-5, 0], abs=1e-12)


def test_the_loop_is_adam_on_each_gradient_and_keeps_the_best_average(place, settings):
    """Ten steps with torch's Adam. The decay of the average is (1 + step) / (10 + step) until it is 0.4.
    The log has each term of dukd.losses times its weight. What it draws depends on seed and step.
    The run is validated after each step: that changes nothing. The teacher stays as it was.
    At this rate the best step is not the last."""
    given = dict(steps=10, lr=0.05, ema=0.4)
    run, out = train.train(settings(**given, lambda_fitnet=0.5, lambda_rec=3))
    other = train.Run(settings("other", **given))
    adam = torch.optim.Adam(other.parameters, betas=(0.9, 0.99))
    average = [w.detach().clone() for w in other.parameters]
    taps = [*zip(other.student.taps, other.teacher.taps)]
    weights = dukd.METHODS["dukd"] | dict(rec=3, fitnet=0.5)
    log = rows(out)
    assert list(log[0]) == ["step", "lr", *weights, "total", "val_psnr", "ms"]
    for step, rate in enumerate([0.05] * 4 + [0.005] * 4 + [0.0005] * 2):
        lr, hr = other.patches[step]
        torch.manual_seed(data.seed_of(0, step, 1))
        terms = dukd.losses(other.student, other.teacher, lr, hr, weights, taps=taps)
        weighted = {name: weights[name] * term for name, term in terms.items()}
        weighted["total"] = sum(weighted.values())
        adam.param_groups[0]["lr"] = rate
        adam.zero_grad()
        weighted["total"].backward()
        adam.step()
        decay = min(0.4, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * w.detach() for a, w in zip(average, other.parameters)]
        for name, value in weighted.items():
            assert float(log[step][name]) == pytest.approx(value.item(), rel=1e-5)
        assert float(log[step]["lr"]) == rate and 0 < float(log[step]["ms"])
    assert close(run.parameters, other.parameters) and close(run.averaged, average)
    assert equal(run.teacher.parameters(), models.load(place / "edsr_x4.pt").parameters())
    assert not any(module.training for module in run.teacher.modules())
    frozen = [*run.averaged, *run.teacher.parameters()]  # the average keeps no graph of the steps
    assert not any(p.requires_grad for p in frozen)
    scores = [float(row["val_psnr"]) for row in log]
    assert scores[-1] < max(scores) == pytest.approx(run.best, abs=1e-4)
    for name, score in (("best", max(scores)), ("student", scores[-1])):
        network = models.load(out / f"{name}.pt")
        run.upscalers[name] = train.evaluate.network_upscaler(network)
        assert run.score(name) == pytest.approx(score, abs=1e-4)
    assert equal(network.parameters(), run.averaged)


def test_a_run_learns_and_keeps_what_it_was(settings):
    """It is validated first after 100 steps, unless it is sooner by --val-every."""
    args = settings(student="edsr_c8b3", steps=101, lr=1e-2, val_every=60, lambda_rec=5)
    run, out = train.train(args, "python train.py …")
    scores = {int(row["step"]): float(row["val_psnr"]) for row in rows(out) if row["val_psnr"]}
    assert list(scores) == [60, 100, 101] and scores[101] > scores[60] + 1
    about = json.loads((out / "config.json").read_text())
    assert about["identity"]["held_out"] == ["im0.png"]
    assert about["identity"]["pictures"] == [f"im{i}.png" for i in range(4)]
    assert about["settings"] == json.loads(json.dumps(vars(args) | dict(scale=4)))
    assert about["command"] == "python train.py …"
    assert iio.imread(out / "compare.png").shape[2] == 3
    assert models.load(out / "last.ckpt").config == run.student.config


def assert_same_outcome(whole, out):
    """The same files, bit for bit, but for the times in the log."""
    for name in ("student.pt", "best.pt", "compare.png"):
        assert (whole / name).read_bytes() == (out / name).read_bytes(), name
    assert [row | dict(ms="") for row in rows(whole)] == [row | dict(ms="") for row in rows(out)]


def signals_at(step, patch, *numbers):
    """Has the process send itself signals when it draws the patches of a step."""
    def drawing(patches, number, draw=data.Patches.__getitem__):
        if number == step:
            for signal_number in numbers:
                signal.raise_signal(signal_number)
        return draw(patches, number)
    patch.setattr(data.Patches, "__getitem__", drawing)


@pytest.mark.parametrize("family, name", [("edsr", "SIGHUP"), ("rcan", "SIGTERM"), ("swinir", "SIGUSR1")])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, settings, monkeypatch, family, name):
    """By a closed terminal, by kill, and by a cluster's warning. One run ignores the signal, as under nohup.
    SwinIR has a random drop-path. In a thread, Python cannot catch signals: main alone does not try to."""
    number = getattr(signal, name, signal.SIGTERM)  # Windows lacks the others
    given = dict(family=family, steps=7, val_every=3, lr=0.1, ema=0)
    with monkeypatch.context() as patch:
        signals_at(3, patch, number)
        signal.signal(number, signal.SIG_IGN)
        train.train(settings("whole", **given), listen=train.catch_signals)
        signal.signal(number, signal.SIG_DFL)
        with pytest.raises(SystemExit) as end:
            train.train(settings("parts", **given), listen=train.catch_signals)
    assert end.value.code == 128 + number
    with ThreadPoolExecutor() as pool:
        pool.submit(train.main, ["--resume", str(tmp_path / "parts")]).result()
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")


def test_a_denied_write_is_made_up_for(settings, monkeypatch, capsys):
    """As where a virus scanner has a file. At the end it is an error."""
    def deny(name):
        if name == denied and next(writes) in when:
            raise PermissionError(13, "Permission denied", name if name != "log.csv" else None)

    class Log(io.FileIO):
        def write(self, content):
            deny("log.csv")
            return super().write(content)
    monkeypatch.setattr(train.Run, "score", lambda run, label: float(run.step))
    monkeypatch.setattr(os, "replace", lambda a, b, replace=os.replace: (deny(Path(b).name), replace(a, b)))
    monkeypatch.setattr(train, "open", lambda path, mode, buffering, newline: io.TextIOWrapper(
        io.BufferedWriter(Log(path, mode), buffering), newline=newline), raising=False)
    denied = None
    whole = train.train(settings("whole", val_every=1))[1]
    for denied, number in [("log.csv", 3), ("best.pt", 2), ("last.ckpt", 2), ("student.pt", 2)]:
        writes, when = itertools.count(1), [number]
        assert_same_outcome(whole, train.train(settings(f"once_{denied}", val_every=1))[1])
        note = f"{denied} cannot be written now (Permission denied). It is tried again"
        assert note in capsys.readouterr().err
        for when in (range(1, 99), range(number, 99)):  # from the first write on, and later
            writes = itertools.count(1)
            with pytest.raises(PermissionError):
                train.train(settings(f"always_{denied}_{when.start}", val_every=1))
        if denied != "last.ckpt":
            assert models.read_file(whole.parent / f"always_{denied}_{number}" / "last.ckpt")["step"] == 4


@pytest.fixture
def stopped(place, tmp_path, monkeypatch):
    """The folder of a run that was stopped after 3 of 7 steps; its pictures are copies."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signals_at(2, patch, signal.SIGINT)
        train.main(words(".", "run", steps=7, val_every=3), train.catch_signals)
    return tmp_path / "run"


def test_paths_and_pace_may_be_given_anew_and_a_finished_run_stays_as_it_is(stopped, capsys):
    """A file in a run's folder means the folder. The log has the rows that the checkpoint knows, also where
    it is longer or shorter, was cut off or edited, or is gone."""
    for name in ("train", "val", "edsr_x4.pt", "run"):
        Path(name).rename(f"moved_{name}")
    train.main("--resume moved_run/config.json --data moved_train --val moved_val --teacher moved_edsr_x4.pt "
               "--cache other --val-every 1 --device cpu --compile no".split())
    run, log = Path("moved_run"), Path("moved_run/log.csv")
    text, steps = log.read_text(), rows(run)
    assert [row["step"] for row in steps] == [*"1234567"] and all(row["val_psnr"] for row in steps[3:])
    before = {path: path.read_bytes() for path in run.iterdir()}
    for found in (text, text + "8,1\n9", text[:-9], "step;lr\n", "", None):
        log.unlink() if found is None else log.write_text(found)
        train.main(["--resume", "moved_run"])
        assert "resumed after step 7 of 7" in capsys.readouterr().out
        assert before == {path: path.read_bytes() for path in run.iterdir()}
    os.chdir(run)
    assert train.parse(["--resume", "last.ckpt"]).resume == "."


def test_what_shapes_a_run_may_not_change_and_other_files_are_refused(stopped, capsys):
    before = {path: path.read_bytes() for path in stopped.iterdir()}
    for typed in ("--batch 4", "--batch=2", "--seed 1", "--student edsr_c4b2", "--steps 9", "--lambda-kd 2",
                  "--method kd", "--ops hflip", "--out new", "--precision bfloat16", "--augment-zoom-out",
                  "--quick"):
        flag = typed.partition("=")[0].split()[0]
        line = refusal(capsys, "--resume", stopped, *typed.split())
        assert f"{flag} is not for --resume" in line and f"--init {stopped}/student.pt" in line
    save(noise(64, 72, 3), "train/im9.png")
    assert "another run: pictures differs in im9.png" in refusal(capsys, "--resume", stopped)
    Path("train/im9.png").rename("val/im1.png")
    assert "another run: held_out differs in im1.png" in refusal(capsys, "--resume", stopped)
    Path("val/im1.png").unlink()
    state = torch.load("edsr_x4.pt")
    state["params_ema"]["conv_first.bias"] += 1e-6
    torch.save(state, "edsr_x4.pt")
    assert "teacher_sha256 differs" in refusal(capsys, "--resume", stopped)
    assert before == {path: path.read_bytes() for path in stopped.iterdir()}
    state = models.read_file(stopped / "last.ckpt")
    del state["settings"]["lambda_rec"]
    torch.save(state, "older.pt")
    torch.save(torch.ones(2), "tensor.pt")
    for file in ("edsr_x4.pt", "tensor.pt", "older.pt"):
        shutil.copy(file, stopped / "last.ckpt")
        assert "of another version of train.py: start a new run" in refusal(capsys, "--resume", stopped)


def test_init_takes_what_fits_and_starts_with_the_function_of_the_file(place, tmp_path, settings, capsys):
    """All of a ×2 network but the upsampler's second stage; of three blocks the first. Weights mean another
    function under another residual scale, mean or range."""
    run = train.Run(settings(student="edsr_c8b3", init=place / "edsr_x2.pt"))
    own, source = run.student.state_dict(), models.load(place / "edsr_x2.pt").state_dict()
    assert [k for k in own if k not in source] == ["upsample.2.weight", "upsample.2.bias"]
    assert all(torch.equal(own[k], value) for k, value in source.items())
    given = models.EDSR(4, channels=8, blocks=3, res_scale=0.2, mean=(0.1, 0.2, 0.3), img_range=1.0).eval()
    models.save(tmp_path / "given.pt", given)
    train.Run(settings(student="edsr_c8b1", init=tmp_path / "given.pt"))
    text = f"init    14 of 14 tensors come from {tmp_path / 'given.pt'}, which has 22"
    assert text in capsys.readouterr().out
    args = settings(student="edsr_c8b3", init=tmp_path / "given.pt")
    x = torch.rand(1, 3, 8, 8)
    assert torch.allclose(train.Run(args).student(x), given(x), atol=1e-6)
    run, out = train.train(args)
    again = train.Run(train.parse(["--resume", str(out)]))
    assert torch.equal(again.student(x), run.student(x)) and torch.equal(again.ema(x), run.ema(x))


def test_a_run_takes_a_free_name_or_an_empty_folder(place, tmp_path, monkeypatch, capsys):
    """It says what it is, and that its teacher is worse than bicubic. A second run leaves a folder alone that
    was empty when it began."""
    monkeypatch.chdir(tmp_path)
    data.NOTES.clear()
    args = train.parse(words(place, "", steps=1, method="kd"))
    folders = [train.train(args)[1] for _ in range(3)]
    assert folders == [Path(f"runs/kd_edsr_c4b3_x4{ending}") for ending in ("", "_2", "_3")]
    printed = capsys.readouterr()
    assert "loss    L = 1·rec + 1·kd\n" in printed.out and "mean=[0.4488, 0.4371, 0.404]" in printed.out
    assert "note: the teacher is below bicubic" in printed.err
    args.out = "new"
    Path("new").mkdir()
    train.train(args)
    before = {path: path.read_bytes() for path in Path("new").iterdir()}
    monkeypatch.setattr(train, "check_settings", lambda *settings: None)
    with pytest.raises(models.InputError, match="taken by another run meanwhile"):
        train.train(args)
    assert before == {path: path.read_bytes() for path in Path("new").iterdir()}


def test_a_tenth_is_held_out_or_the_given_pictures_however_they_are_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = {2: 1, 19: 1, 20: 2, 120: 10}
    for count in range(1, 121):
        save(noise(2, 2, 3), f"{count:03}.png")
        if count in expected:
            images, held = train.choose_pictures(train.parse(["--data", "."]))
            assert len(held) == expected[count] and len(images) == count - len(held)
            assert not {*held} & {*images}
    for val in ("001.png", tmp_path / "001.png", f"../{tmp_path.name}/001.png"):
        images, held = train.choose_pictures(train.parse(["--data", ".", "--val", str(val)]))
        assert [path.name for path in images] == [f"{i:03}.png" for i in range(2, 121)] and len(held) == 1


def test_a_loss_that_is_not_finite_ends_the_run(settings, monkeypatch):
    """A teacher of NaN: the gradient of L1 takes a NaN for 0, so the weights stay finite."""
    monkeypatch.setattr(models.EDSR, "picture", lambda net, y: y * float("nan" if not net.training else 1))
    with pytest.raises(models.InputError, match="the loss or the weights are not finite after step 1"):
        train.train(settings())


@pytest.mark.parametrize("given, named", [
    (dict(WORLD_SIZE="2"), "start with torchrun, or unset it for one process (Error initializing"),
    (dict(WORLD_SIZE="2", RANK=""), "RANK expected"),
    (dict(WORLD_SIZE="2", RANK="0"), "MASTER_ADDR expected"),
    (dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0"), "clients")])
def test_a_cluster_without_torchrun_is_one_line(place, tmp_path, monkeypatch, capsys, given, named):
    """A process whose peer is missing gives up."""
    monkeypatch.setattr(train, "RENDEZVOUS", datetime.timedelta(seconds=1))
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert named in refusal(capsys, *words(place, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def child(argv, log, before, environment):
    """What a process of `launch` does. Its output goes to the files log1 and log2."""
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(f"{log}{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    before()
    train.main(argv, train.catch_signals)


def launch(argv, log, before=bool, **environment):
    """Calls before() and runs the program in a new process, forked from one that has imported train.py."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_train", "torch._dynamo"])  # the optimiser imports it
    process = context.Process(target=child, args=(argv, log, before, environment))
    process.start()
    return process


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot fork")
def test_two_processes_equal_one(place, tmp_path, settings):
    """Without zoom-in, for which each process draws crops and F of its own."""
    given = dict(batch=4, lambda_zoom_in=0)
    one, _ = train.train(settings("one", **given))
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    group = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    argv = words(place, tmp_path / "two", **given)
    for process in [launch(argv, tmp_path / f"log{rank}_", RANK=rank, **group) for rank in "01"]:
        process.join(120)
        assert process.exitcode == 0
    assert close(one.averaged, models.load(tmp_path / "two" / "student.pt").parameters())
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert float(a["total"]) == pytest.approx(float(b["total"]), rel=1e-5)


def results(run, count, optimise=False, step=None):
    """What a step returns for the patches of the first steps, and the gradients that it leaves."""
    step, found = step or functools.partial(train.forward_backward, run), []
    for number in range(count):
        torch.manual_seed(number)
        terms = step(*run.patches[number])
        found.append(torch.cat([terms, *(w.grad.flatten() for w in run.parameters)]))
        if optimise:
            run.optimizer.step()
    return torch.stack(found)


def test_auto_is_bfloat16_where_the_processor_has_it_and_the_run_keeps_it(settings, monkeypatch):
    """Also where the run is resumed on another machine. Weights and losses are float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True}, raising=False)
    choose = lambda *names: [train.choose_precision(name, torch.device("cpu")) for name in names]
    for capability in ("avx512_bf16", "amx_bf16"):
        assert choose("auto", "float32") == ["bfloat16", "float32"]
    out = train.train(settings("kept", precision="auto", steps=1))[1]
    capability = "avx2"
    assert choose("auto", "bfloat16") == ["float32", "bfloat16"]
    assert train.Run(train.parse(["--resume", str(out)])).precision == "bfloat16"
    exact, rounded = (results(train.Run(settings(precision=name, lambda_at=1)), 1)
                      for name in ("float32", "bfloat16"))
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).norm() < 0.05 * exact.norm()


def test_a_recorded_step_is_fed_with_each_batch_and_a_failed_recording_shows_its_cause(monkeypatch, capsys):
    """Without CUDA: here a replay multiplies the recorded tensors, as the recorded function did."""
    lr, hr, product = torch.zeros(3, 2)
    multiply = functools.partial(torch.mul, out=product)
    graph = types.SimpleNamespace(replay=lambda: multiply(lr, hr))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())
    step = train.recorded(multiply, (lr, hr))
    results = [step(torch.tensor([1.0, n]), torch.tensor([2.0, 3.0])) for n in (4, 5)]
    assert [result.tolist() for result in results] == [[2, 12], [2, 15]]
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: torch.ones(2) + torch.ones(3))  # an error
    with pytest.raises(models.InputError, match="give --compile blocks"):
        train.recorded(multiply, (lr, hr))
    assert "The size of tensor a" in capsys.readouterr().err and train.gc.isenabled()


@pytest.mark.parametrize("family", STUDENTS)
def test_a_step_reads_no_value_from_the_device(settings, family):
    """A CUDA graph records no number that is read, no size that depends on data, and no copied constant."""
    weights = {f"lambda_{term}": 1 for term in dukd.TERMS}
    run = train.Run(settings("run", "--augment-zoom-out", family=family, crops=2, **weights))
    pair = run.patches[0]
    train.forward_backward(run, *pair)  # bicubic's weights are made once
    with Watch() as watch:
        train.forward_backward(run, *pair)
    forbidden = "_local_scalar|lift_fresh|nonzero|unique|masked_select|float64"
    called = [name for name, _ in watch.seen]
    assert len(called) > 100 and not [name for name in called if re.search(forbidden, name)]


def test_cuda_is_the_gpu_of_the_process_under_torchrun(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda n, device: torch.ones(n))
    for given, name in {"": "cuda:1", "cuda": "cuda:1", "cuda:0": "cuda:0", "cpu": "cpu"}.items():
        assert str(train.evaluate.pick_device(given)) == name


@pytest.mark.parametrize("works", [True, False])
def test_compiled_blocks_change_no_step_and_no_picture(settings, tmp_path, monkeypatch, capsys, works):
    """Also where the compiler fails. Pictures are those of validation and compare.png, of other sizes."""
    compiled, original = [], torch.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward if works else 1 / 0
    monkeypatch.setattr(torch, "compile", lambda block, **given: original(block, backend=backend, **given))
    plain, other = train.Run(settings()), train.Run(settings())
    data.NOTES.clear()
    train.compile_blocks(other, other.patches[0])
    printed = capsys.readouterr().err
    assert ("ZeroDivisionError" in printed and "torch.compile fails" in printed) != works
    assert torch.equal(results(plain, 3), results(other, 3))
    count = len(compiled)
    train.introduce(other, tmp_path)
    other.step = 4
    train.finish(other, tmp_path, 0)
    assert len(compiled) == count > 0 and (tmp_path / "compare.png").exists()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", STUDENTS)
def test_on_a_gpu_the_recorded_step_gives_the_plain_one(settings, monkeypatch, family, precision):
    """Terms and gradients, also after a validation, which computes other sizes. In float32 the weights
    change. In bfloat16 Adam would enlarge what the compiler rounds otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    args = settings(family=family, device="cuda", precision=precision, crops=2, lr=1e-3)
    plain, recorded = train.Run(args), train.Run(args)
    step = train.fast_step(recorded, recorded.patches[0])
    assert step.__name__ == "replay" and not torch.backends.cudnn.benchmark
    for _ in range(2):
        optimise = precision == "float32"
        expected, found = results(plain, 8, optimise), results(recorded, 8, optimise, step)
        tolerance = 1e-3 if precision == "float32" else 2e-2
        assert (found - expected).norm() < tolerance * expected.norm()
        recorded.score("student")


@needs_gpu
@pytest.mark.parametrize("family", STUDENTS)
def test_on_a_gpu_a_replay_draws_what_its_seed_says(settings, family):
    """The crops, F, and SwinIR's drop-path are drawn inside the graph."""
    run = train.Run(settings(family=family, device="cuda"))
    patches = [x.clone() for x in run.patches[0]]
    step = train.fast_step(run, run.patches[0])

    def loss(seed):
        torch.manual_seed(seed)
        return step(*patches)[-1].item()
    first, other, again = loss(1), loss(2), loss(1)
    assert first == pytest.approx(again, rel=1e-5) and abs(first - other) > 1e-4 * first


@needs_gpu
def test_on_a_gpu_a_run_is_resumed(settings):
    run, out = train.train(settings(device="cuda", steps=20, val_every=10))
    again = train.Run(train.parse(["--resume", str(out)]))
    assert again.step == 20
    assert equal(run.parameters, again.parameters) and equal(run.averaged, again.averaged)
    state = next(iter(again.optimizer.state.values()))
    assert state["step"].device == again.device and again.optimizer.param_groups[0]["fused"]


@needs_gpu
def test_on_a_gpu_a_picture_is_the_cpus(place):
    network, lr = models.load(place / "edsr_x4.pt"), noise(40, 50, 3).repeat(2, 0)
    on_cpu = train.evaluate.network_upscaler(network, tile=32)(lr)
    on_gpu = train.evaluate.network_upscaler(network.cuda(), tile=32)(lr)
    assert abs(on_cpu.astype(int) - on_gpu).max() <= 1
