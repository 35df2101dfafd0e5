#!/usr/bin/env bash
# Run by tests/ublk_endurance.rs as root in a guest whose disk outlives it. Each boot but the first verifies what the one
# before left when its power was cut; each but the last ends by a cut.
# usage: ublk_power.sh COWGATE KIND ROUND ROUNDS SHARE
#   KIND    of the file system on the device: ext4 or xfs
#   SHARE   a directory of the host: in it files that list what was durable, and "cut", the last round's end
set -euo pipefail
cowgate=$1 kind=$2 round=$3 rounds=$4 share=$5
# shellcheck source=tests/clients/guest.sh
. "$(dirname "$0")/guest.sh"
# shellcheck source=tests/clients/devices.sh
. "$(dirname "$0")/devices.sh"

check() {
    local status=0
    # leaks are what a crash may leave
    qemu-img check -q -f qcow2 "$1" >"$dir/check" || status=$?
    [ "$status" -eq 0 ] || [ "$status" -eq 3 ] || { cat "$dir/check"; fail "qemu-img check $1: $status"; }
}
durable() { cat "$share"/durable-* 2>/dev/null | wc -l; }
# The bytes of a file are told by its name.
content() { # number
    local lines=$(($1 * 7919 % 9000 + 1))
    yes "file $1 of a disk without power" | head -n "$lines" || true
}

modprobe -a virtio_blk ublk_drv
mkdir -p /run/disk
configure
if [ "$round" -eq 0 ]; then
    mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 /dev/vda
    mount /dev/vda /run/disk
    qemu-img create -q -f qcow2 /run/disk/base.qcow2 400M
    qemu-io -f qcow2 -c "write -P 9 0 8M" /run/disk/base.qcow2 >/dev/null
    qemu-img create -q -f qcow2 -F qcow2 -b base.qcow2 /run/disk/middle.qcow2
    qemu-img create -q -f qcow2 -F qcow2 -b middle.qcow2 /run/disk/top.qcow2
    sync
else
    mount /dev/vda /run/disk
    for image in base middle top; do
        check "/run/disk/$image.qcow2"
    done
fi
export_file top /run/disk/top.qcow2 "ublk = true"
start
appears top
if [ "$round" -eq 0 ]; then
    case $kind in
        ext4) mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 "$device" ;;
        xfs) mkfs.xfs -q -f "$device" ;;
    esac
    mount "$device" /mnt
else
    # mounting replays the journal
    mount "$device" /mnt
    say "round $round: $(durable) files were durable"
    cat "$share"/durable-* >"$dir/durable"
    while read -r number sum; do
        equal "file $number" "$(md5sum <"/mnt/$number" | cut -d ' ' -f 1)" "$sum"
    done <"$dir/durable"
    umount /mnt
    case $kind in
        ext4) e2fsck -fn "$device" >"$dir/fsck" 2>&1 || { cat "$dir/fsck"; fail "e2fsck"; } ;;
        xfs) xfs_repair -n "$device" >"$dir/fsck" 2>&1 || { cat "$dir/fsck"; fail "xfs_repair"; } ;;
    esac
    mount "$device" /mnt
    find /mnt -mindepth 1 -delete
fi
if [ "$round" -eq "$rounds" ]; then
    umount /mnt
    stop
    check /run/disk/top.qcow2
    nothing_is_left
    echo "all is well"
    exit
fi

rm -f "$share"/durable-*
sync /mnt
load() { # the first of its numbers
    local number=$1
    while true; do
        content "$number" >"/mnt/$number.new"
        mv "/mnt/$number.new" "/mnt/$number"
        # what is not waited for is in the way of what is
        content $((number + 1)) >"/mnt/$number.dirty"
        sync "/mnt/$number" /mnt
        echo "$number $(content "$number" | md5sum | cut -d ' ' -f 1)" >>"$share/durable-$1"
        number=$((number + 1))
        [ $((number % 4)) -ne 0 ] || rm "/mnt/$((number - 3)).dirty"
    done
}
for first in 1000000 2000000 3000000; do
    load "$first" &
done
enough() { [ "$(durable)" -ge 12 ]; }
until_true "files" enough
# any moment will do
sleep "$((RANDOM % 2)).$((RANDOM % 1000))"
# what is said on the way to the cut may not get out any more
echo "round $round: cut with $(durable) files" >"$share/cut"
echo b >/proc/sysrq-trigger
