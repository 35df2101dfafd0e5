//! The engine's door to `targets/nbd_requests.rs`.
#![no_main]

#[path = "../targets/mod.rs"]
#[allow(dead_code)]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::nbd_requests::run(data));
