"""Backups pulled over NBD, and their restore, with the calls of virtnbdbackup.

usage: pull_backup.py pull URI FILE CONTEXT     store what CONTEXT says is worth it; prints how many bytes were read
       pull_backup.py restore URI FILE          write it to an export, in order, and flush

FILE holds one record for each extent: a line with offset, length and kind, and the bytes when the kind is "data".
"""
import sys

import nbd

# one request of block status: as much as 32 bits say, in whole blocks
MOST_STATUS = (1 << 32) - 4096


def extents(h, context):
    """(offset, length, kind) over the whole disk; neighbours of a kind are one."""
    size, found, at = h.get_size(), [], 0
    bitmap = context.startswith("qemu:dirty-bitmap:")
    wide = hasattr(h, "block_status_64") and h.get_extended_headers_negotiated()
    while at < size:
        got = []

        def note(name, offset, entries, error):
            assert offset == at
            if name == context:
                got.extend(entries if wide else zip(entries[::2], entries[1::2]))
        if wide:
            h.block_status_64(size - at, at, note)
        else:
            h.block_status(min(size - at, MOST_STATUS), at, note)
        assert got, "no extents at %d" % at
        for length, flags in got:
            # a bitmap's bit: dirty; of an allocation: hole and zero
            kind = ("data" if flags & 1 else "same") if bitmap else ("zero" if flags & nbd.STATE_ZERO else "data")
            assert length > 0
            length = min(length, size - at)
            if found and found[-1][2] == kind:
                found[-1][1] += length
            else:
                found.append([at, length, kind])
            at += length
    assert sum(length for _, length, _ in found) == size
    return found


def pull(uri, file, context):
    h = nbd.NBD()
    h.add_meta_context("base:allocation")
    if context != "base:allocation":
        h.add_meta_context(context)
    h.connect_uri(uri)
    assert h.can_meta_context(context), context
    most = h.get_block_size(nbd.SIZE_MAXIMUM)
    assert most == 32 << 20, most
    read = 0
    with open(file, "wb") as out:
        for at, length, kind in extents(h, context):
            out.write(b"%d %d %s\n" % (at, length, kind.encode()))
            while kind == "data" and length:
                piece = min(length, most)
                out.write(h.pread(piece, at))
                at, length, read = at + piece, length - piece, read + piece
    h.shutdown()
    print(read)


def restore(uri, file):
    h = nbd.NBD()
    h.connect_uri(uri)
    most = h.get_block_size(nbd.SIZE_MAXIMUM)
    with open(file, "rb") as stored:
        while line := stored.readline():
            at, length, kind = line.split()
            at, length = int(at), int(length)
            while kind != b"same" and length:
                piece = min(length, most)
                if kind == b"data":
                    h.pwrite(stored.read(piece), at)
                else:
                    h.zero(piece, at)
                at, length = at + piece, length - piece
    if h.can_flush():
        h.flush()
    h.shutdown()


{"pull": pull, "restore": restore}[sys.argv[1]](*sys.argv[2:])
