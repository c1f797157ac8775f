"""Every dataset of the paper as one kind of sample: an image, the masks of its objects, the prompts that ask for them.

The big idea: nothing depends on order. A prompt, a corruption or a demo scene draws from a seed made of NAMES (of the
image, of the condition, the number of the mask). So two people, two methods and any number of workers see the same
points, the same boxes and the same noise. Names are unique within a split: see `_names`.

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

and your own data, if it is none of these:

    coco        any .json in COCO's form, its images beside it, or in images/ or train/, val/, test/ beside or above
    folder      images/ beside masks/<stem>.png, <stem>_<anything>.png, <stem>/<anything>.png or <stem>.npy
    yolo        images/ beside labels/<stem>.txt, the outlines of YOLO's segmentation

The demo dataset has robustseg's layout. A degraded image that is not on the disk is made on the fly; `--corrupt`
writes the very same pixels to the disk, which evaluation then reads. Training draws anew in each epoch, unless told to
use what is stored.

    python data.py ROOT [--split test] [--sheet sheet.png]      counts, sizes, areas, a contact sheet
    python data.py ROOT --check                                 read every file and name the bad ones
    python data.py ROOT --corrupt [--split test]                write one folder per corruption; resumable
    python data.py ROOT --split test --export-prompts p.json    pin the prompts in a file
    python data.py demo/ --make-demo                            make the synthetic dataset (half a minute)

In this file: reading images, degrading them, masks, prompts and samples, the readers (to add a dataset, see `Listing`),
load_dataset, prompts in a file, degraded folders, the demo (assets/painter.py draws its scenes).
"""
import argparse
import contextlib
import glob
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import unicodedata
import warnings
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from os.path import basename, dirname, exists, isdir, isfile, join, splitext
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

import numpy as np
from PIL import Image, ImageDraw

from assets.painter import demo_scene
from corruptions import CORRUPTIONS, OTHERS, corrupt, generator

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


IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
IMAGE_ENDINGS += tuple(map(str.upper, IMAGE_ENDINGS))


class DatasetError(Exception):
    """The dataset cannot be used as asked. One line: what was looked for, what was found, what to do."""

    def __str__(self):
        return " ".join(super().__str__().splitlines())  # a file's name may hold line breaks


class MissingError(DatasetError, FileNotFoundError):
    """A folder is not there."""


class SampleError(DatasetError):
    """One sample is bad, the others are not. One line that begins with the file."""


class PinnedError(SampleError):
    """The prompts file and a mask do not belong together."""


@contextlib.contextmanager
def explained(file, what, kind=SampleError):
    """Whatever goes wrong within, be it a damaged file or a lack of memory, is this file's: one line that says what.

    A single bad file must not end a run, and nobody can list all that Pillow, NumPy and json raise on one.
    """
    try:
        yield
    except DatasetError:  # already explained
        raise
    except Exception as error:
        raise kind(f"{file}: {what} ({_why(error)})") from error


def _reading(path, what):
    """What goes wrong within means that the file is damaged, or not `what` it is taken for: DatasetError."""
    return explained(path, f"not {what}, or damaged", DatasetError)


def line_of(error):
    """What an exception says, as one line."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _why(error):
    """An exception as half a line, without the path, which the caller names."""
    if getattr(error, "strerror", None):
        return error.strerror
    text = str(error) or type(error).__name__
    if isinstance(error, KeyError):
        return f"no {text}"
    return text.splitlines()[0].split(" '")[0]


def plain_output():
    """Lets a program print any name, also one that is not UTF-8 or that the terminal's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


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
    part = f"{path}.part{os.getpid()}"  # two programs that write the same file do not meet
    try:
        with open(part, "wb") as file:
            file.write(content)
        os.replace(part, path)
    except OSError as error:
        raise DatasetError(f"{path}: cannot write this file ({_why(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)


def save_text(text, path):
    """Writes a text file in UTF-8: whole, or not at all. DatasetError."""
    save_bytes(text.encode(errors="backslashreplace"), path)


@contextlib.contextmanager
def alone_in(folder):
    """Makes the folder and lets no second program write into it within the block: DatasetError if one does.

    The lock is the system's and ends with the process, however that ends.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(join(folder, ".lock"), "w")
    except OSError as error:
        raise DatasetError(f"{folder}: cannot write into this folder ({_why(error)})") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise DatasetError(f"{folder}: another program is writing there; wait until it has ended, or name another "
                               "folder") from None
        except (OSError, AttributeError) as error:  # some network drives have no locks, nor has Windows these
            print(f"{folder}: cannot be locked ({_why(error)}); let no other program write there", file=sys.stderr)
        yield


def end_with_parent(_=None):
    """In a worker: ends it once its parent has ended, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    if parent is None:  # this is no worker
        return

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_worker(_=None):
    """A worker's first act (a DataLoader's worker_init_fn): it is to end with its parent, whatever ends that one, and
    not by a Ctrl-C or SIGTERM that reaches both."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def end_workers(others):
    """Ends all workers of this process but `others`, whatever they are doing."""
    for child in multiprocessing.active_children():
        if child not in others:
            child.kill()
            child.join()


def from_workers(loader):
    """What a DataLoader gives, whose workers begin with `start_worker`. None outlives this generator, however it ends.
    """
    others = multiprocessing.active_children()
    try:
        items = iter(loader)
        if loader.num_workers and hasattr(signal, "SIGCHLD"):
            # A dead worker is noticed when its item is waited for; PyTorch's handler would break in anywhere.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from items
    finally:
        end_workers(others)


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
AS_STORED = UPRIGHT | {6: UPRIGHT[8], 8: UPRIGHT[6]}  # and what undoes that


@contextlib.contextmanager
def _open(path):
    """Yields an image file. What Pillow warns of, more than 89 million pixels, is refused: it takes too much memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as file:
            yield file


@contextlib.contextmanager
def _opened(path, annotated):
    """Yields an image file, the turn that it needs, if any, and the size (H, W) that it then has. SampleError.

    annotated: the size that its annotation names, or None.
    """
    with explained(path, "cannot read this image"), _open(path) as file:
        width, height = file.size
        orientation = file.getexif().get(0x0112, 1)
        stored = upright = height, width
        turned_by_pillow = file.format == "TIFF"  # on loading; the size is the upright one already
        if orientation > 4 and turned_by_pillow:
            stored = width, height
        elif orientation > 4:
            upright = width, height

        if annotated and tuple(annotated) == stored:  # it was annotated as stored
            size = stored
            turn = AS_STORED.get(orientation) if turned_by_pillow else None
        else:
            size = upright
            turn = None if turned_by_pillow else UPRIGHT.get(orientation)
        if annotated and tuple(annotated) != size:
            raise SampleError(f"{path}: is {size[1]} x {size[0]} pixels (width x height), but its annotation is "
                              f"for {annotated[1]} x {annotated[0]}")
        yield file, turn, size


def image_size(path, annotated=None):
    """(H, W) of the image as `read_image(path, annotated)` gives it, from the file's header alone."""
    with _opened(path, annotated) as (_, _, size):
        return size


def read_image(path, annotated=None):
    """uint8 HxWx3 RGB of any image that Pillow reads; of several frames the first, without alpha. SampleError.

    An image is turned upright as its EXIF says, unless the pixels as stored have the size (H, W) that its annotation
    names: then they were annotated as stored. It is an error if neither has.
    """
    with _opened(path, annotated) as (file, turn, _):
        image = _eight_bits(file)
        if turn is not None:
            image = image.transpose(turn)
        return np.array(image.convert("RGB"))


def _eight_bits(file):
    """An opened image with 8 bits a level, in a mode that converts to "L" and "RGB". ValueError if that is guesswork.

    Deeper greys lose their low bits. Files of 16 bits often hold fewer. How many is what the file states, or else the
    least of 8, 10, 12, 14 and 16 that its largest level fits in.
    """
    bits, stated = _depth(file)
    file.load()
    file.info.pop("transparency", None)
    if file.mode in ("La", "RGBa"):  # levels are multiplied by alpha
        return file.convert(file.mode.upper())
    if file.mode == "F":
        raise ValueError("its levels are floating-point numbers of unknown range; store 8 bits")
    if file.mode.startswith("I"):
        levels = np.asarray(file)
        largest = max(int(levels.max()), stated)
        if levels.min() < 0 or largest >= 1 << 16:
            raise ValueError(f"its levels, {levels.min()} to {largest}, do not fit in 16 bits; store 8 bits")
        bits = next(bits for bits in (8, 10, 12, 14, 16) if largest < 1 << bits)
        return Image.fromarray((levels >> (bits - 8)).astype(np.uint8))
    if bits == 16 and stated < 65535 and np.max(file.convert("RGB")) < 64:  # Pillow has kept the upper 8 bits
        raise ValueError("its colours of 16 bits hold no more than 14; store 8 bits")
    return file


def _depth(file):
    """Of an opened image: bits that each level is stored in, 0 if unknown; the largest level it may have, if its file
    says so, else 0."""
    if file.format in ("PPM", "JPEG2000"):  # which Pillow stretches to 16 bits
        return 0, 65535
    if file.format == "TIFF":
        bits = file.tag_v2.get(258, (1,))[0]  # BitsPerSample
        largest = file.tag_v2.get(281, (0,))[0]  # MaxSampleValue
        return bits, largest if largest or bits >= 16 else (1 << bits) - 1
    if file.format != "PNG":
        return 0, 0
    with open(file.filename, "rb") as raw:
        bits = raw.read(25)[24]
        rest = raw.read() if bits == 16 else b""
    head, _, _ = rest.partition(b"IDAT")
    _, found, significant = head.partition(b"sBIT")
    return bits, (1 << significant[0]) - 1 if found else 0


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
    runs = np.asarray(counts, np.float64)  # some tools write 5.0 or "5"
    pixels = height * width
    if not (runs >= 0).all() or runs.sum() != pixels or (runs % 1).any():
        raise ValueError(f"run lengths do not make up {height} x {width} pixels")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs.astype(np.int64)).reshape(width, height).T


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
    for k, draw in enumerate(generator(seed).random(3)):
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
    name: str  # unique in its split; all seeds derive from it
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
        """uint8 HxWx3. A degraded image is read from its folder if it is there (and `stored`), else made from `seed`.

        A condition may carry a strength: "fog@0.5" is made from the same seed as "fog".
        """
        corruption, _ = name_and_strength(condition)
        path = self._stored(condition) if stored else None
        if path:
            image = read_image(path)
            self._require_size(path, image.shape[:2])
            return image
        if seed is None:
            seed = seed_of(self.name, corruption)
        image = read_image(self.clear, self.size)
        with explained(self.clear, "cannot be degraded"):
            return degrade(image, condition, seed)

    def _stored(self, condition):
        """The path of its degraded image; None if there is none. SampleError if there are two."""
        paths = []
        if condition in self.ready:
            for ending in IMAGE_ENDINGS:
                path = join(self.folder, condition, self.name + ending)
                if exists(path) and not (paths and os.path.samefile(path, paths[0])):
                    paths.append(path)
        if len(paths) > 1:
            raise SampleError(f"{paths[0]} and {paths[1]}: which is {condition} of {self.name}? remove one")
        return paths[0] if paths else None

    def masks(self):
        """bool NxHxW, N >= 1, one plane per object. What is left out (crowds, empty masks, ...) is counted in
        `left_out`; `indices` and `labels` belong to the planes that remain."""
        size = image_size(self.clear, self.size)
        self.left_out = Counter()
        known = set()
        kept = []
        planes = []
        try:
            for index, label, mask, reason in self.read(self):
                while str(index) in known:  # an id that the file has twice: 5, 5+
                    index = f"{index}+"
                known.add(str(index))
                if not reason and mask.shape != size:
                    self._require_size(self.source, mask.shape)
                if not reason and not mask.any():
                    reason = "empty"
                if reason:
                    self.left_out[reason] += 1
                else:
                    kept.append((index, label))
                    planes.append(mask)
            if not planes:
                why = account(self.left_out) or "none"
                raise SampleError(f"{self.source}: {self.name} has no mask to use ({why})")
            self._kept = tuple(zip(*kept))
            return np.stack(planes)
        except DatasetError:
            raise
        except Exception as error:  # the source now, as a reader of several files names each
            raise SampleError(f"{self.source}: cannot read the masks of {self.name} ({_why(error)})") from error

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
        except Exception:  # whatever else stands there
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


def account(counter):
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
        """One line: what it is, by what files that is known, images, masks, what is left out and why."""
        count = "" if self.masks is None else f", {self.masks:,} masks"
        left = f"; left out: {account(self.left_out)}" if self.left_out else ""
        first = f"; first: {self[0].clear} with {self[0].source}" if self.samples else ""
        return (f"{join(self.root, self.split)} ({self.kind}): {len(self):,} images{count}{left}; "
                f"{len(self.skipped):,} files skipped{first}")


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

    A sample's `read` reads its masks when they are asked for. _paired() makes the Listing where each image has a mask
    file of its own, _annotated() where one file holds the masks of many. An archive may have been unpacked into a
    folder of its own name, so _find() looks for everything up to two folders down. The rest is load_dataset's: the
    folder of degraded images, a split "val" where there is none.
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


def _stem(file):
    return splitext(basename(file))[0]


def _names(files):
    """{file: sample's name} of the paths of a split's files: the stem, 0001. Where stems repeat, it is the path up to
    the ending, a/0001; where that repeats, too, the path, a/0001.png."""
    names = {}
    for form in (_stem, lambda file: splitext(file)[0], str):
        count = Counter(map(form, files))
        for file in files:
            if count[form(file)] == 1:
                names.setdefault(file, form(file).replace("../", "").lstrip("/"))
    return names


def _named(paths):
    """{file: path} -> {sample's name: path}."""
    return {name: paths[file] for file, name in _names(paths).items()}


def _listed(folder, endings=IMAGE_ENDINGS):
    """{file: path}. Hidden files are left out: an archive made by macOS holds a "._x.jpg" beside each "x.jpg". There,
    accents are letters of their own as well; here they are joined to theirs, as in the annotations."""
    paths = {}
    if not folder or not isdir(folder):
        return paths
    for file in sorted(os.listdir(folder)):
        if file.lower().endswith(endings) and not file.startswith("."):
            paths[unicodedata.normalize("NFC", file)] = join(folder, file)
    return paths


def _files(folder, endings=IMAGE_ENDINGS):
    """{stem: path}; where stems repeat, {file: path}."""
    return _named(_listed(folder, endings))


def _below(top):
    """Yields the path of each file below a folder, relative to it. Linked folders are followed, each folder once."""
    known = set()
    for folder, folders, files in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in known:
            folders.clear()
            continue
        known.add(real)
        folders.sort()
        for file in files:
            yield os.path.relpath(join(folder, file), top)


def _only(paths, stems):
    """Those of {stem: path} whose stem is among these."""
    return {stem: path for stem, path in paths.items() if stem in stems}


def _paired(images, masks, read):
    """The Listing of {stem: path of the image} and {stem: path of the mask file}."""
    samples = []
    lone = []
    for name in sorted(images.keys() | masks.keys()):
        image = images.get(name)
        mask = masks.get(name)
        if image and mask:
            samples.append(Sample(name, image, mask, read))
            continue
        partners = images if mask else masks
        twins = [partners[name + ending] for ending in IMAGE_ENDINGS if name + ending in partners]
        if twins:
            lone.append(f"{image or mask}: belongs to {' or to '.join(twins)}? rename or remove one")
        else:
            lone.append(f"{image}: has no mask file" if image else f"{mask}: has no image")
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
    with _open(sample.source) as file:
        grey = np.array(_eight_bits(file).convert("L"))
    yield 0, None, _binary(grey), None


def _pixels(path, mode):
    """The numbers in a label map as they are stored: int32 HxW or HxWxbands. ValueError if not of this mode."""
    with _open(path) as file:
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
    if not splits or not _find(root, "*/masks/*.npy") and folder(root):
        return None
    return splits, listing


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
        with open(join(lists, f"{split}.txt"), encoding="utf-8-sig", errors="surrogateescape") as file:
            text = unicodedata.normalize("NFC", file.read())
        stems = {splitext(line.strip())[0] for line in text.splitlines() if line.strip()}
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
    for file in _below(top):
        if file.endswith(ending) and (split is None or split in dirname(file).split(os.sep)):
            frames[file.removesuffix(ending) + ".png"] = join(top, file)
    return _named(frames)


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
            return _coco_listing(detection, lambda image: (shots, image["file_name"]))

        images = _frames(shots, f"_rgb{reference}_anon.png", split)
        panoptic = _find(root, f"gt_panoptic/{name}_panoptic.json")
        if panoptic:
            content = _load_json(panoptic)
            ending = f"_gt{reference}_panoptic.png"
            segments = {}
            with _reading(panoptic, "a panoptic file"):
                for row in content["annotations"]:
                    frame = _as_path(row["file_name"]).removesuffix(ending) + ".png"
                    _once(segments, frame, row["segments_info"], panoptic)
            segments = _named(segments)
            maps = _frames(dirname(panoptic), ending, split)
            found = _paired(_only(images, segments), _only(maps, segments), None)
            for sample in found.samples:
                sample.read = partial(_read_panoptic, segments.pop(sample.name))
            lone = [f"{panoptic}: {frame} has no image and PNG, or several" for frame in sorted(segments)]
            return found._replace(lone=lone)

        maps = _frames(_find(root, "gt") or root, f"_gt{reference}_labelTrainIds.png", split)
        return _paired(_only(images, maps), maps, _read_train_ids)

    splits = {basename(folder) for folder in glob.glob(join(glob.escape(shots), "*", "*"))}
    return sorted(split for split in splits if not split.startswith("test")), listing


# ---------------------------------------------------------------- readers: VIA projects, all outlines in one JSON file

def _load_json(path):
    with _reading(path, "JSON"), open(path, "rb") as file:
        return json.loads(file.read())


def _as_path(text):
    """A path as JSON files write it, perhaps on Windows or as an address, in this system's form."""
    if "://" in text:
        address, _, _ = text.partition("?")
        text = address.split("/", 3)[-1]
    return os.path.normpath(unicodedata.normalize("NFC", text.replace("\\", "/")))


def _once(table, key, value, path):
    """table[key] = value; DatasetError if the file of this path gave it another value before."""
    other = table.setdefault(key, value)
    if other != value:
        raise DatasetError(f"{path}: has two records of {key}: {str(other)[-150:]} and {str(value)[-150:]}")


def _annotated(source, known, records, left_out):
    """The Listing of an annotation file, which holds the masks of many images.

    known: the paths of all its images, by which they are named. records: for each image with masks the folder and the
    path in it, its size or None, its number of masks and its `read`.
    """
    listed = lru_cache(None)(_listed)
    files = lru_cache(None)(_files)
    names = _names(set(known))
    times = Counter(file for _, file, *_ in records)

    def find(folder, file):
        if names[file] != _stem(file):  # only what is exactly there, since others have the same stem
            return listed(join(folder, dirname(file))).get(basename(file))
        while True:  # some sets' records err in the ending, or in the folders
            above = join(folder, dirname(file))
            found = listed(above).get(basename(file)) or files(above).get(_stem(file))
            if found or not dirname(file):
                return found
            _, _, file = file.partition("/")

    samples = []
    lone = []
    count = 0
    for folder, file, size, masks, read in records:
        path = find(folder, file)
        if times[file] > 1:
            lone.append(f"{join(folder, file)}: {source} has two images of this name")
        elif not path:
            lone.append(f"{join(folder, file)}: no such image, but {source} has its masks")
        else:
            samples.append(Sample(names[file], path, source, read, size))
            count += masks
    samples.sort(key=lambda sample: sample.name)
    return Listing(samples, count, left_out, sorted(lone))


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


def _via_listing(path, folder, shapes, attribute, wanted=None):
    """The Listing of a VIA project, whose images are in a folder.

    shapes: which are outlines. attribute: the one that holds the class. wanted: only these files, if not None.
    """
    content = _load_json(path)
    left_out = Counter()
    known = []
    records = []
    with _reading(path, "a VIA project"):
        for entry in content.get("_via_img_metadata", content).values():
            name = entry["filename"]
            file = _as_path(name)
            known.append(file)
            if wanted is not None and name not in wanted:
                continue
            outlines = _outlines(entry["regions"], shapes, attribute, left_out)
            if outlines:
                records.append((folder, file, None, len(outlines), partial(_read_outlines, outlines)))
            else:
                left_out["images without masks"] += 1
    return _annotated(path, known, records, left_out)


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
                part = _via_listing(path, join(dirname(path), side), ("polyline", "polygon"), "species")
                for sample in part.samples:
                    sample.name = f"{side}_{sample.name}"  # the two have the same file names
                parts.append(part)
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
    at = after("(\xef\xbb\xbf)?\\s*{\\s*", 0)  # some editors begin a file with a byte order mark
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


def _id(value):
    """An id. Tools write 7, 7.0 or "7", even within one file."""
    text = str(value).removesuffix(".0")
    return int(text) if text.isdecimal() and str(int(text)) == text else text


def _polygons(shape):
    """The polygons of a segmentation that have three corners or more, each as numbers [x0, y0, x1, y1, ...].

    Some tools leave out the list around a single polygon, or write a pair for each corner.
    """
    if not isinstance(shape[0], list) or len(shape) > 2 and max(map(len, shape)) == 2:
        shape = [shape]
    polygons = []
    for polygon in shape:
        if polygon and isinstance(polygon[0], list):
            polygon = sum(polygon, [])
        if len(polygon) >= 6:
            polygons.append(polygon)
    return polygons


def _unusable(annotation):
    """Why an annotation is left out, or None."""
    for flag, reason in (("iscrowd", "crowd"), ("ignore", "ignore")):
        if float(annotation.get(flag) or 0):
            return reason
    shape = annotation.get("segmentation")
    if not shape:
        return "without a mask"
    if isinstance(shape, list) and not _polygons(shape):
        return "of fewer than 3 points"
    return None


def _read_annotations(classes, places, sample):
    """The regions of a sample. places: offset and length of each of its annotations in the file, in turn."""
    height, width = sample.size or image_size(sample.clear)
    with open(sample.source, "rb") as file:
        for offset, length in zip(places[::2], places[1::2]):
            file.seek(offset)
            annotation = json.loads(file.read(length))
            shape = annotation["segmentation"]
            if isinstance(shape, list):
                mask = polygon_mask(_polygons(shape), height, width)
            elif list(map(float, shape["size"])) == [height, width]:
                mask = rle_decode(shape)
            else:
                raise ValueError(f"run lengths of {shape['size']} pixels for an image of {[height, width]}")
            yield _id(annotation.get("id")), classes.get(_id(annotation.get("category_id"))), mask, None


def _coco_listing(path, place):
    """The Listing of a COCO-style file. place(image record): the folder of the image and its path there."""
    classes = {}
    images = {}  # {id: (folder, path in it, size)}
    places = {}  # {image's id: see _read_annotations}
    left_out = Counter()
    with _reading(path, "a COCO file"):
        for key, record, offset, length in json_records(path):
            if key == "categories":
                name = _utf8(str(record["name"]))
                _once(classes, _id(record["id"]), name, path)
            elif key == "images":
                size = None
                if record.get("height") and record.get("width"):
                    size = int(float(record["height"])), int(float(record["width"]))
                folder, file = place(record)
                _once(images, _id(record["id"]), (folder, _as_path(_utf8(file)), size), path)
            elif key == "annotations":
                try:
                    image = _id(record["image_id"])
                    reason = _unusable(record)
                except (AttributeError, LookupError, TypeError, ValueError):
                    reason = "malformed"
                if reason:
                    left_out[reason] += 1
                else:
                    places.setdefault(image, array("q")).extend((offset, length))

    records = []
    for image, annotations in places.items():
        number = len(annotations) // 2
        if image in images:
            records.append((*images[image], number, partial(_read_annotations, classes, annotations)))
        else:
            left_out["of an unknown image"] += number
    left_out["images without masks"] = len(images.keys() - places.keys())
    known = [file for _, file, _ in images.values()]
    return _annotated(path, known, records, left_out)


def _coco_splits(root, pattern, place):
    """What a reader returns of a set with COCO's folders; the pattern's `*` is the split.

    place(split, image record): the images' folder, which is in root, beside it or in its neighbour coco/; the path in
    it, which may begin with its name.
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
        def place_of(image):
            folder, file = place(split, image)
            top = home(folder)
            return dirname(top) if file.startswith(f"{folder}/") else top, file
        return _coco_listing(paths[split], place_of)

    splits = sorted(split for split in paths if "_" not in split)  # without LVIS's image_info_test_dev
    return (splits, listing) if splits else None


@reader
def lvis(root):
    """lvis_v1_<split>.json, train2017/, val2017/ (in ROOT or in its neighbour coco/)"""
    def place(_, image):
        url = image.get("coco_url")  # version 1 has no file names; most images of its val split are from train2017
        if not url:
            return "val2017", image["file_name"][-16:]
        _, folder, file = url.rsplit("/", 2)
        return folder, f"{folder}/{file}"
    return _coco_splits(root, "lvis_v1_*.json", place)


@reader
def coco(root):
    """annotations/instances_<split>2017.json, train2017/, val2017/"""
    def place(split, image):
        return f"{split}2017", image.get("file_name") or image["coco_url"]
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
        return _coco_listing(paths[split], lambda image: (images, image["file_name"]))

    return (list(paths), listing) if paths else None


# ---------------------------------------------------------------- readers: your own data
# Asked where no layout with a name fits. A split is what the path of its masks says: train, val (or valid) or test;
# where it says nothing, it is "all".

IMAGES = ("images", "clear", "imgs", "JPEGImages")
MASKS = ("masks", "labels", "annotations", "SegmentationObject")


def _by_split(root, kind, listings):
    """What a reader returns of {path of masks: function(split) -> Listing}. DatasetError if two are of one split."""
    paths = {}
    for path in listings:
        below = os.path.relpath(path, root).lower()
        *_, split = "all", *re.findall("(?<![a-z])(train|val|test)(?:ing|id|idation)?(?![a-z])", below)
        if split in paths:
            raise DatasetError(f"{paths[split]} and {path} both hold masks of {split!r}; choose one: {kind}={path}")
        paths[split] = path
    return paths and (sorted(paths), lambda split: listings[paths[split]](split))


def coco_form(root):
    """any .json in COCO's form; its images beside it, or in images/ or train/, val/, test/ beside it or above"""
    # By file_name, in the folder of the .json, in the one above or the root, and in folders there that are called like
    # images or like the file's split: those of other splits may hold other images of the same name.
    paths = _find_all(root, "*.json")
    if not isdir(root):
        root, paths = dirname(root), [root]

    def listing(path, split):
        words = "train|val|test" if split == "all" else split
        like = re.compile(f"(/?([.]|{'|'.join(IMAGES)}|[^/]*({words})[^/]*))+")
        homes = []
        for base in (dirname(path), join(dirname(path), ".."), root):
            homes += [home for home in _find_all(base, "") if like.fullmatch(os.path.relpath(home, base))]

        def place(image):
            file = _as_path(_utf8(image["file_name"]))
            there = [home for home in homes if exists(join(home, file))]
            return (there or homes)[0], image["file_name"]

        return _coco_listing(path, place)

    listings = {}
    for path in paths:
        with open(path, "rb") as file:
            content = file.read()
        if b'"images"' in content and b'"segmentation"' in content:
            listings[path] = partial(listing, path)
        elif paths == [path]:
            raise DatasetError(f'{path}: no COCO file: it has no "images" with "segmentation"; export it in that form')
    return _by_split(root, "coco", listings)


def _beside(root, kind, names, patterns, read):
    """What a reader returns of folders of images and of masks (of these names) side by side, with a folder for each
    split above or below, or none. read(mask files, sample): see Sample."""
    def listing(images, folder, _):
        masks = {}  # {stem: files}
        for path in _find_all(folder, *patterns):
            stem, _ = splitext(os.path.relpath(path, folder).replace("/", "_"))
            while "_" in stem and stem not in images:  # <stem>_<anything>, <stem>/<anything>
                stem, _, _ = stem.rpartition("_")
            masks.setdefault(stem, []).append(path)
        found = _paired(images, {stem: files[0] for stem, files in masks.items()}, None)
        if not found.samples:
            raise MissingError(f"{folder}: of {len(images):,} images none has a mask STEM.*, STEM_ANY.* or STEM/ANY.*")
        for sample in found.samples:
            sample.read = partial(read, masks[sample.name])
        return found

    above, chosen = os.path.split(os.path.normpath(root))
    if chosen in names and not _find(root, *IMAGES):  # root is one of two folders of masks
        root, names = above, [chosen]
    listings = {}
    for home in _find_all(root, *IMAGES):
        for below in ("", *glob.glob("*/", root_dir=home)):
            images = _files(join(home, below))
            for name in names:
                folder = join(dirname(home), name, below)
                if images and _find(folder, *patterns):
                    listings[folder] = partial(listing, images, folder)
    return _by_split(root, kind, listings)


def _objects(path):
    """Yields (number, bool HxW) for each object in a mask file: each plane of an .npy file, each number of an image.

    One number besides 0 (0/1, 0/255, white) is a binary mask, one object. Of several, each is an object: a map of
    instances of 8 or 16 bits, the indices of a palette (255 is then void, as Pascal VOC's borders), or colours. But
    where most pixels between 0 and 255 (or white) differ from the one a knight's move away, they are not areas but the
    soft edges of a binary mask, which is cut in the middle.
    """
    if path.endswith(".npy"):
        yield from enumerate(read_planes(path))
        return
    with _open(path) as file:
        pixels = np.array(file)
    if pixels.ndim == 3:
        pixels = pixels[..., :3] @ (1, 256, 65536)
    most = pixels.max()
    between = (pixels > 0) & (pixels < most)
    alike = pixels == np.roll(pixels, pixels.shape[1] + 2)
    if between.any():
        if file.mode == "P":
            pixels[pixels == 255] = 0
        elif most in (255, 0xFFFFFF) and alike[between].mean() < 0.4:
            pixels = pixels > most / 2
    for number in np.unique(pixels).tolist():
        if number:
            yield number, pixels == number


def _read_mask_files(files, sample):
    for k, sample.source in enumerate(files):  # which messages name
        with explained(sample.source, "cannot read this mask"):
            for number, mask in _objects(sample.source):
                yield k << 24 | number, None, mask, None
    sample.source = files[0]


def folder(root):
    """images/ (or clear/, imgs/, JPEGImages/) beside masks/ (or labels/, annotations/, SegmentationObject/)"""
    return _beside(root, "folder", MASKS, [f"*{ending}" for ending in (*IMAGE_ENDINGS, ".npy")], _read_mask_files)


def _read_yolo(_, sample):
    """A line is a class's number and the outline's corners, x y x y ..., in shares of the width and height."""
    height, width = image_size(sample.clear)
    with open(sample.source, encoding="utf-8-sig") as file:
        for index, line in enumerate(filter(str.strip, file)):
            label, *shares = line.split()
            corners = np.array(shares, float).reshape(-1, 2) * (width, height)
            yield index, label, polygon_mask([corners], height, width), None


def yolo(root):
    """images/ beside labels/<stem>.txt with the outlines of YOLO's segmentation"""
    return _beside(root, "yolo", ["labels"], ["*.txt"], _read_yolo)


OWN = {"coco": coco_form, "folder": folder, "yolo": yolo}


# ---------------------------------------------------------------- load_dataset

def find_splits(root, kind="auto"):
    """(kind, names of the splits, function(split) -> Listing). "auto" is the kind that the folder looks like."""
    if kind not in ("auto", *KINDS, *OWN):
        raise DatasetError(f"no dataset kind {kind!r}; there are: auto, {', '.join(KINDS | OWN)}")
    if isfile(root):
        return "coco", *coco_form(root)
    if not isdir(root):
        raise MissingError(f"{root}: no such folder (python data.py demo/ --make-demo makes a small dataset)")

    looked_for = []
    for readers in (KINDS, OWN):
        asked = [name for name in readers if kind in ("auto", name)]
        answers = {name: readers[name](root) for name in asked}
        found = [name for name, answer in answers.items() if answer]
        if len(found) > 1 and "robustseg" not in found:
            raise DatasetError(f"{root}: holds {' and '.join(found)}; choose one, as in {found[0]}={root}")
        if found:
            return found[0], *answers[found[0]]  # robustseg is the first
        if kind == "auto" and isdir(join(root, "clear")) and _find(root, "masks/*.npy"):
            raise MissingError(f"{root}: this is one split of a dataset; name its parent folder and choose the split")
        looked_for += [f"{name}: {readers[name].__doc__}" for name in asked]
    holds = ", ".join(sorted(os.listdir(root))[:6]) or "nothing"
    raise MissingError(f"{root}: no dataset found; looked for {'; '.join(looked_for)}. The folder holds: {holds}")


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
        looked = f" (no folder {join(root, split, 'clear')})" if own_layout else " (train and val can be made of all)"
        raise MissingError(f"{root} ({kind}): no split {split!r}{looked}; there are: {', '.join(splits)}")

    samples, masks, left_out, lone = listing(listed)
    known = {}
    for sample in samples:
        other = known.setdefault(sample.name, sample)
        if other is not sample:
            raise DatasetError(f"{other.clear} and {sample.clear}: both are called {sample.name}; rename one")
    if divide:
        samples = [s for s in samples if (seed_of(s.name, "val") % 20 == 0) == (split == "val")]
        masks = None
    home = root if isdir(root) else splitext(root)[0]  # of coco=FILE.json
    folder = join(home, listed) if own_layout else join(home, "degraded", listed)
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
    return (path, kind) if kind in KINDS | OWN else (root, "auto")


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


def _pin(dataset, path, entries):
    """Gives each sample its entry of a prompts file. DatasetError if they do not belong together."""
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


def pin_prompts(datasets, paths):
    """Makes the datasets use the prompts in these files. DatasetError if none is for them.

    Of several files for the same kind and split, such as those of two demos, each dataset takes the one that fits.
    """
    sets = {}
    for path in dict.fromkeys(map(str, paths)):
        content = _load_json(path)
        with _reading(path, "a prompts file (data.py ROOT --export-prompts FILE writes one)"):
            if content["format"] != PROMPTS_FORMAT:
                raise DatasetError(f"{path}: format {content['format']!r} is not {PROMPTS_FORMAT!r}")
            for entry in content["sets"]:
                sets.setdefault((entry["kind"], entry["split"]), []).append((path, dict(entry["samples"])))

    for dataset in datasets:
        candidates = sets.get((dataset.kind, dataset.split), ())
        if not candidates:
            there = ", ".join(f"{kind} {split}" for kind, split in sets) or "nothing"
            raise DatasetError(f"{', '.join(map(str, paths))}: no prompts for {dataset.kind} {dataset.split}, but for "
                               f"{there}")
        fitting = []
        for candidate in candidates:
            try:
                _pin(dataset, *candidate)
                fitting.append(candidate)
            except DatasetError as error:
                misfit = error
        if not fitting:
            raise misfit
        if len(fitting) > 1:
            raise DatasetError(f"{fitting[0][0]} and {fitting[1][0]}: both have prompts for {dataset.root}; name one")
        _pin(dataset, *fitting[0])


# ---------------------------------------------------------------- writing folders of degraded images

def _parallel(work, jobs):
    """work(job) for all jobs, on all cores, in any order. Whatever goes wrong, it waits for no worker, and none stays."""
    workers = min(os.cpu_count() or 1, len(jobs) // 8)
    if workers < 2:
        yield from map(work, jobs)
        return
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(workers, initializer=start_worker)
    try:
        futures = [pool.submit(work, job) for job in jobs]
        for future in as_completed(futures):
            yield future.result()
    except BaseException as error:
        end_workers(others)
        if isinstance(error, BrokenProcessPool):
            raise DatasetError("a worker was killed, perhaps for lack of memory; run the same command again") from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _write_degraded(job):
    """Writes the degraded versions of one image: (how many, the line to report if it is bad)."""
    sample, conditions = job
    try:
        image = read_image(sample.clear, sample.size)
        for condition in conditions:
            with explained(sample.clear, "cannot be degraded"):
                jpeg = degraded_jpeg(image, condition, seed_of(sample.name, condition))
            path = join(sample.folder, condition, f"{sample.name}.jpg")
            os.makedirs(dirname(path), exist_ok=True)
            save_bytes(jpeg, path)
    except SampleError as error:
        return len(conditions), str(error)
    return len(conditions), None


def _degraded_already(folder):
    """The names of the samples whose degraded image is in this folder; what a killed run left is removed."""
    names = set()
    os.makedirs(folder, exist_ok=True)
    for file in _below(folder):
        name, ending = splitext(file)
        if ending.startswith(".part"):
            os.remove(join(folder, file))
        else:
            names.add(name)
    return names


def write_corruptions(dataset):
    """One folder per corruption (beside clear/, for other sets than Robust-Seg in ROOT/degraded/SPLIT), with the pixels
    of Sample.image(condition). Existing files stay, so that an interrupted run can go on. DatasetError if another
    program writes them at the same time."""
    folder = dataset[0].folder
    with alone_in(folder):
        there = {condition: _degraded_already(join(folder, condition)) for condition in CORRUPTIONS}
        jobs = []
        for sample in dataset:
            conditions = [condition for condition in CORRUPTIONS if sample.name not in there[condition]]
            if conditions:
                jobs.append((sample, conditions))

        progress = Progress(f"{dataset.split}: degraded images", sum(len(conditions) for _, conditions in jobs))
        try:
            for count, line in _parallel(_write_degraded, jobs):
                progress.update(count)
                if line:
                    dataset.skip(SampleError(line))
        except BaseException:
            for condition in CORRUPTIONS:
                _degraded_already(join(folder, condition))
            raise
        progress.close()


# ---------------------------------------------------------------- the demo dataset

def _write_scene(job):
    folder, name, *scene = job
    image, masks = demo_scene(*scene)
    jpeg = io.BytesIO()
    Image.fromarray(image).save(jpeg, "JPEG", quality=95)
    planes = io.BytesIO()
    np.save(planes, masks)
    os.makedirs(join(folder, "clear"), exist_ok=True)
    os.makedirs(join(folder, "masks"), exist_ok=True)
    save_bytes(jpeg.getvalue(), join(folder, "clear", f"{name}.jpg"))
    save_bytes(planes.getvalue(), join(folder, "masks", f"{name}.npy"))


def make_demo(root, train=2000, val=64, test=128, size=128, seed=0, patterned=0.5):
    """Writes the synthetic dataset. It appears under `root` when it is complete, or not at all. DatasetError."""
    root = os.path.abspath(root)
    part = f"{root}.part"
    made = join(part, "demo")
    jobs = []
    for split, count in (("train", train), ("val", val), ("test", test)):
        # Seeds above 32 bits, so that no scene equals one that training draws on the fly from a 32-bit seed.
        first = seed_of("demo", seed, split) << 32
        for k in range(count):
            jobs.append((join(made, split), f"{split}_{k:05d}", first + k, size, patterned))

    with alone_in(part):
        try:
            if exists(root) and not (isdir(root) and not os.listdir(root)):
                raise DatasetError(f"{root}: exists and is not an empty folder; choose another name or remove it")
            shutil.rmtree(made, ignore_errors=True)  # of a run that was killed
            progress = Progress("demo scenes", len(jobs))
            for _ in _parallel(_write_scene, jobs):
                progress.update()
            progress.close()
            if isdir(root):
                os.rmdir(root)
            os.replace(made, root)
        except OSError as error:
            raise DatasetError(f"{root}: cannot make the demo ({_why(error)})") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)


def make_missing_demo(root):
    """Makes the demo dataset where `root` is not there and its last part says demo: the two commands of a newcomer."""
    name = basename(os.path.normpath(root))
    if not exists(root) and name.startswith("demo"):
        make_demo(root)


# ---------------------------------------------------------------- command line

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
    from assets.sheets import contact_sheet, describe  # here, as they need this file

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
            bad = dataset.skipped
            dataset = load_dataset(root, split, kind, args.strict)
            for line in bad:
                dataset.skip(SampleError(line))
        good = describe(dataset, len(dataset) if args.check else 200)
        if args.sheet and not datasets:
            for error in contact_sheet(good[:20], args.sheet):
                dataset.skip(error)
                print(f"  not on the sheet: {error}")
        datasets.append(dataset)

    if not datasets:
        raise MissingError(f"{root}: no split of it can be used")
    if args.export_prompts:
        export_prompts(datasets, args.export_prompts, args.seed)
        print(f"written: {args.export_prompts}")


def main(argv=None):
    """Runs the command line; a user's mistake ends in one line and exit code 2."""
    plain_output()
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
    from data import main as start  # this file under its own name, by which assets/ and workers know it

    start()
