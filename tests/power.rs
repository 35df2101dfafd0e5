//! The real daemon, killed without warning at random moments under mixed load on many exports at once, again and again
//! on the same images. Each time `qemu-img check` must find no errors (leaked clusters are allowed), QEMU must read
//! everything that was acknowledged before an acknowledged flush, snapshots must be as they were, bitmaps that were being
//! written must not pass for good, and a new daemon must serve what QEMU reads.
//!
//! A failure prints its seed; `COWGATE_SEED=N` replays its decisions (not its timing), `COWGATE_ROUNDS=N` runs more rounds.

mod common;

use common::daemon::Setup;
use common::features::{Backing, DataFile, Features};
use common::qemu;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// Rounds when nobody asks for more.
const ROUNDS: u64 = 12;

/// An image that ages over the rounds.
struct Subject {
    name: &'static str,
    features: Features,
    size: u64,
    /// Further lines for the export's section.
    export: &'static str,
    /// Made anew every so many rounds, because its structures stop growing when all is allocated.
    renewed: Option<u64>,
}

fn subjects() -> Vec<Subject> {
    let of = |name, features, size| Subject { name, features, size, export: "", renewed: None };
    let plain = Features::PLAIN;
    vec![
        of("plain", plain.clone(), 8 << 20),
        of("old", Features { version: 2, cluster_bits: 10, ..plain.clone() }, 2 << 20),
        of("chain", Features { cluster_bits: 12, backing: Backing::LongQcow2, ..plain.clone() }, (6 << 20) + 512),
        of(
            "subclusters",
            Features { extended_l2: true, backing: Backing::ShortRaw, bitmap: true, ..plain.clone() },
            8 << 20,
        ),
        Subject {
            renewed: Some(3),
            ..of("growing", Features { cluster_bits: 9, refcount_bits: 64, ..plain.clone() }, 6 << 20)
        },
        Subject {
            renewed: Some(5),
            ..of("narrow", Features { cluster_bits: 12, refcount_bits: 1, ..plain.clone() }, 16 << 20)
        },
        Subject {
            renewed: Some(7),
            ..of("snapshot", Features { cluster_bits: 12, snapshot: true, ..plain.clone() }, 4 << 20)
        },
        of(
            "snapshot-subclusters",
            Features { extended_l2: true, snapshot: true, cluster_bits: 14, ..plain.clone() },
            4 << 20,
        ),
        of("data", Features { data_file: DataFile::Plain, ..plain.clone() }, 4 << 20),
        of("raw-data", Features { data_file: DataFile::Raw, cluster_bits: 12, ..plain.clone() }, 4 << 20),
        of("bitmap", Features { bitmap: true, ..plain.clone() }, 8 << 20),
        Subject {
            export: "compress = zstd",
            renewed: Some(4),
            ..of("packed", Features { compression: Some("zstd"), ..plain.clone() }, 8 << 20)
        },
        Subject {
            export: "compress = zlib",
            renewed: Some(6),
            ..of("packed-small", Features { compression: Some("zlib"), cluster_bits: 12, ..plain }, 4 << 20)
        },
    ]
}

impl Subject {
    fn path(&self, dir: &Path) -> PathBuf {
        dir.join(format!("{}.qcow2", self.name))
    }

    /// Makes the image and what lies below it.
    fn make(&self, dir: &Path) {
        let write = |path: &Path, format: &str, commands: &[String]| {
            let mut io = Command::new("qemu-io");
            io.args(["-f", format]);
            commands.iter().for_each(|c| {
                io.args(["-c", c]);
            });
            qemu::run(io.arg(path));
        };
        let (raw, middle) = (dir.join(format!("{}.below.raw", self.name)), format!("{}-below", self.name));
        let below = match self.features.backing {
            Backing::None => None,
            _ => {
                std::fs::File::create(&raw).unwrap().set_len(self.size * 3 / 4 / 512 * 512).unwrap();
                write(&raw, "raw", &[format!("write -P 17 70000 {}", self.size / 2)]);
                Some((raw, "raw"))
            }
        };
        let below = match (below, self.features.backing) {
            (Some((raw, _)), Backing::LongQcow2) => {
                let name = raw.file_name().unwrap();
                let path = Features::PLAIN.create(dir, &middle, self.size * 2, Some((Path::new(name), "raw")));
                write(&path, "qcow2", &[format!("write -P 19 {} {}", self.size / 3, self.size / 2)]);
                Some((path, "qcow2"))
            }
            (below, _) => below,
        };
        let below = below.as_ref().map(|(path, format)| (Path::new(path.file_name().unwrap()), *format));
        let path = self.features.create(dir, self.name, self.size, below);
        if self.features.snapshot {
            write(&path, "qcow2", &[format!("write -P 23 4000 {}", self.size / 2)]);
            qemu::qemu_img("snapshot -c kept", &[&path]);
        }
    }

    /// QEMU's verdict on the image, and ours: no errors.
    fn check(&self, dir: &Path) -> Result<(), String> {
        match qemu::checked_by_both(&self.path(dir)) {
            (Some(0 | 3), _) => Ok(()),
            (_, said) => Err(format!("{}: {said}", self.name)),
        }
    }

    /// The disk, or its snapshot, as QEMU reads it.
    fn copy(&self, dir: &Path, snapshot: bool) -> PathBuf {
        let to = dir.join(format!("{}.copy", self.name));
        let what = if snapshot { "convert -f qcow2 -O raw -l kept" } else { "convert -f qcow2 -O raw" };
        qemu::qemu_img(what, &[&self.path(dir), &to]);
        to
    }
}

/// The program that loads the exports and remembers what was acknowledged.
struct Recorder {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Recorder {
    fn start(socket: &Path, seed: u64, lie: bool, subjects: &[Subject]) -> Recorder {
        let mut command = Command::new("/usr/bin/python3");
        command.args(["-c", include_str!("clients/recorder.py")]).arg(socket).arg(seed.to_string());
        command.args(lie.then_some("lie")).args(subjects.iter().map(|s| s.name));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Recorder { child, input, output }
    }

    /// One line, which must begin with this word.
    fn hear(&mut self, word: &str) -> Result<String, String> {
        let mut line = String::new();
        self.output.read_line(&mut line).map_err(|e| e.to_string())?;
        if line.starts_with(word) { Ok(line) } else { Err(format!("the recorder says {line:?} instead of {word}")) }
    }

    fn say(&mut self, line: &str) {
        // when it is gone, `hear` tells
        let _ = writeln!(self.input, "{line}");
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Figures of a campaign.
#[derive(Default, Debug)]
struct Figures {
    rounds: u64,
    requests: u64,
    flushes: u64,
    bitmaps_in_use: u64,
}

/// What is known about an image besides what the recorder knows.
#[derive(Clone, Default)]
struct State {
    /// What the snapshot holds.
    snapshot: Vec<u8>,
    /// What the disk held before the round.
    content: Vec<u8>,
    /// A crash left its bitmap in use.
    stale_bitmap: bool,
}

/// Runs a campaign. With `lie` the recorder believes in flushes that never happened.
fn campaign(subjects: &[Subject], rounds: u64, seed: u64, lie: bool) -> Result<Figures, String> {
    println!("seed {seed}, {rounds} rounds");
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut figures = Figures::default();
    let mut setup = Setup::new();
    let dir = setup.dir().to_owned();
    let mut recorder = Recorder::start(&dir.join("nbd.sock"), seed, lie, subjects);
    let mut state = vec![State::default(); subjects.len()];
    for round in 0..rounds {
        for (subject, state) in subjects.iter().zip(&mut state) {
            if round == 0 || subject.renewed.is_some_and(|every| round % every == 0) {
                let _ = std::fs::remove_file(subject.path(&dir));
                subject.make(&dir);
                let copy = subject.copy(&dir, false);
                let content = std::fs::read(&copy).unwrap();
                *state = State { snapshot: content.clone(), content, stale_bitmap: false };
                setup.export(subject.name, &subject.path(&dir), subject.export);
                recorder.say(&format!("fresh {} {}", subject.name, copy.display()));
                recorder.hear("fresh")?;
            }
        }
        let daemon = setup.start();
        recorder.say("load");
        recorder.hear("on").map_err(|e| format!("{e}; the daemon says:\n{}", daemon.log()))?;
        std::thread::sleep(Duration::from_millis(rng.random_range(20..700)));
        let log = daemon.log();
        healthy(&log, subjects.len()).map_err(|e| format!("round {round}: {e}; the daemon said:\n{log}"))?;
        setup = Setup::again(daemon.kill());
        let dead = recorder.hear("dead").map_err(|e| format!("round {round}: {e}; the daemon said:\n{log}"))?;
        let counts: Vec<u64> = dead.split_whitespace().skip(1).map(|n| n.parse().unwrap()).collect();
        figures.rounds += 1;
        figures.requests += counts[0];
        figures.flushes += counts[1];
        for (subject, state) in subjects.iter().zip(&mut state) {
            if state.stale_bitmap && !log.contains(&format!("{}.qcow2: bitmap \"changes\" is not used", subject.name)) {
                return Err(format!("round {round}: {}: nothing says that its bitmap is no good", subject.name));
            }
            figures.bitmaps_in_use += u64::from(state.stale_bitmap);
            examine(subject, &dir, state, &mut recorder)
                .map_err(|e| format!("round {round}: {e}; the daemon said:\n{log}"))?;
        }
    }
    Ok(figures)
}

/// The daemon did nothing that it would not do on a good day, up to the moment it was killed.
fn healthy(log: &str, exports: usize) -> Result<(), String> {
    if log.contains("panicked") || log.contains("ERROR") {
        return Err("it complained".to_owned());
    }
    // one client compares each export before the load, and none of the others is sent away
    match log.matches("client left").count() {
        left if left > exports => Err(format!("{left} clients left instead of {exports}")),
        _ => Ok(()),
    }
}

/// What a crash left of an image.
fn examine(subject: &Subject, dir: &Path, state: &mut State, recorder: &mut Recorder) -> Result<(), String> {
    subject.check(dir)?;
    if subject.features.snapshot && std::fs::read(subject.copy(dir, true)).unwrap() != state.snapshot {
        return Err(format!("{}: the snapshot changed", subject.name));
    }
    let copy = subject.copy(dir, false);
    if subject.features.data_file == DataFile::Raw {
        let data = dir.join(format!("{}.data", subject.name));
        recorder.say(&format!("check {} {}", subject.name, data.display()));
        recorder.hear("checked")?;
    }
    recorder.say(&format!("verify {} {}", subject.name, copy.display()));
    recorder.hear("verified")?;
    let content = std::fs::read(copy).unwrap();
    if subject.features.bitmap {
        let image = subject.path(dir);
        let flags = &qemu::qemus_list(&image)[0]["flags"];
        let in_use = *flags == serde_json::json!(["in-use", "auto"]);
        if !in_use && content != state.content {
            return Err(format!("{}: its bitmap passes for good: {flags}", subject.name));
        }
        if in_use && state.stale_bitmap {
            qemu::qemu_img("bitmap --remove -f qcow2", &[&image, Path::new("changes")]);
            qemu::qemu_img("bitmap --add -f qcow2", &[&image, Path::new("changes")]);
        }
        state.stale_bitmap = in_use && !state.stale_bitmap;
    }
    state.content = content;
    Ok(())
}

fn seed() -> u64 {
    let fixed = std::env::var("COWGATE_SEED").ok().map(|s| s.parse().expect("COWGATE_SEED is a number"));
    fixed.unwrap_or_else(|| rand::random::<u64>() >> 16)
}

#[test]
fn killed_at_any_moment() {
    let rounds = std::env::var("COWGATE_ROUNDS").map_or(ROUNDS, |s| s.parse().expect("COWGATE_ROUNDS is a number"));
    let figures = campaign(&subjects(), rounds, seed(), false).unwrap_or_else(|e| panic!("{e}"));
    println!("{figures:?}");
    assert!(figures.requests > figures.rounds * 100 && figures.flushes > figures.rounds * 5, "{figures:?}");
}

/// The control: who believes in flushes that never happened must be found wrong.
#[test]
fn a_believed_flush_is_caught() {
    let subjects: Vec<Subject> = subjects().into_iter().take(3).collect();
    let found = campaign(&subjects, 20, seed(), true).expect_err("twenty rounds without a flush lose something");
    assert!(found.contains("flushed was"), "{found}");
}

/// What was zeroed and then written again must not read one way through the image and another way in a raw data file.
#[test]
fn a_raw_data_file_reads_as_the_disk_at_any_moment() {
    let setup = Setup::new();
    let features = Features { data_file: DataFile::Raw, ..Features::PLAIN };
    let image = features.create(setup.dir(), "image", 4 << 20, None);
    setup.export("image", &image, "");
    let daemon = setup.start();
    daemon.python(
        "image",
        "h.pwrite(b'a' * (1 << 20), 0)\nh.zero(1 << 20, 0)\nh.trim(1 << 20, 1 << 20)\nh.zero(1 << 18, 0, nbd.CMD_FLAG_NO_HOLE)\n\
         h.flush()\nh.pwrite(b'b' * 500000, 1000)\nh.pwrite(b'c' * 500000, (1 << 20) + 1000)\n\
         os.kill(PID, 9)\n"
            .replace("PID", &daemon.pid().to_string())
            .as_str(),
    );
    let dir = daemon.kill();
    qemu::check_leaks_allowed(&image);
    qemu::same_content(&image, &dir.path().join("image.data"));
}
