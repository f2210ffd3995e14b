#!/usr/bin/env bash
# Measures an ioctl under `ring3 shim`: of /dev/iommu, and of a pipe with and without the shim, in alternation.
#
#   benches/shim.sh [--runs N]        (default: 7 runs)
#
# Prints the medians in nanoseconds. Needs cc and no root. docs/benchmarks.md says what the rows mean.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"

runs=7
fail() { echo "shim.sh: $1" >&2; exit 1; }
while [ $# -gt 0 ]; do
    case $1 in
        --runs) runs=${2:-}; shift; [[ $runs =~ ^[1-9][0-9]*$ ]] || fail "--runs takes a number, not '$runs'" ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        *) fail "unknown option '$1'; --help lists them" ;;
    esac
    shift || fail "an option lacks its value"
done

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cargo build --release --quiet --bin ring3
ring3=${CARGO_TARGET_DIR:-target}/release/ring3
cc -O2 -o "$scratch/ioctl" benches/shim/ioctl.c

for ((run = 0; run < runs; run++)); do
    "$ring3" shim -- "$scratch/ioctl" | sed 's/^/under the shim: /'
    # Where the host has a /dev/iommu of its own, that is not what is measured.
    "$scratch/ioctl" | grep '^pipe' | sed 's/^/without: /'
done >"$scratch/all"

for row in "under the shim: option" "under the shim: missing" "under the shim: pipe" "without: pipe"; do
    sed -n "s/^$row //p" "$scratch/all" | sort -n |
        awk -v row="$row" '{ value[NR] = $1 } END { printf "%-26s %7.1f ns\n", row, value[int((NR + 1) / 2)] }'
done
