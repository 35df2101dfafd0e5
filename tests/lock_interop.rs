//! The locks of QEMU's tools and ours, every use beside every other, in both orders: whether it is let in, and that it
//! is when the other one has left.
//!
//! What is compatible follows from the marks that each use sets (`image/lock.rs`); a use of QEMU's is noted here with
//! whether it goes beside a reader and beside a writer of ours.

mod common;

use common::daemon::{Daemon, Setup};
use common::holder::Holder;
use common::qemu;
use common::root::{self, Loop};
use std::path::Path;
use std::process::Command;

/// How a use of ours takes part: the exports are made so that each has a name of its kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ours {
    Reads,
    Writes,
}
use Ours::{Reads, Writes};

/// A use by others, and whether it goes beside a reader and beside a writer.
struct Theirs {
    program: &'static str,
    line: &'static str,
    beside: [bool; 2],
}

const fn theirs(program: &'static str, line: &'static str, reader: bool, writer: bool) -> Theirs {
    Theirs { program, line, beside: [reader, writer] }
}

impl Theirs {
    fn goes_with(&self, ours: Ours) -> bool {
        self.beside[usize::from(ours == Writes)]
    }

    /// Programs that go on: with the image open, or not let in.
    fn hold(&self, image: &Path) -> Result<Holder, String> {
        let args: Vec<&str> = self.line.split_whitespace().collect();
        match self.program {
            "qemu-io" => Holder::qemu_io(&args, image),
            _ => Holder::qemu_nbd(&args, image),
        }
    }

    /// Commands; `@` stands for the image.
    fn run(&self, dir: &Path, image: &Path) -> Result<(), String> {
        let mut command = match self.program {
            "cowgate" => Command::new(env!("CARGO_BIN_EXE_cowgate")),
            program => Command::new(program),
        };
        command.current_dir(dir);
        for word in self.line.split_whitespace() {
            match word {
                "@" => command.arg(image),
                "''" => command.arg(""),
                word => command.arg(word),
            };
        }
        let out = qemu::output(&mut command);
        let said = qemu::text(&out.stderr) + &qemu::text(&out.stdout);
        if out.status.success() {
            return Ok(());
        }
        assert!(said.contains("lock") || said.contains("in use"), "{} {}: {said}", self.program, self.line);
        Err(said)
    }
}

/// A program that goes on while the image is used, for each format.
const QCOW2_HOLDERS: &[Theirs] = &[
    theirs("qemu-io", "-f qcow2", false, false),
    theirs("qemu-io", "-r -f qcow2", true, false),
    theirs("qemu-io", "-r -U -f qcow2", true, true),
    theirs("qemu-nbd", "-f qcow2", false, false),
    theirs("qemu-nbd", "-r -f qcow2", true, false),
];

/// A raw image's reader in QEMU lets others write, qemu-nbd's does not let them resize, which our writers may.
const RAW_HOLDERS: &[Theirs] = &[
    theirs("qemu-io", "-f raw", false, false),
    theirs("qemu-io", "-r -f raw", true, true),
    theirs("qemu-io", "-r -U -f raw", true, true),
    theirs("qemu-nbd", "-f raw", false, false),
    theirs("qemu-nbd", "-r -f raw", true, false),
];

/// In an order in which all of them succeed when nobody has the image.
const QCOW2_COMMANDS: &[Theirs] = &[
    theirs("qemu-img", "info -f qcow2 @", true, false),
    theirs("qemu-img", "info -U -f qcow2 @", true, true),
    theirs("qemu-img", "check -q -f qcow2 @", true, false),
    theirs("qemu-img", "check -q -U -f qcow2 @", true, true),
    theirs("qemu-img", "map -f qcow2 @", true, false),
    theirs("qemu-img", "measure -f qcow2 -O raw @", true, false),
    theirs("qemu-img", "compare -q -f qcow2 -F qcow2 @ same.qcow2", true, false),
    theirs("qemu-img", "compare -q -U -f qcow2 -F qcow2 @ same.qcow2", true, true),
    theirs("qemu-img", "convert -f qcow2 -O raw @ copy.raw", true, false),
    theirs("qemu-img", "convert -U -f qcow2 -O raw @ copy.raw", true, true),
    theirs("qemu-img", "snapshot -l @", true, false),
    theirs("qemu-img", "rebase -f qcow2 -b @ -F qcow2 other.qcow2", true, false),
    theirs("qemu-img", "check -q -r all -f qcow2 @", false, false),
    theirs("qemu-img", "commit -q -f qcow2 top.qcow2", false, false),
    theirs("qemu-img", "rebase -u -f qcow2 -b '' @", false, false),
    theirs("qemu-img", "amend -f qcow2 -o lazy_refcounts=on @", false, false),
    theirs("qemu-img", "bitmap --add -f qcow2 @ b", false, false),
    theirs("qemu-img", "snapshot -c another @", false, false),
    theirs("cowgate", "image info @", true, true),
    theirs("cowgate", "image check @", true, false),
    theirs("cowgate", "image map @", true, false),
    theirs("cowgate", "image compare @ @", true, false),
    theirs("cowgate", "image convert --force --quiet @ ours.raw", true, false),
    theirs("cowgate", "image convert --force --quiet --snapshot snap @ ours.raw", true, false),
    theirs("cowgate", "image bitmap list @", true, true),
    theirs("cowgate", "image rebase --quiet other.qcow2 --backing @ --backing-format qcow2", true, false),
    theirs("cowgate", "image check --repair @", false, false),
    theirs("cowgate", "image commit --quiet third.qcow2", false, false),
    theirs("cowgate", "image bitmap add @ c", false, false),
    theirs("cowgate", "image bitmap remove @ c", false, false),
    theirs("cowgate", "image resize --quiet @ 3M", false, false),
    theirs("cowgate", "image create --force @ --size 3M", false, false),
    theirs("qemu-img", "resize -q -f qcow2 @ 4M", false, false),
    theirs("qemu-img", "create -q -f qcow2 @ 4M", false, false),
];

const RAW_COMMANDS: &[Theirs] = &[
    theirs("qemu-img", "info -f raw @", true, true),
    theirs("qemu-img", "convert -f raw -O raw @ copy.raw", true, false),
    theirs("qemu-img", "convert -U -f raw -O raw @ copy.raw", true, true),
    theirs("qemu-io", "-f raw -c flush @", false, false),
    theirs("cowgate", "image info --format raw @", true, true),
    theirs("cowgate", "image compare --format-a raw --format-b raw @ @", true, false),
    theirs("cowgate", "image convert --force --quiet --format raw @ ours.raw", true, false),
];

/// What only a file can: a device is not resized.
const RAW_FILE_COMMANDS: &[Theirs] = &[
    theirs("cowgate", "image resize --quiet --format raw @ 3M", false, false),
    theirs("qemu-img", "resize -q -f raw @ 4M", false, false),
];

struct Table {
    image: std::path::PathBuf,
    ours: Vec<(&'static str, Ours)>,
    holders: &'static [Theirs],
    commands: Vec<&'static Theirs>,
}

impl Table {
    fn run(&self, daemon: &Daemon) {
        let free = || drop(self.patiently(daemon, &self.holders[0]));
        for &(export, ours) in &self.ours {
            let client = Holder::client(&daemon.uri(export)).unwrap_or_else(|said| panic!("{export}: {said}"));
            for theirs in self.holders {
                self.compare(export, ours, theirs, theirs.hold(&self.image).map(drop));
            }
            for theirs in &self.commands {
                self.compare(export, ours, theirs, theirs.run(daemon.dir(), &self.image));
            }
            drop(client);
            // it is closed a moment after the client has left
            free();
        }
        for theirs in self.holders {
            let holder = self.patiently(daemon, theirs);
            for &(export, ours) in &self.ours {
                self.compare(export, ours, theirs, Holder::client(&daemon.uri(export)).map(drop));
            }
            drop(holder);
            for &(export, _) in &self.ours {
                let client = Holder::client(&daemon.uri(export));
                assert!(client.is_ok(), "{export} after {} {}: {client:?}", theirs.program, theirs.line);
            }
            free();
        }
        for theirs in &self.commands {
            theirs.run(daemon.dir(), &self.image).unwrap_or_else(|e| panic!("{} {}: {e}", theirs.program, theirs.line));
        }
    }

    /// Our commands while QEMU has the image, as they are beside a daemon.
    fn commands_beside_qemu(&self, daemon: &Daemon) {
        for theirs in self.holders.iter().filter(|theirs| theirs.beside != [true, true]) {
            let held = if theirs.beside[0] { Reads } else { Writes };
            let _holder = self.patiently(daemon, theirs);
            for ours in self.commands.iter().filter(|command| command.program == "cowgate") {
                self.compare(theirs.program, held, ours, ours.run(daemon.dir(), &self.image));
            }
        }
    }

    fn patiently(&self, daemon: &Daemon, theirs: &Theirs) -> Holder {
        let mut holder = None;
        daemon.wait_for("the image to be free", || {
            holder = theirs.hold(&self.image).ok();
            holder.is_some()
        });
        holder.unwrap()
    }

    #[track_caller]
    fn compare(&self, export: &str, ours: Ours, theirs: &Theirs, outcome: Result<(), String>) {
        let (program, line) = (theirs.program, theirs.line);
        assert_eq!(outcome.is_ok(), theirs.goes_with(ours), "{export} ({ours:?}) and {program} {line}: {outcome:?}");
    }
}

fn overlay(dir: &Path, name: &str, backing: &Path, format: &str) -> std::path::PathBuf {
    let path = dir.join(name);
    let create = ["create", "-q", "-f", "qcow2", "-F", format, "-b"];
    qemu::run(Command::new("qemu-img").args(create).arg(backing).arg(&path));
    path
}

#[test]
fn qcow2_images() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "2M");
    qemu::qemu_img("snapshot -c snap", &[&image]);
    std::fs::copy(&image, setup.dir().join("same.qcow2")).unwrap();
    for name in ["top.qcow2", "third.qcow2", "other.qcow2"] {
        overlay(setup.dir(), name, &image, "qcow2");
    }
    let over = overlay(setup.dir(), "over.qcow2", &image, "qcow2");
    setup.export("reader", &image, "readonly = true");
    setup.export("writer", &image, "");
    setup.export("overlay", &over, "");
    setup.export("overlay-reader", &over, "readonly = true");
    setup.export("snapshot", &image, "snapshot = snap\nreadonly = true");
    setup.export("temporary", &image, "copyonwrite = true");
    let ours = vec![
        ("reader", Reads),
        ("writer", Writes),
        ("overlay", Reads),
        ("overlay-reader", Reads),
        ("snapshot", Reads),
        ("temporary", Reads),
    ];
    let daemon = setup.start();
    let table = Table { image, ours, holders: QCOW2_HOLDERS, commands: QCOW2_COMMANDS.iter().collect() };
    table.commands_beside_qemu(&daemon);
    table.run(&daemon);
    let (_dir, _) = daemon.stop();
    qemu::check(&table.image);
}

/// A raw image, also as the backing file and the data file of another one.
fn raw_table(setup: Setup, image: &Path, commands: Vec<&'static Theirs>) {
    let setup = setup.generic("imageroots = /");
    let with_data = setup.image("data.qcow2", &format!("data_file={}", image.display()), "2M");
    std::fs::write(image, vec![7; 2 << 20]).unwrap();
    let over = overlay(setup.dir(), "over.qcow2", image, "raw");
    setup.export("reader", image, "format = raw\nreadonly = true");
    setup.export("writer", image, "format = raw");
    setup.export("overlay", &over, "");
    setup.export("temporary", image, "format = raw\ncopyonwrite = true");
    setup.export("data", &with_data, "");
    setup.export("data-reader", &with_data, "readonly = true");
    let ours = vec![
        ("reader", Reads),
        ("writer", Writes),
        ("overlay", Reads),
        ("temporary", Reads),
        ("data", Writes),
        ("data-reader", Reads),
    ];
    let daemon = setup.start();
    let table = Table { image: image.to_owned(), ours, holders: RAW_HOLDERS, commands };
    table.commands_beside_qemu(&daemon);
    table.run(&daemon);
    daemon.stop();
}

#[test]
fn raw_files() {
    let setup = Setup::new();
    let image = setup.dir().join("disk.raw");
    raw_table(setup, &image, RAW_COMMANDS.iter().chain(RAW_FILE_COMMANDS).collect());
}

#[test]
fn block_devices() {
    if !root::available("make a loop device") {
        return;
    }
    let disk = Loop::new(2 << 20);
    raw_table(Setup::new(), disk.path(), RAW_COMMANDS.iter().collect());
}
