#!/usr/bin/python3
"""Writes backups the way the Capture Agent does: two read-write connections to one export, one of them idle, one
request at a time, up to 32 MiB each, at any 512-byte border; WRITE_ZEROES for zeroes; no flush, no disconnect: the
connections are just closed.

usage: capture_agent.py full URI SOURCE                 write all of SOURCE
       capture_agent.py incremental URI SOURCE BEFORE   write what differs between BEFORE and SOURCE
       Both print the bytes written and the seconds that took.
       capture_agent.py hold URI                        connect, say "connected", read until a line comes in
"""
import os
import sys
import time

import nbd

MAX_REQUEST = 32 << 20
SECTOR = 512
GRAIN = 64 << 10          # what changed-block tracking reports
MERGE_GAP = 1 << 20       # extents closer than this are written as one


def connect(uri):
    h = nbd.NBD()
    h.add_meta_context("base:allocation")
    h.connect_uri(uri)
    return h


def changed(source, before, size):
    """Extents (start, end) where two files differ, grown to grains and merged over small gaps."""
    extents = []
    with open(source, "rb") as new, open(before, "rb") as old:
        for at in range(0, size, GRAIN):
            if new.read(GRAIN) != old.read(GRAIN):
                if extents and at - extents[-1][1] <= MERGE_GAP:
                    extents[-1][1] = at + GRAIN
                else:
                    extents.append([at, at + GRAIN])
    # borders of real extents are sectors, not grains
    return [(start, min(end, size)) for start, end in extents]


def pieces(start, end):
    """Requests for an extent: cut where no cluster border is."""
    at = start
    while at < end:
        length = min(MAX_REQUEST - 3 * SECTOR, end - at) if at == start else min(MAX_REQUEST, end - at)
        yield at, length
        at += length


def runs(data):
    """(start, end, zero) runs of a buffer, in units of the grain."""
    zero = bytes(GRAIN)
    start, kind = 0, None
    for at in range(0, len(data), GRAIN):
        piece = data[at:at + GRAIN]
        is_zero = piece == zero[:len(piece)]
        if kind is not None and is_zero != kind:
            yield start, at, kind
            start = at
        kind = is_zero
    yield start, len(data), kind


def write(h, source, extents):
    written = 0
    with open(source, "rb") as f:
        for start, end in extents:
            for at, length in pieces(start, end):
                f.seek(at)
                data = f.read(length)
                for a, b, is_zero in runs(data):
                    if is_zero:
                        h.zero(b - a, at + a, 0)
                    else:
                        h.pwrite(data[a:b], at + a)
                    written += b - a
    return written


def main():
    command, uri = sys.argv[1], sys.argv[2]
    data, idle = connect(uri), connect(uri)
    if command == "hold":
        print("connected", flush=True)
        sys.stdin.readline()
        for h in (data, idle):
            h.pread(4096, 0)
        print("still connected")
        return
    source = sys.argv[3]
    size = os.path.getsize(source)
    extents = [(0, size)] if command == "full" else changed(source, sys.argv[4], size)
    start = time.monotonic()
    written = write(data, source, extents)
    print(written, "%.3f" % (time.monotonic() - start))
    # neither flush nor shutdown: the sockets close with the process
    sys.stdout.flush()
    os._exit(0)


main()
