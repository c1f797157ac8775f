"""The demo dataset's painter: how a scene is drawn. `data.make_demo` writes the dataset; nothing else needs this file.

Shapes are lists of (outline, value): polygons in the unit disc, drawn in turn with value 1 (add) or 0 (cut out) at
four times the resolution. So unions, holes and exact edges need no geometry.
"""
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from corruptions import generator


def _turn(points, angle):
    """Points n x 2, turned about the origin."""
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s], [-s, c]])


def _circle(angle):
    """Points of the unit circle, n x 2, at the angles n x 1."""
    return np.concatenate([np.cos(angle), np.sin(angle)], 1)


def _outline(rng):
    """A random outline in the unit disc, n x 2: polygon, star, or a blob whose radius is a short Fourier series."""
    kind = rng.choice(["polygon", "star", "blob"], p=[0.35, 0.15, 0.5])
    sides = rng.integers(3, 8)
    rays = rng.integers(4, 8)
    n = {"polygon": sides, "star": 2 * rays, "blob": 60}[kind]
    angle = 2 * np.pi * np.arange(n)[:, None] / n

    radius = np.ones((n, 1))
    if kind == "polygon" and rng.random() < 0.6:
        radius = rng.uniform(0.7, 1, (n, 1))
    elif kind == "star":
        radius[1::2] = rng.uniform(0.45, 0.65)
    elif kind == "blob" and rng.random() < 0.75:  # else a disc
        wave = np.arange(1, 6)
        phase = rng.uniform(0, 6.3, 5)
        amplitude = rng.normal(0, 0.4, (5, 1)) / wave[:, None]
        radius = 1 + np.cos(angle * wave + phase) @ amplitude
        radius = radius.clip(0.25) / radius.max()
    squeeze = 1, rng.uniform(0.5, 1)
    return radius * _circle(angle) * squeeze


def _stroke(rng):
    """A thick stroke: a chain of discs along a quadratic curve."""
    disc = rng.uniform(0.18, 0.28) * _circle(np.arange(14)[:, None] * (2 * np.pi / 14))
    bend = rng.uniform(-1.6, 1.6)
    rise = rng.uniform(-0.4, 0.4)
    a, b, c = np.array([(-0.75, 0), (0, bend), (0.75, rise)])
    t = np.linspace(0, 1, 32)[:, None]
    path = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t ** 2 * c
    return [(disc + at, 1) for at in path]


def _shape(rng):
    """A random shape, list of (outline, value): one outline, two, one with a hole or a bite, or a thick stroke."""
    kind = rng.choice(["one", "union", "hole", "bite", "stroke"], p=[0.5, 0.15, 0.1, 0.1, 0.15])
    if kind == "stroke":
        return _stroke(rng)
    first = _outline(rng)
    second = _outline(rng)
    second = _turn(second, rng.uniform(0, 6.3))
    if kind == "union":
        return [(0.7 * first - (0.3, 0), 1), (0.6 * second + (0.4, 0), 1)]
    if kind == "hole":
        return [(first, 1), (0.4 * second, 0)]
    if kind == "bite":
        return [(first, 1), (0.5 * second + (0.9, 0), 0)]
    return [(first, 1)]


def _cover(outlines, shape):
    """float32 HxW: the part of each pixel that the outlines (in pixels) cover, 0..1."""
    height, width = shape
    page = Image.new("L", (4 * width, 4 * height))
    pen = ImageDraw.Draw(page)
    for outline, value in outlines:
        pen.polygon((outline * 4).ravel().tolist(), fill=255 * value)
    return np.asarray(page.reduce(4), np.float32) / 255


def _soften(field, radius):
    """Gaussian blur of a float32 HxW field in 0..1."""
    page = Image.fromarray((field * 255).astype(np.uint8))
    page = page.filter(ImageFilter.GaussianBlur(float(radius)))
    return np.asarray(page, np.float32) / 255


def _blend(under, over, alpha):
    return under + alpha[..., None] * (over - under)


def _noise(rng, shape, coarsest=4):
    """Fractal noise, float32 HxW in 0..1: random grids, enlarged smoothly, each finer and weaker than the last."""
    noise = np.zeros(shape, np.float32)
    strength = 1.0
    n = coarsest
    while n <= 32:
        grid = Image.fromarray(rng.random((n, n), np.float32))
        noise += strength * np.asarray(grid.resize(shape[::-1], Image.Resampling.BICUBIC))
        strength *= rng.uniform(0.4, 0.7)
        n *= 2
    return (noise - noise.min()) / np.ptp(noise)


def _colour(rng, vivid):
    """A bright, saturated colour, or a dim, greyish one: float32 3 in 0..1."""
    tint = rng.random(3)
    value = rng.uniform(0.65, 1) if vivid else rng.uniform(0.15, 0.6)
    saturation = rng.uniform(0, 0.5) + 0.5 * vivid
    grey = (tint.max() - tint) / np.ptp(tint)
    return (value * (1 - saturation * grey)).astype(np.float32)


PATTERNS = ("stripes", "wood", "checks", "dots")


def _pattern(rng, shape, kinds=PATTERNS):
    """float32 HxW in 0..1: a pattern of one of these kinds."""
    kind = rng.choice(kinds)
    angle = rng.uniform(0, 6.3)
    wave = 2 * np.pi / rng.uniform(5, 18)
    sharp = rng.uniform(0.6, 4)
    c, s = float(np.cos(angle)), float(np.sin(angle))
    y, x = np.indices(shape, np.float32)
    u = wave * (x * c + y * s)
    v = wave * (y * c - x * s)

    if kind == "flat":
        return np.zeros_like(x)
    if kind == "gradient":
        return (u - u.min()) / np.ptp(u)
    if kind == "noise":
        return _noise(rng, shape, int(rng.choice([3, 6, 12])))
    if kind == "stripes":
        relief = np.sin(u)
    elif kind == "wood":
        relief = np.sin(u + 9 * _noise(rng, shape))
    elif kind == "checks":
        relief = 1.5 * np.sin(u) * np.sin(v)
    else:
        relief = np.cos(u) + np.cos(v) - 0.7
    return (0.5 + sharp * relief).clip(0, 1)


def _texture(rng, shape, colour, strength):
    """float32 HxWx3: a pattern of `colour` and a colour up to `strength` away from it (RGB distance)."""
    pattern = _pattern(rng, shape, ("flat", "gradient", "noise", *PATTERNS))
    step = rng.normal(0, 1, 3)
    step += 1.5 * rng.choice([-1, 1])  # mostly lighter or darker, a little of another hue
    contrast = rng.uniform(0.3, 1) * strength * step / np.linalg.norm(step)
    return colour + pattern[..., None] * contrast.astype(np.float32)


def _background(rng, shape):
    """float32 HxWx3: textures, and clutter with edges that close around nothing, so that an edge alone is no object."""
    height, width = shape

    def ground():
        return _texture(rng, shape, _colour(rng, vivid=False), 0.25)

    def bar(half):  # a straight bar across the image, 2 `half` pixels thick
        outline = np.array([(-9, -1), (9, -1), (9, 1), (-9, 1)]) * (max(shape), half)
        middle = rng.uniform(0.1, 0.9, 2) * (width, height)
        outline = _turn(outline, rng.uniform(0, 6.3)) + middle
        return _cover([(outline, 1)], shape)

    canvas = ground()
    if rng.random() < 0.5:  # a broad band of another ground, with sharp or soft borders
        other = ground()
        band = bar(rng.uniform(0.2, 1) * max(shape))
        canvas = _blend(canvas, other, _soften(band, rng.choice([0, 3, 8])))
    if rng.random() < 0.5:  # clouds of another texture, without a border
        other = ground()
        clouds = (_noise(rng, shape, 2) - 0.55) * 3
        canvas = _blend(canvas, other, clouds.clip(0, rng.uniform(0.3, 0.7)))
    for _ in range(rng.integers(0, 5)):  # lines from border to border
        colour = _colour(rng, vivid=False)
        line = bar(rng.uniform(0.3, 1.2))
        canvas = _blend(canvas, colour, line * rng.uniform(0.3, 0.9))
    return canvas.clip(0, 1)


def _shadow(rng, cover, light):
    """float32 HxW: the shadow of an object, moved away from the light."""
    height, width = cover.shape
    x = 6 - round(rng.uniform(2, 6) * light[0])
    y = 6 - round(rng.uniform(2, 6) * light[1])
    moved = np.pad(cover, 6)[y:, x:][:height, :width]
    return _soften(moved, rng.uniform(1, 4))


def _paint(rng, canvas, cover, light, patterned):
    """The canvas with one more object: its shadow, its own texture, shading. `patterned`: see demo_scene."""
    if rng.random() < 0.4:
        shadow = _shadow(rng, cover, light)
        canvas = canvas * (1 - rng.uniform(0.2, 0.5) * shadow)[..., None]

    behind = (canvas * cover[..., None]).sum((0, 1)) / cover.sum()
    contrast = rng.uniform(0.3, 0.8)
    colour = _colour(rng, vivid=True)
    while np.linalg.norm(colour - behind) < contrast:  # from subtle to obvious, never invisible
        contrast *= 0.95
        colour = _colour(rng, vivid=True)

    skin = _texture(rng, cover.shape, colour, rng.uniform(0.1, 0.4))
    if patterned and rng.random() < patterned:
        second = _colour(rng, vivid=True)
        skin = _blend(skin, second, _pattern(rng, cover.shape))

    dome = _soften(cover, rng.uniform(1.5, 5))
    down, right = np.gradient(dome)
    relief = rng.uniform(0, 4) * (right * light[0] + down * light[1])
    rim = rng.uniform(0, 0.3) * (1 - dome)
    shade = 1 + relief - rim
    return _blend(canvas, (skin * shade[..., None]).clip(0, 1), cover)


def demo_scene(seed, size=128, patterned=0.5):
    """A synthetic image: uint8 HxWx3, bool NxHxW (N >= 1); long side `size`. The same for the same seed.

    Sharp, well lit and free of noise, vivid objects on dull grounds: a model that has seen nothing else learns to rely
    on that, as any model does on what its images have in common, and is not robust before it is made so. `patterned`
    is the chance that an object has a bold pattern of two colours. The tiny SAM has seen none (patterned=0), and may
    take a stripe for the object: to it the demo is what LVIS is to SAM, a dataset with its own idea of an object.
    Objects are painted back to front and a mask is what remains visible: masks never overlap, boxes do. An object that
    is mostly hidden (less than 35 % or 250 pixels of 128 x 128 remain) stays in the image without a mask.
    """
    rng = generator(seed)
    scale = size / 128
    least = 250 * scale ** 2  # pixels
    sides = size, int(size * rng.choice([0.75, 0.875, 1, 1]))
    shape = height, width = sides if rng.random() < 0.5 else sides[::-1]
    canvas = _background(rng, shape)
    light = _turn(np.array([1.0, 0.0]), rng.uniform(0, 6.3)).tolist()

    owner = np.full(shape, -1)  # the number of the object that is seen
    areas = []
    wanted = rng.integers(2, 5)
    while len(areas) < wanted:
        radius = scale * np.exp(rng.uniform(np.log(18), np.log(48)))
        angle = rng.uniform(0, 6.3)
        middle = rng.uniform(0.08, 0.92, 2) * (width, height)
        outlines = [(_turn(outline, angle) * radius + middle, value) for outline, value in _shape(rng)]
        cover = _cover(outlines, shape)
        inside = cover > 0.5
        if inside.sum() >= least:
            canvas = _paint(rng, canvas, cover, light, patterned)
            owner[inside] = len(areas)
            areas.append(inside.sum())

    image = (canvas * 255).clip(0, 255).round().astype(np.uint8)
    masks = owner == np.arange(len(areas))[:, None, None]
    enough = np.maximum(least, 0.35 * np.array(areas))
    return image, masks[masks.sum((1, 2)) >= enough]
