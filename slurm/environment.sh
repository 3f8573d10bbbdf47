# shellcheck shell=bash
# The other scripts in this folder source this file. It prints --help, changes to the checkout and activates the Python
# environment.
#
#   EMMA_ENV        a file to source, or a shell command such as 'module load cuda; conda activate emma'.
#                   Default: the .venv that `make install` creates in the checkout, or else the python in the PATH.
#   EMMA_CONTAINER  a prefix for every python command, such as 'apptainer exec --nv /images/emma.sif'.
#   EMMA_SRUN       options for every srun, such as Pyxis's '--container-image=/images/emma.sqsh'.

fail() {
  echo "error: $*" >&2
  exit 2
}

if [[ ${1-} == -h || ${1-} == --help ]]; then # $0 is the script that sources this file
  sed -n '/^#!/d; /^#SBATCH/d; /^#/!q; s/^# \{0,1\}//p' "$0"
  exit
fi
unset CDPATH GREP_OPTIONS # with CDPATH, cd could change to another folder, and print its name
builtin cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit

arguments=("$@")
set -- # otherwise an activation script would see our arguments
set +u # activation scripts of conda and modules read unset variables
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
set -- "${arguments[@]}"

read -ra container <<<"${EMMA_CONTAINER-}"
python=("${container[@]}" python)
# After `sbatch --export=NONE`, srun would by default not pass our PATH and MASTER_ADDR to its tasks.
# shellcheck disable=SC2034
read -ra srun <<<"srun --export=ALL ${EMMA_SRUN-}"
command -v "${python[0]}" >/dev/null || fail "${python[0]} not found; run 'make install' in $PWD, or set EMMA_ENV"
export PYTHONUNBUFFERED=1
