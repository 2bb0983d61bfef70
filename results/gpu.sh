#!/usr/bin/env bash
# Measures the project on a GPU, in ten minutes. From the repository's root, in its environment:
#   bash results/gpu.sh check             the GPU tests, one step of edsr_baseline to small, where its time goes
#   bash results/gpu.sh train DIR SET…    students at the paper's patch and batch of the pictures in DIR (6 minutes)
#   bash results/gpu.sh times             one step of the other pairs, compiled and plain
# Writes results/gpu_*.json, or to another folder OUT. STEPS: of each student. TINY=1 tries all of it on a CPU.
set -u
root=$PWD OUT=$(realpath -m "${OUT:-results}") STEPS=${STEPS:-12000} TINY=${TINY:-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$OUT"

teacher() {  # name: a teacher of that size, for timing: the included one, or random weights
  case $1 in
    edsr_baseline) cp edsr_baseline.pt "$work/$1.pt" ;;
    *) python -c "import models; models.save('$work/$1.pt', models.build('${TINY:+edsr_c8b1}' or '$1', 4))" ;;
  esac
}

step() {  # teacher, flags: the time of one training step, as one line of JSON
  local name small=()
  name=gpu_step_$(tr -c 'a-z0-9\n' _ <<<"$*")
  [ "$TINY" ] && small=(--batch 1 --patch 12)
  [ -e "$work/$1.pt" ] || teacher "$1"
  python train.py --teacher "$work/$1.pt" --student small --bench 50 "${small[@]}" "${@:2}" >"$OUT/$name.json" 2>"$work/log"
  tr '\r' '\n' <"$work/log" | grep -E '^(note|error)'
  echo "$*: $(grep -oE '"(ms_per_step|warm_up_s|peak_memory_gib)": [^,]*' "$OUT/$name.json" | paste -sd ' ')"
}

profile() {  # the operations of three steps, the longest first. nn.PixelShuffle returns NCHW: nchwToNhwc is its price
  python - "${TINY:+--device=cpu}" <<'END'
import sys, torch, train
from torch.profiler import profile
words = "--teacher edsr_baseline.pt --out /nowhere".split() + [word for word in sys.argv[1:] if word]
words += ["--batch=1"] if len(sys.argv[1]) else []
run = train.Run(train.parse(words))
train.accelerate(run)
steps = lambda n: [run.forward_backward(*train.draw_patches(run.patches, run.c, i)) for i in range(n)]
steps(3)
with profile() as found:
    steps(3)
    torch.cuda.is_available() and torch.cuda.synchronize()
kind = "cuda" if torch.cuda.is_available() else "cpu"
print(found.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=20, max_name_column_width=80))
END
}

check() {
  nvidia-smi -L
  python -m pytest -q -rfE --tb=short tests -k "gpu or cuda"
  step edsr_baseline
  step edsr_baseline --no-compile
  profile
}

times() {
  for pair in edsr rcan swinir; do step $pair; done
  step edsr_baseline --method kd
  step edsr_baseline --method scratch
  for pair in edsr rcan swinir; do step $pair --no-compile; done
}

train() {  # folder of training pictures, test sets
  local size=(--student small) sets=() students=() arm flags place
  for place in "${@:2}"; do sets+=("$(realpath "$place")"); done
  [ "$TINY" ] && size=(--student edsr_c8b1 --batch 1 --patch 12) STEPS=4
  while read -r arm flags; do
    students+=("$arm/student.pt")
    # shellcheck disable=SC2086
    python train.py --teacher edsr_baseline.pt "${size[@]}" --steps "$STEPS" --lr 5e-4 --schedule cosine \
      --val-every $((STEPS / 4)) --data "$1" --cache "$work/cache_$arm" --out "$work/$arm" $flags >"$work/$arm.log" 2>&1 &
  done <<'END'
scratch --method scratch
kd --method kd
zoom_in --no-zoom-out
dukd --method dukd
dukd_without_zoom_out_rec --no-zoom-out-rec
dukd_released --method dukd_released
END
  wait
  tail -qn 2 "$work"/*.log
  [ $# -gt 1 ] && cd "$work" && python "$root/evaluate.py" "${students[@]}" --data "${sets[@]}" --json "$OUT/gpu_students.json"
}

"$@"
