"""Tests of GaRA-SAM. Run all with `pytest test_gara.py`, a part with `pytest test_gara.py -k gated_linear`.

What each part is held against:
    SAM          numbers that the official code gave for weights and a picture drawn from fixed random streams
    GaRA         equation 7 written out image by image, closed forms and statistics of the gates, parameter counts from
                 the layers' widths; what a save must keep and a load must refuse
    corruptions  closed forms, brute force, and ranges measured on the benchmark's own code
    data         miniatures of eleven datasets written here, every kind of bad file, masks by pycocotools
    training     the loss and the targets in plain loops; a run stopped and resumed against one that was not
    evaluation   a model that knows the answers, counting in plain loops, SamPredictor
    page         every request, every kind of bad one, two visitors at once
No network or GPU is needed. Everything takes three minutes on two slow cores.
"""
import argparse
import base64
import concurrent.futures
import contextlib
import functools
import hashlib
import http.client
import http.server
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

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
from assets import figures, page
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

# ---- SAM against the official code's numbers ------------------------------------------------------------------------

# assets/golden.json holds what official SAM (float32, CPU) gave for recipe_weights and golden_image. The embedding:
# [channel, row, column, value]. For each prompt: predict's arguments, scores, mask areas, and of low-resolution and
# full-size logits [mask, row, column, value] and the largest of every `step`-th pixel. Of the released models: number
# of parameters, number of tensors and the CRC-32 of their sorted names and shapes.
with open(os.path.join(HERE, "assets", "golden.json")) as file:
    GOLDEN = json.load(file)

def golden_image(height=427, width=640):
    """Waves, twelve discs and grain: the image that the golden numbers belong to. uint8 HxWx3."""
    rng = np.random.default_rng(0)
    rows = np.arange(height, dtype=np.float32)[:, None]
    columns = np.arange(width, dtype=np.float32)
    channels = []
    for c in range(3):
        waves = np.sin(columns / 37 + c) + np.cos(rows / 23 - c)
        channels.append(waves * 40 + 128)
    image = np.stack(channels, axis=-1)
    for _ in range(12):
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        radius = rng.uniform(10, min(height, width) / 4)
        inside = (rows - cy) ** 2 + (columns - cx) ** 2 < radius ** 2
        image[inside] = rng.uniform(0, 255, 3)
    image += 8 * rng.standard_normal(image.shape)  # in float32: rounding decides some levels
    return image.clip(0, 255).astype(np.uint8)

@pytest.mark.parametrize("backbone", GOLDEN["layouts"])
def test_layout_of_the_official_checkpoints(backbone):
    with torch.device("meta"):
        model = sam.build_sam(backbone)
    lines = sorted(f"{key} {list(value.shape)}" for key, value in model.state_dict().items())
    text = "\n".join(lines)
    found = dict(tensors=len(lines), crc32=zlib.crc32(text.encode()))
    found["parameters"] = sum(p.numel() for p in model.parameters())
    for name, expected in GOLDEN["layouts"][backbone].items():
        assert found[name] == expected, name

@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """A predictor: vit_b read from a checkpoint file with the recipe's weights, the golden image encoded."""
    path = tmp_path_factory.mktemp("golden") / "vit_b.pth"
    with torch.device("meta"):
        layout = sam.build_sam("vit_b")
    torch.save(recipe_weights(layout), path)
    predictor = sam.SamPredictor(sam.build_sam("vit_b", checkpoint=path))
    path.unlink()
    predictor.set_image(golden_image())
    return predictor

def test_golden_embedding(golden):
    embedding = golden.get_image_embedding()[0]
    expected = GOLDEN["embedding"]
    assert embedding.shape == (256, 64, 64)
    for channel, row, column, value in expected["values"]:
        assert embedding[channel, row, column].item() == pytest.approx(value, abs=5e-4)
    assert embedding.mean().item() == pytest.approx(expected["mean"], abs=1e-5)
    assert embedding.std().item() == pytest.approx(expected["std"], abs=1e-5)
    assert embedding.abs().max().item() == pytest.approx(expected["largest"], rel=1e-4)

@pytest.mark.parametrize("name", GOLDEN["prompts"])
def test_golden_masks(golden, name):
    prompts = GOLDEN["prompts"]
    expected, arguments = prompts[name], dict(prompts[name]["arguments"])
    if name == "point_and_mask":
        arguments["mask_input"] = golden.predict(**prompts["three_points"]["arguments"])[2]
    logits, scores, low_res = golden.predict(**arguments, return_logits=True)
    golden_scores = np.array(expected["scores"])
    assert scores == pytest.approx(golden_scores, abs=1e-4 * np.abs(golden_scores).max())
    for found, golden_logits in ((low_res, expected["low_res"]), (logits, expected["full_size"])):
        step, largest = golden_logits["step"], golden_logits["largest"]
        for mask, row, column, value in golden_logits["values"]:
            assert found[mask, row, column] == pytest.approx(value, abs=1e-4 * largest)
        on_grid = found[:, ::step, ::step]
        assert np.abs(on_grid).max() == pytest.approx(largest, rel=1e-4)
    areas = (logits > 0).sum((1, 2))
    assert areas == pytest.approx(np.array(expected["areas"]), rel=1e-4)

# ---- SAM in its parts -----------------------------------------------------------------------------------------------

X86 = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="products are oneDNN's where they were MKL's")

@pytest.fixture
def onednn_calls(monkeypatch):
    """How often a product was oneDNN's: a list that grows."""
    assert sam.onednn_agrees()  # asked before calls are counted
    calls, product = [], torch.ops.mkldnn._linear_pointwise

    def counted(*arguments):
        calls.append(1)
        return product(*arguments)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return calls

@X86
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["rows", "columns", "gaps"])
@pytest.mark.parametrize("shape", [
    (7, 5),
    (2, 3, 4, 5),
    (0, 5),
    (3, 0),
    (1, 1),
    (65, 130)])
def test_linear_in_double_precision(onednn_calls, shape, layout, bias):
    """The matrix product, whatever the weight's layout, also of nothing; by oneDNN where no gradient is asked for."""
    rng, inputs = torch.Generator().manual_seed(0), shape[-1]
    x = torch.randn(shape, generator=rng)
    wide = torch.randn(9, 2 * inputs, generator=rng)
    b = torch.randn(9, 2, generator=rng)[:, 0] if bias else None  # with gaps
    weight = wide[:, :inputs]  # with gaps between its rows
    if layout == "rows":
        weight = weight.clone()
    if layout == "columns":
        weight = weight.T.clone().T
    expected = x.double() @ weight.T.double()
    if bias:
        expected = expected + b.double()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = sam.linear(x, weight, b)
        assert found.dtype == torch.float32
        assert found.shape == expected.shape
        tolerance = 1e-6 * max(1, inputs ** 0.5)
        assert torch.allclose(found.double(), expected, rtol=1e-6, atol=tolerance)
    assert len(onednn_calls) == (x.numel() > 0)

@X86
def test_linear_leaves_to_pytorch_what_is_not_plain_float32_inference(onednn_calls, monkeypatch):
    x, weight = torch.randn(3, 5), torch.randn(4, 5, requires_grad=True)
    sam.linear(x, weight).sum().backward()
    assert close(weight.grad, x.sum(0).expand(4, -1))
    with torch.no_grad():
        assert sam.linear(x.double(), weight.double()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert sam.linear(x, weight).dtype == torch.bfloat16
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
        sam.linear(x, weight)
    assert not onednn_calls

@X86
@torch.no_grad()
def test_linear_under_transforms_tracing_and_forward_mode(onednn_calls):
    """The private call would give a derivative of 0, and a trace that fails."""
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    onto_x, onto_weight = torch.randn(3, 5), torch.randn(4, 5)
    _, of_x = torch.func.jvp(lambda x: sam.linear(x, weight), (x,), (onto_x,))
    assert close(of_x, onto_x @ weight.T)
    _, of_weight = torch.func.jvp(lambda weight: sam.linear(x, weight), (weight,), (onto_weight,))
    assert close(of_weight, x @ onto_weight.T)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, onto_x)
        tangent = torch.autograd.forward_ad.unpack_dual(sam.linear(dual, weight)).tangent
    assert close(tangent, onto_x @ weight.T)
    each = torch.func.vmap(lambda row: sam.linear(row, weight))(x)
    assert close(each, x @ weight.T)
    assert not onednn_calls
    traced = torch.jit.trace(lambda x: sam.linear(x, weight), (x,))
    assert close(traced(2 * x), 2 * x @ weight.T)

@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # of the trace: that sizes are constants in it
def test_encoder_can_be_traced():
    model, x = tiny(), pictures(0)
    traced = torch.jit.trace(model.image_encoder, (x,), check_trace=False)
    assert close(traced(x), model.image_encoder(x), 1e-5)

@pytest.mark.parametrize("broken", ["missing", "raises", "wrong"])
def test_linear_without_the_private_call(monkeypatch, broken):
    """Where PyTorch lacks it, or it does something else, F.linear serves."""
    def replacement(x, weight, *_):
        if broken == "raises":
            raise RuntimeError("no")
        return x @ weight.T + 1

    ops = argparse.Namespace()
    if broken != "missing":
        ops._linear_pointwise = replacement
    monkeypatch.setattr(torch.ops, "mkldnn", ops)
    sam.onednn_agrees.cache_clear()
    try:
        x, weight = torch.randn(3, 5), torch.randn(4, 5)
        with torch.no_grad():
            assert not sam.onednn_serves(x)
            assert close(sam.linear(x, weight), x @ weight.T)
    finally:
        sam.onednn_agrees.cache_clear()

def attention_inputs(U=3, S=4, Q=16, c=8, dtype=torch.float64):
    """q, k, v, bias_h and bias_w of U heads of windows."""
    rng = torch.Generator().manual_seed(0)
    inputs = []
    for shape in ((U, Q, c), (U, S * S, c), (U, S * S, c), (U, Q, S), (U, Q, S)):
        tensor = torch.randn(shape, generator=rng, dtype=torch.float64)
        inputs.append(tensor.to(dtype).requires_grad_())
    return inputs

FORMS_OF_ATTENTION = dict(
    plain=sam.attention, recomputed=sam.RecomputedAttention.apply, gpus=sam.attention_for_gpus)

@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("form", FORMS_OF_ATTENTION)
def test_forms_of_attention_equal_its_formula(form, heads):
    """Pixel by pixel: softmax(q k / sqrt(c) + bias of the key's row + bias of its column) v; and its gradients."""
    inputs = attention_inputs(heads)
    q, k, v, bias_h, bias_w = inputs
    scores = []
    for key in range(16):
        score = (q * k[:, key, None]).sum(-1) / math.sqrt(8)
        scores.append(score + bias_h[..., key // 4] + bias_w[..., key % 4])
    scores = torch.stack(scores, dim=-1)
    expected = torch.einsum("uqk,ukc->uqc", scores.softmax(-1), v)
    found = FORMS_OF_ATTENTION[form](*inputs)
    same_with_gradients(found, expected, inputs)

@pytest.mark.parametrize("heads, queries", [(1, 5), (3, 9)])
def test_gradients_of_attention_by_finite_differences(heads, queries):
    inputs = attention_inputs(heads, S=3, Q=queries, c=2)
    assert torch.autograd.gradcheck(sam.RecomputedAttention.apply, inputs)

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_of_attention_in_single_and_half_precision(dtype, tolerance):
    """As near to double precision as numbers of this type allow; of bfloat16, autograd through the formula is no
    nearer."""
    gradients = []
    for dtype_, form in ((dtype, "recomputed"), (dtype, "plain"), (torch.float64, "plain")):
        inputs = [tensor.detach().to(dtype_).requires_grad_() for tensor in attention_inputs(S=14, Q=196, dtype=dtype)]
        out = FORMS_OF_ATTENTION[form](*inputs)
        gradients.append(torch.autograd.grad(out.double().square().sum(), inputs))
    for found, plain, exact in zip(*gradients):
        assert found.dtype == dtype
        assert close(found, exact, tolerance)
        error, error_of_plain = (found - exact).norm(), (plain - exact).norm()
        assert error <= 1.2 * error_of_plain

def attention_layer(window, device="cpu"):
    """A layer for a 7 x 7 image, whose positions are not zero, and two images."""
    torch.manual_seed(0)
    layer = sam.Attention(12, 3, window, 7).double().to(device)
    for table in (layer.rel_pos_h, layer.rel_pos_w):
        torch.nn.init.normal_(table)
    return layer, torch.randn(2, 7, 7, 12, dtype=torch.float64, device=device, requires_grad=True)

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("most", [2 * 7 ** 4, 100, 1])
def test_attention_in_pieces_equals_the_plain_form(monkeypatch, most, window, device):
    """Some heads of windows at a time, some queries of one, a single query. The last windows reach beyond the image;
    the positions' tables have gradients as well."""
    layer, x = attention_layer(window, device)
    monkeypatch.setitem(sam.SCORES_AT_ONCE, device, most)
    pieces = layer(x)
    monkeypatch.setitem(sam.SCORES_AT_ONCE, device, 10**9)
    monkeypatch.setattr(sam.RecomputedAttention, "apply", sam.attention)
    whole = layer(x)
    same_with_gradients(pieces, whole, (x, *layer.parameters()))
    with torch.no_grad():
        assert close(layer(x), whole, 1e-12)

def test_attention_under_transforms():
    """torch.func and forward-mode differentiation see the plain form."""
    layer, x = attention_layer(4)
    x = x.detach()
    gradient = torch.func.grad(lambda x: layer(x).sin().sum())(x)
    along = torch.randn_like(x)
    _, derivative = torch.func.jvp(lambda x: layer(x).sin().sum(), (x,), (along,))
    expected, = torch.autograd.grad(layer(x.requires_grad_()).sin().sum(), x)
    assert close(gradient, expected, 1e-10)
    assert close(derivative, (expected * along).sum(), 1e-10)

def test_attention_has_no_second_derivative():
    layer, x = attention_layer(4)
    gradient, = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()

@pytest.mark.parametrize("most, largest", [
    (10**9, 6 * 49 * 49),
    (3 * 49 * 49, 3 * 49 * 49),
    (200, 4 * 49),
    (1, 49)])
def test_no_more_scores_at_once_than_allowed(monkeypatch, most, largest):
    """Six heads of a 7 x 7 image; at least one query, whose 49 scores are the least there is."""
    sizes, shares = [], sam.attention_shares

    def measured(q, k, *rest):
        sizes.append(len(q) * q.shape[1] * k.shape[1])
        return shares(q, k, *rest)

    monkeypatch.setattr(sam, "attention_shares", measured)
    monkeypatch.setitem(sam.SCORES_AT_ONCE, "cpu", most)
    with torch.no_grad():
        sam.Attention(12, 6, 0, 7)(torch.randn(1, 7, 7, 12))
    assert max(sizes) == largest
    assert sum(sizes) == 6 * 49 * 49

@pytest.mark.parametrize("device", DEVICES)
def test_feed_forward_in_pieces_equals_one_piece(monkeypatch, device):
    """A layer's MLP treats each token by itself."""
    torch.manual_seed(0)
    block = sam.Block(12, 3, 0, 7).double().to(device)
    x = torch.randn(2, 7, 7, 12, dtype=torch.float64, device=device)
    y = x + block.attn(block.norm1(x))
    expected = y + block.mlp(block.norm2(y))
    for pieces in (1000, 13, 1):
        monkeypatch.setitem(sam.ENCODED_AT_ONCE, device, pieces)
        assert close(block(x), expected, 1e-10)

@pytest.fixture
def predictor():
    predictor = sam.SamPredictor(tiny())
    predictor.set_image(scene(96, 128))
    return predictor

@pytest.mark.parametrize("name", [
    "prompt_encoder.no_mask_embed.weight",
    "mask_decoder.transformer.layers.0.cross_attn_token_to_image.v_proj.weight"])
def test_weights_may_change_between_predictions(predictor, name):
    """Nothing that they made is kept."""
    _, _, before = predictor.predict(**POINT)
    predictor.model.get_parameter(name).data[:1] += 1  # which autograd does not see
    _, _, after = predictor.predict(**POINT)
    assert not close(after, before, 1e-3)

@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_prediction_in_another_precision(predictor, cast):
    """Points, boxes and mask prompts as in float32; what comes back is float32."""
    prompt = dict(box=[10, 10, 60, 70], mask_input=torch.randn(1, 64, 64))
    model = getattr(tiny(), cast)()
    another = sam.SamPredictor(model)
    another.set_image(scene(96, 128))
    for arguments in (POINT, prompt):
        masks, scores, low_res = predictor.predict(**arguments)
        found_masks, found_scores, found_low_res = another.predict(**arguments)
        assert found_low_res.dtype == np.float32
        assert close(found_low_res, low_res, 0.1)
        assert close(found_scores, scores, 0.1)
        assert (found_masks == masks).mean() > 0.98

def test_filled_up_prompts(predictor):
    """Label -1 fills prompts up to one length: where and at which place such points lie makes no difference. Their
    number does, in the official model as well: each is a token that the others attend to."""
    def low_res(coords, labels):
        coords, labels = torch.tensor([coords]), torch.tensor([labels])
        return predictor.predict_torch(coords.float(), labels)[2]

    filled = low_res([[30, 40], [0, 0], [0, 0]], [1, -1, -1])
    elsewhere = low_res([[30, 40], [77, 3], [500, -9]], [1, -1, -1])
    assert torch.equal(filled, elsewhere)
    in_another_order = low_res([[9, 9], [30, 40], [5, 5]], [-1, 1, -1])
    assert close(filled, in_another_order, 1e-5)
    assert not close(filled, low_res([[30, 40]], [1]), 1e-4)

def test_batched_forward_equals_predictor():
    predictor, resize = sam.SamPredictor(tiny()), sam.ResizeLongestSide(128)
    points = dict(point_coords=torch.tensor([[[20., 30]], [[60, 70]]]), point_labels=torch.ones(2, 1))
    box = dict(boxes=torch.tensor([[3., 5, 28, 100]]), mask_inputs=torch.randn(1, 1, 64, 64))
    prompts = [points, box]
    images = [scene(96, 128, 0), scene(200, 50, 1)]
    batch = []
    for image, prompt in zip(images, prompts):
        scaled = torch.tensor(resize.apply_image(image)).permute(2, 0, 1)
        batch.append(dict(image=scaled, original_size=image.shape[:2], **prompt))
    with torch.no_grad():
        outputs = predictor.model(batch, multimask_output=True)
    for image, prompt, output in zip(images, prompts, outputs):
        predictor.set_image(image)
        arguments = [prompt.get(key) for key in ("point_coords", "point_labels", "boxes", "mask_inputs")]
        masks, scores, low_res = predictor.predict_torch(*arguments)
        assert close(output["low_res_logits"], low_res)
        assert close(output["iou_predictions"], scores)
        assert (output["masks"] == masks).float().mean() > 0.999

@pytest.mark.parametrize("height, width", [
    (128, 128),
    (97, 131),
    (300, 5),
    (5, 300),
    (1, 3000),
    (1, 1)])
@pytest.mark.parametrize("count", [3, 1])
def test_predictor_takes_any_size(height, width, count):
    predictor = sam.SamPredictor(tiny())
    predictor.set_image(np.full((height, width, 3), 77, np.uint8))
    arguments = dict(point_coords=[[width - 1, 0]], point_labels=[1], multimask_output=count == 3)
    masks, scores, low_res = predictor.predict(**arguments)
    assert masks.dtype == bool
    assert masks.shape == (count, height, width)
    assert scores.shape == (count,)
    assert low_res.shape == (count, 64, 64)
    assert np.isfinite(low_res).all()
    logits, _, refined = predictor.predict(**arguments, mask_input=low_res[:1], return_logits=True)  # goes in again
    assert logits.shape == masks.shape
    assert not close(refined, low_res, 1e-3)  # and matters

@pytest.mark.parametrize("size", [(128, 128), (96, 120)])
def test_predictor_takes_views(predictor, size):
    """Turned over, mirrored and with every second pixel, whether they are scaled or not."""
    image = scene(*size)
    upside_down = image[::-1].copy()
    mirrored = image[:, ::-1].copy()
    wide = image.repeat(2, axis=0).repeat(2, axis=1)
    views = upside_down[::-1], mirrored[:, ::-1], wide[::2, ::2]
    predictor.set_image(image)
    expected = predictor.features
    for view in views:
        assert not view.flags["C_CONTIGUOUS"]
        predictor.set_image(view)
        assert torch.equal(predictor.features, expected)

@pytest.mark.parametrize("count", [3, 1])
@pytest.mark.parametrize("prompts", [
    dict(boxes=torch.zeros(0, 4)),
    dict(point_coords=torch.zeros(0, 2, 2), point_labels=torch.zeros(0, 2)),
    dict(boxes=torch.zeros(0, 4), mask_input=torch.zeros(0, 1, 64, 64))])
def test_no_prompts_give_no_masks(predictor, prompts, count):
    arguments = dict(point_coords=None, point_labels=None) | prompts
    masks, scores, low_res = predictor.predict_torch(**arguments, multimask_output=count == 3)
    assert masks.shape == (0, count, 96, 128)
    assert masks.dtype == torch.bool
    assert scores.shape == (0, count)
    assert low_res.shape == (0, count, 64, 64)

def test_predictor_channel_order_and_reset(predictor):
    features = predictor.get_image_embedding()
    predictor.set_image(scene(96, 128)[..., ::-1], image_format="BGR")
    assert torch.equal(features, predictor.get_image_embedding())
    predictor.reset_image()
    for ask in (predictor.get_image_embedding, predictor.predict, lambda: predictor.predict_torch(None, None)):
        with refused("set_image", kind=RuntimeError):
            ask()

POINT = dict(point_coords=[[3, 4]], point_labels=[1])

@pytest.mark.parametrize("arguments, words", [
    (dict(point_coords=[[3, 4]]), "point_labels"),
    (dict(point_labels=[1]), "point_coords"),
    (POINT | dict(point_coords=[[np.nan, 4]]), "NaN"),
    (POINT | dict(point_labels=[2]), "2"),
    (POINT | dict(point_labels=[0.5]), "0.5"),
    (POINT | dict(point_labels=[-0.5]), "-0.5"),
    (dict(point_coords=[3, 4], point_labels=[1]), "shape"),
    (dict(point_coords=[[3, 4, 5]], point_labels=[1]), "(K, 2)"),
    (POINT | dict(point_labels=[1, 0]), "shape"),
    (dict(box=[1, 2, 3]), "box"),
    (dict(box=[1, 2, np.inf, 3]), "box"),
    (POINT | dict(mask_input=np.zeros((1, 63, 64))), "(1, 64, 64)"),
    (POINT | dict(mask_input=np.full((1, 64, 64), np.nan)), "mask_input")])
def test_prompts_that_make_no_sense(predictor, arguments, words):
    with refused(words):
        predictor.predict(**arguments)
    assert predictor.predict(**POINT)[0].shape == (3, 96, 128)  # the next prompt is answered

def test_images_that_the_predictor_refuses(predictor):
    four_channels = np.zeros((9, 9, 4), np.uint8)
    no_rows = np.zeros((0, 9, 3), np.uint8)
    for image in (scene() / 255, scene()[..., 0], four_channels, no_rows):
        with refused(str(image.dtype), str(image.shape)):
            predictor.set_image(image)
    with refused("RGBA"):
        predictor.set_image(scene(), "RGBA")
    with refused("128"):
        predictor.set_torch_image(torch.zeros(1, 3, 100, 90), (100, 90))

@pytest.mark.parametrize("size, scaled, xy, expected", [
    ((50, 100), (64, 128), (99, 49), (126.72, 62.72)),
    ((256, 64), (128, 32), (10, 200), (5, 100)),
    ((427, 640), (85, 128), (320, 427), (64, 85)),
    ((5, 300), (2, 128), (150, 5), (64, 2)),
    ((1, 3000), (1, 128), (3000, 1), (128, 1))])
def test_scaling_of_coordinates(size, scaled, xy, expected):
    resize = sam.ResizeLongestSide(128)
    assert resize.get_preprocess_shape(*size) == scaled
    assert resize.apply_image(np.zeros((*size, 3), np.uint8)).shape == (*scaled, 3)
    for point in (np.array([[xy]], np.float64), torch.tensor([[xy]]).double()):
        out = resize.apply_coords(point, size)
        assert str(out.dtype).endswith("float32")  # which all devices have
        assert np.allclose(out[0, 0], expected, rtol=1e-6)
    box = resize.apply_boxes(np.array([[*xy, *xy]]), size)
    assert np.allclose(box, [[*expected, *expected]], rtol=1e-6)

@pytest.fixture
def small(tmp_path):
    """vit_t and the same at image size 64, from a file. Its absolute positions are the plane y + 3 x, those of layer 1
    relative to each other a line from -1 to 1."""
    model = tiny()
    encoder = model.image_encoder
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    plane = (y + 3 * x)[:, :, None]
    line = torch.linspace(-1, 1, 31)[:, None]
    with torch.no_grad():
        encoder.pos_embed.copy_(plane.expand_as(encoder.pos_embed))
        encoder.blocks[1].attn.rel_pos_h.copy_(line.expand(-1, 32))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    return model, sam.build_sam("vit_t", tmp_path / "w.pth", image_size=64)

def test_positions_are_interpolated_to_another_image_size(small):
    """A plane stays one, a line stays one; the rest is untouched."""
    large, small = (model.image_encoder for model in small)
    assert small.pos_embed.shape == (1, 8, 8, 160)
    y, x = torch.meshgrid(torch.arange(2.0, 6), torch.arange(2.0, 6), indexing="ij")
    middle = small.pos_embed[0, 2:6, 2:6, 0]  # away from the rim, where the filter lacks neighbours
    expected = 2 * y + 0.5 + 3 * (2 * x + 0.5)  # each new token lies between two old ones
    assert torch.allclose(middle, expected, atol=1e-3)
    table = small.blocks[1].attn.rel_pos_h[:, 0]
    assert table.shape == (15,)
    slope = torch.tensor(2 / 30 * 31 / 15)
    assert torch.allclose(table.diff()[2:-2], slope, atol=1e-5)
    assert torch.equal(small.blocks[0].attn.rel_pos_h, large.blocks[0].attn.rel_pos_h)

def test_prediction_at_another_image_size(small):
    predictor = sam.SamPredictor(small[1])
    predictor.set_image(scene())
    masks, _, _ = predictor.predict(np.array([[50, 60]]), [1])
    assert masks.shape == (3, 120, 160)

@pytest.mark.parametrize("size", [60, 8, 8192])
def test_image_sizes_that_are_refused(size):
    with refused("image size", str(size)):
        sam.build_sam("vit_t", image_size=size)

@pytest.fixture(params=[1, 3], ids=["one image", "an image each"])
def crossing(request):
    """Attention between tokens and image, 3 x 5 tokens, and an image of 7 x 7 for all or each and its positions."""
    torch.manual_seed(0)
    layer = sam.DecoderAttention(16, 4, downsample=2).double()
    tensors = []
    for shape in ((3, 5, 16), (request.param, 49, 16), (1, 49, 16)):
        tensor = torch.randn(shape, dtype=torch.float64)
        tensors.append(tensor.requires_grad_())
    return layer, *tensors

def same_with_gradients(found, expected, inputs):
    """Equal to rounding, and so is what comes back to each input, which is not zero."""
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-12)
    gradients = torch.autograd.grad(found.square().sum(), inputs)
    expected_gradients = torch.autograd.grad(expected.square().sum(), inputs)
    for gradient, plain in zip(gradients, expected_gradients):
        assert plain.abs().max() > 1e-3
        assert torch.allclose(gradient, plain, atol=1e-10)

def test_tokens_to_image_is_plain_attention(crossing):
    layer, tokens, image, positions = crossing
    places = image + positions
    expected = layer(tokens, places.expand(3, -1, -1), image.expand(3, -1, -1))
    found = layer.tokens_to_image(tokens, places, image)
    same_with_gradients(found, expected, (tokens, image, positions, layer.q_proj.bias, layer.v_proj.weight))

def test_image_to_tokens_is_plain_attention(crossing):
    layer, tokens, image, positions = crossing
    keys, places = tokens.flip(1), image + positions
    expected = image + layer(places.expand(3, -1, -1), keys, tokens)
    found = layer.image_to_tokens(image, places, keys, tokens)
    same_with_gradients(found, expected, (tokens, image, positions, layer.q_proj.bias, layer.v_proj.weight))

def test_upscaling_pixel_by_pixel_is_the_transposed_convolution():
    decoder = tiny().mask_decoder
    pixels, kernels = torch.randn(2, 6 * 6, 128), torch.randn(2, 3, 16)
    upscaled = decoder.output_upscaling(pixels.mT.reshape(2, 128, 6, 6))  # (2, 16, 24, 24)
    expected = torch.einsum("pchw,pmc->pmhw", upscaled, kernels)
    assert close(decoder.upscale(pixels, kernels), expected, 1e-5)

@pytest.mark.parametrize("which", ["one image", "an image each", "image by index"])
def test_many_prompts_in_parts_are_as_in_one(monkeypatch, which):
    model = tiny()
    images = {"one image": 1, "an image each": 7, "image by index": 3}[which]
    embeddings = encode(model, pictures(*range(images)))
    rng = torch.Generator().manual_seed(0)
    corners, _ = torch.rand(7, 4, generator=rng).sort()
    prompts = dict(boxes=corners * 128)
    if which == "an image each":
        prompts["masks"] = torch.randn(7, 1, 64, 64)
    if which == "image by index":
        prompts["image_index"] = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    whole = model.decode(embeddings, **prompts)
    monkeypatch.setitem(sam.TOKENS_AT_ONCE, "cpu", 2 * 256)  # two prompts at a time, then one
    parts = model.decode(embeddings, **prompts)
    assert whole[0].shape == (7, 1, 64, 64)
    for part, expected in zip(parts, whole):
        assert close(part, expected, 1e-5)

def test_an_image_for_each_prompt_or_one_for_all():
    boxes = torch.tensor([[1., 2, 30, 40]]).expand(7, -1)
    with pytest.raises(RuntimeError):
        tiny().decode(torch.zeros(2, 128, 16, 16), boxes=boxes)

def test_gradients_flow_except_in_the_predictor(predictor):
    model = predictor.model
    points = torch.tensor([[[9., 9]]]), torch.tensor([[1]])
    mask = torch.randn(1, 1, 64, 64)
    embedding = model.image_encoder(pictures(0))
    low_res, scores = model.decode(embedding, points, masks=mask, multimask_output=True)
    (low_res.square().sum() + scores.sum()).backward()
    # What one object point, a mask and three outputs leave out: other labels, "no mask", the mask for clear prompts;
    # and biases that move all scores of a token alike.
    unused = r"point_embeddings\.[023]|no_mask_embed|hypernetworks_mlps\.0|token_to_image\.k_proj\.bias"
    for name, parameter in model.named_parameters():
        if not re.search(unused, name):
            assert parameter.grad.any(), name
    assert not predictor.features.requires_grad
    _, _, low_res = predictor.predict_torch(None, None, torch.tensor([[1., 1, 9, 9]]))
    assert not low_res.requires_grad

# ---- Automatic masks ------------------------------------------------------------------------------------------------

# golden.json's "everything": arguments, and of each record that official SamAutomaticMaskGenerator gave for the shipped
# vit_t and scene(128, 128): point, bbox, crop_box, area, predicted IoU, stability.

@functools.cache
def shipped():
    return sam.build_sam("vit_t", os.path.join(HERE, "assets", "sam_vit_t.pth"))

def find(image, model=None, **settings):
    """Records of everything that passes low thresholds."""
    low = dict(points_per_side=5, pred_iou_thresh=0.6, stability_score_thresh=0.4)
    return sam.SamAutomaticMaskGenerator(model or shipped(), **low | settings).generate(image)

def test_everything_that_the_official_code_finds():
    found = find(scene(128, 128), **GOLDEN["everything"]["arguments"])
    expected = GOLDEN["everything"]["records"]
    assert len(found) == len(expected)
    for record, (*places, area, iou, stability) in zip(found, expected):
        assert [*record["point_coords"][0], *record["bbox"], *record["crop_box"]] == places
        assert record["area"] == pytest.approx(area, abs=1)
        assert record["predicted_iou"] == pytest.approx(iou, abs=1e-4)
        assert record["stability_score"] == pytest.approx(stability, abs=1e-4)

@pytest.mark.parametrize("model", [None, "gara"])
def test_records_are_what_the_predictor_says_of_their_points(model):
    model, image = tiny(model) if model else shipped(), scene(97, 150)
    predictor = sam.SamPredictor(model)
    predictor.set_image(image)
    records = find(image, model, pred_iou_thresh=0, box_nms_thresh=1)
    assert records
    for record in records:
        logits, scores, _ = predictor.predict(record["point_coords"], [1], return_logits=True)
        which = np.abs(scores - record["predicted_iou"]).argmin()
        assert scores[which] == pytest.approx(record["predicted_iou"], abs=1e-4)
        mask, logits = record["segmentation"], logits[which]
        assert (mask != (logits > 0)).sum() <= 1
        assert record["area"] == mask.sum()
        stability = (logits > 1).sum() / (logits > -1).sum()
        assert record["stability_score"] == pytest.approx(stability, abs=1e-2)
        rows, columns = mask.nonzero()
        x, y, width, height = record["bbox"]
        assert (x, x + width) == (columns.min(), columns.max())
        assert (y, y + height) == (rows.min(), rows.max())
        assert record["crop_box"] == [0, 0, 150, 97]

def test_everything_is_sorted_by_score_and_passes_the_thresholds():
    records = find(scene(128, 128), pred_iou_thresh=0.7, stability_score_thresh=0.5)
    scores = [record["predicted_iou"] for record in records]
    assert scores == sorted(scores, reverse=True)
    assert min(scores) > 0.7
    assert min(record["stability_score"] for record in records) >= 0.5

GRID = [(x / 5 + 0.1, y / 5 + 0.1) for y in range(5) for x in range(5)]

@pytest.mark.parametrize("settings", [
    dict(points_per_batch=1),
    dict(points_per_batch=7),
    dict(points_per_side=None, point_grids=[np.array(GRID)])])
def test_everything_depends_on_its_points_alone(settings):
    expected, found = find(scene(90, 128)), find(scene(90, 128), **settings)
    assert len(found) == len(expected) > 3
    for a, b in zip(found, expected):
        assert a["bbox"] == b["bbox"]
        assert a["point_coords"][0] == pytest.approx(b["point_coords"][0])

def test_forms_of_masks():
    masks = find(scene())
    lists = find(scene(), output_mode="uncompressed_rle")
    strings = find(scene(), output_mode="coco_rle")
    assert len(masks) > 3
    for mask, runs, text in zip(masks, lists, strings):
        mask, runs = mask["segmentation"], runs["segmentation"]
        assert mask.dtype == bool
        assert np.array_equal(data.rle_decode(runs), mask)
        assert isinstance(runs["counts"], list)
        assert text["segmentation"] == data.rle_encode(mask)

@pytest.mark.parametrize("share", [0, 0.1, 1])
def test_packed_masks_come_back(share):
    rng = np.random.default_rng(0)
    mask = rng.random((13, 21)) < share
    assert np.array_equal(sam.unpack(sam.pack(mask), mask.shape), mask)

def plain_iou(a, b):
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    width = max(0, min(ax + aw, bx + bw) - max(ax, bx))
    height = max(0, min(ay + ah, by + bh) - max(ay, by))
    union = aw * ah + bw * bh - width * height
    return float(np.float32(width * height) / np.float32(union)) if union else 0

@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_suppression_against_loops(threshold):
    rng = np.random.default_rng(0)
    records = [dict(bbox=box) for box in rng.integers(0, 12, (200, 4)).tolist()]
    scores = rng.integers(0, 20, 200)  # with ties
    kept = []
    for k in np.argsort(-scores, stable=True):
        box = records[k]["bbox"]
        if all(plain_iou(box, other["bbox"]) <= threshold for other in kept):
            kept.append(records[k])
    assert sam.suppress(records, scores, threshold) == kept

def test_where_nothing_is_found_there_are_no_records():
    assert find(scene(), pred_iou_thresh=2, crop_n_layers=1, min_mask_region_area=9) == []

@pytest.mark.parametrize("height, width", [(97, 301), (400, 150), (64, 64)])
def test_crops_overlap_and_cover_the_image(height, width):
    generator = sam.SamAutomaticMaskGenerator(shipped())
    assert generator.crops(0, height, width) == [[0, 0, width, height]]
    for layer in (1, 2):
        crops = generator.crops(layer, height, width)
        assert len(crops) == 4 ** layer
        times = np.zeros((height, width), int)
        for x, y, across, down in crops:
            assert times[y:y + down, x:x + across].shape == (down, across)  # lies within
            times[y:y + down, x:x + across] += 1
        assert times.min() == 1
        assert times.max() == 4  # in corners

@pytest.mark.parametrize("box, expected", [
    ([121, 150, 30, 30], False),
    ([120, 150, 30, 30], True),
    ([150, 120, 30, 30], True),
    ([150, 150, 29, 30], False),
    ([150, 150, 30, 30], True),
    ([150, 150, 29, 151], False)])  # the crop ends where the image does
def test_masks_that_are_cut_off(box, expected):
    record = dict(bbox=box, crop_box=[100, 100, 100, 220])
    assert sam.cut_off(record, (320, 400)) == expected

def test_small_regions_are_filled_and_removed():
    mask = np.zeros((20, 20), bool)
    mask[2:12, 2:12] = True
    expected = mask.copy()
    mask[4:6, 4:6] = False
    mask[6, 6] = False  # one hole of 5 pixels: corners connect
    mask[15, 15:18] = mask[16, 18] = True  # an island of 4
    small = np.zeros((20, 20), bool)
    small[18:20, 1:3] = True  # all there is
    records = [sam.pack(mask) | dict(name=0), sam.pack(small) | dict(name=1), sam.pack(expected) | dict(name=2)]
    generator = sam.SamAutomaticMaskGenerator(shipped(), min_mask_region_area=6)
    untouched, tidied = generator.tidy(records, (20, 20))
    assert untouched["name"] == 2  # it goes first and suppresses what has become the same
    assert np.array_equal(sam.unpack(tidied, (20, 20)), small)

def test_regions_of_the_least_area_stay():
    mask = np.ones((9, 9), bool)
    mask[2:4, 2:4] = False
    for area, stays in ((4, True), (5, False)):
        generator = sam.SamAutomaticMaskGenerator(shipped(), min_mask_region_area=area)
        tidied = generator.tidy([sam.pack(mask)], mask.shape)[0]
        assert np.array_equal(sam.unpack(tidied, mask.shape), mask) == stays

def test_progress_counts_every_point():
    counts = []
    generator = sam.SamAutomaticMaskGenerator(shipped(), points_per_side=4, points_per_batch=5, crop_n_layers=1,
                                              crop_n_points_downscale_factor=2)
    generator.generate(scene(), counts.append)
    assert sum(counts) == 16 + 4 * 4

@pytest.mark.parametrize("settings, words", [
    (dict(output_mode="png"), "png"),
    (dict(points_per_side=0), "points_per_side 0"),
    (dict(points_per_side=2, crop_n_layers=2, crop_n_points_downscale_factor=2), "layer 2")])
def test_settings_of_automatic_masks_that_make_no_sense(settings, words):
    with refused(words):
        sam.SamAutomaticMaskGenerator(shipped(), **settings)

def test_names_that_the_official_onnx_model_uses():
    encoder, decoder = shipped().prompt_encoder, shipped().mask_decoder
    assert encoder.embed_dim == encoder.no_mask_embed.weight.shape[1]
    assert encoder.num_point_embeddings == len(encoder.point_embeddings)
    assert decoder.num_mask_tokens == len(decoder.mask_tokens.weight)
    assert encoder.input_image_size == (128, 128)
    assert encoder.image_embedding_size == (16, 16)
    assert encoder.mask_input_size == (64, 64)
    xy = torch.rand(3, 2)
    assert torch.equal(encoder.pe_layer._pe_encoding(xy), encoder.pe_layer(xy))

EVERYTHING = ["--everything", "--points-per-side", "5", "--pred-iou-thresh", "0.6", "--stability-score-thresh", "0.4"]

def test_everything_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(scene()).save("photo.png")
    assert run_cli(sam.main, "photo.png", "--backbone", "vit_t", *EVERYTHING, "--out", "o.png", "--json", "m.json") == 0
    with open("m.json") as file:
        assert json.load(file) == find(scene(), output_mode="coco_rle")
    printed = capsys.readouterr()
    assert "masks" in printed.out
    assert "25/25" in printed.err
    sheet = np.asarray(Image.open("o.png"))
    mask = find(scene())[0]["segmentation"]
    assert (sheet != scene())[mask].any(1).mean() > 0.9
    assert {path.name for path in everything(tmp_path)} == {"photo.png", "o.png", "m.json"}

@pytest.mark.parametrize("arguments, words", [
    (["--everything", "--point", "1,1"], "--everything takes no"),
    (["--everything", "--mask", "m.png"], "--everything takes no"),
    (["--point", "1,1", "--json", "m.json"], "--json goes with"),
    (["--everything", "--points-per-side", "0"], "points_per_side 0"),
    (["--everything", "--points-per-side", "x"], "--points-per-side"),
    (["--everything", "--json", "no/m.json"], "no/m.json")])
def test_mistakes_with_everything_end_in_one_line(tmp_path, tiny_files, capsys, arguments, words):
    before = everything(tmp_path)
    assert run_cli(sam.main, *tiny_files[:-2], *arguments) == 2
    assert one_error(capsys, words)
    assert everything(tmp_path) == before

# ---- SAM: files and command line ------------------------------------------------------------------------------------

POS_EMBED, BIAS = "image_encoder.pos_embed", "mask_decoder.iou_prediction_head.layers.2.bias"

def prefixed(prefix):
    return {prefix + key: value for key, value in tiny_weights().items()}

@pytest.mark.parametrize("content", [
    lambda: dict(model=tiny_weights(), epoch=3, args=argparse.Namespace(lr=0.1), best=np.float64(3), rng=np.ones(2)),
    lambda: dict(state_dict=prefixed("module.")),
    lambda: dict(model=dict(state_dict=prefixed("model.sam."))),
    lambda: dict(sam=tiny_weights(), training={}, step=3),
    lambda: {key: value.double() for key, value in tiny_weights().items()}])
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_in_the_forms_of_training_scripts(tmp_path, content, zipped):
    torch.save(content(), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert same(dict(sam.build_sam("vit_t", tmp_path / "w.pth").state_dict()), tiny_weights())

def test_checkpoints_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tiny_weights(), tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(sam.read_checkpoint(tmp_path / "w.pth", "vit_t"), tiny_weights())

@pytest.mark.parametrize("content, words", [
    (b"", "not a readable"),
    (b"<html>404 not found</html>\n" * 9, "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    (b'\x10\0\0\0\0\0\0\0{"__metadata__":{}}', "a safetensors file"),
    (b"cut", "not a readable"),
    (torch.nn.Linear(1, 1), "a whole pickled model"),
    (dict(model=prefixed, epoch=1), "code"),
    (dict(format="gara-sam adapter 3"), "an adapter, not a SAM checkpoint"),
    ([1, 2], "not a SAM checkpoint"),
    ({"a": torch.ones(2)}, "not a SAM checkpoint"),
    ({"model": {POS_EMBED: torch.ones(2)}}, "not a SAM checkpoint"),
    ({POS_EMBED: 3}, "not a SAM checkpoint"),
    (lambda w: w.update({5: torch.ones(1)}), "not a SAM checkpoint"),
    (lambda w: w.pop(BIAS), f"lacks '{BIAS}'"),
    (lambda w: w.update({BIAS: 5}), BIAS),
    (lambda w: w.update({BIAS: torch.ones(4).int()}), BIAS),
    (lambda w: w.update({BIAS: torch.ones(4).to_sparse()}), BIAS),
    (lambda w: w.update({BIAS: torch.ones(4, device="meta")}), BIAS),
    (lambda w: w.update({"image_encoder.blocks": torch.ones(1)}), "unknown key 'image_encoder.blocks'"),
    (lambda w: w.update({"sam_hq.\nweight": torch.ones(1)}), "unknown key 'sam_hq."),
    (lambda w: w.update({BIAS: torch.ones(5)}), f"{BIAS} has shape (5,)"),
    (lambda w: w[BIAS].fill_(math.nan), f"{BIAS} holds NaN"),
    (lambda w: w[POS_EMBED].view(-1)[7:8].fill_(math.inf), f"{POS_EMBED} holds NaN or infinite")])
def test_checkpoints_that_are_refused(tmp_path, content, words):
    path = tmp_path / "w.pth"
    weights = {key: value.clone() for key, value in tiny_weights().items()}
    if type(content).__name__ == "function":
        content(weights)
        content = weights
    torch.save(weights if content == b"cut" else content, path)
    if isinstance(content, bytes):
        path.write_bytes(path.read_bytes()[:-5000] if content == b"cut" else content)
    with refused("w.pth", words, kind=sam.CheckpointError):
        sam.build_sam("vit_t", path)

def damaged(content, count):
    """Copies of a file's bytes with one bit flipped, and some cut off, emptied or with more at their end."""
    flips = np.random.default_rng(0).integers(8 * len(content), size=count).tolist()
    listed = content.rindex(b"PK\1\2", 0, content.rindex(b"/data/"))  # where the zip file lists its last tensor
    for flip in flips + list(range(8 * listed, 8 * (listed + 46))):
        at = flip // 8
        flipped = bytearray(content)
        flipped[at] ^= 1 << flip % 8
        yield bytes(flipped)
        if flip % 64 == 0:
            yield content[:at]
            yield content[:at] + bytes(len(content) - at)
            yield content + bytes(at % 90_000)

def test_damage_in_weights_is_noticed(tmp_path):
    """Or is none: what was read is what was written."""
    path, weights = tmp_path / "w.pt", dict(a=torch.arange(300.0), b=dict(c=torch.ones(30).half(), d=[1, "two"]))
    torch.save(weights, path)
    noticed = 0
    for content in damaged(path.read_bytes(), 100):
        path.write_bytes(content)
        try:
            assert same(sam.read_weights(path), weights)
        except sam.CheckpointError as error:
            assert len(str(error).splitlines()) == 1
            noticed += 1
    assert noticed > 100

class Server(http.server.BaseHTTPRequestHandler):
    """Answers as its `answer` says."""
    answer = "whole"

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.answer == "no HTTP":
            self.wfile.write(b"hello\n")
        elif self.answer == "not there":
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Length", "many" if self.answer == "no length" else "6")
            self.end_headers()
            self.wfile.write(b"wei" if self.answer in ("silent", "cut") else b"weights"[:6])
        if self.answer == "silent":
            time.sleep(2)

    def log_message(self, *_):
        pass

@pytest.fixture
def download(tmp_path, monkeypatch):
    """find_checkpoint("vit_b") from a server on this machine that answers as asked, in an empty folder."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(sam, "URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(sam, "PATIENCE", 0.5)
    name = f"sam_vit_none_{hashlib.sha256(b'weight').hexdigest()[:6]}.pth"
    monkeypatch.setitem(sam.FILES, "vit_b", name)

    def find(answer):
        monkeypatch.setattr(Server, "answer", answer)
        return sam.find_checkpoint("vit_b")

    yield find, server
    server.shutdown()
    server.server_close()

@pytest.mark.parametrize("answer", ["silent", "cut", "no HTTP", "not there", "no length"])
def test_downloads_that_fail(download, tmp_path, answer):
    """In one line, soon, and a second try finds nothing in its way; nor does one after a kill."""
    find, _ = download
    with refused("could not download sam_vit_none", "checkpoints/", kind=FileNotFoundError):
        find(answer)
    assert everything(tmp_path) == {}
    (tmp_path / "hub" / "checkpoints" / "sam_vit_b.pth.0123.partial").write_bytes(b"wei")
    assert open(find("whole"), "rb").read() == b"weight"
    assert len(everything(tmp_path)) == 1

def test_several_processes_download_once(download):
    find, server = download
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(find, ["whole"] * 4))
    assert len(paths) == 1
    assert len(server.asked) == 1

def test_checkpoint_of_another_backbone_is_named(tmp_path):
    torch.save(tiny_weights(), tmp_path / "w.pth")
    with refused("vit_t", "not vit_b", kind=sam.CheckpointError):
        sam.build_sam("vit_b", tmp_path / "w.pth")
    with refused("none.pth", kind=FileNotFoundError):
        sam.build_sam("vit_t", tmp_path / "none.pth")
    with refused("vit_g", "vit_t, vit_b, vit_l, vit_h"):
        sam.build_sam("vit_g")

def test_sam_needs_no_other_file_of_the_project(tmp_path):
    """But for its command line."""
    shutil.copy(sam.__file__, tmp_path)
    program = "import sam; print(type(sam.SamPredictor(sam.build_sam('vit_t'))).__name__)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "SamPredictor", done.stderr

@pytest.fixture
def tiny_files(tmp_path, monkeypatch):
    """An image and a vit_t checkpoint in the working folder: the arguments that name them."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(scene(60, 90)).save("photo.png")
    torch.save(tiny_weights(), "w.pth")
    return ["photo.png", "--backbone", "vit_t", "--checkpoint", "w.pth", "--out", "o.png", "--mask", "m.png"]

ONE_POINT = dict(point_coords=[[40, 30]], point_labels=[1])
POINTS_AND_BOX = dict(point_coords=[[40, 30], [5, 9]], point_labels=[1, 0], box=[3, 3, 80, 50], multimask_output=False)

@pytest.mark.parametrize("method", [None, "gara"])
@pytest.mark.parametrize("arguments, prompt", [
    (["--point", "40,30"], ONE_POINT),
    (["--point", "40,30", "--point", "5,9,0", "--box", "3,3,80,50"], POINTS_AND_BOX)])
def test_sam_command_line_equals_predictor(tmp_path, tiny_files, capsys, arguments, prompt, method):
    model = tiny(method)
    if method:
        gara.save_adapter(model, "a.pt")
        arguments = [*arguments, "--adapter", "a.pt"]
    assert run_cli(sam.main, *tiny_files, *arguments) == 0
    predictor, plain = sam.SamPredictor(model), sam.SamPredictor(tiny())
    predictor.set_image(scene(60, 90))
    plain.set_image(scene(60, 90))
    masks, scores, low_res = predictor.predict(**prompt)
    best = masks[scores.argmax()]
    assert 0 < best.sum() < best.size
    assert np.array_equal(np.asarray(Image.open("m.png")), best * np.uint8(255))
    assert Image.open("o.png").size == (90, 60)
    assert f"{best.sum():,} pixels" in capsys.readouterr().out
    assert (method is None) == close(plain.predict(**prompt)[2], low_res, 1e-3)  # the adapter acts
    names = {path.name for path in everything(tmp_path)}
    assert names - {"a.pt"} == {"m.png", "o.png", "photo.png", "w.pth"}

AT = ["--point", "1,1"]

@pytest.mark.parametrize("arguments, words", [
    ([], "say what to segment"),
    (["--point", "1"], "--point takes"),
    (["--point", "90,10"], "90,10 lies outside photo.png"),
    (["--point", "nan,3"], "nan,3 lies outside"),
    (["--box", "50,5,40,9"], "x0 < x1"),
    (["--box", "1,2,3"], "--box takes 4"),
    (["--box", "1,2,91,9"], "91,9 lies outside"),
    (["--point", "1,1,7"], "point_labels"),
    (["--point", "1,1,0.5"], "point_labels"),
    (AT + ["--what"], "--what"),
    (AT + ["--backbone", "vit_b"], "w.pth holds vit_t"),
    (AT + ["--checkpoint", "none.pth"], "none.pth"),
    (AT + ["--adapter", "none.pt"], "none.pt"),
    (AT + ["--adapter", "w.pth"], "w.pth"),
    (AT + ["--out", "no/o.png"], "no/o.png"),
    (AT + ["--mask", "no/m.png"], "no/m.png"),
    (AT + ["--device", "nonsense"], "nonsense"),
    (AT + ["--device", "cuda:99"], "CUDA")])
def test_sam_command_line_mistakes_end_in_one_line(tmp_path, tiny_files, capsys, arguments, words):
    before = everything(tmp_path)
    assert run_cli(sam.main, *tiny_files, *arguments) == 2
    assert one_error(capsys, words)
    assert everything(tmp_path) == before

@pytest.mark.parametrize("image", ["w.pth", "none.png"])
def test_sam_command_line_refuses_what_is_no_image(tmp_path, tiny_files, capsys, image):
    before = everything(tmp_path)
    assert run_cli(sam.main, image, *tiny_files[1:], *AT) == 2
    assert one_error(capsys, image)
    assert everything(tmp_path) == before

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
    (dict(N=1, tokens=(1,), r=9), torch.float64, 1e-12),
    (dict(N=3, tokens=(8, 8), d=96, o=96, r=40), torch.float32, 1e-5),
    (dict(tokens=(2, 3), r=1, per_token=True), torch.float64, 1e-12),
    (dict(G=1, flat=True, per_token=True), torch.float64, 1e-12)])

@FORMS
@SIZES
@pytest.mark.parametrize("device", DEVICES)
def test_gated_linear_is_equation_7(monkeypatch, form, sizes, dtype, tolerance, device):
    """Without gradients, where some components are closed: those of image 1 all."""
    monkeypatch.setattr(gara, "FORM", form)
    tolerance = max(tolerance, 1e-4 if device == "cuda" else 0)
    *exact, mask = operands(sizes)
    *inputs, _ = operands(sizes, dtype, device)
    closed = torch.arange(mask.numel()).view_as(mask) % 3 > 0
    closed[1:2] = True
    mask = mask.masked_fill(closed, 0)
    with torch.no_grad():
        y = gara.gated_linear(*inputs, mask.to(device, dtype))
    assert y.dtype == dtype
    assert close(y, plain_gated_linear(*exact, mask), tolerance)

@FORMS
@SIZES
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_gated_linear(monkeypatch, form, sizes, dtype, tolerance, device):
    """Of everything at once; and when only one is asked for, that one alone."""
    monkeypatch.setattr(gara, "FORM", form)
    tolerance = max(tolerance, 1e-4 if device == "cuda" else 0)
    exact, inputs = operands(sizes), operands(sizes, dtype, device)
    y, expected = gara.gated_linear(*inputs), plain_gated_linear(*exact)
    assert close(y, expected, tolerance)
    dy = expected.detach() * torch.ones_like(expected).cos()
    wanted = torch.autograd.grad(expected, exact, dy)
    found = torch.autograd.grad(y, inputs, dy.to(y))
    for i, want in enumerate(wanted):
        alone = [t.detach().requires_grad_(k == i) for k, t in enumerate(inputs)]
        gara.gated_linear(*alone).backward(dy.to(y))
        assert [k for k, t in enumerate(alone) if t.grad is not None] == [i]
        assert found[i].dtype == dtype
        assert close(found[i], want, tolerance)
        assert close(alone[i].grad, want, tolerance)

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

@pytest.mark.parametrize("scope, index", [("image", 0), ("image", 3), ("window", 1)])  # layer 1 has no windows
def test_one_layer_by_hand(scope, index):
    """Equations 2 to 7, one image at a time."""
    model = tiny("gara", scope=scope)
    layer, x, y = inputs_and_outputs(model, index, pictures(0, 1, 2))
    for n in range(3):
        expected, space = by_hand(layer, x[n].flatten(0, 1))
        assert close(y[n].flatten(0, 1), expected)
        assert layer.space[n] == space

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

RANKS = {"gara": (4, 48), "gara_flat": (4,), "gara_space": (4, 48), "gara_random": (4, 48), "lora": (4,),
         "moe_lora": (1, 4, 24, 48)}

@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["gara_space", "lora", "moe_lora"])
def test_one_set_is_open_as_a_whole(method, training):
    model, ranks, chosen = tiny(method).train(training), RANKS[method], set()
    encode(model, pictures(0, 1, 2, 3))
    for layer in gara.gates(model):
        for space, vector in zip(layer["space"].tolist(), layer["vector"]):
            first = sum(ranks[:space])
            assert vector.nonzero().flatten().tolist() == list(range(first, first + ranks[space]))
            chosen.add(space)
    assert len(chosen) > 1 or method == "lora"

@pytest.mark.parametrize("scope", gara.SCOPES)
def test_random_gates_are_fair_coins_of_each_image(scope):
    """In evaluation as well: all open as often as not, others in another image or layer, the same for the same one."""
    model = tiny("gara_random", scope=scope)
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

@pytest.mark.parametrize("method, scope", [*[(method, "image") for method in gara.METHODS], ("gara", "window")])
def test_gates_report_every_layer(method, scope):
    """Where windows decide, row by row; always the last pass, not the one before."""
    options = dict(scope=scope) if scope == "window" else {}
    model, rank = tiny(method, **options), sum(RANKS[method])
    encode(model, pictures(4))
    encode(model, pictures(0, 1, 2))
    report = gara.gates(model)
    assert [layer["layer"] for layer in report] == list(range(6))
    for layer, adapter in zip(report, gara.adapters(model)):
        decisions = (3, 4) if adapter.window else (3,)
        assert layer["vector"].shape == (*decisions, rank)
        assert layer["space"].shape == decisions
        assert torch.equal(layer["count"], layer["vector"].sum(-1))
        assert torch.equal(layer["vector"], adapter.mask.view(*decisions, rank) == 1)

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

def test_parameter_counts_by_the_widths_of_the_appendix():
    assert expected_count("gara", 768, 12) == 15_989_196
    assert expected_count("gara", 1024, 24) == 42_595_224

@pytest.mark.parametrize("method, options, word", [
    ("dora", {}, "gara, gara_flat, gara_space, gara_random, lora, moe_lora"),
    ("lora", dict(rank_low=3), "rank_low"), ("lora", dict(scope="window"), "scope"), ("gara", dict(rank=3), "rank"),
    ("gara_random", dict(temperature=1), "temperature"), ("lora", dict(rank=-1), "-1"), ("lora", dict(rank=2.5), "2.5"),
    ("lora", dict(rank="8"), "8"), ("lora", dict(rank=641), "641"), ("moe_lora", dict(experts=()), "()"),
    ("moe_lora", dict(experts=(1, 0)), "(1, 0)"), ("moe_lora", dict(experts=[640] * 3), "1280"),
    ("gara", dict(temperature=0), "temperature"), ("gara", dict(temperature=math.nan), "nan"),
    ("gara", dict(scope="layer"), "image, window")])
def test_attach_refuses(method, options, word):
    model = tiny()
    with refused(word):
        gara.attach(model, method, **options)
    assert gara.adapters(model) == []
    assert all(p.requires_grad for p in model.parameters())

def test_attach_refuses_a_second_adapter():
    with refused("lora", "detach"):
        gara.attach(tiny("lora"), "gara")

# ---- GaRA: adapter files --------------------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path):
    """Saves an adapter of a method and gives its path."""
    def save(method="gara", **options):
        gara.save_adapter(tiny(method, **options), tmp_path / "a.pt")
        return tmp_path / "a.pt"
    return save

@pytest.mark.parametrize("method, options", [
    ("gara", {}), ("gara", dict(scope="window")), ("gara_flat", dict(rank=9, temperature=1.5)),
    ("gara_space", dict(rank_low=2)), ("gara_random", {}), ("lora", dict(rank=2)), ("moe_lora", dict(experts=(3, 5)))])
def test_save_and_load_adapter(tmp_path, method, options):
    model, path, x = tiny(method, **options), tmp_path / "a.pt", pictures(0, 1)
    gara.save_adapter(model, path)
    assert os.listdir(tmp_path) == ["a.pt"]

    weights, expected, fresh = torch.load(path, weights_only=True)["weights"], encode(model, x), tiny()
    assert weights.keys() == model.state_dict().keys() - tiny_weights().keys()
    assert path.stat().st_size < 4 * sum(value.numel() for value in weights.values()) + 60_000  # the adapter alone
    assert not torch.equal(encode(fresh, x), expected)
    gara.load_adapter(fresh, path)
    assert torch.equal(encode(fresh, x), expected)
    assert fresh.adapter == model.adapter

    again = train_by_chance(gara.attach(tiny(), method, **options), seed=1)  # an equal adapter is filled
    gara.load_adapter(again, path)
    assert torch.equal(encode(again, x), expected)

@pytest.mark.parametrize("value, expected", [
    (dict(step=7, losses=[0.5, (None, "a")]), dict(step=7, losses=[0.5, (None, "a")])),
    (dict(state=torch.arange(3)), dict(state=torch.arange(3))),
    ({np.int64(3): np.float32(0.5), "on": np.True_}, {3: 0.5, "on": True}),
    (np.arange(6)[::-2], torch.tensor([5, 3, 1])),
    (np.str_("a"), "a")])
def test_metadata_is_read_as_it_was_given_but_plain(tmp_path, value, expected):
    gara.save_adapter(tiny("lora"), tmp_path / "a.pt", about=value)
    found = gara.load_adapter(tiny(), tmp_path / "a.pt")["about"]
    assert same(found, expected)
    assert type(found) is type(expected)

@pytest.mark.parametrize("value", [lambda: 1, object(), signal.SIGTERM, {1, 2}, np.array([None]), [Counter]])
def test_a_failed_save_keeps_the_old_file(saved, tmp_path, value):
    path = saved("lora")
    old = path.read_bytes()
    with refused("not saved", "numbers"):
        gara.save_adapter(tiny("lora"), path, about=[value])
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["a.pt"]

def test_only_sound_adapters_are_saved(tmp_path):
    model = tiny("lora")
    with torch.no_grad():
        gara.adapters(model)[2].A[0, 0, 0] = math.nan
    with refused("blocks.2.attn.qkv.A", "NaN"):
        gara.save_adapter(model, tmp_path / "a.pt")
    with refused("attach"):
        gara.save_adapter(tiny(), tmp_path / "a.pt")
    assert os.listdir(tmp_path) == []

A2 = "image_encoder.blocks.2.attn.qkv.A"

@pytest.mark.parametrize("change, words", [
    (lambda c: c["weights"].pop(A2), A2),
    (lambda c: c["weights"].update({A2 + "2": torch.ones(1)}), A2 + "2"),
    (lambda c: c["weights"].update({"a\nb": torch.ones(1)}), "unknown"),
    (lambda c: c["weights"].update({A2: torch.ones(3, 52, 161)}), A2),
    (lambda c: c["weights"].update({A2: torch.full((3, 52, 160), 1e300, dtype=torch.double)}), A2),
    (lambda c: c["weights"][A2][1, 2, :3].fill_(math.nan), A2),
    (lambda c: c.update(method="dora"), "unknown method 'dora'"),
    (lambda c: c.update(method="moe_lora", options=dict(experts=[640] * 10**6)), "rank"),
    (lambda c: c["options"].update(rank_low=0), "rank"),
    (lambda c: c["options"].update(rank_low=3), "wrong shape"),
    (lambda c: c.update(backbone="vit_b"), "adapts vit_b"),
    (lambda c: c.update(backbone="vit\ng"), "vit_t, vit_b"),
    (lambda c: c.update(image_size=64), "image size 64"),
    (lambda c: c.pop("image_size"), "'image_size'"),
    (lambda c: c.update(base=torch.ones(9)), "other vit_t weights"),
    (lambda c: c.update(format="gara-sam adapter 1"), "train it again"),
    (lambda c: c.clear(), "not an adapter file"),
    (lambda c: c.update(tiny_weights(), format=0), "SAM checkpoint"),
    (lambda c: c.update(model=prefixed("module.")), "SAM checkpoint"),
    (b"not weights\n" * 100, "not a readable")])
@pytest.mark.parametrize("adapted", [False, True])
def test_adapter_files_that_are_refused(saved, change, words, adapted):
    """In one line, and the SAM, adapted before or not, is as before, in what it answers and in what may learn."""
    path = saved()
    content = torch.load(path, weights_only=True)
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        change(content)
        torch.save(content, path)
    target = train_by_chance(gara.attach(tiny(), "gara"), seed=1) if adapted else tiny()
    target.mask_decoder.requires_grad_(False)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    flags = {name: p.requires_grad for name, p in target.named_parameters()}
    with refused(words):
        gara.load_adapter(target, path)
    assert same(dict(target.state_dict()), before)
    assert {name: p.requires_grad for name, p in target.named_parameters()} == flags

ODD = [None, True, -1, 0, 10**12, math.nan, math.inf, 1e300, "", "gara", "a\nb", b"x", [], [1, "a"], {}, {1: {}}, (),
       torch.tensor(1), torch.ones(2, 2), torch.empty(0), torch.ones(2).to_sparse(), torch.ones(1).expand(10**9)]

def places(node, path=()):
    """Where the entries of nested dicts are."""
    for key, value in node.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))

def test_odd_entries_in_adapter_files(saved):
    """Are refused in one line or make no difference; SAM is left as it was."""
    path, target = saved(), tiny()
    content, before = torch.load(path, weights_only=True), tiny().state_dict()
    rng, refusals = np.random.default_rng(0), 0
    spots = list(places(content))
    spots += 20 * [way for way in spots if way[0] != "weights"]
    for at, value in zip(rng.integers(len(spots), size=300), rng.integers(len(ODD), size=300)):
        changed = copy_of(content)
        *way, last = spots[at]
        functools.reduce(dict.__getitem__, way, changed)[last] = ODD[value]
        torch.save(changed, path)
        try:
            gara.load_adapter(target, path)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
            refusals += 1
        gara.detach(target)
        assert same(dict(target.state_dict()), dict(before))
    assert refusals > 200

def copy_of(node):
    """The same dicts anew."""
    return {key: copy_of(value) if isinstance(value, dict) else value for key, value in node.items()}

@pytest.mark.parametrize("method, options, words", [
    ("gara", dict(rank_high=8), ["detach"]), ("lora", {}, ["lora", "detach"]),
    ("gara", dict(scope="window"), ["window", "detach"])])
def test_adapters_are_filled_by_equal_ones_only(saved, method, options, words):
    with refused(*words):
        gara.load_adapter(tiny(method, **options), saved())

def test_adapters_fit_their_base_model_only(saved):
    other = tiny()
    with torch.no_grad():
        other.image_encoder.blocks[1].mlp.lin1.weight *= 1.02
    with refused("other vit_t weights"):
        gara.load_adapter(other, saved())
    with refused("none.pt", kind=FileNotFoundError):
        gara.load_adapter(tiny(), "none.pt")

@pytest.mark.parametrize("here", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("there", [torch.float32, torch.float16, torch.bfloat16])
def test_the_base_is_known_in_any_precision(tmp_path, here, there):
    gara.save_adapter(train_by_chance(gara.attach(tiny().to(there).float(), "lora")), tmp_path / "a.pt")
    gara.load_adapter(tiny().to(here).float(), tmp_path / "a.pt")

def test_the_base_is_known_at_another_image_size(tmp_path, monkeypatch):
    """Where positions are interpolated, which another CPU rounds otherwise."""
    torch.save(tiny_weights(), tmp_path / "w.pth")
    gara.save_adapter(gara.attach(sam.build_sam("vit_t", tmp_path / "w.pth", 64), "lora"), tmp_path / "a.pt")
    exact = torch.nn.functional.interpolate
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda *a, **k: exact(*a, **k) * 1.02)
    other = sam.build_sam("vit_t", tmp_path / "w.pth", 64)
    gara.load_adapter(other, tmp_path / "a.pt")
    assert gara.fingerprint(other) == gara.fingerprint(sam.build_sam("vit_t", tmp_path / "w.pth", 128))

def test_adapters_of_the_earlier_format_load(saved):
    """They keep a digest of the base, positions included."""
    path = saved("lora")
    content = torch.load(path, weights_only=True)
    torch.save(content | dict(format="gara-sam adapter 2", base="5d9c"), path)
    with refused("other vit_t weights"):
        gara.load_adapter(tiny(), path)
    torch.save(content | dict(format="gara-sam adapter 2", base=EARLIER_DIGEST), path)
    gara.load_adapter(tiny(), path)

EARLIER_DIGEST = "d4f2499fa47113bb"  # of tiny(), by the code that wrote that format

# ---- GaRA: export and merging ---------------------------------------------------------------------------------------

@pytest.fixture
def convert(saved, tiny_files, monkeypatch):
    """Runs `python gara.py` on an adapter of a method, a.pt, in the folder where w.pth is what it was trained on."""
    def run(task, method, *more, **options):
        saved(method, **options)
        return run_cli(gara.main, task, "a.pt", "--checkpoint", "w.pth", *more)
    return run

def loaded(path="a.pt"):
    model = tiny()
    gara.load_adapter(model, path)
    return model

def graph(path):
    """What a file that `export` wrote computes, as a function of arrays."""
    if path.endswith(".pt2"):
        module = torch.export.load(path).module()
        return lambda *arrays: [output.numpy() for output in module(*map(torch.from_numpy, arrays))]
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))

def exporter(path):
    """Skips a test where its exporter is not installed."""
    if path.endswith(".onnx"):
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")

@pytest.mark.parametrize("path, method, options", [
    ("e.onnx", "gara", {}), ("e.pt2", "gara", dict(scope="window")), ("e.pt2", "moe_lora", {})])
def test_exported_encoders_decide_for_each_image(convert, tmp_path, path, method, options):
    exporter(path)
    assert convert("export", method, "--out", path, **options) == 0
    model, encoder, decisions = loaded(), graph(path), set()
    for seed in range(4):
        embedding, gates = encoder(pictures(seed).numpy())
        assert close(embedding, encode(model, pictures(seed)), 1e-4)
        vectors = [layer["vector"].flatten(0, -2) for layer in gara.gates(model)]
        assert np.array_equal(gates[0], torch.cat(vectors))
        decisions.add(gates.tobytes())
    assert len(decisions) > 1
    assert {file.name for file in everything(tmp_path)} == {"a.pt", "photo.png", "w.pth", path}

@pytest.mark.parametrize("path, words", [("d.onnx", ["--return-single-mask"]), ("d.pt2", [])])
def test_exported_decoders_have_the_official_inputs_and_outputs(convert, path, words):
    """Points, a box (two points of labels 2 and 3), or a mask, for images of any size."""
    exporter(path)
    assert convert("export", "lora", "--out", "e.pt2", "--decoder", path, *words) == 0
    predictor, decoder = sam.SamPredictor(loaded()), graph(path)
    empty = np.zeros((1, 1, 64, 64), np.float32)
    for (height, width), labels, mask in (((60, 90), [1, -1], None), ((300, 200), [1, 0, 2, 3], None),
                                          ((77, 77), [2, 3], np.full_like(empty, -3))):
        predictor.set_image(scene(height, width))
        K, has_mask, clear = len(labels), float(mask is not None), len(labels) > 2
        coords = np.random.default_rng(K).uniform(5, 50, (1, K, 2)).astype(np.float32)
        points = torch.from_numpy(coords), torch.tensor([labels])
        prompts = predictor.model.prompt_encoder
        sparse = prompts.embed_coords(*points)
        _, dense = prompts(None, None, None if mask is None else torch.tensor(mask))
        low_res, scores = predictor.model.mask_decoder.predict_masks(
            predictor.features, prompts.get_dense_pe(), sparse, dense)
        if words:
            best = 0 if clear else 1 + int(scores[0, 1:].argmax())
            low_res, scores = low_res[:, best:best + 1], scores[:, best:best + 1]
        found = decoder(predictor.features.numpy(), coords, np.float32([labels]), empty if mask is None else mask,
                        np.float32([has_mask]), np.float32([height, width]))
        expected = predictor.model.postprocess_masks(low_res, predictor.input_size, (height, width)), scores, low_res
        for got, want in zip(found, expected, strict=True):
            assert close(got, want, 1e-4)

def test_lora_merges_into_a_plain_checkpoint(convert):
    assert convert("merge", "lora", "--out", "m.pth") == 0
    merged, x = sam.build_sam("vit_t", "m.pth"), pictures(0, 1)
    assert close(encode(merged, x), encode(loaded(), x))
    assert not close(encode(merged, x), encode(tiny(), x), 1e-2)
    weights = sam.read_checkpoint("m.pth", "vit_t")
    changed = [key for key, value in tiny_weights().items() if not torch.equal(weights[key], value)]
    assert changed == [f"image_encoder.blocks.{i}.attn.qkv.weight" for i in range(6)]

def test_merging_at_another_image_size_keeps_the_positions(tiny_files):
    gara.save_adapter(train_by_chance(gara.attach(sam.build_sam("vit_t", "w.pth", 64), "lora")), "a.pt")
    assert run_cli(gara.main, "merge", "a.pt", "--checkpoint", "w.pth", "--out", "m.pth") == 0
    assert torch.equal(sam.read_checkpoint("m.pth", "vit_t")[POS_EMBED], tiny_weights()[POS_EMBED])

@pytest.mark.parametrize("task, method, words, message", [
    ("merge", "gara", "--out m.pth", "python gara.py export"),
    ("merge", "moe_lora", "--out m.pth", "depend on the image"),
    ("merge", "lora", "--out none/m.pth", "none"),
    ("merge", "lora", "--out m.pth --decoder d.pt2", "--decoder"),
    ("merge", "lora", "", "--out"),
    ("merge", "lora", "--out m.pth --checkpoint none.pth", "none.pth"),
    ("merge", "lora", "--out m.pth --checkpoint photo.png", "photo.png"),
    ("export", "gara_random", "--out e.pt2", "gara_random"),
    ("export", "gara", "--out e.pth", "FILE.onnx"),
    ("export", "gara", "--out none/e.pt2", "no folder none"),
    ("export", "gara", "--out e.pt2 --decoder ./e.pt2", "same file"),
    ("export", "gara", "--out e.onnx", "pip install onnx onnxscript"),
    ("export", "gara", "--out e.pt2 --decoder d.onnx", "pip install onnx onnxscript")])
def test_mistakes_at_gara_end_in_one_line(convert, tmp_path, monkeypatch, capsys, task, method, words, message):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else found(name))
    assert convert(task, method, *words.split()) == 2
    assert one_error(capsys, message)
    assert {file.name for file in everything(tmp_path)} == {"a.pt", "photo.png", "w.pth"}

@pytest.mark.parametrize("task, out", [("export", "e.pt2"), ("merge", "m.pth")])
def test_nothing_is_half_written(saved, tiny_files, tmp_path, monkeypatch, capsys, task, out):
    def full(content, path):
        (tmp_path / path).write_bytes(b"half")
        raise OSError("no space left")
    saved("lora")
    (tmp_path / out).write_bytes(b"old")
    monkeypatch.setattr(torch.export, "save", full)
    monkeypatch.setattr(torch, "save", full)
    assert run_cli(gara.main, task, "a.pt", "--checkpoint", "w.pth", "--out", out) == 2
    assert one_error(capsys, "no space left")
    assert (tmp_path / out).read_bytes() == b"old"
    assert {file.name for file in everything(tmp_path)} == {"a.pt", "photo.png", "w.pth", out}

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

# ---- Corruptions ----------------------------------------------------------------------------------------------------

# Ranges of output / input over the benchmark's own runs on five photographs, widened for a synthetic image, from and
# to: mean, standard deviation, variance of the Laplacian; then PSNR in dB. Names and order are the benchmark's.
MEASURED = """
snow                 1.05 2         0.8 1.4       1.2 14          7 18
fog                   1.1 2.6       0.3 0.5      0.01 0.3       6.5 17
rain                 1.01 1.6       0.6 1         0.4 1.6        15 30
gauss_noise          0.98 1.02        1 1.06      1.3 15       23.9 25
ISO_noise            1.02 1.6      0.75 1         1.3 15       13.5 20
impulse_noise         1.2 1.46        1 1.4       1.3 2.3        12 19
resampling_blur      0.98 1.02      0.8 1       0.005 0.15       20 31
motion_blur          0.98 1.02      0.8 1        0.02 0.4        14 26
zoom_blur             0.9 1.1      0.75 1         0.1 0.7        14 60
color_jitter         0.75 1.25      0.6 1.3       0.5 1.9        11 18
compression          0.98 1.02     0.95 1.05      0.2 1.4        22 30
elastic_transform    0.97 1.03      0.9 1.02     0.15 0.6        14 24
frosted_glass_blur   0.99 1.01     0.98 1.02        2 35         16 25
brightness            0.6 0.8       0.6 0.8      0.36 0.64       11 20
contrast              0.8 1.2       1.2 1.6       1.6 2.6        16 20
"""
RANGES = {}
for line in MEASURED.split("\n")[1:-1]:
    name, *ends = line.split()
    RANGES[name] = np.array(ends, float).reshape(4, 2)
ALL = [*RANGES, *OTHERS]

def flat(level, height=96, width=128):
    return np.full((height, width, 3), level, np.uint8)

def draws(name, seed):
    """The generator that corrupt(_, name, seed) hands to its function."""
    number = zlib.crc32(name.encode())
    return np.random.default_rng([seed, number])

def mad(a, b):
    """Mean absolute difference."""
    return abs(a.astype(float) - b).mean()

def test_registry():
    assert list(CORRUPTIONS) == list(RANGES)
    assert list(data.CONDITIONS) == ["clear", *RANGES]
    assert not CORRUPTIONS.keys() & OTHERS.keys()
    for name, function in (CORRUPTIONS | OTHERS).items():
        assert "trength" in function.__doc__, name

@pytest.mark.parametrize("name", ALL)
def test_corruption_contract(name):
    """Same arguments, same pixels; the input survives; layout of the memory is irrelevant; other seeds differ."""
    image = scene(40, 52)
    before = image.copy()
    strided = np.zeros((40, 104, 3), np.uint8)[:, ::2]
    strided[:] = image
    image.flags.writeable = False
    out = corrupt(image, name, seed=3)
    assert out.dtype == np.uint8
    assert out.shape == image.shape
    assert out.flags.writeable
    assert not np.shares_memory(out, image)
    assert np.array_equal(image, before)

    np.random.seed(0)  # the global generator plays no part
    assert np.array_equal(out, corrupt(np.asfortranarray(image), name, seed=3))
    assert np.array_equal(out, corrupt(strided, name, seed=np.int64(3), strength=1))

@pytest.mark.parametrize("use", [
    lambda seed: corrupt(scene(40, 52), "gauss_noise", seed),
    lambda seed: data.prompts(np.ones((200, 200), bool), seed)[0],
    lambda seed: data.demo_scene(seed, 32)[0],
    lambda seed: np.array(data.seed_of(seed, "fog"))])
def test_two_seeds_of_any_size_are_two_draws(use):
    seeds = [0, 1, -1, 2 ** 32, 2 ** 32 + 1, -2 ** 32 - 1, 2 ** 70, 10 ** 30]
    assert len({use(seed).tobytes() for seed in seeds}) == len(seeds)

@pytest.mark.parametrize("name", ALL)
def test_corruption_strength(name):
    """0 is the identity, a breath above it is a breath of change, and more strength is more change."""
    image = scene(96, 128)
    clean = corrupt(image, name, 5, 0)
    assert np.array_equal(clean, image)
    assert not np.shares_memory(clean, image)

    steps = (1e-6, 0.02, 0.1, 0.3, 0.6, 1, 1.01, 1.5, 2)
    change = np.empty((4, len(steps)))
    for seed, k in np.ndindex(change.shape):
        change[seed, k] = mad(corrupt(image, name, seed, steps[k]), image)
    mean = dict(zip(steps, change.mean(0)))
    assert mean[0.02] < 0.15 * mean[1] + 1
    assert mean[2] > 1.05 * mean[1] > 0
    slack = 0.02 * mean[1] + 0.02  # whole pixels (resampling) and whole qualities (JPEG) ripple
    assert np.diff(change.mean(0)).min() > -slack
    assert (change[:, 6] < 1.1 * change[:, 5] + 0.1).all()  # no jump beyond 1

@pytest.mark.parametrize("shape", [(16, 16), (16, 200), (200, 16), (17, 23), (61, 45)])
def test_corruptions_of_any_size(shape):
    images = scene(*shape), flat(0, *shape), flat(255, *shape)
    strengths = 0.3, 1, 2
    for image, name, strength in itertools.product(images, ALL, strengths):
        with np.errstate(all="raise", under="ignore", divide="ignore"):
            assert corrupt(image, name, 1, strength).shape == image.shape

@pytest.mark.parametrize("arguments, clue", [
    ((scene(), "snowy"), "snow, fog, rain"),
    ((scene(), None), "snow, fog, rain"),
    ((scene(), ["fog"]), "snow, fog"),
    ((scene().astype(np.float32), "fog"), "float32"),
    ((scene()[..., 0], "fog"), "(120, 160)"),
    ((np.zeros((20, 20, 4), np.uint8), "fog"), "(20, 20, 4)"),
    (("photo.jpg", "fog"), "str"),
    ((scene(15, 99), "fog"), "99x15"),
    ((scene(), "fog", 1.5), "1.5"),
    ((scene(), "fog", 0, -0.1), "-0.1"),
    ((scene(), "fog", 0, 10.1), "10.1"),
    ((scene(), "fog", 0, math.nan), "nan"),
    ((scene(), "fog", 0, math.inf), "inf"),
    ((scene(), "fog", 0, "1"), "'1'"),
])
def test_corruptions_refuse(arguments, clue):
    with refused(clue):
        corrupt(*arguments)

def laplacian_variance(image):
    grey = image @ np.array([0.299, 0.587, 0.114])
    vertical = grey[:-2, 1:-1] + grey[2:, 1:-1]
    horizontal = grey[1:-1, :-2] + grey[1:-1, 2:]
    return (vertical + horizontal - 4 * grey[1:-1, 1:-1]).var()

@pytest.mark.parametrize("name", RANGES)
def test_measured_ranges(name):
    measured = []
    for seed in range(12):
        image = scene(150, 200, seed % 3)
        out = corrupt(image, name, seed)
        error = ((out.astype(float) - image) ** 2).mean()
        psnr = 10 * np.log10(255 ** 2 / max(error, 1e-3))
        sharpness = laplacian_variance(out) / laplacian_variance(image)
        mean = out.mean() / image.mean()
        deviation = out.std() / image.std()
        measured.append((mean, deviation, sharpness, psnr))
    low, high = RANGES[name].T
    medians = np.median(measured, 0)
    assert (medians >= low).all()
    assert (medians <= high).all()

@pytest.mark.parametrize("name, low, high, curve", [
    ("brightness", 0.6, 0.8, lambda x, f: np.floor(f * x)),
    ("impulse_noise", 1.4, 1.5, lambda x, f: np.floor(np.minimum(f * x, 255))),
    ("contrast", 1.6, 1.7, lambda x, f: np.floor(np.clip((x - 128) * f + 128, 0, 255))),
])
def test_tables_of_levels(name, low, high, curve):
    """One factor for the whole image; every level goes through the closed form."""
    levels = np.arange(256.0).reshape(16, 16, 1).repeat(3, 2)
    ramp = levels.astype(np.uint8)
    factors = [draws(name, seed).uniform(low, high) for seed in range(9)]
    for seed, factor in enumerate(factors):
        assert np.array_equal(corrupt(ramp, name, seed), curve(levels, factor))
    assert np.array_equal(corrupt(ramp, name, 0, 2), curve(levels, factors[0] ** 2))  # stops double

@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("level", [60, 200])
def test_underwater_by_its_physics(seed, level):
    """On a flat image: Beer's law for each channel."""
    rng = draws("underwater", seed)
    distance = rng.uniform(1, 2)
    veil = np.array([0.1, 0.45, 0.5]) * rng.uniform(0.7, 1.1)
    absorption = np.array([0.9, 0.35, 0.3])
    expected = level * np.exp(-distance * absorption)
    expected += 255 * veil * (1 - np.exp(-0.6 * distance))
    out = corrupt(flat(level, 200, 200), "underwater", seed)
    assert out.mean((0, 1)) == pytest.approx(np.minimum(expected, 255), rel=0.06)

def bilinear(image, rows, cols):
    """image (HxWxC) at all pairs of real positions, one by one; beyond the border, its own last pixel."""
    H, W = image.shape[:2]
    out = np.empty((len(rows), len(cols), image.shape[2]))
    for i, j in np.ndindex(out.shape[:2]):
        y = min(max(rows[i], 0), H - 1)
        x = min(max(cols[j], 0), W - 1)
        top = int(y)
        left = int(x)
        bottom = min(top + 1, H - 1)
        right = min(left + 1, W - 1)
        t = x - left
        upper = (1 - t) * image[top, left] + t * image[top, right]
        lower = (1 - t) * image[bottom, left] + t * image[bottom, right]
        t = y - top
        out[i, j] = (1 - t) * upper + t * lower
    return out

def test_resampling_against_loops():
    image = scene(22, 29)
    H, W = 22, 29
    h, w = 5, 7
    rows = (np.arange(h) + 0.5) * H / h - 0.5
    cols = (np.arange(w) + 0.5) * W / w - 0.5
    down = np.rint(bilinear(image, rows, cols))
    rows = (np.arange(H) + 0.5) * h / H - 0.5
    cols = (np.arange(W) + 0.5) * w / W - 0.5
    expected = np.rint(bilinear(down, rows, cols))
    out = corrupt(image, "resampling_blur")
    assert abs(out - expected).max() <= 1
    assert np.mean(out == expected) > 0.99

def test_warp_against_loops():
    """The flat gather from a padded image is bilinear interpolation at moved positions, mirrored at the borders."""
    image = scene(20, 26)
    rng = np.random.default_rng(0)
    dy, dx = rng.uniform(-9, 9, (2, 20, 26))
    mirrored = np.pad(image, ((10, 10), (10, 10), (0, 0)), mode="reflect")
    out = corruptions.warp(corruptions.to_planes(image), dy, dx)
    for y, x in np.ndindex(20, 26):
        from_y = 10 + y + dy[y, x]
        from_x = 10 + x + dx[y, x]
        expected = bilinear(mirrored, [from_y], [from_x])
        assert abs(out[:, y, x] - expected).max() <= 0.501

def test_correlate_against_loops():
    image = np.random.default_rng(0).random((3, 9, 11), dtype=np.float32)
    kernel = np.random.default_rng(1).random((3, 5))
    mirrored = np.pad(image, ((0, 0), (1, 1), (2, 2)), mode="reflect")
    out = corruptions.correlate(image, kernel)
    for y, x in np.ndindex(9, 11):
        window = mirrored[:, y:y + 3, x:x + 5]
        assert out[:, y, x] == pytest.approx((window * kernel).sum((1, 2)), rel=1e-5)

@pytest.mark.parametrize("strength, reach", [(1, 3), (2, 6)])
def test_glass_gathers_within_three_pixels(strength, reach):
    """Give each pixel its own colour: then the output tells where it was read, evenly over the 7x7 neighbours."""
    H, W = 60, 70
    code = np.arange(H * W).reshape(H, W)
    image = np.zeros((H, W, 3), np.uint8)
    image[..., 0] = code // 256
    image[..., 1] = code % 256
    image[..., 2] = code % 7
    out = corrupt(image, "frosted_glass_blur", 1, strength).astype(int)
    source = out[..., 0] * 256 + out[..., 1]
    assert np.array_equal(out[..., 2], source % 7)  # channels move together
    dy = source // W - np.arange(H)[:, None]
    dx = source % W - np.arange(W)
    inner = np.s_[6:-6, 6:-6]
    counts, _, _ = np.histogram2d(dy[inner].ravel(), dx[inner].ravel(), bins=2 * reach + 1)
    expected = counts.mean()
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 1.5 * counts.size

def test_iso_noise_destroys_hue_and_spares_grey():
    assert np.array_equal(corrupt(flat(90), "ISO_noise"), flat(90))  # no contrast, no colour: no noise
    steps = flat(0, 80, 80)
    steps[:, 40:] = (200, 40, 40)
    photons = 0.75 * 60  # gain times the deviation of the HLS lightness, 0 and 120
    out = corrupt(steps, "ISO_noise", 2)
    black = out[:, :40]
    red = out[:, 40:]
    assert black.mean() == pytest.approx(photons, rel=0.1)  # lifts by the Poisson mean ...
    assert black.std() == pytest.approx(np.sqrt(photons), rel=0.1)  # ... and its deviation, without colour
    assert np.ptp(black, axis=-1).max() == 0
    assert np.ptp(red.mean((0, 1))) < 0.2 * 160  # averages towards grey

def test_jpeg_is_encoded_with_red_and_blue_swapped():
    image = scene(64, 80)
    quality = int(draws("compression", 0).integers(5, 11))
    file = io.BytesIO()
    Image.fromarray(image[..., ::-1].copy()).save(file, "JPEG", quality=quality, subsampling=2)
    expected = np.asarray(Image.open(file))[..., ::-1]
    assert np.array_equal(corrupt(image, "compression", 0), expected)

def test_motion_blur_of_a_point_is_one_straight_line():
    image = flat(0, 75, 75)
    image[37, 37] = 255
    lengths = []
    shifts = []
    for seed in range(200):
        out = corrupt(image, "motion_blur", seed)[..., 0]
        ys, xs = np.nonzero(out)
        n = max(np.ptp(ys), np.ptp(xs)) + 1
        assert len(ys) == n  # 8-connected
        assert (out[ys, xs] == np.rint(np.float32(255 / n))).all()
        centred = [ys - ys.mean(), xs - xs.mean()]
        along, across = np.linalg.svd(centred, compute_uv=False)
        assert across / np.sqrt(n) < 0.5  # no tap off the line
        lengths.append(n)
        shifts.append(np.hypot(ys.mean() - 37, xs.mean() - 37))
    assert np.median(lengths) == pytest.approx(8, abs=2)
    assert np.mean(shifts) == pytest.approx(4.93, abs=0.8)

def test_zoom_blur_identity_draws_and_fixed_centre():
    image = scene(33, 33)
    untouched = 0
    for seed in range(400):
        out = corrupt(image, "zoom_blur", seed)
        untouched += np.array_equal(out, image)
        assert abs(out[16, 16].astype(int) - image[16, 16]).max() <= 1
    assert untouched / 400 == pytest.approx(0.18, abs=0.06)

def test_elastic_displacement():
    """A ramp of one level per pixel turns into a map of horizontal displacement."""
    ramp = np.empty((200, 200, 3), np.uint8)
    ramp[:] = np.arange(200)[:, None]
    y, x = np.mgrid[40:160, 40:160]
    plane = np.stack([y.ravel(), x.ravel(), np.ones(y.size)], 1)
    total = []
    local = []
    for seed in range(12):
        out = corrupt(ramp, "elastic_transform", seed)
        shift = (out[40:160, 40:160, 0].astype(float) - x).ravel()
        affine = plane @ np.linalg.lstsq(plane, shift, rcond=None)[0]
        total.append(abs(shift).mean())
        local.append((shift - affine).std())
    uniform = 100 * np.sqrt(1 / 3)
    blurred = uniform / (20 * np.sqrt(np.pi))  # 1.63 px
    assert np.mean(local) == pytest.approx(blurred, rel=0.15)
    assert 1.5 < np.mean(total) < 6

@pytest.mark.parametrize("name, most", [("snow", 255), ("rain", 240)])
def test_snow_and_rain_whiten_every_channel_alike(name, most):
    black = flat(0, 160, 160)
    out = np.stack([corrupt(black, name, seed) for seed in range(8)]).astype(int)
    half = np.stack([corrupt(black, name, seed, 0.5) for seed in range(8)])
    assert np.ptp(out, axis=-1).max() == 0
    assert 60 < out.max() <= most
    assert (half <= out + 3).mean() > 0.85  # fewer of the same specks

def test_fog_is_optical_depth_and_drawn_per_image():
    black = corrupt(flat(0), "fog", 4).mean()
    white = corrupt(flat(255), "fog", 4).mean()
    once = corrupt(flat(60), "fog", 4).mean()
    twice = corrupt(flat(60), "fog", 4, 2).mean()
    clear = (white - black) / 255  # share of the scene that shines through
    cloud = black / (1 - clear)
    assert clear == pytest.approx(0.37, abs=0.09)
    assert cloud == pytest.approx(230, abs=15)
    assert once == pytest.approx(black + 60 * clear, abs=1.5)
    assert twice == pytest.approx(cloud + clear ** 2 * (60 - cloud), abs=3)
    assert mad(corrupt(flat(60), "fog", 4), corrupt(flat(60), "fog", 5)) > 2

def test_color_jitter_is_a_function_of_colour():
    """Whatever the order of its steps: equal pixels stay equal, and white and black keep their rank."""
    image = scene(40, 40)
    image[0, :2] = [[255], [0]]
    image[20:22, 5] = image[3, 3]
    for seed in range(60):
        out = corrupt(image, "color_jitter", seed).astype(int)
        assert (out[0, 0] >= out[0, 1]).all()
        assert (out[20:22, 5] == out[3, 3]).all()

def sheet_of(monkeypatch, *arguments):
    """Exit code of corruptions.py."""
    monkeypatch.setattr(sys, "argv", ["corruptions.py", *map(str, arguments)])
    return run_cli(lambda _: corruptions.main())

def test_corruption_sheet(tmp_path, monkeypatch):
    photo = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[274] = 6  # lying on its side
    Image.fromarray(scene(90, 120)).save(photo, exif=exif)
    assert sheet_of(monkeypatch, photo, "--out", tmp_path / "sheet.png", "--size", 96) is None
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.height > 4 * 96
    assert sorted(os.listdir(tmp_path)) == ["photo.jpg", "sheet.png"]

@pytest.mark.parametrize("mistake", [
    "none.jpg --out x.png",
    "words.jpg --out x.png",
    "photo.jpg --out no/sheet.png",
    "photo.jpg --out sheet.what",
    "photo.jpg --out x.png --strength nan",
    "photo.jpg --out x.png --size 31"])
def test_mistakes_on_the_command_line_of_corruptions(tmp_path, monkeypatch, capsys, mistake):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "words.jpg", "no image")
    Image.fromarray(scene(90, 120)).save("photo.jpg")
    assert sheet_of(monkeypatch, *mistake.split()) == 2
    message = capsys.readouterr().err
    assert message.startswith("corruptions.py: ")
    assert message.count("\n") == 1
    assert sorted(os.listdir()) == ["photo.jpg", "words.jpg"]

# ---- Data -----------------------------------------------------------------------------------------------------------

def smooth(height=24, width=32, seed=0):
    """A smooth uint8 HxWx3 image, which JPEG keeps nearly as it is."""
    grid = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(grid)
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC))

def squares(height=24, width=32, count=1):
    """Masks of squares of 6 x 6 pixels along a diagonal."""
    masks = np.zeros((count, height, width), bool)
    for k in range(count):
        masks[k, 7 + k:13 + k, 5 + k:11 + k] = True
    return masks

GOOD = smooth(), squares()  # an image and its mask

def put(path, content):
    """Writes bytes, text, an array (as the ending says) or JSON with a byte order mark; of None only the folder."""
    os.makedirs(path.parent, exist_ok=True)
    if isinstance(content, np.ndarray) and path.suffix == ".npy":
        np.save(path, content)
    elif isinstance(content, np.ndarray):
        Image.fromarray(content).save(path, quality=95)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        text = content if isinstance(content, str) else "\ufeff" + json.dumps(content, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")

def put_all(root, files):
    """Writes {path: content}. Returns the root."""
    for path, content in files.items():
        put(root / path, content)
    return root

def put_split(root, images, split="test"):
    """Writes ROOT/split in Robust-Seg's form from {stem: (image, masks)}, each as put() takes it. Returns the root."""
    for stem, (image, masks) in images.items():
        put_all(root / split, {f"clear/{stem}.jpg": image, f"masks/{stem}.npy": masks})
    return root

def one_sample(root, *content):
    """The sample of a split of one."""
    return data.load_dataset(put_split(root, {"a": content or GOOD}), "test")[0]

def names_of(dataset):
    return [sample.name for sample in dataset]

# Prompts, degraded images, bad samples.

def test_prompts_lie_in_the_mask_and_the_box_is_tight():
    rng = np.random.default_rng(0)
    for seed in range(60):
        mask = rng.random((rng.integers(1, 20), rng.integers(1, 20))) < rng.choice([0.05, 0.5, 1])
        mask[0, 0] = True
        points, box = data.prompts(mask, seed)
        assert points.dtype == box.dtype == np.float32
        x, y = points.T.astype(int)
        assert mask[y, x].all()
        assert len(set(zip(x, y))) == min(3, mask.sum())
        rows, columns = np.nonzero(mask)
        assert box.tolist() == [columns.min(), rows.min(), columns.max(), rows.max()]
    with refused("empty"):
        data.prompts(np.zeros((3, 4), bool), 0)

def test_prompts_are_pinned():
    """These must not change from machine to machine or version to version."""
    points, _ = data.prompts(np.ones((48, 64), bool), data.seed_of("photo", 1))
    assert points.tolist() == [[15, 47], [58, 3], [26, 21]]

def test_points_and_samples_are_spread_evenly():
    mask = np.zeros((4, 9), bool)
    mask[1, 2:8] = True
    columns = [data.prompts(mask, seed)[0][:, 0] for seed in range(2000)]
    counts = np.bincount(np.concatenate(columns).astype(int), minlength=9)
    assert np.abs(counts[2:8] - 1000).max() < 120
    assert data.spread("abcdefg", 3) == ["a", "c", "e"]

def test_prompts_of_a_sample_depend_on_names_alone(tmp_path):
    with_gap = np.insert(squares(count=3), 1, False, axis=0)  # plane 1 is empty
    sample = one_sample(tmp_path, smooth(), with_gap)
    points, boxes = sample.prompts()
    assert np.array_equal(sample.prompts(sample.masks())[1], boxes)
    for mask, index, expected in zip(sample.masks(), (0, 2, 3), points, strict=True):
        assert np.array_equal(data.prompts(mask, data.seed_of("a", index, 0))[0], expected)

def test_degraded_images_on_the_disk_are_used_and_kept_unless_drawn_anew(tmp_path):
    fly = one_sample(tmp_path).image("fog", seed=1)
    put(tmp_path / "test" / "fog" / "a.png", smooth(seed=9))  # made by hand
    put(tmp_path / "test" / "fog" / "a.jpg.part7", b"cut")  # by a run that was killed
    assert run_cli(data.main, tmp_path, "--corrupt") is None
    assert os.listdir(tmp_path / "test" / "fog") == ["a.png"]
    sample = data.load_dataset(tmp_path, "test")[0]
    assert np.array_equal(sample.image("fog", seed=1), smooth(seed=9))
    assert np.array_equal(sample.image("fog", seed=1, stored=False), fly)
    assert not np.array_equal(sample.image("fog", seed=2, stored=False), fly)

def test_conditions_with_a_strength(tmp_path):
    sample = one_sample(tmp_path, smooth(64, 80), squares(64, 80))
    clear = sample.image().astype(int)
    none, some, usual = (abs(sample.image(name) - clear).mean() for name in ("fog@0", "fog@0.3", "fog"))
    assert none < 4  # the JPEG alone
    assert 2 < some < usual - 2
    for condition in ("clear@1", "fog@x", "fog@nan", "fog@-1", "fog@11", "mist"):
        with refused(repr(condition), "impulse_noise", kind=data.DatasetError):
            sample.image(condition)

def test_bad_samples_are_named_skipped_and_counted(tmp_path, capsys):
    file = io.BytesIO()
    np.save(file, np.array([{}], object), allow_pickle=True)
    put_all(tmp_path, {"x.jpg": smooth(), "x.npy": squares()})
    bad = {
        "cut_jpg": ((tmp_path / "x.jpg").read_bytes()[:400], squares()),
        "text_jpg": (b"not an image", squares()),
        "small": (smooth(10, 300), np.ones((1, 10, 300), bool)),  # too small to be degraded
        "cut_npy": (smooth(), (tmp_path / "x.npy").read_bytes()[:-50]),
        "pickle": (smooth(), file.getvalue()),
        "words": (smooth(), np.full((1, 24, 32), "x")),
        "turned": (smooth(), squares(32, 24)),
        "void": (smooth(), np.zeros((2, 24, 32), bool)),
        "none": (smooth(), np.zeros((0, 24, 32), bool))}
    others = {"good": GOOD, "lone_image": (smooth(), None), "lone_mask": (None, squares())}
    root = put_split(tmp_path / "set", bad | others | {"twin": GOOD})
    put(root / "test" / "clear" / "twin.png", smooth())
    dataset = data.load_dataset(root, "test")
    assert names_of(dataset) == sorted(["good", *bad])
    lines = [line.split("/")[-1] for line in dataset.skipped]
    assert lines == ["lone_image.jpg: has no mask file", "twin.jpg: has no mask file", "twin.png: has no mask file",
                     "lone_mask.npy: has no image", "twin.png? rename or remove one"]
    for sample in dataset:
        if sample.name in bad:
            with pytest.raises(data.SampleError, match=rf"{sample.name}\.[^\n]*$") as error:
                sample.image("fog"), sample.masks()
            assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
            assert dataset.skip(error.value)
            assert not dataset.skip(error.value)  # each is counted once
    assert "10 images; 14 files skipped" in dataset.summary()
    for option in ("--check", "--corrupt", f"--sheet={tmp_path / 's.png'}", f"--export-prompts={tmp_path / 'p.json'}"):
        assert run_cli(data.main, root, option) is None
        assert capsys.readouterr().out.count("skipped: ") == 14
    assert "small.jpg" not in os.listdir(root / "test" / "fog")

@pytest.mark.parametrize("error", [MemoryError(), ValueError("two\nlines"), AttributeError("x")])
@pytest.mark.parametrize("name", ["corrupt", "read_planes", "_eight_bits"])
def test_whatever_one_sample_raises_is_its_own_error(tmp_path, monkeypatch, name, error):
    def broken(*_):
        raise error

    sample = one_sample(tmp_path)
    monkeypatch.setattr(data, name, broken)
    with refused("a.", kind=data.SampleError):
        sample.image("fog"), sample.masks()

def test_strict_datasets_raise_what_they_would_skip(tmp_path):
    one_sample(tmp_path)
    strict = data.load_dataset(tmp_path, "test", strict=True)
    for dataset in (strict, data.Union([strict, strict])):
        with refused("some file", kind=data.SampleError):
            dataset.skip(data.SampleError("some file"))
    put(tmp_path / "test" / "clear" / "lone_image.jpg", smooth())
    with refused("lone_image", kind=data.SampleError):
        data.load_dataset(tmp_path, "test", strict=True)

# Images.

COLOURS = Image.fromarray(smooth(20, 30))
SPECIAL = {"P": COLOURS.quantize(16), "LAB": Image.new("LAB", (30, 20), (128, 148, 158))}
FRAMES = dict(save_all=True, append_images=[Image.fromarray(smooth(20, 30, 1))])

@pytest.mark.parametrize("modes, endings, options", [
    ("1 L", "png tif bmp ppm", {}),
    ("P", "png tif bmp gif", {}),
    ("P", "png", dict(transparency=3)),  # transparent colours keep their colour
    ("P", "png", dict(transparency=bytes(range(16)))),
    ("RGB", "png webp", dict(lossless=True) | FRAMES),  # the first frame counts
    ("L LA RGBA CMYK YCbCr", "tif jp2", {}),
    ("LA RGBA", "png", {}),
    ("PA LAB", "tif", {})])
@pytest.mark.filterwarnings("error")
def test_every_mode_of_image_becomes_rgb(tmp_path, modes, endings, options):
    for mode, ending in itertools.product(modes.split(), endings.split()):
        original = SPECIAL.get(mode) or COLOURS.convert(mode)
        original.save(tmp_path / f"x.{ending}", **options)
        image = data.read_image(tmp_path / f"x.{ending}")
        assert np.array_equal(image, np.array(original.convert("RGB"))), (mode, ending)
        assert image.flags.writeable

def test_levels_multiplied_by_alpha_are_divided_by_it():
    image = Image.new("RGBA", (1, 1), (200, 100, 50, 128)).convert("RGBa")
    image.filename = "x"
    assert data._eight_bits(image).getpixel((0, 0)) == pytest.approx((200, 100, 50, 128), abs=2)

@pytest.mark.parametrize("bits", [8, 12, 16])
def test_images_of_more_than_8_bits(tmp_path, bits):
    """By their largest level; what their file states goes first."""
    expected = smooth(20, 30)[..., 0]
    expected.flat[:2] = 0, 255
    levels = expected.astype(np.uint16) << (bits - 8)
    levels[0, 1] = (1 << bits) - 1
    grey = Image.fromarray(levels)
    long = grey.convert("I")
    for file, image in (("x.png", grey), ("x.tif", grey), ("x.tif", long), ("x.tif", long.convert("I;16B"))):
        image.save(tmp_path / file)
        assert np.array_equal(data.read_image(tmp_path / file), np.dstack([expected] * 3))
    Image.fromarray(expected.astype(np.uint16)).save(tmp_path / "dark.tif", tiffinfo={281: (1 << bits) - 1})
    assert np.array_equal(data.read_image(tmp_path / "dark.tif")[..., 0], expected >> (bits - 8))

# PNGs of 16 bits a colour, which Pillow cannot write, of two pixels: these levels, times 257 and times 16.
LEVELS = [[[255, 0, 128], [1, 254, 77]]]
HEAD = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAABEAIAAAAr0DSeAAAAFUlEQVR42mP"
FULL_RANGE = base64.b64decode(HEAD + "4/5+BoaGBkfHfP19fACZaBZf7FWQ8AAAAAElFTkSuQmCC")
PART = base64.b64decode(HEAD + "g/8DAwMHAIMD/gOUCAA9VAtsF+O+iAAAAAElFTkSuQmCC")

def test_colours_of_16_bits(tmp_path):
    put(tmp_path / "x.png", FULL_RANGE)
    assert data.read_image(tmp_path / "x.png").tolist() == LEVELS

RAMP = np.arange(600, dtype=np.int32).reshape(20, 30)

@pytest.mark.parametrize("file, content, words", [
    ("x.tif", RAMP.astype(np.float32), "floating-point"),
    ("x.tif", RAMP - 1, "-1 to 598"),
    ("x.tif", RAMP * 1000, "0 to 599000"),
    ("x.png", PART, "16 bits")])
def test_images_of_unknown_range_are_refused(tmp_path, file, content, words):
    put(tmp_path / file, content)
    with refused(file, words, kind=data.SampleError):
        data.read_image(tmp_path / file)

@pytest.mark.parametrize("most", [400, 200])  # Pillow warns, or raises
def test_images_too_large_for_the_memory(tmp_path, monkeypatch, most):
    put(tmp_path / "x.png", smooth(20, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    with refused("x.png", "600 pixels", kind=data.SampleError):
        data.image_size(tmp_path / "x.png")

@pytest.mark.parametrize("file, options", [("x.png", {}), ("x.tif", {}), ("x.tif", {"compression": "tiff_lzw"})])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_or_as_their_annotation_has_them(tmp_path, orientation, file, options):
    rgb = smooth(20, 30)
    half_turn = rgb[::-1, ::-1]
    upright = [rgb, rgb[:, ::-1], half_turn, rgb[::-1], rgb.swapaxes(0, 1), np.rot90(rgb, -1),
               half_turn.swapaxes(0, 1), np.rot90(rgb)][orientation - 1]
    path = tmp_path / file
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgb).save(path, exif=exif, **options)
    cases = [(None, upright), ((20, 30), rgb)]
    if orientation > 4:
        cases.append(((30, 20), upright))
    for annotated, expected in cases:
        assert np.array_equal(data.read_image(path, annotated), expected)
        assert data.image_size(path, annotated) == expected.shape[:2]
    with refused(f"{file}: is ", f"{upright.shape[1]} x {upright.shape[0]}", "31 x 20", kind=data.SampleError):
        data.read_image(path, (20, 31))

# The demo.

def test_demo_scenes():
    scenes = [data.demo_scene(seed) for seed in range(20)]
    for image, masks in scenes:
        assert image.shape == (*masks.shape[1:], 3)
        assert max(image.shape) == 128
        assert masks.sum(0).max() == 1  # disjoint
        assert masks.sum((1, 2)).min() >= 60  # and none is a speck
    assert 2.5 < np.mean([len(masks) for _, masks in scenes]) < 5
    assert all(map(np.array_equal, scenes[7], data.demo_scene(7)))

def test_patterned_objects():
    """Bold patterns spread an object's colours; without them the scenes are those that the tiny SAM was made on."""
    spreads = [[], []]
    for seed, patterned in itertools.product(range(8), (0, 1)):
        image, masks = data.demo_scene(seed, patterned=patterned)
        spreads[patterned] += [image[mask].std(0).mean() for mask in masks]
    assert np.mean(spreads[1]) > np.mean(spreads[0]) + 10
    assert zlib.crc32(data.demo_scene(3, patterned=0)[1].tobytes()) == 2144091347

def test_make_demo_writes_a_dataset_or_nothing(tmp_path):
    put(tmp_path / "demo.part" / "demo" / "train" / "clear" / "old.jpg", smooth())  # of a run that was killed
    data.make_demo(tmp_path / "demo", train=3, val=2, test=0)
    assert os.listdir(tmp_path) == ["demo"]
    assert sorted(os.listdir(tmp_path / "demo")) == ["train", "val"]
    train, val = (data.load_dataset(tmp_path / "demo", split, strict=True) for split in ("train", "val"))
    assert len({sample.masks().tobytes() for sample in [*train, *val]}) == 5  # no scene twice
    with refused("not an empty folder", kind=data.DatasetError):
        data.make_demo(tmp_path / "demo", 1, 1, 1)
    data.make_demo(tmp_path / "less", train=1, val=0, test=0)
    less, = data.load_dataset(tmp_path / "less", "train")
    assert np.array_equal(less.image(), train[0].image())  # scenes do not depend on their number

# What ends, and what meets.

@pytest.mark.parametrize("words", ["new --make-demo --scenes 2 1 1", "d --corrupt", "d --export-prompts p.json",
                                   "d --sheet s.png"])
def test_a_full_disk_says_so_and_leaves_nothing_half_written(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    put_split(tmp_path / "d", {str(k): (scene(64, 80), squares(64, 80, 9)) for k in range(4)})
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # bytes that a file can have
    try:
        assert run_cli(data.main, *words.split()) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    one_error(capsys, "cannot write this file (File too large)")
    assert os.listdir() == ["d"]
    assert not list(tmp_path.rglob("*part*"))

FORK = multiprocessing.get_context("fork")

def tell(folder):
    """The work of a process: its number becomes a file of this folder."""
    (folder / str(os.getpid())).touch()
    time.sleep(60)

def told(folder, count):
    """The numbers of so many processes."""
    end = time.monotonic() + 20
    while len(os.listdir(folder)) < count and time.monotonic() < end:
        time.sleep(0.01)
    return list(map(int, os.listdir(folder)))

def hold(held, folder):
    with data.alone_in(held):
        tell(folder)

@pytest.mark.parametrize("held, words", [("d/test", "d --corrupt"), ("new.part", "new --make-demo --scenes 1 1 1")])
def test_two_programs_in_one_folder(tmp_path, tmp_path_factory, monkeypatch, capsys, held, words):
    numbers = tmp_path_factory.mktemp("numbers")
    monkeypatch.chdir(put_split(tmp_path / "d", {"a": GOOD}).parent)
    holder = FORK.Process(target=hold, args=(held, numbers), daemon=True)
    holder.start()
    assert told(numbers, 1) == [holder.pid]
    assert run_cli(data.main, *words.split()) == 2
    one_error(capsys, held, "another program is writing there")
    holder.kill()
    holder.join()
    assert run_cli(data.main, *words.split()) is None  # the lock of a dead process is no obstacle

def grandchild(folder):
    data.end_with_parent()
    tell(folder)

def child(folder):
    FORK.Process(target=grandchild, args=[folder]).start()
    tell(folder)

def alive(process):
    """Whether the process of this number has not ended."""
    with contextlib.suppress(OSError):
        return ") Z" not in pathlib.Path(f"/proc/{process}/stat").read_text()
    return False

def test_no_worker_outlives_its_parent(tmp_path, monkeypatch):
    """Three levels: a program, the two workers of its pool, a process that each of them starts."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    program = FORK.Process(target=lambda: list(data._parallel(child, [tmp_path] * 16)))
    program.start()
    others = told(tmp_path, 4)
    program.kill()
    program.join()
    end = time.monotonic() + 10
    while any(map(alive, others)) and time.monotonic() < end:
        time.sleep(0.01)
    left = list(filter(alive, others))
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert len(others) == 4
    assert not left

def double(number):
    """The work of a pool."""
    if number == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if number == "raise":
        raise data.DatasetError("disk full")
    if number == "slow":
        time.sleep(60)
    return 2 * number

@pytest.mark.parametrize("odd, words", [("kill", "a worker was killed"), ("raise", "disk full")])
def test_a_worker_that_fails_ends_the_work_and_all_workers_at_once(monkeypatch, odd, words):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert sorted(data._parallel(double, range(40))) == list(range(0, 80, 2))
    start = time.monotonic()
    with refused(words, kind=data.DatasetError):
        list(data._parallel(double, ["slow", *range(20), odd, *range(20)]))
    assert not multiprocessing.active_children()
    assert time.monotonic() - start < 30

def test_names_that_are_not_utf8(tmp_path, capsys):
    stem, lone = "\udcff\udce9", "\udcfe"  # how Python writes such bytes
    root = put_split(tmp_path / "d", {stem: GOOD, lone: (smooth(), None)})
    prompts = tmp_path / "p.json"
    options = "--check", "--corrupt", "--export-prompts", prompts, "--sheet", tmp_path / "s.png"
    assert run_cli(data.main, root, *options) is None
    assert "\\udcfe.jpg: has no mask file" in capsys.readouterr().out
    sample = data.load_datasets([root], "test", prompt_files=[prompts])[0][0]
    assert sample.name == stem
    assert np.array_equal(sample.image("fog"), sample.image("fog", stored=False))

def test_data_command_line(tmp_path, capsys):
    root = put_split(tmp_path / "d", {"a": (smooth(), squares(count=2))})
    assert run_cli(data.main, root, "--sheet", tmp_path / "sheet.png") is None
    shown = capsys.readouterr().out
    for words in ("d/test (robustseg): 1 images; 0 files skipped", "(2 to 2)", "100% up to 10 %", "median 4.7%"):
        assert words in shown
    assert Image.open(tmp_path / "sheet.png").width > 100

@pytest.mark.parametrize("mistake, words", [
    ("nowhere", "no such folder"),
    ("d --split x", "no split 'x'"),
    ("file/new --make-demo", "cannot write into this folder"),
    ("d --sheet d", "d: ")])
def test_mistakes_on_the_data_command_line(tmp_path, monkeypatch, capsys, mistake, words):
    monkeypatch.chdir(put_split(tmp_path / "d", {"a": GOOD}).parent)
    put(tmp_path / "file", "")
    assert run_cli(data.main, *mistake.split()) == 2
    one_error(capsys, words)

# ---- Data: the eleven layouts ---------------------------------------------------------------------------------------
# A writer for each writes a miniature in the form of its makers, with every wart of the real one that is known, and
# yields what must be read: (split, sample's name, {index: (label, the object's rectangles (x0, y0, x1, y1))}).

def area(*boxes):
    """The mask of some rectangles."""
    mask = np.zeros((64, 96), bool)
    for x0, y0, x1, y1 in boxes:
        mask[max(y0, 0):y1, max(x0, 0):x1] = True
    return mask

def pair(k):
    """Two rectangles for the k-th image."""
    return (8 + k % 9, 20, 40 + k % 9, 40), (58, 24 - k % 7, 90, 60 - k % 7)

def photo(*boxes):
    """A dark image in which the boxes are bright."""
    return smooth(64, 96) // 4 + 170 * area(*boxes)[..., None].astype(np.uint8)

def split_of(name):
    """Where load_dataset puts a sample of a set that has no split "val"."""
    return "train" if zlib.crc32(f"{name}/val".encode()) % 20 else "val"

def named(form, split=None, count=2):
    """The first names of a form; of those, if asked, that belong to this split where a set has none."""
    names = map(form.format, itertools.count(1))
    chosen = filter(lambda name: split in (None, split_of(name)), names)
    return list(itertools.islice(chosen, count))

def ring(x0, y0, x1, y1):
    """The rectangle as COCO's corners: [x, y, x, y, ...]."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]

def rle(mask):
    """A mask as COCO's run lengths, a list."""
    lengths = [len(list(run)) for _, run in itertools.groupby(mask.T.ravel().tolist())]
    return dict(size=list(mask.shape), counts=[0, *lengths] if mask[0, 0] else lengths)

THIRD = 60, 2, 90, 14
THIRD_RLE = "Rh3<d1" + "0" * 57 + "n;"  # pycocotools' own
COCO_WARTS = [
    dict(iscrowd=1, segmentation=rle(area(THIRD))),
    dict(iscrowd=0),
    dict(segmentation=[]),
    dict(segmentation=[[1, 2, 3, 4], [5, 6]]),
    dict(ignore=1, segmentation=[ring(*THIRD)]),
    dict(segmentation=[[-9, -9.5, -3, -9, -3, -2]]),  # outside of the image
    dict(image_id=5, segmentation=[ring(*THIRD)])]  # of which there is no image

def coco_file(path, split, images, labels):
    """Writes a file for {name: (record, image's path or None)}. Ids go down, so that no order is right by chance."""
    records = []
    annotations = []
    for k, (name, (record, file)) in enumerate(images.items()):
        image, first = 900 - k, 5000 - 10 * k
        a, b = pair(k)
        records.append(dict(id=image, height=64, width=96, license=4, **record))
        shapes = [ring(*a)], [ring(*b), [1, 2, 3, 4]], dict(size=[64, 96], counts=THIRD_RLE)
        for n, shape in enumerate(shapes):
            annotations.append(dict(id=first - n, image_id=image, category_id=n, area=640.75, segmentation=shape))
        if file:
            put(file, photo(a, b, THIRD))
            yield split, name, {first - n: (labels[n], box) for n, box in enumerate((a, b, THIRD))}
    for n, wart in enumerate(COCO_WARTS):
        annotations.append(dict(id=7000 + n, image_id=900, category_id=1) | wart)
    records.append(dict(records[0], id=1))  # an image without annotations
    categories = [dict(id=n, name=label, supercategory="x") for n, label in enumerate(labels)]
    put(path, dict(info=dict(version=1.5, contributor='J. "Ü"'), licenses=[], type="instances", images=records,
                   annotations=annotations[::-1], categories=categories))

def write_robustseg(root):
    for split in ("train", "val", "test"):
        for k, stem in enumerate(named(f"{split}_é{{}}", count=4)):
            a, b = pair(k)
            planes = np.stack([area(a), area(), area(b)])
            forms = planes, planes.astype(np.int64), planes + np.uint8(127), planes * 0.01 + 0.5
            file = unicodedata.normalize("NFD", stem) + (".PNG", ".jpeg", ".Tif", ".WEBP")[k]
            put_all(root / split, {f"clear/{file}": photo(a, b), f"masks/{stem}.npy": forms[k]})
            yield split, stem, {0: (None, a), 2: (None, b)}
    put_all(root / "val", {"masks/lone.npy": squares(), "clear/._lone.jpg": b""})  # the second: macOS's

def write_coco(root):
    for split in ("train", "val"):
        images = {}
        for name in ("000000000139", "000000000140", "é", "000000000009"):
            record = dict(file_name=unicodedata.normalize("NFD", f"{name}.jpg"))
            images[name] = record, root / f"{split}2017" / f"{name}.jpg"
        images[name] = record, None  # the last is not there
        file = root / "annotations" / f"instances_{split}2017.json"
        yield from coco_file(file, split, images, ("cat", "dog", "Würfel"))

def write_lvis(root):
    for split, places in (("train", ["train2017/000000000035", "train2017/000000000036"]),
                          ("val", ["train2017/000000000033", "val2017/000000000034"])):
        images = {}
        for place in places:  # unpacked for COCO, in the folder beside
            record = dict(coco_url=f"http://images.cocodataset.org/{place}.jpg", neg_category_ids=[3, 4])
            images[place.split("/")[1]] = record, root.parent / "coco" / f"{place}.jpg"
        yield from coco_file(root / f"lvis_v1_{split}.json", split, images, ("aerosol_can", "cat", "dog"))
    put(root / "lvis_v1_image_info_test_dev.json", dict(images=[], categories=[]))

def write_lis(root):
    home = root / "LIS"
    stems = {"train": named("{}", "train") + named("{}", "val"), "test": ["1950", "1952"]}
    for prefix, kind, folder, ending in (("", "JPG_{}+1", "RGB-dark", ".JPG"),
                                         ("normal_", "png_{}", "RGB-normal", ".png")):
        for split in ("train", "test"):
            images = {}
            for stem in stems[split]:
                record = dict(file_name=f"./JPEGImages/{stem}.png")  # whatever the file's ending
                images[stem] = record, home / folder / "JPEGImages" / (stem + ending)
            file = home / "annotations" / "annotations" / f"lis_coco_{kind.format(split)}.json"
            for _, name, regions in coco_file(file, split, images, ("bicycle", "chair", "diningtable")):
                yield split_of(name) if prefix + split == "train" else prefix + split, name, regions

def write_bdd100k(root):
    home = root / "bdd100k"
    for split in ("train", "val"):
        for k, stem in enumerate(named(f"{split[0]}00d4b{{}}-c40a")):
            a, b = pair(k)
            pixels = np.zeros((64, 96, 4), np.uint8)  # class, flags, and the instance's number in two bytes
            pixels[area(a)] = 3, 4, 0, 7
            pixels[area(b)] = 1, 0, 1, 2
            pixels[area((0, 0, 5, 5))] = 4, 2, 0, 9
            pixels[area((0, 6, 5, 9))] = 5, 1, 0, 10
            pixels[area((70, 62, 80, 64))] = 0, 3, 0, 1
            put(home / "images" / "10k" / split / f"{stem}.jpg", photo(a, b))
            put(home / "labels" / "ins_seg" / "bitmasks" / split / f"{stem}.png", pixels)
            yield split, stem, {7: ("car", a), 258: ("pedestrian", b)}
        put(home / "images" / "10k" / split / "lone.jpg", smooth())

def acdc_frames(root):
    """Writes ACDC's images. Yields (split, "" or "_ref", frame's name, its folder below the top one, its objects)."""
    shots = root / "rgb_anon"
    for first, split, ref in ((40, "train", ""), (42, "val", ""), (40, "train_ref", "_ref")):  # shared names, as there
        for k, weather in enumerate(("fog", "night"), first):
            stem, where = f"GOPR0475_frame_{k:06}", f"{weather}/{split}/GOPR0475"
            boxes = sorted(pair(k), key=lambda box: box[1])  # from top to bottom
            put(shots / where / f"{stem}_rgb{ref}_anon.png", photo(*boxes))
            yield split, ref, stem, where, boxes
    shutil.move(shots / "fog", root / "elsewhere")
    (shots / "fog").symlink_to(root / "elsewhere")
    (root / "elsewhere" / "train" / "circle").symlink_to(shots)

def write_acdc_panoptic(root):
    home = root / "gt_panoptic_trainval" / "gt_panoptic"
    crowd = dict(id=24000, category_id=24, iscrowd=1)
    segments = [dict(id=7, category_id=7), crowd, dict(id=26001, category_id=26), dict(id=26002, category_id=26)]
    for (split, ref), frames in itertools.groupby(acdc_frames(root), lambda frame: frame[:2]):
        annotations = []
        for _, _, stem, where, (a, b) in frames:
            number = np.full((64, 96), 7)
            for box, value in ((a, 26001), (b, 26002), (THIRD, 24000)):
                number[area(box)] = value
            name = f"{stem}_gt{ref}_panoptic.png"
            annotations.append(dict(file_name=name, segments_info=segments))
            put(home / where / name, np.stack([number % 256, number // 256, 0 * number], 2).astype(np.uint8))
            yield split, stem, {26001: ("car", a), 26002: ("car", b)}
        put(home / f"{split.removesuffix('_ref')}_gt{ref}_panoptic.json", dict(annotations=annotations))

def write_acdc_semantic(root):
    for split, ref, stem, where, (a, b) in acdc_frames(root):
        classes = np.full((64, 96), 255, np.uint8)
        classes[60:] = 0
        classes[area(a, b)] = 13
        classes[:9, :7] = 11  # a person of 63 pixels
        put(root / "gt_trainval" / "gt" / where / f"{stem}_gt{ref}_labelTrainIds.png", classes)
        yield split, stem, {1: ("car", a), 2: ("car", b)}

def via_region(kind, box, k, **attributes):
    x0, y0, x1, y1 = box
    corners = [(x0, y0), (x1 - 1, y0), (x1 - 1, y1 - 1), (x0, y1 - 1)]  # pixels that belong to the object
    x, y = zip(*corners[k % 4:], *corners[:k % 4])
    return dict(shape_attributes=dict(name=kind, all_points_x=x, all_points_y=y), region_attributes=attributes)

def write_ndd20(root):
    home = root / "NDD20"
    line = dict(shape_attributes=dict(name="polyline", all_points_x=[4, 9], all_points_y=[4, 9]), region_attributes={})
    above = named("ABOVE_{}", "train") + named("ABOVE_{}", "val")
    for side, stems, label, attributes in (("ABOVE", above, "BND", dict(species="BND")),
                                           ("BELOW", above[:2], None, {"out of focus": "true"})):
        project = {"0.jpg1": dict(filename="0.jpg", regions=[via_region("polyline", THIRD, 0)])}  # there is no 0.jpg
        for k, stem in enumerate(stems):
            a, b = pair(k + len(attributes))
            file = stem.split("_")[1] + ".jpg"  # the two sides have the same file names
            regions = via_region("polyline", a, k, **attributes), line, via_region("polyline", b, k, **attributes)
            project[f"{file}4711"] = dict(filename=file, size=4711, regions=regions, file_attributes={})
            put(home / side / file, photo(a, b))
            name = f"{side}_{file[:-4]}"
            for split in (split_of(name), side.lower()):
                yield split, name, {0: (label, a), 2: (label, b)}
        put(home / f"{side}_LABELS.json", project)

def write_streets(root):
    ellipse = dict(shape_attributes=dict(name="ellipse", cx=9, cy=9, rx=2, ry=3), region_attributes={})
    project = {"none.jpg1": dict(filename="none.jpg", regions={})}
    splits = {"train": [], "val": ["none.jpg", "via_region_data.json"]}
    for k, split in enumerate(("train", "val", "val", "train")):
        stem = f"IL 53 at Lake Cook (West ramp) West-{k}"
        a, b = (-5, -7, 20 + k, 9), pair(k)[1]
        regions = [ellipse, *(via_region("polygon", box, k, vehicle_type="car") for box in (a, b))]
        project[f"{stem}.jpg99"] = dict(filename=f"{stem}.jpg", regions=dict(enumerate(regions)))
        splits[split].append(f"{stem}.jpg")
        put(root / "streets" / "images" / f"{stem}.jpg", photo(a, b))
        for name in (split, "all"):
            yield name, stem, {1: ("car", a), 2: ("car", b)}
    put(root / "streets" / "annotations" / "vehicle-annotations.json", project)
    put(root / "data" / "train-val-split.json", splits)

def soft(mask):
    """255 and 0 with soft edges: 128 is the first pixel of the object in a row, 127 the last before."""
    grey = 255 * mask.astype(np.uint8)
    grey[mask & ~np.roll(mask, 1, 1)] = 128
    grey[~mask & np.roll(mask, -1, 1)] = 127
    return grey

def write_thinobject(root):
    home = root / "ThinObject5K"
    for split in ("train", "val", "test"):
        stems = named(f"{split}_pump_PNG{{}}")
        for k, stem in enumerate(stems):
            box, _ = pair(k)
            put(home / "images" / f"{stem}.jpg", photo(box))
            put(home / "masks" / f"{stem}.png", soft(area(box)))
            yield split, stem, {0: (None, box)}
        put(home / "list" / f"{split}.txt", "\ufeff" + "".join(f"{stem}.png\n" for stem in [*stems, f"{split}_lost"]))

def write_msra10k(root):
    home = root / "MSRA10K_Imgs_GT" / "MSRA10K_Imgs_GT" / "Imgs"
    for k, stem in enumerate(named("{}", "train", 4) + named("{}", "val", 4)):
        mask = area(*pair(k))
        put(home / f"{stem}.jpg", photo(*pair(k)))
        forms = soft(mask), mask * np.uint8(1), mask * np.uint16(255), mask * np.uint16(65535)
        put(home / f"{stem}.png", forms[k % 4])
        yield split_of(stem), stem, {0: (None, *pair(k))}
    put(home / "lone.jpg", smooth())

def write_isic2016(root):
    form = "ISIC_{:07}"
    for part, stems in (("Training", named(form, "train") + named(form, "val")), ("Test", named(form))):
        images, masks = (root / f"ISBI2016_ISIC_Part1_{part}_{what}" for what in ("Data", "GroundTruth"))
        for k, stem in enumerate(stems):
            box, _ = pair(k)
            put(images / f"{stem}.jpg", photo(box))
            put(masks / f"{stem}_Segmentation.png", 255 * area(box).astype(np.uint8))
            yield "test" if part == "Test" else split_of(stem), stem, {0: (None, box)}
        put(images / "ISIC_lone.jpg", smooth())

# Each with what Dataset.left_out, the samples' left_out and Dataset.skipped must hold for "val", in words.
COCO_LEFT = {"crowd": 1, "ignore": 1, "without a mask": 2, "of fewer than 3 points": 1, "of an unknown image": 1,
             "images without masks": 1}
LAYOUTS = {
    "robustseg": (write_robustseg, {}, {"empty": 4}, ["lone.npy: has no image"]),
    "coco": (write_coco, COCO_LEFT, {"empty": 1}, ["val2017/000000000009.jpg: no such image"]),
    "lvis": (write_lvis, COCO_LEFT, {"empty": 1}, []),
    "lis": (write_lis, COCO_LEFT, {}, []),
    "bdd100k": (write_bdd100k, {}, {"crowd": 2, "ignore": 2}, ["lone.jpg: has no mask file"]),
    "acdc-panoptic": (write_acdc_panoptic, {}, {"crowd": 2, "stuff": 2}, []),
    "acdc-semantic": (write_acdc_semantic, {}, {"below 64 px": 2}, []),
    "ndd20": (write_ndd20, {"of fewer than 3 points": 6}, {}, ["ABOVE/0.jpg: no such", "BELOW/0.jpg: no such"]),
    "streets": (write_streets, {"of shape ellipse": 2, "images without masks": 1}, {}, []),
    "thinobject": (write_thinobject, {}, {}, ["val_lost of list/val.txt"]),
    "msra10k": (write_msra10k, {}, {}, ["lone.jpg: has no mask file"]),
    "isic2016": (write_isic2016, {}, {}, ["ISIC_lone.jpg: has no mask file"])}

def write_set(layout, root):
    """Writes a miniature of a dataset: {split: {sample's name: {index: (label, mask)}}}."""
    write, *_ = LAYOUTS[layout]
    truth = {}
    for split, name, regions in write(root):
        masks = {index: (label, area(*boxes)) for index, (label, *boxes) in regions.items()}
        truth.setdefault(split, {})[name] = masks
    return truth

def write_layout(layout, root, split="val"):
    """The same, of one split: {sample's name: {index: (label, mask)}}."""
    return write_set(layout, root)[split]

@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_to_the_pixel_and_accounts_for_what_is_left_out(tmp_path, layout):
    _, left_out, left_out_by_samples, skipped = LAYOUTS[layout]
    root = tmp_path / "train" / layout  # the folder above is called like a split
    splits = write_set(layout, root)
    assert set(data.find_splits(root)[1]) <= {"all", *splits}
    for split, truth in splits.items():
        dataset = data.load_dataset(root, split)
        by_samples = Counter()
        count = 0
        for sample in pickle.loads(pickle.dumps(dataset)):  # as workers that are spawned get it
            regions, masks, image = truth[sample.name], sample.masks(), sample.image()
            assert sorted(sample.indices) == sorted(regions)
            assert masks.dtype == bool
            for index, label, mask in zip(sample.indices, sample.labels, masks, strict=True):
                assert label == regions[index][0]
                assert np.array_equal(mask, regions[index][1])
            assert ((image.mean(2) > 120) != masks.any(0)).mean() < 0.03
            count += len(masks) + sample.left_out["empty"]
            by_samples += sample.left_out
        assert dataset.kind == layout.split("-")[0]
        assert names_of(dataset) == sorted(truth)
        assert dataset.masks in (None, count)
        if split == "val":
            assert by_samples == left_out_by_samples
            assert dataset.left_out == left_out
            for reason, count in left_out.items():
                assert f"{count} {reason}" in dataset.summary()
            for words, line in zip(skipped, dataset.skipped, strict=True):
                assert words in line

def test_the_kind_of_a_folder(tmp_path):
    load_coco(tmp_path, "1.jpg")
    put(tmp_path / "lvis_v1_val.json", coco("1.jpg"))
    with refused("lvis and coco", f"lvis={tmp_path}", kind=data.DatasetError):
        data.load_dataset(tmp_path, "val")
    with refused("'cocoa'", "robustseg", "msra10k", kind=data.DatasetError):
        data.load_dataset(tmp_path, "val", "cocoa")
    assert names_of(data.load_dataset(tmp_path, "val", "lvis")) == ["1"]

@pytest.mark.parametrize("layout, folder", [("robustseg", "val"), ("ndd20", "degraded/all")])
def test_degraded_images_are_the_same_on_the_fly_and_from_their_folder(tmp_path, layout, folder):
    write_layout(layout, tmp_path)
    plain = data.load_dataset(tmp_path, "val")
    assert run_cli(data.main, tmp_path, "--corrupt") is None
    stored = data.load_dataset(tmp_path, "val")
    for k, condition in itertools.product(range(2), CORRUPTIONS):
        name = stored[k].name
        expected = data.degrade(plain[k].image(), condition, data.seed_of(name, condition))
        assert np.array_equal(plain[k].image(condition), expected)
        assert np.array_equal(stored[k].image(condition), expected)
        assert np.array_equal(data.read_image(tmp_path / folder / condition / f"{name}.jpg"), expected)

def test_the_lack_of_one_download_does_not_hide_the_others(tmp_path, capsys):
    write_layout("acdc-semantic", tmp_path)
    for path in tmp_path.rglob("*_gt_ref_*"):
        path.unlink()
    assert run_cli(data.main, tmp_path) is None
    shown = capsys.readouterr().out
    for words in ("train (acdc): 2 images", "train_ref (acdc): 0 images; 0 files skipped: nothing to use here"):
        assert words in shown
    assert run_cli(data.main, tmp_path, "--split", "train_ref") == 2

# Forms of COCO's JSON, and names that repeat.

A, B = pair(0)
IN_A = area(A).astype(np.uint8)
IN_B = area(B).astype(np.uint8)
IMAGE = photo(A, B)
VAL = "annotations/instances_val2017.json"

def coco(*files, change=lambda content: None):
    """COCO's JSON, changed, of these images, each with the objects A and B."""
    images = []
    annotations = []
    for k, file in enumerate(files):
        images.append(dict(id=k, file_name=file, height=64, width=96))
        for n, shape in enumerate(([ring(*A)], rle(IN_B))):
            annotations.append(dict(id=10 * k + n, image_id=k, category_id=1, segmentation=shape))
    content = dict(images=images, annotations=annotations, categories=[dict(id=1, name="cat")])
    change(content)
    return json.dumps(content)

def of_first(key, **values):
    """A change of the first record of a list."""
    return lambda content: content[key][0].update(values)

def load_coco(root, *files, present=None, **change):
    """The dataset of such a JSON. present: the images that are there, if not all."""
    put(root / VAL, coco(*files, **change))
    for file in present or files:
        put(root / "val2017" / file, IMAGE)
    return data.load_dataset(root, "val")

CORNERS = np.reshape(ring(*A), (4, 2)).tolist()
RUNS = dict(size=["64", 96.0], counts=[f"{run}.0" for run in rle(IN_A)["counts"]])

@pytest.mark.parametrize("change, label", [
    (of_first("annotations", image_id="0", category_id=1.0, id=0.0), "cat"),
    (of_first("annotations", segmentation=ring(*map(float, A))), "cat"),
    (of_first("annotations", segmentation=CORNERS), "cat"),
    (of_first("annotations", segmentation=RUNS), "cat"),
    (of_first("images", height="64", width=96.0), "cat"),
    (of_first("images", height=None, width=None), "cat"),
    (of_first("images", file_name=None, coco_url="http://x.org/val2017/1.jpg"), "cat"),
    (of_first("categories", id=1.0, name=7), "7"),
    (lambda content: content.pop("categories"), None),
    (lambda content: content["annotations"][0].pop("category_id"), None)])
def test_common_forms_of_coco_files_are_read(tmp_path, change, label):
    sample, = load_coco(tmp_path, "1.jpg", change=change)
    assert np.array_equal(sample.masks(), [IN_A, IN_B])
    assert sample.indices == (0, 1)
    assert sample.labels[0] == label

@pytest.mark.parametrize("values, reason", [
    (dict(segmentation=[None]), "of fewer than 3 points"),
    (dict(iscrowd="x"), "malformed"),
    (dict(image_id={}), "of an unknown image")])
def test_a_malformed_annotation_ends_no_run(tmp_path, values, reason):
    dataset = load_coco(tmp_path, "1.jpg", change=of_first("annotations", **values))
    assert np.array_equal(dataset[0].masks(), [IN_B])
    assert dataset.left_out == {reason: 1}

@pytest.mark.parametrize("written", [
    "1.jpg", "./a/1.jpg", "a\\1.jpg", "C:\\photos\\a\\1.jpg", "val2017/a/1.jpg", "/data/a/1.jpg", "a//1.png",
    "https://x.org/val2017/a/1.jpg?size=3", "file:///home/a/1.JPG"])
def test_paths_of_images_as_tools_write_them(tmp_path, written):
    dataset = load_coco(tmp_path, written, present=["a/1.jpg" if "a" in written else "1.jpg"])
    assert names_of(dataset) == ["1"]

@pytest.mark.parametrize("files, expected", [
    (["a/1.png", "b/1.png", "2.png"], ["2", "a/1", "b/1"]),
    (["1.png", "1.bmp", "2.png"], ["1.bmp", "1.png", "2"]),
    (["a/1.png", "a/1.bmp", "b/1.png"], ["a/1.bmp", "a/1.png", "b/1"])])
def test_names_are_unique_where_stems_repeat(tmp_path, files, expected):
    dataset = load_coco(tmp_path, *files)
    for sample in dataset:
        k = files.index(os.path.relpath(sample.clear, tmp_path / "val2017"))
        put(tmp_path / "val2017" / files[k], smooth(64, 96, k))
        assert np.array_equal(sample.image(), smooth(64, 96, k))
    assert names_of(dataset) == expected
    assert len({sample.prompts()[0].tobytes() for sample in dataset}) == 3
    assert run_cli(data.main, tmp_path, "--corrupt") is None
    assert len(list(tmp_path.glob("degraded/val/fog/**/*.jpg"))) == 3
    (tmp_path / "val2017" / files[0]).unlink()  # the names of the others stay, and none is read in its place
    assert len({*expected} - {*names_of(data.load_dataset(tmp_path, "val"))}) == 1

def test_names_are_unique_where_frames_repeat(tmp_path):
    write_layout("acdc-semantic", tmp_path)
    for folder in list(tmp_path.rglob("GOPR0475")):
        shutil.copytree(folder, folder.parent / "GOPR0476")
    names = names_of(data.load_dataset(tmp_path, "val"))
    assert names[:2] == [f"fog/val/{folder}/GOPR0475_frame_000042" for folder in ("GOPR0475", "GOPR0476")]
    assert len(names) == 4

# Run lengths, polygons, connected parts, JSON, prompts in a file.

# By pycocotools 2.0.11: polygons, height, width, compressed run lengths.
POLYGONS = [
    ([[3.25, 4.5, 40.75, 6.12, 33.4, 30.99, 12.08, 27.61]], 40, 50,
     "U53U13M2N3M2N3M3M2N2N00000000001O00000000010O00000000001O000000L4M3M3L4M3L4MU;"),
    ([[-7.31, 5.2, 20.5, -6.4, 61.87, 22.05, 18.33, 52.7]], 40, 50,
     "2a0g02M3N2M3N2N2N1O2N2N2Nbf0O_YO001O1O001O1O0O2N2O0O2N2O0O2N2N101N2N2OB"),
    ([[1.5, 1.5, 10.5, 1.5, 10.5, 8.5, 1.5, 8.5], [6.25, 4.75, 21.4, 6.6, 14.2, 18.8]], 20, 24,
     "Z17=0000000000001O21OO1N1O1ON2O1N2N2O1Nh1"),
    ([[2.17, 1.42, 28.63, 28.91, 2.44, 28.35, 27.9, 1.08]], 30, 30,
     "m11m01KO[O2c0O]O2a0O_O2?OA2=0B1<0D1:0F180H160J131M011O0O11OO11N11ON31MN51KN71IN91GN;1EN>0BO`00@Ob00^OOd00\\OOf00"
     "5OP1")]

@pytest.mark.parametrize("parts, height, width, counts", POLYGONS)
def test_polygons_as_pycocotools_fills_them(parts, height, width, counts):
    mask = data.polygon_mask(parts, height, width)
    assert mask.dtype == bool
    assert data.rle_encode(mask) == dict(size=[height, width], counts=counts)
    for form in (counts, counts.encode()):
        assert np.array_equal(data.rle_decode(dict(size=[height, width], counts=form)), mask)

def test_run_lengths_of_many_masks():
    rng = np.random.default_rng(0)
    for k in range(300):
        mask = rng.random(rng.integers(1, 14, 2)) < (0, 0.1, 0.5, 0.9, 1)[k % 5]
        mask = mask.repeat(99, 0) if k == 9 else mask  # runs of more than two characters
        assert np.array_equal(data.rle_decode(data.rle_encode(mask)), mask)
        assert np.array_equal(data.rle_decode(rle(mask)), mask)

@pytest.mark.parametrize("counts", ["", "~", "P", "0", "é", "7K5", "oooooooooooooo1", [], [5], [7, -1], [6.5], [[6]],
                                    [2**62] * 4 + [6], [2**63, 2**63, 6], [10**30], [None], None])
def test_run_lengths_that_do_not_fit(counts):
    with pytest.raises((ValueError, TypeError)):
        data.rle_decode(dict(size=[2, 3], counts=counts))

@pytest.mark.parametrize("x", [[9], [9, math.nan], [9, 1e9]])
def test_outlines_that_make_no_sense(x):
    with pytest.raises(ValueError):
        data.outline_mask([0, 0, *x], [1, 2, 3, 4], 20, 30)
    with pytest.raises(ValueError):
        data.polygon_mask([[1, 2, 3, 4, *x]], 20, 30)

def test_polygons_that_are_too_long():
    with refused("longer than two million pixels"):
        data.polygon_mask([[9e4, -9e4, -9e4, 9e4] * 30], 20, 30)

def flood(mask):
    """The connected parts of a mask, numbered from 1 in reading order: low numbers spread."""
    parts = np.where(mask, np.arange(mask.size).reshape(mask.shape), mask.size)
    for _ in range(mask.size):
        around = np.lib.stride_tricks.sliding_window_view(np.pad(parts, 1, constant_values=mask.size), (3, 3))
        parts = np.where(mask, around.min((2, 3)), mask.size)
    return mask * (1 + np.searchsorted(np.unique(parts), parts))

def test_components_against_a_flood():
    rng = np.random.default_rng(0)
    for k in range(100):
        mask = rng.random(rng.integers(1, 11, 2)) < (0, 0.3, 0.45, 0.6, 1)[k % 5]
        parts, areas = data.components(mask)
        expected = flood(mask)
        assert np.array_equal(parts, expected)
        assert areas.tolist() == np.bincount(expected.ravel())[1:].tolist()

@pytest.mark.parametrize("options", [{"indent": 1}, {"ensure_ascii": False}])
def test_json_is_walked_as_json_reads_it(tmp_path, options):
    deep = {"x": [[], {}, [None, True], {"y": {"z": [-1, 2.5e-3, 1e+9]}}], "": "]}[{,:\"\\/\b\n"}
    content = {"info": deep, "version": -1.25e+10, "a": [deep, 1e22, "ü\\\"", [[1.5, 2]]], "empty": [],
               "b": [{"text": "象🐘"}, {"text": "é"}], "end": 1.75}
    whole = json.dumps(content, **options)
    put(tmp_path / "x.json", whole)
    lists = {"a": [], "b": []}
    for key, record, start, length in data.json_records(tmp_path / "x.json"):
        lists[key].append(json.loads(whole.encode()[start:start + length]))
        if key == "b":
            assert data._utf8(record["text"]) == lists[key][-1]["text"]
    assert lists == {"a": content["a"], "b": content["b"]}

@pytest.mark.parametrize("text", [
    "", " ", "é", "{1", "[1]", '{"a" [1]}', '{"a": [1 2]}', '{"a": [1}', '{"a": [1]', '{"a": [{"b": 1]]}',
    '{"a": [tru]}', '{"a": "b" 3}', '{"a": [' + '{"b": ' * 9999, '{"a": ["' + "x" * 9999])
def test_json_that_is_none(tmp_path, text):
    put(tmp_path / "x.json", text)
    with pytest.raises((ValueError, RecursionError)):
        list(data.json_records(tmp_path / "x.json"))

def test_exported_prompts_are_those_that_are_drawn(tmp_path):
    def change(content):
        content["annotations"] *= 2  # two masks of each id, which have prompts of their own

    dataset = load_coco(tmp_path, "1.jpg", "2.jpg", change=change)
    path = tmp_path / "p.json"
    assert run_cli(data.main, tmp_path, "--export-prompts", path, "--seed", 1) is None
    content = json.loads(path.read_text())
    entries = content["sets"][0].pop("samples")
    pinned, = data.load_datasets([tmp_path], "val", prompt_files=[path])
    assert content == dict(format="gara-sam prompts 1", sets=[dict(kind="coco", split="val", seed=1)])
    assert entries.keys() == {"1", "2"}
    assert dataset[1].indices == (10, 11, "10+", "11+")
    for sample, other in zip(dataset, data.Union([pinned]), strict=True):
        points, boxes = sample.prompts(seed=1)
        assert not np.array_equal(sample.prompts()[0], points)
        assert len({clicks.tobytes() for clicks in points}) == 4
        assert all(map(np.array_equal, other.prompts(), (points, boxes)))
        masks = {}
        for index, clicks, box in zip(sample.indices, points, boxes, strict=True):
            masks[str(index)] = dict(points=clicks.tolist(), box=box.tolist())
        assert entries[sample.name] == dict(size=[64, 96], masks=masks)

def test_each_dataset_takes_the_prompts_file_that_fits(tmp_path):
    roots = []
    files = [tmp_path / "0.json", tmp_path / "1.json"]
    for k, file in enumerate(files):
        roots.append(put_split(tmp_path / str(k), {"a": (smooth(), np.roll(squares(), 9 * k, 2))}))
        data.export_prompts([data.load_dataset(roots[k], "test")], file)
    several = data.Union(data.load_datasets(roots, "test", prompt_files=files[::-1]))
    assert [sample.clear for sample in several] == [str(root / "test/clear/a.jpg") for root in roots]
    several[0].prompts(), several[1].prompts()
    shutil.copy(files[0], tmp_path / "copy.json")
    with refused("0.json and ", "copy.json: both", kind=data.DatasetError):
        data.load_datasets(roots[:1], "test", prompt_files=[files[0], tmp_path / "copy.json"])

SAMPLE = "sets", 0, "samples", "1"
MASK = *SAMPLE, "masks", "0"

@pytest.mark.parametrize("place, value, words", [
    (("format",), "x", "format 'x'"),
    (("sets",), None, "not a prompts file"),
    (("sets", 0, "kind"), "lvis", "no prompts for coco val, but for lvis val"),
    (SAMPLE, None, "1 of 2 samples of"),
    ((*SAMPLE, "size"), [96, 64], "of 1, 96 x 64 pixels"),
    ((*MASK, "points", 2, 0), 2, "no three points"),  # outside of the mask
    ((*MASK, "points", 0, 1), 10**400, "no three points"),
    ((*MASK, "box", 2), 50, "another box for mask 0")])
def test_prompts_files_that_do_not_fit(tmp_path, place, value, words):
    path = tmp_path / "changed.json"
    data.export_prompts([load_coco(tmp_path, "1.jpg", "2.jpg")], path)
    content = json.loads(path.read_text())
    *above, last = place
    functools.reduce(lambda node, key: node[key], above, content)[last] = value
    put(path, content)
    with refused("changed.json", words, kind=data.DatasetError):
        data.load_datasets([tmp_path], "val", prompt_files=[path])

# Your own images.

NUMBERS = IN_A + 2 * IN_B
BOTH = 255 * (IN_A + IN_B)

def palette_image(numbers):
    """The bytes of a PNG whose palette's indices are these numbers."""
    image = Image.fromarray(numbers)
    image.putpalette(np.random.default_rng(0).bytes(768))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()

def yolo_line(label, box):
    shares = np.array(ring(*box)) / (96, 64, 96, 64, 96, 64, 96, 64)
    return f"{label} {' '.join(map(str, shares))}\n"

YOLO = yolo_line(3, A) + "\n" + yolo_line(0, B) + "1 0.5 0.5 0.2 0.2\n"  # the last a box, which is no outline
VOID = NUMBERS.copy()
VOID[40:60, :9] = 255
HALF = Image.fromarray(BOTH).resize((48, 32))
ENLARGED = np.array(HALF.resize((96, 64), Image.Resampling.BILINEAR))

# The form, the image, its masks, the split that their paths tell of.
FORMS = {
    "folder imgs/a.jpg masks/a.png all": NUMBERS,
    "folder clear/a.jpg masks/a.png all": np.uint16(700) * NUMBERS,
    "folder JPEGImages/a.jpg SegmentationObject/a.png all": palette_image(VOID),
    "folder train/images/a.jpg train/labels/a.png train": 100 * IN_A + 255 * IN_B,
    "folder images/train/a.jpg masks/train/a.png train": np.dstack([IN_A, IN_B, IN_B]),
    "folder set/images/Training/a.jpg set/annotations/Training/a.npy train": np.stack([IN_A, IN_B]),
    "yolo images/a.jpg labels/a.txt all": YOLO,
    "coco images/a.jpg mine.json all": coco("a.jpg"),
    "coco images/a.jpg labels/coco_train.json train": coco("images/a.jpg"),
    "acdc rgb_anon/fog/val/a.png gt_detection/instancesonly_val_gt_detection.json val": coco("fog/val/a.png"),
    "coco valid/a.jpg valid/_annotations.coco.json val": coco("a.jpg"),
    "coco test/images/a.jpg annotations/instances-test.json test": coco("a.jpg"),
    "coco val2017/a.jpg annotations/mine.json all": coco("a.jpg")}
LABELS = {"folder": (None, None), "yolo": ("3", "0")}

@pytest.mark.parametrize("form", FORMS)
def test_own_data_is_read_to_the_pixel(tmp_path, form):
    kind, image, source, split = form.split()
    put_all(tmp_path, {image: IMAGE, source: FORMS[form]})
    dataset = data.load_dataset(tmp_path, split)
    sample, = pickle.loads(pickle.dumps(dataset))
    assert dataset.kind == kind
    assert data.find_splits(tmp_path)[1] == [split]
    assert np.array_equal(sample.masks(), [IN_A, IN_B])
    assert sample.labels == LABELS.get(kind, ("cat", "cat"))
    assert os.path.samefile(sample.clear, tmp_path / image)
    assert dataset.summary().endswith(f"0 files skipped; first: {sample.clear} with {tmp_path / source}")
    if kind == "coco":
        _, (alone,), listing = data.find_splits(tmp_path / source)
        assert os.path.samefile(listing(alone).samples[0].clear, tmp_path / image)

@pytest.mark.parametrize("image, masks", [
    ("train/images/a.jpg", {"train/masks/a_1.png": IN_A, "train/masks/a_two_2.png": 255 * IN_B}),
    ("train/images/a.jpg", {"train/annotations/a/1.png": IN_A, "train/annotations/a/2.png": IN_B}),
    ("train/clear/a.jpg", {"train/masks/a.npy": np.stack([IN_A, IN_B]), "train/masks/a_.png": BOTH})])  # Robust-Seg's
def test_several_files_of_masks(tmp_path, image, masks):
    put_all(tmp_path, {image: IMAGE} | masks)
    sample, = data.load_dataset(tmp_path, "train")
    assert np.array_equal(sample.masks(), [IN_A, IN_B])

ONE = BOTH > 0
BINARY = [BOTH, ONE, BOTH // 255, palette_image(BOTH), soft(ONE), np.dstack([soft(ONE)] * 3)]

@pytest.mark.parametrize("content, expected", [*zip(BINARY, itertools.repeat(ONE)), (ENLARGED, ENLARGED >= 128)])
def test_binary_masks_are_one_object(tmp_path, content, expected):
    put_all(tmp_path, {"images/a.jpg": IMAGE, "masks/a.png": content})
    sample, = data.load_dataset(tmp_path, "all")
    assert np.array_equal(sample.masks(), [expected])

@pytest.mark.parametrize("settled, masks", [
    ("folder={root}", {"masks/a.png": NUMBERS, "labels/a.txt": YOLO}),
    ("coco={root}", {"masks/a.png": NUMBERS, "mine.json": coco("a.jpg")}),
    ("coco={root}/other.json", {"mine.json": coco("a.jpg"), "other.json": coco("a.jpg")}),
    ("folder={root}/annotations/", {"masks/a.png": NUMBERS, "annotations/a.png": NUMBERS}),
    ("folder={root}/two/masks/", {"masks/a.png": NUMBERS, "two/images/a.jpg": IMAGE, "two/masks/a.png": NUMBERS})])
def test_ambiguous_sets_name_what_settles_it(tmp_path, settled, masks):
    put_all(tmp_path, {"images/a.jpg": IMAGE} | masks)
    settled = settled.format(root=tmp_path)
    with refused(settled, kind=data.DatasetError):
        data.load_dataset(tmp_path, "all")
    dataset, = data.load_datasets([settled], "all")
    assert f"{dataset.kind}={dataset[0].source}".startswith(settled)

# What is refused.

DOCS = [reader.__doc__ for reader in (data.KINDS | data.OWN).values()]
CLEAR = {"test/clear/a.jpg": smooth()}
SPLIT = CLEAR | {"test/masks/a.npy": squares()}
OWN = {"images/a.jpg": IMAGE}
OF_FIRST = json.loads(coco("a/1.jpg"))["annotations"]
ODD_PATHS = "\ud800.jpg", "a\nb.jpg", "\0.jpg", ".", "..", "x" * 999
VIA = "annotations/vehicle-annotations.json"

# [Dataset] split, files, words of the message.
@pytest.mark.parametrize("place, files, words", [
    ("void test", {"void/x": None}, "no dataset found ... " + " ... ".join(DOCS)),
    (". test", CLEAR, "masks ... masks.zip"),
    (". test", CLEAR | {"test/masks/b.npy": squares()}, "1 images ... 1 .npy"),
    ("coco=. test", SPLIT, "instances_<split>2017.json ... holds: test"),
    ("test test", SPLIT, "parent folder"),
    (". test", SPLIT | {"test/fog/a.png": smooth(20, 20)}, "a.png: is 20 x 20 pixels (width x height), but"),
    (". test", SPLIT | {"test/fog/a.png": smooth(), "test/fog/a.TIF": smooth()}, "a.png and "),
    (". val", {VAL: coco(*ODD_PATHS)}, "no such image"),
    (". val", {VAL: coco("1.jpg"), "val2017/1.jpg": smooth(20, 30)}, "30 x 20 ... 96 x 64"),
    (". val", {VAL: coco("1.jpg", change=of_first("annotations", segmentation=rle(IN_A.T))),
               "val2017/1.jpg": IMAGE}, f"{VAL} ... [96, 64]"),
    (". val", {VAL: coco("a/1.jpg", "b/1.jpg", change=of_first("images", id=1))}, "two records of 1 ... a/1.jpg"),
    (". val", {VAL: coco("1.jpg", change=lambda content: content["categories"].append({"id": 1, "name": "dog"}))},
     "two records of 1 ... cat ... dog"),
    (". val", {VAL: coco("b/1.jpg", "b/1.jpg"), "val2017/b/1.jpg": IMAGE}, "two images of this name"),
    (". val", {VAL: coco("a/1.jpg", "1.jpg", change=lambda content: content.update(annotations=OF_FIRST)),
               "val2017/1.jpg": IMAGE}, "a/1.jpg: no such image"),
    (". train", {"train.json": coco("a.jpg"), "val.json": coco("a.jpg"), "val/a.jpg": IMAGE},
     "no such image ... train.json"),
    (". all", {VIA: {"a": {"filename": 3}}}, f"{VIA}: not a VIA project, or damaged"),
    (". all", OWN | {"masks/a_1.png": IN_A, "masks/a_2.png": IN_B[:40]}, "masks/a_2.png ... 96 x 40 ... 96 x 64"),
    (". all", OWN | {"labels/a.txt": "0 0.1 0.2 0.3\n"}, "labels/a.txt ... cannot"),
    (". all", OWN | {"masks/b.png": NUMBERS}, "masks ... of 1 images none has a mask ... STEM_ANY.*"),
    ("mine.json all", {"mine.json": dict(shapes=[])}, 'mine.json: no COCO file ... "images" ... export'),
    ("mine.json all", {"mine.json": '{"images": ["segmentation"'}, "mine.json: not a COCO file, or damaged")])
def test_what_is_refused_is_named_in_one_line(tmp_path, monkeypatch, place, files, words):
    monkeypatch.chdir(put_all(tmp_path, files))
    root, split = place.split()
    with refused(*words.split(" ... "), kind=data.DatasetError):
        dataset, = data.load_datasets([root], split)
        for sample in dataset:
            sample.image("fog"), sample.masks()

# ---- Training -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with demo/, a handful of scenes, and w.pth, vit_t weights."""
    folder = tmp_path_factory.mktemp("demo")
    data.make_demo(folder / "demo", train=6, val=2, test=3)
    torch.save(tiny_weights(), folder / "w.pth")
    return folder

def training(demo, out, *more):
    """The words of a short training run."""
    usual = "--device cpu --amp off --workers 0 --batch-size 2 --val-images 1 --steps 6 --val-every 3 --log-every 2"
    return ["--data", demo / "demo", "--checkpoint", demo / "w.pth", "--out", out, *usual.split(), *more]

def run_train(demo, out, *more):
    """Exit code of a short training run."""
    return run_cli(train.main, *training(demo, out, *more))

def settings(demo, *more):
    """The settings of a short training run."""
    return train.parse([str(word) for word in training(demo, "out", *more)])

def train_refuses(demo, out, capsys, words, *more):
    """train.py ends with one line that holds these words, and writes nothing."""
    before = everything(demo)
    capsys.readouterr()
    assert run_train(demo, out, *more) == 2
    one_error(capsys, words)
    assert everything(demo) == before

def log_lines(folder):
    """The lines of a run's log."""
    return [json.loads(line) for line in open(folder / "log.jsonl")]

def log_of(folder, key):
    """The lines of a run's log that have this key."""
    return [line for line in log_lines(folder) if key in line]

def last(folder):
    return torch.load(folder / "last.pt", weights_only=True)

def saved_step(folder):
    return last(folder)["meta"]["training"]["step"]

def same(a, b):
    """Two examples, or two nested states, are equal in every bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def assert_same_run(a, b):
    """Two runs ended with the same weights, optimizer, validation and log, to the bit."""
    one, two = last(a), last(b)
    assert same(one["weights"], two["weights"])
    assert same(one["meta"]["training"]["optimizer"], two["meta"]["training"]["optimizer"])
    assert one["meta"]["validation"] == two["meta"]["validation"]
    timeless = []
    for folder in (a, b):
        timeless.append([line | dict(images_per_second=0, waiting=0) for line in log_lines(folder)])
    assert timeless[0] == timeless[1]

# The loss, the learning rate and the defaults.

def plain_mask_loss(logits, targets):
    """20 x focal (alpha 0.5, gamma 2) + dice of one mask, pixel by pixel."""
    focal = both = total = 0.0
    for z, t in zip(logits.flatten().tolist(), targets.flatten().tolist()):
        p = 1 / (1 + math.exp(-z))
        p_t = p * t + (1 - p) * (1 - t)
        focal -= 0.5 * (1 - p_t) ** 2 * (t * math.log(p) + (1 - t) * math.log(1 - p))
        both += p * t
        total += p + t
    return 20 * focal / logits.numel() + 1 - (2 * both + 1) / (total + 1)

@pytest.mark.parametrize("soft", [False, True])
def test_mask_loss_against_loops(soft):
    rng = torch.Generator().manual_seed(0)
    logits, targets = 3 * torch.randn(2, 6, 5, 4, dtype=torch.float64, generator=rng)
    targets = targets.sigmoid() if soft else (targets > 0).double()
    expected = [plain_mask_loss(z, t) for z, t in zip(logits, targets)]
    assert close(train.mask_loss(logits, targets), torch.tensor(expected, dtype=torch.float64), 1e-10)
    assert torch.autograd.gradcheck(lambda z: train.mask_loss(z, targets), logits.requires_grad_())

def test_a_perfect_mask_has_no_loss():
    truth = (torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)) > 0).double()
    assert train.mask_loss(40 * truth - 20, truth).max() < 1e-6
    assert train.mask_iou(40 * truth - 20, truth).tolist() == [1, 1, 1]

@pytest.mark.parametrize("step, cosine, constant", [
    (0, 1, 1), (1, 2, 2), (2, 2, 2), (21, 1, 2), (39, 1 + math.cos(math.pi * 37 / 38), 2)])
def test_learning_rate_in_closed_form(step, cosine, constant):
    """Of 40 steps, two of warm-up, then 38 of half a cosine."""
    assert train.learning_rate(step, 40, 2.0) == pytest.approx(cosine)
    assert train.learning_rate(step, 40, 2.0, "constant") == constant

@pytest.mark.parametrize("backbone, name, value", [
    ("vit_t", "lr", 1e-3), ("vit_b", "lr", 1e-4), ("vit_l", "lr", 1e-5), ("vit_h", "lr", 1e-5),
    ("vit_b", "batch_size", 8), ("vit_b", "weight_decay", 1e-5), ("vit_b", "temperature", 0.5),
    ("vit_b", "rank_low", 16), ("vit_b", "rank_high", 256)])
def test_default_settings(backbone, name, value):
    assert getattr(train.parse(["--data", "x", "--backbone", backbone]), name) == value

@pytest.mark.parametrize("method", gara.METHODS)
def test_every_option_of_a_method_is_a_flag_with_its_default(method):
    words = ["--data", "x", "--method", method]
    for name, default in gara.default_options(method, "vit_t").items():
        assert getattr(train.parse(words), name) == default
        value = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        assert getattr(train.parse([*words, train.flag(name), value]), name) == default

# Examples.

def examples_of(dataset, count=10**6, **recipe):
    usual = dict(conditions=data.CONDITIONS, image_size=128, patch=8)
    return train.Examples(dataset, count, train.Recipe(**usual | recipe))

def conditions_of(count, **recipe):
    examples = examples_of([Blank(np.ones((1, 128, 128), bool))], **recipe)
    return [examples[i]["condition"] for i in range(count)]

def test_examples_depend_on_their_number_alone(demo):
    dataset = data.load_dataset(demo / "demo", "train")
    examples = examples_of(dataset, 9)
    forwards = [examples[i] for i in range(9)]
    for i in reversed(range(9)):
        assert same(examples_of(dataset)[i], forwards[i])
    assert not same(examples_of(dataset, seed=1)[0], forwards[0])
    assert {example["name"] for example in forwards[:6]} == {sample.name for sample in dataset}  # each image once

@pytest.mark.parametrize("first, workers", [(0, 2), (1, 0), (2, 1)])
def test_workers_prepare_the_same_batches(demo, first, workers):
    examples = examples_of(data.load_dataset(demo / "demo", "train"), 9)
    batched = list(itertools.chain(*train.batches(examples, first, 3, workers)))
    assert same(dict(enumerate(batched, 3 * first)), {i: examples[i] for i in range(3 * first, 9)})

def test_examples_agree_with_their_masks(demo):
    """Demo images are as large as the model's input: a target is the mean of 2 x 2 pixels of the padded mask."""
    dataset = data.load_dataset(demo / "demo", "train")
    examples = examples_of(dataset, masks_per_image=6)
    masks = {sample.name: sample.masks() for sample in dataset}
    for i in range(12):
        example = examples[i]
        truth = masks[example["name"]]
        padded = np.pad(truth, ((0, 0), (0, 128 - truth.shape[1]), (0, 128 - truth.shape[2])))
        means = padded.reshape(-1, 64, 2, 64, 2).mean((2, 4))
        assert example["image"].shape == (3, *truth.shape[1:])
        assert example["labels"].tolist() == [[1, 1, 1]] * 6
        seen = set()
        for target, points, box in zip(example["targets"], example["points"].int(), example["boxes"].int()):
            distance = np.abs(means - target.numpy() / 255)
            k = int(distance.mean((1, 2)).argmin())
            seen.add(k)
            assert distance[k].max() <= 0.5 / 255 + 1e-9
            assert padded[k, points[:, 1], points[:, 0]].all()
            y, x = np.nonzero(padded[k])
            assert box.tolist() == [x.min(), y.min(), x.max(), y.max()]
        assert seen == set(range(len(truth)))  # all objects, some twice

class Blank:
    """A sample that costs nothing to read, with these masks."""
    pinned = None

    def __init__(self, masks, name="blank"):
        self.planes, self.name, self.source = masks, name, name + ".npy"

    def image(self, condition, seed, stored):
        return np.zeros((*self.planes.shape[1:], 3), np.uint8)

    def masks(self):
        return self.planes

@pytest.mark.parametrize("height, width", [(256, 256), (192, 256), (256, 100)])
def test_targets_of_scaled_masks(height, width):
    """A pixel of the target covers 4 x 4 pixels of the image; scaling smooths outlines a little."""
    squares = np.random.default_rng(0).random((1, 16, 16)) > 0.5
    mask = squares.repeat(16, 1).repeat(16, 2)[:, :height, :width]
    padded = np.pad(mask[0], ((0, 256 - height), (0, 256 - width)))
    example = examples_of([Blank(mask)], masks_per_image=1)[0]
    target = example["targets"][0].numpy() / 255
    error = np.abs(target - padded.reshape(64, 4, 64, 4).mean((1, 3)))
    assert error.mean() < 0.05
    assert error.max() < 0.3
    assert target[height // 4:].sum() + target[:, width // 4:].sum() == 0
    x, y = (example["points"][0] * 2).round().int().T
    assert mask[0, y, x].all()

def test_no_target_is_empty():
    """Masks that are too small for the model to see are left out; an image with no other counts as a bad file."""
    masks = np.zeros((3, 480, 640), bool)
    masks[0, 0, 0] = masks[1, 100:200, 50:90] = masks[2, 479, 639] = True
    for i in range(5):
        targets = examples_of([Blank(masks)])[i]["targets"]
        assert (targets > 0).flatten(1).any(1).all()
    examples = examples_of([Blank(masks[::2], "dust"), Blank(masks, "good")])
    assert [examples[i]["name"] for i in range(2)] == ["good", "good"]
    errors = examples[0]["errors"] + examples[1]["errors"]
    assert ["dust.npy" in str(error) for error in errors] == [True]

def test_conditions_are_drawn_evenly():
    drawn = conditions_of(320)
    deals = [drawn[k:k + 16] for k in range(0, 320, 16)]
    assert [sorted(deal) for deal in deals] == [sorted(data.CONDITIONS)] * 20
    assert len({deal[0] for deal in deals}) > 5  # in another order each time
    assert sorted(conditions_of(40, conditions=["fog", "night"])) == ["fog"] * 20 + ["night"] * 20

@pytest.mark.parametrize("clear, conditions, least, most", [
    (1, data.CONDITIONS, 200, 200), (0, data.CONDITIONS, 0, 0), (0.5, ["fog", "rain"], 70, 130)])
def test_the_chance_of_a_clear_image(clear, conditions, least, most):
    drawn = Counter(conditions_of(200, clear=clear, conditions=conditions))
    assert least <= drawn.pop("clear", 0) <= most
    if clear < 1:
        assert drawn.keys() == {*conditions} - {"clear"}

def test_training_degrades_anew_unless_told_to_use_what_is_stored(copied):
    """All stored images are white. Made on the fly, an image has other noise in each epoch."""
    folder, images = copied
    for split in ("train", "val"):
        os.makedirs(folder / "demo" / split / "fog")
        for path in (folder / "demo" / split / "clear").iterdir():
            white = Image.new("RGB", Image.open(path).size, "white")
            white.save(folder / "demo" / split / "fog" / path.name)
    dataset = data.load_dataset(folder / "demo", "train")
    first, second = (examples_of(dataset, conditions=["fog"])[i] for i in (0, 6))
    assert first["image"].float().mean() < 250
    stored = examples_of(dataset, conditions=["fog"], stored=True)
    assert stored[0]["image"].float().mean() > 250
    one = [examples_of([dataset[0]], conditions=["fog"])[i]["image"] for i in range(2)]
    assert not torch.equal(*one)
    assert run_train(folder, folder / "run", "--steps", 1, "--conditions", "fog", "--stored") == 0

# A run and its files.

@pytest.fixture(scope="module")
def finished(demo):
    """The folder, printed text, model and the log at each curve of a run of 6 steps."""
    models, curves = [], []
    build, curve = train.build_model, train.draw_training
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as text:
        patch.setattr(train, "build_model", lambda args: models.append(build(args)) or models[-1])
        patch.setattr(train, "draw_training", lambda lines, path: curves.append([*lines]) or curve(lines, path))
        assert run_train(demo, demo / "finished") == 0
    return demo / "finished", text.getvalue(), models[0], curves

def mean_of_16_conditions(iou):
    degraded, clear = iou["point degraded"] + iou["box degraded"], iou["point clear"] + iou["box clear"]
    return (15 * degraded + clear) / 32

def test_training_writes_its_files(finished):
    folder = finished[0]
    assert sorted(os.listdir(folder)) == [".lock", "curve.png", "gara.pt", "last.pt", "log.jsonl", "run.json"]
    assert [line["step"] for line in log_of(folder, "loss")] == [2, 4, 6]
    validations = log_of(folder, "validation")
    assert [line["step"] for line in validations] == [0, 3, 6]
    kinds = ["box clear", "box degraded", "point clear", "point degraded"]
    assert [list(line["validation"]) for line in validations] == [kinds] * 3

def test_the_best_of_all_conditions_is_kept(finished):
    folder, text, _, _ = finished
    best = max(mean_of_16_conditions(line["validation"]) for line in log_of(folder, "validation"))
    assert float(re.search(r"best.* IoU ([\d.]+)", text)[1]) == pytest.approx(best, abs=1e-4)
    saved = gara.load_adapter(tiny(), folder / "gara.pt")
    assert mean_of_16_conditions(saved["validation"]) == pytest.approx(best)

def test_the_curve_shows_the_validation_just_made(finished, tmp_path):
    folder, _, _, curves = finished
    assert ["validation" in lines[-1] for lines in curves] == [True] * 3
    with Image.open(folder / "curve.png") as page:
        assert page.height > 700  # the gates are drawn, too
    train.draw_training([], tmp_path / "curve.png")  # before anything was logged
    assert (tmp_path / "curve.png").exists()

def test_training_moves_the_adapter_and_not_sam(finished):
    folder, _, model, _ = finished
    state = model.state_dict()
    assert same({key: state[key] for key in tiny_weights()}, tiny_weights())
    torch.manual_seed(0)
    start = gara.adapter_state(gara.attach(tiny(), "gara"))
    moved = [key for key, value in gara.adapter_state(model).items() if not torch.equal(value, start[key])]
    assert len(moved) > 0.9 * len(start)
    assert same(last(folder)["weights"], gara.adapter_state(model))

def test_the_log_tells_what_the_gates_do(finished):
    for line in log_of(finished[0], "loss"):
        assert len(line["active"]) == 6
        assert len(line["higher"]) == 6
        assert 0 <= min(line["higher"]) <= max(line["higher"]) <= 1

def test_a_run_says_what_it_was(demo, tmp_path):
    assert run_train(demo, tmp_path, "--steps", 2, "--seed", 5, "--keep-every", 1, "--limit", 2) == 0
    content = json.load(open(tmp_path / "run.json"))
    assert content["settings"]["seed"] == 5
    assert content["settings"]["rank_high"] == 48
    assert content["versions"]["torch"] == torch.__version__
    assert [part["images"] for part in content["data"]] == [2, 2]
    assert len(content["data"][0]["fingerprint"]) == 16
    own = gara.adapter_state(gara.attach(tiny(), "gara"))
    assert content["learnable_parameters"] == sum(value.numel() for value in own.values())
    assert {"step_1.pt", "step_2.pt"} <= {*os.listdir(tmp_path)}

def test_same_command_same_bits(demo, finished, tmp_path):
    assert run_train(demo, tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", finished[0])

@pytest.mark.parametrize("seed", [-1, 2**64 - 1])
def test_seeds_of_any_size(demo, tmp_path, seed):
    words = "--steps", 1, "--limit", 1, "--no-corrupt"
    assert run_train(demo, tmp_path, *words, "--seed", seed) == 0
    assert run_train(demo, tmp_path, *words, "--seed", seed, "--resume") == 0

def test_names_that_are_not_utf_8(copied):
    folder, images = copied
    strange = os.fsdecode(b"\xff\xe9")
    for split in ("train", "val"):
        for path in sorted((folder / "demo" / split).glob("*/*_00001.*")):
            path.rename(path.with_stem(strange))
    masks = folder / "demo" / "train" / "masks" / f"{strange}.npy"
    masks.write_bytes(masks.read_bytes()[:90])
    out = folder / strange
    assert run_train(folder, out, "--steps", 4, "--val-images", 2) == 0
    assert run_train(folder, out, "--steps", 4, "--val-images", 2, "--resume") == 0
    assert sorted(os.listdir(out)) == [".lock", "curve.png", "gara.pt", "last.pt", "log.jsonl", "run.json"]
    assert json.load(open(out / "run.json"))["settings"]["out"] == str(out)

# Interrupted runs.

@pytest.fixture
def at_step(monkeypatch):
    """at_step(step, action): have the next runs do something in that step, or, with None, nothing again."""
    rate = train.learning_rate

    def set_action(step, action):
        def learning_rate(now, *settings):
            if now == step:
                action()
            return rate(now, *settings)
        monkeypatch.setattr(train, "learning_rate", learning_rate if action else rate)

    return set_action

def stop():
    raise KeyboardInterrupt

def test_resuming_equals_never_stopping(demo, finished, tmp_path, at_step, capsys):
    """Stopped in the fifth step, then resumed from the checkpoint of the third, in the middle of an interval."""
    at_step(4, stop)
    assert run_train(demo, tmp_path / "run") == 130
    assert "--resume" in capsys.readouterr().err
    at_step(4, None)
    train_refuses(demo, tmp_path / "run", capsys, "--resume")
    torch.rand(7)  # whatever the process did in between
    assert run_train(demo, tmp_path / "run", "--resume") == 0
    assert_same_run(tmp_path / "run", finished[0])

def start_training(patch, *words):
    """train.py in a process group of its own, after these lines of Python."""
    program = f"""
import multiprocessing, os, sys, time
sys.path.insert(0, {os.path.dirname(train.__file__)!r})
import data, train
rate, image, main = train.learning_rate, data.Sample.image, os.getpid()
{patch}
sys.exit(train.main(sys.argv[1:]))
"""
    return subprocess.Popen([sys.executable, "-c", program, *map(str, words)], start_new_session=True, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | dict(OMP_NUM_THREADS=str(torch.get_num_threads())))

def in_step(step, action):
    return f"""
def learning_rate(now, *settings):
    if now == {step}:
        {action}
    return rate(now, *settings)
train.learning_rate = learning_rate
"""

def ends(process, seconds=120):
    """(exit code, stderr) of a process; the rest of its group has ended soon after it."""
    _, text = process.communicate(timeout=seconds)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return process.returncode, text
        time.sleep(0.05)
    raise AssertionError("a child outlives its parent")

def test_a_killed_run_goes_on_to_the_same_bits(demo, finished, tmp_path):
    words = training(demo, tmp_path, "--workers", 1, "--save-minutes", 1e-6)
    code, text = ends(start_training(in_step(5, "os.killpg(0, 9)"), *words))
    assert code == -signal.SIGKILL, text
    assert saved_step(tmp_path) == 5
    for name in ("last.pt.part", "log.jsonl"):  # what a kill at the worst moments leaves
        with open(tmp_path / name, "a") as file:
            file.write('{"step": 1, "los')
    assert run_cli(train.main, *words, "--resume") == 0
    assert_same_run(tmp_path, finished[0])
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(finished[0]))

def forked_run(words, kill_after=None):
    """Train on one thread in a child, which is killed after so many seconds. Its exit code, -9 if that came first."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            os._exit(run_cli(train.main, *words))
        finally:
            os._exit(70)
    deadline = time.monotonic() + (kill_after or 120)
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def test_runs_killed_at_any_time_end_with_the_same_bits(demo, tmp_path):
    """Whatever was being written: all files are there in the end, those of --keep-every too."""
    words = ["--steps", 3, "--val-every", 2, "--keep-every", 1, "--save-minutes", 1e-6, "--method", "lora"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start = time.monotonic()
    assert forked_run(training(demo, whole, *words)) == 0
    seconds = time.monotonic() - start
    for share in (0.95, 0.5, 0.7, None):
        resume = ["--resume"] if (cut / "last.pt").exists() else []
        code = forked_run(training(demo, cut, *words, *resume), share and share * seconds)
    assert code == 0
    assert_same_run(cut, whole)
    for name in [f"step_{k}.pt" for k in range(1, 4)]:
        weights = [gara.read_adapter(folder / name)["weights"] for folder in (cut, whole)]
        assert same(*weights), name

def test_a_signal_to_all_processes_of_a_run_stops_it_in_order(demo, tmp_path):
    """As Ctrl-C in a terminal and schedulers send it: the workers must not die first."""
    words = training(demo, tmp_path, "--workers", 1)
    code, text = ends(start_training(in_step(1, "os.killpg(0, 15)"), *words))
    assert code == 143
    assert "stopped by signal 15 after step 2" in text
    assert "Traceback" not in text
    assert saved_step(tmp_path) == 2

@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_run_after_the_step_at_hand(demo, tmp_path, at_step, capsys, number, code):
    at_step(1, lambda: os.kill(os.getpid(), number))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert run_train(demo, tmp_path) == code
    assert "--resume" in capsys.readouterr().err
    assert saved_step(tmp_path) == 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers

@pytest.mark.parametrize("start, action, message", [
    ("fork", "os._exit(1)", "loads data died"),
    ("fork", "raise RuntimeError('some error')", "RuntimeError: some error"),
    ("spawn", "raise RuntimeError('some error')", "RuntimeError: some error")])
def test_what_ends_a_worker_ends_the_run_in_one_line(demo, tmp_path, start, action, message):
    """After a checkpoint; a worker that is stuck does not hold up the end."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import multiprocessing, os, sys, time
sys.path.insert(0, {os.path.dirname(train.__file__)!r})
import train

class Examples(train.Examples):
    def __getitem__(self, i):
        if i == 12:
            time.sleep(1000)
        if i == 6:
            {action}
        return super().__getitem__(i)

train.Examples = Examples
if __name__ == "__main__":
    multiprocessing.set_start_method("{start}")
    sys.exit(train.main(sys.argv[1:]))
""")
    words = training(demo, tmp_path / "run", "--steps", 20, "--val-every", 20, "--workers", 2)
    process = subprocess.Popen([sys.executable, program, *map(str, words)], start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    code, text = ends(process)
    assert code == 2
    assert text.count("\n") == 1
    assert message in text
    assert f"--resume goes on from step {saved_step(tmp_path / 'run')}" in text
    assert saved_step(tmp_path / "run") > 0

def test_workers_end_with_a_killed_run(demo, tmp_path):
    words = training(demo, tmp_path, "--workers", 2, "--steps", 50)
    assert ends(start_training(in_step(1, "os.kill(main, 9)"), *words))[0] == -signal.SIGKILL

@pytest.fixture
def ended(finished, tmp_path):
    """A copy of the finished run's folder."""
    shutil.copytree(finished[0], tmp_path / "ended")
    return tmp_path / "ended"

@pytest.mark.parametrize("words", [[], ["--resume"]])
def test_a_second_run_in_one_folder_is_refused(demo, ended, capsys, words):
    program = f"import sys; sys.path.insert(0, {HERE!r}); import data\nwith data.alone_in({str(ended)!r}): print(); input()"
    first = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    first.stdout.readline()
    before = everything(ended)
    assert run_train(demo, ended, *words) == 2
    one_error(capsys, "another program", str(ended))
    assert everything(ended) == before
    first.communicate(b"\n")
    assert run_train(demo, ended, "--resume") == 0

@pytest.mark.parametrize("words, then, now", [
    ("--lr 2e-3", "--lr 0.001", "0.002"),
    ("--weight-decay 0", "--weight-decay 1e-05", "0.0"),
    ("--clip 1", "--clip None", "1.0"),
    ("--accumulate 2", "--accumulate 1", "2"),
    ("--batch-size 3", "--batch-size 2", "3"),
    ("--amp bf16", "--amp off", "bf16"),
    ("--steps 8", "--steps 6", "8"),
    ("--conditions fog", "--conditions ['clear', ", "['fog']"),
    ("--stored", "--stored False", "True"),
    ("--limit 3", "--data ", "'images': 3"),
    ("--val-images 2", "--val-images 1", "2"),
    ("--rank-low 3", "--rank-low 4", "3"),
    ("--method lora", "--method gara", "lora"),
    ("--pretrain", "--method gara", "pretrain"),
    ("--init finished/gara.pt", "--init None", "gara.pt"),
    ("--prompts p.json", "--prompts []", "['"),
    ("--checkpoint other.pth", "--checkpoint ", "")])
def test_a_run_goes_on_with_no_other_settings(demo, finished, monkeypatch, capsys, words, then, now):
    monkeypatch.chdir(demo)
    if not os.path.exists("p.json"):
        other = {key: value + 0.1 for key, value in tiny_weights().items()}
        torch.save(other, "other.pth")
        run_cli(data.main, "demo", "--export-prompts", "p.json")
    before = everything(demo)
    capsys.readouterr()
    assert run_train(demo, finished[0], "--resume", *words.split()) == 2
    one_error(capsys, "is of a run with", then, ", not ", now)
    assert everything(demo) == before

def test_a_run_goes_on_elsewhere_and_says_so(demo, ended, finished, capsys):
    """Where and how it is computed, and what is kept of it, may change: the state is the same."""
    words = "--workers", 1, "--log-every", 3, "--save-minutes", 1, "--val-every", 2, "--checkpointing"
    assert run_train(demo, ended, "--resume", *words) == 0
    assert "--workers 1; before: 0" in capsys.readouterr().out
    assert_same_run(ended, finished[0])

@pytest.mark.parametrize("file", ["clear", "masks"])
def test_a_run_goes_on_with_no_other_images(copied, capsys, file):
    folder, _ = copied
    assert run_train(folder, folder / "run", "--steps", 1) == 0
    before = json.load(open(folder / "run" / "run.json"))
    path = next((folder / "demo" / "val" / file).iterdir())
    os.utime(path, (0, 0))
    capsys.readouterr()
    assert run_train(folder, folder / "run", "--steps", 1, "--resume") == 2
    one_error(capsys, "--data", "sizes_and_times")
    assert json.load(open(folder / "run" / "run.json")) == before

@pytest.mark.parametrize("entry, value", [
    ("step", "x"), ("step", 99), ("best", None), ("sums", dict(loss="x")), ("lines", 5), ("optimizer", {}),
    ("optimizer", dict(state={0: 5})), ("optimizer", dict(state={999: dict(step=1)})), ("exp_avg", torch.zeros(3)),
    ("exp_avg_sq", "x"), ("step of it", torch.tensor(-1.0)), ("settings", None), ("training", None), ("flip", None)])
def test_resuming_from_a_damaged_state(demo, ended, capsys, entry, value):
    content = last(ended)
    meta = content["meta"]
    training_state = meta["training"]
    if entry in training_state:
        training_state[entry] = value
    elif entry in meta:
        meta[entry] = value
    else:
        training_state["optimizer"]["state"][0][entry.split(" ")[0]] = value
    torch.save(content, ended / "last.pt")
    if entry == "flip":
        raw = bytearray((ended / "last.pt").read_bytes())
        raw[len(raw) // 2] ^= 4
        (ended / "last.pt").write_bytes(raw)
    train_refuses(demo, ended, capsys, "last.pt is damaged", "--resume")

def test_resuming_from_an_older_state(demo, ended, capsys):
    content = last(ended)
    content["meta"]["settings"] = dict(lr="0.001")
    torch.save(content, ended / "last.pt")
    train_refuses(demo, ended, capsys, "older", "--resume")

@pytest.mark.parametrize("pretrain", [[], ["--pretrain"]])
@pytest.mark.parametrize("kind", ["not weights", "adapter of other weights", "adapter alone"])
def test_resuming_from_a_wrong_file(demo, tmp_path, capsys, pretrain, kind):
    if kind == "not weights":
        (tmp_path / "last.pt").write_bytes(b"not weights" * 99)
    else:
        base = sam.build_sam("vit_t") if kind == "adapter of other weights" else tiny()
        gara.save_adapter(gara.attach(base, "gara"), tmp_path / "last.pt")
    train_refuses(demo, tmp_path, capsys, "last.pt", "--resume", *pretrain)
    assert sorted(os.listdir(tmp_path)) == [".lock", "last.pt"]

@pytest.mark.parametrize("damage", [None, b"", b"\0\0", b'{"step": 1', b"[]\n5\n"])
def test_side_files_are_not_needed_to_go_on(demo, ended, finished, damage):
    for name in ("log.jsonl", "run.json", "curve.png"):
        (ended / name).unlink()
        if damage is not None:
            (ended / name).write_bytes(damage)
    assert run_train(demo, ended, "--resume") == 0
    assert_same_run(ended, finished[0])
    assert json.load(open(ended / "run.json"))["settings"]["lr"] == 1e-3

def test_a_curve_that_cannot_be_drawn_costs_nothing(demo, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "draw_training", lambda *_: 1 / 0)
    assert run_train(demo, tmp_path) == 0
    assert capsys.readouterr().out.count("curve.png could not be written: division by zero") == 3
    assert_same_run(tmp_path, finished[0])

def test_pretraining_goes_on_from_before_its_first_log_line(demo, tmp_path, at_step):
    words = "--pretrain", "--log-every", 9, "--val-every", 9, "--steps", 4
    assert run_train(demo, tmp_path / "whole", *words) == 0
    at_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_train(demo, tmp_path / "cut", *words) == 143
    at_step(1, None)
    assert run_train(demo, tmp_path / "cut", *words, "--resume") == 0
    assert same(last(tmp_path / "cut")["sam"], last(tmp_path / "whole")["sam"])

def test_what_is_kept_is_written_before_the_state(demo, tmp_path, monkeypatch):
    """So a kill between the two loses nothing: the step is done again."""
    write, written = os.replace, []
    monkeypatch.setattr(os, "replace", lambda part, path: written.append(os.path.basename(path)) or write(part, path))
    assert run_train(demo, tmp_path, "--steps", 1, "--keep-every", 1) == 0
    assert written.index("step_1.pt") < len(written) - 1 - written[::-1].index("last.pt")

def test_a_full_disk_leaves_the_last_checkpoint(demo, finished, tmp_path, monkeypatch, capsys):
    write = torch.save

    def full_from_step_3(content, path):
        write(content, path)
        if content["meta"]["step"] == 3:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_from_step_3)
        assert run_train(demo, tmp_path) == 2
    one_error(capsys, "No space left", "--resume")
    assert not list(tmp_path.glob("*.part"))
    assert saved_step(tmp_path) == 0
    assert run_train(demo, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, finished[0])

# Bad steps and bad files.

def test_steps_without_a_finite_gradient_are_skipped_and_counted(demo, tmp_path, monkeypatch, capsys):
    loss, calls = train.mask_loss, itertools.count()
    monkeypatch.setattr(train, "mask_loss", lambda z, t: loss(z, t) * (math.nan if next(calls) in (2, 3) else 1))
    assert run_train(demo, tmp_path, "--steps", 4, "--log-every", 1) == 0  # two calls a step: the second is bad
    lines = log_of(tmp_path, "lr")
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1]
    assert ["loss" in line for line in lines] == [True, False, True, True]
    for value in last(tmp_path)["weights"].values():
        assert value.isfinite().all()
    skipped = re.findall("step 1 skipped, its gradient is not finite.*train_0", capsys.readouterr().out)
    assert len(skipped) == 1

def test_training_gives_up_when_the_loss_stays_not_finite(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "mask_loss", lambda logits, targets: logits.sum((-2, -1)) * math.nan)
    assert run_train(demo, tmp_path, "--steps", 20, "--val-every", 20) == 2
    one_error(capsys, "10 steps in a row", "train_0")
    assert saved_step(tmp_path) == 0

@pytest.fixture
def copied(demo, tmp_path):
    """A copy of the demo to spoil, and its training images."""
    shutil.copytree(demo / "demo", tmp_path / "demo")
    shutil.copy(demo / "w.pth", tmp_path)
    return tmp_path, sorted((tmp_path / "demo" / "train" / "clear").iterdir())

def test_bad_files_are_named_and_training_goes_on(copied, capsys):
    folder, images = copied
    images[2].write_bytes(images[2].read_bytes()[:300])
    assert run_train(folder, folder / "run", "--steps", 7) == 0  # more than two epochs
    text = capsys.readouterr().out
    assert text.count(images[2].name) == 1
    assert "1 files skipped" in text.splitlines()[-1]

@pytest.mark.parametrize("error", [ValueError("some\nlines"), KeyError("x"), MemoryError(), RuntimeError("x")])
@pytest.mark.parametrize("split", ["train", "val"])
def test_whatever_a_sample_raises_is_its_own_error(demo, tmp_path, monkeypatch, capsys, split, error):
    """It is named, skipped and counted; --strict refuses it."""
    image = data.Sample.image

    def spoilt(self, *settings, **more):
        if self.name == f"{split}_00001":
            raise error
        return image(self, *settings, **more)

    monkeypatch.setattr(data.Sample, "image", spoilt)
    words = "--steps", 4, "--val-images", 2, "--method", "lora"
    assert run_train(demo, tmp_path / "run", *words) == 0
    text = capsys.readouterr().out
    assert text.count(f"cannot use {split}_00001 ({type(error).__name__}") == 1
    assert run_train(demo, tmp_path / "strict", *words, "--strict") == 2
    one_error(capsys, f"{split}_00001")

@pytest.mark.parametrize("height, width", [(10, 300), (1, 200), (300, 2)])
def test_images_of_odd_shapes_do_not_end_a_run(copied, height, width):
    folder, images = copied
    Image.new("RGB", (width, height), "red").save(images[0])
    np.save(folder / "demo" / "train" / "masks" / f"{images[0].stem}.npy", np.ones((1, height, width), bool))
    words = training(folder, folder / "run", "--workers", 1, "--steps", 6)
    code, text = ends(start_training("", *words))
    assert code == 0, text

@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_a_good_file_ends_training(copied, capsys, workers):
    folder, images = copied
    for image in images:
        image.write_bytes(b"")
    assert run_train(folder, folder / "run", "--workers", workers) == 2
    one_error(capsys, "none of the 6 samples")

# Methods and settings.

@pytest.mark.parametrize("method, words, expected", [
    ("gara", "--rank-low 2 --rank-high 5", dict(rank_low=2, rank_high=5, temperature=0.5, scope="image")),
    ("gara", "--scope window", dict(rank_low=4, rank_high=48, temperature=0.5, scope="window")),
    ("gara_flat", "--temperature 0.7", dict(rank=4, temperature=0.7, scope="image")),
    ("gara_space", "--rank-high 5", dict(rank_low=4, rank_high=5, temperature=0.5, scope="image")),
    ("gara_random", "--rank-high 5", dict(rank_low=4, rank_high=5, scope="image")),
    ("lora", "--rank 3", dict(rank=3)),
    ("moe_lora", "--experts 1,3", dict(experts=(1, 3), temperature=0.5, scope="image"))])
def test_every_method_trains_resumes_and_evaluates(demo, tmp_path, at_step, method, words, expected):
    words = ["--method", method, *words.split(), "--steps", 2, "--val-every", 1, "--no-corrupt"]
    assert run_train(demo, tmp_path / "whole", *words) == 0
    at_step(1, stop)
    assert run_train(demo, tmp_path / "cut", *words) == 130
    at_step(1, None)
    assert run_train(demo, tmp_path / "cut", *words, "--resume") == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    content = gara.read_adapter(tmp_path / "whole" / f"{method}.pt")
    assert content["method"] == method
    assert content["options"] == expected
    adapter = tmp_path / "whole" / "last.pt"
    assert run_evaluate(demo, tmp_path / "results", "--ckpt", adapter, "--no-corrupt", "--limit", 1) == 0

def test_a_run_may_begin_with_a_trained_adapter(demo, finished, tmp_path):
    """At step 0 it is the trained one, to the bit, and when it goes on after a stop, not once more."""
    start = tmp_path / "start.pt"
    shutil.copy(finished[0] / "last.pt", start)
    model = train.build_model(settings(demo, "--init", start))
    assert same(gara.adapter_state(model), last(finished[0])["weights"])
    assert run_train(demo, tmp_path / "run", "--init", start, "--steps", 2) == 0
    assert log_of(tmp_path / "run", "validation")[0]["validation"] == last(finished[0])["meta"]["validation"]
    digest = train.hashlib.sha256(start.read_bytes()).hexdigest()
    start.unlink()
    trained = last(tmp_path / "run")["weights"]
    assert run_train(demo, tmp_path / "run", "--init", start, "--steps", 2, "--resume") == 0
    assert same(last(tmp_path / "run")["weights"], trained)
    content = json.load(open(tmp_path / "run" / "run.json"))
    assert content["settings"]["init"] == str(start)
    assert content["init_sha256"] == digest

@pytest.mark.parametrize("words, message", [
    ("--rank-low 3", "options"), ("--method lora", "method gara"), ("--image-size 64", "image_size 128"),
    ("--init vit_b.pt", "backbone vit_b"), ("--init other.pt", "other vit_t weights"),
    ("--init w.pth", "SAM checkpoint"), ("--init nothing.pt", "no adapter file"), ("--init cut.pt", "damaged"),
    ("--init model.pt", "not an adapter")])
def test_a_run_begins_with_no_other_adapter(demo, finished, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    content = gara.read_adapter(finished[0] / "gara.pt")
    torch.save(content, "good.pt")
    torch.save(content | dict(backbone="vit_b"), "vit_b.pt")
    torch.save(torch.nn.Linear(2, 2), "model.pt")
    torch.save(content | dict(base="another"), "other.pt")
    shutil.copy(demo / "w.pth", tmp_path)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:-999])
    before = everything(tmp_path)
    assert run_train(demo, "out", "--init", "good.pt", *words.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: --init: ")
    assert message in error
    assert not re.search("detach|weights_only|Weights only", error)
    assert everything(tmp_path) == before

def test_conditions_can_be_chosen(demo, tmp_path, monkeypatch):
    asked = []
    image = data.Sample.image
    monkeypatch.setattr(data.Sample, "image", lambda self, condition="clear", *more, **options: (
        asked.append(condition) or image(self, condition, *more, **options)))
    assert run_train(demo, tmp_path, "--steps", 2, "--method", "lora", "--conditions", "night", "snow@2") == 0
    assert set(asked) == {"night", "snow@2"}  # validation never sees another one either
    for line in log_of(tmp_path, "validation"):
        assert line["validation"].keys() == {"point degraded", "box degraded"}

def test_a_smaller_model_input_for_a_try(demo, tmp_path):
    """The adapter says at which size it was trained, and evaluation and sam.py take that size by themselves."""
    assert run_train(demo, tmp_path, "--steps", 1, "--image-size", 64) == 0
    adapter = tmp_path / "gara.pt"
    assert gara.read_adapter(adapter)["image_size"] == 64
    examples = train.examples_of(data.load_dataset(demo / "demo", "train"), settings(demo, "--image-size", 64), 1)
    assert examples[0]["targets"].shape[1:] == (32, 32)
    assert run_evaluate(demo, tmp_path / "results", "--ckpt", adapter, "--no-corrupt", "--limit", 1) == 0
    image = next((demo / "demo" / "test" / "clear").iterdir())
    assert run_cli(sam.main, image, "--box", "20,20,60,60", "--adapter", adapter, "--backbone", "vit_t", "--out",
                   tmp_path / "o.png", "--checkpoint", demo / "w.pth", "--device", "cpu") == 0

@pytest.mark.parametrize("method", ["lora", "gara"])
def test_one_image_can_be_learned(tmp_path, demo, method):
    data.make_demo(tmp_path / "demo", train=1, val=1, test=0)
    shutil.copy(demo / "w.pth", tmp_path)
    assert run_train(tmp_path, tmp_path / "run", "--steps", 20, "--method", method, "--no-corrupt", "--log-every", 1,
                     "--lr", 3e-3, "--val-every", 20) == 0
    losses = [line["loss"] for line in log_of(tmp_path / "run", "loss")]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])

def test_pretraining_writes_a_sam(demo, tmp_path):
    assert run_train(demo, tmp_path, "--pretrain", "--steps", 4) == 0
    assert run_train(demo, tmp_path, "--pretrain", "--steps", 4, "--resume") == 0
    model = sam.build_sam("vit_t", tmp_path / "sam_vit_t.pth")
    for p in model.parameters():
        assert p.isfinite().all()
    halves = 2 * sum(p.numel() for p in model.parameters())
    assert (tmp_path / "sam_vit_t.pth").stat().st_size < 1.1 * halves + 10**5

def test_the_whole_encoder_learns_with_method_full(demo, tmp_path):
    assert run_train(demo, tmp_path / "run", "--steps", 2, "--method", "full", "--lr", 1e-4) == 0
    weights, start = last(tmp_path / "run")["sam"], tiny_weights()
    moved = {key.split(".")[0] for key, value in weights.items() if not torch.equal(value, start[key])}
    assert moved == {"image_encoder"}
    full = tmp_path / "run" / "full.pt"
    assert sam.build_sam("vit_t", full).state_dict().keys() == weights.keys()
    assert run_evaluate(demo, tmp_path / "out", "--checkpoint", full, "--limit", 1) == 0

# Batches in parts, and on several processes.

def gradients(args, share):
    """What one update does to a LoRA with SGD of rate 1, that is: minus its gradient."""
    run = train.Run(args)
    run.optimizer = torch.optim.SGD(run.parameters, lr=1)
    before = [p.detach().clone() for p in run.parameters]
    run.update(share)
    return torch.cat([(b - p.detach()).flatten() for b, p in zip(before, run.parameters)])

def test_the_gradient_is_the_mean_over_masks_however_the_batch_is_cut(demo):
    examples = examples_of(data.load_dataset(demo / "demo", "train"), masks_per_image=2)
    batch = [examples[i] for i in range(5)]
    words = "--method", "lora", "--steps", 1, "--batch-size", 5, "--lr", 1
    whole = gradients(settings(demo, *words), batch)
    assert close(gradients(settings(demo, *words, "--accumulate", 3), batch), whole, 1e-4)
    assert close(gradients(settings(demo, *words, "--checkpointing"), batch), whole, 1e-4)
    shares = [gradients(settings(demo, *words), share) for share in (batch[::2], batch[1::2])]
    assert close(shares[0] + shares[1], whole, 1e-4)  # of two processes, before they are added

@pytest.fixture(scope="module")
def shared(demo):
    """The folders of a run on one process and of the same on two, and the text of the latter, which lists the threads
    that Gloo has left behind. LoRA, whose gates draw no noise; batches of 3, so shares of 2 and 1."""
    words = "--batch-size", 3, "--steps", 3, "--method", "lora", "--lr", 1e-3, "--val-images", 2
    assert run_train(demo, demo / "one", *words) == 0
    (demo / "two.py").write_text(f"""
import glob, sys
sys.path.insert(0, {os.path.dirname(train.__file__)!r})
import train
code = train.main(sys.argv[1:])
names = [open(path).read().strip() for path in glob.glob("/proc/self/task/*/comm")]
print("threads:", *(name for name in names if "gloo" in name))
sys.exit(code)
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", demo / "two.py",
               *training(demo, demo / "two", *words)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    return demo / "one", demo / "two", done.stdout

def test_two_processes_train_as_one(shared):
    """The same examples, and gradients up to rounding."""
    one, two = last(shared[0]), last(shared[1])
    for key, value in one["weights"].items():  # Adam makes whole steps of the rounding where the gradient is nearly 0
        assert (two["weights"][key] - value).norm() < 0.02 * value.norm(), key
    for key, value in one["meta"]["validation"].items():
        assert two["meta"]["validation"][key] == pytest.approx(value, abs=2e-3)
    assert shared[2].count("step 3/3") == 1  # one voice

def test_two_processes_validate_as_one(shared):
    """Before any step, to the last digit."""
    one, two = (log_of(folder, "validation")[0] for folder in shared[:2])
    assert one == two

@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="this system does not list threads")
def test_no_thread_of_a_process_group_outlives_it(shared):
    """One that lets go of a tensor when Python has ended aborts its process, and torchrun calls the run a failure."""
    lines = [line for line in shared[2].splitlines() if line.startswith("threads:")]
    assert lines == ["threads:"] * 2

# Datasets.

@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dataset_trains_and_is_measured(layout, demo, tmp_path, capsys):
    """One step and one evaluation on each miniature, then with pinned prompts, through the command lines."""
    expected = write_layout(layout, tmp_path / "set")
    root = f"{layout.split('-')[0]}={tmp_path / 'set'}"
    prompts, out = tmp_path / "p.json", tmp_path / "run"
    assert run_train(demo, out, "--data", root, "--steps", 1) == 0
    run_cli(data.main, root, "--split", "val", "--export-prompts", prompts)
    scores = []
    for pinned in ([], ["--prompts", prompts]):
        assert run_evaluate(demo, out, "--data", root, "--split", "val", "--no-corrupt", *pinned) == 0
        images = json.load(open(out / "results.json"))["images"]
        assert {row["name"]: set(row["indices"]) for row in images} == {
            name: set(masks) for name, masks in expected.items()}
        scores.append([row["scores"] for row in images])
    assert scores[0] == scores[1]
    assert "Traceback" not in capsys.readouterr().err

def test_several_datasets_are_trained_on_and_measured_one_by_one_and_as_one(demo, tmp_path, capsys):
    roots = tmp_path / "a", tmp_path / "b"
    write_layout("ndd20", roots[0])
    write_layout("bdd100k", roots[1])
    assert run_train(demo, tmp_path / "run", "--data", *roots, "--steps", 1, "--no-corrupt") == 0
    sets = json.load(open(tmp_path / "run" / "run.json"))["data"]
    assert [part["kind"] for part in sets] == ["ndd20", "bdd100k"] * 2
    capsys.readouterr()
    assert run_evaluate(demo, tmp_path, "--data", *roots, "--split", "val", "--no-corrupt") == 0
    results = json.load(open(tmp_path / "results.json"))
    means = [part["means"]["SAM"]["box clear"][0] for part in results["by_data"].values()]
    counts = Counter()
    for row in results["images"]:
        counts[row["data"]] += len(row["indices"])
    union = results["means"]["SAM"]["box clear"][0]
    assert union == pytest.approx(np.average(means, weights=[counts[str(root)] for root in roots]))
    assert len(re.findall(r"^\| \S+ \| SAM \|", capsys.readouterr().out, re.M)) == 3

def test_missing_demo_is_made(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "make_demo", lambda root: shutil.copytree(demo / "demo", root))
    shutil.copy(demo / "w.pth", tmp_path)
    assert run_train(tmp_path, tmp_path / "run", "--steps", 1) == 0
    shutil.rmtree(tmp_path / "demo")
    assert run_evaluate(tmp_path, tmp_path / "out", "--no-corrupt", "--limit", 1) == 0

# Mistakes.

@pytest.mark.parametrize("words, message", [
    ("--what", "--what"),
    ("--data nowhere", "nowhere"),
    ("--data bare", "val"),
    ("--steps 0", "--steps"),
    ("--epochs 2", "--epochs"),  # beside --steps
    ("--lr nan", "--lr"),
    ("--lr inf", "--lr"),
    ("--workers -1", "--workers"),
    ("--clear 1.5", "--clear"),
    ("--device nonsense", "--device"),
    ("--device cuda:99", "--device"),
    ("--checkpoint cut.pth", "cut.pth"),
    ("--checkpoint a.pt", "a.pt"),
    ("--checkpoint none.pth", "none.pth"),
    ("--backbone vit_b", "vit_t"),
    ("--out w.pth", "w.pth"),
    ("--resume", "--resume"),
    ("--rank-low 0", "--rank-low"),
    ("--temperature 0", "--temperature"),
    ("--scope tile", "window"),
    ("--method moe_lora --experts 1,x", "--experts"),
    ("--rank 4", "its options: --rank-low, --rank-high, --temperature, --scope"),
    ("--method lora --scope window", "its options: --rank"),
    ("--method full --rank 4", "its options: none"),
    ("--pretrain --method lora", "--method"),
    ("--seed 18446744073709551616", "--seed"),
    ("--conditions fgo", "fgo"),
    ("--conditions fog --no-corrupt", "--no-corrupt"),
    ("--conditions fog --pretrain", "--pretrain"),
    ("--prompts p.json --pretrain", "--prompts"),
    ("--batch-size 1 --masks-per-image 1 --pretrain", "two objects"),
    ("--image-size 60", "multiple of 8"),
    ("--image-size 64 --method full", "own size"),
    ("--init a.pt --method full", "--checkpoint"),
    ("--init a.pt --pretrain", "--checkpoint")])
def test_mistakes_of_train_end_in_one_line(mistakes, capsys, words, message):
    train_refuses(mistakes, "out", capsys, message, *words.split())

def test_a_batch_too_small_for_all_processes(demo, monkeypatch, capsys):
    monkeypatch.setattr(train, "WORLD_SIZE", 3)
    train_refuses(demo, "out", capsys, "--batch-size 2")

# ---- Evaluation -----------------------------------------------------------------------------------------------------

sys.path.insert(0, os.path.join(HERE, "assets"))
import study

SOME = ("clear", "ISO_noise", "elastic_transform")
SAM_ONLY = {"SAM": ("sam", {})}
LORAS = {f"LoRA {rank}": ("lora", dict(rank=rank)) for rank in (4, 16, 48)}
STRONGER = (*data.CONDITIONS, *(f"{name}@{x}" for name in data.CONDITIONS[1:] for x in (0.5, 2)))

def gara_of(temperature):
    return "gara", dict(rank_low=3, rank_high=10, scope="image", temperature=temperature)

def made_up_results(models, conditions=data.CONDITIONS, images=4, layers=2, seed=0, windows=1):
    """results.json's content from random numbers; ranks 3 and 10, so that gates do not fill their last byte."""
    rng = np.random.default_rng(seed)
    results = dict(format=evaluate.FORMAT, data=["demo/"], split="test", backbone="vit_t", average="masks",
                   conditions=list(conditions), models={}, images=[])
    for name, (method, options) in models.items():
        results["models"][name] = dict(file=None, method=method, options=options, learnable_parameters=0)
    for k in range(images):
        masks = 1 + k % 3
        scores, gates = {}, {}
        for name, (method, _) in models.items():
            scores[name], gates[name] = {}, {}
            for condition in conditions:
                scores[name][condition] = {prompt: rng.random((masks, 3)).tolist() for prompt in evaluate.PROMPTS}
                codes = np.packbits(rng.random((layers, windows, 13)) < 0.5, axis=2)
                spaces = rng.integers(2, size=(layers, windows)).tolist()
                gates[name][condition] = []
                for space, code in zip(spaces, codes):
                    decisions = [(s, c.tobytes().hex()) for s, c in zip(space, code)]
                    gates[name][condition].append(decisions)
            if method != "gara":
                del gates[name]
        results["images"].append(dict(data="demo/", at=k, name=f"{k}", size=[9, 9], indices=list(range(masks)),
                                      areas=[9] * masks, scores=scores, gates=gates))
    return evaluate.add_summaries(results)

# Scores, means and intervals.

def test_scores_against_loops():
    rng = np.random.default_rng(0)
    a, b = (rng.random((8, 7, 5)) < share for share in (0.3, 0.6))
    a[4] = b[5] = False
    a[6] = b[6]
    a[7] = b[7] = False
    scores = evaluate.mask_scores(torch.tensor(a), b)
    for k in range(6):
        pairs = list(zip(a[k].ravel().tolist(), b[k].ravel().tolist()))
        both = sum(p and t for p, t in pairs)
        either = sum(p or t for p, t in pairs)
        right = sum(p == t for p, t in pairs)
        assert scores[k] == pytest.approx([both / either, 2 * both / (both + either), right / 35], abs=1e-12)
    assert scores[4:6, :2].tolist() == [[0, 0], [0, 0]]  # nothing found, nothing there
    assert scores[6:].tolist() == [[1, 1, 1], [1, 1, 1]]  # equal, both empty

def test_degraded_is_every_corruption_at_the_benchmarks_own_strength():
    assert data.degraded_conditions(["clear", "fog", "night", "fog@2"]) == ["fog", "night"]
    assert data.degraded_conditions(data.CONDITIONS) == list(CORRUPTIONS)
    assert data.degraded_conditions(["clear"]) == []

class Oracle:
    """Stands in for a SAM: knows the mask that each prompt was drawn from, and predicts predict(mask)."""
    device, mask_threshold = torch.device("cpu"), 0.0

    def __init__(self, dataset, predict):
        self.image_encoder, self.known, resize = self.Encoder(), {}, sam.ResizeLongestSide(128)
        for sample in dataset:
            masks = sample.masks()
            points, boxes = sample.prompts(masks)
            size = masks.shape[1:]
            for prompts in (resize.apply_coords(points, size), resize.apply_boxes(boxes, size)):
                for prompt, mask in zip(prompts, masks):
                    self.known[prompt.tobytes()] = predict(mask)

    class Encoder:
        img_size = 128

        def __call__(self, x):
            return x

    def preprocess(self, x):
        return x

    def decode(self, embeddings, points=None, boxes=None, image_index=None):
        prompts = boxes if points is None else points[0]
        masks = [self.known[prompt.numpy().tobytes()] for prompt in prompts]
        return torch.tensor(np.stack(masks))[:, None], None

    def postprocess_masks(self, masks, input_size, original_size):
        return masks.float() - 0.5

def every_second_column(mask):
    return mask & (np.arange(mask.shape[1]) % 2 == 0)

def test_scores_of_predictions_that_are_known(demo):
    """Right, empty and half predictions; half: every second column of the truth."""
    dataset = data.load_dataset(demo / "demo", "test")
    conditions = ("clear", "fog", "contrast")
    models = dict(
        right=Oracle(dataset, lambda mask: mask),
        empty=Oracle(dataset, lambda mask: mask & False),
        half=Oracle(dataset, every_second_column))
    images = evaluate.evaluate(models, dataset, conditions, batch_size=2)
    for image, sample in zip(images, dataset, strict=True):
        assert image["name"] == sample.name
        expected = dict(right=[], empty=[], half=[])
        for mask in sample.masks():
            area = mask.mean()
            share = every_second_column(mask).sum() / mask.sum()
            expected["right"].append([1, 1, 1])
            expected["empty"].append([0, 0, 1 - area])
            expected["half"].append([share, 2 * share / (1 + share), 1 - area * (1 - share)])
        for name, condition, prompt in itertools.product(models, conditions, evaluate.PROMPTS):
            scores = image["scores"][name][condition][prompt]
            assert np.allclose(scores, expected[name], atol=1e-6)

def test_means_are_over_masks_or_over_images():
    """Three masks on one image and one on another: the first image weighs three times as much."""
    first, second = {}, {}
    for k, condition in enumerate(data.CONDITIONS):
        first[condition] = dict(point=3 * [[0.1 * k, 0.5, 0]], box=3 * [[0, 1, 0]])
        second[condition] = dict(point=[[1, 0.7, 1]], box=[[1, 0.2, 1]])
    images = [dict(indices=[1, 2, 3], scores=dict(A=first)),
              dict(indices=[1], scores=dict(A=second))]

    def means(column, average):
        found = evaluate.summarize(images, ["A"], data.CONDITIONS, average)
        return pytest.approx(found["means"]["A"][column])

    assert [0.25, 0.55, 0.25] == means("point clear", "masks")
    assert [0.25, 0.8, 0.25] == means("box fog", "masks")
    assert [0.325, 0.55, 0.25] == means("point snow", "masks")  # condition 1 of 15
    assert [0.25 + 0.075 * 8, 0.55, 0.25] == means("point degraded", "masks")  # mean of 1 to 15
    assert [0.5, 0.6, 0.5] == means("point clear", "images")
    assert [0.55, 0.6, 0.5] == means("point snow", "images")

def test_intervals_are_those_of_the_normal_distribution_when_images_are_many():
    """The ratio of sums, by the delta method: its variance is that of (score sum - mean x masks) / mean masks."""
    found = made_up_results({name: ("sam", {}) for name in "AB"}, ("clear", "fog", "fog@2"), images=400)
    masks = np.array([len(image["indices"]) for image in found["images"]])

    def residuals(model):
        sums = []
        for image in found["images"]:
            scores = np.array(image["scores"][model]["fog@2"]["box"])
            sums.append(scores[:, 2].sum())
        mean = np.sum(sums) / masks.sum()
        return mean, (sums - mean * masks) / masks.mean()

    (a, first), (b, second) = map(residuals, "AB")
    low, high = found["intervals"]["A"]["box fog@2"][2]
    assert found["means"]["A"]["box fog@2"][2] == pytest.approx(a)
    assert high - low == pytest.approx(2 * 1.96 * first.std() / 20, rel=0.1)
    assert (low + high) / 2 == pytest.approx(a, abs=0.005)
    mean, low, high = evaluate.difference(found, "B", "A", "box fog@2", 2)
    assert mean == pytest.approx(b - a)
    assert high - low == pytest.approx(2 * 1.96 * (second - first).std() / 20, rel=0.1)
    assert evaluate.difference(found, "A", "B", "box fog@2", 2) == (-mean, -high, -low)

def test_the_mean_degraded_is_of_the_benchmarks_own_strength_and_draws_are_the_same_each_time():
    found = made_up_results(SAM_ONLY, ("clear", "fog", "fog@2"))
    means = found["means"]["SAM"]
    assert means["point degraded"] == pytest.approx(means["point fog"])
    again = evaluate.summarize(found["images"], ["SAM"], ("clear", "fog", "fog@2"))
    assert again["intervals"] == found["intervals"]

def test_paired_differences_know_less_noise_and_one_image_knows_nothing():
    images = made_up_results({"A": ("sam", {})}, ("clear",), images=30)["images"]
    for image in images:  # B is better by 0.01 in every mask
        better = {}
        for prompt, scores in image["scores"]["A"]["clear"].items():
            better[prompt] = np.add(scores, [0.01, 0, 0])
        image["scores"]["B"] = {"clear": better}
    found = evaluate.summarize(images, ["A", "B"], ("clear",))
    low, high = found["intervals"]["A"]["point clear"][0]
    assert high - low > 0.1
    differences = found["differences"]["B"]["A"]
    assert differences["point clear"][0] == pytest.approx([0.01] * 3)
    assert differences["box clear"][1] == pytest.approx([0, 0, 0], abs=1e-12)
    alone = evaluate.summarize(images[:1], ["A", "B"], ("clear",))
    assert alone["intervals"]["A"]["point clear"] == [[0, 1]] * 3
    assert alone["differences"]["B"]["A"]["point clear"][0][1:] == [-1, 1]
    assert evaluate.difference_text(0, 1e-16, 2e-16).startswith("(")  # equal but for rounding
    assert evaluate.difference_text(0.01, 1e-4, 0.02) == "+1.0 [0.0, 2.0]"

# Gates in results.json.

@pytest.mark.parametrize("windows", (1, 4))
def test_gates_are_unpacked_as_they_were_packed(windows):
    results = made_up_results({"GaRA": gara_of(0.5)}, images=5, layers=3, windows=windows)
    layers = figures.unpack_gates(results, "GaRA", "fog")
    counts = figures.open_components(results, "GaRA")
    assert counts.shape == (16, 5, 3)
    for image, layer in itertools.product(range(5), range(3)):
        vectors, spaces = layers[layer]
        opened = []
        for window, (space, code) in enumerate(results["images"][image]["gates"]["GaRA"]["fog"][layer]):
            bits = "".join(f"{int(digit, 16):04b}" for digit in code)
            opened.append(bits.count("1"))
            assert spaces[image, window] == space
            assert "".join(map(str, vectors[image, window].astype(int))) == bits[:13]
        assert counts[data.CONDITIONS.index("fog"), image, layer] == np.mean(opened)

def test_gates_of_windows_are_recorded_like_those_of_images(demo):
    sample = data.load_dataset(demo / "demo", "test")[0]
    model = tiny("gara", scope="window")
    prediction = next(evaluate.predictions(model, [sample.image()], *sample.prompts()))
    assert len(prediction["gates"][0]) > 1
    for packed, layer in zip(prediction["gates"], gara.gates(model), strict=True):
        vectors = layer["vector"].reshape(len(packed), -1).numpy()
        spaces = layer["space"].flatten().tolist()
        for decision, space, vector in zip(packed, spaces, vectors, strict=True):
            assert decision == (space, np.packbits(vector).tobytes().hex())

def test_f_against_its_definition():
    counts = np.random.default_rng(0).integers(0, 20, (4, 6, 3)) + np.arange(4)[:, None, None]
    counts[:, :, 2] = np.arange(4)[:, None]  # nothing but the condition
    f = figures.f_statistic(counts)
    for layer in range(2):
        values = counts[:, :, layer].tolist()
        grand = sum(map(sum, values)) / 24
        between = sum(6 * (sum(group) / 6 - grand) ** 2 for group in values) / 3
        within = 0
        for group in values:
            within += sum((value - sum(group) / 6) ** 2 for value in group) / 20
        assert f[layer] == pytest.approx(between / within)
    assert f[2] == np.inf
    assert figures.f_statistic(np.full((4, 6, 1), 7.0)).tolist() == [0]

def test_p_is_least_with_a_dependence_and_uniform_without_one():
    rng = np.random.default_rng(0)
    counts = rng.normal(size=(8, 12, 60))
    counts += 10 * rng.normal(size=(12, 60))  # images differ: that is no dependence on the condition
    counts[:, :, 0] += 40 * np.arange(8)[:, None]
    counts[:, :, 1] = 5
    p = figures.permutation_test(counts, 400)
    assert p[0] == 1 / 401
    assert p[1] == 1
    assert 0.4 < p[2:].mean() < 0.6
    assert (p[2:] < 0.05).mean() < 0.15
    assert np.array_equal(p, figures.permutation_test(counts, 400))  # the same draws each time

def test_table_of_open_components():
    results = made_up_results({"GaRA": gara_of(0.5)}, ("clear", "fog"), images=2, layers=1)
    codes = iter(["0000", "8000", "c000", "fff8"])  # 0, 1, 2 and 13 components
    for image in results["images"]:
        image["gates"]["GaRA"] = {condition: [[[1, next(codes)]]] for condition in ("clear", "fog")}
    assert "| GaRA | 4.0 ± 5.2 | 0-13 |" in evaluate.open_components_table(results)

# Measuring.

def flat_scores(images):
    """All scores, (many, 3), images in the order of their names."""
    flat = []
    for image in sorted(images, key=lambda image: image["name"]):
        for conditions in image["scores"].values():
            for prompts in conditions.values():
                flat += [scores for masks in prompts.values() for scores in masks]
    return np.array(flat)

def test_scores_do_not_depend_on_how_they_are_computed(demo):
    dataset = data.load_dataset(demo / "demo", "test")

    def scores(samples=dataset.samples, **options):
        part = data.Dataset(dataset.root, "test", dataset.kind, samples)
        return flat_scores(evaluate.evaluate({"SAM": tiny()}, part, SOME, **options))

    usual = scores()
    count = [len(rows) for rows in (scores(todo=[0]), scores(todo=[1]))]
    second = usual[count[0]:sum(count)]
    assert 0 < usual.mean() < 1
    assert np.array_equal(scores(dataset.samples[::-1], workers=1), usual)
    assert np.array_equal(scores(dataset.samples[1:2]), second)
    assert np.array_equal(scores(todo=[1]), second)
    for batch_size in (1, 2):  # float sums may turn over a pixel on the outline
        assert np.allclose(scores(batch_size=batch_size), usual, atol=5e-3)

def test_evaluator_and_predictor_give_the_same_masks(demo, monkeypatch):
    monkeypatch.setattr(evaluate, "DECODED_AT_ONCE", 5)  # prompts of several conditions in one call, and torn apart
    sample, model = data.load_dataset(demo / "demo", "test")[0], tiny("gara")
    masks, images = sample.masks(), [sample.image(condition) for condition in SOME]
    points, boxes = sample.prompts(masks)
    predictor = sam.SamPredictor(model)
    predicted = list(evaluate.predictions(model, images, points, boxes, 2, "off"))
    for image, prediction in zip(images, predicted, strict=True):
        predictor.set_image(image)
        assert prediction["box"].shape == masks.shape
        for k in range(len(masks)):
            by_points, *_ = predictor.predict(points[k], [1, 1, 1], multimask_output=False)
            by_box, *_ = predictor.predict(box=boxes[k], multimask_output=False)
            assert (prediction["point"][k].numpy() == by_points[0]).mean() > 0.999
            assert (prediction["box"][k].numpy() == by_box[0]).mean() > 0.999
    assert (predicted[0]["box"] != predicted[1]["box"]).any()  # conditions do differ

def test_adapters_share_the_frozen_weights(demo, tmp_path):
    trained = {"GaRA": tiny("gara"), "LoRA 4": tiny("lora")}
    for model in trained.values():
        gara.save_adapter(model, tmp_path / f"{model.adapter['method']}.pt")
    files = [str(tmp_path / "gara.pt"), "sam", str(tmp_path / "lora.pt")]
    models, about, backbone = evaluate.load_models(files, None, str(demo / "w.pth"), torch.device("cpu"))
    assert list(models) == list(about) == ["SAM", "GaRA", "LoRA 4"]
    assert backbone == "vit_t"
    plain, x = dict(models["SAM"].state_dict()), pictures(0, 1)
    for name in trained:
        state = models[name].state_dict()
        assert all(state[key].data_ptr() == value.data_ptr() for key, value in plain.items())
        assert torch.equal(encode(models[name], x), encode(trained[name], x))
        assert not models[name].training
    assert torch.equal(encode(models["SAM"], x), encode(tiny(), x))
    assert not gara.adapters(models["SAM"])

# The command line.

def run_evaluate(demo, out, *more):
    usual = "--device cpu --workers 0".split()
    return run_cli(evaluate.main, "--data", demo / "demo", "--checkpoint", demo / "w.pth", "--out", out, *usual, *more)

def stored(folder):
    return evaluate.read_results(os.path.join(folder, "results.json"))

def files_in(folder):
    """Names, but for those of hidden files."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))

@pytest.fixture(scope="module")
def evaluated(demo, finished):
    """(folder, results.json, printed text) of an evaluation of SAM and GaRA in all conditions."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert run_evaluate(demo, demo / "evaluated", "--ckpt", finished[0] / "last.pt") == 0
    return demo / "evaluated", stored(demo / "evaluated"), text.getvalue()

def test_evaluation_records_scores(demo, evaluated):
    folder, results, _ = evaluated
    assert files_in(folder) == ["corruptions.png", "dependence_GaRA.png", "gates_GaRA.png", "open_GaRA.png",
                                "results.csv", "results.json", "samples.png"]
    assert list(results["means"]) == ["SAM", "GaRA"]
    assert tuple(results["conditions"]) == data.CONDITIONS
    assert results["skipped"] == []
    for image, sample in zip(results["images"], data.load_dataset(demo / "demo", "test"), strict=True):
        assert image["name"] == sample.name
        assert image["areas"] == sample.masks().sum((1, 2)).tolist()
        assert tuple(image["indices"]) == sample.indices

def test_tables_show_the_means(evaluated):
    _, results, text = evaluated
    rows = {line.split(" | ")[0]: line for line in reversed(text.splitlines())}  # of equal ones the first
    for model, means in results["means"].items():
        expected = []
        for column in ("point degraded", "point clear", "box degraded", "box clear"):
            expected += means[column]
        cells = rows[f"| {model}"].split("|")[2:-1]
        printed = [float(cell.strip(" *").split()[0]) for cell in cells]
        assert printed == pytest.approx(100 * np.array(expected), abs=0.051)

def test_the_csv_holds_every_mean(evaluated):
    folder, results, _ = evaluated
    head, *lines = [line.split(",") for line in open(folder / "results.csv").read().splitlines()]
    assert head == "data model prompt condition metric mean low high".split()
    assert len(lines) == 2 * 2 * 17 * 3
    for _, model, prompt, condition, metric, mean, low, high in lines:
        expected = results["means"][model][f"{prompt} {condition}"][evaluate.METRICS.index(metric)]
        assert float(mean) == pytest.approx(expected, abs=1e-6)
        assert float(low) <= float(mean) <= float(high)

def test_plain_sam_is_measured_alone(demo, tmp_path, capsys):
    assert run_evaluate(demo, tmp_path, "--ckpt", "sam", "--no-corrupt", "--limit", 2) == 0
    results = stored(tmp_path)
    assert results["means"].keys() == {"SAM"}
    assert results["means"]["SAM"].keys() == {"point clear", "box clear"}
    assert len(results["images"]) == 2
    assert "degraded" not in capsys.readouterr().out

def test_whole_models_beside_adapters_in_chosen_conditions(demo, finished, tmp_path):
    changed = torch.load(demo / "w.pth", weights_only=True)
    changed["image_encoder.blocks.0.attn.qkv.bias"] += 0.5
    torch.save(changed, tmp_path / "full.pt")
    files = tmp_path / "full.pt", demo / "w.pth", finished[0] / "gara.pt"
    asked = "--conditions", "underwater", "clear", "--strengths", 0.5
    assert run_evaluate(demo, tmp_path, "--ckpt", *files, *asked) == 0
    results = stored(tmp_path)
    assert results["conditions"] == ["underwater", "clear", "underwater@0.5"]
    plain, adapted, full, same_plain = results["models"]
    means = results["means"]
    assert adapted == "GaRA"
    assert means[plain] == means[same_plain]
    assert means[plain] != means[full]
    assert means[plain]["point degraded"] == means[plain]["point underwater"]

def test_names_need_not_be_utf_8(demo, finished, tmp_path):
    folder = tmp_path / os.fsdecode(b"d\xff\n")
    shutil.copytree(demo / "demo", folder / "demo")
    shutil.copy(demo / "w.pth", folder)
    next((folder / "demo" / "test" / "clear").iterdir()).write_bytes(b"")
    for name in "ab":
        shutil.copy(finished[0] / "gara.pt", folder / f"{name}.pt")
    files = folder / "a.pt", folder / "b.pt"
    assert run_evaluate(folder, folder / "out", "--ckpt", *files, "--conditions", "clear", "fog") == 0
    results = stored(folder / "out")
    assert results["data"] == [str(folder / "demo")]
    assert run_cli(evaluate.main, "--from", folder / "out" / "results.json", "--out", folder / "again") == 0
    assert set(files_in(folder / "out")) - set(files_in(folder / "again")) == {"results.json", "samples.png"}

# What one bad image, or one bad process, may not do.

@pytest.fixture
def copied_test(demo, tmp_path, monkeypatch):
    """The working folder: a copy of demo/ to spoil, and its test images."""
    shutil.copytree(demo / "demo", tmp_path / "demo")
    shutil.copy(demo / "w.pth", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path, sorted((tmp_path / "demo" / "test" / "clear").iterdir())

def spoil(monkeypatch, function, path, action):
    """Have a function of data.py do something else with one image."""
    usual = getattr(data, function)
    monkeypatch.setattr(data, function, lambda first, *more: (action if first == str(path) else usual)(first, *more))

def fails(*_):
    raise RuntimeError("two\nlines")

@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("function", ["read_image", "read_planes"])
def test_whatever_an_image_raises_is_its_own_error(copied_test, monkeypatch, capsys, function, workers):
    folder, images = copied_test
    masks = images[1].parents[1] / "masks" / f"{images[1].stem}.npy"
    spoil(monkeypatch, function, images[1] if function == "read_image" else masks, fails)
    assert run_evaluate(folder, "out", "--no-corrupt", "--workers", workers) == 0
    assert capsys.readouterr().err.count("skipped: ") == 1
    results = stored("out")
    assert len(results["images"]) == 2
    assert [images[1].stem in line for line in results["skipped"]] == [True]
    assert run_evaluate(folder, "strict", "--no-corrupt", "--workers", workers, "--strict") == 2
    assert one_error(capsys, images[1].stem)

def test_a_worker_that_dies_ends_the_evaluation_in_one_line(copied_test, monkeypatch, capsys):
    folder, images = copied_test
    spoil(monkeypatch, "read_image", images[1], lambda *_: os._exit(7))
    assert run_evaluate(folder, "out", "--no-corrupt", "--workers", 1) == 2
    assert one_error(capsys, "worker")
    assert not multiprocessing.active_children()

def test_an_image_of_ten_pixels_is_measured_or_named(copied_test):
    folder, images = copied_test
    Image.fromarray(scene(10, 300)).save(images[0])
    np.save(images[0].parents[1] / "masks" / f"{images[0].stem}.npy", np.ones((1, 10, 300), bool))
    assert run_evaluate(folder, "out", "--conditions", "clear", "fog", "--workers", 1) == 0
    results = stored("out")
    assert len(results["images"]) + len(results["skipped"]) == 3

def test_who_waits_for_a_process_that_has_ended_says_so(monkeypatch):
    monkeypatch.setattr(evaluate.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(evaluate.dist, "barrier", fails)
    with refused("another process", kind=RuntimeError):
        evaluate.wait_for_all()

@pytest.mark.parametrize("arguments", [["--data", "demo", "--no-corrupt"], ["--from", "good.json"]])
def test_only_one_program_writes_into_a_folder(copied_test, capsys, arguments):
    folder, _ = copied_test
    (folder / "good.json").write_text(json.dumps(made_up_results(SAM_ONLY, ("clear",))))
    program = "import data, sys\nwith data.alone_in('out'): print(flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             env=os.environ | dict(PYTHONPATH=HERE))
    other.stdout.readline()
    usual = "--checkpoint", "w.pth", "--device", "cpu", "--workers", 0, "--out", "out"
    assert run_cli(evaluate.main, *arguments, *usual) == 2
    assert one_error(capsys, "out: another program")
    other.kill()
    other.communicate()
    assert run_cli(evaluate.main, *arguments, *usual) == 0

PREDICTORS = """
import data, numpy as np, torch

def known(predict):
    class Known:
        def set_image(self, image):
            self.image = image
        def predict(self, point_coords=None, point_labels=None, box=None, mask_input=None, multimask_output=True):
            assert not multimask_output
            assert (point_labels is None) == (point_coords is None) == (box is not None)
            return predict(self.image, point_coords, box), None, None
    return Known

KNOWN = {}
for sample in data.load_dataset("demo", "test"):
    for mask, points, box in zip(sample.masks(), *sample.prompts()):
        KNOWN[points.tobytes()] = KNOWN[box.tobytes()] = mask
truth = known(lambda image, points, box: KNOWN[(box if points is None else points).tobytes()][None])
nonsense = known(lambda image, points, box: np.zeros((1, *image.shape[:2]), bool))()
small = known(lambda image, points, box: np.zeros((1, 9, 9), bool))
broken, number = (lambda: 1 / 0), 7
"""

@pytest.fixture
def mistakes(demo, tmp_path, monkeypatch):
    """The working folder: a dataset without val and test, good weights, cut ones, an adapter of others, predictors."""
    shutil.copytree(demo / "demo", tmp_path / "demo")
    shutil.copytree(demo / "demo" / "train", tmp_path / "bare" / "train")
    (tmp_path / "cut.pth").write_bytes((demo / "w.pth").read_bytes()[:-5000])
    shutil.copy(demo / "w.pth", tmp_path)
    gara.save_adapter(gara.attach(sam.build_sam("vit_t"), "lora"), tmp_path / "a.pt")
    (tmp_path / "mine.py").write_text(PREDICTORS)
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "old.json").write_text('{"format": "gara-sam results 1"}')
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.mark.parametrize("arguments, words", [
    (["--data", "nowhere"], "nowhere"),
    (["--data", "bare"], "test"),
    (["--split", "tset"], "tset"),
    (["--ckpt", "a.pt"], "other vit_t weights"),
    (["--ckpt", "none.pt"], "none.pt"),
    (["--ckpt", "cut.pth"], "cut.pth"),
    (["--ckpt", "a.pt", "--backbone", "vit_b"], "vit_b"),
    (["--checkpoint", "cut.pth"], "cut.pth"),
    (["--checkpoint", "none.pth"], "none.pth"),
    (["--limit", 0], "--limit"),
    (["--batch-size", 0], "--batch-size"),
    (["--workers", -1], "--workers"),
    (["--device", "nonsense"], "nonsense"),
    (["--out", "w.pth"], "w.pth"),
    (["--paper", "imagenet"], "lvis"),
    (["--prompts", "w.pth"], "w.pth"),
    (["--strengths", "-1"], "--strengths"),
    (["--strengths", 2, "--no-corrupt"], "--no-corrupt"),
    (["--conditions", "night", "--no-corrupt"], "--no-corrupt"),
    (["--conditions", "x"], "'x'"),
    (["--costs"], "--costs"),
    (["--data", "demo", "./demo/"], "twice"),
    (["--predictor", "none.py:x"], "none.py"),
    (["--predictor", "w.pth:x"], "FILE.py:NAME"),
    (["--predictor", "mine.py:broken"], "ZeroDivisionError"),
    (["--predictor", "mine.py:number"], "TypeError"),
    (["--predictor", "mine.py:missing"], "missing"),
    (["--from", "results.json"], "--data"),
    (["--data", "--from", "text.json"], "expected"),
])
def test_mistakes_of_evaluate_end_in_one_line(mistakes, capsys, arguments, words):
    before = everything(mistakes)
    assert run_evaluate(mistakes, "out", *arguments) == 2
    assert one_error(capsys, words)
    before.update({path: size for path, size in everything(mistakes).items() if "__pycache__" in str(path)})
    assert everything(mistakes) == before

def test_other_predictors_by_plug(mistakes, capsys):
    """One that knows the truth scores 1, one that finds nothing 0, whatever the condition."""
    assert run_evaluate(mistakes, "out", "--predictor", "mine.py:truth", "mine.py:nonsense") == 0
    results, text = evaluate.read_results("out/results.json"), capsys.readouterr().out
    assert list(results["means"]) == ["SAM", "truth", "nonsense"]
    for column, scores in results["means"]["truth"].items():
        assert scores == [1, 1, 1]
        assert results["intervals"]["truth"][column][0] == [1, 1]
        assert results["means"]["nonsense"][column][:2] == [0, 0]
    assert re.search(r"^\| truth - SAM \| \+\d", text, re.M)
    assert re.search(r"^\| truth - nonsense \| \+100.0 \[", text, re.M)
    assert text.count("**100.0 ±0.0**") == 12
    assert run_evaluate(mistakes, "bad", "--predictor", "mine.py:small", "--limit", 1) == 2
    assert one_error(capsys, "--predictor", "(1, 9, 9)")

# Interrupted evaluations.

def interrupt_evaluate(monkeypatch, folder, rows, *more):
    """Evaluate clear images until so many rows are there: the file that holds them."""
    measure = evaluate.evaluate

    def interrupted(*arguments):
        yield from itertools.islice(measure(*arguments), rows)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate", interrupted)
        assert run_evaluate(folder, folder / "out", "--no-corrupt", *more) == 130
    (unfinished,) = folder.glob("out/unfinished-*")
    return unfinished

def test_an_interrupted_evaluation_goes_on_with_two_processes(copied_test, monkeypatch):
    folder, _ = copied_test
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run_evaluate(folder, "whole", "--no-corrupt") == 0
    torch.set_num_threads(threads)
    unfinished = interrupt_evaluate(monkeypatch, folder, 1)
    mark, row = json.loads(unfinished.read_text())
    row["scores"]["SAM"]["clear"]["box"][0][0] = 0.5  # a sign: what was measured is not measured again
    line = json.dumps([mark, row])
    unfinished.write_text(line + "\n" + line[:77])  # the second is cut short
    command = [evaluate.__file__, "--data", folder / "demo", "--checkpoint", folder / "w.pth", "--out", folder / "out",
               "--device", "cpu", "--workers", "0", "--no-corrupt"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1 of 3" in done.stderr
    assert done.stdout.count("| SAM |") == 1  # one voice
    first, *others = stored("out")["images"]
    assert first["scores"]["SAM"]["clear"]["box"][0][0] == 0.5
    assert others == stored("whole")["images"][1:]
    assert not list(folder.glob("out/unfinished-*"))

def exchange(folder, images):
    Image.open(images[0]).rotate(180).save(images[0])

def exchange_masks(folder, images):
    path = images[0].parents[1] / "masks" / f"{images[0].stem}.npy"
    np.save(path, np.load(path)[:, ::-1])

def train_again(folder, images):
    gara.save_adapter(tiny("lora", rank=3), folder / "a.pt")

@pytest.mark.parametrize("change, more, kept", [
    (None, [], ["2"]),
    (exchange, [], ["1"]),
    (exchange_masks, [], ["1"]),
    (train_again, ["--ckpt", "a.pt"], []),
    (None, ["--limit", 2], []),
    (None, ["--batch-size", 2], []),
    (None, ["--predictor", "mine.py:nonsense"], [])])
def test_only_what_was_measured_on_the_same_is_taken_over(copied_test, monkeypatch, capsys, change, more, kept):
    folder, images = copied_test
    gara.save_adapter(tiny("lora"), folder / "a.pt")
    (folder / "mine.py").write_text(PREDICTORS)
    interrupt_evaluate(monkeypatch, folder, 2, *(more if change else ()))
    if change:
        change(folder, images)
    capsys.readouterr()
    assert run_evaluate(folder, "out", "--no-corrupt", *more) == 0
    assert re.findall(r"(\d) of 3 pictures", capsys.readouterr().err) == kept

def test_an_image_that_was_repaired_is_measured_after_all(copied_test, monkeypatch):
    folder, images = copied_test
    content, state = images[0].read_bytes(), os.stat(images[0])
    images[0].write_bytes(bytes(len(content)))
    os.utime(images[0], ns=(0, state.st_mtime_ns))
    interrupt_evaluate(monkeypatch, folder, 2)
    images[0].write_bytes(content)
    os.utime(images[0], ns=(0, state.st_mtime_ns))
    assert run_evaluate(folder, "out", "--no-corrupt") == 0
    assert len(stored("out")["images"]) == 3
    assert stored("out")["skipped"] == []

def test_damaged_rows_are_measured_again(copied_test, monkeypatch, capsys):
    folder, _ = copied_test
    gara.save_adapter(tiny("gara"), folder / "a.pt")
    unfinished = interrupt_evaluate(monkeypatch, folder, 3, "--ckpt", folder / "a.pt")
    first, second, third = unfinished.read_bytes().strip().splitlines()
    mark, row = json.loads(first)
    lines = [bytes(4096), b"\xff", b"[" * 5000, b"7", b"[]", b"[0, []]", b"{}", first[:-9], first + third]
    wrong = [dict(at=99), dict(scores={}), dict(gates={}), dict(indices=[]),
             dict(gates={"GaRA": {"clear": [[[7, "00"]]]}})]
    for part in wrong:
        line = json.dumps([mark, row | part])
        lines.append(line.encode())
    lines += [second, third[:99]]
    unfinished.write_bytes(b"\n".join(lines))
    assert run_evaluate(folder, "out", "--no-corrupt", "--ckpt", folder / "a.pt") == 0
    assert "1 of 3 pictures" in capsys.readouterr().err
    assert len(stored("out")["images"]) == 3

def test_rows_are_counted_before_results_are_written(copied_test, monkeypatch, capsys):
    folder, _ = copied_test
    measure = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda *arguments: itertools.islice(measure(*arguments), 2))
    assert run_evaluate(folder, "out", "--no-corrupt") == 2
    assert one_error(capsys, "1 of 3 rows")
    assert not os.path.exists("out/results.json")

@pytest.mark.parametrize("module, last", [(figures, "draw_all"), (figures, "figure_samples"), (evaluate, "as_csv")])
def test_rows_are_kept_until_everything_is_written(demo, tmp_path, monkeypatch, capsys, module, last):
    with monkeypatch.context() as patch:
        patch.setattr(module, last, fails)
        assert run_evaluate(demo, tmp_path, "--no-corrupt") == 2
    assert len(list(tmp_path.glob("unfinished-*"))) == 1
    before = stored(tmp_path)["images"]
    assert run_evaluate(demo, tmp_path, "--no-corrupt") == 0
    assert "3 of 3 pictures" in capsys.readouterr().err
    assert stored(tmp_path)["images"] == before
    assert not list(tmp_path.glob("unfinished-*"))

WAITS = """
import multiprocessing, signal, sys, time
sys.path.insert(0, sys.argv[1])
import evaluate
measure = evaluate.predictions
images = 0
def predictions(*arguments):
    global images
    images += 1
    if images == 2:
        print("waits", flush=True)
        time.sleep(600)
    return measure(*arguments)
evaluate.predictions = predictions
multiprocessing.set_start_method(sys.argv[2])
signal.signal(signal.SIGTERM, evaluate.terminate)
sys.exit(evaluate.main(sys.argv[3:]))
"""

def processes_of(group):
    """The ids of the processes of a group that are still there."""
    found = subprocess.run(["ps", "-eo", "pgid,pid,stat"], capture_output=True, text=True).stdout
    lines = [line.split() for line in found.splitlines()]
    return [pid for pgid, pid, state in lines if pgid == str(group) and not state.startswith("Z")]

@pytest.mark.parametrize("number, method, group", [
    (signal.SIGKILL, "fork", False), (signal.SIGTERM, "spawn", True)])
def test_no_process_outlives_an_evaluation_that_is_killed(demo, tmp_path, number, method, group):
    words = ["--data", demo / "demo", "--checkpoint", demo / "w.pth", "--out", tmp_path, "--no-corrupt",
             "--workers", 2, "--device", "cpu"]
    program = subprocess.Popen([sys.executable, "-c", WAITS, HERE, method, *map(str, words)], start_new_session=True,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert program.stdout.readline() == "waits\n"
    if group:
        os.killpg(program.pid, number)
    else:
        program.send_signal(number)
    _, errors = program.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while processes_of(program.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(program.pid) == []
    assert program.returncode == (-9 if number == signal.SIGKILL else 143)
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("*.part"))

# Stored scores.

def test_stored_scores_of_several_runs_stand_side_by_side(demo, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    gara.save_adapter(tiny("lora"), "lora.pt")
    shutil.copy(finished[0] / "last.pt", "gara.pt")
    options = ("--limit", 2, "--conditions", "clear", "fog", "--strengths", 0.5, 1)
    for out, files in (("a", ["gara.pt"]), ("b", ["lora.pt"]), ("both", ["gara.pt", "lora.pt"])):
        assert run_evaluate(demo, out, "--ckpt", *files, *options) == 0
    printed = capsys.readouterr().out.split("conditions; vit_t")[-1]
    both = printed.split("\n", 1)[1].split("written")[0]
    assert run_cli(evaluate.main, "--from", "a/results.json", "b/results.json", "--out", "merged") == 0
    assert capsys.readouterr().out.split("written")[0] == both.lstrip("\n")
    assert len(files_in("merged")) == 7
    for name in files_in("merged"):
        merged, measured = (open(f"{out}/{name}", "rb").read() for out in ("merged", "both"))
        assert merged == measured
    assert stored("a")["conditions"] == ["clear", "fog", "fog@0.5"]

def spoiled(*path, value=None, **options):
    """A results.json with another value at a path."""
    results = made_up_results({**SAM_ONLY, "GaRA": gara_of(0.5)}, ("clear", "fog"), images=2, **options)
    entry = results
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    return results

ONE_SCORE = "images", 1, "scores", "SAM", "fog", "box", 1
ONE_GATE = "images", 1, "gates", "GaRA", "fog", 0

@pytest.mark.parametrize("content, words", [
    ("{", "text.json"), ("[]", "text.json"), ("[" * 10 ** 5, "text.json"), (None, "text.json"),
    ('{"format": "gara-sam results 1"}', "measure again"),
    (made_up_results(SAM_ONLY), "conditions"),
    (made_up_results(SAM_ONLY, ("clear", "fog"), images=3), "pictures or masks"),
    (spoiled(*ONE_SCORE, value=[math.nan, 0, 0]), "scores"),
    (spoiled(*ONE_SCORE, value=[1, 1, 1.5]), "scores"),
    (spoiled(*ONE_SCORE, value=[1, 1, "1"]), "text.json"),
    (spoiled(*ONE_SCORE, value=[10 ** 400, 1, 1]), "text.json"),
    (spoiled(*ONE_SCORE, value=[1, 1]), "text.json"),
    (spoiled(*ONE_GATE, value=[[2, "0000"]]), "gates"),
    (spoiled(*ONE_GATE, value=[[1, "000000"]]), "text.json"),
    (spoiled(*ONE_GATE, value=[[1, "0000"]] * 2), "text.json"),
    (spoiled("conditions", 1, value="clear"), "conditions"),
    (spoiled("conditions", 1, value="fig"), "'fig'"),
    (spoiled("models", "GaRA", "options", value={}), "options"),
    (spoiled("models", "GaRA", "options", "rank_low", value=-3), "text.json"),
    (spoiled("models", value={}), "models"),
    (spoiled("images", value=[]), "text.json"),
    (spoiled("images", 0, value=[]), "text.json"),
    (spoiled("images", 0, "indices", value=7), "text.json"),
    (spoiled("data", value=["demo/", "b/"]), "data"),
    (spoiled("backbone", value="vit_x"), "vit_x"),
    (spoiled("average", value="median"), "average")])
def test_stored_scores_that_do_not_fit_are_refused(tmp_path, monkeypatch, capsys, content, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.json").write_text(json.dumps(made_up_results(SAM_ONLY, ("clear", "fog"), images=2)))
    if content:
        (tmp_path / "text.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert run_cli(evaluate.main, "--from", "good.json", "text.json", "--out", "new") == 2
    assert one_error(capsys, "text.json", words)
    assert not os.path.exists("new")

def changed_anywhere(text, rng):
    """A JSON file with one of its values, at any depth, left out or exchanged for one of another form."""
    whole = place = json.loads(text)
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = keys[rng.integers(len(keys))]
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.3:
            break
        place = inner
    others = [None, True, -1, 3.5, math.nan, math.inf, 10 ** 30, "", "fog", "x\udcff\n", [], {}, [[inner]], {"a": inner}]
    choice = rng.integers(len(others) + 1)
    if choice < len(others):
        place[key] = others[choice]
    else:
        del place[key]
    return json.dumps(whole)

def test_any_other_form_of_stored_scores_is_fine_or_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "DRAWS", 9)
    monkeypatch.setattr(figures, "DRAWS", 9)
    text = json.dumps(made_up_results({**SAM_ONLY, "GaRA": gara_of(0.5)}, ("clear", "fog"), images=2, layers=1))
    rng = np.random.default_rng(0)
    codes = Counter()
    for _ in range(80):
        (tmp_path / "m.json").write_text(changed_anywhere(text, rng))
        code = run_cli(evaluate.main, "--from", "m.json", "--out", "new")
        codes[code] += 1
        printed = capsys.readouterr()
        if code == 2:
            assert re.fullmatch("error: .*m.json.*\n", printed.err)
        else:
            assert "| nan" not in printed.out
    assert codes.keys() == {0, 2}

def test_images_models_and_files_of_one_name_stay_apart(tmp_path):
    models = {"GaRA (a/b)": gara_of(0.5), "GaRA (a_b)": gara_of(1.0), "GaRA (a b)": gara_of(2.0)}
    results = made_up_results(models, ("clear",), images=2)
    for image in results["images"]:
        image["name"] = "0"
    assert "images: 2, masks: 3" in figures.about_of(results)
    assert len({*figures.draw_all(results, tmp_path)}) == 7

def test_models_of_one_name_and_other_scores_stand_beside_each_other():
    parts = {path: made_up_results(SAM_ONLY, ("clear",), seed=seed) for seed, path in enumerate("abc")}
    parts["d"] = made_up_results({"SAM (c)": SAM_ONLY["SAM"]}, ("clear",), seed=9)
    merged = evaluate.merge(parts)
    assert list(merged["models"]) == ["SAM", "SAM (b)", "SAM (c)", "SAM (c) (d)"]

def test_the_papers_figures():
    """Some as printed. And as Dice = 2 IoU / (1 + IoU) is concave, no mean Dice can be above that of the mean IoU."""
    paper = evaluate.read_paper()
    assert paper["lvis"]["vit_b", "SAM"]["point degraded"] == (65.0, 76.3, 89.8)
    assert paper["lvis"]["vit_b", "GaRA"]["box clear"] == (86.1, 91.9, 96.3)
    assert paper["table5"]["vit_b", "LoRA 128"]["point clear"] == (80.6, 88.1, None)
    assert paper["acdc"]["vit_l", "GaRA, then trained on BDD+LIS"] == {"box clear": (88.3, 92.6, None)}
    assert paper["table10"]["vit_b", "GaRA, random gates"]["point degraded"] == (73.9, None, None)
    assert ("vit_b", "LoRA 128") not in paper["lvis"]
    for name, models in paper.items():
        for columns in models.values():
            for iou, dice, _ in columns.values():
                if dice:
                    assert iou < dice <= 200 * iou / (100 + iou) + 0.1, name

def test_the_papers_figures_stand_below_ours(capsys):
    results = made_up_results(SAM_ONLY)
    results["backbone"] = "vit_b"
    evaluate.print_tables(results, "table5")
    row = next(line for line in capsys.readouterr().out.splitlines() if "LoRA 128 (paper)" in line)
    assert [cell.strip() for cell in row.split("|")[2:8]] == ["75.6", "84.6", "", "80.6", "88.1", ""]

# Figures.

def test_ticks_are_few_round_numbers_that_enclose_the_data():
    for low, high in ((0, 338), (0.61, 0.741), (-3, 2e6), (5, 5), (1e-4, 3e-4)):
        found = figures.ticks(low, high)
        steps = np.diff(list(found))
        assert 2 <= len(found) <= 7
        assert min(found) <= low + 1e-9
        assert max(found) >= high - 1e-9
        assert steps == pytest.approx(steps[0])
        assert f"{steps[0]:.0e}"[0] in "125"
    assert figures.ticks(0, 338)[100] == "100"
    assert figures.ticks(0, 2e6)[1e6] == "1,000,000"

@pytest.mark.parametrize("mark", figures.MARKS)
def test_axes_put_points_where_their_ticks_are(tmp_path, mark):
    points = [(0, 1), (10, 3)]
    panel = figures.Axes("title", {"a": points, "none": []}, "label", pad=(1, 0.5))
    red, blue = figures.Style("#ff0000", mark, 0), figures.Style("#0000ff")
    styles = {"a": red, "none": blue}
    path = figures.draw_figure(str(tmp_path / "x.png"), "title", "about", [panel], styles, columns=1)
    figure = Image.open(path)
    left, top, right, bottom = panel.inner
    assert figure.width == 1400
    assert panel.place(-1, 0.5) == pytest.approx((left, bottom))
    assert panel.place(11, 3.5) == pytest.approx((right, top))
    for point in points:
        x, y = panel.place(*point)
        assert figure.getpixel((round(x / 2), round(y / 2))) == (255, 0, 0)

def test_maps_are_white_at_0_and_black_at_1():
    page, _ = figures.start_page("", "", 200)
    values = np.array([[0, 0.5, 1]])
    figures.draw_map(page, (400, 20), (10, 8), values)
    for k, grey in enumerate((255, 127, 0)):
        middle = (405 + 10 * k, 24)
        assert page.getpixel(middle) == (grey,) * 3

def test_styles_differ():
    assert len(set(figures.styles_of(range(32)).values())) == 32
    assert len(set(figures.shades(32))) == 32

def test_oracles_against_loops():
    results = made_up_results(LORAS, images=7)
    images, names, conditions = results["images"], list(LORAS), data.CONDITIONS
    found = figures.oracles(images, names, conditions)
    for prompt in evaluate.PROMPTS:
        iou = {oracle: {} for oracle in figures.ORACLES}
        chosen = {oracle: [] for oracle in figures.ORACLES}
        for condition in conditions:
            column = f"{prompt} {condition}"
            best = max(names, key=lambda name: results["means"][name][column][0])
            iou["Oracle-Corrupt"][condition] = results["means"][best][column][0]
            chosen["Oracle-Corrupt"] += [best] * (condition != "clear")
            masks = []
            for image in images:
                scores = {name: np.array(image["scores"][name][condition][prompt])[:, 0] for name in names}
                best = max(names, key=lambda name: scores[name].sum())
                masks += scores[best].tolist()
                chosen["Oracle-Instance"] += [best] * (condition != "clear")
            iou["Oracle-Instance"][condition] = np.mean(masks)
        for oracle in figures.ORACLES:
            iou[oracle]["degraded"] = np.mean([iou[oracle][condition] for condition in conditions[1:]])
            expected = {f"{prompt} {kind}": value for kind, value in iou[oracle].items()}
            assert {key: found[oracle]["iou"][key] for key in expected} == pytest.approx(expected, abs=1e-12)
            shares = {name: chosen[oracle].count(name) / len(chosen[oracle]) for name in names}
            assert found[oracle]["chosen"][prompt] == pytest.approx(shares, abs=1e-12)

@pytest.mark.parametrize("names, shares", [(["A"], {"A": 1}), (["B", "A"], {"B": 1, "A": 0})])
def test_oracles_of_one_model_or_of_equal_ones_are_that_model(names, shares):
    results = made_up_results({"A": LORAS["LoRA 4"]}, images=3)
    for image in results["images"]:
        image["scores"]["B"] = image["scores"]["A"]
    expected = {column: scores[0] for column, scores in results["means"]["A"].items()}
    for found in figures.oracles(results["images"], names, data.CONDITIONS).values():
        assert found["chosen"] == dict(point=shares, box=shares)
        assert found["iou"] == pytest.approx(expected, abs=1e-12)

THREE = {f"a name of {k} letters": gara_of(k / 4) for k in (1, 2, 4)}
OF_GATES = ("dependence", "gates", "open")

@pytest.mark.parametrize("models, conditions, names", [
    (SAM_ONLY, ("clear",), []),
    (SAM_ONLY, data.CONDITIONS, ["corruptions"]),
    ({**SAM_ONLY, "GaRA (a/b)": gara_of(0.5)}, ("clear",), ["gates_GaRA__a_b_", "open_GaRA__a_b_"]),
    ({**LORAS, "GaRA": gara_of(0.5)}, STRONGER,
     ["corruptions", "strength", "strength_gates_GaRA", *(f"{kind}_GaRA" for kind in OF_GATES)]),
    (THREE, ("fog",), ["temperature", *(f"{kind}_a_name_of_{k}_letters" for kind in OF_GATES[1:] for k in (1, 2, 4))]),
    (THREE, ("clear", "fog", "fog@3"),
     ["corruptions", "strength", "temperature",
      *(f"{kind}_a_name_of_{k}_letters" for kind in (*OF_GATES, "strength_gates") for k in (1, 2, 4))])])
def test_every_figure_that_the_results_allow_is_written(models, conditions, names, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "DRAWS", 99)
    results = made_up_results(models, conditions)
    paths = figures.draw_all(results, tmp_path / "new")
    assert sorted(paths) == sorted(str(tmp_path / "new" / f"{name}.png") for name in names)
    for path in paths:
        with Image.open(path) as figure:
            pixels = np.array(figure)
        height, width, _ = pixels.shape
        assert width == 1400
        assert 140 < height < 2400
        assert (pixels == 255).all(2).mean() > 0.3  # a white ground
        assert (pixels < 128).all(2).mean() > 0.002  # and ink
        edges = np.concatenate([pixels[:4].ravel(), pixels[-4:].ravel(), pixels[:, :4].ravel(), pixels[:, -4:].ravel()])
        assert (edges == 255).all()  # nothing runs over the page

def test_samples_are_the_least_middling_and_most_gains(demo):
    dataset = data.load_dataset(demo / "demo", "test")
    models = {"half": Oracle(dataset, every_second_column), "right": Oracle(dataset, lambda mask: mask)}
    conditions = ["clear", "fog", "snow", "rain"]
    rows = [dict(data="demo", **row) for row in evaluate.evaluate(models, dataset, conditions)]
    worse = [[0, 0, 0]] * len(rows[1]["indices"])
    rows[1]["scores"]["right"]["snow"]["point"] = worse
    results = dict(data=["demo"], models=models, images=rows, conditions=conditions)
    shown = evaluate.predict_samples(results, models, [dataset], rows=3)
    assert [row["label"].split()[0] for row in shown] == ["least", "middling", "most"]
    assert shown[0]["condition"] == "snow"
    assert shown[0]["iou"]["right"] == 0
    assert len({row["condition"] for row in shown}) == 3
    for row in shown:
        assert np.array_equal(row["predictions"]["right"], row["truth"])

def test_samples_have_a_row_each_and_a_column_per_model(tmp_path):
    truth = np.zeros((2, 60, 80), bool)
    truth[0, 5:20, 5:20] = True
    truth[1, 30:50, 40:70] = True
    row = dict(
        condition="fog",
        image=np.full((60, 80, 3), 90, np.uint8),
        points=np.full((2, 3, 2), 10.0),
        truth=truth,
        predictions=dict(A=truth, B=~truth),
        iou=dict(A=1.0, B=0.0),
        label="worst gain \N{MINUS SIGN}0.31")

    def drawn(rows, title):
        path = figures.figure_samples(rows, ["A", "B"], str(tmp_path / "samples.png"), title)
        return np.array(Image.open(path)).astype(int)

    one = drawn([row], "Figure 4")
    two = drawn([row, {**row, "label": ""}], "a long title " * 30)
    assert one.shape[1] == two.shape[1] == 4 * 250 + 30
    assert 200 < two.shape[0] - one.shape[0] < 260
    given, right, a, b = (one[93:273, 20 + 250 * c:260 + 250 * c] for c in range(4))
    assert (right == a).all()
    assert (right != b).any()
    assert (given != right).any()
    tint = 0.35 * 90 + 0.65 * np.array(figures.TINTS[0])
    assert np.abs(right[21:54, 21:54] - tint).max() <= 1.5

# The study.

def test_the_studys_estimates_are_those_of_the_normal_distribution():
    """Of sums over the masks of many images, and of many seeds: the variances of both add up."""
    rng = np.random.default_rng(1)
    masks = rng.integers(1, 5, 300).astype(float)
    of_seeds = rng.normal(0.6, 0.1, (40, 1))
    of_images = rng.normal(0, 0.2, (1, 300))
    sums = (of_seeds + of_images) * masks
    mean, low, high, each = study.estimate(sums, masks)
    assert mean == pytest.approx(sums.sum() / masks.sum() / 40)
    assert each == pytest.approx(sums.sum(1) / masks.sum())
    residuals = (sums.mean(0) - mean * masks) / masks.mean()
    deviation = np.hypot(np.std(each) / 40 ** 0.5, residuals.std() / 300 ** 0.5)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    assert study.estimate(sums, masks)[1:3] == (low, high)

def test_columns_of_the_study():
    values = np.random.default_rng(0).random((3, 8, 2, 4))
    conditions = ["fog", "clear", "rain", "fog@2"]
    scores = study.Scores(dict(gara=values), np.ones(8), conditions)
    rain = scores.column("gara", "box rain")
    degraded = scores.column("gara", "point degraded")
    assert np.array_equal(rain, values[:, :, 1, 2])
    assert np.allclose(degraded, values[:, :, 0, [0, 2]].mean(2))

def test_what_gates_answer_to():
    """Gates that follow the corruption alone, the image alone, and only both together; and chance."""
    rng = np.random.default_rng(0)
    by_corruption = np.repeat(rng.random((1, 16, 60)) < 0.5, 40, 0)
    by_image = np.repeat(rng.random((40, 1, 60)) < 0.5, 16, 1)
    by_both = np.indices((40, 16, 1)).sum(0) % 2 == 0
    never = np.ones((40, 16, 9))
    noise = rng.random((400, 16, 50)) < 0.5
    for gates, shares in ((by_corruption, (1, 0, 0)), (by_image, (0, 1, 0)), (by_both, (0, 0, 1)), (never, (0, 0, 0))):
        assert study.gate_variance(gates) == pytest.approx(shares)
    degrees_of_freedom = (15 / 6399, 399 / 6399)
    assert study.gate_variance(noise)[:2] == pytest.approx(degrees_of_freedom, rel=0.15)
    dealt = study.shuffled(by_corruption, rng)
    assert (dealt != by_corruption).any()
    assert np.array_equal(np.sort(dealt, 1), np.sort(by_corruption, 1))
    assert study.probe(by_corruption, rng) == 1
    for silent in (by_image, noise, dealt):
        assert study.probe(silent, rng) == pytest.approx(1 / 16, abs=0.04)

@pytest.mark.parametrize("plan", (study.FULL_STUDY, study.QUICK_STUDY))
def test_jobs_of_the_study_are_commands_that_the_scripts_take(plan):
    """Every word is understood, what a job needs is made by one before it, and no two write to one folder."""
    before = set()
    for folder, (command, needed) in study.study_jobs("study", **plan).items():
        assert before.issuperset(needed)
        assert folder not in before
        before.add(folder)
        if callable(command):
            continue
        script, *words = command
        if script.endswith("evaluate.py"):
            args = evaluate.parse(words)
            assert {os.path.dirname(path) for path in args.ckpt} <= {*needed}
            assert args.out == folder
        elif not script.endswith("data.py"):
            args = train.parse([word for word in words if word != "--logistic-noise"])
            assert args.out == folder
            assert args.seed < plan["seeds"]
            assert args.steps in (1, plan["steps"], 3 * plan["steps"])
    seen = train.parse(["--data", "x", *study.RUNS["unseen_gara"][1]]).conditions
    assert not {*study.UNSEEN} & {*seen}

def test_jobs_are_done_once_in_order_and_failures_are_named(tmp_path, capsys):
    script = tmp_path / "job.py"
    script.write_text("import os, sys\nout = sys.argv[1]\nif out.endswith('bad'): sys.exit('error: no such luck')\n"
                      "os.makedirs(out)\nopen(out + '/order', 'w').write(' '.join(sorted(os.listdir(out + '/..'))))\n"
                      "assert os.environ['OMP_NUM_THREADS'] == '1'")
    out = str(tmp_path / "study")
    a, b, c, bad = (os.path.join(out, name) for name in ("a", "b", "c", "bad"))
    jobs = {c: (functools.partial(os.makedirs, c), [b]), b: ([str(script), b], [a]), a: ([str(script), a], [])}
    study.Jobs(jobs, out).run(3)
    assert open(b + "/order").read().split()[:2] == ["a", "b"]
    assert os.path.isdir(c)
    assert len(capsys.readouterr().out.splitlines()) == 3
    study.Jobs(jobs, out).run(3)  # done before: makedirs would fail
    assert capsys.readouterr().out == ""
    with refused("bad: error: no such luck", "exit code 1", kind=RuntimeError):
        study.Jobs({**jobs, bad: ([str(script), bad], [])}, out).run(2)
    with refused("another study", kind=RuntimeError):
        study.Jobs({a: ([str(script), a, "--steps", "9"], [])}, out).run(1)

def test_frozen_gates_choose_what_was_chosen_most_often(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs/gara_0")
    gara.save_adapter(train_by_chance(tiny("gara"), 3), "runs/gara_0/gara.pt")
    conditions = "clear", "fog", "snow"
    assert run_evaluate(demo, "main", "--ckpt", "runs/gara_0/gara.pt", "--conditions", *conditions) == 0
    monkeypatch.setattr(study, "find_checkpoint", lambda backbone: str(demo / "w.pth"))
    study.freeze_gates("main", "runs/gara_0", "runs/frozen_0")
    assert run_evaluate(demo, "frozen", "--ckpt", "runs/frozen_0/gara.pt", "--conditions", *conditions) == 0
    free, frozen = (evaluate.read_results(f"{name}/results.json") for name in ("main", "frozen"))
    for layer in range(len(figures.unpack_gates(free, "GaRA", "fog"))):

        def decisions(results):
            parts = [figures.unpack_gates(results, "GaRA", condition)[layer] for condition in conditions]
            vectors, spaces = (np.concatenate(part)[:, 0] for part in zip(*parts))
            return vectors, spaces

        vectors, spaces = decisions(free)
        fixed, fixed_spaces = decisions(frozen)
        assert (fixed == fixed[0]).all()
        assert (fixed_spaces == (2 * spaces.sum() > len(spaces))).all()
        those = vectors[spaces == fixed_spaces[0]]
        assert np.array_equal(fixed[0], 2 * those.sum(0) > len(those))

@pytest.mark.parametrize("plan", (study.FULL_STUDY, study.QUICK_STUDY))
def test_the_studys_report_says_what_the_folders_hold(plan, tmp_path, monkeypatch):
    """Made-up scores in the folders of a whole study: every table is there, and cells are means by hand."""
    monkeypatch.chdir(tmp_path)
    for module in (evaluate, study, figures):
        monkeypatch.setattr(module, "DRAWS", 99)
    means = {}
    for number, (folder, (command, _)) in enumerate(study.study_jobs("study", **plan).items()):
        os.makedirs(folder)
        if "runs" in folder.split(os.sep):
            open(f"{folder}/run.json", "w").write(json.dumps(dict(learnable_parameters=4321)))
            continue
        name = os.path.basename(folder).rpartition("_")[0]
        if name not in study.EVALUATIONS:
            continue
        args = evaluate.parse(command[1:])
        models, files = dict(SAM_ONLY), {}
        for path in args.ckpt:
            run = os.path.basename(os.path.dirname(path))
            models[run] = ("lora", dict(rank=3)) if run.startswith("lora") else gara_of(0.5)
            files[run] = path
        found = made_up_results(models, args.conditions, 5, seed=number)
        for run, path in files.items():
            found["models"][run]["file"] = path
            means[name, run] = found["means"][run]
        for root in args.data[1:]:
            found["images"] += [image | dict(data=root) for image in found["images"]]
        found |= dict(data=args.data, torch="x", machine="y")
        open(f"{folder}/results.json", "w").write(json.dumps(found))
    costs = dict(heads=["model", "images/s"], rows=[["SAM", "77.77"]])
    open("study/models.json", "w").write(json.dumps(costs))
    os.makedirs("study/jobs")
    open("study/jobs/x.json", "w").write(json.dumps(dict(command=["train.py", "--seed", "7"], seconds=61)))
    study.Report("study", plan).write()

    text = open("study/report.md").read()
    assert re.findall(r"^## (\d)", text, re.M) == [*"123456789"]
    assert "nan" not in text
    for words in ("| 4,321 |", "77.77", "train.py --seed 7    # 61 s", "| LoRA 64 - SAM |", "| GaRA - LoRA 64 |",
                  "| Table 10: random gates | GaRA, random gates |", "| GaRA per window | 6."):
        assert words in text
    for name in re.findall(r"\]\((.*?)\)", text):
        assert Image.open(f"study/{name}").width == 1400
    for name, run in (("unseen", "unseen_gara"), ("real", "real_gara"), ("main", "moe")):
        column = "point night" if name == "real" else "point degraded"
        seeds = 1 if name in study.ONCE else plan["seeds"]
        of_seeds = [means[name, f"{run}_{seed}"][column][0] for seed in range(seeds)]
        lines = text.split(f"study/{name}_{0 if name in study.ONCE else '*'}`", 1)[1].splitlines()
        row = next(line for line in lines if line.startswith(f"| {study.label_of(run)} |"))
        assert row.split("|")[2].split()[0] == f"{100 * np.mean(of_seeds):.1f}"

# The page.

VIEW = dict(image=0, corruption="fog", strength=1, noise=0)
CLICK = dict(VIEW, model=0, points=[[60, 60, 1]], box=None)

@contextlib.contextmanager
def serving(server):
    """The server answers within this block."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A page at a free port: plain SAM, GaRA and LoRA with the recipe's weights, on demo scenes."""
    folder = tmp_path_factory.mktemp("site")
    torch.save(tiny_weights(), folder / "w.pth")
    files = [str(folder / f"{method}.pt") for method in ("gara", "lora")]
    for file in files:
        gara.save_adapter(tiny(os.path.basename(file)[:-3]), file)
    words = ["--checkpoint", str(folder / "w.pth"), "--adapter", *files, "--port", "0", "--device", "cpu"]
    with serving(page.make_server(page.parse(words))) as server:
        yield server

def send(server, method, path, body=None, **headers):
    """(status, what was answered: a dict, an image's pixels, or text). A dict as body is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    if isinstance(body, dict):
        body = json.dumps(body)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content, kind = answer.read(), answer.headers["Content-Type"]
    connection.close()
    if kind == "application/json":
        return answer.status, json.loads(content)
    if kind == "image/png":
        return answer.status, pixels(content)
    return answer.status, content.decode()

def pixels(content):
    """The pixels of a PNG, given as bytes or in base64."""
    if isinstance(content, str):
        content = base64.b64decode(content)
    return np.array(Image.open(io.BytesIO(content)))

def file_bytes(image, form="PNG"):
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()

def predictor_of(site, model, corruption="fog"):
    """A predictor of one of the page's models, and the first scene as it has encoded it."""
    image, _ = data.demo_scene(data.seed_of("page", 0))
    image = data.degrade(image, corruption, data.seed_of("scene-1", corruption))
    predictor = sam.SamPredictor(site.bench.models[model].sam)
    predictor.set_image(image)
    return predictor, image

def test_page_asks_nobody_else(site):
    status, text = send(site, "GET", "/")
    assert status == 200
    assert "<title>GaRA-SAM</title>" in text
    assert not re.search(r"https?:|//\w+\.\w", text)
    assert {*re.findall(r'ask\("(.*?)"', text)} == {*page.ROUTES["POST"]}

def test_page_says_what_there_is(site):
    status, found = send(site, "GET", "/start")
    assert status == 200
    assert [image["name"] for image in found["images"]] == [f"scene-{k}" for k in range(1, 13)]
    assert [model["name"] for model in found["models"]] == ["SAM", "GaRA 4,48", "LoRA 4"]
    assert [model["sets"] for model in found["models"]] == [[], [4, 48], [4]]
    assert found["corruptions"] == [*CORRUPTIONS, *OTHERS]
    assert send(site, "GET", "/thumbnail?0")[1].shape == predictor_of(site, 0)[1].shape

def test_page_degrades_as_evaluation_does(site):
    _, expected = predictor_of(site, 0, "snow")
    _, clear = predictor_of(site, 0, "clear")
    views = [dict(VIEW, corruption="snow"), dict(VIEW, corruption="snow", noise=1),
             dict(VIEW, corruption="snow", strength=0), dict(VIEW, corruption="none")]
    found, anew, weak, none = [send(site, "POST", "/image", view)[1] for view in views]
    assert np.array_equal(found, expected)
    assert (anew != expected).mean() > 0.2
    assert np.array_equal(weak, clear)
    assert np.array_equal(none, clear)

def test_page_shows_the_gates(site):
    """Beside gates() itself: what is open, which set is chosen, how many."""
    assert send(site, "POST", "/encode", dict(VIEW, model=0)) == (200, dict(layers=[]))
    predictor_of(site, 1)
    expected = gara.gates(site.bench.models[1].sam)
    _, found = send(site, "POST", "/encode", dict(VIEW, model=1))
    for layer, gate in zip(found["layers"], expected, strict=True):
        assert layer["open"] == gate["vector"][0].tolist()
        assert layer["chosen"].index(1) == gate["space"].item()
        assert layer["count"] == gate["count"].item()
    _, found = send(site, "POST", "/encode", dict(VIEW, model=2))
    assert [layer["count"] for layer in found["layers"]] == [4] * 6

def test_page_shows_shares_where_windows_decide():
    model = tiny("gara", scope="window")
    encode(model, pictures(0))
    layers = page.gate_layers(page.Model("GaRA", "gara.pt", (4, 48), model))
    for layer, gate in zip(layers, gara.gates(model), strict=True):
        decisions = gate["vector"].reshape(-1, 52).float()  # of windows, or of the image in layers that see it whole
        assert layer["open"] == pytest.approx(decisions.mean(0).tolist())
        assert sum(layer["chosen"]) == pytest.approx(1)
        assert layer["chosen"][1] == pytest.approx(gate["space"].float().mean().item())
        assert layer["count"] == pytest.approx(sum(layer["open"]), abs=0.1)

@pytest.mark.parametrize("model", range(3))
@pytest.mark.parametrize("points, box, count", [
    ([[60, 60, 1]], None, 3),
    ([[60, 60, 1], [5, 5, 0]], None, 1),
    ([], [20, 20, 90, 80], 1),
    ([[60, 60, 1]], [20, 20, 90, 80], 1)])
def test_page_predicts_what_the_predictor_does(site, model, points, box, count):
    status, found = send(site, "POST", "/predict", dict(VIEW, model=model, points=points, box=box))
    assert status == 200
    coords = labels = None
    if points:
        *coords, labels = zip(*points)
        coords = np.transpose(coords)
    predictor, _ = predictor_of(site, model)
    masks, scores, _ = predictor.predict(coords, labels, box, multimask_output=count == 3)
    assert len(found["masks"]) == count
    for text, mask in zip(found["masks"], masks, strict=True):
        assert np.array_equal(pixels(text), mask)
    assert found["scores"] == pytest.approx(scores.tolist())

def test_page_knows_the_truth(site):
    _, masks = data.demo_scene(data.seed_of("page", 0))
    y, x = np.argwhere(masks[1])[0].tolist()
    _, found = send(site, "POST", "/predict", dict(CLICK, points=[[x, y, 1]]))
    assert found["object"] == "1"
    for text, iou in zip(found["masks"], found["iou"], strict=True):
        expected = evaluate.mask_scores(pixels(text)[None], masks[1][None])
        assert iou == pytest.approx(expected[0, 0])
    y, x = np.argwhere(~masks.any(0))[0].tolist()
    _, found = send(site, "POST", "/predict", dict(CLICK, points=[[x, y, 1]]))
    assert found["object"] is None
    assert found["iou"] is None

def test_page_compares_with_the_mask_on_the_clear_image(site):
    _, same = send(site, "POST", "/predict", dict(CLICK, corruption="none", against="clear"))
    assert same["iou"] == [1, 1, 1]
    _, found = send(site, "POST", "/predict", dict(CLICK, against="clear"))
    _, clear = send(site, "POST", "/predict", dict(CLICK, corruption="none"))
    for a, b, iou in zip(found["masks"], clear["masks"], found["iou"], strict=True):
        expected = evaluate.mask_scores(pixels(a)[None], pixels(b)[None])
        assert iou == pytest.approx(expected[0, 0])

@pytest.mark.parametrize("points, box, expected", [
    ([[3, 3, 1]], None, "whole"),
    ([[12, 12, 1]], None, "part"),
    ([[12, 12, 1], [3, 3, 1]], None, "whole"),
    ([[3, 3, 1], [12, 12, 0]], None, None),
    ([[18, 3, 1]], None, None),
    ([], [0, 0, 14, 15], "whole"),
    ([], [10, 11, 14, 14], "part"),
    ([[12, 12, 1]], [1, 0, 15, 15], "whole"),
    ([], [2, 2, 6, 6], None)])
def test_object_that_is_asked_for(points, box, expected):
    whole, part = np.zeros((2, 20, 20), bool)
    whole[:16, :16] = True
    part[10:15, 10:15] = True
    assert page.asked_object(dict(whole=whole, part=part), points, box) == expected

def test_page_takes_an_image(site, tmp_path, monkeypatch):
    """Scaled down, from a file that is then removed; only the last few are kept."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    image = Image.fromarray(scene(40, 2048))
    numbers = []
    for _ in range(page.KEPT_UPLOADS + 1):
        status, found = send(site, "POST", "/upload", file_bytes(image))
        assert status == 200
        numbers.append(found["image"])
    assert os.listdir(tmp_path) == []
    image.thumbnail((1024, 1024))
    last = dict(VIEW, corruption="none", image=numbers[-1])
    assert np.array_equal(send(site, "POST", "/image", last)[1], np.array(image))
    assert send(site, "POST", "/image", dict(last, image=numbers[1]))[0] == 200
    assert send(site, "POST", "/image", dict(last, image=numbers[0]))[0] == 404
    _, found = send(site, "POST", "/predict", dict(CLICK, image=numbers[-1], points=[[60, 5, 1]]))
    assert found["iou"] is None  # there is no truth
    assert len(send(site, "GET", "/start")[1]["images"]) == 12

def refused_in_json(site, capfd, status, word, *request, **headers):
    """The page answers this request with the status and one line of JSON, and goes on."""
    found, content = send(site, *request, **headers)
    assert found == status
    assert list(content) == ["error"]
    assert word in content["error"]
    assert "\n" not in content["error"]
    assert tempfile.gettempdir() not in content["error"]
    assert capfd.readouterr().err == ""
    assert send(site, "GET", "/start")[0] == 200

@pytest.mark.parametrize("method, path, status, word", [
    ("GET", "/nothing", 404, "address"),
    ("GET", "/../data.py", 404, "address"),
    ("GET", "//etc/passwd", 404, "address"),
    ("GET", "/page.html", 404, "address"),
    ("GET", "/predict", 404, "address"),
    ("POST", "/start", 404, "address"),
    ("PUT", "/", 501, "PUT"),
    ("GET", "/thumbnail", 404, "image"),
    ("GET", "/thumbnail?99", 404, "image"),
    ("GET", "/thumbnail?../w.pth", 404, "image"),
    ("GET", "/thumbnail?" + "9" * 5000, 404, "image"),
    ("GET", "/" + "a" * 70000, 414, "Long")],
    ids=lambda value: str(value)[:24])
def test_page_has_no_other_address(site, capfd, method, path, status, word):
    refused_in_json(site, capfd, status, word, method, path)

@pytest.mark.parametrize("headers, status, word", [
    (dict(Host="evil.example"), 403, "Host"),
    (dict(Host="127.0.0.1.evil.example"), 403, "Host"),
    (dict(Host="192.168.0.7:8000"), 403, "Host"),
    (dict(Host=""), 403, "Host"),
    (dict(Origin="http://evil.example"), 403, "page"),
    (dict(Origin="null"), 403, "page"),
    ({"Content-Length": "9" * 12}, 413, "bytes"),
    ({"Content-Length": "9" * 5000}, 400, "Content-Length"),
    ({"Content-Length": "-1"}, 400, "Content-Length"),
    ({"Content-Length": "1e3"}, 400, "Content-Length")],
    ids=lambda value: str(value)[:24])
def test_page_serves_its_own_visitors_alone(site, capfd, headers, status, word):
    refused_in_json(site, capfd, status, word, "POST", "/image", b"", **headers)

@pytest.mark.parametrize("path, body, status, word", [
    ("/image", None, 400, "JSON"),
    ("/image", "{", 400, "JSON"),
    ("/image", "[1]", 400, "JSON"),
    ("/image", "[" * 60000, 400, "JSON"),
    ("/image", "9" * 9999, 400, "JSON"),
    ("/image", b"\xff\xfe", 400, "JSON"),
    ("/image", "x" * 100000, 413, "bytes"),
    ("/upload", b"x" * (page.MAX_UPLOAD + 1), 413, "bytes"),
    ("/upload", None, 400, "JPEG"),
    ("/upload", b"%!PS-Adobe-3.0 EPSF-3.0", 400, "JPEG"),
    ("/upload", b"RIFF....WEBP", 400, "cannot read"),
    ("/upload", file_bytes(Image.fromarray(scene()))[:999], 400, "cannot read"),
    ("/upload", file_bytes(Image.new("1", (7000, 7000))), 413, "pixels"),
    ("/upload", file_bytes(Image.new("RGB", (15, 900))), 400, "small")],
    ids=lambda value: str(value)[:24])
def test_page_refuses_what_it_cannot_use(site, capfd, path, body, status, word):
    refused_in_json(site, capfd, status, word, "POST", path, body)

@pytest.mark.parametrize("part, word", [
    (dict(image=-1), "image"),
    (dict(image=10**9), "image"),
    (dict(image="0"), "image"),
    (dict(image=[0]), "image"),
    (dict(image="../w.pth"), "image"),
    (dict(image=True), "image"),
    (dict(corruption="clear"), "corruption"),
    (dict(corruption="fog@9"), "corruption"),
    (dict(corruption=["fog"]), "corruption"),
    (dict(corruption=None), "corruption"),
    (dict(strength=2.01), "strength"),
    (dict(strength=-1), "strength"),
    (dict(strength="1"), "strength"),
    (dict(strength=math.nan), "strength"),
    (dict(strength=math.inf), "strength"),
    (dict(strength=None), "strength"),
    (dict(strength=True), "strength"),
    (dict(noise=-1), "noise"),
    (dict(noise=0.5), "noise"),
    (dict(noise=2**32), "noise"),
    (dict(model=3), "model"),
    (dict(model=-1), "model"),
    (dict(model=0.0), "model"),
    (dict(points=None), "points"),
    (dict(points=[]), "nothing"),
    (dict(points=[[1, 2]]), "points"),
    (dict(points=[1]), "points"),
    (dict(points=[[1, 2, 3]]), "points"),
    (dict(points={}), "points"),
    (dict(points=[[1, 2, 0.5]]), "points"),
    (dict(points=[[1, 2, "1"]]), "points"),
    (dict(points=[[-0.1, 2, 1]]), "points"),
    (dict(points=[[128, 2, 1]]), "points"),
    (dict(points=[[math.nan, 2, 1]]), "points"),
    (dict(points=[[1, 1e308, 1]]), "points"),
    (dict(points=[[1, 2, 1]] * 65), "points"),
    (dict(box=[1, 2, 3]), "box"),
    (dict(box="all"), "box"),
    (dict(box=[5, 5, 5, 9]), "box"),
    (dict(box=[9, 5, 2, 9]), "box"),
    (dict(box=[0, 0, 999, 9]), "box"),
    (dict(box=[0, 0, math.inf, 9]), "box"),
    (dict(box=[0, 0, math.nan, 9]), "box")])
def test_page_checks_each_number(site, part, word):
    status, content = send(site, "POST", "/predict", dict(CLICK, **part))
    assert status in (400, 404)
    assert word in content["error"]

def test_page_answers_two_clients_at_once(site, monkeypatch):
    """Each gets what it gets alone, whichever image, corruption and model the other asks about, and models are asked
    by one at a time."""
    ask, free = page.ask, threading.Lock()

    def asked_alone(*question):
        assert free.acquire(blocking=False)
        time.sleep(0.02)
        free.release()
        return ask(*question)

    monkeypatch.setattr(page, "ask", asked_alone)
    asked = []
    for k, name in enumerate(["fog", "snow", "none", "rain"]):
        asked.append(dict(CLICK, image=k, corruption=name, model=k % 3))
        asked.append(dict(CLICK, image=k, corruption=name, model=2))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda body: send(site, "POST", "/predict", body), asked))
    site.bench.encoded.cache_clear()
    for body, found in zip(asked, together):
        assert found[0] == 200
        assert found == send(site, "POST", "/predict", body)

def test_page_hides_paths_and_survives_faults(site, monkeypatch, capfd):
    def damaged(number):
        raise data.SampleError("/home/me/photo.jpg: cannot read this image")

    monkeypatch.setattr(site.bench, "read", damaged)
    status, content = send(site, "POST", "/predict", CLICK)
    assert status == 400
    assert "/home" not in content["error"]
    assert "/home/me/photo.jpg" in capfd.readouterr().err
    monkeypatch.setattr(site.bench, "read", lambda number: 1 / 0)
    status, content = send(site, "POST", "/predict", CLICK)
    assert status == 500
    assert "ZeroDivisionError" in content["error"]
    assert "Traceback" in capfd.readouterr().err
    monkeypatch.undo()
    assert send(site, "POST", "/predict", CLICK)[0] == 200

def test_page_leaves_no_thread(site):
    """Also with a connection that a browser has opened and does not use."""
    before, start = set(threading.enumerate()), time.monotonic()
    with serving(page.Server("127.0.0.1", 0, site.bench)) as server:
        idle = socket.create_connection(server.server_address)
        assert send(server, "GET", "/start")[0] == 200
    assert set(threading.enumerate()) <= before
    assert time.monotonic() - start < 20  # well below a visitor's time to keep silent
    assert idle.recv(1) == b""
    idle.close()

def test_page_for_a_whole_network_is_asked_for_by_address(site):
    with serving(page.Server("0.0.0.0", 0, site.bench)) as server:
        assert send(server, "GET", "/start", Host="192.168.0.7:8000")[0] == 200
        assert send(server, "GET", "/start", Host="evil.example")[0] == 403

def test_images_to_choose_from(demo, tmp_path):
    Image.fromarray(scene(90, 2000)).save(tmp_path / "b.JPG")
    Image.fromarray(scene()).save(tmp_path / "a.png")
    (tmp_path / "c.txt").write_text("no image")
    words = ["--images", str(tmp_path), "--data", str(demo / "demo"), "--split", "val"]
    a, b, *samples = page.list_entries(page.parse(words))
    assert [a.name, b.name] == ["a.png", "b.JPG"]
    assert b.read()[0].shape == (46, 1024, 3)
    dataset = data.load_dataset(demo / "demo", "val")
    for entry, sample in zip(samples, dataset, strict=True):
        image, objects = entry.read()
        assert np.array_equal(image, sample.image())
        assert list(objects) == list(sample.indices)
        assert np.array_equal(np.stack(list(objects.values())), sample.masks())
        assert [entry.kind, entry.split] == ["robustseg", "val"]

@pytest.mark.parametrize("words, said", [
    (["--port", "70000"], "--port"),
    (["--port", "x"], "--port"),
    (["--backbone", "vit_x"], "--backbone"),
    (["--adapter", "none.pt"], "none.pt"),
    (["--checkpoint", "none.pth"], "none.pth"),
    (["--data", "none"], "none"),
    (["--images", "none"], "none"),
    (["--images", "."], "no image"),
    (["--host", "300.1.1.1"], "300.1.1.1"),
    (["--device", "nonsense"], "nonsense")])
def test_mistakes_at_the_page_end_in_one_line(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    assert run_cli(page.main, *words) == 2
    assert one_error(capsys, said)

def test_a_port_in_use_is_one_line(site, capsys):
    assert run_cli(page.main, "--port", site.server_port) == 2
    assert one_error(capsys, str(site.server_port), "--port")

def test_ctrl_c_ends_the_page_in_one_line(capsys, monkeypatch):
    serve = page.Server.serve_forever

    def interrupted(server):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        serve(server)

    monkeypatch.setattr(page.Server, "serve_forever", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run_cli(page.main, "--port", 0) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    out, err = capsys.readouterr()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+ \(Ctrl-C ends\)\n\nended\n", out)
    assert err == ""

# What is shipped.

SHIPPED = os.path.join(HERE, "assets", "sam_vit_t.pth")

@pytest.mark.skipif(not os.path.exists(SHIPPED), reason="assets/sam_vit_t.pth is not there")
def test_shipped_tiny_sam_segments_fresh_scenes():
    predictor, ious = sam.SamPredictor(sam.build_sam("vit_t", SHIPPED)), []
    for seed in range(12):
        image, masks = data.demo_scene(seed + 10**6)
        predictor.set_image(image)
        for k, mask in enumerate(masks):
            found = predictor.predict(box=data.prompts(mask, k)[1], multimask_output=False)[0]
            ious.append(evaluate.mask_scores(found, mask[None])[0, 0])
    assert np.mean(ious) > 0.7

# ---- Benchmarks -----------------------------------------------------------------------------------------------------

sys.path.insert(0, os.path.join(HERE, "assets"))

import bench

CPU = torch.device("cpu")

def bench_rows(text):
    """{first cell: the other cells} of the tables in a benchmark's output; two spaces or more separate cells."""
    rows = {}
    for line in text.splitlines():
        name, *cells = re.split(r"  +", line.strip())
        if cells:
            rows[name] = cells
    return rows

def test_race_times_everyone_in_turn_and_keeps_who_failed():
    order = []

    def work(name):
        order.append(name)
        if name == "broken" and len(order) > 3:
            raise ValueError("no\nmore")
        return name

    done = bench.race({name: functools.partial(work, name) for name in ("a", "broken")}, CPU, rounds=3)
    assert order == ["a", "broken", "a", "broken", "a", "a", "a"]  # a warm-up, three by the clock, one for memory
    assert done["broken"]["failed"] == "ValueError: no"
    assert "seconds" not in done["broken"]
    assert done["a"]["result"] == "a"
    assert 0 <= done["a"]["seconds"] < 1
    assert len(done["a"]["times"]) == 4

@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_peak_memory_is_what_the_work_needs():
    with bench.PeakMemory(CPU) as peak:
        np.ones(50_000_000, np.uint8).sum()
    assert 40e6 < peak.bytes < 80e6

def test_bench_prints_columns(capsys):
    bench.print_rows(["", "seconds", "MB"], [["long name", "1.5", "20"], ["x", "-", "-"], ["short"]])
    assert capsys.readouterr().out.splitlines() == [
        "           seconds  MB",
        "long name      1.5  20",
        "x                -   -",
        "short    ", ""]

OTHER_SAM = """
import sam

def other(backbone, weights):
    model = sam.build_sam(backbone)
    model.load_state_dict(weights)
    return model.image_encoder, sam.SamPredictor(model)

def absent(backbone, weights):
    import no_such_module
"""

def test_bench_sam(tmp_path, capsys, monkeypatch):
    """Finite rows, bfloat16 near float32, and a row that failed stays in the table."""
    monkeypatch.setattr(torch, "compile", lambda module: lambda x: 1 / 0)
    (tmp_path / "other.py").write_text(OTHER_SAM)
    assert run_cli(bench.main, "sam", "--backbone", "vit_t", "--batch", 2, "--rounds", 3, "--compile", "--device", "cpu",
                   "--against", f"{tmp_path / 'other.py'}:other") == 0
    text = capsys.readouterr().out
    assert "batch 2" in text
    assert "median of 3 " in text
    rows = bench_rows(text)
    seconds, images_per_second, *_ = rows["float32"]
    assert float(seconds) * float(images_per_second) == pytest.approx(2, rel=0.1)
    assert rows["float32"][-1] == "0e+00, 1.0000"
    difference, iou = rows["bfloat16"][-1].split(", ")
    assert 1e-5 < float(difference) < 0.1
    assert 0.9 < float(iou) < 1
    assert "ZeroDivisionError" in rows["float32, compiled"][-1]
    assert "GFLOP/s" in rows["matrix products alone"][-1]
    assert rows["other"][-1] == "0e+00, 1.0000"
    for name in ("one call, 100 prompts", "100 calls of predict"):
        assert float(rows[name][0]) > 0
        assert float(rows[f"other: {name}"][0]) > 0

def test_encoder_flops_against_torchs_own_counter(monkeypatch):
    """On attention written out."""
    from torch.utils.flop_counter import FlopCounterMode
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # whose products the counter does not know
    written_out = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, written_out:
        tiny().image_encoder(torch.zeros(1, 3, 128, 128))
    relative_positions = 2 * 2 * 6 * 256 * 160 * 8  # not counted by the bench; 8 wide at least
    counted = counter.get_total_flops() - relative_positions
    assert bench.encoder_flops("vit_t", 1) == pytest.approx(counted, rel=0.02)
    assert bench.encoder_flops("vit_t", 3) == 3 * bench.encoder_flops("vit_t", 1)

def test_bench_gara(capsys):
    assert run_cli(bench.main, "gara", "--backbone", "vit_t", "--rounds", 2, "--device", "cpu") == 0
    text = capsys.readouterr().out
    assert "median of 2 " in text
    rows = bench_rows(text)
    for method in gara.METHODS:
        count = sum(value.numel() for value in gara.adapter_state(tiny(method)).values())
        assert rows[method][-2:] == [f"{count:,}", f"{4 * count / 1e6:.1f}"]
    for rank in (4, 24, 52):
        milliseconds, _, difference = rows[f"rank {rank}: gated_linear"]
        assert float(milliseconds) > 0
        assert float(difference) < 1e-4
        assert float(rows[f"rank {rank}: x A m B by autograd"][0]) > 0
    for name in ("SAM", *(f"GaRA, {count} of 48 components" for count in (48, 24, 1)), "GaRA per window"):
        assert float(rows[name][0]) > 0

def test_bench_step(capsys):
    assert run_cli(bench.main, "step", "--backbone", "vit_t", "--rounds", 1, "--device", "cpu") == 0
    rows = bench_rows(capsys.readouterr().out)
    for method in ("LoRA 16", "GaRA", "GaRA per window"):
        assert float(rows[f"{method}, bfloat16"][0]) > 0
        assert float(rows[f"{method}, float32"][0]) > 0

def test_gates_that_are_set_open():
    model, x = tiny("gara").eval(), pictures(0, 2)
    for count in (48, 24, 1):
        with torch.no_grad():
            bench.open_components(model, count)
        encode(model, x)
        for layer in gara.gates(model):
            assert layer["space"].tolist() == [1, 1]
            assert layer["count"].tolist() == [count] * 2

def test_bench_train_accounts_for_all_the_time(demo, tmp_path, capsys, monkeypatch):
    """The parts of a step are shares of the whole; what sleeps longest is named; nothing is written or trained."""
    monkeypatch.chdir(tmp_path)
    prompts, decode = data.prompts, sam.MaskDecoder.forward
    monkeypatch.setattr(data, "prompts", lambda *a: time.sleep(0.05) or prompts(*a))
    monkeypatch.setattr(sam.MaskDecoder, "forward", lambda *a: time.sleep(0.2) or decode(*a))
    before = everything(demo)
    assert run_cli(bench.main, "train", "--data", demo / "demo", "--checkpoint", demo / "w.pth", "--batch-size", 2,
                   "--device", "cpu") == 0
    rows = bench_rows(capsys.readouterr().out)
    assert 50 <= float(rows["draw prompts"][0]) <= float(rows["all of it"][0])
    parts = ("image encoder, forward", "decoder, forward", "optimizer", "loss and backward")
    step = {name: float(rows[name][0]) for name in parts}
    assert sum(step.values()) == pytest.approx(float(rows["the whole step"][0]), abs=0.1)
    assert step["decoder, forward"] >= 200  # points and boxes, for two images
    assert min(step.values()) > 0
    assert everything(demo) == before
    assert not os.listdir(tmp_path)

def test_bench_corruptions(tmp_path, capsys):
    Image.fromarray(scene(90, 120)).save(tmp_path / "photo.png")
    assert run_cli(bench.main, "corruptions", tmp_path / "photo.png", "--rounds", 1) == 0
    rows = bench_rows(capsys.readouterr().out)
    total = float(rows.pop("all 15")[0])
    assert rows.keys() >= {*CORRUPTIONS}
    assert total == pytest.approx(sum(float(rows[name][0]) for name in CORRUPTIONS), abs=1)

def test_bench_models(demo, tmp_path, capsys, monkeypatch):
    """Table 8 of SAM, an adapter, and predictors of which one fails."""
    monkeypatch.chdir(tmp_path)
    gara.save_adapter(gara.attach(tiny(), "gara"), "gara.pt")
    (tmp_path / "mine.py").write_text("""
import numpy as np

class Nothing:
    def set_image(self, image):
        self.shape = 1, *image.shape[:2]

    def predict(self, multimask_output=True, **prompt):
        return np.zeros(self.shape, bool), None, None

class Broken(Nothing):
    def predict(self, **_):
        return 1 / 0
""")
    assert run_cli(bench.main, "models", "--data", demo / "demo", "--checkpoint", demo / "w.pth", "--ckpt", "gara.pt",
                   "--predictor", "mine.py:Nothing", "mine.py:Broken", "--limit", 2, "--rounds", 2, "--device", "cpu",
                   "--json", "table8.json") == 0
    stored = json.load(open("table8.json"))
    assert stored["heads"][0] == "model"
    rows = {name: cells for name, *cells in stored["rows"]}
    assert len(rows) == 4
    for name, cells in rows.items():
        assert len(cells) == len(stored["heads"]) - 1
    learnable, size, memory, speed = next(cells for name, cells in rows.items() if name.startswith("GaRA"))
    count = sum(value.numel() for value in gara.adapter_state(tiny("gara")).values())
    assert learnable == f"{count:,}"
    assert float(size) == pytest.approx(os.path.getsize("gara.pt") / 1e6, abs=0.1)
    assert float(speed) > 0
    if sys.platform == "linux":
        assert float(memory) > 11  # its weights alone
    assert rows["SAM"][:2] == ["-", "-"]
    assert rows["Nothing"][:3] == ["-", "-", "-"]
    assert "ZeroDivisionError" in rows["Broken"][-1]
    text = capsys.readouterr().out
    assert "times as long" in text
    assert bench_rows(text)["SAM"] == rows["SAM"]

@pytest.mark.parametrize("arguments, words", [
    ([], ["sam"]), (["what"], ["what"]), (["sam", "--what"], ["--what"]), (["sam", "--batch", "0"], ["--batch"]),
    (["sam", "--rounds", "0"], ["--rounds"]), (["sam", "--device", "nonsense"], ["--device"]),
    (["sam", "--device", "cuda:99"], ["--device"]), (["sam", "photo.jpg"], ["photo.jpg"]),
    (["sam", "--backbone", "vit_t", "--against", "none.py:x"], ["--against", "none.py"]),
    (["sam", "--backbone", "vit_t", "--against", "other.py:absent"], ["--against", "no_such_module"]),
    (["gara", "--batch", "0"], ["--batch"]), (["gara", "--rounds", "0"], ["--rounds"]),
    (["train"], ["--data"]), (["train", "--data", "none"], ["none"]), (["train", "--data", "x", "--steps", "0"], ["steps"]),
    (["corruptions"], ["photo"]), (["corruptions", "none.jpg"], ["none.jpg"]),
    (["corruptions", "tiny.png"], ["tiny.png", "ValueError"]),
    (["models"], ["--data"]), (["models", "--data", "none"], ["none"]),
    (["models", "--data", "x", "--limit", "0"], ["--limit"])])
def test_mistakes_at_a_bench_end_in_one_line(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.py").write_text(OTHER_SAM)
    Image.fromarray(scene(9, 12)).save("tiny.png")
    before = everything(tmp_path)
    assert run_cli(bench.main, *arguments) == 2
    assert one_error(capsys, *words)
    assert everything(tmp_path) == before

def test_bench_runs_from_anywhere(tmp_path):
    Image.fromarray(scene(90, 120)).save(tmp_path / "photo.png")
    command = [sys.executable, bench.__file__, "corruptions", "photo.png", "--rounds", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fog" in done.stdout

def test_importing_others_needs_none_of_them(tmp_path, monkeypatch):
    """Their packages are imported when a model is asked for; `Restored` needs none."""
    import others
    monkeypatch.chdir(tmp_path)
    model = tiny()
    monkeypatch.setattr(sam, "build_sam", lambda backbone, checkpoint: model)
    restored, plain = others.Restored(), sam.SamPredictor(model)
    restored.set_image(scene())
    plain.set_image(scene())
    assert torch.equal(restored.predictor.features.cpu(), plain.features)  # its network changes nothing
    for name in ("HQ_SAM", "RobustSAM"):
        with refused("No module named", kind=ImportError):
            getattr(others, name)()
