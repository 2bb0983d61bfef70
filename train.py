"""Distil a small super-resolution network from a large frozen one (DUKD, arXiv 2309.14162).

    python train.py --teacher edsr_baseline.pt --student small              on scikit-image's pictures
    python train.py --teacher FILE --student small --data DIV2K_train_HR    on your own
    python train.py --student edsr_baseline --method scratch --data DIR     train a teacher
    torchrun --nproc_per_node=2 train.py --teacher FILE --data DIR          one batch on two GPUs
    python train.py --resume runs/NAME                                      go on where a run stopped

Read downward: settings, step, loop, what a run is and keeps, its set-up, folder and end, speed on CUDA.
"""
import argparse
import contextlib
import copy
import datetime
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

import data
import dukd
import evaluate
import models
from evaluate import FILE, between
from models import InputError

QUICK = dict(steps=1300, batch=2, patch=24, lr=1.4e-3, schedule="cosine")
MAY_CHANGE = {"resume", "teacher", "data", "val", "cache", "device", "compile", "val-every"}  # at --resume
# How long torchrun's processes wait for each other: at the start; in training, while the first one scores.
RENDEZVOUS, SCORING = datetime.timedelta(minutes=10), datetime.timedelta(hours=5)

COUNT, SIZE = between(1, 10**9, int), between(1, 10**4, int)
OPERATIONS = list(dukd.InvertibleAugmentation.OPERATIONS)


def run_folder(text):
    """An argparse type: a run's folder, or a file in it."""
    path = Path(text).expanduser()
    return str(path.parent if path.is_file() else path)


def parse(argv):
    """The command line as argparse's namespace. Typed flags win, then the run to --resume, then --quick, then
    --method, then the built-in defaults."""
    methods = "the weights of each --method:"
    for name, weights in dukd.METHODS.items():
        methods += f"\n  {name:8} L = {equation(weights)}"
    p = evaluate.Parser(description=__doc__, epilog=methods, add_help=False, allow_abbrev=False,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    group = p.add_argument_group
    add = group("what sets the defaults of the others").add_argument
    add("--method", choices=dukd.METHODS, default="dukd", help="weights of the loss, see below")
    add("--quick", action="store_true", help="minutes on a CPU: 1300 steps of two small patches")
    add("--resume", type=run_folder, metavar="DIR", help="go on with this run")

    add = group("networks and pictures").add_argument
    add("--teacher", type=FILE, metavar="FILE", default="", help="the frozen f_T")
    add("--student", default="small", help=f"f_S: small (the paper's, or half as wide), {models.NAMES_HELP}")
    add("--scale", type=int, choices=models.SCALES, default=0, help="s [the teacher's, else 4]")
    add("--data", type=FILE, nargs="+", default=[], metavar="DIR", help="HR [scikit-image's]")
    add("--val", type=FILE, nargs="+", default=[], metavar="DIR",
        help="held-out HR [a tenth of --data, 1 to 10]")
    add("--init", type=FILE, metavar="FILE", default="", help="what the student starts from")
    add("--out", type=FILE, metavar="DIR", default="", help="[a new runs/METHOD_STUDENT_xSCALE]")

    add = group("training").add_argument
    add("--steps", type=COUNT, default=250_000, help="updates of the whole run [%(default)s]")
    add("--batch", type=SIZE, default=16, help="pairs in an update, in all [%(default)s]")
    add("--patch", type=SIZE, default=48, help="LR patch, pixels; HR: s times that [%(default)s]")
    add("--lr", type=between(1e-12, 1), default=1e-4, help="Adam's rate at first [%(default)s]")
    add("--schedule", choices=("step", "cosine"), default="step",
        help="step: x0.1 at 40%% and 80%% of the run; cosine: to zero [%(default)s]")
    add("--ema", type=between(0, 0.999999), default=0.999, help="decay of the EMA [%(default)s]")
    add("--seed", type=between(0, 10**6, int), default=0, help="of all draws [%(default)s]")

    add = group("the loss: the weight λ of each term (0: off), and what the terms see").add_argument
    for term, formula in dukd.TERMS.items():
        add(f"--lambda-{term.replace('_', '-')}", type=between(0, 1e6), help=f"{formula} [%(default)s]")
    add("--crops", type=SIZE, default=1, help="zoom-in crops of each HR patch [%(default)s]")
    add("--p", type=between(0, 1), default=0.3, help="probability of each operation [%(default)s]")
    add("--ops", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="operations of F [all]")
    add("--augment-zoom-out", action="store_true", help="F acts on zoom-out, too")

    add = group("how it runs").add_argument
    add("--device", metavar="NAME", default="", help="cpu, cuda:1, … [cuda where there is one]")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of the networks [auto: bfloat16 where the device computes in it]")
    add("--compile", choices=("graph", "blocks", "no"), default="graph",
        help="on CUDA: the networks' blocks; graph: the step is recorded, too [%(default)s]")
    add("--cache", type=FILE, metavar="DIR", default="runs/cache", help="decoded pictures [%(default)s]")
    add("--val-every", metavar="STEPS", type=between(0, 10**9, int), default=0,
        help="between validations [a tenth of the run, at most 5000]; also at step 100")

    chosen, _ = p.parse_known_args(argv)  # with no --help yet, which shows the defaults that are set now
    p.add_argument("-h", "--help", action="help", help="show this text")
    for term in dukd.TERMS:
        p.set_defaults(**{f"lambda_{term}": float(dukd.METHODS[chosen.method].get(term, 0))})
    if chosen.quick:
        p.set_defaults(**QUICK)
    if chosen.resume:
        last = Path(chosen.resume, "last.ckpt")
        state = models.read_file(last)
        if not isinstance(state, dict) or state.get("settings", {}).keys() != vars(chosen).keys():
            raise InputError(f"{last} is not the checkpoint of a run, or of another version of train.py: "
                             "start a new run")
        p.set_defaults(**state["settings"])
    args = p.parse_args(argv)
    fixed = {word[2:].partition("=")[0] for word in argv if word.startswith("--")} - MAY_CHANGE
    if chosen.resume and fixed:
        p.error(f"--{min(fixed)} is not for --resume, a run keeps its own: start anew with "
                f"--init {chosen.resume}/student.pt")
    return args


def equation(weights):
    """L as text: "1·rec + 1·kd". weights: {term: λ}."""
    return " + ".join(f"{weight:g}·{term}" for term, weight in weights.items())


def forward_backward(run, lr, hr):
    """Computes L of the pairs, and leaves its gradient in .grad of the student's weights. Returns (k,),
    detached: each term times its λ, then their sum. On CUDA, `recorded` replays all of it."""
    args = run.args
    with torch.autocast(lr.device.type, torch.bfloat16, enabled=run.precision == "bfloat16"):
        terms = dukd.losses(run.student, run.teacher, lr, hr, run.weights, crops=args.crops, ops=args.ops,
                            p=args.p, augment_zoom_out=args.augment_zoom_out, taps=run.taps)
    weighted = [run.weights[name] * term for name, term in terms.items()]
    total = sum(weighted)
    run.optimizer.zero_grad()
    total.backward()
    return torch.stack([*weighted, total]).detach()


def learning_rate(step, args):
    """The rate of a step, counted from 0: ×0.1 at 40 % and at 80 % of the run, or half a cosine to zero."""
    if args.schedule == "cosine":
        return args.lr * 0.5 * (1 + math.cos(math.pi * step / args.steps))
    return args.lr * 0.1 ** sum(step >= milestone * args.steps for milestone in (0.4, 0.8))


def average_over_processes(tensors):
    """Gives each process the mean of each tensor, with one exchange."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for t, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(mean.view_as(t))


def train(args, command="python train.py", listen=list):
    """One run, from settings to a student in its folder. Returns the Run, and the folder (None in all but the
    first process of torchrun). InputError or OSError for what cannot be used.
    listen() gives a list of the signals to stop (see `catch_signals`); SystemExit after one has come."""
    run = Run(args)
    pair = run.patches[run.step]
    try:  # a step whose gradients are not used: what cannot work ends here, before a folder is made
        forward_backward(run, *pair)
    except ValueError as e:  # dukd.losses says what does not fit
        raise InputError(str(e)) from None
    step = fast_step(run, pair)
    out, log, bicubic_psnr = None, contextlib.nullcontext(), math.nan
    if run.rank == 0:  # the first process speaks and writes for all
        out = Path(args.resume) if args.resume else new_folder(args, run.scale)
        try:  # rows whose write is denied wait in the buffer
            log = open(out / "log.csv", "w" if args.resume else "x", buffering=2**20, newline="")
        except FileExistsError:
            raise InputError(f"{out} was taken by another run meanwhile: give another --out") from None
        log.writelines(run.rows)
        if not args.resume:
            about = dict(settings=run.settings, identity=run.identity)
            about |= evaluate.provenance(command, run.device)
            models.replace_file(out / "config.json", json.dumps(about, indent=1).encode())
            run.save(out, False)
        bicubic_psnr = introduce(run, out)

    window, began = [], time.perf_counter()  # the terms of each step since the last row of the log
    bar = tqdm(total=args.steps, initial=run.step, disable=run.rank > 0, ncols=80, mininterval=0.5,
               bar_format="{n_fmt}/{total_fmt} {bar} {remaining} left{postfix}")
    signals = listen()
    with log:  # closing it fails where a row is still denied
        while run.step < args.steps:
            if run.step % run.log_every == 0 and any_process_has(signals, run):
                break
            lr, hr = run.patches[run.step]  # (N,3,h,w), (N,3,s·h,s·w)
            torch.manual_seed(data.seed_of(args.seed, run.step, 1 + run.rank))  # of z, F and drop-path
            window.append(step(lr, hr))  # (k,)
            if run.world > 1:
                gradients = [w.grad for w in run.parameters if w.grad is not None]
                average_over_processes([window[-1], *gradients])
            rate = learning_rate(run.step, args)
            run.optimizer.param_groups[0]["lr"] = rate
            run.optimizer.step()
            decay = min(args.ema, (1 + run.step) / (10 + run.step))  # low at first: random weights fade
            with torch.no_grad():
                torch._foreach_lerp_(run.averaged, run.parameters, 1 - decay)
            run.step += 1
            bar.update()

            # every so often: a row of the log, a validation, a checkpoint
            validating = run.step % run.val_every == 0 or run.step in (100, args.steps)  # 100: an early look
            if run.step % run.log_every and not validating:
                continue
            means = torch.stack(window).mean(0).tolist()  # this waits for the GPU
            ms = 1000 * (time.perf_counter() - began) / len(window)
            run.check_finite(means[-1])
            if run.rank == 0:
                if validating:
                    run.psnr = run.score("student")
                terms = ",".join(f"{mean:.8g}" for mean in means)
                val_psnr = f"{run.psnr:.4f}" if validating else ""
                run.rows.append(f"{run.step},{rate:.3g},{terms},{val_psnr},{ms:.2f}\n")
                log.write(run.rows[-1])
                attempt(log.flush)
                if validating and run.step < args.steps:
                    attempt(run.save, out, True)
                psnr = "?" if math.isnan(run.psnr) else f"{run.psnr:.2f}"
                bar.set_postfix_str(f"loss {means[-1]:.4f}, {psnr} dB (bicubic {bicubic_psnr:.2f})", False)
            window, began = [], time.perf_counter()
        bar.close()
        if run.rank == 0:
            run.save(out, run.step == args.steps)
            finish(run, out, bicubic_psnr)
    if run.world > 1:
        dist.destroy_process_group()
    if signals and run.step < args.steps:  # a process that got no signal just returns
        raise SystemExit(128 + signals[0])
    return run, out


class Run:
    """Networks, pictures and device of a run, and where it stands: `step`, `psnr`, `best` and `rows`."""

    def __init__(self, args):
        self.args = args
        evaluate.keep_freed_memory()
        self.device = evaluate.pick_device(args.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be recorded
        self.rank, self.world = join_processes(self.device)
        self.precision = choose_precision(args.precision, self.device)
        weights = {term: getattr(args, f"lambda_{term}") for term in dukd.TERMS}
        self.weights = {term: weight for term, weight in weights.items() if weight}

        teacher = models.load(args.teacher).requires_grad_(False) if args.teacher else None
        self.scale = args.scale or (teacher.scale if teacher else 4)
        check_settings(args, self.weights, teacher, self.rank, self.world)
        train_paths, val_paths = choose_pictures(args)
        hashes = [hashlib.sha256(Path(args.teacher).read_bytes()).hexdigest()] if args.teacher else []
        self.identity = dict(pictures=[data.composed(path.name) for path in train_paths],
                             held_out=[data.composed(path.name) for path in val_paths], teacher_sha256=hashes)
        self.settings = vars(args) | dict(resume=None, precision=self.precision, scale=self.scale)
        checkpoint = None
        if args.resume:
            checkpoint = models.read_file(Path(args.resume, "last.ckpt"))
            check_identity(args.resume, checkpoint["identity"], self.identity)

        torch.manual_seed(args.seed)
        if checkpoint:
            student = models.from_config(checkpoint["config"])
        else:
            student = build_student(args, teacher, self.scale)
        self.patches = data.Patches(train_paths, args.patch, self.scale, args.batch, args.seed, args.cache,
                                    self.device, self.rank, self.world)
        self.held_out = [] if self.rank else data.read_all(val_paths, self.scale, least=8)  # [(path, lr, hr)]

        self.student = student.to(self.device, memory_format=torch.channels_last)
        self.teacher = teacher and teacher.to(self.device, memory_format=torch.channels_last)
        self.taps = [*zip(student.taps, teacher.taps)] if teacher else []
        self.ema = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.upscalers = dict(bicubic=functools.partial(data.imresize, factor=self.scale))
        if teacher:
            self.upscalers["teacher"] = evaluate.network_upscaler(self.teacher)
        self.upscalers["student"] = evaluate.network_upscaler(self.ema)  # its average is scored
        self.parameters, self.averaged = list(self.student.parameters()), list(self.ema.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, betas=(0.9, 0.99), fused=True)
        self.val_every = args.val_every or max(1, min(args.steps // 10, 5000))
        self.log_every = 10 if self.device.type == "cuda" else 1  # reading the terms waits for a GPU
        self.step, self.psnr, self.best = 0, math.nan, -math.inf  # psnr, best: held-out
        self.rows = [f"step,lr,{','.join(self.weights)},total,val_psnr,ms\n"]  # of log.csv
        if checkpoint:
            self.restore(checkpoint)

    def state(self):
        """What last.ckpt holds: all that `restore` needs, and what the run is."""
        return dict(student=self.student.state_dict(), ema=self.ema.state_dict(),
                    optimizer=self.optimizer.state_dict(), step=self.step, psnr=self.psnr, best=self.best,
                    rows=self.rows, config=self.student.config, settings=self.settings,
                    identity=self.identity)

    def restore(self, state):
        """Goes back to a `state`."""
        self.student.load_state_dict(state["student"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.psnr, self.best = state["step"], state["psnr"], state["best"]
        self.rows = state["rows"]

    def save(self, out, validated):
        """Writes best.pt if these weights are validated and the best so far, student.pt, then last.ckpt."""
        params = self.student.state_dict()
        try:
            if validated and self.psnr > self.best:
                models.save(out / "best.pt", self.ema, params)
                self.best = self.psnr
            models.save(out / "student.pt", self.ema, params)
        finally:  # also where those are denied
            models.replace_file(out / "last.ckpt", models.as_bytes(self.state()))

    @torch.compiler.set_stance("force_eager")  # else blocks are compiled for each size of picture
    def score(self, label):
        """The mean PSNR on Y of one of the upscalers over the held-out pictures. In float32."""
        scores = evaluate.score(self.upscalers[label], self.held_out, self.scale, f"held-out, {label}",
                                metrics=dict(psnr=evaluate.psnr_y))
        return scores["psnr"]

    def check_finite(self, loss):
        """InputError for a NaN or an infinity. L1's gradient at a NaN is 0, so the weights may look fine."""
        norm = torch.nn.utils.get_total_norm(self.parameters)
        if not (math.isfinite(loss) and norm.isfinite()):
            raise InputError(f"the loss or the weights are not finite after step {self.step}. Start anew "
                             "from the last student.pt (--init), with a lower --lr or --precision float32")


def join_processes(device):
    """(rank, world): which of torchrun's processes this is, and of how many. Only rank 0 prints to stdout."""
    if os.environ.get("WORLD_SIZE", "") in ("", "1"):
        return 0, 1
    try:
        store, rank, world = next(rendezvous("env://", timeout=RENDEZVOUS))
    except (RuntimeError, ValueError) as e:  # the environment lacks a variable; a process is missing
        raise InputError("WORLD_SIZE is set, but there is no group of processes: start with torchrun, or "
                         f"unset it for one process ({str(e).splitlines()[0]})") from None
    backend = dict(backend="nccl", device_id=device) if device.type == "cuda" else dict(backend="gloo")
    dist.init_process_group(store=store, rank=rank, world_size=world, timeout=SCORING, **backend)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return rank, world


def choose_precision(name, device):
    """float32 or bfloat16. "auto" is bfloat16 where the device computes in it; emulated, it is slow."""
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        native = device.type == "cpu" and (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return "bfloat16" if native else "float32"


def check_settings(args, weights, teacher, rank, world):
    """InputError for settings that do not fit together. The step that `train` tries shows the rest."""
    if not weights:
        raise InputError("every term of the loss is off: nothing to learn from")
    if teacher is None and args.student == "small":
        raise InputError("--student small needs a --teacher; or name a size")
    if teacher and args.scale not in (0, teacher.scale):
        raise InputError(f"{args.teacher} is for x{teacher.scale}, not x{args.scale}: leave --scale out")
    if teacher and not teacher.taps and weights.keys() & {"fitnet", "at", "fakd"}:
        raise InputError(f"a teacher of {teacher.config['arch']} has no feature maps here: fitnet, at and "
                         "fakd need EDSR, RCAN or SwinIR")
    if args.batch % world:
        raise InputError(f"--batch {args.batch} cannot be shared by {world} processes")
    empty = os.path.isdir(args.out) and not os.listdir(args.out)
    if rank == 0 and not args.resume and os.path.lexists(args.out) and not empty:
        raise InputError(f"{args.out} is not an empty folder: give another --out. If a run is there, it goes "
                         f"on with --resume {args.out}")


def choose_pictures(args):
    """The paths of the training pictures, and of the held-out ones."""
    train_paths = data.find_hr(args.data or data.TRAIN)
    val_paths = data.find_hr(args.val or ([] if args.data else data.VAL))
    if not val_paths:
        count = min(max(len(train_paths) // 10, 1), 10)
        val_paths = train_paths[::len(train_paths) // count][:count]
    held_out = {path.resolve() for path in val_paths}
    train_paths = [path for path in train_paths if path.resolve() not in held_out]
    if not train_paths:
        raise InputError("all pictures are held out, and none is left to train on: name others with --val")
    return train_paths, val_paths


def check_identity(folder, saved, now):
    """InputError where the names of pictures or the teacher's file are not those of the run to resume."""
    for name in now:
        if saved[name] != now[name]:
            others = sorted({*saved[name]} ^ {*now[name]}) or ["the order"]
            raise InputError(f"{folder} is another run: {name} differs in {', '.join(others)[:99]}. For "
                             "files that have moved, give --data, --val or --teacher anew")


def build_student(args, teacher, scale):
    """The student by name. With --init it gets a file's tensors, which must fit in name and shape, but for
    `upsample`; and the file's residual scale, mean and range, as tensors mean little without them."""
    config = models.small(teacher) if args.student == "small" else models.config_of(args.student, scale)
    if not args.init:
        return models.from_config(config)
    given = models.load(args.init)
    if given.config["arch"] == config["arch"]:
        for name in {"res_scale", "mean", "img_range"} & given.config.keys():
            config[name] = given.config[name]
    student = models.from_config(config)
    own, found = student.state_dict(), given.state_dict()
    fitting = {name: v for name, v in found.items() if name in own and own[name].shape == v.shape}
    for name in own:
        if name not in fitting and not name.startswith("upsample"):
            theirs = list(found[name].shape) if name in found else "missing"
            raise InputError(f"--init {args.init} does not fit the student: {name} is {theirs} there, and "
                             f"{list(own[name].shape)} here ({models.describe(given.config)})")
    student.load_state_dict(fitting, strict=False)
    print(f"init    {len(fitting)} of {len(own)} tensors come from {args.init}, which has {len(found)}")
    return student


def new_folder(args, scale):
    """Makes the folder of a new run: --out, or the next free one of runs/METHOD_STUDENT_xS, …_xS_2, …_xS_3.
    Of runs that start together without --out, each gets its own."""
    name = args.out or f"runs/{args.method}_{args.student}_x{scale}"
    for number in itertools.count(1):
        path = Path(name if number == 1 else f"{name}_{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True, exist_ok=bool(args.out))
            return path


def introduce(run, out):
    """Says what is about to run, and how good bicubic and teacher are. Returns bicubic's held-out PSNR."""
    args = run.args
    if args.resume:
        print(f"resumed after step {run.step} of {args.steps}")
    print(f"data    {len(run.patches.paths)} pictures to train on, {len(run.held_out)} held out")
    for role, net in (("teacher", run.teacher), ("student", run.student)):
        if net:
            print(f"{role} {models.describe(net.config)}: {models.parameters(net) / 1e6:.2f} M parameters")
    scores = {label: run.score(label) for label in run.upscalers if label != "student"}
    if run.teacher and scores["teacher"] < scores["bicubic"]:
        data.note("the teacher is below bicubic: is it a GAN's, or of another mean or range?")
    print("held-out PSNR:", ", ".join(f"{label} {psnr:.2f} dB" for label, psnr in scores.items()))
    print("loss    L =", equation(run.weights))
    print(f"run     {out}: {args.steps} steps of {args.batch} on {run.device} in {run.precision}")
    return scores["bicubic"]


@torch.compiler.set_stance("force_eager")
def finish(run, out, bicubic_psnr):
    """compare.png, and the last lines: how good the student is and where; or how to go on."""
    if run.step < run.args.steps:
        folder = out.as_posix()
        if not re.fullmatch(r"[\w@%+=:,./-]+", folder):
            folder = f'"{folder}"'
        print(f"stopped after {run.step} steps; go on with: python train.py --resume {folder}")
        return
    _, lr, hr = run.held_out[0]
    evaluate.write_figure(out / "compare.png", run.upscalers, lr, hr, run.scale)
    print(f"held-out PSNR: bicubic {bicubic_psnr:.2f} dB, student {run.psnr:.2f} dB (best {run.best:.2f})")
    print(f"in {out}: student.pt, best.pt (best held-out PSNR), compare.png, log.csv")


def catch_signals():
    """A list that gets the numbers of signals to stop: Ctrl-C, SIGTERM, a closed terminal's SIGHUP and a
    cluster's SIGUSR1. The same one again ends the program at once. Ignored ones stay so, as under nohup."""
    caught = []

    def handle(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)  # Windows has two of them
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)
    return caught


def attempt(write, *arguments):
    """Writes. Where that is denied, as by a virus scanner, a note says so, and a later write tries again."""
    try:
        write(*arguments)
    except PermissionError as e:
        data.note(f"{e.filename or 'log.csv'} cannot be written now ({e.strerror}). It is tried again later")


def any_process_has(signals, run):
    """Whether a signal came to any process. They ask each other, so that all stop after the same step."""
    if run.world == 1:
        return len(signals) > 0
    count = torch.tensor(len(signals), device=run.device)
    dist.all_reduce(count)
    return count.item() > 0


def fast_step(run, pair):
    """`forward_backward` of this run, as a function of lr and hr. On CUDA it is compiled and recorded as
    --compile says; results change by rounding only."""
    step = functools.partial(forward_backward, run)
    if run.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # cuDNN searches for the fastest algorithm of each shape
        if run.args.compile != "no":
            compile_blocks(run, pair)
        step(*pair)  # the search
        if run.args.compile == "graph":
            step = recorded(step, pair)
        torch.backends.cudnn.benchmark = False  # it would search anew for each size of held-out picture
    return step


def compile_blocks(run, pair):
    """Compiles the blocks that the networks repeat. Where that fails, it says why and leaves them alone."""
    networks = [net for net in (run.teacher, run.student) if net]
    blocks = [m for net in networks for m in net.modules() if isinstance(m, models.BLOCKS)]
    torch._dynamo.config.recompile_limit = 32  # widths, batch sizes and masks of teacher and student
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
    try:
        forward_backward(run, *pair)
    except Exception:  # no compiler, an operation that it does not know, …
        traceback.print_exc()
        data.note("torch.compile fails here (see above), the networks run without")
        for block in blocks:
            del block.forward


def recorded(step, pair):
    """A step as one CUDA graph, which is launched at once instead of kernel by kernel. A call copies its
    pair, I_LR and I_HR, into the recorded one. Replays draw anew: the generator is seeded before each step.
    Gradients stay where they were recorded: a replay runs no Python, so no zero_grad.
    A teacher that reads values from the GPU cannot be recorded, and a failed recording spoils the process. So
    the program starts anew without recording. InputError where it cannot: in a process that is not train.py's
    or is one of several, and on Windows, whose shell would not wait."""
    for _ in range(3):  # the libraries choose their algorithms
        step(*pair)
    graph = torch.cuda.CUDAGraph()
    gc.disable()  # memory that is freed meanwhile would spoil the recording
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            result = step(*pair)
    except RuntimeError:
        traceback.print_exc()  # the first error in it is the cause
        if __name__ == "__main__" and not dist.is_initialized() and os.name != "nt":
            data.note("starting anew with --compile blocks")
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], "--compile", "blocks"])
        raise InputError("the step cannot be recorded (see above): give --compile blocks") from None
    finally:
        gc.enable()

    def replay(*new_pair):
        for old, new in zip(pair, new_pair):
            old.copy_(new)
        graph.replay()
        return result.clone()
    return replay


def main(argv, listen=list):
    with evaluate.command_line(), contextlib.redirect_stdout(evaluate.Lasting(sys.stdout)):
        train(parse(argv), shlex.join(["python", "train.py", *argv]), listen)


if __name__ == "__main__":
    main(sys.argv[1:], catch_signals)
