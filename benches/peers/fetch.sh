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
command -v apt-get >/dev/null && command -v dpkg >/dev/null || fail "this needs apt-get and dpkg"

wanted="$suite: $*"
mkdir -p "$dir"
dir=$(realpath "$dir")
# One at a time, for tests that run beside each other.
exec 9>"$dir.lock"
flock 9
# What was asked for is written last.
[ "$(cat "$dir/.fetched" 2>/dev/null)" != "$wanted" ] || exit 0

# The first Debian archive that the system uses, in either of the two formats; not the one of security updates.
mirror=$(find /etc/apt/sources.list /etc/apt/sources.list.d/ -type f -exec cat {} + 2>/dev/null |
    sed -n 's/^URIs: *\([^ ]*\).*/\1/p; s/^deb  *\(\[[^]]*\] *\)\{0,1\}\([^ ]*\).*/\2/p' |
    grep -E '/debian/?$' | head -n 1)
[ -n "$mirror" ] || fail "the system's apt sources name no Debian archive"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -r "$keyring" ] || fail "no keys of the Debian archive (package debian-archive-keyring)"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{state/lists/partial,cache/archives/partial,parts}
: >"$work/status"
echo "deb [signed-by=$keyring] $mirror $suite main" >"$work/sources.list"
cat >"$work/apt.conf" <<EOF
Dir::State "$work/state";
Dir::State::status "$work/status";
Dir::Cache "$work/cache";
Dir::Etc::sourcelist "$work/sources.list";
Dir::Etc::sourceparts "$work/parts";
Dir::Etc::preferences "$work/no-preferences";
Dir::Etc::preferencesparts "$work/parts";
Acquire::Languages "none";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
APT::Install-Recommends "false";
APT::Sandbox::User "$(id -un)";
EOF
export APT_CONFIG=$work/apt.conf
apt-get -qq update || fail "cannot read the package lists of $suite"
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
