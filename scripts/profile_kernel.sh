#!/usr/bin/env bash
# Profile the CUDA kernels of one op with Nsight Compute, on a case of its benchmark or on one of its samples; with main
# in place of OP, one call of each op's main cases, the ones of docs/gpu.md.
#
#     scripts/profile_kernel.sh [--dry-run] [-o FILE] OP [CASE | SIZE | SAMPLE]
#
# CASE is a part of a case's name (flowkernels bench OP --list), SIZE a number of elements, for the case nearest to it,
# SAMPLE the whole id of a sample (flowkernels/ops/OP/samples.py); the op's first case if none is given.
# SKIP kernels are left out (2), COUNT are profiled (4); PYTHON names an interpreter other than .venv's.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
ops="$(cd "$root/flowkernels/ops" && for samples in */samples.py; do printf '%s ' "${samples%/*}"; done)"
ops="${ops% }"
usage() {
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  echo "profile_kernel.sh: $1" >&2
  exit 2
}

dry_run="" file=""
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry_run=1 ;;
    -o) [ $# -ge 2 ] || usage "-o: expected a file"; file="$2"; shift ;;
    -*) usage "unknown option $1" ;;
    *) break ;;
  esac
  shift
done
[ $# -ge 1 ] || usage "expected an op, one of $ops"
op="$1" which="${2:-}"
[ $# -le 2 ] || usage "expected an op and a case, got $# arguments (a case's name in quotes)"
case " $ops main " in *" $op "*) ;; *) usage "expected an op, one of $ops, got $op" ;; esac
[ "$op" != main ] || [ -z "$which" ] || usage "main: expected no case, got $which"

python="${PYTHON:-$root/.venv/bin/python}"
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
run=("$python" "$root/scripts/profile_driver.py" "$op" "$which")
which_kernels=(--kernel-name "regex:.*${op}_.*" --launch-skip "${SKIP:-2}" --launch-count "${COUNT:-4}")
if [ "$op" = main ]; then
  run=("${run[@]:0:3}")
  which_kernels=(--kernel-name "regex:.*(${ops// /|})_.*" --profile-from-start off)
fi
command=(ncu --set full --nvtx "${which_kernels[@]}")
command+=(--force-overwrite -o "${file:-profile-$op}" "${run[@]}")

export FLOWKERNELS_PROFILE=1 # NVTX ranges around the ops
printf 'FLOWKERNELS_PROFILE=1'
printf ' %q' "${command[@]}"
echo
[ -z "$dry_run" ] || exit 0

[ -d /usr/local/cuda/bin ] && PATH="$PATH:/usr/local/cuda/bin"
command -v ncu >/dev/null || {
  echo "profile_kernel.sh: ncu is not on the PATH; it is Nsight Compute, which comes with the CUDA toolkit" >&2
  exit 1
}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "profile_kernel.sh: $python has no torch that sees a CUDA GPU" >&2
  exit 1
}
"${command[@]}" || {
  echo "profile_kernel.sh: ncu failed; ERR_NVGPUCTRPERM means that only root may read the GPU's counters" >&2
  exit 1
}
echo "wrote ${file:-profile-$op}.ncu-rep: ncu --import FILE prints it, ncu-ui shows it"
