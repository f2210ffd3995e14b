#!/usr/bin/env bash
# Measures ring3 beside QEMU's TCG: the same kernel, the same initramfs, in alternation.
#
#   benches/peers.sh [RUNS] [KERNEL]        (default: 5 runs, the kernel that `ring3 run` would take)
#
# For each run and machine: host seconds from start to the first line of user space, the guest's integer
# loop, 500 x fork+exec of a static binary, a 64 MB page-fault sweep, and the process's peak memory. Prints
# every run, then medians and the ratios ring3/TCG (time and memory: less is better; integer rate: more is).
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-5}
target=x86_64-unknown-linux-gnu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cargo build --release --quiet --bin ring3
RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --quiet -p bench-guest --target $target \
    --target-dir target/bench-guest
ring3=target/release/ring3
kernel=${2:-$("$ring3" kernel list --path 2>/dev/null | head -n 1)}
[ -n "$kernel" ] || { echo "peers.sh: no kernel: run '$ring3 kernel fetch' first, or name one" >&2; exit 1; }
command -v cpio >/dev/null || { echo "peers.sh: needs cpio (apt-get install cpio)" >&2; exit 1; }
mkdir -p "$work/root/dev"
cp "target/bench-guest/$target/release/bench-guest" "$work/root/init"
(cd "$work/root" && find . | cpio -o -H newc --quiet) >"$work/initramfs"

machines=(ring3)
if command -v qemu-system-x86_64 >/dev/null; then machines+=(tcg); else
    echo "peers.sh: no qemu-system-x86_64: measuring ring3 alone" >&2; fi
append="console=ttyS0 quiet panic=-1 mitigations=off"

start_ring3() { "$ring3" run --kernel "$kernel" --initramfs "$work/initramfs" --append "$append" \
    --memory 512M --cpus 1 </dev/null; }
start_tcg() { qemu-system-x86_64 -M q35 -accel tcg -cpu max -smp 1 -m 512 -display none -nodefaults -no-reboot \
    -serial stdio -kernel "$kernel" -initrd "$work/initramfs" -append "$append" </dev/null; }

now() { date +%s.%N; }
for run in $(seq "$runs"); do
    for machine in "${machines[@]}"; do
        out=$work/out
        begin=$(now)
        # The line's time is taken as it arrives.
        { "start_$machine" & pid=$!; peak=0
          while kill -0 $pid 2>/dev/null; do
              hwm=$(awk '/VmHWM/ {print $2}' "/proc/$(pgrep -P $pid 2>/dev/null | head -n 1 || true)/status" 2>/dev/null || true)
              [ -n "${hwm:-}" ] && peak=$hwm
              sleep 0.2
          done
          echo "bench: peak ${peak} KiB"; } 2>/dev/null | while IFS= read -r line; do
            case $line in *"bench: first line"*) echo "first $(echo "$(now) - $begin" | bc)";;
                *"bench: integer"*) echo "integer $(sed 's/.* \([0-9.]*\) M.s.*/\1/' <<<"$line")";;
                *"bench: spawn"*) echo "spawn $(awk '{for(i=1;i<NF;i++) if($i=="spawn") print $(i+1)}' <<<"$line")";;
                *"bench: sweep"*) echo "sweep $(awk '{for(i=1;i<NF;i++) if($i=="sweep") print $(i+1)}' <<<"$line")";;
                *"bench: peak"*) echo "peak $(awk '{print $3/1024}' <<<"$line")";;
            esac
        done >"$out"
        while read -r name value; do
            echo "run $run $machine $name $value"
            echo "$value" >>"$work/$machine.$name"
        done <"$out"
    done
done

median() { sort -g "$1" | awk '{v[NR]=$1} END {print (NR%2) ? v[(NR+1)/2] : (v[NR/2]+v[NR/2+1])/2}'; }
echo
printf '%-34s %12s %12s %12s\n' "median of $runs runs" ring3 TCG ring3/TCG
for row in "first:first user-space line, s" "integer:integer loop, M instr/s" "spawn:500 x fork+exec, s" \
    "sweep:64 MB page-fault sweep, s" "peak:peak memory, MiB"; do
    name=${row%%:*}
    a=$(median "$work/ring3.$name")
    if [ -e "$work/tcg.$name" ]; then
        b=$(median "$work/tcg.$name")
        printf '%-34s %12.3f %12.3f %12.2f\n' "${row#*:}" "$a" "$b" "$(awk "BEGIN {print $a/$b}")"
    else
        printf '%-34s %12.3f\n' "${row#*:}" "$a"
    fi
done
