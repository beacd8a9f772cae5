//! A scripted XMPP client: it does what it is told, remembers all that it receives, and does nothing by itself.
//!
//! A [`Client`] signs in over an open TCP connection (SASL PLAIN without TLS: the lab's servers allow that inside their
//! namespace), binds its resource, and from then on a thread cuts what comes into [`Stanza`]s with an order number.
//! The script sends, waits until something has come ([`Client::expect`]), or asks what came ([`Client::count`]).
//!
//! Two runs of one script can be compared because whatever a client sends depends on the script alone: its ids are
//! counted ([`OWN_ID`]), and answers to requests are off unless the script turns them on ([`Answers`]).
//! Pings that only wait for the servers ([`SYNC_ID`]) are counted apart and are not in the transcript.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::transcript::xml::{self, Element, Framer, Piece, escaped};

pub const MUC: &str = "http://jabber.org/protocol/muc";
pub const MUC_USER: &str = "http://jabber.org/protocol/muc#user";
pub const MUC_ADMIN: &str = "http://jabber.org/protocol/muc#admin";
pub const MUC_OWNER: &str = "http://jabber.org/protocol/muc#owner";
pub const DISCO_INFO: &str = "http://jabber.org/protocol/disco#info";
pub const DISCO_ITEMS: &str = "http://jabber.org/protocol/disco#items";
pub const STANZAS: &str = "urn:ietf:params:xml:ns:xmpp-stanzas";
const SASL: &str = "urn:ietf:params:xml:ns:xmpp-sasl";
const BIND: &str = "urn:ietf:params:xml:ns:xmpp-bind";
const SESSION: &str = "urn:ietf:params:xml:ns:xmpp-session";
const STREAMS: &str = "http://etherx.jabber.org/streams";

/// How ids begin that a script has made: the same in every run, so they are compared as they are.
pub const OWN_ID: &str = "nw.";
/// How ids of pings begin that only wait for the servers: how many there are differs between runs.
pub const SYNC_ID: &str = "~";

/// Longer than any server in the lab takes to sign a client in, with a hundred others doing the same on two cores.
const SIGN_IN: Duration = Duration::from_secs(30);
/// A reader that finds nothing looks up this often whether its client is gone.
const READ_CHUNK: usize = 16 * 1024;
/// A transcript this long means that something loops.
const STANZAS_MAX: usize = 1_000_000;

/// Why a script cannot go on, for a person to read.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Failure(pub String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self(error.to_string())
    }
}

pub type Outcome<T = ()> = Result<T, Failure>;

/// A top-level element as a client received it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Stanza {
    /// The place among all that this client received, from 0.
    pub order: usize,
    /// Since the client was connected.
    pub at: Duration,
    /// As it came.
    pub raw: String,
    pub element: Element,
}

impl Stanza {
    pub fn name(&self) -> &str {
        &self.element.name
    }

    pub fn attr(&self, name: &str) -> &str {
        self.element.attr(name).unwrap_or_default()
    }

    pub fn from(&self) -> &str {
        self.attr("from")
    }

    pub fn to(&self) -> &str {
        self.attr("to")
    }

    pub fn id(&self) -> &str {
        self.attr("id")
    }

    /// The `type` attribute.
    pub fn kind(&self) -> &str {
        self.attr("type")
    }

    pub fn canonical(&self) -> String {
        self.element.canonical()
    }

    pub fn body(&self) -> Option<String> {
        self.element.child_text(xml::CLIENT, "body")
    }

    pub fn subject(&self) -> Option<String> {
        self.element.child_text(xml::CLIENT, "subject")
    }

    pub fn is_message(&self) -> bool {
        self.name() == "message"
    }

    pub fn is_presence(&self) -> bool {
        self.name() == "presence"
    }

    /// The defined condition of a stanza of type `error`.
    pub fn error(&self) -> Option<&str> {
        let error = self.element.child(xml::CLIENT, "error")?;
        error
            .elements()
            .find(|element| element.ns == STANZAS && element.name != "text")
            .map(|element| element.name.as_str())
    }

    /// Whether the room says so: a status code of XEP-0045.
    pub fn has_status(&self, code: &str) -> bool {
        let user = self.element.child(MUC_USER, "x");
        user.is_some_and(|user| {
            user.elements()
                .any(|element| element.name == "status" && element.attr("code") == Some(code))
        })
    }

    /// The `<item/>` that a room adds to a presence.
    pub fn item(&self) -> Option<&Element> {
        self.element.child(MUC_USER, "x")?.child(MUC_USER, "item")
    }

    pub fn item_attr(&self, name: &str) -> &str {
        self.item().and_then(|item| item.attr(name)).unwrap_or_default()
    }
}

/// What a client does with a request that it did not ask for.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Answers {
    /// Nothing: the asker waits until the script answers.
    #[default]
    Nothing,
    /// `service-unavailable`, as a client that knows no extension must.
    Refuse,
    /// disco#info as [`CAPS`] promises it, and `service-unavailable` for the rest.
    Caps,
}

/// Entity capabilities (XEP-0115) of a client that answers with [`Answers::Caps`]; the hash is that of [`CAPS_INFO`].
pub const CAPS: &str = "<c xmlns='http://jabber.org/protocol/caps' hash='sha-1' node='https://narrows.example/lab' \
    ver='y3FU0f84WKjxSIu7E4tsS+8cbWY='/>";
const CAPS_INFO: &str = "<identity category='client' name='lab' type='pc'/>\
    <feature var='http://jabber.org/protocol/caps'/><feature var='http://jabber.org/protocol/disco#info'/>\
    <feature var='http://jabber.org/protocol/muc'/><feature var='http://jabber.org/protocol/nick+notify'/>";

/// What the reading thread and the script share.
#[derive(Debug, Default)]
struct Received {
    stanzas: Vec<Stanza>,
    /// The script has used this one: it is not found again.
    claimed: Vec<bool>,
    /// Stanzas before this one are of no interest any more.
    floor: usize,
    /// Answers to the pings that only wait for the servers.
    synced: BTreeMap<String, Stanza>,
    answers: Answers,
    /// Why nothing will come any more.
    closed: Option<String>,
    last: Option<Instant>,
}

#[derive(Debug)]
struct Shared {
    received: Mutex<Received>,
    news: Condvar,
    writer: Mutex<TcpStream>,
    start: Instant,
}

impl Shared {
    fn received(&self) -> MutexGuard<'_, Received> {
        // A thread that panicked while it held the lock has failed the test already.
        self.received.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, xml: &str) -> Outcome {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(writer.write_all(xml.as_bytes())?)
    }
}

/// A signed-in session of a user.
#[derive(Debug)]
pub struct Client {
    /// `user@domain/resource`, as the server has bound it.
    pub jid: String,
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
    ids: AtomicU64,
    syncs: AtomicU64,
}

impl Client {
    /// Signs in over an open connection to the user's own server.
    pub fn connect(tcp: TcpStream, bare: &str, password: &str, resource: &str) -> Outcome<Self> {
        let who = format!("{bare}/{resource}");
        Self::sign_in(tcp, bare, password, resource)
            .map_err(|Failure(why)| Failure(format!("{who} cannot sign in: {why}")))
    }

    fn sign_in(tcp: TcpStream, bare: &str, password: &str, resource: &str) -> Outcome<Self> {
        let (user, domain) = bare
            .split_once('@')
            .ok_or_else(|| Failure(format!("{bare} is not user@domain")))?;
        tcp.set_nodelay(true)?;
        let mut start = Start::new(tcp, domain)?;

        start.open()?;
        let plain = BASE64.encode(format!("\0{user}\0{password}"));
        start.send(&format!("<auth xmlns='{SASL}' mechanism='PLAIN'>{plain}</auth>"))?;
        start.element(|element| element.is(SASL, "success"))?;

        let features = start.open()?;
        let resource = escaped(resource);
        start.send(&format!(
            "<iq type='set' id='bind'><bind xmlns='{BIND}'><resource>{resource}</resource></bind></iq>"
        ))?;
        let bound = start.element(|element| element.attr("id") == Some("bind"))?;
        let jid = bound.child(BIND, "bind").and_then(|bind| bind.child_text(BIND, "jid"));
        let jid = jid.ok_or_else(|| Failure(format!("no resource: {}", bound.canonical())))?;
        let session = features.child(SESSION, "session");
        if session.is_some_and(|session| session.child(SESSION, "optional").is_none()) {
            start.send(&format!(
                "<iq type='set' id='session'><session xmlns='{SESSION}'/></iq>"
            ))?;
            start.element(|element| element.attr("id") == Some("session"))?;
        }
        start.into_client(jid)
    }

    pub fn bare(&self) -> &str {
        self.jid.split('/').next().unwrap_or_default()
    }

    pub fn user(&self) -> &str {
        self.jid.split('@').next().unwrap_or_default()
    }

    pub fn resource(&self) -> &str {
        self.jid.split_once('/').map_or("", |(_, resource)| resource)
    }

    /// `user/resource`: short and enough in a report.
    pub fn label(&self) -> String {
        format!("{}/{}", self.user(), self.resource())
    }

    pub fn set_answers(&self, answers: Answers) {
        self.shared.received().answers = answers;
    }

    /// An id that is the same in every run of the script.
    pub fn next_id(&self) -> String {
        let number = self.ids.fetch_add(1, Ordering::Relaxed);
        format!("{OWN_ID}{}.{}.{number}", self.user(), self.resource())
    }

    /// Goes on counting ids where an earlier session of this user stopped.
    pub fn continue_ids(&self, from: u64) {
        self.ids.store(from, Ordering::Relaxed);
    }

    pub fn ids_used(&self) -> u64 {
        self.ids.load(Ordering::Relaxed)
    }

    // ---- sending

    pub fn send(&self, xml: &str) -> Outcome {
        self.shared
            .write(xml)
            .map_err(|Failure(why)| Failure(format!("{} cannot send: {why}", self.jid)))
    }

    /// A stanza with an id of ours; returns the id.
    fn send_with_id(&self, name: &str, kind: &str, to: &str, content: &str) -> Outcome<String> {
        let id = self.next_id();
        let kind = if kind.is_empty() {
            String::new()
        } else {
            format!(" type='{kind}'")
        };
        let to = if to.is_empty() {
            String::new()
        } else {
            format!(" to='{}'", escaped(to))
        };
        self.send(&format!("<{name}{kind}{to} id='{id}'>{content}</{name}>"))?;
        Ok(id)
    }

    /// Presence to everybody who has subscribed; `content` is `<show/>`, `<status/>` and the like.
    pub fn presence(&self, content: &str) -> Outcome<String> {
        self.send_with_id("presence", "", "", content)
    }

    /// Presence of a type (`""` for available) to somebody.
    pub fn presence_to(&self, to: &str, kind: &str, content: &str) -> Outcome<String> {
        self.send_with_id("presence", kind, to, content)
    }

    /// Asks to enter a room; `history` is the number of old messages wanted.
    pub fn join(&self, room: &str, nick: &str, password: Option<&str>, history: Option<u32>) -> Outcome<String> {
        let password = password.map(|password| format!("<password>{}</password>", escaped(password)));
        let history = history.map(|count| format!("<history maxstanzas='{count}'/>"));
        let content = format!(
            "<x xmlns='{MUC}'>{}{}</x>",
            history.unwrap_or_default(),
            password.unwrap_or_default()
        );
        self.presence_to(&format!("{room}/{nick}"), "", &content)
    }

    pub fn leave(&self, room: &str, nick: &str, status: &str) -> Outcome<String> {
        let status = if status.is_empty() {
            String::new()
        } else {
            format!("<status>{}</status>", escaped(status))
        };
        self.presence_to(&format!("{room}/{nick}"), "unavailable", &status)
    }

    pub fn groupchat(&self, room: &str, body: &str) -> Outcome<String> {
        self.message(room, "groupchat", &format!("<body>{}</body>", escaped(body)))
    }

    pub fn chat(&self, to: &str, body: &str) -> Outcome<String> {
        self.message(to, "chat", &format!("<body>{}</body>", escaped(body)))
    }

    pub fn subject(&self, room: &str, subject: &str) -> Outcome<String> {
        self.message(room, "groupchat", &format!("<subject>{}</subject>", escaped(subject)))
    }

    /// A message of a type (`""` for none) with any content, as XML.
    pub fn message(&self, to: &str, kind: &str, content: &str) -> Outcome<String> {
        self.send_with_id("message", kind, to, content)
    }

    pub fn iq_get(&self, to: &str, payload: &str) -> Outcome<String> {
        self.send_with_id("iq", "get", to, payload)
    }

    pub fn iq_set(&self, to: &str, payload: &str) -> Outcome<String> {
        self.send_with_id("iq", "set", to, payload)
    }

    /// Answers a request that has come, with a result.
    pub fn iq_result(&self, request: &Stanza, payload: &str) -> Outcome {
        let (to, id) = (escaped(request.from()), escaped(request.id()));
        self.send(&format!("<iq type='result' to='{to}' id='{id}'>{payload}</iq>"))
    }

    /// Asks, and waits for the result or the error.
    pub fn ask(&self, kind: &str, to: &str, payload: &str, timeout: Duration) -> Outcome<Stanza> {
        let id = self.send_with_id("iq", kind, to, payload)?;
        self.expect(&format!("the answer to {payload}"), timeout, |stanza| {
            stanza.name() == "iq" && stanza.id() == id
        })
    }

    /// Sends a ping that only waits for whoever is asked (an error is an answer, too).
    pub fn sync(&self, to: &str) -> Outcome<String> {
        let id = format!("{SYNC_ID}{}", self.syncs.fetch_add(1, Ordering::Relaxed));
        let to_attr = escaped(to);
        self.send(&format!(
            "<iq type='get' to='{to_attr}' id='{id}'><ping xmlns='urn:xmpp:ping'/></iq>"
        ))?;
        Ok(id)
    }

    /// Waits for the answer to [`Self::sync`].
    pub fn synced(&self, id: &str, timeout: Duration) -> Outcome<Stanza> {
        self.wait(timeout, |received| received.synced.remove(id))
            .map_err(|why| Failure(format!("{}: no answer to ping {id}: {why}", self.jid)))
    }

    /// Says goodbye and goes. Dropping the client instead is a connection that breaks.
    pub fn close(mut self) -> Vec<Stanza> {
        // Whether the server still hears it does not matter any more.
        let _ = self.send("</stream:stream>");
        let _ = self.wait(Duration::from_secs(5), |received| received.closed.clone());
        self.stop();
        self.transcript()
    }

    /// Breaks the connection; what had come by then is the result.
    pub fn cut(mut self) -> Vec<Stanza> {
        self.stop();
        self.transcript()
    }

    fn stop(&mut self) {
        let _ = self
            .shared
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .shutdown(Shutdown::Both);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join(); // its panic, if any, has been printed
        }
    }

    // ---- receiving

    /// The first stanza not claimed yet that is wanted, waiting for it; it is claimed then.
    pub fn expect(&self, what: &str, timeout: Duration, wanted: impl Fn(&Stanza) -> bool) -> Outcome<Stanza> {
        self.wait(timeout, |received| received.claim(&wanted))
            .map_err(|why| self.missed(what, &why))
    }

    /// As [`Self::expect`], for what must have come already.
    pub fn take(&self, what: &str, wanted: impl Fn(&Stanza) -> bool) -> Outcome<Stanza> {
        let found = self.shared.received().claim(&wanted);
        found.ok_or_else(|| self.missed(what, "it has not come"))
    }

    /// Fails if something like this has come and was not claimed.
    pub fn expect_none(&self, what: &str, unwanted: impl Fn(&Stanza) -> bool) -> Outcome {
        match self.shared.received().claim(&unwanted) {
            Some(stanza) => Err(Failure(format!("{} received {what}: {}", self.jid, stanza.raw))),
            None => Ok(()),
        }
    }

    /// How many that have not been claimed are like this.
    pub fn count(&self, wanted: impl Fn(&Stanza) -> bool) -> usize {
        self.shared
            .received()
            .open()
            .filter(|(_, stanza)| wanted(stanza))
            .count()
    }

    /// What has come since [`Self::forget`] and was not claimed.
    pub fn unclaimed(&self) -> Vec<Stanza> {
        self.shared
            .received()
            .open()
            .map(|(_, stanza)| stanza.clone())
            .collect()
    }

    /// Everything that has come so far is of no more interest to `expect` and its like. It stays in the transcript.
    pub fn forget(&self) {
        let mut received = self.shared.received();
        received.floor = received.stanzas.len();
    }

    /// Everything that came, in order.
    pub fn transcript(&self) -> Vec<Stanza> {
        self.shared.received().stanzas.clone()
    }

    /// As [`Self::transcript`], without the first ones.
    pub fn transcript_from(&self, first: usize) -> Vec<Stanza> {
        self.shared.received().stanzas.get(first..).unwrap_or_default().to_vec()
    }

    /// When [`Stanza::at`] was zero.
    pub fn connected_at(&self) -> Instant {
        self.shared.start
    }

    /// How many stanzas came.
    pub fn received(&self) -> usize {
        self.shared.received().stanzas.len()
    }

    /// Why the connection is over, if it is.
    pub fn closed(&self) -> Option<String> {
        self.shared.received().closed.clone()
    }

    /// Waits until so much time has passed without a stanza.
    pub fn wait_quiet(&self, quiet: Duration) {
        let mut received = self.shared.received();
        let begin = Instant::now();
        loop {
            let last = received.last.map_or(begin, |last| last.max(begin));
            let left = quiet.saturating_sub(last.elapsed());
            if left.is_zero() || received.closed.is_some() {
                return;
            }
            received = self
                .shared
                .news
                .wait_timeout(received, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn wait<T>(&self, timeout: Duration, mut found: impl FnMut(&mut Received) -> Option<T>) -> Result<T, String> {
        let deadline = Instant::now() + timeout;
        let mut received = self.shared.received();
        loop {
            if let Some(value) = found(&mut received) {
                return Ok(value);
            }
            if let Some(why) = &received.closed {
                return Err(format!("the connection is over: {why}"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("not within {timeout:?}"));
            }
            received = self
                .shared
                .news
                .wait_timeout(received, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn missed(&self, what: &str, why: &str) -> Failure {
        let open = self.unclaimed();
        let shown = open.iter().rev().take(8).rev();
        let seen: String = shown.map(|stanza| format!("\n    {}", shorten(&stanza.raw))).collect();
        Failure(format!(
            "{} misses {what}: {why}; the last of {} others:{seen}",
            self.jid,
            open.len()
        ))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Received {
    fn open(&self) -> impl Iterator<Item = (usize, &Stanza)> {
        let all = self.stanzas.iter().enumerate().skip(self.floor);
        all.filter(|(at, _)| !self.claimed[*at])
    }

    fn claim(&mut self, wanted: &impl Fn(&Stanza) -> bool) -> Option<Stanza> {
        let (at, stanza) = self
            .open()
            .find(|(_, stanza)| wanted(stanza))
            .map(|(at, stanza)| (at, stanza.clone()))?;
        self.claimed[at] = true;
        Some(stanza)
    }
}

/// A long stanza, short enough for a report.
pub fn shorten(text: &str) -> String {
    /// Enough for what an ordinary stanza says.
    const SHOWN: usize = 700;
    if text.chars().count() <= SHOWN {
        return text.to_owned();
    }
    let head: String = text.chars().take(SHOWN).collect();
    format!("{head}… ({} bytes)", text.len())
}

/// A connection that is not signed in yet.
struct Start {
    tcp: TcpStream,
    domain: String,
    framer: Framer,
}

impl Start {
    fn new(tcp: TcpStream, domain: &str) -> Outcome<Self> {
        tcp.set_read_timeout(Some(SIGN_IN))?;
        Ok(Self {
            tcp,
            domain: domain.to_owned(),
            framer: Framer::new(),
        })
    }

    fn send(&mut self, xml: &str) -> Outcome {
        Ok(self.tcp.write_all(xml.as_bytes())?)
    }

    fn piece(&mut self) -> Outcome<Piece> {
        let mut chunk = [0; READ_CHUNK];
        loop {
            if let Some(piece) = self.framer.next_piece().map_err(Failure)? {
                return Ok(piece);
            }
            let count = read_some(&mut self.tcp, &mut chunk)?;
            if count == 0 {
                return Err(Failure("the server hung up".to_owned()));
            }
            self.framer.push(&chunk[..count]).map_err(Failure)?;
        }
    }

    /// Opens a stream and returns the features.
    fn open(&mut self) -> Outcome<Element> {
        self.framer = Framer::new();
        let header = format!(
            "<?xml version='1.0'?><stream:stream xmlns='jabber:client' xmlns:stream='{STREAMS}' to='{}' \
             version='1.0' xml:lang='en'>",
            escaped(&self.domain)
        );
        self.send(&header)?;
        match self.piece()? {
            Piece::Header(_) => self.element(|element| element.is(STREAMS, "features")),
            other @ (Piece::Stanza(_) | Piece::End) => Err(Failure(format!("no stream header but {other:?}"))),
        }
    }

    /// The next element, which must be the one that is wanted.
    fn element(&mut self, wanted: impl Fn(&Element) -> bool) -> Outcome<Element> {
        match self.piece()? {
            Piece::Stanza(text) => {
                let element = Element::parse(&text).map_err(Failure)?;
                if wanted(&element) {
                    Ok(element)
                } else {
                    Err(Failure(text))
                }
            }
            other @ (Piece::Header(_) | Piece::End) => Err(Failure(format!("{other:?}"))),
        }
    }

    fn into_client(self, jid: String) -> Outcome<Client> {
        self.tcp.set_read_timeout(None)?;
        let shared = Arc::new(Shared {
            received: Mutex::default(),
            news: Condvar::new(),
            writer: Mutex::new(self.tcp.try_clone()?),
            start: Instant::now(),
        });
        let (theirs, tcp, framer) = (Arc::clone(&shared), self.tcp, self.framer);
        let reader = std::thread::Builder::new().name(format!("client {jid}"));
        let reader = reader.spawn(move || {
            let why = read(&theirs, tcp, framer)
                .err()
                .map_or_else(|| "closed".to_owned(), |Failure(why)| why);
            theirs.received().closed = Some(why);
            theirs.news.notify_all();
        })?;
        Ok(Client {
            jid,
            shared,
            reader: Some(reader),
            ids: AtomicU64::new(1),
            syncs: AtomicU64::new(1),
        })
    }
}

/// Reads what is there. A socket with a read timeout is not read on by itself after a process was stopped and went on (signal(7)).
fn read_some(tcp: &mut TcpStream, chunk: &mut [u8]) -> std::io::Result<usize> {
    loop {
        match tcp.read(chunk) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Reads until the stream or the connection ends.
fn read(shared: &Shared, mut tcp: TcpStream, mut framer: Framer) -> Outcome {
    let mut chunk = [0; READ_CHUNK];
    loop {
        while let Some(piece) = framer.next_piece().map_err(Failure)? {
            match piece {
                Piece::Stanza(raw) => receive(shared, raw)?,
                Piece::Header(text) => return Err(Failure(format!("a second header: {text}"))),
                Piece::End => return Ok(()),
            }
        }
        let count = read_some(&mut tcp, &mut chunk)?;
        if count == 0 {
            return Err(Failure("the server hung up".to_owned()));
        }
        framer.push(&chunk[..count]).map_err(Failure)?;
    }
}

fn receive(shared: &Shared, raw: String) -> Outcome {
    let element = Element::parse(&raw).map_err(|why| Failure(format!("{why} in {raw}")))?;
    if element.is(STREAMS, "error") {
        return Err(Failure(raw));
    }
    let mut received = shared.received();
    let stanza = Stanza {
        order: received.stanzas.len(),
        at: shared.start.elapsed(),
        raw,
        element,
    };
    let answer = answer(&stanza, received.answers);
    if stanza.name() == "iq" && stanza.id().starts_with(SYNC_ID) && matches!(stanza.kind(), "result" | "error") {
        received.synced.insert(stanza.id().to_owned(), stanza);
    } else {
        if received.stanzas.len() == STANZAS_MAX {
            return Err(Failure(format!("more than {STANZAS_MAX} stanzas")));
        }
        received.stanzas.push(stanza);
        received.claimed.push(false);
        received.last = Some(Instant::now());
    }
    drop(received);
    shared.news.notify_all();
    answer.map_or(Ok(()), |answer| shared.write(&answer))
}

/// What a client says by itself to a request.
fn answer(request: &Stanza, answers: Answers) -> Option<String> {
    if request.name() != "iq" || !matches!(request.kind(), "get" | "set") {
        return None;
    }
    let query = request.element.child(DISCO_INFO, "query");
    let to = if request.from().is_empty() {
        String::new()
    } else {
        format!(" to='{}'", escaped(request.from()))
    };
    let id = escaped(request.id());
    match (answers, query) {
        (Answers::Nothing, _) => None,
        (Answers::Caps, Some(query)) => {
            let node = query
                .attr("node")
                .map(|node| format!(" node='{}'", escaped(node)))
                .unwrap_or_default();
            Some(format!(
                "<iq type='result'{to} id='{id}'><query xmlns='{DISCO_INFO}'{node}>{CAPS_INFO}</query></iq>"
            ))
        }
        (Answers::Refuse, _) | (Answers::Caps, None) => Some(format!(
            "<iq type='error'{to} id='{id}'><error type='cancel'><service-unavailable xmlns='{STANZAS}'/></error></iq>"
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);
    const HEADER: &str = "<?xml version='1.0'?><stream:stream xmlns='jabber:client' \
        xmlns:stream='http://etherx.jabber.org/streams' id='1' from='b.example' version='1.0'>";

    /// A server of fixed words: waits for each text, then says the next, a few bytes at a time.
    fn server(lines: Vec<(&'static str, String)>) -> (TcpStream, JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut tcp, _) = listener.accept().unwrap();
            tcp.set_nodelay(true).unwrap();
            let mut heard = String::new();
            let mut seen = 0;
            for (wait, say) in lines {
                while !heard[seen..].contains(wait) {
                    let mut chunk = [0; 1024];
                    let count = tcp.read(&mut chunk).unwrap();
                    assert_ne!(count, 0, "the client hung up before {wait}: {heard}");
                    heard.push_str(std::str::from_utf8(&chunk[..count]).unwrap());
                }
                seen += heard[seen..].find(wait).unwrap() + wait.len();
                say.as_bytes().chunks(7).for_each(|chunk| tcp.write_all(chunk).unwrap());
            }
            heard
        });
        (client, thread)
    }

    fn sign_in() -> Vec<(&'static str, String)> {
        let features = |what: &str| format!("{HEADER}<stream:features>{what}</stream:features>");
        vec![
            (
                "<stream:stream",
                features(&format!(
                    "<mechanisms xmlns='{SASL}'><mechanism>PLAIN</mechanism></mechanisms>"
                )),
            ),
            ("AGIxAHNlY3JldA==", format!("<success xmlns='{SASL}'/>")),
            (
                "<stream:stream",
                features(&format!("<bind xmlns='{BIND}'/><session xmlns='{SESSION}'/>")),
            ),
            (
                "<resource>r1</resource>",
                format!("<iq type='result' id='bind'><bind xmlns='{BIND}'><jid>b1@b.example/r1</jid></bind></iq>"),
            ),
            (SESSION, "<iq type='result' id='session'/>".to_owned()),
        ]
    }

    /// A script signs in, sends, and finds each stanza once; pings are kept apart; a request is answered only as told.
    #[test]
    fn a_script_sees_what_came_in_order_and_once() {
        let mut lines = sign_in();
        lines.push((
            "<presence id='nw.b1.r1.1'",
            "<message from='a'><body>one</body></message> \n <message from='a'><body>two</body></message>".to_owned(),
        ));
        lines.push((
            "<ping",
            "<iq type='get' from='x' id='q1'><query xmlns='urn:example'/></iq><iq type='result' id='~1'/>".to_owned(),
        ));
        lines.push((
            "<service-unavailable",
            "<message from='a'><body>two</body></message></stream:stream>".to_owned(),
        ));
        let (tcp, server) = server(lines);

        let client = Client::connect(tcp, "b1@b.example", "secret", "r1").unwrap();
        assert_eq!(
            (client.bare(), client.user(), client.resource()),
            ("b1@b.example", "b1", "r1")
        );
        client.set_answers(Answers::Refuse);
        client.presence("").unwrap();
        client
            .expect("two", PATIENCE, |stanza| stanza.body().as_deref() == Some("two"))
            .unwrap();
        client
            .take("one", |stanza| stanza.body().as_deref() == Some("one"))
            .unwrap();
        let again = client
            .take("one again", |stanza| stanza.body().as_deref() == Some("one"))
            .unwrap_err();
        assert!(again.0.contains("b1@b.example/r1 misses one again"), "{again}");

        let id = client.sync("b.example").unwrap();
        client.synced(&id, PATIENCE).unwrap();
        client
            .expect("two once more", PATIENCE, |stanza| {
                stanza.body().as_deref() == Some("two")
            })
            .unwrap();
        assert!(
            client
                .expect_none("a request", |stanza| stanza.name() == "iq" && stanza.kind() == "get")
                .is_err()
        );
        client.expect_none("anything else", |_| true).unwrap();

        let orders: Vec<usize> = client.close().iter().map(|stanza| stanza.order).collect();
        assert_eq!(orders, [0, 1, 2, 3], "three messages and the request, without the ping");
        assert!(server.join().unwrap().contains("<iq type='error' to='x' id='q1'>"));
    }

    /// Whoever waits is told at once when the connection is over, and who it was that waited in vain.
    #[test]
    fn a_lost_connection_ends_the_waiting() {
        let mut lines = sign_in();
        lines.push((
            "<presence",
            format!("<stream:error><conflict xmlns='{STANZAS}'/></stream:error>"),
        ));
        let (tcp, server) = server(lines);
        let client = Client::connect(tcp, "b1@b.example", "secret", "r1").unwrap();
        client.presence("").unwrap();
        let failure = client.expect("a message", PATIENCE, Stanza::is_message).unwrap_err();
        assert!(
            failure.0.starts_with("b1@b.example/r1 misses a message") && failure.0.contains("conflict"),
            "{failure}"
        );
        assert!(client.closed().is_some());
        server.join().unwrap();
    }

    /// A wrong password is an error that says whose.
    #[test]
    fn a_refused_sign_in_says_whose() {
        let mut lines = sign_in();
        lines.truncate(1);
        lines.push(("<auth", format!("<failure xmlns='{SASL}'><not-authorized/></failure>")));
        let (tcp, server) = server(lines);
        let failure = Client::connect(tcp, "b1@b.example", "wrong", "r1").unwrap_err();
        assert!(
            failure.0.starts_with("b1@b.example/r1 cannot sign in") && failure.0.contains("not-authorized"),
            "{failure}"
        );
        server.join().unwrap();
    }
}
