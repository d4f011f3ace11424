#!/usr/bin/env bash
# The main job on the embedded data and models: distil a draft, train the control, measure, report.
# Makes the environment first; started again it goes on from what is there.
#
#   bash launch/quickstart.sh [--fast] [--seeds N] [--from-scratch]
#
#   --fast          a fifth of the work, in runs/quickstart-fast
#   --seeds N       distil and train the control with N seeds, for a claim
#   --from-scratch  train the target and the fine-tuned draft again, too (an hour)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

root=runs/quickstart options='' seeds=1 scratch=
while [ $# -gt 0 ]; do
  case "$1" in
    --fast) root=runs/quickstart-fast options+=,fast ;;
    --seeds)
      seeds=${2:?--seeds needs a number}
      [[ "$seeds" =~ ^[1-9][0-9]?$ ]] || fail "--seeds $seeds: must be a number from 1 to 99"
      shift
      ;;
    --from-scratch) scratch=1 options+=,scratch ;;
    -h | --help)
      sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *) fail "unknown option $1; known: --fast, --seeds N, --from-scratch" ;;
  esac
  shift
done
make_environment ''

configs=experiments/configs
stage() {
  echo
  echo "== $1"
  shift
  "$python" -m "$@"
}

if [ -n "$scratch" ]; then
  stage "target, from scratch" experiments.finetune \
    --config=$configs/finetune_stories.py:target --workdir="$root/target"
  stage "fine-tuned draft, from scratch" experiments.finetune \
    --config=$configs/finetune_stories.py:draft --workdir="$root/finetuned"
fi
for ((seed = 0; seed < seeds; seed++)); do
  suffix=$([ "$seed" = 0 ] || echo "-$seed")
  for name in distilled control; do
    what=$([ "$name" = control ] && echo control || echo distill)
    stage "$name draft, seed $seed" experiments.distill \
      --config="$configs/quickstart.py:$what$options" --workdir="$root/$name$suffix" \
      --config.seed="$seed"
  done
done
stage "fine-tuned, control and distilled drafts compared" experiments.evaluate \
  --config="$configs/quickstart.py:evaluate$options,seeds=$seeds" --workdir="$root"
stage "report" experiments.report --workdir="$root"
