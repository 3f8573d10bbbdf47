# shellcheck shell=bash
# Sourced by the batch scripts: goes to the checkout and enters its Python environment.
#
# SLURM runs a copy of a batch script from its spool folder, so the checkout is where sbatch was called.
#   EMMA_ENV        a file to source, or a line of shell such as 'module load cuda; conda activate emma'.
#                   Default: the checkout's .venv (`make install`), else whatever python is in the PATH.
#   EMMA_CONTAINER  words put before every python, such as 'apptainer exec --nv /images/emma.sif'.

fail() {
  echo "error: $*" >&2
  exit 2
}

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit
[[ -f slurm/environment.sh ]] || fail "$PWD is not a checkout of emma-pipeline: call sbatch in the checkout"

set +u # activation scripts of conda and modules read variables that are not set
if [[ -f ${EMMA_ENV-} ]]; then
  # shellcheck disable=SC1090
  source "$EMMA_ENV"
elif [[ $EMMA_ENV ]]; then
  eval "$EMMA_ENV"
elif [[ -f .venv/bin/activate ]]; then
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi
set -u

read -ra container <<<"${EMMA_CONTAINER-}"
python=("${container[@]}" python)
command -v "${python[0]}" >/dev/null || fail "no ${python[0]} in the PATH: run 'make install' in $PWD, or set EMMA_ENV"
export PYTHONUNBUFFERED=1
