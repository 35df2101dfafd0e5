//! The only door to io_uring: files, connected sockets and the worker threads they live on.
//!
//! Everything above hands over a [`File`] operation and gets one answer: whole lengths, no EINTR, no short count. The
//! runtime behind it (tokio-uring, one per worker thread) is named nowhere else, so it can be replaced here.
//!
//! - [`mod@file`]: reads, writes, syncs and hole punching on files and block devices
//! - [`mem`]: the test double of a file: holds, delays, fails, crashes on a seed
//! - [`socket`]: connected TCP and Unix sockets; [`unix_listener`]: listening ones with their files; [`tls`]: encrypted
//!   ones
//! - [`worker`]: the threads that carry connections, and how one is chosen
//! - [`runtime`]: the runtime of one thread: [`run`], [`spawn`], [`yield_now`]

mod exclusive;
pub mod file;
pub mod lasting;
pub mod mem;
mod pace;
mod real;
pub mod runtime;
pub mod socket;
pub mod tls;
mod turn;
pub mod unix_listener;
pub mod worker;

pub use exclusive::Exclusive;
pub use file::File;
pub use runtime::{run, spawn, yield_now};
pub use socket::{Peer, StdStream, Stream};
pub use turn::Turn;
pub use worker::{Job, Load, Workers};
