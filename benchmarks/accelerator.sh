#!/usr/bin/env bash
# The first minutes on an accelerator: correctness, a run, speed, and where the time goes. Stops after LIMIT seconds.
# Results are written immediately, so an interrupted run keeps its earlier results.
#
#   bash benchmarks/accelerator.sh                 writes into ./accelerator-out, or into $OUT
#   TINY=1 bash benchmarks/accelerator.sh          runs the same on a CPU, with tiny sizes
#   MODEL=models/smollm2-household bash …          the run is of alfworld-smollm2 with this model, not of alfworld-tiny
#
# PYTHON names the interpreter (.venv/bin/python if there is one, else python3). Packages that it lacks may be in a
# folder on PYTHONPATH. LIMIT is the time limit of all parts together, in seconds (default 400).
#
#   doctor.json doctor.txt    findings of `doctor`, and its table; the checks of speed are left to the benchmarks
#   run.txt metrics.jsonl     the run: its output, and the numbers of each step
#   bench.jsonl bench.txt     decode and learner: a JSON line for each, and their tables
#   trace.txt                 the longest operations of a decode and an update, and the gaps between operations
#   parts.txt                 exit status and duration of each part
set -u
cd "$(dirname "$0")/.." || exit 2
ROOT=$PWD
OUT=${OUT:-$ROOT/accelerator-out}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=$ROOT/.venv/bin/python
fi
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 PYTHONIOENCODING=utf-8
export TINY=${TINY:-}
export TMPDIR=$WORK
MODEL=${MODEL:-}
if [ -n "$MODEL" ]; then
    RUN=(--preset alfworld-smollm2 --model.path "$MODEL" --train.num-steps 4 --warmstart.episodes 200 --warmstart.steps 30
        --evaluation.size 32 --evaluation.baselines False --rollout.extend-buckets 64 --rollout.windows 512)
else
    RUN=(--preset alfworld-tiny --train.num-steps 20 --evaluation.every 20 --warmstart.episodes 500 --warmstart.steps 50 --evaluation.size 32)
fi
case $TINY in
    '' | 0) LIMIT=${LIMIT:-400} SHAPE=()
        [ -n "$MODEL" ] || RUN+=(--model.dtype bfloat16) ;; # the attentions of GPUs are for 16 bits
    *) LIMIT=${LIMIT:-1800} SHAPE=(--model tiny)
        RUN+=(--warmstart.episodes 60 --warmstart.steps 4 --rollout.groups-per-step 2 --rollout.num-slots 16 --evaluation.size 8) ;;
esac

# part NAME SECONDS OUTPUT ERRORS COMMAND...: appends to both files; ends after SECONDS, or when LIMIT is reached.
part() {
    local name=$1 seconds=$2 output=$OUT/$3 errors=$OUT/$4 start=$SECONDS left=$((LIMIT - SECONDS)) status
    shift 4
    if [ "$left" -lt 5 ]; then
        echo "$name: left out, no time" | tee -a "$OUT/parts.txt"
        return
    fi
    [ "$seconds" -gt "$left" ] && seconds=$left
    [ -n "$TINY" ] && seconds=$left
    timeout -k 10 "$seconds" "$@" >>"$output" 2>>"$errors"
    status=$?
    echo "$name: exit status $status after $((SECONDS - start)) s$([ $status = 124 ] && echo ' (cut off)')" | tee -a "$OUT/parts.txt"
}

for file in doctor.json doctor.txt bench.jsonl bench.txt trace.txt run.txt metrics.jsonl parts.txt; do
    : >"$OUT/$file"
done
{ date -u; uname -srm; nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader; } >>"$OUT/parts.txt" 2>/dev/null

# Doctor and the run mostly compile, and neither is timed, so they share the device.
# The checks of the device's own kernels come first.
CHECKS=$("$PYTHON" - <<'END'
from aem_jax.doctor.finding import CHECKS
first = ["versions", "devices", "memory", *(name for name in CHECKS if name.startswith("attention-")), "parity-bfloat16"]
print(*dict.fromkeys([*first, *(name for name, check in CHECKS.items() if not check.startswith("speed:"))]))
END
)
XLA_PYTHON_CLIENT_MEM_FRACTION=.45 part run 175 run.txt run.txt "$PYTHON" -m aem_jax.launch "${RUN[@]}" --runs-dir "$WORK/runs" --name run &
# shellcheck disable=SC2086  # a list of words
XLA_PYTHON_CLIENT_MEM_FRACTION=.45 part doctor 175 doctor.json doctor.txt "$PYTHON" -m aem_jax.launch doctor $CHECKS --json \
    --runs-dir "$WORK/runs" "${SHAPE[@]}"
wait
cp "$WORK/runs/run/metrics.jsonl" "$OUT/metrics.jsonl" 2>/dev/null
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}
part decode $(((LIMIT - SECONDS) * 2 / 5)) bench.jsonl bench.txt "$PYTHON" -m benchmarks.accelerator decode
part learner $(((LIMIT - SECONDS) * 2 / 3)) bench.jsonl bench.txt "$PYTHON" -m benchmarks.accelerator learner
part trace $((LIMIT - SECONDS)) bench.jsonl trace.txt "$PYTHON" -m benchmarks.accelerator trace
echo "all: $SECONDS s; results in $OUT" | tee -a "$OUT/parts.txt"
grep -q '^doctor: exit status 0 ' "$OUT/parts.txt"
