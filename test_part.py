"""Tests of GaRA-SAM. Run all with `pytest test_gara.py`, a part with `pytest test_gara.py -k gated_linear`.

What each part is held against:
    SAM          numbers that the official code gave for weights and a picture drawn from fixed random streams
    GaRA         equation 7 written out image by image, closed forms and statistics of the gates, parameter counts from
                 the layers' widths; what a save must keep and a load must refuse
    corruptions  closed forms, brute force, and ranges measured on the benchmark's own code
    data         miniatures of ten datasets written here, every kind of bad file, masks by pycocotools
    training     the loss and the targets in plain loops; a run stopped and resumed against one that was not
    evaluation   a model that knows the answers, counting in plain loops, SamPredictor
No network or GPU is needed. Everything takes three minutes on two slow cores.
"""
import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import corruptions
import data
import evaluate
import gara
import sam
import train
from corruptions import CORRUPTIONS, OTHERS, corrupt

HERE = os.path.dirname(os.path.abspath(data.__file__))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]

def scene(height=120, width=160, seed=0):
    """A photo-like picture: sky gradient, pink-noise texture, 12 coloured boxes with hard edges. uint8 HxWx3."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    f[0, 0] = np.inf
    texture = np.fft.ifft2(np.fft.fft2(rng.standard_normal((height, width))) / f).real
    sky = np.linspace(235, 45, height)[:, None, None] * np.array([0.9, 1.0, 1.1])
    out = sky + 15 * (texture / max(texture.std(), 1e-9))[..., None]
    for _ in range(12):
        y, x = rng.integers(height), rng.integers(width)
        h, w = rng.integers(4, max(5, height // 3)), rng.integers(4, max(5, width // 3))
        out[y:y + h, x:x + w] = 0.2 * out[y:y + h, x:x + w] + 0.8 * rng.integers(256) + rng.integers(-40, 41, 3)
    return np.clip(out, 0, 255).astype(np.uint8)

def recipe_weights(model):
    """Weights for a SAM, each tensor from a random stream of its own name: the same bits on every machine."""
    weights = {}
    for key, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        draw = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, dtype=np.float32)
        norm = "norm" in key or re.search(r"(neck\.[13]|mask_downscaling\.[14]|output_upscaling\.1)\.weight$", key)
        learned_tokens = len(shape) == 2 and shape[0] <= 4 and not re.search("mlps|head", key)
        if norm:  # weights of norms lie around 1
            draw = 0.1 * draw + (1 if key.endswith("weight") else 0)
        elif key.endswith("bias") or "rel_pos" in key or "pos_embed" in key:
            draw = (0.05 if key.endswith("bias") else 0.2 if "rel_pos" in key else 0.5) * draw
        elif not (key.endswith("gaussian_matrix") or learned_tokens):  # by the number of inputs
            inputs = shape[0] if "output_upscaling" in key else math.prod(shape[1:])  # first: transposed convolutions
            draw = (1.4 * draw).astype(np.float64) / math.sqrt(inputs)
        weights[key] = torch.from_numpy(draw.astype(np.float32))
    return weights

@functools.cache
def tiny_weights():
    return recipe_weights(sam.build_sam("vit_t"))

def tiny(method=None, **options):
    """vit_t with the recipe's weights, no part of it idle; with a method: adapted, as if trained (B is not zero)."""
    model = sam.build_sam("vit_t")
    model.load_state_dict(tiny_weights())
    return train_by_chance(gara.attach(model, method, **options)) if method else model

def train_by_chance(model, seed=0):
    """Random adapters whose gates decide differently for different images and layers."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in gara.adapters(model):
            layer.B.normal_(std=0.05, generator=rng)
            for p in layer.gate.parameters():
                p.normal_(std=2 / math.sqrt(p.shape[-1]) if p.dim() == 2 else 0.2, generator=rng)
    return model

def pictures(*seeds):
    """Encoder inputs (N, 3, 128, 128) for vit_t."""
    return torch.stack([torch.tensor(scene(128, 128, seed)).permute(2, 0, 1).float() / 60 - 2 for seed in seeds])

@torch.no_grad()
def encode(model, x):
    return model.image_encoder(x)

def close(a, b, tolerance=1e-5):
    """Equal but for a share of the largest value."""
    a, b = (torch.as_tensor(t).detach().cpu().double() for t in (a, b))
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())

@contextlib.contextmanager
def refused(*words, kind=ValueError):
    """What is done within raises an error of this kind, whose message is one line that holds these words."""
    with pytest.raises(kind) as error:
        yield
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text

def run_cli(main, *arguments):
    """Exit code of a command line, run in this process."""
    try:
        return main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code

def one_error(capsys, *words):
    """What was printed on stderr, but for progress, is one line that holds these words."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not re.search(r"\d/s  ", line)]
    assert len(lines) == 1 and lines[0].startswith("error: ") and all(word in lines[0] for word in words), lines
    return True

def everything(folder):
    """The files under a folder and their sizes."""
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}

def same(a, b):
    """Two examples, or two nested states, are equal in every bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

# ---- GaRA: the operation --------------------------------------------------------------------------------------------

def operands(sizes=None, dtype=torch.float64, device="cpu", update=1.0):
    """x, weight, bias, A, B, mask for gated_linear, random but always the same.

    sizes: of N images with `tokens` of width d, G matrices of o rows, r components; flat: one matrix, A and B without
    the leading 1; per_token: the mask, too, is each token's own.
    """
    size = dict(N=2, tokens=(5,), d=4, o=3, r=6, G=3, flat=False, per_token=False) | (sizes or {})
    N, d, o, r, G = (size[name] for name in ("N", "d", "o", "r", "G"))
    rng = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        return torch.randn(shape, generator=rng, dtype=torch.float64) * scale

    x = draw(N, *size["tokens"], d)
    weight, bias = draw(G * o, d, scale=d ** -0.5), draw(G * o)
    A, B = draw(G, r, d, scale=d ** -0.5), draw(G, o, r, scale=update * r ** -0.5)
    mask = draw(N, *size["tokens"], r) if size["per_token"] else draw(N, r)
    if size["flat"]:
        A, B = A[0], B[0]
    return [t.to(device, dtype).requires_grad_() for t in (x, weight, bias, A, B, mask)]

def plain_gated_linear(x, weight, bias, A, B, mask):
    """Equation 7, token by token and matrix by matrix."""
    if A.dim() == 2:
        A, B = A[None], B[None]
    o, shape, r = B.shape[1], x.shape[:-1], A.shape[1]
    if mask.dim() == 2:  # one of each image
        mask = mask.view(len(x), *[1] * (x.dim() - 2), r).expand(*shape, r)
    out = []
    for token, m in zip(x.flatten(0, -2), mask.flatten(0, -2)):
        blocks = [weight[g * o:(g + 1) * o] + B[g] @ torch.diag(m) @ A[g] for g in range(len(A))]
        out.append(torch.cat(blocks) @ token + bias)
    return torch.stack(out).view(*shape, -1)

FORMS = pytest.mark.parametrize("form", ["merged", "factored", "cheaper"])
SIZES = pytest.mark.parametrize("sizes, dtype, tolerance", [
    (dict(), torch.float64, 1e-12),
    (dict(G=1, flat=True, o=5, d=3, r=2), torch.float64, 1e-12),
    (dict(tokens=(2, 3), r=1), torch.float64, 1e-12),
    (dict(N=1, tokens=(1,), r=9), torch.float64, 1e-12),
    (dict(N=3, tokens=(8, 8), d=96, o=96, r=40), torch.float32, 1e-5),
    (dict(tokens=(2, 3), per_token=True), torch.float64, 1e-12),
    (dict(G=1, flat=True, per_token=True), torch.float64, 1e-12),
    (dict(N=3, tokens=(8, 8), d=96, o=96, r=40, per_token=True), torch.float32, 1e-5),
])

@FORMS
@SIZES
@pytest.mark.parametrize("device", DEVICES)
def test_gated_linear_is_equation_7(monkeypatch, form, sizes, dtype, tolerance, device):
    """With a gradient and without, and when some components are closed."""
    monkeypatch.setattr(gara, "FORM", form)
    exact, inputs = operands(sizes), operands(sizes, dtype, device)
    tolerance = max(tolerance, 1e-4 if device == "cuda" else 0)
    y, expected = gara.gated_linear(*inputs), plain_gated_linear(*exact)
    assert y.dtype == dtype
    assert close(y, expected, tolerance)
    with torch.no_grad():
        assert close(gara.gated_linear(*inputs), expected, tolerance)
        closed = torch.arange(exact[5].numel()).view_as(exact[5]) % 3 > 0
        closed[1:2] = True  # all of image 1
        y = gara.gated_linear(*inputs[:5], inputs[5].masked_fill(closed.to(device), 0))
        assert close(y, plain_gated_linear(*exact[:5], exact[5].masked_fill(closed, 0)), tolerance)

@FORMS
@SIZES
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_gated_linear(monkeypatch, form, sizes, dtype, tolerance, device):
    """Of everything at once; and when only one is asked for, that one alone."""
    monkeypatch.setattr(gara, "FORM", form)
    exact, inputs = operands(sizes), operands(sizes, dtype, device)
    tolerance = max(tolerance, 1e-4 if device == "cuda" else 0)
    y, expected = gara.gated_linear(*inputs), plain_gated_linear(*exact)
    dy = torch.ones_like(expected).cos() * expected.detach()
    wanted = torch.autograd.grad(expected, exact, dy)
    for got, want in zip(torch.autograd.grad(y, inputs, dy.to(y)), wanted):
        assert got.dtype == dtype
        assert close(got, want, tolerance)
    for i, want in enumerate(wanted):
        alone = [t.detach().requires_grad_(k == i) for k, t in enumerate(inputs)]
        gara.gated_linear(*alone).backward(dy.to(y))
        assert [t.grad is not None for t in alone] == [k == i for k in range(6)]
        assert close(alone[i].grad, want, tolerance)

@pytest.mark.parametrize("form, per_token", [("merged", False), ("factored", False), ("factored", True)])
def test_gated_linear_gradients_by_finite_differences(monkeypatch, form, per_token):
    monkeypatch.setattr(gara, "FORM", form)
    assert torch.autograd.gradcheck(gara.gated_linear, operands(dict(d=6, o=4, r=3, per_token=per_token)))

def test_gated_linear_refuses_operands_that_do_not_fit():
    x, weight, bias, A, B, mask = operands()
    for rest in ((A, B, mask[:1]), (A, B, mask[:, :2]), (A, B[:, :2], mask), (A[:2], B, mask),
                 (A, B, mask[:, None].expand(-1, 4, -1))):
        with refused("do not fit"):
            gara.gated_linear(x, weight, bias, *rest)

WIDE = dict(N=2, tokens=(64,), d=96, o=96, r=16)

@pytest.mark.parametrize("per_token", [False, True])
def test_gated_linear_under_autocast(per_token):
    """bfloat16 is close to float32 in values and gradients, and parameters keep float32 gradients."""
    inputs = operands(WIDE | dict(per_token=per_token), torch.float32)
    expected = gara.gated_linear(*inputs)
    dy = expected.detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = gara.gated_linear(*inputs)
    assert y.dtype == torch.bfloat16
    assert close(y, expected, 0.02)
    for got, want in zip(torch.autograd.grad(y, inputs, dy.bfloat16()), torch.autograd.grad(expected, inputs, dy)):
        assert got.dtype == torch.float32
        assert (got - want).norm() < 0.02 * want.norm()

def test_small_updates_survive_autocast():
    """An update of W / 10,000 lies far below bfloat16's resolution (1/256), but is there on average over outputs."""
    x, weight, bias, A, B, mask = operands(WIDE, torch.float32, update=1e-4)
    with torch.no_grad():
        plain = plain_gated_linear(x, weight, bias, A, 0 * B, mask)
        true = plain_gated_linear(x, weight, bias, A, B, mask) - plain
        with torch.autocast("cpu", torch.bfloat16):
            seen = gara.gated_linear(x, weight, bias, A, B, mask).float()
            seen -= gara.gated_linear(x, weight, bias, A, 0 * B, mask).float()
    assert true.norm() < 3e-4 * plain.norm()
    assert ((seen * true).sum() / true.square().sum()).item() == pytest.approx(1, abs=0.3)

COMPILERS = os.environ.get("CXX", "g++"), "g++", "clang++", "cl"

@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler")
def test_gated_linear_compiles_to_one_graph():
    inputs = operands(dict(tokens=(7,), d=8, o=8), torch.float32)
    y, expected = torch.compile(gara.gated_linear, fullgraph=True)(*inputs), gara.gated_linear(*inputs)
    assert close(y, expected)
    compiled = torch.autograd.grad(y.square().sum(), inputs)
    for got, want in zip(compiled, torch.autograd.grad(expected.square().sum(), inputs)):
        assert close(got, want)

# ---- GaRA: the gates ------------------------------------------------------------------------------------------------

def test_gumbel_sigmoid_without_training_is_a_threshold():
    logits = torch.tensor([-3, -1e-9, 0, 1e-9, 5.])
    assert gara.gumbel_sigmoid(logits, 0.5, training=False).tolist() == [0, 0, 0, 1, 1]

@pytest.mark.parametrize("temperature", [0.1, 0.5, 3])
@pytest.mark.parametrize("logit", [-3, -1, 0, 0.4, 1, 2])
def test_gumbel_sigmoid_chances(logit, temperature):
    """The noise is one Gumbel variable, so P(z + G > 0) = 1 - exp(-exp(z)) at any temperature; bound: four sigma."""
    torch.manual_seed(1)
    n, p = 100_000, 1 - math.exp(-math.exp(logit))
    out = gara.gumbel_sigmoid(torch.full((n,), float(logit)), temperature)
    assert out.unique().tolist() == [0, 1]  # exactly
    assert abs(out.mean().item() - p) < 4 * math.sqrt(p * (1 - p) / n)

@pytest.mark.parametrize("temperature", [0.2, 0.5, 1])
def test_gumbel_sigmoid_gradient_is_that_of_the_sigmoid(temperature):
    """Of sigmoid((z + G) / T) for the same G = -log(E), E exponential."""
    logits = torch.linspace(-4, 4, 50, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(2)
    out = gara.gumbel_sigmoid(logits, temperature)
    grad, = torch.autograd.grad(out.sum(), logits)
    torch.manual_seed(2)
    noisy = logits.detach() - torch.empty(50, dtype=torch.float64).exponential_().log()
    s = 1 / (1 + torch.exp(-noisy / temperature))
    assert torch.equal(out.detach(), (noisy > 0).double())
    assert torch.allclose(grad, s * (1 - s) / temperature, rtol=1e-9)
    assert (grad > 0).all()

def inputs_and_outputs(model, index, x):
    """What goes into the adapter of a layer and comes out of it."""
    seen = {}
    layer = gara.adapters(model)[index]
    hook = layer.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
    encode(model, x)
    hook.remove()
    return layer, seen["x"], seen["y"]

def by_hand(layer, tokens):
    """GaRA on tokens (n, 160) that decide together, from the gates' raw logits: y (n, 480), the space chosen."""
    h = tokens.sum(0) / len(tokens)
    z_L, z_H, z_space = (g(h) for g in (layer.gate.g_L, layer.gate.g_H, layer.gate.g_space))
    on = [float(z > 0) for z in (z_L if z_space < 0 else z_H)]
    m = torch.tensor(on + [0.0] * 48 if z_space < 0 else [0.0] * 4 + on)
    W, b = layer.weight.unflatten(0, (3, 160)), layer.bias.view(3, 160)
    qkv = [tokens @ W[i].T + b[i] + (tokens @ layer.A[i].T * m) @ layer.B[i].T for i in range(3)]
    return torch.cat(qkv, 1), int(z_space > 0)

@pytest.mark.parametrize("index", [0, 3])
def test_one_layer_by_hand(index):
    """Equations 2 to 7, one image at a time."""
    model = tiny("gara")
    layer, x, y = inputs_and_outputs(model, index, pictures(0, 1, 2))
    for n in range(3):
        expected, space = by_hand(layer, x[n].flatten(0, 1))
        assert close(y[n].flatten(0, 1), expected)
        assert gara.gates(model)[index]["space"][n] == space
        assert gara.gates(model)[index]["count"][n] > 0

@pytest.mark.parametrize("height, width", [(16, 16), (12, 20)])
def test_one_layer_window_by_window(height, width):
    """With scope="window": cut the windows, of which the last may be cut off, and adapt each by itself."""
    model = tiny("gara", scope="window")
    layer, rng = gara.adapters(model)[0], torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 3, 160, generator=rng).repeat_interleave(8, 1).repeat_interleave(8, 2)  # windows that differ
    x = x[:, :height, :width] + torch.randn(2, height, width, 160, generator=rng)
    with torch.no_grad():
        y = layer(x)
    windows = list(itertools.product(range(2), range(0, height, 8), range(0, width, 8)))
    spaces = layer.space.flatten().tolist()
    for (n, top, left), space in zip(windows, spaces, strict=True):
        cut = slice(top, top + 8), slice(left, left + 8)
        expected, chosen = by_hand(layer, x[n][cut].flatten(0, 1))
        assert close(y[n][cut].flatten(0, 1), expected)
        assert chosen == space
    assert set(spaces) == {0, 1}

def test_global_layers_decide_for_the_whole_image_in_both_scopes():
    model = tiny("gara", scope="window")
    layer, x, y = inputs_and_outputs(model, 1, pictures(0, 1))
    for n in range(2):
        assert close(y[n].flatten(0, 1), by_hand(layer, x[n].flatten(0, 1))[0])

def test_moe_lora_uses_one_block():
    experts, model, chosen = (1, 4, 24, 48), tiny("moe_lora"), set()
    for training in (False, True):
        encode(model.train(training), pictures(0, 1, 2, 3))
        for layer in gara.gates(model):
            for space, vector in zip(layer["space"].tolist(), layer["vector"]):
                start = sum(experts[:space])
                assert vector.nonzero().flatten().tolist() == list(range(start, start + experts[space]))
                chosen.add(space)
    assert len(chosen) > 1

@pytest.mark.parametrize("training", [False, True])
def test_gating_1_alone_opens_the_whole_set(training):
    model, chosen = tiny("gara_space").train(training), set()
    encode(model, pictures(0, 1, 2, 3))
    for layer in gara.gates(model):
        for space, vector in zip(layer["space"].tolist(), layer["vector"].tolist()):
            assert vector == [space == 0] * 4 + [space == 1] * 48
            chosen.add(space)
    assert chosen == {0, 1}

@pytest.mark.parametrize("scope", gara.SCOPES)
def test_random_gates_are_fair_coins_of_each_image(scope):
    """In evaluation as well: all open as often as not, others in another image or layer, the same for the same one."""
    model, counts = tiny("gara_random", scope=scope), torch.zeros(6, 52)
    images = torch.rand(60, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    encode(model, images)
    layers = gara.gates(model)
    for layer in layers:
        vectors, space = layer["vector"].view(-1, 52), layer["space"].flatten()
        n = len(space)
        assert abs(space.float().mean() - 0.5) < 4 * math.sqrt(0.25 / n)
        assert not vectors[space == 1, :4].any()
        assert not vectors[space == 0, 4:].any()
        assert abs(vectors[space == 1, 4:].float().mean() - 0.5) < 4 * math.sqrt(0.25 / (24 * n))
    assert not torch.equal(layers[1]["vector"], layers[3]["vector"])  # both decide for whole images
    encode(model, images[30:31])
    for again, layer in zip(gara.gates(model), layers):
        assert torch.equal(again["vector"][0], layer["vector"][30])

RANKS = {"gara": (4, 48), "gara_flat": (4,), "gara_space": (4, 48), "gara_random": (4, 48), "lora": (4,),
         "moe_lora": (1, 4, 24, 48)}

@pytest.mark.parametrize("method", gara.METHODS)
def test_gates_report_every_layer(method):
    model, rank = tiny(method), sum(RANKS[method])
    encode(model, pictures(0, 1, 2))
    report = gara.gates(model)
    assert [layer["layer"] for layer in report] == list(range(6))
    for layer, adapter in zip(report, gara.adapters(model)):
        assert layer["vector"].shape == (3, rank)
        assert layer["vector"].dtype == torch.bool
        assert layer["space"].shape == (3,)
        assert layer["count"].tolist() == [sum(row) for row in layer["vector"].tolist()]
        assert torch.equal(layer["vector"].float(), adapter.mask)
        assert not adapter.mask.requires_grad
    encode(model, pictures(4))
    assert gara.gates(model)[0]["vector"].shape == (1, rank)  # the last pass, not the one before

def test_gates_report_every_window():
    model = tiny("gara", scope="window")
    encode(model, pictures(0, 1, 2))
    layers = gara.gates(model)
    assert [tuple(layer["vector"].shape) for layer in layers] == [(3, 4, 52), (3, 52)] * 3
    assert [tuple(layer["space"].shape) for layer in layers] == [(3, 4), (3,)] * 3
    assert [tuple(layer["count"].shape) for layer in layers] == [(3, 4), (3,)] * 3
    rows = gara.adapters(model)[0].mask[1].flatten(0, 1).bool()  # of image 1, row by row
    assert torch.equal(layers[0]["vector"][1], rows)

def test_lora_is_always_open():
    model = tiny("lora")
    encode(model, pictures(0))
    assert all(layer["vector"].all() for layer in gara.gates(model))

def test_spaces_differ_by_image_and_layer():
    model = tiny("gara")
    encode(model, pictures(0, 1, 2))
    spaces = torch.stack([layer["space"] for layer in gara.gates(model)])
    assert set(spaces.flatten().tolist()) == {0, 1}
    assert (spaces != spaces[:1]).any()

def test_gates_need_a_forward_pass():
    for model in (tiny(), gara.attach(tiny(), "gara")):
        with refused("attach", "encode", kind=RuntimeError):
            gara.gates(model)

# Every kind of adapter: each method, and those that decide in both scopes.
KINDS = [(method, {}) for method in gara.METHODS] + [("gara", dict(scope="window")), ("moe_lora", dict(scope="window"))]

@pytest.mark.parametrize("method, options", KINDS)
def test_evaluation_is_free_of_noise_and_image_by_image(method, options):
    model = tiny(method, **options)
    first = encode(model, pictures(0, 1, 2))
    assert torch.equal(encode(model, pictures(0, 1, 2)), first)
    other = encode(model, pictures(0, 3, 2))
    assert torch.equal(other[0], first[0])
    assert torch.equal(other[2], first[2])
    assert not close(other[1], first[1], 1e-2)
    assert close(encode(model, pictures(2)), first[2:], 1e-4)

@pytest.mark.parametrize("method, options", KINDS)
def test_training_draws_noise_and_its_gradient_reaches_every_gate(method, options):
    model, x = tiny(method, **options).train(), pictures(0, 1, 2, 3, 4, 5)
    for gate in [layer.gate for layer in gara.adapters(model) if method in ("gara", "gara_space")]:
        gate.g_space[-1].weight.data *= 0.1  # each set of components is chosen by every second image or so
        gate.g_space[-1].bias.data.fill_(-0.4)
    torch.manual_seed(0)
    first = model.image_encoder(x)
    (first.square().sum() + model.image_encoder(x).square().sum()).backward()
    learnable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = {"gara": 4 + 6 + 6, "gara_flat": 6, "gara_space": 4, "gara_random": 0, "lora": 0, "moe_lora": 4}[method]
    assert len(learnable) == 6 * (2 + tensors)
    assert [name for name, p in learnable.items() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for name, p in model.named_parameters() if name not in learnable)
    assert close(encode(model, x), first, 1e-3) == (method == "lora")
    torch.manual_seed(0)
    assert close(encode(model, x), first, 1e-4)

# ---- GaRA: on a SAM -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, options", KINDS)
def test_attach_changes_nothing_until_trained(method, options):
    model, x = tiny(), pictures(0, 1, 2)
    names, plain = list(model.state_dict()), encode(model, x)
    assert gara.attach(model, method, **options) is model
    untrained = encode(model, x), encode(model.train(), x)
    assert not close(encode(train_by_chance(model.eval()), x), plain, 1e-2)  # first of all: it does act
    assert torch.equal(untrained[0], plain)
    assert torch.equal(untrained[1], plain)
    learnable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learnable.isdisjoint(names)
    assert all(re.search(r"\.attn\.qkv\.(A|B|gate\.)", name) for name in learnable)

@pytest.mark.parametrize("method, options", KINDS)
def test_detach_takes_the_adapter_off(method, options):
    model, x = tiny(), pictures(0, 1, 2)
    names, plain = list(model.state_dict()), encode(model, x)
    assert gara.detach(train_by_chance(gara.attach(model, method, **options))) is model
    assert torch.equal(encode(model, x), plain)
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    model.load_state_dict(tiny_weights(), strict=True)
    gara.attach(model, method)  # and again

def test_attach_is_bit_equal_at_the_size_of_vit_b():
    torch.manual_seed(0)
    linear, x = sam.Linear(768, 2304), torch.randn(1, 64, 64, 768)
    for gate, window in ((gara.GaraGate(768, 16, 256, 0.5), 0), (gara.GaraGate(768, 16, 256, 0.5), 14),
                         (gara.OpenGate(768, 16), 0)):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert torch.equal(gara.Adapter(linear, gate, window)(x), linear(x))

def mlp_size(*widths):
    return sum(i * o + o for i, o in zip(widths, widths[1:]))

def expected_count(method, d, depth):
    """Parameters from the layers' widths: A and B for q, k and v, and the gate's MLPs."""
    ranks = RANKS[method]
    if d > 160:  # the paper's
        ranks = {(4, 48): (16, 256), (4,): (16,), (1, 4, 24, 48): (2, 16, 128, 256)}[ranks]
    space = mlp_size(d, 64, 1)
    components = sum(mlp_size(d, 16, 16, rank) for rank in ranks)
    gate = {"gara": space + components, "gara_flat": components, "gara_space": space, "gara_random": 0, "lora": 0,
            "moe_lora": mlp_size(d, 64, 4)}[method]
    return depth * (3 * 2 * d * sum(ranks) + gate)

@pytest.mark.parametrize("method", gara.METHODS)
@pytest.mark.parametrize("backbone, d, depth", [
    ("vit_t", 160, 6), ("vit_b", 768, 12), ("vit_l", 1024, 24), ("vit_h", 1280, 32)])
def test_parameter_counts(method, backbone, d, depth):
    with torch.device("meta"):
        model = gara.attach(sam.build_sam(backbone), method)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == expected_count(method, d, depth)
    assert count == sum(p.numel() for p in gara.adapter_state(model).values())

@pytest.mark.parametrize("backbone, expected", [("vit_b", 15_989_196), ("vit_l", 42_595_224)])
def test_parameter_count_by_the_widths_of_the_appendix(backbone, expected):
    with torch.device("meta"):
        model = gara.attach(sam.build_sam(backbone), "gara")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected

@pytest.mark.parametrize("method, options, word", [
    ("dora", {}, "gara, gara_flat, gara_space, gara_random, lora, moe_lora"),
    ("lora", dict(rank_low=3), "rank_low"), ("lora", dict(scope="window"), "scope"), ("gara", dict(rank=3), "rank"),
    ("gara_random", dict(temperature=1), "temperature"), ("gara", dict(rank_low=0), "0"), ("lora", dict(rank=-1), "-1"),
    ("lora", dict(rank=2.5), "2.5"), ("lora", dict(rank=None), "None"), ("lora", dict(rank="8"), "8"),
    ("lora", dict(rank=641), "641"), ("moe_lora", dict(experts=()), "()"), ("moe_lora", dict(experts=(1, 0)), "(1, 0)"),
    ("moe_lora", dict(experts=3), "3"), ("gara", dict(temperature=0), "temperature"),
    ("gara", dict(temperature=math.nan), "nan"), ("gara", dict(temperature="warm"), "warm"),
    ("gara", dict(scope="layer"), "image, window")])
def test_attach_refuses(method, options, word):
    model = tiny()
    with refused(word):
        gara.attach(model, method, **options)
    assert gara.adapters(model) == []
    assert all(p.requires_grad for p in model.parameters())

def test_attach_refuses_a_second_adapter():
    model = tiny("lora")
    before = encode(model, pictures(0))
    with refused("lora", "detach"):
        gara.attach(model, "gara")
    assert torch.equal(encode(model, pictures(0)), before)

# ---- GaRA: adapter files --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, options", [
    ("gara", {}), ("gara", dict(scope="window")), ("gara_flat", dict(rank=9, temperature=1.5)),
    ("gara_space", dict(rank_low=2)), ("gara_random", {}), ("lora", dict(rank=2)), ("moe_lora", dict(experts=(3, 5)))])
def test_save_and_load_adapter(tmp_path, method, options):
    model, path, x = tiny(method, **options), tmp_path / "a.pt", pictures(0, 1)
    meta = dict(step=7, note="first", losses=[0.5, 0.25], state=torch.arange(3))
    gara.save_adapter(model, path, **meta)
    assert os.listdir(tmp_path) == ["a.pt"]

    weights, expected, fresh = torch.load(path, weights_only=True)["weights"], encode(model, x), tiny()
    assert weights.keys() == model.state_dict().keys() - tiny_weights().keys()
    assert path.stat().st_size < 4 * sum(value.numel() for value in weights.values()) + 60_000  # the adapter alone
    assert not torch.equal(encode(fresh, x), expected)
    assert same(gara.load_adapter(fresh, path), meta)
    assert torch.equal(encode(fresh, x), expected)
    assert fresh.adapter == model.adapter

    again = train_by_chance(gara.attach(tiny(), method, **options), seed=1)  # an equal adapter is filled
    gara.load_adapter(again, path)
    assert torch.equal(encode(again, x), expected)

def test_a_failed_save_keeps_the_old_file(tmp_path):
    model, path = tiny("lora"), tmp_path / "a.pt"
    gara.save_adapter(model, path)
    old = path.read_bytes()
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        gara.save_adapter(model, path, step=lambda: 1)
    with torch.no_grad():
        gara.adapters(model)[2].A[0, 0, 0] = math.nan
    with refused("blocks.2.attn.qkv.A", "NaN"):
        gara.save_adapter(model, path)
    with refused("attach"):
        gara.save_adapter(tiny(), path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["a.pt"]

A2 = "image_encoder.blocks.2.attn.qkv.A"

@pytest.mark.parametrize("change, words", [
    (lambda c: c["weights"].pop(A2), [A2]),
    (lambda c: c["weights"].update({A2 + "2": torch.ones(1)}), [A2 + "2"]),
    (lambda c: c["weights"].update({A2: torch.ones(3, 52, 161)}), [A2]),
    (lambda c: c["weights"].update({A2: 5}), [A2]),
    (lambda c: c["weights"][A2][1, 2, :3].fill_(math.nan), [A2]),
    (lambda c: c.update(method="dora"), ["unknown method 'dora'"]),
    (lambda c: c["options"].update(rank_low=0), ["rank"]),
    (lambda c: c["options"].update(rank_low=3), ["rank"]),
    (lambda c: c["options"].update(scope="layer"), ["scope"]),
    (lambda c: c.update(backbone="vit_b"), ["vit_b", "vit_t"]),
    (lambda c: c.update(weights=3), ["weights"]),
    (lambda c: c.update(image_size=64), ["image size 64", "128"]),
    (lambda c: c.pop("image_size"), ["image_size"]),
    (lambda c: c.update(base="0" * 16), ["other vit_t weights"]),
    (lambda c: c.pop("options"), ["options"]),
    (lambda c: c.update(format="2"), ["not an adapter file"]),
    (lambda c: c.update(format="gara-sam adapter 1"), ["gates of another form", "train it again"]),
    (lambda c: c.clear(), ["not an adapter file"]),
    (lambda c: c.update(tiny_weights(), format=0), ["SAM checkpoint"]),
    (b"cut", ["not a readable adapter file"]),
    (b"", ["not a readable adapter file"]),
    (b"not weights\n" * 100, ["not a readable adapter file"])])
@pytest.mark.parametrize("adapted", [False, True])
def test_adapter_files_that_are_refused(tmp_path, change, words, adapted):
    """In one line, and the SAM, adapted before or not, is as before, in what it answers and in what may learn."""
    path, x = tmp_path / "a.pt", pictures(0)
    gara.save_adapter(tiny("gara"), path)
    content = torch.load(path, weights_only=True)
    if isinstance(change, bytes):
        path.write_bytes(path.read_bytes()[:-9000] if change == b"cut" else change)
    else:
        change(content)
        torch.save(content, path)
    target = train_by_chance(gara.attach(tiny(), "gara"), seed=1) if adapted else tiny()
    target.mask_decoder.requires_grad_(False)
    before, flags = encode(target, x), {name: p.requires_grad for name, p in target.named_parameters()}
    words = ["detach"] if adapted and {"rank", "scope", "unknown method 'dora'"} & set(words) else words
    with refused(*words):
        gara.load_adapter(target, path)
    assert torch.equal(encode(target, x), before)
    assert {name: p.requires_grad for name, p in target.named_parameters()} == flags

def test_adapters_fit_their_base_model_only(tmp_path):
    path, other = tmp_path / "a.pt", tiny()
    gara.save_adapter(tiny("gara"), path)
    with torch.no_grad():
        other.image_encoder.blocks[1].mlp.lin1.weight *= 1.02
    with torch.device("meta"):
        big = sam.build_sam("vit_b")
    for model, words in ((other, ["other vit_t weights"]), (big, ["vit_t", "vit_b"]),
                         (tiny("gara", rank_high=8), ["detach"]), (tiny("lora"), ["lora", "detach"]),
                         (tiny("gara", scope="window"), ["window", "detach"])):
        with refused(*words):
            gara.load_adapter(model, path)
    with refused("none.pt", kind=FileNotFoundError):
        gara.load_adapter(tiny(), tmp_path / "none.pt")

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("scope", gara.SCOPES)
def test_gara_on_the_gpu_in_bfloat16(scope):
    model, lora, x = tiny("gara", scope=scope).cuda().train(), tiny("lora").cuda(), pictures(0, 1).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        out = model.image_encoder(x)
        rounded = encode(lora, x).float()  # lora: no decision that rounding could turn over
    out.float().square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert (rounded - encode(lora, x)).norm() < 0.1 * rounded.norm()

