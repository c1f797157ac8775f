"""Measures SAM and adapters on the same pictures, prompts and noise: the paper's tables and figures.

    python evaluate.py --ckpt runs/vit_t_gara/gara.pt --data demo/              SAM beside GaRA, split test
    python evaluate.py --ckpt gara.pt lora.pt --checkpoint sam_vit_b_01ec64.pth --data robustseg/ --split lvis
    python evaluate.py --ckpt gara.pt --data bdd100k/ LIS/ --split val --no-corrupt         pictures as they are
    python evaluate.py --ckpt gara.pt --predictor hq.py:HQ_SAM --data robustseg/            another project's model too
    python evaluate.py --from results/results.json more/results.json    tables and figures again, from stored scores

Every picture is taken clear and in each of the 15 corruptions, encoded once in each condition, and asked for every
object twice: by three points and by its box. Prompts and noise derive from the picture's name alone (see data.py), so
all methods, and all labs, answer the same questions. A score compares masks at the picture's own resolution; tables
give the mean over masks, and "degraded" is the mean over the 15 corruptions. Several datasets are measured one by one
and as one, every mask counting alike. torchrun shares the pictures among processes; what was measured is kept at once,
so the same command goes on where an interrupted one stopped.

A score is an estimate from the pictures at hand. So each mean has a 95 % interval by bootstrap: draw as many pictures
again, with replacement, 2,000 times. A difference of two models has its own, from the same draws: both answer the same
questions, so it is far narrower than the two intervals suggest. Only differences beyond it are called better.

Written to `--out`: results.json (its form: see `measure`), results.csv (the means), and the figures as PNG.
"""
import argparse
import copy
import csv
import datetime
import functools
import glob
import hashlib
import io
import json
import os
import platform
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

import data
import gara
from sam import (BACKBONES, ResizeLongestSide, SamPredictor, build_sam, find_checkpoint, foreign, from_file,
                 keep_freed_memory, megabytes, race)

FORMAT = "gara-sam results 3"
METRICS = ("IoU", "Dice", "PA")
PROMPTS = ("point", "box")
DECODED_AT_ONCE = 32  # prompts; their masks at full size are what takes memory
DRAWS = 2000  # of the bootstrap


# ---------------------------------------------------------------------------------------------------------------------
# Prediction and scores.
# ---------------------------------------------------------------------------------------------------------------------


def mask_scores(prediction, truth):
    """IoU, Dice and pixel accuracy (PA) of masks: bool (M, H, W) twice -> float64 (M, 3). Tensors or arrays.

    IoU = |P and T| / |P or T|, Dice = 2 |P and T| / (|P| + |T|), PA = the share of the image's pixels that P gets right,
    all counted at the image's own resolution however small the mask. An empty prediction scores 0 in the first two.
    data.py drops empty truths; should both be empty nevertheless, they agree and score 1.
    """
    prediction, truth = torch.as_tensor(prediction), torch.as_tensor(truth)
    both, p, t = (mask.sum((-2, -1)).double() for mask in (prediction & truth, prediction, truth))
    empty = (p + t == 0).double()
    iou = (both + empty) / (p + t - both + empty)
    dice = (2 * both + empty) / (p + t + empty)
    accuracy = 1 - (p + t - 2 * both) / (truth.shape[-2] * truth.shape[-1])
    return torch.stack([iou, dice, accuracy], dim=-1).cpu().numpy()


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

    Yields, condition by condition, {"point": bool (M, H, W), "box": bool (M, H, W)}, and with gates what each layer
    chose: "gates": [layer, ...], a layer [[space, hex digits of the packed vector], ...] of its one decision, or of one
    for each window.
    The same calls as SamPredictor's.
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
        answers = {prompt: torch.cat(masks[prompt]).split(len(coords)) for prompt in PROMPTS}
        if is_gated(sam):
            answers["gates"] = pack_gates(gara.gates(sam))
        for answer in zip(*answers.values()):
            yield dict(zip(answers, answer))


def pack_gates(layers):
    """What `gara.gates` gave, image by image, for results.json: see `predict`."""
    packed = []
    for layer in layers:
        decisions = layer["vector"].shape[1] if layer["vector"].dim() == 3 else 1
        bits = np.packbits(layer["vector"].cpu().numpy(), axis=-1)
        codes = [row.tobytes().hex() for row in bits.reshape(-1, bits.shape[-1])]
        pairs = list(zip(layer["space"].flatten().tolist(), codes))  # of all images and windows
        packed.append([pairs[first:first + decisions] for first in range(0, len(pairs), decisions)])
    return [list(image) for image in zip(*packed)]


def is_gated(model):
    """Has it gates that decide anything? LoRA's are always open."""
    return bool(getattr(model, "adapter", None)) and model.adapter["method"] != "lora"


def is_sam(model):
    """A SAM of this project, not a plugged predictor."""
    return not hasattr(model, "set_image")


def ask(predictor, images, points, boxes):
    """`predict` for any object with the official SamPredictor's set_image and predict: a call for each question."""
    for image in images:
        predictor.set_image(image)
        asked = dict(point=[dict(point_coords=each, point_labels=np.ones(3, np.int64)) for each in points],
                     box=[dict(box=box) for box in boxes])
        answer = {}
        for prompt, questions in asked.items():
            masks = [np.asarray(predictor.predict(**question, multimask_output=False)[0]) for question in questions]
            wrong = next((mask.shape for mask in masks if mask.shape != (1, *image.shape[:2])), None)
            if wrong:
                raise ValueError(f"--predictor: predict() gave masks of shape {wrong} for a picture of {image.shape}: "
                                 f"with multimask_output=False they must be {(1, *image.shape[:2])}")
            answer[prompt] = torch.from_numpy(np.concatenate(masks) > 0)
        yield answer


def answers(model, images, points, boxes, batch_size=4, amp="off"):
    """What a model, a Sam or a plugged predictor, answers: see `predict`."""
    if is_sam(model):
        return predict(model, images, points, boxes, batch_size, amp)
    return ask(model, images, points, boxes)


def evaluate(models, dataset, conditions, batch_size=4, amp="off", workers=0, todo=None):
    """Score every mask of `dataset`, or of its pictures numbered in `todo`. models: {name: Sam or predictor}.

    Yields a row for each picture, in order: dict of at (its number), name, size [H, W], indices (of its masks in the
    file), areas (their pixels), scores[model][condition][prompt] = [[IoU, Dice, PA], ...], and for models with gates
    gates[model][condition] (see `predict`). A picture that cannot be read gives dict(at, skipped=why).
    """
    todo = range(len(dataset)) if todo is None else todo
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(Questions(dataset, conditions), todo), batch_size=None, num_workers=workers,
        collate_fn=as_it_is, prefetch_factor=2 if workers else None)
    for at, asked in zip(todo, loader):
        if isinstance(asked, data.SampleError):
            if dataset.skip(asked):
                print(f"skipped: {asked}", file=sys.stderr)
            yield dict(at=at, skipped=str(asked))
            continue
        truth, scores, gates = torch.from_numpy(asked["masks"]), {}, {}
        for name, model in models.items():
            given = answers(model, asked["images"], asked["points"], asked["boxes"], batch_size, amp)
            for condition, answer in zip(conditions, given):
                if "gates" in answer:
                    gates.setdefault(name, {})[condition] = answer.pop("gates")
                scores.setdefault(name, {})[condition] = {
                    prompt: mask_scores(masks, truth.to(masks.device)).round(6).tolist()
                    for prompt, masks in answer.items()}
        yield dict(at=at, name=asked["name"], size=list(truth.shape[1:]), indices=asked["indices"],
                   areas=truth.sum((1, 2)).tolist(), scores=scores, gates=gates)


def shared(args, models, dataset, number):
    """`evaluate`, the pictures shared by all processes and every row kept in a file at once: (rows in order, files).

    The files, args.out/unfinished-NUMBER-KEY-PROCESS.jsonl, are named after all that the rows depend on. What a run
    that was interrupted left there is taken over, however many processes it had. Rows go to the first process alone.
    """
    about = dict(root=dataset.root, split=dataset.split, kind=dataset.kind, conditions=args.conditions, amp=args.amp,
                 names=[sample.name for sample in dataset], models=list(models), batch_size=args.batch_size,
                 device=torch.device(args.device).type, torch=torch.__version__,
                 files=[digest(path) for path in (*args.ckpt, *(spec.rpartition(":")[0] for spec in args.predictor),
                                                  *(args.prompts or ())) if path != "sam"],
                 base=gara.fingerprint(models["SAM"]))
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    files = os.path.join(args.out, f"unfinished-{number}-{key}-")
    pattern = glob.escape(files) + "*.jsonl"
    done, _ = read_rows(pattern)
    wait_for_all()  # nobody may write before everybody has read
    mine = [at for at in range(len(dataset)) if at not in done][args.process::args.processes]
    own = f"{files}{args.process}.jsonl"
    if args.process == 0 and done:
        print(f"{len(done):,} of {len(dataset):,} pictures of {dataset.root} were measured before", file=sys.stderr)
    before, _ = read_rows(glob.escape(own))
    data.save_text("".join(json.dumps(row) + "\n" for row in before.values()), own)  # without a line cut short
    progress = data.Progress(f"evaluating {len(models)} models in {len(args.conditions)} conditions", len(mine))
    with open(own, "a") as file:
        for row in evaluate(models, dataset, args.conditions, args.batch_size, args.amp, args.workers, mine):
            file.write(json.dumps(row) + "\n")
            file.flush()
            progress.update()
    progress.close()
    wait_for_all()
    rows, paths = read_rows(pattern) if args.process == 0 else ({}, [])
    return [rows[at] for at in sorted(rows)], paths


def read_rows(pattern):
    """({number of the picture: its row}, the files), from all files of a pattern; a line cut short is left out."""
    rows, paths = {}, glob.glob(pattern)
    for path in paths:
        with open(path) as file:
            rows |= {row["at"]: row for row in map(json.loads, (line for line in file if line.endswith("\n")))}
    return rows, paths


def digest(path):
    """Of a file's content."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def wait_for_all():
    """All processes of the run meet here."""
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Means, their uncertainty, and tables.
# ---------------------------------------------------------------------------------------------------------------------


def plain(conditions):
    """Those at the benchmark's own strength: "clear" and "fog", not "fog@0.5"."""
    return [condition for condition in conditions if "@" not in condition]


def corrupted(conditions):
    """Those whose mean is "degraded"."""
    return [condition for condition in plain(conditions) if condition != "clear"]


def summarize(images, models, conditions, average="masks"):
    """results.json's images -> dict of means, intervals and differences, for columns "point fog", "point degraded", ...

    means[model][column] = [IoU, Dice, PA]; intervals[model][column] = [[low, high], ...], 95 % by bootstrap over images;
    differences[model][other][column] = [[mean, low, high], ...], model less other, for each other before it.
    average: "masks", every mask counts alike, as in the paper's tables; "images", every image. Of fewer than two images
    intervals are as wide as can be: nothing is known.
    """
    columns = [f"{prompt} {condition}" for prompt in PROMPTS for condition in conditions]
    sums = np.array([[[np.sum(image["scores"][model][condition][prompt], axis=0) for prompt in PROMPTS
                       for condition in conditions] for model in models] for image in images])
    masks = np.array([len(image["indices"]) for image in images], float)
    if average == "images":
        sums, masks = sums / masks[:, None, None, None], np.ones(len(images))
    bad = corrupted(conditions)
    for prompt in PROMPTS if bad else ():
        those = [columns.index(f"{prompt} {condition}") for condition in bad]
        sums = np.concatenate([sums, sums[:, :, those].mean(2, keepdims=True)], axis=2)
        columns.append(f"{prompt} degraded")
    means = sums.sum(0) / masks.sum()  # (models, columns, metrics)
    drawn, rng, at_once = [], np.random.default_rng(data.seed_of("bootstrap")), max(1, 10 ** 7 // len(images))
    for first in range(0, DRAWS, at_once):
        size = min(at_once, DRAWS - first)
        counts = rng.multinomial(len(images), np.full(len(images), 1 / len(images)), size).astype(float)
        drawn.append((counts @ sums.reshape(len(images), -1)).reshape(size, *means.shape)
                     / (counts @ masks)[:, None, None, None])
    drawn = np.concatenate(drawn)  # (draws, models, columns, metrics)
    found = dict(means={}, intervals={}, differences={})
    for a, model in enumerate(models):
        ends = np.moveaxis(np.percentile(drawn[:, a], (2.5, 97.5), axis=0), 0, -1)  # (columns, metrics, low and high)
        ends = ends if len(images) > 1 else np.broadcast_to((0.0, 1.0), ends.shape)
        found["means"][model] = dict(zip(columns, means[a].tolist()))
        found["intervals"][model] = dict(zip(columns, ends.tolist()))
        for b, other in enumerate(list(models)[:a]):
            ends = np.moveaxis(np.percentile(drawn[:, a] - drawn[:, b], (2.5, 97.5), axis=0), 0, -1)
            ends = ends if len(images) > 1 else np.broadcast_to((-1.0, 1.0), ends.shape)
            both = np.concatenate([(means[a] - means[b])[..., None], ends], axis=-1)
            found["differences"].setdefault(model, {})[other] = dict(zip(columns, both.tolist()))
    return found


def summaries(results):
    """[(root, what `summarize` gave), ...] of a results.json: of several roots each, and then of all."""
    return [*results["by_data"].items(), ("all" if results["by_data"] else results["data"][0], results)]


def difference(summary, model, other, column, metric=0):
    """(mean, low, high) of model less other."""
    if other in summary["differences"].get(model, {}):
        return tuple(summary["differences"][model][other][column][metric])
    mean, low, high = summary["differences"][other][model][column][metric]
    return -mean, -high, -low


def percent_of(mean, low, high):
    """A mean, and half the width of its interval: "72.9 ±1.3"."""
    return f"{100 * mean:.1f} ±{50 * (high - low):.1f}"


def points_of(mean, low, high):
    """A difference and its interval, "+4.3 [3.4, 5.2]"; in round brackets if it may as well be none."""
    text = f"{100 * mean:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return text if low > 0 or high < 0 else f"({text})"


def table(heads, rows, left=1):
    """Markdown, with an empty line below; the first `left` columns are text."""
    lines = ["| " + " | ".join(row) + " |" for row in (heads, *rows)]
    lines.insert(1, "|---" * left + "|---:" * (len(heads) - left) + "|")
    return "\n".join(lines) + "\n"


def print_tables(results, paper=None):
    """The tables of a results.json, as Markdown. paper: the set whose published figures stand below ours."""
    models, several = list(results["models"]), len(results["data"]) > 1
    columns = [f"{prompt} {kind}" for prompt in PROMPTS for kind in ("degraded", "clear")
               if f"{prompt} {kind}" in results["means"][models[0]]]
    heads = ["data"] * several + ["model"] + [f"{c} {metric}" for c in columns for metric in METRICS]
    rows = []
    for root, summary in summaries(results):
        for model in models:
            cells = [root] * several + [model]
            for column, metric in ((c, m) for c in columns for m in range(len(METRICS))):
                text = percent_of(summary["means"][model][column][metric],
                                  *summary["intervals"][model][column][metric])
                best = len(models) > 1 and all(difference(summary, model, other, column, metric)[1] > 0
                                               for other in models if other != model)
                cells.append(f"**{text}**" if best else text)
            rows.append(cells)
    for (backbone, method), values in read_paper()[paper].items() if paper else ():
        if backbone in ("", results["backbone"]):
            cells = [""] * several + [f"{method} (paper)"]
            for column in columns:
                cells += [f"{value:.1f}" if value else "" for value in values.get(column, [None] * len(METRICS))]
            rows.append(cells)
    print(table(heads, rows, 1 + several))
    print("±: half of the 95 % interval, by bootstrap over images." + (
        " Bold: better than every other model here, by a paired interval." if len(models) > 1 else "") + "\n")
    if len(models) > 1:
        best = max(models, key=lambda model: results["means"][model][columns[0]][0])
        pairs = [(model, models[0]) for model in models[1:]] + [
            (best, model) for model in models[1:] if model != best and best != models[0]]
        print(table(["IoU, difference on the same masks", *columns],
                    [[f"{model} - {other}", *(points_of(*difference(results, model, other, column))
                                              for column in columns)] for model, other in pairs]))
        print("[95 % interval]; in round brackets: no larger than its noise.\n")
    conditions = plain(results["conditions"])
    if len(conditions) > 1:
        rows = [[condition] + [f"{100 * results['means'][model][f'{prompt} {condition}'][0]:.1f}" for prompt in PROMPTS
                               for model in models] for condition in conditions]
        print(table(["IoU by condition", *(f"{prompt}: {model}" for prompt in PROMPTS for model in models)], rows))


def as_csv(results):
    """Every mean of a results.json, one on a line."""
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow("data model prompt condition metric mean low high".split())
    for root, summary in summaries(results):
        for model, means in summary["means"].items():
            for column, pair in means.items():
                for metric, mean, (low, high) in zip(METRICS, pair, summary["intervals"][model][column]):
                    numbers = (f"{value:.6f}" for value in (mean, low, high))
                    lines.writerow([root, model, *column.split(" ", 1), metric, *numbers])
    return file.getvalue()


PAPER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "paper.csv")
COMPARISONS = ("1", "2", "3", "4", "a2", "a4")  # tables that compare methods on a benchmark; the others are ablations


def read_paper():
    """{name: {(backbone, method): {"point degraded": (IoU, Dice, PA), ...}}} as the paper prints it, in percent.

    Names are those of the benchmarks ("lvis") and of the tables ("table5", as the camera-ready counts them). None stands
    for a metric that a table leaves out. Real images, degraded as they are, stand under "clear".
    """
    found = {}
    with open(PAPER, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values = tuple(float(row[metric]) if row[metric] else None for metric in METRICS)
            names = [f"table{row['table']}"]
            if row["table"] in COMPARISONS:
                names.append(row["benchmark"])
            for name in names:
                model = found.setdefault(name, {}).setdefault((row["backbone"], row["method"]), {})
                model[f"{row['prompt']} {row['condition']}"] = values
    return found


def merge(parts):
    """Several results.json of the same questions as one, so that their models stand side by side. ValueError if the
    questions differ. A model that two files name alike is kept once where its scores are equal, else named apart."""
    whole = copy.deepcopy(next(iter(parts.values())))
    first = next(iter(parts))
    for path, part in list(parts.items())[1:]:
        for key in ("split", "backbone", "conditions", "data", "average"):
            if part[key] != whole[key]:
                raise ValueError(f"{path}: {key} is {part[key]}, but {whole[key]} in {first}: measure both alike")
        images = zip(whole["images"], part["images"])
        if len(whole["images"]) != len(part["images"]) or any(
                mine[key] != other[key] for mine, other in images for key in ("data", "name", "indices", "areas")):
            raise ValueError(f"{path}: its pictures or masks are not those of {first}")
        for model, about in part["models"].items():
            pairs = list(zip(whole["images"], part["images"]))
            if model in whole["models"] and all(mine["scores"][model] == its["scores"][model] for mine, its in pairs):
                continue
            name = model if model not in whole["models"] else f"{model} ({path})"
            whole["models"][name] = about
            for mine, other in pairs:
                for kind in ("scores", "gates"):
                    if model in other[kind]:
                        mine[kind][name] = other[kind][model]
    return whole


def add_summaries(results):
    """Adds to a results.json its means, intervals, differences, and by_data, the same of each of several roots."""
    groups = {root: [image for image in results["images"] if image["data"] == root] for root in results["data"]}
    asked = list(results["models"]), results["conditions"], results["average"]
    results |= summarize(results["images"], *asked)
    results["by_data"] = {root: summarize(images, *asked) for root, images in groups.items() if len(groups) > 1}
    return results


def read_results(path):
    """A results.json. ValueError in one line if it is none."""
    try:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no results.json ({error})") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise ValueError(f"{path} is no results.json of this version ({FORMAT}): measure again")
    return results


# ---------------------------------------------------------------------------------------------------------------------
# What the models cost: the paper's Table 8.
# ---------------------------------------------------------------------------------------------------------------------


def costs(models, about, sample, amp, rounds=5):
    """Print Table 8: a picture encoded and one box answered, by each model in turn, `rounds` times after a warm-up.
    Returns it: {"heads": [...], "rows": [[...], ...]}.

    Memory is a model's own weights and what the work takes beyond them, at its peak.
    """
    masks = sample.masks()
    points, boxes = sample.prompts(masks)
    image, device = sample.image(), models["SAM"].device
    works = {name: functools.partial(lambda model: list(answers(model, [image], points[:1], boxes[:1], amp=amp)), model)
             for name, model in models.items()}
    rows = []
    for name, row in race(works, device, rounds).items():
        weights = is_sam(models[name]) and sum(t.numel() * t.element_size() for t in models[name].state_dict().values())
        learnable, file = about[name]["learnable_parameters"], about[name]["file"]
        size = f"{os.path.getsize(file) / 1e6:.1f}" if file else "-"
        rows.append([name, f"{learnable:,}" if learnable else "-", size] + (
            ["-", row["failed"]] if "failed" in row else
            [megabytes(row["peak"], weights) if weights else "-", f"{1 / row['seconds']:.2f}"]))
    heads = ["model", "learnable parameters", "file MB", "peak memory MB", "images/s"]
    print(table(heads, rows))
    print(f"One picture of {image.shape[1]} x {image.shape[0]} at a time, encoded, and one box answered; {device}, amp "
          f"{amp}, {torch.get_num_threads()} threads, median of {rounds} interleaved rounds.")
    pictures, predictor = [image] * 4, SamPredictor(models["SAM"])
    done = race({"here": lambda: list(answers(models["SAM"], pictures, points, boxes, 4, amp)),
                 "loop": lambda: list(ask(predictor, pictures, points, boxes))}, device, 1)
    fast, slow = done["here"]["seconds"], done["loop"]["seconds"]
    print(f"All {len(masks)} objects of 4 pictures by points and by boxes: {fast:.2f} s, and {slow:.2f} s by a plain "
          f"loop of SamPredictor.predict, {slow / fast:.1f} times as long.\n")
    return dict(heads=heads, rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# Figures. Drawn on a page of twice the size, in whose pixels lengths are given, and halved at the end: smooth lines.
# ---------------------------------------------------------------------------------------------------------------------

WIDTH, GREY, PALE, RED = 2800, "#777777", "#dddddd", "#d55e00"
# A model's mark: a colour (Okabe and Ito's but yellow, too pale for lines) and a star (points, inner radius, turned by)
INKS = ["#000000", "#e69f00", "#0072b2", "#009e73", RED, "#56b4e9", "#cc79a7", GREY]
STARS = [(16, 1, 0), (4, 0.71, 45), (3, 0.5, 0), (4, 0.71, 0), (3, 0.5, 180), (4, 0.35, 45), (4, 0.35, 0), (6, 0.6, 0),
         (5, 0.81, 0)]
ORACLES = {"Oracle-Corrupt": ("#000000", (5, 0.4, 0)), "Oracle-Instance": ("#000000", (3, 0.25, 0))}


def styles_of(models):
    """{model: (colour, star)}, no two alike among the first 72."""
    return {model: (INKS[k % len(INKS)], STARS[k % len(STARS)]) for k, model in enumerate(models)}


def write(page, xy, text, size=34, anchor="la", room=None, angle=0, ink="black"):
    """Text, cut to `room` wide. Turned by 90 degrees, its centre is at xy; turned by another angle, its end."""
    font, text = ImageFont.load_default(size), text.replace("\N{MINUS SIGN}", "-")  # Pillow's font has no minus sign
    while room and font.getlength(text) > room and len(text) > 4:
        text = text[:-4] + "..."
    if not angle:
        return ImageDraw.Draw(page).text(xy, text, ink, font, anchor)
    strip = Image.new("L", (round(font.getlength(text)) + 8, round(1.4 * size)))
    ImageDraw.Draw(strip).text((4, strip.height / 2), text, 255, font, "lm")
    strip = strip.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    x, y = (strip.width / 2, strip.height / 2) if angle == 90 else (strip.width - size / 2, 0)
    page.paste(ink, (round(xy[0] - x), round(xy[1] - y)), strip)


def heading(page, title, results):
    """The title and, in grey, the data that a figure shows. Returns the y below them."""
    pictures = {(image["data"], image["name"]): len(image["indices"]) for image in results["images"]}
    images, masks = len(pictures), sum(pictures.values())
    shown = f"{', '.join(results['data'])[:70]}, {results['split']} split, {results['backbone']}; " \
            f"images: {images:,}, masks: {masks:,}"
    write(page, (40, 24), title, 48, room=page.width - 80)
    write(page, (40, 90), shown, 34, room=page.width - 80, ink=GREY)
    return 160


def save(page, bottom, path):
    """Cuts the page off below `bottom`, halves it and writes it. Returns the path."""
    data.save_png(page.crop((0, 0, page.width, round(bottom))).reduce(2), path)
    return path


def mark(page, x, y, style, r):
    """A model's mark; of those that are not thin, a white rim parts them from others."""
    ink, (points, inner, turn) = style
    angles = np.arange(2 * points) * np.pi / points + np.radians(turn)
    radii = r * np.where(np.arange(2 * points) % 2, inner, 1) * (1 if points > 5 else 1.25)
    corners = zip(x + radii * np.sin(angles), y - radii * np.cos(angles))
    ImageDraw.Draw(page).polygon(list(corners), ink, "white" if inner > 0.4 else ink)


def legend(page, y, styles, x=150):
    """Marks and names, in as many lines as they need. Returns the y below them."""
    left = x
    for name, (ink, star) in styles.items():
        length = min(700, ImageFont.load_default(36).getlength(name))
        if x + 66 + length > page.width - 40:
            x, y = left, y + 52
        ImageDraw.Draw(page).line((x, y + 22, x + 52, y + 22), ink, 4)
        if star:
            mark(page, x + 26, y + 22, (ink, star), 14)
        write(page, (x + 66, y), name, 36, room=705)
        x += 120 + length
    return y + 70


def ticks(low, high, most):
    """Round numbers, at most `most`, that enclose low and high."""
    for step in (base * 10.0 ** power for power in range(-3, 9) for base in (1, 2, 5)):
        first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
        if max(last - first, 1) < most:
            return [step * k for k in range(int(first), int(first + max(last - first, 1)) + 1)]


def panels(results, title, curves, styles, xs, labels, path, columns=4, high=470, pad=0.0, turned=False, r=11,
           notes=()):
    """A figure of equal axes side by side: curves {panel: {name: {x: y or (y, low, high)}}}; low to high is drawn as a
    whisker. xs {x: text}: the ticks; pad: room at both ends; turned: xs are kinds, with long names, so no lines."""
    values = [np.ravel(y) for panel in curves.values() for line in panel.values() for y in line.values()]
    title += " (whiskers: 95 % intervals)" * any(len(value) > 1 for value in values)
    ys, columns = ticks(min(map(min, values)), max(map(max, values)), 7), min(columns, len(curves))
    rows, wide = -(-len(curves) // columns), (WIDTH - 150) // columns
    page = Image.new("RGB", (WIDTH, 700 + 52 * (len(styles) + len(notes)) + rows * high), "white")
    top, pen = legend(page, heading(page, title, results), styles), ImageDraw.Draw(page)
    for k, (panel, lines) in enumerate(curves.items()):
        x0, y0 = 150 + k % columns * wide, top + 60 + k // columns * high
        x1, y1, end = x0 + wide - (50 if columns > 1 else 20), y0 + high - 110, 0

        def at(x, y):
            return (x0 + (x1 - x0) * (x - min(xs) + pad) / (max(xs) - min(xs) + 2 * pad),
                    y1 - (y1 - y0) * (y - ys[0]) / (ys[-1] - ys[0]))

        write(page, (x0, y0 - 16), panel.replace("_", " "), 38, "ls", x1 - x0)
        for y in ys:
            pen.line((x0, at(0, y)[1], x1, at(0, y)[1]), PALE, 2)
            if k % columns == 0:
                write(page, (x0 - 14, at(0, y)[1]), f"{y:g}", anchor="rm")
        for x, text in xs.items():
            place, half = at(x + turned * pad, 0)[0], ImageFont.load_default(34).getlength(text) / 2
            pen.line((place, y0, place, y1), PALE, 2)
            if k + columns >= len(curves) and turned:
                write(page, (at(x, 0)[0] + 20, y1 + 18), text, 36, angle=40)
            elif k + columns >= len(curves) and place - half > end:  # of numbers too close, only some are written
                write(page, (place, y1 + 14), text, anchor="ma")
                end = place + half + 12
        pen.line((x0, y0, x0, y1, x1, y1), "black", 3)
        for name, line in lines.items():
            ink, star = styles[name]
            if not turned:
                pen.line([at(x, np.ravel(y)[0]) for x, y in sorted(line.items())], ink, 5 if star else 3, "curve")
            for x, value in line.items() if star else ():
                y, *interval = np.ravel(value)
                if interval:
                    pen.line([at(x, interval[0]), at(x, interval[1])], ink, 3)
                    for px, py in (at(x, end) for end in interval):
                        pen.line((px - r / 2, py, px + r / 2, py), ink, 3)
                mark(page, *at(x, y), styles[name], r)
    write(page, (36, top + rows * high / 2), labels[1], 38, angle=90)
    bottom = top + rows * high + (240 if turned else 70)
    write(page, (WIDTH / 2, bottom - 50), labels[0], 38, "ma")
    for k, note in enumerate(notes):
        write(page, (40, bottom + 52 * k), note, 34, room=WIDTH - 80, ink=GREY)
    return save(page, bottom + 52 * len(notes) + 20, path)


def percent(results, model, column):
    """Mean IoU of a column as "point fog", and its interval: (IoU, low, high)."""
    return tuple(100 * x for x in (results["means"][model][column][0], *results["intervals"][model][column][0]))


def oracles(images, models, conditions):
    """The paper's oracles: the IoU that the best choice among `models`, known from the truth, would reach.

    Oracle-Corrupt chooses the model that is best in each condition, Oracle-Instance the one that is best on each image
    in each condition. Returns {oracle: {"iou": {"point fog": mean over masks, "point degraded": ...}, "chosen":
    {"point": {model: share of the choices in corruptions}, ...}}}. Of equal models the first is chosen.
    """
    found = {oracle: dict(iou={}, chosen={}) for oracle in ORACLES}
    masks, bad = [len(image["indices"]) for image in images], np.array([c != "clear" for c in conditions])
    for prompt in PROMPTS:
        scores = np.array([[[np.mean(image["scores"][model][condition][prompt], axis=0)[0] for image in images]
                            for condition in conditions] for model in models])  # (models, conditions, images)
        means = np.average(scores, axis=2, weights=masks)
        instance = np.average(scores.max(0), axis=1, weights=masks)
        for oracle, best, choice in zip(ORACLES, (means.max(0), instance), (means.argmax(0), scores.argmax(0))):
            found[oracle]["iou"] |= {f"{prompt} {condition}": float(x) for condition, x in zip(conditions, best)}
            if bad.any():
                found[oracle]["iou"][f"{prompt} degraded"] = float(best[bad].mean())
                found[oracle]["chosen"][prompt] = {m: float((choice[bad] == k).mean()) for k, m in enumerate(models)}
    return found


def figure_corruptions(results, path):
    """Figure 2: IoU in each condition, a mark per model. Of several LoRAs it also shows the oracles: where ranks are
    best for different corruptions, Oracle-Corrupt lies above them all in "mean degraded"; where they are best for
    different images, Oracle-Instance lies higher still."""
    conditions, models = plain(results["conditions"]), list(results["means"])
    loras = [model for model in models if results["models"][model]["method"] == "lora"]
    best = oracles(results["images"], loras, conditions) if len(loras) > 1 else {}
    styles = styles_of(models) | {oracle: ORACLES[oracle] for oracle in best}
    xs = dict(enumerate(conditions)) | {len(conditions) + 0.4: "degraded"}  # set apart
    step = min(0.2, 0.86 / len(styles))
    curves = {f"{prompt} prompts": {name: {
        k + (j - (len(styles) - 1) / 2) * step:
            100 * best[name]["iou"][f"{prompt} {c}"] if name in best else percent(results, name, f"{prompt} {c}")
        for k, c in xs.items()} for j, name in enumerate(styles)} for prompt in PROMPTS}
    shares = {oracle: found["chosen"]["point"].items() for oracle, found in best.items()}
    notes = [f"{oracle} chooses, by points: " + ", ".join(f"{model} {100 * share:.0f} %" for model, share in chosen)
             for oracle, chosen in shares.items()]
    xs = {k: c.replace("_", " ").replace("degraded", "mean degraded") for k, c in xs.items()}
    return panels(results, "IoU by corruption", curves, styles, xs, ("", "IoU (%)"), path, 1,
                  800, 0.5, True, min(14, 0.62 * step * 2630 / len(xs)), notes)


def strengths(results):
    """{corruption: {strength: condition}}, 0 being "clear"; {} where no condition names a strength."""
    found = {name: {0.0: "clear"} for name in corrupted(results["conditions"])}
    for condition in results["conditions"]:
        name, strength = data.name_and_strength(condition)
        if name in found:
            found[name][strength] = condition
    return found if "clear" in results["conditions"] and any("@" in c for c in results["conditions"]) else {}


def by_strength(results, title, curves, styles, label, path):
    """A panel per corruption and one for their mean, over strength. curves {corruption: {name: {strength: y}}}."""
    xs = sorted({x for lines in curves.values() for line in lines.values() for x in line})
    mean = {name: {x: np.mean([lines[name][x] for lines in curves.values()]) for x in xs
                   if all(x in lines[name] for lines in curves.values())} for name in styles}
    return panels(results, title, curves | {"mean of the corruptions": mean}, styles, {x: f"{x:g}" for x in xs},
                  ("strength of the corruption (0: clear, 1: the benchmark's)", label), path)


def figure_strength(results, path):
    """Robustness: IoU from points against the strength of each corruption. The slower a line falls, the better."""
    styles = styles_of(results["means"])
    curves = {name: {model: {x: percent(results, model, f"point {condition}")[0] for x, condition in taken.items()}
                     for model in styles} for name, taken in strengths(results).items()}
    return by_strength(results, "IoU by strength of the corruption, point prompts", curves, styles, "IoU (%)", path)


def unpack_gates(results, model, condition):
    """A model's gates in a condition: of each layer (vectors bool (images, decisions, components), spaces (images,
    decisions)). A layer decides once for an image, or once for each window."""
    options = results["models"][model]["options"]
    rank = sum(np.sum(value) for key, value in options.items() if key.startswith("rank") or key == "experts")
    layers = []
    for of_images in zip(*(image["gates"][model][condition] for image in results["images"])):
        codes, spaces = [], []
        for decisions in of_images:
            spaces.append([space for space, _ in decisions])
            codes.append([np.frombuffer(bytes.fromhex(code), np.uint8) for _, code in decisions])
        layers.append((np.unpackbits(np.array(codes), axis=2, count=int(rank)).astype(bool), np.array(spaces)))
    return layers


def figure_strength_gates(results, model, path):
    """How the gates follow the strength: components of an image's vector that differ from its own clear one, mean over
    images. A thin line per layer, from pale (first) to dark (last); black: the mean over layers."""
    clear, curves = unpack_gates(results, model, "clear"), {}
    layers = {f"layer {k}": k for k in range(len(clear))}
    for name, taken in strengths(results).items():
        flips = {}
        for x, condition in taken.items():
            pairs = zip(unpack_gates(results, model, condition), clear)
            flips[x] = np.array([(now != before).sum(2).mean() for (now, _), (before, _) in pairs])
        curves[name] = {layer: {x: flip[k] for x, flip in flips.items()} for layer, k in layers.items()}
        curves[name]["mean over layers"] = {x: flip.mean() for x, flip in flips.items()}
    fade = 1 - np.arange(len(layers)) / max(1, len(layers) - 1)
    styles = {layer: (tuple(np.int_(np.array([0, 60, 130]) + fade[k] * np.array([185, 160, 115])).tolist()), None)
              for layer, k in layers.items()} | {"mean over layers": (INKS[0], STARS[0])}
    return by_strength(results, f"Gates of {model}: components that differ from the clear image's", curves, styles,
                       "components that differ", path)


def figure_gates(results, model, path):
    """Figure 6 over all images: a block per layer, a row per condition, a column per component, the lower-rank set
    left of the red line; the darker, the more images have it on. Rows that differ show that the gates answer to the
    corruption, grey that they answer to the image. Right: mean number of components on; share of images in the
    higher-rank set."""
    conditions, low = plain(results["conditions"]), results["models"][model]["options"].get("rank_low", 0)
    unpacked = [unpack_gates(results, model, condition) for condition in conditions]
    on = np.array([[vectors.mean((0, 1)) for vectors, _ in layers] for layers in unpacked])  # (conditions, layers, r)
    higher = np.array([[spaces.mean() for _, spaces in layers] for layers in unpacked])  # (conditions, layers)
    (_, layers, rank), line, left, gap = on.shape, 38, 330, 20 if low else 0
    cell = max(2, 870 // rank)  # two blocks side by side; at least one pixel of the halved page
    pitch, block = cell * rank + gap + 340, line * len(on) + 110
    page = Image.new("RGB", (max(WIDTH, left + 2 * pitch), 300 + -(-layers // 2) * block), "white")
    y, pen = heading(page, f"Gates of {model}: how often a component is on", results), ImageDraw.Draw(page)
    page.paste(Image.fromarray(np.tile(np.uint8(255 - np.arange(768) // 3), (30, 1))), (left, y))
    pen.rectangle((left, y, left + 768, y + 30), None, GREY, 2)
    write(page, (left - 14, y + 15), "never", anchor="rm")
    sets = f"{low} of the lower-rank set | {rank - low} of the higher-rank set" if low else f"{rank} components"
    write(page, (left + 784, y + 15), f"in all images. Columns: {sets}. Right: means over images", anchor="lm",
          room=page.width - left - 800)
    for layer in range(layers):
        x, top = left + layer % 2 * pitch, y + 120 + layer // 2 * block
        greys = Image.fromarray(np.uint8(255 - np.round(255 * on[:, layer])))
        for first, last, x0 in (*[(0, low, x)] * (low > 0), (low, rank, x + cell * low + gap)):
            x1, bottom = x0 + cell * (last - first), top + line * len(on)
            part = greys.crop((first, 0, last, len(on))).resize((x1 - x0, bottom - top), Image.Resampling.NEAREST)
            page.paste(part, (x0, top))
            pen.rectangle((x0, top, x1, bottom), None, GREY, 2)
        if low:
            pen.line((x + cell * low + gap / 2, top, x + cell * low + gap / 2, bottom), RED, 6)
        heads = [("count", on[:, layer].sum(1), "{:.1f}"), ("higher", 100 * higher[:, layer], "{:.0f} %")]
        write(page, (x, top - 12), f"layer {layer}", 38, "ls")
        for k, (head, values, form) in enumerate(heads if low else heads[:1]):
            write(page, (x1 + 130 + 140 * k, top - 12), head, 32, "rs")
            for row, value in enumerate(values):
                write(page, (x1 + 130 + 140 * k, top + line * (row + 0.5)), form.format(value), 32, "rm")
        for row, condition in enumerate(conditions if layer % 2 == 0 else ()):
            write(page, (x - 16, top + line * (row + 0.5)), condition.replace("_", " "), 32, "rm", left - 30)
    return save(page, bottom + 40, path)


def temperatures(results):
    """{temperature: GaRA model}: the most models that differ in nothing else."""
    groups = {}
    for model, about in results["models"].items():
        if about["method"] == "gara":
            ranks = tuple(about["options"][key] for key in ("rank_low", "rank_high", "scope"))
            groups.setdefault(ranks, {}).setdefault(about["options"]["temperature"], model)
    return max(groups.values(), key=len, default={})


def figure_temperature(results, path):
    """Figure 5: IoU against the temperature that GaRA's Gumbel-Sigmoid was trained with. Flat: it matters little."""
    models, kinds = temperatures(results), ["clear", "degraded"] if len(plain(results["conditions"])) > 1 else ["clear"]
    curves = {f"{prompt} prompts": {kind: {np.log(t): percent(results, models[t], f"{prompt} {kind}") for t in models}
                                    for kind in kinds} for prompt in PROMPTS}
    xs = {np.log(t): f"{t:g}" for t in sorted(models)}
    return panels(results, "IoU by temperature of GaRA's gates", curves,
                  dict(zip(kinds, ((INKS[2], STARS[0]), (RED, STARS[1])))), xs, ("temperature in training (log scale)",
                  "IoU (%)"), path, 2, 800, 0.08 * (max(xs) - min(xs)), r=14)


# Okabe and Ito's colours, told apart by colour-blind readers
COLOURS = [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)]


def paint(image, masks, scale):
    """The picture, enlarged, with each object tinted in its colour: a Pillow image."""
    canvas = image.astype(np.float32)
    for k, mask in enumerate(masks):
        canvas[mask] = 0.35 * canvas[mask] + 0.65 * np.array(COLOURS[k % len(COLOURS)])
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    return Image.fromarray(canvas.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def picture(kept, models, path, title="Masks from three points"):
    """Figure 4: rows of the degraded picture with its points, the truth, each model's masks from the points with their
    mean IoU. An object has one colour throughout its row. kept: see `samples_to_show`; label is a row's remark."""
    tile, pitch, titles, top = 480, 500, ["input and points", "truth", *models], 186
    scales = [tile / max(row["image"].shape[:2]) for row in kept]
    page = Image.new("RGB", (len(titles) * pitch + 60, 220 + len(kept) * (tile + 140)), "white")
    write(page, (40, 30), title, 48, room=page.width - 80)
    for c, text in enumerate(titles):
        write(page, (40 + c * pitch + tile / 2, 120), text, 40, "ma", tile)
    for row, scale in zip(kept, scales):
        masks = [[], row["truth"], *(row["predictions"][model] for model in models)]
        texts = [row["condition"].replace("_", " "), f"objects: {len(row['truth'])}",
                 *(f"IoU {100 * row['iou'][model]:.1f} %" for model in models)]
        for c, (these, text) in enumerate(zip(masks, texts)):
            view, x = paint(row["image"], these, scale), 40 + c * pitch + tile / 2
            dots = ImageDraw.Draw(view)
            for k, clicks in enumerate(row["points"] if c == 0 else ()):
                for px, py in (clicks + 0.5) * scale:
                    dots.ellipse((px - 11, py - 11, px + 11, py + 11), COLOURS[k % len(COLOURS)], "white", 4)
            page.paste(view, (round(x - view.width / 2), top))
            write(page, (x, top + view.height + 8), text, 34, "ma", tile)
        write(page, (40 + tile / 2, top + view.height + 50), row["label"], 34, "ma", tile, ink=GREY)
        top += view.height + (134 if row["label"] else 90)
    return save(page, top, path)


def samples_to_show(results, models, datasets, args, rows=6):
    """For `picture`: those where the last model gains least, middling and most over the first, by points, each of
    another picture and corruption as far as they last. One model alone: where it is worst, middling and best."""
    names, bad = list(models), corrupted(results["conditions"]) or ["clear"]

    def iou(image, model, condition):
        return float(np.mean(image["scores"][model][condition]["point"], axis=0)[0])

    ranked = sorted((iou(image, names[-1], condition) - (iou(image, names[0], condition) if len(names) > 1 else 0), k,
                     condition) for k, image in enumerate(results["images"]) for condition in bad)
    middle = sorted(range(len(ranked)), key=lambda place: abs(place - (len(ranked) - 1) / 2))
    ends = dict(least=ranked, middling=[ranked[place] for place in middle], most=ranked[::-1])
    chosen = []
    for kind, order in ends.items():
        for _ in range(rows // 3):
            taken = [row for _, row in chosen]
            left = [row for row in order if row not in taken]
            others = (row for row in left if all(row[1] != k and row[2] != condition for _, k, condition in taken))
            best = next(others, left[0] if left else None)  # another picture and corruption, or else any
            chosen += [(kind, best)] if best else []
    shown = []
    for kind, (value, k, condition) in chosen:
        row = results["images"][k]
        sample = datasets[args.data.index(row["data"])][row["at"]]
        masks, image = sample.masks(), sample.image(condition)
        points, boxes = sample.prompts(masks)
        predictions = {name: next(iter(answers(model, [image], points, boxes, amp=args.amp)))["point"].cpu().numpy()
                       for name, model in models.items()}
        remark = f"{kind} gain: {100 * value:+.1f}" if len(names) > 1 else f"IoU {100 * value:.1f} %"
        shown.append(dict(condition=condition, image=image, points=points, truth=masks, predictions=predictions,
                          iou={name: iou(row, name, condition) for name in names}, label=remark))
    return shown


def figures(results, out):
    """Draws every figure that the results allow into folder `out`. Returns the paths."""
    os.makedirs(out, exist_ok=True)
    gated = [model for model, about in results["models"].items() if about["method"] not in ("sam", "lora")
             and all(model in image["gates"] for image in results["images"])]
    stronger, asked = bool(strengths(results)), []
    asked += [("corruptions", figure_corruptions, ())] * (len(plain(results["conditions"])) > 1)
    asked += [("strength", figure_strength, ())] * stronger
    asked += [(f"gates_{model}", figure_gates, (model,)) for model in gated]
    asked += [(f"strength_gates_{model}", figure_strength_gates, (model,)) for model in gated if stronger]
    asked += [("temperature", figure_temperature, ())] * (len(temperatures(results)) > 1)
    safe = ("".join(c if c.isalnum() or c in "_-" else "_" for c in name)[:100] for name, *_ in asked)
    return [draw(results, *model, os.path.join(out, f"{name}.png")) for name, (_, draw, model) in zip(safe, asked)]


# ---------------------------------------------------------------------------------------------------------------------
# Command line.
# ---------------------------------------------------------------------------------------------------------------------


NAMES = dict(gara="GaRA", gara_flat="GaRA flat", gara_space="GaRA, gating 1 alone", gara_random="GaRA, random gates",
             lora="LoRA", moe_lora="MoE-LoRA")


def name_of(content):
    """What tables call the model of an adapter file: "LoRA 16"; of GaRA, what differs from the paper's setting."""
    options, usual = content["options"], gara.default_options(content["method"], content["backbone"])
    name = NAMES[content["method"]]
    ranks = [value for key, value in options.items() if key.startswith("rank") or key == "experts"]
    if "rank_low" not in options or any(options[key] != usual[key] for key in ("rank_low", "rank_high")):
        name += " " + ",".join(map(str, np.ravel(ranks)))
    if options.get("scope", "image") != "image":
        name += f" per {options['scope']}"
    if options.get("temperature", 0.5) != 0.5:
        name += f" T={options['temperature']:g}"
    return name


def load_models(ckpts, backbone, checkpoint, device, predictors=()):
    """(models, about, backbone): {"SAM": plain SAM, and one entry per adapter file and plugged predictor}; what
    results.json says of each, by the same names. All SAMs share the frozen weights."""
    paths = [path for path in ckpts if path != "sam"]
    contents, whole = {}, []
    for path in paths:
        try:
            contents[path] = gara.read_adapter(path)
        except gara.WholeModel:
            whole.append(path)
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
    about = {"SAM": dict(file=None, method="sam", options={}, learnable_parameters=None)}
    for path, content in contents.items():
        name = name_of(content)
        name = name if name not in models else f"{name} ({path})"
        models[name] = copy.deepcopy(base, dict(frozen))  # the memo keeps the frozen tensors shared
        gara.load_adapter(models[name], path)
        models[name].to(device).eval()
        count = sum(value.numel() for value in gara.adapter_state(models[name]).values())
        about[name] = dict(file=path, method=content["method"], options=content["options"], learnable_parameters=count)
    for path in whole:
        name = f"SAM ({path})"
        models[name] = build_sam(backbone, path, *sizes).to(device)
        about[name] = dict(file=path, method="full", options={}, learnable_parameters=None)
    for spec in predictors:
        name = spec.rpartition(":")[2]
        name = name if name not in models else f"{name} ({spec})"
        models[name] = load_predictor(spec)
        about[name] = dict(file=None, method="predictor", options=dict(predictor=spec), learnable_parameters=None)
    return models, about, backbone


def load_predictor(spec):
    """The object that "FILE.py:NAME" names, or makes if NAME is a class or function: see the README. ValueError."""
    made = from_file(spec, "--predictor")
    if isinstance(made, type) or not hasattr(made, "set_image"):
        with foreign("--predictor", spec):
            made = made()
    if not callable(getattr(made, "set_image", None)) or not callable(getattr(made, "predict", None)):
        raise ValueError(f"--predictor {spec}: it has no set_image and predict as the official SamPredictor has")
    return made


def parse(argv):
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    add = parser.add_argument
    add("--ckpt", nargs="+", default=["sam"], help="adapter files, or whole SAMs as train.py --method full makes them; "
        "'sam' is plain SAM, which is always measured too")
    add("--predictor", nargs="+", default=[], metavar="FILE.py:NAME", help="other models: objects with SamPredictor's "
        "set_image and predict, or what makes one")
    add("--data", nargs="+", metavar="ROOT", help="dataset folders of any kind that data.py reads (demo/ is made if it "
        "is not there); KIND=ROOT where the kind is not plain to see")
    add("--from", nargs="+", metavar="JSON", dest="stored", help="measure nothing: tables and figures of these "
        "results.json, of one or several runs on the same data")
    add("--prompts", nargs="+", metavar="JSON", help="use exactly these prompts (data.py ROOT --export-prompts JSON)")
    add("--strict", action="store_true", help="a bad or missing file is an error; else it is skipped and counted")
    add("--split", default="test")
    add("--backbone", choices=BACKBONES, help="only needed without adapters (default vit_t)")
    add("--checkpoint", help="SAM weights; default: assets/, checkpoints/, the torch hub cache, else downloaded")
    add("--conditions", nargs="+", metavar="NAME", help="what to take the pictures in (default: clear and the 15 "
        "corruptions); also night and underwater")
    add("--no-corrupt", action="store_true", help="use the pictures as they are: --conditions clear")
    add("--strengths", nargs="+", type=float, default=[], metavar="S", help="also corrupt this strongly (0.5 1.5 2), "
        "beside the benchmark's strength 1: for curves of robustness")
    add("--average", choices=("masks", "images"), help="what counts alike in a mean (default masks, as in the paper)")
    add("--paper", metavar="NAME", help="print the paper's figures below ours: of a benchmark (lvis) or a table (table5)")
    add("--costs", action="store_true", help="also measure memory and speed")
    add("--limit", type=int, help="only this many pictures, spread over the split")
    add("--out", help="folder for results.json, results.csv and the figures (default results/)")
    add("--batch-size", type=int, default=4, help="conditions of a picture that are encoded at once")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    add("--amp", choices=("off", "bf16"), default="off", help="bf16: the encoder in bfloat16")
    add("--workers", type=int, help="loader processes (default: half the cores, at most 8)")
    args = parser.parse_args(argv)
    if bool(args.data) == bool(args.stored):
        parser.error("say --data ROOT to measure, or --from results.json to draw what was measured")
    if args.paper and args.paper not in read_paper():
        parser.error(f"--paper {args.paper}: there are {', '.join(sorted(read_paper()))}")
    args.out = args.out or "results"
    for name, least in (("limit", 1), ("batch_size", 1), ("workers", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be {least} or more")
    if args.no_corrupt and (args.strengths or args.conditions):
        parser.error("--no-corrupt leaves no corruptions for --strengths or --conditions")
    strengths = sorted({s for s in args.strengths if s not in (0, 1)})  # those are "clear" and "fog"
    args.conditions = list(dict.fromkeys(["clear"] if args.no_corrupt else args.conditions or data.CONDITIONS))
    args.conditions += [f"{name}@{s:g}" for s in strengths for name in corrupted(args.conditions)]
    for condition in args.conditions:
        try:
            data.name_and_strength(condition)
        except data.DatasetError as error:
            parser.error(f"--{'strengths' if args.strengths else 'conditions'}: {error}")
    args.process, args.processes = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    if args.workers is None:
        args.workers = min(8, (os.cpu_count() or 2) // 2 // args.processes)
    gpu = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}" if args.processes > 1 else "cuda"
    args.device = args.device or (gpu if torch.cuda.is_available() else "cpu")
    return args


def measure(args, models, about, backbone):
    """All scores: the content of results.json, or None in all processes but the first. Its form:

    format, data (roots), split, backbone, ckpt, prompts (files), amp, average, torch, machine, seconds, conditions;
    models: {name: {file, method, options, learnable_parameters}};
    means, intervals, differences: see `summarize`; by_data: the same of each root, where there are several;
    costs: {heads, rows}, with --costs alone: Table 8; skipped: a line for each picture that could not be read;
    images: [{data (root), name, size, indices, areas, scores, gates}, ...], see `evaluate`: every single score.
    """
    datasets = data.load_datasets(args.data, args.split, args.strict, args.prompts)
    os.makedirs(args.out, exist_ok=True)
    started, images, leftovers = time.monotonic(), [], []
    for number, (root, dataset) in enumerate(zip(args.data, datasets)):
        if args.limit:
            dataset.samples = data.spread(dataset, args.limit)
        rows, paths = shared(args, models, dataset, number)
        if args.process:
            continue
        leftovers += paths
        bad = [row["skipped"] for row in rows if "skipped" in row]
        dataset.skipped += [line for line in bad if line not in dataset.skipped]
        if len(bad) == len(rows):
            raise data.DatasetError(f"{dataset.summary()}: no sample could be read, nothing to measure")
        images += [dict(data=root, **row) for row in rows if "skipped" not in row]
        print(dataset.summary())
    if args.process:
        return None
    results = dict(
        format=FORMAT, data=args.data, split=args.split, backbone=backbone, ckpt=args.ckpt, prompts=args.prompts,
        amp=args.amp, average=args.average or "masks", torch=torch.__version__, machine=platform.platform(),
        seconds=round(time.monotonic() - started, 1), conditions=args.conditions, models=about)
    results["skipped"] = [line for dataset in datasets for line in dataset.skipped]
    results["images"] = images
    print(f"{len(images):,} images, {sum(len(image['indices']) for image in images):,} masks, {len(args.conditions)} "
          f"conditions; {backbone} on {args.processes} x {args.device}, {results['seconds']:.0f} s\n")
    if args.costs:
        most = max(images, key=lambda image: len(image["indices"]))
        results["costs"] = costs(models, about, datasets[args.data.index(most["data"])][most["at"]], args.amp)
    data.save_text(json.dumps(add_summaries(results)), os.path.join(args.out, "results.json"))
    for path in leftovers:
        os.remove(path)
    picture(samples_to_show(results, models, datasets, args), list(models), os.path.join(args.out, "samples.png"))
    return results


def main(argv=None):
    """Run the command line; returns the exit code. A user's mistake ends in one line."""
    args = parse(argv)
    try:
        if args.stored:
            results = merge({path: read_results(path) for path in args.stored})
            results["average"] = args.average or results["average"]
            add_summaries(results)
            os.makedirs(args.out, exist_ok=True)
        else:
            keep_freed_memory()
            models, about, backbone = load_models(args.ckpt, args.backbone, args.checkpoint, torch.device(args.device),
                                                  args.predictor)
            if args.process == 0:
                for root in args.data:
                    data.make_missing_demo(root)
            if args.processes > 1:  # they only wait for each other, the slowest one as long as it takes
                dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
                dist.barrier()
            results = measure(args, models, about, backbone)
            if results is None:
                return 0
        print_tables(results, args.paper)
        data.save_text(as_csv(results), os.path.join(args.out, "results.csv"))
        paths = figures(results, args.out)
        if args.data:
            paths += [os.path.join(args.out, name) for name in ("results.json", "samples.png")]
        print(f"written: {', '.join([os.path.join(args.out, 'results.csv'), *paths])}")
    except (data.DatasetError, ValueError, OSError, RuntimeError, AssertionError) as error:  # last: no CUDA in torch
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
