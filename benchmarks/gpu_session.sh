#!/bin/sh
# Half an hour with a GPU: builds the kernels for it, tests them, times them. Every log into one folder.
#
#   benchmarks/gpu_session.sh OUT [step ...]       steps: build test sanitize bench tune model (default: all but tune)
#
# PY=python3 is the Python with torch, Triton and quantforge's dependencies. A step that fails is named in OUT/summary
# and the next one runs. Each ends within LIMIT seconds (540), so a step is a call where calls are limited to 10 minutes.
set -u
OUT=$(mkdir -p "${1:?folder for the logs}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.." || exit 1
PY=${PY:-python3}
LIMIT=${LIMIT:-540}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
ARCH=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)

run() { # name, command...
    name=$1
    shift
    began=$(date +%s)
    timeout "$LIMIT" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    echo "$name: exit $code after $(($(date +%s) - began)) s" | tee -a "$OUT/summary"
    [ $code -eq 0 ] || tail -n 15 "$OUT/$name.log"
    return $code
}

for step in "${@:-build test sanitize bench model}"; do
    for one in $step; do
        case $one in
        build)
            nvidia-smi >"$OUT/nvidia-smi.log" 2>&1
            "$PY" -m pip list >"$OUT/pip.log" 2>&1
            run build env QUANTFORGE_CUDA=1 QUANTFORGE_CUDA_ARCH="${ARCH:-90}" QUANTFORGE_JOBS="$(nproc)" \
                "$PY" setup.py -q build_ext --inplace
            ;;
        test)
            workers=$("$PY" -c 'import xdist; print("-n 8")' 2>/dev/null)
            # shellcheck disable=SC2086
            run test "$PY" -m pytest $workers -rs -m gpu --continue-on-collection-errors tests/nn tests/test_device.py tests/codecs/test_grid.py
            ;;
        sanitize)
            command -v compute-sanitizer >/dev/null || { echo "sanitize: no compute-sanitizer" | tee -a "$OUT/summary"; continue; }
            for tool in memcheck racecheck; do
                run "sanitize-$tool" env QUANTFORGE_FEW=1 compute-sanitizer --tool $tool --error-exitcode 9 \
                    "$PY" -m pytest -x -rs -m gpu tests/nn -k "Q4_0 or IQ2_XXS"
            done
            ;;
        bench) run bench "$PY" benchmarks/gpu.py --quick --minutes 7.5 --parts products,encode --json "$OUT/bench.json" &&
            "$PY" benchmarks/gpu.py --readme "$OUT/bench.json" | tee "$OUT/readme.md" ;;
        tune) run tune "$PY" benchmarks/gpu.py --tune --ways --minutes 7.5 --parts products --codecs Q8_0,Q4_0,Q4_K,Q6_K,IQ2_XXS \
            --m 8,16,32,64,128,256,512,1024 --json "$OUT/tune.json" ;;
        model) run model "$PY" benchmarks/gpu.py --parts model --json "$OUT/model.json" ;;
        *) echo "no such step: $one" >&2 ; exit 2 ;;
        esac
    done
done
cat "$OUT/summary"
