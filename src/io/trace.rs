//! Whoever watches stanzas as they pass: `narrows trace`.
//!
//! A watcher is a [`Tap`]. The owners of the peers hold what becomes of each stanza against its filter, and put a line into its buffer. They never
//! wait: what a watcher is too slow for is missed, counted, and told to it. What a line shows of users is bounded twice, by what
//! was asked for and by what the configuration allows (`admin.show`).

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_core::Stream;
use serde_json::{Map, Value};
use tokio::sync::{mpsc, watch};

use crate::{
    metrics::TRACE_MISSED,
    pii::Pii,
    queue::{class::Class, rules::Direction},
    relay::trace::Event,
    stanza::{Stanza, bare},
};

/// Watchers at once: a person or two, and one who forgot.
pub const TAPS_MAX: usize = 4;

/// Lines that wait for one watcher: a second of a busy pair, and half a megabyte at most unless bodies are shown.
const LINES_MAX: usize = 2048;

/// Of a stanza that is shown whole; the rest is cut.
const SHOWN_BYTES_MAX: usize = 4096;

/// What may be seen of users. In this order, each allows what the one before it does.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub enum Show {
    #[default]
    Nothing,
    Addresses,
    /// Stanzas, whole.
    Bodies,
}

/// What a watcher wants to see; all, where it says nothing.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub peer: Option<String>,
    /// The bare address of a room, or of whoever else.
    pub room: Option<String>,
    pub class: Option<Class>,
    pub direction: Option<Direction>,
}

impl Filter {
    fn wants(&self, peer: &str, event: &Event, from: &str, to: &str) -> bool {
        let is = |address: &str, room: &str| bare(address).eq_ignore_ascii_case(room);
        self.peer.as_deref().is_none_or(|wanted| wanted == peer)
            && self.class.is_none_or(|wanted| event.class == Some(wanted))
            && self.direction.is_none_or(|wanted| event.direction == wanted)
            && self.room.as_deref().is_none_or(|room| is(from, room) || is(to, room))
    }
}

#[derive(Clone, Debug)]
struct Tap {
    number: u64,
    filter: Filter,
    show: Show,
    lines: mpsc::Sender<String>,
    missed: Arc<AtomicU64>,
}

/// All watchers. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub struct Taps(Arc<watch::Sender<Vec<Tap>>>);

/// The watchers as the owner of a peer sees them.
#[derive(Clone, Debug)]
pub struct Watchers(watch::Receiver<Vec<Tap>>);

impl Taps {
    pub fn watchers(&self) -> Watchers {
        Watchers(self.0.subscribe())
    }

    /// One more watcher; none, if there are too many.
    pub fn tap(&self, filter: Filter, show: Show) -> Option<Lines> {
        let (sender, lines) = mpsc::channel(LINES_MAX);
        let missed = Arc::new(AtomicU64::new(0));
        let mut number = None;
        self.0.send_if_modified(|taps| {
            if taps.len() >= TAPS_MAX {
                return false;
            }
            let next = taps.last().map_or(0, |tap| tap.number + 1);
            number = Some(next);
            taps.push(Tap {
                number: next,
                filter: filter.clone(),
                show,
                lines: sender.clone(),
                missed: Arc::clone(&missed),
            });
            true
        });
        Some(Lines {
            taps: self.clone(),
            number: number?,
            lines,
            missed,
            told: 0,
        })
    }

    fn untap(&self, number: u64) {
        self.0.send_modify(|taps| taps.retain(|tap| tap.number != number));
    }
}

impl Watchers {
    /// Whether anybody watches.
    pub fn any(&self) -> bool {
        !self.0.borrow().is_empty()
    }

    /// Until watchers have come or gone.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            // There will be no others.
            std::future::pending().await
        }
    }

    /// Puts an event before all who want to see it.
    pub fn show(&self, peer: &str, event: &Event) {
        let stanza = event.stanza.clone().and_then(|bytes| Stanza::parse(bytes).ok());
        let from = stanza.as_ref().and_then(Stanza::from).unwrap_or_default();
        let to = stanza.as_ref().and_then(Stanza::to).unwrap_or_default();
        for tap in self.0.borrow().iter() {
            if tap.filter.wants(peer, event, &from, &to) {
                let line = line(peer, event, stanza.as_ref(), (&from, &to), tap.show);
                if tap.lines.try_send(line).is_err() {
                    tap.missed.fetch_add(1, Ordering::Relaxed);
                    TRACE_MISSED.increment(());
                }
            }
        }
    }

    /// The relay has not noted so many, for want of room.
    pub fn miss(&self, count: u64) {
        if count > 0 {
            TRACE_MISSED.add((), count);
            for tap in self.0.borrow().iter() {
                tap.missed.fetch_add(count, Ordering::Relaxed);
            }
        }
    }
}

/// One event, as a line of JSON. Keys are only added.
fn line(peer: &str, event: &Event, stanza: Option<&Stanza>, (from, to): (&str, &str), show: Show) -> String {
    let mut object = Map::new();
    let mut put = |key: &str, value: Value| object.insert(key.to_owned(), value);
    put("at", (event.at.0 as f64 / 1000.0).into());
    put("peer", peer.into());
    put("direction", direction(event.direction).into());
    put("decision", event.decision.as_label().into());
    put("why", event.decision.to_string().into());
    if let Some(entry) = &event.entry {
        put("entry", entry.to_string().into());
    }
    if let Some(class) = event.class {
        put("class", class.as_label().into());
    }
    if let Some(stanza) = stanza {
        put("kind", stanza.kind().as_str().into());
        if let Some(stanza_type) = stanza.stanza_type() {
            put("type", known_type(&stanza_type).into());
        }
        put("bytes", stanza.bytes().len().into());
        for (key, address) in [("from", from), ("to", to)] {
            let address = Pii(address);
            let text = match show {
                Show::Nothing => address.to_string(),
                Show::Addresses | Show::Bodies => format!("{address:#}"),
            };
            put(key, text.into());
        }
        if show == Show::Bodies {
            let bytes = stanza.bytes();
            let text = String::from_utf8_lossy(&bytes[..bytes.len().min(SHOWN_BYTES_MAX)]);
            put("stanza", text.into_owned().into());
        }
    }
    let mut line = Value::Object(object).to_string();
    line.push('\n');
    line
}

/// A stanza's type, if it is one of those that there are: anything may be written there.
fn known_type(written: &str) -> &'static str {
    use crate::queue::rules::Type;
    let mut all = Type::ALL.into_iter().map(Type::as_str);
    all.find(|known| *known == written).unwrap_or("other")
}

pub fn direction(direction: Direction) -> &'static str {
    match direction {
        Direction::Sent => "sent",
        Direction::Received => "received",
    }
}

/// What one watcher gets. It goes with this.
#[derive(Debug)]
pub struct Lines {
    taps: Taps,
    number: u64,
    lines: mpsc::Receiver<String>,
    missed: Arc<AtomicU64>,
    told: u64,
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.taps.untap(self.number);
    }
}

impl Stream for Lines {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let missed = self.missed.load(Ordering::Relaxed);
        if missed > self.told {
            let more = missed - self.told;
            self.told = missed;
            return Poll::Ready(Some(Ok(Bytes::from(format!("{{\"missed\":{more}}}\n")))));
        }
        self.lines.poll_recv(cx).map(|line| line.map(|line| Ok(line.into())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        codec::position::{Epoch, Seq},
        relay::trace::{Decision, EntryId},
        time::Wall,
    };

    const STANZA: &str =
        "<message from='room@c.a.example/nick' to='u@b.example/r' type='groupchat'><body>top secret</body></message>";

    fn event() -> Event {
        Event {
            at: Wall(1_700_000_000_000),
            direction: Direction::Sent,
            decision: Decision::Collapsed { copies: 3 },
            class: Some(Class::Message),
            entry: Some(EntryId {
                site: Some("ship".into()),
                epoch: Epoch(0x1a2b),
                seq: Seq(7),
            }),
            stanza: Some(Bytes::from_static(STANZA.as_bytes())),
        }
    }

    async fn next(lines: &mut Lines) -> String {
        let next = std::future::poll_fn(|cx| Pin::new(&mut *lines).poll_next(cx)).await;
        String::from_utf8(next.unwrap().unwrap().to_vec()).unwrap()
    }

    /// Nothing of users is seen unless it is asked for, and whoever wants something else gets nothing.
    #[tokio::test]
    async fn lines_show_what_they_may() {
        let taps = Taps::default();
        let watchers = taps.watchers();
        assert!(!watchers.any());
        let mut hidden = taps.tap(Filter::default(), Show::Nothing).unwrap();
        let filter = Filter {
            peer: Some("shore".to_owned()),
            room: Some("room@c.a.example".to_owned()),
            class: Some(Class::Message),
            direction: Some(Direction::Sent),
        };
        let mut shown = taps.tap(filter.clone(), Show::Addresses).unwrap();
        let mut whole = taps.tap(Filter::default(), Show::Bodies).unwrap();
        let mut others = Vec::new();
        for other in [
            Filter {
                peer: Some("x".to_owned()),
                ..filter.clone()
            },
            Filter {
                room: Some("x@c.a.example".to_owned()),
                ..filter.clone()
            },
            Filter {
                class: Some(Class::Iq),
                ..filter.clone()
            },
            Filter {
                direction: Some(Direction::Received),
                ..filter.clone()
            },
        ] {
            let mut other = taps.tap(other, Show::Nothing).unwrap();
            watchers.show("shore", &event());
            assert!(other.lines.try_recv().is_err());
            assert!(
                taps.tap(Filter::default(), Show::Nothing).is_none(),
                "there are {TAPS_MAX}"
            );
            others.push(next(&mut shown).await);
        }
        let line = next(&mut hidden).await;
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            (&value["entry"], &value["decision"]),
            (&"ship-1a2b/7".into(), &"collapsed".into())
        );
        assert_eq!(value["why"], "copy 3 of the entry");
        assert!(
            !line.contains("nick") && !line.contains("u@b") && !line.contains("secret"),
            "{line}"
        );
        assert!(
            others[0].contains("room@c.a.example/nick") && !others[0].contains("secret"),
            "{}",
            others[0]
        );
        assert!(next(&mut whole).await.contains("top secret"));
        drop((hidden, shown, whole));
        assert!(!watchers.any());
    }

    /// Whoever reads too slowly misses something, is told how much, and holds up nobody.
    #[tokio::test]
    async fn slow_watchers_miss_something() {
        let taps = Taps::default();
        let watchers = taps.watchers();
        let mut lines = taps.tap(Filter::default(), Show::Nothing).unwrap();
        for _ in 0..LINES_MAX + 5 {
            watchers.show("shore", &event());
        }
        watchers.miss(2);
        assert_eq!(next(&mut lines).await, "{\"missed\":7}\n");
        assert!(next(&mut lines).await.contains("collapsed"));
        watchers.show("shore", &event());
        assert!(next(&mut lines).await.contains("collapsed"), "it is told once");
    }
}
