//! Every metric there is: name, kind, help and labels, in one list.
//!
//! A metric is a constant with the labels in its type: `metrics::LINK_UP.set("shore", 1.0)`. Labels are peers (a handful, from
//! the configuration) and closed sets of words; never addresses, which have no bound and are personal data, and rooms only as many as the operator asks for. All
//! series exist from the start, at 0: a counter that is born at 1 hides its first event from `rate()`.
//! Without a recorder (in tests, in tools) every call does nothing.

use std::{
    fmt,
    marker::PhantomData,
    sync::OnceLock,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use metrics::{Key, KeyName, Level, Metadata, SharedString, Unit, with_recorder};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::queue::class::Class;

/// What is known about one metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metric {
    pub name: &'static str,
    pub kind: Kind,
    pub help: &'static str,
    /// The names of its labels, and the words each may have.
    pub labels: &'static [(&'static str, Words)],
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Counter,
    Gauge,
    /// With these upper bounds.
    Histogram(&'static [f64]),
}

/// What a label's value may be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Words {
    /// The name of a configured peer.
    Peers,
    /// The name of a configured rule: at most 100 at a time, and not many more over all reloads.
    Rules,
    /// The name of a room, of at most as many as are asked for (`admin.room_metrics`), and `other`.
    Rooms,
    /// One of these. Anything else is counted as the last of them.
    Closed(&'static [&'static str]),
}

/// One label, as a type: a counter cannot be given a leg where it wants a reason.
pub trait Label {
    const NAME: &'static str;
    const WORDS: Words;
    /// What the caller gives.
    type Value<'v>;

    fn text(value: Self::Value<'_>) -> SharedString;
}

/// The labels of one metric: none, one, or a tuple.
pub trait Labels {
    const ALL: &'static [(&'static str, Words)];
    type Values<'v>;

    fn texts(values: Self::Values<'_>) -> Vec<metrics::Label>;
}

/// Goes up only.
pub struct Counter<L>(Metric, PhantomData<fn(L)>);

/// Goes up and down.
pub struct Gauge<L>(Metric, PhantomData<fn(L)>);

/// How often, by size.
pub struct Histogram<L>(Metric, PhantomData<fn(L)>);

impl<L: Labels> Counter<L> {
    pub fn add(&self, labels: L::Values<'_>, by: u64) {
        self.handle(labels).increment(by);
    }

    pub fn increment(&self, labels: L::Values<'_>) {
        self.add(labels, 1);
    }

    /// Follows a count that is kept elsewhere. A smaller one than before changes nothing.
    pub fn follow(&self, labels: L::Values<'_>, count: u64) {
        self.handle(labels).absolute(count);
    }

    /// To be kept where it is counted often: it spares the look-up.
    pub fn handle(&self, labels: L::Values<'_>) -> metrics::Counter {
        with_recorder(|recorder| recorder.register_counter(&key::<L>(&self.0, labels), &METADATA))
    }
}

impl<L: Labels> Gauge<L> {
    pub fn set(&self, labels: L::Values<'_>, value: f64) {
        self.handle(labels).set(value);
    }

    pub fn add(&self, labels: L::Values<'_>, by: f64) {
        self.handle(labels).increment(by);
    }

    /// As [`Counter::handle`].
    pub fn handle(&self, labels: L::Values<'_>) -> metrics::Gauge {
        with_recorder(|recorder| recorder.register_gauge(&key::<L>(&self.0, labels), &METADATA))
    }
}

impl<L: Labels> Histogram<L> {
    pub fn record(&self, labels: L::Values<'_>, value: f64) {
        self.handle(labels).record(value);
    }

    pub fn record_period(&self, labels: L::Values<'_>, period: Duration) {
        self.record(labels, period.as_secs_f64());
    }

    /// As [`Counter::handle`].
    pub fn handle(&self, labels: L::Values<'_>) -> metrics::Histogram {
        with_recorder(|recorder| recorder.register_histogram(&key::<L>(&self.0, labels), &METADATA))
    }
}

macro_rules! metric_type {
    ($type:ident) => {
        impl<L> $type<L> {
            pub const fn metric(&self) -> &Metric {
                &self.0
            }
        }

        impl<L> fmt::Debug for $type<L> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.0.name)
            }
        }
    };
}

metric_type!(Counter);
metric_type!(Gauge);
metric_type!(Histogram);

static METADATA: Metadata<'static> = Metadata::new("narrows", Level::INFO, Some("narrows"));

fn key<L: Labels>(metric: &Metric, labels: L::Values<'_>) -> Key {
    Key::from_parts(metric.name, L::texts(labels))
}

/// A peer's name.
#[derive(Clone, Copy, Debug)]
pub struct Peer;

impl Label for Peer {
    const NAME: &'static str = "peer";
    const WORDS: Words = Words::Peers;
    type Value<'v> = &'v str;

    fn text(peer: &str) -> SharedString {
        SharedString::from_owned(peer.to_owned())
    }
}

/// A rule's name.
#[derive(Clone, Copy, Debug)]
pub struct Rule;

impl Label for Rule {
    const NAME: &'static str = "rule";
    const WORDS: Words = Words::Rules;
    type Value<'v> = &'v str;

    fn text(rule: &str) -> SharedString {
        SharedString::from_owned(rule.to_owned())
    }
}

/// A room's address, where the operator has asked for it.
#[derive(Clone, Copy, Debug)]
pub struct Room;

impl Label for Room {
    const NAME: &'static str = "room";
    const WORDS: Words = Words::Rooms;
    type Value<'v> = &'v str;

    fn text(room: &str) -> SharedString {
        SharedString::from_owned(room.to_owned())
    }
}

/// A label whose words are ours alone.
macro_rules! words {
    ($(#[$doc:meta])* $type:ident, $name:literal: $($(#[$word_doc:meta])* $variant:ident = $word:expr),+ $(,)?) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
        pub enum $type {
            $($(#[$word_doc])* $variant,)+
        }

        impl $type {
            pub const fn as_label(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)+
                }
            }
        }

        impl Label for $type {
            const NAME: &'static str = $name;
            const WORDS: Words = Words::Closed(&[$($word),+]);
            type Value<'v> = Self;

            fn text(value: Self) -> SharedString {
                SharedString::const_str(value.as_label())
            }
        }
    };
}

/// A label whose words are the `as_label()` of another module's error or reason. A word that is not listed here is counted
/// as the last one, so that the number of series stays what it is.
macro_rules! reasons {
    ($(#[$doc:meta])* $type:ident: $($word:literal),+ $(,)?) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub struct $type;

        impl Label for $type {
            const NAME: &'static str = "reason";
            const WORDS: Words = Words::Closed(&[$($word),+]);
            type Value<'v> = &'static str;

            fn text(value: &'static str) -> SharedString {
                const ALL: &[&str] = &[$($word),+];
                let listed = ALL.iter().find(|word| **word == value);
                SharedString::const_str(listed.unwrap_or(&ALL[ALL.len() - 1]))
            }
        }
    };
}

words! {
    /// Which way something crosses the link, as this side sees it.
    Direction, "direction": Sent = "sent", Received = "received",
}
words! {
    /// Where on its way down to the wire something is counted.
    Layer, "level":
    /// Our frames, before compression.
    Frame = "frame",
    /// What TLS was given: after compression.
    Tls = "tls",
    /// What TCP was given: with TLS's own share.
    Tcp = "tcp",
    /// What IP was given: with the headers of IP and TCP, and TCP's acknowledgements.
    Ip = "ip",
}
words! {
    /// Who opened the stream: our server (receiving) or we (initiating).
    Leg, "leg": Receiving = "receiving", Initiating = "initiating",
}
words! {
    LegState, "state": Negotiating = "negotiating", Ready = "ready",
}
words! {
    StanzaKind, "kind": Message = "message", Presence = "presence", Iq = "iq",
}
words! {
    /// Answered near the asker instead of beyond the link.
    NearAnswer, "question": Ping = "ping", Disco = "disco",
}
words! {
    /// `RoomState` of `mirror`.
    RoomState, "state": Joining = "joining", Live = "live", Detached = "detached", Resyncing = "resyncing",
}
words! {
    /// A message that was shown near by at once: it was shown, the room's copy of it was swallowed, the room refused it.
    EchoEvent, "event": Shown = "shown", Reflected = "reflected", RefusedByRoom = "refused",
}
words! {
    /// Why bytes of plain S2S did not cross.
    Mechanism, "mechanism":
    /// It was answered here.
    Mirror = "mirror",
    /// A rule has stripped or dropped it.
    Rules = "rules",
    /// Copies that differ in nothing but their recipient became one.
    Collapse = "collapse",
    /// It gave way to a later entry while it waited.
    Compaction = "compaction",
    /// The rest, from what is stored to what TLS is given.
    Compression = "compression",
}
words! {
    /// Before and after a compressor.
    Squeezed, "stage": Plain = "plain", Compressed = "compressed",
}
words! {
    /// Whether a rule did what it says, or would have (`observe: true`).
    RuleMode, "mode": Applied = "applied", Observed = "observed",
}
words! {
    AdminPath, "path": Page = "page", Metrics = "metrics", Healthz = "healthz", Readyz = "readyz", Status = "status", Trace = "trace", Reload = "reload", Other = "other",
}
words! {
    Version, "version": This = env!("CARGO_PKG_VERSION"),
}

reasons! {
    /// Why a connection between the sidecars ended: `LinkError::as_label` of `link`, `DialError::as_label` of `io::link`,
    /// and what their owner knows.
    LinkClosed: "drained", "replaced", "closed_by_peer", "io", "resolve", "connect", "handshake", "peer_silent", "version",
        "not_a_hello", "second_hello", "bad_hello", "position_ahead", "acked_unsent", "too_far_ahead", "too_large",
        "fragment_out_of_order", "fragment_beyond_total", "too_many_fragmented", "stored_unseen", "bad_frame", "bad_entry",
        "bomb", "bad_compression", "inbox_full", "other",
}
reasons! {
    /// Why a connection to the link's listener came to nothing.
    LinkRefused: "unknown_key", "handshake", "busy", "other",
}
reasons! {
    /// Why a stream with our server ended: `CloseReason::as_label` of `stream`.
    LegClosed: "closed_by_server", "idle", "drained", "eof", "done", "server_error", "our_error", "failed", "timeout", "io", "other",
}
words! {
    /// What our server said of a dialback key.
    Verified, "verdict": Valid = "valid", Invalid = "invalid", Error = "error",
}
words! {
    /// Why a stanza from our server was refused, or given up before it crossed. Its sender was told, where that does no harm.
    Refused, "reason": QueueFull = "queue_full", ClassFull = "class_full", Expired = "expired",
}
reasons! {
    /// What is wrong with a store: `Fault::as_label` of `io::store`.
    StoreFault: "full", "io", "permission", "corrupt", "not_a_store", "version", "locked", "orphan", "refused", "other",
}
reasons! {
    /// Why something was not carried on: `Drop::as_label` of `relay`. None of it should happen.
    Dropped: "malformed", "wrong_sender", "wrong_recipient", "refused_by_server", "over_server_limit", "over_peer_limit",
        "answer_queue_full", "other",
}

impl Label for Class {
    const NAME: &'static str = "class";
    const WORDS: Words = Words::Closed(&["control", "urgent", "message", "iq", "presence", "state", "bulk"]);
    type Value<'v> = Self;

    fn text(class: Self) -> SharedString {
        SharedString::const_str(class.as_label())
    }
}

impl Labels for () {
    const ALL: &'static [(&'static str, Words)] = &[];
    type Values<'v> = ();

    fn texts((): ()) -> Vec<metrics::Label> {
        Vec::new()
    }
}

impl<A: Label> Labels for (A,) {
    const ALL: &'static [(&'static str, Words)] = &[(A::NAME, A::WORDS)];
    type Values<'v> = A::Value<'v>;

    fn texts(a: A::Value<'_>) -> Vec<metrics::Label> {
        vec![label::<A>(a)]
    }
}

impl<A: Label, B: Label> Labels for (A, B) {
    const ALL: &'static [(&'static str, Words)] = &[(A::NAME, A::WORDS), (B::NAME, B::WORDS)];
    type Values<'v> = (A::Value<'v>, B::Value<'v>);

    fn texts((a, b): Self::Values<'_>) -> Vec<metrics::Label> {
        vec![label::<A>(a), label::<B>(b)]
    }
}

impl<A: Label, B: Label, C: Label> Labels for (A, B, C) {
    const ALL: &'static [(&'static str, Words)] = &[(A::NAME, A::WORDS), (B::NAME, B::WORDS), (C::NAME, C::WORDS)];
    type Values<'v> = (A::Value<'v>, B::Value<'v>, C::Value<'v>);

    fn texts((a, b, c): Self::Values<'_>) -> Vec<metrics::Label> {
        vec![label::<A>(a), label::<B>(b), label::<C>(c)]
    }
}

fn label<L: Label>(value: L::Value<'_>) -> metrics::Label {
    metrics::Label::new(L::NAME, L::text(value))
}

/// A commit is one flush of the disk: 50 µs on a good one, tens of milliseconds on a memory card.
const COMMIT_BOUNDS: &[f64] = &[0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0];

/// On a LAN a commit and a held acknowledgement, over a satellite a second or two; a gap of minutes; a link that is down for half a
/// day, after which entries expire. For all peers together: which of them is late shows in the age of its oldest entry.
const DELIVERY_BOUNDS: &[f64] = &[
    0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 43_200.0, 86_400.0,
];

/// A gap that was just too long for `mirror.split.hold`, an outage of hours, a link that is away for days.
const SPLIT_BOUNDS: &[f64] = &[10.0, 60.0, 300.0, 1800.0, 7200.0, 43_200.0, 172_800.0];

macro_rules! declare {
    ($($constant:ident: $type:ident $(($bounds:expr))? <$($label:ident),*> = $name:literal, $help:literal;)+) => {
        $(
            #[doc = $help]
            pub const $constant: $type<($($label,)*)> = $type(
                Metric {
                    name: $name,
                    kind: Kind::$type $(($bounds))?,
                    help: $help,
                    labels: <($($label,)*) as Labels>::ALL,
                },
                PhantomData,
            );
        )+

        /// All of them.
        pub const ALL: &[&Metric] = &[$($constant.metric()),+];
    };
}

declare! {
    BUILD_INFO: Gauge<Version> = "narrows_build_info", "Always 1; the version is in the label.";
    START_TIME: Gauge<> = "process_start_time_seconds", "When this process started, in seconds since 1970.";
    PROCESS_CPU: Counter<> = "process_cpu_seconds_total", "Processor time that this process has used, in whole seconds.";
    PROCESS_MEMORY: Gauge<> = "process_resident_memory_bytes", "Memory that this process holds.";
    PROCESS_FDS: Gauge<> = "process_open_fds", "File descriptors that are open.";
    PROCESS_FDS_MAX: Gauge<> = "process_max_fds", "File descriptors that may be open.";
    ADMIN_REQUESTS: Counter<AdminPath> = "narrows_admin_requests_total", "Requests to the admin port, by path.";

    TRACE_MISSED: Counter<> = "narrows_trace_missed_total",
        "Lines that somebody who watches stanzas (narrows trace) was too slow for. The stanzas themselves are not concerned.";

    LINK_UP: Gauge<Peer> = "narrows_link_up", "Whether the link to the peer is up (1) or down (0).";
    LINK_CHANGED: Gauge<Peer> = "narrows_link_changed_timestamp_seconds",
        "Since when the link is up or down, in seconds since 1970.";
    LINK_ACKED: Gauge<Peer> = "narrows_link_acked_timestamp_seconds",
        "When the peer last acknowledged something that was new, in seconds since 1970; 0 if it has not yet.";
    LINK_CONNECTS: Counter<Peer> = "narrows_link_connects_total", "Times that the link to the peer came up.";
    LINK_CLOSED: Counter<LinkClosed> = "narrows_link_closed_total",
        "Times that the link to a peer, or an attempt at it, ended, by reason; the log says whose.";
    LINK_REFUSED: Counter<LinkRefused> = "narrows_link_refused_total",
        "Connections to the link's listener that were not let in, by reason.";
    LINK_RTT: Gauge<Peer> = "narrows_link_rtt_seconds",
        "The last measured round trip to the peer, the wait in the queue of the modem included; 0 if none was measured.";
    LINK_TCP_RTT: Gauge<Peer> = "narrows_link_tcp_rtt_seconds",
        "The round trip as TCP sees it: to whoever answers its segments, which may be a modem near by; 0 if the link is down.";
    LINK_BYTES: Counter<Peer, Direction, Layer> = "narrows_link_bytes_total",
        "Bytes on the link, each as its level was given them: frames before compression, TLS, TCP with its repeats, IP with all headers.";
    LINK_RETRANSMITTED: Counter<Peer> = "narrows_link_retransmitted_bytes_total",
        "Bytes that TCP sent again, because they or their acknowledgement were lost or late.";
    LINK_CAPACITY: Gauge<Peer> = "narrows_link_capacity_bytes_per_second",
        "What the link can take from here at least, in TCP's bytes a second: smoothed over the times when something waited for it, the best that was seen before there were such, and never probed; 0 if nothing was seen yet.";
    LINK_BATCHES: Counter<Peer, Direction> = "narrows_link_batches_total",
        "Batches on the link: what was compressed and flushed together.";

    ENTRIES: Counter<Peer, Direction> = "narrows_entries_total",
        "Queue entries that crossed the link: a cast or a single stanza is one. Those sent again after a reconnect count again on the sending side.";
    INTERRUPTED: Counter<Peer> = "narrows_entries_interrupted_total",
        "Entries that were under way when a connection ended. They are sent again, unless the peer turns out to have them.";
    MISSING: Counter<Peer> = "narrows_entries_missing_total",
        "Entries that the peer no longer has and that never came: its disk or ours was put back to an earlier state. Anything above 0 is a loss.";
    CASTS: Counter<Peer, Direction> = "narrows_casts_total", "Entries with more than one recipient.";
    COPIES: Counter<Peer, Direction> = "narrows_copies_total",
        "Stanzas that the server gave us for the peer (sent), and that we have for the server from the peer (received), each recipient's counted.";
    DUPLICATES_DROPPED: Counter<Peer> = "narrows_duplicates_dropped_total",
        "Entries that the peer sent again although they were stored here already. Dropping them is what makes delivery exact.";
    DROPPED: Counter<Dropped> = "narrows_dropped_total",
        "Stanzas that were not carried on, by reason; the log says whose. Anything above 0 needs a look.";

    SPOOL_ENTRIES: Gauge<Peer> = "narrows_spool_entries", "Entries that wait to cross, or for the peer's acknowledgement.";
    SPOOL_BYTES: Gauge<Peer> = "narrows_spool_bytes", "Bytes of the entries in the spool.";
    SPOOL_OLDEST: Gauge<Peer> = "narrows_spool_oldest_seconds", "How long the oldest entry in the spool has waited.";
    CLASS_ENTRIES: Gauge<Peer, Class> = "narrows_class_entries", "Entries in the spool, by class.";
    CLASS_BYTES: Gauge<Peer, Class> = "narrows_class_bytes", "Bytes of the entries in the spool, by class.";
    CLASS_OLDEST: Gauge<Class> = "narrows_class_oldest_seconds",
        "How long the oldest entry of a class has waited, of all peers' spools.";
    CLASS_CROSSED_BYTES: Counter<Class, Direction> = "narrows_class_crossed_bytes_total",
        "Bytes of entries, before compression, that were put on the link or came over it, by class; those sent again count again, and what came is classed by what it looks like.";
    CLASS_EXPIRED: Counter<Class> = "narrows_class_expired_total",
        "Entries that waited longer than their class may and were given up. Who sent them was told, unless the class is volatile.";
    SUPERSEDED: Counter<Peer> = "narrows_superseded_total",
        "Entries that did not cross: a later one says what counts, or nobody can have seen who came and went.";
    SPOOL_ACKED_BYTES: Counter<Peer> = "narrows_spool_acked_bytes_total",
        "Bytes of entries that have left the spool because the peer has them: what the link achieves. What was given up is not among them.";
    SPOOL_DRAIN: Gauge<Peer> = "narrows_spool_drain_seconds",
        "How long what waits will take to cross at the pace that the link has shown, once it is up; 0 if nothing waits, +Inf if no pace is known.";
    INBOX_ENTRIES: Gauge<Peer> = "narrows_inbox_entries", "Entries that have crossed and wait for the local server.";
    INBOX_BYTES: Gauge<Peer> = "narrows_inbox_bytes", "Bytes of the entries in the inbox.";
    QUEUE_LIMIT_BYTES: Gauge<> = "narrows_queue_limit_bytes", "The configured limit of each spool and each inbox.";
    QUEUE_LIMIT_ENTRIES: Gauge<> = "narrows_queue_limit_entries", "As narrows_queue_limit_bytes, in entries.";
    DELIVERY: Histogram(DELIVERY_BOUNDS)<> = "narrows_delivery_seconds",
        "From when an entry was accepted until the peer said that it is stored there, which it may do up to link.ack_delay later. One entry a second and peer is watched.";

    STANZAS: Counter<Peer, StanzaKind> = "narrows_stanzas_total", "Stanzas of the local server for the peer, each copy counted, by kind.";
    ROOM_BYTES: Counter<Peer, Room> = "narrows_room_bytes_total",
        "Bytes of entries, before compression, that a room put on the spool or that came for it, of at most admin.room_metrics rooms a peer; room=other: all others. None by default.";
    STANZA_BYTES: Counter<Peer, Direction> = "narrows_stanza_bytes_total",
        "What plain S2S would have carried over the link: the bytes of every copy of every stanza.";
    SAVED: Counter<Peer, Mechanism> = "narrows_saved_bytes_total",
        "Bytes that plain S2S would have sent over the link and that did not cross, by what saved them; compaction: as they were stored, once for all recipients. What the peer saves, the peer counts.";
    SAMPLE: Counter<Peer, Squeezed> = "narrows_sample_bytes_total",
        "A sample of what plain S2S would have sent, and what it becomes in a stream compressor with a memory (as XEP-0138 or a tunnel has).";
    REFUSED: Counter<Peer, Refused> = "narrows_refused_total", "Stanzas of the local server that were refused, by reason; expired: entries that waited longer than their class may.";
    RULE_STANZAS: Counter<Peer, Rule, RuleMode> = "narrows_rule_stanzas_total",
        "Stanzas that a rule (queue.rules) matched, each recipient's counted; observed: it only watches.";
    RULE_SAVED: Counter<Peer, Rule, RuleMode> = "narrows_rule_saved_bytes_total",
        "Bytes of stanzas that were not carried because a rule (queue.rules) stripped or dropped them; observed: would not have been.";
    LEGS: Gauge<Leg, LegState> = "narrows_legs", "Streams with the local server that are open now.";
    LEG_OPENED: Counter<Leg> = "narrows_leg_opened_total", "Connections with the local server that came about.";
    LEG_CLOSED: Counter<Leg, LegClosed> = "narrows_leg_closed_total",
        "Streams with the local server that ended, by reason. One that idles out is normal.";
    LEG_REFUSED: Counter<> = "narrows_leg_refused_total",
        "Connections to the legs' listener that were closed at once because there were too many.";
    LEG_VERIFICATIONS: Counter<Verified> = "narrows_leg_verifications_total",
        "Dialback keys that the local server was asked about, by its answer.";
    LANE_UNCONFIRMED: Gauge<Peer> = "narrows_lane_unconfirmed",
        "Copies written to a stream that has acknowledgements (XEP-0198) and not acknowledged by the server yet.";
    IN_DOUBT: Counter<Peer> = "narrows_in_doubt_total",
        "Copies of which nobody can tell whether the server got them, at most: they were in flight on a stream without acknowledgements when it died, or given out when a process died.";

    MIRROR_ROOMS: Gauge<Peer, RoomState> = "narrows_mirror_rooms",
        "The peer's rooms that local users are in, by state. detached: users were told that the link is gone; resyncing: it is back, and what waited is still coming; live also while it is gone and nobody was told.";
    MIRROR_SESSIONS: Gauge<Peer> = "narrows_mirror_sessions", "Local sessions in the peer's rooms.";
    MIRROR_GUESTS: Gauge<Peer> = "narrows_mirror_guests", "The peer's sessions in local rooms.";
    MIRROR_ECHOES_PENDING: Gauge<Peer> = "narrows_mirror_echoes_pending",
        "Messages that were shown to local users and that the room has not taken yet.";
    MIRROR_ECHOES: Counter<Peer, EchoEvent> = "narrows_mirror_echoes_total",
        "Messages shown to local users before the room had them, by what became of them.";
    MIRROR_ANSWERS: Counter<Peer, NearAnswer> = "narrows_mirror_answers_total",
        "Questions of local users that were answered here, for which nothing crossed the link.";
    MIRROR_REFUSED: Counter<Peer> = "narrows_mirror_refused_total",
        "Joins, nick changes and commands of local users that were refused because the link was gone.";
    MIRROR_SPLITS: Counter<Peer> = "narrows_mirror_splits_total", "Times that users were told that the link is gone.";
    MIRROR_HEALS: Counter<Peer> = "narrows_mirror_heals_total", "Times that users were shown who is there after all.";
    MIRROR_SPLIT: Histogram(SPLIT_BOUNDS)<> = "narrows_mirror_split_seconds",
        "How long users were without the far side: from when they were told that the link is gone until they were shown who is there.";
    MIRROR_GHOSTS: Counter<Peer> = "narrows_mirror_ghosts_total",
        "The peer's sessions that a local room no longer knew, and which were told so: after a restart of the server, for one.";
    MIRROR_GHOSTS_RETURNED: Counter<Peer> = "narrows_mirror_ghosts_returned_total",
        "Of narrows_mirror_ghosts_total, the sessions that entered the room again.";
    MIRROR_FOUND: Counter<Peer> = "narrows_mirror_found_total",
        "Messages that a local room had said to the peer's users when narrows was killed and had not taken them in, found in its history and sent on.";
    MIRROR_OVERFLOWS: Counter<Peer> = "narrows_mirror_overflows_total",
        "Rooms and sessions that are not mirrored, or no longer, because a limit was reached. Their stanzas cross as without a mirror.";

    STORE_COMMIT: Histogram(COMMIT_BOUNDS)<> = "narrows_store_commit_seconds",
        "How long a commit to a peer's database took; each is a flush of the disk, and nothing is accepted before it.";
    STORE_ERRORS: Counter<StoreFault> = "narrows_store_errors_total",
        "Times that a peer's database failed, by reason. The process ends with it, and a supervisor starts it again. Anything above 0 needs a look.";
    STORE_BYTES: Gauge<Peer> = "narrows_store_bytes", "The size of the peer's database on disk, its write-ahead log included.";
}

/// Where the metrics are gathered, to be rendered.
#[derive(Clone, Debug)]
pub struct Rendered(PrometheusHandle);

impl Rendered {
    /// The text that Prometheus scrapes.
    pub fn text(&self) -> String {
        tell_process();
        self.0.render()
    }

    /// Sorts new samples into the histograms. Between two scrapes they pile up, so this is called every few seconds.
    pub fn tidy(&self) {
        self.0.run_upkeep();
    }
}

#[derive(Debug, thiserror::Error)]
#[error("metrics cannot be gathered: {0}")]
pub struct MetricsError(String);

/// Begins to gather, with all series of these peers at 0. The first call in a process decides; a later one only adds peers.
pub fn install<'p>(peers: impl IntoIterator<Item = &'p str>) -> Result<Rendered, MetricsError> {
    static INSTALLED: OnceLock<Result<PrometheusHandle, String>> = OnceLock::new();
    let handle = INSTALLED
        .get_or_init(|| {
            builder()
                .and_then(|builder| builder.install_recorder())
                .map_err(|error| error.to_string())
        })
        .clone()
        .map_err(MetricsError)?;

    let peers: Vec<&str> = peers.into_iter().collect();
    for metric in ALL {
        describe(metric);
        register(metric, &peers);
    }
    BUILD_INFO.set(Version::This, 1.0);
    static STARTED: OnceLock<Duration> = OnceLock::new();
    let started = STARTED.get_or_init(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default());
    START_TIME.set((), started.as_secs_f64());
    Ok(Rendered(handle))
}

/// What the kernel knows of this process. Where it does not say (another system than Linux), the figures stay 0.
fn tell_process() {
    let proc = |file: &str| std::fs::read_to_string(format!("/proc/self/{file}")).unwrap_or_default();
    // proc(5): from the third field on, because the second is a name that may hold anything; utime and stime are the 14th and 15th.
    let stat = proc("stat");
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let ticks: u64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    // 100 on every Linux that there is: the kernel's USER_HZ.
    PROCESS_CPU.follow((), ticks / 100);
    let number = |text: &str, before: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(before));
        line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok())
            .unwrap_or_default()
    };
    PROCESS_MEMORY.set((), number(&proc("status"), "VmRSS:") * 1024.0);
    PROCESS_FDS_MAX.set((), number(&proc("limits"), "Max open files"));
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, |files| files.count());
    PROCESS_FDS.set((), open as f64);
}

fn builder() -> Result<PrometheusBuilder, metrics_exporter_prometheus::BuildError> {
    ALL.iter()
        .try_fold(PrometheusBuilder::new(), |builder, metric| match metric.kind {
            Kind::Histogram(bounds) => builder.set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), bounds),
            Kind::Counter | Kind::Gauge => Ok(builder),
        })
}

fn describe(metric: &Metric) {
    let (name, help) = (
        KeyName::from_const_str(metric.name),
        SharedString::const_str(metric.help),
    );
    let unit = if metric.name.contains("_bytes") {
        Some(Unit::Bytes)
    } else if metric.name.contains("_seconds") {
        Some(Unit::Seconds)
    } else {
        None
    };
    with_recorder(|recorder| match metric.kind {
        Kind::Counter => recorder.describe_counter(name, unit, help),
        Kind::Gauge => recorder.describe_gauge(name, unit, help),
        Kind::Histogram(_) => recorder.describe_histogram(name, unit, help),
    });
}

fn register(metric: &Metric, peers: &[&str]) {
    // The product of all labels' words.
    let series = metric
        .labels
        .iter()
        .fold(vec![Vec::new()], |series: Vec<Vec<metrics::Label>>, (name, words)| {
            let words = match words {
                Words::Peers => peers,
                // They come with the first report of their peer.
                Words::Rules | Words::Rooms => &[],
                Words::Closed(words) => words,
            };
            series
                .iter()
                .flat_map(|labels| {
                    words.iter().map(|word| {
                        let mut labels = labels.clone();
                        labels.push(metrics::Label::new(*name, SharedString::from_owned((*word).to_owned())));
                        labels
                    })
                })
                .collect()
        });
    for labels in series {
        let key = Key::from_parts(metric.name, labels);
        with_recorder(|recorder| match metric.kind {
            Kind::Counter => recorder.register_counter(&key, &METADATA).increment(0),
            Kind::Gauge => recorder.register_gauge(&key, &METADATA).increment(0.0),
            Kind::Histogram(_) => drop(recorder.register_histogram(&key, &METADATA)),
        });
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        io::Write as _,
        process::{Command, Stdio},
        time::Instant,
    };

    use super::*;
    use crate::{
        io::watch::RoomSeries,
        relay::cost::{Rooms, Way},
        stanza::Stanza,
    };

    /// Names follow the rules of Prometheus: prefix, base unit, `_total` for counters and for nothing else.
    #[test]
    fn names_follow_the_conventions() {
        let mut names = BTreeSet::new();
        for metric in ALL {
            assert!(names.insert(metric.name), "{} is there twice", metric.name);
            assert!(
                metric.name.starts_with("narrows_") || metric.name.starts_with("process_"),
                "{}",
                metric.name
            );
            assert_eq!(
                metric.name.ends_with("_total"),
                metric.kind == Kind::Counter,
                "{}",
                metric.name
            );
            assert!(metric.help.ends_with('.'), "{}", metric.name);
            for (_, words) in metric.labels {
                if let Words::Closed(words) = words {
                    assert_eq!(
                        words.iter().collect::<BTreeSet<_>>().len(),
                        words.len(),
                        "{}",
                        metric.name
                    );
                }
            }
        }
    }

    /// All series are there before anything happened, few enough to keep for years, and a word that is not in the list does
    /// not make a new one.
    #[test]
    fn all_series_exist_from_the_start() {
        let rendered = install(["early"]).unwrap();
        let text = rendered.text();
        let named = |metric: &&&Metric| {
            metric
                .labels
                .iter()
                .any(|(_, words)| matches!(words, Words::Rules | Words::Rooms))
        };
        for metric in ALL.iter().filter(|metric| !named(metric)) {
            assert!(text.contains(&format!("# HELP {} ", metric.name)), "{}", metric.name);
            assert!(text.contains(&format!("# TYPE {} ", metric.name)), "{}", metric.name);
        }
        for series in [
            "narrows_link_up{peer=\"early\"} 0",
            "narrows_link_bytes_total{peer=\"early\",direction=\"sent\",level=\"tcp\"} 0",
            // Other tests of this process may have counted these already.
            "narrows_leg_closed_total{leg=\"receiving\",reason=\"other\"} ",
            "narrows_saved_bytes_total{peer=\"early\",mechanism=\"collapse\"} 0",
            "narrows_refused_total{peer=\"early\",reason=\"queue_full\"} 0",
            "narrows_delivery_seconds_count ",
            "narrows_build_info{version=\"0.1.0\"} 1",
        ] {
            assert!(text.contains(series), "no {series} in\n{text}");
        }
        let before = text
            .lines()
            .find(|line| line.starts_with("narrows_dropped_total{reason=\"other\"}"));
        assert!(before.is_some());
        DROPPED.increment("never heard of");
        let text = rendered.text();
        assert!(!text.contains("never heard of") && text.contains("narrows_dropped_total{reason=\"other\"} 1"));
    }

    /// What is measured is shown: each metric is in a panel or an alert of `grafana/`.
    #[test]
    fn every_metric_is_shown() {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/grafana");
        let shown: String = ["overview.json", "link.json", "rooms.json", "queue.json", "alerts.yaml"]
            .map(|file| std::fs::read_to_string(format!("{directory}/{file}")).unwrap())
            .concat();
        let shown: BTreeSet<&str> = shown
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
            .collect();
        for metric in ALL {
            let name = match metric.kind {
                Kind::Histogram(_) => format!("{}_bucket", metric.name),
                Kind::Counter | Kind::Gauge => metric.name.to_owned(),
            };
            assert!(shown.contains(name.as_str()), "nothing in grafana/ shows {name}");
        }
    }

    /// The words of a class's label are those that a class has.
    #[test]
    fn classes_are_all_there() {
        let Words::Closed(words) = Class::WORDS else {
            panic!("any word")
        };
        assert_eq!(words, Class::ALL.map(Class::as_label));
    }

    /// Twenty peers with 1,000 rooms each make fewer than 2,000 series, and a page of them is rendered at once. Rooms make none unless they are
    /// asked for, and then no more than that.
    #[test]
    fn series_are_few() {
        let peers: Vec<String> = (0..20).map(|n| format!("peer-{n}")).collect();
        let rendered = install(peers.iter().map(String::as_str)).unwrap();
        let mut rooms = Rooms::default();
        for room in 0..1000 {
            let text = format!("<message from='u@a.example/r' to='room{room}@c.b.example' type='groupchat'/>");
            rooms.note(&Stanza::parse(text.into()).unwrap(), Way::Sent, 1000, 1);
        }
        let tell = |max: usize| {
            for peer in &peers {
                for (room, bytes) in RoomSeries::new(max).bytes(&rooms) {
                    ROOM_BYTES.follow((peer, &room), bytes);
                }
            }
            rendered.text()
        };
        tell(0);
        // The quickest of some: others use the processor too.
        let took = (0..10).map(|_| {
            let begun = Instant::now();
            rendered.text();
            begun.elapsed()
        });
        let took = took.min().unwrap();
        let text = tell(0);
        let of = |peer: &str| {
            text.lines()
                .filter(|line| line.contains(peer) && !line.starts_with('#'))
                .count()
        };
        let shared = text
            .lines()
            .filter(|line| !line.contains("peer=") && !line.starts_with('#'))
            .count();
        let (each, all) = (of("peer=\"peer-7\""), 20 * of("peer=\"peer-7\"") + shared);
        println!(
            "{each} series a peer and {shared} others: {all} for 20 peers, {} bytes, rendered in {took:?}",
            text.len()
        );
        assert!(
            all < 2000,
            "{each} series a peer and {shared} others: {all} for 20 peers"
        );
        assert!(took < Duration::from_millis(20), "{took:?}");
        assert!(
            !text.contains("narrows_room_bytes_total{"),
            "nobody has asked for rooms"
        );

        // In a room after the other, none stands out; ten that do are named, and the others together.
        for room in (0..10).map(|room| format!("large{room}@c.b.example")) {
            let text = format!("<message from='u@a.example/r' to='{room}' type='groupchat'/>");
            rooms.note(&Stanza::parse(text.into()).unwrap(), Way::Sent, 1_000_000, 1);
        }
        let mut series = RoomSeries::new(10);
        for peer in &peers {
            for (room, bytes) in series.bytes(&rooms) {
                ROOM_BYTES.follow((peer, &room), bytes);
            }
        }
        let named = rendered.text();
        let named = named
            .lines()
            .filter(|line| line.starts_with("narrows_room_bytes_total{"));
        assert_eq!(named.count(), 20 * 11);
    }

    /// What Prometheus' own checker says of a full page: nothing.
    #[test]
    fn promtool_accepts_the_page() {
        let rendered = install(["checked"]).unwrap();
        LINK_UP.set("checked", 1.0);
        LINK_BYTES.add(("checked", Direction::Sent, Layer::Tls), 7);
        DELIVERY.record_period((), Duration::from_secs(3));
        STORE_COMMIT.record((), 0.002);
        RULE_STANZAS.follow(("checked", "no-avatars", RuleMode::Applied), 3);
        ENTRIES.follow(("checked", Direction::Received), 9);
        rendered.tidy();
        let text = rendered.text();
        assert!(text.contains("narrows_delivery_seconds_bucket{le=\"5\"} "), "{text}");
        assert!(
            text.contains("narrows_entries_total{peer=\"checked\",direction=\"received\"} 9"),
            "{text}"
        );

        let mut promtool = Command::new("promtool")
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("promtool is needed for this test: it is in Debian's package `prometheus`");
        promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = promtool.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.trim().is_empty(), "{said}\n{text}");
    }
}
