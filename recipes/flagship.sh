#!/usr/bin/env bash
# The reference experiment from nothing, on a GPU machine without a network:  recipes/flagship.sh [SWEEP ...]
# Makes the data, pretrains a base of about 100M parameters (6 minutes), trains the sweeps of recipes/flagship/ (or those
# named), one after another on each visible GPU, writes one report of them all to outputs/flagship/, and trains what that
# proposes to find the best rate, if anything, for the same report.
set -euo pipefail
cd "$(dirname "$0")/.."
base=${PRETRAIN:---minutes 6 --vocab_size 16384 --hidden_size 768 --intermediate_size 2048 --num_hidden_layers 12
  --context 512 --batch_size 64 --learning_rate 1e-3 --corpus_megabytes 500}
[ $# -gt 0 ] || set -- grid alone refinement adapter_dtype passes freeze_a warmup schedule repeats alone_bfloat16

[ -f starter/data-flagship/test.jsonl ] ||
  python -m starter.docstrings --characters 800 --per_module 20 --output starter/data-flagship
# shellcheck disable=SC2086 # the flags are words
[ -f outputs/flagship_base/README.md ] || python -m starter.pretrain --output outputs/flagship_base $base

mkdir -p outputs/flagship_logs
python -m local_wandb --data outputs/flagship_wandb >outputs/flagship_logs/server.txt &
server=$!
trap 'kill $server; wait $server || true' EXIT
until grep -q WANDB_API_KEY outputs/flagship_logs/server.txt; do kill -0 $server && sleep 0.5; done
set -a # what is set from here on is exported
eval "$(grep ^export outputs/flagship_logs/server.txt)"
WANDB_PROJECT=flagship WANDB_ENTITY=local WANDB_ERROR_REPORTING=false WANDB_MODE=online

# One sweep from its creation to its last run: in a gang, or (alone*) by W&B's own agent, one run after another.
train_sweep() {
  local name log started=$SECONDS path
  name=$(basename "$1" .yaml) log=outputs/flagship_logs/$(basename "$1" .yaml).log
  path=$(python -m wandb sweep --project flagship "$1" 2>&1 | grep -o 'local/flagship/[a-z0-9]*' | tail -1)
  echo "$path" >>outputs/flagship_logs/sweeps.txt
  case $name in
    alone*) python -m wandb agent "$path" >"$log" 2>&1 ;;
    *) python -m gang "$path" >"$log" 2>&1 ;;
  esac
  echo "$name: $path, $((SECONDS - started)) s"
}
export -f train_sweep
rm -f outputs/flagship_logs/sweeps.txt
gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
train_and_report() {
  printf '%s\n' "$@" |
    xargs -P "$((gpus > 0 ? gpus : 1))" --process-slot-var=CUDA_VISIBLE_DEVICES -I{} bash -euc 'train_sweep {}' ||
    echo "not every sweep ended well: see outputs/flagship_logs; the report is of what there is" >&2
  mapfile -t sweeps <outputs/flagship_logs/sweeps.txt
  python -m analysis "${sweeps[@]}" --output outputs/flagship
}
set -- "${@/#/recipes/flagship/}"
train_and_report "${@/%/.yaml}"
proposed=outputs/flagship/sweeps/round-1.yaml
[ ! -f $proposed ] || train_and_report $proposed
cp outputs/flagship_base/README.md outputs/flagship/base.md
