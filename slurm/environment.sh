# shellcheck shell=bash
# Sourced by the scripts beside it: answers --help, goes to the checkout, enters the Python environment.
#
#   EMMA_ENV        a file to source, or a line of shell such as 'module load cuda; conda activate emma'.
#                   Default: the checkout's .venv (`make install`), else whatever python is in the PATH.
#   EMMA_CONTAINER  words put before every python, such as 'apptainer exec --nv /images/emma.sif'.
#   EMMA_SRUN       words put after every srun, such as Pyxis's '--container-image=/images/emma.sqsh'.

fail() {
  echo "error: $*" >&2
  exit 2
}

if [[ ${1-} == -h || ${1-} == --help ]]; then # the words and the name of the script that sources this
  sed -n '/^#!/d; /^#SBATCH/d; /^#/!q; s/^# \{0,1\}//p' "$0"
  exit
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

words=("$@")
set -- # an activation script would take our words for its own
set +u # and those of conda and modules read variables that are not set
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
set -- "${words[@]}"

read -ra container <<<"${EMMA_CONTAINER-}"
python=("${container[@]}" python)
# sbatch --export=NONE is about this script; of itself srun would keep our PATH and MASTER_ADDR from its tasks too.
# shellcheck disable=SC2034
read -ra srun <<<"srun --export=ALL ${EMMA_SRUN-}"
command -v "${python[0]}" >/dev/null || fail "no ${python[0]} in the PATH: run 'make install' in $PWD, or set EMMA_ENV"
export PYTHONUNBUFFERED=1
