//! A restore's beginning: a process that is the block device, a look at what is on it, the mount.

use super::backend::{Backend, Shown};
use super::layout::{Content, Driver, Kind, Layout, drivers};
use super::source::Source;
use super::state::{self, Entry, Phase, Process};
use super::{mounts, probe, serve};
use jiff::Timestamp;
use nix::errno::Errno;
use std::fs;
use std::path::{Path, PathBuf};

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
    fn entry(&self, mount_point: PathBuf) -> Entry {
        Entry {
            id: String::new(),
            image: self.source.path.clone(),
            export: self.source.export.clone(),
            partition: None,
            file_system: None,
            device: None,
            mount_point,
            writable_scratch: self.writable_scratch,
            layer: false,
            process: Process::this(),
            phase: Phase::Starting,
            created: Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            expires: self.expires.map(|moment| moment.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()),
        }
    }
}

/// Mounts an image. When it fails, nothing is left of it.
pub fn mount(wanted: &Wanted) -> Result<Entry, String> {
    serve::driver()?;
    let at = wanted.at.as_deref().map(mount_point).transpose()?;
    let mut entry = state::create(wanted.entry(at.unwrap_or_default()))?;
    let directory = state::directory(&entry.id);
    let mut backend = Backend::start(&directory).inspect_err(|_| drop(state::remove(&directory)))?;
    let whole = backend.show(&wanted.source, None, false)?;
    let layout = probe::disk(&whole.node, whole.size_bytes)?;
    let content = layout.choose(wanted.partition)?;
    let type_name = content.type_name.clone().unwrap_or_default();
    let drivers = drivers(&type_name);
    let mut attempt = Attempt { backend: &mut backend, source: &wanted.source, content, whole: Some(whole), drivers };
    let at = entry.mount_point.clone();
    entry.layer = wanted.writable_scratch;
    let device = match attempt.mount(&at, wanted.writable_scratch, wanted.writable_scratch)? {
        Ok(device) => device,
        // it is to be recovered first, and nobody may write what is below
        Err(Errno::EROFS) if !wanted.writable_scratch => {
            entry.layer = true;
            attempt.mount(&at, true, false)?.map_err(|e| refused(content, e))?
        }
        Err(e) => return Err(refused(content, e)),
    };
    entry.partition = content.partition;
    entry.file_system = Some(type_name);
    entry.device = Some(device);
    entry.phase = Phase::Mounted;
    if let Err(why) = backend.keep(entry.clone()) {
        let _ = mounts::detach(&at, true); // the process did so, unless it died
        return Err(why);
    }
    Ok(entry)
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
    /// The device that is mounted, or the kernel's answer. `layer`: with a temporary layer over the image.
    fn mount(&mut self, at: &Path, layer: bool, writable: bool) -> Result<Result<PathBuf, Errno>, String> {
        let device = match self.whole.take() {
            Some(whole) if self.content.partition.is_none() && !layer => whole,
            _ => {
                let place = self.content.place();
                let window = self.content.partition.map(|_| (place.start().0, place.len()));
                self.backend.show(self.source, window, layer)?
            }
        };
        Ok(mounts::attach(&device.node, at, self.drivers, writable).map(|()| device.node))
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

/// Checks a directory that was named.
fn mount_point(at: &Path) -> Result<PathBuf, String> {
    let said = |what: &str| format!("{}: {what}", at.display());
    let at = fs::canonicalize(at).map_err(|e| said(&format!("{e}; the directory to mount at has to be there")))?;
    if !at.is_dir() {
        return Err(said("this is no directory"));
    }
    if mounts::is_mount_point(&at).map_err(|e| said(&e.to_string()))? {
        return Err(said("something is mounted there already; unmount it, or choose another directory"));
    }
    Ok(at)
}

/// What is on a disk. Nothing is left of the look.
pub fn inspect(source: &Source) -> Result<Layout, String> {
    serve::driver()?;
    let wanted = Wanted { source: source.clone(), at: None, partition: None, writable_scratch: false, expires: None };
    let entry = state::create(wanted.entry(PathBuf::new()))?;
    let directory = state::directory(&entry.id);
    let mut backend = Backend::start(&directory).inspect_err(|_| drop(state::remove(&directory)))?;
    let whole = backend.show(source, None, false)?;
    let mut layout = probe::disk(&whole.node, whole.size_bytes)?;
    for content in layout.contents.iter_mut().filter(|content| content.kind == Kind::Lvm) {
        let window = content.partition.map(|_| (content.start_bytes, content.size_bytes));
        let device = backend.show(source, window, false)?;
        match probe::volumes(&device.node) {
            Ok((group, volumes)) => {
                content.volume_group = Some(group);
                content.logical_volumes = volumes;
            }
            Err(why) => content.note = Some(format!("an LVM physical volume; its volume group is not known: {why}")),
        }
    }
    Ok(layout)
}
