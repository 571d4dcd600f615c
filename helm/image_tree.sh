#!/bin/sh
# Make what the image holds: a virtual environment with the gateway and nothing but what it runs with.
# Usage, from anywhere: image_tree.sh PYTHON DIRECTORY. The Dockerfile's first stage runs it, and
# `make chart ARGS=--image` does without Docker. Only wheels with the lock's hashes are installed.
set -eu
python=$1 target=$2
cd -- "$(dirname -- "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip='-m pip --quiet --disable-pip-version-check --no-input'

"$python" helm/locked_subset.py build >"$work/build.txt"
"$python" -m venv "$work/build"
"$work/build/bin/python" $pip install --require-hashes --only-binary=:all: -r "$work/build.txt"
"$work/build/bin/python" $pip wheel --no-deps --no-build-isolation --wheel-dir "$work/wheels" ./proto .

"$python" helm/locked_subset.py runtime >"$work/runtime.txt"
"$python" -m venv "$target"
"$target/bin/python" $pip install --require-hashes --only-binary=:all: -r "$work/runtime.txt"
"$target/bin/python" $pip install --no-deps --no-index "$work"/wheels/*.whl
"$target/bin/python" $pip check
# The root file system is read-only: nothing could be compiled later.
"$target/bin/python" -m compileall -q "$target/lib"
# Nothing is installed later either.
"$target/bin/python" $pip uninstall --yes pip setuptools
