#!/usr/bin/env bash
# Sets up Python, then hands over to run.py. Works from any folder; relative paths are relative to the current one.
#   bash run.sh                      list recipes, tables and commands
#   bash run.sh RECIPE [options]     train (or continue), sample, score, plot: a recipe by name, or a YAML file
#   bash run.sh resume RUN           continue a run folder under its own settings
#   bash run.sh COMMAND …            sample, fid, plot, report, convert, …; each has --help
#   bash run.sh check [RECIPE]       is this machine right, and which settings are fastest on it?
#   bash run.sh test [options]       the tests (pytest's options);  bash run.sh lint: style
#   bash run.sh stress [NAME …]      break runs on purpose, for half an hour, and print a table (docs/reliability.md)
#
# Python: the active one if it satisfies requirements.txt (any PyTorch from 2.8 on), else .venv beside this file, made
# on first use. PYTHON chooses the interpreter. All GPUs of the node are used; NPROC sets the number of processes.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

die() { echo "error: $1" >&2; exit "${2:-2}"; }

# satisfied PYTHON FILE...: does this interpreter have all that the requirements files ask for?
satisfied() {
  "$1" - "${@:2}" <<'PY' 2>/dev/null
import sys
from importlib.metadata import PackageNotFoundError, version
from pip._vendor.packaging.requirements import Requirement
for file in sys.argv[1:]:
    for line in open(file):
        line = line.partition("#")[0].strip()
        if line:
            need = Requirement(line)
            try:
                have = version(need.name)
            except PackageNotFoundError:
                sys.exit(1)
            if not need.specifier.contains(have.partition("+")[0], prereleases=True):
                sys.exit(1)
PY
}

# set_up FILE...: leave in $python an interpreter that satisfies these requirements files.
set_up() {
  if satisfied "$base" "$@"; then python="$base"; return; fi
  python="$root/.venv/bin/python"
  if [ -x "$python" ] && satisfied "$python" "$@"; then return; fi
  [ -x "$python" ] || "$base" -m venv "$root/.venv" ||
    die "could not make .venv: install Python's venv module (python3-venv)" 3
  if satisfied "$base" <(grep -E '^torch(vision)?[>=<]' "$root/requirements.txt"); then
    # An installed PyTorch that fits is not downloaded again. (--system-site-packages does not see another venv's.)
    "$base" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
      > "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/installed.pth"
  fi
  echo "setting up .venv (once; PyTorch is a large download) ..." >&2
  local file arguments=()
  for file in "$@"; do arguments+=(-r "$file"); done
  "$python" -m pip install --quiet --disable-pip-version-check "${arguments[@]}" ||
    die "pip could not install $*: its message is above; run the same command again" 3
}

base="${PYTHON:-python3}"
command -v "$base" >/dev/null || die "$base not found: install Python 3.10 or newer" 3
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$base is too old: Python 3.10 or newer is needed" 3
needed=("$root/requirements.txt")
case "${1:-}" in
  "" | -h | --help) exec "$base" "$root/run.py" ;;  # the list needs no packages
  test)
    set_up "${needed[@]}" "$root"/requirements-{imagenet,dev}.txt
    cd "$root"
    exec "$python" -m pytest -n auto --maxprocesses 8 --dist loadfile "${@:2}" ;;
  stress | torture)
    set_up "${needed[@]}" "$root/requirements-dev.txt"
    cd "$root"
    OMP_NUM_THREADS=1 PYTHONPATH="$root:$root/tests" exec "$python" -m stress "${@:2}" ;;
  lint)
    set_up "${needed[@]}" "$root"/requirements-{imagenet,dev}.txt
    cd "$root"
    "$python" -m ruff check .
    exec "$python" -m ruff format --check . ;;
  check) needed+=("$root/requirements-dev.txt") ;;  # the tests that need a GPU
  *imagenet_* | imf_* | alphaflow_xl2 | table[0-9]* | tables | figure4)  # these decode with a VAE; what else does says what to install
    if [[ " $* " != *" --scale"[\ =][cg]pu* ]]; then needed+=("$root/requirements-imagenet.txt"); fi ;;
esac
set_up "${needed[@]}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" NPROC="${NPROC:-all}"
exec "$python" "$root/run.py" "$@"
