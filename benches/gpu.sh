#!/usr/bin/env bash
# Everything that is to be measured on a GPU, what matters most first: is it right, how fast is it, and the peers beside it.
#
#     benches/gpu.sh HEADWATER TESTS OUT [SECONDS]
#
# HEADWATER is the program and TESTS the library's test binary, both built with `--features cuda` (docs/cuda.md); the GPU's
# machine needs no Rust. Each line of JSON goes to OUT/figures.jsonl as soon as it is there, what is said beside it to OUT/NAME.log.
# Nothing begins after SECONDS [780]. Peers are left out where Python has no torch. Fails if what was computed is not right.
set -uo pipefail
[ $# -ge 3 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
headwater=$1 tests=$2 out=$3 seconds=${4:-780}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-$out/cuda-cache}

# measure NAME COMMAND...: its last line is a figure.
measure() {
  local name=$1 line
  shift
  [ $SECONDS -lt "$seconds" ] || { echo "$name: no time left" | tee -a "$out/left-out.log" >&2; return; }
  echo "== $name, after ${SECONDS} s: $*" >&2
  if line=$(timeout $((seconds + 60 - SECONDS)) "$@" 2> "$out/$name.log" | tail -n 1) && [ -n "$line" ]; then
    printf '{"name": "%s", "figure": %s}\n' "$name" "$line" | tee -a "$out/figures.jsonl"
  else
    echo "$name: failed, see $out/$name.log" | tee -a "$out/left-out.log" >&2
  fi
}

# Kernels, a small model and its answers beside the CPU, on fresh random numbers. The emulation is left out: no g++ on the path.
right=0
PATH= "$tests" cuda gpu tensors --nocapture --test-threads 1 --include-ignored > "$out/parity.log" 2>&1 || right=1
tail -n 3 "$out/parity.log" >&2

seven() { measure "$1" "$headwater" bench synth --model 7b --device cuda:0 --output-tokens 256 --prompt-tokens 512 "${@:2}"; }
train() { measure "$1" "$headwater" bench train --model "$2" --device cuda:0 --dtype bf16 --length 2048 --steps 10 "${@:3}"; }
peer() {
  if python3 -c 'import torch, transformers' 2> /dev/null; then
    measure "$1" python3 "$here/peer_gpu.py" "${@:2}"
  else
    echo "$1: Python has no torch or no transformers" | tee -a "$out/left-out.log" >&2
  fi
}

seven synth-7b-few --requests 64
train train-500m 500m --batch 8
peer peer-train-500m train --shape 500m --batch 8 --steps 10 --mode compile --peak 989e12
seven synth-7b --requests 1024
peer peer-synth-7b generate --shape 7b --requests 256 --prompt-tokens 512 --output-tokens 256
train train-1.3b 1.3b --batch 8
peer peer-train-1.3b train --shape 1.3b --batch 8 --steps 10 --mode compile --peak 989e12
seven synth-7b-wide --requests 1024 --sequences 512
exit $right
