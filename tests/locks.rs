//! QEMU's tools refuse what we hold, we refuse what they hold.

mod common;

use common::daemon::Setup;
use common::holder::Holder;
use common::qemu;
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
        let said = qemu::text(&out.stderr);
        let words = format!("export {export:?}: {}: is in use by {}: its", image.display(), holder.named());
        assert!(daemon.log().contains(&words), "{words}: {said}{}", daemon.log());
    }
    drop(holder);
    qemu::run(Command::new("nbdinfo").arg(daemon.uri("disk")));
    let _dir = daemon.stop();
}

#[test]
fn two_exports_of_one_image_share_it() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    std::os::unix::fs::symlink(&image, setup.dir().join("alias.qcow2")).unwrap();
    setup.export("a", &image, "");
    setup.export("b", &setup.dir().join("alias.qcow2"), "");
    setup.export("raw", &image, "format = raw");
    let daemon = setup.start();
    daemon.python(
        "a",
        "b = nbd.NBD()\nb.connect_uri(uri.replace('///a', '///b'))\nh.pwrite(b'shared', 1000)\n\
         assert b.pread(6, 1000) == b'shared'\nb.pwrite(b'both', 70000)\nassert h.pread(4, 70000) == b'both'\n\
         try:\n    nbd.NBD().connect_uri(uri.replace('///a', '///raw'))\n    raise SystemExit('two formats at once')\n\
         except nbd.Error:\n    pass\n",
    );
    let _dir = daemon.stop();
    qemu::check(&image);
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
