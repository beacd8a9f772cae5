//! Receipts from a server that does not acknowledge stanzas (XEP-0198): after what it was sent comes a ping (XEP-0199), and who answers
//! the ping has read what came before it.
//!
//! Without them all that is known is that a kernel has the bytes. A server that reads slowly, as ejabberd does by its shaper and
//! Prosody by its limits, throws away what it has not read when the connection ends, so a kill of ours lost all that it had
//! held back: 60 KB once, some 75 copies. With them no more is under way than the owner allows.
//!
//! The question goes out on one of our streams, and the answer comes on one that the server opens to us: here the
//! two meet. The server answers in the far domain's name that it was asked in, so the answer never leaves this site.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use tokio::sync::Notify;

use crate::stanza::{DomainPair, Kind, Stanza};

/// How the ids of our questions begin; then who asks, a dot, and how many he has asked.
const ID: &str = "narrows-";

/// Who waits for receipts. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub struct Receipts(Arc<Mutex<BTreeMap<u64, Arc<Heard>>>>);

#[derive(Debug, Default)]
struct Heard {
    upto: AtomicU64,
    changed: Notify,
}

impl Receipts {
    /// A new asker. The number must not be guessed: whoever knows it can make us forget what was not delivered.
    pub fn asker(&self, secret: u64) -> Asker {
        let heard = Arc::new(Heard::default());
        lock(&self.0).insert(secret, Arc::clone(&heard));
        Asker {
            all: self.clone(),
            secret,
            heard,
            asked: 0,
        }
    }

    /// Whether this stanza of our server is a receipt. It is taken then, and goes no further.
    pub fn take(&self, pair: &DomainPair, stanza: &Stanza) -> bool {
        if stanza.kind() != Kind::Iq || !matches!(stanza.stanza_type().as_deref(), Some("result" | "error")) {
            return false;
        }
        let id = stanza.id();
        let Some((secret, number)) = id.as_deref().and_then(parse) else {
            return false;
        };
        if stanza.to().as_deref() != Some(pair.far.as_str()) {
            return false;
        }
        if let Some(heard) = lock(&self.0).get(&secret) {
            heard.upto.fetch_max(number, Ordering::Relaxed);
            heard.changed.notify_one();
        }
        // One that comes too late is still ours, and nobody's across the link.
        true
    }
}

/// One stream's questions and how far they are answered.
#[derive(Debug)]
pub struct Asker {
    all: Receipts,
    secret: u64,
    heard: Arc<Heard>,
    asked: u64,
}

impl Asker {
    /// The next question, and its number.
    pub fn ask(&mut self, pair: &DomainPair) -> (Bytes, u64) {
        self.asked += 1;
        let DomainPair { local, far } = pair;
        let ping = format!(
            "<iq type='get' from='{far}' to='{local}' id='{ID}{:016x}.{}'><ping xmlns='urn:xmpp:ping'/></iq>",
            self.secret, self.asked
        );
        (ping.into(), self.asked)
    }

    /// All questions up to this one are answered.
    pub fn answered(&self) -> u64 {
        // Nobody can have answered what was not asked.
        self.heard.upto.load(Ordering::Relaxed).min(self.asked)
    }

    /// Whether something was asked, and all of it is answered.
    pub fn is_up_to_date(&self) -> bool {
        self.asked > 0 && self.answered() == self.asked
    }

    /// Until [`Self::answered`] may say more.
    pub async fn changed(&self) {
        self.heard.changed.notified().await;
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        lock(&self.all.0).remove(&self.secret);
    }
}

fn parse(id: &str) -> Option<(u64, u64)> {
    let (secret, number) = id.strip_prefix(ID)?.split_once('.')?;
    Some((u64::from_str_radix(secret, 16).ok()?, number.parse().ok()?))
}

/// A holder that panicked leaves numbers behind, not half-built structures.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stanza::Domain;

    fn pair() -> DomainPair {
        let domain = |name| Domain::new(name).unwrap();
        DomainPair {
            local: domain("b.example"),
            far: domain("conference.a.example"),
        }
    }

    fn answer(to: &str, kind: &str, id: &str) -> Stanza {
        let text = format!("<iq type='{kind}' from='b.example' to='{to}' id='{id}'/>");
        Stanza::parse(Bytes::from(text)).unwrap()
    }

    /// An answer, be it an error, counts for the asker whose number it has; everything else is somebody's stanza.
    #[test]
    fn answers_find_their_asker() {
        let receipts = Receipts::default();
        let (mut one, other) = (receipts.asker(1), receipts.asker(2));
        for _ in 0..3 {
            one.ask(&pair());
        }
        let far = "conference.a.example";
        let id = |number: u64| format!("narrows-0000000000000001.{number}");
        assert!(receipts.take(&pair(), &answer(far, "result", &id(2))));
        assert_eq!((one.answered(), other.answered()), (2, 0));
        assert!(receipts.take(&pair(), &answer(far, "error", &id(1))));
        assert_eq!(one.answered(), 2, "answers do not go back");
        assert!(receipts.take(&pair(), &answer(far, "result", &id(99))));
        assert_eq!(one.answered(), 3, "nobody answers what was not asked");

        assert!(!receipts.take(&pair(), &answer(far, "get", &id(3))));
        assert!(!receipts.take(&pair(), &answer("nick@conference.a.example", "result", &id(3))));
        assert!(!receipts.take(&pair(), &answer(far, "result", "narrows-x.3")));
        drop(one);
        assert!(receipts.take(&pair(), &answer(far, "result", &id(3))), "late, but ours");
        assert_eq!(lock(&receipts.0).len(), 1);
    }

    /// The question is a ping that our parser takes, from the far domain to the local one.
    #[test]
    fn question_is_a_ping() {
        let mut asker = Receipts::default().asker(0xabc);
        let (ping, number) = asker.ask(&pair());
        let ping = Stanza::parse(ping).unwrap();
        assert_eq!(number, 1);
        assert_eq!(ping.to().as_deref(), Some("b.example"));
        assert_eq!(ping.from().as_deref(), Some("conference.a.example"));
        assert_eq!(ping.id().as_deref(), Some("narrows-0000000000000abc.1"));
    }
}
