//! What this machine's ublk driver has: whether it is there, which devices it knows, who has one of them open.

use super::control::{self, CONTROL};
use super::params::SECTOR;
use super::record;
use crate::image::mountinfo::{self, Mount};
use caps::{CapSet, Capability};
use libublk::ctrl::UblkCtrl;
use libublk::{UblkError, sys};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CString, OsStr};
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// Where names of exports lead to their devices.
pub const BY_NAME: &str = "/dev/cowgate/by-name";

/// What the devices of this program are known by: the driver keeps it for us.
pub(super) const OURS: u64 = u64::from_be_bytes(*b"cowgate\0");

/// Why there can be no devices.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NoDriver {
    /// The module is not loaded, or this kernel has none.
    #[error("there is no {CONTROL}: load the driver with modprobe ublk_drv (Linux 6.0 and later)")]
    Absent,
    /// We may not use it.
    #[error("{CONTROL} cannot be opened: {0}; the daemon has to be root for block devices")]
    Forbidden(String),
    /// The driver lacks something that is needed.
    #[error("this kernel's ublk driver is too old: it has no UBLK_F_USER_COPY (Linux 6.5 and later)")]
    TooOld,
}

/// Whether the driver is loaded.
pub(super) fn is_there() -> bool {
    Path::new(CONTROL).exists()
}

/// What the driver can do, a set of `UBLK_F_`.
pub(super) fn features() -> Result<u64, NoDriver> {
    if !is_there() {
        return Err(NoDriver::Absent);
    }
    if let Err(e) = OpenOptions::new().read(true).write(true).open(CONTROL) {
        return Err(NoDriver::Forbidden(e.to_string()));
    }
    let features = UblkCtrl::get_features().ok_or(NoDriver::TooOld)?;
    match features & u64::from(sys::UBLK_F_USER_COPY) {
        0 => Err(NoDriver::TooOld),
        _ => Ok(features),
    }
}

/// What of the driver's features a device is to use. `zero_copy`: where the driver has it; `lasting`: the device outlives
/// its daemon.
pub(super) fn flags(features: u64, zero_copy: bool, lasting: bool) -> u64 {
    let moved = if zero_copy { features & u64::from(sys::UBLK_F_AUTO_BUF_REG) } else { 0 };
    let recovery = match lasting {
        // what was under way when the daemon died is asked for again: doing it twice does no harm
        true => {
            u64::from(sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE)
                | features & u64::from(sys::UBLK_F_QUIESCE | sys::UBLK_F_UPDATE_SIZE)
        }
        false => 0,
    };
    // always: what cannot be moved without a copy gets copied
    u64::from(sys::UBLK_F_USER_COPY) | recovery | moved
}

/// Features of the driver that concern what this program does or may do, by their names in `ublk_cmd.h` without UBLK_F.
const NAMED: [(u32, &str); 9] = [
    (sys::UBLK_F_USER_COPY, "USER_COPY"),
    (sys::UBLK_F_SUPPORT_ZERO_COPY, "SUPPORT_ZERO_COPY"),
    (sys::UBLK_F_AUTO_BUF_REG, "AUTO_BUF_REG"),
    (sys::UBLK_F_USER_RECOVERY, "USER_RECOVERY"),
    (sys::UBLK_F_USER_RECOVERY_REISSUE, "USER_RECOVERY_REISSUE"),
    (sys::UBLK_F_UPDATE_SIZE, "UPDATE_SIZE"),
    (sys::UBLK_F_QUIESCE, "QUIESCE"),
    (sys::UBLK_F_PER_IO_DAEMON, "PER_IO_DAEMON"),
    (sys::UBLK_F_BATCH_IO, "BATCH_IO"),
];

/// The names of the driver's features.
pub fn feature_names() -> Result<Vec<&'static str>, NoDriver> {
    let features = features()?;
    Ok(NAMED.iter().filter(|(flag, _)| features & u64::from(*flag) != 0).map(|(_, name)| *name).collect())
}

/// How the data of a device's requests moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Data {
    /// Without a copy, as far as the image makes it possible.
    #[serde(rename = "zero copy")]
    ZeroCopy,
    /// Its daemon copies it.
    #[serde(rename = "user copy")]
    UserCopy,
    /// The driver copies it to its daemon's buffers.
    #[serde(rename = "buffers")]
    Buffers,
}

impl Data {
    fn of(flags: u64) -> Data {
        let has = |flags_of: u32| flags & u64::from(flags_of) != 0;
        match (has(sys::UBLK_F_AUTO_BUF_REG | sys::UBLK_F_SUPPORT_ZERO_COPY), has(sys::UBLK_F_USER_COPY)) {
            (true, _) => Data::ZeroCopy,
            (false, true) => Data::UserCopy,
            (false, false) => Data::Buffers,
        }
    }
}

impl fmt::Display for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Data::ZeroCopy => "zero copy",
            Data::UserCopy => "user copy",
            Data::Buffers => "buffers",
        })
    }
}

/// A device of this machine, whoever made it.
#[derive(Clone, Debug, Serialize)]
pub struct Listed {
    /// Its number.
    pub id: u32,
    /// The export that it is, as far as there is a link from its name.
    pub export: Option<String>,
    /// The block device; `None`: it was not started, or has no daemon any more.
    pub device: Option<PathBuf>,
    /// Size in bytes.
    pub size_bytes: Option<u64>,
    /// Somebody has it open. A process that we may not look into is not seen.
    pub in_use: bool,
    /// The process that serves it; `None`: whoever uses it waits for one, or gets errors. One that we may not look into is
    /// not seen.
    pub daemon: Option<u32>,
    /// How its data moves; `None`: the driver does not say so to us.
    pub data: Option<Data>,
    /// Its queues.
    pub queues: Option<u16>,
}

/// The devices of the driver, by their numbers.
pub fn list() -> io::Result<Vec<Listed>> {
    let names = names();
    let mut found = Vec::new();
    for id in ids()? {
        let device = Some(node(id)).filter(|node| node.exists());
        let in_use = device.is_some() && is_used(id);
        let size_bytes = size(id);
        let daemon = character(id).and_then(|number| holder(libc::S_IFCHR, &[number]).unwrap_or_default());
        let info = control::info(id).ok();
        let (data, queues) = (info.map(|info| Data::of(info.flags)), info.map(|info| info.nr_hw_queues));
        let export = names.get(&id).cloned();
        found.push(Listed { id, export, device, size_bytes, in_use, daemon, data, queues });
    }
    Ok(found)
}

/// Why a device is still there.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// There can be none.
    #[error(transparent)]
    NoDriver(#[from] NoDriver),
    /// It was not made by this program.
    #[error("ublk device {0} was not made by cowgate; its own program can delete it")]
    Foreign(u32),
    /// Somebody has it open.
    #[error("{} is in use: unmount it first; or let all that use it get errors with --force", node(*.0).display())]
    InUse(u32),
    /// The driver refuses.
    #[error("ublk device {id}: {}", explain(source))]
    Driver {
        /// The device.
        id: u32,
        /// Why.
        source: UblkError,
    },
    /// There is none.
    #[error("there is no ublk device {0}; cowgate ublk list shows those that there are")]
    Unknown(u32),
}

/// What a failure of the driver or of libublk is, with the kernel's reason, which libublk does not name.
pub(super) fn explain(error: &UblkError) -> String {
    match error {
        UblkError::UringIOError(errno) | UblkError::OtherError(errno) => {
            io::Error::from_raw_os_error(-errno).to_string()
        }
        UblkError::IOError(e) => e.to_string(),
        other => other.to_string(),
    }
}

/// The answer to an order, of which libublk takes EBUSY for none of failure.
pub(super) fn done(answer: Result<i32, UblkError>) -> Result<(), UblkError> {
    match answer? {
        errno if errno < 0 => Err(UblkError::UringIOError(errno)),
        _ => Ok(()),
    }
}

/// Deletes a device of ours, whether its daemon lives or not. `force`: also one that is in use.
pub fn delete(id: u32, force: bool) -> Result<(), DeleteError> {
    features()?;
    let failed = |source| DeleteError::Driver { id, source };
    if !exists(id) {
        return Err(DeleteError::Unknown(id));
    }
    let control = UblkCtrl::new_simple(id as i32).map_err(failed)?; // numbers are below 2^20
    if control.dev_info().ublksrv_flags != OURS {
        return Err(DeleteError::Foreign(id));
    }
    // what cannot be opened any more is used by nobody
    let claim = if force { None } else { Unused::claim(id).unwrap_or_default() };
    if !force && claim.is_none() && node(id).exists() {
        return Err(DeleteError::InUse(id));
    }
    control.kill_dev().map_err(failed)?;
    drop(claim);
    forget_links(id);
    remove(&control).map_err(failed)?;
    record::forget(id);
    Ok(())
}

/// The numbers of the driver's devices.
fn ids() -> io::Result<Vec<u32>> {
    let devices = match fs::read_dir("/sys/class/ublk-char") {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        devices => devices?,
    };
    let id = |name: &OsStr| name.to_str().and_then(|name| name.strip_prefix("ublkc")?.parse::<u32>().ok());
    let mut ids: Vec<u32> = devices.flatten().filter_map(|device| id(&device.file_name())).collect();
    ids.sort_unstable();
    Ok(ids)
}

/// The exports that have links, by the numbers of their devices.
fn names() -> BTreeMap<u32, String> {
    links().filter_map(|(link, id)| Some((id, link.file_name()?.to_str()?.to_owned()))).collect()
}

/// The links of exports, and the devices that they lead to.
fn links() -> impl Iterator<Item = (PathBuf, u32)> {
    let links = fs::read_dir(BY_NAME).into_iter().flatten().flatten().map(|link| link.path());
    links.filter_map(|link| Some((target(&link)?, link))).map(|(id, link)| (link, id))
}

/// The device that a link leads to, which may have gone.
fn target(link: &Path) -> Option<u32> {
    fs::read_link(link).ok()?.to_str()?.rsplit('/').next()?.strip_prefix("ublkb")?.parse().ok()
}

/// Removes the links to a device that has gone: another one may get its number.
pub(super) fn forget_links(id: u32) {
    for (link, _) in links().filter(|(_, to)| *to == id) {
        let _ = fs::remove_file(link); // another daemon may have done so
    }
}

/// How long the driver may take to notice that a daemon has gone. When all commands of a queue carry requests, Linux 6.12
/// notices when one of these is 30 s old by the block layer's coarse clock.
const NOTICE: Duration = Duration::from_secs(45);
/// How often something that takes a moment is looked at.
pub(super) const ASK: Duration = Duration::from_millis(20);

/// Clears away after daemons that have gone: deletes their devices, and links that lead nowhere. Returns the devices that
/// wait for another daemon.
pub(super) fn sweep() -> Vec<u32> {
    for (link, _) in links().filter(|(link, _)| !link.exists()) {
        let _ = fs::remove_file(link); // another daemon may have done so
    }
    let ids = ids().unwrap_or_default();
    record::forget_all_but(&ids);
    ids.into_iter().filter(|id| waits_for_daemon(*id)).collect()
}

/// Whether a device of ours has no daemon and waits for another one. One that has none and does not wait is deleted.
fn waits_for_daemon(id: u32) -> bool {
    let deadline = Instant::now() + NOTICE;
    loop {
        let info = match control::info(id) {
            Ok(info) => info,
            Err(e) => {
                warn!("ublk device {id} cannot be looked at, and stays as it is: {e}");
                return false;
            }
        };
        if info.ublksrv_flags != OURS || is_served(id, info.ublksrv_pid) {
            return false;
        }
        match u32::from(info.state) {
            sys::UBLK_S_DEV_QUIESCED => return true,
            sys::UBLK_S_DEV_LIVE if Instant::now() < deadline => thread::sleep(ASK),
            sys::UBLK_S_DEV_LIVE => {
                warn!(
                    "ublk device {id}: the driver takes it for served, and nobody is seen to serve it; it stays as it is"
                );
                return false;
            }
            _ => {
                info!("ublk device {id}: its daemon has gone, and it does not wait for another one");
                discard(id);
                return false;
            }
        }
    }
}

/// Whether a process other than this one serves a device, as far as we may know.
fn is_served(id: u32, pid: i32) -> bool {
    let (Ok(pid), Some(number)) = (u32::try_from(pid), character(id)) else { return false };
    let open = || match has_open(pid, libc::S_IFCHR, &[number]) {
        Err(e) => e.kind() != io::ErrorKind::NotFound,
        Ok(open) => open,
    };
    pid != 0 && pid != std::process::id() && open()
}

/// Whether the driver has a device of this number, which may have no block device.
pub(super) fn exists(id: u32) -> bool {
    character(id).is_some()
}

/// The number of a device's character device, as `major:minor`.
fn character(id: u32) -> Option<String> {
    Some(fs::read_to_string(format!("/sys/class/ublk-char/ublkc{id}/dev")).ok()?.trim().to_owned())
}

/// Deletes a device that nobody serves and nobody is to go on with; what uses it gets errors.
pub(super) fn discard(id: u32) {
    forget_links(id);
    let deleted = UblkCtrl::new_simple(id as i32).and_then(|control| {
        let _ = control.kill_dev(); // it may never have been started
        remove(&control)
    });
    record::forget(id);
    match deleted {
        Ok(()) => info!("ublk device {id}: deleted"),
        Err(e) => warn!("ublk device {id} cannot be deleted: {}", explain(&e)),
    }
}

/// Deletes a device that was stopped. It does not wait for those who still have it open, if the driver is of Linux 6.9 or
/// later: they get errors as long as they like.
pub(super) fn remove(control: &UblkCtrl) -> Result<(), UblkError> {
    done(control.del_dev_async()).or_else(|_| done(control.del_dev()))
}

/// Size in bytes of a device that was started.
pub(super) fn size(id: u32) -> Option<u64> {
    let sectors = fs::read_to_string(format!("/sys/block/ublkb{id}/size")).ok()?;
    sectors.trim().parse::<u64>().ok()?.checked_mul(SECTOR)
}

/// The block device of this number.
pub(super) fn node(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

/// A device that nobody else has mounted or otherwise to himself, for as long as this lives: and nobody can meanwhile.
#[derive(Debug)]
pub(super) struct Unused {
    _file: File,
}

impl Unused {
    /// `None`: somebody has the device open.
    pub(super) fn claim(id: u32) -> io::Result<Option<Unused>> {
        let node = node(id);
        let exclusive = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&node);
        let file = match exclusive {
            Ok(file) => file,
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Ok(None),
            Err(e) => return Err(e),
        };
        let numbers = numbers(&disk_and_parts(id));
        Ok((!is_open(&node, &numbers)?).then_some(Unused { _file: file }))
    }
}

/// Whether somebody has a device open or mounted, or another device is on it. Unlike [`Unused::claim`] this is in nobody's
/// way, not even for a moment.
pub(super) fn is_used(id: u32) -> bool {
    let node = &node(id);
    let parts = disk_and_parts(id);
    let numbers = numbers(&parts);
    let held = |part: &PathBuf| fs::read_dir(part.join("holders")).is_ok_and(|mut holders| holders.next().is_some());
    let is_swap = || mountinfo::swaps().is_ok_and(|spaces| spaces.iter().any(|space| space == node));
    parts.iter().any(held) || is_swap() || is_open(node, &numbers).unwrap_or(true) || is_mounted(node, &numbers)
}

/// The directories in /sys of a device and its partitions.
fn disk_and_parts(id: u32) -> Vec<PathBuf> {
    let disk = PathBuf::from(format!("/sys/block/ublkb{id}"));
    let parts = fs::read_dir(&disk).into_iter().flatten().flatten().map(|entry| entry.path());
    parts.filter(|path| path.join("partition").exists()).chain([disk.clone()]).collect()
}

/// The numbers of a device and its partitions, as `major:minor`.
fn numbers(disk_and_parts: &[PathBuf]) -> Vec<String> {
    let number = |part: &PathBuf| Some(fs::read_to_string(part.join("dev")).ok()?.trim().to_owned());
    disk_and_parts.iter().filter_map(number).collect()
}

/// Whether a process other than this one has a device or a part of it open, or a loop device is on it. `numbers`: theirs, as
/// `major:minor`. Errors: that cannot be found out.
fn is_open(node: &Path, numbers: &[String]) -> io::Result<bool> {
    Ok(holder(libc::S_IFBLK, numbers)?.is_some() || has_loop(node))
}

/// Whether a loop device is on a device or a part of it: the kernel's own files are no process's.
fn has_loop(node: &Path) -> bool {
    let disks = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let files = disks.filter_map(|disk| fs::read_to_string(disk.path().join("loop/backing_file")).ok());
    let node = node.to_str().unwrap_or_default();
    files.into_iter().any(|file| is_node_of(file.trim_end(), node))
}

/// Whether a path is that of a device or of a part of it.
fn is_node_of(path: &str, node: &str) -> bool {
    let part = path.strip_prefix(node).and_then(|rest| rest.strip_prefix('p'));
    path == node || part.is_some_and(|part| part.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether a device or a part of it is mounted, in the eyes of any process. `numbers`: theirs, as `major:minor`.
fn is_mounted(node: &Path, numbers: &[String]) -> bool {
    let mut seen = BTreeSet::new();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten().map(|process| process.path());
    let mut tables = processes.filter_map(|process| {
        let new = seen.insert(fs::read_link(process.join("ns/mnt")).ok()?);
        if new { mountinfo::of_process(&process).ok() } else { None }
    });
    let node = node.to_str().unwrap_or_default();
    tables.any(|mounts| mounts.iter().any(|mount| is_mount_of(mount, node, numbers)))
}

/// File systems with numbers of their own (btrfs) say by the source what they are on.
fn is_mount_of(mount: &Mount, node: &str, numbers: &[String]) -> bool {
    numbers.contains(&mount.number) || is_node_of(mount.source.to_str().unwrap_or_default(), node)
}

/// A process other than this one that has one of these devices open, a kind and numbers as `major:minor`. One that we may
/// not look into is not seen: that takes CAP_SYS_PTRACE.
fn holder(kind: libc::mode_t, numbers: &[String]) -> io::Result<Option<u32>> {
    let mut found = None;
    for process in fs::read_dir("/proc")? {
        let pid = process?.file_name().to_str().and_then(|name| name.parse().ok());
        let Some(pid) = pid.filter(|pid| *pid != std::process::id()) else { continue };
        if has_open(pid, kind, numbers).is_ok_and(|open| open) {
            found = Some(pid);
            break;
        }
    }
    Ok(found)
}

/// Says so when it cannot be seen who has devices open, which they are not deleted under.
pub(super) fn warn_of_blindness() {
    if !caps::has_cap(None, CapSet::Effective, Capability::CAP_SYS_PTRACE).unwrap_or(true) {
        warn!(
            "without CAP_SYS_PTRACE it cannot be seen which other users' programs have block devices open; a device that \
             is removed goes when it is not mounted"
        );
    }
}

/// Whether a process has one of these devices open. Errors: it has gone, or we may not know.
fn has_open(pid: u32, kind: libc::mode_t, numbers: &[String]) -> io::Result<bool> {
    let mut descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
    Ok(descriptors.any(|fd| device_of(&fd.path(), kind).is_some_and(|number| numbers.contains(&number))))
}

/// The number of a device of this kind, as `major:minor`. Waits for nobody, such as a file server that does not answer.
fn device_of(path: &Path, kind: libc::mode_t) -> Option<String> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    // SAFETY: plain numbers, for which zeroes are a value.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends with a zero, and `found` is what the call fills in; both live until it returns.
    let answer = unsafe {
        libc::statx(libc::AT_FDCWD, path.as_ptr(), libc::AT_STATX_DONT_SYNC, libc::STATX_TYPE, &raw mut found)
    };
    let is_one = answer == 0 && u32::from(found.stx_mode) & libc::S_IFMT == kind;
    is_one.then(|| format!("{}:{}", found.stx_rdev_major, found.stx_rdev_minor))
}

/// A link from an export's name to its device, for as long as this lives.
#[derive(Debug)]
pub(super) struct Link {
    path: PathBuf,
    id: u32,
}

impl Link {
    /// Makes it. Errors: it is that of another device, among others.
    pub(super) fn make(export: &str, id: u32) -> io::Result<Link> {
        fs::create_dir_all(BY_NAME)?;
        let path = Path::new(BY_NAME).join(link_name(export));
        if let Some(other) = target(&path).filter(|other| *other != id && node(*other).exists()) {
            let why = format!("{} leads to {}", path.display(), node(other).display());
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
        }
        let fresh = Path::new(BY_NAME).join(format!(".{id}"));
        let _ = fs::remove_file(&fresh); // one that a former daemon left
        std::os::unix::fs::symlink(format!("../../ublkb{id}"), &fresh)?;
        fs::rename(&fresh, &path)?;
        Ok(Link { path, id })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if target(&self.path) == Some(self.id) {
            let _ = fs::remove_file(&self.path); // somebody else may have done so
        }
    }
}

/// The name as udev writes it: what cannot stand in the name of a file, or could be mistaken for something else, as `\xNN`.
fn link_name(export: &str) -> String {
    let mut name = String::with_capacity(export.len());
    for c in export.chars() {
        match c {
            c if c.is_alphanumeric() || "#+-.:=@_".contains(c) => name.push(c),
            c => {
                let mut bytes = [0; 4];
                name.extend(c.encode_utf8(&mut bytes).bytes().map(|byte| format!("\\x{byte:02x}")));
            }
        }
    }
    match &name[..] {
        // neither hidden nor a way up
        _ if name.starts_with('.') => format!("\\x2e{}", &name[1..]),
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_stay_in_their_directory() {
        assert_eq!(link_name("backup-ctx-disk1-full"), "backup-ctx-disk1-full");
        assert_eq!(link_name("a/b c\\d"), r"a\x2fb\x20c\x5cd");
        assert_eq!((link_name("..").as_str(), link_name(".x").as_str()), (r"\x2e.", r"\x2ex"));
        assert_eq!(link_name("müller"), "müller");
    }

    #[test]
    fn mounts_of_a_device_are_told_from_others() {
        let line = |number, source| format!("36 35 {number} / /mnt rw,relatime shared:1 - ext4 {source} rw");
        let any_is_ours = |lines: String| {
            let numbers = ["259:1".into(), "259:2".into()];
            mountinfo::parse(lines.as_bytes()).iter().any(|mount| is_mount_of(mount, "/dev/ublkb1", &numbers))
        };
        let is_ours = |number, source| any_is_ours(line(number, source));
        assert!(is_ours("259:1", "/dev/root") && is_ours("0:45", "/dev/ublkb1") && is_ours("0:45", "/dev/ublkb1p2"));
        assert!(!is_ours("259:11", "/dev/ublkb1x") && !is_ours("0:45", "/dev/ublkb12"));
        assert!(!any_is_ours(String::new()));
    }

    #[test]
    fn a_device_uses_what_the_driver_has() {
        let (copy, auto) = (u64::from(sys::UBLK_F_USER_COPY), u64::from(sys::UBLK_F_AUTO_BUF_REG));
        let again = u64::from(sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE);
        let all = copy | auto | again | u64::from(sys::UBLK_F_BATCH_IO);
        assert_eq!((flags(all, true, false), flags(all, false, false)), (copy | auto, copy));
        assert_eq!((flags(all, true, true), flags(copy | again, true, true)), (copy | auto | again, copy | again));
        let hold = u64::from(sys::UBLK_F_QUIESCE);
        assert_eq!((flags(all | hold, false, false), flags(all | hold, false, true)), (copy, copy | again | hold));
        assert_eq!(
            (Data::of(copy | auto), Data::of(copy), Data::of(0)),
            (Data::ZeroCopy, Data::UserCopy, Data::Buffers)
        );
    }
}
