//! What one end has said lately, as both ends know it: a room's reflection of it is sent by reference.
//!
//! A room sends each message back to who wrote it, with another sender and an element or two more, but the same id, body and
//! payload. So whole casts that may be reflected are kept at both ends, and the one that reflects names pieces of them. Neither
//! end can know how far the other has come, save by acknowledgements: an entry that was acknowledged was read. Hence the rule:
//!
//! * who says keeps a text until [`AFTER_ACKED`] later ones, of those that are kept, are acknowledged, in the order in which
//!   acknowledgements stand in the stream;
//! * who has heard refers to nothing that is older than that, by the acknowledgements that it has written.
//!
//! Memory is bounded at either end by itself: who says marks what it keeps, and keeps nothing while it has no room; who has heard may
//! forget what it likes.

use std::collections::VecDeque;

use bytes::Bytes;
use memchr::memmem;

use crate::codec::{frame::Ack, position::Seq};

/// Reflections follow within moments; but where they wait for a thin link, others are said and acknowledged meanwhile.
const AFTER_ACKED: u64 = 64;
/// Texts kept: those [`AFTER_ACKED`], and what is said until the next acknowledgement comes, which it does after so many entries
/// ([`SessionConfig::ack_entries_max`]) and a round trip.
///
/// [`SessionConfig::ack_entries_max`]: crate::link::session::SessionConfig::ack_entries_max
const TEXTS_MAX: usize = 512;
/// Memory for them, at either end, with [`BESIDE_BYTES`] for each.
const TEXTS_BYTES_MAX: usize = 256 * 1024;
/// A text that is larger is not kept: finding its pieces takes time with the square of its length.
const TEXT_BYTES_MAX: usize = 2 * 1024;
const BESIDE_BYTES: usize = 96;
/// A reference takes four bytes, and what the compressor has seen before takes hardly more.
const PIECE_BYTES_MIN: usize = 16;
/// Pieces are looked for by so many bytes.
const PROBE_BYTES: usize = 8;

#[derive(Debug)]
struct Text {
    /// Counts the texts that were kept, from 1.
    order: u64,
    seq: Seq,
    text: Bytes,
    /// A piece of it.
    id: Option<Bytes>,
}

/// What one direction's casts have said: who writes them and who reads them each have one.
#[derive(Debug, Default)]
pub struct Said {
    texts: VecDeque<Text>,
    last: u64,
    /// The latest that was acknowledged.
    acked: u64,
    bytes: usize,
}

/// A piece of a text, from `offset` on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Piece {
    pub offset: usize,
    pub len: usize,
}

impl Said {
    /// Whether the one who says may keep this text.
    pub fn has_room_for(&self, text: &[u8]) -> bool {
        self.texts.len() < TEXTS_MAX
            && text.len() <= TEXT_BYTES_MAX
            && self.bytes + text.len() + BESIDE_BYTES <= TEXTS_BYTES_MAX
    }

    /// Keeps a text that was marked for it.
    pub fn keep(&mut self, seq: Seq, text: &Bytes) {
        self.last += 1;
        // Who says has asked before. Who has heard, and is without room, forgets what it could not yet acknowledge.
        while !self.texts.is_empty() && !self.has_room_for(text) {
            self.forget_first();
        }
        self.bytes += text.len() + BESIDE_BYTES;
        // Own memory: a piece of an entry would keep all of it alive.
        let text = Bytes::copy_from_slice(text);
        self.texts.push_back(Text {
            order: self.last,
            seq,
            id: stanza_id(&text).map(|id| text.slice_ref(id)),
            text,
        });
    }

    /// An acknowledgement was written by the end that has heard, or read by the end that said.
    pub fn handle_acked(&mut self, ack: &Ack) {
        let is_acked = |text: &&Text| text.seq <= ack.upto || ack.beyond.binary_search(&text.seq).is_ok();
        if let Some(newest) = self.texts.iter().rev().find(is_acked) {
            self.acked = self.acked.max(newest.order);
        }
        while self
            .texts
            .front()
            .is_some_and(|first| first.order + AFTER_ACKED <= self.acked)
        {
            self.forget_first();
        }
    }

    fn forget_first(&mut self) {
        if let Some(first) = self.texts.pop_front() {
            self.bytes -= first.text.len() + BESIDE_BYTES;
        }
    }

    /// The text with this number, if it is still here.
    pub fn get(&self, order: u64) -> Option<&Bytes> {
        let first = self.texts.front()?.order;
        let place = usize::try_from(order.checked_sub(first)?).ok()?;
        self.texts.get(place).map(|text| &text.text)
    }

    /// The latest text with the same id, and its number.
    pub fn find(&self, reflection: &[u8]) -> Option<(u64, Bytes)> {
        let id = stanza_id(reflection)?;
        let found = self.texts.iter().rev().find(|text| text.id.as_deref() == Some(id))?;
        Some((found.order, found.text.clone()))
    }
}

/// The piece of `text` that stands at the start of `wanted`, if it is long enough to be worth a reference.
pub fn piece_of(text: &[u8], wanted: &[u8]) -> Option<Piece> {
    let probe = wanted.get(..PROBE_BYTES)?;
    let common = |offset: usize| {
        let both = text[offset..].iter().zip(wanted);
        both.take_while(|(one, other)| one == other).count()
    };
    memmem::find_iter(text, probe)
        .map(|offset| Piece {
            offset,
            len: common(offset),
        })
        .max_by_key(|piece| piece.len)
        .filter(|piece| piece.len >= PIECE_BYTES_MIN)
}

/// The value of the first tag's `id` attribute, as it is written.
fn stanza_id(text: &[u8]) -> Option<&[u8]> {
    let tag = &text[..memchr::memchr(b'>', text)?];
    let value = &tag[memmem::find(tag, b" id=")? + 4..];
    let (quote, value) = value.split_first()?;
    let end = memchr::memchr(*quote, value)?;
    (end > 0).then_some(&value[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ack(upto: u64) -> Ack {
        Ack {
            upto: Seq(upto),
            ..Ack::default()
        }
    }

    fn said(numbers: std::ops::RangeInclusive<u64>) -> Said {
        let mut said = Said::default();
        for number in numbers {
            said.keep(Seq(number), &format!("<message id='{number}'/>").into());
        }
        said
    }

    /// What was acknowledged is kept until [`AFTER_ACKED`] more are, and what was not is kept in any case.
    #[test]
    fn keeps_what_may_be_referred_to() {
        let mut said = said(1..=200);
        said.handle_acked(&ack(0));
        assert_eq!(said.texts.len(), 200);
        said.handle_acked(&ack(AFTER_ACKED));
        assert!(said.get(1).is_some());
        said.handle_acked(&ack(AFTER_ACKED + 1));
        assert_eq!((said.get(1), said.texts.len()), (None, 199));
        assert_eq!(said.get(200).map(|text| &text[..]), Some(&b"<message id='200'/>"[..]));
        assert_eq!((said.get(0), said.get(201)), (None, None));
    }

    /// An acknowledgement beyond a gap shows that all before it were read, too.
    #[test]
    fn beyond_a_gap_counts() {
        let mut said = said(1..=100);
        said.handle_acked(&Ack {
            beyond: vec![Seq(70)],
            ..ack(2)
        });
        assert_eq!(said.get(6), None);
        assert!(said.get(7).is_some());
    }

    /// Whoever says too much at once makes us forget, and not take more memory.
    #[test]
    fn memory_is_bounded() {
        let mut said = Said::default();
        for number in 1..10_000 {
            said.keep(Seq(number), &vec![b'x'; number as usize % 3000].into());
            assert!(said.texts.len() <= TEXTS_MAX && said.bytes <= TEXTS_BYTES_MAX);
        }
        assert!(said.get(9_999).is_some());
    }

    /// The latest with the same id is found, whatever its quotes, and only ids of the stanza itself count.
    #[test]
    fn finds_by_id() {
        let mut said = Said::default();
        for (seq, text) in (1..).zip([
            "<message id='a'><x id='b'/></message>",
            "<message id=\"a\"/>",
            "<message id=''/>",
        ]) {
            said.keep(Seq(seq), &text.into());
        }
        let found = |text: &str| said.find(text.as_bytes()).map(|(order, _)| order);
        assert_eq!(found("<message from='r' id='a'/>"), Some(2));
        assert_eq!(found("<message id='b'/>"), None);
        assert_eq!(found("<message id=''/>"), None);
        assert_eq!(found("<message><x id='a'/></message>"), None);
        assert_eq!(found("<message id='a"), None);
    }

    /// The longest piece is taken, from where it starts in the one to where both differ.
    #[test]
    fn pieces_are_long() {
        let text = b"<body>the first words</body><x>the first words and more</x>";
        let piece = piece_of(text, b"the first words and then").unwrap();
        assert_eq!(&text[piece.offset..piece.offset + piece.len], b"the first words and ");
        assert_eq!(piece_of(text, b"the first!"), None);
        assert_eq!(piece_of(text, b"the"), None);
    }
}
