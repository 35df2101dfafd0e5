//! Buffered writes through [`cowgate::ring::File`], which writes in place where that is cheaper, relative to the same
//! writes through io_uring alone. The figures of `kernel-notes/2026-11-22-ext4-buffered-writes-in-io-uring.md`:
//!
//!     cargo bench --bench file_writes
//!
//! Ratios of one run on a quiet machine mean something; the absolute times behind them do not.

use cowgate::pagebuf::PageBuf;
use cowgate::ring;
use cowgate::units::HostOffset;
use std::time::Instant;

const MIB: usize = 1 << 20;
const FILE: usize = 64 * MIB;
const TOTAL: usize = 512 * MIB;

/// Offsets that visit the whole file without following each other.
fn offsets(len: usize) -> impl Iterator<Item = u64> {
    let places = FILE / len;
    (0..TOTAL / len).map(move |i| (i * 7919 % places * len) as u64)
}

fn cached_file() -> std::fs::File {
    let mut file = tempfile::tempfile().expect("a temporary file");
    std::io::Write::write_all(&mut file, &vec![1; FILE]).expect("64 MiB of disk");
    file
}

/// (CPU seconds of the process with its ring's kernel threads, seconds)
fn measured(job: impl FnOnce()) -> (f64, f64) {
    let (cpu, start) = (cpu_seconds(), Instant::now());
    job();
    (cpu_seconds() - cpu, start.elapsed().as_secs_f64())
}

fn ours(len: usize) {
    let std = cached_file();
    ring::run(async move {
        let file = ring::File::from_std(std);
        let mut buf = PageBuf::zeroed(len);
        for at in offsets(len) {
            let (result, back) = file.write(HostOffset(at), buf).await;
            result.expect("a write");
            buf = back;
        }
    })
    .expect("io_uring");
}

fn ring_alone(len: usize) {
    let std = cached_file();
    tokio_uring::start(async move {
        let file = tokio_uring::fs::File::from_std(std);
        let mut buf = vec![0; len];
        for at in offsets(len) {
            let (result, back) = file.write_at(buf, at).submit().await;
            assert_eq!(result.expect("a write"), len);
            buf = back;
        }
    });
}

fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("/proc");
    let after_name = stat.rsplit(')').next().expect("a name in brackets");
    let ticks = after_name.split_whitespace().skip(11).take(2).map(|field| field.parse::<f64>().expect("a number"));
    ticks.sum::<f64>() / 100.0
}

fn main() {
    println!("{:>12} {:>12} {:>12}", "bytes", "CPU", "throughput");
    for len in [4 << 10, 64 << 10, 256 << 10, MIB] {
        let (ring, ours) = (measured(|| ring_alone(len)), measured(|| ours(len)));
        println!("{len:>12} {:>12.2} {:>12.2}", ours.0 / ring.0, ring.1 / ours.1);
    }
}
