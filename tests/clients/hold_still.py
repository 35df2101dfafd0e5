"""Has the ublk driver hold a device still, as another program than its daemon (UBLK_U_CMD_QUIESCE_DEV).

usage: hold_still.py ID

The command goes through a ring of its own: io_uring_setup(2), io_uring_enter(2), linux/ublk_cmd.h.
"""

import ctypes
import mmap
import os
import struct
import sys

SETUP, ENTER = 425, 426
SETUP_SQE128 = 1 << 10
ENTER_GETEVENTS = 1
OFF_SQES = 0x10000000
URING_CMD = 46
# _IOWR('u', 0x16, struct ublksrv_ctrl_cmd)
QUIESCE_DEV = 3 << 30 | 32 << 16 | ord("u") << 8 | 0x16
TIMEOUT_MS = 5000

libc = ctypes.CDLL(None, use_errno=True)
device = int(sys.argv[1])
params = bytearray(120)
struct.pack_into("I", params, 8, SETUP_SQE128)
ring = libc.syscall(SETUP, 1, ctypes.byref((ctypes.c_char * len(params)).from_buffer(params)))
assert ring >= 0, os.strerror(ctypes.get_errno())
sq_tail, sq_array, cqes = (struct.unpack_from("I", params, at)[0] for at in (44, 64, 100))
queues = mmap.mmap(ring, mmap.PAGESIZE)
entries = mmap.mmap(ring, 128, offset=OFF_SQES)

control = os.open("/dev/ublk-control", os.O_RDWR)
struct.pack_into("BBHiI", entries, 0, URING_CMD, 0, 0, control, QUIESCE_DEV)
struct.pack_into("IHHQQ", entries, 48, device, 0xFFFF, 0, 0, TIMEOUT_MS)
struct.pack_into("I", queues, sq_array, 0)
struct.pack_into("I", queues, sq_tail, 1)
assert libc.syscall(ENTER, ring, 1, 1, ENTER_GETEVENTS, None, 0) == 1, os.strerror(ctypes.get_errno())
result = struct.unpack_from("i", queues, cqes + 8)[0]
sys.exit(os.strerror(-result) if result < 0 else 0)
