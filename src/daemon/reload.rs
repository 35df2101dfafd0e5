//! Reading the configuration at start and again when asked: what is applied, what is said, when to look once more.
//!
//! A control plane may signal while it still writes a file. So a reload is a series of passes: each applies what is
//! complete. While a file looks half-written, another pass follows shortly; while one has just changed, it is looked at
//! again in growing intervals and read again if it has changed once more. Called by the control thread, which does the
//! waiting and hands the plans to the registry.

use crate::export::config::{ExportConfig, ServerConfig};
use crate::export::control::Outcome;
use crate::export::load::{self, Loaded, Loader, Stamps};
use crate::export::plan::{Plan, Scope, plan};
use crate::export::problem::{Problem, Severity};
use crate::export::tls::{self, Offer};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tracing::{debug, error, info, warn};

/// Time until the next pass while a file looks half-written.
const PAUSE: Duration = Duration::from_millis(100);
/// Most passes of one reload, so that a file that is written all the time cannot keep it going: 5 s.
const MAX_PASSES: u32 = 50;

/// The state of the configuration as served.
#[derive(Debug)]
pub struct Reload {
    loader: Loader,
    /// The settings the daemon was started with; only a restart changes them.
    started_with: ServerConfig,
    applied: Vec<Arc<ExportConfig>>,
    /// TLS as offered.
    offer: Arc<Offer>,
    /// `includedir`, as configured now.
    include_dir: Option<PathBuf>,
    /// Files of the last pass that had just changed.
    recent: Stamps,
    /// Files of the last pass looked half-written.
    unsettled: bool,
    passes: u32,
    /// What was logged about this configuration, so that later passes do not repeat it.
    said: HashSet<String>,
    /// What came of this reload so far; its generation is that of the configuration, which the start begins with 1.
    outcome: Outcome,
    /// What this reload found in the files.
    problems: Vec<Problem>,
    /// What its passes changed and was not logged yet: added, changed, removed.
    counts: [usize; 3],
    /// Its counts were logged once.
    counted: bool,
    /// What is served, in a line, after the last pass that concluded a reload.
    status: String,
    /// What the log is to say of that when it is applied.
    concluded: Option<String>,
}

/// What one pass found.
#[derive(Debug)]
pub struct Pass {
    /// To be carried out by the registry.
    pub plan: Plan,
    /// Another pass is needed after this time.
    pub again: Option<Duration>,
    /// The settings as configured now, of which some apply without a restart; `None`: not known, as before.
    pub server: Option<ServerConfig>,
    /// TLS to be offered from now on; `None`: as before.
    pub tls: Option<Arc<Offer>>,
}

impl Reload {
    /// Reads the configuration for a start, logging its problems.
    ///
    /// `Err`, with a message for people: the base file cannot be relied on.
    pub fn start(base: &Path) -> Result<(Reload, ServerConfig, Pass), String> {
        let mut loader = Loader::new(base);
        let mut loaded = loader.load();
        let found = loaded.server.as_ref().map(|server| tls::load(server, loader.path()));
        let offer = found.and_then(|found| {
            loaded.problems.extend(found.problems);
            found.offer
        });
        let (Some(server), Some(offer)) = (loaded.server.clone(), offer) else {
            let errors = loaded.problems.iter().filter(|p| p.severity == Severity::Error);
            let lines: Vec<String> = errors.map(|p| format!("\n  {p}")).collect();
            return Err(format!("cannot start with this configuration:{}", lines.concat()));
        };
        let mut reload = Reload {
            loader,
            started_with: server.clone(),
            applied: Vec::new(),
            offer: Arc::clone(&offer),
            include_dir: None,
            recent: Stamps::new(),
            unsettled: false,
            passes: 0,
            said: HashSet::new(),
            outcome: Outcome { generation: 1, ..Outcome::default() },
            problems: Vec::new(),
            counts: [0; 3],
            counted: false,
            status: String::new(),
            concluded: None,
        };
        let pass = reload.take(loaded);
        if offer.acceptor.is_some() {
            info!("TLS: {}", offer.describe());
        }
        let pass = Pass { tls: Some(offer), ..pass };
        // the start itself tells the service manager
        if let Some(line) = reload.concluded.take() {
            info!("{line}");
        }
        Ok((reload, server, pass))
    }

    /// What is served, for people, in a line.
    pub fn status(&self) -> String {
        format!("{} exports{}", self.applied.len(), self.status)
    }

    /// To be called when a pass was applied: logs the end of a reload if that was its last one, and returns the status.
    pub fn concluded(&mut self) -> Option<String> {
        let line = self.concluded.take()?;
        info!("{line}");
        Some(self.status())
    }

    /// Begins a new reload: the next pass counts as the first.
    pub fn begin(&mut self) {
        self.passes = 0;
        self.said.clear();
        self.outcome = Outcome { generation: self.outcome.generation + 1, ..Outcome::default() };
        self.problems.clear();
        self.counts = [0; 3];
        self.counted = false;
    }

    /// What came of the reload begun last, so far.
    pub fn outcome(&self) -> Outcome {
        Outcome { problems: self.problems.iter().map(Problem::to_string).collect(), ..self.outcome.clone() }
    }

    /// The number of the configuration as served.
    pub fn generation(&self) -> u64 {
        self.outcome.generation
    }

    /// Nothing that was found looked half-written.
    pub fn is_settled(&self) -> bool {
        !self.unsettled
    }

    /// All that is configured could be taken over: an export that there is not is not wanted.
    pub fn is_whole(&self) -> bool {
        self.is_settled() && self.problems.iter().all(|p| p.severity == Severity::Warning)
    }

    /// A further pass of a series. It need not read anything when nothing has changed.
    pub fn follow_up(&mut self) -> Pass {
        if !self.unsettled && load::unchanged(&self.recent) {
            self.passes += 1;
            let plan = Plan::default();
            return Pass { plan, again: self.next_pause(), server: None, tls: None };
        }
        self.pass()
    }

    /// One pass: reads everything that has changed and compares it with what is served.
    pub fn pass(&mut self) -> Pass {
        let loaded = self.loader.load();
        self.take(loaded)
    }

    fn take(&mut self, mut loaded: Loaded) -> Pass {
        self.passes += 1;
        self.unsettled = !loaded.unstable.is_empty();
        let tls = self.certificates(&mut loaded);
        let mut plan = plan(&self.applied, &loaded, &Scope::All);
        self.applied = std::mem::take(&mut plan.applied);
        self.recent = std::mem::take(&mut loaded.recent);
        let again = self.next_pause();
        self.note_settings(&loaded);
        self.note(&loaded, &plan);
        self.say(&loaded, &plan, again.is_none() || !self.unsettled);
        Pass { plan, again, server: loaded.server, tls }
    }

    /// Reads certificates and keys if they or what the configuration says of them have changed. Bad ones change nothing.
    fn certificates(&mut self, loaded: &mut Loaded) -> Option<Arc<Offer>> {
        let server = loaded.server.as_ref()?;
        if self.offer.is_still(&server.tls) {
            loaded.recent.extend(self.offer.recent());
            return None;
        }
        let found = tls::load(server, self.loader.path());
        loaded.recent.extend(found.recent);
        match found.offer {
            Some(offer) => {
                loaded.problems.extend(found.problems);
                info!("configuration {}: TLS from now on: {}", self.outcome.generation, offer.describe());
                self.offer = Arc::clone(&offer);
                Some(offer)
            }
            // a certificate and its key are two files: who replaces them is not done yet
            None if found.unsettled && self.passes < MAX_PASSES => {
                self.unsettled = true;
                None
            }
            None => {
                let until = |p: Problem| match p.severity {
                    Severity::Warning => p,
                    _ => Problem { remedy: format!("{}; until then TLS stays as it was", p.remedy), ..p },
                };
                loaded.problems.extend(found.problems.into_iter().map(until));
                None
            }
        }
    }

    /// Reads what has changed and takes over only exports of new names: a client has asked for one. A series of passes
    /// under way goes on as it was. Also returns whether nothing looked half-written.
    pub fn additions(&mut self) -> (Plan, bool) {
        let loaded = self.loader.load();
        let plan = self.take_part(&loaded, &Scope::Additions);
        // the problems are for whoever asks for a reload
        for export in &plan.add {
            info!("configuration {}: a client asked for {:?}, added", self.outcome.generation, export.name);
        }
        (plan, loaded.unstable.is_empty())
    }

    /// Reads what has changed and takes over only what one file defines or has defined: somebody has just written or
    /// removed it as a whole. A series of passes under way goes on as it was. Also returns what keeps the file from
    /// taking effect.
    pub fn file(&mut self, file: &Path) -> (Plan, Vec<Problem>) {
        let loaded = self.loader.load();
        let plan = self.take_part(&loaded, &Scope::File(file.to_owned()));
        let generation = self.outcome.generation;
        for problem in loaded.problems.iter().filter(|p| p.file == file) {
            log(generation, problem);
        }
        for export in plan.add.iter().chain(&plan.change).chain(&plan.adjust) {
            info!("configuration {generation}: {:?} is served as {} has it", export.name, file.display());
        }
        for name in &plan.remove {
            info!("configuration {generation}: {name:?} is removed with {}", file.display());
        }
        // of a name that two files define, the later one is blamed, and names the other
        let path = file.display().to_string();
        let concerns = |p: &Problem| {
            p.severity > Severity::Warning && (p.file == file || p.what.contains(&path) || loaded.server.is_none())
        };
        let problems = loaded.problems.iter().chain(&plan.problems).filter(|p| concerns(p)).cloned().collect();
        (plan, problems)
    }

    /// Takes over what `scope` admits; that is another configuration, though nobody waits for a report.
    fn take_part(&mut self, loaded: &Loaded, scope: &Scope) -> Plan {
        let mut plan = plan(&self.applied, loaded, scope);
        self.applied = std::mem::take(&mut plan.applied);
        self.outcome.generation += u64::from(!plan.is_empty());
        self.outcome.exports = self.applied.len();
        self.note_settings(loaded);
        plan
    }

    /// Where the files of single exports are, as configured now.
    pub fn include_dir(&self) -> Option<&Path> {
        self.include_dir.as_deref()
    }

    fn note_settings(&mut self, loaded: &Loaded) {
        if let Some(server) = &loaded.server {
            self.include_dir.clone_from(&server.include_dir);
        }
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

    /// Adds what a pass found to the outcome.
    fn note(&mut self, loaded: &Loaded, plan: &Plan) {
        let outcome = &mut self.outcome;
        outcome.added.extend(plan.add.iter().map(|e| e.name.clone()));
        outcome.changed.extend(plan.change.iter().chain(&plan.adjust).map(|e| e.name.clone()));
        outcome.removed.extend(plan.remove.iter().cloned());
        outcome.exports = self.applied.len();
        // the warnings of an earlier pass still hold; an error may have been that of a half-written file
        self.problems.retain(|p| p.severity == Severity::Warning);
        let known: HashSet<String> = self.problems.iter().map(Problem::to_string).collect();
        let new = loaded.problems.iter().chain(&plan.problems).filter(|p| !known.contains(&p.to_string()));
        self.problems.extend(new.cloned());
        outcome.needs_restart = match &loaded.server {
            Some(server) => self.started_with.needs_restart(server).into_iter().map(str::to_owned).collect(),
            None => Vec::new(),
        };
        outcome.settled = !self.unsettled;
        let all_applies = loaded.server.is_some() && outcome.needs_restart.is_empty();
        self.outcome.complete = all_applies && self.is_whole();
    }

    /// Logs what is new. `last`: no pass will follow because of half-written files.
    fn say(&mut self, loaded: &Loaded, plan: &Plan, last: bool) {
        let generation = self.outcome.generation;
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
        for (count, new) in
            self.counts.iter_mut().zip([plan.add.len(), plan.change.len() + plan.adjust.len(), plan.remove.len()])
        {
            *count += new;
        }
        // the line that control planes may wait for: once a reload, and again if a file has changed once more
        if last && (!self.counted || !plan.is_empty()) {
            let [added, changed, removed] = std::mem::take(&mut self.counts);
            let total = self.applied.len();
            self.concluded = Some(match &loaded.server {
                None => format!("configuration {generation} not reloaded because of the errors above: {total} exports"),
                Some(_) if generation == 1 && !self.counted => format!("configuration 1 loaded: {total} exports"),
                Some(_) => format!(
                    "configuration {generation} reloaded: {added} added, {changed} changed, {removed} removed; {total} \
                     exports"
                ),
            });
            self.counted = true;
            self.status = match &loaded.server {
                Some(_) => format!(", configuration {generation}"),
                None => format!("; configuration {generation} has errors, see the log"),
            };
        }
        for export in &plan.add {
            debug!("configuration {generation}: added {} = {}", export.name, export.path.display());
        }
        for export in plan.change.iter().chain(&plan.adjust) {
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

    fn names(exports: &[Arc<ExportConfig>]) -> Vec<&str> {
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

    /// What is logged, for a test.
    #[derive(Clone, Default)]
    struct Log(Arc<std::sync::Mutex<Vec<u8>>>);

    impl std::io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("no panic").write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_end_of_a_reload_is_told_when_it_is_applied() {
        let directory = Directory::new();
        let (mut reload, _) = directory.start();
        directory.write("conf.d/a.conf", "[disk]\nexportname = /srv/disk\n");
        directory.age();
        let log = Log::default();
        let (to_write, to_read) = (log.clone(), log.0);
        let told = || String::from_utf8_lossy(&to_read.lock().expect("no panic")).contains("2 reloaded: 1 added");
        let subscriber = tracing_subscriber::fmt().with_writer(move || to_write.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            reload.begin();
            let pass = reload.pass();
            assert_eq!((pass.plan.add.len(), told()), (1, false), "whoever waits for this would be too early");
            assert!(reload.concluded().is_some() && told());
            assert_eq!(reload.concluded(), None);
        });
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
    fn a_client_that_misses_an_export_leaves_the_series_under_way_alone() {
        let d = Directory::new();
        d.write("conf.d/a.conf", "[a]\nexportname=/a\n");
        let (mut reload, first) = d.start();
        assert_eq!(first.again, Some(PAUSE), "the file is fresh");
        d.write("conf.d/a.conf", "[a]\nexportname=/a\nreadonly=true\n");
        d.write("conf.d/b.conf", "[b]\nexportname=/b\n");
        let (look, settled) = reload.additions();
        assert_eq!((names(&look.add), names(&look.change), settled), (vec!["b"], vec![], true));
        let second = reload.follow_up();
        assert_eq!(names(&second.plan.change), ["a"], "what has just changed was to be looked at again");
    }

    #[test]
    fn a_client_that_misses_an_export_keeps_no_series_going() {
        let d = Directory::new();
        d.write("conf.d/a.conf", "[a]\nexportname=/a\n");
        let (mut reload, _) = d.start();
        d.age();
        assert_eq!(reload.pass().again, None);
        fs::remove_file(d.0.path().join("conf.d/a.conf")).expect("remove");
        d.write("conf.d/b.conf", "[b]\nexportname=/b\n");
        let (look, _) = reload.additions();
        assert_eq!((names(&look.add), look.remove.len()), (vec!["b"], 0), "nobody signalled");
        assert_eq!(names(&reload.applied), ["a", "b"]);
        d.write("conf.d/b.conf", "[b");
        assert!(!reload.additions().1, "it is half-written");
        assert!(reload.is_settled(), "which no reload waits for");
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
