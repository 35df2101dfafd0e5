//! Exports by URI, as libnbd and QEMU spell them: transports, addresses, and names with characters that a URI encodes.

mod common;

use common::daemon::Setup;
use common::libnbd::Libnbd;
use common::qemu::{self, run};
use serde_json::Value;
use std::process::Command;

/// A name that has something of everything: space, the marks of URIs, a percent sign, letters beyond ASCII.
const STRANGE: &str = "vm 1/disk#\u{fc}?%41&;=+@:";

/// Bytes that a URI may hold as they are; the others are encoded.
fn encoded(name: &str) -> String {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"-._~".contains(b);
    name.bytes().map(|b| if plain(&b) { (b as char).to_string() } else { format!("%{b:02X}") }).collect()
}

fn qemu_size(image: &[&str]) -> u64 {
    let info: Value =
        serde_json::from_str(&run(Command::new("qemu-img").args(["info", "--output=json"]).args(image))).unwrap();
    info["virtual-size"].as_u64().unwrap()
}

#[test]
fn every_transport_and_every_name_has_a_uri() {
    let setup = Setup::new().generic("listenaddr = ::1, 127.0.0.1");
    let sizes = [
        ("plain", 3u64 << 20),
        (STRANGE, 5 << 20),
        ("a/b/c", 7 << 20),
        ("100%", 9 << 20),
        ("\u{65e5}\u{672c}", 11 << 20),
    ];
    for (i, (name, size)) in sizes.iter().enumerate() {
        let image = setup.image(&format!("{i}.qcow2"), "", &size.to_string());
        let text = format!("[{name}]\nexportname = {}\n", image.display());
        std::fs::write(setup.dir().join("conf.d").join(format!("{i}.conf")), text).unwrap();
    }
    let daemon = setup.start();
    let (port, socket) = (daemon.port(), daemon.socket());
    let socket = socket.to_str().unwrap();
    let mut names = sizes.map(|s| s.0.to_owned());
    names.sort();
    assert_eq!(daemon.names(), names);
    for (name, size) in sizes {
        let path = encoded(name);
        let everywhere = [
            format!("nbd://127.0.0.1:{port}/{path}"),
            format!("nbd://[::1]:{port}/{path}"),
            format!("nbd+unix:///{path}?socket={}", encoded(socket)),
            format!("nbd+unix:///{path}?socket={socket}"),
        ];
        for uri in &everywhere {
            for libnbd in Libnbd::BOTH {
                assert_eq!(libnbd.run("nbdinfo", &["--size", uri]), format!("{size}\n"), "{libnbd:?} {uri}");
            }
            assert_eq!(qemu_size(&["-f", "raw", uri]), size, "{uri}");
        }
        assert_eq!(qemu_size(&["-f", "raw", &format!("nbd+tcp://127.0.0.1:{port}/{path}")]), size);
        // QEMU's other ways to say it take the name as it is
        let options = [
            format!("driver=nbd,host=127.0.0.1,port={port},export={}", name.replace(',', ",,")),
            format!("driver=nbd,server.type=inet,server.host=::1,server.port={port},export={name}"),
            format!("driver=nbd,server.type=unix,server.path={socket},export={name}"),
        ];
        for options in &options {
            assert_eq!(qemu_size(&["--image-opts", options]), size, "{options}");
        }
        // what nbdinfo prints as a URI leads back to the export
        let text = Libnbd::Installed.run("nbdinfo", &["--json", &everywhere[0]]);
        let info: Value = serde_json::from_str(&text).unwrap();
        let uri = info["exports"][0]["uri"].as_str().unwrap();
        assert_eq!(Libnbd::Newer.run("nbdinfo", &["--size", uri]), format!("{size}\n"), "{uri}");
    }
    let written = format!("nbd+unix:///{}?socket={socket}", encoded(STRANGE));
    run(Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 5 1M 1M", "-c", "flush", &written]));
    let fio = [
        "--name=v",
        "--ioengine=nbd",
        "--rw=randwrite",
        "--bs=16k",
        "--size=1M",
        "--verify=crc32c",
        "--verify_state_save=0",
    ];
    let plain = format!("--uri=nbd+unix:///plain?socket={socket}");
    run(Command::new("fio").args(fio).arg(plain));
    let (dir, _) = daemon.stop();
    for i in 0..sizes.len() {
        qemu::check(&dir.path().join(format!("{i}.qcow2")));
    }
    let strange = dir.path().join("1.qcow2");
    run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "read -P 5 1M 1M"]).arg(strange));
}

#[test]
fn clients_that_name_no_export_get_the_default_one() {
    let setup = Setup::new().generic("defaultexport = main disk");
    let image = setup.image("disk.qcow2", "", "3M");
    setup.export("other", &setup.image("other.qcow2", "", "5M"), "");
    let daemon = setup.start();
    let nameless = [daemon.tcp(""), daemon.uri(""), format!("nbd://127.0.0.1:{}", daemon.port())];
    for uri in &nameless {
        let refused = qemu::output(Command::new("nbdinfo").arg("--size").arg(uri));
        assert!(!refused.status.success(), "its export is not there yet");
    }
    // not even a reload is needed once it is
    common::daemon::write_export(daemon.dir(), "main disk", &image, "");
    for uri in &nameless {
        for libnbd in Libnbd::BOTH {
            assert_eq!(libnbd.run("nbdinfo", &["--size", uri]), "3145728\n", "{libnbd:?} {uri}");
        }
        assert_eq!(qemu_size(&["-f", "raw", uri]), 3 << 20);
    }
    Libnbd::Newer.python(
        "import nbd, sys\nh = nbd.NBD()\nh.set_full_info(True)\nh.connect_uri(sys.argv[1])\n\
         assert h.get_canonical_export_name() == 'main disk', h.get_canonical_export_name()\n\
         h.pwrite(b'default', 0)\nh.shutdown()\n",
        &[&daemon.tcp("")],
    );
    assert_eq!(daemon.names(), ["main disk", "other"]);
    // another one, and none at all
    let base = daemon.dir().join("cowgate.conf");
    let text = std::fs::read_to_string(&base).unwrap();
    std::fs::write(&base, text.replace("defaultexport = main disk", "defaultexport = other")).unwrap();
    daemon.reload();
    assert_eq!(qemu_size(&["-f", "raw", &daemon.tcp("")]), 5 << 20);
    std::fs::write(&base, text.replace("defaultexport = main disk", "")).unwrap();
    daemon.reload();
    assert!(!qemu::output(Command::new("nbdinfo").arg(daemon.tcp(""))).status.success());
    let _dir = daemon.stop();
    qemu::check(&image);
    run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "read -P 100 0 1"]).arg(&image));
}
