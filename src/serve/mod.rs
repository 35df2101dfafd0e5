//! Frontends: they turn a client's wire into `Request`s for `Export::submit`, and completions into its replies.
//!
//! - [`control`]: HTTP and JSON for whoever runs the daemon
//! - [`nbd`]: NBD over TCP and Unix sockets
//! - `ublk`: block devices of this machine

pub mod control;
pub mod nbd;
#[cfg(feature = "ublk")]
pub mod ublk;
