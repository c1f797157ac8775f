"""What the command lines of corruptions.py and data.py show: pages of small images, and what a dataset holds."""
import math
from collections import Counter

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

import data
from corruptions import CORRUPTIONS, corrupt


def labelled(tiles, columns, size):
    """One page of Pillow images, given as (label, image): each with a long side of `size` px, its label below."""
    text = max(9, size // 14)
    font = ImageFont.load_default(text)
    tiles = [(label, ImageOps.contain(image, (size, size), Image.Resampling.LANCZOS)) for label, image in tiles]
    cell_w = text + max(tile.width for _, tile in tiles)
    cell_w = max(cell_w, 11 * text)  # room for the longest label
    cell_h = 2 * text + max(tile.height for _, tile in tiles)
    lines = math.ceil(len(tiles) / columns)
    page = Image.new("RGB", (columns * cell_w, lines * cell_h), "white")
    draw = ImageDraw.Draw(page)
    for k, (label, tile) in enumerate(tiles):
        line, column = divmod(k, columns)
        middle = column * cell_w + cell_w // 2
        top = line * cell_h + text // 2
        page.paste(tile, (middle - tile.width // 2, top))
        draw.text((middle, top + tile.height), label, "black", font, anchor="ma")
    return page


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
    """Draws each sample twice: clear with masks and prompts, then degraded, each in the next of the 15 conditions.
    Returns the errors of those that cannot be drawn."""
    tiles = []
    errors = []
    for k, sample in enumerate(samples):
        corruption = data.CONDITIONS[1 + k % len(CORRUPTIONS)]
        try:
            masks = sample.masks()
            clear = draw_prompts(sample.image(), masks, *sample.prompts(masks))
            degraded = Image.fromarray(sample.image(corruption))
            tiles += (sample.name[-20:], clear), (corruption, degraded)
        except data.SampleError as error:
            errors.append(error)
    if tiles:
        data.save_png(labelled(tiles, columns, tile), path)
    return errors


def describe(dataset, most=200):
    """Prints what a split holds, from at most `most` samples spread over it. Returns the good ones among them."""
    good, sizes, counts, areas, left_out = [], [], [], [], Counter()
    chosen = data.spread(dataset, most)
    progress = data.Progress(f"{dataset.split}: reading", len(chosen))
    for sample in chosen:
        progress.update()
        try:
            masks = sample.masks()
            image = sample.image()
            with data.explained(sample.clear, "cannot be degraded"):
                corrupt(image, "brightness")  # the fastest
        except data.SampleError as error:
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
    left = f"; left out: {data.account(left_out)}" if left_out else ""
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
