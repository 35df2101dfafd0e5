//! The NBD handshake, as far as a test needs to ask what is served without starting a program each time.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const OPT_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const OPT_LIST: u32 = 3;
const OPT_GO: u32 = 7;
const ACK: u32 = 1;
const SERVER: u32 = 2;
const ERROR: u32 = 1 << 31;

/// A connection in the option phase, or holding an export.
pub struct Nbd(UnixStream);

impl Nbd {
    /// Connects and takes the greeting.
    pub fn connect(socket: &Path) -> Nbd {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut nbd = Nbd(stream);
        assert_eq!(&nbd.receive(18)[..16], b"NBDMAGICIHAVEOPT");
        nbd.0.write_all(&3_u32.to_be_bytes()).unwrap();
        nbd
    }

    /// The names of all exports.
    pub fn list(&mut self) -> Vec<String> {
        self.option(OPT_LIST, &[]);
        let mut names = Vec::new();
        loop {
            match self.reply() {
                (SERVER, data) => names.push(String::from_utf8(data[4..].to_vec()).unwrap()),
                (ACK, _) => return names,
                (other, data) => panic!("listing: {other:#x} {}", String::from_utf8_lossy(&data)),
            }
        }
    }

    /// Takes hold of an export, until this is dropped. `Err`: the server's message.
    pub fn go(&mut self, export: &str) -> Result<(), String> {
        let mut data = (export.len() as u32).to_be_bytes().to_vec();
        data.extend(export.as_bytes());
        data.extend([0, 0]);
        self.option(OPT_GO, &data);
        loop {
            match self.reply() {
                (ACK, _) => return Ok(()),
                (kind, data) if kind & ERROR != 0 => return Err(String::from_utf8_lossy(&data).into_owned()),
                _ => {}
            }
        }
    }

    fn option(&mut self, option: u32, data: &[u8]) {
        let head = [&OPT_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes()].concat();
        self.0.write_all(&[&head, data].concat()).unwrap();
    }

    fn reply(&mut self) -> (u32, Vec<u8>) {
        let head = self.receive(20);
        assert_eq!(head[..8], REPLY_MAGIC.to_be_bytes());
        let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        let data = self.receive(number(16) as usize);
        (number(12), data)
    }

    fn receive(&mut self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.0.read_exact(&mut data).unwrap();
        data
    }
}
