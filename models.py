"""The networks EDSR, RCAN and SwinIR at ×2, ×3, ×4 and ×8, and the checkpoint formats that they come in.

Every network maps (N,3,h,w) to (N,3,s·h,s·w), RGB floats in [0,1], and carries
    .scale             the factor s
    .config            the constructor's arguments plus "arch", enough to build it again
    .taps              four submodules whose outputs (N,c,h,w) feature losses compare
    .receptive_radius  an output pixel depends on no LR pixel farther away (None: no useful bound)

    EDSR   Lim et al., Enhanced Deep Residual Networks for Single Image Super-Resolution, CVPRW 2017
    RCAN   Zhang et al., Image Super-Resolution Using Very Deep Residual Channel Attention Networks, ECCV 2018
    SwinIR Liang et al., SwinIR: Image Restoration Using Swin Transformer, ICCVW 2021
Parameter names are those of BasicSR (EDSR, RCAN) and of SwinIR's authors, so files move both ways.
"""
import inspect
import io
import math
import os
import re
import textwrap
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import nn

warnings.filterwarnings("ignore", message="torch.meshgrid")  # of networks that spandrel has

DIV2K_MEAN = (0.4488, 0.4371, 0.4040)  # RGB mean of DIV2K's training images, in [0,1]
SCALES = (2, 3, 4, 8)
# What torch.load may call to read a number of numpy's, such as a best PSNR, from files of numpy 1 and 2.
NUMPY_NUMBERS = [
    np.dtype, *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"},
    *[(np.float64().__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]]


class InputError(ValueError):
    """What a user gave cannot be used. The message is one line: what is wrong, where, and what to do."""


def conv3x3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def upsampler(channels, scale):
    """Sub-pixel convolutions: one stage of ×3, or log2(s) stages of ×2."""
    layers = []
    for r in [3] if scale == 3 else [2] * int(math.log2(scale)):
        layers += [conv3x3(channels, channels * r * r), nn.PixelShuffle(r)]
    return nn.Sequential(*layers)


def shuffle_then_conv(x, r, conv):
    """conv(nnf.pixel_shuffle(x, r)), computed before the shuffle: the same sums, but of c·r² → k·r² channels.
    bfloat16 units are fast there, and slow at c → 3 channels.
    x (N,c·r²,h,w); conv 3×3, c → k, with padding 1. Returns (N,k,r·h,r·w).
    The shuffle makes 3r×3r pixels of the 3×3 around (i,j) of x. Output pixel (r·i + p, r·j + q) sees 3×3 of
    them, shifted by (p,q). So its kernel is `conv.weight` there, among zeros, unshuffled. At the
    border, zeros around the shuffled map are zeros around x."""
    kernels = []
    for p in range(r):
        for q in range(r):
            left_right_top_bottom = (r - 1 + q, 2 * r - 2 - q, r - 1 + p, 2 * r - 2 - p)
            kernels.append(nnf.pad(conv.weight, left_right_top_bottom))  # (k,c,3r,3r)
    kernel = torch.stack(kernels, dim=1).flatten(0, 1)  # (k·r²,c,3r,3r), in the order of a shuffle
    kernel = nnf.pixel_unshuffle(kernel, r)  # (k·r²,c·r²,3,3)
    bias = conv.bias.repeat_interleave(r * r)
    return nnf.pixel_shuffle(nnf.conv2d(x, kernel, bias, padding=1), r)


class SRNetwork(nn.Module):
    """What the networks share. EDSR and RCAN differ only in `body`. SwinIR has a `forward` of its own."""
    receptive_radius = None

    def __init__(self, arch, scale, mean, img_range, **sizes):
        super().__init__()
        if scale not in SCALES:
            raise InputError(f"scale {scale} is not one of {', '.join(map(str, SCALES))}")
        self.config = dict(arch=arch, scale=scale, **sizes, mean=list(mean), img_range=img_range)
        self.scale, self.img_range = scale, float(img_range)
        self.register_buffer("mean", torch.tensor(mean).float().view(1, 3, 1, 1), persistent=False)

    def add_layers(self, channels, blocks):
        """The layers of EDSR and RCAN. blocks: a generator, so conv_first draws its weights before them."""
        self.conv_first = conv3x3(3, channels)
        self.body = nn.Sequential(*blocks)
        self.conv_after_body = conv3x3(channels, channels)
        self.upsample = upsampler(channels, self.scale)
        self.conv_last = conv3x3(channels, 3)
        n = len(self.body)
        self.taps = [self.conv_first, self.body[n // 3], self.body[2 * n // 3], self.conv_after_body]

    def forward(self, x):
        x = self.conv_first((x - self.mean) * self.img_range)
        x = self.conv_after_body(self.body(x)) + x
        return self.picture(self.enlarge(x))

    def enlarge(self, features):
        """conv_last(upsample(features)): (N,c,h,w) to (N,3,s·h,s·w)."""
        if features.dtype != torch.bfloat16:
            return self.conv_last(self.upsample(features))
        features = self.upsample[:-1](features)
        return shuffle_then_conv(features, self.upsample[-1].upscale_factor, self.conv_last)

    def picture(self, y):
        """RGB in [0,1], float32 also under autocast, from what the last layer returns."""
        return y.to(self.mean.dtype) / self.img_range + self.mean


class ResidualBlock(nn.Module):
    def __init__(self, channels, res_scale):
        super().__init__()
        self.conv1, self.conv2 = conv3x3(channels, channels), conv3x3(channels, channels)
        self.res_scale = res_scale

    def forward(self, x):
        return torch.add(x, self.conv2(nnf.relu(self.conv1(x))), alpha=self.res_scale)  # x + res_scale·(…)


class EDSR(SRNetwork):
    """EDSR. Each block's residual is scaled by res_scale: from 32 blocks on 0.1, else 1, as published."""

    def __init__(self, scale, channels=64, blocks=16, res_scale=None, mean=DIV2K_MEAN, img_range=255.0):
        if res_scale is None:
            res_scale = 0.1 if blocks >= 32 else 1.0
        super().__init__("edsr", scale, mean, img_range, channels=channels, blocks=blocks,
                         res_scale=res_scale)
        self.add_layers(channels, (ResidualBlock(channels, res_scale) for _ in range(blocks)))
        self.receptive_radius = 2 * blocks + 4  # 2·blocks + 3 convolutions in LR, < 1 after


class ChannelAttention(nn.Module):
    """Scales each channel by a factor in (0,1) that two layers compute from the means of all channels."""

    def __init__(self, channels, reduction):
        super().__init__()
        squeezed = channels // reduction
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, squeezed, 1), nn.ReLU(),
                                       nn.Conv2d(squeezed, channels, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.attention(x)


class RCAB(nn.Module):  # residual channel attention block
    def __init__(self, c, reduction):
        super().__init__()
        self.rcab = nn.Sequential(conv3x3(c, c), nn.ReLU(), conv3x3(c, c), ChannelAttention(c, reduction))

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
    """Groups of channel attention blocks. The attention takes means over the whole input."""

    def __init__(self, scale, channels=64, blocks=20, groups=10, reduction=16, mean=DIV2K_MEAN,
                 img_range=255.0):
        reduction = min(reduction, channels)
        super().__init__("rcan", scale, mean, img_range, channels=channels, blocks=blocks, groups=groups,
                         reduction=reduction)
        self.add_layers(channels, (ResidualGroup(channels, blocks, reduction) for _ in range(groups)))


def mirror(x, multiple):
    """Extends x (N,c,h,w) below and to the right to multiples of `multiple`, by np.pad's "reflect"."""
    for dim in (-2, -1):
        n = x.shape[dim]
        period = torch.full((1,), max(2 * n - 2, 1), device=x.device)  # a tensor, for the export to ONNX
        i = torch.arange(n + -n % multiple, device=x.device) % period
        x = x.index_select(dim, n - 1 - (n - 1 - i).abs())  # 0 1 … n−1 … 1 0 1 …
    return x


class WindowAttention(nn.Module):
    """Multi-head self-attention inside w×w windows, with a learnt bias for each relative position."""

    def __init__(self, channels, heads, window):
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        pixels = torch.cartesian_prod(torch.arange(window), torch.arange(window))  # (w²,2): row, column
        distance = pixels[:, None] - pixels + window - 1  # (w²,w²,2), numbers 0 to 2w−2
        index = distance[..., 0] * (2 * window - 1) + distance[..., 1]
        self.register_buffer("relative_position_index", index, persistent=False)  # (w²,w²)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x, mask=None):
        """x (N,H,W,C); mask (nW,w²,w²), one for each of the nW windows of an image. Returns (N,H,W,C).
        nnf.scaled_dot_product_attention would copy the bias, as large as the scores, for each image."""
        # N images of H×W pixels in nW = rows·columns windows of w×w; C channels in h heads of d
        N, H, W, C = x.shape
        h, w = self.heads, self.window
        rows, columns, d = H // w, W // w, C // h
        qkv = self.qkv(x)  # (N,H,W,3C)
        qkv = qkv.view(N, rows, w, columns, w, 3, h, d)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)  # (3,N,rows,columns,h,w,w,d)
        q, k, v = qkv.reshape(3, -1, h, w * w, d)  # (N·nW,h,w²,d) each
        bias = self.relative_position_bias_table.index_select(0, self.relative_position_index.flatten())
        bias = bias.t().view(1, h, w * w, w * w)
        if mask is not None:
            bias = bias + mask[:, None]  # (nW,h,w²,w²)
        scores = (q * d ** -0.5) @ k.mT  # (N·nW,h,w²,w²)
        scores = scores.unflatten(0, (-1, bias.shape[0])) + bias.to(scores.dtype)
        y = scores.flatten(0, 1).softmax(-1) @ v  # (N·nW,h,w²,d)
        y = y.view(N, rows, columns, h, w, w, d)
        y = y.permute(0, 1, 4, 2, 5, 3, 6)  # (N,rows,w,columns,w,h,d)
        return self.proj(y.reshape(N, H, W, C))


class SwinLayer(nn.Module):
    """LayerNorm and window attention, shifted or not; then LayerNorm and an MLP. Both are residual."""

    def __init__(self, channels, heads, window, mlp_ratio, shifted):
        super().__init__()
        hidden = int(channels * mlp_ratio + 1e-6)  # in floats, 22·(15/22) is 14.999…
        self.shift = window // 2 if shifted else 0
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(channels, hidden), "fc2": nn.Linear(hidden, channels)})

    def forward(self, x, mask, keep):
        """x (N,H,W,C); keep (2,N,1,1,1): the factors by which drop-path scales the two branches, or None."""
        y, s = self.norm1(x), self.shift
        if s:
            y = y.roll((-s, -s), dims=(1, 2))
            y = self.attn(y, mask)
            y = y.roll((s, s), dims=(1, 2))
        else:
            y = self.attn(y)
        x = x + (y if keep is None else y * keep[0])
        y = self.mlp["fc2"](nnf.gelu(self.mlp["fc1"](self.norm2(x))))
        return x + (y if keep is None else y * keep[1])


class SwinStage(nn.Module):
    """The paper's RSTB: Swin layers and a convolution. It is residual."""

    def __init__(self, channels, blocks):
        super().__init__()
        self.residual_group = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.conv = conv3x3(channels, channels)

    def forward(self, x, mask, keep):
        y = x
        for layer, factors in zip(self.residual_group["blocks"], keep):
            y = layer(y, mask, factors)
        return x + self.conv(y.movedim(-1, 1)).movedim(1, -1)


class SwinIR(SRNetwork):
    """Classical SwinIR (head "pixelshuffle") and its lightweight variant (head "pixelshuffledirect").
    The input may have any size: it is mirrored to multiples of the window, and the result is cropped."""

    def __init__(self, scale, channels=180, stages=6, layers=6, heads=6, window=8, mlp_ratio=2.0,
                 drop_path=0.1, head="pixelshuffle", mean=DIV2K_MEAN, img_range=1.0):
        super().__init__("swinir", scale, mean, img_range, channels=channels, stages=stages, layers=layers,
                         heads=heads, window=window, mlp_ratio=mlp_ratio, drop_path=drop_path, head=head)
        if channels % heads:
            raise InputError(f"SwinIR's channels ({channels}) must be a multiple of its {heads} heads")
        self.window, self.direct = window, head == "pixelshuffledirect"
        rates = torch.linspace(0, drop_path, stages * layers)  # deeper layers drop more often
        self.register_buffer("drop_rates", rates.view(stages, layers, 1, 1, 1, 1, 1), persistent=False)
        self.conv_first = conv3x3(3, channels)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(channels)})
        self.layers = nn.ModuleList()
        for _ in range(stages):
            blocks = [SwinLayer(channels, heads, window, mlp_ratio, i % 2 == 1) for i in range(layers)]
            self.layers.append(SwinStage(channels, blocks))
        self.norm, self.conv_after_body = nn.LayerNorm(channels), conv3x3(channels, channels)
        if self.direct:
            self.upsample = nn.Sequential(conv3x3(channels, 3 * scale ** 2), nn.PixelShuffle(scale))
        else:
            self.conv_before_upsample = nn.Sequential(conv3x3(channels, 64), nn.LeakyReLU())
            self.upsample = upsampler(64, scale)
            self.conv_last = conv3x3(64, 3)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        third, two_thirds = self.layers[stages // 3], self.layers[2 * stages // 3]
        self.taps = [self.conv_first, third.conv, two_thirds.conv, self.conv_after_body]

    def forward(self, x):
        h, w = x.shape[-2:]
        x = self.conv_first(mirror((x - self.mean) * self.img_range, self.window))  # (N,C,H,W)
        mask = self.shift_mask(*x.shape[-2:])
        stages, layers = self.drop_rates.shape[:2]
        factors = [[None] * layers] * stages
        if self.training:  # 0 drops a branch, 1/(1 − rate) keeps the mean
            kept = torch.rand(stages, layers, 2, x.shape[0], 1, 1, 1, device=x.device) >= self.drop_rates
            factors = kept / (1 - self.drop_rates)
        y = self.patch_embed["norm"](x.movedim(1, -1))  # (N,H,W,C) between the convolutions
        for stage, keep in zip(self.layers, factors):
            y = stage(y, mask, keep)
        y = self.conv_after_body(self.norm(y).movedim(-1, 1)) + x
        y = self.upsample(y) if self.direct else self.enlarge(self.conv_before_upsample(y))
        return self.picture(y)[..., :h * self.scale, :w * self.scale]

    def shift_mask(self, H, W):
        """(nW,w²,w²): −100 between pixels that the cyclic shift brought together from opposite edges, else 0.
        H×W pixels, cut in nW = H/w·W/w windows of w×w in raster order."""
        w, device = self.window, self.mean.device
        y = torch.arange(H, device=device) >= H - w // 2  # the rows that came from the opposite edge
        x = torch.arange(W, device=device) >= W - w // 2
        region = 2 * y[:, None].long() + x  # (H,W)
        region = region.view(H // w, w, W // w, w)
        region = region.transpose(1, 2).reshape(-1, w * w)  # (nW,w²)
        apart = region[:, :, None] != region[:, None]
        return apart.float() * -100.0

    def authors_buffers(self):
        """The constants that the authors' files hold beside the weights. Their masks fit a 48×48 input."""
        side = 48 // self.window * self.window
        mask = self.shift_mask(side, side)
        buffers = {k: v for k, v in self.named_buffers() if k.endswith("relative_position_index")}
        layers = [name for name, m in self.named_modules() if isinstance(m, SwinLayer) and m.shift]
        return buffers | {f"{name}.attn_mask": mask for name in layers}


ARCHITECTURES = {"edsr": EDSR, "rcan": RCAN, "swinir": SwinIR}
BLOCKS = (ResidualBlock, RCAB, SwinLayer)  # what each network repeats: the parts worth compiling
PRESETS = {"edsr": "edsr_c256b32", "edsr_baseline": "edsr_c64b16", "rcan": "rcan_c64b20g10",
           "swinir": "swinir_c180s36"}
PAPER_STUDENTS = {"edsr": "edsr_c64b32", "rcan": "rcan_c64b6g10", "swinir": "swinir_c60s24"}
NAMES_HELP = ("edsr, edsr_baseline, rcan, swinir, or any size: edsr_c64b32 (channels, blocks), "
              "rcan_c64b6g10 (channels, blocks to a group, groups), swinir_c60s24 "
              "(channels, Swin layers in all, six to a stage)")


def config_of(name, scale):
    """The config of a model name (NAMES_HELP). InputError for an unknown one."""
    spelled = PRESETS.get(name, name)
    number = "([1-9][0-9]*)"
    if found := re.fullmatch(f"edsr_c{number}b{number}", spelled):
        channels, blocks = map(int, found.groups())
        return dict(arch="edsr", scale=scale, channels=channels, blocks=blocks)
    if found := re.fullmatch(f"rcan_c{number}b{number}g{number}", spelled):
        channels, blocks, groups = map(int, found.groups())
        return dict(arch="rcan", scale=scale, channels=channels, blocks=blocks, groups=groups)
    if found := re.fullmatch(f"swinir_c{number}s{number}", spelled):
        channels, layers = map(int, found.groups())
        if layers % 6:
            raise InputError(f"model '{name}': the Swin layers must be a multiple of six, a stage's")
        return dict(arch="swinir", scale=scale, channels=channels, stages=layers // 6)
    raise InputError(f"unknown model '{name}'; known: {NAMES_HELP}")


def from_config(config):
    """The network of a config, freshly initialised."""
    return ARCHITECTURES[config["arch"]](**{k: v for k, v in config.items() if k != "arch"})


def build(name, scale):
    """A freshly initialised network by name (NAMES_HELP) for ×scale. InputError where there is none."""
    return from_config(config_of(name, scale))


def small(teacher):
    """The config of "small": the paper's student or, if that is no smaller, the teacher at half width."""
    config = teacher.config
    if config["arch"] not in PAPER_STUDENTS:
        raise InputError(f"'small' is not defined for a teacher of {config['arch']}. Name a student.")
    paper = config_of(PAPER_STUDENTS[config["arch"]], teacher.scale)
    with torch.device("meta"):
        if parameters(from_config(paper)) < parameters(teacher):
            return paper
    heads = config.get("heads", 1)
    half = max(config["channels"] // 2 // heads, 1) * heads  # a multiple of the heads
    return config | dict(channels=half)


def parameters(model):
    """The number of weights and biases."""
    return sum(p.numel() for p in model.parameters())


def describe(config):
    """A config in one line: "arch=edsr scale=4 channels=64 blocks=16 res_scale=1.0 mean=[…] …"."""
    return " ".join(f"{key}={value}" for key, value in config.items())


def replace_file(path, content):
    """Writes bytes to a file, and makes its folder. It takes the place of `path` once it is whole and on the
    disk. After an exception (OSError: the disk is full) the old one is as it was, the new one removed."""
    own = Path(path).with_name(f".{os.getpid()}_{threading.get_ident()}.tmp")  # of this process and thread
    own.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(own, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(own, path)
    except OSError as e:  # a full disk's does not name the file
        raise OSError(e.errno, e.strerror, str(path)) from None
    finally:
        own.unlink(missing_ok=True)  # it exists only after an exception


def as_bytes(content):
    """What torch.save writes. To a full disk it would raise a RuntimeError."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def save(path, model, params=None):
    """Writes {"params_ema", "params", "config"}, which BasicSR reads as well, and SwinIR's authors' code.
    "params_ema" are the weights of `model`. "params" are the same, or the state dict `params`."""
    averaged = model.state_dict()
    content = dict(params_ema=averaged, params=params or averaged, config=model.config)
    constants = model.authors_buffers() if isinstance(model, SwinIR) else {}
    for key in ("params_ema", "params"):
        content[key] = {name: v.cpu().contiguous() for name, v in (content[key] | constants).items()}
    replace_file(path, as_bytes(content))


def read_file(path):
    """The object in a checkpoint file, on the CPU. No code in it is run. InputError for other files."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise InputError(f"{path} needs the package safetensors: pip install safetensors") from None
    except (FileNotFoundError, IsADirectoryError, PermissionError) as e:
        raise InputError(f"{path} cannot be read: {e.strerror}") from None
    except Exception as e:  # torch and safetensors raise many kinds for damage
        if code := re.search(r"GLOBAL ([\w.]+)", str(e)):
            raise InputError(f"{path} wants to run code ({code[1]}) and is refused. Save the "
                             "weights alone: torch.save(network.state_dict(), file)") from None
        raise InputError(f"{path} is no checkpoint, or is empty, truncated or damaged") from None


def unwrap(content, path):
    """(weights, config): the tensors in a file's content by name, and the config that `save` wrote, or {}."""
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no state dict but a {type(content).__name__}")
    config = content.get("config")  # other codes store settings of their own under this name
    ours = [{"arch", *inspect.signature(network).parameters} for network in ARCHITECTURES.values()]
    if not isinstance(config, dict) or config.keys() not in ours:
        config = {}
    for key in ("state_dict", "model_state_dict", "model", "net", "params_ema", "params", "ema"):
        if isinstance(content.get(key), dict):
            content = content[key]
    counters = ("total_ops", "total_params", "n_averaged")  # of thop, and of torch's AveragedModel
    weights = {str(name): v for name, v in content.items()
               if torch.is_tensor(v) and not str(name).endswith(counters)}
    if not weights:
        raise InputError(f"{path} holds no weights. Its first entries are {list(content)[:3]}")
    return weights, config


def without_prefixes(weights):
    """[weights, …]: with the names as they are, then with one more of the prefixes (module.net_g.) taken off.
    DataParallel, torch.compile, Lightning and GAN codes put prefixes there."""
    shared = os.path.commonprefix(list(weights)).count(".")
    return [{name.split(".", n)[-1]: v for name, v in weights.items()} for n in range(shared + 1)]


# Regular expressions: from the names of EDSR's and RCAN's authors, who share a code base, to BasicSR's.
COMMON_NAMES = {
    r"^head\.0\.": "conv_first.",
    r"^body\.\d+\.(weight|bias)$": r"conv_after_body.\1",  # the body's last layer
    r"^tail\.0\.": "upsample.",
    r"^tail\.1\.": "conv_last.",
}
EDSR_NAMES = COMMON_NAMES | {r"^(body\.\d+)\.body\.0": r"\1.conv1", r"^(body\.\d+)\.body\.2": r"\1.conv2"}
RCAN_NAMES = COMMON_NAMES | {
    r"^(body\.\d+)\.body\.(\d+)\.body\.": r"\1.residual_group.\2.rcab.",
    r"^(body\.\d+)\.body\.\d+\.(weight|bias)$": r"\1.conv.\2",  # a group's last layer
    r"\.conv_du\.0\.": ".attention.1.",
    r"\.conv_du\.2\.": ".attention.3.",
}


def translate(state):
    """(state, settings): the weights under this file's names; mean and img_range if the file tells.
    EDSR's and RCAN's authors' names without sub_mean come from codes without a mean, in [0,1]."""
    constants = (".attn_mask", ".relative_position_index")  # SwinIR computes them
    state = {name: v for name, v in state.items() if not name.endswith(constants)}
    settings = {}
    if "sub_mean.weight" in state:
        settings = fold_mean_shifts(state)
    elif "head.0.weight" in state:
        settings = dict(mean=[0.0, 0.0, 0.0], img_range=1.0)
    names = RCAN_NAMES if any(".conv_du." in name for name in state) else EDSR_NAMES
    for theirs, ours in names.items():
        state = {re.sub(theirs, ours, name): v for name, v in state.items()}
    return state, settings


def fold_mean_shifts(state):
    """Folds the authors' 1×1 convolutions sub_mean and add_mean into the layers beside them, in `state`.
    Returns the mean m, and its range. The convolutions may have been trained:
        sub_mean  Wx + b = W(x − m) with m = −W⁻¹b. The network subtracts m, so W joins the first layer.
        add_mean  Az + c = (Az + c − m) + m. The network adds m, so A and c − m join the last layer.
    This is exact, also at the border: zeros beside W(x − m) are zeros beside x − m."""
    W, A = (state.pop(f"{name}_mean.weight").double().view(3, 3) for name in ("sub", "add"))
    b, c = (state.pop(f"{name}_mean.bias").double() for name in ("sub", "add"))
    m = torch.linalg.solve(W, -b)
    first, last, bias = (state[k].double() for k in ("head.0.weight", "tail.1.weight", "tail.1.bias"))
    state["head.0.weight"] = torch.einsum("oihw,ij->ojhw", first, W)
    state["tail.1.weight"] = torch.einsum("ij,jchw->ichw", A, last)
    state["tail.1.bias"] = A @ bias + c - m
    img_range = 255.0 if m.max() > 1 else 1.0
    return dict(mean=[round(v, 6) for v in (m / img_range).tolist()], img_range=img_range)


def infer(state):
    """The config that the names and shapes of a translated state dict tell."""
    def count(prefix):  # how many modules stand directly under a name
        return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})

    channels = len(state["conv_first.weight"])
    widened, width = state["upsample.0.weight"].shape[:2]  # a stage of ×r widens to r² times the channels
    config = dict(channels=channels, scale=3 if widened == 9 * width else 2 ** count("upsample."))
    if "body.0.conv1.weight" in state:
        return config | dict(arch="edsr", blocks=count("body."))
    if "body.0.residual_group.0.rcab.0.weight" in state:
        squeezed = len(state["body.0.residual_group.0.rcab.3.attention.1.weight"])
        return config | dict(arch="rcan", groups=count("body."), blocks=count("body.0.residual_group."),
                             reduction=channels // squeezed)
    if "conv_before_upsample.0.weight" not in state:
        config |= dict(head="pixelshuffledirect", scale=math.isqrt(widened // 3))
    layer = "layers.0.residual_group.blocks.0"
    entries, heads = state[f"{layer}.attn.relative_position_bias_table"].shape  # ((2·window − 1)², heads)
    hidden = len(state[f"{layer}.mlp.fc1.weight"])
    return config | dict(arch="swinir", heads=heads, window=(math.isqrt(entries) + 1) // 2,
                         mlp_ratio=hidden / channels, stages=count("layers."),
                         layers=count("layers.0.residual_group.blocks."))


class Foreign(nn.Module):
    """A network of the package spandrel behind the same interface, as a teacher only: no gradient or taps."""

    def __init__(self, found):
        super().__init__()
        self.call, self.model = found, found.model  # a submodule as well, so that .to(device) moves it
        self.config = dict(arch=found.architecture.name, scale=found.scale)
        self.scale, self.taps, self.receptive_radius = found.scale, [], None

    def forward(self, x):
        """spandrel pads x to a size that the network takes, crops the result and clamps it to [0,1]."""
        y = self.call(x.clone())  # a copy, as some networks edit their input
        return y.clone()  # made outside spandrel's inference mode: a loss takes only such tensors


def from_spandrel(weights, path):
    """The network of the package spandrel that the weights fit, or a text that says why there is none.
    InputError for a network of a wrong kind."""
    try:
        from spandrel import ModelLoader
    except Exception as e:  # torchvision of another build than torch's raises what it likes
        if isinstance(e, ModuleNotFoundError) and e.name == "spandrel":
            return "For other networks: pip install spandrel"
        return (f"The package spandrel fails to import ({e}). Often torch and torchvision come from two "
                "sources, as PyPI and torch's CPU index: install both from one")
    for state in without_prefixes(weights):
        try:
            found = ModelLoader(device="cpu").load_from_state_dict(state)
        except Exception:  # it raises one of many kinds for unknown weights
            continue
        channels = (found.input_channels, found.output_channels)
        if found.purpose != "SR" or found.scale not in SCALES or channels != (3, 3):
            kind = f"{found.purpose} x{found.scale} from {channels[0]} to {channels[1]} channels"
            raise InputError(f"{path} is {found.architecture.name}, for {kind}. A network for "
                             "super-resolution of RGB x2, x3, x4 or x8 is needed")
        return Foreign(found).float()
    return "The package spandrel does not know it either"


def load(path, **override):
    """The network in a file of this project, of EDSR's, RCAN's or SwinIR's authors, or of BasicSR, also as
    .safetensors. It is in eval mode, float32, on the CPU. Names and shapes tell the sizes. res_scale, mean
    and img_range are the file's, else the published ones; load(path, res_scale=1.0) overrides them.
    InputError if the file fits none, or if a weight is NaN or infinite."""
    weights, stored = unwrap(read_file(path), path)
    try:
        state, settings = translate(without_prefixes(weights)[-1])
        network = from_config(infer(state) | settings | stored | override)
        network.load_state_dict(state)
    except (LookupError, ArithmeticError, RuntimeError, TypeError, ValueError) as e:
        network = "" if override else from_spandrel(weights, path)
        if isinstance(network, str):
            reason = textwrap.shorten(f"{e} is missing" if isinstance(e, KeyError) else str(e), 300)
            raise InputError(f"{path} is no EDSR, RCAN or SwinIR: {reason}. {network}") from None
    if not all(v.isfinite().all() for v in network.state_dict().values()):
        raise InputError(f"{path} has weights that are NaN or infinite")
    return network.eval()
