#!/usr/bin/env bash
# Measures the project on a GPU. From the repository's root, in its environment:
#   bash results/gpu.sh check            a step of four methods, then the GPU tests of EDSR (3 minutes)
#   bash results/gpu.sh train DIR SET…   four students of the pictures in DIR, at the paper's patch and batch, scored
#   bash results/gpu.sh times            a step of the other pairs, recorded, compiled and plain; a profile (2 minutes)
# Figures are written to OUT [results], with the logs and the best students in gpu_runs.tar.gz. Runs lie in runs/gpu:
# a call that was cut off is given again, and goes on. LIMIT: seconds of training [300]. STEPS: of each student [as
# many as LIMIT allows]. TINY=1 tries all of it on a CPU. PYTHON: the interpreter.
set -u
root=$PWD OUT=$(realpath -m "${OUT:-results}") LIMIT=${LIMIT:-300} STEPS=${STEPS:-} TINY=${TINY:-}
PYTHON=${PYTHON:-$(command -v python || command -v python3)}
runs=runs/gpu
small=() tests="gpu or cuda"
if [ "$TINY" ]; then small=(-- --batch 1 --patch 12 --student edsr_c8b1 --device cpu); fi
methods=(scratch kd zoom_in dukd)
mkdir -p "$OUT" "$runs"

limited() {  # seconds, name, command: runs it at most that long. Its output goes to a log, of which a failure shows the end
  local log=$runs/$2.log code
  timeout -k 15 "$1" "${@:3}" >>"$log" 2>&1
  code=$?
  if [ $code != 0 ]; then
    echo "exit $code after at most $1 s: ${*:3}"
    tr '\r' '\n' <"$log" | grep -v ' left' | tail -n 30  # without the progress bars
  fi
  return $code
}

steps() {  # seconds, file, flags and cases: the times of steps, in OUT/file
  limited "$1" steps "$PYTHON" results/step_times.py --json "$OUT/$2" "${@:3}" "${small[@]}"
  local code=$?
  [ -e "$OUT/$2" ] && sed -E 's/, "batch".*//' "$OUT/$2"
  return $code
}

pack() {  # what must not be lost when the machine goes
  tar czf "$OUT/gpu_runs.tar.gz" --exclude=last.ckpt --exclude=student.pt --exclude=teacher.pt --exclude='*.tmp' "$runs"
}
trap pack EXIT

check() {
  nvidia-smi -L
  steps 110 gpu_steps.jsonl "${methods[@]/#/edsr_baseline,}" || steps 60 gpu_steps.jsonl edsr_baseline,dukd,blocks
  limited 80 tests "$PYTHON" -m pytest -q -rfE --tb=short tests -k "(gpu or cuda) and not rcan and not swinir"
  tail -n 3 "$runs/tests.log"
}

times() {  # graph last: a recording that fails spoils the process
  steps 60 gpu_times.jsonl edsr_baseline,dukd,{no,blocks,graph}
  limited 40 profile "$PYTHON" results/step_times.py --profile edsr_baseline,dukd,{blocks,no} "${small[@]}"
  grep -A 12 'Self C' "$runs/profile.log"
  steps 120 gpu_times.jsonl {edsr,rcan,swinir},dukd,no {edsr,rcan,swinir},dukd,graph
  limited 120 tests "$PYTHON" -m pytest -q -rfE --tb=short tests -k "(gpu or cuda) and (rcan or swinir)"
}

train() {  # folder of training pictures, test sets
  local pictures=$1 arm students=() sets=() began=$SECONDS
  shift
  if [ ! "$STEPS" ]; then
    steps 100 gpu_steps.jsonl "${methods[@]/#/edsr_baseline,}"
    STEPS=$("$PYTHON" -c "
import json, sys
ms = {line['case']: line['ms'] for line in map(json.loads, open('$OUT/gpu_steps.jsonl'))}
print(int(0.8 * 1000 * $LIMIT / sum(ms.values())) if len(ms) >= 4 else 8000)")  # all arms share the GPU
    [ "$TINY" ] && STEPS=4
  fi
  echo "$STEPS steps each"
  for arm in "${methods[@]}"; do
    local words=(--teacher edsr_baseline.pt --method "$arm" --steps "$STEPS" --lr 5e-4 --schedule cosine
                 --val-every $((STEPS / 4)) --data "$pictures" --cache "$runs/cache" --out "$runs/$arm" "${small[@]:1}")
    [ -e "$runs/$arm/last.ckpt" ] && words=(--resume "$runs/$arm")
    OMP_NUM_THREADS=2 limited "$LIMIT" "$arm" "$PYTHON" train.py "${words[@]}" &
  done
  wait
  for arm in "${methods[@]}"; do
    tail -qn 2 "$runs/$arm.log"
    [ -e "$runs/$arm/best.pt" ] && students+=("$runs/$arm/best.pt")
  done
  pack
  for arm in "$@"; do sets+=("$(realpath "$arm")"); done
  if [ ${#sets[@]} != 0 ] && [ ${#students[@]} != 0 ]; then
    rm -f "$runs/scores.log"
    limited 60 scores "$PYTHON" evaluate.py "${students[@]}" --data "${sets[@]}" --json "$OUT/gpu_students.json"
    tr '\r' '\n' <"$runs/scores.log" | grep -E 'PSNR|best.pt'
  fi
}

"$@"
