//! cowgate: one daemon that serves QCOW2 images, raw files and block devices.
//!
//! ```text
//!     clients     NBD over TCP / Unix socket          kernel: ublk queues
//!                         |                                  |
//!     serve/          nbd/conn  (task per request)       ublk/queue  (thread per queue)
//!                         |  Export::submit: one entrance, one validation
//!     export/         registry, config, plan            who is served, to whom, until when
//!                         |
//!     image/          Disk (per thread: descriptors + ring)  ->  Image (shared: layers + lock)
//!                         |                                          |
//!     ring/           the only door to io_uring                      |
//!                                                                    v
//!     qcow2/ nbd/     pure cores: bytes in, decisions out. No file, socket, clock or await.
//! ```
//!
//! Modules are listed in floor order. A floor imports only from floors below it, and modules of one floor do not
//! import each other; `tests/tidy.rs` keeps that true.

// floor 0: types everything speaks
pub mod block;
pub mod pagebuf;
pub mod units;

// floor 1: pure cores
pub mod nbd;
pub mod qcow2;

// floor 2: io_uring, sockets, worker threads
pub mod ring;

// floor 3: images
pub mod image;

// floor 4: exports
pub mod export;

// floor 5: frontends
pub mod serve;

// floor 6: what is made of the frontends
#[cfg(feature = "ublk")]
pub mod restore;

// floor 7: start, stop, signals
pub mod daemon;

// floor 8: the command line
pub mod cli;
