//! Becoming the `user` and `group` of the configuration: what needs root is done before, everything that clients or
//! images can influence is done after.
//!
//! Promises: the change is complete and for good, or the start fails with an error that names the key. Called by the
//! daemon's start, before there is any other thread.

use crate::export::config::ServerConfig;
use nix::unistd::{
    Gid, Group, Uid, User, getegid, geteuid, getgrouplist, getgroups, getresgid, getresuid, initgroups, seteuid,
    setgid, setgroups, setuid,
};
use std::ffi::CString;
use std::io;

/// What `user` and `group` ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    user: Option<User>,
    group: Gid,
    /// For the log line.
    group_name: Option<String>,
    /// The key that asks for it, for error messages.
    key: String,
}

/// Why the daemon cannot become what the configuration asks for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such user or group.
    #[error("[generic] {key} = {name}: there is no such {key} on this machine; create it or change the key")]
    Unknown {
        /// `user` or `group`.
        key: &'static str,
        /// Its value.
        name: String,
    },
    /// The user database cannot be asked.
    #[error("[generic] {key} = {name}: cannot look it up: {source}")]
    Lookup {
        /// `user` or `group`.
        key: &'static str,
        /// Its value.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// Only root can become somebody else.
    #[error("[generic] {key}: only root can change to it; start as root or as that user, or remove the key")]
    NotRoot {
        /// The keys with their values.
        key: String,
    },
    /// The kernel refuses.
    #[error("[generic] {key}: {step} failed: {source}; start with the capabilities for it, or remove the key")]
    Refused {
        /// The keys with their values.
        key: String,
        /// The call.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The kernel accepted, and yet it is not so.
    #[error("[generic] {key}: the change was accepted and did not take effect: {what}")]
    Ineffective {
        /// The keys with their values.
        key: String,
        /// What is wrong.
        what: &'static str,
    },
}

impl Identity {
    /// Looks the names up. `None`: the configuration asks for no change.
    pub fn wanted(server: &ServerConfig) -> Result<Option<Identity>, Error> {
        let user = match &server.user {
            Some(name) => Some(found("user", name, User::from_name(name))?),
            None => None,
        };
        let group = match &server.group {
            Some(name) => Some(found("group", name, Group::from_name(name))?),
            None => None,
        };
        let keys = [("user", &server.user), ("group", &server.group)];
        let keys = keys.iter().filter_map(|(key, value)| value.as_ref().map(|value| format!("{key} = {value}")));
        let key = keys.collect::<Vec<_>>().join(", ");
        Ok(match (user, group) {
            (None, None) => None,
            (user, Some(group)) => Some(Identity { user, group: group.gid, group_name: Some(group.name), key }),
            (Some(user), None) => {
                let gid = user.gid;
                Some(Identity { user: Some(user), group: gid, group_name: None, key })
            }
        })
    }

    /// Its user's number: who is to own the daemon's sockets. `None`: whoever started it.
    pub fn uid(&self) -> Option<Uid> {
        self.user.as_ref().map(|user| user.uid)
    }

    /// Its group's number.
    pub fn gid(&self) -> Gid {
        self.group
    }

    /// Whether this process is that user and group, without having been root.
    fn is_ours(&self) -> bool {
        let group_matters = self.group_name.is_some();
        self.uid().is_none_or(|uid| uid == geteuid()) && (!group_matters || self.group == getegid())
    }

    /// Becomes it, all threads, for good. Groups first: without root they could not be changed any more.
    pub fn assume(&self) -> Result<(), Error> {
        if !geteuid().is_root() {
            return match self.is_ours() {
                true => Ok(()),
                false => Err(Error::NotRoot { key: self.key.clone() }),
            };
        }
        let refused =
            |step| move |e: nix::Error| Error::Refused { key: self.key.clone(), step, source: io::Error::from(e) };
        let mut groups = match &self.user {
            Some(user) => {
                let name = CString::new(user.name.as_str()).expect("it came from a C string");
                initgroups(&name, self.group).map_err(refused("initgroups"))?;
                getgrouplist(&name, self.group).map_err(refused("getgrouplist"))?
            }
            None => {
                setgroups(&[self.group]).map_err(refused("setgroups"))?;
                vec![self.group]
            }
        };
        setgid(self.group).map_err(refused("setgid"))?;
        if let Some(uid) = self.uid() {
            setuid(uid).map_err(refused("setuid"))?;
        }
        self.verify(&mut groups)?;
        let user = self.user.as_ref().map_or("root", |user| &user.name);
        let group = self.group_name.as_deref().unwrap_or("its own group");
        tracing::info!("serving as user {user} ({}), {group} ({})", geteuid(), self.group);
        Ok(())
    }

    fn verify(&self, groups: &mut Vec<Gid>) -> Result<(), Error> {
        let ineffective = |what| Err(Error::Ineffective { key: self.key.clone(), what });
        let gids = getresgid().map(|g| [g.real, g.effective, g.saved]);
        if gids != Ok([self.group; 3]) {
            return ineffective("a group ID is still another one");
        }
        let sorted = |groups: &mut Vec<Gid>| {
            groups.sort_by_key(|g| g.as_raw());
            groups.dedup();
        };
        let mut now = getgroups().unwrap_or_default();
        sorted(&mut now);
        sorted(groups);
        if now != *groups {
            return ineffective("the supplementary groups are others");
        }
        let Some(uid) = self.uid() else {
            return Ok(());
        };
        if getresuid().map(|u| [u.real, u.effective, u.saved]) != Ok([uid; 3]) {
            return ineffective("a user ID is still another one");
        }
        if !uid.is_root() && seteuid(Uid::from_raw(0)).is_ok() {
            return ineffective("the process can become root again");
        }
        Ok(())
    }
}

fn found<T>(key: &'static str, name: &str, answer: nix::Result<Option<T>>) -> Result<T, Error> {
    match answer {
        Ok(Some(found)) => Ok(found),
        Ok(None) => Err(Error::Unknown { key, name: name.to_owned() }),
        // what getpwnam_r may say of a name that does not exist
        Err(nix::Error::ENOENT | nix::Error::ESRCH | nix::Error::EPERM) => {
            Err(Error::Unknown { key, name: name.to_owned() })
        }
        Err(e) => Err(Error::Lookup { key, name: name.to_owned(), source: e.into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(user: Option<&str>, group: Option<&str>) -> Result<Option<Identity>, Error> {
        let name = |name: Option<&str>| name.map(str::to_owned);
        Identity::wanted(&ServerConfig { user: name(user), group: name(group), ..ServerConfig::default() })
    }

    #[test]
    fn names_are_looked_up() {
        assert_eq!(wanted(None, None).expect("nothing"), None);
        let root = wanted(Some("root"), None).expect("found").expect("asked for");
        assert_eq!((root.uid(), root.gid()), (Some(Uid::from_raw(0)), Gid::from_raw(0)));
        let group = wanted(None, Some("root")).expect("found").expect("asked for");
        assert_eq!((group.uid(), group.gid()), (None, Gid::from_raw(0)));
        let unknown = wanted(Some("no such user"), None).expect_err("unknown").to_string();
        assert!(unknown.contains("[generic] user = no such user: there is no such user"), "{unknown}");
        let unknown = wanted(Some("root"), Some("no\0group")).expect_err("unknown").to_string();
        assert!(unknown.contains("there is no such group"), "{unknown}");
    }

    #[test]
    fn whoever_is_that_user_already_needs_no_root() {
        let me = User::from_uid(geteuid()).expect("lookup").expect("this user has a name");
        let identity = wanted(Some(&me.name), None).expect("found").expect("asked for");
        assert!(identity.is_ours());
    }
}
