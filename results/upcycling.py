"""Draws results/upcycling.png: one training pair, and the new inputs z that DUKD makes out of it.

    pip install matplotlib && python results/upcycling.py
"""
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import skimage.data
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402 (the project's)
import models  # noqa: E402
from dukd import InvertibleAugmentation, zoom_in, zoom_out  # noqa: E402

SCALE, PATCH = 4, 48
TEACHER, STUDENT = "tab:blue", "tab:red"  # colours of their arrows
LOSSES = r"""The student learns
pair:  $f_S(I_{LR}) \approx I_{HR}$,  $f_S(I_{LR}) \approx f_T(I_{LR})$
zoom in:  $F^{-1}(f_S(F(z))) \approx f_T(z)$
zoom out:  $f_S(z) \approx f_T(z)$,  $f_S(z) \approx I_{LR}$"""


def show(panel, x, symbol):
    """Shows x (1,3,h,w), enlarged by nearest neighbour, with its symbol and size below."""
    panel.imshow(x[0].permute(1, 2, 0).clamp(0, 1), interpolation="nearest")
    panel.set_xlabel(f"{symbol},  {x.shape[-1]}×{x.shape[-2]}", size=13)
    panel.set(xticks=[], yticks=[], frame_on=False)


def arrow(panel, start, end, above="", below="", color="black", path="arc3"):
    """An arrow with text above and below its middle. A panel's lower left is (0,0), its upper right (1,1)."""
    panel.annotate("", end, start, "axes fraction", arrowprops=dict(
        arrowstyle="-|>", color=color, lw=2, mutation_scale=16, connectionstyle=path))
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    style = dict(color=color, ha="center", transform=panel.transAxes)
    panel.text(x, y + 0.05, above, size=13, weight="bold", **style)
    panel.text(x, y - 0.04, below, size=11, va="top", **style)


def main():
    hr = skimage.data.chelsea()[40:232, 124:316]
    lr = data.imresize(hr, 1 / SCALE)
    lr, hr = [torch.from_numpy(picture).permute(2, 0, 1)[None] / 255 for picture in (lr, hr)]
    z_in = zoom_in(hr, PATCH, torch.Generator().manual_seed(2))
    positions = torch.from_numpy(np.indices(hr.shape[-2:]))[None]  # (1,2,H,W): each pixel's row and column
    same_crop = zoom_in(positions, PATCH, torch.Generator().manual_seed(2))
    top, left = same_crop[0, :, 0, 0].tolist()
    z_out = zoom_out(lr, SCALE)
    augmentation = InvertibleAugmentation(("transpose", "invert"), torch.ones(2, 1, dtype=torch.bool))
    teacher = models.load(ROOT / "edsr_baseline.pt")
    with torch.no_grad():
        label_in, label_out = teacher(z_in), teacher(z_out)

    figure, panels = plt.subplots(2, 4, figsize=(11.64, 5.9))  # 1164×590 pixels, each panel 192×192
    figure.subplots_adjust(12 / 1164, 32 / 590, 1152 / 1164, 524 / 590, wspace=124 / 192, hspace=108 / 192)
    show(panels[0, 0], hr, "$I_{HR}$")
    show(panels[0, 1], z_in, "$z$")
    show(panels[0, 2], label_in, "label $f_T(z)$")
    show(panels[0, 3], augmentation.apply(z_in), "$F(z)$")
    show(panels[1, 0], lr, "$I_{LR}$")
    show(panels[1, 1], z_out, "$z$")
    show(panels[1, 2], label_out, "label $f_T(z)$")
    panels[1, 3].axis("off")
    panels[1, 3].text(-0.5, 0.5, LOSSES, size=12, color=STUDENT, va="center", linespacing=2)
    panels[0, 0].set_title("a training pair", size=13, weight="bold")
    panels[0, 0].add_patch(plt.Rectangle((left, top), PATCH, PATCH, fill=False, color="white", lw=2))
    arrow(panels[0, 0], (0.5, -0.16), (0.5, -0.55))
    panels[0, 0].text(0.55, -0.36, f"reduced by $s$ = {SCALE}", size=11, transform=panels[0, 0].transAxes)
    for row, name, how in [(0, "zoom in", "random crop"), (1, "zoom out", "reduced again")]:
        arrow(panels[row, 0], (1.03, 0.5), (1.6, 0.5), name, how)
        arrow(panels[row, 1], (1.03, 0.5), (1.6, 0.5), "$f_T$", "teacher", TEACHER)
    name = "$F$: here transposed, colours inverted"
    arrow(panels[0, 1], (0.5, 1.02), (3.79, 1.02), name, color=STUDENT, path="bar,fraction=-0.06")
    arrow(panels[0, 3], (-0.03, 0.5), (-0.6, 0.5), r"$f_S,\ \mathrm{then}\ F^{-1}$", "student", STUDENT)
    figure.savefig(ROOT / "results/upcycling.png", dpi=100)


if __name__ == "__main__":
    main()
