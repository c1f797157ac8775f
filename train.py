"""Trains adapters on a frozen SAM with the segmentation loss alone, on degraded images that need no clean twin.

    python train.py --data demo/                                GaRA on the tiny SAM of this project, in minutes
    python train.py --backbone vit_b --data robustseg/          the paper's setting
    python train.py --backbone vit_b --data bdd100k/ LIS/ --no-corrupt     images that are degraded already
    python train.py --init gara.pt --data LIS/ --no-corrupt     further training of an adapter (the paper's Table a4)
    python train.py --pretrain --data scenes/                   the tiny SAM itself, from scratch, on clear images
    torchrun --nproc_per_node=8 train.py ...                    the same run, its batches shared by 8 GPUs

One step: draw `--batch-size` images, each in one of 16 conditions (clear and the 15 corruptions) with equal chance;
encode each once; decode `--masks-per-image` of its objects twice, from three points and from the box; 20 x focal + dice
loss on both; Adam on the adapter. Example i of a run is a function of (seed, i) alone, and the noise of the gates of
(seed, step, process). So the number of workers changes nothing, and `--resume` continues as if there had been no
interruption, to the bit on a CPU.

Which pixels: training degrades each image anew in every epoch, with other noise each time, also where `data.py
--corrupt` has stored degraded images; with `--stored` it reads those. Validation sees what evaluation sees: the stored
image if there is one, else the same pixels, made on the fly.

Written to `--out` (runs/BACKBONE_METHOD): METHOD.pt, the adapter that was best on the validation split; last.pt, the
newest one and all that `--resume` needs: the optimizer, the log, and what they belong to, settings and data. Made of
that, and not needed to go on: run.json, the settings; log.jsonl, one line per interval; curve.png.
"""
import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import glob
import hashlib
import json
import math
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # here, while no group exists: its functions' defaults would keep the group
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute
from PIL import Image

import data
import gara
from assets.figures import draw_training
from assets.pretrain import loosen, pretrain_loss, vary
from sam import (BACKBONES, FILES, CheckpointError, ResizeLongestSide, SamPredictor, build_sam, find_checkpoint,
                 keep_freed_memory, read_weights)

# What a run uses where the command line is silent. From the paper: Adam, batch 8, both prompt kinds, weight decay 1e-5
# and the learning rates of vit_b and vit_l. Ours: 40,000 steps and 4 objects an image, which it does not state, vit_h
# like vit_l, and all of vit_t. The ranks and the temperature stand in gara.METHODS.
PAPER = dict(batch_size=8, weight_decay=1e-5, steps=40000, masks_per_image=4)
DEFAULTS = {
    "vit_t": dict(batch_size=16, weight_decay=1e-5, steps=450, masks_per_image=2, lr=1e-3),
    "vit_b": PAPER | dict(lr=1e-4),
    "vit_l": PAPER | dict(lr=1e-5),
    "vit_h": PAPER | dict(lr=1e-5),
}
OPTIONS = {}  # {option of an adapter: the methods that have it}
for method, kind in gara.METHODS.items():
    for name in kind.options:
        OPTIONS.setdefault(name, []).append(method)
BAD_STEPS = 10  # steps in a row without a finite gradient, after which a run gives up

# How many processes torchrun has started to share the run, and the number of this one among them.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
PROCESS_RANK = int(os.environ.get("RANK", 0))


def say(text, file=None):
    """Print a line, once for all processes."""
    if PROCESS_RANK == 0:
        print(text, file=file, flush=True)


class TrainingError(Exception):
    """The run cannot start or go on. One line: what happened and what to do."""


@contextlib.contextmanager
def of_one_sample(sample):
    """Whatever goes wrong within is this sample's own error: a SampleError, to be skipped and counted."""
    try:
        yield
    except (data.SampleError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {data.line_of(error)}"
        raise data.SampleError(f"{sample.source}: cannot use {sample.name} ({reason})") from error


# ---------------------------------------------------------------------------------------------------------------------
# Examples: what the workers prepare.
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Recipe:
    """How samples become examples."""
    conditions: list  # drawn with equal chance
    clear: float = None  # the chance of a clear image; None: that of any other condition
    masks_per_image: int = 4
    image_size: int = 1024  # side of the square that the model sees
    patch: int = 16
    augment: bool = False
    stored: bool = False  # degraded images are read where they are stored, else all are made on the fly
    seed: int = 0


class Examples(torch.utils.data.Dataset):
    """Example i of a run: an image in a drawn condition, scaled to the model, with prompts and targets for objects.

    A sample that cannot be used is replaced by the next one of the epoch; its error travels along in `errors`, for the
    main process.
    """

    def __init__(self, samples, count, recipe):
        self.samples = samples
        self.count = count
        self.recipe = recipe
        self.size = recipe.image_size
        self.resize = ResizeLongestSide(self.size)

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        epoch, position = divmod(i, len(self.samples))
        rng = np.random.default_rng(data.seed_of(self.recipe.seed, "order", epoch))
        order = np.roll(rng.permutation(len(self.samples)), -position)
        errors = []
        for index in order:
            sample = self.samples[int(index)]
            try:
                with of_one_sample(sample):
                    return self.make(sample, epoch, i) | dict(errors=errors)
            except data.SampleError as error:
                errors.append(error)
        raise TrainingError(f"none of the {len(order):,} samples can be used; the first: {errors[0]}")

    def make(self, sample, epoch, i):
        """A dict: name, condition, image uint8 (3, h, w), points (M, 3, 2), labels (M, 3), boxes (M, 4) and targets
        (M, 4H, 4W), M objects, coordinates in pixels of the scaled image. SampleError."""
        recipe = self.recipe
        rng = np.random.default_rng(data.seed_of(recipe.seed, "example", i))
        condition = self.condition(i, rng)
        noise = data.seed_of(recipe.seed, epoch, sample.name, condition)
        image = sample.image(condition, noise, stored=recipe.stored)
        masks = sample.masks()
        if recipe.augment:
            image, masks = vary(image, masks, rng)
        size = image.shape[:2]

        targets = {}
        for k in rng.permutation(len(masks)):
            target = self.target(masks[k], size)
            if target.max() >= 128:  # else too small for the model's output to show
                targets[k] = target
            if len(targets) == recipe.masks_per_image:
                break
        if not targets:
            raise data.SampleError(f"{sample.source}: no mask of {sample.name} is as large as a pixel of the model's "
                                   "output")
        # Always the same number of objects, some of them twice with other points if need be: all steps have one shape.
        chosen = np.resize(list(targets), recipe.masks_per_image)

        points, boxes = self.prompts(sample, masks, chosen, i)
        points = self.resize.apply_coords(points, size)
        boxes = self.resize.apply_boxes(boxes, size)
        labels = np.ones(points.shape[:2], dtype=np.int64)
        if recipe.augment:
            labels, boxes = loosen(labels, boxes, rng)
        arrays = dict(image=np.array(self.resize.apply_image(image)).transpose(2, 0, 1), points=points, labels=labels,
                      boxes=boxes, targets=np.stack([targets[k] for k in chosen]))
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        return dict(name=sample.name, condition=condition, **tensors)

    def condition(self, i, rng):
        """Equal chance, dealt like cards: of 16 conditions, every 16 examples hold each once, so batches differ less.
        With a chance for clear images, drawn by that."""
        recipe = self.recipe
        if recipe.clear is not None:
            others = [condition for condition in recipe.conditions if condition != "clear"]
            if rng.random() < recipe.clear or not others:
                return "clear"
            return others[rng.integers(len(others))]
        deal, card = divmod(i, len(recipe.conditions))
        shuffle = np.random.default_rng(data.seed_of(recipe.seed, "conditions", deal))
        return recipe.conditions[shuffle.permutation(len(recipe.conditions))[card]]

    def prompts(self, sample, masks, chosen, i):
        """points (M, 3, 2) and boxes (M, 4) of the chosen masks: the pinned ones, else others for each example."""
        if sample.pinned is not None:
            points, boxes = sample.prompts(masks)
            return points[chosen], boxes[chosen]
        seeds = [data.seed_of(self.recipe.seed, i, slot) for slot in range(len(chosen))]
        points, boxes = zip(*map(data.prompts, masks[chosen], seeds))
        return np.stack(points), np.stack(boxes)

    def target(self, mask, size):
        """bool HxW, of an image of this size -> uint8 (4H, 4W): how much of each low-resolution pixel it covers."""
        height, width = self.resize.get_preprocess_shape(*size)
        scaled = Image.fromarray(mask).convert("L").resize((width, height), Image.Resampling.BILINEAR)
        frame = Image.new("L", (self.size, self.size))  # padded right and below, like the image
        frame.paste(scaled)
        return np.asarray(frame.reduce(self.recipe.patch // 4))


def examples_of(train_set, args, steps):
    """The examples of so many steps of the run that `args` describes."""
    sizes = BACKBONES[args.backbone]
    recipe = Recipe(args.conditions, args.clear, args.masks_per_image, args.image_size or sizes["image_size"],
                    sizes["patch"], args.pretrain, args.stored, args.seed)
    return Examples(train_set, steps * args.batch_size, recipe)


def batches(examples, first, batch_size, workers):
    """This process's share of the batches, beginning with batch number `first`: lists of examples. No worker outlives
    this generator. TrainingError for what no sample is to blame for."""
    starts = range(first * batch_size, len(examples), batch_size)
    shares = [range(start + PROCESS_RANK, start + batch_size, WORLD_SIZE) for start in starts]
    # Its own generator: the loader draws a seed when it starts, and a resumed run must not draw one more than another.
    loader = torch.utils.data.DataLoader(
        examples, batch_sampler=shares, num_workers=workers, collate_fn=list, generator=torch.Generator(),
        prefetch_factor=4 if workers else None, worker_init_fn=data.start_worker)
    try:
        yield from data.from_workers(loader)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[-1]  # above it stands a worker's traceback
        reason = reason.split("TrainingError: ")[-1]
        if "DataLoader worker (pid" in reason:
            reason = "a process that loads data died, perhaps for lack of memory: lower --workers"
        raise TrainingError(reason) from error


# ---------------------------------------------------------------------------------------------------------------------
# Loss and validation.
# ---------------------------------------------------------------------------------------------------------------------


def mask_loss(logits, targets):
    """20 x focal (gamma 2) + dice of each mask, SAM's and RobustSAM's weights: (..., h, w) twice -> (...).

    targets are in 0..1: a low-resolution pixel on an outline is partly covered. The focal loss weighs object and
    background alike, alpha = 0.5. Detection's usual 0.25 counts a missed object pixel a third of a false one, so where
    an image leaves doubt, masks shrink: the tiny SAM trained with it did best at a threshold of -0.75, not 0.
    """
    p = logits.sigmoid()
    wrong = p + targets - 2 * p * targets  # 1 - p_t
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    focal = (0.5 * wrong ** 2 * entropy).mean((-2, -1))
    overlap = (p * targets).sum((-2, -1))
    total = (p + targets).sum((-2, -1))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return 20 * focal + dice


def mask_iou(logits, targets):
    """IoU of logits > 0 with targets > 0.5: (..., h, w) twice -> (...)."""
    predicted, truth = logits > 0, targets > 0.5
    overlap = (predicted & truth).sum((-2, -1))
    return overlap / (predicted | truth).sum((-2, -1)).clamp(min=1)


class Losses(torch.nn.Module):
    """A batch of examples -> its loss and its IoU by prompt kind."""

    def __init__(self, sam, pretrain):
        super().__init__()
        self.sam = sam
        self.pretrain = pretrain

    def forward(self, batch):
        """N examples of M objects each, P = N * M."""
        sam = self.sam

        def together(key):
            return torch.cat([example[key] for example in batch]).to(sam.device, non_blocking=True)

        images = []
        for example in batch:
            images.append(sam.preprocess(example["image"].to(sam.device, non_blocking=True)[None]))
        embeddings = sam.image_encoder(torch.cat(images))
        points = together("points"), together("labels")  # (P, 3, 2), (P, 3)
        boxes = together("boxes")  # (P, 4)
        targets = together("targets").float() / 255  # (P, 4H, 4W)
        image_index = torch.arange(len(batch), device=sam.device).repeat_interleave(len(boxes) // len(batch))  # (P,)
        if self.pretrain:
            return pretrain_loss(sam, embeddings, image_index, points, boxes, targets, mask_loss, mask_iou)

        losses, ious = {}, {}
        for kind, prompt in (("point", dict(points=points)), ("box", dict(boxes=boxes))):
            logits, _ = sam.decode(embeddings, image_index=image_index, **prompt)
            logits = logits[:, 0].float()
            losses[kind] = mask_loss(logits, targets).mean()
            ious[kind] = mask_iou(logits, targets).mean()
        return losses["point"] + losses["box"], ious


@torch.no_grad()
def validate(sam, dataset, limit, conditions, autocast):
    """Mean IoU over masks at the images' own resolution: {"box clear": ..., "box degraded", "point clear", ...}.

    Up to `limit` images, evenly spaced over the split, each clear, if that is one of the conditions, and in one of the
    others that its name chooses. Prompts and noise derive from names, so every call sees the same. Several processes
    share the images.
    """
    sam.eval()
    predictor = SamPredictor(sam)
    degraded = data.degraded_conditions(conditions)
    parts = []
    for sample in data.spread(dataset, limit)[PROCESS_RANK::WORLD_SIZE]:
        seen = {"clear": "clear"} if "clear" in conditions else {}
        if degraded:
            seen["degraded"] = degraded[data.seed_of(sample.name) % len(degraded)]
        try:
            with of_one_sample(sample), autocast():
                parts.append(validate_sample(predictor, sample, seen))
        except data.SampleError as error:
            report(dataset, error)
    ious = {}
    for part in gather(parts):
        for key, values in part.items():
            ious.setdefault(key, []).extend(values)
    if not ious:
        raise TrainingError(f"{dataset.summary()}: no sample of the validation split can be read")
    return {key: math.fsum(values) / len(values) for key, values in sorted(ious.items())}


def validate_sample(predictor, sample, seen):
    """The IoU of each mask of a sample: {"box clear": [...], ...}, for each of {kind of condition: condition}."""
    masks = sample.masks()
    points, boxes = sample.prompts(masks)
    images = {kind: sample.image(condition) for kind, condition in seen.items()}
    size, device, transform = masks.shape[1:], predictor.device, predictor.transform
    truth = torch.from_numpy(masks).to(device).float()
    coords = torch.from_numpy(transform.apply_coords(points, size)).to(device)
    boxes = torch.from_numpy(transform.apply_boxes(boxes, size)).to(device)
    ious = {}
    for kind, image in images.items():
        predictor.set_image(image)
        by_point, _, _ = predictor.predict_torch(coords, torch.ones_like(coords[..., 0]), multimask_output=False)
        by_box, _, _ = predictor.predict_torch(None, None, boxes, multimask_output=False)
        for prompt, logits in (("point", by_point), ("box", by_box)):
            ious[f"{prompt} {kind}"] = mask_iou(logits[:, 0].float(), truth).tolist()
    return ious


def gather(items):
    """The lists of all processes, joined."""
    if WORLD_SIZE == 1:
        return items
    lists = [None] * WORLD_SIZE
    dist.all_gather_object(lists, items)
    return sum(lists, [])


def report(dataset, error):
    """Count a sample that cannot be used, and print its line once."""
    if dataset.skip(error):
        print(f"skipped: {error}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The model and a step.
# ---------------------------------------------------------------------------------------------------------------------


def build_model(args):
    """The frozen SAM with its adapter; its encoder free (`--method full`); with `--pretrain`, all of it free."""
    torch.manual_seed(args.seed)
    if args.pretrain:
        return build_sam(args.backbone, args.checkpoint).to(args.device)
    sam = build_sam(args.backbone, args.checkpoint or find_checkpoint(args.backbone), args.image_size)
    if args.method == "full":
        sam.requires_grad_(False).image_encoder.requires_grad_(True)
        return sam.to(args.device)
    options = {name: getattr(args, name) for name in gara.METHODS[args.method].options}
    gara.attach(sam, args.method, **options)
    if args.init and not args.resume:
        begin_with(sam, args.init)
    return sam.to(args.device)


def begin_with(sam, path):
    """Give the adapter of `sam` the weights of a trained one, for further training (Table a4). TrainingError."""
    try:
        trained = gara.read_adapter(path)
        here = dict(backbone=sam.backbone, image_size=sam.image_encoder.img_size, **sam.adapter)
        require_same(trained, here, f"--init: {path}")
        gara.load_adapter(sam, path)
    except CheckpointError as error:
        raise TrainingError(f"--init: {path} is damaged, or not an adapter that train.py has written") from error
    except (OSError, ValueError) as error:
        raise TrainingError(f"--init: {error}") from error


def require_same(then, now, file):
    """Compare the settings that a file was made with to those of this run. TrainingError."""
    changed = []
    for name, value in now.items():
        before = then.get(name)
        if value != before and name in FREE:
            say(f"from here on {name} {value}; before: {before}")
        elif value != before:
            changed.append(f"{name} {before}, not {value}")
    if changed:
        raise TrainingError(f"{file} is of a run with {'; '.join(changed)}")


def learning_rate(step, steps, peak, schedule="cosine"):
    """Linear warm-up over the first 5 % of the steps, then half a cosine down to zero, or constant."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Run:
    """A model in training, its optimizer and its progress: what a step changes."""

    def __init__(self, args):
        self.args = args
        self.folder = pathlib.Path(args.out)
        self.sam = build_model(args)
        self.step = 0
        self.best = -1.0  # validation IoU
        self.bad = self.bad_in_a_row = 0  # steps without a finite gradient
        self.sums, self.summed = {}, 0  # of the means of the steps since the last line of the log
        self.lines = []  # of the log
        self.settings = {}  # which this state belongs to: see `identity`
        self.init_sha256 = sha256_of(args.init) if args.init and not args.resume else ""
        if args.checkpointing:
            for block in self.sam.image_encoder.blocks:
                block.forward = functools.partial(recompute, block.forward, use_reentrant=False)
        if args.compile:
            self.sam.image_encoder.compile()
        self.autocast = functools.partial(torch.autocast, args.device.type, torch.bfloat16, enabled=args.amp == "bf16")
        self.losses = Losses(self.sam, args.pretrain)
        if WORLD_SIZE > 1:  # averages the gradients; mask prompts are not trained with --pretrain
            self.losses = DistributedDataParallel(self.losses, find_unused_parameters=args.pretrain)
        self.parameters = [p for p in self.sam.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.parameters)
        adam = torch.optim.AdamW if args.pretrain else torch.optim.Adam
        self.optimizer = adam(self.parameters, lr=args.lr, weight_decay=args.weight_decay,
                              fused=args.device.type == "cuda")

    def update(self, share):
        """One step of the optimizer on this process's share of the batch, a list of examples.

        Adds the share's means to `sums`: loss, and IoU by prompt kind. A step whose gradient is not finite leaves the
        model as it is and is counted; BAD_STEPS in a row raise TrainingError.
        """
        args = self.args
        self.sam.train()
        # What the gates draw depends on the step alone, not on what came before: a resumed run draws the same.
        torch.manual_seed(data.seed_of(args.seed, "step", self.step, PROCESS_RANK))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, args.steps, args.lr, args.schedule)
        self.optimizer.zero_grad()
        means = self.backward(share)
        clip = args.clip or (1.0 if args.pretrain else math.inf)  # random weights have wild early gradients
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        self.step += 1
        if norm.isfinite():
            self.optimizer.step()
            self.bad_in_a_row = 0
            self.sums = {key: self.sums.get(key, 0) + value for key, value in means.items()}
            self.summed += 1
        else:
            self.skip(share, means["loss"].item())

    def backward(self, share):
        """The gradient of a batch share, in `--accumulate` parts; returns means over the share.

        Every example has as many masks as any other, so weights by examples make the gradient the mean over the masks
        of the whole batch, however it is shared.
        """
        means = {}
        count = min(self.args.accumulate, len(share))
        for k in range(count):
            part = share[k::count]
            self.losses.require_backward_grad_sync = k == count - 1  # processes average their gradients once
            with self.autocast():
                loss, ious = self.losses(part)
            (loss * (len(part) * WORLD_SIZE / self.args.batch_size)).backward()
            for key, value in {"loss": loss.detach(), **ious}.items():
                means[key] = means.get(key, 0) + value * (len(part) / len(share))
        return means

    def skip(self, share, loss):
        """Count a step without a finite gradient."""
        self.bad += 1
        self.bad_in_a_row += 1
        names = ", ".join(example["name"] for example in share)
        print(f"step {self.step - 1:,} skipped, its gradient is not finite: loss {loss:.4g} on {names}", flush=True)
        if self.bad_in_a_row >= BAD_STEPS:
            raise TrainingError(f"{BAD_STEPS} steps in a row without a finite gradient, the last on {names}; start "
                                "again with a lower --lr or --amp off (last.pt, if any, holds the last good state)")

    def means(self):
        """Means since the last call, over all processes: {"loss": ..., "point": ..., "box": ...}; {} without steps."""
        keys = sorted(self.sums)
        values = torch.tensor([float(self.sums[key]) for key in keys], device=self.args.device) / max(self.summed, 1)
        if WORLD_SIZE > 1:
            dist.all_reduce(values.div_(WORLD_SIZE))
        self.sums, self.summed = {}, 0
        return dict(zip(keys, values.tolist()))

    def gate_statistics(self):
        """Per layer, over the last batch: share of images in the higher-rank set, mean number of open components."""
        layers = gara.adapters(self.sam)
        if not layers or isinstance(layers[0].gate, gara.OpenGate):
            return {}
        gates = gara.gates(self.sam)
        return dict(higher=[round(layer["space"].float().mean().item(), 4) for layer in gates],
                    active=[round(layer["count"].float().mean().item(), 2) for layer in gates])


# ---------------------------------------------------------------------------------------------------------------------
# The files of a run, in args.out: weights and last.pt; log.jsonl, run.json and curve.png, which it can do without.
# ---------------------------------------------------------------------------------------------------------------------


def aside(run, name, write, *values):
    """Write a file that a run can do without, by write(*values, path). If that fails, it is told, and the run goes on."""
    if PROCESS_RANK > 0:
        return
    try:
        write(*values, run.folder / name)
    except Exception as error:
        print(f"{name} could not be written: {data.line_of(error)}", flush=True)


def log(run, **line):
    """Add a line to the log, which is kept in last.pt and shown in log.jsonl."""
    run.lines.append(line)
    aside(run, "log.jsonl", write_lines, "a", [line])


def write_lines(mode, lines, path):
    """Write (mode "w") or append ("a") lines of JSON."""
    with open(path, mode) as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")


def save(run, name, **meta):
    """Write the run's adapter, or its whole SAM, with `meta`: whole, or not at all. TrainingError without room for it.

    Without an adapter, finished weights have SAM's own form, and those in last.pt what `resume` needs.
    """
    if PROCESS_RANK > 0:
        return
    path = run.folder / name
    meta |= dict(step=run.step, settings=run.settings)
    try:
        if gara.adapters(run.sam):
            gara.save_adapter(run.sam, path, **meta)
            return
        content = run.sam.state_dict()
        if "training" in meta:
            content = dict(sam=content, **meta)
        elif run.args.pretrain:  # the rounding is far below training noise
            content = {key: value.half() for key, value in content.items()}
        gara.save_whole(content, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        free = shutil.disk_usage(run.folder).free / 1e6
        raise TrainingError(f"cannot write {path}, {free:,.0f} MB are free there; what was saved before is kept: "
                            f"make room and --resume ({data.line_of(error)})") from error


PROGRESS = ("step", "best", "bad", "bad_in_a_row", "sums", "summed", "lines", "init_sha256")  # of a Run, in last.pt
# What may change when a run is resumed: how it is computed, and what is kept of it. All else belongs to its state.
FREE = ("processes", "--out", "--no-corrupt", "--epochs", "--strict", "--workers", "--device", "--compile",
        "--checkpointing", "--log-every", "--save-minutes", "--keep-every", "--val-every")


def identity(run, datasets):
    """What the state of a run belongs to: its settings, with contents in the place of paths."""
    args = run.args
    settings = {flag(name): value for name, value in vars(args).items() if name != "resume"}
    settings["processes"] = WORLD_SIZE
    settings["--data"] = [contents(dataset, args.stored) for dataset in datasets]
    settings["--prompts"] = [sha256_of(path) for path in args.prompts or ()]
    if args.checkpoint or not args.pretrain:
        settings["--checkpoint"] = gara.fingerprint(run.sam)
    return json.loads(json.dumps(settings, default=str))


def contents(dataset, stored):
    """What tells the samples of a dataset from others: digests of their names, and of their files' sizes and times of
    change (stored: of the degraded images as well)."""
    names = "\n".join(sample.name for sample in dataset)
    paths = {}  # an ordered set: all samples may have one file of masks
    for sample in dataset:
        paths[sample.clear] = paths[sample.source] = None
    if stored:
        degraded = os.path.join(glob.escape(dataset[0].folder), "*", "*")
        paths |= dict.fromkeys(sorted(glob.glob(degraded)))
    files = hashlib.sha256()
    for path in paths:
        with contextlib.suppress(OSError):  # one that is missing is skipped and counted when its turn comes
            about = os.stat(path)
            files.update(f"{about.st_size} {about.st_mtime_ns}\n".encode())
    names = hashlib.sha256(names.encode(errors="surrogatepass"))
    return dict(split=dataset.split, kind=dataset.kind, images=len(dataset), fingerprint=names.hexdigest()[:16],
                sizes_and_times=files.hexdigest()[:16])


def checkpoint(run, **meta):
    """Write last.pt, the model and all that going on needs, and draw the curve."""
    training = {name: getattr(run, name) for name in PROGRESS}
    save(run, "last.pt", training=training | dict(optimizer=run.optimizer.state_dict()), **meta)
    aside(run, "curve.png", draw_training, run.lines)


def resume(run):
    """Bring a new run to the state in last.pt. TrainingError if it is damaged, or of another run."""
    path = run.folder / "last.pt"
    try:
        content = read_weights(path)
        meta = content.get("meta", content)  # of an adapter, or of a whole SAM
        if "processes" not in meta["settings"]:
            raise TrainingError(f"--resume: {path} is by an older train.py, which did not note all settings: go on with "
                                "that one, or start another --out")
        require_same(meta["settings"], run.settings, f"--resume: {path}")
        if gara.adapters(run.sam):
            gara.load_adapter(run.sam, path)
        else:
            run.sam.load_state_dict(content["sam"])
        load_progress(run, meta["training"])
    except TrainingError:
        raise
    except Exception as error:  # whatever a file may hold that this program has not written
        raise TrainingError(f"--resume: {path} is damaged or not of such a run; start another --out") from error


def load_progress(run, training):
    """What a Run counts and the optimizer's moments, from last.pt. Whatever is wrong with them raises."""
    for name in PROGRESS:
        kind = type(getattr(run, name))
        setattr(run, name, kind(training[name]))
    run.sums = {key: float(value) for key, value in run.sums.items()}
    if not 0 <= run.step <= run.args.steps:
        raise ValueError("a step beyond the run")

    settings = run.optimizer.state_dict()["param_groups"]  # the command line's own
    run.optimizer.load_state_dict(dict(state=training["optimizer"]["state"], param_groups=settings))
    for p, moments in run.optimizer.state.items():
        fit = gara.fits(moments["exp_avg"], p) and gara.fits(moments["exp_avg_sq"], p)
        if not fit or not 0 <= moments["step"].item() <= run.step:
            raise ValueError("moments of other parameters")


def describe(run, path):
    """Write run.json: every setting, versions, the data, the code's commit, parameter counts."""
    gpu = torch.cuda.get_device_name() if run.args.device.type == "cuda" else "no GPU in use"
    content = dict(
        settings=vars(run.args),
        init_sha256=run.init_sha256,
        versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
        machine=f"{platform.machine()}, {os.cpu_count()} cores, {gpu}",
        world_size=WORLD_SIZE,
        data=run.settings["--data"],
        commit=commit(),
        learnable_parameters=run.size)
    data.save_text(json.dumps(content, indent=1, default=str), path)


def commit():
    """The git commit of this code, marked where it was changed since; empty where there is no git."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def sha256_of(path):
    """Hex digest of a file."""
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The loop.
# ---------------------------------------------------------------------------------------------------------------------


class Interrupt:
    """Ctrl-C and SIGTERM (a cluster's notice) end the run after the step at hand; a second Ctrl-C ends it at once."""

    def __init__(self, held):
        """Listens for as long as `held`, an ExitStack, lasts."""
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, self.notice)
            held.callback(signal.signal, number, before)

    def notice(self, number, frame):
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number

    def anywhere(self, device):
        """The signal, if any process of the run got one: all must stop after the same step."""
        if WORLD_SIZE > 1:
            flag = torch.tensor(self.signal, device=device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.signal = int(flag)
        return self.signal


def by_rank_0(action, *values):
    """Have rank 0 do something while the others wait. What it refuses ends them all."""
    refusal = [None]
    if PROCESS_RANK == 0:
        try:
            action(*values)
        except (TrainingError, data.DatasetError, OSError) as error:
            refusal = [data.line_of(error)]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(refusal)
    if refusal[0]:
        raise TrainingError(refusal[0])


def claim(run, held):
    """Take the folder of the run, for as long as `held` lasts. TrainingError, DatasetError."""
    args, path = run.args, run.folder / "last.pt"
    if args.resume and not path.is_file():
        raise TrainingError(f"--resume: there is no {path}; start without --resume, or name the run with --out")
    held.enter_context(data.alone_in(run.folder))
    if not args.resume and path.exists():
        raise TrainingError(f"{run.folder} holds a run already: --resume goes on with it, --out NAME starts another")


def load_data(args, split):
    """The datasets of `--data`, and all of them as one."""
    datasets = data.load_datasets(args.data, split, args.strict, args.prompts or ())
    if args.limit and split == "train":
        for dataset in datasets:
            dataset.samples = data.spread(dataset, args.limit)
    return datasets, data.Union(datasets) if len(datasets) > 1 else datasets[0]


def train(args):
    """The whole run. Returns the exit code: 0, or 128 + the number of the signal that ended it early."""
    train_sets, train_set = load_data(args, "train")
    val_sets, val_set = load_data(args, "val")
    if args.epochs:
        args.steps = max(1, round(args.epochs * len(train_set) / args.batch_size))
    args.val_every = args.val_every or max(1, args.steps // 10)
    run = Run(args)
    run.settings = identity(run, train_sets + val_sets)
    for dataset in train_sets + val_sets:
        say(dataset.summary())
    say(f"{args.backbone}, {args.method}: {run.size:,} learnable parameters; {args.steps:,} steps of {args.batch_size} "
        f"images; {WORLD_SIZE} x {args.device}, amp {args.amp}, seed {args.seed}")

    with contextlib.ExitStack() as held:
        by_rank_0(claim, run, held)
        if args.resume:
            resume(run)
        aside(run, "log.jsonl", write_lines, "w", run.lines)
        aside(run, "run.json", describe, run)
        interrupt = Interrupt(held)
        loaded = held.enter_context(contextlib.closing(shares(run, train_set)))  # no worker outlives this block
        try:
            if not (args.resume or args.pretrain):
                keep_the_best(run, val_set)  # step 0, which training has to beat
            steps(run, loaded, val_set, interrupt)
        except torch.OutOfMemoryError as error:
            raise TrainingError("out of memory: raise --accumulate, add --checkpointing, lower --batch-size") from error
    if run.step == args.steps:
        say(f"best: validation IoU {run.best:.4f}, {run.folder / best_name(args)}; {train_set.summary()}")
        return 0
    say(f"stopped by signal {interrupt.signal} after step {run.step:,}; --resume goes on from there", sys.stderr)
    return 128 + interrupt.signal


def shares(run, train_set):
    """This process's shares of the batches from run.step on. What cannot be loaded ends the run, after a checkpoint."""
    args = run.args
    examples = examples_of(train_set, args, args.steps)
    try:
        for share in batches(examples, run.step, args.batch_size, args.workers):
            for example in share:
                for error in example["errors"]:
                    report(train_set, error)
            yield share
    except (TrainingError, data.DatasetError) as error:
        if run.step:
            checkpoint(run)
        raise TrainingError(f"{error}; --resume goes on from step {run.step:,}") from error


def steps(run, loaded, val_set, interrupt):
    """Train from run.step to the last step, or until interrupted, on batch shares as they are loaded."""
    args = run.args
    first, images, waited, spent = run.step, 0, 0.0, 0.0
    started = asked = saved = time.monotonic()
    for share in loaded:
        got = time.monotonic()
        run.update(share)
        done = time.monotonic()
        images += args.batch_size
        waited += got - asked
        spent += done - asked
        last = run.step == args.steps
        if last or run.step % args.log_every == 0:
            left = (args.steps - run.step) * (done - started) / (run.step - first)
            log_interval(run, images / spent, waited / spent, round(left))
            images, waited, spent = 0, 0.0, 0.0

        stop = interrupt.anywhere(args.device)
        if args.keep_every and run.step % args.keep_every == 0:  # before last.pt: a kill in between must not lose it
            save(run, f"step_{run.step}.pt")
        if last or run.step % args.val_every == 0:  # even on a stop: it would not be made up for
            keep_the_best(run, val_set)
            saved = time.monotonic()
        elif stop or time.monotonic() - saved > 60 * args.save_minutes:
            checkpoint(run)
            saved = time.monotonic()
        if stop:
            return
        asked = time.monotonic()


def log_interval(run, speed, waiting, left):
    """The means since the last line; images a second, the share of time spent waiting for data, the seconds left."""
    means, gates = run.means(), run.gate_statistics()
    loss = means.get("loss", math.nan)
    ious = " ".join(f"{key} {value:.3f}" for key, value in means.items() if key != "loss")
    log(run, step=run.step, **means, lr=run.optimizer.param_groups[0]["lr"], images_per_second=speed, waiting=waiting,
        skipped_steps=run.bad, **gates)
    say(f"step {run.step:,}/{run.args.steps:,}  loss {loss:.4f}  IoU {ious}  {speed:.1f} images/s  "
        f"{waiting:.0%} waiting for data  {datetime.timedelta(seconds=left)} left")


def best_name(args):
    """The file of the best weights: an adapter, or a SAM."""
    return FILES[args.backbone] if args.pretrain else f"{args.method}.pt"


def keep_the_best(run, val_set):
    """Validate, keep the best weights, write a checkpoint."""
    args = run.args
    ious = validate(run.sam, val_set, args.val_images, args.conditions, run.autocast)
    say(f"step {run.step:,}  validation IoU  " + "  ".join(f"{key} {iou:.4f}" for key, iou in ious.items()))
    degraded = len(data.degraded_conditions(args.conditions))
    weights = [degraded if "degraded" in key else 1 for key in ious]  # all conditions count alike, as in training
    score = float(np.average(list(ious.values()), weights=weights))
    if score > run.best:
        run.best = score
        save(run, best_name(args), validation=ious)
    log(run, step=run.step, validation=ious, best=run.best)
    checkpoint(run, validation=ious)


# ---------------------------------------------------------------------------------------------------------------------
# The command line.
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv):
    """The command line, checked, with every default filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    add = parser.add_argument
    adders = add, functools.partial(add, type=int), functools.partial(add, action="store_true")
    add_data_and_model(*adders)
    length = parser.add_mutually_exclusive_group().add_argument
    length("--steps", type=int, help="default 450 for vit_t, else 40000")
    length("--epochs", type=float)
    add_training(*adders)
    args = parser.parse_args(argv)
    fill_in(args)
    check(args, parser.error)
    choose_device(args, parser.error)
    return args


def add_data_and_model(add, number, switch):
    """What is trained, and on what. The arguments add an option of any type, a whole number, one without a value."""
    add("--data", required=True, nargs="+", metavar="ROOT",
        help="dataset folders of any kind that data.py reads, with splits train and val; demo/ is made if it is not "
             "there; KIND=ROOT where the kind is not plain to see")
    add("--prompts", nargs="+", metavar="JSON", help="use exactly these prompts (data.py ROOT --export-prompts JSON), "
        "in training and validation, instead of drawing new ones for every step")
    switch("--strict", help="a bad or missing file is an error; else it is skipped and counted")
    add("--conditions", nargs="+", metavar="NAME", help="what images are trained and validated in (default: clear "
        "and the 15 corruptions); also night and underwater, and strengths as fog@2")
    add("--clear", type=float, metavar="P", help="chance of a clear image (default: as of any other condition)")
    switch("--no-corrupt", help="use the images as they are: --conditions clear")
    switch("--stored", help="train on the degraded images that data.py --corrupt has stored, the "
        "same in every epoch, where they are there; else each is degraded anew in every epoch")
    number("--limit", help="only this many images of each training set, evenly spaced: for a try")
    number("--workers", help="processes that prepare examples (default: half the cores, at most 8)")
    add("--backbone", choices=BACKBONES, default="vit_t", help="vit_t (default) comes with the project")
    add("--checkpoint", help="SAM weights; default: assets/, checkpoints/, the torch hub cache, else downloaded")
    add("--method", choices=(*gara.METHODS, "full"), help="default gara; full: no adapter, the whole encoder learns; "
        "the ranks below are smaller for vit_t")
    add("--init", metavar="ADAPTER", help="begin with a trained adapter's weights: for further training on other data")
    switch("--pretrain", help="train the whole model on clear images, from scratch or --checkpoint")
    number("--image-size", metavar="PIXELS", help="side of the square that the model sees (default 1024; vit_t "
        "128): a smaller one makes a quick try, its positions interpolated")
    for name, methods in OPTIONS.items():
        default = gara.METHODS[methods[0]].options[name]
        add(flag(name), type=ranks if isinstance(default, tuple) else type(default),
            choices=gara.SCOPES if name == "scope" else None,
            help=f"of {', '.join(methods)} (default {default})")


def add_training(add, number, switch):
    """How it is trained, and what is kept."""
    number("--batch-size", help="images, of all processes together (default 16 for vit_t, else 8)")
    number("--accumulate", default=1, metavar="N", help="parts that a process does its batch share in")
    number("--masks-per-image", help="objects of an image, sharing its encoding (default 2 for vit_t, else 4)")
    add("--lr", type=float, help="peak learning rate (default 1e-3 vit_t, 1e-4 vit_b, 1e-5 vit_l and vit_h)")
    add("--schedule", choices=("cosine", "constant"), default="cosine", help="after a warm-up of 5 %% of the steps")
    add("--weight-decay", type=float, help="default 1e-5")
    add("--clip", type=float, help="largest norm of the gradient (default: none; 1 with --pretrain)")
    number("--seed", default=0)
    switch("--checkpointing", help="compute each block twice to save its memory")
    switch("--compile", help="torch.compile the encoder")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    add("--amp", choices=("auto", "off", "bf16"), default="auto", help="auto: bf16 where the CPU or GPU computes in it")
    add("--out", help="folder of the run (default runs/BACKBONE_METHOD)")
    switch("--resume", help="go on with the run in --out")
    number("--log-every", default=20, help="steps (default 20)")
    add("--save-minutes", type=float, default=10, help="write last.pt at least this often (default 10)")
    number("--keep-every", metavar="STEPS", help="also keep the adapter of every so many steps")
    number("--val-every", help="steps (default: a tenth of the run)")
    number("--val-images", default=64, help="images of the validation split used, at most (default 64)")


def flag(name):
    """masks_per_image -> --masks-per-image."""
    return f"--{name.replace('_', '-')}"


def ranks(text):
    """"2,16" -> (2, 16)."""
    return tuple(int(rank) for rank in text.split(","))


def fill_in(args):
    """The defaults that depend on other settings."""
    args.method = args.method or ("pretrain" if args.pretrain else "gara")
    defaults = dict(DEFAULTS[args.backbone])
    if args.method in gara.METHODS:
        defaults |= gara.default_options(args.method, args.backbone)
    defaults["workers"] = min(8, (os.cpu_count() or 2) // 2)
    defaults["conditions"] = ["clear"] if args.no_corrupt or args.pretrain else list(data.CONDITIONS)
    defaults["out"] = os.path.join("runs", f"{args.backbone}_{args.method}")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check(args, error):
    """Refuse what makes no sense, in one line."""
    for name, value in vars(args).items():
        if type(value) in (int, float) and name not in ("seed", "workers", "clear", "weight_decay") and not 0 < value < math.inf:
            error(f"{flag(name)} must be above 0 and finite")
    if not -2**63 <= args.seed < 2**64:
        error("--seed must be from -2**63 to 2**64 - 1")
    if args.workers < 0:
        error("--workers must be 0 or more")
    if args.clear is not None and not 0 <= args.clear <= 1:
        error("--clear is a chance, from 0 to 1")
    if args.batch_size < WORLD_SIZE:
        error(f"--batch-size {args.batch_size} is too small for {WORLD_SIZE} processes, who share a batch")
    if args.pretrain and args.prompts:
        error("--pretrain varies its images, so it cannot use --prompts")
    if args.pretrain and args.batch_size * args.masks_per_image < 2:
        error("--pretrain needs two objects a step: raise --batch-size or --masks-per-image")
    if args.pretrain and args.method != "pretrain":
        error("--pretrain trains a whole SAM and has no --method")
    check_options(args, error)
    whole = args.method not in gara.METHODS
    if whole and args.image_size:
        error("--image-size is for adapters: whole models are trained at their own size")
    if whole and args.init:
        error("--init is for adapters: whole models begin with --checkpoint")
    if (args.no_corrupt or args.pretrain) and args.conditions != ["clear"]:
        error("--conditions: --no-corrupt and --pretrain use the images as they are")
    for condition in args.conditions:
        try:
            data.name_and_strength(condition)
        except data.DatasetError as reason:
            error(f"--conditions: {reason}")


def check_options(args, error):
    """Refuse options that the method does not have."""
    own = [flag(name) for name, methods in OPTIONS.items() if args.method in methods]
    for name, methods in OPTIONS.items():
        if args.method not in methods and getattr(args, name) is not None:
            error(f"--method {args.method} has no {flag(name)}; its options: {', '.join(own) or 'none'}")


def choose_device(args, error):
    """The device, a GPU for each process, and whether it computes in bfloat16."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        args.device = torch.device(args.device or (gpu if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as reason:
        error(f"--device: {data.line_of(reason)}")
    if args.amp == "auto":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 does not tell
        on_cpu = args.device.type == "cpu" and (cpu.get("amx_bf16") or cpu.get("avx512_bf16"))
        args.amp = "bf16" if args.device.type == "cuda" or on_cpu else "off"


def main(argv=None):
    """Run the command line; returns the exit code. A user's mistake ends in one line."""
    data.plain_output()
    args = parse(argv)
    try:
        if WORLD_SIZE > 1:
            if args.device.type == "cuda":
                torch.cuda.set_device(args.device)
            dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
        for root in args.data:
            by_rank_0(data.make_missing_demo, root)
        if args.device.type == "cpu":
            keep_freed_memory()
        return train(args)
    except (TrainingError, data.DatasetError, OSError, ValueError) as error:
        print(f"error: {data.line_of(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():  # nothing may keep the group: threads of Gloo that outlive Python abort the process
            gc.collect()
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
