# shellcheck shell=bash
# The project's own environment, for the scripts that source this file.
#
#   set_up ROOT EXTRA    makes ROOT/.venv hold the project with EXTRA (all or test), and sets $venv
#
# A stamp in .venv says for which files an installation was completed. It is taken away before an installation and
# written after it, so an interrupted set-up is never taken for a complete one. Standard output belongs to the command
# that runs afterwards (`--json`): everything here is said on standard error.

say() { printf 'adapterops: %s\n' "$*" >&2; }

stop() {
  say "$*"
  exit 2
}

# Prints the first Python that is new enough and can make environments. A name on PATH is no proof that it runs.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' </dev/null >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  if [[ -n ${PYTHON:-} ]]; then
    stop "PYTHON=$PYTHON is no Python 3.11 or newer with the venv module; set PYTHON to one that is, or unset it."
  fi
  stop "found no Python 3.11 or newer with the venv module (tried python3.13, python3.12, python3.11, python3);" \
    "install one, or set PYTHON to its path."
}

# What an installation depends on: where the project stands, what it asks for, the tested versions, and the names of the
# package's files: pip links each of them into build/ (setuptools' strict editable mode), which spares every start the
# import hook of the other mode. A change in a file is seen at once; a new one asks for another installation.
wanted_stamp() { # ROOT EXTRA
  printf '%s\n' "root $1" "extra $2" "$(<"$1/pyproject.toml")" "$(<"$1/constraints.txt")"
  (cd -- "$1" && find adapterops formats -name '*.py' -o -name '*.toml' -o -name py.typed) | LC_ALL=C sort
}

is_ready() { # ROOT EXTRA; test includes all
  local extra
  compgen -G "$1/build/__editable__*/adapterops/__init__.py" >/dev/null || return 1
  for extra in "$2" test; do
    if [[ -x $venv/bin/python && -f $venv/.adapterops-$extra ]] &&
      [[ $(<"$venv/.adapterops-$extra") == "$(wanted_stamp "$1" "$extra")" ]]; then
      return 0
    fi
  done
  return 1
}

install_packages() { # arguments of pip install
  local quiet=(--progress-bar off --quiet)
  if [[ -t 2 ]]; then quiet=(--progress-bar on); fi
  "$venv/bin/python" -m pip install --no-input --disable-pip-version-check "${quiet[@]}" "$@" ||
    stop "pip could not install what is needed (its message stands above); run the same command again to go on."
}

# The work itself; runs in a subshell that holds the lock.
install_project() { # ROOT EXTRA
  local root=$1 extra=$2 python torch
  if [[ ! -d $venv/bin ]]; then
    say "first use: creating $venv and installing adapterops with what it needs; this takes a few minutes."
  else
    say "installing into $venv what pyproject.toml and constraints.txt ask for; this can take a few minutes."
  fi
  rm -f -- "$venv/.adapterops-all" "$venv/.adapterops-test"

  if ! "$venv/bin/python" -m pip --version </dev/null >/dev/null 2>&1; then
    python=$(find_python)
    say "1/3 a virtual environment of $("$python" --version)"
    # What an interrupted creation left behind cannot be mended; only the lock stays.
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf -- {} +
    "$python" -m venv "$venv" || stop "could not create $venv."
  elif ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    stop "$venv has $("$venv/bin/python" --version), but adapterops needs Python 3.11 or newer; remove that folder."
  fi

  # By itself and exactly, so that a CPU build is taken where the machine offers one: it has the same version.
  torch=$(grep -E '^torch==' "$root/constraints.txt") || stop "$root/constraints.txt names no torch version."
  say "2/3 $torch"
  install_packages "$torch" --constraint "$root/constraints.txt"
  say "3/3 adapterops[$extra]"
  install_packages --config-settings editable_mode=strict --editable "${root}[$extra]" \
    --constraint "$root/constraints.txt"

  wanted_stamp "$root" "$extra" >"$venv/.stamp"
  mv -f -- "$venv/.stamp" "$venv/.adapterops-$extra"
  say "ready."
}

set_up() { # ROOT EXTRA
  venv=$1/.venv
  if is_ready "$1" "$2"; then return; fi
  mkdir -p -- "$venv" || stop "cannot write to $1, where the environment .venv is to stand."
  (
    if command -v flock >/dev/null && ! flock --nonblock 9; then
      say "waiting for another set-up of $venv to end."
      flock 9
    fi
    # Another process may have done the work meanwhile.
    if ! is_ready "$1" "$2"; then install_project "$1" "$2"; fi
  ) </dev/null 1>&2 9>"$venv/.lock"
}
