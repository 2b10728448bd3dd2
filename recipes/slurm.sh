#!/usr/bin/env bash
# A sweep on a cluster, one run a task. A task that reaches its time limit is queued again, and its run goes on:
#     wandb sweep sweep.yaml                                               # prints ENTITY/PROJECT/SWEEP
#     sbatch --array=0-3 recipes/slurm.sh ENTITY/PROJECT/SWEEP             # or several runs at once in one task:
#     sbatch recipes/slurm.sh ENTITY/PROJECT/SWEEP python -m gang
# The nodes need W&B's login, or WANDB_BASE_URL and WANDB_API_KEY as `python -m local_wandb --host ADDRESS` prints them.
#SBATCH --gres=gpu:1 --time=04:00:00 --output=slurm-%A_%a.log --open-mode=append
#SBATCH --signal=B:TERM@120 --requeue
sweep=$1 && shift
source .venv/bin/activate
[ $# -gt 0 ] || set -- wandb agent --forward-signals --count 1
# Whoever has not ended 90 s later is queued again none the less: after its time limit Slurm would not do so.
trap 'trap "" TERM; kill -TERM $agent; timeout 90 tail --pid=$agent -f /dev/null; scontrol requeue $SLURM_JOB_ID' TERM
"$@" "$sweep" & agent=$!
wait $agent
