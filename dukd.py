"""Data Upcycling Knowledge Distillation (DUKD, arXiv 2309.14162), and the losses it is compared with.

A student f_S learns from a frozen teacher f_T. Beside the training pairs (I_LR, I_HR), it sees new inputs z
that are made out of these pairs. The teacher labels them:

    zoom in    z = a random crop of I_HR, of the LR patch's size
    zoom out   z = I_LR bicubically reduced by s again

An invertible augmentation F goes into the student only, and F⁻¹ onto its output (label consistency):

    L = λ_rec·|f_S(I_LR) − I_HR| + λ_kd·|f_S(I_LR) − f_T(I_LR)|
      + λ_dukd·|F⁻¹(f_S(F(z))) − f_T(z)|     for each z
      + λ_rec·|f_S(z) − I_LR|                for z of zoom-out; in the released code, not in the paper

Shapes: N samples, C = 3 colours, h×w the LR patch, s the scale. Pictures are floats in [0,1]. |·| is the mean
absolute error. The file needs torch only. Copy it, or one function of it.
"""
import contextlib
import math

import torch
import torch.nn.functional as nnf


def zoom_in(hr, size, generator=None):
    """New LR inputs: one crop of the LR patch's size at a random place of each HR patch (paper, zoom-in).
    hr: I_HR (N,C,H,W). size: h, or (h, w). generator: on hr's device. Returns z (N,C,h,w), a copy.
    Every position is equally likely. ValueError where the crop is larger than the patch."""
    n, _, H, W = hr.shape
    h, w = (size, size) if isinstance(size, int) else size
    if h > H or w > W:
        raise ValueError(f"zoom_in: a crop of {h}x{w} does not fit into patches of {H}x{W}")
    top = torch.randint(H - h + 1, (n, 1), generator=generator, device=hr.device)
    left = torch.randint(W - w + 1, (n, 1), generator=generator, device=hr.device)
    rows = top + torch.arange(h, device=hr.device)  # (N,h)
    cols = left + torch.arange(w, device=hr.device)  # (N,w)
    sample = torch.arange(n, device=hr.device)[:, None, None]
    return hr[sample, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2).contiguous()


def zoom_out(lr, scale):
    """New LR inputs: the LR patches reduced by s once more, with MATLAB's bicubic (paper, zoom-out).
    lr: I_LR (N,C,h,w). Returns z (N,C,h/s,w/s), whose ground truth is I_LR.
    ValueError where h or w is no multiple of s, since f_S(z) would not cover I_LR then."""
    h, w = lr.shape[-2:]
    if h % scale or w % scale:
        raise ValueError(f"zoom_out: patches of {h}x{w} are not a multiple of the scale {scale}")
    return bicubic_resize(lr, 1 / scale)


def bicubic_resize(x, factor, dims=(-2, -1)):
    """MATLAB's `imresize(x, factor, 'bicubic')` of float pictures along `dims`, one after the other.
    When reducing, the cubic kernel (a = −1/2) is stretched by 1/factor, against aliasing. Output sample
    k = 1, 2, … lies at u = k/factor + ½(1 − 1/factor). Edges repeat symmetrically. Size n becomes ⌈n·factor⌉.
    Taps are added in MATLAB's order, so float64 rounds alike. Differentiable; no rounding, no clipping."""
    stretch = min(factor, 1.0)
    width = 4 / stretch
    for dim in dims:
        n = x.shape[dim]
        m = math.ceil(n * factor - 1e-9)  # 50·1.1 must not round up
        u = torch.arange(1, m + 1, dtype=torch.float64, device=x.device) / factor + 0.5 * (1 - 1 / factor)
        taps = torch.arange(math.ceil(width) + 2, device=x.device)
        tap = torch.floor(u - width / 2)[:, None] + taps  # (m,taps)
        d = ((u[:, None] - tap) * stretch).abs()
        near, far = 1.5 * d ** 3 - 2.5 * d ** 2 + 1, -0.5 * d ** 3 + 2.5 * d ** 2 - 4 * d + 2
        weights = torch.where(d <= 1, near, torch.where(d <= 2, far, 0.0))
        weights = (weights / weights.sum(1, keepdim=True)).to(x.dtype)
        index = (tap.long() - 1) % (2 * n)
        index = torch.where(index < n, index, 2 * n - 1 - index)
        column = [m if axis == dim % x.dim() else 1 for axis in range(x.dim())]  # broadcasts along dim
        x = sum(w.view(column) * x.index_select(dim, i) for w, i in zip(weights.T, index.T))
    return x


class InvertibleAugmentation:
    """F and F⁻¹: for each sample a subset of horizontal flip, vertical flip, transpose, colour inversion.
    With the flips, transposing reaches all rotations by 90°. F applies its operations in the order of `ops`,
    F⁻¹ in the reverse order. The order matters: a flip and a transposition do not commute."""

    OPERATIONS = ("hflip", "vflip", "transpose", "invert")

    def __init__(self, ops, masks):
        """ops: names of operations. masks (len(ops), n) bool: True where a sample gets the operation."""
        self.ops, self.masks = tuple(ops), masks

    @classmethod
    def sample(cls, n, ops=OPERATIONS, p=0.3, generator=None, device=None):
        """Draws, for each of n samples, each operation independently with probability p.
        ValueError for an unknown operation, for one that is named twice, and for p outside [0,1]."""
        if unknown := [op for op in ops if op not in cls.OPERATIONS]:
            raise ValueError(f"unknown operation '{unknown[0]}'; known: {', '.join(cls.OPERATIONS)}")
        if len(set(ops)) < len(ops):
            raise ValueError(f"an operation is named twice: {', '.join(ops)}")
        if not 0 <= p <= 1:
            raise ValueError(f"p = {p} is not a probability")
        return cls(ops, torch.rand(len(ops), n, generator=generator, device=device) < p)

    def __len__(self):
        return self.masks.shape[1]

    def __getitem__(self, samples):
        """F of a slice of the samples."""
        return InvertibleAugmentation(self.ops, self.masks[:, samples])

    def apply(self, x):
        """F(x): x (n,C,h,w) in [0,1] to the same shape and range."""
        for op, mask in zip(self.ops, self.masks):
            x = self._where(mask, op, x)
        return x

    def invert(self, y):
        """F⁻¹(y), y (n,C,·,·) of any size: undoes F exactly, but for the rounding of colours."""
        for op, mask in reversed([*zip(self.ops, self.masks)]):
            y = self._where(mask, op, y)  # each operation is its own inverse
        return y

    @staticmethod
    def _where(mask, op, x):
        if op == "transpose" and x.shape[-1] != x.shape[-2]:
            raise ValueError(f"transpose needs square patches, not {x.shape[-2]}x{x.shape[-1]}")
        operate = dict(hflip=lambda x: x.flip(-1), vflip=lambda x: x.flip(-2),
                       transpose=lambda x: x.transpose(-1, -2), invert=lambda x: 1 - x)[op]
        return torch.where(mask.view(-1, 1, 1, 1).to(x.device), operate(x), x)


def dukd_loss(student_z, teacher_z, augmentation=None):
    """One upcycled input's part of L_dukd: |F⁻¹(f_S(F(z))) − f_T(z)|, a scalar.
    student_z: f_S(F(z)) (N,C,s·h,s·w), carries the gradient. teacher_z: f_T(z), of z before F, carries none.
    augmentation: the F that z passed through, or None."""
    label = student_z if augmentation is None else augmentation.invert(student_z)
    return nnf.l1_loss(label, teacher_z.detach())


# The feature losses take the student's feature map (N,c_S,h,w) and the teacher's (N,c_T,h,w). The widths may
# differ. The student's map carries the gradient, the teacher's carries none.
def fitnet_loss(student, teacher):
    """FitNet (Romero et al., ICLR 2015): |g_S − g_T| of the channel means g (N,h,w)."""
    return nnf.l1_loss(student.float().mean(1), teacher.detach().float().mean(1))


def at_loss(student, teacher):
    """Attention transfer (Zagoruyko & Komodakis, ICLR 2017): ‖q_S − q_T‖², averaged over the samples.
    q (N,h·w) is the attention map Σ_c f_c², L2-normalised. The square is summed over positions."""
    def attention(f):
        return nnf.normalize(f.float().square().sum(1).flatten(1), dim=1)
    return (attention(student) - attention(teacher.detach())).square().sum(1).mean()


def fakd_loss(student, teacher):
    """FAKD (He et al., ICIP 2020): |A_S − A_T| of the spatial affinities A (N,h·w,h·w).
    A holds the cosine similarity of the feature vectors at two positions: 340 MB for 16 maps of 48×48."""
    def affinity(f):
        f = nnf.normalize(f.float().flatten(2), dim=1)
        return f.transpose(1, 2) @ f
    return nnf.l1_loss(affinity(student), affinity(teacher.detach()))


def together(net, *inputs):
    """[net(x) for each of the inputs] in float32, None for None. Inputs of one size share a forward."""
    outputs = [None] * len(inputs)
    for shape in dict.fromkeys(x.shape[1:] for x in inputs if x is not None):
        group = [i for i, x in enumerate(inputs) if x is not None and x.shape[1:] == shape]
        answer = net(torch.cat([inputs[i] for i in group])).float()
        for i, part in zip(group, answer.split([len(inputs[i]) for i in group])):
            outputs[i] = part
    return outputs


@contextlib.contextmanager
def tapped(model, names):
    """Catches what named submodules return when first called: `with tapped(model, names) as f: model(x)`.
    Yields {name: feature map}, which the forward fills. AttributeError for a name that the model lacks."""
    features = {}

    def catch(name):
        def hook(module, inputs, output):
            features.setdefault(name, output)
        return hook
    modules = [model.get_submodule(name) for name in names]
    handles = [module.register_forward_hook(catch(name)) for module, name in zip(modules, names)]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
