//! `locktimeout`: how long a client waits for an image that somebody else has in use.

mod common;

use common::daemon::{Daemon, Setup};
use common::holder::Holder;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// A client that is on its way in.
struct Waiting(Receiver<Result<Holder, String>>);

impl Waiting {
    fn to(uri: String) -> Waiting {
        let (sender, receiver) = channel();
        std::thread::spawn(move || drop(sender.send(Holder::client(&uri))));
        Waiting(receiver)
    }

    /// It is neither served nor refused for a while.
    #[track_caller]
    fn goes_on(&self) {
        match self.0.recv_timeout(Duration::from_millis(1500)) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(Err(said)) => panic!("refused: {said}"),
            _ => panic!("served while the image is in use elsewhere"),
        }
    }

    #[track_caller]
    fn ends(self) -> Result<Holder, String> {
        self.0.recv_timeout(Duration::from_secs(30)).expect("an end of the waiting")
    }
}

/// Waits until a connection has come as far as asking for its export: every try opens the image.
fn wait_for_a_try(daemon: &Daemon) {
    daemon.wait_for("a try", || daemon.log().contains("client is waiting"));
}

fn debug(command: &mut std::process::Command) {
    command.args(["--log", "debug"]);
}

#[test]
fn a_client_waits_until_the_lock_is_free() {
    let setup = Setup::new().generic("locktimeout = 120");
    let image = setup.image("disk.qcow2", "", "1M");
    setup.export("disk", &image, "");
    setup.export("reader", &image, "readonly = true\nlocktimeout = 99.5");
    setup.export("hasty", &image, "locktimeout = 0");
    let daemon = setup.start();
    let holder = Holder::qemu_io(&["-f", "qcow2"], &image).unwrap();
    let (one, other) = (Waiting::to(daemon.uri("disk")), Waiting::to(daemon.tcp("reader")));
    one.goes_on();
    other.goes_on();
    let start = Instant::now();
    assert!(Holder::client(&daemon.uri("hasty")).is_err());
    assert!(start.elapsed() < Duration::from_secs(60), "0 is: not at all");
    let words = format!("in use by {}", holder.named());
    daemon.wait_for(&words, || daemon.log().contains(&words));
    drop(holder);
    let both = (one.ends().unwrap(), other.ends().unwrap());
    drop(both);
    daemon.stop();
}

#[test]
fn waiting_ends() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    setup.export("disk", &image, "locktimeout = 2.5");
    let daemon = setup.start();
    let holder = Holder::qemu_io(&["-f", "qcow2"], &image).unwrap();
    let start = Instant::now();
    let waiting = Waiting::to(daemon.uri("disk"));
    waiting.goes_on();
    assert!(waiting.ends().is_err());
    assert!(start.elapsed() >= Duration::from_millis(2500));
    daemon.wait_for("the reason", || daemon.log().contains(&holder.named()));
    let (_dir, log) = daemon.stop();
    assert_eq!(log.matches(&holder.named()).count(), 1, "said once: {log}");
}

#[test]
fn who_hangs_up_gives_the_place_to_the_next() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    setup.export("disk", &image, "locktimeout = 3600\nmaxconnections = 1");
    let daemon = setup.start_with(debug);
    let holder = Holder::qemu_io(&["-f", "qcow2"], &image).unwrap();
    let program = "import nbd, sys\nnbd.NBD().connect_uri(sys.argv[1])";
    let mut impatient =
        std::process::Command::new("/usr/bin/python3").args(["-c", program, &daemon.uri("disk")]).spawn().unwrap();
    wait_for_a_try(&daemon);
    assert!(Holder::client(&daemon.uri("disk")).is_err(), "the place is taken");
    impatient.kill().unwrap();
    impatient.wait().unwrap();
    daemon.wait_for("the place", || daemon.log().contains("client closed the connection during the handshake"));
    let next = Waiting::to(daemon.uri("disk"));
    next.goes_on();
    drop(holder);
    drop(next.ends().unwrap());
    daemon.stop();
}

#[test]
fn stopping_the_daemon_ends_the_waiting() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    setup.export("disk", &image, "locktimeout = 3600");
    let daemon = setup.start_with(debug);
    let _holder = Holder::qemu_io(&["-f", "qcow2"], &image).unwrap();
    let waiting = Waiting::to(daemon.uri("disk"));
    wait_for_a_try(&daemon);
    daemon.stop();
    assert!(waiting.ends().is_err());
}

/// A reload that changes or removes the export concerns who waits for it too: nothing was served to them yet.
#[test]
fn who_waits_gets_the_new_definition() {
    let setup = Setup::new();
    let (busy, free) = (setup.image("busy.qcow2", "", "1M"), setup.image("free.qcow2", "", "2M"));
    setup.export("changed", &busy, "locktimeout = 3600");
    setup.export("removed", &busy, "locktimeout = 3600");
    let daemon = setup.start_with(debug);
    let holder = Holder::qemu_io(&["-f", "qcow2"], &busy).unwrap();
    let (changed, removed) = (Waiting::to(daemon.uri("changed")), Waiting::to(daemon.uri("removed")));
    daemon.wait_for("two tries", || daemon.log().matches("client is waiting").count() == 2);
    std::fs::remove_file(daemon.dir().join("conf.d/removed.conf")).unwrap();
    daemon.add_export("changed", &free, "locktimeout = 3600");
    let client = changed.ends().unwrap();
    assert!(removed.ends().unwrap_err().contains("no export named"));
    drop((client, holder));
    daemon.stop();
}
