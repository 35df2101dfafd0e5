//! Errors to come: what a test orders, and which operation they strike.

use super::Kind;
use super::seed::Seed;
use crate::block::Errno;
use crate::units::HostRange;

/// An error to come. Built as `Fault::new(Errno::EIO).on(Kind::Write).nth(3)`.
#[derive(Clone, Debug)]
pub struct Fault {
    errno: Errno,
    kind: Option<Kind>,
    within: Option<HostRange>,
    when: When,
}

#[derive(Clone, Debug)]
enum When {
    Always,
    /// After this many more matching operations; then the fault is used up.
    Countdown(u64),
    /// So many times of a hundred.
    Percent(u64),
}

impl Fault {
    /// Every operation fails with `errno`, until [`super::MemDisk::heal`]. EINTR and EAGAIN are retried by
    /// [`crate::ring::File`]: give them a percentage or a count.
    pub fn new(errno: Errno) -> Self {
        Fault { errno, kind: None, within: None, when: When::Always }
    }

    /// Only operations of `kind`.
    pub fn on(mut self, kind: Kind) -> Self {
        self.kind = Some(kind);
        self
    }

    /// Only operations that touch `range`. A sync touches none.
    pub fn within(mut self, range: HostRange) -> Self {
        self.within = Some(range);
        self
    }

    /// Only the `n`-th matching operation from now, counted from 1.
    pub fn nth(mut self, n: u64) -> Self {
        self.when = When::Countdown(n);
        self
    }

    /// Each matching operation, `percent` times of a hundred.
    pub fn percent(mut self, percent: u64) -> Self {
        self.when = When::Percent(percent);
        self
    }

    /// The error of the first of `faults` that strikes this operation; one that counted down to it is used up.
    pub(super) fn strike(faults: &mut Vec<Fault>, seed: &mut Seed, kind: Kind, at: u64, len: u64) -> Option<Errno> {
        let index = faults.iter_mut().position(|fault| fault.matches(kind, at, len) && fault.is_due(seed))?;
        let errno = faults[index].errno;
        if matches!(faults[index].when, When::Countdown(_)) {
            faults.remove(index);
        }
        Some(errno)
    }

    fn matches(&self, kind: Kind, at: u64, len: u64) -> bool {
        let touches = |r: HostRange| kind != Kind::Sync && at < r.end().0 && r.start().0 < at + len;
        self.kind.is_none_or(|k| k == kind) && self.within.is_none_or(touches)
    }

    fn is_due(&mut self, seed: &mut Seed) -> bool {
        match &mut self.when {
            When::Always => true,
            When::Percent(percent) => seed.chance(*percent),
            When::Countdown(n) => {
                *n = n.saturating_sub(1);
                *n == 0
            }
        }
    }
}
