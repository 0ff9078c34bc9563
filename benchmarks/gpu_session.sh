#!/bin/sh
# Half an hour with a GPU: builds the kernels for it, tests them, times them. Every log into one folder.
#
#   benchmarks/gpu_session.sh OUT [step ...]     default: build test bench model tune sanitize, in this order
#
# PY       the Python with torch, Triton and quantforge's dependencies (default: python3)
# PEERS    a folder with sources of other libraries: ggml (or llama.cpp) and marlin; they are built beside the tests
# LIMIT    seconds for a step (default: 540): a step is a call where calls are limited to 10 minutes
# DEVICE   cpu: a rehearsal, tiny, without a GPU
#
# A step that fails is named in OUT/summary and the next one runs. Results are written as they are found.
set -u
OUT=$(mkdir -p "${1:?folder for the logs}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.." || exit 1
PY=${PY:-python3}
LIMIT=${LIMIT:-540}
DEVICE=${DEVICE:-cuda}
[ "$DEVICE" = cpu ] && SMALL=--smoke TUNE="--m 9" || SMALL='' TUNE="--shapes 8192x8192 --m 8,16,32,64,128,256,512,1024"
BUILT=$PWD/build/peers
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
ARCH=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
ARCH=${ARCH:-90}
if [ -n "${PEERS:-}" ]; then
    PEERS=$(cd "$PEERS" && pwd) || exit 1
    [ -d "$PEERS/marlin" ] && export MARLIN="${MARLIN:-$PEERS/marlin}" MARLIN_BUILD="$BUILT"
    for sources in "$PEERS/ggml" "$PEERS/llama.cpp"; do
        [ -d "$sources" ] && GGML_SOURCES=$sources && export GGML="${GGML:-$BUILT/ggml/bin}"
    done
fi

say() { echo "$*" | tee -a "$OUT/summary"; }

run() { # name, command...
    name=$1
    shift
    began=$(date +%s)
    timeout "$LIMIT" "$@" >"$OUT/$name.log" 2>&1
    code=$?
    say "$name: exit $code after $(($(date +%s) - began)) s"
    [ $code -eq 0 ] || tail -n 15 "$OUT/$name.log"
    return $code
}

both() { # our two libraries side by side
    "$PY" setup.py -q build_ext --inplace &
    cpu=$!
    if command -v "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" >/dev/null; then
        QUANTFORGE_CUDA=only QUANTFORGE_CUDA_ARCH=$ARCH QUANTFORGE_JOBS=$(nproc) "$PY" setup.py -q build_ext --inplace || return 1
    else
        [ "$DEVICE" = cpu ] || { echo "no nvcc"; return 1; }
    fi
    wait $cpu
}

peers() { # what is in PEERS; of ggml only what multiplies matrices
    mkdir -p "$BUILT"
    [ -z "${MARLIN:-}" ] || "$PY" -c 'from benchmarks.on_gpu import peers; peers.first_marlin(); print("Marlin is built")'
    [ -n "${GGML_SOURCES:-}" ] || return 0
    set -- # cuBLAS from torch's packages, where the toolkit has none
    cublas=$("$PY" -c 'import nvidia, pathlib
for p in nvidia.__path__:
    for lib in sorted(pathlib.Path(p).glob("**/libcublas.so*"))[:1]:
        print(lib)' 2>/dev/null)
    if [ -n "$cublas" ] && [ ! -e "${CUDA_HOME:-/usr/local/cuda}/lib64/libcublas.so" ]; then
        include=$(dirname "$(find "$(dirname "$cublas")/../.." -name cublas_v2.h | head -1)")
        set -- -DCUDA_cublas_LIBRARY="$cublas" -DCUDA_cublasLt_LIBRARY="$cublas" -DCMAKE_CUDA_FLAGS="-I$include"
    fi
    cmake -S "$GGML_SOURCES" -B "$BUILT/ggml" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_CCACHE=OFF \
        -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$BUILT/ggml/bin" -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF \
        -DGGML_CUDA=ON -DGGML_CUDA_GRAPHS=ON -DGGML_CUDA_FA=OFF -DGGML_CUDA_NCCL=OFF -DGGML_CUDA_NO_VMM=ON \
        -DCMAKE_CUDA_ARCHITECTURES="$ARCH-real" "$@" && cmake --build "$BUILT/ggml" --target ggml -j "$(nproc)"
}

# shellcheck disable=SC2048,SC2086
set -- ${*:-build test bench model tune sanitize}
for step in "$@"; do
    case $step in
    build)
        { nvidia-smi; "$PY" -m pip list; nproc; date; } >"$OUT/machine.log" 2>&1
        if [ -n "${PEERS:-}" ]; then
            run peers nice -n 10 "$0" "$OUT" peers-now &
        fi
        run build "$0" "$OUT" build-now
        # what a later call on another machine can take along
        find quantforge -name _cuda.so -size -16M -exec cp {} "$OUT/" \;
        ;;
    build-now) both; exit $? ;;
    peers-now) peers; exit $? ;;
    test)
        workers=$("$PY" -c 'import xdist; print("-n 8 --max-worker-restart 40")' 2>/dev/null
            "$PY" -c 'import pytest_timeout; print("--timeout 200 --timeout-method thread")' 2>/dev/null)
        [ "$DEVICE" = cpu ] && workers=--collect-only
        # shellcheck disable=SC2046,SC2086
        run test "$PY" -m pytest $workers -rs -m gpu --durations 10 --continue-on-collection-errors $(grep -rl 'mark\.gpu' tests --include='*.py')
        ;;
    bench)
        wait
        [ -z "${GGML_SOURCES:-}" ] || [ -e "$BUILT/ggml/bin/libggml.so" ] || run peers "$0" "$OUT" peers-now
        run bench "$PY" benchmarks/gpu.py --device "$DEVICE" $SMALL --quick --minutes 7.5 --parts products,encode --json "$OUT/bench.json"
        "$PY" benchmarks/gpu.py --readme "$OUT/bench.json" >"$OUT/readme.md" && cat "$OUT/readme.md"
        ;;
    model)
        run model "$PY" benchmarks/gpu.py --device "$DEVICE" $SMALL --minutes 7.5 --parts model --json "$OUT/model.json"
        ;;
    tune)
        # shellcheck disable=SC2086
        run tune "$PY" benchmarks/gpu.py --device "$DEVICE" $SMALL $TUNE --tune --ways --no-peers --minutes 7.5 --parts products \
            --codecs Q8_0,Q4_0,Q4_K,Q6_K,IQ2_XXS --json "$OUT/tune.json"
        ;;
    sanitize)
        command -v compute-sanitizer >/dev/null || { say "sanitize: no compute-sanitizer"; continue; }
        for tool in memcheck racecheck; do
            run "sanitize-$tool" env QUANTFORGE_FEW=1 compute-sanitizer --tool $tool --error-exitcode 9 \
                "$PY" -m pytest -x -rs -m gpu tests/nn -k "Q4_0 or IQ2_XXS"
        done
        ;;
    *) echo "no such step: $step" >&2; exit 2 ;;
    esac
done
wait
cat "$OUT/summary"
