"""The paper's claims in miniature, on the tiny SAM and the demo: trains, measures, and writes a report.

    python assets/study.py                   3 seeds, into study/; the same command goes on where it was stopped
    python assets/study.py --quick           one seed, fewer and shorter runs, into study_quick/

It runs train.py, evaluate.py and bench.py, each job on one thread, as many side by side as there are cores: the seeds
derive from names, so that changes no digit. The report is made of what these jobs left in folders, and names them.

In the order of the work: the plan (which runs, which evaluations), the jobs, the statistics, the gates, the report.
"""
import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)

import data
import gara
import train
from assets.figures import (ORACLES, figure_corruptions, figure_dependence, figure_gates, figure_open, figure_strength,
                            oracles, scores_of, unpack_gates)
from data import PROMPTS, benchmark_conditions, degraded_conditions
from evaluate import DRAWS, difference_text, mean_text, open_components_table, read_results, table
from sam import build_sam, find_checkpoint

# ---------------------------------------------------------------- the plan

UNSEEN = ["snow", "ISO_noise", "zoom_blur", "compression", "contrast"]  # one of weather, noise, blur, coding, light
TEN = ["--conditions", *(condition for condition in data.CONDITIONS if condition not in UNSEEN)]
LORA64, NIGHT = ["--method", "lora", "--rank", "64"], ["--conditions", "night"]
FAST = ["--lr", "3e-3"]

# {run: (its name in tables, train.py's options)}. All have the same data, batches, learning rate ("full" a smaller one,
# as is usual for whole encoders) and, but for "long", steps. Ranks: vit_t is a fifth as wide as vit_b, so LoRA's
# 2, 4, 16 and 64 stand for about 10, 20, 80 and 300 there, and GaRA's 4 and 48 for the paper's 16 and 256.
RUNS = {
    "lora2": ("LoRA 2", ["--method", "lora", "--rank", "2"]),
    "lora4": ("LoRA 4", ["--method", "lora", "--rank", "4"]),
    "lora16": ("LoRA 16", ["--method", "lora", "--rank", "16"]),
    "lora64": ("LoRA 64", LORA64),
    "moe": ("MoE-LoRA 1, 4, 24, 48", ["--method", "moe_lora"]),
    "moe_two": ("MoE-LoRA 4, 48", ["--method", "moe_lora", "--experts", "4,48"]),
    "flat_low": ("GaRA flat 4", ["--method", "gara_flat", "--rank", "4"]),
    "flat_high": ("GaRA flat 48", ["--method", "gara_flat", "--rank", "48"]),
    "gara": ("GaRA", []),
    "gara_window": ("GaRA per window", ["--scope", "window"]),
    "gara_space": ("GaRA, gating 1 alone", ["--method", "gara_space"]),
    "gara_random": ("GaRA, random gates", ["--method", "gara_random"]),
    "gara_logistic": ("GaRA, logistic noise", []),
    "full": ("whole encoder", ["--method", "full", "--lr", "3e-4"]),
    "unseen_lora64": ("LoRA 64, ten seen", LORA64 + TEN),
    "unseen_gara": ("GaRA, ten seen", TEN),
    "real_lora64": ("LoRA 64, night", LORA64 + NIGHT),
    "real_gara": ("GaRA, night", NIGHT),
    "gara_t0.1": ("GaRA, temperature 0.1", ["--temperature", "0.1"]),
    "gara_t1": ("GaRA, temperature 1", ["--temperature", "1"]),
    "gara_t2": ("GaRA, temperature 2", ["--temperature", "2"]),
    "gara_untrained": ("GaRA, untrained", ["--steps", "1"]),
    "lora4_lr": ("LoRA 4, learning rate 3e-3", ["--method", "lora", "--rank", "4", *FAST]),
    "lora64_lr": ("LoRA 64, learning rate 3e-3", LORA64 + FAST),
    "gara_lr": ("GaRA, learning rate 3e-3", FAST),
    "lora64_long": ("LoRA 64, three times as long", [*LORA64, "--steps", "LONG"]),
    "gara_long": ("GaRA, three times as long", ["--steps", "LONG"])}
ADAPTED = ["lora2", "lora4", "lora16", "lora64", "moe", "moe_two", "flat_low", "flat_high", "gara", "gara_window",
           "gara_space", "gara_random", "gara_logistic", "full"]
TEMPERATURES = ["gara_t0.1", "gara_t1", "gara_t2"]
VARIANTS = [*TEMPERATURES, "gara_untrained", "lora4_lr", "lora64_lr", "gara_lr", "lora64_long", "gara_long"]

# {evaluation: (runs, evaluate.py's options)}, in the order of the work; PLAIN: scenes of the base model's own kind,
# without bold patterns, which no adapter was trained on. "frozen": GaRA whose gates always choose what they choose most
# often in "main".
EVALUATIONS = {
    "main": (ADAPTED, ["--data", "demo/", "PLAIN"]),
    "frozen": (["frozen"], ["--data", "demo/"]),
    "unseen": (["lora64", "gara", "unseen_lora64", "unseen_gara"],
               ["--data", "demo/", "--conditions", "clear", *UNSEEN]),
    "real": (["lora64", "gara", "real_lora64", "real_gara"],
             ["--data", "demo/", "--conditions", "clear", "night", "underwater"]),
    "variants": (VARIANTS, ["--data", "demo/"]),
    "strength": (["lora64", "gara"], ["--data", "demo/", "--strengths", "0.5", "1.5", "2"])}
ONCE = ["variants", "strength"]  # of seed 0 alone

# {of the paper, or of this project: the runs that stand beside GaRA}
ABLATIONS = {
    "Table 5: plain LoRA": ["lora2", "lora4", "lora16", "lora64"],
    "Table 6: mixture of LoRAs": ["moe", "moe_two"],
    "Table 7: one set of components": ["flat_low", "flat_high"],
    "Table 10: random gates": ["gara_random"],
    "Table 11: gating 1 alone": ["gara_space"],
    "scope: window instead of image": ["gara_window"],
    "noise: logistic instead of Gumbel": ["gara_logistic"]}

FULL_STUDY = dict(seeds=3, steps=160, validations=2, pictures=72, leave=())
QUICK_STUDY = dict(seeds=1, steps=80, validations=1, pictures=24, leave=(
    "lora2", "moe_two", "flat_low", "full", "gara_t0.1", "gara_t1", "lora4_lr", "lora64_lr", "gara_lr", "lora64_long",
    "gara_long"))


def label_of(run):
    """What tables call a run."""
    if run == "frozen":
        return "GaRA, its gates frozen"
    return RUNS[run][0] if run in RUNS else run


def adapter_file(run):
    """What train.py calls the result of a run."""
    _, words = RUNS.get(run, ("", []))
    method = words[words.index("--method") + 1] if "--method" in words else "gara"
    return method + ".pt"


# ---------------------------------------------------------------- the jobs


def study_jobs(out, seeds, steps, validations, pictures, leave):
    """{folder: (command, folders that must be there before)} in the order of the work. A command is what Python is
    told, or a function. OUT/runs/RUN_SEED are runs of train.py, OUT/EVALUATION_SEED evaluations."""
    scenes = os.path.join(out, "plain")
    make_scenes = [
        os.path.join(ROOT, "data.py"), scenes, "--make-demo",
        "--patterned", "0",
        "--scenes", "8", "8", str(pictures // 3)]
    jobs = {scenes: (make_scenes, [])}
    for name, (runs, options) in EVALUATIONS.items():
        runs = [run for run in runs if run not in leave]
        for seed in range(1 if name in ONCE else seeds):
            places = {run: os.path.join(out, "runs", f"{run}_{seed}") for run in runs}
            for run, place in places.items():
                if run == "frozen":
                    main = os.path.join(out, f"main_{seed}")
                    source = os.path.join(out, "runs", f"gara_{seed}")
                    jobs[place] = functools.partial(freeze_gates, main, source, place), [main]
                elif place not in jobs:
                    jobs[place] = training(run, seed, place, steps, validations), []
            folder = os.path.join(out, f"{name}_{seed}")
            files = [os.path.join(place, adapter_file(run)) for run, place in places.items()]
            words = [scenes if word == "PLAIN" else word for word in options]
            count = pictures // 4 if name == "strength" else pictures
            command = [
                os.path.join(ROOT, "evaluate.py"),
                "--ckpt", *files,
                *words,
                "--limit", str(count),
                "--workers", "0",
                "--device", "cpu",
                "--out", folder]
            needed = list(places.values())
            if "PLAIN" in options:
                needed.append(scenes)
            jobs[folder] = command, needed
    return jobs


def training(run, seed, place, steps, validations):
    """The command that trains a run."""
    options = [str(3 * steps) if word == "LONG" else word for word in RUNS[run][1]]
    if "--steps" not in options:
        options += ["--steps", str(steps)]
    steps = int(options[options.index("--steps") + 1])
    script = [os.path.join(ROOT, "train.py")]
    if run == "gara_logistic":
        script = [os.path.join(HERE, "study.py"), "--logistic-noise"]
    return [
        *script,
        "--data", "demo/",
        "--seed", str(seed),
        "--out", place,
        "--workers", "0",
        "--device", "cpu",
        "--val-every", str(max(1, steps // validations)),
        *options]


def cost_job(out, leave):
    """{name: (command, [])}: memory and speed of all models of seed 0, alone on the machine."""
    runs = [run for run in ADAPTED if run not in leave]
    files = [os.path.join(out, "runs", f"{run}_0", adapter_file(run)) for run in runs]
    command = [
        os.path.join(HERE, "bench.py"), "models",
        "--ckpt", *files,
        "--data", "demo/",
        "--device", "cpu",
        "--json", os.path.join(out, "models.json")]
    return {os.path.join(out, "models"): (command, [])}


def freeze_gates(main, run, out):
    """A control for GaRA: an adapter whose gates choose the same for every image, what they chose most often in the
    evaluation `main`: in each layer the set, and of it the components that were on in more than half of the cases."""
    results = read_results(os.path.join(main, "results.json"))
    path = os.path.join(run, "gara.pt")
    model = next(name for name, about in results["models"].items() if about["file"] == path)
    cases = [unpack_gates(results, model, condition) for condition in results["conditions"]]
    sam = build_sam(results["backbone"], find_checkpoint(results["backbone"]))
    gara.load_adapter(sam, path)
    low = results["models"][model]["options"]["rank_low"]
    for layer, adapter in enumerate(gara.adapters(sam)):
        vectors = np.concatenate([case[layer][0][:, 0] for case in cases])  # (images and conditions, components)
        spaces = np.concatenate([case[layer][1][:, 0] for case in cases])
        higher = spaces.mean() > 0.5
        on = vectors[spaces == higher].mean(0) > 0.5
        always_choose(adapter.gate.g_space, [higher])
        always_choose(adapter.gate.g_L, on[:low])
        always_choose(adapter.gate.g_H, on[low:])
    os.makedirs(out, exist_ok=True)
    gara.save_adapter(sam, os.path.join(out, "gara.pt"))


@torch.no_grad()
def always_choose(gate, choice):
    """Have a gate's logits be 0.5 where the choice is true and -0.5 elsewhere, whatever comes in."""
    gate[-1].weight.zero_()
    gate[-1].bias.copy_(torch.from_numpy(np.array(choice) - 0.5))


class Jobs:
    """Does the jobs {folder: (command, folders needed)} that are not done yet.

    OUT/jobs/NAME.txt is what a job printed, NAME.json says that it is done, by which command and in how many seconds.
    """

    def __init__(self, jobs, out):
        self.jobs, self.out = jobs, out
        self.processes, self.seconds = set(), []
        os.makedirs(os.path.join(out, "jobs"), exist_ok=True)

    def file_of(self, folder, kind):
        name = os.path.relpath(folder, self.out).replace(os.sep, "_")
        return os.path.join(self.out, "jobs", f"{name}.{kind}")

    def run(self, at_once):
        """All of them, `at_once` side by side. RuntimeError, in one line, when one fails."""
        waiting, running = dict(self.jobs), {}
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            try:
                while waiting or running:
                    unfinished = {*waiting, *running.values()}
                    ready = [folder for folder in waiting if unfinished.isdisjoint(self.jobs[folder][1])]
                    for folder in ready[:at_once - len(running)]:
                        running[pool.submit(self.do, folder, at_once)] = folder
                        del waiting[folder]
                    first = concurrent.futures.FIRST_COMPLETED
                    for future in concurrent.futures.wait(running, return_when=first).done:
                        del running[future]
                        future.result()
            finally:  # one has failed, or Ctrl-C: the others save what they have, so the same command goes on
                for process in list(self.processes):
                    process.terminate()

    def do(self, folder, at_once):
        """One job, if it is not done yet."""
        command, _ = self.jobs[folder]
        words = [command.func.__name__, *command.args] if callable(command) else command
        done = self.file_of(folder, "json")
        if os.path.exists(done):
            with open(done) as file:
                before = json.load(file)["command"]
            if before[1:] != words[1:]:
                raise RuntimeError(f"{folder} is of another study ({' '.join(before[1:])}): choose another --out")
            return
        started = time.monotonic()
        if callable(command):
            command()
        else:
            self.call(folder, command)
        seconds = time.monotonic() - started
        data.save_text(json.dumps(dict(command=words, seconds=round(seconds, 1))), done)
        self.seconds.append(seconds)
        left = sum(not os.path.exists(self.file_of(other, "json")) for other in self.jobs)
        rest = datetime.timedelta(seconds=round(left * np.mean(self.seconds) / at_once))
        print(f"{len(self.jobs) - left}/{len(self.jobs)}  {folder}  {seconds:.0f} s  about {rest} left", flush=True)

    def call(self, folder, command):
        """Run a script to its end. RuntimeError with its last line if it fails."""
        log = self.file_of(folder, "txt")
        resume = ["--resume"] if os.path.exists(os.path.join(folder, "last.pt")) else []
        environment = os.environ | dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        with open(log, "a") as file:
            process = subprocess.Popen([sys.executable, *command, *resume], stdout=file, stderr=file, env=environment)
            self.processes.add(process)
            code = process.wait()
            self.processes.remove(process)
        if code:
            with open(log) as file:
                lines = [line.strip() for line in file if line.strip()] or ["it printed nothing"]
            raise RuntimeError(f"{folder}: {lines[-1]} (exit code {code}; all of it in {log})")


# ---------------------------------------------------------------- the statistics


@dataclasses.dataclass
class Scores:
    """An evaluation of all seeds, on the images of one dataset."""
    sums: dict  # {run, or "SAM": IoU summed over the masks of each image, (seeds, images, 2 prompts, conditions)}
    masks: np.ndarray  # of each image
    conditions: list

    def column(self, run, name):
        """"point fog", or "point degraded", the mean of its conditions: (seeds, images)."""
        prompt, kind = name.split(" ")
        kinds = degraded_conditions(self.conditions) if kind == "degraded" else [kind]
        which = [self.conditions.index(condition) for condition in kinds]
        return self.sums[run][..., PROMPTS.index(prompt), which].mean(-1)


def runs_in(results):
    """{run, or "SAM": the name of its model} of a results.json."""
    runs = {}
    for model, about in results["models"].items():
        run = "SAM"
        if about["file"]:
            run = os.path.basename(os.path.dirname(about["file"])).rpartition("_")[0]
        runs[run] = model
    return runs


def read_evaluation(out, name, seed, root="demo/"):
    """The results.json of an evaluation, with the images of one dataset alone."""
    results = read_results(os.path.join(out, f"{name}_{seed}", "results.json"))
    results["images"] = [image for image in results["images"] if image["data"] == root]
    return results


def gather(out, name, seeds, root="demo/"):
    """The `Scores` of an evaluation."""
    sums = {}
    for seed in range(seeds):
        results = read_evaluation(out, name, seed, root)
        conditions, images = results["conditions"], results["images"]
        for run, model in runs_in(results).items():
            of_images = [scores_of(image, model, conditions).sum(2)[..., 0] for image in images]
            sums.setdefault(run, []).append(of_images)
    masks = np.array([len(image["indices"]) for image in images], float)
    return Scores({run: np.array(values) for run, values in sums.items()}, masks, conditions)


def estimate(sums, masks):
    """(mean over masks and seeds, low, high, [of each seed]) of sums (seeds, images). The 95 % interval draws images
    and seeds again, so it covers both; of three seeds that is rough, so each is shown beside."""
    seeds, images = sums.shape
    rng = np.random.default_rng(data.seed_of("study"))

    def draw(count):
        alike = np.full(count, 1 / count)
        return rng.multinomial(count, alike, DRAWS).astype(float)  # how often each is drawn

    seeds_drawn, images_drawn = draw(seeds), draw(images)
    totals = (seeds_drawn / seeds @ sums * images_drawn).sum(1)
    means = totals / (images_drawn @ masks)
    each = sums.sum(1) / masks.sum()
    return each.mean(), *np.percentile(means, (2.5, 97.5)), each.tolist()


def columns_of(kinds):
    """"point degraded", "box degraded", ..."""
    return [f"{prompt} {kind}" for prompt in PROMPTS for kind in kinds]


def mean_table(scores, runs, kinds=("degraded", "clear")):
    """Markdown: mean IoU of those of the runs that there are."""
    rows = []
    for run in runs:
        if run in scores.sums:
            cells = []
            for name in columns_of(kinds):
                *mean, _ = estimate(scores.column(run, name), scores.masks)
                cells.append(mean_text(*mean))
            rows.append([label_of(run), *cells])
    return table(["IoU", *columns_of(kinds)], rows)


def difference_table(scores, pairs, kinds=("degraded", "clear")):
    """Markdown: the first run of each pair less the second, where both are there."""
    rows = []
    for run, other in pairs:
        if run != other and {run, other} <= scores.sums.keys():
            cells = [difference_cell(scores, run, other, name) for name in columns_of(kinds)]
            rows.append([f"{label_of(run)} - {label_of(other)}", *cells])
    return table(["IoU", *columns_of(kinds)], rows)


def difference_cell(scores, run, other, name):
    """"+0.4 [0.1, 0.7]; +0.5 +0.2 +0.5": the mean, its interval, and each seed's."""
    paired = scores.column(run, name) - scores.column(other, name)
    *mean, each = estimate(paired, scores.masks)
    text = difference_text(*mean)
    if len(each) > 1:
        text += "; " + " ".join(f"{100 * x:+.1f}" for x in each)
    return text


def pooled(out, name, runs, seeds):
    """Evaluation `name` of all seeds as one results.json, for figures: the models are the runs, each image stands there
    once for each seed, and means and intervals are those of `estimate`."""
    whole = dict(images=[], models={}, means={}, intervals={}, data=["demo/"])
    for seed in range(seeds):
        results = read_evaluation(out, name, seed)
        for key in ("split", "backbone", "conditions"):
            whole[key] = results[key]
        models = {run: model for run, model in runs_in(results).items() if run in runs}
        for run, model in models.items():
            whole["models"][label_of(run)] = results["models"][model]
        for image in results["images"]:
            renamed = dict(image)
            for kind in ("scores", "gates"):
                renamed[kind] = {label_of(run): image[kind][model] for run, model in models.items()
                                 if model in image[kind]}
            whole["images"].append(renamed)

    scores = gather(out, name, seeds)
    kinds = benchmark_conditions(whole["conditions"]) + ["degraded"]
    for run in models:
        means, intervals = {}, {}
        for column in columns_of(kinds):
            mean, low, high, _ = estimate(scores.column(run, column), scores.masks)
            means[column], intervals[column] = [mean], [(low, high)]
        whole["means"][label_of(run)], whole["intervals"][label_of(run)] = means, intervals
    return whole


def oracle_table(out, ranks, seeds):
    """Markdown: LoRA's oracles of Section 3.2, and the control that the paper lacks. Choosing the best of several
    predictions by the truth gains even if they differ by chance alone: so the same is done with three seeds of one rank
    instead of three ranks of one seed. Only what ranks gain beyond seeds is a reason to choose ranks."""
    whole = pooled(out, "main", ranks, seeds)
    count = len(whole["images"]) // seeds
    of_seed = [whole["images"][seed * count:(seed + 1) * count] for seed in range(seeds)]
    models = list(whole["models"])
    rows = []
    for chosen in (models, models[-3:]) if seeds > 2 else (models,):
        numbers = ", ".join(model.split()[-1] for model in chosen)
        for seed in range(seeds):
            cells = oracle_cells(of_seed[seed], chosen, whole["conditions"])
            rows.append([f"ranks {numbers}, seed {seed}", *cells])
    for model in models if seeds > 2 else ():
        images = []
        for same in zip(*of_seed[:3]):  # one image, of three seeds
            scores = {str(seed): image["scores"][model] for seed, image in enumerate(same)}
            images.append(same[0] | dict(scores=scores))
        rows.append([f"control: 3 seeds of {model}", *oracle_cells(images, ["0", "1", "2"], whole["conditions"])])
    return table(["best single, Oracle-Corrupt's gain, Oracle-Instance's gain", "point degraded", "box degraded"], rows)


def oracle_cells(images, models, conditions):
    """A row of `oracle_table`: of points and of boxes. The best single model is the best of both together."""

    def degraded(found):
        return [100 * found["iou"][f"{prompt} degraded"] for prompt in PROMPTS]

    single = [degraded(oracles(images, [model], conditions)["Oracle-Corrupt"]) for model in models]
    found = oracles(images, models, conditions)
    corrupt, instance = (degraded(found[oracle]) for oracle in ORACLES)
    cells = []
    for best, a, b in zip(max(single, key=sum), corrupt, instance):
        cells.append(f"{best:.1f}, {a - best:+.1f}, {b - best:+.1f}")
    return cells


# ---------------------------------------------------------------- the gates


def gate_vectors(out, name, seed, run):
    """All the decisions of a run in an evaluation: (share of its windows that have a component on (images, conditions,
    layers, components), 0 or 1 where images decide; spaces (images, conditions, layers), likewise), of demo/'s
    images."""
    results = read_evaluation(out, name, seed)
    model = runs_in(results)[run]
    vectors, spaces = [], []
    for condition in results["conditions"]:
        layers = unpack_gates(results, model, condition)
        shares = [vector.mean(1) for vector, _ in layers]
        higher = [(space == 1).mean(1) for _, space in layers]
        vectors.append(np.stack(shares, axis=1))  # (images, layers, components)
        spaces.append(np.stack(higher, axis=1))  # (images, layers)
    return np.stack(vectors, axis=1), np.stack(spaces, axis=1)


def gate_variance(vectors):
    """What gates answer to: the shares of their variance that the corruption explains, the image, and neither (for that
    image in that corruption alone). vectors (images, conditions, ...): analysis of variance, summed over gates.
    (0, 0, 0) when no gate ever changes."""
    x = vectors.reshape(*vectors.shape[:2], -1).astype(float)
    x -= x.mean((0, 1))
    total = (x ** 2).mean((0, 1)).sum()
    if total < 1e-12:
        return 0.0, 0.0, 0.0
    by_corruption = (x.mean(0) ** 2).mean(0).sum() / total
    by_image = (x.mean(1) ** 2).mean(0).sum() / total
    return by_corruption, by_image, 1 - by_corruption - by_image


def shuffled(vectors, rng):
    """The control: each image's conditions dealt anew, so that nothing of the corruption is left."""
    return np.stack([image[rng.permutation(len(image))] for image in vectors])


def probe(vectors, rng):
    """Can the corruption be read from the gates? The share of right answers of a linear classifier (ridge regression
    on one column per condition) that learned on half of the images, on the other half. Chance: 1 / conditions."""
    images, conditions = vectors.shape[:2]
    ones = np.ones((images, conditions, 1))
    x = np.concatenate([vectors.reshape(images, conditions, -1), ones], axis=2)
    order = rng.permutation(images)
    right = []
    for tested in np.array_split(order, 2):
        learned = np.setdiff1d(order, tested)
        inputs = x[learned].reshape(-1, x.shape[2])
        targets = np.tile(np.eye(conditions), (len(learned), 1))
        penalty = 3 * np.eye(x.shape[2])
        weights = np.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ targets)
        guesses = (x[tested] @ weights).argmax(2)
        right.append(guesses == np.arange(conditions))
    return float(np.concatenate(right).mean())


def gate_tables(out, cases):
    """Two tables as Markdown: what the gates of each (evaluation, run, seeds) answer to, and what each layer does, by
    seed."""
    answers_to, layers = [], []
    for name, run, seeds in cases:
        rng = np.random.default_rng(data.seed_of("gates", run))
        of_seeds = []
        for seed in range(seeds):
            vectors, spaces = gate_vectors(out, name, seed, run)
            control = shuffled(vectors, rng)
            rate = vectors.mean((0, 1))  # (layers, components)
            of_seeds.append([*gate_variance(vectors), gate_variance(control)[0], probe(vectors, rng),
                             probe(control, rng), (rate == 1).mean(), (rate == 0).mean(), spaces.mean()])
            cells = [label_of(run), str(seed)]
            for layer in range(len(rate)):
                higher, on = spaces[..., layer].mean(), rate[layer].sum()
                switching = ((rate[layer] > 0) & (rate[layer] < 1)).sum()
                cells.append(f"{100 * higher:.0f} %, {on:.0f} on, {switching} switch")
            layers.append(cells)
        shares = []
        for share in zip(*of_seeds):
            shares.append("; ".join(f"{100 * x:.0f}" for x in share))
        answers_to.append([label_of(run), *shares])
    heads = ["gates, in %, by seed", "explained by corruption", "by image", "by both together",
             "by corruption, shuffled", "probe reads the corruption", "probe, shuffled", "always on", "always off",
             "in the higher-rank set"]
    numbers = [f"layer {k}" for k in range(len(layers[0]) - 2)]
    return (table(heads, answers_to),
            table(["in the higher-rank set, components on, components that switch", "seed", *numbers], layers, 2))


# ---------------------------------------------------------------- the report


class Report:
    """OUT/report.md and its figures, of what the jobs left: a method per section."""

    def __init__(self, out, plan):
        self.out, self.plan, self.seeds = out, plan, plan["seeds"]
        self.adapted = [run for run in ADAPTED if run not in plan["leave"]]
        self.main = gather(out, "main", self.seeds)
        self.lines = []

    def write(self):
        """All sections, in order."""
        once = self.variants()
        self.opening()
        self.sam_degrades()
        self.ranks()
        self.beside_others()
        self.unseen()
        self.real()
        self.ablations(once)
        self.gates(once)
        self.costs()
        self.reasons(once)
        self.commands()
        data.save_text("\n".join(self.lines), os.path.join(self.out, "report.md"))

    def say(self, *lines):
        self.lines += [*lines, ""]

    def figure(self, name, draw, results, *model):
        path = draw(results, *model, os.path.join(self.out, name + ".png"))
        self.say(f"![{name}]({os.path.basename(path)})")

    def variants(self):
        """The variants of seed 0, and beside them GaRA and LoRA 64 of that seed."""
        once = gather(self.out, "variants", 1)
        for run in ("gara", "lora64"):
            once.sums[run] = self.main.sums[run][:1]
        return once

    def opening(self):
        first = read_evaluation(self.out, "main", 0)
        self.say("# GaRA-SAM in miniature", f"The tiny SAM (vit_t), {self.seeds} seed{'s' * (self.seeds > 1)}, "
                 f"{self.plan['steps']} steps of 16 images, {len(first['images'])} test scenes, "
                 f"{int(self.main.masks.sum())} masks; torch {first['torch']}, {first['machine']}. Mean IoU over masks "
                 "and seeds in percent, ± half of the 95 % interval, which draws images and seeds again. Differences: "
                 "[the interval], then that of each seed; in round brackets: no larger than its noise.")

    def sam_degrades(self):
        self.say("## 1. SAM degrades", f"`{self.out}/main_0`, `{self.out}/strength_0`.")
        rows = []
        for condition in self.main.conditions:
            cells = [condition]
            for prompt in PROMPTS:
                *mean, _ = estimate(self.main.column("SAM", f"{prompt} {condition}"), self.main.masks)
                cells.append(mean_text(*mean))
            rows.append(cells)
        self.say(table(["SAM, IoU", *PROMPTS], rows))
        self.figure("strength", figure_strength, read_evaluation(self.out, "strength", 0))

    def ranks(self):
        ranks = [run for run in self.adapted if run.startswith("lora")]
        self.say("## 2. Is another rank best for another corruption, or image?", f"`{self.out}/main_*`.")
        self.say(oracle_table(self.out, ranks, self.seeds))
        self.figure("ranks", figure_corruptions, pooled(self.out, "main", ranks, self.seeds))

    def beside_others(self):
        runs = ["SAM", *self.adapted]
        gains = [(run, "SAM") for run in self.adapted]
        against = [("gara", run) for run in runs]
        self.say("## 3. GaRA beside the others", f"`{self.out}/main_*`. On the demo's scenes:")
        self.say(mean_table(self.main, runs))
        self.say("Gain over SAM:")
        self.say(difference_table(self.main, gains))
        self.say("GaRA less each of the others:")
        self.say(difference_table(self.main, against))
        self.say("On scenes of the base model's kind, without bold patterns, which no adapter was trained on:")
        plain = gather(self.out, "main", self.seeds, os.path.join(self.out, "plain"))
        self.say(mean_table(plain, runs), difference_table(plain, gains), difference_table(plain, against))
        self.say(learnable_parameters(self.out, self.adapted))

    def unseen(self):
        self.say("## 4. Corruptions that were not trained on", f"`{self.out}/unseen_*`. Tested on {', '.join(UNSEEN)}.")
        scores = gather(self.out, "unseen", self.seeds)
        self.say(mean_table(scores, scores.sums))
        self.say(difference_table(scores, [("unseen_gara", run) for run in scores.sums]))

    def real(self):
        self.say("## 5. Training on degraded images alone", f"`{self.out}/real_*`. Trained on night alone, or on clear "
                 "and the 15.")
        scores, kinds = gather(self.out, "real", self.seeds), ("night", "underwater", "clear")
        self.say(mean_table(scores, scores.sums, kinds))
        self.say(difference_table(scores, [("real_gara", run) for run in scores.sums], kinds))

    def ablations(self, once):
        self.say("## 6. Ablations", f"`{self.out}/main_*`. The paper's tables, the gates' scope and their noise: GaRA "
                 f"reaches {self.of_gara('point degraded')} from points and {self.of_gara('box degraded')} from boxes "
                 "on degraded scenes; each row is another way, and what GaRA gains on it.")
        columns = ("point degraded", "box degraded")
        rows = []
        for what, runs in ABLATIONS.items():
            for run in runs:
                if run in self.adapted:
                    cells = []
                    for name in columns:
                        *mean, _ = estimate(self.main.column(run, name), self.main.masks)
                        cells += [mean_text(*mean), difference_cell(self.main, "gara", run, name)]
                    rows.append([what, label_of(run), *cells])
        heads = ["ablation", "run"]
        for name in columns:
            heads += [f"{name} IoU", "GaRA - run"]
        self.say(table(heads, rows, 2))
        self.say(f"Temperature (Figure 5): `{self.out}/variants_0`, seed 0; 0.5 is the paper's.")
        self.say(mean_table(once, ["gara", *TEMPERATURES]))
        self.say(difference_table(once, [("gara", run) for run in TEMPERATURES]))

    def of_gara(self, name):
        *mean, _ = estimate(self.main.column("gara", name), self.main.masks)
        return mean_text(*mean)

    def gates(self, once):
        self.say("## 7. What the gates do", f"GaRA and its ablations are those of 3; the others `{self.out}/variants_0`.")
        cases = [("main", run, self.seeds) for run in ("gara", "gara_window", "gara_random", "gara_logistic")]
        cases += [("variants", run, 1) for run in VARIANTS if run.startswith("gara") and run in once.sums]
        self.say(*gate_tables(self.out, cases))
        self.say("How many components are open (Table a1), over all layers, images, conditions and seeds; where windows "
                 "decide, the mean over an image's:")
        whole = pooled(self.out, "main", self.adapted, self.seeds)
        self.say(open_components_table(whole))
        for run in ("gara", "gara_window"):  # of seed 0: components of several seeds have no common order
            first = pooled(self.out, "main", [run], 1)
            name = run.replace("gara", "gates")
            self.figure(name, figure_gates, first, label_of(run))
            self.figure(name.replace("gates", "open"), figure_open, first, label_of(run))
            self.figure(name.replace("gates", "dependence"), figure_dependence, first, label_of(run))

    def costs(self):
        self.say("## 8. Cost", f"`{self.out}/models.json`.")
        with open(os.path.join(self.out, "models.json")) as file:
            costs = json.load(file)
        self.say(table(costs["heads"], costs["rows"]))

    def reasons(self, once):
        self.say("## 9. Looking for reasons", f"`{self.out}/frozen_*`: gates that choose for every image what they "
                 "choose most often.")
        control = gather(self.out, "frozen", self.seeds)
        control.sums["gara"] = self.main.sums["gara"]
        self.say(mean_table(control, ["gara", "frozen"]), difference_table(control, [("gara", "frozen")]))
        self.say(f"`{self.out}/main_*`: the noise, the scope, and whether the gates need to learn.")
        others = ("gara_logistic", "gara_window", "gara_random", "gara_space", "flat_high", "lora64")
        self.say(difference_table(self.main, [("gara", run) for run in others]))
        self.say(f"`{self.out}/variants_0`, seed 0: another learning rate, more steps.")
        runs = ["lora64", *(run for run in VARIANTS if run not in TEMPERATURES)]
        self.say(mean_table(once, ["gara", *runs]))
        pairs = [("gara", run) for run in runs]
        pairs += [("gara_lr", "lora4_lr"), ("gara_lr", "lora64_lr"), ("gara_long", "lora64_long")]
        self.say(difference_table(once, pairs))

    def commands(self):
        self.say("## The commands")
        folder = os.path.join(self.out, "jobs")
        for name in sorted(os.listdir(folder)):
            if name.endswith(".json"):
                with open(os.path.join(folder, name)) as file:
                    job = json.load(file)
                script, *words = map(str, job["command"])
                self.say(f"    {' '.join([os.path.basename(script), *words])}    # {job['seconds']:.0f} s")


def learnable_parameters(out, runs):
    """Markdown: how much each of the runs learns. How fast is for bench.py to say: here others run beside."""
    rows = []
    for run in runs:
        with open(os.path.join(out, "runs", f"{run}_0", "run.json")) as file:
            rows.append([label_of(run), f"{json.load(file)['learnable_parameters']:,}"])
    return table(["training", "learnable parameters"], rows)


def study(args):
    """Every job that is not done yet, then the report."""
    plan = dict(QUICK_STUDY if args.quick else FULL_STUDY)
    if args.seeds:
        plan["seeds"] = args.seeds
    data.make_missing_demo("demo/")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill ends the jobs too, as Ctrl-C does
    Jobs(study_jobs(args.out, **plan), args.out).run(args.jobs)
    Jobs(cost_job(args.out, plan["leave"]), args.out).run(1)
    Report(args.out, plan).write()
    print(f"written: {os.path.join(args.out, 'report.md')}")


def logistic_sigmoid(logits, temperature=0.5, training=True):
    """`gara.gumbel_sigmoid` with the difference of two Gumbel variables, a logistic one, as others draw it."""
    if not training:
        return (logits > 0).to(logits.dtype)
    u = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
    noisy = logits + u.log() - (-u).log1p()
    s = (noisy / temperature).sigmoid()
    return (s > 0.5).to(s.dtype) + (s - s.detach())


def main(argv=None):
    """Run the command line; returns the exit code. A user's mistake ends in one line."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--logistic-noise"]:  # the control: train.py, but for the gates' noise
        gara.gumbel_sigmoid = logistic_sigmoid
        return train.main(argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    add = parser.add_argument
    add("--quick", action="store_true", help="less of everything, into study_quick/")
    add("--seeds", type=int, help="how many (default 3; with --quick 1); more may be added later")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="how many run side by side, a thread each (default: the "
        "cores)")
    add("--out", help="folder (default study/)")
    args = parser.parse_args(argv)
    args.out = args.out or ("study_quick" if args.quick else "study")
    if args.jobs < 1 or (args.seeds is not None and args.seeds < 1):
        parser.error("--jobs and --seeds must be 1 or more")
    try:
        study(args)
    except (data.DatasetError, ValueError, OSError, RuntimeError) as error:
        print(f"error: {data.line_of(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
