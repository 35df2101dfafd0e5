//! A restore's beginning: a process that is the block device, a look at what is on it, the mount.

use super::backend::{Backend, Shown};
use super::disk::Disk;
use super::end::Health;
use super::layout::{Content, Driver, Kind, Layout, drivers, wants_to_write};
use super::serve::Mounted;
use super::source::Source;
use super::state::{self, Entry, Phase, Process};
use super::{end, mounts, probe, serve};
use jiff::Timestamp;
use nix::errno::Errno;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use tracing::warn;

/// What is wanted.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The image.
    pub source: Source,
    /// Where to mount it; none: a directory that is made for it.
    pub at: Option<PathBuf>,
    /// The partition; none: the only thing that can be mounted.
    pub partition: Option<u32>,
    /// It can be written; what is written is thrown away.
    pub writable_scratch: bool,
    /// When it ends by itself.
    pub expires: Option<Timestamp>,
}

impl Wanted {
    fn entry(&self, mount_point: PathBuf, phase: Phase) -> Entry {
        Entry {
            id: String::new(),
            image: self.source.path.clone(),
            export: self.source.export.clone(),
            partition: None,
            file_system: None,
            disk: None,
            mount_point,
            writable_scratch: self.writable_scratch,
            layer: false,
            process: Process::this(),
            phase,
            created: Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            expires: self.expires.map(|moment| moment.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()),
        }
    }
}

/// Mounts an image, and says what else may have been meant. When it fails, nothing is left of it.
pub fn mount(wanted: &Wanted) -> Result<(Entry, Vec<String>), String> {
    serve::driver()?;
    let at = wanted.at.as_deref().map(directory).transpose()?;
    let Entry { id, mount_point: at, .. } = begin(wanted.entry(at.unwrap_or_default(), Phase::Starting))?;
    let mut backend = start(&id)?;
    let whole = backend.show(&wanted.source, None, false)?;
    let layout = probe::disk(&whole.disk.device, whole.size_bytes)?;
    let content = layout.choose(wanted.partition)?;
    let type_name = content.type_name.clone().unwrap_or_default();
    let drivers = drivers(&type_name);
    let mut attempt = Attempt { backend: &mut backend, source: &wanted.source, content, whole: Some(whole), drivers };
    let mut layer = wanted.writable_scratch;
    let disk = match attempt.mount(&at, layer, wanted.writable_scratch)? {
        Ok(disk) => disk,
        // it is to be recovered first, and nobody may write what is below
        Err(e) if !layer && wants_to_write(&type_name, e) => {
            layer = true;
            attempt.mount(&at, layer, false)?.map_err(|e| refused(content, e))?
        }
        Err(e) => return Err(refused(content, e)),
    };
    let mounted = Mounted { partition: content.partition, file_system: type_name, layer };
    let entry = backend.keep(mounted).inspect_err(|_| {
        // told to end just before it was mounted, the process found nothing to unmount
        if let Err(why) = mounts::unmount(&disk, true) {
            warn!("{why}");
        }
    })?;
    let others = if wanted.partition.is_none() { layout.out_of_reach() } else { Vec::new() };
    Ok((entry, others))
}

/// Makes the state of a restore. Two cannot begin at one directory: the second one finds the first one's state, or its
/// mount.
fn begin(entry: Entry) -> Result<Entry, String> {
    let failed = |e: io::Error| format!("{}: {e}", state::ROOT);
    let at = &entry.mount_point;
    let said = |what: String| format!("{}: {what}", at.display());
    let lock = state::lock().map_err(failed)?;
    if !at.as_os_str().is_empty() {
        let mut others = state::restores()?.into_iter().filter(|other| end::health(other) == Health::Starting);
        if let Some(other) = others.find(|other| other.mount_point == *at) {
            return Err(said(format!("restore {} is about to be mounted there; choose another directory", other.id)));
        }
        if mounts::is_mount_point(at).map_err(|e| said(e.to_string()))? {
            return Err(said("something is mounted there already; unmount it, or choose another directory".to_owned()));
        }
    }
    state::create(&lock, entry).map_err(failed)
}

fn start(id: &str) -> Result<Backend, String> {
    let directory = state::directory(id);
    Backend::start(&directory).inspect_err(|_| drop(state::remove(&directory)))
}

/// Attempts to mount one file system.
struct Attempt<'a> {
    backend: &'a mut Backend,
    source: &'a Source,
    content: &'a Content,
    /// The device of the whole disk, as long as it is there.
    whole: Option<Shown>,
    drivers: &'static [Driver],
}

impl Attempt<'_> {
    /// The disk that is mounted, or the kernel's answer. `layer`: with a temporary layer over the image.
    fn mount(&mut self, at: &Path, layer: bool, writable: bool) -> Result<Result<Disk, Errno>, String> {
        let shown = match self.whole.take() {
            Some(whole) if self.content.partition.is_none() && !layer => whole,
            _ => {
                let place = self.content.place();
                let window = self.content.partition.map(|_| (place.start().0, place.len()));
                self.backend.show(self.source, window, layer)?
            }
        };
        Ok(mounts::attach(&shown.disk.device, at, self.drivers, writable).map(|()| shown.disk))
    }
}

fn refused(content: &Content, e: Errno) -> String {
    let (what, name) = (content.what(), content.type_name.as_deref().unwrap_or_default());
    match e {
        Errno::ENODEV => {
            let drivers: Vec<&str> = drivers(name).iter().map(|driver| driver.name).collect();
            format!("this kernel has no driver for {name}, which {what} needs: see modprobe {}", drivers.join(" or "))
        }
        Errno::EEXIST | Errno::EBUSY => {
            format!("the kernel does not mount {what} ({name}): {e}; is the original of this file system mounted here?")
        }
        _ => format!("the kernel does not mount {what} ({name}): {e}; dmesg says why"),
    }
}

/// A directory that was named, without links.
fn directory(at: &Path) -> Result<PathBuf, String> {
    let said = |what: &str| format!("{}: {what}", at.display());
    let at = fs::canonicalize(at).map_err(|e| said(&format!("{e}; the directory to mount at has to be there")))?;
    if at.is_dir() { Ok(at) } else { Err(said("this is no directory")) }
}

/// What is on a disk. Nothing is left of the look.
pub fn inspect(source: &Source) -> Result<Layout, String> {
    serve::driver()?;
    let wanted = Wanted { source: source.clone(), at: None, partition: None, writable_scratch: false, expires: None };
    let mut backend = start(&begin(wanted.entry(PathBuf::new(), Phase::Inspecting))?.id)?;
    let whole = backend.show(source, None, false)?;
    let mut layout = probe::disk(&whole.disk.device, whole.size_bytes)?;
    for content in layout.contents.iter_mut().filter(|content| content.kind == Kind::Lvm) {
        let window = content.partition.map(|_| (content.start_bytes, content.size_bytes));
        let shown = backend.show(source, window, false)?;
        match probe::volumes(&shown.disk.device) {
            Ok((group, volumes)) => {
                content.volume_group = Some(group);
                content.logical_volumes = volumes;
            }
            Err(why) => content.note = Some(format!("an LVM physical volume; its volume group is not known: {why}")),
        }
    }
    Ok(layout)
}
