//! Tells the service manager how the daemon is doing: systemd's notification protocol, sd_notify(3).
//!
//! Without `NOTIFY_SOCKET` nothing is sent. A failure is logged and harms nothing; a manager that does not read costs
//! at most [`PATIENCE`]. Called by the daemon on its control thread, whose liveness the watchdog's pings show.

use nix::time::{ClockId, clock_gettime};
use nix::unistd::getppid;
use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

/// How long the manager may leave a message unread.
const PATIENCE: Duration = Duration::from_secs(1);
/// Longest time between two pings.
const MAX_PERIOD: Duration = Duration::from_secs(3600);

/// Ready to accept clients, with a line for `systemctl status`. In the background the manager has started another
/// process than this one, so it is told which one counts.
pub fn ready(status: &str, in_background: bool) {
    let main_pid = if in_background { format!("\nMAINPID={}", std::process::id()) } else { String::new() };
    notify(&format!("READY=1\nSTATUS={status}{main_pid}"));
}

/// A reload begins; its end is told with [`reloaded`].
pub fn reloading() {
    // `Type=notify-reload` compares it with the moment when it sent the signal
    match clock_gettime(ClockId::CLOCK_MONOTONIC) {
        Ok(now) => {
            let usec = now.tv_sec() * 1_000_000 + now.tv_nsec() / 1000;
            notify(&format!("RELOADING=1\nMONOTONIC_USEC={usec}\nSTATUS=reading the configuration"));
        }
        Err(e) => tracing::warn!("cannot tell the service manager of the reload: no monotonic clock: {e}"),
    }
}

/// A reload is over.
pub fn reloaded(status: &str) {
    notify(&format!("READY=1\nSTATUS={status}"));
}

/// On the way out.
pub fn stopping() {
    notify("STOPPING=1\nSTATUS=finishing what is in flight");
}

fn notify(state: &str) {
    let Some(socket) = env::var_os("NOTIFY_SOCKET").filter(|s| !s.is_empty()) else {
        return;
    };
    if let Err(e) = send(&socket, state) {
        tracing::warn!("cannot notify the service manager at {}: {e}", socket.display());
    }
}

fn send(socket: &OsStr, state: &str) -> io::Result<()> {
    let address = match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    let sender = UnixDatagram::unbound()?;
    sender.set_write_timeout(Some(PATIENCE))?;
    sender.send_to_addr(state.as_bytes(), &address)?;
    Ok(())
}

/// Pings the manager while the runtime of this thread runs; dropping it ends that.
#[must_use = "dropping it ends the pings"]
pub struct Watchdog(Option<JoinHandle<()>>);

impl Watchdog {
    /// Starts the pings if the manager wants them, as a task of this thread's runtime.
    pub fn start(in_background: bool) -> Watchdog {
        let watched = |pid: u32| pid == std::process::id() || (in_background && i64::from(pid) == launcher());
        let period = period(env::var("WATCHDOG_USEC").ok(), env::var("WATCHDOG_PID").ok(), watched);
        Watchdog(period.map(|period| {
            tokio::spawn(async move {
                let mut ticks = interval(period);
                ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
                loop {
                    ticks.tick().await;
                    notify("WATCHDOG=1");
                }
            })
        }))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// The process that started this one in the background, while it waits.
fn launcher() -> i64 {
    i64::from(getppid().as_raw())
}

/// Twice in the time after which the manager takes the daemon for dead.
fn period(usec: Option<String>, pid: Option<String>, watched: impl Fn(u32) -> bool) -> Option<Duration> {
    if pid.is_some_and(|pid| !pid.parse().is_ok_and(watched)) {
        return None;
    }
    let usec: u64 = usec?.parse().ok().filter(|usec| *usec > 0)?;
    Some(Duration::from_micros(usec / 2).clamp(Duration::from_millis(1), MAX_PERIOD))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sends_to_paths_and_abstract_names() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("notify");
        let name = format!("cowgate-test-{}", std::process::id());
        let abstract_address = SocketAddr::from_abstract_name(&name).expect("name");
        let sockets = [
            (UnixDatagram::bind(&path).expect("bind"), path.into_os_string()),
            (UnixDatagram::bind_addr(&abstract_address).expect("bind"), format!("@{name}").into()),
        ];
        for (receiver, address) in sockets {
            send(&address, "READY=1").expect("send");
            let mut buf = [0; 32];
            let len = receiver.recv(&mut buf).expect("receive");
            assert_eq!(&buf[..len], b"READY=1");
        }
        assert!(send(OsStr::new("/nowhere/at/all"), "READY=1").is_err());
    }

    #[test]
    fn a_manager_that_does_not_read_is_not_waited_for() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("notify");
        let _deaf = UnixDatagram::bind(&path).expect("bind");
        let error = (0..10_000).find_map(|_| send(path.as_os_str(), "WATCHDOG=1").err()).expect("its queue is full");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn the_watchdog_is_served_twice_in_its_time_and_only_when_meant() {
        let some = |text: &str| Some(text.to_owned());
        let ours = |pid: u32| pid == 7;
        assert_eq!(period(some("3000000"), None, ours), Some(Duration::from_millis(1500)));
        assert_eq!(period(some("3000000"), some("7"), ours), Some(Duration::from_millis(1500)));
        for (usec, pid) in [("3000000", "8"), ("3000000", "x"), ("0", "7"), ("-1", "7"), ("x", "7")] {
            assert_eq!(period(some(usec), some(pid), ours), None, "{usec} {pid}");
        }
        assert_eq!(period(None, some("7"), ours), None);
        assert_eq!(period(some("1"), None, ours), Some(Duration::from_millis(1)));
        assert_eq!(period(some("18446744073709551615"), None, ours), Some(MAX_PERIOD));
    }
}
