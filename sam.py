"""The Segment Anything Model (SAM) in one file: it reads the official checkpoints and gives the official numbers.

SAM answers "which object is meant?" for a picture and a prompt, in three parts (sizes of the official models):

    ImageEncoder    a Vision Transformer; runs once per picture        (N, 3, 1024, 1024) -> (N, 256, 64, 64)
    PromptEncoder   points, boxes and masks become tokens; fast        prompts -> (P, T, 256), (P, 256, 64, 64)
    MaskDecoder     two transformer layers, tokens and picture         -> masks (P, 1 or 3, 256, 256), their scores

`Sam` holds the three, `SamPredictor` has the official class's methods (one picture, many prompts), and

    python sam.py photo.jpg --point 500,375 --out overlay.png --mask mask.png

segments from the command line. Parameter names are the official code's
(github.com/facebookresearch/segment-anything). Letters in shape comments: N images, P prompts (each belongs to one
image), K points and T tokens of a prompt, H x W tokens of an image, d channels of the encoder, C channels of the
decoder, c channels of a head.

Two things differ from the official code; the numbers don't (README, "Exactness"):
* `qkv` and `proj` treat each token by itself, so here they run on the picture's 64 x 64 tokens. The official code has
  70 x 70 by then, in windows padded with zeros; `qkv` turns zeros into its bias, with which windows are padded here.
* Global attention takes a block of queries at a time, so no (heads, 4096, 4096) tensor ever exists.
"""
import argparse
import contextlib
import ctypes
import functools
import importlib.util
import os
import pickle
import sys
import urllib.error
from collections import OrderedDict

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torch.utils.checkpoint import checkpoint as recompute

# Sizes of each model. `global_layers` attend over the whole picture, the others within windows; pictures are scaled and
# padded to a square of side `image_size`; `C` is the width of prompt tokens and mask decoder, `mlp` its hidden width.
OFFICIAL = dict(window=14, image_size=1024, patch=16, C=256, mlp=2048)
BACKBONES = {
    "vit_t": dict(d=160, depth=6, heads=5, global_layers=(1, 3, 5), window=8, image_size=128, patch=8, C=128, mlp=512),
    "vit_b": dict(d=768, depth=12, heads=12, global_layers=(2, 5, 8, 11), **OFFICIAL),
    "vit_l": dict(d=1024, depth=24, heads=16, global_layers=(5, 11, 17, 23), **OFFICIAL),
    "vit_h": dict(d=1280, depth=32, heads=16, global_layers=(7, 15, 23, 31), **OFFICIAL),
}
# The official files; the six digits are the first of the file's SHA-256. vit_t is this project's own and comes with it.
FILES = {"vit_t": "sam_vit_t.pth", "vit_b": "sam_vit_b_01ec64.pth",
         "vit_l": "sam_vit_l_0b3195.pth", "vit_h": "sam_vit_h_4b8939.pth"}
URL = "https://dl.fbaipublicfiles.com/segment_anything/"


class CheckpointError(ValueError):
    """A weights file that is unreadable, foreign or for another model. The message is one line and says which."""


# ---------------------------------------------------------------- matrix products, where most of SAM's time goes
# PyTorch multiplies float32 matrices on a CPU by MKL. It also carries oneDNN, as exact and faster: 1.2 to 1.5 times on
# an AMD EPYC (README, "What it costs"). `torch.ops.mkldnn._linear_pointwise` is the call that torch.compile makes.

def onednn_serves(x):
    """Whether oneDNN multiplies x: float32 on a CPU where it would be MKL, and no gradient.

    `torch.backends.mkldnn.enabled = False` leaves it to MKL.
    """
    return (not torch.compiler.is_compiling() and x.device.type == "cpu" and x.dtype == torch.float32
            and x.numel() > 0 and torch.backends.mkl.is_available() and torch.backends.mkldnn.enabled
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")))


def linear(x, weight, bias=None, act="none"):
    """x W^T + b for x (..., i), W (o, i) and b (o,) -> (..., o); with act="gelu" the GELU of it."""
    if onednn_serves(x):
        if not (weight.is_contiguous() or weight.mT.is_contiguous()):
            weight = weight.contiguous()  # with gaps between its rows it takes 500 times as long
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, act, [], "none")
    y = F.linear(x, weight, bias)
    return F.gelu(y) if act == "gelu" else y


def products(a, b):
    """a b^T of each of a batch: a (P, m, K), b (P or 1, n, K) -> (P, m, n)."""
    return linear(a, b[0]) if len(b) == 1 else a @ b.mT


# ---------------------------------------------------------------- layers of all three parts

class Linear(nn.Linear):
    """nn.Linear for many tokens. For a few, such as a prompt's, nn.Linear itself is as fast."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (N, C, H, W)."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-6)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MLPBlock(nn.Sequential):
    """Linear, activation, linear: the feed-forward half of a transformer layer."""

    def __init__(self, width, hidden, activation):
        super().__init__(OrderedDict(lin1=Linear(width, hidden), act=activation, lin2=Linear(hidden, width)))


# ---------------------------------------------------------------- image encoder

# How many of the picture's tokens, over all images, pass through a layer of the encoder at a time, and how many
# attention scores are held at a time: on the CPU what fits its caches, on a GPU enough to keep it busy.
ENCODED_AT_ONCE = {"cpu": 2**10}
SCORES_AT_ONCE = {"cpu": 2**21, "cuda": 2**26}
SCORES_KEPT = 2**20  # for the backward pass; a head that has more computes them again
# How many of the picture's tokens, over all prompts, the mask decoder takes at a time, and how many of these are then
# upscaled at a time, for the same reason.
TOKENS_AT_ONCE = {"cpu": 2**12}
UPSCALED_AT_ONCE = {"cpu": 2**10}


def join(parts, dim=0):
    """torch.cat, which would copy a single part."""
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def relative_positions(table, size):
    """(2 * size - 1, c) learned vectors, one per offset -> (size, size, c): [i, j] is the vector of offset i - j."""
    index = torch.arange(size, device=table.device)
    return table[index[:, None] - index[None, :] + size - 1]


def attend(q, k, v, bias_h, bias_w):
    """softmax(q k^T / sqrt(c) + bias) v, where the bias of a query for key (y, x) is bias_h[..., y] + bias_w[..., x].

    For U heads of windows of S x S keys, and Q queries: q (U, Q, c), k and v (U, S * S, c), bias_h and bias_w (U, Q, S)
    -> (U, Q, c).
    """
    S = bias_h.shape[-1]
    if q.device.type == "cpu" and torch.is_grad_enabled():
        # The bias as part of the product: q longer by bias_h and bias_w, k by one-hot codes of its row and column.
        # Exact, and for training in bfloat16 on a CPU 1.8 times as fast as autograd through the sum below.
        like = dict(dtype=k.dtype, device=k.device)
        codes = torch.cat([torch.eye(S, **like).repeat_interleave(S, 0), torch.eye(S, **like).repeat(S, 1)], dim=1)
        q = torch.cat([q * q.shape[-1] ** -0.5, bias_h, bias_w], dim=-1)  # (U, Q, c + 2S)
        k = torch.cat([k, codes.expand(len(k), -1, -1)], dim=-1)  # (U, S * S, c + 2S)
        return (q @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
    if q.device.type == "cpu" and len(q) == 1:  # one head of the whole picture: faster than PyTorch's kernel below
        scores = linear(q[0] * q.shape[-1] ** -0.5, k[0])  # (Q, S * S)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores.view(-1, S, S).add_(bias_h[0, :, :, None]).add_(bias_w[0, :, None])
        return linear(torch.softmax(scores, -1, out=scores).to(v.dtype), v[0].T)[None]
    bias = (bias_h[..., :, None] + bias_w[..., None, :]).flatten(-2)  # (U, Q, S * S)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=bias[None])[0]


class Attention(nn.Module):
    """Multi-head self-attention within windows or, with window=0, over the whole picture.

    Relative positions are decomposed: how far down and how far right of a key its query lies, scored apart.
    """

    def __init__(self, d, heads, window, size):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = Linear(d, 3 * d)  # the layer that gara.attach adapts
        self.proj = Linear(d, d)
        side = window or size
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, d // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, d // heads))

    def forward(self, x):  # (N, H, W, d) -> (N, H, W, d)
        N, H, W, _ = x.shape
        qkv, S = self.qkv(x), self.window or H  # (N, H, W, 3d); side of the square within which tokens attend
        # In pieces: some rows of windows at a time, or some images.
        at_once = ENCODED_AT_ONCE.get(x.device.type, 2**17)
        rows, images = S * max(1, at_once // (S * W)), max(1, at_once // (H * W))
        return join([join([self.within(piece, S) for piece in image.split(rows, 1)], 1) for image in qkv.split(images)])

    def within(self, qkv, S):  # (n, h, w, 3d) -> (n, h, w, d)
        """Attention within squares of side S, of which the last in a row or column may be cut off."""
        n, h, w, _ = qkv.shape
        ny, nx = -(-h // S), -(-w // S)  # windows down and across
        if (ny * S, nx * S) != (h, w):  # pad with what qkv makes of the official code's zeros
            padded = self.qkv.bias.to(qkv.dtype).expand(n, ny * S, nx * S, -1).clone()
            padded[:, :h, :w] = qkv
            qkv = padded
        qkv = qkv.view(n, ny, S, nx, S, 3, self.heads, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)
        down, right = (relative_positions(table, S).to(qkv.dtype) for table in (self.rel_pos_h, self.rel_pos_w))
        # In pieces again: some heads at a time, and where a single one has too many scores, some of its queries.
        most, windows = SCORES_AT_ONCE.get(qkv.device.type, 2**22), n * ny * nx
        queries = min(S * S, max(1, most // (windows * S**2)))
        keep = S**4 <= SCORES_KEPT or not torch.is_grad_enabled()
        piece, heads = attend if keep else functools.partial(recompute, attend, use_reentrant=False), []
        for some in qkv.split(max(1, most // (windows * queries * S**2)), dim=4):
            q, k, v = some.reshape(3, -1, S, S, some.shape[-1])  # (U, S, S, c) each; U heads of windows in all
            bias_h = torch.einsum("uyxc,ykc->uyxk", q, down).flatten(1, 2)  # (U, S * S, S)
            bias_w = torch.einsum("uyxc,xkc->uyxk", q, right).flatten(1, 2)
            q, k, v = (t.flatten(1, 2).contiguous() for t in (q, k, v))  # (U, S * S, c), once for all blocks of queries
            blocks = zip(*(t.split(queries, dim=1) for t in (q, bias_h, bias_w)))
            x = join([piece(q_, k, v, h_, w_) for q_, h_, w_ in blocks], 1)  # (U, S * S, c)
            heads.append(x.view(n, ny, nx, -1, S, S, x.shape[-1]))
        x = join(heads, 3).permute(0, 1, 4, 2, 5, 3, 6).reshape(n, ny * S, nx * S, -1)
        return self.proj(x[:, :h, :w])


class Block(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, d, heads, window, size):
        super().__init__()
        self.norm1 = nn.LayerNorm(d, eps=1e-6)
        self.attn = Attention(d, heads, window, size)
        self.norm2 = nn.LayerNorm(d, eps=1e-6)
        self.mlp = MLPBlock(d, 4 * d, nn.GELU())

    def forward(self, x):  # (N, H, W, d)
        x = x + self.attn(self.norm1(x))
        parts = x.flatten(0, 2).split(ENCODED_AT_ONCE.get(x.device.type, 2**17))  # (tokens, d) each
        return join([part + self.mlp(self.norm2(part)) for part in parts]).view_as(x)


class ImageEncoder(nn.Module):
    """A ViT, most of whose layers attend within windows and a few over the whole picture, and a convolutional neck."""

    def __init__(self, d, depth, heads, global_layers, window, image_size, patch, C):
        super().__init__()
        self.img_size = image_size
        size = image_size // patch
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, d, kernel_size=patch, stride=patch)))
        self.pos_embed = nn.Parameter(torch.zeros(1, size, size, d))
        self.blocks = nn.ModuleList(Block(d, heads, 0 if i in global_layers else window, size) for i in range(depth))
        self.neck = nn.Sequential(nn.Conv2d(d, C, kernel_size=1, bias=False), LayerNorm2d(C),
                                  nn.Conv2d(C, C, kernel_size=3, padding=1, bias=False), LayerNorm2d(C))

    def forward(self, x):  # (N, 3, image_size, image_size) -> (N, C, H, W), H = W = image_size / patch
        x = self.patch_embed(x).permute(0, 2, 3, 1) + self.pos_embed  # (N, H, W, d)
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))


# ---------------------------------------------------------------- prompt encoder

class PositionEmbeddingRandom(nn.Module):
    """Positions in the unit square -> sines and cosines of random projections (fixed, and stored in the checkpoint)."""

    def __init__(self, features):
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, features))

    def forward(self, xy):  # (..., 2) in [0, 1] -> (..., 2 * features)
        with torch.autocast(xy.device.type, enabled=False):  # bfloat16 would blur positions to a few pixels
            angle = 2 * torch.pi * ((2 * xy - 1) @ self.positional_encoding_gaussian_matrix.to(xy.dtype))
            return torch.cat([angle.sin(), angle.cos()], dim=-1)


class PromptEncoder(nn.Module):
    """Points and boxes become sparse tokens (P, T, C), masks a dense map (P, C, H, W) to be added to the picture's.

    Labels of points: 1 object, 0 background, -1 no point (fills prompts up to one length).
    """

    def __init__(self, C, size, image_size):
        super().__init__()
        self.C, self.size, self.image_size = C, size, image_size
        self.pe_layer = PositionEmbeddingRandom(C // 2)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, C) for _ in range(4))  # background, object, box corners
        self.not_a_point_embed = nn.Embedding(1, C)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, 4, kernel_size=2, stride=2), LayerNorm2d(4), nn.GELU(),
            nn.Conv2d(4, 16, kernel_size=2, stride=2), LayerNorm2d(16), nn.GELU(), nn.Conv2d(16, C, kernel_size=1))
        self.no_mask_embed = nn.Embedding(1, C)

    def get_dense_pe(self):
        """Positional encoding of every token of the picture: (1, C, H, W)."""
        centre = (torch.arange(self.size, device=self.no_mask_embed.weight.device) + 0.5) / self.size
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        return self.pe_layer(torch.stack([x, y], dim=-1)).permute(2, 0, 1)[None]

    def embed_coords(self, coords, labels):
        """Pixels (P, K, 2) of the scaled picture and labels (P, K) -> (P, K, C). Labels 2 and 3 are the box corners."""
        positions = self.pe_layer((coords + 0.5) / self.image_size)  # + 0.5: the centre of the pixel
        meaning = torch.cat([self.not_a_point_embed.weight] + [e.weight for e in self.point_embeddings])[labels + 1]
        return positions.masked_fill(labels[..., None] < 0, 0) + meaning  # "no point" has no position

    def forward(self, points, boxes, masks):
        """points: (coords (P, K, 2), labels (P, K)); boxes (P, 4) xyxy; masks (P, 1, 4H, 4W) logits; each may be None.

        As in the official code, points without a box get one "no point" token more, where the box would be.
        """
        weight, coords, labels = self.no_mask_embed.weight, [], []
        P = next((len(p) for p in (points and points[0], boxes, masks) if p is not None), 1)
        if points is not None:
            extra = int(boxes is None)
            coords.append(F.pad(points[0].float(), (0, 0, 0, extra)))
            labels.append(F.pad(points[1].long(), (0, extra), value=-1))
        if boxes is not None:
            coords.append(boxes.float().reshape(P, 2, 2))
            labels.append(torch.tensor([[2, 3]], device=weight.device).expand(P, 2))
        sparse, dense = weight.new_empty(P, 0, self.C), weight.view(1, -1, 1, 1).expand(P, -1, self.size, self.size)
        if coords:
            sparse = self.embed_coords(torch.cat(coords, 1), torch.cat(labels, 1))
        if masks is not None:
            dense = self.mask_downscaling(masks)
        return sparse, dense


# ---------------------------------------------------------------- mask decoder

class CrossAttention(nn.Module):
    """Multi-head attention whose inner width may be smaller than its outer width.

    Between a few tokens and the whole picture, projecting the picture is what costs. But (W t) . (V p) = (V^T W t) . p
    for a token t and a pixel p: tokens can pass through both projections and the picture through none. With 7 tokens
    and 8 heads that is less than half the work, and nothing else is as large as the picture.
    """

    def __init__(self, C, heads, downsample=1):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(C, C // downsample)
        self.k_proj = nn.Linear(C, C // downsample)
        self.v_proj = nn.Linear(C, C // downsample)
        self.out_proj = nn.Linear(C // downsample, C)

    def split(self, x):  # (P, T, heads * c) -> (P, heads, T, c)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def weights(self, linear):  # (heads, c, C) and (heads, 1, c)
        return linear.weight.unflatten(0, (self.heads, -1)), linear.bias.unflatten(0, (self.heads, 1, -1))

    def forward(self, q, k, v):  # (P, Q, C), (P, K, C), (P, K, C) -> (P, Q, C)
        return self.attend(self.q_proj(q), self.k_proj(k), self.v_proj(v))

    def attend(self, q, k, v):
        """The same for q, k, v that are projected already; k and v may be one prompt's for all."""
        q, k, v = (self.split(t) for t in (q, k, v))  # (P, heads, Q or K, c)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return self.out_proj((scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2))

    def tokens_to_image(self, q, k, v):
        """The same for T tokens q (P, T, C) and pixels k, v (P or 1, HW, C), projected last -> (P, T, C)."""
        q, (to_k, _), (to_v, bias) = self.split(self.q_proj(q)), self.weights(self.k_proj), self.weights(self.v_proj)
        q = (q * q.shape[-1] ** -0.5) @ to_k  # (P, heads, T, C); k's bias would move all scores of a token alike
        scores = products(q.flatten(1, 2), k)  # (P, heads * T, HW)
        seen = products(scores.softmax(-1).to(v.dtype), v.mT).unflatten(1, (self.heads, -1))  # (P, heads, T, C)
        return self.out_proj((seen @ to_v.transpose(-1, -2) + bias).transpose(1, 2).flatten(2))

    def image_to_tokens(self, image, q, k, v, projected=False):
        """image (P or 1, HW, C) plus the same for its pixels q and T tokens k, v (P, T, C) -> (P, HW, C).

        projected: q is already.
        """
        k, v, (to_q, bias) = self.split(self.k_proj(k)), self.split(self.v_proj(v)), self.weights(self.q_proj)
        k = k * k.shape[-1] ** -0.5
        if projected:
            scores = k @ self.split(q).mT  # (P, heads, T, HW)
        else:
            scores = products((k @ to_q).flatten(1, 2), q).unflatten(1, (self.heads, -1)) + k @ bias.mT
        shares = scores.softmax(2).flatten(1, 2)  # softmax over T: fast, as HW is last
        v = v @ self.out_proj.weight.unflatten(1, (self.heads, -1)).permute(1, 2, 0)  # (P, heads, T, C)
        v = v + self.out_proj.bias / self.heads  # here, not on every pixel: the shares of each head add up to 1
        shares, v = shares.to(v.dtype).mT, v.flatten(1, 2)
        if image.dtype != v.dtype:  # autocast: what is added up stays float32
            return image + shares @ v
        return torch.baddbmm(image, shares, v)  # the sum is not a pass of its own over the picture


class TwoWayAttentionBlock(nn.Module):
    """Tokens attend to themselves, tokens to the picture, an MLP on the tokens, the picture to the tokens."""

    def __init__(self, C, heads, mlp, first):
        super().__init__()
        self.first = first  # the first layer's self-attention adds neither positions nor a residual
        self.self_attn = CrossAttention(C, heads)
        self.norm1 = nn.LayerNorm(C)
        self.cross_attn_token_to_image = CrossAttention(C, heads, downsample=2)
        self.norm2 = nn.LayerNorm(C)
        self.mlp = MLPBlock(C, mlp, nn.ReLU())
        self.norm3 = nn.LayerNorm(C)
        self.norm4 = nn.LayerNorm(C)
        self.cross_attn_image_to_token = CrossAttention(C, heads, downsample=2)

    def project(self, image, image_pe):
        """A picture's part in both attentions between it and the tokens: k and v for the tokens, its own q."""
        look, tell, places = self.cross_attn_token_to_image, self.cross_attn_image_to_token, image + image_pe
        return look.k_proj(places), look.v_proj(image), tell.q_proj(places)

    def forward(self, tokens, image, token_pe, image_pe, projected=None):
        """tokens (P, T, C), image (P or 1, HW, C) -> both, P each. projected: what `project` made of the image."""
        q = tokens if self.first else tokens + token_pe
        attended = self.self_attn(q, q, tokens)
        tokens = self.norm1(attended if self.first else tokens + attended)
        look, tell, q = self.cross_attn_token_to_image, self.cross_attn_image_to_token, tokens + token_pe
        if projected:
            k, v, places = projected
            seen = look.attend(look.q_proj(q), k, v)
        else:
            places = image + image_pe
            seen = look.tokens_to_image(q, places, image)
        tokens = self.norm2(tokens + seen)
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(tell.image_to_tokens(image, places, tokens + token_pe, tokens, bool(projected)))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """Two such layers and a last look of the tokens at the picture. What the tokens are at first is their position."""

    def __init__(self, C, heads, mlp, depth=2):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayAttentionBlock(C, heads, mlp, first=i == 0) for i in range(depth))
        self.final_attn_token_to_image = CrossAttention(C, heads, downsample=2)
        self.norm_final_attn = nn.LayerNorm(C)

    def forward(self, image, image_pe, tokens, asked, projected=None):
        """(P or 1, HW, C), (1, HW, C), (P, T, C) -> the first `asked` tokens (P, asked, C) and the image (P, HW, C).

        projected: what the first layer's `project` made of the image.
        """
        token_pe = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe, projected if layer.first else None)
        tokens, q = tokens[:, :asked], (tokens + token_pe)[:, :asked]  # each looks by itself
        look = self.final_attn_token_to_image.tokens_to_image(q, image + image_pe, image)
        return self.norm_final_attn(tokens + look), image


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class MaskDecoder(nn.Module):
    """Picture and prompt -> four masks, one for a clear prompt and three for an ambiguous one, and their predicted IoU.

    Tokens and picture attend to each other; then each mask's token becomes a 1x1 convolution over the picture.
    """

    def __init__(self, C, mlp):
        super().__init__()
        self.transformer = TwoWayTransformer(C, heads=8, mlp=mlp)
        self.iou_token = nn.Embedding(1, C)
        self.mask_tokens = nn.Embedding(4, C)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(C, C // 4, kernel_size=2, stride=2), LayerNorm2d(C // 4), nn.GELU(),
            nn.ConvTranspose2d(C // 4, C // 8, kernel_size=2, stride=2), nn.GELU())
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(C, C, C, C // 8) for _ in range(4))
        self.iou_prediction_head = MLP(C, 256, 256, 4)

    def upscale(self, image, kernels):
        """Pixels (P, HW, C) become 4 x 4 each and meet the masks' kernels (P, M, C / 8) -> (P, 16 HW, M).

        Every pixel becomes 2 x 2, and each of these again. A transposed convolution whose kernel is as large as its
        stride is a linear layer on each pixel. What it makes of a pixel stays together here; the pixels are brought in
        order when only the masks are left.
        """
        first, norm, _, second, _ = self.output_upscaling
        (weight, bias), last = ((conv.weight.permute(2, 3, 1, 0).flatten(0, 2), conv.bias.repeat(4))  # (4 out, in)
                                for conv in (first, second))
        masks = []
        for part in image.split(max(1, UPSCALED_AT_ONCE.get(image.device.type, 2**20) // len(image)), 1):
            part = linear(part, weight, bias).view(len(image), -1, first.out_channels)
            part = F.gelu(F.layer_norm(part, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
            part = linear(part, *last, "gelu").view(len(image), -1, second.out_channels)
            masks.append(products(part, kernels))
        return join(masks, 1)

    def flatten(self, image_embeddings, image_pe, dense):
        """The picture's tokens (P or 1, HW, C) and their positions (1, HW, C)."""
        return (image_embeddings + dense).flatten(2).mT, image_pe.flatten(2).mT

    def predict_masks(self, image_embeddings, image_pe, sparse, dense, which=slice(4), shared=None):
        """All four, or `which` of them: logits (P, M, 4H, 4W) and predicted IoU (P, M).

        image_embeddings (1 or P, C, H, W), image_pe (1, C, H, W), sparse (P, T, C), dense (P, C, H, W). shared: what
        `Sam.share` made of the picture, where all prompts have one and no mask.
        """
        P, (H, W) = len(sparse), image_embeddings.shape[2:]
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])  # (5, C)
        tokens = torch.cat([output_tokens.expand(P, -1, -1), sparse], dim=1)  # (P, 5 + T, C)
        if dense.stride(0) == 0:  # without mask prompts, all prompts see the same picture: it need not be copied
            dense = dense[:1]
        image, image_pe, projected = shared or (*self.flatten(image_embeddings, image_pe, dense), None)
        asked = 1 + which.stop  # the token of the predicted IoU and those of the masks
        tokens, image = self.transformer(image, image_pe, tokens, asked, projected)  # (P, asked, C), (P, HW, C)
        mlps = list(zip(self.output_hypernetworks_mlps, tokens[:, 1:].unbind(1)))[which]
        kernels = torch.stack([mlp(token) for mlp, token in mlps], dim=1)  # (P, M, C / 8)
        masks = self.upscale(image, kernels)  # (P, 16 HW, M)
        masks = masks.view(P, H, W, 2, 2, 2, 2, -1).permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(P, -1, 4 * H, 4 * W)
        return masks, self.iou_prediction_head(tokens[:, 0])[:, which]

    def forward(self, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output,
                shared=None):
        """The three masks for an ambiguous prompt, or the one for a clear prompt: (P, 3 or 1, 4H, 4W), and scores."""
        return self.predict_masks(image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings,
                                  slice(1, 4) if multimask_output else slice(1), shared)


# ---------------------------------------------------------------- the whole model, and its weights

class Sam(nn.Module):
    """Image encoder, prompt encoder and mask decoder. Gradients flow: only `SamPredictor` runs without them."""

    mask_threshold = 0.0  # a pixel belongs to the mask where its logit is above this
    image_format = "RGB"  # what `preprocess` takes

    def __init__(self, backbone, image_size=None):
        super().__init__()
        self.backbone = backbone
        sizes = BACKBONES[backbone] | ({"image_size": image_size} if image_size else {})
        mlp = sizes.pop("mlp")
        self.image_encoder = ImageEncoder(**sizes)
        self.prompt_encoder = PromptEncoder(sizes["C"], sizes["image_size"] // sizes["patch"], sizes["image_size"])
        self.mask_decoder = MaskDecoder(sizes["C"], mlp)
        self.register_buffer("pixel_mean", torch.tensor([123.675, 116.28, 103.53]).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor([58.395, 57.12, 57.375]).view(-1, 1, 1), persistent=False)

    @property
    def device(self):
        return self.pixel_mean.device

    def preprocess(self, x):
        """RGB in 0..255, (3, h, w) or (N, 3, h, w), already scaled -> normalised and padded to the model's square."""
        side = self.image_encoder.img_size
        x = (x - self.pixel_mean) / self.pixel_std
        return F.pad(x, (0, side - x.shape[-1], 0, side - x.shape[-2]))

    def share(self, image_embedding):
        """What all prompts on one picture (1, C, H, W) share if none is a mask: for `decode`, to compute it once.

        The picture's tokens (1, HW, C), their positions (1, HW, C), and the decoder's first layer's projections.
        """
        dense, image_pe = self.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1), self.prompt_encoder.get_dense_pe()
        image, image_pe = self.mask_decoder.flatten(image_embedding, image_pe, dense)
        return image, image_pe, self.mask_decoder.transformer.layers[0].project(image, image_pe)

    def decode(self, image_embeddings, points=None, boxes=None, masks=None, multimask_output=False, image_index=None,
               shared=None):
        """Prompts -> low-resolution logits (P, M, 4H, 4W), predicted IoU (P, M). All that predicts goes through here.

        image_embeddings (N, C, H, W); points: (coords (P, K, 2), labels (P, K)), boxes (P, 4), both in pixels of the
        scaled picture; masks (P, 1, 4H, 4W); image_index (P,): the picture that each prompt is for, not needed if N is
        1; shared: what `share` made of the picture, to save time. M is 3 with multimask_output, else 1.
        """
        sparse, dense = self.prompt_encoder(points, boxes, masks)
        at_once = max(1, TOKENS_AT_ONCE.get(self.device.type, 2**20) // dense[0, 0].numel())
        image_pe, parts = None if shared else self.prompt_encoder.get_dense_pe(), []
        for first in range(0, len(sparse), at_once):
            these = slice(first, first + at_once)
            image = image_embeddings  # of one picture for all prompts, or of one for each
            if image_index is not None:
                image = image[image_index[these]]
            elif len(image) > 1:
                image = image[these]
            parts.append(self.mask_decoder(image, image_pe, sparse[these], dense[these], multimask_output, shared))
        return tuple(torch.cat(part) for part in zip(*parts))

    def postprocess_masks(self, masks, input_size, original_size):
        """Low-resolution logits (P, M, 4H, 4W) -> logits (P, M, height, width) for the picture, its padding cut off.

        input_size: (height, width) of the scaled picture before padding; original_size: of the picture itself.
        """
        (height, width), side = input_size, self.image_encoder.img_size
        scale = functools.partial(F.interpolate, mode="bilinear", align_corners=False)
        times = side // masks.shape[-1]  # a pixel of the logits becomes so many, squared
        rows, columns = (min(side // times, -(-size // times) + 1) for size in input_size)  # the others are padding
        masks = scale(masks[..., :rows, :columns].float(), (rows * times, columns * times))[..., :height, :width]
        return masks if (height, width) == tuple(original_size) else scale(masks, original_size)

    def forward(self, batched_input, multimask_output):
        """The official batch form: a list of dicts, one per picture, -> a list of dicts.

        In: image (3, h, w), original_size (height, width), and any of point_coords (P, K, 2) with point_labels (P, K),
        boxes (P, 4), mask_inputs (P, 1, 4H, 4W); image and coordinates are scaled already (`ResizeLongestSide`).
        Out: masks (P, M, height, width) bool, iou_predictions (P, M), low_res_logits (P, M, 4H, 4W).
        """
        embeddings = self.image_encoder(torch.stack([self.preprocess(x["image"]) for x in batched_input]))
        outputs = []
        for x, embedding in zip(batched_input, embeddings):
            points = (x["point_coords"], x["point_labels"]) if "point_coords" in x else None
            prompts = points, x.get("boxes"), x.get("mask_inputs")
            low_res, scores = self.decode(embedding[None], *prompts, multimask_output)
            masks = self.postprocess_masks(low_res, x["image"].shape[-2:], x["original_size"]) > self.mask_threshold
            outputs.append(dict(masks=masks, iou_predictions=scores, low_res_logits=low_res))
        return outputs


def build_sam(backbone="vit_b", checkpoint=None, image_size=None):
    """A `Sam` in eval mode with the weights in `checkpoint` (a path), or random ones.

    image_size: the side in pixels of the square that the model sees, if not its own (1024; vit_t 128): a multiple of
    its patch. Less is faster and coarser. Raises ValueError for an unknown backbone or a size that does not fit,
    FileNotFoundError for a missing file, CheckpointError for a wrong one.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"unknown backbone {backbone!r}: choose one of {', '.join(BACKBONES)}")
    patch = BACKBONES[backbone]["patch"]
    if image_size is not None and not (2 * patch <= image_size <= 4096 and image_size % patch == 0):
        raise ValueError(f"image size {image_size} does not fit {backbone}: a multiple of {patch}, {2 * patch} to 4096")
    sam = Sam(backbone, image_size)
    if checkpoint is not None:
        sam.load_state_dict(resize_positions(read_checkpoint(checkpoint, backbone), sam.state_dict()), strict=True)
    return sam.eval()


def resize_positions(weights, like):
    """Weights whose positions, absolute and relative, are interpolated to the shapes in `like`, where these differ."""
    weights = dict(weights)
    for key, value in weights.items():
        shape = like[key].shape
        if value.shape != shape and value.dim() == 4:  # pos_embed (1, H, W, d)
            wide = F.interpolate(value.float().permute(0, 3, 1, 2), shape[1:3], mode="bicubic", antialias=True)
            weights[key] = wide.permute(0, 2, 3, 1)
        elif value.shape != shape:  # rel_pos (2 * size - 1, c) of the layers that attend over the whole picture
            weights[key] = F.interpolate(value.float().T[None], shape[0], mode="linear")[0].T
    return weights


sam_model_registry = {name: functools.partial(build_sam, name) for name in BACKBONES}  # the official notebooks' entry
sam_model_registry["default"] = sam_model_registry["vit_h"]


def read_checkpoint(path, backbone):
    """The state dict in `path`, checked against `backbone` key by key. Raises FileNotFoundError or CheckpointError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}: give an existing file with --checkpoint")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise CheckpointError(f"{path} is not a readable PyTorch weights file (cut off while downloading?): "
                              f"fetch it again ({reason})") from error
    position = weights.get("image_encoder.pos_embed") if isinstance(weights, dict) else None
    if not isinstance(position, torch.Tensor) or position.dim() != 4:
        raise CheckpointError(f"{path} is not a SAM checkpoint: it has no image_encoder.pos_embed with 4 dimensions")
    for key, value in weights.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise CheckpointError(f"{path}: {key} is not a tensor of floating-point numbers: not a SAM checkpoint")
    blocks = {key.split(".")[2] for key in weights if key.startswith("image_encoder.blocks.")}
    width, depth = position.shape[-1], len(blocks)
    found = {(sizes["d"], sizes["depth"]): name for name, sizes in BACKBONES.items()}.get((width, depth))
    if found != backbone:
        raise CheckpointError(f"{path} holds {found}, not {backbone}: say --backbone {found}" if found else
                              f"{path} holds an encoder of width {width} and depth {depth}, not {backbone}")
    with torch.device("meta"):
        expected = Sam(backbone).state_dict()
    lacking, unknown = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    for problem, keys in (("lacks", lacking), ("has the unknown key", unknown)):
        if keys:
            raise CheckpointError(f"{path} {problem} {min(keys)} ({len(keys)} such): not a checkpoint of {backbone}")
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            raise CheckpointError(f"{path}: {key} has shape {tuple(value.shape)}, "
                                  f"{backbone} needs {tuple(expected[key].shape)}")
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: {key} holds NaN or infinite values: fetch the file again")
    return weights


def find_checkpoint(backbone):
    """Path of the backbone's weights: in assets/, checkpoints/ or the torch hub cache, else downloaded to the cache."""
    name, here = FILES[backbone], os.path.dirname(os.path.abspath(__file__))
    cache = os.path.join(torch.hub.get_dir(), "checkpoints")
    for folder in (os.path.join(here, "assets"), "checkpoints", os.path.join(here, "checkpoints"), cache):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    if backbone == "vit_t":
        raise FileNotFoundError(f"assets/{name} is missing: it comes with this repository "
                                "(or make it: train.py --pretrain)")
    print(f"downloading {URL}{name} to {cache}", file=sys.stderr)
    try:
        os.makedirs(cache, exist_ok=True)  # download_url_to_file writes beside the target, verifies, then renames
        torch.hub.download_url_to_file(URL + name, os.path.join(cache, name), hash_prefix=name[-10:-4])
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise FileNotFoundError(f"could not download {name} ({error}): put {URL}{name} into checkpoints/") from error
    return os.path.join(cache, name)


# ---------------------------------------------------------------- prediction on one picture

class ResizeLongestSide:
    """Scales a picture, and coordinates on it, so that its longer side is `target_length` pixels."""

    def __init__(self, target_length):
        self.target_length = target_length

    def get_preprocess_shape(self, height, width):
        """(height, width) after scaling; halves round up, as in the official code."""
        scale = self.target_length / max(height, width)
        return int(height * scale + 0.5) or 1, int(width * scale + 0.5) or 1

    def apply_image(self, image):
        """uint8 HxWx3 -> uint8 hxwx3, by Pillow's antialiased bilinear filter as in the official code."""
        height, width = self.get_preprocess_shape(*image.shape[:2])
        if image.shape[:2] == (height, width):
            return image
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))

    def apply_image_torch(self, image):
        """float (N, 3, H, W) -> (N, 3, h, w), nearly as apply_image does it."""
        return F.interpolate(image, self.get_preprocess_shape(*image.shape[-2:]), mode="bilinear", antialias=True)

    def apply_coords(self, coords, original_size):
        """(..., 2) xy in pixels of the picture (array or tensor) -> in pixels of the scaled picture, float32."""
        height, width = original_size
        new_height, new_width = self.get_preprocess_shape(height, width)
        scale = new_width / width, new_height / height
        if isinstance(coords, torch.Tensor):
            return coords.float() * torch.tensor(scale, dtype=torch.float32, device=coords.device)
        return np.asarray(coords, dtype=np.float32) * np.array(scale, dtype=np.float32)

    def apply_boxes(self, boxes, original_size):
        """(n, 4) xyxy, likewise."""
        return self.apply_coords(boxes.reshape(-1, 2, 2), original_size).reshape(-1, 4)

    apply_coords_torch, apply_boxes_torch = apply_coords, apply_boxes  # the official names for tensors


class SamPredictor:
    """Encodes a picture once, then answers prompts on it. Methods, arguments and returns are the official class's."""

    def __init__(self, sam):
        self.model = sam
        self.transform = ResizeLongestSide(sam.image_encoder.img_size)
        self.reset_image()

    @property
    def device(self):
        return self.model.device

    def reset_image(self):
        """Forget the picture."""
        self.features = self.original_size = self.input_size = None
        self.is_image_set, self.shared = False, None

    def set_image(self, image, image_format="RGB"):
        """Encode a picture: uint8 HxWx3, channels in the order of image_format (RGB or BGR)."""
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format is {image_format!r}: choose RGB or BGR")
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"the image is {image.dtype} {image.shape}: set_image needs uint8 HxWx3 in 0..255")
        scaled = self.transform.apply_image(image if image_format == "RGB" else image[..., ::-1].copy())
        x = torch.tensor(scaled, device=self.device).permute(2, 0, 1)[None]  # uint8: a quarter of the bytes to the GPU
        self.set_torch_image(x, image.shape[:2])

    @torch.no_grad()
    def set_torch_image(self, transformed_image, original_image_size):
        """Encode a picture given as (1, 3, h, w) in 0..255, already scaled; original_image_size is (height, width)."""
        if transformed_image.ndim != 4 or max(transformed_image.shape[2:]) != self.transform.target_length:
            raise ValueError(f"the image is {tuple(transformed_image.shape)}: set_torch_image needs (1, 3, h, w) "
                             f"with a longer side of {self.transform.target_length}")
        self.reset_image()
        self.original_size, self.input_size = tuple(original_image_size), tuple(transformed_image.shape[-2:])
        self.features = self.model.image_encoder(self.model.preprocess(transformed_image))
        self.is_image_set = True

    def predict(self, point_coords=None, point_labels=None, box=None, mask_input=None,
                multimask_output=True, return_logits=False):
        """Masks for one prompt, as NumPy arrays.

        point_coords (K, 2) xy in pixels of the picture; point_labels (K,) 1 object, 0 background; box (4,) xyxy;
        mask_input (1, 4H, 4W), one of an earlier call's low_res_logits. Returns masks (M, height, width), bool or with
        return_logits float32, predicted IoU (M,), low_res_logits (M, 4H, 4W); M is 3 with multimask_output, else 1.
        Raises RuntimeError before set_image, ValueError for prompts that make no sense.
        """
        self.get_image_embedding()  # raises before set_image
        coords = labels = boxes = masks = None
        if (point_coords is None) != (point_labels is None):
            raise ValueError("point_coords and point_labels go together: give both or none")
        if point_coords is not None:
            coords = _tensor("point_coords", point_coords, (None, 2), self.device)
            labels = _tensor("point_labels", point_labels, (len(coords),), self.device)
            if not torch.isin(labels, labels.new_tensor([-1, 0, 1])).all():
                raise ValueError(f"point_labels are {labels.tolist()}: use 1 for the object and 0 for the background")
            coords, labels = self.transform.apply_coords(coords, self.original_size)[None], labels.long()[None]
        if box is not None:
            boxes = _tensor("box", np.reshape(box, -1), (4,), self.device)
            boxes = self.transform.apply_boxes(boxes, self.original_size)
        if mask_input is not None:
            side = 4 * self.model.prompt_encoder.size
            masks = _tensor("mask_input", mask_input, (1, side, side), self.device)[None]
        masks, scores, low_res = self.predict_torch(coords, labels, boxes, masks, multimask_output, return_logits)
        return masks[0].cpu().numpy(), scores[0].float().cpu().numpy(), low_res[0].float().cpu().numpy()

    @torch.no_grad()
    def predict_torch(self, point_coords, point_labels, boxes=None, mask_input=None,
                      multimask_output=True, return_logits=False):
        """Masks for P prompts at once. Tensors on the model's device, coordinates already scaled (`transform.apply_*`).

        point_coords (P, K, 2), point_labels (P, K), boxes (P, 4), mask_input (P, 1, 4H, 4W); any may be None.
        Returns masks (P, M, height, width), scores (P, M), low_res_logits (P, M, 4H, 4W).
        """
        features = self.get_image_embedding()
        shared = self.share() if mask_input is None else None
        points = None if point_coords is None else (point_coords, point_labels)
        low_res, scores = self.model.decode(features, points, boxes, mask_input, multimask_output, shared=shared)
        masks = []  # some prompts at a time, on the CPU one, since logits of full size are large
        for part in low_res.split(1 if self.device.type == "cpu" else 32):
            part = self.model.postprocess_masks(part, self.input_size, self.original_size)
            masks.append(part if return_logits else part > self.model.mask_threshold)
        return join(masks), scores, low_res

    def share(self):
        """`Sam.share` of the picture, made anew when its features, the decoder's weights or autocast's dtype change."""
        first, kind = self.model.mask_decoder.transformer.layers[0], self.device.type
        made_of = (self.features, *self.model.prompt_encoder.parameters(), *first.parameters())
        state = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in made_of]
        state += [torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)]
        if self.shared is None or self.shared[0] is not self.features or self.shared[1] != state:
            self.shared = self.features, state, self.model.share(self.features)
        return self.shared[2]

    def get_image_embedding(self):
        """The picture's embedding (1, C, H, W). RuntimeError before set_image."""
        if not self.is_image_set:
            raise RuntimeError("no image yet: call set_image(image) first")
        return self.features


def _tensor(name, value, shape, device):
    """`value` as a finite float32 tensor of `shape` (None: any length), or a ValueError that names it."""
    value = value.detach() if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value, dtype=np.float32))
    value = value.to(device, torch.float32)
    if value.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, value.shape)):
        raise ValueError(f"{name} has shape {tuple(value.shape)}: it should be {shape}".replace("None", "K"))
    if not value.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite values")
    return value


def keep_freed_memory():
    """Have the C library keep what is freed for the next time: otherwise it gives big pieces back to the system, and
    every new page costs a fault: on a CPU up to a third of the mask decoder's time. Only glibc has these settings."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: its largest value, 32 MiB
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


@contextlib.contextmanager
def foreign(flag, spec):
    """Somebody else's code runs within: whatever it raises becomes a ValueError that says where."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{flag} {spec}: {type(error).__name__}: {error}") from error


def from_file(spec, flag):
    """What "FILE.py:NAME" names: somebody's own code, for the command line's `flag`. ValueError in one line."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not os.path.isfile(path):
        raise ValueError(f"{flag} {spec}: there is no such file; say FILE.py:NAME")
    module_spec = importlib.util.spec_from_file_location(os.path.basename(path)[:-3], path)
    module = importlib.util.module_from_spec(module_spec)
    folder = os.path.dirname(os.path.abspath(path))
    sys.path.insert(0, folder)  # as if it were run: it finds the files beside it
    try:
        with foreign(flag, spec):
            module_spec.loader.exec_module(module)
            return getattr(module, name)
    finally:
        sys.path.remove(folder)  # not the first entry: the file may have added its own


# ---------------------------------------------------------------- python sam.py photo.jpg --point 500,375

def draw_overlay(image, mask, points, labels, box):
    """A Pillow image: the picture, the mask tinted and outlined, the box, points green (object) or red (background)."""
    line = max(2, round(max(image.shape[:2]) / 400))
    solid = Image.fromarray(mask).convert("L")
    outline = ImageChops.difference(solid.filter(ImageFilter.MaxFilter(2 * line + 1)), solid)
    picture = Image.fromarray(image)
    picture.paste(Image.blend(picture, Image.new("RGB", picture.size, (30, 144, 255)), 0.5), mask=solid)
    picture.paste("white", mask=outline.filter(ImageFilter.GaussianBlur(0.5)))
    pen = ImageDraw.Draw(picture)
    if box is not None:
        pen.rectangle(box, outline=(255, 200, 0), width=line)
    for (x, y), label in zip(points, labels):
        colour = (40, 170, 60) if label else (215, 40, 40)
        pen.circle((x, y), 4 * line, fill=colour, outline="white", width=line)
    return picture


def main(argv=None):
    """Segment one picture from the command line; returns the exit code. A user's mistake ends in one line."""
    from data import DatasetError, read_image, save_png  # here, so that the model itself needs no other file
    from gara import load_adapter, read_adapter

    def numbers(text):
        return tuple(float(value) for value in text.split(","))

    parser = argparse.ArgumentParser(description="Segment an object of a picture from points and a box.")
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    add = parser.add_argument
    add("picture")
    add("--point", type=numbers, action="append", default=[], metavar="X,Y[,0]",
        help="a pixel of the object, or with ,0 of the background; repeat for more")
    add("--box", type=numbers, metavar="X0,Y0,X1,Y1")
    add("--backbone", choices=BACKBONES, default="vit_b")
    add("--checkpoint", help="SAM weights; default: assets/, checkpoints/, the torch hub cache, else downloaded")
    add("--adapter", help="an adapter file that train.py wrote")
    add("--out", default="overlay.png", help="PNG with the mask drawn on the picture (default overlay.png)")
    add("--mask", help="also write the mask alone: a PNG, 255 inside, 0 outside")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    keep_freed_memory()
    if not args.point and args.box is None:
        parser.error("say what to segment: --point X,Y or --box X0,Y0,X1,Y1")
    if any(len(point) not in (2, 3) for point in args.point) or len(args.box or range(4)) != 4:
        parser.error("--point takes 2 or 3 numbers (X,Y or X,Y,0), --box takes 4 (X0,Y0,X1,Y1)")
    try:
        for path in filter(None, (args.out, args.mask)):
            if not os.path.isdir(os.path.dirname(path) or "."):
                raise ValueError(f"cannot write {path}: there is no folder {os.path.dirname(path)}")
        image = read_image(args.picture)
        height, width = image.shape[:2]
        corners = [args.box[:2], args.box[2:]] if args.box else []
        for k, (x, y, *_) in enumerate(args.point + corners):
            rim = int(k >= len(args.point))  # a box may end where the picture does
            if not (0 <= x < width + rim and 0 <= y < height + rim):
                raise ValueError(f"{x:g},{y:g} lies outside {args.picture}, which is {width} wide and {height} high")
        if args.box and not (args.box[0] < args.box[2] and args.box[1] < args.box[3]):
            raise ValueError(f"--box {','.join(f'{v:g}' for v in args.box)}: needs x0 < x1 and y0 < y1")
        size = read_adapter(args.adapter)["image_size"] if args.adapter else None
        sam = build_sam(args.backbone, args.checkpoint or find_checkpoint(args.backbone), size).to(args.device)
        if args.adapter:
            load_adapter(sam, args.adapter)
        predictor = SamPredictor(sam)
        predictor.set_image(image)
        coords, labels = [p[:2] for p in args.point], [p[2] if len(p) == 3 else 1 for p in args.point]
        ambiguous = len(coords) == 1 and args.box is None  # the best of three masks then
        masks, scores, _ = predictor.predict(coords or None, labels or None, args.box, multimask_output=ambiguous)
        best = int(scores.argmax())
        save_png(draw_overlay(image, masks[best], coords, labels, args.box), args.out)
        if args.mask:
            save_png(Image.fromarray(masks[best]).convert("L"), args.mask)
    except (DatasetError, ValueError, OSError, RuntimeError, AssertionError) as error:  # the last: torch without CUDA
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(f"{args.out}: {masks[best].sum():,} pixels, {masks[best].mean():.1%} of the picture, "
          f"predicted IoU {scores[best]:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
