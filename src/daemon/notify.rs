//! Tells the service manager how the daemon is doing: systemd's notification protocol, as far as it is useful here.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Ready to accept clients.
pub const READY: &str = "READY=1";
/// On the way out.
pub const STOPPING: &str = "STOPPING=1";

/// Sends `state` to the socket in `NOTIFY_SOCKET`, if there is one. A failure is logged and harms nothing.
pub fn notify(state: &str) {
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
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)?;
    Ok(())
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
            send(&address, READY).expect("send");
            let mut buf = [0; 32];
            let len = receiver.recv(&mut buf).expect("receive");
            assert_eq!(&buf[..len], b"READY=1");
        }
        assert!(send(OsStr::new("/nowhere/at/all"), READY).is_err());
    }
}
