//! What the end-to-end tests share: the real daemon, and QEMU's tools as judges.
#![allow(dead_code)] // each test program uses its own part of this

pub mod certs;
pub mod daemon;
pub mod features;
pub mod guest;
pub mod holder;
pub mod libnbd;
pub mod nbd;
pub mod operations;
pub mod parts;
pub mod qemu;
pub mod qimage;
pub mod root;
pub mod zoo;
