#!/usr/bin/env bash
# ./run.sh --task cheetah_vel   makes .venv, installs requirements.txt, trains
# ./run.sh test                 the same, then runs the tests
set -eu
unset CDPATH PYTHONSAFEPATH # with them cd may go elsewhere, and esmeta.py does not find tasks.py
script=$0
while [ -L "$script" ]; do # macOS had no readlink -f for long
  link=$(readlink "$script")
  case $link in
    /*) script=$link ;;
    *) script=$(dirname "$script")/$link ;;
  esac
done
here=$(cd "$(dirname "$script")" && pwd)
python=$here/.venv/bin/python
if command -v flock >/dev/null; then # two launches at once would delete each other's .venv
  exec 9<"$here"
  flock 9 || true # some network file systems have no locks
fi
# an upgrade of Python leaves an environment that does not start or has lost its packages
if ! "$python" -I -c 'import pip' 2>/dev/null; then
  rm -rf "$here/.venv"
  for base in python3 python3.14 python3.13 python3.12 python3.11 none; do
    [ "$base" = none ] && { echo "run.sh: needs Python 3.11 or newer on the PATH" >&2; exit 1; }
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
  done
  "$base" -m venv "$here/.venv" >&2 || {
    rm -rf "$here/.venv"
    echo "run.sh: $base cannot make a virtual environment; on Debian: apt install python3-venv" >&2
    exit 1
  }
fi
if ! cmp -s "$here/requirements.txt" "$here/.venv/installed.txt"; then
  "$python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
  cp "$here/requirements.txt" "$here/.venv/installed.txt"
fi
exec 9<&- # else a training would hold the lock
if [ "${1:-}" = test ]; then
  shift
  cd "$here"
  exec "$python" -m pytest -q "$@"
fi
exec "$python" "$here/esmeta.py" "$@"
