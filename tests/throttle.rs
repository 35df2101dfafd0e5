//! `bandwidthlimit` and `iopslimit`: the rate holds, clients share it, a reload changes it under them, and nobody who is
//! held back keeps the daemon or an image from being let go.
//!
//! Judged by counting over generous times: that something takes at least so long, never that it takes little time.

mod common;

use common::daemon::{Daemon, Setup};
use common::nbd::Nbd;
use common::qemu;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

const READ: u16 = 0;
const FLUSH: u16 = 3;
const ZEROES: u16 = 6;

/// A daemon with two workers that serves `disk`, 64 MiB, raw so that the storage costs little, with lines for the export.
fn daemon(export: &str) -> Daemon {
    let setup = Setup::new().generic("workers = 2");
    let image = setup.dir().join("disk.raw");
    std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    setup.export("disk", &image, export);
    setup.start()
}

fn client(daemon: &Daemon) -> Nbd {
    let mut nbd = Nbd::connect(&daemon.socket());
    nbd.go("disk").unwrap();
    nbd
}

fn change(daemon: &Daemon, export: &str) {
    daemon.add_export("disk", &daemon.dir().join("disk.raw"), export);
}

#[test]
fn bytes_take_their_time() {
    let daemon = daemon("bandwidthlimit = 8M");
    let mut client = client(&daemon);
    // pieces, requests in one, and small ones
    for (length, count) in [(8 << 20, 2), (1 << 20, 16), (64 << 10, 256)] {
        let data = vec![7; length];
        let start = Instant::now();
        for i in 0..count {
            client.write(((i * length) % (32 << 20)) as u64, &data).unwrap();
        }
        assert!(start.elapsed() >= Duration::from_millis(1500), "16 MiB written in {:?}", start.elapsed());
        let start = Instant::now();
        for i in 0..count {
            assert!(client.read(((i * length) % (32 << 20)) as u64, length as u32).unwrap() == data);
        }
        assert!(start.elapsed() >= Duration::from_millis(1500), "16 MiB read in {:?}", start.elapsed());
    }
    // what moves no data costs no bytes
    for kind in [FLUSH, ZEROES] {
        client.send(kind, 0, if kind == FLUSH { 0 } else { 64 << 20 }, &[]).unwrap();
        assert_eq!(client.error().unwrap(), 0);
    }
    drop(daemon.stop());
}

/// A client with structured replies: large reads in pieces pay piece by piece.
#[test]
fn reads_in_pieces_and_real_clients_keep_to_the_rate() {
    let daemon = daemon("bandwidthlimit = 8M");
    let data = daemon.dir().join("data.raw");
    std::fs::write(&data, vec![5; 16 << 20]).unwrap();
    let start = Instant::now();
    qemu::run(Command::new("nbdcopy").arg(&data).arg(daemon.uri("disk")));
    assert!(start.elapsed() >= Duration::from_millis(1500), "four connections at once");
    // what is written by now: a hole would cost an operation only
    let start = Instant::now();
    daemon.python("disk", "assert len(h.pread(16 << 20, 0)) == 16 << 20");
    assert!(start.elapsed() >= Duration::from_millis(1500));
    let (dir, _) = daemon.stop();
    assert!(std::fs::read(dir.path().join("disk.raw")).unwrap()[..16 << 20].iter().all(|b| *b == 5));
}

#[test]
fn operations_are_counted_whatever_they_do() {
    let daemon = daemon("iopslimit = 40");
    let mut client = client(&daemon);
    type Ask = fn(&mut Nbd);
    let kinds: [Ask; 5] = [
        |c| drop(c.read(0, 512).unwrap()),
        |c| c.write(0, &[1; 512]).unwrap(),
        |c| {
            c.send(ZEROES, 0, 32 << 20, &[]).unwrap();
            assert_eq!(c.error().unwrap(), 0);
        },
        |c| {
            c.send(FLUSH, 0, 0, &[]).unwrap();
            assert_eq!(c.error().unwrap(), 0);
        },
        |c| {
            // refused: outside the disk
            c.send(READ, u64::MAX - 511, 512, &[]).unwrap();
            assert_ne!(c.error().unwrap(), 0);
        },
    ];
    for ask in kinds {
        let start = Instant::now();
        (0..40).for_each(|_| ask(&mut client));
        assert!(start.elapsed() >= Duration::from_millis(750), "40 operations in {:?}", start.elapsed());
    }
    drop(daemon.stop());
}

/// A client that does what it does until it is told to end, and counts bytes.
struct Busy {
    bytes: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<()>,
}

impl Busy {
    fn start(mut client: Nbd, length: u32, flight: usize) -> Busy {
        let (bytes, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, told) = (Arc::clone(&bytes), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut data = vec![0; length as usize];
            for _ in 0..flight {
                client.send(READ, 0, length, &[]).unwrap();
            }
            while !told.load(Relaxed) {
                assert_eq!(client.error().unwrap(), 0);
                std::io::Read::read_exact(client.socket(), &mut data).unwrap();
                counted.fetch_add(u64::from(length), Relaxed);
                client.send(READ, 0, length, &[]).unwrap();
            }
        });
        Busy { bytes, stop, thread }
    }

    fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    fn end(self) {
        self.stop.store(true, Relaxed);
        self.thread.join().unwrap();
    }
}

/// What each moves in a window, once all have begun.
fn shares(clients: &[Busy], window: Duration) -> Vec<u64> {
    let start = Instant::now();
    while clients.iter().any(|c| c.bytes() == 0) {
        assert!(start.elapsed() < Duration::from_secs(30), "somebody starves");
        std::thread::sleep(Duration::from_millis(20));
    }
    let before: Vec<u64> = clients.iter().map(Busy::bytes).collect();
    std::thread::sleep(window);
    clients.iter().zip(before).map(|(c, before)| c.bytes() - before).collect()
}

#[test]
fn clients_share_the_rate_whatever_they_send() {
    let daemon = daemon("bandwidthlimit = 4M");
    // small requests one at a time, and large ones many at once, on both workers
    let forms = [(16 << 10, 1), (1 << 20, 16), (16 << 10, 64), (256 << 10, 1)];
    let clients: Vec<Busy> = forms.iter().map(|(len, flight)| Busy::start(client(&daemon), *len, *flight)).collect();
    let shares = shares(&clients, Duration::from_secs(8));
    println!("shares of 4 MiB/s in 8 s: {shares:?}");
    let (least, most) = (*shares.iter().min().unwrap(), *shares.iter().max().unwrap());
    // a request of the largest size may have ended just inside the window or just outside
    assert!(most <= 2 * least + (2 << 20), "{shares:?}");
    assert!(shares.iter().sum::<u64>() <= (8 << 22) + (8 << 20), "{shares:?}");
    clients.into_iter().for_each(Busy::end);
    drop(daemon.stop());
}

#[test]
fn clients_share_operations() {
    let daemon = daemon("iopslimit = 100");
    let clients: Vec<Busy> = [1, 200].iter().map(|flight| Busy::start(client(&daemon), 512, *flight)).collect();
    let shares = shares(&clients, Duration::from_secs(5));
    println!("shares of 100 operations a second in 5 s: {:?}", shares.iter().map(|s| s / 512).collect::<Vec<_>>());
    assert!(shares[1] <= 2 * shares[0] && shares[0] <= 2 * shares[1], "{shares:?}");
    // the rest of what it asked for comes at once
    change(&daemon, "");
    clients.into_iter().for_each(Busy::end);
    drop(daemon.stop());
}

#[test]
fn a_reload_changes_the_rate_under_connected_clients() {
    let daemon = daemon("bandwidthlimit = 64K");
    let mut slow = client(&daemon);
    let mut other = client(&daemon);
    let writer = std::thread::spawn(move || {
        // two minutes and more at this rate
        slow.write(0, &vec![9; 8 << 20]).unwrap();
        slow
    });
    std::thread::sleep(Duration::from_millis(300));
    assert!(!writer.is_finished());
    // the same client goes on at the new rate, and the export is not retired: its writers stay beside new ones
    change(&daemon, "bandwidthlimit = 1G\niopslimit = 1000000");
    let mut slow = writer.join().unwrap();
    let shown: serde_json::Value =
        serde_json::from_str(&cowgate(&daemon, &["export", "show", "disk", "--json"])).unwrap();
    assert_eq!(shown["current"]["bandwidth_limit"], 1 << 30);
    assert_eq!(shown["current"]["iops_limit"], 1_000_000);
    assert_eq!(shown["draining"].as_array().unwrap().len(), 0);
    assert_eq!(shown["current"]["clients"].as_array().unwrap().len(), 2);
    let text = cowgate(&daemon, &["export", "show", "disk"]);
    assert!(text.contains("bandwidth limit: 1 GiB a second"), "{text}");
    client(&daemon).write(0, &[1; 512]).unwrap();
    // and back: limits that come count for those who are there
    change(&daemon, "iopslimit = 20");
    let start = Instant::now();
    (0..30).for_each(|_| drop(other.read(0, 512).unwrap()));
    assert!(start.elapsed() >= Duration::from_millis(1200));
    // none: then the limits are gone
    change(&daemon, "");
    slow.write(0, &vec![3; 8 << 20]).unwrap();
    let (_dir, log) = daemon.stop();
    assert!(!log.contains("former definition") && log.contains("0 added, 1 changed, 0 removed"), "{log}");
}

fn cowgate(daemon: &Daemon, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cowgate"));
    qemu::run(command.args(arguments).arg("--control").arg(daemon.control()))
}

#[test]
fn other_keys_that_change_keep_the_limits_of_the_name() {
    let daemon = daemon("bandwidthlimit = 4M");
    let former = Busy::start(client(&daemon), 64 << 10, 16);
    change(&daemon, "bandwidthlimit = 4M\nreadonly = true");
    let now = Busy::start(client(&daemon), 64 << 10, 16);
    let both = [former, now];
    let shares = shares(&both, Duration::from_secs(4));
    assert!(shares.iter().sum::<u64>() <= (4 << 22) + (4 << 20), "two definitions are no two rates: {shares:?}");
    change(&daemon, "readonly = true");
    both.into_iter().for_each(Busy::end);
    drop(daemon.stop());
}

/// Whoever waits for the rate is let go when the daemon stops, and when it is thrown out.
#[test]
fn nobody_waits_for_a_client_that_is_held_back() {
    let daemon = daemon("bandwidthlimit = 4K");
    let mut clients: Vec<Nbd> = (0..3).map(|_| client(&daemon)).collect();
    // a write that waits before its payload is received, and many reads
    let _ = clients[0].socket().set_write_timeout(Some(Duration::from_millis(200)));
    let _ = clients[0].send(1, 0, 4 << 20, &vec![1; 4 << 20]);
    for client in &mut clients[1..] {
        (0..100).for_each(|_| client.send(READ, 0, 1 << 20, &[]).unwrap());
    }
    // one in pieces, which have begun
    let program = format!(
        "import nbd, sys\nh = nbd.NBD()\nh.connect_uri({:?})\nh.aio_pread(nbd.Buffer(32 << 20), 0)\nprint('on', flush=True)\n\
         while h.aio_in_flight(): h.poll(100)\n",
        daemon.uri("disk")
    );
    let mut python = Command::new("/usr/bin/python3");
    let reader = python.args(["-c", &program]).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::null());
    let mut reader = reader.spawn().unwrap();
    std::io::Read::read_exact(&mut reader.stdout.take().unwrap(), &mut [0; 2]).unwrap();
    // a client that goes by itself is forgotten too
    drop(clients.pop());
    daemon.wait_for("the client that left", || daemon.log().contains("client left"));
    cowgate(&daemon, &["export", "remove", "disk", "--force", "--wait"]);
    change(&daemon, "bandwidthlimit = 4K");
    let mut last = client(&daemon);
    (0..100).for_each(|_| last.send(READ, 0, 1 << 20, &[]).unwrap());
    drop(daemon.stop());
    drop(reader.kill());
    reader.wait().unwrap();
}
