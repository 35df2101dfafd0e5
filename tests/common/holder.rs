//! Programs that hold an image or an export open until they are dropped.

use super::qemu;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A program that has something open. It ends by itself, cleanly, when it is dropped.
#[derive(Debug)]
pub struct Holder {
    child: Child,
    name: &'static str,
}

impl Holder {
    /// qemu-io with an image open: `args` are its options. `Err`: what it said when it could not open it.
    pub fn qemu_io(args: &[&str], image: &Path) -> Result<Holder, String> {
        let mut child = piped(Command::new("qemu-io").args(args).arg(image));
        // its answer says that it has the image open; asking another tool instead could lock it out
        let _ = child.stdin.as_mut().unwrap().write_all(b"length\n");
        Holder { child, name: "qemu-io" }.answering("iB")
    }

    /// qemu-nbd with an image open, on a socket that is made beside it.
    pub fn qemu_nbd(args: &[&str], image: &Path) -> Result<Holder, String> {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let child = piped(Command::new("qemu-nbd").args(args).arg("-t").arg("-k").arg(&socket).arg(image));
        let mut holder = Holder { child, name: "qemu-nbd" };
        let start = Instant::now();
        // it listens before it opens the image, and greets after
        let greets = || UnixStream::connect(&socket)?.read_exact(&mut [0; 8]);
        while greets().is_err() {
            if holder.child.try_wait().unwrap().is_some() {
                return Err(holder.last_words());
            }
            assert!(start.elapsed() < Duration::from_secs(30), "qemu-nbd neither serves nor ends");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(holder)
    }

    /// A libnbd client that is connected to an export and has answered that it is.
    pub fn client(uri: &str) -> Result<Holder, String> {
        let program = "import nbd, sys\nh = nbd.NBD()\nh.connect_uri(sys.argv[1])\nprint('on', flush=True)\n\
                       sys.stdin.read()\nh.shutdown()";
        Holder::python(program, uri)
    }

    /// A Python program that says `on` when it holds what it is told to, until its standard input ends.
    pub fn python(program: &str, argument: &str) -> Result<Holder, String> {
        let child = piped(Command::new("/usr/bin/python3").args(["-c", program, argument]));
        Holder { child, name: "python3" }.answering("on")
    }

    fn answering(mut self, word: &str) -> Result<Holder, String> {
        let mut answer = String::new();
        // kept: who writes more must not find a closed pipe
        let mut out = BufReader::new(self.child.stdout.take().unwrap());
        out.read_line(&mut answer).unwrap();
        self.child.stdout = Some(out.into_inner());
        if answer.contains(word) { Ok(self) } else { Err(answer + &self.last_words()) }
    }

    fn last_words(&mut self) -> String {
        drop(self.child.stdin.take());
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        self.child.wait().unwrap();
        said
    }

    /// How an error names it.
    pub fn named(&self) -> String {
        format!("{} (pid {})", self.name, self.child.id())
    }
}

fn piped(command: &mut Command) -> Child {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        if self.name == "qemu-nbd" {
            qemu::output(Command::new("kill").arg(self.child.id().to_string()));
        }
        let _ = self.child.wait();
    }
}
