#!/usr/bin/env bash
# Asks the real kernel all the probes anew, and writes its answers to answers/.
#
#   tests/selftests/record.sh KERNEL SELFTESTS
#
# KERNEL is the bzImage of build-oracle.sh, SELFTESTS the directory that fetch-kernel.sh filled with the same kernel's
# headers. The cards of the VFIO probes are QEMU's: igb needs QEMU 8 or newer ($RING3_ORACLE_QEMU).
set -eu

fail() { echo "record.sh: $1" >&2; exit 1; }
[ $# -eq 2 ] || fail "usage: record.sh KERNEL SELFTESTS"
kernel=$(realpath "$1") selftests=$(realpath "$2")
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# record PROBE ANSWERS [ARGUMENT...]: with the VFIO cards if there is an argument, the card's address.
record() {
    local probe=$1 answers=$2 vfio=
    shift 2
    [ $# -eq 0 ] || vfio=-v
    cc -O1 -Wall -Wextra -Werror -Wno-missing-field-initializers -static -I"$selftests/include" -I"$selftests" \
        "probes/$probe.c" -o "$work/$probe"
    ./ask-kernel.sh -k "$kernel" -t 300 $vfio "$work/$probe" "$@" >"$work/answers" && ! grep -q 'ended by signal' "$work/answers" || fail "$probe did not end well"
    cp "$work/answers" "answers/$answers.txt"
    echo "$answers: $(wc -l <"answers/$answers.txt") answers"
}

for probe in commands ioas hwpt objects process compat access; do
    record $probe $probe
done
for probe in vfio_doors vfio_device; do
    record $probe $probe.igb 0000:00:05.0
    record $probe $probe.edu 0000:00:06.0
done
# The card with virtual functions.
record vfio_sysfs vfio_sysfs.igb 0000:00:05.0
