# shellcheck shell=bash
# What the job scripts of this directory share; sourced by them, and by bash on every node.
#
# Variables (all have defaults; set them before sbatch):
#   RUN_DIR            run directory, shared by the nodes              (runs/slurm_JOBID)
#   VENV               Python environment                           (.venv beside this checkout)
#   ENV_SETUP          command run on each node first, such as "module load cuda"       (none)
#   PROCS_PER_NODE     processes on each node                       (GPUs of the node, or 1)
#   HEAD_ADDR          address of the first node                    (what Slurm has for it)
#   NETWORK_INTERFACE  for NCCL and gloo, such as ib0               (their own choice)
#   CONTAINER          none, apptainer or pyxis                     (none)
#   CONTAINER_IMAGE    image for the last two; Python and packages come from it
#   CONTAINER_MOUNTS   further directories in it, comma separated       (none)
#   GRACE_SECONDS      time the site leaves a job after a signal    (300)
#   DOCTOR             yes or no: check the nodes before training   (yes)

fail() {
  echo "error: $*" >&2
  exit 1
}

# -- in the batch shell ---------------------------------------------------------------------------

# Variables, run directory, address and port; the arguments are the trainer's.
prepare_job() {
  export CHECKOUT VENV
  VENV=${VENV:-$CHECKOUT/.venv}
  export CONTAINER=${CONTAINER:-none}
  RUN_DIR=${RUN_DIR:-$(run_dir_of "$@")}
  [[ $RUN_DIR == /* ]] || RUN_DIR=$CHECKOUT/$RUN_DIR
  export RUN_DIR
  local gpus=${SLURM_GPUS_ON_NODE:-0}
  export PROCS_PER_NODE=${PROCS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
  # GPUs that came with --exclusive and not by a request of their own stay with this shell: a step
  # has to ask for them (man srun, --gres)
  if ((gpus > 0)) && [[ -z ${SLURM_GPUS:-}${SLURM_GPUS_PER_NODE:-}${SLURM_GPUS_PER_TASK:-} ]]; then
    SRUN_GPUS=(--gres="gpu:$gpus")
  fi
  PORT=$((20000 + SLURM_JOB_ID % 12000)) # below the ephemeral range
  HEAD_ADDR=${HEAD_ADDR:-$(head_address)}
  NODE_NAMES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd' ')
  export PORT HEAD_ADDR NODE_NAMES
  # The launcher must pass signals on to the ranks instead of dying of them, and wait for the save.
  export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
  export PET_SHUTDOWN_TIMEOUT=${GRACE_SECONDS:-300}
  # shellcheck disable=SC2016  # filled in by the launcher
  export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='rank ${rank}: '
  export PYTHONUNBUFFERED=1
  if [[ -n ${NETWORK_INTERFACE:-} ]]; then
    export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE
  fi
  check_settings
  mkdir -p "$RUN_DIR/log" || fail "the run directory $RUN_DIR cannot be made on $(hostname)"
}

check_settings() {
  case $CONTAINER in
    none) ;;
    apptainer | pyxis) [[ -n ${CONTAINER_IMAGE:-} ]] || fail "CONTAINER=$CONTAINER needs CONTAINER_IMAGE" ;;
    *) fail "CONTAINER=$CONTAINER: it is none, apptainer or pyxis" ;;
  esac
  [[ $PROCS_PER_NODE =~ ^[1-9][0-9]*$ ]] || fail "PROCS_PER_NODE=$PROCS_PER_NODE is not a number of processes"
}

# The trainer's own --run.dir and --run.name count here too, or the job would look elsewhere.
run_dir_of() {
  local directory=runs/slurm_${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
  while (($#)); do
    case $1 in
      --run.dir=*) directory=${1#*=} ;;
      --run.name=*) directory=runs/${1#*=} ;;
      --run.dir) directory=${2:-} ;;
      --run.name) directory=runs/${2:-} ;;
    esac
    shift
  done
  echo "$directory"
}

# Slurm's own address of the first node: its name need not resolve.
head_address() {
  local head address
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  address=$(scontrol show node "$head" 2>/dev/null | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2 || true)
  echo "${address:-$head}"
}

# Runs a function of this file on every node, with the node's environment, and waits for it.
# Returns its exit status. A signal from Slurm ends `wait` early: it is waited for again.
on_nodes() {
  local pid rc
  # --cpu-bind=none: the launcher's processes share all cores of the job on a node.
  # shellcheck disable=SC2016  # expanded on the node
  srun --kill-on-bad-exit=1 --wait=60 --cpu-bind=none "${SRUN_GPUS[@]}" "${SRUN_CONTAINER[@]}" \
    "${NODE_CONTAINER[@]}" bash -c 'source "$CHECKOUT/slurm/common.sh"; on_node "$@"' node "$@" &
  pid=$!
  while :; do
    interrupted=0
    if wait "$pid"; then rc=0; else rc=$?; fi
    [[ $interrupted == 0 ]] && return "$rc"
  done
}

SRUN_GPUS=() SRUN_CONTAINER=() NODE_CONTAINER=()
choose_container() {
  local mounts=$CHECKOUT,$RUN_DIR${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
  case $CONTAINER in
    pyxis)
      local pairs
      pairs=$(tr ',' '\n' <<<"$mounts" | sed 's/^\([^:]*\)$/\1:\1/' | paste -sd,)
      SRUN_CONTAINER=(--container-image="$CONTAINER_IMAGE" --container-mounts="$pairs"
        --container-workdir="$CHECKOUT")
      ;;
    apptainer)
      NODE_CONTAINER=(apptainer exec --nv --bind "$mounts" --pwd "$CHECKOUT" "$CONTAINER_IMAGE")
      ;;
  esac
}

# A whole training job: prepare, train, look how it ended, submit it again if it wants to.
train() {
  prepare_job "$@"
  choose_container
  # On the signal the ranks are asked through a file: they agree, save the same step and leave.
  asked=no interrupted=0
  trap 'echo "requeue $SLURM_JOB_ID ${SLURM_RESTART_COUNT:-0}" >"$RUN_DIR/STOP"; asked=yes interrupted=1' USR1
  # Slurm ends the job: the ranks save on the same signal, this shell stays to write down how it went.
  trap 'interrupted=1' TERM
  job_record begin || exit 1
  local rc=0 verdict
  on_nodes train_here "$@" || rc=$?
  verdict=$(job_record end --code "$rc" --asked "$asked" --slurm "$(job_facts)" \
    --lost "$( ((rc == 0)) || lost_nodes)") || verdict=leave
  if [[ $verdict == requeue ]]; then
    scontrol requeue "$SLURM_JOB_ID" || exit 85 # saved, not finished: submit it again
    exit 0
  fi
  # ranks that saved and left exit with 0; a job that leads nowhere has failed all the same
  [[ $verdict != give-up || $rc != 0 ]] || rc=1
  exit "$rc"
}

# The processes of a job divide the shards; those that are done are skipped, so it may be repeated.
store_features() {
  prepare_job
  choose_container
  interrupted=0
  on_nodes launch dalr_scale features "$@"
}

# Reads and writes RUN/jobs/JOBID.json; needs nothing but the standard library.
job_record() {
  # shellcheck disable=SC2016  # expanded by the inner shell
  local command=(bash -c 'source "$CHECKOUT/slurm/common.sh"; enter_environment; exec python -m dalr_scale.cluster.job "$@"' job)
  if [[ $CONTAINER == pyxis ]]; then
    command=(srun --overlap --nodes=1 --ntasks=1 "${SRUN_CONTAINER[@]}" "${command[@]}")
  else
    command=("${NODE_CONTAINER[@]}" "${command[@]}")
  fi
  "${command[@]}" "$1" --run-dir "$RUN_DIR" "${@:2}"
}

# What Slurm says of this job, without the command line.
job_facts() {
  scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -vE '^ *(Command|Comment|JobName)=' || true
}

# Names of the job's nodes on which nothing can be started any more. A dead node shows minutes
# before Slurm gives it up; until then its job looks like any other failure.
lost_nodes() {
  job_facts | grep -q 'JobState=RUNNING' || return 0
  local all=() node found
  mapfile -t all < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  found=$(
    for node in "${all[@]}"; do
      timeout 40 srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --immediate=30 \
        --cpu-bind=none true >/dev/null 2>&1 || echo "$node" &
    done
    wait
  )
  # all of them: then it is Slurm that cannot be asked
  [[ $(wc -w <<<"$found") -lt ${#all[@]} ]] && paste -sd, <<<"$found"
}

# -- on each node ---------------------------------------------------------------------------------

# The node's environment and caches, then the given function, its output also in a file of the node.
on_node() {
  set -euo pipefail
  cd "$CHECKOUT"
  enter_environment
  local scratch=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/dalr-$SLURM_JOB_ID-$SLURM_NODEID
  (umask 077 && mkdir -p "$scratch") || fail "no scratch directory $scratch on $(node_name)"
  # node-local: on a shared file system the ranks of many nodes trip over each other's files
  export TRITON_CACHE_DIR=$scratch/triton TORCH_EXTENSIONS_DIR=$scratch/extensions
  export TORCHINDUCTOR_CACHE_DIR=$scratch/inductor
  local log=$RUN_DIR/log/node$SLURM_NODEID.log
  echo "=== job $SLURM_JOB_ID restart ${SLURM_RESTART_COUNT:-0} node $(node_name)" \
    "GPUs ${SLURM_STEP_GPUS:-none} $(date +%FT%T%z)" >>"$log" || fail "the run directory $RUN_DIR cannot be written on $(node_name)"
  # the command gets these signals itself; bash must outlive it, and tee both
  trap : TERM INT HUP QUIT USR1
  set +e
  "$@" 2>&1 | (
    trap '' TERM INT HUP QUIT USR1
    exec tee -a "$log"
  )
  local code=${PIPESTATUS[0]}
  rm -rf "$scratch"
  exit "$code"
}

node_name() { echo "${SLURMD_NODENAME:-$(hostname)}"; }

enter_environment() {
  if [[ -n ${ENV_SETUP:-} ]]; then
    set +u # what sites provide reads variables that are not set
    eval "$ENV_SETUP"
    set -u
  fi
  if [[ $CONTAINER == none && -x $VENV/bin/python ]]; then PATH=$VENV/bin:$PATH; fi
  # the code is this checkout's, also where packages come from an image
  export PYTHONPATH=$CHECKOUT:$CHECKOUT/kernels${PYTHONPATH:+:$PYTHONPATH}
  command -v accelerate-launch >/dev/null ||
    fail "no environment on $(node_name): no accelerate-launch in $VENV/bin nor on the PATH; run 'make env', or set VENV or ENV_SETUP"
}

check_node() {
  [[ ${DOCTOR:-yes} == no ]] ||
    python -m dalr_scale doctor --head "$HEAD_ADDR" --port "$PORT" --nodes "$SLURM_NNODES" \
      --node-rank "$SLURM_NODEID" --processes "$PROCS_PER_NODE" --run-dir "$RUN_DIR" -- "$@"
}

# launch MODULE ARGUMENTS: this node's share of the processes. No precision: the recipe decides.
# accelerate-launch is `accelerate launch` without loading accelerate's other commands, which
# costs more than the launch itself.
launch() {
  accelerate-launch --use_deepspeed --deepspeed_multinode_launcher standard \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * PROCS_PER_NODE))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD_ADDR" --main_process_port "$PORT" \
    --max_restarts 0 --mixed_precision no --dynamo_backend no \
    --tee 3 --log_dir "$RUN_DIR/log/ranks/node$SLURM_NODEID" -m "$@"
}

train_here() {
  check_node "$@" || return
  launch dalr_scale.train "$@" --run.dir "$RUN_DIR"
}
