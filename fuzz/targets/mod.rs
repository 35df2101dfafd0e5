//! The bodies of the fuzz targets: what an input is, what is done with it, and what must hold whatever it is.
//!
//! The engine (`fuzz/fuzz_targets/`) calls them with inputs it makes up; `tests/fuzz_corpus.rs` calls them with every seed
//! and every input that ever broke something.

pub mod check;
pub mod header;
pub mod images;
pub mod input;
pub mod nbd_handshake;
pub mod nbd_requests;
pub mod open_read;
pub mod open_write;
pub mod script;
pub mod tables;
pub mod walk;
