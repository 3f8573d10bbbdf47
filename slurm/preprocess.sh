#!/usr/bin/env bash
#SBATCH --job-name=emma-shards
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Builds shards under SLURM: a Ray cluster inside the allocation, and in it the job that build_shards.py is.
# The same command goes on where it stopped: finished shards are not built again.
#
#   sbatch slurm/preprocess.sh MIX.toml --model PRESET --root DIR --out DIR [more of build_shards.py's options]
#
#   sbatch slurm/preprocess.sh preprocess/mixes/emma_1m2.toml --model emma_v2 --root /data/raw --out /data/shards
#   sbatch --nodes=4 --cpus-per-task=64 slurm/preprocess.sh …
#
# Variables: EMMA_ENV, EMMA_CONTAINER, EMMA_SRUN (slurm/environment.sh).
set -euo pipefail
# SLURM runs a copy of this script from its spool folder: the checkout is where sbatch was called.
checkout=${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}
[[ -d $checkout/slurm ]] || { echo "error: $checkout is not a checkout; call sbatch in a checkout" >&2 && exit 2; }
source "$checkout/slurm/environment.sh"
(($#)) || fail 'no mix given; --help has examples'
[[ ${SLURM_JOB_ID-} ]] || fail "this runs inside a SLURM job: sbatch slurm/preprocess.sh …"

# The job's working directory is a copy of the checkout, so a relative path would be looked for, or written, there.
previous=''
for word in "$@"; do
  [[ $previous != --root && $previous != --out || $word == /* ]] || fail "$previous $word: give an absolute path"
  previous=$word
done

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((26000 + 10 * (SLURM_JOB_ID % 600))) # ten of our own: several jobs may share a node
dashboard=http://127.0.0.1:$((port + 1))
submission=preprocess-$SLURM_JOB_ID
scratch=/tmp/ray-$SLURM_JOB_ID # short: Ray puts sockets in it, and their names may have 107 characters
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun stopped inheriting it in 22.05
# A token of this job's own: whoever else is on the node can reach the ports, and would run code as us.
RAY_AUTH_TOKEN=$("${python[@]}" -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token

# On every node, until the step is ended: ray_node PORT HEAD SCRATCH ray...
# shellcheck disable=SC2016
ray_node='
  port=$1 head=$2 scratch=$3 ray=("${@:4}")
  if ((SLURM_PROCID == 0)); then
    role=(--head --port="$port" --dashboard-host=127.0.0.1 --dashboard-port=$((port + 1))
          --ray-client-server-port=$((port + 2)))
  else
    role=(--address="$head:$port")
    until (: <"/dev/tcp/$head/$port") 2>/dev/null; do sleep 1; done
  fi
  exec "${ray[@]}" start "${role[@]}" --block --log-color=false --disable-usage-stats --temp-dir="$scratch" \
    --num-cpus="$SRUN_CPUS_PER_TASK" --num-gpus=0 --object-store-memory=1000000000 \
    --dashboard-agent-listen-port=$((port + 3)) --min-worker-port=0 --max-worker-port=0'

"${srun[@]}" --ntasks-per-node=1 --kill-on-bad-exit=1 \
  bash -c "$ray_node" ray_node "$port" "${hosts[0]}" "$scratch" "${container[@]}" ray &
cluster=$!

tear_down() {
  kill "$cluster" 2>/dev/null || true # srun then ends the whole step
  wait "$cluster" || true
  "${srun[@]}" --ntasks-per-node=1 rm -rf "$scratch" || true # a cancelled job gets no further step
}
trap tear_down EXIT

until (: <"/dev/tcp/127.0.0.1/$((port + 1))") 2>/dev/null; do
  kill -0 "$cluster" 2>/dev/null || fail "the Ray cluster did not start; its messages are above"
  sleep 1
done

"${container[@]}" ray job submit --log-color=false --address="$dashboard" --submission-id="$submission" \
  --working-dir=. -- python preprocess/build_shards.py "$@"

# A job that was stopped rather than finished makes submit exit 0 too.
status=$("${container[@]}" ray job status --address="$dashboard" "$submission")
[[ ${status,,} == *succeeded* ]] || fail "the Ray job $submission did not finish: $status"
