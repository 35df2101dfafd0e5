//! What a reload changes: the exports served so far against the configuration just read.
//!
//! Pure, called by the daemon, carried out by the registry. Promises: a file with errors, a name that two files claim,
//! or a base file that cannot be relied on changes nothing of what it defined before; everything else takes effect.

use crate::export::config::ExportConfig;
use crate::export::load::Loaded;
use crate::export::problem::{Problem, Severity};
use std::collections::BTreeMap;

/// The difference between two states of the configuration. Each list is sorted by name; no name is in two of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Exports to serve from now on.
    pub add: Vec<ExportConfig>,
    /// Exports to serve differently: new clients get this, connected ones keep what they have.
    pub change: Vec<ExportConfig>,
    /// Names to serve no longer: new clients are refused, connected ones stay.
    pub remove: Vec<String>,
    /// Exports that go on as they are (their place in the configuration may have moved).
    pub keep: Vec<ExportConfig>,
    /// Conflicts with exports that are kept for a file with errors.
    pub problems: Vec<Problem>,
}

impl Plan {
    /// Whether carrying it out changes anything.
    pub fn is_empty(&self) -> bool {
        self.add.is_empty() && self.change.is_empty() && self.remove.is_empty()
    }

    /// The exports served once it is carried out, sorted by name: `previous` of the next [`plan`].
    pub fn applied(&self) -> Vec<ExportConfig> {
        let mut all: Vec<_> = [&self.add, &self.change, &self.keep].into_iter().flatten().cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }
}

/// Compares the exports served so far with the configuration as loaded.
pub fn plan(previous: &[ExportConfig], loaded: &Loaded) -> Plan {
    let mut before: BTreeMap<&str, &ExportConfig> = previous.iter().map(|e| (e.name.as_str(), e)).collect();
    let mut plan = Plan::default();
    let is_held = |e: &ExportConfig| {
        loaded.server.is_none() || loaded.failed.contains(&e.source.file) || loaded.contested.contains(&e.name)
    };
    let usable = loaded.exports.iter().filter(|_| loaded.server.is_some());
    for export in usable {
        match before.remove(export.name.as_str()) {
            None => plan.add.push(export.clone()),
            Some(old) if is_held(old) => {
                plan.keep.push(old.clone());
                plan.problems.push(held_elsewhere(old, export));
            }
            Some(old) if old.same_service(export) => plan.keep.push(export.clone()),
            Some(_) => plan.change.push(export.clone()),
        }
    }
    for (name, old) in before {
        match is_held(old) {
            true => plan.keep.push(old.clone()),
            false => plan.remove.push(name.to_owned()),
        }
    }
    plan.keep.sort_by(|a, b| a.name.cmp(&b.name));
    plan
}

fn held_elsewhere(old: &ExportConfig, new: &ExportConfig) -> Problem {
    let what = format!("this export is still the one of {}, which has errors", old.source.file.display());
    let remedy = "correct or remove that file; until then the export stays as it was";
    Problem::in_file(Severity::Error, &new.source.file, what, remedy).at(new.source.line).group(&new.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::config::{ServerConfig, Source};
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    fn export(name: &str, path: &str, file: &str) -> ExportConfig {
        ExportConfig::new(name, path, Source { file: file.into(), line: 1 })
    }

    fn loaded(exports: &[ExportConfig], failed: &[&str], contested: &[&str]) -> Loaded {
        Loaded {
            server: Some(ServerConfig::default()),
            exports: exports.to_vec(),
            failed: failed.iter().map(PathBuf::from).collect(),
            contested: contested.iter().map(|s| s.to_string()).collect(),
            ..Loaded::default()
        }
    }

    fn names(exports: &[ExportConfig]) -> Vec<&str> {
        exports.iter().map(|e| e.name.as_str()).collect()
    }

    #[test]
    fn added_changed_removed_kept() {
        let before = [export("a", "/a", "1"), export("b", "/b", "1"), export("c", "/c", "1")];
        let now = [export("b", "/b", "1"), export("c", "/other", "1"), export("d", "/d", "1")];
        let plan = plan(&before, &loaded(&now, &[], &[]));
        assert_eq!((names(&plan.add), names(&plan.change)), (vec!["d"], vec!["c"]));
        assert_eq!((plan.remove.clone(), names(&plan.keep)), (vec!["a".to_owned()], vec!["b"]));
        assert_eq!(plan.change[0].path, PathBuf::from("/other"));
        assert_eq!(names(&plan.applied()), ["b", "c", "d"]);
        assert!(!plan.is_empty());
    }

    #[test]
    fn zero_exports_is_normal() {
        assert!(plan(&[], &loaded(&[], &[], &[])).is_empty());
        assert_eq!(plan(&[export("a", "/a", "1")], &loaded(&[], &[], &[])).remove, ["a"]);
    }

    #[test]
    fn an_export_that_moves_to_another_file_is_kept() {
        let plan = plan(&[export("a", "/a", "1")], &loaded(&[export("a", "/a", "2")], &[], &[]));
        assert!(plan.is_empty());
        assert_eq!(plan.keep[0].source.file, PathBuf::from("2"), "from now on file 2 answers for it");
    }

    #[test]
    fn a_failed_file_keeps_its_exports_and_the_others_take_effect() {
        let before = [export("a", "/a", "bad"), export("b", "/b", "good"), export("c", "/c", "good")];
        let plan = plan(&before, &loaded(&[export("b", "/new", "good")], &["bad"], &[]));
        assert_eq!((names(&plan.keep), names(&plan.change)), (vec!["a"], vec!["b"]));
        assert_eq!(plan.remove, ["c"]);
    }

    #[test]
    fn a_contested_name_stays_what_it_was() {
        let before = [export("x", "/x", "1")];
        assert_eq!(names(&plan(&before, &loaded(&[], &[], &["x"])).keep), ["x"]);
        assert!(plan(&[], &loaded(&[], &[], &["x"])).applied().is_empty(), "no former state: not served");
    }

    #[test]
    fn a_name_held_by_a_failed_file_is_not_taken_over() {
        let before = [export("x", "/x", "bad")];
        let plan = plan(&before, &loaded(&[export("x", "/other", "new")], &["bad"], &[]));
        assert_eq!(plan.keep[0].path, PathBuf::from("/x"));
        let text = plan.problems[0].to_string();
        assert!(text.starts_with("new:1: error: [x]") && text.contains("bad"), "{text}");
    }

    #[test]
    fn a_bad_base_file_changes_nothing() {
        let before = [export("a", "/a", "1")];
        let broken = Loaded { server: None, exports: vec![export("b", "/b", "2")], ..Loaded::default() };
        let plan = plan(&before, &broken);
        assert!(plan.is_empty());
        assert_eq!(plan.applied(), before);
    }

    fn some_exports() -> impl Strategy<Value = Vec<ExportConfig>> {
        proptest::collection::btree_map("[a-d]", ("[xy]", "[123]"), 0..4)
            .prop_map(|map| map.into_iter().map(|(name, (path, file))| export(&name, &path, &file)).collect())
    }

    proptest! {
        #[test]
        fn every_name_has_one_fate_and_a_second_reload_changes_nothing(
            before in some_exports(), now in some_exports(), failed in proptest::option::of("[123]"),
        ) {
            let failed: Vec<&str> = failed.as_deref().into_iter().collect();
            // a failed file contributes nothing to a load
            let now: Vec<_> = now.into_iter().filter(|e| !failed.iter().any(|f| e.source.file == PathBuf::from(f))).collect();
            let loaded = loaded(&now, &failed, &[]);
            let first = plan(&before, &loaded);
            let mut fates: Vec<&str> = [&first.add, &first.change, &first.keep].into_iter().flat_map(|l| names(l)).collect();
            fates.extend(first.remove.iter().map(String::as_str));
            let unique: BTreeSet<&str> = fates.iter().copied().collect();
            prop_assert_eq!(fates.len(), unique.len());
            let expected: BTreeSet<&str> = names(&before).into_iter().chain(names(&now)).collect();
            prop_assert_eq!(unique, expected);
            let applied = first.applied();
            prop_assert!(plan(&applied, &loaded).is_empty());
        }
    }
}
