"""Evaluation: Y-PSNR and SSIM tables, upscaling of pictures, side-by-side figures.

    python evaluate.py student.pt teacher.pt bicubic --data Set5 Set14        a row a model, a column a set
    python evaluate.py --sr results/mine --data Set5 --scale 4                score pictures made by any other tool
    python evaluate.py student.pt --input photo.jpg --output big              upscale a picture, or a folder of them
    python evaluate.py student.pt bicubic --data Set5 --figure compare.png    crops of HR and of every row, side by side

Protocol: HR cropped to a multiple of s, LR by MATLAB's bicubic, SR rounded to uint8, s pixels shaved off each border,
luma Y of BT.601 in 16–235 (unrounded), SSIM with an 11×11 Gaussian of σ 1.5.
"""
import argparse
import json
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
