#!/usr/bin/env bash
# Unpacks what a GPU host without a network lacks for `make gpu` and `make gpu-test` into DIR: the
# rival libraries (versions pinned in pyproject.toml) and pytest. The host has Python 3.12, torch,
# triton and numpy. DIR is ignored by git and put on PYTHONPATH by both targets.
# usage: kernels/bench/collect_wheels.sh [DIR] [EXTRA_REQUIREMENT ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
dir=${1:-wheels/site}
(($#)) && shift
python=${PYTHON:-python3}
limit_mib=60
mapfile -t rivals < <("$python" - <<'EOF'
import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"]["rivals"], sep="\n")
EOF
)
rm -rf "$dir"
mkdir -p "$dir"
# no dependencies: theirs (torch, triton, numpy, packaging) are on the host and must not be shadowed
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target "$dir" \
  --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \
  --platform manylinux_2_17_x86_64 --platform any -c constraints.txt \
  "${rivals[@]}" pytest pytest-timeout pluggy iniconfig pygments hypothesis sortedcontainers "$@"
size=$(du -sm "$dir" | cut -f1)
echo "$dir: $size MiB, $(find "$dir" -maxdepth 1 -name '*.dist-info' | wc -l) packages"
((size <= limit_mib)) || { echo "more than $limit_mib MiB" >&2; exit 1; }
