//! What the driver says of one device. libublk asks as well, but complains aloud of each device of which it has no
//! record of its own, and there is none of ours.

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::sys;
use std::fs::OpenOptions;
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

/// Where the driver takes orders.
pub(super) const CONTROL: &str = "/dev/ublk-control";

/// How a device was made: its flags, queues and state.
pub(super) fn info(id: u32) -> io::Result<sys::ublksrv_ctrl_dev_info> {
    let control = OpenOptions::new().read(true).write(true).open(CONTROL)?;
    let mut ring = IoUring::<squeue::Entry128, cqueue::Entry>::builder().build(1)?;
    let mut info = sys::ublksrv_ctrl_dev_info::default();
    let command = sys::ublksrv_ctrl_cmd {
        dev_id: id,
        queue_id: u16::MAX, // the device itself
        len: size_of::<sys::ublksrv_ctrl_dev_info>() as u16,
        addr: (&raw mut info).expose_provenance() as u64,
        ..Default::default()
    };
    let mut bytes = [0; 80];
    // SAFETY: both are plain bytes, neither overlaps the other, and the command is the shorter one.
    unsafe {
        let from = (&raw const command).cast::<u8>();
        from.copy_to_nonoverlapping(bytes.as_mut_ptr(), size_of::<sys::ublksrv_ctrl_cmd>());
    }
    let entry =
        opcode::UringCmd80::new(types::Fd(control.as_raw_fd()), sys::UBLK_U_CMD_GET_DEV_INFO).cmd(bytes).build();
    // SAFETY: the command is over when the call below returns its answer; until then `info`, which the kernel writes, and
    // `control` live, and nobody else looks at them.
    unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
    loop {
        match ring.submit_and_wait(1) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // the command was not taken
            Err(e) => return Err(e),
            Ok(_) if ring.completion().is_empty() => {}
            Ok(_) => break,
        }
    }
    match ring.completion().next().map(|done| done.result()) {
        Some(0) => Ok(info),
        Some(error) => Err(io::Error::from_raw_os_error(-error)),
        None => Err(io::Error::other("the driver gave no answer")),
    }
}
