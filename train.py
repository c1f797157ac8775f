"""Trains adapters on a frozen SAM with the segmentation loss alone, on degraded pictures that need no clean twin.

    python train.py --data demo/                                GaRA on the tiny SAM of this project, in minutes
    python train.py --backbone vit_b --data robustseg/          the paper's setting
    python train.py --backbone vit_b --data bdd100k/ LIS/ --no-corrupt     pictures that are degraded already
    python train.py --pretrain --data scenes/                   the tiny SAM itself, from scratch, on clear pictures
    torchrun --nproc_per_node=8 train.py ...                    the same run, its batches shared by 8 GPUs

One step: draw `--batch-size` pictures, each in one of 16 conditions (clear and the 15 corruptions) with equal chance;
encode each once; decode `--masks-per-image` of its objects twice, from three points and from the box; 20 x focal + dice
loss on both; Adam on the adapter. Example i of a run is a function of (seed, i) alone, and the gates' noise of (seed,
step, process). So the number of loader processes changes nothing, and `--resume` goes on as if there had been no
interruption, to the bit on a CPU.

Written to `--out` (runs/BACKBONE_METHOD): METHOD.pt, the adapter that was best on the validation split; last.pt, the
newest one with what `--resume` needs; run.json, the settings; log.jsonl, one line per interval; curve.png.
"""
import argparse
import contextlib
import functools
import gc
import hashlib
import json
import math
import os
import pickle
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
from PIL import Image, ImageDraw, ImageFont

import data
import gara
from sam import BACKBONES, FILES, ResizeLongestSide, SamPredictor, build_sam, find_checkpoint, keep_freed_memory

# What a run uses where the command line is silent. The paper gives Adam, batch 8, both prompt kinds, weight decay 1e-5
# and the learning rates of vit_b and vit_l (vit_h: as vit_l). Its number of steps is not stated: 40,000 is ours.
OFFICIAL = dict(steps=40000, batch_size=8, masks_per_image=4)
DEFAULTS = {
    "vit_t": dict(steps=450, lr=1e-3, batch_size=16, masks_per_image=2),
    "vit_b": OFFICIAL | dict(lr=1e-4),
    "vit_l": OFFICIAL | dict(lr=1e-5),
    "vit_h": OFFICIAL | dict(lr=1e-5),
}
BAD_STEPS = 10  # steps in a row without a finite gradient, after which a run gives up


class TrainingError(Exception):
    """The run cannot start or go on. One line: what happened and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Examples: what the loader's processes prepare.
# ---------------------------------------------------------------------------------------------------------------------


class Examples(torch.utils.data.Dataset):
    """Example i of a run: a picture in a drawn condition, scaled to the model, with prompts and targets for objects.

    A bad sample is replaced by the next one of the epoch; its error travels along in `bad`, for the main process.
    """

    def __init__(self, samples, backbone, count, seed, masks_per_image, conditions, augment, clear=None, size=None):
        self.samples, self.count, self.seed, self.masks_per_image = samples, count, seed, masks_per_image
        self.clear = clear  # the chance of a clear picture; None: as of any other condition
        self.conditions = conditions
        self.augment = augment
        self.size, self.patch = size or BACKBONES[backbone]["image_size"], BACKBONES[backbone]["patch"]

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        epoch, position = divmod(i, len(self.samples))
        order = np.random.default_rng(data.seed_of(self.seed, "order", epoch)).permutation(len(self.samples))
        bad = []
        for index in np.roll(order, -position):
            try:
                return self.make(self.samples[int(index)], epoch, i) | dict(bad=bad)
            except data.SampleError as error:
                bad.append(error)
        return TrainingError(f"none of the {len(order):,} samples can be used; the first: {bad[0]}")

    def make(self, sample, epoch, i):
        """A dict: name, condition, image uint8 (3, h, w), points (M, 3, 2), labels (M, 3), boxes (M, 4) and targets
        (M, 4H, 4W), M objects, coordinates in pixels of the scaled picture."""
        rng = np.random.default_rng(data.seed_of(self.seed, "example", i))
        # Equal chance, dealt like cards: of 16 conditions, every 16 examples hold each once, so batches differ less.
        deal, place = divmod(i, len(self.conditions))
        shuffled = np.random.default_rng(data.seed_of(self.seed, "conditions", deal)).permutation(len(self.conditions))
        condition = self.conditions[shuffled[place]]
        if self.clear is not None:
            bad = [condition for condition in self.conditions if condition != "clear"]
            condition = "clear" if rng.random() < self.clear or not bad else bad[rng.integers(len(bad))]
        image = sample.image(condition, seed=data.seed_of(self.seed, epoch, sample.name, condition))
        masks = sample.masks()
        if self.augment:
            image, masks = vary(image, masks, rng)
        targets = {}
        for k in rng.permutation(len(masks)):
            target = self.target(masks[k], image.shape[:2])
            if target.max() >= 128:  # else too small for the model's output to show
                targets[k] = target
            if len(targets) == self.masks_per_image:
                break
        if not targets:
            raise data.SampleError(f"{sample.source}: no mask of {sample.name} is as large as a pixel of the model's "
                                   "output")
        # Always the same number of objects, some of them twice with other points if need be: all steps have one shape.
        chosen = np.resize(list(targets), self.masks_per_image)
        if sample.pinned is None:
            drawn = [data.prompts(masks[k], data.seed_of(self.seed, i, slot)) for slot, k in enumerate(chosen)]
            points, boxes = (np.stack(part) for part in zip(*drawn))
        else:
            points, boxes = (part[chosen] for part in sample.prompts(masks))
        resize, size = ResizeLongestSide(self.size), image.shape[:2]
        points, boxes = resize.apply_coords(points, size), resize.apply_boxes(boxes, size)
        labels = np.ones(points.shape[:2], dtype=np.int64)
        if self.augment:
            labels, boxes = loosen(labels, boxes, rng)
        scaled = resize.apply_image(image)
        return dict(name=sample.name, condition=condition, image=torch.tensor(scaled).permute(2, 0, 1),
                    points=torch.from_numpy(points), labels=torch.from_numpy(labels), boxes=torch.from_numpy(boxes),
                    targets=torch.from_numpy(np.stack([targets[k] for k in chosen])))

    def target(self, mask, size):
        """bool HxW, of a picture of this size -> uint8 (4H, 4W): how much of each low-resolution pixel it covers."""
        height, width = ResizeLongestSide(self.size).get_preprocess_shape(*size)
        frame = Image.new("L", (self.size, self.size))  # like the picture: scaled, then padded right and below
        frame.paste(Image.fromarray(mask).convert("L").resize((width, height), Image.Resampling.BILINEAR))
        return np.asarray(frame.reduce(self.patch // 4))


def examples_of(train_set, args, steps):
    """The examples of so many steps of the run that `args` describes."""
    return Examples(train_set, args.backbone, steps * args.batch_size, args.seed, args.masks_per_image,
                    args.conditions, args.pretrain, args.clear, args.image_size)


def vary(image, masks, rng):
    """For `--pretrain`: the picture and its masks transposed, mirrored, with colour channels exchanged, at random."""
    if rng.random() < 0.5:
        image, masks = image.swapaxes(0, 1), masks.swapaxes(1, 2)
    for axis in (0, 1):
        if rng.random() < 0.5:
            image, masks = np.flip(image, axis), np.flip(masks, axis + 1)
    return np.ascontiguousarray(image[..., rng.permutation(3)]), np.ascontiguousarray(masks)


def loosen(labels, boxes, rng):
    """For `--pretrain`: prompts as people give them: one to three points (the rest "no point"), inexact boxes."""
    keep = rng.integers(1, 4, len(labels))
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    return (np.where(np.arange(3) < keep[:, None], labels, -1),
            (boxes + sides * rng.normal(0, 0.03, boxes.shape).clip(-0.1, 0.1)).astype(np.float32))


def batches(examples, first, args):
    """This process's share of the batches, beginning with batch number `first`: lists of examples."""
    shares = [range(start + args.process, start + args.batch_size, args.processes)
              for start in range(first * args.batch_size, len(examples), args.batch_size)]
    # Its own generator: the loader draws a seed when it starts, and a resumed run must not draw one more than another.
    return torch.utils.data.DataLoader(
        examples, batch_sampler=shares, num_workers=args.workers, collate_fn=list, generator=torch.Generator(),
        prefetch_factor=4 if args.workers else None, worker_init_fn=leave_signals_to_the_main_process)


def leave_signals_to_the_main_process(_):
    """Ctrl-C, and a cluster's SIGTERM, reach every process; the loader's must live until the main one has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------------------
# Loss and validation.
# ---------------------------------------------------------------------------------------------------------------------


def mask_loss(logits, targets):
    """20 x focal (gamma 2) + dice of each mask, SAM's and RobustSAM's weights: (..., h, w) twice -> (...).

    targets are in 0..1: a low-resolution pixel on an outline is partly covered. The focal loss weighs object and
    background alike, alpha = 0.5. Detection's usual 0.25 counts a missed object pixel a third of a false one, so where
    a picture leaves doubt, masks shrink: the tiny SAM trained with it did best at a threshold of -0.75, not 0.
    """
    p = logits.sigmoid()
    wrong = p + targets - 2 * p * targets  # 1 - p_t
    focal = 0.5 * wrong ** 2 * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    dice = 1 - (2 * (p * targets).sum((-2, -1)) + 1) / ((p + targets).sum((-2, -1)) + 1)
    return 20 * focal.mean((-2, -1)) + dice


def mask_iou(logits, targets):
    """IoU of logits > 0 with targets > 0.5: (..., h, w) twice -> (...)."""
    guess, truth = logits > 0, targets > 0.5
    return (guess & truth).sum((-2, -1)) / (guess | truth).sum((-2, -1)).clamp(min=1)


class Losses(torch.nn.Module):
    """A batch of examples -> its loss and its IoU by prompt kind."""

    def __init__(self, sam, pretrain):
        super().__init__()
        self.sam, self.pretrain = sam, pretrain

    def forward(self, batch):
        sam, device = self.sam, self.sam.device
        images = torch.cat([sam.preprocess(x["image"].to(device, non_blocking=True)[None]) for x in batch])
        points, labels, boxes, targets = (torch.cat([x[key] for x in batch]).to(device, non_blocking=True)
                                          for key in ("points", "labels", "boxes", "targets"))
        image_index = torch.tensor([n for n, x in enumerate(batch) for _ in x["boxes"]], device=device)
        targets = targets.float() / 255  # (P, 4H, 4W)
        embeddings = sam.image_encoder(images)
        if self.pretrain:
            return self.pretrain_loss(embeddings, points, labels, boxes, targets, image_index)
        losses, ious = [], {}
        for kind, prompt in (("point", dict(points=(points, labels))), ("box", dict(boxes=boxes))):
            logits, _ = sam.decode(embeddings, image_index=image_index, **prompt)
            logits = logits[:, 0].float()
            losses.append(mask_loss(logits, targets).mean())
            ious[kind] = mask_iou(logits, targets).mean()
        return sum(losses), ious

    def pretrain_loss(self, embeddings, points, labels, boxes, targets, image_index):
        """Each mask from one prompt kind, in turn; all four outputs learn, and the predicted IoU.

        The single mask answers every prompt; of the three for ambiguous prompts, only the best learns (as in SAM).
        """
        sam, losses, ious = self.sam, [], {}
        for kind, these in (("point", slice(0, None, 2)), ("box", slice(1, None, 2))):
            if kind == "point":
                sparse, dense = sam.prompt_encoder((points[these], labels[these]), None, None)
            else:
                sparse, dense = sam.prompt_encoder(None, boxes[these], None)
            logits, scores = sam.mask_decoder.predict_masks(
                embeddings[image_index[these]], sam.prompt_encoder.get_dense_pe(), sparse, dense)
            logits, truth = logits.float(), targets[these][:, None].expand_as(logits)
            each, iou = mask_loss(logits, truth), mask_iou(logits, truth)  # (P, 4)
            losses.append(each[:, 0] + each[:, 1:].amin(1) + (scores.float() - iou).square().mean(1))
            ious[kind] = iou[:, 0].mean()
        return torch.cat(losses).mean(), ious


@torch.no_grad()
def validate(sam, dataset, limit, conditions, autocast):
    """Mean IoU over masks at the pictures' own resolution: {"box clear": ..., "box degraded", "point clear", ...}.

    Up to `limit` pictures spread over the split, each clear, if that is one of the conditions, and in one of the others
    that its name chooses. Prompts and noise derive from names, so every call sees the same. Several processes share the
    pictures.
    """
    sam.eval()
    predictor, scores, (process, processes) = SamPredictor(sam), {}, place()
    bad = [condition for condition in conditions if condition != "clear"]
    for sample in data.spread(dataset, limit)[process::processes]:
        seen = {"clear": "clear"} if "clear" in conditions else {}
        if bad:
            seen["degraded"] = bad[data.seed_of(sample.name) % len(bad)]
        try:
            masks = sample.masks()
            points, boxes = (torch.from_numpy(p).to(sam.device) for p in sample.prompts(masks))
            images = {kind: sample.image(condition) for kind, condition in seen.items()}
        except data.SampleError as error:
            report(dataset, error)
            continue
        truth = torch.from_numpy(masks).to(sam.device).float()
        for kind, image in images.items():
            with autocast():
                predictor.set_image(image)
                coords = predictor.transform.apply_coords(points, predictor.original_size)
                corners = predictor.transform.apply_boxes(boxes, predictor.original_size)
                by_point, *_ = predictor.predict_torch(coords, torch.ones_like(coords[..., 0]), multimask_output=False)
                by_box, *_ = predictor.predict_torch(None, None, corners, multimask_output=False)
            for prompt, masks in (("point", by_point), ("box", by_box)):
                scores.setdefault(f"{prompt} {kind}", []).extend(mask_iou(masks[:, 0].float(), truth).tolist())
    if processes > 1:
        parts = [None] * processes
        dist.all_gather_object(parts, scores)
        scores = {key: [value for part in parts for value in part.get(key, ())] for part in parts for key in part}
    if not scores:
        raise TrainingError(f"{dataset.summary()}: no sample of the validation split can be read")
    return {key: math.fsum(value) / len(value) for key, value in sorted(scores.items())}


def report(dataset, error):
    """Count a bad sample, and print its line once."""
    if dataset.skip(error):
        print(f"skipped: {error}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The run.
# ---------------------------------------------------------------------------------------------------------------------


def place():
    """The number of this process, torch's "rank", and how many there are, its "world size"."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def build_model(args):
    """The frozen SAM with its adapter; its encoder free (`--method full`); with `--pretrain`, all of it free."""
    torch.manual_seed(args.seed)
    if args.pretrain:
        return build_sam(args.backbone, args.checkpoint).to(args.device)
    sam = build_sam(args.backbone, args.checkpoint or find_checkpoint(args.backbone), args.image_size)
    if args.method == "full":
        sam.requires_grad_(False).image_encoder.requires_grad_(True)
        return sam.to(args.device)
    options = {}
    for name in gara.METHODS[args.method].options:
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    gara.attach(sam, args.method, **options)
    if args.init and not args.resume:
        try:
            gara.load_adapter(sam, args.init)
        except (OSError, ValueError) as error:
            raise TrainingError(f"--init: {error}") from error
    return sam.to(args.device)


def learning_rate(step, args):
    """Linear warm-up over the first 5 % of the steps, then half a cosine down to zero, or constant."""
    warm = max(1, args.steps // 20)
    if step < warm:
        return args.lr * (step + 1) / warm
    if args.schedule == "constant":
        return args.lr
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, args.steps - warm)))


class Run:
    """A run's model, optimizer, progress and files."""

    def __init__(self, args):
        self.args, self.sam, self.step, self.best = args, build_model(args), 0, -1.0
        self.bad = self.bad_in_a_row = 0  # steps without a finite gradient
        self.sums, self.summed = {}, 0  # of what update() returned since the last line of the log
        if args.checkpointing:
            for block in self.sam.image_encoder.blocks:
                block.forward = functools.partial(recompute, block.forward, use_reentrant=False)
        if args.compile:
            self.sam.image_encoder.compile()
        self.losses = Losses(self.sam, args.pretrain)
        if args.processes > 1:  # averages the gradients; mask prompts are not trained with --pretrain
            self.losses = DistributedDataParallel(self.losses, find_unused_parameters=args.pretrain)
        self.parameters = [p for p in self.sam.parameters() if p.requires_grad]
        adam = torch.optim.AdamW if args.pretrain else torch.optim.Adam
        self.optimizer = adam(self.parameters, lr=args.lr, weight_decay=args.weight_decay,
                              fused=args.device.type == "cuda")
        self.whole = args.pretrain or args.method == "full"  # then a checkpoint is a SAM, not an adapter
        self.result = FILES[args.backbone] if args.pretrain else f"{args.method}.pt"

    def path(self, name):
        """Where a file of this run lies."""
        return os.path.join(self.args.out, name)

    def autocast(self):
        """bfloat16 where `--amp` says so."""
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.amp == "bf16")

    def log(self, **line):
        """Add a line to log.jsonl."""
        if self.args.process == 0:
            with open(self.path("log.jsonl"), "a") as file:
                file.write(json.dumps(dict(step=self.step, **line)) + "\n")

    def update(self, share):
        """One step of the optimizer, on this process's share of the batch, in `--accumulate` parts.

        Every example has as many masks as any other, so weights by examples make the gradient the mean over the masks
        of the whole batch, however it is shared. Adds means over the share to `sums`: loss, and IoU by prompt kind.
        A step whose gradient is not finite leaves the model as it is and is counted.
        """
        args = self.args
        self.sam.train()
        # What the gates draw depends on the step alone, not on what came before: a resumed run draws the same.
        torch.manual_seed(data.seed_of(args.seed, "step", self.step, args.process))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, args)
        self.optimizer.zero_grad(set_to_none=True)
        parts = [part for k in range(args.accumulate) if (part := share[k::args.accumulate])]
        means = {}
        for part in parts:
            last = part is parts[-1]
            with self.losses.no_sync() if args.processes > 1 and not last else contextlib.nullcontext():
                with self.autocast():
                    loss, ious = self.losses(part)
                (loss * (len(part) * args.processes / args.batch_size)).backward()
            for key, value in {"loss": loss.detach(), **ious}.items():
                means[key] = means.get(key, 0) + value * (len(part) / len(share))
        clip = args.clip or (1.0 if args.pretrain else math.inf)  # early gradients throw random weights far off
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        self.step += 1
        if norm.isfinite():
            self.optimizer.step()
            self.bad_in_a_row = 0
            self.sums = {key: self.sums.get(key, 0) + value for key, value in means.items()}
            self.summed += 1
            return
        self.bad, self.bad_in_a_row = self.bad + 1, self.bad_in_a_row + 1
        names = ", ".join(example["name"] for example in share)
        print(f"step {self.step - 1:,} skipped, its gradient is not finite: loss {means['loss'].item():.4g} on {names}",
              flush=True)
        if self.bad_in_a_row == BAD_STEPS:
            raise TrainingError(f"{BAD_STEPS} steps in a row without a finite gradient, the last on {names}; lower "
                                "--lr or say --amp off (last.pt, if any, holds the last good state)")

    def means(self):
        """Means since the last call, over all processes: {"loss": ..., "point": ..., "box": ...}; {} without steps."""
        keys = sorted(self.sums)
        values = torch.tensor([float(self.sums[key]) for key in keys], device=self.args.device) / max(self.summed, 1)
        if self.args.processes > 1:
            dist.all_reduce(values.div_(self.args.processes))
        self.sums, self.summed = {}, 0
        return dict(zip(keys, values.tolist()))

    def gate_statistics(self):
        """Per layer, over the last batch: share of images in the higher-rank set, mean number of open components."""
        if self.whole or self.args.method == "lora":
            return {}
        layers = gara.gates(self.sam)
        return dict(higher=[round(layer["space"].float().mean().item(), 4) for layer in layers],
                    active=[round(layer["count"].float().mean().item(), 2) for layer in layers])

    def validate(self, val_set):
        """Validate, keep the best, write a checkpoint."""
        args = self.args
        scores = validate(self.sam, val_set, args.val_images, args.conditions, self.autocast)
        bad = len(set(args.conditions) - {"clear"})
        weights = [bad if "degraded" in key else 1 for key in scores]  # all conditions count alike, as in training
        score = float(np.average(list(scores.values()), weights=weights))
        if args.process == 0:
            each = "  ".join(f"{key} {value:.4f}" for key, value in scores.items())
            print(f"step {self.step:,}  validation IoU  {each}", flush=True)
        if score > self.best:
            self.best = score
            self.save(self.result, validation=scores)
        self.log(validation=scores, best=self.best)
        self.checkpoint(validation=scores)

    def checkpoint(self, **meta):
        """Write last.pt, the model and all that going on needs, and draw the curve."""
        training = dict(step=self.step, best=self.best, bad=self.bad, bad_in_a_row=self.bad_in_a_row, sums=self.sums,
                        summed=self.summed, optimizer=self.optimizer.state_dict(), batch_size=self.args.batch_size,
                        seed=self.args.seed, steps=self.args.steps)
        self.save("last.pt", training=training, **meta)
        if self.args.process == 0 and os.path.exists(self.path("log.jsonl")):
            curve(self.path("log.jsonl"), self.path("curve.png"))

    def save(self, name, **meta):
        """Write the adapter, or the whole SAM's weights: complete, or not at all."""
        if self.args.process:
            return
        path = self.path(name)
        meta |= dict(step=self.step, settings={key: str(value) for key, value in vars(self.args).items()})
        try:
            if not self.whole:
                gara.save_adapter(self.sam, path, **meta)
                return
            content = dict(sam=self.sam.state_dict(), **meta)
            if "training" not in meta:  # finished weights, in SAM's own form
                content = content["sam"]
            if self.args.pretrain and "training" not in meta:  # the rounding is far below training noise
                content = {key: value.half() for key, value in content.items()}
            torch.save(content, path + ".part")
            os.replace(path + ".part", path)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            if os.path.exists(path + ".part"):
                os.remove(path + ".part")
            free = shutil.disk_usage(self.args.out).free / 1e6
            raise TrainingError(f"cannot write {path}, {free:,.0f} MB are free there; what was saved before is kept: "
                                f"make room and --resume ({str(error).splitlines()[0]})") from error

    def resume(self):
        """Go back to the state in last.pt."""
        path, args = self.path("last.pt"), self.args
        if not os.path.isfile(path):
            raise TrainingError(f"--resume: there is no {path}; start without --resume, or name the run with --out")
        try:
            if self.whole:
                content = torch.load(path, map_location="cpu", weights_only=True)
                self.sam.load_state_dict(content["sam"])
            else:
                content = gara.load_adapter(self.sam, path)
            training = content["training"]
            for name in ("batch_size", "seed", "steps"):
                if training[name] != getattr(args, name):
                    raise TrainingError(f"--resume: {path} is of a run with --{name.replace('_', '-')} "
                                        f"{training[name]}, not {getattr(args, name)}")
            self.optimizer.load_state_dict(training["optimizer"])
            self.step, self.best = training["step"], training["best"]
            self.bad, self.bad_in_a_row = training["bad"], training["bad_in_a_row"]
            self.sums = {key: value.to(args.device) for key, value in training["sums"].items()}
            self.summed = training["summed"]
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
            raise TrainingError(f"--resume: {path} is damaged or not of such a run; start another --out") from error
        if args.process == 0:  # what was logged after last.pt was written happens again
            lines = [json.dumps(line) + "\n" for line in read_log(self.path("log.jsonl")) if line["step"] <= self.step]
            data.save_text("".join(lines), self.path("log.jsonl"))
            curve(self.path("log.jsonl"), self.path("curve.png"))
            for name in os.listdir(args.out):  # what a kill in the middle of writing left
                if name.endswith(".part"):
                    os.remove(self.path(name))

    def describe(self, datasets):
        """Write run.json: every setting, versions, the data, the code's commit, parameter counts."""
        def git(*arguments):
            try:
                here = os.path.dirname(os.path.abspath(__file__))
                return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True).stdout.strip()
            except OSError:  # no git here
                return ""
        content = dict(
            settings={key: value if isinstance(value, (int, float, bool, list, type(None))) else str(value)
                      for key, value in vars(self.args).items()},
            versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
            machine=f"{platform.machine()}, {os.cpu_count()} cores, "
                    + (torch.cuda.get_device_name() if self.args.device.type == "cuda" else "no GPU in use"),
            data=[dict(root=d.root, split=d.split, kind=d.kind, images=len(d), masks=d.masks, skipped=len(d.skipped),
                       fingerprint=hashlib.sha256("\n".join(s.name for s in d).encode()).hexdigest()[:16])
                  for d in datasets],
            commit=git("rev-parse", "HEAD") or None, uncommitted_changes=bool(git("status", "--porcelain")),
            learnable_parameters=sum(p.numel() for p in self.parameters),
            all_parameters=sum(p.numel() for p in self.sam.parameters()))
        data.save_text(json.dumps(content, indent=1), self.path("run.json"))


class Interrupt:
    """Ctrl-C and SIGTERM (a cluster's notice) end the run after the step at hand; a second Ctrl-C ends it at once."""

    def __init__(self):
        self.signal = 0
        self.before = {number: signal.signal(number, self.notice) for number in (signal.SIGINT, signal.SIGTERM)}

    def notice(self, number, frame):
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number

    def anywhere(self, device):
        """The signal, if any process of the run got one: all must stop after the same step."""
        if dist.is_initialized():
            flag = torch.tensor(self.signal, device=device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            return int(flag)
        return self.signal

    def close(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(args):
    """The whole run. Returns the exit code: 0, or 128 + the number of the signal that ended it early."""
    sets = {split: data.load_datasets(args.data, split, args.strict) for split in ("train", "val")}
    if args.prompts:
        data.pin_prompts(sets["train"] + sets["val"], args.prompts)
    if args.limit:
        for dataset in sets["train"]:
            dataset.samples = data.spread(dataset, args.limit)
    everything = sets["train"] + sets["val"]
    train_set, val_set = (data.Union(parts) if len(parts) > 1 else parts[0] for parts in sets.values())
    if args.epochs:
        args.steps = max(1, round(args.epochs * len(train_set) / args.batch_size))
    args.val_every = args.val_every or max(1, args.steps // 10)
    run = Run(args)
    if args.process == 0:
        count = sum(p.numel() for p in run.parameters)
        for dataset in everything:
            print(dataset.summary())
        print(f"{args.backbone}, {'pretrain' if args.pretrain else args.method}: {count:,} learnable parameters; "
              f"{args.steps:,} steps of {args.batch_size} images; {args.processes} x {args.device}, amp {args.amp}, "
              f"seed {args.seed}", flush=True)
        os.makedirs(args.out, exist_ok=True)
    if args.resume:
        run.resume()
    elif args.process == 0 and os.path.exists(run.path("log.jsonl")):
        os.remove(run.path("log.jsonl"))  # of a run that ended before it had a checkpoint
    if args.process == 0:
        run.describe(everything)
    interrupt = Interrupt()
    try:
        if not (args.resume or args.pretrain):
            run.validate(val_set)  # the frozen SAM: what the adapter has to beat
        steps(run, train_set, val_set, interrupt)
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            run.checkpoint()
            raise TrainingError("a process that loads data died, perhaps for lack of memory; lower --workers, then "
                                f"--resume goes on from step {run.step:,}") from error
        if isinstance(error, torch.OutOfMemoryError):
            raise TrainingError("out of memory: raise --accumulate, add --checkpointing, lower --batch-size") from error
        raise
    finally:
        interrupt.close()
    if args.process == 0:
        if run.step < args.steps:
            print(f"stopped by signal {interrupt.signal} after step {run.step:,}; --resume goes on from there",
                  file=sys.stderr)
        else:
            print(f"best: validation IoU {run.best:.4f}, {run.path(run.result)}; {train_set.summary()}")
    return 0 if run.step == args.steps else 128 + (interrupt.signal or signal.SIGTERM)


def steps(run, train_set, val_set, interrupt):
    """Train from run.step to the end, or until interrupted."""
    args = run.args
    examples = examples_of(train_set, args, args.steps)
    first, started, count = run.step, time.monotonic(), 0
    interval, waited, asked, written = started, 0.0, started, started
    for share in batches(examples, run.step, args):
        waited += time.monotonic() - asked
        for example in share:
            if isinstance(example, TrainingError):
                run.checkpoint()
                raise example
            for error in example["bad"]:
                report(train_set, error)
        run.update(share)
        count += 1
        if run.step % args.log_every == 0 or run.step == args.steps:
            now = time.monotonic()
            means = run.means()
            speed, waiting = count * args.batch_size / (now - interval), waited / (now - interval)
            left = round((args.steps - run.step) * (now - started) / (run.step - first))
            run.log(**means, lr=learning_rate(run.step - 1, args), images_per_second=speed, waiting=waiting,
                    skipped_steps=run.bad, **run.gate_statistics())
            ious = " ".join(f"{key} {value:.3f}" for key, value in means.items() if key != "loss")
            if args.process == 0:
                print(f"step {run.step:,}/{args.steps:,}  loss {means.get('loss', math.nan):.4f}  IoU {ious}  "
                      f"{speed:.1f} images/s  {waiting:.0%} waiting for data  "
                      f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left", flush=True)
            count = 0
        stop = interrupt.anywhere(args.device)
        if run.step % args.val_every == 0 or run.step == args.steps:  # even on a stop: it would not be made up for
            run.validate(val_set)
            written = time.monotonic()
        elif stop or time.monotonic() - written > 60 * args.save_minutes:
            run.checkpoint()
            written = time.monotonic()
        if args.keep_every and run.step % args.keep_every == 0:
            run.save(f"step_{run.step}.pt")
        if stop:
            interrupt.signal = stop
            return
        asked = time.monotonic()
        if not count:
            interval, waited = asked, 0.0


# ---------------------------------------------------------------------------------------------------------------------
# The curve, and the command line.
# ---------------------------------------------------------------------------------------------------------------------


BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#aa4499"  # told apart by colour-blind readers
COLOURS = {"loss": BLUE, "point": BLUE, "box": ORANGE, "point degraded": BLUE, "box degraded": ORANGE,
           "point clear": GREEN, "box clear": PURPLE}


def read_log(path):
    """The lines of log.jsonl; one that a crash cut short is left out."""
    lines = []
    with open(path) as file:
        for line in file:
            if line.endswith("\n"):
                lines.append(json.loads(line))
    return lines


def curve(log, path):
    """Draw log.jsonl as a PNG: loss; IoU in training (thin) and validation (dots); what the gates of each layer do."""
    lines = read_log(log)
    loss = {"loss": [(x["step"], x["loss"]) for x in lines if "loss" in x]}
    iou = {key: [(x["step"], x[key]) for x in lines if key in x] for key in ("point", "box")}
    dots = {}
    for x in lines:
        for key, value in x.get("validation", {}).items():
            dots.setdefault(key, []).append((x["step"], value))
    gated = [x for x in lines if "active" in x]
    page = Image.new("RGB", (1400, 1060 if gated else 520), "white")
    pen = ImageDraw.Draw(page)
    plot(pen, (80, 60, 660, 440), "training loss", loss, {}, COLOURS)
    plot(pen, (780, 60, 1360, 440), "IoU (lines: training, dots: validation)", iou, dots, COLOURS)
    for key, title, x in (("higher", "share of images in the higher-rank set", 80),
                          ("active", "open components, mean over images", 780)) if gated else ():
        depth = len(gated[0][key])
        layers = {f"layer {k}": [(line["step"], line[key][k]) for line in gated] for k in range(depth)}
        shades = {f"layer {k}": shade(k / max(1, depth - 1)) for k in range(depth)}
        plot(pen, (x, 600, x + 580, 980), title, layers, {}, shades)
    data.save_png(page, path)


def shade(x):
    """A colour from pale blue (first layer) to black (last), x in 0..1."""
    return tuple(round((1 - x) * a) for a in (120, 190, 255))


def plot(pen, frame, title, lines, marks, colours):
    """One set of axes within frame (x0, y0, x1, y1): {name: [(x, y)]} as lines, and as joined dots; legend below."""
    font = ImageFont.load_default(18)
    xs, ys = zip(*[xy for series in (*lines.values(), *marks.values()) for xy in series] or [(0, 0)])
    low, high = min(ys), max(ys)
    low, high, last = low - 0.05 * (high - low + 1e-6), high + 0.05 * (high - low + 1e-6), max(*xs, 1)
    x0, y0, x1, y1 = frame

    def at(x, y):
        return x0 + (x1 - x0) * x / last, y1 - (y1 - y0) * (y - low) / (high - low)

    pen.text((x0, y0 - 36), title, "black", ImageFont.load_default(22))
    for tick in range(5):
        y = low + (high - low) * tick / 4
        pen.line([at(0, y), at(last, y)], "#dddddd")
        pen.text((x0 - 8, at(0, y)[1]), f"{y:.3g}", "black", font, anchor="rm")
        pen.text((at(last * tick / 4, low)[0], y1 + 8), f"{last * tick / 4:,.0f}", "black", font, anchor="ma")
    for name, series in lines.items():
        pen.line([at(*xy) for xy in series], colours[name], 2)
    for name, series in marks.items():
        pen.line([at(*xy) for xy in series], colours[name], 3)
        for x, y in (at(*xy) for xy in series):
            pen.ellipse((x - 5, y - 5, x + 5, y + 5), colours[name])
    x = x0
    names = list(marks or lines)
    for name in names if len(names) <= 6 else (names[0], names[len(names) // 2], names[-1]):
        pen.rectangle((x, y1 + 50, x + 16, y1 + 58), colours[name])
        pen.text((x + 22, y1 + 44), name, "black", font)
        x += 40 + pen.textlength(name, font)


def parse(argv):
    """The command line, checked, with every default filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    add = parser.add_argument
    add("--data", required=True, nargs="+", metavar="ROOT",
        help="dataset folders of any kind that data.py reads, with splits train and val; demo/ is made if it is not "
             "there; KIND=ROOT where the kind is not plain to see")
    add("--prompts", nargs="+", metavar="JSON", help="use exactly these prompts (data.py ROOT --export-prompts JSON), "
        "in training and validation, instead of drawing new ones for every step")
    add("--strict", action="store_true", help="a bad or missing file is an error; else it is skipped and counted")
    add("--backbone", choices=BACKBONES, default="vit_t", help="vit_t (default) comes with the project")
    add("--checkpoint", help="SAM weights; default: assets/, checkpoints/, the torch hub cache, else downloaded")
    add("--method", choices=(*gara.METHODS, "full"), default="gara", help="full: no adapter, the whole encoder learns")
    add("--rank-low", type=int, help="gara, gara_space, gara_random: components of the lower-rank space (default 16; "
        "vit_t 4)")
    add("--rank-high", type=int, help="the same: components of the higher-rank space (default 256; vit_t 48)")
    add("--rank", type=int, help="lora, gara_flat: components (default 16; vit_t 4)")
    add("--experts", type=lambda text: tuple(map(int, text.split(","))), help="moe_lora: ranks, as 2,16,128,256")
    add("--temperature", type=float, default=0.5, help="of the Gumbel-sigmoid")
    add("--scope", choices=gara.SCOPES, default="image", help="what the gates decide for: each image (default), or in "
        "layers that attend within windows each window")
    add("--init", metavar="ADAPTER", help="begin with this trained adapter's weights: for further training on other data")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="default 450 for vit_t, else 40000")
    length.add_argument("--epochs", type=float)
    add("--batch-size", type=int, help="pictures (default 16 for vit_t, else 8)")
    add("--accumulate", type=int, default=1, metavar="N", help="parts that a process does its share of the batch in")
    add("--masks-per-image", type=int, help="objects of a picture, sharing its encoding (default 2 for vit_t, else 4)")
    add("--lr", type=float, help="peak learning rate (default 1e-3 for vit_t, 1e-4 for vit_b, 1e-5 for vit_l and vit_h)")
    add("--schedule", choices=("cosine", "constant"), default="cosine", help="after a warm-up of 5 %% of the steps")
    add("--weight-decay", type=float, default=1e-5)
    add("--clip", type=float, help="largest norm of the gradient (default: none; 1 with --pretrain)")
    add("--conditions", nargs="+", metavar="NAME", help="what pictures are trained and validated in (default: clear "
        "and the 15 corruptions); also night and underwater, and strengths as fog@2")
    add("--clear", type=float, metavar="P", help="chance of a clear picture (default: as of any other condition)")
    add("--seed", type=int, default=0)
    add("--no-corrupt", action="store_true", help="use the pictures as they are: --conditions clear")
    add("--pretrain", action="store_true", help="train the whole model on clear pictures, from scratch or --checkpoint")
    add("--limit", type=int, help="only this many pictures of each training set, spread over it: for a try")
    add("--image-size", type=int, metavar="PIXELS", help="side of the square that the model sees (default 1024; vit_t "
        "128): a smaller one makes a quick try, its positions interpolated")
    add("--checkpointing", action="store_true", help="compute each block twice to save its memory")
    add("--compile", action="store_true", help="torch.compile the encoder")
    add("--out", help="folder of the run (default runs/BACKBONE_METHOD)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    add("--amp", choices=("auto", "off", "bf16"), default="auto", help="auto: bf16 where the CPU or GPU computes in it")
    add("--workers", type=int, help="loader processes (default: half the cores, at most 8)")
    add("--log-every", type=int, default=20, help="steps")
    add("--save-minutes", type=float, default=10, help="write last.pt at least this often (default 10)")
    add("--keep-every", type=int, metavar="STEPS", help="also keep the adapter of every so many steps")
    add("--val-every", type=int, help="steps (default: a tenth of the run)")
    add("--val-images", type=int, default=64, help="pictures of the validation split used, at most")
    args = parser.parse_args(argv)
    for name in ("steps", "epochs", "batch_size", "accumulate", "masks_per_image", "lr", "clip", "temperature", "limit",
                 "log_every", "save_minutes", "keep_every", "val_every", "val_images"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    for name, value in DEFAULTS[args.backbone].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.pretrain and args.prompts:
        parser.error("--pretrain varies its pictures, so it cannot use --prompts")
    if args.image_size and (args.pretrain or args.method == "full"):
        parser.error("--image-size is for adapters: whole models are trained at their own size")
    if args.pretrain and args.batch_size * args.masks_per_image < 2:
        parser.error("--pretrain needs two objects a step: raise --batch-size or --masks-per-image")
    args.workers = min(8, (os.cpu_count() or 2) // 2) if args.workers is None else args.workers
    if args.workers < 0:
        parser.error("--workers must be 0 or more")
    args.out = args.out or os.path.join("runs", f"{args.backbone}_{'pretrain' if args.pretrain else args.method}")
    args.process, args.processes = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    if args.batch_size < args.processes:  # torchrun has set these two
        parser.error(f"--batch-size {args.batch_size} is too small for {args.processes} processes, who share a batch")
    if args.clear is not None and not 0 <= args.clear <= 1:
        parser.error("--clear is a chance, from 0 to 1")
    if args.init and (args.pretrain or args.method == "full"):
        parser.error("--init is for adapters: whole models begin with --checkpoint")
    if args.conditions and (args.no_corrupt or args.pretrain):
        parser.error("--conditions: --no-corrupt and --pretrain use the pictures as they are")
    args.conditions = args.conditions or (["clear"] if args.no_corrupt or args.pretrain else list(data.CONDITIONS))
    for condition in args.conditions:
        try:
            data.name_and_strength(condition)
        except data.DatasetError as error:
            parser.error(f"--conditions: {error}")
    try:
        gpu = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}" if args.processes > 1 else "cuda"
        args.device = torch.device(args.device or (gpu if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: {str(error).splitlines()[0]}")
    if args.amp == "auto":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 does not tell
        cpu = args.device.type == "cpu" and (cpu.get("amx_bf16") or cpu.get("avx512_bf16"))
        args.amp = "bf16" if args.device.type == "cuda" or cpu else "off"
    return args


def main(argv=None):
    """Run the command line; returns the exit code. A user's mistake ends in one line."""
    args = parse(argv)
    try:
        if not args.resume and os.path.exists(os.path.join(args.out, "last.pt")):
            raise TrainingError(f"{args.out} holds a run already: --resume goes on with it, --out NAME starts another")
        if args.process == 0:
            for root in args.data:
                data.make_missing_demo(root)
        if args.processes > 1:
            if args.device.type == "cuda":
                torch.cuda.set_device(args.device)
            dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
            dist.barrier()
        if args.device.type == "cpu":
            keep_freed_memory()
        return train(args)
    except (TrainingError, data.DatasetError, OSError, ValueError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
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
