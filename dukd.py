"""Data Upcycling Knowledge Distillation (DUKD, arXiv 2309.14162): the method and the baselines it is compared with.

A student f_S learns from a frozen teacher f_T not on the training pairs alone but on new inputs z made out of them:

    zoom in    z = a random crop of I_HR, of the LR patch's size      the teacher labels it
    zoom out   z = I_LR bicubically reduced by s again                the teacher labels it, and I_LR is its truth

and has to give the label of z also for F(z), F an invertible augmentation (label consistency):

    L = λ_rec·|f_S(I_LR) − I_HR| + λ_kd·|f_S(I_LR) − f_T(I_LR)| + λ_dukd·|F⁻¹(f_S(F(z))) − f_T(z)|

Shapes: N samples, C = 3 colours, h×w the LR patch, s the scale. Pictures are floats in [0,1]; |·| is the mean
absolute error. Everything here is a pure function of its arguments but for the two small classes, which hold what
was drawn (InvertibleAugmentation) or caught (Taps). Needs torch only: copy the file, or one function, as it is.
"""
import functools
import math

import torch
import torch.nn.functional as nnf

OPERATIONS = ("hflip", "vflip", "transpose", "invert")


# ------------------------------------------------------------------------------------------------ upcycling
def zoom_in(hr, size, generator=None):
    """New LR inputs: one crop of the LR patch's size at a random place of each HR patch (paper, zoom-in).

    hr: I_HR (N,C,H,W); size: h, or (h, w), at most H×W. Returns z (N,C,h,w), a copy.
    Every position is equally likely; positions are drawn on the generator's device (the default: the CPU's).
    ValueError where the crop is larger than the patch."""
    size = (size, size) if isinstance(size, int) else size
    return crop(hr, draw_corners(len(hr), hr.shape[-2:], size, generator).to(hr.device), size)


def draw_corners(n, room, size, generator=None):
    """The random part of `zoom_in`: (n,2) int64, top and left of n crops of size (h, w) inside room (H, W)."""
    (H, W), (h, w) = room, size
    if h > H or w > W:
        raise ValueError(f"zoom_in: a crop of {h}x{w} does not fit into patches of {H}x{W}")
    where = generator.device if generator is not None else "cpu"
    return torch.cat([torch.randint(m, (n, 1), generator=generator, device=where) for m in (H - h + 1, W - w + 1)], dim=1)


def crop(x, corners, size):
    """Cuts size (h, w) out of each of x (N,C,H,W) at its own corner (N,2) of top and left. A copy, (N,C,h,w)."""
    rows, cols = (corners[:, i, None] + torch.arange(n, device=x.device) for i, n in enumerate(size))  # (N,h), (N,w)
    sample = torch.arange(len(x), device=x.device)[:, None, None]
    return x[sample, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2).contiguous()


def zoom_out(lr, scale):
    """New LR inputs: the LR patches reduced by s once more, MATLAB's bicubic (paper, zoom-out).

    lr: I_LR (N,C,h,w) with h and w multiples of `scale`. Returns z (N,C,h/s,w/s), for which I_LR is ground truth.
    ValueError where h or w is no multiple of s, since f_S(z) would not cover I_LR then."""
    h, w = lr.shape[-2:]
    if h % scale or w % scale:
        raise ValueError(f"zoom_out: patches of {h}x{w} are not a multiple of the scale {scale}")
    return bicubic_resize(lr, 1 / scale)


def bicubic_taps(n, factor):
    """MATLAB's bicubic along one axis: out[i] = Σ_k weights[i,k]·x[index[i,k]].

    n: input length; factor: output/input. Returns weights (m,K) float64 with rows of sum 1 and index (m,K) int64,
    m = ⌈n·factor⌉. The cubic kernel (a = −1/2) is stretched by 1/factor when reducing (antialiasing); output
    sample x (counted from 1) is centred at u = x/factor + ½(1 − 1/factor); edges repeat symmetrically."""
    stretch = min(factor, 1.0)
    width = 4 / stretch
    m = math.ceil(n * factor - 1e-9)  # 3·(1/3) and its like must not round up
    x = torch.arange(1, m + 1, dtype=torch.float64)
    u = x / factor + 0.5 * (1 - 1 / factor)
    index = torch.floor(u - width / 2)[:, None] + torch.arange(math.ceil(width) + 2)
    d = ((u[:, None] - index) * stretch).abs()
    near, far = 1.5 * d ** 3 - 2.5 * d ** 2 + 1, -0.5 * d ** 3 + 2.5 * d ** 2 - 4 * d + 2
    weights = torch.where(d <= 1, near, torch.where(d <= 2, far, 0.0))
    weights = weights / weights.sum(1, keepdim=True)
    index = (index.long() - 1) % (2 * n)
    return weights, torch.where(index < n, index, 2 * n - 1 - index)


def bicubic_resize(x, factor):
    """MATLAB's `imresize(x, factor, 'bicubic')` of float pictures (…,H,W), without rounding or clipping.

    Differentiable in x; two small matrix products, in float32 (float64 for float64 input)."""
    kind = x.dtype if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        A, B = (_bicubic_matrix(n, factor, x.device, kind) for n in x.shape[-2:])
        return (A @ x.to(kind) @ B.T).to(x.dtype)


@functools.lru_cache(maxsize=64)
def _bicubic_matrix(n, factor, device, dtype):
    """(m,n): `bicubic_taps` as a dense matrix, taps that fall on one pixel after mirroring added up."""
    with torch.inference_mode(False):  # what is kept must serve under autograd too
        weights, index = bicubic_taps(n, factor)
        return torch.zeros(len(weights), n, dtype=torch.float64).scatter_add_(1, index, weights).to(device, dtype)


# ------------------------------------------------------------------------------------------------ augmentation
class InvertibleAugmentation:
    """F and F⁻¹: for each sample its own subset of horizontal flip, vertical flip, transpose, colour inversion.

    With the flips, transposing reaches all 90° rotations. F applies its operations in the order of `ops`;
    F⁻¹ undoes them in the reverse order, which matters: a flip and a transposition do not commute."""

    def __init__(self, masks):
        """masks: {operation: (n,1,1,1) bool}, in order of application; True where a sample gets the operation."""
        self.masks = masks

    @classmethod
    def sample(cls, n, ops=OPERATIONS, p=0.3, generator=None, device=None):
        """Draws, for each of n samples and each operation independently, whether it is applied (probability p).

        Drawn on the generator's device (the default: the CPU's), held on `device`. ValueError for an operation that
        is unknown or named twice, or p outside [0,1]."""
        if unknown := [op for op in ops if op not in OPERATIONS]:
            raise ValueError(f"unknown operation '{unknown[0]}'; known: {', '.join(OPERATIONS)}")
        if len(set(ops)) < len(ops):
            raise ValueError(f"an operation is named twice: {', '.join(ops)}")
        if not 0 <= p <= 1:
            raise ValueError(f"p = {p} is not a probability")
        where = generator.device if generator is not None else "cpu"
        drawn = (torch.rand(len(ops), n, 1, 1, 1, generator=generator, device=where) < p).to(device)
        return cls(dict(zip(ops, drawn)))

    def map(self, f):
        """The same F with f(mask) for each of its masks: on another device, say."""
        return InvertibleAugmentation({op: f(mask) for op, mask in self.masks.items()})

    def __len__(self):
        """The number of samples (0 with no operations)."""
        return len(next(iter(self.masks.values()), ()))

    def __getitem__(self, samples):
        """The F of some of the samples: samples is a slice or an index tensor."""
        return InvertibleAugmentation({op: mask[samples] for op, mask in self.masks.items()})

    def apply(self, x):
        """F(x): x (n,C,h,w) in [0,1] to the same shape and range, as a new tensor (x itself with no operations)."""
        for op, mask in self.masks.items():
            x = torch.where(mask, _operate(op, x), x)
        return x

    def invert(self, y):
        """F⁻¹(y): undoes `apply`, exactly for the geometry, to rounding for colours. y may have any square size."""
        for op, mask in reversed(self.masks.items()):
            y = torch.where(mask, _operate(op, y), y)  # each operation is its own inverse
        return y


def _operate(op, x):
    if op == "hflip":
        return x.flip(-1)
    if op == "vflip":
        return x.flip(-2)
    if op == "invert":
        return 1 - x
    if x.shape[-1] != x.shape[-2]:
        raise ValueError(f"transposing some samples of a batch needs square patches, not {x.shape[-2]}x{x.shape[-1]}")
    return x.transpose(-1, -2)


# ------------------------------------------------------------------------------------------------ losses
def l1(a, b):
    """|a − b|: mean absolute error, in float32 whatever the inputs' precision."""
    return (a.float() - b.float()).abs().mean()


def reconstruction_loss(sr, hr):
    """L_rec = |f_S(I_LR) − I_HR|. sr carries the gradient; (N,C,s·h,s·w) both."""
    return l1(sr, hr)


def response_kd_loss(sr, teacher_sr):
    """L_kd = |f_S(I_LR) − f_T(I_LR)|. sr carries the gradient, the teacher's label never does."""
    return l1(sr, teacher_sr.detach())


def dukd_loss(student_z, teacher_z, augmentation=None):
    """One upcycled input's part of L_dukd: |F⁻¹(f_S(F(z))) − f_T(z)|.

    student_z: f_S(F(z)) (N,C,s·h,s·w), carries the gradient; teacher_z: f_T(z), of the un-augmented z, never does;
    augmentation: the F that z went through, None for none."""
    return l1(student_z if augmentation is None else augmentation.invert(student_z), teacher_z.detach())


# ------------------------------------------------------------------------------------------------ feature baselines
# Each takes a student's and a teacher's feature map of one tap, (N,c_S,h,w) and (N,c_T,h,w), the teacher's without
# gradient. The widths may differ but for `fitnet_loss(…, full=True)`, which needs an adapter there (see `adapters`).
def fitnet_loss(student, teacher, full=False):
    """FitNet (Romero et al., ICLR 2015): |g_S − g_T| of the channel means; full: of the whole maps."""
    g = (lambda f: f) if full else (lambda f: f.float().mean(1))
    return l1(g(student), g(teacher.detach()))


def at_loss(student, teacher):
    """Attention transfer (Zagoruyko & Komodakis, ICLR 2017): ‖q_S − q_T‖² averaged over the samples, q the attention
    map Σ_c f_c² of a sample, flattened and L2-normalised. Summed over positions, so it does not fall with h·w."""
    q = lambda f: nnf.normalize(f.float().square().sum(1).flatten(1), dim=1)
    return (q(student) - q(teacher.detach())).square().sum(1).mean()


def fakd_loss(student, teacher):
    """FAKD (He et al., ICIP 2020): |A_S − A_T| of the spatial affinities, A (N,h·w,h·w) the cosine similarity of the
    feature vectors at each two positions. Memory grows with (h·w)²: 340 MB a map at 48×48, batch 16."""
    def affinity(f):
        f = nnf.normalize(f.float().flatten(2), dim=1)
        return f.transpose(1, 2) @ f
    return l1(affinity(student), affinity(teacher.detach()))


class Taps:
    """Catches the outputs of named submodules: `with Taps(model, names) as taps: model(x); taps.features`."""

    def __init__(self, model, names):
        known = dict(model.named_modules())
        if missing := [n for n in names if n not in known]:
            raise ValueError(f"{type(model).__name__} has no submodule '{missing[0]}' to tap")
        self.modules, self.features, self.handles = [known[n] for n in names], [], []

    def __enter__(self):
        self.features = [None] * len(self.modules)
        for i, module in enumerate(self.modules):
            self.handles.append(module.register_forward_hook(lambda m, inputs, out, i=i: self.features.__setitem__(i, out)))
        return self

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def adapters(student_widths, teacher_widths):
    """1×1 convolutions c_S → c_T for each pair of tapped widths that differ, identities for the others.

    Trained beside the student, and never a part of it."""
    return torch.nn.ModuleList([torch.nn.Identity() if s == t else torch.nn.Conv2d(s, t, 1)
                                for s, t in zip(student_widths, teacher_widths)])
