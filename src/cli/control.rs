//! The client's side of the control API: one request at a time to the running daemon.
//!
//! Used by the commands that ask or change what a daemon does. Promises: an answer that is not understood, a daemon that
//! is not there and one that refuses are messages that say what to do.

use crate::export::config::DEFAULT_CONTROL_SOCKET;
use crate::serve::control::wire::Problem;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;
use std::io;
use std::path::PathBuf;
use tokio::net::UnixStream;

/// Largest answer that is read: some ten thousand exports with their clients have room.
const MAX_ANSWER_BYTES: usize = 1 << 30;

/// Where the daemon listens.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Control {
    /// The running daemon's control socket
    #[arg(long, value_name = "PATH", env = "COWGATE_CONTROL", default_value = DEFAULT_CONTROL_SOCKET)]
    control: PathBuf,
}

/// Why there is no answer to use.
#[derive(Debug)]
pub(super) enum Failure {
    /// The daemon says why.
    Refused(Problem),
    /// Nobody listens there.
    Absent(String),
    /// It cannot be asked.
    Lost(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Absent(why) | Failure::Lost(why) => f.write_str(&printable(why)),
            Failure::Refused(Problem { detail, remedy, problems, .. }) => {
                f.write_str(&printable(detail))?;
                if let Some(remedy) = remedy {
                    write!(f, "; {}", printable(remedy))?;
                }
                for problem in problems.iter().filter(|problem| *problem != detail) {
                    write!(f, "\n  {}", printable(problem))?;
                }
                Ok(())
            }
        }
    }
}

impl From<Failure> for String {
    fn from(failure: Failure) -> String {
        failure.to_string()
    }
}

impl Control {
    /// Asks for something.
    pub(super) fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.request(Method::GET, path, None::<&()>)
    }

    /// Has something done.
    pub(super) fn post<T: DeserializeOwned>(&self, path: &str, body: Option<&impl Serialize>) -> Result<T, Failure> {
        self.request(Method::POST, path, body)
    }

    /// Has something removed.
    pub(super) fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.request(Method::DELETE, path, None::<&()>)
    }

    fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Failure> {
        let lost = |why: String| Failure::Lost(format!("{}: {why}", self.control.display()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| lost(format!("cannot ask the daemon: {e}")))?;
        let body = match body.map(serde_json::to_vec).transpose() {
            Ok(body) => body,
            Err(e) => return Err(lost(e.to_string())),
        };
        let socket = runtime.block_on(UnixStream::connect(&self.control)).map_err(|e| {
            let why = format!("{}: {e}; {}", self.control.display(), remedy(&e));
            match e.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Failure::Absent(why),
                _ => Failure::Lost(why),
            }
        })?;
        let (status, text) = runtime.block_on(exchange(socket, method, path, body)).map_err(lost)?;
        let strange = |e| lost(format!("the answer is not understood: {e}; is this another version's daemon?"));
        match status.is_success() {
            true => serde_json::from_slice(&text).map_err(strange),
            false => Err(Failure::Refused(serde_json::from_slice(&text).map_err(strange)?)),
        }
    }
}

async fn exchange(
    socket: UnixStream,
    method: Method,
    path: &str,
    body: Option<Vec<u8>>,
) -> Result<(StatusCode, Bytes), String> {
    let broken = |e: hyper::Error| format!("the daemon has not answered: {e}");
    let (mut sender, connection) = http1::handshake(TokioIo::new(socket)).await.map_err(broken)?;
    let connection = tokio::spawn(connection);
    let request = Request::builder().method(method).uri(path).header("host", "localhost");
    let request = match &body {
        Some(_) => request.header("content-type", "application/json"),
        None => request,
    };
    let request = request.body(Full::new(Bytes::from(body.unwrap_or_default()))).map_err(|e| e.to_string())?;
    let response = sender.send_request(request).await.map_err(broken)?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
    connection.abort();
    Ok((status, body.map_err(|e| format!("the answer ended early: {e}"))?.to_bytes()))
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            "no daemon listens there; start `cowgate serve`, or name its controlsock with --control or COWGATE_CONTROL"
        }
        io::ErrorKind::PermissionDenied => "ask as root or as the daemon's own user",
        _ => "see whether the daemon runs",
    }
}

/// The path of an export's route.
pub(super) fn export_path(name: &str) -> String {
    format!("/v1/exports/{}", percent_encoded(name))
}

/// Text as a part of a path or a query. Only what stands for itself anywhere is left unescaped.
pub(super) fn percent_encoded(name: &str) -> String {
    let mut path = String::new();
    for byte in name.bytes() {
        match byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'~') {
            true => path.push(byte as char),
            false => path.push_str(&format!("%{byte:02X}")),
        }
    }
    path
}

/// Text from elsewhere made fit for a terminal: control characters, and those that change the direction or cannot be
/// seen, are escaped.
pub(super) fn printable(text: &str) -> String {
    let is_hidden = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match is_hidden(c) && c != '\n' {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_paths_and_on_terminals() {
        assert_eq!(export_path("a-b_c~1"), "/v1/exports/a-b_c~1");
        assert_eq!(export_path("../x y%\u{e4}"), "/v1/exports/%2E%2E%2Fx%20y%25%C3%A4");
        assert_eq!(printable("a\u{1b}[2J\u{202e}\u{e4}\r"), "a\\u{1b}[2J\\u{202e}\u{e4}\\r");
    }
}
