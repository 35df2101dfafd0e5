//! The signals that the daemon obeys. SIGPIPE needs no place here: Rust programs ignore it from their start.

use std::io;
use tokio::signal::unix::{self, SignalKind, signal};

/// The handlers, from the moment of their making.
pub struct Signals {
    hangup: unix::Signal,
    terminate: unix::Signal,
    interrupt: unix::Signal,
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Read the configuration again.
    Reload,
    /// Stop, with the signal's name.
    Stop(&'static str),
}

impl Signals {
    /// Takes the signals over from their default, which is to end the process.
    pub fn new() -> io::Result<Signals> {
        Ok(Signals {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// The next signal. Signals of one kind that arrive together count once.
    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.terminate.recv() => Signal::Stop("SIGTERM"),
            _ = self.interrupt.recv() => Signal::Stop("SIGINT"),
            _ = self.hangup.recv() => Signal::Reload,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::{Signal as Raw, raise};

    #[test]
    fn a_hangup_asks_for_a_reload() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let mut signals = Signals::new().expect("signals");
            raise(Raw::SIGHUP).expect("raise");
            assert_eq!(signals.next().await, Signal::Reload);
        });
    }
}
