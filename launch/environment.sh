# shellcheck shell=bash
# Sourced by the scripts beside it: finds a Python, makes the environment, installs once.
#
#   make_environment EXTRA [VERSION]   EXTRA is '', dev or dev,peers; VERSION is 3.11 or 3.12
#
# sets $python. The environment is $DISTILLSPEC_VENV, or .venv in the project (.venv-VERSION where
# a version was asked for), and is installed into again only when setup.py or the Python changed.

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  echo "error: $*" >&2
  exit 2
}

# Prints the version of a Python if it runs and is one of $2...; a pyenv shim may exist and not run.
python_version() {
  local found
  found=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || return 1
  shift
  for wanted in "$@"; do
    [ "$found" = "$wanted" ] && echo "$found" && return 0
  done
  return 1
}

find_python() {
  local wanted candidate
  for wanted in "$@"; do
    for candidate in "python$wanted" python3 python \
      "${PYENV_ROOT:-$HOME/.pyenv}/versions/$wanted".*/bin/python; do
      if python_version "$candidate" "$wanted" >/dev/null; then
        command -v "$candidate"
        return 0
      fi
    done
  done
  return 1
}

make_environment() {
  local extra=$1 wanted=${2:-} versions=(3.12 3.11) folder base stamp state
  folder=${DISTILLSPEC_VENV:-$project/.venv${wanted:+-$wanted}}
  [ -z "$wanted" ] || versions=("$wanted")
  case "$wanted" in
    '' | 3.11 | 3.12) ;;
    *) fail "--python $wanted: the versions are 3.11 and 3.12" ;;
  esac
  python=$folder/bin/python
  if ! python_version "$python" "${versions[@]}" >/dev/null; then
    [ ! -e "$folder" ] || fail "$folder is no environment of Python ${versions[*]}; remove it"
    base=$(find_python "${versions[@]}") ||
      fail "needs Python ${versions[*]/%/,} and found none that runs; see https://www.python.org"
    echo "environment: $folder, of $("$base" --version)" >&2
    "$base" -m venv "$folder" || {
      rm -rf "$folder"
      fail "$base cannot make environments; on Debian and Ubuntu install python3-venv"
    }
  fi
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
