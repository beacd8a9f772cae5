//! A stream that we open towards our server, in a far domain's name (RFC 6120, the initiating entity's side).
//!
//! ```text
//! Connecting ─▶ Opening ─▶ Features ─┬─▶ StartingTls ─▶ Securing ─▶ (Opening)
//!                                    ├─▶ Authenticating ─▶ (Opening) | Dialback
//!                                    ├─▶ Dialback ──▶ Ready
//!                                    ├─▶ Enabling ──▶ Ready ─▶ Closing ─▶ Closed
//!                                    └─▶ Verifying ─────────────────────▶ Closed
//! ```
//!
//! What is kept true:
//! - No stanza is written before the server has authenticated us for the pair.
//! - Only an answer to the very question that was asked on this stream is believed (XEP-0220 §3).
//! - [`Output::Confirmed`] never covers what was not sent, and never goes back (XEP-0198).
//! - A verification always gets a verdict, before the stream is closed.
//!
//! The server is at an address that the operator configured, so it is the address that we trust: its certificate, which
//! for a server on loopback is often self-signed, is not asked to prove it.

use std::{borrow::Cow, collections::VecDeque, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};

use super::{
    Certificate, CloseReason, Site, Verdict,
    dialback::{self, Dialback},
    management::{AckError, Outbound},
    wire::{self, Markup},
};
use crate::{
    codec::xml::{Element, Node, StreamHeader, StreamItem, StreamReader, XmlError},
    stanza::{Domain, DomainPair, ns},
    time::{Deadline, Mono, Now},
};

/// What the stream is opened for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Purpose {
    Deliver,
    /// Only to ask about one dialback key, as [`receiving::Output::Verify`](super::receiving::Output::Verify) wants.
    Verify {
        request: u64,
        stream_id: String,
        key: String,
    },
}

#[derive(Clone, Debug)]
pub enum Input {
    /// The TCP connection is there (with direct TLS: give [`Input::Secured`] next).
    Connected,
    Bytes(Bytes),
    /// TLS is established; the server's certificate.
    Secured(Option<Certificate>),
    /// Complete stanzas, in order; only after [`Output::Ready`]. Ignored once the stream is being closed.
    Write(Vec<Bytes>),
    Eof,
    Drain,
    Timeout,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Output {
    Send(Bytes),
    /// Begin TLS as the client's side of it, after the sends before it are flushed.
    StartTls,
    /// Stanzas may be written. `acks`: XEP-0198 is on; `stanza_bytes_max`: XEP-0478.
    Ready {
        acks: bool,
        stanza_bytes_max: Option<usize>,
    },
    /// How many stanzas the server has acknowledged, since the beginning.
    Confirmed {
        stanzas: u64,
    },
    Verified {
        request: u64,
        verdict: Verdict,
    },
    /// Flush and close the socket. Nothing follows.
    Close(CloseReason),
}

#[derive(Debug)]
pub struct InitiatingStream {
    site: Arc<Site>,
    pair: DomainPair,
    /// The question that is not answered yet, if that is what the stream is for.
    question: Option<Question>,
    direct_tls: bool,
    tls: bool,
    authenticated: bool,
    reader: StreamReader,
    stanza_bytes_max: Option<usize>,
    since: Mono,
    state: State,
    outputs: VecDeque<Output>,
}

#[derive(Debug)]
struct Question {
    request: u64,
    stream_id: String,
    key: String,
}

#[derive(Debug)]
enum State {
    /// TCP is being connected.
    Connecting,
    /// TLS is being negotiated; no stream.
    Securing,
    /// Our header is sent, the server's is awaited.
    Opening,
    /// The server's header is there, its features are awaited.
    Features {
        header: StreamHeader,
    },
    /// `<starttls/>` is sent.
    StartingTls,
    /// `<auth/>` is sent. `dialback`: what to do if it fails.
    Authenticating {
        dialback: Option<StreamId>,
    },
    /// `<db:result/>` is sent.
    Dialback,
    /// `<enable/>` is sent.
    Enabling,
    /// `<db:verify/>` is sent.
    Verifying,
    Ready {
        management: Option<Management>,
    },
    /// Our closing tag is sent, the server's is awaited. Acknowledgements still count.
    Closing {
        management: Option<Management>,
        until: Mono,
    },
    Closed,
}

/// The id that the server gave this stream; the dialback key is bound to it.
#[derive(Clone, Debug)]
struct StreamId(String);

#[derive(Debug)]
struct Management {
    counts: Outbound,
    /// When an acknowledgement last made progress, or the first stanza since was written.
    progress: Mono,
}

/// A stream error of ours (RFC 6120 §4.9.3).
#[derive(Debug)]
struct Fault {
    condition: &'static str,
    why: Cow<'static, str>,
    /// An application-specific condition (RFC 6120 §4.9.4).
    particular: Option<Markup>,
}

impl Fault {
    fn new(condition: &'static str, why: impl Into<Cow<'static, str>>) -> Self {
        Self {
            condition,
            why: why.into(),
            particular: None,
        }
    }
}

impl From<XmlError> for Fault {
    fn from(error: XmlError) -> Self {
        Self::new(error.condition(), error.to_string())
    }
}

impl InitiatingStream {
    pub fn new(
        site: Arc<Site>,
        pair: DomainPair,
        purpose: Purpose,
        seed: [u8; 32],
        now: Now,
        direct_tls: bool,
    ) -> Self {
        // RFC 6120 §4.7.3: stream ids are the receiving entity's to give.
        let _ = seed;
        let reader = StreamReader::new(site.before_authentication);
        Self {
            site,
            pair,
            question: match purpose {
                Purpose::Deliver => None,
                Purpose::Verify {
                    request,
                    stream_id,
                    key,
                } => Some(Question {
                    request,
                    stream_id,
                    key,
                }),
            },
            direct_tls,
            tls: false,
            authenticated: false,
            reader,
            stanza_bytes_max: None,
            since: now.mono,
            state: State::Connecting,
            outputs: VecDeque::new(),
        }
    }

    pub fn handle(&mut self, input: Input, now: Now) {
        match input {
            Input::Connected => self.on_connected(),
            Input::Bytes(bytes) => self.on_bytes(&bytes, now),
            Input::Secured(_) => self.on_secured(),
            Input::Write(stanzas) => self.on_write(&stanzas, now),
            Input::Eof => self.on_eof(),
            Input::Drain => self.on_drain(now),
            Input::Timeout => self.on_timeout(now),
        }
    }

    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<Deadline> {
        match &self.state {
            State::Closed => None,
            State::Closing { until, .. } => Some(Deadline {
                at: *until,
                why: "the server's closing tag",
            }),
            State::Ready { management } => management
                .as_ref()
                .filter(|management| management.counts.outstanding() > 0)
                .map(|management| Deadline {
                    at: management.progress + ACK_MAX,
                    why: "an acknowledgement",
                }),
            State::Connecting
            | State::Securing
            | State::Opening
            | State::Features { .. }
            | State::StartingTls
            | State::Authenticating { .. }
            | State::Dialback
            | State::Enabling
            | State::Verifying => Some(Deadline {
                at: self.since + NEGOTIATION_MAX,
                why: "negotiation",
            }),
        }
    }

    fn on_connected(&mut self) {
        if let State::Connecting = self.state {
            if self.direct_tls {
                self.state = State::Securing;
            } else {
                self.open();
            }
        }
    }

    fn on_secured(&mut self) {
        if let State::Connecting | State::Securing = self.state {
            self.tls = true;
            self.open();
        }
    }

    /// Begins a stream, anew after TLS and after SASL (RFC 6120 §4.3.3).
    fn open(&mut self) {
        self.reader = StreamReader::new(if self.authenticated {
            self.site.after_authentication
        } else {
            self.site.before_authentication
        });
        self.send(wire::header(Some(&self.pair.far), Some(&self.pair.local), None));
        self.state = State::Opening;
    }

    fn on_bytes(&mut self, bytes: &[u8], now: Now) {
        match self.state.stage() {
            Stage::Over => return,
            // RFC 6120 §5.4.3.3: what comes in the clear after <proceed/> must not pass for the first words inside TLS.
            Stage::NoStream => return self.fail("bytes before the TLS handshake"),
            Stage::Stream | Stage::Closing => {}
        }
        self.reader.push(bytes);
        loop {
            let item = match self.reader.poll_item() {
                Ok(Some(item)) => item,
                Ok(None) => return,
                Err(error) => return self.fault(error.into()),
            };
            let handled = match item {
                StreamItem::Header(header) => self.on_header(header),
                StreamItem::Element(element) => self.on_element(&element, now),
                StreamItem::Close => {
                    self.on_closed_by_server();
                    Ok(())
                }
            };
            if let Err(fault) = handled {
                return self.fault(fault);
            }
            if let State::Securing | State::Closed = self.state {
                return;
            }
        }
    }

    fn on_header(&mut self, header: StreamHeader) -> Result<(), Fault> {
        let State::Opening = self.state else {
            return Err(Fault::new("bad-format", "a second stream header"));
        };
        // Judged together with the features: if the header is strange, a stream error that explains it may follow.
        self.state = State::Features { header };
        Ok(())
    }

    fn on_element(&mut self, element: &Element, now: Now) -> Result<(), Fault> {
        match (element.namespace.as_str(), element.name.as_str()) {
            // Also see-other-host: where the server is has been configured, and nobody else may say.
            (ns::STREAM, "error") => {
                self.send_raw(wire::CLOSE);
                self.close(wire::read_stream_error(element));
                Ok(())
            }
            (ns::STREAM, "features") => self.on_features(&element.node()),
            (ns::TLS, name) => self.on_tls(name),
            (ns::SASL, name) => self.on_sasl(name),
            (ns::DIALBACK, "result") => self.on_result(element),
            (ns::DIALBACK, "verify") => self.on_verify(element),
            (ns::MANAGEMENT, name) => self.on_management(name, element, now),
            // Without XEP-0288 stanzas go one way; what comes the other way has no authenticated sender.
            // RFC 6120 §4.9.3.12: "or otherwise is not authorized to perform an action".
            (ns::SERVER, _) => Err(Fault::new("not-authorized", "a stanza against the stream's direction")),
            _ => Err(Fault::new("unsupported-stanza-type", "unknown top-level element")),
        }
    }

    // ---- Features (RFC 6120 §4.3)

    fn on_features(&mut self, features: &Node) -> Result<(), Fault> {
        let State::Features { header } = &self.state else {
            // Prosody sends none unasked, and they would change nothing.
            return Ok(());
        };
        let id = self.check_header(header)?;
        let dialback = header.dialback || features.child(ns::DIALBACK_FEATURE, "dialback").is_some();
        self.stanza_bytes_max = features
            .child(ns::STREAM_LIMITS, "limits")
            .and_then(|limits| limits.child(ns::STREAM_LIMITS, "max-bytes"))
            .and_then(|bytes| bytes.text.trim_ascii().parse().ok());

        if !self.tls {
            if features.child(ns::TLS, "starttls").is_some() {
                self.send_raw("<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>");
                self.state = State::StartingTls;
                return Ok(());
            }
            if self.site.require_tls {
                return Err(Fault::new("policy-violation", "TLS is required and not offered"));
            }
        }
        if self.question.is_some() {
            return self.ask();
        }
        if self.authenticated {
            self.after_authentication(features);
            return Ok(());
        }
        if self.tls && offers_external(features) {
            let mut auth = Markup::new();
            auth.raw("<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='EXTERNAL'>");
            auth.raw(&wire::encode_authzid(&self.pair.far));
            auth.raw("</auth>");
            self.send(auth);
            self.state = State::Authenticating {
                dialback: dialback.then_some(id),
            };
            return Ok(());
        }
        if dialback {
            return self.dial_back(&id);
        }
        Err(Fault::new(
            "undefined-condition",
            "neither EXTERNAL nor dialback is offered",
        ))
    }

    fn check_header(&self, header: &StreamHeader) -> Result<StreamId, Fault> {
        if !wire::is_version_1(header.version.as_deref()) {
            return Err(Fault::new("unsupported-version", "streams before 1.0 have no TLS"));
        }
        let is = |text: &Option<String>, domain: &Domain| {
            text.as_deref()
                .is_none_or(|text| Domain::new(text).as_ref() == Ok(domain))
        };
        if !is(&header.from, &self.pair.local) || !is(&header.to, &self.pair.far) {
            return Err(Fault::new("invalid-from", "the answer is for another pair of domains"));
        }
        match header.id.as_deref() {
            Some(id) if !id.is_empty() => Ok(StreamId(id.to_owned())),
            Some(_) | None => Err(Fault::new("bad-format", "a stream without an id")),
        }
    }

    fn after_authentication(&mut self, features: &Node) {
        if self.site.use_management && features.child(ns::MANAGEMENT, "sm").is_some() {
            // Without resumption: what is not acknowledged is still in the inbox, and goes on the next stream.
            self.send_raw("<enable xmlns='urn:xmpp:sm:3'/>");
            self.state = State::Enabling;
        } else {
            self.ready(None);
        }
    }

    fn ready(&mut self, management: Option<Management>) {
        self.outputs.push_back(Output::Ready {
            acks: management.is_some(),
            stanza_bytes_max: self.stanza_bytes_max,
        });
        self.state = State::Ready { management };
    }

    /// RFC 6120 §5.4.2
    fn on_tls(&mut self, name: &str) -> Result<(), Fault> {
        match (&self.state, name) {
            (State::StartingTls, "proceed") => {
                self.check_nothing_unread()?;
                self.outputs.push_back(Output::StartTls);
                self.state = State::Securing;
            }
            (State::StartingTls, "failure") => {
                self.send_raw(wire::CLOSE);
                self.fail("the server refused to begin TLS");
            }
            _ => return Err(unexpected()),
        }
        Ok(())
    }

    /// RFC 6120 §5.4.3.3: what comes before a restart must not be taken for the first words after it.
    fn check_nothing_unread(&mut self) -> Result<(), Fault> {
        if self.reader.take_unread().trim_ascii().is_empty() {
            Ok(())
        } else {
            Err(Fault::new(
                "policy-violation",
                "more was sent before the stream could begin anew",
            ))
        }
    }

    // ---- SASL EXTERNAL (RFC 6120 §6, XEP-0178)

    fn on_sasl(&mut self, name: &str) -> Result<(), Fault> {
        let State::Authenticating { dialback } = &self.state else {
            return Err(unexpected());
        };
        match name {
            "success" => {
                self.check_nothing_unread()?;
                self.authenticated = true;
                self.open();
            }
            // A server that has not trusted the certificate may still ask back.
            "failure" => match dialback.clone() {
                Some(id) => return self.dial_back(&id),
                None => {
                    return Err(Fault::new(
                        "undefined-condition",
                        "EXTERNAL failed and dialback is not offered",
                    ));
                }
            },
            // All there is to say was said at once; it then answers with a failure (RFC 6120 §6.4.4).
            "challenge" => self.send_raw("<abort xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>"),
            _ => return Err(unexpected()),
        }
        Ok(())
    }

    // ---- Dialback (XEP-0220)

    /// We as the initiating server (§2.1.1).
    fn dial_back(&mut self, id: &StreamId) -> Result<(), Fault> {
        let Some(key) = self.site.secret.key(&self.pair.local, &self.pair.far, &id.0) else {
            return Err(Fault::new("bad-format", "a stream id that no key can be made for"));
        };
        let mut result = Markup::new();
        result.open("db:result");
        result.attribute("from", self.pair.far.as_str());
        result.attribute("to", self.pair.local.as_str());
        result.close_start();
        result.text(&key);
        result.end("db:result");
        self.send(result);
        self.state = State::Dialback;
        Ok(())
    }

    fn on_result(&mut self, element: &Element) -> Result<(), Fault> {
        let answer = read_dialback(element)?;
        let State::Dialback = self.state else {
            return Err(Fault::new("invalid-from", "a db:result that was not asked for"));
        };
        if !self.is_for_our_pair(&answer) {
            return Err(Fault::new("invalid-from", "a db:result for another pair of domains"));
        }
        match answer.answer {
            Some(Verdict::Valid) => {
                self.authenticated = true;
                self.reader.set_limits(self.site.after_authentication);
                self.ready(None);
            }
            Some(Verdict::Invalid) => {
                self.send_raw(wire::CLOSE);
                self.fail("the server says that the dialback key is not valid");
            }
            Some(Verdict::Error) => {
                let condition = answer.condition.as_deref().unwrap_or("no condition");
                let why = format!(
                    "the server could not verify the dialback key: {}",
                    wire::shown(condition)
                );
                self.send_raw(wire::CLOSE);
                self.fail(why);
            }
            None => {
                return Err(Fault::new(
                    "not-authorized",
                    "a db:result against the stream's direction",
                ));
            }
        }
        Ok(())
    }

    /// We as the receiving server, for a key that came on another stream (§2.1.2).
    fn ask(&mut self) -> Result<(), Fault> {
        let Some(question) = &self.question else {
            return Err(unexpected());
        };
        let mut verify = Markup::new();
        verify.open("db:verify");
        verify.attribute("from", self.pair.far.as_str());
        verify.attribute("to", self.pair.local.as_str());
        verify.attribute("id", &question.stream_id);
        verify.close_start();
        verify.text(&question.key);
        verify.end("db:verify");
        self.send(verify);
        self.state = State::Verifying;
        Ok(())
    }

    fn on_verify(&mut self, element: &Element) -> Result<(), Fault> {
        let verify = read_dialback(element)?;
        let Some(verdict) = verify.answer else {
            // A question. Whether the key is ours is no secret, whichever way the stream goes.
            let site = Arc::clone(&self.site);
            let answer = dialback::answer_verify(&verify, |domain| site.far.contains(domain), &site.secret);
            self.send(answer.ok_or_else(|| Fault::new("bad-format", "a db:verify without an id"))?);
            return Ok(());
        };
        let State::Verifying = self.state else {
            return Err(Fault::new("invalid-from", "a db:verify that was not asked for"));
        };
        let asked = self.question.as_ref().map(|question| question.stream_id.as_str());
        if !self.is_for_our_pair(&verify) || verify.id.as_deref() != asked {
            return Err(Fault::new("invalid-from", "a db:verify for another question"));
        }
        self.answer_question(verdict);
        self.send_raw(wire::CLOSE);
        self.close(CloseReason::Done);
        Ok(())
    }

    fn is_for_our_pair(&self, answer: &Dialback) -> bool {
        answer.from == self.pair.local && answer.to == self.pair.far
    }

    fn answer_question(&mut self, verdict: Verdict) {
        if let Some(Question { request, .. }) = self.question.take() {
            self.outputs.push_back(Output::Verified { request, verdict });
        }
    }

    // ---- Stanzas and their acknowledgements (XEP-0198)

    fn on_write(&mut self, stanzas: &[Bytes], now: Now) {
        let State::Ready { management } = &mut self.state else {
            return;
        };
        if stanzas.is_empty() {
            return;
        }
        let bytes: usize = stanzas.iter().map(Bytes::len).sum();
        let mut batch = BytesMut::with_capacity(bytes + REQUEST.len());
        for stanza in stanzas {
            batch.extend_from_slice(stanza);
        }
        if let Some(management) = management {
            if management.counts.outstanding() == 0 {
                management.progress = now.mono;
            }
            management.counts.on_sent(stanzas.len() as u64);
            // Prosody does the same: one request for what is written at once.
            batch.extend_from_slice(REQUEST.as_bytes());
        }
        self.send(batch);
    }

    fn on_management(&mut self, name: &str, element: &Element, now: Now) -> Result<(), Fault> {
        match (name, &mut self.state) {
            ("enabled", State::Enabling) => self.ready(Some(Management {
                counts: Outbound::default(),
                progress: now.mono,
            })),
            ("failed", State::Enabling) => self.ready(None),
            ("r", State::Ready { management: Some(_) }) => {
                // The server sends no stanzas this way, so none were handled.
                self.send(wire::ack(0));
            }
            (
                "r",
                State::Closing {
                    management: Some(_), ..
                },
            ) => {}
            (
                "a",
                State::Ready {
                    management: Some(management),
                }
                | State::Closing {
                    management: Some(management),
                    ..
                },
            ) => {
                let Some(h) = wire::handled_count(element) else {
                    return Err(Fault::new("bad-format", "an acknowledgement without a count"));
                };
                let before = management.counts.acked();
                let stanzas = management.counts.on_ack(h).map_err(impossible_ack)?;
                if stanzas > before {
                    management.progress = now.mono;
                    self.outputs.push_back(Output::Confirmed { stanzas });
                }
            }
            _ => {
                return Err(Fault::new(
                    "unsupported-stanza-type",
                    "stream management that is not enabled",
                ));
            }
        }
        Ok(())
    }

    // ---- The end

    fn on_drain(&mut self, now: Now) {
        match &mut self.state {
            State::Ready { management } => {
                let management = management.take();
                // The requests that were written before it are answered before the server closes.
                self.send_raw(wire::CLOSE);
                self.state = State::Closing {
                    management,
                    until: now.mono + CLOSE_MAX,
                };
            }
            State::Connecting | State::Securing => self.close(CloseReason::Drained),
            State::Opening
            | State::Features { .. }
            | State::StartingTls
            | State::Authenticating { .. }
            | State::Dialback
            | State::Enabling
            | State::Verifying => {
                // No stanza was written that could be lost: there is nothing to wait for.
                self.send_raw(wire::CLOSE);
                self.close(CloseReason::Drained);
            }
            State::Closing { .. } | State::Closed => {}
        }
    }

    fn on_closed_by_server(&mut self) {
        match self.state.stage() {
            Stage::Closing => self.close(CloseReason::Drained),
            Stage::Stream => {
                self.send_raw(wire::CLOSE);
                self.close(CloseReason::ClosedByServer);
            }
            Stage::NoStream | Stage::Over => {}
        }
    }

    fn on_eof(&mut self) {
        match self.state.stage() {
            Stage::Closing => self.close(CloseReason::Drained),
            Stage::NoStream | Stage::Stream => self.close(CloseReason::Eof),
            Stage::Over => {}
        }
    }

    fn on_timeout(&mut self, now: Now) {
        let Some(deadline) = self.poll_timeout().filter(|deadline| deadline.at <= now.mono) else {
            return;
        };
        if let Stage::Stream = self.state.stage() {
            // Before the server's header there is only our own; that is enough to close (RFC 6120 §4.4).
            self.send_raw(wire::CLOSE);
        }
        self.close(CloseReason::Timeout(deadline.why));
    }

    fn fault(&mut self, fault: Fault) {
        match self.state.stage() {
            Stage::Stream => {
                self.send(wire::stream_error(fault.condition, &fault.why, fault.particular));
                self.close(CloseReason::OurError {
                    condition: fault.condition,
                    why: fault.why,
                });
            }
            // Nothing may be written.
            Stage::NoStream | Stage::Closing => self.fail(fault.why),
            Stage::Over => {}
        }
    }

    fn fail(&mut self, why: impl Into<Cow<'static, str>>) {
        self.close(CloseReason::Failed { why: why.into() });
    }

    fn close(&mut self, reason: CloseReason) {
        // XEP-0220 §2.1.2: a connection that ends first is an error of the verification.
        self.answer_question(Verdict::Error);
        self.state = State::Closed;
        self.outputs.push_back(Output::Close(reason));
    }

    /// After our closing tag nothing is sent (RFC 6120 §4.4), whatever is still read.
    fn send(&mut self, markup: impl Into<Bytes>) {
        if !matches!(self.state, State::Closing { .. }) {
            self.outputs.push_back(Output::Send(markup.into()));
        }
    }

    fn send_raw(&mut self, markup: &'static str) {
        self.send(Bytes::from_static(markup.as_bytes()));
    }
}

impl State {
    fn stage(&self) -> Stage {
        match self {
            Self::Connecting | Self::Securing => Stage::NoStream,
            Self::Opening
            | Self::Features { .. }
            | Self::StartingTls
            | Self::Authenticating { .. }
            | Self::Dialback
            | Self::Enabling
            | Self::Verifying
            | Self::Ready { .. } => Stage::Stream,
            Self::Closing { .. } => Stage::Closing,
            Self::Closed => Stage::Over,
        }
    }
}

/// What may be written.
enum Stage {
    /// Nothing yet.
    NoStream,
    /// Anything, as our header is out.
    Stream,
    /// Nothing more, as our closing tag is out; what comes is still read.
    Closing,
    Over,
}

fn offers_external(features: &Node) -> bool {
    features.child(ns::SASL, "mechanisms").is_some_and(|mechanisms| {
        mechanisms
            .children
            .iter()
            .any(|mechanism| mechanism.name == "mechanism" && mechanism.text.trim_ascii() == "EXTERNAL")
    })
}

fn read_dialback(element: &Element) -> Result<Dialback, Fault> {
    Dialback::read(&element.node()).ok_or_else(|| Fault::new("improper-addressing", "dialback without from or to"))
}

fn unexpected() -> Fault {
    Fault::new("unsupported-stanza-type", "an element that is not expected now")
}

/// XEP-0198 §6: an `h` that is too high ends the stream, and there is a condition for it. One that goes back
/// takes back what we have let go of.
fn impossible_ack(error: AckError) -> Fault {
    let particular = match error {
        AckError::TooHigh { h, sent } => {
            let mut condition = Markup::new();
            condition.open("handled-count-too-high");
            condition.attribute("xmlns", ns::MANAGEMENT);
            condition.attribute("h", &h.to_string());
            condition.attribute("send-count", &sent.to_string());
            condition.close_empty();
            Some(condition)
        }
        AckError::Regressed { .. } => None,
    };
    Fault {
        condition: "undefined-condition",
        why: error.to_string().into(),
        particular,
    }
}

/// Ends each batch.
const REQUEST: &str = "<r xmlns='urn:xmpp:sm:3'/>";
/// From the attempt to connect to being ready. The server is near; what takes time is its own dialback to us, and DNS.
const NEGOTIATION_MAX: Duration = Duration::from_secs(30);
/// Without any progress of the count. Prosody as shipped takes 30 kB/s, so this is 18 MB in one batch.
const ACK_MAX: Duration = Duration::from_secs(600);
/// The server has to read what our socket holds, at Prosody's 30 kB/s, before it sees the closing tag.
const CLOSE_MAX: Duration = Duration::from_secs(30);
