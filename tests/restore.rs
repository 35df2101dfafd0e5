//! `cowgate restore`: backups mounted from their images, in guests with stock Debian kernels (tools/vm); what is done there
//! is tests/clients/restore.sh.

mod common;

use common::guest;

fn in_guest(kernel: &str) {
    guest::run(&["--kernel", kernel, "--memory", "2048"], "restore.sh", &[]);
}

#[test]
fn backups_are_mounted() {
    in_guest("newest");
}

mod at_length {
    #[test]
    fn backups_are_mounted_by_an_older_kernel() {
        super::in_guest("6.12");
    }
}
