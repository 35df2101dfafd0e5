//! Images of every kind that qemu-img makes, with content in places that hurt.

use super::qemu::{qemu_img, run};
use std::path::Path;
use std::process::Command;

/// Size of the disks in bytes; a few are shorter or longer.
const SIZE: u64 = 6 << 20;

/// (file, options, backing file): qcow2 images of one disk each.
const IMAGES: &[(&str, &str, Option<&str>)] = &[
    ("plain.qcow2", "", None),
    ("v2.qcow2", "compat=0.10", None),
    ("c512.qcow2", "cluster_size=512", None),
    ("c2m.qcow2", "cluster_size=2M", None),
    ("bits1.qcow2", "refcount_bits=1,cluster_size=4k", None),
    ("extended.qcow2", "extended_l2=on", None),
    ("extended16k.qcow2", "extended_l2=on,cluster_size=16k", None),
    ("zlib.qcow2", "", None),
    ("zstd.qcow2", "compression_type=zstd,cluster_size=16k", None),
    ("data.qcow2", "data_file=data.bin", None),
    ("dataraw.qcow2", "data_file=dataraw.bin,data_file_raw=on", None),
    ("metadata.qcow2", "preallocation=metadata", None),
    ("full.qcow2", "preallocation=full", None),
    ("snapshot.qcow2", "", None),
    ("overlay.qcow2", "", Some("plain.qcow2")),
    ("extended-overlay.qcow2", "extended_l2=on", Some("c512.qcow2")),
    ("third.qcow2", "cluster_size=4k", Some("overlay.qcow2")),
    ("longer.qcow2", "", Some("zlib.qcow2")),
    ("onraw.qcow2", "", Some("sparse.raw")),
];

/// Makes them all; returns their names.
pub fn make(directory: &Path) -> Vec<String> {
    let at = |name: &str| directory.join(name);
    let raw = std::fs::File::create(at("sparse.raw")).expect("file");
    raw.set_len(SIZE).expect("size");
    write(directory, "sparse.raw", &["write -P 5 64k 64k", "write -P 6 1M 200k", "write -P 0 3M 64k"]);
    std::fs::File::create(at("empty.raw")).and_then(|f| f.set_len(SIZE)).expect("file");
    let mut names = vec!["sparse.raw".to_owned(), "empty.raw".to_owned()];
    for &(name, options, backing) in IMAGES {
        let size = if name.starts_with("longer") { SIZE + (1 << 20) } else { SIZE };
        let mut create = Command::new("qemu-img");
        create.current_dir(directory).args(["create", "-q", "-f", "qcow2"]);
        if !options.is_empty() {
            create.args(["-o", options]);
        }
        if let Some(backing) = backing {
            create.args(["-b", backing, "-F", format(backing)]);
        }
        run(create.arg(name).arg(size.to_string()));
        let content: &[&str] = match name {
            "zlib.qcow2" | "zstd.qcow2" => {
                &["write -c -P 5 64k 64k", "write -P 6 1M 200k", "write -c -P 9 4M 192k", "write -z 2M 128k"]
            }
            "overlay.qcow2" => &["write -P 7 1100k 8k", "write -z 64k 32k", "write -P 8 5M 100k"],
            "extended-overlay.qcow2" => {
                &["write -P 7 1100k 6k", "write -z 66k 4k", "discard 1M 64k", "write -P 1 4100k 2k"]
            }
            "third.qcow2" => &["write -P 3 1104k 4k", "write -z 5M 64k"],
            "longer.qcow2" => &["write -P 4 6M 10k"],
            "onraw.qcow2" => &["write -P 4 2M 10k"],
            _ => {
                &["write -P 5 64k 64k", "write -P 6 1M 200k", "write -z 2M 128k", "write -P 0 3M 64k", "write -z 1M 4k"]
            }
        };
        write(directory, name, content);
        if name == "snapshot.qcow2" {
            qemu_img("snapshot -c before", &[&at(name)]);
            write(directory, name, &["write -P 77 1M 64k", "write -P 78 5M 64k"]);
        }
        names.push(name.to_owned());
    }
    names
}

/// The format of one of them.
pub fn format(name: &str) -> &'static str {
    if name.ends_with(".raw") { "raw" } else { "qcow2" }
}

fn write(directory: &Path, name: &str, commands: &[&str]) {
    let mut io = Command::new("qemu-io");
    io.current_dir(directory).args(["-f", format(name)]);
    for command in commands {
        io.args(["-c", command]);
    }
    run(io.arg(name));
}
