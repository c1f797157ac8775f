"""The paper's claims in miniature, on the tiny SAM and the demo: trains, measures, and writes a report.

    python assets/study.py                   3 seeds, into study/; the same command goes on where it was stopped
    python assets/study.py --quick           one seed, fewer and shorter runs, into study_quick/

It runs train.py and evaluate.py, each job on one thread, as many side by side as there are cores: the seeds derive
from names, so that changes no digit. The report is made of what these jobs left in folders, and names them.
"""
import argparse
import concurrent.futures
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
from evaluate import (DRAWS, ORACLES, PROMPTS, corrupted, figure_corruptions, figure_gates, figure_strength, oracles,
                      percent_of, plain, points_of, read_results, table, unpack_gates)
from sam import build_sam, find_checkpoint

UNSEEN = ["snow", "ISO_noise", "zoom_blur", "compression", "contrast"]  # one of weather, noise, blur, coding, light
TEN = ["--conditions", *(condition for condition in data.CONDITIONS if condition not in UNSEEN)]
# {run: (its name in tables, train.py's options)}. All have the same data, batches, learning rate ("full" a smaller one,
# as is usual for whole encoders) and, but for "long", steps. Ranks: vit_t is a fifth as wide as vit_b, so LoRA's
# 2, 4, 16 and 64 stand for about 10, 20, 80 and 300 there, and GaRA's 4 and 48 for the paper's 16 and 256.
LORA64, NIGHT = ["--method", "lora", "--rank", "64"], ["--conditions", "night"]
FAST = ["--lr", "3e-3"]
RUNS = {
    "lora2": ("LoRA 2", ["--method", "lora", "--rank", "2"]), "lora4": ("LoRA 4", ["--method", "lora", "--rank", "4"]),
    "lora16": ("LoRA 16", ["--method", "lora", "--rank", "16"]), "lora64": ("LoRA 64", LORA64),
    "moe": ("MoE-LoRA 1, 4, 24, 48", ["--method", "moe_lora"]),
    "moe_two": ("MoE-LoRA 4, 48", ["--method", "moe_lora", "--experts", "4,48"]),
    "flat_low": ("GaRA flat 4", ["--method", "gara_flat", "--rank", "4"]),
    "flat_high": ("GaRA flat 48", ["--method", "gara_flat", "--rank", "48"]), "gara": ("GaRA", []),
    "gara_window": ("GaRA per window", ["--scope", "window"]),
    "gara_space": ("GaRA, gating 1 alone", ["--method", "gara_space"]),
    "gara_random": ("GaRA, random gates", ["--method", "gara_random"]),
    "gara_logistic": ("GaRA, logistic noise", []),
    "full": ("whole encoder", ["--method", "full", "--lr", "3e-4"]),
    "unseen_lora64": ("LoRA 64, ten seen", LORA64 + TEN), "unseen_gara": ("GaRA, ten seen", TEN),
    "real_lora64": ("LoRA 64, night", LORA64 + NIGHT), "real_gara": ("GaRA, night", NIGHT),
    "gara_t0.1": ("GaRA, temperature 0.1", ["--temperature", "0.1"]),
    "gara_t1": ("GaRA, temperature 1", ["--temperature", "1"]),
    "gara_t2": ("GaRA, temperature 2", ["--temperature", "2"]),
    "gara_untrained": ("GaRA, untrained", ["--steps", "1"]),
    "lora4_lr": ("LoRA 4, learning rate 3e-3", ["--method", "lora", "--rank", "4", *FAST]),
    "lora64_lr": ("LoRA 64, learning rate 3e-3", LORA64 + FAST), "gara_lr": ("GaRA, learning rate 3e-3", FAST),
    "lora64_long": ("LoRA 64, three times as long", [*LORA64, "--steps", "LONG"]),
    "gara_long": ("GaRA, three times as long", ["--steps", "LONG"])}
ADAPTED = ["lora2", "lora4", "lora16", "lora64", "moe", "moe_two", "flat_low", "flat_high", "gara", "gara_window",
           "gara_space", "gara_random", "gara_logistic", "full"]
# {evaluation: (runs, this program's options)}, in the order of the work; PLAIN: scenes of the base model's own kind,
# without bold patterns, which no adapter was trained on. "frozen": GaRA whose gates always choose what they choose most
# often in "main".
EVALUATIONS = {
    "main": (ADAPTED, ["--data", "demo/", "PLAIN"]),
    "frozen": (["frozen"], ["--data", "demo/"]),
    "unseen": (["lora64", "gara", "unseen_lora64", "unseen_gara"],
               ["--data", "demo/", "--conditions", "clear", *UNSEEN]),
    "real": (["lora64", "gara", "real_lora64", "real_gara"],
             ["--data", "demo/", "--conditions", "clear", "night", "underwater"]),
    "variants": (["gara_t0.1", "gara_t1", "gara_t2", "gara_untrained", "lora4_lr", "lora64_lr", "gara_lr",
                  "lora64_long", "gara_long"],
                 ["--data", "demo/"]),
    "strength": (["lora64", "gara"], ["--data", "demo/", "--strengths", "0.5", "1.5", "2"])}
ONCE = ["variants", "strength"]  # of seed 0 alone
FULL_STUDY = dict(seeds=3, steps=160, validations=2, pictures=72, leave=())
QUICK_STUDY = dict(seeds=1, steps=80, validations=1, pictures=24, leave=(
    "lora2", "moe_two", "flat_low", "full", "gara_t0.1", "gara_t1", "lora4_lr", "lora64_lr", "gara_lr", "lora64_long",
    "gara_long"))


def study_jobs(out, seeds, steps, validations, pictures, leave):
    """{folder: (command, folders that must be there before)} in the order of the work. A command is what Python is
    told, or a function. OUT/runs/RUN_SEED are runs of train.py, OUT/EVALUATION_SEED evaluations."""
    scenes = os.path.join(out, "plain")
    jobs = {scenes: ([os.path.join(ROOT, "data.py"), scenes, "--make-demo", "--patterned", "0", "--scenes", "8", "8",
                      str(pictures // 3)], [])}
    for name, (runs, asked) in EVALUATIONS.items():
        for seed in range(1 if name in ONCE else seeds):
            at, folder = os.path.join(out, "runs", "{}_" + str(seed)), os.path.join(out, f"{name}_{seed}")
            files = []
            for run in (run for run in runs if run not in leave):
                place = at.format(run)
                files.append(os.path.join(place, adapter_file(run)))
                if run == "frozen":
                    main = os.path.join(out, f"main_{seed}")
                    jobs[place] = functools.partial(freeze_gates, main, at.format("gara"), place), [main]
                elif place not in jobs:
                    options = [str(3 * steps) if word == "LONG" else word for word in RUNS[run][1]]
                    options += [] if "--steps" in options else ["--steps", str(steps)]
                    every = max(1, int(options[options.index("--steps") + 1]) // validations)
                    script = [os.path.join(ROOT, "train.py")]
                    if run == "gara_logistic":
                        script = [os.path.join(HERE, "study.py"), "--logistic-noise"]
                    jobs[place] = [*script, "--data", "demo/", "--seed", str(seed), "--out",
                                   place, "--workers", "0", "--device", "cpu", "--val-every", str(every), *options], []
            options = [scenes if word == "PLAIN" else word for word in asked]
            count = pictures // 4 if name == "strength" else pictures
            jobs[folder] = [os.path.join(ROOT, "evaluate.py"), "--ckpt", *files, *options, "--limit", str(count),
                            "--workers", "0", "--device", "cpu", "--out", folder], [*map(os.path.dirname, files),
                                                                                     *[scenes] * ("PLAIN" in asked)]
    return jobs


def adapter_file(run):
    """What train.py calls the result of a run."""
    words = RUNS.get(run, ("", []))[1]
    return (words[words.index("--method") + 1] if "--method" in words else "gara") + ".pt"


def freeze_gates(main, run, out):
    """A control for GaRA: an adapter whose gates choose the same for every picture, what they chose most often in the
    evaluation `main`: in each layer the set, and of it the components that were on in more than half of the cases."""
    results, path = read_results(os.path.join(main, "results.json")), os.path.join(run, "gara.pt")
    model = next(name for name, about in results["models"].items() if about["file"] == path)
    cases = [unpack_gates(results, model, condition) for condition in results["conditions"]]
    sam = build_sam(results["backbone"], find_checkpoint(results["backbone"]))
    gara.load_adapter(sam, path)
    low = results["models"][model]["options"]["rank_low"]
    with torch.no_grad():
        for layer, adapter in enumerate(gara.adapters(sam)):
            vectors = np.concatenate([case[layer][0][:, 0] for case in cases])  # (images and conditions, components)
            spaces = np.concatenate([case[layer][1][:, 0] for case in cases])
            higher = spaces.mean() > 0.5
            on = vectors[spaces == higher].mean(0) > 0.5
            gate = adapter.gate
            for g, choice in ((gate.g_space, [higher]), (gate.g_L, on[:low]), (gate.g_H, on[low:])):
                g[-1].weight.zero_()
                g[-1].bias.copy_(torch.from_numpy(np.array(choice) - 0.5))
    os.makedirs(out, exist_ok=True)
    gara.save_adapter(sam, os.path.join(out, "gara.pt"))


def run_jobs(jobs, out, at_once):
    """Does what is not done yet, `at_once` jobs side by side. OUT/jobs/NAME.txt is what a job printed, NAME.json says
    that it is done, by which command and in how many seconds. RuntimeError, in one line, when one fails."""
    place, processes, counted, waiting, running = os.path.join(out, "jobs"), set(), [], dict(jobs), {}
    os.makedirs(place, exist_ok=True)

    def files_of(folder):
        name = os.path.join(place, os.path.relpath(folder, out).replace(os.sep, "_"))
        return name + ".json", name + ".txt"

    def do(folder):
        command, (done, log) = jobs[folder][0], files_of(folder)
        words = command if isinstance(command, list) else [command.func.__name__, *command.args]
        if os.path.exists(done):
            with open(done) as file:
                before = json.load(file)["command"]
            if before[1:] != words[1:]:
                raise RuntimeError(f"{folder} is of another study ({' '.join(before[1:])}): choose another --out")
            return
        begun = time.monotonic()
        if callable(command):
            command()
        else:
            more = ["--resume"] if os.path.exists(os.path.join(folder, "last.pt")) else []
            with open(log, "a") as file:
                process = subprocess.Popen([sys.executable, *command, *more], stdout=file, stderr=file,
                                           env=os.environ | dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"))
                processes.add(process)
                code = process.wait()
                processes.remove(process)
            if code:
                with open(log) as file:
                    last = ([line.strip() for line in file if line.strip()] or ["it printed nothing"])[-1]
                raise RuntimeError(f"{folder}: {last} (exit code {code}; all of it in {log})")
        seconds = time.monotonic() - begun
        data.save_text(json.dumps(dict(command=words, seconds=round(seconds, 1))), done)
        counted.append(seconds)
        left = sum(not os.path.exists(files_of(other)[0]) for other in jobs)
        rest = datetime.timedelta(seconds=round(left * np.mean(counted) / at_once))
        print(f"{len(jobs) - left}/{len(jobs)}  {folder}  {seconds:.0f} s  about {rest} left", flush=True)

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        try:
            while waiting or running:
                open_yet = {*waiting, *running.values()}
                ready = [folder for folder in waiting if open_yet.isdisjoint(jobs[folder][1])]
                for folder in ready[:at_once - len(running)]:
                    running[pool.submit(do, folder)] = folder
                    del waiting[folder]
                for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                    del running[future]
                    future.result()
        finally:  # one has failed, or Ctrl-C: the others save what they have, so the same command goes on
            for process in list(processes):
                process.terminate()


def runs_in(results):
    """{run, or "SAM": the name of its model} of a results.json."""
    return {os.path.basename(os.path.dirname(about["file"])).rpartition("_")[0] if about["file"] else "SAM": model
            for model, about in results["models"].items()}


def gather(out, name, seeds, root):
    """Evaluation `name` of all seeds, on the pictures of one root: (values, masks, conditions). values {run, or "SAM":
    IoU summed over the masks of each picture, (seeds, pictures, 2 prompts, conditions)}; masks of each picture."""
    found = {}
    for seed in range(seeds):
        results = read_results(os.path.join(out, f"{name}_{seed}", "results.json"))
        images = [image for image in results["images"] if image["data"] == root]
        for run, model in runs_in(results).items():
            found.setdefault(run, []).append([[[np.sum(image["scores"][model][condition][prompt], axis=0)[0]
                                                for condition in results["conditions"]] for prompt in PROMPTS]
                                              for image in images])
    masks = np.array([len(image["indices"]) for image in images], float)
    return {run: np.array(values) for run, values in found.items()}, masks, results["conditions"]


def estimate(sums, masks):
    """(mean over masks and seeds, low, high, [of each seed]) of sums (seeds, pictures). The 95 % interval draws
    pictures and seeds again, so it covers both; of three seeds that is rough, so each is shown beside."""
    (seeds, pictures), rng = sums.shape, np.random.default_rng(data.seed_of("study"))
    drawn = [rng.multinomial(n, np.full(n, 1 / n), DRAWS).astype(float) for n in (seeds, pictures)]
    means = (drawn[0] / seeds @ sums * drawn[1]).sum(1) / (drawn[1] @ masks)
    each = sums.sum(1) / masks.sum()
    return each.mean(), *np.percentile(means, (2.5, 97.5)), each.tolist()


def column(values, conditions, prompt, kind):
    """Of values (..., 2 prompts, conditions) one column: a condition, or "degraded", the mean of all but clear."""
    those = [conditions.index(c) for c in (corrupted(conditions) if kind == "degraded" else [kind])]
    return values[..., PROMPTS.index(prompt), those].mean(-1)


def study_table(found, runs, kinds=("degraded", "clear"), against=None):
    """Markdown: mean IoU of the runs that there are; or, with `against`, that run less each of them, and by seed."""
    values, masks, conditions = found
    heads, rows = [f"{prompt} {kind}" for prompt in PROMPTS for kind in kinds], []
    for run in runs:
        if run in values and run != against:
            cells = []
            for prompt, kind in (head.split(" ") for head in heads):
                of = column(values[run], conditions, prompt, kind)
                if against:
                    *found, each = estimate(column(values[against], conditions, prompt, kind) - of, masks)
                    each = " ".join(f"{100 * x:+.1f}" for x in each)
                    cells.append(points_of(*found) + (f"; {each}" if len(of) > 1 else ""))
                else:
                    cells.append(percent_of(*estimate(of, masks)[:3]))
            rows.append([label_of(run) if not against else f"{label_of(against)} - {label_of(run)}", *cells])
    return table(["IoU", *heads], rows)


def label_of(run):
    """What tables call a run."""
    return RUNS[run][0] if run in RUNS else dict(frozen="GaRA, its gates frozen").get(run, run)


def gate_vectors(out, name, seed, run):
    """All the decisions of a run in an evaluation: (share of its windows that have a component on (pictures, conditions,
    layers, components), 0 or 1 where images decide; spaces (pictures, conditions, layers), likewise; conditions), of
    demo/'s pictures."""
    results = read_results(os.path.join(out, f"{name}_{seed}", "results.json"))
    model = runs_in(results)[run]
    results["images"] = [image for image in results["images"] if image["data"] == "demo/"]
    vectors, spaces = [], []
    for condition in results["conditions"]:
        layers = unpack_gates(results, model, condition)
        vectors.append(np.stack([vector.mean(1) for vector, _ in layers], axis=1))  # (pictures, layers, components)
        spaces.append(np.stack([(space == 1).mean(1) for _, space in layers], axis=1))
    return np.stack(vectors, axis=1), np.stack(spaces, axis=1), results["conditions"]


def gate_variance(vectors):
    """What gates answer to: the shares of their variance that the corruption explains, the picture, and neither (for
    that picture in that corruption alone). vectors (pictures, conditions, ...): analysis of variance, summed over
    gates. (0, 0, 0) when no gate ever changes."""
    x = vectors.reshape(*vectors.shape[:2], -1).astype(float)
    x -= x.mean((0, 1))
    total = (x ** 2).mean((0, 1)).sum()
    shares = [(x.mean(axis) ** 2).mean(0).sum() / max(total, 1e-12) for axis in (0, 1)]
    return (*shares, 1 - sum(shares)) if total > 1e-12 else (0.0, 0.0, 0.0)


def shuffled(vectors, rng):
    """The control: each picture's conditions dealt anew, so that nothing of the corruption is left."""
    return np.stack([picture[rng.permutation(len(picture))] for picture in vectors])


def probe(vectors, rng):
    """Can the corruption be read from the gates? The share of right answers of a linear classifier (ridge regression
    on one column per condition) that learned on half of the pictures, on the other half. Chance: 1 / conditions."""
    pictures, conditions = vectors.shape[:2]
    x = vectors.reshape(pictures, conditions, -1).astype(float)
    order, right = rng.permutation(pictures), []
    for test in np.array_split(order, 2):
        train = np.setdiff1d(order, test)
        known, asked = (np.concatenate([x[part], np.ones((len(part), conditions, 1))], 2) for part in (train, test))
        flat, answers = known.reshape(-1, known.shape[2]), np.tile(np.eye(conditions), (len(train), 1))
        weights = np.linalg.solve(flat.T @ flat + 3 * np.eye(flat.shape[1]), flat.T @ answers)
        right.append((asked @ weights).argmax(2) == np.arange(conditions))
    return float(np.concatenate(right).mean())


def study_gates(out, runs):
    """Two tables as Markdown: what the gates of each (evaluation, run, seeds) answer to, and what each layer does, by
    seed."""
    answers_to, layers = [], []
    for name, run, seeds in runs:
        parts, rng = [], np.random.default_rng(data.seed_of("gates", run))
        for seed in range(seeds):
            vectors, spaces, conditions = gate_vectors(out, name, seed, run)
            control, rate = shuffled(vectors, rng), vectors.mean((0, 1))  # rate (layers, components)
            parts.append([*gate_variance(vectors), gate_variance(control)[0], probe(vectors, rng), probe(control, rng),
                          (rate == 1).mean(), (rate == 0).mean(), spaces.mean()])
            layers.append([label_of(run), str(seed), *(
                f"{100 * spaces[..., k].mean():.0f} %, {vectors[..., k, :].sum(2).mean():.0f} on, "
                f"{((rate[k] > 0) & (rate[k] < 1)).sum()} switch" for k in range(vectors.shape[2]))])
        answers_to.append([label_of(run), *("; ".join(f"{100 * x:.0f}" for x in share) for share in zip(*parts))])
    return (table(["gates, in %, by seed", "explained by corruption", "by picture", "by both together",
                   "by corruption, shuffled", "probe reads the corruption", "probe, shuffled", "always on",
                   "always off", "in the higher-rank set"], answers_to),
            table(["in the higher-rank set, components on, components that switch", "seed",
                   *(f"layer {k}" for k in range(len(layers[0]) - 2))], layers, 2))


def pooled(out, name, runs, seeds):
    """Evaluation `name` of all seeds as one results.json, for figures: the models are the runs, each picture stands
    there once for each seed, and means and intervals are those of `estimate`."""
    values, masks, conditions = gather(out, name, seeds, "demo/")
    whole = dict(images=[], models={}, means={}, intervals={}, conditions=conditions, data=["demo/"])
    for seed in range(seeds):
        results = read_results(os.path.join(out, f"{name}_{seed}", "results.json"))
        named = {run: model for run, model in runs_in(results).items() if run in runs}
        whole |= {key: results[key] for key in ("split", "backbone")}
        whole["models"] |= {label_of(run): results["models"][model] for run, model in named.items()}
        whole["images"] += [image | {kind: {label_of(run): image[kind][model] for run, model in named.items()
                                            if model in image[kind]} for kind in ("scores", "gates")}
                            for image in results["images"] if image["data"] == "demo/"]
    for run in runs:
        found = {f"{prompt} {kind}": estimate(column(values[run], conditions, prompt, kind), masks)[:3]
                 for prompt in PROMPTS for kind in (*plain(conditions), "degraded") if run in values}
        if found:
            whole["means"][label_of(run)] = {key: [mean] for key, (mean, *_) in found.items()}
            whole["intervals"][label_of(run)] = {key: [interval] for key, (_, *interval) in found.items()}
    return whole


def study_oracles(out, ranks, seeds):
    """Markdown: LoRA's oracles of Section 3.2, and the control that the paper lacks. Choosing the best of several
    answers by the truth gains even if they differ by chance alone: so the same is done with three seeds of one rank
    instead of three ranks of one seed. Only what ranks gain beyond seeds is a reason to choose ranks."""
    whole, rows = pooled(out, "main", ranks, seeds), []
    pictures = len(whole["images"]) // seeds
    of_seed = [whole["images"][seed * pictures:(seed + 1) * pictures] for seed in range(seeds)]

    def row(name, images, models):
        found = oracles(images, models, whole["conditions"])
        means = {model: [oracles(images, [model], whole["conditions"])["Oracle-Corrupt"]["iou"][f"{prompt} degraded"]
                         for prompt in PROMPTS] for model in models}
        best = max(means.values(), key=sum)
        rows.append([name, *(f"{100 * a:.1f}, {100 * (b - a):+.1f}, {100 * (c - a):+.1f}" for a, b, c in zip(
            best, *([found[oracle]["iou"][f"{prompt} degraded"] for prompt in PROMPTS] for oracle in ORACLES)))])

    models, three = list(whole["models"]), list(whole["models"])[-3:]
    for seed in range(seeds):
        row(f"ranks {', '.join(model.split()[-1] for model in models)}, seed {seed}", of_seed[seed], models)
    for seed in range(seeds if seeds > 2 else 0):
        row(f"ranks {', '.join(model.split()[-1] for model in three)}, seed {seed}", of_seed[seed], three)
    for model in models if seeds > 2 else ():
        images = [image | dict(scores={str(k): of_seed[k][n]["scores"][model] for k in range(3)})
                  for n, image in enumerate(of_seed[0])]
        row(f"control: 3 seeds of {model}", images, ["0", "1", "2"])
    return table(["best single, Oracle-Corrupt's gain, Oracle-Instance's gain", "point degraded", "box degraded"], rows)


def write_report(out, plan):
    """OUT/report.md and its figures, of what the jobs left."""
    seeds, leave, scenes = plan["seeds"], plan["leave"], os.path.join(out, "plain")
    adapted, text = [run for run in ADAPTED if run not in leave], []
    main, style = (gather(out, "main", seeds, root) for root in ("demo/", scenes))
    first = read_results(os.path.join(out, "main_0", "results.json"))
    demo = [image for image in first["images"] if image["data"] == "demo/"]

    def say(*lines):
        text.extend([*lines, ""])

    def figure(draw, results, *more, name):
        say(f"![{name}]({os.path.basename(draw(results, *more, os.path.join(out, name + '.png')))})")

    say("# GaRA-SAM in miniature", f"The tiny SAM (vit_t), {seeds} seed{'s' * (seeds > 1)}, {plan['steps']} steps of "
        f"16 pictures, {len(demo)} test scenes, {int(main[1].sum())} masks; torch {first['torch']}, "
        f"{first['machine']}. Mean IoU over masks and seeds in percent, ± half of the 95 % interval, which draws "
        "pictures and seeds again. "
        "Differences: [the interval], then that of each seed; in round brackets: no larger than its noise.")
    say("## 1. SAM degrades", f"`{out}/main_0`, `{out}/strength_0`.")
    values, masks, conditions = main
    say(table(["SAM, IoU", *PROMPTS], [[condition, *(
        percent_of(*estimate(column(values["SAM"], conditions, prompt, condition), masks)[:3])
        for prompt in PROMPTS)] for condition in conditions]))
    figure(figure_strength, read_results(os.path.join(out, "strength_0", "results.json")), name="strength")
    ranks = [run for run in adapted if run.startswith("lora")]
    say("## 2. Is another rank best for another corruption, or picture?", f"`{out}/main_*`.")
    say(study_oracles(out, ranks, seeds))
    figure(figure_corruptions, pooled(out, "main", ranks, seeds), name="ranks")
    say("## 3. GaRA beside the others", f"`{out}/main_*`. On the demo's scenes:")
    say(study_table(main, ["SAM", *adapted]), study_table(main, ["SAM", *adapted], against="gara"))
    say("On scenes of the base model's kind, without bold patterns, which no adapter was trained on:")
    say(study_table(style, ["SAM", *adapted]), study_table(style, ["SAM", *adapted], against="gara"))
    say(training_costs(out, adapted))
    say("## 4. Corruptions that were not trained on", f"`{out}/unseen_*`. Tested on {', '.join(UNSEEN)}.")
    unseen = gather(out, "unseen", seeds, "demo/")
    runs = [run for run in EVALUATIONS["unseen"][0] if run not in leave]
    say(study_table(unseen, ["SAM", *runs]), study_table(unseen, ["SAM", *runs], against="unseen_gara"))
    say("## 5. Training on degraded pictures alone", f"`{out}/real_*`. Trained on night alone, or on clear and the 15.")
    real, kinds = gather(out, "real", seeds, "demo/"), ("night", "underwater", "clear")
    runs = [run for run in EVALUATIONS["real"][0] if run not in leave]
    say(study_table(real, ["SAM", *runs], kinds), study_table(real, ["SAM", *runs], kinds, "real_gara"))
    once = gather(out, "variants", 1, "demo/")
    once[0].update({run: values[run][:1] for run in ("gara", "lora64")})
    say("## 6. Temperature", f"`{out}/variants_0`, seed 0; 0.5 is the paper's.")
    warm = sorted((run for run in once[0] if run.startswith("gara_t")), key=lambda run: float(run[6:]))
    say(study_table(once, [*warm, "gara"]), study_table(once, [*warm, "gara"], against="gara"))
    say("## 7. What the gates do", f"GaRA is that of 3; the others `{out}/variants_0`.")
    gated = [("main", run, seeds) for run in ("gara_window", "gara_random", "gara_logistic")]
    gated += [("variants", run, 1) for run in EVALUATIONS["variants"][0] if run.startswith("gara") and run in once[0]]
    say(*study_gates(out, [("main", "gara", seeds), *gated]))
    figure(figure_gates, pooled(out, "main", ["gara"], 1), "GaRA", name="gates")  # components of seeds have no order
    say("## 8. Cost", f"`{out}/cost`.")
    cost = read_results(os.path.join(out, "cost", "results.json"))["costs"]
    say(table(cost["heads"], cost["rows"]))
    say("## 9. Looking for reasons", f"`{out}/frozen_*`: gates that choose for every picture what they choose most "
        "often.")
    control = gather(out, "frozen", seeds, "demo/")
    control[0]["gara"] = values["gara"]
    say(study_table(control, ["gara", "frozen"]), study_table(control, ["frozen"], against="gara"))
    say(f"`{out}/variants_0`, seed 0: another learning rate, more steps.")
    runs = ["gara", "lora64", *(run for run in EVALUATIONS["variants"][0] if run not in warm)]
    say(study_table(once, runs), study_table(once, runs, against="gara"))
    for run, others in (("gara_lr", ["lora4_lr", "lora64_lr"]), ("gara_long", ["lora64_long"])):
        if run in once[0]:
            say(study_table(once, others, against=run))
    say("## The commands")
    for name in sorted(os.listdir(os.path.join(out, "jobs"))):
        if name.endswith(".json"):
            with open(os.path.join(out, "jobs", name)) as file:
                job = json.load(file)
            script, *words = map(str, job["command"])
            say(f"    {' '.join([os.path.basename(script), *words])}    # {job['seconds']:.0f} s")
    data.save_text("\n".join(text), os.path.join(out, "report.md"))


def training_costs(out, runs):
    """Markdown: what learns, and how fast."""
    rows = []
    for run in runs:
        place = os.path.join(out, "runs", f"{run}_0")
        with open(os.path.join(place, "run.json")) as file:
            count = json.load(file)["learnable_parameters"]
        with open(os.path.join(place, "log.jsonl")) as file:
            speed = np.median([line["images_per_second"] for line in map(json.loads, file) if "loss" in line])
        rows.append([label_of(run), f"{count:,}", f"{speed:.1f}"])
    return table(["training", "learnable parameters", "images/s, one thread"], rows)


def study(args):
    """Every job that is not done yet, then the report."""
    plan = QUICK_STUDY if args.quick else FULL_STUDY
    plan = plan | (dict(seeds=args.seeds) if args.seeds else {})
    data.make_missing_demo("demo/")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill ends the jobs too, as Ctrl-C does
    run_jobs(study_jobs(args.out, **plan), args.out, args.jobs)
    cost = os.path.join(args.out, "cost")
    files = [os.path.join(args.out, "runs", f"{run}_0", adapter_file(run)) for run in ADAPTED
             if run not in plan["leave"]]
    run_jobs({cost: ([os.path.join(ROOT, "evaluate.py"), "--ckpt", *files, "--data", "demo/", "--no-corrupt", "--limit",
                      "1", "--costs", "--workers", "0", "--device", "cpu", "--out", cost], [])}, args.out, 1)
    write_report(args.out, plan)
    print(f"written: {os.path.join(args.out, 'report.md')}")


def logistic_sigmoid(logits, temperature=0.5, training=True):
    """`gara.gumbel_sigmoid` with the difference of two Gumbel variables, a logistic one, as others draw it."""
    if not training:
        return (logits > 0).to(logits.dtype)
    u = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
    s = ((logits + u.log() - (-u).log1p()) / temperature).sigmoid()
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
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
