//! Frontends: they turn a client's wire into `Request`s for `Export::submit`, and completions into its replies.
//!
//! - [`nbd`]: NBD over TCP and Unix sockets

pub mod nbd;
