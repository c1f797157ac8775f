"""Tests of GaRA-SAM. Run all with `pytest test_gara.py`, a part with `pytest test_gara.py -k gated_linear`.

What each part is held against:
    SAM          numbers that the official code gave for weights and a picture drawn from fixed random streams
    GaRA         equation 7 written out image by image, closed forms and statistics of the gates, parameter counts from
                 the layers' widths; what a save must keep and a load must refuse
    corruptions  closed forms, brute force, and ranges measured on the benchmark's own code
    data         files written here, good ones and every kind of bad one
    training     the loss and the targets in plain loops; a run stopped and resumed against one that was not
    evaluation   a model that knows the answers, counting in plain loops, SamPredictor
No network or GPU is needed. Everything takes two minutes on two cores.
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
import subprocess
import sys
import zlib

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
from corruptions import CORRUPTIONS, corrupt

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

# What official SAM (float32, CPU) gave for recipe_weights and golden_picture. The embedding by channel, row, column;
# for each prompt: predict's arguments, scores, mask areas, then low-resolution and full-size logits by mask, row,
# column, each followed by the largest on a grid (every 4th low-resolution, 16th full-size pixel).
GOLDEN_EMBEDDING = {(0, 0, 0): -0.263858, (48, 20, 36): -0.998275, (80, 24, 60): 1.137581, (112, 48, 12): 0.130391,
                    (144, 8, 56): 0.405927, (176, 32, 32): 1.183451, (208, 60, 4): 0.838656, (240, 40, 44): -0.082158}
GOLDEN = {
    "three_points": (
        dict(point_coords=[[200, 150], [260, 210], [310, 180]], point_labels=[1] * 3, multimask_output=False),
        [-1.548326], [199391],
        {(0, 20, 28): 0.28502, (0, 80, 120): 2.01568, (0, 132, 200): 0.91482, (0, 164, 48): 2.14001}, 4.35457,
        {(0, 144, 192): 0.54365, (0, 320, 528): 7.38418}, 8.56485),
    "point_and_background": (
        dict(point_coords=[[420.5, 99.25], [30, 400]], point_labels=[1, 0], multimask_output=True),
        [0.009264, -0.970354, -1.926848], [36477, 264414, 270261],
        {(0, 20, 28): 8.50593, (2, 80, 120): -0.11537, (1, 132, 200): 5.01042, (0, 164, 48): 7.97274}, 10.94905,
        {(0, 144, 192): -4.04233, (2, 320, 528): 4.75431}, 10.00047),
    "box": (
        dict(box=[50.5, 60, 400, 380.25], multimask_output=False), [-0.786293], [191126],
        {(0, 20, 28): -0.74227, (0, 80, 120): -0.08079, (0, 132, 200): -0.63799, (0, 164, 48): -0.6128}, 2.8991,
        {(0, 144, 192): 1.0603, (0, 320, 528): 4.06355}, 6.97002),
    "box_and_point": (
        dict(box=[10, 20, 630, 420], point_coords=[[333, 222]], point_labels=[0], multimask_output=True),
        [0.700284, -1.378327, -2.017217], [43817, 206939, 256300],
        {(0, 20, 28): 7.40047, (2, 80, 120): -0.84321, (1, 132, 200): 3.39498, (0, 164, 48): 8.67918}, 10.68575,
        {(0, 144, 192): -5.47132, (2, 320, 528): 3.32361}, 9.05951),
    "point_and_mask": (  # the mask: low_res_logits of three_points
        dict(point_coords=[[250, 200]], point_labels=[1], multimask_output=False), [-0.979303], [53012],
        {(0, 20, 28): -5.30225, (0, 80, 120): -5.04849, (0, 132, 200): -4.25935, (0, 164, 48): -3.31051}, 7.00968,
        {(0, 144, 192): -2.54314, (0, 320, 528): 3.27726}, 6.39608)}
# Of the released models: parameters, then number of tensors and CRC-32 of their sorted names and shapes.
OFFICIAL = {"vit_b": (93_735_472, 314, 2819701163), "vit_l": (312_342_832, 482, 2872042895), "vit_h": (641_090_608,)}

def golden_picture(height=427, width=640):
    """Waves, twelve discs and grain: the picture that the golden numbers belong to. uint8 HxWx3."""
    rng = np.random.default_rng(0)
    rows, columns = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    waves = [(np.sin(columns / 37 + c) + np.cos(rows / 23 - c)) * 40 + 128 for c in range(3)]
    picture = np.stack(waves, axis=-1)
    for _ in range(12):
        cy, cx, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(10, min(height, width) / 4)
        picture[(rows - cy) ** 2 + (columns - cx) ** 2 < radius ** 2] = rng.uniform(0, 255, 3)
    picture += 8 * rng.standard_normal(picture.shape)  # in float32: rounding decides some levels
    return picture.clip(0, 255).astype(np.uint8)

@pytest.mark.parametrize("backbone", OFFICIAL)
def test_layout_of_the_official_checkpoints(backbone):
    with torch.device("meta"):
        model = sam.build_sam(backbone)
    lines = sorted(f"{key} {list(value.shape)}" for key, value in model.state_dict().items())
    found = sum(p.numel() for p in model.parameters()), len(lines), zlib.crc32("\n".join(lines).encode())
    assert found[:len(OFFICIAL[backbone])] == OFFICIAL[backbone]

@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """A predictor: vit_b read from a checkpoint file with the recipe's weights, the golden picture encoded."""
    path = tmp_path_factory.mktemp("golden") / "vit_b.pth"
    with torch.device("meta"):
        layout = sam.build_sam("vit_b")
    torch.save(recipe_weights(layout), path)
    predictor = sam.SamPredictor(sam.build_sam("vit_b", checkpoint=path))
    path.unlink()
    predictor.set_image(golden_picture())
    return predictor

def test_golden_embedding(golden):
    embedding = golden.get_image_embedding()[0]
    assert embedding.shape == (256, 64, 64)
    for index, value in GOLDEN_EMBEDDING.items():
        assert embedding[index].item() == pytest.approx(value, abs=5e-4), index
    assert embedding.mean().item() == pytest.approx(0.00336922, abs=1e-5)
    assert embedding.std().item() == pytest.approx(1.0161552, abs=1e-5)
    assert embedding.abs().max().item() == pytest.approx(5.0037112, rel=1e-4)

@pytest.mark.parametrize("name", GOLDEN)
def test_golden_masks(golden, name):
    arguments, scores, areas, low, low_largest, full, full_largest = GOLDEN[name]
    if name == "point_and_mask":
        arguments = arguments | dict(mask_input=golden.predict(**GOLDEN["three_points"][0])[2])
    logits, got_scores, low_res = golden.predict(**arguments, return_logits=True)
    assert got_scores == pytest.approx(np.array(scores), abs=1e-4 * max(map(abs, scores)))
    for got, step, values, largest in ((low_res, 4, low, low_largest), (logits, 16, full, full_largest)):
        for index, value in values.items():
            assert got[index] == pytest.approx(value, abs=1e-4 * largest), index
        assert np.abs(got[:, ::step, ::step]).max() == pytest.approx(largest, rel=1e-4)
    assert (logits > 0).sum((1, 2)) == pytest.approx(np.array(areas), rel=1e-4)

# ---- SAM in its parts -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("limit, blocks", [(49 * 10, 5), (49 * 7, 7), (1, 49)])
def test_global_attention_in_blocks_equals_one_block(monkeypatch, limit, blocks, device):
    """In values and gradients. That one block is right is what the golden numbers say."""
    calls, attend, outputs = [], sam.attend, []
    monkeypatch.setattr(sam, "attend", lambda *tensors: calls.append(1) or attend(*tensors))
    torch.manual_seed(0)
    layer = sam.Attention(12, 3, 0, 7).double().to(device)
    for table in (layer.rel_pos_h, layer.rel_pos_w):
        torch.nn.init.normal_(table)
    x = torch.randn(2, 7, 7, 12, dtype=torch.float64, device=device, requires_grad=True)
    for scores in (10**9, limit):
        monkeypatch.setitem(sam.SCORES_PER_BLOCK, device, scores)
        y = layer(x)
        outputs.append((y, *torch.autograd.grad(y.sin().sum(), (x, *layer.parameters()))))
    assert len(calls) == 1 + 2 * blocks  # scores are made again on the way back
    assert all(close(got, want, 1e-10) for got, want in zip(*reversed(outputs)))
    with torch.no_grad():
        assert close(layer(x), y, 1e-12)

@pytest.fixture
def predictor():
    predictor = sam.SamPredictor(tiny())
    predictor.set_image(scene(96, 128))
    return predictor

def test_filled_up_prompts(predictor):
    """Label -1 fills prompts up to one length: where and at which place such points lie makes no difference. Their
    number does, in the official model as well: each is a token that the others attend to."""
    def low_res(coords, labels):
        return predictor.predict_torch(torch.tensor([coords]).float(), torch.tensor([labels]))[2]

    filled = low_res([[30, 40], [0, 0], [0, 0]], [1, -1, -1])
    assert torch.equal(filled, low_res([[30, 40], [77, 3], [500, -9]], [1, -1, -1]))
    assert close(filled, low_res([[9, 9], [30, 40], [5, 5]], [-1, 1, -1]), 1e-5)
    assert not close(filled, low_res([[30, 40]], [1]), 1e-4)

def test_batched_forward_equals_predictor():
    predictor, shapes, resize = sam.SamPredictor(tiny()), [(96, 128), (200, 50)], sam.ResizeLongestSide(128)
    prompts = [dict(point_coords=torch.tensor([[[20., 30]], [[60, 70]]]), point_labels=torch.ones(2, 1)),
               dict(boxes=torch.tensor([[3., 5, 28, 100]]), mask_inputs=torch.randn(1, 1, 64, 64))]
    images = [scene(*shape, seed) for seed, shape in enumerate(shapes)]
    with torch.no_grad():
        outputs = predictor.model([
            dict(image=torch.tensor(resize.apply_image(image)).permute(2, 0, 1), original_size=shape, **prompt)
            for image, shape, prompt in zip(images, shapes, prompts)], multimask_output=True)
    for image, shape, prompt, output in zip(images, shapes, prompts, outputs):
        predictor.set_image(image)
        arguments = (prompt.get(key) for key in ("point_coords", "point_labels", "boxes", "mask_inputs"))
        masks, scores, low_res = predictor.predict_torch(*arguments)
        assert output["masks"].shape == masks.shape == (len(scores), 3, *shape) and output["masks"].dtype == torch.bool
        assert close(output["low_res_logits"], low_res) and close(output["iou_predictions"], scores)
        assert (output["masks"] == masks).float().mean() > 0.999 and 0 < masks.float().mean() < 1

@pytest.mark.parametrize("height, width", [(128, 128), (97, 131), (300, 5), (5, 300), (1, 3000), (1, 1)])
@pytest.mark.parametrize("count", [3, 1])
def test_predictor_takes_any_size(height, width, count):
    predictor = sam.SamPredictor(tiny())
    predictor.set_image(np.full((height, width, 3), 77, np.uint8))
    arguments = dict(point_coords=[[width - 1, 0]], point_labels=[1], multimask_output=count == 3)
    masks, scores, low_res = predictor.predict(**arguments)
    assert masks.dtype == bool and masks.shape == (count, height, width) and low_res.shape == (count, 64, 64)
    assert scores.dtype == low_res.dtype == np.float32 and scores.shape == (count,) and np.isfinite(low_res).all()
    again, _, refined = predictor.predict(**arguments, mask_input=low_res[:1], return_logits=True)  # goes in again
    assert again.dtype == np.float32 and again.shape == masks.shape and not close(refined, low_res, 1e-3)  # and matters

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
    (dict(point_coords=[[3, 4]]), "point_labels"), (dict(point_labels=[1]), "point_coords"),
    (POINT | dict(point_coords=[[np.nan, 4]]), "NaN"), (POINT | dict(point_labels=[2]), "2"),
    (POINT | dict(point_labels=[0.5]), "0.5"), (POINT | dict(point_labels=[-0.5]), "-0.5"),
    (dict(point_coords=[3, 4], point_labels=[1]), "shape"), (POINT | dict(point_labels=[1, 0]), "shape"),
    (dict(box=[1, 2, 3]), "box"), (dict(box=[1, 2, np.inf, 3]), "box"),
    (POINT | dict(mask_input=np.zeros((1, 63, 64))), "(1, 64, 64)"),
    (POINT | dict(mask_input=np.full((1, 64, 64), np.nan)), "mask_input")])
def test_prompts_that_make_no_sense(predictor, arguments, words):
    with refused(words):
        predictor.predict(**arguments)
    assert predictor.predict(**POINT)[0].shape == (3, 96, 128)  # the next prompt is answered

def test_pictures_that_the_predictor_refuses(predictor):
    for image in (scene() / 255, scene()[..., 0], np.zeros((9, 9, 4), np.uint8), np.zeros((0, 9, 3), np.uint8)):
        with refused(str(image.dtype), str(image.shape)):
            predictor.set_image(image)
    with refused("RGBA"):
        predictor.set_image(scene(), "RGBA")
    with refused("128"):
        predictor.set_torch_image(torch.zeros(1, 3, 100, 90), (100, 90))

@pytest.mark.parametrize("size, scaled, xy, expected", [
    ((50, 100), (64, 128), (99, 49), (126.72, 62.72)), ((256, 64), (128, 32), (10, 200), (5, 100)),
    ((427, 640), (85, 128), (320, 427), (64, 85)), ((5, 300), (2, 128), (150, 5), (64, 2)),
    ((1, 3000), (1, 128), (3000, 1), (128, 1))])
def test_scaling_of_coordinates(size, scaled, xy, expected):
    resize = sam.ResizeLongestSide(128)
    assert resize.get_preprocess_shape(*size) == scaled
    assert resize.apply_image(np.zeros((*size, 3), np.uint8)).shape == (*scaled, 3)
    for point in (np.array([[xy]], np.float64), torch.tensor([[xy]]).double()):  # out: float32, which all devices have
        out = resize.apply_coords(point, size)
        assert str(out.dtype).endswith("float32") and np.allclose(out[0, 0], expected, rtol=1e-6)
    assert np.allclose(resize.apply_boxes(np.array([[*xy, *xy]]), size), [[*expected, *expected]], rtol=1e-6)

def test_gradients_flow_except_in_the_predictor(predictor):
    model = predictor.model
    points, mask = (torch.tensor([[[9., 9]]]), torch.tensor([[1]])), torch.randn(1, 1, 64, 64)
    low_res, scores = model.decode(model.image_encoder(pictures(0)), points, masks=mask, multimask_output=True)
    (low_res.square().sum() + scores.sum()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # what one object point, a mask and three outputs leave out: other labels, "no mask", the mask for clear prompts
    unused = r"point_embeddings\.[023]|no_mask_embed|hypernetworks_mlps\.0"
    assert [name for name in silent if not re.search(unused, name)] == [] and len(silent) < 12
    assert not predictor.features.requires_grad
    assert not predictor.predict_torch(None, None, torch.tensor([[1., 1, 9, 9]]))[2].requires_grad

# ---- SAM: files and command line ------------------------------------------------------------------------------------

POS_EMBED, BIAS = "image_encoder.pos_embed", "mask_decoder.iou_prediction_head.layers.2.bias"

@pytest.mark.parametrize("content, words", [
    (b"", ["not a readable"]), (b"<html>404 not found</html>\n" * 9, ["not a readable"]), (b"cut", ["not a readable"]),
    (torch.nn.Linear(1, 1), ["not a readable"]), ([1, 2], ["not a SAM checkpoint"]),
    ({"a": torch.ones(2)}, ["not a SAM checkpoint"]), ({"model": {POS_EMBED: torch.ones(2)}}, ["not a SAM checkpoint"]),
    ({POS_EMBED: torch.ones(2)}, ["not a SAM checkpoint"]), ({POS_EMBED: 3}, ["not a SAM checkpoint"]),
    (lambda w: w.pop(BIAS), ["lacks", BIAS]), (lambda w: w.update({BIAS: 5}), [BIAS]),
    (lambda w: w.update({BIAS: torch.ones(4).int()}), [BIAS]),
    (lambda w: w.update({"image_encoder.blocks": torch.ones(1)}), [""]),
    (lambda w: w.update({"sam_hq.weight": torch.ones(1)}), ["unknown", "sam_hq.weight"]),
    (lambda w: w.update({BIAS: torch.ones(5)}), [BIAS, "(5,)", "(4,)"]),
    (lambda w: w[BIAS].fill_(math.nan), [BIAS, "NaN"]),
    (lambda w: w[POS_EMBED].view(-1)[7:8].fill_(math.inf), [POS_EMBED, "infinite"])])
def test_checkpoints_that_are_refused(tmp_path, content, words):
    path, weights = tmp_path / "w.pth", {key: value.clone() for key, value in tiny_weights().items()}
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

@pytest.fixture
def tiny_files(tmp_path, monkeypatch):
    """A picture and a vit_t checkpoint in the working folder: the arguments that name them."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(scene(60, 90)).save("photo.png")
    torch.save(tiny_weights(), "w.pth")
    return ["photo.png", "--backbone", "vit_t", "--checkpoint", "w.pth", "--out", "o.png", "--mask", "m.png"]

@pytest.mark.parametrize("method", [None, "gara"])
@pytest.mark.parametrize("arguments, prompt", [
    (["--point", "40,30"], dict(point_coords=[[40, 30]], point_labels=[1])),
    (["--point", "40,30", "--point", "5,9,0", "--box", "3,3,80,50"],
     dict(point_coords=[[40, 30], [5, 9]], point_labels=[1, 0], box=[3, 3, 80, 50], multimask_output=False))])
def test_sam_command_line_equals_predictor(tmp_path, tiny_files, capsys, arguments, prompt, method):
    model, plain = tiny(method), sam.SamPredictor(tiny())
    if method:
        gara.save_adapter(model, "a.pt")
        arguments = [*arguments, "--adapter", "a.pt"]
    assert run_cli(sam.main, *tiny_files, *arguments) == 0
    predictor = sam.SamPredictor(model)
    predictor.set_image(scene(60, 90))
    plain.set_image(scene(60, 90))
    masks, scores, low_res = predictor.predict(**prompt)
    best = masks[scores.argmax()]
    assert np.array_equal(np.asarray(Image.open("m.png")), best * np.uint8(255)) and 0 < best.sum() < best.size
    assert Image.open("o.png").size == (90, 60) and f"{best.sum():,} pixels" in capsys.readouterr().out
    assert (method is None) == close(plain.predict(**prompt)[2], low_res, 1e-3)  # the adapter acts
    assert {path.name for path in everything(tmp_path)} - {"a.pt"} == {"m.png", "o.png", "photo.png", "w.pth"}

@pytest.mark.parametrize("arguments", [
    [], ["--point", "1"], ["--point", "90,10"], ["--point", "nan,3"], ["--box", "50,5,40,9"], ["--box", "1,2,3"],
    ["--point", "1,1,7"], ["--point", "1,1,0.5"], ["--what"], ["--backbone", "vit_b"], ["--checkpoint", "none.pth"],
    ["--adapter", "none.pt"], ["--adapter", "w.pth"], ["--out", "no/o.png"], ["--mask", "no/m.png"],
    ["--device", "nonsense"], ["--device", "cuda:99"], "w.pth", "none.png"])  # these two: as the picture
def test_sam_command_line_mistakes_end_in_one_line(tmp_path, tiny_files, capsys, arguments):
    before = everything(tmp_path)
    picture, arguments = (arguments, []) if isinstance(arguments, str) else (tiny_files[0], arguments)
    point = [] if arguments[:1] in ([], ["--point"], ["--box"]) and picture == tiny_files[0] else ["--point", "1,1"]
    assert run_cli(sam.main, picture, *tiny_files[1:], *point, *arguments) == 2
    assert one_error(capsys) and everything(tmp_path) == before

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
    linear, x = torch.nn.Linear(768, 2304), torch.randn(1, 64, 64, 768)
    for gate in (gara.GaraGate(768, 16, 256, 0.5), gara.OpenGate(768, 16)):
        with torch.no_grad():
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

def test_gara_command_line(capsys):
    assert run_cli(gara.main, "--backbone", "vit_t") == 0
    text = capsys.readouterr().out
    for method in gara.METHODS:
        row, number = re.search(rf"^{method} .*$", text, re.M)[0], expected_count(method, 160, 6)
        assert f"{number:,} parameters" in row and f"{4 * number / 1e6:.1f} MB" in row
    rows = {row[0]: row for row in map(str.split, re.findall("^(?:plain|factored|merged) .*$", text, re.M))}
    assert len(rows) == 3 and all(float(value) > 0 for row in rows.values() for value in row[1:3])
    assert float(rows["merged"][3]) < 1e-4 and gara.FORM == "cheaper"
    for mistake in (["--batch", "0"], ["--device", "nonsense"], ["--device", "cuda:99"]):
        assert run_cli(gara.main, "--backbone", "vit_t", *mistake) == 2 and one_error(capsys, mistake[0])

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
    assert all("trength" in function.__doc__ for function in CORRUPTIONS.values())

@pytest.mark.parametrize("name", RANGES)
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

@pytest.mark.parametrize("name", RANGES)
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
    for image, name, strength in itertools.product(images, RANGES, (0.3, 1, 2)):
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
        assert (data.prompts(sample.masks()[k], data.seed_of("b", index))[0] == points[k]).all()
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
    assert "lone_image.jpg: no masks/lone_image.npy" in dataset.skipped[0]
    assert "lone_mask.npy: no image" in dataset.skipped[1]
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
    with refused("robustseg", kind=data.DatasetError):
        data.load_dataset(root, "test", kind="coco")
    with refused("impulse_noise", kind=data.DatasetError):
        data.load_dataset(root, "test")[0].image("haze")

def test_data_command_line(tmp_path):
    root, sheet = robustseg(tmp_path / "d", {"a": (picture(), square(count=2))}), tmp_path / "sheet.png"
    shown = run_file(data, root, "--sheet", sheet)
    assert shown.returncode == 0 and "1 images with masks, 0 files skipped" in shown.stdout
    assert Image.open(sheet).width > 100
    for mistake in ((tmp_path / "nowhere",), (root, "--split", "x"), (root, "--make-demo"), (root, "--frobnicate"), (),
                    (root, "--sheet", tmp_path / "no" / "where.png"), (root, "--sheet", tmp_path / "d")):
        done = run_file(data, *mistake)
        errors = [line for line in done.stderr.splitlines() if "reading" not in line]  # less the progress line
        assert done.returncode == 2 and len(errors) == 1 and errors[0].startswith("error: "), (mistake, done)

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

def examples_of(dataset, count=10**6, corrupt=True, **options):
    return train.Examples(dataset, "vit_t", count, **dict(seed=0, masks_per_image=4, augment=False) | options,
                          corrupt=corrupt)

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
    args = argparse.Namespace(steps=40, lr=2.0)  # two steps of warm-up, then 38 of half a cosine
    expected = {0: 1, 1: 2, 2: 2, 21: 1, 39: 1 + math.cos(math.pi * 37 / 38)}
    for step, value in expected.items():
        assert train.learning_rate(step, args) == pytest.approx(value), step

def test_examples_depend_on_their_number_alone(demo):
    dataset = data.load_dataset(demo / "demo", "train")
    examples = examples_of(dataset, 9)
    forwards = [examples[i] for i in range(9)]
    assert all(same(examples_of(dataset)[i], forwards[i]) for i in reversed(range(9)))
    for first, workers in ((0, 2), (1, 0), (2, 1)):
        batched = [x for batch in train.batches(examples, first, 3, workers) for x in batch]
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
    name = source = "blank"

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
    assert {examples_of([sample], corrupt=False)[i]["condition"] for i in range(20)} == {"clear"}

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
    assert sorted(os.listdir(folder)) == ["curve.png", "gara.pt", "last.pt", "log.jsonl"]
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

def test_training_stops_when_the_loss_is_not_finite(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "mask_loss", lambda logits, targets: logits.sum((-2, -1)) * math.nan)
    assert run_train(demo, tmp_path, "--steps", 2) == 2
    assert one_error(capsys, "step 0", "nan") and (tmp_path / "last.pt").exists()

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
    images, _ = evaluate.evaluate(models, dataset, conditions, batch_size=2)
    assert [image["name"] for image in images] == [sample.name for sample in dataset]
    for image, sample in zip(images, dataset):
        masks = sample.masks()
        share, ones = [(m & columns[:m.shape[1]]).sum() / m.sum() for m in masks], np.ones((len(masks), 2))
        expected = dict(right=ones, empty=0 * ones, half=[[s, 2 * s / (1 + s)] for s in share])
        for name, condition, prompt in itertools.product(models, conditions, evaluate.PROMPTS):
            assert np.allclose(image["scores"][name][condition][prompt], expected[name], atol=1e-6)

def test_tables_are_means_over_masks():
    """Three masks on one picture and one on another: the first picture weighs three times as much."""
    first = {c: {"point": [[0.1 * k, 0.5]] * 3, "box": [[0.0, 1.0]] * 3} for k, c in enumerate(data.CONDITIONS)}
    second = {c: {"point": [[1.0, 0.7]], "box": [[1.0, 0.2]]} for c in data.CONDITIONS}
    images = [dict(scores=dict(A=first)), dict(scores=dict(A=second))]
    means = evaluate.tables(images, ["A"], data.CONDITIONS)["A"]
    assert means["point clear"] == pytest.approx([0.25, 0.55]) and means["box fog"] == pytest.approx([0.25, 0.8])
    assert means["point snow"] == pytest.approx([0.325, 0.55])  # condition 1 of 15
    assert means["point degraded"] == pytest.approx([0.25 + 0.075 * 8, 0.55])  # mean of 1 to 15
    assert evaluate.tables(images, ["A"], ("clear",))["A"].keys() == {"point clear", "box clear"}

SOME = ("clear", "ISO_noise", "elastic_transform")

def flat_scores(images):
    return np.array([pair for image in sorted(images, key=lambda image: image["name"]) for conditions in
                     image["scores"].values() for prompts in conditions.values() for pairs in prompts.values()
                     for pair in pairs])

def test_scores_do_not_depend_on_how_they_are_computed(demo):
    dataset, models = data.load_dataset(demo / "demo", "test"), {"SAM": tiny()}
    scores = flat_scores(evaluate.evaluate(models, dataset, SOME)[0])
    assert 0 < scores.mean() < 1
    reverse = data.Dataset(dataset.root, "test", dataset.kind, dataset.samples[::-1])
    assert np.array_equal(flat_scores(evaluate.evaluate(models, reverse, SOME, workers=1)[0]), scores)
    alone = data.Dataset(dataset.root, "test", dataset.kind, dataset.samples[1:2])
    images = evaluate.evaluate(models, alone, SOME)[0] + evaluate.evaluate(models, dataset, SOME)[0][::2]
    assert np.array_equal(flat_scores(images), scores)
    for batch_size in (1, 2):  # float sums may turn over a pixel on the outline
        assert np.allclose(flat_scores(evaluate.evaluate(models, dataset, SOME, batch_size)[0]), scores, atol=5e-3)

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
    assert sorted(os.listdir(tmp_path)) == ["results.json", "samples.png"] and list(results["means"]) == ["SAM", "GaRA"]
    assert tuple(results["conditions"]) == data.CONDITIONS and results["skipped"] == []
    for image, sample in zip(results["images"], data.load_dataset(demo / "demo", "test"), strict=True):
        assert image["name"] == sample.name and tuple(image["indices"]) == sample.indices
    count = sum(len(image["indices"]) for image in results["images"])
    for model, means in results["means"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {model} |"))
        printed = iter(map(float, row.split("|")[2:-1]))
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
    with Image.open(tmp_path / "samples.png") as picture:  # input, truth and two models; a row for each picture
        assert picture.format == "PNG" and picture.width > 4 * 200 and picture.height > 3 * 200

def test_plain_sam_is_measured_alone(demo, tmp_path, capsys):
    assert run_evaluate(demo, tmp_path, "--ckpt", "sam", "--no-corrupt", "--limit", 2) == 0
    results = json.load(open(tmp_path / "results.json"))
    assert list(results["means"]) == ["SAM"] and results["means"]["SAM"].keys() == {"point clear", "box clear"}
    assert len(results["images"]) == 2 and "degraded" not in capsys.readouterr().out

def test_adapters_share_the_frozen_weights(demo, tmp_path):
    trained = {"GaRA": tiny("gara"), "LoRA": tiny("lora")}
    for model in trained.values():
        gara.save_adapter(model, tmp_path / f"{model.adapter['method']}.pt")
    models, backbone = evaluate.load_models([str(tmp_path / "gara.pt"), "sam", str(tmp_path / "lora.pt")], None,
                                            str(demo / "w.pth"), torch.device("cpu"))
    assert list(models) == ["SAM", "GaRA", "LoRA"] and backbone == "vit_t"
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
    (["--ckpt", "w.pth"], "SAM checkpoint"), (["--ckpt", "a.pt"], "other vit_t weights"),
    (["--ckpt", "none.pt"], "none.pt"), (["--ckpt", "cut.pth"], "cut.pth"),
    (["--ckpt", "a.pt", "--backbone", "vit_b"], "vit_b"), (["--checkpoint", "cut.pth"], "cut.pth"),
    (["--checkpoint", "none.pth"], "none.pth"), (["--limit", 0], "--limit"),
    (["--device", "nonsense"], "nonsense"), (["--device", "cuda:99"], ""), (["--batch-size", 0], "--batch-size"),
    (["--workers", -1], ""), (["--what"], "--what"), (["--out", "w.pth"], "w.pth")])
def test_mistakes_of_evaluate_end_in_one_line(mistakes, capsys, arguments, words):
    before = everything(mistakes)
    assert run_evaluate(mistakes, "out", *arguments) == 2
    assert one_error(capsys, words) and everything(mistakes) == before

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
