"""Evaluation: Y-PSNR and SSIM tables, upscaling of pictures, figures, timing.

    python evaluate.py student.pt teacher.pt bicubic --data Set5 Set14      a row a model, a column a set
    python evaluate.py --sr results/mine --data Set5 --scale 4              score pictures made by any tool
    python evaluate.py student.pt --input photo.jpg --output big            upscale a picture, or a folder
    python evaluate.py student.pt bicubic --data Set5 --figure compare.png  crops side by side
    python evaluate.py teacher.pt student.pt --bench                        milliseconds an image, in turns

Protocol: HR is cropped to a multiple of s. LR is MATLAB's bicubic of HR. SR is rounded to uint8. s pixels are
shaved off each edge. Luma Y is BT.601's in 16–235, not rounded. SSIM has an 11×11 Gaussian of sigma 1.5.
"""
import argparse
import contextlib
import ctypes
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont  # Pillow comes with imageio
from skimage.metrics import structural_similarity
from tqdm import tqdm

import data
import models


def luma(rgb):
    """Y of MATLAB's rgb2ycbcr: uint8 (H,W,3) to float64 (H,W) in 16–235, not rounded."""
    return rgb.astype(np.float64) @ (np.array([65.481, 128.553, 24.966]) / 255) + 16


def planes(sr, hr, border):
    """The luma planes of two pictures without `border` pixels at each edge. A plane (H,W) stays as it is."""
    inside = slice(border, -border or None)
    return [(luma(p) if p.ndim == 3 else p)[inside, inside] for p in (sr, hr)]


def psnr_y(sr, hr, border):
    """PSNR on Y in dB, infinite for equal pictures. sr, hr: uint8 (H,W,3), or luma planes (H,W), of one size;
    border: pixels shaved off each edge, by custom the scale."""
    mse = np.mean(np.subtract(*planes(sr, hr, border)) ** 2)
    return float(10 * np.log10(255 ** 2 / mse)) if mse else float("inf")


def ssim_y(sr, hr, border):
    """SSIM on Y in [−1,1] (Wang et al., 2004). Arguments as in `psnr_y`; 11×11 pixels must be left."""
    return float(structural_similarity(*planes(sr, hr, border), data_range=255, gaussian_weights=True,
                                       sigma=1.5, use_sample_covariance=False))


def published_bicubic(hr, scale):
    """The luma planes (sr, hr) of published bicubic figures: only luma is resized, and LR is not rounded.
    Networks read the rounded RGB picture; bicubic made from that scores up to 0.01 dB higher."""
    y = np.floor(luma(hr) + 0.5)
    sr = data.imresize(data.imresize(torch.from_numpy(y), 1 / scale), scale).numpy()
    return np.floor(sr.clip(0, 255) + 0.5), y


def to_tensor(image, device="cpu"):
    """uint8 (H,W,3) to float (1,3,H,W) in [0,1]."""
    return torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1)[None].float() / 255


def to_uint8(x):
    """Float (1,3,H,W) to uint8 (H,W,3), clipped to [0,1] and rounded half up; in bands, to save memory."""
    bands = [band.float().clamp(0, 1).mul_(255).add_(0.5).byte() for band in x[0].split(256, dim=1)]
    return torch.cat(bands, dim=1).permute(1, 2, 0).contiguous().cpu().numpy()


@torch.no_grad()
def upscale(model, x, tile=0):
    """f(x) for pictures x (N,3,h,w) in [0,1] of any size: (N,3,s·h,s·w).
    A picture larger than `tile` LR pixels is a weighted sum of tiles (0: never). For EDSR of up to 46 blocks
    it equals f of the whole picture. RCAN and SwinIR see farther, so their tiles fade into each other."""
    (h, w), s = x.shape[-2:], model.scale
    if tile <= 0 or max(h, w) <= tile:
        return model(x)
    total = x.new_zeros(len(x), 3, s * h, s * w)
    for y0, y1, weight_y in tiles_along(h, tile, model):
        for x0, x1, weight_x in tiles_along(w, tile, model):
            weight = (weight_y[:, None] * weight_x).to(x.device)
            total[..., s * y0:s * y1, s * x0:s * x1] += weight * model(x[..., y0:y1, x0:x1])
    return total


def tiles_along(n, tile, model):
    """Yields (start, end, weights) of each tile along n LR pixels. It reads [start, end): core and margin.
    weights (s·(end−start),): 1 in the core, 0 in the margin, fading between. Over all tiles they sum to 1."""
    margin, s = min(model.receptive_radius or 32, 96), model.scale
    fade = 0 if margin == model.receptive_radius else 16  # LR pixels on each side of a line between cores
    size = -(-tile // 8) * 8  # of a core; SwinIR's windows of 8 pixels stay in place
    cores, position = range(0, n, size), (torch.arange(s * n) + 0.5) / s
    inside = torch.stack([torch.minimum(position - core, core + size - position) for core in cores])
    weights = ((inside + fade) / max(2 * fade, 1e-3)).clamp(0, 1)  # (tiles,s·n)
    weights /= weights.sum(dim=0)
    for core, weight in zip(cores, weights):
        start, end = max(core - fade - margin, 0), min(core + size + fade + margin, n)
        yield start, end, weight[s * start:s * end]


def self_ensemble(f, x):
    """The mean of f over the eight flips and transpositions, each undone (the "+" of EDSR+ and RCAN+)."""
    both = lambda y: f(y) + f(y.mT).mT  # as it is, and transposed
    return sum(both(x.flip(dims)).flip(dims) for dims in ((), (-1,), (-2,), (-1, -2))) / 8


def enlarge(row, name, lr, options):
    """The uint8 picture that a row of the table has for the picture `name`, whose LR is lr, uint8 (h,w,3).
    row: a network, "bicubic", or a folder of pictures made by another tool."""
    if row == "bicubic":
        return data.imresize(lr, options.scale)
    if isinstance(row, Path):
        return read_result(row, name, lr, options.scale)
    x, f = to_tensor(lr, options.device), lambda x: upscale(row, x, options.tile)
    return to_uint8(self_ensemble(f, x) if options.self_ensemble else f(x))


def read_result(place, name, lr, s):
    """The picture in `place` for an HR picture baby: babyx4, baby_x4, baby_ANY_x4, baby or baby_ANY."""
    forms = (name, f"{name}x{s}")
    own = [p for p in data.find_images([place]) if p.stem in forms or p.stem.startswith(f"{name}_")]
    if not own:
        raise data.DataError(f"{place} has no picture for {name}, such as {name}_x{s}.png")
    path = min(own, key=lambda p: (not p.stem.endswith(f"x{s}"), len(p.stem)))
    sr, expected = data.read_image(path), (s * lr.shape[0], s * lr.shape[1], 3)
    if sr.shape != expected:
        raise data.DataError(f"{path} has the shape {sr.shape}; HR, cropped for x{s}, has {expected}")
    return sr


def score(row, pairs, options):
    """A row of the table on one set: the mean PSNR and SSIM, and those of each image.
    They are against HR or, with --against, what that network makes of LR."""
    images, s = {}, options.scale
    for name, (lr, hr) in tqdm(pairs.items(), leave=False, unit="image"):
        if options.teacher:
            hr = enlarge(options.teacher, name, lr, options)
        plain = row == "bicubic" and not options.teacher
        a, b = published_bicubic(hr, s) if plain else (enlarge(row, name, lr, options), hr)
        images[name] = dict(psnr=psnr_y(a, b, s), ssim=ssim_y(a, b, s))
    mean = {key: float(np.mean([image[key] for image in images.values()])) for key in ("psnr", "ssim")}
    return dict(**mean, images=images)


def evaluate(rows, options):
    """Prints the table of all rows on all sets. Writes --figure, and --json with each image's figures."""
    s, results, sets = options.scale, {}, {}
    least = 2 + -(-11 // s)  # LR pixels a side: SSIM's window and two borders must fit into HR
    for place in options.data:
        paths = data.find_images([place])
        sets[place] = {p.stem: data.read_pair(p, None, s, least) for p in paths}
        if len(sets[place]) < len(paths):
            raise data.DataError(f"{place} holds two pictures of the same name, such as a.png and a.bmp")
    if options.figure:
        place = options.data[0]
        name = options.image or next(iter(sets[place]))
        if name not in sets[place]:
            raise data.DataError(f"--image {name} is not in {place}: name one of its pictures")
        write_figure(options.figure, rows, name, *sets[place][name], options)
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)  # this fails before the long work
    width = max(map(len, rows))
    print("model".ljust(width), " params", "   madds", *(f"{place} PSNR/SSIM" for place in sets), sep="  ")
    for name, row in rows.items():
        scores = results[name] = {place: score(row, pairs, options) for place, pairs in sets.items()}
        size = madds = "-"
        if isinstance(row, torch.nn.Module):
            size, count = f"{models.parameters(row) / 1e6:.2f} M", models.multiply_adds(row)
            madds = f"{count / 1e9:.1f} G" if count else "?"
        cells = [f"{r['psnr']:.2f}/{r['ssim']:.4f}".rjust(len(place) + 10) for place, r in scores.items()]
        print(name.ljust(width), size.rjust(7), madds.rjust(8), *cells, sep="  ")
    if options.json:
        about = provenance(options.command, options.device)
        about |= dict(scale=s, precision=options.precision, self_ensemble=options.self_ensemble)
        Path(options.json).write_text(json.dumps(about | dict(results=results), indent=1))


def provenance(command, device):
    """What it takes to repeat a result: command, commit ("" outside a repository), device, versions, time."""
    describe = f'git -C "{Path(__file__).parent}" describe --always --dirty --abbrev=12'
    failed, commit = subprocess.getstatusoutput(describe)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability()
    return dict(command=command, git="" if failed else commit, device=str(device), device_name=name,
                versions=dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__),
                threads=torch.get_num_threads(), started=time.strftime("%Y-%m-%dT%H:%M:%S%z"))


def bench(rows, options):
    """Prints a line of JSON a network: its time for one whole picture of 1280×720, the field's convention.
    The networks take turns, so that a slow spell of the machine slows all. ratio: ms over the first one's."""
    h, w, device = 720 // options.scale, 1280 // options.scale, options.device
    x = torch.rand(1, 3, h, w).to(device, memory_format=torch.channels_last)
    times, peaks = {name: [] for name in rows}, {}
    for _ in tqdm(range(options.bench + 2), leave=False, unit="turn"):
        for name, network in rows.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            began = time.perf_counter()
            network(x)[0, 0, 0, 0].item()  # waits for the GPU
            times[name].append(1000 * (time.perf_counter() - began))
            peaks[name] = peak_memory(device)
    for name in rows:
        ms, first = times[name][2:], times[next(iter(rows))][2:]  # two turns warm up
        line = dict(model=name, ms=round(np.median(ms), 3), ms_min=round(min(ms), 3),
                    ratio=round(np.median(ms) / np.median(first), 4), peak_memory_gib=peaks[name],
                    turns=options.bench, input=[w, h], scale=options.scale, precision=options.precision)
        print(json.dumps(line | provenance(options.command, device)))


def peak_memory(device):
    """The most GiB of a GPU that torch has held so far. None on the CPU."""
    return round(torch.cuda.max_memory_allocated(device) / 2 ** 30, 3) if device.type == "cuda" else None


def keep_freed_memory():
    """Has glibc keep freed memory. To clear it again would cost large networks time."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: large tensors come from the heap, too
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def figure(pictures, scale):
    """The same crop of each picture side by side, each with its label and Y-PSNR: uint8 (H,W,3).
    pictures: {label: uint8 (h,w,3)}, HR first, h and w multiples of s. The crop of 96 pixels a side lies
    where bicubic errs most, and is enlarged 3 times. Y-PSNR is the whole picture's, without a border of s."""
    hr = next(iter(pictures.values()))
    error = (luma(data.imresize(data.pair(hr, scale)[0], scale)) - luma(hr)) ** 2
    side = min(96, *hr.shape[:2])
    means = torch.nn.functional.avg_pool2d(torch.from_numpy(error)[None], side, stride=8)[0].numpy()
    top, left = 8 * np.array(np.unravel_index(means.argmax(), means.shape))
    width = 3 * side
    canvas = Image.new("RGB", (len(pictures) * (width + 6) - 6, width + 64), "white")
    for x, (label, picture) in zip(range(0, canvas.width, width + 6), pictures.items()):
        crop = picture[top:top + side, left:left + side].repeat(3, axis=0).repeat(3, axis=1)
        canvas.paste(Image.fromarray(crop), (x, 0))
        text = label if picture is hr else f"{label}\n{psnr_y(picture, hr, scale):.2f} dB"
        letters = min(24, 24 * width / ImageFont.load_default(24).getlength(label))  # a long label must fit
        font = ImageFont.load_default(letters)
        place = (x + width / 2, width + 4)
        ImageDraw.Draw(canvas).text(place, text, "black", font, anchor="ma", align="center")
    return np.asarray(canvas)


def write_figure(path, rows, name, lr, hr, options):
    """Writes the `figure` of a picture's HR and of what each row makes of its LR."""
    pictures = {label: enlarge(row, name, lr, options) for label, row in rows.items()}
    write_picture(path, figure(dict(HR=hr) | pictures, options.scale))


def upscale_files(row, options):
    """Upscales a picture, or those of a folder. Grey stays grey, and alpha is upscaled bicubically."""
    out, s = Path(options.output), options.scale
    for path in tqdm(data.find_images([options.input]), unit="picture"):
        target = out if out.suffix.lower() in data.EXTENSIONS else out / f"{path.stem}_x{s}.png"
        if target.exists():
            raise data.DataError(f"{target} exists already and is not overwritten: name another --output")
        picture = data.read_picture(path)
        big = enlarge(row, path.stem, data.read_image(path), options)
        if picture.shape[2] < 3:  # grey: the network's three colours differ by less than a grey level
            big = np.floor(big.mean(axis=2, keepdims=True) + 0.5).astype(np.uint8)
        if picture.shape[2] in (2, 4):
            big = np.concatenate([big, data.imresize(picture[..., -1:], s)], axis=2)
        write_picture(target, big)


def write_picture(path, image):
    """Writes uint8 (H,W,C) in the format of the path's ending. DataError where that fails."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with models.replacing(path) as file:
            iio.imwrite(file, image[..., 0] if image.shape[2] == 1 else image, plugin="pillow",
                        extension=Path(path).suffix.lower())
    except OSError as e:  # a full disk, or a format that is unknown or cannot hold the picture
        raise data.DataError(f"{path} cannot be written: {e.strerror or e}") from None


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line."""

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())} (see --help)\n")


def parse(argv):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("models", nargs="*", metavar="MODEL", help="checkpoints, and the word bicubic")
    p.add_argument("--data", nargs="+", default=[], metavar="DIR", help="folders of HR, one a column")
    p.add_argument("--sr", nargs="+", default=[], metavar="DIR", help="folders of SR, one a row")
    p.add_argument("--scale", type=int, choices=models.SCALES, help="s, where no checkpoint tells it")
    p.add_argument("--against", metavar="MODEL", help="compare with its pictures, not with HR")
    p.add_argument("--json", metavar="FILE", help="write the table and each image's figures")
    p.add_argument("--figure", metavar="FILE", help="write crops of HR and of each row, side by side")
    p.add_argument("--image", metavar="NAME", help="a picture of the first set for --figure [its first]")
    p.add_argument("--input", metavar="FILE|DIR", help="pictures to upscale")
    p.add_argument("--output", metavar="FILE|DIR", help="where the upscaled pictures are written")
    p.add_argument("--tile", type=int, default=256, help="LR pixels a side of a tile; 0: no tiles [256]")
    p.add_argument("--self-ensemble", action="store_true", help="mean over eight flips and transpositions")
    p.add_argument("--device", default="", help="cpu, cuda, cuda:1, … [cuda where there is one]")
    p.add_argument("--precision", default="float32", choices=("float32", "bfloat16"), help="[float32]")
    p.add_argument("--bench", nargs="?", type=int, const=10, metavar="N", help="time networks, N turns [10]")
    o = p.parse_args(argv)
    if not (o.models or o.sr) or not (o.data or o.input or o.output or o.bench is not None):
        p.error("name models, and --data to score, --input and --output to upscale, or --bench")
    if bool(o.input) != bool(o.output):
        p.error(f"{'--output' if o.input else '--input'} is missing: pictures go from --input to --output")
    if o.image and not o.figure:
        p.error("--image needs --figure")
    if o.input and (len(o.models) != 1 or o.sr):
        p.error("--input takes one model")
    if (o.sr or o.json or o.figure or o.against) and not o.data:
        p.error("--sr, --json, --figure and --against need --data")
    if o.bench is not None and (o.bench < 1 or o.sr or o.self_ensemble or "bicubic" in o.models):
        p.error("--bench takes networks alone (not bicubic, --sr or --self-ensemble), and 1 turn or more")
    return o


def pick_device(name=""):
    """The device of that name; without a name a GPU, or the CPU where there is none. DataError if absent."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()  # this fails also for "meta", which holds no values
    except (RuntimeError, AssertionError, ValueError) as e:
        raise data.DataError(f"--device {name} is not usable here: {str(e).splitlines()[0]}") from None
    return torch.device(name)


@contextlib.contextmanager
def errors_in_one_line(*kinds):
    """Ends the program with one line and exit code 2 for what users can cause, and for errors of `kinds`."""
    try:
        yield
        return
    except (data.DataError, models.CheckpointError, *kinds) as e:
        message = str(e)
    except OSError as e:
        message = f"{e.filename or 'a file'} cannot be read or written: {e.strerror or e}"
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not ("alloc" in str(e) and "memory" in str(e)):
            raise
        message = "out of memory: smaller batches, patches or tiles need less"
    for bar in list(getattr(tqdm, "_instances", ())):  # an open bar would share the error's line
        bar.close()
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    with errors_in_one_line(), torch.inference_mode():
        options = parse(argv)
        options.command = shlex.join(["python", "evaluate.py", *argv])
        options.device = pick_device(options.device)
        keep_freed_memory()
        names = [*options.models, *([options.against] if options.against else [])]
        networks = {name: models.load(name) for name in names if name != "bicubic"}
        for name, network in networks.items():
            network.to(options.device, memory_format=torch.channels_last)
            options.scale = options.scale or network.scale
            if network.scale != options.scale:
                raise data.DataError(f"{name} is a x{network.scale} network, but x{options.scale} is wanted")
        if not options.scale:
            raise data.DataError("no checkpoint tells the scale: give --scale")
        options.teacher = networks.get(options.against)
        rows = {name: networks.get(name, name) for name in options.models} | {p: Path(p) for p in options.sr}
        with torch.autocast(options.device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
            if options.bench:
                bench(rows, options)
            if options.data:
                evaluate(rows, options)
            if options.input:
                upscale_files(*rows.values(), options)


if __name__ == "__main__":
    main()
