"""Evaluation: Y-PSNR and SSIM tables, upscaling of pictures, side-by-side figures.

    python evaluate.py student.pt teacher.pt bicubic --data Set5 Set14        a row a model, a column a set
    python evaluate.py --sr results/mine --data Set5 --scale 4                score pictures made by any other tool
    python evaluate.py student.pt --input photo.jpg --output big              upscale a picture, or a folder of them
    python evaluate.py student.pt bicubic --data Set5 --figure compare.png    crops of HR and of every row, side by side

Protocol: HR cropped to a multiple of s, LR by MATLAB's bicubic, SR rounded to uint8, s pixels shaved off each border,
luma Y of BT.601 in 16–235 (unrounded), SSIM with an 11×11 Gaussian of σ 1.5.
"""
import argparse
import contextlib
import datetime
import difflib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from skimage.metrics import structural_similarity
from tqdm import tqdm

import data
import models


# ------------------------------------------------------------------------------------------------ metrics
def luma(rgb):
    """Y of MATLAB's rgb2ycbcr: uint8 (H,W,3) to float64 (H,W) in 16–235, not rounded."""
    return rgb.astype(np.float64) @ (np.array([65.481, 128.553, 24.966]) / 255) + 16


def shave(y, border):
    return y[border:y.shape[0] - border, border:y.shape[1] - border]


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of two luma planes, peak 255; infinite for equal ones."""
    mse = np.mean((a - b) ** 2)
    return float(10 * np.log10(255 ** 2 / mse)) if mse else float("inf")


def ssim(a, b):
    """Mean structural similarity (Wang et al., 2004) of two luma planes over the valid region, in [−1,1]."""
    return float(structural_similarity(a, b, data_range=255, gaussian_weights=True, sigma=1.5,
                                       use_sample_covariance=False))


def psnr_y(sr, hr, border):
    """PSNR in dB on Y. sr, hr: uint8 (H,W,3); border: pixels shaved off each edge, the scale by custom."""
    return psnr(*planes(sr, hr, border))


def ssim_y(sr, hr, border):
    """SSIM in [−1,1] on Y. Arguments as `psnr_y`; at least 11×11 pixels must be left."""
    return ssim(*planes(sr, hr, border))


def planes(sr, hr, border):
    """The two shaved luma planes. ValueError where the pictures differ in size or nothing is left."""
    if sr.shape != hr.shape:
        raise ValueError(f"pictures of different sizes: {sr.shape} and {hr.shape}")
    if min(hr.shape[:2]) <= 2 * border:
        raise ValueError(f"a picture of {hr.shape[1]}x{hr.shape[0]} has nothing left inside a border of {border}")
    return shave(luma(sr), border), shave(luma(hr), border)


def published_bicubic(hr, scale):
    """(sr, hr) luma planes, shaved, of bicubic as every paper's table reports it: on the rounded luma alone, with an
    LR that is not rounded. (Networks see rounded RGB; bicubic made from that scores up to 0.01 dB higher.)"""
    y = np.floor(luma(hr) + 0.5)
    sr = data.imresize(data.imresize(torch.from_numpy(y), 1 / scale), scale).numpy()
    return shave(np.floor(sr.clip(0, 255) + 0.5), scale), shave(y, scale)


# ------------------------------------------------------------------------------------------------ running a network
def to_tensor(image, device="cpu"):
    """uint8 (H,W,3) to float (1,3,H,W) in [0,1]."""
    return torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1)[None].float() / 255


def to_uint8(x):
    """Float (1,3,H,W) to uint8 (H,W,3), clipped to [0,1] and rounded half up."""
    return (x[0].clamp(0, 1) * 255 + 0.5).floor().byte().permute(1, 2, 0).cpu().numpy()


RAMP = 16  # LR pixels over which neighbouring tiles fade into each other


def margin_of(model):
    """How many LR pixels around a tile the network must see: its receptive radius where that is finite, so that a tile
    equals the whole; 32 for SwinIR and RCAN, which see everything, a little."""
    return min(model.receptive_radius or 32, 96)


@torch.no_grad()
def upscale(model, x, tile=0):
    """f(x) for one picture x (1,3,h,w) in [0,1] of any size, by overlapping tiles where it is larger than `tile`.

    tile: LR pixels a side (0: whole). Tiles start at multiples of 8 (SwinIR's windows stay where they were), see a
    margin around themselves, and fade into each other, so there are no seams; for EDSR up to 40 blocks the result
    equals the whole picture's to rounding. Memory: one tile's activations and the result."""
    h, w = x.shape[-2:]
    if not tile or max(h, w) <= tile:
        return model(x)
    s, margin = model.scale, -(-margin_of(model) // 8) * 8
    total, weight = x.new_zeros(1, 3, h * s, w * s), x.new_zeros(1, 1, h * s, w * s)
    tile = -(-tile // 8) * 8
    for top in range(0, h, tile):
        for left in range(0, w, tile):
            (y0, y1, wy), (x0, x1, wx) = (span(start, tile, margin, n, s, x) for start, n in ((top, h), (left, w)))
            part, fade = model(x[..., y0:y1, x0:x1]).float(), wy[:, None] * wx
            total[..., y0 * s:y1 * s, x0 * s:x1 * s] += part * fade
            weight[..., y0 * s:y1 * s, x0 * s:x1 * s] += fade
    return total / weight


def span(start, tile, margin, n, s, like):
    """One tile along one axis: what it reads, [a,b) in LR pixels, and its weights in HR pixels: 1 inside, a ramp to 0
    of RAMP pixels outside, and 0 in the margin beyond, where the network misses a part of what it would see."""
    a, b = max(start - RAMP - margin, 0), min(start + tile + RAMP + margin, n)
    centre = (torch.arange((b - a) * s, device=like.device, dtype=like.dtype) + 0.5) / s + a
    left = 1 if start == 0 else ((centre - (start - RAMP)) / (2 * RAMP)).clamp(0, 1)
    right = 1 if start + tile >= n else ((start + tile + RAMP - centre) / (2 * RAMP)).clamp(0, 1)
    return a, b, left * right * torch.ones_like(centre)


def self_ensemble(model, x, tile=0):
    """The mean over the eight flips and transpositions, each undone (the "+" of EDSR+, RCAN+, SwinIR+)."""
    total = 0
    for flips in ((), (-1,), (-2,), (-1, -2)):
        for transpose in (False, True):
            y = x.flip(flips)
            y = upscale(model, y.transpose(-1, -2) if transpose else y, tile)
            total = total + (y.transpose(-1, -2) if transpose else y).flip(flips)
    return total / 8


class Bicubic(torch.nn.Module):
    """MATLAB's bicubic behind a network's interface, for `--input` and figures."""

    def __init__(self, scale):
        super().__init__()
        self.scale, self.receptive_radius = scale, 3

    def forward(self, x):
        return data.imresize(x, self.scale)


# ------------------------------------------------------------------------------------------------ tables
def score_set(row, pairs, options):
    """Mean PSNR, mean SSIM, the images' own figures and seconds an image of one row of the table on one set.

    row: a network, a Bicubic, or {image name: file} for pictures made elsewhere; pairs: [(name, lr, hr)]."""
    figures, seconds = {}, []
    for name, lr, hr in tqdm(pairs, leave=False, unit="image"):
        began = time.perf_counter()
        if isinstance(row, Bicubic):
            a, b = published_bicubic(hr, row.scale)
        else:
            sr = data.read_image(row[name]) if isinstance(row, dict) else picture(row, lr, options)
        seconds.append(time.perf_counter() - began)
        if not isinstance(row, Bicubic):
            if sr.shape != hr.shape:
                raise data.DataError(f"{row[name]} is {sr.shape[1]}x{sr.shape[0]}, but its HR image {name}, cropped to a "
                                     f"multiple of {options.scale}, is {hr.shape[1]}x{hr.shape[0]}")
            a, b = planes(sr, hr, options.scale)
        figures[name] = (psnr(a, b), ssim(a, b))
    mean = np.mean(list(figures.values()), axis=0)
    return dict(psnr=float(mean[0]), ssim=float(mean[1]), seconds=float(np.median(seconds)),
                images={k: dict(psnr=p, ssim=s) for k, (p, s) in figures.items()})


def picture(model, lr, options):
    """A network's uint8 picture of a uint8 LR picture (H,W,3)."""
    run = self_ensemble if options.self_ensemble else upscale
    with torch.no_grad(), torch.autocast(options.device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
        return to_uint8(run(model, to_tensor(lr, options.device), options.tile))


def read_set(place, scale):
    """[(name, lr, hr)] of a folder of HR pictures. DataError for one too small to score, or of another's name."""
    pairs, paths = [], data.find_images([place])
    by_stem = {p.stem: p for p in paths}
    if twins := [p for p in paths if by_stem[p.stem] != p]:
        raise data.DataError(f"{twins[0]} and {by_stem[twins[0].stem]} have the same name: their figures could not be told apart")
    for path in paths:
        lr, hr = data.read_pair(path, None, scale)
        if min(hr.shape[:2]) < 11 + 2 * scale:
            raise data.DataError(f"{path}, {hr.shape[1]}x{hr.shape[0]} when cropped to a multiple of {scale}, is too small for SSIM's "
                                 f"11x11 window inside a border of {scale}")
        pairs.append((path.stem, lr, hr))
    return pairs


def match_results(place, names, scale):
    """The file in `place` that belongs to each HR picture: babyx4, baby_x4, baby_ANY_x4, baby or baby_ANY for baby."""
    files = data.find_images([place])

    def rank(stem, name):  # 0 is the surest
        forms = (f"{name}x{scale}", f"{name}_x{scale}", name)
        if stem in forms:
            return forms.index(stem)
        if stem.startswith(f"{name}_"):
            return 3 if stem.endswith((f"_x{scale}", f"x{scale}")) else 4
        return None
    found = {}
    for name in names:
        ranked = sorted((r, p.name, p) for p in files if (r := rank(p.stem, name)) is not None)
        # img_1 and img_1_2 are both HR pictures: what begins with the longer name belongs to it
        ranked = [p for r, _, p in ranked if r < 3 or not any(len(o) > len(name) and rank(p.stem, o) is not None for o in names)]
        if not ranked:
            raise data.DataError(f"{place} has no picture for {name}: looked for {name}x{scale}, {name}_x{scale}, {name}_…_x{scale}")
        found[name] = ranked[0]
    return found


def provenance(command, device):
    """What a figure needs to be made again: command, commit of this code ("" outside a repository), versions, device, time."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=Path(__file__).resolve().parent,
                             capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        git = ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return dict(command=command, git=git, device=str(device), device_name=name, threads=torch.get_num_threads(),
                versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
                started=datetime.datetime.now().astimezone().isoformat(timespec="seconds"))


def table(rows, sets, results):
    """The text of the table: a line a model, a column a set."""
    head = ["model", "params", "madds", *(f"{s} PSNR/SSIM" for s in sets), "s/image"]
    lines = [head]
    for name, row in rows.items():
        size = models.parameters(row) if isinstance(row, torch.nn.Module) else 0
        try:
            cost = f"{models.multiply_adds(row) / 1e9:.1f} G" if size else "-"
        except Exception:  # a foreign network with operations that cannot be counted
            cost = "?"
        scores = [results[name][s] for s in sets]
        lines.append([name, f"{size / 1e6:.2f} M" if size else "-", cost,
                      *(f"{r['psnr']:.2f}/{r['ssim']:.4f}" for r in scores), f"{np.median([r['seconds'] for r in scores]):.3f}"])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
                     for line in lines)


def evaluate(rows, options):
    """Prints the table of all rows on all sets; --json also writes it, with each image's figures."""
    results, sets = {name: {} for name in rows}, {}
    for place in options.data:
        sets[label_of(place, options.data) or place] = read_set(place, options.scale)
    if options.figure and options.image >= (n := len(next(iter(sets.values())))):
        raise data.DataError(f"--image {options.image}: {options.data[0]} has {n} pictures, counted from 0")
    for name, row in rows.items():
        for label, pairs in sets.items():
            source = match_results(row, [n for n, _, _ in pairs], options.scale) if isinstance(row, Path) else row
            results[name][label] = score_set(source, pairs, options)
    print(table(rows, sets, results))
    if options.json:
        about = dict(**provenance(options.command, options.device), scale=options.scale, precision=options.precision,
                     self_ensemble=options.self_ensemble, results=results)
        write_text(options.json, json.dumps(about, indent=1))
    if options.figure:
        label, pairs = next(iter(sets.items()))
        write_picture(options.figure, figure(rows, pairs[options.image], options))


# ------------------------------------------------------------------------------------------------ pictures
def figure(rows, pair, options, size=96):
    """Crops of HR and of every row side by side, 3× enlarged, the crop chosen where bicubic errs most."""
    name, lr, hr = pair
    s, size = options.scale, min(size, *hr.shape[:2])
    pictures = {"HR": hr} | {label: picture(row, lr, options) for label, row in rows.items() if not isinstance(row, Path)}
    pictures |= {label: data.read_image(match_results(row, [name], s)[name]) for label, row in rows.items() if isinstance(row, Path)}
    error = np.abs(luma(data.imresize(lr, s)) - luma(hr))
    sums = np.pad(error.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    box = sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]
    top, left = np.unravel_index(box.argmax(), box.shape)
    crops = [p[top:top + size, left:left + size].repeat(3, 0).repeat(3, 1) for p in pictures.values()]
    gap = np.full((crops[0].shape[0], 6, 3), 255, np.uint8)
    print(f"figure: {name} at ({left}, {top}), {size}x{size} pixels; left to right: {', '.join(pictures)}")
    return np.concatenate([part for crop in crops for part in (crop, gap)][:-1], axis=1)


def upscale_files(model, options):
    """Upscales a picture or a folder of pictures into --output; grey stays grey, and alpha is upscaled bicubically."""
    paths, out = data.find_images([options.input]), Path(options.output)
    if out.suffix.lower() in data.EXTENSIONS and (len(paths) > 1 or Path(options.input).is_dir()):
        raise data.DataError(f"--output {out} is a file name, but --input is a folder: name a folder")
    single = out.suffix.lower() in data.EXTENSIONS
    targets = [out] if single else [out / f"{p.stem}_x{options.scale}.png" for p in paths]
    if clash := next((t for t in targets if os.path.lexists(t) or targets.count(t) > 1), None):
        raise data.DataError(f"{clash} exists already, or two pictures would go there: nothing is overwritten, name another --output")
    check_folder(out.parent if single else out, "--output")
    make_folder(out.parent if single else out)
    for path, target in zip(tqdm(paths, unit="picture", disable=len(paths) == 1), targets):
        image = data.read_picture(path)
        channels, result = image.shape[2], image.shape[0] * image.shape[1] * options.scale ** 2
        if result * 20 > data.machine_memory():  # bytes: three colours and the tiles' weights in float32, uint8 beside them
            raise data.DataError(f"{path}, {image.shape[1]}x{image.shape[0]}, would become {result / 1e6:.0f} million pixels, "
                                 "more than this machine's memory holds")
        rgb = image[..., :3] if channels >= 3 else image[..., :1].repeat(3, 2)
        big = picture(model, rgb, options)
        if channels < 3:  # the three channels of a grey input differ by less than a grey level
            big = np.floor(big.mean(2, keepdims=True) + 0.5).astype(np.uint8)
        if channels in (2, 4):
            if target.suffix.lower() not in (".png", ".tif", ".tiff", ".webp"):
                raise data.DataError(f"{path} has alpha, which {target.suffix} cannot hold: write a .png")
            big = np.concatenate([big, data.imresize(image[..., -1:], options.scale)], axis=2)
        write_picture(target, big)
        tqdm.write(f"{target}  {big.shape[1]}x{big.shape[0]}")


def make_folder(folder):
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise data.DataError(f"{folder} cannot be made: {e.strerror or e}") from None


def write_picture(path, image):
    """Writes a uint8 picture (H,W,C); grey as (H,W). It is encoded first: imageio sees no name, and a picture that the
    format cannot hold leaves no file behind."""
    try:
        content = iio.imwrite("<bytes>", image[..., 0] if image.shape[2] == 1 else image, plugin="pillow",
                              extension=Path(path).suffix.lower())
        Path(path).write_bytes(content)
    except (OSError, ValueError, KeyError) as e:
        raise data.DataError(f"{path} cannot be written: {getattr(e, 'strerror', None) or e}") from None


def check_folder(folder, option):
    """DataError where `folder` is not there and cannot be made, or cannot be written to: asked before long work, not after."""
    folder = Path(folder)
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise data.DataError(f"{option} {folder}: {there} is not a folder; name another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise data.DataError(f"{option} {folder}: {there} cannot be written to; name another place")


def check_file(path, option, endings=None):
    """DataError where the file `path` cannot be written, or, with endings, is not of one of these kinds."""
    if Path(path).is_dir():
        raise data.DataError(f"{option} {path} is a folder; name a file")
    if endings and Path(path).suffix.lower() not in endings:
        raise data.DataError(f"{option} {path} is no picture's name: it must end in .png, .jpg or the like")
    if not Path(path).parent.is_dir():
        raise data.DataError(f"{option} {path}: there is no folder {Path(path).parent}")
    if not os.path.lexists(path):
        check_folder(Path(path).parent, option)
    elif not os.access(path, os.W_OK):
        raise data.DataError(f"{option} {path} cannot be written to; name another file")


def write_text(path, text):
    try:
        Path(path).write_text(text)
    except OSError as e:
        raise data.DataError(f"{path} cannot be written: {e.strerror or e}") from None


# ------------------------------------------------------------------------------------------------ the command line
class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and the nearest flag for one that does not exist."""

    def error(self, message):
        known = [o for a in self._actions for o in a.option_strings]
        if message.startswith("unrecognized arguments:"):
            wrong = message.split()[2].split("=")[0]
            near = difflib.get_close_matches(wrong, known, 1)
            message = f"unknown argument {wrong}{f'; did you mean {near[0]}?' if near else '; see --help'}"
        elif found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL):
            near = difflib.get_close_matches(found[1], re.findall(r"\w+", found[2]), 1)
            message += f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"error: {data.printable(message)}\n")


def parse(argv):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("models", nargs="*", metavar="MODEL", help="checkpoints of any known format, and the word bicubic")
    p.add_argument("--data", nargs="+", default=[], metavar="DIR", help="folders of HR pictures, one column each")
    p.add_argument("--sr", nargs="+", default=[], metavar="DIR", help="folders of pictures made by any other tool, one row each")
    p.add_argument("--scale", type=int, help="s, where no checkpoint tells it", choices=models.SCALES)
    p.add_argument("--json", default="", metavar="FILE", help="write the table and each image's figures")
    p.add_argument("--figure", default="", metavar="FILE", help="write crops of HR and of each row, side by side")
    p.add_argument("--image", type=int, default=0, metavar="N", help="which picture of the first set --figure shows [0]")
    p.add_argument("--input", default="", metavar="FILE|DIR", help="pictures to upscale")
    p.add_argument("--output", default="", metavar="FILE|DIR", help="where they go")
    p.add_argument("--tile", type=int, default=256, help="LR pixels a side of a tile; 0: the whole picture at once [256]")
    p.add_argument("--self-ensemble", action="store_true", help="mean over the eight flips and transpositions")
    p.add_argument("--device", default="", help="cpu, cuda, cuda:1, … [cuda where there is one]")
    p.add_argument("--precision", default="float32", choices=("float32", "bfloat16"), help="of the networks [float32]")
    p.add_argument("--res-scale", type=float, help="EDSR's residual scale, where a file departs from the published models")
    return p.parse_args(argv)


def pick_device(name=""):
    """The device of that name, or a GPU where there is one, or the CPU. DataError for one that is not there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()  # which a device without memory of its own ("meta") does not have
    except (RuntimeError, AssertionError, ValueError, OverflowError):
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise data.DataError(f"--device {name} is not there; this machine has {', '.join(there)}") from None
    return torch.device(name)


def load_rows(options):
    """{name: network | Bicubic | folder} in the order given; fixes options.scale and options.device."""
    options.device = pick_device(options.device)
    override = {} if options.res_scale is None else dict(res_scale=options.res_scale)
    rows, scale = {}, options.scale
    for name in options.models:
        net = None if name == "bicubic" else models.load(name, **override)
        if net is not None and scale not in (None, net.scale):
            raise data.DataError(f"{name} is a x{net.scale} network, but the others (or --scale) are x{scale}")
        scale = net.scale if net is not None else scale
        rows[label_of(name, options.models)] = net
    if scale is None:
        raise data.DataError("no checkpoint tells the scale: give --scale")
    options.scale = scale
    place = lambda net: net.to(options.device, memory_format=torch.channels_last)
    rows = {name: place(Bicubic(scale) if net is None else net) for name, net in rows.items()}
    return rows | {str(place): Path(place) for place in options.sr}


def label_of(name, names):
    """A file's name in the table: its last part, or its path where another model has that last part."""
    return name if sum(Path(n).name == Path(name).name for n in names) > 1 else Path(name).name


@contextlib.contextmanager
def errors_in_one_line(*kinds):
    """What a user can cause ends the program with one line and exit code 2: bad files and names (and what else is of
    `kinds`), a disk that is full or may not be written to, too little memory."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be of the terminal's alphabet
    try:
        yield
    except (data.DataError, models.CheckpointError, *kinds) as e:
        message = str(e)
    except OSError as e:
        message = f"{e.filename or 'a file'} cannot be read or written: {e.strerror or e}"
    except (MemoryError, RuntimeError) as e:
        if not (isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "alloc" in str(e) and "memory" in str(e)):
            raise
        message = "the memory is full: smaller batches, patches or tiles need less"
    else:
        return
    for bar in list(getattr(tqdm, "_instances", ())):  # one left open would share the error's line
        bar.close()
    print(f"error: {data.printable(message)}", file=sys.stderr)
    raise SystemExit(2) from None


def check(options):
    """DataError for options that make no sense, before any work is done."""
    if not options.models and not options.sr:
        raise data.DataError("name a checkpoint, or bicubic, or a folder with --sr (see --help)")
    if bool(options.input) != bool(options.output) or not (options.input or options.data):
        raise data.DataError("give --data DIR to score, or --input and --output to upscale")
    if options.tile < 0:
        raise data.DataError(f"--tile {options.tile} must be 0 or more")
    if options.image < 0:
        raise data.DataError(f"--image {options.image} must be 0 or more")
    if options.res_scale is not None and not 0 < options.res_scale <= 1000:
        raise data.DataError(f"--res-scale {options.res_scale} must lie above 0 and at most at 1000")
    if options.json:
        check_file(options.json, "--json")
    if options.figure:
        check_file(options.figure, "--figure", data.EXTENSIONS)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    with errors_in_one_line():
        options = parse(argv)
        options.command = shlex.join(["python", "evaluate.py", *argv])
        check(options)
        rows = load_rows(options)
        if options.data:
            evaluate(rows, options)
        if options.input:
            if len(rows) != 1:
                raise data.DataError("--input takes one model")
            upscale_files(next(iter(rows.values())), options)


if __name__ == "__main__":
    main()
