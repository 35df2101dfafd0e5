//! Every combination of QCOW2 features that images can be made of, and a random set of combinations in which each pair
//! of values that can meet does meet.

use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use std::collections::HashSet;
use std::fmt;
use std::path::Path;
use std::process::Command;

use super::qemu;

/// One value of each feature.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Features {
    pub cluster_bits: u32,
    pub refcount_bits: u32,
    pub extended_l2: bool,
    pub data_file: DataFile,
    pub compression: Option<&'static str>,
    pub backing: Backing,
    pub snapshot: bool,
    pub bitmap: bool,
    pub version: u32,
}

/// Where guest data lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DataFile {
    None,
    Plain,
    Raw,
}

/// What lies below the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backing {
    None,
    ShortRaw,
    LongQcow2,
}

impl Features {
    /// The image `qemu-img create` makes when it is asked for nothing.
    pub const PLAIN: Features = Features {
        cluster_bits: 16,
        refcount_bits: 16,
        extended_l2: false,
        data_file: DataFile::None,
        compression: None,
        backing: Backing::None,
        snapshot: false,
        bitmap: false,
        version: 3,
    };

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes that can be allocated on their own.
    pub fn unit(&self) -> u64 {
        if self.extended_l2 { self.cluster() / 32 } else { self.cluster() }
    }

    /// Guest bytes one L2 table maps.
    pub fn l2_coverage(&self) -> u64 {
        self.cluster() / if self.extended_l2 { 16 } else { 8 } * self.cluster()
    }

    /// Whether QEMU can make such an image.
    pub fn valid(&self) -> bool {
        let external = self.data_file != DataFile::None;
        let only_version_3 =
            self.extended_l2 || external || self.bitmap || self.compression == Some("zstd") || self.refcount_bits != 16;
        (self.version == 3 || !only_version_3)
            && (!self.extended_l2 || self.cluster_bits >= 14)
            && (!external || !self.snapshot && self.compression.is_none())
            && (self.data_file != DataFile::Raw || self.backing == Backing::None)
            && (!self.snapshot || self.refcount_bits > 1)
    }

    /// The `-o` options of `qemu-img create` for an image of this name in `dir`, without those for its backing file.
    pub fn options(&self, dir: &Path, name: &str) -> String {
        let mut options = format!("cluster_size={}", self.cluster());
        if self.version == 2 {
            return options + ",compat=0.10";
        }
        options += &format!(",refcount_bits={}", self.refcount_bits);
        if self.extended_l2 {
            options += ",extended_l2=on";
        }
        if self.compression == Some("zstd") {
            options += ",compression_type=zstd";
        }
        if self.data_file != DataFile::None {
            // a name without a directory would be looked for where the tests run when it is made
            options += &format!(",data_file={}/{name}.data", dir.display());
        }
        if self.data_file == DataFile::Raw {
            options += ",data_file_raw=on";
        }
        options
    }

    /// Creates `NAME.qcow2` in `dir` with qemu-img, on `below` (path and format) if there is something below it.
    pub fn create(&self, dir: &Path, name: &str, size: u64, below: Option<(&Path, &str)>) -> std::path::PathBuf {
        let path = dir.join(format!("{name}.qcow2"));
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-o", &self.options(dir, name)]);
        if let Some((backing, format)) = below {
            create.arg("-b").arg(backing).args(["-F", format]);
        }
        qemu::run(create.arg(&path).arg(size.to_string()));
        if self.bitmap {
            qemu::qemu_img("bitmap --add -g 65536 -f qcow2", &[&path, Path::new("changes")]);
        }
        path
    }

    /// The values as numbers, for finding pairs.
    fn values(&self) -> [u32; 9] {
        [
            self.cluster_bits,
            self.refcount_bits,
            u32::from(self.extended_l2),
            self.data_file as u32,
            self.compression.map_or(0, |name| name.len() as u32 + u32::from(name == "zlib") * 8),
            self.backing as u32,
            u32::from(self.snapshot),
            u32::from(self.bitmap),
            self.version,
        ]
    }

    /// Each two values together.
    pub fn pairs(&self) -> impl Iterator<Item = (usize, u32, usize, u32)> {
        let values = self.values();
        (0..values.len()).flat_map(move |i| (0..i).map(move |j| (i, values[i], j, values[j])))
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{} clusters of {}, refcounts of {} bits", self.version, self.cluster(), self.refcount_bits)?;
        let mut say = |yes: bool, what: &str| if yes { write!(f, ", {what}") } else { Ok(()) };
        say(self.extended_l2, "extended L2")?;
        say(self.data_file == DataFile::Plain, "data file")?;
        say(self.data_file == DataFile::Raw, "raw data file")?;
        say(self.compression.is_some(), self.compression.unwrap_or_default())?;
        say(self.backing == Backing::ShortRaw, "short raw backing file")?;
        say(self.backing == Backing::LongQcow2, "long QCOW2 backing file")?;
        say(self.snapshot, "snapshot")?;
        say(self.bitmap, "bitmap")
    }
}

/// Every valid combination of the values in the differential test's table.
pub fn all() -> Vec<Features> {
    let mut all = vec![Features::PLAIN];
    let mut vary = |change: &dyn Fn(&Features) -> Vec<Features>| {
        all = all.iter().flat_map(change).collect();
    };
    vary(&|f| [9, 12, 16, 21].map(|cluster_bits| Features { cluster_bits, ..f.clone() }).to_vec());
    vary(&|f| [1, 8, 16, 64].map(|refcount_bits| Features { refcount_bits, ..f.clone() }).to_vec());
    vary(&|f| [false, true].map(|extended_l2| Features { extended_l2, ..f.clone() }).to_vec());
    let kinds = [DataFile::None, DataFile::Plain, DataFile::Raw];
    vary(&|f| kinds.map(|data_file| Features { data_file, ..f.clone() }).to_vec());
    let kinds = [None, Some("zlib"), Some("zstd")];
    vary(&|f| kinds.map(|compression| Features { compression, ..f.clone() }).to_vec());
    let kinds = [Backing::None, Backing::ShortRaw, Backing::LongQcow2];
    vary(&|f| kinds.map(|backing| Features { backing, ..f.clone() }).to_vec());
    vary(&|f| [false, true].map(|snapshot| Features { snapshot, ..f.clone() }).to_vec());
    vary(&|f| [false, true].map(|bitmap| Features { bitmap, ..f.clone() }).to_vec());
    vary(&|f| [2, 3].map(|version| Features { version, ..f.clone() }).to_vec());
    all.retain(Features::valid);
    all
}

/// A random set of combinations that holds every pair of values which some valid combination holds.
pub fn covering(rng: &mut SmallRng) -> Vec<Features> {
    let mut all = all();
    all.shuffle(rng);
    let mut missing: HashSet<_> = all.iter().flat_map(Features::pairs).collect();
    let mut chosen = Vec::new();
    while !missing.is_empty() {
        let gain = |f: &Features| f.pairs().filter(|pair| missing.contains(pair)).count();
        let best = all.iter().max_by_key(|f| gain(f)).expect("something is valid").clone();
        best.pairs().for_each(|pair| {
            missing.remove(&pair);
        });
        chosen.push(best);
    }
    // the first ones hold the most pairs: whoever runs a part of them should not run the poorest
    let at = rng.random_range(0..chosen.len());
    chosen.rotate_left(at);
    chosen
}
