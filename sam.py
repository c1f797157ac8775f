"""The Segment Anything Model (SAM) in one file: it reads the official checkpoints and gives the official numbers.

SAM answers "which object is meant?" for an image and a prompt, in three parts (sizes of the official models):

    ImageEncoder    a Vision Transformer; runs once per image          (N, 3, 1024, 1024) -> (N, 256, 64, 64)
    PromptEncoder   points, boxes and masks become tokens; fast        prompts -> (P, T, 256), (P, 256, 64, 64)
    MaskDecoder     two transformer layers, tokens and image           -> masks (P, 1 or 3, 256, 256), their scores

`Sam` holds the three, `SamPredictor` has the official class's methods (one image, many prompts), and

    python sam.py photo.jpg --point 500,375 --out overlay.png --mask mask.png
    python sam.py photo.jpg --everything --out sheet.png --json masks.json

segment from the command line, the latter with `SamAutomaticMaskGenerator`. Parameter names are the official code's
(github.com/facebookresearch/segment-anything). Letters in shape comments: N images, P prompts (each belongs to one
image), K points and T tokens of a prompt, H x W tokens of an image, d channels of the encoder, C channels of the
decoder, c channels of a head, M masks of a prompt.

Where the code differs from the official one, the numbers don't (README, "Exactness"). Each faster form says which
plain one it equals, and a test compares the two:

    Attention              multiplies by `qkv` and `proj` before windows are padded, and never holds all scores
    RecomputedAttention    `attention` in training, of which nothing of n x n is kept
    attention_for_gpus     `attention` by PyTorch's fused kernels
    DecoderAttention       tokens, not the image, pass through the projections
    MaskDecoder.upscale    transposed convolutions as linear layers
    linear                 float32 matrix products on a CPU by oneDNN
"""
import argparse
import contextlib
import ctypes
import dataclasses
import functools
import glob
import http.client
import importlib.util
import json
import math
import os
import pickle
import re
import socket
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

# Sizes of each model. `global_layers` attend over the whole image, the others within windows; images are scaled and
# padded to a square of side `image_size`; `C` is the width of prompt tokens and mask decoder, `mlp` its hidden width.
OFFICIAL = dict(window=14, image_size=1024, patch=16, C=256, mlp=2048)
TINY = dict(window=8, image_size=128, patch=8, C=128, mlp=512)
BACKBONES = {
    "vit_t": dict(d=160, depth=6, heads=5, global_layers=(1, 3, 5), **TINY),
    "vit_b": dict(d=768, depth=12, heads=12, global_layers=(2, 5, 8, 11), **OFFICIAL),
    "vit_l": dict(d=1024, depth=24, heads=16, global_layers=(5, 11, 17, 23), **OFFICIAL),
    "vit_h": dict(d=1280, depth=32, heads=16, global_layers=(7, 15, 23, 31), **OFFICIAL),
}

# The official files; the six digits are the first of the file's SHA-256. vit_t is this project's own and comes with it.
FILES = {
    "vit_t": "sam_vit_t.pth",
    "vit_b": "sam_vit_b_01ec64.pth",
    "vit_l": "sam_vit_l_0b3195.pth",
    "vit_h": "sam_vit_h_4b8939.pth",
}
URL = "https://dl.fbaipublicfiles.com/segment_anything/"

# How much is taken at a time, by kind of device; found by trying powers of two with vit_b on two cores of an AMD EPYC
# (what fits its caches); on a GPU, where nothing was measured yet, it is what a few GB hold.
ENCODED_AT_ONCE = {"cpu": 2**10}                # image tokens in the encoder's feed-forward layers, over all images
SCORES_AT_ONCE = {"cpu": 2**21, "cuda": 2**26}  # attention scores in the encoder: queries x keys, over all heads
TOKENS_AT_ONCE = {"cpu": 2**13, "cuda": 2**20}  # image tokens in the mask decoder, over all prompts
MASKS_AT_ONCE = {"cpu": 1, "cuda": 32}          # prompts whose masks are at the image's own size, in SamPredictor


class CheckpointError(ValueError):
    """A weights file that is unreadable, foreign or for another model. The message is one line and says which."""


# What zipfile and torch.load raise on a file that is damaged or none.
UNREADABLE = (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError, AttributeError,
              IndexError, OverflowError, OSError, zipfile.BadZipFile, zlib.error, struct.error)


# ---------------------------------------------------------------- matrix products, where most of SAM's time goes
# PyTorch multiplies float32 matrices on a CPU by MKL. It also carries oneDNN, as exact and faster: 1.2 to 1.5 times on
# an AMD EPYC (README, "What it costs"). `torch.ops.mkldnn._linear_pointwise`, the call that torch.compile makes, is
# private: it is tried once, and neither autograd nor tracing sees through it.

def onednn_serves(x):
    """Whether oneDNN multiplies x: float32 on a CPU where it would be MKL, and nothing but the value is asked for.

    `torch.backends.mkldnn.enabled = False` leaves it to MKL.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() == 0:
        return False
    if torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.enabled:
        return False
    return onednn_agrees() and not transformed()


@functools.cache
def onednn_agrees():
    """Whether this PyTorch has MKL and oneDNN, and the latter's product is that of F.linear. Asked once."""
    if not torch.backends.mkl.is_available():
        return False
    x = torch.arange(12, dtype=torch.float32, device="cpu").view(3, 4)
    weight, bias = x[:2], x[2, :2]
    try:
        transformed()  # its two names are private as well
        found = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "none")
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(found, F.linear(x, weight, bias))


def transformed():
    """Whether torch.func or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def linear(x, weight, bias=None):
    """F.linear: x W^T + b for x (..., i), W (o, i) and b (o,) -> (..., o), by oneDNN where that may be."""
    if not onednn_serves(x):
        return F.linear(x, weight, bias)
    if not (weight.is_contiguous() or weight.mT.is_contiguous()):
        weight = weight.contiguous()  # with gaps between its rows it takes 500 times as long
    if bias is not None:
        bias = bias.contiguous()  # gaps would not be seen
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "none")


def products(a, b):
    """a @ b.mT: a (U, m, K), b (U or 1, n, K) -> (U, m, n), by `linear` if there is one b."""
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
        x = x.permute(0, 2, 3, 1)
        return super().forward(x).permute(0, 3, 1, 2)


class MLPBlock(nn.Sequential):
    """Linear, activation, linear: the feed-forward half of a transformer layer."""

    def __init__(self, width, hidden, activation):
        lin1, lin2 = Linear(width, hidden), Linear(hidden, width)
        super().__init__(OrderedDict(lin1=lin1, act=activation, lin2=lin2))


def join(parts, dim=0):
    """torch.cat, which would copy a single part."""
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


# ---------------------------------------------------------------- image encoder

def attention(q, k, v, bias_h, bias_w):
    """softmax(q k^T / sqrt(c) + bias) v, where the bias of a query for key (y, x) is bias_h[..., y] + bias_w[..., x].

    For U heads of windows of S x S keys, and Q queries: q (U, Q, c), k and v (U, S * S, c), bias_h and bias_w (U, Q, S)
    -> (U, Q, c).
    """
    shares = attention_shares(q, k, bias_h, bias_w)
    return products(shares.to(v.dtype), v.mT)


def attention_shares(q, k, bias_h, bias_w):
    """The softmax alone: (U, Q, S * S), in float32 at least."""
    S = bias_h.shape[-1]
    scores = products(q * q.shape[-1] ** -0.5, k)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.unflatten(-1, (S, S))
    scores += bias_h[..., :, None]
    scores += bias_w[..., None, :]
    return scores.flatten(-2).softmax(-1)


class RecomputedAttention(torch.autograd.Function):
    """`attention` that keeps its arguments alone for the backward pass, and makes the shares P = softmax(S) again.

    With dX for the loss's gradient of X, and sums over keys:

        out = P v                      dP = dout v^T    dv = P^T dout
        P = softmax(S)                 dS = P * (dP - sum of P * dP)
        S = q k^T / sqrt(c) + bias     dq = dS k / sqrt(c)    dk = dS^T q / sqrt(c)
                                       dbias_h, dbias_w: sums of dS over a row of keys, over a column
    """

    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments)
        return attention(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # (U, Q, c)
        q, k, v, bias_h, bias_w = ctx.saved_tensors
        P = attention_shares(q, k, bias_h, bias_w)  # (U, Q, S * S)
        dv = products(dout.mT, P.to(v.dtype).mT).mT
        dS = P * products(dout, v)
        dS.addcmul_(P, dS.sum(-1, keepdim=True), value=-1)

        by_row_and_column = dS.unflatten(-1, bias_h.shape[-1:] * 2)
        dbias_h = by_row_and_column.sum(-1).to(bias_h.dtype)
        dbias_w = by_row_and_column.sum(-2).to(bias_w.dtype)
        dS = dS.to(q.dtype)
        scale = q.shape[-1] ** -0.5
        dq = products(dS, k.mT) * scale
        dk = products(q.mT * scale, dS.mT).mT
        return dq, dk, dv, dbias_h, dbias_w


def attention_for_gpus(q, k, v, bias_h, bias_w):
    """`attention` by PyTorch's fused kernels, which never store the scores."""
    bias = bias_h[..., :, None] + bias_w[..., None, :]
    bias = bias.flatten(-2)  # (U, Q, S * S)
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=bias[None])
    return out[0]


def relative_positions(table, size):
    """(2 * size - 1, c) learned vectors, one per offset -> (size, size, c): [i, j] is the vector of offset i - j."""
    index = torch.arange(size, device=table.device)
    return table[index[:, None] - index[None, :] + size - 1]


class Attention(nn.Module):
    """Multi-head self-attention within windows or, with window=0, over the whole image.

    Relative positions are decomposed: how far down and how far right of a key its query lies, scored apart.

    The official code cuts windows out of x, padded with zeros, and applies `qkv` and `proj` to these: 70 x 70 tokens of
    a 64 x 64 image. Both treat each token by itself, so here they run on the image's own tokens; `qkv` turns zeros into
    its bias, with which windows are padded here. Scores are made and used in pieces.
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
        N, H, W, d = x.shape
        S = self.window or H  # side of the square within which tokens attend
        ny, nx = -(-H // S), -(-W // S)  # squares down and across; the last may reach beyond the image

        qkv = self.qkv(x)  # (N, H, W, 3d)
        if (ny * S, nx * S) != (H, W):
            padding = self.qkv.bias.to(qkv.dtype)
            padded = padding.expand(N, ny * S, nx * S, -1).clone()
            padded[:, :H, :W] = qkv
            qkv = padded
        qkv = qkv.view(N, ny, S, nx, S, 3, self.heads, -1)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)  # (3, N, ny, nx, heads, S, S, c)
        q, k, v = qkv.flatten(1, 4)  # (U, S, S, c) each: U heads of windows

        x = self.in_pieces(q, k, v)  # (U, S * S, c)
        x = x.view(N, ny, nx, self.heads, S, S, -1)
        x = x.permute(0, 1, 4, 2, 5, 3, 6)  # (N, ny, S, nx, S, heads, c)
        x = x.reshape(N, ny * S, nx * S, d)
        return self.proj(x[:, :H, :W].contiguous())

    def in_pieces(self, q, k, v):  # (U, S, S, c) three times -> (U, S * S, c)
        """Some heads of windows at a time, and where a single one has too many scores, some of its queries."""
        S, attend = q.shape[1], attention
        if q.device.type != "cpu":
            attend = attention_for_gpus
        elif torch.is_grad_enabled() and not transformed():
            attend = RecomputedAttention.apply

        most = SCORES_AT_ONCE.get(q.device.type, 2**22)
        queries = min(S * S, max(1, most // S**2))
        heads = max(1, most // (queries * S**2))
        down = relative_positions(self.rel_pos_h, S).to(q.dtype)  # (S, S, c)
        right = relative_positions(self.rel_pos_w, S).to(q.dtype)

        pieces = []
        for q, k, v in zip(q.split(heads), k.split(heads), v.split(heads)):
            bias_h = torch.einsum("uyxc,ykc->uyxk", q, down).flatten(1, 2)  # (u, S * S, S)
            bias_w = torch.einsum("uyxc,xkc->uyxk", q, right).flatten(1, 2)
            q = q.flatten(1, 2)  # (u, S * S, c), and so are k and v
            k = k.flatten(1, 2)
            v = v.flatten(1, 2)
            attended = []
            for some in zip(q.split(queries, 1), bias_h.split(queries, 1), bias_w.split(queries, 1)):
                some_q, *biases = some
                attended.append(attend(some_q, k, v, *biases))
            pieces.append(join(attended, 1))
        return join(pieces)


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
    """A ViT, most of whose layers attend within windows and a few over the whole image, and a convolutional neck."""

    def __init__(self, d, depth, heads, global_layers, window, image_size, patch, C):
        super().__init__()
        self.img_size = image_size
        size = image_size // patch
        patches = nn.Conv2d(3, d, kernel_size=patch, stride=patch)
        self.patch_embed = nn.Sequential(OrderedDict(proj=patches))
        self.pos_embed = nn.Parameter(torch.zeros(1, size, size, d))
        self.blocks = nn.ModuleList()
        for layer in range(depth):
            self.blocks.append(Block(d, heads, 0 if layer in global_layers else window, size))
        self.neck = nn.Sequential(
            nn.Conv2d(d, C, kernel_size=1, bias=False),
            LayerNorm2d(C),
            nn.Conv2d(C, C, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(C),
        )

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

    def forward(self, xy):  # (..., 2) in [0, 1], float32 -> (..., 2 * features) in the model's dtype
        matrix = self.positional_encoding_gaussian_matrix
        with torch.autocast(xy.device.type, enabled=False):  # bfloat16 would blur positions to a few pixels
            angle = 2 * torch.pi * ((2 * xy - 1) @ matrix.to(xy.dtype))
            return torch.cat([angle.sin(), angle.cos()], dim=-1).to(matrix.dtype)

    _pe_encoding = forward  # the official name


class PromptEncoder(nn.Module):
    """Points and boxes become sparse tokens (P, T, C), masks a dense map (P, C, H, W) to be added to the image's.

    Labels of points: 1 object, 0 background, -1 no point (fills prompts up to one length).
    """

    def __init__(self, C, size, image_size):
        super().__init__()
        self.C, self.size, self.image_size = C, size, image_size
        self.embed_dim, self.num_point_embeddings = C, 4  # these and the next three are the official names
        self.image_embedding_size = size, size
        self.input_image_size = image_size, image_size
        self.mask_input_size = 4 * size, 4 * size
        self.pe_layer = PositionEmbeddingRandom(C // 2)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, C) for _ in range(4))  # background, object, box corners
        self.not_a_point_embed = nn.Embedding(1, C)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, 4, kernel_size=2, stride=2),
            LayerNorm2d(4),
            nn.GELU(),
            nn.Conv2d(4, 16, kernel_size=2, stride=2),
            LayerNorm2d(16),
            nn.GELU(),
            nn.Conv2d(16, C, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, C)

    def get_dense_pe(self):
        """Positional encoding of every token of the image: (1, C, H, W)."""
        index = torch.arange(self.size, device=self.no_mask_embed.weight.device)
        centre = (index + 0.5) / self.size
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        xy = torch.stack([x, y], dim=-1)
        return self.pe_layer(xy).permute(2, 0, 1)[None]

    def embed_coords(self, coords, labels):
        """Pixels (P, K, 2) of the scaled image and labels (P, K) -> (P, K, C). Labels 2 and 3 are the box corners."""
        positions = self.pe_layer((coords + 0.5) / self.image_size)  # + 0.5: the centre of the pixel
        positions = positions.masked_fill(labels[..., None] < 0, 0)  # "no point" has no position
        meanings = [self.not_a_point_embed.weight, *(embedding.weight for embedding in self.point_embeddings)]
        return positions + torch.cat(meanings)[labels + 1]

    def forward(self, points, boxes, masks):
        """points: (coords (P, K, 2), labels (P, K)); boxes (P, 4) xyxy; masks (P, 1, 4H, 4W) logits; each may be None.

        As in the official code, points without a box get one "no point" token more, where the box would be.
        """
        no_mask, coords, labels = self.no_mask_embed.weight, [], []
        if points is not None:
            point_coords, point_labels = points
            extra = int(boxes is None)
            coords.append(F.pad(point_coords.float(), (0, 0, 0, extra)))
            labels.append(F.pad(point_labels.long(), (0, extra), value=-1))
        if boxes is not None:
            corners = torch.tensor([2, 3], device=no_mask.device)
            coords.append(boxes.float().reshape(-1, 2, 2))
            labels.append(corners.expand(len(boxes), 2))

        if coords:
            sparse = self.embed_coords(torch.cat(coords, 1), torch.cat(labels, 1))
        else:
            sparse = no_mask.new_empty(1 if masks is None else len(masks), 0, self.C)
        if masks is not None:
            return sparse, self.mask_downscaling(masks.to(no_mask.dtype))
        dense = no_mask.view(1, -1, 1, 1)
        return sparse, dense.expand(len(sparse), -1, self.size, self.size)


# ---------------------------------------------------------------- mask decoder

class DecoderAttention(nn.Module):
    """Multi-head attention whose inner width may be smaller than its outer width.

    `forward` is the plain form. Between a few tokens and the whole image, projecting the image is what costs. But
    (W t) . (V p) = (V^T W t) . p for a token t and a pixel p: tokens can pass through both projections and the image
    through none. With 7 tokens and 8 heads that is less than half the work, and nothing else is as large as the image.
    """

    def __init__(self, C, heads, downsample=1):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(C, C // downsample)
        self.k_proj = nn.Linear(C, C // downsample)
        self.v_proj = nn.Linear(C, C // downsample)
        self.out_proj = nn.Linear(C // downsample, C)

    def forward(self, q, k, v):  # (P, Q, C), (P, K, C), (P, K, C) -> (P, Q, C)
        q = self.split(self.q_proj(q))
        k = self.split(self.k_proj(k))
        v = self.split(self.v_proj(v))
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (P, heads, Q, K)
        out = scores.softmax(-1).to(v.dtype) @ v  # (P, heads, Q, c)
        return self.out_proj(self.merge(out))

    def split(self, x):  # (P, T, heads * c) -> (P, heads, T, c)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def merge(self, x):  # (P, heads, T, c) -> (P, T, heads * c)
        return x.transpose(1, 2).flatten(2)

    def weights(self, projection):
        """A projection's weight and bias by heads: (heads, c, C) and (heads, 1, c)."""
        weight = projection.weight.unflatten(0, (self.heads, -1))
        return weight, projection.bias.unflatten(0, (self.heads, 1, -1))

    def tokens_to_image(self, q, k, v):
        """`forward` for tokens q (P, T, C) and, as keys and values, an image (P or 1, HW, C) -> (P, T, C)."""
        to_k, _ = self.weights(self.k_proj)  # its bias would move all scores of a token alike
        to_v, bias = self.weights(self.v_proj)
        q = self.split(self.q_proj(q))
        q = (q * q.shape[-1] ** -0.5) @ to_k  # (P, heads, T, C)
        scores = products(q.flatten(1, 2), k)  # (P, heads * T, HW)
        seen = products(scores.softmax(-1).to(q.dtype), v.mT)
        seen = seen.unflatten(1, (self.heads, -1))  # (P, heads, T, C)
        return self.out_proj(self.merge(seen @ to_v.mT + bias))

    def image_to_tokens(self, image, q, k, v):
        """image + `forward` for an image's queries q (P or 1, HW, C) and tokens k, v (P, T, C) -> (P, HW, C)."""
        k = self.split(self.k_proj(k))
        v = self.split(self.v_proj(v))
        k = k * k.shape[-1] ** -0.5
        to_q, bias = self.weights(self.q_proj)
        scores = products((k @ to_q).flatten(1, 2), q)
        scores = scores.unflatten(1, (self.heads, -1)) + k @ bias.mT  # (P, heads, T, HW)
        shares = scores.softmax(2).to(v.dtype)  # over T
        shares = shares.flatten(1, 2).mT  # (P, HW, heads * T)

        out = self.out_proj.weight.unflatten(1, (self.heads, -1)).permute(1, 2, 0)  # (heads, c, C)
        v = v @ out  # (P, heads, T, C)
        v = v + self.out_proj.bias / self.heads  # here, not on every pixel: the shares of each head add up to 1
        return torch.baddbmm(image, shares, v.flatten(1, 2))  # the sum is no pass of its own over the image


class TwoWayAttentionBlock(nn.Module):
    """Tokens attend to themselves, tokens to the image, an MLP on the tokens, the image to the tokens."""

    def __init__(self, C, heads, mlp, first):
        super().__init__()
        self.first = first  # the first layer's self-attention adds neither positions nor a residual
        self.self_attn = DecoderAttention(C, heads)
        self.norm1 = nn.LayerNorm(C)
        self.cross_attn_token_to_image = DecoderAttention(C, heads, downsample=2)
        self.norm2 = nn.LayerNorm(C)
        self.mlp = MLPBlock(C, mlp, nn.ReLU())
        self.norm3 = nn.LayerNorm(C)
        self.norm4 = nn.LayerNorm(C)
        self.cross_attn_image_to_token = DecoderAttention(C, heads, downsample=2)

    def forward(self, tokens, token_pe, image, image_pe):
        """Tokens (P, T, C) and the image (P or 1, HW, C), each with positions -> tokens and image (P, HW, C) anew."""
        places = image + image_pe
        q = tokens if self.first else tokens + token_pe
        attended = self.self_attn(q, q, tokens)
        tokens = self.norm1(attended if self.first else tokens + attended)

        attended = self.cross_attn_token_to_image.tokens_to_image(tokens + token_pe, places, image)
        tokens = self.norm2(tokens + attended)

        tokens = self.norm3(tokens + self.mlp(tokens))

        image = self.cross_attn_image_to_token.image_to_tokens(image, places, tokens + token_pe, tokens)
        return tokens, self.norm4(image)


class TwoWayTransformer(nn.Module):
    """Two such layers and a last look of the tokens at the image. What the tokens are at first is their position."""

    def __init__(self, C, heads, mlp, depth=2):
        super().__init__()
        self.layers = nn.ModuleList()
        for layer in range(depth):
            self.layers.append(TwoWayAttentionBlock(C, heads, mlp, first=layer == 0))
        self.final_attn_token_to_image = DecoderAttention(C, heads, downsample=2)
        self.norm_final_attn = nn.LayerNorm(C)

    def forward(self, image, image_pe, token_pe):
        """(P or 1, HW, C), (1, HW, C), (P, T, C) -> tokens (P, T, C), image (P, HW, C)."""
        tokens = token_pe
        for layer in self.layers:
            tokens, image = layer(tokens, token_pe, image, image_pe)
        attended = self.final_attn_token_to_image.tokens_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + attended), image


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths):
        super().__init__()
        pairs = zip(widths, widths[1:])
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairs)

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class MaskDecoder(nn.Module):
    """Image and prompt -> four masks, one for a clear prompt and three for an ambiguous one, and their predicted IoU.

    Tokens and image attend to each other; then each mask's token becomes a 1x1 convolution over the upscaled image.
    """

    num_mask_tokens = 4

    def __init__(self, C, mlp):
        super().__init__()
        self.transformer = TwoWayTransformer(C, heads=8, mlp=mlp)
        self.iou_token = nn.Embedding(1, C)
        self.mask_tokens = nn.Embedding(4, C)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(C, C // 4, kernel_size=2, stride=2),
            LayerNorm2d(C // 4),
            nn.GELU(),
            nn.ConvTranspose2d(C // 4, C // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(C, C, C, C // 8) for _ in range(4))
        self.iou_prediction_head = MLP(C, 256, 256, 4)

    def forward(self, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, multimask_output):
        """Embeddings (1 or P, C, H, W), positions (1, C, H, W), prompts (P, T, C) and (1 or P, C, H, W) -> logits
        (P, M, 4H, 4W) and predicted IoU (P, M): of an ambiguous prompt's three masks, or the one of a clear prompt."""
        masks, scores = self.predict_masks(image_embeddings, image_pe, sparse_prompt_embeddings,
                                           dense_prompt_embeddings)
        wanted = slice(1, 4) if multimask_output else slice(1)
        return masks[:, wanted], scores[:, wanted]

    def predict_masks(self, image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings):
        """All four masks, as training from scratch needs them: (P, 4, 4H, 4W), and their predicted IoU (P, 4)."""
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])  # (5, C)
        output_tokens = output_tokens.expand(len(sparse_prompt_embeddings), -1, -1)
        tokens = torch.cat([output_tokens, sparse_prompt_embeddings], dim=1)  # (P, 5 + T, C)
        image = image_embeddings + dense_prompt_embeddings
        tokens, pixels = self.transformer(image.flatten(2).mT.contiguous(), image_pe.flatten(2).mT, tokens)

        iou_token, mask_tokens = tokens[:, 0], tokens[:, 1:5]
        kernels = [mlp(mask_tokens[:, k]) for k, mlp in enumerate(self.output_hypernetworks_mlps)]
        masks = self.upscale(pixels, torch.stack(kernels, dim=1))
        return masks, self.iou_prediction_head(iou_token)

    def upscale(self, pixels, kernels):
        """`output_upscaling` of pixels (P, HW, C), multiplied by kernels (P, M, C / 8) -> masks (P, M, 4H, 4W).

        Every pixel becomes 2 x 2, and each of these again. A transposed convolution whose kernel is as large as its
        stride is a linear layer on each pixel. What it makes of a pixel stays together here; the pixels are brought in
        order when only the masks are left.
        """
        first, norm, gelu, second, _ = self.output_upscaling
        x = self.fourfold(first, pixels)  # (P, 4 HW, C / 4)
        x = gelu(F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps))
        x = gelu(self.fourfold(second, x))  # (P, 16 HW, C / 8)
        masks = products(x, kernels)  # (P, 16 HW, M)

        P, M, side = len(pixels), kernels.shape[1], math.isqrt(pixels.shape[1])
        masks = masks.view(P, side, side, 2, 2, 2, 2, M)
        masks = masks.permute(0, 7, 1, 3, 5, 2, 4, 6)  # (P, M, H, 2, 2, W, 2, 2)
        return masks.reshape(P, M, 4 * side, 4 * side)

    def fourfold(self, conv, x):  # (P, pixels, in) -> (P, 4 pixels, out)
        weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (4 out, in)
        x = linear(x, weight, conv.bias.repeat(4))
        return x.unflatten(-1, (4, -1)).flatten(1, 2)


# ---------------------------------------------------------------- the whole model, and its weights

class Sam(nn.Module):
    """Image encoder, prompt encoder and mask decoder. Gradients flow: only `SamPredictor` runs without them."""

    mask_threshold = 0.0  # a pixel belongs to the mask where its logit is above this
    image_format = "RGB"  # what `preprocess` takes

    def __init__(self, backbone, image_size=None):
        super().__init__()
        self.backbone = backbone
        sizes = dict(BACKBONES[backbone])
        mlp, C, patch = sizes.pop("mlp"), sizes["C"], sizes["patch"]
        if image_size:
            sizes["image_size"] = image_size
        side = sizes["image_size"]
        self.image_encoder = ImageEncoder(**sizes)
        self.prompt_encoder = PromptEncoder(C, side // patch, side)
        self.mask_decoder = MaskDecoder(C, mlp)
        mean = torch.tensor([123.675, 116.28, 103.53]).view(-1, 1, 1)
        std = torch.tensor([58.395, 57.12, 57.375]).view(-1, 1, 1)
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)

    @property
    def device(self):
        return self.pixel_mean.device

    def preprocess(self, x):
        """RGB in 0..255, (3, h, w) or (N, 3, h, w), already scaled -> normalised and padded to the model's square."""
        side = self.image_encoder.img_size
        x = (x - self.pixel_mean) / self.pixel_std
        return F.pad(x, (0, side - x.shape[-1], 0, side - x.shape[-2]))

    def decode(self, image_embeddings, points=None, boxes=None, masks=None, multimask_output=False, image_index=None):
        """Prompts -> low-resolution logits (P, M, 4H, 4W), predicted IoU (P, M). All that predicts goes through here.

        image_embeddings (N, C, H, W); points: (coords (P, K, 2), labels (P, K)), boxes (P, 4), both in pixels of the
        scaled image; masks (P, 1, 4H, 4W); image_index (P,): the image that each prompt is for, not needed if N is 1
        or P. M is 3 with multimask_output, else 1.
        """
        sparse, dense = self.prompt_encoder(points, boxes, masks)
        image_pe = self.prompt_encoder.get_dense_pe()
        most = TOKENS_AT_ONCE.get(self.device.type, 2**20)
        at_once = max(1, most // self.prompt_encoder.size ** 2)

        logits, scores = [], []
        for first in range(0, max(1, len(sparse)), at_once):
            these = slice(first, first + at_once)
            image = image_embeddings  # of one image for all prompts, or of one for each
            if image_index is not None:
                image = image[image_index[these]]
            elif len(image) > 1:
                image = image[these]
            some_dense = dense[:1] if masks is None else dense[these]  # without masks it is the same for all prompts
            output = self.mask_decoder(image, image_pe, sparse[these], some_dense, multimask_output)
            logits.append(output[0])
            scores.append(output[1])
        return torch.cat(logits), torch.cat(scores)

    def postprocess_masks(self, masks, input_size, original_size):
        """Low-resolution logits (P, M, 4H, 4W) -> logits (P, M, height, width) for the image, its padding cut off.

        input_size: (height, width) of the scaled image before padding; original_size: of the image itself.
        """
        scale = functools.partial(F.interpolate, mode="bilinear", align_corners=False)
        side = self.image_encoder.img_size
        height, width = input_size
        masks = scale(masks.float(), (side, side))
        masks = masks[..., :height, :width]
        return scale(masks, original_size)

    def forward(self, batched_input, multimask_output):
        """The official batch form: a list of dicts, one per image, -> a list of dicts.

        In: image (3, h, w), original_size (height, width), and any of point_coords (P, K, 2) with point_labels (P, K),
        boxes (P, 4), mask_inputs (P, 1, 4H, 4W); image and coordinates are scaled already (`ResizeLongestSide`).
        Out: masks (P, M, height, width) bool, iou_predictions (P, M), low_res_logits (P, M, 4H, 4W).
        """
        images = [self.preprocess(x["image"]) for x in batched_input]
        embeddings = self.image_encoder(torch.stack(images))
        outputs = []
        for x, embedding in zip(batched_input, embeddings):
            points = None
            if "point_coords" in x:
                points = x["point_coords"], x["point_labels"]
            low_res, scores = self.decode(embedding[None], points, x.get("boxes"), x.get("mask_inputs"),
                                          multimask_output)
            logits = self.postprocess_masks(low_res, x["image"].shape[-2:], x["original_size"])
            masks = logits > self.mask_threshold
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
        weights = read_checkpoint(checkpoint, backbone)
        sam.load_state_dict(resize_positions(weights, sam.state_dict()), strict=True)
    return sam.eval()


sam_model_registry = {name: functools.partial(build_sam, name) for name in BACKBONES}  # the official notebooks' entry
sam_model_registry["default"] = sam_model_registry["vit_h"]
build_sam_vit_b = sam_model_registry["vit_b"]
build_sam_vit_l = sam_model_registry["vit_l"]
build_sam_vit_h = sam_model_registry["vit_h"]


def resize_positions(weights, like):
    """Weights whose positions, absolute and relative, are interpolated to the shapes in `like`, where these differ."""
    resized = dict(weights)
    for key, value in weights.items():
        shape = like[key].shape
        if value.shape == shape:
            continue
        if value.dim() == 4:  # pos_embed (1, H, W, d)
            image = value.float().permute(0, 3, 1, 2)
            image = F.interpolate(image, shape[1:3], mode="bicubic", antialias=True)
            resized[key] = image.permute(0, 2, 3, 1)
        else:  # rel_pos (2 * size - 1, c) of the layers that attend over the whole image
            line = F.interpolate(value.float().T[None], shape[0], mode="linear")
            resized[key] = line[0].T
    return resized


def read_weights(path):
    """What torch.save wrote: tensors and plain values alone, no code. OSError for a file that cannot be opened, or
    CheckpointError, which says what the file is instead.

    A zip file's own checksums are compared first: torch.load does not, and a flipped bit would be another weight.
    """
    with open(path, "rb") as file:
        start = file.read(64)
    try:
        if zipfile.is_zipfile(path):  # files from before torch 1.6 are none
            compare_checksums(path)
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise CheckpointError(f"{path} {what_it_is(start, error)}") from error


def compare_checksums(path):
    """ValueError if a part of a zip file is not what was written. torch.save can be told to write no checksums."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        folders = [part for part in parts if part.external_attr & 16]  # no checksum: torch.load would read zeros
        if folders or any(part.CRC for part in parts) and archive.testzip():
            raise ValueError("damaged")


# What other people's training scripts keep beside their weights: settings, and NumPy's numbers and arrays.
HARMLESS = [argparse.Namespace, np.dtype, np.ndarray]
for example, name in ((np.float64(0), "scalar"), (np.zeros(1), "_reconstruct")):
    make = example.__reduce__()[0]
    HARMLESS += [make, (make, f"numpy.core.multiarray.{name}")]  # its name before NumPy 2
for kind in ("float64", "float32", "int64", "int32", "uint32", "uint8", "bool"):
    HARMLESS.append(type(np.dtype(kind)))


def what_it_is(start, error):
    """Why a file that begins with the bytes `start` could not be read as weights, in words."""
    if start[8:10] == b'{"':
        return "is a safetensors file: read it with the package safetensors and write its tensors with torch.save"
    if start.startswith(b"version https://git-lfs"):
        return "is Git LFS's pointer to the file, not the file: run `git lfs pull` where it lies"
    if start.lstrip().startswith(b"<"):
        return "is a web page, not a readable PyTorch weights file: download it again, by its direct address"
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return (f"is not a readable PyTorch weights file: it holds code ({code[1]}), such as a whole pickled model, "
                "which is not run; save the model's state_dict() instead")
    if "TorchScript" in str(error):
        return "is not a readable PyTorch weights file: it is a TorchScript program; give the weights it was made from"
    return "is not a readable PyTorch weights file, or damaged (cut off while copying?): fetch it again"


def reason(error):
    """The first line of an error's message, or its kind if it has none."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]


POSITIONS = "image_encoder.pos_embed"  # in every SAM, and in nothing else


def state_of(content):
    """The state dict in what a file holds, by SAM's own names; None if there is none.

    It may lie under a name ("model", or "sam" as in the last.pt of `train.py --method full`), and all its names may
    begin with the same words ("module." after training on several GPUs).
    """
    for name in 2 * ("state_dict", "model_state_dict", "model", "sam"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        return None
    for key in content:
        prefix = key.removesuffix(POSITIONS)
        if prefix != key and all(other.startswith(prefix) for other in content):
            return {other.removeprefix(prefix): value for other, value in content.items()}
    return None


def is_weight(value):
    """Whether an entry of a file is an ordinary tensor of floating-point numbers."""
    if not isinstance(value, torch.Tensor) or value.is_nested or value.layout != torch.strided:
        return False
    usual = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return value.dtype in usual and value.device.type == "cpu"


def read_checkpoint(path, backbone):
    """The state dict in `path`, checked against `backbone` key by key. Raises FileNotFoundError or CheckpointError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}: give an existing file with --checkpoint")
    content = read_weights(path)
    weights = state_of(content)
    if weights is None and isinstance(content, dict) and str(content.get("format", "")).startswith("gara-sam adapter"):
        raise CheckpointError(f"{path} is an adapter, not a SAM checkpoint: it is given beside one")
    if weights is None:
        raise CheckpointError(f"{path} is not a SAM checkpoint: it has no {POSITIONS}")
    for key, value in weights.items():
        if not is_weight(value):
            raise CheckpointError(f"{path}: {key} is not a tensor of floating-point numbers: not a SAM checkpoint")
    if weights[POSITIONS].dim() != 4:
        raise CheckpointError(f"{path} is not a SAM checkpoint: its {POSITIONS} has not 4 dimensions")

    check_backbone(path, weights, backbone)
    check_layout(path, weights, backbone)
    return weights


def check_backbone(path, weights, backbone):
    """CheckpointError if the encoder's width and depth are another backbone's."""
    blocks = {key.split(".")[2] for key in weights if key.startswith("image_encoder.blocks.")}
    width, depth = weights[POSITIONS].shape[-1], len(blocks)
    for name, sizes in BACKBONES.items():
        if (sizes["d"], sizes["depth"]) == (width, depth):
            if name == backbone:
                return
            raise CheckpointError(f"{path} holds {name}, not {backbone}: say --backbone {name}")
    raise CheckpointError(f"{path} holds an encoder of width {width} and depth {depth}, not {backbone}")


def check_layout(path, weights, backbone):
    """CheckpointError if a key is missing, unknown, of another shape or not finite."""
    with torch.device("meta"):
        expected = Sam(backbone).state_dict()
    lacking = expected.keys() - weights.keys()
    unknown = weights.keys() - expected.keys()
    for problem, keys in (("lacks", lacking), ("has the unknown key", unknown)):
        if keys:
            raise CheckpointError(f"{path} {problem} {min(keys)!r} ({len(keys)} such): not a checkpoint of {backbone}")
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            raise CheckpointError(f"{path}: {key} has shape {tuple(value.shape)}, "
                                  f"{backbone} needs {tuple(expected[key].shape)}")
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: {key} holds NaN or infinite values: fetch the file again")


def find_checkpoint(backbone):
    """Path of the backbone's weights: in assets/, checkpoints/ or the torch hub cache, else downloaded to the cache."""
    name, here = FILES[backbone], os.path.dirname(os.path.abspath(__file__))
    cache = os.path.join(torch.hub.get_dir(), "checkpoints")
    assets, beside = os.path.join(here, "assets"), os.path.join(here, "checkpoints")
    for folder in (assets, "checkpoints", beside, cache):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path

    if backbone == "vit_t":
        raise FileNotFoundError(f"assets/{name} is missing: it comes with this repository "
                                "(or make it: train.py --pretrain)")
    try:
        os.makedirs(cache, exist_ok=True)
        with one_download_at_a_time(cache):
            if not os.path.isfile(path):
                print(f"downloading {URL}{name} to {cache}", file=sys.stderr)
                torch.hub.download_url_to_file(URL + name, path, hash_prefix=name[-10:-4])
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        raise FileNotFoundError(f"could not download {name} ({reason(error)}): put {URL}{name} into checkpoints/") \
            from error
    return path


PATIENCE = 60  # seconds that a server may be silent


@contextlib.contextmanager
def one_download_at_a_time(folder):
    """Other processes wait until this one's download has ended. What a killed one left in the folder is removed, and a
    server that falls silent is an error: torch.hub would wait for it for ever."""
    import fcntl  # here, since Windows has none

    before = socket.getdefaulttimeout()
    lock = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network drives have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however that ends
            for left in glob.glob(os.path.join(glob.escape(folder), "sam_vit_*.partial")):
                os.remove(left)
        socket.setdefaulttimeout(PATIENCE)
        yield
    finally:
        socket.setdefaulttimeout(before)
        os.close(lock)


# ---------------------------------------------------------------- prediction on one image

class ResizeLongestSide:
    """Scales an image, and coordinates on it, so that its longer side is `target_length` pixels."""

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
        scaled = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(scaled)

    def apply_image_torch(self, image):
        """float (N, 3, H, W) -> (N, 3, h, w), nearly as apply_image does it."""
        size = self.get_preprocess_shape(*image.shape[-2:])
        return F.interpolate(image, size, mode="bilinear", antialias=True)

    def apply_coords(self, coords, original_size):
        """(..., 2) xy in pixels of the image (array or tensor) -> in pixels of the scaled image, float32."""
        height, width = original_size
        new_height, new_width = self.get_preprocess_shape(height, width)
        scale = new_width / width, new_height / height
        if isinstance(coords, torch.Tensor):
            return coords.float() * torch.tensor(scale, dtype=torch.float32, device=coords.device)
        return np.asarray(coords, dtype=np.float32) * np.array(scale, dtype=np.float32)

    def apply_boxes(self, boxes, original_size):
        """(n, 4) xyxy, likewise."""
        corners = self.apply_coords(boxes.reshape(-1, 2, 2), original_size)
        return corners.reshape(-1, 4)

    apply_coords_torch, apply_boxes_torch = apply_coords, apply_boxes  # the official names for tensors


class SamPredictor:
    """Encodes an image once, then predicts masks for prompts. Methods, arguments and returns are the official class's.
    """

    def __init__(self, sam_model):
        self.model = sam_model
        self.transform = ResizeLongestSide(sam_model.image_encoder.img_size)
        self.reset_image()

    @property
    def device(self):
        return self.model.device

    def reset_image(self):
        """Forget the image."""
        self.is_image_set = False
        self.features = self.original_size = self.input_size = None

    def set_image(self, image, image_format="RGB"):
        """Encode an image: uint8 HxWx3, channels in the order of image_format (RGB or BGR)."""
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format is {image_format!r}: choose RGB or BGR")
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"the image is {image.dtype} {image.shape}: set_image needs uint8 HxWx3 in 0..255")
        if image_format == "BGR":
            image = image[..., ::-1]
        scaled = self.transform.apply_image(np.ascontiguousarray(image))
        x = torch.tensor(scaled, device=self.device)  # uint8: a quarter of the bytes to the GPU
        x = x.permute(2, 0, 1)[None]  # (1, 3, h, w)
        self.set_torch_image(x, image.shape[:2])

    @torch.no_grad()
    def set_torch_image(self, transformed_image, original_image_size):
        """Encode an image given as (1, 3, h, w) in 0..255, already scaled; original_image_size is (height, width)."""
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

        point_coords (K, 2) xy in pixels of the image; point_labels (K,) 1 object, 0 background; box (4,) xyxy;
        mask_input (1, 4H, 4W), one of an earlier call's low_res_logits. Returns masks (M, height, width), bool or with
        return_logits float32, predicted IoU (M,), low_res_logits (M, 4H, 4W); M is 3 with multimask_output, else 1.
        Raises RuntimeError before set_image, ValueError for prompts that make no sense.
        """
        self.get_image_embedding()  # raises before set_image
        if (point_coords is None) != (point_labels is None):
            raise ValueError("point_coords and point_labels go together: give both or none")
        coords = labels = boxes = masks = None
        if point_coords is not None:
            coords = checked("point_coords", point_coords, (None, 2), self.device)
            labels = checked("point_labels", point_labels, (len(coords),), self.device)
            if not torch.isin(labels, labels.new_tensor([-1, 0, 1])).all():
                raise ValueError(f"point_labels are {labels.tolist()}: use 1 for the object and 0 for the background")
            coords = self.transform.apply_coords(coords, self.original_size)[None]
            labels = labels.long()[None]
        if box is not None:
            boxes = checked("box", np.reshape(box, -1), (4,), self.device)
            boxes = self.transform.apply_boxes(boxes, self.original_size)
        if mask_input is not None:
            side = 4 * self.model.prompt_encoder.size
            masks = checked("mask_input", mask_input, (1, side, side), self.device)[None]

        masks, scores, low_res = self.predict_torch(coords, labels, boxes, masks, multimask_output, return_logits)
        scores, low_res = scores.float(), low_res.float()
        return masks[0].cpu().numpy(), scores[0].cpu().numpy(), low_res[0].cpu().numpy()

    @torch.no_grad()
    def predict_torch(self, point_coords, point_labels, boxes=None, mask_input=None,
                      multimask_output=True, return_logits=False):
        """Masks for P prompts at once. Tensors on the model's device, coordinates already scaled (`transform.apply_*`).

        point_coords (P, K, 2), point_labels (P, K), boxes (P, 4), mask_input (P, 1, 4H, 4W); any may be None.
        Returns masks (P, M, height, width), scores (P, M), low_res_logits (P, M, 4H, 4W).
        """
        points = None if point_coords is None else (point_coords, point_labels)
        low_res, scores = self.model.decode(self.get_image_embedding(), points, boxes, mask_input, multimask_output)

        masks = []
        for part in low_res.split(MASKS_AT_ONCE.get(self.device.type, 32)):
            part = self.model.postprocess_masks(part, self.input_size, self.original_size)
            masks.append(part if return_logits else part > self.model.mask_threshold)
        return join(masks), scores, low_res

    def get_image_embedding(self):
        """The image's embedding (1, C, H, W). RuntimeError before set_image."""
        if not self.is_image_set:
            raise RuntimeError("no image yet: call set_image(image) first")
        return self.features


def checked(name, value, shape, device):
    """`value` as a finite float32 tensor of `shape` (None: any length), or a ValueError that names it."""
    if not isinstance(value, torch.Tensor):
        value = torch.from_numpy(np.array(value, dtype=np.float32))
    value = value.detach().to(device, torch.float32)
    expected = tuple(want or got for want, got in zip(shape, value.shape))
    if len(value.shape) != len(shape) or value.shape != expected:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: it should be {shape}".replace("None", "K"))
    if not value.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite values")
    return value


# ---------------------------------------------------------------- automatic masks: everything in an image
# Each point of a grid is answered by three masks, many of them wrong and most of them found by several points. Three
# filters leave one mask of each thing: the IoU that the model predicts, the stability of the mask, and of masks whose
# boxes nearly coincide only the best. For small things all this is repeated on crops of the image.

CROP_EDGE = 20  # pixels: a mask that ends so near to the edge of its crop was probably cut off there


@dataclasses.dataclass(eq=False)
class SamAutomaticMaskGenerator:
    """Finds the masks of everything in an image. Arguments and records are the official class's."""

    model: Sam
    points_per_side: int = 32                # of the grid
    points_per_batch: int = 64               # how many are decoded at once
    pred_iou_thresh: float = 0.88            # masks for which the model predicts no higher IoU are left out,
    stability_score_thresh: float = 0.95     # so are those of less stability, the IoU of the masks at two thresholds
    stability_score_offset: float = 1.0      # that lie so far above and below the model's own,
    box_nms_thresh: float = 0.7              # and so is the worse of two masks whose boxes have a higher IoU
    crop_n_layers: int = 0                   # layer i of crops cuts the image in 2^i x 2^i that overlap
    crop_nms_thresh: float = 0.7             # as box_nms_thresh, between crops: the mask of the smaller crop stays
    crop_overlap_ratio: float = 512 / 1500   # in layer 1, of the shorter side of the image; half in the next
    crop_n_points_downscale_factor: int = 1  # layer i has points_per_side / factor^i points a side
    point_grids: list = None                 # instead of points_per_side: (n, 2) xy in 0..1 for each layer
    min_mask_region_area: int = 0            # holes and islands of fewer pixels are filled and removed
    output_mode: str = "binary_mask"         # bool HxW; COCO's run lengths: uncompressed_rle (a list) or coco_rle (str)

    def __post_init__(self):
        if self.output_mode not in ("binary_mask", "uncompressed_rle", "coco_rle"):
            raise ValueError(f"output_mode is {self.output_mode!r}: choose binary_mask, uncompressed_rle or coco_rle")
        if self.point_grids is None:
            self.point_grids = [self.grid(layer) for layer in range(self.crop_n_layers + 1)]
        self.predictor = SamPredictor(self.model)

    def grid(self, layer):
        """The points of each crop of a layer: (n, 2) xy in 0..1, row by row."""
        side = int(self.points_per_side / self.crop_n_points_downscale_factor ** layer)
        if side < 1:
            raise ValueError(f"points_per_side {self.points_per_side}: no point is left for layer {layer}")
        margin = 1 / (2 * side)
        centres = np.linspace(margin, 1 - margin, side)
        return np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)

    def crops(self, layer, height, width):
        """Boxes (x, y, width, height) of a layer's crops. Layer 0 is the whole image."""
        n = 2 ** layer
        overlap = int(self.crop_overlap_ratio * min(height, width) * 2 / n)
        across, down = math.ceil((width - overlap) / n), math.ceil((height - overlap) / n)  # from one to the next
        boxes = []
        for k in range(n * n):
            x, y = k // n * across, k % n * down
            boxes.append([x, y, min(across + overlap, width - x), min(down + overlap, height - y)])
        return boxes

    @torch.no_grad()
    def generate(self, image, progress=lambda points: None):
        """uint8 HxWx3 RGB -> a list of records, dicts of

        segmentation     the mask, in the form of output_mode
        area             its pixels
        bbox             x, y, width, height, where the width is its last column less its first
        predicted_iou    what the model expects
        point_coords     [[x, y]] of the point that it answers
        stability_score  see the arguments
        crop_box         x, y, width, height of the crop that it was found in

        progress: called with the number of points answered since its last call.
        """
        size = np.shape(image)[:2]
        records = []
        for layer in range(self.crop_n_layers + 1):
            for crop in self.crops(layer, *size):
                records += self.search(image, crop, self.point_grids[layer], progress)
        if self.crop_n_layers > 0:
            areas = torch.tensor([math.prod(record["crop_box"][2:]) for record in records])
            records = suppress(records, -areas, self.crop_nms_thresh)
        if self.min_mask_region_area > 0:
            records = self.tidy(records, size)
        for record in records:
            mask = unpack(record, size)
            record.update(segmentation=in_form(mask, self.output_mode), area=int(mask.sum()))
        return records

    def search(self, image, crop, points, progress):
        """The records that the points of a crop give, (n, 2) in 0..1, without duplicates. Their masks are packed."""
        x, y, width, height = crop
        predictor, threshold, offset = self.predictor, self.model.mask_threshold, self.stability_score_offset
        predictor.set_image(image[y:y + height, x:x + width])
        points = points * [width, height]
        coords = torch.from_numpy(predictor.transform.apply_coords(points, (height, width)))
        records = []
        for first in range(0, len(points), self.points_per_batch):
            some = coords[first:first + self.points_per_batch, None].to(predictor.device)  # (P, 1, 2)
            prompts = some, torch.ones_like(some[..., 0])
            low_res, scores = self.model.decode(predictor.features, prompts, multimask_output=True)
            # (P, 3, 4H, 4W), (P, 3)
            good = (scores > self.pred_iou_thresh) | (self.pred_iou_thresh <= 0)
            for k, which in good.nonzero().tolist():  # only these are scaled up, one by one
                logits = low_res[k, which][None, None]
                logits = self.model.postprocess_masks(logits, predictor.input_size, predictor.original_size)[0, 0]
                stability = (logits > threshold + offset).sum() / (logits > threshold - offset).sum()
                if not (stability >= self.stability_score_thresh or self.stability_score_thresh <= 0):
                    continue
                mask = np.zeros(image.shape[:2], bool)
                mask[y:y + height, x:x + width] = (logits > threshold).cpu()
                point = points[first + k] + [x, y]
                record = dict(pack(mask), predicted_iou=scores[k, which].item(), point_coords=[point.tolist()],
                              stability_score=stability.item(), crop_box=crop)
                if not cut_off(record, mask.shape):
                    records.append(record)
            progress(len(some))
        predictor.reset_image()
        return suppress(records, [record["predicted_iou"] for record in records], self.box_nms_thresh)

    def tidy(self, records, size):
        """Records of masks without holes, then without islands (but for the largest) that are small, and without new
        duplicates: masks that had none go first. Pixels that share a corner are connected, in holes as well."""
        from data import components  # here, so that the model itself needs no other file

        area, whole = self.min_mask_region_area, []
        for record in records:
            holes, areas = components(~unpack(record, size))
            small_holes = areas < area
            islands, areas = components(np.append(True, small_holes)[holes])
            small_islands = areas < area
            whole.append(not (small_holes.any() or small_islands.any()))
            if len(areas):
                small_islands[areas.argmax()] = False
            record.update(pack(np.append(False, ~small_islands)[islands]))
        return suppress(records, whole, max(self.box_nms_thresh, self.crop_nms_thresh))


def pack(mask):
    """bool HxW -> two entries of a record: the mask in few bytes, as there are thousands, and its box."""
    left, top, right, bottom = Image.fromarray(mask.view(np.uint8)).getbbox() or (0, 0, 1, 1)
    box = [left, top, right - 1 - left, bottom - 1 - top]
    return dict(segmentation=zlib.compress(np.packbits(mask), 1), bbox=box)


def unpack(record, size):
    """The mask of a record again, bool HxW."""
    packed = np.frombuffer(zlib.decompress(record["segmentation"]), np.uint8)
    return np.unpackbits(packed, count=math.prod(size)).view(bool).reshape(size)


def in_form(mask, output_mode):
    """bool HxW -> the same, or COCO's run lengths of it."""
    if output_mode == "binary_mask":
        return mask
    if output_mode == "coco_rle":
        from data import rle_encode
        return rle_encode(mask)
    edges = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False))
    runs = np.diff(edges, prepend=0, append=mask.size)
    return dict(size=list(mask.shape), counts=runs.tolist())


def cut_off(record, size):
    """Whether a mask ends near to an edge of its crop that is none of the image (height, width)."""
    for axis in (0, 1):
        start, length = record["bbox"][axis::2]
        crop_start, crop_length = record["crop_box"][axis::2]
        if CROP_EDGE < start <= crop_start + CROP_EDGE:
            return True
        if crop_start + crop_length - CROP_EDGE <= start + length < size[1 - axis] - CROP_EDGE:
            return True
    return False


def suppress(records, scores, threshold):
    """Non-maximum suppression: the records from the highest score to the lowest, equal ones in their order, but for
    those whose box has an IoU above the threshold with the box of one that stays."""
    boxes = torch.tensor([record["bbox"] for record in records], dtype=torch.float32)
    starts, sides = boxes.view(-1, 2, 2).unbind(1)
    ends, areas = starts + sides, sides.prod(1)
    gone = torch.zeros(len(records), dtype=torch.bool)
    kept = []
    for k in torch.as_tensor(scores).sort(descending=True, stable=True).indices.tolist():
        if gone[k]:
            continue
        kept.append(records[k])
        overlap = torch.minimum(ends[k], ends) - torch.maximum(starts[k], starts)
        overlap = overlap.clamp(min=0).prod(1)
        iou = overlap / (areas[k] + areas - overlap)  # 0 / 0 for two boxes without an area: both stay
        gone |= iou.double() > threshold
    return kept


# ---------------------------------------------------------------- for command lines: memory, and other people's code

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

def draw_mask(overlay, mask, colour):
    """Tints a mask on a Pillow image and outlines it; returns the width of its lines."""
    line = max(2, round(max(overlay.size) / 400))
    solid = Image.fromarray(mask).convert("L")
    grown = solid.filter(ImageFilter.BoxBlur(line)).point(lambda value: 255 * (value > 0))
    outline = ImageChops.difference(grown, solid)
    tinted = Image.blend(overlay, Image.new("RGB", overlay.size, colour), 0.5)
    overlay.paste(tinted, mask=solid)
    overlay.paste("white", mask=outline.filter(ImageFilter.GaussianBlur(0.5)))
    return line


def draw_everything(image, records):
    """A Pillow image: the masks of all records in different colours, small ones upon large ones."""
    from data import rle_decode

    sheet = Image.fromarray(image)
    for k, record in enumerate(sorted(records, key=lambda record: -record["area"])):
        mask = rle_decode(record["segmentation"])
        draw_mask(sheet, mask, f"hsv({137 * k % 360}, 80%, 100%)")
    return sheet


def draw_overlay(image, mask, points, labels, box):
    """A Pillow image: the image, the mask tinted and outlined, the box, points green (object) or red (background)."""
    overlay = Image.fromarray(image)
    line = draw_mask(overlay, mask, (30, 144, 255))
    pen = ImageDraw.Draw(overlay)
    if box is not None:
        pen.rectangle(box, outline=(255, 200, 0), width=line)
    for (x, y), label in zip(points, labels):
        colour = (40, 170, 60) if label else (215, 40, 40)
        pen.circle((x, y), 4 * line, fill=colour, outline="white", width=line)
    return overlay


# Of SamAutomaticMaskGenerator, as flags of --everything.
SETTINGS = dict(points_per_side=int, pred_iou_thresh=float, stability_score_thresh=float)


def parse(argv):
    """The command line, as far as it can be checked without the image."""
    def numbers(text):
        return tuple(float(value) for value in text.split(","))

    parser = argparse.ArgumentParser(description="Segment an object of an image from points and a box.")
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    add = parser.add_argument
    add("image")
    add("--point", type=numbers, action="append", default=[], metavar="X,Y[,0]",
        help="a pixel of the object, or with ,0 of the background; repeat for more")
    add("--box", type=numbers, metavar="X0,Y0,X1,Y1")
    add("--backbone", choices=BACKBONES, default="vit_b")
    add("--checkpoint", help="SAM weights; default: assets/, checkpoints/, the torch hub cache, else downloaded")
    add("--adapter", help="an adapter file that train.py wrote")
    add("--out", default="overlay.png", help="PNG with the mask drawn on the image (default overlay.png)")
    add("--mask", help="also write the mask alone: a PNG, 255 inside, 0 outside")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--everything", action="store_true", help="find all masks of the image, instead of points or a box")
    add("--json", help="also write the masks and what is known of them, as SamAutomaticMaskGenerator's records")
    for name, kind in SETTINGS.items():
        add("--" + name.replace("_", "-"), type=kind, metavar="N", default=getattr(SamAutomaticMaskGenerator, name),
            help="see SamAutomaticMaskGenerator (default %(default)s)")
    args = parser.parse_args(argv)

    if args.everything and (args.point or args.box or args.mask):
        parser.error("--everything takes no --point, --box or --mask")
    if args.json and not args.everything:
        parser.error("--json goes with --everything")
    if not (args.everything or args.point or args.box):
        parser.error("say what to segment: --point X,Y or --box X0,Y0,X1,Y1, or --everything")
    lengths = {len(point) for point in args.point}
    if not lengths <= {2, 3} or args.box and len(args.box) != 4:
        parser.error("--point takes 2 or 3 numbers (X,Y or X,Y,0), --box takes 4 (X0,Y0,X1,Y1)")
    for path in (args.out, args.mask, args.json):
        folder = os.path.dirname(path or "")
        if folder and not os.path.isdir(folder):
            parser.error(f"cannot write {path}: there is no folder {folder}")
    return args


def check_prompt(args, height, width):
    """ValueError if a point or the box lies outside the image."""
    places = [(x, y, 0) for x, y, *_ in args.point]
    if args.box:
        x0, y0, x1, y1 = args.box
        places += [(x0, y0, 1), (x1, y1, 1)]  # a box may end where the image does
    for x, y, rim in places:
        if not (0 <= x < width + rim and 0 <= y < height + rim):
            raise ValueError(f"{x:g},{y:g} lies outside {args.image}, which is {width} wide and {height} high")
    if args.box and not (x0 < x1 and y0 < y1):
        raise ValueError(f"--box {x0:g},{y0:g},{x1:g},{y1:g}: needs x0 < x1 and y0 < y1")


def build(args):
    """The model that the command line names."""
    from gara import load_adapter, read_adapter

    size = read_adapter(args.adapter)["image_size"] if args.adapter else None
    checkpoint = args.checkpoint or find_checkpoint(args.backbone)
    sam = build_sam(args.backbone, checkpoint, size).to(args.device)
    if args.adapter:
        load_adapter(sam, args.adapter)
    return sam


def segment(args):
    """Write the overlay and the mask, and print a line about it."""
    from data import read_image, save_png  # here, so that the model itself needs no other file

    image = read_image(args.image)
    check_prompt(args, *image.shape[:2])
    predictor = SamPredictor(build(args))
    predictor.set_image(image)
    coords = [point[:2] for point in args.point]
    labels = [point[2] if len(point) == 3 else 1 for point in args.point]
    ambiguous = len(coords) == 1 and args.box is None  # the best of three masks then
    masks, scores, _ = predictor.predict(coords or None, labels or None, args.box, multimask_output=ambiguous)
    best = int(scores.argmax())

    save_png(draw_overlay(image, masks[best], coords, labels, args.box), args.out)
    if args.mask:
        save_png(Image.fromarray(masks[best]).convert("L"), args.mask)
    print(f"{args.out}: {masks[best].sum():,} pixels, {masks[best].mean():.1%} of the image, "
          f"predicted IoU {scores[best]:.3f}")


def segment_everything(args):
    """Write the sheet of all masks and their records, and print a line about them."""
    from data import Progress, read_image, save_png, save_text

    image = read_image(args.image)
    settings = {name: getattr(args, name) for name in SETTINGS}
    generator = SamAutomaticMaskGenerator(build(args), output_mode="coco_rle", **settings)
    progress = Progress("points", len(generator.point_grids[0]))
    records = generator.generate(image, progress.update)
    progress.close()

    save_png(draw_everything(image, records), args.out)
    if args.json:
        save_text(json.dumps(records), args.json)
    print(f"{args.out}: {len(records):,} masks")


def main(argv=None):
    """Segment one image from the command line; returns the exit code. A user's mistake ends in one line."""
    from data import DatasetError, line_of, plain_output

    plain_output()
    args = parse(argv)
    keep_freed_memory()
    try:
        segment_everything(args) if args.everything else segment(args)
    except (DatasetError, ValueError, OSError, RuntimeError, AssertionError) as error:  # the last: torch without CUDA
        print(f"error: {line_of(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
