"""Runs the studies of results/README.md: trains students, scores them, prints what came out.

    python results/study.py A B --data DIR    DIR holds train/, Set5/, Set14/ and B100/
    python results/study.py A B --report      prints the tables of the runs that are there
    python results/study.py G --report --over FAKD    compares with another arm than KD
    python results/study.py --plot            draws results/few_images.png (needs matplotlib)

A run that has its record in results/study_*.json is skipped. A run that was stopped goes on.
"""
import argparse
import concurrent.futures
import csv
import functools
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import scipy.stats

RESULTS = Path(__file__).resolve().parent
ROOT, RUNS = RESULTS.parent, Path("runs/study")
FIXED = ("--teacher edsr_baseline.pt --student small --steps 4000 --batch 4 --patch 24 "
         "--lr 1e-3 --schedule cosine")
ALL, EMBEDDED = 881, 0  # training images: all that are not held out; scikit-image's photographs

# An arm is the flags that follow FIXED. Where both name a flag, the arm's counts.
SCRATCH, KD, ZOOM_IN, DUKD = "--method scratch", "--method kd", "--no-zoom-out", "--method dukd"
EQUAL = f"{ZOOM_IN} --lambda-rec 1"  # KD's and scratch's weight of the ground truth; DUKD's default is 5
METHODS = [SCRATCH, KD, EQUAL, DUKD]
TERMS = {
    SCRATCH: "scratch", f"{SCRATCH} --zoom-out-rec": "ground-truth zoom-out", KD: "KD",
    f"{ZOOM_IN} --consistency none": "zoom-in without F", ZOOM_IN: "zoom-in with F", DUKD: "DUKD"}
BASELINES = {
    "--method fitnet": "FitNet", "--method at": "AT", "--method fakd": "FAKD",
    f"{DUKD} --feature fakd": "DUKD + FAKD"}
WEIGHTS = {
    f"{KD} --lambda-rec 5": "KD, λ_rec 5", EQUAL: "zoom-in with F, λ_rec 1",
    f"{DUKD} --lambda-rec 1": "DUKD, λ_rec 1"}
LONGER = {f"{KD} --steps 8000": "KD, 8,000 steps"}
LABELS = TERMS | BASELINES | WEIGHTS | LONGER
BIG = f"{SCRATCH} --student edsr_baseline --batch 8 --patch 32 --lr 5e-4"  # study D's own teachers
ABLATIONS = [
    "--ops hflip", "--ops vflip", "--ops transpose", "--ops invert",
    "--ops vflip transpose invert", "--ops hflip transpose invert", "--ops hflip vflip invert",
    "--ops hflip vflip transpose", "--p 0.1", "--p 0.5", "--consistency none", "--consistency zoom_out",
    "--consistency both", "--lambda-dukd 0.3", "--lambda-dukd 3", "--crops 2", "--crops 4"]

# Of study E's pictures.
TURNS = dict(invert=lambda x: 255 - x, hflip=lambda x: x[:, ::-1], transpose=lambda x: x.swapaxes(0, 1))


def folder(arm, n, seed):
    return RUNS / f"{re.sub(r'[^a-z0-9]+', '_', arm).strip('_')}_n{n}_s{seed}"


def grid(reference, arms, numbers, seeds):
    """A study: the arm that the others are compared with, and its runs (arm, training images, seed)."""
    return reference, [(arm, n, seed) for seed in range(seeds) for n in numbers for arm in arms]


def variants(arms, flags, n, seeds):
    """A study of those arms with further flags. The first arm is what the others are compared with."""
    return grid(f"{arms[0]} {flags}", [f"{arm} {flags}" for arm in arms], [n], seeds)


POOR = f"--teacher {folder(f'{BIG} --steps 600', ALL, 0)}/best.pt"
SAME = f"--teacher {folder(BIG, 2, '{seed}')}/best.pt"
STUDIES = {
    "A": grid(KD, [*TERMS], [2], 5),
    "B": grid(KD, METHODS, [2, 8, 32, 128, ALL], 3),
    "C": grid(KD, [KD, *LONGER, EQUAL, DUKD], [2], 5),
    "D-poor-teacher": grid("", [f"{BIG} --steps 600"], [ALL], 1),  # before D-poor
    "D-same-teacher": grid("", [BIG], [2], 3),  # before D-same
    "D-poor": variants([KD, DUKD], POOR, 2, 3),
    "D-same": variants([KD, DUKD], SAME, 2, 3),
    "F": grid(DUKD, [DUKD, *(f"{DUKD} {flags}" for flags in ABLATIONS)], [8], 2),
    "G": grid(KD, [*METHODS, *BASELINES], [8], 3),
    "H-rcan": variants([KD, SCRATCH, DUKD], "--student rcan_c32b4g4", 8, 2),
    "H-swinir": variants([KD, SCRATCH, DUKD], "--student swinir_c36s12", 8, 2),
    "I": variants([KD, SCRATCH, EQUAL, DUKD], "--steps 20000", EMBEDDED, 1),
    "K": grid(KD, [KD, *WEIGHTS], [2], 5),
}


def prepare(place):
    """Puts the held-out images, and B100 after three operations of F, into RUNS. Returns all other images."""
    held_names = json.loads((RESULTS / "edsr_baseline.json").read_text())["training"]["held_out"]
    images = sorted(path for path in (place / "train").iterdir())
    held = [path for path in images if path.stem in held_names]
    pool = [path for path in images if path not in held]
    if (len(held), len(pool)) != (16, ALL):
        raise SystemExit(f"error: {place}/train has {len(held)} of 16 held-out images and {len(pool)} others")
    copy(held, RUNS / "held")
    for name, turn in TURNS.items():
        (RUNS / f"B100_{name}").mkdir(exist_ok=True)
        for path in sorted((place / "B100").iterdir()):
            target = RUNS / f"B100_{name}" / f"{path.stem}.png"
            if not target.exists():
                image = iio.imread(path)
                h, w = (side // 4 * 4 for side in image.shape[:2])  # evaluate.py would crop it after the turn
                iio.imwrite(target, turn(image[:h, :w]))
    return pool


def copy(paths, target):
    """Copies the files that a folder lacks."""
    target.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if not (target / path.name).exists():
            shutil.copy(path, target)


def call(log, program, *words):
    """Runs one of the project's programs in one thread. What it prints is added to the file `log`."""
    with open(log, "a") as out:
        subprocess.run([sys.executable, ROOT / program, *map(str, words)], check=True, stdout=out, stderr=out,
                       env=os.environ | dict(OMP_NUM_THREADS="1"))


def train_and_score(arm, n, seed, place):
    """One run: its record for the JSON."""
    out, images = folder(arm, n, seed), RUNS / f"images_n{n}_s{seed}"
    words = shlex.split(f"{FIXED} {arm.format(seed=seed)} --seed {seed} --val {RUNS}/held --out {out}")
    words += ["--data", str(images)] if n != EMBEDDED else []
    resumed, began = (out / "config.json").exists(), time.time()
    call(f"{out}.log", "train.py", *(["--resume", "--out", out] if resumed else words))
    seconds = time.time() - began
    about = json.loads((out / "config.json").read_text())
    rows = list(csv.DictReader(open(out / "log.csv")))
    held_out = [(int(row["step"]), float(row["val_psnr"])) for row in rows if row["val_psnr"]]
    best, end = max(held_out, key=lambda point: point[1]), held_out[-1]
    sets = [place / name for name in ("Set5", "Set14", "B100")]
    of_a = (arm, n, seed) in STUDIES["A"][1]  # study E scores A's students
    turned = [RUNS / f"B100_{name}" for name in TURNS] if of_a else []
    record = dict(arm=arm, n=n, seed=seed, command=shlex.join(["python", "train.py", *words]),
                  images=sorted(path.stem for path in images.iterdir()) if 0 < n <= 8 else None,
                  held_out_by_step=held_out, seconds=None if resumed else round(seconds),
                  **{key: about[key] for key in ("git", "versions", "device_name", "started")})
    record["best"] = score(out / "best.pt", best, [*sets, *turned])
    record["end"] = record["best"] if best == end else score(out / "student.pt", end, sets)
    return record


def score(file, point, places):
    """A checkpoint's step, its held-out PSNR, and its scores on the test sets in `places`."""
    table = file.with_suffix(".json")
    call(f"{file.parent}.log", "evaluate.py", file, "--data", *places, "--json", table)
    scores = json.loads(table.read_text())["results"][str(file)]
    return dict(step=point[0], held_out=point[1],
                **{Path(s).name: {k: scores[s][k] for k in ("psnr", "ssim")} for s in scores})


@functools.cache
def records():
    """All records so far: {(arm, n, seed): record}."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("study_*.json"))]
    return {(r["arm"], r["n"], r["seed"]): r for part in found for r in part}


def run(study, place, jobs):
    """Makes the runs of a study that have no record yet, `jobs` at a time."""
    file, pool = RESULTS / f"study_{study}.json", prepare(place)
    missing = [one for one in STUDIES[study][1] if one not in records()]
    print(f"{study}: {len(missing)} of {len(STUDIES[study][1])} runs to make", flush=True)
    for n, seed in {(n, seed) for _, n, seed in missing}:  # a larger n keeps the images of a smaller one
        copy(random.Random(seed).sample(pool, ALL)[:n], RUNS / f"images_n{n}_s{seed}")
    executor = concurrent.futures.ThreadPoolExecutor(jobs)
    tasks = [executor.submit(train_and_score, *one, place) for one in missing]
    try:
        for task in concurrent.futures.as_completed(tasks):
            record = task.result()
            earlier = json.loads(file.read_text()) if file.exists() else []
            file.write_text(json.dumps([*earlier, record], indent=1))
            records.cache_clear()
            print(f"{record['arm']}, n = {record['n']}, seed {record['seed']}: held out "
                  f"{record['best']['held_out']:.2f}, {record['end']['held_out']:.2f} at the end", flush=True)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
    finally:
        executor.shutdown(cancel_futures=True)  # after a signal or an error no further run begins


def psnrs(arm, n, when, where):
    """{seed: PSNR} of the runs of an arm. when: best or end. where: held_out or a test set."""
    return {seed: r[when][where] if where == "held_out" else r[when][where]["psnr"]
            for (a, m, seed), r in records().items() if (a, m) == (arm, n) and where in r[when]}


def spread(values):
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def gain(arm, reference, n, when, where):
    """Mean difference of two arms, paired by seed, with its 95 % t-interval."""
    ours, theirs = (psnrs(a, n, when, where) for a in (arm, reference))
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if arm == reference or not differences:
        return "–"
    mean = np.mean(differences)
    if len(differences) == 1:
        return f"{mean:+.3f}"
    half = scipy.stats.t.ppf(0.975, len(differences) - 1) * scipy.stats.sem(differences)
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def table(study, over=None):
    """The lines of a study's table, in Markdown. Scores: mean ± standard deviation over the seeds.
    Differences are to the study's reference, or to the arm with the label `over`."""
    reference, runs = STUDIES[study]
    reference = next((arm for arm in LABELS if LABELS[arm] == over), reference)
    label = LABELS.get(reference, reference)
    yield ("| n | arm | seeds | held out: best, end | Set5 | Set14 | B100: best, end | "
           f"B100 over {label}: best [95 %] | end [95 %] |")
    yield "|---|---|---|---|---|---|---|---|---|"
    for arm, n in sorted(dict.fromkeys((arm, n) for arm, n, _ in runs), key=lambda pair: pair[1]):
        cell = {(when, where): spread(list(values.values())) for when in ("best", "end")
                for where in ("held_out", "Set5", "Set14", "B100") if (values := psnrs(arm, n, when, where))}
        if cell:
            held, b100 = (f"{cell['best', where]}, {cell['end', where]}" for where in ("held_out", "B100"))
            gains = " | ".join(gain(arm, reference, n, when, "B100") for when in ("best", "end"))
            yield (f"| {n} | {LABELS.get(arm, arm)} | {len(psnrs(arm, n, 'best', 'B100'))} | {held} | "
                   f"{cell['best', 'Set5']} | {cell['best', 'Set14']} | {b100} | {gains} |")


def robustness():
    """Study E: what A's best students lose on B100 turned: mean (least to most) over the seeds."""
    yield "| arm | inverted | flipped | transposed |\n|---|---|---|---|"
    for arm in TERMS:
        plain, cells = psnrs(arm, 2, "best", "B100"), []
        for name in TURNS:
            losses = [plain[seed] - psnr for seed, psnr in psnrs(arm, 2, "best", f"B100_{name}").items()]
            cells.append(f"{np.mean(losses):.2f} ({min(losses):.2f} to {max(losses):.2f})")
        yield f"| {LABELS[arm]} | {' | '.join(cells)} |"


def plot():
    """results/few_images.png: study B. PSNR on B100 of the best students against the number of images."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    numbers = sorted({n for _, n, _ in STUDIES["B"][1]})
    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for i, arm in enumerate(METHODS):
        points = [(n, [*values.values()]) for n in numbers if (values := psnrs(arm, n, "best", "B100"))]
        x = [n * 1.04 ** (i - 1.5) for n, _ in points]  # side by side, so that the bars stay apart
        means, deviations = zip(*((np.mean(y), np.std(y, ddof=1) if len(y) > 1 else 0) for _, y in points))
        axes.errorbar(x, means, deviations, label=LABELS[arm], marker="o", markersize=4, capsize=3)
    axes.set(xscale="log", xlim=(1.6, 1100), xticks=numbers, xticklabels=numbers, xlabel="training images",
             ylabel="PSNR on B100, dB (mean ± standard deviation)")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / "few_images.png", dpi=150)


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=" ".join([*STUDIES, "E"]))
    parser.add_argument("--data", type=Path, default=Path(), metavar="DIR", help="[.]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time [one a core]")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--over", choices=LABELS.values(), metavar="ARM",
                        help="the arm that the others are compared with [KD; F: DUKD]")
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    if unknown := {*options.studies} - {*STUDIES, "E"}:
        parser.error(f"unknown studies: {' '.join(unknown)}")
    place = options.data.resolve()
    os.chdir(ROOT)
    for study in options.studies:
        if study != "E" and not options.report:
            run(study, place, options.jobs)
        print(f"\n{study}", *(robustness() if study == "E" else table(study, options.over)), sep="\n")
    if options.plot:
        plot()


if __name__ == "__main__":
    main()
