"""The networks: EDSR, RCAN and SwinIR (classical) at ×2, ×3, ×4, ×8, and every checkpoint format they come in.

Every network maps (N,3,h,w) to (N,3,s·h,s·w), RGB floats in [0,1], and carries
    .scale   the factor s
    .config  the constructor's arguments plus "arch", enough to build it again.

Sources
    EDSR    Lim et al., Enhanced Deep Residual Networks for Single Image Super-Resolution, CVPRW 2017
    RCAN    Zhang et al., Image Super-Resolution Using Very Deep Residual Channel Attention Networks, ECCV 2018
    SwinIR  Liang et al., SwinIR: Image Restoration Using Swin Transformer, ICCVW 2021
Parameter names are those of BasicSR (EDSR, RCAN) and of SwinIR's authors, so files move both ways.
"""
import contextlib
import copy
import difflib
import io
import math
import mmap
import os
import pickle
import re
import zipfile

import torch
import torch.nn.functional as F
from torch import nn

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)  # RGB mean of DIV2K's training images, in [0,1]
SCALES = (2, 3, 4, 8)


class CheckpointError(ValueError):
    """A model name or a checkpoint file that cannot be used; the message says which, why, and what to do."""

    def __str__(self):  # one line, also where a file's keys hold line breaks or a terminal's control characters
        return "".join(c if c.isprintable() else "?" for c in " ".join(super().__str__().splitlines()))[:2000]


class HostileFile(CheckpointError):
    """A checkpoint file that wants to run code, or that asks for far more memory than it holds."""


# ------------------------------------------------------------------------------------------------ common parts
def conv3x3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class PixelShuffle(nn.PixelShuffle):
    """(N,C·r²,h,w) → (N,C,r·h,r·w)."""

    def forward(self, x):
        return shuffle_channels_last(x, self.upscale_factor) if x.is_cuda else super().forward(x)


def shuffle_channels_last(x, r):
    """F.pixel_shuffle(x, r) with its result in channels_last order. On CUDA torch's own leaves that order, and the next
    convolution has to go back to it: two transpositions of the largest feature map there is. (On the CPU it does not.)"""
    n, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).reshape(n, h, w, c // r ** 2, r, r).permute(0, 1, 4, 2, 5, 3)  # (n,h,r,w,r,c/r²)
    return x.reshape(n, h * r, w * r, c // r ** 2).permute(0, 3, 1, 2)


def upsampler(channels, scale):
    """Sub-pixel convolutions: one ×3 stage, or log2(s) stages of ×2 (keys 0, 2, 4)."""
    if scale == 3:
        return nn.Sequential(conv3x3(channels, 9 * channels), PixelShuffle(3))
    stages = [m for _ in range(int(math.log2(scale))) for m in (conv3x3(channels, 4 * channels), PixelShuffle(2))]
    return nn.Sequential(*stages)


def without_autocast(x):
    """Context in which autocast is off for x's device (meta tensors have no autocast to switch off)."""
    known = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if known else contextlib.nullcontext()


class SRNetwork(nn.Module):
    """What the three share: the input's normalisation, (x − mean)·img_range, and its undoing at the end."""

    def __init__(self, scale, mean, img_range):
        super().__init__()
        if scale not in SCALES:
            raise CheckpointError(f"scale {scale} is not one of {', '.join(map(str, SCALES))}")
        if len(mean) != 3:
            raise CheckpointError(f"the mean {mean} is not one of three colours")
        self.scale, self.img_range = scale, float(img_range)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def normalise(self, x):
        return (x - self.mean) * self.img_range

    def reconstruct(self, features):
        """(N,c,h,w) features to the picture."""
        return self.picture(self.conv_last, self.upsample(features))

    def picture(self, last, features):
        """What the last layer makes of features, no longer normalised. It runs in its weights' precision under autocast too, float32
        as a rule: bfloat16 has 8 significant bits, and quantises the output to steps about as coarse as uint8's."""
        with without_autocast(features):
            y = last(features.to(next(last.parameters()).dtype))
            return y.to(self.mean.dtype) / self.img_range + self.mean


# ------------------------------------------------------------------------------------------------ EDSR
class ResidualBlock(nn.Module):
    def __init__(self, channels, res_scale):
        super().__init__()
        self.conv1, self.conv2 = conv3x3(channels, channels), conv3x3(channels, channels)
        self.res_scale = res_scale

    def forward(self, x):
        return torch.add(x, self.conv2(F.relu(self.conv1(x))), alpha=self.res_scale)  # x + res_scale·conv2(…), in one pass


class EDSR(SRNetwork):
    """EDSR without batch normalisation. The published large model scales its residuals by 0.1, the baseline by 1."""

    def __init__(self, scale, channels=64, blocks=16, res_scale=1.0, mean=DIV2K_MEAN, img_range=255.0):
        super().__init__(scale, mean, img_range)
        self.config = dict(arch="edsr", scale=scale, channels=channels, blocks=blocks, res_scale=res_scale,
                           mean=list(mean), img_range=img_range)
        self.conv_first = conv3x3(3, channels)
        self.body = nn.Sequential(*[ResidualBlock(channels, res_scale) for _ in range(blocks)])
        self.conv_after_body = conv3x3(channels, channels)
        self.upsample = upsampler(channels, scale)
        self.conv_last = conv3x3(channels, 3)
        self.taps = [f"body.{i}" for i in range(blocks)]  # feature taps, in order of depth
        self.receptive_radius = 2 * blocks + 4  # LR pixels; an output pixel depends on no input farther away

    def forward(self, x):
        x = self.conv_first(self.normalise(x))
        return self.reconstruct(self.conv_after_body(self.body(x)) + x)


# ------------------------------------------------------------------------------------------------ RCAN
class ChannelAttention(nn.Module):
    def __init__(self, channels, reduction=16):
        super().__init__()
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels // reduction, 1),
                                       nn.ReLU(), nn.Conv2d(channels // reduction, channels, 1), nn.Sigmoid())

    def forward(self, x):
        _, squeeze, _, excite, _ = self.attention  # convolutions of one pixel: matrix products
        y = F.relu(F.linear(x.mean((2, 3)), squeeze.weight.flatten(1), squeeze.bias))
        return x * F.linear(y, excite.weight.flatten(1), excite.bias).sigmoid()[:, :, None, None]


class RCAB(nn.Module):
    def __init__(self, channels, reduction):
        super().__init__()
        self.rcab = nn.Sequential(conv3x3(channels, channels), nn.ReLU(), conv3x3(channels, channels),
                                  ChannelAttention(channels, reduction))

    def forward(self, x):
        return x + self.rcab(x)


class ResidualGroup(nn.Module):
    def __init__(self, channels, blocks, reduction):
        super().__init__()
        self.residual_group = nn.Sequential(*[RCAB(channels, reduction) for _ in range(blocks)])
        self.conv = conv3x3(channels, channels)

    def forward(self, x):
        return x + self.conv(self.residual_group(x))


class RCAN(SRNetwork):
    """Residual groups of channel-attention blocks. The attention pools over the whole input, so the
    receptive field is global."""

    def __init__(self, scale, channels=64, blocks=20, groups=10, reduction=16, mean=DIV2K_MEAN, img_range=255.0):
        super().__init__(scale, mean, img_range)
        self.config = dict(arch="rcan", scale=scale, channels=channels, blocks=blocks, groups=groups,
                           reduction=reduction, mean=list(mean), img_range=img_range)
        if not 1 <= reduction <= channels:
            raise CheckpointError(f"RCAN needs at least {reduction} channels (its attention squeezes by {reduction})")
        self.conv_first = conv3x3(3, channels)
        self.body = nn.Sequential(*[ResidualGroup(channels, blocks, reduction) for _ in range(groups)])
        self.conv_after_body = conv3x3(channels, channels)
        self.upsample = upsampler(channels, scale)
        self.conv_last = conv3x3(channels, 3)
        self.taps = [f"body.{i}" for i in range(groups)]
        self.receptive_radius = None

    def forward(self, x):
        x = self.conv_first(self.normalise(x))
        return self.reconstruct(self.conv_after_body(self.body(x)) + x)


# ------------------------------------------------------------------------------------------------ SwinIR
def to_windows(x, w):
    """(B,H,W,C) → (B·nW, w², C), windows in raster order."""
    B, H, W, C = x.shape
    return x.view(B, H // w, w, W // w, w, C).transpose(2, 3).reshape(-1, w * w, C)


def from_windows(x, w, H, W):
    """The inverse of `to_windows`."""
    return x.view(-1, H // w, W // w, w, w, x.shape[-1]).transpose(2, 3).reshape(-1, H, W, x.shape[-1])


def shift_mask(H, W, w, shift, device=None):
    """(nW, w², w²): −100 between pixels that the cyclic shift brought together from opposite edges, else 0."""
    def band(n):  # 0, 1, 2 for the part before the last window, that window's head, and its wrapped tail
        i = torch.arange(n, device=device)
        return (i >= n - w).long() + (i >= n - shift).long()
    region = 3 * band(H)[:, None] + band(W)[None, :]
    region = to_windows(region[None, :, :, None], w).squeeze(-1)
    return (region[:, :, None] != region[:, None, :]).float() * -100.0


def relative_position_index(w):
    """(w², w²): the row of the bias table for each pair of positions in a window."""
    y, x = torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y[None, :] + w - 1) * (2 * w - 1) + (x[:, None] - x[None, :] + w - 1)


class WindowAttention(nn.Module):
    """Multi-head self-attention in a w×w window with a learnt relative position bias."""

    def __init__(self, channels, heads, window):
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x, mask=None):
        """x (B,N,C): B counts the windows of all images, N = w². mask (nW,N,N): one for each window of an image.

        Written out: fused attention kernels would want the bias, as large as the scores here, once for every image."""
        B, N, C = x.shape
        h, d = self.heads, C // self.heads
        q, k, v = self.qkv(x).view(B, N, 3, h, d).permute(2, 0, 3, 1, 4)  # (B,h,N,d)
        bias = self.relative_position_bias_table.index_select(0, self.relative_position_index.flatten())
        bias = bias.view(N, N, h).permute(2, 0, 1)[None]  # (1,h,N,N)
        bias = bias if mask is None else bias + mask[:, None]  # (1 or nW,h,N,N)
        scores = (q * d ** -0.5) @ k.transpose(-2, -1)
        scores = (scores.view(-1, len(bias), h, N, N) + bias.to(scores.dtype)).view(B, h, N, N)
        x = scores.softmax(-1).to(v.dtype) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class SwinLayer(nn.Module):
    """LayerNorm, (shifted) window attention, LayerNorm, MLP, both residual."""

    def __init__(self, channels, heads, window, shift, mlp_ratio):
        super().__init__()
        hidden = int(channels * mlp_ratio + 1e-6)  # 22·(15/22) is 14.999…
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(channels, hidden), "fc2": nn.Linear(hidden, channels)})

    def forward(self, x, mask, keep):
        """x (N,H,W,C); keep: drop-path's factors of the two branches, (2,N,1,1,1), or None."""
        _, H, W, _ = x.shape
        y, s, w = self.norm1(x), self.shift, self.window
        if s:
            y = y.roll((-s, -s), dims=(1, 2))
        y = from_windows(self.attn(to_windows(y, w), mask if s else None), w, H, W)
        if s:
            y = y.roll((s, s), dims=(1, 2))
        x = x + (y if keep is None else y * keep[0])
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return x + (y if keep is None else y * keep[1])


class SwinStage(nn.Module):
    """RSTB: a few Swin layers and a convolution, residual."""

    def __init__(self, channels, heads, window, mlp_ratio, layers):
        super().__init__()
        layers = [SwinLayer(channels, heads, window, window // 2 if i % 2 else 0, mlp_ratio) for i in range(layers)]
        self.residual_group = nn.ModuleDict({"blocks": nn.ModuleList(layers)})
        self.conv = conv3x3(channels, channels)

    def forward(self, x, mask, keep):
        """keep: as SwinLayer's, one for each layer."""
        y = x
        for layer, k in zip(self.residual_group["blocks"], keep):
            y = layer(y, mask, k)
        return x + self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def mirror(x, below, right):
    """Mirrors the bottom and right edges `below` and `right` pixels far, in steps where the input is tiny."""
    grow = [below, right]
    while any(grow):
        step = [min(g, n - 1) if n > 1 else 0 for g, n in zip(grow, x.shape[-2:])]
        if any(step):
            x = F.pad(x, (0, step[1], 0, step[0]), mode="reflect")
        else:  # a single row or column has no mirror image but itself
            x, step = F.pad(x, (0, grow[1], 0, grow[0]), mode="replicate"), grow
        grow = [g - s for g, s in zip(grow, step)]
    return x


class SwinIR(SRNetwork):
    """Classical SwinIR (head "pixelshuffle") and its lightweight variant (head "pixelshuffledirect").

    Takes any input size: it is mirrored up to a multiple of the window and the result cropped."""

    def __init__(self, scale, channels=180, stages=6, layers=6, heads=6, window=8, mlp_ratio=2.0, drop_path=0.1,
                 head="pixelshuffle", mean=DIV2K_MEAN, img_range=1.0):
        super().__init__(scale, mean, img_range)
        self.config = dict(arch="swinir", scale=scale, channels=channels, stages=stages, layers=layers, heads=heads,
                           window=window, mlp_ratio=mlp_ratio, drop_path=drop_path, head=head, mean=list(mean),
                           img_range=img_range)
        if channels % heads:
            raise CheckpointError(f"SwinIR's channels ({channels}) must be a multiple of its {heads} heads")
        self.window, self.head = window, head
        rates = torch.linspace(0, drop_path, stages * layers)  # deeper layers drop more often
        self.register_buffer("drop_rates", rates.view(stages, layers, 1, 1, 1, 1, 1), persistent=False)
        self.conv_first = conv3x3(3, channels)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(channels)})
        self.layers = nn.ModuleList([SwinStage(channels, heads, window, mlp_ratio, layers) for _ in range(stages)])
        self.norm = nn.LayerNorm(channels)
        self.conv_after_body = conv3x3(channels, channels)
        if head == "pixelshuffle":
            self.conv_before_upsample = nn.Sequential(conv3x3(channels, 64), nn.LeakyReLU())
            self.upsample = upsampler(64, scale)
            self.conv_last = conv3x3(64, 3)
        else:
            self.upsample = nn.Sequential(conv3x3(channels, 3 * scale ** 2), PixelShuffle(scale))
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        self.taps = [f"layers.{i}.conv" for i in range(stages)]  # each stage's convolution gives (N,c,h,w)
        self.receptive_radius = None

    def pad(self, x):
        return mirror(x, *(-n % self.window for n in x.shape[-2:]))

    def draw_paths(self, n):
        """Stochastic depth: 0 where a branch is dropped for a whole sample, else what keeps the mean.

        Indexed [stage][layer], (2,n,1,1,1) each, for the two branches of n samples; None each in eval mode."""
        stages, layers = self.drop_rates.shape[:2]
        if not (self.training and self.config["drop_path"]):
            return [[None] * layers] * stages
        kept = torch.rand(stages, layers, 2, n, 1, 1, 1, device=self.drop_rates.device) >= self.drop_rates
        return kept / (1 - self.drop_rates)

    def reconstruct(self, features):
        if self.head == "pixelshuffle":
            return super().reconstruct(self.conv_before_upsample(features))
        return self.picture(self.upsample, features)

    def forward(self, x):
        h, w = x.shape[-2:]
        x = self.conv_first(self.pad(self.normalise(x)))
        mask = shift_mask(*x.shape[-2:], self.window, self.window // 2, x.device)
        y = self.patch_embed["norm"](x.permute(0, 2, 3, 1))  # (N,H,W,c) between the convolutions
        for stage, keep in zip(self.layers, self.draw_paths(len(x))):
            y = stage(y, mask, keep)
        y = self.conv_after_body(self.norm(y).permute(0, 3, 1, 2)) + x
        return self.reconstruct(y)[..., :h * self.scale, :w * self.scale]

    def authors_buffers(self, size=48):
        """The constant tables that the authors' files carry beside the weights, for an input of size×size."""
        size = max(self.window, size - size % self.window)
        buffers = {}
        for name, module in self.named_modules():
            if isinstance(module, WindowAttention):
                buffers[f"{name}.relative_position_index"] = module.relative_position_index
            elif isinstance(module, SwinLayer) and module.shift:
                buffers[f"{name}.attn_mask"] = shift_mask(size, size, module.window, module.shift)
        return buffers


BLOCKS = (ResidualBlock, RCAB, SwinLayer)  # what each network repeats, and torch.compile is worth its time for


# ------------------------------------------------------------------------------------------------ names
ARCHITECTURES = {"edsr": EDSR, "rcan": RCAN, "swinir": SwinIR}
PRESETS = {"edsr": "edsr_c256b32", "edsr_baseline": "edsr_c64b16", "rcan": "rcan_c64b20g10", "swinir": "swinir_c180s36"}
PAPER_STUDENTS = {"edsr": "edsr_c64b32", "rcan": "rcan_c64b6g10", "swinir": "swinir_c60s24"}
NAMES_HELP = ("edsr, edsr_baseline, rcan, swinir, or any size: edsr_c64b32 (channels, blocks; r0.1 appended sets "
              "res_scale, else 0.1 from 32 blocks on), rcan_c64b6g10 (channels, blocks to a group, groups), "
              "swinir_c60s24 (channels, Swin layers in all, six to a stage)")
GRAMMAR = {"edsr": r"edsr_c(\d+)b(\d+)(?:r(\d*\.?\d+))?", "rcan": r"rcan_c(\d+)b(\d+)g(\d+)", "swinir": r"swinir_c(\d+)s(\d+)"}
LARGEST = 4096  # no published size comes near; a typing slip should not ask for a terabyte


def published_res_scale(blocks):
    """EDSR's residual scale cannot be seen in a file: 0.1 for the published 32-block models, 1 for the baseline."""
    return 0.1 if blocks >= 32 else 1.0


def parse(name, scale):
    """A model name (see NAMES_HELP) to its config. CheckpointError, with the nearest name, where it is none."""
    full = PRESETS.get(name, name)
    for arch, pattern in GRAMMAR.items():
        if match := re.fullmatch(pattern, full):
            sizes = [int(v) for v in match.groups()[:2 if arch == "edsr" else None]]
            if not all(1 <= v <= LARGEST for v in sizes):
                raise CheckpointError(f"model '{name}': sizes must lie between 1 and {LARGEST}")
            if sizes[0] * math.prod(sizes) > 1e8:
                raise CheckpointError(f"model '{name}' would have billions of weights")
            config = dict(arch=arch, scale=scale, channels=sizes[0])
            if arch == "edsr":
                res_scale = float(match[3]) if match[3] else published_res_scale(sizes[1])
                return config | dict(blocks=sizes[1], res_scale=res_scale)
            if arch == "rcan":
                return config | dict(blocks=sizes[1], groups=sizes[2])
            stages, rest = divmod(sizes[1], 6)
            if rest:
                raise CheckpointError(f"model '{name}': the Swin layers ({sizes[1]}) must be a multiple of six")
            return config | dict(stages=stages, layers=6)
    near = difflib.get_close_matches(name, [*PRESETS, *PAPER_STUDENTS.values()], 1)
    raise CheckpointError(f"unknown model '{name}'{f'; did you mean {near[0]}?' if near else ''} Known: {NAMES_HELP}")


def from_config(config):
    """The network of a config, freshly initialised."""
    config = dict(config)
    return ARCHITECTURES[config.pop("arch")](**config)


def build(name, scale):
    """A freshly initialised network by name (NAMES_HELP) for ×scale (2, 3, 4 or 8).
    CheckpointError for a name or scale that does not exist."""
    return from_config(parse(name, scale))


def small(teacher):
    """The config of a teacher's `small` student: the paper's student of its family, or, where the teacher is
    no larger than that itself, half the teacher's width."""
    arch = teacher.config["arch"]
    if arch not in PAPER_STUDENTS:
        raise CheckpointError(f"'small' is defined for EDSR, RCAN and SwinIR teachers, not for {arch}: name a student")
    paper = parse(PAPER_STUDENTS[arch], teacher.scale)
    with torch.device("meta"):
        if parameters(from_config(paper)) < parameters(teacher):
            return paper
    half = max(teacher.config["channels"] // 2, 1)
    if arch == "swinir":
        heads = teacher.config["heads"]
        half = max(half - half % heads, heads)
    narrower = dict(reduction=min(teacher.config["reduction"], half)) if arch == "rcan" else {}
    return teacher.config | dict(channels=half) | narrower


def parameters(model):
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model, width=1280, height=720):
    """Multiply-adds for one width×height output, the field's convention (1280×720).

    Counted on a 48×48 input without computing anything, then scaled by area."""
    from torch.utils.flop_counter import FlopCounterMode
    shadow = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(torch.empty(1, 3, 48, 48, device="meta"))
    return counter.get_total_flops() / 2 * width * height / (48 * model.scale) ** 2


# ------------------------------------------------------------------------------------------------ files
def write_atomically(content, path, keep=None):
    """Writes the bytes `content` to the disk beside `path`, then renames: a kill or a power cut leaves old or new, whole.

    keep: where the old file goes; between the two renames there is `keep` alone. CheckpointError where writing fails
    (a full disk, say), with the old file as it was."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        if keep and os.path.exists(path):
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be written: {e.strerror or e}") from None
    finally:
        with contextlib.suppress(OSError):  # still there after a failure only
            os.unlink(temporary)
    sync_folder(os.path.dirname(path))


def sync_folder(folder):
    """Flushes a folder's entries to the disk, so that a rename outlives a power cut (where the system can)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def to_bytes(content):
    """What torch.save writes, in memory: its own file writer hides why a disk takes no more."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def save(path, model, raw=None):
    """Writes `model` (the averaged weights where there are any) as {"params_ema", "params", "config"}.

    raw: state dict of the un-averaged weights for "params"; by default the same as "params_ema".
    BasicSR and spandrel read the result as they read their own files."""
    extra = model.authors_buffers() if isinstance(model, SwinIR) else {}
    pack = lambda state: {k: v.detach().cpu().contiguous() for k, v in (state | extra).items()}
    averaged = pack(model.state_dict())
    content = {"params_ema": averaged, "params": averaged if raw is None else pack(raw), "config": model.config}
    write_atomically(to_bytes(content), path)


def read_file(path):
    """The object in a checkpoint file, read without running any code that it may hold, and no larger than the file."""
    if not os.path.isfile(path):
        what = "is not a file" if os.path.exists(path) else "does not exist"
        raise CheckpointError(f"{path} {'is a folder, not a checkpoint' if os.path.isdir(path) else what}")
    try:
        if str(path).endswith(".safetensors"):  # its reader holds the declared sizes against the file's
            from safetensors.torch import load_file
            return load_file(path)
        check_sums(path)
        refuse_bombs(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        refuse_inflated(content, path)
        return content
    except ImportError:
        if not str(path).endswith(".safetensors"):
            raise
        raise CheckpointError(f"{path} needs the package safetensors: pip install safetensors") from None
    except pickle.UnpicklingError as e:
        if found := re.search(r"GLOBAL ([\w.]+)", str(e)):
            raise HostileFile(f"{path} wants to run code ({found[1]}) when loaded and is refused; ask for a file "
                              "with weights only, or re-save its state dict where you trust it") from None
        raise CheckpointError(f"{path} is not a whole checkpoint file (truncated, damaged, or of another kind)") from None
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}") from None
    except CheckpointError:
        raise
    except Exception:  # torch and safetensors raise many kinds for rubbish; none of them says more to a user
        raise CheckpointError(f"{path} is not a whole checkpoint file (truncated, damaged, or of another kind)") from None


def check_sums(path):
    """An exception where a part of a zip file (torch.save's) is not what was written: torch.load itself does not look."""
    with open(path, "rb") as f:
        if f.read(4) != b"PK\3\4":  # torch.save's older format has no checksums
            return
    left = os.path.getsize(path)
    with zipfile.ZipFile(path) as z:
        for part in z.infolist():
            if part.CRC:  # 0: torch was told to write none
                with z.open(part) as f:
                    while chunk := f.read(2**20):
                        left -= len(chunk)
                        if left < 0:  # more inside than the file has: not a matter of damage, and never to be read whole
                            return


def refuse_bombs(path):
    """HostileFile for a small file that would fill the memory while torch reads it: an archive whose parts are compressed
    or overlap (torch.save never does that), a pickle that calls what lets data grow at each call."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
        if any(p.compress_type for p in parts) or sum(p.file_size for p in parts) > os.path.getsize(path):
            raise HostileFile(f"{path} is compressed or holds less than it declares, and is refused: re-save it with torch.save")
    if os.path.getsize(path):
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for call in (b"c_codecs\nencode\n", b"ctorch._utils\n_rebuild_device"):
                if content.find(call) >= 0:
                    name = ".".join(call[1:].decode().split())
                    raise HostileFile(f"{path} wants to run code ({name}) when loaded and is refused; ask for a file "
                                      "with weights only")


def refuse_inflated(content, path):
    """HostileFile where a tensor declares more bytes than the whole file has, as one expanded from a single number can."""
    todo, seen = [content], set()
    while todo:
        part = todo.pop()
        if isinstance(part, torch.Tensor) and part.numel() * part.element_size() > os.path.getsize(path):
            raise HostileFile(f"{path} declares a tensor of {tuple(part.shape)}, more than the file holds, and is refused")
        if isinstance(part, (dict, list, tuple)) and id(part) not in seen:
            seen.add(id(part))
            todo += part.values() if isinstance(part, dict) else part


def unwrap(content, path):
    """The state dict inside a file's content, without wrappers and `module.` prefixes, and the config if it is ours."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no state dict but a {type(content).__name__}")
    config = content.get("config")
    if not (isinstance(config, dict) and "arch" in config):  # a "config" of another code says nothing to us
        config = None
    for _ in range(3):  # wrappers nest at most this deep in the wild
        for key in ("params_ema", "params", "state_dict", "model_state_dict", "model", "net"):
            if isinstance(content.get(key), dict):
                content = content[key]
                break
    state = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not state:
        raise CheckpointError(f"{path} holds no weights; its first entries are {', '.join(map(str, list(content)[:3]))}")
    for prefix in ("module.", "_orig_mod.", "module.", "model."):
        # ESRGAN's own keys begin with "model." too: only where a name that we know follows
        known = prefix != "model." or {"model.head.0.weight", "model.conv_first.weight"} & set(state)
        if known and all(k.startswith(prefix) for k in state):
            state = {k[len(prefix):]: v for k, v in state.items()}
    return state, config


# The EDSR and RCAN authors' names (both grew from EDSR-PyTorch) → BasicSR's. `G.N` is the last entry of `body`.
AUTHORS_NAMES = [
    (r"head\.0\.(\w+)", r"conv_first.\1"),
    (r"body\.(\d+)\.body\.0\.(\w+)", r"body.\1.conv1.\2"),  # EDSR: body.N.body.{0,2}
    (r"body\.(\d+)\.body\.2\.(\w+)", r"body.\1.conv2.\2"),
    (r"body\.(\d+)\.body\.(\d+)\.body\.([02])\.(\w+)", r"body.\1.residual_group.\2.rcab.\3.\4"),
    (r"body\.(\d+)\.body\.(\d+)\.body\.3\.conv_du\.0\.(\w+)", r"body.\1.residual_group.\2.rcab.3.attention.1.\3"),
    (r"body\.(\d+)\.body\.(\d+)\.body\.3\.conv_du\.2\.(\w+)", r"body.\1.residual_group.\2.rcab.3.attention.3.\3"),
    (r"body\.(\d+)\.body\.(\d+)\.(weight|bias)", r"body.\1.conv.\3"),
    (r"body\.(\d+)\.(weight|bias)", r"conv_after_body.\2"),
    (r"tail\.0\.(\d+)\.(\w+)", r"upsample.\1.\2"),
    (r"tail\.1\.(\w+)", r"conv_last.\1"),
]


def fold_mean_shifts(state, path):
    """Takes the 1×1 convolutions sub_mean and add_mean out of an authors' state dict; returns it, and {mean, img_range}.

    Old codes forgot to freeze them, so they may be trained. u = Wx + b is W(x − m) with m = −W⁻¹b: W goes into the first
    convolution. y = Az + c is (Az + c − m) + m: A and c − m go into the last. Exact, at the zero-padded border too."""
    shifts = {k: state[k] for k in state if re.fullmatch(r"(sub|add)_mean\.(weight|bias)", k)}
    state = {k: v for k, v in state.items() if k not in shifts}
    ends = [state.get(k, torch.empty(0)) for k in ("head.0.weight", "tail.1.weight", "tail.1.bias")]
    if not shifts or [v.dim() for v in ends] != [4, 4, 1] or [ends[0].shape[1], len(ends[1]), len(ends[2])] != [3, 3, 3]:
        return state, {}  # nothing to fold, or what is missing will be named with the other misfits
    try:
        W, b, A, c = (shifts[f"{n}_mean.{p}"].double().reshape((3, 3) if p == "weight" else 3)
                      for n in ("sub", "add") for p in ("weight", "bias"))
        m = torch.linalg.solve(W, -b)
        img_range = 255.0 if m.max() > 1 else 1.0
        mean = [round(v / img_range, 6) for v in m.tolist()]
        m = torch.tensor(mean, dtype=torch.float64) * img_range
        first = torch.einsum("oihw,ij->ojhw", ends[0].double(), W)
        last = torch.einsum("ij,jchw->ichw", A, ends[1].double())
        bias = A @ ends[2].double() + c - m
    except (KeyError, RuntimeError):
        m = torch.tensor(torch.nan)
    if not m.isfinite().all():
        raise CheckpointError(f"{path}: its sub_mean and add_mean layers are no mean shifts of three colours")
    folded = {"head.0.weight": first.float(), "tail.1.weight": last.float(), "tail.1.bias": bias.float()}
    return state | folded, dict(mean=mean, img_range=img_range)


def translate(state, path):
    """A state dict under our names, and what its mean-shift layers say of the input: {} or {mean, img_range}."""
    state, settings = fold_mean_shifts(state, path)
    rcan = any(".conv_du." in k for k in state)
    translated = {}
    for key, value in state.items():
        if re.fullmatch(r".*\.(attn_mask|relative_position_index)", key):
            continue  # constants that we hold otherwise
        if "head.0.weight" in state:
            for i, (pattern, name) in enumerate(AUTHORS_NAMES):
                if not (rcan and i in (1, 2)) and (match := re.fullmatch(pattern, key)):
                    key = match.expand(name)
                    break
        translated[key] = value
    return translated, settings


def count(state, pattern):
    """How many different numbers the pattern's group takes among the keys (0 where none matches)."""
    return len({m[1] for k in state if (m := re.match(pattern, k))})


def infer(state):
    """The config that the keys and shapes of a translated state dict spell, or None where they fit no network."""
    shape = lambda key: tuple(state[key].shape)
    try:
        channels = shape("conv_first.weight")[0]
        stages = [shape(k) for k in sorted(state) if re.fullmatch(r"upsample\.\d+\.weight", k)]
        scale = 3 if stages[0][0] == 9 * stages[0][1] else 2 ** len(stages)
        if "body.0.conv1.weight" in state:
            blocks = count(state, r"body\.(\d+)\.conv1\.weight")
            return dict(arch="edsr", scale=scale, channels=channels, blocks=blocks, res_scale=published_res_scale(blocks))
        if "body.0.residual_group.0.rcab.0.weight" in state:
            squeezed = shape("body.0.residual_group.0.rcab.3.attention.1.weight")[0]
            return dict(arch="rcan", scale=scale, channels=channels, groups=count(state, r"body\.(\d+)\.conv\.weight"),
                        blocks=count(state, r"body\.0\.residual_group\.(\d+)\."), reduction=channels // squeezed)
        if "layers.0.residual_group.blocks.0.attn.qkv.weight" in state:
            entries, heads = shape("layers.0.residual_group.blocks.0.attn.relative_position_bias_table")
            direct = "conv_before_upsample.0.weight" not in state
            return dict(arch="swinir", scale=math.isqrt(stages[0][0] // 3) if direct else scale, channels=channels,
                        heads=heads, window=(math.isqrt(entries) + 1) // 2, stages=count(state, r"layers\.(\d+)\.conv\."),
                        layers=count(state, r"layers\.0\.residual_group\.blocks\.(\d+)\."),
                        mlp_ratio=shape("layers.0.residual_group.blocks.0.mlp.fc1.weight")[0] / channels,
                        head="pixelshuffledirect" if direct else "pixelshuffle")
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        pass
    return None


def oversized(config, state):
    """In words, what would take far more memory than its file has, or None: to be asked before anything is built."""
    layers = math.prod(config.get(name, 1) for name in ("blocks", "groups", "stages", "layers"))
    if layers > len(state):
        return f"its names spell {layers} layers, but there are {len(state)} entries"
    if config.get("window", 0) > 32:  # a window's table of positions grows with the fourth power
        return f"its window of {config['window']} is larger than 32"
    return None


def require_sane(config, path):
    """CheckpointError for settings beside the weights that are no finite numbers, or would make all outputs NaN."""
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e6
    values = {k: config[k] for k in ("res_scale", "mean", "img_range", "drop_path") if k in config}
    for name, value in values.items():
        fits = isinstance(value, (list, tuple)) and all(map(number, value)) if name == "mean" else number(value)
        if not fits or (name == "img_range" and value < 1e-3) or (name == "drop_path" and not 0 <= value < 1):
            raise CheckpointError(f"{path}: {name} cannot be {str(value)[:60]}")


def misfits(model, state):
    """The first few keys, in words, that keep `state` from fitting `model`; empty where all fit."""
    expected = model.state_dict()
    wrong = [f"{k} missing" for k in expected if k not in state]
    wrong += [f"{k} not known" for k in state if k not in expected]
    wrong += [f"{k} is {tuple(state[k].shape)}, not {tuple(v.shape)}" for k, v in expected.items()
              if k in state and state[k].shape != v.shape]
    wrong += [f"{k} holds no plain floating-point numbers" for k, v in state.items()
              if not v.is_floating_point() or v.layout != torch.strided or v.is_meta]
    wrong += [f"{k} holds NaN or infinity" for k, v in state.items() if not wrong and not v.isfinite().all()]
    return wrong[:3]


class Foreign(nn.Module):
    """A network of another package (spandrel) behind the same interface; only ever a teacher."""

    def __init__(self, descriptor):
        super().__init__()
        self.model, self.scale, self.receptive_radius, self.taps = descriptor.model, descriptor.scale, None, []
        self.config = dict(arch=descriptor.architecture.name, scale=descriptor.scale)
        self.multiple = max(1, descriptor.size_requirements.multiple_of or 1)
        self.minimum = descriptor.size_requirements.minimum or 1

    def forward(self, x):
        h, w = x.shape[-2:]
        padded = mirror(x, *(max(self.minimum, n + -n % self.multiple) - n for n in (h, w)))
        return self.model(padded.clone())[..., :h * self.scale, :w * self.scale]  # spandrel's RCAN edits its input


def load_foreign(state, override):
    """The spandrel network that fits a state dict, or None (also where spandrel is not installed, or an override asks
    for what only our own networks have)."""
    try:
        from spandrel import ImageModelDescriptor, ModelLoader
    except Exception:  # not there, or broken: a torchvision that does not match torch raises RuntimeError
        return None
    try:
        descriptor = ModelLoader(device="cpu").load_from_state_dict(state)
    except Exception:  # spandrel's way to say "no architecture fits", and a dozen others
        return None
    fits = isinstance(descriptor, ImageModelDescriptor) and descriptor.input_channels == descriptor.output_channels == 3
    return Foreign(descriptor).float().eval() if fits and not override else None


def load(path, **override):
    """The network in a checkpoint file, in eval mode, float32, on the CPU.

    Reads this project's files, the EDSR and RCAN authors', BasicSR's and SwinIR's, bare or wrapped, and
    .safetensors; architecture and sizes come from the keys and shapes. What shapes cannot tell (res_scale, mean,
    img_range) follows the published models, or the file where it says, or `override`: load(path, res_scale=1.0).
    Raises CheckpointError, in one line, for a file that fits nothing."""
    original, stored = unwrap(read_file(path), path)
    if sum(v.numel() * v.element_size() for v in original.values()) > os.path.getsize(path):
        raise HostileFile(f"{path}: its entries declare more numbers than the file holds; it is refused")
    state, settings = translate(original, path)
    config = infer(state)
    if config is None:
        if foreign := load_foreign(original, override):
            return foreign
        raise CheckpointError(f"{path} is none of EDSR, RCAN, SwinIR; its first keys are {', '.join(list(original)[:3])}"
                              " (pip install spandrel lets other architectures be teachers)")
    if wrong := oversized(config, state):
        raise CheckpointError(f"{path} looks like {config['arch']} but does not fit it: {wrong}")
    unseen = ("res_scale", "mean", "img_range", "drop_path")
    config |= settings | {k: v for k, v in (stored or {}).items() if k in unseen}
    if unknown := set(override) - {"res_scale", "mean", "img_range"}:
        raise CheckpointError(f"{path}: cannot override {', '.join(sorted(unknown))}, only res_scale, mean, img_range")
    config |= override
    require_sane(config, path)
    try:
        with torch.device("meta"):
            model = from_config(config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as e:
        raise CheckpointError(f"{path} looks like {config['arch']} but does not fit it: {e}") from None
    if wrong := misfits(model, state):
        if foreign := load_foreign(original, override):  # HAT, for one, has all of SwinIR's names and more
            return foreign
        raise CheckpointError(f"{path} looks like {config['arch']} but does not fit it: {'; '.join(wrong)}")
    model = from_config(config)
    model.load_state_dict(state)
    return model.eval()
