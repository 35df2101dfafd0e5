//! Whether udev will look into the disks of restores: it does so with every block device unless a rule says otherwise.

use std::fs;
use std::path::Path;

/// Where udev reads its rules.
const RULES: [&str; 4] = ["etc/udev/rules.d", "run/udev/rules.d", "usr/lib/udev/rules.d", "lib/udev/rules.d"];

/// What there is to fear of udev on this machine, if anything. `root`: the machine's `/`.
pub fn warning(root: &Path) -> Option<&'static str> {
    (root.join("run/udev/control").exists() && !has_rule(root)).then_some(
        "udev looks into this disk: links in /dev/disk may lead to the backup, and LVM may activate its volume groups; \
         install docs/udev/60-cowgate.rules to keep it from that",
    )
}

/// Whether there is a rule for our disks, by whatever name that has ours in it.
fn has_rule(root: &Path) -> bool {
    let files = RULES.iter().filter_map(|directory| fs::read_dir(root.join(directory)).ok()).flatten().flatten();
    files.filter_map(|file| file.file_name().into_string().ok()).any(|name| {
        let stem = name.strip_suffix(".rules");
        stem.is_some_and(|stem| stem.contains("cowgate"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_with_udev_needs_the_rule() {
        let root = tempfile::tempdir().unwrap();
        let make = |path: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        };
        assert_eq!(warning(root.path()), None, "there is no udev");
        make("run/udev/control");
        make("etc/udev/rules.d/60-cowgate.rules.old");
        assert!(warning(root.path()).unwrap().contains("60-cowgate.rules"));
        make("usr/lib/udev/rules.d/60-cowgate.rules");
        assert_eq!(warning(root.path()), None);
    }
}
