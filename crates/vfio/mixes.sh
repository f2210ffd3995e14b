#!/usr/bin/env bash
# Builds crate vfio with every legal mix of its doors, and checks that each serves its nodes and holds no code of a door
# that it has not. Mixes that are not legal must not build, and say why. Needs nm (binutils).
#
#   crates/vfio/mixes.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

# Only what is in the library matters here, not how fast it is; and no mix is built twice.
export CARGO_PROFILE_DEV_OPT_LEVEL=0 CARGO_PROFILE_DEV_DEBUG=none CARGO_INCREMENTAL=0
target=${CARGO_TARGET_DIR:-target}/mixes
cargo=(cargo)
fail() { echo "mixes.sh: $1" >&2; exit 1; }

# build FEATURES: the library, and the program that prints its nodes.
build() { CARGO_TARGET_DIR=$target "${cargo[@]}" build --quiet -p vfio --no-default-features --features "$1" "${@:2}"; }

# legal FEATURES NODE...: the mix serves exactly these nodes.
legal() {
    local features=$1
    shift
    build "$features" --lib --example nodes || fail "$features does not build"
    local nodes symbols
    nodes=$("$target/debug/examples/nodes" 2>/dev/null | tr '\n' ' ')
    [ "$nodes" = "${*:+$* }" ] || fail "$features serves '$nodes' instead of '$*'"
    symbols=$(nm -C "$target"/debug/libvfio.rlib 2>/dev/null) || fail "nm cannot read $target/debug/libvfio.rlib"
    for part in doors::cdev:device-cdev doors::group:group doors::container:container kernel:kernel; do
        case ",$features," in
        *,"${part##*:}",*) grep -q "vfio::${part%:*}::" <<<"$symbols" || fail "$features has no code of ${part##*:}" ;;
        *) ! grep -q "vfio::${part%:*}::" <<<"$symbols" || fail "$features has code of ${part##*:}" ;;
        esac
    done
    echo "ok: $features: $nodes"
}

# illegal FEATURES REASON: the mix does not build, with this reason.
illegal() {
    local said
    said=$(build "$1" --lib 2>&1) && fail "$1 builds"
    grep -qF "$2" <<<"$said" || fail "$1 fails for another reason: $said"
    echo "refused: $1"
}

group=/dev/vfio/5 container=/dev/vfio/vfio iommu=/dev/iommu device=/dev/vfio/devices/vfio0

# The kernel's table, row by row: IOMMUFD, VFIO_DEVICE_CDEV, VFIO_GROUP, VFIO_CONTAINER, IOMMUFD_VFIO_CONTAINER.
legal group,container "$container" "$group"
legal iommufd,group,container "$iommu" "$container" "$group"
legal iommufd,group,iommufd-container "$iommu" "$container" "$group"
legal iommufd,group "$iommu" "$group"
legal iommufd,device-cdev,group,container "$iommu" "$container" "$group" "$device"
legal iommufd,device-cdev,group "$iommu" "$group" "$device"
legal iommufd,device-cdev,group,iommufd-container "$iommu" "$container" "$group" "$device"
legal iommufd,device-cdev "$iommu" "$device"
legal group,container,noiommu "$container" "$group"
legal iommufd,group,container,kernel "$iommu" "$container" "$group"
legal iommufd,device-cdev,group,container,noiommu "$iommu" "$container" "$group" "$device"
illegal group,container,iommufd-container "would both serve /dev/vfio/vfio"
illegal group "needs something that translates"
