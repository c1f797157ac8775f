"""Pages of small images, as the command lines of corruptions.py and data.py draw them (--out, --sheet)."""
import math

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps


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
