"""Distil a small super-resolution network from a large frozen one (DUKD, arXiv 2309.14162).

    python train.py --teacher edsr_baseline.pt --student small              on scikit-image's pictures
    python train.py --teacher FILE --student small --data DIV2K_train_HR    on your own
    python train.py --student edsr_baseline --method scratch --data DIR     train a teacher
    torchrun --nproc_per_node=2 train.py --teacher FILE --data DIR          one batch on two GPUs
    python train.py --resume --out runs/NAME                                go on where a run stopped

Read downward: recipes and settings, the loss, the loop, what a run keeps, its set-up, speed, the flags.
"""
import argparse
import contextlib
import copy
import dataclasses
import datetime
import json
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # the imports take seconds: Ctrl-C ends them without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import l1_loss
from tqdm import tqdm

import data
import evaluate
import models
from dukd import (InvertibleAugmentation, at_loss, dukd_loss, fakd_loss, fitnet_loss, tapped, together,
                  zoom_in, zoom_out)

# What --method stands for. A row may be for one family of teachers, or for one scale of it: the longest name
# that fits counts. Every flag overrides its entry, so the terms of several methods combine. Where λ_dukd
# is 0, the columns from zoom_out to p have no effect.
ENTRIES = ("lambda_rec", "lambda_kd", "lambda_dukd", "zoom_out", "zoom_out_rec", "crops", "p", "feature")
RECIPES = {
    #                        λ_rec λ_kd λ_dukd zoom_out zoom_out_rec crops p    feature
    "dukd":                  (1.0, 1.0, 1.0,   True,    True,        1,    0.3, "none"),  # dukd.py's L
    "dukd_released":         (5.0, 1.0, 0.5,   False,   False,       1,    0.3, "none"),  # SwinIR, and others
    "dukd_released edsr":    (5.0, 1.0, 0.5,   True,    True,        1,    0.3, "none"),
    "dukd_released edsr x2": (5.0, 1.0, 0.5,   True,    True,        2,    0.3, "none"),
    "dukd_released rcan":    (1.0, 1.0, 0.5,   False,   False,       1,    0.0, "none"),
    "dukd_released rcan x3": (2.0, 1.0, 0.5,   True,    True,        1,    0.3, "none"),
    "kd":                    (1.0, 1.0, 0.0,   True,    True,        1,    0.3, "none"),
    "scratch":               (1.0, 0.0, 0.0,   True,    True,        1,    0.3, "none"),
    "fitnet":                (1.0, 0.0, 0.0,   True,    True,        1,    0.3, "fitnet"),
    "at":                    (1.0, 0.0, 0.0,   True,    True,        1,    0.3, "at"),
    "fakd":                  (1.0, 1.0, 0.0,   True,    True,        1,    0.3, "fakd"),
}
METHODS = [name for name in RECIPES if " " not in name]
FEATURE_LOSSES = {"fitnet": fitnet_loss, "at": at_loss, "fakd": fakd_loss}
OPERATIONS = InvertibleAugmentation.OPERATIONS
SHORT_RUN = "--no-zoom-out --steps 1300 --batch 2 --patch 24 --lr 1.4e-3 --schedule cosine"  # the README's


def option(default, text, **extra):
    """A Config field. `text` becomes its line of --help, `extra` is for argparse."""
    return dataclasses.field(default=default, metadata=dict(help=text, **extra))


def between(low, high, kind=float):
    """An argparse type: a number from low to high."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must lie between {low} and {high}, not {text}")
        return kind(text)
    number.__name__ = kind.__name__  # argparse names it where the text is no number
    return number


SWITCH, WEIGHT, COUNT = argparse.BooleanOptionalAction, between(0, 1e6), between(1, 10**9, int)
DIRS = dict(nargs="+", metavar="DIR")


@dataclasses.dataclass
class Config:
    """Everything that a run depends on. None: the recipe, the teacher or the device decides."""
    teacher: str = option("", "checkpoint of the frozen teacher f_T, of any known format", metavar="FILE")
    student: str = option("small", f"the student f_S: small (the paper's), {models.NAMES_HELP}")
    method: str = option("dukd", "the recipe: the defaults of the losses", choices=METHODS)
    scale: int = option(None, "s (the teacher's, else 4)", choices=models.SCALES, type=int)
    data: list = option((), "folders of HR training images (scikit-image's photographs)", **DIRS)
    lr_data: list = option((), "folders of their LR images (made): 0001x4.png for 0001.png", **DIRS)
    val: list = option((), "folders of held-out HR images, LR is made (1 to 10 of --data)", **DIRS)
    init: str = option("", "checkpoint that the student starts from, of any scale", metavar="FILE")
    out: str = option("", "run folder (a free runs/METHOD_STUDENT_xSCALE_sSEED)", metavar="DIR")
    resume: bool = option(False, "go on with the run in --out", action="store_true")

    steps: int = option(250_000, "updates; the schedule scales with them", type=COUNT)
    batch: int = option(16, "training pairs in an update, over all processes", type=between(1, 65536, int))
    patch: int = option(48, "LR patch, pixels a side; HR: s times that", type=between(1, 1024, int))
    lr: float = option(1e-4, "Adam's learning rate at the start", type=between(1e-12, 1))
    schedule: str = option("step", "step: x0.1 at 40%% and 80%%; cosine: to zero", choices=("step", "cosine"))
    ema: float = option(0.999, "decay of the averaged weights (the result)", type=between(0, 0.999999))
    seed: int = option(0, "of the first weights and of all draws", type=between(0, 10**6, int))

    lambda_rec: float = option(None, "λ_rec, of |f_S(I_LR) − I_HR|; 0 switches a term off", type=WEIGHT)
    lambda_kd: float = option(None, "λ_kd, of |f_S(I_LR) − f_T(I_LR)|", type=WEIGHT)
    lambda_dukd: float = option(None, "λ_dukd, of the zoom-in and zoom-out terms", type=WEIGHT)
    zoom_in: bool = option(None, "learn labels of HR crops (on); without it F is off, too", action=SWITCH)
    zoom_out: bool = option(None, "learn labels of reduced LR patches", action=SWITCH)
    zoom_out_rec: bool = option(None, "learn I_LR from reduced LR patches, times λ_dukd·λ_rec", action=SWITCH)
    crops: int = option(None, "zoom-in crops of each HR patch", type=between(1, 1024, int))
    consistency: str = option(None, "what passes through F (zoom_in)",
                              choices=("zoom_in", "zoom_out", "both", "none"))
    ops: list = option(None, "operations of F (all)", choices=OPERATIONS, nargs="+")
    p: float = option(None, "probability of each operation of F", type=between(0, 1))
    feature: str = option(None, "feature loss, of four feature maps", choices=("none", *FEATURE_LOSSES))
    lambda_feature: float = option(None, "weight of the feature loss (fakd 10, others 1)", type=WEIGHT)

    device: str = option("", "cpu, cuda, cuda:1, … (cuda where there is one)", metavar="NAME")
    precision: str = option("auto", "of the networks; auto: bfloat16 where the device computes in it; "
                            "float32 is TF32 in CUDA's convolutions", choices=("auto", "float32", "bfloat16"))
    compile: bool = option(None, "torch.compile and a recorded CUDA graph (on CUDA)", action=SWITCH)
    cache: str = option("", "folder for large sets of decoded images (~/.cache/dukd)", metavar="DIR")
    val_every: int = option(None, "steps between validations (a tenth of the run, at most 5000)", type=COUNT)
    bench: int = option(0, "time N steps, print one line of JSON, write nothing", metavar="N", type=COUNT)


@dataclasses.dataclass
class Batch:
    """The inputs of L in one step. What no term needs is None."""
    lr: torch.Tensor  # I_LR (N,3,h,w)
    hr: torch.Tensor  # I_HR (N,3,s·h,s·w)
    z_in: torch.Tensor | None = None  # z of zoom-in (N·crops,3,h,w)
    z_out: torch.Tensor | None = None  # z of zoom-out (N,3,h/s,w/s)
    F_in: InvertibleAugmentation | None = None  # what z_in passes through on its way into the student
    F_out: InvertibleAugmentation | None = None


def losses(student, teacher, batch, c):
    """Each term of L times its λ, {name: scalar}; their sum is L (dukd.py has the equations).
    Only the student gets gradients."""
    weights, terms = term_weights(c), {}
    F_in, F_out = batch.F_in, batch.F_out

    to_teacher, to_student = {}, {"lr": batch.lr}  # {name: input}
    if "kd" in weights or "feature" in weights:
        to_teacher["lr"] = batch.lr
    if "zoom_in" in weights:
        to_teacher["z_in"] = batch.z_in
        to_student["z_in"] = F_in.apply(batch.z_in) if F_in else batch.z_in
    if "zoom_out" in weights:
        to_teacher["z_out"] = batch.z_out
    if "zoom_out" in weights or "zoom_out_rec" in weights:
        to_student["z_out"] = F_out.apply(batch.z_out) if F_out else batch.z_out

    t_taps = teacher.taps if "feature" in weights else ()
    s_taps = student.taps if "feature" in weights else ()
    with torch.autocast(batch.lr.device.type, torch.bfloat16, enabled=c.precision == "bfloat16"):
        if to_teacher:
            with torch.no_grad(), tapped(teacher, t_taps) as t_features:
                t = together(teacher, to_teacher)  # the labels, {name: (·,3,·,·)}
        with tapped(student, s_taps) as s_features:
            s = together(student, to_student)

    if "rec" in weights:
        terms["rec"] = l1_loss(s["lr"], batch.hr)
    if "kd" in weights:
        terms["kd"] = l1_loss(s["lr"], t["lr"])
    if "zoom_in" in weights:
        terms["zoom_in"] = dukd_loss(s["z_in"], t["z_in"], F_in)
    if "zoom_out" in weights:
        terms["zoom_out"] = dukd_loss(s["z_out"], t["z_out"], F_out)
    if "zoom_out_rec" in weights:
        terms["zoom_out_rec"] = dukd_loss(s["z_out"], batch.lr, F_out)  # I_LR is z's ground truth
    if "feature" in weights:
        n = len(batch.lr)  # I_LR is the first in its forward. F moves the features of z.
        terms["feature"] = sum(FEATURE_LOSSES[c.feature](s_features[s_tap][:n], t_features[t_tap][:n])
                               for s_tap, t_tap in zip(s_taps, t_taps))
    return {name: weights[name] * term for name, term in terms.items()}


def term_weights(c):
    """{name: λ} of the terms of L that are on."""
    weights = dict(rec=c.lambda_rec, kd=c.lambda_kd, zoom_in=c.zoom_in and c.lambda_dukd,
                   zoom_out=c.zoom_out and c.lambda_dukd,
                   zoom_out_rec=c.zoom_out_rec and c.lambda_dukd * c.lambda_rec, feature=c.lambda_feature)
    return {name: weight for name, weight in weights.items() if weight}


def upcycle(lr, hr, c):
    """The Batch of these training pairs: draws z of zoom-in and of zoom-out, and the F of each."""
    batch = Batch(lr, hr)
    if c.zoom_in:
        batch.z_in = zoom_in(hr.repeat_interleave(c.crops, dim=0), c.patch)
        if c.consistency in ("zoom_in", "both"):
            batch.F_in = InvertibleAugmentation.sample(len(batch.z_in), c.ops, c.p, device=lr.device)
    if c.zoom_out or c.zoom_out_rec:
        batch.z_out = zoom_out(lr, c.scale)
        if c.consistency in ("zoom_out", "both"):
            batch.F_out = InvertibleAugmentation.sample(len(batch.z_out), c.ops, c.p, device=lr.device)
    return batch


def draw_patches(patches, c, step, rank=0, world=1):
    """The training pairs of a step: I_LR (N,3,h,w) and I_HR (N,3,s·h,s·w), turned at random.
    They are a function of (seed, step): every method sees the same pairs, and any step can be resumed.
    Each of `world` processes draws the whole batch and returns its part."""
    seed = 1000 * (c.seed * 1_000_003 + step)  # room for 1,000 processes, and for a million steps
    torch.manual_seed(seed)
    lr, hr = patches.sample(c.batch)
    turn = InvertibleAugmentation.sample(c.batch, ("hflip", "vflip", "transpose"), 0.5, device=lr.device)
    lr = turn.apply(lr).chunk(world)[rank]
    hr = turn.apply(hr).chunk(world)[rank]
    torch.manual_seed(seed + 1 + rank)  # for what each process draws next: z, F, drop-path
    return lr, hr


def forward_backward(run, lr, hr):
    """Upcycles the pairs, computes L and leaves its gradient in .grad of run.weights.
    Returns every term of L and their sum, (k,), without gradient. On CUDA, `Recorded` replays all of it."""
    terms = losses(run.student, run.teacher, upcycle(lr, hr, run.c), run.c)
    total = sum(terms.values())
    run.optimizer.zero_grad()
    total.backward()
    return torch.stack([*terms.values(), total]).detach()


def learning_rate(step, c):
    """Of update `step`, counted from 0: ×0.1 at 40 % and at 80 % of the run, or half a cosine to zero."""
    if c.schedule == "cosine":
        return c.lr * 0.5 * (1 + math.cos(math.pi * step / c.steps))
    return c.lr * 0.1 ** sum(step >= milestone * c.steps for milestone in (0.4, 0.8))


def average_over_processes(tensors, world):
    """Gives each of `world` processes the mean of each tensor, with one exchange."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, mean in zip(tensors, (flat / world).split([t.numel() for t in tensors])):
        t.copy_(mean.view_as(t))


def train(c, command=""):
    """One run, from a Config to a student in its folder. Returns the Run.
    ConfigError, DataError, CheckpointError or OSError where settings or files cannot be used."""
    run = Run(c)
    c, last = run.c, run.last_step
    if not c.bench:
        start(run, command)
    accelerate(run)
    first = run.step
    window = []  # the terms of each step since the last look at them
    times = [time.perf_counter()]  # of these looks
    bar = tqdm(total=last, initial=first, disable=run.rank > 0, ncols=80, mininterval=0.5,
               bar_format="{n_fmt}/{total_fmt} {bar} {remaining} left{postfix}")
    with caught_signals() as signals, bar:
        while run.step < last:
            if run.step % run.log_every == 0 and any_process_has(signals, run):
                break
            lr, hr = draw_patches(run.patches, c, run.step, run.rank, run.world)  # (N,3,h,w), (N,3,s·h,s·w)
            window.append(run.forward_backward(lr, hr))  # (k,)
            if run.world > 1:
                gradients = [w.grad for w in run.weights if w.grad is not None]
                average_over_processes([window[-1], *gradients], run.world)
            run.optimizer.param_groups[0]["lr"] = learning_rate(run.step, c)
            run.optimizer.step()
            decay = min(c.ema, (1 + run.step) / (10 + run.step))  # low at first: random weights fade
            with torch.no_grad():
                torch._foreach_lerp_(run.averaged, run.weights, 1 - decay)
            run.step += 1
            bar.update()

            # every so often: a row of the log, a validation, a checkpoint
            validating = not c.bench and (run.step % run.val_every == 0 or run.step == last)
            if run.step % run.log_every and not validating:
                continue
            means = torch.stack(window).mean(0).tolist()  # a GPU waits here
            window.clear()
            times.append(time.perf_counter())
            if c.bench:
                continue
            run.check_weights()
            if run.rank == 0:
                if validating:
                    run.psnr = run.score(evaluate.upscaler(run.ema), "student")
                run.write_row(means, validating)
                if validating:
                    run.save()
                psnr = "?" if math.isnan(run.psnr) else f"{run.psnr:.2f}"
                bar.set_postfix_str(f"loss {means[-1]:.4f}, {psnr} dB (bicubic {run.bicubic:.2f})", False)
                if run.step == first + 20:
                    warn_of_a_long_run(run, times)
    if c.bench and not signals:
        print_bench(run, times, command)
    elif run.rank == 0 and not c.bench:
        finish(run)
    if run.world > 1:
        dist.destroy_process_group()
    if signals:
        raise SystemExit(128 + signals[0])
    return run


@contextlib.contextmanager
def caught_signals():
    """Yields a list that gets the number of a SIGINT or SIGTERM. A second signal ends the program."""
    caught = []

    def handle(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_process_has(signals, run):
    """Whether a signal came to any process. They ask each other, so that all stop after the same step."""
    if run.world == 1:
        return len(signals) > 0
    share = torch.tensor([float(len(signals))], device=run.device)
    average_over_processes([share], run.world)
    return share.item() > 0


class ConfigError(ValueError):
    """A setting that cannot be used. The message says which, why, and what to do."""


class Run:
    """Networks, images and device of a Config; all that changes while training; the folder that keeps it."""

    def __init__(self, c):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w", errors="replace")  # the first process speaks for all
        self.device = set_up_device(c.device)
        teacher = models.load(c.teacher).requires_grad_(False) if c.teacher else None
        self.changes = [] if c.resume else changes_to_the_recipe(c)
        self.c = c = complete(c, teacher)
        if c.precision == "auto":
            c.precision = "bfloat16" if computes_bfloat16(self.device) else "float32"
        c.out = c.out or free_name(c, self.changes)
        self.out = Path(c.out)
        check(c, teacher, self.world)
        torch.manual_seed(c.seed)
        student = build_student(c, teacher)
        if self.world > 1:
            cuda = self.device.type == "cuda"
            patience = datetime.timedelta(hours=2)  # the first process decodes the images
            dist.init_process_group("nccl" if cuda else "gloo", timeout=patience,
                                    device_id=self.device if cuda else None)
        store, self.held = prepare_images(c, self.rank, self.world)  # held: [(name, lr, hr)]
        self.patches = data.Patches(store, c.patch, c.scale, self.device)

        self.student = student.to(self.device, memory_format=torch.channels_last)
        self.teacher = teacher and teacher.to(self.device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.weights, self.averaged = list(self.student.parameters()), list(self.ema.parameters())
        self.optimizer = torch.optim.Adam(self.weights, betas=(0.9, 0.99), fused=True)
        self.forward_backward = lambda lr, hr: forward_backward(self, lr, hr)
        self.step, self.log_bytes = 0, 0
        self.psnr, self.best, self.bicubic = math.nan, -math.inf, math.nan  # held-out
        self.val_every = c.val_every or max(1, min(c.steps // 10, 5000))
        self.log_every = 10 if self.device.type == "cuda" else 1  # a look at the terms makes a GPU wait
        self.last_step = c.steps
        if c.bench:
            self.last_step = self.log_every * (WARM_UP + math.ceil(c.bench / self.log_every))

    def state(self):
        """What last.ckpt holds: all that `restore` needs."""
        return dict(student=self.student.state_dict(), ema=self.ema.state_dict(),
                    optimizer=self.optimizer.state_dict(), step=self.step, psnr=self.psnr, best=self.best,
                    log_bytes=self.log_bytes)

    def restore(self, state):
        """Goes back to a `state`."""
        self.student.load_state_dict(state["student"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.psnr, self.best = state["step"], state["psnr"], state["best"]
        self.log_bytes = state["log_bytes"]

    def save(self):
        """Writes student.pt, best.pt where it is the best so far, and then last.ckpt."""
        raw = self.student.state_dict()
        models.save(self.out / "student.pt", self.ema, raw)
        if self.psnr > self.best:
            self.best = self.psnr
            models.save(self.out / "best.pt", self.ema, raw)
        with models.replacing(self.out / "last.ckpt") as f:
            torch.save(self.state(), f)

    def score(self, make, label):
        """Mean PSNR on Y over the held-out pictures of what `make` makes of their LR, in float32."""
        cudnn = torch.backends.cudnn
        searches, cudnn.benchmark = cudnn.benchmark, False  # it would search anew for each picture's size
        psnr = evaluate.mean_psnr(make, self.held, self.c.scale, label)
        cudnn.benchmark = searches
        return psnr

    def write_row(self, means, validated):
        """Adds a row to log.csv: the mean terms since the row before, and the held-out PSNR if it is new."""
        rate = learning_rate(self.step - 1, self.c)
        psnr = f"{self.psnr:.4f}" if validated else ""
        with open(self.out / "log.csv", "a") as f:
            print(self.step, f"{rate:.3g}", *(f"{mean:.8g}" for mean in means), psnr, sep=",", file=f)
            self.log_bytes = f.tell()

    def check_weights(self):
        """ConfigError where a weight is NaN or infinite: last.ckpt is older, and good."""
        if not torch.nn.utils.get_total_norm(self.weights).isfinite():
            raise ConfigError(f"the weights are not finite after step {self.step}; {self.out} keeps the last "
                              "good state. A lower --lr or --precision float32 may help")


def set_up_device(name):
    """The torch.device of a --device. "cuda", as the default, is this process's own GPU under torchrun."""
    evaluate.keep_freed_memory()
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    device = evaluate.pick_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # cuDNN searches for the fastest algorithm of each shape
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be recorded
    return device


def computes_bfloat16(device):
    """Whether the device has bfloat16 arithmetic of its own. Where it is emulated, it is slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def build_student(c, teacher):
    """The student by name. With --init, it takes every tensor of that file that fits in name and shape, and
    the file's residual scale, mean and range, without which the tensors would mean another function."""
    if Path(c.out, "last.ckpt").exists():  # resumed: its weights come later
        return models.from_config(models.read_file(Path(c.out, "student.pt"))["config"])
    config = models.small(teacher) if c.student == "small" else models.parse(c.student, c.scale)
    given = models.load(c.init) if c.init else None
    if given:
        settings = ("res_scale", "mean", "img_range") if given.config["arch"] == config["arch"] else ()
        config = config | {name: given.config[name] for name in settings if name in given.config}
    student = models.from_config(config)
    if given:
        own, found = student.state_dict(), given.state_dict()
        fitting = {k: v for k, v in found.items() if k in own and own[k].shape == v.shape}
        if lacking := [k for k in own if k not in fitting and not k.startswith("upsample")]:
            shape = f"is {list(found[lacking[0]].shape)}" if lacking[0] in found else "is missing"
            raise ConfigError(f"--init {c.init} does not fit the student: {lacking[0]} {shape} there, and "
                              f"{list(own[lacking[0]].shape)} here ({models.describe(given.config)})")
        student.load_state_dict(fitting, strict=False)
        print(f"init    {len(fitting)} of {len(own)} tensors come from {c.init}", file=sys.stderr)
    return student


def prepare_images(c, rank=0, world=1):
    """The Store of training images, and the held-out ones as [(name, lr, hr)]."""
    images = data.find_images(c.data) or data.embedded_train()
    lr_of = dict(zip(images, data.match_lr(images, c.lr_data, c.scale)))
    held = data.find_images(c.val) or ([] if c.data else data.embedded_val())
    if not held:
        count = min(max(len(images) // 10, 1), 10)
        held = images[::len(images) // count][:count]
        images = [path for path in images if path not in held]
    if not images:
        raise ConfigError(f"{c.data[0]} has one image, which is held out: name others with --val")
    trained_on = {path.resolve() for path in images}
    if shared := [path.name for path in held if path.resolve() in trained_on]:
        print(f"note: {len(shared)} held-out pictures are trained on, too, such as {shared[0]}. Their PSNR "
              "says nothing about new pictures", file=sys.stderr)
    if rank > 0:
        dist.barrier()  # the first process decodes the images, the others find them
    store = data.build_store(images, [lr_of[path] for path in images], c.scale, c.patch, c.cache)
    if rank == 0 and world > 1:
        dist.barrier()
    return store, [(path.stem, *data.read_pair(path, lr_of.get(path), c.scale, 8)) for path in held]


def complete(c, teacher):
    """A copy of c with the recipe's values in place of None. What the settings do not use becomes None.
    ConfigError for a flag that would have no effect."""
    given = {name: value for name, value in vars(c).items() if value is not None}
    c = Config(**vars(c) | recipe(c, teacher) | given)
    if not c.zoom_out and "zoom_out_rec" not in given:
        c.zoom_out_rec = False
    if c.consistency is None:
        c.consistency = "zoom_in" if c.zoom_in else "none"
    if c.lambda_feature is None:
        c.lambda_feature = 10.0 if c.feature == "fakd" else 1.0

    zooms = c.zoom_in or c.zoom_out or c.zoom_out_rec
    upcycles = zooms and c.lambda_dukd
    for used, names, needs in [
        (zooms, ["lambda_dukd"], "zoom-in or zoom-out"),
        (c.lambda_dukd, ["zoom_in", "zoom_out", "zoom_out_rec"], "--lambda-dukd"),
        (c.lambda_rec, ["zoom_out_rec"], "--lambda-rec"),
        (upcycles and c.zoom_in, ["crops"], "zoom-in"),
        (upcycles, ["consistency"], "zoom-in or zoom-out"),
        (upcycles and c.consistency != "none", ["ops", "p"], "--consistency and zoom-in or zoom-out"),
        (c.feature != "none", ["lambda_feature"], "--feature"),
    ]:
        if used:
            continue
        for name in names:
            if given.get(name):
                raise ConfigError(f"{flag(name)} would have no effect: it needs {needs}")
            setattr(c, name, None)
    return c


def recipe(c, teacher):
    """{setting: value} of the row of RECIPES that fits, with what all rows have in common."""
    scale = c.scale or (teacher.scale if teacher else 4)
    family = teacher.config["arch"] if teacher else "edsr"
    names = [f"{c.method} {family} x{scale}", f"{c.method} {family}", c.method]
    row = next(RECIPES[name] for name in names if name in RECIPES)
    return dict(zip(ENTRIES, row), zoom_in=True, ops=[*OPERATIONS], scale=scale)


def flag(name):
    return "--" + name.replace("_", "-")


def changes_to_the_recipe(c):
    """The flags of the losses that c sets itself, as they are typed: ["--no-zoom-out", "--p 0.5"]."""
    typed = []
    for name in LOSS_SETTINGS:
        value = getattr(c, name)
        if isinstance(value, bool):
            typed.append(flag(name if value else f"no_{name}"))
        elif value is not None:
            words = value if isinstance(value, list) else [value]
            typed.append(" ".join(map(str, [flag(name), *words])))
    return typed


def free_name(c, changes):
    """The next free run folder: runs/dukd_no-zoom-out_small_x4_s0, and then …_s0_2."""
    name = "_".join([c.method, *(change[2:].replace(" ", "-") for change in changes), c.student])
    name, number = f"runs/{name}_x{c.scale}_s{c.seed}", 2
    free = name
    while os.path.lexists(free):
        free, number = f"{name}_{number}", number + 1
    return free


def check(c, teacher, world):
    """ConfigError for settings that do not fit together."""
    weights, zooms_out = term_weights(c), c.zoom_out or c.zoom_out_rec
    for wrong, message in [
        (not weights, "every loss term is off: nothing to learn from"),
        (not teacher and {*weights} - {"rec", "zoom_out_rec"}, f"--method {c.method} needs a --teacher"),
        (not teacher and c.student == "small", "--student small needs a --teacher; or name a size"),
        (teacher and c.scale != teacher.scale,
         f"{c.teacher} is a x{teacher and teacher.scale} network, not x{c.scale}: leave --scale out"),
        (c.lambda_feature and teacher and not teacher.taps, f"{c.teacher} has no known features to compare"),
        (c.consistency in ("zoom_in", "both") and not c.zoom_in, "--consistency needs zoom-in"),
        (c.consistency in ("zoom_out", "both") and not zooms_out, "--consistency needs zoom-out"),
        (zooms_out and c.patch % c.scale, f"zoom-out needs a --patch of a multiple of {c.scale}"),
        (c.ops and len({*c.ops}) < len(c.ops), "--ops names an operation twice"),
        (c.batch % world, f"--batch {c.batch} cannot be shared by {world} processes"),
        (not c.resume and Path(c.out, "config.json").exists(),
         f"{c.out} holds a run: give --resume to go on with it, or another --out"),
        (not c.resume and os.path.lexists(c.out), f"{c.out} exists: name another --out"),
    ]:
        if wrong:
            raise ConfigError(message)


def start(run, command):
    """Makes the run folder, or goes back to the last checkpoint of an old one. Says what is about to run."""
    c = run.c
    resumed = c.resume and (run.out / "last.ckpt").exists()
    if resumed:
        run.restore(models.read_file(run.out / "last.ckpt"))
    if run.rank > 0:
        return
    summands = [f"{weight:g}·{name}" for name, weight in term_weights(c).items()]
    if resumed:
        os.truncate(run.out / "log.csv", run.log_bytes)
        print(f"resumed after step {run.step} of {c.steps}")
    else:
        run.out.mkdir(parents=True, exist_ok=c.resume)
        about = dict(config=dataclasses.asdict(c), held_out=[name for name, _, _ in run.held],
                     **evaluate.provenance(command, run.device))
        with models.replacing(run.out / "config.json") as f:
            f.write(json.dumps(about, indent=1).encode())
        (run.out / "log.csv").write_text(f"step,lr,{','.join(summands)},total,val_psnr\n", encoding="utf-8")
    print(f"data    {len(run.patches.store.names)} images to train on, {len(run.held)} held out")
    for role, net in (("teacher", run.teacher), ("student", run.student)):
        if net:
            size = models.parameters(net) / 1e6
            print(f"{role} {models.describe(net.config)}: {size:.2f} M parameters", flush=True)
    run.bicubic = run.score(evaluate.resizer(c.scale), "bicubic")
    teacher = ""
    if run.teacher:
        teacher = f", teacher {run.score(evaluate.upscaler(run.teacher), 'teacher'):.2f} dB"
    print(f"held-out PSNR: bicubic {run.bicubic:.2f} dB{teacher}")
    print("recipe ", c.method, *run.changes, f"(seed {c.seed}): L = {' + '.join(summands)}")
    print(f"run     {c.out}: {c.steps} steps of {c.batch} on {run.device} in {c.precision}", flush=True)


def warn_of_a_long_run(run, times):
    """Says after 20 steps on a CPU that the run will take days, and how to get a short one."""
    days = (run.last_step - run.step) * (times[-1] - times[0]) / (len(times) - 1) / 86400
    if run.device.type == "cpu" and days > 1:
        tqdm.write(f"note: on this CPU the run will take {days:.0f} days. It can be stopped and resumed at "
                   f"any time. A run of minutes: {SHORT_RUN}", file=sys.stderr)


def finish(run):
    """The last lines: how good the student is and where, or how to go on."""
    c = run.c
    if run.step < c.steps:
        run.save()
        print(f"stopped after step {run.step} of {c.steps}; go on with: "
              f"python train.py --resume --out {shlex.quote(c.out)}")
        return
    makers = dict(bicubic=evaluate.resizer(c.scale))
    if run.teacher:
        makers["teacher"] = evaluate.upscaler(run.teacher)
    makers["student"] = evaluate.upscaler(run.ema)
    with torch.compiler.set_stance("force_eager"):  # else the teacher's blocks are compiled for this picture
        evaluate.write_figure(run.out / "compare.png", makers, *run.held[0], c.scale)
    print(f"held-out PSNR: bicubic {run.bicubic:.2f} dB, student {run.psnr:.2f} dB (best {run.best:.2f})")
    print(f"in {c.out}: student.pt, best.pt (best held-out PSNR), compare.png, log.csv")


def accelerate(run):
    """Makes run.forward_backward as fast as the device allows. The results change by rounding only."""
    c, cuda = run.c, run.device.type == "cuda"
    if not (cuda if c.compile is None else c.compile):
        return
    networks = [net for net in (run.teacher, run.student) if net]
    blocks = [m for net in networks for m in net.modules() if isinstance(m, models.BLOCKS)]
    torch._dynamo.config.recompile_limit = 32  # widths, batch sizes and masks of teacher and student
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
    pair = draw_patches(run.patches, c, run.step, run.rank, run.world)
    try:
        run.forward_backward(*pair)
    except Exception as e:  # no compiler, an operation that it does not know, …
        print(f"note: torch.compile fails here, the networks run without: {e!r:.120}", file=sys.stderr)
        for block in blocks:
            del block.forward
    if cuda and not waits_for_the_gpu(run.forward_backward, pair):
        run.forward_backward = Recorded(run.forward_backward, pair)


def waits_for_the_gpu(function, pair):
    """Whether a step reads a value from the GPU, as a foreign teacher may: it cannot be recorded then.
    It is asked before the recording, since a recording that fails leaves the random generator unusable."""
    for _ in range(2):  # the libraries choose their algorithms, which waits
        function(*pair)
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*pair)
    except RuntimeError as e:
        print(f"note: the step waits for the GPU, and is not recorded: {e!r:.120}", file=sys.stderr)
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


class Recorded:
    """`forward_backward` as one CUDA graph, which is launched at once instead of kernel by kernel.
    A call copies its pair, I_LR and I_HR, into the recorded one. What the step draws is new in each replay,
    since the generator is seeded before (`draw_patches`). Only the recorded function may set gradients to
    None."""

    def __init__(self, function, pair):
        self.pair, self.graph = pair, torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.result = function(*pair)
        except RuntimeError as e:
            raise ConfigError(f"the step cannot be recorded as a CUDA graph: give --no-compile ({e})") from e

    def __call__(self, *pair):
        for recorded, new in zip(self.pair, pair):
            recorded.copy_(new)
        self.graph.replay()
        return self.result.clone()


WARM_UP = 5  # looks at the terms before --bench counts


def print_bench(run, times, command):
    """--bench N: prints the median time of a step and the memory, as one line of JSON."""
    seconds = np.diff(times) / run.log_every  # of a step, between two looks at the terms, as in training
    result = dict(ms_per_step=round(1000 * float(np.median(seconds[WARM_UP:])), 3),
                  warm_up_s=round(times[WARM_UP] - times[0], 2), processes=run.world,
                  peak_memory_gib=evaluate.peak_memory(run.device), config=dataclasses.asdict(run.c),
                  **evaluate.provenance(command, run.device))
    print(json.dumps(result))


GROUPS = dict(teacher="networks and images", steps="training",
              lambda_rec="losses (what is not given is the recipe's)",
              device="how it runs")
NAMES = [field.name for field in dataclasses.fields(Config)]
LOSS_SETTINGS = NAMES[NAMES.index("lambda_rec"):NAMES.index("device")]
MAY_CHANGE = {"out", "resume", "device", "compile", "cache", "val_every"}  # with --resume


def parse(argv):
    """The command line as a Config. With --resume, the run's own Config, which other flags may not change."""
    layout = argparse.RawDescriptionHelpFormatter
    group = parser = evaluate.Parser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    for f in dataclasses.fields(Config):
        group = parser.add_argument_group(GROUPS[f.name]) if f.name in GROUPS else group
        settings = dict(f.metadata, default=argparse.SUPPRESS)
        if f.default:
            settings["help"] += f" [{f.default}]"
        group.add_argument(flag(f.name), **settings)
    given = vars(parser.parse_args(argv))
    return saved_config(given) if "resume" in given else Config(**given)


def saved_config(given):
    """The Config of the run in --out, with those given settings that may change."""
    out = given.get("out")
    if not out:
        raise ConfigError("--resume needs --out, the folder of the run")
    try:
        c = Config(**json.loads(Path(out, "config.json").read_text())["config"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"--out {out} is no run to resume: it has no readable config.json") from None
    for name, value in given.items():
        if name not in MAY_CHANGE and value != getattr(c, name):
            hint = f"; a longer run can start with --init {out}/student.pt" if name == "steps" else ""
            raise ConfigError(f"{flag(name)} {value} contradicts the run in {out} ({getattr(c, name)}){hint}")
    return dataclasses.replace(c, **{name: given[name] for name in MAY_CHANGE & {*given}})


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    with evaluate.command_line(ConfigError):
        train(parse(argv), command=shlex.join(["python", "train.py", *argv]))


if __name__ == "__main__":
    main()
