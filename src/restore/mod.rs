//! Backups mounted without being written: `cowgate restore`.
//!
//! - [`source`]: which image is meant, and how it is opened
//! - [`layout`]: what is on a disk and which part of it is mounted, pure; [`probe`]: the tools that look
//! - [`serve`]: the background process that is the block device; [`backend`]: its end in the command
//! - [`udev`]: whether it will look into the disk
//! - [`state`]: what is known of each restore, in files, so that it can be ended when its process has died
//! - [`disk`]: a block device and no later one of its number; [`mounts`]: the kernel's mounts; [`mount`], [`end`]: the life of a restore from the command's side
//!
//! Promises: nothing is written to an image; the kernel looks for no partitions on a disk, and is given no file system
//! that was not asked for; a mount that fails leaves nothing behind. The command mounts, so that the mount is in its
//! caller's namespace. The background process serves until nobody has the device open any more.

pub mod backend;
pub mod disk;
pub mod end;
pub mod expiry;
pub mod layout;
pub mod mount;
pub mod mounts;
pub mod probe;
pub mod serve;
pub mod source;
pub mod state;
pub mod udev;
