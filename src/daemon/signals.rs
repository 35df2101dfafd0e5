//! The signals that the daemon obeys: SIGTERM, SIGINT, SIGUSR2 and SIGHUP for the daemon's loop; after SIGHUP and SIGUSR1 a log file
//! that was rotated is opened anew, in here. SIGPIPE needs no place here: Rust programs ignore it from their start.

use super::log_file::LogFile;
use std::io;
use std::sync::Arc;
use tokio::signal::unix::{self, SignalKind, signal};

/// The handlers, from the moment of their making.
pub struct Signals {
    hangup: unix::Signal,
    terminate: unix::Signal,
    interrupt: unix::Signal,
    replaced: unix::Signal,
    rotated: unix::Signal,
    log: Option<Arc<LogFile>>,
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Read the configuration again.
    Reload,
    /// Stop, with the signal's name.
    Stop(&'static str),
    /// Stop, as another daemon comes at once: block devices wait for it.
    HandOver(&'static str),
}

impl Signals {
    /// Takes the signals over from their default, which is to end the process.
    pub fn new(log: Option<Arc<LogFile>>) -> io::Result<Signals> {
        Ok(Signals {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            replaced: signal(SignalKind::user_defined2())?,
            rotated: signal(SignalKind::user_defined1())?,
            log,
        })
    }

    /// The next signal. Signals of one kind that arrive together count once.
    pub async fn next(&mut self) -> Signal {
        loop {
            let signal = tokio::select! {
                _ = self.terminate.recv() => return Signal::Stop("SIGTERM"),
                _ = self.interrupt.recv() => return Signal::Stop("SIGINT"),
                _ = self.replaced.recv() => return Signal::HandOver("SIGUSR2"),
                _ = self.hangup.recv() => Some(Signal::Reload),
                _ = self.rotated.recv() => None,
            };
            if let Some(log) = &self.log {
                log.reopen();
            }
            if let Some(signal) = signal {
                return signal;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::{Signal as Raw, raise};

    #[test]
    fn signals_are_told_apart() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let mut signals = Signals::new(None).expect("signals");
            raise(Raw::SIGUSR1).expect("raise, which does not end the process");
            raise(Raw::SIGHUP).expect("raise");
            assert_eq!(signals.next().await, Signal::Reload);
            raise(Raw::SIGUSR2).expect("raise, which does not end the process");
            assert_eq!(signals.next().await, Signal::HandOver("SIGUSR2"));
        });
    }
}
