#!/usr/bin/env bash
#SBATCH --job-name=emma
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
#
# Trains a recipe under SLURM, with one task per GPU. The same command resumes. docs/slurm.md explains when a job is
# requeued.
#
#   sbatch slurm/train_emma.sh RECIPE [key=value ...]
#
#   sbatch slurm/train_emma.sh pipeline/recipes/emma_v2.toml data.shards=/data/shards run.dir=/runs/v2
#   sbatch --nodes=2 slurm/train_emma.sh pipeline/recipes/emma_v2.toml data.shards=/data/shards run.dir=/runs/v2
#   sbatch --array=1-3 slurm/train_emma.sh RECIPE seed=%a run.dir=/runs/seed-%a     # %a is the number of the array task
#   sbatch --gpus-per-node=0 --ntasks-per-node=2 slurm/train_emma.sh RECIPE engine.device=cpu
#   DRY_RUN=1 bash slurm/train_emma.sh RECIPE [key=value ...]                       # only prints what the job would do
#
# Variables: EMMA_ENV, EMMA_CONTAINER, EMMA_SRUN (slurm/environment.sh), MAX_REQUEUES (20), MAX_FRUITLESS (3), DRY_RUN.
set -euo pipefail
trap 'echo "error: SIGUSR1 arrived before training began; --time must be longer than --signal" >&2; exit 2' USR1
# SLURM runs a copy of this script from its spool folder. The checkout is the folder in which sbatch was called.
checkout=${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}
[[ -d $checkout/slurm ]] || { echo "error: $checkout is not a checkout; call sbatch in a checkout" >&2 && exit 2; }
source "$checkout/slurm/environment.sh"
(($#)) || fail 'no recipe given; --help has examples'

# -- Settings ------------------------------------------------------------------------------------------------------

directive() { sed -n "s/^#SBATCH --$1=//p" "$0"; }

# In an array job, requeueing ARRAY_TASK requeues one task. SLURM_JOB_ID of the last task is the id of the whole array,
# so requeueing that id would requeue all tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-${SLURM_JOB_ID:-none}}
export EMMA_JOB=$job # if set, pipeline.train leaves old requests to this script, and writes control/refused for it
recipe=("$@")
if [[ ${SLURM_ARRAY_TASK_ID-} ]]; then
  for word in "$@"; do # otherwise task 3 would read sh3rds in place of sh%ards
    [[ $word != *%a[[:alpha:]]* ]] || fail "$word: %a is the number of the array task, and a letter follows it; rename it"
  done
  recipe=("${@//%a/$SLURM_ARRAY_TASK_ID}")
fi
run=$("${python[@]}" -m pipeline.recipe "${recipe[@]}" --get run.dir)
control=$run/control stop=$run/control/stop starts=$run/control/starts.tsv

if [[ ${SLURM_JOB_ID-} ]]; then
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=${hosts[0]}
  export MASTER_PORT=$((20000 + SLURM_JOB_ID % 6000)) # below the ephemeral ports, above the ports of Ray workers
else
  MASTER_ADDR='(first node)' MASTER_PORT='(20000 + job id modulo 6000)'
fi
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$(directive cpus-per-task)} # since 22.05, srun does not inherit it
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
command=("${srun[@]}" --label --kill-on-bad-exit=1 "${python[@]}" -m pipeline.train "${recipe[@]}")

# -- May this job start? Checked here as well as before a requeue, because SLURM requeues too (preemption, lost nodes) -

# Print the step of the newest checkpoint, or 0. Like training, look at the folders, because `latest` may be missing or
# damaged.
step_saved() {
  local manifest step=0
  for manifest in "$run"/checkpoints/step-*/manifest.json; do
    [[ -e $manifest && $manifest =~ /step-([0-9]{8,18})/manifest.json$ ]] || continue
    ((10#${BASH_REMATCH[1]} <= step)) || step=$((10#${BASH_REMATCH[1]}))
  done
  echo "$step"
}

# Print two numbers: how often this job was launched before, and how many of the last launches in a row began at the
# step of this launch.
earlier_starts() {
  [[ -f $starts ]] || { echo 0 0; return; }
  awk -F '\t' -v job="$job" -v step="$step" \
    '$2 == job { all++; same = $3 == step ? same + 1 : 0 } END { print all + 0, same + 0 }' "$starts"
}

# Print the id of another job that is training in this run folder, if there is one.
rival() {
  [[ -f $starts ]] || return 0
  local last
  last=$(tail -n 1 "$starts" | cut -f 2)
  [[ $last == "$job" ]] || squeue --noheader --states=running,completing --format=%i --jobs="$last" 2>/dev/null || true
}

max_requeues=${MAX_REQUEUES:-20} max_fruitless=${MAX_FRUITLESS:-3}
refuse_another_start() { # EARLIER FRUITLESS [WHY]: number of launches so far, and of those in a row at the same step
  local then="${3:+: $3}; see the log, then submit again"
  (($1 <= max_requeues)) ||
    fail "$run: job $job was requeued $max_requeues times, the limit of MAX_REQUEUES$then"
  (($2 < max_fruitless)) ||
    fail "$run: job $job started $2 times at step $step without progress$then"
}

step=$(step_saved)
read -r earlier fruitless < <(earlier_starts)

if [[ ${DRY_RUN-} == 1 ]]; then
  nodes=${SLURM_JOB_NUM_NODES:-$(directive nodes)} tasks=${SLURM_NTASKS_PER_NODE:-$(directive ntasks-per-node)}
  cat <<PLAN
checkout     $PWD
run folder   $run, at step $step
tasks        $((nodes * tasks)) = $nodes nodes x $tasks, $SRUN_CPUS_PER_TASK CPUs each
environment  MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT
             SRUN_CPUS_PER_TASK=$SRUN_CPUS_PER_TASK OMP_NUM_THREADS=$OMP_NUM_THREADS EMMA_JOB=$EMMA_JOB
command      ${command[*]@Q}
on USR1      touch $stop, wait for the save, scontrol requeue $job
requeues     $earlier so far, at most $max_requeues
PLAN
  exit
fi

other=$(rival)
[[ ! $other ]] || fail "$run: job $other is training in this folder; cancel it or choose another run.dir"
refuse_another_start "$earlier" "$fruitless"

mkdir -p "$control" || fail "$run: cannot be written; choose another run.dir"
why=submitted
[[ ! ${SLURM_RESTART_COUNT-} ]] || why='by SLURM: preempted, or a node was lost'
[[ ! -f $control/requeued ]] || IFS=$'\t' read -r requeued because <"$control/requeued" || true
[[ ${requeued-} != "$job" ]] || why=$because # otherwise the file is from a job that was cancelled
rm -f "$control"/{stop,save,refused,requeued} # from the previous launch; pipeline.train does not remove them in a job
printf '%s\t%s\t%s\t%s\n' "$(date -u +%FT%TZ)" "$job" "$step" "$why" >>"$starts"

# -- Train ---------------------------------------------------------------------------------------------------------

# SLURM sends the signal only to this script. The script passes the request to the ranks as a file, because a signal to
# the ranks would also end their helper processes. The file contains the signal's name, or nothing if a person created
# it. If there are several requests, the first one counts.
warned='' interrupted=''
ask_to_stop() {
  interrupted=1
  echo "$1: asked the run to save and stop"
  echo "$1" >"$stop.new"
  mv --no-clobber "$stop.new" "$stop" || true
  rm -f "$stop.new"
}
trap 'warned=1; ask_to_stop SIGUSR1' USR1
trap 'ask_to_stop SIGTERM' TERM
by_hand() { [[ -e $stop ]] && ! grep --quiet ^SIG "$stop"; }

outcome_stamp() { stat --format='%i %y' "$run/outcome.json" 2>/dev/null || true; }
before=$(outcome_stamp) # the file of the previous launch remains until training replaces it

"${command[@]}" &
while :; do
  rc=0
  wait $! || rc=$?
  [[ $interrupted ]] || break
  interrupted='' # a trap ended `wait`, but the ranks are still saving
done

# -- Requeue? ------------------------------------------------------------------------------------------------------

# Retry COMMAND for two minutes, because a busy or restarting controller must not end the run.
retry() { # COMMAND…
  local pause
  for pause in 1 2 5 10 20 40 42; do
    "$@" && return
    sleep "$pause"
  done
  "$@"
}

job_field() {
  local facts
  facts=$(retry scontrol --oneliner show job "$job") ||
    fail "job $job: the controller does not answer, so the job is not requeued; submit it again to resume"
  tr ' ' '\n' <<<"$facts" | sed -n "s/^$1=//p"
}

# Requeue the job and exit, unless SLURM ends or requeues it itself, or the job may not start again.
requeue() { # WHY STEP STEP_NOW: the reason, and the steps at which this launch began and ended
  # After scancel, the time limit or a preemption without grace time, the job is COMPLETING. Then it has ended for good,
  # or SLURM requeues it. In a preemption with grace time, SLURM signals only the ranks, and does not requeue the job if
  # it ends in time.
  local state
  state=$(job_field JobState) || exit
  [[ $state == RUNNING ]] || { echo "$1; the job is ${state:-unknown}, so it is not requeued" && exit "$rc"; }
  (($3 > $2)) && fruitless=0 || fruitless=$((fruitless + 1))
  refuse_another_start $((earlier + 1)) "$fruitless" "$1"
  echo "$1; requeued"
  printf '%s\t%s\n' "$job" "$1" >"$control/requeued"
  retry scontrol requeue "$job" || fail "job $job: the controller did not requeue the job; submit it again to resume"
  exit
}

preempted() {
  local when
  when=$(job_field PreemptTime) || exit
  [[ $when == *[0-9]* ]]
}

# Return whether training refused a launch of this job. control/refused may also name other jobs, which were refused
# because this job trains in the run folder.
refused() { grep --quiet --no-messages "^$job"$'\t' "$control/refused"; }

outcome='' reason=''
if [[ -f $run/outcome.json && $(outcome_stamp) != "$before" ]]; then
  IFS=$'\t' read -r outcome step_now step_then reason < <("${python[@]}" -c 'import json, sys
sys.stdout.reconfigure(errors="backslashreplace")
word = json.load(open(sys.argv[1], encoding="utf-8", errors="replace"))
print(*(" ".join(str(word[key]).split()) for key in ("outcome", "step", "from_step", "reason")), sep="\t")
' "$run/outcome.json" 2>/dev/null) || true # a damaged file counts as no file
fi
if [[ ! $outcome ]] && { ((rc == 2 || rc == 3)) || refused; }; then outcome=refused; fi
((rc == 0)) && [[ ! $outcome ]] && fail "$run: training ended without outcome.json"

case $outcome in
  done) echo "done at step $step_now" ;;
  stopped)
    echo "stopped at step $step_now $reason"
    if [[ $reason == 'by hand' ]]; then
      exit 0
    elif [[ $warned ]]; then
      ((step_now > step_then)) ||
        fail "$run: no step was finished between the start and the signal; --time must be longer than --signal"
      requeue 'warned of the time limit' "$step_then" "$step_now"
    elif [[ $reason == 'by SIGUSR1' ]]; then # scancel --signal=USR1 without --batch signals only the ranks
      requeue "$reason" "$step_then" "$step_now"
    elif preempted; then
      requeue 'preempted' "$step_then" "$step_now"
    fi
    ;;
  refused | failed)
    echo "error: $run: training $outcome for the reason above; not requeued. Fix the cause, then submit again" >&2
    exit $((rc ? rc : 1))
    ;;
  *) # lost: the run crashed, or a watchdog ended it
    ! by_hand || { echo "stopped by hand, but lost before the save was finished; not requeued" && exit "$rc"; }
    ((rc != 143)) || reason=${reason:-terminated before the first step}
    requeue "${reason:-crashed with exit code $rc}" "$step" "$(step_saved)"
    ;;
esac
