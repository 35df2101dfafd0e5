//! `cowgate restore`: backups mounted from their images, in guests with stock Debian kernels (tools/vm); what is done there
//! is tests/clients/restore.sh.

mod common;

use common::guest;

fn in_guest(kernel: &str) {
    guest::run(&["--kernel", kernel, "--memory", "2048"], "restore.sh", &[]);
}

mod at_length {
    #[test]
    fn backups_are_mounted() {
        super::in_guest("6.12");
    }

    #[test]
    fn backups_are_mounted_by_the_newest_kernel() {
        super::in_guest("newest");
    }
}
