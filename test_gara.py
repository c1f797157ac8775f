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

def attention_inputs(U=3, S=4, Q=16, c=8):
    """q, k, v, bias_h and bias_w of U heads of windows."""
    rng = torch.Generator().manual_seed(0)
    inputs = []
    for shape in ((U, Q, c), (U, S * S, c), (U, S * S, c), (U, Q, S), (U, Q, S)):
        tensor = torch.randn(shape, generator=rng, dtype=torch.float64)
        inputs.append(tensor.requires_grad_())
    return inputs

@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("form", ["attention", "attention_for_training", "attention_for_gpus"])
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
    with torch.set_grad_enabled(form != "attention"):
        found = getattr(sam, form)(*inputs)
    assert close(found, expected, 1e-12)
    if form == "attention":  # which overwrites the scores
        return
    gradients = torch.autograd.grad(found.sin().sum(), inputs)
    expected_gradients = torch.autograd.grad(expected.sin().sum(), inputs)
    for gradient, plain in zip(gradients, expected_gradients):
        assert close(gradient, plain, 1e-10)

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("most, kept", [(2 * 7 ** 4, 10**9), (100, 10**9), (100, 0), (1, 0)])
def test_attention_in_pieces_equals_one_piece(monkeypatch, most, kept, window, device):
    """Some heads of windows at a time, some queries of one, a single query; with scores kept or made again."""
    torch.manual_seed(0)
    layer = sam.Attention(12, 3, window, 7).double().to(device)
    for table in (layer.rel_pos_h, layer.rel_pos_w):
        torch.nn.init.normal_(table)
    x = torch.randn(2, 7, 7, 12, dtype=torch.float64, device=device, requires_grad=True)
    outputs = []
    for scores_at_once, scores_kept in ((10**9, 10**9), (most, kept)):
        monkeypatch.setitem(sam.SCORES_AT_ONCE, device, scores_at_once)
        monkeypatch.setattr(sam, "SCORES_KEPT", scores_kept)
        y = layer(x)
        gradients = torch.autograd.grad(y.sin().sum(), (x, *layer.parameters()))
        outputs.append((y, *gradients))
    for whole, pieces in zip(*outputs):
        assert close(pieces, whole, 1e-10)
    with torch.no_grad():
        assert close(layer(x), y, 1e-12)

@pytest.mark.parametrize("most, largest", [
    (10**9, 6 * 49 * 49),
    (3 * 49 * 49, 3 * 49 * 49),
    (200, 4 * 49),
    (1, 49)])
def test_no_more_scores_at_once_than_allowed(monkeypatch, most, largest):
    """Six heads of a 7 x 7 image; at least one query, whose 49 scores are the least there is."""
    sizes, attention = [], sam.attention

    def measured(q, k, *rest):
        sizes.append(len(q) * q.shape[1] * k.shape[1])
        return attention(q, k, *rest)

    monkeypatch.setattr(sam, "attention", measured)
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

@pytest.fixture
def agree(predictor):
    """A function that predicts, compares with `decode` of an image that is not prepared, and returns the logits."""
    coords = torch.tensor([[[30., 40]], [[60, 9]]])
    labels = torch.ones(2, 1)

    def agree(mask=None):
        with torch.no_grad():
            expected, _ = predictor.model.decode(predictor.features, (coords, labels), masks=mask)
        _, _, found = predictor.predict_torch(coords, labels, mask_input=mask, multimask_output=False)
        assert close(found, expected, 1e-5)
        return found

    return agree

@pytest.fixture
def preparations(predictor, monkeypatch):
    """How often an image was prepared: a list that grows."""
    made, prepare = [], predictor.model.prepare
    monkeypatch.setattr(predictor.model, "prepare", lambda features: made.append(1) or prepare(features))
    return made

def test_an_image_is_prepared_once(predictor, agree, preparations):
    first = agree()
    assert torch.equal(agree(), first)
    with torch.autocast("cpu", torch.bfloat16):
        predictor.predict(**POINT)
    assert len(preparations) == 1
    assert not close(agree(torch.randn(2, 1, 64, 64)), first, 1e-2)  # mask prompts need another preparation
    assert len(preparations) == 1
    predictor.set_image(scene(96, 128, seed=1))
    assert not close(agree(), first, 1e-2)
    assert len(preparations) == 2

def test_an_image_is_prepared_anew_for_another_embedding(predictor, agree, preparations):
    first = agree()
    predictor.features = predictor.features.flip(2).clone()
    second = agree()
    assert not close(second, first, 1e-2)
    predictor.features *= 2
    assert not close(agree(), second, 1e-2)
    assert len(preparations) == 3

FIRST_LAYER = "mask_decoder.transformer.layers.0"

@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("name", [
    "prompt_encoder.no_mask_embed.weight", f"{FIRST_LAYER}.cross_attn_token_to_image.v_proj.weight",
    f"{FIRST_LAYER}.cross_attn_token_to_image.k_proj.weight", f"{FIRST_LAYER}.cross_attn_image_to_token.q_proj.bias"])
def test_an_image_is_prepared_anew_for_other_weights(predictor, agree, preparations, name, through_data):
    before = agree()
    weight = predictor.model.get_parameter(name)
    if through_data:
        weight.data[:1] += 1  # which autograd does not see
    else:
        with torch.no_grad():
            weight[:1] += 1
    assert not close(agree(), before, 1e-3)
    assert len(preparations) == 2

def test_prepare_uses_the_weights_that_it_names(predictor):
    """With all others NaN, what it makes is the same."""
    model = predictor.model
    before = model.prepare(predictor.features)
    used = {tensor.data_ptr() for tensor in model.preparing_weights()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.data_ptr() not in used:
                tensor.fill_(math.nan)
    after = model.prepare(predictor.features)
    assert torch.equal(after.tokens, before.tokens)
    assert torch.equal(after.positions, before.positions)
    for a, b in zip(after.projected, before.projected):
        assert torch.equal(a, b)

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
        assert masks.shape == (len(scores), 3, *image.shape[:2])
        assert output["masks"].shape == masks.shape
        assert output["masks"].dtype == torch.bool
        assert close(output["low_res_logits"], low_res)
        assert close(output["iou_predictions"], scores)
        assert (output["masks"] == masks).float().mean() > 0.999
        assert 0 < masks.float().mean() < 1

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
    assert scores.dtype == np.float32
    assert scores.shape == (count,)
    assert low_res.dtype == np.float32
    assert low_res.shape == (count, 64, 64)
    assert np.isfinite(low_res).all()
    again, _, refined = predictor.predict(**arguments, mask_input=low_res[:1], return_logits=True)  # goes in again
    assert again.dtype == np.float32
    assert again.shape == masks.shape
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
    masks, _, low_res = predictor.predict(np.array([[50, 60]]), [1])
    assert masks.shape == (3, 120, 160)
    assert low_res.shape == (3, 32, 32)
    for size in (60, 8, 8192):
        with refused("image size", str(size)):
            sam.build_sam("vit_t", image_size=size)

@pytest.fixture(params=[1, 3], ids=["one image", "an image each"])
def block(request):
    """A first layer of the decoder, 3 x 5 tokens and their positions, and ImageTokens of one image, or of three."""
    torch.manual_seed(0)
    layer = sam.TwoWayAttentionBlock(16, 4, 32, first=True).double()
    shapes = (3, 5, 16), (3, 5, 16), (request.param, 49, 16), (1, 49, 16)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tokens, token_pe, pixels, positions = (tensor.requires_grad_() for tensor in tensors)
    return layer, tokens, token_pe, sam.ImageTokens(pixels, positions)

def same_with_gradients(found, expected, inputs):
    """Equal to rounding, and so is what comes back to each input, which is not zero."""
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-12)
    gradients = torch.autograd.grad(found.square().sum(), inputs)
    expected_gradients = torch.autograd.grad(expected.square().sum(), inputs)
    for gradient, plain in zip(gradients, expected_gradients):
        assert plain.abs().max() > 1e-3
        assert torch.allclose(gradient, plain, atol=1e-10)

@pytest.mark.parametrize("projected", [False, True])
def test_tokens_to_image_is_plain_attention(block, projected):
    block, tokens, _, image = block
    layer = block.cross_attn_token_to_image
    pixels = image.tokens.expand(3, -1, -1)
    expected = layer(tokens, pixels + image.positions, pixels)
    if projected:
        image.projected = block.project(image)
    found = layer.tokens_to_image(tokens, image)
    inputs = tokens, image.tokens, image.positions, layer.q_proj.bias, layer.v_proj.weight
    same_with_gradients(found, expected, inputs)

@pytest.mark.parametrize("projected", [False, True])
def test_image_to_tokens_is_plain_attention(block, projected):
    block, tokens, token_pe, image = block
    layer = block.cross_attn_image_to_token
    pixels = image.tokens.expand(3, -1, -1)
    expected = pixels + layer(pixels + image.positions, tokens + token_pe, tokens)
    if projected:
        image.projected = block.project(image)
    found = layer.image_to_tokens(image, tokens + token_pe, tokens)
    inputs = tokens, token_pe, image.tokens, image.positions, layer.q_proj.bias, layer.v_proj.weight
    same_with_gradients(found, expected, inputs)

def test_only_tokens_that_are_read_look_at_last():
    """The others change nothing: each looks by itself."""
    transformer = tiny().mask_decoder.transformer
    image = sam.ImageTokens(torch.randn(1, 36, 128), torch.randn(1, 36, 128))
    tokens = torch.randn(2, 7, 128)
    every, _ = transformer(image, tokens, outputs=7)
    some, _ = transformer(image, tokens, outputs=2)
    assert some.shape == (2, 2, 128)
    assert close(some, every[:, :2], 1e-5)

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

# ---- SAM: files and command line ------------------------------------------------------------------------------------

POS_EMBED, BIAS = "image_encoder.pos_embed", "mask_decoder.iou_prediction_head.layers.2.bias"

@pytest.mark.parametrize("content, words", [
    (b"", ["not a readable"]),
    (b"<html>404 not found</html>\n" * 9, ["not a readable"]),
    (b"cut", ["not a readable"]),
    (torch.nn.Linear(1, 1), ["not a readable"]),
    ([1, 2], ["not a SAM checkpoint"]),
    ({"a": torch.ones(2)}, ["not a SAM checkpoint"]),
    ({"model": {POS_EMBED: torch.ones(2)}}, ["not a SAM checkpoint"]),
    ({POS_EMBED: torch.ones(2)}, ["not a SAM checkpoint"]),
    ({POS_EMBED: 3}, ["not a SAM checkpoint"]),
    (lambda w: w.pop(BIAS), ["lacks", BIAS]),
    (lambda w: w.update({BIAS: 5}), [BIAS]),
    (lambda w: w.update({BIAS: torch.ones(4).int()}), [BIAS]),
    (lambda w: w.update({"image_encoder.blocks": torch.ones(1)}), ["unknown", "image_encoder.blocks"]),
    (lambda w: w.update({"sam_hq.weight": torch.ones(1)}), ["unknown", "sam_hq.weight"]),
    (lambda w: w.update({BIAS: torch.ones(5)}), [BIAS, "(5,)", "(4,)"]),
    (lambda w: w[BIAS].fill_(math.nan), [BIAS, "NaN"]),
    (lambda w: w[POS_EMBED].view(-1)[7:8].fill_(math.inf), [POS_EMBED, "infinite"])])
def test_checkpoints_that_are_refused(tmp_path, content, words):
    path = tmp_path / "w.pth"
    weights = {key: value.clone() for key, value in tiny_weights().items()}
    if type(content).__name__ == "function":
        content(weights)
        content = weights
    torch.save(weights if content == b"cut" else content, path)
    if isinstance(content, bytes):
        path.write_bytes(path.read_bytes()[:-5000] if content == b"cut" else content)
    with refused("w.pth", *words, kind=sam.CheckpointError):
        sam.build_sam("vit_t", path)

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

def operands(N=2, tokens=(5,), d=4, o=3, r=6, G=3, dtype=torch.float64, flat=False, update=1.0, device="cpu"):
    """x, weight, bias, A, B, mask for gated_linear. flat: one matrix, A and B without the leading 1."""
    rng = torch.Generator().manual_seed(0)
    sizes = (((N, *tokens, d), 1), ((G * o, d), d ** -0.5), ((G * o,), 1),
             ((G, r, d), d ** -0.5), ((G, o, r), update * r ** -0.5), ((N, r), 1))
    out = [torch.randn(shape, generator=rng, dtype=torch.float64) * size for shape, size in sizes]
    if flat:
        out[3:5] = out[3][0], out[4][0]
    return [t.to(device, dtype).requires_grad_() for t in out]

def plain_gated_linear(x, weight, bias, A, B, mask):
    """Equation 7, image by image and matrix by matrix."""
    A, B = (A[None], B[None]) if A.dim() == 2 else (A, B)
    o, out = B.shape[1], []
    for n in range(len(x)):
        blocks = [weight[g * o:(g + 1) * o] + B[g] @ torch.diag(mask[n]) @ A[g] for g in range(len(A))]
        out.append(x[n] @ torch.cat(blocks).T + bias)
    return torch.stack(out)

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["merged", "factored", "cheaper"])
@pytest.mark.parametrize("sizes, dtype, tolerance", [
    (dict(), torch.float64, 1e-12), (dict(G=1, flat=True, o=5, d=3, r=2), torch.float64, 1e-12),
    (dict(tokens=(2, 3), r=1), torch.float64, 1e-12), (dict(N=1, tokens=(1,), r=9), torch.float64, 1e-12),
    (dict(N=3, tokens=(8, 8), d=96, o=96, r=40), torch.float32, 1e-5)])
def test_gated_linear_is_equation_7(monkeypatch, form, sizes, dtype, tolerance, device):
    """Values, and gradients of everything; when only one gradient is asked for, that one alone."""
    monkeypatch.setattr(gara, "FORM", form)
    exact, inputs = operands(**sizes), operands(**sizes, dtype=dtype, device=device)
    tolerance = max(tolerance, 1e-4 if device == "cuda" else 0)
    y, expected = gara.gated_linear(*inputs), plain_gated_linear(*exact)
    assert y.dtype == dtype and close(y, expected, tolerance)
    with torch.no_grad():
        assert close(gara.gated_linear(*inputs), expected, tolerance)
        closed = torch.arange(inputs[5].numel(), device=device).view_as(inputs[5]) % 3 > 0  # some; of image 1 all
        closed[1:2] = True
        exact_mask, mask = (t[5].masked_fill(closed.to(t[5].device), 0) for t in (exact, inputs))
        assert close(gara.gated_linear(*inputs[:5], mask), plain_gated_linear(*exact[:5], exact_mask), tolerance)
    dy = torch.ones_like(expected).cos() * expected.detach()
    wanted = torch.autograd.grad(expected, exact, dy)
    for got, want in zip(torch.autograd.grad(y, inputs, dy.to(y)), wanted):
        assert got.dtype == dtype and close(got, want, tolerance)
    for i, want in enumerate(wanted):
        alone = [t.detach().requires_grad_(k == i) for k, t in enumerate(inputs)]
        gara.gated_linear(*alone).backward(dy.to(y))
        assert [t.grad is not None for t in alone] == [k == i for k in range(6)]
        assert close(alone[i].grad, want, tolerance)

@pytest.mark.parametrize("form", ["merged", "factored"])
def test_gated_linear_gradients_by_finite_differences(monkeypatch, form):
    monkeypatch.setattr(gara, "FORM", form)
    draw = functools.partial(torch.randn, dtype=torch.float64, requires_grad=True,
                             generator=torch.Generator().manual_seed(0))
    N, n, d, G, o, r = 2, 5, 6, 3, 4, 3
    inputs = draw(N, n, d), draw(G * o, d), draw(G * o), draw(G, r, d), draw(G, o, r), draw(N, r)
    assert torch.autograd.gradcheck(gara.gated_linear, inputs)

def test_gated_linear_refuses_operands_that_do_not_fit():
    x, weight, bias, A, B, mask = operands()
    for rest in ((A, B, mask[:1]), (A, B, mask[:, :2]), (A, B[:, :2], mask), (A[:2], B, mask)):
        with refused("do not fit"):
            gara.gated_linear(x, weight, bias, *rest)

def test_gated_linear_under_autocast():
    """bfloat16 is close to float32 in values and gradients, and parameters keep float32 gradients."""
    inputs = operands(N=2, tokens=(64,), d=96, o=96, r=16, dtype=torch.float32)
    expected = gara.gated_linear(*inputs)
    dy = expected.detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = gara.gated_linear(*inputs)
    assert y.dtype == torch.bfloat16 and close(y, expected, 0.02)
    for got, want in zip(torch.autograd.grad(y, inputs, dy.bfloat16()), torch.autograd.grad(expected, inputs, dy)):
        assert got.dtype == torch.float32 and (got - want).norm() < 0.02 * want.norm()

def test_small_updates_survive_autocast():
    """An update of W / 10,000 lies far below bfloat16's resolution (1/256), but is there on average over outputs."""
    x, weight, bias, A, B, mask = operands(N=2, tokens=(64,), d=96, o=96, r=16, dtype=torch.float32, update=1e-4)
    with torch.no_grad():
        true = plain_gated_linear(x, weight, bias, A, B, mask) - plain_gated_linear(x, weight, bias, A, 0 * B, mask)
        with torch.autocast("cpu", torch.bfloat16):
            seen = gara.gated_linear(x, weight, bias, A, B, mask).float()
            seen -= gara.gated_linear(x, weight, bias, A, 0 * B, mask).float()
    assert true.norm() < 3e-4 * plain_gated_linear(x, weight, bias, A, B, mask).norm()
    assert ((seen * true).sum() / true.square().sum()).item() == pytest.approx(1, abs=0.3)

COMPILERS = os.environ.get("CXX", "g++"), "g++", "clang++", "cl"

@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler")
def test_gated_linear_compiles_to_one_graph():
    inputs = operands(tokens=(7,), d=8, o=8, dtype=torch.float32)
    y, expected = torch.compile(gara.gated_linear, fullgraph=True)(*inputs), gara.gated_linear(*inputs)
    gradients = (torch.autograd.grad(out.square().sum(), inputs) for out in (y, expected))
    assert close(y, expected) and all(close(got, want) for got, want in zip(*gradients))

# ---- GaRA: the gates ------------------------------------------------------------------------------------------------

def test_gumbel_sigmoid_without_training_is_a_threshold():
    assert gara.gumbel_sigmoid(torch.tensor([-3, -1e-9, 0, 1e-9, 5.]), 0.5, training=False).tolist() == [0, 0, 0, 1, 1]

@pytest.mark.parametrize("temperature", [0.1, 0.5, 3])
def test_gumbel_sigmoid_chances(temperature):
    """The noise is logistic, so P(logit + e > 0) = sigmoid(logit) at any temperature; bound: four sigma."""
    torch.manual_seed(1)
    for logit in (-3, -0.7, 0, 0.4, 2):
        n, p = 40_000, 1 / (1 + math.exp(-logit))
        out = gara.gumbel_sigmoid(torch.full((n,), float(logit)), temperature)
        assert out.unique().tolist() == [0, 1]  # exactly
        assert abs(out.mean().item() - p) < 4 * math.sqrt(p * (1 - p) / n)

@pytest.mark.parametrize("temperature", [0.2, 0.5, 1])
def test_gumbel_sigmoid_gradient_is_that_of_the_sigmoid(temperature):
    logits = torch.linspace(-4, 4, 50, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(2)
    out = gara.gumbel_sigmoid(logits, temperature)
    grad, = torch.autograd.grad(out.sum(), logits)
    torch.manual_seed(2)
    u = torch.rand(50, dtype=torch.float64)
    noisy = logits.detach() + torch.log(u / (1 - u))
    s = 1 / (1 + torch.exp(-noisy / temperature))
    assert torch.equal(out.detach(), (noisy > 0).double())
    assert torch.allclose(grad, s * (1 - s) / temperature, rtol=1e-9) and (grad > 0).all()

def test_one_layer_by_hand():
    """Equations 2 to 7 from the gates' raw logits, one image at a time."""
    model, seen = tiny("gara"), {}
    for index in (0, 3):
        layer = gara.adapters(model)[index]
        hook = layer.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
        encode(model, pictures(0, 1, 2))
        hook.remove()
        for n in range(3):
            tokens = seen["x"][n].reshape(-1, 160)
            h = tokens.sum(0) / len(tokens)
            low, high, g = (mlp(h) for mlp in (layer.gate.G_l, layer.gate.G_h, layer.gate.G_0))
            on = [float(z > 0) for z in (low if g < 0 else high)]
            m = torch.tensor(on + [0.0] * 48 if g < 0 else [0.0] * 4 + on)
            W, b = layer.weight.unflatten(0, (3, 160)), layer.bias.view(3, 160)
            expected = [tokens @ W[i].T + b[i] + (tokens @ layer.A[i].T * m) @ layer.B[i].T for i in range(3)]
            assert close(seen["y"][n].reshape(-1, 480), torch.cat(expected, 1))
            assert gara.gates(model)[index]["space"][n] == int(g > 0) and m.any()

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

@pytest.mark.parametrize("method, rank", [("gara", 52), ("gara_flat", 4), ("lora", 4), ("moe_lora", 77)])
def test_gates_report_every_layer(method, rank):
    model = tiny(method)
    encode(model, pictures(0, 1, 2))
    report = gara.gates(model)
    assert [layer["layer"] for layer in report] == list(range(6))
    for layer, adapter in zip(report, gara.adapters(model)):
        assert layer["vector"].shape == (3, rank) and layer["vector"].dtype == torch.bool and len(layer["space"]) == 3
        assert layer["count"].tolist() == [sum(row) for row in layer["vector"].tolist()]
        assert torch.equal(layer["vector"].float(), adapter.mask) and not adapter.mask.requires_grad
        assert method != "lora" or layer["vector"].all()
    spaces = torch.stack([layer["space"] for layer in report])
    assert method != "gara" or (set(spaces.flatten().tolist()) == {0, 1} and (spaces != spaces[:1]).any())
    encode(model, pictures(4))
    assert gara.gates(model)[0]["vector"].shape == (1, rank)  # the last pass, not the one before

def test_gates_need_a_forward_pass():
    for model in (tiny(), gara.attach(tiny(), "gara")):
        with refused("attach", "encode", kind=RuntimeError):
            gara.gates(model)

@pytest.mark.parametrize("method", gara.METHODS)
def test_evaluation_is_free_of_noise_and_image_by_image(method):
    model = tiny(method)
    first = encode(model, pictures(0, 1, 2))
    assert torch.equal(encode(model, pictures(0, 1, 2)), first)
    other = encode(model, pictures(0, 3, 2))
    assert torch.equal(other[0], first[0]) and torch.equal(other[2], first[2]) and not close(other[1], first[1], 1e-2)
    assert close(encode(model, pictures(2)), first[2:], 1e-4)

@pytest.mark.parametrize("method", gara.METHODS)
def test_training_draws_noise_and_its_gradient_reaches_every_gate(method):
    model, x = tiny(method).train(), pictures(0, 1, 2, 3, 4, 5)
    torch.manual_seed(0)
    first = model.image_encoder(x)
    first.square().sum().backward()
    learnable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(learnable) == 6 * (2 + {"gara": 4 + 6 + 6, "gara_flat": 6, "lora": 0, "moe_lora": 4}[method])
    assert [name for name, p in learnable.items() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for name, p in model.named_parameters() if name not in learnable)
    assert close(encode(model, x), first, 1e-3) == (method == "lora")
    torch.manual_seed(0)
    assert close(encode(model, x), first, 1e-4)

# ---- GaRA: on a SAM -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", gara.METHODS)
def test_attach_changes_nothing_until_trained_and_detach_takes_it_back(method):
    model, x = tiny(), pictures(0, 1, 2)
    names, plain = list(model.state_dict()), encode(model, x)
    assert gara.attach(model, method) is model
    untrained = encode(model, x), encode(model.train(), x)
    assert not close(encode(train_by_chance(model.eval()), x), plain, 1e-2)  # first of all: it does act
    assert all(torch.equal(out, plain) for out in untrained)
    learnable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learnable.isdisjoint(names) and all(re.search(r"\.attn\.qkv\.(A|B|gate\.)", name) for name in learnable)
    assert gara.detach(model) is model and torch.equal(encode(model, x), plain)
    assert list(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())
    model.load_state_dict(tiny_weights(), strict=True)
    gara.attach(model, method)  # and again

def test_attach_is_bit_equal_at_the_size_of_vit_b():
    torch.manual_seed(0)
    linear, x = sam.Linear(768, 2304), torch.randn(1, 64, 64, 768)
    for gate in (gara.GaraGate(768, 16, 256, 0.5), gara.OpenGate(768, 16)):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert torch.equal(gara.Adapter(linear, gate)(x), linear(x))

def mlp_size(*widths):
    return sum(i * o + o for i, o in zip(widths, widths[1:]))

def expected_count(method, d, depth):
    """Parameters from the layers' widths: A and B for q, k and v, and the gate's MLPs."""
    ranks = {"gara": (4, 48), "gara_flat": (4,), "lora": (4,), "moe_lora": (1, 4, 24, 48)} if d == 160 else {
        "gara": (16, 256), "gara_flat": (16,), "lora": (16,), "moe_lora": (2, 16, 128, 256)}
    gate = {"lora": 0, "moe_lora": mlp_size(d, d // 2, 4),
            "gara_flat": mlp_size(d, d // 2, d // 4, ranks["gara_flat"][0]),
            "gara": mlp_size(d, d // 2, 1) + sum(mlp_size(d, d // 2, d // 4, rank) for rank in ranks["gara"])}[method]
    return depth * (3 * 2 * d * sum(ranks[method]) + gate)

@pytest.mark.parametrize("method", gara.METHODS)
@pytest.mark.parametrize("backbone, d, depth", [
    ("vit_t", 160, 6), ("vit_b", 768, 12), ("vit_l", 1024, 24), ("vit_h", 1280, 32)])
def test_parameter_counts(method, backbone, d, depth):
    """Table 8 of the paper prints 343M for GaRA on vit_l: its size in bytes."""
    with torch.device("meta"):
        model = gara.attach(sam.build_sam(backbone), method)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == expected_count(method, d, depth) == sum(p.numel() for p in gara.adapter_state(model).values())
    if (method, backbone) == ("gara", "vit_l"):
        assert count == 85_887_384 and round(4 * count / 1e6, 1) == 343.5

@pytest.mark.parametrize("method, options, word", [
    ("dora", {}, "gara, gara_flat, lora, moe_lora"), ("lora", dict(rank_low=3), "rank_low"),
    ("gara", dict(rank=3), "rank"), ("gara", dict(rank_low=0), "0"), ("lora", dict(rank=-1), "-1"),
    ("lora", dict(rank=2.5), "2.5"), ("lora", dict(rank=None), "None"), ("lora", dict(rank="8"), "8"),
    ("lora", dict(rank=641), "641"), ("moe_lora", dict(experts=()), "()"), ("moe_lora", dict(experts=(1, 0)), "(1, 0)"),
    ("moe_lora", dict(experts=3), "3"), ("gara", dict(temperature=0), "temperature"),
    ("gara", dict(temperature=math.nan), "nan"), ("gara", dict(temperature="warm"), "warm")])
def test_attach_refuses(method, options, word):
    model = tiny()
    with refused(word):
        gara.attach(model, method, **options)
    assert not gara.adapters(model) and all(p.requires_grad for p in model.parameters())

def test_attach_refuses_a_second_adapter():
    model = tiny("lora")
    before = encode(model, pictures(0))
    with refused("lora", "detach"):
        gara.attach(model, "gara")
    assert torch.equal(encode(model, pictures(0)), before)

# ---- GaRA: adapter files --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, options", [
    ("gara", {}), ("gara_flat", dict(rank=9, temperature=1.5)), ("lora", dict(rank=2)),
    ("moe_lora", dict(experts=(3, 5)))])
def test_save_and_load_adapter(tmp_path, method, options):
    model, path, x = tiny(method, **options), tmp_path / "a.pt", pictures(0, 1)
    meta = dict(step=7, note="first", losses=[0.5, 0.25], state=torch.arange(3))
    gara.save_adapter(model, path, **meta)
    weights, expected, fresh = torch.load(path, weights_only=True)["weights"], encode(model, x), tiny()
    assert weights.keys() == model.state_dict().keys() - tiny_weights().keys()
    assert path.stat().st_size < 4 * sum(value.numel() for value in weights.values()) + 60_000  # the adapter alone
    assert not torch.equal(encode(fresh, x), expected) and same(gara.load_adapter(fresh, path), meta)
    again = train_by_chance(gara.attach(tiny(), method, **options), seed=1)  # an equal adapter is filled
    gara.load_adapter(again, path)
    assert torch.equal(encode(fresh, x), expected) and torch.equal(encode(again, x), expected)
    assert fresh.adapter == model.adapter and os.listdir(tmp_path) == ["a.pt"]

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
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.pt"]

A2 = "image_encoder.blocks.2.attn.qkv.A"

@pytest.mark.parametrize("change, words", [
    (lambda c: c["weights"].pop(A2), [A2]), (lambda c: c["weights"].update({A2 + "2": torch.ones(1)}), [A2 + "2"]),
    (lambda c: c["weights"].update({A2: torch.ones(3, 52, 161)}), [A2]), (lambda c: c["weights"].update({A2: 5}), [A2]),
    (lambda c: c["weights"][A2][1, 2, :3].fill_(math.nan), [A2]), (lambda c: c.update(method="dora"), []),
    (lambda c: c["options"].update(rank_low=0), []), (lambda c: c["options"].update(rank_low=3), []),
    (lambda c: c.update(backbone="vit_b"), ["vit_b", "vit_t"]), (lambda c: c.update(weights=3), ["weights"]),
    (lambda c: c.update(image_size=64), ["image size 64", "128"]), (lambda c: c.pop("image_size"), ["image_size"]),
    (lambda c: c.update(base="0" * 16), ["other vit_t weights"]), (lambda c: c.pop("options"), ["options"]),
    (lambda c: c.update(format="2"), ["not an adapter file"]), (lambda c: c.clear(), ["not an adapter file"]),
    (lambda c: c.update(tiny_weights(), format=0), ["SAM checkpoint"]),
    (b"cut", ["not a readable adapter file"]), (b"", ["not a readable adapter file"]),
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
                         (tiny("gara", rank_high=8), ["detach"]), (tiny("lora"), ["lora", "detach"])):
        with refused(*words):
            gara.load_adapter(model, path)
    with refused("none.pt", kind=FileNotFoundError):
        gara.load_adapter(tiny(), tmp_path / "none.pt")

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gara_on_the_gpu_in_bfloat16():
    model, lora, x = tiny("gara").cuda().train(), tiny("lora").cuda(), pictures(0, 1).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        out = model.image_encoder(x)
        rounded = encode(lora, x).float()  # lora: no decision that rounding could turn over
    out.float().square().mean().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert (rounded - encode(lora, x)).norm() < 0.1 * rounded.norm()

# ---- Corruptions ----------------------------------------------------------------------------------------------------

# Ranges of output / input over the benchmark's own runs on five photographs, widened for a synthetic picture:
# mean, standard deviation, variance of the Laplacian, and PSNR in dB. Names and order are the benchmark's.
RANGES = {
    "snow": ((1.05, 2.0), (0.8, 1.4), (1.2, 14), (7, 18)), "fog": ((1.1, 2.6), (0.3, 0.5), (0.01, 0.3), (6.5, 17)),
    "rain": ((1.01, 1.6), (0.6, 1), (0.4, 1.6), (15, 30)),
    "gauss_noise": ((0.98, 1.02), (1, 1.06), (1.3, 15), (23.9, 25)),
    "ISO_noise": ((1.02, 1.6), (0.75, 1), (1.3, 15), (13.5, 20)),
    "impulse_noise": ((1.2, 1.46), (1, 1.4), (1.3, 2.3), (12, 19)),
    "resampling_blur": ((0.98, 1.02), (0.8, 1), (0.005, 0.15), (20, 31)),
    "motion_blur": ((0.98, 1.02), (0.8, 1), (0.02, 0.4), (14, 26)),
    "zoom_blur": ((0.9, 1.1), (0.75, 1), (0.1, 0.7), (14, 60)),
    "color_jitter": ((0.75, 1.25), (0.6, 1.3), (0.5, 1.9), (11, 18)),
    "compression": ((0.98, 1.02), (0.95, 1.05), (0.2, 1.4), (22, 30)),
    "elastic_transform": ((0.97, 1.03), (0.9, 1.02), (0.15, 0.6), (14, 24)),
    "frosted_glass_blur": ((0.99, 1.01), (0.98, 1.02), (2, 35), (16, 25)),
    "brightness": ((0.6, 0.8), (0.6, 0.8), (0.36, 0.64), (11, 20)),
    "contrast": ((0.8, 1.2), (1.2, 1.6), (1.6, 2.6), (16, 20))}

def flat(level, height=96, width=128):
    return np.full((height, width, 3), level, np.uint8)

def draws(name, seed):
    """The generator that corrupt(_, name, seed) hands to its function."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])

def mad(a, b):
    return np.abs(a.astype(float) - b).mean()

def test_registry():
    assert list(CORRUPTIONS) == list(RANGES)
    assert all("trength" in function.__doc__ for function in (CORRUPTIONS | OTHERS).values())
    assert not CORRUPTIONS.keys() & OTHERS.keys()

@pytest.mark.parametrize("name", [*RANGES, *OTHERS])
def test_corruption_contract(name):
    """Same arguments, same pixels; the input survives; layout of the memory is irrelevant; other seeds differ."""
    image, wide = scene(40, 52), np.zeros((40, 104, 3), np.uint8)
    before, wide[:, ::2] = image.copy(), image
    image.flags.writeable = False
    out = corrupt(image, name, seed=3)
    assert out.dtype == np.uint8 and out.shape == image.shape and not np.shares_memory(out, image)
    np.random.seed(0)  # the global generator plays no part
    assert np.array_equal(out, corrupt(np.asfortranarray(image), name, seed=3)) and np.array_equal(image, before)
    assert np.array_equal(out, corrupt(wide[:, ::2], name, seed=np.int64(3), strength=1))
    others = [corrupt(image, name, seed) for seed in (4, 5, 6, 2 ** 70)]
    assert name == "resampling_blur" or any((out != other).any() for other in others)  # the one without a draw

@pytest.mark.parametrize("name", [*RANGES, *OTHERS])
def test_corruption_strength(name):
    """0 is the identity, a breath above it is a breath of change, and more strength is more change."""
    image = scene(96, 128)
    clean = corrupt(image, name, 5, 0)
    assert np.array_equal(clean, image) and not np.shares_memory(clean, image)
    steps = (1e-6, 0.02, 0.1, 0.3, 0.6, 1, 1.01, 1.5, 2)
    change = np.array([[mad(corrupt(image, name, seed, s), image) for s in steps] for seed in range(4)])
    assert change[:, 0].max() <= 1.5 and change[:, 1].mean() < 0.15 * change[:, 5].mean() + 1
    slack = 0.02 * change[:, 5].mean() + 0.02  # whole pixels (resampling) and whole qualities (JPEG) ripple
    assert (np.diff(change.mean(0)) > -slack).all() and (np.diff(change, axis=1) > -2 * slack).all()
    assert (change[:, 6] - change[:, 5] < 0.1 * change[:, 5] + 0.1).all()  # no jump beyond 1
    assert change[:, 8].mean() > 1.05 * change[:, 5].mean() > 0

@pytest.mark.parametrize("shape", [(16, 16), (16, 200), (200, 16), (17, 23), (61, 45)])
def test_corruptions_of_any_size(shape):
    images = scene(*shape), flat(0, *shape), flat(255, *shape)
    for image, name, strength in itertools.product(images, [*RANGES, *OTHERS], (0.3, 1, 2)):
        with np.errstate(all="raise", under="ignore", divide="ignore"):
            assert corrupt(image, name, 1, strength).shape == image.shape

@pytest.mark.parametrize("arguments, clue", [
    ((scene(), "snowy"), "snow, fog, rain"), ((scene(), None), "snow, fog, rain"), ((scene(), ["fog"]), "snow, fog"),
    ((scene().astype(np.float32), "fog"), "float32"), ((scene()[..., 0], "fog"), "(120, 160)"),
    ((np.zeros((20, 20, 4), np.uint8), "fog"), "(20, 20, 4)"), (("photo.jpg", "fog"), "str"),
    ((scene(15, 99), "fog"), "99x15"), ((scene(), "fog", -1), "-1"), ((scene(), "fog", 1.5), "1.5"),
    ((scene(), "fog", 0, -0.1), "-0.1"), ((scene(), "fog", 0, math.nan), "nan"), ((scene(), "fog", 0, math.inf), "inf"),
    ((scene(), "fog", 0, "1"), "'1'")])
def test_corruptions_refuse(arguments, clue):
    with refused(clue):
        corrupt(*arguments)

@pytest.mark.parametrize("name", RANGES)
def test_measured_ranges(name):
    def laplacian(x):
        g = x @ np.array([0.299, 0.587, 0.114])
        return (g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]).var()

    rows = []
    for seed in range(12):
        image = scene(150, 200, seed % 3)
        out = corrupt(image, name, seed)
        psnr = 10 * np.log10(255 ** 2 / max(((out.astype(float) - image) ** 2).mean(), 1e-3))
        rows.append((out.mean() / image.mean(), out.std() / image.std(), laplacian(out) / laplacian(image), psnr))
    for value, (low, high), what in zip(np.median(rows, 0), RANGES[name], ("mean", "std", "Laplacian", "PSNR")):
        assert low <= value <= high, f"{what} {value:.3f} not in {low}..{high}"

@pytest.mark.parametrize("name, low, high, curve", [
    ("brightness", 0.6, 0.8, lambda x, f: np.floor(f * x)),
    ("impulse_noise", 1.4, 1.5, lambda x, f: np.floor(np.minimum(f * x, 255))),
    ("contrast", 1.6, 1.7, lambda x, f: np.floor(np.clip((x - 128) * f + 128, 0, 255)))])
def test_tables_of_levels(name, low, high, curve):
    """One factor for the whole picture, uniform in its range; every level goes through the closed form."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    factors = [draws(name, seed).uniform(low, high) for seed in range(40)]
    assert all((corrupt(ramp, name, seed) == curve(ramp.astype(float), f)).all() for seed, f in enumerate(factors))
    assert min(factors) < low + 0.2 * (high - low) and max(factors) > high - 0.2 * (high - low)
    assert np.array_equal(corrupt(ramp, name, 0, 2), curve(ramp.astype(float), factors[0] ** 2))  # stops double

def test_night_and_underwater_by_their_physics():
    """On flat pictures: exposure falls by known stops, noise is that of counted photons, and Beer's law holds."""
    for seed, level in itertools.product(range(3), (60, 200)):
        rng = draws("night", seed)
        depth, stops, _, _ = (rng.uniform(*ends) for ends in ((0.22, 0.7), (3, 4), (1, 1.3), (15, 30)))
        lamp = 0.42 * rng.uniform(0.7, 1.1)  # green
        light = np.exp(-depth) * (level / 255) ** 2 + (1 - np.exp(-depth)) * lamp
        photons = 400 * light * 2 ** -stops
        out = corrupt(flat(level, 200, 200), "night", seed)[..., 1] / 255  # green, which the white balance spares
        level_out, relative = np.sqrt(light * 2 ** (-stops / 2)), np.sqrt(photons + 4) / photons  # of light's noise
        assert out.mean() == pytest.approx(level_out * (1 - relative ** 2 / 8) - 0.5 / 255, rel=0.04)
        assert 0.3 * level_out * relative / 2 < out.std() < 1.1 * level_out * relative / 2  # JPEG removes some

        rng = draws("underwater", seed)
        distance, veil = rng.uniform(1, 2), np.array([0.1, 0.45, 0.5]) * rng.uniform(0.7, 1.1)
        expected = level * np.exp(-distance * np.array([0.9, 0.35, 0.3])) + 255 * veil * (1 - np.exp(-0.6 * distance))
        out = corrupt(flat(level, 200, 200), "underwater", seed)
        assert out.mean((0, 1)) == pytest.approx(np.minimum(expected, 255), rel=0.06)

def test_resampling_against_loops():
    image = scene(22, 29).astype(float)

    def bilinear(x, height, width):
        out = np.empty((height, width, 3))
        for i, j in itertools.product(range(height), range(width)):
            y = min(max((i + 0.5) * x.shape[0] / height - 0.5, 0), x.shape[0] - 1)
            z = min(max((j + 0.5) * x.shape[1] / width - 0.5, 0), x.shape[1] - 1)
            a, b = int(y), int(z)
            c, d = min(a + 1, x.shape[0] - 1), min(b + 1, x.shape[1] - 1)
            out[i, j] = ((a + 1 - y) * ((b + 1 - z) * x[a, b] + (z - b) * x[a, d])
                         + (y - a) * ((b + 1 - z) * x[c, b] + (z - b) * x[c, d]))
        return np.rint(out)

    expected = bilinear(bilinear(image, 5, 7), 22, 29)
    out, half = (corrupt(image.astype(np.uint8), "resampling_blur", strength=s) for s in (1, 0.5))
    assert np.abs(out - expected).max() <= 1 and np.mean(out == expected) > 0.99
    assert np.abs(half - (image + expected) / 2).max() <= 1

@pytest.mark.parametrize("strength, reach", [(1, 3), (2, 6)])
def test_glass_gathers_within_three_pixels(strength, reach):
    """Give each pixel its own colour: then the output tells where it was read, evenly over the 7x7 neighbours."""
    H, W = 60, 70
    code = np.arange(H * W)
    image = np.stack([code // 256, code % 256, code % 7], -1).astype(np.uint8).reshape(H, W, 3)
    out = corrupt(image, "frosted_glass_blur", 1, strength).astype(int)
    source = out[..., 0] * 256 + out[..., 1]
    assert np.array_equal(out[..., 2], source % 7)  # channels move together
    dy, dx = source // W - np.arange(H)[:, None], source % W - np.arange(W)
    assert max(abs(dy).max(), abs(dx).max()) == reach
    counts = np.histogram2d(dy[6:-6, 6:-6].ravel(), dx[6:-6, 6:-6].ravel(), bins=2 * reach + 1)[0]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 1.5 * counts.size  # chi-squared

def test_gauss_noise_statistics():
    grey = flat(128, 150, 150)
    residual = np.concatenate([corrupt(grey, "gauss_noise", seed).astype(float) - 128 for seed in range(6)])
    assert residual.std() == pytest.approx(15.97, rel=0.01) and residual.mean() == pytest.approx(-0.5, abs=0.1)
    assert abs(np.corrcoef(residual.reshape(-1, 3).T)[np.triu_indices(3, 1)]).max() < 0.02
    assert (corrupt(grey, "gauss_noise", 0, 0.5).astype(float) - 128).std() == pytest.approx(8, rel=0.03)

def test_iso_noise_destroys_hue_and_spares_grey():
    assert np.array_equal(corrupt(flat(90), "ISO_noise"), flat(90))  # no contrast, no colour: no noise
    steps = flat(0, 80, 80)
    steps[:, 40:] = (200, 40, 40)
    out, photons = corrupt(steps, "ISO_noise", 2), 0.75 * 60  # gain times the deviation of the HLS lightness, 0 and 120
    assert out[:, :40].mean() == pytest.approx(photons, rel=0.1)  # black lifts by the Poisson mean ...
    assert out[:, :40].std() == pytest.approx(np.sqrt(photons), rel=0.1)  # ... and its spread, without colour
    assert np.ptp(out[:, :40], axis=-1).max() == 0
    assert np.ptp(out[:, 40:].mean((0, 1))) < 0.2 * 160  # red averages towards grey

def test_jpeg_is_encoded_with_red_and_blue_swapped():
    image, file = scene(64, 80), io.BytesIO()
    quality = int(draws("compression", 0).integers(5, 11))
    Image.fromarray(image[..., ::-1].copy()).save(file, "JPEG", quality=quality, subsampling=2)
    assert np.array_equal(corrupt(image, "compression", 0), np.asarray(Image.open(file))[..., ::-1])

def test_motion_blur_of_a_point_is_one_straight_line():
    image, lengths, shifts = flat(0, 75, 75), [], []
    image[37, 37] = 255
    for seed in range(300):
        out = corrupt(image, "motion_blur", seed)[..., 0]
        ys, xs = np.nonzero(out)
        n = max(np.ptp(ys), np.ptp(xs)) + 1
        assert len(ys) == n and (out[ys, xs] == np.rint(np.float32(255 / n))).all()  # 8-connected, equal weights
        off = np.linalg.svd([ys - ys.mean(), xs - xs.mean()], compute_uv=False)[1] / np.sqrt(n)
        assert off < 0.5  # no tap off the line
        lengths.append(n)
        shifts.append(np.hypot(ys.mean() - 37, xs.mean() - 37))
    assert 2 <= min(lengths) and max(lengths) <= 35 and np.median(lengths) == pytest.approx(8, abs=2)
    assert np.mean(shifts) == pytest.approx(4.93, abs=0.8)

def test_zoom_blur_identity_draws_and_fixed_centre():
    image = scene(33, 33)
    outs = [corrupt(image, "zoom_blur", seed) for seed in range(400)]
    assert np.mean([np.array_equal(out, image) for out in outs]) == pytest.approx(0.18, abs=0.06)
    assert all((np.abs(out[16, 16].astype(int) - image[16, 16]) <= 1).all() for out in outs)

def test_elastic_displacement():
    """A ramp of one level per pixel turns into a map of horizontal displacement."""
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 3)).copy()
    total, local, (y, x) = [], [], np.mgrid[40:160, 40:160]
    plane = np.stack([y.ravel(), x.ravel(), np.ones(y.size)], 1)
    for seed in range(12):
        shift = corrupt(ramp, "elastic_transform", seed)[40:160, 40:160, 0].astype(float) - x
        total.append(np.abs(shift).mean())
        local.append((shift.ravel() - plane @ np.linalg.lstsq(plane, shift.ravel(), rcond=None)[0]).std())
    assert np.mean(local) == pytest.approx(100 * np.sqrt(1 / 3) / (20 * np.sqrt(np.pi)), rel=0.15)  # 1.63 px
    assert 1.5 < np.mean(total) < 6

@pytest.mark.parametrize("name, most", [("snow", 255), ("rain", 240)])
def test_snow_and_rain_whiten_every_channel_alike(name, most):
    black = flat(0, 160, 160)
    out, half = (np.stack([corrupt(black, name, seed, s) for seed in range(8)]).astype(int) for s in (1, 0.5))
    assert np.ptp(out, axis=-1).max() == 0 and 60 < out.max() <= most
    assert 0.3 < half.mean() / out.mean() < 0.7 and (half <= out + 3).mean() > 0.85  # fewer of the same specks

def test_fog_is_optical_depth_and_drawn_per_image():
    once, twice = (corrupt(flat(60), "fog", 4, s).astype(float).mean() for s in (1, 2))
    black, white = (corrupt(flat(v), "fog", 4).astype(float).mean() for v in (0, 255))
    clear = (white - black) / 255  # share of the scene that shines through
    assert 0.28 < clear < 0.46 and once == pytest.approx(black + 60 * clear, abs=1.5)
    cloud = black / (1 - clear)
    assert 215 < cloud < 245 and twice == pytest.approx(cloud + clear ** 2 * (60 - cloud), abs=3)
    assert mad(corrupt(flat(60), "fog", 5), corrupt(flat(60), "fog", 4)) > 2

def test_color_jitter_is_a_function_of_colour():
    """Whatever the order of its steps: equal pixels stay equal, and white and black keep their rank."""
    image, means = scene(40, 40), []
    image[0, 0], image[0, 1], image[20:22, 5] = 255, 0, image[3, 3]
    for seed in range(60):
        out = corrupt(image, "color_jitter", seed).astype(int)
        assert (out[0, 0] >= out[0, 1]).all() and (out[20:22, 5] == out[3, 3]).all()
        means.append(out.mean() / image.mean())
    assert np.mean(means) == pytest.approx(1, abs=0.15) and 0.2 < np.std(means) < 0.45

def run_file(module, *arguments):
    command = [sys.executable, module.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)

def test_corruption_sheet(tmp_path):
    photo, sheet, exif = tmp_path / "photo.jpg", tmp_path / "sheet.png", Image.Exif()
    exif[274] = 6  # lying on its side
    Image.fromarray(scene(90, 120)).save(photo, exif=exif)
    done = run_file(corruptions, photo, "--out", sheet, "--size", 96)
    assert done.returncode == 0, done.stderr
    with Image.open(sheet) as picture:
        assert picture.mode == "RGB" and picture.height > 4 * 96
    for bad in ([tmp_path / "none.jpg"], [corruptions.__file__], [photo, "--out", tmp_path / "no" / "sheet.png"],
                [photo, "--out", tmp_path / "sheet.what"], [photo, "--strength", "nan"]):
        failed = run_file(corruptions, *bad, *([] if "--out" in bad else ["--out", tmp_path / "x.png"]))
        assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "Traceback" not in failed.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photo.jpg", "sheet.png"]

# ---- Data -----------------------------------------------------------------------------------------------------------

def picture(height=24, width=32, seed=0):
    """A smooth uint8 HxWx3 picture (JPEG keeps it nearly as it is)."""
    grid = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))

def square(height=24, width=32, count=1):
    """Masks of squares of 6 x 6 pixels along a diagonal."""
    masks = np.zeros((count, height, width), bool)
    for k in range(count):
        masks[k, 7 + k:13 + k, 5 + k:11 + k] = True
    return masks

def robustseg(root, images, split="test"):
    """Writes ROOT/split with {stem: (picture or bytes or None, mask array or bytes or None)}; returns str(root)."""
    for name in ("clear", "masks"):
        os.makedirs(root / split / name, exist_ok=True)
    for stem, (image, masks) in images.items():
        jpg, npy = root / split / "clear" / f"{stem}.jpg", root / split / "masks" / f"{stem}.npy"
        if isinstance(image, bytes):
            jpg.write_bytes(image)
        elif image is not None:
            Image.fromarray(image).save(jpg, quality=95)
        if isinstance(masks, bytes):
            npy.write_bytes(masks)
        elif masks is not None:
            np.save(npy, masks)
    return str(root)

def test_prompts_lie_in_the_mask_and_the_box_is_tight():
    rng = np.random.default_rng(0)
    for seed in range(200):
        mask = rng.random((rng.integers(1, 20), rng.integers(1, 20))) < rng.choice([0.05, 0.5, 1])
        inside = [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
        if not inside:
            with pytest.raises(ValueError):
                data.prompts(mask, seed)
            continue
        before = mask.copy()
        points, box = data.prompts(mask, seed)
        assert points.shape == (3, 2) and box.shape == (4,) and points.dtype == box.dtype == np.float32
        assert set(map(tuple, points.tolist())) <= set(inside)
        assert len(set(map(tuple, points.tolist()))) == min(3, len(inside))
        assert box.tolist() == [*np.min(inside, axis=0), *np.max(inside, axis=0)]
        assert (data.prompts(mask, seed)[0] == points).all() and (mask == before).all()

def test_prompts_are_pinned():
    """These must not change from machine to machine or version to version."""
    assert data.seed_of("photo", 1) == 1792401791
    assert data.prompts(np.ones((48, 64), bool), data.seed_of("photo", 1))[0].tolist() == [[15, 47], [58, 3], [26, 21]]

def test_points_are_spread_evenly():
    mask = np.zeros((4, 9), bool)
    mask[1, 2:8] = True
    seen = np.concatenate([data.prompts(mask, seed)[0][:, 0] for seed in range(2000)])
    assert np.abs(np.bincount(seen.astype(int), minlength=9)[2:8] - 1000).max() < 120

def test_sample_prompts_depend_on_names_and_not_on_order_or_company(tmp_path):
    masks = square(count=3)
    with_gap = np.concatenate([masks[:1], np.zeros_like(masks[:1]), masks[1:]])  # plane 1 is empty
    one = data.load_dataset(robustseg(tmp_path / "one", {"b": (picture(), with_gap)}), "test")
    two = data.load_dataset(robustseg(tmp_path / "two", {"a": (picture(), masks), "b": (picture(), with_gap)}), "test")
    sample, other = one[0], [s for s in reversed(two) if s.name == "b"][0]
    points, boxes = sample.prompts()
    assert sample.masks().shape == (3, 24, 32) and sample.indices == other.indices == (0, 2, 3)
    assert (other.prompts()[0] == points).all() and (other.prompts(other.masks())[1] == boxes).all()
    for k, index in enumerate(sample.indices):
        assert (data.prompts(sample.masks()[k], data.seed_of("b", index, 0))[0] == points[k]).all()
    assert [s.name for s in two] == ["a", "b"] and two[-1].name == "b" and len(pickle.dumps(two)) < 2000
    assert (pickle.loads(pickle.dumps(two))[1].image("fog") == sample.image("fog")).all()

def test_degraded_pixels_are_the_same_on_the_fly_and_from_the_folder(tmp_path):
    root = robustseg(tmp_path / "d", {stem: (picture(seed=k), square()) for k, stem in enumerate("abc")})
    sample, folder = data.load_dataset(root, "test")[1], tmp_path / "d" / "test"
    fly = {condition: sample.image(condition) for condition in data.CONDITIONS}
    assert list(fly) == ["clear", *data.CORRUPTIONS] and len(fly) == 16
    assert (sample.image("fog", seed=1) != sample.image("fog", seed=2)).any()
    assert (data.degrade(sample.image(), "snow", data.seed_of("b", "snow")) == fly["snow"]).all()
    assert run_file(data, root, "--corrupt", "--split", "test").returncode == 0
    for condition in data.CORRUPTIONS:
        assert sorted(os.listdir(folder / condition)) == ["a.jpg", "b.jpg", "c.jpg"]
        assert (data.read_image(folder / condition / "b.jpg") == fly[condition]).all(), condition
    # a second run writes only what is missing, and files made by hand are used and kept
    (folder / "rain" / "a.jpg").unlink()
    Image.fromarray(picture(seed=9)).save(folder / "fog" / "b.png")
    (folder / "fog" / "b.jpg").unlink()
    old = os.stat(folder / "snow" / "a.jpg").st_mtime_ns
    assert run_file(data, root, "--corrupt").returncode == 0
    assert (folder / "rain" / "a.jpg").exists() and not (folder / "fog" / "b.jpg").exists()
    assert os.stat(folder / "snow" / "a.jpg").st_mtime_ns == old
    sample = data.load_dataset(root, "test")[1]
    assert (sample.image("fog", seed=3) == picture(seed=9)).all() and (sample.image("rain") == fly["rain"]).all()
    Image.fromarray(picture(20, 20)).save(folder / "fog" / "b.png")
    with refused("20 x 20", "32 x 24", kind=data.SampleError):
        sample.image("fog")

def test_bad_samples_are_named_skipped_and_counted(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "x.jpg")
    np.save(tmp_path / "x.npy", square())
    np.save(tmp_path / "p.npy", np.array([{}], object), allow_pickle=True)
    jpg, npy, objects = ((tmp_path / name).read_bytes() for name in ("x.jpg", "x.npy", "p.npy"))
    good = picture(), square()
    bad_images = {"cut_jpg": jpg[:len(jpg) // 2], "text_jpg": b"not a picture", "empty_jpg": b""}
    bad_masks = {"cut_npy": npy[:-50], "cut_head": npy[:20], "empty_npy": b"", "text_npy": b"not numbers",
                 "pickle": objects, "flat": np.zeros(7), "words": np.full((1, 24, 32), "x"), "turned": square(32, 24),
                 "void": np.zeros((2, 24, 32), bool), "none": np.zeros((0, 24, 32), bool)}
    bad = {name: (image, square()) for name, image in bad_images.items()}
    bad |= {name: (picture(), masks) for name, masks in bad_masks.items()}
    lone = {"lone_image": (picture(), None), "lone_mask": (None, square())}
    root = robustseg(tmp_path / "d", {"good": good, **bad, **lone})
    dataset, fine = data.load_dataset(root, "test"), []
    assert len(dataset) == 14 and len(dataset.skipped) == 2
    assert "lone_image.jpg: has no mask file" in dataset.skipped[0]
    assert "lone_mask.npy: has no image" in dataset.skipped[1]
    for sample in [*dataset, *dataset]:
        known = len(dataset.skipped)
        try:
            sample.image(), sample.masks()
            fine.append(sample.name)
        except data.SampleError as error:
            line = str(error)
            assert f"{sample.name}." in line and "\n" not in line and str(pickle.loads(pickle.dumps(error))) == line
            assert dataset.skip(error) == (len(dataset.skipped) > known)
    assert fine == ["good", "good"] and len(dataset.skipped) == 2 + len(bad)  # each is counted once
    assert "14 images" in dataset.summary() and "15 files skipped" in dataset.summary()
    with refused("24 x 32 pixels", "32 x 24", kind=data.SampleError):
        [s for s in dataset if s.name == "turned"][0].masks()
    with refused("lone_image", kind=data.SampleError):
        data.load_dataset(root, "test", strict=True)
    checked = run_file(data, root, "--check", "--corrupt")
    assert checked.returncode == 0 and checked.stdout.count("skipped: ") == 2 + len(bad), checked

def test_strict_datasets_raise_what_they_would_skip(tmp_path):
    images = {"good": (picture(), square()), "void": (picture(), np.zeros((2, 24, 32), bool))}
    strict = data.load_dataset(robustseg(tmp_path, images), "test", strict=True)
    assert len(strict) == 2  # what is inside the files shows only on reading
    with pytest.raises(data.SampleError):
        strict.skip(data.SampleError("x"))

@pytest.mark.parametrize("masks, expected", [
    (np.array([[0, 1], [1, 0]], np.uint8), [[0, 1], [1, 0]]), (np.array([[0, 1], [1, 1]], np.int64), [[0, 1], [1, 1]]),
    (np.array([[0, 127], [128, 255]], np.uint8), [[0, 0], [1, 1]]),
    (np.array([[0.0, 0.5], [0.51, 1]], np.float32), [[0, 0], [1, 1]]),
    (np.array([[[False, True], [True, True]]]), [[0, 1], [1, 1]])])
def test_mask_files_of_every_number_type(tmp_path, masks, expected):
    np.save(tmp_path / "m.npy", masks)
    planes = data.read_planes(tmp_path / "m.npy")
    assert type(planes) is np.ndarray and planes.dtype == bool and planes.tolist() == [np.bool_(expected).tolist()]

def test_every_kind_of_picture_becomes_upright_rgb(tmp_path):
    rgb, exif = picture(20, 30), Image.Exif()
    grey = rgb[..., 0]
    exif[0x0112] = 6  # the camera was turned: the stored picture must be rotated clockwise by a quarter
    files = {"grey.png": Image.fromarray(grey), "rgba.png": Image.fromarray(np.dstack([rgb, 255 - grey])),
             "deep.png": Image.fromarray(grey.astype(np.uint16) * 257), "turned.png": Image.fromarray(rgb),
             "palette.png": Image.fromarray(rgb).quantize(64), "cmyk.jpg": Image.fromarray(rgb).convert("CMYK")}
    for name, file in files.items():
        file.save(tmp_path / name, quality=100, **dict(exif=exif) if name == "turned.png" else {})
        image = data.read_image(tmp_path / name)
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.flags.writeable
        assert image.shape[:2] == data.image_size(tmp_path / name) == ((30, 20) if name == "turned.png" else (20, 30))
    exact = {"grey.png": grey[..., None].repeat(3, 2), "deep.png": grey[..., None].repeat(3, 2), "rgba.png": rgb,
             "turned.png": np.rot90(rgb, -1), "palette.png": np.array(files["palette.png"].convert("RGB"))}
    assert all(np.array_equal(data.read_image(tmp_path / name), pixels) for name, pixels in exact.items())
    assert np.abs(data.read_image(tmp_path / "cmyk.jpg") - rgb.astype(float)).mean() < 6

def test_picture_files_are_found_by_any_ending_and_hidden_ones_left_out(tmp_path):
    robustseg(tmp_path, {"a": (None, square()[0]), "._a": (b"", None)})  # the second: what macOS leaves beside them
    Image.fromarray(picture()).save(tmp_path / "test" / "clear" / "a.PNG")
    dataset = data.load_dataset(tmp_path, "test")
    assert dataset[0].masks().shape == (1, 24, 32) and (dataset[0].image() == picture()).all() and not dataset.skipped

def test_demo_scenes():
    scenes = [data.demo_scene(seed) for seed in range(40)]
    for image, masks in scenes:
        assert image.dtype == np.uint8 and masks.dtype == bool and image.shape == (*masks.shape[1:], 3)
        assert max(image.shape) == 128 and min(image.shape[:2]) in (96, 112, 128)
        assert masks.sum(0).max() == 1 and masks.sum((1, 2)).min() >= 60  # disjoint, and none is a speck
    counts = [len(masks) for _, masks in scenes]
    assert 1 <= min(counts) and max(counts) <= 6 and np.mean(counts) > 2.5
    assert all(map(np.array_equal, scenes[7], data.demo_scene(7))) and not np.array_equal(scenes[7][0], scenes[8][0])
    assert max(data.demo_scene(3, size=64)[0].shape) == 64

def test_patterned_objects():
    """Bold patterns spread an object's colours; without them the scenes are those that the tiny SAM was made on."""
    spread = {share: np.mean([image[mask].std(0).mean() for image, masks in (
        data.demo_scene(seed, patterned=share) for seed in range(30)) for mask in masks]) for share in (0, 0.5, 1)}
    assert spread[0] + 5 < spread[0.5] < spread[1] - 5
    assert zlib.crc32(data.demo_scene(3, patterned=0)[1].tobytes()) == 2144091347

def test_conditions_with_a_strength(tmp_path):
    sample = data.load_dataset(robustseg(tmp_path, {"a": (picture(64, 80), square(64, 80))}), "test")[0]
    clear, fog = (sample.image(condition).astype(int) for condition in ("clear", "fog"))
    assert np.array_equal(sample.image("fog@1"), fog)
    assert 2 < abs(sample.image("fog@0.3") - clear).mean() < abs(fog - clear).mean() - 2
    assert abs(sample.image("fog@0") - clear).mean() < 4  # the JPEG alone
    for condition in ("clear@1", "fog@x", "fog@nan", "fog@-1", "fog@11", "mist"):
        with refused(condition, kind=data.DatasetError):
            sample.image(condition)

def test_make_demo_writes_a_dataset_or_nothing(tmp_path):
    root = tmp_path / "demo"
    data.make_demo(root, train=3, val=2, test=2)
    assert os.listdir(tmp_path) == ["demo"] and sorted(os.listdir(root)) == ["test", "train", "val"]
    splits = [data.load_dataset(root, split) for split in ("train", "val", "test")]
    assert [len(d) for d in splits] == [3, 2, 2] and not any(d.skipped for d in splits)
    assert len({sample.masks().tobytes() for dataset in splits for sample in dataset}) == 7  # no scene twice
    data.make_demo(tmp_path / "again", train=1, val=0, test=2)
    assert sorted(os.listdir(tmp_path / "again")) == ["test", "train"]
    again, first = data.load_dataset(tmp_path / "again", "train")[0], splits[0][0]
    assert (again.image() == first.image()).all() and (again.masks() == first.masks()).all()
    with refused("not an empty folder", kind=data.DatasetError):
        data.make_demo(root, 1, 1, 1)

def test_errors_of_datasets_say_what_was_looked_for(tmp_path):
    root = robustseg(tmp_path / "d", {"a": (picture(), square())})
    robustseg(tmp_path / "d", {"a": (picture(), None)}, "val")
    os.makedirs(tmp_path / "d" / "train" / "clear")
    os.makedirs(tmp_path / "void")
    for path, split, words in (("nowhere", "test", ["nowhere", "no such folder"]),
                               ("d", "tset", ["tset", "test, train, val"]), ("d", "train", ["masks", "masks.zip"]),
                               ("d", "val", ["1 images", "0 .npy"]),
                               ("void", "test", ["no dataset", "clear"]), ("d/test", "test", ["parent folder"])):
        with refused(*words, kind=data.MissingError):  # which is a FileNotFoundError, too
            data.load_dataset(tmp_path / path, split)
    with refused("instances_<split>2017.json", "holds: test, train, val", kind=data.MissingError):
        data.load_dataset(root, "test", kind="coco")
    with refused("'cocoa'", "robustseg", "msra10k", kind=data.DatasetError):
        data.load_dataset(root, "test", kind="cocoa")
    with refused("impulse_noise", kind=data.DatasetError):
        data.load_dataset(root, "test")[0].image("haze")

def test_data_command_line(tmp_path):
    root, sheet = robustseg(tmp_path / "d", {"a": (picture(), square(count=2))}), tmp_path / "sheet.png"
    shown = run_file(data, root, "--sheet", sheet)
    assert shown.returncode == 0 and "d/test (robustseg): 1 images; 0 files skipped" in shown.stdout
    assert "(2 to 2)" in shown.stdout and "100% up to 10 %" in shown.stdout and "median 4.7%" in shown.stdout
    assert Image.open(sheet).width > 100
    for mistake in ((tmp_path / "nowhere",), (root, "--split", "x"), (root, "--make-demo"), (root, "--frobnicate"), (),
                    (root, "--sheet", tmp_path / "no" / "where.png"), (root, "--sheet", tmp_path / "d")):
        done = run_file(data, *mistake)
        errors = [line for line in done.stderr.splitlines() if "reading" not in line]  # less the progress line
        assert done.returncode == 2 and len(errors) == 1 and errors[0].startswith("error: "), (mistake, done)

# ---- Data: the ten layouts ------------------------------------------------------------------------------------------
# write_layout() writes a miniature of each in the form of its makers, with every wart of the real one that is known.
# Pictures are 64 x 96, their objects bright rectangles, another pair for every picture.

def rect(x0, y0, x1, y1, height=64, width=96):
    mask = np.zeros((height, width), bool)
    mask[max(y0, 0):y1, max(x0, 0):x1] = True
    return mask

def sides(k):
    """Two rectangles (x0, y0, x1, y1) for the k-th picture."""
    return (8 + k % 9, 20, 40 + k % 9, 40), (58, 24 - k % 7, 90, 60 - k % 7)

def photo(*boxes):
    """A dark picture in which the boxes are bright."""
    return picture(64, 96) // 4 + 170 * np.any([rect(*box) for box in boxes], 0)[..., None].astype(np.uint8)

THIRD, THIRD_RLE = (60, 2, 90, 14), "Rh3<d1" + "0" * 57 + "n;"  # the string is pycocotools' own

def ring(x0, y0, x1, y1):
    """The rectangle as COCO's corners: [x, y, x, y, ...]."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]

def runs(mask):
    return [0] * bool(mask[0, 0]) + [len(list(run)) for _, run in itertools.groupby(mask.T.ravel().tolist())]

def put(path, content):
    """Writes a picture, a text or what becomes JSON."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(path, **dict(quality=95) if path.suffix.lower() == ".jpg" else {})
    else:
        content = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        path.write_text(content, encoding="utf-8")

def split_of(name):
    return "train" if zlib.crc32(f"{name}/val".encode()) % 20 else "val"

def named(form, split=None, count=2):
    """The first names of a form; of those, if asked, that load_dataset takes for this split where a set has none."""
    numbers = (form.format(n) for n in itertools.count(1))
    return list(itertools.islice((name for name in numbers if split in (None, split_of(name))), count))

def coco_file(path, images, labels, **more):
    """{name: (record, file or None)} -> {name: {id: (label, mask)}}. Ids go down, so that no order is right by chance.
    """
    records, regions, truth = [], [], {}
    for k, (name, (record, file)) in enumerate(images.items()):
        image, first = 900 - k, 5000 - 10 * k
        records.append(dict(id=image, height=64, width=96, license=4, **record))
        a, b = sides(k)
        if file:
            put(file, photo(a, b, THIRD))
        third = dict(size=[64, 96], counts=THIRD_RLE)
        rows = [(ring(*a),), (ring(*b), [1, 2, 3, 4]), third]
        rows = [dict(id=first - n, image_id=image, category_id=n, bbox=[1.5, 2, 3, 4.25], area=640.75,
                     segmentation=row, **dict(iscrowd=0) if n % 2 else {}) for n, row in enumerate(rows)]
        regions += rows
        truth[name] = {first - n: (labels[n], rect(*box)) for n, box in enumerate((a, b, THIRD))}
    warts = [dict(iscrowd=1, segmentation=dict(size=[64, 96], counts=runs(rect(*THIRD)))), dict(iscrowd=0),
             dict(segmentation=[]), dict(segmentation=[[1, 2, 3, 4], [5, 6]]), dict(ignore=1, segmentation=[ring(*a)]),
             dict(segmentation=[[-9, -9.5, -3, -9, -3, -2]]), dict(image_id=5, segmentation=[ring(*a)])]
    regions += [dict(dict(id=7000 + n, image_id=900, category_id=1), **wart) for n, wart in enumerate(warts)]
    put(path, dict(info=dict(year=2017, version=1.5, contributor='J. "Ü"'), licenses=[], annotations=regions[::-1],
                   images=[*records, dict(records[0], id=1)], categories=[
                       dict(id=n, name=label, supercategory="x") for n, label in enumerate(labels)], **more))
    return truth

def write_robustseg(root):
    truth = {"train": named("rs_{}"), "val": named("v{}"), "test": named("t{}")}
    for split, stems in truth.items():
        masks = [np.stack([rect(*a), np.zeros((64, 96), bool), rect(*b)]) for a, b in map(sides, range(2))]
        robustseg(root, {stem: (photo(*sides(k)), masks[k]) for k, stem in enumerate(stems)} | (
            {"lone": (None, masks[0])} if split == "val" else {}), split)
        truth[split] = {stem: {0: (None, masks[k][0]), 2: (None, masks[k][2])} for k, stem in enumerate(stems)}
    return truth

def write_coco(root):
    truth = {}
    for split in ("train", "val"):
        images = {f"{139 + k:012}": root / f"{split}2017" / f"{139 + k:012}.jpg" for k in range(3)}
        images = {name: (dict(file_name=path.name), path) for name, path in images.items()}
        images["000000000009"] = dict(file_name="000000000009.jpg"), None
        file = root / "annotations" / f"instances_{split}2017.json"
        truth[split] = coco_file(file, images, ("cat", "dog", "Würfel"))
        del truth[split]["000000000009"]
    return truth

def write_lvis(root):
    truth = {}
    for split, folders in (("train", ["train2017"] * 2), ("val", ["train2017", "val2017"])):
        paths = [root / "coco" / folder / f"{30 + k + len(split):012}.jpg" for k, folder in enumerate(folders)]
        images = {path.stem: (dict(coco_url=f"http://images.cocodataset.org/{path.parent.name}/{path.name}",
                                   neg_category_ids=[3, 4]), path) for path in paths}
        truth[split] = coco_file(root / f"lvis_v1_{split}.json", images, ("aerosol_can", "cat", "dog"))
    put(root / "lvis_v1_image_info_test_dev.json", dict(images=[], categories=[]))
    return truth

def write_lis(root):
    home, every = root / "LIS", {}
    for name, folder, ending in (("JPG_{}+1", "RGB-dark", ".JPG"), ("png_{}", "RGB-normal", ".png")):
        for split in ("train", "test"):
            stems = [*named("{}", "train"), *named("{}", "val")] if split == "train" else ["1950", "1952"]
            paths = {stem: home / folder / "JPEGImages" / (stem + ending) for stem in stems}
            images = {stem: (dict(file_name=f"./JPEGImages/{stem}.png"), path) for stem, path in paths.items()}
            file = home / "annotations" / "annotations" / f"lis_coco_{name.format(split)}.json"
            every[folder, split] = coco_file(file, images, ("bicycle", "chair", "diningtable"), type="instances")
    parts = {part: {stem: masks for stem, masks in every["RGB-dark", "train"].items() if split_of(stem) == part}
             for part in ("train", "val")}
    return {**parts, "test": every["RGB-dark", "test"], "normal_test": every["RGB-normal", "test"]}

def write_bdd100k(root):
    truth = {}
    for split in ("train", "val"):
        truth[split] = {}
        for k, stem in enumerate(named(f"{split[0]}00d4b{{}}-c40a")):
            a, b = sides(k)
            pixels = np.zeros((64, 96, 4), np.uint8)
            for box, values in ((a, (3, 4, 0, 7)), (b, (1, 0, 1, 2)), ((0, 0, 5, 5), (4, 2, 0, 9)),
                                ((0, 6, 5, 9), (5, 1, 0, 10)), ((70, 62, 80, 64), (0, 3, 0, 1))):
                pixels[rect(*box)] = values  # class, flags, and the instance's number in two bytes
            put(root / "bdd100k" / "images" / "10k" / split / f"{stem}.jpg", photo(a, b))
            put(root / "bdd100k" / "labels" / "ins_seg" / "bitmasks" / split / f"{stem}.png", pixels)
            truth[split][stem] = {7: ("car", rect(*a)), 258: ("pedestrian", rect(*b))}
        put(root / "bdd100k" / "images" / "10k" / split / "lone.jpg", picture())
    return truth

def write_acdc(root, labels):
    """`labels`: which of the three forms of ground truth."""
    truth = {}
    for split in ("train", "val", "train_ref"):
        ref, truth[split], images, panoptic = "_ref" * split.endswith("ref"), {}, {}, []
        for k in range(2):
            stem = f"GOPR0475_frame_{40 + k:06}"
            where = os.path.join(("fog", "night")[k], split, "GOPR0475")
            shot = root / "rgb_anon" / where / f"{stem}_rgb{ref}_anon.png"
            a, b = sides(k)
            put(shot, photo(a, b, *[THIRD] * (labels == "detection")))
            both = [(1, "car", rect(*a)), (2, "car", rect(*b))]
            if labels == "detection":
                images[shot.stem] = dict(file_name=shot.relative_to(root / "rgb_anon").as_posix()), None
                continue
            if labels == "panoptic":
                number = 7 * np.ones((64, 96), int)
                number[rect(*a)], number[rect(*b)], number[rect(*THIRD)] = 26001, 26002, 24000
                both = [(26001, "car", rect(*a)), (26002, "car", rect(*b))]
                segments = [dict(id=7, category_id=7, iscrowd=0), dict(id=24000, category_id=24, iscrowd=1),
                            *(dict(id=n, category_id=26, iscrowd=0) for n, *_ in both)]
                panoptic.append(dict(file_name=f"{stem}_gt{ref}_panoptic.png", segments_info=segments))
                put(root / "gt_panoptic_trainval" / "gt_panoptic" / where / panoptic[-1]["file_name"],
                    np.stack([number % 256, number // 256, 0 * number], 2).astype(np.uint8))
            else:
                ids = np.full((64, 96), 255, np.uint8)
                ids[60:] = 0
                ids[rect(*a)] = ids[rect(*b)] = 13
                ids[rect(0, 0, 7, 9)] = 11  # a person of 63 pixels
                put(root / "gt_trainval" / "gt" / where / f"{stem}_gt{ref}_labelTrainIds.png", ids)
                both = sorted(both, key=lambda row: row[2].any(1).argmax())  # parts are numbered from top to bottom
                both = [(n, *row[1:]) for n, row in enumerate(both, 1)]
            truth[split][stem] = {number: (label, mask) for number, label, mask in both}
        base = split.removesuffix("_ref") + "_gt" + ref
        if labels == "detection":
            file = root / "gt_detection_trainval" / "gt_detection" / f"instancesonly_{base}_detection.json"
            truth[split] = coco_file(file, images, ("person", "rider", "car"))
        elif labels == "panoptic":
            put(root / "gt_panoptic_trainval" / "gt_panoptic" / f"{base}_panoptic.json", dict(annotations=panoptic))
    return truth

def via_region(kind, box, k, **attributes):
    x0, y0, x1, y1 = box
    xs, ys = [x0, x1 - 1, x1 - 1, x0], [y0, y0, y1 - 1, y1 - 1]  # corners are pixels that belong to the object
    shape = dict(name=kind, all_points_x=xs[k % 4:] + xs[:k % 4], all_points_y=ys[k % 4:] + ys[:k % 4])
    return dict(shape_attributes=shape, region_attributes=attributes)

def write_ndd20(root):
    truth = {"train": {}, "val": {}, "below": {}}
    for side, stems in (("ABOVE", named("ABOVE_{}", "train") + named("ABOVE_{}", "val")),
                        ("BELOW", named("ABOVE_{}", "train"))):
        entries, stems = {}, [stem.split("_")[1] for stem in stems]  # ABOVE and BELOW have the same file names
        for k, stem in enumerate(stems):
            boxes = sides(k + 5 * (side == "BELOW"))
            put(root / "NDD20" / side / f"{stem}.jpg", photo(*boxes))
            regions = [via_region("polyline", box, k, object="dolphin", **dict(species="BND") if side == "ABOVE" else
                       {"out of focus": "true"}) for box in boxes]
            regions.insert(1, dict(shape_attributes=dict(name="polyline", all_points_x=[4, 9], all_points_y=[4, 9]),
                                   region_attributes={}))
            entries[f"{stem}.jpg4711"] = dict(filename=f"{stem}.jpg", size=4711, regions=regions, file_attributes={})
            masks = {n: ("BND" if side == "ABOVE" else None, rect(*box)) for n, box in zip((0, 2), boxes)}
            truth[split_of(f"{side}_{stem}")][f"{side}_{stem}"] = masks
        entries["0.jpg1"] = dict(filename="0.jpg", size=1, regions=regions, file_attributes={})  # there is no 0.jpg
        put(root / "NDD20" / f"{side}_LABELS.json", entries)
    truth["below"] = {name: masks for part in truth.values() for name, masks in part.items() if name[0] == "B"}
    return truth

def write_streets(root):
    form, home = "IL 53 at Lake Cook (West ramp) West-{}", root / "streets"
    entries, truth = {}, {"train": {}, "val": {}}
    for k, stem in enumerate(named(form, "train") + named(form, "val")):
        boxes = (-5, -7, 20 + k, 9), sides(k)[1]
        put(home / "images" / f"{stem}.jpg", photo(*boxes))
        regions = [via_region("polygon", box, k, vehicle_type="car") for box in boxes]
        regions.insert(0, dict(shape_attributes=dict(name="ellipse", cx=9, cy=9, rx=2, ry=3), region_attributes={}))
        entries[f"{stem}.jpg99"] = dict(fileref="", size=99, filename=f"{stem}.jpg", base64_img_data="",
                                        file_attributes={}, regions={str(n): r for n, r in enumerate(regions)})
        truth[split_of(stem)][stem] = {n: ("car", rect(*box)) for n, box in enumerate(boxes, 1)}
    entries["none.jpg1"] = dict(filename="none.jpg", regions={})
    put(home / "annotations" / "vehicle-annotations.json", entries)
    return truth

def soft(mask):
    """255 and 0 with soft edges: 128 is the first pixel of the object in a row, 127 the last before."""
    grey = 255 * mask.astype(np.uint8)
    grey[mask & ~np.roll(mask, 1, 1)], grey[~mask & np.roll(mask, -1, 1)] = 128, 127
    return grey

def write_thinobject(root):
    truth, home = {}, root / "ThinObject5K"
    for split in ("train", "val", "test"):
        stems = named(f"{split}_pump_PNG{{}}")
        truth[split] = {stem: {0: (None, rect(*sides(k)[0]))} for k, stem in enumerate(stems)}
        for k, stem in enumerate(stems):
            put(home / "images" / f"{stem}.jpg", photo(sides(k)[0]))
            put(home / "masks" / f"{stem}.png", soft(truth[split][stem][0][1]))
        put(home / "list" / f"{split}.txt", "".join(f"{stem}.png\n" for stem in [*stems, f"{split}_lost"]))
    return truth

def write_msra10k(root):
    truth, home = {"train": {}, "val": {}}, root / "MSRA10K_Imgs_GT" / "MSRA10K_Imgs_GT" / "Imgs"
    for k, stem in enumerate(named("{}", "train", 3) + named("{}", "val")):
        mask = rect(*sides(k)[0]) | rect(*sides(k)[1])
        put(home / f"{stem}.jpg", photo(*sides(k)))
        put(home / f"{stem}.png", soft(mask) if k % 2 else mask.astype(np.uint8))
        truth[split_of(stem)][stem] = {0: (None, mask)}
    put(home / "lone.jpg", picture())
    return truth

# Each with what Dataset.left_out, the samples' left_out and Dataset.skipped must hold for "val", in words.
COCO_LEFT = dict(crowd=1, ignore=1) | {"without a mask": 2, "of fewer than 3 points": 1, "of an unknown image": 1,
                                       "images without masks": 1}
LAYOUTS = {
    "robustseg": (write_robustseg, {}, {"empty": 2}, ["lone.npy: has no image"]),
    "coco": (write_coco, COCO_LEFT, {"empty": 1}, ["val2017/000000000009.jpg: no such image"]),
    "lvis": (write_lvis, COCO_LEFT, {"empty": 1}, []),
    "lis": (write_lis, COCO_LEFT, {"empty": 0}, []),
    "bdd100k": (write_bdd100k, {}, {"crowd": 2, "ignore": 2}, ["lone.jpg: has no mask file"]),
    "acdc": (functools.partial(write_acdc, labels="detection"), COCO_LEFT, {"empty": 1}, []),
    "acdc-panoptic": (functools.partial(write_acdc, labels="panoptic"), {}, {"crowd": 2, "stuff": 2}, []),
    "acdc-semantic": (functools.partial(write_acdc, labels="semantic"), {}, {"below 64 px": 2}, []),
    "ndd20": (write_ndd20, {"of fewer than 3 points": 8}, {}, ["ABOVE/0.jpg: no such", "BELOW/0.jpg: no such"]),
    "streets": (write_streets, {"of shape ellipse": 4, "images without masks": 1}, {}, []),
    "thinobject": (write_thinobject, {}, {}, ["val_lost of list/val.txt"]),
    "msra10k": (write_msra10k, {}, {}, ["lone.jpg: has no mask file"])}

def write_layout(kind, root, split="val"):
    """Writes a miniature of a dataset, splits train and val at least: {sample's name: {index: mask}} of one split."""
    return {name: {index: mask for index, (_, mask) in regions.items()}
            for name, regions in LAYOUTS[kind][0](root)[split].items()}

@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_to_the_pixel(tmp_path, layout):
    write, left_out, left_out_by_samples, skipped = LAYOUTS[layout]
    for split, truth in write(tmp_path).items():
        dataset, left = data.load_dataset(tmp_path, split), Counter()
        assert dataset.kind == layout.split("-")[0] and [s.name for s in dataset] == sorted(truth)
        for sample in pickle.loads(pickle.dumps(dataset))[:]:  # as workers that are spawned get them
            regions, masks, image = truth[sample.name], sample.masks(), sample.image()
            order = [list(regions).index(index) for index in sample.indices]
            labels, planes = zip(*regions.values())
            assert sorted(order) == list(range(len(regions))) and sample.labels == tuple(labels[k] for k in order)
            assert masks.dtype == bool and np.array_equal(masks, np.stack([planes[k] for k in order]))
            assert image.shape == (64, 96, 3) and ((image.mean(2) > 120) != masks.any(0)).mean() < 0.03
            left += sample.left_out
        assert dataset.masks in (None, sum(map(len, truth.values())) + left["empty"])
        if split == "val":
            assert dataset.left_out == left_out and left == +Counter(left_out_by_samples)
            assert len(dataset.skipped) == len(skipped)
            assert all(word in line for word, line in zip(skipped, dataset.skipped))
            assert all(f"{count:,} {reason}" in dataset.summary() for reason, count in left_out.items())

def test_splits_of_the_makers(tmp_path):
    listed = {"train": [], "val": []}
    truth = write_streets(tmp_path / "s")
    for k, name in enumerate(name for part in truth.values() for name in part):
        listed[("train", "val")[k % 2]].append(f"{name}.jpg")
    put(tmp_path / "s" / "data" / "train-val-split.json", dict(listed, val=[*listed["val"], "via_region_data.json"]))
    for split, names in listed.items():
        assert [f"{s.name}.jpg" for s in data.load_dataset(tmp_path / "s", split)] == sorted(names)
    assert len(data.load_dataset(tmp_path / "s", "all")) == 4
    expected = {"lvis": ["train", "val"], "lis": ["normal_test", "normal_train", "test", "train"],
                "ndd20": ["above", "all", "below"], "acdc-semantic": ["train", "train_ref", "val"], "msra10k": ["all"],
                "thinobject": ["test", "train", "val"], "streets": ["all"], "coco": ["train", "val"]}
    for layout, splits in expected.items():
        write_layout(layout, tmp_path / layout)
        kind, found = data.find_splits(str(tmp_path / layout))
        assert kind == layout.split("-")[0] and sorted(found) == splits
    # where LVIS's pictures are unpacked for COCO, next door; and a folder that is called as a split is
    shutil.move(tmp_path / "lvis" / "coco", tmp_path / "lvis" / "down")
    os.makedirs(tmp_path / "train")
    for name in ("lvis", "acdc-semantic"):
        shutil.move(tmp_path / name, tmp_path / "train" / name)
    shutil.move(tmp_path / "train" / "lvis" / "down", tmp_path / "train" / "coco")
    for name in ("lvis", "acdc-semantic"):
        truth = LAYOUTS[name][0](tmp_path / "again" / name)["val"]
        assert [s.name for s in data.load_dataset(tmp_path / "train" / name, "val")] == sorted(truth)

def test_held_out_pictures_where_a_set_has_no_validation_split(tmp_path):
    for k in range(200):
        for ending, pixels in ((".jpg", picture()), (".png", square()[0])):
            put(tmp_path / "one" / f"{k}{ending}", pixels)
    parts = {split: [s.name for s in data.load_dataset(tmp_path / "one", split)] for split in ("train", "val", "all")}
    assert sorted(parts["train"] + parts["val"]) == parts["all"] and len(parts["all"]) == 200
    assert all(split_of(name) == split for split in ("train", "val") for name in parts[split])
    assert 3 <= len(parts["val"]) <= 20
    for name in parts["all"][100:]:  # half of the set is gone: whoever is left stays where he was
        (tmp_path / "one" / f"{name}.jpg").unlink()
    for split in ("train", "val"):
        rest = [s.name for s in data.load_dataset(tmp_path / "one", split)]
        assert rest == [name for name in parts[split] if name in parts["all"][:100]]

def test_union_of_datasets(tmp_path):
    truth = {kind: write_layout(kind, tmp_path / kind, "train") for kind in ("msra10k", "bdd100k")}
    sets = data.load_datasets([tmp_path / "msra10k", f"bdd100k={tmp_path / 'bdd100k'}"], "train")
    both = data.Union(sets)
    names = [name for kind in truth for name in sorted(truth[kind])]
    assert [s.name for s in both] == [both[k].name for k in range(len(both))] == names and len(both) == len(names)
    assert both[-1].name == names[-1] and [s.name for s in both[1:4]] == names[1:4] and both[-1].labels[0] == "car"
    assert [s.name for s in sets[0][::2]] == names[:len(sets[0]):2]
    assert both.skipped == sets[0].skipped + sets[1].skipped and len(both.skipped) == 2
    with pytest.raises(IndexError):
        both[len(both)]
    assert [s.name for s in data.spread(both, 2)] == [names[0], names[len(names) // 2]]
    write_layout("lis", tmp_path / "lis")
    with refused("some file", kind=data.SampleError):
        data.Union(data.load_datasets([tmp_path / "lis"] * 2, "test", strict=True)).skip(data.SampleError("some file"))

def test_the_kind_of_a_folder(tmp_path):
    write_layout("coco", tmp_path)
    truth = write_layout("lvis", tmp_path)
    shutil.copytree(tmp_path / "coco", tmp_path, dirs_exist_ok=True)
    with refused("lvis and coco", f"lvis={tmp_path}", kind=data.DatasetError):
        data.load_dataset(tmp_path, "val")
    assert sorted(truth) == [s.name for s in data.load_datasets([f"lvis={tmp_path}"], "val")[0]]
    assert run_cli(data.main, f"lvis={tmp_path}", "--split", "val") is None
    with refused("rgb_anon", "ABOVE_LABELS.json", "images/10k", "vehicle-annotations.json", "list/<split>.txt",
                 "lis_coco", "instances_<split>2017.json", "lvis_v1", "Imgs", "clear", kind=data.MissingError):
        data.load_dataset(os.path.join(tmp_path, "coco", "train2017"), "val")
    with refused("no split 'dev'", "train, val", kind=data.MissingError):
        data.load_dataset(tmp_path, "dev", "coco")
    for folder in ("val2017", "coco"):
        shutil.rmtree(tmp_path / folder)
    with refused("nothing to use", "val2017", ".jpg: no such image", kind=data.MissingError):
        data.load_dataset(tmp_path, "val", "coco")

def test_degraded_folders_of_a_set_that_has_none(tmp_path):
    for layout in ("ndd20", "acdc-semantic"):
        write_layout(layout, tmp_path / layout)
        fly = [sample.image("fog") for sample in data.load_dataset(tmp_path / layout, "val")]
        if layout == "acdc-semantic":  # a download of its own, whose lack must not hide the other splits
            for path in (tmp_path / layout).rglob("*_gt_ref_*"):
                path.unlink()
        assert run_cli(data.main, tmp_path / layout, "--corrupt") is None
        assert run_cli(data.main, tmp_path / layout, "--split", "train_ref") == 2
        folder = tmp_path / layout / "degraded" / ("all" if layout == "ndd20" else "val") / "fog"
        samples = list(data.load_dataset(tmp_path / layout, "val"))
        for sample, pixels in zip(samples, fly, strict=True):
            assert np.array_equal(sample.image("fog"), pixels) and (folder / f"{sample.name}.jpg").exists()
        Image.fromarray(255 - pixels).save(folder / f"{sample.name}.jpg", quality=95)
        assert np.abs(sample.image("fog") + pixels.astype(float) - 255).mean() < 9  # it is read from there
        assert [s.name for s in data.load_dataset(tmp_path / layout, "val").samples[::-1]] == [
            s.name for s in reversed(samples)]

# Masks by pycocotools 2.0.11: polygons, height, width, area, compressed run lengths.
POLYGONS = [
    ([[3.25, 4.5, 40.75, 6.12, 33.4, 30.99, 12.08, 27.61]], 40, 50, 701,
     "U53U13M2N3M2N3M3M2N2N00000000001O00000000010O00000000001O000000L4M3M3L4M3L4MU;"),
    ([[-7.31, 5.2, 20.5, -6.4, 61.87, 22.05, 18.33, 52.7]], 40, 50, 1661,
     "2a0g02M3N2M3N2N2N1O2N2N2Nbf0O_YO001O1O001O1O0O2N2O0O2N2O0O2N2N101N2N2OB"),
    ([[2, 3, 12, 3, 12, 9, 2, 9]], 20, 24, 60, "[16>00000000000000000]7"),
    ([[5.5, 5.5, 5.5, 5.5, 18.25, 7.75, 18.25, 7.75, 9.1, 16.4, 9.1, 16.4]], 20, 24, 61, "n32b03M3M2NO2N1O1O1O1O1OV4"),
    ([[7.1, 7.2, 7.6, 7.3, 7.4, 7.9]], 16, 16, 1, "g31X4"), ([[7.1, 7.2, 9.31, 7.05, 8.94, 9.4]], 16, 16, 2, "W42g3"),
    ([[1.5, 1.5, 10.5, 1.5, 10.5, 8.5, 1.5, 8.5], [6.25, 4.75, 21.4, 6.6, 14.2, 18.8]], 20, 24, 146,
     "Z17=0000000000001O21OO1N1O1ON2O1N2N2O1Nh1"),
    ([[0, 0, 24, 0, 24, 20, 0, 20]], 20, 24, 480, "0P?"),
    ([[2.17, 1.42, 28.63, 28.91, 2.44, 28.35, 27.9, 1.08]], 30, 30, 368,
     "m11m01KO[O2c0O]O2a0O_O2?OA2=0B1<0D1:0F180H160J131M011O0O11OO11N11ON31MN51KN71IN91GN;1EN>0BO`00@Ob00^OOd00\\OOf005"
     "OP1")]

@pytest.mark.parametrize("parts, height, width, area, counts", POLYGONS)
def test_polygons_as_pycocotools_fills_them(parts, height, width, area, counts):
    mask = data.polygon_mask(parts, height, width)
    assert mask.dtype == bool and mask.shape == (height, width) and mask.sum() == area
    assert data.rle_encode(mask) == dict(size=[height, width], counts=counts)
    for form in (counts, counts.encode(), runs(mask)):
        assert np.array_equal(data.rle_decode(dict(size=[height, width], counts=form)), mask)

def test_run_lengths_of_many_masks():
    rng = np.random.default_rng(0)
    for k in range(10_000):
        mask = rng.random(rng.integers(1, 14, 2)) < (0, 0.1, 0.5, 0.9, 1)[k % 5]
        rle = data.rle_encode(mask)
        assert np.array_equal(data.rle_decode(rle), mask) and (k % 9 or rle == data.rle_encode(data.rle_decode(
            dict(size=mask.shape, counts=runs(mask)))))
    wide = np.zeros((300, 700), bool)  # runs of more than two characters
    wide[5, 9] = wide[299, 650:] = True
    assert np.array_equal(data.rle_decode(data.rle_encode(wide)), wide)

@pytest.mark.parametrize("counts", ["", "~", "P", "0", "é", "[16>0", "oooooooooooooo1", [], [5], [7, -1], [6.0], [[6]],
                                    [2**62] * 4 + [6], [2**63, 2**63, 6], [10**30], [None], None, "7K5"])
def test_run_lengths_that_do_not_fit(counts):
    with pytest.raises((ValueError, TypeError)):
        data.rle_decode(dict(size=[2, 3], counts=counts))

@pytest.mark.parametrize("corners", [[1, 2, 3], [1, 2, math.nan, 4, 5, 6], [0, 0, 1e9, 0, 9, 9],
                                     [0, 0, math.inf, 2, 3, 4], [9e4, -9e4, -9e4, 9e4] * 30])
def test_outlines_that_make_no_sense(corners):
    with pytest.raises(ValueError):
        data.polygon_mask([corners], 20, 30)
    with pytest.raises(ValueError) if len(corners) < 30 else contextlib.nullcontext():
        data.outline_mask(corners[::2], corners[1::2], 20, 30)

def test_components_against_a_flood():
    rng = np.random.default_rng(0)
    for k in range(150):
        mask = rng.random(rng.integers(1, 14, 2)) < (0, 0.3, 0.45, 0.6, 1)[k % 5]
        parts, areas = data.components(mask)
        expected, number = np.zeros(mask.shape, int), 0
        for start in map(tuple, np.argwhere(mask)):
            number += not expected[start]
            todo = [] if expected[start] else [start]
            while todo:
                y, x = todo.pop()
                if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] and not expected[y, x]:
                    expected[y, x] = number
                    todo += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        assert np.array_equal(parts, expected) and areas.tolist() == np.bincount(expected.ravel())[1:].tolist()

def test_pictures_upright_or_as_their_annotation_has_them(tmp_path):
    rgb = picture(20, 30)
    for orientation, upright in ((1, rgb), (3, rgb[::-1, ::-1]), (6, np.rot90(rgb, -1)), (8, np.rot90(rgb))):
        exif, path = Image.Exif(), tmp_path / f"{orientation}.png"
        exif[0x0112] = orientation
        Image.fromarray(rgb).save(path, exif=exif)
        assert np.array_equal(data.read_image(path), upright) and data.image_size(path) == upright.shape[:2]
        assert np.array_equal(data.read_image(path, (20, 30)), rgb) and data.image_size(path, (20, 30)) == (20, 30)
        if orientation > 4:
            assert np.array_equal(data.read_image(path, (30, 20)), upright)
            assert data.image_size(path, (30, 20)) == (30, 20)
        for read in (data.read_image, data.image_size):
            with refused(f"{orientation}.png: is ", f"{upright.shape[1]} x {upright.shape[0]}", "31 x 20",
                         kind=data.SampleError):
                read(path, (20, 31))

def test_masks_of_another_size_are_refused(tmp_path):
    for layout, glob, broken in (("msra10k", "*.png", np.ones((20, 30), np.uint8)),
                                 ("bdd100k", "labels/**/*.png", np.full((20, 30, 4), (1, 0, 0, 1), np.uint8)),
                                 ("acdc-semantic", "gt/**/*.png", np.full((20, 30), 13, np.uint8)),
                                 ("coco", "val2017/*.jpg", picture(20, 30))):
        write_layout(layout, tmp_path / layout)
        for path in (tmp_path / layout).rglob(glob):
            put(path, broken)
        with refused("30 x 20", "96 x 64", kind=data.SampleError):
            data.load_dataset(tmp_path / layout, "val")[0].masks()
    truth = write_layout("coco", tmp_path / "rle")  # run lengths of another size than their picture
    path = tmp_path / "rle" / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"size": [64, 96]', '"size": [96, 64]'), encoding="utf-8")
    with refused("instances_val2017.json", sorted(truth)[0], "[96, 64]", kind=data.SampleError):
        data.load_dataset(tmp_path / "rle", "val")[0].masks()

def walk(path, text, monkeypatch, chunk=7):
    monkeypatch.setattr(data, "CHUNK", chunk)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    content = path.read_bytes()
    return [(key, record, json.loads(content[at:at + size])) for key, record, at, size in data.json_records(path)]

@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("indent", [None, 1])
def test_json_is_walked_as_json_reads_it(tmp_path, monkeypatch, ascii, indent):
    deep = {"x": [[], {}, [None, True, False], {"y": {"z": [-1, 2.5e-3, 1e+9]}}], "": "]}[{,:\"\\/\b\n"}
    content = {"info": deep, "version": -1.25e+10, "name": "Würfel 象 🐘", "a": [deep, {"id": 1234567890123456789}],
               "empty": [], "numbers": [0, -7, 1.5, 1e-5, 12345.678901, 1e22, None, True, "ü\\\"", [[1.5, 2]], 3],
               "b": [{"id": n, "text": "é" * n} for n in range(20)], "last": [], "end": 1.75}
    text = json.dumps(content, ensure_ascii=ascii, indent=indent)
    expected = [(key, record) for key, value in content.items() if isinstance(value, list) for record in value]
    for chunk in (2, 7, 64, 1 << 20):
        found = walk(tmp_path / "x.json", text, monkeypatch, chunk)
        assert [(key, record) for key, _, record in found] == expected
        assert all(record["id"] == seen["id"] for key, seen, record in found if key == "b")
        assert all(data._utf8(seen["text"]) == record["text"] for key, seen, record in found if key == "b")
    for end in range(0, len(text.encode()) - 1, 7):
        with pytest.raises(ValueError):
            walk(tmp_path / "x.json", text.encode()[:end], monkeypatch, 50)

@pytest.mark.parametrize("text", ["", " ", "[1]", '{"a": [1 2]}', '{"a" [1]}', '{"a": [1}', '{"a": [{"b": 1]]}', "{1",
                                  '{"a": [tru]}', '{"a": [' + '{"b": ' * 9999, '{"a": ["' + "x" * 9999, '{"a": "b" 3}',
                                  "é", '{"a": [' + "9" * 9999 + "]}"])
def test_json_that_is_none(tmp_path, monkeypatch, text):
    monkeypatch.setattr(data, "LONGEST", 500)  # no more than this is kept of what does not end
    with pytest.raises((ValueError, RecursionError)):
        walk(tmp_path / "x.json", text, monkeypatch, 50)

@pytest.fixture
def pinned(tmp_path):
    """A set, its prompts file, and a function that pins a changed file and uses what it holds."""
    write_layout("coco", tmp_path / "coco")
    path = tmp_path / "p.json"
    assert run_cli(data.main, tmp_path / "coco", "--split", "val", "--export-prompts", path) is None
    def change(how):
        content = json.loads(path.read_text())
        how(content["sets"][0]["samples"]["000000000139"], content)
        put(tmp_path / "changed.json", content)
        dataset = data.load_datasets([tmp_path / "coco"], "val", prompt_files=[tmp_path / "changed.json"])[0]
        return [sample.prompts() for sample in dataset]
    return tmp_path / "coco", path, change

def test_exported_prompts_are_those_that_are_drawn(pinned, tmp_path):
    root, path, change = pinned
    drawn = [s.prompts() for s in data.load_dataset(root, "val")]
    data.export_prompts([data.load_dataset(root, "val")], tmp_path / "1.json", seed=1)
    others = [s.prompts(seed=1) for s in data.load_dataset(root, "val")]
    for file, expected in ((path, drawn), (tmp_path / "1.json", others)):
        dataset = data.load_datasets([root], "val", prompt_files=[file])[0]
        assert all(map(np.array_equal, p, q) for p, q in zip([s.prompts() for s in dataset], expected, strict=True))
        assert [s.prompts()[0].tolist() for s in data.Union([dataset])] == [points.tolist() for points, _ in expected]
    assert all((p != q).any() and np.array_equal(b, c) for (p, b), (q, c) in zip(drawn, others))
    content = json.loads(path.read_text())
    assert content["format"] == "gara-sam prompts 1" and len(content["sets"][0].pop("samples")) == 3
    assert content["sets"] == [dict(kind="coco", split="val", seed=0)]
    for sample, (points, boxes) in zip(data.load_dataset(root, "val"), change(lambda sample, content: None)):
        for mask, clicks, box in zip(sample.masks(), points, boxes):
            y, x = np.nonzero(mask)
            assert mask[tuple(clicks.astype(int).T[::-1])].all()
            assert box.tolist() == [x.min(), y.min(), x.max(), y.max()]
    assert not [name for name in os.listdir(tmp_path) if "part" in name]

def first(sample):
    return sample["masks"]["5000"]

def at(sample, point, side, value):
    first(sample)["points"][point][side] = value

@pytest.mark.parametrize("how, words", [
    (lambda s, c: c.update(format="x"), ["format 'x'"]), (lambda s, c: c.pop("sets"), ["not a prompts file"]),
    (lambda s, c: c.update(sets=[[]]), ["not a prompts file"]),
    (lambda s, c: c["sets"][0].update(samples=3), ["not a prompts file"]),
    (lambda s, c: c["sets"][0].update(kind="lvis"), ["no prompts for coco val", "for lvis val"]),
    (lambda s, c: c["sets"][0]["samples"].pop("000000000139"), ["1 of 3 samples", "000000000139"]),
    (lambda s, c: s.update(size=[96, 64]), ["no three points", "000000000139"]),
    (lambda s, c: s.update(size=None), ["no three points"]), (lambda s, c: s.update(masks=None), ["no three points"]),
    (lambda s, c: s["masks"].pop("5000"), ["mask 5000"]), (lambda s, c: first(s)["points"].pop(), ["mask 5000"]),
    (lambda s, c: first(s).update(points="here"), ["mask 5000"]),
    (lambda s, c: at(s, 2, 0, 2), ["mask 5000", "96 x 64"]),
    (lambda s, c: at(s, 0, 1, -30), ["mask 5000"]), (lambda s, c: at(s, 0, 1, 10**400), ["mask 5000"]),
    (lambda s, c: at(s, 0, 0, 20.5), ["mask 5000"]), (lambda s, c: at(s, 1, 0, math.nan), ["mask 5000"]),
    (lambda s, c: first(s)["box"].__setitem__(2, 50), ["another box", "mask 5000"])])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_prompts_files_that_do_not_fit(pinned, how, words):
    with refused("changed.json", *words, kind=data.DatasetError):
        pinned[2](how)

def test_a_point_stays_in_its_pixel_at_any_scale():
    for s in np.concatenate([[0.5, 1, 2], np.random.default_rng(0).uniform(0.5, 9, 200)]):
        x = np.arange(2000)
        assert (x * s <= x * s + 0.5).all() and (x * s + 0.5 <= (x + 1) * s).all()

def mutated(rng, path):
    """The file's bytes after an accident: cut, bits flipped, or a value of its JSON exchanged."""
    content = bytearray(path.read_bytes())
    if path.suffix == ".json" and rng.random() < 0.7:
        content, spots = json.loads(content), []
        def visit(node):
            for key, value in (node.items() if isinstance(node, dict) else enumerate(node)):
                spots.append((node, key))
                if isinstance(value, (dict, list)):
                    visit(value)
        visit(content)
        node, key = spots[rng.integers(len(spots))]
        node[key] = (None, "a", "../x", "\0", -1, 1.5, 10**30, 2**62, math.nan, 1e308, True, [], {}, [None],
                     [[1e9] * 6], {"size": [64, 96], "counts": [2**62] * 4})[rng.integers(16)]
        return json.dumps(content).encode()
    if rng.random() < 0.4:
        return bytes(content[:rng.integers(len(content))])
    for at in rng.integers(0, min(len(content), rng.choice([100, 10**6])), rng.integers(1, 6)):
        content[at] = rng.integers(256)
    return bytes(content)

@pytest.mark.filterwarnings("ignore")
def test_damaged_files_end_in_an_error_of_the_dataset(tmp_path):
    rng, outcomes = np.random.default_rng(0), Counter()
    for layout in LAYOUTS:
        write_layout(layout, tmp_path / layout)
        files = sorted(path for path in (tmp_path / layout).rglob("*") if path.is_file())
        for k in range(25):
            some = [path for path in files if path.suffix == ".json" or k % 2] or files
            path = some[rng.integers(len(some))]
            before = path.read_bytes()
            path.write_bytes(mutated(rng, path))
            try:
                dataset = data.load_dataset(tmp_path / layout, ("train", "val")[k // 2 % 2], layout.split("-")[0])
                for sample in dataset:
                    sample.image(), sample.prompts(), sample.labels
                outcomes["fine"] += 1
            except data.DatasetError as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
            path.write_bytes(before)
    assert outcomes["refused"] > 40 and outcomes["fine"] > 40, outcomes

# ---- Training -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with demo/, a handful of scenes, and w.pth, vit_t weights."""
    folder = tmp_path_factory.mktemp("demo")
    data.make_demo(folder / "demo", train=6, val=2, test=3)
    torch.save(tiny_weights(), folder / "w.pth")
    return folder

def run_train(demo, out, *more):
    """Exit code of a short training run."""
    return run_cli(train.main, "--data", demo / "demo", "--checkpoint", demo / "w.pth", "--out", out, "--device", "cpu",
                   "--amp", "off", "--workers", 0, "--batch-size", 2, "--val-images", 1, *more)

def examples_of(dataset, count=10**6, **options):
    usual = dict(seed=0, masks_per_image=4, augment=False, conditions=data.CONDITIONS)
    return train.Examples(dataset, "vit_t", count, **usual | options)

def same(a, b):
    """Two examples, or two nested states, are equal in every bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def plain_mask_loss(logits, targets):
    """20 x focal (alpha 0.5, gamma 2) + dice of one mask, pixel by pixel."""
    focal = both = total = 0.0
    for z, t in zip(logits.flatten().tolist(), targets.flatten().tolist()):
        p = 1 / (1 + math.exp(-z))
        p_t = p * t + (1 - p) * (1 - t)
        focal -= 0.5 * (1 - p_t) ** 2 * (t * math.log(p) + (1 - t) * math.log(1 - p))
        both, total = both + p * t, total + p + t
    return 20 * focal / logits.numel() + 1 - (2 * both + 1) / (total + 1)

@pytest.mark.parametrize("soft", [False, True])
def test_mask_loss_against_loops(soft):
    rng = torch.Generator().manual_seed(0)
    logits, targets = (torch.randn(3, 2, 5, 4, dtype=torch.float64, generator=rng) * 3 for _ in range(2))
    targets = targets.sigmoid() if soft else (targets > 0).double()
    out = train.mask_loss(logits, targets)
    expected = [[plain_mask_loss(logits[i, j], targets[i, j]) for j in range(2)] for i in range(3)]
    assert close(out, torch.tensor(expected, dtype=torch.float64), 1e-10)
    assert torch.autograd.gradcheck(lambda z: train.mask_loss(z, targets), logits.requires_grad_())
    assert train.mask_loss(40 * (targets > 0.5).double() - 20, (targets > 0.5).double()).max() < 1e-6  # perfect

def test_learning_rate_in_closed_form():
    args = argparse.Namespace(steps=40, lr=2.0, schedule="cosine")  # two steps of warm-up, then 38 of half a cosine
    expected = {0: 1, 1: 2, 2: 2, 21: 1, 39: 1 + math.cos(math.pi * 37 / 38)}
    for step, value in expected.items():
        assert train.learning_rate(step, args) == pytest.approx(value), step
    args.schedule = "constant"
    assert [train.learning_rate(step, args) for step in (0, 1, 39)] == [1, 2, 2]

def test_examples_depend_on_their_number_alone(demo):
    dataset = data.load_dataset(demo / "demo", "train")
    examples = examples_of(dataset, 9)
    forwards = [examples[i] for i in range(9)]
    assert all(same(examples_of(dataset)[i], forwards[i]) for i in reversed(range(9)))
    for first, workers in ((0, 2), (1, 0), (2, 1)):
        args = argparse.Namespace(process=0, processes=1, batch_size=3, workers=workers)
        batched = [x for batch in train.batches(examples, first, args) for x in batch]
        assert len(batched) == 9 - 3 * first and all(map(same, batched, forwards[3 * first:]))
    assert {x["name"] for x in forwards[:6]} == {sample.name for sample in dataset}  # an epoch: each picture once
    assert not same(examples_of(dataset, seed=1)[0], forwards[0])

def test_examples_agree_with_their_masks(demo):
    """Demo pictures are as large as the model's input: a target is the mean of 2 x 2 pixels of the padded mask."""
    dataset = data.load_dataset(demo / "demo", "train")
    masks = {sample.name: sample.masks() for sample in dataset}
    for example in map(examples_of(dataset, masks_per_image=6).__getitem__, range(12)):
        truth = masks[example["name"]]
        padded = np.zeros((len(truth), 128, 128))
        padded[:, :truth.shape[1], :truth.shape[2]] = truth
        means = padded.reshape(-1, 64, 2, 64, 2).mean((2, 4))
        seen = []
        assert example["image"].shape == (3, *truth.shape[1:]) and len(example["targets"]) == 6
        for target, points, box in zip(example["targets"], example["points"].int(), example["boxes"].int()):
            k = int(np.abs(means - target.numpy() / 255).mean((1, 2)).argmin())
            seen.append(k)
            assert np.abs(means[k] - target.numpy() / 255).max() <= 0.5 / 255 + 1e-9
            assert all(padded[k, y, x] for x, y in points.tolist())
            y, x = np.nonzero(padded[k])
            assert box.tolist() == [x.min(), y.min(), x.max(), y.max()]
        assert set(seen) == set(range(len(truth))) and (example["labels"] == 1).all()  # all objects, some twice

class Blank:
    """A sample that costs nothing to read, with these masks; it notes the conditions that it is asked for."""
    name, source, pinned = "blank", "blank", None

    def __init__(self, masks):
        self.planes, self.indices, self.asked = masks, tuple(range(len(masks))), []

    def image(self, condition, seed):
        self.asked.append(condition)
        return np.zeros((*self.planes.shape[1:], 3), np.uint8)

    def masks(self):
        return self.planes

@pytest.mark.parametrize("height, width", [(256, 256), (192, 256), (256, 100)])
def test_targets_of_scaled_masks(height, width):
    """A pixel of the target covers 4 x 4 pixels of the picture; scaling smooths outlines a little."""
    mask = np.random.default_rng(0).random((1, height // 16 + 1, width // 16 + 1)).repeat(16, 1).repeat(16, 2) > 0.5
    mask, padded = mask[:, :height, :width], np.zeros((256, 256))
    padded[:height, :width] = mask
    example = examples_of([Blank(mask)], masks_per_image=1)[0]
    target, expected = example["targets"][0].numpy() / 255, padded.reshape(64, 4, 64, 4).mean((1, 3))
    assert np.abs(target - expected).mean() < 0.05 and np.abs(target - expected).max() < 0.3
    assert not target[height // 4:].any() and not target[:, width // 4:].any()
    assert all(mask[0, y, x] for x, y in (example["points"][0] * 2).round().int().tolist())

def test_no_target_is_empty():
    """Masks that are too small for the model to see are left out; a picture with no other counts as a bad file."""
    masks = np.zeros((3, 480, 640), bool)
    masks[0, 0, 0] = masks[1, 100:200, 50:90] = masks[2, 479, 639] = True
    for i in range(5):
        assert (examples_of([Blank(masks)])[i]["targets"] > 0).flatten(1).any(1).all()
    tiny_ones, good = Blank(masks[::2]), Blank(masks)
    (tiny_ones.name, tiny_ones.source), example = ("dust", "dust.npy"), examples_of([tiny_ones, good])[0]
    assert example["name"] == "blank"
    assert any("dust.npy" in str(error) for i in range(2) for error in examples_of([tiny_ones, good])[i]["bad"])

def test_conditions_are_drawn_evenly():
    sample = Blank(np.ones((1, 128, 128), bool))
    drawn = [example["condition"] for example in map(examples_of([sample]).__getitem__, range(320))]
    deals = [drawn[k:k + 16] for k in range(0, 320, 16)]
    assert drawn == sample.asked and all(sorted(deal) == sorted(data.CONDITIONS) for deal in deals)
    assert len({deal[0] for deal in deals}) > 5  # in another order each time
    assert {examples_of([sample], conditions=["clear"])[i]["condition"] for i in range(20)} == {"clear"}

def test_conditions_can_be_chosen(demo, tmp_path, capsys, monkeypatch):
    sample = Blank(np.ones((1, 128, 128), bool))
    drawn = [examples_of([sample], conditions=["fog", "night"])[i]["condition"] for i in range(40)]
    assert sorted(drawn) == ["fog"] * 20 + ["night"] * 20
    assert {examples_of([sample], conditions=["fog", "rain"], clear=0.5)[i]["condition"] for i in range(40)} == {
        "clear", "fog", "rain"}
    asked = []
    image = data.Sample.image
    monkeypatch.setattr(data.Sample, "image", lambda self, condition="clear", seed=None: (
        asked.append(condition) or image(self, condition, seed)))
    assert run_train(demo, tmp_path / "a", "--steps", 2, "--method", "lora", "--conditions", "night", "snow@2") == 0
    assert set(asked) == {"night", "snow@2"}  # validation never sees another one either
    seen = [line["validation"] for line in train.read_log(tmp_path / "a" / "log.jsonl") if "validation" in line]
    assert all(iou.keys() == {"point degraded", "box degraded"} for iou in seen)
    capsys.readouterr()
    for wrong, words in ((["--conditions", "fgo"], "fgo"), (["--conditions", "fog", "--no-corrupt"], "--no-corrupt"),
                         (["--conditions", "fog", "--pretrain"], "--pretrain")):
        assert run_train(demo, tmp_path / "b", *wrong) == 2 and one_error(capsys, words)

def test_gates_may_start_open_and_learn_faster(demo, tmp_path, capsys):
    """Adam's first step is the learning rate itself, whatever the gradient; noise of logistic kind opens a component
    with chance sigmoid(bias)."""
    def after(out, *more):
        assert run_train(demo, tmp_path / out, "--steps", 1, "--lr", 1e-4, "--schedule", "constant", *more) == 0
        return gara.read_adapter(tmp_path / out / "last.pt")["weights"]

    plain, fast, biased = after("plain"), after("fast", "--gate-lr", 7), after("biased", "--gate-bias", 2)
    start = gara.adapter_state(train.build_model(train.parse(
        ["--data", str(demo / "demo"), "--checkpoint", str(demo / "w.pth"), "--device", "cpu"])))
    for key, before in start.items():
        if key.endswith("gate.G_h.4.bias"):
            steps = [(weights[key] - before).abs().max().item() for weights in (plain, fast)]
            assert steps == pytest.approx([1e-4, 7e-4], rel=0.02)
            assert (biased[key] - before).mean().item() == pytest.approx(2, abs=1e-3)
        elif key.endswith(".B"):
            assert (fast[key] - before).abs().max().item() == pytest.approx(1e-4, rel=0.02)
        elif key.endswith("G_0.2.bias"):  # it opens no component
            assert (biased[key] - before).abs().max() < 1.02e-4
    assert run_train(demo, tmp_path / "no", "--method", "lora", "--gate-bias", 1) == 2
    assert "--gate-bias: lora" in capsys.readouterr().err

def mean_of_16_conditions(iou):
    return sum((15 * iou[f"{prompt} degraded"] + iou[f"{prompt} clear"]) / 16 for prompt in ("point", "box")) / 2

@pytest.fixture(scope="module")
def finished(demo):
    """The folder, printed text, model and lines in the log at each curve of a run of 6 steps."""
    models, curves, build, curve = [], [], train.build_model, train.curve
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as text:
        patch.setattr(train, "build_model", lambda args: models.append(build(args)) or models[-1])
        patch.setattr(train, "curve", lambda log, path: curves.append(open(log).readlines()) or curve(log, path))
        assert run_train(demo, demo / "finished", "--steps", 6, "--val-every", 3, "--log-every", 2) == 0
    return demo / "finished", text.getvalue(), models[0], curves

def test_training_writes_its_files(finished):
    folder, text, model, curves = finished
    assert sorted(os.listdir(folder)) == ["curve.png", "gara.pt", "last.pt", "log.jsonl", "run.json"]
    lines = [json.loads(line) for line in open(folder / "log.jsonl")]
    validations = [line for line in lines if "validation" in line]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    assert [line["step"] for line in validations] == [0, 3, 6]
    assert all(len(line["validation"]) == 4 and 0 <= max(line["validation"].values()) <= 1 for line in validations)
    with Image.open(folder / "curve.png") as picture:
        assert picture.format == "PNG" and picture.width > 500
    best = max(mean_of_16_conditions(line["validation"]) for line in validations)
    assert float(re.search(r"best.* IoU ([\d.]+)", text)[1]) == pytest.approx(best, abs=1e-4)
    saved = gara.load_adapter(tiny(), folder / "gara.pt")
    assert mean_of_16_conditions(saved["validation"]) == pytest.approx(best)

def test_the_curve_shows_the_validation_just_made(finished):
    assert len(finished[3]) >= 2 and all("validation" in lines[-1] for lines in finished[3])

def test_training_moves_the_adapter_and_not_sam(finished):
    folder, _, model, _ = finished
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in tiny_weights().items())
    torch.manual_seed(0)
    start = gara.adapter_state(gara.attach(tiny(), "gara"))
    moved = [key for key, value in gara.adapter_state(model).items() if not torch.equal(value, start[key])]
    assert len(moved) > 0.9 * len(start)
    gara.load_adapter(loaded := tiny(), folder / "last.pt")
    assert same(gara.adapter_state(loaded), gara.adapter_state(model))

def weights_of(path):
    return torch.load(path, weights_only=True)["weights"]

def test_same_command_same_bits(demo, finished, tmp_path):
    assert run_train(demo, tmp_path / "run", "--steps", 6, "--val-every", 3) == 0
    assert same(weights_of(tmp_path / "run" / "last.pt"), weights_of(finished[0] / "last.pt"))

def test_resuming_equals_never_stopping(demo, finished, tmp_path, monkeypatch, capsys):
    """Stopped in the fifth step, then resumed from the checkpoint of the third: every bit of a run in one go."""
    out, rate = tmp_path / "run", train.learning_rate

    def stop_at_the_fifth(step, args):
        if step == 4:
            raise KeyboardInterrupt
        return rate(step, args)

    monkeypatch.setattr(train, "learning_rate", stop_at_the_fifth)
    arguments = demo, out, "--steps", 6, "--val-every", 3, "--log-every", 2
    assert run_train(*arguments) == 130 and "--resume" in capsys.readouterr().err
    monkeypatch.setattr(train, "learning_rate", rate)
    before = (out / "last.pt").read_bytes()
    assert run_train(*arguments) == 2
    assert one_error(capsys, "--resume") and (out / "last.pt").read_bytes() == before
    torch.rand(7)  # whatever the process did in between
    assert run_train(*arguments, "--resume") == 0
    a, b = (torch.load(folder / "last.pt", weights_only=True) for folder in (out, finished[0]))
    assert same(a["weights"], b["weights"]) and a["meta"]["validation"] == b["meta"]["validation"]
    assert same(a["meta"]["training"]["optimizer"], b["meta"]["training"]["optimizer"])
    steps = [json.loads(line)["step"] for line in open(out / "log.jsonl") if "loss" in line]
    assert steps == sorted(set(steps))  # nothing is logged twice

@pytest.mark.parametrize("method, options, expected", [
    ("gara", ["--rank-low", 2, "--rank-high", 5], dict(rank_low=2, rank_high=5, temperature=0.5)),
    ("gara_flat", ["--temperature", 0.7], dict(rank=4, temperature=0.7)), ("lora", ["--rank", 3], dict(rank=3)),
    ("moe_lora", ["--experts", "1,3"], dict(experts=(1, 3), temperature=0.5))])
def test_every_method_trains(demo, tmp_path, method, options, expected):
    assert run_train(demo, tmp_path, "--steps", 2, "--method", method, *options) == 0
    content = gara.read_adapter(tmp_path / f"{method}.pt")
    assert content["method"] == method and content["options"] == expected

def test_a_smaller_model_input_for_a_try(demo, tmp_path, capsys):
    """The adapter says at which size it was trained, and evaluation and sam.py take that size by themselves."""
    assert run_train(demo, tmp_path, "--steps", 1, "--image-size", 64) == 0
    assert gara.read_adapter(tmp_path / "gara.pt")["image_size"] == 64
    assert examples_of(data.load_dataset(demo / "demo", "train"), size=64)[0]["targets"].shape[1:] == (32, 32)
    files = ["--checkpoint", demo / "w.pth", "--device", "cpu"]
    assert run_cli(evaluate.main, "--ckpt", tmp_path / "gara.pt", "--data", demo / "demo", "--no-corrupt", "--limit", 1,
                   "--workers", 0, "--out", tmp_path / "results", *files) == 0
    assert run_cli(sam.main, next((demo / "demo" / "test" / "clear").iterdir()), "--box", "20,20,60,60", "--adapter",
                   tmp_path / "gara.pt", "--backbone", "vit_t", "--out", tmp_path / "o.png", *files) == 0
    capsys.readouterr()
    for wrong, words in ((["--image-size", 60], "multiple of 8"),
                         (["--image-size", 64, "--method", "full"], "own size")):
        assert run_train(demo, tmp_path / "no", "--steps", 1, *wrong) == 2 and one_error(capsys, words)

@pytest.mark.parametrize("method", ["lora", "gara"])
def test_one_picture_can_be_learned(tmp_path, demo, method):
    data.make_demo(tmp_path / "demo", train=1, val=1, test=0)
    shutil.copy(demo / "w.pth", tmp_path)
    assert run_train(tmp_path, tmp_path / "run", "--steps", 25, "--method", method, "--no-corrupt", "--log-every", 1,
                     "--lr", 3e-3, "--val-every", 25) == 0
    losses = [line["loss"] for line in map(json.loads, open(tmp_path / "run" / "log.jsonl")) if "loss" in line]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])

def test_pretraining_writes_a_sam(demo, tmp_path):
    arguments = demo, tmp_path, "--pretrain", "--steps", 4, "--val-every", 2
    assert run_train(*arguments) == 0 and run_train(*arguments, "--resume") == 0
    model = sam.build_sam("vit_t", tmp_path / "sam_vit_t.pth")
    assert all(p.isfinite().all() for p in model.parameters())
    assert (tmp_path / "sam_vit_t.pth").stat().st_size < 2.2 * sum(p.numel() for p in model.parameters()) + 10**5

def test_bad_files_are_named_and_training_goes_on(demo, tmp_path, capsys):
    shutil.copytree(demo / "demo", tmp_path / "demo")
    shutil.copy(demo / "w.pth", tmp_path)
    pictures = sorted((tmp_path / "demo" / "train" / "clear").iterdir())
    pictures[2].write_bytes(pictures[2].read_bytes()[:300])
    assert run_train(tmp_path, tmp_path / "run", "--steps", 7) == 0  # more than two epochs
    text = capsys.readouterr().out
    assert text.count(pictures[2].name) == 1 and "1 files skipped" in text.splitlines()[-1]
    for picture in pictures:
        picture.write_bytes(b"")
    for workers in (0, 1):
        out = tmp_path / f"run{workers}"
        assert run_train(tmp_path, out, "--steps", 2, "--workers", workers) == 2
        assert one_error(capsys, "none of the 6 samples")

def last(folder):
    return torch.load(folder / "last.pt", weights_only=True)

def torchrun(processes, program, *arguments):
    """A program in several processes on this machine, by torch's own launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone",
               *map(str, (program, *arguments))]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))

def test_two_processes_train_as_one(demo, tmp_path):
    """LoRA, whose gates draw no noise: the same examples, gradients up to rounding, and validation figures."""
    arguments = ("--data", demo / "demo", "--checkpoint", demo / "w.pth", *"--device cpu --amp off --workers 0".split(),
                 "--batch-size", 3, "--steps", 3, "--method", "lora", "--lr", 1e-3)  # shares of 2 and 1
    done = torchrun(2, train.__file__, *arguments, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert run_cli(train.main, *arguments, "--out", tmp_path / "one") == 0
    one, two = last(tmp_path / "one"), last(tmp_path / "two")
    for key, value in one["weights"].items():  # Adam makes whole steps of the rounding where the gradient is nearly 0
        assert (two["weights"][key] - value).norm() < 0.02 * value.norm(), key
    for key, value in one["meta"]["validation"].items():
        assert two["meta"]["validation"][key] == pytest.approx(value, abs=2e-3)
    assert done.stdout.count("step 3/3") == 1  # one voice
    first = [json.loads(line) for line in open(tmp_path / "two" / "log.jsonl")][0]["validation"]
    frozen = [json.loads(line) for line in open(tmp_path / "one" / "log.jsonl")][0]["validation"]
    assert first == frozen  # before any step: equal to the last digit

@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="this system does not list threads")
def test_no_thread_of_a_process_group_outlives_it(demo, tmp_path):
    """One that lets go of a tensor when Python has ended aborts its process, and torchrun calls the run a failure."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import glob, sys
sys.path.insert(0, {os.path.dirname(os.path.abspath(train.__file__))!r})
import train
code = train.main(sys.argv[1:])
names = [open(path).read().strip() for path in glob.glob("/proc/self/task/*/comm")]
print("threads:", *(name for name in names if "gloo" in name))
sys.exit(code)
""")
    done = torchrun(2, program, "--data", demo / "demo", "--checkpoint", demo / "w.pth", "--out", tmp_path / "run", *(
        "--device cpu --amp off --workers 0 --batch-size 2 --steps 1 --val-images 1").split())
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("threads:")] == ["threads:"] * 2

def gradients(args, share, dropped=()):
    """What one update does to a LoRA with SGD of rate 1, that is: minus its gradient."""
    run = train.Run(args)
    run.optimizer = torch.optim.SGD([dict(params=run.parameters, speed=1.0)], lr=1)
    before = [p.detach().clone() for p in run.parameters]
    run.update([example for k, example in enumerate(share) if k not in dropped])
    return torch.cat([(b - p.detach()).flatten() for b, p in zip(before, run.parameters)])

def test_the_gradient_is_the_mean_over_masks_however_the_batch_is_cut(demo):
    share = [examples_of(data.load_dataset(demo / "demo", "train"), masks_per_image=2)[i] for i in range(5)]
    words = (f"--data x --checkpoint {demo / 'w.pth'} --method lora --steps 1 --batch-size 5 --device cpu --amp off "
             "--lr 1")
    parse = functools.partial(train.parse, words.split())
    whole, args = gradients(parse(), share), parse()
    args.accumulate = 3
    assert close(gradients(args, share), whole, 1e-4)
    args = parse()
    args.checkpointing = True
    assert close(gradients(args, share), whole, 1e-4)
    parts = gradients(parse(), share, dropped=(1, 3)) + gradients(parse(), share, dropped=(0, 2, 4))
    assert close(parts, whole, 1e-4)  # two processes' shares, of 3 and 2 examples, before they are added

def test_a_killed_run_goes_on_to_the_same_bits(demo, tmp_path):
    arguments = [sys.executable, train.__file__, "--data", demo / "demo", "--checkpoint", demo / "w.pth", *(
        "--device cpu --amp off --batch-size 2 --steps 8 --val-every 4 --val-images 1 --log-every 3 "
        "--save-minutes 1e-6 --workers 1 --out").split()]
    options = dict(env=os.environ | dict(OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL)
    subprocess.run([*arguments, tmp_path / "whole"], check=True, **options)
    with subprocess.Popen([*arguments, tmp_path / "cut"], start_new_session=True, **options) as process:
        while not (tmp_path / "cut" / "last.pt").exists() or last(tmp_path / "cut")["meta"]["training"]["step"] < 2:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    for name in ("last.pt.part", "log.jsonl"):  # what a kill at the worst moments leaves
        with open(tmp_path / "cut" / name, "a") as file:
            file.write('{"step": 1, "los')
    subprocess.run([*arguments, tmp_path / "cut", "--resume"], check=True, **options)
    cut, whole = last(tmp_path / "cut"), last(tmp_path / "whole")
    assert same(cut["weights"], whole["weights"])
    assert same(cut["meta"]["training"]["optimizer"], whole["meta"]["training"]["optimizer"])
    logs = [[{key: value for key, value in line.items() if key not in ("images_per_second", "waiting")} for line in
             train.read_log(tmp_path / name / "log.jsonl")] for name in ("cut", "whole")]
    assert logs[0] == logs[1] and {line["step"] for line in logs[0]} == {0, 3, 4, 6, 8}
    assert sorted(os.listdir(tmp_path / "cut")) == sorted(os.listdir(tmp_path / "whole"))

def test_a_signal_to_all_processes_of_a_run_stops_it_in_order(demo, tmp_path):
    """As Ctrl-C in a terminal and schedulers send it: the loader's processes must not die first."""
    arguments = ["--data", demo / "demo", "--checkpoint", demo / "w.pth", "--out", tmp_path / "run", *(
        "--device cpu --amp off --batch-size 2 --steps 9999 --val-every 9999 --val-images 1 --save-minutes 1e-6 "
        "--workers 1").split()]
    options = dict(env=os.environ | dict(OMP_NUM_THREADS="1"), start_new_session=True, text=True)
    with subprocess.Popen([sys.executable, train.__file__, *arguments], stderr=subprocess.PIPE, **options) as process:
        while not (tmp_path / "run" / "last.pt").exists() or last(tmp_path / "run")["meta"]["training"]["step"] < 2:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == 143 and "stopped by signal 15" in said and "Traceback" not in said

@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_run_after_the_step_at_hand(demo, finished, tmp_path, monkeypatch, capsys, number, code):
    rate, calls = train.learning_rate, itertools.count()
    monkeypatch.setattr(train, "learning_rate", lambda step, args: (next(calls) == 1 and os.kill(os.getpid(), number),
                                                                    rate(step, args))[1])
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    arguments = demo, tmp_path / "run", "--steps", 6, "--val-every", 3, "--log-every", 2
    assert run_train(*arguments) == code and "--resume" in capsys.readouterr().err
    assert last(tmp_path / "run")["meta"]["training"]["step"] == 2
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    monkeypatch.setattr(train, "learning_rate", rate)
    assert run_train(*arguments, "--resume") == 0
    assert same(last(tmp_path / "run")["weights"], last(finished[0])["weights"])

def test_steps_without_a_finite_gradient_are_skipped_and_counted(demo, tmp_path, monkeypatch, capsys):
    loss, calls = train.mask_loss, itertools.count()
    monkeypatch.setattr(train, "mask_loss", lambda z, t: loss(z, t) * (math.nan if next(calls) in (2, 3) else 1))
    assert run_train(demo, tmp_path / "run", "--steps", 4, "--log-every", 1) == 0  # two calls a step: the second is bad
    lines = [line for line in train.read_log(tmp_path / "run" / "log.jsonl") if "lr" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1]
    assert ["loss" in line for line in lines] == [True, False, True, True]
    assert all(value.isfinite().all() for value in last(tmp_path / "run")["weights"].values())
    text = capsys.readouterr().out
    assert text.count("skipped, its gradient is not finite") == 1 and "train_0" in text

def test_training_gives_up_when_the_loss_stays_not_finite(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "mask_loss", lambda logits, targets: logits.sum((-2, -1)) * math.nan)
    assert run_train(demo, tmp_path, "--steps", 20, "--val-every", 20) == 2
    assert one_error(capsys, "10 steps in a row", "train_0") and last(tmp_path)["meta"]["training"]["step"] == 0

def test_a_dead_loader_costs_nothing(demo, tmp_path, monkeypatch, capsys):
    image, parent, calls = data.Sample.image, os.getpid(), itertools.count()
    monkeypatch.setattr(data.Sample, "image", lambda self, *a, **k: os._exit(1) if os.getpid() != parent
                        and next(calls) == 6 else image(self, *a, **k))
    assert run_train(demo, tmp_path, "--steps", 50, "--workers", 1) == 2
    assert one_error(capsys, "loads data died", "--resume") and last(tmp_path)["meta"]["training"]["step"] >= 0

def test_a_full_disk_leaves_the_last_checkpoint(demo, tmp_path, monkeypatch, capsys):
    assert run_train(demo, tmp_path, "--steps", 2) == 0
    before, save = (tmp_path / "last.pt").read_bytes(), torch.save

    def full(content, path, *rest):
        save(content, path, *rest)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    (tmp_path / "gara.pt").rename(tmp_path / "old.pt")
    (tmp_path / "log.jsonl").unlink()
    os.rename(tmp_path / "last.pt", tmp_path / "kept.pt")
    assert run_train(demo, tmp_path, "--steps", 2) == 2 and one_error(capsys, "No space left")
    assert not list(tmp_path.glob("*.part")) and (tmp_path / "kept.pt").read_bytes() == before

def test_the_whole_encoder_learns_with_method_full(demo, tmp_path):
    assert run_train(demo, tmp_path / "run", "--steps", 2, "--method", "full", "--lr", 1e-4) == 0
    weights, start = last(tmp_path / "run")["sam"], tiny_weights()
    moved = {key.split(".")[0] for key, value in weights.items() if not torch.equal(value, start[key])}
    assert moved == {"image_encoder"}
    assert sam.build_sam("vit_t", tmp_path / "run" / "full.pt").state_dict().keys() == weights.keys()
    assert run_evaluate(demo, tmp_path / "out", "--checkpoint", tmp_path / "run" / "full.pt", "--limit", 1) == 0

def test_a_run_says_what_it_was(demo, tmp_path):
    assert run_train(demo, tmp_path, "--steps", 2, "--seed", 5, "--keep-every", 1, "--limit", 2, "--log-every", 1) == 0
    content = json.load(open(tmp_path / "run.json"))
    assert content["settings"]["seed"] == 5 and content["settings"]["steps"] == 2 and content["versions"]["torch"]
    own = gara.adapter_state(gara.attach(tiny(), "gara"))
    assert content["learnable_parameters"] == sum(value.numel() for value in own.values())
    assert [part["images"] for part in content["data"]] == [2, 2] and len(content["data"][0]["fingerprint"]) == 16
    assert (tmp_path / "step_1.pt").exists() and (tmp_path / "step_2.pt").exists()
    lines = [line for line in train.read_log(tmp_path / "log.jsonl") if "active" in line]
    assert len(lines) == 2 and all(len(line["higher"]) == len(line["active"]) == 6 for line in lines)
    assert all(0 <= share <= 1 for line in lines for share in line["higher"])
    with Image.open(tmp_path / "curve.png") as page:
        assert page.height > 900  # the gates are drawn, too

def test_the_chance_of_a_clear_picture(demo):
    dataset = data.load_dataset(demo / "demo", "train")
    drawn = {p: [examples_of(dataset, clear=p)[i]["condition"] for i in range(200)] for p in (0, 0.5, 1)}
    assert "clear" not in drawn[0] and set(drawn[1]) == {"clear"} and 70 < drawn[0.5].count("clear") < 130
    assert len(set(drawn[0])) == 15

@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dataset_trains_and_is_measured(layout, demo, tmp_path, capsys):
    """One step and one evaluation on each miniature, then with pinned prompts, through the command lines."""
    expected, kind = write_layout(layout, tmp_path / "set"), layout.split("-")[0]
    options = "--device cpu --workers 0 --checkpoint".split() + [demo / "w.pth"]
    base = ["--data", f"{kind}={tmp_path / 'set'}", *options, "--out", tmp_path / "run"]
    assert run_cli(train.main, *base, "--steps", 1, "--batch-size", 2, "--amp", "off") == 0
    run_cli(data.main, f"{kind}={tmp_path / 'set'}", "--split", "val", "--export-prompts", tmp_path / "p.json")
    scores = []
    for pinned in ([], ["--prompts", tmp_path / "p.json"]):
        assert run_cli(evaluate.main, *base, "--split", "val", "--no-corrupt", *pinned) == 0
        results = json.load(open(tmp_path / "run" / "results.json"))
        assert {row["name"]: set(row["indices"]) for row in results["images"]} == {
            name: set(masks) for name, masks in expected.items()}
        scores.append([row["scores"] for row in results["images"]])
    assert scores[0] == scores[1] and "Traceback" not in capsys.readouterr().err

def test_several_datasets_are_measured_one_by_one_and_as_one(demo, tmp_path, capsys):
    roots = [tmp_path / "a", tmp_path / "b"]
    write_layout("ndd20", roots[0]), write_layout("bdd100k", roots[1])
    options = "--device cpu --workers 0 --checkpoint".split() + [demo / "w.pth"]
    assert run_cli(evaluate.main, "--data", *roots, *options, "--split", "val", "--no-corrupt", "--out", tmp_path) == 0
    results = json.load(open(tmp_path / "results.json"))
    first, second, union = (part["means"]["SAM"]["box clear"][0] for part in (*results["by_data"].values(), results))
    counts = [sum(len(row["indices"]) for row in results["images"] if row["data"] == str(root)) for root in roots]
    assert union == results["means"]["SAM"]["box clear"][0]
    assert union == pytest.approx(np.average([first, second], weights=counts))
    assert len(re.findall(r"^\| \S+ \| SAM \|", capsys.readouterr().out, re.M)) == 3
    words = ["--data", *roots, *options, "--out", tmp_path / "run", "--steps", 1, "--batch-size", 2, "--no-corrupt"]
    assert run_cli(train.main, *words) == 0
    assert [part["kind"] for part in json.load(open(tmp_path / "run" / "run.json"))["data"]] == ["ndd20", "bdd100k"] * 2

def test_missing_demo_is_made(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "make_demo", lambda root: shutil.copytree(demo / "demo", root))
    shutil.copy(demo / "w.pth", tmp_path)
    assert run_train(tmp_path, tmp_path / "run", "--steps", 1) == 0
    shutil.rmtree(tmp_path / "demo")
    assert run_evaluate(tmp_path, tmp_path / "out", "--no-corrupt", "--limit", 1) == 0

@pytest.mark.parametrize("arguments, words", [
    (["--data", "nowhere"], "nowhere"), (["--data", "bare"], "val"), (["--steps", 0], "--steps"),
    (["--steps", 2, "--epochs", 2], "--epochs"), (["--lr", "nan"], "--lr"), (["--device", "nonsense"], "--device"),
    (["--device", "cuda:99"], "--device"), (["--checkpoint", "cut.pth"], "cut.pth"), (["--checkpoint", "a.pt"], "a.pt"),
    (["--checkpoint", "none.pth"], "none.pth"), (["--backbone", "vit_b"], "vit_t"), (["--rank-low", 0], "0"),
    (["--method", "moe_lora", "--experts", "1,x"], "--experts"), (["--resume"], "--resume"), (["--workers", -1], ""),
    (["--what"], "--what"), (["--out", "w.pth"], "w.pth")])
def test_mistakes_of_train_end_in_one_line(mistakes, capsys, arguments, words):
    before = everything(mistakes)
    assert run_train(mistakes, "out", "--steps", 2, *arguments) == 2
    assert one_error(capsys, words) and everything(mistakes) == before

@pytest.mark.parametrize("pretrain", [[], ["--pretrain"]])
@pytest.mark.parametrize("kind", ["not weights", "adapter of other weights", "adapter alone"])
def test_resuming_from_a_wrong_file(demo, tmp_path, capsys, pretrain, kind):
    if kind == "not weights":
        (tmp_path / "last.pt").write_bytes(b"not weights" * 99)
    else:
        base = sam.build_sam("vit_t") if kind == "adapter of other weights" else tiny()
        gara.save_adapter(gara.attach(base, "gara"), tmp_path / "last.pt")
    assert run_train(demo, tmp_path, "--steps", 2, "--resume", *pretrain) == 2
    assert one_error(capsys, "last.pt") and os.listdir(tmp_path) == ["last.pt"]

# ---- Evaluation -----------------------------------------------------------------------------------------------------

@pytest.fixture
def mistakes(demo, tmp_path, monkeypatch):
    """The working folder: a dataset without val and test, good weights, cut ones, and an adapter of others."""
    shutil.copytree(demo / "demo", tmp_path / "demo")
    shutil.copytree(demo / "demo" / "train", tmp_path / "bare" / "train")
    (tmp_path / "cut.pth").write_bytes((demo / "w.pth").read_bytes()[:-5000])
    shutil.copy(demo / "w.pth", tmp_path)
    gara.save_adapter(gara.attach(sam.build_sam("vit_t"), "lora"), tmp_path / "a.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path

def test_iou_and_dice_against_loops():
    rng = np.random.default_rng(0)
    a, b = (rng.random((6, 7, 5)) < p for p in (0.3, 0.6))
    a[4] = b[5] = False
    a = np.concatenate([a, b[:1], np.zeros_like(a[:1])])
    b = np.concatenate([b, b[:1], np.zeros_like(b[:1])])
    iou, dice = evaluate.iou_dice(torch.tensor(a), b)
    for k in range(8):
        pairs = list(zip(a[k].ravel().tolist(), b[k].ravel().tolist()))
        both, either = sum(p and t for p, t in pairs), sum(p or t for p, t in pairs)
        single = sum(p for p, _ in pairs) + sum(t for _, t in pairs)
        assert iou[k] == pytest.approx(both / either if either else 1, abs=1e-12)
        assert dice[k] == pytest.approx(2 * both / single if single else 1, abs=1e-12)
    assert iou[4:].tolist() == dice[4:].tolist() == [0, 0, 1, 1]  # nothing found, nothing there, equal, both empty

class Oracle:
    """Stands in for a SAM: knows the mask that each prompt was drawn from, and answers with answer(mask)."""
    device, mask_threshold = torch.device("cpu"), 0.0

    def __init__(self, dataset, answer):
        self.image_encoder, self.answers, resize = self.Encoder(), {}, sam.ResizeLongestSide(128)
        for sample in dataset:
            masks = sample.masks()
            points, boxes = sample.prompts(masks)
            size = masks.shape[1:]
            for prompts in (resize.apply_coords(points, size), resize.apply_boxes(boxes, size)):
                self.answers |= {prompt.tobytes(): answer(mask) for prompt, mask in zip(prompts, masks)}

    class Encoder:
        img_size = 128

        def __call__(self, x):
            return x

    def preprocess(self, x):
        return x

    def decode(self, embeddings, points=None, boxes=None, image_index=None):
        asked = boxes if points is None else points[0]
        return torch.tensor(np.stack([self.answers[prompt.numpy().tobytes()] for prompt in asked]))[:, None], None

    def postprocess_masks(self, masks, input_size, original_size):
        return masks.float() - 0.5

def test_scores_of_answers_that_are_known(demo):
    """Right, empty and half answers; half: every second column of the truth."""
    dataset, conditions = data.load_dataset(demo / "demo", "test"), ("clear", "fog", "contrast")
    columns = np.arange(128) % 2 == 0
    answers = dict(right=lambda m: m, empty=lambda m: m & False, half=lambda m: m & columns[:m.shape[1]])
    models = {name: Oracle(dataset, answer) for name, answer in answers.items()}
    images = list(evaluate.evaluate(models, dataset, conditions, batch_size=2))
    assert [image["name"] for image in images] == [sample.name for sample in dataset]
    for image, sample in zip(images, dataset):
        masks = sample.masks()
        share, ones = [(m & columns[:m.shape[1]]).sum() / m.sum() for m in masks], np.ones((len(masks), 2))
        expected = dict(right=ones, empty=0 * ones, half=[[s, 2 * s / (1 + s)] for s in share])
        for name, condition, prompt in itertools.product(models, conditions, evaluate.PROMPTS):
            assert np.allclose(image["scores"][name][condition][prompt], expected[name], atol=1e-6)

def test_tables_are_means_over_masks_or_over_images():
    """Three masks on one picture and one on another: the first picture weighs three times as much."""
    first = {c: {"point": [[0.1 * k, 0.5]] * 3, "box": [[0.0, 1.0]] * 3} for k, c in enumerate(data.CONDITIONS)}
    second = {c: {"point": [[1.0, 0.7]], "box": [[1.0, 0.2]]} for c in data.CONDITIONS}
    images = [dict(indices=[1, 2, 3], scores=dict(A=first)), dict(indices=[1], scores=dict(A=second))]
    means = evaluate.summarize(images, ["A"], data.CONDITIONS)["means"]["A"]
    assert means["point clear"] == pytest.approx([0.25, 0.55]) and means["box fog"] == pytest.approx([0.25, 0.8])
    assert means["point snow"] == pytest.approx([0.325, 0.55])  # condition 1 of 15
    assert means["point degraded"] == pytest.approx([0.25 + 0.075 * 8, 0.55])  # mean of 1 to 15
    alike = evaluate.summarize(images, ["A"], data.CONDITIONS, "images")["means"]["A"]
    assert alike["point clear"] == pytest.approx([0.5, 0.6]) and alike["point snow"] == pytest.approx([0.55, 0.6])
    assert evaluate.summarize(images, ["A"], ("clear",))["means"]["A"].keys() == {"point clear", "box clear"}

def made_up_images(count, models, conditions=("clear", "fog", "fog@2"), seed=0):
    rng = np.random.default_rng(seed)
    return [dict(indices=list(range(masks)), scores={model: {condition: {prompt: rng.random((masks, 2)).tolist() for
                 prompt in evaluate.PROMPTS} for condition in conditions} for model in models})
            for masks in rng.integers(1, 4, count)]

def test_intervals_are_those_of_the_normal_distribution_when_images_are_many():
    """The ratio of sums, by the delta method: its variance is that of (score sum - mean x masks) / mean masks."""
    images = made_up_images(400, "AB")
    found = evaluate.summarize(images, "AB", ("clear", "fog", "fog@2"))

    def residuals(model, condition, prompt, metric):
        sums = [np.sum(image["scores"][model][condition][prompt], axis=0)[metric] for image in images]
        masks = [len(image["indices"]) for image in images]
        mean = np.sum(sums) / np.sum(masks)
        return mean, (sums - mean * np.array(masks)) / np.mean(masks)

    for condition, prompt, metric in itertools.product(("clear", "fog@2"), evaluate.PROMPTS, (0, 1)):
        column, parts = f"{prompt} {condition}", [residuals(model, condition, prompt, metric) for model in "AB"]
        for model, (mean, rest) in zip("AB", parts):
            low, high = found["intervals"][model][column][metric]
            assert found["means"][model][column][metric] == pytest.approx(mean)
            assert high - low == pytest.approx(2 * 1.96 * rest.std() / 20, rel=0.1)
            assert (low + high) / 2 == pytest.approx(mean, abs=0.005)
        (a, first), (b, second) = parts
        mean, low, high = evaluate.difference(found, "B", "A", column, metric)
        assert mean == pytest.approx(b - a)
        assert high - low == pytest.approx(2 * 1.96 * (second - first).std() / 20, rel=0.1)
        assert evaluate.difference(found, "A", "B", column, metric) == (-mean, -high, -low)
    assert found["means"]["A"]["point degraded"] == pytest.approx(found["means"]["A"]["point fog"])  # not of fog@2
    assert found == evaluate.summarize(images, "AB", ("clear", "fog", "fog@2"))  # the same draws each time

def test_paired_differences_know_less_noise_and_one_image_knows_nothing():
    images = made_up_images(30, "A", ("clear",))
    for image in images:  # B is better by 0.01 in every mask
        image["scores"]["B"] = {"clear": {prompt: [[iou + 0.01, dice] for iou, dice in pairs] for prompt, pairs in
                                          image["scores"]["A"]["clear"].items()}}
    found = evaluate.summarize(images, "AB", ("clear",))
    low, high = found["intervals"]["A"]["point clear"][0]
    assert high - low > 0.1 and found["differences"]["B"]["A"]["point clear"][0] == pytest.approx([0.01] * 3)
    assert found["differences"]["B"]["A"]["box clear"][1] == [0, 0, 0]
    alone = evaluate.summarize(images[:1], "AB", ("clear",))
    assert alone["intervals"]["A"]["point clear"] == [[0, 1], [0, 1]]
    assert alone["differences"]["B"]["A"]["point clear"][0][1:] == [-1, 1]

def test_the_studys_estimates_are_those_of_the_normal_distribution():
    """Of sums over the masks of many pictures, and of many seeds: the variances of both add up."""
    rng = np.random.default_rng(1)
    masks = rng.integers(1, 5, 300).astype(float)
    sums = (0.6 + 0.1 * rng.normal(size=(40, 1)) + 0.2 * rng.normal(size=(1, 300))) * masks
    mean, low, high, each = evaluate.estimate(sums, masks)
    assert mean == pytest.approx(sums.sum() / masks.sum() / 40) and each == pytest.approx(sums.sum(1) / masks.sum())
    pictures = (sums.mean(0) - mean * masks) / masks.mean()
    deviation = np.hypot(np.std(each) / 40 ** 0.5, pictures.std() / 300 ** 0.5)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.1)
    assert evaluate.estimate(sums, masks)[1:3] == (low, high)
    values = rng.random((3, 8, 2, 4))
    conditions = ["fog", "clear", "rain", "fog@2"]
    assert np.array_equal(evaluate.column(values, conditions, "box", "rain"), values[:, :, 1, 2])
    assert np.allclose(evaluate.column(values, conditions, "point", "degraded"), values[:, :, 0, [0, 2]].mean(2))

def test_what_gates_answer_to():
    """Gates that follow the corruption alone, the picture alone, and only both together; and chance."""
    rng = np.random.default_rng(0)
    code = rng.random((1, 16, 2, 30)) < 0.5
    by_corruption, by_picture = np.repeat(code, 40, 0), np.repeat(rng.random((40, 1, 2, 30)) < 0.5, 16, 1)
    assert evaluate.gate_variance(by_corruption) == pytest.approx((1, 0, 0))
    assert evaluate.gate_variance(by_picture) == pytest.approx((0, 1, 0))
    either = (np.arange(40)[:, None] + np.arange(16)) % 2 == 0
    assert evaluate.gate_variance(either[..., None]) == pytest.approx((0, 0, 1))
    assert evaluate.gate_variance(np.ones((40, 16, 9))) == (0, 0, 0)
    noise = rng.random((400, 16, 50)) < 0.5  # each explains what its degrees of freedom allow
    assert evaluate.gate_variance(noise)[:2] == pytest.approx((15 / 6399, 399 / 6399), rel=0.15)
    assert evaluate.probe(by_corruption, rng) == 1
    for silent in (by_picture, noise, evaluate.shuffled(by_corruption, rng)):
        assert evaluate.probe(silent, rng) == pytest.approx(1 / 16, abs=0.04)
    dealt = evaluate.shuffled(by_corruption, rng)
    assert (dealt != by_corruption).any() and np.array_equal(np.sort(dealt, 1), np.sort(by_corruption, 1))

def test_jobs_of_the_study_are_commands_that_the_scripts_take():
    """Every word is understood, what a job needs is made by one before it, and no two write to one folder."""
    for plan in (evaluate.FULL_STUDY, evaluate.QUICK_STUDY):
        jobs, before = evaluate.study_jobs("study", **plan), set()
        for folder, (command, needed) in jobs.items():
            assert before.issuperset(needed)
            before.add(folder)
            if callable(command):
                continue
            script, *words = command
            if script.endswith("train.py"):
                args = train.parse(words)
                assert args.out == folder and args.seed < plan["seeds"] and args.steps in (
                    1, plan["steps"], 3 * plan["steps"])
            elif script.endswith("evaluate.py"):
                args = evaluate.parse(words)
                files = {os.path.dirname(path) for path in args.ckpt}
                assert args.out == folder and files <= before and files <= {*needed}
                assert all(os.path.basename(path) == evaluate.adapter_file(run) for path in args.ckpt
                           for run in evaluate.RUNS if os.path.basename(os.path.dirname(path))[:-2] == run)
    jobs = evaluate.study_jobs("study", **evaluate.FULL_STUDY)
    assert {os.path.join("study", "runs", f"{run}_0") for run in evaluate.RUNS} <= jobs.keys()
    for name, (runs, _) in evaluate.EVALUATIONS.items():
        count = 1 if name in evaluate.ONCE else 3
        assert all(os.path.join("study", "runs", f"{run}_{seed}") in jobs for run in runs for seed in range(count))
    assert not {*evaluate.UNSEEN} & {*train.parse(["--data", "x", *evaluate.RUNS["unseen_gara"][1]]).conditions}

def test_jobs_are_done_once_in_order_and_failures_are_named(tmp_path, monkeypatch, capsys):
    script = tmp_path / "job.py"
    script.write_text("import os, sys\nout = sys.argv[1]\nif out.endswith('bad'): sys.exit('error: no such luck')\n"
                      "os.makedirs(out)\nopen(out + '/order', 'w').write(' '.join(sorted(os.listdir(out + '/..'))))\n"
                      "assert os.environ['OMP_NUM_THREADS'] == '1'")
    out = tmp_path / "study"
    a, b, c, bad = (str(out / name) for name in ("a", "b", "c", "bad"))
    jobs = {a: ([str(script), a], []), b: ([str(script), b], [a])}
    jobs[c] = functools.partial(os.makedirs, c), [b]
    jobs = dict(reversed(jobs.items()))  # whatever their order, what one needs is done before
    evaluate.run_jobs(jobs, str(out), 3)
    assert open(b + "/order").read().split()[:2] == ["a", "b"] and os.path.isdir(c)
    assert len(capsys.readouterr().out.splitlines()) == 3
    evaluate.run_jobs(jobs, str(out), 3)  # done before: makedirs would fail
    assert capsys.readouterr().out == ""
    with refused("bad: error: no such luck", "exit code 1", kind=RuntimeError):
        evaluate.run_jobs(jobs | {bad: ([str(script), bad], [])}, str(out), 2)
    with refused("another study", kind=RuntimeError):
        evaluate.run_jobs({a: ([str(script), a, "--steps", "9"], [])}, str(out), 1)

def test_frozen_gates_choose_what_was_chosen_most_often(demo, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs/gara_0")
    model = train_by_chance(tiny("gara"), 3)
    gara.save_adapter(model, "runs/gara_0/gara.pt")
    files = "--checkpoint", demo / "w.pth", "--device", "cpu", "--workers", 0
    ask = "--data", demo / "demo", "--conditions", "clear", "fog", "snow"
    assert run_cli(evaluate.main, "--ckpt", "runs/gara_0/gara.pt", *ask, "--out", "main", *files) == 0
    monkeypatch.setattr(evaluate, "find_checkpoint", lambda backbone: str(demo / "w.pth"))
    evaluate.freeze_gates("main", "runs/gara_0", "runs/frozen_0")
    assert run_cli(evaluate.main, "--ckpt", "runs/frozen_0/gara.pt", *ask, "--out", "frozen", *files) == 0
    before, after = (evaluate.read_results(f"{name}/results.json") for name in ("main", "frozen"))
    chosen = [[evaluate.unpack_gates(part, "GaRA", c) for c in part["conditions"]] for part in (before, after)]
    vectors, spaces = (np.concatenate(x) for x in zip(*chosen[1]))
    assert (vectors == vectors[0]).all() and (spaces == spaces[0]).all()  # the same for every picture
    free, free_spaces = (np.concatenate(x) for x in zip(*chosen[0]))
    for layer in range(free.shape[1]):
        assert spaces[0, layer] == (2 * free_spaces[:, layer].sum() > len(free))
        those = free[free_spaces[:, layer] == spaces[0, layer], layer]
        assert np.array_equal(vectors[0, layer], 2 * those.sum(0) > len(those))

SOME = ("clear", "ISO_noise", "elastic_transform")

def flat_scores(images):
    return np.array([pair for image in sorted(images, key=lambda image: image["name"]) for conditions in
                     image["scores"].values() for prompts in conditions.values() for pairs in prompts.values()
                     for pair in pairs])

def test_scores_do_not_depend_on_how_they_are_computed(demo):
    dataset, models = data.load_dataset(demo / "demo", "test"), {"SAM": tiny()}
    scores = flat_scores(evaluate.evaluate(models, dataset, SOME))
    assert 0 < scores.mean() < 1
    reverse = data.Dataset(dataset.root, "test", dataset.kind, dataset.samples[::-1])
    assert np.array_equal(flat_scores(evaluate.evaluate(models, reverse, SOME, workers=1)), scores)
    alone = data.Dataset(dataset.root, "test", dataset.kind, dataset.samples[1:2])
    images = [*evaluate.evaluate(models, alone, SOME), *evaluate.evaluate(models, dataset, SOME, todo=[0, 2])]
    assert np.array_equal(flat_scores(images), scores)
    for batch_size in (1, 2):  # float sums may turn over a pixel on the outline
        assert np.allclose(flat_scores(evaluate.evaluate(models, dataset, SOME, batch_size)), scores, atol=5e-3)

def test_evaluator_and_predictor_give_the_same_masks(demo, monkeypatch):
    monkeypatch.setattr(evaluate, "DECODED_AT_ONCE", 5)  # prompts of several conditions in one call, and torn apart
    sample, model = data.load_dataset(demo / "demo", "test")[0], tiny("gara")
    masks, images = sample.masks(), [sample.image(condition) for condition in SOME]
    points, boxes = sample.prompts(masks)
    predictor = sam.SamPredictor(model)
    answers = list(evaluate.predict(model, images, points, boxes, 2, "off"))
    assert len(answers) == 3
    for image, answer in zip(images, answers):
        predictor.set_image(image)
        for k in range(len(masks)):
            given_by = dict(point=dict(point_coords=points[k], point_labels=[1, 1, 1]), box=dict(box=boxes[k]))
            for prompt, given in given_by.items():
                expected = predictor.predict(**given, multimask_output=False)[0][0]
                assert answer[prompt].shape == masks.shape and (answer[prompt][k].numpy() == expected).mean() > 0.999
    assert any((a["box"] != b["box"]).any() for a, b in zip(answers, answers[1:]))  # conditions do differ

def run_evaluate(demo, out, *more):
    return run_cli(evaluate.main, "--data", demo / "demo", "--checkpoint", demo / "w.pth", "--out", out,
                   "--device", "cpu", "--workers", 0, *more)

def test_evaluate_command_line(demo, finished, tmp_path, capsys):
    assert run_evaluate(demo, tmp_path, "--ckpt", finished[0] / "last.pt") == 0
    text, results = capsys.readouterr().out, json.load(open(tmp_path / "results.json"))
    assert sorted(os.listdir(tmp_path)) == ["corruptions.png", "gates_GaRA.png", "results.csv", "results.json",
                                            "samples.png"] and list(results["means"]) == ["SAM", "GaRA"]
    assert tuple(results["conditions"]) == data.CONDITIONS and results["skipped"] == []
    for image, sample in zip(results["images"], data.load_dataset(demo / "demo", "test"), strict=True):
        assert image["name"] == sample.name and tuple(image["indices"]) == sample.indices
    count = sum(len(image["indices"]) for image in results["images"])
    for model, means in results["means"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {model} |"))
        printed = iter(float(cell.strip(" *").split()[0]) for cell in row.split("|")[2:-1])
        for prompt in evaluate.PROMPTS:
            by_condition = {}
            for condition in data.CONDITIONS:
                pairs = [pair for image in results["images"] for pair in image["scores"][model][condition][prompt]]
                by_condition[condition] = np.array(pairs).sum(0) / count
                assert means[f"{prompt} {condition}"] == pytest.approx(by_condition[condition].tolist(), abs=1e-9)
            clear = by_condition.pop("clear")
            degraded = sum(by_condition.values()) / 15
            assert means[f"{prompt} degraded"] == pytest.approx(degraded.tolist(), abs=1e-9)
            for value in (*degraded, *clear):
                assert next(printed) == pytest.approx(100 * value, abs=0.051)
    lines = [line.split(",") for line in open(tmp_path / "results.csv").read().splitlines()]
    assert lines[0] == "data model prompt condition metric mean low high".split() and len(lines) == 1 + 2 * 2 * 17 * 2
    for _, model, prompt, condition, metric, mean, low, high in lines[1:]:
        expected = results["means"][model][f"{prompt} {condition}"][metric == "Dice"]
        assert float(mean) == pytest.approx(expected, abs=1e-6) and float(low) <= float(mean) <= float(high)
    for image, sample in zip(results["images"], data.load_dataset(demo / "demo", "test"), strict=True):
        assert image["areas"] == sample.masks().sum((1, 2)).tolist()
        model = evaluate.load_models([finished[0] / "last.pt"], None, demo / "w.pth", "cpu")[0]["GaRA"]
        sam.SamPredictor(model).set_image(sample.image("fog"))
        for (space, code), layer in zip(image["gates"]["GaRA"]["fog"], gara.gates(model), strict=True):
            assert space == layer["space"][0] and code == np.packbits(layer["vector"][0].numpy()).tobytes().hex()
    with Image.open(tmp_path / "samples.png") as picture:  # input, truth and two models; a row for each picture
        assert picture.format == "PNG" and picture.width > 4 * 200 and picture.height > 3 * 200

def test_plain_sam_is_measured_alone(demo, tmp_path, capsys):
    assert run_evaluate(demo, tmp_path, "--ckpt", "sam", "--no-corrupt", "--limit", 2) == 0
    results = json.load(open(tmp_path / "results.json"))
    assert list(results["means"]) == ["SAM"] and results["means"]["SAM"].keys() == {"point clear", "box clear"}
    assert len(results["images"]) == 2 and "degraded" not in capsys.readouterr().out

def test_adapters_share_the_frozen_weights(demo, tmp_path):
    trained = {"GaRA": tiny("gara"), "LoRA 4": tiny("lora")}
    for model in trained.values():
        gara.save_adapter(model, tmp_path / f"{model.adapter['method']}.pt")
    models, about, backbone = evaluate.load_models([str(tmp_path / "gara.pt"), "sam", str(tmp_path / "lora.pt")], None,
                                                   str(demo / "w.pth"), torch.device("cpu"))
    assert list(models) == list(about) == ["SAM", "GaRA", "LoRA 4"] and backbone == "vit_t"
    plain, x = dict(models["SAM"].state_dict()), pictures(0, 1)
    for name in trained:
        state = models[name].state_dict()
        assert all(state[key].data_ptr() == value.data_ptr() for key, value in plain.items())
        assert torch.equal(encode(models[name], x), encode(trained[name], x)) and not models[name].training
    assert torch.equal(encode(models["SAM"], x), encode(tiny(), x)) and not gara.adapters(models["SAM"])

def test_bad_files_are_left_out_of_the_evaluation(demo, tmp_path, capsys):
    shutil.copytree(demo / "demo", tmp_path / "demo")
    shutil.copy(demo / "w.pth", tmp_path)
    files = sorted((tmp_path / "demo" / "test" / "clear").iterdir())
    files[1].write_bytes(b"")
    assert run_evaluate(tmp_path, tmp_path / "out", "--no-corrupt") == 0
    results = json.load(open(tmp_path / "out" / "results.json"))
    assert len(results["images"]) == 2 and len(results["skipped"]) == 1 and files[1].name in results["skipped"][0]
    assert capsys.readouterr().err.count(files[1].name) == 1

@pytest.mark.parametrize("arguments, words", [
    (["--data", "nowhere"], "nowhere"), (["--split", "tset"], "tset"), (["--data", "bare"], "test"),
    (["--ckpt", "a.pt"], "other vit_t weights"),
    (["--ckpt", "none.pt"], "none.pt"), (["--ckpt", "cut.pth"], "cut.pth"),
    (["--ckpt", "a.pt", "--backbone", "vit_b"], "vit_b"), (["--checkpoint", "cut.pth"], "cut.pth"),
    (["--checkpoint", "none.pth"], "none.pth"), (["--limit", 0], "--limit"),
    (["--device", "nonsense"], "nonsense"), (["--device", "cuda:99"], ""), (["--batch-size", 0], "--batch-size"),
    (["--workers", -1], ""), (["--what"], "--what"), (["--out", "w.pth"], "w.pth"), (["--paper", "imagenet"], "lvis"),
    (["--strengths", "-1"], "--strengths"), (["--strengths", 2, "--no-corrupt"], "--strengths"),
    (["--predictor", "none.py:x"], "none.py"), (["--predictor", "w.pth:x"], "FILE.py:NAME"),
    (["--from", "results.json"], "--data"), (["--prompts", "w.pth"], "w.pth")])
def test_mistakes_of_evaluate_end_in_one_line(mistakes, capsys, arguments, words):
    before = everything(mistakes)
    assert run_evaluate(mistakes, "out", *arguments) == 2
    assert one_error(capsys, words) and everything(mistakes) == before

PREDICTORS = """
import data, numpy as np, torch

def known(answer):
    class Known:
        def set_image(self, image):
            self.image = image
        def predict(self, point_coords=None, point_labels=None, box=None, mask_input=None, multimask_output=True):
            assert not multimask_output and (point_labels is None) == (point_coords is None) == (box is not None)
            return answer(self.image, point_coords, box), None, None
    return Known

ASKED = {prompt.tobytes(): mask for sample in data.load_dataset("demo", "test") for mask, points, box in
         zip(sample.masks(), *sample.prompts()) for prompt in (points, box)}
truth = known(lambda image, points, box: ASKED[(box if points is None else points).tobytes()][None])
nonsense = known(lambda image, points, box: np.zeros((1, *image.shape[:2]), bool))()
small = known(lambda image, points, box: np.zeros((1, 9, 9), bool))
broken, number = (lambda: 1 / 0), 7
"""

def test_whole_models_beside_adapters_in_chosen_conditions(demo, finished, tmp_path, capsys):
    changed = torch.load(demo / "w.pth", weights_only=True)
    changed["image_encoder.blocks.0.attn.qkv.bias"] = changed["image_encoder.blocks.0.attn.qkv.bias"] + 0.5
    torch.save(changed, tmp_path / "full.pt")
    assert run_cli(evaluate.main, "--ckpt", tmp_path / "full.pt", demo / "w.pth", finished[0] / "gara.pt", "--data",
                   demo / "demo", "--checkpoint", demo / "w.pth", "--device", "cpu", "--workers", 0, "--conditions",
                   "underwater", "clear", "--strengths", 0.5, "--out", tmp_path) == 0
    results = evaluate.read_results(tmp_path / "results.json")
    assert results["conditions"] == ["underwater", "clear", "underwater@0.5"]
    sam, adapted, full, same_sam = results["models"]
    assert results["means"][sam] == results["means"][same_sam] != results["means"][full] and adapted == "GaRA"
    assert results["means"][sam]["point degraded"] == results["means"][sam]["point underwater"]
    capsys.readouterr()
    for wrong, words in ((["--conditions", "night", "--no-corrupt"], "--no-corrupt"), (["--conditions", "x"], "'x'"),
                         (["--study"], "--study"), (["--quick"], "--study"), (["--seeds", 2], "--study")):
        assert run_cli(evaluate.main, "--data", demo / "demo", *wrong) == 2 and one_error(capsys, words)

def test_other_predictors_by_plug(demo, tmp_path, monkeypatch, capsys):
    """One that knows the truth scores 1, one that finds nothing 0, whatever the condition."""
    shutil.copytree(demo / "demo", tmp_path / "demo")
    shutil.copy(demo / "w.pth", tmp_path)
    (tmp_path / "mine.py").write_text(PREDICTORS)
    monkeypatch.chdir(tmp_path)
    assert run_evaluate(tmp_path, "out", "--predictor", "mine.py:truth", "mine.py:nonsense", "--costs") == 0
    results, text = json.load(open("out/results.json")), capsys.readouterr().out
    assert list(results["means"]) == ["SAM", "truth", "nonsense"]
    for condition in results["means"]["truth"]:
        assert results["means"]["truth"][condition] == results["intervals"]["truth"][condition][0] == [1, 1]
        assert results["means"]["nonsense"][condition] == [0, 0]
    for line in (r"^\| truth - SAM \| \+\d", r"^\| truth - nonsense \| \+100.0 \["):
        assert re.search(line, text, re.M)
    assert text.count("**100.0 ±0.0**") == 8 and re.search(r"^\| nonsense \| - \| - \| - \| [\d.]+ \|$", text, re.M)
    for name, word in (("small", "(1, 9, 9)"), ("broken", "ZeroDivisionError"), ("number", "TypeError"),
                       ("missing", "missing")):
        assert run_evaluate(tmp_path, "bad", "--predictor", f"mine.py:{name}", "--limit", 1) == 2
        assert one_error(capsys, "--predictor", word)

def the_rest(path):
    """What does not depend on when and where a results.json was made."""
    results = json.load(open(path / "results.json"))
    return {key: value for key, value in results.items() if key not in ("seconds", "machine")}

def test_a_killed_evaluation_goes_on_and_two_processes_give_the_same_bits(demo, finished, tmp_path):
    arguments = [evaluate.__file__, "--data", demo / "demo", "--checkpoint", demo / "w.pth", "--device", "cpu",
                 "--workers", "0", "--ckpt", finished[0] / "last.pt", "--out"]
    run = functools.partial(subprocess.run, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    whole = run([sys.executable, *arguments, tmp_path / "whole"])
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen([sys.executable, *arguments, tmp_path / "cut"], stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, env=os.environ | dict(OMP_NUM_THREADS="1"))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(path.stat().st_size for path in tmp_path.glob("cut/unfinished-*")):
        time.sleep(0.02)
    process.kill()
    process.wait()
    (partial,) = tmp_path.glob("cut/unfinished-*")
    rows = partial.read_text().splitlines(keepends=True)
    assert 1 <= len(rows) < 3 and not (tmp_path / "cut" / "results.json").exists()
    changed = json.loads(rows[0])
    changed["scores"]["SAM"]["clear"]["box"][0][0] = 0.5  # a mark: what was measured is not measured again
    partial.write_text(json.dumps(changed) + "\n" + rows[0][:77])  # a line that the kill cut short
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = run([*launcher, *arguments, tmp_path / "cut"])
    assert done.returncode == 0, done.stderr
    one, two = the_rest(tmp_path / "whole"), the_rest(tmp_path / "cut")
    assert two["images"][0]["scores"]["SAM"]["clear"]["box"][0][0] == 0.5 and "1 of 3" in done.stderr
    two["images"][0]["scores"]["SAM"]["clear"]["box"][0][0] = one["images"][0]["scores"]["SAM"]["clear"]["box"][0][0]
    assert one["images"] == two["images"] and done.stdout.count("| GaRA |") == 1  # one voice
    assert not list(tmp_path.glob("*/unfinished-*"))

def test_stored_scores_of_several_runs_stand_side_by_side(demo, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    gara.save_adapter(tiny("lora"), "lora.pt")
    shutil.copy(finished[0] / "last.pt", "gara.pt")
    options = ("--limit", 1, "--strengths", 0.5, 1)
    for out, files in (("a", ["gara.pt"]), ("b", ["lora.pt"]), ("both", ["gara.pt", "lora.pt"])):
        assert run_evaluate(demo, out, "--ckpt", *files, *options) == 0
    both = capsys.readouterr().out.split("conditions; vit_t")[-1].split("\n", 1)[1].split("written")[0]
    assert run_cli(evaluate.main, "--from", "a/results.json", "b/results.json", "--out", "merged") == 0
    assert capsys.readouterr().out.split("written")[0] == both.lstrip("\n")
    assert sorted(os.listdir("merged")) == ["corruptions.png", "gates_GaRA.png", "results.csv", "strength.png",
                                            "strength_gates_GaRA.png"]
    for name in os.listdir("merged"):
        assert open(f"merged/{name}", "rb").read() == open(f"both/{name}", "rb").read()
    stronger = [f"{name}@0.5" for name in CORRUPTIONS]
    assert json.load(open("a/results.json"))["conditions"] == [*data.CONDITIONS, *stronger]
    assert run_evaluate(demo, "c", "--limit", 1) == 0
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "old.json").write_text('{"format": "gara-sam results 1"}')
    capsys.readouterr()
    for files, word in ((["a/results.json", "c/results.json"], "conditions"), (["text.json"], "text.json"),
                        (["old.json"], "measure again"), (["none.json"], "none.json")):
        assert run_cli(evaluate.main, "--from", *files, "--out", "new") == 2 and one_error(capsys, word)
    assert not os.path.exists("new")

def test_the_papers_figures():
    """Some as printed. And as Dice = 2 IoU / (1 + IoU) is concave, no mean Dice can be above that of the mean IoU."""
    rows = dict(evaluate.published("lvis", "vit_b"))
    assert rows["SAM"]["point degraded"] == [65.0, 76.3] and rows["GaRA"]["box clear"] == [86.1, 91.9]
    assert rows["LoRA 128"] == {"point degraded": [75.6, 84.6], "point clear": [80.6, 88.1]}
    assert dict(evaluate.published("msra10k", "vit_l"))["RobustSAM"]["point clear"] == [90.1, 94.4]
    assert dict(evaluate.published("acdc", "vit_l"))["GaRA, trained on BDD+LIS"] == {"box clear": [88.8, 92.9]}
    assert evaluate.published("lvis", "vit_t") == evaluate.published(None, "vit_b") == []
    count = 0
    for name, backbone in itertools.product(evaluate.PAPER_SETS, ("vit_b", "vit_l")):
        for _, columns in evaluate.published(name, backbone):
            for iou, dice in columns.values():
                count += 1
                assert iou < dice <= 200 * iou / (100 + iou) + 0.1
    assert count == 4 * 12 * 4 + 12 * 2 + 2 + 3 + 7 * 2

def test_rows_of_the_picture_are_the_least_middling_and_most_gains(demo):
    dataset = data.load_dataset(demo / "demo", "test")
    columns = np.arange(128) % 2 == 0
    models = {"half": Oracle(dataset, lambda m: m & columns[:m.shape[1]]), "right": Oracle(dataset, lambda m: m)}
    conditions = ["clear", "fog", "snow", "rain"]
    rows = [dict(data="demo", **row) for row in evaluate.evaluate(models, dataset, conditions)]
    rows[1]["scores"]["right"]["snow"]["point"] = [[0, 0]] * len(rows[1]["indices"])  # worse than half
    args = argparse.Namespace(data=["demo"], amp="off")
    shown = evaluate.samples_to_show(dict(images=rows, conditions=conditions), models, [dataset], args, rows=3)
    assert [row["label"].split()[0] for row in shown] == ["least", "middling", "most"]
    gains = [row["iou"]["right"] - row["iou"]["half"] for row in shown]
    every = sorted(np.mean(row["scores"]["right"][c]["point"], 0)[0] - np.mean(row["scores"]["half"][c]["point"], 0)[0]
                   for row in rows for c in conditions[1:])
    assert gains[0] == every[0] < gains[1] < gains[2] == every[-1] and shown[0]["condition"] == "snow"
    assert all(np.array_equal(row["predictions"]["right"], row["truth"]) for row in shown)
    assert len({row["condition"] for row in shown}) == 3

def made_up_results(models, conditions=data.CONDITIONS, images=4, layers=2, seed=0):
    """results.json's content from random numbers; ranks 3 and 10, so that gates do not fill their last byte."""
    rng = np.random.default_rng(seed)
    results = dict(data=["demo/"], split="test", backbone="vit_t", conditions=list(conditions), images=[], models={
        name: dict(file=None, method=method, options=options, learnable_parameters=0)
        for name, (method, options) in models.items()})
    for k in range(images):
        masks = 1 + k % 3
        scores = {name: {condition: {prompt: rng.random((masks, 2)).tolist() for prompt in evaluate.PROMPTS}
                         for condition in conditions} for name in models}
        gates = {name: {condition: [[int(rng.integers(2)), np.packbits(rng.random(13) < 0.5).tobytes().hex()]
                                    for _ in range(layers)] for condition in conditions}
                 for name, (method, _) in models.items() if method == "gara"}
        results["images"].append(dict(data="demo/", name=f"{k}", size=[9, 9], indices=list(range(masks)),
                                      areas=[9] * masks, scores=scores, gates=gates))
    clean = [condition for condition in conditions if "@" not in condition]
    results["means"] = {name: {f"{prompt} {condition}": np.mean([pair for image in results["images"] for pair in
                               image["scores"][name][condition][prompt]], axis=0).tolist()
                               for prompt, condition in itertools.product(evaluate.PROMPTS, conditions)}
                        for name in models}
    for means, prompt in itertools.product(results["means"].values(), evaluate.PROMPTS):
        if len(clean) > 1:
            means[f"{prompt} degraded"] = np.mean([means[f"{prompt} {c}"] for c in clean if c != "clear"], 0).tolist()
    results["intervals"] = {name: {column: [[max(0, x - 0.1), min(1, x + 0.1)] for x in pair]
                                   for column, pair in means.items()} for name, means in results["means"].items()}
    return results

def gara_of(temperature):
    return "gara", dict(rank_low=3, rank_high=10, temperature=temperature)

SAM_ONLY = {"SAM": ("sam", {})}
LORAS = {f"LoRA {rank}": ("lora", dict(rank=rank)) for rank in (4, 16, 48)}
STRONGER = (*data.CONDITIONS, *(f"{name}@{x}" for name in data.CONDITIONS[1:] for x in (0.5, 2)))

def test_oracles_against_loops():
    results = made_up_results(LORAS, images=7)
    images, names, clean = results["images"], list(LORAS), data.CONDITIONS
    found = evaluate.oracles(images, names, clean)
    for prompt in evaluate.PROMPTS:
        corrupt_iou, instance_iou, by_condition, by_image = {}, {}, [], []
        for condition in clean:
            best = max(names, key=lambda name: results["means"][name][f"{prompt} {condition}"][0])
            corrupt_iou[condition] = results["means"][best][f"{prompt} {condition}"][0]
            by_condition += [best] * (condition != "clear")
            ious = []
            for image in images:
                best = max(names, key=lambda name: sum(x for x, _ in image["scores"][name][condition][prompt]))
                ious += [x for x, _ in image["scores"][best][condition][prompt]]
                by_image += [best] * (condition != "clear")
            instance_iou[condition] = sum(ious) / len(ious)
        for oracle, iou, chosen in (("Oracle-Corrupt", corrupt_iou, by_condition),
                                    ("Oracle-Instance", instance_iou, by_image)):
            iou["degraded"] = np.mean([iou[condition] for condition in clean[1:]])
            for column, value in iou.items():
                assert found[oracle]["iou"][f"{prompt} {column}"] == pytest.approx(value, abs=1e-12)
            shares = {name: chosen.count(name) / len(chosen) for name in names}
            assert found[oracle]["chosen"][prompt] == pytest.approx(shares, abs=1e-12)
    instance, corrupt = (found[oracle]["iou"] for oracle in ("Oracle-Instance", "Oracle-Corrupt"))
    for column in instance:  # the finer the choice, the better, and none is worse than a fixed rank
        assert instance[column] >= corrupt[column] >= max(results["means"][name][column][0] for name in names) - 1e-12

def test_oracles_of_one_model_or_of_equal_ones_are_that_model():
    results = made_up_results({"A": LORAS["LoRA 4"]}, images=3)
    for image in results["images"]:
        image["scores"]["B"] = image["scores"]["A"]
    for names, shares in ((["A"], {"A": 1}), (["B", "A"], {"B": 1, "A": 0})):  # of equal ones, the first
        for found in evaluate.oracles(results["images"], names, data.CONDITIONS).values():
            assert found["chosen"] == dict(point=shares, box=shares)
            assert found["iou"] == pytest.approx({c: pair[0] for c, pair in results["means"]["A"].items()}, abs=1e-12)
    alone = evaluate.oracles(results["images"], ["A"], ["clear"])["Oracle-Instance"]
    assert alone["iou"].keys() == {"point clear", "box clear"} and alone["chosen"] == {}

def test_gates_are_unpacked_as_they_were_packed():
    results = made_up_results({"GaRA": gara_of(0.5)}, images=5, layers=3)
    vectors, spaces = evaluate.unpack_gates(results, "GaRA", "fog")
    assert vectors.shape == (5, 3, 13) and vectors.dtype == bool and spaces.shape == (5, 3)
    for i, layer in itertools.product(range(5), range(3)):
        space, code = results["images"][i]["gates"]["GaRA"]["fog"][layer]
        bits = "".join(f"{int(digit, 16):04b}" for digit in code)
        assert spaces[i, layer] == space
        assert [int(x) for x in vectors[i, layer]] == [int(x) for x in bits[:13]] and "1" not in bits[13:]

@pytest.mark.parametrize("models, conditions, names", [
    (SAM_ONLY, ("clear",), []),
    (SAM_ONLY, data.CONDITIONS, ["corruptions"]),
    ({**SAM_ONLY, "GaRA (a/b)": gara_of(0.5)}, ("clear",), ["gates_GaRA__a_b_"]),
    ({**LORAS, "GaRA": gara_of(0.5)}, STRONGER, ["corruptions", "gates_GaRA", "strength", "strength_gates_GaRA"]),
    ({**LORAS, **{f"a name of {k} letters": gara_of(k / 4) for k in (1, 2, 4)}}, ("clear", "fog", "fog@3"),
     ["corruptions", *(f"{kind}_a_name_of_{k}_letters" for kind in ("gates", "strength_gates") for k in (1, 2, 4)),
      "strength", "temperature"])])
def test_every_figure_that_the_results_allow_is_written(models, conditions, names, tmp_path):
    results = made_up_results(models, conditions)
    paths = evaluate.figures(results, tmp_path / "new")
    assert sorted(paths) == sorted(str(tmp_path / "new" / f"{name}.png") for name in names)
    for path in paths:
        with Image.open(path) as figure:
            pixels = np.array(figure)
        assert pixels.shape[1] == 1400 and 150 < pixels.shape[0] < 2400 and pixels.shape[2] == 3
        assert (pixels == 255).all(2).mean() > 0.3 and (pixels < 128).all(2).mean() > 0.002  # a white ground, and ink
        edges = np.concatenate([pixels[:4].ravel(), pixels[-4:].ravel(), pixels[:, :4].ravel(), pixels[:, -4:].ravel()])
        assert (edges == 255).all()  # nothing runs over the page

@pytest.mark.parametrize("plan", [evaluate.FULL_STUDY, evaluate.QUICK_STUDY])
def test_the_studys_report_says_what_the_folders_hold(plan, tmp_path, monkeypatch):
    """Made-up scores in the folders of a whole study: every table is there, and cells are means by hand."""
    monkeypatch.chdir(tmp_path)
    jobs, kinds, means = evaluate.study_jobs("study", **plan), dict(lora=("lora", dict(rank=3))), {}
    for number, (folder, (command, _)) in enumerate(jobs.items()):
        name, seed = os.path.basename(folder).rpartition("_")[::2]
        os.makedirs(folder)
        if "runs" in folder.split(os.sep):
            open(f"{folder}/run.json", "w").write(json.dumps(dict(learnable_parameters=4321)))
            open(f"{folder}/log.jsonl", "w").write('{"validation": 1}\n{"loss": 1, "images_per_second": 23.4}\n')
            continue
        if name not in evaluate.EVALUATIONS:
            continue
        args = evaluate.parse(command[1:])
        runs = [os.path.basename(os.path.dirname(path)) for path in args.ckpt]
        found = made_up_results({"SAM": ("sam", {})} | {run: kinds.get(run.split("_")[0][:4], (
            "gara", dict(rank_low=3, rank_high=10, temperature=0.5))) for run in runs}, args.conditions, 5, seed=number)
        for run, path in zip(runs, args.ckpt):
            found["models"][run]["file"] = path
        found["images"] += [image | dict(data=root) for root in args.data[1:] for image in found["images"]]
        found |= dict(format=evaluate.FORMAT, data=args.data, torch="x", machine="y")
        open(f"{folder}/results.json", "w").write(json.dumps(found))
        means |= {(name, run): found["means"][run] for run in runs}
    os.makedirs("study/cost")
    cost = dict(format=evaluate.FORMAT, costs=dict(heads=["model", "images/s"], rows=[["SAM", "77.77"]]))
    open("study/cost/results.json", "w").write(json.dumps(cost))
    os.makedirs("study/jobs")
    open("study/jobs/x.json", "w").write(json.dumps(dict(command=["train.py", "--seed", "7"], seconds=61)))
    evaluate.write_report("study", plan)
    text = open("study/report.md").read()
    assert all(f"## {k}. " in text for k in range(1, 10)) and "nan" not in text
    assert "4,321 | 23.4" in text and "77.77" in text and "train.py --seed 7    # 61 s" in text
    pictures = re.findall(r"\]\((.*?)\)", text)
    assert len(pictures) == 3 and all(Image.open(f"study/{name}").width > 1000 for name in pictures)
    for name, run in (("unseen", "unseen_gara"), ("real", "real_gara"), ("main", "moe")):
        of = [means[name, f"{run}_{seed}"] for seed in range(plan["seeds"])]
        column = "point night" if name == "real" else "point degraded"
        row = next(line for line in text.split(f"study/{name}_*")[-1].splitlines()
                   if line.startswith(f"| {evaluate.label_of(run)} |"))
        assert row.split("|")[2].split()[0] == f"{100 * np.mean([x[column][0] for x in of]):.1f}"

def test_greys_of_the_gates_are_the_share_of_images(tmp_path):
    results = made_up_results({"GaRA": gara_of(0.5)}, ("clear", "fog"), images=1, layers=1)
    for vector in (np.zeros(13, bool), np.ones(13, bool)):
        code = np.packbits(vector).tobytes().hex()
        results["images"][0]["gates"]["GaRA"] = {condition: [[1, code]] for condition in ("clear", "fog")}
        with Image.open(evaluate.figure_gates(results, "GaRA", str(tmp_path / "gates.png"))) as figure:
            row = np.array(figure.convert("L"))[-30, 165:600]  # through the row of fog
        assert np.median(row) == (0 if vector.any() else 255)

def test_picture_has_a_row_per_sample_and_a_column_per_model(tmp_path):
    truth = np.zeros((2, 60, 80), bool)
    truth[0, 5:20, 5:20] = truth[1, 30:50, 40:70] = True
    row = dict(condition="fog", image=np.full((60, 80, 3), 90, np.uint8), points=np.full((2, 3, 2), 10.0), truth=truth,
               predictions=dict(A=truth, B=~truth), iou=dict(A=1.0, B=0.0), label="worst gain \N{MINUS SIGN}0.31")
    path = str(tmp_path / "samples.png")
    evaluate.picture([row], ["A", "B"], path, "Figure 4")
    one = np.array(Image.open(path)).astype(int)
    evaluate.picture([row, {**row, "label": ""}], ["A", "B"], path, "a long title " * 30)
    two = np.array(Image.open(path))
    assert one.shape[1] == two.shape[1] == 4 * 250 + 30 and 200 < two.shape[0] - one.shape[0] < 260
    tiles = [one[93:273, 20 + 250 * c:260 + 250 * c] for c in range(4)]  # input, truth, A, B
    assert (tiles[1] == tiles[2]).all() and (tiles[1] != tiles[3]).any() and (tiles[0] != tiles[1]).any()
    assert (np.abs(tiles[1][21:54, 21:54] - (0.35 * 90 + 0.65 * np.array(evaluate.COLOURS[0]))).max()) <= 1.5

SHIPPED = os.path.join(HERE, "assets", "sam_vit_t.pth")

@pytest.mark.skipif(not os.path.exists(SHIPPED), reason="assets/sam_vit_t.pth is not there")
def test_shipped_tiny_sam_segments_fresh_scenes():
    predictor, ious = sam.SamPredictor(sam.build_sam("vit_t", SHIPPED)), []
    for seed in range(12):
        image, masks = data.demo_scene(seed + 10**6)
        predictor.set_image(image)
        for k, mask in enumerate(masks):
            found = predictor.predict(box=data.prompts(mask, k)[1], multimask_output=False)[0]
            ious += evaluate.iou_dice(found, mask[None])[0].tolist()
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
    for name in ("SAM", *(f"GaRA, {count} of 48 components" for count in (48, 24, 1))):
        assert float(rows[name][0]) > 0

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
