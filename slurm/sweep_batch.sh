#!/bin/bash
#SBATCH --job-name=dalr-sweep
#SBATCH --nodes=1
#SBATCH --array=0-3
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%A_%a.out
#
# sbatch slurm/sweep_batch.sh [--config RECIPE] [--section.key=value ...]
#
# The same run at several global batch sizes, one array task each, in RUN_DIR/batch_SIZE. Other sizes:
#   BATCH_SIZES="4096 16384" sbatch --array=0-1 slurm/sweep_batch.sh ...
# RUN_DIR is runs/sweep_JOBID by default. The quickstart has 2,048 sentences: no batch may be larger.
set -euo pipefail
CHECKOUT=${CHECKOUT:-${SLURM_SUBMIT_DIR:?submit this script with sbatch}}
source "$CHECKOUT/slurm/common.sh"
read -ra sizes <<<"${BATCH_SIZES:-256 512 1024 2048}"
size=${sizes[SLURM_ARRAY_TASK_ID]:-}
[[ -n $size ]] || fail "array task $SLURM_ARRAY_TASK_ID has no size in BATCH_SIZES=${sizes[*]}: use --array=0-$((${#sizes[@]} - 1))"
RUN_DIR=${RUN_DIR:-runs/sweep_$SLURM_ARRAY_JOB_ID}/batch_$size
train "$@" --batch.global_size="$size"
