#!/usr/bin/env bash
# Runs every check of the project: ruff, mypy, pytest. Makes the environment first.
#
#   bash launch/test.sh [--slow] [--peers] [--gpu] [--python 3.11|3.12] [pytest arguments]
#
#   --slow    also the long checks
#   --peers   also the checks against torch, transformers and trl (installs them)
#   --gpu     of the tests those for a GPU alone, on this machine's (installs JAX for CUDA)
#   --python  the version to test with, in an environment of its own
#
# Two workers share the suite, file by file; `-n 0` in the arguments runs it in one process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

extra=dev version='' arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --peers) extra+=,peers ;;
    --gpu)
      extra+=,cuda
      export JAX_PLATFORMS=cuda,cpu JAX_DISABLE_MOST_OPTIMIZATIONS=false
      arguments+=(-n 0 -m gpu) # one process: each takes most of the GPU's memory
      ;;
    --python)
      [ $# -ge 2 ] || fail "--python needs a value"
      version=$2
      shift
      ;;
    -h | --help)
      sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
make_environment "$extra" "$version"

status=0
"$python" -m ruff check . || status=1
"$python" -m mypy || status=1
# in the order of the files: by the number of tests, long files of few tests would come last
"$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder ${arguments[@]+"${arguments[@]}"} || status=$?
exit "$status"
