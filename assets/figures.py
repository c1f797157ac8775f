"""The figures of train.py and evaluate.py, drawn with Pillow alone.

In this file: axes, which every figure is drawn in; the curve of a training run; scores and gates of a results.json; and
its figures, which follow the paper's.
"""
import dataclasses
import functools
import math
import os
import re
import typing

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

import data
import gara
from data import PROMPTS

DRAWS = 2000  # of the permutation test

# ---------------------------------------------------------------------------------------------------------------------
# Axes: how all figures are drawn.
# A page has twice the size of its figure, in whose pixels lengths are given, and is halved at the end: smooth lines.
# ---------------------------------------------------------------------------------------------------------------------

WIDTH = 2800
GREY, PALE, RED = "#777777", "#dddddd", "#d55e00"
# By Okabe and Ito, for colour-blind readers too; without their yellow, too pale for lines
COLOURS = ["#000000", "#e69f00", "#0072b2", "#009e73", RED, "#56b4e9", "#cc79a7", GREY]
MARKS = ["circle", "square", "triangle", "diamond"]
POLYGONS = {"square": (4, 0), "triangle": (3, 0), "diamond": (4, 45)}  # number of corners, turned by


class Style(typing.NamedTuple):
    """How a series is drawn: its colour, the mark at each point ("" for none), the width of its line (0 for none)."""
    colour: str
    mark: str = ""
    width: int = 4


def styles_of(names, width=4):
    """{name: Style}, no two alike among the first 32."""
    styles = {}
    for k, name in enumerate(names):
        mark = MARKS[(k + k // len(COLOURS)) % len(MARKS)]
        styles[name] = Style(COLOURS[k % len(COLOURS)], mark, width)
    return styles


def shades(count):
    """So many colours from pale to dark blue, for the layers of a model from first to last."""
    pale, dark = np.array([185, 220, 245]), np.array([0, 60, 130])
    colours = []
    for x in np.linspace(0, 1, count):
        red, green, blue = np.int_(pale + x * (dark - pale))
        colours.append(f"#{red:02x}{green:02x}{blue:02x}")
    return colours


def ticks(low, high, most=7):
    """{value: its text}: round numbers, at most `most`, evenly spaced, that enclose low and high."""
    for power in range(-6, 12):
        for base in (1, 2, 5):
            step = base * 10.0 ** power
            first = math.floor(low / step + 1e-9)
            last = max(math.ceil(high / step - 1e-9), first + 1)
            if last - first < most:
                return {step * k: f"{step * k:,.10g}" for k in range(first, last + 1)}
    raise ValueError(f"no round numbers enclose {low} and {high}")


@functools.cache
def font_of(size):
    """Pillow's own font; loading it takes longer than drawing with it."""
    return ImageFont.load_default(size)


def write(page, xy, text, size=34, anchor="la", room=None, ink="black"):
    """Text, cut to `room` pixels. anchor: which of its points lies at xy, as Pillow names them."""
    text = text[:1000].replace("\N{MINUS SIGN}", "-")  # Pillow's font has no minus sign
    font = font_of(size)
    while room and font.getlength(text) > room and len(text) > 4:
        text = text[:-4] + "..."
    ImageDraw.Draw(page).text(xy, text, ink, font, anchor)


def draw_mark(page, x, y, style, r):
    """A mark of radius r in pixels, with a white rim that parts it from others."""
    pen = ImageDraw.Draw(page)
    if style.mark == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), style.colour, "white")
    elif style.mark:
        corners, turn = POLYGONS[style.mark]
        around = (x, y, 1.2 * r)  # through the corners
        pen.regular_polygon(around, corners, turn, style.colour, "white")


@dataclasses.dataclass
class Axes:
    """One panel: series of points between a horizontal and a vertical axis. `draw` puts it on a page."""
    title: str
    series: dict  # {name: [(x, y), ...]}; the Style of each name is given to `draw`
    label: str = ""  # of the horizontal axis
    xticks: dict = None  # {value: text}, as `ticks` makes them; None: round numbers that enclose the data
    yticks: dict = None
    pad: tuple = (0, 0)  # room beyond the first and last tick, horizontally and vertically, in the data's units
    r: float = 11  # radius of the marks
    whiskers: list = dataclasses.field(default_factory=list)  # [(name, (x, y), (x, y)), ...]: intervals, thin lines

    def draw(self, page, frame, styles):
        """Draw within frame (left, top, right, bottom), in pixels of the page. styles: {name: Style}."""
        points = [point for series in self.series.values() for point in series]
        points += [end for _, *ends in self.whiskers for end in ends]
        xs, ys = zip(*points or [(0, 0)])
        self.xticks = self.xticks or ticks(min(xs), max(xs))
        self.yticks = self.yticks or ticks(min(ys), max(ys))

        left, top, right, bottom = frame
        widest = max(font_of(34).getlength(text) for text in self.yticks.values())
        below = 120 if self.label else 75
        self.inner = (left + widest + 30, top + 60, right - 30, bottom - below)

        self.draw_ground(page)
        pen = ImageDraw.Draw(page)
        for name, *ends in self.whiskers:
            pen.line([self.place(*end) for end in ends], styles[name].colour, 3)
        for name, series in self.series.items():
            style = styles[name]
            places = [self.place(*point) for point in series]
            if style.width and len(places) > 1:
                pen.line(places, style.colour, style.width, "curve")
            for x, y in places:
                draw_mark(page, x, y, style, self.r)

    def place(self, x, y):
        """Data -> pixels of the page."""
        left, top, right, bottom = self.inner
        across = share_of(x, self.xticks, self.pad[0])
        up = share_of(y, self.yticks, self.pad[1])
        return left + across * (right - left), bottom - up * (bottom - top)

    def draw_ground(self, page):
        """Title, grid, the ticks' texts and the two axes."""
        left, top, right, bottom = self.inner
        pen = ImageDraw.Draw(page)
        write(page, (left, top - 16), self.title, 38, "ls", right - left)
        for value, text in self.yticks.items():
            _, y = self.place(0, value)
            pen.line((left, y, right, y), PALE, 2)
            write(page, (left - 14, y), text, anchor="rm")
        written = 0  # up to this x; of texts that would touch each other, only some are written
        for value, text in self.xticks.items():
            x, _ = self.place(value, 0)
            pen.line((x, top, x, bottom), PALE, 2)
            half = font_of(34).getlength(text) / 2
            if x - half > written:
                write(page, (x, bottom + 14), text, anchor="ma")
                written = x + half + 12
        corners = (left, top, left, bottom, right, bottom)
        pen.line(corners, "black", 3)
        middle = (left + right) / 2
        write(page, (middle, bottom + 62), self.label, anchor="ma", room=right - left)


def share_of(value, ticks, pad):
    """How far it lies between the first and the last tick, with room beyond them: 0 to 1."""
    low = min(ticks) - pad
    high = max(ticks) + pad
    return (value - low) / (high - low)


def start_page(title, about, height, width=WIDTH):
    """A white page with a title and, in grey, what it shows: (page, the y below them)."""
    page = Image.new("RGB", (width, height), "white")
    room = width - 80
    write(page, (40, 24), title, 48, room=room)
    write(page, (40, 90), about, 34, room=room, ink=GREY)
    return page, 160


def draw_legend(page, y, styles, columns=5):
    """Marks, lines and names. Returns the y below them."""
    width = (page.width - 40) // columns
    for k, (name, style) in enumerate(styles.items()):
        row, column = divmod(k, columns)
        left = 40 + column * width
        middle = y + 22 + 52 * row
        if style.width:
            ImageDraw.Draw(page).line((left, middle, left + 52, middle), style.colour, style.width)
        draw_mark(page, left + 26, middle, style, 14)
        write(page, (left + 66, middle), name, 36, "lm", width - 90)
    return y + 70 + 52 * row


def save_page(page, bottom, path):
    """Cut the page off below `bottom`, halve it and write it as a PNG. Returns the path."""
    part = page.crop((0, 0, page.width, round(bottom)))
    data.save_png(part.reduce(2), path)
    return path


def draw_figure(path, title, about, panels, styles, columns=2, height=470, notes=()):
    """A figure of panels (Axes) in so many columns, each `height` pixels high, below one legend. Returns the path.

    about: a line below the title. styles: {name: Style}, for the legend in this order. notes: lines at the bottom.
    """
    rows = math.ceil(len(panels) / columns)
    most = 400 + 52 * (len(styles) + len(notes)) + rows * height
    page, top = start_page(title, about, most)
    top = draw_legend(page, top, styles)
    width = (WIDTH - 40) // columns
    for k, panel in enumerate(panels):
        row, column = divmod(k, columns)
        left = 20 + column * width
        upper = top + row * height
        panel.draw(page, (left, upper, left + width, upper + height), styles)
    bottom = top + rows * height + 20
    for note in notes:
        write(page, (40, bottom), note, room=WIDTH - 80, ink=GREY)
        bottom += 52
    return save_page(page, bottom + 20, path)


# ---------------------------------------------------------------------------------------------------------------------
# The curve of a training run, drawn from its log.
# ---------------------------------------------------------------------------------------------------------------------


def draw_training(lines, path):
    """Draw the lines of a training log: loss, IoU in training and validation, and what the gates of each layer do."""
    styles = {"loss": Style(COLOURS[0])}
    for prompt, colour in (("point", COLOURS[2]), ("box", RED)):
        styles[prompt] = Style(colour, width=3)
        styles[f"{prompt} degraded"] = Style(colour, "circle")
        styles[f"{prompt} clear"] = Style(colour, "square")
    series, higher, active = {"loss": []}, {}, {}  # {name: [(step, value), ...]}
    for line in lines:
        values = line | line.get("validation", {})
        for name in styles.keys() & values.keys():
            series.setdefault(name, []).append((line["step"], values[name]))
        for k, share in enumerate(line.get("higher", ())):
            higher.setdefault(f"layer {k}", []).append((line["step"], share))
            active.setdefault(f"layer {k}", []).append((line["step"], line["active"][k]))
    styles = {name: style for name, style in styles.items() if name in series}
    styles |= {name: Style(shade, width=3) for name, shade in zip(higher, shades(len(higher)))}

    shares = [share for points in higher.values() for _, share in points]
    xticks = ticks(0, max([1] + [line["step"] for line in lines]))
    panels = [Axes("training loss", {"loss": series.pop("loss")}, "step", xticks),
              Axes("IoU: training (lines), validation (marks)", series, "step", xticks)]
    if higher:
        panels += [Axes("share of images in the higher-rank set", higher, "step", xticks, ticks(0, max(1, *shares))),
                   Axes("open components, mean over images", active, "step", xticks)]
    folder = os.path.dirname(path).encode(errors="replace").decode()  # a name need not be UTF-8
    draw_figure(path, "Training", folder, panels, styles, height=640)


# ---------------------------------------------------------------------------------------------------------------------
# Scores and gates, from results.json.
# ---------------------------------------------------------------------------------------------------------------------


def scores_of(image, model, conditions):
    """A model's scores on an image: (prompts, conditions, masks, metrics)."""
    scores = image["scores"][model]
    by_prompt = []
    for prompt in PROMPTS:
        by_prompt.append([scores[condition][prompt] for condition in conditions])
    return np.array(by_prompt)


def gated_models(results):
    """The models whose gates were recorded: LoRA's are always open."""
    gated = gara.METHODS.keys() - {"lora"}
    return [model for model, about in results["models"].items() if about["method"] in gated]


def unpack_gates(results, model, condition):
    """A model's gates in a condition: of each layer (vectors bool (images, decisions, components), spaces (images,
    decisions)). A layer decides once for an image, or once for each window."""
    ranks = gara.ranks_of(results["models"][model]["options"])
    rank = sum(ranks)
    images = [image["gates"][model][condition] for image in results["images"]]
    layers = []
    for layer in range(len(images[0])):
        codes, spaces = [], []
        for image in images:
            space, code = zip(*image[layer])
            spaces.append(space)
            codes.append([list(bytes.fromhex(digits)) for digits in code])
        codes = np.array(codes, np.uint8)
        spaces = np.array(spaces)
        if codes.shape[2] != math.ceil(rank / 8) or not np.isin(spaces, range(len(ranks))).all():
            raise ValueError(f"the gates of {model} are not of its ranks")
        vectors = np.unpackbits(codes, axis=2, count=rank)
        vectors = vectors.astype(bool)
        layers.append((vectors, spaces))
    return layers


def open_components(results, model):
    """How many components each layer opened for each image in each of the benchmark's conditions: float (conditions,
    images, layers). Where windows decide: the mean over the image's windows."""
    counts = []
    for condition in data.benchmark_conditions(results["conditions"]):
        layers = unpack_gates(results, model, condition)
        counts.append([vectors.sum(2).mean(1) for vectors, _ in layers])  # (layers, images)
    return np.array(counts).swapaxes(1, 2)


def f_statistic(counts):
    """One-way F of counts (conditions, images, layers), grouped by condition: (layers,).

    F = (variance between the conditions' means x images) / (variance within the conditions). 0 where nothing varies,
    infinite where counts vary between conditions only.
    """
    size = counts.shape[1]
    means = counts.mean(1)  # (conditions, layers)
    between = size * means.var(0, ddof=1)
    within = counts.var(1, ddof=1).mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(between > 1e-12, between / within, 0.0)


def permutation_test(counts, draws):
    """p of `f_statistic` without a dependence on the condition: (conditions, images, layers) -> (layers,).

    All conditions show the same images, so the conditions of each image are shuffled within it, `draws` times, seeded.
    p = (1 + draws whose F is not below the observed) / (1 + draws).
    """
    rng = np.random.default_rng(data.seed_of("permutation test"))
    observed = f_statistic(counts) * (1 - 1e-9)  # equal but for rounding counts as equal
    not_below = np.zeros(counts.shape[2])
    for _ in range(draws):
        not_below += f_statistic(rng.permuted(counts, axis=0)) >= observed
    return (1 + not_below) / (1 + draws)


# ---------------------------------------------------------------------------------------------------------------------
# Figures. Each function takes a results.json's content and the path to write to, and returns the path.
# ---------------------------------------------------------------------------------------------------------------------


def draw_all(results, out):
    """Draws every figure that the results allow into folder `out`. Returns the paths."""
    os.makedirs(out, exist_ok=True)
    several = len(data.benchmark_conditions(results["conditions"])) > 1
    paths = []

    def draw(name, figure, *model):
        safe = re.sub(r"[^\w-]", "_", name)[:100]
        while os.path.join(out, f"{safe}.png") in paths:  # two names that differ elsewhere
            safe += "_"
        paths.append(figure(results, *model, os.path.join(out, f"{safe}.png")))

    if several:
        draw("corruptions", figure_corruptions)
    if strengths(results):
        draw("strength", figure_strength)
    for model in gated_models(results):
        draw(f"gates_{model}", figure_gates, model)
        draw(f"open_{model}", figure_open, model)
        if several and len(results["images"]) > 1:
            draw(f"dependence_{model}", figure_dependence, model)
        if strengths(results):
            draw(f"strength_gates_{model}", figure_strength_gates, model)
    if len(temperatures(results)) > 1:
        draw("temperature", figure_temperature)
    return paths


def about_of(results):
    """The line below a figure's title: the data that it shows."""
    masks = {(image["data"], str(image["at"])): len(image["indices"]) for image in results["images"]}
    return f"{', '.join(results['data'])[:70]}, {results['split']} split, {results['backbone']}; " \
           f"images: {len(masks):,}, masks: {sum(masks.values()):,}"


def label_of(condition):
    """A condition's name for readers."""
    return condition.replace("_", " ").replace("degraded", "mean degraded")


def labels_of(results):
    """Those of the benchmark's conditions, for the rows of a map."""
    return [label_of(condition) for condition in data.benchmark_conditions(results["conditions"])]


def percent(results, model, column):
    """Mean IoU of a column as "point fog", and its interval: (IoU, low, high) in percent."""
    mean = results["means"][model][column][0]
    low, high = results["intervals"][model][column][0]
    return 100 * mean, 100 * low, 100 * high


# Figure 2, with the oracles of Section 3.2.

ORACLES = ("Oracle-Corrupt", "Oracle-Instance")


def oracles(images, models, conditions):
    """The paper's oracles: the IoU that the best choice among `models`, known from the truth, would reach.

    Oracle-Corrupt chooses the model that is best in each condition, Oracle-Instance the one that is best on each image
    in each condition. Returns {oracle: {"iou": {"point fog": mean over masks, "point degraded": ...}, "chosen":
    {"point": {model: share of the choices in corruptions}, ...}}}. Of equal models the first is chosen.
    """
    found = {oracle: dict(iou={}, chosen={}) for oracle in ORACLES}
    masks = [len(image["indices"]) for image in images]
    corrupted = np.array(conditions) != "clear"
    for prompt in PROMPTS:
        scores = image_ious(images, models, conditions, prompt)
        means = np.average(scores, axis=2, weights=masks)  # (models, conditions)
        of_images = np.average(scores.max(0), axis=1, weights=masks)  # (conditions,)
        best = (means.max(0), of_images)
        chosen = (means.argmax(0), scores.argmax(0))
        for oracle, ious, choices in zip(ORACLES, best, chosen):
            entry = found[oracle]
            for condition, iou in zip(conditions, ious):
                entry["iou"][f"{prompt} {condition}"] = float(iou)
            if corrupted.any():
                entry["iou"][f"{prompt} degraded"] = float(ious[corrupted].mean())
                choices = choices[corrupted]
                shares = [float((choices == k).mean()) for k in range(len(models))]
                entry["chosen"][prompt] = dict(zip(models, shares))
    return found


def image_ious(images, models, conditions, prompt):
    """Mean IoU over each image's masks: (models, conditions, images)."""
    ious = np.empty((len(models), len(conditions), len(images)))
    for m, model in enumerate(models):
        for i, image in enumerate(images):
            scores = scores_of(image, model, conditions)[PROMPTS.index(prompt)]
            means = scores.mean(1)  # (conditions, metrics)
            ious[m, :, i] = means[:, 0]
    return ious


def figure_corruptions(results, path):
    """Figure 2: a row per condition, a mark per model at its IoU. Of several LoRAs it also shows the oracles: where
    ranks are best for different corruptions, Oracle-Corrupt lies right of them all in "mean degraded"; where they are
    best for different images, Oracle-Instance lies further right still."""
    conditions = data.benchmark_conditions(results["conditions"])
    loras = [model for model in results["means"] if results["models"][model]["method"] == "lora"]
    best = oracles(results["images"], loras, conditions) if len(loras) > 1 else {}
    styles = styles_of(results["means"], width=0)
    for oracle, mark in zip(best, ("square", "diamond")):
        styles[oracle] = Style("#000000", mark, 0)

    rows = {-k: condition for k, condition in enumerate([*conditions, "degraded"])}
    step = min(0.2, 0.86 / len(styles))  # between the marks of a row
    panels = []
    for prompt in PROMPTS:
        panel = Axes(f"from {prompt} prompts", {}, "IoU (%), and its 95 % interval", pad=(0, 0.5), r=9)
        for k, name in enumerate(styles):
            points = panel.series[name] = []
            above = ((len(styles) - 1) / 2 - k) * step
            for row, condition in rows.items():
                y = row + above
                column = f"{prompt} {condition}"
                if name in best:
                    iou = 100 * best[name]["iou"][column]
                else:
                    iou, low, high = percent(results, name, column)
                    panel.whiskers.append((name, (low, y), (high, y)))
                points.append((iou, y))
        panel.yticks = {row: label_of(condition) for row, condition in rows.items()}
        panels.append(panel)
    notes = []
    for oracle, entry in best.items():
        shares = []
        for model, share in entry["chosen"]["point"].items():
            shares.append(f"{model} {100 * share:.0f} %")
        notes.append(f"{oracle} chooses, by points: {', '.join(shares)}")
    height = 180 + round(max(60, 16 / step) * len(rows))
    return draw_figure(path, "IoU by corruption", about_of(results), panels, styles, 2, height, notes)


# Robustness: the same against the strength of each corruption. Not in the paper.


def strengths(results):
    """[0, 0.5, 1, 2]: the strengths that all corruptions were taken in, 0 being "clear". [] if they tell nothing more
    than the benchmark's own strength."""
    corruptions = data.degraded_conditions(results["conditions"])
    if not corruptions or "clear" not in results["conditions"]:
        return []
    found = [0.0]
    for condition in results["conditions"]:
        name, strength = data.name_and_strength(condition)
        wanted = {at_strength(corruption, strength) for corruption in corruptions}
        if name == corruptions[0] and wanted.issubset(results["conditions"]):
            found.append(strength)
    return sorted(found) if len(found) > 2 else []


def at_strength(corruption, strength):
    """The condition's name: "clear", "fog" or "fog@0.5"."""
    return {0: "clear", 1: corruption}.get(strength, f"{corruption}@{strength:g}")


def draw_by_strength(results, title, values_of, styles, path):
    """A panel per corruption and one for their mean, a line per name in styles. values_of(condition): a value for each
    of these names."""
    corruptions = data.degraded_conditions(results["conditions"])
    taken = strengths(results)
    values = np.empty((len(corruptions), len(taken), len(styles)))
    for c, corruption in enumerate(corruptions):
        for s, strength in enumerate(taken):
            values[c, s] = values_of(at_strength(corruption, strength))
    values = np.concatenate([values, values.mean(0, keepdims=True)])

    xticks = {x: f"{x:g}" for x in taken}
    yticks = ticks(values.min(), values.max())
    panels = []
    for corruption, lines in zip([*corruptions, "degraded"], values):
        series = {}
        for name, line in zip(styles, lines.T):
            series[name] = list(zip(taken, line))
        panels.append(Axes(label_of(corruption), series, xticks=xticks, yticks=yticks))
    note = "Horizontal: strength of the corruption (0: clear, 1: the benchmark's)."
    return draw_figure(path, title, about_of(results), panels, styles, 4, 430, [note])


def figure_strength(results, path):
    """IoU from points against the strength of each corruption. The slower a line falls, the better."""
    models = results["means"]

    def ious(condition):
        return [percent(results, model, f"point {condition}")[0] for model in models]

    title = "IoU (%) by strength of the corruption, from points"
    return draw_by_strength(results, title, ious, styles_of(models), path)


def figure_strength_gates(results, model, path):
    """How the gates follow the strength: components of an image's vector that differ from its own clear one, mean over
    images. A thin line per layer, from pale (first) to dark (last); black: the mean over layers."""
    clear = unpack_gates(results, model, "clear")

    def differences(condition):
        layers = []
        for (vectors, _), (own, _) in zip(unpack_gates(results, model, condition), clear):
            differ = vectors != own  # (images, decisions, components)
            layers.append(differ.sum(2).mean())
        return [*layers, np.mean(layers)]

    styles = {}
    for k, shade in enumerate(shades(len(clear))):
        styles[f"layer {k}"] = Style(shade, width=3)
    styles["mean over layers"] = Style("#000000", "circle")
    title = f"Gates of {model}: components that differ from the clear image's"
    return draw_by_strength(results, title, differences, styles, path)


# Figure 5.


def temperatures(results):
    """{temperature: GaRA model}: the most models that differ in nothing else."""
    groups = {}
    for model, about in results["models"].items():
        if about["method"] == "gara":
            options = dict(about["options"])
            temperature = options.pop("temperature")
            groups.setdefault(str(sorted(options.items())), {}).setdefault(temperature, model)
    return max(groups.values(), key=len, default={})


def figure_temperature(results, path):
    """Figure 5: IoU against the temperature that GaRA's Gumbel-Sigmoid was trained with. Flat: it matters little."""
    styles = {}
    if "clear" in results["conditions"]:
        styles["clear"] = Style(COLOURS[2], "circle")
    if data.degraded_conditions(results["conditions"]):
        styles["degraded"] = Style(RED, "square")
    models = dict(sorted(temperatures(results).items()))
    xticks = {math.log(t): f"{t:g}" for t in models}
    panels = []
    for prompt in PROMPTS:
        title = f"from {prompt} prompts: IoU (%), and its 95 % interval"
        panel = Axes(title, {}, "temperature in training", xticks, pad=(0.2, 0))
        for kind in styles:
            points = panel.series[kind] = []
            for x, model in zip(xticks, models.values()):
                iou, low, high = percent(results, model, f"{prompt} {kind}")
                points.append((x, iou))
                panel.whiskers.append((kind, (x, low), (x, high)))
        panels.append(panel)
    return draw_figure(path, "IoU by temperature of GaRA's gates", about_of(results), panels, styles, 2, 800)


# Figure 6, and the appendix's Figures a1 and a2: what the gates do.


def draw_map(page, corner, cell, values, labels=()):
    """A map of cells (width, height) from a corner (left, top): values (rows, columns) from 0, white, to 1, black.
    labels: of the rows, to its left."""
    left, top = corner
    across, down = cell
    rows, columns = values.shape
    width = columns * across
    height = rows * down
    greys = Image.fromarray(np.uint8(255 - np.round(255 * values)))
    cells = greys.resize((width, height), Image.Resampling.NEAREST)
    page.paste(cells, corner)
    frame = (left, top, left + width, top + height)
    ImageDraw.Draw(page).rectangle(frame, None, GREY, 2)
    for row, label in enumerate(labels):
        y = top + down * (row + 0.5)
        write(page, (left - 16, y), label, 32, "rm")


def figure_gates(results, model, path):
    """Figure 6 over all images: a block per layer, a row per condition, a column per component, the lower-rank set
    left of the red line; the darker, the more images have it on. Rows that differ show that the gates answer to the
    corruption, grey that they answer to the image. Right of a block: the share of images in the higher-rank set."""
    low = results["models"][model]["options"].get("rank_low", 0)
    labels = labels_of(results)
    on, higher = [], []
    for condition in data.benchmark_conditions(results["conditions"]):
        layers = unpack_gates(results, model, condition)
        on.append([vectors.mean((0, 1)) for vectors, _ in layers])
        higher.append([spaces.mean() for _, spaces in layers])

    on = np.insert(on, low, 0, axis=2)  # (conditions, layers, components and the red line)
    rows, depth, columns = on.shape

    cell = max(2, 1030 // columns)  # two blocks side by side; at least one pixel of the halved page
    left = 330
    line = 38
    width = cell * columns + 190
    height = line * rows + 110
    about = f"{about_of(results)}. White: never on, black: in all images; percent: images in the higher-rank set"
    most = 300 + math.ceil(depth / 2) * height
    page, top = start_page(f"Gates of {model}", about, most, max(WIDTH, left + 2 * width))
    for layer in range(depth):
        x = left + layer % 2 * width
        y = top + 60 + layer // 2 * height
        write(page, (x, y - 12), f"layer {layer}", 38, "ls")
        draw_map(page, (x, y), (cell, line), on[:, layer], labels if x == left else ())
        if low:
            middle = x + cell * (low + 0.5)
            ImageDraw.Draw(page).line((middle, y, middle, y + line * rows), RED, 6)
            right = x + cell * columns + 110
            for row, shares in enumerate(higher):
                place = (right, y + line * (row + 0.5))
                write(page, place, f"{100 * shares[layer]:.0f} %", 32, "rm")
    return save_page(page, y + height - 70, path)


def figure_open(results, model, path):
    """Figure a1: mean number of open components in each layer (columns) and condition (rows)."""
    means = open_components(results, model).mean(1)  # (conditions, layers)
    rows, layers = means.shape
    title = f"Open components of {model}: mean over images"
    page, top = start_page(title, about_of(results), 300 + 56 * rows)
    left = 330
    top += 60
    width = (WIDTH - left - 40) // layers
    size = min(32, width // 3)
    shade = 0.8 * (means - means.min()) / max(np.ptp(means), 1)
    draw_map(page, (left, top), (width, 56), shade, labels_of(results))
    write(page, (left - 16, top - 14), "layer", anchor="rs")
    for layer in range(layers):
        x = left + width * (layer + 0.5)
        write(page, (x, top - 14), str(layer), anchor="ms")
        for row in range(rows):
            y = top + 56 * (row + 0.5)
            text = f"{means[row, layer]:.1f}"
            ink = "white" if shade[row, layer] > 0.45 else "black"
            write(page, (x, y), text, size, "mm", ink=ink)
    return save_page(page, page.height - 40, path)


def figure_dependence(results, model, path):
    """Figure a2: how strongly each layer's number of open components depends on the corruption: F over the images,
    grouped by condition, and the probability p of such an F were there no dependence."""
    counts = open_components(results, model)
    f = f_statistic(counts)
    p = permutation_test(counts, DRAWS)
    name = "open components"
    limit = "p = 0.05"
    styles = {name: Style(COLOURS[2], "circle", 0), limit: Style(RED)}

    finite = [(layer, value) for layer, value in enumerate(f) if np.isfinite(value)]
    highest = max([value for _, value in finite], default=1)
    left = Axes("F statistic", {name: finite}, "layer")
    left.yticks = ticks(0, highest)
    logs = list(enumerate(np.log10(p)))
    y = math.log10(0.05)
    line = [(-0.5, y), (len(f) - 0.5, y)]
    right = Axes("p", {name: logs, limit: line}, "layer")
    right.yticks = {-k: f"{10.0 ** -k:g}" for k in range(5)}
    for panel in (left, right):
        panel.xticks = {layer: str(layer) for layer in range(len(f))}
        panel.pad = (0.5, 0)

    title = f"{model}: does the number of open components depend on the corruption?"
    note = f"p by {DRAWS:,} permutations of the conditions within each image: at least {1 / (DRAWS + 1):.4f}."
    return draw_figure(path, title, about_of(results), [left, right], styles, 2, 800, [note])


# Figure 4.

TINTS = [ImageColor.getrgb(colour) for colour in COLOURS[1:-1]]


def tinted(image, masks, scale):
    """The image, enlarged, with each object tinted in its colour: a Pillow image."""
    canvas = image.astype(np.float32)
    for k, mask in enumerate(masks):
        tint = np.array(TINTS[k % len(TINTS)])
        pixels = canvas[mask]
        canvas[mask] = 0.35 * pixels + 0.65 * tint
    view = Image.fromarray(np.uint8(canvas))
    size = (round(view.width * scale), round(view.height * scale))
    return view.resize(size, Image.Resampling.BICUBIC)


def figure_samples(rows, models, path, title="Masks from three points"):
    """Figure 4: rows of the degraded image with its points, the truth, each model's masks from the points with their
    mean IoU. An object has one colour throughout its row. rows: see `predict_samples`."""
    tile, pitch = 480, 500
    heads = ["input and points", "truth", *models]
    page, top = start_page(title, "", 220 + len(rows) * (tile + 140), len(heads) * pitch + 60)
    for k, head in enumerate(heads):
        write(page, (40 + k * pitch + tile / 2, 120), head, 40, "ma", tile)
    top += 26
    for row in rows:
        image, truth = row["image"], row["truth"]
        scale = tile / max(image.shape[:2])
        masks = [[], truth]
        texts = [label_of(row["condition"]), f"objects: {len(truth)}"]
        for model in models:
            masks.append(row["predictions"][model])
            texts.append(f"IoU {100 * row['iou'][model]:.1f} %")
        for k, text in enumerate(texts):
            view = tinted(image, masks[k], scale)
            if k == 0:
                draw_points(view, row["points"], scale)
            middle = 40 + k * pitch + tile / 2
            left = round(middle - view.width / 2)
            page.paste(view, (left, top))
            write(page, (middle, top + view.height + 8), text, 34, "ma", tile)
        top += view.height + 50
        write(page, (40 + tile / 2, top), row["label"], 34, "ma", tile, ink=GREY)
        top += 84 if row["label"] else 40
    return save_page(page, top, path)


def draw_points(view, points, scale):
    """The three points of each object (M, 3, 2), in its colour."""
    pen = ImageDraw.Draw(view)
    for k, clicks in enumerate(points):
        tint = TINTS[k % len(TINTS)]
        for x, y in (clicks + 0.5) * scale:
            pen.ellipse((x - 11, y - 11, x + 11, y + 11), tint, "white", 4)


def choose_samples(results, rows=6):
    """[(kind, gain, number of the image, condition), ...]: where the last model gains least, middling and most over the
    first, by points, each of another image and corruption as far as they last. One model alone: its worst, middling and
    best IoU."""
    models = list(results["models"])
    conditions = data.degraded_conditions(results["conditions"]) or ["clear"]
    ious = image_ious(results["images"], models, conditions, "point")
    gains = ious[-1] - ious[0] if len(models) > 1 else ious[0]  # (conditions, images)
    left = []
    for condition, of_images in zip(conditions, gains.tolist()):
        for k, gain in enumerate(of_images):
            left.append((gain, k, condition))
    left.sort()

    chosen = []
    for kind, share in dict(least=0, middling=0.5, most=1).items():
        for _ in range(min(rows // 3, len(left))):
            shown = {part for case in chosen for part in case[2:]}  # images and conditions
            fresh = [case for case in left if shown.isdisjoint(case[1:])] or left
            place = round(share * (len(fresh) - 1))
            case = fresh[place]
            left.remove(case)
            chosen.append((kind, *case))
    return chosen
