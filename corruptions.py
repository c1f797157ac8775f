"""The 15 synthetic corruptions of the Robust-Seg benchmark, in NumPy and Pillow.

A segmentation model is called robust if its masks survive bad weather, a noisy sensor, a shaking hand, a greedy
JPEG encoder. Robust-Seg measures that by degrading clean photographs with 15 functions and keeping the masks. The
script that made the benchmark leans on three image libraries and does a few things that its function names do not
say: "impulse_noise" over-exposes, the first half of "snow" does nothing, the layers of "rain" are copies of one
another. Results are comparable only if those accidents are kept, so strength 1 keeps them, and each docstring owns
up to its own. (The one exception is fog, whose map was frozen; see there.)

    from corruptions import CORRUPTIONS, corrupt
    foggy = corrupt(photo, "fog", seed=3)                 # photo: uint8, height x width x RGB
    light = corrupt(photo, "fog", seed=3, strength=0.5)   # the same fog, thinner

    python corruptions.py photo.jpg --out sheet.png       # all of them on one labelled sheet

Three ideas run through the file:

* Randomness is explicit. `corrupt` seeds a generator from (seed, name), and a function draws the same numbers at any
  strength: a sweep of the strength varies one degradation instead of drawing a new one at every step.
* Strength scales something physical: displacement, noise amplitude, optical depth, exposure in stops. It is 0 for
  the untouched image, 1 for the benchmark, and 2 is about twice the dose.
* A fraction of a grey level is cut off, not rounded, where the benchmark casts to 8 bits. This costs half a level
  on average (up to two in color_jitter), and appears as soon as the strength leaves 0.

Lengths are pixels of the image as given, as in the benchmark: noise, shake, glass and JPEG blocks hurt a small image
more than a large one. Only fog, zoom and the streaks of snow and rain grow with the image. Masks are never moved,
although elastic_transform and motion_blur shift the picture by about 5 pixels: that misfit is in the benchmark too.

Letters: H, W height and width; L = max(H, W); U(a, b) a uniform draw. Images are uint8 HxWx3 RGB everywhere.
"""
import argparse
import io
import math
import numbers
import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps


# ---- Shared primitives ----------------------------------------------------------------------------------------------

def truncate(x):
    """Grey levels of any float type -> uint8: clipped to 0..255, fraction cut off."""
    return np.clip(x, 0, 255).astype(np.uint8)


def through_table(image, curve):
    """Apply curve (256 float64 grey levels, one for each input level) to every sample of a uint8 array -> uint8."""
    return np.frombuffer(bytearray(image).translate(truncate(curve)), np.uint8).reshape(image.shape)


def resample(image, rows, cols, cubic=False):
    """Value of image (HxW or HxWxC) at every pair of the real positions rows (h,) and cols (w,) -> float32 hxw[xC].

    Positions are in pixels, 0 at the centre of the first one, and stop at the border. Neighbours are weighted
    linearly or, if cubic, by Keys' kernel with slope -0.75. There is no anti-aliasing: 2 or 4 taps at any scale.
    """
    channels = math.prod(image.shape[2:])
    out = image.astype(np.float32, copy=False).reshape(len(image), -1)       # channels in a row: long inner loops
    for axis, position, step in ((0, rows, 1), (1, cols, channels)):
        low, last = np.floor(position), out.shape[axis] // step - 1
        t = np.expand_dims(np.repeat((position - low).astype(np.float32), step), 1 - axis)
        at = (np.clip(low + k, 0, last).astype(np.intp)[:, None] * step for k in (range(-1, 3) if cubic else range(2)))
        taps = [np.take(out, (start + np.arange(step)).ravel(), axis) for start in at]
        if cubic:
            t2, t3 = t * t, t * t * t
            out = 0
            for tap, weight in zip(taps, (-0.75 * (t3 - 2 * t2 + t), 1.25 * t3 - 2.25 * t2 + 1,
                                          -1.25 * t3 + 1.5 * t2 + 0.75 * t, -0.75 * (t2 - t3))):
                tap *= weight
                tap += out
                out = tap
        else:
            out = between(*taps, t)
    return out.reshape(len(rows), len(cols), *image.shape[2:])


def between(a, b, t):
    """a + t (b - a), and not (1 - t) a + t b, so that flat areas stay exact. In the place of b: new arrays are what
    takes time."""
    b -= a
    b *= t
    b += a
    return b


def resize(image, height, width, cubic=False):
    """Resample image (HxW[xC]) to height x width, outer edges aligned -> float32."""
    rows, cols = ((np.arange(new) + 0.5) * old / new - 0.5 for new, old in zip((height, width), image.shape))
    return resample(image, rows, cols, cubic)


def warp(image, dy, dx):
    """Bilinear gather: out(y, x) = image(y + dy, x + dx), mirrored at the borders. dy, dx: pixels, HxW -> uint8."""
    H, W = image.shape[:2]
    my, mx = (int(np.abs(d).max()) + 2 for d in (dy, dx))
    padded = np.pad(np.pad(image, ((0, 0), (0, 0), (0, 1))), ((my, my), (mx, mx), (0, 0)), mode="reflect")
    pixels = padded.view(np.uint32).ravel()                          # RGB and a spare byte: one load fetches a pixel
    y, x = np.arange(my, my + H)[:, None] + dy, np.arange(mx, mx + W) + dx
    y0, x0 = np.floor(y), np.floor(x)
    corner = (y0 * padded.shape[1] + x0).astype(np.intp)
    ty, tx = ((a - b).astype(np.float32)[..., None] for a, b in ((y, y0), (x, x0)))

    def row(start):
        return between(*(pixels[start + k].view(np.uint8).reshape(H, W, 4).astype(np.float32) for k in (0, 1)), tx)

    out = between(row(corner), row(corner + padded.shape[1]), ty)
    return np.rint(out, out=out).astype(np.uint8)[..., :3].copy()


def correlate(image, kernel):
    """Weighted sum of shifted copies of image (HxW[xC]), mirrored at the borders -> float32.

    kernel has odd sides; its entry at the centre + (i, j) weighs image(y + i, x + j). Zeros cost nothing, which is
    what makes long thin kernels cheap.
    """
    H, W = image.shape[:2]
    margins = [(side // 2, side // 2) for side in kernel.shape] + [(0, 0)] * (image.ndim - 2)
    padded = np.pad(image.astype(np.float32), margins, mode="reflect")
    out, term = np.zeros(image.shape, np.float32), np.empty(image.shape, np.float32)
    for i, j in np.argwhere(kernel):
        out += np.multiply(padded[i:i + H, j:j + W], np.float32(kernel[i, j]), out=term)
    return out


def gaussian(sigma, radius):
    """Samples of a Gaussian at -radius..radius, summing to 1: float64 (2 radius + 1,)."""
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return weights / weights.sum()


def splat(dy, dx, weights):
    """Kernel for `correlate` with the given weights at real offsets (dy, dx), shared among the 4 pixels around each."""
    radius = math.ceil(max(np.abs(dy).max(), np.abs(dx).max())) + 1
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1))
    i, j = np.floor(dy).astype(int), np.floor(dx).astype(int)
    v, u = dy - i, dx - j
    for a, b, share in ((0, 0, (1 - v) * (1 - u)), (0, 1, (1 - v) * u), (1, 0, v * (1 - u)), (1, 1, v * u)):
        np.add.at(kernel, (i + a + radius, j + b + radius), weights * share)
    return kernel / kernel.sum()


def to_planes(image):
    """uint8 HxWx3 -> float32 3xHxW: work on single channels is several times as fast when they lie apart."""
    return np.moveaxis(image, -1, 0).astype(np.float32, order="C")


def from_planes(rgb):
    """The way back: grey levels 3xHxW of any float type -> uint8 HxWx3, fraction cut off."""
    return np.stack(truncate(rgb), axis=-1)


def split_hue(rgb):
    """RGB planes (3xHxW) -> hue in sixths of a turn (0 red, 2 green, 4 blue), lowest and highest channel: HxW each.

    The colour models HSV and HLS share these three numbers, and differ in how they name the last two.
    """
    r, g, b = rgb
    low, high = rgb.min(0), rgb.max(0)
    chroma = np.maximum(high - low, 1e-6)
    hue, other = (r - g) / chroma, np.empty_like(r)
    hue += 4
    for top, ahead, behind, phase in ((g, b, r, 2), (r, g, b, 0)):   # red decides last: it goes first among equals
        np.subtract(ahead, behind, out=other)
        other /= chroma
        other += phase
        np.copyto(hue, other, where=high == top)
    return hue, low, high


def join_hue(hue, low, high):
    """Inverse of `split_hue` for any real hue -> float32 3xHxW RGB."""
    rgb, chroma = np.empty((3, *hue.shape), np.float32), high - low
    for ramp, phase in zip(rgb, (0, 4, 2)):                          # red peaks at hue 0, green at 2, blue at 4
        np.add(hue, phase, out=ramp)
        ramp /= 6                                                    # in turns, then a triangle wave of it
        ramp -= np.floor(ramp)
        ramp *= 6
        ramp -= 3
        np.abs(ramp, out=ramp)
        ramp -= 1
        np.clip(ramp, 0, 1, out=ramp)
        ramp *= chroma
        ramp += low
    return rgb


def fade(image, changed, share):
    """Between two uint8 arrays, `share` of the way from the first to the second -> uint8."""
    return changed if share == 1 else np.rint(image + share * (changed.astype(np.float32) - image)).astype(np.uint8)


def jpeg(image, coarseness, share):
    """uint8 HxWx3 through JPEG with quantisation steps `coarseness` times the standard ones, colour at half resolution;
    blended with the input, of which 1 - share remains."""
    quality = 50 / coarseness if coarseness > 1 else 100 - 50 * coarseness
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=max(1, round(quality)), subsampling="4:2:0")
    return fade(image, np.array(Image.open(file)), share)


def specks(rng, height, width, scale, density, beta):
    """Random bright specks, the raw material of snow and rain -> float32 HxW of whole grey levels.

    A grid of `scale` times the image's size has each cell lit with probability `density`, at 255 (0.5 + |b - 0.5|)
    with b from the U-shaped Beta(.5, .5). An 8x8 map of Beta(1, beta) gates it: the smaller beta, the more even the
    fall. Both enlargements are cubic.
    """
    h, w = int(height * scale), int(width * scale)
    # Closed forms of the two Beta draws: they take one uniform number each, so the stream never depends on a value.
    level = 127.5 + 127.5 * np.abs(np.cos(np.pi * rng.random((h, w))))
    lit = rng.random((h, w)) < density
    gate = 1 - rng.random((8, 8)) ** (1 / max(beta, 1e-6))
    grid = lit * level * np.clip(resize(gate, h, w, cubic=True), 0, 1)
    return np.rint(np.clip(resize(grid, height, width, cubic=True), 0, 255))


def fractal_noise(rng, height, width, exponent):
    """Cloud-like noise: random spectrum times frequency**exponent, stretched to exactly 0..1 -> float32 HxW."""
    fy, fx = (np.minimum(np.arange(n), n - np.arange(n)) for n in (height, width))
    frequency = np.sqrt(fy[:, None] ** 2.0 + fx ** 2.0)
    frequency[0, 0] = np.inf                                         # inf ** negative = 0: no constant term
    radius, phase = rng.random((2, height, width)) * [[[1]], [[2 * np.pi]]]
    real = radius * np.cos(phase) * frequency ** exponent
    noise = np.fft.ifft2(real + 1j * real * np.sin(phase)).real      # real * sin, not radius * sin, as in the benchmark
    return ((noise - noise.min()) / np.ptp(noise)).astype(np.float32)


# ---- The corruptions: f(uint8 HxWx3 image, numpy Generator, strength > 0) -> new uint8 HxWx3 ------------------------

def snow(image, rng, strength=1.0):
    """White flakes 2.5-5 px apart, in falling streaks of about 1 % of L, brightest at the lower end.

    The flake map is added to the image and also sets a floor under it, 1 to 3 times over. Accidents: those layers
    are identical, since the original copies the random state along with the layer, so they pile up in the same
    places; and a first stage that should whiten dark ground has a gain of 1.0, so it is left out here. Flakes are as
    dense on a large image, hence smaller in proportion.
    Strength multiplies the share of lit cells (0.35): how hard it snows. All are lit beyond 2.9.
    """
    H, W = image.shape[:2]
    L = max(H, W)
    layers = rng.integers(1, 4)
    coarseness, flake, speed = rng.uniform(0.6, 0.8), rng.uniform(0.4, 0.8), rng.uniform(0.01, 0.015)
    beta, sigma = 1 - rng.uniform(0.3, 0.9), np.clip(L * rng.uniform(1e-4, 1e-3), 0.5, 3.75)
    flakes = specks(rng, H, W, 1 - coarseness, 0.35 * strength, beta)
    blur = gaussian(sigma, max(5, int(3.3 * sigma)) // 2)
    flakes = np.rint(correlate(correlate(flakes, blur[:, None]), blur[None]))
    length = int(speed * L) | 1                                     # odd, for a kernel with a middle
    if length > 1:
        fall = np.linspace(1, 0, length)[:, None]
        flakes = np.rint(correlate(flakes, fall / fall.sum()))
    # The gain of 2 to 4 is not clipped: it is what burns flakes to pure white.
    curve = np.floor(255 * (np.arange(256) / 255) ** (3 - 2 * flake)) * (6 - 5 * flake)
    flakes = curve.astype(np.float32)[flakes.astype(np.uint8)][..., None]
    out = image.astype(np.float32)
    for _ in range(layers):
        out = np.floor(np.minimum(np.maximum(out + (0.1 + 20 * speed) * flakes, (1 + 20 * speed) * flakes), 255))
    return truncate(out)


def fog(image, rng, strength=1.0):
    """A light grey cloud that hides 54-72 % of the scene, then faint white discs and a box blur of 1 to 4 px.

    Accident, and our one exception: the original rebuilds its cloud from the same seed at every call, so all images
    of one size wear the identical fog, which a model could learn by heart. The constants which that seed drew are
    kept (cloud level 231, opacity 0.64 (0.83 + 0.3 noise)^0.9, spectral slopes) and only the maps are drawn anew.
    Strength multiplies the optical depth, as if the scene were farther away: what shines through is raised to that
    power (the discs likewise), and the reach of the blur is stretched, whose border taps count by the part covered.
    """
    H, W = image.shape[:2]
    cloud = fractal_noise(rng, H, W, -1.66)
    veil = np.rint(255 * fractal_noise(rng, 4, 4, -2.74))
    drift = rng.normal(0, 2, (8, 8))
    cloud = np.clip(231.12 * (0.8 + 0.4 * cloud) + resize(drift, H, W, cubic=True), 0, 255)
    opacity = np.clip(0.6419 * (0.8318 + 0.3 * np.arange(256) / 255) ** 0.9, 0, 1)
    clear = ((1 - opacity) ** strength).astype(np.float32)
    clear = clear[np.rint(np.clip(resize(veil, H, W, cubic=True), 0, 255)).astype(np.uint8)][..., None]
    out = truncate(cloud[..., None] + clear * (image - cloud[..., None]))

    thickness = rng.uniform(0.1, 0.2)
    side = int(W // 3 * thickness)
    add_discs(out, rng, side, 1 - (1 - 0.08 * thickness) ** strength)

    taps = max(side, 10) // 10
    before, after = taps // 2 * strength, (taps - 1 - taps // 2) * strength
    reach = math.ceil(max(before, after))
    offsets = np.arange(-reach, reach + 1)
    box = np.clip(np.minimum(after, offsets) - np.maximum(-before, offsets) + 1, 0, 1) / (1 + before + after)
    return np.rint(correlate(correlate(out, box[:, None]), box[None])).astype(np.uint8)


def add_discs(image, rng, side, opacity):
    """Blend white discs of diameter side px into image (uint8 HxWx3, in place): ever more, in ever wider boxes.

    Each disc rounds to whole levels, so that a faint one leaves what is already bright untouched. None if side < 10.
    """
    H, W = image.shape[:2]
    radius = side // 2
    span, levels = np.arange(-radius, radius + 1), np.arange(256)
    disc = (span[:, None] ** 2 + span ** 2 <= radius ** 2)[..., None]
    whiter = np.rint(levels + (255 - levels) * opacity).astype(np.uint8)
    left, top, count = W // 2 - 2 * side, H // 2 - side, side // 10
    while count and (left > -side or top > -side):
        xs = rng.integers(left + radius, W - left - radius + 1, count)
        ys = rng.integers(top + radius, H - top - radius + 1, count)
        for x, y in zip(xs, ys):
            y0, x0 = max(y - radius, 0), max(x - radius, 0)
            window = image[y0:max(y + radius + 1, 0), x0:max(x + radius + 1, 0)]
            inside = disc[y0 - y + radius:, x0 - x + radius:][:window.shape[0], :window.shape[1]]
            np.copyto(window, whiter.take(window), where=inside)
        left, top = left - max(1, 3 * side * W // (H + W)), top - max(1, 3 * side * H // (H + W))
        count += side // 10


def rain(image, rng, strength=1.0):
    """Streaks 5-10 % of L long and up to 15 degrees off the vertical, merging into a light grey veil (level 240).

    Drops 2 px wide are drawn out along the fall, brightest at the lower end, and blended in 1 to 3 times. Accidents:
    the layers are identical, as in snow, so severity hangs on their number times the density and varies widely;
    and the colour meant to be random is 240 in practice.
    Strength multiplies the share of lit cells (0.03-0.14): how hard it rains.
    """
    H, W = image.shape[:2]
    layers = rng.integers(1, 4)
    coarseness, angle, speed = rng.uniform(0.4, 0.5), np.radians(rng.uniform(-15, 15)), rng.uniform(0.05, 0.1)
    density, beta = rng.uniform(0.03, 0.14), 1 - rng.uniform(0.8, 1)
    drops = specks(rng, H, W, 1 - coarseness, density * strength, beta)
    length = int(speed * max(H, W)) | 1
    if length > 1:
        along = np.arange(length) - length // 2
        streak = splat(along * np.cos(angle), along * np.sin(angle), np.linspace(1, 0, length))
        drops = np.rint(correlate(drops, streak))
    alpha = np.clip(1.3 / 255 * drops, 0, 1)[..., None]
    out = image.astype(np.float32)
    for _ in range(layers):
        out = np.floor(out + alpha * (240 - out))
    return truncate(out)


def gauss_noise(image, rng, strength=1.0):
    """Normal noise, independent for each pixel and channel, with a standard deviation of 15.8-16.1 grey levels.

    Accident: the original names a narrow range of variances, 250 to 260, so every image is equally noisy.
    Strength multiplies the standard deviation.
    """
    sigma = math.sqrt(rng.uniform(250, 260))
    return truncate(image + strength * sigma * rng.standard_normal(image.shape))


def ISO_noise(image, rng, strength=1.0):
    """A sensor at high gain: photon noise on the lightness, normal noise on the hue (HLS).

    Lightness moves towards white by P/255 of what is left, with P Poisson of mean 255 q std(lightness), about 30-50.
    Accidents: the mean of P stays in, which adds a haze of 12-19 %; and the hue noise, 100-145 degrees, is nearly
    a random hue, so that colours average to grey. Noise grows with the image's contrast; a flat grey one stays clean.
    Strength multiplies both the hue noise and P, whose draws stay the same.
    """
    shift, gain = rng.uniform(0.4, 0.5), rng.uniform(0.7, 0.8)
    hue, low, high = split_hue(to_planes(image))
    light = (low + high) / 2                                        # 0..255, so that greys survive exactly
    saturation = (high - low) / np.maximum(255 - np.abs(2 * light - 255), 1e-6)
    photons = rng.poisson(gain * light.std(dtype=np.float64), light.shape).astype(np.float32)
    hue += 6 * shift * gain * strength * rng.standard_normal(hue.shape)
    light = np.minimum(light + strength * photons * (1 - light / 255), 255)
    half_chroma = saturation * (255 - np.abs(2 * light - 255)) / 2
    return from_planes(join_hue(hue, light - half_chroma, light + half_chroma))


def impulse_noise(image, rng, strength=1.0):
    """Over-exposure: every sample is multiplied by one gain of 1.4-1.5 and clipped.

    Accident: salt-and-pepper noise was surely meant, but the noise field of the original holds a single number.
    Strength multiplies the exposure in stops: gain ** strength.
    """
    return through_table(image, np.arange(256) * rng.uniform(1.4, 1.5) ** strength)


def resampling_blur(image, rng, strength=1.0):
    """A picture enlarged from a quarter of its size: bilinear down, bilinear up. Nothing is random here.

    Accident: the way down takes 2 taps per axis without smoothing first, so the blur comes with aliasing.
    Strength up to 1 fades from the input to this result; beyond 1 it multiplies the factor of 4.
    """
    H, W = image.shape[:2]
    factor = 4 * max(1, strength)
    small = np.rint(resize(image, max(1, int(H / factor)), max(1, int(W / factor))))
    return fade(image, np.rint(resize(small, H, W)).astype(np.uint8), min(1, strength))


def motion_blur(image, rng, strength=1.0):
    """A straight camera shake: the mean of the pixels along a segment drawn in a window of 3 to 35 px.

    Both ends are random in that window, which makes severity very uneven (2 to 35 taps, median 8). Accident: the
    segment is not centred, so the picture also shifts, by 4.9 px on average, and leaves its mask behind.
    Strength multiplies the positions along the segment, hence length and shift; gaps that open beyond 1 are filled.
    """
    side = 3 + 2 * int(rng.integers(17))
    first = int(rng.integers(side * side))
    last = (first + int(rng.integers(1, side * side))) % (side * side)     # any other cell of the window
    start, stop = (np.array(divmod(cell, side)) - side // 2 for cell in (first, last))
    steps = np.abs(stop - start).max()
    taps = np.rint(start + (stop - start) * np.arange(steps + 1)[:, None] / steps)     # a line one pixel wide
    gap = max(strength - 1, 0)
    fill = np.linspace(-gap / 2, gap / 2, math.ceil(max(strength, 1)))
    points = (strength * taps + fill[:, None, None] * (stop - start) / steps).reshape(-1, 2)
    return np.rint(correlate(image, splat(points[:, 0], points[:, 1], np.ones(len(points))))).astype(np.uint8)


def zoom_blur(image, rng, strength=1.0):
    """Zooming in during the exposure: the mean of the image and of its enlargements by 1, 1+d, 1+2d, ... below M.

    d is U(.05, .07) and M is U(1, 1.33): up to 6 ghosts, up to 50 px apart from their origin at the edge of a 640 px
    image. Accidents: the sharp image counts twice, and 18 % of the draws have no ghost and return the input.
    Strength multiplies the zoom in excess of 1, the number of ghosts stays.
    """
    H, W = image.shape[:2]
    furthest, step = rng.uniform(1, 1.33), rng.uniform(0.05, 0.07)
    excess = np.arange(0, furthest - 1, step)
    sharp = image.astype(np.float32)
    total = 2 * sharp
    for zoom in 1 + strength * excess[1:]:
        rows, cols = ((np.arange(n) - (n - 1) / 2) / zoom + (n - 1) / 2 for n in (H, W))
        for start in range(0, H, 64):                                # strips that stay in the cache
            strip = slice(start, start + 64)
            total[strip] += resample(sharp, rows[strip], cols)
    total /= max(len(excess), 1) + 1
    return truncate(total)


def color_jitter(image, rng, strength=1.0):
    """Brightness x U(.3, 1.7), contrast x U(.7, 1.3), saturation x U(.3, 1.7) and hue + U(-.7, .7) turns, in any order.

    Contrast pivots on the mean grey, saturation on the pixel's grey, hue turns in HSV. Accident: hue should stop at
    half a turn, the range goes on to .7 and wraps, so large shifts are twice as likely and strong recolouring is the
    norm. The original rounds hue to 2 degrees; here it stays continuous.
    Strength is the exponent of the three factors, and multiplies the wrapped hue shift, at most half a turn.
    """
    brightness, contrast, saturation = (rng.uniform(1 - r, 1 + r) ** strength for r in (0.7, 0.3, 0.7))
    turn = rng.uniform(-0.7, 0.7)
    turn = np.clip((turn - round(turn)) * strength, -0.5, 0.5)
    out = to_planes(image)
    for step in rng.permutation(4):
        if step == 3:
            hue, low, high = split_hue(out)
            hue += np.float32(6 * turn)
            out = join_hue(hue, low, high)
        elif step == 0:
            out *= brightness
        else:
            gray = 0.299 * out[0] + 0.587 * out[1] + 0.114 * out[2]
            if step == 1:
                out *= contrast
                out += (1 - contrast) * float(gray.mean(dtype=np.float64))
            else:
                out = between(gray, out, saturation)
        np.clip(out, 0, 255, out=out)
        (np.floor if step < 2 else np.rint)(out, out=out)  # as the original casts and rounds
    return from_planes(out)


def compression(image, rng, strength=1.0):
    """JPEG at quality 5 to 10 with halved colour resolution: 8 px blocks, washed-out colours.

    Accident: red and blue are swapped on the way in and out, so the encoder takes red for blue and keeps it worst.
    Strength multiplies the encoder's quantisation steps, which are 50/quality times the standard ones; quality is
    whole, so below 0.25 the result also fades into the input.
    """
    swapped = np.ascontiguousarray(image[..., ::-1])
    return jpeg(swapped, strength * 50 / rng.integers(5, 11), min(1, 4 * strength))[..., ::-1].copy()


def elastic_transform(image, rng, strength=1.0):
    """A tilted, rippled picture: an affine jitter, then a smooth random displacement; 5.5 px in all on average.

    Affine: three points a third of the short side around the centre move by U(-5, 5) px per axis, less when the
    short side is below 90 px, and the plane with them. Local: white noise blurred with sigma 10 px, 1.6 px per axis.
    Accidents: the centre's x and y are swapped, so the jitter turns about another point unless the image is square;
    two interpolations in a row blur it; and masks do not move along.
    Strength multiplies both displacements.
    """
    H, W = image.shape[:2]
    r = min(H, W) // 3
    x, y = H // 2, W // 2                                            # swapped, see above
    corners = np.array([(x + r, y + r, 1), (x + r, y - r, 1), (x - r, y - r, 1)])
    moves = strength * min(5, r / 6) * rng.uniform(-1, 1, (3, 2))
    # Interpolating the three displacements differs from inverting the map that moves the points only to second
    # order in moves / r (the sign is random anyway), and unlike an inverse it exists for any strength.
    (xx, xy), (yx, yy), (x0, y0) = np.linalg.solve(corners, moves)
    rows, cols = np.arange(H)[:, None], np.arange(W)
    out = warp(image, yy * rows + (xy * cols + y0), xx * cols + (yx * rows + x0))
    # Nothing in the ripple is finer than 10 px: draw and blur it on a grid of one cell for 4x4 px.
    cells, kernel = (-(-H // 4), -(-W // 4)), gaussian(10 / 4, 10)
    ripple = []
    for _ in range(2):
        field = strength * 100 / 4 * rng.uniform(-1, 1, cells)       # the mean of 16 px varies 4 times less than one
        field = correlate(correlate(field, kernel[:, None]), kernel[None])
        ripple.append(resample(field, (np.arange(H) + 0.5) / 4 - 0.5, (np.arange(W) + 0.5) / 4 - 0.5, cubic=True))
    return warp(out, *ripple)


def frosted_glass_blur(image, rng, strength=1.0):
    """Seen through frosted glass: each pixel takes the colour of a random one within 3 px on either axis.

    Accident: this is one pass of gathering from the clean image and no blur at all, so fine detail grows sevenfold
    instead of vanishing and the histogram stays what it was.
    Strength multiplies the reach; a fractional reach gives the outermost whole step a smaller chance.
    """
    H, W = image.shape[:2]
    reach = np.float32(3 * strength)
    dy, dx = np.floor((2 * rng.random((2, H, W), dtype=np.float32) - 1) * (reach + 0.5) + 0.5).astype(np.intp)
    return image[np.clip(np.arange(H)[:, None] + dy, 0, H - 1), np.clip(np.arange(W) + dx, 0, W - 1)]


def brightness(image, rng, strength=1.0):
    """Under-exposure: every sample times one factor of 0.6-0.8. Accident: the name promises both ways, it only darkens.

    Strength multiplies the exposure in stops: factor ** strength.
    """
    return through_table(image, np.arange(256) * rng.uniform(0.6, 0.8) ** strength)


def contrast(image, rng, strength=1.0):
    """Contrast raised 1.6-1.7 times about level 128; two samples in five end at 0 or 255.

    Accident: it is never lowered, and the pivot is 128 rather than the image's mean, so dark images get darker still.
    Strength is the exponent of the factor.
    """
    return through_table(image, (np.arange(256) - 128) * rng.uniform(1.6, 1.7) ** strength + 128)


# ---- Two that are not in the benchmark ------------------------------------------------------------------------------
# Stand-ins for real degradation: several causes at once, physics instead of Robust-Seg's accidents. Nothing that learns
# from the 15 has seen them, so they ask what an adapter makes of a degradation of another kind.


def night(image, rng, strength=1.0):
    """A street camera at night, not in the benchmark: haze, too little light, a noisy sensor, a greedy encoder.

    In linear light (the square of gamma-coded values is near enough): grey-orange haze takes 20-50 %, the exposure
    falls by 3-4 stops, a sensor counts photons (400 at full scale) and adds its own noise of 2 of them, an automatic
    gain gives half of the stops back, with warm colours; then JPEG at quality 15 to 30.
    Strength multiplies haze's optical depth, the stops, the noise's standard deviation and the encoder's quantisation
    steps, whose effect fades in up to 0.25.
    """
    depth, stops, warm = rng.uniform(0.22, 0.7), rng.uniform(3, 4), rng.uniform(1, 1.3)
    coarseness, lamp = 50 / rng.uniform(15, 30), np.float32([0.5, 0.42, 0.33]) * rng.uniform(0.7, 1.1)
    shine = math.exp(-strength * depth)
    light = (shine * (np.float32(image) / 255) ** 2 + (1 - shine) * lamp) * 2 ** (-strength * stops)
    dark = strength * rng.standard_normal((2, *image.shape), np.float32)
    light += (np.sqrt(400 * light) * dark[0] + 2 * dark[1]) / 400
    light *= 2 ** (strength * stops / 2) * np.float32([warm, 1, 1 / warm]) ** strength
    taken = truncate(255 * np.sqrt(light.clip(0, 1)))
    return jpeg(taken, strength * coarseness, min(1, 4 * strength))


def underwater(image, rng, strength=1.0):
    """A diver's camera in turbid water, not in the benchmark: red is swallowed, all else veiled, blurred and dimmed.

    Beer's law for each channel over 1-2 units of distance, with absorption 0.9, 0.35, 0.3 a unit; the light that is
    scattered into the view is blue-green; scattering on the way blurs by 0.6-1.2 px; waves above throw bright and dark
    bands of 25 %. Strength multiplies the distance, the blur and the depth of the bands.
    """
    H, W = image.shape[:2]
    distance, veil = rng.uniform(1, 2), np.float32([0.1, 0.45, 0.5]) * rng.uniform(0.7, 1.1)
    sigma, angle, wave = strength * rng.uniform(0.6, 1.2), rng.uniform(0, math.pi), rng.uniform(0.05, 0.2) * max(H, W)
    ripple = 0.3 * wave * fractal_noise(rng, H, W, -2).astype(np.float32)
    along = np.arange(H)[:, None] * math.sin(angle) + np.arange(W) * math.cos(angle)
    bands = 1 + 0.25 * strength * np.sin(2 * math.pi / wave * (along + ripple)).astype(np.float32)
    out = image * bands.clip(0)[..., None] * np.exp(-strength * distance * np.float32([0.9, 0.35, 0.3]))
    out += 255 * veil * (1 - np.exp(-0.6 * strength * distance))
    blur = gaussian(max(sigma, 1e-3), 6)
    return truncate(correlate(correlate(out, blur[:, None]), blur[None]))


CORRUPTIONS = {f.__name__: f for f in (
    snow, fog, rain, gauss_noise, ISO_noise, impulse_noise, resampling_blur, motion_blur, zoom_blur, color_jitter,
    compression, elastic_transform, frosted_glass_blur, brightness, contrast)}
OTHERS = dict(night=night, underwater=underwater)


def corrupt(image, name, seed=0, strength=1.0):
    """Degrade an image; equal arguments give equal pixels.

    image: uint8 HxWx3 RGB, at least 16x16, left unmodified. name: a key of CORRUPTIONS or OTHERS. seed: a whole
    number >= 0. strength: 0 (an exact copy) to 10; 1 is the benchmark. Returns a new uint8 HxWx3 array.
    Raises ValueError, in one line, for anything else.
    """
    functions = CORRUPTIONS | OTHERS
    if not isinstance(name, str) or name not in functions:
        raise ValueError(f"unknown corruption {name!r}; choose one of: {', '.join(functions)}")
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image is {got}; pass a numpy array of dtype uint8 and shape (height, width, 3), RGB")
    if min(image.shape[:2]) < 16:
        raise ValueError(f"image is {image.shape[1]}x{image.shape[0]} pixels; enlarge it so that both sides reach 16")
    if not isinstance(strength, numbers.Real) or not 0 <= strength <= 10:        # NaN fails this too
        raise ValueError(f"strength is {strength!r}; pass a number from 0 (no change) to 10, 1 is the benchmark")
    if not isinstance(seed, numbers.Integral) or seed < 0:
        raise ValueError(f"seed is {seed!r}; pass a whole number of 0 or more")
    if strength == 0:
        return image.copy()
    rng = np.random.default_rng([int(seed), zlib.crc32(name.encode())])
    return functions[name](np.ascontiguousarray(image), rng, float(strength))


# ---- Contact sheet --------------------------------------------------------------------------------------------------

def load_rgb(path):
    """Read an image file of any mode, upright, transparency on white -> uint8 HxWx3. Raises OSError or ValueError."""
    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)
    if picture.mode[0] in "IF":                                      # 16-bit, 32-bit and float greys: no fixed white
        levels = np.asarray(picture, dtype=np.float64)
        picture = Image.fromarray(truncate(255 * (levels - levels.min()) / max(np.ptp(levels), 1e-12)))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def contact_sheet(image, seed=0, strength=1.0, size=240):
    """The clear image (uint8 HxWx3) and its 15 corruptions in 4 labelled columns -> PIL image.

    The image is first shrunk to a long side of 640 px, because most lengths are absolute and the benchmark's look is
    known at that scale. Its corrupted copies are then shrunk to a long side of `size` px.
    """
    picture = Image.fromarray(image)
    picture.thumbnail((640, 640), Image.Resampling.LANCZOS)
    image = np.asarray(picture)
    tiles = {"clear": image, **{name: corrupt(image, name, seed, strength) for name in CORRUPTIONS}}
    width, height = (max(1, round(side * size / max(picture.size))) for side in picture.size)
    gap, text = max(4, size // 24), max(9, size // 14)
    font = ImageFont.load_default(text)
    cell_w = max(width, math.ceil(max(font.getlength(name) for name in tiles))) + gap
    cell_h = height + gap + text + gap // 2
    sheet = Image.new("RGB", (4 * cell_w + gap, 4 * cell_h + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (name, tile) in enumerate(tiles.items()):
        middle, top = gap + k % 4 * cell_w + (cell_w - gap) // 2, gap + k // 4 * cell_h
        tile = Image.fromarray(tile).resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(tile, (middle - width // 2, top))
        draw.text((middle, top + height + gap // 4), name, fill=(40, 40, 40), font=font, anchor="ma")
    return sheet


def main():
    """Runs the command line; a user's mistake ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(description="Show a photo under the 15 Robust-Seg corruptions on one sheet.")
    parser.add_argument("photo", type=Path, help="image file, any format Pillow reads")
    parser.add_argument("--out", type=Path, default=Path("sheet.png"), help="where to write the sheet (sheet.png)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other draws (0)")
    parser.add_argument("--strength", type=float, default=1.0, help="0 no change, 1 the benchmark, up to 10 (1)")
    parser.add_argument("--size", type=int, default=240, help="long side of a tile in pixels, 32 to 2000 (240)")
    args = parser.parse_args()
    if not 32 <= args.size <= 2000:
        parser.exit(2, f"corruptions.py: --size is {args.size}; pass 32 to 2000\n")
    temporary = args.out.parent / f".{os.getpid()}-{args.out.name}"
    try:
        task = f"read {args.photo}"
        image = load_rgb(args.photo)
        task = f"corrupt {args.photo}"
        sheet = contact_sheet(image, args.seed, args.strength, args.size)
        task = f"write {args.out}"
        sheet.save(temporary)
        os.replace(temporary, args.out)                              # nobody sees half a sheet
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:    # Pillow raises all of them
        parser.exit(2, f"corruptions.py: cannot {task}: {getattr(error, 'strerror', None) or error}\n")
    finally:
        if temporary.exists():
            temporary.unlink()
    print(f"{args.out}: {sheet.width}x{sheet.height}, seed {args.seed}, strength {args.strength:g}")


if __name__ == "__main__":
    main()
