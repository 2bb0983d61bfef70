"""Times training steps by a few steps of train.py each, one after the other in one process.

    python results/step_times.py edsr_baseline,dukd edsr_baseline,kd         two methods
    python results/step_times.py rcan,dukd,graph rcan,dukd,no --json FILE    on CUDA: recorded, and plain
    python results/step_times.py edsr_baseline,dukd --rounds 3 -- --batch 2  three turns; train.py's flags
    python results/step_times.py edsr_baseline,dukd,blocks --profile         where the time of a step goes

A case is TEACHER,METHOD or TEACHER,METHOD,COMPILE, as train.py names them. Other teachers than edsr_baseline
get random weights. The student is `small`. Prints a line of JSON a case, with the median of log.csv's ms, and
the most memory that the process has taken so far (Linux).
"""
import argparse
import csv
import json
import resource
import statistics
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from torch.profiler import profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402 (the project's)
import models  # noqa: E402
import train  # noqa: E402


def settings(case, folder, steps, more):
    """train.py's settings of a case."""
    teacher, method, compiled = (case + ",graph").split(",")[:3]
    file = ROOT / "edsr_baseline.pt"
    if teacher != "edsr_baseline":
        file = folder / "teacher.pt"
        models.save(file, models.build(teacher, 4))
    words = ["--teacher", file, "--student", "small", "--method", method, "--compile", compiled,
             "--steps", steps, "--val-every", steps, "--out", folder / "run", *more]
    return train.parse([str(word) for word in words])


def time_steps(case, steps, more):
    """The line of JSON of a case."""
    with tempfile.TemporaryDirectory() as folder:
        run, out = train.train(settings(case, Path(folder), steps, more), f"results/step_times.py {case}")
        about = json.loads((out / "config.json").read_text())
        rows = list(csv.DictReader(open(out / "log.csv")))
    timed = rows[1:-1] or rows  # the first warms up; the last may be of few steps
    return dict(case=case, ms=round(statistics.median(float(row["ms"]) for row in timed), 2),
                batch=run.args.batch, patch=run.args.patch, precision=run.precision,
                peak_ram_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, 2),
                peak_gpu_gib=round(torch.cuda.max_memory_allocated() / 2 ** 30, 2),
                **{key: about[key] for key in about if key not in ("settings", "identity")})


def profile_steps(case, more):
    """Prints the operations of three steps, the longest first."""
    with tempfile.TemporaryDirectory() as folder:
        run = train.Run(settings(case, Path(folder), 3, more))
        step = train.fast_step(run, run.patches[0])
        kind = run.device.type
        with profile() as found:
            for number in range(3):
                step(*run.patches[number])
            if kind == "cuda":
                torch.cuda.synchronize()
    averages = found.key_averages()
    print(averages.table(sort_by=f"self_{kind}_time_total", row_limit=20, max_name_column_width=80))


def main():
    parser = evaluate.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="CASE")
    parser.add_argument("--steps", type=int, default=60, help="steps of a case [60]")
    parser.add_argument("--rounds", type=int, default=1, help="times that the cases take turns [1]")
    parser.add_argument("--json", metavar="FILE", help="adds the lines to this file")
    parser.add_argument("--profile", action="store_true")
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    options, more = parser.parse_args(words[:split]), words[split + 1:]
    failed = False
    for case in options.cases * options.rounds:
        try:
            torch.compiler.reset()
            if options.profile:
                profile_steps(case, more)
                continue
            line = json.dumps(time_steps(case, options.steps, more))
        except Exception:  # the next case may work
            traceback.print_exc()
            failed = True
            continue
        print(line, flush=True)
        if options.json:
            with open(options.json, "a") as file:
                print(line, file=file)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    with evaluate.command_line():
        main()
