"""Data Upcycling Knowledge Distillation (DUKD, arXiv 2309.14162), and the losses that it is compared with.

A student f_S learns from a frozen teacher f_T: on the training pairs (I_LR, I_HR), and on new inputs z that
are made out of them. Only the teacher can label a new input. The paper's loss, with weights λ:

    L = L_rec + λ_kd·L_kd + λ_dukd·L_dukd

`losses` computes its terms, and train.py trains with it. L_rec is the term rec, L_kd is kd, L_dukd is
zoom_in + zoom_out + zoom_out_rec: see TERMS.

F is an invertible augmentation: it flips, transposes, inverts colours. In zoom-in, the student sees F(z)
and the teacher z. F⁻¹ undoes F on the student's output. So the student must answer alike for every F.
zoom_out_rec is in the paper's text, not in its equation.

Shapes: N samples, C colours, h×w the LR patch, s the scale. Pictures are floats in [0,1]. |·| is the mean
absolute error. To copy: the whole file, which needs torch alone. Or parts of it: `zoom_in`, each feature loss
and `InvertibleAugmentation` need nothing else of it; `zoom_out` needs the two bicubic functions.
"""
import contextlib
import functools
import math

import torch
import torch.nn.functional as nnf

TERMS = dict(
    rec="|f_S(I_LR) - I_HR|: learn the ground truth",
    kd="|f_S(I_LR) - f_T(I_LR)|: learn the teacher's answer",
    zoom_in="|F^-1(f_S(F(z))) - f_T(z)|: z is a crop of I_HR, as large as I_LR",
    zoom_out="|f_S(z) - f_T(z)|: z is I_LR, bicubically reduced by s again",
    zoom_out_rec="|f_S(z) - I_LR|: the ground truth of that z is I_LR",
    fitnet="FitNet: channel means of feature maps",
    at="AT: attention maps of feature maps",
    fakd="FAKD: spatial affinities of feature maps")

# A method is the weight of each term. λ_dukd is the weight of zoom_in, zoom_out and zoom_out_rec alike.
METHODS = {
    "dukd": dict(rec=1, kd=1, zoom_in=1, zoom_out=1, zoom_out_rec=1),
    "zoom_in": dict(rec=1, kd=1, zoom_in=1),
    "kd": dict(rec=1, kd=1),
    "scratch": dict(rec=1),
    "fitnet": dict(rec=1, fitnet=1),
    "at": dict(rec=1, at=1),
    "fakd": dict(rec=1, kd=1, fakd=10),
}


def zoom_in(hr, size, generator=None):
    """z of zoom-in: one crop of the LR patch's size at a random position of each HR patch.
    It is h×w pixels of a photograph, as every LR patch is. Its ground truth, s times as fine, does not exist:
    the teacher's output is the label.
    hr: I_HR (N,C,H,W). size: h, or (h, w). generator: on hr's device. Returns z (N,C,h,w), a copy.
    Every position is equally likely. ValueError where the crop is larger than the patch."""
    n, _, H, W = hr.shape
    h, w = (size, size) if isinstance(size, int) else size
    if h > H or w > W:
        raise ValueError(f"zoom_in: a crop of {h}x{w} does not fit into patches of {H}x{W}")
    top = torch.randint(H - h + 1, (n, 1), generator=generator, device=hr.device)
    left = torch.randint(W - w + 1, (n, 1), generator=generator, device=hr.device)
    rows = top + torch.arange(h, device=hr.device)  # (N,h)
    columns = left + torch.arange(w, device=hr.device)  # (N,w)
    sample = torch.arange(n, device=hr.device)[:, None, None]
    z = hr[sample, :, rows[:, :, None], columns[:, None, :]]  # (N,h,w,C): this indexing puts C last
    return z.permute(0, 3, 1, 2).contiguous()


def zoom_out(lr, scale):
    """z of zoom-out: the LR patches reduced by s once more, with MATLAB's bicubic.
    lr: I_LR (N,C,h,w). Returns z (N,C,h/s,w/s), neither rounded nor clipped. Its ground truth is I_LR.
    ValueError where h or w is no multiple of s, since f_S(z) would not cover I_LR then."""
    h, w = lr.shape[-2:]
    if h % scale or w % scale:
        raise ValueError(f"zoom-out needs patches of a multiple of the scale {scale}, not {h}x{w}")
    return bicubic_resize(lr, 1 / scale)


def bicubic_resize(x, factor, dims=(-2, -1)):
    """MATLAB's `imresize(x, factor, 'bicubic')` of float pictures along `dims`, one after the other.
    Size n becomes ⌈n·factor⌉. Differentiable; no rounding, no clipping. Neighbours are added one by one, in
    MATLAB's order, so that float64 rounds as MATLAB does."""
    for dim in dims:
        index, weights = bicubic_neighbours(x.shape[dim], factor, x.dtype, x.device)
        column = [1] * x.dim()  # the weights of a neighbour as a column along dim
        column[dim] = -1
        x = sum(weight.view(column) * x.index_select(dim, i) for i, weight in zip(index, weights))
    return x


@functools.cache  # a training step computes no weights, and copies none to a GPU
@torch.inference_mode(False)  # tensors of inference mode could not be used in training
def bicubic_neighbours(n, factor, dtype, device):
    """MATLAB's bicubic of n samples in a row: sample j of the result is Σ_i weights[i,j]·x[index[i,j]].
    When reducing, the cubic kernel (a = −1/2) is stretched by 1/factor, against aliasing. With x and the
    result counted from 1, sample j is centred at u = j/factor + ½(1 − 1/factor). x is mirrored at its edges.
    At factor ½, amid a long row, the weights are (−3, −9, 29, 111, 111, 29, −9, −3)/256, and zeros.
    Returns index (k,m) int64, counted from 0, and weights (k,m): k neighbours of each of m = ⌈n·factor⌉
    samples. They are computed in float64, on the CPU."""
    stretch = min(factor, 1.0)
    width = 4 / stretch  # of the kernel
    m = math.ceil(n * factor - 1e-9)  # 50·1.1 must not round up
    u = torch.arange(1, m + 1, dtype=torch.float64) / factor + 0.5 * (1 - 1 / factor)  # (m,)
    first = torch.floor(u - width / 2)
    position = first + torch.arange(math.ceil(width) + 2)[:, None]  # (k,m)
    d = ((u - position) * stretch).abs()
    near = 1.5 * d ** 3 - 2.5 * d ** 2 + 1
    far = -0.5 * d ** 3 + 2.5 * d ** 2 - 4 * d + 2
    weights = torch.where(d <= 1, near, torch.where(d <= 2, far, 0.0))
    weights = weights / weights.sum(0)
    index = (position.long() - 1) % (2 * n)  # x, then x mirrored, then x again, …
    index = torch.where(index < n, index, 2 * n - 1 - index)
    return index.to(device), weights.to(dtype).to(device)


class InvertibleAugmentation:
    """F and F⁻¹: for each sample a subset of horizontal flip, vertical flip, transpose, colour inversion.
    Transposing and the flips together make all rotations by 90°. F applies its operations in the order of
    `ops`. The order matters: a flip and a transposition do not commute."""

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
            x = torch.where(mask.view(-1, 1, 1, 1).to(x.device), changed, x)
        return x

    def invert(self, y):
        """F⁻¹(y): y (n,C,·,·), of any size. It undoes F exactly, up to the rounding of 1 − x. ValueError as
        in `apply`. Each operation is its own inverse, so F⁻¹ is F with the operations in reverse order."""
        return InvertibleAugmentation(self.ops[::-1], reversed(self.masks)).apply(y)


# The feature losses compare a feature map of the student, m_S (N,c_S,h,w), with one of the teacher's, m_T
# (N,c_T,h,w). The widths c may differ. m_S gets the gradient, m_T gets none. They compute in float32.
def fitnet_loss(m_s, m_t):
    """After FitNet (Romero et al., ICLR 2015): |g_S − g_T| of the channel means g (N,h,w). The original
    compares through a learned layer. Means need none, whatever the widths."""
    return nnf.l1_loss(m_s.float().mean(1), m_t.detach().float().mean(1))


def at_loss(m_s, m_t):
    """Attention transfer (Zagoruyko & Komodakis, ICLR 2017): ‖q_S − q_T‖², averaged over the samples.
    q (N,h·w) is the attention map Σ_c m_c², L2-normalised. The square is summed over positions."""
    def attention(m):
        return nnf.normalize(m.float().square().sum(1).flatten(1), dim=1)
    return (attention(m_s) - attention(m_t.detach())).square().sum(1).mean()


def fakd_loss(m_s, m_t):
    """FAKD (He et al., ICIP 2020): |A_S − A_T| of the spatial affinities A (N,h·w,h·w).
    A holds the cosine similarity of the feature vectors at two positions: 340 MB for 16 maps of 48×48."""
    def affinity(m):
        m = nnf.normalize(m.float().flatten(2), dim=1)
        return m.transpose(1, 2) @ m
    with torch.autocast(m_s.device.type, enabled=False):
        return nnf.l1_loss(affinity(m_s), affinity(m_t.detach()))


def losses(student, teacher, lr, hr, weights, crops=1, ops=InvertibleAugmentation.OPERATIONS, p=0.3,
           augment_zoom_out=False, taps=(), generator=None):
    """The terms of L for a batch of training pairs: {term: scalar}, not yet weighted.
        weights = METHODS["dukd"]
        terms = losses(student, teacher, lr, hr, weights)
        sum(weights[name] * term for name, term in terms.items()).backward()
    student, teacher: f_S and f_T, (N,C,h,w) → (N,C,s·h,s·w). Only f_S gets gradients. Call teacher.eval()
      before: in training mode its BatchNorm would change. Without a term that needs it, f_T may be None.
    lr: I_LR (N,C,h,w). hr: I_HR (N,C,s·h,s·w). For zoom-out, h and w are multiples of s.
      All pictures are in [0,1]. Wrap a network of another range: lambda x: net(255 * x) / 255 for [0,255],
      lambda x: net(2 * x - 1) / 2 + 0.5 for [−1,1].
    weights: {term: λ}, as in METHODS. A term without a weight, or of weight 0, is not computed.
    crops: zoom-in crops of each HR patch. ops, p: F, see `InvertibleAugmentation`. p = 0.3 is the released
      code's, 0 leaves F out. Only square patches are transposed. augment_zoom_out: F acts on zoom-out, too.
    taps: for fitnet, at and fakd, pairs of modules whose outputs for I_LR are compared, as in
      taps=[(student.body[1], teacher.body[3])]. If the next module overwrites an output, as
      ReLU(inplace=True) does, the overwritten one is compared.
    generator: for z and F; on lr's device. Autocast is the caller's. ValueError for what does not fit.
    I_LR and a crop have one size, so they share a forward: it takes twice the memory, and a BatchNorm of the
    student sees both in one batch."""
    on = {term for term, weight in weights.items() if weight}
    feature_terms = on & {"fitnet", "at", "fakd"}
    taps = list(taps) if feature_terms else []
    if unknown := weights.keys() - {*TERMS}:
        raise ValueError(f"unknown term '{min(unknown)}'; known: {', '.join(TERMS)}")
    if teacher is None and on - {"rec", "zoom_out_rec"}:
        raise ValueError(f"{min(on - {'rec', 'zoom_out_rec'})} needs a teacher")
    if getattr(teacher, "training", False):
        raise ValueError("the teacher is in training mode: call teacher.eval() first")
    if feature_terms and not taps:
        raise ValueError(f"{min(feature_terms)} needs taps, pairs of modules whose outputs are compared")
    if crops < 1:
        raise ValueError(f"{crops} zoom-in crops of a patch: at least one is needed")
    n, c, h, w = lr.shape
    scale = hr.shape[-1] // w
    if hr.shape != (n, c, scale * h, scale * w):
        raise ValueError(f"lr {tuple(lr.shape)} and hr {tuple(hr.shape)} are no pairs of one scale")
    if h != w:
        ops = [op for op in ops if op != "transpose"]

    to_student, to_teacher = {}, {}  # {name: input}
    if "rec" in on or "kd" in on or feature_terms:
        to_student["lr"] = lr
    if "kd" in on or feature_terms:
        to_teacher["lr"] = lr
    if "zoom_in" in on:
        z_in = zoom_in(hr.repeat_interleave(crops, dim=0), (h, w), generator)  # (N·crops,C,h,w)
        F_in = InvertibleAugmentation.sample(n * crops, ops, p, generator, lr.device)
        to_student["z_in"] = F_in.apply(z_in)
        to_teacher["z_in"] = z_in
    if "zoom_out" in on or "zoom_out_rec" in on:
        z_out = zoom_out(lr, scale)  # (N,C,h/s,w/s)
        F_out = InvertibleAugmentation.sample(n, ops if augment_zoom_out else (), p, generator, lr.device)
        to_student["z_out"] = F_out.apply(z_out)
    if "zoom_out" in on:
        to_teacher["z_out"] = z_out

    with torch.no_grad():
        f_t, maps_t = forward(teacher, scale, to_teacher, [module for _, module in taps])
    f_s, maps_s = forward(student, scale, to_student, [module for module, _ in taps])

    terms = {}
    if "rec" in on:
        terms["rec"] = nnf.l1_loss(f_s["lr"], hr)
    if "kd" in on:
        terms["kd"] = nnf.l1_loss(f_s["lr"], f_t["lr"])
    if "zoom_in" in on:
        terms["zoom_in"] = nnf.l1_loss(F_in.invert(f_s["z_in"]), f_t["z_in"])
    if "zoom_out" in on:
        terms["zoom_out"] = nnf.l1_loss(F_out.invert(f_s["z_out"]), f_t["z_out"])
    if "zoom_out_rec" in on:
        terms["zoom_out_rec"] = nnf.l1_loss(F_out.invert(f_s["z_out"]), lr)
    if "fitnet" in on:
        terms["fitnet"] = sum_over_taps(fitnet_loss, maps_s["lr"], maps_t["lr"])
    if "at" in on:
        terms["at"] = sum_over_taps(at_loss, maps_s["lr"], maps_t["lr"])
    if "fakd" in on:
        terms["fakd"] = sum_over_taps(fakd_loss, maps_s["lr"], maps_t["lr"])
    return terms


def sum_over_taps(distance, maps_s, maps_t):
    """The sum of a feature loss over pairs of feature maps. ValueError where their sizes differ."""
    for m_s, m_t in zip(maps_s, maps_t):
        if m_s.shape[-2:] != m_t.shape[-2:]:
            sizes = [f"{m.shape[-2]}x{m.shape[-1]}" for m in (m_s, m_t)]
            raise ValueError(f"feature maps of {sizes[0]} (student) and {sizes[1]} (teacher) cannot be "
                             "compared. SwinIR pads to a multiple of its window (8): take such patches")
    return sum(map(distance, maps_s, maps_t))


def forward(net, scale, inputs, taps=()):
    """What a network makes of inputs {name: x (N,C,h,w)}: its outputs {name: y (N,C,s·h,s·w)}, float32, and
    what its modules `taps` return, {name: [map of each tap]}. Inputs of one size share a forward.
    ValueError for an output of another shape, which the losses might broadcast."""
    outputs, maps, caught = {}, {}, {}

    def catch(module, args, output):
        caught[module] = output
    with contextlib.ExitStack() as hooks:  # which takes them away again
        for module in taps:
            hooks.enter_context(module.register_forward_hook(catch))
        for c, h, w in dict.fromkeys(x.shape[1:] for x in inputs.values()):
            names = [name for name, x in inputs.items() if x.shape[1:] == (c, h, w)]
            sizes = [len(inputs[name]) for name in names]
            x = torch.cat([inputs[name] for name in names])
            y = net(x)
            if getattr(y, "shape", None) != (len(x), c, scale * h, scale * w):
                found = tuple(y.shape) if torch.is_tensor(y) else f"a {type(y).__name__}"
                raise ValueError(f"a network makes {found} of {tuple(x.shape)}, and x{scale} is needed")
            if caught.keys() != {*taps}:
                raise ValueError("a tap is no module of its network, or the network did not run it")
            outputs.update(zip(names, y.float().split(sizes)))
            for i, name in enumerate(names):
                maps[name] = [caught[module].split(sizes)[i] for module in taps]
    return outputs, maps
