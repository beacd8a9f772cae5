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
//! * recent templates, and what came after what ([`crate::codec::templates`]), so that who enters a room is not told again what
//!   the one before was told: `known` names one, or says that the next ones are those that came here the last time; `on` is the same
//!   with the next number and the same recipients;
//! * what the other end has said lately ([`crate::codec::reflection`]), as far as it is marked as `kept`: the room's reflection of it
//!   names pieces of it;
//! * recent ids, and new ones as raw bytes that the compressor does not see (`ids`): what is random spoils its statistics. An id is
//!   a UUID, 32 hex digits, 24 characters of base64url (Prosody's archive), 16 digits (ejabberd's archive: microseconds) or up to
//!   20 (64 random bits, as ejabberd makes them);
//! * recent digests of 44 characters of base64, by a place that stays the same: Prosody's occupant-id stands in all that an occupant
//!   ever says.
//!
//! Fragments never touch that state: they may be cut off and start again on another connection.
//!
//! An *early* batch is written before the peer's hello has been read, as if that agreed with ours in everything. Where it does not, the
//! peer passes such batches over, see [`Hello::takes_early_of`], and their writer begins anew.

use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use bytes::{Buf, Bytes, BytesMut};

use crate::codec::{
    entry::{Cast, ENTRY_BYTES_MAX, Entry, EntryError, RECIPIENT_BYTES_MAX, check_recipients},
    position::{Epoch, Received, Seq},
    reflection::{Said, piece_of},
    templates::{Found, Guess, Number, Templates, Trail},
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
/// `16974662908758229783`: more digits than a stamp has, but 64 bits.
const NUMBER_TEXT_BYTES: std::ops::RangeInclusive<usize> = 17..=20;
/// `P0whYXi8MzHUSad9xAqSAyJVGTOHZkZwSUi4YdAza1o=`
const DIGEST_TEXT_BYTES: usize = 44;
const DIGEST_BYTES: usize = 32;
/// Digests remembered: occupants of the busy rooms.
const DIGESTS_MAX: usize = 1024;
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
    pub const KNOWN: u8 = 10;
    pub const ON: u8 = 11;
    pub const KEPT: u8 = 12;
    pub const MOVED: u8 = 13;
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
    /// The number of a text that the reader of this has said follows: pieces are of that one from here on.
    pub const REFLECTED: u8 = 8;
    /// Where a piece starts in that text and how long it is follow.
    pub const PIECE: u8 = 11;
    /// Eight bytes of `ids` are a number of 17 to 20 digits.
    pub const NEW_NUMBER: u8 = 12;
    /// 32 bytes of `ids` are a digest.
    pub const NEW_DIGEST: u8 = 14;
    /// The place of a digest follows.
    pub const KNOWN_DIGEST: u8 = 15;
    pub const BIAS: u8 = 0x40;

    /// Between them lie tab, line feed and carriage return, which do stand in XML.
    pub const fn is(byte: u8) -> bool {
        matches!(byte, END..=REFLECTED | PIECE | NEW_NUMBER | NEW_DIGEST | KNOWN_DIGEST)
    }
}

/// An id that is cut out of the text.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Id {
    Uuid([u8; UUID_BYTES]),
    Hex([u8; UUID_BYTES]),
    Token([u8; TOKEN_BYTES]),
    Stamp(u64),
    Number(u64),
}

type Digest = [u8; DIGEST_BYTES];

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
        /// Whether the sender keeps it to be referred to, see [`FrameWriter::handle_kept`].
        kept: bool,
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

/// Entries of one flow that wait about as long are said to wait as long as the first of them.
const HELD_SAME_STEPS: u64 = 5;

/// Entries that one `known` or `on` may stand for.
const RUN_MAX: u64 = 1024;

/// What stands in `known` and `on`: `number << 2 | kind`.
mod known_kind {
    use crate::codec::templates::Guess;

    /// The template of age `number`.
    pub const OF_AGE: u64 = 3;

    /// So many more templates as they came the last time, after the one that is guessed so.
    pub const fn guessed(guess: Guess) -> u64 {
        match guess {
            Guess::Next => 0,
            Guess::Inserted => 1,
            Guess::Replaced => 2,
        }
    }
}

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
    singles: Vec<Single>,
    templates: Templates,
    /// Of the last cast; its recipients stand first in their list.
    last_cast: Option<LastCast>,
    last_reflected: u64,
    /// A ring; `ids_next` is where the next one goes.
    ids: Vec<Id>,
    ids_next: usize,
    last_stamp: u64,
    /// Another ring.
    digests: Vec<Digest>,
    digests_next: usize,
}

#[derive(Debug)]
struct Single {
    recipient: Bytes,
    trail: Trail,
}

#[derive(Clone, Copy, Debug)]
struct LastCast {
    held_steps: u64,
    to_single: bool,
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
            let single = Single {
                recipient: only.clone(),
                trail: Trail::default(),
            };
            self.singles.insert(0, single);
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

    /// How far the recipient of the last cast has come, if it is a single one.
    fn trail(&self) -> Option<Trail> {
        self.last_cast.filter(|last| last.to_single)?;
        self.singles.first().map(|single| single.trail)
    }

    /// Notes the template of a cast whose recipients were noted.
    fn note_template(&mut self, known: Option<Number>, cast: &Cast) {
        let to_single = self.last_cast.is_some_and(|last| last.to_single);
        let trail = self
            .singles
            .first_mut()
            .filter(|_| to_single)
            .map(|single| &mut single.trail);
        match known {
            Some(number) => self.templates.again(number, trail),
            None => self.templates.add(&cast.template, cast.to_at, trail),
        }
    }

    fn last_recipients(&self) -> Option<Vec<Bytes>> {
        if self.last_cast?.to_single {
            self.singles.first().map(|single| vec![single.recipient.clone()])
        } else {
            self.sets.first().map(|set| set.recipients.clone())
        }
    }

    fn is_last(&self, recipients: &[Bytes]) -> bool {
        match (self.last_cast, recipients) {
            (Some(LastCast { to_single: true, .. }), [only]) => {
                self.singles.first().is_some_and(|single| single.recipient == only)
            }
            (Some(LastCast { to_single: false, .. }), recipients) => {
                self.sets.first().is_some_and(|set| set.recipients == recipients)
            }
            (Some(_) | None, _) => false,
        }
    }

    fn known_id(&self, ago: usize) -> Option<&Id> {
        if ago >= self.ids.len() {
            return None;
        }
        self.ids.get((self.ids_next + IDS_MAX - 1 - ago) % IDS_MAX)
    }

    fn remember_digest(&mut self, digest: Digest) {
        put_in_ring(&mut self.digests, &mut self.digests_next, DIGESTS_MAX, digest);
    }

    /// Remembers the ids that stand in a text from a place on, as if they had been written: a receipt or marker will name them.
    fn note_ids(&mut self, text: &[u8], mut at: usize) {
        while at < text.len() {
            let Some((id, len)) = id_at(text, at) else {
                at += 1;
                continue;
            };
            if !self.ids.contains(&id) {
                self.remember_id(id);
            }
            at += len;
        }
    }

    fn remember_id(&mut self, id: Id) {
        if let Id::Stamp(stamp) = id {
            self.last_stamp = stamp;
        }
        put_in_ring(&mut self.ids, &mut self.ids_next, IDS_MAX, id);
    }
}

/// Puts an item in a ring that is filled from its start, so that the next place is the end until it is full.
fn put_in_ring<T>(ring: &mut Vec<T>, next: &mut usize, places: usize, item: T) {
    match ring.get_mut(*next) {
        Some(place) => *place = item,
        None => ring.push(item),
    }
    *next = (*next + 1) % places;
}

/// What an entry takes in a batch if nothing of it is known: each piece ends with a mark, and bytes that are marks are escaped.
fn packed_bytes_max(entry: &Entry) -> usize {
    let Entry::Cast(cast) = entry else { return 16 };
    let packed = |text: &Bytes| text.len() + 1 + text.iter().filter(|byte| mark::is(**byte)).count();
    64 + packed(&cast.template) + cast.recipients.iter().map(packed).sum::<usize>()
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
    /// What the peer keeps of what it said, so that reflections may refer to it.
    heard: Said,
    run: Option<Run>,
    text: Vec<u8>,
    ids: Vec<u8>,
    /// Whether something is in the batch that is worth the compressor's attention.
    compressible: bool,
}

/// A frame that stands for as many templates as come as they came the last time, and can grow while it is the last of its batch.
#[derive(Clone, Copy, Debug)]
struct Run {
    guess: Guess,
    more: u64,
    /// Where this is written, and where the text ended then.
    at: usize,
    end: usize,
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
        self.run = None;
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

    /// An entry came that the peer keeps: what reflects it may refer to it.
    pub fn handle_kept(&mut self, seq: Seq, entry: &Entry) {
        if let Entry::Cast(cast) = entry {
            self.heard.keep(seq, &cast.template);
        }
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

    /// Puts a whole entry into the batch. `may_keep` says that a reflection of it may refer to it; gives whether the peer was told so.
    pub fn entry(&mut self, seq: Seq, held_ms: u64, entry: &Entry, may_keep: bool) -> bool {
        self.compressible = true;
        match entry {
            Entry::Cast(cast) => self.cast(seq, held_ms / HELD_STEP_MS, cast, may_keep),
            Entry::Void => {
                self.text.push(frame_type::VOID);
                self.seq(seq);
                false
            }
        }
    }

    fn seq(&mut self, seq: Seq) {
        let number = seq.0 as i64;
        // The usual step, to the next number, is 0.
        put_varint(
            &mut self.text,
            zigzag(number.wrapping_sub(self.memory.last_seq).wrapping_sub(1)),
        );
        self.memory.last_seq = number;
    }

    fn cast(&mut self, seq: Seq, held_steps: u64, cast: &Cast, may_keep: bool) -> bool {
        match self.memory.templates.find(&cast.template, cast.to_at) {
            Found::Whole(number) => self.known_cast(seq, held_steps, cast, number),
            Found::Moved(number) => {
                self.text.push(frame_type::MOVED);
                self.cast_head(seq, held_steps, &cast.recipients);
                put_varint(&mut self.text, self.memory.templates.age(number));
                put_varint(&mut self.text, u64::from(cast.to_at));
                self.memory.note_template(None, cast);
            }
            Found::Nothing => {
                self.text
                    .push(if may_keep { frame_type::KEPT } else { frame_type::CAST });
                self.cast_head(seq, held_steps, &cast.recipients);
                self.pack(&cast.template, Some(cast.to_at as usize));
                self.memory.note_template(None, cast);
                return may_keep;
            }
        }
        false
    }

    fn known_cast(&mut self, seq: Seq, held_steps: u64, cast: &Cast, number: Number) {
        let goes_on = seq.0 as i64 == self.memory.last_seq + 1
            && self
                .memory
                .last_cast
                .is_some_and(|last| last.held_steps.abs_diff(held_steps) < HELD_SAME_STEPS)
            && self.memory.is_last(&cast.recipients);
        if goes_on {
            self.memory.last_seq += 1;
            if !self.extend_run(number) {
                self.text.push(frame_type::ON);
                self.known(number);
            }
        } else {
            self.text.push(frame_type::KNOWN);
            self.cast_head(seq, held_steps, &cast.recipients);
            self.known(number);
        }
        self.memory.note_template(Some(number), cast);
    }

    fn cast_head(&mut self, seq: Seq, held_steps: u64, recipients: &[Bytes]) {
        self.seq(seq);
        put_varint(&mut self.text, held_steps);
        self.recipients(recipients);
        self.memory.last_cast = Some(LastCast {
            held_steps,
            to_single: recipients.len() == 1,
        });
    }

    /// Which template it is, for the recipients that were just written.
    fn known(&mut self, number: Number) {
        let guess = self.memory.trail().and_then(|trail| {
            Guess::ALL
                .into_iter()
                .find(|guess| self.memory.templates.guess(trail, *guess) == Some(number))
        });
        let at = self.text.len();
        match guess {
            Some(guess) => put_varint(&mut self.text, known_kind::guessed(guess)),
            None => put_varint(
                &mut self.text,
                self.memory.templates.age(number) << 2 | known_kind::OF_AGE,
            ),
        }
        self.run = guess.map(|guess| Run {
            guess,
            more: 0,
            at,
            end: self.text.len(),
        });
    }

    /// Lets the frame that was written last stand for one more, if it can.
    fn extend_run(&mut self, number: Number) -> bool {
        let Some(run) = &mut self.run else { return false };
        let comes_next = self
            .memory
            .trail()
            .and_then(|trail| self.memory.templates.guess(trail, Guess::Next))
            == Some(number);
        if !comes_next || run.end != self.text.len() || run.more + 1 >= RUN_MAX {
            return false;
        }
        run.more += 1;
        self.text.truncate(run.at);
        put_varint(&mut self.text, run.more << 2 | known_kind::guessed(run.guess));
        run.end = self.text.len();
        true
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
        self.heard.handle_acked(ack);
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
            && let Some(place) = self.memory.singles.iter().position(|known| known.recipient == only)
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
        // Only a template is ever the reflection of something.
        let reflected = to_at.and_then(|_| self.heard.find(text));
        let mut is_named = false;
        let mut at = 0;
        loop {
            if to_at == Some(at) {
                self.text.push(mark::TO);
            }
            let Some(byte) = text.get(at) else { break };
            if let Some((order, said)) = &reflected {
                // The mark cannot stand inside a piece.
                let end = to_at.filter(|to_at| *to_at > at).unwrap_or(text.len());
                if let Some(piece) = piece_of(said, &text[at..end]) {
                    if !std::mem::replace(&mut is_named, true) {
                        self.text.push(mark::REFLECTED);
                        let step = (*order as i64).wrapping_sub(self.memory.last_reflected as i64);
                        put_varint(&mut self.text, zigzag(step.wrapping_sub(1)));
                        self.memory.last_reflected = *order;
                    }
                    self.text.push(mark::PIECE);
                    put_len(&mut self.text, piece.offset);
                    put_len(&mut self.text, piece.len);
                    self.memory.note_ids(&text[..at + piece.len], at);
                    at += piece.len;
                    continue;
                }
            }
            if let Some(digest) = digest_at(text, at)
                && !to_at.is_some_and(|to_at| to_at > at && to_at < at + DIGEST_TEXT_BYTES)
            {
                self.pack_digest(digest);
                at += DIGEST_TEXT_BYTES;
                continue;
            }
            // The mark cannot stand inside an id; then this one is left as it is.
            if let Some((id, len)) = id_at(text, at)
                && !to_at.is_some_and(|to_at| to_at > at && to_at < at + len)
            {
                self.pack_id(id);
                at += len;
                continue;
            }
            if mark::is(*byte) {
                self.text.extend_from_slice(&[mark::ESCAPE, *byte + mark::BIAS]);
            } else {
                self.text.push(*byte);
            }
            at += 1;
        }
        self.text.push(mark::END);
    }

    fn pack_digest(&mut self, digest: Digest) {
        if let Some(place) = self.memory.digests.iter().position(|known| *known == digest) {
            self.text.push(mark::KNOWN_DIGEST);
            put_len(&mut self.text, place);
            return;
        }
        self.text.push(mark::NEW_DIGEST);
        self.ids.extend_from_slice(&digest);
        self.memory.remember_digest(digest);
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
            Id::Number(number) => {
                self.text.push(mark::NEW_NUMBER);
                self.ids.extend_from_slice(&number.to_le_bytes());
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
    /// What we keep of what we said: the peer's reflections may refer to it.
    said: Said,
    /// Entries that the last frame stands for beyond those that were given out.
    run: u64,
}

impl FrameReader {
    /// Acknowledgements of this connection count from here.
    pub fn start_acks(&mut self, upto: Seq) {
        self.acked = AckBase(upto);
    }

    /// Whether an entry of ours may be kept for the peer to refer to; see [`FrameWriter::entry`].
    pub fn may_keep(&self, entry: &Entry) -> bool {
        match entry {
            // What goes to many is a room's doing, and is not reflected.
            Entry::Cast(cast) => cast.recipients.len() == 1 && self.said.has_room_for(&cast.template),
            Entry::Void => false,
        }
    }

    /// Keeps an entry of ours, as the peer was told.
    pub fn keep(&mut self, seq: Seq, entry: &Entry) {
        if let Entry::Cast(cast) = entry {
            self.said.keep(seq, &cast.template);
        }
    }

    /// The next frame, or `None` at the end of the batch. After an error the connection cannot go on.
    pub fn read(&mut self, text: &mut Reader<'_>, ids: &mut Reader<'_>) -> Result<Option<Frame>, FrameError> {
        if self.run > 0 {
            self.run -= 1;
            let seq = self.next_seq(0)?;
            let number = self.guess(Guess::Next)?;
            return self.known_cast(seq, number).map(Some);
        }
        loop {
            if text.is_empty() {
                if !ids.is_empty() {
                    return Err(ReadError::Trailing(ids.remaining()).into());
                }
                return Ok(None);
            }
            let frame = match text.byte()? {
                frame_type::CAST => self.read_cast(text, ids, false)?,
                frame_type::KEPT => self.read_cast(text, ids, true)?,
                frame_type::MOVED => self.read_moved(text, ids)?,
                frame_type::KNOWN => {
                    let seq = self.read_cast_head(text, ids)?;
                    self.read_known(seq, text)?
                }
                frame_type::ON => {
                    let seq = self.next_seq(0)?;
                    self.read_known(seq, text)?
                }
                frame_type::VOID => Frame::Entry {
                    seq: self.read_seq(text)?,
                    held_ms: 0,
                    entry: Entry::Void,
                    kept: false,
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
        self.next_seq(unzigzag(text.varint()?))
    }

    /// The number so far from the one that follows the last.
    fn next_seq(&mut self, step: i64) -> Result<Seq, FrameError> {
        let number = step
            .checked_add(1)
            .and_then(|step| self.memory.last_seq.checked_add(step));
        let number = number.filter(|number| *number > 0).ok_or(FrameError::BadSeq)?;
        self.memory.last_seq = number;
        Ok(Seq(number as u64))
    }

    fn read_cast(&mut self, text: &mut Reader<'_>, ids: &mut Reader<'_>, kept: bool) -> Result<Frame, FrameError> {
        let seq = self.read_cast_head(text, ids)?;
        let (template, to_at) = self.unpack(text, ids, 2 * TEMPLATE_WHOLE_MAX)?;
        let to_at = to_at.ok_or(FrameError::NoPlaceForTo)? as u32;
        self.cast(seq, None, template, to_at, kept)
    }

    fn read_moved(&mut self, text: &mut Reader<'_>, ids: &mut Reader<'_>) -> Result<Frame, FrameError> {
        let seq = self.read_cast_head(text, ids)?;
        let number = self.memory.templates.of_age(text.varint()?);
        let known = number.and_then(|number| self.memory.templates.get(number));
        let (template, _) = known.ok_or(FrameError::UnknownTemplate)?;
        let template = template.clone();
        let to_at = text.len_upto(template.len())? as u32;
        self.cast(seq, None, template, to_at, false)
    }

    fn read_cast_head(&mut self, text: &mut Reader<'_>, ids: &mut Reader<'_>) -> Result<Seq, FrameError> {
        let seq = self.read_seq(text)?;
        let held_steps = text.varint()?;
        let to_single = self.read_recipients(text, ids)?;
        self.memory.last_cast = Some(LastCast { held_steps, to_single });
        Ok(seq)
    }

    fn read_known(&mut self, seq: Seq, text: &mut Reader<'_>) -> Result<Frame, FrameError> {
        const NEXT: u64 = known_kind::guessed(Guess::Next);
        const INSERTED: u64 = known_kind::guessed(Guess::Inserted);
        let tag = text.varint()?;
        let number = tag >> 2;
        let guess = match tag & 3 {
            known_kind::OF_AGE => {
                let number = self.memory.templates.of_age(number);
                return self.known_cast(seq, number.ok_or(FrameError::UnknownTemplate)?);
            }
            NEXT => Guess::Next,
            INSERTED => Guess::Inserted,
            _replaced => Guess::Replaced,
        };
        if number >= RUN_MAX {
            return Err(ReadError::OverLimit {
                value: number,
                max: RUN_MAX - 1,
            }
            .into());
        }
        self.run = number;
        let number = self.guess(guess)?;
        self.known_cast(seq, number)
    }

    fn guess(&self, guess: Guess) -> Result<Number, FrameError> {
        self.memory
            .trail()
            .and_then(|trail| self.memory.templates.guess(trail, guess))
            .ok_or(FrameError::UnknownTemplate)
    }

    /// The cast of a template that is known, to the recipients of the last cast.
    fn known_cast(&mut self, seq: Seq, number: Number) -> Result<Frame, FrameError> {
        let (template, to_at) = self.memory.templates.get(number).ok_or(FrameError::UnknownTemplate)?;
        let template = template.clone();
        self.cast(seq, Some(number), template, to_at, false)
    }

    /// The cast of a template to the recipients that stand first in their list.
    fn cast(
        &mut self,
        seq: Seq,
        known: Option<Number>,
        template: Bytes,
        to_at: u32,
        kept: bool,
    ) -> Result<Frame, FrameError> {
        let last = self.memory.last_cast.ok_or(FrameError::UnknownSet)?;
        let cast = Cast {
            template,
            to_at,
            recipients: self.memory.last_recipients().ok_or(FrameError::UnknownSet)?,
        };
        self.memory.note_template(known, &cast);
        Ok(Frame::Entry {
            seq,
            held_ms: last.held_steps.saturating_mul(HELD_STEP_MS),
            entry: Entry::Cast(cast),
            kept,
        })
    }

    /// Puts the recipients first in their list, and gives whether it is a single one.
    fn read_recipients(&mut self, text: &mut Reader<'_>, ids: &mut Reader<'_>) -> Result<bool, FrameError> {
        let tag = text.varint()?;
        let number = usize::try_from(tag >> 2).map_err(|_| FrameError::UnknownSet)?;
        let recipients = match tag & 3 {
            set_kind::SINGLE => {
                self.memory
                    .singles
                    .get_mut(..=number)
                    .ok_or(FrameError::UnknownSet)?
                    .rotate_right(1);
                return Ok(true);
            }
            set_kind::KNOWN => {
                self.memory
                    .sets
                    .get_mut(..=number)
                    .ok_or(FrameError::UnknownSet)?
                    .rotate_right(1);
                return Ok(false);
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
        Ok(recipients.len() == 1)
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
        let mut reflected = None;
        loop {
            match text.byte()? {
                mark::END => break,
                mark::TO if to_at.is_none() => to_at = Some(out.len()),
                mark::TO => return Err(FrameError::NoPlaceForTo),
                kind @ (mark::NEW_UUID | mark::NEW_HEX | mark::NEW_TOKEN | mark::NEW_STAMP | mark::NEW_NUMBER) => {
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
                mark::NEW_DIGEST => {
                    let digest = read_array(ids)?;
                    self.memory.remember_digest(digest);
                    out.extend_from_slice(STANDARD.encode(digest).as_bytes());
                }
                mark::KNOWN_DIGEST => {
                    let place = text.len_upto(DIGESTS_MAX)?;
                    let digest = self.memory.digests.get(place).ok_or(FrameError::UnknownId)?;
                    out.extend_from_slice(STANDARD.encode(digest).as_bytes());
                }
                mark::REFLECTED => reflected = Some(self.read_reflected(text)?),
                mark::PIECE => {
                    let said = reflected.as_ref().ok_or(FrameError::UnknownSaid)?;
                    let offset = text.len_upto(said.len())?;
                    let len = text.len_upto(said.len() - offset)?;
                    let at = out.len();
                    out.extend_from_slice(&said[offset..offset + len]);
                    self.memory.note_ids(&out, at);
                }
                mark::ESCAPE => {
                    let byte = text.byte()?.checked_sub(mark::BIAS).filter(|byte| mark::is(*byte));
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

    fn read_reflected(&mut self, text: &mut Reader<'_>) -> Result<Bytes, FrameError> {
        let step = unzigzag(text.varint()?).wrapping_add(1);
        self.memory.last_reflected = (self.memory.last_reflected as i64).wrapping_add(step) as u64;
        self.said
            .get(self.memory.last_reflected)
            .cloned()
            .ok_or(FrameError::UnknownSaid)
    }

    fn read_id(&self, kind: u8, ids: &mut Reader<'_>) -> Result<Id, FrameError> {
        Ok(match kind {
            mark::NEW_UUID => Id::Uuid(read_array(ids)?),
            mark::NEW_HEX => Id::Hex(read_array(ids)?),
            mark::NEW_TOKEN => Id::Token(read_array(ids)?),
            mark::NEW_NUMBER => Id::Number(u64::from_le_bytes(read_array(ids)?)),
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
        let ack = Ack { upto, beyond, delay_ms };
        self.said.handle_acked(&ack);
        Ok(Frame::Ack(ack))
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
    let value = values_at(text, at)?;
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
        .or_else(|| {
            NUMBER_TEXT_BYTES
                .into_iter()
                .find_map(|len| found(value(len).and_then(number).map(Id::Number), len))
        })
}

/// The attribute value that starts at `at`, if it has a given length: what is not a UUID is looked for as a whole value only, else any
/// long word might be taken for an id.
fn values_at<'a>(text: &'a [u8], at: usize) -> Option<impl Fn(usize) -> Option<&'a [u8]>> {
    let quote = *text.get(at.checked_sub(1)?)?;
    let is_quote = quote == b'\'' || quote == b'"';
    is_quote.then_some(move |len: usize| text.get(at..at + len).filter(|_| text.get(at + len) == Some(&quote)))
}

fn digest_at(text: &[u8], at: usize) -> Option<Digest> {
    let value = values_at(text, at)?(DIGEST_TEXT_BYTES)?;
    // The decoder wants room for the padding, too.
    let mut bytes = [0; DIGEST_BYTES + 1];
    // Only canonical text is decoded, so it comes back the same.
    let len = STANDARD.decode_slice(value, &mut bytes).ok()?;
    bytes[..len].try_into().ok()
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

fn number(text: &[u8]) -> Option<u64> {
    if !text.iter().all(u8::is_ascii_digit) || text.first() == Some(&b'0') {
        return None;
    }
    text.iter().try_fold(0u64, |number, digit| {
        number.checked_mul(10)?.checked_add(u64::from(digit - b'0'))
    })
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
            Self::Stamp(number) | Self::Number(number) => out.extend_from_slice(number.to_string().as_bytes()),
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
            .replace("{digest}", "\u{e}")
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
    #[error("a reference to a template that is not known")]
    UnknownTemplate,
    #[error("a reference to what was not said, or long ago")]
    UnknownSaid,
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
mod tests;
