//! Link frames: what the two sidecars say to each other, and how little of it is written.
//!
//! ```text
//! link   = batch*
//! batch  = varint(len << 1 | compressed)  len bytes
//!          plain:       frame*
//!          compressed:  varint(ids_len)  ids  zstd block(s) of frame*
//!          early:       a plain one that begins with EARLY; what follows that is as in a compressed one
//! frame  = type …                                    numbers are varints; length-prefixed where a size is not known
//! ```
//!
//! A batch is framed by [`put_batch`] and [`BatchBuffer`]; its length is compared with the limit before memory is taken for it.
//!
//! Whole entries lean on state that both ends keep for the life of a connection and change in step:
//! * recent recipient sets, so that what goes to a hundred occupants costs as much as what goes to one;
//! * recent ids, and new ones as raw bytes that the compressor does not see (`ids`): what is random spoils its statistics. An id is
//!   a UUID, 32 hex digits, 24 characters of base64url (Prosody's archive) or 16 digits (ejabberd's archive: microseconds).
//!
//! Fragments never touch that state: they may be cut off and start again on another connection.
//!
//! An *early* batch is written before the peer's hello has been read, as if that agreed with ours in everything. Where it does not, the
//! peer passes such batches over, see [`Hello::takes_early_of`], and their writer begins anew.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::{Buf, Bytes, BytesMut};

use crate::codec::{
    entry::{Cast, ENTRY_BYTES_MAX, Entry, EntryError, RECIPIENT_BYTES_MAX, check_recipients},
    position::{Epoch, Received, Seq},
    varint::{ReadError, Reader, peek_varint, put_len, put_prefixed, put_varint, unzigzag, zigzag},
};

/// The version of everything in this file, [`crate::codec::entry`] and [`crate::codec::compress`].
pub const VERSION: u64 = 2;

/// Frames of one batch, before compression. It must hold the largest whole entry ([`SET_BYTES_MAX`] and a template).
pub const BATCH_INFLATED_MAX: usize = 192 * 1024;

/// Of which an acknowledgement (at most 256 runs of two numbers), pings and a goodbye may take this much.
const FRAMES_BESIDE_MAX: usize = 8 * 1024;

/// A batch on the wire: what does not compress grows by a few bytes per 128 KiB, and ids stand beside it.
pub const BATCH_BYTES_MAX: usize = BATCH_INFLATED_MAX + 64 * 1024;

/// Frames of all early batches of a connection, before compression, and so the largest entry in them: a few stanzas. They may turn out
/// to be with the peer already, which at 9600 bit/s may cost half a second, and not more.
pub const EARLY_BYTES_MAX: usize = 1024;

/// A recipient set larger than this is sent with its entry in fragments, and not remembered. About 3,000 recipients.
pub const SET_BYTES_MAX: usize = 128 * 1024;

/// Templates larger than this are never sent whole, whatever the fragment size.
pub const TEMPLATE_WHOLE_MAX: usize = 32 * 1024;

/// Recipient sets remembered: rooms and their variants (moderators, others) that are busy at the same time.
const SETS_MAX: usize = 64;
/// Memory for them, at either end: a peer cannot make us keep more.
const SETS_BYTES_MAX: usize = 1 << 20;
/// Single recipients remembered: who has just joined, who is asking things.
const SINGLES_MAX: usize = 128;
/// Differences are looked for against this many of the most recent sets, to bound the search.
const DIFF_SEARCH_MAX: usize = 16;
/// Ids remembered: a receipt or marker names a message of the last minutes.
const IDS_MAX: usize = 128;
/// `123e4567-e89b-12d3-a456-426614174000`
const UUID_TEXT_BYTES: usize = 36;
const UUID_BYTES: usize = 16;
const HEX_TEXT_BYTES: usize = 2 * UUID_BYTES;
/// `25w4IzgWt2H_KH1G4qhBuLiH`: six bits a character, so every text has its bytes and the other way round.
const TOKEN_TEXT_BYTES: usize = 24;
const TOKEN_BYTES: usize = 18;
/// `1795167641601034`: no leading zero, so every number of the right size has its text.
const STAMP_TEXT_BYTES: usize = 16;
const STAMPS: std::ops::Range<u64> = 1_000_000_000_000_000..10_000_000_000_000_000;

/// DNS names and site names of the configuration are shorter.
const SITE_BYTES_MAX: usize = 255;
/// Room for fields that later versions add.
const HELLO_BYTES_MAX: usize = 8 * 1024;

/// Frame types. Types from [`OPTIONAL`] on carry their length and are skipped by who does not know them.
mod frame_type {
    pub const CAST: u8 = 1;
    pub const VOID: u8 = 2;
    pub const FRAGMENT: u8 = 3;
    pub const ACK: u8 = 4;
    pub const PING: u8 = 5;
    pub const PONG: u8 = 6;
    pub const GOODBYE: u8 = 7;
    pub const HELLO: u8 = 8;
    /// Only as the first byte of a batch.
    pub const EARLY: u8 = 9;
    pub const OPTIONAL: u8 = 0x40;
}

/// Bytes with a meaning in packed text. None of them can stand in XML, so they are hardly ever escaped.
mod mark {
    pub const END: u8 = 0;
    /// Sixteen bytes of `ids` are a UUID that is to stand here.
    pub const NEW_UUID: u8 = 1;
    /// The next byte, less [`BIAS`], says how many new ids ago this one came.
    pub const KNOWN_ID: u8 = 2;
    /// Here the recipient's address goes.
    pub const TO: u8 = 3;
    /// The next byte, less [`BIAS`], is meant literally.
    pub const ESCAPE: u8 = 4;
    /// Eighteen bytes of `ids` are 24 characters of base64url.
    pub const NEW_TOKEN: u8 = 5;
    /// A number in `ids` is the step from the last 16 digits to these.
    pub const NEW_STAMP: u8 = 6;
    /// Sixteen bytes of `ids` are 32 hex digits.
    pub const NEW_HEX: u8 = 7;
    pub const LAST: u8 = NEW_HEX;
    pub const BIAS: u8 = 0x40;
}

/// An id that is cut out of the text.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Id {
    Uuid([u8; UUID_BYTES]),
    Hex([u8; UUID_BYTES]),
    Token([u8; TOKEN_BYTES]),
    Stamp(u64),
}

/// The first thing on a connection, in both directions at once.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Hello {
    pub version: u64,
    /// Bits that both must have before either relies on them. None are defined yet.
    pub capabilities: u64,
    /// Of the sender's store.
    pub epoch: Epoch,
    /// What the sender has stored of the receiver's entries.
    pub received: Received,
    /// The first entry that the sender still has, and the last that it has numbered so far; `first` is `last + 1` if it has none.
    pub first_unacked: Seq,
    pub last: Seq,
    /// For logs only; who it is was proven by TLS.
    pub site: Option<String>,
    /// Names the dictionary, see [`crate::codec::compress`]. Without agreement none is used, and nothing is compressed unless both
    /// name one.
    pub dictionary: u64,
    /// The largest encoded entry that the sender of this takes.
    pub entry_bytes_max: u64,
    /// How long the sender of this may keep an acknowledgement back.
    pub ack_delay_ms: u64,
}

impl Hello {
    /// Whether the sender of this reads the early batches of the sender of `other`. Both ends work it out from the two hellos.
    pub fn takes_early_of(&self, other: &Self) -> bool {
        self.dictionary == other.dictionary && self.entry_bytes_max >= EARLY_BYTES_MAX as u64
    }
}

/// Why one end closes in good order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reason {
    /// The process ends.
    Shutdown,
    /// Another connection of the same pair took over.
    Replaced,
    /// The other broke the protocol, as we see it; its log or ours says how.
    Protocol,
    /// The peer is not wanted (any more).
    Configuration,
    /// One that this version does not know.
    Other(u8),
}

impl Reason {
    fn code(self) -> u8 {
        match self {
            Self::Shutdown => 0,
            Self::Replaced => 1,
            Self::Protocol => 2,
            Self::Configuration => 3,
            Self::Other(code) => code,
        }
    }

    fn from_code(code: u8) -> Self {
        match code {
            0 => Self::Shutdown,
            1 => Self::Replaced,
            2 => Self::Protocol,
            3 => Self::Configuration,
            code => Self::Other(code),
        }
    }

    pub fn as_label(self) -> &'static str {
        match self {
            Self::Shutdown => "shutdown",
            Self::Replaced => "replaced",
            Self::Protocol => "protocol",
            Self::Configuration => "configuration",
            Self::Other(_) => "other",
        }
    }
}

/// Stored at the sender's end of this: everything up to `upto`, and these beyond it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Ack {
    pub upto: Seq,
    /// Ascending.
    pub beyond: Vec<Seq>,
    /// How long the newest of them has been there, so that the round trip can be told from the delay.
    pub delay_ms: u64,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Frame {
    Hello(Hello),
    /// An entry in one piece. `held_ms` is how long it has waited since it was accepted, in steps of [`HELD_STEP_MS`].
    Entry {
        seq: Seq,
        held_ms: u64,
        entry: Entry,
    },
    /// A piece of an encoded entry. The first carries `held_ms` and the total.
    Fragment {
        seq: Seq,
        part: Part,
        bytes: Bytes,
    },
    Ack(Ack),
    Ping(u64),
    Pong(u64),
    Goodbye(Reason),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Part {
    First { total: usize, held_ms: u64 },
    Next { offset: usize },
}

/// Times of waiting are for `<delay/>` (XEP-0203), which is for people: a tenth of a second will do and costs nothing
/// for what did not wait.
pub const HELD_STEP_MS: u64 = 100;

/// Where acknowledged numbers start; the state of [`Ack`] coding.
#[derive(Clone, Copy, Debug, Default)]
struct AckBase(Seq);

/// The state that whole entries lean on. The writer's and the reader's are equal after the same frames.
#[derive(Debug, Default)]
struct Memory {
    last_seq: i64,
    /// Most recent first.
    sets: Vec<RecipientSet>,
    sets_bytes: usize,
    singles: Vec<Bytes>,
    /// A ring; `ids_next` is where the next one goes.
    ids: Vec<Id>,
    ids_next: usize,
    last_stamp: u64,
}

#[derive(Debug)]
struct RecipientSet {
    recipients: Vec<Bytes>,
    bytes: usize,
}

/// What stands before a recipient set: `number << 2 | kind`.
mod set_kind {
    /// The set at place `number`.
    pub const KNOWN: u64 = 0;
    /// The single recipient at place `number`.
    pub const SINGLE: u64 = 1;
    /// A difference to the set at place `number`.
    pub const CHANGED: u64 = 2;
    /// `number` recipients in full.
    pub const FULL: u64 = 3;
}

impl Memory {
    fn remember(&mut self, recipients: Vec<Bytes>) {
        if let [only] = recipients.as_slice() {
            self.singles.truncate(SINGLES_MAX - 1);
            self.singles.insert(0, only.clone());
            return;
        }
        let bytes = set_bytes(&recipients);
        while self.sets.len() >= SETS_MAX || self.sets_bytes + bytes > SETS_BYTES_MAX {
            let Some(oldest) = self.sets.pop() else { break };
            self.sets_bytes -= oldest.bytes;
        }
        self.sets_bytes += bytes;
        self.sets.insert(0, RecipientSet { recipients, bytes });
    }

    fn known_id(&self, ago: usize) -> Option<&Id> {
        if ago >= self.ids.len() {
            return None;
        }
        self.ids.get((self.ids_next + IDS_MAX - 1 - ago) % IDS_MAX)
    }

    fn remember_id(&mut self, id: Id) {
        if let Id::Stamp(stamp) = id {
            self.last_stamp = stamp;
        }
        match self.ids.get_mut(self.ids_next) {
            Some(place) => *place = id,
            // The ring is filled from its start, so the next place is the end.
            None => self.ids.push(id),
        }
        self.ids_next = (self.ids_next + 1) % IDS_MAX;
    }
}

/// What an entry takes in a batch if nothing of it is known: each piece ends with a mark, and bytes that are marks are escaped.
fn packed_bytes_max(entry: &Entry) -> usize {
    let Entry::Cast(cast) = entry else { return 16 };
    let packed = |text: &Bytes| text.len() + 1 + text.iter().filter(|byte| **byte <= mark::LAST).count();
    32 + packed(&cast.template) + cast.recipients.iter().map(packed).sum::<usize>()
}

/// The memory a set takes, with what stands around each recipient.
fn set_bytes(recipients: &[Bytes]) -> usize {
    recipients.iter().map(|recipient| recipient.len() + 32).sum()
}

/// Own memory for a set: its recipients are pieces of entries, and would keep all of those alive.
fn compact(recipients: &[Bytes]) -> Vec<Bytes> {
    let mut all = BytesMut::with_capacity(recipients.iter().map(Bytes::len).sum());
    for recipient in recipients {
        all.extend_from_slice(recipient);
    }
    let mut all = all.freeze();
    recipients
        .iter()
        .map(|recipient| all.split_to(recipient.len()))
        .collect()
}

/// Writes the frames of the batch that is being built.
#[derive(Debug, Default)]
pub struct FrameWriter {
    memory: Memory,
    acked: AckBase,
    text: Vec<u8>,
    ids: Vec<u8>,
    /// Whether something is in the batch that is worth the compressor's attention.
    compressible: bool,
}

/// The frames of a batch, not yet compressed.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RawBatch {
    pub text: Vec<u8>,
    pub ids: Vec<u8>,
    pub compressible: bool,
}

impl FrameWriter {
    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    /// Bytes in the batch so far.
    pub fn bytes(&self) -> usize {
        self.text.len() + self.ids.len()
    }

    pub fn take(&mut self) -> RawBatch {
        RawBatch {
            text: std::mem::take(&mut self.text),
            ids: std::mem::take(&mut self.ids),
            compressible: std::mem::take(&mut self.compressible),
        }
    }

    /// Acknowledgements of this connection count from here.
    pub fn start_acks(&mut self, upto: Seq) {
        self.acked = AckBase(upto);
    }

    pub fn hello(&mut self, hello: &Hello) {
        let mut body = Vec::new();
        put_varint(&mut body, hello.version);
        put_varint(&mut body, hello.capabilities);
        put_varint(&mut body, hello.epoch.0);
        put_varint(&mut body, hello.received.epoch.0);
        put_varint(&mut body, hello.received.upto.0);
        put_beyond(&mut body, hello.received.upto, &hello.received.beyond);
        put_varint(&mut body, hello.first_unacked.0);
        put_varint(&mut body, hello.last.0);
        put_varint(&mut body, hello.dictionary);
        put_varint(&mut body, hello.entry_bytes_max);
        put_varint(&mut body, hello.ack_delay_ms);
        put_prefixed(&mut body, hello.site.as_deref().unwrap_or_default().as_bytes());
        self.text.push(frame_type::HELLO);
        put_prefixed(&mut self.text, &body);
    }

    /// Whether an entry may be sent in one piece. A template that is not small must not hold up others; the recipients are
    /// not counted if they are known, and once in full if not.
    pub fn fits_whole(&self, entry: &Entry, template_max: usize) -> bool {
        match entry {
            Entry::Void => true,
            Entry::Cast(cast) => {
                cast.template.len() <= template_max.min(TEMPLATE_WHOLE_MAX)
                    && set_bytes(&cast.recipients) <= SET_BYTES_MAX
                    && packed_bytes_max(entry) <= BATCH_INFLATED_MAX - FRAMES_BESIDE_MAX
            }
        }
    }

    /// Whether the batch has room for such an entry, at the most that it can take.
    pub fn has_room_for(&self, entry: &Entry) -> bool {
        self.text.len() + packed_bytes_max(entry) <= BATCH_INFLATED_MAX - FRAMES_BESIDE_MAX
    }

    /// Whether it may go early, when `gone` bytes of frames have gone so before this batch.
    pub fn has_early_room_for(&self, entry: &Entry, gone: usize) -> bool {
        let fits = match entry {
            Entry::Void => true,
            Entry::Cast(cast) => cast.encoded_bytes() <= EARLY_BYTES_MAX,
        };
        fits && gone + self.bytes() + packed_bytes_max(entry) <= EARLY_BYTES_MAX
    }

    /// Whether the batch has room for a fragment.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.text.len() + bytes + 40 <= BATCH_INFLATED_MAX - FRAMES_BESIDE_MAX
    }

    pub fn entry(&mut self, seq: Seq, held_ms: u64, entry: &Entry) {
        self.compressible = true;
        self.text.push(match entry {
            Entry::Cast(_) => frame_type::CAST,
            Entry::Void => frame_type::VOID,
        });
        let number = seq.0 as i64;
        // The usual step, to the next number, is 0.
        put_varint(
            &mut self.text,
            zigzag(number.wrapping_sub(self.memory.last_seq).wrapping_sub(1)),
        );
        self.memory.last_seq = number;
        if let Entry::Cast(cast) = entry {
            put_varint(&mut self.text, held_ms / HELD_STEP_MS);
            self.recipients(&cast.recipients);
            self.pack(&cast.template, Some(cast.to_at as usize));
        }
    }

    pub fn fragment(&mut self, seq: Seq, part: Part, bytes: &[u8]) {
        self.compressible = true;
        self.text.push(frame_type::FRAGMENT);
        put_varint(&mut self.text, seq.0);
        match part {
            Part::First { total, held_ms } => {
                put_len(&mut self.text, 0);
                put_len(&mut self.text, total);
                put_varint(&mut self.text, held_ms / HELD_STEP_MS);
            }
            Part::Next { offset } => put_len(&mut self.text, offset),
        }
        put_prefixed(&mut self.text, bytes);
    }

    pub fn ack(&mut self, ack: &Ack) {
        self.text.push(frame_type::ACK);
        put_varint(&mut self.text, ack.upto.0.saturating_sub(self.acked.0.0));
        put_varint(&mut self.text, ack.delay_ms);
        put_beyond(&mut self.text, ack.upto, &ack.beyond);
        self.acked = AckBase(ack.upto);
    }

    pub fn ping(&mut self, number: u64) {
        self.text.push(frame_type::PING);
        put_varint(&mut self.text, number);
    }

    pub fn pong(&mut self, number: u64) {
        self.text.push(frame_type::PONG);
        put_varint(&mut self.text, number);
    }

    pub fn goodbye(&mut self, reason: Reason) {
        self.text.push(frame_type::GOODBYE);
        self.text.push(reason.code());
    }

    fn recipients(&mut self, recipients: &[Bytes]) {
        if let [only] = recipients
            && let Some(place) = self.memory.singles.iter().position(|known| known == only)
        {
            put_varint(&mut self.text, (place as u64) << 2 | set_kind::SINGLE);
            self.memory.singles[..=place].rotate_right(1);
            return;
        }
        if let Some(place) = self.memory.sets.iter().position(|known| known.recipients == recipients) {
            put_varint(&mut self.text, (place as u64) << 2 | set_kind::KNOWN);
            self.memory.sets[..=place].rotate_right(1);
            return;
        }
        let recipients = compact(recipients);
        match self.nearest(&recipients) {
            Some((place, difference)) => {
                put_varint(&mut self.text, (place as u64) << 2 | set_kind::CHANGED);
                put_gaps(&mut self.text, &difference.removed);
                put_len(&mut self.text, difference.added.len());
                for added in &difference.added {
                    self.pack(added, None);
                }
            }
            None => {
                put_varint(&mut self.text, (recipients.len() as u64) << 2 | set_kind::FULL);
                for recipient in &recipients {
                    self.pack(recipient, None);
                }
            }
        }
        self.memory.remember(recipients);
    }

    /// The recent set that least must be said about, if that is less than saying everything.
    fn nearest(&self, recipients: &[Bytes]) -> Option<(usize, Difference)> {
        if recipients.len() < 2 {
            return None;
        }
        let in_full = set_bytes(recipients);
        self.memory
            .sets
            .iter()
            .take(DIFF_SEARCH_MAX)
            .map(|known| Difference::between(&known.recipients, recipients))
            .enumerate()
            .min_by_key(|(_, difference)| difference.cost())
            .filter(|(_, difference)| difference.cost() < in_full / 2)
    }

    /// Text with its UUIDs cut out, the place of the address marked, and an end.
    fn pack(&mut self, text: &[u8], to_at: Option<usize>) {
        let mut at = 0;
        loop {
            if to_at == Some(at) {
                self.text.push(mark::TO);
            }
            let Some(byte) = text.get(at) else { break };
            // The mark cannot stand inside an id; then this one is left as it is.
            if let Some((id, len)) = id_at(text, at)
                && !to_at.is_some_and(|to_at| to_at > at && to_at < at + len)
            {
                self.pack_id(id);
                at += len;
                continue;
            }
            if *byte <= mark::LAST {
                self.text.extend_from_slice(&[mark::ESCAPE, *byte + mark::BIAS]);
            } else {
                self.text.push(*byte);
            }
            at += 1;
        }
        self.text.push(mark::END);
    }

    fn pack_id(&mut self, id: Id) {
        if let Some(ago) = (0..self.memory.ids.len()).find(|ago| self.memory.known_id(*ago) == Some(&id)) {
            self.text.extend_from_slice(&[mark::KNOWN_ID, mark::BIAS + ago as u8]);
            return;
        }
        match &id {
            Id::Uuid(bytes) => {
                self.text.push(mark::NEW_UUID);
                self.ids.extend_from_slice(bytes);
            }
            Id::Hex(bytes) => {
                self.text.push(mark::NEW_HEX);
                self.ids.extend_from_slice(bytes);
            }
            Id::Token(bytes) => {
                self.text.push(mark::NEW_TOKEN);
                self.ids.extend_from_slice(bytes);
            }
            Id::Stamp(stamp) => {
                self.text.push(mark::NEW_STAMP);
                // Both are below 10^16, so the difference fits.
                put_varint(&mut self.ids, zigzag(*stamp as i64 - self.memory.last_stamp as i64));
            }
        }
        self.memory.remember_id(id);
    }
}

/// What must be taken from one ascending list and put in to make another.
#[derive(Debug, Default)]
struct Difference {
    /// Places in the known list.
    removed: Vec<usize>,
    added: Vec<Bytes>,
}

impl Difference {
    fn between(known: &[Bytes], wanted: &[Bytes]) -> Self {
        let mut difference = Self::default();
        let mut wanted = wanted.iter().peekable();
        for (place, known) in known.iter().enumerate() {
            while let Some(new) = wanted.next_if(|wanted| *wanted < known) {
                difference.added.push(new.clone());
            }
            if wanted.next_if_eq(&known).is_none() {
                difference.removed.push(place);
            }
        }
        difference.added.extend(wanted.cloned());
        difference
    }

    fn cost(&self) -> usize {
        self.removed.len() + set_bytes(&self.added)
    }
}

/// Reads the frames of one batch after the other.
#[derive(Debug, Default)]
pub struct FrameReader {
    memory: Memory,
    acked: AckBase,
}

impl FrameReader {
    /// Acknowledgements of this connection count from here.
    pub fn start_acks(&mut self, upto: Seq) {
        self.acked = AckBase(upto);
    }

    /// The next frame, or `None` at the end of the batch. After an error the connection cannot go on.
    pub fn read(&mut self, text: &mut Reader<'_>, ids: &mut Reader<'_>) -> Result<Option<Frame>, FrameError> {
        loop {
            if text.is_empty() {
                if !ids.is_empty() {
                    return Err(ReadError::Trailing(ids.remaining()).into());
                }
                return Ok(None);
            }
            let frame = match text.byte()? {
                frame_type::CAST => self.read_cast(text, ids)?,
                frame_type::VOID => Frame::Entry {
                    seq: self.read_seq(text)?,
                    held_ms: 0,
                    entry: Entry::Void,
                },
                frame_type::FRAGMENT => read_fragment(text)?,
                frame_type::ACK => self.read_ack(text)?,
                frame_type::PING => Frame::Ping(text.varint()?),
                frame_type::PONG => Frame::Pong(text.varint()?),
                frame_type::GOODBYE => Frame::Goodbye(Reason::from_code(text.byte()?)),
                frame_type::HELLO => Frame::Hello(read_hello(text.prefixed(HELLO_BYTES_MAX)?)?),
                frame_type::OPTIONAL.. => {
                    text.prefixed(BATCH_INFLATED_MAX)?;
                    continue;
                }
                unknown => return Err(FrameError::UnknownType(unknown)),
            };
            return Ok(Some(frame));
        }
    }

    fn read_seq(&mut self, text: &mut Reader<'_>) -> Result<Seq, FrameError> {
        let step = unzigzag(text.varint()?);
        let number = step
            .checked_add(1)
            .and_then(|step| self.memory.last_seq.checked_add(step));
        let number = number.filter(|number| *number > 0).ok_or(FrameError::BadSeq)?;
        self.memory.last_seq = number;
        Ok(Seq(number as u64))
    }

    fn read_cast(&mut self, text: &mut Reader<'_>, ids: &mut Reader<'_>) -> Result<Frame, FrameError> {
        let seq = self.read_seq(text)?;
        let held_ms = text.varint()?.saturating_mul(HELD_STEP_MS);
        let recipients = self.read_recipients(text, ids)?;
        let (template, to_at) = self.unpack(text, ids, 2 * TEMPLATE_WHOLE_MAX)?;
        let to_at = to_at.ok_or(FrameError::NoPlaceForTo)? as u32;
        let entry = Entry::Cast(Cast {
            template,
            to_at,
            recipients,
        });
        Ok(Frame::Entry { seq, held_ms, entry })
    }

    fn read_recipients(&mut self, text: &mut Reader<'_>, ids: &mut Reader<'_>) -> Result<Vec<Bytes>, FrameError> {
        let tag = text.varint()?;
        let number = usize::try_from(tag >> 2).map_err(|_| FrameError::UnknownSet)?;
        let recipients = match tag & 3 {
            set_kind::SINGLE => {
                self.memory
                    .singles
                    .get_mut(..=number)
                    .ok_or(FrameError::UnknownSet)?
                    .rotate_right(1);
                return Ok(vec![self.memory.singles[0].clone()]);
            }
            set_kind::KNOWN => {
                self.memory
                    .sets
                    .get_mut(..=number)
                    .ok_or(FrameError::UnknownSet)?
                    .rotate_right(1);
                return Ok(self.memory.sets[0].recipients.clone());
            }
            set_kind::CHANGED => {
                let mut recipients = self
                    .memory
                    .sets
                    .get(number)
                    .ok_or(FrameError::UnknownSet)?
                    .recipients
                    .clone();
                remove_gaps(text, &mut recipients)?;
                let count = text.len_upto(text.remaining())?;
                for _ in 0..count {
                    recipients.push(self.unpack(text, ids, RECIPIENT_BYTES_MAX)?.0);
                }
                // Two ascending runs: this is a merge.
                recipients.sort();
                recipients
            }
            _full => {
                let mut recipients = Vec::new();
                if number > text.remaining() {
                    return Err(ReadError::Truncated.into());
                }
                for _ in 0..number {
                    recipients.push(self.unpack(text, ids, RECIPIENT_BYTES_MAX)?.0);
                }
                recipients
            }
        };
        check_recipients(&recipients)?;
        if set_bytes(&recipients) > SET_BYTES_MAX {
            return Err(FrameError::SetTooLarge);
        }
        self.memory.remember(compact(&recipients));
        Ok(recipients)
    }

    /// Undoes [`FrameWriter::pack`]: the text, and where the mark stood.
    fn unpack(
        &mut self,
        text: &mut Reader<'_>,
        ids: &mut Reader<'_>,
        bytes_max: usize,
    ) -> Result<(Bytes, Option<usize>), FrameError> {
        let mut out = Vec::new();
        let mut to_at = None;
        loop {
            match text.byte()? {
                mark::END => break,
                mark::TO if to_at.is_none() => to_at = Some(out.len()),
                mark::TO => return Err(FrameError::NoPlaceForTo),
                kind @ (mark::NEW_UUID | mark::NEW_HEX | mark::NEW_TOKEN | mark::NEW_STAMP) => {
                    let id = self.read_id(kind, ids)?;
                    self.memory.remember_id(id);
                    id.put_text(&mut out);
                }
                mark::KNOWN_ID => {
                    let ago = text.byte()?.checked_sub(mark::BIAS).ok_or(FrameError::UnknownId)?;
                    self.memory
                        .known_id(usize::from(ago))
                        .ok_or(FrameError::UnknownId)?
                        .put_text(&mut out);
                }
                mark::ESCAPE => {
                    let byte = text.byte()?.checked_sub(mark::BIAS).filter(|byte| *byte <= mark::LAST);
                    out.push(byte.ok_or(FrameError::BadEscape)?);
                }
                byte => out.push(byte),
            }
            if out.len() > bytes_max {
                return Err(ReadError::OverLimit {
                    value: out.len() as u64,
                    max: bytes_max as u64,
                }
                .into());
            }
        }
        Ok((out.into(), to_at))
    }

    fn read_id(&self, kind: u8, ids: &mut Reader<'_>) -> Result<Id, FrameError> {
        Ok(match kind {
            mark::NEW_UUID => Id::Uuid(read_array(ids)?),
            mark::NEW_HEX => Id::Hex(read_array(ids)?),
            mark::NEW_TOKEN => Id::Token(read_array(ids)?),
            _stamp => {
                let stamp = (self.memory.last_stamp as i64).checked_add(unzigzag(ids.varint()?));
                let stamp = stamp
                    .and_then(|stamp| u64::try_from(stamp).ok())
                    .filter(|stamp| STAMPS.contains(stamp));
                Id::Stamp(stamp.ok_or(FrameError::UnknownId)?)
            }
        })
    }

    fn read_ack(&mut self, text: &mut Reader<'_>) -> Result<Frame, FrameError> {
        let upto = self
            .acked
            .0
            .0
            .checked_add(text.varint()?)
            .map(Seq)
            .ok_or(FrameError::BadSeq)?;
        let delay_ms = text.varint()?;
        let beyond = read_beyond(text, upto)?;
        self.acked = AckBase(upto);
        Ok(Frame::Ack(Ack { upto, beyond, delay_ms }))
    }
}

fn read_fragment(text: &mut Reader<'_>) -> Result<Frame, FrameError> {
    let seq = Seq(text.varint()?);
    if seq.0 == 0 {
        return Err(FrameError::BadSeq);
    }
    let part = match text.len_upto(ENTRY_BYTES_MAX)? {
        0 => Part::First {
            total: text.len_upto(ENTRY_BYTES_MAX)?,
            held_ms: text.varint()?.saturating_mul(HELD_STEP_MS),
        },
        offset => Part::Next { offset },
    };
    let bytes = text.prefixed(BATCH_INFLATED_MAX)?;
    if bytes.is_empty() {
        return Err(FrameError::EmptyFragment);
    }
    Ok(Frame::Fragment {
        seq,
        part,
        bytes: Bytes::copy_from_slice(bytes),
    })
}

fn read_hello(body: &[u8]) -> Result<Hello, FrameError> {
    let mut body = Reader::new(body);
    let version = body.varint()?;
    if version != VERSION {
        // Nothing after the version is known to mean the same.
        return Err(FrameError::Version { theirs: version });
    }
    let capabilities = body.varint()?;
    let epoch = Epoch(body.varint()?);
    let received_epoch = Epoch(body.varint()?);
    let upto = Seq(body.varint()?);
    let beyond = read_beyond(&mut body, upto)?;
    Ok(Hello {
        version,
        capabilities,
        epoch,
        received: Received {
            epoch: received_epoch,
            upto,
            beyond,
        },
        first_unacked: Seq(body.varint()?),
        last: Seq(body.varint()?),
        dictionary: body.varint()?,
        entry_bytes_max: body.varint()?,
        ack_delay_ms: body.varint()?,
        site: read_site(body.prefixed(SITE_BYTES_MAX)?)?,
    })
}

fn read_site(bytes: &[u8]) -> Result<Option<String>, FrameError> {
    let site = str::from_utf8(bytes).map_err(|_| FrameError::BadSite)?;
    Ok((!site.is_empty()).then(|| site.to_owned()))
}

/// Ascending numbers beyond `upto` as runs: how many are missing before each, and how many follow each other.
fn put_beyond(out: &mut Vec<u8>, upto: Seq, beyond: &[Seq]) {
    let runs: Vec<&[Seq]> = beyond.chunk_by(|one, next| one.0 + 1 == next.0).collect();
    put_len(out, runs.len());
    let mut last = upto.0;
    for run in runs {
        // A run is never empty, and starts at upto + 2 at least: else `upto` would be higher.
        put_varint(out, run[0].0 - last - 1);
        put_len(out, run.len());
        last = run[run.len() - 1].0;
    }
}

fn read_beyond(text: &mut Reader<'_>, upto: Seq) -> Result<Vec<Seq>, FrameError> {
    let runs = text.len_upto(Received::BEYOND_MAX)?;
    let mut beyond = Vec::new();
    let mut last = upto.0;
    for _ in 0..runs {
        let gap = text.varint()?;
        let count = text.varint_upto((Received::BEYOND_MAX - beyond.len()) as u64)?;
        let first = last
            .checked_add(gap)
            .and_then(|last| last.checked_add(1))
            .ok_or(FrameError::BadSeq)?;
        last = first.checked_add(count).ok_or(FrameError::BadSeq)?.saturating_sub(1);
        if gap == 0 || count == 0 {
            return Err(FrameError::BadSeq);
        }
        beyond.extend((first..=last).map(Seq));
    }
    Ok(beyond)
}

/// Ascending places as the number of places left out before each.
fn put_gaps(out: &mut Vec<u8>, places: &[usize]) {
    put_len(out, places.len());
    let mut next = 0;
    for place in places {
        put_len(out, place - next);
        next = place + 1;
    }
}

fn remove_gaps(text: &mut Reader<'_>, list: &mut Vec<Bytes>) -> Result<(), FrameError> {
    let count = text.len_upto(list.len())?;
    let mut removed = vec![false; list.len()];
    let mut next = 0usize;
    for _ in 0..count {
        let place = next + text.len_upto(list.len())?;
        *removed.get_mut(place).ok_or(FrameError::UnknownSet)? = true;
        next = place + 1;
    }
    let mut removed = removed.iter();
    list.retain(|_| removed.next() == Some(&false));
    Ok(())
}

fn read_array<const N: usize>(ids: &mut Reader<'_>) -> Result<[u8; N], ReadError> {
    ids.take(N)?.try_into().map_err(|_| ReadError::Truncated)
}

/// The id that starts at `at`, and how long its text is.
fn id_at(text: &[u8], at: usize) -> Option<(Id, usize)> {
    if let Some(id) = uuid_at(text, at) {
        return Some((Id::Uuid(id), UUID_TEXT_BYTES));
    }
    // The others are looked for as whole attribute values only, else any long word might be taken for one.
    let quote = *text.get(at.checked_sub(1)?)?;
    if quote != b'\'' && quote != b'"' {
        return None;
    }
    let value = |len: usize| text.get(at..at + len).filter(|_| text.get(at + len) == Some(&quote));
    let hex = || {
        value(HEX_TEXT_BYTES)
            .and_then(|value| hex_bytes(value.iter()))
            .map(Id::Hex)
    };
    let token = || value(TOKEN_TEXT_BYTES).and_then(token_bytes).map(Id::Token);
    let stamp = || value(STAMP_TEXT_BYTES).and_then(stamp_number).map(Id::Stamp);
    let found = |id: Option<Id>, len| id.map(|id| (id, len));
    found(hex(), HEX_TEXT_BYTES)
        .or_else(|| found(token(), TOKEN_TEXT_BYTES))
        .or_else(|| found(stamp(), STAMP_TEXT_BYTES))
}

/// The UUID whose canonical lower-case text (RFC 9562 §4) starts at `at`.
fn uuid_at(text: &[u8], at: usize) -> Option<[u8; UUID_BYTES]> {
    const DASHES: [usize; 4] = [8, 13, 18, 23];
    let text = text.get(at..at + UUID_TEXT_BYTES)?;
    if DASHES.iter().any(|place| text[*place] != b'-') {
        return None;
    }
    hex_bytes(
        text.iter()
            .enumerate()
            .filter(|(place, _)| !DASHES.contains(place))
            .map(|(_, byte)| byte),
    )
}

/// Exactly 32 lower-case hex digits.
fn hex_bytes<'a>(digits: impl Iterator<Item = &'a u8>) -> Option<[u8; UUID_BYTES]> {
    let mut bytes = [0; UUID_BYTES];
    for (place, digit) in digits.enumerate() {
        let value = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        let byte = bytes.get_mut(place / 2)?;
        *byte = *byte << 4 | value;
    }
    Some(bytes)
}

fn token_bytes(text: &[u8]) -> Option<[u8; TOKEN_BYTES]> {
    // A random one has all three but in one of 100 cases; a name hardly ever has.
    let mixed = text.iter().any(u8::is_ascii_digit)
        && text.iter().any(u8::is_ascii_lowercase)
        && text.iter().any(u8::is_ascii_uppercase);
    if !mixed {
        return None;
    }
    let mut bytes = [0; TOKEN_BYTES];
    let len = URL_SAFE_NO_PAD.decode_slice(text, &mut bytes).ok()?;
    (len == TOKEN_BYTES).then_some(bytes)
}

fn stamp_number(text: &[u8]) -> Option<u64> {
    if !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = text
        .iter()
        .fold(0, |number, digit| number * 10 + u64::from(digit - b'0'));
    STAMPS.contains(&number).then_some(number)
}

impl Id {
    fn put_text(&self, out: &mut Vec<u8>) {
        match self {
            Self::Uuid(bytes) => put_hex(out, bytes, &[4, 6, 8, 10]),
            Self::Hex(bytes) => put_hex(out, bytes, &[]),
            Self::Token(bytes) => out.extend_from_slice(URL_SAFE_NO_PAD.encode(bytes).as_bytes()),
            Self::Stamp(number) => out.extend_from_slice(number.to_string().as_bytes()),
        }
    }
}

fn put_hex(out: &mut Vec<u8>, bytes: &[u8; UUID_BYTES], dashes_before: &[usize]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for (place, byte) in bytes.iter().enumerate() {
        if dashes_before.contains(&place) {
            out.push(b'-');
        }
        out.push(DIGITS[usize::from(byte >> 4)]);
        out.push(DIGITS[usize::from(byte & 15)]);
    }
}

/// The lines of a dictionary as the entries of a batch: what a compressor will see.
pub fn pack_dictionary(lines: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(lines.len());
    for line in lines.lines() {
        // The next number, not held, to the same recipients as the last.
        out.extend_from_slice(&[frame_type::CAST, 0, 0, 0]);
        let line = line
            .replace("{to}", "\u{3}")
            .replace("{id}", "\u{1}")
            .replace("{token}", "\u{5}")
            .replace("{stamp}", "\u{6}")
            .replace("{same}", "\u{2}@")
            .replace("{last}", "\u{2}A");
        out.extend_from_slice(line.as_bytes());
        out.push(mark::END);
    }
    out
}

/// How the body of a batch is to be read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BatchKind {
    /// Frames as they are.
    Plain,
    /// Ids, and frames as the agreed coder writes them.
    Compressed,
    /// The same, from before there was an agreement.
    Early,
}

/// Appends a batch as it goes over the wire.
pub fn put_batch(out: &mut Vec<u8>, kind: BatchKind, body: &[u8]) {
    let early = kind == BatchKind::Early;
    let len = body.len() + usize::from(early);
    put_varint(out, (len as u64) << 1 | u64::from(kind == BatchKind::Compressed));
    if early {
        out.push(frame_type::EARLY);
    }
    out.extend_from_slice(body);
}

/// Collects what arrives until a batch is whole.
#[derive(Debug, Default)]
pub struct BatchBuffer {
    bytes: BytesMut,
}

/// A batch as it came over the wire.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct WireBatch {
    pub kind: BatchKind,
    pub body: Bytes,
}

impl BatchBuffer {
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Bytes that wait here.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The next whole batch. A length over the limit is refused as soon as it is there.
    pub fn poll_batch(&mut self) -> Result<Option<WireBatch>, FrameError> {
        let Some((head, head_len)) = peek_varint(&self.bytes)? else {
            return Ok(None);
        };
        let len = head >> 1;
        if len > BATCH_BYTES_MAX as u64 {
            return Err(ReadError::OverLimit {
                value: len,
                max: BATCH_BYTES_MAX as u64,
            }
            .into());
        }
        let len = len as usize;
        if self.bytes.len() < head_len + len {
            return Ok(None);
        }
        self.bytes.advance(head_len);
        let mut body = self.bytes.split_to(len).freeze();
        let kind = if head & 1 == 1 {
            BatchKind::Compressed
        } else if body.first() == Some(&frame_type::EARLY) {
            body.advance(1);
            BatchKind::Early
        } else {
            BatchKind::Plain
        };
        Ok(Some(WireBatch { kind, body }))
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    #[error("frame of unknown type {0}")]
    UnknownType(u8),
    #[error("the peer speaks version {theirs} of the link protocol, we speak {VERSION}")]
    Version { theirs: u64 },
    #[error("a number that no entry can have")]
    BadSeq,
    #[error("a reference to recipients that were never named")]
    UnknownSet,
    #[error("more recipients than a whole entry may have")]
    SetTooLarge,
    #[error("a reference to a UUID that was never sent")]
    UnknownId,
    #[error("an escape that means nothing")]
    BadEscape,
    #[error("a template with no place, or two, for its address")]
    NoPlaceForTo,
    #[error("a fragment of nothing")]
    EmptyFragment,
    #[error("a site name that is not text")]
    BadSite,
    #[error(transparent)]
    Entry(#[from] EntryError),
    #[error(transparent)]
    Read(#[from] ReadError),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read_all(reader: &mut FrameReader, batch: &RawBatch) -> Result<Vec<Frame>, FrameError> {
        let (mut text, mut ids) = (Reader::new(&batch.text), Reader::new(&batch.ids));
        let mut frames = Vec::new();
        while let Some(frame) = reader.read(&mut text, &mut ids)? {
            frames.push(frame);
        }
        Ok(frames)
    }

    fn cast(template: impl Into<Vec<u8>>, to_at: usize, recipients: impl IntoIterator<Item = String>) -> Entry {
        let mut recipients: Vec<Bytes> = recipients
            .into_iter()
            .map(|one| Bytes::from(one.into_bytes()))
            .collect();
        recipients.sort();
        recipients.dedup();
        Entry::Cast(Cast {
            template: Bytes::from(template.into()),
            to_at: to_at as u32,
            recipients,
        })
    }

    fn occupants(numbers: std::ops::Range<usize>) -> impl Iterator<Item = String> {
        numbers.map(|n| format!(" to='user{n}@b.example/phone'"))
    }

    /// Templates made of what packing treats in a special way, and of everything else.
    fn templates() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..8),
            (0u8..4).prop_map(|n| format!("{n}23e4567-e89b-12d3-a456-426614174000").into_bytes()),
            Just(b"123E4567-e89b-12d3-a456-426614174000".to_vec()),
            Just(b"23e4567-e89b-12d3-a456-426614174000".to_vec()),
            any::<[u8; 16]>().prop_map(|id| {
                let mut out = Vec::new();
                Id::Uuid(id).put_text(&mut out);
                out
            }),
            any::<[u8; 18]>().prop_map(|id| format!("'{}'", URL_SAFE_NO_PAD.encode(id)).into_bytes()),
            (0u64..3).prop_map(|n| format!("\"179516764160103{n}\"").into_bytes()),
            (0u64..30_000_000_000_000_000).prop_map(|n| format!("'{n:016}'").into_bytes()),
            (0u64..3).prop_map(|n| format!("'{n:032x}'").into_bytes()),
        ];
        proptest::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        /// Whole entries come back as they were, whatever the memory of the connection has seen before.
        #[test]
        fn entries_round_trip(
            entries in proptest::collection::vec((templates(), any::<prop::sample::Index>(), 0usize..30, 1usize..8, 1u64..50), 1..30)
        ) {
            let (mut writer, mut reader) = (FrameWriter::default(), FrameReader::default());
            for (template, at, first, count, seq) in entries {
                let to_at = at.index(template.len() + 1);
                let entry = cast(template, to_at, occupants(first..first + count));
                writer.entry(Seq(seq), 1234, &entry);
                let frames = read_all(&mut reader, &writer.take()).unwrap();
                prop_assert_eq!(frames, vec![Frame::Entry { seq: Seq(seq), held_ms: 1200, entry }]);
            }
        }

        /// No bytes make the reader panic.
        #[test]
        fn any_bytes_are_safe(
            texts in proptest::collection::vec(proptest::collection::vec(0u8..70, 0..60), 1..8),
            ids in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut reader = FrameReader::default();
            for text in texts {
                let batch = RawBatch { text, ids: ids.clone(), compressible: true };
                let _ = read_all(&mut reader, &batch);
            }
        }

        /// Any positions survive a hello and an ack.
        #[test]
        fn positions_round_trip(upto in 0u64..1 << 60, steps in proptest::collection::vec(1u64..4, 0..50)) {
            let mut received = Received { epoch: Epoch(7), upto: Seq(upto), beyond: Vec::new() };
            let mut last = upto + 1;
            for step in steps {
                last += step;
                received.add(Seq(last));
            }
            let mut out = Vec::new();
            put_beyond(&mut out, received.upto, &received.beyond);
            prop_assert_eq!(read_beyond(&mut Reader::new(&out), received.upto), Ok(received.beyond));
        }
    }

    /// A second message to the same hundred occupants costs as much as one to a single occupant.
    #[test]
    fn a_known_set_costs_a_byte() {
        let size = |count: usize| {
            let mut writer = FrameWriter::default();
            writer.entry(Seq(1), 0, &cast("<message/>", 8, occupants(0..count)));
            writer.take();
            writer.entry(Seq(2), 0, &cast("<message/>", 8, occupants(0..count)));
            writer.take().text.len()
        };
        assert_eq!(size(1), size(100));
    }

    /// When one of a hundred leaves and another comes, only these two are named.
    #[test]
    fn a_changed_set_is_sent_as_a_difference() {
        let (mut writer, mut reader) = (FrameWriter::default(), FrameReader::default());
        writer.entry(Seq(1), 0, &cast("<message/>", 8, occupants(0..100)));
        read_all(&mut reader, &writer.take()).unwrap();
        let entry = cast("<message/>", 8, occupants(1..101));
        writer.entry(Seq(2), 0, &entry);
        let batch = writer.take();
        assert!(batch.text.len() < 60, "{}", batch.text.len());
        assert_eq!(
            read_all(&mut reader, &batch),
            Ok(vec![Frame::Entry {
                seq: Seq(2),
                held_ms: 0,
                entry
            }])
        );
    }

    /// A UUID costs sixteen bytes and a mark, and two bytes when it comes again.
    #[test]
    fn uuids_are_cut_out() {
        let mut writer = FrameWriter::default();
        let id = "123e4567-e89b-12d3-a456-426614174000";
        writer.entry(
            Seq(1),
            0,
            &cast(
                format!("<message id='{id}'><origin-id id='{id}'/></message>"),
                8,
                occupants(0..1),
            ),
        );
        let batch = writer.take();
        assert_eq!(batch.ids.len(), 16);
        assert!(!batch.text.windows(8).any(|text| text == b"123e4567"));
    }

    /// The ids of both servers' archives are cut out too, and cost what is random in them.
    #[test]
    fn archive_ids_are_cut_out() {
        let ids_bytes = |templates: &[&str]| {
            let mut writer = FrameWriter::default();
            for (seq, template) in (1..).zip(templates) {
                writer.entry(Seq(seq), 0, &cast(*template, 8, occupants(0..1)));
            }
            writer.take().ids.len()
        };
        assert_eq!(ids_bytes(&["<message id='25w4IzgWt2H_KH1G4qhBuLiH'/>"]), 18);
        assert_eq!(ids_bytes(&["<message id='0123456789abcdef0123456789abcdef'/>"]), 16);
        assert_eq!(
            ids_bytes(&["<message id='1795167641601034'/>", "<message id='1795167642703747'/>"]),
            8 + 4
        );
        assert_eq!(
            ids_bytes(&[
                "<message id='urn_xmpp_chat_markers_02'/>",
                "<message id=25w4IzgWt2H_KH1G4qhBuLiH/>"
            ]),
            0
        );
    }

    /// The tables stay within their bounds, and both ends forget the same.
    #[test]
    fn tables_are_bounded() {
        let (mut writer, mut reader) = (FrameWriter::default(), FrameReader::default());
        for round in 0..300 {
            let first = round * 13 % 97 * 1000;
            let entry = cast("<message/>", 8, occupants(first..first + 1 + round * 7 % 900));
            writer.entry(Seq(round as u64 + 1), 0, &entry);
            let frames = read_all(&mut reader, &writer.take()).unwrap();
            assert!(matches!(&frames[..], [Frame::Entry { entry: read, .. }] if *read == entry));
            for memory in [&writer.memory, &reader.memory] {
                assert!(memory.sets.len() <= SETS_MAX && memory.singles.len() <= SINGLES_MAX);
                assert!(memory.sets_bytes <= SETS_BYTES_MAX);
                assert_eq!(
                    memory.sets_bytes,
                    memory.sets.iter().map(|set| set.bytes).sum::<usize>()
                );
            }
        }
    }

    /// A hello of another version says so, whatever follows in it.
    #[test]
    fn another_version_is_named() {
        let mut text = vec![frame_type::HELLO];
        put_prefixed(&mut text, &[9, 1, 2, 3]);
        let batch = RawBatch {
            text,
            ..RawBatch::default()
        };
        assert_eq!(
            read_all(&mut FrameReader::default(), &batch),
            Err(FrameError::Version { theirs: 9 })
        );
    }

    /// A frame that may be ignored is ignored; one that may not is refused.
    #[test]
    fn optional_frames_are_skipped() {
        let batch = |text: &[u8]| RawBatch {
            text: text.to_vec(),
            ..RawBatch::default()
        };
        let mut reader = FrameReader::default();
        assert_eq!(
            read_all(&mut reader, &batch(&[0x41, 2, 9, 9, 5, 3])),
            Ok(vec![Frame::Ping(3)])
        );
        assert_eq!(
            read_all(&mut reader, &batch(&[0x3f])),
            Err(FrameError::UnknownType(0x3f))
        );
        assert_eq!(
            read_all(&mut reader, &batch(&[0x41, 9])),
            Err(ReadError::Truncated.into())
        );
    }

    /// A length over the limit is refused before its bytes are waited for.
    #[test]
    fn oversize_batch_is_refused_at_once() {
        let mut buffer = BatchBuffer::default();
        let mut head = Vec::new();
        put_varint(&mut head, (BATCH_BYTES_MAX as u64 + 1) << 1);
        buffer.push(&head);
        assert!(matches!(
            buffer.poll_batch(),
            Err(FrameError::Read(ReadError::OverLimit { .. }))
        ));
    }
}
