//! What the format promises beyond data: headers that keep what we do not know, features that are refused by name.

mod common;

use common::daemon::Setup;
use common::qemu;
use std::path::Path;
use std::process::Command;

const BITMAPS: u64 = 1;

fn be32(bytes: &[u8], at: usize) -> usize {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

/// Puts a longer header, an unknown additional field, unknown compatible and autoclear bits and an unknown extension
/// into an image. Returns its first cluster.
fn enrich(path: &Path) -> Vec<u8> {
    let mut bytes = std::fs::read(path).unwrap();
    let old = be32(&bytes, 100);
    let mut header = bytes[..old].to_vec();
    header[80..88].copy_from_slice(&(1u64 << 50).to_be_bytes());
    header[88..96].copy_from_slice(&(1u64 << 40).to_be_bytes());
    header.resize(136, 0);
    header[128..136].copy_from_slice(b"unheard!");
    header[100..104].copy_from_slice(&136u32.to_be_bytes());
    let mut extension = Vec::new();
    extension.extend(0x5eed_5eedu32.to_be_bytes());
    extension.extend(13u32.to_be_bytes());
    extension.extend(b"keep me whole\0\0\0");
    let backing_at = u64::from_be_bytes(bytes[8..16].try_into().unwrap()) as usize;
    let end = if backing_at == 0 { 4096 } else { backing_at };
    let extensions = bytes[old..end].to_vec();
    let name = bytes[end..end + be32(&bytes, 16)].to_vec();
    let area = [&header[..], &extension, &extensions, &name].concat();
    let moved = (area.len() - name.len()) as u64;
    bytes[..area.len()].copy_from_slice(&area);
    if backing_at != 0 {
        bytes[8..16].copy_from_slice(&moved.to_be_bytes());
    }
    std::fs::write(path, &bytes).unwrap();
    bytes[..65536].to_vec()
}

#[test]
fn the_header_keeps_what_we_do_not_know() {
    let setup = Setup::new();
    setup.image("base.qcow2", "", "16M");
    let images: Vec<_> = ["plain", "overlay"]
        .map(|name| {
            let image = setup.dir().join(format!("{name}.qcow2"));
            match name {
                "plain" => drop(setup.image("plain.qcow2", "lazy_refcounts=on", "16M")),
                _ => drop(qemu::qemu_img("create -q -f qcow2 -F qcow2 -b base.qcow2", &[&image])),
            }
            let before = enrich(&image);
            qemu::check(&image);
            setup.export(name, &image, "");
            (name, image, before)
        })
        .into();
    let daemon = setup.start();
    for (name, ..) in &images {
        let mut io = Command::new("qemu-io");
        qemu::run(io.args(["-f", "raw", "-c", "read 0 16M", "-c", "write -P 7 0 16M"]).arg(daemon.uri(name)));
    }
    let _dir = daemon.stop();
    for (name, image, mut before) in images {
        let after = std::fs::read(&image).unwrap();
        before[88..96].fill(0); // the promise that we did not keep is taken back
        assert!(after[..65536] == before[..], "{name}: more of the header changed");
        qemu::check(&image);
    }
}

#[test]
fn encrypted_images_are_refused_by_name() {
    let setup = Setup::new();
    let image = setup.dir().join("luks.qcow2");
    let secret = ["--object", "secret,id=s,data=open sesame", "-f", "qcow2", "-o"];
    let luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    qemu::run(Command::new("qemu-img").args(["create", "-q"]).args(secret).arg(luks).arg(&image).arg("16M"));
    let other = setup.image("other.qcow2", "", "1M");
    setup.export("luks", &image, "");
    setup.export("other", &other, "");
    let daemon = setup.start();
    let refused = qemu::output(Command::new("nbdinfo").arg(daemon.uri("luks")));
    assert!(!refused.status.success());
    daemon.wait_for("LUKS", || daemon.log().contains("uses LUKS encryption (crypt_method 2), which is not supported"));
    qemu::run(Command::new("nbdinfo").arg(daemon.uri("other")));
    daemon.stop();
}

#[test]
fn an_unknown_feature_is_refused_by_the_name_in_the_image() {
    let setup = Setup::new();
    let image = setup.image("future.qcow2", "", "1M");
    let mut bytes = std::fs::read(&image).unwrap();
    bytes[72..80].copy_from_slice(&(1u64 << 17).to_be_bytes());
    // the first entry of the feature name table now speaks of that bit
    let at = bytes.windows(9).position(|w| w == b"dirty bit").unwrap();
    bytes[at - 1] = 17;
    bytes[at..at + 9].copy_from_slice(b"warp core");
    std::fs::write(&image, bytes).unwrap();
    setup.export("future", &image, "");
    let daemon = setup.start();
    assert!(!qemu::output(Command::new("nbdinfo").arg(daemon.uri("future"))).status.success());
    let words = "uses \"warp core\" (incompatible feature bit 17)";
    daemon.wait_for(words, || daemon.log().contains(words));
    daemon.stop();
}

#[test]
fn a_bitmap_bit_without_bitmaps_goes() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    let mut bytes = std::fs::read(&image).unwrap();
    bytes[88..96].copy_from_slice(&BITMAPS.to_be_bytes());
    std::fs::write(&image, bytes).unwrap();
    setup.export("disk", &image, "");
    let daemon = setup.start();
    qemu::run(Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 1M"]).arg(daemon.uri("disk")));
    let _dir = daemon.stop();
    assert_eq!(std::fs::read(&image).unwrap()[88..96], [0; 8]);
    qemu::check(&image);
}
