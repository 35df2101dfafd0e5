//! Looks at a disk with the tools of util-linux, and of LVM where they are installed. They read the device that they are
//! given and nothing else; no part of the disk is made known to the kernel.

use super::layout::{Content, Layout, LogicalVolume, Signature, parse_signature, parse_table};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output};

/// Where administrators' programs are, which the caller's PATH may leave out.
const ADMIN_PATH: &str = "/usr/sbin:/sbin";
/// Most partitions that are looked at: a GPT has 128 unless somebody wants trouble.
const MAX_PARTITIONS: usize = 256;
/// blkid found nothing.
const NOTHING: i32 = 2;
/// blkid found several things that contradict each other.
const AMBIVALENT: i32 = 8;

/// What is on a disk.
pub fn disk(device: &Path, size_bytes: u64) -> Result<Layout, String> {
    let whole = signature(device, None)?;
    let partitions = match whole.table.as_ref().map(|_| partitions(device, size_bytes)) {
        // what was taken for a table may be a part of the file system
        Some(Err(_)) if whole.kind.is_some() => None,
        Some(found) => Some(found?).filter(|(_, found)| whole.kind.is_none() || !found.is_empty()),
        None => None,
    };
    Ok(Layout::new(size_bytes, whole, partitions))
}

/// The kind of a partition table, and the partitions.
fn partitions(device: &Path, size_bytes: u64) -> Result<(String, Vec<Content>), String> {
    let mut command = tool("sfdisk");
    let said = run(command.arg("--json").arg(device), "fdisk")?;
    if !said.status.success() {
        return Err(format!("the partition table cannot be read: {}", words(&said.stderr)));
    }
    let (table, partitions) = parse_table(&String::from_utf8_lossy(&said.stdout), size_bytes)?;
    if partitions.len() > MAX_PARTITIONS {
        return Err(format!("the partition table has {} partitions, more than {MAX_PARTITIONS}", partitions.len()));
    }
    let contents = partitions.iter().map(|partition| {
        let found = signature(device, Some((partition.start, partition.len)))?;
        Ok(Content::partition(partition, found))
    });
    Ok((table, contents.collect::<Result<_, String>>()?))
}

/// What blkid finds on a device, or a part of it.
fn signature(device: &Path, part: Option<(u64, u64)>) -> Result<Signature, String> {
    let mut command = tool("blkid");
    command.args(["--probe", "--output", "udev"]);
    if let Some((start, len)) = part {
        command.args(["--offset", &start.to_string(), "--size", &len.to_string()]);
    }
    let said = run(command.arg(device), "util-linux")?;
    match said.status.code() {
        Some(0) => Ok(parse_signature(&String::from_utf8_lossy(&said.stdout))),
        Some(NOTHING) if said.stderr.is_empty() => Ok(Signature::default()),
        Some(AMBIVALENT) => Ok(Signature { kind: Some("ambivalent".to_owned()), ..Signature::default() }),
        _ => Err(format!("blkid cannot look at {}: {}", device.display(), words(&said.stderr))),
    }
}

/// The volume group and the logical volumes of an LVM physical volume, which is the device. An error says why they are
/// not known.
pub fn volumes(device: &Path) -> Result<(String, Vec<LogicalVolume>), String> {
    #[derive(Deserialize)]
    struct Printed {
        report: Vec<Report>,
    }
    #[derive(Deserialize)]
    struct Report {
        #[serde(default)]
        pv: Vec<BTreeMap<String, String>>,
        #[serde(default)]
        lv: Vec<BTreeMap<String, String>>,
    }
    let ask = |what: &str, fields: &str| {
        let mut command = tool("lvm");
        command.args([what, "--readonly", "--nosuffix", "--units", "b", "--reportformat", "json", "-o", fields]);
        command.arg("--config").arg(lvm_config(device)?);
        let said = run(&mut command, "lvm2")?;
        let printed: Result<Printed, _> = serde_json::from_slice(&said.stdout);
        printed.map_err(|_| format!("lvm does not know it: {}", words(&said.stderr)))
    };
    let volumes = ask("pvs", "vg_name")?;
    let group = volumes.report.iter().flat_map(|report| &report.pv).find_map(|row| row.get("vg_name")).cloned();
    let group = group.filter(|name| !name.is_empty()).ok_or("it belongs to no volume group")?;
    let rows = ask("lvs", "lv_name,lv_size")?;
    let volume = |row: &BTreeMap<String, String>| {
        Some(LogicalVolume { name: row.get("lv_name")?.clone(), size_bytes: row.get("lv_size")?.parse().ok()? })
    };
    Ok((group, rows.report.iter().flat_map(|report| &report.lv).filter_map(volume).collect()))
}

/// LVM's settings for one look at one device: it may not know the kind (a kernel may call it other than `blkext`), and must
/// not look at any other.
fn lvm_config(device: &Path) -> Result<String, String> {
    let failed = |e: io::Error| format!("{}: {e}", device.display());
    let major = nix::sys::stat::major(fs::metadata(device).map_err(failed)?.rdev());
    let devices = fs::read_to_string("/proc/devices").map_err(failed)?;
    let blocks = devices.split_once("Block devices:").map_or("", |(_, blocks)| blocks);
    let name = blocks.lines().find_map(|line| {
        let (number, name) = line.trim().split_once(' ')?;
        (number.parse() == Ok(major)).then(|| name.trim().to_owned())
    });
    Ok(format!(
        "devices {{ use_devicesfile=0 types=[\"{}\",1] global_filter=[\"a|^{}$|\",\"r|.*|\"] }} \
         global {{ use_lvmpolld=0 }} activation {{ udev_sync=0 udev_rules=0 monitoring=0 }} backup {{ backup=0 archive=0 }}",
        name.unwrap_or_default(),
        device.display(),
    ))
}

fn tool(name: &str) -> Command {
    let mut command = Command::new(name);
    let path = search_path(&env::var_os("PATH").unwrap_or_default());
    command.env("PATH", path).env("LC_ALL", "C").env("LVM_SUPPRESS_FD_WARNINGS", "1");
    command
}

/// Where tools are searched. Never in the directory that we happen to be in, which anybody may have filled, and which an
/// empty name means.
fn search_path(callers: &OsStr) -> OsString {
    let callers = env::split_paths(callers).filter(|directory| directory.is_absolute());
    let mut path = OsString::new();
    for directory in callers {
        path.push(directory);
        path.push(":");
    }
    path.push(ADMIN_PATH);
    path
}

fn run(command: &mut Command, package: &str) -> Result<Output, String> {
    let name = OsStr::to_string_lossy(command.get_program()).into_owned();
    command.output().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => {
            format!("{name} is needed and not installed; on Debian it is in the package {package}")
        }
        _ => format!("cannot run {name}: {e}"),
    })
}

/// What a tool says, in one line.
fn words(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() { "it does not say why".to_owned() } else { lines.join("; ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tools_are_not_searched_where_we_happen_to_be() {
        let search = |callers: &str| search_path(OsStr::new(callers)).into_string().unwrap();
        assert_eq!(search(""), ADMIN_PATH);
        assert_eq!(search(":/usr/bin:.:bin:/bin:"), format!("/usr/bin:/bin:{ADMIN_PATH}"));
    }
}
