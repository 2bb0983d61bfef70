"""Evaluation: Y-PSNR and SSIM tables, upscaling of pictures, side-by-side figures.

    python evaluate.py student.pt teacher.pt bicubic --data Set5 Set14        a row a model, a column a set
    python evaluate.py --sr results/mine --data Set5 --scale 4                score pictures made by any other tool
    python evaluate.py student.pt --input photo.jpg --output big              upscale a picture, or a folder of them
    python evaluate.py student.pt bicubic --data Set5 --figure compare.png    crops of HR and of every row, side by side
    python evaluate.py teacher.pt student.pt --bench                          milliseconds an image, in turns

Protocol: HR cropped to a multiple of s, LR by MATLAB's bicubic, SR rounded to uint8, s pixels shaved off each border,
luma Y of BT.601 in 16–235 (unrounded), SSIM with an 11×11 Gaussian of σ 1.5.
"""
import argparse
import contextlib
import ctypes
import datetime
import difflib
import functools
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
    return x[0].float().clamp(0, 1).mul_(255).add_(0.5).byte().permute(1, 2, 0).cpu().numpy()  # byte() rounds down


RAMP = 16  # LR pixels on each side of the line where two tiles meet, over which they fade into each other


def margin_of(model):
    """How many LR pixels around a tile the network must see: its receptive radius where that is finite, so that a tile
    equals the whole; 32 for SwinIR and RCAN, which see everything, a little."""
    return min(model.receptive_radius or 32, 96)


@torch.no_grad()
def upscale(model, x, tile=0):
    """f(x) for pictures x (N,3,h,w) in [0,1] of any size, by tiles where they are larger than `tile`.

    tile: the most LR pixels a side that a tile fills (0: whole); it sees a margin more. For EDSR up to 46 blocks the
    result equals the whole picture's to rounding; for others tiles fade into each other, so there are no seams."""
    return torch.cat([*bands(model, x, tile)], dim=2)


@torch.no_grad()
def bands(model, x, tile=0, ensemble=False):
    """Yields what `upscale` returns from top to bottom, a row of tiles at a time. Memory: one tile's activations and
    one row of tiles, of a result of any size. ensemble: each tile by `self_ensemble`."""
    (h, w), s, run = x.shape[-2:], model.scale, functools.partial(self_ensemble, model) if ensemble else model
    if not tile or max(h, w) <= tile:
        yield run(x)
        return
    rows, columns = ([*spans(n, tile, model, x.device)] for n in (h, w))
    waiting = x.new_zeros(len(x), 3, 0, w * s)  # rows that fade into the next tiles
    for (y0, y1, top, bottom, fade_y), below in zip(rows, [row[2] for row in rows[1:]] + [h]):
        band = x.new_zeros(len(x), 3, (bottom - top) * s, w * s)
        for x0, x1, left, right, fade_x in columns:
            part = run(x[..., y0:y1, x0:x1])[..., (top - y0) * s:(bottom - y0) * s, (left - x0) * s:(right - x0) * s]
            band[..., left * s:right * s] += part * (fade_y[:, None] * fade_x)
        band[..., :waiting.shape[2], :] += waiting
        ready = (below - top) * s
        yield band[..., :ready, :]
        waiting = band[..., ready:, :].clone()


def spans(n, tile, model, device):
    """Tiles of nearly equal size along an axis of n LR pixels: what each reads, [a,b); what it gives, [c,d); and its
    weights there, (d−c)·s of them, of sum 1 over the tiles.

    Tiles fade into each other over 2·RAMP pixels, and start to read at multiples of 8, so that SwinIR's windows stay
    where they were. Where the margin holds all that a network sees, its tiles are exact and meet without fading."""
    s, margin = model.scale, margin_of(model)
    ramp = 0 if margin == model.receptive_radius else RAMP
    count = -(-n // (-(-tile // 8) * 8))
    size = -(-n // (8 * count)) * 8
    starts, centre = range(0, n, size), (torch.arange(n * s, device=device) + 0.5) / s
    rise = [((centre - start + ramp) / max(2 * ramp, 1e-3)).clamp(0, 1) for start in starts]  # 0 before a tile, 1 after
    rise = [torch.ones_like(centre), *rise[1:], torch.zeros_like(centre)]
    for i, start in enumerate(starts):
        c, d = max(start - ramp, 0), min(start + size + ramp, n)
        yield max(c - margin, 0), min(d + margin, n), c, d, (rise[i] - rise[i + 1])[c * s:d * s]


def self_ensemble(model, x):
    """The mean over the eight flips and transpositions, each undone (the "+" of EDSR+, RCAN+, SwinIR+)."""
    total = 0
    for flips in ((), (-1,), (-2,), (-1, -2)):
        for transpose in (False, True):
            y = x.flip(flips)
            y = model(y.transpose(-1, -2) if transpose else y)
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
    by_size = sorted(((lr, name, hr) for name, lr, hr in pairs), key=lambda item: item[0].shape)
    with tqdm(by_size, leave=False, unit="image") as bar:
        for batch in batches(bar, options):
            began = time.perf_counter()
            if isinstance(row, Bicubic):
                made = [published_bicubic(hr, row.scale) for _, _, hr in batch]
            elif isinstance(row, dict):
                made = [data.read_image(row[name]) for _, name, _ in batch]
            else:
                made = upscaled(row, [lr for lr, _, _ in batch], options)
            seconds += [(time.perf_counter() - began) / len(batch)] * len(batch)
            for (_, name, hr), sr in zip(batch, made):
                if isinstance(row, dict) and sr.shape != hr.shape:
                    raise data.DataError(f"{row[name]} is {sr.shape[1]}x{sr.shape[0]}, but its HR image {name}, cropped to a "
                                         f"multiple of {options.scale}, is {hr.shape[1]}x{hr.shape[0]}")
                a, b = sr if isinstance(row, Bicubic) else planes(sr, hr, options.scale)
                figures[name] = (psnr(a, b), ssim(a, b))
    figures = {name: figures[name] for name, _, _ in pairs}  # in the set's order again
    mean = np.mean(list(figures.values()), axis=0)
    return dict(psnr=float(mean[0]), ssim=float(mean[1]), seconds=float(np.median(seconds)),
                images={k: dict(psnr=p, ssim=s) for k, (p, s) in figures.items()})


def batches(items, options):
    """Lists of consecutive items (picture, …) with pictures of one size: on a GPU as many as fill one tile, on the CPU
    one by one, which is as fast there. Where `items` fails, what came before it is handed out first."""
    limit, batch = 0 if options.device.type == "cpu" else (options.tile or 256) ** 2, []
    try:
        for item in items:
            h, w = item[0].shape[:2]
            if batch and (batch[0][0].shape[:2] != (h, w) or (len(batch) + 1) * h * w > limit):
                yield batch
                batch = []
            batch.append(item)
    except data.DataError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def precision(options):
    """The context in which networks run at --precision."""
    half = dict(bfloat16=torch.bfloat16, float16=torch.float16).get(options.precision)
    return torch.autocast(options.device.type, half or torch.bfloat16, enabled=half is not None)


def upscaled(model, lrs, options):
    """A network's uint8 pictures of uint8 LR pictures (H,W,3) of one size. DataError where they are not finite."""
    x, parts = torch.cat([to_tensor(lr, options.device) for lr in lrs]), []
    with torch.inference_mode(), precision(options):
        for band in bands(model, x, options.tile, options.self_ensemble):
            if not band.isfinite().all():
                raise data.DataError(f"the network gives values that are not finite at --precision {options.precision}")
            parts.append([to_uint8(y[None]) for y in band])
    return [np.concatenate(p) for p in zip(*parts)]


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


def multiply_adds(row, width=1280, height=720):
    """`models.multiply_adds` of a row, or None where there are none to count or they cannot be."""
    try:
        return models.multiply_adds(row, width, height) if models.parameters(row) else None
    except Exception:  # a foreign network with operations that cannot be counted
        return None


def table(rows, sets, results):
    """The text of the table: a line a model, a column a set."""
    head = ["model", "params", "madds", *(f"{s} PSNR/SSIM" for s in sets), "s/image"]
    lines = [head]
    for name, row in rows.items():
        size = models.parameters(row) if isinstance(row, torch.nn.Module) else 0
        madds = size and multiply_adds(row)
        cost = f"{madds / 1e9:.1f} G" if madds else "?" if size else "-"
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


# ------------------------------------------------------------------------------------------------ speed
def bench(rows, options):
    """Prints a line of JSON a network: its time for one picture of 1280×720, the field's convention, not in tiles.

    The networks take turns, so what slows the machine down for a while slows all of them. ratio: median time over
    the first network's. peak_mib: on a GPU the most allocated in a run; on the CPU the process's peak so far."""
    device, s, gpu = options.device, options.scale, options.device.type == "cuda"
    h, w = 720 // s, 1280 // s
    x = torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(0)).to(device, memory_format=torch.channels_last)
    times, peak = {name: [] for name in rows}, {}
    for _ in tqdm(range(options.bench + 2), leave=False, unit="turn"):
        for name, row in rows.items():
            if gpu:
                torch.cuda.reset_peak_memory_stats(device)
            began = time.perf_counter()
            with torch.inference_mode(), precision(options):
                next(bands(row, x, ensemble=options.self_ensemble))
            if gpu:
                torch.cuda.synchronize(device)
            times[name].append(1000 * (time.perf_counter() - began))
            peak[name] = peak_mib(device)
    times = {name: t[2:] for name, t in times.items()}  # the first two warm up
    first, about = np.median(next(iter(times.values()))), provenance(options.command, device)
    for name, row in rows.items():
        ms, madds = np.median(times[name]), multiply_adds(row, w * s, h * s)
        gflops = madds and round(2 * madds * (8 if options.self_ensemble else 1) / ms / 1e6, 1)
        print(json.dumps(dict(model=name, ms=round(ms, 3), ms_min=round(min(times[name]), 3), images_per_s=round(1000 / ms, 2),
                              ratio=round(ms / first, 4), gflops_per_s=gflops, peak_mib=peak[name], turns=options.bench,
                              input=[w, h], scale=s, precision=options.precision, self_ensemble=options.self_ensemble, **about)))


def peak_mib(device):
    """The most memory held so far: what torch allocated on a GPU, else the process's resident set (None on Windows)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2 ** 20)
    try:
        import resource  # Unix only
    except ImportError:
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10))


# ------------------------------------------------------------------------------------------------ pictures
def figure(rows, pair, options, size=96):
    """Crops of HR and of every row side by side, 3× enlarged, the crop chosen where bicubic errs most."""
    name, lr, hr = pair
    s, size = options.scale, min(size, *hr.shape[:2])
    pictures = {"HR": hr} | {label: upscaled(row, [lr], options)[0] for label, row in rows.items() if not isinstance(row, Path)}
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
    with tqdm(paths, unit="picture", disable=len(paths) == 1) as bar:
        for batch in batches(((data.read_picture(path), path, target) for path, target in zip(bar, targets)), options):
            rgb = [image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, 2) for image, _, _ in batch]
            (h, w), path = batch[0][0].shape[:2], batch[0][1]
            if (pixels := h * w * options.scale ** 2) * 8 > data.machine_memory():  # bytes: three colours, twice, and more
                raise data.DataError(f"{path}, {w}x{h}, would become {pixels / 1e6:.0f} million pixels, more than this machine's "
                                     "memory holds")
            for (image, path, target), big in zip(batch, upscaled(model, rgb, options)):
                channels = image.shape[2]
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
    except (OSError, ValueError, KeyError) as e:
        raise data.DataError(f"{path} cannot be written: {getattr(e, 'strerror', None) or e}") from None
    models.write_atomically(content, path)


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
    p.add_argument("--precision", default="float32", choices=("float32", "bfloat16", "float16"), help="of the networks [float32]")
    p.add_argument("--bench", nargs="?", type=int, const=10, metavar="N", help="time the networks in N turns on one picture [10]")
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


def keep_freed_memory():
    """Has glibc keep freed memory for the next large tensor instead of giving it back to the system, which would hand it
    out again page by page, each cleared first: a fifth of a network's time on two cores. Elsewhere does nothing."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # Windows, macOS, musl
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing in a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def load_rows(options):
    """{name: network | Bicubic | folder} in the order given; fixes options.scale and options.device."""
    options.device = pick_device(options.device)
    if options.precision == "float16" and options.device.type == "cpu":
        raise data.DataError("--precision float16 needs a GPU: on the CPU it is many times slower than bfloat16, use that")
    override = {} if options.res_scale is None else dict(res_scale=options.res_scale)
    rows, scale = {}, options.scale
    for name in options.models:
        if name != "bicubic" and not os.path.exists(name) and difflib.get_close_matches(name, ["bicubic"]):
            raise data.DataError(f"{name} does not exist; did you mean bicubic?")
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
    if bool(options.input) != bool(options.output) or not (options.input or options.data or options.bench is not None):
        raise data.DataError("give --data DIR to score, --input and --output to upscale, or --bench")
    if options.bench is not None and (not 1 <= options.bench <= 10**6 or options.sr):
        raise data.DataError(f"--bench {options.bench}: needs 1 to a million turns, and networks, not --sr")
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
        keep_freed_memory()
        rows = load_rows(options)
        if options.bench:
            bench(rows, options)
        if options.data:
            evaluate(rows, options)
        if options.input:
            if len(rows) != 1:
                raise data.DataError("--input takes one model")
            upscale_files(next(iter(rows.values())), options)


if __name__ == "__main__":
    main()
