#!/usr/bin/env bash
# Unpacks packages of a Debian suite, and all that they need, into a directory of their own.
#
#   benches/peers/fetch.sh DIR SUITE PACKAGE...
#
# DIR becomes a root file system that holds these packages and their dependencies, unpacked but not configured:
# enough to run programs of another release through their own loader, or under chroot. The system is neither changed
# nor asked what it has installed: apt runs with a state of its own. The mirror is the one in the system's own sources.
# Needs apt, dpkg and no root. A directory that already holds these packages is left as it is.
set -eu

fail() { echo "fetch.sh: $1" >&2; exit 1; }
[ $# -ge 3 ] || fail "usage: fetch.sh DIR SUITE PACKAGE..."
dir=$1 suite=$2
shift 2
. "$(dirname "$0")/suite.sh"

wanted="$suite: $*"
mkdir -p "$dir"
dir=$(realpath "$dir")
# One at a time, for tests that run beside each other.
exec 9>"$dir.lock"
flock 9
# What was asked for is written last.
[ "$(cat "$dir/.fetched" 2>/dev/null)" != "$wanted" ] || exit 0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
use_suites "$work" "$suite"
apt-get -qq install --yes --download-only base-files "$@" >"$work/log" 2>&1 ||
    { cat "$work/log" >&2; fail "cannot fetch $* from $suite"; }

find "$dir" -mindepth 1 -delete
# base-files makes the links from / into /usr that other packages rely on.
dpkg -x "$work"/cache/archives/base-files_*.deb "$dir"
for deb in "$work"/cache/archives/*.deb; do
    dpkg -x "$deb" "$dir"
done
for deb in "$work"/cache/archives/*.deb; do
    dpkg-deb --show "$deb"
done >"$dir/.versions"
echo "$wanted" >"$dir/.fetched"
