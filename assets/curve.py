"""The curve of a training run, curve.png, drawn from its log."""
import os

from assets.figures import Axes, COLOURS, RED, Style, draw_figure, shades, ticks


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
