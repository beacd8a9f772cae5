//! Acknowledged delivery over one connection of the constrained link.
//!
//! A [`LinkSession`] lives as long as its connection. It tells the peer what is stored here, learns what is stored there, and
//! carries numbered entries both ways: small ones whole, large ones in fragments that others may overtake. It owns no
//! socket, no clock and no entry: the caller hands in bytes and the time, asks for a batch when the socket can take one, and
//! takes out what arrived.
//!
//! ```text
//!  ours ── hello ──▶      both hellos cross in the first flight; each names what its sender has stored
//!       ◀── hello ──      of the other's entries; the first entries may go along with ours, early
//!       ── entry, fragment, ack, ping, pong … ──▶
//!       ── goodbye ──▶
//! ```
//!
//! What it keeps true: an entry that the peer has is not sent again; one that arrives is given out once; an acknowledgement
//! means *stored*, never merely *arrived*; a peer that breaks the rules ends the connection, and memory for it is bounded.
//! Entries may be sent in any order (priorities overtake), as long as at most [`Received::BEYOND_MAX`] stand beyond a gap;
//! both ends count the same, so the sender knows when to wait.
//!
//! # Early entries
//!
//! What waits when a connection comes up need not wait for the peer's hello as well, a whole round trip. A little of it goes with
//! ours, from the first entry that is not acknowledged, as to a peer that stands where we think. If the peer has more, those
//! entries are dropped there like any that come twice. If it does not agree in what they lean on, it passes them over
//! ([`Hello::takes_early_of`]), and they are sent again. Which of them count both ends work out from the two hellos alone.
//!
//! The caller drains [`LinkSession::poll_output`] before it hands in more bytes: batches are opened as their contents are
//! taken, so a small batch that unfolds into much costs memory only as fast as it is wanted.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use bytes::{Bytes, BytesMut};

use crate::{
    codec::{
        compress::{Coder, CompressError, Compressor, Decompressor},
        entry::{ENTRY_BYTES_MAX, Entry, EntryError},
        frame::{
            Ack, BATCH_INFLATED_MAX, BatchBuffer, BatchKind, EARLY_BYTES_MAX, Frame, FrameError, FrameReader,
            FrameWriter, Hello, Part, Reason, WireBatch, put_batch,
        },
        position::{Added, Received, Seq},
        varint::{Reader, put_prefixed},
    },
    time::{Deadline, Mono, Now},
};

/// Entries that may be under way in fragments at once, at either end: with the largest entry, 8 MiB.
pub const FRAGMENTED_MAX: usize = 8;

/// Outputs that wait to be taken before the next frame is opened.
const OUTPUT_BYTES_MAX: usize = 256 * 1024;
/// What is said so soon after something has come takes along TCP's own acknowledgement of that, which waits for 40 ms. Later it
/// costs a packet more. Until then an answer may come that takes ours along too.
const ACK_RIDES_WITHIN: Duration = Duration::from_millis(25);
/// Moments of sending and arriving that are remembered to measure the round trip.
const LOG_MAX: usize = 256;

/// How one session behaves. The defaults are for a satellite link of some kbit/s.
#[derive(Clone, Debug)]
pub struct SessionConfig {
    /// How long an acknowledgement waits for something to ride on.
    ///
    /// Alone it costs some 130 bytes at IP level in both directions, as much as a chat line; 80 if TCP's acknowledgement of an entry
    /// rides on it in turn. So it goes with that when the last is nearly as old as this. Nothing waits for it but the peer's disk space.
    pub ack_delay: Duration,
    /// An acknowledgement goes out at once when this many entries …
    ///
    /// Who enters a room of a hundred occupants gets more than a hundred, which cross in a few bytes: an acknowledgement alone would cost
    /// more than all of them. At the usual 300 bytes of an entry this is `ack_bytes_max`.
    pub ack_entries_max: u32,
    /// … or bytes of entries have arrived since the last, so that a fast peer's spool can let go.
    pub ack_bytes_max: usize,
    /// A ping is sent when nothing was heard for this long; the time doubles while nothing else is said, up to
    /// `keepalive_max`. `None` for links where every byte counts: then only sending finds out that the peer is gone.
    pub keepalive: Option<Duration>,
    /// NATs and firewalls forget idle connections; most wait longer than this.
    pub keepalive_max: Duration,
    /// Silence beyond the peer's own `ack_delay`, while something is owed to us, after which the path is in doubt
    /// ([`Output::Quiet`]): time to try another connection beside this one. At least four round trips.
    pub quiet_after: Duration,
    /// The same, after which the peer is held to be gone ([`LinkError::PeerSilent`]). At least eight round trips.
    /// Longer than `quiet_after`, so that a queue in a modem does not look like an outage.
    pub dead_after: Duration,
    /// How long the peer's hello may take.
    pub hello_timeout: Duration,
    /// Encoded entries whose template is larger than this go in pieces of this size. At 9600 bit/s a piece takes 0.9 s, which is
    /// what it can hold up others.
    pub fragment_bytes_max: usize,
    /// The round trip as measured while connecting, if it was.
    pub rtt: Option<Duration>,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self {
            ack_delay: Duration::from_secs(5),
            ack_entries_max: 256,
            ack_bytes_max: 64 * 1024,
            keepalive: Some(Duration::from_secs(60)),
            keepalive_max: Duration::from_secs(480),
            quiet_after: Duration::from_secs(3),
            dead_after: Duration::from_secs(15),
            hello_timeout: Duration::from_secs(60),
            fragment_bytes_max: 1024,
            rtt: None,
        }
    }
}

#[derive(Clone, Debug)]
pub enum Input {
    Bytes(Bytes),
    /// What of the peer's entries is now on disk, and may be acknowledged.
    Stored(Received),
    /// The transport has seen the peer's machine take bytes, though the peer itself said nothing.
    Progress,
    Timeout,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Output {
    /// The peer is there. `received` is where its numbering now stands with us (another store may have begun, or its spool may
    /// start later than we thought); `missing` entries of the store we knew are gone from both ends, which is to be told.
    PeerHello {
        hello: Hello,
        received: Received,
        missing: u64,
    },
    /// An entry, encoded as the inbox keeps it. Each number comes once.
    Received { seq: Seq, held_ms: u64, entry: Bytes },
    /// What the peer has stored of ours.
    Acked(Received),
    /// Nothing was heard for longer than it should take.
    Quiet,
    /// Something was heard again after [`Output::Quiet`].
    Alive,
    /// The peer closes in good order.
    Goodbye(Reason),
}

/// What became of an entry that was offered to [`LinkSession::send`]. Only [`Sent::Whole`] changed anything.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Sent {
    /// It is in the batch.
    Whole,
    /// It is too large to go whole: use [`LinkSession::send_fragment`].
    NeedsFragments,
    /// The peer has it, or it has been sent on this connection.
    Known,
    /// The batch is full: take it with [`LinkSession::poll_transmit`].
    BatchFull,
    /// The peer's hello is awaited and this does not go early, a goodbye was said, or too much stands beyond a gap: an
    /// acknowledgement or the rest of a fragmented entry must come first.
    Blocked,
    /// Larger than the peer takes, or not a valid entry (see [`Cast::check`](crate::codec::entry::Cast::check)): it can never go.
    Refused,
}

/// Counters since the session began.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct SessionStats {
    pub batches_sent: u64,
    pub batches_received: u64,
    /// On the wire, batch headers included.
    pub bytes_sent: u64,
    pub bytes_received: u64,
    /// Frames before compression.
    pub frame_bytes_sent: u64,
    pub frame_bytes_received: u64,
    pub entries_sent: u64,
    pub entries_received: u64,
    pub fragments_sent: u64,
    pub fragments_received: u64,
    pub duplicates_received: u64,
    pub acks_sent: u64,
    /// Acknowledgements that found nothing to ride on.
    pub acks_sent_alone: u64,
    pub pings_sent: u64,
    /// Smoothed (RFC 6298 §2), application to application.
    pub rtt: Option<Duration>,
}

#[derive(Debug)]
pub struct LinkSession {
    config: SessionConfig,
    hello: Hello,
    /// Ours goes first, whatever of the peer's has come by then.
    hello_written: bool,
    state: State,
    writer: FrameWriter,
    reader: FrameReader,
    buffer: BatchBuffer,
    open: OpenBatch,
    outputs: VecDeque<Output>,
    output_bytes: usize,
    /// Given to [`LinkSession::poll_transmit`] once, whatever else happens.
    goodbye: Option<Reason>,
    inward: Inward,
    outward: Outward,
    early: Early,
    life: Life,
    stats: SessionStats,
    now: Now,
}

/// What has gone before the peer's hello was read.
#[derive(Debug, Default)]
struct Early {
    /// As if the peer's hello said the same as ours.
    compressor: Option<Compressor>,
    /// In the order in which the peer reads them.
    entries: Vec<Seq>,
    /// Frames, before compression.
    bytes: usize,
    /// Whether the peer's early batches are to be read.
    counts_of_peer: bool,
}

#[derive(Debug)]
enum State {
    /// The peer's hello is awaited.
    Greeting,
    Open {
        coder: Box<Coders>,
        peer: PeerLimits,
    },
    /// We said goodbye; what arrives still counts.
    Leaving {
        coder: Option<Box<Coders>>,
        peer: PeerLimits,
    },
    Failed(LinkError),
}

#[derive(Debug)]
struct Coders {
    compressor: Compressor,
    decompressor: Decompressor,
}

#[derive(Clone, Copy, Debug)]
struct PeerLimits {
    entry_bytes_max: usize,
    ack_delay: Duration,
}

impl PeerLimits {
    /// Before its hello: what every peer takes that takes early entries.
    const UNKNOWN: Self = Self {
        entry_bytes_max: EARLY_BYTES_MAX,
        ack_delay: Duration::ZERO,
    };
}

/// The batch whose frames are being taken out.
#[derive(Debug, Default)]
struct OpenBatch {
    text: Vec<u8>,
    text_at: usize,
    ids: Bytes,
    ids_at: usize,
    early: bool,
}

/// The peer's entries.
#[derive(Debug, Default)]
struct Inward {
    /// Given out by us, on disk or not.
    arrived: Received,
    stored: Received,
    /// What the last acknowledgement said.
    acked: Received,
    /// Entries and bytes since then.
    unacked_entries: u32,
    unacked_bytes: usize,
    /// When the next acknowledgement goes out alone.
    ack_at: Option<Mono>,
    /// When the last one went, or the session was opened.
    acked_at: Mono,
    partial: BTreeMap<Seq, Partial>,
    arrivals: VecDeque<(Seq, Mono)>,
}

#[derive(Debug)]
struct Partial {
    total: usize,
    held_ms: u64,
    bytes: BytesMut,
}

/// Our entries.
#[derive(Debug, Default)]
struct Outward {
    /// What the peer has or will have when all that was sent arrives: the same as its `arrived` then.
    sent: Received,
    acked: Received,
    /// Entries under way in fragments, and how far.
    partial: BTreeMap<Seq, usize>,
    /// In the batch that is being built, which bounds them.
    departing: Vec<Seq>,
    /// When what the peer has not acknowledged left.
    departures: VecDeque<(Seq, Mono)>,
}

/// Whether the peer is there.
#[derive(Debug)]
struct Life {
    heard_at: Mono,
    /// Since when the peer owes us something (an acknowledgement, a pong), if it does.
    owed_since: Option<Mono>,
    quiet: bool,
    ping_number: u64,
    /// The ping to be written with the next batch.
    ping_due: bool,
    ping_sent_at: Option<Mono>,
    pong_due: Option<u64>,
    keepalive: Option<Duration>,
    /// Of two ends with the same patience one waits longer, so that only the other asks.
    asks_second: bool,
}

impl LinkSession {
    pub fn new(config: SessionConfig, hello: Hello, now: Now) -> Self {
        let life = Life {
            heard_at: now.mono,
            owed_since: None,
            quiet: false,
            ping_number: 0,
            ping_due: false,
            ping_sent_at: None,
            pong_due: None,
            keepalive: config.keepalive,
            asks_second: false,
        };
        let inward = Inward {
            arrived: hello.received.clone(),
            ..Inward::default()
        };
        // Until the peer says that it has more.
        let outward = Outward {
            sent: Received {
                epoch: hello.epoch,
                upto: Seq(hello.first_unacked.0.saturating_sub(1)),
                beyond: Vec::new(),
            },
            ..Outward::default()
        };
        let stats = SessionStats {
            rtt: config.rtt,
            ..SessionStats::default()
        };
        Self {
            config,
            hello,
            hello_written: false,
            state: State::Greeting,
            writer: FrameWriter::default(),
            reader: FrameReader::default(),
            buffer: BatchBuffer::default(),
            open: OpenBatch::default(),
            outputs: VecDeque::new(),
            output_bytes: 0,
            goodbye: None,
            inward,
            outward,
            early: Early::default(),
            life,
            stats,
            now,
        }
    }

    pub fn stats(&self) -> SessionStats {
        self.stats
    }

    /// What has arrived of the peer's entries, on disk or not.
    pub fn arrived(&self) -> &Received {
        &self.inward.arrived
    }

    /// Whether the peer's hello has been read, and no goodbye was said.
    pub fn is_open(&self) -> bool {
        matches!(self.state, State::Open { .. })
    }

    /// Whether something that was sent is not acknowledged yet.
    pub fn has_unacked(&self) -> bool {
        self.outward.sent != self.outward.acked || !self.outward.partial.is_empty()
    }

    /// Entries that were sent and of which the peer has not said that it has them. One that is under way in parts counts.
    pub fn unacked_entries(&self) -> u64 {
        let count = |received: &Received| received.upto.0 + received.beyond.len() as u64;
        // All that is acknowledged was sent.
        let whole = count(&self.outward.sent).saturating_sub(count(&self.outward.acked));
        whole + self.outward.partial.len() as u64
    }

    /// After an error the session is over: drop the connection, and begin anew on the next.
    pub fn handle(&mut self, input: Input, now: Now) -> Result<(), LinkError> {
        self.now = now;
        if let State::Failed(error) = &self.state {
            return Err(error.clone());
        }
        let result = match input {
            Input::Bytes(bytes) => {
                self.stats.bytes_received += bytes.len() as u64;
                self.buffer.push(&bytes);
                self.heard();
                self.open_frames()
            }
            Input::Stored(stored) => self.on_stored(stored),
            Input::Progress => {
                self.heard();
                Ok(())
            }
            Input::Timeout => self.on_timeout(),
        };
        result.inspect_err(|error| self.fail(error.clone()))
    }

    pub fn poll_output(&mut self) -> Option<Output> {
        if self.outputs.is_empty() {
            self.output_bytes = 0;
            if !matches!(self.state, State::Failed(_))
                && let Err(error) = self.open_frames()
            {
                // Told by the next call of `handle`, which `poll_timeout` asks for at once.
                self.fail(error);
            }
        }
        self.outputs.pop_front()
    }

    /// When [`Input::Timeout`] is wanted.
    pub fn poll_timeout(&self) -> Option<Deadline> {
        let deadline = |at, why| Some(Deadline { at, why });
        if matches!(self.state, State::Failed(_)) {
            return deadline(self.now.mono, "link error");
        }
        let mut next = match self.inward.ack_at {
            // Once it is due, `wants_transmit` says so; there is nothing to wake up for.
            Some(at) if self.inward.ack_is_pending() && at > self.now.mono => deadline(at, "ack"),
            _ => None,
        };
        let silence = self.silence_since();
        if let Some(since) = silence {
            next = Deadline::earlier(next, deadline(since + self.dead_after(), "peer silent"));
            if !self.life.quiet {
                next = Deadline::earlier(next, deadline(since + self.quiet_after(), "peer quiet"));
            }
        }
        if let (Some(keepalive), None, true) = (self.life.keepalive, silence, self.is_open()) {
            next = Deadline::earlier(
                next,
                deadline(self.life.heard_at + self.life.idle_max(keepalive), "keepalive"),
            );
        }
        next
    }

    /// Offers a whole entry for the batch that is being built. `held` is how long it has waited since it was accepted.
    pub fn send(&mut self, seq: Seq, entry: &Entry, held: Duration) -> Sent {
        let peer = match self.may_send(seq) {
            Ok(peer) => peer,
            Err(refused) => return refused,
        };
        let early = matches!(self.state, State::Greeting);
        if early && !self.fits_early(entry) {
            return Sent::Blocked;
        }
        // The peer would cut the connection, again and again, for an entry that breaks the rules.
        if let Entry::Cast(cast) = entry
            && (cast.encoded_bytes() > peer.entry_bytes_max || cast.check().is_err())
        {
            return Sent::Refused;
        }
        if !self.writer.fits_whole(entry, self.config.fragment_bytes_max) {
            return Sent::NeedsFragments;
        }
        if !self.writer.has_room_for(entry) {
            return Sent::BatchFull;
        }
        let may_keep = self.is_open() && self.reader.may_keep(entry);
        if self.writer.entry(seq, millis(held), entry, may_keep) {
            self.reader.keep(seq, entry);
        }
        self.outward.sent.add(seq);
        if early {
            self.early.entries.push(seq);
        }
        self.departed(seq);
        self.stats.entries_sent += 1;
        Sent::Whole
    }

    /// Puts the next piece of an encoded entry into the batch: from `offset`, which is 0 or where the last piece ended. Gives
    /// how many bytes it took: 0 if none can go now. The entry has been sent when `offset` has reached its length.
    pub fn send_fragment(&mut self, seq: Seq, encoded: &Bytes, offset: usize, held: Duration) -> usize {
        let Ok(peer) = self.may_send(seq) else { return 0 };
        if matches!(self.state, State::Greeting) {
            return 0;
        }
        let rest = encoded.get(offset..).unwrap_or_default();
        let piece = &rest[..rest.len().min(self.config.fragment_bytes_max)];
        let begun = self.outward.partial.get(&seq).copied();
        // The lowest that is missing can always go on, whatever overtook it: it is what closes the gap. So one place is
        // kept for it.
        let lowest = self.outward.sent.upto.0 + 1 == seq.0;
        let others_max = if lowest { FRAGMENTED_MAX } else { FRAGMENTED_MAX - 1 };
        let completes = piece.len() == rest.len();
        let fits = encoded.len() <= peer.entry_bytes_max
            && begun.unwrap_or(0) == offset
            && (begun.is_some() || self.outward.partial.len() < others_max)
            && !(completes && self.outward.sent.would_add(seq) == Added::Full)
            && self.writer.has_room(piece.len());
        if !fits || piece.is_empty() {
            return 0;
        }
        let part = match offset {
            0 => Part::First {
                total: encoded.len(),
                held_ms: millis(held),
            },
            offset => Part::Next { offset },
        };
        self.writer.fragment(seq, part, piece);
        self.stats.fragments_sent += 1;
        if completes {
            self.outward.partial.remove(&seq);
            self.outward.sent.add(seq);
            self.departed(seq);
            self.stats.entries_sent += 1;
        } else {
            self.outward.partial.insert(seq, offset + piece.len());
        }
        piece.len()
    }

    /// Bytes in the batch that is being built, before compression: the caller decides when it is enough.
    pub fn batch_bytes(&self) -> usize {
        self.writer.bytes()
    }

    /// Ends our side in good order: the next batch says so, nothing is sent after it.
    pub fn goodbye(&mut self, reason: Reason) {
        self.state = match std::mem::replace(&mut self.state, State::Greeting) {
            State::Open { coder, peer } => State::Leaving {
                coder: Some(coder),
                peer,
            },
            State::Greeting => {
                // What was to go early has not gone.
                self.writer.take();
                State::Leaving {
                    coder: None,
                    peer: PeerLimits::UNKNOWN,
                }
            }
            state @ (State::Leaving { .. } | State::Failed(_)) => {
                self.state = state;
                return;
            }
        };
        self.goodbye = Some(reason);
    }

    /// Whether [`LinkSession::poll_transmit`] would give something: then wait until the socket can take it, offer entries to fill
    /// the batch, and take it.
    pub fn wants_transmit(&self, now: Now) -> bool {
        if self.goodbye.is_some() || !self.writer.is_empty() {
            return true;
        }
        match &self.state {
            State::Greeting => !self.hello_written,
            State::Open { .. } => {
                !self.hello_written
                    || self.life.ping_due
                    || self.life.pong_due.is_some()
                    || self.inward.ack_is_pending() && self.ack_is_due(now.mono)
            }
            State::Leaving { .. } | State::Failed(_) => false,
        }
    }

    /// Closes the batch and gives its bytes, with an acknowledgement if one is due or can ride along. `None` if there is
    /// nothing to say. To be asked when the socket can take the bytes, not before.
    pub fn poll_transmit(&mut self, now: Now) -> Option<Bytes> {
        self.now = now;
        self.outward.depart(now.mono);
        let mut wire = Vec::new();
        match &mut self.state {
            State::Greeting => self.put_hello(&mut wire),
            State::Open { .. } => {
                self.put_hello(&mut wire);
                self.write_beside();
            }
            State::Leaving { coder, .. } => {
                self.goodbye?;
                if coder.is_some() {
                    // What came early is acknowledged to who has heard nothing from us yet.
                    self.put_hello(&mut wire);
                    self.write_beside();
                }
            }
            State::Failed(_) => {}
        }
        if let Some(reason) = self.goodbye.take() {
            self.writer.goodbye(reason);
        }
        if !self.writer.is_empty()
            && let Err(error) = self.seal(&mut wire)
        {
            self.fail(error.into());
            return None;
        }
        self.stats.bytes_sent += wire.len() as u64;
        (!wire.is_empty()).then(|| wire.into())
    }

    /// Acknowledgement and pings, if they are due or can ride along.
    fn write_beside(&mut self) {
        let now = self.now.mono;
        if let Some(number) = self.life.pong_due.take() {
            self.writer.pong(number);
        }
        if std::mem::take(&mut self.life.ping_due) {
            self.writer.ping(self.life.ping_number);
            self.life.ping_sent_at = Some(now);
            self.stats.pings_sent += 1;
        }
        let alone = self.writer.is_empty();
        let due = self.ack_is_due(now);
        if self.inward.ack_is_pending() && (due || !alone || self.goodbye.is_some()) {
            let ack = self.inward.take_ack(now, self.config.ack_delay);
            self.writer.ack(&ack);
            self.stats.acks_sent += 1;
            self.stats.acks_sent_alone += u64::from(alone);
        }
        if self.life.owed_since.is_none() && (self.has_unacked() || self.life.ping_sent_at.is_some()) {
            self.life.owed_since = Some(now);
        }
    }

    /// In a batch of its own: what stands in the one that is being built is for who has read it.
    fn put_hello(&mut self, wire: &mut Vec<u8>) {
        if std::mem::replace(&mut self.hello_written, true) {
            return;
        }
        let mut writer = FrameWriter::default();
        writer.hello(&self.hello);
        let text = writer.take().text;
        put_batch(wire, BatchKind::Plain, &text);
        self.stats.batches_sent += 1;
        self.stats.frame_bytes_sent += text.len() as u64;
    }

    fn seal(&mut self, wire: &mut Vec<u8>) -> Result<(), CompressError> {
        let raw = self.writer.take();
        let raw_bytes = raw.text.len() + raw.ids.len();
        self.stats.batches_sent += 1;
        self.stats.frame_bytes_sent += raw_bytes as u64;
        let (kind, compressor) = match &mut self.state {
            State::Open { coder, .. } | State::Leaving { coder: Some(coder), .. } if raw.compressible => {
                (BatchKind::Compressed, &mut coder.compressor)
            }
            State::Greeting if raw.compressible => {
                self.early.bytes += raw_bytes;
                let compressor = match self.early.compressor.take() {
                    Some(compressor) => compressor,
                    None => Compressor::new(Coder::agreed(self.hello.dictionary, self.hello.dictionary))?,
                };
                (BatchKind::Early, self.early.compressor.insert(compressor))
            }
            State::Open { .. } | State::Leaving { .. } | State::Greeting | State::Failed(_) => {
                put_batch(wire, BatchKind::Plain, &raw.text);
                return Ok(());
            }
        };
        let mut body = Vec::with_capacity(raw_bytes + 16);
        put_prefixed(&mut body, &raw.ids);
        compressor.compress(&raw.text, &mut body)?;
        put_batch(wire, kind, &body);
        Ok(())
    }

    fn ack_is_due(&self, now: Mono) -> bool {
        self.inward.ack_at.is_some_and(|at| at <= now)
            || self.inward.unacked_entries >= self.config.ack_entries_max
            || self.inward.unacked_bytes >= self.config.ack_bytes_max
    }

    fn may_send(&self, seq: Seq) -> Result<PeerLimits, Sent> {
        let peer = match &self.state {
            State::Open { peer, .. } => peer,
            State::Greeting => &PeerLimits::UNKNOWN,
            State::Leaving { .. } | State::Failed(_) => return Err(Sent::Blocked),
        };
        if self.outward.partial.contains_key(&seq) {
            return Ok(*peer);
        }
        match self.outward.sent.would_add(seq) {
            Added::New => Ok(*peer),
            Added::Known => Err(Sent::Known),
            Added::Full => Err(Sent::Blocked),
        }
    }

    fn fits_early(&self, entry: &Entry) -> bool {
        let is_valid = match entry {
            Entry::Void => true,
            Entry::Cast(cast) => cast.check().is_ok(),
        };
        is_valid && self.writer.has_early_room_for(entry, self.early.bytes)
    }

    fn departed(&mut self, seq: Seq) {
        self.life.keepalive = self.config.keepalive;
        self.outward.departing.push(seq);
    }

    fn fail(&mut self, error: LinkError) {
        // A half-built batch must not go out: the peer is told why instead.
        self.writer.take();
        self.goodbye = error.close_reason();
        self.buffer = BatchBuffer::default();
        self.open = OpenBatch::default();
        self.inward.partial.clear();
        self.state = State::Failed(error);
    }

    fn put_output(&mut self, output: Output, bytes: usize) {
        self.output_bytes += bytes + size_of::<Output>();
        self.outputs.push_back(output);
    }

    /// Takes frames out of batches until enough has come out of them.
    fn open_frames(&mut self) -> Result<(), LinkError> {
        while self.output_bytes < OUTPUT_BYTES_MAX {
            match self.open.next_frame(&mut self.reader)? {
                Some(frame) => self.on_frame(frame)?,
                None => match self.buffer.poll_batch()? {
                    Some(batch) => self.open_batch(batch)?,
                    None => break,
                },
            }
        }
        Ok(())
    }

    fn open_batch(&mut self, batch: WireBatch) -> Result<(), LinkError> {
        self.stats.batches_received += 1;
        let early = batch.kind == BatchKind::Early;
        let (text, ids) = match (&mut self.state, batch.kind) {
            (_, BatchKind::Plain) => (batch.body.to_vec(), Bytes::new()),
            (State::Greeting, BatchKind::Compressed | BatchKind::Early) => return Err(LinkError::NotAHello),
            // We left before we knew the peer; what it says is of no use.
            (State::Leaving { coder: None, .. } | State::Failed(_), _) => return Ok(()),
            (State::Open { .. } | State::Leaving { .. }, BatchKind::Early) if !self.early.counts_of_peer => {
                return Ok(());
            }
            (
                State::Open { coder, .. } | State::Leaving { coder: Some(coder), .. },
                BatchKind::Compressed | BatchKind::Early,
            ) => {
                let mut reader = Reader::new(&batch.body);
                let ids = reader.prefixed(batch.body.len()).map_err(FrameError::from)?;
                let compressed = reader.take(reader.remaining()).map_err(FrameError::from)?;
                (
                    coder.decompressor.decompress(compressed, BATCH_INFLATED_MAX)?,
                    batch.body.slice_ref(ids),
                )
            }
        };
        self.stats.frame_bytes_received += (text.len() + ids.len()) as u64;
        self.open = OpenBatch {
            text,
            text_at: 0,
            ids,
            ids_at: 0,
            early,
        };
        Ok(())
    }

    fn on_frame(&mut self, frame: Frame) -> Result<(), LinkError> {
        match (&self.state, frame) {
            (State::Greeting, Frame::Hello(hello)) => self.on_hello(hello),
            (State::Greeting | State::Leaving { coder: None, .. }, Frame::Goodbye(reason)) => {
                self.on_goodbye(reason);
                Ok(())
            }
            (State::Greeting, _) => Err(LinkError::NotAHello),
            // We left before we knew the peer; what it says is of no use.
            (State::Leaving { coder: None, .. } | State::Failed(_), _) => Ok(()),
            (State::Open { .. } | State::Leaving { coder: Some(_), .. }, frame) => self.on_open_frame(frame),
        }
    }

    fn on_open_frame(&mut self, frame: Frame) -> Result<(), LinkError> {
        match frame {
            Frame::Hello(_) => return Err(LinkError::SecondHello),
            Frame::Entry {
                seq,
                held_ms,
                entry,
                kept,
            } => {
                if kept {
                    self.writer.handle_kept(seq, &entry);
                }
                return self.on_entry(seq, held_ms, entry.encode());
            }
            Frame::Fragment { seq, part, bytes } => return self.on_fragment(seq, part, bytes),
            Frame::Ack(ack) => return self.on_ack(ack),
            Frame::Ping(number) => {
                self.life.pong_due = Some(number);
                self.life.slow_down(&self.config);
            }
            Frame::Pong(number) => self.on_pong(number),
            Frame::Goodbye(reason) => self.on_goodbye(reason),
        }
        Ok(())
    }

    fn on_hello(&mut self, hello: Hello) -> Result<(), LinkError> {
        let ours = &self.hello;
        // RFC 1982 would allow more; a number over 2^62 cannot come about.
        if hello.first_unacked.0 == 0
            || hello.first_unacked.0 > hello.last.0.saturating_add(1)
            || hello.last.0 >> 62 != 0
        {
            return Err(LinkError::BadHello);
        }
        let last = hello.received.last();
        if hello.received.epoch == ours.epoch && last > ours.last {
            return Err(LinkError::PositionAhead {
                stored: last,
                last: ours.last,
            });
        }
        // Both ends work out both starting points the same way from the same two hellos, and what early entries count.
        let (acked, _) = starting_point(&hello.received, ours);
        let (arrived, missing) = starting_point(&ours.received, &hello);
        let early = std::mem::take(&mut self.early);
        let counts = hello.takes_early_of(ours);
        self.early.counts_of_peer = ours.takes_early_of(&hello);
        let coder = Coder::agreed(ours.dictionary, hello.dictionary);
        let compressor = early.compressor.filter(|_| counts);
        let coder = Coders {
            compressor: compressor.map_or_else(|| Compressor::new(coder), Ok)?,
            decompressor: Decompressor::new(coder)?,
        };
        let mut sent = acked.clone();
        self.outward
            .departures
            .retain(|(seq, _)| counts && !acked.contains(*seq));
        if counts {
            for seq in early.entries {
                // One too many beyond a gap counts at neither end.
                sent.add(seq);
            }
        } else {
            self.writer = FrameWriter::default();
            self.outward.departing.clear();
        }
        let peer = PeerLimits {
            entry_bytes_max: usize::try_from(hello.entry_bytes_max)
                .unwrap_or(usize::MAX)
                .min(ENTRY_BYTES_MAX),
            ack_delay: Duration::from_millis(hello.ack_delay_ms.min(ACK_DELAY_MS_MAX)),
        };
        self.life.asks_second = ours.epoch > hello.epoch;
        self.reader.start_acks(acked.upto);
        self.writer.start_acks(arrived.upto);
        self.outward.acked = acked.clone();
        self.outward.sent = sent;
        self.life.owed_since = self.has_unacked().then_some(self.now.mono);
        self.inward.stored = arrived.clone();
        self.inward.acked = arrived.clone();
        self.inward.arrived = arrived.clone();
        self.inward.acked_at = self.now.mono;
        self.state = State::Open {
            coder: Box::new(coder),
            peer,
        };
        self.put_output(
            Output::PeerHello {
                hello,
                received: arrived,
                missing,
            },
            0,
        );
        self.put_output(Output::Acked(acked), 0);
        Ok(())
    }

    fn on_entry(&mut self, seq: Seq, held_ms: u64, entry: Bytes) -> Result<(), LinkError> {
        if entry.len() as u64 > self.hello.entry_bytes_max {
            return Err(LinkError::TooLarge {
                seq,
                bytes: entry.len(),
            });
        }
        match self.inward.arrived.add(seq) {
            Added::New => {}
            Added::Known => {
                self.stats.duplicates_received += 1;
                return Ok(());
            }
            // Its sender did not know where we stand, and sends it again.
            Added::Full if self.open.early => return Ok(()),
            Added::Full => return Err(LinkError::TooFarAhead(seq)),
        }
        let now = self.now.mono;
        self.stats.entries_received += 1;
        self.life.keepalive = self.config.keepalive;
        self.inward.unacked_entries = self.inward.unacked_entries.saturating_add(1);
        self.inward.unacked_bytes = self.inward.unacked_bytes.saturating_add(entry.len());
        let ack_at = now + self.inward.ack_waits(now, self.config.ack_delay);
        self.inward.ack_at = Some(self.inward.ack_at.map_or(ack_at, |at| at.min(ack_at)));
        push_bounded(&mut self.inward.arrivals, (seq, now));
        let bytes = entry.len();
        self.put_output(Output::Received { seq, held_ms, entry }, bytes);
        Ok(())
    }

    fn on_fragment(&mut self, seq: Seq, part: Part, bytes: Bytes) -> Result<(), LinkError> {
        self.stats.fragments_received += 1;
        if self.inward.arrived.contains(seq) {
            self.stats.duplicates_received += 1;
            return Ok(());
        }
        let partial = match part {
            Part::First { total, held_ms } => {
                if total as u64 > self.hello.entry_bytes_max {
                    return Err(LinkError::TooLarge { seq, bytes: total });
                }
                if self.inward.partial.contains_key(&seq) {
                    return Err(LinkError::FragmentOutOfOrder(seq));
                }
                if self.inward.partial.len() >= FRAGMENTED_MAX {
                    return Err(LinkError::TooManyFragmented);
                }
                // Memory comes with the bytes, not with the claim.
                self.inward.partial.entry(seq).or_insert(Partial {
                    total,
                    held_ms,
                    bytes: BytesMut::new(),
                })
            }
            Part::Next { offset } => match self.inward.partial.get_mut(&seq) {
                Some(partial) if partial.bytes.len() == offset => partial,
                Some(_) | None => return Err(LinkError::FragmentOutOfOrder(seq)),
            },
        };
        if partial.bytes.len() + bytes.len() > partial.total {
            return Err(LinkError::FragmentBeyondTotal(seq));
        }
        partial.bytes.extend_from_slice(&bytes);
        if partial.bytes.len() < partial.total {
            return Ok(());
        }
        let held_ms = partial.held_ms;
        let entry = self
            .inward
            .partial
            .remove(&seq)
            .map(|partial| partial.bytes.freeze())
            .unwrap_or_default();
        Entry::decode(&entry)?;
        self.on_entry(seq, held_ms, entry)
    }

    fn on_ack(&mut self, ack: Ack) -> Result<(), LinkError> {
        let acked = Received {
            epoch: self.hello.epoch,
            upto: ack.upto,
            beyond: ack.beyond,
        };
        if !self.outward.sent.covers(&acked) {
            return Err(LinkError::AckedUnsent {
                acked: acked.last(),
                sent: self.outward.sent.last(),
            });
        }
        let newest = self
            .outward
            .departures
            .iter()
            .rposition(|(seq, _)| acked.contains(*seq));
        if let Some(newest) = newest {
            let (_, at) = self.outward.departures[newest];
            self.outward.departures.drain(..=newest);
            let sample = self
                .now
                .mono
                .since(at)
                .saturating_sub(Duration::from_millis(ack.delay_ms));
            self.on_rtt_sample(sample);
        }
        self.outward.acked = acked.clone();
        self.life.owed_since = (self.has_unacked() || self.life.ping_sent_at.is_some()).then_some(self.life.heard_at);
        self.put_output(Output::Acked(acked), 0);
        Ok(())
    }

    fn on_pong(&mut self, number: u64) {
        // A pong for an older ping says that the peer is there, which was noted when its bytes came.
        if number != self.life.ping_number {
            return;
        }
        if let Some(at) = self.life.ping_sent_at.take() {
            self.on_rtt_sample(self.now.mono.since(at));
        }
        if !self.has_unacked() {
            self.life.owed_since = None;
        }
    }

    fn on_goodbye(&mut self, reason: Reason) {
        self.put_output(Output::Goodbye(reason), 0);
    }

    fn on_rtt_sample(&mut self, sample: Duration) {
        self.stats.rtt = Some(match self.stats.rtt {
            Some(smoothed) => (smoothed * 7 + sample) / 8,
            None => sample,
        });
    }

    fn on_stored(&mut self, stored: Received) -> Result<(), LinkError> {
        if !self.inward.arrived.covers(&stored) {
            return Err(LinkError::StoredUnseen { stored: stored.last() });
        }
        self.inward.stored = stored;
        Ok(())
    }

    fn on_timeout(&mut self) -> Result<(), LinkError> {
        let now = self.now.mono;
        if let Some(since) = self.silence_since() {
            let silent = now.since(since);
            if silent >= self.dead_after() {
                return Err(LinkError::PeerSilent { for_ms: millis(silent) });
            }
            if silent >= self.quiet_after() && !self.life.quiet {
                self.life.quiet = true;
                // A peer whose disk is slow acknowledges late, but answers this.
                self.life.ask();
                self.put_output(Output::Quiet, 0);
            }
        } else if let Some(keepalive) = self.life.keepalive
            && self.is_open()
            && now.since(self.life.heard_at) >= self.life.idle_max(keepalive)
        {
            self.life.ask();
            self.life.slow_down(&self.config);
            self.life.owed_since = Some(now);
        }
        Ok(())
    }

    fn heard(&mut self) {
        self.life.heard_at = self.now.mono;
        if std::mem::take(&mut self.life.quiet) {
            self.put_output(Output::Alive, 0);
        }
    }

    /// Since when the peer should have said something and has not.
    fn silence_since(&self) -> Option<Mono> {
        match &self.state {
            State::Greeting => Some(self.life.heard_at),
            State::Open { .. } | State::Leaving { .. } => {
                self.life.owed_since.map(|since| since.max(self.life.heard_at))
            }
            State::Failed(_) => None,
        }
    }

    fn quiet_after(&self) -> Duration {
        self.patience(self.config.quiet_after, 4)
    }

    fn dead_after(&self) -> Duration {
        match &self.state {
            State::Greeting => self.config.hello_timeout,
            State::Open { .. } | State::Leaving { .. } | State::Failed(_) => self.patience(self.config.dead_after, 8),
        }
    }

    fn patience(&self, least: Duration, round_trips: u32) -> Duration {
        let ack_delay = match &self.state {
            State::Open { peer, .. } | State::Leaving { peer, .. } => peer.ack_delay,
            State::Greeting | State::Failed(_) => Duration::ZERO,
        };
        ack_delay + least.max(self.stats.rtt.unwrap_or_default() * round_trips)
    }
}

/// A peer that claims to keep acknowledgements back for longer would never be found dead.
const ACK_DELAY_MS_MAX: u64 = 120_000;

impl OpenBatch {
    fn next_frame(&mut self, reader: &mut FrameReader) -> Result<Option<Frame>, FrameError> {
        let mut text = Reader::new(&self.text[self.text_at..]);
        let mut ids = Reader::new(&self.ids[self.ids_at..]);
        let frame = reader.read(&mut text, &mut ids)?;
        self.text_at = self.text.len() - text.remaining();
        self.ids_at = self.ids.len() - ids.remaining();
        if frame.is_none() {
            *self = Self::default();
        }
        Ok(frame)
    }
}

impl Inward {
    fn ack_is_pending(&self) -> bool {
        self.stored != self.acked
    }

    /// For how long, when an entry has come.
    fn ack_waits(&self, now: Mono, ack_delay: Duration) -> Duration {
        // Nearly: entries that come at an even pace must not meet the one that goes alone.
        if now.since(self.acked_at) >= ack_delay * 4 / 5 {
            ack_delay.min(ACK_RIDES_WITHIN)
        } else {
            ack_delay
        }
    }

    fn take_ack(&mut self, now: Mono, ack_delay: Duration) -> Ack {
        let newest = self.arrivals.iter().rposition(|(seq, _)| self.stored.contains(*seq));
        let delay = newest
            .map(|newest| now.since(self.arrivals[newest].1))
            .unwrap_or_default();
        self.arrivals.drain(..newest.map_or(0, |newest| newest + 1));
        self.acked = self.stored.clone();
        self.acked_at = now;
        self.unacked_entries = 0;
        self.unacked_bytes = 0;
        // What has arrived but is not stored yet is acknowledged next time.
        self.ack_at = (self.stored != self.arrived).then_some(now + ack_delay);
        Ack {
            upto: self.stored.upto,
            beyond: self.stored.beyond.clone(),
            delay_ms: millis(delay),
        }
    }
}

impl Outward {
    /// The batch that was being built leaves now. Until here nobody has told us the time since something was last said or heard, which
    /// may be a minute ago.
    fn depart(&mut self, now: Mono) {
        for seq in self.departing.drain(..) {
            push_bounded(&mut self.departures, (seq, now));
        }
    }
}

impl Life {
    fn ask(&mut self) {
        if self.ping_sent_at.is_none() && !self.ping_due {
            self.ping_number += 1;
            self.ping_due = true;
        }
    }

    fn idle_max(&self, keepalive: Duration) -> Duration {
        if self.asks_second {
            keepalive + keepalive / 4
        } else {
            keepalive
        }
    }

    fn slow_down(&mut self, config: &SessionConfig) {
        self.keepalive = self
            .keepalive
            .map(|keepalive| (keepalive * 2).min(config.keepalive_max.max(keepalive)));
    }
}

/// Where a direction starts: what its receiver has stored, as far as it is of the sender's present store. And how many
/// entries of that store neither of them has any more.
fn starting_point(received: &Received, sender: &Hello) -> (Received, u64) {
    let before_first = Seq(sender.first_unacked.0.saturating_sub(1));
    if received.epoch != sender.epoch {
        return (
            Received {
                epoch: sender.epoch,
                upto: before_first,
                beyond: Vec::new(),
            },
            0,
        );
    }
    let gap = before_first.0.saturating_sub(received.upto.0);
    let known = received.beyond.iter().filter(|seq| **seq <= before_first).count() as u64;
    let mut start = received.clone();
    start.advance_to(before_first);
    (start, gap.saturating_sub(known))
}

fn push_bounded(log: &mut VecDeque<(Seq, Mono)>, item: (Seq, Mono)) {
    if log.len() >= LOG_MAX {
        log.pop_front();
    }
    log.push_back(item);
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Who must look into an error.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Blame {
    /// The other sidecar, or what stands between.
    Peer,
    /// This machine or its configuration.
    Local,
    /// This program.
    Us,
}

impl Blame {
    pub fn as_label(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::Local => "local",
            Self::Us => "us",
        }
    }
}

/// Why a connection cannot go on.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    #[error("the peer speaks version {theirs} of the link protocol, we speak {ours}: update the older side")]
    Version { theirs: u64, ours: u64 },
    #[error("the peer's first frame is not a hello")]
    NotAHello,
    #[error("a second hello")]
    SecondHello,
    #[error("a hello whose numbers cannot be")]
    BadHello,
    /// Our store has been replaced by an older copy of itself.
    #[error("the peer has stored entry {} of ours, but the last we know is {}: was an old copy of the spool restored?", stored.0, last.0)]
    PositionAhead { stored: Seq, last: Seq },
    /// The peer acknowledged an entry that was never sent.
    #[error("peer acknowledged {}, but the last one sent is {}", acked.0, sent.0)]
    AckedUnsent { acked: Seq, sent: Seq },
    #[error("too many entries stand beyond a gap: {} is one more", .0.0)]
    TooFarAhead(Seq),
    #[error("entry {} of {bytes} bytes is over the limit", seq.0)]
    TooLarge { seq: Seq, bytes: usize },
    #[error("a fragment of entry {} out of order", .0.0)]
    FragmentOutOfOrder(Seq),
    #[error("a fragment of entry {} beyond its total", .0.0)]
    FragmentBeyondTotal(Seq),
    #[error("too many entries in fragments at once")]
    TooManyFragmented,
    #[error("the peer was silent for {for_ms} ms")]
    PeerSilent { for_ms: u64 },
    /// The caller says that something is on disk that never came.
    #[error("entry {} is said to be stored, but has not arrived", stored.0)]
    StoredUnseen { stored: Seq },
    #[error(transparent)]
    Frame(FrameError),
    #[error(transparent)]
    Entry(#[from] EntryError),
    #[error(transparent)]
    Compress(#[from] CompressError),
}

impl From<FrameError> for LinkError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Version { theirs } => Self::Version {
                theirs,
                ours: crate::codec::frame::VERSION,
            },
            error => Self::Frame(error),
        }
    }
}

impl LinkError {
    pub fn blame(&self) -> Blame {
        match self {
            Self::PositionAhead { .. } | Self::Compress(CompressError::Memory) => Blame::Local,
            Self::StoredUnseen { .. } => Blame::Us,
            Self::Version { .. }
            | Self::NotAHello
            | Self::SecondHello
            | Self::BadHello
            | Self::AckedUnsent { .. }
            | Self::TooFarAhead(_)
            | Self::TooLarge { .. }
            | Self::FragmentOutOfOrder(_)
            | Self::FragmentBeyondTotal(_)
            | Self::TooManyFragmented
            | Self::PeerSilent { .. }
            | Self::Frame(_)
            | Self::Entry(_)
            | Self::Compress(_) => Blame::Peer,
        }
    }

    /// What we tell the other side, if it is there to hear it.
    pub fn close_reason(&self) -> Option<Reason> {
        match self.blame() {
            Blame::Peer => Some(Reason::Protocol),
            Blame::Local => Some(Reason::Configuration),
            Blame::Us => None,
        }
    }

    /// The value in metrics.
    pub fn as_label(&self) -> &'static str {
        match self {
            Self::Version { .. } => "version",
            Self::NotAHello => "not_a_hello",
            Self::SecondHello => "second_hello",
            Self::BadHello => "bad_hello",
            Self::PositionAhead { .. } => "position_ahead",
            Self::AckedUnsent { .. } => "acked_unsent",
            Self::TooFarAhead(_) => "too_far_ahead",
            Self::TooLarge { .. } => "too_large",
            Self::FragmentOutOfOrder(_) => "fragment_out_of_order",
            Self::FragmentBeyondTotal(_) => "fragment_beyond_total",
            Self::TooManyFragmented => "too_many_fragmented",
            Self::PeerSilent { .. } => "peer_silent",
            Self::StoredUnseen { .. } => "stored_unseen",
            Self::Frame(_) => "bad_frame",
            Self::Entry(_) => "bad_entry",
            Self::Compress(CompressError::Bomb { .. }) => "bomb",
            Self::Compress(_) => "bad_compression",
        }
    }
}

#[cfg(test)]
mod tests;
