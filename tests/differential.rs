//! Differential test against QEMU: the same random operations on two images of the same features, on one through the
//! daemon over NBD, on the other through `qemu-io`; then with the parts exchanged, so that each continues what the other
//! wrote. After each part both images must hold what a model says, for QEMU, for the daemon and for a third reader,
//! `qemu-img check` must be content with both, and their snapshots must be as they were.
//!
//! The combinations of features are random ones in which every possible pair of features occurs. A failure prints its
//! combination and seed; `COWGATE_SEED=N` replays it, `COWGATE_ROUNDS=N` runs more.

mod common;

use common::daemon::{Daemon, Setup};
use common::features::{self, Backing, DataFile, Features};
use common::operations::{Model, Op, noise};
use common::qemu;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Tests that the combinations are spread over, so that they run at the same time.
const PARTS: usize = 4;
/// Operations of one phase on one image.
const OPS: usize = 60;
/// The images with the same features.
const TWINS: [&str; 2] = ["first", "second"];

/// Two images of the same features in the daemon's directory.
struct Twins {
    features: Features,
    daemon: Daemon,
    /// What both hold.
    model: Model,
    /// What both held when their snapshot was taken.
    before: Option<Model>,
}

impl Twins {
    /// Makes both images with QEMU, in the same way.
    fn new(features: &Features, rng: &mut SmallRng) -> Twins {
        let setup = Setup::new();
        let dir = setup.dir().to_owned();
        std::fs::write(dir.join("noise"), noise()).unwrap();
        let mut model = Model::new(features);
        let size = model.size;
        let below = backing(features, &dir, &model, rng);
        if let Some((_, _, content)) = &below {
            model = content.seen_with_size(size, &model);
        }
        let first: Vec<Op> = match features.compression {
            Some(_) => model.pack(features, rng, 14),
            None => (0..10).map(|_| model.operate(features, rng, false)).collect(),
        };
        let before = features.snapshot.then(|| model.clone());
        let second: Vec<Op> = (0..6).map(|_| model.operate(features, rng, false)).collect();
        for twin in TWINS {
            let below = below.as_ref().map(|(name, format, _)| (Path::new(*name), *format));
            let path = features.create(&dir, twin, size, below);
            qemu_io(&path, "qcow2", &first, &dir);
            if features.snapshot {
                qemu::qemu_img("snapshot -c before", &[&path]);
            }
            qemu_io(&path, "qcow2", &second, &dir);
            let compress = features.compression.map_or(String::new(), |kind| format!("compress = {kind}"));
            setup.export(twin, &path, &compress);
            if features.snapshot {
                setup.export(&format!("{twin}-before"), &path, "snapshot = before");
            }
        }
        Twins { features: features.clone(), daemon: setup.start(), model, before }
    }

    fn path(&self, twin: &str) -> PathBuf {
        self.daemon.dir().join(format!("{twin}.qcow2"))
    }

    /// The same operations on one image through the daemon, on the other through QEMU.
    fn phase(&mut self, through_daemon: &str, through_qemu: &str, rng: &mut SmallRng) {
        // without discards both must be equal; with them each may keep what was discarded or not
        let discards = self.model.discarded || rng.random_bool(0.5);
        let ops: Vec<Op> = (0..OPS).map(|_| self.model.operate(&self.features, rng, discards)).collect();
        let lines = self.daemon.dir().join("operations");
        std::fs::write(&lines, list(&ops)).unwrap();
        self.replay(through_daemon, "replay()");
        self.wait_until_closed(through_daemon);
        qemu_io(&self.path(through_qemu), "qcow2", &ops, self.daemon.dir());
        for twin in TWINS {
            let who = if twin == through_daemon { "the daemon" } else { "QEMU" };
            self.verify(twin)
                .unwrap_or_else(|e| panic!("{}, written by {who}: {e}\n{}", self.path(twin).display(), list(&ops)));
        }
        if !self.model.discarded {
            let [first, second] = TWINS.map(|twin| self.path(twin));
            qemu::qemu_img("compare -f qcow2 -F qcow2", &[&first, &second]);
            if self.features.bitmap {
                assert_eq!(qemu::qemus_bits(&first, "changes"), qemu::qemus_bits(&second, "changes"), "{}", list(&ops));
            }
        }
    }

    /// Runs the client.
    fn replay(&self, export: &str, command: &str) {
        let dir = self.daemon.dir();
        let prelude = format!("operations, noise = {:?}, {:?}\n", dir.join("operations"), dir.join("noise"));
        self.daemon.python(export, &format!("{prelude}{}\n{command}\n", include_str!("clients/replay.py")));
    }

    /// Waits until the daemon has let go of an image, so that QEMU may have it.
    fn wait_until_closed(&self, twin: &str) {
        let locked = || {
            let mut probe = Command::new("qemu-io");
            let out = qemu::output(probe.args(["-f", "qcow2", "-c", "flush"]).arg(self.path(twin)));
            qemu::text(&out.stderr).contains("lock")
        };
        self.daemon.wait_for("the image to be closed", || !locked());
    }

    fn verify(&self, twin: &str) -> Result<(), String> {
        let (path, dir) = (self.path(twin), self.daemon.dir());
        let (code, said) = qemu::checked_by_both(&path);
        if code != Some(0) {
            return Err(said);
        }
        let raw = dir.join("raw");
        qemu::qemu_img("convert -f qcow2 -O raw", &[&path, &raw]);
        self.model.matches_raw(&raw).map_err(|e| format!("read by QEMU: {e}"))?;
        if let Some(before) = &self.before {
            qemu::qemu_img("convert -f qcow2 -O raw -l before", &[&path, &raw]);
            before.matches_raw(&raw).map_err(|e| format!("its snapshot: {e}"))?;
            self.replay(&format!("{twin}-before"), &format!("dump({raw:?}, {})", before.python_windows()));
            let read = std::fs::read(&raw).unwrap();
            before.matches_windows(&read).map_err(|e| format!("its snapshot through the daemon: {e}"))?;
            self.wait_until_closed(twin);
        }
        if self.features.data_file == DataFile::Raw {
            let data = dir.join(format!("{twin}.data"));
            self.model.matches_raw(&data).map_err(|e| format!("its data file: {e}"))?;
        }
        if self.features.bitmap {
            let listed = &qemu::qemus_list(&path)[0];
            if listed["flags"] != serde_json::json!(["auto"]) {
                return Err(format!("its bitmap is {listed}"));
            }
            self.model.covered_by(&qemu::qemus_bits(&path, "changes")).map_err(|e| format!("its bitmap: {e}"))?;
        }
        self.replay(twin, &format!("dump({raw:?}, {})", self.model.python_windows()));
        let read = std::fs::read(&raw).unwrap();
        self.model.matches_windows(&read).map_err(|e| format!("read through the daemon: {e}"))?;
        self.wait_until_closed(twin);
        if third_reader_can(&self.features) {
            self.model.matches_windows(&third_reader(&path, &self.model)).map_err(|e| format!("third reader: {e}"))?;
        }
        Ok(())
    }
}

/// Makes what lies below the images: name, format and content.
fn backing(
    features: &Features,
    dir: &Path,
    model: &Model,
    rng: &mut SmallRng,
) -> Option<(&'static str, &'static str, Model)> {
    let (name, format, mut content) = match features.backing {
        Backing::None => return None,
        Backing::ShortRaw => {
            let window = &model.windows[rng.random_range(0..model.windows.len())];
            let size = window.start + rng.random_range(1..window.bytes.len() as u64 / 512) * 512;
            std::fs::File::create(dir.join("below.raw")).unwrap().set_len(size).unwrap();
            ("below.raw", "raw", model.shortened(size))
        }
        Backing::LongQcow2 => {
            let size = model.size + (1 << 20);
            let path = Features::PLAIN.create(dir, "below", size, None);
            let behind = Op { kind: common::operations::Kind::Fill(7), at: model.size, len: 100_000, fua: false };
            qemu_io(&path, "qcow2", &[behind], dir);
            ("below.qcow2", "qcow2", model.clone())
        }
    };
    let ops: Vec<Op> = (0..12).map(|_| content.operate(features, rng, false)).collect();
    qemu_io(&dir.join(name), format, &ops, dir);
    Some((name, format, content))
}

fn list(ops: &[Op]) -> String {
    ops.iter().map(Op::line).collect()
}

/// Operations through qemu-io.
#[track_caller]
fn qemu_io(path: &Path, format: &str, ops: &[Op], dir: &Path) {
    let mut command = Command::new("qemu-io");
    command.args(["-d", "unmap", "-f", format]);
    for op in ops {
        command.args(["-c", &op.for_qemu_io(&dir.join("noise"))]);
    }
    let said = qemu::run(command.arg(path));
    assert!(!said.contains("failed"), "{command:?}: {said}");
}

/// Whether qcow2-rs, which has its limits, reads such images.
fn third_reader_can(features: &Features) -> bool {
    (12..=16).contains(&features.cluster_bits)
        && !features.extended_l2
        && features.data_file == DataFile::None
        && features.compression != Some("zstd")
        && features.backing == Backing::None
}

/// The windows as qcow2-rs reads them.
fn third_reader(image: &Path, model: &Model) -> Vec<u8> {
    use qcow2_rs::{dev::Qcow2DevParams, helpers::Qcow2IoBuf, utils::qcow2_setup_dev_sync};
    // behind the end of a file it finds what its buffer held before, and not the zeroes that everybody else finds
    let path = &image.with_extension("padded");
    std::fs::copy(image, path).unwrap();
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len().next_multiple_of(1 << 16)).unwrap();
    let params = Qcow2DevParams::new(9, None, None, true, false);
    let disk = qcow2_setup_dev_sync(path, &params).unwrap_or_else(|e| panic!("qcow2-rs, {}: {e:?}", path.display()));
    let mut found = Vec::new();
    futures_util::future::FutureExt::now_or_never(async {
        disk.qcow2_prep_io().await.unwrap();
        for window in &model.windows {
            let mut buf = Qcow2IoBuf::<u8>::new(window.bytes.len());
            disk.read_at(&mut buf, window.start).await.unwrap();
            found.extend_from_slice(&buf);
        }
    })
    .expect("plain system calls do not wait");
    found
}

fn run(features: &Features, seed: u64) {
    println!("{features}: seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut twins = Twins::new(features, &mut rng);
    twins.phase(TWINS[0], TWINS[1], &mut rng);
    twins.phase(TWINS[1], TWINS[0], &mut rng);
    let (_dir, log) = twins.daemon.stop();
    assert!(!log.contains("ERROR") && !log.contains("panicked"), "{log}");
}

/// One seed for all parts, so that together they run all of a design, also when each is a process of its own.
fn seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    if let Ok(fixed) = std::env::var("COWGATE_SEED") {
        return fixed.parse().expect("COWGATE_SEED is a number");
    }
    if let Ok(run) = std::env::var("NEXTEST_RUN_ID") {
        let mut hasher = DefaultHasher::new();
        run.hash(&mut hasher);
        return hasher.finish() >> 16;
    }
    *SEED.get_or_init(|| rand::random::<u64>() >> 16)
}

/// Runs one part of the combinations.
fn run_part(part: usize) {
    let rounds: u64 = std::env::var("COWGATE_ROUNDS").map_or(1, |s| s.parse().expect("COWGATE_ROUNDS is a number"));
    let first = seed();
    for seed in first..first + rounds {
        let design = features::covering(&mut SmallRng::seed_from_u64(seed));
        println!("seed {seed}: {} combinations", design.len());
        for features in design.iter().skip(part).step_by(PARTS) {
            run(features, seed);
        }
    }
}

#[test]
fn twins_part_1() {
    run_part(0);
}

#[test]
fn twins_part_2() {
    run_part(1);
}

#[test]
fn twins_part_3() {
    run_part(2);
}

#[test]
fn twins_part_4() {
    run_part(3);
}

/// What the combinations are for: every two values that can meet do meet.
#[test]
fn every_pair_is_in_the_design() {
    let design = features::covering(&mut SmallRng::seed_from_u64(seed()));
    assert!(design.iter().all(Features::valid));
    for one in features::all() {
        for pair in one.pairs() {
            assert!(design.iter().any(|f| f.pairs().any(|p| p == pair)), "{one}: {pair:?}");
        }
    }
}
