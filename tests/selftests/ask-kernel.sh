#!/usr/bin/env bash
# Runs a program on the real kernel, under QEMU's TCG, and prints what it prints.
#
#   ask-kernel.sh [-k BZIMAGE] [-t SECONDS] [-v] [-c WORDS] [-f FILE]... PROGRAM [ARGUMENT...]
#
#   -k BZIMAGE   the kernel (made by build-oracle.sh; default: $RING3_ORACLE_KERNEL)
#   -t SECONDS   what the run may take (default 120)
#   -v           with an Intel IOMMU, an igb and an edu card; both cards are given to vfio-pci
#   -c WORDS     more of the kernel's command line
#   -f FILE      another file that the program needs, put at /
#
# The program may be dynamic: the libraries that ldd names are taken along. It runs as root with 64 huge pages and no
# limit of locked memory. The exit status is the program's, or 124 if it did not end.
# Needs QEMU ($RING3_ORACLE_QEMU, or qemu-system-x86_64), a static busybox, cpio and no root.
set -eu

fail() { echo "ask-kernel.sh: $1" >&2; exit 125; }
kernel=${RING3_ORACLE_KERNEL-} qemu=${RING3_ORACLE_QEMU-qemu-system-x86_64} seconds=120 vfio= words= files=()
while getopts k:t:vc:f: option; do
    case $option in
    k) kernel=$OPTARG ;;
    t) seconds=$OPTARG ;;
    v) vfio=1 ;;
    c) words=$OPTARG ;;
    f) files+=("$OPTARG") ;;
    *) fail "see the head of this script" ;;
    esac
done
shift $((OPTIND - 1))
[ $# -ge 1 ] || fail "usage: ask-kernel.sh [OPTION...] PROGRAM [ARGUMENT...]"
[ -r "$kernel" ] || fail "no kernel: give -k, or set RING3_ORACLE_KERNEL"
program=$1
[ -x "$program" ] || fail "$program is no program"
for tool in "$qemu" busybox cpio; do
    command -v "$tool" >/dev/null || fail "no $tool"
done

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root"/tree/{bin,proc,sys,dev,tmp,lib,lib64}
cp "$(command -v busybox)" "$root/tree/bin/busybox"
cp "$program" ${files[@]+"${files[@]}"} "$root/tree/"
for binary in "$program" ${files[@]+"${files[@]}"}; do ldd "$binary" 2>/dev/null || true; done | sed -n 's/.*=> \(\/[^ ]*\).*/\1/p; s/^[[:space:]]*\(\/[^ ]*\) (.*/\1/p' | while read -r library; do
    mkdir -p "$root/tree/$(dirname "$library")"
    cp -L "$library" "$root/tree/$library"
done
shift
{
    printf 'exec /%q' "$(basename "$program")"
    [ $# -eq 0 ] || printf ' %q' "$@"
    echo
} >"$root/tree/run.sh"
cat >"$root/tree/init" <<'INIT'
#!/bin/busybox sh
b=/bin/busybox
$b --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t debugfs debug /sys/kernel/debug
mount -t tmpfs tmp /tmp
echo 64 >/proc/sys/vm/nr_hugepages
ulimit -l unlimited
for card in $(ls /sys/bus/pci/devices); do
    case $(cat /sys/bus/pci/devices/$card/vendor):$(cat /sys/bus/pci/devices/$card/device) in
    0x8086:0x10c9 | 0x1234:0x11e8)
        echo vfio-pci >/sys/bus/pci/devices/$card/driver_override
        echo $card >/sys/bus/pci/drivers/vfio-pci/bind
        ;;
    esac
done
sleep 0.2
echo ORACLE-BEGIN
sh /run.sh
echo "ORACLE-END $?"
poweroff -f
INIT
chmod 755 "$root/tree/init"
(cd "$root/tree" && find . | cpio --quiet -o -H newc) >"$root/initrd"

# One processor where the Intel IOMMU is emulated: with two, invalidations can stall.
machine=(-machine q35 -smp 2) iommu=off
if [ -n "$vfio" ]; then
    machine=(-machine q35,kernel-irqchip=split -smp 1 -device intel-iommu,intremap=on
        -device igb,addr=05.0 -device edu,addr=06.0)
    # QEMU has this card since 8.0.
    "$qemu" -device help 2>/dev/null | grep -q '"igb"' ||
        machine=(-machine q35,kernel-irqchip=split -smp 1 -device intel-iommu,intremap=on -device edu,addr=06.0)
    iommu=on
fi
timeout -s KILL "$seconds" "$qemu" "${machine[@]}" -accel tcg -cpu max -m $([ -n "$vfio" ] && echo 4096 || echo 2048) -net none \
    -kernel "$kernel" -initrd "$root/initrd" \
    -append "console=ttyS0 quiet panic=-1 no_timer_check intel_iommu=$iommu vfio_pci.enable_sriov=1 $words" \
    -display none -monitor none -serial stdio -no-reboot </dev/null >"$root/out" 2>"$root/err" || true
tr -d '\r' <"$root/out" >"$root/text"
sed -n '/^ORACLE-BEGIN$/,/^ORACLE-END /{/^ORACLE-/!p}' "$root/text"
status=$(sed -n 's/^ORACLE-END \([0-9]*\)$/\1/p' "$root/text" | tail -n 1)
[ -n "$status" ] || { tail -n 20 "$root/text" "$root/err" >&2; echo "ask-kernel.sh: no end within $seconds s" >&2; exit 124; }
exit "$status"
