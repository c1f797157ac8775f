"""Tests of GaRA-SAM. Run all with `pytest test_gara.py`, a part with `pytest test_gara.py -k gated_linear`.

What each part is held against:
    SAM          numbers that the official code gave for weights and a picture drawn from fixed random streams;
                 attention in plain loops; prompt tokens, coordinates and resizing in closed form
    GaRA         equation 7 written out image by image, finite differences, closed forms and statistics of the gates,
                 parameter counts from the layers' widths; what a save must keep and a load must refuse
    corruptions  closed forms, brute force, and ranges measured on the benchmark's own code
    data         files written here, good ones and every kind of bad one
No file, network or GPU is needed. Everything takes about a minute on two cores, a third of it the vit_b golden numbers.
"""
import functools
import io
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
import torch.nn.functional as F
from PIL import Image

import corruptions
import data
import gara
import sam
from corruptions import CORRUPTIONS, corrupt

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


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
    def scale(key, shape):
        if key.endswith("gaussian_matrix"):
            return 1
        if "norm" in key or re.search(r"(neck\.[13]|mask_downscaling\.[14]|output_upscaling\.1)\.weight$", key):
            return 0.1
        if key.endswith("bias"):
            return 0.05
        if "rel_pos" in key:
            return 0.2
        if "pos_embed" in key:
            return 0.5
        return 1 if len(shape) == 2 and shape[0] <= 4 and not re.search("mlps|head", key) else None  # 1: learned tokens

    weights = {}
    for key, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        draw = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, dtype=np.float32)
        factor = scale(key, shape)
        if factor is None:  # matrices and kernels: by the number of inputs
            inputs = shape[0] if "output_upscaling" in key else math.prod(shape[1:])  # first: transposed convolutions
            draw = (1.4 * draw).astype(np.float64) / math.sqrt(inputs)
        else:
            draw = factor * draw + (1 if factor == 0.1 and key.endswith("weight") else 0)  # norms lie around 1
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
    """Largest difference, as a share of the largest value."""
    a, b = (torch.as_tensor(t).detach().cpu().double() for t in (a, b))
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())


def one_line(error, *words):
    """The message of a caught exception is one line that holds these words."""
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text
    return True


def run_cli(main, *arguments):
    """Exit code of a command line, run in this process."""
    try:
        return main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code


# ---------------------------------------------------------------------------------------------------------------------
# SAM against the official code's numbers.
# ---------------------------------------------------------------------------------------------------------------------

# What official SAM (float32, CPU) gave for recipe_weights and golden_picture. Values of the embedding by channel, row,
# column; its mean, standard deviation and largest size.
GOLDEN_EMBEDDING = {(0, 0, 0): -0.263858, (48, 20, 36): -0.998275, (80, 24, 60): 1.137581, (112, 48, 12): 0.130391,
                    (144, 8, 56): 0.405927, (176, 32, 32): 1.183451, (208, 60, 4): 0.838656, (240, 40, 44): -0.082158}
GOLDEN_STATISTICS = (0.00336922, 1.0161552, 5.0037112)
# For each prompt: predict's arguments, scores, mask areas, then values by mask, row, column of the low-resolution and
# of the full-size logits, each followed by the largest on a grid (every 4th low-resolution, 16th full-size pixel).
GOLDEN = {
    "three_points": (
        dict(point_coords=[[200, 150], [260, 210], [310, 180]], point_labels=[1, 1, 1], multimask_output=False),
        [-1.548326], [199391],
        {(0, 20, 28): 0.28502, (0, 80, 120): 2.01568, (0, 132, 200): 0.91482, (0, 164, 48): 2.14001}, 4.35457,
        {(0, 144, 192): 0.54365, (0, 320, 528): 7.38418}, 8.56485),
    "point_and_background": (
        dict(point_coords=[[420.5, 99.25], [30, 400]], point_labels=[1, 0], multimask_output=True),
        [0.009264, -0.970354, -1.926848], [36477, 264414, 270261],
        {(0, 20, 28): 8.50593, (2, 80, 120): -0.11537, (1, 132, 200): 5.01042, (0, 164, 48): 7.97274}, 10.94905,
        {(0, 144, 192): -4.04233, (2, 320, 528): 4.75431}, 10.00047),
    "box": (
        dict(box=[50.5, 60, 400, 380.25], multimask_output=False),
        [-0.786293], [191126],
        {(0, 20, 28): -0.74227, (0, 80, 120): -0.08079, (0, 132, 200): -0.63799, (0, 164, 48): -0.6128}, 2.8991,
        {(0, 144, 192): 1.0603, (0, 320, 528): 4.06355}, 6.97002),
    "box_and_point": (
        dict(box=[10, 20, 630, 420], point_coords=[[333, 222]], point_labels=[0], multimask_output=True),
        [0.700284, -1.378327, -2.017217], [43817, 206939, 256300],
        {(0, 20, 28): 7.40047, (2, 80, 120): -0.84321, (1, 132, 200): 3.39498, (0, 164, 48): 8.67918}, 10.68575,
        {(0, 144, 192): -5.47132, (2, 320, 528): 3.32361}, 9.05951),
    "point_and_mask": (  # the mask: low_res_logits of three_points
        dict(point_coords=[[250, 200]], point_labels=[1], multimask_output=False),
        [-0.979303], [53012],
        {(0, 20, 28): -5.30225, (0, 80, 120): -5.04849, (0, 132, 200): -4.25935, (0, 164, 48): -3.31051}, 7.00968,
        {(0, 144, 192): -2.54314, (0, 320, 528): 3.27726}, 6.39608),
}
# Number of tensors, and CRC-32 of their sorted names and shapes.
OFFICIAL_LAYOUT = {"vit_b": (314, 2819701163), "vit_l": (482, 2872042895)}
OFFICIAL_SIZE = {"vit_b": 93_735_472, "vit_l": 312_342_832, "vit_h": 641_090_608}  # parameters of the released models


def golden_picture(height=427, width=640):
    """Waves, twelve discs and grain: the picture that the golden numbers belong to. uint8 HxWx3."""
    rng = np.random.default_rng(0)
    rows, columns = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    waves = [(np.sin(columns / 37 + c) + np.cos(rows / 23 - c)) * 40 + 128 for c in range(3)]
    picture = np.stack(waves, axis=-1)
    for _ in range(12):
        cy, cx, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(10, min(height, width) / 4)
        picture[(rows - cy) ** 2 + (columns - cx) ** 2 < radius ** 2] = rng.uniform(0, 255, 3)
    picture += 8 * rng.standard_normal(picture.shape)
    return picture.clip(0, 255).astype(np.uint8)

@pytest.mark.parametrize("backbone", OFFICIAL_SIZE)
def test_layout_of_the_official_checkpoints(backbone):
    with torch.device("meta"):
        model = sam.build_sam(backbone)
    assert sum(p.numel() for p in model.parameters()) == OFFICIAL_SIZE[backbone]
    if backbone in OFFICIAL_LAYOUT:
        lines = sorted(f"{key} {list(value.shape)}" for key, value in model.state_dict().items())
        assert (len(lines), zlib.crc32("\n".join(lines).encode())) == OFFICIAL_LAYOUT[backbone]


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
    mean, std, largest = GOLDEN_STATISTICS
    assert embedding.shape == (256, 64, 64)
    for index, value in GOLDEN_EMBEDDING.items():
        assert embedding[index].item() == pytest.approx(value, abs=1e-4 * largest), index
    assert embedding.mean().item() == pytest.approx(mean, abs=1e-5)
    assert embedding.std().item() == pytest.approx(std, abs=1e-5)
    assert embedding.abs().max().item() == pytest.approx(largest, rel=1e-4)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_masks(golden, name):
    arguments, scores, areas, low, low_largest, full, full_largest = GOLDEN[name]
    if name == "point_and_mask":
        arguments = arguments | dict(mask_input=golden.predict(**GOLDEN["three_points"][0])[2])
    logits, got_scores, low_res = golden.predict(**arguments, return_logits=True)
    assert got_scores == pytest.approx(np.array(scores), abs=1e-4 * max(map(abs, scores)))
    for got, values, largest in ((low_res, low, low_largest), (logits, full, full_largest)):
        for index, value in values.items():
            assert got[index] == pytest.approx(value, abs=1e-4 * largest), index
    assert np.abs(low_res[:, ::4, ::4]).max() == pytest.approx(low_largest, rel=1e-4)
    assert np.abs(logits[:, ::16, ::16]).max() == pytest.approx(full_largest, rel=1e-4)
    assert (logits > 0).sum((1, 2)) == pytest.approx(np.array(areas), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# SAM in its parts.
# ---------------------------------------------------------------------------------------------------------------------


def plain_attention(layer, x):
    """The official attention, step by step: zeros around the tokens, windows, qkv of each, all scores, all offsets."""
    (N, H, W, d), S = x.shape, layer.window or x.shape[1]
    c, y, z = d // layer.heads, torch.arange(S * S) // S, torch.arange(S * S) % S
    padded = F.pad(x, (0, 0, 0, -W % S, 0, -H % S))
    out = torch.zeros_like(padded)
    for n in range(N):
        for top in range(0, H, S):
            for left in range(0, W, S):
                qkv = layer.qkv(padded[n, top:top + S, left:left + S].reshape(S * S, d))
                heads = []
                for h in range(layer.heads):
                    q, k, v = (qkv[:, i * d + h * c:i * d + (h + 1) * c] for i in range(3))
                    scores = q @ k.T / math.sqrt(c)
                    scores = scores + (q[:, None] * layer.rel_pos_h[y[:, None] - y + S - 1]).sum(-1)
                    scores = scores + (q[:, None] * layer.rel_pos_w[z[:, None] - z + S - 1]).sum(-1)
                    heads.append(scores.softmax(-1) @ v)
                out[n, top:top + S, left:left + S] = layer.proj(torch.cat(heads, 1)).view(S, S, d)
    return out[:, :H, :W]


@pytest.mark.parametrize("window, height, width, limit, blocks", [
    (0, 7, 7, 10**9, 1), (0, 7, 7, 49 * 10, 5), (0, 7, 7, 49 * 7, 7), (0, 7, 7, 1, 49),  # global: one block, or several
    (3, 7, 7, 1, 1), (4, 5, 8, 1, 1), (7, 7, 7, 1, 1), (9, 7, 5, 1, 1)])  # windows that don't divide, fit, exceed
def test_attention_against_plain_loops(monkeypatch, window, height, width, limit, blocks):
    calls, attend = [], sam.attend
    monkeypatch.setitem(sam.SCORES_PER_BLOCK, "cpu", limit)
    monkeypatch.setattr(sam, "attend", lambda *tensors: calls.append(1) or attend(*tensors))
    torch.manual_seed(0)
    layer = sam.Attention(12, 3, window, height).double()
    for table in (layer.rel_pos_h, layer.rel_pos_w):
        torch.nn.init.normal_(table)
    x = torch.randn(2, height, width, 12, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), plain_attention(layer, x)
    assert close(y, expected, 1e-12) and len(calls) == blocks
    dy, inputs = torch.randn_like(y), (x, *layer.parameters())
    for got, want in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)):
        assert close(got, want, 1e-10)
    assert len(calls) == (2 * blocks if blocks > 1 else 1)  # several blocks: scores are made again on the way back
    with torch.no_grad():
        assert close(layer(x), expected, 1e-12)


def fourier(x, y, G):
    """The prompt encoder's features of a pixel of the 128 x 128 input."""
    angle = 2 * math.pi * ((2 * (x + 0.5) / 128 - 1) * G[0] + (2 * (y + 0.5) / 128 - 1) * G[1])
    return torch.cat([angle.sin(), angle.cos()])


@pytest.mark.parametrize("points, labels, box", [
    ([[3, 5]], [1], None), ([[3, 5], [60.5, 127]], [0, 1], None), ([[3, 5], [9, 9]], [1, -1], None),
    (None, None, [1, 2, 80, 90.25]),
    ([[3, 5], [7, 7]], [1, 0], [1, 2, 80, 90.25]), ([[9, 9]], [-1], [1, 2, 80, 90.25]), (None, None, None)])
def test_prompt_tokens_in_closed_form(points, labels, box):
    """Label -1 gives a token that has no position; points without a box get one such token more."""
    encoder, w = tiny().prompt_encoder, tiny_weights()
    G = w["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
    nothing = w["prompt_encoder.not_a_point_embed.weight"][0]
    background, foreground, corner, opposite = (w[f"prompt_encoder.point_embeddings.{i}.weight"][0] for i in range(4))
    expected = [nothing if label < 0 else fourier(*xy, G) + (foreground if label else background)
                for xy, label in zip(points or [], labels or [])]
    expected += [fourier(*box[:2], G) + corner, fourier(*box[2:], G) + opposite] if box else [nothing] if points else []
    prompt = points and (torch.tensor([points]), torch.tensor([labels]))
    sparse, dense = encoder(prompt, box and torch.tensor([box]), None)
    if expected:
        assert close(sparse[0], torch.stack(expected), 1e-4)
    assert sparse.shape == (1, len(expected), 128)
    assert close(dense[0], w["prompt_encoder.no_mask_embed.weight"][0][:, None, None].expand(128, 16, 16), 0)
    pe = encoder.get_dense_pe()
    centre = 10 * 8 + 3.5, 3 * 8 + 3.5  # x, y of the token in row 3, column 10: the centre of its patch
    assert close(pe[0, :, 3, 10], fourier(*centre, G), 1e-4)


def test_many_prompts_equal_one_by_one():
    predictor = sam.SamPredictor(tiny())
    predictor.set_image(scene(96, 128))
    coords, labels = torch.rand(5, 2, 2) * 90, torch.tensor([[1, 0], [1, 1], [0, 1], [1, -1], [0, 0]])
    boxes = torch.tensor([[5, 5, 50, 60]] * 5) + torch.arange(5)[:, None]
    for c, b in ((coords, None), (coords, boxes), (None, boxes)):
        prompts = c, None if c is None else labels, b
        together = predictor.predict_torch(*prompts, return_logits=True)
        for i in range(5):
            alone = predictor.predict_torch(*(p if p is None else p[i:i + 1] for p in prompts), return_logits=True)
            assert all(close(a[0], t[i], 1e-5) for a, t in zip(alone, together))
        assert not close(together[2][0], together[2][1], 1e-2)  # the prompts do differ


def test_filled_up_prompts():
    """Label -1 fills prompts up to one length. Where such points lie, and at which place, makes no difference. Their
    number does, in the official model as well: each is a token that the others attend to."""
    predictor = sam.SamPredictor(tiny())
    predictor.set_image(scene(96, 128))

    def low_res(coords, labels):
        return predictor.predict_torch(torch.tensor([coords]).float(), torch.tensor([labels]))[2]

    filled = low_res([[30, 40], [0, 0], [0, 0]], [1, -1, -1])
    assert torch.equal(filled, low_res([[30, 40], [77, 3], [500, -9]], [1, -1, -1]))
    assert close(filled, low_res([[9, 9], [30, 40], [5, 5]], [-1, 1, -1]), 1e-5)
    assert not close(filled, low_res([[30, 40]], [1]), 1e-4)
    both = predictor.predict_torch(torch.tensor([[[30, 40], [0, 0], [0, 0]], [[30, 40], [8, 8], [80, 90]]]).float(),
                                   torch.tensor([[1, -1, -1], [1, 0, 1]]))[2]
    assert close(both[0], filled[0], 1e-5) and close(both[1], low_res([[30, 40], [8, 8], [80, 90]], [1, 0, 1])[0], 1e-5)


def test_batched_forward_equals_predictor():
    model, shapes = tiny(), [(96, 128), (200, 50)]
    prompts = [dict(point_coords=torch.tensor([[[20., 30]], [[60, 70]]]), point_labels=torch.ones(2, 1)),
               dict(boxes=torch.tensor([[3., 5, 28, 100]]), mask_inputs=torch.randn(1, 1, 64, 64))]
    images = [scene(*shape, seed) for seed, shape in enumerate(shapes)]
    resize = sam.ResizeLongestSide(128)
    with torch.no_grad():
        outputs = model([dict(image=torch.tensor(resize.apply_image(image)).permute(2, 0, 1), original_size=shape, **p)
                         for image, shape, p in zip(images, shapes, prompts)], multimask_output=True)
    predictor = sam.SamPredictor(model)
    for image, shape, prompt, output in zip(images, shapes, prompts, outputs):
        predictor.set_image(image)
        arguments = (prompt.get(key) for key in ("point_coords", "point_labels", "boxes", "mask_inputs"))
        masks, scores, low_res = predictor.predict_torch(*arguments)
        assert output["masks"].shape == masks.shape == (len(scores), 3, *shape) and output["masks"].dtype == torch.bool
        assert close(output["low_res_logits"], low_res) and close(output["iou_predictions"], scores)
        assert (output["masks"] == masks).float().mean() > 0.999 and 0 < masks.float().mean() < 1


def test_image_index_says_which_picture_a_prompt_is_for():
    model, index = tiny(), torch.tensor([1, 0, 0])
    boxes = torch.tensor([[5., 5, 60, 60], [9, 9, 99, 90], [5, 5, 60, 60]])
    features = encode(model, pictures(0, 1))
    with torch.no_grad():
        together, scores = model.decode(features, boxes=boxes, image_index=index)
        for i in range(3):
            alone, score = model.decode(features[index[i]][None], boxes=boxes[i:i + 1])
            assert close(together[i], alone[0]) and close(scores[i], score[0], 1e-4)
    assert not close(together[0], together[2], 1e-2)  # same box, other picture


@pytest.mark.parametrize("height, width", [(128, 128), (97, 131), (300, 5), (5, 300), (1, 3000), (1, 1)])
@pytest.mark.parametrize("multimask", [True, False])
def test_predictor_takes_any_size(height, width, multimask):
    predictor, count = sam.SamPredictor(tiny()), 3 if multimask else 1
    predictor.set_image(np.full((height, width, 3), 77, np.uint8))
    arguments = dict(point_coords=[[width - 1, 0]], point_labels=[1], multimask_output=multimask)
    masks, scores, low_res = predictor.predict(**arguments)
    assert masks.dtype == bool and masks.shape == (count, height, width)
    assert scores.dtype == np.float32 and scores.shape == (count,)
    assert low_res.dtype == np.float32 and low_res.shape == (count, 64, 64) and np.isfinite(low_res).all()
    again, _, refined = predictor.predict(**arguments, mask_input=low_res[:1], return_logits=True)  # goes in again
    assert again.dtype == np.float32 and again.shape == masks.shape and refined.shape == low_res.shape
    assert not close(refined, low_res, 1e-3)  # and matters


def test_mask_prompt_is_read_place_by_place():
    """The map that a mask prompt becomes depends, at each token, on the 4 x 4 logits over it and on nothing else."""
    encoder, logits = tiny().prompt_encoder, torch.zeros(1, 1, 64, 64)
    before = encoder(None, None, logits)[1]
    logits[0, 0, 20:24, 8:12] = 5
    changed = (encoder(None, None, logits)[1] - before).abs().sum(1)[0] > 1e-6
    assert changed.nonzero().tolist() == [[5, 2]]


def test_predictor_channel_order_and_reset():
    predictor, image = sam.SamPredictor(tiny()), scene(40, 50)
    predictor.set_image(image)
    features = predictor.get_image_embedding()
    predictor.set_image(image[..., ::-1], image_format="BGR")
    assert torch.equal(features, predictor.get_image_embedding())
    predictor.reset_image()
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.get_image_embedding()


POINT = dict(point_coords=[[3, 4]], point_labels=[1])


@pytest.mark.parametrize("arguments, words", [
    (dict(point_coords=[[3, 4]]), "point_labels"), (dict(point_labels=[1]), "point_coords"),
    (dict(point_coords=[[np.nan, 4]], point_labels=[1]), "NaN"), (dict(point_coords=[[3, 4]], point_labels=[2]), "2"),
    (dict(point_coords=[3, 4], point_labels=[1]), "shape"), (dict(point_coords=[[3, 4]], point_labels=[1, 0]), "shape"),
    (dict(box=[1, 2, 3]), "box"), (dict(box=[1, 2, np.inf, 3]), "box"),
    (POINT | dict(mask_input=np.zeros((1, 63, 64))), "(1, 64, 64)"),
    (POINT | dict(mask_input=np.full((1, 64, 64), np.nan)), "mask_input")])
def test_prompts_that_make_no_sense(arguments, words):
    predictor = sam.SamPredictor(tiny())
    predictor.set_image(scene(16, 20))
    with pytest.raises(ValueError) as error:
        predictor.predict(**arguments)
    one_line(error, words)
    assert predictor.predict(**POINT)[0].shape == (3, 16, 20)  # the next prompt is answered


def test_predictor_mistakes_with_the_picture():
    predictor = sam.SamPredictor(tiny())
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict(**POINT)
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict_torch(None, None)
    wrong = scene(20, 20) / 255, scene(20, 20)[..., 0], np.zeros((9, 9, 4), np.uint8), np.zeros((0, 9, 3), np.uint8)
    for image in wrong:
        with pytest.raises(ValueError) as error:
            predictor.set_image(image)
        one_line(error, str(image.dtype), str(image.shape))
    with pytest.raises(ValueError, match="RGBA"):
        predictor.set_image(scene(20, 20), "RGBA")
    with pytest.raises(ValueError, match="128"):
        predictor.set_torch_image(torch.zeros(1, 3, 100, 90), (100, 90))


@pytest.mark.parametrize("size, scaled, xy, expected", [
    ((50, 100), (64, 128), (99, 49), (126.72, 62.72)), ((256, 64), (128, 32), (10, 200), (5, 100)),
    ((427, 640), (85, 128), (320, 427), (64, 85)), ((5, 300), (2, 128), (150, 5), (64, 2)),
    ((1, 3000), (1, 128), (3000, 1), (128, 1))])
def test_scaling_of_coordinates(size, scaled, xy, expected):
    resize = sam.ResizeLongestSide(128)
    assert resize.get_preprocess_shape(*size) == scaled
    assert resize.apply_image(np.zeros((*size, 3), np.uint8)).shape == (*scaled, 3)
    for kind in (np.array, torch.tensor):  # float64 in, float32 out: float64 is unknown to Apple's GPUs
        out = resize.apply_coords(kind([[xy]], dtype=getattr(np if kind is np.array else torch, "float64")), size)
        assert str(out.dtype).endswith("float32") and np.allclose(out[0, 0], expected, rtol=1e-6)
        assert np.allclose(resize.apply_boxes(kind([[*xy, *xy]]), size), [[*expected, *expected]], rtol=1e-6)


def test_preprocess_of_a_constant_picture():
    x = tiny().preprocess(torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1).expand(3, 60, 128))
    assert x.shape == (3, 128, 128) and (x[:, 60:] == 0).all()  # padding is zero after, not before, normalisation
    for channel, value in enumerate([(200 - 123.675) / 58.395, (100 - 116.28) / 57.12, (50 - 103.53) / 57.375]):
        assert torch.allclose(x[channel, :60], torch.tensor(value), rtol=1e-5)


def test_postprocess_keeps_ramps_and_cuts_the_padding_off():
    """Linear scaling keeps a ramp a ramp. A picture of 32 x 64 fills the upper half of the 128 x 128 input, so a pixel
    of it is as wide as one of the 64 x 64 low-resolution logits."""
    ramp = torch.arange(64.) + 0.5
    low_res = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64)])[None]  # along x, along y
    out = tiny().postprocess_masks(low_res, (64, 128), (32, 64))
    assert out.shape == (1, 2, 32, 64)
    inner = slice(1, -1)  # at the border there is nothing to interpolate with
    assert torch.allclose(out[0, 0, :, inner], (torch.arange(64.) + 0.5)[inner].expand(32, 62))
    assert torch.allclose(out[0, 1, inner], (torch.arange(32.) + 0.5)[inner, None].expand(30, 64))


def test_gradients_flow_except_in_the_predictor():
    model = tiny()
    features = model.image_encoder(pictures(0))
    points, mask = (torch.tensor([[[9., 9]]]), torch.tensor([[1]])), torch.randn(1, 1, 64, 64)
    low_res, scores = model.decode(features, points, masks=mask, multimask_output=True)
    (low_res.square().sum() + scores.sum()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # what one object point, a mask and three outputs leave out: other labels, "no mask", the mask for clear prompts
    unused = r"point_embeddings\.[023]|no_mask_embed|hypernetworks_mlps\.0"
    assert [name for name in silent if not re.search(unused, name)] == [] and len(silent) < 12
    predictor = sam.SamPredictor(model)
    predictor.set_image(scene(20, 20))
    assert not predictor.features.requires_grad
    assert not predictor.predict_torch(None, None, torch.tensor([[1., 1, 9, 9]]))[2].requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# SAM: files and command line.
# ---------------------------------------------------------------------------------------------------------------------

POS_EMBED, BIAS = "image_encoder.pos_embed", "mask_decoder.iou_prediction_head.layers.2.bias"


@pytest.mark.parametrize("content, words", [
    (b"", ["not a readable"]), (b"<html>404 not found</html>\n" * 9, ["not a readable"]), ("cut", ["not a readable"]),
    (torch.nn.Linear(1, 1), ["not a readable"]), ([1, 2], ["not a SAM checkpoint"]),
    ({"a": torch.ones(2)}, ["not a SAM checkpoint"]),
    ({"model": {POS_EMBED: torch.ones(2)}}, ["not a SAM checkpoint"]),
    (lambda w: w.pop(BIAS), ["lacks", BIAS]),
    (lambda w: w.update({"sam_hq.weight": torch.ones(1)}), ["unknown", "sam_hq.weight"]),
    (lambda w: w.update({BIAS: torch.ones(5)}), [BIAS, "(5,)", "(4,)"]),
    (lambda w: w[BIAS].fill_(math.nan), [BIAS, "NaN"]),
    (lambda w: w[POS_EMBED].view(-1)[7:8].fill_(math.inf), [POS_EMBED, "infinite"])])
def test_checkpoints_that_are_refused(tmp_path, content, words):
    path, weights = tmp_path / "w.pth", {key: value.clone() for key, value in tiny_weights().items()}
    if callable(content) and not isinstance(content, torch.nn.Module):
        content(weights)
        content = weights
    torch.save(weights if isinstance(content, (bytes, str)) else content, path)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(sam.CheckpointError) as error:
        sam.build_sam("vit_t", path)
    one_line(error, "w.pth", *words)


def test_checkpoint_of_another_backbone_is_named(tmp_path):
    torch.save(tiny_weights(), tmp_path / "w.pth")
    with pytest.raises(sam.CheckpointError) as error:
        sam.build_sam("vit_b", tmp_path / "w.pth")
    one_line(error, "vit_t", "not vit_b")
    with pytest.raises(FileNotFoundError) as error:
        sam.build_sam("vit_t", tmp_path / "none.pth")
    one_line(error, "none.pth")
    with pytest.raises(ValueError) as error:
        sam.build_sam("vit_g")
    one_line(error, "vit_g", "vit_t, vit_b, vit_l, vit_h")


def test_checkpoint_is_loaded_bit_by_bit(tmp_path):
    torch.save(tiny_weights(), tmp_path / "w.pth")
    model = sam.sam_model_registry["vit_t"](checkpoint=tmp_path / "w.pth")
    assert not model.training
    assert all(torch.equal(value, tiny_weights()[key]) for key, value in model.state_dict().items())


def test_read_picture_of_every_kind(tmp_path):
    rgb = scene(20, 30)
    grey = rgb[..., 0]
    palette = Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30) % 4, "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    colours = np.array([[255, 0, 0], [0, 255, 0], [255, 255, 255], [9, 9, 9]], np.uint8)  # third: transparent
    alpha = np.zeros((20, 30), np.uint8)
    alpha[:, :15] = 255
    exif = Image.Exif()
    exif[274] = 6  # stored lying on its side
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "rgba.png")
    palette.save(tmp_path / "palette.png", transparency=2)
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(grey.astype(np.uint16) * 256 + 200).save(tmp_path / "deep.png")
    expected = {"grey": grey[..., None].repeat(3, 2), "rgba": np.where(alpha[..., None] > 0, rgb, 255),
                "palette": colours[np.arange(600).reshape(20, 30) % 4], "turned": np.rot90(rgb, -1),
                "deep": grey[..., None].repeat(3, 2)}
    for name, pixels in expected.items():
        out = sam.read_picture(tmp_path / f"{name}.png")
        assert out.dtype == np.uint8 and np.array_equal(out, pixels), name


@pytest.fixture
def tiny_files(tmp_path):
    """A picture and a vit_t checkpoint: the arguments that name them."""
    Image.fromarray(scene(60, 90)).save(tmp_path / "photo.png")
    torch.save(tiny_weights(), tmp_path / "w.pth")
    return [tmp_path / "photo.png", "--backbone", "vit_t", "--checkpoint", tmp_path / "w.pth"]


@pytest.mark.parametrize("arguments, prompt", [
    (["--point", "40,30"], dict(point_coords=[[40, 30]], point_labels=[1])),
    (["--point", "40,30", "--point", "5,9,0", "--box", "3,3,80,50"],
     dict(point_coords=[[40, 30], [5, 9]], point_labels=[1, 0], box=[3, 3, 80, 50], multimask_output=False))])
def test_sam_command_line_equals_predictor(tmp_path, tiny_files, capsys, arguments, prompt):
    out, mask = tmp_path / "o.png", tmp_path / "m.png"
    assert run_cli(sam.main, *tiny_files, *arguments, "--out", out, "--mask", mask) == 0
    predictor = sam.SamPredictor(tiny())
    predictor.set_image(scene(60, 90))
    masks, scores, _ = predictor.predict(**prompt)
    best = masks[scores.argmax()]
    assert np.array_equal(np.asarray(Image.open(mask)), best * np.uint8(255)) and 0 < best.sum() < best.size
    assert Image.open(out).size == (90, 60) and f"{best.sum():,} pixels" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.png", "o.png", "photo.png", "w.pth"]


def test_sam_command_line_applies_the_adapter(tmp_path, tiny_files):
    model = tiny("gara")
    gara.save_adapter(model, tmp_path / "a.pt")
    assert run_cli(sam.main, *tiny_files, "--box", "9,9,80,50", "--adapter", tmp_path / "a.pt",
                   "--out", tmp_path / "o.png", "--mask", tmp_path / "m.png") == 0
    predictors = [sam.SamPredictor(m) for m in (model, tiny())]
    for predictor in predictors:
        predictor.set_image(scene(60, 90))
    adapted, plain = (p.predict(box=[9, 9, 80, 50], multimask_output=False)[0][0] for p in predictors)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "m.png")) > 0, adapted) and (adapted != plain).any()


@pytest.mark.parametrize("arguments", [
    [], ["--point", "1"], ["--point", "90,10"], ["--point", "nan,3"], ["--box", "50,5,40,9"], ["--box", "1,2,3"],
    ["--point", "1,1", "--what"],
    ["--point", "1,1", "--backbone", "vit_b"], ["--point", "1,1", "--checkpoint", "none.pth"],
    ["--point", "1,1", "--adapter", "none.pt"],
    ["--point", "1,1", "--adapter", "w.pth"], ["--point", "1,1", "--out", "no/o.png"], ["--point", "1,1,7"]])
def test_sam_command_line_mistakes_end_in_one_line(tmp_path, tiny_files, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert run_cli(sam.main, *tiny_files, "--mask", "m.png", *arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photo.png", "w.pth"]


def test_sam_command_line_refuses_what_is_no_picture(tmp_path, tiny_files, capsys):
    assert run_cli(sam.main, tmp_path / "w.pth", *tiny_files[1:], "--point", "1,1", "--out", tmp_path / "o.png") == 2
    assert run_cli(sam.main, tmp_path / "none.png", *tiny_files[1:], "--point", "1,1", "--out", tmp_path / "o.png") == 2
    assert capsys.readouterr().err.count("\n") == 2 and not (tmp_path / "o.png").exists()


@gpu
def test_encoder_on_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected = encode(tiny(), pictures(0, 1))
    for limit in (2**23, 256 * 100):  # one block, several
        monkeypatch.setitem(sam.SCORES_PER_BLOCK, "cuda", limit)
        assert close(encode(tiny().cuda(), pictures(0, 1).cuda()), expected, 1e-3)

# ---------------------------------------------------------------------------------------------------------------------
# GaRA: the operation.
# ---------------------------------------------------------------------------------------------------------------------

FORMS = pytest.mark.parametrize("form", ["merged", "factored"])


def operands(N=2, tokens=(5,), d=4, o=3, r=6, G=3, dtype=torch.float64, flat=False, update=1.0, device="cpu"):
    """x, weight, bias, A, B, mask for gated_linear. flat: one matrix, A and B without the leading 1."""
    rng = torch.Generator().manual_seed(0)
    x, weight, bias = ((N, *tokens, d), 1), ((G * o, d), d ** -0.5), ((G * o,), 1)
    A, B, mask = ((G, r, d), d ** -0.5), ((G, o, r), update * r ** -0.5), ((N, r), 1)
    sizes = x, weight, bias, A, B, mask
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


@FORMS
@pytest.mark.parametrize("sizes", [
    dict(), dict(G=1, flat=True, o=5, d=3, r=2), dict(tokens=(2, 3), r=1), dict(N=1, tokens=(1,), r=9)])
def test_gated_linear_gradients_by_finite_differences(monkeypatch, form, sizes):
    monkeypatch.setattr(gara, "FORM", form)
    assert torch.autograd.gradcheck(gara.gated_linear, operands(**sizes))


@pytest.mark.parametrize("form", ["merged", "factored", "cheaper"])
@pytest.mark.parametrize("sizes", [dict(), dict(G=1, flat=True, o=5), dict(N=3, tokens=(4, 6), d=8, o=8, r=20)])
def test_gated_linear_is_equation_7(monkeypatch, form, sizes):
    monkeypatch.setattr(gara, "FORM", form)
    inputs = operands(**sizes)
    assert close(gara.gated_linear(*inputs), plain_gated_linear(*inputs), 1e-13)


@FORMS
def test_gated_linear_in_float32(monkeypatch, form):
    """Values and gradients within 1e-5 of float64, whichever the form."""
    monkeypatch.setattr(gara, "FORM", form)
    exact = operands(N=3, tokens=(8, 8), d=96, o=96, r=40)
    single = [t.detach().float().requires_grad_() for t in exact]
    y, expected = gara.gated_linear(*single), plain_gated_linear(*exact)
    assert y.dtype == torch.float32 and close(y, expected, 1e-5)
    dy = torch.ones_like(expected).cos() * expected.detach()
    for got, want in zip(torch.autograd.grad(y, single, dy.float()), torch.autograd.grad(expected, exact, dy)):
        assert got.dtype == torch.float32 and close(got, want, 1e-5)


@FORMS
@pytest.mark.parametrize("wanted", [0, 1, 2, 3, 4, 5])
def test_gated_linear_gives_only_the_gradients_asked_for(monkeypatch, form, wanted):
    monkeypatch.setattr(gara, "FORM", form)
    inputs, alone = operands(), operands()
    for i, tensor in enumerate(alone):
        tensor.requires_grad_(i == wanted)
    gara.gated_linear(*inputs).square().sum().backward()
    gara.gated_linear(*alone).square().sum().backward()
    assert [t.grad is not None for t in alone] == [i == wanted for i in range(6)]
    assert close(alone[wanted].grad, inputs[wanted].grad, 1e-12)


def test_gated_linear_refuses_operands_that_do_not_fit():
    x, weight, bias, A, B, mask = operands()
    for wrong in ((x, weight, bias, A, B, mask[:1]), (x, weight, bias, A, B, mask[:, :2]),
                  (x, weight, bias, A, B[:, :2], mask),
                  (x, weight, bias, A[:2], B, mask)):
        with pytest.raises(ValueError) as error:
            gara.gated_linear(*wrong)
        one_line(error, "do not fit")


def test_gated_linear_under_autocast():
    """bfloat16 is close to float32 in values and gradients, and parameters keep float32 gradients."""
    inputs = operands(N=2, tokens=(64,), d=96, o=96, r=16, dtype=torch.float32)
    expected = gara.gated_linear(*inputs)
    dy = expected.detach()
    wanted = torch.autograd.grad(expected, inputs, dy)
    with torch.autocast("cpu", torch.bfloat16):
        y = gara.gated_linear(*inputs)
    assert y.dtype == torch.bfloat16 and close(y, expected, 0.02)
    for got, want in zip(torch.autograd.grad(y, inputs, dy.bfloat16()), wanted):
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
    compiled = torch.compile(gara.gated_linear, fullgraph=True)
    inputs = operands(tokens=(7,), d=8, o=8, dtype=torch.float32)
    y, expected = compiled(*inputs), gara.gated_linear(*inputs)
    assert close(y, expected)
    gradients = (torch.autograd.grad(out.square().sum(), inputs) for out in (y, expected))
    for got, want in zip(*gradients):
        assert close(got, want)


@gpu
@FORMS
def test_gated_linear_on_the_gpu(monkeypatch, form):
    monkeypatch.setattr(gara, "FORM", form)
    exact = operands(N=3, tokens=(8, 8), d=96, o=96, r=40)
    inputs = [t.detach().float().cuda().requires_grad_() for t in exact]
    y, expected = gara.gated_linear(*inputs), plain_gated_linear(*exact)
    assert close(y, expected, 1e-4)
    dy = expected.detach()
    for got, want in zip(torch.autograd.grad(y, inputs, dy.float().cuda()), torch.autograd.grad(expected, exact, dy)):
        assert close(got, want, 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# GaRA: the gates.
# ---------------------------------------------------------------------------------------------------------------------


def test_gumbel_sigmoid_without_training_is_a_threshold():
    logits = torch.tensor([-3, -1e-9, 0, 1e-9, 5.])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert gara.gumbel_sigmoid(logits, 0.5, training=False).tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(torch.get_rng_state(), state)  # no noise drawn


@pytest.mark.parametrize("temperature", [0.1, 0.5, 3])
@pytest.mark.parametrize("logit", [-3, -0.7, 0, 0.4, 2])
def test_gumbel_sigmoid_chances(logit, temperature):
    """The noise is logistic, so P(logit + e > 0) = sigmoid(logit) at any temperature; bound: four sigma."""
    torch.manual_seed(1)
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


def test_gara_uses_one_of_the_two_spaces():
    gate, h = gara.GaraGate(12, 5, 9, 0.5), torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    for training in (True, False):
        mask, space = gate.train(training)(3 * h)
        assert mask.shape == (300, 14) and set(mask.unique().tolist()) == {0, 1} and set(space.tolist()) == {0, 1}
        low, high = mask[:, :5].any(1), mask[:, 5:].any(1)
        assert not (low & (space == 1)).any() and not (high & (space == 0)).any()
        assert low[space == 0].float().mean() > 0.5 and high[space == 1].float().mean() > 0.5


def layer_output(model, x, index):
    """Input and output of one layer's adapter during a forward pass."""
    seen = {}
    layer = gara.adapters(model)[index]
    hook = layer.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
    encode(model, x)
    hook.remove()
    return seen["x"], seen["y"]


def test_one_layer_by_hand():
    """Equations 2 to 7 from the gates' raw logits, one image at a time."""
    model = tiny("gara")
    for index in (0, 3):
        x, y = layer_output(model, pictures(0, 1, 2), index)
        layer, spaces = gara.adapters(model)[index], gara.gates(model)[index]["space"]
        for n in range(3):
            tokens = x[n].reshape(-1, 160)
            h = tokens.sum(0) / len(tokens)
            low, high, g = (mlp(h) for mlp in (layer.gate.G_l, layer.gate.G_h, layer.gate.G_0))
            on = [float(z > 0) for z in (low if g < 0 else high)]
            m = torch.tensor(on + [0.0] * 48 if g < 0 else [0.0] * 4 + on)
            for i in range(3):  # q, k, v
                W, b = layer.weight[160 * i:160 * (i + 1)], layer.bias[160 * i:160 * (i + 1)]
                expected = tokens @ W.T + b + (tokens @ layer.A[i].T * m) @ layer.B[i].T
                assert close(y[n].reshape(-1, 480)[:, 160 * i:160 * (i + 1)], expected)
            assert spaces[n] == int(g > 0) and m.any()


def test_moe_lora_uses_one_block_and_lora_all():
    experts = (1, 4, 24, 48)
    model, chosen = tiny("moe_lora"), set()
    for training in (False, True):
        encode(model.train(training), pictures(0, 1, 2, 3))
        for layer in gara.gates(model):
            for space, vector in zip(layer["space"].tolist(), layer["vector"]):
                start = sum(experts[:space])
                assert vector.nonzero().flatten().tolist() == list(range(start, start + experts[space]))
                chosen.add(space)
    assert len(chosen) > 1
    model = tiny("lora", rank=7)
    encode(model, pictures(0, 1))
    assert all(layer["vector"].shape == (2, 7) and layer["vector"].all() for layer in gara.gates(model))


@pytest.mark.parametrize("method, rank", [("gara", 52), ("gara_flat", 4), ("lora", 4), ("moe_lora", 77)])
def test_gates_report_every_layer(method, rank):
    model = tiny(method)
    encode(model, pictures(0, 1, 2))
    report = gara.gates(model)
    assert [layer["layer"] for layer in report] == list(range(6))
    for layer, adapter in zip(report, gara.adapters(model)):
        assert layer["vector"].shape == (3, rank) and layer["vector"].dtype == torch.bool
        assert layer["space"].shape == (3,)
        assert layer["count"].tolist() == [sum(row) for row in layer["vector"].tolist()]
        assert torch.equal(layer["vector"].float(), adapter.mask) and not adapter.mask.requires_grad
    if method == "gara":
        spaces = torch.stack([layer["space"] for layer in report])
        assert set(spaces.flatten().tolist()) == {0, 1} and (spaces != spaces[:1]).any()  # layers decide for themselves
    encode(model, pictures(4))
    assert gara.gates(model)[0]["vector"].shape == (1, rank)  # the last pass, not the one before


def test_gates_need_a_forward_pass():
    for model in (tiny(), gara.attach(tiny(), "gara")):
        with pytest.raises(RuntimeError) as error:
            gara.gates(model)
        one_line(error, "attach", "encode")


@pytest.mark.parametrize("method", gara.METHODS)
def test_evaluation_is_free_of_noise_and_image_by_image(method):
    model = tiny(method)
    torch.manual_seed(0)
    first = encode(model, pictures(0, 1, 2))
    torch.manual_seed(1)
    assert torch.equal(encode(model, pictures(0, 1, 2)), first)
    other = encode(model, pictures(0, 3, 2))
    assert torch.equal(other[0], first[0]) and torch.equal(other[2], first[2]) and not close(other[1], first[1], 1e-2)
    assert close(encode(model, pictures(2)), first[2:], 1e-4)


def test_training_draws_noise():
    model = tiny("gara").train()
    torch.manual_seed(0)
    first = encode(model, pictures(0))
    assert not close(encode(model, pictures(0)), first, 1e-3)
    torch.manual_seed(0)
    assert torch.equal(encode(model, pictures(0)), first)


@pytest.mark.parametrize("method", gara.METHODS)
def test_gradient_reaches_every_gate(method):
    model = tiny(method).train()
    torch.manual_seed(0)
    model.image_encoder(pictures(0, 1, 2, 3, 4, 5)).square().sum().backward()
    learnable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(learnable) == 6 * (2 + {"gara": 4 + 6 + 6, "gara_flat": 6, "lora": 0, "moe_lora": 4}[method])
    assert [name for name, p in learnable.items() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for name, p in model.named_parameters() if name not in learnable)


# ---------------------------------------------------------------------------------------------------------------------
# GaRA: on a SAM.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", gara.METHODS)
def test_attach_changes_nothing_until_trained_and_detach_takes_it_back(method):
    model, x = tiny(), pictures(0, 1, 2)
    names, plain = list(model.state_dict()), encode(model, x)
    assert gara.attach(model, method) is model
    untrained = encode(model, x), encode(model.train(), x)
    trained = encode(train_by_chance(model.eval()), x)
    assert not close(trained, plain, 1e-2)  # first of all: it does act
    assert all(torch.equal(out, plain) for out in untrained)
    learnable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learnable and learnable.isdisjoint(names)
    assert all(re.search(r"\.attn\.qkv\.(A|B|gate\.)", name) for name in learnable)
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


def count(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_vit_l_has_the_papers_number_of_parameters():
    """Table 8 prints 343M for GaRA on vit_l: its size in bytes."""
    with torch.device("meta"):
        model = gara.attach(sam.build_sam("vit_l"))
    assert count(model) == 85_887_384 and round(4 * count(model) / 1e6, 1) == 343.5
    assert sum(value.numel() for value in gara.adapter_state(model).values()) == 85_887_384


def mlp_size(*widths):
    return sum(i * o + o for i, o in zip(widths, widths[1:]))


def expected_count(method, d, depth, ranks):
    """Parameters from the layers' widths: A and B for q, k and v, and the gate's MLPs."""
    gate = {"lora": 0, "gara_flat": mlp_size(d, d // 2, d // 4, ranks[0]), "moe_lora": mlp_size(d, d // 2, len(ranks)),
            "gara": mlp_size(d, d // 2, 1) + sum(mlp_size(d, d // 2, d // 4, rank) for rank in ranks)}[method]
    return depth * (3 * 2 * d * sum(ranks) + gate)


RANKS = {"gara": (16, 256), "gara_flat": (16,), "lora": (16,), "moe_lora": (2, 16, 128, 256)}
RANKS_VIT_T = {"gara": (4, 48), "gara_flat": (4,), "lora": (4,), "moe_lora": (1, 4, 24, 48)}


@pytest.mark.parametrize("method", gara.METHODS)
@pytest.mark.parametrize("backbone, d, depth", [("vit_t", 160, 6), ("vit_b", 768, 12), ("vit_h", 1280, 32)])
def test_parameter_counts(method, backbone, d, depth):
    with torch.device("meta"):
        model = gara.attach(sam.build_sam(backbone), method)
    assert count(model) == expected_count(method, d, depth, (RANKS_VIT_T if backbone == "vit_t" else RANKS)[method])


def test_gara_command_line(capsys):
    assert run_cli(gara.main, "--backbone", "vit_t") == 0
    text = capsys.readouterr().out
    for method, ranks in RANKS_VIT_T.items():
        row = next(line for line in text.splitlines() if line.startswith(method + " "))
        number = expected_count(method, 160, 6, ranks)
        assert f"{number:,} parameters" in row and f"{4 * number / 1e6:.1f} MB" in row
    forms = [line.split() for line in text.splitlines() if line.startswith(("plain ", "factored ", "merged "))]
    rows = {row[0]: row for row in forms}
    assert len(rows) == 3 and all(float(value) > 0 for row in rows.values() for value in row[1:3])
    assert float(rows["merged"][3]) < 1e-4 and gara.FORM == "cheaper"
    assert run_cli(gara.main, "--batch", "0") == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("method, options, word", [
    ("dora", {}, "gara, gara_flat, lora, moe_lora"), ("lora", dict(rank_low=3), "rank_low"),
    ("gara", dict(rank=3), "rank"),
    ("gara", dict(rank_low=0), "0"), ("lora", dict(rank=-1), "-1"), ("lora", dict(rank=2.5), "2.5"),
    ("lora", dict(rank=641), "641"),
    ("moe_lora", dict(experts=()), "()"), ("moe_lora", dict(experts=(1, 0)), "(1, 0)"),
    ("gara", dict(temperature=0), "temperature"),
    ("gara", dict(temperature=math.nan), "nan")])
def test_attach_refuses(method, options, word):
    model = tiny()
    with pytest.raises(ValueError) as error:
        gara.attach(model, method, **options)
    assert one_line(error, word) and not gara.adapters(model) and all(p.requires_grad for p in model.parameters())


def test_attach_refuses_a_second_adapter():
    model = tiny("lora")
    before = encode(model, pictures(0))
    with pytest.raises(ValueError) as error:
        gara.attach(model, "gara")
    assert one_line(error, "lora", "detach") and torch.equal(encode(model, pictures(0)), before)


# ---------------------------------------------------------------------------------------------------------------------
# GaRA: adapter files.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, options", [
    ("gara", {}), ("gara_flat", dict(rank=9, temperature=1.5)), ("lora", dict(rank=2)),
    ("moe_lora", dict(experts=(3, 5)))])
def test_save_and_load_adapter(tmp_path, method, options):
    model, path, x = tiny(method, **options), tmp_path / "a.pt", pictures(0, 1)
    meta = dict(step=7, note="first", losses=[0.5, 0.25], state=torch.arange(3))
    gara.save_adapter(model, path, **meta)
    weights, base = torch.load(path, weights_only=True)["weights"], tiny_weights()
    assert weights.keys() == model.state_dict().keys() - base.keys()
    assert path.stat().st_size < 4 * count(model) + 60_000  # the adapter alone
    fresh = tiny()
    assert not torch.equal(encode(fresh, x), encode(model, x))
    loaded = gara.load_adapter(fresh, path)
    assert torch.equal(loaded.pop("state"), meta.pop("state")) and loaded == meta
    assert torch.equal(encode(fresh, x), encode(model, x)) and fresh.adapter == model.adapter
    again = train_by_chance(gara.attach(tiny(), method, **options), seed=1)  # an equal adapter is filled
    gara.load_adapter(again, path)
    assert torch.equal(encode(again, x), encode(model, x))
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_failed_save_keeps_the_old_file(tmp_path):
    model, path = tiny("lora"), tmp_path / "a.pt"
    gara.save_adapter(model, path)
    old = path.read_bytes()
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        gara.save_adapter(model, path, step=lambda: 1)
    with torch.no_grad():
        gara.adapters(model)[2].A[0, 0, 0] = math.nan
    with pytest.raises(ValueError) as error:
        gara.save_adapter(model, path)
    assert one_line(error, "blocks.2.attn.qkv.A", "NaN")
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.pt"]
    with pytest.raises(ValueError, match="attach"):
        gara.save_adapter(tiny(), path)


A2 = "image_encoder.blocks.2.attn.qkv.A"


@pytest.mark.parametrize("change, words", [
    (lambda c: c["weights"].pop(A2), [A2]), (lambda c: c["weights"].update({A2 + "2": torch.ones(1)}), [A2 + "2"]),
    (lambda c: c["weights"].update({A2: torch.ones(3, 52, 161)}), [A2]),
    (lambda c: c["weights"][A2][1, 2, :3].fill_(math.nan), [A2]),
    (lambda c: c.update(backbone="vit_b"), ["vit_b", "vit_t"]),
    (lambda c: c.update(base="0" * 16), ["other vit_t weights"]),
    (lambda c: c.update(format="2"), ["not an adapter file"]),
    (lambda c: c.update(tiny_weights(), format=0), ["SAM checkpoint"]),
    (lambda c: c.clear(), ["not an adapter file"]), ("cut", ["not a readable adapter file"]),
    ("text", ["not a readable adapter file"])])
@pytest.mark.parametrize("adapted", [False, True])
def test_adapter_files_that_are_refused(tmp_path, change, words, adapted):
    """In one line, and the SAM, adapted before or not, gives the same numbers as before."""
    path, model, x = tmp_path / "a.pt", tiny("gara"), pictures(0)
    gara.save_adapter(model, path)
    content = torch.load(path, weights_only=True)
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-9000])
    elif change == "text":
        path.write_text("not weights\n" * 100)
    else:
        change(content)
        torch.save(content, path)
    target = train_by_chance(gara.attach(tiny(), "gara"), seed=1) if adapted else tiny()
    before, names = encode(target, x), list(target.state_dict())
    with pytest.raises(ValueError) as error:
        gara.load_adapter(target, path)
    one_line(error, "a.pt", *words)
    assert torch.equal(encode(target, x), before) and list(target.state_dict()) == names


def test_adapters_fit_their_base_model_only(tmp_path):
    path = tmp_path / "a.pt"
    gara.save_adapter(tiny("gara"), path)
    other = tiny()
    with torch.no_grad():
        other.image_encoder.blocks[1].mlp.lin1.weight *= 1.02
    with torch.device("meta"):
        big = sam.build_sam("vit_b")
    for model, file, words in ((other, path, ["other vit_t weights"]), (big, path, ["vit_t", "vit_b"]),
                               (tiny("gara", rank_high=8), path, ["detach"]), (tiny("lora"), path, ["lora", "detach"])):
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(ValueError) as error:
            gara.load_adapter(model, file)
        assert one_line(error, *words) and (model is big or all(map(torch.equal, before, model.parameters())))
    with pytest.raises(FileNotFoundError) as error:
        gara.load_adapter(tiny(), tmp_path / "none.pt")
    one_line(error, "none.pt")
    torch.save(tiny_weights(), path)
    with pytest.raises(ValueError) as error:
        gara.load_adapter(tiny(), path)
    one_line(error, "SAM checkpoint")


@gpu
def test_gara_on_the_gpu_in_bfloat16():
    model = tiny("gara").cuda().train()
    torch.manual_seed(0)
    with torch.autocast("cuda", torch.bfloat16):
        out = model.image_encoder(pictures(0, 1).cuda())
    out.float().square().mean().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    lora = tiny("lora").cuda()  # no decision that rounding could turn over
    expected = encode(lora, pictures(0, 1).cuda())
    with torch.autocast("cuda", torch.bfloat16):
        out = encode(lora, pictures(0, 1).cuda()).float()
    assert (out - expected).norm() < 0.1 * expected.norm()


# ---------------------------------------------------------------------------------------------------------------------
# Corruptions.
# ---------------------------------------------------------------------------------------------------------------------

NAMES = ("snow fog rain gauss_noise ISO_noise impulse_noise resampling_blur motion_blur zoom_blur color_jitter "
         "compression elastic_transform frosted_glass_blur brightness contrast").split()


def draws(name, seed):
    """The generator that corrupt(_, name, seed) hands to its function."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def mad(a, b):
    return np.abs(a.astype(float) - b).mean()


def gray(x):
    return x @ np.array([0.299, 0.587, 0.114])


def laplacian(x):
    g = gray(x)
    return (g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]).var()


def test_registry():
    assert list(CORRUPTIONS) == NAMES
    assert all(function.__doc__ and "trength" in function.__doc__ for function in CORRUPTIONS.values())


@pytest.mark.parametrize("name", NAMES)
def test_contract(name):
    """Same arguments, same pixels; the input survives; layout of the memory is irrelevant; other seeds differ."""
    image = scene(40, 52)
    before = image.copy()
    image.flags.writeable = False
    out = corrupt(image, name, seed=3)
    assert out.dtype == np.uint8 and out.shape == image.shape and not np.shares_memory(out, image)
    assert np.array_equal(image, before)
    np.random.seed(0)                                     # the global generator plays no part
    assert np.array_equal(out, corrupt(np.asfortranarray(image), name, seed=3))
    wide = np.zeros((40, 104, 3), np.uint8)
    wide[:, ::2] = image
    assert np.array_equal(out, corrupt(wide[:, ::2], name, seed=np.int64(3), strength=1))
    others = [corrupt(image, name, seed) for seed in (4, 5, 6, 2 ** 70)]
    if name != "resampling_blur":                         # the one without a draw
        assert any(not np.array_equal(out, other) for other in others)


@pytest.mark.parametrize("name", NAMES)
def test_strength(name):
    """0 is the identity, a breath above it is a breath of change, and more strength is more change."""
    image = scene(96, 128)
    clean = corrupt(image, name, 5, 0)
    assert np.array_equal(clean, image) and not np.shares_memory(clean, image)
    steps = (1e-6, 0.02, 0.1, 0.3, 0.6, 1, 1.01, 1.5, 2)
    change = np.array([[mad(corrupt(image, name, seed, s), image) for s in steps] for seed in range(4)])
    assert change[:, 0].max() <= 1.5 and change[:, 1].mean() < 0.15 * change[:, 5].mean() + 1
    slack = 0.02 * change[:, 5].mean() + 0.02             # whole pixels (resampling) and whole qualities (JPEG) ripple
    assert (np.diff(change.mean(0)) > -slack).all() and (np.diff(change, axis=1) > -2 * slack).all()
    assert (change[:, 6] - change[:, 5] < 0.1 * change[:, 5] + 0.1).all()        # no jump beyond 1
    assert change[:, 8].mean() > 1.05 * change[:, 5].mean() > 0


@pytest.mark.parametrize("shape", [(16, 16), (16, 200), (200, 16), (17, 23), (61, 45)])
def test_any_size(shape):
    for image in (scene(*shape), np.zeros((*shape, 3), np.uint8), np.full((*shape, 3), 255, np.uint8)):
        for name in NAMES:
            with np.errstate(all="raise", under="ignore", divide="ignore"):
                for strength in (0.3, 1, 2):
                    assert corrupt(image, name, 1, strength).shape == image.shape


@pytest.mark.parametrize("arguments, clue", [
    ((scene(), "snowy"), "snow, fog, rain"), ((scene(), None), "snow, fog, rain"), ((scene(), ["fog"]), "snow, fog"),
    ((scene().astype(np.float32), "fog"), "float32"), ((scene()[..., 0], "fog"), r"\(120, 160\)"),
    ((np.zeros((20, 20, 4), np.uint8), "fog"), r"\(20, 20, 4\)"), (("photo.jpg", "fog"), "str"),
    ((scene(15, 99), "fog"), "99x15"), ((scene(), "fog", -1), "-1"), ((scene(), "fog", 1.5), "1.5"),
    ((scene(), "fog", 0, -0.1), "-0.1"), ((scene(), "fog", 0, float("nan")), "nan"),
    ((scene(), "fog", 0, float("inf")), "inf"), ((scene(), "fog", 0, "1"), "'1'")])
def test_errors_are_one_clear_line(arguments, clue):
    with pytest.raises(ValueError, match=clue) as error:
        corrupt(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, low, high, curve", [
    ("brightness", 0.6, 0.8, lambda x, f: np.floor(f * x)),
    ("impulse_noise", 1.4, 1.5, lambda x, f: np.floor(np.minimum(f * x, 255))),
    ("contrast", 1.6, 1.7, lambda x, f: np.floor(np.clip((x - 128) * f + 128, 0, 255)))])
def test_tables(name, low, high, curve):
    """One factor for the whole picture, uniform in its range; every level goes through the closed form."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    factors = []
    for seed in range(40):
        factors.append(draws(name, seed).uniform(low, high))
        assert np.array_equal(corrupt(ramp, name, seed), curve(ramp.astype(float), factors[-1]))
    assert low <= min(factors) < low + 0.2 * (high - low) and high >= max(factors) > high - 0.2 * (high - low)
    f = factors[0]
    assert np.array_equal(corrupt(ramp, name, 0, 2), curve(ramp.astype(float), f ** 2))     # stops double


def test_resampling_against_loops():
    image = scene(22, 29).astype(float)

    def bilinear(x, height, width):
        out = np.empty((height, width, 3))
        for i in range(height):
            for j in range(width):
                y = min(max((i + 0.5) * x.shape[0] / height - 0.5, 0), x.shape[0] - 1)
                z = min(max((j + 0.5) * x.shape[1] / width - 0.5, 0), x.shape[1] - 1)
                a, b = int(y), int(z)
                c, d = min(a + 1, x.shape[0] - 1), min(b + 1, x.shape[1] - 1)
                out[i, j] = ((a + 1 - y) * ((b + 1 - z) * x[a, b] + (z - b) * x[a, d])
                             + (y - a) * ((b + 1 - z) * x[c, b] + (z - b) * x[c, d]))
        return np.rint(out)

    expected = bilinear(bilinear(image, 5, 7), 22, 29)
    out = corrupt(image.astype(np.uint8), "resampling_blur")
    assert np.abs(out - expected).max() <= 1 and np.mean(out == expected) > 0.99
    half = corrupt(image.astype(np.uint8), "resampling_blur", strength=0.5)
    assert np.abs(half - (image + expected) / 2).max() <= 1


def test_glass_gathers_within_three_pixels():
    """Give each pixel its own colour: then the output tells where it was read, evenly over the 7x7 neighbours."""
    H, W = 60, 70
    code = np.arange(H * W)
    image = np.stack([code // 256, code % 256, code % 7], -1).astype(np.uint8).reshape(H, W, 3)
    for strength, reach in ((1, 3), (2, 6)):
        out = corrupt(image, "frosted_glass_blur", 1, strength).astype(int)
        source = out[..., 0] * 256 + out[..., 1]
        assert np.array_equal(out[..., 2], source % 7)                    # channels move together
        dy, dx = source // W - np.arange(H)[:, None], source % W - np.arange(W)
        assert max(abs(dy).max(), abs(dx).max()) == reach
        inside = (slice(6, -6), slice(6, -6))
        counts = np.histogram2d(dy[inside].ravel(), dx[inside].ravel(), bins=2 * reach + 1)[0]
        expected = counts.sum() / (2 * reach + 1) ** 2
        assert ((counts - expected) ** 2 / expected).sum() < 1.5 * counts.size      # chi-squared


def test_gauss_noise_statistics():
    flat = np.full((150, 150, 3), 128, np.uint8)
    residual = np.concatenate([corrupt(flat, "gauss_noise", seed).astype(float) - 128 for seed in range(6)])
    assert residual.std() == pytest.approx(15.97, rel=0.01) and residual.mean() == pytest.approx(-0.5, abs=0.1)
    correlation = np.corrcoef(residual.reshape(-1, 3).T)[np.triu_indices(3, 1)]
    assert abs(correlation).max() < 0.02
    assert (corrupt(flat, "gauss_noise", 0, 0.5).astype(float) - 128).std() == pytest.approx(8, rel=0.03)


def test_iso_noise_destroys_hue_and_spares_grey():
    flat = np.full((40, 40, 3), 90, np.uint8)
    assert np.array_equal(corrupt(flat, "ISO_noise"), flat)               # no contrast, no colour: no noise
    steps = np.zeros((80, 80, 3), np.uint8)
    steps[:, 40:] = (200, 40, 40)
    light = np.where(np.arange(80) < 40, 0, 120) / 255                    # HLS lightness, before
    out = corrupt(steps, "ISO_noise", 2)
    shift, gain = draws("ISO_noise", 2).uniform(0.4, 0.5), 0.75
    photons = 255 * gain * light.std()
    assert out[:, :40].mean() == pytest.approx(photons, rel=0.1)          # black lifts by the Poisson mean ...
    assert out[:, :40].std() == pytest.approx(np.sqrt(photons), rel=0.1)  # ... and its spread, without colour
    assert np.ptp(out[:, :40], axis=-1).max() == 0 and 0.4 <= shift <= 0.5
    assert np.ptp(out[:, 40:].mean((0, 1))) < 0.2 * 160                   # red averages towards grey


def test_jpeg_is_encoded_with_red_and_blue_swapped():
    image = scene(64, 80)
    file = io.BytesIO()
    quality = int(draws("compression", 0).integers(5, 11))
    Image.fromarray(image[..., ::-1].copy()).save(file, "JPEG", quality=quality, subsampling=2)
    assert np.array_equal(corrupt(image, "compression", 0), np.asarray(Image.open(file))[..., ::-1])


def test_motion_blur_of_a_point_is_one_straight_line():
    image = np.zeros((75, 75, 3), np.uint8)
    image[37, 37] = 255
    lengths, shifts = [], []
    for seed in range(300):
        out = corrupt(image, "motion_blur", seed)[..., 0]
        ys, xs = np.nonzero(out)
        n = max(np.ptp(ys), np.ptp(xs)) + 1
        assert len(ys) == n and (out[ys, xs] == np.rint(np.float32(255 / n))).all()     # 8-connected, equal weights
        direction = np.array([ys - ys.mean(), xs - xs.mean()])
        assert np.linalg.svd(direction, compute_uv=False)[1] / np.sqrt(n) < 0.5     # no tap off the line
        lengths.append(n)
        shifts.append(np.hypot(ys.mean() - 37, xs.mean() - 37))
    assert 2 <= min(lengths) and max(lengths) <= 35 and np.median(lengths) == pytest.approx(8, abs=2)
    assert np.mean(shifts) == pytest.approx(4.93, abs=0.8)


def test_zoom_blur_identity_draws_and_fixed_centre():
    image = scene(33, 33)
    identical = np.mean([np.array_equal(corrupt(image, "zoom_blur", seed), image) for seed in range(400)])
    assert identical == pytest.approx(0.18, abs=0.06)
    for seed in range(20):                                                # the centre pixel does not move
        assert (np.abs(corrupt(image, "zoom_blur", seed)[16, 16].astype(int) - image[16, 16]) <= 1).all()


def test_elastic_displacement():
    """A ramp of one level per pixel turns into a map of horizontal displacement."""
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 3)).copy()
    total, local = [], []
    y, x = np.mgrid[40:160, 40:160]
    plane = np.stack([y.ravel(), x.ravel(), np.ones(y.size)], 1)
    for seed in range(12):
        shift = corrupt(ramp, "elastic_transform", seed)[40:160, 40:160, 0].astype(float) - x
        total.append(np.abs(shift).mean())
        local.append((shift.ravel() - plane @ np.linalg.lstsq(plane, shift.ravel(), rcond=None)[0]).std())
    assert np.mean(local) == pytest.approx(100 * np.sqrt(1 / 3) / (20 * np.sqrt(np.pi)), rel=0.15)      # 1.63 px
    assert 1.5 < np.mean(total) < 6


def test_snow_and_rain_whiten_every_channel_alike():
    black = np.zeros((160, 160, 3), np.uint8)
    for name in ("snow", "rain"):
        out = np.stack([corrupt(black, name, seed) for seed in range(8)]).astype(int)
        assert np.ptp(out, axis=-1).max() == 0 and out.max() > 60
        assert out.max() <= (255 if name == "snow" else 240)
        half = np.stack([corrupt(black, name, seed, 0.5) for seed in range(8)])
        assert 0.3 < half.mean() / out.mean() < 0.7 and (half <= out + 3).mean() > 0.85     # fewer of the same specks


def test_fog_is_optical_depth_and_drawn_per_image():
    flat = np.full((96, 128, 3), 60, np.uint8)
    once, twice = (corrupt(flat, "fog", 4, s).astype(float).mean() for s in (1, 2))
    black, white = (corrupt(np.full((96, 128, 3), v, np.uint8), "fog", 4).astype(float).mean() for v in (0, 255))
    clear = (white - black) / 255                                         # share of the scene that shines through
    assert 0.28 < clear < 0.46 and once == pytest.approx(black + 60 * clear, abs=1.5)
    cloud = black / (1 - clear)
    assert 215 < cloud < 245 and twice == pytest.approx(cloud + clear ** 2 * (60 - cloud), abs=3)
    assert mad(corrupt(flat, "fog", 5), corrupt(flat, "fog", 4)) > 2


def test_color_jitter_is_a_function_of_colour():
    """Whatever the order of its steps: equal pixels stay equal, and white and black keep their rank."""
    image = scene(40, 40)
    image[0, 0], image[0, 1], image[20:22, 5] = 255, 0, image[3, 3]
    means = []
    for seed in range(60):
        out = corrupt(image, "color_jitter", seed).astype(int)
        assert (out[0, 0] >= out[0, 1]).all() and (out[20:22, 5] == out[3, 3]).all()
        means.append(out.mean() / image.mean())
    assert np.mean(means) == pytest.approx(1, abs=0.15) and 0.2 < np.std(means) < 0.45


# Ranges of output / input over the benchmark's own runs on five photographs, widened for a synthetic picture:
# mean, standard deviation, variance of the Laplacian, and PSNR in dB.
RANGES = {
    "snow": ((1.05, 2.0), (0.8, 1.4), (1.2, 14), (7, 18)),
    "fog": ((1.1, 2.6), (0.3, 0.5), (0.01, 0.3), (6.5, 17)),
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
    "contrast": ((0.8, 1.2), (1.2, 1.6), (1.6, 2.6), (16, 20)),
}


@pytest.mark.parametrize("name", NAMES)
def test_measured_ranges(name):
    rows = []
    for seed in range(12):
        image = scene(150, 200, seed % 3)
        out = corrupt(image, name, seed)
        psnr = 10 * np.log10(255 ** 2 / max(((out.astype(float) - image) ** 2).mean(), 1e-3))
        rows.append((out.mean() / image.mean(), out.std() / image.std(), laplacian(out) / laplacian(image), psnr))
    for value, (low, high), what in zip(np.median(rows, 0), RANGES[name], ("mean", "std", "Laplacian", "PSNR")):
        assert low <= value <= high, f"{what} {value:.3f} not in {low}..{high}"


def test_corruption_sheet(tmp_path):
    def run(*arguments):
        command = [sys.executable, corruptions.__file__, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    photo, sheet = tmp_path / "photo.jpg", tmp_path / "sheet.png"
    exif = Image.Exif()
    exif[274] = 6                                                         # lying on its side
    Image.fromarray(scene(90, 120)).save(photo, exif=exif)
    done = run(photo, "--out", sheet, "--size", 96)
    assert done.returncode == 0, done.stderr
    with Image.open(sheet) as picture:
        assert picture.mode == "RGB" and picture.height > 4 * 96
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photo.jpg", "sheet.png"]
    for bad in ([tmp_path / "none.jpg"], [corruptions.__file__], [photo, "--out", tmp_path / "no" / "sheet.png"],
                [photo, "--out", tmp_path / "sheet.what"], [photo, "--strength", "nan"]):
        failed = run(*bad, *([] if "--out" in bad else ["--out", tmp_path / "x.png"]))
        assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "Traceback" not in failed.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photo.jpg", "sheet.png"]


# ---------------------------------------------------------------------------------------------------------------------
# Data.
# ---------------------------------------------------------------------------------------------------------------------

HERE = os.path.dirname(os.path.abspath(data.__file__))


def picture(height=24, width=32, seed=0):
    """A smooth uint8 HxWx3 picture (JPEG keeps it nearly as it is)."""
    grid = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def square(height=24, width=32, at=(5, 7), side=6, count=1):
    masks = np.zeros((count, height, width), bool)
    for k in range(count):
        masks[k, at[1] + k:at[1] + k + side, at[0] + k:at[0] + k + side] = True
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


def data_cli(*args):
    command = [sys.executable, os.path.join(HERE, "data.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


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
        assert points.shape == (3, 2) and points.dtype == np.float32 and box.shape == (4,) and box.dtype == np.float32
        assert all(tuple(point) in inside for point in points.tolist())
        assert len(set(map(tuple, points.tolist()))) == min(3, len(inside))
        assert box.tolist() == [min(x for x, _ in inside), min(y for _, y in inside),
                                max(x for x, _ in inside), max(y for _, y in inside)]
        again, _ = data.prompts(mask, seed)
        assert (again == points).all() and (mask == before).all()
    # pinned: these points must not change from machine to machine or version to version
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
    sample = one[0]
    assert sample.masks().shape == (3, 24, 32) and sample.indices == (0, 2, 3)
    points, boxes = sample.prompts()
    other = [s for s in reversed(two) if s.name == "b"][0]
    assert other.indices == (0, 2, 3)  # also without masks() before
    assert (other.prompts()[0] == points).all() and (other.prompts(other.masks())[1] == boxes).all()
    for k, index in enumerate(sample.indices):
        assert (data.prompts(sample.masks()[k], data.seed_of("b", index))[0] == points[k]).all()
    assert [s.name for s in two] == ["a", "b"] and two[-1].name == "b" and len(pickle.dumps(two)) < 2000
    assert (pickle.loads(pickle.dumps(two))[1].image("fog") == sample.image("fog")).all()


def test_degraded_pixels_are_the_same_on_the_fly_and_from_the_folder(tmp_path):
    root = robustseg(tmp_path / "d", {stem: (picture(seed=k), square()) for k, stem in enumerate("abc")})
    sample = data.load_dataset(root, "test")[1]
    fly = {condition: sample.image(condition) for condition in data.CONDITIONS}
    assert list(fly) == ["clear", *data.CORRUPTIONS] and len(fly) == 16
    assert (sample.image("fog", seed=1) != sample.image("fog", seed=2)).any()
    assert (data.degrade(sample.image(), "snow", data.seed_of("b", "snow")) == fly["snow"]).all()
    done = data_cli(root, "--corrupt", "--split", "test")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "d" / "test"
    for condition in data.CORRUPTIONS:
        assert sorted(os.listdir(folder / condition)) == ["a.jpg", "b.jpg", "c.jpg"]
        assert (data.read_image(folder / condition / "b.jpg") == fly[condition]).all(), condition
    # a second run writes only what is missing, and files made by hand are used and kept
    (folder / "rain" / "a.jpg").unlink()
    Image.fromarray(picture(seed=9)).save(folder / "fog" / "b.png")
    (folder / "fog" / "b.jpg").unlink()
    old = os.stat(folder / "snow" / "a.jpg").st_mtime_ns
    assert data_cli(root, "--corrupt").returncode == 0
    assert (folder / "rain" / "a.jpg").exists() and not (folder / "fog" / "b.jpg").exists()
    assert os.stat(folder / "snow" / "a.jpg").st_mtime_ns == old
    sample = data.load_dataset(root, "test")[1]
    assert (sample.image("fog", seed=3) == picture(seed=9)).all() and (sample.image("rain") == fly["rain"]).all()
    Image.fromarray(picture(20, 20)).save(folder / "fog" / "b.png")
    with pytest.raises(data.SampleError, match="20 x 20.*32 x 24"):
        sample.image("fog")


def test_bad_samples_are_named_skipped_and_counted(tmp_path):
    good = (picture(), square())
    Image.fromarray(picture()).save(tmp_path / "x.jpg")
    jpg = (tmp_path / "x.jpg").read_bytes()
    np.save(tmp_path / "x.npy", square())
    npy = (tmp_path / "x.npy").read_bytes()
    np.save(tmp_path / "p.npy", np.array([{}], object), allow_pickle=True)
    bad = {"cut_jpg": (jpg[:len(jpg) // 2], square()), "text_jpg": (b"not a picture", square()),
           "empty_jpg": (b"", square()),
           "cut_npy": (picture(), npy[:-50]), "cut_head": (picture(), npy[:20]), "empty_npy": (picture(), b""),
           "text_npy": (picture(), b"not numbers"), "pickle": (picture(), (tmp_path / "p.npy").read_bytes()),
           "flat": (picture(), np.zeros(7)), "words": (picture(), np.full((1, 24, 32), "x")),
           "turned": (picture(), square(32, 24)), "void": (picture(), np.zeros((2, 24, 32), bool)),
           "none": (picture(), np.zeros((0, 24, 32), bool))}
    lone = {"lone_image": (picture(), None), "lone_mask": (None, square())}
    root = robustseg(tmp_path / "d", {"good": good, **bad, **lone})
    dataset = data.load_dataset(root, "test")
    assert len(dataset) == 14 and len(dataset.skipped) == 2
    assert "lone_image.jpg: no masks/lone_image.npy" in dataset.skipped[0]
    assert "lone_mask.npy: no image" in dataset.skipped[1]
    fine = []
    for sample in [*dataset, *dataset]:
        known = len(dataset.skipped)
        try:
            sample.image(), sample.masks()
            fine.append(sample.name)
        except data.SampleError as error:
            line = str(error)
            assert f"{sample.name}." in line and "\n" not in line, line
            assert dataset.skip(error) == (len(dataset.skipped) > known)
            assert str(pickle.loads(pickle.dumps(error))) == line
    assert fine == ["good", "good"] and len(dataset.skipped) == 2 + len(bad)  # each is counted once
    assert "14 images" in dataset.summary() and "15 files skipped" in dataset.summary()
    with pytest.raises(data.SampleError, match="24 x 32 pixels.*32 x 24"):
        [s for s in dataset if s.name == "turned"][0].masks()
    with pytest.raises(data.SampleError, match="lone_image"):
        data.load_dataset(root, "test", strict=True)
    strict = data.load_dataset(robustseg(tmp_path / "s", {"good": good, "void": bad["void"]}), "test", strict=True)
    assert len(strict) == 2  # what is inside the files shows only on reading
    with pytest.raises(data.SampleError):
        strict.skip(data.SampleError("x"))
    checked = data_cli(root, "--check", "--corrupt")
    assert checked.returncode == 0 and checked.stdout.count("skipped: ") == 2 + len(bad), checked


@pytest.mark.parametrize("masks, expected", [
    (np.array([[0, 1], [1, 0]], np.uint8), [[0, 1], [1, 0]]),
    (np.array([[0, 127], [128, 255]], np.uint8), [[0, 0], [1, 1]]),
    (np.array([[0.0, 0.5], [0.51, 1]], np.float32), [[0, 0], [1, 1]]),
    (np.array([[0, 1], [1, 1]], np.int64), [[0, 1], [1, 1]]),
    (np.array([[[False, True], [True, True]]]), [[0, 1], [1, 1]])])
def test_mask_files_of_every_number_type(tmp_path, masks, expected):
    np.save(tmp_path / "m.npy", masks)
    planes = data.read_planes(tmp_path / "m.npy")
    assert type(planes) is np.ndarray and planes.dtype == bool and planes.shape == (1, 2, 2)
    assert (planes[0] == np.array(expected, bool)).all()


def test_every_kind_of_picture_becomes_upright_rgb(tmp_path):
    rgb = picture(20, 30)
    grey = rgb[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([rgb, 255 - grey])).save(tmp_path / "rgba.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(rgb).quantize(64).save(tmp_path / "palette.png")
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the stored picture must be rotated clockwise by a quarter
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    for name in os.listdir(tmp_path):
        image = data.read_image(tmp_path / name)
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.flags.writeable
        assert image.shape[:2] == data.image_size(tmp_path / name) == ((30, 20) if name == "turned.png" else (20, 30))
    for name in ("grey.png", "deep.png"):
        assert (data.read_image(tmp_path / name) == grey[..., None]).all()
    assert (data.read_image(tmp_path / "rgba.png") == rgb).all()
    assert (data.read_image(tmp_path / "turned.png") == np.rot90(rgb, -1)).all()
    assert np.abs(data.read_image(tmp_path / "cmyk.jpg") - rgb.astype(float)).mean() < 6
    # upper-case endings are found, and what macOS leaves beside them is not taken for a picture
    root = tmp_path / "d"
    robustseg(root, {"a": (None, square(30, 20)[0])})
    (root / "test" / "clear" / "a.PNG").write_bytes((tmp_path / "turned.png").read_bytes())
    (root / "test" / "clear" / "._a.jpg").write_bytes(b"")
    dataset = data.load_dataset(root, "test")
    assert dataset[0].masks().shape == (1, 30, 20) and not dataset.skipped


def test_demo_scenes():
    counts = []
    for seed in range(40):
        image, masks = data.demo_scene(seed)
        assert image.dtype == np.uint8 and image.shape[2] == 3
        assert masks.dtype == bool and masks.shape[1:] == image.shape[:2]
        assert max(image.shape) == 128 and min(image.shape[:2]) in (96, 112, 128)
        assert masks.sum(0).max() == 1 and masks.sum((1, 2)).min() >= 60  # disjoint, and none is a speck
        counts.append(len(masks))
    assert 1 <= min(counts) and max(counts) <= 6 and np.mean(counts) > 2.5
    again = data.demo_scene(7)
    assert all((a == b).all() for a, b in zip(again, data.demo_scene(7)))
    assert again[0].shape != data.demo_scene(8)[0].shape or (again[0] != data.demo_scene(8)[0]).any()
    assert max(data.demo_scene(3, size=64)[0].shape) == 64


def test_make_demo_writes_a_dataset_or_nothing(tmp_path):
    root = tmp_path / "demo"
    data.make_demo(root, train=3, val=2, test=2)
    assert os.listdir(tmp_path) == ["demo"] and sorted(os.listdir(root)) == ["test", "train", "val"]
    splits = {split: data.load_dataset(root, split) for split in ("train", "val", "test")}
    assert [len(d) for d in splits.values()] == [3, 2, 2] and not any(d.skipped for d in splits.values())
    stored = [sample.masks().tobytes() for dataset in splits.values() for sample in dataset]
    assert len(set(stored)) == 7  # no scene twice
    data.make_demo(tmp_path / "again", train=1, val=0, test=2)
    assert sorted(os.listdir(tmp_path / "again")) == ["test", "train"]
    again = data.load_dataset(tmp_path / "again", "train")[0]
    assert (again.image() == splits["train"][0].image()).all() and (again.masks() == splits["train"][0].masks()).all()
    with pytest.raises(data.DatasetError, match="not an empty folder"):
        data.make_demo(root, 1, 1, 1)


def test_errors_say_what_was_looked_for(tmp_path):
    root = robustseg(tmp_path / "d", {"a": (picture(), square())})
    robustseg(tmp_path / "d", {"a": (picture(), None)}, "val")
    os.makedirs(tmp_path / "d" / "train" / "clear")
    os.makedirs(tmp_path / "void")
    for arguments, words in (((str(tmp_path / "nowhere"), "test"), ["nowhere", "no such folder"]),
                             ((root, "tset"), ["tset", "test, train, val"]), ((root, "train"), ["masks", "masks.zip"]),
                             ((root, "val"), ["1 images", "0 .npy"]),
                             ((str(tmp_path / "void"), "test"), ["no dataset", "clear"]),
                             ((os.path.join(root, "test"), "test"), ["parent folder"])):
        with pytest.raises(FileNotFoundError) as caught:
            data.load_dataset(*arguments)
        assert isinstance(caught.value, data.DatasetError) and all(word in str(caught.value) for word in words)
        assert "\n" not in str(caught.value)
    with pytest.raises(data.DatasetError, match="robustseg"):
        data.load_dataset(root, "test", kind="coco")
    with pytest.raises(data.DatasetError, match="impulse_noise"):
        data.load_dataset(root, "test")[0].image("haze")


def test_data_command_line(tmp_path):
    root = robustseg(tmp_path / "d", {"a": (picture(), square(count=2))})
    sheet = tmp_path / "sheet.png"
    shown = data_cli(root, "--sheet", sheet)
    assert shown.returncode == 0 and "1 images with masks, 0 files skipped" in shown.stdout
    assert Image.open(sheet).width > 100
    for mistake in ((tmp_path / "nowhere",), (root, "--split", "x"), (root, "--make-demo"), (root, "--frobnicate"), (),
                    (root, "--sheet", tmp_path / "no" / "where.png"), (root, "--sheet", tmp_path / "d")):
        done = data_cli(*mistake)
        errors = [line for line in done.stderr.splitlines() if "reading" not in line]  # less the progress line
        assert done.returncode == 2 and len(errors) == 1 and errors[0].startswith("error: "), (mistake, done)


# ---------------------------------------------------------------------------------------------------------------------
# Training and evaluation.
# ---------------------------------------------------------------------------------------------------------------------
