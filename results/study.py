"""Runs the studies of results/README.md: trains students, scores them, prints what came out.

    python results/study.py L M --data DIR    DIR holds train/, highres/, Set5/, Set14/ and B100/
    python results/study.py L M --report      prints the tables of the runs that are there
    python results/study.py L --report --over zoom-in    compares with another arm than KD
    python results/study.py --runs runs/*     a line of Markdown for each run folder of yours
    python results/study.py --plot            draws results/gains.png from the records (needs matplotlib)

A run that has its record in results/study_*.json is skipped. A run that was stopped goes on.
"""
import argparse
import concurrent.futures
import csv
import functools
import glob
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import scipy.stats

RESULTS = Path(__file__).resolve().parent
ROOT, RUNS = RESULTS.parent, Path("runs/study")
sys.path.insert(0, str(ROOT))
import data  # noqa: E402 (the project's)
import evaluate  # noqa: E402
import models  # noqa: E402

FIXED = "--steps 600 --batch 4 --patch 48 --lr 5e-4 --schedule cosine"

# The arms: by its label, the flags that follow FIXED. Where both name a flag, the arm's counts.
# START makes the student that the other arms of its seed and images go on from.
START = "the start"
TERMS = {
    START: "--method scratch --steps 4000 --patch 24 --lr 1e-3",
    "KD": "--method kd",
    "scratch": "--method scratch",
    "zoom_out_rec alone": "--method scratch --lambda-zoom-out-rec 1",
    "KD, λ_rec 5": "--method kd --lambda-rec 5",
    "zoom-in": "--method zoom_in",
    "zoom-out": "--method kd --lambda-zoom-out 1 --lambda-zoom-out-rec 1",
    "zoom-out without zoom_out_rec": "--method kd --lambda-zoom-out 1",
    "DUKD": "--method dukd",
    "DUKD without zoom_out_rec": "--method dukd --lambda-zoom-out-rec 0",
    "DUKD, released weights": "--method dukd --lambda-rec 5 --lambda-zoom-in .5 --lambda-zoom-out .5 "
                              "--lambda-zoom-out-rec 2.5",
}
STARTS = {name: f"the start of {name}" for name in "PQR"}  # made where the other runs of a study are made
ARMS = TERMS | {label: TERMS[START] for label in STARTS.values()}
ARMS["zoom-in, half the pairs"] = "--method zoom_in --batch 2"
ARMS["zoom-in, a quarter of the pairs"] = "--method zoom_in --batch 1 --crops 3"


def lasting(arm, steps, study=""):
    """The label of an arm that takes so many steps, which becomes one of ARMS. Q and R have labels of their
    own, since they make their own KD."""
    label = f"{study} {arm}, {steps:,} steps".strip()
    ARMS[label] = f"{ARMS[arm]} --steps {steps}"
    return label


# The training images: so many small photographs, or all large ones, as they are or reduced to a quarter.
ALL, LARGE, REDUCED = 881, "2K", "2K reduced"


def grid(arms, sets, seeds):
    """The runs of a study, (arm, training images, seed): all arms of a seed before the next seed."""
    return [(arm, n, seed) for seed in range(seeds) for arm in arms for n in sets]


def of_each_length(lengths, seeds):
    """KD and zoom-in for all lengths [(training images, steps)] of a seed before the next seed."""
    return [run for seed in range(seeds) for n, steps in lengths
            for run in ((lasting("KD", steps), n, seed), (lasting("zoom-in", steps), n, seed))]


def of_equal_time(study, n, arms, seed=0):
    """The runs of study Q or R with n training images. arms: [(arm, steps)]."""
    return [(lasting(arm, steps, study), n, seed) for arm, steps in arms]


HALF, QUARTER = "zoom-in, half the pairs", "zoom-in, a quarter of the pairs"
BOLD = [("KD", 2400), (HALF, 2400), ("KD", 4800)]  # zoom-in for 2,400 steps takes KD's time for 4,800
FULL = [(QUARTER, 2400), ("scratch", 2400), ("DUKD", 2400)]
SHORT = [("KD", 600), (HALF, 600), ("KD", 1200)]
MAIN = [START, "scratch", "KD", "zoom-in", "DUKD"]
FEW = [(128, 2400), (8, 150), (32, 600), (8, 600), (128, 600), (32, 150), (32, 2400), (8, 2400), (128, 150)]
MANY = [(ALL, 600), (ALL, 4100), (ALL, 10_000)]
STUDIES = {
    "L": grid(TERMS, [ALL, LARGE], 2),
    "M": grid(["KD", "zoom-in", "zoom-out", "zoom-out without zoom_out_rec"], [LARGE, REDUCED], 2),
    "N": grid(MAIN, [ALL, LARGE], 2) + grid(MAIN, [2, 8, 32, 128], 3),
    "O": grid([lasting(arm, 3000) for arm in ("KD", "zoom-in", "DUKD")], [LARGE], 1),
    "P": grid([STARTS["P"]], [128, 8, 32], 3) + grid([STARTS["P"]], [ALL], 2)
    + of_each_length(FEW + MANY, 2) + of_each_length(FEW, 3)[-2 * len(FEW):]
    + [(lasting("DUKD", steps), n, 1) for n, steps in ((128, 2400), (ALL, 10_000))],
    "Q": of_equal_time("Q", ALL, [("KD", 20_000)])  # the longest first
    + of_equal_time("Q", 8, [*BOLD, ("zoom-in", 2400)]) + of_equal_time("Q", 128, [*BOLD, ("zoom-in", 2400)])
    + of_equal_time("Q", ALL, [("KD", 10_000), (HALF, 10_000)])
    + of_equal_time("Q", 8, FULL) + of_equal_time("Q", 128, FULL)
    + of_equal_time("Q", 8, SHORT) + of_equal_time("Q", 128, SHORT) + of_equal_time("Q", 32, BOLD)
    + of_equal_time("Q", 8, [*BOLD, ("zoom-in", 2400), *FULL], 1)
    + of_equal_time("Q", 128, [*BOLD, ("zoom-in", 2400), *FULL], 1)
    + of_equal_time("Q", ALL, [("zoom-in", 10_000), (HALF, 20_000), ("scratch", 10_000), ("DUKD", 10_000)]),
    "R": of_equal_time("R", 128, [("KD", 2400), ("zoom-in", 2400), (HALF, 2400), ("scratch", 2400),
                                  ("DUKD", 2400)]),
}
TEACHERS = {"R": "DCTLSA_x4.pt"}  # of a study, else edsr_baseline.pt; others lie in --data


def folder(arm, n, seed):
    return RUNS / f"{re.sub('[^a-z0-9]+', '_', arm.lower()).strip('_')}_n{n}_s{seed}".replace(" ", "_")


def prepare(place):
    """Puts the held-out images and the reduced ones into RUNS. Returns the other small photographs."""
    if not (place / "train").is_dir() or not (place / "highres").is_dir():
        raise models.InputError(f"{place} has no train/ or no highres/: --data names a folder that has them")
    held_names = json.loads((RESULTS / "edsr_baseline.json").read_text())["training"]["held_out"]
    images = sorted((place / "train").iterdir())
    held = [path for path in images if path.stem in held_names]
    pool = [path for path in images if path not in held]
    if (len(held), len(pool)) != (16, ALL):
        raise models.InputError(f"{place}/train has {len(held)} of 16 held-out images and {len(pool)} others")
    copy(held, RUNS / "held")
    (RUNS / "reduced").mkdir(exist_ok=True)
    for path in sorted((place / "highres").iterdir()):
        target = RUNS / "reduced" / f"{path.stem}.png"
        if not target.exists():
            iio.imwrite(target, data.imresize(data.read_image(path), 1 / 4))
    return pool


def copy(paths, target):
    """Copies the files that a folder lacks."""
    target.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if not (target / path.name).exists():
            shutil.copy(path, target)


def training_images(n, seed, pool, place):
    """The folder of a run's training images. Of the small ones, a larger n keeps those of a smaller n."""
    if n in (LARGE, REDUCED):
        return place / "highres" if n == LARGE else RUNS / "reduced"
    target = RUNS / f"images_n{n}_s{seed}"
    copy(random.Random(seed).sample(pool, ALL)[:n], target)
    return target


def call(log, program, *words):
    """Runs one of the project's programs in one thread. What it prints is added to the file `log`."""
    with open(log, "a") as out:
        subprocess.run([sys.executable, ROOT / program, *map(str, words)], check=True, stdout=out, stderr=out,
                       env=os.environ | dict(OMP_NUM_THREADS="1"))


def train_and_score(arm, n, seed, started, teacher, images, place):
    """One run: its record for the JSON. started: the future of the start that it goes on from, or None."""
    out = folder(arm, n, seed)
    student = "edsr_c32b16"  # the small student of edsr_baseline.pt
    words = shlex.split(f"--student {student} {FIXED} {ARMS[arm]} --seed {seed} --val {RUNS}/held")
    words += ["--cache", f"{RUNS}/cache", "--out", str(out), "--teacher", str(teacher)]
    if started:
        words += ["--init", str(started.result() / "best.pt")]
    words += ["--data", str(images)]
    resumed, began = (out / "last.ckpt").exists(), time.time()
    call(f"{out}.log", "train.py", *(["--resume", out] if resumed else words))
    seconds = time.time() - began
    about = json.loads((out / "config.json").read_text())
    rows = list(csv.DictReader(open(out / "log.csv")))
    held_out = [(int(row["step"]), float(row["val_psnr"])) for row in rows if row["val_psnr"]]
    best, end = max(held_out, key=lambda point: point[1]), held_out[-1]
    command = shlex.join(["python", "train.py", *words[:-1], "DIR"]).replace(f"{place}/", "DIR/")
    record = dict(arm=arm, n=n, seed=seed, command=command,
                  images=sorted(path.stem for path in images.iterdir()) if n in (2, 8) else None,
                  precision=about["settings"]["precision"],
                  held_out_by_step=held_out, seconds=None if resumed else round(seconds),
                  **{key: about[key] for key in ("git", "versions", "device_name", "started")})
    record["best"] = score(out, "best.pt", best, teacher, place)
    record["end"] = record["best"] if best == end else score(out, "student.pt", end, teacher, place)
    return record


def score(out, file, point, teacher, place):
    """A checkpoint's step, its held-out PSNR, its scores on the test sets, and B100 against the teacher."""
    sets = [place / name for name in ("Set5", "Set14", "B100")]
    scores, = table_of(out, file, "--data", *sets).values()
    to_teacher, = table_of(out, file, "--data", sets[-1], "--against", teacher).values()
    return dict(step=point[0], held_out=point[1], **scores, to_teacher=to_teacher["B100"])


def table_of(out, file, *words):
    """{model: {set: PSNR and SSIM}} of a file in a run folder and of other models, from evaluate.py."""
    call(f"{out}.log", "evaluate.py", out / file, *words, "--json", out / "table.json")
    results = json.loads((out / "table.json").read_text())["results"]
    return {model: {Path(place).name: dict(psnr=scores["psnr"], ssim=scores["ssim"])
                    for place, scores in row.items()}
            for model, row in results.items()}


@functools.cache
def records():
    """All records so far: {(arm, n, seed): record}."""
    files = [RESULTS / f"study_{name}.json" for name in STUDIES]
    found = [json.loads(path.read_text()) for path in files if path.exists()]
    return {(r["arm"], r["n"], r["seed"]): r for part in found for r in part}


def run(study, place, seeds, jobs):
    """Makes the runs of a study that have no record yet, `jobs` at a time, in the order of STUDIES. A start
    is made before the first run that goes on from it."""
    pool, start = prepare(place), STARTS.get(study, START)
    teacher = place / TEACHERS[study] if study in TEACHERS else Path("edsr_baseline.pt")
    missing = [one for one in STUDIES[study] if one not in records() and one[2] < seeds]
    print(f"{study}: {len(missing)} runs to make", flush=True)
    executor = concurrent.futures.ThreadPoolExecutor(jobs)
    starts, tasks = {}, []  # starts: the futures of their folders
    for arm, n, seed in missing:
        about = (teacher, training_images(n, seed, pool, place), place)
        if (n, seed) not in starts:
            starts[n, seed] = executor.submit(make_start, study, start, n, seed, *about)
        if arm != start:
            tasks.append(executor.submit(make, study, arm, n, seed, starts[n, seed], *about))
    try:
        for task in concurrent.futures.as_completed([*starts.values(), *tasks]):
            task.result()
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
    finally:
        executor.shutdown(cancel_futures=True)  # after a signal or an error no further run begins


def make(study, *about):
    """Makes a run, and writes its record."""
    write_down(train_and_score(*about), RESULTS / f"study_{study}.json")


def make_start(study, start, n, seed, *about):
    """Makes a start where its record or its folder is missing. Returns the folder."""
    if (start, n, seed) not in records() or not (folder(start, n, seed) / "best.pt").exists():
        make(study, start, n, seed, None, *about)
    return folder(start, n, seed)


WRITING = threading.Lock()


def write_down(record, file):
    """Adds the record of a run to a study's JSON, in the place of an earlier one of the same run."""
    with WRITING:
        earlier = json.loads(file.read_text()) if file.exists() else []
        others = [r for r in earlier if any(r[key] != record[key] for key in ("arm", "n", "seed"))]
        file.write_text(json.dumps([*others, record], indent=1))
        records.cache_clear()
    print(f"{record['arm']}, n = {record['n']}, seed {record['seed']}: held out "
          f"{record['best']['held_out']:.2f}, B100 {record['best']['B100']['psnr']:.3f}", flush=True)


def psnrs(arm, n, when, where):
    """{seed: PSNR} of the runs of an arm. when: best or end. where: held_out, to_teacher or a test set."""
    return {seed: r[when][where] if where == "held_out" else r[when][where]["psnr"]
            for (a, m, seed), r in records().items() if (a, m) == (arm, n)}


def spread(values, digits=2):
    """The mean of the values, and their standard deviation where there are several."""
    numbers = [np.mean(values), np.std(values, ddof=1)] if len(values) > 1 else values
    return " ± ".join(f"{number:.{digits}f}" for number in numbers)


def differences(arm, reference, n):
    """B100 of an arm's best checkpoints minus those of another, for each seed that both have: {seed: dB}."""
    ours, theirs = (psnrs(a, n, "best", "B100") for a in (arm, reference))
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours) if seed in theirs}


def gain(arm, reference, n):
    """The mean of these differences with its 95 % t-interval, as text."""
    values = [*differences(arm, reference, n).values()]
    if arm == reference or not values:
        return "–"
    mean = np.mean(values)
    if len(values) == 1:
        return f"{mean:+.3f}"
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def parts_of(arm):
    """("Q ", "zoom-in", 2400) of "Q zoom-in, 2,400 steps": the study (where named), the method, the steps."""
    study, method, steps = re.fullmatch(r"([QR] )?(.+?)(?:, ([\d,]+) steps)?", arm).groups()
    return study or "", method, int(steps.replace(",", "")) if steps else None


TIME = {"scratch": 0.64, "zoom-in": 2, "DUKD": 2}  # of a step, in KD's; with half or a quarter of the pairs 1


def rival(arm, method="KD", equal_time=False):
    """The arm with which another is compared: that method for as many steps, or for as much time."""
    study, own, steps = parts_of(arm)
    if equal_time:
        steps = round(TIME.get(own, 1) * steps)
    return f"{study}{method}, {steps:,} steps" if steps else method


def table(study, over="KD"):
    """The lines of a study's table, in Markdown. Scores: mean ± standard deviation over the seeds.
    Differences are to the arm with the label `over`, of as many steps; in Q and R also of as much time."""
    timed = study in ("Q", "R")
    columns = f"B100 over {over} of as many steps | of as much time" if timed else f"B100 over {over}"
    yield f"| images | method | seeds | held out | Set5 | Set14 | B100 | {columns} | to the teacher |"
    yield "|---" * (10 if timed else 9) + "|"
    runs = STUDIES[study]
    for n in dict.fromkeys(n for _, n, _ in runs):
        for arm in dict.fromkeys(arm for arm, m, _ in runs if m == n):
            held, set5, set14, b100, to_teacher = (
                list(psnrs(arm, n, "best", where).values())
                for where in ("held_out", "Set5", "Set14", "B100", "to_teacher"))
            if held:
                scores = [spread(held), spread(set5), spread(set14), spread(b100, 3)]
                scores.append(gain(arm, rival(arm, over), n))
                if timed:
                    scores.append(gain(arm, rival(arm, over, equal_time=True), n))
                yield f"| {n} | {arm} | {len(held)} | {' | '.join(scores)} | {spread(to_teacher)} |"


# The README's rows: label, arm, its share of 2,400 or 10,000 steps.
PAYS = [("scratch", "scratch", 1), ("KD", "KD", 1), ("KD for twice the steps", "KD", 2),
        ("zoom-in, half the pairs", HALF, 1), ("zoom-in", "zoom-in", 1), ("DUKD", "DUKD", 1)]


def pays():
    """The lines of the README's table: B100 and Set5 of each method after its time, by study Q."""
    sets = ((8, 2400), (128, 2400), (ALL, 10_000))  # photographs, KD's steps
    heads = [f"{n} photographs: B100 | Set5" for n, _ in sets]
    yield f"| method | time | {' | '.join(heads)} |"
    yield "|---" * (2 + 2 * len(sets)) + "|"
    rows = json.loads((RESULTS / "edsr_baseline.json").read_text())["evaluation"]["results"]
    for label, file in (("bicubic", "bicubic"), ("the teacher, `edsr_baseline.pt`", "edsr_baseline.pt")):
        b100, set5 = rows[file]["B100"]["psnr"], rows[file]["Set5"]["psnr"]
        yield f"| {label} | – |" + f" {b100:.3f} | {set5:.2f} |" * len(sets)
    for label, arm, share in PAYS:
        cells = []
        for n, steps in sets:
            for name, digits in (("B100", 3), ("Set5", 2)):
                found = [*psnrs(lasting(arm, share * steps, "Q"), n, "best", name).values()]
                cells.append(spread(found, digits) if found else "–")
        yield f"| {label} | {share * TIME.get(arm, 1):.1g} | {' | '.join(cells)} |"


def runs_table(folders):
    """The lines of a table of run folders: the settings in which they differ, and their held-out PSNR."""
    runs = []  # (settings, log's rows, held-out PSNR)
    for folder in folders:
        try:
            settings = json.loads((folder / "config.json").read_text())["settings"]
            rows = list(csv.DictReader(open(folder / "log.csv")))
            scores = [float(row["val_psnr"]) for row in rows if row["val_psnr"]]
            runs.append((dict(settings, run=folder), rows, scores))
        except (OSError, ValueError, LookupError, TypeError):  # a log that Excel has saved has other columns
            print(f"note: {folder} is no run, or one of another version, and is passed over", file=sys.stderr)
    names = dict.fromkeys(name for settings, _, _ in runs for name in settings)
    names = [name for name in names if name not in ("run", "out", "resume", "device", "cache", "val_every")
             and len({str(settings.get(name)) for settings, _, _ in runs}) > 1]
    yield f"| {' | '.join(['run', *names, 'step', 'held-out PSNR: best, last'])} |"
    yield "|---" * (len(names) + 3) + "|"
    for settings, rows, scores in runs:
        found = f"{max(scores):.2f}, {scores[-1]:.2f}" if scores else "none yet"
        cells = [*(settings.get(name) for name in ("run", *names)), rows[-1]["step"] if rows else 0, found]
        yield f"| {' | '.join(map(str, cells))} |"


def steps_of(arm):
    """How many steps an arm takes."""
    return parts_of(arm)[2] or 600


LR_PIXELS = {LARGE: 50 * 171_926, REDUCED: 50 * 10_745}


def epochs(arm, n):
    """How often each LR pixel of a set is seen, on average, in batches of four 48×48 patches."""
    pixels = LR_PIXELS[n] if n in LR_PIXELS else 6681 * n  # a small photograph's, on average
    return steps_of(arm) * 4 * 48 ** 2 / pixels


def lasting_pairs(studies):
    """(arm, KD of its length, images) of zoom-in in some studies."""
    pairs = {(arm, n) for study in studies for arm, n, _ in STUDIES[study] if arm.startswith("zoom-in")}
    pairs = sorted(pairs, key=lambda pair: (epochs(*pair), steps_of(pair[0])))
    return [(arm, arm.replace("zoom-in", "KD"), n) for arm, n in pairs]


def gap(arm, n, seed):
    """PSNR over bicubic on 16 of a student's training pictures, minus the same on the held-out ones, dB."""
    pictures = records()[arm, n, seed]["pictures"]
    trained_on, held = (pictures["best"][k] - pictures["bicubic"][k] for k in ("trained_on", "held"))
    return trained_on - held


def fit_of_p():
    """The lines of study P's points, and of its fit with 95 % t-intervals: of all seeds, and of each."""
    yield "| images | steps | epochs | gain of zoom-in over KD | room: teacher − KD | KD's gap |"
    yield "|---|---|---|---|---|---|"
    evaluation = json.loads((RESULTS / "edsr_baseline.json").read_text())["evaluation"]
    teacher = evaluation["results"]["edsr_baseline.pt"]["B100"]["psnr"]
    for arm, kd, n in lasting_pairs(["P"]):
        if differences(arm, kd, n):
            room = teacher - np.mean(list(psnrs(kd, n, "best", "B100").values()))
            gaps = [gap(kd, n, seed) for seed in psnrs(kd, n, "best", "B100")
                    if "pictures" in records()[kd, n, seed]]  # since commit 48f6419, records have none
            yield (f"| {n} | {steps_of(arm):,} | {epochs(arm, n):.3g} | {gain(arm, kd, n)} | {room:.3f} | "
                   f"{spread(gaps, 3) if gaps else '–'} |")
    points = [(n, steps_of(arm), seed, value) for arm, kd, n in lasting_pairs(["P"]) if n != ALL
              for seed, value in differences(arm, kd, n).items()]
    seeds = sorted({seed for _, _, seed, _ in points})
    yield "\n| gain = a + b·log n + c·log steps | points | b (log n) | c (log steps) | b + c |"
    yield "|---|---|---|---|---|"
    for label, chosen in [("all seeds", seeds), *[(f"seed {seed}", [seed]) for seed in seeds]]:
        n, steps, gains = np.array([(n, steps, y) for n, steps, seed, y in points if seed in chosen]).T
        x = np.stack([np.ones(len(n)), np.log(n), np.log(steps)], axis=1)
        free = len(n) - 3  # degrees of freedom
        if free < 1:
            continue
        found, (squares,), *_ = np.linalg.lstsq(x, gains, rcond=None)
        covariance = np.linalg.inv(x.T @ x) * squares / free
        cells = []
        for sum_of in ([0, 1, 0], [0, 0, 1], [0, 1, 1]):
            value = sum_of @ found
            half = scipy.stats.t.ppf(0.975, free) * np.sqrt(sum_of @ covariance @ sum_of)
            cells.append(f"{value:+.4f} [{value - half:+.4f}, {value + half:+.4f}]")
        yield f"| {label} | {len(n)} | {' | '.join(cells)} |"


# What --plot draws at the right: a set of images, its label, its marker and its height.
SETS = [(ALL, "881 photographs of 0.1 megapixels", "o", 0.2),
        (LARGE, "50 photographs of 2.8 megapixels", "s", 0),
        (REDUCED, "the same 50, reduced to a quarter", "D", -0.2)]


UPCYCLING = {HALF: "o", QUARTER: "s", "zoom-in": "^"}  # Q's and R's arms of zoom-in, with their markers


def plot():
    """results/gains.png. At the left what zoom-in gains over KD of the same time on B100, against KD's epochs
    in that time; at the right what each loss gains on three sets, at equal steps. A dot a seed."""
    try:
        import matplotlib
    except ImportError:
        raise models.InputError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    colors = {n: f"C{i}" for i, n in enumerate((2, 8, 32, 128, ALL, LARGE))}
    for arm, kd, n in lasting_pairs(["P"]):
        for y in differences(arm, kd, n).values():
            left.plot(epochs(arm, n), y, "x", color=colors[n], alpha=0.35)
    for study in ("Q", "R"):
        for arm, n in dict.fromkeys((arm, n) for arm, n, _ in STUDIES[study]):
            method, kd = parts_of(arm)[1], rival(arm, equal_time=True)
            for y in differences(arm, kd, n).values() if method in UPCYCLING else ():
                face = colors[n] if study == "Q" else "none"
                left.plot(epochs(kd, n), y, UPCYCLING[method], color=colors[n], markerfacecolor=face,
                          markersize=8)
    for n in (8, 32, 128, ALL):
        left.plot([], [], "-", color=colors[n], label=f"{n} photographs")
    for method, marker in UPCYCLING.items():
        left.plot([], [], marker, color="gray", label=method if method != "zoom-in" else "zoom-in, all pairs")
    if psnrs(lasting("KD", 2400, "R"), 128, "best", "B100"):
        left.plot([], [], "o", color="gray", markerfacecolor="none", label="another teacher (study R)")
    left.plot([], [], "x", color="gray", alpha=0.5, label="at equal steps: twice KD's time (study P)")
    left.axvline(64, color="gray", linestyle=":")
    left.text(64, 0.95 * left.get_ylim()[1], " the paper", va="top", color="gray")
    left.axhline(0, color="gray", linewidth=1)
    left.set_xscale("log")
    left.set(xlabel="epochs of KD in the same time", ylabel="gain over KD of the same time on B100, dB")
    arms = [arm for arm in reversed(TERMS) if arm not in (START, "KD")]
    for n, label, marker, height in SETS:
        points = [(value, i + height) for i, arm in enumerate(arms)
                  for value in differences(arm, "KD", n).values()]
        right.plot(*zip(*points), marker, label=label, markersize=5)
    right.axvline(0, color="gray", linewidth=1)
    right.set(yticks=range(len(arms)), yticklabels=arms, xlabel="each loss: PSNR over KD on B100, dB")
    right.locator_params("x", nbins=5)
    for axes, columns in ((left, 2), (right, 1)):
        axes.grid(alpha=0.3)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, ncols=columns)
    figure.savefig(RESULTS / "gains.png", dpi=130)


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = evaluate.Parser(description=__doc__, formatter_class=layout)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=" ".join(STUDIES))
    parser.add_argument("--data", type=Path, default=Path(), metavar="DIR", help="[.]")
    parser.add_argument("--seeds", type=int, default=9, metavar="N", help="only seeds below N")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time [one a core]")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--over", choices=TERMS, default="KD", metavar="ARM",
                        help="the arm that the others are compared with [KD]")
    parser.add_argument("--runs", nargs="+", default=[], metavar="DIR", help="tabulate these runs")
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    if {*options.studies} - {*STUDIES} or not (options.studies or options.runs or options.plot):
        parser.error(f"name studies ({' '.join(STUDIES)}), --runs or --plot")
    if options.runs:  # Windows does not expand a pattern
        folders = []
        for name in map(os.path.expanduser, options.runs):
            found = [name] if os.path.exists(name) else sorted(glob.glob(name))
            if not found:
                raise models.InputError(f"no folder is named {name}")
            folders += map(Path, found)
        print(*runs_table(folders), sep="\n")
    place = options.data.expanduser().resolve()
    os.chdir(ROOT)
    for study in options.studies:
        if not options.report:
            run(study, place, options.seeds, options.jobs)
        print(f"\n{study}", *table(study, options.over), sep="\n")
        if study == "Q":
            print("", *pays(), sep="\n")
        if study == "P":
            print("", *fit_of_p(), sep="\n")
    if options.plot:
        plot()


if __name__ == "__main__":
    with evaluate.command_line():
        main()
