"""Images: reading them, MATLAB's bicubic, and aligned training patches.

A picture is a uint8 array (H,W,3), RGB. A batch is a float tensor (N,3,h,w) in [0,1].
"""
import functools
import hashlib
import io
import re
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image, ImageOps
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from dukd import bicubic_resize
from models import InputError, replace_file

warnings.filterwarnings("ignore", module=r"PIL\.")  # read_image raises what matters
Image.MAX_IMAGE_PIXELS = 2 ** 31  # Pillow refuses twice that: the header of a damaged file may say anything

EXTENSIONS = {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm",
              ".tga", ".tif", ".tiff", ".webp"}
PHOTOGRAPHS = Path(skimage.data.__file__).parent  # scikit-image brings them
TRAIN = [PHOTOGRAPHS / name for name in (
    "astronaut.png", "brick.png", "camera.png", "grass.png", "gravel.png", "hubble_deep_field.jpg",
    "moon.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg")]
VAL = [PHOTOGRAPHS / name for name in ("coffee.png", "chelsea.png", "coins.png")]
NOTES = set()  # what `note` has printed
composed = functools.partial(unicodedata.normalize, "NFC")  # ä as one letter: macOS may write it as two


def note(text):
    """Prints a note on stderr, each one once, also where several threads have it."""
    with tqdm.get_lock():
        if text not in NOTES:
            for bar in [*tqdm._instances]:
                if hasattr(bar, "start_t"):  # an open bar, which would share the note's line
                    bar.clear()
            print(f"note: {text}", file=sys.stderr)
        NOTES.add(text)


def read_image(path):
    """The picture in a file as RGB, uint8 (H,W,3), turned as its EXIF says. Grey becomes three like channels,
    transparency is left out. InputError, naming the file, if it is missing, damaged, of several frames, or of
    more than 8 bits a value."""
    if not Path(path).is_file():  # a pipe might never end
        raise InputError(f"{path} is missing, or is not a file")
    try:
        with Image.open(path) as file:
            frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # MPO has previews
            layout = f"{file.mode} {file.tile}"  # tells of 16 bits, which Pillow would cut off to 8
            transparent = file.has_transparency_data
            image = np.array(ImageOps.exif_transpose(file).convert("RGB"))
    except Exception as e:  # Pillow raises a dozen kinds for broken files
        raise InputError(f"{path} is not a readable image ({str(e)[:100] or type(e).__name__})") from None
    if frames > 1:
        raise InputError(f"{path} holds {frames} frames; split it into single pictures")
    # modes I and F; raw modes such as RGB;16B, but not BGR;16 (5 bits a colour); PPM's ('RGB', 4095))]
    if re.match("[IF]", layout) or re.search("(?<!BGR);1[26]|ppm.*[0-9]{4}\\)\\)", layout):
        raise InputError(f"{path} has more than 8 bits a value; convert it: magick {path} -depth 8 new.png")
    if transparent:
        note("transparency is left out: colours are taken as they are under it")
    return image


def find_images(places):
    """The image files at `places`: files, and folders, whose images come sorted by name. Hidden files are
    passed over. Notes tell of what else a folder has, and of links to files that were found before.
    InputError for what is missing, and for a folder without images."""
    found, again = {}, 0
    for place in map(Path, places):
        paths = [place]
        if place.is_dir():
            visible = {path for path in place.iterdir() if path.name[0] != "."}
            paths = sorted(p for p in visible if p.suffix.lower() in EXTENSIONS and not p.is_dir())
            if not paths:
                raise InputError(f"{place} has no images in it (folders inside it are not searched)")
            if others := visible.difference(paths):
                note(f"{len(others)} others in {place} are left out, such as {min(others).name}")
        for path in paths:
            if not path.exists():
                raise InputError(f"{path} does not exist, or is a link to a file that does not exist")
            again += found.setdefault(path.resolve(), path) != path
    if again:
        note(f"{again} pictures are left out, as they are the files of others")
    return list(found.values())


def find_hr(places):
    """`find_images` for HR. InputError where a folder has a picture twice: a_HR and a_LR, or a and a_x4.
    tile_x1 beside tile_x2, and fox1 beside fox3, are two pictures."""
    kind, size = "[_-](HR|LR|LRBI|SR|GT)(x?[2348])?", "[_-]?x[2348]"
    images, found = find_images(places), {}
    for path in images:
        name = re.sub(f"(?<=.){kind}(?=({size})?$)", "", composed(path.stem), flags=re.IGNORECASE)
        found.setdefault((path.parent, name), []).append(path)
    for (folder, name), paths in found.items():
        plain = re.sub(f"(?<=.){size}$", "", name)
        twins = paths if plain == name else found.get((folder, plain), []) + paths
        if len(twins) > 1:
            raise InputError(f"{twins[0]} and {twins[1]} look like one picture twice, such as HR and LR: "
                             "keep HR in a folder of its own")
    return images


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


def read_pair(path, scale, least=1, cache=None):
    """(lr, hr) of an HR file: hr is cropped at the bottom and right to multiples of s, lr is hr resized.
    cache: a folder for both as .npy files, which are mapped, as a set may be larger than memory. Their name
    is a hash of the picture's path, size and times, and of s. Files that are gone or cut off are made anew.
    InputError where a side of lr has less than `least` pixels. OSError where the disk is full."""
    files = []
    if cache:
        about = path.stat()
        times = (about.st_mtime_ns, about.st_ctime_ns)  # of the content; of the inode (on Windows: created)
        key = repr((str(path.resolve()), about.st_size, times, scale))
        name = hashlib.sha256(key.encode()).hexdigest()[:24]
        files = [Path(cache, f"{name}_{part}.npy") for part in ("lr", "hr")]
    try:
        lr, hr = [np.lib.format.open_memmap(file, mode="r") for file in files]
    except (OSError, ValueError, SystemError):  # no cache, no whole files; 3.11's parser fails in threads
        hr = read_image(path)
        hr = np.ascontiguousarray(hr[:hr.shape[0] // scale * scale, :hr.shape[1] // scale * scale])
        lr = imresize(hr, 1 / scale)
        for file, image in zip(files, (lr, hr)):
            content = io.BytesIO()
            np.save(content, image)
            replace_file(file, content.getvalue())
    h, w = lr.shape[:2]
    if min(h, w) < least:
        raise InputError(f"{path} is too small: its LR is {w}x{h}, and {least}x{least} or more is needed")
    return lr, hr


def read_all(paths, scale, least=1):
    """[(path, lr, hr)] by `read_pair`, to be scored. A picture of one colour is left out with a note: its
    PSNR, far above others' or infinite, would decide a mean. InputError where no other is there."""
    pictures = []
    for path, (lr, hr) in zip(paths, for_each(paths, lambda path: read_pair(path, scale, least))):
        if (hr == hr[0, 0]).all():
            note(f"{path} is of one colour, and is not scored")
        else:
            pictures.append((path, lr, hr))
    if paths and not pictures:
        raise InputError(f"{paths[0]} is of one colour: name other pictures (train.py: --val)")
    return pictures


def for_each(paths, function):
    """[function(path)], four at a time. One InputError names all pictures that cannot be used."""
    def result_or_error(path):
        try:
            return function(path)
        except InputError as e:
            return e
    found = thread_map(result_or_error, paths, max_workers=4, desc="reading", delay=2, leave=False, ncols=80)
    if errors := [str(result) for result in found if isinstance(result, InputError)]:
        raise InputError("; ".join(errors))
    return found


def seed_of(seed, step, draws=0):
    """The seed of a step's draws: 0 for its patches, 1 + rank for z, F and drop-path of a process.
    torch's generator for the CPU keeps 32 bits of it, so steps far apart may draw alike."""
    return 1000 * (1_000_003 * seed + step) + draws  # room for 999 processes and a million steps


class Patches:
    """patches[step]: the training pairs of a step, I_LR (N,3,p,p) and I_HR (N,3,s·p,s·p), floats in [0,1].
    They are a function of (seed, step). Every image is equally likely, then every position in it, and then
    each of the eight ways to turn or mirror it. Each of `world` processes draws all, and gets its part."""

    def __init__(self, paths, patch, scale, batch, seed, cache, device="cpu", rank=0, world=1):
        """paths: of HR. patch: p. cache: the folder of decoded pictures. InputError as of `read_pair`."""
        self.paths, self.patch, self.scale, self.batch, self.seed = paths, patch, scale, batch, seed
        self.device = torch.device(device)
        self.part = range(rank * batch // world, (rank + 1) * batch // world)
        read = functools.partial(read_pair, scale=scale, least=patch, cache=cache)
        for_each(paths, lambda path: read(path)[0].shape)  # each is decoded once, and closed again
        self.read = functools.lru_cache(50)(read)  # each takes two file descriptors, of which macOS gives 256

    def __getitem__(self, step):
        draw = torch.Generator().manual_seed(seed_of(self.seed, step))
        images = torch.randint(len(self.paths), (self.batch,), generator=draw)
        corners = torch.rand(self.batch, 2, dtype=torch.float64, generator=draw)
        turns = torch.randint(8, (self.batch,), generator=draw)
        pairs = [self._cut(self.paths[images[i]], corners[i], int(turns[i])) for i in self.part]
        stacks = [torch.from_numpy(np.stack(patches)) for patches in zip(*pairs)]  # uint8 (N,h,w,3)
        if self.device.type == "cuda":
            stacks = [x.pin_memory() for x in stacks]  # the host does not wait for their copies
        return [x.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float() / 255 for x in stacks]

    def _cut(self, path, corner, turn):
        """The patches of an image, lr (p,p,3) and hr (s·p,s·p,3), turned alike. corner: (2,) in [0,1)."""
        lr, hr = self.read(path)
        p, s = self.patch, self.scale
        top = int(corner[0] * (lr.shape[0] - p + 1))
        left = int(corner[1] * (lr.shape[1] - p + 1))
        lr = np.rot90(lr[top:top + p, left:left + p], turn % 4)
        hr = np.rot90(hr[s * top:s * (top + p), s * left:s * (left + p)], turn % 4)
        return (lr, hr) if turn < 4 else (lr[::-1], hr[::-1])
