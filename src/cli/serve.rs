//! `cowgate serve`.

use super::check_config;
use crate::daemon;
use crate::daemon::background::{self, Launched};
use crate::daemon::log_file::LogFile;
use crate::daemon::pid_file::Wanted;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use tracing_subscriber::EnvFilter;

/// Environment variable with the log filter, when `--log` is not given.
const LOG_VARIABLE: &str = "COWGATE_LOG";
/// The configuration when none is named.
pub(super) const DEFAULT_CONFIG: &str = "/etc/cowgate/config";
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
    /// Serve in the background: return when clients can connect, or with an error
    #[arg(long, conflicts_with = "foreground")]
    daemonize: bool,
    /// Append the log to this file; SIGHUP and SIGUSR1 open it anew after it was rotated [default: stderr]
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    #[arg(long = &background::CHILD_OPTION[2..], hide = true)]
    background_child: bool,
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

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    if args.check {
        return check_config::report(&args.config, false);
    }
    if args.daemonize && !args.background_child {
        return background::launch().map(|launched| match launched {
            Launched::Ready => ExitCode::SUCCESS,
            Launched::Failed => ExitCode::FAILURE,
        });
    }
    // relative to the directory where the command was given, which the background leaves
    let config = absolute(&args.config)?;
    let pid_file = match args.pid_file() {
        Wanted::Required(path) => Wanted::Required(absolute(&path)?),
        other => other,
    };
    let log_path = args.log_file.as_deref().map(absolute).transpose()?;
    if args.background_child {
        background::enter().map_err(|e| format!("cannot go into the background: {e}"))?;
    }
    let log = start_log(args, log_path.as_deref())?;
    let options = daemon::Options { config, pid_file, log, in_background: args.background_child };
    daemon::run(&options).map(|()| ExitCode::SUCCESS).map_err(|e| e.to_string())
}

fn absolute(path: &Path) -> Result<PathBuf, String> {
    std::path::absolute(path).map_err(|e| format!("{}: {e}", path.display()))
}

/// Where the log goes. The file, if it is one, can be opened anew.
fn start_log(args: &Args, path: Option<&Path>) -> Result<Option<Arc<LogFile>>, String> {
    let filter_text = match (&args.log, std::env::var(LOG_VARIABLE)) {
        (Some(text), _) => text.clone(),
        (None, Ok(text)) => filter(&text).map_err(|e| format!("{LOG_VARIABLE}={text}: {e}"))?,
        (None, Err(_)) => "info".to_owned(),
    };
    // what libublk does is its own affair, unless somebody asks for it
    let directives = format!("libublk=warn,{filter_text}");
    let log = tracing_subscriber::fmt().with_env_filter(EnvFilter::new(directives)).with_target(false);
    if let Some(path) = path {
        let opened = LogFile::open(path).map_err(|e| format!("cannot open the log file {}: {e}", path.display()))?;
        let file = Arc::new(opened);
        log.with_ansi(false).with_writer(Arc::clone(&file)).init();
        log_panics();
        return Ok(Some(file));
    }
    let log = log.with_writer(std::io::stderr);
    // journald has its own clock and shows no colours
    if background::stderr_is_journal() {
        log.without_time().with_ansi(false).init();
    } else {
        log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init();
    }
    Ok(None)
}

/// Standard error may be closed by then.
fn log_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tracing::error!("{panic}");
        before(panic);
    }));
}
