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
No network or GPU is needed. Everything takes under four minutes on two slow cores.
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
    rng, channel = np.random.default_rng(0), np.arange(3, dtype=np.float32)
    rows = np.arange(height, dtype=np.float32)[:, None, None]
    columns = np.arange(width, dtype=np.float32)[:, None]
    image = 40 * (np.sin(columns / 37 + channel) + np.cos(rows / 23 - channel)) + 128
    for _ in range(12):
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        radius = rng.uniform(10, min(height, width) / 4)
        inside = (rows - cy) ** 2 + (columns - cx) ** 2 < radius ** 2
        image[inside[..., 0]] = rng.uniform(0, 255, 3)
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
    embedding, expected = golden.get_image_embedding()[0], GOLDEN["embedding"]
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

def calls_of(monkeypatch, owner, name):
    """The arguments of each call of a function: a list that grows."""
    calls, function = [], getattr(owner, name)

    def noted(*arguments):
        calls.append(arguments)
        return function(*arguments)

    monkeypatch.setattr(owner, name, noted)
    return calls

@pytest.fixture
def onednn_calls(monkeypatch):
    assert sam.onednn_agrees()  # asked before calls are counted
    return calls_of(monkeypatch, torch.ops.mkldnn, "_linear_pointwise")

@X86
@torch.no_grad()
@pytest.mark.parametrize("layout", [lambda gaps: gaps, lambda gaps: gaps.clone(), lambda gaps: gaps.T.clone().T])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (65, 130), (1, 1), (0, 5), (3, 0)])
def test_linear_in_double_precision(onednn_calls, shape, layout):
    """The matrix product by oneDNN, whatever the layout of weight and bias; of nothing by PyTorch."""
    rng, inputs = torch.Generator().manual_seed(0), shape[-1]
    x = torch.randn(shape, generator=rng)
    weight = torch.randn(9, 2 * inputs, generator=rng)
    weight = layout(weight[:, :inputs])
    bias = torch.randn(9, 2, generator=rng)[:, 0]
    expected = x.double() @ weight.T.double() + bias.double()
    found = sam.linear(x, weight, bias)
    assert found.shape == expected.shape
    tolerance = 1e-6 * max(1, inputs ** 0.5)
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=tolerance)
    assert len(onednn_calls) == (x.numel() > 0)

@X86
def test_linear_leaves_to_pytorch_what_is_not_plain_float32_inference(onednn_calls, monkeypatch):
    """Of other types there is no private call, and its derivatives would be 0."""
    x, weight, along = torch.randn(3, 5), torch.randn(4, 5, requires_grad=True), torch.randn(3, 5)
    sam.linear(x, weight).sum().backward()
    assert close(weight.grad, x.sum(0).expand(4, -1))
    with torch.no_grad():
        assert sam.linear(x.double(), weight.double()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert sam.linear(x, weight).dtype == torch.bfloat16
        each = torch.func.vmap(lambda row: sam.linear(row, weight))(x)
        assert close(each, x @ weight.T)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, along)
            tangent = torch.autograd.forward_ad.unpack_dual(sam.linear(dual, weight)).tangent
        assert close(tangent, along @ weight.T)
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
        sam.linear(x, weight)
    assert not onednn_calls

@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # of the trace: that sizes are constants in it
def test_encoder_can_be_traced():
    model, x = tiny(), pictures(0)
    traced = torch.jit.trace(model.image_encoder, (x,), check_trace=False)
    assert close(traced(x.flip(2)), model.image_encoder(x.flip(2)), 1e-5)

@torch.no_grad()
@pytest.mark.parametrize("calls", [
    dict(),
    dict(_linear_pointwise=lambda *_: torch.ones(2) @ torch.ones(3)),  # an error
    dict(_linear_pointwise=lambda x, weight, *_: x @ weight.T + 1)])
def test_linear_without_the_private_call(monkeypatch, calls):
    """Where PyTorch lacks it, or it does something else, F.linear serves."""
    monkeypatch.setattr(torch.ops, "mkldnn", argparse.Namespace(**calls))
    monkeypatch.setattr(sam, "onednn_agrees", functools.cache(sam.onednn_agrees.__wrapped__))
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    assert not sam.onednn_serves(x)
    assert close(sam.linear(x, weight), x @ weight.T)

def same_with_gradients(found, expected, inputs):
    """Equal to rounding, and so is what comes back to each input, which is not zero."""
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-12)
    gradients = torch.autograd.grad(found.square().sum(), inputs)
    expected_gradients = torch.autograd.grad(expected.square().sum(), inputs)
    for gradient, plain in zip(gradients, expected_gradients):
        assert plain.abs().max() > 1e-3
        assert torch.allclose(gradient, plain, atol=1e-10)

def attention_inputs(U, S, Q, c):
    """q, k, v, bias_h and bias_w of U heads of windows."""
    torch.manual_seed(0)
    shapes = (U, Q, c), (U, S * S, c), (U, S * S, c), (U, Q, S), (U, Q, S)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("form", [sam.attention, sam.RecomputedAttention.apply, sam.attention_for_gpus])
def test_forms_of_attention_equal_its_formula(form, heads):
    """Pixel by pixel: softmax(q k / sqrt(c) + bias of the key's row + bias of its column) v; and its gradients."""
    inputs = attention_inputs(heads, S=4, Q=16, c=8)
    q, k, v, bias_h, bias_w = inputs
    scores = []
    for key in range(16):
        score = (q * k[:, key, None]).sum(-1) / math.sqrt(8)
        scores.append(score + bias_h[..., key // 4] + bias_w[..., key % 4])
    scores = torch.stack(scores, dim=-1)
    expected = torch.einsum("uqk,ukc->uqc", scores.softmax(-1), v)
    same_with_gradients(form(*inputs), expected, inputs)

def test_gradients_of_attention_by_finite_differences():
    assert torch.autograd.gradcheck(sam.RecomputedAttention.apply, attention_inputs(U=2, S=2, Q=5, c=2))

def test_gradients_of_attention_in_half_precision():
    """As near to double precision as bfloat16 allows: autograd through the formula is no nearer."""
    def gradients(form, dtype):
        some = [tensor.detach().bfloat16().to(dtype).requires_grad_() for tensor in inputs]
        return torch.autograd.grad(form(*some).double().square().sum(), some)

    inputs = attention_inputs(U=3, S=14, Q=196, c=8)
    recomputed = gradients(sam.RecomputedAttention.apply, torch.bfloat16)
    plain, exact = gradients(sam.attention, torch.bfloat16), gradients(sam.attention, torch.double)
    for found, of_plain, expected in zip(recomputed, plain, exact):
        assert found.dtype == torch.bfloat16
        assert close(found, expected, 2e-2)
        assert (found - expected).norm() <= 1.2 * (of_plain - expected).norm()

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
    """Some heads of windows at a time, some queries of one, a single query, whose scores are the least there is. The
    last windows reach beyond the image; the positions' tables have gradients as well."""
    layer, x = attention_layer(window, device)
    monkeypatch.setitem(sam.SCORES_AT_ONCE, device, most)
    pieces = layer(x)
    calls = calls_of(monkeypatch, sam, "attention_shares")
    with torch.no_grad():
        assert close(layer(x), pieces, 1e-12)
    if device == "cpu":
        sizes = [len(q) * q.shape[1] * k.shape[1] for q, k, *_ in calls]
        assert most / 2 < max(sizes) <= max(most, calls[0][1].shape[1])
    monkeypatch.setitem(sam.SCORES_AT_ONCE, device, 10**9)
    monkeypatch.setattr(sam.RecomputedAttention, "apply", sam.attention)
    same_with_gradients(pieces, layer(x), (x, *layer.parameters()))

def test_attention_under_transforms():
    """torch.func sees the plain form; a second derivative is refused."""
    layer, x = attention_layer(4)
    gradient, = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    found = torch.func.grad(lambda x: layer(x).sin().sum())(x.detach())
    assert close(found, gradient, 1e-10)

@pytest.mark.parametrize("images", [1, 3])
def test_attention_between_tokens_and_image_is_the_plain_form(images):
    """Of 3 x 5 tokens and a 7 x 7 image, one for all or one each."""
    torch.manual_seed(0)
    layer = sam.DecoderAttention(16, 4, downsample=2).double()
    tokens = torch.randn(3, 5, 16, dtype=torch.float64)
    image = torch.randn(images, 49, 16, dtype=torch.float64)
    places, keys = image.flip(1), tokens.flip(1)
    each_image, each_place = image.expand(3, -1, -1), places.expand(3, -1, -1)
    expected = layer(tokens, each_place, each_image)
    assert close(layer.tokens_to_image(tokens, places, image), expected, 1e-12)
    expected = image + layer(each_place, keys, tokens)
    assert close(layer.image_to_tokens(image, places, keys, tokens), expected, 1e-12)

def test_upscaling_pixel_by_pixel_is_the_transposed_convolution():
    decoder = tiny().mask_decoder
    pixels, kernels = torch.randn(2, 6 * 6, 128), torch.randn(2, 3, 16)
    upscaled = decoder.output_upscaling(pixels.mT.reshape(2, 128, 6, 6))  # (2, 16, 24, 24)
    expected = torch.einsum("pchw,pmc->pmhw", upscaled, kernels)
    assert close(decoder.upscale(pixels, kernels), expected, 1e-5)

@pytest.mark.parametrize("images, more", [
    (1, dict()),
    (7, dict(masks=torch.linspace(-5, 5, 7 * 64 * 64).view(7, 1, 64, 64))),
    (3, dict(image_index=torch.tensor([0, 2, 1, 1, 0, 2, 2])))])
def test_many_prompts_in_parts_are_as_in_one(monkeypatch, images, more):
    """Of one image, of an image each, and with the image's index."""
    model = tiny()
    embeddings = encode(model, pictures(*range(images)))
    corners, _ = torch.rand(7, 4).sort()
    whole = model.decode(embeddings, boxes=128 * corners, **more)
    monkeypatch.setitem(sam.TOKENS_AT_ONCE, "cpu", 2 * 256)  # two prompts at a time, then one
    parts = model.decode(embeddings, boxes=128 * corners, **more)
    for part, expected in zip(parts, whole):
        assert close(part, expected, 1e-5)

POINT = dict(point_coords=[[3, 4]], point_labels=[1])

@pytest.fixture
def predictor():
    predictor = sam.SamPredictor(tiny())
    predictor.set_image(scene(96, 128))
    return predictor

def predicted(model, image, **arguments):
    """Masks, scores and low-resolution logits for one prompt."""
    predictor = sam.SamPredictor(model)
    predictor.set_image(image)
    return predictor.predict(**arguments)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.double])
def test_prediction_in_another_precision(predictor, dtype):
    """Points, boxes and mask prompts as in float32; what comes back is float32."""
    prompt = POINT | dict(box=[10, 10, 60, 70], mask_input=torch.randn(1, 64, 64))
    masks, scores, low_res = predictor.predict(**prompt)
    found = predicted(tiny().to(dtype), scene(96, 128), **prompt)
    assert (found[0] == masks).mean() > 0.98
    assert close(found[1], scores, 0.1)
    assert close(found[2], low_res, 0.1)
    assert found[2].dtype == np.float32

def test_batched_forward_equals_predictor():
    predictor = sam.SamPredictor(tiny())
    points = dict(point_coords=torch.tensor([[[20., 30]], [[60, 70]]]), point_labels=torch.ones(2, 1))
    box = dict(boxes=torch.tensor([[3., 5, 28, 100]]), mask_inputs=torch.randn(1, 1, 64, 64))
    batch, expected = [], []
    for image, prompt in ((scene(96, 128), points), (scene(200, 50), box)):
        predictor.set_image(image)
        arguments = [prompt.get(key) for key in ("point_coords", "point_labels", "boxes", "mask_inputs")]
        expected.append(predictor.predict_torch(*arguments))
        scaled = torch.tensor(predictor.transform.apply_image(image))
        batch.append(dict(image=scaled.permute(2, 0, 1), original_size=image.shape[:2], **prompt))
    with torch.no_grad():
        outputs = predictor.model(batch, multimask_output=True)
    for output, (masks, scores, low_res) in zip(outputs, expected):
        assert close(output["low_res_logits"], low_res)
        assert close(output["iou_predictions"], scores)
        assert (output["masks"] == masks).float().mean() > 0.999

@pytest.mark.parametrize("height, width, count", [(97, 131, 3), (3000, 1, 1), (1, 3000, 1), (1, 1, 3)])
def test_predictor_takes_any_size(height, width, count):
    image = np.full((height, width, 3), 77, np.uint8)
    masks, _, low_res = predicted(tiny(), image, **POINT, multimask_output=count == 3)
    assert masks.shape == (count, height, width)
    assert low_res.shape == (count, 64, 64)
    assert np.isfinite(low_res).all()

def test_halves_are_rounded_up_where_an_image_is_scaled():
    resize = sam.ResizeLongestSide(128)
    assert resize.get_preprocess_shape(256, 5) == (128, 3)

@pytest.mark.parametrize("size", [(96, 128), (96, 120)])
def test_predictor_takes_views_and_bgr(predictor, size):
    """Turned over, with every second pixel, the channels in reverse; scaled or not."""
    image = scene(*size)
    wide = image[::-1, :, ::-1].repeat(2, axis=1)
    predictor.set_image(image)
    expected = predictor.get_image_embedding()
    predictor.set_image(wide[::-1, ::2], image_format="BGR")
    assert torch.equal(predictor.get_image_embedding(), expected)

@pytest.mark.parametrize("masks", [None, torch.zeros(0, 1, 64, 64)])
def test_no_prompts_give_no_masks(predictor, masks):
    found, _, low_res = predictor.predict_torch(None, None, torch.zeros(0, 4), masks)
    assert found.shape == (0, 3, 96, 128)
    assert low_res.shape == (0, 3, 64, 64)

def test_a_predictor_without_an_image(predictor):
    predictor.reset_image()
    for ask in (predictor.get_image_embedding, predictor.predict, lambda: predictor.predict_torch(None, None)):
        with refused("set_image", kind=RuntimeError):
            ask()

@pytest.mark.parametrize("method, arguments, words", [
    ("predict", dict(point_coords=[[3, 4]]), "point_labels"),
    ("predict", POINT | dict(point_coords=[[np.nan, 4]]), "NaN"),
    ("predict", POINT | dict(point_labels=[-0.5]), "-0.5"),
    ("predict", dict(box=[1, 2, 3]), "box"),
    ("predict", POINT | dict(mask_input=np.zeros((1, 63, 64))), "(1, 64, 64)"),
    ("set_image", dict(image=scene() / 255), "float64 (120, 160, 3)"),
    ("set_image", dict(image=np.zeros((9, 9, 4), np.uint8)), "(9, 9, 4)"),
    ("set_image", dict(image=np.zeros((0, 9, 3), np.uint8)), "(0, 9, 3)"),
    ("set_image", dict(image=scene(), image_format="RGBA"), "RGBA"),
    ("set_torch_image", dict(transformed_image=torch.zeros(1, 3, 99, 90), original_image_size=(99, 90)), "128")])
def test_what_the_predictor_refuses(predictor, method, arguments, words):
    with refused(words):
        getattr(predictor, method)(**arguments)
    assert predictor.predict(**POINT)[0].shape == (3, 96, 128)  # the next prompt is answered

def test_positions_are_interpolated_to_another_image_size():
    """A plane stays one, and a line stays one."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    plane, line = y + 3 * x, torch.linspace(-1, 1, 31)
    weights = dict(absolute=plane[None, :, :, None], relative=line[:, None])
    like = dict(absolute=torch.zeros(1, 8, 8, 1), relative=torch.zeros(15, 1))
    small = sam.resize_positions(weights, like)
    middle = small["absolute"][0, 2:6, 2:6, 0]  # away from the rim, where the filter lacks neighbours
    expected = 2 * y + 0.5 + 3 * (2 * x + 0.5)  # each new token lies between two old ones
    assert torch.allclose(middle, expected[2:6, 2:6], atol=1e-3)
    slopes = small["relative"].diff(dim=0)
    slope = torch.tensor(2 / 30 * 31 / 15)
    assert torch.allclose(slopes[2:-2], slope, atol=1e-5)

def test_gradients_flow_except_in_the_predictor(predictor):
    model, mask = predictor.model, torch.randn(1, 1, 64, 64)
    points = torch.tensor([[[9., 9]]]), torch.tensor([[1]])
    low_res, scores = model.decode(model.image_encoder(pictures(0)), points, masks=mask, multimask_output=True)
    (low_res.square().sum() + scores.sum()).backward()
    # What one object point, a mask and three outputs leave out: other labels, "no mask", the mask for clear prompts;
    # and biases that move all scores of a token alike.
    unused = r"point_embeddings\.[023]|no_mask_embed|hypernetworks_mlps\.0|token_to_image\.k_proj\.bias"
    for name, parameter in model.named_parameters():
        if not re.search(unused, name):
            assert parameter.grad.any(), name
    assert not predictor.predict_torch(*points, mask_input=mask)[2].requires_grad

# ---- Automatic masks ------------------------------------------------------------------------------------------------

# golden.json's "everything": arguments, and of each record that official SamAutomaticMaskGenerator gave for shipped()
# and scene(128, 128): point, bbox, crop_box, area, predicted IoU, stability.

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

def test_records_are_what_the_predictor_says_of_their_points():
    image, model = scene(97, 150), tiny("gara")
    predictor = sam.SamPredictor(model)
    predictor.set_image(image)
    records = find(image, model, pred_iou_thresh=0, box_nms_thresh=1)
    assert records
    for record in records:
        logits, scores, _ = predictor.predict(record["point_coords"], [1], return_logits=True)
        which = np.abs(scores - record["predicted_iou"]).argmin()
        assert scores[which] == pytest.approx(record["predicted_iou"], abs=1e-4)
        logits = logits[which]
        assert (record["segmentation"] != (logits > 0)).sum() <= 1
        stability = (logits > 1).sum() / (logits > -1).sum()
        assert record["stability_score"] == pytest.approx(stability, abs=1e-2)

def test_forms_of_masks():
    masks = find(scene())
    assert len(masks) > 3
    for form, kind in (("uncompressed_rle", list), ("coco_rle", str)):
        for record, mask in zip(find(scene(), output_mode=form), masks):
            assert type(record["segmentation"]["counts"]) is kind
            assert np.array_equal(data.rle_decode(record["segmentation"]), mask["segmentation"])

@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_suppression_against_loops(threshold):
    rng = np.random.default_rng(0)
    boxes = rng.integers(0, 12, (200, 4))
    scores = rng.integers(0, 20, 200)  # with ties
    masks = torch.zeros(200, 24, 24)
    for mask, (x, y, width, height) in zip(masks, boxes):
        mask[y:y + height, x:x + width] = 1
    common = masks.flatten(1) @ masks.flatten(1).T
    areas = common.diagonal()
    iou = common / (areas[:, None] + areas - common)
    kept = []
    for k in np.argsort(-scores, stable=True):
        if not (iou[k, kept].double() > threshold).any():
            kept.append(k)
    records = [dict(bbox=box) for box in boxes.tolist()]
    assert sam.suppress(records, scores, threshold) == [records[k] for k in kept]

def test_where_nothing_is_found_there_are_no_records():
    assert find(scene(), pred_iou_thresh=2, crop_n_layers=1, min_mask_region_area=9) == []

@pytest.mark.parametrize("layer", [0, 1, 2])
def test_crops_overlap_and_cover_the_image(layer):
    crops = sam.SamAutomaticMaskGenerator(shipped()).crops(layer, 97, 301)
    assert len(crops) == 4 ** layer
    times = np.zeros((97, 301), int)
    for x, y, width, height in crops:
        assert times[y:y + height, x:x + width].shape == (height, width)  # lies within
        times[y:y + height, x:x + width] += 1
    assert times.min() == 1
    assert times.max() == min(4, len(crops))  # in corners

@pytest.mark.parametrize("box, expected", [
    ([121, 150, 30, 30], False),
    ([120, 150, 30, 30], True),
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
    mask[9, 4:10] = expected[9, 4:10] = False  # a hole of the least area, 6, stays
    small = np.zeros((20, 20), bool)
    small[18:20, 1:3] = True  # all there is
    records = [dict(sam.pack(each), name=k) for k, each in enumerate((mask, small, expected))]
    generator = sam.SamAutomaticMaskGenerator(shipped(), min_mask_region_area=6)
    tidied = generator.tidy(records, (20, 20))
    assert tidied == [records[2], records[1]]  # what was whole goes first and suppresses what has become the same
    for record, after in zip(records, (expected, small, expected)):
        assert np.array_equal(sam.unpack(record, (20, 20)), after)

def test_points_of_ones_own_in_the_image_and_each_crop():
    counts, grids = [], [np.array([[0.25, 0.5]]), np.array([[0.5, 0.5], [0.1, 0.2]])]
    generator = sam.SamAutomaticMaskGenerator(shipped(), crop_n_layers=1, point_grids=grids)
    generator.generate(scene(), counts.append)
    assert sum(counts) == 1 + 4 * 2

def test_settings_of_automatic_masks_that_make_no_sense():
    with refused("png"):
        sam.SamAutomaticMaskGenerator(shipped(), output_mode="png")
    with refused("layer 2"):
        sam.SamAutomaticMaskGenerator(shipped(), 2, crop_n_layers=2, crop_n_points_downscale_factor=2)

def test_names_that_the_official_onnx_model_uses():
    encoder, decoder = shipped().prompt_encoder, shipped().mask_decoder
    assert encoder.embed_dim == 128
    assert encoder.num_point_embeddings == 4
    assert encoder.input_image_size == (128, 128)
    assert encoder.image_embedding_size == (16, 16)
    assert encoder.mask_input_size == (64, 64)
    assert decoder.num_mask_tokens == 4
    xy = torch.rand(3, 2)
    assert torch.equal(encoder.pe_layer._pe_encoding(xy), encoder.pe_layer(xy))

# ---- SAM: files and command line ------------------------------------------------------------------------------------

POS_EMBED, BIAS = "image_encoder.pos_embed", "mask_decoder.iou_prediction_head.layers.2.bias"

def prefixed(prefix):
    return {prefix + key: value for key, value in tiny_weights().items()}

@pytest.mark.parametrize("content", [
    lambda: dict(model=tiny_weights(), epoch=3, args=argparse.Namespace(lr=0.1), best=np.float64(3), rng=np.ones(2)),
    lambda: dict(sam=dict(state_dict=prefixed("module.")), training={})])
@pytest.mark.parametrize("zipped, checksums", [(True, True), (True, False), (False, True)])
def test_checkpoints_in_the_forms_of_training_scripts(tmp_path, content, zipped, checksums):
    torch.serialization.set_crc32_options(checksums)
    try:
        torch.save(content(), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(dict(sam.build_sam("vit_t", tmp_path / "w.pth").state_dict()), tiny_weights())

@pytest.mark.parametrize("content, words", [
    (b"<html>404 not found</html>\n" * 9, "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    (b'\x10\0\0\0\0\0\0\0{"__metadata__":{}}', "a safetensors file"),
    (torch.nn.Linear(1, 1), "a whole pickled model"),
    (dict(format="gara-sam adapter 3"), "an adapter, not a SAM checkpoint"),
    ({"model": {POS_EMBED: torch.ones(2)}}, "not a SAM checkpoint"),
    (lambda w: w.update({5: torch.ones(1)}), "not a SAM checkpoint"),
    (lambda w: w.pop(BIAS), f"lacks '{BIAS}'"),
    (lambda w: w.update({BIAS: 3}), BIAS),
    (lambda w: w.update({BIAS: torch.ones(4).int()}), BIAS),
    (lambda w: w.update({BIAS: torch.ones(4).to_sparse()}), BIAS),
    (lambda w: w.update({BIAS: torch.ones(4, device="meta")}), BIAS),
    (lambda w: w.update({"sam_hq.\nweight": torch.ones(1)}), "unknown key 'sam_hq."),
    (lambda w: w.update({BIAS: torch.ones(5)}), f"{BIAS} has shape (5,)"),
    (lambda w: w[POS_EMBED].view(-1)[7:8].fill_(math.inf), f"{POS_EMBED} holds NaN or infinite")])
def test_checkpoints_that_are_refused(tmp_path, content, words):
    path = tmp_path / "w.pth"
    if type(content).__name__ == "function":
        weights = {key: value.clone() for key, value in tiny_weights().items()}
        content(weights)
        content = weights
    torch.save(content, path)
    if isinstance(content, bytes):
        path.write_bytes(content)
    with refused("w.pth", words, kind=sam.CheckpointError):
        sam.build_sam("vit_t", path)

def test_models_that_cannot_be_built(tmp_path):
    torch.save(tiny_weights(), tmp_path / "w.pth")
    with refused("vit_t", "not vit_b", kind=sam.CheckpointError):
        sam.build_sam("vit_b", tmp_path / "w.pth")
    with refused("none.pth", kind=FileNotFoundError):
        sam.build_sam("vit_t", tmp_path / "none.pth")
    with refused("vit_g", "vit_t, vit_b, vit_l, vit_h"):
        sam.build_sam("vit_g")
    for size in (60, 8, 8192):
        with refused("image size", str(size)):
            sam.build_sam("vit_t", image_size=size)

def test_damage_in_weights_is_noticed(tmp_path):
    """The end cut off or emptied, or a bit flipped; or there is none: what was read is what was written."""
    path, weights = tmp_path / "w.pt", dict(a=torch.arange(300.0), b=dict(c=torch.ones(30).half(), d=[1, "two"]))
    torch.save(weights, path)
    content, copies, noticed = path.read_bytes(), [], 0
    for end in range(0, len(content), 100):
        copies.append(content[:end])
        copies.append(content[:end].ljust(len(content), b"\0"))
    flips = np.random.default_rng(0).integers(8 * len(content), size=100).tolist()
    listed = content.rindex(b"PK\1\2", 0, content.rindex(b"/data/"))  # where the zip file lists its last tensor
    for flip in (*flips, *range(8 * listed, 8 * listed + 8 * 46)):
        copies.append(bytearray(content))
        copies[-1][flip // 8] ^= 1 << flip % 8
    for copy in copies:
        path.write_bytes(copy)
        try:
            assert same(sam.read_weights(path), weights)
        except sam.CheckpointError as error:
            assert len(str(error).splitlines()) == 1
            noticed += 1
    assert noticed > 100

SIX_BYTES = b"HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\n"
WHOLE, CUT, SILENT = SIX_BYTES + b"weight", SIX_BYTES + b"wei", SIX_BYTES + b"w"

class Server(http.server.BaseHTTPRequestHandler):
    """Sends its server's `answer`, and then ends; or waits, if this is SILENT, until the other side does."""
    timeout = 5

    def do_GET(self):
        self.server.asked.append(self.path)
        self.wfile.write(self.server.answer)
        if self.server.answer == SILENT:
            self.rfile.read(1)

@pytest.fixture
def download(tmp_path, monkeypatch):
    """The server, on this machine, from which find_checkpoint("vit_b") loads b"weight", called in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(sam, "PATIENCE", 0.3)
    checksum = hashlib.sha256(b"weight").hexdigest()
    monkeypatch.setitem(sam.FILES, "vit_b", f"sam_vit_none_{checksum[:6]}.pth")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        monkeypatch.setattr(sam, "URL", f"http://127.0.0.1:{server.server_port}/")
        server.asked, server.answer = [], WHOLE
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()

@pytest.mark.parametrize("answer, words", [
    (SILENT, "timed out"),
    (CUT, "hash"),
    (b"hello\n", "hello"),
    (b"HTTP/1.0 404 Not Found\r\n\r\n", "404"),
    (b"HTTP/1.0 200 OK\r\nContent-Length: many\r\n\r\n", "many")])
def test_downloads_that_fail(download, tmp_path, answer, words):
    """In one line, soon, and a second try finds nothing in its way; nor does one after a kill."""
    download.answer = answer
    with refused("could not download sam_vit_none", words, "checkpoints/", kind=FileNotFoundError):
        sam.find_checkpoint("vit_b")
    assert everything(tmp_path) == {}
    (tmp_path / "hub" / "checkpoints" / "sam_vit_b.pth.0123.partial").write_bytes(b"wei")
    download.answer = WHOLE
    assert pathlib.Path(sam.find_checkpoint("vit_b")).read_bytes() == b"weight"
    assert len(everything(tmp_path)) == 1

def test_several_processes_download_once(download):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(sam.find_checkpoint, ["vit_b"] * 4))
    assert len(paths) == 1
    assert len(download.asked) == 1

def test_sam_needs_no_other_file_of_the_project(monkeypatch):
    """But for its command line."""
    for name in ("data", "gara", "corruptions", "train", "evaluate", "assets"):
        monkeypatch.setitem(sys.modules, name, None)  # cannot be imported
    build_sam = sam.from_file(f"{sam.__file__}:build_sam", "--sam")
    predictor = build_sam.__globals__["SamPredictor"](build_sam("vit_t"))
    predictor.set_image(scene())
    assert predictor.predict(**POINT)[0].shape == (3, 120, 160)

@pytest.fixture
def tiny_files(tmp_path, monkeypatch):
    """An image, photo.png, and a vit_t checkpoint in the working folder: the arguments that name the latter."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(scene(60, 90)).save("photo.png")
    torch.save(tiny_weights(), "w.pth")
    return ["--backbone", "vit_t", "--checkpoint", "w.pth", "--out", "o.png"]

@pytest.mark.parametrize("method, arguments, prompt", [
    (None, "--point 40,30", dict(point_coords=[[40, 30]], point_labels=[1])),
    ("gara", "--point 40,30 --point 5,9,0 --box 3,3,80,50 --adapter a.pt", dict(
        point_coords=[[40, 30], [5, 9]], point_labels=[1, 0], box=[3, 3, 80, 50], multimask_output=False))])
def test_sam_command_line_equals_predictor(tiny_files, capsys, method, arguments, prompt):
    model = tiny(method)
    if method:
        gara.save_adapter(model, "a.pt")
    assert run_cli(sam.main, "photo.png", *tiny_files, "--mask", "m.png", *arguments.split()) == 0
    masks, scores, _ = predicted(model, scene(60, 90), **prompt)
    best = masks[scores.argmax()]
    assert 0 < best.sum() < best.size
    assert np.array_equal(np.asarray(Image.open("m.png")), best * np.uint8(255))
    assert f"{best.sum():,} pixels" in capsys.readouterr().out
    plain, _, _ = predicted(tiny(), scene(60, 90), **prompt)
    assert (method is None) == np.array_equal(plain, masks)  # the adapter acts
    assert Image.open("o.png").size == (90, 60)

def test_everything_from_the_command_line(tiny_files, capsys):
    arguments = "photo.png --backbone vit_t --out o.png --json m.json --everything"
    settings = "--points-per-side 5 --pred-iou-thresh 0.6 --stability-score-thresh 0.4"
    assert run_cli(sam.main, *arguments.split(), *settings.split()) == 0
    with open("m.json") as file:
        assert json.load(file) == find(scene(60, 90), output_mode="coco_rle")
    assert "25/25" in capsys.readouterr().err
    mask = find(scene(60, 90))[0]["segmentation"]
    drawn = np.asarray(Image.open("o.png")) != scene(60, 90)
    assert drawn[mask].any(1).mean() > 0.9

@pytest.mark.parametrize("arguments, words", [
    ("photo.png", "say what to segment"),
    ("photo.png --point 1", "--point takes"),
    ("photo.png --point 90,10", "90,10 lies outside photo.png"),
    ("photo.png --point nan,3", "nan,3 lies outside"),
    ("photo.png --point 1,1,0.5", "point_labels"),
    ("photo.png --box 50,5,40,9", "x0 < x1"),
    ("photo.png --box 1,2,91,9", "91,9 lies outside"),
    ("w.pth --point 1,1", "w.pth"),
    ("none.png --point 1,1", "none.png"),
    ("photo.png --point 1,1 --what", "--what"),
    ("photo.png --point 1,1 --backbone vit_b", "w.pth holds vit_t"),
    ("photo.png --point 1,1 --adapter w.pth", "w.pth"),
    ("photo.png --point 1,1 --out no/o.png", "no/o.png"),
    ("photo.png --point 1,1 --json m.json", "--json goes with"),
    ("photo.png --point 1,1 --device nonsense", "nonsense"),
    ("photo.png --point 1,1 --device cuda:99", "CUDA"),
    ("photo.png --everything --point 1,1", "--everything takes no"),
    ("photo.png --everything --points-per-side 0", "points_per_side 0")])
def test_mistakes_at_sam_end_in_one_line(tmp_path, tiny_files, capsys, arguments, words):
    before = everything(tmp_path)
    assert run_cli(sam.main, *tiny_files, *arguments.split()) == 2
    assert one_error(capsys, words)
    assert everything(tmp_path) == before

# ---- GaRA: the operation --------------------------------------------------------------------------------------------

def operands(sizes=None, dtype=torch.float64, device="cpu", update=1.0):
    """x, weight, bias, A, B, mask for gated_linear, random but always the same: G matrices of o rows (of a single one
    without the leading 1), and N images with `tokens` of width d; per_token: each has its own mask."""
    size = dict(N=2, tokens=(5,), d=4, o=3, r=6, G=3, per_token=False) | (sizes or {})
    N, tokens, d, o, r, G, per_token = size.values()
    matrices = () if G == 1 else (G,)
    rng = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        values = scale * torch.randn(shape, generator=rng, dtype=torch.float64)
        return values.to(device, dtype).requires_grad_()

    x = draw(N, *tokens, d)
    weight = draw(G * o, d, scale=d ** -0.5)
    bias = draw(G * o)
    A = draw(*matrices, r, d, scale=d ** -0.5)
    B = draw(*matrices, o, r, scale=update * r ** -0.5)
    mask = draw(N, *tokens, r) if per_token else draw(N, r)
    return [x, weight, bias, A, B, mask]

def plain_gated_linear(x, weight, bias, A, B, mask):
    """Equation 7, which builds the weights of each token."""
    tokens, masks = x.flatten(0, -2), mask.flatten(0, -2)
    masks = masks.repeat_interleave(len(tokens) // len(masks), 0)  # one of each image, or of each token already
    A, B = A.reshape(-1, *A.shape[-2:]), B.reshape(-1, *B.shape[-2:])
    updates = torch.einsum("gor, tr, grd -> tgod", B, masks, A).flatten(1, 2)
    y = torch.einsum("tod, td -> to", weight + updates, tokens) + bias
    return y.view(*x.shape[:-1], -1)

@pytest.mark.parametrize("form", ["merged", "factored", "cheaper"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes, dtype, tolerance", [
    (dict(), torch.float64, 1e-12),
    (dict(G=1, N=1, tokens=(1,), r=9), torch.float64, 1e-12),
    (dict(N=3, tokens=(8, 8), d=96, o=96, r=40), torch.float32, 1e-5),
    (dict(tokens=(2, 3), r=1, per_token=True), torch.float64, 1e-12)])
def test_gated_linear_is_equation_7(monkeypatch, form, device, sizes, dtype, tolerance):
    """In values; in gradients, all at once and each alone; and without gradients, where some components are closed,
    those of image 1 all."""
    monkeypatch.setattr(gara, "FORM", form)
    tolerance = max(tolerance, 1e-4 if device == "cuda" else 0)
    exact, inputs = operands(sizes), operands(sizes, dtype, device)
    y, expected = gara.gated_linear(*inputs), plain_gated_linear(*exact)
    assert y.dtype == dtype
    assert close(y, expected, tolerance)

    dy = expected.detach() * torch.ones_like(expected).cos()
    wanted = torch.autograd.grad(expected, exact, dy)
    found = torch.autograd.grad(y, inputs, dy.to(y))
    for i, want in enumerate(wanted):
        alone = [t.detach().requires_grad_(k == i) for k, t in enumerate(inputs)]
        gara.gated_linear(*alone).backward(dy.to(y))
        assert [k for k, t in enumerate(alone) if t.grad is not None] == [i]
        assert close(alone[i].grad, want, tolerance)
        assert close(found[i], want, tolerance)
        assert found[i].dtype == dtype

    closed = torch.arange(exact[-1].numel()).view_as(exact[-1]) % 3 > 0
    closed[1:2] = True
    with torch.no_grad():
        exact[-1].masked_fill_(closed, 0)
        inputs[-1].masked_fill_(closed.to(device), 0)
        assert close(gara.gated_linear(*inputs), plain_gated_linear(*exact), tolerance)

def test_gated_linear_refuses_operands_that_do_not_fit():
    x, weight, bias, A, B, mask = operands()
    for rest in ((A, B, mask[:1]), (A, B[:, :2], mask), (A[:2], B, mask), (A, B, mask[:, None].expand(-1, 4, -1))):
        with refused("do not fit"):
            gara.gated_linear(x, weight, bias, *rest)

WIDE = dict(N=2, tokens=(64,), d=96, o=96, r=16)

@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_gated_linear_under_autocast(device, per_token):
    """bfloat16 is close to float32 in values and gradients, and parameters keep float32 gradients."""
    inputs = operands(WIDE | dict(per_token=per_token), torch.float32, device)
    expected = gara.gated_linear(*inputs)
    with torch.autocast(device, torch.bfloat16):
        y = gara.gated_linear(*inputs)
    assert y.dtype == torch.bfloat16
    assert close(y, expected, 0.02)
    wanted = torch.autograd.grad(expected, inputs, expected)
    found = torch.autograd.grad(y, inputs, expected.bfloat16())
    for got, want in zip(found, wanted):
        assert got.dtype == torch.float32
        assert (got - want).norm() < 0.02 * want.norm()

def test_small_updates_survive_autocast():
    """An update of W / 10,000 lies far below bfloat16's resolution (1/256), but is there on average over outputs."""
    x, weight, bias, A, B, mask = operands(WIDE, torch.float32, update=1e-4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        seen = gara.gated_linear(x, weight, bias, A, B, mask).float()
        seen -= gara.gated_linear(x, weight, bias, A, 0 * B, mask).float()
    plain = plain_gated_linear(x, weight, bias, A, 0 * B, mask)
    true = plain_gated_linear(x, weight, bias, A, B, mask) - plain
    assert true.norm() < 3e-4 * plain.norm()
    assert ((seen * true).sum() / true.square().sum()).item() == pytest.approx(1, abs=0.3)

def test_gated_linear_compiles_to_one_graph():
    inputs = operands(dict(tokens=(7,), d=8, o=8), torch.float32)
    compiled = torch.compile(gara.gated_linear, fullgraph=True, backend="aot_eager")  # which needs no C++ compiler
    y, expected = compiled(*inputs), gara.gated_linear(*inputs)
    assert close(y, expected)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    for got, want in zip(torch.autograd.grad(y.square().sum(), inputs), wanted):
        assert close(got, want)

# ---- GaRA: the gates ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.1, 3])
def test_gumbel_sigmoid_by_its_noise(temperature):
    """G = -log(E), E exponential: 1[z + G > 0], with chance 1 - exp(-exp(z)) at any temperature, within four sigma;
    the gradient is that of sigmoid((z + G) / T). Without training 1[z > 0]."""
    logits = torch.tensor([-3.0, 0, 1], dtype=torch.float64)[:, None].expand(3, 100_000).clone().requires_grad_()
    torch.manual_seed(2)
    out = gara.gumbel_sigmoid(logits, temperature)
    grad, = torch.autograd.grad(out.sum(), logits)
    torch.manual_seed(2)
    noisy = logits.detach() - torch.empty_like(logits).exponential_().log()
    s = 1 / (1 + torch.exp(-noisy / temperature))
    assert torch.equal(out.detach(), (noisy > 0).double())
    assert torch.allclose(grad, s * (1 - s) / temperature, rtol=1e-9, atol=1e-12)
    p = 1 - torch.exp(-torch.exp(logits.detach()[:, 0]))
    assert ((out.mean(1) - p).abs() < 4 * (p * (1 - p) / 100_000).sqrt()).all()
    assert gara.gumbel_sigmoid(torch.tensor([-1e-9, 0, 1e-9]), temperature, training=False).tolist() == [0, 0, 1]

def by_hand(layer, tokens):
    """GaRA on tokens (n, 160) that decide together, from the gates' raw logits: y (n, 480), the space chosen."""
    h = tokens.sum(0) / len(tokens)
    z_L, z_H, z_space = (g(h) for g in (layer.gate.g_L, layer.gate.g_H, layer.gate.g_space))
    space = int(z_space > 0)
    m = (torch.cat([z_L, z_H]) > 0).float()
    m[:4] *= 1 - space
    m[4:] *= space
    W, b = layer.weight.unflatten(0, (3, 160)), layer.bias.view(3, 160)
    qkv = [tokens @ W[i].T + b[i] + (tokens @ layer.A[i].T * m) @ layer.B[i].T for i in range(3)]
    return torch.cat(qkv, 1), space

@pytest.mark.parametrize("scope, index, height, width", [
    ("image", 0, 16, 16), ("window", 1, 16, 16),  # layer 1 has no windows
    ("window", 0, 16, 16), ("window", 0, 12, 20)])
def test_one_layer_by_hand(scope, index, height, width):
    """Equations 2 to 7 for an image or, where windows decide, for each window, of which the last may be cut off."""
    layer, rng = gara.adapters(tiny("gara", scope=scope))[index], torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 3, 160, generator=rng).repeat_interleave(8, 1).repeat_interleave(8, 2)  # windows that differ
    x = x[:, :height, :width] + torch.randn(6, height, width, 160, generator=rng)
    with torch.no_grad():
        y = layer(x)
    spaces = layer.space.flatten().tolist()
    side = 8 if (scope, index) == ("window", 0) else 16
    corners = itertools.product(range(6), range(0, height, side), range(0, width, side))
    for (n, top, left), space in zip(corners, spaces, strict=True):
        cut = n, slice(top, top + side), slice(left, left + side)
        expected, chosen = by_hand(layer, x[cut].flatten(0, 1))
        assert close(y[cut].flatten(0, 1), expected)
        assert chosen == space
    assert set(spaces) == {0, 1}

@pytest.mark.parametrize("scope", gara.SCOPES)
def test_random_gates_are_fair_coins_of_each_image(scope):
    """In evaluation as well: others in another image or layer, the same for the same one."""
    model = tiny("gara_random", scope=scope)
    images = torch.rand(30, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    encode(model, images)
    layers = gara.gates(model)
    for layer in layers:
        vectors, high = layer["vector"].view(-1, 52), layer["space"].flatten() == 1
        assert abs(high.float().mean() - 0.5) < 4 * math.sqrt(0.25 / len(high))
        assert abs(vectors[high, 4:].float().mean() - 0.5) < 4 * math.sqrt(0.25 / (24 * len(high)))
        assert not vectors[high, :4].any()
        assert not vectors[~high, 4:].any()
    assert not torch.equal(layers[1]["vector"], layers[3]["vector"])  # both decide for whole images
    encode(model, images[20:21])
    for again, layer in zip(gara.gates(model), layers):
        assert torch.equal(again["vector"][0], layer["vector"][20])

@pytest.mark.parametrize("method, options, ranks", [
    ("gara", dict(scope="window"), (4, 48)), ("gara_space", {}, (4, 48)), ("lora", {}, (4,)),
    ("moe_lora", dict(scope="window"), (1, 4, 24, 48))])
@pytest.mark.parametrize("training", [False, True])
def test_gates_report_every_layer(method, options, ranks, training):
    """Where windows decide, row by row; of the last pass. All methods but GaRA open one of the sets, as a whole."""
    model, chosen = tiny(method, **options).train(training), set()
    with refused("attach", "encode", kind=RuntimeError):
        gara.gates(model)
    encode(model, pictures(4))
    encode(model, pictures(0, 1, 2))
    for i, (layer, adapter) in enumerate(zip(gara.gates(model), gara.adapters(model), strict=True)):
        decisions = (3, 4) if adapter.window else (3,)
        assert layer["layer"] == i
        assert layer["space"].shape == decisions
        assert torch.equal(layer["vector"], adapter.mask.view(*decisions, sum(ranks)) == 1)
        assert torch.equal(layer["count"], layer["vector"].sum(-1))
        chosen |= set(layer["space"].flatten().tolist())
        if method != "gara":
            set_of = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
            assert torch.equal(layer["vector"], layer["space"][..., None] == set_of)
    assert len(chosen) > 1 or method == "lora"

KINDS = pytest.mark.parametrize("method, options", [
    *itertools.product(gara.METHODS, [{}]), ("gara", dict(scope="window"))])

@KINDS
def test_evaluation_is_free_of_noise_and_image_by_image(method, options):
    model = tiny(method, **options)
    first, other = encode(model, pictures(0, 1, 2)), encode(model, pictures(0, 3, 2))
    assert torch.equal(other[::2], first[::2])
    assert not close(other[1], first[1], 1e-2)
    assert close(encode(model, pictures(2)), first[2:], 1e-4)

@KINDS
@pytest.mark.parametrize("device", DEVICES)
def test_training_draws_noise_and_its_gradient_reaches_every_gate(device, method, options):
    model, x = tiny(method, **options).train().to(device), pictures(0, 1, 2, 3).to(device)
    for gate in [layer.gate for layer in gara.adapters(model) if method in ("gara", "gara_space")]:
        gate.g_space[-1].weight.data *= 0.1  # each set of components is chosen by every second image or so
        gate.g_space[-1].bias.data.fill_(-0.4)
    torch.manual_seed(0)
    first = model.image_encoder(x)
    (first.square().sum() + model.image_encoder(x).square().sum()).backward()
    learnable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in learnable.items() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for name, p in model.named_parameters() if name not in learnable)
    assert close(encode(model, x), first, 1e-3) == (method == "lora")
    torch.manual_seed(0)
    assert close(encode(model, x), first, 1e-4)

# ---- GaRA: on a SAM -------------------------------------------------------------------------------------------------

@KINDS
def test_attach_changes_nothing_until_trained_and_detach_takes_it_off(method, options):
    model, x = tiny(), pictures(0, 1, 2)
    names, plain = list(model.state_dict()), encode(model, x)
    assert gara.attach(model, method, **options) is model
    learnable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learnable.isdisjoint(names)
    assert all(re.search(r"\.attn\.qkv\.(A|B|gate\.)", name) for name in learnable)
    assert torch.equal(encode(model.train(), x), plain)
    assert torch.equal(encode(model.eval(), x), plain)
    with refused(method, "detach"):
        gara.attach(model, "gara")

    assert not close(encode(train_by_chance(model), x), plain, 1e-2)
    assert gara.detach(model) is model
    assert torch.equal(encode(model, x), plain)
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    gara.attach(model, method)  # and again

@pytest.mark.parametrize("window", [0, 14])
def test_attach_is_bit_equal_at_the_size_of_vit_b(window):
    linear, x = sam.Linear(768, 2304), torch.randn(1, 64, 64, 768)
    adapter = gara.Adapter(linear, gara.GaraGate(768, 16, 256, 0.5), window)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(adapter(x), linear(x))

@pytest.mark.parametrize("backbone, method, count", [
    ("vit_b", "gara", 15_989_196), ("vit_l", "gara", 42_595_224),  # both are the paper's
    ("vit_b", "gara_flat", 12 * (6 * 768 * 16 + 769 * 16 + 17 * 16 + 17 * 16)),
    ("vit_h", "gara_space", 32 * (6 * 1280 * (16 + 256) + 1281 * 64 + 65)),
    ("vit_b", "gara_random", 12 * 6 * 768 * (16 + 256)), ("vit_b", "lora", 12 * 6 * 768 * 16),
    ("vit_t", "moe_lora", 6 * (6 * 160 * (1 + 4 + 24 + 48) + 161 * 64 + 65 * 4))])
def test_parameter_counts(backbone, method, count):
    """In each layer A and B of q, k and v, and the gate's MLPs."""
    with torch.device("meta"):
        model = gara.attach(sam.build_sam(backbone), method)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count

@pytest.mark.parametrize("method, options, word", [
    ("dora", {}, "gara, gara_flat, gara_space, gara_random, lora, moe_lora"), ("lora", dict(scope="window"), "scope"),
    ("gara", dict(scope="layer"), "image, window"), ("gara", dict(temperature=0), "temperature"),
    ("gara", dict(temperature=math.nan), "nan"), ("lora", dict(rank=-1), "-1"), ("lora", dict(rank=2.5), "2.5"),
    ("lora", dict(rank=641), "641"), ("moe_lora", dict(experts=()), "()"), ("moe_lora", dict(experts="48"), "48"),
    ("moe_lora", dict(experts=(1, 0)), "(1, 0)"), ("moe_lora", dict(experts=[640] * 3), "1280")])
def test_attach_refuses(method, options, word):
    model = tiny()
    with refused(word):
        gara.attach(model, method, **options)
    assert gara.adapters(model) == []
    assert all(p.requires_grad for p in model.parameters())

# ---- GaRA: adapter files --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, options", [
    ("gara", dict(scope="window")), ("gara_flat", dict(rank=9, temperature=1.5)), ("gara_space", dict(rank_low=2)),
    ("gara_random", {}), ("lora", {}), ("moe_lora", dict(experts=(3, 5)))])
def test_save_and_load_adapter(tmp_path, method, options):
    model, path, x = tiny(method, **options), tmp_path / "a.pt", pictures(0, 1)
    gara.save_adapter(model, path)
    assert os.listdir(tmp_path) == ["a.pt"]
    weights, expected, fresh = torch.load(path, weights_only=True)["weights"], encode(model, x), tiny()
    assert weights.keys() == model.state_dict().keys() - tiny_weights().keys()
    assert path.stat().st_size < 4 * sum(value.numel() for value in weights.values()) + 60_000  # the adapter alone

    gara.load_adapter(fresh, path)
    assert torch.equal(encode(fresh, x), expected)
    assert fresh.adapter == model.adapter
    gara.load_adapter(train_by_chance(fresh, seed=1), path)  # an equal adapter is filled
    assert torch.equal(encode(fresh, x), expected)

def test_metadata_is_read_as_it_was_given_but_plain(tmp_path):
    given = {"state": torch.arange(3), "losses": [0.5, (None, "a")], np.int64(3): np.float32(0.5), "on": np.True_,
             "backwards": np.arange(6)[::-2], "name": np.str_("b")}
    expected = {"state": torch.arange(3), "losses": [0.5, (None, "a")], 3: 0.5, "on": True,
                "backwards": torch.tensor([5, 3, 1]), "name": "b"}
    gara.save_adapter(tiny("lora"), tmp_path / "a.pt", about=given)
    found = gara.load_adapter(tiny(), tmp_path / "a.pt")
    assert repr(found) == repr(dict(about=expected))  # which tells NumPy's numbers from Python's

@pytest.fixture(scope="module")
def adapter_file(tmp_path_factory):
    """The file of an adapter, "gara", which tests only read."""
    path = tmp_path_factory.mktemp("adapter") / "a.pt"
    gara.save_adapter(tiny("gara"), path)
    return path

def test_a_failed_save_keeps_the_old_file(tmp_path):
    model, path = tiny("lora"), tmp_path / "a.pt"
    path.write_text("old")
    for value in (lambda: 1, signal.SIGTERM, {1, 2}, np.array([None]), [Counter]):
        with refused("not saved", "numbers"):
            gara.save_adapter(model, path, about=[value])
    gara.adapters(model)[2].A.data[0, 0, 0] = math.nan
    with refused("blocks.2.attn.qkv.A", "NaN"):
        gara.save_adapter(model, path)
    with refused("attach"):
        gara.save_adapter(tiny(), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.pt"]

@pytest.fixture(scope="module")
def targets():
    """A SAM, and one with an adapter like that of `adapter_file`: tests that leave them as they are share them."""
    models = tiny(), train_by_chance(gara.attach(tiny(), "gara"), seed=1)
    for model in models:
        model.mask_decoder.requires_grad_(False)
    return models

A2 = "image_encoder.blocks.2.attn.qkv.A"

@pytest.mark.parametrize("change, words", [
    (dict(weights={A2 + "2": torch.ones(1)}), A2 + "2"), (dict(weights={"a\nb": torch.ones(1)}), "unknown"),
    (dict(weights={A2: None}), A2), (dict(weights={A2: torch.ones(3, 52, 161)}), A2),
    (dict(weights={A2: torch.ones(3, 52, 160).index_fill(1, torch.tensor(2), math.nan)}), A2),
    (dict(weights={A2: torch.full((3, 52, 160), 1e300, dtype=torch.double)}), A2),
    (dict(method="dora"), "unknown method 'dora'"), (dict(options=dict(rank_low=3)), "wrong shape"),
    (dict(method="moe_lora", options=dict(experts=[640] * 10**4)), "rank"),
    (dict(backbone="vit_b"), "adapts vit_b"), (dict(backbone="vit\ng"), "vit_t, vit_b"),
    (dict(image_size=64), "image size 64"), (dict(image_size=None), "'image_size'"),
    (dict(base=torch.ones(9)), "other vit_t weights"),
    (dict(format="gara-sam adapter 2", base="5d9c"), "other vit_t weights"),
    (dict(format="gara-sam adapter 1"), "train it again"), (dict(format=None), "not an adapter file")])
def test_adapter_files_that_are_refused(adapter_file, targets, tmp_path, change, words):
    """In one line, and the SAM, adapted before or not, is as before, in what it answers and in what may learn."""
    content = torch.load(adapter_file, weights_only=True)
    changed = content | change
    changed["weights"] = content["weights"] | change.get("weights", {})
    torch.save(changed, tmp_path / "a.pt")
    for target in targets:
        before = {key: value.clone() for key, value in target.state_dict().items()}
        learn = [p.requires_grad for p in target.parameters()]
        with refused(words):
            gara.load_adapter(target, tmp_path / "a.pt")
        assert same(dict(target.state_dict()), before)
        assert [p.requires_grad for p in target.parameters()] == learn

ODD = [None, True, -1, 0, 10**12, math.nan, math.inf, 1e300, "", "gara", "a\nb", b"x", [], [1, "a"], {}, {1: {}}, (),
       torch.tensor(1), torch.ones(2, 2), torch.empty(0), torch.ones(2).to_sparse(), torch.ones(1).expand(10**9)]

def test_odd_entries_in_adapter_files(adapter_file, tmp_path):
    """At three places in the file each is refused in one line or makes no difference to SAM."""
    target, rng, refusals = tiny(), np.random.default_rng(0), 0
    for value, part in itertools.product(ODD, ("", "options", "weights")):
        content = torch.load(adapter_file, weights_only=True)
        node = content[part] if part else content
        node[rng.choice(list(node))] = value
        torch.save(content, tmp_path / "a.pt")
        try:
            gara.load_adapter(target, tmp_path / "a.pt")
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
            refusals += 1
        gara.detach(target)
        assert same(dict(target.state_dict()), tiny_weights())
    assert refusals > 50

@pytest.mark.parametrize("method, options, words", [
    ("gara", dict(rank_high=8), ["detach"]), ("lora", {}, ["lora", "detach"]),
    ("gara", dict(scope="window"), ["window", "detach"])])
def test_adapters_are_filled_by_equal_ones_only(adapter_file, method, options, words):
    with refused(*words):
        gara.load_adapter(tiny(method, **options), adapter_file)

@pytest.mark.parametrize("there, here", [
    (torch.float32, torch.float16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_the_base_is_known_in_any_precision(tmp_path, there, here):
    gara.save_adapter(gara.attach(tiny().to(there).float(), "lora"), tmp_path / "a.pt")
    model = tiny().to(here).float()
    gara.load_adapter(model, tmp_path / "a.pt")
    gara.detach(model).image_encoder.blocks[1].mlp.lin1.weight.data *= 1.02
    with refused("other vit_t weights"):
        gara.load_adapter(model, tmp_path / "a.pt")

def test_the_base_is_known_at_another_image_size(tmp_path, monkeypatch):
    """Where positions are interpolated, which another CPU rounds otherwise."""
    torch.save(tiny_weights(), tmp_path / "w.pth")
    gara.save_adapter(gara.attach(sam.build_sam("vit_t", tmp_path / "w.pth", 64), "lora"), tmp_path / "a.pt")
    exact = torch.nn.functional.interpolate
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda *a, **k: exact(*a, **k) * 1.02)
    other = sam.build_sam("vit_t", tmp_path / "w.pth", 64)
    gara.load_adapter(other, tmp_path / "a.pt")
    assert gara.fingerprint(other) == gara.fingerprint(tiny())

EARLIER_DIGEST = "d4f2499fa47113bb"  # of tiny(), positions included, by the code that wrote the earlier format

def test_adapters_of_the_earlier_format_load(adapter_file, tmp_path):
    content = torch.load(adapter_file, weights_only=True)
    torch.save(content | dict(format="gara-sam adapter 2", base=EARLIER_DIGEST), tmp_path / "a.pt")
    gara.load_adapter(tiny(), tmp_path / "a.pt")

# ---- GaRA: export and merging ---------------------------------------------------------------------------------------

def graph(path):
    """What a file that `export` wrote computes, as a function of arrays."""
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return lambda *arrays: [output.numpy() for output in module(*map(torch.from_numpy, arrays))]
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))

@pytest.fixture(scope="module", params=["pt2", "onnx"])
def exported(request, tmp_path_factory):
    """An adapted SAM, and the graphs of its two halves that `python gara.py export` wrote."""
    folder, scope = tmp_path_factory.mktemp("exported"), "window"
    if request.param == "onnx":
        scope = "image"
        pytest.importorskip("onnxscript")
    model = tiny("gara", scope=scope)
    torch.save(tiny_weights(), folder / "w.pth")
    gara.save_adapter(model, folder / "a.pt")
    encoder, decoder = folder / f"e.{request.param}", folder / f"d.{request.param}"
    assert run_cli(gara.main, "export", folder / "a.pt", "--checkpoint", folder / "w.pth", "--out", encoder,
                   "--decoder", decoder, "--return-single-mask") == 0
    assert set(os.listdir(folder)) == {"a.pt", "w.pth", encoder.name, decoder.name}
    return model, graph(encoder), graph(decoder)

def test_exported_encoders_decide_for_each_image(exported):
    model, encoder, _ = exported
    decisions = set()
    for seed in range(4):
        embedding, gates = encoder(pictures(seed).numpy())
        assert close(embedding, encode(model, pictures(seed)), 1e-4)
        vectors = [layer["vector"].flatten(0, -2) for layer in gara.gates(model)]
        assert np.array_equal(gates[0], torch.cat(vectors))
        decisions.add(gates.tobytes())
    assert len(decisions) > 1

@pytest.mark.parametrize("method", [method for method in gara.METHODS if method != "gara_random"])
def test_gates_of_every_method_have_a_graph(method):
    gate, h = gara.adapters(tiny(method).eval())[0].gate, torch.randn(9, 1, 160)
    found = torch.export.export(gate, (h[0],)).module()
    for image in h:
        assert same(dict(enumerate(found(image))), dict(enumerate(gate(image))))

ONE_POINT = dict(point_coords=[[40, 30]], point_labels=[1])

@pytest.mark.parametrize("size, points, labels, prompt", [
    ((60, 90), [[40, 30], [0, 0]], [1, -1], ONE_POINT),
    ((99, 80), [[40, 30], [3, 3], [80, 50]], [1, 2, 3], ONE_POINT | dict(box=[3, 3, 80, 50], multimask_output=False)),
    ((77, 77), [[3, 3], [60, 50]], [2, 3], dict(box=[3, 3, 60, 50], mask_input=np.full((1, 64, 64), -3)))])
def test_exported_decoders_have_the_official_inputs_and_outputs(exported, size, points, labels, prompt):
    """The graph chooses one of the masks; Decoder, of which it is made, gives four, that of clear prompts first."""
    from assets.export import Decoder

    model, _, decoder = exported
    predictor = sam.SamPredictor(model)
    predictor.set_image(scene(*size))
    expected = predictor.predict(**prompt, return_logits=True)
    best = expected[1].argmax()
    these = slice(0, 1) if len(points) > 2 else slice(1, 4)

    coords = predictor.transform.apply_coords(points, size)
    mask = prompt.get("mask_input", np.zeros((1, 64, 64)))
    prompts = coords[None], [labels], [mask], ["mask_input" in prompt], size
    inputs = [predictor.features.numpy(), *map(np.float32, prompts)]
    every = Decoder(model)(*map(torch.from_numpy, inputs))
    for one, four, want in zip(decoder(*inputs), every, expected, strict=True):
        assert close(one[0], want[best:best + 1], 1e-4)
        assert close(four[0, these], want, 1e-4)

@pytest.mark.parametrize("size", [128, 64])
def test_lora_merges_into_a_plain_checkpoint(tiny_files, size):
    """Of all tensors only qkv's weights change: not the positions either, which at size 64 are interpolated."""
    model = train_by_chance(gara.attach(sam.build_sam("vit_t", "w.pth", size), "lora"))
    gara.save_adapter(model, "a.pt")
    assert run_cli(gara.main, "merge", "a.pt", "--checkpoint", "w.pth", "--out", "m.pth") == 0
    merged, x = sam.build_sam("vit_t", "m.pth", size), pictures(0, 1)[..., :size, :size]
    assert close(encode(merged, x), encode(model, x))
    weights = sam.read_checkpoint("m.pth", "vit_t")
    changed = [key for key, value in tiny_weights().items() if not torch.equal(weights[key], value)]
    assert changed == [f"image_encoder.blocks.{i}.attn.qkv.weight" for i in range(6)]

@pytest.mark.parametrize("task, method, words, message", [
    ("merge", "gara", "--out m.pth", "depend on the image"), ("merge", "lora", "--out none/m.pth", "none"),
    ("merge", "lora", "--out m.pth --decoder d.pt2", "--decoder"), ("merge", "lora", "", "--out"),
    ("merge", "lora", "--out m.pth --checkpoint none.pth", "none.pth"),
    ("export", "gara_random", "--out e.pt2", "gara_random"), ("export", "gara", "--out e.pth", "FILE.onnx"),
    ("export", "gara", "--out none/e.pt2", "no folder none"),
    ("export", "gara", "--out e.pt2 --decoder ./e.pt2", "same file"),
    ("export", "gara", "--out e.pt2 --decoder d.onnx", "pip install onnx onnxscript")])
def test_mistakes_at_gara_end_in_one_line(tiny_files, monkeypatch, capsys, task, method, words, message):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else found(name))
    gara.save_adapter(tiny(method), "a.pt")
    assert run_cli(gara.main, task, "a.pt", "--checkpoint", "w.pth", *words.split()) == 2
    assert one_error(capsys, message)
    assert sorted(os.listdir()) == ["a.pt", "photo.png", "w.pth"]

@pytest.mark.parametrize("task, out", [("export", "e.pt2"), ("merge", "m.pth")])
def test_nothing_is_half_written(tiny_files, monkeypatch, capsys, task, out):
    def full(content, path):
        pathlib.Path(path).write_bytes(b"half")
        raise OSError("no space left")

    gara.save_adapter(tiny("lora"), "a.pt")
    pathlib.Path(out).write_bytes(b"old")
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: argparse.Namespace(run_decompositions=dict))
    monkeypatch.setattr(torch.export, "save", full)
    monkeypatch.setattr(torch, "save", full)
    assert run_cli(gara.main, task, "a.pt", "--checkpoint", "w.pth", "--out", out) == 2
    assert one_error(capsys, "no space left")
    assert pathlib.Path(out).read_bytes() == b"old"
    assert sorted(os.listdir()) == sorted(["a.pt", "photo.png", "w.pth", out])

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
""".strip()
RANGES = {name: ends for name, *ends in map(str.split, MEASURED.split("\n"))}
ALL = [*RANGES, *OTHERS]

def flat(level, height=96, width=128):
    return np.full((height, width, 3), level, np.uint8)

def draws(name, seed):
    """The generator that corrupt(_, name, seed) hands to its function."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])

def test_registry():
    assert list(CORRUPTIONS) == list(RANGES)
    assert list(data.CONDITIONS) == ["clear", *RANGES]

@pytest.mark.parametrize("name", ALL)
def test_corruption_contract(name):
    """Same arguments, same pixels; the input survives; layout of the memory is irrelevant; any size will do."""
    image = scene(40, 52)
    before = image.copy()
    image.flags.writeable = False
    out = corrupt(image, name, seed=3)
    assert out.dtype == np.uint8
    assert out.flags.writeable
    assert not np.shares_memory(out, image)
    assert np.array_equal(image, before)

    np.random.seed(0)  # the global generator plays no part
    strided = image.repeat(2, 1)[:, ::2]
    assert np.array_equal(out, corrupt(np.asfortranarray(image), name, seed=3))
    assert np.array_equal(out, corrupt(strided, name, seed=np.int64(3), strength=1))

    for shape, strength in itertools.product([(16, 16), (16, 200), (200, 16), (17, 23)], (0.3, 1, 2)):
        for image in (scene(*shape), flat(0, *shape), flat(255, *shape)):
            with np.errstate(all="raise", under="ignore", divide="ignore"):
                assert corrupt(image, name, 1, strength).shape == image.shape

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
    assert np.array_equal(corrupt(image, name, 5, 0), image)
    assert not np.shares_memory(corrupt(image, name, 5, 0), image)
    change = []
    for strength in (1e-6, 0.02, 0.1, 0.3, 0.6, 1, 1.01, 1.5, 2):
        outs = np.stack([corrupt(image, name, seed, strength) for seed in range(4)])
        change.append(abs(outs.astype(float) - image).mean((1, 2, 3)))
    mean = np.mean(change, 1)
    assert mean[1] < 0.15 * mean[5] + 1
    assert mean[8] > 1.05 * mean[5] > 0
    assert np.diff(mean).min() > -0.02 * mean[5] - 0.02  # whole pixels (resampling) and qualities (JPEG) ripple
    assert (change[6] < 1.1 * change[5] + 0.1).all()  # no jump beyond 1

@pytest.mark.parametrize("arguments, clue", [
    ((scene(), "snowy"), "snow, fog, rain"), ((scene(), ["fog"]), "snow, fog"), (("photo.jpg", "fog"), "str"),
    ((scene().astype(np.float32), "fog"), "float32"), ((scene()[..., 0], "fog"), "(120, 160)"),
    ((scene(15, 99), "fog"), "99x15"), ((scene(), "fog", 1.5), "1.5"), ((scene(), "fog", 0, "1"), "'1'"),
    ((scene(), "fog", 0, -0.1), "-0.1"), ((scene(), "fog", 0, 10.1), "10.1"), ((scene(), "fog", 0, math.nan), "nan")])
def test_corruptions_refuse(arguments, clue):
    with refused(clue):
        corrupt(*arguments)

def laplacian_variance(image):
    grey = image @ np.array([0.299, 0.587, 0.114])
    return (np.diff(grey, 2, 0)[:, 1:-1] + np.diff(grey, 2, 1)[1:-1]).var()

@pytest.mark.parametrize("name", RANGES)
def test_measured_ranges(name):
    measured = []
    for seed in range(12):
        image = scene(150, 200, seed % 3)
        out = corrupt(image, name, seed)
        error = ((out.astype(float) - image) ** 2).mean()
        psnr = 10 * np.log10(255 ** 2 / max(error, 1e-3))
        sharpness = laplacian_variance(out) / laplacian_variance(image)
        measured.append((out.mean() / image.mean(), out.std() / image.std(), sharpness, psnr))
    low, high = np.array(RANGES[name], float).reshape(4, 2).T
    medians = np.median(measured, 0)
    assert (medians >= low).all()
    assert (medians <= high).all()

@pytest.mark.parametrize("name, low, high, curve", [
    ("brightness", 0.6, 0.8, lambda x, f: f * x), ("impulse_noise", 1.4, 1.5, lambda x, f: f * x),
    ("contrast", 1.6, 1.7, lambda x, f: (x - 128) * f + 128)])
def test_tables_of_levels(name, low, high, curve):
    """One factor for the whole image; every level goes through the closed form."""
    levels = np.arange(256).reshape(16, 16, 1).repeat(3, 2)
    for seed, stops in ((0, 1), (1, 1), (2, 2)):
        factor = draws(name, seed).uniform(low, high) ** stops
        expected = np.floor(curve(levels, factor).clip(0, 255))
        assert np.array_equal(corrupt(levels.astype(np.uint8), name, seed, stops), expected)

@pytest.mark.parametrize("seed, level", [(0, 60), (1, 200)])
def test_underwater_by_its_physics(seed, level):
    """On a flat image: Beer's law for each channel."""
    rng = draws("underwater", seed)
    distance = rng.uniform(1, 2)
    veil = 255 * np.array([0.1, 0.45, 0.5]) * rng.uniform(0.7, 1.1)
    direct = level * np.exp(-distance * np.array([0.9, 0.35, 0.3]))
    expected = direct + veil * (1 - np.exp(-0.6 * distance))
    out = corrupt(flat(level, 200, 200), "underwater", seed)
    assert out.mean((0, 1)) == pytest.approx(np.minimum(expected, 255), rel=0.06)

def test_resampling_is_bilinear():
    image = scene(22, 29)
    planes = torch.from_numpy(corruptions.to_planes(image)[None])
    small = torch.nn.functional.interpolate(planes, (5, 7), mode="bilinear").round()
    large = torch.nn.functional.interpolate(small, (22, 29), mode="bilinear").round()
    difference = abs(corrupt(image, "resampling_blur").transpose(2, 0, 1) - large[0].numpy())
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.99

def test_warp_is_bilinear_and_mirrors_at_the_borders():
    planes = corruptions.to_planes(scene(20, 26))
    dy, dx = np.random.default_rng(0).uniform(-9, 9, (2, 20, 26))
    y, x = np.mgrid[:20, :26]
    grid = np.stack([2 * (x + dx) / 25 - 1, 2 * (y + dy) / 19 - 1], -1)  # from -1 to 1
    sampled = torch.nn.functional.grid_sample(torch.from_numpy(planes[None]).double(), torch.from_numpy(grid[None]),
                                              padding_mode="reflection", align_corners=True)
    assert abs(corruptions.warp(planes, dy, dx) - sampled[0].numpy()).max() <= 0.501

def test_correlate_mirrors_at_the_borders():
    rng = np.random.default_rng(0)
    image, kernel = rng.random((3, 9, 11), np.float32), rng.random((3, 5), np.float32)
    mirrored = torch.nn.functional.pad(torch.from_numpy(image), (2, 2, 1, 1), mode="reflect")
    expected = torch.nn.functional.conv2d(mirrored[:, None], torch.from_numpy(kernel)[None, None])
    assert close(corruptions.correlate(image, kernel), expected[:, 0])

@pytest.mark.parametrize("strength, reach", [(1, 3), (2, 6)])
def test_glass_gathers_within_three_pixels(strength, reach):
    """Give each pixel its own colour: then the output tells where it was read, evenly over the 7x7 neighbours."""
    y, x = np.indices((60, 70))
    image = np.stack([y, x, (y + x) % 7], -1).astype(np.uint8)
    from_y, from_x, check = corrupt(image, "frosted_glass_blur", 1, strength).astype(int).transpose(2, 0, 1)
    assert np.array_equal(check, (from_y + from_x) % 7)  # channels move together
    inner = np.s_[6:-6, 6:-6]
    counts, _, _ = np.histogram2d((from_y - y)[inner].ravel(), (from_x - x)[inner].ravel(), bins=2 * reach + 1)
    chi_squared = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_squared < 1.5 * counts.size

def test_iso_noise_destroys_hue_and_spares_grey():
    assert np.array_equal(corrupt(flat(90), "ISO_noise"), flat(90))  # no contrast, no colour: no noise
    steps = flat(0, 80, 80)
    steps[:, 40:] = (200, 40, 40)
    photons = 0.75 * 60  # gain times the deviation of the HLS lightness, 0 and 120
    black, red = np.split(corrupt(steps, "ISO_noise", 2), 2, axis=1)
    assert black.mean() == pytest.approx(photons, rel=0.1)  # lifts by the Poisson mean ...
    assert black.std() == pytest.approx(np.sqrt(photons), rel=0.1)  # ... and its deviation, without colour
    assert np.ptp(black, axis=-1).max() == 0
    assert np.ptp(red.mean((0, 1))) < 0.2 * 160  # averages towards grey

def test_jpeg_is_encoded_with_red_and_blue_swapped():
    image, file = scene(64, 80), io.BytesIO()
    quality = int(draws("compression", 0).integers(5, 11))
    Image.fromarray(image[..., ::-1].copy()).save(file, "JPEG", quality=quality, subsampling=2)
    expected = np.asarray(Image.open(file))[..., ::-1]
    assert np.array_equal(corrupt(image, "compression", 0), expected)

def test_motion_blur_of_a_point_is_one_straight_line():
    image = flat(0, 75, 75)
    image[37, 37] = 255
    lengths, shifts = [], []
    for seed in range(200):
        out = corrupt(image, "motion_blur", seed)[..., 0]
        taps = np.argwhere(out)
        n = np.ptp(taps, 0).max() + 1
        middle = taps.mean(0)
        assert len(taps) == n  # 8-connected
        assert (out[out > 0] == np.rint(np.float32(255 / n))).all()
        assert np.linalg.svd(taps - middle, compute_uv=False)[1] < 0.5 * np.sqrt(n)  # no tap off the line
        lengths.append(n)
        shifts.append(np.hypot(*(middle - 37)))
    assert np.median(lengths) == pytest.approx(8, abs=2)
    assert np.mean(shifts) == pytest.approx(4.93, abs=0.8)

def test_zoom_blur_identity_draws_and_fixed_centre():
    image = scene(33, 33)
    outs = np.stack([corrupt(image, "zoom_blur", seed) for seed in range(400)])
    untouched = (outs == image).all((1, 2, 3))
    assert untouched.mean() == pytest.approx(0.18, abs=0.06)
    assert abs(outs[:, 16, 16].astype(int) - image[16, 16]).max() <= 1

def test_elastic_displacement():
    """A ramp of one level per pixel turns into a map of horizontal displacement: a plane and a ripple."""
    ramp = np.arange(200, dtype=np.uint8)[None, :, None].repeat(200, 0).repeat(3, 2)
    y, x = np.mgrid[40:160, 40:160].reshape(2, -1)
    plane = np.stack([y, x, np.ones(y.size)], 1)
    total, local = [], []
    for seed in range(12):
        out = corrupt(ramp, "elastic_transform", seed)
        shift = out[y, x, 0].astype(float) - x
        total.append(abs(shift).mean())
        local.append((shift - plane @ np.linalg.lstsq(plane, shift, rcond=None)[0]).std())
    blurred = 100 * np.sqrt(1 / 3) / (20 * np.sqrt(np.pi))  # evenly drawn from -100 to 100, then sigma 10: 1.63 px
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
    once = corrupt(flat(60), "fog", 4)
    twice = corrupt(flat(60), "fog", 4, 2).mean()
    clear = (white - black) / 255  # share of the scene that shines through
    cloud = black / (1 - clear)
    assert clear == pytest.approx(0.37, abs=0.09)
    assert cloud == pytest.approx(230, abs=15)
    assert once.mean() == pytest.approx(black + 60 * clear, abs=1.5)
    assert twice == pytest.approx(cloud + clear ** 2 * (60 - cloud), abs=3)
    assert abs(once - corrupt(flat(60), "fog", 5).astype(float)).mean() > 2

def test_corruption_sheet(tmp_path, monkeypatch, capsys):
    """Of a photo that lies on its side. Mistakes end in one line, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(scene(90, 120)).save("photo.jpg", exif=exif)
    put(tmp_path / "words.jpg", "no image")
    for mistake in ("none.jpg --out x.png", "words.jpg --out x.png", "photo.jpg --out no/x.png",
                    "photo.jpg --out x.what", "photo.jpg --strength nan", "photo.jpg --out x.png --size 31"):
        monkeypatch.setattr(sys, "argv", ["corruptions.py", *mistake.split()])
        assert run_cli(lambda _: corruptions.main()) == 2
        assert re.fullmatch("corruptions.py: .+\n", capsys.readouterr().err)
        assert sorted(os.listdir()) == ["photo.jpg", "words.jpg"]
    monkeypatch.setattr(sys, "argv", "corruptions.py photo.jpg --out sheet.png --size 96".split())
    assert run_cli(lambda _: corruptions.main()) is None
    assert Image.open("sheet.png").height > 4 * 96
    assert sorted(os.listdir()) == ["photo.jpg", "sheet.png", "words.jpg"]

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

@pytest.fixture
def copied(demo, tmp_path):
    """A copy of the demo to spoil, and its training images."""
    shutil.copytree(demo / "demo", tmp_path / "demo")
    shutil.copy(demo / "w.pth", tmp_path)
    return tmp_path, sorted((tmp_path / "demo" / "train" / "clear").iterdir())

def training(demo, out, *more):
    """The words of a short training run."""
    usual = "--device cpu --amp off --workers 0 --batch-size 2 --val-images 1 --steps 6 --val-every 3 --log-every 2"
    words = f"--data {demo / 'demo'} --checkpoint {demo / 'w.pth'} --out {out} {usual}"
    return [*words.split(), *" ".join(map(str, more)).split()]

def run_train(demo, out, *more):
    """Exit code of a short training run."""
    return run_cli(train.main, *training(demo, out, *more))

def settings(demo, *more):
    """The settings of a short training run."""
    return train.parse(training(demo, "out", *more))

def train_refuses(capsys, demo, out, more, *words):
    """train.py ends with one line that holds these words, and writes nothing."""
    out = pathlib.Path(out)
    before = everything(demo) | everything(out)
    capsys.readouterr()
    assert run_train(demo, out, more) == 2
    one_error(capsys, *words)
    assert everything(demo) | everything(out) == before

def log_of(folder, key="step"):
    """The lines of a run's log that have this key."""
    return [line for line in map(json.loads, open(folder / "log.jsonl")) if key in line]

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
        timeless.append([line | dict(images_per_second=0, waiting=0) for line in log_of(folder)])
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
    losses = torch.tensor(list(map(plain_mask_loss, logits, targets)), dtype=torch.float64)
    assert close(train.mask_loss(logits, targets), losses, 1e-10)
    assert torch.autograd.gradcheck(lambda z: train.mask_loss(z, targets), logits.requires_grad_())

def test_mask_iou_by_hand():
    logits, targets = torch.tensor([[[[9., 9, -9]], [[-9, -9, -9]]], [[[1, 0.4, 0.6]], [[0, 0, 0]]]])
    assert train.mask_iou(logits, targets).tolist() == pytest.approx([1 / 3, 0])

def test_learning_rate_in_closed_form():
    """Of 40 steps, two of warm-up, then 38 of half a cosine."""
    rates = [train.learning_rate(step, 40, 2.0) for step in (0, 1, 2, 21, 39)]
    assert rates == pytest.approx([1, 2, 2, 1, 1 + math.cos(math.pi * 37 / 38)])
    assert [train.learning_rate(step, 40, 2.0, "constant") for step in (0, 1, 39)] == [1, 2, 2]

@pytest.mark.parametrize("backbone, lr", dict(vit_t=1e-3, vit_b=1e-4, vit_l=1e-5, vit_h=1e-5).items())
def test_default_settings(backbone, lr):
    settings = vars(train.parse(["--data", "x", "--backbone", backbone]))
    paper = dict(batch_size=8, weight_decay=1e-5, temperature=0.5, rank_low=16, rank_high=256)
    assert settings["lr"] == lr
    assert backbone == "vit_t" or settings | paper == settings

# Examples.

def examples_of(dataset, count=10**6, **recipe):
    usual = dict(conditions=data.CONDITIONS, image_size=128, patch=8)
    return train.Examples(dataset, count, train.Recipe(**usual | recipe))

def test_examples_depend_on_their_number_alone(demo):
    dataset = data.load_dataset(demo / "demo", "train")
    examples = examples_of(dataset, 9)
    forwards = [examples[i] for i in range(9)]
    for i in reversed(range(9)):
        assert same(examples_of(dataset)[i], forwards[i])
    assert not same(examples_of(dataset, seed=1)[0], forwards[0])
    assert {example["name"] for example in forwards[:6]} == {sample.name for sample in dataset}  # each image once
    batched = itertools.chain(*train.batches(examples, 1, 3, 2))  # from the second on, by two workers
    for example, expected in zip(batched, forwards[3:], strict=True):
        assert same(example, expected)

def blank(masks, name="blank"):
    """A sample that costs nothing to read, with these masks."""
    image = np.zeros((*masks.shape[1:], 3), np.uint8)
    return argparse.Namespace(pinned=None, name=name, source=f"{name}.npy", image=lambda *_, **__: image,
                              masks=lambda: masks)

@pytest.mark.parametrize("scale, tolerance", [(1, 0.5 / 255 + 1e-9), (2, 0.3)])
def test_examples_agree_with_their_masks(scale, tolerance):
    """A target's pixel is the mean of 2 x 2 pixels of the model's, padding too; scaling smooths outlines a little."""
    side, width = 128 * scale, 100 * scale
    squares = np.random.default_rng(0).random((3, 16, 16)) > 0.5
    masks = squares.repeat(side // 16, 1).repeat(side // 16, 2)[:, :, :width]
    padded = np.pad(masks, ((0, 0), (0, 0), (0, side - width)))
    means = padded.reshape(3, 64, 2 * scale, 64, 2 * scale).mean((2, 4))
    example = examples_of([blank(masks)], masks_per_image=6)[0]
    assert example["image"].shape == (3, 128, 100)
    assert example["labels"].tolist() == [[1, 1, 1]] * 6
    seen = set()
    for target, points, box in zip(example["targets"], example["points"], example["boxes"]):
        error = np.abs(means - target.numpy() / 255)
        k = int(error.mean((1, 2)).argmin())
        seen.add(k)
        assert error[k].max() <= tolerance
        assert error[k].mean() < 0.05
        x, y = (points * scale).round().int().T
        assert masks[k, y, x].all()
        y, x = np.nonzero(masks[k])
        assert (box * scale).round().tolist() == [x.min(), y.min(), x.max(), y.max()]
    assert seen == {0, 1, 2}  # all objects, some twice

def test_no_target_is_empty():
    """Masks that are too small for the model to see are left out; an image with no other counts as a bad file."""
    masks = np.zeros((3, 480, 640), bool)
    masks[0, 0, 0] = masks[1, 100:200, 50:90] = masks[2, 479, 639] = True
    assert (examples_of([blank(masks)])[0]["targets"] > 0).flatten(1).any(1).all()
    examples = examples_of([blank(masks[::2], "dust"), blank(masks, "good")])
    assert [examples[i]["name"] for i in range(2)] == ["good", "good"]
    errors = examples[0]["errors"] + examples[1]["errors"]
    assert ["dust.npy" in str(error) for error in errors] == [True]

def conditions_of(count, **recipe):
    examples = examples_of([blank(np.ones((1, 128, 128), bool))], **recipe)
    return [examples[i]["condition"] for i in range(count)]

def test_conditions_are_drawn_evenly():
    drawn = conditions_of(320)
    deals = [drawn[k:k + 16] for k in range(0, 320, 16)]
    assert [sorted(deal) for deal in deals] == [sorted(data.CONDITIONS)] * 20
    assert len({deal[0] for deal in deals}) > 5  # in another order each time

def test_the_chance_of_a_clear_image():
    drawn = Counter(conditions_of(200, clear=0.5, conditions=["fog", "rain"]))
    assert 70 <= drawn.pop("clear") <= 130
    assert drawn.keys() == {"fog", "rain"}
    assert set(conditions_of(99, clear=1)) == {"clear"}
    assert "clear" not in conditions_of(99, clear=0)

def test_training_degrades_anew_unless_told_to_use_what_is_stored(copied):
    """All stored images are white. Made on the fly, an image has other noise in each epoch."""
    folder, images = copied
    os.makedirs(folder / "demo" / "train" / "fog")
    for path in images:
        Image.new("RGB", Image.open(path).size, "white").save(folder / "demo" / "train" / "fog" / path.name)
    dataset = data.load_dataset(folder / "demo", "train")
    stored = train.examples_of(dataset, settings(folder, "--conditions fog --stored"), 1)
    assert stored[0]["image"].float().mean() > 250
    fresh = train.examples_of([dataset[0]], settings(folder, "--conditions fog"), 1)
    assert fresh[0]["image"].float().mean() < 250
    assert not torch.equal(fresh[0]["image"], fresh[1]["image"])

# A run and its files.

FILES = [".lock", "curve.png", "gara.pt", "last.pt", "log.jsonl", "run.json"]

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

@pytest.fixture
def ended(finished, tmp_path):
    """A copy of the finished run's folder."""
    shutil.copytree(finished[0], tmp_path / "ended")
    return tmp_path / "ended"

def mean_of_16_conditions(iou):
    degraded, clear = iou["point degraded"] + iou["box degraded"], iou["point clear"] + iou["box clear"]
    return (15 * degraded + clear) / 32

def test_training_writes_its_files(finished):
    folder = finished[0]
    assert sorted(os.listdir(folder)) == FILES
    lines = log_of(folder, "loss")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert {len(line["higher"]) for line in lines} == {6}
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

def test_a_run_says_what_it_was(finished):
    folder, _, model, _ = finished
    content = json.load(open(folder / "run.json"))
    assert content["versions"]["torch"] == torch.__version__
    assert [part["images"] for part in content["data"]] == [6, 2]
    assert content["learnable_parameters"] == sum(value.numel() for value in gara.adapter_state(model).values())

def test_odd_names_and_images_do_not_end_a_run(copied, capsys):
    """A name that is not UTF-8, masks that are cut short, extreme shapes; and the largest seed."""
    folder, images = copied
    masks = folder / "demo" / "train" / "masks"
    for path, size in zip(images[2:], [(16, 400), (1, 200), (300, 2)]):
        Image.fromarray(np.zeros(size, np.uint8)).save(path)
        np.save(masks / f"{path.stem}.npy", np.ones((1, *size), bool))
    strange = os.fsdecode(b"\xff\xe9")
    for path in folder.glob("demo/*/*/*_00001.*"):
        path.rename(path.with_stem(strange))
    (masks / f"{strange}.npy").write_bytes(b"cut")
    out, words = folder / strange, f"--steps 3 --val-images 2 --seed {2**64 - 1}"
    assert run_train(folder, out, words) == 0
    assert "3 files skipped" in capsys.readouterr().out
    assert run_train(folder, out, words, "--resume") == 0
    assert sorted(os.listdir(out)) == FILES
    assert json.load(open(out / "run.json"))["settings"]["out"] == str(out)

# Interrupted runs.

def when_called(owner, name, value, action, *values, put=setattr):
    """Have a function of a module or class begin with action(*values) where `value` is among its arguments."""
    owner = sys.modules.get(owner, owner)
    original = getattr(owner, name)

    def call(*arguments):
        if value in arguments:
            action(*values)
        return original(*arguments)

    put(owner, name, call)

def test_resuming_equals_never_stopping(demo, finished, tmp_path, monkeypatch, capsys):
    """Ended at once in the fifth step, then resumed from the checkpoint of the third, in the middle of an interval."""
    with monkeypatch.context() as patch:
        for _ in range(2):  # Ctrl-C; the first alone would let the step end
            when_called("train", "learning_rate", 4, signal.raise_signal, signal.SIGINT, put=patch.setattr)
        assert run_train(demo, tmp_path) == 130
    assert "--resume" in capsys.readouterr().err
    assert saved_step(tmp_path) == 3
    train_refuses(capsys, demo, tmp_path, "", "--resume")
    torch.rand(7)  # whatever the process did in between
    assert run_train(demo, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, finished[0])

def begin(words, stderr, changes, start):
    """In a child: train on one thread, at the head of a process group, what it says on stderr in a file."""
    os.setsid()
    torch.set_num_threads(1)
    multiprocessing.set_start_method(start, force=True)
    for change in changes:
        when_called(*change)
    with open(stderr, "w", buffering=1) as file, contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 2)
        sys.exit(run_cli(train.main, *words))

def train_in_child(words, *changes, start="fork"):
    """(exit code, stderr) of a run with changes for `when_called`, which forked workers share. None outlives it."""
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")  # no fork trains by a GPU
    with tempfile.NamedTemporaryFile("r") as stderr:
        child = context.Process(target=begin, args=[words, stderr.name, changes, start])
        child.start()
        child.join(60)
        with contextlib.suppress(ProcessLookupError):
            for _ in range(1000):
                os.killpg(child.pid, 0)
                time.sleep(0.02)
            os.killpg(child.pid, signal.SIGKILL)
            pytest.fail("a process outlives the run")
        return child.exitcode, stderr.read()

def test_a_run_killed_again_and_again_ends_with_the_same_bits(demo, tmp_path):
    """In a step, and when a file is to take its name. All are there in the end; no worker outlives a run."""
    words = "--workers 1 --steps 3 --keep-every 1 --save-minutes 1e-6 --method lora"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train_in_child(training(demo, whole, words)) == (0, "")
    resume = ""
    calls = ("os", "replace", cut / "last.pt"), ("train", "learning_rate", 1), ("os", "replace", cut / "step_2.pt")
    for call in calls:
        kill = *call, signal.raise_signal, signal.SIGKILL
        code, text = train_in_child(training(demo, cut, words, resume), kill)
        assert code == -signal.SIGKILL, text
        resume = "--resume" if (cut / "last.pt").exists() else ""
        for name in ("last.pt.part", "log.jsonl"):
            with open(cut / name, "a") as file:
                file.write('{"step": 1, "los')
    assert train_in_child(training(demo, cut, words, resume)) == (0, "")
    assert_same_run(cut, whole)
    kept = ["step_1.pt", "step_2.pt", "step_3.pt"]
    assert {*os.listdir(cut)} == {*FILES, *kept, "lora.pt"} - {"gara.pt"}
    for name in kept:
        one, two = (gara.read_adapter(folder / name)["weights"] for folder in (cut, whole))
        assert same(one, two), name

@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_of_a_run_stops_it_in_order(demo, tmp_path, number, code):
    """As schedulers and Ctrl-C in a terminal send it: after the step at hand. The workers must not die first."""
    done = train_in_child(training(demo, tmp_path, "--workers 1"), ("train", "learning_rate", 1, os.killpg, 0, number))
    assert done == (code, f"stopped by signal {number} after step 2; --resume goes on from there\n")
    assert saved_step(tmp_path) == 2

@pytest.mark.parametrize("action, message", [
    ((os._exit, 1), "loads data died"), ((int, "x"), "ValueError: invalid literal")])
def test_what_ends_a_worker_ends_the_run_in_one_line(demo, tmp_path, action, message):
    """After a checkpoint; a worker that is stuck does not hold up the end."""
    words = training(demo, tmp_path, "--steps 20 --val-every 20 --workers 2")
    stuck = train.Examples, "__getitem__", 12, time.sleep, 1000
    code, text = train_in_child(words, (train.Examples, "__getitem__", 6, *action), stuck)
    assert code == 2
    assert text.count("\n") == 1
    assert message in text
    saved = saved_step(tmp_path)
    assert saved > 0
    assert f"--resume goes on from step {saved}" in text

def test_a_second_run_in_one_folder_is_refused(demo, ended):
    before = everything(ended)
    with data.alone_in(ended):
        code, text = train_in_child(training(demo, ended, "--resume"))
    assert code == 2
    assert "another program" in text
    assert everything(ended) == before

@pytest.fixture(scope="module")
def files(demo, finished):
    """The demo's folder with what must be refused: cut and other weights, adapters of others, a set without val."""
    content = gara.read_adapter(finished[0] / "gara.pt")
    torch.save(content, demo / "good.pt")
    torch.save(content | dict(backbone="vit_b"), demo / "vit_b.pt")
    torch.save(content | dict(base="another"), demo / "other.pt")
    torch.save(torch.nn.Linear(2, 2), demo / "model.pt")
    torch.save({key: value + 0.1 for key, value in tiny_weights().items()}, demo / "other.pth")
    for whole, cut in ("good.pt", "cut.pt"), ("w.pth", "cut.pth"):
        (demo / cut).write_bytes((demo / whole).read_bytes()[:-999])
    shutil.copytree(demo / "demo" / "train", demo / "bare" / "train")
    run_cli(data.main, demo / "demo", "--export-prompts", demo / "p.json")
    return demo

@pytest.mark.parametrize("words", [
    "--lr 2e-3 --weight-decay 0 --clip 1 --accumulate 2 --batch-size 3 --amp bf16 --steps 8 --conditions fog --stored "
    "--limit 3 --val-images 2 --rank-low 3 --init good.pt --prompts p.json --checkpoint other.pth --seed 1",
    "--method lora", "--pretrain"])
def test_a_run_goes_on_with_no_other_settings(files, monkeypatch, capsys, words):
    monkeypatch.chdir(files)
    flags = [word for word in words.split() if word.startswith("--")]
    train_refuses(capsys, files, "finished", f"--resume {words}", "is of a run with", ", not ", *flags)

def test_a_run_goes_on_elsewhere_and_says_so(copied, ended, finished, capsys):
    """With the data moved, without log.jsonl and run.json, and computed otherwise: the state is the same."""
    (ended / "log.jsonl").unlink()
    (ended / "run.json").write_bytes(b'{"step": 1')
    words = "--resume --workers 1 --log-every 3 --save-minutes 1 --val-every 2 --checkpointing"
    assert run_train(copied[0], ended, words) == 0
    assert "--workers 1; before: 0" in capsys.readouterr().out
    assert_same_run(ended, finished[0])
    assert json.load(open(ended / "run.json"))["settings"]["lr"] == 1e-3

@pytest.mark.parametrize("part", ["clear", "masks"])
def test_a_run_goes_on_with_no_other_images(copied, ended, capsys, part):
    folder, _ = copied
    os.utime(next((folder / "demo" / "val" / part).iterdir()), (0, 0))
    train_refuses(capsys, folder, ended, "--resume", "--data", "sizes_and_times")

@pytest.mark.parametrize("way, value", [
    ("base", "another"), ("weights", {}), ("meta", {}), ("meta settings", dict(lr="0.001")), ("meta training", None),
    ("meta training step", "x"), ("meta training step", 99), ("meta training sums", dict(loss="x")),
    ("meta training optimizer", {}), ("meta training optimizer state 0", 5),
    ("meta training optimizer state 999", dict(step=1)), ("meta training optimizer state 0 exp_avg", torch.zeros(3)),
    ("meta training optimizer state 0 step", torch.tensor(-1.0))])
def test_resuming_from_a_damaged_state(demo, ended, capsys, way, value):
    content = node = last(ended)
    *above, key = [int(key) if key.isdigit() else key for key in way.split()]
    for name in above:
        node = node[name]
    node[key] = value
    torch.save(content, ended / "last.pt")
    train_refuses(capsys, demo, ended, "--resume", "last.pt is", "start another --out")

def test_resuming_from_a_damaged_file(demo, ended, capsys):
    content = (ended / "last.pt").read_bytes()
    (ended / "last.pt").write_bytes(content[:20000] + bytes(999) + content[20999:])
    train_refuses(capsys, demo, ended, "--resume", "last.pt is damaged")

def test_a_curve_that_cannot_be_drawn_costs_nothing(demo, tmp_path, monkeypatch, capsys):
    when_called("train", "draw_training", tmp_path / "curve.png", int, "x", put=monkeypatch.setattr)
    assert run_train(demo, tmp_path, "--steps 1") == 0
    assert capsys.readouterr().out.count("curve.png could not be written: invalid literal") == 2

def test_a_file_that_cannot_be_written_leaves_the_last_checkpoint(demo, tmp_path, monkeypatch, capsys):
    when_called("os", "replace", tmp_path / "step_1.pt", open, tmp_path, put=monkeypatch.setattr)
    assert run_train(demo, tmp_path, "--keep-every 1") == 2
    one_error(capsys, "cannot write", "MB are free", "--resume")
    assert sorted(os.listdir(tmp_path)) == FILES
    assert saved_step(tmp_path) == 0

# Bad steps and bad files.

def test_steps_without_a_finite_gradient_are_skipped_and_counted(demo, tmp_path, monkeypatch, capsys):
    loss, calls = train.mask_loss, itertools.count()
    monkeypatch.setattr(train, "mask_loss", lambda z, t: loss(z, t) * (math.nan if next(calls) in (2, 3) else 1))
    assert run_train(demo, tmp_path, "--steps 3 --log-every 1") == 0  # two calls a step: the second is bad
    lines = log_of(tmp_path, "lr")
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1]
    assert ["loss" in line for line in lines] == [True, False, True]
    for value in last(tmp_path)["weights"].values():
        assert value.isfinite().all()
    assert len(re.findall("step 1 skipped, its gradient is not finite.*train_0", capsys.readouterr().out)) == 1

def test_training_gives_up_when_the_loss_stays_not_finite(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "mask_loss", lambda logits, targets: logits.sum((-2, -1)) * math.nan)
    monkeypatch.setattr(train, "BAD_STEPS", 3)
    assert run_train(demo, tmp_path, "--val-every 9 --method lora") == 2
    one_error(capsys, "3 steps in a row", "train_0")
    assert saved_step(tmp_path) == 0

def test_whatever_a_sample_raises_is_its_own_error(demo, tmp_path, monkeypatch, capsys):
    """It is skipped and named once, in two epochs; --strict refuses it."""
    errors = {"val_00001": MemoryError(), "train_00001": ValueError("some\nlines")}
    image = data.Sample.image

    def spoilt(sample, *settings, **more):
        if sample.name in errors:
            raise errors[sample.name]
        return image(sample, *settings, **more)

    monkeypatch.setattr(data.Sample, "image", spoilt)
    words = "--val-every 6 --val-images 2 --method lora"
    assert run_train(demo, tmp_path / "run", words) == 0
    text = capsys.readouterr().out
    for name, error in [*errors.items()]:
        assert text.count(f"cannot use {name} ({type(error).__name__}") == 1
        assert run_train(demo, tmp_path / name, words, "--strict") == 2
        one_error(capsys, name)
        del errors[name]

def test_a_set_without_a_good_file_ends_training(copied):
    """In a worker that is spawned, as on other systems."""
    folder, images = copied
    for path in images:
        path.write_bytes(b"")
    code, text = train_in_child(training(folder, folder / "run", "--workers 1"), start="spawn")
    assert code == 2
    assert text.startswith("error: none of the 6 samples")
    assert text.count("\n") == 1

# Methods and settings.

@pytest.mark.parametrize("method, words, expected", [
    ("gara", "--rank-low 2 --scope window", dict(rank_low=2, rank_high=48, temperature=0.5, scope="window")),
    ("gara_flat", "--temperature 0.7", dict(rank=4, temperature=0.7, scope="image")),
    ("gara_space", "--rank-high 5", dict(rank_low=4, rank_high=5, temperature=0.5, scope="image")),
    ("gara_random", "", dict(rank_low=4, rank_high=48, scope="image")),
    ("lora", "--rank 3", dict(rank=3)),
    ("moe_lora", "--experts 1,3", dict(experts=(1, 3), temperature=0.5, scope="image"))])
def test_every_method_trains_resumes_and_evaluates(demo, tmp_path, method, words, expected):
    words = f"--method {method} {words} --steps 1 --no-corrupt --seed -1"
    for resume in ("", "--resume"):
        assert run_train(demo, tmp_path, words, resume) == 0
    content = gara.read_adapter(tmp_path / "last.pt")
    assert content["method"] == method
    assert content["options"] == expected
    assert run_evaluate(demo, tmp_path, "--ckpt", tmp_path / f"{method}.pt", "--no-corrupt", "--limit", 1) == 0

def test_a_run_may_begin_with_a_trained_adapter(demo, finished, tmp_path):
    """At step 0 it is the trained one, to the bit, and when it goes on after a stop, not once more."""
    start, run = tmp_path / "start.pt", tmp_path / "run"
    shutil.copy(finished[0] / "last.pt", start)
    digest = hashlib.sha256(start.read_bytes()).hexdigest()
    words = f"--init {start} --steps 1"
    assert run_train(demo, run, words) == 0
    assert log_of(run, "validation")[0]["validation"] == last(finished[0])["meta"]["validation"]
    start.unlink()
    assert run_train(demo, run, words, "--resume") == 0
    assert json.load(open(run / "run.json"))["init_sha256"] == digest

def test_conditions_can_be_chosen(demo, tmp_path, monkeypatch):
    asked = []
    image = data.Sample.image
    monkeypatch.setattr(data.Sample, "image", lambda self, condition="clear", *more, **options: (
        asked.append(condition) or image(self, condition, *more, **options)))
    assert run_train(demo, tmp_path, "--steps 2 --method lora --conditions night snow@2") == 0
    assert set(asked) == {"night", "snow@2"}  # validation never sees another one either
    for line in log_of(tmp_path, "validation"):
        assert line["validation"].keys() == {"point degraded", "box degraded"}

def test_a_smaller_model_input_for_a_try(demo, tmp_path):
    """The adapter says at which size it was trained, and evaluation and sam.py take that size by themselves."""
    assert run_train(demo, tmp_path, "--steps 1 --image-size 64") == 0
    adapter = tmp_path / "gara.pt"
    assert gara.read_adapter(adapter)["image_size"] == 64
    assert run_evaluate(demo, tmp_path / "results", "--ckpt", adapter, "--no-corrupt", "--limit", 1) == 0
    image = next((demo / "demo" / "test" / "clear").iterdir())
    assert run_cli(sam.main, image, "--box", "20,20,60,60", "--adapter", adapter, "--backbone", "vit_t", "--out",
                   tmp_path / "o.png", "--checkpoint", demo / "w.pth", "--device", "cpu") == 0

def test_one_image_can_be_learned(demo, tmp_path):
    assert run_train(demo, tmp_path, "--limit 1 --steps 12 --val-every 12 --no-corrupt --log-every 1 --lr 5e-3") == 0
    losses = [line["loss"] for line in log_of(tmp_path, "loss")]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])

def test_pretraining_writes_a_sam(demo, tmp_path, monkeypatch):
    """Stopped before its first line of the log, it goes on to the same weights."""
    words = "--pretrain --log-every 9 --val-every 9 --steps 4"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_train(demo, whole, words) == 0
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        when_called("train", "learning_rate", 1, signal.raise_signal, signal.SIGTERM, put=patch.setattr)
        assert run_train(demo, cut, words) == 143
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert run_train(demo, cut, words, "--resume") == 0
    assert same(last(cut)["sam"], last(whole)["sam"])
    halves = sam.build_sam("vit_t", whole / "sam_vit_t.pth").state_dict()
    for key, value in last(whole)["sam"].items():
        assert torch.equal(halves[key], value.half().float()), key

def test_the_whole_encoder_learns_with_method_full(demo, tmp_path):
    assert run_train(demo, tmp_path, "--steps 1 --method full --lr 1e-4") == 0
    weights, start = last(tmp_path)["sam"], tiny_weights()
    moved = {key.split(".")[0] for key, value in weights.items() if not torch.equal(value, start[key])}
    assert moved == {"image_encoder"}
    assert sam.build_sam("vit_t", tmp_path / "full.pt").state_dict().keys() == weights.keys()

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
    words = "--method lora --steps 1 --batch-size 5 --lr 1"
    whole = gradients(settings(demo, words), batch)
    assert close(gradients(settings(demo, words, "--accumulate 3"), batch), whole, 1e-4)
    assert close(gradients(settings(demo, words, "--checkpointing"), batch), whole, 1e-4)
    shares = [gradients(settings(demo, words), share) for share in (batch[::2], batch[1::2])]
    assert close(shares[0] + shares[1], whole, 1e-4)  # of two processes, before they are added

TWO = """
import glob, sys, train
code = train.main(sys.argv[1:])
names = [open(path).read().strip() for path in glob.glob("/proc/self/task/*/comm")]
print("threads:", *(name for name in names if "gloo" in name))
sys.exit(code)
"""

def test_two_processes_train_as_one(demo, tmp_path):
    """Up to rounding, on shares of 2 and 1. A thread of Gloo that outlives Python would abort its process."""
    words = "--batch-size 3 --steps 2 --method lora --val-images 2"
    assert run_train(demo, tmp_path / "one", words) == 0
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               str(tmp_path / "two.py"), *training(demo, tmp_path / "two", words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=HERE))
    assert done.returncode == 0, done.stderr
    assert re.findall("^threads:.*", done.stdout, re.M) == ["threads:"] * 2
    assert done.stdout.count("step 2/2") == 1  # one voice
    one, two = last(tmp_path / "one"), last(tmp_path / "two")
    for key, value in one["weights"].items():  # Adam makes whole steps of the rounding where the gradient is nearly 0
        assert (two["weights"][key] - value).norm() < 0.02 * value.norm(), key
    for key, value in one["meta"]["validation"].items():
        assert two["meta"]["validation"][key] == pytest.approx(value, abs=2e-3)
    starts = log_of(tmp_path / "one", "validation"), log_of(tmp_path / "two", "validation")
    assert starts[0][0] == starts[1][0]  # before any step, to the last digit

# Datasets.

def test_every_dataset_trains_and_is_measured(demo, tmp_path):
    """All miniatures at once: a step on an image of each, an evaluation, and one with pinned prompts."""
    roots, prompts, expected = [], [], {}
    for layout in LAYOUTS:
        root = f"{layout.split('-')[0]}={tmp_path / layout}"
        for name, masks in write_layout(layout, tmp_path / layout).items():
            expected[root, name] = set(masks)
        roots.append(root)
        prompts.append(tmp_path / f"{layout}.json")
        run_cli(data.main, root, "--split", "val", "--export-prompts", prompts[-1])
    out, words = tmp_path / "run", f"--steps 1 --limit 1 --batch-size {len(roots)} --no-corrupt"
    assert run_train(demo, out, "--data", *roots, words) == 0
    scores = []
    for pinned in [], ["--prompts", *prompts]:
        assert run_evaluate(demo, out, "--data", *roots, "--split", "val", "--no-corrupt", *pinned) == 0
        results = json.load(open(out / "results.json"))
        assert {(row["data"], row["name"]): set(row["indices"]) for row in results["images"]} == expected
        scores.append([row["scores"] for row in results["images"]])
    assert scores[0] == scores[1]
    counts = Counter(row["data"] for row in results["images"] for _ in row["indices"])
    weighted = [counts[root] * part["means"]["SAM"]["box clear"][0] for root, part in results["by_data"].items()]
    assert results["means"]["SAM"]["box clear"][0] == pytest.approx(sum(weighted) / counts.total())

def test_missing_demo_is_made(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "make_demo", lambda root: shutil.copytree(demo / "demo", root))
    shutil.copy(demo / "w.pth", tmp_path)
    assert run_train(tmp_path, tmp_path / "run", "--steps 1") == 0
    shutil.rmtree(tmp_path / "demo")
    assert run_evaluate(tmp_path, tmp_path / "out", "--no-corrupt", "--limit", 1) == 0

# Mistakes.

@pytest.mark.parametrize("words, message", [row.split(" -> ") for row in [
    "--data nowhere -> nowhere", "--data bare -> val", "--resume -> --resume", "--out w.pth -> w.pth",
    "--steps 0 -> --steps", "--steps 1 --epochs 2 -> --epochs", "--lr nan -> --lr", "--lr inf -> --lr",
    "--workers -1 -> --workers", "--clear 1.5 -> --clear", "--seed 18446744073709551616 -> --seed",
    "--device nonsense -> --device", "--device cuda:99 -> --device", "--backbone vit_b -> vit_t",
    "--checkpoint cut.pth -> cut.pth", "--checkpoint good.pt -> good.pt", "--checkpoint none.pth -> none.pth",
    "--method moe_lora --experts 1,x -> --experts", "--method full --rank 4 -> its options: none",
    "--rank 4 -> its options: --rank-low, --rank-high, --temperature, --scope", "--conditions fgo -> fgo",
    "--conditions fog --no-corrupt -> --no-corrupt", "--pretrain --method lora -> --method",
    "--pretrain --prompts p.json -> --prompts", "--pretrain --batch-size 1 --masks-per-image 1 -> two objects",
    "--image-size 60 -> multiple of 8", "--image-size 64 --method full -> own size",
    "--init good.pt --method full -> --checkpoint", "--init vit_b.pt -> with backbone vit_b",
    "--init good.pt --rank-low 3 -> with options", "--init good.pt --image-size 64 -> image_size 128, not 64",
    "--init other.pt -> other vit_t weights", "--init w.pth -> SAM checkpoint", "--init none.pt -> no adapter file",
    "--init cut.pt -> --init: cut.pt is damaged", "--init model.pt -> not an adapter"]])
def test_mistakes_of_train_end_in_one_line(files, monkeypatch, capsys, words, message):
    monkeypatch.chdir(files)
    train_refuses(capsys, files, "out", words, message)

def test_a_batch_too_small_for_all_processes(demo, monkeypatch, capsys):
    monkeypatch.setattr(train, "WORLD_SIZE", 3)
    train_refuses(capsys, demo, "out", "", "--batch-size 2")

# ---- Evaluation -----------------------------------------------------------------------------------------------------

sys.path.insert(0, os.path.join(HERE, "assets"))
import study

FORKED = multiprocessing.get_context("fork")  # a process at once, where a new Python takes seconds
SAM_ONLY = {"SAM": ("sam", {})}
LORAS = {f"LoRA {rank}": ("lora", dict(rank=rank)) for rank in (4, 16, 48)}

def gara_of(temperature):
    return "gara", dict(rank_low=3, rank_high=10, scope="image", temperature=temperature)

def made_up_results(models, conditions=data.CONDITIONS, images=4, seed=0):
    """results.json's content from random numbers, of models of two layers."""
    rng = np.random.default_rng(seed)
    results = dict(format=evaluate.FORMAT, data=["demo/"], split="test", backbone="vit_t", average="masks",
                   conditions=list(conditions), models={}, images=[])
    for name, (method, options) in models.items():
        results["models"][name] = dict(file=None, method=method, options=options, learnable_parameters=0)
    for k in range(images):
        masks = 1 + k % 3
        scores = {name: {} for name in models}
        gates = {name: {} for name in figures.gated_models(results)}
        for condition in conditions:
            for of_model in scores.values():
                of_model[condition] = {prompt: rng.random((masks, 3)).tolist() for prompt in evaluate.PROMPTS}
            for of_model in gates.values():
                codes = np.packbits(rng.random((2, 13)) < 0.5, axis=1)
                of_model[condition] = [[(int(rng.integers(2)), code.tobytes().hex())] for code in codes]
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

def test_means_are_over_masks_or_over_images():
    """Three masks on one image and one on another: the first image weighs three times as much."""
    first, second = {}, {}
    for k, condition in enumerate(data.CONDITIONS):
        first[condition] = dict(point=3 * [[0.1 * k, 0.5, 0]], box=3 * [[0, 1, 0]])
        second[condition] = dict(point=[[1, 0.7, 1]], box=[[1, 0.2, 1]])
    images = [dict(indices=[1, 2, 3], scores=dict(A=first)), dict(indices=[1], scores=dict(A=second))]
    of_masks = evaluate.summarize(images, ["A"], data.CONDITIONS, "masks")["means"]["A"]
    of_images = evaluate.summarize(images, ["A"], data.CONDITIONS, "images")["means"]["A"]
    assert of_masks["box fog"] == pytest.approx([0.25, 0.8, 0.25])
    assert of_masks["point degraded"] == pytest.approx([0.25 + 0.075 * 8, 0.55, 0.25])  # mean of conditions 1 to 15
    assert of_images["point snow"] == pytest.approx([0.55, 0.6, 0.5])

def test_intervals_are_those_of_the_normal_distribution_when_images_are_many():
    """The ratio of sums, by the delta method: its variance is that of (score sum - mean x masks) / mean masks."""
    found = made_up_results(dict.fromkeys("AB", ("sam", {})), ("clear", "fog", "fog@2"), images=400)
    masks = np.array([len(image["indices"]) for image in found["images"]])
    means, residuals = {}, {}
    for model in "AB":
        sums = [np.sum(image["scores"][model]["fog@2"]["box"], axis=0)[2] for image in found["images"]]
        means[model] = np.sum(sums) / masks.sum()
        residuals[model] = (sums - means[model] * masks) / masks.mean()
    low, high = found["intervals"]["A"]["box fog@2"][2]
    assert high - low == pytest.approx(2 * 1.96 * residuals["A"].std() / 20, rel=0.1)
    assert (low + high) / 2 == pytest.approx(means["A"], abs=0.005)
    mean, low, high = evaluate.difference(found, "B", "A", "box fog@2", 2)
    assert mean == pytest.approx(means["B"] - means["A"])
    assert high - low == pytest.approx(2 * 1.96 * (residuals["B"] - residuals["A"]).std() / 20, rel=0.1)
    assert evaluate.difference(found, "A", "B", "box fog@2", 2) == (-mean, -high, -low)
    of_a = found["means"]["A"]
    assert of_a["point degraded"] == pytest.approx(of_a["point fog"])  # of the benchmark's own strength alone
    assert found["intervals"] == evaluate.add_summaries(dict(found))["intervals"]  # the same draws each time

def test_paired_differences_know_less_noise_and_one_image_knows_nothing():
    """B's IoU is better than A's by 0.01 in every mask."""
    results = made_up_results(dict.fromkeys("AB", ("sam", {})), ("clear",), images=30)
    for image, prompt in itertools.product(results["images"], evaluate.PROMPTS):
        image["scores"]["B"]["clear"][prompt] = np.add(image["scores"]["A"]["clear"][prompt], [0.01, 0, 0])
    evaluate.add_summaries(results)
    low, high = results["intervals"]["A"]["point clear"][0]
    assert high - low > 0.1
    differences = results["differences"]["B"]["A"]
    assert differences["point clear"][0] == pytest.approx([0.01] * 3)
    assert differences["box clear"][1] == pytest.approx([0, 0, 0], abs=1e-12)
    assert evaluate.difference_text(0, 1e-16, 2e-16).startswith("(")  # equal but for rounding
    assert evaluate.difference_text(0.01, 1e-4, 0.02) == "+1.0 [0.0, 2.0]"
    del results["images"][1:]
    evaluate.add_summaries(results)
    assert results["intervals"]["A"]["point clear"] == [[0, 1]] * 3
    assert results["differences"]["B"]["A"]["point clear"][0][1:] == [-1, 1]

# Gates in results.json.

@pytest.mark.parametrize("scope", ("image", "window"))
def test_gates_are_recorded_and_unpacked_as_they_decided(demo, scope):
    sample = data.load_dataset(demo / "demo", "test")[0]
    model = tiny("gara", scope=scope)
    prediction = next(evaluate.predictions(model, [sample.image()], *sample.prompts()))
    image = dict(gates=dict(GaRA=dict(clear=prediction["gates"])))
    results = dict(models=dict(GaRA=model.adapter), images=[image], conditions=["clear"])
    layers = figures.unpack_gates(json.loads(json.dumps(results)), "GaRA", "clear")
    counts = figures.open_components(results, "GaRA")
    for layer, gate in enumerate(gara.gates(model)):
        vectors, spaces = layers[layer]
        assert np.array_equal(vectors, gate["vector"].reshape(1, -1, 52))
        assert spaces.ravel().tolist() == gate["space"].flatten().tolist()
        assert counts[0, 0, layer] == pytest.approx(gate["count"].float().mean().item())
    assert (layers[0][1].size > 1) == (scope == "window")
    assert f"| GaRA | {counts.mean():.1f} ± {counts.std():.1f} |" in evaluate.open_components_table(results)

def test_f_against_its_definition():
    counts = np.random.default_rng(0).integers(0, 20, (4, 6, 1)) + np.arange(4)[:, None, None]
    values = counts[:, :, 0].tolist()
    grand = sum(map(sum, values)) / 24
    between, within = 0, 0
    for group in values:
        mean = sum(group) / 6
        between += 6 * (mean - grand) ** 2 / 3
        within += sum((value - mean) ** 2 for value in group) / 20
    assert figures.f_statistic(counts) == pytest.approx(between / within)
    only_the_condition = np.arange(4)[:, None, None] * np.ones((4, 6, 1))
    assert figures.f_statistic(only_the_condition) == np.inf
    assert figures.f_statistic(np.full((4, 6, 1), 7.0)) == 0

def test_p_is_least_with_a_dependence_and_uniform_without_one():
    rng = np.random.default_rng(0)
    counts = rng.normal(size=(8, 12, 60))
    counts += 10 * rng.normal(size=(12, 60))  # images differ: that is no dependence on the condition
    counts[:, :, 0] += 40 * np.arange(8)[:, None]
    counts[:, :, 1] = 5
    p = figures.permutation_test(counts, 400)
    assert p[:2].tolist() == [1 / 401, 1]
    assert 0.4 < p[2:].mean() < 0.6
    assert (p[2:] < 0.05).mean() < 0.15
    assert np.array_equal(p, figures.permutation_test(counts, 400))  # the same draws each time

# Measuring.

def test_evaluator_and_predictor_give_the_same_masks(demo, monkeypatch):
    monkeypatch.setattr(evaluate, "DECODED_AT_ONCE", 5)  # prompts of several conditions in one call, and torn apart
    sample, model = data.load_dataset(demo / "demo", "test")[0], tiny("gara")
    masks = sample.masks()
    images = [sample.image(condition) for condition in ("clear", "ISO_noise", "night")]
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

def test_adapters_share_the_frozen_weights_and_whole_models_have_their_own(demo, tmp_path):
    adapted, changed = tiny("gara").eval(), tiny()
    gara.save_adapter(adapted, tmp_path / "gara.pt")
    changed.image_encoder.blocks[0].attn.qkv.bias.data += 0.5
    torch.save(changed.state_dict(), tmp_path / "full.pt")
    files = [str(path) for path in (tmp_path / "full.pt", tmp_path / "gara.pt", "sam")]
    models, about, _ = evaluate.load_models(files, None, str(demo / "w.pth"), torch.device("cpu"))
    assert list(about) == ["SAM", "GaRA", f"SAM ({tmp_path / 'full.pt'})"]
    state, x = models["GaRA"].state_dict(), pictures(0, 1)
    for key, value in models["SAM"].state_dict().items():
        assert state[key].data_ptr() == value.data_ptr()
    for found, expected in zip(models.values(), (tiny(), adapted, changed), strict=True):
        assert torch.equal(encode(found, x), encode(expected, x))

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
    """The folder, results.json and printed text of an evaluation of SAM and GaRA in all conditions."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert run_evaluate(demo, demo / "evaluated", "--ckpt", finished[0] / "last.pt") == 0
    return demo / "evaluated", stored(demo / "evaluated"), text.getvalue()

def test_an_evaluation_writes_its_scores(evaluated):
    folder, results, _ = evaluated
    assert files_in(folder) == ["corruptions.png", "dependence_GaRA.png", "gates_GaRA.png", "open_GaRA.png",
                                "results.csv", "results.json", "samples.png"]
    assert tuple(results["conditions"]) == data.CONDITIONS
    for image, sample in zip(results["images"], data.load_dataset(*results["data"], "test"), strict=True):
        assert image["name"] == sample.name
        assert image["areas"] == sample.masks().sum((1, 2)).tolist()
        assert tuple(image["indices"]) == sample.indices

def test_tables_and_the_csv_hold_the_means(evaluated):
    folder, results, text = evaluated
    rows = {line.split(" | ")[0]: line for line in reversed(text.splitlines())}  # of equal ones the first
    for model, means in results["means"].items():
        expected = []
        for column in ("point degraded", "point clear", "box degraded", "box clear"):
            expected += means[column]
        cells = rows[f"| {model}"].split("|")[2:-1]
        printed = [float(cell.strip(" *").split()[0]) for cell in cells]
        assert printed == pytest.approx(100 * np.array(expected), abs=0.051)
    head, *lines = [line.split(",") for line in open(folder / "results.csv").read().splitlines()]
    assert head == "data model prompt condition metric mean low high".split()
    assert len(lines) == 2 * 2 * 17 * 3
    for _, model, prompt, condition, metric, mean, low, high in lines:
        expected = results["means"][model][f"{prompt} {condition}"][evaluate.METRICS.index(metric)]
        assert float(mean) == pytest.approx(expected, abs=1e-6)
        assert float(low) <= float(mean) <= float(high)

# What one bad image, or one bad process, may not do.

@pytest.fixture
def copied_test(demo, tmp_path, monkeypatch):
    """The working folder: a copy of demo/ to spoil, and its test images."""
    shutil.copytree(demo / "demo", tmp_path / "demo")
    shutil.copy(demo / "w.pth", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path, sorted((tmp_path / "demo" / "test" / "clear").iterdir())

def masks_of(image):
    """The path of an image's masks."""
    return image.parents[1] / "masks" / f"{image.stem}.npy"

def spoil(monkeypatch, function, path, action):
    """Have a function of data.py do something else with one image."""
    usual = getattr(data, function)
    monkeypatch.setattr(data, function, lambda first, *more: (action if first == str(path) else usual)(first, *more))

def fails(*_):
    raise RuntimeError("two\nlines")

@pytest.mark.parametrize("function, workers", [("read_image", 0), ("read_planes", 1)])
def test_whatever_an_image_raises_is_its_own_error(copied_test, monkeypatch, capsys, function, workers):
    folder, images = copied_test
    spoil(monkeypatch, function, images[1] if function == "read_image" else masks_of(images[1]), fails)
    assert run_evaluate(folder, "out", "--no-corrupt", "--workers", workers) == 0
    assert capsys.readouterr().err.count("skipped: ") == 1
    results = stored("out")
    assert len(results["images"]) == 2
    assert [images[1].stem in line for line in results["skipped"]] == [True]
    assert results["means"]["SAM"].keys() == {"point clear", "box clear"}
    assert run_evaluate(folder, "strict", "--no-corrupt", "--workers", workers, "--strict") == 2
    assert one_error(capsys, images[1].stem)

def test_what_workers_need_can_be_sent_to_them(demo, monkeypatch):
    """As it must be where processes are not forked."""
    usual, dataset = torch.utils.data.DataLoader, data.load_dataset(demo / "demo", "test")
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda dataset, **options: usual(
        pickle.loads(pickle.dumps(dataset)), **pickle.loads(pickle.dumps(options))))
    [(images, *_)] = evaluate.prepared(dataset, ("clear",), 0, [1])
    assert np.array_equal(images[0], dataset[1].image())

def test_a_worker_that_dies_ends_the_evaluation_in_one_line(copied_test, monkeypatch, capsys):
    folder, images = copied_test
    spoil(monkeypatch, "read_image", images[1], lambda *_: os._exit(7))
    assert run_evaluate(folder, "out", "--no-corrupt", "--workers", 1) == 2
    assert one_error(capsys, "worker")
    assert not multiprocessing.active_children()

def test_who_waits_for_a_process_that_has_ended_says_so(monkeypatch):
    monkeypatch.setattr(evaluate.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(evaluate.dist, "barrier", fails)
    with refused("another process", kind=RuntimeError):
        evaluate.wait_for_all()

def hold_until_killed(folder, held):
    with data.alone_in(folder):
        held.set()
        signal.pause()

def test_only_one_program_writes_into_a_folder(copied_test, capsys):
    folder, _ = copied_test
    (folder / "good.json").write_text(stored_text())
    held = FORKED.Event()
    other = FORKED.Process(target=hold_until_killed, args=("out", held))
    other.start()
    assert held.wait(30)
    assert run_evaluate(folder, "out", "--no-corrupt") == 2
    assert one_error(capsys, "out: another program")
    assert run_cli(evaluate.main, "--from", "good.json", "--out", "out") == 2
    assert one_error(capsys, "out: another program")
    other.kill()
    other.join()
    assert run_evaluate(folder, "out", "--no-corrupt") == 0

PREDICTORS = """
import data, numpy as np

class Truth:  # knows the masks that the prompts were drawn from
    def __init__(self):
        self.known = {}
        for sample in data.load_dataset("demo", "test"):
            for mask, points, box in zip(sample.masks(), *sample.prompts()):
                self.known[points.tobytes()] = self.known[box.tobytes()] = mask[None]
    def set_image(self, image):
        pass
    def predict(self, point_coords=None, point_labels=None, box=None, mask_input=None, multimask_output=True):
        assert not multimask_output
        assert (point_labels is None) == (point_coords is None) == (box is not None)
        return self.known[(box if point_coords is None else point_coords).tobytes()], None, None

class Half(Truth):  # every second column of them
    def predict(self, **prompt):
        mask, *_ = super().predict(**prompt)
        return mask & (np.arange(mask.shape[2]) % 2 == 0), None, None

class Small(Truth):
    def predict(self, **_):
        return np.zeros((1, 9, 9), bool), None, None

class Broken(Truth):
    def predict(self, **_):
        return 1 / 0

half, raises, number = Half(), (lambda: 1 / 0), 7
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
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.mark.parametrize("arguments, words", {
    "--data nowhere": "nowhere", "--data bare": "test", "--data demo ./demo/": "twice", "--split tset": "tset",
    "--ckpt a.pt": "other vit_t weights", "--ckpt a.pt --backbone vit_b": "vit_b", "--ckpt none.pt": "none.pt",
    "--ckpt cut.pth": "cut.pth", "--checkpoint cut.pth": "cut.pth", "--checkpoint none.pth": "none.pth",
    "--batch-size 0": "--batch-size", "--workers -1": "--workers", "--device nonsense": "nonsense",
    "--out w.pth": "w.pth", "--paper imagenet": "lvis", "--prompts w.pth": "w.pth", "--costs": "--costs",
    "--strengths -1": "--strengths", "--conditions night --no-corrupt": "--no-corrupt", "--conditions x": "'x'",
    "--predictor none.py:x": "none.py", "--predictor w.pth:x": "FILE.py:NAME",
    "--predictor mine.py:raises": "ZeroDivisionError", "--predictor mine.py:number": "TypeError",
    "--predictor mine.py:missing": "missing", "--from results.json": "--data"}.items())
def test_mistakes_of_evaluate_end_in_one_line(mistakes, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of mine.py
    before = everything(mistakes)
    assert run_evaluate(mistakes, "out", *arguments.split()) == 2
    assert one_error(capsys, words)
    assert everything(mistakes) == before

def test_other_predictors_by_plug(mistakes, capsys):
    """A class, and an object that is ready: one that knows the truth scores 1, whatever the condition."""
    conditions = "--conditions", "clear", "fog"
    assert run_evaluate(mistakes, "out", "--predictor", "mine.py:Truth", "mine.py:half", *conditions) == 0
    means, text = stored("out")["means"], capsys.readouterr().out
    assert list(means) == ["SAM", "Truth", "half"]
    for column in means["SAM"]:
        assert means["Truth"][column] == [1, 1, 1]
        assert means["half"][column] == means["half"]["box clear"]
    assert text.count("**100.0 ±0.0**") == 12
    assert re.search(r"^\| Truth - half \| \+\d", text, re.M)
    assert run_evaluate(mistakes, "bad", "--predictor", "mine.py:Small", "--limit", 1) == 2
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

def evaluate_as(rank, port, folder):
    """One of two processes, as torchrun starts them."""
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    sys.exit(run_evaluate(folder, folder / "out", "--no-corrupt", "--workers", 1))

def test_an_interrupted_evaluation_goes_on_with_two_processes(copied_test, monkeypatch, capfd):
    folder, _ = copied_test
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run_evaluate(folder, "whole", "--no-corrupt") == 0
    torch.set_num_threads(threads)
    unfinished = interrupt_evaluate(monkeypatch, folder, 1)
    mark, row = json.loads(unfinished.read_text())
    row["scores"]["SAM"]["clear"]["box"][0][0] = 0.5  # a sign: what was measured is not measured again
    line = json.dumps([mark, row])
    unfinished.write_text(line + "\n" + line[:77])  # the second is cut short
    capfd.readouterr()
    with socket.create_server(("127.0.0.1", 0)) as free:
        _, port = free.getsockname()
    processes = [FORKED.Process(target=evaluate_as, args=(rank, port, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    out, err = capfd.readouterr()
    assert "1 of 3" in err
    assert out.count("| SAM |") == 1  # one voice
    first, *others = stored("out")["images"]
    assert first["scores"]["SAM"]["clear"]["box"][0][0] == 0.5
    assert others == stored("whole")["images"][1:]
    assert not list(folder.glob("out/unfinished-*"))

def exchange(what, folder, image):
    if what == "image":
        Image.open(image).rotate(180).save(image)
    elif what == "masks":
        np.save(masks_of(image), np.load(masks_of(image))[:, ::-1])
    elif what == "adapter":
        gara.save_adapter(tiny("lora", rank=3), folder / "a.pt")

@pytest.mark.parametrize("changed, more, kept", [
    (None, [], ["2"]),
    ("image", [], ["1"]),
    ("masks", [], ["1"]),
    ("adapter", ["--ckpt", "a.pt"], []),
    ("words", ["--batch-size", 2], []),
    ("words", ["--predictor", "mine.py:half"], [])])
def test_only_what_was_measured_on_the_same_is_taken_over(copied_test, monkeypatch, capsys, changed, more, kept):
    folder, images = copied_test
    gara.save_adapter(tiny("lora"), folder / "a.pt")
    (folder / "mine.py").write_text(PREDICTORS)
    interrupt_evaluate(monkeypatch, folder, 2, *(more if changed != "words" else ()))
    exchange(changed, folder, images[0])
    capsys.readouterr()
    assert run_evaluate(folder, "out", "--no-corrupt", *more) == 0
    assert re.findall(r"(\d) of 3 pictures", capsys.readouterr().err) == kept

def test_an_image_that_can_be_read_again_is_measured_after_all(copied_test, monkeypatch):
    folder, images = copied_test
    with monkeypatch.context() as patch:
        spoil(patch, "read_image", images[0], fails)
        interrupt_evaluate(patch, folder, 2)
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

@pytest.mark.parametrize("last", ("figure_samples", "draw_all"))
def test_rows_are_kept_until_everything_is_written(demo, tmp_path, monkeypatch, capsys, last):
    with monkeypatch.context() as patch:
        patch.setattr(figures, last, fails)
        assert run_evaluate(demo, tmp_path, "--no-corrupt", "--limit", 2) == 2
    before = stored(tmp_path)["images"]
    assert run_evaluate(demo, tmp_path, "--no-corrupt", "--limit", 2) == 0
    assert "2 of 2 pictures" in capsys.readouterr().err
    assert stored(tmp_path)["images"] == before
    assert not list(tmp_path.glob("unfinished-*"))

def evaluate_and_wait(folder, out, waits):
    """Evaluate in a process group of its own, and wait at the second image."""
    os.setsid()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, evaluate.terminate)
    usual, images = evaluate.predictions, itertools.count()

    def predictions(*arguments):
        if next(images) == 1:
            waits.set()
            time.sleep(600)
        return usual(*arguments)

    evaluate.predictions = predictions
    sys.exit(run_evaluate(folder, out, "--no-corrupt", "--workers", 1))

def processes_of(group):
    """The states of the processes of a group that are still there."""
    found = subprocess.run(["ps", "-eo", "pgid,stat"], capture_output=True, text=True).stdout
    return re.findall(rf"^ *{group} +([^Z\s]+)", found, re.M)

@pytest.mark.parametrize("kill, number, code", [
    (os.kill, signal.SIGKILL, -9),  # the main process alone, which cannot know
    (os.killpg, signal.SIGTERM, 143)])  # all of them, as schedulers do
def test_no_process_outlives_an_evaluation_that_is_killed(demo, tmp_path, capfd, kill, number, code):
    waits = FORKED.Event()
    program = FORKED.Process(target=evaluate_and_wait, args=(demo, tmp_path, waits))
    program.start()
    assert waits.wait(60)
    assert len(processes_of(program.pid)) > 1
    kill(program.pid, number)
    program.join(60)
    assert program.exitcode == code
    deadline = time.monotonic() + 20
    while processes_of(program.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(program.pid) == []
    assert "Traceback" not in capfd.readouterr().err
    assert not list(tmp_path.glob("*.part"))

# Stored scores.

def test_stored_scores_of_several_runs_stand_side_by_side(copied_test, finished, capsys):
    """Also where a folder's name is not UTF-8, and an image is skipped."""
    folder, images = copied_test
    images[0].write_bytes(b"")
    odd = folder / os.fsdecode(b"d\xff\n")
    odd.mkdir()
    (folder / "demo").rename(odd / "demo")
    (folder / "w.pth").rename(odd / "w.pth")
    gara.save_adapter(tiny("lora"), odd / "lora.pt")
    shutil.copy(finished[0] / "last.pt", odd / "gara.pt")
    options = ("--conditions", "clear", "night", "--strengths", 0.5, 1)
    for out, names in (("a", ["gara"]), ("b", ["lora"]), ("both", ["gara", "lora"])):
        assert run_evaluate(odd, out, "--ckpt", *(odd / f"{name}.pt" for name in names), *options) == 0
    _, both = capsys.readouterr().out.split("conditions; vit_t")[-1].split("\n", 1)
    assert run_cli(evaluate.main, "--from", "a/results.json", "b/results.json", "--out", "merged") == 0
    assert capsys.readouterr().out.split("written")[0] == both.split("written")[0].lstrip("\n")
    for name in files_in("merged"):
        merged, measured = (open(f"{out}/{name}", "rb").read() for out in ("merged", "both"))
        assert merged == measured
    assert stored("a")["conditions"] == ["clear", "night", "night@0.5"]

def stored_text():
    """A small results.json of SAM and GaRA."""
    return json.dumps(made_up_results({**SAM_ONLY, "GaRA": gara_of(0.5)}, ("clear", "fog"), images=2))

def spoiled(*path, value):
    """A results.json with another value at a path."""
    results = entry = json.loads(stored_text())
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    return json.dumps(results)

ONE_SCORE = "images", 1, "scores", "SAM", "fog", "box", 1

@pytest.mark.parametrize("content, words", [
    (None, "text.json"),
    ("[" * 10 ** 5, "text.json"),
    ('{"format": "gara-sam results 1"}', "measure again"),
    (json.dumps(made_up_results(SAM_ONLY)), "conditions"),
    (json.dumps(made_up_results(SAM_ONLY, ("clear", "fog"), images=3)), "pictures or masks"),
    (spoiled(*ONE_SCORE, value=[math.nan, 0, 0]), "scores"),
    (spoiled(*ONE_SCORE, value=[1, 1, 1.5]), "scores"),
    (spoiled(*ONE_SCORE, value=[10 ** 400, 1, 1]), "text.json"),
    (spoiled("images", 1, "gates", "GaRA", "fog", 0, value=[[2, "0000"]]), "gates"),
    (spoiled("images", 1, "gates", "GaRA", "fog", 0, value=[[1, "000000"]]), "text.json"),
    (spoiled("conditions", 1, value="fig"), "'fig'"),
    (spoiled("models", "GaRA", "options", value={}), "options"),
    (spoiled("models", value={}), "models"),
    (spoiled("data", value=["demo/", "b/"]), "data"),
    (spoiled("average", value="median"), "average")])
def test_stored_scores_that_do_not_fit_are_refused(tmp_path, monkeypatch, capsys, content, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.json").write_text(json.dumps(made_up_results(SAM_ONLY, ("clear", "fog"), images=2)))
    if content:
        (tmp_path / "text.json").write_text(content)
    assert run_cli(evaluate.main, "--from", "good.json", "text.json", "--out", "new") == 2
    assert one_error(capsys, "text.json", words)
    assert not os.path.exists("new")

def change_anywhere(place, rng):
    """Leaves out a value of a JSON's content, at any depth, or exchanges it for one of another form."""
    keys = list(place) if isinstance(place, dict) else range(len(place))
    key = keys[rng.integers(len(keys))]
    if isinstance(place[key], (dict, list)) and place[key] and rng.random() > 0.3:
        return change_anywhere(place[key], rng)
    others = [None, True, -1, math.nan, 10 ** 30, "fog", "x\udcff\n", [], {}, [[place[key]]], {"a": place[key]}]
    choice = rng.integers(len(others) + 1)
    if choice < len(others):
        place[key] = others[choice]
    else:
        del place[key]

def test_any_other_form_of_stored_scores_is_fine_or_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "DRAWS", 9)
    monkeypatch.setattr(figures, "DRAWS", 9)
    codes, rng = Counter(), np.random.default_rng(0)
    for _ in range(25):
        results = json.loads(stored_text())
        change_anywhere(results, rng)
        (tmp_path / "m.json").write_text(json.dumps(results))
        code = run_cli(evaluate.main, "--from", "m.json", "--out", "new")
        printed = capsys.readouterr()
        assert re.fullmatch("error: .*m.json.*\n" if code == 2 else "", printed.err)
        assert "| nan" not in printed.out
        codes[code] += 1
    assert codes.keys() == {0, 2}

def test_images_models_and_files_of_one_name_stay_apart(tmp_path):
    models = {"GaRA (a/b)": gara_of(0.5), "GaRA (a_b)": gara_of(1.0), "GaRA (a b)": gara_of(2.0)}
    results = made_up_results(models, ("clear",), images=2)
    for image in results["images"]:
        image["name"] = "0"
    assert "images: 2, masks: 3" in figures.about_of(results)
    assert len({*figures.draw_all(results, tmp_path)}) == 7
    parts = {path: made_up_results(SAM_ONLY, ("clear",), seed=seed) for seed, path in enumerate("abc")}
    parts["d"] = made_up_results({"SAM (c)": SAM_ONLY["SAM"]}, ("clear",), seed=9)
    assert list(evaluate.merge(parts)["models"]) == ["SAM", "SAM (b)", "SAM (c)", "SAM (c) (d)"]

def test_the_papers_figures(capsys):
    """Some as printed. And as Dice = 2 IoU / (1 + IoU) is concave, no mean Dice can be above that of the mean IoU."""
    paper = evaluate.read_paper()
    assert paper["lvis"]["vit_b", "SAM"]["point degraded"] == (65.0, 76.3, 89.8)
    assert paper["acdc"]["vit_l", "GaRA, then trained on BDD+LIS"] == {"box clear": (88.3, 92.6, None)}
    for name, models in paper.items():
        for columns in models.values():
            for iou, dice, _ in columns.values():
                if dice:
                    assert iou < dice <= 200 * iou / (100 + iou) + 0.1, name
    results = made_up_results(SAM_ONLY)
    results["backbone"] = "vit_b"
    evaluate.print_tables(results, "table5")
    row = next(line for line in capsys.readouterr().out.splitlines() if "LoRA 128 (paper)" in line)
    assert [cell.strip() for cell in row.split("|")[2:8]] == ["75.6", "84.6", "", "80.6", "88.1", ""]

# Figures.

def test_ticks_are_few_round_numbers_that_enclose_the_data():
    for low, high in ((0.61, 0.741), (-3, 2e6), (5, 5), (1e-4, 3e-4)):
        first, *_, last = found = list(figures.ticks(low, high))
        steps = np.diff(found)
        assert len(found) <= 7
        assert first - 1e-9 <= low <= high <= last + 1e-9
        assert steps == pytest.approx(steps[0])
        assert f"{steps[0]:.0e}"[0] in "125"
    assert figures.ticks(0, 2e6)[1e6] == "1,000,000"

@pytest.mark.parametrize("mark", figures.MARKS)
def test_axes_put_points_where_their_ticks_are(tmp_path, mark):
    points = [(0, 1), (10, 3)]
    panel = figures.Axes("title", {"a": points, "none": []}, "label", pad=(1, 0.5))
    styles = {"a": figures.Style("#ff0000", mark, 0), "none": figures.Style("#0000ff")}
    figure = Image.open(figures.draw_figure(tmp_path / "x.png", "title", "about", [panel], styles, columns=1))
    left, top, right, bottom = panel.inner
    assert panel.place(-1, 0.5) == pytest.approx((left, bottom))
    assert panel.place(11, 3.5) == pytest.approx((right, top))
    for point in points:
        x, y = panel.place(*point)
        assert figure.getpixel((round(x / 2), round(y / 2))) == (255, 0, 0)

def test_maps_are_white_at_0_and_black_at_1():
    page, _ = figures.start_page("", "", 200)
    figures.draw_map(page, (400, 20), (10, 8), np.array([[0, 0.5, 1]]))
    assert [page.getpixel((405 + 10 * k, 24)) for k in range(3)] == [(255,) * 3, (127,) * 3, (0,) * 3]

def test_oracles_against_loops():
    results = made_up_results(LORAS, ("clear", "fog", "snow"), images=7)
    found = figures.oracles(results["images"], list(LORAS), results["conditions"])
    for prompt in evaluate.PROMPTS:
        corrupt, instance, chosen = [], [], dict.fromkeys(LORAS, 0)
        for condition in ("fog", "snow"):
            corrupt.append(max(results["means"][name][f"{prompt} {condition}"][0] for name in LORAS))
            ious = []
            for image in results["images"]:
                scores = {name: np.array(image["scores"][name][condition][prompt])[:, 0] for name in LORAS}
                best = max(LORAS, key=lambda name: scores[name].sum())
                chosen[best] += 1 / 14
                ious += scores[best].tolist()
            instance.append(np.mean(ious))
        assert found["Oracle-Corrupt"]["iou"][f"{prompt} degraded"] == pytest.approx(np.mean(corrupt))
        assert found["Oracle-Instance"]["iou"][f"{prompt} snow"] == pytest.approx(instance[1])
        assert found["Oracle-Instance"]["iou"][f"{prompt} degraded"] == pytest.approx(np.mean(instance))
        assert found["Oracle-Instance"]["chosen"][prompt] == pytest.approx(chosen)

THREE = {f"a name of {k} letters": gara_of(k / 4) for k in (1, 2, 4)}
STRONGER = (*data.CONDITIONS, *(f"{name}@{x}" for name in data.CONDITIONS[1:] for x in (0.5, 2)))

def of_gates(*models):
    return [f"{kind}_{model}" for kind in ("dependence", "gates", "open", "strength_gates") for model in models]

@pytest.mark.parametrize("models, conditions, names", [
    (SAM_ONLY, ("clear",), []),
    (SAM_ONLY, data.CONDITIONS, ["corruptions"]),
    ({**SAM_ONLY, "GaRA (a/b)": gara_of(0.5)}, ("clear",), ["gates_GaRA__a_b_", "open_GaRA__a_b_"]),
    ({**LORAS, "GaRA": gara_of(0.5)}, STRONGER, ["corruptions", "strength", *of_gates("GaRA")]),
    (THREE, ("clear", "fog", "fog@3"),
     ["corruptions", "strength", "temperature", *of_gates(*(name.replace(" ", "_") for name in THREE))])])
def test_every_figure_that_the_results_allow_is_written(models, conditions, names, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "DRAWS", 99)
    paths = figures.draw_all(made_up_results(models, conditions), tmp_path / "new")
    assert sorted(paths) == sorted(str(tmp_path / "new" / f"{name}.png") for name in names)
    for path in paths:
        pixels = np.array(Image.open(path))
        assert pixels.shape[1] == 1400
        assert 140 < pixels.shape[0] < 2400
        assert (pixels == 255).all(2).mean() > 0.3  # a white ground
        assert (pixels < 128).all(2).mean() > 0.002  # and ink
        pixels[4:-4, 4:-4] = 255
        assert (pixels == 255).all()  # nothing runs over the page

def test_samples_are_the_least_middling_and_most_gains(mistakes):
    dataset, conditions = data.load_dataset("demo", "test"), ["clear", "fog", "snow", "rain"]
    models = {name: evaluate.load_predictor(f"mine.py:{name}") for name in ("Half", "Truth")}
    rows = [dict(data="demo", **row) for row in evaluate.evaluate(models, dataset, conditions)]
    rows[1]["scores"]["Truth"]["snow"]["point"] = [[0, 0, 0]] * len(rows[1]["indices"])
    results = dict(data=["demo"], models=models, images=rows, conditions=conditions)
    shown = evaluate.predict_samples(results, models, [dataset], rows=3)
    assert [row["label"].split()[0] for row in shown] == ["least", "middling", "most"]
    assert shown[0]["condition"] == "snow"
    assert shown[0]["iou"]["Truth"] == 0
    for row in shown:
        assert np.array_equal(row["predictions"]["Truth"], row["truth"])

def test_samples_have_a_row_each_and_a_column_per_model(tmp_path):
    truth = np.zeros((1, 60, 80), bool)
    truth[0, 5:20, 5:20] = True
    row = dict(condition="fog", image=np.full((60, 80, 3), 90, np.uint8), points=np.full((1, 3, 2), 10.0), truth=truth,
               predictions=dict(A=truth, B=~truth), iou=dict(A=1.0, B=0.0), label="worst")
    one = np.array(Image.open(figures.figure_samples([row], ["A", "B"], str(tmp_path / "1.png")))).astype(int)
    two = np.array(Image.open(figures.figure_samples([row, row], ["A", "B"], str(tmp_path / "2.png"))))
    assert one.shape[1] == two.shape[1] == 4 * 250 + 30
    assert 200 < len(two) - len(one) < 260
    _, right, a, b = (one[93:273, 20 + 250 * c:260 + 250 * c] for c in range(4))
    assert (right == a).all()
    assert (right != b).any()
    tint = 0.35 * 90 + 0.65 * np.array(figures.TINTS[0])
    assert np.abs(right[21:54, 21:54] - tint).max() <= 1.5

# The study.

def test_the_studys_estimates_are_those_of_the_normal_distribution():
    """Of sums over the masks of many images, and of many seeds: the variances of both add up."""
    rng = np.random.default_rng(1)
    masks = rng.integers(1, 5, 300).astype(float)
    sums = (rng.normal(0.6, 0.1, (40, 1)) + rng.normal(0, 0.2, (1, 300))) * masks
    mean, low, high, each = study.estimate(sums, masks)
    assert mean == pytest.approx(sums.sum() / masks.sum() / 40)
    assert each == pytest.approx(sums.sum(1) / masks.sum())
    residuals = (sums.mean(0) - mean * masks) / masks.mean()
    deviation = np.hypot(np.std(each) / 40 ** 0.5, residuals.std() / 300 ** 0.5)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    assert study.estimate(sums, masks)[1:3] == (low, high)

def test_what_gates_answer_to():
    """Gates that follow the corruption alone, the image alone, and only both together; and chance."""
    rng = np.random.default_rng(0)
    by_corruption = np.repeat(rng.random((1, 16, 60)) < 0.5, 40, 0)
    by_image = np.repeat(rng.random((40, 1, 60)) < 0.5, 16, 1)
    by_both = np.indices((40, 16, 1)).sum(0) % 2 == 0
    noise = rng.random((400, 16, 50)) < 0.5
    assert study.gate_variance(by_corruption) == pytest.approx((1, 0, 0))
    assert study.gate_variance(by_image) == pytest.approx((0, 1, 0))
    assert study.gate_variance(by_both) == pytest.approx((0, 0, 1))
    assert study.gate_variance(np.ones((40, 16, 9))) == (0, 0, 0)
    assert study.gate_variance(noise)[:2] == pytest.approx((15 / 6399, 399 / 6399), rel=0.15)  # degrees of freedom
    dealt = study.shuffled(by_corruption, rng)
    assert np.array_equal(np.sort(dealt, 1), np.sort(by_corruption, 1))
    assert study.probe(by_corruption, rng) == 1
    for silent in (by_image, noise, dealt):
        assert study.probe(silent, rng) == pytest.approx(1 / 16, abs=0.04)

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
    conditions = "--conditions", "clear", "fog", "snow", "--limit", 1
    assert run_evaluate(demo, "main_0", "--ckpt", "runs/gara_0/gara.pt", *conditions) == 0
    monkeypatch.setattr(study, "find_checkpoint", lambda backbone: str(demo / "w.pth"))
    study.freeze_gates("main_0", "runs/gara_0", "runs/frozen_0")
    assert run_evaluate(demo, "frozen_0", "--ckpt", "runs/frozen_0/gara.pt", *conditions) == 0
    monkeypatch.setattr(study, "read_evaluation", lambda out, name, seed: stored(f"{name}_{seed}"))
    vectors, spaces = study.gate_vectors(".", "main", 0, "gara")  # (images, conditions, layers, components)
    fixed, fixed_spaces = study.gate_vectors(".", "frozen", 0, "frozen")
    assert (fixed == fixed[0, 0]).all()
    assert (fixed_spaces == (2 * spaces.sum((0, 1)) > 3)).all()
    for layer, space in enumerate(fixed_spaces[0, 0]):
        those = vectors[:, :, layer][spaces[:, :, layer] == space]
        assert np.array_equal(fixed[0, 0, layer], 2 * those.sum(0) > len(those))

def fill_study(plan):
    """Made-up results of every job of a study, in study/: {(evaluation, run and seed): its means}.

    The scripts take every job's command, what it needs is there before it, and no two write to one folder.
    """
    means = {}
    for number, (folder, (command, needed)) in enumerate(study.study_jobs("study", **plan).items()):
        assert all(map(os.path.isdir, needed))
        os.makedirs(folder)
        evaluation = os.path.basename(folder).rpartition("_")[0]
        if "runs" in folder.split(os.sep):
            data.save_text(json.dumps(dict(learnable_parameters=4321)), f"{folder}/run.json")
            if not callable(command):
                args = train.parse([word for word in command[1:] if word != "--logistic-noise"])
                assert args.out == folder
                assert args.steps in (1, plan["steps"], 3 * plan["steps"])
        elif evaluation in study.EVALUATIONS:
            args = evaluate.parse(command[1:])
            assert args.out == folder
            files = {os.path.basename(os.path.dirname(path)): path for path in args.ckpt}
            models = {run: ("lora", dict(rank=3)) if run.startswith("lora") else gara_of(0.5) for run in files}
            found = made_up_results(SAM_ONLY | models, args.conditions, 3, seed=number)
            for run, path in files.items():
                assert os.path.isdir(os.path.dirname(path))
                found["models"][run]["file"] = path
                means[evaluation, run] = found["means"][run]
            for root in args.data[1:]:
                found["images"] += [image | dict(data=root) for image in found["images"]]
            found |= dict(data=args.data, torch="x", machine="y")
            data.save_text(json.dumps(found), f"{folder}/results.json")
    os.makedirs("study/jobs")
    data.save_text(json.dumps(dict(heads=["model", "images/s"], rows=[["SAM", "77.77"]])), "study/models.json")
    data.save_text(json.dumps(dict(command=["train.py", "--seed", "7"], seconds=61)), "study/jobs/x.json")
    return means

@pytest.mark.parametrize("seeds, leave", [(3, study.QUICK_STUDY["leave"]), (1, ())])
def test_the_studys_report_says_what_the_folders_hold(tmp_path, monkeypatch, seeds, leave):
    """Three seeds of few runs, and one seed of all runs: every table is there, and cells are means by hand."""
    monkeypatch.chdir(tmp_path)
    for module in (evaluate, study, figures):
        monkeypatch.setattr(module, "DRAWS", 99)
    plan = study.FULL_STUDY | dict(seeds=seeds, leave=leave)
    means = fill_study(plan)
    study.Report("study", plan).write()
    seen = train.parse(["--data", "x", *study.RUNS["unseen_gara"][1]]).conditions
    assert not {*study.UNSEEN} & {*seen}
    text = open("study/report.md").read()
    assert re.findall(r"^## (\d)", text, re.M) == [*"123456789"]
    assert "nan" not in text
    for words in ("| 4,321 |", "77.77", "train.py --seed 7    # 61 s", "| LoRA 64 - SAM |", "| GaRA - LoRA 64 |",
                  "| Table 10: random gates | GaRA, random gates |", "| GaRA per window | 6."):
        assert words in text
    for name in re.findall(r"\]\((.*?)\)", text):
        assert Image.open(f"study/{name}").width == 1400
    for name, run, column in (("unseen", "unseen_gara", "point degraded"), ("real", "real_gara", "point night")):
        of_seeds = [means[name, f"{run}_{seed}"][column][0] for seed in range(seeds)]
        lines = text.split(f"study/{name}_*`", 1)[1].splitlines()
        row = next(line for line in lines if line.startswith(f"| {study.label_of(run)} |"))
        assert row.split("|")[2].split()[0] == f"{100 * np.mean(of_seeds):.1f}"

# The page.

CLICK = dict(image=0, corruption="fog", strength=1, noise=0, model=0, points=[[60, 60, 1]], box=None)

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
def site(demo):
    """A page at a free port: plain SAM, GaRA and LoRA with the recipe's weights, on demo scenes."""
    files = [str(demo / f"{method}.pt") for method in ("gara", "lora")]
    gara.save_adapter(tiny("gara"), files[0])
    gara.save_adapter(tiny("lora"), files[1])
    words = ["--checkpoint", str(demo / "w.pth"), "--adapter", *files, "--port", "0", "--device", "cpu"]
    with serving(page.make_server(page.parse(words))) as server:
        yield server

def pixels(content):
    """The pixels of a PNG, given as bytes or in base64."""
    if isinstance(content, str):
        content = base64.b64decode(content)
    return np.array(Image.open(io.BytesIO(content)))

def send(server, method, path, body=None, headers={}):
    """(status, what was answered: a dict, an image's pixels, or text). A dict as body is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body, headers)
    answer = connection.getresponse()
    content, kind = answer.read(), answer.headers["Content-Type"]
    connection.close()
    if kind == "application/json":
        return answer.status, json.loads(content)
    return answer.status, pixels(content) if kind == "image/png" else content.decode()

def ask(site, path, **changes):
    """What the page answers to a click, or to one that differs in some of its parts."""
    status, found = send(site, "POST", path, CLICK | changes)
    assert status == 200
    return found

def predictor_of(site, model, corruption="fog"):
    """A predictor of one of the page's models, and the first scene as it has encoded it."""
    image, _ = data.demo_scene(data.seed_of("page", 0))
    image = data.degrade(image, corruption, data.seed_of("scene-1", corruption))
    predictor = sam.SamPredictor(site.bench.models[model].sam)
    predictor.set_image(image)
    return predictor, image

def test_page_asks_nobody_else_and_says_what_there_is(site):
    _, text = send(site, "GET", "/")
    assert "<title>GaRA-SAM</title>" in text
    assert not re.search(r"https?:|//\w+\.\w", text)
    assert {*re.findall(r'ask\("(.*?)"', text)} == {*page.ROUTES["POST"]}
    _, found = send(site, "GET", "/start")
    assert [image["name"] for image in found["images"]] == [f"scene-{k}" for k in range(1, 13)]
    assert [model["name"] for model in found["models"]] == ["SAM", "GaRA 4,48", "LoRA 4"]
    assert [model["sets"] for model in found["models"]] == [[], [4, 48], [4]]
    assert found["corruptions"] == [*CORRUPTIONS, *OTHERS]
    assert send(site, "GET", "/thumbnail?0")[1].shape == predictor_of(site, 0)[1].shape

def test_page_degrades_as_evaluation_does(site):
    _, expected = predictor_of(site, 0, "snow")
    _, clear = predictor_of(site, 0, "clear")
    assert np.array_equal(ask(site, "/image", corruption="snow"), expected)
    assert (ask(site, "/image", corruption="snow", noise=1) != expected).mean() > 0.2
    assert np.array_equal(ask(site, "/image", corruption="snow", strength=0), clear)
    assert np.array_equal(ask(site, "/image", corruption="none"), clear)

def test_page_shows_the_gates(site):
    """Beside gates() itself: what is open, which set is chosen, how many; shares and means where windows decide."""
    predictor_of(site, 1)
    windows = tiny("gara", scope="window")
    encode(windows, pictures(0))
    shown = [(site.bench.models[1].sam, ask(site, "/encode", model=1)["layers"]),
             (windows, page.gate_layers(page.Model("GaRA", "gara.pt", (4, 48), windows)))]
    for model, layers in shown:
        for layer, gate in zip(layers, gara.gates(model), strict=True):
            higher = gate["space"].float().mean().item()
            assert layer["open"] == pytest.approx(gate["vector"].reshape(-1, 52).float().mean(0).tolist())
            assert layer["chosen"] == pytest.approx([1 - higher, higher])
            assert layer["count"] == pytest.approx(sum(layer["open"]), abs=0.1)
    assert ask(site, "/encode", model=0)["layers"] == []
    assert [layer["count"] for layer in ask(site, "/encode", model=2)["layers"]] == [4] * 6

@pytest.mark.parametrize("model, points, box, count", [
    (0, [[60, 60, 1]], None, 3),
    (1, [[60, 60, 1], [5, 5, 0]], None, 1),
    (2, [], [20, 20, 90, 80], 1),
    (1, [[60, 60, 1]], [20, 20, 90, 80], 1)])
def test_page_predicts_what_the_predictor_does(site, model, points, box, count):
    found = ask(site, "/predict", model=model, points=points, box=box)
    coords = [point[:2] for point in points] or None
    labels = [point[2] for point in points] or None
    predictor, _ = predictor_of(site, model)
    masks, scores, _ = predictor.predict(coords, labels, box, multimask_output=count == 3)
    assert len(found["masks"]) == count
    for text, mask in zip(found["masks"], masks, strict=True):
        assert np.array_equal(pixels(text), mask)
    assert found["scores"] == pytest.approx(scores.tolist())

def test_page_compares_with_the_truth_and_with_the_mask_on_the_clear_image(site):
    _, masks = data.demo_scene(data.seed_of("page", 0))
    y, x = np.argwhere(masks[1])[0].tolist()
    with_truth = ask(site, "/predict", points=[[x, y, 1]])
    with_clear, clear = ask(site, "/predict", against="clear"), ask(site, "/predict", corruption="none")
    assert with_truth["object"] == "1"
    for found, expected in ((with_truth, [masks[1]] * 3), (with_clear, map(pixels, clear["masks"]))):
        for text, mask, iou in zip(found["masks"], expected, found["iou"], strict=True):
            assert iou == pytest.approx(evaluate.mask_scores(pixels(text)[None], mask[None])[0, 0])
    assert ask(site, "/predict", corruption="none", against="clear")["iou"] == [1, 1, 1]
    y, x = np.argwhere(~masks.any(0))[0].tolist()
    found = ask(site, "/predict", points=[[x, y, 1]])
    assert found["object"] is None
    assert found["iou"] is None

@pytest.mark.parametrize("points, box, expected", [
    ([[3, 3, 1]], None, "whole"),
    ([[12, 12, 1]], None, "part"),
    ([[3, 3, 1], [12, 12, 0]], None, None),
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
        _, found = send(site, "POST", "/upload", page.png(np.array(image)))
        numbers.append(found["image"])
    assert os.listdir(tmp_path) == []
    image.thumbnail((1024, 1024))
    assert np.array_equal(ask(site, "/image", corruption="none", image=numbers[-1]), np.array(image))
    assert send(site, "POST", "/image", CLICK | dict(image=numbers[1]))[0] == 200
    assert send(site, "POST", "/image", CLICK | dict(image=numbers[0]))[0] == 404
    assert ask(site, "/predict", image=numbers[-1], points=[[60, 5, 1]])["iou"] is None  # there is no truth
    assert len(send(site, "GET", "/start")[1]["images"]) == 12

def refuses(site, status, word, *request):
    """The page answers this request with the status and one line of JSON that tells no path, and goes on."""
    found, content = send(site, *request)
    assert found == status
    assert list(content) == ["error"]
    assert word in content["error"]
    assert not re.search(f"\n|/home|{tempfile.gettempdir()}", content["error"])
    assert send(site, "GET", "/start")[0] == 200

@pytest.mark.parametrize("request_, status, word", [
    (("GET", "/../data.py"), 404, "address"),
    (("GET", "/predict"), 404, "address"),
    (("PUT", "/"), 501, "PUT"),
    (("GET", "/" + "a" * 70000), 414, "Long"),
    (("GET", "/thumbnail?../w.pth"), 404, "image"),
    (("POST", "/image", b"", dict(Host="127.0.0.1.evil.example")), 403, "Host"),
    (("POST", "/image", b"", dict(Host="192.168.0.7:8000")), 403, "Host"),
    (("POST", "/image", b"", dict(Origin="http://evil.example")), 403, "page"),
    (("POST", "/image", b"", {"Content-Length": "9" * 12}), 413, "bytes"),
    (("POST", "/image", b"", {"Content-Length": "-1"}), 400, "Content-Length"),
    (("POST", "/image", "[" * 60000), 400, "JSON"),
    (("POST", "/image", b"\xff\xfe"), 400, "JSON"),
    (("POST", "/image", "x" * 100000), 413, "bytes"),
    (("POST", "/upload", b"x" * (page.MAX_UPLOAD + 1)), 413, "bytes"),
    (("POST", "/upload", b"%!PS-Adobe-3.0 EPSF-3.0"), 400, "JPEG"),
    (("POST", "/upload", page.png(scene())[:999]), 400, "cannot read"),
    (("POST", "/upload", page.png(np.zeros((7000, 7000), bool))), 413, "pixels"),
    (("POST", "/upload", page.png(scene(900, 15))), 400, "small")],
    ids=lambda value: str(value)[:40])
def test_page_refuses_in_one_line_of_json(site, capfd, request_, status, word):
    refuses(site, status, word, *request_)
    assert capfd.readouterr().err == ""

WRONG = dict(
    image='-1, 1000000000, "0", [0], true',
    corruption='"clear", "fog@9", ["fog"], null',
    strength='2.01, -1, "1", NaN, Infinity, null, true',
    noise='-1, 0.5, 4294967296',
    model='3, -1, 0.0',
    points='null, {}, [], [1], [[1, 2]], [[1, 2, 3]], [[1, 2, "1"]], [[-0.1, 2, 1]], [[128, 2, 1]], [[NaN, 2, 1]], '
    + str([[1, 2, 1]] * 65),
    box='[1, 2, 3], "all", [5, 5, 5, 9], [9, 5, 2, 9], [0, 0, 999, 9], [0, 0, NaN, 9]')

@pytest.mark.parametrize("part", WRONG)
def test_page_checks_each_number(site, part):
    for value in json.loads(f"[{WRONG[part]}]"):
        refuses(site, 404 if part in ("image", "model") else 400, part, "POST", "/predict", CLICK | {part: value})

def test_page_answers_two_clients_at_once(site, monkeypatch):
    """Each gets what it gets alone, whatever the other asks about, and models are asked by one at a time."""
    usual, free = page.ask, threading.Lock()

    def asked_alone(*question):
        assert free.acquire(blocking=False)
        time.sleep(0.02)
        free.release()
        return usual(*question)

    monkeypatch.setattr(page, "ask", asked_alone)
    asked = [dict(image=k // 2, corruption="fog" if k % 2 else "snow", model=k % 3) for k in range(6)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda changes: ask(site, "/predict", **changes), asked))
    site.bench.encoded.cache_clear()
    assert together == [ask(site, "/predict", **changes) for changes in asked]

def test_page_hides_paths_and_survives_faults(site, monkeypatch, capfd):
    def damaged(number):
        raise data.SampleError("/home/me/photo.jpg: cannot read this image")

    monkeypatch.setattr(site.bench, "read", damaged)
    refuses(site, 400, "cannot be read", "POST", "/predict", CLICK)
    assert "/home/me/photo.jpg" in capfd.readouterr().err
    monkeypatch.setattr(site.bench, "read", lambda number: 1 / 0)
    refuses(site, 500, "ZeroDivisionError", "POST", "/predict", CLICK)
    assert "Traceback" in capfd.readouterr().err
    monkeypatch.undo()
    ask(site, "/predict")

def test_page_leaves_no_thread(site):
    """Also with a connection that a browser has opened and does not use."""
    before, started = set(threading.enumerate()), time.monotonic()
    with serving(page.Server("0.0.0.0", 0, site.bench)) as server:
        idle = socket.create_connection(server.server_address)
        assert send(server, "GET", "/start", None, dict(Host="192.168.0.7:8000"))[0] == 200  # the network's own
        assert send(server, "GET", "/start", None, dict(Host="evil.example"))[0] == 403
    assert set(threading.enumerate()) <= before
    assert time.monotonic() - started < 20  # well below a visitor's time to keep silent
    assert idle.recv(1) == b""
    idle.close()

def test_images_to_choose_from(demo, tmp_path):
    Image.fromarray(scene(90, 2000)).save(tmp_path / "b.JPG")
    (tmp_path / "c.txt").write_text("no image")
    words = ["--images", str(tmp_path), "--data", str(demo / "demo"), "--split", "val"]
    photo, *samples = page.list_entries(page.parse(words))
    assert photo.read()[0].shape == (46, 1024, 3)
    for entry, sample in zip(samples, data.load_dataset(demo / "demo", "val"), strict=True):
        image, objects = entry.read()
        assert np.array_equal(image, sample.image())
        assert tuple(objects) == sample.indices
        assert np.array_equal(list(objects.values()), sample.masks())
        assert [entry.kind, entry.split] == ["robustseg", "val"]

@pytest.mark.parametrize("words, said", {
    "--port 70000": "--port", "--backbone vit_x": "--backbone", "--adapter none.pt": "none.pt",
    "--checkpoint none.pth": "none.pth", "--data none": "none", "--images none": "none",
    "--images .": "no image", "--host 300.1.1.1": "300.1.1.1", "--device nonsense": "nonsense"}.items())
def test_mistakes_at_the_page_end_in_one_line(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    assert run_cli(page.main, *words.split()) == 2
    assert one_error(capsys, said)

def test_ctrl_c_ends_the_page_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(page.Server, "serve_forever", lambda server: signal.raise_signal(signal.SIGINT))
    assert run_cli(page.main, "--port", 0) == 0
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+ \(Ctrl-C ends\)\n\nended\n", capsys.readouterr().out)

# What is shipped.

def test_shipped_tiny_sam_segments_fresh_scenes():
    predictor, ious = sam.SamPredictor(sam.build_sam("vit_t", os.path.join(HERE, "assets", "sam_vit_t.pth"))), []
    for seed in range(6):
        image, masks = data.demo_scene(seed + 10**6)
        predictor.set_image(image)
        for k, mask in enumerate(masks):
            found = predictor.predict(box=data.prompts(mask, k)[1], multimask_output=False)[0]
            ious.append(evaluate.mask_scores(found, mask[None])[0, 0])
    assert np.mean(ious) > 0.7

# ---- Benchmarks -----------------------------------------------------------------------------------------------------

import bench

CPU = torch.device("cpu")

def run_bench(capsys, *words):
    """{first cell: the other cells} of the tables that a benchmark prints; two spaces or more separate cells."""
    assert run_cli(bench.main, *words) == 0
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        name, *cells = re.split(r"  +", line.strip())
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
    assert 0 <= done["a"]["seconds"] < 1

@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_peak_memory_is_what_the_work_needs():
    with bench.PeakMemory(CPU) as peak:
        np.ones(50_000_000, np.uint8).sum()
    assert 40e6 < peak.bytes < 80e6

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
    rows = run_bench(capsys, "sam", "--backbone", "vit_t", "--batch", 2, "--rounds", 1, "--compile", "--device", "cpu",
                     "--against", f"{tmp_path / 'other.py'}:other")
    seconds, images_per_second, *_ = rows["float32"]
    assert float(seconds) * float(images_per_second) == pytest.approx(2, rel=0.1)
    assert rows["float32"][-1] == rows["other"][-1] == "0e+00, 1.0000"
    difference, iou = rows["bfloat16"][-1].split(", ")
    assert 1e-5 < float(difference) < 0.1
    assert 0.9 < float(iou) < 1
    assert "ZeroDivisionError" in rows["float32, compiled"][-1]
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

def test_bench_gara_and_step(capsys):
    rows = run_bench(capsys, "gara", "--backbone", "vit_t", "--rounds", 1, "--device", "cpu")
    for method in gara.METHODS:
        count = sum(value.numel() for value in gara.adapter_state(tiny(method)).values())
        assert rows[method][-2:] == [f"{count:,}", f"{4 * count / 1e6:.1f}"]
    for rank in (4, 24, 52):
        assert float(rows[f"rank {rank}: gated_linear"][2]) < 1e-4  # from what autograd makes of it
    rows |= run_bench(capsys, "step", "--backbone", "vit_t", "--rounds", 1, "--device", "cpu")
    for name in ("SAM", "GaRA, 48 of 48 components", "GaRA, 1 of 48 components", "GaRA per window",
                 "LoRA 16, bfloat16", "GaRA per window, float32", "rank 52: x A m B by autograd"):
        assert float(rows[name][0]) > 0

def test_gates_that_are_set_open():
    model, x = tiny("gara").eval(), pictures(0, 2)
    for count in (48, 1):
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
    rows = run_bench(capsys, "train", "--data", demo / "demo", "--checkpoint", demo / "w.pth", "--batch-size", 2,
                     "--device", "cpu")
    assert 50 <= float(rows["draw prompts"][0]) <= float(rows["all of it"][0])
    parts = ("image encoder, forward", "decoder, forward", "optimizer", "loss and backward")
    step = {name: float(rows[name][0]) for name in parts}
    assert sum(step.values()) == pytest.approx(float(rows["the whole step"][0]), abs=0.1)
    assert step["decoder, forward"] >= 200  # points and boxes, for two images
    assert min(step.values()) > 0
    assert everything(demo) == before
    assert not os.listdir(tmp_path)

def test_bench_corruptions_from_anywhere(tmp_path):
    Image.fromarray(scene(90, 120)).save(tmp_path / "photo.png")
    command = [sys.executable, bench.__file__, "corruptions", "photo.png", "--rounds", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    times = {name: float(ms) for name, ms in re.findall(r"^(\w+|all 15)  +([\d.]+) ", done.stdout, re.M)}
    assert times.keys() == {*CORRUPTIONS, "all 15"}
    assert times.pop("all 15") == pytest.approx(sum(times.values()), abs=1)

def test_bench_models(mistakes, capsys):
    """Table 8 of SAM, an adapter, and predictors of which one fails."""
    gara.save_adapter(tiny("gara"), "gara.pt")
    printed = run_bench(capsys, "models", "--data", "demo", "--checkpoint", "w.pth", "--ckpt", "gara.pt",
                        "--predictor", "mine.py:half", "mine.py:Broken", "--limit", 2, "--rounds", 1,
                        "--device", "cpu", "--json", "table8.json")
    table = json.load(open("table8.json"))
    rows = {name: cells for name, *cells in table["rows"]}
    assert list(rows) == ["SAM", "GaRA", "half", "Broken"]
    learnable, size, memory, _ = rows["GaRA"]
    count = sum(value.numel() for value in gara.adapter_state(tiny("gara")).values())
    assert learnable == f"{count:,}"
    assert float(size) == pytest.approx(os.path.getsize("gara.pt") / 1e6, abs=0.1)
    if sys.platform == "linux":
        assert float(memory) > 11  # its weights alone
    assert rows["half"][:3] == ["-", "-", "-"]
    assert "ZeroDivisionError" in rows["Broken"][-1]
    assert printed["SAM"] == rows["SAM"]

@pytest.mark.parametrize("arguments, words", {
    "": "sam", "what": "what", "sam --what": "--what", "sam --batch 0": "--batch",
    "gara --rounds 0": "--rounds", "sam --device nonsense": "--device", "step --device cuda:99": "--device",
    "sam --backbone vit_t --against none.py:x": "none.py",
    "sam --backbone vit_t --against other.py:absent": "no_such_module",
    "train": "--data", "train --data none": "none", "train --data x --steps 0": "steps",
    "corruptions": "photo", "corruptions none.jpg": "none.jpg", "corruptions tiny.png": "ValueError",
    "models": "--data", "models --data none": "none", "models --data x --limit 0": "--limit"}.items())
def test_mistakes_at_a_bench_end_in_one_line(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.py").write_text(OTHER_SAM)
    Image.fromarray(scene(9, 12)).save("tiny.png")
    before = everything(tmp_path)
    assert run_cli(bench.main, *arguments.split()) == 2
    assert one_error(capsys, words)
    assert everything(tmp_path) == before

def test_importing_others_needs_none_of_them(monkeypatch):
    import others
    model = tiny()
    monkeypatch.setattr(sam, "build_sam", lambda backbone, checkpoint: model)
    restored, plain = others.Restored(), sam.SamPredictor(model)
    restored.set_image(scene())
    plain.set_image(scene())
    assert torch.equal(restored.predictor.features.cpu(), plain.features)  # its network changes nothing
