//! Two versions of libnbd: the machine's, and a newer one that speaks extended headers (tools/newer-libnbd loads it).

use super::qemu;
use std::path::Path;
use std::process::Command;

/// Which one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Libnbd {
    /// The machine's own.
    Installed,
    /// Debian 13's.
    Newer,
}

impl Libnbd {
    /// Each of them: what one can do, the other can.
    pub const BOTH: [Libnbd; 2] = [Libnbd::Installed, Libnbd::Newer];

    /// One of its programs.
    pub fn tool(self, program: &str) -> Command {
        match self {
            Libnbd::Installed => {
                let mut command = Command::new(program);
                // nbdsh takes the first python3 there is, and only the system's has the module
                let path = std::env::var("PATH").unwrap_or_default();
                command.env("PATH", format!("/usr/bin:{path}"));
                command
            }
            Libnbd::Newer => {
                let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/newer-libnbd"));
                command.arg(program);
                command
            }
        }
    }

    /// Runs one of its programs, which must succeed.
    #[track_caller]
    pub fn run(self, program: &str, args: &[&str]) -> String {
        qemu::run(self.tool(program).args(args))
    }

    /// Runs a Python program with `nbd`; what `args` holds is in `sys.argv[1:]`.
    #[track_caller]
    pub fn python(self, program: &str, args: &[&str]) -> String {
        let python = if self == Libnbd::Installed { "/usr/bin/python3" } else { "python3" };
        qemu::run(self.tool(python).args(["-c", program]).args(args))
    }
}
