#!/usr/bin/env bash
# Measures ring3 beside QEMU's TCG: the same kernel, initramfs and kernel command line, in alternation.
#
#   benches/peers.sh [--runs N] [--kernel FILE]    (default: 5 runs, the kernel that `ring3 run` would take)
#
# Prints every run, then a table of medians and of ratios. docs/benchmarks.md says what the rows mean. Needs no
# root; without qemu-system-x86_64 it measures ring3 alone.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

runs=5
kernel=
fail() { echo "peers.sh: $1" >&2; exit 1; }
while [ $# -gt 0 ]; do
    case $1 in
        --runs) runs=${2:-}; shift ;;
        --kernel) kernel=${2:-}; shift; [ -r "$kernel" ] || fail "cannot read the kernel '$kernel'" ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        *) fail "unknown option '$1'; --help lists them" ;;
    esac
    shift || fail "an option lacks its value"
done
# Before the working directory changes.
[ -z "$kernel" ] || kernel=$(realpath "$kernel")
cd "$root"

target=${CARGO_TARGET_DIR:-target}
arch=x86_64-unknown-linux-gnu
cargo build --release --quiet --bin ring3
cargo build --release --quiet -p bench-guest --bin bench-run
RUSTFLAGS="-C target-feature=+crt-static -C strip=symbols" cargo build --release --quiet -p bench-guest --bin bench-guest \
    --target $arch --target-dir "$target/bench-guest"

if [ -z "$kernel" ]; then
    # The line marked * is the kernel that a run takes; the path is its last column.
    kernel=$("$target/release/ring3" kernel list | sed -n 's/^\* *[^ ]* *//p' | head -n 1)
    [ -n "$kernel" ] || fail "no kernel: fetch one with '$target/release/ring3 kernel fetch', or use --kernel FILE"
fi
command -v qemu-system-x86_64 >/dev/null ||
    echo "peers.sh: no qemu-system-x86_64 (apt-get install qemu-system-x86): measuring ring3 alone" >&2

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$target/release/bench-run" --ring3 "$target/release/ring3" --init "$target/bench-guest/$arch/release/bench-guest" \
    --kernel "$kernel" --work "$work" --runs "$runs"
