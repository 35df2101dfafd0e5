#!/usr/bin/python3
"""One of two clients that share every cluster of a region: it writes every other block of 4 KiB, with zeroes and trims
among the data, and verifies them, at last through another door.

usage: neighbour.py DOOR OTHER_DOOR START LENGTH PARITY
A door is an NBD URI or a block device. PARITY: 0 or 1, which blocks are its own.
"""
import fcntl
import mmap
import os
import random
import struct
import sys

import nbd

BLOCK = 4096
BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F


class Device:
    """A block device, past the page cache, which knows nothing of what others write."""

    def __init__(self, path):
        self.fd = os.open(path, os.O_RDWR | os.O_DIRECT)

    def pread(self, count, at):
        page = mmap.mmap(-1, count)
        assert os.preadv(self.fd, [page], at) == count
        return bytes(page)

    def pwrite(self, data, at):
        page = mmap.mmap(-1, len(data))
        page[:] = data
        assert os.pwritev(self.fd, [page], at) == len(data)

    def zero(self, count, at):
        fcntl.ioctl(self.fd, BLKZEROOUT, struct.pack("QQ", at, count))

    def trim(self, count, at):
        fcntl.ioctl(self.fd, BLKDISCARD, struct.pack("QQ", at, count))

    def flush(self):
        os.fsync(self.fd)


def opened(door):
    if door.startswith("/"):
        return Device(door)
    client = nbd.NBD()
    client.connect_uri(door)
    return client


start, length, parity = (int(number) for number in sys.argv[3:])
dice = random.Random(parity)
door = opened(sys.argv[1])
first = start // BLOCK + parity
own = {block * BLOCK: door.pread(BLOCK, block * BLOCK) for block in range(first, (start + length) // BLOCK, 2)}
places = list(own)
for turn in range(300):
    at = dice.choice(places)
    data = dice.randbytes(BLOCK)
    what = dice.randrange(8)
    if what == 0:
        data = bytes(BLOCK)
        door.zero(BLOCK, at)
    else:
        if what == 1:
            # what is trimmed may be anything until it is written
            door.trim(BLOCK, at)
        door.pwrite(data, at)
    own[at] = data
    at = dice.choice(places)
    assert door.pread(BLOCK, at) == own[at], (turn, at)
    if turn % 64 == 0:
        door.flush()
door.flush()
other = opened(sys.argv[2])
for at, data in own.items():
    assert other.pread(BLOCK, at) == data, at
