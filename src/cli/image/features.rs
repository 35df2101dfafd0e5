//! What is chosen once for a new QCOW2 image: options that `create` and `convert` share.

use crate::cli::size;
use crate::image::create::Features;
use crate::qcow2::compress::Compression;

/// Options for a new QCOW2 image.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(super) struct FeatureArgs {
    /// Cluster size in bytes, a power of two from 512 to 2M
    #[arg(long, value_name = "N", value_parser = size::parse, default_value = "64K")]
    cluster_size: u64,
    /// Compatibility level: v2 (QEMU's 0.10) or v3 (1.1)
    #[arg(long, value_name = "LEVEL", value_parser = compat, default_value = "v3")]
    compat: u32,
    /// Width of a refcount in bits: 1, 2, 4, 8, 16, 32 or 64
    #[arg(long, value_name = "N", default_value_t = 16)]
    refcount_bits: u32,
    /// Extended L2 entries: clusters of 16K and more are divided into 32 subclusters
    #[arg(long)]
    extended_l2: bool,
    /// Allow programs that open the image to write refcounts late
    #[arg(long)]
    lazy_refcounts: bool,
}

impl FeatureArgs {
    /// The properties chosen, with how compressed clusters are packed.
    pub fn with(&self, compression: Compression) -> Features {
        Features {
            version: self.compat,
            cluster_size: self.cluster_size,
            refcount_bits: self.refcount_bits,
            compression,
            extended_l2: self.extended_l2,
            lazy_refcounts: self.lazy_refcounts,
        }
    }
}

fn compat(level: &str) -> Result<u32, String> {
    match level {
        "v2" | "0.10" => Ok(2),
        "v3" | "1.1" => Ok(3),
        _ => Err("v2 (0.10) and v3 (1.1) exist".to_owned()),
    }
}

/// Reads the name of a compression.
pub(super) fn compression(name: &str) -> Result<Compression, String> {
    [Compression::Zlib, Compression::Zstd]
        .into_iter()
        .find(|kind| kind.name() == name)
        .ok_or_else(|| "zlib and zstd are supported".to_owned())
}
