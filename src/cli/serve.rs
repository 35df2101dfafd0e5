//! `cowgate serve`.

use super::say;
use crate::daemon;
use crate::daemon::pid_file::Wanted;
use crate::export::load::load;
use std::path::PathBuf;
use tracing_subscriber::EnvFilter;

/// Environment variable with the log filter, when `--log` is not given.
const LOG_VARIABLE: &str = "COWGATE_LOG";
/// The configuration when none is named.
const DEFAULT_CONFIG: &str = "/etc/cowgate/config";
/// nbd-server's pid file, where control planes look for it.
const DEFAULT_PID_FILE: &str = "/run/nbd-server.pid";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The configuration file, in nbd-server's format; see cowgate.conf(5). -C is the same
    #[arg(short, short_alias = 'C', long, value_name = "FILE", default_value = DEFAULT_CONFIG)]
    config: PathBuf,
    /// Read the configuration, print every problem in it and exit: 0 if all of it would take effect, else 1
    #[arg(long)]
    check: bool,
    /// Write the process ID to this file, which is removed at exit; `none`: to no file
    /// [default: /run/nbd-server.pid, if it can be written]
    #[arg(short, long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Stay in the foreground. This is the default; nbd-server needs to be told so
    #[arg(short = 'd', long)]
    foreground: bool,
    /// What to log on stderr: error, warn, info, debug, trace, or a filter such as info,cowgate::export=debug
    /// [default: $COWGATE_LOG, or info]
    #[arg(long, value_name = "FILTER", value_parser = filter)]
    log: Option<String>,
}

impl Args {
    fn pid_file(&self) -> Wanted {
        match &self.pid_file {
            None => Wanted::IfPossible(DEFAULT_PID_FILE.into()),
            Some(none) if none.as_os_str() == "none" => Wanted::None,
            Some(path) => Wanted::Required(path.clone()),
        }
    }
}

/// A filter that the log will understand.
fn filter(text: &str) -> Result<String, String> {
    EnvFilter::try_new(text).map(|_| text.to_owned()).map_err(|e| e.to_string())
}

pub(super) fn run(args: &Args) -> Result<(), String> {
    if args.check {
        return check(args);
    }
    start_log(args)?;
    let options = daemon::Options { config: args.config.clone(), pid_file: args.pid_file() };
    daemon::run(&options).map_err(|e| e.to_string())
}

fn check(args: &Args) -> Result<(), String> {
    let loaded = load(&args.config);
    let mut text: String = loaded.problems.iter().map(|problem| format!("{problem}\n")).collect();
    let accounts = loaded.server.as_ref().map_or(Ok(()), daemon::check_accounts);
    if let Err(e) = &accounts {
        text += &format!("{}: error: {e}\n", args.config.display());
    }
    let complete = loaded.server.is_some() && !loaded.has_errors() && accounts.is_ok();
    if complete {
        text += &format!("{}: complete, {} exports\n", args.config.display(), loaded.exports.len());
    }
    say(&text)?;
    match complete {
        true => Ok(()),
        false => Err(format!("{}: not all of the configuration would take effect", args.config.display())),
    }
}

fn start_log(args: &Args) -> Result<(), String> {
    let filter_text = match (&args.log, std::env::var(LOG_VARIABLE)) {
        (Some(text), _) => text.clone(),
        (None, Ok(text)) => filter(&text).map_err(|e| format!("{LOG_VARIABLE}={text}: {e}"))?,
        (None, Err(_)) => "info".to_owned(),
    };
    let filter = EnvFilter::new(filter_text);
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    // journald has its own clock and shows no colours
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        log.without_time().with_ansi(false).init();
    } else {
        log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init();
    }
    Ok(())
}
