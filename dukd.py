"""Data Upcycling Knowledge Distillation (DUKD, arXiv 2309.14162), and the losses it is compared with.

A student f_S learns from a frozen teacher f_T: on the training pairs (I_LR, I_HR), and on new inputs z that
are made out of them. No ground truth is needed for a new input, since the teacher labels it.

    (1)  L      = L_rec + λ_kd·L_kd + λ_dukd·L_dukd
    (2)  L_rec  = |f_S(I_LR) − I_HR|                    learn the ground truth
    (3)  L_kd   = |f_S(I_LR) − f_T(I_LR)|               learn the teacher's answer
    (4)  L_dukd = Σ |F⁻¹(f_S(F(z))) − f_T(z)|           learn the teacher's label of each new input z:
             zoom in    z = a random crop of I_HR, of the LR patch's size
             zoom out   z = I_LR, bicubically reduced by s again
    (5)         + |f_S(z) − I_LR|                       for z of zoom-out: its ground truth is I_LR

F is an invertible augmentation: it flips, transposes, inverts colours. The student sees F(z), the teacher z.
F⁻¹ undoes F on the student's output. So the student must give the same answer whatever F does to z.
(5) is in the paper's text, not in its equation. The released code weighs (2) and (5) with a λ_rec, 5 for
EDSR, and counts (2) and (3) twice. It applies F to zoom-in only, as train.py does by default.

Shapes: N samples, C = 3 colours, h×w the LR patch, s the scale. Pictures are floats in [0,1]. |·| is the mean
absolute error. The numbers are this file's. The file needs torch only: copy it, or one function of it.
"""
import contextlib
import math

import torch
import torch.nn.functional as nnf


def zoom_in(hr, size, generator=None):
    """z of zoom-in (4): one crop of the LR patch's size at a random place of each HR patch.
    It is a piece of a photograph of h×w pixels, as every LR patch is. Its ground truth would be s times as
    fine, and does not exist: the teacher's label stands in for it.
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
    """z of zoom-out (4): the LR patches reduced by s once more, with MATLAB's bicubic.
    lr: I_LR (N,C,h,w). Returns z (N,C,h/s,w/s), neither rounded nor clipped. Its ground truth is I_LR (5).
    ValueError where h or w is no multiple of s, since f_S(z) would not cover I_LR then."""
    h, w = lr.shape[-2:]
    if h % scale or w % scale:
        raise ValueError(f"zoom_out: patches of {h}x{w} are not a multiple of the scale {scale}")
    reduce_rows = bicubic_matrix(h, 1 / scale, lr)  # (h/s,h)
    reduce_columns = bicubic_matrix(w, 1 / scale, lr)  # (w/s,w)
    return reduce_rows @ lr @ reduce_columns.T


def bicubic_taps(n, factor, device=None):
    """MATLAB's bicubic of n samples in a row: sample k of the result is Σ_t weights[k,t]·x[index[k,t]].
    When reducing, the cubic kernel (a = −1/2) is stretched by 1/factor, against aliasing. Result k = 1, 2, …
    lies at u = k/factor + ½(1 − 1/factor) of x_1, x_2, …. Edges repeat symmetrically.
    Returns index (m,taps) int64, counted from 0, and weights (m,taps) float64, with m = ⌈n·factor⌉."""
    stretch = min(factor, 1.0)
    width = 4 / stretch  # of the kernel
    m = math.ceil(n * factor - 1e-9)  # 50·1.1 must not round up
    u = torch.arange(1, m + 1, dtype=torch.float64, device=device) / factor + 0.5 * (1 - 1 / factor)
    first = torch.floor(u - width / 2)[:, None]
    place = first + torch.arange(math.ceil(width) + 2, device=device)  # (m,taps)
    d = ((u[:, None] - place) * stretch).abs()
    near = 1.5 * d ** 3 - 2.5 * d ** 2 + 1
    far = -0.5 * d ** 3 + 2.5 * d ** 2 - 4 * d + 2
    weights = torch.where(d <= 1, near, torch.where(d <= 2, far, 0.0))
    weights = weights / weights.sum(1, keepdim=True)
    index = (place.long() - 1) % (2 * n)  # x and its mirror image take turns
    return torch.where(index < n, index, 2 * n - 1 - index), weights


def bicubic_matrix(n, factor, like):
    """`bicubic_taps` as a matrix (m,n), of the dtype and on the device of `like`: resized = matrix @ x."""
    index, weights = bicubic_taps(n, factor, like.device)
    here = index[:, :, None] == torch.arange(n, device=like.device)  # (m,taps,n)
    return (weights[:, :, None] * here).sum(1).to(like.dtype)


def bicubic_resize(x, factor, dims=(-2, -1)):
    """MATLAB's `imresize(x, factor, 'bicubic')` of float pictures along `dims`, one after the other.
    Size n becomes ⌈n·factor⌉. Differentiable; no rounding, no clipping. Taps are added one by one in MATLAB's
    order, so that float64 rounds as MATLAB does. (Small patches: `zoom_out` is faster.)"""
    for dim in dims:
        index, weights = bicubic_taps(x.shape[dim], factor, x.device)
        column = [1] * x.dim()  # a tap's weights as a column along dim
        column[dim] = len(weights)
        taps = zip(index.T, weights.to(x.dtype).T)
        x = sum(weight.view(column) * x.index_select(dim, i) for i, weight in taps)
    return x


class InvertibleAugmentation:
    """F and F⁻¹: for each sample a subset of horizontal flip, vertical flip, transpose, colour inversion.
    Transposing and the flips together make all rotations by 90°. F applies its operations in the order of
    `ops`, F⁻¹ in the reverse order. The order matters: a flip and a transposition do not commute."""

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

    def apply(self, x):
        """F(x): x (n,C,h,w) in [0,1] to the same shape and range. ValueError for a transposition of h ≠ w."""
        for op, mask in zip(self.ops, self.masks):
            x = self._where(mask, op, x)
        return x

    def invert(self, y):
        """F⁻¹(y), y (n,C,·,·) in [0,1], of any size: undoes F exactly, but for the rounding of colours."""
        for op, mask in reversed([*zip(self.ops, self.masks)]):
            y = self._where(mask, op, y)  # each operation is its own inverse
        return y

    def _where(self, mask, op, x):
        """x with the operation done to the samples of the mask."""
        if op == "hflip":
            changed = x.flip(-1)
        elif op == "vflip":
            changed = x.flip(-2)
        elif op == "invert":
            changed = 1 - x
        else:  # transpose
            if x.shape[-1] != x.shape[-2]:
                raise ValueError(f"transpose needs square patches, not {x.shape[-2]}x{x.shape[-1]}")
            changed = x.transpose(-1, -2)
        return torch.where(mask.view(-1, 1, 1, 1).to(x.device), changed, x)


def dukd_loss(student_z, teacher_z, augmentation=None):
    """A new input's part of L_dukd (4): |F⁻¹(f_S(F(z))) − f_T(z)|, a scalar.
    student_z: f_S(F(z)) (N,C,s·h,s·w), carries the gradient. teacher_z: f_T(z), of z before F, carries none.
    augmentation: the F that z passed through, or None."""
    answer = student_z if augmentation is None else augmentation.invert(student_z)
    return nnf.l1_loss(answer, teacher_z.detach())


def upcycling_loss(student, teacher, lr, hr, p=0.3, generator=None):
    """All of L_dukd, (4) with (5), of a batch of training pairs: a scalar to add to a loss of your own.
    student, teacher: f_S and f_T, (N,3,h,w) → (N,3,s·h,s·w), both for [0,1]. Only f_S gets gradients. Put f_T
    into eval mode. train.py's `losses` has the same terms, and shares forwards between them.
    lr: I_LR (N,3,h,w), h and w multiples of s. hr: I_HR (N,3,s·h,s·w). F is drawn with probability p, for
    zoom-in; patches that are not square are not transposed. generator: on lr's device."""
    z_in = zoom_in(hr, lr.shape[-2:], generator)
    z_out = zoom_out(lr, hr.shape[-1] // lr.shape[-1])
    square = lr.shape[-1] == lr.shape[-2]
    ops = [op for op in InvertibleAugmentation.OPERATIONS if square or op != "transpose"]
    F = InvertibleAugmentation.sample(len(lr), ops, p, generator, lr.device)
    with torch.no_grad():
        t_in, t_out = teacher(z_in), teacher(z_out)
    s_in, s_out = student(F.apply(z_in)), student(z_out)
    return dukd_loss(s_in, t_in, F) + dukd_loss(s_out, t_out) + nnf.l1_loss(s_out, lr)


# The feature losses take the student's feature map (N,c_S,h,w) and the teacher's (N,c_T,h,w). The widths may
# differ. The student's map carries the gradient, the teacher's carries none.
def fitnet_loss(student, teacher):
    """After FitNet (Romero et al., ICLR 2015): |g_S − g_T| of the channel means g (N,h,w). The original
    compares through a learned layer; means need none, of whatever widths."""
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


def together(net, inputs):
    """{name: net(x), float32} of inputs {name: x}. Those of one size share a forward, in their order."""
    outputs = {}
    for shape in dict.fromkeys(x.shape[1:] for x in inputs.values()):
        names = [name for name, x in inputs.items() if x.shape[1:] == shape]
        batch = torch.cat([inputs[name] for name in names])
        parts = net(batch).float().split([len(inputs[name]) for name in names])
        outputs |= zip(names, parts)
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
