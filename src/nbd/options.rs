//! What the data of an option says. Called by the handshake with the whole data of one option.

use super::{MAX_QUERIES, MAX_STRING, NBD_INFO_BLOCK_SIZE, NBD_INFO_DESCRIPTION, NBD_INFO_NAME};
use bytes::Buf;

/// Why option data cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadData {
    /// It does not follow the format.
    Malformed(&'static str),
    /// It does, but exceeds a limit.
    TooBig(&'static str),
}

/// `NBD_OPT_INFO` and `NBD_OPT_GO`: the export, and which optional items were asked for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InfoQuery {
    pub name: String,
    pub want_name: bool,
    pub want_description: bool,
    pub want_block_size: bool,
}

/// `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`: the export, and what is asked for of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MetaQuery {
    pub name: String,
    pub queries: Vec<String>,
}

impl MetaQuery {
    /// Which of an export's `contexts` a LIST asks for: all without a query, else those named and, with an empty leaf
    /// name (`base:`, `qemu:`, `qemu:dirty-bitmap:`), those that begin so.
    pub(super) fn lists(&self, context: &str) -> bool {
        let matches =
            |query: &String| query == context || (query.ends_with(':') && context.starts_with(query.as_str()));
        self.queries.is_empty() || self.queries.iter().any(matches)
    }

    /// Whether a SET selects this context: only its own name does.
    pub(super) fn selects(&self, context: &str) -> bool {
        self.queries.iter().any(|query| query == context)
    }

    /// Whether contexts beyond the namespace `base:` are asked for, of which only the image knows.
    pub(super) fn beyond_base(&self, empty_is_all: bool) -> bool {
        (self.queries.is_empty() && empty_is_all) || self.queries.iter().any(|query| !query.starts_with("base:"))
    }
}

/// A string of the protocol: valid UTF-8 without NUL, within the length limit.
pub(super) fn string(bytes: &[u8]) -> Result<String, BadData> {
    if bytes.len() > MAX_STRING {
        return Err(BadData::TooBig("a name is at most 4096 bytes"));
    }
    match std::str::from_utf8(bytes) {
        Ok(s) if !s.contains('\0') => Ok(s.to_owned()),
        _ => Err(BadData::Malformed("a name is UTF-8 without NUL")),
    }
}

pub(super) fn info_query(mut data: &[u8]) -> Result<InfoQuery, BadData> {
    let name = string(counted(&mut data)?)?;
    let count = data.try_get_u16().map_err(|_| TRUNCATED)?;
    if data.len() != usize::from(count) * 2 {
        return Err(BadData::Malformed("the number of information requests does not match the data"));
    }
    let asked = |item: u16| data.chunks_exact(2).any(|c| c == item.to_be_bytes());
    Ok(InfoQuery {
        name,
        want_name: asked(NBD_INFO_NAME),
        want_description: asked(NBD_INFO_DESCRIPTION),
        want_block_size: asked(NBD_INFO_BLOCK_SIZE),
    })
}

pub(super) fn meta_query(mut data: &[u8]) -> Result<MetaQuery, BadData> {
    let name = string(counted(&mut data)?)?;
    let count = data.try_get_u32().map_err(|_| TRUNCATED)? as usize;
    if count > MAX_QUERIES {
        return Err(BadData::TooBig("too many queries"));
    }
    let queries = (0..count).map(|_| string(counted(&mut data)?)).collect::<Result<_, _>>()?;
    if !data.is_empty() {
        return Err(BadData::Malformed("data after the last query"));
    }
    Ok(MetaQuery { name, queries })
}

const TRUNCATED: BadData = BadData::Malformed("the data ends too early");

/// Takes a 32-bit length and that many bytes off the front of `data`.
fn counted<'a>(data: &mut &'a [u8]) -> Result<&'a [u8], BadData> {
    let len = data.try_get_u32().map_err(|_| TRUNCATED)? as usize;
    data.split_off(..len).ok_or(TRUNCATED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn counted_bytes(s: &[u8]) -> Vec<u8> {
        [&(s.len() as u32).to_be_bytes(), s].concat()
    }

    fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
        let mut data = counted_bytes(name.as_bytes());
        data.extend((queries.len() as u32).to_be_bytes());
        queries.iter().for_each(|q| data.extend(counted_bytes(q.as_bytes())));
        data
    }

    #[test]
    fn info_items_in_any_order_and_unknown_ones() {
        let mut data = counted_bytes(b"disk");
        data.extend([0, 3, 0, 3, 0x7f, 0xff, 0, 1]);
        assert_eq!(
            info_query(&data),
            Ok(InfoQuery { name: "disk".into(), want_name: true, want_description: false, want_block_size: true })
        );
    }

    #[test]
    fn malformed_info_is_refused() {
        let mut more_items = counted_bytes(b"disk");
        more_items.extend([0, 2, 0, 3]);
        let mut fewer_items = counted_bytes(b"disk");
        fewer_items.extend([0, 0, 0, 3]);
        let mut name_too_long = counted_bytes(b"disk");
        name_too_long[3] = 200;
        for data in [more_items, fewer_items, name_too_long, vec![], vec![0xff; 4], counted_bytes(b"disk")] {
            assert!(matches!(info_query(&data), Err(BadData::Malformed(_))), "{data:?}");
        }
    }

    #[test]
    fn names_have_limits() {
        assert!(string(&[b'x'; MAX_STRING]).is_ok());
        assert!(matches!(string(&[b'x'; MAX_STRING + 1]), Err(BadData::TooBig(_))));
        assert!(matches!(string(b"a\0b"), Err(BadData::Malformed(_))));
        assert!(matches!(string(b"\xff"), Err(BadData::Malformed(_))));
    }

    #[test]
    fn meta_queries() {
        let asked = ["qemu:allocation-depth", "base:allocation", "base:other", "nonsense"];
        let q = meta_query(&meta("disk", &asked)).unwrap();
        assert_eq!(q, MetaQuery { name: "disk".into(), queries: asked.map(String::from).to_vec() });
        assert!(meta_query(&meta("disk", &vec!["base:x"; MAX_QUERIES])).is_ok());
        assert!(matches!(meta_query(&meta("disk", &vec!["base:x"; MAX_QUERIES + 1])), Err(BadData::TooBig(_))));
        let mut trailing = meta("disk", &["base:"]);
        trailing.push(0);
        assert!(matches!(meta_query(&trailing), Err(BadData::Malformed(_))));
        trailing.truncate(trailing.len() - 2);
        assert!(matches!(meta_query(&trailing), Err(BadData::Malformed(_))));
    }

    #[test]
    fn which_contexts_a_query_means() {
        let contexts = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:"];
        let ask = |queries: &[&str]| {
            let q = meta_query(&meta("disk", queries)).unwrap();
            let those = |f: &dyn Fn(&str) -> bool| -> Vec<usize> { (0..4).filter(|&i| f(contexts[i])).collect() };
            (those(&|c| q.lists(c)), those(&|c| q.selects(c)), q.beyond_base(true))
        };
        assert_eq!(ask(&[]), (vec![0, 1, 2, 3], vec![], true));
        assert_eq!(ask(&["base:"]), (vec![0], vec![], false));
        assert_eq!(ask(&["base:allocation", "base:allocation"]), (vec![0], vec![0], false));
        assert_eq!(ask(&["qemu:"]), (vec![1, 2, 3], vec![], true));
        // a bitmap may have no name, and is then selected by what is otherwise a wildcard
        assert_eq!(ask(&["qemu:dirty-bitmap:"]), (vec![2, 3], vec![3], true));
        assert_eq!(ask(&["qemu:dirty-bitmap:a"]), (vec![2], vec![2], true));
        assert_eq!(ask(&["base", "allocation", "", ":", "base:alloc", "x-other:y"]), (vec![], vec![], true));
        assert!(!meta_query(&meta("disk", &[])).unwrap().beyond_base(false));
    }

    proptest! {
        #[test]
        fn arbitrary_data_never_panics(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = info_query(&data);
            let _ = meta_query(&data);
        }

        #[test]
        fn plausible_data_never_panics(len in 0u32..40, rest in proptest::collection::vec(0u8..5, 0..60)) {
            let data = [&len.to_be_bytes()[..], &rest].concat();
            let _ = info_query(&data);
            let _ = meta_query(&data);
        }
    }
}
