//! The command's end of the background process: starts it, tells it what to be, and lets it go.
//!
//! Dropped before it was told to go on alone, the process ends and leaves nothing; that is waited for.

use super::disk::Disk;
use super::end;
use super::serve::{Answer, Mounted, Order};
use super::source::Source;
use super::state::{self, Entry};
use std::env;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use tracing::warn;

/// What follows the subcommand `restore` on the command line of the background process; its directory follows.
pub const HIDDEN: [&str; 2] = ["serve", "--dir"];
/// How much of the log is told when the process dies without a word, in bytes from its end.
const LAST_WORDS: usize = 2000;

/// A background process that has not been let go.
pub struct Backend {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    directory: PathBuf,
    kept: bool,
}

/// A block device that it serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Which.
    pub disk: Disk,
    /// Size in bytes.
    pub size_bytes: u64,
}

impl Backend {
    /// Starts it for a restore whose directory was made.
    pub fn start(directory: &Path) -> Result<Backend, String> {
        let failed = |e| format!("cannot start the background process: {e}");
        let log = OpenOptions::new().append(true).create(true).mode(0o600).open(state::log(directory));
        let name = env::args_os().next().unwrap_or_else(|| "cowgate".into());
        let mut command = Command::new("/proc/self/exe");
        command.arg0(name).arg("restore").args(HIDDEN).arg(directory);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log.map_err(failed)?);
        let mut child = command.spawn().map_err(failed)?;
        let (Some(orders), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("cannot start the background process: it has no pipes".to_owned());
        };
        let (directory, answers) = (directory.to_owned(), BufReader::new(answers));
        Ok(Backend { child, orders: Some(orders), answers, directory, kept: false })
    }

    /// Has it be a block device, and no other any more. `window`: a part of the image; `layer`: it can be written, to a
    /// temporary layer.
    pub fn show(&mut self, source: &Source, window: Option<(u64, u64)>, layer: bool) -> Result<Shown, String> {
        match self.ask(&Order::Show { source: source.clone(), window, layer })? {
            Answer::Device { disk, size_bytes } => Ok(Shown { disk, size_bytes }),
            Answer::Failed(why) => Err(why),
            Answer::Kept(_) => Err("the background process answers something else".to_owned()),
        }
    }

    /// It is mounted: has the process go on alone. What is known of the restore from then on.
    pub fn keep(mut self, mounted: Mounted) -> Result<Entry, String> {
        match self.ask(&Order::Keep(mounted))? {
            Answer::Kept(entry) => {
                self.kept = true;
                Ok(*entry)
            }
            Answer::Failed(why) => Err(why),
            Answer::Device { .. } => Err("the background process answers something else".to_owned()),
        }
    }

    fn ask(&mut self, order: &Order) -> Result<Answer, String> {
        let text = serde_json::to_string(order).map_err(|e| e.to_string())? + "\n";
        let sent = self.orders.as_mut().map(|orders| orders.write_all(text.as_bytes()));
        let mut line = String::new();
        if matches!(sent, Some(Ok(()))) {
            let _ = self.answers.read_line(&mut line); // no answer is no answer, however it comes
        }
        serde_json::from_str(&line).map_err(|_| self.last_words())
    }

    fn last_words(&self) -> String {
        let log = fs::read(state::log(&self.directory)).unwrap_or_default();
        let end = String::from_utf8_lossy(&log[log.len().saturating_sub(LAST_WORDS)..]);
        format!("the background process has died; its log ends:\n{}", end.trim_end())
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        self.orders = None;
        let ended = self.child.wait().map_err(|e| format!("the background process cannot be waited for: {e}"));
        // it does so itself, unless it was killed
        let id = self.directory.file_name().unwrap_or_default().to_string_lossy();
        if let Err(e) = ended.and_then(|_| end::clean_up(&id)) {
            warn!("{e}");
        }
    }
}
