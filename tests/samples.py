"""Pictures and files that several tests make, whole and damaged."""
import numpy as np
from PIL import Image  # imageio brings it


def noise(*shape, seed=0, high=256):
    """A random uint8 picture: the hardest to resize, with overshoot everywhere."""
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


def save(image, path, mode=None, **options):
    """Writes an array (or a PIL picture) by PIL."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def cut(path, share):
    """A picture's file, cut off after a share of its bytes."""
    content = save(noise(64, 64, 3), path).read_bytes()
    path.write_bytes(content[:int(len(content) * share)])
