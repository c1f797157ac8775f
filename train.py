"""Trains adapters on a frozen SAM with the segmentation loss alone, on degraded pictures that need no clean twin.

    python train.py --data demo/                                GaRA on the tiny SAM of this project, in minutes
    python train.py --backbone vit_b --data robustseg/          the paper's setting
    python train.py --backbone vit_b --data real/ --no-corrupt  pictures that are degraded already
    python train.py --pretrain --data scenes/                   the tiny SAM itself, from scratch, on clear pictures

One step: draw `--batch-size` pictures, each in one of 16 conditions (clear and the 15 corruptions) with equal chance;
encode each once; decode `--masks-per-image` of its objects twice, from three points and from the box; 20 x focal + dice
loss on both; Adam on the adapter. Example i of a run is a function of (seed, i) alone, so the number of loader
processes changes nothing, and `--resume` goes on as if there had been no interruption.

Written to `--out` (runs/BACKBONE_METHOD): METHOD.pt, the adapter that was best on the validation split; last.pt, the
newest one with what `--resume` needs; log.jsonl, one line per interval; curve.png.
"""
import argparse
import json
import math
import os
import pickle
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
import gara
from corruptions import CORRUPTIONS
from sam import BACKBONES, FILES, ResizeLongestSide, SamPredictor, build_sam, find_checkpoint

# What a run uses where the command line is silent. The paper gives Adam, batch 8 and both prompt kinds. Its learning
# rates did not survive in the text we have, its number of steps is not stated: 1e-4 is RobustSAM's, 40,000 is ours.
OFFICIAL = dict(steps=40000, lr=1e-4, batch_size=8, masks_per_image=4)
DEFAULTS = {"vit_t": dict(steps=1300, lr=2e-3, batch_size=16, masks_per_image=2),
            "vit_b": OFFICIAL, "vit_l": OFFICIAL, "vit_h": OFFICIAL}


class TrainingError(Exception):
    """The run cannot start or go on. One line: what happened and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Examples: what the loader's processes prepare.
# ---------------------------------------------------------------------------------------------------------------------


class Examples(torch.utils.data.Dataset):
    """Example i of a run: a picture in a drawn condition, scaled to the model, with prompts and targets for objects.

    A bad sample is replaced by the next one of the epoch; its error travels along in `bad`, for the main process.
    """

    def __init__(self, samples, backbone, count, seed, masks_per_image, corrupt, augment):
        self.samples, self.count, self.seed, self.masks_per_image = samples, count, seed, masks_per_image
        self.conditions = data.CONDITIONS if corrupt else ("clear",)
        self.augment = augment
        self.size, self.patch = BACKBONES[backbone]["image_size"], BACKBONES[backbone]["patch"]

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
        # Equal chance, dealt like cards: every 16 examples hold each condition once, so batches differ less.
        deal, place = divmod(i, len(self.conditions))
        shuffled = np.random.default_rng(data.seed_of(self.seed, "conditions", deal)).permutation(len(self.conditions))
        condition = self.conditions[shuffled[place]]
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
            raise data.SampleError(f"{sample.source}: no mask is as large as a pixel of the model's output")
        # Always the same number of objects, some of them twice with other points if need be: all steps have one shape.
        chosen = np.resize(list(targets), self.masks_per_image)
        drawn = [data.prompts(masks[k], data.seed_of(self.seed, i, slot)) for slot, k in enumerate(chosen)]
        resize, size = ResizeLongestSide(self.size), image.shape[:2]
        points = resize.apply_coords(np.stack([points for points, _ in drawn]), size)
        boxes = resize.apply_boxes(np.stack([box for _, box in drawn]), size)
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


def batches(examples, first, batch_size, workers):
    """Lists of examples, beginning with batch number `first`."""
    indices = range(first * batch_size, len(examples))
    # Its own generator: the loader draws a seed when it starts, and a resumed run must not draw one more than another.
    return torch.utils.data.DataLoader(examples, batch_size, sampler=indices, num_workers=workers, collate_fn=list,
                                       prefetch_factor=4 if workers else None, generator=torch.Generator())


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
def validate(sam, dataset, limit, corrupt, autocast):
    """Mean IoU over masks at the pictures' own resolution: {"box clear": ..., "box degraded", "point clear", ...}.

    Up to `limit` pictures spread over the split, each clear and in one corruption that its name chooses. Prompts and
    noise derive from names, so every call sees the same.
    """
    sam.eval()
    predictor, names, scores = SamPredictor(sam), tuple(CORRUPTIONS), {}
    for sample in data.spread(dataset, limit):
        conditions = ("clear", names[data.seed_of(sample.name) % len(names)]) if corrupt else ("clear",)
        try:
            masks = sample.masks()
            points, boxes = (torch.from_numpy(p).to(sam.device) for p in sample.prompts(masks))
            images = [sample.image(condition) for condition in conditions]
        except data.SampleError as error:
            report(dataset, error)
            continue
        truth = torch.from_numpy(masks).to(sam.device).float()
        for kind, image in zip(("clear", "degraded"), images):
            with autocast():
                predictor.set_image(image)
                coords = predictor.transform.apply_coords(points, predictor.original_size)
                corners = predictor.transform.apply_boxes(boxes, predictor.original_size)
                by_point, *_ = predictor.predict_torch(coords, torch.ones_like(coords[..., 0]), multimask_output=False)
                by_box, *_ = predictor.predict_torch(None, None, corners, multimask_output=False)
            for prompt, masks in (("point", by_point), ("box", by_box)):
                scores.setdefault(f"{prompt} {kind}", []).extend(mask_iou(masks[:, 0].float(), truth).tolist())
    if not scores:
        raise TrainingError(f"{dataset.summary()}: no sample of the validation split can be read")
    return {key: float(np.mean(value)) for key, value in sorted(scores.items())}


def report(dataset, error):
    """Count a bad sample, and print its line once."""
    if dataset.skip(error):
        print(f"skipped: {error}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The run.
# ---------------------------------------------------------------------------------------------------------------------


def build_model(args):
    """The frozen SAM with its adapter; with `--pretrain`, a random SAM that trains whole."""
    torch.manual_seed(args.seed)
    if args.pretrain:
        return build_sam(args.backbone).to(args.device)
    sam = build_sam(args.backbone, args.checkpoint or find_checkpoint(args.backbone))
    options = {"gara": ("rank_low", "rank_high", "temperature"), "gara_flat": ("rank", "temperature"),
               "lora": ("rank",), "moe_lora": ("experts", "temperature")}[args.method]
    given = {name: getattr(args, name) for name in options if getattr(args, name) is not None}
    return gara.attach(sam, args.method, **given).to(args.device)


def learning_rate(step, args):
    """Linear warm-up over the first 5 % of the steps, then half a cosine down to zero."""
    warm = max(1, args.steps // 20)
    if step < warm:
        return args.lr * (step + 1) / warm
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, args.steps - warm)))


class Run:
    """A run's model, optimizer, progress and files."""

    def __init__(self, args):
        self.args, self.sam, self.step, self.best = args, build_model(args), 0, -1.0
        self.losses = Losses(self.sam, args.pretrain)
        self.parameters = [p for p in self.sam.parameters() if p.requires_grad]
        adam = torch.optim.AdamW if args.pretrain else torch.optim.Adam
        self.optimizer = adam(self.parameters, lr=args.lr, weight_decay=args.weight_decay,
                              fused=args.device.type == "cuda")
        self.result = FILES[args.backbone] if args.pretrain else f"{args.method}.pt"

    def path(self, name):
        """Where a file of this run lies."""
        return os.path.join(self.args.out, name)

    def autocast(self):
        """bfloat16 where `--amp` says so."""
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.amp == "bf16")

    def log(self, **line):
        """Add a line to log.jsonl."""
        with open(self.path("log.jsonl"), "a") as file:
            file.write(json.dumps(dict(step=self.step, **line)) + "\n")

    def update(self, batch):
        """One step of the optimizer. Returns detached tensors: loss, and IoU of the batch by prompt kind."""
        self.sam.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.args)
        with self.autocast():
            loss, ious = self.losses(batch)
        if not loss.isfinite():
            names = ", ".join(example["name"] for example in batch)
            raise TrainingError(f"step {self.step}: the loss is {loss.item()} on {names}; lower --lr or say --amp off "
                                "(last.pt, if any, holds the last good state)")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.args.pretrain:  # early gradients throw random weights far off; an adapter starts from a trained model
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        return {"loss": loss.detach(), **ious}

    def checkpoint(self, val_set):
        """Validate; keep the best; write last.pt and the curve."""
        args = self.args
        scores = validate(self.sam, val_set, args.val_images, not (args.no_corrupt or args.pretrain), self.autocast)
        each = "  ".join(f"{key} {value:.4f}" for key, value in scores.items())
        print(f"step {self.step:,}  validation IoU  {each}", flush=True)
        weights = [15 if "degraded" in key else 1 for key in scores]  # the 16 conditions count alike, as in training
        score = float(np.average(list(scores.values()), weights=weights))
        meta = dict(step=self.step, validation=scores, settings={key: str(value) for key, value in vars(args).items()})
        if score > self.best:
            self.best = score
            self.save(self.result, **meta)
        cuda_rng = torch.cuda.get_rng_state_all() if args.device.type == "cuda" else None
        training = dict(step=self.step, best=self.best, optimizer=self.optimizer.state_dict(),
                        torch_rng=torch.get_rng_state(), cuda_rng=cuda_rng)
        self.save("last.pt", **meta, training=training)
        self.log(validation=scores, best=self.best)
        curve(self.path("log.jsonl"), self.path("curve.png"))

    def save(self, name, **meta):
        """Write the adapter, or the pretrained SAM's weights: whole, or not at all."""
        path = self.path(name)
        try:
            if not self.args.pretrain:
                gara.save_adapter(self.sam, path, **meta)
                return
            content = dict(sam=self.sam.state_dict(), **meta)
            if "training" not in meta:  # finished weights, in half precision: the rounding is far below training noise
                content = {key: value.half() for key, value in content["sam"].items()}
            torch.save(content, path + ".part")
            os.replace(path + ".part", path)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            if os.path.exists(path + ".part"):
                os.remove(path + ".part")
            raise TrainingError(f"cannot write {path}: {str(error).splitlines()[0]}") from error

    def resume(self):
        """Go back to the state in last.pt."""
        path = self.path("last.pt")
        if not os.path.isfile(path):
            raise TrainingError(f"--resume: there is no {path}; start without --resume, or name the run with --out")
        try:
            if self.args.pretrain:
                content = torch.load(path, map_location="cpu", weights_only=True)
                self.sam.load_state_dict(content["sam"])
            else:
                content = gara.load_adapter(self.sam, path)
            training = content["training"]
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
            raise TrainingError(f"--resume: {path} is damaged or not of such a run; start another --out") from error
        self.optimizer.load_state_dict(training["optimizer"])
        self.step, self.best = training["step"], training["best"]
        torch.set_rng_state(training["torch_rng"])
        if training["cuda_rng"] and self.args.device.type == "cuda":
            torch.cuda.set_rng_state_all(training["cuda_rng"])
        with open(self.path("log.jsonl")) as file:  # what was logged after last.pt was written happens again
            lines = [line for line in file if json.loads(line)["step"] <= self.step]
        with open(self.path("log.jsonl"), "w") as file:
            file.writelines(lines)


def train(args):
    """The whole run. Returns the best validation score: IoU, mean over prompt kinds and the 16 conditions."""
    train_set, val_set = (data.load_dataset(args.data, split) for split in ("train", "val"))
    for dataset in (train_set, val_set):
        print(dataset.summary())
    if args.epochs:
        args.steps = max(1, round(args.epochs * len(train_set) / args.batch_size))
    args.val_every = args.val_every or max(1, args.steps // 10)
    run = Run(args)
    os.makedirs(args.out, exist_ok=True)
    count = sum(p.numel() for p in run.parameters)
    print(f"{args.backbone}, {'pretrain' if args.pretrain else args.method}: {count:,} learnable parameters; "
          f"{args.steps:,} steps of {args.batch_size} images; {args.device}, amp {args.amp}, seed {args.seed}",
          flush=True)
    if args.resume:
        run.resume()
    elif not args.pretrain:
        run.checkpoint(val_set)  # the frozen SAM: what the adapter has to beat
    examples = Examples(train_set, args.backbone, args.steps * args.batch_size, args.seed, args.masks_per_image,
                        corrupt=not (args.no_corrupt or args.pretrain), augment=args.pretrain)
    first, started, sums, count = run.step, time.monotonic(), {}, 0
    interval, waited, asked = started, 0.0, started
    for batch in batches(examples, run.step, args.batch_size, args.workers):
        waited += time.monotonic() - asked
        for example in batch:
            if isinstance(example, TrainingError):
                raise example
            for error in example["bad"]:
                report(train_set, error)
        for key, value in run.update(batch).items():
            sums[key] = sums.get(key, 0) + value
        count += 1
        if run.step % args.log_every == 0 or run.step == args.steps:
            now = time.monotonic()
            means = {key: float(value) / count for key, value in sums.items()}
            speed, waiting = count * args.batch_size / (now - interval), waited / (now - interval)
            left = round((args.steps - run.step) * (now - started) / (run.step - first))
            run.log(**means, lr=learning_rate(run.step - 1, args), images_per_second=speed, waiting=waiting)
            ious = " ".join(f"{key} {value:.3f}" for key, value in means.items() if key != "loss")
            print(f"step {run.step:,}/{args.steps:,}  loss {means['loss']:.4f}  IoU {ious}  {speed:.1f} images/s  "
                  f"{waiting:.0%} waiting for data  {left // 60}:{left % 60:02} left", flush=True)
            sums, count = {}, 0
        if run.step % args.val_every == 0 or run.step == args.steps:
            run.checkpoint(val_set)
        asked = time.monotonic()
        if not count:
            interval, waited = asked, 0.0
    print(f"best: validation IoU {run.best:.4f}, {run.path(run.result)}; {train_set.summary()}")
    return run.best


# ---------------------------------------------------------------------------------------------------------------------
# The curve, and the command line.
# ---------------------------------------------------------------------------------------------------------------------


BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#aa4499"  # told apart by colour-blind readers
COLOURS = {"loss": BLUE, "point": BLUE, "box": ORANGE, "point degraded": BLUE, "box degraded": ORANGE,
           "point clear": GREEN, "box clear": PURPLE}


def curve(log, path):
    """Draw log.jsonl as a PNG: the loss on the left, training (thin) and validation (dots) IoU on the right."""
    with open(log) as file:
        lines = [json.loads(line) for line in file]
    loss = {"loss": [(x["step"], x["loss"]) for x in lines if "loss" in x]}
    iou = {key: [(x["step"], x[key]) for x in lines if key in x] for key in ("point", "box")}
    dots = {}
    for x in lines:
        for key, value in x.get("validation", {}).items():
            dots.setdefault(key, []).append((x["step"], value))
    page = Image.new("RGB", (1400, 520), "white")
    pen = ImageDraw.Draw(page)
    plot(pen, (80, 60, 660, 440), "training loss", loss, {})
    plot(pen, (780, 60, 1360, 440), "IoU (lines: training, dots: validation)", iou, dots)
    data.save_png(page, path)


def plot(pen, frame, title, lines, marks):
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
        pen.line([at(*xy) for xy in series], COLOURS[name], 2)
    for name, series in marks.items():
        pen.line([at(*xy) for xy in series], COLOURS[name], 3)
        for x, y in (at(*xy) for xy in series):
            pen.ellipse((x - 5, y - 5, x + 5, y + 5), COLOURS[name])
    x = x0
    for name in marks or lines:
        pen.rectangle((x, y1 + 50, x + 16, y1 + 58), COLOURS[name])
        pen.text((x + 22, y1 + 44), name, "black", font)
        x += 40 + pen.textlength(name, font)


def parse(argv):
    """The command line, checked, with every default filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    add = parser.add_argument
    add("--data", required=True, help="a dataset folder with splits train and val; demo/ is made if it is not there")
    add("--backbone", choices=BACKBONES, default="vit_t", help="vit_t (default) comes with the project")
    add("--checkpoint", help="SAM weights; default: assets/, checkpoints/, the torch hub cache, else downloaded")
    add("--method", choices=gara.METHODS, default="gara")
    add("--rank-low", type=int, help="gara: components of the lower-rank space (default 16; vit_t 4)")
    add("--rank-high", type=int, help="gara: components of the higher-rank space (default 256; vit_t 48)")
    add("--rank", type=int, help="lora, gara_flat: components (default 16; vit_t 4)")
    add("--experts", type=lambda text: tuple(map(int, text.split(","))), help="moe_lora: ranks, as 2,16,128,256")
    add("--temperature", type=float, default=0.5, help="of the Gumbel-sigmoid")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="default 1300 for vit_t, else 40000")
    length.add_argument("--epochs", type=float)
    add("--batch-size", type=int, help="pictures (default 16 for vit_t, else 8)")
    add("--masks-per-image", type=int, help="objects of a picture, sharing its encoding (default 2 for vit_t, else 4)")
    add("--lr", type=float, help="peak learning rate (default 2e-3 for vit_t, else 1e-4)")
    add("--weight-decay", type=float, default=1e-5)
    add("--seed", type=int, default=0)
    add("--no-corrupt", action="store_true", help="use the pictures as they are")
    add("--pretrain", action="store_true", help="train the whole model from scratch on clear pictures")
    add("--out", help="folder of the run (default runs/BACKBONE_METHOD)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    add("--amp", choices=("auto", "off", "bf16"), default="auto", help="auto: bf16 on CUDA and on CPUs with AMX")
    add("--workers", type=int, help="loader processes (default: half the cores, at most 8)")
    add("--log-every", type=int, default=20, help="steps")
    add("--val-every", type=int, help="steps (default: a tenth of the run)")
    add("--val-images", type=int, default=64, help="pictures of the validation split used, at most")
    args = parser.parse_args(argv)
    for name in ("steps", "epochs", "batch_size", "masks_per_image", "lr", "temperature", "log_every", "val_every",
                 "val_images"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    for name, value in DEFAULTS[args.backbone].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.pretrain and args.batch_size * args.masks_per_image < 2:
        parser.error("--pretrain needs two objects a step: raise --batch-size or --masks-per-image")
    args.workers = min(8, (os.cpu_count() or 2) // 2) if args.workers is None else args.workers
    if args.workers < 0:
        parser.error("--workers must be 0 or more")
    args.out = args.out or os.path.join("runs", f"{args.backbone}_{'pretrain' if args.pretrain else args.method}")
    try:
        args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: {str(error).splitlines()[0]}")
    if args.amp == "auto":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 does not tell
        args.amp = "bf16" if args.device.type == "cuda" or args.device.type == "cpu" and cpu.get("amx_bf16") else "off"
    return args


def main(argv=None):
    """Run the command line; returns the exit code. A user's mistake ends in one line."""
    args = parse(argv)
    try:
        if not args.resume and os.path.exists(os.path.join(args.out, "last.pt")):
            raise TrainingError(f"{args.out} holds a run already: --resume goes on with it, --out NAME starts another")
        data.make_missing_demo(args.data)
        train(args)
    except (TrainingError, data.DatasetError, OSError, ValueError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on from the last validation", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
