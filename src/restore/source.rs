//! Which image is meant by a path or by the name of an export, and how it is opened: never for writing.

use crate::export::client_keys::{CopyOnWrite, Untrusted};
use crate::export::config::{ExportConfig, Format, Source as Place};
use crate::export::load::load;
use crate::units::ByteRange;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Where the temporary layer is kept when nothing is said: the directory of a backup may be read-only or full.
pub const SCRATCH: &str = "/var/tmp";

/// An image, and what a configuration says of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// The image, absolute.
    pub path: PathBuf,
    /// The export that was asked for, if it was one.
    pub export: Option<String>,
    /// `qcow2` or `raw`.
    pub format: String,
    /// An internal snapshot.
    pub snapshot: Option<String>,
    /// The files `path.0`, `path.1` and so on.
    pub multi_file: bool,
    /// Size in bytes, if it is not that of the image.
    pub file_size: Option<u64>,
    /// Directories below which backing files may be.
    pub image_roots: Option<Vec<PathBuf>>,
    /// Where a temporary layer is kept.
    pub scratch: PathBuf,
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The path of an image, or the name of an export.
    pub what: &'a str,
    /// It is an export's name, whatever it looks like.
    pub is_export: bool,
    /// The image's format; none: by its name, or as the export has it.
    pub format: Option<Format>,
    /// The configuration file.
    pub config: &'a Path,
    /// Where a temporary layer is kept.
    pub scratch: &'a Path,
}

impl Source {
    /// Finds it. What has a slash, or is a file, is a path.
    pub fn find(wanted: Wanted<'_>) -> Result<Source, String> {
        let Wanted { what, is_export, format, config, scratch } = wanted;
        let absolute = |path: &Path| std::path::absolute(path).map_err(|e| format!("{}: {e}", path.display()));
        let (config, scratch) = (absolute(config)?, absolute(scratch)?);
        let loaded = load(&config);
        let image_roots = loaded.server.as_ref().and_then(|server| server.image_roots.clone());
        let path = Path::new(what);
        if !is_export && (what.contains('/') || path.exists()) {
            let path = absolute(path)?;
            // it says where backing files may be, and has not been understood
            if loaded.server.is_none() && config.exists() {
                let file = config.display();
                return Err(format!(
                    "{file} cannot be relied on, and so not its imageroots; see cowgate check-config {file}, or name \
                     another configuration with -c"
                ));
            }
            if loaded.exports.iter().any(|export| export.name == what) && !path.exists() {
                return Err(format!("{what}: there is no such file, but an export of this name: use --export"));
            }
            let format = format.unwrap_or_else(|| Format::by_name(&path)).to_string();
            let nothing = Source {
                path,
                export: None,
                format,
                snapshot: None,
                multi_file: false,
                file_size: None,
                image_roots,
                scratch,
            };
            return Ok(nothing);
        }
        let Some(export) = loaded.exports.iter().find(|export| export.name == what) else {
            let file = config.display();
            return Err(match loaded.server {
                None => format!(
                    "{what}: there is no such file, and {file} cannot be relied on for an export of this name; name the \
                     image by its path, or the configuration with -c; see cowgate check-config {file}"
                ),
                Some(_) => format!(
                    "{what}: there is no such file, and no export of this name in {file}; see cowgate check-config \
                     {file}"
                ),
            });
        };
        Ok(Source {
            path: export.path.clone(),
            export: Some(export.name.clone()),
            format: format.unwrap_or(export.format).to_string(),
            snapshot: export.image.snapshot.clone(),
            multi_file: export.client.multi_file,
            file_size: export.client.file_size,
            image_roots,
            scratch,
        })
    }

    /// The export that the device is of. `layer`: what is written goes to a temporary layer; else nothing is written.
    pub fn config(&self, name: &str, window: Option<ByteRange>, layer: bool) -> Result<ExportConfig, String> {
        let place = Place { file: "cowgate restore".into(), line: 0 };
        let mut config = ExportConfig::new(name, &self.path, place);
        config.format = self.format.parse()?;
        config.read_only = !layer;
        config.image.snapshot = self.snapshot.clone();
        config.client.multi_file = self.multi_file;
        config.client.file_size = self.file_size;
        config.client.copy_on_write = layer.then(|| CopyOnWrite { directory: Some(self.scratch.clone()) });
        config.client.untrusted = Some(Untrusted { window });
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_names() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config");
        let image = dir.path().join("a.qcow2");
        std::fs::write(&image, "").unwrap();
        let keys = format!("[disk]\nexportname = {}\nsnapshot = s\nformat = qcow2\nfilesize = 4096\n", image.display());
        std::fs::write(&config, format!("[generic]\nimageroots = /srv\n{keys}")).unwrap();
        let find_as = |what: &str, is_export| {
            Source::find(Wanted { what, is_export, format: None, config: &config, scratch: dir.path() })
        };
        let find = |what: &str| find_as(what, false);
        let by_path = find(image.to_str().unwrap()).unwrap();
        assert_eq!((by_path.export, by_path.format.as_str()), (None, "qcow2"));
        assert_eq!(by_path.image_roots, Some(vec!["/srv".into()]));
        let by_name = find("disk").unwrap();
        assert_eq!((&by_name.path, by_name.snapshot.as_deref(), by_name.file_size), (&image, Some("s"), Some(4096)));
        assert!(find("disc").unwrap_err().contains("no export of this name"));
        let exports = format!("[generic]\n[a/b]\nexportname = {}\n", image.display());
        std::fs::write(&config, exports).unwrap();
        assert!(find("a/b").unwrap_err().contains("use --export"));
        assert_eq!(find_as("a/b", true).unwrap().path, image);
        std::fs::write(&config, "[generic]\nimageroots = relative\n").unwrap();
        assert!(find(image.to_str().unwrap()).unwrap_err().contains("not its imageroots"));
        std::fs::remove_file(&config).unwrap();
        assert!(find(image.to_str().unwrap()).is_ok(), "there need not be one");
        let window = Some(ByteRange::between(512, 1024));
        let config = by_name.config("x", window, false).unwrap();
        assert!(config.read_only && config.client.copy_on_write.is_none());
        assert_eq!(config.client.untrusted, Some(Untrusted { window }));
        let layer = by_name.config("x", None, true).unwrap();
        assert!(!layer.writes_image() && layer.client.copy_on_write.is_some());
    }
}
