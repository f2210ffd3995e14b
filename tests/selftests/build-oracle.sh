#!/usr/bin/env bash
# Builds the kernel whose answers are recorded: tiny, with iommufd, its mock IOMMU, VFIO and failure injection.
#
#   tests/selftests/build-oracle.sh DIR DEB
#
# DEB is Debian's package linux-source-7.3; DIR receives bzImage (7 minutes on two processors, 2 GB while it lasts).
# Needs what a kernel is built with: make, gcc, flex, bison, bc, libelf-dev, xz. See record.sh for what it is good for.
set -eu

fail() { echo "build-oracle.sh: $1" >&2; exit 1; }
[ $# -eq 2 ] || fail "usage: build-oracle.sh DIR DEB"
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
dir=$(realpath "$1") deb=$(realpath "$2")
for tool in make gcc flex bison bc xz dpkg-deb; do
    command -v $tool >/dev/null || fail "no $tool"
done

tree=$dir/tree
rm -rf "$tree"
mkdir "$tree"
trap 'rm -rf "$tree"' EXIT
dpkg-deb --fsys-tarfile "$deb" | tar -xO --wildcards './usr/src/linux-source-*.tar.xz' | xz -dc |
    tar -x -C "$tree" --strip-components=1
make -s -C "$tree" tinyconfig >/dev/null
cat "$here/oracle.config" >>"$tree/.config"
make -s -C "$tree" olddefconfig >/dev/null 2>&1
make -s -C "$tree" -j"$(nproc)" bzImage
cp "$tree/arch/x86/boot/bzImage" "$dir/bzImage"
