#!/usr/bin/env bash
# Fetches the Linux source, and compiles from it the kernel's own selftests of iommufd and VFIO.
#
#   tests/selftests/fetch-kernel.sh DIR [DEB]
#
# DIR receives
#   bin/             the programs: iommufd, iommufd_fail_nth, vfio_*_test
#   include/         the headers of the kernel's interface, as `make headers` leaves them
#   iommufd_test.h   the interface of the kernel's mock IOMMU
#   version          the package and its version
# Nothing of it is part of ring3: it is compiled where it is tested, and stays in DIR.
#
# The source is Debian's package, from a suite of its own (the system's apt is neither asked nor changed), or DEB.
# Needs apt, dpkg, xz, make, a C compiler, libcap-dev, uuid-dev, 600 MB for as long as it runs, and no root.
# A directory that is complete is left as it is, so only the first call needs the network.
set -eu

fail() { echo "fetch-kernel.sh: $1" >&2; exit 1; }
[ $# -ge 1 ] && [ $# -le 2 ] || fail "usage: fetch-kernel.sh DIR [DEB]"
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../../benches/peers/suite.sh"

# What the expectations in this directory were written for; if the suite no longer has it, the newest 7.x that compiles.
suite=trixie-backports
first=linux-source-7.3
# To be raised when what this script makes changes.
format=1

mkdir -p "$1"
dir=$(realpath "$1")
deb=${2:+$(realpath "$2")}
# One at a time, for tests that run beside each other.
exec 9>"$dir.lock"
flock 9
[ "$(cat "$dir/.made" 2>/dev/null)" != "$format" ] || exit 0

for tool in dpkg-deb xz make cc; do
    command -v $tool >/dev/null || fail "no $tool (packages dpkg, xz-utils, make, gcc)"
done
echo '#include <sys/capability.h>' | cc -E - >/dev/null 2>&1 || fail "no sys/capability.h (package libcap-dev)"
echo '#include <uuid/uuid.h>' | cc -E - >/dev/null 2>&1 || fail "no uuid/uuid.h (package uuid-dev)"

find "$dir" -mindepth 1 -delete
work=$dir/work
mkdir "$work"
trap 'rm -rf "$work"' EXIT

# compile DEB: fills DIR from a source package, or says why not.
compile() {
    local tree=$work/tree version
    version=$(dpkg-deb --show "$1") || return 1
    rm -rf "$tree"
    mkdir "$tree"
    # What the two directories and `make headers` read.
    dpkg-deb --fsys-tarfile "$1" | tar -xO --wildcards './usr/src/linux-source-*.tar.xz' | xz -dc -T0 |
        tar -x -C "$tree" --strip-components=1 --wildcards --no-wildcards-match-slash \
            '*/Makefile' '*/Kbuild' '*/scripts' '*/include' '*/arch/x86' '*/tools/arch/x86' '*/tools/include' \
            '*/tools/scripts' '*/tools/build' '*/tools/testing/selftests/*.h' '*/tools/testing/selftests/*.mk' \
            '*/tools/testing/selftests/iommu' '*/tools/testing/selftests/vfio' \
            '*/tools/testing/selftests/rseq' '*/tools/testing/selftests/cgroup' \
            '*/drivers/iommu/iommufd/iommufd_test.h' '*/drivers/dma/ioat' '*/drivers/dma/idxd' \
            '*/drivers/net/ethernet/intel/igb' || return 1
    # The flags of a surrounding make are not for this one.
    unset MAKEFLAGS MAKELEVEL MFLAGS
    make -s -j"$(nproc)" -C "$tree" ARCH=x86 headers || return 1
    for tests in iommu vfio; do
        make -s -j"$(nproc)" -C "$tree/tools/testing/selftests/$tests" || return 1
    done
    mkdir -p "$dir/bin" "$dir/include"
    cp "$tree"/tools/testing/selftests/iommu/iommufd{,_fail_nth} "$tree"/tools/testing/selftests/vfio/vfio_*_test "$dir/bin/" ||
        return 1
    cp -r "$tree/usr/include/." "$dir/include/"
    cp "$tree/drivers/iommu/iommufd/iommufd_test.h" "$dir/"
    echo "$version" >"$dir/version"
}

packages=given
if [ -z "$deb" ]; then
    use_suites "$work/apt" $suite
    packages=$(apt-cache search --names-only '^linux-source-7\.[0-9]+$' | cut -d' ' -f1 | sort -Vr)
    packages="$(echo "$packages" | grep -x $first || true) $(echo "$packages" | grep -vx $first || true)"
    [ -n "${packages// /}" ] || fail "$suite has no source of Linux 7"
fi
for package in $packages; do
    if [ -z "$deb" ]; then
        # apt-get puts it into the current directory.
        (cd "$work" && apt-get -qq download "$package" >"$work/log" 2>&1) || { cat "$work/log" >&2; fail "cannot fetch $package"; }
        set -- "$work/$package"_*.deb
    else
        set -- "$deb"
    fi
    if compile "$1" >"$work/log" 2>&1; then
        echo "$format" >"$dir/.made"
        exit 0
    fi
    echo "fetch-kernel.sh: the selftests of $package do not compile:" >&2
    tail -n 20 "$work/log" >&2
done
fail "no source whose selftests compile"
