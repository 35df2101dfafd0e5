#!/usr/bin/env bash
# Run by tests/ublk_endurance.rs as root in a guest with little memory and a disk: more dirty pages than there is memory
# are written to a device, which may not wait for itself. (Swap does: kernel-notes/2026-11-23-swap-on-a-block-device.md.)
# usage: ublk_memory.sh COWGATE
set -euo pipefail
cowgate=$1
# shellcheck source=tests/clients/guest.sh
. "$(dirname "$0")/guest.sh"
# shellcheck source=tests/clients/devices.sh
. "$(dirname "$0")/devices.sh"

# Every thread gets memory without I/O: PF_MEMALLOC_NOIO (include/linux/sched.h) in what the kernel tells of it.
all_are_flushers() {
    local task flags
    for task in "/proc/$pid/task"/*; do
        # one of io_uring's may end meanwhile
        flags=$(cut -d ' ' -f 9 "$task/stat" 2>/dev/null) || continue
        [ $((flags & 0x80000)) -ne 0 ] || fail "thread $(cat "$task/comm") may reclaim memory by I/O: flags $flags"
    done
}
locked() { sed -n 's/^VmLck:[^0-9]*\([0-9]*\) kB/\1/p' "/proc/$pid/status"; }
nothing_locked() { [ "$(locked)" -eq 0 ]; }
# `yes` ends by a signal
text() { yes "all that is written has to be read back" | head -c 520M || true; }
number() { sed -n "s/^$1[: ]*\([0-9]*\).*/\1/p" "$2"; }

modprobe virtio_blk
mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 /dev/vda
mkdir -p /run/disk
mount /dev/vda /run/disk
configure
qemu-img create -q -f qcow2 /run/disk/base.qcow2 600M
qemu-img create -q -f qcow2 -F qcow2 -b /run/disk/base.qcow2 /run/disk/files.qcow2
qemu-img create -q -f qcow2 /run/disk/second.qcow2 100M
modprobe ublk_drv

say "threads, and pages of the daemon"
# the daemon has a small share of the memory to itself, and what it writes to images counts
mkdir -p /run/groups
mount -t cgroup2 cgroup /run/groups
echo +memory >/run/groups/cgroup.subtree_control
mkdir /run/groups/daemon
echo 80M >/run/groups/daemon/memory.max
start
echo "$pid" >/run/groups/daemon/cgroup.procs
equal "what is locked without devices" "$(locked)" 0
export_file files "/run/disk/files.qcow2" "ublk = true"
export_file second "/run/disk/second.qcow2" "ublk = true"
reload
appears files
files=$device
appears second
second=$device
[ "$(locked)" -gt 0 ] || fail "the daemon may be swapped out to its own devices"

say "more dirty pages than memory"
mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 "$files"
mount "$files" /mnt
text >/mnt/large
# over NBD beside it: workers share locks with queues
nbdcopy --synchronous "nbd+unix:///files?socket=$dir/sock" null: &
reader=$!
sync /mnt/large
all_are_flushers
wait "$reader" || fail "nbdcopy"
umount /mnt
mount -o ro "$files" /mnt
text | cmp - /mnt/large || fail "the file has changed"
umount /mnt
e2fsck -fn "$files" >"$dir/fsck" 2>&1 || { cat "$dir/fsck"; fail "the file system is broken"; }

equal "what was killed in the daemon's group" "$(number oom_kill /run/groups/daemon/memory.events)" 0

say "an image on its own device"
mkfs.ext4 -q "$second"
mount "$second" /mnt
truncate -s 1M /mnt/own.raw
export_file second /mnt/own.raw "ublk = true"
reload
said() { grep -q "$1" "$dir/log"; }
until_true "the complaint" said "ERROR export \"second\": /mnt/own.raw lies on the export's own block device $second"
umount /mnt

say "the end of all devices"
rm "$dir/conf.d"/*
reload
until_true "the end of $files" test ! -e "$files"
until_true "the end of locking" nothing_locked
grep "WARN" "$dir/log" && fail "the daemon warns"
stop
qemu-img check -q -f qcow2 /run/disk/files.qcow2 || fail "qemu-img check"
qemu-img check -q -f qcow2 /run/disk/second.qcow2 || fail "qemu-img check"
nothing_is_left
say "done"
echo "all is well"
