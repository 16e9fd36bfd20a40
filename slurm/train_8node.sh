#!/bin/bash
#SBATCH --job-name=dalr
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=dalr_%j.out
#
# sbatch slurm/train_8node.sh [--config RECIPE] [--section.key=value ...]
#
# Every argument goes to dalr_scale.train. Variables (all have defaults):
#   RUN_DIR         run folder, shared by the nodes           (runs/slurm_JOBID)
#   VENV            environment to use                        (.venv beside this checkout)
#   PROCS_PER_NODE  processes on each node                    (GPUs of the node, or 1)
#   HEAD_ADDR       address of the first node                 (its host name)
#   GRACE_SECONDS   time the site leaves a job after a signal (300)
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"

export RUN_DIR=${RUN_DIR:-$PWD/runs/slurm_$SLURM_JOB_ID}
export VENV=${VENV:-$PWD/.venv}
export PROCS_PER_NODE=${PROCS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
# The launcher must pass signals on to the ranks instead of dying of them, and wait for the save.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export PET_SHUTDOWN_TIMEOUT=${GRACE_SECONDS:-300}
mkdir -p "$RUN_DIR"

head=${HEAD_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
port=$((20000 + SLURM_JOB_ID % 12000)) # below the ephemeral range

# On the signal the ranks are asked through a file: they agree, save the same step and leave.
asked=0 interrupted=0
trap 'echo requeue >"$RUN_DIR/STOP"; asked=1 interrupted=1' USR1

# Single quotes: rank and scratch folder are those of the node, not of the batch host.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --wait=60 bash -c '
  scratch=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/dalr-$SLURM_JOB_ID-$SLURM_NODEID
  mkdir -p "$scratch"
  export TRITON_CACHE_DIR=$scratch/triton TORCH_EXTENSIONS_DIR=$scratch/extensions
  exec "$VENV/bin/accelerate" launch --use_deepspeed --deepspeed_multinode_launcher standard \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * PROCS_PER_NODE))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$0" --main_process_port "$1" \
    --max_restarts 0 --mixed_precision no --dynamo_backend no \
    -m dalr_scale.train --run.dir "$RUN_DIR" "${@:2}"' "$head" "$port" "$@" &
pid=$! rc=0
while :; do # a trapped signal ends wait early: wait again
  interrupted=0
  if wait "$pid"; then rc=0; else rc=$?; fi
  [[ $interrupted == 0 ]] && break
done

# The launcher hides how a run ended; the run itself wrote it down. What another job or an earlier
# start of this one wrote says nothing: a job that dies before its first word is not requeued for it.
outcome=$("$VENV/bin/python" -c '
import json, os, sys
status = json.load(open(sys.argv[1] + "/status.json"))
start = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT") or 0)
own = (status.get("job_id"), status.get("restart_count")) == start
print(status["outcome"] if own else "unknown")' "$RUN_DIR" || echo unknown)
echo "outcome: $outcome (exit status $rc)"
if [[ $outcome == preempted || ($asked == 1 && $outcome != finished && $outcome != stopped) ]]; then
  scontrol requeue "$SLURM_JOB_ID" || exit 85 # saved, not finished: submit it again
  exit 0
fi
exit "$rc"
