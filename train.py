"""Distil a small super-resolution network from a large frozen one (DUKD, arXiv 2309.14162).

    python train.py --teacher edsr_baseline.pt --student small                         DUKD on scikit-image's pictures
    python train.py --teacher edsr_baseline.pt --student small --data DIV2K_train_HR   … on your own
    python train.py --student edsr_baseline --method scratch --data DIV2K_train_HR     train a teacher
    torchrun --nproc_per_node=2 train.py …                                             the same batch on two GPUs
    python train.py --resume --out runs/NAME                                           go on where a run stopped

Read downward: Config, the losses of one batch, the networks and data they need, the loop, the command line.
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import datetime
import hashlib
import io
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import evaluate
import models
from dukd import (OPERATIONS, InvertibleAugmentation, Taps, adapters, at_loss, dukd_loss, fakd_loss, fitnet_loss,
                  reconstruction_loss, response_kd_loss, zoom_in, zoom_out)

METHODS = ("dukd", "kd", "scratch", "fitnet", "at", "fakd")
CHECKPOINTS = ("last.ckpt", "previous.ckpt")  # all that --resume needs, and the one before
FEATURE_LOSSES = {"fitnet": fitnet_loss, "at": at_loss, "fakd": fakd_loss}


class ConfigError(ValueError):
    """A setting that cannot be used; the message says which, why, and what to do."""


def option(default, text, **extra):
    """A Config field; `text` becomes its line of --help."""
    kind = dict(default_factory=lambda: default) if isinstance(default, list) else dict(default=default)
    return field(**kind, metadata=dict(help=text, **extra))


@dataclass
class Config:
    """Everything a run depends on. The defaults are the paper's recipe; None means "the paper's value for this
    pair of networks" and is filled in by `complete`."""
    teacher: str = option("", "checkpoint of the frozen teacher f_T, any known format", metavar="FILE")
    student: str = option("small", f"the student f_S: small (the paper's for this teacher), {models.NAMES_HELP}", metavar="NAME")
    method: str = option("dukd", "which losses the student learns from", choices=METHODS)
    scale: int = option(None, "s (default: the teacher's, else 4)", choices=models.SCALES)
    data: list = option([], "folders of HR training images (default: scikit-image's photographs)", metavar="DIR")
    lr_data: list = option([], "folders of their LR images, if not to be made (0001x4.png pairs with 0001.png)", metavar="DIR")
    val: list = option([], "folders of held-out HR images (default: --holdout images of the data)", metavar="DIR")
    holdout: int = option(10, "without --val: how many of the --data images are held out, evenly spaced")
    out: str = option("", "run folder (default: runs/METHOD_STUDENT_xSCALE)", metavar="DIR")
    resume: bool = option(False, "go on with the run in --out", action="store_true")
    init: str = option("", "checkpoint to start the student from: same shape, or another scale (all but the upsampler)", metavar="FILE")
    # Section 4.1, training details
    steps: int = option(250_000, "updates; the schedule's milestones scale with it")
    batch: int = option(16, "training pairs in an update, over all processes")
    patch: int = option(48, "LR patch, pixels a side (the HR patch is s times that)")
    lr: float = option(1e-4, "Adam's learning rate at the start")
    schedule: str = option("step", "step: x0.1 at 40%% and 80%% of the steps; cosine: to zero", choices=("step", "cosine"))
    ema: float = option(0.999, "decay of the averaged weights that are validated and saved; ramps up over the first steps")
    seed: int = option(0, "of the weights, the patches and the augmentations")
    # Section 3, the losses; the paper's values differ by pair
    lambda_rec: float = option(None, "λ_rec, weight of |f_S(I_LR) − I_HR| (EDSR, SwinIR 5; RCAN 1, x3 2); 0: off")
    lambda_kd: float = option(None, "λ_kd, weight of |f_S(I_LR) − f_T(I_LR)| (1); 0: off")
    lambda_dukd: float = option(None, "λ_dukd, weight of the zoom-in and zoom-out terms (1); 0: off")
    lambda_feature: float = option(1.0, "weight of the feature loss of fitnet, at and fakd")
    zoom_in: bool = option(None, "label HR crops (always, unless --no-zoom-in)", action=argparse.BooleanOptionalAction)
    zoom_out: bool = option(None, "label reduced LR patches (EDSR and RCAN x3: yes)", action=argparse.BooleanOptionalAction)
    crops: int = option(1, "zoom-in crops of each HR patch")
    p: float = option(None, "probability of each operation of F (0.3; RCAN x2, x4: 0)")
    ops: list = option(list(OPERATIONS), "the operations of F", choices=OPERATIONS)
    consistency: str = option("zoom_in", "which upcycled inputs go through F", choices=("zoom_in", "zoom_out", "both", "none"))
    # The feature baselines
    taps: list = option([], "feature taps STUDENT:TEACHER, e.g. body.5:body.10 (default: at thirds of the depth)", metavar="S:T")
    full_maps: bool = option(False, "fitnet on whole feature maps, through 1x1 adapters, instead of channel means", action="store_true")
    # How it runs
    device: str = option("", "cpu, cuda, cuda:1, … (default: cuda where there is one)", metavar="NAME")
    precision: str = option("auto", "of the networks' forward and backward (auto: bfloat16 where the device computes in "
                                    "it, else float32); weights and losses are float32", choices=("auto", "float32", "bfloat16"))
    deterministic: bool = option(False, "bit-identical results on CUDA too, at some cost in speed", action="store_true")
    ram: float = option(1.0, "GiB of decoded images kept in memory; more go to a mapped file in --cache")
    cache: str = option("", "folder of decoded images (default: ~/.cache/dukd)", metavar="DIR")
    skip_bad: bool = option(False, "leave unusable training images out, with a line each", action="store_true")
    val_every: int = option(0, "steps between validations (default: a tenth of the run, at most 5000)")
    log_every: int = option(10, "steps between rows of log.csv, each the mean since the last")
    save_minutes: float = option(5.0, "minutes between resumable checkpoints (also at each validation and at the end)")
    stop_at: int = option(0, "stop, resumably, after this step")


MAY_CHANGE = {"out", "resume", "device", "ram", "cache", "val_every", "save_minutes", "stop_at"}  # on --resume


def complete(c, teacher):
    """Fills the None fields with the paper's values for the pair [released code's option files]; what the method does
    not use becomes 0 or False, so that config.json tells what the run did."""
    arch = teacher.config["arch"] if teacher else "edsr"
    rcan, x3 = arch == "rcan", c.scale == 3
    paper = dict(lambda_rec=(2.0 if x3 else 1.0) if rcan else 5.0, lambda_kd=1.0, lambda_dukd=1.0, zoom_in=True,
                 zoom_out=arch == "edsr" or (rcan and x3), p=0.3 if x3 or not rcan else 0.0)
    unused = {} if c.method == "dukd" else dict(lambda_dukd=0.0, zoom_in=False, zoom_out=False, p=0.0)
    if c.method in ("scratch", "fitnet", "at"):
        unused["lambda_kd"] = 0.0 if c.method == "scratch" or c.lambda_kd is None else c.lambda_kd
    if c.method not in FEATURE_LOSSES:
        unused["lambda_feature"] = 0.0
    given = {k: v for k in paper if (v := getattr(c, k)) is not None}
    return dataclasses.replace(c, **(paper | given | unused))


# ------------------------------------------------------------------------------------------------ one batch
def loss_terms(student, teacher, lr, hr, c, generator, amp, part=slice(None), features=None):
    """Every term of L for one batch, times its λ: {name: scalar}. Their sum is what is minimised.

    student, teacher: f_S, f_T; lr (N,3,h,h), hr (N,3,s·h,s·h) in [0,1]; amp: autocast context of the forwards;
    part: this process's share of the N samples (all draws are made for all N, the same in every process);
    features: the baseline's FeatureLoss. The student gets gradient from each term, the teacher from none."""
    # Upcycling: new inputs out of the training pair, and an F for each sample of them
    z_in = zoom_in(hr.repeat_interleave(c.crops, 0), lr.shape[-1], generator) if c.zoom_in else lr[:0]
    z_out = zoom_out(lr, c.scale) if c.zoom_out else lr[:0]
    draw = lambda z, on: InvertibleAugmentation.sample(len(z), c.ops if on else (), c.p, generator, z.device)
    F_in, F_out = draw(z_in, c.consistency in ("zoom_in", "both")), draw(z_out, c.consistency in ("zoom_out", "both"))
    crops = slice(part.start and part.start * c.crops, part.stop and part.stop * c.crops)
    lr, hr, z_in, F_in, z_out, F_out = lr[part], hr[part], z_in[crops], F_in[crops], z_out[part], F_out[part]

    # The teacher labels, the student answers; inputs of one size share a forward
    n, t_lr, t_in, t_out = len(lr), None, None, None
    watch = features.watch() if features else contextlib.nullcontext()
    with amp, watch:
        if teacher is not None:
            with torch.no_grad():
                t_lr, t_in = split(teacher(torch.cat([lr, z_in])), n)
                t_out = teacher(z_out) if len(z_out) else None
        sr, s_in = split(student(torch.cat([lr, F_in.apply(z_in)])), n)
        s_out = student(F_out.apply(z_out)) if len(z_out) else None

    terms = {}
    if c.lambda_rec:
        terms["rec"] = c.lambda_rec * reconstruction_loss(sr, hr)
    if c.lambda_kd:
        terms["kd"] = c.lambda_kd * response_kd_loss(sr, t_lr)
    if len(z_in) and c.lambda_dukd:
        terms["zoom_in"] = c.lambda_dukd * dukd_loss(s_in, t_in, F_in)
    if len(z_out) and c.lambda_dukd:
        terms["zoom_out"] = c.lambda_dukd * dukd_loss(s_out, t_out, F_out)
    if len(z_out) and c.lambda_rec:  # I_LR is the ground truth of z_out
        terms["zoom_out_rec"] = c.lambda_rec * reconstruction_loss(F_out.invert(s_out), lr)
    if features:
        terms["feature"] = c.lambda_feature * features.loss()
    return terms


def split(x, n):
    return x[:n], x[n:]


def update(student, optimizer, ema, total, c, step):
    """One Adam step on L, the sum of the terms, and the averaged weights after it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, c)
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    optimizer.step()
    decay = min(c.ema, (1 + step) / (10 + step))  # a short run is not averaged with its random start
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(student.parameters()), 1 - decay)


def learning_rate(step, c):
    """Of update `step` (from 0): ×0.1 at 40 % and at 80 % of the run, or half a cosine to zero."""
    if c.schedule == "cosine":
        return c.lr * 0.5 * (1 + math.cos(math.pi * step / c.steps))
    return c.lr * 0.1 ** sum(step >= milestone * c.steps for milestone in (0.4, 0.8))


class FeatureLoss:
    """FitNet, AT or FAKD between paired taps of student and teacher: the mean of the taps' losses."""

    def __init__(self, student, teacher, c):
        if not (student.taps and teacher.taps):
            raise ConfigError(f"--method {c.method}: no feature taps are known for a {teacher.config['arch']} teacher")
        pairs = c.taps or [f"{s}:{t}" for s, t in zip(thirds(student.taps), thirds(teacher.taps))]
        if bad := [p for p in pairs if p.count(":") != 1]:
            raise ConfigError(f"--taps takes STUDENT:TEACHER, e.g. {student.taps[-1]}:{teacher.taps[-1]}, not '{bad[0]}'")
        names = list(zip(*(p.split(":") for p in pairs)))
        try:
            self.taps = [Taps(net, n) for net, n in zip((student, teacher), names)]
        except ValueError as e:
            raise ConfigError(f"--taps: {e}; e.g. {student.taps[-1]}:{teacher.taps[-1]}") from None
        device = next(student.parameters()).device
        with torch.no_grad(), self.watch():
            for net in (student, teacher):
                net.eval()(torch.zeros(1, 3, 16, 16, device=device))  # eval: draws nothing from the random stream
        shapes = [[tuple(f.shape[1:]) for f in tap.features] for tap in self.taps]
        self.lines = [f"{s} {a} ~ {t} {b}" for (s, t), a, b in zip(zip(*names), *shapes)]
        for s, t, line in zip(*shapes, self.lines):
            if len(s) != 3 or s[1:] != t[1:]:
                raise ConfigError(f"--taps: the features do not pair up: {line}")
        full = c.method == "fitnet" and c.full_maps
        self.adapters = adapters(*([f[0] for f in s] for s in shapes)) if full else torch.nn.ModuleList()
        self.adapters.to(device)
        self.measure = (lambda s, t: fitnet_loss(s, t, full=True)) if full else FEATURE_LOSSES[c.method]

    def watch(self):
        stack = contextlib.ExitStack()
        for tap in self.taps:
            stack.enter_context(tap)
        return stack

    def loss(self):
        student, teacher = (tap.features for tap in self.taps)
        if self.adapters:
            student = [adapt(f.float()) for adapt, f in zip(self.adapters, student)]
        return sum(self.measure(s, t) for s, t in zip(student, teacher)) / len(student)


def thirds(names):
    """The entries at one third, two thirds and the end."""
    return [names[max(round(len(names) * k / 3), 1) - 1] for k in (1, 2, 3)]


# ------------------------------------------------------------------------------------------------ networks and data
def load_teacher(c):
    """The frozen teacher, or None where the method has none."""
    if not c.teacher:
        if c.method != "scratch":
            raise ConfigError(f"--method {c.method} needs a --teacher (scratch does without one)")
        return None
    teacher = models.load(c.teacher).requires_grad_(False)
    if c.scale and c.scale != teacher.scale:
        raise ConfigError(f"{c.teacher} is a x{teacher.scale} network, not x{c.scale}: leave --scale out, or choose a x{c.scale} teacher")
    return teacher


def build_student(c, teacher):
    """The student by name, from --init where one is given."""
    if c.student == "small":
        if teacher is None:
            raise ConfigError("--student small is the paper's student of a teacher: give --teacher, or name a size")
        student = models.from_config(models.small(teacher))
    else:
        student = models.build(c.student, c.scale)
    if c.init and not c.resume:
        initialise(student, models.load(c.init), c.init)
    return student


def initialise(student, source, path):
    """Copies the weights of `source`: all of them, or, from another scale, all but the upsampler."""
    kept = lambda state: {k: v for k, v in state.items() if source.scale == student.scale or not k.startswith("upsample.")}
    own, given = kept(student.state_dict()), kept(source.state_dict())
    if wrong := [k for k in {**own, **given} if k not in own or k not in given or own[k].shape != given[k].shape]:
        raise ConfigError(f"--init {path} does not have the student's shape: {wrong[0]} differs "
                          f"({describe(source.config)}; the student is {describe(student.config)})")
    student.load_state_dict(given, strict=False)


def describe(config):
    return " ".join(f"{k}={v}" if k != "arch" else v for k, v in config.items() if k not in ("mean", "img_range", "drop_path"))


def prepare_data(c, device):
    """The patches to train on, and the held-out pairs [(name, lr, hr)]."""
    if c.data:
        train = data.find_images(c.data)
        held = []
        if not c.val and c.holdout:
            if c.holdout >= len(train):
                raise ConfigError(f"--holdout {c.holdout} leaves none of the {len(train)} images of {c.data[0]} to train on")
            held = train[::len(train) // c.holdout][:c.holdout]
            train = [p for p in train if p not in set(held)]
    else:
        train, held = data.embedded(data.EMBEDDED_TRAIN), data.embedded(data.EMBEDDED_VAL)
    held = data.find_images(c.val) if c.val else held
    cache = Path(c.cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dukd")
    lr_paths = data.match_lr(train, c.lr_data, c.scale)
    store = data.build_store(train, lr_paths, c.scale, c.patch, c.ram * 2**30, cache, c.skip_bad)
    return data.Patches(store, c.patch, c.scale, device), [(p.stem, *data.read_pair(p, None, c.scale, 8)) for p in held]


def validate(model, pairs, device):
    """Mean PSNR (Y) over held-out pairs, in float32, and the first four upscaled pictures."""
    was_training, figures, pictures = model.training, [], []
    model.eval()
    for _, lr, hr in pairs:
        sr = evaluate.to_uint8(evaluate.upscale(model, evaluate.to_tensor(lr, device), tile=512))
        figures.append(evaluate.psnr_y(sr, hr, model.scale))
        pictures = pictures if len(pictures) == 4 else [*pictures, sr]
    model.train(was_training)
    return float(np.mean(figures)), pictures


# ------------------------------------------------------------------------------------------------ the run
class Run:
    """A run folder and all that changes while training: what a checkpoint holds, and how it is written."""

    def __init__(self, c, student, features, device):
        self.c, self.out, self.device = c, Path(c.out), device
        self.student, self.ema = student, copy.deepcopy(student).eval().requires_grad_(False)
        self.adapters = features.adapters if features else torch.nn.ModuleList()
        trained = [*student.parameters(), *self.adapters.parameters()]
        self.optimizer = torch.optim.Adam(trained, lr=c.lr, betas=(0.9, 0.99), fused=device.type in ("cpu", "cuda"))
        self.generator = torch.Generator().manual_seed(c.seed)  # patches, zoom-in crops, augmentations
        self.step, self.best, self.sums, self.counted = 0, -math.inf, {}, 0
        self.saved = None  # the step that last.ckpt holds, where it is whole
        self.bar = None

    def state(self):
        return dict(step=self.step, best=self.best, counted=self.counted, sums={k: float(v) for k, v in self.sums.items()},
                    student=self.student.state_dict(), ema=self.ema.state_dict(), adapters=self.adapters.state_dict(),
                    optimizer=self.optimizer.state_dict(), generator=self.generator.get_state(), random=torch.get_rng_state(),
                    random_cuda=torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None)

    def restore(self):
        """Goes back to the last checkpoint that is whole and of this run."""
        wrong = []
        for path in (self.out / name for name in CHECKPOINTS if (self.out / name).exists()):
            try:
                self.adopt(models.read_file(path))
            except models.CheckpointError as e:
                wrong.append(str(e))
            except Exception:  # a file of another network or program can go wrong in any way
                wrong.append(f"{path} holds no state of this run")
            else:
                self.saved = self.step if path.name == CHECKPOINTS[0] else None
                for text in wrong:
                    print(f"warning: {text}; going on from {path.name}", file=sys.stderr)
                return
        raise ConfigError(f"no checkpoint can be read ({'; '.join(wrong)}); start again with another --out")

    def adopt(self, state):
        """Takes over what `state` returned in an earlier process."""
        for part in ("student", "ema", "adapters", "optimizer"):
            getattr(self, part).load_state_dict(state[part])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        self.step, self.best = int(state["step"]), float(state["best"])
        self.sums, self.counted = dict(state["sums"]), int(state["counted"])

    def save(self):
        """last.ckpt comes last: all that it does not bring back by training on is on the disk before it."""
        models.save(self.out / "student.pt", self.ema, raw=self.student.state_dict())
        with contextlib.suppress(OSError), open(self.out / "log.csv", "rb+") as f:
            os.fsync(f.fileno())
        last, previous = (self.out / name for name in CHECKPOINTS)
        broken = self.saved is None  # then the one before is still the only good one
        models.write_atomically(models.to_bytes(self.state()), last, keep=None if broken else previous)
        self.saved = self.step

    def add(self, terms):
        """Collects a step's terms; every --log-every steps their means become a row of log.csv."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.counted += 1

    def means(self, world):
        """The means of what was collected, over all processes, and a fresh start."""
        values = torch.stack([torch.as_tensor(v, device=self.device) for v in self.sums.values()]) / self.counted
        if world > 1:
            dist.all_reduce(values)
        names, self.sums, self.counted = list(self.sums), {}, 0
        return dict(zip(names, (values / world).tolist()))

    def log(self, means, psnr):
        """A row of log.csv; psnr is None where there was no validation."""
        row = [self.step, f"{learning_rate(self.step - 1, self.c):.3g}", *(f"{v:.8g}" for v in means.values()),
               "" if psnr is None else f"{psnr:.4f}"]
        try:
            with open(self.out / "log.csv", "ab") as f:
                f.write(as_csv([row]))
        except OSError as e:
            raise models.CheckpointError(f"{self.out / 'log.csv'} cannot be written: {e.strerror or e}") from None

    def validate(self, held):
        """Held-out PSNR of the averaged weights; where it is the best so far, best.pt and pictures of the first four."""
        psnr, pictures = validate(self.ema, held, self.device)
        if psnr > self.best:
            self.best = psnr
            models.save(self.out / "best.pt", self.ema, raw=self.student.state_dict())
            for (name, _, _), picture in zip(held, pictures):
                png = iio.imwrite("<bytes>", picture, extension=".png")
                models.write_atomically(png, self.out / "val" / f"{name}_x{self.c.scale}.png")
        return psnr


def start(run, teacher, held, command):
    """Makes the run folder, or, with --resume, goes back to its last checkpoint and cuts the log there."""
    c = run.c
    columns = ["step", "lr", *term_names(c), "total", "val_psnr"]
    if c.resume:
        run.restore()
        models.write_atomically(as_csv([columns, *logged(run.out / "log.csv", len(columns), run.step)]), run.out / "log.csv")
        print(f"resumed after step {run.step} of {c.steps}", flush=True)
        return
    about = dict(config=dataclasses.asdict(c), **evaluate.provenance(command, run.device), student=run.student.config,
                 teacher=teacher.config if teacher else None, held_out=[n for n, _, _ in held])
    # Beside its place and then renamed, so that whatever is found there can be resumed. The same settings use the same name
    # again after a kill; two different runs that start at once do not share one.
    mark = hashlib.sha256(json.dumps(about["config"]).encode()).hexdigest()[:8]
    new = run.out.with_name(f"{run.out.name}.{mark}.tmp")
    try:
        (new / "val").mkdir(parents=True, exist_ok=True)
        models.write_atomically(json.dumps(about, indent=1).encode(), new / "config.json")
        models.write_atomically(as_csv([columns]), new / "log.csv")
        models.write_atomically(models.to_bytes(run.state()), new / CHECKPOINTS[0])
        os.rename(new, run.out)
    except (OSError, models.CheckpointError) as e:
        raise ConfigError(f"{run.out} cannot be made: {getattr(e, 'strerror', None) or e}; name another --out") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    models.sync_folder(run.out.parent)
    run.saved = run.step


def as_csv(rows):
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def logged(path, columns, step):
    """The rows of a log.csv up to a step: later ones come again, and the last one may have been cut short by a kill."""
    text = path.read_text(errors="replace").replace("\0", "") if path.is_file() else ""
    rows = [row for row in csv.reader(text.splitlines()) if len(row) == columns]
    return [row for row in rows if row[0].isdecimal() and int(row[0]) <= step]


def term_names(c):
    """The terms that `loss_terms` returns under these settings, in its order."""
    on = dict(rec=c.lambda_rec, kd=c.lambda_kd, zoom_in=c.zoom_in and c.lambda_dukd, zoom_out=c.zoom_out and c.lambda_dukd,
              zoom_out_rec=c.zoom_out and c.lambda_rec, feature=c.lambda_feature)
    return [name for name, value in on.items() if value]


def fit(run, teacher, patches, held, features, amp, stop, rank=0, world=1):
    """The loop: to the last step, to --stop-at, or until `stop` holds a signal. Returns the last held-out PSNR."""
    c, psnr, saved = run.c, None, time.monotonic()
    student = DistributedDataParallel(Trained(run.student, run.adapters), broadcast_buffers=False) if world > 1 else run.student
    part = slice(rank * c.batch // world, (rank + 1) * c.batch // world) if world > 1 else slice(None)
    val_every = c.val_every or min(max(c.steps // 10, 1), 5000)
    goal = min(c.stop_at or c.steps, c.steps)
    run.student.train()
    bar = run.bar = tqdm(total=c.steps, initial=run.step, unit="step", disable=rank > 0, dynamic_ncols=True,
               mininterval=0.1 if sys.stderr.isatty() else 10)  # a log file gets a line now and then
    began, first, waited = time.monotonic(), run.step, 0.0
    while run.step < goal and not agreed(stop, run, world):
        before = time.monotonic()
        lr, hr, images = training_pairs(patches, c.batch, run.generator)
        waited += time.monotonic() - before

        terms = loss_terms(student, teacher, lr, hr, c, run.generator, amp, part, features)
        total = sum(terms.values())
        require_finite(total, terms, run, patches.store.names, images[part])
        update(run.student, run.optimizer, run.ema, total, c, run.step)
        run.step += 1
        run.add({**terms, "total": total})

        validated = held and (run.step % val_every == 0 or run.step == c.steps)
        if validated and rank == 0:
            psnr = run.validate(held)
        if validated or run.step % c.log_every == 0:
            means, spent = run.means(world), time.monotonic() - began
            rate = (run.step - first) * c.batch / spent
            if rank == 0:
                run.log(means, psnr if validated else None)
            bar.set_postfix_str(f"loss {means['total']:.4f}, {rate:.0f} images/s, data {waited / spent:.0%}"
                                + (f", held-out {psnr:.2f} dB" if psnr else ""), refresh=False)
        bar.update()
        if rank == 0 and (validated or time.monotonic() - saved > 60 * c.save_minutes):
            run.save()
            saved = time.monotonic()
    bar.close()
    if rank == 0 and run.saved != run.step:  # saved twice, one state would fill both checkpoints
        run.save()
    return psnr


def training_pairs(patches, n, generator):
    """I_LR and I_HR of n random patches, each pair flipped and transposed at random, and the numbers of their images."""
    where = patches.draw(n, generator)
    lr, hr = patches.batch(where)
    turn = InvertibleAugmentation.sample(n, ("hflip", "vflip", "transpose"), 0.5, generator, lr.device)
    return turn.apply(lr), turn.apply(hr), where[:, 0].tolist()


class Trained(torch.nn.Module):
    """All that is trained, in one module, so that DistributedDataParallel averages all of its gradients."""

    def __init__(self, student, adapters):
        super().__init__()
        self.student, self.adapters = student, adapters

    def forward(self, x):
        return self.student(x)


def agreed(stop, run, world):
    """Whether to stop: in one process at once, in several when all have looked (every tenth step)."""
    if world == 1:
        return bool(stop)
    if run.step % 10:
        return False
    flag = torch.tensor([float(bool(stop))], device=run.device)
    dist.all_reduce(flag)
    return bool(flag.item())


def require_finite(total, terms, run, names, images):
    """Stops before an update by a loss that is NaN or infinite; what the run folder holds stays as it is."""
    if not torch.isfinite(total):
        where = ", ".join(sorted({names[i] for i in images}))
        bad = next((name for name, value in terms.items() if not torch.isfinite(value)), "total")
        raise ConfigError(f"the term {bad} is no finite number at step {run.step + 1}, on patches of {where}; "
                          f"{run.out} keeps the last good state. A lower --lr or --precision float32 may help")


def train(c, command=""):
    """One run, from a Config to a trained student in its folder. Raises ConfigError, DataError or CheckpointError."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if c.deterministic:
        make_deterministic()
    device = choose_device(c)
    teacher = load_teacher(c)
    c.scale = c.scale or (teacher.scale if teacher else 4)
    c = complete(c, teacher)
    check(c, world)
    torch.manual_seed(c.seed)
    student = build_student(c, teacher)
    c.out = c.out or f"runs/{c.method}_{c.student}_x{c.scale}"
    check_out(c)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))
        if rank:
            dist.barrier()  # rank 0 decodes first; the others find its store
    patches, held = prepare_data(c, device)
    if world > 1 and rank == 0:
        dist.barrier()

    torch.backends.cudnn.benchmark = not c.deterministic
    place = lambda net: net.to(device, memory_format=torch.channels_last) if net else None
    student, teacher = place(student), place(teacher)
    half = c.precision == "bfloat16" or (c.precision == "auto" and computes_bfloat16(device))
    amp = torch.autocast(device.type, torch.bfloat16, enabled=half)
    features = FeatureLoss(student, teacher, c) if c.method in FEATURE_LOSSES else None
    torch.manual_seed(c.seed + rank)  # from here on it feeds only SwinIR's drop-path
    run = Run(c, student, features, device)
    if rank == 0:
        report(run, teacher, patches, held, features, half)
        start(run, teacher, held, command)
    elif c.resume:
        run.restore()
    try:
        with listening() as stop:
            psnr = fit(run, teacher, patches, held, features, amp, stop, rank, world)
    except models.CheckpointError as e:
        raise ConfigError(f"{e}; once that is mended, --resume goes on from the last checkpoint in {c.out}") from None
    finally:
        if run.bar is not None:
            run.bar.close()  # so that an error has a line of its own
    if rank == 0:
        conclude(run, psnr)
    if world > 1:
        dist.destroy_process_group()
    if stop:
        raise SystemExit(128 + stop[0])
    return run


def make_deterministic():
    """Only algorithms that add in a fixed order; an error where there is none. To be called before CUDA starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True


def choose_device(c):
    """--device, or the GPU of this process where there is one, or the CPU."""
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else ""
    device = evaluate.pick_device(c.device or own)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def computes_bfloat16(device):
    """Whether the device has bfloat16 arithmetic of its own (where it is emulated, it only slows down)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def check(c, world):
    """ConfigError for numbers that make no sense."""
    least = dict(steps=1, batch=1, patch=1, crops=1, log_every=1, lr=0, ema=0, holdout=0, lambda_rec=0, lambda_kd=0, lambda_dukd=0,
                 lambda_feature=0, p=0, val_every=0, stop_at=0, ram=0, save_minutes=0)
    for name, value in ((n, getattr(c, n)) for n in least):
        if not (math.isfinite(value) and value >= least[name]):
            raise ConfigError(f"{flag(name)} must be at least {least[name]}, not {value}")
    if c.p > 1 or c.ema >= 1:
        raise ConfigError(f"--p {c.p} and --ema {c.ema}: a probability is at most 1, a decay below 1")
    if len(set(c.ops)) < len(c.ops):
        raise ConfigError(f"--ops names an operation twice: {' '.join(c.ops)}")
    if c.patch > 1024 or c.batch > 65536:
        raise ConfigError(f"--patch {c.patch} and --batch {c.batch}: at most 1024 and 65536")
    if c.zoom_out and c.patch % c.scale:
        raise ConfigError(f"zoom-out reduces the LR patch by {c.scale}: --patch {c.patch} must be a multiple of it (or --no-zoom-out)")
    if c.batch % world:
        raise ConfigError(f"--batch {c.batch} cannot be shared by {world} processes")
    if not term_names(c):
        raise ConfigError("every loss term is off: nothing to learn from")


def flag(name):
    return "--" + name.replace("_", "-")


def check_out(c):
    out = Path(c.out)
    if c.resume and not any((out / name).is_file() for name in CHECKPOINTS):
        raise ConfigError(f"{out} holds no run to resume (no {CHECKPOINTS[0]}); start again with another --out")
    if not c.resume and out.exists():
        raise ConfigError(f"{out} exists already: --resume goes on with it, another --out starts a new run")


def report(run, teacher, patches, held, features, half):
    """What is about to run, in a few lines: networks, costs, held-out PSNR, data."""
    c, s = run.c, run.c.scale

    def line(role, net, name):
        text = f"{role:8}{name}: {describe(net.config)}; {models.parameters(net) / 1e6:.2f} M parameters"
        with contextlib.suppress(Exception):  # some foreign networks cannot be counted
            text += f", {models.multiply_adds(net) / 1e9:.1f} G multiply-adds (1280x720)"
        return text
    psnr = lambda net: f", held-out {validate(net, held, run.device)[0]:.2f} dB" if held else ""
    if teacher:
        print(line("teacher", teacher, c.teacher) + psnr(teacher))
        if models.parameters(teacher) < models.parameters(run.student):
            print("warning: the student is larger than its teacher")
    print(line("student", run.student, c.student) + (psnr(run.student) if c.init else ""))
    for text in features.lines if features else ():
        print(f"tap     {text}")
    pixels = run_pixels(patches.store) / 1e6
    bicubic = np.mean([evaluate.psnr_y(data.imresize(lr, s), hr, s) for _, lr, hr in held]) if held else math.nan
    print(f"data    {len(patches.store)} images, {pixels:.1f} Mpixel; held out {len(held)}, bicubic {bicubic:.2f} dB")
    print(f"run     {c.out}: {c.method}, {c.steps} steps of {c.batch} on {run.device} ({'bfloat16' if half else 'float32'}); "
          f"L = {' + '.join(term_names(c))}", flush=True)


def run_pixels(store):
    return int((store.hr[:, 1] * store.hr[:, 2]).sum())


def conclude(run, psnr):
    """The last lines: where the student is, how good, or how to go on."""
    again = f"python train.py --resume --out {shlex.quote(str(run.out))}"
    if run.step < run.c.steps:
        print(f"stopped after step {run.step} of {run.c.steps}; go on with: {again}")
    else:
        held = f"held-out PSNR {psnr:.2f} dB at the end, {run.best:.2f} dB at best\n" if psnr is not None else ""
        best = f", {run.out / 'best.pt'} (best held-out)" if held else ""
        print(f"{held}student: {run.out / 'student.pt'} (at the end){best}")


@contextlib.contextmanager
def listening(at_once=False):
    """While it lasts, SIGINT and SIGTERM finish the step, save and stop: gives the list that will hold the signal.

    at_once: they end the program there and then, with the shell's exit code for it and no traceback."""
    caught = []

    def handler(number, frame):
        if caught or at_once:  # or asked twice
            raise SystemExit(128 + number)
        caught.append(number)
    before = {}
    with contextlib.suppress(ValueError):  # only the main thread may listen
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


# ------------------------------------------------------------------------------------------------ the command line
def parse(argv):
    """The command line as a Config. With --resume, the run's own settings; others may not contradict them."""
    parser = evaluate.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in dataclasses.fields(Config):
        settings = dict(f.metadata)
        if "action" not in settings:
            several = f.type is list
            settings |= dict(type=str if several else f.type, nargs="+" if several else None)
            if "choices" not in settings:
                settings.setdefault("metavar", f.type.__name__.upper())
            if f.default not in (None, "", 0, dataclasses.MISSING):
                settings["help"] += f" [{f.default}]"
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, **settings)
    given = vars(parser.parse_args(argv))
    c = Config(**given)
    return resumed(c, given) if c.resume else c


def resumed(c, given):
    """The Config of the run in --out, with the given settings that may change."""
    if not c.out:
        raise ConfigError("--resume needs --out, the run folder to go on with")
    if not Path(c.out).exists():
        raise ConfigError(f"{c.out} does not exist: no run to resume; leave --resume out to start one")
    try:
        old = json.loads((Path(c.out) / "config.json").read_text())["config"]
        before = Config(**old)
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{c.out} holds no run to resume (no readable config.json); start again with another --out") from None
    for name, value in given.items():
        if name not in MAY_CHANGE and value != getattr(before, name):
            raise ConfigError(f"{flag(name)} {value} contradicts the run in {c.out} ({getattr(before, name)}); leave it out")
    return dataclasses.replace(before, **{"stop_at": 0, **{k: v for k, v in given.items() if k in MAY_CHANGE}})


def main(argv=None):
    try:
        with listening(at_once=True):  # until the loop begins, and after it
            c = parse(sys.argv[1:] if argv is None else argv)
            train(c, command=shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)]))
    except (ConfigError, data.DataError, models.CheckpointError) as e:
        print(f"error: {e}", file=sys.stderr)
    except OSError as e:  # a full disk under the output, for one
        print(f"error: {e.filename or 'the output'}: {e.strerror or e}", file=sys.stderr)
    else:
        return
    raise SystemExit(2)


if __name__ == "__main__":
    main()
