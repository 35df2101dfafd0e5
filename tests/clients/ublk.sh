#!/usr/bin/env bash
# Run by tests/ublk.rs as root in a guest: exports as block devices (/dev/ublkbN).
# usage: ublk.sh COWGATE WAY
# WAY: how data is to move with this kernel, "zero copy" or "user copy"
set -euo pipefail
cowgate=$1
expected=$2
# shellcheck source=tests/clients/guest.sh
. "$(dirname "$0")/guest.sh"
names=/dev/cowgate/by-name
size=$((64 << 20))

# Waits for the device of an export; sets `device` and `queue`.
appears() { # export
    until_true "the device of $1" test -b "$names/$1"
    device=$(readlink -f "$names/$1")
    queue=/sys/block/${device#/dev/}/queue
}
vanishes() { # export
    until_true "the end of the device of $1" test ! -e "$names/$1"
    until_true "the end of $device" test ! -e "$device"
}
image_is_good() { # image, in which format QEMU reads it
    qemu-img check -q -f qcow2 "$1" || fail "qemu-img check $1"
}
unowned() { # nobody has a lock on it any more
    until_true "the lock of $1" qemu-io -f "$2" -c quit "$1"
}

is_sound() { # device, kind
    local check
    case $2 in
        ext4) check=(e2fsck -fn) ;;
        xfs) check=(xfs_repair -n) ;;
        btrfs) check=(btrfs check --readonly) ;;
    esac
    "${check[@]}" "$1" >"$dir/fsck" 2>&1 || { cat "$dir/fsck"; fail "the file system is broken"; }
}

# What `ublk list` says of an export's device.
listed() { # export, field
    "$cowgate" ublk list --json | /usr/bin/python3 -c 'import json, sys
print(*(d[sys.argv[2]] for d in json.load(sys.stdin)["devices"] if d["export"] == sys.argv[1]))' "$1" "$2"
}
# Reads and writes of an export's device whose data was not copied.
not_copied() { # export
    "$cowgate" status --json --control "$dir/control" | /usr/bin/python3 -c 'import json, sys
print(*(e["totals"]["zero_copy"] for e in json.load(sys.stdin)["exports"] if e["name"] == sys.argv[1]))' "$1"
}
moves_data() { # export, way
    equal "how the data of $1 moves" "$(listed "$1" data)" "$2"
    local moved
    moved=$(not_copied "$1")
    case $2 in
        "zero copy") [ "$moved" -gt 0 ] || fail "all data of $1 was copied" ;;
        *) equal "what of $1 was not copied" "$moved" 0 ;;
    esac
}

features() { # cluster
    equal "the size" "$(blockdev --getsize64 "$device")" "$size"
    equal "read-only" "$(blockdev --getro "$device")" 0
    equal "the logical block" "$(cat "$queue/logical_block_size")" 512
    equal "the least I/O" "$(cat "$queue/minimum_io_size")" "$1"
    equal "the best I/O" "$(cat "$queue/optimal_io_size")" "$1"
    equal "what is discarded" "$(cat "$queue/discard_granularity")" "$1"
    equal "the cache" "$(cat "$queue/write_cache")" "write back"
    equal "FUA" "$(cat "$queue/fua")" 1
    [ "$(cat "$queue/write_zeroes_max_bytes")" -gt 0 ] || fail "the device cannot write zeroes"
}

# A file system's whole life.
file_system() { # export, kind
    say "$1: $2"
    appears "$1"
    case $2 in
        ext4) mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 "$device" ;;
        xfs) mkfs.xfs -q -f "$device" ;;
        btrfs) mkfs.btrfs -q -f "$device" ;;
    esac
    mount "$device" /mnt
    cp -r "$(dirname "$0")/../../src" /mnt/files
    (cd /mnt && find . -type f -exec md5sum {} + | sort) >"$dir/sums"
    [ -s "$dir/sums" ] || fail "no files"
    dd if=/dev/urandom of=/mnt/gone bs=1M count=8 status=none conv=fsync
    rm /mnt/gone
    fstrim -v /mnt | grep -v ' 0 B' >/dev/null || fail "fstrim trimmed nothing"
    fio_verifies /mnt/fio 12M 4k
    umount /mnt
    is_sound "$device" "$2"
    mount -o ro "$device" /mnt
    (cd /mnt && md5sum --quiet -c "$dir/sums") || fail "files have changed"
    umount /mnt
    digest "$device" >"$dir/digest-$1"
    # an NBD client sees the same
    equal "what nbdcopy reads" "$(nbdcopy "nbd+unix:///$1?socket=$dir/sock" - | md5sum | cut -d ' ' -f 1)" "$(cat "$dir/digest-$1")"
}

# The bare device: writes, zeroes and discards.
bare() { # export, cluster
    say "$1: the bare device"
    appears "$1"
    features "$2"
    fio_verifies "$device" 16M 512
    head -c 4M /dev/zero | tr '\0' x | dd of="$device" bs=1M seek=32 oflag=direct iflag=fullblock status=none
    blkdiscard -z -o $((33 << 20)) -l $((1 << 20)) "$device"
    blkdiscard -o $((34 << 20)) -l $((1 << 20)) "$device"
    cmp -n $((1 << 20)) -i $((33 << 20)):0 "$device" /dev/zero || fail "zeroed blocks are not zeroes"
    equal "the block before" "$(dd if="$device" bs=512 skip=$(((33 << 11) - 1)) count=1 status=none | tr -d x | wc -c)" 0
}

letters() { head -c "$2" /dev/zero | tr '\0' "$1"; } # letter, bytes
# Reads a device around the page cache.
content() { dd if="$device" bs=64K iflag=direct status=none | md5sum; }

# What a file lacks at its end are zeroes, however data moves, and what it gets there stays.
short_files() {
    truncate -s 2M "$dir/short.raw"
    letters y 1M | dd of="$dir/short.raw" bs=64K conv=notrunc iflag=fullblock status=none
    qemu-img create -q -f qcow2 -o preallocation=metadata "$dir/short.qcow2" 2M
    truncate -s -60K "$dir/short.qcow2"
    export_file short-raw "$dir/short.raw" "ublk = true"
    export_file short-qcow2 "$dir/short.qcow2" "ublk = true"
    reload
    appears short-raw
    truncate -s 600K "$dir/short.raw"
    equal "the shorter file" "$(content)" "$({ letters y 600K; head -c 1448K /dev/zero; } | md5sum)"
    letters z 64K | dd of="$device" bs=64K seek=31 iflag=fullblock oflag=direct status=none
    equal "the longer file" "$(content)" \
        "$({ letters y 600K; head -c 1384K /dev/zero; letters z 64K; } | md5sum)"
    appears short-qcow2
    equal "the image" "$(content)" "$(head -c 2M /dev/zero | md5sum)"
    letters z 64K | dd of="$device" bs=64K seek=31 iflag=fullblock oflag=direct status=none
    equal "the image that was written" "$(content)" "$({ head -c 1984K /dev/zero; letters z 64K; } | md5sum)"
    rm "$dir/conf.d/short-raw.conf" "$dir/conf.d/short-qcow2.conf"
    reload
    vanishes short-qcow2
    image_is_good "$dir/short.qcow2"
}

# Small writes move without a copy where the file system takes them at once, as XFS does and tmpfs does not. Even there
# one in each tick of the clock, which changes the file's time, is copied.
small_writes() {
    truncate -s 400M "$dir/fs"
    modprobe loop
    mkfs.xfs -q "$dir/fs"
    mkdir "$dir/xfs"
    mount -o loop "$dir/fs" "$dir/xfs"
    head -c 4M /dev/zero >"$dir/xfs/disk.raw"
    qemu-img create -q -f qcow2 -o preallocation=metadata "$dir/xfs/disk.qcow2" 4M
    local kind
    for kind in raw qcow2; do
        export_file "small-$kind" "$dir/xfs/disk.$kind" "ublk = true"
    done
    reload
    for kind in raw qcow2; do
        appears "small-$kind"
        fio_verifies "$device" 4M 512
        # every table is in memory, every block is stored
        letters v 4M | dd of="$device" bs=64K oflag=direct iflag=fullblock status=none
        letters w 64K | dd of="$device" bs=4K seek=16 oflag=direct iflag=fullblock status=none
        letters w 64K | cmp -n 65536 -i 65536:0 "$device" - || fail "it reads something else"
        rm "$dir/conf.d/small-$kind.conf"
    done
    reload
    vanishes small-qcow2
    unowned "$dir/xfs/disk.qcow2" qcow2
    unowned "$dir/xfs/disk.raw" raw
    image_is_good "$dir/xfs/disk.qcow2"
    umount "$dir/xfs"
}

configure
truncate -s "$size" "$dir/disk.raw"
truncate -s 1M "$dir/extra.raw"
qemu-img create -q -f qcow2 "$dir/base.qcow2" "$size"
qemu-io -f qcow2 -c "write -P 7 0 64M" "$dir/base.qcow2" >/dev/null
qemu-img create -q -f qcow2 -F qcow2 -b "$dir/base.qcow2" "$dir/overlay.qcow2"
for kind in xfs btrfs; do
    qemu-img create -q -f qcow2 "$dir/$kind-base.qcow2" 400M
    qemu-io -f qcow2 -c "write -P 9 1M 40M" "$dir/$kind-base.qcow2" >/dev/null
    qemu-img create -q -f qcow2 -F qcow2 -b "$dir/$kind-base.qcow2" "$dir/$kind.qcow2"
    export_file "$kind" "$dir/$kind.qcow2" "ublk = true"
done
modprobe ublk_drv
export_file raw "$dir/disk.raw" "ublk = true\nublkid = 5"
export_file overlay "$dir/overlay.qcow2" "ublk = true\nublkqueues = 2"
export_file copied "$dir/extra.raw" "ublk = true\nublkzerocopy = false"
start

appears raw
equal "the device" "$device" /dev/ublkb5
bare raw 4096
bare overlay 65536
way="user copy"
if "$cowgate" ublk list | grep '^driver:' | grep -qw AUTO_BUF_REG; then way="zero copy"; fi
say "$way"
equal "the way of this kernel" "$way" "$expected"
moves_data raw "$way"
moves_data overlay "$way"
equal "the queues" "$(listed overlay queues)" 2
appears copied
fio_verifies "$device" 1M 512
moves_data copied "user copy"
rm "$dir/conf.d/copied.conf"
reload
vanishes copied

say "files that are shorter than their disks"
short_files
say "small writes"
small_writes
file_system xfs xfs
file_system btrfs btrfs
file_system raw ext4
file_system overlay ext4

say "an export that is not to be a device any more, and one that is mounted"
appears overlay
mount "$device" /mnt
export_file raw "$dir/disk.raw"
rm "$dir/conf.d/overlay.conf"
reload
device=/dev/ublkb5 vanishes raw
unowned "$dir/disk.raw" raw
appears overlay
(cd /mnt && md5sum --quiet -c "$dir/sums") || fail "files have changed"
dd if=/dev/urandom of=/mnt/more bs=1M count=2 status=none conv=fsync
umount /mnt
vanishes overlay
unowned "$dir/overlay.qcow2" qcow2
image_is_good "$dir/overlay.qcow2"
image_is_good "$dir/base.qcow2"
equal "the base" "$(qemu-io -r -f qcow2 -c 'read -P 7 0 64M' "$dir/base.qcow2" | grep -c 'Pattern verification failed')" 0

say "the command line"
"$cowgate" ublk list | grep -q "/dev/ublkb.* no .*xfs" || fail "it is not listed: $("$cowgate" ublk list)"
appears xfs
mount "$device" /mnt
equal "whether it is in use" "$(listed xfs in_use)" True
"$cowgate" ublk delete "${device#/dev/ublkb}" 2>"$dir/said" && fail "a mounted device was deleted"
grep -q "is in use" "$dir/said" || fail "it says $(cat "$dir/said")"
umount /mnt

for nothing in 77 4294967295; do
    "$cowgate" ublk delete "$nothing" 2>"$dir/said" && fail "a device that is not there was deleted"
    grep -q "there is no ublk device $nothing" "$dir/said" || fail "it says $(cat "$dir/said")"
done

say "an export that is removed while a part of its device is open, or a loop device is on it"
truncate -s 32M "$dir/parts.raw"
echo start=2048 | sfdisk -q "$dir/parts.raw"
export_file parts "$dir/parts.raw" "ublk = true"
reload
appears parts
until_true "its partition" test -b "${device}p1"
exec 7<"${device}p1"
modprobe loop
loop=$(losetup --find --show --read-only "$device")
rm "$dir/conf.d/parts.conf"
reload
sleep 1
test -b "$device" || fail "it went under a loop device and a part that was open"
exec 7<&-
sleep 1
test -b "$device" || fail "it went under a loop device"
losetup -d "$loop"
vanishes parts

say "an export that is removed with force"
export_file short "$dir/extra.raw" "ublk = true"
reload
appears short
equal "whether it is in use" "$(listed short in_use)" False
exec 7<"$device"
equal "whether it is in use" "$(listed short in_use)" True
"$cowgate" export remove short --force --wait --control "$dir/control" >/dev/null
vanishes short
exec 7<&-

say "a daemon that is killed, and what it leaves"
kill -9 "$pid"
wait "$pid" || true
start
appears btrfs
is_sound "$device" btrfs

say "what cannot be"
export_file many "$dir/extra.raw" "ublk = true\nublkqueues = 64"
export_file taken "$dir/extra.raw" "ublk = true\nublkid = ${device#/dev/ublkb}"
export_file missing "$dir/nothing.raw" "ublk = true"
reload
said() { grep -q "$1" "$dir/log"; }
until_true "the complaints" said 'export "many": no block device: ublkqueues = 64, and this machine has 2 processors'
until_true "the complaints" said "export \"taken\": no block device: ublk device ${device#/dev/ublkb} exists already"
until_true "the complaints" said 'export "missing": no block device: .*nothing.raw'
rm "$dir/conf.d/many.conf" "$dir/conf.d/taken.conf" "$dir/conf.d/missing.conf"

say "both again, and the end of the daemon"
export_file overlay "$dir/overlay.qcow2" "ublk = true"
export_file raw "$dir/disk.raw" "ublk = true\nreadonly = true"
reload
appears overlay
e2fsck -fn "$device" >/dev/null 2>&1 || fail "the file system is broken"
appears raw
equal "read-only" "$(blockdev --getro "$device")" 1
equal "what is on it" "$(digest "$device")" "$(cat "$dir/digest-raw")"
exec 7<"$device"
stop
said "$device is still open" || fail "nothing is said of a device that is open when the daemon ends"
exec 7<&-
[ -e "$device" ] && fail "a device without a daemon"
image_is_good "$dir/overlay.qcow2"
image_is_good "$dir/xfs.qcow2"
image_is_good "$dir/btrfs.qcow2"
equal "what is left of devices" "$("$cowgate" ublk list | grep -c /dev/ublk)" 0
grep -E 'panicked' "$dir/log" && fail "the daemon panicked"
dmesg | grep -E 'BUG:|WARNING:|blocked for more' && fail "the kernel complains"
say "done"
echo "all is well"
