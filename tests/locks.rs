//! QEMU's tools refuse what we hold, we refuse what they hold.

mod common;

use common::daemon::Setup;
use common::holder::Holder;
use common::qemu;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

fn qemu_img_info(image: &Path) -> bool {
    qemu::output(Command::new("qemu-img").args(["info", "-f", "qcow2"]).arg(image)).status.success()
}

#[test]
fn an_image_held_for_writing_is_refused_by_qemu() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    setup.export("disk", &image, "");
    setup.export("ro", &image, "readonly = true");
    let daemon = setup.start();
    assert!(qemu_img_info(&image), "nobody is connected: nobody holds it");
    let writer = Holder::client(&daemon.uri("disk")).unwrap();
    assert!(!qemu_img_info(&image), "info without -U");
    qemu::run(Command::new("qemu-img").args(["info", "-U", "-f", "qcow2"]).arg(&image));
    let write = ["-f", "qcow2", "-c", "write 0 512"];
    assert!(!qemu::output(Command::new("qemu-io").args(write).arg(&image)).status.success(), "a second writer");
    let reader = Holder::client(&daemon.uri("ro")).unwrap();
    drop(writer);
    daemon.wait_for("the write lock to be given back", || qemu_img_info(&image));
    assert!(
        !qemu::output(Command::new("qemu-io").args(write).arg(&image)).status.success(),
        "a writer beside our reader"
    );
    drop(reader);
    daemon.wait_for("the image to be closed", || {
        qemu::output(Command::new("qemu-io").args(write).arg(&image)).status.success()
    });
    let _dir = daemon.stop();
    qemu::check(&image);
}

#[test]
fn the_holder_is_named() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    setup.export("disk", &image, "");
    setup.export("ro", &image, "readonly = true");
    let daemon = setup.start();
    let holder = Holder::qemu_io(&["-f", "qcow2"], &image).unwrap();
    for export in ["disk", "ro"] {
        let out = qemu::output(Command::new("nbdinfo").arg(daemon.uri(export)));
        assert!(!out.status.success(), "{export} while QEMU writes");
        let words = format!("export {export:?}: {}: is in use by {}: its", image.display(), holder.named());
        daemon.wait_for(&words, || daemon.log().contains(&words));
    }
    drop(holder);
    qemu::run(Command::new("nbdinfo").arg(daemon.uri("disk")));
    let _dir = daemon.stop();
}

/// Two exports of one file, by whatever name, share one brain and one lock.
#[test]
fn exports_of_one_image_share_it() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    let (alias, twin) = (setup.dir().join("alias.qcow2"), setup.dir().join("twin.qcow2"));
    std::os::unix::fs::symlink(&image, &alias).unwrap();
    std::fs::hard_link(&image, &twin).unwrap();
    setup.export("image", &image, "");
    setup.export("alias", &alias, "");
    setup.export("twin", &twin, "");
    setup.export("reader", &twin, "readonly = true");
    setup.export("raw", &image, "format = raw");
    let daemon = setup.start();
    daemon.python(
        "image",
        r#"
def to(name):
    other = nbd.NBD()
    other.connect_uri(uri.replace('///image', '///' + name))
    return other
alias, twin, reader = to('alias'), to('twin'), to('reader')
all = [h, alias, twin, reader]
for i, writer in enumerate([h, alias, twin] * 20):
    # the same cluster, one no client has written yet, and zeroes: what one wrote, all read, without a flush
    for at in (1000, (i % 15 + 1) * 65536 - 7):
        data = bytes([i + 1]) * 30
        writer.pwrite(data, at)
        assert all[(i + 1) % 4].pread(30, at) == data and all[(i + 2) % 4].pread(30, at) == data
    writer.zero(65536, 0)
    assert reader.pread(2000, 0) == bytes(2000)
assert reader.is_read_only() and not twin.is_read_only()
try:
    to('raw')
    raise SystemExit('two formats at once')
except nbd.Error:
    pass
h.shutdown()
alias.pwrite(b'still', 0)
assert reader.pread(5, 0) == b'still'
print('on', flush=True)
"#,
    );
    let clients: Vec<Holder> =
        ["image", "alias", "twin", "reader"].map(|name| Holder::client(&daemon.uri(name)).unwrap()).into();
    assert_eq!(open_files_that_lock(daemon.pid(), &image), 1);
    drop(clients);
    let _dir = daemon.stop();
    qemu::check(&image);
}

/// How many of a process's open files hold locks on an image.
fn open_files_that_lock(pid: u32, image: &Path) -> usize {
    let inode = format!(":{} ", std::fs::metadata(image).unwrap().ino());
    let infos = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap().filter_map(Result::ok);
    let texts = infos.filter_map(|info| std::fs::read_to_string(info.path()).ok());
    texts.filter(|text| text.lines().any(|line| line.starts_with("lock:") && line.contains(&inode))).count()
}

#[test]
fn a_backing_file_is_not_written_under_its_overlay() {
    let setup = Setup::new();
    let base = setup.image("base.qcow2", "", "1M");
    let overlay = setup.dir().join("overlay.qcow2");
    qemu::run(
        Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-b"])
            .arg(&base)
            .args(["-F", "qcow2"])
            .arg(&overlay),
    );
    setup.export("base", &base, "");
    setup.export("overlay", &overlay, "");
    let daemon = setup.start();
    let reader = Holder::client(&daemon.uri("overlay")).unwrap();
    assert!(!qemu::output(Command::new("nbdinfo").arg(daemon.uri("base"))).status.success());
    drop(reader);
    daemon.wait_for("the overlay to be closed", || {
        qemu::output(Command::new("nbdinfo").arg(daemon.uri("base"))).status.success()
    });
    let _dir = daemon.stop();
}
