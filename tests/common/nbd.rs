//! The NBD protocol, as far as a test needs to ask what is served, or many clients, without starting a program each time.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
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

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// A connection in the option phase, or holding an export. The socket may be one of TCP: the type does not matter.
pub struct Nbd(UnixStream);

impl Nbd {
    /// Connects and takes the greeting.
    pub fn connect(socket: &Path) -> Nbd {
        Nbd::begin(UnixStream::connect(socket).unwrap().into()).unwrap()
    }

    /// The same over TCP to a port of 127.0.0.1.
    pub fn connect_tcp(port: u16) -> Nbd {
        Nbd::begin(TcpStream::connect(("127.0.0.1", port)).unwrap().into()).unwrap()
    }

    /// Takes the greeting on a connected socket. `Err`: there is none.
    pub fn begin(socket: OwnedFd) -> io::Result<Nbd> {
        let mut stream = UnixStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        stream.write_all(&3_u32.to_be_bytes())?;
        Ok(Nbd(stream))
    }

    /// The socket.
    pub fn socket(&mut self) -> &mut UnixStream {
        &mut self.0
    }

    /// Sends a request; its reply is simple.
    pub fn send(&mut self, kind: u16, offset: u64, length: u32, payload: &[u8]) -> io::Result<()> {
        self.send_with(0, kind, offset, length, payload)
    }

    /// The same with command flags.
    pub fn send_with(&mut self, flags: u16, kind: u16, offset: u64, length: u32, payload: &[u8]) -> io::Result<()> {
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(7_u64.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(payload);
        self.0.write_all(&bytes)
    }

    /// The error of the next simple reply, without the data that may follow.
    pub fn error(&mut self) -> io::Result<u32> {
        let mut head = [0; 16];
        self.0.read_exact(&mut head)?;
        assert_eq!(head[..4], SIMPLE_REPLY_MAGIC.to_be_bytes());
        Ok(u32::from_be_bytes(head[4..8].try_into().unwrap()))
    }

    /// Reads; `Err`: the connection has ended.
    pub fn read(&mut self, offset: u64, length: u32) -> io::Result<Vec<u8>> {
        self.send(0, offset, length, &[])?;
        assert_eq!(self.error()?, 0);
        let mut data = vec![0; length as usize];
        self.0.read_exact(&mut data)?;
        Ok(data)
    }

    /// Writes; `Err`: the connection has ended.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.send(1, offset, data.len() as u32, data)?;
        assert_eq!(self.error()?, 0);
        Ok(())
    }

    /// Asks for the names of all exports and takes no answer.
    pub fn ask_for_list(&mut self) {
        self.option(OPT_LIST, &[]);
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
