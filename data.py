"""Every dataset of the paper as one kind of sample: a picture, the masks of its objects, the prompts that ask for them.

The big idea: nothing depends on order. A prompt, a corruption or a demo scene draws from a seed made of NAMES (of the
picture, of the condition, the number of the mask). So two people, two methods and any number of workers see the same
points, the same boxes and the same noise.

`load_dataset(root, split)` recognises ten layouts by what lies on the disk; `python data.py ROOT` says what is in one:

    robustseg   {train,val,test,coco,lvis}/clear/<stem>.jpg, masks/<stem>.npy, <corruption>/<stem>.jpg (optional)
    coco, lvis  annotations/instances_*2017.json or lvis_v1_*.json beside train2017/ and val2017/
    lis         annotations/lis_coco_*.json beside RGB-dark/ and RGB-normal/
    bdd100k     images/10k/ and labels/ins_seg/bitmasks/
    acdc        rgb_anon/ beside gt_detection/, gt_panoptic/ or gt/
    ndd20       ABOVE_LABELS.json beside ABOVE/, and the same with BELOW
    streets     annotations/vehicle-annotations.json beside images/
    thinobject  list/{train,val,test}.txt beside images/ and masks/
    msra10k     pairs <n>.jpg, <n>.png in one folder

The demo dataset has robustseg's layout. A degraded picture that is not on the disk is made on the fly; `--corrupt`
writes the very same pixels to the disk.

    python data.py ROOT [--split test] [--sheet sheet.png]      counts, sizes, areas, a contact sheet
    python data.py ROOT --check                                 read every file and name the bad ones
    python data.py ROOT --corrupt [--split test]                write one folder per corruption; resumable
    python data.py ROOT --split test --export-prompts p.json    pin the prompts in a file
    python data.py demo/ --make-demo                            make the synthetic dataset (half a minute)
"""
import argparse
import contextlib
import functools
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
import time
import tokenize
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageOps

from corruptions import CORRUPTIONS, OTHERS, corrupt

CONDITIONS = ("clear", *CORRUPTIONS)
PICTURES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
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
    except (*DAMAGED, *FORM) as error:
        if isinstance(error, DatasetError):  # a MissingError is an OSError, too
            raise
        raise DatasetError(f"{path}: not {what}, or damaged ({type(error).__name__}: {_why(error)})") from None


def _why(error):
    """An exception as half a line, without the path, which the caller names."""
    return getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0].split(" '")[0]


def seed_of(*parts):
    """A 32-bit seed from names: seed_of("00012", "fog"). Equal parts give equal seeds on every machine."""
    return zlib.crc32("/".join(map(str, parts)).encode(errors="surrogatepass"))  # a file's name need not be UTF-8


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

UPRIGHT = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), 2))  # EXIF orientation 2 to 8: how to undo it


def read_image(path, size=None):
    """uint8 HxWx3 RGB. Grey, palette, CMYK and 16-bit pictures are converted, alpha is dropped.

    A picture is turned upright as its EXIF says, unless the pixels as stored have the `size` (H, W) that its annotation
    names: then they were annotated as stored. SampleError if neither has.
    """
    try:
        if size:
            image_size(path, size)  # refuses a picture of neither size
        with Image.open(path) as file:
            turn = UPRIGHT.get(file.getexif().get(0x0112))
            image = file if turn is None or size and tuple(size) == file.size[::-1] else file.transpose(turn)
            if image.mode.startswith("I"):  # 16 bits a pixel: convert("RGB") would clip at 255 instead of scaling
                image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
            return np.array(image.convert("RGB"))
    except DAMAGED as error:
        raise SampleError(f"{path}: cannot read this image ({_why(error)})") from None


def _save(write, path):
    """write(temporary path), then the file appears under its name: whole, or not at all. DatasetError."""
    try:
        write(f"{path}.part")
        os.replace(f"{path}.part", path)
    except OSError as error:
        if os.path.exists(f"{path}.part"):
            os.remove(f"{path}.part")
        raise DatasetError(f"{path}: cannot write this file ({_why(error)})") from None


def save_png(picture, path):
    """Writes a Pillow image as a PNG: whole, or not at all. DatasetError."""
    _save(lambda part: picture.save(part, "PNG"), path)


def save_text(text, path):
    """Writes a text file: whole, or not at all. DatasetError."""
    def write(part):
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
    _save(write, path)


def image_size(path, size=None):
    """(H, W) of the picture as `read_image(path, size)` gives it, from the file's header alone."""
    try:
        with Image.open(path) as file:
            orientation, stored = file.getexif().get(0x0112), file.size[::-1]
            upright = file.size if orientation in (5, 6, 7, 8) else stored
    except DAMAGED as error:
        raise SampleError(f"{path}: cannot read this image ({_why(error)})") from None
    if size and tuple(size) not in (upright, stored):
        raise SampleError(f"{path}: is {upright[1]} x {upright[0]} pixels (width x height), but its annotation is for "
                          f"{size[1]} x {size[0]}")
    return tuple(size) if size else upright


def name_and_strength(condition):
    """"fog@0.5" -> ("fog", 0.5): fog of half the strength. "fog" -> ("fog", 1.0), Robust-Seg's. DatasetError if it is
    no condition, or the strength none that `corrupt` takes."""
    name, _, strength = condition.partition("@")
    try:
        strength = float(strength or 1)
    except ValueError:
        strength = -1
    if name not in (*CONDITIONS, *OTHERS) or not 0 <= strength <= 10 or condition.startswith("clear@"):
        raise DatasetError(f"no condition {condition!r}; there are: {', '.join((*CONDITIONS, *OTHERS))}, and all but "
                           "clear with a strength, as fog@0.5")
    return name, strength


def degraded_jpeg(image, condition, seed):
    """The degraded picture as the bytes of a JPEG, quality 95, 4:2:0: Robust-Seg stores its own that way."""
    file, (name, strength) = io.BytesIO(), name_and_strength(condition)
    Image.fromarray(corrupt(image, name, seed, strength)).save(file, "JPEG", quality=95, subsampling="4:2:0")
    return file.getvalue()


def degrade(image, condition, seed):
    """uint8 HxWx3 -> uint8 HxWx3 in one of CONDITIONS or as "fog@0.5", through the JPEG that `--corrupt` writes."""
    return image if condition == "clear" else np.array(Image.open(io.BytesIO(degraded_jpeg(image, condition, seed))))


# ---------------------------------------------------------------- masks: run lengths, polygons, label maps

def _runs_of(text):
    """The run lengths in a compressed COCO string: six bits a character, low groups first, from the fourth run on as
    differences to the run two places before."""
    code = np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(np.int64) - 48
    if len(code) == 0 or code.min() < 0 or code.max() > 63 or code[-1] & 32:
        raise ValueError("not a run-length string")
    last = np.flatnonzero(code & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    group = np.arange(len(code)) - np.repeat(first, last - first + 1)
    if group.max() > 6:
        raise ValueError("not a run-length string")
    runs = np.add.reduceat((code & 31) << 5 * group, first)
    runs -= np.where(code[last] & 16, 1 << 5 * (group[last] + 1), 0)  # the last group's top bit is the sign
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs


def rle_decode(rle):
    """COCO run lengths {"size": [H, W], "counts": list or compressed string} -> bool HxW. ValueError if they don't fit.

    Runs of 0 and 1 in turn, beginning with 0, column by column.
    """
    height, width = map(int, rle["size"])
    counts = rle["counts"]
    runs = _runs_of(counts) if isinstance(counts, (str, bytes)) else np.asarray(counts)
    pixels = height * width
    if not (runs.ndim == 1 and runs.dtype.kind in "iu" and len(runs) and 0 <= runs.min() and runs.max() <= pixels
            and runs.sum() == pixels):
        raise ValueError(f"run lengths do not make up {height} x {width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def rle_encode(mask):
    """bool HxW -> {"size": [H, W], "counts": compressed string}, character for character what pycocotools writes."""
    pixels = np.concatenate([[False], np.asarray(mask, bool).T.ravel()])
    cuts = np.flatnonzero(pixels[1:] != pixels[:-1])
    left = np.diff(np.concatenate([[0], cuts, [pixels.size - 1]]))
    left[3:] -= left[1:-2].copy()
    characters, on = [], np.full(len(left), True)  # one row for each group of five bits
    while on.any():
        low = left & 31
        left = left >> 5
        more = on & (left != np.where(low & 16, -1, 0))
        characters.append(np.where(on, low + 32 * more + 48, 0))
        on = more
    text = np.stack(characters, 1).ravel()
    return {"size": list(np.shape(mask)), "counts": text[text > 0].astype(np.uint8).tobytes().decode()}


def polygon_mask(parts, height, width):
    """COCO polygons [[x0, y0, x1, y1, ...], ...] -> bool HxW, the union of the parts, to the pixel as pycocotools.

    Coordinates are in pixels from the picture's corner. The official rule: walk the outline in fifths of a pixel along
    each edge's longer axis; where it crosses the middle of a pixel column, everything below changes sides.
    """
    mask = np.zeros((height, width), bool)
    for part in parts:
        corners = np.asarray(part, np.float64).reshape(-1, 2)
        if not (np.abs(corners) < 1e5).all():
            raise ValueError("polygon with a coordinate that is no number or far outside of the picture")
        a = (5 * corners + 0.5).astype(np.int64)  # truncated toward zero, as C does
        b = np.roll(a, -1, 0)
        reach = np.abs(b - a)
        flat, length = reach[:, 0] >= reach[:, 1], reach.max(1)
        back = np.where(flat, a[:, 0] > b[:, 0], a[:, 1] > b[:, 1])  # walked from the far end, for equal rounding
        start, end = np.where(back[:, None], b, a), np.where(back[:, None], a, b)
        slope = np.where(flat, (end - start)[:, 1], (end - start)[:, 0]) / np.maximum(length, 1)
        if length.sum() > 1e7:
            raise ValueError("polygon with an outline longer than two million pixels")
        edge = np.repeat(np.arange(len(a)), length + 1)
        t = np.arange(len(edge)) - np.repeat(np.cumsum(length + 1) - length - 1, length + 1)
        t = np.where(back[edge], length[edge] - t, t)
        level, other = flat[edge], slope[edge] * t + 0.5
        u = np.where(level, t + start[edge, 0], (start[edge, 0] + other).astype(np.int64))
        v = np.where(level, (start[edge, 1] + other).astype(np.int64), t + start[edge, 1])
        crossing = np.flatnonzero(u[1:] != u[:-1])
        x = np.where(u[crossing + 1] < u[crossing], u[crossing + 1], u[crossing + 1] - 1)
        good = (x % 5 == 2) & (x >= 0) & (x // 5 < width)  # (x + 0.5) / 5 - 0.5 is a whole column
        x, y = x[good] // 5, np.minimum(v[crossing], v[crossing + 1])[good]
        y = np.ceil(((y + 0.5) / 5 - 0.5).clip(0, height)).astype(np.int64)
        if len(x):
            left, right = x.min(), x.max() + 1
            turns = np.bincount((x - left) * height + y, minlength=(right - left) * height + 1)[:-1] % 2 == 1
            mask[:, left:right] |= np.logical_xor.accumulate(turns).reshape(right - left, height).T
    return mask


def outline_mask(x, y, height, width):
    """A VIA outline, whose corners are indices of pixels -> bool HxW: inside and border, closed by a straight line."""
    corners = np.stack([np.asarray(x, np.float64), np.asarray(y, np.float64)], 1)
    if not (np.abs(corners) < 1e5).all():
        raise ValueError("outline with a coordinate that is no number or far outside of the picture")
    page = Image.new("1", (width, height))
    ImageDraw.Draw(page).polygon(np.rint(corners).ravel().tolist(), fill=1, outline=1)
    return np.array(page)


def components(mask):
    """bool HxW -> (int HxW, areas): its connected parts (corners connect), numbered from 1 from top to bottom; 0 is
    the background, areas[k - 1] the number of pixels of part k."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (row, start), (_, end) = np.nonzero(edges == 1), np.nonzero(edges == -1)  # runs of pixels, row by row
    parent = np.arange(len(row))

    def root(k):
        while parent[k] != k:
            parent[k] = k = parent[parent[k]]
        return k

    first = np.searchsorted(row, np.arange(mask.shape[0] + 1))
    for k in range(len(row)):  # join each run with those above that it touches
        low, high = first[max(row[k] - 1, 0)], first[row[k]]
        for above in range(low + np.searchsorted(end[low:high], start[k]), high):
            if start[above] > end[k]:
                break
            a, b = root(above), root(k)
            parent[max(a, b)] = min(a, b)
    _, number = np.unique([root(k) for k in range(len(row))], return_inverse=True)
    steps = np.zeros((mask.shape[0], mask.shape[1] + 1), np.int32)
    steps[row, start], steps[row, end] = number + 1, -number - 1
    return steps.cumsum(1)[:, :-1], np.bincount(number, end - start).astype(int)


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
    return np.stack([x, y], 1).astype(np.float32), box_of(mask)


def box_of(mask):
    """First and last column and row that the mask touches: float32 (x0, y0, x1, y1)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)


class Sample:
    """One picture with its objects. Holds paths and no pixels; what it reads may raise SampleError.

    name: from which all seeds derive. clear: its picture. source: the file of its masks. folder: holds a folder per
    corruption; `ready` are those that are there. size: (H, W) as the annotation says, None if it does not.
    read(sample): yields (index, label, bool HxW mask, why it is left out or None), one for each region.
    pinned: its entry in a prompts file, or None.
    """
    __slots__ = ("name", "clear", "source", "read", "folder", "ready", "size", "pinned", "left_out", "_kept")

    def __init__(self, name, clear, source, read, folder, ready=(), size=None):
        self.name, self.clear, self.source, self.read, self.folder = name, clear, source, read, folder
        self.ready, self.size, self.pinned, self.left_out, self._kept = ready, size, None, Counter(), None

    def image(self, condition="clear", seed=None):
        """uint8 HxWx3. A degraded picture is read from its folder if it is there, else made from `seed`.

        A condition may carry a strength: "fog@0.5" is made from the same seed as "fog".
        """
        corruption, _ = name_and_strength(condition)
        for ending in PICTURES if condition in self.ready else ():
            path = os.path.join(self.folder, condition, self.name + ending)
            if os.path.exists(path):
                image = read_image(path)
                self._same_size(path, image.shape[:2])
                return image
        return degrade(read_image(self.clear, self.size), condition,
                       seed_of(self.name, corruption) if seed is None else seed)

    def masks(self):
        """bool NxHxW, N >= 1, one plane per object. What is left out (crowds, empty masks, ...) is counted in
        `left_out`; `indices` and `labels` belong to the planes that remain."""
        size = image_size(self.clear, self.size)
        self.left_out, kept, planes = Counter(), [], []
        try:
            for index, label, mask, reason in self.read(self):
                if not reason and mask.shape != size:
                    self._same_size(self.source, mask.shape)
                reason = reason or (None if mask.any() else "empty")
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
        if self.pinned is None:
            both = [prompts(mask, seed_of(self.name, index, seed)) for mask, index in
                    zip(masks, self.indices, strict=True)]
        else:
            both = [self._pinned(mask, index) for mask, index in zip(masks, self.indices, strict=True)]
        return np.stack([points for points, _ in both]), np.stack([box for _, box in both])

    def _pinned(self, mask, index):
        """The prompts of a mask in the prompts file, if they are its own."""
        try:
            row = self.pinned["masks"][str(index)]
            points, box = np.array(row["points"], np.float32).reshape(3, 2), np.array(row["box"], np.float32)
            x, y = points.T.astype(int)
            if (list(self.pinned["size"]) != list(mask.shape) or (points != np.stack([x, y], 1)).any()
                    or min(x.min(), y.min()) < 0 or not mask[y, x].all()):
                raise IndexError
        except (*FORM, ValueError, OverflowError):
            raise PinnedError(f"{self.source}: the prompts file has no three points in mask {index} of {self.name}, "
                              f"{mask.shape[1]} x {mask.shape[0]} pixels") from None
        if box.shape != (4,) or (box != box_of(mask)).any():
            raise PinnedError(f"{self.source}: the prompts file has another box for mask {index} of {self.name}")
        return points, box

    def _same_size(self, path, size):
        (height, width), (h, w) = image_size(self.clear, self.size), size
        if (h, w) != (height, width):
            raise SampleError(f"{path}: is {w} x {h} pixels (width x height), but {self.clear} is {width} x {height}")


def _account(counter):
    """Counter -> "446 crowd, 12 empty"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counter.items()))


class Dataset(Sequence):
    """The samples of one split, sorted by name.

    A missing file is known from the listing, a damaged one only when it is read. So whoever reads catches SampleError
    and hands it to skip(), which keeps the account in `skipped` (a line each) or, when strict, raises.
    masks: how many objects there are, None where only reading tells. left_out: Counter of those not used, by reason.
    """

    def __init__(self, root, split, kind, samples, strict=False, masks=None, left_out=()):
        self.root, self.split, self.kind, self.samples, self.strict = root, split, kind, samples, strict
        self.masks, self.left_out, self.skipped, self.pinned = masks, Counter(left_out), [], None

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[k] for k in range(len(self))[index]]
        sample = self.samples[index]
        if self.pinned is not None:
            sample.pinned = self.pinned.get(sample.name)
        return sample

    def skip(self, error):
        """Counts a bad sample. True when it is new, so that the caller reports it once."""
        if self.strict:
            raise error
        new = str(error) not in self.skipped
        self.skipped += [str(error)] * new
        return new

    def summary(self):
        """One line: what it is, images, masks, what is left out and why."""
        count = "" if self.masks is None else f", {self.masks:,} masks"
        left = f"; left out: {_account(self.left_out)}" if self.left_out else ""
        return (f"{os.path.join(self.root, self.split)} ({self.kind}): {len(self):,} images{count}{left}; "
                f"{len(self.skipped):,} files skipped")


class Union(Dataset):
    """Several datasets one after the other, for training on all of them."""

    def __init__(self, parts):
        super().__init__(" + ".join(part.root for part in parts), parts[0].split, "several", (), parts[0].strict)
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])
        self.skipped = [line for part in parts for line in part.skipped]

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, index):
        index = range(len(self))[index]
        if isinstance(index, range):
            return [self[k] for k in index]
        which = int(np.searchsorted(self.ends, index, "right"))
        return self.parts[which][index - int(self.ends[which])]  # counted from the end of that part


def spread(dataset, most):
    """At most `most` samples, evenly spread over the dataset: a list."""
    count = min(most, len(dataset))
    return [dataset[k * len(dataset) // count] for k in range(count)]


# ---------------------------------------------------------------- readers, one function per kind of dataset
# Each takes the root and returns {split: function without arguments}, empty if the folder is not of its kind. That
# function lists the split: (samples sorted by name, how many masks or None, Counter of what is left out, a line for
# each file without its partner). Pixels are read later, by a sample's `read`. An archive may have been unpacked into a
# folder of its own name, so everything is looked for up to two folders down.

def _find_all(root, *paths):
    """Yields what fits the paths (patterns) in root, then one folder below, then two."""
    for above in ("", "*", os.path.join("*", "*")):
        for path in paths:
            yield from sorted(glob.glob(os.path.join(glob.escape(root), above, path)))


def _find(root, *paths):
    """The first that fits, or None."""
    return next(_find_all(root, *paths), None)


def _stems(folder, endings=PICTURES[:3]):
    """{stem: file name}. Hidden files are left out: an archive made by macOS holds a "._x.jpg" beside each "x.jpg"."""
    if not os.path.isdir(folder):
        return {}
    files = [file for file in os.listdir(folder) if file.lower().endswith(endings) and not file.startswith(".")]
    return {os.path.splitext(file)[0]: file for file in sorted(files, reverse=True)}


def _degraded(root, split):
    """Where --corrupt writes for a set that is not Robust-Seg, and the conditions that are there."""
    folder = os.path.join(root, "degraded", split)
    return folder, frozenset(c for c in CORRUPTIONS if os.path.isdir(os.path.join(folder, c)))


# ---- masks in one file per picture

def read_planes(path):
    """bool NxHxW from an .npy file of bool, 0/1, 0..255 or float; ValueError on anything else."""
    planes = np.lib.format.open_memmap(path, "r")  # mapped, so that only the bool copy takes memory; refuses objects
    if planes.ndim not in (2, 3) or planes.dtype.kind not in "biuf":
        raise ValueError(f"expected numbers of shape [N,H,W], found {planes.dtype} {list(planes.shape)}")
    planes = np.asarray(planes if planes.ndim == 3 else planes[None])
    if planes.dtype.kind == "f":
        return planes > 0.5
    # The soft edges of a 0..255 mask are cut in the middle; a 0/1 mask has none.
    return planes > 0 if planes.max(initial=0) <= 1 else planes >= 128


def _read_stack(sample):
    for index, plane in enumerate(read_planes(sample.source)):
        yield index, None, plane, None


def _pixels(path, mode=None):
    """The stored numbers of a mask picture, as they are: H x W or H x W x bands. ValueError if not of this mode."""
    with Image.open(path) as file:
        if mode and file.mode != mode:
            raise ValueError(f"expected a picture of mode {mode}, found {file.mode}")
        return np.array(file)


def _read_one_mask(sample):
    """A picture of one object: 0/1, 0/255, or 0..255 with soft edges; any mode."""
    with Image.open(sample.source) as file:
        grey = np.array(file.convert("L"))
    yield 0, None, grey > 0 if grey.max() <= 1 else grey >= 128, None


BDD_CLASSES = ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")


def _read_bdd(sample):
    """RGBA is data: R the class from 1, G flags (bit 0 ignore, bit 1 crowd), B and A the number of the instance."""
    pixels = _pixels(sample.source, "RGBA").astype(np.int32)
    number = pixels[..., 2] << 8 | pixels[..., 3]
    for index in np.flatnonzero(np.bincount(number.ravel())):
        mask = number == index
        kind, flags = pixels[np.unravel_index(mask.argmax(), mask.shape)][:2]
        if index == 0 or kind == 0:
            continue  # background
        if kind > len(BDD_CLASSES):
            raise ValueError(f"class {kind} of instance {index} is not one of 1 to {len(BDD_CLASSES)}")
        yield int(index), BDD_CLASSES[kind - 1], mask, "crowd" if flags & 2 else "ignore" if flags & 1 else None


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
            yield index, label, parts == part if area >= 64 else None, None if area >= 64 else "below 64 px"
            index += 1


def _read_panoptic(segments, sample):
    """A PNG whose R + 256 G + 65536 B is a segment's number, and the list of segments."""
    colours = _pixels(sample.source, "RGB").astype(np.int32)
    number = colours[..., 0] | colours[..., 1] << 8 | colours[..., 2] << 16
    for segment in segments:
        label = CITYSCAPES.get(segment["category_id"])
        reason = "crowd" if segment.get("iscrowd") else None if label else "stuff"
        yield segment["id"], label, number == segment["id"], reason


def _pairs(root, split, images, masks, read):
    """The listing of {stem: path of the picture} and {stem: path of the masks}."""
    folder, ready = _degraded(root, split)
    samples = [Sample(stem, images[stem], masks[stem], read, folder, ready) for stem in sorted(images.keys() & masks)]
    lone = [f"{images[stem]}: has no mask file" for stem in images.keys() - masks.keys()]
    lone += [f"{masks[stem]}: has no image" for stem in masks.keys() - images.keys()]
    return samples, None, Counter(), sorted(lone)


def _paths(folder, endings=PICTURES[:3]):
    return {stem: os.path.join(folder, file) for stem, file in _stems(folder, endings).items()}


def robustseg(root):
    """ROOT/<split>/clear/ with images and ROOT/<split>/masks/ with .npy files"""
    def listing(split):
        folder = os.path.join(root, split)
        stacks = os.path.join(folder, "masks")
        if not os.path.isdir(stacks):
            raise MissingError(f"{stacks}: no such folder; unpack the split's masks.zip there (one .npy per image)")
        images, masks = _paths(os.path.join(folder, "clear")), _paths(stacks, (".npy",))
        samples, *rest = _pairs(root, split, images, masks, _read_stack)
        ready = frozenset(c for c in CORRUPTIONS if os.path.isdir(os.path.join(folder, c)))
        for sample in samples:
            sample.folder, sample.ready = folder, ready
        if not samples:
            raise MissingError(f"{folder}: no image has its masks ({len(images):,} images in clear/, {len(masks):,} "
                               ".npy files in masks/); the two must have the same name up to the ending")
        return samples, *rest
    names = sorted(d for d in os.listdir(root) if os.path.isdir(os.path.join(root, d, "clear")))
    return {name: functools.partial(listing, name) for name in names}


def msra10k(root):
    """Imgs/<n>.jpg and Imgs/<n>.png"""
    for folder in (_find(root, "Imgs"), root, _find(root, "MSRA_10K")):
        if folder and (images := _paths(folder, (".jpg",))) and (masks := _paths(folder, (".png",))):
            if images.keys() & masks:
                return {"all": lambda: _pairs(root, "all", images, masks, _read_one_mask)}
    return {}


def thinobject(root):
    """ThinObject5K/list/<split>.txt, images/, masks/"""
    lists = _find(root, os.path.join("list", "train.txt"), os.path.join("list", "test.txt"))
    if not lists:
        return {}
    home = os.path.dirname(os.path.dirname(lists))

    def listing(split):
        with open(os.path.join(home, "list", f"{split}.txt"), errors="surrogateescape") as file:
            stems = {os.path.splitext(line.strip())[0] for line in file if line.strip()}
        images, masks = (_paths(os.path.join(home, d)) for d in ("images", "masks"))
        samples, masks, left_out, _ = _pairs(
            root, split, *({s: p for s, p in paths.items() if s in stems} for paths in (images, masks)), _read_one_mask)
        missing = stems - {sample.name for sample in samples}
        return samples, masks, left_out, [f"{home}: {stem} of list/{split}.txt lacks its image or mask" for stem in
                                          sorted(missing)]
    names = sorted(_stems(os.path.join(home, "list"), (".txt",)))
    return {name: functools.partial(listing, name) for name in names}


def bdd100k(root):
    """images/10k/<split>/ and labels/ins_seg/bitmasks/<split>/"""
    labels = _find(root, os.path.join("labels", "ins_seg", "bitmasks"), os.path.join("ins_seg", "bitmasks"))
    images = _find(root, os.path.join("images", "10k"))
    if not labels or not images:
        return {}

    def listing(split):
        return _pairs(root, split, _paths(os.path.join(images, split)), _paths(os.path.join(labels, split), (".png",)),
                      _read_bdd)
    return {split: functools.partial(listing, split) for split in sorted(next(os.walk(labels))[1])}


def acdc(root):
    """rgb_anon/<condition>/<split>/ beside gt_detection/, gt_panoptic/ or gt/"""
    pictures = _find(root, "rgb_anon")
    if not pictures:
        return {}
    detection, panoptic, semantic = (_find(root, name) for name in ("gt_detection", "gt_panoptic", "gt"))

    def frames(top, ending, split):  # {"GOPR0475_frame_000041": path} of TOP/<condition>/<split>/<sequence>/
        found = {}
        for folder, _, files in os.walk(top or os.devnull):
            if split in os.path.relpath(folder, top).split(os.sep):
                found |= {f[:-len(ending)]: os.path.join(folder, f) for f in files if f.endswith(ending)}
        return found

    def listing(split):
        reference = "_ref" if split.endswith("_ref") else ""
        name = f"{split.removesuffix('_ref')}_gt{reference}"
        instances = detection and _find(detection, f"instancesonly_{name}_detection.json")
        if instances:
            return CocoIndex(root, split, instances, lambda image: os.path.join(pictures, _utf8(image["file_name"]))
                             ).listing()
        images = frames(pictures, f"_rgb{reference}_anon.png", split)
        segments = panoptic and _find(panoptic, f"{name}_panoptic.json")
        if segments:
            content = _load_json(segments)
            with _reading(segments, "a panoptic file"):
                rows = {row["file_name"].rsplit("/", 1)[-1].split("_gt")[0]: row["segments_info"]
                        for row in content["annotations"]}
            maps = {os.path.basename(p).split("_gt")[0]: p for p in
                    glob.glob(os.path.join(glob.escape(panoptic), "**", "*_panoptic.png"), recursive=True)}
            maps = {stem: path for stem, path in maps.items() if stem in rows}
            images = {stem: path for stem, path in images.items() if stem in rows}
            samples, *rest = _pairs(root, split, images, maps, None)
            for sample in samples:
                sample.read = functools.partial(_read_panoptic, rows[sample.name])
            return samples, *rest
        maps = frames(semantic, f"_gt{reference}_labelTrainIds.png", split)
        return _pairs(root, split, {s: p for s, p in images.items() if s in maps}, maps, _read_train_ids)
    names = {os.path.basename(p) for p in glob.glob(os.path.join(glob.escape(pictures), "*", "*"))}
    return {name: functools.partial(listing, name) for name in sorted(names) if not name.startswith("test")}


# ---- VIA projects: all outlines of a set in one JSON file

def _load_json(path):
    with _reading(path, "JSON"), open(path, encoding="utf-8") as file:
        return json.load(file)


def _read_outlines(outlines, sample):
    height, width = image_size(sample.clear)
    for index, label, x, y in outlines:
        yield index, label, outline_mask(x, y, height, width), None


def _via(root, split, path, folder, shapes, label, wanted=None, prefix=""):
    """The listing of a VIA project (version 1: regions in a dict; 2: in a list) whose outlines are polygons."""
    content = _load_json(path)
    images, left_out, samples, lone, count = _paths(folder), Counter(), [], [], 0
    degraded, ready = _degraded(root, split)
    with _reading(path, "a VIA project"):
        for entry in content.get("_via_img_metadata", content).values():
            stem, regions, outlines = os.path.splitext(entry["filename"])[0], entry["regions"], []
            if wanted is not None and entry["filename"] not in wanted:
                continue
            for index, region in enumerate(regions.values() if isinstance(regions, dict) else regions):
                shape, name = region["shape_attributes"], region["region_attributes"].get(label)
                if shape["name"] not in shapes:
                    left_out[f"of shape {shape['name']}"] += 1
                elif len(shape["all_points_x"]) < 3:
                    left_out["of fewer than 3 points"] += 1
                else:
                    outlines.append((index, str(name) if name else None, shape["all_points_x"], shape["all_points_y"]))
            if not outlines:
                left_out["images without masks"] += 1
            elif stem not in images:
                lone.append(f"{os.path.join(folder, entry['filename'])}: no such image, but {path} has its masks")
            else:
                samples.append(Sample(prefix + stem, images[stem], path, functools.partial(_read_outlines, outlines),
                                      degraded, ready))
                count += len(outlines)
    return sorted(samples, key=lambda sample: sample.name), count, left_out, sorted(lone)


def ndd20(root):
    """ABOVE_LABELS.json and ABOVE/, BELOW_LABELS.json and BELOW/"""
    paths = {name: _find(root, f"{name}_LABELS.json") for name in ("ABOVE", "BELOW")}
    paths = {name: path for name, path in paths.items() if path}

    def listing(split):
        parts = [_via(root, split, path, os.path.join(os.path.dirname(path), name), ("polyline", "polygon"), "species",
                      prefix=name + "_") for name, path in paths.items() if split in ("all", name.lower())]
        samples, counts, left, lone = zip(*parts)
        return sum(samples, []), sum(counts), sum(left, Counter()), sum(lone, [])
    return {name: functools.partial(listing, name) for name in ["all", *map(str.lower, paths)] if paths}


def streets(root):
    """annotations/vehicle-annotations.json and images/"""
    path = _find(root, os.path.join("annotations", "vehicle-annotations.json"))
    if not path:
        return {}
    folder = os.path.join(os.path.dirname(os.path.dirname(path)), "images")
    lists = _find(root, "train-val-split.json", os.path.join("data", "train-val-split.json"))

    def listing(split):
        wanted = None
        if split != "all":
            names = _load_json(lists)
            with _reading(lists, "a list of the splits"):
                wanted = set(names[split])
        return _via(root, split, path, folder, ("polygon",), "vehicle_type", wanted)
    return {name: functools.partial(listing, name) for name in (["all", "train", "val"] if lists else ["all"])}


# ---- COCO's JSON: too big to hold, so it is walked once and only an index is kept

CHUNK = 1 << 24  # bytes read at a time
LONGEST = 1 << 26  # bytes of one record
BLANK = re.compile(r"[ \t\r\n,]*")
ENDED = re.compile(r"[ \t\r\n]*[],:}]")


def json_records(path):
    """Walks a file {"key": [record, ...], ...} and yields (key, record, byte offset, length in bytes), one record at a
    time and without ever holding the file. Values that are no lists are passed over. ValueError if it is not JSON.

    Text is taken as Latin-1, one character a byte, so that positions are byte positions: see `_utf8`. A number with a
    fraction stays text: an index needs none of them, and this halves the time.
    """
    decode, text, base, at = json.JSONDecoder(parse_float=str).raw_decode, "", 0, 0
    with open(path, "rb") as file:
        def more():
            nonlocal text, base, at
            chunk = file.read(CHUNK)
            if not chunk or len(text) - at > LONGEST:
                raise ValueError(f"{'ends too early' if not chunk else 'not JSON'}, near byte {base + at:,}")
            text, base, at = text[at:] + chunk.decode("latin-1"), base + at, 0

        def peek():
            nonlocal at
            while True:
                at = BLANK.match(text, at).end()
                if at < len(text):
                    return text[at]
                more()

        def value():
            nonlocal at
            while True:
                try:
                    found, end = decode(text, at)
                except ValueError:
                    more()
                    continue
                if ENDED.match(text, end):  # else a number may go on in the next chunk
                    start, at = at, end
                    return found, base + start, end - start
                more()

        def expect(character):
            nonlocal at
            if peek() != character:
                raise ValueError(f"expected {character!r} at byte {base + at:,}, found {text[at]!r}")
            at += 1

        expect("{")
        while peek() != "}":
            key, *_ = value()
            expect(":")
            if peek() != "[":
                value()
                continue
            expect("[")
            while peek() != "]":
                yield key, *value()
            expect("]")


def _utf8(text):
    """A string of json_records as it was meant."""
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        return text


class CocoIndex(Sequence):
    """The samples of a COCO-style file. Holds numbers in arrays, no annotation: 20 bytes for each, so that processes
    share or copy little; an image's annotations are read again from the file when its masks are.

    place(image record): the path of the picture.
    """

    def __init__(self, root, split, path, place):
        self.path, self.left_out, self.lone, self.classes = path, Counter(), [], {}
        self.degraded = _degraded(root, split)
        owner, offset, length, images = array("q"), array("q"), array("i"), {}
        folders = functools.lru_cache(None)(_stems)
        with _reading(path, "a COCO file"):
            for key, record, start, size in json_records(path):
                if key == "annotations":
                    if reason := self.reason(record):
                        self.left_out[reason] += 1
                    else:
                        owner.append(record["image_id"])
                        offset.append(start)
                        length.append(size)
                elif key == "images":
                    file = os.path.normpath(place(record))
                    images[record["id"]] = file, *array("i", (int(float(record[side])) for side in ("height", "width")))
                elif key == "categories":
                    self.classes[record["id"]] = _utf8(record["name"])
            ids = np.sort(array("q", images))
        owner, offset, length = map(np.array, (owner, offset, length))
        known = np.isin(owner, ids)
        self.left_out += Counter({"of an unknown image": int((~known).sum())})
        where = np.argsort(owner[known], kind="stable")
        owner, self.offset, self.length = owner[known][where], offset[known][where], length[known][where]
        kept = []
        for image in np.unique(owner).tolist():
            folder, name = os.path.split(images[image][0])
            stem = os.path.splitext(name)[0]
            there = folders(folder).get(stem)  # by stem, because some sets' records err in the ending
            if there:
                kept.append((stem, os.path.join(folder, there), *images[image][1:], image))
            else:
                self.lone.append(f"{images[image][0]}: no such image, but {path} has its masks")
        kept.sort()
        self.left_out += Counter({"images without masks": len(ids) - len(kept) - len(self.lone)})
        self.files = np.array([os.fsencode(file) for _, file, *_ in kept], bytes)
        self.sizes = np.array([(h, w) for *_, h, w, _ in kept], np.int32).reshape(-1, 2)
        numbers = np.array([row[-1] for row in kept], np.int64)
        self.first, self.end = np.searchsorted(owner, numbers), np.searchsorted(owner, numbers, "right")

    def reason(self, record):
        """Why an annotation is left out, or None."""
        shape = record.get("segmentation")
        for flag, reason in (("iscrowd", "crowd"), ("ignore", "ignore")):
            if float(record.get(flag) or 0):
                return reason
        if not shape:
            return "without a mask"
        return "of fewer than 3 points" if isinstance(shape, list) and max(map(len, shape)) < 6 else None

    def listing(self):
        """What the readers return."""
        return self, int((self.end - self.first).sum()), self.left_out, self.lone

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[k] for k in range(len(self))[index]]
        file = os.fsdecode(self.files[index])
        return Sample(os.path.splitext(os.path.basename(file))[0], file, self.path,
                      functools.partial(self.read, index), *self.degraded, tuple(self.sizes[index].tolist()))

    def read(self, index, sample):
        """The regions of picture `index`."""
        height, width = sample.size
        with open(self.path, "rb") as file:
            for k in range(self.first[index], self.end[index]):
                file.seek(self.offset[k])
                record = json.loads(file.read(self.length[k]))
                shape = record["segmentation"]
                if isinstance(shape, dict):
                    if list(shape["size"]) != [height, width]:
                        raise ValueError(f"run lengths of {shape['size']} pixels for an image of {[height, width]}")
                    mask = rle_decode(shape)
                else:
                    mask = polygon_mask([part for part in shape if len(part) >= 6], height, width)
                yield record["id"], self.classes.get(record.get("category_id")), mask, None


def _coco(root, pattern, place):
    """{split: listing} of a set with COCO's folders; the pattern's `*` is the split.

    place(split, image record): the picture's folder, which is in root, beside it or in its neighbour coco/; its name.
    """
    head, tail = pattern.split("*")
    paths = {}
    for path in _find_all(root, os.path.join("annotations", pattern), pattern):
        paths.setdefault(os.path.basename(path)[len(head):-len(tail)], path)
    near = os.path.dirname(os.path.abspath(root))

    @functools.lru_cache(None)
    def home(name):
        beside = os.path.join(near, name), os.path.join(near, "coco", name)
        return _find(root, name) or next(filter(os.path.isdir, beside), os.path.join(root, name))

    def listing(split):
        def path(image):
            folder, name = map(_utf8, place(split, image))
            return os.path.join(home(folder), name)
        return CocoIndex(root, split, paths[split], path).listing()
    return {split: functools.partial(listing, split) for split in sorted(paths)}


def coco(root):
    """annotations/instances_<split>2017.json, train2017/, val2017/"""
    return _coco(root, "instances_*2017.json", lambda split, image: (f"{split}2017", image["file_name"]))


def lvis(root):
    """lvis_v1_<split>.json, train2017/, val2017/ (in ROOT or in its neighbour coco/)"""
    def place(_, image):
        url = image.get("coco_url")  # version 1 has no file names; most pictures of its val split are from train2017
        return url.rsplit("/", 2)[-2:] if url else ("val2017", image["file_name"][-16:])
    return {split: listing for split, listing in _coco(root, "lvis_v1_*.json", place).items() if "_" not in split}


def lis(root):
    """annotations/lis_coco_*.json, RGB-dark/, RGB-normal/"""
    home = os.path.dirname(_find(root, "RGB-dark", "RGB-normal") or "")
    paths = {}
    for split in ("train", "test", "traintest") if home else ():
        for name, file, folder in ((split, f"lis_coco_JPG_{split}+1.json", "RGB-dark"),
                                   (f"normal_{split}", f"lis_coco_png_{split}.json", "RGB-normal")):
            if path := _find(root, os.path.join("annotations", file), file):
                paths[name] = path, os.path.join(home, folder)

    def listing(split):
        path, folder = paths[split]
        return CocoIndex(root, split, path, lambda image: os.path.join(folder, _utf8(image["file_name"]))).listing()
    return {split: functools.partial(listing, split) for split in paths}


KINDS = {reader.__name__: reader for reader in (robustseg, lvis, coco, lis, bdd100k, acdc, ndd20, streets, thinobject,
                                                msra10k)}


def find_splits(root, kind="auto"):
    """(kind, {split: function that lists it}). "auto" is the kind that the folder looks like."""
    if kind not in ("auto", *KINDS):
        raise DatasetError(f"no dataset kind {kind!r}; there are: auto, {', '.join(KINDS)}")
    if not os.path.isdir(root):
        raise MissingError(f"{root}: no such folder (python data.py demo/ --make-demo makes a small dataset)")
    asked = KINDS if kind == "auto" else [kind]
    found = {name: splits for name in asked if (splits := KINDS[name](root))}
    if len(found) > 1 and "robustseg" not in found:
        raise DatasetError(f"{root}: holds {' and '.join(found)}; choose one, as in {next(iter(found))}={root}")
    if found:
        return next(iter(found.items()))  # robustseg is the first
    if os.path.isdir(os.path.join(root, "clear")):
        raise MissingError(f"{root}: this is one split of a dataset; name its parent folder and choose the split")
    holds = ", ".join(sorted(os.listdir(root))[:6]) or "nothing"
    raise MissingError(f"{root}: no dataset found; looked for "
                       + "; ".join(f"{name}: {KINDS[name].__doc__}" for name in asked) + f". The folder holds: {holds}")


def load_dataset(root, split, kind="auto", strict=False):
    """One split as a Dataset. strict: a bad or missing file is an error, else it is skipped and counted.

    Where a set other than robustseg has no split "val", one in 20 pictures of "train" (or of "all"), chosen by their
    names, are its "val", and the others its "train".
    """
    root = os.fspath(root)
    kind, splits = find_splits(root, kind)
    whole, part = split, None
    if split in ("train", "val") and "val" not in splits and kind != "robustseg":
        whole, part = "train" if "train" in splits else "all", split
    if whole not in splits:
        looked = f" (no folder {os.path.join(root, split, 'clear')})" if kind == "robustseg" else ""
        raise MissingError(f"{root} ({kind}): no split {split!r}{looked}; there are: {', '.join(splits)}")
    samples, masks, left_out, lone = splits[whole]()
    if part:
        samples, masks = [s for s in samples if (seed_of(s.name, "val") % 20 == 0) == (part == "val")], None
    dataset = Dataset(root, split, kind, samples, strict, masks, +Counter(left_out))
    for line in lone:
        dataset.skip(SampleError(line))
    if not len(samples):
        raise MissingError(f"{dataset.summary()}: nothing to use here"
                           + (f"; the first file skipped: {lone[0]}" if lone else ""))
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
# A sample is named as Sample.name, a mask as Sample.indices. All numbers are indices of pixels of the upright picture,
# of which size is [height, width]; a sample that could not be read has size null and no masks.

PROMPTS_FORMAT = "gara-sam prompts 1"


def export_prompts(datasets, path, seed=0):
    """Writes the prompts of all masks: whole, or not at all. Bad samples are skipped and counted in their dataset."""
    part = f"{path}.part"
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write('{"format": "%s", "sets": [' % PROMPTS_FORMAT)
            for n, dataset in enumerate(datasets):
                head = json.dumps(dict(kind=dataset.kind, split=dataset.split, seed=seed))[:-1]
                file.write(f'{"," if n else ""}\n{head}, "samples": {{')
                progress, comma = Progress(f"{dataset.split}: prompts", len(dataset)), ""
                for sample in dataset:
                    progress.update()
                    try:
                        masks = sample.masks()
                        points, boxes = (x.astype(int).tolist() for x in sample.prompts(masks, seed))
                        content = {str(k): dict(points=p, box=b) for k, p, b in zip(sample.indices, points, boxes)}
                        content = dict(size=masks.shape[1:], masks=content)
                    except SampleError as error:
                        dataset.skip(error)
                        content = dict(size=None, masks={})
                    file.write(f"{comma}\n{json.dumps(sample.name)}: {json.dumps(content)}")
                    comma = ","
                progress.close()
                file.write("}}")
            file.write("]}\n")
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def pin_prompts(datasets, paths):
    """Makes the datasets use the prompts in these files. DatasetError if a file is not for them."""
    sets = {}
    for path in paths:
        content = _load_json(path)
        with _reading(path, "a prompts file (data.py ROOT --export-prompts FILE writes one)"):
            if content["format"] != PROMPTS_FORMAT:
                raise DatasetError(f"{path}: format {content['format']!r} is not {PROMPTS_FORMAT!r}")
            sets |= {(entry["kind"], entry["split"]): (path, dict(entry["samples"])) for entry in content["sets"]}
    for dataset in datasets:
        if (dataset.kind, dataset.split) not in sets:
            there = ", ".join(f"{kind} {split}" for kind, split in sets) or "nothing"
            raise DatasetError(f"{', '.join(map(str, paths))}: no prompts for {dataset.kind} {dataset.split}, but for "
                               f"{there}")
        path, dataset.pinned = sets[dataset.kind, dataset.split]
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


# ---------------------------------------------------------------- the demo: one scene
# Shapes are lists of (outline, value): polygons in the unit disc, drawn in turn with value 1 (add) or 0 (cut out) at
# four times the resolution. So unions, holes and exact edges need no geometry.


def _turn(points, angle):
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s], [-s, c]])


def _outline(rng):
    """A random outline in the unit disc, n x 2: polygon, star, or a blob whose radius is a short Fourier series."""
    kind = rng.choice(["polygon", "star", "blob"], p=[0.35, 0.15, 0.5])
    n = {"polygon": rng.integers(3, 8), "star": 2 * rng.integers(4, 8), "blob": 60}[kind]
    angle = 2 * np.pi * np.arange(n)[:, None] / n
    radius = np.ones((n, 1))
    if kind == "polygon" and rng.random() < 0.6:
        radius = rng.uniform(0.7, 1, (n, 1))
    elif kind == "star":
        radius[1::2] = rng.uniform(0.45, 0.65)
    elif kind == "blob" and rng.random() < 0.75:  # else a disc
        wave = np.arange(1, 6)
        radius = 1 + np.cos(angle * wave + rng.uniform(0, 6.3, 5)) @ (rng.normal(0, 0.4, (5, 1)) / wave[:, None])
        radius = radius.clip(0.25) / radius.max()
    return radius * np.concatenate([np.cos(angle), np.sin(angle)], 1) * (1, rng.uniform(0.5, 1))


def _shape(rng):
    """A random shape, list of (outline, value): one outline, two, one with a hole or a bite, or a thick stroke."""
    kind = rng.choice(["one", "union", "hole", "bite", "stroke"], p=[0.5, 0.15, 0.1, 0.1, 0.15])
    if kind == "stroke":  # a chain of discs along a quadratic curve
        t, angle = np.linspace(0, 1, 32)[:, None], np.arange(14)[:, None] * (2 * np.pi / 14)
        disc = rng.uniform(0.18, 0.28) * np.concatenate([np.cos(angle), np.sin(angle)], 1)
        a, b, c = np.array([(-0.75, 0), (0, rng.uniform(-1.6, 1.6)), (0.75, rng.uniform(-0.4, 0.4))])
        return [(disc + at, 1) for at in (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t ** 2 * c]
    first, second = _outline(rng), _turn(_outline(rng), rng.uniform(0, 6.3))
    return {"one": [(first, 1)], "union": [(0.7 * first - (0.3, 0), 1), (0.6 * second + (0.4, 0), 1)],
            "hole": [(first, 1), (0.4 * second, 0)], "bite": [(first, 1), (0.5 * second + (0.9, 0), 0)]}[kind]


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


def _colour(rng, vivid):
    """A bright, saturated colour, or a dim, greyish one: float32 3 in 0..1."""
    tint = rng.random(3)
    value, saturation = rng.uniform(0.65, 1) if vivid else rng.uniform(0.15, 0.6), rng.uniform(0, 0.5) + 0.5 * vivid
    return (value * (1 - saturation * (tint.max() - tint) / np.ptp(tint))).astype(np.float32)


def _pattern(rng, height, width, kinds=("stripes", "wood", "checks", "dots")):
    """float32 HxW in 0..1: a pattern of one of these kinds."""
    kind = rng.choice(kinds)
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
    return field


def _texture(rng, height, width, colour, strength):
    """float32 HxWx3: a pattern of `colour` and a colour up to `strength` away from it (RGB distance)."""
    field = _pattern(rng, height, width, ("flat", "gradient", "noise", "stripes", "wood", "checks", "dots"))
    step = rng.normal(0, 1, 3) + 1.5 * rng.choice([-1, 1])  # mostly lighter or darker, a little of another hue
    return colour + field[..., None] * (rng.uniform(0.3, 1) * strength * step / np.linalg.norm(step)).astype(np.float32)


def _background(rng, height, width):
    """float32 HxWx3: textures, and clutter with edges that close around nothing, so that an edge alone is no object."""
    def ground():
        return _texture(rng, height, width, _colour(rng, vivid=False), 0.25)

    def bar(half):  # a straight bar across the picture, 2 `half` pixels thick
        long = np.array([(-9, -1), (9, -1), (9, 1), (-9, 1)]) * (max(height, width), half)
        at = rng.uniform(0.1, 0.9, 2) * (width, height)
        return _cover([(_turn(long, rng.uniform(0, 6.3)) + at, 1)], height, width)

    canvas = ground()
    if rng.random() < 0.5:  # a broad band of another ground, with sharp or soft borders
        canvas = _blend(canvas, ground(), _soften(bar(rng.uniform(0.2, 1) * max(height, width)), rng.choice([0, 3, 8])))
    if rng.random() < 0.5:  # clouds of another texture, without a border
        canvas = _blend(canvas, ground(), ((_noise(rng, height, width, 2) - 0.55) * 3).clip(0, rng.uniform(0.3, 0.7)))
    for _ in range(rng.integers(0, 5)):  # lines from border to border
        canvas = _blend(canvas, _colour(rng, vivid=False), bar(rng.uniform(0.3, 1.2)) * rng.uniform(0.3, 0.9))
    return canvas.clip(0, 1)


def _paint(rng, canvas, cover, light, patterned):
    """The canvas with one more object: its shadow, its own texture, shading. `patterned`: see demo_scene."""
    if rng.random() < 0.4:
        x, y = (6 - round(rng.uniform(2, 6) * part) for part in light)  # away from the light
        shadow = _soften(np.pad(cover, 6)[y:, x:][:cover.shape[0], :cover.shape[1]], rng.uniform(1, 4))
        canvas = canvas * (1 - rng.uniform(0.2, 0.5) * shadow)[..., None]
    behind = (canvas * cover[..., None]).sum((0, 1)) / cover.sum()
    contrast, colour = rng.uniform(0.3, 0.8), _colour(rng, vivid=True)
    while np.linalg.norm(colour - behind) < contrast:  # from subtle to obvious, never invisible
        contrast, colour = contrast * 0.95, _colour(rng, vivid=True)
    skin = _texture(rng, *cover.shape, colour, rng.uniform(0.1, 0.4))
    if patterned and rng.random() < patterned:
        skin = _blend(skin, _colour(rng, vivid=True), _pattern(rng, *cover.shape))
    dome = _soften(cover, rng.uniform(1.5, 5))
    down, right = np.gradient(dome)
    shade = 1 + rng.uniform(0, 4) * (right * light[0] + down * light[1]) - rng.uniform(0, 0.3) * (1 - dome)
    return _blend(canvas, (skin * shade[..., None]).clip(0, 1), cover)


def demo_scene(seed, size=128, patterned=0.5):
    """A synthetic picture: uint8 HxWx3, bool NxHxW (N >= 1); long side `size`. The same for the same seed.

    Sharp, well lit and free of noise, vivid objects on dull grounds: a model that has seen nothing else learns to rely
    on that, as any model does on what its pictures have in common, and is not robust before it is made so. `patterned`
    is the chance that an object has a bold pattern of two colours. The tiny SAM has seen none (patterned=0), and may
    take a stripe for the object: to it the demo is what LVIS is to SAM, a dataset with its own idea of an object.
    Objects are painted back to front and a mask is what remains visible: masks never overlap, boxes do. An object that
    is mostly hidden (less than 35 % or 250 pixels of 128 x 128 remain) stays in the picture without a mask.
    """
    rng = np.random.default_rng(seed)
    sides = size, int(size * rng.choice([0.75, 0.875, 1, 1]))
    height, width = sides if rng.random() < 0.5 else sides[::-1]
    canvas, light = _background(rng, height, width), _turn(np.array([1.0, 0.0]), rng.uniform(0, 6.3)).tolist()
    owner, areas, wanted, least = np.full((height, width), -1), [], rng.integers(2, 5), 250 * (size / 128) ** 2
    while len(areas) < wanted:
        radius = size / 128 * np.exp(rng.uniform(np.log(18), np.log(48)))
        angle, at = rng.uniform(0, 6.3), rng.uniform(0.08, 0.92, 2) * (width, height)
        cover = _cover([(_turn(outline, angle) * radius + at, value) for outline, value in _shape(rng)], height, width)
        inside = cover > 0.5
        if inside.sum() >= least:
            canvas = _paint(rng, canvas, cover, light, patterned)
            owner[inside] = len(areas)
            areas.append(inside.sum())
    seen = owner == np.arange(len(areas))[:, None, None]
    image = (canvas * 255).clip(0, 255).round().astype(np.uint8)
    return image, seen[seen.sum((1, 2)) >= np.maximum(least, 0.35 * np.array(areas))]


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
    folder, name, *scene = job
    image, masks = demo_scene(*scene)
    Image.fromarray(image).save(os.path.join(folder, "clear", name + ".jpg"), quality=95)
    np.save(os.path.join(folder, "masks", name + ".npy"), masks)


def make_demo(root, train=2000, val=64, test=128, size=128, seed=0, patterned=0.5):
    """Writes the synthetic dataset. It appears under `root` when it is complete, or not at all."""
    root, jobs = os.path.abspath(root), []
    if os.path.exists(root) and not (os.path.isdir(root) and not os.listdir(root)):
        raise DatasetError(f"{root}: exists and is not an empty folder; choose another name or remove it")
    part = f"{root}.part{os.getpid()}"
    for split, count in (("train", train), ("val", val), ("test", test)):
        # Seeds above 32 bits, so that no scene equals one that training draws on the fly from a 32-bit seed.
        first = seed_of("demo", seed, split) << 32
        jobs += [(os.path.join(part, split), f"{split}_{k:05d}", first + k, size, patterned) for k in range(count)]
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
    """Writes the degraded versions of one picture: (how many, the line to report if it is bad)."""
    clear, size, name, folder, conditions = job
    try:
        image = read_image(clear, size)
    except SampleError as error:
        return len(conditions), str(error)
    for condition in conditions:
        path = os.path.join(folder, condition, name + ".jpg")
        part = os.path.join(folder, condition, f".{name}.part{os.getpid()}")
        with open(part, "wb") as file:
            file.write(degraded_jpeg(image, condition, seed_of(name, condition)))
        os.replace(part, path)  # under its final name a file is complete, so that an interrupted run can go on
    return len(conditions), None


def write_corruptions(dataset):
    """One folder per corruption (beside clear/, for other sets than Robust-Seg in ROOT/degraded/SPLIT), with the pixels
    of Sample.image(condition). Existing files stay."""
    folder = dataset[0].folder
    for condition in CORRUPTIONS:
        os.makedirs(os.path.join(folder, condition), exist_ok=True)
    there = {condition: _stems(os.path.join(folder, condition)).keys() for condition in CORRUPTIONS}
    jobs = [(s.clear, s.size, s.name, folder, [c for c in CORRUPTIONS if s.name not in there[c]]) for s in dataset]
    jobs = [job for job in jobs if job[-1]]
    progress = Progress(f"{dataset.split}: degraded images", sum(len(job[-1]) for job in jobs))
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
    chosen, good, sizes, counts, areas, left_out = spread(dataset, most), [], [], [], [], Counter()
    progress = Progress(f"{dataset.split}: reading", len(chosen))
    for sample in chosen:
        progress.update()
        try:
            masks, image = sample.masks(), sample.image()
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
    print(*(f"  skipped: {line}\n" for line in dataset.skipped[:20]), sep="", end="")
    if len(dataset.skipped) > 20:
        print(f"  and {len(dataset.skipped) - 20:,} more")
    if good:
        (h0, w0), (h1, w1) = np.min(sizes, 0), np.max(sizes, 0)
        bars = np.histogram(areas, [0, 1e-3, 1e-2, 1e-1, 1.1])[0] / len(areas)
        print(f"  {len(good):,} of them read: height {h0} to {h1}, width {w0} to {w1}; {np.mean(counts):.1f} masks an "
              f"image ({min(counts)} to {max(counts)})" + (f"; left out: {_account(left_out)}" if left_out else ""))
        print(f"  area of a mask: {bars[0]:.0%} below 0.1 % of the picture, {bars[1]:.0%} up to 1 %, {bars[2]:.0%} up "
              f"to 10 %, {bars[3]:.0%} above; median {np.median(areas):.1%}")
        classes = Counter(label for sample in good for label in sample.labels if label)
        if classes:
            print("  classes: " + ", ".join(f"{name} {count:,}" for name, count in classes.most_common(12)))
        ready = [c for c in CORRUPTIONS if c in good[0].ready]
        print(f"  degraded images on disk: {', '.join(ready) or 'none, so they are made on the fly'}")
    return good


def main(argv=None):
    """Runs the command line; a user's mistake ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    parser.add_argument("root", help="dataset folder, or KIND=FOLDER where its kind is not plain to see")
    parser.add_argument("--split", help="only this split")
    parser.add_argument("--sheet", metavar="PNG", help="draw a contact sheet of the split (or the first one)")
    parser.add_argument("--check", action="store_true", help="read all samples, not only 200, and name the bad ones")
    parser.add_argument("--strict", action="store_true", help="a bad or missing file is an error")
    parser.add_argument("--corrupt", action="store_true", help="write one folder per corruption")
    parser.add_argument("--export-prompts", metavar="JSON", help="write the prompts of every mask")
    parser.add_argument("--seed", type=int, default=0, help="of the exported prompts (0)")
    parser.add_argument("--make-demo", action="store_true", help="make the synthetic dataset")
    parser.add_argument("--scenes", nargs=3, type=int, default=(2000, 64, 128), metavar=("TRAIN", "VAL", "TEST"),
                        help="how many scenes --make-demo makes (2000 64 128)")
    parser.add_argument("--patterned", type=float, default=0.5, metavar="P", help="of the objects that --make-demo "
                        "makes, the share with a bold pattern (0.5; the tiny SAM was trained with 0)")
    args = parser.parse_args(argv)
    root, kind = path_and_kind(args.root)
    try:
        if args.make_demo:
            make_demo(root, *args.scenes, patterned=args.patterned)
        kind, splits = find_splits(root, kind)
        datasets = []
        for split in [args.split] if args.split else splits:
            try:
                dataset = load_dataset(root, split, kind, args.strict)
            except MissingError as error:  # one download of several, such as ACDC's ground truth of the _ref pictures
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
    except (DatasetError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted; no file is left half-written, so run the same command again\n")


if __name__ == "__main__":
    main()
