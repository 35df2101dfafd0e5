//! `cowgate restore`: a backup mounted by one command, and never written. Works without a daemon, as root.

mod inspect;
mod list;
mod mount;
mod umount;

use super::serve::DEFAULT_CONFIG;
use crate::daemon::background;
use crate::image::Format;
use crate::restore::source::{Source, Wanted};
use crate::restore::{end, serve, udev};
use nix::unistd::geteuid;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Mount a backup read-only, with its whole backing chain, until it is unmounted or its time is over
    Mount(mount::Args),
    /// List what is mounted in this way
    List(list::Args),
    /// Unmount it, and delete its block device
    Umount(umount::Args),
    /// Show partitions, file systems and volumes of an image, without mounting anything
    Inspect(inspect::Args),
    /// The background process of a restore
    #[command(hide = true)]
    Serve {
        /// Where its state is
        #[arg(long)]
        dir: PathBuf,
    },
}

/// Which image is meant.
#[derive(Debug, clap::Args)]
struct Image {
    /// The path of an image, or the name of an export of the configuration
    #[arg(value_name = "IMAGE|EXPORT")]
    what: String,
    /// It is the name of an export, also if there is a file of that name, or a slash in it
    #[arg(long)]
    export: bool,
    /// The image's format [default: by its name, or the export's]
    #[arg(long)]
    format: Option<Format>,
    /// The configuration, for exports and for the directories of backing files; see cowgate.conf(5)
    #[arg(short, long, value_name = "FILE", default_value = DEFAULT_CONFIG)]
    config: PathBuf,
}

impl Image {
    /// The image, opened with a temporary layer in this directory, if there is to be one.
    fn source(&self, scratch: &Path) -> Result<Source, String> {
        let Image { what, export, format, config } = self;
        if let Some(warning) = udev::warning(Path::new("/")) {
            eprintln!("cowgate: warning: {warning}");
        }
        Source::find(Wanted { what, is_export: *export, format: *format, config, scratch })
    }
}

pub(super) fn run(command: &Command) -> Result<ExitCode, String> {
    if !geteuid().is_root() {
        return Err("restore makes block devices and mounts, which only root may do".to_owned());
    }
    if let Command::Serve { dir } = command {
        background::enter().map_err(|e| format!("cannot go into the background: {e}"))?;
        log_to_stderr("libublk=warn,info");
        return serve::run(dir).map(|()| ExitCode::SUCCESS);
    }
    log_to_stderr("libublk=off,warn");
    end::sweep();
    match command {
        Command::Mount(args) => mount::run(args),
        Command::List(args) => list::run(args),
        Command::Umount(args) => umount::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Serve { .. } => Ok(ExitCode::SUCCESS),
    }
}

fn log_to_stderr(filter: &str) {
    let log = tracing_subscriber::fmt().with_env_filter(EnvFilter::new(filter)).with_target(false);
    log.with_ansi(false).with_writer(std::io::stderr).init();
}
