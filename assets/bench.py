"""Speed and memory on this machine: the programs behind the README's numbers on cost.

    python assets/bench.py sam --backbone vit_b         image encoder and mask decoder, random weights
    python assets/bench.py sam --against assets/others.py:official       ... and another implementation beside
    python assets/bench.py gara --backbone vit_b        what GaRA costs: parameters, one layer in training, the encoder
    python assets/bench.py step --backbone vit_b        a training step of the encoder, with LoRA and with GaRA
    python assets/bench.py train --data demo/           where a training step's time goes; flags are train.py's own
    python assets/bench.py corruptions photo.jpg        each of the 15 corruptions
    python assets/bench.py models --ckpt gara.pt --data demo/            the paper's Table 8

All of them let their candidates run in turn (`race`), so that a busy machine slows all alike, and keep the row of one
that failed.
"""
import argparse
import contextlib
import copy
import ctypes
import functools
import itertools
import json
import os
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import corruptions
import data
import evaluate
import gara
import train
from sam import (BACKBONES, ResizeLongestSide, SamPredictor, build_sam, foreign, from_file, keep_freed_memory, linear)


# ---------------------------------------------------------------- one race, one memory meter, one way to print

class PeakMemory:
    """Bytes that a piece of work needs at its peak beyond what was held before: `with PeakMemory(device) as peak`.

    peak.bytes is None where the system does not tell. On a CPU it is resident memory, whose peak only Linux resets.
    """

    def __init__(self, device):
        self.device, self.bytes = device, None
        self.on_linux = device.type == "cpu" and sys.platform == "linux"

    def resident(self, name):
        """A line of the kernel's report on this process: VmRSS is what it holds now, VmHWM the most it held."""
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(name + ":"):
                    return 1024 * int(line.split()[1])

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif self.on_linux:
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc: gives back what is free
            if trim:
                trim(0)
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak starts anew
            self.before = self.resident("VmRSS")
        return self

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        elif self.on_linux:
            self.bytes = max(0, self.resident("VmHWM") - self.before)


def race(works, device, rounds=5):
    """Run functions in turn: a warm-up, `rounds` by the clock, one for memory.

    works {name: function without arguments} -> {name: dict of first (seconds of the warm-up, compilation included),
    seconds (the median of the rounds), peak (bytes or None), result}; one that raised has `failed`, a line, instead.
    """
    done = {name: dict(times=[]) for name in works}
    for number in range(rounds + 2):
        for name, work in works.items():
            row = done[name]
            if "failed" in row:
                continue

            if sys.stderr.isatty():
                print(f"{name}, round {number + 1} of {rounds + 2}"[:78].ljust(79), end="\r", file=sys.stderr)
            try:
                if number > rounds:
                    with PeakMemory(device) as peak:
                        work()
                    row["peak"] = peak.bytes
                else:
                    started = now(device)
                    row["result"] = work()
                    row["times"].append(now(device) - started)
            except Exception as error:  # what fails is a row of the table: out of memory, no compiler, another version
                reason = str(error) or "no reason"
                row["failed"] = f"{type(error).__name__}: {reason.splitlines()[0]}"[:90]

    for row in done.values():
        if "failed" not in row:
            first, *times = row["times"]
            row |= dict(first=first, seconds=statistics.median(times))
    return done


def now(device):
    """Seconds by a clock that waits for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def megabytes(peak, weights=0):
    """Bytes as PeakMemory gives them, with those of the weights, for a table; "-" where the system does not tell."""
    return "-" if peak is None else f"{(peak + weights) / 1e6:,.0f}"


def weight_bytes(model):
    """Of all the parameters and buffers that a checkpoint would hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def largest_difference(found, expected):
    """As a share of the largest value."""
    return f"{((found - expected).abs().max() / expected.abs().max()).item():.0e}"


def print_rows(heads, rows):
    """Columns of text: the first aligned to the left, the others to the right. A row may end early."""
    lines = [heads, *rows]
    widths = [0] * len(heads)
    for line in lines:
        for k, cell in enumerate(line):
            widths[k] = max(widths[k], len(cell))

    for first, *others in lines:
        cells = [first.ljust(widths[0])]
        for cell, width in zip(others, widths[1:]):
            cells.append(cell.rjust(width))
        print("  ".join(cells))
    print()


def times_and_peaks(done, digits):
    """What `race` gave, as rows of a table: name, seconds, peak MB; or why it failed."""
    rows = []
    for name, row in done.items():
        if "failed" in row:
            rows.append([name, "-", row["failed"]])
        else:
            rows.append([name, f"{row['seconds']:.{digits}f}", megabytes(row["peak"])])
    return rows


def setting(args):
    """Where and how a race was run, for the line above its table."""
    return (f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"median of {args.rounds} interleaved rounds\n")


# ---------------------------------------------------------------- sam: image encoder and mask decoder

@torch.no_grad()
def bench_sam(args):
    """Print speed, memory and accuracy of image encoder and mask decoder, with random weights.

    --against names functions make(backbone, state_dict) of other implementations. They return an encoder, (N, 3, S, S)
    -> (N, C, H, W), and an object with SamPredictor's methods, or None.
    """
    torch.manual_seed(0)
    sam = build_sam(args.backbone)
    for name, parameter in sam.image_encoder.named_parameters():
        if "pos" in name:  # zero in a fresh model
            nn.init.normal_(parameter, std=0.02)

    others = {}
    for spec in args.against:
        name = spec.rpartition(":")[2]
        make = from_file(spec, "--against")
        with foreign("--against", name):
            others[name] = make(args.backbone, sam.state_dict())

    sam.to(args.device)
    bench_encoder(sam, {name: encoder for name, (encoder, _) in others.items()}, args)
    bench_decoder(sam, {name: predictor for name, (_, predictor) in others.items() if predictor}, args)


def encoder_flops(backbone, batch):
    """Floating-point operations of the encoder's matrix products and convolutions; relative positions left out."""
    sizes = BACKBONES[backbone]
    d, depth, window, C = sizes["d"], sizes["depth"], sizes["window"], sizes["C"]
    side = sizes["image_size"] // sizes["patch"]
    n = side ** 2
    padded = (-(-side // window) * window) ** 2  # tokens in windows, padding included
    global_layers = len(sizes["global_layers"])

    products = 12 * depth * n * d * d  # qkv, proj and the two of the MLP
    attention = 2 * d * (global_layers * n * n + (depth - global_layers) * padded * window ** 2)
    patches_and_neck = n * (3 * sizes["patch"] ** 2 * d + d * C + 9 * C * C)
    return 2 * batch * (products + attention + patches_and_neck)


def bench_encoder(sam, others, args):
    """others {name: encoder}. Accuracy: the embedding's largest difference from float32's, and of 16 masks made from
    it the IoU with those made from float32's."""
    side, sizes = sam.image_encoder.img_size, BACKBONES[args.backbone]
    x = torch.randn(args.batch, 3, side, side, device=args.device)

    def encode(encoder, dtype=torch.float32):
        with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
            return encoder(x).float()

    # One product as large as the first of an MLP: how fast the machine can multiply at all.
    n, d = args.batch * (side // sizes["patch"]) ** 2, sizes["d"]
    a = torch.randn(n, d, device=args.device)
    b = torch.randn(4 * d, d, device=args.device)

    works = {"one matrix product": functools.partial(linear, a, b),
             "float32": functools.partial(encode, sam.image_encoder),
             "bfloat16": functools.partial(encode, sam.image_encoder, torch.bfloat16)}
    if args.compile:
        compiled = torch.compile(sam.image_encoder)
        works["float32, compiled"] = functools.partial(encode, compiled)
        works["bfloat16, compiled"] = functools.partial(encode, compiled, torch.bfloat16)
    for name, encoder in others.items():
        if hasattr(encoder, "to"):
            encoder.to(args.device)
        works[name] = functools.partial(encode, encoder)

    done = race(works, args.device, args.rounds)
    rate = 2 * n * d * 4 * d / done.pop("one matrix product")["seconds"]
    flops = encoder_flops(args.backbone, args.batch)
    rows = [["matrix products alone", f"{flops / rate:.3f}", f"{args.batch * rate / flops:.2f}", "", "",
             f"{flops / 1e9:,.0f} GFLOP at {rate / 1e9:,.0f} GFLOP/s"]]

    boxes = torch.rand(16, 4, device=args.device).sort()[0] * side
    exact = done["float32"]["result"][:1]
    masks = sam.decode(exact, boxes=boxes)[0] > 0
    for name, row in done.items():
        if "failed" in row:
            rows.append([name, "-", "-", "-", "-", row["failed"]])
            continue
        found = row["result"][:1]
        guess = sam.decode(found, boxes=boxes)[0] > 0
        iou = (guess & masks).sum((2, 3)) / (guess | masks).sum((2, 3)).clamp(min=1)
        rows.append([name, f"{row['seconds']:.3f}", f"{args.batch / row['seconds']:.2f}", megabytes(row["peak"]),
                     f"{row['first']:.1f}", f"{largest_difference(found, exact)}, {iou.mean().item():.4f}"])

    print(f"\n{args.backbone}, image encoder, batch {args.batch}, {side} x {side}, {setting(args)}")
    print_rows(["", "seconds", "images/s", "peak MB", "first call s", "largest difference, mask IoU"], rows)


def bench_decoder(sam, others, args):
    """others {name: predictor}. 100 points on one image, in one call and in 100."""
    side = sam.image_encoder.img_size
    height, width = side * 3 // 4, side
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    points = np.random.default_rng(1).uniform(0, height, (100, 1, 2)).astype(np.float32)
    labels = torch.ones(100, 1, dtype=torch.long, device=args.device)

    def one_call(predictor):
        coords = predictor.transform.apply_coords(points, (height, width))
        coords = torch.as_tensor(coords, device=args.device).float()
        return predictor.predict_torch(coords, labels, multimask_output=False)

    def many_calls(predictor):
        return [predictor.predict(point, np.ones(1), multimask_output=False) for point in points]

    works = {}
    for name, predictor in {"": SamPredictor(sam), **others}.items():
        predictor.set_image(image)
        prefix = f"{name}: " if name else ""
        works[prefix + "one call, 100 prompts"] = functools.partial(one_call, predictor)
        works[prefix + "100 calls of predict"] = functools.partial(many_calls, predictor)

    rows = times_and_peaks(race(works, args.device, args.rounds), digits=3)
    print(f"decoder, 100 points on one image of {width} x {height}\n")
    print_rows(["", "seconds", "peak MB"], rows)


# ---------------------------------------------------------------- gara: what GaRA costs

def bench_gara(args):
    """Print learnable parameters, what a layer's q, k and v cost in training, and what GaRA adds to the encoder."""
    rows = []
    for method in gara.METHODS:
        with torch.device("meta"):  # counted without a byte of memory
            sam = build_sam(args.backbone)
        gara.attach(sam, method)
        count = sum(p.numel() for p in sam.parameters() if p.requires_grad)
        rows.append([method, str(sam.adapter["options"]), f"{count:,}", f"{count * 4 / 1e6:.1f}"])
    print_rows(["method", "options", "parameters", "MB"], rows)

    print(f"{args.backbone}, batch {args.batch}, float32, {setting(args)}")
    bench_layer(args)
    bench_adapted_encoder(args)


def bench_layer(args):
    """One layer's q, k and v, forward and backward: `gated_linear` beside the same multiplied out by autograd."""
    sizes, options = BACKBONES[args.backbone], gara.default_options("gara", args.backbone)
    n, d = (sizes["image_size"] // sizes["patch"]) ** 2, sizes["d"]
    low, high = options["rank_low"], options["rank_high"]
    randn = functools.partial(torch.randn, device=args.device)
    x = randn(args.batch, n, d).requires_grad_()
    weight, bias = randn(3 * d, d) * d ** -0.5, randn(3 * d)

    def multiplied_out(A, B, mask):  # with m = 1 it is the LoRA of other libraries, on q, k and v
        hidden = (x[:, None] @ A.mT) * mask[:, None, None, :]
        return F.linear(x, weight, bias) + (hidden @ B.mT).transpose(1, 2).flatten(2)

    def step(forward, *parameters):
        y = forward(*parameters)
        y.backward(y.detach())
        for tensor in (x, *parameters):
            tensor.grad = None
        return y.detach()

    works = {"plain linear layer": functools.partial(step, lambda: F.linear(x, weight, bias))}
    gated_linear = functools.partial(gara.gated_linear, x, weight, bias)
    pairs = {}
    for r in sorted({low, high // 2, low + high}):
        A = (randn(3, r, d) * d ** -0.5).requires_grad_()
        B = (randn(3, d, r) * 0.1 * r ** -0.5).requires_grad_()
        mask = torch.ones(args.batch, r, device=args.device, requires_grad=True)
        ours, plain = f"rank {r}: gated_linear", f"rank {r}: x A m B by autograd"
        works[ours] = functools.partial(step, gated_linear, A, B, mask)
        works[plain] = functools.partial(step, multiplied_out, A, B, mask)
        pairs[ours] = plain

    done = race(works, args.device, args.rounds)
    rows = []
    for name, row in done.items():
        if "failed" in row:
            rows.append([name, "-", "-", row["failed"]])
            continue
        expected = done[pairs[name]].get("result") if name in pairs else None
        difference = "-" if expected is None else largest_difference(row["result"], expected)
        rows.append([name, f"{1e3 * row['seconds']:.1f}", megabytes(row["peak"]), difference])
    print(f"one layer's q, k and v, forward and backward, {n} tokens of width {d}\n")
    print_rows(["", "ms", "peak MB", "largest difference"], rows)


def bench_adapted_encoder(args):
    """The image encoder without gradients: SAM, and GaRA with all, half and one of its components open; per window."""
    plain = build_sam(args.backbone).to(args.device)
    adapted = gara.attach(copy.deepcopy(plain), "gara").eval()
    windows = gara.attach(copy.deepcopy(plain), "gara", scope="window").eval()
    most = adapted.adapter["options"]["rank_high"]
    image = random_images(args)

    @torch.no_grad()
    def encode(sam, count=None):
        if count is not None:
            open_components(sam, count)
        return sam.image_encoder(image)

    works = {"SAM": functools.partial(encode, plain)}
    weights = {"SAM": weight_bytes(plain)}
    for count in (most, most // 2, 1):
        name = f"GaRA, {count} of {most} components"
        works[name] = functools.partial(encode, adapted, count)
        weights[name] = weight_bytes(adapted)
    works["GaRA per window"] = functools.partial(encode, windows)
    weights["GaRA per window"] = weight_bytes(windows)

    rows = []
    for name, row in race(works, args.device, args.rounds).items():
        if "failed" in row:
            rows.append([name, "-", "-", row["failed"]])
        else:
            rows.append([name, f"{row['seconds']:.3f}", f"{args.batch / row['seconds']:.2f}",
                         megabytes(row["peak"], weights[name])])
    print("image encoder, inference\n")
    print_rows(["", "seconds", "images/s", "weights and peak MB"], rows)


def random_images(args):
    """Normalised images (N, 3, S, S) for the encoder."""
    side = BACKBONES[args.backbone]["image_size"]
    return torch.randn(args.batch, 3, side, side, device=args.device)


def open_components(sam, count):
    """Have every layer's gates choose the first `count` components of the higher-rank set, whatever the image."""
    for adapter in gara.adapters(sam):
        for mlp, ones in ((adapter.gate.g_space, 1), (adapter.gate.g_H, count)):
            last = mlp[-1]
            last.weight.zero_()
            last.bias.copy_(torch.arange(len(last.bias)) < ones).sub_(0.5)


# ---------------------------------------------------------------- step: LoRA and GaRA in training

def bench_step(args):
    """Print what a training step of the image encoder takes, forward and backward into the adapter: LoRA and GaRA."""
    image = random_images(args)
    methods = {"LoRA 16": ("lora", dict(rank=16)), "GaRA": ("gara", {}), "GaRA per window": ("gara", dict(scope="window"))}

    def step(sam, dtype):
        with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
            embedding = sam.image_encoder(image)
        embedding.float().square().mean().backward()
        sam.zero_grad(set_to_none=True)

    works = {}
    for name, (method, options) in methods.items():
        sam = gara.attach(build_sam(args.backbone), method, **options).to(args.device).train()
        works[f"{name}, bfloat16"] = functools.partial(step, sam, torch.bfloat16)
        works[f"{name}, float32"] = functools.partial(step, sam, torch.float32)
    rows = sorted(times_and_peaks(race(works, args.device, args.rounds), digits=2))
    print(f"{args.backbone}, batch {args.batch}, image encoder, a training step, {setting(args)}")
    print_rows(["", "seconds", "peak MB"], rows)


# ---------------------------------------------------------------- train: where a training step's time goes

class Stopwatch:
    """Seconds by name, of work done `with watch(name):` or between watch.start(name) and watch.stop(name)."""

    def __init__(self, device):
        self.device, self.seconds, self.started = device, {}, {}

    def start(self, name):
        self.started[name] = now(self.device)

    def stop(self, name):
        passed = now(self.device) - self.started[name]
        self.seconds[name] = self.seconds.get(name, 0) + passed

    @contextlib.contextmanager
    def __call__(self, name):
        self.start(name)
        yield
        self.stop(name)


def bench_train(args, rounds=3):
    """Print how long each part of an example's preparation and of a step takes. Trains nothing, writes nothing."""
    for root in args.data:
        data.make_missing_demo(root)
    sets = data.load_datasets(args.data, "train", args.strict)
    train_set = data.Union(sets) if len(sets) > 1 else sets[0]
    examples = train.examples_of(train_set, args, rounds + 1)
    bench_examples(train_set, examples, args)
    bench_steps(examples, args, rounds)


def bench_examples(train_set, examples, args, images=32):
    """What it takes to prepare an example, part by part, without workers."""
    watch = Stopwatch(torch.device("cpu"))
    resize = ResizeLongestSide(examples.size)
    chosen = data.spread(train_set, images)
    for k, sample in enumerate(chosen):
        with watch("read the image"):
            image = data.read_image(sample.clear, sample.size)
        with watch("degrade it"):
            data.degrade(image, args.conditions[k % len(args.conditions)], k)
        with watch("decode its masks (polygons, run lengths, PNG)"):
            masks = sample.masks()
        with watch("draw prompts"):
            for mask in masks[:args.masks_per_image]:
                data.prompts(mask, k)
        with watch("scale and pad the image"):
            resize.apply_image(image)
        with watch("scale and pad the masks"):
            for mask in masks[:args.masks_per_image]:
                examples.target(mask, image.shape[:2])

    count = len(chosen)
    parts = watch.seconds | {"all of it": sum(watch.seconds.values())}
    print(f"{', '.join(args.data)}: {image.shape[1]} x {image.shape[0]}, up to {args.masks_per_image} objects an image, "
          f"means over {count} images, one process\n")
    print_rows(["an example", "ms"], [[name, f"{1e3 * seconds / count:.2f}"] for name, seconds in parts.items()])


def bench_steps(examples, args, rounds):
    """What a step takes, part by part, after a first one as a warm-up."""
    run, watch = train.Run(args), Stopwatch(args.device)
    modules = {"image encoder, forward": run.sam.image_encoder, "decoder, forward": run.sam.mask_decoder}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda *_, name=name: watch.start(name))
        module.register_forward_hook(lambda *_, name=name: watch.stop(name))
    run.optimizer.register_step_pre_hook(lambda *_: watch.start("optimizer"))
    run.optimizer.register_step_post_hook(lambda *_: watch.stop("optimizer"))

    for k in range(rounds + 1):
        batch = [examples[k * args.batch_size + n] for n in range(args.batch_size)]
        if k == 1:
            watch.seconds.clear()
        with watch("the whole step"):
            run.update(batch)

    whole = watch.seconds.pop("the whole step")
    rest = whole - sum(watch.seconds.values())
    rows = []
    for name, seconds in {**watch.seconds, "loss and backward": rest, "the whole step": whole}.items():
        rows.append([name, f"{1e3 * seconds / rounds / args.batch_size:.2f}", f"{seconds / whole:.0%}"])
    print(f"{args.backbone}, {args.method}, {args.batch_size} images a step, {args.device}, amp {args.amp}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, mean of {rounds} steps\n")
    print_rows(["a step", "ms an image", "share"], rows)


# ---------------------------------------------------------------- corruptions: each of the 15

def bench_corruptions(args):
    """Print milliseconds per corruption of one image, each time with another seed, and images/s."""
    image = data.read_image(args.photo)

    def work(name, seeds):
        return corruptions.corrupt(image, name, next(seeds))

    works = {name: functools.partial(work, name, itertools.count()) for name in corruptions.CORRUPTIONS}
    rows, total = [], 0.0
    for name, row in race(works, args.device, args.rounds).items():
        if "failed" in row:  # an image that `corrupt` refuses, for being too small
            raise ValueError(f"{args.photo}: {row['failed']}")
        seconds = row["seconds"]
        total += seconds
        rows.append([name, f"{1e3 * seconds:.1f}", f"{1 / seconds:.1f}"])
    rows.append([f"all {len(works)}", f"{1e3 * total:.1f}", f"{1 / total:.2f}"])
    print(f"{image.shape[1]} x {image.shape[0]}, one core, median of {args.rounds} interleaved rounds\n")
    print_rows(["", "ms", "images/s"], rows)


# ---------------------------------------------------------------- models: the paper's Table 8

def bench_models(args):
    """Print Table 8: an image encoded and one box predicted, by SAM and each adapter and plugged predictor in turn.

    The image is the one with the most objects among --limit of the split. Memory is a model's own weights and what the
    work takes beyond them, at its peak. With --json the table is also written: {"heads": [...], "rows": [[...], ...]}.
    """
    data.make_missing_demo(args.data)
    path, kind = data.path_and_kind(args.data)
    dataset = data.load_dataset(path, args.split, kind)
    models, about, _ = evaluate.load_models(args.ckpt, args.backbone, args.checkpoint, args.device, args.predictor)

    sample = max(data.spread(dataset, args.limit), key=lambda sample: len(sample.masks()))
    masks, image = sample.masks(), sample.image()
    points, boxes = sample.prompts(masks)

    works = {}
    for name, model in models.items():
        works[name] = functools.partial(predict_all, model, [image], points[:1], boxes[:1], args.amp)
    rows = []
    for name, row in race(works, args.device, args.rounds).items():
        learnable, file = about[name]["learnable_parameters"], about[name]["file"]
        cells = [name, f"{learnable:,}" if learnable else "-", f"{os.path.getsize(file) / 1e6:.1f}" if file else "-"]
        if "failed" in row:
            cells += ["-", row["failed"]]
        else:  # a plugged predictor's weights are not known
            memory = megabytes(row["peak"], weight_bytes(models[name])) if evaluate.is_sam(models[name]) else "-"
            cells += [memory, f"{1 / row['seconds']:.2f}"]
        rows.append(cells)

    heads = ["model", "learnable parameters", "file MB", "peak memory MB", "images/s"]
    print_rows(heads, rows)
    print(f"One image of {image.shape[1]} x {image.shape[0]} at a time, encoded, and one box predicted; amp {args.amp}, "
          f"{setting(args)}")
    if args.json:
        data.save_text(json.dumps(dict(heads=heads, rows=rows)), args.json)

    images, predictor = [image] * 4, SamPredictor(models["SAM"])
    done = race({"here": functools.partial(predict_all, models["SAM"], images, points, boxes, args.amp),
                 "loop": lambda: list(evaluate.predict_plugged(predictor, images, points, boxes))}, args.device, 1)
    fast, slow = done["here"]["seconds"], done["loop"]["seconds"]
    print(f"All {len(masks)} objects of 4 images by points and by boxes: {fast:.2f} s, and {slow:.2f} s by a plain "
          f"loop of SamPredictor.predict, {slow / fast:.1f} times as long.")


def predict_all(model, images, points, boxes, amp):
    """What evaluate.py makes of these images and prompts."""
    return list(evaluate.predictions(model, images, points, boxes, amp=amp))


# ---------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    """A mistake ends in one line."""

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def parse(argv):
    """The command line, checked. `args.bench` is the function to call."""
    if argv[:1] == ["train"]:
        args = train.parse(argv[1:])
        args.bench = bench_train
        return args

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True, metavar="sam | gara | step | train | corruptions | models")
    sam, gara_, step, photo, models = (kinds.add_parser(name) for name in (
        "sam", "gara", "step", "corruptions", "models"))
    for kind, bench in ((sam, bench_sam), (gara_, bench_gara), (step, bench_step), (photo, bench_corruptions),
                        (models, bench_models)):
        kind.set_defaults(bench=bench)
        kind.add_argument("--rounds", type=int, default=5, help="how often each row is timed (default 5)")
        if kind is not photo:
            kind.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for kind in (sam, gara_, step):
        kind.add_argument("--backbone", choices=BACKBONES, default="vit_b")
        kind.add_argument("--batch", type=int, default=1, help="images at once (default 1)")

    sam.add_argument("--compile", action="store_true", help="also by torch.compile")
    sam.add_argument("--against", nargs="+", default=[], metavar="FILE.py:NAME", help="other implementations beside")

    photo.add_argument("photo", help="an image file")
    photo.set_defaults(device="cpu")

    models.add_argument("--ckpt", nargs="+", default=["sam"], help="as for evaluate.py: adapter files, whole SAMs")
    models.add_argument("--predictor", nargs="+", default=[], metavar="FILE.py:NAME", help="as for evaluate.py")
    models.add_argument("--data", required=True, metavar="ROOT", help="a dataset folder, or KIND=ROOT")
    models.add_argument("--split", default="test")
    models.add_argument("--limit", type=int, default=16, help="images of the split to choose from (default 16)")
    models.add_argument("--backbone", choices=BACKBONES, help="only needed without adapters (default vit_t)")
    models.add_argument("--checkpoint", help="SAM weights; default: as for evaluate.py")
    models.add_argument("--amp", choices=("off", "bf16"), default="off", help="bf16: the encoder in bfloat16")
    models.add_argument("--json", metavar="FILE", help="also write the table")

    args = parser.parse_args(argv)
    for name in ("batch", "rounds", "limit"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name} must be above 0")
    try:
        args.device = torch.device(args.device)
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:  # the last: torch without CUDA
        parser.error(f"--device: {data.line_of(error)}")
    return args


def main(argv=None):
    """Run one benchmark; returns the exit code. A user's mistake ends in one line."""
    args = parse(sys.argv[1:] if argv is None else argv)
    keep_freed_memory()
    try:
        args.bench(args)
    except (train.TrainingError, data.DatasetError, ValueError, OSError, RuntimeError) as error:
        print(f"error: {data.line_of(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
