"""Measures SAM and adapters on the same pictures, prompts and noise, and prints the paper's table.

    python evaluate.py --ckpt runs/vit_t_gara/gara.pt --data demo/              SAM beside GaRA, split test
    python evaluate.py --ckpt gara.pt lora.pt --checkpoint sam_vit_b_01ec64.pth --data robustseg/ --split lvis
    python evaluate.py --ckpt gara.pt --data bdd100k/ LIS/ --split val --no-corrupt         pictures as they are

Every picture is taken clear and in each of the 15 corruptions, encoded once in each condition, and asked for every
object twice: by three points and by its box. Prompts and noise derive from the picture's name alone (see data.py), so
all methods, and all labs, answer the same questions. A score compares masks at the picture's own resolution; tables
give the mean over masks, and "degraded" is the mean over the 15 corruptions. Several datasets are measured one by one
and as one, every mask counting alike.

Written to `--out`: results.json, every score of every mask, and the means; samples.png, some masks to look at.
"""
import argparse
import copy
import json
import os
import platform
import sys
import time

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
import gara
from corruptions import CORRUPTIONS
from sam import BACKBONES, ResizeLongestSide, build_sam, find_checkpoint

PROMPTS = ("point", "box")
DECODED_AT_ONCE = 32  # prompts; their masks at full size are what takes memory
ROWS = 6  # samples in the picture


# ---------------------------------------------------------------------------------------------------------------------
# Metrics.
# ---------------------------------------------------------------------------------------------------------------------


def iou_dice(prediction, truth):
    """IoU and Dice of masks: bool (M, H, W) twice -> float64 (M,) twice. Tensors or arrays.

    IoU = |P and T| / |P or T|, Dice = 2 |P and T| / (|P| + |T|). An empty prediction scores 0. data.py drops empty
    truths; should both be empty nevertheless, they agree and score 1.
    """
    prediction, truth = torch.as_tensor(prediction), torch.as_tensor(truth)
    both, p, t = ((mask.sum((-2, -1))).double() for mask in (prediction & truth, prediction, truth))
    empty = (p + t == 0).double()
    return ((both + empty) / (p + t - both + empty)).cpu().numpy(), ((2 * both + empty) / (p + t + empty)).cpu().numpy()


def tables(images, models, conditions):
    """Means over masks: results.json's list of images -> {model: {"point fog": [IoU, Dice], "point degraded": ...}}."""
    summary = {}
    for model in models:
        means = {}
        for prompt in PROMPTS:
            for condition in conditions:
                pairs = [pair for image in images for pair in image["scores"][model][condition][prompt]]
                means[f"{prompt} {condition}"] = np.mean(pairs, axis=0).tolist()
            bad = [means[f"{prompt} {condition}"] for condition in conditions if condition != "clear"]
            if bad:
                means[f"{prompt} degraded"] = np.mean(bad, axis=0).tolist()
        summary[model] = means
    return summary


def print_tables(summaries, conditions):
    """The paper's table, then IoU by corruption, as Markdown. summaries: {data: what `tables` gave}, the union last."""
    *_, summary = summaries.values()
    columns = [f"{prompt} {kind}" for prompt in PROMPTS for kind in ("degraded", "clear")
               if f"{prompt} {kind}" in next(iter(summary.values()))]
    heads = ["data"] * (len(summaries) > 1) + ["model", *(f"{c} IoU | Dice" for c in columns)]
    print("| " + " | ".join(heads) + " |")
    print("|---" * (len(heads) - len(columns)) + "|---:" * 2 * len(columns) + "|")
    for root, rows in summaries.items():
        for model, means in rows.items():
            cells = [root] * (len(summaries) > 1) + [model, *(f"{100 * x:.1f}" for c in columns for x in means[c])]
            print("| " + " | ".join(cells) + " |")
    if len(conditions) == 1:
        return
    heads = [f"{prompt}: {model}" for prompt in PROMPTS for model in summary]
    print("\n| IoU by condition | " + " | ".join(heads) + " |")
    print("|---" + "|---:" * len(heads) + "|")
    for condition in conditions:
        cells = (means[f"{prompt} {condition}"][0] for prompt in PROMPTS for means in summary.values())
        print(f"| {condition} | " + " | ".join(f"{100 * value:.1f}" for value in cells) + " |")


# ---------------------------------------------------------------------------------------------------------------------
# Prediction.
# ---------------------------------------------------------------------------------------------------------------------


class Questions(torch.utils.data.Dataset):
    """What the loader's processes prepare for one picture: its masks, its prompts, and the picture in every condition.

    A bad sample comes back as its SampleError, for the main process to report.
    """

    def __init__(self, samples, conditions):
        self.samples, self.conditions = samples, conditions

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        try:
            masks = sample.masks()
            points, boxes = sample.prompts(masks)
            images = [sample.image(condition) for condition in self.conditions]
        except data.SampleError as error:
            return error
        return dict(name=sample.name, indices=list(sample.indices), masks=masks, points=points, boxes=boxes,
                    images=images)


def as_it_is(asked):
    """The loader's collate function: no lambda, so that it reaches processes that are spawned."""
    return asked


@torch.no_grad()
def predict(sam, images, points, boxes, batch_size, amp):
    """One picture in several conditions, uint8 HxWx3 each; points (M, 3, 2) and boxes (M, 4) in its pixels.

    Yields, condition by condition, {"point": bool (M, H, W), "box": bool (M, H, W)}. The same calls as SamPredictor's.
    """
    resize, size = ResizeLongestSide(sam.image_encoder.img_size), images[0].shape[:2]
    coords = torch.from_numpy(resize.apply_coords(points, size)).to(sam.device)
    corners = torch.from_numpy(resize.apply_boxes(boxes, size)).to(sam.device)
    input_size = resize.get_preprocess_shape(*size)
    for first in range(0, len(images), batch_size):
        scaled = np.stack([resize.apply_image(image) for image in images[first:first + batch_size]])
        with torch.autocast(sam.device.type, torch.bfloat16, enabled=amp == "bf16"):
            x = torch.from_numpy(scaled).to(sam.device).permute(0, 3, 1, 2)
            embeddings = sam.image_encoder(sam.preprocess(x))
        embeddings = embeddings.float()  # the decoder costs little: always float32
        pairs = torch.cartesian_prod(torch.arange(len(scaled)), torch.arange(len(coords))).to(sam.device)  # image, mask
        masks = {prompt: [] for prompt in PROMPTS}
        for image_index, which in (part.T for part in pairs.split(DECODED_AT_ONCE)):
            labels = torch.ones(len(which), 3, dtype=torch.long, device=sam.device)
            questions = dict(point=dict(points=(coords[which], labels)), box=dict(boxes=corners[which]))
            for prompt, question in questions.items():
                low_res, _ = sam.decode(embeddings, **question, image_index=image_index)
                masks[prompt].append(sam.postprocess_masks(low_res, input_size, size)[:, 0] > sam.mask_threshold)
        by_condition = (torch.cat(masks[prompt]).split(len(coords)) for prompt in PROMPTS)
        for answer in zip(*by_condition):
            yield dict(zip(PROMPTS, answer))


def evaluate(models, dataset, conditions, batch_size=4, amp="off", workers=0, show=None):
    """Score every mask of `dataset`. models: {name: Sam}; show: {sample name: condition} whose predictions to keep.

    Returns (images, kept): images is results.json's list, one dict per picture with name, indices (of its masks in the
    file) and scores[model][condition][prompt] = [[IoU, Dice], ...]; kept is what `picture` draws. DatasetError if no
    sample can be read.
    """
    images, kept, show = [], [], show or {}
    loader = torch.utils.data.DataLoader(Questions(dataset, conditions), batch_size=None, num_workers=workers,
                                         collate_fn=as_it_is, prefetch_factor=2 if workers else None)
    progress = data.Progress(f"evaluating {len(models)} models in {len(conditions)} conditions", len(dataset))
    for asked in loader:
        progress.update()
        if isinstance(asked, data.SampleError):
            if dataset.skip(asked):
                print(f"skipped: {asked}", file=sys.stderr)
            continue
        truth = torch.from_numpy(asked["masks"])
        row = dict(name=asked["name"], indices=asked["indices"], scores={})
        predictions = {}
        for model, sam in models.items():
            scores = row["scores"][model] = {}
            answers = predict(sam, asked["images"], asked["points"], asked["boxes"], batch_size, amp)
            for condition, answer in zip(conditions, answers):
                scores[condition] = {prompt: np.stack(iou_dice(masks, truth.to(masks.device)), axis=1).round(6).tolist()
                                     for prompt, masks in answer.items()}
                if show.get(asked["name"]) == condition:
                    predictions[model] = answer["point"].cpu().numpy()
        images.append(row)
        if predictions:
            condition = show[asked["name"]]
            iou = {model: np.mean(row["scores"][model][condition]["point"], axis=0)[0] for model in predictions}
            kept.append(dict(condition=condition, image=asked["images"][conditions.index(condition)], iou=iou,
                             points=asked["points"], truth=asked["masks"], predictions=predictions))
    progress.close()
    if not images:
        raise data.DatasetError(f"{dataset.summary()}: no sample could be read, nothing to measure")
    return images, kept


# ---------------------------------------------------------------------------------------------------------------------
# The picture.
# ---------------------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, told apart by colour-blind readers
COLOURS = [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)]


def paint(image, masks, scale):
    """The picture, enlarged, with each object tinted in its colour: a Pillow image."""
    canvas = image.astype(np.float32)
    for k, mask in enumerate(masks):
        canvas[mask] = 0.35 * canvas[mask] + 0.65 * np.array(COLOURS[k % len(COLOURS)])
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    return Image.fromarray(canvas.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def picture(kept, models, path, tile=240):
    """Rows of: the degraded picture with its points, the truth, each model's masks from them and their mean IoU."""
    font, small = ImageFont.load_default(20), ImageFont.load_default(16)
    columns, line = ["input", "truth", *models], 28
    page = Image.new("RGB", (len(columns) * (tile + 8) + 8, 44 + len(kept) * (tile + line + 8)), "white")
    pen = ImageDraw.Draw(page)
    for c, title in enumerate(columns):
        pen.text((8 + c * (tile + 8) + tile / 2, 12), title, "black", font, anchor="ma")
    for r, row in enumerate(kept):
        scale, top = tile / max(row["image"].shape[:2]), 44 + r * (tile + line + 8)
        masks = [[], row["truth"], *(row["predictions"][m] for m in models)]
        texts = [row["condition"], f"{len(row['truth'])} objects", *(f"IoU {row['iou'][m]:.2f}" for m in models)]
        for c, (these, text) in enumerate(zip(masks, texts)):
            x = 8 + c * (tile + 8)
            view = paint(row["image"], these, scale)
            if c == 0:
                dots = ImageDraw.Draw(view)
                for k, clicks in enumerate(row["points"]):
                    for px, py in (clicks + 0.5) * scale:
                        dots.ellipse((px - 4, py - 4, px + 4, py + 4), COLOURS[k % len(COLOURS)], "white")
            page.paste(view, (x + (tile - view.width) // 2, top + (tile - view.height) // 2))
            pen.text((x + tile / 2, top + tile + 4), text, "black", small, anchor="ma")
    data.save_png(page, path)


# ---------------------------------------------------------------------------------------------------------------------
# Command line.
# ---------------------------------------------------------------------------------------------------------------------


def load_models(ckpts, backbone, checkpoint, device):
    """({"SAM": plain SAM, and one entry per adapter file}, backbone). All share the frozen weights."""
    paths = [path for path in ckpts if path != "sam"]
    contents = {path: gara.read_adapter(path) for path in paths}
    named = {content["backbone"] for content in contents.values()} | ({backbone} if backbone else set())
    if len(named) > 1:
        raise ValueError(f"--ckpt and --backbone name different backbones ({', '.join(sorted(named))}): one at a time")
    backbone = named.pop() if named else "vit_t"
    sizes = {content["image_size"] for content in contents.values()}
    if len(sizes) > 1:
        raise ValueError(f"--ckpt names adapters for different image sizes ({', '.join(map(str, sorted(sizes)))}): one "
                         "at a time")
    base = build_sam(backbone, checkpoint or find_checkpoint(backbone), *sizes).to(device)
    frozen = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    models = {"SAM": base}
    for path, content in contents.items():
        titles = {"gara": "GaRA", "gara_flat": "GaRA flat", "lora": "LoRA", "moe_lora": "MoE-LoRA"}
        name = titles.get(content["method"], content["method"])
        name = name if name not in models else f"{name} ({path})"
        models[name] = copy.deepcopy(base, dict(frozen))  # the memo keeps the frozen tensors shared
        gara.load_adapter(models[name], path)
        models[name].to(device).eval()
    return models, backbone


def parse(argv):
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    add = parser.add_argument
    add("--ckpt", nargs="+", default=["sam"], help="adapter files; 'sam' is plain SAM, which is always measured too")
    add("--data", required=True, nargs="+", metavar="ROOT", help="dataset folders of any kind that data.py reads (demo/"
        " is made if it is not there); KIND=ROOT where the kind is not plain to see")
    add("--prompts", nargs="+", metavar="JSON", help="use exactly these prompts (data.py ROOT --export-prompts JSON)")
    add("--strict", action="store_true", help="a bad or missing file is an error; else it is skipped and counted")
    add("--split", default="test")
    add("--backbone", choices=BACKBONES, help="only needed without adapters (default vit_t)")
    add("--checkpoint", help="SAM weights; default: assets/, checkpoints/, the torch hub cache, else downloaded")
    add("--no-corrupt", action="store_true", help="use the pictures as they are")
    add("--limit", type=int, help="only this many pictures, spread over the split")
    add("--out", default="results", help="folder for results.json and samples.png (default results/)")
    add("--batch-size", type=int, default=4, help="conditions of a picture that are encoded at once")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", choices=("off", "bf16"), default="off", help="bf16: the encoder in bfloat16")
    add("--workers", type=int, default=min(8, (os.cpu_count() or 2) // 2), help="processes that load and corrupt")
    args = parser.parse_args(argv)
    for name, least in (("limit", 1), ("batch_size", 1), ("workers", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be {least} or more")
    return args


def main(argv=None):
    """Run the command line; returns the exit code. A user's mistake ends in one line."""
    args = parse(argv)
    try:
        models, backbone = load_models(args.ckpt, args.backbone, args.checkpoint, torch.device(args.device))
        for root in args.data:
            data.make_missing_demo(root)
        datasets = data.load_datasets(args.data, args.split, args.strict, args.prompts)
        conditions = ("clear",) if args.no_corrupt else data.CONDITIONS
        drawn = ("clear",) if args.no_corrupt else tuple(CORRUPTIONS)
        os.makedirs(args.out, exist_ok=True)
        started, images, kept, parts = time.monotonic(), [], [], {}
        for root, dataset in zip(args.data, datasets):
            if args.limit:
                dataset.samples = data.spread(dataset, args.limit)
            # Rows are chosen by position, not by result: samples spread over the split, in every second corruption.
            rows = data.spread(dataset, -(-ROWS // len(datasets)))
            show = {sample.name: drawn[2 * k % len(drawn)] for k, sample in enumerate(rows, len(kept))}
            rows, pictures = evaluate(models, dataset, conditions, args.batch_size, args.amp, args.workers, show)
            parts[root] = tables(rows, models, conditions)
            images += [dict(data=root, **row) for row in rows]
            kept += pictures
            print(dataset.summary())
        seconds = time.monotonic() - started
        if len(parts) > 1:
            parts["all"] = tables(images, models, conditions)
        masks = sum(len(image["indices"]) for image in images)
        print(f"{len(images):,} images, {masks:,} masks, {len(conditions)} conditions; {backbone} on {args.device}, "
              f"{seconds:.0f} s\n")
        print_tables(parts, conditions)
        path = os.path.join(args.out, "results.json")
        *_, means = parts.values()
        results = dict(format="gara-sam results 1", data=args.data, split=args.split, backbone=backbone, ckpt=args.ckpt,
                       prompts=args.prompts, amp=args.amp, torch=torch.__version__, machine=platform.platform(),
                       seconds=round(seconds, 1), conditions=conditions, means=means, means_by_data=parts,
                       skipped=[line for dataset in datasets for line in dataset.skipped], images=images)
        data.save_text(json.dumps(results), path)
        picture(kept, list(models), os.path.join(args.out, "samples.png"))
        print(f"\nwritten: {path}, {os.path.join(args.out, 'samples.png')}")
    except (data.DatasetError, ValueError, OSError, RuntimeError, AssertionError) as error:  # last: no CUDA in torch
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
