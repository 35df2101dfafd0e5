//! The block devices of the daemon, if it was built with them.

#[cfg(feature = "ublk")]
pub use crate::serve::ublk::Devices;

/// Ends restores that nobody else ends any more, where it can be done: a daemon in a mount namespace of its own, as
/// systemd's hardening makes one, would unmount nothing but its own view, and may be killed for the attempt
/// (SystemCallFilter).
#[cfg(feature = "ublk")]
pub(super) fn sweep() {
    if nix::unistd::geteuid().is_root() && mounts_are_the_machines() {
        crate::restore::end::sweep();
    }
}

/// Whether what this process mounts and unmounts is so for the machine. It may not be allowed to know.
#[cfg(feature = "ublk")]
fn mounts_are_the_machines() -> bool {
    let namespace = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    namespace("1").is_some_and(|machines| namespace("self") == Some(machines))
}

/// There can be none.
#[cfg(not(feature = "ublk"))]
pub(super) fn sweep() {}

#[cfg(not(feature = "ublk"))]
mod without {
    use crate::export::control::Resize;
    use crate::export::registry::Registry;
    use std::path::Path;
    use std::sync::Arc;
    use std::time::Duration;
    use tracing::error;

    /// No devices: this daemon was built without them.
    #[derive(Clone)]
    pub struct Devices {
        registry: Arc<Registry>,
    }

    impl Devices {
        /// None, for ever.
        pub fn new(registry: Arc<Registry>, _config: &Path) -> Devices {
            Devices { registry }
        }

        /// Says which exports are not what their configuration wants.
        pub fn follow(&self, _whole: bool) {
            for entry in self.registry.devices() {
                let name = &entry.export.config().name;
                error!("export {name:?}: no block device: this daemon was built without the feature ublk");
            }
        }

        /// There is nothing to resize.
        pub fn resize(&self, _name: &str, resize: Resize) {
            resize.answer(Err("there are no block devices: this daemon was built without the feature ublk".to_owned()));
        }

        /// There is nothing to wait for.
        pub fn stop(&self, _patience: Duration, _hand_over: bool) {}
    }
}

#[cfg(not(feature = "ublk"))]
pub use without::Devices;
