//! Which clusters of the image file hold metadata, and what.
//!
//! Kept as runs, so that memory goes with the number of structures and not with their size: a table of 65,536 snapshots
//! may name terabytes of L1 tables in a sparse file.

use std::collections::BTreeMap;

/// Runs of clusters by their first. Runs do not overlap.
#[derive(Default)]
pub(super) struct Places {
    runs: BTreeMap<u64, Run>,
    names: Vec<&'static str>,
}

/// Small, as there is one for each L2 table of an image: millions in a large one.
struct Run {
    count: u32,
    /// Index of its name.
    name: u8,
}

impl Places {
    /// What a cluster holds, when that is metadata.
    pub fn get(&self, cluster: u64) -> Option<&'static str> {
        let (&first, run) = self.runs.range(..=cluster).next_back()?;
        (cluster - first < u64::from(run.count)).then(|| self.names[usize::from(run.name)])
    }

    /// Notes a structure. `Err`: this cluster of it holds another one already; nothing is noted.
    pub fn insert(&mut self, first: u64, count: u64, name: &'static str) -> Result<(), u64> {
        if count == 0 {
            return Ok(());
        }
        if self.get(first).is_some() {
            return Err(first);
        }
        let end = first.saturating_add(count);
        if let Some((&next, _)) = self.runs.range(first..end).next() {
            return Err(next);
        }
        let known = self.names.iter().position(|&known| known == name).unwrap_or_else(|| {
            self.names.push(name);
            self.names.len() - 1
        });
        let count = u32::try_from(count).expect("structures are of limited size");
        self.runs.insert(first, Run { count, name: u8::try_from(known).expect("there are a dozen names") });
        Ok(())
    }

    /// A cluster holds no metadata any more.
    pub fn remove(&mut self, cluster: u64) {
        let Some((&first, run)) = self.runs.range_mut(..=cluster).next_back() else { return };
        let (before, count, name) = (cluster - first, u64::from(run.count), run.name);
        if before >= count {
            return;
        }
        match before {
            0 => drop(self.runs.remove(&first)),
            _ => run.count = before as u32,
        }
        if before + 1 < count {
            self.runs.insert(cluster + 1, Run { count: (count - before - 1) as u32, name });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_noted_split_and_do_not_overlap() {
        let mut places = Places::default();
        places.insert(0, 1, "header").unwrap();
        places.insert(10, 5, "table").unwrap();
        assert_eq!(places.insert(8, 3, "other"), Err(10));
        assert_eq!(places.insert(14, 3, "other"), Err(14));
        assert_eq!(places.insert(8, 20, "other"), Err(10));
        places.insert(8, 2, "other").unwrap();
        places.insert(15, 0, "nothing").unwrap();
        places.remove(12);
        places.remove(12);
        places.remove(30);
        let found: Vec<_> = (0..17).map(|c| places.get(c)).collect();
        let mut expect = vec![None; 17];
        expect[0] = Some("header");
        expect[8..10].fill(Some("other"));
        expect[10..15].fill(Some("table"));
        expect[12] = None;
        assert_eq!(found, expect);
        for cluster in [10, 11, 13, 14] {
            places.remove(cluster);
        }
        assert!((10..17).all(|c| places.get(c).is_none()));
        assert_eq!(places.insert(u64::MAX - 1, 5, "far"), Ok(()));
    }
}
