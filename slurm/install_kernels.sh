#!/usr/bin/env bash
# Builds the fused kernels (mamba-ssm and causal-conv1d) from source for one GPU architecture, and installs them into
# EMMA_ENV, the checkout's .venv or the active Python environment. Needs an nvcc of the CUDA version that torch uses.
#
#   slurm/install_kernels.sh [--arch SM] [--wheels DIR]
#
#   slurm/install_kernels.sh                            # A100
#   slurm/install_kernels.sh --arch 90                  # H100, H200
#   srun --gpus=1 --cpus-per-task=16 slurm/install_kernels.sh    # on a GPU node: also tests the kernels
#
#   --arch SM      80 for A100 (default), 90 for H100 and H200
#   --wheels DIR   keep the wheels in DIR; install them elsewhere with: pip install --no-deps DIR/*.whl
#
# `pip install` is not sufficient for three reasons: by default, the packages compile nine architectures; they must be
# built against the installed torch; and mamba-ssm requires packages that Mamba-1 and Mamba-2 never import.
#
# Without network access, set PIP_NO_INDEX=1 and PIP_FIND_LINKS=DIR, where DIR contains the source packages of mamba-ssm
# and causal-conv1d, and einops and ninja.
set -euo pipefail

arch=80 wheels=''
while (($#)); do
  case $1 in
    -h | --help)
      sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"
      exit
      ;;
    --arch | --wheels)
      (($# > 1)) || { echo "error: $1: needs a value; see --help" >&2 && exit 2; }
      if [[ $1 == --arch ]]; then arch=$2; else wheels=$(mkdir -p "$2" && realpath "$2"); fi
      shift 2
      ;;
    *) echo "error: $1: unknown option; see --help" >&2 && exit 2 ;;
  esac
done

unset CDPATH # otherwise cd could change to another folder
builtin cd "$(dirname "$0")/.."
source slurm/environment.sh

"${python[@]}" -c 'import torch; assert torch.version.cuda' 2>/dev/null || fail "no torch with CUDA; run make install"
"${python[@]}" -c 'from torch.utils.cpp_extension import CUDA_HOME; assert CUDA_HOME' 2>/dev/null ||
  fail "nvcc was not found; load the CUDA module, or set CUDA_HOME"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
wheels=${wheels:-$work/wheels}
pip=("${python[@]}" -m pip --disable-pip-version-check)
# FORCE_BUILD prevents the download of prebuilt wheels. `unpack` sets SKIP_CUDA_BUILD, because `pip download` runs the
# setup script but needs no kernels.
export MAX_JOBS=${MAX_JOBS:-$(nproc)} MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE
# The backward pass of causal-conv1d is one large file. Since CUDA 12.1, nvcc can compile a file on several cores.
nvcc=$("${python[@]}" -c 'from torch.utils.cpp_extension import CUDA_HOME; print(f"{CUDA_HOME}/bin/nvcc")')
[[ $("$nvcc" --help) != *--split-compile* ]] || export NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS-} --split-compile=0"

mapfile -t requirements < <("${python[@]}" -c '
from importlib.metadata import requires
for line in requires("emma-pipeline"):
    requirement, _, marker = line.partition(";")
    if "gpu" in marker:
        print(requirement.strip())')

keep_one_architecture() { # keep_one_architecture SETUP.PY NAME
  "${python[@]}" - "$1" "$2" "$arch" <<'PYTHON'
import re, sys
from pathlib import Path

file, name, arch = Path(sys.argv[1]), *sys.argv[2:]
flag = re.compile(r'cc_flag\.append\("-gencode"\)\s*cc_flag\.append\("arch=compute_(\d+),code=sm_\d+"\)')
known = flag.findall(text := file.read_text())
if arch not in known:
    choices = ", ".join(known) or "no architecture that this script can find"
    print(f"error: --arch {arch}: {name} compiles {choices}", file=sys.stderr)
    sys.exit(2)
file.write_text(flag.sub(lambda match: match[0] if match[1] == arch else "pass", text))
PYTHON
}

unpack() { # unpack REQUIREMENT FOLDER
  mkdir "$2"
  MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE \
    "${pip[@]}" download -q --no-deps --no-binary :all: --no-build-isolation -d "$2" "$1"
  tar -xzf "$2"/*.tar.gz -C "$2" --strip-components=1
  keep_one_architecture "$2/setup.py" "$1"
}

build() { # build FOLDER
  "${pip[@]}" wheel -q --no-deps --no-build-isolation -w "$wheels" "$1" >"$1.log" 2>&1 ||
    { tail -n 40 "$1.log" >&2 && fail "$(basename "$1") did not build; the end of its log is above"; }
}

"${pip[@]}" install -q setuptools wheel packaging ninja einops # for the build; einops is also imported at run time
builds=()
for requirement in "${requirements[@]}"; do
  name=${requirement%%[<>=!~]*}
  unpack "$requirement" "$work/$name"
  echo "building $requirement for sm_$arch with $MAX_JOBS jobs; this takes minutes"
  build "$work/$name" &
  builds+=($!)
done
for each in "${builds[@]}"; do
  wait "$each"
done
"${pip[@]}" install -q --no-deps --force-reinstall "$wheels"/{mamba_ssm,causal_conv1d}-*.whl

# Import the kernels as the model does. On a GPU, compare them with the plain torch reference.
"${python[@]}" - <<'PYTHON'
import torch
from model.kernels import dispatch

dispatch.fused()
if not torch.cuda.is_available():
    print("the kernels are installed and can be imported; not tested, because there is no GPU here")
    raise SystemExit
torch.manual_seed(0)
b, l, h, p, s = 2, 512, 4, 64, 32
x, B, C = torch.randn(b, l, h, p), torch.randn(b, l, 1, s), torch.randn(b, l, 1, s)
wide, weight, bias = torch.randn(b, l, h * p), torch.randn(h * p, 4), torch.randn(h * p)
scan = (wide, torch.randn(b, l, h * p), -torch.rand(h * p, s), B[:, :, 0], C[:, :, 0], torch.randn(h * p), None, bias)
ssd = (x, torch.randn(b, l, h), -torch.rand(h), B, C, torch.randn(h), torch.randn(h))
for name, ours, arguments, more in (
    ("causal convolution", dispatch.causal_conv, (wide, weight, bias), ()),
    ("Mamba-1 scan", lambda *a: dispatch.selective_scan(*a)[0], scan, ()),
    ("Mamba-2 scan", lambda *a: dispatch.ssd(*a)[0], ssd, (256,)),
):
    expected = ours(*arguments, *more)
    found = ours(*(a if a is None else a.cuda() for a in arguments), *more).cpu()
    error = ((found - expected).norm() / expected.norm()).item()
    print(f"{name:20} relative difference from the reference {error:.1e}")
    if not error < 1e-2:
        raise SystemExit(f"error: {name}: the kernel differs from the reference (expected less than 1e-2)")
print(dispatch.kernel_report("cuda"))
PYTHON
