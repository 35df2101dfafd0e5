//! The one table from errno to NBD error values.

use crate::block::Errno;

/// The NBD error value for `e`, never zero.
///
/// The specification knows eight values. What it names goes to its nearest relative; everything else is a fault of
/// the storage below us, not of the request, and so EIO.
pub fn to_wire(e: Errno) -> u32 {
    match e.0 {
        libc::EPERM | libc::EACCES | libc::EROFS => 1,
        libc::ENOMEM => 12,
        libc::EINVAL => 22,
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => 28,
        libc::EOVERFLOW => 75,
        libc::EOPNOTSUPP => 95, // ENOTSUP is the same number on Linux
        libc::ESHUTDOWN => 108,
        _ => 5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relatives_share_a_value() {
        for (errno, wire) in [
            (libc::EPERM, 1),
            (libc::EROFS, 1),
            (libc::EACCES, 1),
            (libc::EIO, 5),
            (libc::ENODEV, 5),
            (libc::EUCLEAN, 5),
            (libc::ENOMEM, 12),
            (libc::EINVAL, 22),
            (libc::ENOSPC, 28),
            (libc::EDQUOT, 28),
            (libc::EFBIG, 28),
            (libc::EOVERFLOW, 75),
            (libc::ENOTSUP, 95),
            (libc::ESHUTDOWN, 108),
            (0, 5), // an error that forgot its number is still an error
        ] {
            assert_eq!(to_wire(Errno(errno)), wire, "errno {errno}");
        }
    }
}
