//! What clients may take: time for a handshake, idle time, places, memory. Each limit with real clients that reach it.

mod common;

use common::daemon::{Daemon, Setup};
use common::nbd::Nbd;
use common::qemu;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

/// Longer than any limit in these tests.
const PATIENCE: Duration = Duration::from_secs(30);

/// A daemon that serves `disk`, 64 MiB, with lines for `[generic]` and for the export.
fn daemon(generic: &str, export: &str) -> Daemon {
    let setup = Setup::new().generic(generic);
    let image = setup.image("disk.qcow2", "", "64M");
    setup.export("disk", &image, export);
    setup.start()
}

/// A connection that says nothing.
fn silent(daemon: &Daemon) -> UnixStream {
    let stream = UnixStream::connect(daemon.socket()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn client(daemon: &Daemon, export: &str) -> Nbd {
    let mut nbd = Nbd::connect(&daemon.socket());
    nbd.go(export).unwrap();
    nbd
}

/// How long until the server ends a connection.
#[track_caller]
fn ends_after(stream: &mut UnixStream) -> Duration {
    let start = Instant::now();
    let mut rest = [0; 4096];
    loop {
        match stream.read(&mut rest) {
            Ok(0) => return start.elapsed(),
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return start.elapsed(),
            Err(e) => panic!("the connection does not end: {e}"),
        }
    }
}

/// Whether the server keeps a connection for this long.
fn stays(stream: &mut UnixStream, time: Duration) -> bool {
    stream.set_read_timeout(Some(time)).unwrap();
    let start = Instant::now();
    let mut rest = [0; 4096];
    let stays = loop {
        match stream.read(&mut rest) {
            Ok(0) => break false,
            Ok(_) if start.elapsed() < time => {}
            Ok(_) => break true,
            Err(e) => break e.kind() == std::io::ErrorKind::WouldBlock,
        }
    };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stays
}

/// Changes `[generic]` and has it read again.
fn reconfigure(daemon: &Daemon, from: &str, to: &str) {
    let base = daemon.dir().join("cowgate.conf");
    let text = std::fs::read_to_string(&base).unwrap();
    assert!(text.contains(from));
    std::fs::write(&base, text.replace(from, to)).unwrap();
    daemon.reload();
}

#[test]
fn a_handshake_has_so_much_time() {
    let daemon = daemon("handshaketimeout = 1", "");
    let mut quiet = silent(&daemon);
    let mut trickling = silent(&daemon);
    let mut trickle = trickling.try_clone().unwrap();
    let trickler = std::thread::spawn(move || {
        for byte in 3_u32.to_be_bytes().iter().chain(&[b'I'; 200]) {
            std::thread::sleep(Duration::from_millis(100));
            if trickle.write_all(&[*byte]).is_err() {
                return;
            }
        }
        panic!("a byte now and then makes a handshake last");
    });
    assert!(ends_after(&mut quiet) >= Duration::from_millis(900));
    ends_after(&mut trickling);
    trickler.join().unwrap();
    // one that comes to its end in time is not held to it
    let mut well = client(&daemon, "disk");
    assert!(stays(well.socket(), Duration::from_millis(1500)));
    well.read(0, 512).unwrap();
    // a reload counts for those who come after it
    reconfigure(&daemon, "handshaketimeout = 1", "handshaketimeout = 600");
    assert!(stays(&mut silent(&daemon), Duration::from_millis(1500)));
    well.read(0, 512).unwrap();
    drop(daemon.stop());
}

#[test]
fn idle_clients_are_disconnected() {
    let daemon = daemon("idletimeout = 1", "");
    daemon.add_export("patient", &daemon.dir().join("disk.qcow2"), "idletimeout = 0\nreadonly = true");
    let mut idle = client(&daemon, "disk");
    assert!(ends_after(idle.socket()) >= Duration::from_secs(1));
    // in the middle of a request is idle too: it has not come
    let mut half = client(&daemon, "disk");
    half.socket().write_all(&[0x25; 10]).unwrap();
    assert!(ends_after(half.socket()) >= Duration::from_secs(1));
    let mut busy = client(&daemon, "disk");
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(150));
        busy.read(0, 4096).expect("a client that asks now and then stays");
    }
    drop(busy);
    daemon.wait_for("the image to be closed", || daemon.log().contains("disk.qcow2: closed"));
    let mut patient = client(&daemon, "patient");
    assert!(stays(patient.socket(), Duration::from_millis(2500)));
    // who is connected keeps what he has, who comes has the new time, and nobody is retired for it
    daemon.add_export("patient", &daemon.dir().join("disk.qcow2"), "idletimeout = 1.5\nreadonly = true");
    let mut hasty = client(&daemon, "patient");
    assert!(ends_after(hasty.socket()) >= Duration::from_millis(1500));
    patient.read(0, 512).unwrap();
    let (_dir, log) = daemon.stop();
    assert!(log.contains("idletimeout") && !log.contains("former definition"), "{log}");
}

#[test]
fn a_client_that_waits_for_its_rate_is_not_idle() {
    let daemon = daemon("", "idletimeout = 1\nbandwidthlimit = 16K");
    let mut client = client(&daemon, "disk");
    let start = Instant::now();
    client.read(0, 64 << 10).unwrap();
    assert!(start.elapsed() > Duration::from_secs(3));
    drop(daemon.stop());
}

#[test]
fn places_are_limited_and_idle_handshakes_make_room() {
    let daemon = daemon("maxclients = 20", "");
    let mut clients: Vec<Nbd> = (0..20).map(|_| client(&daemon, "disk")).collect();
    assert!(ends_after(&mut silent(&daemon)) < PATIENCE, "there is no place");
    daemon.wait_for("the log", || daemon.log().contains("too many clients"));
    clients.truncate(10);
    daemon.wait_for("places", || daemon.log().matches("client left").count() >= 10);
    // many times more handshakes than places, all of them kept open by their clients
    let mut silent: Vec<UnixStream> = (0..300).map(|_| silent(&daemon)).collect();
    for _ in 0..5 {
        let mut late = client(&daemon, "disk");
        late.read(0, 4096).unwrap();
    }
    for client in &mut clients {
        client.read(0, 4096).expect("a client that is served is never closed to make room");
    }
    assert!(ends_after(&mut silent[0]) < PATIENCE);
    daemon.wait_for("the handshakes to be closed", || daemon.descriptors() < 200);
    // fewer places after a reload: nobody is disconnected, and nobody is let in
    reconfigure(&daemon, "maxclients = 20", "maxclients = 5");
    drop(silent);
    std::thread::sleep(Duration::from_millis(200));
    assert!(Nbd::begin(UnixStream::connect(daemon.socket()).unwrap().into()).is_err());
    for client in &mut clients {
        client.read(0, 4096).unwrap();
    }
    drop(daemon.stop());
}

/// A TCP connection from an address of this machine.
fn from(address: &str, port: u16) -> std::io::Result<Nbd> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};
    use std::os::fd::AsRawFd;
    let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let at = |text: String| SockaddrIn::from(text.parse::<std::net::SocketAddrV4>().unwrap());
    bind(fd.as_raw_fd(), &at(format!("{address}:0")))?;
    connect(fd.as_raw_fd(), &at(format!("127.0.0.1:{port}")))?;
    Nbd::begin(fd)
}

#[test]
fn clients_of_one_address_are_limited() {
    let daemon = daemon("maxclientsperip = 3", "");
    let port = daemon.port();
    let mut crowd: Vec<Nbd> = (0..3).map(|_| from("127.0.0.1", port).unwrap()).collect();
    crowd[1].go("disk").unwrap();
    crowd[2].go("disk").unwrap();
    // the handshake goes for it
    let mut fourth = from("127.0.0.1", port).unwrap();
    fourth.go("disk").unwrap();
    ends_after(crowd[0].socket());
    assert!(from("127.0.0.1", port).is_err());
    from("127.0.0.2", port).unwrap().go("disk").unwrap();
    let unix: Vec<Nbd> = (0..5).map(|_| client(&daemon, "disk")).collect();
    for client in crowd[1..].iter_mut().chain([&mut fourth]) {
        client.read(0, 512).unwrap();
    }
    drop(unix);
    reconfigure(&daemon, "maxclientsperip = 3", "maxclientsperip = 0");
    from("127.0.0.1", port).unwrap().go("disk").unwrap();
    let (_dir, log) = daemon.stop();
    assert!(log.contains("too many clients of one address"), "{log}");
}

/// Asks the kernel for the options of the daemon's own sockets.
#[test]
fn tcp_sockets_send_at_once_and_ask_for_a_sign_of_life() {
    let daemon = daemon("", "");
    let mut client = Nbd::connect_tcp(daemon.port());
    client.go("disk").unwrap();
    let port = client_port(&mut client);
    let program = format!(
        r#"
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
process = os.pidfd_open({pid})
found = False
for fd in os.listdir('/proc/{pid}/fd'):
    try:
        if not os.readlink('/proc/{pid}/fd/' + fd).startswith('socket:'):
            continue
    except FileNotFoundError:
        continue
    ours = libc.syscall(438, process, int(fd), 0)  # pidfd_getfd
    assert ours >= 0, os.strerror(ctypes.get_errno())
    s = socket.socket(fileno=ours)
    if s.family != socket.AF_INET or s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        continue
    if s.getpeername() != ('127.0.0.1', {port}):
        continue
    found = True
    tcp = lambda option: s.getsockopt(socket.IPPROTO_TCP, option)
    assert tcp(socket.TCP_NODELAY) and s.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    times = tcp(socket.TCP_KEEPIDLE), tcp(socket.TCP_KEEPINTVL), tcp(socket.TCP_KEEPCNT)
    assert times[0] + times[1] * times[2] == 120, times
assert found
"#,
        pid = daemon.pid(),
    );
    qemu::run(Command::new("/usr/bin/python3").args(["-c", &program]));
    drop(daemon.stop());
}

fn client_port(client: &mut Nbd) -> u16 {
    use nix::sys::socket::{SockaddrIn, getsockname};
    use std::os::fd::AsRawFd;
    getsockname::<SockaddrIn>(client.socket().as_raw_fd()).unwrap().port()
}

/// Memory of an idle client in the daemon, in bytes.
const IDLE_BYTES: u64 = 12 << 10;

#[test]
fn a_thousand_idle_clients_cost_little() {
    const CLIENTS: usize = 1000;
    let daemon = daemon("workers = 2", "");
    // what the first clients of each worker pay for all: the image, its tables, buffers
    let busy = |client: &mut Nbd| {
        client.write(0, &[1; 100_000]).unwrap();
        assert_eq!(client.read(0, 100_000).unwrap().len(), 100_000);
    };
    let mut first: Vec<Nbd> = (0..8).map(|_| client(&daemon, "disk")).collect();
    first.iter_mut().for_each(busy);
    let before = daemon.resident_bytes();
    let mut clients: Vec<Nbd> = (0..CLIENTS).map(|_| client(&daemon, "disk")).collect();
    let idle = (daemon.resident_bytes() - before) / CLIENTS as u64;
    // and again after each has had something to do
    clients.iter_mut().for_each(busy);
    let rested = (daemon.resident_bytes() - before) / CLIENTS as u64;
    println!("an idle client costs {idle} bytes, one that was busy {rested}");
    assert!(idle < IDLE_BYTES, "an idle client costs {idle} bytes");
    assert!(rested < IDLE_BYTES, "a client that was busy costs {rested} bytes");
    drop(clients);
    drop(daemon.stop());
}

#[test]
fn lists_that_nobody_takes_cost_little() {
    const CLIENTS: usize = 200;
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    for i in 0..3000 {
        setup.export(&format!("{i:04}-{}", "x".repeat(200)), &image, "readonly = true");
    }
    let daemon = setup.start();
    assert_eq!(Nbd::connect(&daemon.socket()).list().len(), 3000, "all of them, in portions");
    let before = daemon.resident_bytes();
    let deaf: Vec<Nbd> = (0..CLIENTS)
        .map(|_| {
            let mut client = Nbd::connect(&daemon.socket());
            client.ask_for_list();
            client
        })
        .collect();
    // a list has 680 kB, of which a socket holds a third
    std::thread::sleep(Duration::from_secs(2));
    let each = (daemon.resident_bytes() - before) / CLIENTS as u64;
    println!("a list that nobody takes costs {each} bytes");
    assert!(each < 100_000, "a list that nobody takes costs {each} bytes");
    assert_eq!(Nbd::connect(&daemon.socket()).list().len(), 3000);
    drop(deaf);
    drop(daemon.stop());
}

const READ: u16 = 0;
const WRITE: u16 = 1;
const FUA: u16 = 1;

/// A daemon with little memory for payload, and what it had resident once a client was served.
fn small_daemon() -> (Daemon, u64) {
    let daemon = daemon("maxmemory = 256M\nworkers = 2", "");
    let mut first = client(&daemon, "disk");
    first.write(0, &vec![1; 1 << 20]).unwrap();
    drop(first);
    let resident = daemon.resident_bytes();
    (daemon, resident)
}

/// What the budget, idle buffers of the workers and the allocator may add up to.
const MEMORY_BYTES: u64 = (256 + 2 * 72 + 100) << 20;

#[test]
fn who_takes_no_replies_keeps_no_memory_that_others_need() {
    let (daemon, before) = small_daemon();
    // 1 GiB that nobody reads, in buffers that cannot be sent in pieces
    let deaf: Vec<Nbd> = (0..12)
        .map(|_| {
            let mut deaf = client(&daemon, "disk");
            (0..3).for_each(|_| deaf.send(READ, 0, 32 << 20, &[]).unwrap());
            deaf
        })
        .collect();
    daemon.wait_for("their memory", || daemon.resident_bytes() > before + (96 << 20));
    // the same kind of client, but one that reads: it waits until those who do not are gone
    let mut well = client(&daemon, "disk");
    for _ in 0..3 {
        assert_eq!(well.read(0, 32 << 20).unwrap().len(), 32 << 20);
        assert!(daemon.resident_bytes() < before + MEMORY_BYTES);
    }
    daemon.wait_for("the log", || daemon.log().contains("kept memory that others waited for"));
    drop(deaf);
    drop(daemon.stop());
}

#[test]
fn who_trickles_a_payload_keeps_no_memory_that_others_need() {
    let (daemon, before) = small_daemon();
    let mut slow: Vec<Nbd> = (0..12)
        .map(|_| {
            let mut slow = client(&daemon, "disk");
            slow.send_with(FUA, WRITE, 0, 32 << 20, &[0; 40_000]).unwrap();
            slow
        })
        .collect();
    // a little now and then is as bad as nothing
    let trickle = std::thread::spawn(move || {
        for _ in 0..300 {
            slow.retain_mut(|slow| slow.socket().write_all(&[0; 100]).is_ok());
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    let mut well = client(&daemon, "disk");
    for _ in 0..3 {
        well.send_with(FUA, WRITE, 0, 32 << 20, &vec![3; 32 << 20]).unwrap();
        assert_eq!(well.error().unwrap(), 0);
        assert!(daemon.resident_bytes() < before + MEMORY_BYTES);
    }
    daemon.wait_for("the log", || daemon.log().contains("kept memory that others waited for"));
    drop(daemon.stop());
    trickle.join().unwrap();
}

#[test]
fn many_small_requests_of_many_deaf_clients_leave_room_for_others() {
    let (daemon, before) = small_daemon();
    // as much again, in small buffers; no more requests than a socket holds
    let deaf: Vec<Nbd> = (0..100)
        .map(|_| {
            let mut deaf = client(&daemon, "disk");
            (0..150).for_each(|_| deaf.send(READ, 0, 64 << 10, &[]).unwrap());
            deaf
        })
        .collect();
    let mut well = client(&daemon, "disk");
    for length in [4096, 64 << 10, 256 << 10, 1 << 20, 2 << 20] {
        for _ in 0..20 {
            assert_eq!(well.read(0, length).unwrap().len(), length as usize);
            well.write(0, &vec![1; length as usize]).unwrap();
        }
    }
    assert!(daemon.resident_bytes() < before + MEMORY_BYTES);
    drop(deaf);
    drop(daemon.stop());
}

#[test]
fn a_slow_client_that_nobody_waits_for_stays() {
    let (daemon, _) = small_daemon();
    let mut slow = client(&daemon, "disk");
    (0..200).for_each(|_| slow.send(READ, 0, 64 << 10, &[]).unwrap());
    std::thread::sleep(Duration::from_secs(7));
    let mut data = vec![0; 64 << 10];
    for _ in 0..200 {
        assert_eq!(slow.error().unwrap(), 0);
        slow.socket().read_exact(&mut data).unwrap();
    }
    let (_dir, log) = daemon.stop();
    assert!(!log.contains("kept memory"), "{log}");
}
