//! Many clients work on and verify what they read while the configuration changes under them again and again.

mod common;

use common::daemon::{Daemon, Setup, write_export};
use common::nbd::Nbd;
use common::qemu;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

const RELOADS: u32 = 2000;
/// Reloads after which the daemon has all the memory it wants.
const WARM: u32 = 200;
/// Exports that come and go.
const NAMES: u32 = 60;
/// Growth that is no leak: the allocator's arenas and the log's buffers, in bytes.
const SLACK: u64 = 4 << 20;

#[test]
fn twenty_clients_see_nothing_of_two_thousand_reloads() {
    let seed = std::env::var("COWGATE_SEED").map_or(1, |seed| seed.parse().unwrap());
    println!("COWGATE_SEED={seed}");
    let setup = Setup::new();
    let dir = setup.dir().to_owned();
    let base = setup.image("base.qcow2", "", "64M");
    let overlay = setup.image("overlay.qcow2", &format!("backing_file={},backing_fmt=qcow2", base.display()), "64M");
    let plain = setup.image("plain.qcow2", "cluster_size=4096", "64M");
    let raw = dir.join("disk.raw");
    File::create(&raw).unwrap().set_len(64 << 20).unwrap();
    for (name, image) in [("steady0", &overlay), ("steady1", &plain), ("steady2", &raw)] {
        setup.export(name, image, "");
    }
    let others: Vec<PathBuf> = (0..4).map(|i| setup.image(&format!("other{i}.qcow2"), "", "16M")).collect();
    let daemon = setup.start();
    let mut clients = Command::new("/usr/bin/python3")
        .args(["-c", TWENTY, &daemon.uri("steady")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(clients.stdout.take().unwrap()).lines();
    assert_eq!(said.next().unwrap().unwrap(), "on");

    let mut dice = SmallRng::seed_from_u64(seed);
    let mut churn = Churn { others, served: BTreeSet::new() };
    let mut warm = (0, 0);
    for round in 0..RELOADS {
        if round == WARM {
            warm = (fewest_descriptors(&daemon), daemon.resident_bytes());
        }
        let before: Vec<String> = churn.served.iter().cloned().collect();
        for _ in 0..dice.random_range(1..4) {
            churn.change_a_file(&daemon, &before, &mut dice);
        }
        daemon.reload();
        churn.compare(&daemon, &mut dice);
    }
    let (descriptors, bytes) = (fewest_descriptors(&daemon), daemon.resident_bytes());
    println!("descriptors {} -> {descriptors}, memory {} -> {bytes}", warm.0, warm.1);
    assert_eq!(descriptors, warm.0);
    assert!(bytes < warm.1 + SLACK, "{} bytes after {WARM} reloads, {bytes} after {RELOADS}", warm.1);

    assert!(clients.try_wait().unwrap().is_none(), "the clients still run");
    drop(clients.stdin.take()); // they verify everything once more and leave
    let rounds: Vec<u64> = said.next().unwrap().unwrap().split(' ').map(|n| n.parse().unwrap()).collect();
    println!("rounds of the clients: {rounds:?}");
    assert!(clients.wait().unwrap().success());
    assert!(rounds.len() == 20 && rounds.iter().all(|&n| n > 0));
    let (_dir, _) = daemon.stop();
    qemu::check(&overlay);
    qemu::check(&plain);
}

/// Descriptors without those of clients that have just left.
fn fewest_descriptors(daemon: &Daemon) -> usize {
    let sample = |_| {
        std::thread::sleep(Duration::from_millis(10));
        daemon.descriptors()
    };
    (0..20).map(sample).min().unwrap()
}

/// The exports that come and go, as they must be served.
struct Churn {
    others: Vec<PathBuf>,
    served: BTreeSet<String>,
}

impl Churn {
    fn change_a_file(&mut self, daemon: &Daemon, before: &[String], dice: &mut SmallRng) {
        let name = format!("x{:02}", dice.random_range(0..NAMES));
        let file = daemon.dir().join("conf.d").join(format!("{name}.conf"));
        match dice.random_range(0..10) {
            0..4 => {
                let _ = std::fs::remove_file(&file);
                self.served.remove(&name);
            }
            // a bad file changes nothing of what it defined
            4 if before.contains(&name) => {
                std::fs::write(&file, format!("[{name}]\nreadonly = no\n")).unwrap();
                // long ago: it does not look half-written
                let old = SystemTime::now() - Duration::from_secs(60);
                File::options().write(true).open(&file).unwrap().set_modified(old).unwrap();
                self.served.insert(name);
            }
            _ => {
                let read_only: bool = dice.random();
                let image = &self.others[dice.random_range(0..self.others.len())];
                write_export(daemon.dir(), &name, image, &format!("readonly = {read_only}"));
                self.served.insert(name);
            }
        }
    }

    /// Exactly the exports of this generation are there, and a new client gets what it should.
    fn compare(&self, daemon: &Daemon, dice: &mut SmallRng) {
        let mut nbd = Nbd::connect(&daemon.socket());
        let steady = (0..3).map(|i| format!("steady{i}"));
        let expected: Vec<String> = steady.chain(self.served.iter().cloned()).collect();
        assert_eq!(nbd.list(), expected);
        let name = format!("x{:02}", dice.random_range(0..NAMES));
        let got = nbd.go(&name);
        assert_eq!(got.is_ok(), self.served.contains(&name), "{name}: {got:?}\n{}", daemon.log());
    }
}

/// Twenty connections, each with a part of an export for itself: they write it and read it back until standard input
/// ends, verify all of it, and say how many rounds each did.
const TWENTY: &str = r#"
import nbd, random, sys, threading
PART = 8 << 20
stop = threading.Event()
ready = threading.Barrier(21)
rounds = [0] * 20
failed = []

def work(i):
    try:
        dice = random.Random(i)
        model = bytearray(PART)
        h = nbd.NBD()
        h.connect_uri(sys.argv[1].replace('steady', 'steady%d' % (i % 3)))
        base = i // 3 * PART
        h.pwrite(model, base)
        ready.wait()
        while not stop.is_set():
            at = dice.randrange(PART)
            length = dice.randrange(1, min(PART - at, dice.choice((700, 100000))) + 1)
            data = dice.randbytes(length)
            h.pwrite(data, base + at)
            model[at:at + length] = data
            at = dice.randrange(PART)
            length = min(PART - at, 50000)
            assert h.pread(length, base + at) == model[at:at + length], (i, at, length)
            if rounds[i] % 16 == 0:
                h.flush()
            rounds[i] += 1
        assert h.pread(PART, base) == model
        h.shutdown()
    except BaseException as e:
        failed.append((i, e))
        ready.abort()
        raise

threads = [threading.Thread(target=work, args=(i,)) for i in range(20)]
for t in threads:
    t.start()
ready.wait()
print('on', flush=True)
sys.stdin.read()
stop.set()
for t in threads:
    t.join()
print(*rounds, flush=True)
sys.exit(1 if failed else 0)
"#;
