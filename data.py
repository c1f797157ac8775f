"""Every dataset as one kind of sample: a picture, the masks of its objects, and the prompts that ask for them.

The big idea: nothing depends on order. A prompt, a corruption or a demo scene draws from a seed made of NAMES (of the
picture, of the condition, the number of the mask). So two people, two methods and any number of workers see the same
points, the same boxes and the same noise.

Layout of Robust-Seg as released; the demo dataset is written in exactly this layout:

    ROOT/{train,val,test,coco,lvis}/clear/<stem>.jpg            pictures (also .jpeg, .png)
                                    masks/<stem>.npy            [N,H,W], or [H,W] for one object
                                    <corruption>/<stem>.jpg     optional: degraded pictures made beforehand

A degraded picture that is not on the disk is made on the fly; `--corrupt` writes the very same pixels to the disk.

    python data.py ROOT [--split test] [--sheet sheet.png]      what is in it: counts, sizes, a contact sheet
    python data.py ROOT --check                                 read every file and name the bad ones
    python data.py ROOT --corrupt [--split test]                write one folder per corruption; resumable
    python data.py demo/ --make-demo                            make the synthetic dataset (half a minute)
"""
import argparse
import io
import multiprocessing
import os
import shutil
import signal
import struct
import sys
import time
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageOps

from corruptions import CORRUPTIONS, corrupt

CONDITIONS = ("clear", *CORRUPTIONS)
PICTURES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
# What Pillow and numpy raise on a damaged file, as opposed to a mistake in this program.
DAMAGED = (OSError, ValueError, EOFError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError)


class DatasetError(Exception):
    """The dataset cannot be used as asked. One line: what was looked for, what was found, what to do."""


class MissingError(DatasetError, FileNotFoundError):
    """A folder is not there."""


class SampleError(DatasetError):
    """One sample is bad, the others are not. One line that begins with the file."""


def _why(error):
    """An exception as half a line, without the path, which the caller names."""
    return getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0].split(" '")[0]


def seed_of(*parts):
    """A 32-bit seed from names: seed_of("00012", "fog"). Equal parts give equal seeds on every machine."""
    return zlib.crc32("/".join(map(str, parts)).encode())


class Progress:
    """`label  done/total  rate  time left` on stderr: a line that changes on a terminal, one every 10 s in a log."""

    def __init__(self, label, total):
        self.label, self.total, self.done = label, total, 0
        self.start = self.shown = time.monotonic()

    def update(self, n=1, last=False):
        self.done += n
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if last or now - self.shown >= (0.1 if terminal else 10):
            self.shown, rate = now, self.done / max(now - self.start, 1e-9)
            seconds = round(now - self.start if last else (self.total - self.done) / max(rate, 1e-9))
            clock = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} {'in all' if last else 'left'}"
            line = f"{self.label}  {self.done:,}/{self.total:,}  {rate:.1f}/s  {clock}"
            print(f"\r{line:<79}" if terminal else line, end="" if terminal and not last else "\n", file=sys.stderr,
                  flush=True)

    def close(self):
        self.update(0, last=True)


# ---------------------------------------------------------------- pictures

def read_image(path):
    """uint8 HxWx3 RGB, upright. Grey, palette, CMYK and 16-bit pictures are converted, alpha is dropped."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits a pixel: convert("RGB") would clip at 255 instead of scaling
                image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
            return np.array(image.convert("RGB"))
    except DAMAGED as error:
        raise SampleError(f"{path}: cannot read this image ({_why(error)})") from None


def save_png(picture, path):
    """Writes a Pillow image as a PNG: whole, or not at all. DatasetError."""
    try:
        picture.save(f"{path}.part", "PNG")
        os.replace(f"{path}.part", path)
    except OSError as error:
        if os.path.exists(f"{path}.part"):
            os.remove(f"{path}.part")
        raise DatasetError(f"{path}: cannot write this picture ({_why(error)})") from None


def image_size(path):
    """(H, W) of the upright picture, from the file's header alone."""
    try:
        with Image.open(path) as file:
            sideways = file.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 swap the sides
            return file.size if sideways else file.size[::-1]
    except DAMAGED as error:
        raise SampleError(f"{path}: cannot read this image ({_why(error)})") from None


def degraded_jpeg(image, condition, seed):
    """The degraded picture as the bytes of a JPEG, quality 95, 4:2:0: Robust-Seg stores its own that way."""
    file = io.BytesIO()
    Image.fromarray(corrupt(image, condition, seed)).save(file, "JPEG", quality=95, subsampling="4:2:0")
    return file.getvalue()


def degrade(image, condition, seed):
    """uint8 HxWx3 -> uint8 HxWx3 in one of CONDITIONS, through the same JPEG bytes that `--corrupt` writes."""
    return image if condition == "clear" else np.array(Image.open(io.BytesIO(degraded_jpeg(image, condition, seed))))


# ---------------------------------------------------------------- prompts and samples

def prompts(mask, seed):
    """Three points and the box that ask for `mask` (bool HxW): float32 3x2 (x, y), float32 4 (x0, y0, x1, y1).

    All are indices of pixels, as clicks are. Points are drawn evenly from the mask's pixels, all different (a mask of
    one or two repeats them); x1 and y1 are the last column and row that it touches. ValueError on an empty mask.
    """
    mask = np.asarray(mask, bool)
    pixels = np.flatnonzero(mask)
    if not len(pixels):
        raise ValueError("an empty mask has no prompts")
    if len(pixels) < 3:
        pixels = np.resize(pixels, 3)
    # The first three steps of a shuffle. Spelled out, because numpy may change choice() from version to version.
    for k, draw in enumerate(np.random.default_rng(seed).random(3)):
        other = k + int(draw * (len(pixels) - k))
        pixels[[k, other]] = pixels[[other, k]]
    y, x = np.divmod(pixels[:3], mask.shape[1])
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)
    return np.stack([x, y], 1).astype(np.float32), box


class Sample:
    """One picture with its objects. Holds paths and no pixels; what it reads may raise SampleError.

    name: the stem, from which all seeds derive. folder: where clear/ and the corruption folders (`ready`) are.
    read(source): the planes of the masks, bool NxHxW.
    """
    __slots__ = ("name", "folder", "clear", "ready", "read", "source", "_indices")

    def __init__(self, name, folder, file, ready, read, source):
        self.name, self.folder, self.clear, self.ready = name, folder, os.path.join(folder, "clear", file), ready
        self.read, self.source, self._indices = read, source, None

    def image(self, condition="clear", seed=None):
        """uint8 HxWx3. A degraded picture is read from its folder if it is there, else made from `seed`."""
        if condition not in CONDITIONS:
            raise DatasetError(f"no condition {condition!r}; there are: {', '.join(CONDITIONS)}")
        for ending in PICTURES if condition in self.ready else ():
            path = os.path.join(self.folder, condition, self.name + ending)
            if os.path.exists(path):
                image = read_image(path)
                self._same_size(path, image.shape[:2])
                return image
        return degrade(read_image(self.clear), condition, seed_of(self.name, condition) if seed is None else seed)

    def masks(self):
        """bool NxHxW, N >= 1, one plane per object. Planes without a pixel are dropped: `indices` says what remains."""
        try:
            planes = self.read(self.source)
        except DAMAGED as error:
            raise SampleError(f"{self.source}: cannot read these masks ({_why(error)})") from None
        self._same_size(self.source, planes.shape[1:])
        filled = np.flatnonzero(planes.any((1, 2)))
        if not len(filled):
            raise SampleError(f"{self.source}: none of its {len(planes)} masks has a pixel")
        self._indices = tuple(filled.tolist())
        return planes if len(filled) == len(planes) else planes[filled]

    @property
    def indices(self):
        """The number in the file of each plane of masks(). Seeds use it: a dropped plane shifts nobody's prompts."""
        if self._indices is None:
            self.masks()
        return self._indices

    def prompts(self, masks=None):
        """The prompts of all masks: float32 Nx3x2 points, float32 Nx4 boxes. Pass masks() if already read."""
        masks = self.masks() if masks is None else masks
        both = [prompts(mask, seed_of(self.name, index)) for mask, index in zip(masks, self.indices, strict=True)]
        return np.stack([points for points, _ in both]), np.stack([box for _, box in both])

    def _same_size(self, path, size):
        (height, width), (h, w) = image_size(self.clear), size
        if (h, w) != (height, width):
            raise SampleError(f"{path}: is {w} x {h} pixels (width x height), but {self.clear} is {width} x {height}")


class Dataset(Sequence):
    """The samples of one split, sorted by name.

    A missing file is known from the listing, a damaged one only when it is read. So whoever reads catches SampleError
    and hands it to skip(), which keeps the account in `skipped` (a line each) or, when strict, raises.
    """

    def __init__(self, root, split, kind, samples, strict=False):
        self.root, self.split, self.kind, self.samples, self.strict = root, split, kind, samples, strict
        self.skipped = []

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

    def skip(self, error):
        """Counts a bad sample. True when it is new, so that the caller reports it once."""
        if self.strict:
            raise error
        new = str(error) not in self.skipped
        self.skipped += [str(error)] * new
        return new

    def summary(self):
        return (f"{os.path.join(self.root, self.split)} ({self.kind}): {len(self):,} images with masks, "
                f"{len(self.skipped):,} files skipped")


def spread(dataset, most):
    """At most `most` samples, evenly spread over the dataset: a list."""
    count = min(most, len(dataset))
    return [dataset[k * len(dataset) // count] for k in range(count)]


# ---------------------------------------------------------------- readers, one per kind of dataset

def _stems(folder, endings):
    """{stem: file name}. Hidden files are left out: an archive made by macOS holds a "._x.jpg" beside each "x.jpg"."""
    files = [file for file in os.listdir(folder) if file.lower().endswith(endings) and not file.startswith(".")]
    return {os.path.splitext(file)[0]: file for file in sorted(files, reverse=True)}


def read_planes(path):
    """bool NxHxW from an .npy file of bool, 0/1, 0..255 or float; ValueError on anything else."""
    planes = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped, so that only the bool copy takes memory
    shape, dtype = getattr(planes, "shape", ()), getattr(planes, "dtype", np.dtype(object))
    if len(shape) not in (2, 3) or dtype.kind not in "biuf":
        raise ValueError(f"expected numbers of shape [N,H,W], found {dtype} {list(shape)}")
    planes = np.asarray(planes if len(shape) == 3 else planes[None])
    if planes.dtype.kind == "f":
        return planes > 0.5
    # The soft edges of a 0..255 mask are cut in the middle; a 0/1 mask has none.
    return planes > 0 if planes.max(initial=0) <= 1 else planes >= 128


def robustseg_splits(root):
    """Names of the folders in root that hold a clear/ folder, sorted."""
    return sorted(d for d in os.listdir(root) if os.path.isdir(os.path.join(root, d, "clear")))


def robustseg_samples(root, split):
    """(samples, one line for each file without its partner)."""
    folder = os.path.join(root, split)
    clear, stacks = os.path.join(folder, "clear"), os.path.join(folder, "masks")
    if not os.path.isdir(stacks):
        raise MissingError(f"{stacks}: no such folder; unpack the split's masks.zip there (one .npy per image)")
    images, masks = _stems(clear, PICTURES[:3]), _stems(stacks, ".npy")
    ready = frozenset(c for c in CORRUPTIONS if os.path.isdir(os.path.join(folder, c)))
    samples = [Sample(stem, folder, images[stem], ready, read_planes, os.path.join(stacks, masks[stem]))
               for stem in sorted(images.keys() & masks.keys())]
    if not samples:
        raise MissingError(f"{folder}: no image has its masks ({len(images):,} images in clear/, {len(masks):,} .npy "
                           "files in masks/); the two must have the same name up to the ending")
    lone = [f"{os.path.join(clear, images[stem])}: no masks/{stem}.npy" for stem in images.keys() - masks.keys()]
    lone += [f"{os.path.join(stacks, masks[stem])}: no image clear/{stem}.*" for stem in masks.keys() - images.keys()]
    return samples, sorted(lone)


# kind: (names of the splits in a folder, none if it is not of this kind; the samples of one split)
KINDS = {"robustseg": (robustseg_splits, robustseg_samples)}


def find_splits(root, kind="auto"):
    """(kind, names of its splits). "auto" is the first kind that knows the folder."""
    if kind not in ("auto", *KINDS):
        raise DatasetError(f"no dataset kind {kind!r}; there are: auto, {', '.join(KINDS)}")
    if not os.path.isdir(root):
        raise MissingError(f"{root}: no such folder (python data.py demo/ --make-demo makes a small dataset)")
    for name in KINDS if kind == "auto" else [kind]:
        if splits := KINDS[name][0](root):
            return name, splits
    if os.path.isdir(os.path.join(root, "clear")):
        raise MissingError(f"{root}: this is one split of a dataset; name its parent folder and choose the split")
    raise MissingError(f"{root}: no dataset found; expected {os.path.join(root, '<split>', 'clear')} with images and "
                       f"{os.path.join(root, '<split>', 'masks')} with .npy files")


def load_dataset(root, split, kind="auto", strict=False):
    """One split as a Dataset. strict: a bad or missing file is an error, else it is skipped and counted."""
    root = os.fspath(root)
    kind, splits = find_splits(root, kind)
    if split not in splits:
        raise MissingError(f"{root}: no split {split!r} (no folder {os.path.join(root, split, 'clear')}); "
                           f"there are: {', '.join(splits)}")
    samples, lone = KINDS[kind][1](root, split)
    dataset = Dataset(root, split, kind, samples, strict)
    for line in lone:
        dataset.skip(SampleError(line))
    return dataset


# ---------------------------------------------------------------- the demo: one scene
# Shapes are lists of (outline, value): polygons in the unit disc, drawn in turn with value 1 (add) or 0 (cut out) at
# four times the resolution. So unions, holes and exact edges need no geometry.


def _turn(points, angle):
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s], [-s, c]])


def _round(n=40, radius=1.0, at=(0.0, 0.0)):
    """The corners of a regular polygon, n x 2; with many corners it is a disc."""
    angle = 2 * np.pi * np.arange(n) / n
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1) + at


def _shape(rng, plain=False):
    """A random shape: list of (outline, value)."""
    kinds = ["ellipse", "rectangle", "polygon", "star", "blob"]
    kind = rng.choice(kinds if plain else kinds + ["blob", "ring", "crescent", "stroke", "letter", "union", "bite"])
    if kind == "ellipse":
        return [(_round() * (1, rng.uniform(0.45, 1)), 1)]
    if kind == "rectangle":
        return [(np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (0.8, rng.uniform(0.35, 0.8)), 1)]
    if kind == "polygon":
        n = rng.integers(3, 8)
        return [(_round(n) * (rng.uniform(0.7, 1, (n, 1)) if rng.random() < 0.6 else 1), 1)]
    if kind == "star":
        n = rng.integers(4, 8)
        return [(_round(2 * n) * np.tile([1, rng.uniform(0.4, 0.65)], n)[:, None], 1)]
    if kind == "blob":  # the radius is a short Fourier series
        angle, wave = np.arange(60)[:, None] * (2 * np.pi / 60), np.arange(1, 6)
        radius = 1 + np.cos(angle * wave + rng.uniform(0, 6.3, 5)) @ (rng.normal(0, 0.4, (5, 1)) / wave[:, None])
        return [(_round(60) * radius.clip(0.25) / radius.max(), 1)]
    if kind == "ring":
        return [(_round() * (1, 0.85), 1), (_round(40, rng.uniform(0.35, 0.6), rng.uniform(-0.12, 0.12, 2)), 0)]
    if kind == "crescent":
        return [(_round(), 1), (_round(40, rng.uniform(0.6, 0.85), (rng.uniform(0.45, 0.7), 0)), 0)]
    if kind == "stroke":  # a chain of discs along a quadratic curve
        t, width = np.linspace(0, 1, 32)[:, None], rng.uniform(0.18, 0.28)
        a, b, c = np.array([(-0.75, 0), (0, rng.uniform(-1.6, 1.6)), (0.75, rng.uniform(-0.4, 0.4))])
        return [(_round(14, width, at), 1) for at in (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t ** 2 * c]
    if kind == "letter":  # two bars: L, T, X and their kin
        bar, angle = np.array([(-1, -0.2), (1, -0.2), (1, 0.2), (-1, 0.2)]), rng.choice([1.0, np.pi / 2])
        return [(bar * 0.8, 1), (_turn(bar * rng.uniform(0.6, 0.8), angle) + rng.choice([-0.6, 0, 0.6], 2), 1)]
    first, second, angle = _shape(rng, plain=True), _shape(rng, plain=True), rng.uniform(0, 6.3)
    if kind == "union":
        return [(p * 0.7 - (0.3, 0), 1) for p, _ in first] + [(_turn(p * 0.6, angle) + (0.4, 0), 1) for p, _ in second]
    return first + [(_turn(p * 0.5, angle) + (0.9, 0), 0) for p, _ in second]  # a bite out of the side


def _cover(outlines, height, width):
    """float32 HxW: the part of each pixel that the outlines (in pixels) cover, 0..1."""
    page = Image.new("L", (4 * width, 4 * height))
    pen = ImageDraw.Draw(page)
    for outline, value in outlines:
        pen.polygon((outline * 4).ravel().tolist(), fill=255 * value)
    return np.asarray(page.reduce(4), np.float32) / 255


def _soften(field, radius):
    """Gaussian blur of a float32 HxW field in 0..1."""
    page = Image.fromarray((field * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(float(radius)))
    return np.asarray(page, np.float32) / 255


def _blend(under, over, alpha):
    return under + alpha[..., None] * (over - under)


def _noise(rng, height, width, coarsest=4):
    """Fractal noise, float32 HxW in 0..1: random grids, enlarged smoothly, each finer and weaker than the last."""
    field, strength, n = np.zeros((height, width), np.float32), 1.0, coarsest
    while n <= 32:
        grid = Image.fromarray(rng.random((n, n), np.float32)).resize((width, height), Image.Resampling.BICUBIC)
        field += strength * np.asarray(grid)
        strength, n = strength * rng.uniform(0.4, 0.7), 2 * n
    return (field - field.min()) / np.ptp(field)


def _colour(rng):
    tint = rng.random(3)
    return (rng.uniform(0.2, 1) * (1 - rng.random() * (1 - tint / tint.max()))).astype(np.float32)


def _texture(rng, height, width, colour, strength):
    """float32 HxWx3: a pattern of `colour` and a colour up to `strength` away from it (RGB distance)."""
    kind = rng.choice(["flat", "gradient", "noise", "stripes", "wood", "checks", "dots"])
    angle, wave, sharp = rng.uniform(0, 6.3), 2 * np.pi / rng.uniform(5, 18), rng.uniform(0.6, 4)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    u, v = (wave * p for p in (x * float(np.cos(angle)) + y * float(np.sin(angle)),
                               y * float(np.cos(angle)) - x * float(np.sin(angle))))
    if kind == "flat":
        field = np.zeros_like(x)
    elif kind == "gradient":
        field = (u - u.min()) / np.ptp(u)
    elif kind == "noise":
        field = _noise(rng, height, width, int(rng.choice([3, 6, 12])))
    else:
        field = {"stripes": lambda: np.sin(u), "wood": lambda: np.sin(u + 9 * _noise(rng, height, width)),
                 "checks": lambda: 1.5 * np.sin(u) * np.sin(v), "dots": lambda: np.cos(u) + np.cos(v) - 0.7}[kind]()
        field = (0.5 + sharp * field).clip(0, 1)
    step = rng.normal(0, 1, 3) + 1.5 * rng.choice([-1, 1])  # mostly lighter or darker, a little of another hue
    return colour + field[..., None] * (rng.uniform(0.3, 1) * strength * step / np.linalg.norm(step)).astype(np.float32)


def _strip(rng, height, width, half):
    """Cover of a wavy strip from border to border, 2 `half` pixels thick; half=None: all on one side of the wave."""
    side = 2.0 * max(height, width)
    x = np.linspace(-side, side, 80)
    y = rng.uniform(-0.3, 0.3) * x * x / side
    y += rng.integers(0, 2) * (rng.normal(0, 4, 3) * np.sin(x[:, None] / rng.uniform(10, 40, 3))).sum(1)
    low, high = (y - half, y + half) if half else (y, 2 * side + 0 * y)
    outline = np.stack([np.concatenate([x, x[::-1]]), np.concatenate([low, high[::-1]])], 1)
    at = rng.uniform(0.15, 0.85, 2) * (width, height)
    return _cover([(_turn(outline, rng.uniform(0, 6.3)) + at, 1)], height, width)


def _background(rng, height, width):
    """float32 HxWx3: textures, and clutter with edges that close around nothing, so that an edge alone is no object."""
    def ground():
        return _texture(rng, height, width, _colour(rng), 0.3)
    canvas = ground()
    if rng.random() < 0.5:  # a second ground beyond a sharp or soft wave
        canvas = _blend(canvas, ground(), _soften(_strip(rng, height, width, None), rng.choice([0, 3, 8])))
    for _ in range(rng.integers(0, 3)):  # clouds of another texture, without a border
        cloud = (_noise(rng, height, width, 2) - 0.55) * 3
        canvas = _blend(canvas, ground(), cloud.clip(0, rng.uniform(0.3, 0.7)))
    for _ in range(rng.integers(0, 5)):  # lines from border to border
        line = _strip(rng, height, width, rng.uniform(0.3, 1.2))
        canvas = _blend(canvas, _colour(rng), line * rng.uniform(0.3, 0.9))
    light = 1 - rng.uniform(0, 0.35) * _noise(rng, height, width, 2)  # uneven light, soft shadows
    return (canvas * light[..., None]).clip(0, 1)


def _paint(rng, canvas, cover, light):
    """The canvas with one more object: its shadow, its own texture, shading, perhaps a rim."""
    if rng.random() < 0.4:
        x, y = (6 - round(rng.uniform(2, 6) * part) for part in light)  # away from the light
        shadow = _soften(np.pad(cover, 6)[y:, x:][:cover.shape[0], :cover.shape[1]], rng.uniform(1, 4))
        canvas = canvas * (1 - rng.uniform(0.2, 0.6) * shadow)[..., None]
    behind = (canvas * cover[..., None]).sum((0, 1)) / cover.sum()
    contrast, colour = rng.uniform(0.25, 0.7), _colour(rng)
    while np.linalg.norm(colour - behind) < contrast:  # from subtle to obvious, never invisible
        contrast, colour = contrast * 0.95, _colour(rng)
    skin = _texture(rng, *cover.shape, colour, rng.uniform(0.1, 0.45))
    dome = _soften(cover, rng.uniform(1.5, 5))
    down, right = np.gradient(dome)
    shade = 1 + rng.uniform(0, 4) * (right * light[0] + down * light[1]) - rng.uniform(0, 0.4) * (1 - dome)
    skin = skin * shade[..., None]
    if rng.random() < 0.2:
        skin = _blend(skin, _colour(rng), ((0.95 - _soften(cover, 1.2)) * 2.5).clip(0, 1) * rng.uniform(0.5, 1))
    return _blend(canvas, skin.clip(0, 1), cover)


def demo_scene(seed, size=128):
    """A synthetic picture: uint8 HxWx3, bool NxHxW (N >= 1); long side `size`. The same for the same seed.

    Objects are painted back to front and a mask is what remains visible: masks never overlap, boxes do. An object that
    is mostly hidden (less than 35 % or 60 pixels remain) stays in the picture without a mask.
    """
    rng = np.random.default_rng(seed)
    sides = size, int(size * rng.choice([0.75, 0.875, 1, 1]))
    height, width = sides if rng.random() < 0.5 else sides[::-1]
    canvas, light = _background(rng, height, width), _turn(np.array([1.0, 0.0]), rng.uniform(0, 6.3)).tolist()
    owner, areas, wanted = np.full((height, width), -1), [], rng.integers(2, 7)
    while len(areas) < wanted:
        shape = _shape(rng)
        smallest = 8 if len(shape) == 1 else 13  # px; shapes with fine parts need more room
        radius = size / 128 * np.exp(rng.uniform(np.log(smallest), np.log(36)))
        angle, at = rng.uniform(0, 6.3), rng.uniform(0.08, 0.92, 2) * (width, height)
        cover = _cover([(_turn(outline, angle) * radius + at, value) for outline, value in shape], height, width)
        inside = cover > 0.5
        if inside.sum() >= 80:
            canvas = _paint(rng, canvas, cover, light)
            owner[inside] = len(areas)
            areas.append(inside.sum())
    y, x = np.mgrid[-1:1:height * 1j, -1:1:width * 1j].astype(np.float32)  # the camera: vignette, noise, a little blur
    canvas = canvas * (255 - rng.uniform(0, 30) * (x * x + y * y))[..., None]
    canvas += rng.uniform(0, 4) * rng.standard_normal(canvas.shape, np.float32)
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.6)))
    seen = owner == np.arange(len(areas))[:, None, None]
    return np.array(image), seen[seen.sum((1, 2)) >= np.maximum(60, 0.35 * np.array(areas))]


# ---------------------------------------------------------------- writing: the demo, and degraded folders

def _parallel(work, jobs):
    """work(job) for all jobs, on all cores, in any order."""
    processes = min(os.cpu_count() or 1, len(jobs) // 8)
    if processes < 2:
        yield from map(work, jobs)
        return
    with multiprocessing.Pool(processes, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:  # Ctrl-C: one voice
        yield from pool.imap_unordered(work, jobs, chunksize=4)


def _write_scene(job):
    folder, name, seed, size = job
    image, masks = demo_scene(seed, size)
    Image.fromarray(image).save(os.path.join(folder, "clear", name + ".jpg"), quality=95)
    np.save(os.path.join(folder, "masks", name + ".npy"), masks)


def make_demo(root, train=2000, val=64, test=128, size=128, seed=0):
    """Writes the synthetic dataset. It appears under `root` when it is complete, or not at all."""
    root, jobs = os.path.abspath(root), []
    if os.path.exists(root) and not (os.path.isdir(root) and not os.listdir(root)):
        raise DatasetError(f"{root}: exists and is not an empty folder; choose another name or remove it")
    part = f"{root}.part{os.getpid()}"
    for split, count in (("train", train), ("val", val), ("test", test)):
        # Seeds above 32 bits, so that no scene equals one that training draws on the fly from a 32-bit seed.
        first = seed_of("demo", seed, split) << 32
        jobs += [(os.path.join(part, split), f"{split}_{k:05d}", first + k, size) for k in range(count)]
    try:
        for folder in {job[0] for job in jobs}:
            os.makedirs(os.path.join(folder, "clear"))
            os.makedirs(os.path.join(folder, "masks"))
        progress = Progress("demo scenes", len(jobs))
        for _ in _parallel(_write_scene, jobs):
            progress.update()
        progress.close()
        if os.path.isdir(root):
            os.rmdir(root)
        os.replace(part, root)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def make_missing_demo(root):
    """Makes the demo dataset where `root` is not there and its last part says demo: the two commands of a newcomer."""
    if not os.path.exists(root) and os.path.basename(os.path.normpath(root)).startswith("demo"):
        make_demo(root)


def _write_degraded(job):
    """Writes the degraded versions of one sample: (how many, the line to report if its picture is bad)."""
    sample, conditions = job
    try:
        image = sample.image()
    except SampleError as error:
        return len(conditions), str(error)
    for condition in conditions:
        path = os.path.join(sample.folder, condition, sample.name + ".jpg")
        part = os.path.join(sample.folder, condition, f".{sample.name}.part{os.getpid()}")
        with open(part, "wb") as file:
            file.write(degraded_jpeg(image, condition, seed_of(sample.name, condition)))
        os.replace(part, path)  # under its final name a file is complete, so that an interrupted run can go on
    return len(conditions), None


def write_corruptions(dataset):
    """One folder per corruption beside clear/, with the pixels of Sample.image(condition). Existing files stay."""
    folders = {condition: os.path.join(dataset.root, dataset.split, condition) for condition in CORRUPTIONS}
    for folder in folders.values():
        os.makedirs(folder, exist_ok=True)
    there = {condition: _stems(folder, PICTURES[:3]).keys() for condition, folder in folders.items()}
    jobs = [(sample, [c for c in CORRUPTIONS if sample.name not in there[c]]) for sample in dataset]
    jobs = [job for job in jobs if job[1]]
    progress = Progress(f"{dataset.split}: degraded images", sum(len(conditions) for _, conditions in jobs))
    for count, line in _parallel(_write_degraded, jobs):
        progress.update(count)
        if line:
            dataset.skip(SampleError(line))
    progress.close()


# ---------------------------------------------------------------- command line

def draw_prompts(image, masks, points, boxes):
    """The picture with its objects tinted, and their boxes and points: a Pillow image."""
    names = ("red", "lime", "dodgerblue", "yellow", "magenta", "cyan", "orange", "white")
    colours = [ImageColor.getrgb(names[k % len(names)]) for k in range(len(masks))]
    image = image.copy()
    for mask, colour in zip(masks, colours):
        image[mask] = image[mask] // 2 + np.array(colour, np.uint8) // 2
    page = Image.fromarray(image)
    pen = ImageDraw.Draw(page)
    for clicks, box, colour in zip(points, boxes, colours):
        pen.rectangle(box.tolist(), outline=colour)
        for x, y in clicks.tolist():
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour, outline="white")
    return page


def contact_sheet(samples, path, tile=192, columns=4):
    """Draws each sample twice: clear with masks and prompts, then degraded, each in the next of the 15 conditions."""
    page = Image.new("RGB", (columns * 2 * tile, -(-len(samples) // columns) * tile), "white")
    for k, sample in enumerate(samples):
        masks = sample.masks()
        pair = (draw_prompts(sample.image(), masks, *sample.prompts(masks)),
                Image.fromarray(sample.image(CONDITIONS[1 + k % len(CORRUPTIONS)])))
        for side, picture in enumerate(pair):
            corner = (k % columns * 2 + side) * tile + 2, k // columns * tile + 2
            page.paste(ImageOps.contain(picture, (tile - 4, tile - 4)), corner)
    save_png(page, path)


def describe(dataset, most=200):
    """Prints what a split holds, from at most `most` samples spread over it. Returns the good ones among them."""
    chosen, good, sizes, counts, areas = spread(dataset, most), [], [], [], []
    progress = Progress(f"{dataset.split}: reading", len(chosen))
    for sample in chosen:
        progress.update()
        try:
            masks, image = sample.masks(), sample.image()
        except SampleError as error:
            dataset.skip(error)
            continue
        good.append(sample)
        sizes.append(image.shape[:2])
        counts.append(len(masks))
        areas.extend(masks.mean((1, 2)))
    progress.close()
    print(dataset.summary())
    print(*(f"  skipped: {line}\n" for line in dataset.skipped), sep="", end="")
    if good:
        (h0, w0), (h1, w1) = np.min(sizes, 0), np.max(sizes, 0)
        print(f"  {len(good):,} of them read: height {h0} to {h1}, width {w0} to {w1}; {np.mean(counts):.1f} masks an "
              f"image ({min(counts)} to {max(counts)}), half of them smaller than {np.median(areas):.1%} of it")
    ready = [c for c in CORRUPTIONS if c in dataset[0].ready]
    print(f"  degraded images on disk: {', '.join(ready) or 'none, so they are made on the fly'}")
    return good


def main(argv=None):
    """Runs the command line; a user's mistake ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(description="Look into a dataset, degrade it, or make the demo dataset.")
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    parser.add_argument("root", help="dataset folder")
    parser.add_argument("--split", help="only this split")
    parser.add_argument("--sheet", metavar="PNG", help="draw a contact sheet of the split (or the first one)")
    parser.add_argument("--check", action="store_true", help="read all samples, not only 200, and name the bad ones")
    parser.add_argument("--corrupt", action="store_true", help="write one folder per corruption")
    parser.add_argument("--make-demo", action="store_true", help="make the synthetic dataset")
    parser.add_argument("--scenes", nargs=3, type=int, default=(2000, 64, 128), metavar=("TRAIN", "VAL", "TEST"),
                        help="how many scenes --make-demo makes (2000 64 128)")
    args = parser.parse_args(argv)
    try:
        if args.make_demo:
            make_demo(args.root, *args.scenes)
        splits = [args.split] if args.split else find_splits(args.root)[1]
        for split in splits:
            dataset = load_dataset(args.root, split)
            if args.corrupt:
                write_corruptions(dataset)
                dataset = load_dataset(args.root, split)
            good = describe(dataset, len(dataset) if args.check else 200)
            if args.sheet and split == splits[0]:
                contact_sheet(good[:20], args.sheet)
    except (DatasetError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted; no file is left half-written, so run the same command again\n")


if __name__ == "__main__":
    main()
