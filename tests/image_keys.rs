//! How an export uses its image: compressed writing, detection of zeroes, internal snapshots, external data files.

mod common;

use common::daemon::Setup;
use common::qemu;
use std::path::Path;
use std::process::Command;

/// A raw file whose megabytes are text that compresses, noise that does not, and zeroes in turn.
fn source(path: &Path, mib: usize) -> Vec<u8> {
    let mut state = 7u64;
    let mut bytes = vec![0u8; mib << 20];
    for (i, piece) in bytes.chunks_mut(1 << 20).enumerate() {
        match i % 3 {
            0 => piece.iter_mut().enumerate().for_each(|(j, b)| *b = (i + j / 300) as u8),
            1 => piece.iter_mut().for_each(|b| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                *b = (state >> 56) as u8;
            }),
            _ => {}
        }
    }
    std::fs::write(path, &bytes).unwrap();
    bytes
}

fn compressed_clusters(image: &Path) -> u64 {
    let text = qemu::qemu_img("check -f qcow2 --output=json", &[image]);
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    report["compressed-clusters"].as_u64().unwrap_or(0)
}

#[test]
fn a_backup_into_a_compressed_export() {
    let setup = Setup::new();
    let raw = setup.dir().join("source.raw");
    let bytes = source(&raw, 24);
    let cases = [
        ("zlib", "", "compress = zlib"),
        ("zstd", "compression_type=zstd", "compress = zstd"),
        ("small", "cluster_size=4k,compression_type=zstd", "compress = zstd"),
        ("narrow", "refcount_bits=1", "compress = zlib"),
        ("huge", "cluster_size=2M,compression_type=zstd", "compress = zstd"),
        ("extended", "extended_l2=on,cluster_size=32k", "compress = zlib"),
    ];
    let images: Vec<_> = cases
        .iter()
        .map(|(name, options, keys)| {
            let image = setup.image(&format!("{name}.qcow2"), options, "24M");
            setup.export(name, &image, keys);
            image
        })
        .collect();
    let daemon = setup.start();
    for (name, ..) in cases {
        // requests as large as the largest cluster, so that each holds full ones
        let copy = ["--flush", "--request-size=2097152", "--sparse=0"];
        qemu::run(Command::new("nbdcopy").args(copy).arg(&raw).arg(daemon.uri(name)));
        let out = daemon.dir().join("out.raw");
        qemu::run(Command::new("nbdcopy").arg(daemon.uri(name)).arg(&out));
        assert!(std::fs::read(&out).unwrap() == bytes, "{name} reads back differently");
        std::fs::remove_file(out).unwrap();
    }
    let _dir = daemon.stop();
    for (image, (name, ..)) in images.iter().zip(cases) {
        qemu::check(image);
        qemu::same_content(image, &raw);
        assert!(compressed_clusters(image) > 0, "{name} holds nothing compressed");
        let len = std::fs::metadata(image).unwrap().len();
        // and tables, of which the largest clusters waste most
        assert!(len < 20 << 20, "{name}: 8 MiB of noise, 8 of text and 8 of zeroes took {len} bytes");
    }
}

#[test]
fn what_is_overwritten_in_a_compressed_export_is_given_back() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "compression_type=zstd", "8M");
    setup.export("disk", &image, "compress = zstd");
    let daemon = setup.start();
    daemon.python(
        "disk",
        "import random\n\
         model = bytearray(h.get_size())\n\
         random.seed(4)\n\
         for round in range(400):\n    \
             at = random.randrange(len(model) // 512) * 512\n    \
             if random.random() < 0.5: at = at // 65536 * 65536\n    \
             n = min(random.choice([512, 4096, 65536, 131072, 1 << 20, 100 << 10]), len(model) - at)\n    \
             kind = random.randrange(4)\n    \
             data = bytes(n) if kind == 0 else os.urandom(n) if kind == 1 else bytes([round % 255 + 1]) * n\n    \
             h.pwrite(data, at)\n    \
             model[at:at + n] = data\n    \
             if round % 50 == 49: h.flush()\n    \
             at = random.randrange(len(model) // 512) * 512\n    \
             n = min(200000, len(model) - at)\n    \
             assert h.pread(n, at) == model[at:at + n], round\n\
         open(os.path.join(os.path.dirname(uri.split('socket=')[1]), 'model.raw'), 'wb').write(model)\n",
    );
    let (dir, _) = daemon.stop();
    qemu::check(&image);
    qemu::same_content(&image, &dir.path().join("model.raw"));
    assert!(std::fs::metadata(&image).unwrap().len() < 32 << 20, "freed clusters are used again");
}

#[test]
fn a_way_of_compressing_the_image_does_not_have_is_refused() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "8M");
    let data = setup.image("split.qcow2", &format!("data_file={}/split.raw", setup.dir().display()), "8M");
    setup.export("disk", &image, "compress = zstd");
    setup.export("split", &data, "compress = zlib");
    let daemon = setup.start();
    for (name, words) in [("disk", "write `compress = zlib`"), ("split", "external data file cannot hold compressed")] {
        let refused = qemu::output(Command::new("qemu-io").args(["-f", "raw", "-c", "quit"]).arg(daemon.uri(name)));
        assert!(!refused.status.success());
        daemon.wait_for(words, || daemon.log().contains(words));
    }
    daemon.stop();
}

#[test]
fn zeroes_are_found_in_writes() {
    let setup = Setup::new();
    let raw = setup.dir().join("source.raw");
    std::fs::write(&raw, vec![0; 16 << 20]).unwrap();
    let images = ["off", "on", "unmap"].map(|how| {
        let image = setup.image(&format!("{how}.qcow2"), "", "16M");
        setup.export(how, &image, &format!("detectzeroes = {how}"));
        image
    });
    let flat = setup.dir().join("flat.img");
    std::fs::write(&flat, vec![7; 16 << 20]).unwrap();
    setup.export("flat", &flat, "detectzeroes = unmap");
    let daemon = setup.start();
    for name in ["off", "on", "unmap", "flat"] {
        let mut io = Command::new("qemu-io");
        io.args(["-f", "raw", "-c", "write -P 9 0 1M", "-c", "write -P 0 0 16M", "-c", "write -P 3 4M 1000"]);
        qemu::run(io.args(["-c", "write -P 0 4M 100", "-c", "read -P 0 4M 100"]).arg(daemon.uri(name)));
    }
    let _dir = daemon.stop();
    std::fs::write(&raw, {
        let mut bytes = vec![0u8; 16 << 20];
        bytes[(4 << 20) + 100..(4 << 20) + 1000].fill(3);
        bytes
    })
    .unwrap();
    let allocated = |path: &Path| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(path).unwrap().blocks() * 512
    };
    for image in &images {
        qemu::check(image);
        qemu::same_content(image, &raw);
    }
    assert!(std::fs::read(&flat).unwrap() == std::fs::read(&raw).unwrap());
    let [off, on, unmap] = images.each_ref().map(|i| allocated(i));
    assert!(off >= 16 << 20, "off: {off}");
    assert!((1 << 20..3 << 20).contains(&on), "the megabyte that had storage keeps it: {on}");
    assert!(unmap < 1 << 20, "unmap: {unmap}");
    assert!(allocated(&flat) < 1 << 20, "flat: {}", allocated(&flat));
}

#[test]
fn a_snapshot_is_served_while_the_disk_is_written() {
    let setup = Setup::new();
    let base = setup.image("base.qcow2", "", "64M");
    let image = setup.dir().join("disk.qcow2");
    qemu::run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 1 0 64M"]).arg(&base));
    qemu::qemu_img("create -q -f qcow2 -F qcow2 -b base.qcow2", &[&image]);
    qemu::run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 2 8M 8M"]).arg(&image));
    qemu::qemu_img("snapshot -c before", &[&image]);
    qemu::run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 3 12M 8M"]).arg(&image));
    qemu::qemu_img("snapshot -c later", &[&image]);
    qemu::qemu_img("resize -q -f qcow2", &[&image, Path::new("128M")]);
    setup.export("disk", &image, "");
    setup.export("before", &image, "snapshot = before");
    setup.export("second", &image, "snapshot = 2");
    setup.export("missing", &image, "snapshot = never");
    let daemon = setup.start();
    let io = |name: &str, script: &[&str], more: &[&str]| {
        let mut io = Command::new("qemu-io");
        io.args(["-f", "raw"]).args(more);
        for command in script {
            io.args(["-c", command]);
        }
        qemu::output(io.arg(daemon.uri(name)))
    };
    let before = ["read -P 1 0 8M", "read -P 2 8M 8M", "read -P 1 16M 48M"];
    let second = ["read -P 1 0 8M", "read -P 2 8M 4M", "read -P 3 12M 8M", "read -P 1 20M 44M"];
    // with the disk not open, open, and written
    assert!(io("before", &before, &["-r"]).status.success());
    let program = format!(
        "s = nbd.NBD()\ns.connect_uri({:?})\nassert s.get_size() == 64 << 20 and s.is_read_only()\n\
         assert h.get_size() == 128 << 20\n\
         for i in range(16):\n    h.pwrite(bytes([9]) * (4 << 20), i << 22)\n    \
         assert s.pread(1 << 20, 8 << 20) == bytes([2]) * (1 << 20)\n    h.flush()\n",
        daemon.uri("before")
    );
    daemon.python("disk", &program);
    assert!(io("second", &second, &["-r"]).status.success());
    assert!(io("disk", &["read -P 9 0 64M"], &[]).status.success());
    assert!(!io("before", &["write 0 512"], &[]).status.success(), "a snapshot is never written");
    assert!(!io("missing", &["read 0 512"], &["-r"]).status.success());
    let words = "it has \"before\", \"later\"";
    daemon.wait_for(words, || daemon.log().contains(words));
    let _dir = daemon.stop();
    qemu::check(&image);
    let raw = image.with_extension("raw");
    qemu::qemu_img("convert -f qcow2 -O raw -l before", &[&image, &raw]);
    let bytes = std::fs::read(&raw).unwrap();
    assert!(bytes[..8 << 20].iter().all(|&b| b == 1) && bytes[8 << 20..16 << 20].iter().all(|&b| b == 2));
}

#[test]
fn guest_data_in_a_file_of_its_own() {
    let setup = Setup::new();
    let raw = setup.dir().join("source.raw");
    let bytes = source(&raw, 12);
    let dir = setup.dir().display().to_string();
    let cases = [
        ("plain", format!("data_file={dir}/plain.data")),
        ("raw", format!("data_file={dir}/raw.data,data_file_raw=on")),
        ("extended", format!("data_file={dir}/extended.data,extended_l2=on")),
        ("small", format!("data_file={dir}/small.data,data_file_raw=on,cluster_size=512")),
    ];
    let images: Vec<_> = cases
        .iter()
        .map(|(name, options)| {
            let image = setup.image(&format!("{name}.qcow2"), options, "12M");
            setup.export(name, &image, "");
            image
        })
        .collect();
    let daemon = setup.start();
    for (name, _) in &cases {
        let mut io = Command::new("qemu-io");
        io.args(["-f", "raw", "-c", "write -P 5 0 12M", "-c", "write -z -u 1000 9M", "-c", "discard 64k 1M"]);
        qemu::run(io.args(["-c", "write -z 2M 2M"]).arg(daemon.uri(name)));
        qemu::run(Command::new("nbdcopy").args(["--flush"]).arg(&raw).arg(daemon.uri(name)));
        let mut io = Command::new("qemu-io");
        io.args(["-f", "raw", "-c", "write -z -u 2M 1M", "-c", "discard 5M 1M", "-c", "write -P 6 511 1000"]);
        qemu::run(io.args(["-c", "write -z -u 100000 5000"]).arg(daemon.uri(name)));
        let locked = qemu::output(Command::new("qemu-img").args(["info", "-f", "raw", &format!("{dir}/{name}.data")]));
        assert!(locked.status.success(), "nobody writes now");
    }
    let _dir = daemon.stop();
    let mut bytes = bytes;
    bytes[2 << 20..3 << 20].fill(0);
    bytes[5 << 20..6 << 20].fill(0);
    bytes[511..1511].fill(6);
    bytes[100_000..105_000].fill(0);
    std::fs::write(&raw, &bytes).unwrap();
    for (image, (name, options)) in images.iter().zip(&cases) {
        qemu::check(image);
        qemu::same_content(image, &raw);
        if options.contains("data_file_raw") {
            let data = std::fs::read(image.with_file_name(format!("{name}.data"))).unwrap();
            assert!(data == bytes, "{name}: the data file is a raw image of the disk by itself");
        }
    }
}

#[test]
fn a_data_file_is_as_long_as_its_disk() {
    let setup = Setup::new();
    let dir = setup.dir().display().to_string();
    let size: u64 = (1 << 20) + 1536;
    let images = ["off", "on"].map(|extended| {
        let options = format!("data_file={dir}/{extended}.data,data_file_raw=on,extended_l2={extended}");
        let image = setup.image(&format!("{extended}.qcow2"), &options, &size.to_string());
        setup.export(extended, &image, "");
        // as a raw image from elsewhere is; QEMU makes new ones whole clusters long
        let data = std::fs::File::options().write(true).open(image.with_file_name(format!("{extended}.data")));
        data.unwrap().set_len(size).unwrap();
        image
    });
    let daemon = setup.start();
    for name in ["off", "on"] {
        let mut io = Command::new("qemu-io");
        let script = [format!("write -P 3 {} 100", size - 700), format!("write -z {} 300", size - 300)];
        qemu::run(io.args(["-f", "raw", "-c", &script[0], "-c", &script[1]]).arg(daemon.uri(name)));
    }
    let _dir = daemon.stop();
    for (image, extended) in images.iter().zip(["off", "on"]) {
        qemu::check(image);
        let data = image.with_file_name(format!("{extended}.data"));
        assert_eq!(std::fs::metadata(&data).unwrap().len(), size);
        qemu::same_content(image, &data);
    }
}

#[test]
fn a_data_file_outside_the_roots_missing_or_in_use_is_refused() {
    let setup = Setup::new();
    let elsewhere = tempfile::tempdir().unwrap();
    let dir = setup.dir().display().to_string();
    let outside = format!("data_file={}/outside.data", elsewhere.path().display());
    setup.export("outside", &setup.image("outside.qcow2", &outside, "1M"), "");
    setup.export("missing", &setup.image("missing.qcow2", &format!("data_file={dir}/missing.data"), "1M"), "");
    std::fs::remove_file(setup.dir().join("missing.data")).unwrap();
    let itself = setup.image("itself.qcow2", &format!("data_file={dir}/xxxxxx.qcow2"), "1M");
    let bytes = std::fs::read(&itself).unwrap();
    let at = bytes.windows(6).position(|w| w == b"xxxxxx").unwrap();
    std::fs::write(&itself, [&bytes[..at], b"itself", &bytes[at + 6..]].concat()).unwrap();
    setup.export("itself", &itself, "");
    let used = setup.image("used.qcow2", &format!("data_file={dir}/used.data"), "1M");
    setup.export("used", &used, "");
    // another image with the same data file: the second writer is refused
    let twin = setup.image("twin.qcow2", &format!("data_file={dir}/used.data"), "1M");
    setup.export("twin", &twin, "");
    let daemon = setup.start();
    for (name, words) in [
        ("outside", "lies outside the image roots"),
        ("missing", "missing.data: cannot open it"),
        ("itself", "the same file is used twice in this chain"),
    ] {
        let refused = qemu::output(Command::new("nbdinfo").arg("--map").arg(daemon.uri(name)));
        assert!(!refused.status.success(), "{name}");
        daemon.wait_for(words, || daemon.log().contains(words));
    }
    let program = format!(
        "h.pwrite(bytes(512), 0)\nt = nbd.NBD()\n\
         try:\n    t.connect_uri({:?})\nexcept nbd.Error:\n    sys.exit(0)\nsys.exit('the twin was let in')\n",
        daemon.uri("twin")
    );
    daemon.python("used", &program);
    let words = "used.data: is in use by this very process";
    daemon.wait_for(words, || daemon.log().contains(words));
    daemon.stop();
}
