"""Measures SAM and adapters on the same images, prompts and noise: the paper's tables and figures.

    python evaluate.py --ckpt runs/vit_t_gara/gara.pt --data demo/              SAM beside GaRA, split test
    python evaluate.py --ckpt gara.pt lora.pt --checkpoint sam_vit_b_01ec64.pth --data robustseg/ --split lvis
    python evaluate.py --ckpt gara.pt --data bdd100k/ LIS/ --split val --no-corrupt         images as they are
    python evaluate.py --ckpt gara.pt --predictor hq.py:HQ_SAM --data robustseg/            another project's model too
    python evaluate.py --from results/results.json more/results.json    tables and figures again, from stored scores

Every image is taken clear and in each of the 15 corruptions, encoded once in each condition, and every object in it is
predicted twice: from three points and from its box. Prompts and noise derive from the image's name alone (see data.py),
so all methods, and all labs, predict from the same input. A score compares masks at the image's own resolution. Tables
give the mean over masks; "degraded" is the mean over the corruptions (`data.degraded_conditions`). Several datasets are
measured one by one and as one, every mask counting alike. torchrun shares the images among its processes. Every score
is kept at once, so the same command goes on where an interrupted one stopped.

A score is an estimate from the images at hand. So each mean has a 95 % interval by bootstrap: draw as many images again,
with replacement, 2,000 times. The difference of two models has its own interval, from the same draws: both predict the
same masks, so it is far narrower than the two intervals suggest. Only differences beyond it are called better.

The file in the order of the data: measure (predictions -> scores), summarize (scores -> means and intervals), tables,
command line. Figures are drawn by assets/figures.py.

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
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

import data
import gara
from assets import figures
from data import PROMPTS
from sam import BACKBONES, ResizeLongestSide, build_sam, find_checkpoint, foreign, from_file, keep_freed_memory

FORMAT = "gara-sam results 3"
METRICS = ("IoU", "Dice", "PA")
AVERAGES = ("masks", "images")  # what counts alike in a mean
DECODED_AT_ONCE = 32  # prompts; their masks at full size are what takes memory
DRAWS = 2000  # of the bootstrap
NOISE = 1e-9  # differences of sums that are equal but for rounding
# What reading raises from a file of scores that is damaged, or of another form.
DAMAGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, data.DatasetError)


# ---------------------------------------------------------------------------------------------------------------------
# Measure: predictions and their scores.
# ---------------------------------------------------------------------------------------------------------------------


def mask_scores(prediction, truth):
    """IoU, Dice and pixel accuracy (PA) of masks: bool (M, H, W) twice -> float64 (M, 3). Tensors or arrays.

    IoU = |P and T| / |P or T|, Dice = 2 |P and T| / (|P| + |T|), PA = the share of the image's pixels that P gets right,
    all counted at the image's own resolution however small the mask. An empty prediction scores 0 in the first two.
    data.py drops empty truths; should both be empty nevertheless, they agree and score 1.
    """
    prediction = torch.as_tensor(prediction)
    truth = torch.as_tensor(truth, device=prediction.device)

    def area(masks):
        return masks.sum((-2, -1)).double()

    both = area(prediction & truth)
    either = area(prediction | truth)
    empty = (either == 0).double()
    iou = (both + empty) / (either + empty)
    dice = (2 * both + empty) / (either + both + empty)
    accuracy = 1 - (either - both) / truth.shape[-2:].numel()
    return torch.stack([iou, dice, accuracy], dim=-1).cpu().numpy()


def prepare(conditions, sample):
    """What a worker does for one image: (the image in every condition, points, boxes, masks, their indices).

    Whatever a bad sample raises comes back as its SampleError, for the main process to report.
    """
    try:
        masks = sample.masks()
        points, boxes = sample.prompts(masks)
        images = [sample.image(condition) for condition in conditions]
        return images, points, boxes, torch.from_numpy(masks), list(sample.indices)
    except data.SampleError as error:
        return error
    except Exception as error:  # no image ends the evaluation of the others
        return data.SampleError(f"{sample.clear}: cannot be used ({error!r})")


def prepared(dataset, conditions, workers, todo):
    """What `prepare` makes of each image numbered in `todo`."""
    loader = torch.utils.data.DataLoader(
        dataset,
        sampler=todo,
        batch_size=None,
        collate_fn=functools.partial(prepare, conditions),
        num_workers=workers,
        worker_init_fn=data.start_worker)
    return data.from_workers(loader)


def predictions(model, images, points, boxes, batch_size=4, amp="off"):
    """What a model, a Sam or a plugged predictor, predicts for one image in several conditions.

    images: uint8 (H, W, 3) each; points (M, 3, 2) and boxes (M, 4) in their pixels. Yields for each image in turn
    {"point": bool (M, H, W), "box": bool (M, H, W)}, and with gates also "gates": [layer, ...], a layer
    [[space, hex digits of the packed vector], ...] of its one decision, or of one for each window.
    """
    if is_sam(model):
        return predict_sam(model, images, points, boxes, batch_size, amp)
    return predict_plugged(model, images, points, boxes)


def is_sam(model):
    """Whether it is a SAM of this project, not a plugged predictor."""
    return not hasattr(model, "set_image")


def is_gated(model):
    """Whether its gates decide anything: LoRA's are always open."""
    return bool(getattr(model, "adapter", None)) and model.adapter["method"] != "lora"


@torch.no_grad()
def predict_sam(sam, images, points, boxes, batch_size=4, amp="off"):
    """`predictions` of a Sam, by the same calls as SamPredictor's but `batch_size` conditions at once."""
    resize = ResizeLongestSide(sam.image_encoder.img_size)
    size = images[0].shape[:2]
    points = torch.from_numpy(resize.apply_coords(points, size)).to(sam.device)
    boxes = torch.from_numpy(resize.apply_boxes(boxes, size)).to(sam.device)
    for first in range(0, len(images), batch_size):
        batch = images[first:first + batch_size]
        scaled = np.stack([resize.apply_image(image) for image in batch])
        x = torch.from_numpy(scaled).to(sam.device).permute(0, 3, 1, 2)  # (N, 3, h, w)
        with torch.autocast(sam.device.type, torch.bfloat16, enabled=amp == "bf16"):
            embeddings = sam.image_encoder(sam.preprocess(x))
        masks = decode_all(sam, embeddings.float(), points, boxes, size)  # the decoder costs little: always float32
        gates = pack_gates(gara.gates(sam)) if is_gated(sam) else []
        for k in range(len(batch)):
            prediction = {prompt: masks[prompt][k] for prompt in PROMPTS}
            if gates:
                prediction["gates"] = gates[k]
            yield prediction


def decode_all(sam, embeddings, points, boxes, size):
    """Every prompt on every embedding: {"point": bool (N, M, H, W), "box": the same}.

    embeddings (N, C, h, w); points (M, 3, 2) and boxes (M, 4) in pixels of the scaled image; size: (H, W).
    """
    input_size = ResizeLongestSide(sam.image_encoder.img_size).get_preprocess_shape(*size)
    shape = (len(embeddings), len(points))
    pairs = torch.cartesian_prod(*map(torch.arange, shape)).to(sam.device)  # (N x M, 2)
    masks = {prompt: [] for prompt in PROMPTS}
    for chunk in pairs.split(DECODED_AT_ONCE):
        image_index, prompt_index = chunk.T
        labels = torch.ones(len(chunk), 3, dtype=torch.long, device=sam.device)
        given = dict(
            point=dict(points=(points[prompt_index], labels)),
            box=dict(boxes=boxes[prompt_index]))
        for prompt in PROMPTS:
            low_res, _ = sam.decode(embeddings, **given[prompt], image_index=image_index)
            logits = sam.postprocess_masks(low_res, input_size, size)
            masks[prompt].append(logits[:, 0] > sam.mask_threshold)
    return {prompt: torch.cat(parts).unflatten(0, shape) for prompt, parts in masks.items()}


def pack_gates(layers):
    """What `gara.gates` gave, image by image, for results.json: see `predictions`."""
    images = [[] for _ in layers[0]["vector"]]
    for layer in layers:
        codes = np.packbits(layer["vector"].cpu().numpy(), axis=-1)
        for image, space, code in zip(images, layer["space"].tolist(), codes):
            if code.ndim == 1:  # one decision for the whole image
                space, code = [space], [code]
            decisions = [(s, c.tobytes().hex()) for s, c in zip(space, code)]
            image.append(decisions)
    return images


def predict_plugged(predictor, images, points, boxes):
    """`predictions` of any object with the official SamPredictor's set_image and predict: a call for each prompt."""
    labels = np.ones(3, np.int64)
    prompts = dict(point=[dict(point_coords=each, point_labels=labels) for each in points],
                   box=[dict(box=box) for box in boxes])
    for image in images:
        predictor.set_image(image)
        expected = (1, *image.shape[:2])
        prediction = {}
        for kind in PROMPTS:
            masks = []
            for prompt in prompts[kind]:
                mask = np.asarray(predictor.predict(**prompt, multimask_output=False)[0])
                if mask.shape != expected:
                    raise ValueError(f"--predictor: predict() gave masks of shape {mask.shape} for a picture of "
                                     f"{image.shape}: with multimask_output=False they must be {expected}")
                masks.append(mask)
            prediction[kind] = torch.from_numpy(np.concatenate(masks) > 0)
        yield prediction


def evaluate(models, dataset, conditions, batch_size=4, amp="off", workers=0, todo=None):
    """Score every mask of `dataset`, or of its images numbered in `todo`. models: {name: Sam or predictor}.

    Yields a row for each image, in order: dict of at (its number), name, size [H, W], indices (of its masks in the
    file), areas (their pixels), scores[model][condition][prompt] = [[IoU, Dice, PA], ...], and for models with gates
    gates[model][condition] (see `predictions`). An image that cannot be read gives dict(at, skipped=why).
    """
    todo = range(len(dataset)) if todo is None else todo
    for item, at in zip(prepared(dataset, conditions, workers, todo), todo):
        if isinstance(item, data.SampleError):
            if dataset.skip(item):
                print(f"skipped: {item}", file=sys.stderr)
            yield dict(at=at, skipped=str(item))
            continue

        images, points, boxes, truth, indices = item
        scores, gates = {}, {}
        for name, model in models.items():
            scores[name] = {}
            predicted = predictions(model, images, points, boxes, batch_size, amp)
            for condition, prediction in zip(conditions, predicted):
                by_prompt = scores[name][condition] = {}
                for prompt in PROMPTS:
                    values = mask_scores(prediction[prompt], truth)
                    by_prompt[prompt] = values.round(6).tolist()
                if "gates" in prediction:
                    gates.setdefault(name, {})[condition] = prediction["gates"]
        yield dict(
            at=at,
            name=dataset[at].name,
            size=list(truth.shape[1:]),
            indices=indices,
            areas=truth.sum((1, 2)).tolist(),
            scores=scores,
            gates=gates)


def evaluate_shared(args, models, dataset, number, results):
    """`evaluate`, the images shared by all processes and every row kept in a file at once: (rows in order, files).

    The files, args.out/unfinished-NUMBER-KEY-RANK.jsonl, are named after all settings and models that the rows depend
    on. What a run that was interrupted left there is taken over where the image is still the same, however many
    processes it had; what could not be read is tried again. Rows go to the first process alone.
    """
    files = os.path.join(args.out, f"unfinished-{number}-{key_of(args, models, dataset)}-")
    marks = {at: mark_of(sample, args.conditions) for at, sample in enumerate(dataset)}
    rows, _ = read_rows(files, marks, results)
    wait_for_all()  # nobody may write before everybody has read
    done = [at for at, row in rows.items() if "scores" in row]
    if args.rank == 0 and done:
        print(f"{len(done):,} of {len(marks):,} pictures of {dataset.root} were measured before", file=sys.stderr)

    own = sorted(marks.keys() - done)[args.rank::args.world_size]
    progress = data.Progress(f"evaluating {len(models)} models in {len(args.conditions)} conditions", len(own))
    with open(f"{files}{args.rank}.jsonl", "a") as file:
        file.write("\n")  # ends a line that was cut short
        for row in evaluate(models, dataset, args.conditions, args.batch_size, args.amp, args.workers, own):
            file.write(json.dumps([marks[row["at"]], row]) + "\n")
            file.flush()
            progress.update()
    progress.close()

    wait_for_all()
    if args.rank:
        return [], []
    rows, paths = read_rows(files, marks, results)
    if len(rows) < len(marks):
        raise data.DatasetError(f"{files}*: {len(marks) - len(rows):,} of {len(marks):,} rows are gone or damaged: the "
                                "same command measures them again")
    return [rows[at] for at in marks], paths


def key_of(args, models, dataset):
    """A digest of all that the rows of `evaluate` depend on, but for the images: see `mark_of`."""
    plugged = [spec.rpartition(":")[0] for spec in args.predictor]
    paths = [*args.ckpt, *plugged, *(args.prompts or ())]
    return digest(
        paths,
        dataset.root,
        dataset.split,
        args.limit,
        args.conditions,
        args.amp,
        args.batch_size,
        torch.device(args.device).type,
        torch.__version__,
        list(models),
        gara.fingerprint(models["SAM"]))


def mark_of(sample, conditions):
    """A digest of what a row is measured on: an image's annotation and files."""
    paths = [sample.clear, sample.source]
    for condition in conditions:
        if condition in sample.ready:
            stem = os.path.join(sample.folder, condition, sample.name)
            paths += [stem + ending for ending in data.IMAGE_ENDINGS]
    return digest(paths, sample.name, sample.size, getattr(sample.read, "args", None))


def digest(paths, *parts):
    """A few hex digits that stand for these parts, and for the files: a file is the same while its size and time are."""
    about = [*parts]
    for path in paths:
        if os.path.exists(path):
            state = os.stat(path)
            about.append((path, state.st_size, state.st_mtime_ns))
    return hashlib.sha256(ascii(about).encode()).hexdigest()[:12]


def read_rows(files, marks, results):
    """({number of the image: its row}, the files): all rows that are whole, and whose image still has its mark.

    What a crash or a power cut has damaged is left out, and so measured again.
    """
    rows = {}
    paths = sorted(glob.glob(glob.escape(files) + "*.jsonl"))
    for path in paths:
        with open(path, "rb") as file:
            for line in file:
                try:
                    mark, row = json.loads(line)
                    at, skipped = row["at"], "skipped" in row
                    if not skipped:
                        check_images([row], results)
                    if mark == marks[at] and not (skipped and at in rows):
                        rows[at] = row
                except DAMAGE:
                    continue
    return rows, paths


def wait_for_all():
    """All processes of the run meet here. RuntimeError in those whose fellow has ended."""
    if dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError:
            raise RuntimeError("another process of this run has ended, and said why") from None


def measure(args, models, about, backbone, datasets):
    """All scores: (the content of results.json, files to remove once it is safe); None but in the first process, to
    which the others only contribute. The form of results.json:

    format, data (roots), split, backbone, ckpt, prompts (files), amp, average, torch, machine, seconds, conditions;
    models: {name: {file, method, options, learnable_parameters}};
    means, intervals, differences: see `summarize`; by_data: the same of each root, where there are several;
    skipped: a line for each image that could not be read;
    images: [{data (root), at, name, size, indices, areas, scores, gates}, ...], see `evaluate`: every single score.
    """
    results = dict(
        format=FORMAT,
        data=args.data,
        split=args.split,
        backbone=backbone,
        ckpt=args.ckpt,
        prompts=args.prompts,
        amp=args.amp,
        average=args.average or "masks",
        torch=torch.__version__,
        machine=platform.platform(),
        seconds=None,
        conditions=args.conditions,
        models=about,
        skipped=[],
        images=[])
    started = time.monotonic()
    images, unfinished = results["images"], []
    for number, (root, dataset) in enumerate(zip(args.data, datasets)):
        if args.limit:
            dataset.samples = data.spread(dataset, args.limit)
        rows, paths = evaluate_shared(args, models, dataset, number, results)
        if args.rank:
            continue
        unfinished += paths
        before = len(images)
        for row in rows:
            if "scores" in row:
                images.append(dict(data=root, **row))
            elif row["skipped"] not in dataset.skipped:
                dataset.skipped.append(row["skipped"])
        if len(images) == before:
            raise data.DatasetError(f"{dataset.summary()}: no sample could be read, nothing to measure")
        results["skipped"] += dataset.skipped
        print(dataset.summary())
    if args.rank:
        return None

    results["seconds"] = round(time.monotonic() - started, 1)
    count = sum(len(image["indices"]) for image in images)
    print(f"{len(images):,} images, {count:,} masks, {len(args.conditions)} conditions; {backbone} on "
          f"{args.world_size} x {args.device}, {results['seconds']:.0f} s\n")
    return add_summaries(results), unfinished


# ---------------------------------------------------------------------------------------------------------------------
# Summarize: scores -> means, intervals, differences.
# ---------------------------------------------------------------------------------------------------------------------


def add_summaries(results):
    """Adds to a results.json its means, intervals, differences, and by_data, the same of each of several roots."""

    def summary(images):
        return summarize(images, list(results["models"]), results["conditions"], results["average"])

    results |= summary(results["images"])
    results["by_data"] = {}
    for root in results["data"] if len(results["data"]) > 1 else ():
        results["by_data"][root] = summary([image for image in results["images"] if image["data"] == root])
    return results


def summarize(images, models, conditions, average="masks"):
    """results.json's images -> dict of means, intervals and differences, for columns "point fog", "point degraded", ...

    means[model][column] = [IoU, Dice, PA]; intervals[model][column] = [[low, high], ...], 95 % by bootstrap over images;
    differences[model][other][column] = [[mean, low, high], ...], model less other, for each other before it.
    average: "masks", every mask counts alike, as in the paper's tables; "images", every image. Of fewer than two images
    intervals are as wide as can be: nothing is known.
    """
    columns, sums = score_sums(images, models, conditions)
    weights = np.array([len(image["indices"]) for image in images], float)  # masks of each image
    if average == "images":
        sums = sums / weights[:, None, None, None]
        weights = np.ones_like(weights)
    means = sums.sum(0) / weights.sum()  # (models, columns, metrics)
    drawn = bootstrap(sums, weights)  # (draws, models, columns, metrics)

    found = dict(means={}, intervals={}, differences={})
    for a, model in enumerate(models):
        interval = interval_of(drawn[:, a])
        if len(images) < 2:
            interval[:] = 0, 1
        found["means"][model] = dict(zip(columns, means[a].tolist()))
        found["intervals"][model] = dict(zip(columns, interval.tolist()))
        for b, other in enumerate(models[:a]):
            mean = means[a] - means[b]
            interval = interval_of(drawn[:, a] - drawn[:, b])
            if len(images) < 2:
                interval[:] = -1, 1
            triples = np.concatenate([mean[..., None], interval], axis=-1)
            found["differences"].setdefault(model, {})[other] = dict(zip(columns, triples.tolist()))
    return found


def score_sums(images, models, conditions):
    """(columns, scores summed over each image's masks: (images, models, columns, metrics))."""
    sums = np.empty((len(images), len(models), len(PROMPTS), len(conditions), len(METRICS)))
    for i, image in enumerate(images):
        for m, model in enumerate(models):
            sums[i, m] = figures.scores_of(image, model, conditions).sum(2)
    columns = [f"{prompt} {condition}" for prompt in PROMPTS for condition in conditions]
    parts = [sums.reshape(*sums.shape[:2], len(columns), len(METRICS))]

    degraded = [conditions.index(condition) for condition in data.degraded_conditions(conditions)]
    if degraded:
        parts.append(sums[:, :, :, degraded].mean(3))
        columns += [f"{prompt} degraded" for prompt in PROMPTS]
    return columns, np.concatenate(parts, axis=2)


def bootstrap(sums, weights):
    """Means of DRAWS samples of the images, drawn with replacement: (images, ...) and (images,) -> (draws, ...)."""
    count = len(weights)
    rng = np.random.default_rng(data.seed_of("bootstrap"))
    at_once = max(1, 10 ** 7 // count)  # bounds the memory
    drawn = []
    for first in range(0, DRAWS, at_once):
        size = min(at_once, DRAWS - first)
        times = rng.multinomial(count, np.full(count, 1 / count), size)  # how often each image is drawn
        times = times.astype(float)
        totals = times @ sums.reshape(count, -1)
        means = totals / (times @ weights)[:, None]
        drawn.append(means.reshape(size, *sums.shape[1:]))
    return np.concatenate(drawn)


def interval_of(drawn):
    """95 % of the draws: (draws, ...) -> (..., low and high)."""
    return np.moveaxis(np.percentile(drawn, (2.5, 97.5), axis=0), 0, -1)


def difference(summary, model, other, column, metric=0):
    """(mean, low, high) of model less other."""
    differences = summary["differences"]
    if other in differences.get(model, {}):
        return tuple(differences[model][other][column][metric])
    mean, low, high = differences[other][model][column][metric]
    return -mean, -high, -low


def summaries(results):
    """[(root, what `summarize` gave), ...] of a results.json: of several roots each, and then of all."""
    if results["by_data"]:
        return [*results["by_data"].items(), ("all", results)]
    return [(results["data"][0], results)]


def read_results(path):
    """A results.json. ValueError in one line that names the file if it is none, or damaged."""
    try:
        with open(path, "rb") as file:
            results = json.load(file)
        if results.get("format") == FORMAT:
            check_results(results)
            return results
    except DAMAGE as error:
        raise ValueError(f"{path} is no results.json, or damaged ({type(error).__name__}: {error})") from error
    raise ValueError(f"{path} is no results.json of this version ({FORMAT}): measure again")


def check_results(results):
    """Raises one of DAMAGE unless all that is read of a results.json has the form that `measure` says."""
    models, images, conditions = results["models"], results["images"], results["conditions"]
    roots = dict.fromkeys(identity(image)[0] for image in images)
    require("data", results["data"] == list(roots) != [])
    require("models", models)
    require("split", results["split"])
    require("average", results["average"] in AVERAGES)
    require("conditions", len({*conditions}) == len(conditions))
    for condition in conditions:
        data.name_and_strength(condition)
    width = BACKBONES[results["backbone"]]["d"]
    for about in models.values():
        method, options = about["method"], about["options"]
        if method in gara.METHODS:
            require("options", options.keys() == gara.METHODS[method].options.keys())
            gara.check_options(method, options, width)
    check_images(images, results)


def check_images(images, results):
    """Raises one of DAMAGE unless these images of `results` are whole: each score a share, each gate's decision there."""
    models, conditions = results["models"], results["conditions"]
    for image in images:
        shape = (len(PROMPTS), len(conditions), len(image["indices"]), len(METRICS))
        for model in models:
            scores = figures.scores_of(image, model, conditions)
            shares = scores.dtype.kind in "fi" and (scores == scores.clip(0, 1)).all()  # which NaN is not
            require("scores", scores.shape == shape and shares)
    for model in figures.gated_models(results):
        forms = set()
        for condition in conditions:
            layers = figures.unpack_gates(results | dict(images=images), model, condition)
            forms.add(str([vectors.shape for vectors, _ in layers]))
        require("gates", len(forms) == 1 and layers)


def require(entry, right):
    """ValueError that names an entry of a results.json which is not right."""
    if not right:
        raise ValueError(f"its {entry} are not of the right form")


def merge(parts):
    """Several results.json {path: content} of the same prompts as one, so that their models stand side by side.

    ValueError if they were not measured alike. A model that two files name alike is kept once where its scores are
    equal, else named apart.
    """
    (first, whole), *others = parts.items()
    for path, part in others:
        for key in ("split", "backbone", "conditions", "data", "average"):
            if part[key] != whole[key]:
                raise ValueError(f"{path}: {key} is {part[key]}, but {whole[key]} in {first}: measure both alike")
        if list(map(identity, part["images"])) != list(map(identity, whole["images"])):
            raise ValueError(f"{path}: its pictures or masks are not those of {first}")
        pairs = list(zip(whole["images"], part["images"]))
        for model, about in part["models"].items():
            name = model
            if model in whole["models"] and all(a["scores"][model] == b["scores"][model] for a, b in pairs):
                continue
            while name in whole["models"]:
                name = f"{name} ({path})"
            whole["models"][name] = about
            for target, source in pairs:
                for kind in ("scores", "gates"):
                    if model in source[kind]:
                        target[kind][name] = source[kind][model]
    return whole


def identity(image):
    """What must be equal for scores of two results.json to be compared: the image and its masks."""
    return [image[key] for key in ("data", "at", "name", "indices", "areas")]


# ---------------------------------------------------------------------------------------------------------------------
# Tables.
# ---------------------------------------------------------------------------------------------------------------------


PAPER = os.path.join(os.path.dirname(figures.__file__), "paper.csv")
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


def mean_text(mean, low, high):
    """A mean, and half the width of its interval: "72.9 ±1.3"."""
    return f"{100 * mean:.1f} ±{50 * (high - low):.1f}"


def difference_text(mean, low, high):
    """A difference and its interval, "+4.3 [3.4, 5.2]"; in round brackets if the interval holds 0."""
    text = f"{100 * mean:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return text if low > NOISE or high < -NOISE else f"({text})"


def table(heads, rows, left=1):
    """Markdown, with an empty line below; the first `left` columns are text."""
    lines = []
    for cells in (heads, *rows):
        lines.append(f"| {' | '.join(cells)} |")
    rule = "|---" * left + "|---:" * (len(heads) - left)
    lines.insert(1, rule + "|")
    return "\n".join(lines) + "\n"


def print_tables(results, paper=None):
    """The tables of a results.json, as Markdown. paper: the name in `read_paper` whose figures stand below ours."""
    models = list(results["models"])
    kinds = [kind for kind in ("degraded", "clear") if f"point {kind}" in results["means"][models[0]]]
    columns = [f"{prompt} {kind}" for prompt in PROMPTS for kind in kinds]

    print(score_table(results, columns, paper))
    better = " Bold: better than every other model here, by a paired interval." if len(models) > 1 else ""
    print(f"±: half of the 95 % interval, by bootstrap over images.{better}\n")
    if len(models) > 1:
        print(difference_table(results, columns))
        print("[95 % interval]; in round brackets: no larger than its noise.\n")
    if len(data.benchmark_conditions(results["conditions"])) > 1:
        print(condition_table(results))
    if figures.gated_models(results):
        print(open_components_table(results))


def score_table(results, columns, paper):
    """Every model's means of every metric; below them the paper's."""
    several = len(results["data"]) > 1
    rows = []
    for root, summary in summaries(results):
        for model in results["models"]:
            cells = [root] * several + [model]
            for column in columns:
                for metric in range(len(METRICS)):
                    cells.append(score_cell(summary, model, column, metric))
            rows.append(cells)
    for (backbone, method), values in read_paper()[paper].items() if paper else ():
        if backbone in ("", results["backbone"]):
            cells = [""] * several + [f"{method} (paper)"]
            for column in columns:
                printed = values.get(column, [None] * len(METRICS))
                cells += [f"{value:.1f}" if value else "" for value in printed]
            rows.append(cells)
    heads = ["data"] * several + ["model"]
    for column in columns:
        heads += [f"{column} {metric}" for metric in METRICS]
    return table(heads, rows, 1 + several)


def score_cell(summary, model, column, metric):
    """"72.9 ±1.3", in bold if better than every other model's, by the paired interval."""
    mean = summary["means"][model][column][metric]
    interval = summary["intervals"][model][column][metric]
    text = mean_text(mean, *interval)
    lows = [difference(summary, model, other, column, metric)[1] for other in summary["means"] if other != model]
    return f"**{text}**" if lows and min(lows) > NOISE else text


def difference_table(results, columns):
    """IoU of every model less SAM's, and of the best model less every other's."""
    first, *others = results["models"]
    best = max(results["models"], key=lambda model: results["means"][model][columns[0]][0])
    pairs = [(model, first) for model in others]
    if best != first:
        pairs += [(best, model) for model in others if model != best]
    rows = []
    for model, other in pairs:
        cells = [difference_text(*difference(results, model, other, column)) for column in columns]
        rows.append([f"{model} - {other}", *cells])
    return table(["IoU, difference on the same masks", *columns], rows)


def condition_table(results):
    """IoU of every model in every condition."""
    rows = [[condition] for condition in data.benchmark_conditions(results["conditions"])]
    heads = ["IoU by condition"]
    for prompt in PROMPTS:
        for model, means in results["means"].items():
            heads.append(f"{prompt}: {model}")
            for row in rows:
                row.append(f"{100 * means[f'{prompt} {row[0]}'][0]:.1f}")
    return table(heads, rows)


def open_components_table(results):
    """The paper's Table a1: of all layers, images and conditions alike."""
    rows = []
    for model in figures.gated_models(results):
        counts = figures.open_components(results, model)
        rows.append([model, f"{counts.mean():.1f} ± {counts.std():.1f}", f"{counts.min():g}-{counts.max():g}"])
    return table(["open components", "mean ± deviation", "range"], rows)


def as_csv(results):
    """Every mean of a results.json, one on a line."""
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow("data model prompt condition metric mean low high".split())
    for root, summary in summaries(results):
        for model, means in summary["means"].items():
            for column, scores in means.items():
                for metric, mean, interval in zip(METRICS, scores, summary["intervals"][model][column]):
                    numbers = [f"{value:.6f}" for value in (mean, *interval)]
                    lines.writerow([root, model, *column.split(" ", 1), metric, *numbers])
    return file.getvalue()


def predict_samples(results, models, datasets, amp="off", rows=6):
    """What `figures.figure_samples` shows: dicts of condition, image, points, truth, predictions and iou by model, label."""
    shown = []
    for kind, gain, k, condition in figures.choose_samples(results, rows):
        row = results["images"][k]
        dataset = datasets[results["data"].index(row["data"])]
        sample = dataset[row["at"]]
        masks, image = sample.masks(), sample.image(condition)
        points, boxes = sample.prompts(masks)
        predicted, iou = {}, {}
        for name, model in models.items():
            prediction = next(predictions(model, [image], points, boxes, amp=amp))
            predicted[name] = prediction["point"].cpu().numpy()
            iou[name] = np.mean(row["scores"][name][condition]["point"], axis=0)[0]
        label = f"{kind} gain: {100 * gain:+.1f}" if len(models) > 1 else f"IoU {100 * gain:.1f} %"
        shown.append(dict(
            condition=condition,
            image=image,
            points=points,
            truth=masks,
            predictions=predicted,
            iou=iou,
            label=label))
    return shown


# ---------------------------------------------------------------------------------------------------------------------
# Command line.
# ---------------------------------------------------------------------------------------------------------------------


def name_of(content):
    """What tables call the model of an adapter file: "LoRA 16"; of GaRA, what differs from the paper's setting."""
    method, options = content["method"], content["options"]
    usual = gara.default_options(method, content["backbone"])
    name, ranks = gara.METHODS[method].title, gara.ranks_of(options)
    if "rank_low" not in options or ranks != gara.ranks_of(usual):
        name += " " + ",".join(map(str, ranks))
    if options.get("scope", "image") != "image":
        name += f" per {options['scope']}"
    if options.get("temperature", 0.5) != 0.5:
        name += f" T={options['temperature']:g}"
    return name


def load_models(ckpts, backbone, checkpoint, device, predictors=()):
    """(models, about, backbone): {"SAM": plain SAM, and one entry per adapter file and plugged predictor}; what
    results.json says of each, by the same names. All SAMs share the frozen weights."""
    adapters, whole = {}, []
    for path in ckpts:
        try:
            if path != "sam":
                adapters[path] = gara.read_adapter(path)
        except gara.WholeModel:
            whole.append(path)
    backbone, image_size = common_base(adapters.values(), backbone)
    base = build_sam(backbone, checkpoint or find_checkpoint(backbone), image_size).to(device)
    models, about = {}, {}

    def add(name, path, model, method, options, learnable=None):
        while name in models:
            name = f"{name} ({path})"
        models[name] = model
        file = None if method in ("sam", "predictor") else path
        about[name] = dict(file=file, method=method, options=options, learnable_parameters=learnable)

    add("SAM", None, base, "sam", {})
    frozen = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    for path, content in adapters.items():
        model = copy.deepcopy(base, dict(frozen))  # the memo keeps the frozen tensors shared
        gara.load_adapter(model, path)
        learnable = sum(value.numel() for value in gara.adapter_state(model).values())
        add(name_of(content), path, model.to(device).eval(), *model.adapter.values(), learnable)
    for path in whole:
        add("SAM", path, build_sam(backbone, path, image_size).to(device), "full", {})
    for spec in predictors:
        add(spec.rpartition(":")[2], spec, load_predictor(spec), "predictor", dict(predictor=spec))
    return models, about, backbone


def common_base(contents, backbone):
    """(backbone, image size or None) that adapter files and --backbone agree on. ValueError if they do not."""
    bases = dict(backbone={backbone} - {None}, image_size=set())
    for name, values in bases.items():
        values.update(content[name] for content in contents)
        if len(values) > 1:
            raise ValueError(f"--ckpt and --backbone name more than one {name.replace('_', ' ')} "
                             f"({', '.join(map(str, sorted(values)))}): one at a time")
    return next(iter(bases["backbone"]), "vit_t"), next(iter(bases["image_size"]), None)


def load_predictor(spec):
    """The object that "FILE.py:NAME" names, or makes if NAME is a class or function: see the README. ValueError."""
    made = from_file(spec, "--predictor")
    if isinstance(made, type) or not hasattr(made, "set_image"):
        with foreign("--predictor", spec):
            made = made()
    for name in ("set_image", "predict"):
        if not callable(getattr(made, name, None)):
            raise ValueError(f"--predictor {spec}: it has no set_image and predict as the official SamPredictor has")
    return made


def make_parser():
    """The command line's options."""
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
    add("--conditions", nargs="+", metavar="NAME", help="what to take the images in (default: clear and the 15 "
        "corruptions); also night and underwater")
    add("--no-corrupt", action="store_true", help="use the images as they are: --conditions clear")
    add("--strengths", nargs="+", type=float, default=[], metavar="S", help="also corrupt this strongly (0.5 1.5 2), "
        "beside the benchmark's strength 1: for curves of robustness")
    add("--average", choices=AVERAGES, help="what counts alike in a mean (default masks, as in the paper)")
    add("--paper", metavar="NAME", help="print the paper's figures below ours: of a benchmark (lvis) or a table (table5)")
    add("--limit", type=int, help="only this many images, spread over the split")
    add("--out", default="results", help="folder for results.json, results.csv and the figures (default results/)")
    add("--batch-size", type=int, default=4, help="conditions of an image that are encoded at once")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    add("--amp", choices=("off", "bf16"), default="off", help="bf16: the encoder in bfloat16")
    add("--workers", type=int, help="loader processes (default: half the cores, at most 8)")
    return parser


def parse(argv):
    """The command line, checked, with what torchrun says of the processes."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if bool(args.data) == bool(args.stored):
        parser.error("say --data ROOT to measure, or --from results.json to draw what was measured")
    if args.paper and args.paper not in read_paper():
        parser.error(f"--paper {args.paper}: there are {', '.join(sorted(read_paper()))}")
    for name, least in (("limit", 1), ("batch_size", 1), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be {least} or more")
    if args.no_corrupt and (args.strengths or args.conditions):
        parser.error("--no-corrupt leaves no corruptions for --strengths or --conditions")
    args.conditions = conditions_of(args)
    for condition in args.conditions:
        try:
            data.name_and_strength(condition)
        except data.DatasetError as error:
            parser.error(f"--{'strengths' if args.strengths else 'conditions'}: {error}")

    args.rank = int(os.environ.get("RANK", 0))
    args.world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.workers is None:
        args.workers = min(8, (os.cpu_count() or 2) // 2 // args.world_size)
    if args.device is None:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    return args


def conditions_of(args):
    """Every condition that is asked for, once: "clear", "fog", "fog@0.5", ..."""
    if args.no_corrupt:
        return ["clear"]
    conditions = list(dict.fromkeys(args.conditions or data.CONDITIONS))
    stronger = []
    for strength in sorted({*args.strengths} - {0, 1}):  # those are "clear" and "fog"
        stronger += [f"{name}@{strength:g}" for name in data.degraded_conditions(conditions)]
    return conditions + stronger


def run(args):
    """What the command line asks for, checked."""
    if args.stored:
        results = merge({path: read_results(path) for path in args.stored})
        results["average"] = args.average or results["average"]
        add_summaries(results)
        with data.alone_in(args.out):
            show(results, args)
        return

    if len({*map(os.path.realpath, args.data)}) < len(args.data):
        raise ValueError("--data names a folder twice: its masks would count twice")
    keep_freed_memory()
    if args.world_size > 1:  # they only wait for each other, the slowest one as long as it takes
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    models, about, backbone = load_models(args.ckpt, args.backbone, args.checkpoint, torch.device(args.device),
                                          args.predictor)
    if args.rank == 0:
        for root in args.data:
            data.make_missing_demo(root)
    wait_for_all()
    datasets = data.load_datasets(args.data, args.split, args.strict, args.prompts)
    if args.rank:
        measure(args, models, about, backbone, datasets)
        return
    with data.alone_in(args.out):
        results, unfinished = measure(args, models, about, backbone, datasets)
        path = os.path.join(args.out, "results.json")
        data.save_text(json.dumps(results), path)
        rows = predict_samples(results, models, datasets, args.amp)
        samples = figures.figure_samples(rows, list(models), os.path.join(args.out, "samples.png"))
        show(results, args, path, samples)
        for path in unfinished:  # all is written: the rows are no longer needed
            os.remove(path)


def show(results, args, *written):
    """Prints the tables, writes results.csv and the figures, and says what was written, now and before."""
    print_tables(results, args.paper)
    path = os.path.join(args.out, "results.csv")
    data.save_text(as_csv(results), path)
    paths = figures.draw_all(results, args.out)
    print(f"written: {', '.join([path, *paths, *written])}")


def main(argv=None):
    """Run the command line; returns the exit code. A user's mistake ends in one line."""
    data.plain_output()
    args = parse(argv)
    try:
        run(args)
    except (data.DatasetError, ValueError, OSError, RuntimeError, AssertionError) as error:  # last: no CUDA in torch
        print(f"error: {data.line_of(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def terminate(number, _):
    """A cluster's SIGTERM: all that is open is closed, and the same command goes on."""
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
