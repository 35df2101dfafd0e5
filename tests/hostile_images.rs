//! Images that lie: each gets a clear error or EIO, is never written outside what it may be, and leaves the rest
//! readable. Images are made by qemu-img and then broken byte by byte.

mod common;

use common::daemon::Setup;
use common::qemu;
use cowgate::block::{BlockDev, Errno, ZeroFlags};
use cowgate::image::{Disk, Format, Gate, Image, OpenOptions, Opener};
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

/// Flags of an L2 entry.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// A host cluster that an L2 entry takes for guest data is given up when that is zeroed, discarded, copied or packed: not
/// when it is metadata.
#[test]
fn metadata_taken_for_guest_data_is_never_given_back() {
    let (_dir, path) = image("cluster_size=65536");
    let places = [
        ("reftable", be64(&path, 48)),
        ("refblock", be64(&path, be64(&path, 48))),
        ("l1", l1(&path)),
        ("l2", l2(&path)),
    ];
    let mut entries: Vec<(String, u64)> = vec![("packed header".to_owned(), COMPRESSED)];
    for (name, at) in places {
        entries.push((name.to_owned(), at | COPIED));
        entries.push((format!("shared {name}"), at));
        entries.push((format!("reserved {name}"), at | COPIED | 1));
        entries.push((format!("packed {name}"), at | COMPRESSED));
        entries.push((format!("packed up to {name}"), (at - 512) | COMPRESSED | 1 << 54));
    }
    let whole = std::fs::read(&path).unwrap();
    let unmap = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
    let sparse = ZeroFlags { sparse: true, ..ZeroFlags::default() };
    for (name, entry) in entries {
        for how in ["discard", "unmap", "zero", "keep", "write", "pack"] {
            std::fs::write(&path, &whole).unwrap();
            patch64(&path, l2(&path) + 8, entry);
            let before = std::fs::read(&path).unwrap();
            writing(&path, async |disk| {
                let cluster = ByteRange::between(CLUSTER, 2 * CLUSTER);
                let at = GuestOffset(CLUSTER);
                let result = match how {
                    "discard" => disk.discard(cluster).await,
                    "unmap" => disk.write_zeroes(cluster, unmap).await,
                    "zero" => disk.write_zeroes(cluster, ZeroFlags::default()).await,
                    "keep" => disk.write_zeroes(cluster, sparse).await,
                    "write" => disk.write(at, PageBuf::copy_of(&[0x55; CLUSTER as usize])).await.0,
                    _ => disk.write_compressed(at, PageBuf::copy_of(&[0x55; CLUSTER as usize])).await.0,
                };
                // a reserved cluster that is to read as zeroes does so already
                let nothing_to_do = name.starts_with("reserved") && how == "keep";
                assert!(result == Err(Errno::EIO) || nothing_to_do, "{how} of {name}: {result:?}");
                let _ = disk.settle().await;
            });
            assert!(std::fs::read(&path).unwrap() == before, "{how} of {name} changed the image");
        }
    }
}

/// An L2 table that a snapshot shares is copied as a whole: also with a cache that is smaller.
#[test]
fn a_shared_table_larger_than_the_cache_is_copied() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    qemu::qemu_img("create -q -f qcow2 -o cluster_size=2M", &[&path, Path::new("64M")]);
    qemu::run(std::process::Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 7 0 1M"]).arg(&path));
    qemu::qemu_img("snapshot -c one", &[&path]);
    let options = OpenOptions { cache_bytes: Some(1), ..OpenOptions::from(Format::Qcow2) };
    ring::run(async {
        let image = Arc::new(Opener::new(&path).unwrap().open(options, &Gate::default()).await.unwrap());
        image.begin_writing().unwrap();
        let disk = Disk::open(Arc::clone(&image), true).unwrap();
        let patience = std::time::Duration::from_secs(20);
        tokio::time::timeout(patience, write(&disk, 4096, 512)).await.expect("it ends").unwrap();
        disk.settle().await.unwrap();
        assert_eq!(read(&disk, 0, 4096).await.unwrap(), [7; 4096]);
        image.writer_left();
    })
    .unwrap();
    qemu::check(&path);
}

#[test]
fn subclusters_that_contradict_themselves() {
    for (name, descriptor, bitmap) in [
        ("allocated and zero", None, 0x1_0000_0001u64),
        ("allocated without a cluster", Some(0), 1),
        ("in the refcount table", Some(u64::MAX), 1),
        ("behind the end", Some(1 << 50 | COPIED), u64::from(u32::MAX)),
    ] {
        let (_dir, path) = image("cluster_size=65536,extended_l2=on");
        let entry = l2(&path) + 16;
        match descriptor {
            Some(u64::MAX) => patch64(&path, entry, be64(&path, 48) | COPIED),
            Some(descriptor) => patch64(&path, entry, descriptor),
            None => {}
        }
        patch64(&path, entry + 8, bitmap);
        let before = std::fs::read(&path).unwrap();
        writing(&path, async |disk| {
            assert_eq!(write(&disk, CLUSTER + 100, 512).await, Err(Errno::EIO), "{name}");
            assert_eq!(disk.discard(ByteRange::between(CLUSTER, 2 * CLUSTER)).await, Err(Errno::EIO), "{name}");
            assert_eq!(read(&disk, 0, 512).await.unwrap(), [7; 512], "{name}");
        });
        assert!(std::fs::read(&path).unwrap() == before, "{name}: the image changed");
    }
}

/// An image in `dir` whose header names `data` as its external data file, whether that exists or not.
fn external(dir: &Path, name: &str, data: &[u8]) -> PathBuf {
    let path = dir.join(name);
    let placeholder = "x".repeat(data.len());
    let mut create = std::process::Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-o", &format!("data_file={placeholder}"), name, "1M"]);
    qemu::run(create.current_dir(dir));
    std::fs::remove_file(dir.join(&placeholder)).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(data.len()).position(|w| w == placeholder.as_bytes()).unwrap();
    patch(&path, at as u64, data);
    path
}

#[test]
fn data_files_the_gate_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    std::fs::write(&secret, [1; 4096]).unwrap();
    let d = dir.path();
    refused(&external(d, "a.qcow2", secret.as_os_str().as_encoded_bytes()), &["outside the image roots", "imageroots"]);
    std::os::unix::fs::symlink(&secret, d.join("link")).unwrap();
    refused(&external(d, "b.qcow2", b"link"), &["outside the image roots"]);
    refused(&external(d, "c.qcow2", b"nbd://localhost/x"), &["only files are followed"]);
    refused(&external(d, "d.qcow2", b"zero\0byte"), &["zero byte"]);
    for (name, data, words) in [
        ("e.qcow2", &b"missing"[..], "missing: cannot open it"),
        ("f.qcow2", b".", "is a directory"),
        ("g.qcow2", b"fifo", "is a FIFO"),
    ] {
        let _ = nix::unistd::mkfifo(&d.join("fifo"), nix::sys::stat::Mode::S_IRWXU);
        assert!(open(&external(d, name, data)).err().unwrap().contains(words));
    }
    std::fs::remove_file(d.join("fifo")).unwrap();

    // the image itself, by its name, through a symbolic link, as a hard link
    refused(&external(d, "self.qcow2", b"self.qcow2"), &["the same file is used twice"]);
    let by_link = external(d, "top.qcow2", b"again");
    std::os::unix::fs::symlink("top.qcow2", d.join("again")).unwrap();
    refused(&by_link, &["the same file is used twice"]);
    let by_hard_link = external(d, "tip.qcow2", b"twin");
    std::fs::hard_link(&by_hard_link, d.join("twin")).unwrap();
    refused(&by_hard_link, &["the same file is used twice"]);
}

#[test]
fn chains_that_meet_themselves_by_another_name() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let path = overlay(d, "a.qcow2", "link", Some("qcow2"));
    std::os::unix::fs::symlink("a.qcow2", d.join("link")).unwrap();
    refused(&path, &["refers to itself"]);
    let path = overlay(d, "b.qcow2", "twin", Some("qcow2"));
    std::fs::hard_link(&path, d.join("twin")).unwrap();
    refused(&path, &["refers to itself"]);
    // also as raw bytes: a guest that writes would change what it reads
    let path = overlay(d, "c.qcow2", "c.qcow2", Some("raw"));
    refused(&path, &["refers to itself"]);
    // the data file of one layer is the backing file of another
    external(d, "base.qcow2", b"disk");
    std::fs::write(d.join("disk"), [0; 4096]).unwrap();
    let both = overlay(d, "d.qcow2", "base.qcow2", Some("qcow2"));
    assert!(open(&both).is_ok());
    let rounds = external(d, "round.qcow2", b"over.qcow2");
    let over = overlay(d, "over.qcow2", "round.qcow2", Some("qcow2"));
    assert!(open(&over).err().unwrap().contains("the same file is used twice"));
    assert!(rounds.exists());
}

/// The bytes of a zstd frame that says it unpacks to `len` bytes with a window of `window_log`.
fn zstd_frame(window_log: u8, len: u64) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0xc0, (window_log - 10) << 3];
    frame.extend(len.to_le_bytes());
    // one block that repeats a byte, 128 KiB of it; more follow
    for _ in 0..32 {
        let header = (128u32 << 10) << 3 | 1 << 1;
        frame.extend(&header.to_le_bytes()[..3]);
        frame.push(0x33);
    }
    frame
}

/// Images whose tables are huge, on paper: `make` gets a sparse file that holds a fresh image.
type Bomb = (&'static str, &'static str, fn(&Path));

const BOMBS: [Bomb; 8] = [
    ("l1", "cluster_size=512", |p| {
        // four million L1 entries: all there, all empty
        patch64(p, 24, (4 << 20) * (32 << 10));
        patch(p, 36, &(4u32 << 20).to_be_bytes());
        patch64(p, 40, 1 << 30);
        File::options().write(true).open(p).unwrap().set_len(2 << 30).unwrap();
    }),
    ("reftable", "cluster_size=512", |p| patch(p, 56, &16_384u32.to_be_bytes())),
    ("reftable-far", "cluster_size=64k", |p| {
        // the last entry of a table of 8 MiB names the block of the first
        let block = be64(p, be64(p, 48));
        patch64(p, 48, 1 << 30);
        patch(p, 56, &128u32.to_be_bytes());
        patch64(p, 1 << 30, block);
        patch64(p, (1 << 30) + (8 << 20) - 8, 1 << 29);
        File::options().write(true).open(p).unwrap().set_len(2 << 30).unwrap();
    }),
    ("snapshots", "cluster_size=512", |p| {
        // 65,536 snapshots, each with an L1 table of 32 MiB of its own
        let file = File::options().write(true).open(p).unwrap();
        file.set_len(3 << 40).unwrap();
        let mut table = vec![0u8; 65_536 * 40];
        for (i, entry) in table.chunks_mut(40).enumerate() {
            entry[..8].copy_from_slice(&((1u64 << 40) + (i as u64) * (32 << 20)).to_be_bytes());
            entry[8..12].copy_from_slice(&(4u32 << 20).to_be_bytes());
        }
        file.write_all_at(&table, 1 << 30).unwrap();
        patch(p, 60, &65_536u32.to_be_bytes());
        patch64(p, 64, 1 << 30);
    }),
    ("snapshot-names", "cluster_size=64k", |p| {
        // a table that ends only far behind what may be read
        let file = File::options().write(true).open(p).unwrap();
        file.set_len(8 << 30).unwrap();
        let mut entry = vec![0u8; 40 + 2 * 65_535];
        entry[12..16].fill(0xff);
        entry.resize(entry.len().next_multiple_of(8), 0);
        file.write_all_at(&entry.repeat(200), 1 << 30).unwrap();
        patch(p, 60, &60_000u32.to_be_bytes());
        patch64(p, 64, 1 << 30);
    }),
    ("one-l2-for-all", "cluster_size=64k", |p| {
        // every L1 entry names the same table
        let l2 = l2(p) | COPIED;
        patch64(p, 24, (4 << 20) * (512 << 20));
        patch(p, 36, &(4u32 << 20).to_be_bytes());
        patch64(p, 40, 1 << 30);
        let all: Vec<u8> = std::iter::repeat_n(l2.to_be_bytes(), 4 << 20).flatten().collect();
        File::options().write(true).open(p).unwrap().write_all_at(&all, 1 << 30).unwrap();
    }),
    ("zstd", "cluster_size=64k,compression_type=zstd", |p| {
        let frame = zstd_frame(27, 1 << 30);
        patch(p, 1 << 22, &frame);
        let sectors = frame.len().div_ceil(512) as u64 - 1;
        for i in 0..16 {
            patch64(p, l2(p) + i * 8, COMPRESSED | sectors << 54 | 1 << 22);
        }
    }),
    ("deflate", "cluster_size=2M", |p| {
        // 4 MiB of compressed data for a cluster, as much as an entry can say, that unpacks to far more
        let mut packed = vec![0x00; 4 << 20];
        // stored blocks of 65,535 bytes follow each other
        for block in packed.chunks_mut(65_540) {
            let head = [0x00, 0xff, 0xff, 0x00, 0x00];
            let len = block.len().min(5);
            block[..len].copy_from_slice(&head[..len]);
        }
        patch(p, 1 << 23, &packed);
        for i in 0..32 {
            patch64(p, l2(p) + i * 8, COMPRESSED | 0x1fff << 49 | 1 << 23);
        }
    }),
];

/// All the bombs in one daemon beside a good export: it serves on, takes no more memory than it may, and leaves every
/// image in its place.
#[test]
fn a_daemon_full_of_bombs_serves_its_other_exports() {
    const MOST_KIB: u64 = 400 << 10;
    let setup = Setup::new();
    let good = setup.image("good.qcow2", "", "16M");
    setup.export("good", &good, "");
    for (name, options, make) in BOMBS {
        let path = setup.image(&format!("{name}.qcow2"), options, "64M");
        qemu::run(std::process::Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 7 0 1M"]).arg(&path));
        make(&path);
        setup.export(name, &path, "");
    }
    // a chain of images whose L1 tables take 32 MiB each
    let link = |i: u32| setup.dir().join(format!("chain{i:02}.qcow2"));
    for i in 0..12 {
        let path =
            overlay(setup.dir(), &format!("chain{i:02}.qcow2"), &format!("chain{:02}.qcow2", i + 1), Some("qcow2"));
        patch(&path, 36, &(4u32 << 20).to_be_bytes());
        patch64(&path, 40, 1 << 30);
        File::options().write(true).open(&path).unwrap().set_len(2 << 30).unwrap();
    }
    std::fs::copy(&good, link(12)).unwrap();
    setup.export("chain", &link(0), "");

    let daemon = setup.start();
    let names: Vec<&str> = BOMBS.iter().map(|(name, ..)| *name).chain(["chain"]).collect();
    for name in names {
        let begun = std::time::Instant::now();
        let said = daemon.python(
            "good",
            &format!(
                r#"
h.pwrite(b"a" * 4096, 8192)
b = nbd.NBD()
b.add_meta_context('base:allocation')
def attempt(what, job):
    try:
        job()
        print(what, "done")
    except nbd.Error as e:
        print(what, e.errno)
try:
    b.connect_uri(uri.replace("good", "{name}"))
except nbd.Error as e:
    print("refused")
    sys.exit(0)
size = b.get_size()
attempt("read", lambda: b.pread(1 << 20, 0))
attempt("read-end", lambda: b.pread(4096, (size - 4096) // 4096 * 4096))
attempt("status", lambda: b.block_status(min(size, 1 << 31), 0, lambda *a: 0))
attempt("status-most", lambda: b.block_status(min(size, (1 << 32) - 512), 0, lambda *a: 0))
attempt("write", lambda: b.pwrite(b"x" * 4096, 33 << 20))
attempt("write-over", lambda: b.pwrite(b"x" * 4096, 0))
attempt("trim", lambda: b.trim(1 << 20, 0))
attempt("zero", lambda: b.zero(1 << 20, 2 << 20))
attempt("flush", lambda: b.flush())
assert h.pread(4096, 8192) == b"a" * 4096
"#
            ),
        );
        let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
        let peak = status.lines().find(|l| l.starts_with("VmHWM")).unwrap().split_whitespace().nth(1).unwrap();
        println!("{name}: {peak} KiB, {:?}\n{said}", begun.elapsed());
        assert!(peak.parse::<u64>().unwrap() < MOST_KIB, "{name}: {peak} KiB");
        if name == "chain" {
            assert!(said.contains("refused"), "{said}");
        }
    }
    daemon.wait_for("the chain's refusal", || daemon.log().contains("merge some layers with `qemu-img commit`"));
    let log = daemon.log();
    assert!(!log.contains("panicked"), "{log}");
    let (dir, _) = daemon.stop();
    qemu::check(&dir.path().join("good.qcow2"));
    for (name, ..) in BOMBS {
        let path = dir.path().join(format!("{name}.qcow2"));
        assert!(File::open(&path).unwrap().metadata().unwrap().len() <= (3 << 40) + (64 << 20), "{name} grew");
        assert_eq!(be64(&path, 0) >> 32, u64::from(u32::from_be_bytes(*b"QFI\xfb")), "{name}");
    }
}

/// Bitmap directories that cannot be: the disk is served, the bitmaps are not.
#[test]
fn bitmap_directories_that_cannot_be() {
    type Breakage = (&'static str, fn(&Path, u64));
    let breakages: [Breakage; 6] = [
        ("behind the end", |p, at| patch64(p, at + 16, 1 << 50)),
        ("off a cluster border", |p, at| patch64(p, at + 16, be64(p, at + 16) + 512)),
        ("huge", |p, at| patch64(p, at + 8, 1 << 40)),
        ("too many", |p, at| patch(p, at, &u32::MAX.to_be_bytes())),
        ("over the refcount table", |p, at| patch64(p, at + 16, be64(p, 48))),
        ("its table over the header", |p, at| patch64(p, be64(p, at + 16), 0)),
    ];
    for (name, break_it) in breakages {
        let (_dir, path) = image("cluster_size=65536");
        qemu::qemu_img("bitmap --add", &[&path, Path::new("one")]);
        let header = std::fs::read(&path).unwrap();
        let at = header.windows(4).position(|w| w == [0x23, 0x85, 0x28, 0x75]).unwrap() as u64 + 8;
        break_it(&path, at);
        let tables = [be64(&path, 48), be64(&path, be64(&path, 48))];
        let Ok(image) = open(&path) else { continue }; // refused as a whole is fine too
        drop(image);
        writing(&path, async |disk| {
            assert_eq!(read(&disk, 0, 512).await.unwrap(), [7; 512], "{name}");
            let _ = write(&disk, 2 << 20, 4096).await;
        });
        assert_eq!([be64(&path, 48), be64(&path, be64(&path, 48))], tables, "{name}");
        writing(&path, async |disk| assert_eq!(read(&disk, 0, 512).await.unwrap(), [7; 512], "{name}"));
    }
}
