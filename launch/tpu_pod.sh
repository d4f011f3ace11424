#!/usr/bin/env bash
# Runs an entrypoint on every worker of a Cloud TPU slice, from the commit that is checked out.
#
#   bash launch/tpu_pod.sh [--dry-run] TPU_NAME ZONE ENTRYPOINT [flags of the entrypoint]
#   bash launch/tpu_pod.sh my-v5e-64 us-west4-a distill --config=... --workdir=/mnt/bucket/run
#
# Needs gcloud with access to the slice, and on its workers Python 3.11 or 3.12 and the workdir: one
# folder that all see (Filestore, or a bucket with a hierarchical namespace, mounted by
# gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0: a checkpoint
# becomes whole by the renaming of its folder, and no host may remember older files). Run it again
# to resume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run=() temporary=${TMPDIR:-/tmp}/distillspec_jax.XXXXXX
if [ "${1:-}" = --dry-run ]; then
  run=(echo)
  shift
fi
if [ $# -lt 3 ]; then
  echo "error: give TPU_NAME ZONE ENTRYPOINT; see the head of $0" >&2
  exit 2
fi
name=$1 zone=$2 entrypoint=$3
shift 3
flags=
[ $# = 0 ] || flags=$(printf ' %q' "$@")

# a name of its own on both sides: another launch may be under way
if [ ${#run[@]} = 0 ]; then
  temporary=$(mktemp -d "$temporary")
  trap 'rm -rf "$temporary"' EXIT
fi
archive=$temporary/${temporary##*/}.tar.gz
${run[@]+"${run[@]}"} git archive --output="$archive" HEAD
${run[@]+"${run[@]}"} gcloud compute tpus tpu-vm scp "$archive" "$name": --zone="$zone" --worker=all
${run[@]+"${run[@]}"} gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
  set -e
  mkdir -p distillspec_jax && cd distillspec_jax
  rm -rf distillspec_jax experiments launch tests # of the commit before: nothing of it may stay
  tar -xzf ../${archive##*/}
  rm ../${archive##*/}
  source launch/environment.sh && make_environment tpu
  source launch/xla_flags.sh && xla_flags tpu
  DISTILLSPEC_HOSTS=auto exec \"\$python\" -m experiments.$entrypoint$flags"
