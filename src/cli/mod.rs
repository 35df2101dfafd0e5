//! The command line: what can be asked, and how it is answered. `main` calls [`main`] and nothing else.
//!
//! Exit status: 0 done, 1 it failed (one line on stderr says why), 2 wrong usage.

mod backup;
mod check_config;
mod completions;
mod control;
mod export;
mod image;
mod name;
mod progress;
mod reload;
#[cfg(feature = "ublk")]
mod restore;
mod serve;
mod size;
mod status;
mod table;
#[cfg(feature = "ublk")]
mod ublk;

use clap::{Parser, Subcommand};
use std::io::{self, Write};
use std::process::ExitCode;

#[derive(Debug, Parser)]
#[command(name = "cowgate", version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Begin and end backup jobs: the image, its export and what belongs to them in one call each
    #[command(subcommand)]
    Backup(backup::Command),
    /// Print every problem of a configuration file; exit status 0 if all of it would take effect, else 1
    CheckConfig(check_config::Args),
    /// Print the script that completes this command line in a shell
    Completions(completions::Args),
    /// Add, remove and show exports of the running daemon
    #[command(subcommand)]
    Export(export::Command),
    /// Have the running daemon read its configuration again
    Reload(reload::Args),
    /// Mount backups read-only, list and unmount them, and look at what is on a disk
    #[cfg(feature = "ublk")]
    #[command(subcommand)]
    Restore(restore::Command),
    /// Show what the running daemon and its clients are doing
    Status(status::Args),
    /// Serve the exports of a configuration file until SIGTERM
    Serve(serve::Args),
    /// Make and describe image files
    #[command(subcommand)]
    Image(image::Command),
    /// Make the name of a backup or migration export, or take one apart
    Name(name::Args),
    /// List and delete block devices of this machine, with or without a running daemon
    #[cfg(feature = "ublk")]
    #[command(subcommand)]
    Ublk(ublk::Command),
}

/// Runs the program with the process's arguments.
pub fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Backup(command) => backup::run(&command),
        Command::CheckConfig(args) => check_config::run(&args),
        Command::Completions(args) => completions::run(&args),
        Command::Export(command) => export::run(&command),
        Command::Reload(args) => reload::run(&args),
        #[cfg(feature = "ublk")]
        Command::Restore(command) => restore::run(&command),
        Command::Status(args) => status::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Image(command) => image::run(&command),
        Command::Name(args) => name::run(&args),
        #[cfg(feature = "ublk")]
        Command::Ublk(command) => ublk::run(&command),
    };
    match done {
        Ok(status) => status,
        Err(message) => {
            eprintln!("cowgate: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Writes to stdout. A reader that has seen enough (`| head`) is no failure.
fn say(text: &str) -> Result<(), String> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(format!("cannot write to stdout: {e}")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Cli, clap::error::ErrorKind> {
        Cli::try_parse_from(line.split_whitespace()).map_err(|e| e.kind())
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn usage() {
        use clap::error::ErrorKind;
        assert!(parse("cowgate serve -c /etc/cowgate/config --check --log debug").is_ok());
        assert!(parse("cowgate serve").is_ok());
        assert_eq!(parse("cowgate serve -d --daemonize").err(), Some(ErrorKind::ArgumentConflict));
        assert!(parse("cowgate serve -d -C /etc/nbd-server/config -p /run/nbd-server.pid").is_ok());
        assert!(parse("cowgate image create --size 10G a.qcow2").is_ok());
        assert!(
            parse("cowgate image create --backing b --backing-format raw --cluster-size 64K --force a.qcow2").is_ok()
        );
        let without_format = parse("cowgate image create --backing b a.qcow2").err();
        assert_eq!(
            without_format,
            Some(ErrorKind::MissingRequiredArgument),
            "a backing file's format is never guessed"
        );
        assert_eq!(parse("cowgate image create a.qcow2").err(), Some(ErrorKind::MissingRequiredArgument));
        assert_eq!(parse("cowgate image create --size 10X a.qcow2").err(), Some(ErrorKind::ValueValidation));
        assert!(parse("cowgate image check --repair --json a.qcow2").is_ok());
        assert!(parse("cowgate image check --repair=leaks a.qcow2").is_ok());
        assert_eq!(parse("cowgate image check --repair=some a.qcow2").err(), Some(ErrorKind::InvalidValue));
        assert!(parse("cowgate image info --json --format raw a.img").is_ok());
        assert!(parse("cowgate image map --json --format raw a.img").is_ok());
        let create = "cowgate image create --size 1G --compat 0.10 --refcount-bits 8 --extended-l2 --lazy-refcounts \
                      --compression zstd --data-file d --data-file-raw a.qcow2";
        assert!(parse(create).is_ok());
        assert_eq!(
            parse("cowgate image create --size 1G --data-file-raw a.qcow2").err(),
            Some(ErrorKind::MissingRequiredArgument)
        );
        assert_eq!(
            parse("cowgate image create --backing b --backing-format raw --data-file d --data-file-raw a.qcow2").err(),
            Some(ErrorKind::ArgumentConflict)
        );
        assert!(parse("cowgate image compare --strict --format-a raw --format-b qcow2 -q a b").is_ok());
        assert_eq!(parse("cowgate image compare a").err(), Some(ErrorKind::MissingRequiredArgument));
        assert!(parse("cowgate image convert --format raw --compress zstd --cluster-size 2M --force a b").is_ok());
        assert!(
            parse("cowgate image convert --source-format qcow2 --snapshot s --output-format raw --json a b").is_ok()
        );
        assert_eq!(parse("cowgate image convert --compress lz4 a b").err(), Some(ErrorKind::ValueValidation));
    }
}
