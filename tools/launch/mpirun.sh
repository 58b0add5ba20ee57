#!/bin/bash
# A run under Open MPI, on one node or several.
#
#   tools/launch/mpirun.sh [options of mpirun] -- train CONFIG.toml --out RUN [--set a.b=c …]
#
# PYTHON names the interpreter (default: python). Ends with the run's own status: 75 means that it
# was told to stop and has saved, and that the same command goes on.
set -euo pipefail

options=()
while [[ $# -gt 0 && $1 != -- ]]; do
  options+=("$1")
  shift
done
if [[ $# -lt 2 ]]; then
  echo "usage: $0 [options of mpirun] -- COMMAND of megarlx and its arguments" >&2
  exit 2
fi
shift

# The ranks meet at the node of rank 0, and only mpirun knows which that is.
if [[ -z ${MASTER_ADDR:-} ]]; then
  MASTER_ADDR=$(mpirun "${options[@]}" sh -c '
    [ "$OMPI_COMM_WORLD_RANK" = 0 ] || exit 0
    [ "$OMPI_COMM_WORLD_SIZE" = "$OMPI_COMM_WORLD_LOCAL_SIZE" ] && echo 127.0.0.1 || hostname')
fi
export MASTER_ADDR
for name in MASTER_ADDR MASTER_PORT PATH PYTHONPATH OMP_NUM_THREADS; do
  [[ -z ${!name:-} ]] || options+=(-x "$name")
done
exec mpirun "${options[@]}" "${PYTHON:-python}" -m megarlx "$@"
