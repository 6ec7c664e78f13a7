#!/usr/bin/env bash
# One command for everything:
#   bash run.sh                        list the recipes
#   bash run.sh NAME [options]         run recipes/NAME.yaml: set up, train (or continue), sample, score, plot;
#                                      or the rows of recipes/tables/NAME.yaml, set beside the paper's,
#                                      or what recipes/figures/NAME.yaml draws
#   bash run.sh NAME --dry-run         print its settings, size and speed, and stop
#   bash run.sh table1a --scale cpu    a table in small: cpu or gpu;  bash run.sh tables: all of the paper's
#   bash run.sh NAME --set KEY=VALUE   override a setting (repeat as needed); --out DIR: another run folder
#   bash run.sh test [pytest options]  run the tests;  bash run.sh lint: style
#   bash run.sh torture [NAME ...]     break runs on purpose, for half an hour, and print a table (docs/reliability.md)
#
# Python: the active one if it satisfies requirements.txt, else .venv, made here on first use. PYTHON chooses
# the interpreter. All GPUs of the node are used; NPROC sets the number of processes instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

die() { echo "error: $1" >&2; exit "${2:-2}"; }

list_recipes() {
  echo "bash run.sh NAME [--dry-run] [--set key.path=value ...] [--out DIR]      bash run.sh test"
  local file kind
  for kind in "runs:recipes" "tables, also [--scale cpu|gpu] [--rows 1,2] [--seeds 0,1]:recipes/tables" "figures:recipes/figures"; do
    printf '\n%s\n' "${kind%:*}"
    for file in "${kind##*:}"/*.yaml; do
      printf '  %-16s %s\n' "$(basename "$file" .yaml)" "$(sed -n 's/^description: *"\{0,1\}\([^"]*\)"\{0,1\} *$/\1/p' "$file" | head -n 1)"
    done
    if [ "${kind##*:}" = recipes/tables ]; then printf '  %-16s %s\n' tables "all of the paper's, one after the other"; fi
  done
}

# check PYTHON FILE...: does this interpreter have all that the requirements files ask for?
check() {
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
  local base="${PYTHON:-python3}"
  command -v "$base" >/dev/null || die "$base not found: install Python 3.10 or newer" 3
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$base is too old: Python 3.10 or newer is needed" 3
  if check "$base" "$@"; then python="$base"; return; fi
  python=.venv/bin/python
  if [ -x "$python" ] && check "$python" "$@"; then return; fi
  local reuse=()  # an installed PyTorch that fits is not downloaded again
  if check "$base" <(grep -E '^torch(vision)?[>=<]' requirements.txt); then reuse=(--system-site-packages); fi
  [ -x "$python" ] || "$base" -m venv ${reuse[@]+"${reuse[@]}"} .venv || die "could not make .venv: install Python's venv module (python3-venv)" 3
  echo "setting up .venv (once; PyTorch is a large download) ..." >&2
  local file arguments=()
  for file in "$@"; do arguments+=(-r "$file"); done
  "$python" -m pip install --quiet --disable-pip-version-check "${arguments[@]}" ||
    die "pip could not install $*: its message is above; run the same command again" 3
}

name="${1:-}"
case "$name" in
  "" | -h | --help) list_recipes; exit 0 ;;
  test)
    shift
    set_up requirements.txt requirements-imagenet.txt requirements-dev.txt
    exec "$python" -m pytest -n auto --maxprocesses 8 --dist loadfile "$@" ;;
  torture)
    shift
    set_up requirements.txt requirements-dev.txt
    OMP_NUM_THREADS=1 PYTHONPATH="$PWD:$PWD/tests" exec "$python" -m torture "$@" ;;
  lint)
    set_up requirements.txt requirements-imagenet.txt requirements-dev.txt
    "$python" -m ruff check .
    exec "$python" -m ruff format --check . ;;
esac
shift
if [ -f "recipes/$name.yaml" ]; then job=(run "recipes/$name.yaml")
elif [ "$name" = jvp_overhead ]; then job=(eval.table "recipes/tables/$name.yaml") NPROC=1  # timed alone
elif [ -f "recipes/tables/$name.yaml" ]; then job=(eval.table "recipes/tables/$name.yaml")
elif [ "$name" = tables ]; then job=(eval.table recipes/tables/{table,figure,jvp}*.yaml)
elif [ -f "recipes/figures/$name.yaml" ]; then job=("eval.$name" "recipes/figures/$name.yaml") NPROC=1  # a core's work
else list_recipes >&2; echo >&2; die "there is no recipe named '$name'"
fi
needed=(requirements.txt)
if grep -qE '^ *vae: *[^ ]*/|^ +base: .?imagenet_' "${job[@]:1}" && [[ " $* " != *" --scale"[\ =][cg]pu* ]]; then
  needed+=(requirements-imagenet.txt)  # it decodes with a VAE
fi
set_up "${needed[@]}"

processes="${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
if [ "$processes" != 1 ]; then
  exec "$python" -m meanflow.training.launch "$processes" "${job[@]}" "$@"  # torchrun's agent, with our exit codes
fi
exec "$python" -m "${job[@]}" "$@"
