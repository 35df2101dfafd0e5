//! What a reload changes: the exports served so far against the configuration just read.
//!
//! Pure, called by the daemon, carried out by the registry. Promises: a file with errors, a name that two files claim,
//! or a base file that cannot be relied on changes nothing of what it defined before; everything else takes effect.

use crate::export::config::ExportConfig;
use crate::export::load::Loaded;
use crate::export::problem::{Problem, Severity};
use std::cmp::Ordering;
use std::path::PathBuf;
use std::sync::Arc;

/// The difference between two states of the configuration. Each list is sorted by name; no name is in two of the first
/// five.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Exports to serve from now on.
    pub add: Vec<Arc<ExportConfig>>,
    /// Exports to serve differently: new clients get this, connected ones keep what they have.
    pub change: Vec<Arc<ExportConfig>>,
    /// Exports that go on with other limits, for connected clients too, or with another block device.
    pub adjust: Vec<Arc<ExportConfig>>,
    /// Names to serve no longer: new clients are refused, connected ones stay.
    pub remove: Vec<String>,
    /// Exports that go on as they are, from another place in the configuration.
    pub moved: Vec<Arc<ExportConfig>>,
    /// All exports served once it is carried out: `previous` of the next [`plan`].
    pub applied: Vec<Arc<ExportConfig>>,
    /// Conflicts with exports that are kept for a file with errors.
    pub problems: Vec<Problem>,
}

impl Plan {
    /// Whether carrying it out changes anything.
    pub fn is_empty(&self) -> bool {
        self.add.is_empty() && self.change.is_empty() && self.adjust.is_empty() && self.remove.is_empty()
    }
}

/// What may take effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Everything: somebody who may do so asked for it.
    All,
    /// New exports only: a client asked for one, and what is served is not its business.
    Additions,
    /// What this file defines or has defined: whoever changed it has asked for nothing else.
    File(PathBuf),
}

/// Compares the exports served so far, sorted by name, with the configuration as loaded.
pub fn plan(previous: &[Arc<ExportConfig>], loaded: &Loaded, scope: &Scope) -> Plan {
    let mut plan = Plan::default();
    let may_add = |new: &ExportConfig| match scope {
        Scope::All | Scope::Additions => true,
        Scope::File(file) => new.source.file == *file,
    };
    let may_end = |old: &ExportConfig| match scope {
        Scope::All => true,
        Scope::Additions => false,
        Scope::File(file) => old.source.file == *file,
    };
    let may_change =
        |old: &ExportConfig, new: &ExportConfig| *scope != Scope::Additions && (may_end(old) || may_add(new));
    let is_held = |e: &ExportConfig| {
        loaded.server.is_none() || loaded.failed.contains(&e.source.file) || loaded.contested.contains(&e.name)
    };
    let usable: &[_] = if loaded.server.is_some() { &loaded.exports } else { &[] };
    let (mut before, mut now) = (previous.iter().peekable(), usable.iter().peekable());
    // both are sorted: the smaller name comes next, the same name from both together
    loop {
        let order = match (before.peek(), now.peek()) {
            (None, None) => return plan,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(old), Some(new)) => old.name.cmp(&new.name),
        };
        let old = before.next_if(|_| order.is_le());
        let new = now.next_if(|_| order.is_ge());
        match (old, new) {
            (None, Some(new)) if !may_add(new) => {}
            (None, Some(new)) => {
                plan.add.push(Arc::clone(new));
                plan.applied.push(Arc::clone(new));
            }
            (Some(old), None) if !may_end(old) || is_held(old) => plan.applied.push(Arc::clone(old)),
            (Some(old), None) => plan.remove.push(old.name.clone()),
            (Some(old), Some(new)) if Arc::ptr_eq(old, new) => plan.applied.push(Arc::clone(old)),
            (Some(old), Some(new)) if is_held(old) => {
                plan.applied.push(Arc::clone(old));
                plan.problems.push(held_elsewhere(old, new));
            }
            (Some(old), Some(new)) if old.same(new) => {
                plan.moved.push(Arc::clone(new));
                plan.applied.push(Arc::clone(new));
            }
            (Some(old), Some(new)) if !may_change(old, new) => plan.applied.push(Arc::clone(old)),
            (Some(old), Some(new)) => {
                let list = if old.same_service(new) { &mut plan.adjust } else { &mut plan.change };
                list.push(Arc::clone(new));
                plan.applied.push(Arc::clone(new));
            }
            (None, None) => unreachable!("one of the two is at its turn"),
        }
    }
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
    use std::collections::BTreeMap;

    fn export(name: &str, path: &str, file: &str) -> Arc<ExportConfig> {
        Arc::new(ExportConfig::new(name, path, Source { file: file.into(), line: 1 }))
    }

    fn loaded(exports: &[Arc<ExportConfig>], failed: &[&str], contested: &[&str]) -> Loaded {
        Loaded {
            server: Some(ServerConfig::default()),
            exports: exports.to_vec(),
            failed: failed.iter().map(PathBuf::from).collect(),
            contested: contested.iter().map(|s| s.to_string()).collect(),
            ..Loaded::default()
        }
    }

    fn names(exports: &[Arc<ExportConfig>]) -> Vec<&str> {
        exports.iter().map(|e| e.name.as_str()).collect()
    }

    #[test]
    fn added_changed_removed_kept() {
        let before = [export("a", "/a", "1"), export("b", "/b", "1"), export("c", "/c", "1")];
        let now = [export("b", "/b", "1"), export("c", "/other", "1"), export("d", "/d", "1")];
        let plan = plan(&before, &loaded(&now, &[], &[]), &Scope::All);
        assert_eq!((names(&plan.add), names(&plan.change)), (vec!["d"], vec!["c"]));
        assert_eq!((plan.remove.as_slice(), names(&plan.moved)), (["a".to_owned()].as_slice(), vec!["b"]));
        assert_eq!(plan.change[0].path, PathBuf::from("/other"));
        assert_eq!(names(&plan.applied), ["b", "c", "d"]);
        assert!(!plan.is_empty());
    }

    #[test]
    fn zero_exports_is_normal() {
        assert!(plan(&[], &loaded(&[], &[], &[]), &Scope::All).is_empty());
        assert_eq!(plan(&[export("a", "/a", "1")], &loaded(&[], &[], &[]), &Scope::All).remove, ["a"]);
    }

    #[test]
    fn other_limits_do_not_retire_an_export() {
        let limited = |rate| {
            let mut export = (*export("a", "/a", "1")).clone();
            export.limits.iops = Some(rate);
            Arc::new(export)
        };
        let (before, now) = ([limited(1)], loaded(&[limited(2)], &[], &[]));
        let first = plan(&before, &now, &Scope::All);
        assert_eq!((names(&first.adjust), first.change.len(), first.moved.len()), (vec!["a"], 0, 0));
        assert!(!first.is_empty() && plan(&first.applied, &now, &Scope::All).is_empty());
        assert!(plan(&before, &now, &Scope::Additions).is_empty(), "a client that misses an export changes no limits");
    }

    #[test]
    fn an_export_that_moves_to_another_file_is_kept() {
        let plan = plan(&[export("a", "/a", "1")], &loaded(&[export("a", "/a", "2")], &[], &[]), &Scope::All);
        assert!(plan.is_empty());
        assert_eq!(plan.applied[0].source.file, PathBuf::from("2"), "from now on file 2 answers for it");
        assert_eq!(plan.moved, plan.applied);
    }

    #[test]
    fn a_failed_file_keeps_its_exports_and_the_others_take_effect() {
        let before = [export("a", "/a", "bad"), export("b", "/b", "good"), export("c", "/c", "good")];
        let plan = plan(&before, &loaded(&[export("b", "/new", "good")], &["bad"], &[]), &Scope::All);
        assert_eq!((names(&plan.applied), names(&plan.change)), (vec!["a", "b"], vec!["b"]));
        assert_eq!(plan.remove, ["c"]);
    }

    #[test]
    fn a_contested_name_stays_what_it_was() {
        let before = [export("x", "/x", "1")];
        assert_eq!(names(&plan(&before, &loaded(&[], &[], &["x"]), &Scope::All).applied), ["x"]);
        assert!(plan(&[], &loaded(&[], &[], &["x"]), &Scope::All).applied.is_empty(), "no former state: not served");
    }

    #[test]
    fn a_name_held_by_a_failed_file_is_not_taken_over() {
        let before = [export("x", "/x", "bad")];
        let plan = plan(&before, &loaded(&[export("x", "/other", "new")], &["bad"], &[]), &Scope::All);
        assert_eq!(plan.applied[0].path, PathBuf::from("/x"));
        let text = plan.problems[0].to_string();
        assert!(text.starts_with("new:1: error: [x]") && text.contains("bad"), "{text}");
    }

    #[test]
    fn a_bad_base_file_changes_nothing() {
        let before = [export("a", "/a", "1")];
        let broken = Loaded { server: None, exports: vec![export("b", "/b", "2")], ..Loaded::default() };
        let plan = plan(&before, &broken, &Scope::All);
        assert!(plan.is_empty());
        assert_eq!(plan.applied, before);
    }

    #[test]
    fn a_client_that_misses_an_export_can_only_bring_in_new_ones() {
        let before = [export("a", "/a", "1"), export("b", "/b", "1")];
        let now = [export("b", "/other", "1"), export("c", "/c", "1")];
        let plan = plan(&before, &loaded(&now, &[], &[]), &Scope::Additions);
        assert_eq!((names(&plan.add), plan.change.len(), plan.remove.len()), (vec!["c"], 0, 0));
        assert_eq!(names(&plan.applied), ["a", "b", "c"]);
        assert_eq!(plan.applied[1].path, PathBuf::from("/b"));
    }

    fn some_exports() -> impl Strategy<Value = Vec<Arc<ExportConfig>>> {
        proptest::collection::btree_map("[a-d]", ("[xy]", "[123]"), 0..4)
            .prop_map(|map| map.into_iter().map(|(name, (path, file))| export(&name, &path, &file)).collect())
    }

    /// The registry's part, on a map.
    fn carried_out(before: &[Arc<ExportConfig>], plan: &Plan) -> Vec<Arc<ExportConfig>> {
        let mut map: BTreeMap<_, _> = before.iter().map(|e| (e.name.clone(), Arc::clone(e))).collect();
        for name in &plan.remove {
            assert!(map.remove(name).is_some(), "{name} was there");
        }
        for new in &plan.add {
            assert!(map.insert(new.name.clone(), Arc::clone(new)).is_none(), "{} is new", new.name);
        }
        for new in plan.change.iter().chain(&plan.adjust).chain(&plan.moved) {
            assert!(map.insert(new.name.clone(), Arc::clone(new)).is_some(), "{} was there", new.name);
        }
        map.into_values().collect()
    }

    proptest! {
        #[test]
        fn the_plan_carried_out_on_the_old_exports_gives_the_new_ones(before in some_exports(), now in some_exports()) {
            let loaded = loaded(&now, &[], &[]);
            let first = plan(&before, &loaded, &Scope::All);
            prop_assert_eq!(carried_out(&before, &first), now.clone());
            prop_assert_eq!(&first.applied, &now);
            prop_assert!(plan(&first.applied, &loaded, &Scope::All).is_empty());
        }

        #[test]
        fn what_a_failed_file_defined_stays(before in some_exports(), now in some_exports(), failed in "[123]") {
            let is_failed = |e: &&Arc<ExportConfig>| e.source.file.as_os_str() == failed.as_str();
            // a failed file contributes nothing to a load
            let now: Vec<_> = now.iter().filter(|e| !is_failed(e)).cloned().collect();
            let loaded = loaded(&now, &[&failed], &[]);
            for scope in [&Scope::All, &Scope::Additions] {
                let first = plan(&before, &loaded, scope);
                let after = carried_out(&before, &first);
                prop_assert_eq!(&after, &first.applied);
                for held in before.iter().filter(is_failed) {
                    prop_assert!(after.contains(held));
                }
                prop_assert!(plan(&first.applied, &loaded, scope).is_empty());
            }
        }
    }
}
