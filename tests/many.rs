//! Ten thousand exports: what the start, a reload, a list and idleness cost.

mod common;

use common::daemon::{Setup, write_export};
use common::nbd::Nbd;
use std::fs::File;
use std::time::{Duration, SystemTime};

const EXPORTS: usize = 10_000;

#[test]
fn ten_thousand_exports_cost_memory_and_nothing_else() {
    let none = Setup::new().start();
    let (descriptors, idle_bytes, idle_ns) = (none.descriptors(), none.resident_bytes(), none.cpu_ns());
    drop(none.stop());

    let setup = Setup::new();
    let dir = setup.dir().to_owned();
    let image = setup.image("disk.qcow2", "", "64M");
    for i in 0..EXPORTS {
        let name = format!("backup-vm{i:05}-disk0-full-20250101T120000");
        write_export(&dir, &name, &image, "readonly = true\nmultifile = false\ncopyonwrite = false");
        // as if written long ago: a start looks again at what is new
        let file = File::options().write(true).open(dir.join("conf.d").join(format!("{name}.conf"))).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
    }
    let daemon = setup.start();
    let start_ns = daemon.cpu_ns() - idle_ns;
    let bytes = daemon.resident_bytes();
    assert_eq!(daemon.descriptors(), descriptors, "idle exports cost no descriptor");

    write_export(&dir, "backup-vm05000-disk0-full-20250101T120000", &image, "readonly = false");
    let before = daemon.cpu_ns();
    daemon.reload();
    let reload_ns = daemon.cpu_ns() - before;
    assert!(daemon.log().contains("0 added, 1 changed, 0 removed; 10000 exports"));

    let before = daemon.cpu_ns();
    let names = Nbd::connect(&daemon.socket()).list();
    let list_ns = daemon.cpu_ns() - before;
    assert_eq!(names.len(), EXPORTS);
    let ms = |ns: u64| ns as f64 / 1e6;
    println!(
        "{EXPORTS} exports: start {:.1} ms CPU, reload with one change {:.1} ms, list {:.1} ms; {} MiB resident ({} MiB without)",
        ms(start_ns),
        ms(reload_ns),
        ms(list_ns),
        bytes >> 20,
        idle_bytes >> 20,
    );
    assert!(reload_ns * 10 < start_ns, "a reload with one change costs {reload_ns} ns, the start {start_ns} ns");
    for i in [0, 4999, 5000, 9999] {
        let mut client = Nbd::connect(&daemon.socket());
        client.go(&format!("backup-vm{i:05}-disk0-full-20250101T120000")).unwrap();
    }
    daemon.wait_for("the image to be closed", || daemon.log().contains("disk.qcow2: closed"));
    daemon.wait_for("the connections to be closed", || daemon.descriptors() == descriptors);
    let _dir = daemon.stop();
}
