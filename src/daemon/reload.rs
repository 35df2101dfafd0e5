//! Reading the configuration at start and again on SIGHUP: what is applied, what is said, when to look once more.
//!
//! A control plane may signal while it still writes a file. So a reload is a series of passes: each applies what is
//! complete. While a file looks half-written, another pass follows shortly; while one has just changed, it is looked at
//! again in growing intervals and read again if it has changed once more. Called by the daemon, which does the waiting
//! and hands the plans to the registry.

use crate::export::config::{ExportConfig, ServerConfig};
use crate::export::load::{self, Loaded, Stamps};
use crate::export::plan::{Plan, plan};
use crate::export::problem::{Problem, Severity};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tracing::{debug, error, info, warn};

/// Time until the next pass while a file looks half-written.
const PAUSE: Duration = Duration::from_millis(100);
/// Most passes of one reload, so that a file that is written all the time cannot keep it going: 5 s.
const MAX_PASSES: u32 = 50;

/// The state of the configuration as served.
#[derive(Debug)]
pub struct Reload {
    base: PathBuf,
    /// The settings the daemon was started with; only a restart changes them.
    started_with: ServerConfig,
    applied: Vec<ExportConfig>,
    stamps: Stamps,
    /// Files of the last pass that had just changed.
    recent: Stamps,
    /// Files of the last pass looked half-written.
    unsettled: bool,
    /// Counts reloads; the start is 1.
    generation: u64,
    passes: u32,
    /// What was logged about this reload, so that its later passes do not repeat it.
    said: HashSet<String>,
    /// What its passes changed and was not logged yet: added, changed, removed.
    counts: [usize; 3],
    /// Its counts were logged once.
    counted: bool,
    /// What is served, in a line, after the last pass that concluded a reload.
    status: String,
    /// That was not asked for yet.
    concluded: bool,
}

/// What one pass found.
#[derive(Debug)]
pub struct Pass {
    /// To be carried out by the registry.
    pub plan: Plan,
    /// Another pass is needed after this time.
    pub again: Option<Duration>,
}

impl Reload {
    /// Reads the configuration for a start, logging its problems.
    ///
    /// `Err`, with a message for people: the base file cannot be relied on.
    pub fn start(base: &Path) -> Result<(Reload, ServerConfig, Pass), String> {
        let loaded = load::load(base);
        let Some(server) = loaded.server.clone() else {
            let errors = loaded.problems.iter().filter(|p| p.severity == Severity::Error);
            let lines: Vec<String> = errors.map(|p| format!("\n  {p}")).collect();
            return Err(format!("cannot start with this configuration:{}", lines.concat()));
        };
        let mut reload = Reload {
            base: base.to_owned(),
            started_with: server.clone(),
            applied: Vec::new(),
            stamps: Stamps::new(),
            recent: Stamps::new(),
            unsettled: false,
            generation: 1,
            passes: 0,
            said: HashSet::new(),
            counts: [0; 3],
            counted: false,
            status: String::new(),
            concluded: false,
        };
        let pass = reload.take(loaded);
        // the start itself says so
        reload.concluded = false;
        Ok((reload, server, pass))
    }

    /// What is served, for people, in a line.
    pub fn status(&self) -> String {
        format!("{} exports{}", self.applied.len(), self.status)
    }

    /// The status, if a reload was concluded since this was last asked.
    pub fn concluded(&mut self) -> Option<String> {
        std::mem::take(&mut self.concluded).then(|| self.status())
    }

    /// Begins a new reload: the next pass counts as the first.
    pub fn begin(&mut self) {
        self.generation += 1;
        self.passes = 0;
        self.said.clear();
        self.counts = [0; 3];
        self.counted = false;
    }

    /// One pass: reads everything again and compares it with what is served.
    pub fn pass(&mut self) -> Pass {
        if self.passes > 0 && !self.unsettled && load::unchanged(&self.recent) {
            self.passes += 1;
            return Pass { plan: Plan::default(), again: self.next_pause() };
        }
        let loaded = load::load_again(&self.base, &self.stamps);
        self.take(loaded)
    }

    fn take(&mut self, mut loaded: Loaded) -> Pass {
        self.passes += 1;
        let plan = plan(&self.applied, &loaded);
        self.applied = plan.applied();
        self.unsettled = !loaded.unstable.is_empty();
        self.recent = std::mem::take(&mut loaded.recent);
        self.stamps = std::mem::take(&mut loaded.stamps);
        let again = self.next_pause();
        self.say(&loaded, &plan, again.is_none() || !self.unsettled);
        Pass { plan, again }
    }

    fn next_pause(&self) -> Option<Duration> {
        if self.passes >= MAX_PASSES {
            None
        } else if self.unsettled {
            Some(PAUSE)
        } else {
            // 100, 200, 400, 800 ms: by then the files are no longer fresh
            load::any_fresh(&self.recent).then(|| PAUSE * 2_u32.pow((self.passes - 1).min(3)))
        }
    }

    /// Logs what is new. `last`: no pass will follow because of half-written files.
    fn say(&mut self, loaded: &Loaded, plan: &Plan, last: bool) {
        let generation = self.generation;
        for problem in loaded.problems.iter().chain(&plan.problems) {
            // what a half-written file seems to say is not worth a line
            if !last && loaded.unstable.contains(&problem.file) {
                debug!("configuration {generation}, not settled yet: {problem}");
            } else if self.said.insert(problem.to_string()) {
                log(generation, problem);
            }
        }
        for file in &loaded.unstable {
            let file = file.display();
            if last {
                warn!(
                    "configuration {generation}: {file} is still being written; its exports stay as they were; signal \
                     again when it is complete"
                );
            } else if self.said.insert(format!("incomplete {file}")) {
                info!("configuration {generation}: {file} seems to be half-written; reading it again shortly");
            }
        }
        if let Some(server) = &loaded.server {
            for key in self.started_with.needs_restart(server) {
                let line = format!("configuration {generation}: {key} has changed; this needs a restart");
                if self.said.insert(line.clone()) {
                    warn!("{line}");
                }
            }
        }
        for (count, new) in self.counts.iter_mut().zip([plan.add.len(), plan.change.len(), plan.remove.len()]) {
            *count += new;
        }
        // the line that control planes may wait for: once a reload, and again if a file has changed once more
        if last && (!self.counted || !plan.is_empty()) {
            let [added, changed, removed] = std::mem::take(&mut self.counts);
            let total = self.applied.len();
            match &loaded.server {
                None => info!("configuration {generation} not reloaded because of the errors above: {total} exports"),
                Some(_) if generation == 1 && !self.counted => info!("configuration 1 loaded: {total} exports"),
                Some(_) => info!(
                    "configuration {generation} reloaded: {added} added, {changed} changed, {removed} removed; {total} \
                     exports"
                ),
            }
            self.counted = true;
            self.concluded = true;
            self.status = match &loaded.server {
                Some(_) => format!(", configuration {generation}"),
                None => format!("; configuration {generation} has errors, see the log"),
            };
        }
        for export in &plan.add {
            debug!("configuration {generation}: added {} = {}", export.name, export.path.display());
        }
        for export in &plan.change {
            debug!("configuration {generation}: changed {} = {}", export.name, export.path.display());
        }
        for name in &plan.remove {
            debug!("configuration {generation}: removed {name}");
        }
    }
}

fn log(generation: u64, problem: &Problem) {
    match problem.severity {
        Severity::Warning => warn!("configuration {generation}: {problem}"),
        Severity::Refused | Severity::Error => error!("configuration {generation}: {problem}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::time::SystemTime;

    fn names(exports: &[ExportConfig]) -> Vec<&str> {
        exports.iter().map(|e| e.name.as_str()).collect()
    }

    struct Directory(tempfile::TempDir);

    impl Directory {
        fn new() -> Directory {
            let directory = Directory(tempfile::tempdir().expect("directory"));
            let conf_d = directory.0.path().join("conf.d");
            fs::create_dir(&conf_d).expect("conf.d");
            directory.write("config", &format!("[generic]\nincludedir = {}\n", conf_d.display()));
            directory
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.0.path().join(name), text).expect("write");
        }

        fn start(&self) -> (Reload, Pass) {
            let (reload, _, pass) = Reload::start(&self.0.path().join("config")).expect("start");
            (reload, pass)
        }

        /// Makes every file look as if it had been written long ago.
        fn age(&self) {
            let files = ["config", "conf.d/a.conf"].map(|f| self.0.path().join(f));
            for file in files.iter().filter(|f| f.exists()) {
                let old = SystemTime::now() - Duration::from_secs(10);
                fs::File::options().write(true).open(file).and_then(|f| f.set_modified(old)).expect("age");
            }
        }
    }

    #[test]
    fn what_has_just_changed_is_looked_at_again() {
        let d = Directory::new();
        d.write("conf.d/a.conf", "[a]\nexportname=/a\n");
        let (mut reload, first) = d.start();
        assert_eq!(names(&first.plan.add), ["a"]);
        assert_eq!(first.again, Some(PAUSE), "the file is fresh");
        d.write("conf.d/a.conf", "[a]\nexportname=/a\nreadonly=true\n");
        let second = reload.pass();
        assert_eq!((names(&second.plan.change), second.again), (vec!["a"], Some(2 * PAUSE)));
        d.age();
        let third = reload.pass();
        assert_eq!((third.plan.is_empty(), third.again), (true, None));
    }

    #[test]
    fn a_file_that_is_truncated_while_it_is_written_removes_nothing() {
        let d = Directory::new();
        d.write("conf.d/a.conf", "[a]\nexportname=/a\n");
        let (mut reload, _) = d.start();
        reload.begin();
        d.write("conf.d/a.conf", "");
        let torn = reload.pass();
        assert_eq!((torn.again, torn.plan.is_empty()), (Some(PAUSE), true));
        d.write("conf.d/a.conf", "[a]\nexportname=/b\n");
        assert_eq!(names(&reload.pass().plan.change), ["a"]);
        // empty for good is empty
        d.write("conf.d/a.conf", "");
        d.age();
        reload.begin();
        assert_eq!(reload.pass().plan.remove, ["a"]);
    }

    #[test]
    fn an_endless_writer_does_not_keep_the_reload_going() {
        let d = Directory::new();
        let (mut reload, _) = d.start();
        reload.begin();
        let mut passes = 0;
        loop {
            d.write("conf.d/a.conf", &format!("[a{passes}"));
            passes += 1;
            if reload.pass().again.is_none() {
                break;
            }
        }
        assert_eq!(passes, MAX_PASSES);
    }

    #[test]
    fn a_bad_base_file_stops_a_start_and_changes_nothing_later() {
        let d = Directory::new();
        d.write("conf.d/a.conf", "[a]\nexportname=/a\n");
        let (mut reload, _) = d.start();
        reload.begin();
        d.write("config", "[generic]\nforce_tls = true\n");
        reload.pass();
        assert_eq!(names(&reload.applied), ["a"]);
        let message = Reload::start(&d.0.path().join("config")).expect_err("refused");
        assert!(message.contains("config:2: error: [generic] force_tls = true"), "{message}");
    }
}
