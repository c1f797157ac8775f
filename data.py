"""Every dataset of the paper as one kind of sample: an image, the masks of its objects, the prompts that ask for them.

The big idea: nothing depends on order. A prompt, a corruption or a demo scene draws from a seed made of NAMES (of the
image, of the condition, the number of the mask). So two people, two methods and any number of workers see the same
points, the same boxes and the same noise.

`load_dataset(root, split)` knows eleven layouts by what lies on the disk; `python data.py ROOT` says what is in one:

    robustseg   {train,val,test,coco,lvis}/clear/<stem>.jpg, masks/<stem>.npy, <corruption>/<stem>.jpg (optional)
    lvis, coco  lvis_v1_*.json or annotations/instances_*2017.json beside train2017/ and val2017/
    lis         annotations/lis_coco_*.json beside RGB-dark/ and RGB-normal/
    bdd100k     images/10k/ and labels/ins_seg/bitmasks/
    acdc        rgb_anon/ beside gt_detection/, gt_panoptic/ or gt/
    ndd20       ABOVE_LABELS.json beside ABOVE/, and the same with BELOW
    streets     annotations/vehicle-annotations.json beside images/
    thinobject  list/{train,val,test}.txt beside images/ and masks/
    msra10k     pairs <n>.jpg, <n>.png in one folder
    isic2016    ISBI2016_ISIC_Part1_Training_Data/ beside ..._Training_GroundTruth/, and the same with Test

The demo dataset has robustseg's layout. A degraded image that is not on the disk is made on the fly; `--corrupt`
writes the very same pixels to the disk.

    python data.py ROOT [--split test] [--sheet sheet.png]      counts, sizes, areas, a contact sheet
    python data.py ROOT --check                                 read every file and name the bad ones
    python data.py ROOT --corrupt [--split test]                write one folder per corruption; resumable
    python data.py ROOT --split test --export-prompts p.json    pin the prompts in a file
    python data.py demo/ --make-demo                            make the synthetic dataset (half a minute)

In this file: reading images, degrading them, masks, prompts and samples, the readers (to add a dataset, see `Listing`),
load_dataset, prompts in a file, degraded folders; then the painter of the demo, which may be skipped.
"""
import argparse
import contextlib
import fcntl
import glob
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import sys
import threading
import time
import tokenize
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from os.path import basename, dirname, exists, isdir, join, splitext
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageOps

from corruptions import CORRUPTIONS, OTHERS, corrupt

CONDITIONS = ("clear", *CORRUPTIONS)
PROMPTS = ("point", "box")  # the kinds that masks are predicted from


def benchmark_conditions(conditions):
    """Those at the benchmark's own strength: "clear" and "fog", not "fog@0.5"."""
    return [condition for condition in conditions if "@" not in condition]


def degraded_conditions(conditions):
    """Those whose mean is called "degraded": all but clear at the benchmark's own strength; if there is none, all but
    clear."""
    degraded = [condition for condition in conditions if condition != "clear"]
    return benchmark_conditions(degraded) or degraded


IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
# What Pillow, numpy and json raise on a damaged file, as opposed to a mistake in this program.
DAMAGED = (OSError, ValueError, EOFError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError,
           RecursionError, OverflowError, tokenize.TokenError)
FORM = (KeyError, TypeError, AttributeError, IndexError)  # what reading JSON of another form than expected raises


class DatasetError(Exception):
    """The dataset cannot be used as asked. One line: what was looked for, what was found, what to do."""


class MissingError(DatasetError, FileNotFoundError):
    """A folder is not there."""


class SampleError(DatasetError):
    """One sample is bad, the others are not. One line that begins with the file."""


class PinnedError(SampleError):
    """The prompts file and a mask do not belong together."""


@contextlib.contextmanager
def _reading(path, what):
    """What goes wrong within means that the file is damaged, or not `what` it is taken for: DatasetError."""
    try:
        yield
    except DatasetError:  # already explained; first, because a MissingError is an OSError as well
        raise
    except (*DAMAGED, *FORM) as error:
        raise DatasetError(f"{path}: not {what}, or damaged ({type(error).__name__}: {_why(error)})") from None


def _why(error):
    """An exception as half a line, without the path, which the caller names."""
    if getattr(error, "strerror", None):
        return error.strerror
    text = str(error) or type(error).__name__
    return text.splitlines()[0].split(" '")[0]


def seed_of(*parts):
    """A 32-bit seed from names: seed_of("00012", "fog"). Equal parts give equal seeds on every machine."""
    text = "/".join(map(str, parts))
    return zlib.crc32(text.encode(errors="surrogatepass"))  # a file's name need not be UTF-8


class Progress:
    """`label  done/total  rate  time left` on stderr: a line that changes on a terminal, one every 10 s in a log."""

    def __init__(self, label, total):
        self.label = label
        self.total = total
        self.done = 0
        self.start = self.shown = time.monotonic()

    def update(self, n=1, last=False):
        self.done += n
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if not last and now - self.shown < (0.1 if terminal else 10):
            return
        self.shown = now

        elapsed = now - self.start
        left = (self.total - self.done) * elapsed / max(self.done, 1)
        clock = timedelta(seconds=round(elapsed if last else left))
        rate = self.done / max(elapsed, 1e-9)
        line = f"{self.label}  {self.done:,}/{self.total:,}  {rate:.1f}/s  {clock} {'in all' if last else 'left'}"
        if terminal:
            line = f"\r{line:<79}"
        print(line, end="" if terminal and not last else "\n", file=sys.stderr, flush=True)

    def close(self):
        self.update(0, last=True)


def save_bytes(content, path):
    """Writes a file: whole, or not at all. DatasetError."""
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            file.write(content)
        os.replace(part, path)
    except OSError as error:
        if exists(part):
            os.remove(part)
        raise DatasetError(f"{path}: cannot write this file ({_why(error)})") from None


def save_text(text, path):
    """Writes a text file in UTF-8: whole, or not at all. DatasetError."""
    save_bytes(text.encode(), path)


@contextlib.contextmanager
def alone_in(folder):
    """Makes the folder and lets no second program write into it within the block: DatasetError if one does.

    The lock is the system's and ends with the process, however that ends.
    """
    os.makedirs(folder, exist_ok=True)
    with open(join(folder, ".lock"), "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise DatasetError(f"{folder}: another program is writing there; wait until it has ended, or name another "
                               "folder") from None
        except OSError as error:  # some network drives have no locks
            print(f"{folder}: cannot be locked ({_why(error)}); let no other program write there", file=sys.stderr)
        yield


def end_with_parent(_=None):
    """In a worker (a DataLoader's worker_init_fn): ends it once its parent has ended, even by SIGKILL."""
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def save_png(image, path):
    """Writes a Pillow image as a PNG: whole, or not at all. DatasetError."""
    file = io.BytesIO()
    image.save(file, "PNG")
    save_bytes(file.getvalue(), path)


# ---------------------------------------------------------------- reading images

UPRIGHT = {  # what undoes the orientations 2 to 8 of EXIF
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextlib.contextmanager
def _opened(path, annotated):
    """Yields an image file, the turn that it needs, if any, and the size (H, W) that it then has. SampleError.

    annotated: the size that its annotation names, or None.
    """
    try:
        with Image.open(path) as file:
            width, height = file.size
            orientation = file.getexif().get(0x0112)
            turn = UPRIGHT.get(orientation)
            if annotated and tuple(annotated) == (height, width):  # it was annotated as stored
                turn = None
            size = (width, height) if turn is not None and orientation > 4 else (height, width)
            if annotated and tuple(annotated) != size:
                raise SampleError(f"{path}: is {size[1]} x {size[0]} pixels (width x height), but its annotation is "
                                  f"for {annotated[1]} x {annotated[0]}")
            yield file, turn, size
    except DAMAGED as error:
        raise SampleError(f"{path}: cannot read this image ({_why(error)})") from None


def image_size(path, annotated=None):
    """(H, W) of the image as `read_image(path, annotated)` gives it, from the file's header alone."""
    with _opened(path, annotated) as (_, _, size):
        return size


def read_image(path, annotated=None):
    """uint8 HxWx3 RGB. Grey, palette, CMYK and 16-bit images are converted, alpha is dropped.

    An image is turned upright as its EXIF says, unless the pixels as stored have the size (H, W) that its annotation
    names: then they were annotated as stored. SampleError if neither has.
    """
    with _opened(path, annotated) as (file, turn, _):
        image = file if turn is None else file.transpose(turn)
        if image.mode.startswith("I"):  # 16 bits a pixel: convert("RGB") would clip at 255 instead of scaling
            grey = np.asarray(image) // 256
            image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
        return np.array(image.convert("RGB"))


# ---------------------------------------------------------------- degrading images

def name_and_strength(condition):
    """"fog@0.5" -> ("fog", 0.5): fog of half the strength. "fog" -> ("fog", 1.0), Robust-Seg's. DatasetError if it is
    no condition, or the strength none that `corrupt` takes."""
    name, _, strength = condition.partition("@")
    known = (*CONDITIONS, *OTHERS)
    try:
        strength = float(strength or 1)
    except ValueError:
        strength = -1
    if name not in known or not 0 <= strength <= 10 or condition.startswith("clear@"):
        raise DatasetError(f"no condition {condition!r}; there are: {', '.join(known)}, and all but clear with a "
                           "strength, as fog@0.5")
    return name, strength


def degraded_jpeg(image, condition, seed):
    """The degraded image as the bytes of a JPEG, quality 95, 4:2:0: Robust-Seg stores its own that way."""
    name, strength = name_and_strength(condition)
    degraded = Image.fromarray(corrupt(image, name, seed, strength))
    file = io.BytesIO()
    degraded.save(file, "JPEG", quality=95, subsampling="4:2:0")
    return file.getvalue()


def degrade(image, condition, seed):
    """uint8 HxWx3 -> uint8 HxWx3 in one of CONDITIONS or as "fog@0.5", through the JPEG that `--corrupt` writes."""
    if condition == "clear":
        return image
    file = io.BytesIO(degraded_jpeg(image, condition, seed))
    return np.array(Image.open(file))


# ---------------------------------------------------------------- masks: run lengths, polygons, connected parts

def _runs_of(text):
    """The run lengths in a compressed COCO string. Each is a series of characters of six bits: five of the number, low
    ones first, and one that says whether another follows. From the fourth run on they are differences to the run two
    places before."""
    runs = []
    value = shift = 0
    for code in text.encode() if isinstance(text, str) else text:
        code -= 48
        if not 0 <= code < 64:
            raise ValueError("not a run-length string")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:  # the top bit of the last five is the sign
            value -= 1 << shift
        if len(runs) > 2:
            value += runs[-2]
        runs.append(value)
        value = shift = 0
    if shift:
        raise ValueError("not a run-length string")
    return runs


def rle_decode(rle):
    """COCO run lengths {"size": [H, W], "counts": list or compressed string} -> bool HxW. ValueError if they don't fit.

    Runs of 0 and 1 in turn, beginning with 0, column by column.
    """
    height, width = map(int, rle["size"])
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        counts = _runs_of(counts)
    runs = np.asarray(counts)
    pixels = height * width
    if runs.dtype.kind not in "iu" or not 0 <= runs.min() <= runs.max() <= pixels or runs.sum() != pixels:
        raise ValueError(f"run lengths do not make up {height} x {width} pixels")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def rle_encode(mask):
    """bool HxW -> {"size": [H, W], "counts": compressed string}, character for character what pycocotools writes."""
    columns = np.asarray(mask, bool).T.ravel()
    edges = np.flatnonzero(np.diff(columns, prepend=False))
    runs = np.diff(edges, prepend=0, append=columns.size).tolist()
    text = ""
    for k, run in enumerate(runs):
        value = run - runs[k - 2] if k > 2 else run
        more = True
        while more:
            low = value & 31
            value >>= 5
            more = value != (-1 if low & 16 else 0)
            text += chr(48 + low + 32 * more)
    return {"size": list(np.shape(mask)), "counts": text}


def _walk(corners):
    """All points of a closed outline, n x 2 whole numbers, in unit steps along each edge's longer axis: x, y."""
    ends = np.roll(corners, -1, 0)
    dx, dy = np.abs(ends - corners).T
    steep = dx < dy
    start = np.where(steep[:, None], corners[:, ::-1], corners)  # the longer axis first
    end = np.where(steep[:, None], ends[:, ::-1], ends)
    backward = start[:, 0] > end[:, 0]
    low = np.where(backward[:, None], end, start)  # so that an edge is rounded alike in both directions
    high = np.where(backward[:, None], start, end)
    length, aside = (high - low).T
    if length.sum() > 1e7:
        raise ValueError("polygon with an outline longer than two million pixels")
    slope = aside / np.maximum(length, 1)

    points = length + 1  # of each edge
    edge = np.repeat(np.arange(len(corners)), points)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(points) - points, points)
    step = np.where(backward[edge], length[edge] - step, step)
    along = low[edge, 0] + step
    across = (low[edge, 1] + (slope[edge] * step + 0.5)).astype(np.int64)
    steep = steep[edge]
    return np.where(steep, across, along), np.where(steep, along, across)


def polygon_mask(parts, height, width):
    """COCO polygons [[x0, y0, x1, y1, ...], ...] -> bool HxW, the union of the parts, to the pixel as pycocotools.

    Coordinates are in pixels from the image's corner. The official rule: walk the outline in fifths of a pixel along
    each edge's longer axis; where it crosses the middle of a pixel column, everything below changes sides.
    """
    mask = np.zeros((height, width), bool)
    for part in parts:
        corners = np.asarray(part, np.float64).reshape(-1, 2)
        if not (np.abs(corners) < 1e5).all():
            raise ValueError("polygon with a coordinate that is no number or far outside of the picture")
        u, v = _walk((5 * corners + 0.5).astype(np.int64))  # truncated toward zero, as C does

        crossing = np.flatnonzero(u[1:] != u[:-1])
        x = np.minimum(u[crossing], u[crossing + 1])
        y = np.minimum(v[crossing], v[crossing + 1])
        middle = (x % 5 == 2) & (x >= 0) & (x // 5 < width)  # of a pixel column in the image
        if not middle.any():
            continue
        x = x[middle] // 5
        y = np.ceil(((y[middle] + 0.5) / 5 - 0.5).clip(0, height)).astype(np.int64)

        left = x.min()
        columns = x.max() + 1 - left
        crossings = np.bincount((x - left) * height + y, minlength=columns * height + 1)[:-1]
        inside = np.logical_xor.accumulate(crossings % 2 == 1)
        mask[:, left:left + columns] |= inside.reshape(columns, height).T
    return mask


def outline_mask(x, y, height, width):
    """A VIA outline, whose corners are indices of pixels -> bool HxW: inside and border, closed by a straight line."""
    corners = np.array([x, y], np.float64).T
    if not (np.abs(corners) < 1e5).all():
        raise ValueError("outline with a coordinate that is no number or far outside of the picture")
    page = Image.new("1", (width, height))
    ImageDraw.Draw(page).polygon(np.rint(corners).ravel().tolist(), fill=1, outline=1)
    return np.array(page)


def components(mask):
    """bool HxW -> (int HxW, areas): its connected parts (corners connect), numbered from 1 from top to bottom; 0 is
    the background, areas[k - 1] the number of pixels of part k."""
    edges = np.diff(np.pad(mask, 1).astype(np.int8), axis=1)  # H + 2 rows: none is the first
    row, start = np.nonzero(edges == 1)  # runs of pixels, row by row
    _, end = np.nonzero(edges == -1)
    first = np.searchsorted(row, np.arange(len(edges)))  # the first run of each row
    parent = np.arange(len(row))  # a tree for each part, whose root is its first run

    def root(k):
        while parent[k] != k:
            parent[k] = parent[parent[k]]
            k = parent[k]
        return k

    for k in range(len(row)):  # join each run with those above that it touches
        for above in range(first[row[k] - 1], first[row[k]]):
            if start[above] <= end[k] and start[k] <= end[above]:
                a, b = root(above), root(k)
                parent[max(a, b)] = min(a, b)

    roots = [root(k) for k in range(len(row))]
    _, number = np.unique(roots, return_inverse=True)
    steps = np.zeros(edges.shape, np.int32)
    steps[row, start] = number + 1
    steps[row, end] = -number - 1
    areas = np.bincount(number, end - start).astype(int)
    return steps.cumsum(1)[1:-1, :-1], areas


# ---------------------------------------------------------------- prompts and samples

def prompts(mask, seed):
    """Three points and the box that ask for `mask` (bool HxW): float32 3x2 (x, y), float32 4 (x0, y0, x1, y1).

    All are indices of pixels, as clicks are. Points are drawn evenly from the mask's pixels, all different (a mask of
    one or two repeats them); x1 and y1 are the last column and row that it touches. ValueError on an empty mask.
    Scaled by s to the model's frame, SAM places a click at x s + 0.5: within its pixel's square, hence within the mask,
    as long as s is at least 0.5; beyond, pixels are smaller than what the model tells apart.
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
    points = np.stack([x, y], 1).astype(np.float32)
    return points, box_of(mask)


def box_of(mask):
    """First and last column and row that the mask touches: float32 (x0, y0, x1, y1)."""
    rows = np.flatnonzero(mask.any(1))
    columns = np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)


@dataclass(slots=True, eq=False)
class Sample:
    """One image with its objects. Holds paths and no pixels; what it reads may raise SampleError."""
    name: str  # all seeds derive from it
    clear: str  # the path of its image
    source: str  # the file of its masks
    read: Callable  # read(sample) yields (index, label, bool HxW mask, why it is left out or None) for each region
    size: tuple = None  # (H, W) as the annotation says, if it does
    folder: str = None  # holds a folder of degraded images per corruption
    ready: frozenset = frozenset()  # the corruptions whose folder is there
    pinned: dict = None  # its entry in a prompts file, if one is used
    left_out: Counter = field(default_factory=Counter)  # the regions that masks() left out, by reason
    _kept: tuple = None  # indices and labels of the planes of masks()

    def image(self, condition="clear", seed=None, stored=True):
        """uint8 HxWx3. A degraded image is read from its folder if it is there, else made from `seed`.

        A condition may carry a strength: "fog@0.5" is made from the same seed as "fog".
        """
        corruption, _ = name_and_strength(condition)
        if stored and condition in self.ready:
            for ending in IMAGE_ENDINGS:
                path = join(self.folder, condition, self.name + ending)
                if exists(path):
                    image = read_image(path)
                    self._require_size(path, image.shape[:2])
                    return image
        if seed is None:
            seed = seed_of(self.name, corruption)
        return degrade(read_image(self.clear, self.size), condition, seed)

    def masks(self):
        """bool NxHxW, N >= 1, one plane per object. What is left out (crowds, empty masks, ...) is counted in
        `left_out`; `indices` and `labels` belong to the planes that remain."""
        size = image_size(self.clear, self.size)
        self.left_out = Counter()
        kept = []
        planes = []
        try:
            for index, label, mask, reason in self.read(self):
                if not reason and mask.shape != size:
                    self._require_size(self.source, mask.shape)
                if not reason and not mask.any():
                    reason = "empty"
                if reason:
                    self.left_out[reason] += 1
                else:
                    kept.append((index, label))
                    planes.append(mask)
        except SampleError:
            raise
        except (*DAMAGED, *FORM) as error:
            raise SampleError(f"{self.source}: cannot read the masks of {self.name} ({_why(error)})") from None
        if not planes:
            raise SampleError(f"{self.source}: {self.name} has no mask to use ({_account(self.left_out) or 'none'})")
        self._kept = tuple(zip(*kept))
        return np.stack(planes)

    @property
    def indices(self):
        """The number in the file of each plane of masks(). Seeds use it: a dropped plane shifts nobody's prompts.

        COCO's annotation id, BDD's instance id, a region's or plane's number, whatever the set itself counts by.
        """
        if self._kept is None:
            self.masks()
        return self._kept[0]

    @property
    def labels(self):
        """The class name of each plane of masks(); None where the set has no classes."""
        if self._kept is None:
            self.masks()
        return self._kept[1]

    def prompts(self, masks=None, seed=0):
        """The prompts of all masks: float32 Nx3x2 points, float32 Nx4 boxes. Pass masks() if already read.

        From the sample's name, the mask's index and `seed`, or the pinned ones.
        """
        masks = self.masks() if masks is None else masks
        points = []
        boxes = []
        for mask, index in zip(masks, self.indices, strict=True):
            if self.pinned is None:
                clicks, box = prompts(mask, seed_of(self.name, index, seed))
            else:
                clicks, box = self._pinned_prompts(mask, index)
            points.append(clicks)
            boxes.append(box)
        return np.stack(points), np.stack(boxes)

    def _pinned_prompts(self, mask, index):
        """The prompts of a mask in the prompts file, if they are its own."""
        height, width = mask.shape
        try:
            entry = self.pinned["masks"][str(index)]
            points = np.array(entry["points"], np.float32).reshape(3, 2)
            box = np.array(entry["box"], np.float32)
            x, y = points.T.astype(int)
            whole = (points == np.stack([x, y], 1)).all() and points.min() >= 0
            fits = whole and list(self.pinned["size"]) == [height, width] and mask[y, x].all()
        except (*FORM, ValueError, OverflowError):
            fits = False
        if not fits:
            raise PinnedError(f"{self.source}: the prompts file has no three points in mask {index} of {self.name}, "
                              f"{width} x {height} pixels")
        if box.shape != (4,) or (box != box_of(mask)).any():
            raise PinnedError(f"{self.source}: the prompts file has another box for mask {index} of {self.name}")
        return points, box

    def _require_size(self, path, size):
        own = image_size(self.clear, self.size)
        if tuple(size) != own:
            raise SampleError(f"{path}: is {size[1]} x {size[0]} pixels (width x height), but {self.clear} is "
                              f"{own[1]} x {own[0]}")


def _account(counter):
    """Counter -> "446 crowd, 12 empty"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counter.items()))


@dataclass(eq=False)
class Dataset(Sequence):
    """The samples of one split, sorted by name.

    A missing file is known from the listing, a damaged one only when it is read. So whoever reads catches SampleError
    and hands it to skip(), which keeps the account in `skipped` (a line each) or, when strict, raises.
    """
    root: str
    split: str
    kind: str  # the name of the reader
    samples: list
    strict: bool = False
    masks: int = None  # how many objects there are; None where only reading tells
    left_out: Counter = field(default_factory=Counter)  # what of the annotations is not used, by reason
    skipped: list = field(default_factory=list)  # a line for each bad file

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

    def skip(self, error):
        """Counts a bad sample. True when it is new, so that the caller reports it once."""
        if self.strict:
            raise error
        line = str(error)
        if line in self.skipped:
            return False
        self.skipped.append(line)
        return True

    def summary(self):
        """One line: what it is, images, masks, what is left out and why."""
        count = "" if self.masks is None else f", {self.masks:,} masks"
        left = f"; left out: {_account(self.left_out)}" if self.left_out else ""
        return (f"{join(self.root, self.split)} ({self.kind}): {len(self):,} images{count}{left}; "
                f"{len(self.skipped):,} files skipped")


class Union(Dataset):
    """Several datasets one after the other, for training on all of them."""

    def __init__(self, parts):
        roots = " + ".join(part.root for part in parts)
        samples = [sample for part in parts for sample in part]
        super().__init__(roots, parts[0].split, "several", samples, parts[0].strict)
        self.skipped = [line for part in parts for line in part.skipped]


def spread(dataset, most):
    """At most `most` samples, evenly spread over the dataset: a list."""
    count = min(most, len(dataset))
    return [dataset[k * len(dataset) // count] for k in range(count)]


# ---------------------------------------------------------------- the contract of a reader

class Listing(NamedTuple):
    """What is in one split, before any pixel is read.

    To add a dataset, write one function, and no other place needs to know of it:

        @reader
        def name(root):
            "What it looks for; part of the message when nothing is found."
            return the names of its splits, function(split) -> Listing      (or None: root holds no such dataset)

    A sample's `read` reads its masks when they are asked for; _paired() makes the Listing where each image has a mask
    file of its own. An archive may have been unpacked into a folder of its own name, so _find() looks for everything up
    to two folders down. The rest is load_dataset's: the folder of degraded images, a split "val" where there is none.
    """
    samples: list  # of Sample, sorted by name
    masks: int = None  # how many objects they have; None where only reading tells
    left_out: Counter = Counter()  # what of the annotations is not used, by reason
    lone: list = ()  # a line for each file without its partner


KINDS = {}  # {name: reader}


def reader(function):
    """Makes a reader known to load_dataset under its own name."""
    KINDS[function.__name__] = function
    return function


def _find_all(root, *paths):
    """Yields what fits the paths (patterns) in root, then one folder below, then two."""
    for above in ("", "*", "*/*"):
        for path in paths:
            yield from sorted(glob.glob(join(glob.escape(root), above, path)))


def _find(root, *paths):
    """The first that fits, or None."""
    return next(_find_all(root, *paths), None)


def _files(folder, endings=IMAGE_ENDINGS):
    """{stem: path}. Hidden files are left out: an archive made by macOS holds a "._x.jpg" beside each "x.jpg"."""
    if not folder or not isdir(folder):
        return {}
    files = {}
    for file in sorted(os.listdir(folder), reverse=True):
        stem, _ = splitext(file)
        if file.lower().endswith(endings) and not file.startswith("."):
            files[stem] = join(folder, file)
    return files


def _only(paths, stems):
    """Those of {stem: path} whose stem is among these."""
    return {stem: path for stem, path in paths.items() if stem in stems}


def _paired(images, masks, read):
    """The Listing of {stem: path of the image} and {stem: path of the mask file}."""
    stems = sorted(images.keys() & masks.keys())
    samples = [Sample(stem, images[stem], masks[stem], read) for stem in stems]
    lone = [f"{images[stem]}: has no mask file" for stem in images.keys() - masks.keys()]
    lone += [f"{masks[stem]}: has no image" for stem in masks.keys() - images.keys()]
    return Listing(samples, lone=sorted(lone))


# ---------------------------------------------------------------- readers: a mask file for each image

def read_planes(path):
    """bool NxHxW from an .npy file of bool, 0/1, 0..255 or float; ValueError on anything else."""
    planes = np.lib.format.open_memmap(path, "r")  # mapped, so that only the bool copy takes memory; refuses objects
    if planes.ndim not in (2, 3) or planes.dtype.kind not in "biuf":
        raise ValueError(f"expected numbers of shape [N,H,W], found {planes.dtype} {list(planes.shape)}")
    planes = np.asarray(planes if planes.ndim == 3 else planes[None])
    return planes > 0.5 if planes.dtype.kind == "f" else _binary(planes)


def _binary(grey):
    """Whole numbers -> bool. The soft edges of a 0..255 mask are cut in the middle; a 0/1 mask has none."""
    return grey > 0 if grey.max(initial=0) <= 1 else grey >= 128


def _read_stack(sample):
    for index, plane in enumerate(read_planes(sample.source)):
        yield index, None, plane, None


def _read_one_mask(sample):
    """An image of one object: 0/1, 0/255, or 0..255 with soft edges; any mode."""
    with Image.open(sample.source) as file:
        grey = np.array(file.convert("L"))
    yield 0, None, _binary(grey), None


def _pixels(path, mode):
    """The numbers in a label map as they are stored: int32 HxW or HxWxbands. ValueError if not of this mode."""
    with Image.open(path) as file:
        if file.mode != mode:
            raise ValueError(f"expected a picture of mode {mode}, found {file.mode}")
        return np.array(file).astype(np.int32)


@reader
def robustseg(root):
    """ROOT/<split>/clear/ with images and ROOT/<split>/masks/ with .npy files"""
    def listing(split):
        folder = join(root, split)
        stacks = join(folder, "masks")
        if not isdir(stacks):
            raise MissingError(f"{stacks}: no such folder; unpack the split's masks.zip there (one .npy per image)")
        images = _files(join(folder, "clear"))
        masks = _files(stacks, (".npy",))
        found = _paired(images, masks, _read_stack)
        if not found.samples:
            raise MissingError(f"{folder}: no image has its masks ({len(images):,} images in clear/, {len(masks):,} "
                               ".npy files in masks/); the two must have the same name up to the ending")
        return found

    splits = [name for name in sorted(os.listdir(root)) if isdir(join(root, name, "clear"))]
    return (splits, listing) if splits else None


@reader
def msra10k(root):
    """Imgs/<n>.jpg and Imgs/<n>.png"""
    for folder in (_find(root, "Imgs"), root, _find(root, "MSRA_10K")):
        found = _paired(_files(folder, (".jpg",)), _files(folder, (".png",)), _read_one_mask)
        if found.samples:
            return ["all"], lambda split: found
    return None


@reader
def thinobject(root):
    """ThinObject5K/list/<split>.txt, images/, masks/"""
    a_list = _find(root, "list/train.txt", "list/test.txt")
    if not a_list:
        return None
    lists = dirname(a_list)
    home = dirname(lists)

    def listing(split):
        with open(join(lists, f"{split}.txt"), errors="surrogateescape") as file:
            stems = {splitext(line.strip())[0] for line in file if line.strip()}
        images = _only(_files(join(home, "images")), stems)
        masks = _only(_files(join(home, "masks")), stems)
        found = _paired(images, masks, _read_one_mask)
        missing = stems - (images.keys() & masks.keys())
        lone = [f"{home}: {stem} of list/{split}.txt lacks its image or mask" for stem in sorted(missing)]
        return found._replace(lone=lone)

    return sorted(_files(lists, (".txt",))), listing


@reader
def isic2016(root):
    """ISBI2016_ISIC_Part1_Training_Data/, ISBI2016_ISIC_Part1_Training_GroundTruth/, and the same with Test"""
    folders = {}
    for split, part in (("train", "Training"), ("test", "Test")):
        images = _find(root, f"ISBI2016_ISIC_Part1_{part}_Data")
        masks = _find(root, f"ISBI2016_ISIC_Part1_{part}_GroundTruth")
        if images and masks:
            folders[split] = images, masks

    def listing(split):
        images, masks = map(_files, folders[split])
        masks = {stem.removesuffix("_Segmentation"): path for stem, path in masks.items()}
        return _paired(images, masks, _read_one_mask)

    return (list(folders), listing) if folders else None


BDD_CLASSES = ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")


def _read_bdd(sample):
    """RGBA is data: R the class from 1, G flags (bit 0 ignore, bit 1 crowd), B and A the number of the instance."""
    pixels = _pixels(sample.source, "RGBA")
    number = pixels[..., 2] << 8 | pixels[..., 3]
    for index in np.flatnonzero(np.bincount(number.ravel())).tolist():
        mask = number == index
        one = np.unravel_index(mask.argmax(), mask.shape)
        category, flags = pixels[one][:2]
        if index == 0 or category == 0:
            continue  # background
        if category > len(BDD_CLASSES):
            raise ValueError(f"class {category} of instance {index} is not one of 1 to {len(BDD_CLASSES)}")
        reason = "crowd" if flags & 2 else "ignore" if flags & 1 else None
        yield index, BDD_CLASSES[category - 1], mask, reason


@reader
def bdd100k(root):
    """images/10k/<split>/ and labels/ins_seg/bitmasks/<split>/"""
    images = _find(root, "images/10k")
    masks = _find(root, "labels/ins_seg/bitmasks", "ins_seg/bitmasks")
    if not images or not masks:
        return None

    def listing(split):
        return _paired(_files(join(images, split)), _files(join(masks, split), (".png",)), _read_bdd)

    _, splits, _ = next(os.walk(masks))
    return sorted(splits), listing


# Cityscapes: trainId 11..18 and id 24..28, 31..33 are the countable classes; ACDC uses the same.
CITYSCAPES = {24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle",
              33: "bicycle"}


def _read_train_ids(sample):
    """trainIds 0..18, 255 unknown: each connected part of a countable class is an object; parts below 64 px are not."""
    classes = _pixels(sample.source, "L")
    index = 0
    for train_id, label in enumerate(CITYSCAPES.values(), 11):
        parts, areas = components(classes == train_id)
        for part, area in enumerate(areas, 1):
            if area < 64:
                yield index, label, None, "below 64 px"
            else:
                yield index, label, parts == part, None
            index += 1


def _read_panoptic(segments, sample):
    """A PNG whose R + 256 G + 65536 B is a segment's number, and the list of segments."""
    red, green, blue = np.moveaxis(_pixels(sample.source, "RGB"), 2, 0)
    number = red | green << 8 | blue << 16
    for segment in segments:
        label = CITYSCAPES.get(segment["category_id"])
        reason = "crowd" if segment.get("iscrowd") else None if label else "stuff"
        yield segment["id"], label, number == segment["id"], reason


def _frames(top, ending, split=None):
    """{"GOPR0475_frame_000041": path} of ACDC's files <condition>/<split>/<sequence>/<frame><ending> below a folder."""
    frames = {}
    for folder, _, files in os.walk(top):
        if split and split not in os.path.relpath(folder, top).split(os.sep):
            continue
        for file in files:
            if file.endswith(ending):
                frames[file.removesuffix(ending)] = join(folder, file)
    return frames


@reader
def acdc(root):
    """rgb_anon/<condition>/<split>/ beside gt_detection/, gt_panoptic/ or gt/"""
    shots = _find(root, "rgb_anon")
    if not shots:
        return None

    def listing(split):  # by the best of the ground truths at hand: instances, else segments, else classes
        reference = "_ref" if split.endswith("_ref") else ""
        name = f"{split.removesuffix('_ref')}_gt{reference}"

        detection = _find(root, f"gt_detection/instancesonly_{name}_detection.json")
        if detection:
            return _coco_listing(detection, lambda image: join(shots, _utf8(image["file_name"])))

        images = _frames(shots, f"_rgb{reference}_anon.png", split)
        panoptic = _find(root, f"gt_panoptic/{name}_panoptic.json")
        if panoptic:
            content = _load_json(panoptic)
            with _reading(panoptic, "a panoptic file"):
                segments = {basename(row["file_name"]).split("_gt")[0]: row["segments_info"]
                            for row in content["annotations"]}
            maps = _frames(dirname(panoptic), f"_gt{reference}_panoptic.png")
            found = _paired(_only(images, segments), _only(maps, segments), None)
            for sample in found.samples:
                sample.read = partial(_read_panoptic, segments[sample.name])
            return found

        maps = _frames(_find(root, "gt") or root, f"_gt{reference}_labelTrainIds.png", split)
        return _paired(_only(images, maps), maps, _read_train_ids)

    splits = {basename(folder) for folder in glob.glob(join(glob.escape(shots), "*", "*"))}
    return sorted(split for split in splits if not split.startswith("test")), listing


# ---------------------------------------------------------------- readers: VIA projects, all outlines in one JSON file

def _load_json(path):
    with _reading(path, "JSON"), open(path, encoding="utf-8") as file:
        return json.load(file)


def _read_outlines(outlines, sample):
    height, width = image_size(sample.clear)
    for index, label, x, y in outlines:
        yield index, label, outline_mask(x, y, height, width), None


def _outlines(regions, shapes, attribute, left_out):
    """The usable outlines (index, label, x, y) among an image's regions; counts the others in left_out."""
    outlines = []
    if isinstance(regions, dict):  # VIA's version 1; 2 has a list
        regions = regions.values()
    for index, region in enumerate(regions):
        shape = region["shape_attributes"]
        label = region["region_attributes"].get(attribute)
        if shape["name"] not in shapes:
            left_out[f"of shape {shape['name']}"] += 1
        elif len(shape["all_points_x"]) < 3:
            left_out["of fewer than 3 points"] += 1
        else:
            outlines.append((index, str(label) if label else None, shape["all_points_x"], shape["all_points_y"]))
    return outlines


def _via_listing(path, folder, shapes, attribute, wanted=None, prefix=""):
    """The Listing of a VIA project, whose images are in a folder.

    shapes: which are outlines. attribute: the one that holds the class. wanted: only these files, if not None.
    """
    content = _load_json(path)
    images = _files(folder)
    left_out = Counter()
    samples = []
    lone = []
    count = 0
    with _reading(path, "a VIA project"):
        for entry in content.get("_via_img_metadata", content).values():
            file = entry["filename"]
            stem, _ = splitext(file)
            if wanted is not None and file not in wanted:
                continue
            outlines = _outlines(entry["regions"], shapes, attribute, left_out)
            if not outlines:
                left_out["images without masks"] += 1
            elif stem not in images:
                lone.append(f"{join(folder, file)}: no such image, but {path} has its masks")
            else:
                read = partial(_read_outlines, outlines)
                samples.append(Sample(prefix + stem, images[stem], path, read))
                count += len(outlines)
    samples.sort(key=lambda sample: sample.name)
    return Listing(samples, count, left_out, sorted(lone))


@reader
def ndd20(root):
    """ABOVE_LABELS.json and ABOVE/, BELOW_LABELS.json and BELOW/"""
    projects = {}
    for side in ("ABOVE", "BELOW"):
        path = _find(root, f"{side}_LABELS.json")
        if path:
            projects[side] = path
    if not projects:
        return None

    def listing(split):
        parts = []
        for side, path in projects.items():
            if split in ("all", side.lower()):
                parts.append(_via_listing(path, join(dirname(path), side), ("polyline", "polygon"), "species",
                                          prefix=f"{side}_"))  # the two have the same file names
        samples, masks, left_out, lone = zip(*parts)
        return Listing(sum(samples, []), sum(masks), sum(left_out, Counter()), sum(lone, []))

    return ["all", *map(str.lower, projects)], listing


@reader
def streets(root):
    """annotations/vehicle-annotations.json and images/"""
    path = _find(root, "annotations/vehicle-annotations.json")
    if not path:
        return None
    folder = join(dirname(dirname(path)), "images")
    lists = _find(root, "train-val-split.json", "data/train-val-split.json")

    def listing(split):
        wanted = None
        if split != "all":
            names = _load_json(lists)
            with _reading(lists, "a list of the splits"):
                wanted = set(names[split])
        return _via_listing(path, folder, ("polygon",), "vehicle_type", wanted)

    return ["all", "train", "val"] if lists else ["all"], listing


# ---------------------------------------------------------------- readers: COCO's JSON
# A file holds up to a million annotations. Parsed, they would fill several GB, and every worker would hold a copy. So
# the file is walked record by record, and all that is kept of an annotation is its place in the file: 16 bytes. When an
# image's masks are asked for, its annotations are read again.

def json_records(path):
    """Walks a file {"key": [record, ...], ...} and yields (key, record, byte offset, length in bytes) for each record.
    Values that are no lists are passed over. ValueError if it is not JSON. Takes twice the file's size of memory.

    Text is taken as Latin-1, one character a byte, so that positions are byte positions: see `_utf8`. A number with a
    fraction stays text: an index needs none of them, and this halves the time.
    """
    with open(path, "rb") as file:
        text = file.read().decode("latin-1")
    decode = json.JSONDecoder(parse_float=str).raw_decode

    def after(pattern, at):
        found = re.compile(pattern).match(text, at)
        if not found:
            raise ValueError(f"not JSON near byte {at:,}" if at < len(text) else "ends too early")
        return found.end()

    separator = r"\s*(,\s*|(?=[]}]))"
    at = after(r"\s*{\s*", 0)
    while not text.startswith("}", at):
        key, at = decode(text, at)
        at = after(r"\s*:\s*", at)
        if text.startswith("[", at):
            at = after(r"\[\s*", at)
            while not text.startswith("]", at):
                record, end = decode(text, at)
                yield key, record, at, end - at
                at = after(separator, end)
            at += 1
        else:
            _, at = decode(text, at)
        at = after(separator, at)


def _utf8(text):
    """A string of json_records as it was meant."""
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        return text


def _unusable(annotation):
    """Why an annotation is left out, or None."""
    for flag, reason in (("iscrowd", "crowd"), ("ignore", "ignore")):
        if float(annotation.get(flag) or 0):
            return reason
    shape = annotation.get("segmentation")
    if not shape:
        return "without a mask"
    if isinstance(shape, list) and max(map(len, shape)) < 6:
        return "of fewer than 3 points"
    return None


def _read_annotations(classes, places, sample):
    """The regions of a sample. places: offset and length of each of its annotations in the file, in turn."""
    height, width = sample.size
    with open(sample.source, "rb") as file:
        for offset, length in zip(places[::2], places[1::2]):
            file.seek(offset)
            annotation = json.loads(file.read(length))
            shape = annotation["segmentation"]
            if isinstance(shape, list):
                mask = polygon_mask([part for part in shape if len(part) >= 6], height, width)
            elif list(shape["size"]) == [height, width]:
                mask = rle_decode(shape)
            else:
                raise ValueError(f"run lengths of {shape['size']} pixels for an image of {[height, width]}")
            yield annotation["id"], classes.get(annotation.get("category_id")), mask, None


def _coco_listing(path, place):
    """The Listing of a COCO-style file. place(image record): the path of the image."""
    classes = {}
    images = {}  # {id: (path, size)}
    places = {}  # {image's id: see _read_annotations}
    left_out = Counter()
    with _reading(path, "a COCO file"):
        for key, record, offset, length in json_records(path):
            if key == "categories":
                classes[record["id"]] = _utf8(record["name"])
            elif key == "images":
                size = int(float(record["height"])), int(float(record["width"]))
                images[record["id"]] = os.path.normpath(place(record)), size
            elif key == "annotations":
                reason = _unusable(record)
                if reason:
                    left_out[reason] += 1
                else:
                    places.setdefault(record["image_id"], array("q")).extend((offset, length))

    files = lru_cache(None)(_files)
    samples = []
    lone = []
    count = 0
    for image, annotations in places.items():
        if image not in images:
            left_out["of an unknown image"] += len(annotations) // 2
            continue
        file, size = images[image]
        folder, name = os.path.split(file)
        stem, _ = splitext(name)
        there = files(folder).get(stem)  # by stem, because some sets' records err in the ending
        if there:
            read = partial(_read_annotations, classes, annotations)
            samples.append(Sample(stem, there, path, read, size))
            count += len(annotations) // 2
        else:
            lone.append(f"{file}: no such image, but {path} has its masks")
    left_out["images without masks"] = len(images.keys() - places.keys())
    samples.sort(key=lambda sample: sample.name)
    return Listing(samples, count, left_out, sorted(lone))


def _coco_splits(root, pattern, place):
    """What a reader returns of a set with COCO's folders; the pattern's `*` is the split.

    place(split, image record): the image's folder, which is in root, beside it or in its neighbour coco/; its name.
    """
    head, tail = pattern.split("*")
    paths = {}
    for path in _find_all(root, f"annotations/{pattern}", pattern):
        split = basename(path).removeprefix(head).removesuffix(tail)
        paths.setdefault(split, path)
    near = dirname(os.path.abspath(root))

    @lru_cache(None)
    def home(folder):
        for place in (_find(root, folder), join(near, folder), join(near, "coco", folder)):
            if place and isdir(place):
                return place
        return join(root, folder)

    def listing(split):
        def path_of(image):
            folder, name = map(_utf8, place(split, image))
            return join(home(folder), name)
        return _coco_listing(paths[split], path_of)

    splits = sorted(split for split in paths if "_" not in split)  # without LVIS's image_info_test_dev
    return (splits, listing) if splits else None


@reader
def lvis(root):
    """lvis_v1_<split>.json, train2017/, val2017/ (in ROOT or in its neighbour coco/)"""
    def place(_, image):
        url = image.get("coco_url")  # version 1 has no file names; most images of its val split are from train2017
        return url.rsplit("/", 2)[-2:] if url else ("val2017", image["file_name"][-16:])
    return _coco_splits(root, "lvis_v1_*.json", place)


@reader
def coco(root):
    """annotations/instances_<split>2017.json, train2017/, val2017/"""
    def place(split, image):
        return f"{split}2017", image["file_name"]
    return _coco_splits(root, "instances_*2017.json", place)


@reader
def lis(root):
    """annotations/lis_coco_*.json, RGB-dark/, RGB-normal/"""
    folder = _find(root, "RGB-dark", "RGB-normal")
    if not folder:
        return None
    paths = {}
    for part in ("train", "test", "traintest"):
        for split, file in ((part, f"lis_coco_JPG_{part}+1.json"), (f"normal_{part}", f"lis_coco_png_{part}.json")):
            path = _find(root, f"annotations/{file}", file)
            if path:
                paths[split] = path

    def listing(split):
        light = "RGB-normal" if split.startswith("normal") else "RGB-dark"
        images = join(dirname(folder), light)
        return _coco_listing(paths[split], lambda image: join(images, _utf8(image["file_name"])))

    return (list(paths), listing) if paths else None


# ---------------------------------------------------------------- load_dataset

def find_splits(root, kind="auto"):
    """(kind, names of the splits, function(split) -> Listing). "auto" is the kind that the folder looks like."""
    if kind not in ("auto", *KINDS):
        raise DatasetError(f"no dataset kind {kind!r}; there are: auto, {', '.join(KINDS)}")
    if not isdir(root):
        raise MissingError(f"{root}: no such folder (python data.py demo/ --make-demo makes a small dataset)")

    asked = list(KINDS) if kind == "auto" else [kind]
    answers = {name: KINDS[name](root) for name in asked}
    found = [name for name, answer in answers.items() if answer]
    if len(found) > 1 and "robustseg" not in found:
        raise DatasetError(f"{root}: holds {' and '.join(found)}; choose one, as in {found[0]}={root}")
    if found:
        return found[0], *answers[found[0]]  # robustseg is the first

    if isdir(join(root, "clear")):
        raise MissingError(f"{root}: this is one split of a dataset; name its parent folder and choose the split")
    looked_for = "; ".join(f"{name}: {KINDS[name].__doc__}" for name in asked)
    holds = ", ".join(sorted(os.listdir(root))[:6]) or "nothing"
    raise MissingError(f"{root}: no dataset found; looked for {looked_for}. The folder holds: {holds}")


def load_dataset(root, split, kind="auto", strict=False):
    """One split as a Dataset. strict: a bad or missing file is an error, else it is skipped and counted.

    Where a set other than robustseg has no split "val", one in 20 images of "train" (or of "all"), chosen by their
    names, are its "val", and the others its "train".
    """
    root = os.fspath(root)
    kind, splits, listing = find_splits(root, kind)
    own_layout = kind == "robustseg"
    divide = split in ("train", "val") and "val" not in splits and not own_layout
    listed = split
    if divide:
        listed = "train" if "train" in splits else "all"
    if listed not in splits:
        looked = f" (no folder {join(root, split, 'clear')})" if own_layout else ""
        raise MissingError(f"{root} ({kind}): no split {split!r}{looked}; there are: {', '.join(splits)}")

    samples, masks, left_out, lone = listing(listed)
    if divide:
        samples = [s for s in samples if (seed_of(s.name, "val") % 20 == 0) == (split == "val")]
        masks = None
    folder = join(root, listed) if own_layout else join(root, "degraded", listed)
    ready = frozenset(name for name in CORRUPTIONS if isdir(join(folder, name)))
    for sample in samples:
        sample.folder = folder
        sample.ready = ready

    dataset = Dataset(root, split, kind, samples, strict, masks, +Counter(left_out))
    for line in lone:
        dataset.skip(SampleError(line))
    if not samples:
        first = f"; the first file skipped: {lone[0]}" if lone else ""
        raise MissingError(f"{dataset.summary()}: nothing to use here{first}")
    return dataset


def path_and_kind(root):
    """As the command lines name a dataset: "lvis=coco/" -> ("coco/", "lvis"), and any other path -> (path, "auto")."""
    kind, _, path = str(root).partition("=")
    return (path, kind) if kind in KINDS else (root, "auto")


def load_datasets(roots, split, strict=False, prompt_files=()):
    """The same split of several roots, each a path or KIND=PATH: a list of Datasets, with pinned prompts if asked."""
    datasets = []
    for root in roots:
        path, kind = path_and_kind(root)
        datasets.append(load_dataset(path, split, kind, strict))
    if prompt_files:
        pin_prompts(datasets, prompt_files)
    return datasets


# ---------------------------------------------------------------- prompts in a file, for other programs and other labs
# {"format": "gara-sam prompts 1", "sets": [{"kind": "coco", "split": "val", "seed": 0, "samples": {
#     "000000000139": {"size": [426, 640], "masks": {"1640282": {"points": [[x, y], [x, y], [x, y]],
#                                                                "box": [x0, y0, x1, y1]}, ...}}, ...}}]}
# A sample is named as Sample.name, a mask as Sample.indices. All numbers are indices of pixels of the upright image, of
# which size is [height, width]; a sample that could not be read has size null and no masks.

PROMPTS_FORMAT = "gara-sam prompts 1"


def _prompts_entry(sample, seed):
    """A sample's entry in a prompts file."""
    masks = sample.masks()
    points, boxes = sample.prompts(masks, seed)
    entries = {}
    for index, clicks, box in zip(sample.indices, points.astype(int), boxes.astype(int)):
        entries[str(index)] = dict(points=clicks.tolist(), box=box.tolist())
    return dict(size=masks.shape[1:], masks=entries)


def export_prompts(datasets, path, seed=0):
    """Writes the prompts of all masks: whole, or not at all. Bad samples are skipped and counted in their dataset."""
    sets = []
    for dataset in datasets:
        lines = []
        progress = Progress(f"{dataset.split}: prompts", len(dataset))
        for sample in dataset:
            progress.update()
            try:
                entry = _prompts_entry(sample, seed)
            except SampleError as error:
                dataset.skip(error)
                entry = dict(size=None, masks={})
            lines.append(f"{json.dumps(sample.name)}: {json.dumps(entry)}")
        progress.close()
        head = json.dumps(dict(kind=dataset.kind, split=dataset.split, seed=seed))
        sets.append(head.removesuffix("}") + ', "samples": {\n' + ",\n".join(lines) + "}}")
    head = json.dumps(dict(format=PROMPTS_FORMAT))
    save_text(head.removesuffix("}") + ', "sets": [\n' + ",\n".join(sets) + "]}\n", path)


def pin_prompts(datasets, paths):
    """Makes the datasets use the prompts in these files. DatasetError if a file is not for them."""
    sets = {}
    for path in paths:
        content = _load_json(path)
        with _reading(path, "a prompts file (data.py ROOT --export-prompts FILE writes one)"):
            if content["format"] != PROMPTS_FORMAT:
                raise DatasetError(f"{path}: format {content['format']!r} is not {PROMPTS_FORMAT!r}")
            for entry in content["sets"]:
                sets[entry["kind"], entry["split"]] = path, dict(entry["samples"])

    for dataset in datasets:
        if (dataset.kind, dataset.split) not in sets:
            there = ", ".join(f"{kind} {split}" for kind, split in sets) or "nothing"
            raise DatasetError(f"{', '.join(map(str, paths))}: no prompts for {dataset.kind} {dataset.split}, but for "
                               f"{there}")
        path, entries = sets[dataset.kind, dataset.split]
        for sample in dataset:
            sample.pinned = entries.get(sample.name)
        missing = [sample.name for sample in dataset if sample.pinned is None]
        if missing:
            raise DatasetError(f"{path}: does not fit the data: nothing for {len(missing):,} of {len(dataset):,} "
                               f"samples of {dataset.root}, such as {missing[0]}")
        for sample in spread(dataset, 20):  # the others are checked when they are used
            try:
                sample.prompts()
            except PinnedError as error:
                raise DatasetError(f"{path}: does not fit the data: {error}") from None
            except SampleError:
                continue  # whoever reads this sample will report it


# ---------------------------------------------------------------- writing folders of degraded images

def _parallel(work, jobs):
    """work(job) for all jobs, on all cores, in any order."""
    workers = min(os.cpu_count() or 1, len(jobs) // 8)
    if workers < 2:
        yield from map(work, jobs)
        return
    with multiprocessing.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:  # Ctrl-C: one voice
        yield from pool.imap_unordered(work, jobs, chunksize=4)


def _write_degraded(job):
    """Writes the degraded versions of one image: (how many, the line to report if it is bad)."""
    sample, conditions = job
    try:
        image = read_image(sample.clear, sample.size)
    except SampleError as error:
        return len(conditions), str(error)
    for condition in conditions:
        jpeg = degraded_jpeg(image, condition, seed_of(sample.name, condition))
        save_bytes(jpeg, join(sample.folder, condition, f"{sample.name}.jpg"))
    return len(conditions), None


def write_corruptions(dataset):
    """One folder per corruption (beside clear/, for other sets than Robust-Seg in ROOT/degraded/SPLIT), with the pixels
    of Sample.image(condition). Existing files stay, so that an interrupted run can go on."""
    folder = dataset[0].folder
    there = {}
    for condition in CORRUPTIONS:
        os.makedirs(join(folder, condition), exist_ok=True)
        there[condition] = _files(join(folder, condition)).keys()
    jobs = []
    for sample in dataset:
        conditions = [condition for condition in CORRUPTIONS if sample.name not in there[condition]]
        if conditions:
            jobs.append((sample, conditions))

    progress = Progress(f"{dataset.split}: degraded images", sum(len(conditions) for _, conditions in jobs))
    for count, line in _parallel(_write_degraded, jobs):
        progress.update(count)
        if line:
            dataset.skip(SampleError(line))
    progress.close()


# ---------------------------------------------------------------- the demo's painter (may be skipped)
# From here to the command line: how a scene of the synthetic dataset is drawn. No other part of this file needs it.
# Shapes are lists of (outline, value): polygons in the unit disc, drawn in turn with value 1 (add) or 0 (cut out) at
# four times the resolution. So unions, holes and exact edges need no geometry.

def _turn(points, angle):
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
    rng = np.random.default_rng(seed)
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


def _write_scene(job):
    folder, name, *scene = job
    image, masks = demo_scene(*scene)
    os.makedirs(join(folder, "clear"), exist_ok=True)
    os.makedirs(join(folder, "masks"), exist_ok=True)
    Image.fromarray(image).save(join(folder, "clear", f"{name}.jpg"), quality=95)
    np.save(join(folder, "masks", f"{name}.npy"), masks)


def make_demo(root, train=2000, val=64, test=128, size=128, seed=0, patterned=0.5):
    """Writes the synthetic dataset. It appears under `root` when it is complete, or not at all."""
    root = os.path.abspath(root)
    if exists(root) and not (isdir(root) and not os.listdir(root)):
        raise DatasetError(f"{root}: exists and is not an empty folder; choose another name or remove it")
    part = f"{root}.part{os.getpid()}"
    jobs = []
    for split, count in (("train", train), ("val", val), ("test", test)):
        # Seeds above 32 bits, so that no scene equals one that training draws on the fly from a 32-bit seed.
        first = seed_of("demo", seed, split) << 32
        for k in range(count):
            jobs.append((join(part, split), f"{split}_{k:05d}", first + k, size, patterned))
    try:
        progress = Progress("demo scenes", len(jobs))
        for _ in _parallel(_write_scene, jobs):
            progress.update()
        progress.close()
        if isdir(root):
            os.rmdir(root)
        os.replace(part, root)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def make_missing_demo(root):
    """Makes the demo dataset where `root` is not there and its last part says demo: the two commands of a newcomer."""
    name = basename(os.path.normpath(root))
    if not exists(root) and name.startswith("demo"):
        make_demo(root)


# ---------------------------------------------------------------- command line

def draw_prompts(image, masks, points, boxes):
    """The image with its objects tinted, and their boxes and points: a Pillow image."""
    names = ("red", "lime", "dodgerblue", "yellow", "magenta", "cyan", "orange", "white")
    colours = [ImageColor.getrgb(names[k % len(names)]) for k in range(len(masks))]
    tinted = image.copy()
    for mask, colour in zip(masks, colours):
        tinted[mask] = tinted[mask] // 2 + np.array(colour, np.uint8) // 2
    page = Image.fromarray(tinted)
    pen = ImageDraw.Draw(page)
    for clicks, box, colour in zip(points, boxes, colours):
        pen.rectangle(box.tolist(), outline=colour)
        for x, y in clicks.tolist():
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour, outline="white")
    return page


def contact_sheet(samples, path, tile=192, columns=8):
    """Draws each sample twice: clear with masks and prompts, then degraded, each in the next of the 15 conditions."""
    images = []
    for k, sample in enumerate(samples):
        masks = sample.masks()
        corruption = CONDITIONS[1 + k % len(CORRUPTIONS)]
        images.append(draw_prompts(sample.image(), masks, *sample.prompts(masks)))
        images.append(Image.fromarray(sample.image(corruption)))
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * tile, rows * tile), "white")
    for k, image in enumerate(images):
        corner = k % columns * tile + 2, k // columns * tile + 2
        page.paste(ImageOps.contain(image, (tile - 4, tile - 4)), corner)
    save_png(page, path)


def describe(dataset, most=200):
    """Prints what a split holds, from at most `most` samples spread over it. Returns the good ones among them."""
    good, sizes, counts, areas, left_out = [], [], [], [], Counter()
    chosen = spread(dataset, most)
    progress = Progress(f"{dataset.split}: reading", len(chosen))
    for sample in chosen:
        progress.update()
        try:
            masks = sample.masks()
            image = sample.image()
        except SampleError as error:
            dataset.skip(error)
            continue
        finally:
            left_out += sample.left_out
        good.append(sample)
        sizes.append(image.shape[:2])
        counts.append(len(masks))
        areas.extend(masks.mean((1, 2)))
    progress.close()

    print(dataset.summary())
    for line in dataset.skipped[:20]:
        print(f"  skipped: {line}")
    if len(dataset.skipped) > 20:
        print(f"  and {len(dataset.skipped) - 20:,} more")
    if not good:
        return good

    h0, w0 = np.min(sizes, 0)
    h1, w1 = np.max(sizes, 0)
    left = f"; left out: {_account(left_out)}" if left_out else ""
    print(f"  {len(good):,} of them read: height {h0} to {h1}, width {w0} to {w1}; {np.mean(counts):.1f} masks an "
          f"image ({min(counts)} to {max(counts)}){left}")
    tiny, small, medium, large = np.histogram(areas, [0, 1e-3, 1e-2, 1e-1, 1.1])[0] / len(areas)
    print(f"  area of a mask: {tiny:.0%} below 0.1 % of the picture, {small:.0%} up to 1 %, {medium:.0%} up to 10 %, "
          f"{large:.0%} above; median {np.median(areas):.1%}")
    classes = Counter(label for sample in good for label in sample.labels if label)
    if classes:
        print("  classes: " + ", ".join(f"{name} {count:,}" for name, count in classes.most_common(12)))
    ready = [corruption for corruption in CORRUPTIONS if corruption in good[0].ready]
    print(f"  degraded images on disk: {', '.join(ready) or 'none, so they are made on the fly'}")
    return good


def parse_arguments(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    add = parser.add_argument
    add("root", help="dataset folder, or KIND=FOLDER where its kind is not plain to see")
    add("--split", help="only this split")
    add("--sheet", metavar="PNG", help="draw a contact sheet of the split (or the first one)")
    add("--check", action="store_true", help="read all samples, not only 200, and name the bad ones")
    add("--strict", action="store_true", help="a bad or missing file is an error")
    add("--corrupt", action="store_true", help="write one folder per corruption")
    add("--export-prompts", metavar="JSON", help="write the prompts of every mask")
    add("--seed", type=int, default=0, help="of the exported prompts (0)")
    add("--make-demo", action="store_true", help="make the synthetic dataset")
    add("--scenes", nargs=3, type=int, default=(2000, 64, 128), metavar=("TRAIN", "VAL", "TEST"),
        help="how many scenes --make-demo makes (2000 64 128)")
    add("--patterned", type=float, default=0.5, metavar="P", help="of the objects that --make-demo makes, the share "
        "with a bold pattern (0.5; the tiny SAM was trained with 0)")
    return parser.parse_args(argv)


def run(args):
    """What the command line asks for."""
    root, kind = path_and_kind(args.root)
    if args.make_demo:
        make_demo(root, *args.scenes, patterned=args.patterned)
    kind, splits, _ = find_splits(root, kind)
    datasets = []
    for split in [args.split] if args.split else splits:
        try:
            dataset = load_dataset(root, split, kind, args.strict)
        except MissingError as error:  # one download of several, such as ACDC's ground truth of the _ref images
            if args.split or args.strict or len(splits) == 1:
                raise
            print(error)
            continue
        if args.corrupt:
            write_corruptions(dataset)
            dataset = load_dataset(root, split, kind, args.strict)
        good = describe(dataset, len(dataset) if args.check else 200)
        if args.sheet and not datasets:
            contact_sheet(good[:20], args.sheet)
        datasets.append(dataset)

    if not datasets:
        raise MissingError(f"{root}: no split of it can be used")
    if args.export_prompts:
        export_prompts(datasets, args.export_prompts, args.seed)
        print(f"written: {args.export_prompts}")


def main(argv=None):
    """Runs the command line; a user's mistake ends in one line and exit code 2."""
    args = parse_arguments(argv)
    try:
        run(args)
    except (DatasetError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; no file is left half-written, so run the same command again\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
