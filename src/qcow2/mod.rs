//! The QCOW2 brain: pure decisions about an image's metadata. No file, socket, clock or await in here.
//!
//! Follows QEMU's `docs/interop/qcow2.rst`. [`header`] parses what an image claims, [`layout`] does its arithmetic,
//! [`entry`] names the kinds of L2 entries, [`metadata`] holds tables and answers "where is this range?",
//! [`mod@write`] decides how a range is written, [`alloc`] owns refcounts, [`writeback`] orders what reaches the disk,
//! [`bitmap`] knows persistent dirty bitmaps, [`compress`] unpacks compressed clusters, [`create`] lays out a new image,
//! [`journal`] keeps what memory is ahead of the disk for those who live longer than the process,
//! [`check`] counts [`references`] and compares them with the refcounts, [`rebuild`] makes new ones.

pub mod alloc;
pub mod bitmap;
pub mod check;
pub mod compress;
pub mod create;
pub mod entry;
pub mod header;
pub mod header_area;
pub mod journal;
pub mod layout;
pub mod metadata;
mod places;
pub mod rebuild;
pub mod references;
pub mod snapshot;
mod tables;
pub mod write;
pub mod writeback;

pub use entry::CompressedRange;
pub use header::{Header, HeaderError};
pub use header_area::HeaderArea;
pub use layout::Layout;
pub use metadata::{Corrupt, Fault, Map, Mapped, Metadata, Ready, Source};
pub use tables::Table;
pub use write::{Allocation, Packed, Write, Zero, ZeroMode};
pub use writeback::Step;
