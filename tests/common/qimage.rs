//! Images made with QEMU's tools, and `cowgate image` run on them.

use super::holder::Holder;
use super::qemu;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

/// A directory of images. Commands run in it, so images are named by their file names.
pub struct Bench {
    dir: TempDir,
}

impl Bench {
    /// An empty directory.
    pub fn new() -> Bench {
        Bench { dir: tempfile::tempdir().unwrap() }
    }

    /// A file's path.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs qemu-img with the words of `line`.
    #[track_caller]
    pub fn qemu_img(&self, line: &str) -> String {
        qemu::run(Command::new("qemu-img").current_dir(self.dir.path()).args(words(line)))
    }

    /// Carries out qemu-io commands, separated by `;`, on a QCOW2 image.
    #[track_caller]
    pub fn qemu_io(&self, image: &str, commands: &str) {
        let mut command = Command::new("qemu-io");
        command.current_dir(self.dir.path()).args(["-f", "qcow2"]);
        for one in commands.split(';').map(str::trim).filter(|one| !one.is_empty()) {
            command.args(["-c", one]);
        }
        let out = qemu::run(command.arg(image));
        assert!(!out.contains("failed"), "{commands}: {out}");
    }

    /// `cowgate image` with the words of `line`, ready to run.
    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cowgate"));
        command.current_dir(self.dir.path()).arg("image").args(words(line));
        command
    }

    /// Runs `cowgate image`, which succeeds.
    #[track_caller]
    pub fn cowgate(&self, line: &str) -> String {
        qemu::run(&mut self.command(line))
    }

    /// Runs `cowgate image`, which fails with one message that holds all of `words`.
    #[track_caller]
    pub fn refused(&self, line: &str, words: &[&str]) {
        let out: Output = qemu::output(&mut self.command(line));
        let said = qemu::text(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{line}: {said}");
        assert_eq!(said.lines().count(), 1, "{line}: {said}");
        for word in words {
            assert!(said.contains(word), "{line}: {word:?} is not in {said:?}");
        }
    }

    /// Copies an image.
    pub fn copy(&self, from: &str, to: &str) {
        // QEMU's copies of sparse files stay sparse
        qemu::run(Command::new("cp").args(["--sparse=always"]).arg(self.path(from)).arg(self.path(to)));
    }

    /// Stores an image's guest content as a raw file.
    #[track_caller]
    pub fn content(&self, image: &str, raw: &str) {
        self.qemu_img(&format!("convert -f qcow2 -O raw {image} {raw}"));
    }

    /// An image checks without errors or leaks and has the content of the raw file.
    #[track_caller]
    pub fn is(&self, image: &str, raw: &str) {
        qemu::check(&self.path(image));
        qemu::same_content(&self.path(image), &self.path(raw));
    }

    /// As [`Bench::is`], after a crash: leaks are allowed.
    #[track_caller]
    pub fn is_after_a_crash(&self, image: &str, raw: &str) {
        qemu::check_leaks_allowed(&self.path(image));
        qemu::same_content(&self.path(image), &self.path(raw));
    }

    /// What `qemu-img info` says about an image.
    #[track_caller]
    pub fn info(&self, image: &str) -> serde_json::Value {
        serde_json::from_str(&self.qemu_img(&format!("info --output=json -f qcow2 {image}"))).unwrap()
    }

    /// Kills a command after `milliseconds`; true when it was still running.
    pub fn kill_after(&self, line: &str, milliseconds: u64) -> bool {
        let mut child = self.command(line).arg("--quiet").spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(milliseconds));
        let _ = child.kill();
        !child.wait().unwrap().success()
    }

    /// Opens an image in QEMU for writing until the answer is dropped.
    pub fn hold(&self, image: &str) -> Holder {
        Holder::qemu_io(&["-f", "qcow2"], &self.path(image)).unwrap()
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

/// The words of a line; `''` stands for an empty one.
fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split_whitespace().map(|word| if word == "''" { "" } else { word })
}

/// Feature combinations, as options of `qemu-img create`.
pub const ZOO: &[&str] = &[
    "cluster_size=512",
    "cluster_size=4096,refcount_bits=1",
    "cluster_size=65536",
    "cluster_size=2M,refcount_bits=64",
    "cluster_size=16K,extended_l2=on",
    "cluster_size=1M,extended_l2=on,compression_type=zstd",
    "compat=0.10",
    "compat=0.10,cluster_size=1024",
    "lazy_refcounts=on",
];
