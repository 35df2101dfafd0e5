//! Headers: parsed, taken apart and put together again.

use cowgate::qcow2::Header;
use cowgate::qcow2::header::PEEK_BYTES;
use cowgate::qcow2::header_area::HeaderArea;

pub fn run(data: &[u8]) {
    let peeked = Header::first_cluster(&data[..data.len().min(PEEK_BYTES)]);
    let parsed = Header::parse(data);
    assert!(peeked.is_ok() || parsed.is_err());
    let area = HeaderArea::parse(data);
    assert_eq!(area.is_ok(), parsed.is_ok(), "both accept the same headers");
    let (Ok(header), Ok(area)) = (parsed, area) else { return };
    let cluster = header.layout.cluster() as usize;
    assert!(header.layout.l1_entries_for(header.size).saturating_mul(8) <= 32 << 20);

    // stored unchanged it says the same; it may not fit any more when extensions were not padded
    if let Ok(bytes) = area.to_bytes() {
        assert!(bytes.len() <= cluster);
        same(&header, &Header::parse(&bytes).expect("what is stored is a header"));
        let again = HeaderArea::parse(&bytes).expect("what is stored is a header");
        let twice = again.to_bytes().expect("it fitted before");
        // only as far as zeroes cover what was there before
        assert!(
            bytes.starts_with(&twice) && bytes[twice.len()..].iter().all(|&b| b == 0),
            "stored twice is stored once"
        );
    }
    // and changed it says what was changed
    let mut changed = area.clone();
    changed.set_backing(Some((b"below".to_vec(), "raw".to_owned())));
    changed.set_extension(0x1234_5678, Some(vec![7; 9]));
    if header.layout.version >= 3 {
        changed.set_autoclear(0);
    }
    if let Ok(bytes) = changed.to_bytes() {
        let header = Header::parse(&bytes).expect("what is stored is a header");
        assert_eq!(header.backing_file.as_deref(), Some(&b"below"[..]));
        assert_eq!(header.backing_format.as_deref(), Some("raw"));
        assert_eq!(header.autoclear, 0);
    }
}

fn same(a: &Header, b: &Header) {
    let told = |h: &Header| format!("{h:?}");
    assert_eq!(told(a), told(b));
}
