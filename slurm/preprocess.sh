#!/usr/bin/env bash
#SBATCH --job-name=emma-shards
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Builds shards under SLURM: starts a Ray cluster in the allocation and submits build_shards.py to it.
# The same command continues an unfinished build, and does not build finished shards again.
#
#   sbatch slurm/preprocess.sh MIX.toml --model PRESET --root DIR --out DIR [options of build_shards.py]
#
#   sbatch slurm/preprocess.sh preprocess/mixes/emma_1m2.toml --model emma_v2 --root /data/raw --out /data/shards
#   sbatch --nodes=4 --cpus-per-task=64 slurm/preprocess.sh …
#
# Variables: EMMA_ENV, EMMA_CONTAINER, EMMA_SRUN (slurm/environment.sh).
set -euo pipefail
# SLURM runs a copy of this script from its spool folder. The checkout is the folder in which sbatch was called.
checkout=${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}
[[ -d $checkout/slurm ]] || { echo "error: $checkout is not a checkout; call sbatch in a checkout" >&2 && exit 2; }
source "$checkout/slurm/environment.sh"
(($#)) || fail 'no mix given; --help has examples'
[[ ${SLURM_JOB_ID-} ]] || fail "this runs inside a SLURM job: sbatch slurm/preprocess.sh …"

# The working directory of the job is a copy of the checkout, so relative paths would refer to that copy.
previous=''
for word in "$@"; do
  [[ $previous != --root && $previous != --out || $word == /* ]] || fail "$previous $word: give an absolute path"
  previous=$word
done

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((26000 + 10 * (SLURM_JOB_ID % 600))) # ten ports per job, because several jobs may share a node
dashboard=http://127.0.0.1:$((port + 1))
submission=preprocess-$SLURM_JOB_ID
scratch=/tmp/ray-$SLURM_JOB_ID # short, because the path of a socket of Ray may have at most 107 characters
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since SLURM 22.05, srun does not inherit it
# Ray requires this token. Without it, other users of the node could reach the ports and run code as this user.
RAY_AUTH_TOKEN=$("${python[@]}" -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
# Connect to these nodes directly, and not through the proxy that http_proxy names.
addresses=$(getent hosts "${hosts[@]}" | tr -s ' \n' ,) || true
no_proxy=${no_proxy-},${NO_PROXY-},localhost,127.0.0.1,::1,$(IFS=, && echo "${hosts[*]}"),$addresses
[[ $no_proxy != *,\*,* ]] || no_proxy='*' # `*` has this meaning only if it stands alone
export no_proxy NO_PROXY=$no_proxy

# Runs on every node until the step ends. Arguments: PORT HEAD SCRATCH ray…
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
  kill "$cluster" 2>/dev/null || true # srun then ends the step on all nodes
  wait "$cluster" || true
  "${srun[@]}" --ntasks-per-node=1 rm -rf "$scratch" || true # fails in a cancelled job, because it cannot start a step
}
trap tear_down EXIT

until (: <"/dev/tcp/127.0.0.1/$((port + 1))") 2>/dev/null; do
  kill -0 "$cluster" 2>/dev/null || fail "the Ray cluster did not start; its output is above"
  sleep 1
done

"${container[@]}" ray job submit --log-color=false --address="$dashboard" --submission-id="$submission" \
  --working-dir=. -- python preprocess/build_shards.py "$@"

# `ray job submit` also exits with 0 for a job that was stopped, so check the status.
status=$("${container[@]}" ray job status --address="$dashboard" "$submission")
[[ ${status,,} == *succeeded* ]] || fail "the Ray job $submission did not finish: $status"
