"""Distil a small super-resolution network from a large frozen one (DUKD, arXiv 2309.14162).

    python train.py --teacher edsr_baseline.pt --student small              on scikit-image's pictures
    python train.py --teacher FILE --student small --data DIV2K_train_HR    on your own
    python train.py --student edsr_baseline --method scratch --data DIR     train a teacher
    torchrun --nproc_per_node=2 train.py --teacher FILE --data DIR          one batch on two GPUs
    python train.py --resume --out runs/NAME                                go on where a run stopped

Read downward: the settings, one update, the loop, the run, what it needs, what is faster, the command line.
"""
import argparse
import copy
import dataclasses
import datetime
import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

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

# A method is a row of defaults. Every flag overrides its entry, so the terms of several methods combine.
METHODS = {
    "dukd": dict(lambda_rec=1.0, lambda_kd=1.0, lambda_dukd=1.0, feature="none"),  # the paper's equation
    "dukd_released": dict(lambda_rec=5.0, lambda_kd=1.0, lambda_dukd=0.5, feature="none"),  # RCAN: `complete`
    "kd": dict(lambda_rec=1.0, lambda_kd=1.0, lambda_dukd=0.0, feature="none"),
    "scratch": dict(lambda_rec=1.0, lambda_kd=0.0, lambda_dukd=0.0, feature="none"),
    "fitnet": dict(lambda_rec=1.0, lambda_kd=0.0, lambda_dukd=0.0, feature="fitnet"),
    "at": dict(lambda_rec=1.0, lambda_kd=0.0, lambda_dukd=0.0, feature="at"),
    "fakd": dict(lambda_rec=1.0, lambda_kd=1.0, lambda_dukd=0.0, feature="fakd"),
}
FEATURE_LOSSES = {"fitnet": fitnet_loss, "at": at_loss, "fakd": fakd_loss}
OPERATIONS = InvertibleAugmentation.OPERATIONS


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
    """Everything that a run depends on. None stands for the released code's value: see `complete`."""
    teacher: str = option("", "checkpoint of the frozen teacher f_T, of any known format", metavar="FILE")
    student: str = option("small", f"the student f_S: small (the paper's), {models.NAMES_HELP}")
    method: str = option("dukd", "the defaults of the losses", choices=[*METHODS])
    scale: int = option(None, "s (the teacher's, else 4)", choices=models.SCALES, type=int)
    data: list = option((), "folders of HR training images (scikit-image's photographs)", **DIRS)
    lr_data: list = option((), "folders of their LR images (made): 0001x4.png for 0001.png", **DIRS)
    val: list = option((), "folders of held-out HR images, LR is made (1 to 10 of --data)", **DIRS)
    init: str = option("", "checkpoint that the student starts from, of any scale", metavar="FILE")
    out: str = option("", "run folder (the next free runs/METHOD_STUDENT_xSCALE)", metavar="DIR")
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
    zoom_in: bool = option(None, "learn labels of HR crops (with λ_dukd)", action=SWITCH)
    zoom_out: bool = option(None, "learn labels of reduced LR patches (EDSR, RCAN x3)", action=SWITCH)
    zoom_out_rec: bool = option(None, "learn I_LR from reduced LR patches (with zoom-out)", action=SWITCH)
    crops: int = option(None, "zoom-in crops of each HR patch (1; EDSR x2: 2)", type=between(1, 1024, int))
    consistency: str = option(None, "what passes through F (zoom_in)",
                              choices=("zoom_in", "zoom_out", "both", "none"))
    ops: list = option(None, "operations of F (all)", choices=OPERATIONS, nargs="+")
    p: float = option(None, "probability of each operation of F (0.3; RCAN x2, x4: 0)", type=between(0, 1))
    feature: str = option(None, "feature loss, summed over four taps", choices=("none", *FEATURE_LOSSES))
    lambda_feature: float = option(None, "weight of the feature loss (fakd 10, others 1)", type=WEIGHT)

    device: str = option("", "cpu, cuda, cuda:1, … (cuda where there is one)", metavar="NAME")
    precision: str = option("auto", "of the networks; auto: bfloat16 where the device computes in it",
                            choices=("auto", "float32", "bfloat16"))
    compile: bool = option(None, "torch.compile and a recorded CUDA graph (on CUDA)", action=SWITCH)
    cache: str = option("", "folder for large sets of decoded images (~/.cache/dukd)", metavar="DIR")
    val_every: int = option(None, "steps between validations (a tenth of the run, at most 5000)", type=COUNT)
    bench: int = option(0, "time N steps, print one line of JSON, write nothing", metavar="N", type=COUNT)


def sample_batch(patches, c, step, rank=0, world=1):
    """(I_LR, I_HR, z of zoom-in, z of zoom-out, the F of each z). A z that no term needs is None.
    All that is random is a function of (seed, step): every process draws the same batch and returns its part.
    The patches are drawn first, so that every method sees the same ones."""
    torch.manual_seed(c.seed * 1_000_003 + step)
    lr, hr = patches.sample(c.batch)
    turn = InvertibleAugmentation.sample(c.batch, ("hflip", "vflip", "transpose"), 0.5, device=lr.device)
    lr, hr = turn.apply(lr), turn.apply(hr)
    z_in = zoom_in(hr.repeat_interleave(c.crops, 0), c.patch) if c.zoom_in else None
    z_out = zoom_out(lr, c.scale) if c.zoom_out or c.zoom_out_rec else None
    ops_in, ops_out = (c.ops if c.consistency in (name, "both") else () for name in ("zoom_in", "zoom_out"))
    F_in = InvertibleAugmentation.sample(c.batch * c.crops, ops_in, c.p, device=lr.device)
    F_out = InvertibleAugmentation.sample(c.batch, ops_out, c.p, device=lr.device)
    whole = (lr, hr, z_in, z_out, F_in, F_out)
    return tuple(x if x is None else x[len(x) * rank // world:len(x) * (rank + 1) // world] for x in whole)


def losses(student, teacher, batch, c):
    """Every term of L, times its λ: {name: scalar}. Their sum is L. Only the student gets gradients."""
    lr, hr, z_in, z_out, F_in, F_out = batch
    s_taps, t_taps = (net.taps if c.lambda_feature else () for net in (student, teacher))
    with torch.autocast(lr.device.type, torch.bfloat16, enabled=c.precision == "bfloat16"):
        with torch.no_grad(), tapped(teacher, t_taps) as t_features:
            x = lr if c.lambda_kd or c.lambda_feature else None
            t_lr, t_in, t_out = together(teacher, x, z_in, z_out if c.zoom_out else None)
        with tapped(student, s_taps) as s_features:
            s_lr, s_in, s_out = together(student, lr, F_in.apply(z_in), F_out.apply(z_out))

    n = len(lr)  # features are compared for I_LR alone: F has moved those of z
    pairs = [(s_features[s][:n], t_features[t][:n]) for s, t in zip(s_taps, t_taps)]
    terms = dict(rec=lambda: l1_loss(s_lr, hr),  # functions: a term that is off has no inputs
                 kd=lambda: l1_loss(s_lr, t_lr),
                 zoom_in=lambda: dukd_loss(s_in, t_in, F_in),
                 zoom_out=lambda: dukd_loss(s_out, t_out, F_out),
                 zoom_out_rec=lambda: dukd_loss(s_out, lr, F_out),
                 feature=lambda: sum(FEATURE_LOSSES[c.feature](s, t) for s, t in pairs))
    return {name: weight * terms[name]() for name, weight in term_weights(c).items()}


def gradients(run, batch):
    """L of a batch, and its gradient in .grad. Returns every term and their sum, (k,), without gradient."""
    terms = losses(run.student, run.teacher, batch, run.c)
    total = sum(terms.values())
    run.optimizer.zero_grad()
    total.backward()
    return torch.stack([*terms.values(), total]).detach()


def update(run, batch):
    """One step: L and its gradient, Adam, the averaged weights. Returns what `gradients` does."""
    terms = run.gradients(batch)
    average_over_processes([terms, *(w.grad for w in run.weights if w.grad is not None)], run.world)
    run.optimizer.param_groups[0]["lr"] = learning_rate(run.step, run.c)
    run.optimizer.step()
    decay = min(run.c.ema, (1 + run.step) / (10 + run.step))  # forgets the random start soon
    with torch.no_grad():
        torch._foreach_lerp_(run.averaged, run.weights, 1 - decay)
    return terms


def learning_rate(step, c):
    """Of update `step`, counted from 0: ×0.1 at 40 % and at 80 % of the run, or half a cosine to zero."""
    if c.schedule == "cosine":
        return c.lr * 0.5 * (1 + math.cos(math.pi * step / c.steps))
    return c.lr * 0.1 ** sum(step >= milestone * c.steps for milestone in (0.4, 0.8))


def average_over_processes(tensors, world):
    """Gives each of `world` processes the mean of each tensor, with one exchange."""
    if world > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, mean in zip(tensors, (flat / world).split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))


def train(c, command=""):
    """One run, from a Config to a student in its folder. Returns the Run.
    ConfigError, DataError, CheckpointError or OSError where settings or files cannot be used."""
    run = Run(c)
    if run.c.bench:
        return bench(run, command)
    start(run, command)
    accelerate(run)
    stop = []

    def finish_step(number, frame):  # a second signal ends the program
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)
    handlers = {number: signal.signal(number, finish_step) for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=run.c.steps, initial=run.step, disable=run.rank > 0, ncols=80, mininterval=0.5,
               bar_format="{n_fmt}/{total_fmt} {bar} {remaining} left{postfix}")
    while run.step < run.c.steps and not (run.step % run.log_every == 0 and agreed(stop, run)):
        run.terms.append(update(run, sample_batch(run.patches, run.c, run.step, run.rank, run.world)))
        run.step += 1
        validating = run.step % run.val_every == 0 or run.step == run.c.steps
        if validating or run.step % run.log_every == 0:
            loss = run.log(validating)
            psnr = f"{run.psnr:.2f}" if run.psnr > 0 else "?"  # not validated yet
            bar.set_postfix_str(f"loss {loss:.4f}, {psnr} dB (bicubic {run.bicubic:.2f})", False)
        if validating and run.rank == 0:
            run.save()
        bar.update()
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if run.rank == 0:
        finish(run)
    if run.world > 1:
        dist.destroy_process_group()
    if stop:
        raise SystemExit(128 + stop[0])
    return run


def agreed(stop, run):
    """Whether any process got a signal. They ask each other: a signal comes at different steps."""
    flag = torch.tensor([float(len(stop))], device=run.device)
    average_over_processes([flag], run.world)
    return flag.item() > 0


class ConfigError(ValueError):
    """A setting that cannot be used. The message says which, why, and what to do."""


class Run:
    """Networks, images and device of a Config; all that changes while training; the folder that keeps it."""

    def __init__(self, c):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w")  # the first process speaks for all
        evaluate.keep_freed_memory()
        local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        self.device = evaluate.pick_device(c.device or local)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.cuda.set_device(self.device)
            torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be recorded
        teacher = models.load(c.teacher).requires_grad_(False) if c.teacher else None
        self.c = c = complete(c, teacher)
        if c.precision == "auto":
            c.precision = "bfloat16" if computes_bfloat16(self.device) else "float32"
        names = (f"runs/{c.method}_{c.student}_x{c.scale}_{i}" for i in itertools.count(1))
        c.out = c.out or next(name for name in names if not os.path.lexists(name))
        self.out = Path(c.out)
        check(c, teacher, self.world)
        torch.manual_seed(c.seed)
        student = build_student(c, teacher)
        if self.world > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
        store, self.held = prepare_images(c, self.rank, self.world)
        self.patches = data.Patches(store, c.patch, c.scale, self.device)
        self.options = argparse.Namespace(scale=c.scale, device=self.device, tile=512, self_ensemble=False)
        self.student, self.teacher = (net and net.to(self.device, memory_format=torch.channels_last)
                                      for net in (student, teacher))
        self.ema = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.weights, self.averaged = list(self.student.parameters()), list(self.ema.parameters())
        self.optimizer = torch.optim.Adam(self.weights, betas=(0.9, 0.99), fused=True)
        self.gradients = lambda batch: gradients(self, batch)
        self.val_every = c.val_every or max(1, min(c.steps // 10, 5000))
        self.log_every = 10 if self.device.type == "cuda" else 1  # a look at the terms makes a GPU wait
        self.terms = []  # what `update` returned since the last row of log.csv
        self.step, self.psnr, self.best, self.bicubic, self.log_bytes = 0, math.nan, -math.inf, math.nan, 0

    def score(self, net, name):
        """Mean PSNR on Y over the held-out pictures of a network in float32, or of "bicubic"."""
        bar = tqdm(self.held, desc=f"held-out pictures, {name}", leave=False, delay=1, ncols=80)
        pairs = ((evaluate.enlarge(net, name, lr, self.options), hr) for _, lr, hr in bar)
        return float(np.mean([evaluate.psnr_y(sr, hr, self.c.scale) for sr, hr in pairs]))

    def log(self, validating):
        """Adds a row to log.csv: the mean terms since the last row, the held-out PSNR. Returns the mean loss.
        ConfigError where a weight is NaN or infinite: last.ckpt is older, and good."""
        means, self.terms = torch.stack(self.terms).cpu().mean(0).tolist(), []
        if not torch.nn.utils.get_total_norm(self.weights).isfinite():
            raise ConfigError(f"the weights are not finite after step {self.step}; {self.out} keeps the last "
                              "good state. A lower --lr or --precision float32 may help")
        if self.rank == 0:
            if validating:
                self.psnr = self.score(self.ema, "student")
            rate, psnr = learning_rate(self.step - 1, self.c), f"{self.psnr:.4f}" if validating else ""
            with open(self.out / "log.csv", "a") as f:
                print(self.step, f"{rate:.3g}", *(f"{mean:.8g}" for mean in means), psnr, sep=",", file=f)
                self.log_bytes = f.tell()
        return means[-1]

    def save(self):
        """Writes student.pt, best.pt where it is the best, and then last.ckpt, all that --resume needs."""
        raw = self.student.state_dict()
        models.save(self.out / "student.pt", self.ema, raw)
        if self.psnr > self.best:
            self.best = self.psnr
            models.save(self.out / "best.pt", self.ema, raw)
        with models.replacing(self.out / "last.ckpt") as f:
            torch.save(dict(student=raw, ema=self.ema.state_dict(), optimizer=self.optimizer.state_dict(),
                            step=self.step, psnr=self.psnr, best=self.best, log_bytes=self.log_bytes), f)


def complete(c, teacher):
    """A copy of c with the released code's values for these networks in place of None.
    What the settings do not use becomes 0, False or empty. ConfigError where it was given."""
    c = dataclasses.replace(c, scale=c.scale or (teacher.scale if teacher else 4))
    family, row = teacher.config["arch"] if teacher else "edsr", METHODS[c.method]
    released, rcan_x3 = c.method == "dukd_released", family == "rcan" and c.scale == 3
    if released and family == "rcan":
        row = row | dict(lambda_rec=2.0 if rcan_x3 else 1.0)

    def fill(used, needs, **defaults):  # needs: what would make the settings used
        for name, value in defaults.items():
            if getattr(c, name) and not used:
                raise ConfigError(f"{flag(name)} would have no effect: it needs {needs}")
            if getattr(c, name) is None:
                setattr(c, name, value if used else type(value)())

    fill(True, "", **row)
    fill(c.feature != "none", "--feature", lambda_feature=10.0 if c.feature == "fakd" else 1.0)
    fill(c.lambda_dukd, "--lambda-dukd", zoom_in=True, zoom_out=not released or family == "edsr" or rcan_x3)
    fill(c.lambda_rec and c.lambda_dukd, "--lambda-rec and --lambda-dukd", zoom_out_rec=c.zoom_out)
    fill(c.zoom_in, "zoom-in", crops=2 if released and family == "edsr" and c.scale == 2 else 1)
    fill(c.zoom_in or c.zoom_out or c.zoom_out_rec, "zoom-in or zoom-out",
         consistency="zoom_in" if c.zoom_in else "none")
    fill(c.consistency not in ("", "none"), "--consistency and zoom-in or zoom-out",
         ops=[*OPERATIONS], p=0.0 if released and family == "rcan" and not rcan_x3 else 0.3)
    return c


def term_weights(c):
    """{name: λ} of the terms that `losses` returns, in its order."""
    weights = dict(rec=c.lambda_rec, kd=c.lambda_kd, zoom_in=c.zoom_in and c.lambda_dukd,
                   zoom_out=c.zoom_out and c.lambda_dukd,
                   zoom_out_rec=c.zoom_out_rec and c.lambda_dukd * c.lambda_rec, feature=c.lambda_feature)
    return {name: weight for name, weight in weights.items() if weight}


def check(c, teacher, world):
    """ConfigError for settings that do not fit together."""
    terms, zooms_out = term_weights(c), c.zoom_out or c.zoom_out_rec
    for wrong, message in [
        (not terms, "every loss term is off: nothing to learn from"),
        (not teacher and {*terms} - {"rec", "zoom_out_rec"}, f"--method {c.method} needs a --teacher"),
        (not teacher and c.student == "small", "--student small needs a --teacher; or name a size"),
        (teacher and c.scale != teacher.scale, f"{c.teacher} is no x{c.scale} network: leave --scale out"),
        (c.lambda_feature and teacher and not teacher.taps, f"{c.teacher} has no known features to compare"),
        (c.consistency in ("zoom_in", "both") and not c.zoom_in, "--consistency needs zoom-in"),
        (c.consistency in ("zoom_out", "both") and not zooms_out, "--consistency needs zoom-out"),
        (zooms_out and c.patch % c.scale, f"zoom-out needs a --patch of a multiple of {c.scale}"),
        (len({*c.ops}) < len(c.ops), f"--ops names an operation twice: {' '.join(c.ops)}"),
        (c.batch % world, f"--batch {c.batch} cannot be shared by {world} processes"),
        (not c.resume and os.path.lexists(c.out), f"{c.out} exists: give --resume, or another --out"),
    ]:
        if wrong:
            raise ConfigError(message)


def computes_bfloat16(device):
    """Whether the device has bfloat16 arithmetic of its own. Where it is emulated, it is slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def build_student(c, teacher):
    """The student by name. With --init, it takes every tensor of that file that fits in name and shape."""
    config = models.small(teacher) if c.student == "small" else models.parse(c.student, c.scale)
    student = models.from_config(config)
    if c.init and not Path(c.out, "last.ckpt").exists():
        own, given = student.state_dict(), models.load(c.init).state_dict()
        fitting = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape}
        if lacking := [k for k in own if k not in fitting and not k.startswith("upsample")]:
            raise ConfigError(f"--init {c.init} does not fit the student: {lacking[0]} is missing or differs")
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
    cache = c.cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dukd"
    if rank > 0:
        dist.barrier()  # the first process decodes the images, the others find them
    store = data.build_store(images, [lr_of[path] for path in images], c.scale, c.patch, cache)
    if rank == 0 and world > 1:
        dist.barrier()
    return store, [(path.stem, *data.read_pair(path, lr_of.get(path), c.scale, 8)) for path in held]


def start(run, command):
    """Makes the run folder, or goes back to the last checkpoint of an old one. Says what is about to run."""
    c = run.c
    if c.resume and (run.out / "last.ckpt").exists():
        state = models.read_file(run.out / "last.ckpt")
        for name in ("student", "ema", "optimizer"):
            getattr(run, name).load_state_dict(state.pop(name))
        vars(run).update(state)
    if run.rank > 0:
        return
    terms = [f"{weight:g}·{name}" for name, weight in term_weights(c).items()]
    if run.step > 0:
        os.truncate(run.out / "log.csv", run.log_bytes)
        print(f"resumed after step {run.step} of {c.steps}")
    else:
        run.out.mkdir(parents=True, exist_ok=c.resume)
        about = dict(config=dataclasses.asdict(c), held_out=[name for name, _, _ in run.held],
                     **evaluate.provenance(command, run.device))
        with models.replacing(run.out / "config.json") as f:
            f.write(json.dumps(about, indent=1).encode())
        (run.out / "log.csv").write_text(f"step,lr,{','.join(terms)},total,val_psnr\n", encoding="utf-8")
    print(f"data    {len(run.patches.store.names)} images to train on, {len(run.held)} held out")
    for role, net in (("teacher", run.teacher), ("student", run.student)):
        if net:
            size = models.parameters(net) / 1e6
            print(f"{role} {models.describe(net.config)}: {size:.2f} M parameters", flush=True)
    run.bicubic = run.score("bicubic", "bicubic")
    teacher = f", teacher {run.score(run.teacher, 'teacher'):.2f} dB" if run.teacher else ""
    print(f"held-out PSNR: bicubic {run.bicubic:.2f} dB{teacher}")
    print(f"run     {c.out}: {c.steps} steps of {c.batch} on {run.device} in {c.precision}; "
          f"L = {' + '.join(terms)}", flush=True)


def finish(run):
    """The last lines: how good the student is and where, or how to go on."""
    if run.step < run.c.steps:
        run.save()
        print(f"stopped after step {run.step} of {run.c.steps}; go on with: "
              f"python train.py --resume --out {shlex.quote(run.c.out)}")
    else:
        teacher = dict(teacher=run.teacher) if run.teacher else {}
        rows = dict(bicubic="bicubic", **teacher, student=run.ema)
        evaluate.write_figure(run.out / "compare.png", rows, *run.held[0], run.options)
        print(f"held-out PSNR: bicubic {run.bicubic:.2f} dB, student {run.psnr:.2f} dB (best {run.best:.2f})")
        print(f"in {run.out}: student.pt, best.pt (best held-out PSNR), compare.png, log.csv")


def accelerate(run):
    """Makes run.gradients as fast as the device allows. The results change by rounding only."""
    c, cuda = run.c, run.device.type == "cuda"
    if not (cuda if c.compile is None else c.compile):
        return
    networks = [net for net in (run.teacher, run.student) if net]
    blocks = [m for net in networks for m in net.modules() if isinstance(m, models.BLOCKS)]
    torch._dynamo.config.recompile_limit = 32  # widths, batch sizes and masks of teacher and student
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
    batch = sample_batch(run.patches, c, run.step, run.rank, run.world)
    try:
        run.gradients(batch)
    except Exception as e:  # no compiler, an operation that it does not know, …
        print(f"note: torch.compile fails here, the networks run without: {e!r:.120}", file=sys.stderr)
        for block in blocks:
            del block.forward
    if cuda:
        try:
            run.gradients = Recorded(run.gradients, batch)
        except RuntimeError as e:  # a foreign teacher that waits for the GPU, say
            print(f"note: the step cannot be recorded as a CUDA graph: {e!r:.120}", file=sys.stderr)


class Recorded:
    """A function of a batch as one CUDA graph, which is launched at once instead of kernel by kernel.
    A call copies its batch into the recorded one. Only `function` may set gradients to None."""

    def __init__(self, function, batch):
        for _ in range(3):  # the libraries choose their algorithms
            function(batch)
        self.batch, self.graph = batch, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            self.result = function(batch)

    def __call__(self, batch):
        for recorded, new in zip(self.batch, batch):
            if new is not None:
                getattr(recorded, "masks", recorded).copy_(getattr(new, "masks", new))  # an F, or a tensor
        self.graph.replay()
        return self.result.clone()


def bench(run, command):
    """--bench N: prints the median time of N steps after a warm-up, and the memory, as one line of JSON."""
    c, marks, warm_up = run.c, [time.perf_counter()], 6
    accelerate(run)
    for run.step in tqdm(range(warm_up + c.bench), desc="steps", leave=False, ncols=80, disable=run.rank > 0):
        update(run, sample_batch(run.patches, c, run.step, run.rank, run.world)).tolist()  # waits for the GPU
        marks.append(time.perf_counter())
    seconds = np.diff(marks)
    result = dict(ms_per_step=round(1000 * float(np.median(seconds[warm_up:])), 3),
                  warm_up_s=round(float(seconds[:warm_up].sum()), 2), processes=run.world,
                  peak_memory_gib=evaluate.peak_memory(run.device), config=dataclasses.asdict(c),
                  **evaluate.provenance(command, run.device))
    print(json.dumps(result))
    return run


GROUPS = dict(teacher="networks and images", steps="training (paper, section 4.1)",
              lambda_rec="losses (paper, section 3; in brackets: the released code's)", device="how it runs")
MAY_CHANGE = {"out", "resume", "device", "compile", "cache", "val_every"}  # with --resume


def flag(name):
    return "--" + name.replace("_", "-")


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
    return resumed(given) if "resume" in given else Config(**given)


def resumed(given):
    """The Config of the run in --out, with those given settings that may change."""
    out = given.get("out", "")
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
    with evaluate.errors_in_one_line(ConfigError):
        train(parse(argv), command=shlex.join(["python", "train.py", *argv]))


if __name__ == "__main__":
    main()
