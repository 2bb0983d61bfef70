"""Images: reading them, MATLAB's bicubic, and aligned training patches, drawn as whole batches.

A picture is a uint8 array (H,W,C). A batch is a float tensor (N,3,h,w) in [0,1]. All training images are
decoded once into one flat array of pixels. A batch is one gather from it, so no worker processes are needed.
"""
import contextlib
import functools
import hashlib
import io
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import skimage.data
import torch
from PIL import Image
from tqdm import tqdm

import models
from dukd import bicubic_resize

warnings.filterwarnings("ignore", module=r"PIL\.")  # read_picture raises what matters
warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # a Store in a file is only read
Image.MAX_IMAGE_PIXELS = None  # Pillow would refuse more than 179 megapixels; the user named the file

RAM = 2**30  # bytes of decoded images that stay in memory; more are written to a file
NO_PICTURES = {"BLP", "BUFR", "EPS", "GRIB", "HDF5", "ICNS", "ICO", "WMF"}  # textures, data, drawings, icons
EXTENSIONS = {ending for ending, kind in Image.registered_extensions().items()  # Pillow reads and writes them
              if kind in Image.OPEN and kind in Image.SAVE and kind not in NO_PICTURES}
# Pillow's modes that are converted, and what to. Where the file has a transparent colour, more are.
MODES = {"1": "L", "CMYK": "RGB", "LAB": "RGB", "YCbCr": "RGB", "HSV": "RGB", "RGBa": "RGBA", "PA": "RGBA"}
MODES_WITH_TRANSPARENCY = MODES | {"1": "LA", "L": "LA", "P": "RGBA", "RGB": "RGBA"}
PHOTOGRAPHS = Path(skimage.data.__file__).parent  # scikit-image brings them


class DataError(ValueError):
    """An image or a folder that cannot be used. The message says which, why, and what to do."""


def read_picture(path):
    """The picture in a file as uint8 (H,W,C): C = 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.
    Palettes and CMYK become RGB. 16-bit grey is rounded to 8 bits. Of 16-bit colour, Pillow
    gives the upper 8 bits. EXIF rotation is applied.
    DataError, naming the file, if it is missing, empty, damaged, of several frames, or holds other values."""
    if not Path(path).is_file() or Path(path).stat().st_size == 0:  # a pipe or a device might never end
        raise DataError(f"{path} is missing, empty or not a file")
    try:
        content = Path(path).read_bytes()  # imageio could take a name for an address to download
        with iio.imopen(content, "r", plugin="pillow") as file:
            frames = file.properties(index=...).n_images
            about = file.metadata(index=0)
            modes = MODES_WITH_TRANSPARENCY if "transparency" in about else MODES
            image = file.read(index=0, rotate=True, mode=modes.get(about["mode"]))
    except Exception as e:  # Pillow raises a dozen kinds for broken files
        reason = e.__cause__ if "`pillow`" in str(e) else e  # imageio hides Pillow's words behind its own
        raise DataError(f"{path} is not a readable image ({str(reason)[:100] or type(e).__name__})") from None
    if frames > 1 and not content.startswith(b"\xff\xd8"):  # a JPEG's further pictures are previews
        raise DataError(f"{path} holds {frames} frames; split it into single pictures")
    if image.dtype != np.uint8 and image.dtype.kind in "iu" and image.min() >= 0 and image.max() < 2**16:
        layers = [(image.astype(np.int64) + 128) // 257]  # 16-bit grey
        if "transparency" in about:  # one of the 16-bit values stands for transparent pixels
            layers.append(np.where(image == about["transparency"], 0, 255))
        image = np.stack(layers, axis=2).astype(np.uint8)
    if image.dtype != np.uint8:
        raise DataError(f"{path} holds {image.dtype} values; convert it to 8 or 16 bits")
    return image.reshape(*image.shape[:2], -1)


def read_image(path):
    """`read_picture` as RGB, uint8 (H,W,3). Grey is repeated three times. Alpha is left out."""
    image = read_picture(path)
    return np.ascontiguousarray(image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, axis=2))


def find_images(places):
    """The image files at `places`: files, and folders, whose images come sorted by name (see `_images_in`).
    A file that is found twice, also by a link, comes once. DataError for a missing place or dangling link."""
    found = {}
    for place in map(Path, places):
        images = _images_in(place) if place.is_dir() else [place]
        for path in images:
            if not path.exists():
                raise DataError(f"{path} does not exist, or is a link to a file that does not exist")
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _images_in(folder):
    """The image files in a folder, sorted by name. Hidden files and folders inside it are passed over.
    A note tells of files with other endings. DataError if there are no images."""
    files = [path for path in sorted(folder.iterdir()) if path.name[0] != "." and not path.is_dir()]
    images = [path for path in files if path.suffix.lower() in EXTENSIONS]
    others = [path for path in files if path.suffix.lower() not in EXTENSIONS]
    if not images:
        raise DataError(f"{folder} has no images in it (folders inside it are not searched)")
    if others:
        _note(f"files of unknown type in {folder} are left out: {len(others)}, such as {others[0].name}")
    return images


@functools.cache  # a folder may be looked into more than once
def _note(text):
    print("note:", text, file=sys.stderr)


def embedded_train():
    """The paths of scikit-image's photographs to train on where no data is given."""
    names = ["astronaut.png", "brick.png", "camera.png", "grass.png", "gravel.png", "hubble_deep_field.jpg",
             "moon.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg"]
    return find_images(PHOTOGRAPHS / name for name in names)


def embedded_val():
    """The paths of scikit-image's photographs to validate on."""
    return find_images(PHOTOGRAPHS / name for name in ["coffee.png", "chelsea.png", "coins.png"])


def imresize(image, factor):
    """MATLAB's `imresize(image, factor)`, bicubic and antialiased. Sizes become ⌈n·factor⌉.
    uint8 array (H,W) or (H,W,C): bit-exact with MATLAB, which resizes the rows, rounds half up to uint8, and
    only then resizes the columns. Float tensor (…,H,W): no rounding, differentiable. TypeError for others."""
    if isinstance(image, torch.Tensor) and image.is_floating_point():
        return bicubic_resize(image, factor)
    if image.dtype != np.uint8:
        raise TypeError(f"imresize takes uint8 arrays and float tensors, not {image.dtype}")
    x = torch.from_numpy(image.copy())
    for dim in (0, 1):  # in strips, because doubles take eight times the memory
        strips = [bicubic_resize(strip.double(), factor, (dim,)) for strip in x.split(128, 1 - dim)]
        x = torch.cat([(strip.clamp(0, 255) + 0.5).byte() for strip in strips], 1 - dim)
    return x.numpy()


def pair(hr, scale):
    """(lr, hr) of a picture. hr is cropped at the bottom and right to multiples of s, lr is hr resized."""
    hr = np.ascontiguousarray(hr[:hr.shape[0] // scale * scale, :hr.shape[1] // scale * scale])
    return imresize(hr, 1 / scale), hr


def read_pair(path, lr_path, scale, least=1):
    """(lr, hr) of an HR file, cropped as by `pair`. lr is read from lr_path, or resized if that is None.
    DataError, naming files and sizes, if a side of lr is below `least` or is not that of hr divided by s."""
    hr = read_image(path)
    h, w = hr.shape[0] // scale, hr.shape[1] // scale
    size = f"{path} is {hr.shape[1]}x{hr.shape[0]}"
    if min(h, w) < least:
        raise DataError(f"{size}, too small: its LR is {w}x{h}, and {least}x{least} or more is needed")
    if lr_path is None:
        return pair(hr, scale)
    lr = read_image(lr_path)
    if lr.shape[:2] != (h, w):
        raise DataError(f"{lr_path} is {lr.shape[1]}x{lr.shape[0]}, but {size} and needs {w}x{h} at x{scale}")
    return lr, np.ascontiguousarray(hr[:h * scale, :w * scale])


def match_lr(paths, lr_places, scale):
    """A list of each HR file's LR file. For 0001.png it is 0001x4, 0001_x4 or 0001, with any ending.
    Without lr_places, a list of None. DataError if one is missing, or if two files have the same name."""
    if not lr_places:
        return [None] * len(paths)
    if len({path.stem for path in paths}) < len(paths):
        raise DataError("two HR images have the same name: their LR images cannot be told apart")
    by_stem, matched = {}, []
    for file in find_images(lr_places):
        if twin := by_stem.get(file.stem):
            raise DataError(f"{twin} and {file} have the same name: their HR images cannot be told apart")
        by_stem[file.stem] = file
    for path in paths:
        names = [f"{path.stem}x{scale}", f"{path.stem}_x{scale}", path.stem]
        matched.append(next((by_stem[name] for name in names if name in by_stem), None))
        if matched[-1] is None:
            raise DataError(f"{path} has no LR image {', '.join(names)} in {', '.join(map(str, lr_places))}")
    return matched


@dataclass
class Store:
    """All training images, decoded: one flat array of pixels, and two tables of where each image lies."""
    pixels: torch.Tensor  # (P,3) uint8, RGB
    hr: torch.Tensor  # (n,3) int64: first pixel, height, width
    lr: torch.Tensor  # (n,3) int64
    names: list  # n file names


def build_store(paths, lr_paths, scale, least, cache=""):
    """Decodes images into a Store. lr_paths, least: see `read_pair`.
    Up to RAM bytes stay in memory. More are written to a file in the folder `cache` (see `_cache_folder`).
    The next run over the same images finds it. DataError for an unusable image or folder, or a full disk."""
    names = [path.name for path in paths]
    about = [p and (str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in [*paths, *lr_paths]]
    key = hashlib.sha256(repr(("store 3", scale, least, about)).encode()).hexdigest()[:20]
    with contextlib.suppress(OSError, ValueError):  # no such file, a damaged one, or no folder to look in
        return _open_store(np.memmap(_cache_folder(cache) / f"{key}.pixels", mode="r"), names)
    memory, table = io.BytesIO(), []
    with contextlib.closing(_decoded(list(zip(paths, lr_paths)), scale, least)) as pictures:
        _collect(pictures, memory, table, limit=RAM)
        if memory.tell() > RAM:
            file = _cache_folder(cache) / f"{key}.pixels"
            return _open_store(_spill(pictures, memory, table, file), names)
    memory.write(np.array(table, np.int64))
    return _open_store(np.frombuffer(memory.getbuffer(), np.uint8), names)


def _cache_folder(cache):
    """The folder `cache`, or ~/.cache/dukd if that is empty. DataError if there is no home folder."""
    try:
        return Path(cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dukd")
    except RuntimeError:  # in a container, the user may be unknown
        raise DataError("no home folder to write the decoded images to; name a folder with --cache") from None


def _collect(pictures, out, table, limit=float("inf")):
    """Moves pictures into the file `out` until it is larger than `limit` bytes, or no more come.
    Appends to `table` where each lies: its first pixel, height and width."""
    for picture in pictures:
        table.append((out.tell() // 3, *picture.shape[:2]))
        out.write(picture)
        if out.tell() > limit:
            return


def _spill(pictures, memory, table, file):
    """Writes the pictures in `memory`, those still to come, and the table to `file`. Returns it as an array.
    The file appears once it is whole. DataError if it cannot be written."""
    own = file.with_suffix(f".{os.getpid()}")  # another process may decode the same images at this moment
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with models.replacing(own) as out:
            out.write(memory.getbuffer())
            memory.close()  # frees it
            _collect(pictures, out, table)
            out.write(np.array(table, np.int64))
        os.replace(own, file)
        return np.memmap(file, mode="r")
    except OSError as e:
        raise DataError(f"{file.parent}: {e.strerror or e}; free space, or name another --cache") from None


def _decoded(jobs, scale, least):
    """Yields lr, hr of each (path, lr_path) in order. Four threads decode eight images at a time."""
    with ThreadPoolExecutor(4) as pool, tqdm(None, "decoding", len(jobs), disable=len(jobs) < 50) as bar:
        for i in range(0, len(jobs), 8):
            for lr_hr in pool.map(lambda job: read_pair(*job, scale, least), jobs[i:i + 8]):
                yield from lr_hr
                bar.update()


def _open_store(content, names):
    """The Store in an array of bytes: the pixels, then the table, int64 (n,2,3): LR and HR of n images."""
    size = 48 * len(names)
    table = torch.tensor(content[-size:].copy().view(np.int64).reshape(-1, 2, 3))
    return Store(torch.from_numpy(content[:-size].reshape(-1, 3)), table[:, 1], table[:, 0], names)


class Patches:
    """Aligned random LR/HR patches of a Store; p = patch is the side of an LR patch in pixels.
    The pixels move to a GPU if they fit into half of its free memory. Otherwise the host cuts the patches."""

    def __init__(self, store, patch, scale, device="cpu"):
        self.store, self.patch, self.scale, self.device = store, patch, scale, torch.device(device)
        self.room = store.lr[:, 1:] - patch + 1  # (n,2): how many tops and lefts each LR image has
        if self.device.type == "cuda" and store.pixels.nbytes < torch.cuda.mem_get_info(self.device)[0] / 2:
            self.store = Store(*(t.to(device) for t in (store.pixels, store.hr, store.lr)), store.names)

    def sample(self, n):
        """n random patches: I_LR (n,3,p,p) and I_HR (n,3,s·p,s·p), floats in [0,1] on the device.
        Every image is equally likely, and then every position in it. torch's default CPU generator draws."""
        image = torch.randint(len(self.room), (n,))
        corner = torch.rand(n, 2, dtype=torch.float64) * self.room[image]  # float32 could round up to room
        places = _to(torch.cat([image[:, None], corner.long()], dim=1), self.store.pixels.device)
        return self._cut(self.store.lr, places, 1), self._cut(self.store.hr, places, self.scale)

    def _cut(self, table, places, scale):
        """The patches of the LR (scale 1) or HR pictures at n places: (n,3) image, top, left in LR pixels."""
        image, top, left = places.unbind(1)
        first, _, width = table[image].unbind(1)
        i = torch.arange(scale * self.patch, device=places.device)
        rows, columns = scale * top[:, None] + i, scale * left[:, None] + i  # (n,s·p) each
        starts = first[:, None] + rows * width[:, None]  # (n,s·p): the first pixel of each row
        pixels = self.store.pixels[starts[:, :, None] + columns[:, None, :]]  # (n,s·p,s·p,3)
        return _to(pixels, self.device).permute(0, 3, 1, 2).float() / 255


def _to(x, device):
    """x on `device`. The host does not wait for a copy to a GPU, which takes pinned memory."""
    pinned = device.type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if pinned else x.to(device)
