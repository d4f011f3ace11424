#!/usr/bin/env bash
# Distils a draft on the embedded data and shows what that gains, on any machine with Python.
#
#   bash launch/quickstart.sh [--fast] [--seeds N] [--from-scratch] [--python 3.11|3.12]
#
#   --fast          small and rough, in runs/quickstart-fast: two minutes on two quiet cores
#   --seeds N       N drafts of each kind, for a claim with intervals over seeds
#   --from-scratch  also trains the target and the draft to begin with (well over an hour)
#   --python V      in an environment of that version's own
#
# Started again it goes on where it was, and keeps what is done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

folder=runs/quickstart options='' seeds=1 version='' scratch=0
while [ $# -gt 0 ]; do
  case "$1" in
    --fast) folder+=-fast options+=,fast ;;
    --from-scratch) scratch=1 ;;
    --seeds | --python)
      [ $# -ge 2 ] || fail "$1 needs a value"
      if [ "$1" = --seeds ]; then seeds=$2; else version=$2; fi
      shift
      ;;
    -h | --help)
      sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *) fail "unknown option $1; known: --fast --seeds N --from-scratch --python VERSION" ;;
  esac
  shift
done
[[ $seeds =~ ^[1-9][0-9]*$ ]] || fail "--seeds $seeds: give a number from 1"
if [ "$scratch" = 1 ]; then folder+=-scratch options+=,scratch; fi
make_environment '' "$version"

done_stages=0 stages=$((2 * seeds + 2 + 3 * scratch))
stage() { # what, then an entrypoint, its config, its workdir and flags
  done_stages=$((done_stages + 1))
  printf '\n[%d/%d] %s (%d:%02d since the start)\n' "$done_stages" "$stages" "$1" \
    $((SECONDS / 60)) $((SECONDS % 60))
  "$python" -u -m "experiments.$2" ${3:+--config="experiments/configs/$3"} --workdir="$4" "${@:5}"
}

if [ "$scratch" = 1 ]; then
  stage 'train the target' finetune finetune_stories.py:target "$folder/shallow"
  [ -e "$folder/start" ] || "$python" -m experiments.convert --from="$folder/shallow" \
    --to="$folder/start" --format=native --decoder_layers=0,0,1,1,2,2,3,3,4
  stage 'train it deeper' finetune finetune_stories.py:deeper "$folder/target" \
    --config.model="$folder/start"
  stage 'train the draft' finetune finetune_stories.py:draft "$folder/draft"
fi
for ((seed = 0; seed < seeds; seed++)); do
  suffix=$([ "$seed" = 0 ] || echo "-seed$seed")
  stage "distil the draft, seed $seed" distill "quickstart.py:distilled$options" \
    "$folder/distilled$suffix" --config.seed="$seed"
  stage "train the control on the references, seed $seed" distill \
    "quickstart.py:control$options" "$folder/control$suffix" --config.seed="$seed"
done
stage 'evaluate fine-tuned, control and distilled' evaluate \
  "quickstart.py:evaluate$options,seeds=$seeds" "$folder"
stage 'write the report' report '' "$folder"
