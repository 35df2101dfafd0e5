#!/usr/bin/env bash
# Run by tests/kernel_client.rs as root in a guest: the kernel's NBD client (nbd-client, /dev/nbdN) against the daemon.
# usage: kernel_client.sh COWGATE
set -euo pipefail
cowgate=$1
# shellcheck source=tests/clients/guest.sh
. "$(dirname "$0")/guest.sh"
device=/dev/nbd0
queue=/sys/block/nbd0/queue

connect() { # export, unix or tcp, block size
    local where=(127.0.0.1 "$port")
    [ "$2" = unix ] && where=(-unix "$dir/sock")
    nbd-client "${where[@]}" "$device" -name "$1" -connections 4 -block-size "$3" >/dev/null
    until_true "the device" test -e /sys/block/nbd0/pid
    equal "the logical block size" "$(cat $queue/logical_block_size)" "$3"
}
disconnect() {
    nbd-client -d "$device" >/dev/null
    until_true "the end of the device" test ! -e /sys/block/nbd0/pid
}

# The device's features are those of the export.
features() { # size
    equal "the size" "$(blockdev --getsize64 $device)" "$1"
    equal "read-only" "$(blockdev --getro $device)" 0
    equal "the cache" "$(cat $queue/write_cache)" "write back"
    equal "FUA" "$(cat $queue/fua)" 1
    [ "$(cat $queue/discard_max_bytes)" -gt 0 ] || fail "the device cannot discard"
    [ "$(cat $queue/write_zeroes_max_bytes)" -gt 0 ] || fail "the device cannot write zeroes"
}

# A file system's whole life, with a reload in the middle of a load.
file_system() { # export, unix or tcp, block size
    say "$1 over $2, blocks of $3: a file system"
    connect "$@"
    features "$size"
    mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 "$device"
    mount "$device" /mnt
    cp -r "$(dirname "$0")/../../src" /mnt/files
    say "  files"
    (cd /mnt && find . -type f -exec md5sum {} + | sort) >"$dir/sums"
    [ -s "$dir/sums" ] || fail "no files"
    dd if=/dev/urandom of=/mnt/gone bs=1M count=8 status=none conv=fsync
    rm /mnt/gone
    fstrim -v /mnt | grep -v ' 0 B' >/dev/null || fail "fstrim trimmed nothing"
    say "  fio and a reload"
    fio_verifies /mnt/fio 12M 4k &
    local load=$!
    export_file "during-$1" "$dir/extra.raw"
    reload
    nbdinfo --size "nbd://127.0.0.1:$port/during-$1" >/dev/null
    wait "$load"
    say "  fsck and what is read again"
    umount /mnt
    e2fsck -fn "$device" >"$dir/fsck" 2>&1 || { cat "$dir/fsck"; fail "the file system is broken"; }
    mount -o ro "$device" /mnt
    (cd /mnt && md5sum --quiet -c "$dir/sums") || fail "files have changed"
    umount /mnt
    digest "$device" >"$dir/digest"
    disconnect
    # a second reader, while the export is served
    equal "what nbdcopy reads" "$(nbdcopy "nbd+unix:///$1?socket=$dir/sock" - | md5sum | cut -d ' ' -f 1)" "$(cat "$dir/digest")"
}

# The bare device: every block size and transport that file_system leaves out, zeroes and discards.
bare() { # export, unix or tcp, block size
    say "$1 over $2, blocks of $3: the bare device"
    connect "$@"
    features "$size"
    fio_verifies "$device" 16M "$3"
    head -c 4M /dev/zero | tr '\0' x | dd of="$device" bs=1M seek=32 oflag=direct iflag=fullblock status=none
    blkdiscard -z -o $((33 << 20)) -l $((1 << 20)) "$device"
    blkdiscard -o $((34 << 20)) -l $((1 << 20)) "$device"
    cmp -n $((2 << 20)) -i $((33 << 20)):0 "$device" /dev/zero || fail "zeroed and discarded blocks are not zeroes"
    equal "the block before" "$(dd if="$device" bs=512 skip=$(((33 << 11) - 1)) count=1 status=none | tr -d x | wc -c)" 0
    blkdiscard -o $((40 << 20)) "$device"
    disconnect
}

configure
size=$((64 << 20))
truncate -s "$size" "$dir/disk.raw"
truncate -s 1M "$dir/extra.raw"
qemu-img create -q -f qcow2 "$dir/disk.qcow2" "$size"
export_file raw "$dir/disk.raw"
export_file qcow2 "$dir/disk.qcow2"
modprobe nbd nbds_max=2 max_part=0
start

bare qcow2 tcp 4096
bare raw unix 512
file_system raw tcp 4096
file_system qcow2 unix 512
stop
qemu-img check -q -f qcow2 "$dir/disk.qcow2" || fail "qemu-img check"
for format in raw qcow2; do
    qemu-img convert -f "$format" -O raw "$dir/disk.$format" "$dir/copy"
    [ "$format" = qcow2 ] && equal "what QEMU reads" "$(digest "$dir/copy")" "$(cat "$dir/digest")"
    e2fsck -fn "$dir/copy" >/dev/null 2>&1 || fail "the file system in disk.$format is broken"
done
rm "$dir/copy"

say "an image that grows"
"$cowgate" image resize -q "$dir/disk.qcow2" 96M
start
connect qcow2 unix 4096
equal "the new size" "$(blockdev --getsize64 $device)" $((96 << 20))
e2fsck -fp "$device" >/dev/null
resize2fs "$device" >/dev/null 2>&1 || fail "resize2fs"
e2fsck -fn "$device" >/dev/null 2>&1 || fail "the file system that has grown is broken"
disconnect

say "a read-only export"
export_file qcow2 "$dir/disk.qcow2" "readonly = true"
reload
connect qcow2 tcp 512
equal "read-only" "$(blockdev --getro $device)" 1
dd if=/dev/zero of="$device" bs=4k count=1 oflag=direct status=none 2>/dev/null && fail "a read-only device was written"
mount -o ro,noload "$device" /mnt
(cd /mnt && md5sum --quiet -c "$dir/sums") || fail "files have changed"

say "the daemon ends while the file system is mounted"
stop
echo 3 >/proc/sys/vm/drop_caches
(cd /mnt && md5sum --quiet -c "$dir/sums") >/dev/null 2>&1 && fail "files are read from a server that has ended"
umount /mnt
nbd-client -d "$device" >/dev/null 2>&1 || true
qemu-img check -q -f qcow2 "$dir/disk.qcow2" || fail "qemu-img check"
qemu-img convert -f qcow2 -O raw "$dir/disk.qcow2" "$dir/copy"
e2fsck -fn "$dir/copy" >/dev/null 2>&1 || fail "the file system is broken"
dmesg | grep -E 'BUG:|WARNING:|blocked for more' && fail "the kernel complains"
say "done"
echo "all is well"
