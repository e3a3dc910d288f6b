#!/usr/bin/env bash
# The device check of the wheel beside this file, on a machine with a GPU and without network:
#   ./run.sh first|rest|train|all ... [--budget SECONDS] [further options of the check]
# Needs a python3 (or the one that PYTHON names) with torch and pip. Writes $OUT/<groups>.json and what
# belongs to it (default: OUT=./out; nothing is overwritten). Exit status: the check's.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
groups=()
while [[ ${1:-} =~ ^(first|rest|train|all)$ ]]; do groups+=("$1") && shift; done
if [ ${#groups[@]} = 0 ]; then
  sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
name=$(IFS=- && echo "${groups[*]}")
python=${PYTHON:-python3}
mkdir -p "${OUT:=out}"
out=$(cd "$OUT" && pwd)
save=$out/$name.json
for ((n = 2; ; n++)); do
  [ -e "$save" ] || break
  save=$out/$name-$n.json
done

# In front of what the machine has, and gone with its temporary files: nothing on it is changed.
site=$(mktemp -d)
has() { "$python" -c 'import sys, importlib.metadata as m; m.version(sys.argv[1])' "$1" 2>/dev/null; }
wheels=("$here"/wheels/dbp_kernels-*.whl)
for spare in "$here"/wheels/spare/*.whl; do
  file=${spare##*/}
  if [ -e "$spare" ] && ! has "${file%%-*}"; then wheels+=("$spare"); fi
done
"$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
  --disable-pip-version-check --root-user-action=ignore --target "$site" "${wheels[@]}"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# Here are the tests and the benchmark but no dbp_kernels: the wheel's is imported.
cd "$here"
if [[ $name =~ all ]]; then groups=(); fi
exec "$python" -m bench device-check "${groups[@]}" --save "$save" "$@"
