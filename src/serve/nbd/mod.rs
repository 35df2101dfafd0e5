//! The NBD frontend: sockets on one side, `Export::submit` on the other. The protocol itself is thought in `crate::nbd`.
//!
//! - [`listen`]: binds addresses, accepts clients, hands each to a worker (control thread)
//! - [`conn`]: one client from greeting to goodbye (its worker's thread); the other files are its parts:
//!   `negotiate` drives the handshake, `receive` reads requests, `perform` carries them out, `out` sends replies,
//!   `gauge` counts what is in flight, `pace` holds back who goes too fast, `session` is what they share, `turn_away`
//!   says that the server stops
//! - [`budget`]: memory for payload of all connections together; `admission`: who is let in

pub mod budget;
pub mod conn;
pub mod listen;

mod admission;
mod gauge;
mod input;
mod negotiate;
mod out;
mod pace;
mod perform;
mod receive;
mod session;
mod turn_away;
