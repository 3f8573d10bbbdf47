#!/usr/bin/env bash
#SBATCH --job-name=emma-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
#
# Evaluates a model on the paper's benchmarks under SLURM, with one task per GPU. Each task answers a part of the
# questions. The same command resumes. A job is requeued near its time limit, after a preemption, and after a crash,
# unless it computed no answer since it started.
#
#   sbatch slurm/evaluate_emma.sh MODEL --tasks all|NAME... --data DIR [options of pipeline.evaluate]
#
#   sbatch slurm/evaluate_emma.sh models/v2 --tasks all --data /data/benchmarks --card
#   sbatch --gpus-per-node=1 --ntasks-per-node=1 slurm/evaluate_emma.sh models/v2 --tasks pope --data /data/benchmarks
#   sbatch --gpus-per-node=0 --ntasks-per-node=2 slurm/evaluate_emma.sh MODEL --tasks vsr --data DIR --device cpu
#
# Variables: EMMA_ENV, EMMA_CONTAINER, EMMA_SRUN (slurm/environment.sh), MAX_REQUEUES (20).
set -euo pipefail
# SLURM runs a copy of this script from its spool folder. The checkout is the folder in which sbatch was called.
checkout=${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}
[[ -d $checkout/slurm ]] || { echo "error: $checkout is not a checkout; call sbatch in a checkout" >&2 && exit 2; }
source "$checkout/slurm/environment.sh"
[[ ${1--} != -* ]] || fail 'no model given; --help has examples'
[[ ${SLURM_JOB_ID-} ]] || fail 'this runs inside a SLURM job: sbatch slurm/evaluate_emma.sh …'

out=${1%/}-evaluation previous=''
for word in "$@"; do
  [[ $previous != --out ]] || out=$word
  previous=$word
done

# In an array job, requeueing ARRAY_TASK requeues one task.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 6000))        # below the ephemeral ports, above the ports of Ray workers
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}         # since SLURM 22.05, srun does not inherit it
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}

bytes_of_answers() {
  local sizes
  sizes=$(find "$out/journal" -name '*.jsonl' -printf '+%s' 2>/dev/null) || true # there is none at first
  echo $((0$sizes))
}

# Each answer is in the journal as soon as it is computed, so the tasks can be ended at any time.
why=''
stop() {
  why=$1
  kill "$tasks" 2>/dev/null || true
}
trap 'stop "near the time limit"' USR1
trap 'stop "ended by SIGTERM"' TERM

before=$(bytes_of_answers)
"${srun[@]}" --label --kill-on-bad-exit=1 "${python[@]}" -m pipeline.evaluate "$@" &
tasks=$!
rc=0
wait "$tasks" || rc=$?
while kill -0 "$tasks" 2>/dev/null; do # a trap ended `wait`
  wait "$tasks" || rc=$?
done
((rc)) || exit 0

[[ $why || $(bytes_of_answers) -gt $before ]] || { echo "error: no answer was computed; not requeued" >&2 && exit "$rc"; }
((${SLURM_RESTART_COUNT:-0} < ${MAX_REQUEUES:-20})) ||
  fail "job $job was requeued ${SLURM_RESTART_COUNT:-0} times, the limit of MAX_REQUEUES; submit it again to resume"
# After scancel, the time limit or a preemption without grace time, the job is COMPLETING: it has ended, or SLURM itself
# requeues it.
state=$(scontrol --oneliner show job "$job" | tr ' ' '\n' | sed -n 's/^JobState=//p')
[[ $state == RUNNING ]] || { echo "the job is ${state:-unknown}, so it is not requeued" && exit "$rc"; }
echo "${why:-crashed with exit code $rc}; requeued"
scontrol requeue "$job" || fail "job $job was not requeued; submit it again to resume"
