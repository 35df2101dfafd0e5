//! Exports: which there are (configuration), what changes on a reload (plan), who is served (registry, service).

pub mod authfile;
pub mod client_keys;
pub mod config;
pub mod control;
pub mod device_keys;
pub mod hooks;
pub mod image_keys;
mod images;
pub mod keyfile;
pub mod limit_keys;
pub mod limiter;
pub mod load;
pub mod name;
pub mod plan;
pub mod problem;
mod reader;
pub mod registry;
pub mod serialize;
pub mod service;
pub mod status;
mod storage;
pub mod store;
pub mod tls;
pub mod tls_keys;
pub mod usage;
mod watch;
mod write;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// A panic elsewhere leaves nothing half done behind these locks.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
