"""GaRA, gated-rank adaptation: low-rank adapters whose rank-1 components a gate switches on and off for each image.

An adapter adds B A to a frozen weight W, a sum of rank-1 components b_i a_i^T. LoRA always uses all of them. GaRA looks
at the image and decides in two steps which to use (equation numbers are the paper's): one gate picks the lower-rank or
the higher-rank set of components (eq. 2), another switches single components of that set on and off (eq. 4, 5). For an
attention layer with input tokens x:

    h = mean of x over the image's tokens
    g = gumbel_sigmoid(g_space(h))                                           0: lower-rank set, 1: higher-rank set
    m = [(1 - g) gumbel_sigmoid(g_L(h)), g gumbel_sigmoid(g_H(h))]           one 0 or 1 per component
    y = x (W + B diag(m) A)^T + b                                            (eq. 7), for q, k and v

With scope="window", layers that attend within windows decide anew for each window, from the mean over its tokens.

The baselines differ only in the mask m, so there is one adapter (`Adapter`), one operation (`gated_linear`) and a gate
for each method: `gara`; `gara_flat`, one set and no g; `gara_space`, g alone; `gara_random`, coins in place of gates;
`lora`, m = 1; `moe_lora`, one of several blocks of components.

    sam = gara.attach(build_sam("vit_b", "sam_vit_b_01ec64.pth"), "gara")    # frozen, adapted; the same until trained
    optimizer = torch.optim.Adam(p for p in sam.parameters() if p.requires_grad)
    gara.save_adapter(sam, "gara.pt")                                        # the adapter alone
    gara.load_adapter(build_sam("vit_b", "sam_vit_b_01ec64.pth"), "gara.pt")

`python gara.py export` writes the adapted encoder as a graph that decides for each image (ONNX or torch.export), and
`python gara.py merge` LoRA as a plain SAM checkpoint.

Letters: N images, n tokens of an image, d width, r components, G weight matrices side by side (3: q, k and v).
"""
import hashlib
import math
import os
import sys
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from sam import BACKBONES, Linear, Sam, is_weight, join, linear, onednn_serves, read_weights, reason, state_of

# ---------------------------------------------------------------- the operation

def gated_linear(x, weight, bias, A, B, mask):
    """y = x (W + B diag(m) A)^T + b, where each image, or each token, has its own mask m (eq. 7).

    x (N, ..., d) tokens of N images; weight (G * o, d) and bias (G * o,): G matrices of o rows, one below the other;
    A (G, r, d), B (G, o, r), or without the leading G when there is one; mask, any real numbers: (N, r), one of each
    image, or (N, ..., r), one of each token.
    -> (N, ..., G * o)

    Two forms give the same y: the merged one builds each image's W + B diag(m) A and multiplies x by it; the factored
    one multiplies x by A, m and B in turn. For each of the G matrices, merging takes r o d and factoring n r (o + d)
    multiplications, so merging wins once an image has more than o d / (o + d) tokens; SAM's 4096 make it 11 (vit_b) to
    6 (vit_h) times cheaper. With a mask per token there is nothing to merge. The backward pass chooses likewise; it
    keeps x and the mask and computes the rest anew. No size depends on the mask's content, so nothing waits for the GPU
    and CUDA graphs can capture it.

    Under autocast, the merged form adds the update to W in W's own precision and rounds the sum. Rounding W first
    would lose every update smaller than W's last bit; this way it survives on average over many weights.
    """
    if A.dim() == 2:
        A, B = A[None], B[None]
    N = x.shape[0]
    shape = x.shape[:-1]
    r = A.shape[1]
    if mask.shape not in ((N, r), (*shape, r)) or B.shape != (len(A), weight.shape[0] // len(A), r):
        raise ValueError(f"gated_linear: x {tuple(x.shape)}, weight {tuple(weight.shape)}, A {tuple(A.shape)}, "
                         f"B {tuple(B.shape)} and mask {tuple(mask.shape)} do not fit together")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with torch.autocast(x.device.type, enabled=False):
        x = x.reshape(N, -1, x.shape[-1])
        if mask.dim() > 2:
            mask = mask.reshape(N, -1, r)
        if not (onednn_serves(x) and onednn_serves(A)):
            y = GatedLinear.apply(x, weight, bias, A, B, mask)
        elif forward_merged(x, B, mask):
            y = merged_by_image(x, weight, bias, A, B, mask)
        else:
            y = factored(x, weight, bias, A, B, mask, linear)
        return y.view(*shape, -1)


FORM = "cheaper"  # or "merged", or "factored": for tests


def choose_merged(mask, merged_cost, factored_cost):
    """Which form to take, by the number of multiplications. A mask per token (N, n, r) cannot be merged."""
    if mask.dim() == 3:
        return False
    if FORM == "cheaper":
        return merged_cost <= factored_cost
    return FORM == "merged"


def forward_merged(x, B, mask):
    """Which form the forward pass on x (N, n, d) takes."""
    n, d = x.shape[1:]
    _, o, r = B.shape
    return choose_merged(mask, r * o * d, n * r * (o + d))


def backward_merged(x, B, mask):
    """Which form the backward pass takes."""
    n, d = x.shape[1:]
    _, o, r = B.shape
    return choose_merged(mask, 3 * r * o * d + n * o * d, n * r * (2 * o + 3 * d))


def merged_weight(weight, A, B, mask, dtype):
    """W + B diag(m) A for each image: (N, G * o, d). The product is made in `dtype`, the sum in W's."""
    gated = B.to(dtype) * mask.to(dtype)[:, None, None, :]  # (N, G, o, r)
    update = (gated @ A.to(dtype)).flatten(1, 2)  # (N, G * o, d)
    if update.dtype == weight.dtype:
        return update.add_(weight)
    return (weight + update).to(dtype)


def merged_by_image(x, weight, bias, A, B, mask):
    """The merged form without a gradient, on a CPU. Closed components are left out of the product."""
    y = []
    for image, m in zip(x, mask):
        some = m.nonzero()[:, 0]
        updates = [linear(b[:, some] * m[some], a[some].T) for a, b in zip(A, B)]  # (o, d) each
        y.append(linear(image, torch.cat(updates).add_(weight), bias)[None])
    return join(y)


def factored(x, weight, bias, A, B, mask, product):
    """The factored form of x (N, n, d), with mask (N, r) or (N, n, r): (N, n, G * o). product: F.linear or `linear`."""
    if mask.dim() == 2:
        mask = mask[:, None]
    mask = mask.to(x.dtype)
    y = product(x, weight.to(x.dtype), bias.to(x.dtype))
    for a, b, part in zip(A.to(x.dtype), B.to(x.dtype), y.chunk(len(A), -1)):
        part += product(product(x, a) * mask, b)  # (N, n, r), then (N, n, o)
    return y


class GatedLinear(torch.autograd.Function):
    """`gated_linear` on x (N, n, d), with its own backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, mask):
        ctx.save_for_backward(x, weight, A, B, mask)
        if forward_merged(x, B, mask):
            return torch.baddbmm(bias.to(x.dtype), x, merged_weight(weight, A, B, mask, x.dtype).mT)
        return factored(x, weight, bias, A, B, mask, F.linear)

    @staticmethod
    def backward(ctx, dy):  # (N, n, G * o)
        x, weight, A, B, mask = ctx.saved_tensors
        need_x, need_weight, need_bias, *need_adapter = ctx.needs_input_grad
        gradients = merged_gradients if backward_merged(x, B, mask) else factored_gradients
        dx, dA, dB, dmask = gradients(dy, x, weight, A, B, mask, (need_x, any(need_adapter)))

        dweight = dbias = None
        if need_weight:
            dweight = (dy.flatten(0, 1).mT @ x.flatten(0, 1)).to(weight.dtype)
        if need_bias:
            dbias = dy.sum((0, 1), dtype=weight.dtype)
        if dA is not None:
            dA, dB, dmask = dA.to(A.dtype), dB.to(B.dtype), dmask.to(mask.dtype)
        return dx, dweight, dbias, dA, dB, dmask


def merged_gradients(dy, x, weight, A, B, mask, needed):
    """Gradients of x, A, B and mask (N, r) by each image's merged weight. needed: whether x's, the others'."""
    dtype = x.dtype
    G, o, _ = B.shape
    dx = dA = dB = dmask = None
    if needed[0]:
        dx = dy @ merged_weight(weight, A, B, mask, dtype)
    if needed[1]:
        D = (dy.mT @ x).unflatten(1, (G, o))  # (N, G, o, d): the gradient of W + B diag(m) A
        P = B.to(dtype).mT @ D  # (N, G, r, d)
        Q = D @ A.to(dtype).mT  # (N, G, o, r)
        P, Q = (t.to(torch.promote_types(dtype, torch.float32)) for t in (P, Q))
        m = mask.to(P.dtype)
        dA = torch.einsum("Nr,NGrd->Grd", m, P)
        dB = torch.einsum("Nr,NGor->Gor", m, Q)
        dmask = (P * A.to(P.dtype)).sum((1, 3))
    return dx, dA, dB, dmask


def factored_gradients(dy, x, weight, A, B, mask, needed):
    """The same token by token, with mask (N, r) or (N, n, r)."""
    dtype = x.dtype
    dx = dA = dB = dmask = None
    m = mask.to(dtype).view(len(x), -1, A.shape[1])  # (N, 1 or n, r)
    if needed[0]:
        dx = dy @ weight.to(dtype)
    if needed[1]:
        dA, dB, dmask = torch.empty_like(A), torch.empty_like(B), 0
    for g, d in enumerate(dy.chunk(len(A), -1)):  # (N, n, o)
        a, b = A[g].to(dtype), B[g].to(dtype)
        t = d @ b  # (N, n, r)
        if needed[0]:
            dx += (t * m) @ a
        if needed[1]:
            u = x @ a.mT  # (N, n, r)
            dA[g] = (t * m).flatten(0, 1).mT @ x.flatten(0, 1)
            dB[g] = d.flatten(0, 1).mT @ (u * m).flatten(0, 1)
            dmask = dmask + t.to(mask.dtype) * u.to(mask.dtype)  # (N, n, r)
    if needed[1] and mask.dim() == 2:
        dmask = dmask.sum(1)
    return dx, dA, dB, dmask


# ---------------------------------------------------------------- the gates
# h (N, d), or (N, rows, columns, d) of windows -> mask (..., r) and space (...,), what was chosen: 0 or 1 for GaRA, the
# expert for MoE-LoRA, else 0. One gate serves q, k and v of a layer.


def gumbel_sigmoid(logits, temperature=0.5, training=True):
    """Binary decisions with a gradient (eq. 3 and 6): 0. or 1., in the shape of logits.

    In training, s = sigmoid((logits + G) / temperature) with one Gumbel(0, 1) variable G for each logit; the value is
    1[s > 0.5], the gradient that of s. So a component with logit z is open with chance 1 - exp(-exp(z)), whatever the
    temperature: 63 % at 0. Otherwise 1[logits > 0], without noise.
    """
    if not training:
        return (logits > 0).to(logits.dtype)
    G = -torch.empty_like(logits).exponential_().log()  # -log(-log(u)) for an even u: -log(u) is exponential
    s = ((logits + G) / temperature).sigmoid()
    hard = (s > 0.5).to(s.dtype)
    return hard + (s - s.detach())  # s - s is exactly 0: the value is hard, the gradient that of s


def mlp(*widths):
    """Linear layers with ReLU between them."""
    layers = []
    for i, o in zip(widths, widths[1:]):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


SPACE_WIDTH, COMPONENT_WIDTH = 64, 16  # hidden units of the gates, by the paper's appendix


class GaraGate(nn.Module):
    """Gating 1 (`g_space`) chooses one of two sets of components, gating 2 (`g_L`, `g_H`) among those of that set."""

    def __init__(self, d, rank_low, rank_high, temperature):
        super().__init__()
        self.rank = rank_low + rank_high
        self.temperature = temperature
        self.g_space = mlp(d, SPACE_WIDTH, 1)
        self.g_L = mlp(d, COMPONENT_WIDTH, COMPONENT_WIDTH, rank_low)
        self.g_H = mlp(d, COMPONENT_WIDTH, COMPONENT_WIDTH, rank_high)

    def forward(self, h):
        z_space, z_L, z_H = (self.decide(g(h)) for g in (self.g_space, self.g_L, self.g_H))
        return torch.cat([(1 - z_space) * z_L, z_space * z_H], dim=-1), z_space[..., 0].long()

    def decide(self, logits):
        """One 0 or 1 for each logit."""
        return gumbel_sigmoid(logits, self.temperature, self.training)


class FlatGate(nn.Module):
    """Gating 2 alone, on one set (Table 7: "w/o gating 1")."""

    def __init__(self, d, rank, temperature):
        super().__init__()
        self.rank = rank
        self.temperature = temperature
        self.g = mlp(d, COMPONENT_WIDTH, COMPONENT_WIDTH, rank)

    def forward(self, h):
        return gumbel_sigmoid(self.g(h), self.temperature, self.training), no_space(h)


class SpaceGate(nn.Module):
    """Gating 1 alone: all components of the chosen set are open (Table 11)."""

    def __init__(self, d, rank_low, rank_high, temperature):
        super().__init__()
        self.ranks = rank_low, rank_high
        self.rank = rank_low + rank_high
        self.temperature = temperature
        self.g_space = mlp(d, SPACE_WIDTH, 1)

    def forward(self, h):
        z_space = gumbel_sigmoid(self.g_space(h), self.temperature, self.training)
        low, high = self.ranks
        mask = torch.cat([1 - z_space] * low + [z_space] * high, dim=-1)
        return mask, z_space[..., 0].long()


class RandomGate(nn.Module):
    """A fair coin in place of every gate's decision (Table 10), tossed anew for each image in evaluation as well.

    There the coins of an image derive from its pixels and the layer, so the same image always sees the same ones;
    `attach` has the encoder put a seed for each image into `seeds`.
    """

    def __init__(self, d, rank_low, rank_high):
        super().__init__()
        self.ranks = rank_low, rank_high
        self.rank = rank_low + rank_high
        self.seeds = None

    def forward(self, h):
        shape = *h.shape[1:-1], 1 + self.rank  # of one image's coins
        if self.training:
            coins = torch.rand(len(h), *shape, device=h.device)
        else:
            generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
            coins = torch.stack([torch.rand(shape, generator=generator) for generator in generators])
        z_space, z_L, z_H = (coins < 0.5).to(h).split([1, *self.ranks], dim=-1)
        return torch.cat([(1 - z_space) * z_L, z_space * z_H], dim=-1), z_space[..., 0].long()


def seed_coins(encoder, inputs):
    """A hook before the image encoder's forward pass: each `RandomGate` gets a seed of each image, from its pixels."""
    if not encoder.training:
        pixels = [image.cpu().contiguous().numpy() for image in inputs[0].float()]
        for layer, block in enumerate(encoder.blocks):
            block.attn.qkv.gate.seeds = [zlib.crc32(image, layer) for image in pixels]


class OpenGate(nn.Module):
    """LoRA: every component, always."""

    def __init__(self, d, rank):
        super().__init__()
        self.rank = rank

    def forward(self, h):
        return h.new_ones(*h.shape[:-1], self.rank), no_space(h)


class ExpertGate(nn.Module):
    """MoE-LoRA: one of several blocks of components, by a softmax gate (in training, straight-through with noise)."""

    def __init__(self, d, experts, temperature):
        super().__init__()
        self.rank = sum(experts)
        self.temperature = temperature
        self.g = mlp(d, SPACE_WIDTH, len(experts))
        block_of = []  # the expert that each component belongs to
        for expert, size in enumerate(experts):
            block_of += [expert] * size
        self.register_buffer("block_of", torch.tensor(block_of), persistent=False)

    def forward(self, h):
        logits = self.g(h)
        if self.training:
            choice = F.gumbel_softmax(logits, self.temperature, hard=True)
        else:
            choice = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        return choice[..., self.block_of], choice.argmax(-1)


def no_space(h):
    """What gates report that choose no set of components."""
    return h.new_zeros(h.shape[:-1], dtype=torch.long)


class Method(NamedTuple):
    """A kind of adapter: its gate, what tables call it, its options and their defaults (the paper's)."""
    gate: type
    title: str
    options: dict


# To add a method, write its gate and name it here.
METHODS = {
    "gara": Method(GaraGate, "GaRA", dict(rank_low=16, rank_high=256, temperature=0.5, scope="image")),
    "gara_flat": Method(FlatGate, "GaRA flat", dict(rank=16, temperature=0.5, scope="image")),
    "gara_space": Method(SpaceGate, "GaRA, gating 1 alone",
                         dict(rank_low=16, rank_high=256, temperature=0.5, scope="image")),
    "gara_random": Method(RandomGate, "GaRA, random gates", dict(rank_low=16, rank_high=256, scope="image")),
    "lora": Method(OpenGate, "LoRA", dict(rank=16)),
    "moe_lora": Method(ExpertGate, "MoE-LoRA", dict(experts=(2, 16, 128, 256), temperature=0.5, scope="image")),
}
SCOPES = ("image", "window")
# The tiny vit_t is 160 wide where vit_b is 768, and its ranks shrink about as much.
RANKS_VIT_T = dict(rank_low=4, rank_high=48, rank=4, experts=(1, 4, 24, 48))


def default_options(method, backbone):
    """The options that `attach` starts from."""
    options = dict(METHODS[method].options)
    if backbone == "vit_t":
        options |= {name: rank for name, rank in RANKS_VIT_T.items() if name in options}
    return options


# ---------------------------------------------------------------- the adapter

class Adapter(nn.Module):
    """Stands in for an attention layer's `qkv`: the frozen weight and bias (under their old names), A, B and the gate.

    q, k and v have an A and a B each and share the gate. A starts as nn.Linear's weight does, B at zero, so that at
    first nothing changes. window: the side, in tokens, of the squares that decide each for itself; 0: the whole image.
    """

    def __init__(self, linear, gate, window=0):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.gate = gate
        self.window = window
        d = linear.in_features
        self.A = nn.Parameter(linear.weight.new_empty(3, gate.rank, d).uniform_(-d ** -0.5, d ** -0.5))
        self.B = nn.Parameter(linear.weight.new_zeros(3, d, gate.rank))
        self.mask = self.space = None  # the last decisions, for gates()

    def forward(self, x):  # (N, H, W, d) -> (N, H, W, 3d)
        with torch.autocast(x.device.type, enabled=False):  # decisions near a threshold should not depend on rounding
            mask, space = self.gate(self.pool(x.to(self.A.dtype)))
        self.mask, self.space = mask.detach(), space
        if self.window:  # (N, rows, columns, r) of windows -> (N, H, W, r): each token has its window's
            mask = mask.repeat_interleave(self.window, 1).repeat_interleave(self.window, 2)
            mask = mask[:, :x.shape[1], :x.shape[2]]
        return gated_linear(x, self.weight, self.bias, self.A, self.B, mask)

    def pool(self, x):
        """The gate's input: mean over each image's tokens (N, d), or over each window's (N, rows, columns, d).

        The padding that makes an image square counts as well. Windows that reach beyond the image, at its right and
        lower border, average the tokens they have; the official code fills them up with zeros.
        """
        if not self.window:
            return x.flatten(1, -2).mean(1)
        means = F.avg_pool2d(x.permute(0, 3, 1, 2), self.window, ceil_mode=True, count_include_pad=False)
        return means.permute(0, 2, 3, 1)


# ---------------------------------------------------------------- on a SAM: attach, look at, take off, save, load

def adapters(sam):
    """The adapters of a SAM, layer by layer; empty when there are none."""
    return [block.attn.qkv for block in sam.image_encoder.blocks if isinstance(block.attn.qkv, Adapter)]


def attach(sam, method="gara", **options):
    """Freeze `sam` and adapt q, k and v of every encoder layer. Returns sam, whose outputs stay the same until trained.

    `options` override the method's defaults in METHODS (for vit_t, with RANKS_VIT_T). ValueError for what makes no
    sense.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if adapters(sam):
        raise ValueError(f"this SAM carries an adapter ({sam.adapter['method']}) already: detach(sam) first")
    known = default_options(method, sam.backbone)
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise ValueError(f"{method} has no option {unknown[0]}: it has {', '.join(known)}")
    options = known | options
    if isinstance(options.get("experts"), list):
        options["experts"] = tuple(options["experts"])
    d = sam.image_encoder.blocks[0].attn.qkv.in_features
    check_options(method, options, d)

    sam.requires_grad_(False)
    of_gate = dict(options)
    scope = of_gate.pop("scope", "image")
    for block in sam.image_encoder.blocks:
        qkv = block.attn.qkv
        gate = METHODS[method].gate(d, **of_gate).to(qkv.weight)
        window = block.attn.window if scope == "window" else 0
        block.attn.qkv = Adapter(qkv, gate, window).train(block.attn.training)
    sam.adapter = dict(method=method, options=options)
    if method == "gara_random":
        sam.adapter_hook = sam.image_encoder.register_forward_pre_hook(seed_coins)
    return sam


def ranks_of(options):
    """The sizes of a method's sets of components: (16, 256) of GaRA's, (16,) of LoRA's, the experts of MoE-LoRA's."""
    if "experts" in options:
        return options["experts"]
    return tuple(value for key, value in options.items() if key.startswith("rank"))


def check_options(method, options, d):
    """ValueError for options that make no sense at width d."""
    ranks = ranks_of(options)
    temperature = options.get("temperature", 1.0)
    sound = isinstance(ranks, (list, tuple)) and len(ranks) > 0
    sound = sound and all(type(rank) is int and 0 < rank <= 4 * d for rank in ranks)
    sound = sound and sum(ranks) <= 8 * d
    if not sound or type(temperature) not in (int, float) or not 0 < temperature < math.inf:
        raise ValueError(f"ranks are whole numbers from 1 to {4 * d}, together at most {8 * d}, the temperature is "
                         f"above 0: this is {method} with {str(options)[:200]}")
    if options.get("scope", "image") not in SCOPES:
        raise ValueError(f"{method} with scope {options['scope']!r}: choose one of {', '.join(SCOPES)}")


def detach(sam):
    """Take the adapter off: plain SAM again, its own weights untouched and trainable. Returns sam."""
    for block in sam.image_encoder.blocks:
        if isinstance(block.attn.qkv, Adapter):
            old = block.attn.qkv
            with torch.device("meta"):
                block.attn.qkv = Linear(old.weight.shape[1], old.weight.shape[0])
            block.attn.qkv.weight = old.weight
            block.attn.qkv.bias = old.bias
    if getattr(sam, "adapter_hook", None):
        sam.adapter_hook.remove()
    sam.adapter = sam.adapter_hook = None
    return sam.requires_grad_(True)


def gates(sam):
    """What each layer chose for the N images of the last forward pass, as Figure 6 shows it: one dict per layer.

    layer: its number, from 0; space (N,): 0 lower-rank, 1 higher-rank (moe_lora: the expert; else 0); vector (N, r)
    bool: the components in use, those of the lower-rank space first; count (N,): how many. Where windows decide, each
    has their number as its second dimension, row by row: space (N, windows). RuntimeError before any forward pass.
    """
    layers = adapters(sam)
    if not layers or layers[0].mask is None:
        raise RuntimeError("no gates yet: attach an adapter and encode an image first")
    report = []
    for i, adapter in enumerate(layers):
        vector = adapter.mask > 0.5
        space = adapter.space
        if adapter.window:  # (N, rows, columns, ...)
            vector = vector.flatten(1, 2)
            space = space.flatten(1, 2)
        report.append(dict(layer=i, space=space, vector=vector, count=vector.sum(-1)))
    return report


def adapter_state(sam):
    """The adapter's own parameters by name: those under `qkv` that plain SAM does not have."""
    own = {}
    for key, value in sam.state_dict().items():
        if ".attn.qkv." in key and not key.endswith((".qkv.weight", ".qkv.bias")):
            own[key] = value
    return own


def own_values(sam, count, positions=False):
    """{name: `count` or somewhat more evenly spaced values} of SAM's own tensors. Without positions, which at another
    image size are interpolated, and not to the same bits on every CPU."""
    own = adapter_state(sam)
    values = {}
    for key, value in sorted(sam.state_dict().items()):
        if key in own:
            continue
        if positions or not ("pos_embed" in key or "rel_pos" in key):
            step = max(1, value.numel() // count)
            values[key] = value.flatten()[::step].cpu()
    return values


def fingerprint(sam, positions=False):
    """Short hex digest that tells base models apart, by a thousand values or so of each tensor, taken as bfloat16."""
    digest = hashlib.sha256()
    for key, value in own_values(sam, 1024, positions).items():
        rounded = value.to(torch.bfloat16).view(torch.int16)
        digest.update(key.encode() + rounded.numpy().tobytes())
    return digest.hexdigest()[:16]


def base_values(sam):
    """What an adapter file keeps of the weights that it was trained on: a few numbers of each tensor."""
    return torch.cat([value.float() for value in own_values(sam, 4).values()])


def is_base(sam, base):
    """Whether an adapter file's `base` is of these weights, be they stored in float32, half or bfloat16."""
    if isinstance(base, str):  # files of format 2
        return base == fingerprint(sam, positions=True)
    here = base_values(sam)
    return fits(base, here) and torch.allclose(base.float(), here, rtol=2**-8, atol=1e-7)  # two roundings to bfloat16


# ---------------------------------------------------------------- adapter files

FORMAT, EARLIER = "gara-sam adapter 3", "gara-sam adapter 2"


def save_adapter(sam, path, **meta):
    """Write the adapter alone (no base weights), with its options and a sample of the base model's values.

    `meta` is kept with it: numbers, strings, tensors, NumPy's numbers and arrays (as Python's and tensors), and lists,
    tuples or dicts of these. ValueError for other things, when sam has no adapter, or one that holds NaN; a file that
    was at `path` is then left as it is.
    """
    if not adapters(sam):
        raise ValueError("this SAM carries no adapter: attach(sam) first")
    weights = {key: value.detach().cpu() for key, value in adapter_state(sam).items()}
    for key, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"not saved: {key} holds NaN or infinite values")
    content = dict(format=FORMAT, backbone=sam.backbone, image_size=sam.image_encoder.img_size,
                   base=base_values(sam), **sam.adapter, weights=weights, meta=plain(meta))
    save_whole(content, path)


def plain(value):
    """`value` of plain Python and torch types. ValueError if it holds anything that could not be read again."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        kind = tuple if isinstance(value, tuple) else list
        return kind(plain(entry) for entry in value)
    if type(value) in (bool, int, float, complex, str, bytes, type(None), torch.Tensor, nn.Parameter):
        return value
    raise ValueError(f"not saved: {str(value)[:60]!r} is {type(value).__name__}; an adapter's file keeps numbers, "
                     "strings, tensors, and lists, tuples or dicts of these")


def save_whole(content, path):
    """torch.save, but a file is written whole or not at all."""
    part = f"{path}.part"
    try:
        torch.save(content, part)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


class WholeModel(ValueError):
    """An adapter was expected, and the file is a SAM checkpoint."""


def read_adapter(path):
    """The content of an adapter file. FileNotFoundError, or ValueError in one line, when it is none; WholeModel when it
    is a SAM checkpoint."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no adapter file at {path}")
    content = read_weights(path)
    if state_of(content):
        raise WholeModel(f"{path} is not an adapter file but a SAM checkpoint: give it with --checkpoint")
    if not isinstance(content, dict):
        content = {}
    if content.get("format") == "gara-sam adapter 1":
        raise ValueError(f"{path} was trained with gates of another form, before the paper's own were known: train it "
                         "again, or use the version of this project that made it")
    if content.get("format") not in (FORMAT, EARLIER):
        raise ValueError(f"{path} is not an adapter file of this project")
    entries = dict(backbone=str, image_size=int, method=str, options=dict, weights=dict, meta=dict)
    for key, kind in entries.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{path} is damaged: its entry {key!r} is missing or no {kind.__name__}")
    if content["backbone"] not in BACKBONES:
        raise ValueError(f"{path} adapts {content['backbone'][:20]!r}, not one of {', '.join(BACKBONES)}")
    return content


def load_adapter(sam, path):
    """Attach the adapter in `path` (or fill the equal one that sam carries) and return the `meta` it was saved with.

    Strict: FileNotFoundError or ValueError, in one line, for a missing or damaged file, another backbone, other base
    weights, or a key that is missing, unknown, of another shape or not finite. sam is then unchanged.
    """
    content = read_adapter(path)
    check_base(sam, content, path)
    method = content["method"]
    options = content["options"]
    weights = content["weights"]
    expected = layout(sam.backbone, method, options, path)
    wrong = [key for key in weights if key not in expected]
    for key, value in expected.items():
        if not fits(weights.get(key), value):
            wrong.append(key)
    if wrong:
        raise ValueError(f"{path}: {str(wrong[0])[:80]!r} is missing, unknown, of a wrong shape or not finite "
                         f"({len(wrong)} such keys)")

    if not adapters(sam):
        attach(sam, method, **options)
    elif sam.adapter != dict(method=method, options=options):
        raise ValueError(f"{path} is {method} {options}, this SAM carries {sam.adapter['method']} "
                         f"{sam.adapter['options']}: detach(sam) first")
    with torch.no_grad():
        for key, value in adapter_state(sam).items():
            value.copy_(weights[key])
    return content["meta"]


def layout(backbone, method, options, path):
    """An adapter's state, without memory, by its options. ValueError, with the file's path, for impossible ones."""
    try:
        with torch.device("meta"):
            return adapter_state(attach(Sam(backbone), method, **options))
    except (ValueError, TypeError) as error:  # the latter: names of options that are none
        raise ValueError(f"{path}: {reason(error)}") from error


def check_base(sam, content, path):
    """ValueError if the adapter file's content is for another backbone, image size or base weights than sam's."""
    backbone = content["backbone"]
    size = content["image_size"]
    if backbone != sam.backbone:
        raise ValueError(f"{path} adapts {backbone}, this SAM is {sam.backbone}: say --backbone {backbone}")
    if size != sam.image_encoder.img_size:
        raise ValueError(f"{path} was trained at image size {size}, this SAM takes {sam.image_encoder.img_size}: "
                         f"build_sam(..., image_size={size})")
    if not is_base(sam, content.get("base")):
        raise ValueError(f"{path} was trained on other {backbone} weights than these: give the checkpoint it was "
                         "trained on with --checkpoint")


def fits(weight, expected):
    """Whether an entry of a file is a finite tensor of the expected one's shape."""
    return is_weight(weight) and weight.shape == expected.shape and bool(weight.float().isfinite().all())


# ---------------------------------------------------------------- python gara.py export | merge

def merge(sam, weights):
    """A checkpoint's `weights` with the adapter of the SAM that was built from it: B A is added to W. ValueError for
    all methods but LoRA."""
    check_mergeable(sam.adapter["method"])
    weights = dict(weights)
    for layer, adapter in enumerate(adapters(sam)):
        everything = adapter.A.new_ones(1, adapter.gate.rank)
        weight = merged_weight(adapter.weight, adapter.A, adapter.B, everything, adapter.A.dtype)
        weights[f"image_encoder.blocks.{layer}.attn.qkv.weight"] = weight[0].detach()
    return weights


def check_mergeable(method):
    """ValueError if the method's weights depend on the image."""
    if method != "lora":
        raise ValueError(f"the weights of {method} depend on the image, so no checkpoint can hold them: "
                         "`python gara.py export` writes a graph that decides for each image")


def main(argv=None):
    """Convert an adapter from the command line; returns the exit code."""
    from assets import export  # here, since it is built on this file

    return export.main(argv)


if __name__ == "__main__":
    sys.exit(main())
