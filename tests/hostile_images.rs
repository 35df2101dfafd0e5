//! Images that lie: each gets a clear error or EIO, is never written outside what it may be, and leaves the rest
//! readable. Images are made by qemu-img and then broken byte by byte.

mod common;

use common::qemu;
use cowgate::block::{BlockDev, Errno, ZeroFlags};
use cowgate::image::{Disk, Format, Gate, Image, Opener};
use cowgate::pagebuf::PageBuf;
use cowgate::ring;
use cowgate::units::{ByteRange, GuestOffset};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use tempfile::TempDir;

const CLUSTER: u64 = 65536;

/// A directory with `image.qcow2`: 64 MiB, 64 KiB clusters, the first 1 MiB written.
fn image(options: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let mut create = std::process::Command::new("qemu-img");
    qemu::run(create.args(["create", "-q", "-f", "qcow2", "-o", options]).arg(&path).arg("64M"));
    let mut io = std::process::Command::new("qemu-io");
    qemu::run(io.args(["-f", "qcow2", "-c", "write -P 7 0 1M"]).arg(&path));
    (dir, path)
}

fn be64(path: &Path, at: u64) -> u64 {
    let mut bytes = [0; 8];
    File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

fn patch(path: &Path, at: u64, bytes: &[u8]) {
    File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

fn patch64(path: &Path, at: u64, value: u64) {
    patch(path, at, &value.to_be_bytes());
}

fn l1(path: &Path) -> u64 {
    be64(path, 40)
}

fn l2(path: &Path) -> u64 {
    be64(path, l1(path)) & 0x00ff_ffff_ffff_fe00
}

fn open(path: &Path) -> Result<Image, String> {
    open_gated(path, &Gate::default())
}

fn open_gated(path: &Path, gate: &Gate) -> Result<Image, String> {
    let opener = Opener::new(path).map_err(|e| e.to_string())?;
    ring::run(opener.open(Format::Qcow2, gate)).unwrap().map_err(|e| e.to_string())
}

#[track_caller]
fn refused(path: &Path, words: &[&str]) {
    let text = open(path).err().expect("the image must be refused");
    for word in [&[path.file_name().unwrap().to_str().unwrap()], words].concat() {
        assert!(text.contains(word), "{text:?} should say {word:?}");
    }
}

/// Runs `job` on a writable disk of the image.
fn writing<T>(path: &Path, job: impl AsyncFnOnce(Rc<Disk>) -> T) -> T {
    let image = Arc::new(open(path).unwrap());
    image.begin_writing().unwrap();
    let result = ring::run(async {
        let disk = Disk::open(Arc::clone(&image), true).unwrap();
        let result = job(Rc::clone(&disk)).await;
        // a broken image refuses this; what it tells is not the matter here
        let _ = disk.settle().await;
        result
    });
    image.writer_left();
    result.unwrap()
}

async fn write(disk: &Disk, at: u64, len: usize) -> Result<(), Errno> {
    let mut buf = PageBuf::new(len);
    buf.fill(0x55);
    disk.write(GuestOffset(at), buf).await.0
}

async fn read(disk: &Disk, at: u64, len: usize) -> Result<Vec<u8>, Errno> {
    let (result, buf) = disk.read(GuestOffset(at), PageBuf::new(len)).await;
    result.map(|()| buf.to_vec())
}

#[test]
fn guest_data_over_metadata_is_never_written() {
    // the header, the refcount table, a refcount block, the L1 table, the L2 table itself
    for victim in ["header", "reftable", "refblock", "l1", "l2"] {
        let (_dir, path) = image("cluster_size=65536");
        let target = match victim {
            "header" => 0,
            "reftable" => be64(&path, 48),
            "refblock" => be64(&path, be64(&path, 48)),
            "l1" => l1(&path),
            _ => l2(&path),
        };
        patch64(&path, l2(&path) + 8, target | 1 << 63);
        let before = std::fs::read(&path).unwrap();
        writing(&path, async |disk| {
            assert_eq!(write(&disk, CLUSTER, 512).await, Err(Errno::EIO), "over {victim}");
            assert_eq!(write(&disk, 8 * CLUSTER, 512).await, Err(Errno::EIO), "no more writes after {victim}");
            assert_eq!(read(&disk, 0, 512).await.unwrap(), [7; 512], "the rest is readable after {victim}");
            assert_eq!(disk.write_zeroes(ByteRange::between(0, CLUSTER), ZeroFlags::default()).await, Err(Errno::EIO));
        });
        assert!(std::fs::read(&path).unwrap() == before, "the image changed after {victim}");
    }
}

#[test]
fn broken_tables_are_eio_for_their_requests_only() {
    type Breakage = (&'static str, fn(&Path));
    let breakages: [Breakage; 6] = [
        ("L2 table behind the end", |p| patch64(p, l1(p), (1 << 40) | 1 << 63)),
        ("L2 table off a cluster border", |p| patch64(p, l1(p), (l2(p) + 512) | 1 << 63)),
        ("data off a cluster border", |p| patch64(p, l2(p) + 8, 0x50200 | 1 << 63)),
        ("compressed rubbish", |p| patch64(p, l2(p) + 8, 1 << 62 | 4 << 54 | 0x100)),
        ("compressed data far behind the end", |p| patch64(p, l2(p) + 8, 1 << 62 | 1 << 50)),
        ("data over the header", |p| patch64(p, l2(p) + 8, 1 << 63)),
    ];
    for (name, break_it) in breakages {
        let (_dir, path) = image("cluster_size=65536");
        break_it(&path);
        writing(&path, async |disk| {
            assert_eq!(read(&disk, CLUSTER, 512).await, Err(Errno::EIO), "{name}");
            assert_eq!(write(&disk, 2 * CLUSTER, 512).await, Err(Errno::EIO), "no writes after {name}");
            assert!(
                disk.extents(ByteRange::between(CLUSTER, 2 * CLUSTER), 9).await.is_ok() == name.starts_with("comp")
            );
        });
    }
}

#[test]
fn version_2_has_no_zero_flag() {
    let (_dir, path) = image("compat=0.10,cluster_size=65536");
    patch64(&path, l2(&path) + 8, 1);
    writing(&path, async |disk| assert_eq!(read(&disk, CLUSTER, 512).await, Err(Errno::EIO)));
}

#[test]
fn two_structures_in_one_cluster_refuse_writes_from_the_start() {
    let (_dir, path) = image("cluster_size=65536");
    patch64(&path, l1(&path), be64(&path, 48) | 1 << 63); // the L2 table is the refcount table
    writing(&path, async |disk| assert_eq!(write(&disk, 32 << 20, 512).await, Err(Errno::EIO)));
}

#[test]
fn data_far_behind_the_end_is_not_written() {
    let (_dir, path) = image("cluster_size=65536");
    patch64(&path, l2(&path) + 8, (1 << 50) | 1 << 63);
    writing(&path, async |disk| assert_eq!(write(&disk, CLUSTER, 512).await, Err(Errno::EIO)));
    assert!(std::fs::metadata(&path).unwrap().len() < 1 << 30);
}

#[test]
fn a_free_count_on_used_metadata_is_noticed_before_reuse() {
    let (_dir, path) = image("cluster_size=65536");
    // refcounts of all clusters 0: the allocator would hand out the header's neighbours
    let block = be64(&path, be64(&path, 48));
    patch(&path, block, &[0; 512]);
    let before = std::fs::read(&path).unwrap();
    writing(&path, async |disk| assert_eq!(write(&disk, 8 << 20, 512).await, Err(Errno::EIO)));
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn headers_that_cannot_be() {
    let (_dir, path) = image("cluster_size=65536");
    let whole = std::fs::read(&path).unwrap();
    let cases: [(u64, &[u8], &[&str]); 9] = [
        (0, b"XXXX", &["not a QCOW2 image", "format = raw"]),
        (4, &[0, 0, 0, 9], &["version is 9"]),
        (20, &[0, 0, 0, 40], &["cluster_bits is 40"]),
        (32, &[0, 0, 0, 2], &["LUKS"]),
        (36, &[0, 0xff, 0xff, 0xff], &["l1_size"]),
        (40, &[0, 0, 0, 0, 0, 0, 2, 1], &["l1_table_offset is 513"]),
        (40, &[0, 0, 0xff, 0, 0, 0, 0, 0], &["L1 table", "past the end of the file"]),
        (72, &[0, 0, 0, 0, 0, 0, 0, 0x20], &["incompatible feature bit 5"]),
        (72, &[0, 0, 0, 0, 0, 0, 0, 0x04], &["an external data file and does not name it"]),
    ];
    for (at, bytes, words) in cases {
        std::fs::write(&path, &whole).unwrap();
        patch(&path, at, bytes);
        refused(&path, words);
    }
    for len in [0, 3, 30, 100] {
        std::fs::write(&path, &whole[..len]).unwrap();
        refused(&path, &["the file ends after"]);
    }
}

#[test]
fn dirty_and_corrupt_images_are_read_only() {
    for (bit, word) in [(1u64, "refcounts may be wrong"), (2, "marked corrupt")] {
        let (_dir, path) = image("cluster_size=65536");
        patch64(&path, 72, bit);
        let image = Arc::new(open(&path).unwrap());
        let text = image.begin_writing().unwrap_err().to_string();
        assert!(text.contains(word) && text.contains("cowgate image check"), "{text}");
        let disk_image = Arc::clone(&image);
        ring::run(async move {
            let disk = Disk::open(disk_image, false).unwrap();
            assert_eq!(read(&disk, 0, 512).await.unwrap(), [7; 512]);
        })
        .unwrap();
    }
}

#[test]
fn autoclear_bits_go_before_the_first_write_and_not_before() {
    let (_dir, path) = image("cluster_size=65536");
    patch64(&path, 88, 1 << 17);
    writing(&path, async |disk| assert!(read(&disk, 0, 512).await.is_ok()));
    assert_eq!(be64(&path, 88), 1 << 17);
    writing(&path, async |disk| assert_eq!(write(&disk, 0, 512).await, Ok(())));
    assert_eq!(be64(&path, 88), 0);
    qemu::check(&path);
}

#[test]
fn a_short_l1_table_grows() {
    // 512-byte clusters: an L2 table maps 32 KiB, so 64 MiB need 2048 L1 entries; leave the image 40
    let (dir, path) = image("cluster_size=512");
    let short = dir.path().join("short.qcow2");
    let mut create = std::process::Command::new("qemu-img");
    qemu::run(create.args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=512"]).arg(&short).arg("1310720"));
    drop(path);
    assert_eq!(be64(&short, 36) >> 32, 40);
    patch64(&short, 24, 64 << 20); // the size grows, the L1 table does not
    let check = qemu::output(std::process::Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&short));
    assert!(!check.status.success(), "QEMU refuses the image before its table has grown");
    writing(&short, async |disk| {
        assert_eq!(read(&disk, 60 << 20, 512).await.unwrap(), [0; 512]);
        assert_eq!(write(&disk, 512, 512).await, Ok(()));
        assert_eq!(write(&disk, (64 << 20) - 700, 700).await, Ok(()));
        assert_eq!(read(&disk, (64 << 20) - 700, 700).await.unwrap(), [0x55; 700]);
    });
    assert_eq!(be64(&short, 36) >> 32, 2048);
    qemu::check(&short);
    let raw = dir.path().join("expect.raw");
    let mut expect = vec![0; 64 << 20];
    expect[512..1024].fill(0x55);
    expect[(64 << 20) - 700..].fill(0x55);
    std::fs::write(&raw, expect).unwrap();
    qemu::same_content(&short, &raw);
}

#[test]
fn the_refcount_table_grows_and_moves() {
    // 512-byte clusters with 64-bit refcounts: one cluster of refcount table counts 2 MiB of file
    let (dir, path) = image("cluster_size=512,refcount_bits=64");
    let before = be64(&path, 48);
    writing(&path, async |disk| {
        for at in (0..12u64 << 20).step_by(1 << 20) {
            assert_eq!(write(&disk, at, 1 << 20).await, Ok(()));
        }
    });
    assert_ne!(be64(&path, 48), before, "the table moved");
    qemu::check(&path);
    let raw = dir.path().join("expect.raw");
    let mut expect = vec![0; 64 << 20];
    expect[..12 << 20].fill(0x55);
    std::fs::write(&raw, expect).unwrap();
    qemu::same_content(&path, &raw);
}

/// An overlay in `dir` whose header names `backing`, whether that exists or not.
fn overlay(dir: &Path, name: &str, backing: &str, format: Option<&str>) -> PathBuf {
    let path = dir.join(name);
    let mut create = std::process::Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-u", "-b", backing]);
    if let Some(format) = format {
        create.args(["-F", format]);
    } else {
        create.args(["-F", "raw"]);
    }
    qemu::run(create.arg(&path).arg("1M"));
    if format.is_none() {
        // newer qemu-img does not leave the format out by itself: turn its extension into an unknown one
        patch(&path, 112, &0x1234_5678u32.to_be_bytes());
    }
    path
}

#[test]
fn backing_files_the_gate_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    std::fs::write(&secret, [1; 4096]).unwrap();
    let d = dir.path();

    refused(&overlay(d, "a.qcow2", secret.to_str().unwrap(), Some("raw")), &["outside the image roots", "imageroots"]);
    let relative = format!("../{}/secret", outside.path().file_name().unwrap().to_str().unwrap());
    refused(&overlay(d, "b.qcow2", &relative, Some("raw")), &["outside the image roots"]);
    std::os::unix::fs::symlink(&secret, d.join("link")).unwrap();
    refused(&overlay(d, "c.qcow2", "link", Some("raw")), &["outside the image roots"]);
    refused(&overlay(d, "d.qcow2", "nbd://localhost/x", Some("raw")), &["only files are followed"]);
    refused(&overlay(d, "e.qcow2", "json:{\"driver\":\"null-co\"}", Some("raw")), &["only files are followed"]);
    std::fs::write(d.join("plain"), [2; 4096]).unwrap();
    refused(&overlay(d, "f.qcow2", "plain", Some("vmdk")), &["\"vmdk\" is not known"]);
    refused(&overlay(d, "g.qcow2", "plain", None), &["without its format", "qemu-img rebase"]);
    let missing = overlay(d, "h.qcow2", "missing", Some("raw"));
    assert!(open(&missing).err().unwrap().contains("missing: cannot open it"));
    let at_directory = overlay(d, "i.qcow2", ".", Some("raw"));
    assert!(open(&at_directory).err().unwrap().contains("is a directory"));
    nix::unistd::mkfifo(&d.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let at_fifo = overlay(d, "j.qcow2", "fifo", Some("raw"));
    assert!(open(&at_fifo).err().unwrap().contains("is a FIFO"));

    // the same file is fine when its directory is a root
    let gate = Gate::new(Some(vec![d.to_owned(), outside.path().to_owned()]));
    assert!(open_gated(&d.join("a.qcow2"), &gate).is_ok());
    assert!(open_gated(&d.join("a.qcow2"), &Gate::new(Some(vec![d.to_owned()]))).is_err());
}

#[test]
fn chains_that_never_end() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    refused(&overlay(d, "self.qcow2", "self.qcow2", Some("qcow2")), &["refers to itself"]);
    overlay(d, "one.qcow2", "two.qcow2", Some("qcow2"));
    overlay(d, "two.qcow2", "one.qcow2", Some("qcow2"));
    assert!(open(&d.join("one.qcow2")).err().unwrap().contains("refers to itself"));
    let limit = cowgate::image::open::MAX_CHAIN;
    let first = overlay(d, "n0.qcow2", "n1.qcow2", Some("qcow2"));
    for i in 1..=limit {
        let copy = d.join(format!("n{i}.qcow2"));
        std::fs::copy(&first, &copy).unwrap();
        // the name has a fixed length: n1.qcow2 becomes m%03d.q2
        patch(&copy, be64(&first, 8), format!("m{:03}.q2", i + 1).as_bytes());
        std::fs::rename(&copy, d.join(format!("m{i:03}.q2"))).unwrap();
    }
    patch(&first, be64(&first, 8), b"m001.q2\0");
    patch(&first, 16, &7u32.to_be_bytes());
    for i in 1..=limit {
        patch(&d.join(format!("m{i:03}.q2")), 16, &7u32.to_be_bytes());
    }
    assert!(open(&first).err().unwrap().contains("longer than 256 layers"));
}

#[test]
fn a_raw_backing_file_is_never_probed() {
    // the guest of a raw disk wrote a QCOW2 header that names a secret file
    let dir = tempfile::tempdir().unwrap();
    let inner = overlay(dir.path(), "raw-with-header", "/etc/passwd", Some("raw"));
    let path = overlay(dir.path(), "top.qcow2", "raw-with-header", Some("raw"));
    let image = Arc::new(open(&path).unwrap());
    ring::run(async move {
        let disk = Disk::open(image, false).unwrap();
        assert_eq!(read(&disk, 0, 4).await.unwrap(), b"QFI\xfb");
    })
    .unwrap();
    drop(inner);
}

#[test]
fn snapshot_tables_that_cannot_be() {
    let (_dir, path) = image("cluster_size=65536");
    qemu::qemu_img("snapshot -c one", &[&path]);
    let whole = std::fs::read(&path).unwrap();
    let table = be64(&path, 64);
    patch(&path, table + 36, &u32::MAX.to_be_bytes());
    refused(&path, &["snapshot table", "extra data"]);
    std::fs::write(&path, &whole).unwrap();
    patch(&path, table + 8, &u32::MAX.to_be_bytes());
    refused(&path, &["snapshot table", "L1 table"]);
    std::fs::write(&path, &whole).unwrap();
    patch(&path, 60, &60_000u32.to_be_bytes());
    assert!(open(&path).is_ok(), "zero bytes are empty snapshots: odd, harmless");
}
