#!/bin/sh
# Run the transport conformance classes of kombu's own test suite against the SQLite transport.
# They come with kombu's source distribution, of the version that is installed, and are kept in .conformance/.
set -eu
cd "$(dirname "$0")/.."

python="${PYTHON:-.venv/bin/python}"
expected=47
version=$("$python" -c 'import importlib.metadata; print(importlib.metadata.version("kombu"))')
source=".conformance/kombu-$version"
report=".conformance/report.txt"

if [ ! -d "$source/t" ]; then
    mkdir -p .conformance
    "$python" -m pip download --quiet --no-deps --no-binary :all: --dest .conformance "kombu==$version"
    mkdir -p "$source"
    # Only the tests: the kombu that they import is the installed one.
    tar -xzf ".conformance/kombu-$version.tar.gz" -C "$source" --strip-components 1 "kombu-$version/t"
fi

status=0
PYTHONPATH="$source:." "$python" -m pytest tests/broker/conformance -q -p no:cacheprovider > "$report" 2>&1 || status=$?
cat "$report"
passed=$(sed -n 's/^\(.* \)\{0,1\}\([0-9][0-9]*\) passed.*/\2/p' "$report" | tail -n 1)
echo "conformance: ${passed:-0} of $expected passed"
[ "$status" -eq 0 ] && [ "${passed:-0}" -eq "$expected" ]
