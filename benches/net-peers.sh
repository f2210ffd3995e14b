#!/usr/bin/env bash
# Measures ring3's user-mode networking beside pasta and slirp4netns, in alternation, and the limits beside them.
#
#   benches/net-peers.sh [--runs N] [--seconds S] [--cc NAME] [--only NAME,...] [--rows GROUP,...]
#
#   --runs N      how often everything is measured (default: 3)
#   --seconds S   how long one load lasts (default: 2)
#   --cc NAME     congestion control of every namespace: reno, bbr, cubic (default: reno)
#   --only NAMES  of ring3, pasta (the newest packaged), pasta-2025, slirp4netns, veth, loopback
#   --rows GROUPS of tcp, streams, ipv6, latency, udp, spliced, memory
#
# Prints every figure, then a table of medians and of ratios. docs/benchmarks.md says what the rows mean. The peers
# and iperf3 are fetched from Debian (no root, the system is not changed) and kept in the target directory. Everything
# runs in namespaces that end with this script. Needs user namespaces, /dev/net/tun, iproute2 and util-linux.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

fail() { echo "net-peers.sh: $1" >&2; exit 1; }
options=()
while [ $# -gt 0 ]; do
    case $1 in
        --runs | --seconds | --cc | --only | --rows) options+=("$1" "${2:?net-peers.sh: $1 lacks its value}"); shift ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        *) fail "unknown option '$1'; --help lists them" ;;
    esac
    shift
done
cd "$root"
[ -w /dev/net/tun ] || fail "/dev/net/tun cannot be opened: as another user, or after modprobe tun, it may"

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
cargo build --release --quiet --bin ring3
cargo build --release --quiet -p bench-net
benches/peers/fetch.sh "$target/peers/newest" sid passt slirp4netns iperf3
benches/peers/fetch.sh "$target/peers/stable" trixie passt
grep -hE '^(passt|slirp4netns|iperf3)[[:space:]]' "$target"/peers/{newest,stable}/.versions
uname -sr

# Root in a user namespace, so that all of them are started alike whoever measures. Whatever is left when the
# measurement ends, or when this script is killed, goes with the process namespace.
exec unshare --user --map-root-user --net --mount --pid --fork --kill-child --mount-proc \
    "$target/release/bench-net" run --ring3 "$target/release/ring3" \
    --newest "$target/peers/newest" --stable "$target/peers/stable" "${options[@]}"
