"""Small stand-ins for the networks of other codes: their parameter names, their forward pass, none of models.py.

    AuthorsEDSR, AuthorsRCAN   EDSR-PyTorch and the RCAN built on it: pictures in [0,255], mean shifts as 1×1 convolutions
    BasicSREDSR, BasicSRRCAN   BasicSR's: pictures in [0,1], the mean a constant
    AuthorsSwinIR              tokens (B,L,C), softmax written out, windows gathered by index, masks made by slices
Each is slow and plain on purpose: the tests of models.py compare with them.
"""
import torch
import torch.nn.functional as F
from torch import nn

MEAN = (0.4488, 0.4371, 0.4040)
STAGES = {2: [2], 3: [3], 4: [2, 2], 8: [2, 2, 2]}  # the factors by which a scale's sub-pixel stages enlarge


def conv(c_in, c_out, k=3):
    return nn.Conv2d(c_in, c_out, k, padding=k // 2)


def enlarge(c, scale):
    """Convolutions at the even keys, pixel shuffles between them."""
    layers = []
    for factor in STAGES[scale]:
        layers += [conv(c, c * factor ** 2), nn.PixelShuffle(factor)]
    return nn.Sequential(*layers)


def holder(**children):
    """A module that only gives its children their names."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def randomise(net, seed=0):
    """Weights of a trained network's scale everywhere, biases and norms too, drawn from a seed; constants stay."""
    g = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if "_mean." in name:
            continue
        if name.endswith("relative_position_bias_table"):
            p.data = 0.7 * noise
        elif "norm" in name:
            p.data = (1 if name.endswith("weight") else 0) + 0.2 * noise
        elif p.dim() == 1:
            p.data = 0.1 * noise
        else:
            p.data = noise / p[0].numel() ** 0.5
    return net.eval()


# ------------------------------------------------------------------------------------------ EDSR-PyTorch and RCAN
def mean_shift(sign, mean, img_range):
    shift = conv(3, 3, 1)
    shift.weight.data = torch.eye(3).view(3, 3, 1, 1)
    shift.bias.data = sign * img_range * torch.tensor(mean)
    return shift


class AuthorsNetwork(nn.Module):
    """head.0, body.N (the last one a convolution), tail.{0,1}, sub_mean, add_mean; takes and gives [0,img_range]."""

    def __init__(self, scale, c, parts, mean=MEAN, img_range=255.0):
        super().__init__()
        self.sub_mean, self.add_mean = mean_shift(-1, mean, img_range), mean_shift(1, mean, img_range)
        self.head = nn.Sequential(conv(3, c))
        self.body = nn.Sequential(*parts, conv(c, c))
        self.tail = nn.Sequential(enlarge(c, scale), conv(c, 3))

    def forward(self, x):
        shallow = self.head(self.sub_mean(x))
        return self.add_mean(self.tail(self.body(shallow) + shallow))


class ResBlock(nn.Module):
    def __init__(self, c, res_scale):
        super().__init__()
        self.body = nn.Sequential(conv(c, c), nn.ReLU(), conv(c, c))
        self.res_scale = res_scale

    def forward(self, x):
        return self.body(x) * self.res_scale + x


class AuthorsEDSR(AuthorsNetwork):
    def __init__(self, scale, c=6, n=3, res_scale=1.0, **kw):
        super().__init__(scale, c, [ResBlock(c, res_scale) for _ in range(n)], **kw)


class Squeeze(nn.Module):
    """Channel attention under the authors' name (conv_du.{0,2}) or BasicSR's (attention.{1,3})."""

    def __init__(self, c, r, name):
        super().__init__()
        squeeze = [conv(c, c // r, 1), nn.ReLU(), conv(c // r, c, 1), nn.Sigmoid()]
        self.add_module(name, nn.Sequential(*([nn.Identity()] if name == "attention" else []), *squeeze))

    def forward(self, x):
        gate, = self.children()
        return gate(x.mean((2, 3), keepdim=True)) * x


class Residual(nn.Module):
    """Adds its only child's output to the input; `name` is that child's."""

    def __init__(self, name, *layers):
        super().__init__()
        self.add_module(name, nn.Sequential(*layers))

    def forward(self, x):
        child, = self.children()
        return child(x) + x


class AuthorsRCAN(AuthorsNetwork):
    def __init__(self, scale, c=8, n=2, groups=2, r=4, **kw):
        block = lambda: Residual("body", conv(c, c), nn.ReLU(), conv(c, c), Squeeze(c, r, "conv_du"))
        super().__init__(scale, c, [Residual("body", *[block() for _ in range(n)], conv(c, c)) for _ in range(groups)], **kw)


# ------------------------------------------------------------------------------------------ BasicSR
class BasicSRNetwork(nn.Module):
    def __init__(self, scale, c, parts, mean=MEAN, img_range=255.0):
        super().__init__()
        self.mean, self.img_range = torch.tensor(mean).view(1, 3, 1, 1), img_range
        self.conv_first, self.body, self.conv_after_body = conv(3, c), nn.Sequential(*parts), conv(c, c)
        self.upsample, self.conv_last = enlarge(c, scale), conv(c, 3)

    def forward(self, x):
        shallow = self.conv_first((x - self.mean) * self.img_range)
        deep = self.conv_after_body(self.body(shallow)) + shallow
        return self.conv_last(self.upsample(deep)) / self.img_range + self.mean


class ResBlockNoBN(nn.Module):
    def __init__(self, c, res_scale):
        super().__init__()
        self.conv1, self.conv2, self.res_scale = conv(c, c), conv(c, c), res_scale

    def forward(self, x):
        return x + self.conv2(torch.relu(self.conv1(x))) * self.res_scale


class BasicSREDSR(BasicSRNetwork):
    def __init__(self, scale, c=6, n=3, res_scale=1.0, **kw):
        super().__init__(scale, c, [ResBlockNoBN(c, res_scale) for _ in range(n)], **kw)


class BasicSRGroup(nn.Module):
    def __init__(self, c, n, r):
        super().__init__()
        block = lambda: Residual("rcab", conv(c, c), nn.ReLU(), conv(c, c), Squeeze(c, r, "attention"))
        self.residual_group, self.conv = nn.Sequential(*[block() for _ in range(n)]), conv(c, c)

    def forward(self, x):
        return self.conv(self.residual_group(x)) + x


class BasicSRRCAN(BasicSRNetwork):
    def __init__(self, scale, c=8, n=2, groups=2, r=4, **kw):
        super().__init__(scale, c, [BasicSRGroup(c, n, r) for _ in range(groups)], **kw)


# ------------------------------------------------------------------------------------------ SwinIR
def window_tokens(h, w, win, shift=0):
    """(windows, win²): which tokens of an h×w picture (row by row) share a window after a cyclic shift."""
    grid = torch.arange(h * w).view(h, w)
    grid = torch.cat([grid[shift:], grid[:shift]])
    grid = torch.cat([grid[:, shift:], grid[:, :shift]], dim=1)
    return torch.stack([grid[y:y + win, x:x + win].flatten() for y in range(0, h, win) for x in range(0, w, win)])


def slice_mask(h, w, win, shift):
    """The Swin paper's way: number the nine regions that the shift makes, forbid attention between two numbers."""
    number, cuts = torch.zeros(h, w), (slice(0, -win), slice(-win, -shift), slice(-shift, None))
    for i, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
        number[rows, columns] = i
    number = number.flatten()[window_tokens(h, w, win)]
    different = number[:, None, :] != number[:, :, None]
    return torch.zeros(different.shape).masked_fill(different, -100.0)


def position_index(win):
    cells = [(y, x) for y in range(win) for x in range(win)]
    index = [[(a[0] - b[0] + win - 1) * (2 * win - 1) + a[1] - b[1] + win - 1 for b in cells] for a in cells]
    return torch.tensor(index)


class SwinBlock(nn.Module):
    def __init__(self, c, heads, win, shift, ratio, size):
        super().__init__()
        self.heads, self.win, self.shift, self.size = heads, win, shift, size
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.attn = holder(qkv=nn.Linear(c, 3 * c), proj=nn.Linear(c, c))
        self.attn.relative_position_bias_table = nn.Parameter(torch.zeros((2 * win - 1) ** 2, heads))
        self.attn.register_buffer("relative_position_index", position_index(win))
        self.mlp = holder(fc1=nn.Linear(c, int(c * ratio)), fc2=nn.Linear(int(c * ratio), c))
        if shift:
            self.register_buffer("attn_mask", slice_mask(size, size, win, shift))

    def attention(self, x, mask):
        """x (B,windows,tokens,C)"""
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.attn.qkv(x).chunk(3, dim=-1))
        score = torch.einsum("bwihd,bwjhd->bwhij", q, k) / q.shape[-1] ** 0.5
        index = self.attn.relative_position_index
        score = score + self.attn.relative_position_bias_table[index].permute(2, 0, 1)
        if mask is not None:
            score = score + mask[:, None]
        weight = (score - score.amax(-1, keepdim=True)).exp()
        weight = weight / weight.sum(-1, keepdim=True)
        return self.attn.proj(torch.einsum("bwhij,bwjhd->bwihd", weight, v).flatten(-2))

    def forward(self, x, h, w):
        """x (B,L,C)"""
        mask = None
        if self.shift:
            mask = self.attn_mask if (h, w) == (self.size, self.size) else slice_mask(h, w, self.win, self.shift)
        tokens = window_tokens(h, w, self.win, self.shift)
        y = torch.zeros_like(x)
        y[:, tokens] = self.attention(self.norm1(x)[:, tokens], mask)
        x = x + y
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class AuthorsSwinIR(nn.Module):
    """Classical, or lightweight with head "pixelshuffledirect"; the input's mirrored border as in the authors' code."""

    def __init__(self, scale, c=12, stages=2, layers=2, heads=3, win=8, ratio=2, head="pixelshuffle", size=48,
                 mean=MEAN, img_range=1.0):
        super().__init__()
        self.scale, self.win, self.img_range, self.classical = scale, win, img_range, head == "pixelshuffle"
        self.mean = torch.tensor(mean).view(1, 3, 1, 1)
        self.conv_first = conv(3, c)
        self.patch_embed = holder(norm=nn.LayerNorm(c))
        block = lambda j: SwinBlock(c, heads, win, win // 2 if j % 2 else 0, ratio, size)
        stage = lambda: holder(residual_group=holder(blocks=nn.ModuleList(block(j) for j in range(layers))), conv=conv(c, c))
        self.layers = nn.ModuleList(stage() for _ in range(stages))
        self.norm, self.conv_after_body = nn.LayerNorm(c), conv(c, c)
        if self.classical:
            self.conv_before_upsample = nn.Sequential(conv(c, 64), nn.LeakyReLU())
            self.upsample, self.conv_last = enlarge(64, scale), conv(64, 3)
        else:
            self.upsample = nn.Sequential(conv(c, 3 * scale ** 2), nn.PixelShuffle(scale))

    def deep(self, x):
        """(B,C,H,W) → the same, through all stages as tokens."""
        h, w = x.shape[-2:]
        picture = lambda t: t.transpose(1, 2).unflatten(2, (h, w))
        t = self.patch_embed.norm(x.flatten(2).transpose(1, 2))
        for stage in self.layers:
            y = t
            for block in stage.residual_group.blocks:
                y = block(y, h, w)
            t = t + stage.conv(picture(y)).flatten(2).transpose(1, 2)
        return picture(self.norm(t))

    def forward(self, x):
        h, w = x.shape[-2:]
        x = F.pad(x, (0, (self.win - w % self.win) % self.win, 0, (self.win - h % self.win) % self.win), "reflect")
        x = self.conv_first((x - self.mean) * self.img_range)
        x = self.conv_after_body(self.deep(x)) + x
        x = self.conv_last(self.upsample(self.conv_before_upsample(x))) if self.classical else self.upsample(x)
        return (x / self.img_range + self.mean)[:, :, :h * self.scale, :w * self.scale]
