#!/usr/bin/env bash
# Run by tests/restore.rs as root in a guest: backups mounted by one command.
# usage: restore.sh COWGATE
set -euo pipefail
cowgate=$1
# shellcheck source=tests/clients/guest.sh
. "$(dirname "$0")/guest.sh"
state=/run/cowgate-restore

restore() { "$cowgate" restore "$@" -c "$dir/config"; }
field() { # of the last mount, its name
    python3 -c 'import json,sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$dir/entry" "$1"
}
# Mounts; sets `at`, `id` and `device`.
mounts() { # arguments
    restore mount --json "$@" >"$dir/entry" || fail "restore mount $*"
    # at once: each start of an interpreter takes a second here
    mapfile -t found < <(python3 -c 'import json,sys
entry = json.load(open(sys.argv[1]))
for name in "mount_point", "id", "device": print(entry[name])' "$dir/entry")
    at=${found[0]} id=${found[1]} device=${found[2]}
}
ends() { "$cowgate" restore umount "$@" >/dev/null || fail "restore umount $*"; }
process() { sed -n 's/.*"pid": \([0-9]*\),*/\1/p' "$state/$1/state.json"; }
fails() { # what it says, command
    local says=$1
    shift
    if "$@" >"$dir/said" 2>&1; then fail "this succeeded: $*"; fi
    grep -q -- "$says" "$dir/said" || fail "it does not say \"$says\" but: $(cat "$dir/said")"
}
refuses() { # the same
    fails "$@"
    all_has_ended
}
is_empty() { [ -z "$(ls -A "$1" 2>/dev/null)" ]; }
all_has_ended() {
    is_empty "$state" || fail "there is something left: $(find "$state")"
    until_true "the last device's end" bash -c '! ls /dev/ublk[bc][0-9]*' # the driver's own work may take a moment
    if pgrep -f 'restore serve' >/dev/null; then fail "a process is left"; fi
}
files() { # into a directory
    mkdir -p "$1/deep"
    cp "$(dirname "$0")"/*.sh "$1/deep"
    echo hello >"$1/hello"
}
holds_files() {
    equal "hello" "$(cat "$1/hello")" hello
    cmp "$(dirname "$0")/guest.sh" "$1/deep/guest.sh" || fail "a file has changed"
}
kills() { # a restore's process
    kill -9 "$(process "$1")"
    until_true "its end" bash -c "! test -e $device"
}
# A restore that gets no further than the look at its disk, until the file is removed; sets `command` and `id`.
begins() { # arguments
    touch "$dir/hold"
    PATH=$dir/slow:$PATH "$cowgate" restore "$@" >"$dir/begun" 2>&1 &
    command=$!
    # shellcheck disable=SC2016
    until_true "the look at the disk" bash -c 'grep -q device "$1"/*/state.json' - "$state"
    id=$(basename "$state"/*)
}
goes_on() {
    rm "$dir/hold"
    wait "$command"
}
mode_of() { awk -v at="$1" '$5 == at { print $6 }' /proc/self/mountinfo; }
is_safe() { # mount point, ro or rw
    equal "the options" "$(mode_of "$1")" "$2,nosuid,nodev,noexec,relatime"
}
sums() { md5sum "$dir"/*.qcow2 "$dir"/*.raw; }

mkdir -p "$dir/conf.d" "$dir/at" "$dir/full"
touch "$dir/log"
printf '[generic]\nincludedir = %s\n' "$dir/conf.d" >"$dir/config"
touch "$dir/full/file" "$dir/plain"
modprobe loop
mkdir "$dir/slow"
cat >"$dir/slow/blkid" <<END
#!/bin/sh
while [ -e "$dir/hold" ]; do sleep 0.1; done
exec $(command -v blkid) "\$@"
END
chmod +x "$dir/slow/blkid"

say "without the driver"
truncate -s 20M "$dir/blank.raw"
refuses "load the driver with modprobe ublk_drv" restore mount "$dir/blank.raw"
modprobe ublk_drv

say "images"
# a full backup, and an incremental one that is taken while the file system is mounted: its journal is to be replayed
truncate -s 96M "$dir/disk"
mkfs.ext4 -q -L 'my data' -E lazy_itable_init=0,lazy_journal_init=0 "$dir/disk"
qemu-img convert -q -f raw -O qcow2 "$dir/disk" "$dir/base.qcow2"
mount -o loop "$dir/disk" /mnt
files /mnt
sync -f /mnt
echo late >/mnt/late
python3 -c 'import os; os.fsync(os.open("/mnt/late", os.O_RDONLY))' # in the journal now
cp "$dir/disk" "$dir/copy"
umount /mnt
qemu-img create -q -f qcow2 -F qcow2 -b "$dir/base.qcow2" "$dir/dirty.qcow2"
qemu-img convert -q -n -f raw -O qcow2 "$dir/copy" "$dir/dirty.qcow2"
dumpe2fs -h "$dir/copy" 2>/dev/null | grep -q needs_recovery || fail "the journal is clean"
qemu-img convert -q -f raw -O qcow2 "$dir/disk" "$dir/clean.qcow2"
rm "$dir/disk"
# GPT with ext4 and ntfs
truncate -s 150M "$dir/table.raw"
sfdisk -q "$dir/table.raw" <<<$'label: gpt\nsize=100M, name="the first"\nname=second\n'
loop=$(losetup --find --show --offset $((1 << 20)) --sizelimit $((100 << 20)) "$dir/table.raw")
mkfs.ext4 -q -L "première 1" "$loop"
mount "$loop" /mnt
files /mnt
umount /mnt
losetup -d "$loop"
loop=$(losetup --find --show --offset $((101 << 20)) --sizelimit $((48 << 20)) "$dir/table.raw")
mkfs.ntfs -q -F -L windows "$loop" >/dev/null 2>&1
ntfs=ntfs3
modprobe -q ntfs3 || ntfs=ntfs
mount -t "$ntfs" "$loop" /mnt
files /mnt
umount /mnt
losetup -d "$loop"
# a file system that asks for a panic as soon as something is wrong with it, as it is with a file
truncate -s 8M "$dir/panic.raw"
mkfs.ext4 -q -e panic -d "$(dirname "$0")" "$dir/panic.raw"
debugfs -w -R "set_inode_field restore.sh mode 0" "$dir/panic.raw" 2>/dev/null
truncate -s 310M "$dir/xfs.raw"
mkfs.xfs -q -L bigger "$dir/xfs.raw"
mount -o loop "$dir/xfs.raw" /mnt
files /mnt
sync -f /mnt
echo late >/mnt/late
python3 -c 'import os; os.fsync(os.open("/mnt/late", os.O_RDONLY))'
cp --sparse=always "$dir/xfs.raw" "$dir/dirty-xfs.raw"
umount /mnt
truncate -s 130M "$dir/btrfs.raw"
mkfs.btrfs -q "$dir/btrfs.raw" 2>/dev/null
cp --sparse=always "$dir/btrfs.raw" "$dir/before.raw"
mount -o loop "$dir/btrfs.raw" /mnt
files /mnt
sync -f /mnt
echo late >/mnt/late
python3 -c 'import os; os.fsync(os.open("/mnt/late", os.O_RDONLY))'
cp --sparse=always "$dir/btrfs.raw" "$dir/dirty-btrfs.raw"
umount /mnt
# a disk that was a file system before it got partitions
sfdisk -q --wipe never "$dir/before.raw" <<<$'label: gpt\nsize=20M\n'
mkfs.ext4 -q -F -E offset=$((1 << 20)) "$dir/before.raw" 20M >/dev/null 2>&1
rm -f "$dir/copy"
sums >"$dir/sums"

say "a clean file system"
mounts "$dir/clean.qcow2"
equal "where" "$at" "$state/$id/mnt"
equal "its directory" "$(stat -c '%a %u' "$state/$id")" "700 0"
is_safe "$at" ro
holds_files "$at"
equal "a layer" "$(field layer)" False
equal "read-only" "$(blockdev --getro "$device")" 1
"$cowgate" restore list | grep -q "^$id *mounted *$at *$device *read-only" || fail "the list: $("$cowgate" restore list)"
grep -q '^VmLck:.*[1-9]' "/proc/$(process "$id")/status" || fail "its process may be swapped out to its own device"
# PF_MEMALLOC_NOIO (include/linux/sched.h), as PR_SET_IO_FLUSHER makes it
for thread in "/proc/$(process "$id")"/task/*; do
    flags=$(sed 's/.*) //' "$thread/stat" 2>/dev/null | cut -d ' ' -f 7) || continue # io_uring's come and go
    [ $((flags & 0x80000)) -ne 0 ] || fail "a thread that may wait for its own device: $(cat "$thread/comm")"
done
refuses_here() { if touch "$at/x" 2>/dev/null; then fail "it can be written"; fi; }
refuses_here
exec 8<"$at/hello"
if "$cowgate" restore umount "$id" 2>"$dir/said"; then fail "it was in use"; fi
grep -q "is in use: fuser" "$dir/said" || fail "it says $(cat "$dir/said")"
exec 8<&-
ends "$id"
all_has_ended

say "a journal to replay, over a chain"
mounts "$dir/dirty.qcow2" --at "$dir/at" --scratch-dir /run
equal "where" "$at" "$dir/at"
is_safe "$at" ro
holds_files "$at"
equal "what was in the journal" "$(cat "$at/late")" late
equal "a layer" "$(field layer)" True
refuses_here
ends "$dir/at"
all_has_ended

say "xfs, while the original is mounted"
mount -o loop "$dir/xfs.raw" /mnt
mounts "$dir/dirty-xfs.raw" --scratch-dir /run
holds_files "$at"
equal "what was in the log" "$(cat "$at/late")" late
is_safe "$at" ro
ends "$at"
umount /mnt
all_has_ended
# mounting wrote to the original, and nothing to the others
sums >"$dir/now"
equal "the images" "$(grep -v '/xfs.raw$' "$dir/now")" "$(grep -v '/xfs.raw$' "$dir/sums")"
mv "$dir/now" "$dir/sums"

say "a file system that asks for a panic"
mounts "$dir/panic.raw"
cmp "$at/guest.sh" "$(dirname "$0")/guest.sh"
fails "Structure needs cleaning" stat "$at/restore.sh"
ends "$id"
mounts "$dir/panic.raw" --writable-scratch --scratch-dir /run
fails "Structure needs cleaning" stat "$at/restore.sh"
ends "$id"

say "btrfs"
mounts "$dir/btrfs.raw"
holds_files "$at"
is_safe "$at" ro
equal "a layer" "$(field layer)" False
ends "$id"
mounts "$dir/dirty-btrfs.raw" --scratch-dir /run
holds_files "$at"
equal "what was in the log" "$(cat "$at/late")" late
equal "a layer" "$(field layer)" True
is_safe "$at" ro
ends "$id"

say "partitions"
restore inspect "$dir/before.raw" >"$dir/said"
grep -q "the signature of btrfs, too" "$dir/said" || fail "$(cat "$dir/said")"
mounts "$dir/before.raw"
equal "what is mounted" "$(field partition) $(field file_system)" "1 ext4"
ends "$id"
restore inspect "$dir/table.raw" >"$dir/said"
grep -q "partition table gpt" "$dir/said" || fail "$(cat "$dir/said")"
grep -Eq "^1 +1048576 +100 MiB +ext4 +première 1 .* the first +yes$" "$dir/said" || fail "$(cat "$dir/said")"
grep -Eq "^2 +105906176 .* ntfs +windows .* second +yes$" "$dir/said" || fail "$(cat "$dir/said")"
restore inspect --json "$dir/table.raw" | python3 -c 'import json,sys; d=json.load(sys.stdin)
assert d["table"]=="gpt" and [c["type"] for c in d["contents"]]==["ext4","ntfs"] and d["size_bytes"]==150<<20, d'
all_has_ended
refuses "choose one with --partition N; there are:" restore mount "$dir/table.raw"
refuses "there is no partition 3; there are:" restore mount "$dir/table.raw" --partition 3
mounts "$dir/table.raw" --partition 1
holds_files "$at"
equal "its size" "$(blockdev --getsize64 "$device")" $((100 << 20))
first=$id
mounts "$dir/table.raw" --partition 2
holds_files "$at"
is_safe "$at" ro
equal "its file system" "$(field file_system)" ntfs
equal "what is listed" "$("$cowgate" restore list --json | python3 -c 'import json,sys; print(len(json.load(sys.stdin)))')" 2
[ "$first" != "$id" ] || fail "two of one name"
ends --all
all_has_ended
# the kernel looks for no partitions on the disk
printf '[disk]\nexportname = %s\nreadonly = true\n' "$dir/table.raw" >"$dir/conf.d/disk.conf"
mounts disk --partition 1
equal "the export" "$(field export)" disk
ends "$id"
dmesg | grep -E "ublkb[0-9]+: p1" && fail "the kernel has looked for partitions"

say "writable, and thrown away"
mounts "$dir/dirty.qcow2" --writable-scratch --scratch-dir /run
is_safe "$at" rw
equal "a layer" "$(field layer)" True
holds_files "$at"
dd if=/dev/urandom of="$at/new" bs=1M count=8 status=none conv=fsync
rm "$at/hello"
ends "$id"
mounts "$dir/table.raw" --partition 2 --writable-scratch --scratch-dir /run
is_safe "$at" rw
echo x >"$at/new"
sync -f "$at"
ends "$id"
mounts "$dir/dirty.qcow2" --scratch-dir /run
equal "a layer" "$(field layer)" True
holds_files "$at"
[ ! -e "$at/new" ] || fail "what was written is still there"
ends "$id"
equal "the images" "$(sums)" "$(cat "$dir/sums")"
for image in base dirty clean; do qemu-img check -q "$dir/$image.qcow2" || fail "qemu-img check $image"; done

say "expiry"
mounts "$dir/clean.qcow2" --expires 2s
until_true "the end" is_empty "$state"
[ -z "$(mode_of "$at")" ] || fail "it is still mounted"
all_has_ended
say "a process that is told to stop, and one that is killed"
mounts "$dir/clean.qcow2" --at "$dir/at"
exec 8<"$at/hello"
kill "$(process "$id")"
until_true "the end of one that is in use" is_empty "$state"
[ -z "$(mode_of "$at")" ] || fail "it is still mounted"
exec 8<&-
all_has_ended
mounts "$dir/clean.qcow2"
kills "$id"
"$cowgate" restore list | grep -q "^$id *dead" || fail "the list: $("$cowgate" restore list)"
if md5sum "$at"/deep/* >/dev/null 2>&1 && dd if="$at/deep/guest.sh" of=/dev/null iflag=direct status=none 2>/dev/null; then fail "a dead device is read"; fi
ends "$id"
all_has_ended
# the same, found by the next command after its time, while somebody still uses it
dies_and_expires() {
    mounts "$dir/clean.qcow2" --expires 1h
    exec 8<"$at/hello"
    kills "$id"
    sed -i 's/"expires": ".*"/"expires": "2026-01-01T00:00:00Z"/' "$state/$id/state.json"
}
dies_and_expires
equal "what is left" "$("$cowgate" restore list | wc -l)" 1
exec 8<&-
all_has_ended
# and by the start of a daemon, but not of one whose mounts are its own
dies_and_expires
configure ""
printf '#!/bin/sh\nexec unshare --mount --propagation slave %s "$@"\n' "$cowgate" >"$dir/apart"
chmod +x "$dir/apart"
cowgate=$dir/apart start
stop
[ -e "$state/$id" ] || fail "a daemon apart has ended it"
[ -n "$(mode_of "$at")" ] || fail "a daemon apart has unmounted it"
start
is_empty "$state" || fail "the daemon has left it"
stop
exec 8<&-
rm "$dir"/conf.d/*
all_has_ended

say "a device's number that is another restore's by now"
mounts "$dir/clean.qcow2"
old=$id old_device=$device
kills "$id"
umount "$at"
"$cowgate" ublk delete "${device#/dev/ublkb}" >/dev/null
# the driver gives a number again when all is gone that belonged to its device
for tries in $(seq 20); do
    mounts "$dir/table.raw" --partition 1
    [ "$device" != "$old_device" ] || break
    ends "$id"
    sleep 0.2
done
equal "the device after $tries tries" "$device" "$old_device"
ends "$old"
is_safe "$at" ro
holds_files "$at"
ends "$id"
all_has_ended

say "something is mounted over it"
mounts "$dir/clean.qcow2" --at "$dir/at"
mount -t tmpfs over "$dir/at"
fails "something else is mounted over $dir/at" "$cowgate" restore umount "$id" --force
served=$(process "$id")
kill "$served"
until_true "the end of its process" bash -c "! kill -0 $served"
equal "what is on top" "$(findmnt -n -o SOURCE "$dir/at" | tail -n 1)" over
umount "$dir/at"
"$cowgate" restore list | grep -q "^$id *dead" || fail "the list: $("$cowgate" restore list)"
ends "$id"
[ -z "$(mode_of "$dir/at")" ] || fail "it is still mounted"
all_has_ended

say "two at one directory"
: >"$dir/said"
restore mount "$dir/clean.qcow2" --at "$dir/at" >>"$dir/said" 2>&1 &
other=$!
succeeded=0
if restore mount "$dir/table.raw" --partition 1 --at "$dir/at" >>"$dir/said" 2>&1; then succeeded=1; fi
if wait "$other"; then succeeded=$((succeeded + 1)); fi
equal "those that succeeded" "$succeeded" 1
grep -Eq "is about to be mounted there|something is mounted there already" "$dir/said" || fail "$(cat "$dir/said")"
ln -s . "$dir/link"
ends "$dir/link/at"
all_has_ended

say "all, one of them in use"
mounts "$dir/clean.qcow2"
exec 8<"$at/hello"
used=$id
mounts "$dir/table.raw" --partition 1
fails "is in use: fuser" "$cowgate" restore umount --all
equal "what is left" "$(basename "$state"/*)" "$used"
ends --all --force
exec 8<&-
all_has_ended

say "what is not mounted yet"
begins inspect "$dir/clean.qcow2"
equal "what is listed of a look" "$("$cowgate" restore list | wc -l)" 1
ends --all
goes_on || fail "the look: $(cat "$dir/begun")"
begins mount "$dir/clean.qcow2" --at "$dir/at"
fails "it is about to be mounted; wait" "$cowgate" restore umount --all
fails "restore $id is about to be mounted there" restore mount "$dir/table.raw" --partition 1 --at "$dir/at"
ends --force "$id"
if goes_on; then fail "it was told to end"; fi
all_has_ended
# its process is killed
begins mount "$dir/clean.qcow2"
kill -9 "$(process "$id")"
if goes_on; then fail "it has no process"; fi
all_has_ended
# so is the command, when it has just mounted: the process waits to write that down
begins mount "$dir/clean.qcow2" --at "$dir/at"
served=$(process "$id")
exec 7<"$state"
flock 7
rm "$dir/hold"
until_true "the mount" mountpoint "$dir/at"
kill -9 "$command" "$served"
wait "$command" || true
exec 7<&-
mkdir -p "$state/.half/mnt"
equal "what is left" "$("$cowgate" restore list | wc -l)" 1
[ -z "$(mode_of "$dir/at")" ] || fail "it is still mounted"
all_has_ended

say "what cannot be"
truncate -s 1M "$dir/empty.raw"
head -c 1000 /dev/urandom >"$dir/no.qcow2"
sfdisk -q "$dir/blank.raw" <<<$'label: dos\nsize=10M\nsize=8M\n'
truncate -s 12M "$dir/blank.raw"
refuses "is no length of time" restore mount "$dir/clean.qcow2" --expires soon
refuses "is over at once" restore mount "$dir/clean.qcow2" --expires 0s
refuses "No such file" restore mount "$dir/missing.qcow2"
refuses "there is no such file, and no export of this name" restore mount missing
refuses "no.qcow2.*QCOW2" restore mount "$dir/no.qcow2"
refuses "holds no file system that blkid knows" restore mount "$dir/empty.raw"
refuses "there is no partition 1: the disk has no partition table" restore mount "$dir/clean.qcow2" --partition 1
refuses "partition 2 is 16384 sectors from sector 22528 on, and the disk ends at" restore mount "$dir/blank.raw"
refuses "has to be there" restore mount "$dir/clean.qcow2" --at "$dir/nowhere"
refuses "this is no directory" restore mount "$dir/clean.qcow2" --at "$dir/plain"
refuses "something is mounted there already" restore mount "$dir/clean.qcow2" --at /run
refuses "no such directory for a temporary layer" restore mount "$dir/clean.qcow2" --scratch-dir "$dir/nowhere"
refuses "there is no such restore" "$cowgate" restore umount abc
refuses "only root may" setpriv --reuid 65534 --clear-groups "$cowgate" restore list
mkswap -q "$dir/empty.raw" >/dev/null
refuses "is swap: swap space" restore mount "$dir/empty.raw"
dd if=/dev/urandom of="$dir/empty.raw" bs=4k seek=1 count=1 conv=notrunc status=none
printf 'LUKS\xba\xbe\x00\x01' | dd of="$dir/empty.raw" conv=notrunc status=none
refuses "encrypted with LUKS" restore mount "$dir/empty.raw"
sfdisk=$(command -v sfdisk)
mv "$sfdisk" "$dir/hidden"
refuses "sfdisk is needed and not installed; on Debian it is in the package fdisk" restore mount "$dir/table.raw"
mv "$dir/hidden" "$sfdisk"
# a broken file system: no group descriptors, with blocks of any size
cp "$dir/clean.qcow2" "$dir/broken.qcow2"
qemu-io -f qcow2 -c "write -P 0 2k 6k" "$dir/broken.qcow2" >/dev/null
refuses "the kernel does not mount the disk (ext4)" restore mount "$dir/broken.qcow2"
qemu-nbd -f qcow2 -k "$dir/nbd" -t "$dir/clean.qcow2" &
writer=$!
until_true "the writer" test -S "$dir/nbd"
refuses "is in use by\|is being written\|locked" restore mount "$dir/clean.qcow2"
kill "$writer"
wait "$writer" || true
mkdir /run/udev
touch /run/udev/control
"$cowgate" restore mount "$dir/clean.qcow2" --at "$dir/full" >/dev/null 2>"$dir/said"
rm -r /run/udev
grep -q "is not empty: its files are hidden" "$dir/said" || fail "it does not warn"
grep -q "udev looks into this disk.*60-cowgate.rules" "$dir/said" || fail "it does not warn of udev"
ends "$dir/full"
all_has_ended

say "LVM"
truncate -s 40M "$dir/lvm.raw"
loop=$(losetup --find --show "$dir/lvm.raw")
pvcreate -q "$loop" >/dev/null 2>&1 && vgcreate -q vg7 "$loop" >/dev/null 2>&1
lvcreate -q -an -Zn -Wn -L 8M -n root vg7 >/dev/null 2>&1
losetup -d "$loop"
restore inspect "$dir/lvm.raw" >"$dir/said"
grep -q "volume group vg7" "$dir/said" || fail "$(cat "$dir/said")"
grep -q "logical volume root, 8 MiB" "$dir/said" || fail "$(cat "$dir/said")"
refuses "LVM physical volume" restore mount "$dir/lvm.raw"

equal "what is left of devices" "$("$cowgate" ublk list | grep -c /dev/ublk)" 0
dmesg | grep -E 'BUG:|WARNING:|blocked for more' && fail "the kernel complains"
say "done"
echo "all is well"
