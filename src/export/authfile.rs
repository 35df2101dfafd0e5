//! `authfile`: which addresses may use an export.
//!
//! Read by the registry each time a client asks for the export, so that an edit counts at once. Promises: a file that
//! cannot be read or understood as a whole admits nobody, and the error names file and line; a file that does not exist
//! admits everybody and an empty one nobody, as with nbd-server.

use crate::export::problem::printable;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Largest authorization file in bytes.
pub const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why an authorization file admits nobody.
#[derive(Debug, Error)]
pub enum AuthError {
    /// It cannot be read.
    #[error("{}: cannot read this authfile, so nobody is admitted: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line is not understood.
    #[error("{}:{line}: {text:?} in this authfile is {what}, so nobody is admitted; write one IP address or NETWORK/BITS a line", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Line in it, from 1.
        line: usize,
        /// What stands there, made printable.
        text: String,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// The addresses that are admitted.
#[derive(Debug, PartialEq, Eq)]
pub struct AuthList(Vec<Network>);

/// An address with the number of its leading bits that count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Network {
    address: IpAddr,
    bits: u32,
}

/// A line that is not understood.
#[derive(Debug, PartialEq, Eq)]
pub struct Malformed {
    /// From 1.
    pub line: usize,
    /// What stands there, made printable.
    pub text: String,
    /// What is wrong with it.
    pub what: &'static str,
}

/// Reads an authorization file. `None`: it does not exist.
pub fn read(path: &Path) -> Result<Option<AuthList>, AuthError> {
    let unreadable = |source| AuthError::Unreadable { path: path.to_owned(), source };
    // O_NONBLOCK: a FIFO in its place must not stop the worker
    let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(unreadable(e)),
    };
    let is_file = file.metadata().map_err(unreadable)?.is_file();
    if !is_file {
        return Err(unreadable(io::Error::other("it is not a regular file")));
    }
    let mut text = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(unreadable(io::Error::other(format!("it has more than {MAX_FILE_BYTES} bytes"))));
    }
    AuthList::parse(&text).map(Some).map_err(|Malformed { line, text, what }| AuthError::Malformed {
        path: path.to_owned(),
        line,
        text,
        what,
    })
}

impl AuthList {
    /// Understands a file's text: one address or network a line; `#` begins a comment anywhere.
    pub fn parse(text: &[u8]) -> Result<AuthList, Malformed> {
        let mut networks = Vec::new();
        for (index, line) in text.split(|&b| b == b'\n').enumerate() {
            let words = line.split(|&b| b == b'#').next().unwrap_or_default().trim_ascii();
            if words.is_empty() {
                continue;
            }
            let network = std::str::from_utf8(words).map_err(|_| "not text").and_then(Network::parse);
            let malformed = |what| Malformed { line: index + 1, text: printable(words), what };
            networks.push(network.map_err(malformed)?);
        }
        Ok(AuthList(networks))
    }

    /// Whether a client at this address is admitted. An IPv4 address in its IPv6 form counts as the IPv4 address.
    pub fn admits(&self, client: IpAddr) -> bool {
        let client = client.to_canonical();
        self.0.iter().any(|network| network.holds(client))
    }
}

impl Network {
    fn parse(text: &str) -> Result<Network, &'static str> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address.trim_end(), Some(bits.trim_start())),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| "not an IP address")?;
        let width = if address.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            None => width,
            // not what `parse` alone takes: "+8"
            Some(bits) if bits.bytes().all(|b| b.is_ascii_digit()) => {
                bits.parse().ok().filter(|bits| *bits <= width).ok_or("not a network: it has too many bits")?
            }
            Some(_) => return Err("not a network: its number of bits is no number"),
        };
        // a network of IPv4 addresses in their IPv6 form: clients are compared in the short one
        match address.to_canonical() {
            short @ IpAddr::V4(_) if address.is_ipv6() && bits >= 96 => Ok(Network { address: short, bits: bits - 96 }),
            _ => Ok(Network { address, bits }),
        }
    }

    fn holds(&self, client: IpAddr) -> bool {
        // all of an address's bits that count, and nothing else
        let differ = match (self.address, client) {
            (IpAddr::V4(a), IpAddr::V4(b)) => u128::from(a.to_bits() ^ b.to_bits()) << 96,
            (IpAddr::V6(a), IpAddr::V6(b)) => a.to_bits() ^ b.to_bits(),
            _ => return false,
        };
        differ.leading_zeros() >= self.bits
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn admits(text: &str, client: &str) -> bool {
        AuthList::parse(text.as_bytes()).unwrap().admits(client.parse().unwrap())
    }

    #[test]
    fn addresses_and_networks() {
        let text = "# who may\n\n  192.168.1.100   # one\n10.0.0.0/8\r\n\t2001:db8::/32#net\n::1\n172.16.5.4/16\n";
        for client in ["192.168.1.100", "10.255.0.1", "2001:db8:ffff::1", "::1", "172.16.200.1", "::ffff:10.1.2.3"] {
            assert!(admits(text, client), "{client}");
        }
        for client in ["192.168.1.101", "11.0.0.1", "2001:db9::1", "::2", "172.17.5.4", "::ffff:11.0.0.1", "::10.0.0.1"]
        {
            assert!(!admits(text, client), "{client}");
        }
    }

    #[test]
    fn the_borders_of_networks() {
        assert!(admits("0.0.0.0/0", "255.255.255.255") && !admits("0.0.0.0/0", "::2"));
        assert!(admits("::/0", "ffff::1") && !admits("::/0", "1.2.3.4") && !admits("::/0", "::ffff:1.2.3.4"));
        assert!(admits("1.2.3.4/32", "1.2.3.4") && !admits("1.2.3.4/32", "1.2.3.5"));
        assert!(admits("1.2.3.4/31", "1.2.3.5") && !admits("1.2.3.4/31", "1.2.3.6"));
        assert!(admits("::ffff:10.0.0.0/104", "10.9.9.9") && !admits("::ffff:10.0.0.0/104", "11.0.0.0"));
        assert!(admits("::ffff:1.2.3.4", "1.2.3.4"));
    }

    #[test]
    fn an_empty_file_admits_nobody() {
        for text in ["", "\n\n", "# 127.0.0.1\n", "   \r\n"] {
            assert!(!admits(text, "127.0.0.1") && !admits(text, "::1"), "{text:?}");
        }
    }

    #[test]
    fn what_is_not_understood_is_an_error_with_its_line() {
        let bad = [
            "localhost",
            "1.2.3",
            "1.2.3.4/33",
            "1.2.3.4/",
            "1.2.3.4/+8",
            "1.2.3.4/8/8",
            "1.2.3.4 5.6.7.8",
            "1.2.3.4,5.6.7.8",
            "::/129",
            "fe80::1%eth0",
            "01.2.3.4",
            "1.2.3.4/99999999999999999999",
            "; comment",
            "1.2.3.4\0",
            "*",
        ];
        for line in bad {
            let found = AuthList::parse(format!("127.0.0.1\n\n{line}\n").as_bytes()).unwrap_err();
            assert_eq!(found.line, 3, "{line}");
        }
        assert_eq!(AuthList::parse(b"\xff\n").unwrap_err().line, 1);
    }

    #[test]
    fn files() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("allow");
        assert!(read(&file).unwrap().is_none());
        std::fs::write(&file, "::1\nx\n").unwrap();
        let said = read(&file).unwrap_err().to_string();
        assert!(said.starts_with(&format!("{}:2: \"x\"", file.display())), "{said}");
        assert!(matches!(read(dir.path()), Err(AuthError::Unreadable { .. })));
        nix::unistd::mkfifo(&dir.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(read(&dir.path().join("fifo")), Err(AuthError::Unreadable { .. })));
        std::fs::write(&file, vec![b'\n'; MAX_FILE_BYTES as usize + 1]).unwrap();
        assert!(read(&file).unwrap_err().to_string().contains("more than"));
        std::fs::write(&file, vec![b'\n'; MAX_FILE_BYTES as usize]).unwrap();
        assert_eq!(read(&file).unwrap(), Some(AuthList(Vec::new())));
    }

    fn address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![any::<u32>().prop_map(|a| IpAddr::V4(a.into())), any::<u128>().prop_map(|a| IpAddr::V6(a.into()))]
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(text in proptest::collection::vec(any::<u8>(), 0..200), client in address()) {
            if let Ok(list) = AuthList::parse(&text) {
                list.admits(client);
            }
        }

        /// The same question asked bit by bit.
        #[test]
        fn a_network_holds_who_shares_its_leading_bits(a in address(), b in address(), bits in 0u32..=128, same in 0u32..=128) {
            let width = if a.is_ipv4() { 32 } else { 128 };
            let (bits, same) = (bits.min(width), same.min(width));
            let string = |address: IpAddr| match address {
                IpAddr::V4(a) => format!("{:032b}", a.to_bits()),
                IpAddr::V6(a) => format!("{:0128b}", a.to_bits()),
            };
            // b, with the first `same` bits of a
            let mixed = |a: u128, b: u128, width: u32| {
                let low = 1u128.checked_shl(width - same).map_or(u128::MAX, |bit| bit - 1);
                (a & !low) | (b & low)
            };
            let client: IpAddr = match (a, b) {
                (IpAddr::V4(a), IpAddr::V4(b)) => {
                    IpAddr::V4((mixed(a.to_bits().into(), b.to_bits().into(), 32) as u32).into())
                }
                (IpAddr::V6(a), IpAddr::V6(b)) => IpAddr::V6(mixed(a.to_bits(), b.to_bits(), 128).into()),
                _ => b,
            };
            prop_assume!(a.to_canonical() == a && client.to_canonical() == client);
            let network = Network { address: a, bits };
            let list = AuthList::parse(network.to_string().as_bytes()).unwrap();
            let (a, b) = (string(a), string(client));
            let expected = a.len() == b.len() && a[..bits as usize] == b[..bits as usize];
            prop_assert_eq!(list.admits(client), expected);
        }
    }
}
