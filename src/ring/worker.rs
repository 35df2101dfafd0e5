//! [`Workers`]: the threads that carry connections, each with a runtime of its own.
//!
//! The control thread starts them once, picks one per accepted connection ([`Workers::pick`]) and posts the connection
//! to its mailbox ([`Workers::run_on`]). What a job starts with [`super::spawn`] stays on that thread.

use super::runtime::{Runtime, tasks_ended};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Work posted to a worker; it runs inside the worker's runtime and may call [`super::spawn`].
pub type Job = Box<dyn FnOnce() + Send>;

/// A handle to the worker threads. Clones are handles to the same threads.
///
/// The threads live until [`Workers::stop`]; dropping every handle without it lets them end on their own.
#[derive(Clone)]
pub struct Workers {
    shared: Arc<Shared>,
}

struct Shared {
    mailboxes: Vec<UnboundedSender<Mail>>,
    loads: Vec<Arc<AtomicUsize>>,
    /// Where the next search for the least loaded worker begins, so that ties go round. Also makes a pick one step.
    next: Mutex<usize>,
    /// Emptied by the first `stop`.
    threads: Mutex<Vec<JoinHandle<()>>>,
}

enum Mail {
    Run(Job),
    /// No mail is read after this; the thread ends with its last task.
    Stop,
}

impl Workers {
    /// Starts `count` threads (at least one), named `cowgate-w0` and so on, and waits until each has its runtime.
    ///
    /// Errors: no thread or no io_uring to be had; then threads already started end again.
    pub fn start(count: usize) -> io::Result<Workers> {
        let count = count.max(1);
        let mut shared =
            Shared { mailboxes: Vec::new(), loads: Vec::new(), next: Mutex::new(0), threads: Mutex::default() };
        let mut threads = Vec::new();
        for index in 0..count {
            let (mailbox, mail) = unbounded_channel();
            let (ready, is_ready) = mpsc::sync_channel(1);
            let thread =
                std::thread::Builder::new().name(format!("cowgate-w{index}")).spawn(move || work(mail, &ready))?;
            is_ready.recv().unwrap_or_else(|_| Err(io::Error::other("a worker thread died while starting")))?;
            shared.mailboxes.push(mailbox);
            shared.loads.push(Arc::default());
            threads.push(thread);
        }
        shared.threads = Mutex::new(threads);
        Ok(Workers { shared: Arc::new(shared) })
    }

    /// How many workers there are.
    pub fn count(&self) -> usize {
        self.shared.mailboxes.len()
    }

    /// Runs `job` on worker `index` (below [`Workers::count`]), after the jobs posted before it.
    ///
    /// A panic in it ends that job only. After [`Workers::stop`] the job is dropped unrun.
    pub fn run_on(&self, index: usize, job: Job) {
        // An error means the worker has stopped and hands the job back: it ends here.
        drop(self.shared.mailboxes[index].send(Mail::Run(job)));
    }

    /// The worker with the fewest [`Load`]s, ties in turn, with one more load on it.
    pub fn pick(&self) -> Load {
        let mut next = self.shared.next.lock().unwrap_or_else(PoisonError::into_inner);
        let count = self.count();
        let index = (0..count)
            .map(|i| (*next + i) % count)
            .min_by_key(|&i| self.shared.loads[i].load(Relaxed))
            .expect("there is at least one worker");
        *next = (index + 1) % count;
        Load::new(index, &self.shared.loads[index])
    }

    /// Ends the threads and joins them: each ends when the jobs posted so far and every task they spawned have ended.
    ///
    /// Blocks: not for a worker or an async thread to call. End the tasks first (shut connections down), or it waits
    /// for them. Other handles may still be used; what they post is dropped.
    pub fn stop(self) {
        for mailbox in &self.shared.mailboxes {
            drop(mailbox.send(Mail::Stop));
        }
        let threads = std::mem::take(&mut *self.shared.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // A panic of the thread itself was printed when it happened, and there is nothing left to save.
            drop(thread.join());
        }
    }
}

/// A connection's weight on a worker, while it lives. Move it into the job, and into the task the job spawns.
#[must_use = "dropping it takes the weight off the worker"]
#[derive(Debug)]
pub struct Load {
    index: usize,
    count: Arc<AtomicUsize>,
}

impl Load {
    fn new(index: usize, count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Relaxed);
        Load { index, count: Arc::clone(count) }
    }

    /// The worker, for [`Workers::run_on`].
    pub fn index(&self) -> usize {
        self.index
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Relaxed);
    }
}

/// A worker thread, from start to end.
fn work(mail: UnboundedReceiver<Mail>, ready: &mpsc::SyncSender<io::Result<()>>) {
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(e) => {
            drop(ready.send(Err(e)));
            return;
        }
    };
    drop(ready.send(Ok(())));
    runtime.block_on(async {
        read_mail(mail).await;
        tasks_ended().await;
    });
}

async fn read_mail(mut mail: UnboundedReceiver<Mail>) {
    while let Some(Mail::Run(job)) = mail.recv().await {
        // The job is consumed, so nothing it broke is seen again; the panic message has been printed by the hook.
        drop(catch_unwind(AssertUnwindSafe(job)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pagebuf::PageBuf;
    use crate::ring::{File, spawn};
    use crate::units::HostOffset;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn connections_spread_and_leave() {
        let workers = Workers::start(3).unwrap();
        let mut loads: Vec<Load> = (0..6).map(|_| workers.pick()).collect();
        let mut seen: Vec<usize> = loads.iter().map(Load::index).collect();
        seen.sort();
        assert_eq!(seen, [0, 0, 1, 1, 2, 2]);
        loads.retain(|load| load.index() != 1);
        assert_eq!((workers.pick().index(), workers.pick().index()), (1, 1), "a dropped load counts no more");
        drop(loads);
        let turns: Vec<usize> = (0..3).map(|_| workers.pick().index()).collect();
        assert!(turns.contains(&0) && turns.contains(&1) && turns.contains(&2), "ties go round: {turns:?}");
        workers.stop();
    }

    #[test]
    fn jobs_run_on_their_thread_and_do_file_io() {
        let workers = Workers::start(2).unwrap();
        let (send, receive) = mpsc::channel();
        for index in 0..2 {
            let send = send.clone();
            let job = move || {
                spawn(async move {
                    let file = File::from_std(tempfile::tempfile().unwrap());
                    let mut buf = PageBuf::zeroed(1000);
                    buf.fill(index as u8 + 1);
                    file.write(HostOffset(0), buf).await.0.unwrap();
                    file.sync().await.unwrap();
                    let (_, buf) = file.read(HostOffset(0), PageBuf::zeroed(1001)).await;
                    send.send((thread::current().name().unwrap().to_owned(), buf.to_vec())).unwrap();
                });
            };
            workers.run_on(index, Box::new(job));
        }
        for _ in 0..2 {
            let (name, bytes) = receive.recv_timeout(Duration::from_secs(20)).unwrap();
            let index = usize::from(bytes[0]) - 1;
            assert_eq!(name, format!("cowgate-w{index}"));
            assert!(bytes[999] == bytes[0] && bytes[1000] == 0);
        }
        workers.stop();
    }

    #[test]
    fn a_panic_leaves_the_worker_alive() {
        let workers = Workers::start(1).unwrap();
        workers.run_on(0, Box::new(|| panic!("expected in this test: a job")));
        workers.run_on(0, Box::new(|| spawn(async { panic!("expected in this test: a task") })));
        let (send, receive) = mpsc::channel();
        workers.run_on(0, Box::new(move || spawn(async move { send.send(()).unwrap() })));
        receive.recv_timeout(Duration::from_secs(20)).unwrap();
        workers.stop();
    }

    #[test]
    fn stop_waits_for_jobs_and_their_tasks() {
        let workers = Workers::start(2).unwrap();
        let done = Arc::new(AtomicUsize::new(0));
        for i in 0..20 {
            let done = Arc::clone(&done);
            let task = async move {
                tokio::time::sleep(Duration::from_millis(50)).await;
                done.fetch_add(1, Relaxed);
            };
            workers.run_on(i % 2, Box::new(move || spawn(task)));
        }
        let other = workers.clone();
        workers.stop();
        assert_eq!(done.load(Relaxed), 20);
        other.run_on(0, Box::new(|| unreachable!("posted after the stop")));
        other.stop();
    }
}
