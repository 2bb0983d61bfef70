"""What several tests share: pictures, whole and damaged, how mistakes are refused, what a step does."""
import re

import numpy as np
import pytest
import torch
from PIL import Image  # imageio brings it
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


def raises(kind, call, *words):
    """The call raises an error of that kind, whose message is one line that has these words."""
    with pytest.raises(kind) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


def error_lines(main, words, capture):
    """What a program that ends with an error and exit code 2 prints on stderr, without progress bars."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, words)])
    lines = re.split(r"[\r\n]+", capture.readouterr().err)
    lines = [line for line in lines if line.strip() and "%|" not in line]
    assert end.value.code == 2 and lines[-1].startswith("error: "), lines
    return lines


class Watch(TorchDispatchMode):
    """Keeps each operation of torch: its name, and the tensors that it takes and returns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        self.seen.append((str(function), [leaf for leaf in leaves if torch.is_tensor(leaf)]))
        return result
