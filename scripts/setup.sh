# Sourced by scripts/demo and scripts/test: makes .venv with flowkernels (editable), its build tools and what "$1" names.
# An active virtual environment or a torch >= 2.6 of the system's Python is used as it is. The tests look at the GPU
# binaries, so they need an nvcc: PATH's (or CUDACXX), else PyPI's, about 330 MB in .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-}"
python="${PYTHON:-python3}"

have() { command -v "$1" >/dev/null 2>&1; }
debian() { # debian PACKAGE...: install, where we may
  if have apt-get && [ "$(id -u)" = 0 ]; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
  else
    echo "flowkernels: this machine needs: $* (on Debian: sudo apt-get install $*)" >&2
    exit 1
  fi
}
has_torch() { "$1" -c 'import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6))' 2>/dev/null; }

have "$python" || debian python3 python3-venv python3-dev
have c++ || have g++ || have clang++ || debian g++
[ "$extras" != test ] || have g++ || debian g++ # the emulation of a GPU is made with gcc
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "flowkernels: needs Python 3.10 or newer; PYTHON=... names one" >&2
  exit 1
}
if [ ! -x .venv/bin/python ]; then
  "$python" -c 'import ensurepip, venv' 2>/dev/null || debian python3-venv
  [ -e "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || debian python3-dev
  if has_torch "$python"; then "$python" -m venv --system-site-packages .venv; else "$python" -m venv .venv; fi
fi
# shellcheck disable=SC1091
. .venv/bin/activate
has_torch python || pip install -q "torch==2.13.0"
if [ "$extras" = test ] && [ -z "${CUDACXX:-}" ] && ! have nvcc; then
  pip install -q nvidia-{cuda-nvcc,cuda-crt,nvvm,cuda-runtime,cuda-cccl,cuda-culibos}==13.0.*
  cuda="$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13"
  [ -e "$cuda/lib64" ] || ln -s lib "$cuda/lib64" # where nvcc looks
  export CUDACXX="$cuda/bin/nvcc"
fi
pip install -q -e ".${extras:+[$extras]}"
