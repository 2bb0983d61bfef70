"""Images: reading them, MATLAB's bicubic, and training patches drawn as whole batches by index arithmetic.

A picture is a uint8 array (H,W,C); a batch is a float tensor (N,3,h,w) in [0,1]. Nothing here starts worker
processes: every image is decoded once into one flat uint8 store, which lies in memory, on the GPU, or, when it is
large, in a file mapped into memory, and a batch is one gather from it.
"""
import contextlib
import hashlib
import json
import os
import secrets
import stat
import tempfile
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import skimage.data
import torch
from tqdm import tqdm

from dukd import bicubic_resize, bicubic_taps

# What Pillow has to say of a file is an error here or is nothing: no stray lines, from a few threads at once, on a terminal.
warnings.filterwarnings("ignore", module=r"PIL\.")

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif"}
# The kind of picture that a file's mode is read as, where it is not its own; transparency: of a palette or one colour.
WITHOUT_ALPHA = dict(P="RGB", PA="RGBA", CMYK="RGB", YCbCr="RGB", LAB="RGB", HSV="RGB")
WITH_ALPHA = WITHOUT_ALPHA | dict(P="RGBA", L="LA", RGB="RGBA") | {"1": "LA"}
LARGEST_FILE = 2**31  # bytes; Pillow itself refuses what declares more than 179 million pixels
# scikit-image's natural photographs, all inside its wheel. The second list is held out for validation.
EMBEDDED_TRAIN = ("astronaut.png", "brick.png", "camera.png", "grass.png", "gravel.png", "hubble_deep_field.jpg",
                  "moon.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg")
EMBEDDED_VAL = ("chelsea.png", "coffee.png", "coins.png")


class DataError(ValueError):
    """An image or a folder that cannot be used; the message says which, why, and what to do."""

    def __str__(self):
        return printable(super().__str__())


def printable(text):
    """A message as one line, also where a file's name holds line breaks or a terminal's control characters."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.splitlines()))[:2000]


# ------------------------------------------------------------------------------------------------ reading
def read_picture(path):
    """The picture in a file as uint8 (H,W,C): C = 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.

    Palettes are resolved, CMYK becomes RGB, 16-bit grey is scaled to 8 bits, EXIF rotation is applied. DataError,
    naming the file, for anything that is not one such picture."""
    content = _content(path)
    try:
        with iio.imopen(content, "r", plugin="pillow") as file:
            frames = file.properties(index=...).n_images or 1
            about = file.metadata(index=0, exclude_applied=False)
            modes = WITH_ALPHA if "transparency" in about else WITHOUT_ALPHA
            image = file.read(index=0, rotate=True, mode=modes.get(about["mode"]))
    except Exception as e:  # Pillow raises a dozen kinds for broken files; its text names the defect
        e = e.__cause__ if "`pillow`" in str(e) else e  # imageio's general words; the cause is behind them
        detail = str(e).splitlines()[0][:120] if e and str(e) and "BytesIO" not in str(e) and "<bytes>" not in str(e) else ""
        raise DataError(f"{path} is not a readable image{f' ({detail})' if detail else ''}") from None
    if frames > 1 and not content.startswith(b"\xff\xd8"):  # a JPEG's further pictures are previews
        raise DataError(f"{path} holds {frames} frames; split it into single pictures")
    return _to_uint8(image, path)


def _content(path):
    """The bytes of a file: bytes, so that imageio never takes a name for an address to download. DataError for a pipe
    or a device, which might never end, and for what is empty or too large."""
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            raise DataError(f"{path} is not a file (a directory, a pipe or a device)")
        if about.st_size > LARGEST_FILE:
            raise DataError(f"{path} has {about.st_size / 2**30:.1f} GiB, too many for a picture")
        content = Path(path).read_bytes()
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror or e}") from None
    if not content:
        raise DataError(f"{path} is empty (zero bytes)")
    return content


def _to_uint8(image, path):
    """Bool, 16-bit and 32-bit-integer-held 16-bit arrays to uint8 (H,W,C)."""
    if image.dtype == bool:
        image = image.astype(np.uint8) * 255
    elif image.dtype in (np.uint16, np.int32) and 0 <= image.min() and image.max() <= 65535:
        image = ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if image.dtype != np.uint8:
        raise DataError(f"{path} holds {image.dtype} values; convert it to 8 or 16 bits")
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[2] > 4:
        raise DataError(f"{path} has the shape {image.shape}, not (height, width, channels)")
    return image


def read_image(path):
    """The picture in a file as RGB uint8 (H,W,3): grey is repeated, alpha is left out. DataError as `read_picture`."""
    image = read_picture(path)
    return np.ascontiguousarray(image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, axis=2))


def find_images(places, skip_bad=False):
    """The image files of folders (not of their subfolders), and files named themselves, each place's sorted by name.
    DataError for a place that is missing or has no image, and, unless skip_bad leaves it out with a line, for a folder's
    entry that is no file, or is a link to a file outside the folder: a folder from elsewhere must not reach into yours."""
    found = []
    for place in map(Path, places):
        if os.path.isfile(place):
            found.append(place)
            continue
        try:
            entries = sorted(place.iterdir())
        except FileNotFoundError:
            raise DataError(f"{place} does not exist") from None
        except OSError as e:
            raise DataError(f"{place} cannot be read: {e.strerror or e}") from None
        named = [p for p in entries if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".") and not os.path.isdir(p)]
        images = []
        for path in named:
            if not (fault := _fault(path, place)):
                images.append(path)
            elif skip_bad:
                tqdm.write(f"left out: {fault}")
            else:
                raise fault
        if not images:
            inside = [p.name for p in entries if p.is_dir()][:3]
            raise DataError(f"{place} has no images in it" + (f"; name a folder inside it ({', '.join(inside)})" if inside else ""))
        found += images
    return found


def _fault(path, folder):
    """The DataError of a folder's entry that is no file of this folder, or None."""
    target = os.path.realpath(path)
    if path.is_symlink() and not Path(target).is_relative_to(os.path.realpath(folder)):
        return DataError(f"{path} is a link to {target}, outside its folder: put a copy there, or name that folder instead")
    return None if os.path.isfile(path) else DataError(f"{path} is not a file (a pipe, a device, or a link to nothing)")


def machine_memory():
    """Bytes of memory in this machine, infinity where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return float("inf")


def embedded(names):
    """The paths of scikit-image's own pictures."""
    folder = Path(skimage.data.__file__).parent
    if missing := [n for n in names if not (folder / n).is_file()]:
        raise DataError(f"this scikit-image does not ship {missing[0]}; name a folder of images with --data")
    return [folder / n for n in names]


# ------------------------------------------------------------------------------------------------ resizing
def imresize(image, factor):
    """MATLAB's `imresize(image, factor)`, bicubic and antialiased.

    uint8 array (H,W) or (H,W,C): bit-exact with MATLAB, which resizes the rows, rounds half up to uint8, and only
    then resizes the columns and rounds again. Float tensor (…,H,W): no rounding, differentiable. Sizes become
    ⌈n·factor⌉. TypeError for any other kind, ValueError for a factor that is not positive."""
    if not factor > 0:
        raise ValueError(f"imresize: the factor must be positive, not {factor}")
    if isinstance(image, torch.Tensor) and image.is_floating_point():
        return bicubic_resize(image, factor)
    if not (isinstance(image, np.ndarray) and image.dtype == np.uint8):
        raise TypeError(f"imresize takes uint8 arrays and float tensors, not {getattr(image, 'dtype', type(image))}")
    return _resize_rows(_resize_rows(image, factor).swapaxes(0, 1), factor).swapaxes(0, 1).copy()


def _resize_rows(image, factor):
    """One pass along axis 0, tap by tap (MATLAB's order of summation), rounded half up and clipped to uint8."""
    weights, index = (t.numpy() for t in bicubic_taps(image.shape[0], factor))
    out = np.zeros((len(weights), *image.shape[1:]))
    for w, i in zip(weights.T, index.T):
        if w.any():
            out += w.reshape(-1, *[1] * (image.ndim - 1)) * image[i]
    return np.floor(out.clip(0, 255) + 0.5).astype(np.uint8)


def pair(hr, scale):
    """An HR picture cropped at the bottom and right to a multiple of s, and its LR by MATLAB's bicubic."""
    hr = np.ascontiguousarray(hr[:hr.shape[0] // scale * scale, :hr.shape[1] // scale * scale])
    return imresize(hr, 1 / scale), hr


def read_pair(path, lr_path, scale, least=1):
    """(lr, hr) uint8 arrays of an HR file, and of its given LR file where there is one.

    least: the LR size at which an image is large enough. DataError, naming file and sizes, where it is smaller or
    the two do not belong together."""
    hr = read_image(path)
    h, w = hr.shape[0] // scale, hr.shape[1] // scale
    if min(h, w) < least:
        raise DataError(f"{path} is {hr.shape[1]}x{hr.shape[0]}, smaller than {least * scale}x{least * scale}"
                        + (" (an HR patch); use a smaller --patch or leave the image out" if least > 1 else ""))
    if lr_path is None:
        return pair(hr, scale)
    lr = read_image(lr_path)
    if lr.shape[:2] != (h, w):
        raise DataError(f"{lr_path} is {lr.shape[1]}x{lr.shape[0]}, but {path} is {hr.shape[1]}x{hr.shape[0]} "
                        f"and needs {w}x{h} at x{scale}")
    return lr, hr[:h * scale, :w * scale]


def match_lr(paths, lr_places, scale):
    """The LR file of each HR file: 0001.png pairs with 0001x4.png, 0001_x4.png or 0001.png. DataError where one lacks."""
    if not lr_places:
        return [None] * len(paths)
    files = find_images(lr_places)
    by_stem = {p.stem: p for p in files}
    if twins := [p for p in files if by_stem[p.stem] != p]:
        raise DataError(f"{twins[0]} and {by_stem[twins[0].stem]} have the same name: which HR image is whose cannot be told")
    matched = [next((by_stem[n] for n in (f"{p.stem}x{scale}", f"{p.stem}_x{scale}", p.stem) if n in by_stem), None)
               for p in paths]
    if None in matched:
        path = paths[matched.index(None)]
        raise DataError(f"{path} has no LR image: looked for {path.stem}x{scale}, {path.stem}_x{scale} and {path.stem} "
                        f"in {', '.join(map(str, lr_places))}")
    return matched


# ------------------------------------------------------------------------------------------------ the store
class Store:
    """All training images, decoded: one flat array of RGB pixels and two tables that say where each image lies.

    pixels (P,3) uint8; hr, lr (n,3) int64: first pixel, height, width; names: n file names. labels, if set: (P,3)
    float16, the teacher's picture f_T(I_LR) in [0,1] at the places of I_HR."""

    def __init__(self, pixels, hr, lr, names, file=None, labels=None):
        self.pixels, self.hr, self.lr, self.names, self.file, self.labels = pixels, hr, lr, names, file, labels

    def __len__(self):
        return len(self.names)

    def to(self, device):
        """On `device` where the images fit into half of its free memory; where they do not, they stay, and
        `Patches` gathers on the host."""
        device = torch.device(device)
        tensors = [self.pixels, self.hr, self.lr, *([] if self.labels is None else [self.labels])]
        if device.type == "cuda" and sum(t.nbytes for t in tensors) > torch.cuda.mem_get_info(device)[0] / 2:
            return self
        pixels, hr, lr, *labels = (t.to(device) for t in tensors)
        return Store(pixels, hr, lr, self.names, self.file, *labels)


def build_store(paths, lr_paths, scale, least, ram_limit, cache, skip_bad=False):
    """Decodes images into a Store, on the cores' threads.

    Up to ram_limit bytes it stays in memory. Beyond, it goes to a file in the folder `cache`, mapped into memory and
    found again by the next run over the same files (same paths, sizes, times, scale). `least` as in `read_pair`;
    skip_bad leaves unusable images out, each with a line, instead of raising their DataError."""
    key = store_key(paths, lr_paths, scale, least)
    file = Path(cache) / f"{key}.pixels"
    unique = f"{key}.{secrets.token_hex(4)}"  # another run may be at the same images
    spilled, index = (file.with_name(f"{unique}.{part}.tmp") for part in ("pixels", "json"))
    if (found := open_store(file, scale, least)) is not None and (skip_bad or len(found) == len(paths)):
        return found
    memory, spill, tables, names, done = deque(), None, ([], []), [], 0
    try:
        for path, result in _decoded(paths, lr_paths, scale, least):
            if isinstance(result, DataError):
                if not skip_bad:
                    raise result
                tqdm.write(f"left out: {result}")
                continue
            for table, image in zip(tables, result):
                table.append((done // 3, *image.shape[:2]))
                memory.append(image.reshape(-1))
                done += image.size
            names.append(path.name)
            if spill is None and done > ram_limit:
                file.parent.mkdir(parents=True, exist_ok=True)
                remove_leftovers(file.parent, key)
                spill = open(spilled, "xb")
            if spill is not None:
                while memory:
                    spill.write(memory.popleft().data)
        if not names:
            raise DataError("no usable image is left to train on")
        if spill is None:
            pixels, at = torch.empty(done, dtype=torch.uint8), 0
            while memory:  # each image's own array goes as its copy comes
                image = torch.from_numpy(memory.popleft())
                pixels[at:at + len(image)] = image
                at += len(image)
            return Store(pixels.view(-1, 3), torch.tensor(tables[1]), torch.tensor(tables[0]), names)
        spill.flush()
        os.fsync(spill.fileno())
        index.write_text(json.dumps(dict(bytes=done, lr=tables[0], hr=tables[1], names=names)))
        os.replace(spilled, file)
        os.replace(index, file.with_suffix(".json"))  # last: a store without its index does not count
    except OSError as e:
        raise DataError(f"{cache}: the decoded images ({done / 2**30:.1f} GiB so far) cannot be stored there: "
                        f"{e.strerror or e}; free space, or name another folder with --cache") from None
    finally:
        if spill is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take is not tried again
                spill.close()
        for path in (spilled, index):  # by names known before there were files: a signal can come between any two lines
            with contextlib.suppress(OSError):
                path.unlink()
    return open_store(file, scale, least)


def room_for_labels(store, ram_limit, cache):
    """An empty (P,3) float16 tensor for `store.labels`: in memory up to ram_limit bytes, beyond in a file mapped from the
    folder `cache`, which has no name and goes with the process. DataError where the disk has no room."""
    count = store.pixels.numel()
    if 2 * count <= ram_limit:
        return torch.empty(count, dtype=torch.float16).view(-1, 3)
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, 2 * count)
            return torch.from_numpy(np.memmap(file, np.float16, "r+", shape=(count // 3, 3)))
    except (OSError, RuntimeError) as e:
        raise DataError(f"{cache}: no room for the teacher's labels ({2 * count / 2**30:.1f} GiB): {getattr(e, 'strerror', None) or e}; "
                        "free space, name another folder with --cache, or leave --label-once out") from None


def remove_leftovers(folder, key):
    """Unfinished stores of these files that nobody has written to for an hour: those of runs that were killed."""
    for path in folder.glob(f"{key}*.tmp"):
        with contextlib.suppress(OSError):
            if path.lstat().st_mtime < time.time() - 3600:
                path.unlink()


def store_key(paths, lr_paths, scale, least):
    """The cache's name for these very files (path, size, time) at this scale."""
    digest = hashlib.sha256(json.dumps(["store 1", scale, least]).encode())
    for path in [*paths, *(p for p in lr_paths if p)]:
        try:
            stat = os.stat(path)
        except OSError as e:
            raise DataError(f"{path} cannot be read: {e.strerror or e}") from None
        digest.update(f"{Path(path).resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:20]


def open_store(file, scale, least):
    """The Store in a mapped file, or None where there is none, or none that is whole: its tables must be those of images
    that lie inside the file, large enough for patches, HR s times LR."""
    try:
        index = json.loads(file.with_suffix(".json").read_text())
        names, (hr, lr) = index["names"], (torch.tensor(index[name]) for name in ("hr", "lr"))
        if file.stat().st_size != index["bytes"] or not isinstance(names, list) or not names:
            return None
        if any(t.dtype != torch.int64 or t.shape != (len(names), 3) for t in (hr, lr)) or index["bytes"] % 3:
            return None
        if lr[:, 1:].min() < least or lr[:, 1:].max() > 2**28 or not torch.equal(hr[:, 1:], lr[:, 1:] * scale):
            return None
        if any((t[:, 0] < 0).any() or (t[:, 0] > index["bytes"] // 3 - t[:, 1] * t[:, 2]).any() for t in (hr, lr)):
            return None
        pixels = torch.from_file(str(file), shared=False, size=index["bytes"], dtype=torch.uint8).view(-1, 3)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None
    return Store(pixels, hr, lr, list(map(str, names)), file)


def _decoded(paths, lr_paths, scale, least):
    """Yields (path, (lr, hr) or DataError) in order, decoded ahead by a few threads, with a progress bar."""
    def work(job):
        try:
            return read_pair(*job, scale, least)
        except DataError as e:
            return e
    jobs, ahead = iter(zip(paths, lr_paths)), deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(paths), desc="decoding", unit="image", leave=False,
                                                          disable=len(paths) < 50, mininterval=1) as bar:
        try:
            while True:
                while len(ahead) < 2 * (os.cpu_count() or 1) and (job := next(jobs, None)):
                    ahead.append((job[0], pool.submit(work, job)))
                if not ahead:
                    return
                path, future = ahead.popleft()
                yield path, future.result()
                bar.update()
        finally:
            for _, future in ahead:
                future.cancel()


# ------------------------------------------------------------------------------------------------ patches
class Patches:
    """Aligned random LR/HR patches of a Store, for `device`; `to_float` makes batches in [0,1] of them.

    Images are drawn uniformly, then positions uniformly over the LR image."""

    def __init__(self, store, patch, scale, device="cpu"):
        self.room = store.lr[:, 1:].cpu() - patch + 1  # (n,2): how many tops and lefts each LR image has
        self.store, self.patch, self.scale, self.device = store.to(device), patch, scale, torch.device(device)
        self.resident = self.device.type != "cpu" and self.store.pixels.device.type == self.device.type

    def draw(self, n, generator):
        """Where n patches lie: image, top, left in LR pixels, (n,3) int64 on the CPU."""
        image = torch.randint(len(self.store), (n,), generator=generator)
        corner = torch.rand(n, 2, generator=generator, dtype=torch.float64) * self.room[image]  # float32 could round up to it
        return torch.cat([image[:, None], corner.long()], dim=1)

    def fetch(self, where):
        """The pixels at the places that `draw` gave, as stored and where stored: {"lr": (n,p,p,3), "hr":
        (n,s·p,s·p,3)}, and "label" like "hr" where the store has the teacher's."""
        store, p, s = self.store, self.patch, self.scale
        where = where.to(store.hr.device)
        found = dict(lr=_cut(store.pixels, store.lr, where, p, 1), hr=_cut(store.pixels, store.hr, where, p, s))
        return found if store.labels is None else found | dict(label=_cut(store.labels, store.hr, where, p, s))


def _cut(pixels, table, where, p, s):
    """(n,s·p,s·p,C): the square s·p a side at (image, s·top, s·left) for each row of `where`."""
    image, top, left = where.unbind(1)
    first, _, width = table[image].unbind(1)
    i = torch.arange(s * p, device=where.device)
    rows, cols = s * top[:, None] + i, s * left[:, None] + i  # (n,s·p) each
    return pixels[(first[:, None] + rows * width[:, None])[:, :, None] + cols[:, None, :]]


def to_float(pixels):
    """uint8 (n,h,w,3), or float16 labels, to float (n,3,h,w) in [0,1]."""
    x = pixels.permute(0, 3, 1, 2).float()
    return x / 255 if pixels.dtype == torch.uint8 else x
