//! Exports: which there are (configuration), what changes on a reload (plan), who is served (registry).

pub mod authfile;
pub mod config;
pub mod hooks;
pub mod image_keys;
pub mod keyfile;
pub mod load;
pub mod name;
pub mod plan;
pub mod problem;
mod reader;
pub mod registry;
pub mod serialize;
pub mod store;
mod write;
