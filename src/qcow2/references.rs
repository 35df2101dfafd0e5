//! How often each cluster of a file is referred to: what a check counts and compares with the refcounts.
//!
//! Compact, as a file may have a thousand million clusters: pages of counters exist where something is referred to, one
//! byte for each cluster until a count outgrows it. A file with small tables that name places far apart could still ask
//! for much more memory than it is long, so there is a limit.

use std::collections::HashMap;

/// Clusters of one page.
const PAGE: u64 = 1024;
/// What a page costs beside its counters.
const PAGE_OVERHEAD: u64 = 64;

/// The tables of an image refer to more places than memory was granted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "its tables refer to so many places that counting them takes more than {} MiB of memory",
    limit >> 20
)]
pub struct OutOfMemory {
    /// The limit in bytes.
    pub limit: u64,
}

/// Counters of one page, as wide as the largest needs.
enum Page {
    Bytes(Box<[u8; PAGE as usize]>),
    Words(Box<[u64; PAGE as usize]>),
}

impl Page {
    fn get(&self, index: usize) -> u64 {
        match self {
            Page::Bytes(counts) => u64::from(counts[index]),
            Page::Words(counts) => counts[index],
        }
    }

    fn memory(&self) -> u64 {
        match self {
            Page::Bytes(_) => PAGE + PAGE_OVERHEAD,
            Page::Words(_) => PAGE * 8 + PAGE_OVERHEAD,
        }
    }
}

/// A count for every cluster.
pub struct References {
    pages: HashMap<u64, Page>,
    used: u64,
    limit: u64,
}

impl References {
    /// All counts are 0. `limit`: bytes of memory to take at most.
    pub fn new(limit: u64) -> References {
        References { pages: HashMap::new(), used: 0, limit }
    }

    /// The count of a cluster.
    pub fn get(&self, cluster: u64) -> u64 {
        self.pages.get(&(cluster / PAGE)).map_or(0, |page| page.get((cluster % PAGE) as usize))
    }

    /// Adds to the count of a cluster. It stays at the largest number when it would pass that.
    pub fn add(&mut self, cluster: u64, times: u64) -> Result<(), OutOfMemory> {
        self.set(cluster, self.get(cluster).saturating_add(times))
    }

    /// Sets the count of a cluster.
    pub fn set(&mut self, cluster: u64, count: u64) -> Result<(), OutOfMemory> {
        let (number, index) = (cluster / PAGE, (cluster % PAGE) as usize);
        let before = match self.pages.get(&number) {
            None if count == 0 => return Ok(()),
            page => page.map_or(0, Page::memory),
        };
        let wide = count > u64::from(u8::MAX);
        let page = self.pages.entry(number).or_insert_with(|| Page::Bytes(Box::new([0; PAGE as usize])));
        if wide && let Page::Bytes(narrow) = page {
            let mut counts = Box::new([0; PAGE as usize]);
            for (wide, &narrow) in counts.iter_mut().zip(narrow.iter()) {
                *wide = u64::from(narrow);
            }
            *page = Page::Words(counts);
        }
        match page {
            Page::Bytes(counts) => counts[index] = count as u8,
            Page::Words(counts) => counts[index] = count,
        }
        self.used += page.memory() - before;
        self.reserve(0)
    }

    /// Accounts for `bytes` of memory taken by something else that grows with the references.
    pub fn reserve(&mut self, bytes: u64) -> Result<(), OutOfMemory> {
        self.used += bytes;
        if self.used > self.limit { Err(OutOfMemory { limit: self.limit }) } else { Ok(()) }
    }

    /// Every cluster with a count above 0, in order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.from(0)
    }

    /// Every cluster from `first` on with a count above 0, in order.
    pub fn from(&self, first: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut numbers: Vec<u64> = self.pages.keys().copied().filter(|&n| n >= first / PAGE).collect();
        numbers.sort_unstable();
        let clusters = numbers.into_iter().flat_map(|number| {
            let page = &self.pages[&number];
            (0..PAGE).map(move |index| (number * PAGE + index, page.get(index as usize)))
        });
        clusters.filter(move |&(cluster, count)| count > 0 && cluster >= first)
    }
}

/// A set of clusters.
#[derive(Default)]
pub struct ClusterSet {
    pages: HashMap<u64, Box<[u64; (PAGE / 64) as usize]>>,
}

impl ClusterSet {
    /// Takes a cluster in. Returns the bytes of memory that this took.
    pub fn insert(&mut self, cluster: u64) -> u64 {
        let before = self.pages.len() as u64;
        let page = self.pages.entry(cluster / PAGE).or_default();
        page[(cluster % PAGE / 64) as usize] |= 1 << (cluster % 64);
        (self.pages.len() as u64 - before) * (PAGE / 8 + PAGE_OVERHEAD)
    }

    /// Whether the cluster is in.
    pub fn contains(&self, cluster: u64) -> bool {
        let word = |page: &[u64; (PAGE / 64) as usize]| page[(cluster % PAGE / 64) as usize];
        self.pages.get(&(cluster / PAGE)).is_some_and(|page| word(page) >> (cluster % 64) & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_size_beside_each_other() {
        let mut refs = References::new(1 << 20);
        for (cluster, count) in [(0, 1), (1, 255), (2, 256), (1023, 7), (1024, 1 << 40), (u64::MAX, u64::MAX)] {
            refs.add(cluster, count).unwrap();
        }
        refs.add(0, 1).unwrap();
        refs.add(u64::MAX, 5).unwrap();
        let all: Vec<_> = refs.iter().collect();
        assert_eq!(all, [(0, 2), (1, 255), (2, 256), (1023, 7), (1024, 1 << 40), (u64::MAX, u64::MAX)]);
        assert_eq!(refs.from(1023).map(|(c, _)| c).collect::<Vec<_>>(), [1023, 1024, u64::MAX]);
        refs.set(1, 0).unwrap();
        assert_eq!((refs.get(1), refs.get(5), refs.get(5000)), (0, 0, 0));
    }

    #[test]
    fn memory_is_limited() {
        let mut refs = References::new(100 << 10);
        let taken = (0..1000).take_while(|i| refs.add(i << 30, 1).is_ok()).count();
        assert!((80..=100).contains(&taken), "{taken} pages in 100 KiB");
        assert!(refs.reserve(1).is_err());
    }

    #[test]
    fn a_set_of_clusters() {
        let mut set = ClusterSet::default();
        for cluster in [0, 63, 64, 1023, 1024, u64::MAX] {
            assert!(!set.contains(cluster));
            set.insert(cluster);
            assert!(set.contains(cluster) && !set.contains(cluster ^ 2));
        }
    }
}
