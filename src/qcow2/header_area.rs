//! The header cluster as a whole, to be changed and written back: whatever is not changed stays byte for byte, fields
//! and extensions we do not know included.

use super::header::{Header, HeaderError, MAX_BACKING_NAME, extension, field};

/// One header extension as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Extension {
    id: u32,
    data: Vec<u8>,
}

/// The header with its extensions and the backing file's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderArea {
    /// The header structure, as long as its `header_length` says.
    fixed: Vec<u8>,
    extensions: Vec<Extension>,
    backing: Option<Vec<u8>>,
    /// Bytes that the area took when it was read.
    used: usize,
    cluster: usize,
}

/// Why a changed header cannot be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the header with its extensions and the backing file's name takes {need} bytes, the first cluster has {room}")]
pub struct NoRoom {
    need: usize,
    room: usize,
}

impl HeaderArea {
    /// Takes an image's first cluster apart.
    pub fn parse(bytes: &[u8]) -> Result<HeaderArea, HeaderError> {
        let header = Header::parse(bytes)?;
        let cluster = header.layout.cluster() as usize;
        let be32 = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize;
        let fixed_len = if header.layout.version >= 3 { be32(100) } else { 72 };
        let backing_at = header
            .backing_file
            .as_ref()
            .map(|_| u64::from_be_bytes(bytes[8..16].try_into().expect("eight bytes")) as usize);
        let end = backing_at.unwrap_or(bytes.len()).min(bytes.len()).min(cluster);
        let (mut extensions, mut at) = (Vec::new(), fixed_len);
        while at + 8 <= end && be32(at) as u32 != extension::END {
            let data = bytes[at + 8..at + 8 + be32(at + 4)].to_vec(); // `Header::parse` saw to it that it is inside
            let len = data.len();
            extensions.push(Extension { id: be32(at) as u32, data });
            at = (at + 8 + len).next_multiple_of(8);
        }
        let backing = header.backing_file;
        let used = backing_at.map_or(at + 8, |at| at + backing.as_ref().map_or(0, Vec::len));
        Ok(HeaderArea { fixed: bytes[..fixed_len].to_vec(), extensions, backing, used, cluster })
    }

    /// Sets, replaces or removes an extension. A new one goes behind the others; of several of one type, of which readers
    /// take the last, one is left.
    pub fn set_extension(&mut self, id: u32, data: Option<Vec<u8>>) {
        let place = self.extensions.iter().position(|e| e.id == id).unwrap_or(self.extensions.len());
        self.extensions.retain(|e| e.id != id);
        if let Some(data) = data {
            self.extensions.insert(place, Extension { id, data });
        }
    }

    /// Sets or removes the backing file: its name as stored, and its format.
    pub fn set_backing(&mut self, backing: Option<(Vec<u8>, String)>) {
        let (name, format) = backing.unzip();
        self.backing = name;
        self.set_extension(extension::BACKING_FORMAT, format.map(String::into_bytes));
    }

    /// `autoclear_features`; 0 in version 2.
    pub fn autoclear(&self) -> u64 {
        let at = field::AUTOCLEAR as usize;
        self.fixed.get(at..at + 8).map_or(0, |b| u64::from_be_bytes(b.try_into().expect("eight bytes")))
    }

    /// Sets `autoclear_features`. Panics for a version 2 header, which has none.
    pub fn set_autoclear(&mut self, bits: u64) {
        let at = field::AUTOCLEAR as usize;
        self.fixed[at..at + 8].copy_from_slice(&bits.to_be_bytes());
    }

    /// What is to be written at the start of the image: whole sectors, at most the first cluster, and zeroes where more
    /// was before.
    pub fn to_bytes(&self) -> Result<Vec<u8>, NoRoom> {
        let mut out = self.fixed.clone();
        for Extension { id, data } in &self.extensions {
            out.extend(id.to_be_bytes());
            out.extend((data.len() as u32).to_be_bytes());
            out.extend(data);
            out.resize(out.len().next_multiple_of(8), 0);
        }
        out.extend([0; 8]); // end of the extensions
        let (mut at, mut len) = (0, 0);
        if let Some(name) = &self.backing {
            (at, len) = (out.len() as u64, name.len() as u32);
            out.extend(name);
        }
        out[8..16].copy_from_slice(&at.to_be_bytes());
        out[16..20].copy_from_slice(&len.to_be_bytes());
        if out.len() > self.cluster || len > MAX_BACKING_NAME {
            let room = if len > MAX_BACKING_NAME { MAX_BACKING_NAME as usize } else { self.cluster };
            return Err(NoRoom { need: out.len(), room });
        }
        let end = out.len().max(self.used).next_multiple_of(512).min(self.cluster);
        out.resize(end, 0);
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::create::{NewImage, lay_out};
    use crate::qcow2::layout::Layout;

    fn fresh(backing: Option<&str>) -> Vec<u8> {
        let backing = backing.map(|name| (name.as_bytes().to_vec(), "qcow2".to_owned()));
        let new = NewImage { backing, ..NewImage::new(Layout::plain(3, 12, 4), 1 << 30) };
        lay_out(&new).unwrap().remove(0).1
    }

    #[test]
    fn unchanged_comes_out_as_it_was() {
        for backing in [None, Some("a"), Some("base.qcow2")] {
            let mut bytes = fresh(backing);
            let extra = bytes.len() - 8;
            // an additional field and an extension nobody knows
            bytes[104..112].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 7]);
            let mut area = HeaderArea::parse(&bytes).unwrap();
            let out = area.to_bytes().unwrap();
            assert_eq!(out[..], bytes[..out.len()]);
            assert!(bytes[out.len()..extra].iter().all(|&b| b == 0));
            area.set_extension(0x1234, Some(b"odd length".to_vec()));
            let again = HeaderArea::parse(&area.to_bytes().unwrap()).unwrap();
            assert_eq!(
                (&again.extensions, &again.backing, &again.fixed[16..]),
                (&area.extensions, &area.backing, &area.fixed[16..])
            );
        }
    }

    #[test]
    fn the_backing_file_comes_and_goes() {
        let mut area = HeaderArea::parse(&fresh(Some("a-long-name.qcow2"))).unwrap();
        area.set_backing(None);
        let header = Header::parse(&area.to_bytes().unwrap()).unwrap();
        assert_eq!((header.backing_file, header.backing_format), (None, None));
        area.set_backing(Some((b"b".to_vec(), "raw".to_owned())));
        let bytes = area.to_bytes().unwrap();
        let header = Header::parse(&bytes).unwrap();
        assert_eq!(header.backing_file.as_deref(), Some(&b"b"[..]));
        assert_eq!(header.backing_format.as_deref(), Some("raw"));
        assert!(!bytes.windows(6).any(|w| w == b"a-long"), "nothing of the old name is left");
    }

    #[test]
    fn of_extensions_that_are_there_twice_none_outlives_a_change() {
        let mut bytes = fresh(None);
        let start = u32::from_be_bytes(bytes[100..104].try_into().unwrap()) as usize;
        let twice =
            [b"\xe2\x79\x2a\xca\0\0\0\x03one\0\0\0\0\0", &b"\xe2\x79\x2a\xca\0\0\0\x03two\0\0\0\0\0"[..]].concat();
        bytes[start..start + twice.len()].copy_from_slice(&twice);
        bytes[start + twice.len()..].fill(0);
        let mut area = HeaderArea::parse(&bytes).unwrap();
        area.set_backing(Some((b"b".to_vec(), "raw".to_owned())));
        let header = Header::parse(&area.to_bytes().unwrap()).unwrap();
        assert_eq!(header.backing_format.as_deref(), Some("raw"));
        area.set_backing(None);
        assert_eq!(Header::parse(&area.to_bytes().unwrap()).unwrap().backing_format, None);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut area = HeaderArea::parse(&fresh(None)).unwrap();
        area.set_extension(1, Some(vec![1; 4096]));
        assert!(area.to_bytes().is_err());
        area.set_extension(1, None);
        area.set_backing(Some((vec![b'x'; 1024], "raw".to_owned())));
        assert!(area.to_bytes().is_err());
    }
}
