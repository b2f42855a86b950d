#!/usr/bin/env bash
# Writes the lock files in requirements/, with `make lock`; the first argument is uv.
#
# What is locked already stays as it is as long as it fits: `--upgrade`, or `--upgrade-package NAME`,
# as further arguments ask for newer versions.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$1
shift
mkdir -p build

compile() {
    "$uv" pip compile -q --universal --python-version 3.11 --no-emit-index-url --no-annotate \
        --custom-compile-command "make lock" "$@"
}

# Sets that may meet in one environment are resolved together, so that one does not undo another:
# with them all as constraints, each is a part of the same whole. What they say now is preferred.
grep -hE '^[a-zA-Z0-9._-]+==' requirements/{cpu,gpu,dev,bench,eval}.txt 2>/dev/null \
    | sed -E 's/ *\\$//; s/ *;.*//' | sort -u >build/all.txt || true
compile pyproject.toml requirements/torch-cpu.in --all-extras --override requirements/no-torch.in \
    -o build/all.txt "$@"
for set in cpu dev bench eval; do
    inputs=(pyproject.toml --extra "$set")
    [ "$set" = cpu ] && inputs+=(requirements/torch-cpu.in)
    compile "${inputs[@]}" -c build/all.txt --override requirements/no-torch.in \
        --generate-hashes -o "requirements/$set.txt"
    echo "[lock] requirements/$set.txt: $(grep -c '==' "requirements/$set.txt") packages"
done
# torch for a GPU is on the common index, with what it needs of NVIDIA's.
grep -vE '^(torch|triton|nvidia|cuda)' build/all.txt >build/without-torch.txt
compile pyproject.toml --extra gpu -c build/without-torch.txt --generate-hashes \
    -o requirements/gpu.txt
echo "[lock] requirements/gpu.txt: $(grep -c '==' requirements/gpu.txt) packages"
# The clients have an environment of their own, where some want older versions.
compile requirements/clients.in --override requirements/no-torch.in --generate-hashes \
    -o requirements/clients.txt "$@"
echo "[lock] requirements/clients.txt: $(grep -c '==' requirements/clients.txt) packages"
compile requirements/cluster.in --no-deps --generate-hashes -o requirements/cluster.txt "$@"
echo "[lock] requirements/cluster.txt: $(grep -c '==' requirements/cluster.txt) packages"
