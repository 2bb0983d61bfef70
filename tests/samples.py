"""Pictures and files that several tests make, whole and damaged."""
import struct
import zlib

import numpy as np
from PIL import Image  # imageio brings it


def noise(*shape, seed=0, high=256):
    """Random uint8 pictures: the hardest ones, with overshoot everywhere."""
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


def save(image, path, mode=None, **options):
    """Writes an array (or a PIL picture) by PIL."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, packed, depth=8, colour=2, before=b""):
    """A PNG file built by hand; colour 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA; packed: the raw data as zlib has it."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def png16(image, colour=2):
    """A 16-bit PNG of a uint16 array (H,W,C)."""
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in image)
    return png(image.shape[1], image.shape[0], zlib.compress(lines), 16, colour)


def cut(path, share):
    """A large enough picture, cut off after a share of its bytes."""
    content = save(noise(64, 64, 3), path).read_bytes()
    path.write_bytes(content[:int(len(content) * share)])


def damaged(whole, edits):
    """A file's bytes after some (what, where, byte): flipped bits, pieces cut out, put in, or the end cut off."""
    content = bytearray(whole)
    for what, at, value in edits:
        at %= max(len(content), 1)
        if what == "flip" and content:
            content[at] ^= value
        elif what == "cut":
            del content[at:at + value]
        elif what == "insert":
            content[at:at] = bytes([value]) * (1 + value % 9)
        elif what == "end":
            del content[at:]
    return bytes(content)
