"""The 15 synthetic corruptions of the Robust-Seg benchmark, in NumPy and Pillow.

A segmentation model is called robust if its masks survive bad weather, a noisy sensor, a shaking hand, a greedy
JPEG encoder. Robust-Seg measures that by degrading clean photographs with 15 functions and keeping the masks.

    from corruptions import CORRUPTIONS, corrupt
    foggy = corrupt(photo, "fog", seed=3)                 # photo: uint8, height x width x RGB
    light = corrupt(photo, "fog", seed=3, strength=0.5)   # the same fog, thinner

    python corruptions.py photo.jpg --out sheet.png       # all of them on one labelled sheet

The idea: a corruption is a function of an image, a seed and a strength, and of nothing else.

* The seed makes an experiment repeatable. `corrupt` seeds a generator from (seed, name), so that two people, and two
  methods, see the same pixels in any order of the images and with any number of workers. Evaluation derives the seed
  from the names of the image and the corruption, training from the run's seed and the epoch as well (both through
  `Sample.image` in data.py). A function draws the same numbers at any strength: a sweep of the strength varies one
  degradation, not a new one at every step.
* Strength scales something physical: displacement, noise amplitude, optical depth, exposure in stops. It is 0 for
  the untouched image, 1 for the benchmark, and 2 is about twice the dose.
* The benchmark's accidents are kept. Its script does a few things that its function names do not say:
  "impulse_noise" over-exposes, the first half of "snow" does nothing, the layers of "rain" are copies of one another.
  Results are comparable only if strength 1 does the same, so each docstring owns up to its own accident. (The one
  exception is fog, whose map was frozen; see there.)

A fraction of a grey level is cut off, not rounded, where the benchmark casts to 8 bits. This costs half a level on
average (up to two in color_jitter), and appears as soon as the strength leaves 0.

Lengths are pixels of the image as given, as in the benchmark: noise, shake, glass and JPEG blocks hurt a small image
more than a large one. Only fog, zoom and the streaks of snow and rain grow with the image. Masks are never moved,
although elastic_transform and motion_blur shift the image by about 5 pixels: that misfit is in the benchmark too.

Letters: H, W height and width; L = max(H, W); U(a, b) a uniform draw. Images are uint8 HxWx3 RGB. Within a corruption
they often become planes, float32 3xHxW, since arithmetic on whole channels is several times as fast; the tools work
on the last two axes and so take planes and single maps HxW alike.
"""
import argparse
import io
import math
import numbers
import zlib

import numpy as np
from PIL import Image


# ---- Tools: grey levels ---------------------------------------------------------------------------------------------

def truncate(levels):
    """Grey levels of any float type -> uint8: clipped to 0..255, fraction cut off."""
    return np.clip(levels, 0, 255).astype(np.uint8)


def to_planes(image):
    """uint8 HxWx3 -> float32 3xHxW."""
    return np.moveaxis(image, -1, 0).astype(np.float32, order="C")


def from_planes(planes):
    """The way back: grey levels 3xHxW of any type -> uint8 HxWx3, fraction cut off."""
    return np.stack(truncate(planes), axis=-1)


def fade(image, changed, share):
    """Between two uint8 arrays, `share` of the way from the first to the second -> uint8."""
    difference = changed.astype(np.float32) - image
    return np.rint(image + share * difference).astype(np.uint8)


def split_hue(rgb):
    """RGB planes (3xHxW) -> hue in sixths of a turn (0 red, 2 green, 4 blue), lowest and highest channel: HxW each.

    The colour models HSV and HLS share these three numbers, and differ in how they name the last two.
    """
    r, g, b = rgb
    low = rgb.min(0)
    high = rgb.max(0)
    chroma = np.maximum(high - low, 1e-6)
    hue = (r - g) / chroma + 4
    hue = np.where(high == g, (b - r) / chroma + 2, hue)
    hue = np.where(high == r, (g - b) / chroma, hue)                 # red decides last: it goes first among equals
    return hue, low, high


def join_hue(hue, low, high):
    """Inverse of `split_hue` for any real hue -> float32 3xHxW RGB."""
    rgb = np.empty((3, *hue.shape), np.float32)
    for channel, phase in enumerate((0, 4, 2)):                      # red peaks at hue 0, green at 2, blue at 4
        turns = (hue + phase) / 6
        turns -= np.floor(turns)
        wave = abs(6 * turns - 3) - 1                                # a triangle wave, to be cut off at both ends
        rgb[channel] = wave.clip(0, 1) * (high - low) + low
    return rgb


def jpeg(image, coarseness, share):
    """uint8 HxWx3 through JPEG, then blended with the input, of which 1 - share remains -> uint8 HxWx3.

    The quantisation steps are `coarseness` times the standard ones; colour has half the resolution.
    """
    quality = 100 - 50 * coarseness
    if coarseness > 1:
        quality = 50 / coarseness
    quality = max(1, round(quality))
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    decoded = np.array(Image.open(file))
    return fade(image, decoded, share)


# ---- Tools: moving and blurring -------------------------------------------------------------------------------------

def whole_and_rest(positions):
    """Real positions -> the whole number at or below each (int), and the rest, 0 to 1 (float64)."""
    whole = np.floor(positions)
    return whole.astype(np.intp), positions - whole


def between(a, b, t):
    """Equals a + t * (b - a) for float32 arrays, but is written over b, since new arrays are what takes time.

    It is not (1 - t) * a + t * b, so that flat areas stay exact.
    """
    b -= a
    b *= np.float32(t)
    b += a
    return b


def interpolate(image, positions, axis, cubic):
    """`resample` along one axis only, -2 (rows) or -1 (columns)."""
    low, t = whole_and_rest(positions)
    t = np.float32(t)
    if axis == -2:
        t = t[:, None]

    def tap(k):
        return image.take(low + k, axis, mode="clip")                # stops at the border

    if not cubic:
        return between(tap(0), tap(1), t)

    t2 = t * t
    t3 = t2 * t
    out = tap(-1) * (-0.75 * (t3 - 2 * t2 + t))
    out += tap(0) * (1.25 * t3 - 2.25 * t2 + 1)
    out += tap(1) * (-1.25 * t3 + 1.5 * t2 + 0.75 * t)
    out += tap(2) * (-0.75 * (t2 - t3))
    return out


def resample(image, rows, cols, cubic=False):
    """Value of image ([3x]HxW) at every pair of the real positions rows (h,) and cols (w,) -> float32 [3x]hxw.

    Positions are in pixels, 0 at the centre of the first one, and stop at the border. Neighbours are weighted
    linearly or, if cubic, by Keys' kernel with slope -0.75. There is no anti-aliasing: 2 or 4 taps at any scale.
    """
    image = image.astype(np.float32, copy=False)
    image = interpolate(image, rows, -2, cubic)
    return interpolate(image, cols, -1, cubic)


def resize(image, height, width, cubic=False):
    """Resample image ([3x]HxW) to height x width, outer edges aligned -> float32."""
    old_height, old_width = image.shape[-2:]
    rows = (np.arange(height) + 0.5) * old_height / height - 0.5
    cols = (np.arange(width) + 0.5) * old_width / width - 0.5
    return resample(image, rows, cols, cubic)


def warp(planes, dy, dx):
    """Bilinear gather: out(y, x) = planes(y + dy, x + dx), mirrored at the borders, rounded to whole levels.

    planes: float32 3xHxW. dy, dx: HxW, in pixels. Returns float32 3xHxW. The four neighbours of a position are read
    from planes with mirrored margins, laid out flat so that one index finds a pixel.
    """
    H, W = planes.shape[1:]
    top = int(abs(dy).max()) + 2                                     # margins that no displacement leaves
    left = int(abs(dx).max()) + 2
    margins = ((0, 0), (top, top), (left, left))
    padded = np.pad(planes, margins, mode="reflect")
    below = padded.shape[2]                                          # steps from a pixel to the one below it
    padded = padded.reshape(3, -1)

    rows = np.arange(top, top + H)[:, None]
    cols = np.arange(left, left + W)
    y, ty = whole_and_rest(rows + dy)
    x, tx = whole_and_rest(cols + dx)
    corner = y * below + x

    def row(start):
        here = padded.take(start, 1)
        right = padded.take(start + 1, 1)
        return between(here, right, tx)

    out = between(row(corner), row(corner + below), ty)
    return np.rint(out)


def correlate(image, kernel):
    """Weighted sum of shifted copies of image ([3x]HxW), mirrored at the borders -> float32.

    kernel has odd sides; its entry at the centre + (i, j) weighs image(y + i, x + j). Zeros cost nothing, which is
    what makes long thin kernels cheap.
    """
    H, W = image.shape[-2:]
    reach = [(side // 2, side // 2) for side in kernel.shape]
    margins = [(0, 0)] * (image.ndim - 2) + reach
    padded = np.pad(image.astype(np.float32), margins, mode="reflect")
    out = np.zeros(image.shape, np.float32)
    term = np.empty_like(out)                                        # one for all: new arrays are what takes time
    for i, j in np.argwhere(kernel):
        weight = np.float32(kernel[i, j])
        shifted = padded[..., i:i + H, j:j + W]
        np.multiply(shifted, weight, out=term)
        out += term
    return out


def blur(image, weights):
    """Correlate with the same weights (odd in number) along both axes: [3x]HxW -> float32."""
    vertical = correlate(image, weights[:, None])
    return correlate(vertical, weights[None])


def gaussian(sigma, radius):
    """Samples of a Gaussian at -radius..radius, summing to 1: float64 (2 radius + 1,)."""
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / weights.sum()


def splat(dy, dx, weights):
    """Kernel for `correlate` with weights at real offsets dy, dx (n,), each shared among the 4 pixels around it.

    weights: (n,), or one number for all. Returns float64 with odd sides, summing to 1.
    """
    furthest = max(abs(dy).max(), abs(dx).max())
    radius = math.ceil(furthest) + 1
    pixels = np.arange(-radius, radius + 1)[:, None]
    row_share = np.maximum(0, 1 - abs(pixels - dy))                  # of each pixel in each offset
    col_share = np.maximum(0, 1 - abs(pixels - dx))
    kernel = row_share * weights @ col_share.T
    return kernel / kernel.sum()


# ---- Tools: random textures -----------------------------------------------------------------------------------------

def specks(rng, height, width, scale, density, beta):
    """Random bright specks, the raw material of snow and rain -> float32 HxW of whole grey levels.

    A grid of `scale` times the image's size has each cell lit with probability `density`, at 255 (0.5 + |b - 0.5|)
    with b from the U-shaped Beta(.5, .5). An 8x8 map of Beta(1, beta) gates it: the smaller beta, the more even the
    fall. Both enlargements are cubic.
    """
    h = int(height * scale)
    w = int(width * scale)
    # Closed forms of the two Beta draws: they take one uniform number each, so the stream never depends on a value.
    angle = np.pi * rng.random((h, w))
    level = 127.5 + 127.5 * abs(np.cos(angle))
    lit = rng.random((h, w)) < density
    gate = 1 - rng.random((8, 8)) ** (1 / beta)
    gate = resize(gate, h, w, cubic=True).clip(0, 1)
    grid = lit * level * gate
    grid = resize(grid, height, width, cubic=True)
    return np.rint(grid.clip(0, 255))


def fractal_noise(rng, height, width, exponent):
    """Cloud-like noise: random spectrum times frequency**exponent, stretched to exactly 0..1 -> float32 HxW."""
    rows = np.arange(height)
    cols = np.arange(width)
    fy = np.minimum(rows, height - rows)[:, None]
    fx = np.minimum(cols, width - cols)
    frequency = np.sqrt(fy ** 2.0 + fx ** 2.0)
    frequency[0, 0] = np.inf                                         # inf ** negative = 0: no constant term

    radius = rng.random((height, width))
    phase = 2 * np.pi * rng.random((height, width))
    real = radius * np.cos(phase) * frequency ** exponent
    imaginary = real * np.sin(phase)                                 # real, not radius, as in the benchmark
    noise = np.fft.ifft2(real + 1j * imaginary).real
    noise -= noise.min()
    return (noise / noise.max()).astype(np.float32)


# ---- The corruptions: f(uint8 HxWx3 image, numpy Generator, strength > 0) -> new uint8 HxWx3 ------------------------

# Weather

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
    coarseness = rng.uniform(0.6, 0.8)
    flake = rng.uniform(0.4, 0.8)
    speed = rng.uniform(0.01, 0.015)
    beta = 1 - rng.uniform(0.3, 0.9)
    sigma = np.clip(L * rng.uniform(1e-4, 1e-3), 0.5, 3.75)

    flakes = specks(rng, H, W, 1 - coarseness, 0.35 * strength, beta)
    radius = max(5, int(3.3 * sigma)) // 2
    flakes = np.rint(blur(flakes, gaussian(sigma, radius)))
    length = int(speed * L) | 1                                      # odd, for a kernel with a middle
    fall = np.linspace(1, 0, length)
    fall /= fall.sum()
    flakes = np.rint(correlate(flakes, fall[:, None]))

    light = np.arange(256) / 255
    curve = np.floor(255 * light ** (3 - 2 * flake))
    curve *= 6 - 5 * flake                                           # not clipped: this burns flakes to pure white
    flakes = curve.astype(np.float32)[flakes.astype(np.uint8)]
    out = to_planes(image)
    for _ in range(layers):
        out += (0.1 + 20 * speed) * flakes
        out = np.maximum(out, (1 + 20 * speed) * flakes)
        out = np.floor(np.minimum(out, 255))
    return from_planes(out)


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
    thickness = rng.uniform(0.1, 0.2)

    cloud = 231.12 * (0.8 + 0.4 * cloud)
    cloud += resize(drift, H, W, cubic=True)
    cloud = cloud.clip(0, 255)
    veil = resize(veil, H, W, cubic=True)
    veil = truncate(np.rint(veil))
    levels = np.arange(256)
    opacity = 0.6419 * (0.8318 + 0.3 * levels / 255) ** 0.9          # of each level of the veil
    clear = (1 - opacity) ** strength
    clear = clear.astype(np.float32)[veil]
    out = truncate(cloud + clear * (to_planes(image) - cloud))

    side = int(W // 3 * thickness)
    disc_opacity = 1 - (1 - 0.08 * thickness) ** strength
    out = add_discs(out, rng, side, disc_opacity)

    taps = max(side, 10) // 10
    before = taps // 2 * strength
    after = (taps - 1) // 2 * strength
    reach = math.ceil(before)
    offsets = np.arange(-reach, reach + 1)
    inside = np.minimum(before + offsets, after - offsets)
    box = np.clip(1 + inside, 0, 1) / (1 + before + after)
    return from_planes(np.rint(blur(out, box)))


def add_discs(planes, rng, side, opacity):
    """Blend white discs of diameter `side` px into planes -> uint8 3xHxW.

    Around the centre first, then ever more of them in ever wider boxes; none if side < 10. Each disc rounds to whole
    levels, so that a faint one leaves what is already bright untouched.
    """
    H, W = planes.shape[1:]
    radius = side // 2
    span = np.arange(-radius, radius + 1)
    disc = span[:, None] ** 2 + span ** 2 <= radius ** 2
    dy, dx = np.nonzero(disc)
    framed = np.pad(planes, ((0, 0), (1, 1), (1, 1)))                # the frame takes what falls outside
    left = W // 2 - 2 * side
    top = H // 2 - side
    count = side // 10
    while count and (left > -side or top > -side):
        xs = rng.integers(left, W - left - 2 * radius + 1, count)
        ys = rng.integers(top, H - top - 2 * radius + 1, count)
        for x, y in zip(xs, ys):
            rows = 1 + np.clip(y + dy, -1, H)
            cols = 1 + np.clip(x + dx, -1, W)
            seen = framed[:, rows, cols]
            whiter = seen + (255 - seen) * opacity
            framed[:, rows, cols] = np.rint(whiter)
        left -= max(1, 3 * side * W // (H + W))
        top -= max(1, 3 * side * H // (H + W))
        count += side // 10
    return framed[:, 1:-1, 1:-1]


def rain(image, rng, strength=1.0):
    """Streaks 5-10 % of L long and up to 15 degrees off the vertical, merging into a light grey veil (level 240).

    Drops 2 px wide are drawn out along the fall, brightest at the lower end, and blended in 1 to 3 times. Accidents:
    the layers are identical, as in snow, so severity hangs on their number times the density and varies widely;
    and the colour meant to be random is 240 in practice.
    Strength multiplies the share of lit cells (0.03-0.14): how hard it rains.
    """
    H, W = image.shape[:2]
    layers = rng.integers(1, 4)
    coarseness = rng.uniform(0.4, 0.5)
    angle = np.radians(rng.uniform(-15, 15))
    speed = rng.uniform(0.05, 0.1)
    density = rng.uniform(0.03, 0.14)
    beta = 1 - rng.uniform(0.8, 1)

    drops = specks(rng, H, W, 1 - coarseness, density * strength, beta)
    length = int(speed * max(H, W)) | 1
    along = np.arange(length) - length // 2
    dy = along * np.cos(angle)
    dx = along * np.sin(angle)
    streak = splat(dy, dx, np.linspace(1, 0, length))
    drops = np.rint(correlate(drops, streak))

    alpha = 1.3 / 255 * drops
    alpha = alpha.clip(0, 1)
    out = to_planes(image)
    for _ in range(layers):
        out = np.floor(out + alpha * (240 - out))
    return from_planes(out)


# Sensor

def gauss_noise(image, rng, strength=1.0):
    """Normal noise, independent for each pixel and channel, with a standard deviation of 15.8-16.1 grey levels.

    Accident: the original names a narrow range of variances, 250 to 260, so every image is equally noisy.
    Strength multiplies the standard deviation.
    """
    variance = rng.uniform(250, 260)
    sigma = strength * math.sqrt(variance)
    noise = rng.standard_normal(image.shape)
    return truncate(image + sigma * noise)


def ISO_noise(image, rng, strength=1.0):
    """A sensor at high gain: photon noise on the lightness, normal noise on the hue (HLS).

    Lightness moves towards white by P/255 of what is left, with P Poisson of mean 255 q std(lightness), about 30-50.
    Accidents: the mean of P stays in, which adds a haze of 12-19 %; and the hue noise, 100-145 degrees, is nearly
    a random hue, so that colours average to grey. Noise grows with the image's contrast; a flat grey one stays clean.
    Strength multiplies both the hue noise and P, whose draws stay the same.
    """
    shift = rng.uniform(0.4, 0.5)
    gain = rng.uniform(0.7, 0.8)
    hue, low, high = split_hue(to_planes(image))
    light = (low + high) / 2                                         # 0..255, so that greys survive exactly
    room = 255 - abs(2 * light - 255)                                # the largest chroma at this lightness
    saturation = (high - low) / np.maximum(room, 1e-6)

    mean = gain * light.std(dtype=np.float64)
    photons = rng.poisson(mean, light.shape).astype(np.float32)
    hue += 6 * shift * gain * strength * rng.standard_normal(hue.shape)
    light += strength * photons * (1 - light / 255)
    light = np.minimum(light, 255)
    room = 255 - abs(2 * light - 255)
    half_chroma = saturation * room / 2
    rgb = join_hue(hue, light - half_chroma, light + half_chroma)
    return from_planes(rgb)


def impulse_noise(image, rng, strength=1.0):
    """Over-exposure: every sample is multiplied by one gain of 1.4-1.5 and clipped.

    Accident: salt-and-pepper noise was surely meant, but the noise field of the original holds a single number.
    Strength multiplies the exposure in stops: gain ** strength.
    """
    gain = rng.uniform(1.4, 1.5) ** strength
    return truncate(np.arange(256) * gain)[image]                    # a table of the 256 levels


# Blur

def resampling_blur(image, rng, strength=1.0):
    """An image enlarged from a quarter of its size: bilinear down, bilinear up. Nothing is random here.

    Accident: the way down takes 2 taps per axis without smoothing first, so the blur comes with aliasing.
    Strength up to 1 fades from the input to this result; beyond 1 it multiplies the factor of 4.
    """
    H, W = image.shape[:2]
    factor = 4 * max(1, strength)
    h = max(1, int(H / factor))
    w = max(1, int(W / factor))
    small = np.rint(resize(to_planes(image), h, w))
    large = np.rint(resize(small, H, W))
    return fade(image, from_planes(large), min(1, strength))


def motion_blur(image, rng, strength=1.0):
    """A straight camera shake: the mean of the pixels along a segment drawn in a window of 3 to 35 px.

    Both ends are random in that window, which makes severity very uneven (2 to 35 taps, median 8). Accident: the
    segment is not centred, so the image also shifts, by 4.9 px on average, and leaves its mask behind.
    Strength multiplies the positions along the segment, hence length and shift; gaps that open beyond 1 are filled.
    """
    side = 3 + 2 * int(rng.integers(17))
    cells = side * side
    first = int(rng.integers(cells))
    last = (first + int(rng.integers(1, cells))) % cells             # any other cell of the window
    start = np.array(divmod(first, side)) - side // 2
    stop = np.array(divmod(last, side)) - side // 2

    steps = abs(stop - start).max()
    along = np.arange(steps + 1)[:, None]
    taps = np.rint(start + (stop - start) * along / steps)           # a line one pixel wide: (steps + 1, 2)
    stretch = max(strength, 1)
    fill = np.linspace(1 - stretch, stretch - 1, math.ceil(stretch)) / 2
    points = strength * taps + fill[:, None, None] * (stop - start) / steps
    dy, dx = points.reshape(-1, 2).T
    kernel = splat(dy, dx, 1)
    out = correlate(to_planes(image), kernel)
    return from_planes(np.rint(out))


def zoom_blur(image, rng, strength=1.0):
    """Zooming in during the exposure: the mean of the image and of its enlargements by 1, 1+d, 1+2d, ... below M.

    d is U(.05, .07) and M is U(1, 1.33): up to 6 ghosts, up to 50 px apart from their origin at the edge of a 640 px
    image. Accidents: the sharp image counts twice, and 18 % of the draws have no ghost and return the input.
    Strength multiplies the zoom in excess of 1, the number of ghosts stays.
    """
    H, W = image.shape[:2]
    furthest = rng.uniform(1, 1.33)
    step = rng.uniform(0.05, 0.07)
    ghosts = np.arange(0, furthest - 1, step)[1:]
    middle_y = (H - 1) / 2
    middle_x = (W - 1) / 2
    from_middle_y = np.arange(H) - middle_y
    from_middle_x = np.arange(W) - middle_x
    sharp = to_planes(image)
    total = 2 * sharp
    for zoom in 1 + strength * ghosts:
        rows = middle_y + from_middle_y / zoom
        cols = middle_x + from_middle_x / zoom
        total += resample(sharp, rows, cols)
    return from_planes(total / (2 + len(ghosts)))


# Colour and file

def color_jitter(image, rng, strength=1.0):
    """Brightness x U(.3, 1.7), contrast x U(.7, 1.3), saturation x U(.3, 1.7) and hue + U(-.7, .7) turns, in any order.

    Contrast pivots on the mean grey, saturation on the pixel's grey, hue turns in HSV. Accident: hue should stop at
    half a turn, the range goes on to .7 and wraps, so large shifts are twice as likely and strong recolouring is the
    norm. The original rounds hue to 2 degrees; here it stays continuous.
    Strength is the exponent of the three factors, and multiplies the wrapped hue shift, at most half a turn.
    """
    brightness = rng.uniform(0.3, 1.7) ** strength
    contrast = rng.uniform(0.7, 1.3) ** strength
    saturation = rng.uniform(0.3, 1.7) ** strength
    turn = rng.uniform(-0.7, 0.7)
    turn = np.clip((turn - round(turn)) * strength, -0.5, 0.5)
    out = to_planes(image)
    for step in rng.permutation(4):
        if step == 0:
            out *= brightness
        elif step == 3:
            hue, low, high = split_hue(out)
            out = join_hue(hue + np.float32(6 * turn), low, high)
        else:
            gray = 0.299 * out[0] + 0.587 * out[1] + 0.114 * out[2]
            if step == 1:
                mean = float(gray.mean(dtype=np.float64))
                out *= contrast
                out += (1 - contrast) * mean
            else:
                out = between(gray, out, saturation)
        out = out.clip(0, 255)
        out = np.floor(out) if step < 2 else np.rint(out)            # as the original casts and rounds
    return from_planes(out)


def compression(image, rng, strength=1.0):
    """JPEG at quality 5 to 10 with halved colour resolution: 8 px blocks, washed-out colours.

    Accident: red and blue are swapped on the way in and out, so the encoder takes red for blue and keeps it worst.
    Strength multiplies the encoder's quantisation steps, which are 50/quality times the standard ones; quality is
    whole, so below 0.25 the result also fades into the input.
    """
    coarseness = strength * 50 / rng.integers(5, 11)
    swapped = np.ascontiguousarray(image[..., ::-1])
    out = jpeg(swapped, coarseness, min(1, 4 * strength))
    return out[..., ::-1].copy()


# Geometry

def elastic_transform(image, rng, strength=1.0):
    """A tilted, rippled image: an affine jitter, then a smooth random displacement; 5.5 px in all on average.

    Affine: three points a third of the short side around the centre move by U(-5, 5) px per axis, less when the
    short side is below 90 px, and the plane with them. Local: white noise blurred with sigma 10 px, 1.6 px per axis.
    Accidents: the centre's x and y are swapped, so the jitter turns about another point unless the image is square;
    two interpolations in a row blur it; and masks do not move along.
    Strength multiplies both displacements.
    """
    H, W = image.shape[:2]
    r = min(H, W) // 3
    x = H // 2                                                       # swapped, see above
    y = W // 2
    corners = np.array([
        (x + r, y + r, 1),
        (x + r, y - r, 1),
        (x - r, y - r, 1),
    ])
    reach = strength * min(5, r / 6)
    moves = reach * rng.uniform(-1, 1, (3, 2))
    # Interpolating the three displacements differs from inverting the map that moves the points only to second
    # order in moves / r (the sign is random anyway), and unlike an inverse it exists for any strength.
    (xx, xy), (yx, yy), (x0, y0) = np.linalg.solve(corners, moves)
    rows = np.arange(H)
    cols = np.arange(W)
    dy = yy * rows[:, None] + (xy * cols + y0)
    dx = yx * rows[:, None] + (xx * cols + x0)
    tilted = warp(to_planes(image), dy, dx)

    # Nothing in the ripple is finer than 10 px: draw and blur it on a grid of one cell for 4x4 px.
    h = math.ceil(H / 4)
    w = math.ceil(W / 4)
    ripple = rng.uniform(-1, 1, (2, h, w))
    ripple *= strength * 100 / 4                                     # the mean of 16 px varies 4 times less than one
    ripple = blur(ripple, gaussian(10 / 4, 10))
    ripple = resize(ripple, 4 * h, 4 * w, cubic=True)
    dy, dx = ripple[:, :H, :W]
    return from_planes(warp(tilted, dy, dx))


def frosted_glass_blur(image, rng, strength=1.0):
    """Seen through frosted glass: each pixel takes the colour of a random one within 3 px on either axis.

    Accident: this is one pass of gathering from the clean image and no blur at all, so fine detail grows sevenfold
    instead of vanishing and the histogram stays what it was.
    Strength multiplies the reach; a fractional reach gives the outermost whole step a smaller chance.
    """
    H, W = image.shape[:2]
    reach = np.float32(3 * strength)
    draws = 2 * rng.random((2, H, W), dtype=np.float32) - 1
    moves = np.floor(draws * (reach + 0.5) + 0.5)
    dy, dx = moves.astype(np.intp)
    y = np.arange(H)[:, None] + dy
    x = np.arange(W) + dx
    return image[y.clip(0, H - 1), x.clip(0, W - 1)]


# Exposure

def brightness(image, rng, strength=1.0):
    """Under-exposure: every sample times one factor of 0.6-0.8. Accident: the name promises both ways, it only darkens.

    Strength multiplies the exposure in stops: factor ** strength.
    """
    factor = rng.uniform(0.6, 0.8) ** strength
    return truncate(np.arange(256) * factor)[image]


def contrast(image, rng, strength=1.0):
    """Contrast raised 1.6-1.7 times about level 128; two samples in five end at 0 or 255.

    Accident: it is never lowered, and the pivot is 128 rather than the image's mean, so dark images get darker still.
    Strength is the exponent of the factor.
    """
    factor = rng.uniform(1.6, 1.7) ** strength
    from_pivot = np.arange(256) - 128
    return truncate(from_pivot * factor + 128)[image]


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
    depth = rng.uniform(0.22, 0.7)
    stops = rng.uniform(3, 4)
    warm = rng.uniform(1, 1.3)
    coarseness = 50 / rng.uniform(15, 30)
    lamp = np.float32([0.5, 0.42, 0.33])
    lamp *= rng.uniform(0.7, 1.1)

    scene = (np.float32(image) / 255) ** 2
    shine = math.exp(-strength * depth)
    light = shine * scene + (1 - shine) * lamp
    light *= 2 ** (-strength * stops)

    noise = strength * rng.standard_normal((2, *image.shape), np.float32)
    photons = 400 * light
    noise = np.sqrt(photons) * noise[0] + 2 * noise[1]
    light += noise / 400

    gain = 2 ** (strength * stops / 2)
    white = np.float32([warm, 1, 1 / warm])
    light *= gain * white ** strength
    light = np.sqrt(light.clip(0, 1))
    share = min(1, 4 * strength)
    return jpeg(truncate(255 * light), strength * coarseness, share)


def underwater(image, rng, strength=1.0):
    """A diver's camera in turbid water, not in the benchmark: red is swallowed, all else veiled, blurred and dimmed.

    Beer's law for each channel over 1-2 units of distance, with absorption 0.9, 0.35, 0.3 a unit; the light that is
    scattered into the view is blue-green; scattering on the way blurs by 0.6-1.2 px; waves above throw bright and dark
    bands of 25 %. Strength multiplies the distance, the blur and the depth of the bands.
    """
    H, W = image.shape[:2]
    distance = rng.uniform(1, 2)
    veil = np.float32([0.1, 0.45, 0.5])
    veil *= rng.uniform(0.7, 1.1)
    sigma = strength * rng.uniform(0.6, 1.2)
    angle = rng.uniform(0, math.pi)
    wave = rng.uniform(0.05, 0.2) * max(H, W)

    down = np.arange(H)[:, None] * math.sin(angle)
    across = np.arange(W) * math.cos(angle)
    ripple = 0.3 * wave * fractal_noise(rng, H, W, -2)
    phase = 2 * math.pi / wave * (down + across + ripple)
    swell = np.sin(phase).astype(np.float32)
    bands = 1 + 0.25 * strength * swell

    absorption = np.float32([0.9, 0.35, 0.3])
    transmission = np.exp(-strength * distance * absorption)
    veil = 255 * veil * (1 - np.exp(-0.6 * strength * distance))
    out = to_planes(image) * bands.clip(0)
    out *= transmission[:, None, None]
    out += veil[:, None, None]
    weights = gaussian(max(sigma, 1e-3), 6)
    return from_planes(blur(out, weights))


# ---- One door to all of them ----------------------------------------------------------------------------------------

# The benchmark's functions by name, in its order. Training, evaluation, prepared files and the sheet take all of these:
# to add a corruption, write its function above and name it here.
CORRUPTIONS = {function.__name__: function for function in (
    snow,
    fog,
    rain,
    gauss_noise,
    ISO_noise,
    impulse_noise,
    resampling_blur,
    motion_blur,
    zoom_blur,
    color_jitter,
    compression,
    elastic_transform,
    frosted_glass_blur,
    brightness,
    contrast,
)}
# These can be chosen by name, and enter no average.
OTHERS = dict(night=night, underwater=underwater)


def generator(*seeds):
    """The random generator of some whole numbers of any size, the first of which may be negative."""
    first, *others = map(int, seeds)
    if first < 0:
        others.append(zlib.crc32(b"negative"))
    return np.random.default_rng([abs(first), *others])


def corrupt(image, name, seed=0, strength=1.0):
    """Degrade an image; equal arguments give equal pixels.

    image: uint8 HxWx3 RGB, at least 16x16, left unmodified. name: a key of CORRUPTIONS or OTHERS. seed: a whole
    number of any size. strength: 0 (an exact copy) to 10; 1 is the benchmark. Returns a new uint8 HxWx3 array.
    Raises ValueError, in one line, for anything else.
    """
    functions = CORRUPTIONS | OTHERS
    if name not in list(functions):
        raise ValueError(f"unknown corruption {name!r}; choose one of: {', '.join(functions)}")
    kind = getattr(image, "dtype", type(image).__name__)
    shape = np.shape(image)
    if kind != np.uint8 or shape[2:] != (3,):
        raise ValueError(f"image is {kind} {shape}; pass a numpy array of dtype uint8, (height, width, 3), RGB")
    H, W = image.shape[:2]
    if min(H, W) < 16:
        raise ValueError(f"image is {W}x{H} pixels; enlarge it so that both sides reach 16")
    if not isinstance(strength, numbers.Real) or not 0 <= strength <= 10:        # NaN fails this too
        raise ValueError(f"strength is {strength!r}; pass a number from 0 (no change) to 10, 1 is the benchmark")
    if not isinstance(seed, numbers.Integral):
        raise ValueError(f"seed is {seed!r}; pass a whole number")
    if strength == 0:
        return image.copy()
    rng = generator(seed, zlib.crc32(name.encode()))
    image = np.ascontiguousarray(image)
    return functions[name](image, rng, float(strength))


# ---- Contact sheet --------------------------------------------------------------------------------------------------

def contact_sheet(image, seed=0, strength=1.0, size=240):
    """The clear image (uint8 HxWx3) and all its corruptions, labelled, on a square grid or nearly so -> PIL image.

    The image is first shrunk to a long side of 640 px, because most lengths are absolute and the benchmark's look is
    known at that scale. Its corrupted copies are then shrunk to a long side of `size` px.
    """
    from assets.sheets import labelled                               # here, so that the functions need no other file

    clear = Image.fromarray(image)
    clear.thumbnail((640, 640), Image.Resampling.LANCZOS)
    tiles = [("clear", clear)]
    for name in CORRUPTIONS:
        corrupted = corrupt(np.asarray(clear), name, seed, strength)
        tiles.append((name, Image.fromarray(corrupted)))
    columns = math.ceil(math.sqrt(len(tiles)))
    return labelled(tiles, columns, size)


def main():
    """Runs the command line; a user's mistake ends in one line and exit code 2."""
    from data import DatasetError, plain_output, read_image, save_png

    plain_output()
    parser = argparse.ArgumentParser(description="Show a photo under the 15 Robust-Seg corruptions on one sheet.")
    parser.add_argument("photo", help="image file, any format Pillow reads")
    parser.add_argument("--out", default="sheet.png", help="where to write the sheet, a PNG (sheet.png)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other draws (0)")
    parser.add_argument("--strength", type=float, default=1.0, help="0 no change, 1 the benchmark, up to 10 (1)")
    parser.add_argument("--size", type=int, default=240, help="long side of a tile in pixels, 32 to 2000 (240)")
    args = parser.parse_args()
    try:
        if not args.out.lower().endswith(".png"):
            raise ValueError(f"--out is {args.out}; the sheet is a PNG, so end its name in .png")
        if not 32 <= args.size <= 2000:
            raise ValueError(f"--size is {args.size}; pass 32 to 2000")
        image = read_image(args.photo)
        sheet = contact_sheet(image, args.seed, args.strength, args.size)
        save_png(sheet, args.out)
    except (DatasetError, ValueError) as error:
        parser.exit(2, f"corruptions.py: {error}\n")
    print(f"{args.out}: {sheet.width}x{sheet.height}, seed {args.seed}, strength {args.strength:g}")


if __name__ == "__main__":
    main()
