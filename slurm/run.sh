# What a job does. Sourced by the scripts of launch/, which set CONFIG and carry the #SBATCH lines.
# shellcheck shell=bash
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() { echo "${CONFIG}: error: $*" >&2; exit 2; }

case "${1:-}" in -h | --help)
  cat <<EOF
Trains ${CONFIG} (train_configs/${CONFIG}.yaml).

  sbatch ${LAUNCH:-launch/NAME.sh} [--section.key value ...]              on Slurm, as many nodes as the script asks for
  sbatch --nodes=32 ${LAUNCH:-launch/NAME.sh} ...                         on fewer, with the same global batch
  bash ${LAUNCH:-launch/NAME.sh} [--section.key value ...]                on this machine (launch/local.sh)

Options: python -m sgt_titan.cli train --help. Site facts: slurm/site.env, see slurm/site.env.example. Guide: docs/CLUSTER.md
EOF
  exit 0 ;;
esac

# Notices to stop. They may come before there is anything to pass them on to, or to ranks that are not yet listening, so
# they are repeated; a rank that has heard one does not mind.
step='' noticed=''
pass_on() {
  noticed=$1
  [ -z "$step" ] || while kill -"$1" "$step" 2>/dev/null; do sleep 15; done &
}
trap 'pass_on USR1' USR1 # near the time limit
trap 'pass_on TERM' TERM # preemption

[ -n "${SLURM_JOB_ID:-}" ] || exec bash "$root/launch/local.sh" "$CONFIG" "$@"

# -- the site ----------------------------------------------------------------------------------------------------------
site=${SGT_SITE:-$root/slurm/site.env}
[ -f "$site" ] || fail "$site is missing; copy slurm/site.env.example there and edit it"
set +u # neither a site's file nor what activates an environment is written for it
# shellcheck source=/dev/null
. "$site"
for name in SGT_ACTIVATE SGT_SHARED; do
  [ -n "${!name:-}" ] || fail "$site: $name is not set; slurm/site.env.example says what it is for"
done
[[ $SGT_SHARED == /* ]] || fail "$site: SGT_SHARED=$SGT_SHARED must be an absolute path: every node has another working directory"
mkdir -p "$SGT_SHARED" 2>/dev/null || fail "$site: SGT_SHARED=$SGT_SHARED cannot be made"
eval "$SGT_ACTIVATE" || fail "$site: SGT_ACTIVATE ended with exit code $?"
set -u
cd "$root"
# What decides about ranks, networks and containers is told to the processes that judge and explain.
export SGT_ACTIVATE SGT_WRAP=${SGT_WRAP:-} ${SGT_PROCS_PER_NODE+SGT_PROCS_PER_NODE}

# -- the allocation ----------------------------------------------------------------------------------------------------
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID} # an array's task, not the array
restart=${SLURM_RESTART_COUNT:-0} most=${SGT_MAX_RESTARTS:-50}
[ "$restart" -le "$most" ] || fail "$restart restarts, $most are allowed (SGT_MAX_RESTARTS)" # Slurm counts none of its own
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
# Other jobs and earlier attempts listen elsewhere; outgoing connections have ports from 32768 on.
port=$((20000 + (SLURM_JOB_ID * 17 + restart) % 12000))

# A config of the user's own says its size itself; only a new job can have it.
if [ -n "${SIZED_BY_CONFIG:-}" ] && [ "$restart" = 0 ] && [ -z "${SGT_RESIZED:-}" ]; then
  wanted=$(python -m sgt_titan.cluster.job size "$CONFIG" "$@") || exit 2
  if [ -n "$wanted" ]; then # what sbatch was told otherwise is the job's own record
    read -r -a size <<<"$wanted"
    echo "${CONFIG}: its cluster is ${size[*]}; submitted as another job (--cluster.nodes N, or sbatch --nodes and GPUs, change it)"
    script=$(scontrol show job "$job" -o | sed 's/.* Command=\([^ ]*\).*/\1/')
    (
      conf=${SLURM_CONF:-} from=${SLURM_SUBMIT_DIR:-$root}
      unset "${!SLURM_@}" # they are of this job, and sbatch and srun would take some of them for options
      [ -z "$conf" ] || export SLURM_CONF=$conf
      SGT_RESIZED=1 exec sbatch --chdir="$from" "${size[@]}" "$script" "$CONFIG" "$@"
    ) || fail "sbatch refused; submit with ${size[*]} yourself"
    exit 0
  fi
fi

# -- before ------------------------------------------------------------------------------------------------------------
assignments=$(python -m sgt_titan.cluster.job begin "$CONFIG" --nodes "$SLURM_NNODES" --shared "$SGT_SHARED" --script "$0" \
  --pid $$ "$@") || exit 2
eval "$assignments" # OUTPUT_DIR, LOGS and PROCS, or FINISHED
[ -z "${FINISHED:-}" ] || exit 0
words=("$@" --run.output_dir "$OUTPUT_DIR")
again="sbatch ${LAUNCH:-launch/NAME.sh}$(printf ' %q' "$@")"

# -- after -------------------------------------------------------------------------------------------------------------
ask() { # a command of the controller, which may be away for some minutes
  for _ in $(seq 60); do "$@" && return || sleep 10; done
  return 1
}

after() { # CODE: what the run says of its end decides, see sgt_titan/cluster/attempts.py
  local decision without told
  [ -z "${follower:-}" ] || kill "$follower" 2>/dev/null || true
  decision=$(python -m sgt_titan.cluster.job end "$OUTPUT_DIR" --logs "$LOGS" --restarts "$restart" --max-restarts "$most" \
    --most-in-vain "${SGT_MAX_IN_VAIN:-3}" --again "$again")
  case $decision in
    done) exit 0 ;;
    requeued) sleep 300 ;; # until Slurm ends this script; leaving now would complete the job
    requeue)
      # scancel means stop: its job is no longer running by the time we are here.
      told=$(ask scontrol show job "$job" -o) || true
      [[ $told =~ JobState=RUNNING ]] || { echo "not requeued: $(grep -o 'JobState=[A-Z_]*' <<<"$told")" >&2; exit 1; }
      without=$(python -m sgt_titan.cluster.preflight excluded "$OUTPUT_DIR")
      if [[ -n $without && $told =~ ExcNodeList=([^ \(]+) ]]; then without+=,${BASH_REMATCH[1]}; fi # sbatch --exclude
      ask scontrol requeue "$job"
      # Only a pending job can be told what to avoid. We are being ended by now, but not at once.
      [ -z "$without" ] || for _ in $(seq 20); do
        scontrol update JobId="$job" ExcNodeList="$without" && break || sleep 0.2
      done
      sleep 300
      ;;
  esac
  exit $(($1 ? $1 : 1))
}

# -- preflight ---------------------------------------------------------------------------------------------------------
export SGT_HEAD=$head SGT_PREFLIGHT_PORT=$((port + 1))
if [ "${SGT_PREFLIGHT:-1}" != 0 ]; then
  export SGT_REPORTS=$OUTPUT_DIR/preflight/$job.$restart
  mkdir -p "$SGT_REPORTS"
  seconds=${SGT_PREFLIGHT_SECONDS:-90} ended=0 fit=0
  # The shell says that it was started at all, before a container or Python can fail: without that nobody is to blame.
  # shellcheck disable=SC2016
  timeout "$seconds" srun --ntasks=$((SLURM_NNODES * PROCS)) --ntasks-per-node="$PROCS" --output="$LOGS/preflight-%N.log" \
    --open-mode=append bash -c '
      report=$SGT_REPORTS/$SLURMD_NODENAME-$SLURM_LOCALID.json
      printf "{\"node\": \"%s\", \"process\": %s, \"index\": %s, \"phase\": \"begun\", \"errors\": {}, \"address\": null}" \
        "$SLURMD_NODENAME" "$SLURM_LOCALID" "$SLURM_NODEID" >"$report.begun" && mv "$report.begun" "$report"
      exec $SGT_WRAP python -m sgt_titan.doctor "$@"' \
    doctor "$CONFIG" "${words[@]}" --reports "$SGT_REPORTS" --deadline $((seconds * 2 / 3)) || ended=$?
  [ "$ended" != 143 ] || noticed=TERM # preemption is told to the step alone; a timeout would be 124
  python -m sgt_titan.cluster.preflight verdict "$OUTPUT_DIR" --reports "$SGT_REPORTS" --processes "$PROCS" \
    --partition "${SLURM_JOB_PARTITION:-}" --notice "${noticed:+SIG$noticed}" --logs "$LOGS" --seconds "$seconds" \
    --nodes "${nodes[@]}" || fit=$?
  [ "$fit" = 0 ] || after "$fit"
fi

# -- the attempt -------------------------------------------------------------------------------------------------------
# Signals reach every process of the step. torchrun would end its workers at once, so it ignores them, and the workers,
# which install handlers of their own, save and end.
export SGT_PORT=$port SGT_PROCS=$PROCS SGT_LOGS=$LOGS SGT_RDZV=$job.$restart
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --output="$LOGS/%N.log" --open-mode=append \
  bash -c '
    trap "" USR1 TERM
    exec $SGT_WRAP python -m torch.distributed.run --nnodes="$SLURM_NNODES" --nproc-per-node="$SGT_PROCS" \
      --max-restarts=0 --signals-to-handle=SIGINT --rdzv-backend=c10d --rdzv-endpoint="$SGT_HEAD:$SGT_PORT" \
      --rdzv-id="$SGT_RDZV" --rdzv-conf=is_host=$([ "$SLURM_NODEID" = 0 ] && echo 1 || echo 0) \
      --log-dir="$SGT_LOGS" --redirects=3 --tee=3 -m sgt_titan.train "$@"' \
  train "$CONFIG" "${words[@]}" 2> >(tee -a "$LOGS/srun.log" >&2) &
step=$!
python -m sgt_titan.cluster.job follow "$OUTPUT_DIR" &
follower=$!
disown "$follower" # nothing is to be said of its end
[ -z "$noticed" ] || pass_on "$noticed" # srun passes signals on to the ranks
code=0
while :; do # a trap interrupts wait, which would print the whole command where a signal ended it
  { wait "$step" && code=0 || code=$?; } 2>/dev/null
  kill -0 "$step" 2>/dev/null || break
done

after "$code"
