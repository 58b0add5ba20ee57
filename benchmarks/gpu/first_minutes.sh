#!/usr/bin/env bash
# The first minutes of a card: makes a bare machine ready, then runs benchmarks/gpu_suite.py.
#
#   benchmarks/gpu/first_minutes.sh [--wheels DIR] [--prebuilt DIR] [options of gpu_suite.py]
#
#   --wheels DIR    installs DIR/*.whl, which need no network (Transformer Engine, flash-attn)
#   --prebuilt DIR  puts the native code of `make cuda-prebuilt` into the package
#
# A machine lent for fifteen minutes: --call 1, --call 2 and --call 3, each with an --out of its own.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
options=()
while [ $# -gt 0 ]; do
  case $1 in
    --wheels | --prebuilt)
      [ $# -gt 1 ] && [ -d "$2" ] || { echo "first_minutes.sh: $1 '${2-}' is no folder" >&2; exit 2; }
      if [ "$1" = --wheels ]; then wheels=$2; else cp "$2"/*.so "$2"/_build.json "$root/megarlx/"; fi
      shift 2 ;;
    *) options+=("$1"); shift ;;
  esac
done
if [ -n "${wheels-}" ]; then
  site=${TMPDIR:-/tmp}/megarlx-wheels-$(printf '%s\n' "$wheels"/*.whl | cksum | cut -d ' ' -f 1)
  # A warm machine has them from the call before; a half-made folder has another name.
  if [ ! -d "$site" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
      --disable-pip-version-check --target "$site.$$" "$wheels"/*.whl
    mv "$site.$$" "$site"
  fi
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
if [ -z "${CUDA_HOME-}" ] && [ -e /usr/local/cuda/include/cuda_runtime.h ]; then
  export CUDA_HOME=/usr/local/cuda
fi
# torch finds its own libraries. With this set, a second cuDNN can be mixed in with torch's, and
# Transformer Engine's attention then fails.
unset LD_LIBRARY_PATH
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} NVTE_FRAMEWORK=pytorch
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
exec "$python" "$root/benchmarks/gpu_suite.py" ${options[@]+"${options[@]}"}
