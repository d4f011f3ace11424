# shellcheck shell=bash
# Sourced by the scripts beside it: finds a Python, makes the environment, installs once.
#
#   make_environment EXTRA [VERSION]   EXTRA is '', dev or dev,peers,cuda; VERSION is 3.11 or 3.12
#
# sets $python. The environment is $DISTILLSPEC_VENV, or .venv in the project (.venv-VERSION where
# a version was asked for); it is installed into again only when setup.py or the Python changed.

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  echo "error: $*" >&2
  exit 2
}

# Whether a Python runs and is of one of the versions behind it; a pyenv shim may exist and not run.
is_python() {
  local found wanted
  found=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || return 1
  shift
  for wanted in "$@"; do
    [ "$found" != "$wanted" ] || return 0
  done
  return 1
}

find_python() {
  local wanted candidate
  for wanted in "$@"; do
    for candidate in "python$wanted" python3 python \
      "${PYENV_ROOT:-$HOME/.pyenv}/versions/$wanted".*/bin/python; do
      if is_python "$candidate" "$wanted"; then
        command -v "$candidate"
        return 0
      fi
    done
  done
  return 1
}

# Makes the environment in $1 unless there is a whole one; an unfinished one is made anew.
make_venv() {
  local folder=$1 base known
  shift
  known=$*
  if is_python "$folder/bin/python" "$@" && "$folder/bin/python" -c 'import pip' 2>/dev/null; then
    return 0
  fi
  if [ -n "$(ls -A "$folder" 2>/dev/null)" ] && [ ! -e "$folder/pyvenv.cfg" ]; then
    fail "$folder holds files but no environment; remove it or set DISTILLSPEC_VENV"
  fi
  base=$(find_python "$@") ||
    fail "needs Python ${known// / or } and found none that runs; see https://www.python.org"
  echo "environment: $folder, $("$base" --version)" >&2
  "$base" -m venv --clear "$folder" ||
    fail "$base cannot make environments; on Debian and Ubuntu install python3-venv"
}

make_environment() {
  local extra=$1 wanted=${2:-} versions=(3.12 3.11) folder stamp state
  case "$wanted" in
    '') ;;
    3.11 | 3.12) versions=("$wanted") ;;
    *) fail "--python $wanted: the versions are 3.11 and 3.12" ;;
  esac
  folder=${DISTILLSPEC_VENV:-$project/.venv${wanted:+-$wanted}}
  make_venv "$folder" "${versions[@]}"
  python=$folder/bin/python
  state=$(cat "$project/setup.py" "$project/pyproject.toml" <("$python" --version) \
    <(echo "$project") | cksum)
  stamp=$folder/.distillspec-${extra:-base}
  if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
    echo "installing ${extra:+[$extra] }into $folder: a minute or two, once" >&2
    "$python" -m pip install --quiet --disable-pip-version-check \
      --editable "$project${extra:+[$extra]}" || fail "the installation failed; see above"
    echo "$state" | tee "$folder/.distillspec-base" >"$stamp"
  fi
}
