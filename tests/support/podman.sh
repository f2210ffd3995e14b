#!/bin/bash
# Runs a shell script as a user without privileges where podman works: podman.sh ROOT PASTA SCRIPT
#
# ROOT is a root file system with podman and busybox (benches/peers/fetch.sh), which is not written to; PASTA is put in the place
# of pasta. To be started as root of a user namespace, in mount, PID, IPC, UTS and cgroup namespaces of its own. The user is 1000 in
# a second user namespace: podman takes root for privileged. The image `busybox` is there.
set -eu
root=$1 pasta=$2 script=$3

mount --make-rprivate /
work=$(mktemp -d)
mount -t tmpfs -o mode=755 tmpfs "$work"
cd "$work"
mkdir old usr etc proc sys dev run tmp home var
# Nothing that podman tries may change the packages.
mount --rbind "$root/usr" usr
mount -o remount,bind,ro usr
for name in bin sbin lib lib64; do ln -s usr/$name $name; done
mount -t proc proc proc
mount -t sysfs sys sys
# Podman wants version 2 alone, also where the host has both.
mount -t cgroup2 cgroup sys/fs/cgroup
mkdir dev/pts dev/shm dev/net
for name in null zero full random urandom tty net/tun; do
    : >dev/$name
    mount --bind /dev/$name dev/$name
done
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd

mkdir -p etc/containers run/bin run/user home/user var/tmp
chmod 1777 tmp var/tmp
: >run/bin/pasta
mount --bind "$pasta" run/bin/pasta
printf 'root:x:0:0::/:/bin/bash\nuser:x:1000:1000::/home/user:/bin/bash\n' >etc/passwd
printf 'root:x:0:\nuser:x:1000:\n' >etc/group
echo "127.0.0.1 localhost $(cat /proc/sys/kernel/hostname)" >etc/hosts
echo "nameserver 192.0.2.1" >etc/resolv.conf
echo '{"default":[{"type":"insecureAcceptAnything"}]}' >etc/containers/policy.json
cat >etc/containers/storage.conf <<EOF
[storage]
driver = "vfs"
[storage.options.vfs]
ignore_chown_errors = "true"
EOF
cat >etc/containers/containers.conf <<EOF
[engine]
helper_binaries_dir = ["/run/bin", "/usr/lib/podman"]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
[containers]
cgroups = "disabled"
log_driver = "k8s-file"
EOF
mkdir -p tmp/image/bin
cp usr/bin/busybox tmp/image/bin
for name in sh ip cat nc nslookup sleep echo; do ln -s busybox tmp/image/bin/$name; done
tar -C tmp/image -cf tmp/image.tar .
rm -r tmp/image

pivot_root . old
cd /
umount -l /old
mount --make-rshared /
exec unshare --user --map-user=1000 --map-group=1000 /usr/bin/env -i PATH=/run/bin:/usr/bin:/usr/sbin \
    HOME=/home/user XDG_RUNTIME_DIR=/run/user bash -euc "podman import --quiet /tmp/image.tar busybox >/dev/null; $script"
