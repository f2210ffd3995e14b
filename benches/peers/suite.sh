# shellcheck shell=bash
# Sourced: lets apt-get work on other suites than the system's, with a state of its own and without root.
#
#   use_suites DIR SUITE...
#
# From here on, apt-get and apt-cache of this process know the packages of these suites only, and keep everything in
# DIR. The mirror is the one in the system's own sources. The caller has defined `fail MESSAGE`.

use_suites() {
    local work=$1 mirror keyring=/usr/share/keyrings/debian-archive-keyring.gpg suite
    shift
    command -v apt-get >/dev/null && command -v dpkg >/dev/null || fail "this needs apt-get and dpkg"
    # The first Debian archive that the system uses, in either of the two formats; not the one of security updates.
    mirror=$(find /etc/apt/sources.list /etc/apt/sources.list.d/ -type f -exec cat {} + 2>/dev/null |
        sed -n 's/^URIs: *\([^ ]*\).*/\1/p; s/^deb  *\(\[[^]]*\] *\)\{0,1\}\([^ ]*\).*/\2/p' |
        grep -E '/debian/?$' | head -n 1)
    [ -n "$mirror" ] || fail "the system's apt sources name no Debian archive"
    [ -r "$keyring" ] || fail "no keys of the Debian archive (package debian-archive-keyring)"

    mkdir -p "$work"/{state/lists/partial,cache/archives/partial,parts}
    : >"$work/status"
    for suite in "$@"; do
        echo "deb [signed-by=$keyring] $mirror $suite main"
    done >"$work/sources.list"
    cat >"$work/apt.conf" <<CONF
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
CONF
    export APT_CONFIG=$work/apt.conf
    apt-get -qq update >"$work/update.log" 2>&1 || fail "cannot read the package lists of $*"
}
