#!/usr/bin/python3
"""A well-behaved client that verifies everything: writes to the first half of an export and reads it back, on and on.

usage: steady.py URI FILE
Says "on" when connected. For each line that comes in it does some more rounds and says how many it did altogether. At
the end of its input it verifies all, stores what the whole disk holds in FILE, and says "well".
"""
import random
import select
import sys

import nbd

HALF = 32 << 20
dice = random.Random(1)
model = bytearray(HALF)
rounds = 0
h = nbd.NBD()
h.connect_uri(sys.argv[1])


def one():
    global rounds
    at = dice.randrange(HALF)
    length = dice.randrange(1, min(HALF - at, dice.choice((700, 100000))) + 1)
    data = dice.randbytes(length)
    h.pwrite(data, at)
    model[at:at + length] = data
    at = dice.randrange(HALF)
    length = min(HALF - at, 50000)
    assert h.pread(length, at) == model[at:at + length], (at, length)
    if rounds % 16 == 0:
        h.flush()
    rounds += 1


print("on", flush=True)
while True:
    one()
    if select.select([sys.stdin], [], [], 0)[0]:
        if not sys.stdin.readline():
            break
        for _ in range(50):
            one()
        print(rounds, flush=True)
assert h.pread(HALF, 0) == model
h.flush()
with open(sys.argv[2], "wb") as f:
    for at in range(0, h.get_size(), HALF):
        f.write(h.pread(HALF, at))
h.shutdown()
print("well", flush=True)
