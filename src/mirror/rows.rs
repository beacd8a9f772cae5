//! What a mirror knows, as rows of a store.
//!
//! A row holds what one stanza changes. The store bounds a row and all rows together; what would be beyond is not written, and whoever
//! wanted it forgets what it belongs to: that passes as it is then.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use super::Output;

/// Of a key: a full address has at most 3,071 bytes (RFC 7622 §3.1).
pub const KEY_BYTES_MAX: usize = 4 * 1024;
/// Of a value: a presence and some thousand addresses.
pub const VALUE_BYTES_MAX: usize = 1024 * 1024;
/// All rows of one direction together, with what each costs beside its bytes: some hundred rooms of a thousand occupants.
pub const BYTES_MAX: u64 = 60 << 20;
/// A row's own cost.
pub const ROW_BYTES: u64 = 128;

/// First bytes of the keys.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Kind {
    Room = b'r',
    Occupant = b'o',
    Echo = b'e',
    Guest = b'g',
    Tail = b't',
    Held = b'h',
    /// A room of ours as its guests were shown it, and its occupants.
    Seen = b's',
    SeenOccupant = b'n',
}

impl Kind {
    /// Rooms before what stands in them.
    pub const ALL: [Self; 8] = [
        Self::Room,
        Self::Occupant,
        Self::Echo,
        Self::Guest,
        Self::Tail,
        Self::Held,
        Self::Seen,
        Self::SeenOccupant,
    ];

    /// The key of a room's own row, or of something in it.
    pub fn key(self, room: &str, what: &[u8]) -> Bytes {
        [&[self as u8], room.as_bytes(), &[0], what].concat().into()
    }

    /// The room and the rest of a key of this kind.
    pub fn parts(self, key: &[u8]) -> Option<(&str, &[u8])> {
        let rest = key.strip_prefix(&[self as u8])?;
        // No address holds a zero byte: XML has none.
        let end = rest.iter().position(|&byte| byte == 0)?;
        Some((std::str::from_utf8(&rest[..end]).ok()?, &rest[end + 1..]))
    }
}

/// The sizes of rows that are written, and the changes to give out.
#[derive(Debug, Default)]
pub struct Rows {
    sizes: BTreeMap<Bytes, u64>,
    bytes: u64,
}

impl Rows {
    /// A row that was there at the start.
    pub fn note(&mut self, key: &Bytes, value: &[u8]) {
        let size = ROW_BYTES + (key.len() + value.len()) as u64;
        self.bytes += size;
        self.bytes -= self.sizes.insert(key.clone(), size).unwrap_or_default();
    }

    /// Whether it was taken.
    #[must_use]
    pub fn put(&mut self, key: Bytes, value: Bytes, outputs: &mut VecDeque<Output>) -> bool {
        let size = ROW_BYTES + (key.len() + value.len()) as u64;
        let before = self.sizes.get(&key).copied().unwrap_or_default();
        let bytes = self.bytes - before + size;
        if key.len() > KEY_BYTES_MAX || value.len() > VALUE_BYTES_MAX || bytes > BYTES_MAX {
            return false;
        }
        self.bytes = bytes;
        self.sizes.insert(key.clone(), size);
        outputs.push_back(Output::PutRow { key, value });
        true
    }

    pub fn remove(&mut self, key: Bytes, outputs: &mut VecDeque<Output>) {
        if let Some(size) = self.sizes.remove(&key) {
            self.bytes -= size;
            outputs.push_back(Output::DropRow { key });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the store would refuse is not written, and what was there stays.
    #[test]
    fn rows_are_bounded() {
        let (mut rows, mut outputs) = (Rows::default(), VecDeque::new());
        let key = |n: u32| Kind::Guest.key("room@a.example", &n.to_be_bytes());
        let large = || Bytes::from(vec![0; VALUE_BYTES_MAX]);
        assert!(!rows.put(
            Kind::Guest.key(&"x".repeat(KEY_BYTES_MAX), b""),
            Bytes::new(),
            &mut outputs
        ));
        assert!(!rows.put(key(0), vec![0; VALUE_BYTES_MAX + 1].into(), &mut outputs));
        let taken = (0..100).filter(|&n| rows.put(key(n), large(), &mut outputs)).count();
        assert_eq!((taken, outputs.len()), (59, 59));
        // In place of another there is room.
        assert!(rows.put(key(0), large(), &mut outputs));
        rows.remove(key(1), &mut outputs);
        assert!(rows.put(key(99), large(), &mut outputs));
        rows.remove(key(1), &mut outputs);
        assert_eq!(outputs.len(), 62);
    }
}
