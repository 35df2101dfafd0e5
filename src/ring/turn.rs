//! Futures that look after others: what wants to be polled again while it is being polled is noted, and costs no trip
//! through the runtime.

use futures_util::task::AtomicWaker;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};
use std::task::{Context, Wake, Waker};

/// Between two turns of such a future a wake goes to its task; within one it is noted.
pub struct Turn {
    noted: Arc<Noted>,
    waker: Waker,
}

const BETWEEN_TURNS: u8 = 0;
const IN_TURN: u8 = 1;
const WANTS_ANOTHER: u8 = 2;

/// Used from any thread.
#[derive(Default)]
struct Noted {
    state: AtomicU8,
    task: AtomicWaker,
}

impl Default for Turn {
    fn default() -> Turn {
        let noted: Arc<Noted> = Arc::default();
        Turn { waker: Waker::from(Arc::clone(&noted)), noted }
    }
}

impl Turn {
    /// Begins a turn. What is returned is for the futures that are looked after, `cx` is the task's own.
    pub fn begin(&self, cx: &Context<'_>) -> Context<'_> {
        self.noted.task.register(cx.waker());
        self.noted.state.store(IN_TURN, SeqCst);
        Context::from_waker(&self.waker)
    }

    /// Ends it. `true`: somebody wants another one, of which the task has not been told.
    pub fn end(&self) -> bool {
        self.noted.state.swap(BETWEEN_TURNS, SeqCst) == WANTS_ANOTHER
    }
}

impl Wake for Noted {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let noted = self.state.compare_exchange(IN_TURN, WANTS_ANOTHER, SeqCst, SeqCst);
        if noted == Err(BETWEEN_TURNS) {
            self.task.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, SeqCst);
        }
    }

    #[test]
    fn a_wake_is_noted_or_passed_on_and_never_lost() {
        let count: Arc<Count> = Arc::default();
        let task = Waker::from(Arc::clone(&count));
        let cx = Context::from_waker(&task);
        let woken = || count.0.load(SeqCst);
        let turn = Turn::default();
        let waker = turn.begin(&cx).waker().clone();
        assert_eq!((turn.end(), woken()), (false, 0));
        let _within = turn.begin(&cx);
        waker.wake_by_ref();
        waker.wake_by_ref();
        assert_eq!((turn.end(), woken()), (true, 0));
        waker.wake_by_ref();
        assert_eq!(woken(), 1);
    }
}
