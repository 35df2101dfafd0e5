//! Payload memory: 4 KiB aligned buffers that can be cut without moving bytes, from a per-thread pool.
//!
//! A [`PageBuf`] is received into from a socket, cut at extent borders ([`PageBuf::split_to`]), given to the ring, and
//! put together again ([`PageBuf::unsplit`]). Views of one allocation never overlap, so each is exclusive memory.
//! Not `Send`: a buffer lives and dies on one worker, which is what makes its pool free of locks.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::rc::Rc;

/// Alignment of every allocation, in bytes.
pub const PAGE: usize = 4096;
/// Largest buffer, in bytes.
pub const MAX_BUF: usize = 128 << 20;
/// Idle memory a thread keeps for reuse, in bytes.
const POOL_LIMIT: usize = 72 << 20;
/// Buffers are kept by power-of-two capacity from `PAGE`.
const CLASSES: usize = 16;

/// An exclusive view of initialised, pooled memory. The allocation is 4 KiB aligned; a view cut from it need not be.
pub struct PageBuf {
    mem: Rc<Mem>,
    off: usize,
    len: usize,
}

struct Mem {
    ptr: NonNull<u8>,
    class: usize,
}

#[derive(Default)]
struct Pool {
    free: [Vec<NonNull<u8>>; CLASSES],
    idle_bytes: usize,
}

thread_local! {
    static POOL: RefCell<Pool> = RefCell::default();
}

impl PageBuf {
    /// A buffer of `len` bytes, contents unspecified (initialised, but perhaps with bytes of an earlier request).
    ///
    /// Panics when `len` exceeds [`MAX_BUF`]: callers have named limits below it.
    pub fn new(len: usize) -> Self {
        assert!(len <= MAX_BUF, "buffer of {len} bytes");
        PageBuf { mem: Rc::new(Mem::take(class_of(len))), off: 0, len }
    }

    /// A buffer of `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        let mut buf = Self::new(len);
        buf.fill(0);
        buf
    }

    /// A buffer holding a copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buf = Self::new(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }

    /// Cuts off and returns the first `at` bytes; `self` keeps the rest. Panics when `at > len`.
    pub fn split_to(&mut self, at: usize) -> PageBuf {
        assert!(at <= self.len, "cut at {at} of {}", self.len);
        let head = PageBuf { mem: Rc::clone(&self.mem), off: self.off, len: at };
        self.off += at;
        self.len -= at;
        head
    }

    /// Joins the view that directly follows this one in the same allocation. Panics when it does not.
    pub fn unsplit(&mut self, tail: PageBuf) {
        assert!(
            Rc::ptr_eq(&self.mem, &tail.mem) && self.off + self.len == tail.off,
            "only neighbours cut from one buffer join"
        );
        self.len += tail.len;
    }
}

impl Deref for PageBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: off + len is within the allocation, which `mem` keeps alive; the bytes are initialised
        // (alloc_zeroed, then only ever written); views of one allocation never overlap.
        unsafe { std::slice::from_raw_parts(self.mem.ptr.as_ptr().add(self.off), self.len) }
    }
}

impl DerefMut for PageBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; this view is the only one of these bytes, and it is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.mem.ptr.as_ptr().add(self.off), self.len) }
    }
}

impl fmt::Debug for PageBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageBuf({} bytes)", self.len)
    }
}

impl Mem {
    fn take(class: usize) -> Mem {
        let reused = POOL.with_borrow_mut(|pool| {
            let ptr = pool.free[class].pop()?;
            pool.idle_bytes -= PAGE << class;
            Some(ptr)
        });
        let ptr = reused.unwrap_or_else(|| {
            let layout = layout(class);
            // SAFETY: the layout's size is at least PAGE.
            NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout))
        });
        Mem { ptr, class }
    }
}

impl Drop for Mem {
    fn drop(&mut self) {
        let bytes = PAGE << self.class;
        // At thread exit the pool may be gone already; then the memory is freed directly.
        let kept = POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            let keep = pool.idle_bytes + bytes <= POOL_LIMIT;
            if keep {
                pool.free[self.class].push(self.ptr);
                pool.idle_bytes += bytes;
            }
            keep
        });
        if kept != Ok(true) {
            // SAFETY: allocated in `take` with this layout; no view is left, or this drop would not run.
            unsafe { dealloc(self.ptr.as_ptr(), layout(self.class)) }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for (class, list) in self.free.iter().enumerate() {
            for ptr in list {
                // SAFETY: pooled memory was allocated in `take` with its class's layout and has no view.
                unsafe { dealloc(ptr.as_ptr(), layout(class)) }
            }
        }
    }
}

fn class_of(len: usize) -> usize {
    let pages = len.div_ceil(PAGE).max(1);
    pages.next_power_of_two().trailing_zeros() as usize
}

fn layout(class: usize) -> Layout {
    Layout::from_size_align(PAGE << class, PAGE).expect("classes are small powers of two")
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // a page at a time and without a branch for each word: the compiler makes wide loads of it
    bytes.chunks(4096).all(|page| {
        let words = page.chunks_exact(8);
        let rest = words.remainder().iter().fold(0, |all, byte| all | byte);
        rest == 0 && words.fold(0, |all, w| all | u64::from_le_bytes(w.try_into().expect("eight bytes"))) == 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cut_and_joined_again() {
        let mut b = PageBuf::new(10_000);
        assert_eq!(b.as_ptr().align_offset(PAGE), 0);
        b.fill(7);
        let mut head = b.split_to(3000);
        head.fill(1);
        assert_eq!((head.len(), b.len()), (3000, 7000));
        assert!(b.iter().all(|&x| x == 7));
        head.unsplit(b);
        assert_eq!(head.len(), 10_000);
        assert_eq!((head[2999], head[3000]), (1, 7));
    }

    #[test]
    fn memory_is_reused() {
        let first = PageBuf::new(5000);
        let at = first.as_ptr();
        drop(first);
        assert_eq!(PageBuf::new(8192).as_ptr(), at);
    }

    #[test]
    #[should_panic(expected = "only neighbours")]
    fn strangers_do_not_join() {
        PageBuf::new(10).unsplit(PageBuf::new(10));
    }

    #[test]
    fn the_largest_buffer_has_a_class() {
        assert!(class_of(MAX_BUF) < CLASSES);
        assert_eq!(PageBuf::new(0).len(), 0);
    }

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        let mut bytes = vec![0u8; 9001];
        assert!(is_zero(&bytes) && is_zero(&[]) && is_zero(&bytes[..3]));
        for at in [0, 7, 8, 4095, 4096, 8999, 9000] {
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
            bytes[at] = 0;
        }
    }
}
