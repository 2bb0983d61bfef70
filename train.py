"""Distil a small super-resolution network from a large frozen one (DUKD, arXiv 2309.14162).

    python train.py --teacher edsr_baseline.pt --student small                         DUKD on scikit-image's pictures
    python train.py --teacher edsr_baseline.pt --student small --data DIV2K_train_HR   … on your own
    python train.py --student edsr_baseline --method scratch --data DIV2K_train_HR     train a teacher
    torchrun --nproc_per_node=2 train.py …                                             the same batch on two GPUs
    python train.py --resume --out runs/NAME                                           go on where a run stopped

Read downward: Config, one step, the networks and data it needs, the run and its loop, the same step faster, the way from
settings to a student, what a step costs, the command line.
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

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import evaluate
import models
from dukd import (OPERATIONS, InvertibleAugmentation, Taps, adapters, at_loss, crop, draw_corners, dukd_loss, fakd_loss,
                  fitnet_loss, reconstruction_loss, response_kd_loss, zoom_out)

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
                                    "it, else float32); losses and the student's weights are float32", choices=("auto", "float32", "bfloat16"))
    compile: bool = option(None, "compile the networks' repeated block with torch.compile (default: on CUDA)",
                           action=argparse.BooleanOptionalAction)
    record: bool = option(True, "record the step as one CUDA graph (on CUDA, with one process)", action=argparse.BooleanOptionalAction)
    label_once: bool = option(False, "the teacher labels I_LR once, whole images beforehand, not patches in each step", action="store_true")
    bench: int = option(0, "measure N steps, print one line of JSON and write nothing", metavar="N")
    deterministic: bool = option(False, "bit-identical results on CUDA too, at some cost in speed", action="store_true")
    ram: float = option(1.0, "GiB of decoded images kept in memory; more go to a mapped file in --cache")
    cache: str = option("", "folder of decoded images (default: ~/.cache/dukd)", metavar="DIR")
    skip_bad: bool = option(False, "leave unusable training images out, with a line each", action="store_true")
    val_every: int = option(0, "steps between validations (default: a tenth of the run, at most 5000)")
    log_every: int = option(10, "steps between rows of log.csv, each the mean since the last")
    save_minutes: float = option(5.0, "minutes between resumable checkpoints (also at each validation and at the end)")
    stop_at: int = option(0, "stop, resumably, after this step")


MAY_CHANGE = {"out", "resume", "device", "compile", "record", "ram", "cache", "val_every", "save_minutes", "stop_at"}  # on --resume


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
    settings = paper | given | unused
    settings["zoom_in"] = bool(settings["zoom_in"] and settings["lambda_dukd"])  # z of zoom-in has no other term
    return dataclasses.replace(c, **settings)


# ------------------------------------------------------------------------------------------------ one step
def draw(patches, c, generator):
    """All that is random in one step, drawn on the CPU for the whole batch: the same on every device and in every process.

    Returns {name: tensor or F} with entries of n = batch samples ("corners" and "F_in" of n·crops), and the patches'
    pixels in place of "where" they lie, if these are not on the device."""
    n, crops = c.batch, c.batch * c.crops * c.zoom_in
    sample = lambda n, ops, p: InvertibleAugmentation.sample(n, ops, p, generator)
    where = patches.draw(n, generator)
    drawn = dict(images=where[:, 0], turn=sample(n, ("hflip", "vflip", "transpose"), 0.5))
    drawn["corners"] = draw_corners(crops, [c.patch * c.scale] * 2, [c.patch] * 2, generator)
    drawn["F_in"] = sample(crops, c.ops if c.consistency in ("zoom_in", "both") else (), c.p)
    drawn["F_out"] = sample(n * c.zoom_out, c.ops if c.consistency in ("zoom_out", "both") else (), c.p)
    return drawn | (dict(where=where) if patches.resident else patches.fetch(where))


@dataclass
class Batch:
    """What the losses of one step are made of. N samples; floats in [0,1], on the device."""
    lr: torch.Tensor  # I_LR (N,3,h,w)
    hr: torch.Tensor  # I_HR (N,3,s·h,s·w)
    z_in: torch.Tensor  # crops of I_HR (N·crops,3,h,w), or none
    z_out: torch.Tensor  # I_LR reduced by s (N,3,h/s,w/s), or none
    F_in: InvertibleAugmentation  # of each z_in
    F_out: InvertibleAugmentation  # of each z_out
    t_lr: torch.Tensor = None  # f_T(I_LR), where it was made beforehand


def upcycle(patches, drawn, c):
    """The training pairs that were drawn, turned as drawn, and the new inputs made out of them."""
    pixels = patches.fetch(drawn["where"]) if "where" in drawn else drawn
    lr, hr, *t_lr = (drawn["turn"].apply(data.to_float(pixels[k])) for k in ("lr", "hr", "label") if k in pixels)
    repeated = hr[:, None].expand(-1, c.crops, -1, -1, -1).flatten(0, 1)  # each patch once for each of its crops
    z_in = crop(repeated, drawn["corners"], lr.shape[-2:]) if c.zoom_in else lr[:0]
    return Batch(lr, hr, z_in, zoom_out(lr, c.scale) if c.zoom_out else lr[:0], drawn["F_in"], drawn["F_out"], *t_lr)


def labels(teacher, x, c, amp):
    """f_T of I_LR and of the new inputs, without gradient; None for what no term asks. Inputs of one size share a forward."""
    if teacher is None:
        return None, None, None
    t_lr, t_in, t_out = x.t_lr, None, None
    pairs = x.lr if t_lr is None and (c.lambda_kd or c.lambda_feature) else x.lr[:0]
    with amp, torch.no_grad():
        if len(asked := torch.cat([pairs, x.z_in])):
            answer, t_in = split(teacher(asked), len(pairs))
            t_lr = answer if len(pairs) else t_lr
        if len(x.z_out) and c.lambda_dukd:
            t_out = teacher(x.z_out)
    return t_lr, t_in, t_out


def loss_terms(student, x, label, c, amp, features=None):
    """Every term of L for a Batch x and its labels, times its λ: {name: scalar}. Their sum is what is minimised.

    amp: autocast context of the forwards; features: the baseline's FeatureLoss. The student gets gradient from each
    term, the teacher from none."""
    t_lr, t_in, t_out = label
    with amp:
        sr, s_in = split(student(torch.cat([x.lr, x.F_in.apply(x.z_in)])), len(x.lr))
        s_out = student(x.F_out.apply(x.z_out)) if len(x.z_out) else None

    terms = {}
    if c.lambda_rec:
        terms["rec"] = c.lambda_rec * reconstruction_loss(sr, x.hr)
    if c.lambda_kd:
        terms["kd"] = c.lambda_kd * response_kd_loss(sr, t_lr)
    if len(x.z_in):
        terms["zoom_in"] = c.lambda_dukd * dukd_loss(s_in, t_in, x.F_in)
    if len(x.z_out) and c.lambda_dukd:
        terms["zoom_out"] = c.lambda_dukd * dukd_loss(s_out, t_out, x.F_out)
    if len(x.z_out) and c.lambda_rec:  # I_LR is the ground truth of z_out
        terms["zoom_out_rec"] = c.lambda_rec * reconstruction_loss(x.F_out.invert(s_out), x.lr)
    if features and c.lambda_feature:
        terms["feature"] = c.lambda_feature * features.loss()
    return terms


def split(x, n):
    return x[:n], x[n:]


def step(run, drawn):
    """One step, all of it: the batch, its labels, L and its gradient, Adam, the averaged weights.
    Returns every term and the total, (k,), without gradient."""
    terms = gradients(run, drawn)
    update(run.student, run.optimizer, run.ema, run.blend)
    return terms


def gradients(run, drawn):
    """L of one batch and its gradient, in the .grad of all that is trained. Returns as `step` does."""
    x = upcycle(run.patches, drawn, run.c)
    with run.features.watch() if run.features else contextlib.nullcontext():
        label = labels(run.teacher, x, run.c, run.amp)
        terms = loss_terms(run.called, x, label, run.c, run.amp, run.features)
    total = sum(terms.values())
    run.optimizer.zero_grad(set_to_none=True)
    total.backward()
    return torch.stack([*terms.values(), total]).detach()


def update(student, optimizer, ema, blend):
    """Adam's step, and the averaged weights after it: ema += blend·(weights − ema), blend a tensor."""
    optimizer.step()
    with torch.no_grad():
        average = list(ema.parameters())
        change = torch._foreach_sub(list(student.parameters()), average)
        torch._foreach_mul_(change, blend)
        torch._foreach_add_(average, change)


def learning_rate(step, c):
    """Of update `step` (from 0): ×0.1 at 40 % and at 80 % of the run, or half a cosine to zero."""
    if c.schedule == "cosine":
        return c.lr * 0.5 * (1 + math.cos(math.pi * step / c.steps))
    return c.lr * 0.1 ** sum(step >= milestone * c.steps for milestone in (0.4, 0.8))


def blend(step, c):
    """1 − decay of the averaged weights at update `step`: a short run is not averaged with its random start."""
    return 1 - min(c.ema, (1 + step) / (10 + step))


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
        for tap in self.taps:
            tap.features = []  # else they would keep this step's graph until the next
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


def prepare_data(c):
    """The Store of training images, and the held-out pairs [(name, lr, hr)]."""
    if c.data:
        train = data.find_images(c.data, c.skip_bad)
        held = []
        if not c.val and c.holdout:
            if c.holdout >= len(train):
                raise ConfigError(f"--holdout {c.holdout} leaves none of the {len(train)} images of {c.data[0]} to train on")
            held = train[::len(train) // c.holdout][:c.holdout]
            train = [p for p in train if p not in set(held)]
    else:
        train, held = data.embedded(data.EMBEDDED_TRAIN), data.embedded(data.EMBEDDED_VAL)
    held = data.find_images(c.val) if c.val else held
    lr_paths = data.match_lr(train, c.lr_data, c.scale)
    store = data.build_store(train, lr_paths, c.scale, c.patch, c.ram * 2**30, cache_folder(c), c.skip_bad)
    return store, [(p.stem, *data.read_pair(p, None, c.scale, 8)) for p in held]


def cache_folder(c):
    return Path(c.cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dukd")


def label_images(teacher, store, amp, c):
    """f_T(I_LR) of every whole training image, once: what the patches of it are compared with, instead of the teacher's
    answer to each patch, which knows nothing of its surroundings."""
    device = next(teacher.parameters()).device
    store.labels = data.room_for_labels(store, c.ram * 2**30, cache_folder(c))
    places = list(zip(store.lr.tolist(), store.hr.tolist()))
    for (first, h, w), (to, H, W) in tqdm(places, desc="labelling", unit="image", leave=False, mininterval=1):
        lr = data.to_float(store.pixels[first:first + h * w].view(1, h, w, 3).to(device))
        with amp:
            sr = evaluate.upscale(teacher, lr, tile=256)
        store.labels[to:to + H * W] = sr[0].permute(1, 2, 0).reshape(-1, 3)


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

    def __init__(self, c, student, teacher, patches, features, device, precision, rank=0, world=1):
        self.c, self.out, self.device, self.rank, self.world = c, Path(c.out), device, rank, world
        self.teacher, self.patches, self.features = teacher, patches, features
        self.precision, self.amp = precision, autocast(device, precision)
        self.student, self.ema = student, copy.deepcopy(student).eval().requires_grad_(False)
        self.adapters = features.adapters if features else torch.nn.ModuleList()
        trained = [*student.parameters(), *self.adapters.parameters()]
        self.called = student  # what the step calls: the student, or what averages its gradients over processes
        if world > 1:
            self.called = DistributedDataParallel(Trained(student, self.adapters), broadcast_buffers=False)
        self.lr, self.blend = (torch.zeros((), device=device) for _ in range(2))  # tensors: a recorded step reads them anew
        fast = dict(fused=True, capturable=device.type == "cuda") if device.type in ("cpu", "cuda") else {}
        self.optimizer = torch.optim.Adam(trained, lr=self.lr, betas=(0.9, 0.99), **fast)
        self.generator = torch.Generator().manual_seed(c.seed)  # patches, zoom-in crops, augmentations
        self.names = [*term_names(c), "total"]
        self.step, self.best, self.sums, self.counted = 0, -math.inf, dict.fromkeys(self.names, 0.0), 0
        self.recent = []  # (step, terms, numbers of the batch's images) that were not looked at yet
        self.saved = None  # the step that last.ckpt holds, where it is whole

    def state(self):
        return dict(step=self.step, best=self.best, counted=self.counted, sums=self.sums,
                    student=self.student.state_dict(), ema=self.ema.state_dict(), adapters=self.adapters.state_dict(),
                    optimizer=self.optimizer.state_dict(), generator=self.generator.get_state(), random=torch.get_rng_state(),
                    random_cuda=torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None)

    def restore(self):
        """Goes back to the last checkpoint that is whole and of this run."""
        wrong = []
        for path in (self.out / name for name in CHECKPOINTS if (self.out / name).exists()):
            try:
                self.adopt(models.read_file(path))
            except models.HostileFile:
                raise
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
        """Takes over what `state` returned in an earlier process; fails in one way or another where it is not of this run."""
        for part in ("student", "ema", "adapters"):
            getattr(self, part).load_state_dict(state[part])
        settings = self.optimizer.state_dict()["param_groups"]  # the run's own, whatever the file says
        self.optimizer.load_state_dict(dict(state=state["optimizer"]["state"], param_groups=settings))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        for p, moments in self.optimizer.state.items():
            if any(moments[k].shape != p.shape for k in ("exp_avg", "exp_avg_sq")):
                raise ValueError("the optimizer's moments have other shapes than the weights")
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        self.step, self.best, self.counted = int(state["step"]), float(state["best"]), int(state["counted"])
        self.sums = {name: float(state["sums"][name]) for name in self.names}
        if not 0 <= self.step <= self.c.steps:
            raise ValueError(f"step {self.step} of {self.c.steps}")

    def save(self):
        """last.ckpt comes last: all that it does not bring back by training on is on the disk before it."""
        models.save(self.out / "student.pt", self.ema, raw=self.student.state_dict())
        with contextlib.suppress(OSError), open(self.out / "log.csv", "rb+") as f:
            os.fsync(f.fileno())
        last, previous = (self.out / name for name in CHECKPOINTS)
        broken = self.saved is None  # then the one before is still the only good one
        models.write_atomically(models.to_bytes(self.state()), last, keep=None if broken else previous)
        self.saved = self.step

    def set_rates(self):
        """The learning rate and the averaging of the step to come."""
        self.lr.fill_(learning_rate(self.step, self.c))
        self.blend.fill_(blend(self.step, self.c))

    def add(self, terms, images):
        """Notes what a step returned. On a GPU it is looked at later, so that the next step need not wait for it."""
        self.step += 1
        self.recent.append((self.step, terms, images))

    def collect(self):
        """Adds up the terms since the last time. Stops the run at one that is NaN or infinite: nothing has been written
        since, and the run folder keeps the last good state."""
        if not self.recent:
            return
        for (step, _, images), row in zip(self.recent, torch.stack([terms for _, terms, _ in self.recent]).tolist()):
            if bad := [name for name, value in zip(self.names, row) if not math.isfinite(value)]:
                where = ", ".join(sorted({self.patches.store.names[i] for i in images.tolist()}))
                raise ConfigError(f"the term {bad[0]} is no finite number at step {step}, on patches of {where}; "
                                  f"{self.out} keeps the last good state. A lower --lr or --precision float32 may help")
            self.sums = {name: self.sums[name] + value for name, value in zip(self.names, row)}
        self.counted += len(self.recent)
        self.recent = []

    def means(self):
        """The means of what was collected, over all processes, and a fresh start: a row of log.csv."""
        values = torch.tensor([self.sums[name] / self.counted for name in self.names], device=self.device)
        if self.world > 1:
            dist.all_reduce(values)
        self.sums, self.counted = dict.fromkeys(self.names, 0.0), 0
        return dict(zip(self.names, (values / self.world).tolist()))

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
                evaluate.write_picture(self.out / "val" / f"{name}_x{self.c.scale}.png", picture)
        return psnr


def start(run, held, command):
    """Makes the run folder, or, with --resume, goes back to its last checkpoint and cuts the log there."""
    c = run.c
    columns = ["step", "lr", *run.names, "val_psnr"]
    if c.resume:
        run.restore()
        if run.rank == 0:
            kept = rows_until(run.out / "log.csv", len(columns), run.step)
            models.write_atomically(as_csv([columns, *kept]), run.out / "log.csv")
            print(f"resumed after step {run.step} of {c.steps}", flush=True)
    if c.resume or run.rank > 0:
        return
    about = dict(config=dataclasses.asdict(c), **evaluate.provenance(command, run.device), student=run.student.config,
                 teacher=run.teacher.config if run.teacher else None, held_out=[n for n, _, _ in held])
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


def rows_until(path, columns, step):
    """The rows of a log.csv up to a step: later ones come again, and the last one may have been cut short by a kill."""
    text = path.read_text(errors="replace").replace("\0", "") if path.is_file() else ""
    rows = [row for row in csv.reader(text.splitlines()) if len(row) == columns]
    return [row for row in rows if row[0].isdecimal() and int(row[0]) <= step]


def term_names(c):
    """The terms that `loss_terms` returns under these settings, in its order."""
    on = dict(rec=c.lambda_rec, kd=c.lambda_kd, zoom_in=c.zoom_in, zoom_out=c.zoom_out and c.lambda_dukd,
              zoom_out_rec=c.zoom_out and c.lambda_rec, feature=c.lambda_feature)
    return [name for name, value in on.items() if value]


def fit(run, advance, held, stop):
    """The loop: to the last step, to --stop-at, or until `stop` holds a signal. `advance` is `step`, or does the same
    faster. Returns the last held-out PSNR."""
    c, psnr, saved = run.c, None, time.monotonic()
    val_every = c.val_every or min(max(c.steps // 10, 1), 5000)
    goal = min(c.stop_at or c.steps, c.steps)
    bar = tqdm(total=c.steps, initial=run.step, unit="step", disable=run.rank > 0, dynamic_ncols=True,
               mininterval=0.1 if sys.stderr.isatty() else 10)  # a log file gets a line now and then
    clock = Clock(run.device)
    while run.step < goal and not agreed(stop, run):
        run.set_rates()
        drawn = share(draw(run.patches, c, run.generator), run.rank, run.world)
        with clock:
            terms = advance(run, drawn)
        run.add(terms, drawn["images"])

        validated = held and (run.step % val_every == 0 or run.step == c.steps)
        logged = validated or run.step % c.log_every == 0
        saving = validated or time.monotonic() - saved > 60 * c.save_minutes
        if run.device.type == "cpu" or logged or saving or len(run.recent) == 100:
            run.collect()
        if logged:
            clock.look()
        if validated and run.rank == 0:
            psnr = run.validate(held)
        if logged:
            means = run.means()
            if run.rank == 0:
                run.log(means, psnr if validated else None)
            bar.set_postfix_str(f"loss {means['total']:.4f}, {clock.steps * c.batch / clock.wall:.0f} images/s, "
                                f"data {1 - clock.busy / clock.wall:.0%}" + (f", held-out {psnr:.2f} dB" if psnr else ""), refresh=False)
        bar.update()
        if run.rank == 0 and saving:
            run.save()
            saved = time.monotonic()
        if validated or saving:
            clock.skip()
    bar.close()
    run.collect()
    if run.rank == 0 and run.saved != run.step:  # saved twice, one state would fill both checkpoints
        run.save()
    return psnr


class Clock:
    """How long the device worked and how long it waited for its next step, over the steps taken under `with`."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        self.steps, self.busy, self.wall, self.spans = 0, 0.0, 0.0, []
        self.since = time.monotonic()

    def now(self):
        """A point on the device's own time line."""
        if not self.cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self):
        self.spans.append([self.now()])

    def __exit__(self, *exception):
        self.spans[-1].append(self.now())

    def look(self):
        """Adds up the spans since the last time; all their work must be done."""
        if self.spans:
            self.busy += sum(a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in self.spans)
            self.wall += time.monotonic() - self.since
            self.steps += len(self.spans)
        self.skip()

    def skip(self):
        """Leaves out the time since the last look: validation and saving are no waiting for data."""
        self.since, self.spans = time.monotonic(), []


# ------------------------------------------------------------------------------------------------ the same step, faster
def on_device(drawn, device):
    """What was drawn, on the device; to a GPU through page-locked memory, so that nothing waits for the copies."""
    move = lambda t: page_locked(t).to(device, non_blocking=True) if device.type == "cuda" else t.to(device)
    return {name: v.map(move) if isinstance(v, InvertibleAugmentation) else move(v) for name, v in drawn.items()}


def page_locked(t):
    return t.pin_memory() if len(t) else t


def tensors(drawn):
    return [t for v in drawn.values() for t in (v.masks.values() if isinstance(v, InvertibleAugmentation) else [v])]


class Recorded:
    """A function of (run, drawn) on the GPU as one CUDA graph: launched at once instead of kernel by kernel.

    The first three calls run as they are, and let cuDNN choose its algorithms and Adam make its state. The next is
    recorded; from then on a call copies what was drawn into the recorded inputs and replays. Where recording fails (a
    foreign teacher that waits for the GPU, say), says so and goes on without."""

    def __init__(self, function):
        self.function, self.calls, self.graph = function, 0, None

    def __call__(self, run, drawn):
        self.calls += 1
        if self.calls <= 3 or self.graph is False:
            return self.function(run, on_device(drawn, run.device))
        if self.graph is None:
            self.inputs, self.graph = on_device(drawn, run.device), torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                    self.result = self.function(run, self.inputs)
            except RuntimeError as e:
                print(f"note: the step cannot be recorded as a CUDA graph ({one_line(e)}); it runs unrecorded", file=sys.stderr)
                self.graph, self.inputs = False, None
                return self(run, drawn)
        for fixed, new in zip(tensors(self.inputs), tensors(drawn)):
            fixed.copy_(page_locked(new), non_blocking=True)
        self.graph.replay()
        return self.result.clone()


def hold_in_bfloat16(teacher):
    """Keeps the frozen teacher's weights as autocast would make them at every call, a kernel for each. Its last convolution,
    which autocast leaves in float32, too: that is the largest map of all, and moves the labels by less than 0.01 dB."""
    if isinstance(teacher, models.SRNetwork):
        for m in teacher.modules():
            if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)):
                m.to(torch.bfloat16)


def compile_blocks(run):
    """torch.compile for the block that each network repeats: short to compile, as one serves them all, and where the
    time goes. Tries it on one batch, leaving weights and random streams alone; where it fails, says so and goes without."""
    blocks = [m for net in (run.teacher, run.student) if net for m in net.modules() if isinstance(m, models.BLOCKS)]
    torch._dynamo.config.recompile_limit = 32  # widths, batch sizes and masks of teacher and student
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
    try:
        with spared_streams(run.device):
            gradients(run, on_device(share(draw(run.patches, run.c, torch.Generator()), 0, run.world), run.device))
        return True
    except Exception as e:  # no compiler, an operation that it does not know, …
        print(f"note: torch.compile does not work here ({one_line(e)}); the networks run uncompiled", file=sys.stderr)
        for block in blocks:
            del block.forward
        return False


def spared_streams(device):
    """Context after which torch's own random streams are as before it."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def one_line(error):
    return " ".join(str(error).split())[:120] or type(error).__name__


def accelerate(run):
    """`step`, or its fastest equivalent that the settings and the device allow."""
    cuda = run.device.type == "cuda"
    run.student.train()
    if run.precision == "bfloat16":
        hold_in_bfloat16(run.teacher)
    run.compiled = compile_blocks(run) if (cuda if run.c.compile is None else run.c.compile) else False
    return wrapped(step, run)


def wrapped(function, run):
    """A function of (run, drawn) that takes what was drawn on the CPU: recorded where it can be."""
    if run.device.type == "cuda" and run.world == 1 and run.c.record:
        return Recorded(function)
    return lambda run, drawn: function(run, on_device(drawn, run.device))


# ------------------------------------------------------------------------------------------------ several processes
def share(drawn, rank, world):
    """This process's part of all that was drawn."""
    cut = lambda v: v[len(v) * rank // world:len(v) * (rank + 1) // world]
    return {name: cut(v) for name, v in drawn.items()} if world > 1 else drawn


class Trained(torch.nn.Module):
    """All that is trained, in one module, so that DistributedDataParallel averages all of its gradients."""

    def __init__(self, student, adapters):
        super().__init__()
        self.student, self.adapters = student, adapters

    def forward(self, x):
        return self.student(x)


def agreed(stop, run):
    """Whether to stop: in one process at once, in several when all have looked (every tenth step)."""
    if run.world == 1:
        return bool(stop)
    if run.step % 10:
        return False
    flag = torch.tensor([float(bool(stop))], device=run.device)
    dist.all_reduce(flag)
    return bool(flag.item())


# ------------------------------------------------------------------------------------------------ from settings to a student
def train(c, command=""):
    """One run, from a Config to a trained student in its folder. Raises ConfigError, DataError or CheckpointError."""
    check_numbers(c)
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
    if not c.bench:
        check_out(c)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))
        if rank:
            dist.barrier()  # rank 0 decodes first; the others find its store
    store, held = prepare_data(c)
    if world > 1 and rank == 0:
        dist.barrier()

    torch.backends.cudnn.benchmark = not c.deterministic
    place = lambda net: net.to(device, memory_format=torch.channels_last) if net else None
    student, teacher = place(student), place(teacher)
    precision = c.precision if c.precision != "auto" else "bfloat16" if computes_bfloat16(device) else "float32"
    if c.label_once:
        label_images(teacher, store, autocast(device, precision), c)
    patches = data.Patches(store, c.patch, c.scale, device)
    features = FeatureLoss(student, teacher, c) if c.method in FEATURE_LOSSES else None
    torch.manual_seed(c.seed + rank)  # from here on it feeds only SwinIR's drop-path
    run = Run(c, student, teacher, patches, features, device, precision, rank, world)
    if c.bench:
        return bench(run, command)
    if rank == 0:
        report(run, held)
    try:
        with listening() as stop:
            start(run, held, command)
            psnr = fit(run, accelerate(run), held, stop)
    except models.CheckpointError as e:
        raise ConfigError(f"{e}; once that is mended, --resume goes on from the last checkpoint in {c.out}") from None
    if rank == 0:
        conclude(run, psnr)
    if world > 1:
        dist.destroy_process_group()
    if stop:
        raise SystemExit(128 + stop[0])
    return run


def autocast(device, precision):
    """The context of the networks' forwards."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def make_deterministic():
    """Only algorithms that add in a fixed order; an error where there is none. To be called before CUDA starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True


def choose_device(c):
    """--device, or the GPU of this process where there is one, or the CPU."""
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else ""
    device = evaluate.pick_device(c.device or own)
    if device.type == "cpu":
        evaluate.keep_freed_memory()
    elif device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        torch.cuda.set_stream(torch.cuda.Stream())  # all on one stream that is not the default: only such can be recorded
    return device


def computes_bfloat16(device):
    """Whether the device has bfloat16 arithmetic of its own (where it is emulated, it only slows down)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


# The numbers that make sense: a typing slip should not run for a century, fill the memory or learn nothing.
LIMITS = dict(holdout=(0, 10**6), steps=(1, 10**9), batch=(1, 65536), patch=(1, 1024), lr=(1e-12, 1), ema=(0, 1), seed=(0, 2**62),
              lambda_rec=(0, 1e6), lambda_kd=(0, 1e6), lambda_dukd=(0, 1e6), lambda_feature=(0, 1e6), crops=(1, 1024), p=(0, 1),
              ram=(0, 10**9), bench=(0, 10**6), val_every=(0, 10**9), log_every=(1, 10**9), save_minutes=(0, 10**6), stop_at=(0, 10**9))


def check_numbers(c):
    """ConfigError for a number that makes no sense by itself, also where the method does not use it."""
    for name, (least, most) in LIMITS.items():
        value = getattr(c, name)
        if value is not None and not (least <= value <= most and math.isfinite(value)):
            raise ConfigError(f"{flag(name)} must lie between {least} and {most}, not {value}")


def check(c, world):
    """ConfigError for settings that make no sense together, or on this machine."""
    if c.bench and c.resume:
        raise ConfigError("--bench measures fresh networks: leave --resume out")
    if c.label_once and (not c.lambda_kd or c.method in FEATURE_LOSSES):
        raise ConfigError(f"--label-once serves λ_kd's term, without feature losses: not --method {c.method} as it is set")
    if c.ema == 1:
        raise ConfigError("--ema 1 would keep the random start for ever: it must lie below 1")
    if c.ram * 2**30 > (memory := data.machine_memory()):
        raise ConfigError(f"--ram {c.ram} is more than this machine has: {memory / 2**30:.0f} GiB")
    if len(set(c.ops)) < len(c.ops):
        raise ConfigError(f"--ops names an operation twice: {' '.join(c.ops)}")
    pixels = c.batch * (1 + (c.crops if c.zoom_in else 0)) * (c.patch * c.scale) ** 2
    if pixels > 2**28:  # 455 times the paper's
        raise ConfigError(f"--batch {c.batch}, --patch {c.patch} and --crops {c.crops} together make {pixels / 1e6:.0f} million "
                          "HR pixels an update, beyond any memory: lower one of them")
    if c.zoom_out and c.patch % c.scale:
        raise ConfigError(f"zoom-out reduces the LR patch by {c.scale}: --patch {c.patch} must be a multiple of it (or --no-zoom-out)")
    if c.batch % world:
        raise ConfigError(f"--batch {c.batch} cannot be shared by {world} processes")
    if not term_names(c):
        raise ConfigError("every loss term is off: nothing to learn from")


def flag(name):
    return "--" + name.replace("_", "-")


def check_out(c):
    """ConfigError where the run folder cannot be made, or gone on with: before the images are decoded, not after."""
    out = Path(c.out)
    if c.resume and not any((out / name).is_file() for name in CHECKPOINTS):
        raise ConfigError(f"{out} holds no run to resume (no {CHECKPOINTS[0]}); start again with another --out")
    if not c.resume and os.path.lexists(out):
        raise ConfigError(f"{out} exists already: --resume goes on with it, another --out starts a new run")
    evaluate.check_folder(out, "--out")


def report(run, held):
    """What is about to run, in a few lines: networks, costs, held-out PSNR, data."""
    c, s, teacher, store = run.c, run.c.scale, run.teacher, run.patches.store

    def line(role, net, name):
        text = f"{role:8}{name}: {describe(net.config)}; {models.parameters(net) / 1e6:.2f} M parameters"
        madds = evaluate.multiply_adds(net)
        return text + (f", {madds / 1e9:.1f} G multiply-adds (1280x720)" if madds else "")
    psnr = lambda net: f", held-out {validate(net, held, run.device)[0]:.2f} dB" if held else ""
    if teacher:
        print(line("teacher", teacher, c.teacher) + psnr(teacher))
        if models.parameters(teacher) < models.parameters(run.student):
            print("warning: the student is larger than its teacher")
    print(line("student", run.student, c.student) + (psnr(run.student) if c.init else ""))
    for text in run.features.lines if run.features else ():
        print(f"tap     {text}")
    pixels = int((store.hr[:, 1] * store.hr[:, 2]).sum()) / 1e6
    bicubic = np.mean([evaluate.psnr_y(data.imresize(lr, s), hr, s) for _, lr, hr in held]) if held else math.nan
    print(f"data    {len(store)} images, {pixels:.1f} Mpixel; held out {len(held)}, bicubic {bicubic:.2f} dB")
    print(f"run     {c.out}: {c.method}, {c.steps} steps of {c.batch} on {run.device} ({run.precision}); "
          f"L = {' + '.join(term_names(c))}", flush=True)


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


# ------------------------------------------------------------------------------------------------ what a step costs
def bench(run, command):
    """--bench N: the cost of N steps after a warm-up, as one line of JSON. Nothing is written."""
    drawn = lambda: share(draw(run.patches, run.c, run.generator), run.rank, run.world)
    flops, began = run.world * count_flops(run, drawn()), time.monotonic()
    advance = accelerate(run)
    durations(run, drawn, [advance], 6)
    ready = time.monotonic()
    [times] = durations(run, drawn, [advance], run.c.bench)
    peak = evaluate.peak_mib(run.device)
    median = float(np.median(times))
    result = dict(teacher=run.teacher and describe(run.teacher.config), student=describe(run.student.config), method=run.c.method,
                  terms=run.names[:-1], batch=run.c.batch, patch=run.c.patch, processes=run.world, label_once=run.c.label_once,
                  precision=run.precision, compiled=run.compiled, recorded=bool(getattr(advance, "graph", False)), steps=run.c.bench,
                  ms_per_step=dict(median=round(median, 3), min=round(min(times), 3)),
                  images_per_s=round(1000 * run.c.batch / median, 2), tflop_per_step=round(flops / 1e12, 5),
                  tflop_per_s=round(flops / median / 1e9, 4), peak_memory_gib=peak and round(peak / 1024, 3),
                  warm_up_s=round(ready - began, 2), share=shares(run, drawn), **evaluate.provenance(command, run.device))
    if run.rank == 0:
        print(json.dumps(result), flush=True)


def durations(run, drawn, functions, n):
    """Milliseconds of n calls of each function of (run, drawn), in turns; of each, from its draws to its end."""
    clock, marks = Clock(run.device), [[] for _ in functions]
    for _ in range(n):
        for function, own in zip(functions, marks):
            run.set_rates()
            own.append([clock.now()])
            function(run, drawn())
            own[-1].append(clock.now())
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return [[a.elapsed_time(b) if clock.cuda else 1000 * (b - a) for a, b in own] for own in marks]


def shares(run, drawn):
    """The parts of a step's time: by how much longer it takes with the labels than with the data alone, and so on."""
    def labelled(run, drawn):
        x = upcycle(run.patches, drawn, run.c)
        return next(t for t in (*labels(run.teacher, x, run.c, run.amp), x.hr) if t is not None)
    steps = [lambda run, drawn: upcycle(run.patches, drawn, run.c).hr, labelled, gradients, step]
    steps = [wrapped(f, run) for f in steps]
    durations(run, drawn, steps, 5)
    ends = [float(np.median(times)) for times in durations(run, drawn, steps, max(5, run.c.bench // 4))]
    parts = [max(b - a, 0.0) for a, b in zip([0.0, *ends], ends)]
    return {name: round(t / sum(parts), 3) for name, t in zip(("data", "teacher", "student", "optimiser"), parts)}


def count_flops(run, drawn):
    """Floating-point operations of a step's forwards and backwards, two to a multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode
    with spared_streams(run.device), FlopCounterMode(display=False) as counter:
        gradients(run, on_device(drawn, run.device))
    return counter.get_total_flops()


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
    path = Path(c.out) / "config.json"
    try:
        old = json.loads(path.read_text())["config"]
        before = Config(**old)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"{c.out} holds no run to resume (no readable config.json); start again with another --out") from None
    check_types(before, path)
    for name, value in given.items():
        if name not in MAY_CHANGE and value != getattr(before, name):
            raise ConfigError(f"{flag(name)} {value} contradicts the run in {c.out} ({getattr(before, name)}); leave it out")
    return dataclasses.replace(before, **{"stop_at": 0, **{k: v for k, v in given.items() if k in MAY_CHANGE}})


def check_types(c, path):
    """ConfigError for a setting in a file that no command line could have given."""
    for f in dataclasses.fields(c):
        value = getattr(c, f.name)
        kinds = {float: (int, float), list: (list,)}.get(f.type, (f.type,))
        fits = isinstance(value, kinds) and isinstance(value, bool) == (f.type is bool) or value is None is f.default
        entries = value if isinstance(value, list) else [value]
        if isinstance(value, list) or f.type is str:
            fits = fits and all(isinstance(v, str) and "\0" not in v for v in entries)
        if fits and value is not None and "choices" in f.metadata:
            fits = all(v in f.metadata["choices"] for v in entries)
        if not fits:
            raise ConfigError(f"{path}: {f.name} cannot be {str(value)[:60]!r}; it is not as this program wrote it")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    with evaluate.errors_in_one_line(ConfigError), listening(at_once=True):  # until the loop begins, and after it
        train(parse(argv), command=shlex.join(["python", "train.py", *argv]))


if __name__ == "__main__":
    main()
