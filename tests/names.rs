//! The commands around names and configuration files: what they print, and with which exit status.

mod common;

use common::qemu;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn cowgate(arguments: &[&str]) -> Output {
    qemu::output(Command::new(env!("CARGO_BIN_EXE_cowgate")).args(arguments))
}

/// What a command that succeeds prints.
#[track_caller]
fn prints(arguments: &[&str]) -> String {
    let output = cowgate(arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", qemu::text(&output.stderr));
    qemu::text(&output.stdout)
}

/// What a command that fails with `status` says.
#[track_caller]
fn fails(status: i32, arguments: &[&str]) -> String {
    let output = cowgate(arguments);
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {}", qemu::text(&output.stderr));
    assert_eq!(qemu::text(&output.stdout), "");
    qemu::text(&output.stderr)
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

const BACKUP: [&str; 7] = ["name", "--vm-context", "ctx-pgtest2", "--disk", "0", "--type", "full"];
const UUID: &str = "0b9f4c6e-3c1d-4e57-9f3e-0a1b2c3d4e5f";

#[test]
fn a_backup_is_named_and_its_name_taken_apart() {
    let name = "backup-ctx-pgtest2-disk0-full-20250101T120000";
    for time in ["20250101T120000", "2025-01-01T12:00:00Z", "2025-01-01T13:00:00+01:00", "@1735732800"] {
        assert_eq!(prints(&[&BACKUP[..], &["--time", time]].concat()), format!("{name}\n"), "{time}");
    }
    let lines = "kind: backup\ncontext: ctx-pgtest2\ndisk: 0\ntype: full\ntime: 2025-01-01T12:00:00Z\n";
    assert_eq!(prints(&["name", "--parse", name]), lines);
    let parts = json!({
        "name": name, "kind": "backup", "context": "ctx-pgtest2", "shortened": false, "disk": 0, "type": "full",
        "time": "2025-01-01T12:00:00Z",
    });
    assert_eq!(json(&prints(&["name", "--parse", name, "--json"])), parts);
    assert_eq!(json(&prints(&[&BACKUP[..], &["--time", "@1735732800", "--json"]].concat())), parts);
}

#[test]
fn without_a_time_it_is_now_in_utc() {
    let clock = || prints_of("date", &["-u", "+%Y%m%dT%H%M%S"]);
    let before = clock();
    let name = qemu::run(Command::new(env!("CARGO_BIN_EXE_cowgate")).args(BACKUP).env("TZ", "Asia/Tokyo"));
    let time = name.trim().rsplit('-').next().unwrap().to_owned();
    assert!(before.trim() <= time.as_str() && time.as_str() <= clock().trim(), "{before} {time}");
}

fn prints_of(program: &str, arguments: &[&str]) -> String {
    qemu::run(Command::new(program).args(arguments))
}

#[test]
fn a_long_context_is_shortened_and_told_so() {
    let arguments = ["name", "--vm-context", UUID, "--disk", "3", "--type", "incr", "--time", "@0", "--json"];
    let made = json(&prints(&arguments));
    let name = made["name"].as_str().unwrap();
    assert!(name.len() <= 63 && name.starts_with("backup-0b9f4c~"), "{name}");
    assert_eq!(made["shortened"], true);
    assert_eq!(json(&prints(&["name", "--parse", name, "--json"])), made);
    assert!(prints(&["name", "--parse", name]).contains(" (shortened)\n"));
    // what is shortened already is not taken for a whole context
    let context = made["context"].as_str().unwrap();
    let message = fails(1, &["name", "--vm-context", context, "--disk", "3", "--type", "incr"]);
    assert!(message.contains("shortened"), "{message}");
}

#[test]
fn a_migration_is_named_and_its_name_taken_apart() {
    let name = format!("migration-vm-{UUID}-disk0");
    assert_eq!(prints(&["name", "--migration", UUID, "--disk", "0"]), format!("{name}\n"));
    let parts = json!({"name": name, "kind": "migration", "vm": UUID, "disk": 0});
    assert_eq!(json(&prints(&["name", "--parse", &name, "--json"])), parts);
    assert_eq!(prints(&["name", "--parse", &name]), format!("kind: migration\nvm: {UUID}\ndisk: 0\n"));
}

#[test]
fn what_cannot_be_a_name_is_refused_with_the_reason() {
    let message = fails(1, &["name", "--vm-context", "a/b", "--disk", "0", "--type", "full"]);
    assert_eq!(message, "cowgate: the context holds '/'; it may hold ASCII letters, digits, `-`, `_` and `.`\n");
    for (what, arguments) in [
        ("0 to 999", &["name", "--vm-context", "a", "--disk", "1000", "--type", "full"][..]),
        ("possible values: full, incr", &["name", "--vm-context", "a", "--disk", "1", "--type", "diff"]),
        ("RFC 3339", &[&BACKUP[..], &["--time", "yesterday"]].concat()),
        ("--type", &["name", "--vm-context", "a", "--disk", "1"]),
        ("--disk", &["name", "--migration", UUID]),
        ("cannot be used with", &["name", "--migration", UUID, "--disk", "1", "--time", "@0"]),
        ("cannot be used with", &["name", "--parse", "x", "--disk", "1"]),
        ("cannot be used with", &["name", "--parse", "x", "--vm-context", "a"]),
        ("--vm-context", &["name"]),
    ] {
        let message = fails(2, arguments);
        assert!(message.contains(what), "{arguments:?}: {message}");
    }
    assert!(fails(1, &["name", "--migration", "x", "--disk", "0"]).contains("8-4-4-4-12"));
    assert!(fails(1, &["name", "--parse", "disk0"]).contains("is no name of a backup or migration export"));
    // an argument that is no text
    use std::os::unix::ffi::OsStrExt;
    let not_text = std::ffi::OsStr::from_bytes(b"\xff");
    let status = Command::new(env!("CARGO_BIN_EXE_cowgate")).args(["name", "--parse"]).arg(not_text).output().unwrap();
    assert_eq!(status.status.code(), Some(2));
}

/// A directory with a base file and `conf.d`.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Files {
        let files = Files(tempfile::tempdir().unwrap());
        fs::create_dir(files.path("conf.d")).unwrap();
        let conf_d = files.path("conf.d");
        files.write("config", &format!("[generic]\nlistenaddr = 127.0.0.1\nincludedir = {}\n", conf_d.display()));
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// Exit status and output of a check; nothing is ever said on stderr.
    fn check(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cowgate"));
        let output = qemu::output(command.args(arguments).arg(self.path("config")));
        assert_eq!(qemu::text(&output.stderr), "");
        (output.status.code(), qemu::text(&output.stdout))
    }
}

#[test]
fn a_check_finds_every_problem_at_once() {
    let files = Files::new();
    files.write("conf.d/a.conf", "[a]\nexportname = /nowhere/at/all.qcow2\nfua = no\nsnapshot =\n[b]\n");
    files.write("conf.d/b.conf", "[c]\nexportname = /c\ntreefiles = true\nsize = 5\n[d]\nexportname = /d\n");
    files.write("conf.d/c.conf", "[d]\nexportname = /d\nwhat is this\n");
    files.write("conf.d/d.conf", "[d]\nexportname = /other\n");
    let (status, stdout) = files.check(&["check-config"]);
    assert_eq!(status, Some(1));
    for part in [
        "a.conf:3: error: [a] fua = no",
        "a.conf:4: error: [a] snapshot = ",
        "a.conf:5: error: [b] the export has no exportname",
        "b.conf:3: refused: [c] treefiles = true",
        "b.conf:4: warning: [c] size = 5",
        "c.conf:3: error: what is this",
        "d.conf:1: error: [d] ",
        "b.conf:5 defines the same export",
    ] {
        assert!(stdout.contains(part), "{part} in {stdout}");
    }
    let summary = format!(
        "{}: not complete, 5 errors, 1 exports refused, 1 warnings; 0 exports would be served",
        files.path("config").display()
    );
    assert_eq!(stdout.lines().last(), Some(summary.as_str()), "{stdout}");
    // the same by nbd-server's way to ask
    assert_eq!(files.check(&["serve", "--check", "-c"]), (status, stdout));

    let (status, text) = files.check(&["check-config", "--json"]);
    assert_eq!(status, Some(1));
    let verdict = json(&text);
    assert_eq!(
        (&verdict["complete"], &verdict["starts"], &verdict["exports"]),
        (&json!(false), &json!(true), &json!(0))
    );
    assert_eq!((&verdict["errors"], &verdict["refused"], &verdict["warnings"]), (&json!(5), &json!(1), &json!(1)));
    let first = &verdict["problems"][0];
    assert_eq!(first["file"], files.path("conf.d/a.conf").to_str().unwrap());
    assert_eq!((&first["line"], &first["severity"]), (&json!(3), &json!("error")));
    assert_eq!((&first["group"], &first["key"], &first["value"]), (&json!("a"), &json!("fua"), &json!("no")));
    assert!(first["what"].is_string() && first["remedy"].is_string());
    assert_eq!(verdict["problems"].as_array().unwrap().len(), 7);
}

#[test]
fn a_check_of_a_sound_configuration_counts_its_exports() {
    let files = Files::new();
    // images are opened on demand: whether there are any is no part of the configuration
    files.write("conf.d/a.conf", "[a]\nexportname = /nowhere/at/all.qcow2\n[b]\nexportname = /b\n");
    let file = files.path("config").display().to_string();
    assert_eq!(files.check(&["check-config"]), (Some(0), format!("{file}: complete, 2 exports\n")));
    files.write("conf.d/b.conf", "[c]\nexportname = /c\nsize = 5\n");
    let (status, stdout) = files.check(&["check-config"]);
    assert_eq!(status, Some(0), "warnings alone are no failure");
    assert_eq!(stdout.lines().last(), Some(format!("{file}: complete, 3 exports, 1 warnings").as_str()));
    let verdict = json(&files.check(&["check-config", "--json"]).1);
    assert_eq!((&verdict["complete"], &verdict["exports"]), (&json!(true), &json!(3)));
    files.write("config", "[generic]\nlistenaddr = 127.0.0.1\n");
    assert_eq!(files.check(&["check-config"]), (Some(0), format!("{file}: complete, 0 exports\n")));
}

#[test]
fn a_file_just_written_is_checked_as_a_start_reads_it() {
    let files = Files::new();
    // no line end, written a moment ago: it might be half-written, and a start would wait and see
    files.write("conf.d/a.conf", "[a]\nexportname = /a");
    let (status, stdout) = files.check(&["check-config"]);
    assert!(status == Some(0) && stdout.contains("complete, 1 exports"), "{stdout}");
}

#[test]
fn a_check_tells_what_stops_a_start() {
    let files = Files::new();
    for (base, part) in [
        ("", "the first group is not [generic]"),
        ("[generic]\nincludedir = /nowhere/at/all\n", "includedir /nowhere/at/all"),
        ("[generic]\nport = x\n[a]\nexportname = /a\n", "config:2: error: [generic] port = x"),
        ("[generic]\nlistenaddr = 192.0.2.1\n[a]\nexportname = /a\n", "listenaddr = 192.0.2.1: this machine"),
        ("[generic]\nlistenaddr = nowhere.invalid\n", "nowhere.invalid: cannot find its address"),
        ("[generic]\nunixsock = /dev/null\n", "unixsock = /dev/null: this exists and is not a socket"),
    ] {
        files.write("config", base);
        let (status, stdout) = files.check(&["check-config"]);
        assert_eq!(status, Some(1), "{base}");
        assert!(stdout.contains(part), "{part} in {stdout}");
        assert!(stdout.ends_with("a start would fail\n"), "{stdout}");
        // and so it does
        let output = cowgate(&["serve", "-c", files.path("config").to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1), "{base}");
    }
    fs::remove_file(files.path("config")).unwrap();
    let (status, stdout) = files.check(&["check-config"]);
    assert!(status == Some(1) && stdout.contains("the configuration file does not exist"), "{stdout}");
    assert_eq!(cowgate(&["check-config"]).status.code(), Some(2));
}

/// The script for a shell, in a file. `None`: the shell is not installed, which is said.
fn completions(directory: &Path, shell: &str) -> Option<PathBuf> {
    let script = directory.join(shell);
    fs::write(&script, prints(&["completions", shell])).unwrap();
    let installed = Command::new(shell).args(["-c", "true"]).status().is_ok_and(|s| s.success());
    if !installed {
        eprintln!("not loaded: {shell} is not installed");
    }
    installed.then_some(script)
}

#[test]
fn bash_completes_commands_options_values_and_files() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("image.qcow2"), "").unwrap();
    let script = completions(directory.path(), "bash").expect("bash");
    // what bash does at a press of the tabulator
    let press = r#"
        source <("$1" completions bash) || exit 1
        function=$(complete -p cowgate | sed 's/.*-F \([^ ]*\).*/\1/')
        shift
        COMP_WORDS=(cowgate "$@") COMP_CWORD=$# COMPREPLY=()
        COMP_LINE="${COMP_WORDS[*]}" COMP_POINT=${#COMP_LINE}
        "$function" cowgate "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}" 2>/dev/null
        printf '%s\n' "${COMPREPLY[@]}"
    "#;
    let complete = |words: &[&str]| {
        let mut bash = Command::new("bash");
        bash.current_dir(&directory).args(["--norc", "-c", press, "bash", env!("CARGO_BIN_EXE_cowgate")]).args(words);
        qemu::run(&mut bash).lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(complete(&["check"]), ["check-config"]);
    assert_eq!(complete(&["serve", "--con"]), ["--config"]);
    assert_eq!(complete(&["completions", "b"]), ["bash"]);
    assert_eq!(complete(&["name", "--type", "f"]), ["full"]);
    assert_eq!(complete(&["image", "bitmap", "en"]), ["enable"]);
    assert_eq!(complete(&["serve", "--config", "im"]), ["image.qcow2"]);
    // where only files are left to complete, nothing is what makes bash take them
    assert_eq!(complete(&["image", "info", "im"]), [""]);
    let registered =
        qemu::run(Command::new("bash").args(["-c", "source $1; complete -p cowgate", "bash"]).arg(&script));
    assert!(registered.contains("-o default"), "{registered}");
    for command in ["serve", "image", "name", "check-config", "completions"] {
        assert!(complete(&[""]).iter().any(|c| c == command), "{command}");
    }
    qemu::run(Command::new("bash").arg("-n").arg(script));
}

#[test]
fn zsh_and_fish_take_their_scripts() {
    let directory = tempfile::tempdir().unwrap();
    if let Some(script) = completions(directory.path(), "zsh") {
        qemu::run(Command::new("zsh").arg("-n").arg(&script));
        let load =
            "autoload -U compinit && compinit -D -u && source $1 && print ${_comps[cowgate]} $+functions[_cowgate]";
        let loaded = qemu::run(Command::new("zsh").args(["-f", "-c", load, "zsh"]).arg(&script));
        assert_eq!(loaded.trim(), "_cowgate 1");
    }
    if let Some(script) = completions(directory.path(), "fish") {
        let complete = |line: &str| {
            let load = "source $argv[1]; complete -C $argv[2]";
            let mut fish = Command::new("fish");
            fish.args(["--no-config", "-c", load]).arg(&script).arg(line);
            qemu::run(&mut fish).lines().map(|l| l.split('\t').next().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(complete("cowgate check"), ["check-config"]);
        assert_eq!(complete("cowgate name --type f"), ["full"]);
        assert_eq!(complete("cowgate serve --con"), ["--config"]);
    }
    assert_eq!(cowgate(&["completions", "tcsh"]).status.code(), Some(2));
}
