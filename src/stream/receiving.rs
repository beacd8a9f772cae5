//! A stream that our server opened towards a far domain (RFC 6120, the receiving entity's side).
//!
//! ```text
//! Securing ─▶ Opening ─▶ Open ─▶ Finishing ─▶ Closing ─▶ Closed
//!    ▲           ▲        │ │        │                      ▲
//!    └─ STARTTLS ┼────────┘ │        └──── errors ──────────┤
//!                └─── SASL ─┘                               │
//!                       every state: Eof, a broken bound ───┘
//! ```
//!
//! What is kept true:
//! - A stanza is given out only if the domain in its `from` was proved on this very stream, and its `to` is a far domain.
//! - No count goes to the server that covers a stanza which is not on disk (XEP-0198).
//! - An answer to a dialback question that we did not ask on this stream is never believed (XEP-0220 §3).
//! - Once the server is authenticated, nothing but its own fault or our shutdown makes us close: a MUC takes what cannot
//!   be delivered for an occupant who is gone.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, VecDeque},
    mem,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;

use super::{
    Certificate, CloseReason, Method, Site, Verdict,
    dialback::{self, Answer, Dialback},
    management::Inbound,
    wire::{self, Markup, StreamIds},
};
use crate::{
    codec::xml::{Element, StreamHeader, StreamItem, StreamReader, XmlError},
    stanza::{Domain, DomainPair, Stanza, StanzaError, domain_of, ns},
    time::{Deadline, Mono, Now},
};

#[derive(Clone, Debug)]
pub enum Input {
    Bytes(Bytes),
    /// TLS is established: after [`Output::StartTls`], or at once with direct TLS. The server's certificate, if it sent
    /// one.
    Secured(Option<Certificate>),
    /// The answer to [`Output::Verify`].
    Verdict {
        request: u64,
        verdict: Verdict,
    },
    /// Stanzas 1..=upto of this stream are on disk.
    Committed {
        upto: u64,
    },
    /// The connection ended.
    Eof,
    /// Close gracefully: `</stream:stream>`, then read on until the server closes.
    Drain,
    Timeout,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Output {
    Send(Bytes),
    /// Begin TLS as the server's side of it, after the sends before it are flushed.
    StartTls,
    /// Ask the authoritative server (ours) about this key, over a connection of its own.
    Verify {
        request: u64,
        pair: DomainPair,
        stream_id: String,
        key: String,
    },
    Authenticated {
        pair: DomainPair,
        how: Method,
    },
    /// `n` counts from 1; `from` and `to` are checked, and `pair` is theirs.
    Stanza {
        n: u64,
        pair: DomainPair,
        stanza: Stanza,
    },
    /// Flush and close the socket. Nothing follows.
    Close(CloseReason),
}

#[derive(Debug)]
pub struct ReceivingStream {
    site: Arc<Site>,
    ids: StreamIds,
    reader: StreamReader,
    security: Security,
    sasl: Sasl,
    /// The server's domains that were proved on this stream, by either method.
    proved: BTreeSet<Domain>,
    /// `<db:result/>`s that wait for their verdict.
    verifications: BTreeMap<u64, DomainPair>,
    requests: u64,
    management: Option<Inbound>,
    received: u64,
    committed: u64,
    /// The addresses of the last stanza as written, and what they came to: copies to a room's occupants mostly repeat.
    last_pair: Option<(String, String, DomainPair)>,
    since: Mono,
    state: State,
    outputs: VecDeque<Output>,
}

#[derive(Debug)]
enum Security {
    Clear,
    /// The server's certificate, if it sent one.
    Tls(Option<Certificate>),
}

/// How far SASL has come on this connection.
#[derive(Debug)]
enum Sasl {
    /// So many attempts have failed.
    Open { failures: u32 },
    /// We asked for the authorization identity that `<auth/>` did not bring.
    Challenged { failures: u32 },
    /// This domain was proved; every later header must name it.
    Done { from: Domain },
}

#[derive(Debug)]
enum State {
    /// TLS is being negotiated; no stream.
    Securing,
    /// The server's stream header is awaited.
    Opening,
    Open(Open),
    /// The stream has ended for us, but stanzas of it are on their way to disk: acknowledge them first, or the server
    /// takes them for lost.
    Finishing {
        open: Open,
        ending: Ending,
        until: Mono,
    },
    /// Our closing tag is sent, the server's is awaited.
    Closing {
        until: Mono,
    },
    Closed,
}

/// What the two headers said.
#[derive(Clone, Debug)]
struct Open {
    /// Whom the server says it is; nothing is proved by that.
    from: Option<Domain>,
    /// Whom it wants.
    to: Domain,
    id: String,
    external_offered: bool,
    management_offered: bool,
}

/// How a stream ends, once nothing is left to wait for.
#[derive(Clone, Debug)]
enum Ending {
    Drain,
    ClosedByServer,
    Fault(Fault),
}

/// A stream error of ours (RFC 6120 §4.9.3).
#[derive(Clone, Debug)]
struct Fault {
    condition: &'static str,
    why: Cow<'static, str>,
}

impl Fault {
    fn new(condition: &'static str, why: impl Into<Cow<'static, str>>) -> Self {
        Self {
            condition,
            why: why.into(),
        }
    }
}

impl From<XmlError> for Fault {
    fn from(error: XmlError) -> Self {
        Self::new(error.condition(), error.to_string())
    }
}

impl ReceivingStream {
    /// `seed` is for stream ids, and must not be used again.
    pub fn new(site: Arc<Site>, seed: [u8; 32], now: Now, direct_tls: bool) -> Self {
        let reader = StreamReader::new(site.before_authentication);
        Self {
            site,
            ids: StreamIds::new(seed),
            reader,
            security: Security::Clear,
            sasl: Sasl::Open { failures: 0 },
            proved: BTreeSet::new(),
            verifications: BTreeMap::new(),
            requests: 0,
            management: None,
            received: 0,
            committed: 0,
            last_pair: None,
            since: now.mono,
            state: if direct_tls { State::Securing } else { State::Opening },
            outputs: VecDeque::new(),
        }
    }

    pub fn handle(&mut self, input: Input, now: Now) {
        match input {
            Input::Bytes(bytes) => self.on_bytes(&bytes, now),
            Input::Secured(certificate) => self.on_secured(certificate),
            Input::Verdict { request, verdict } => self.on_verdict(request, verdict, now),
            Input::Committed { upto } => self.on_committed(upto, now),
            Input::Eof => self.on_eof(now),
            Input::Drain => self.on_drain(now),
            Input::Timeout => self.on_timeout(now),
        }
    }

    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<Deadline> {
        let negotiation = Deadline {
            at: self.since + NEGOTIATION_MAX,
            why: "authentication",
        };
        match &self.state {
            State::Closed => None,
            State::Finishing { until, .. } => Some(Deadline {
                at: *until,
                why: "commit before closing",
            }),
            State::Closing { until, .. } => Some(Deadline {
                at: *until,
                why: "the server's closing tag",
            }),
            State::Securing | State::Opening => Some(negotiation),
            State::Open(_) if self.proved.is_empty() => Some(negotiation),
            // An idle stream is left open: closing it with a stanza on its way loses that stanza, and costs an
            // ejabberd that cannot reconnect at once up to 300 s of bouncing. The server closes it when it wants.
            State::Open(_) => None,
        }
    }

    fn on_bytes(&mut self, bytes: &[u8], now: Now) {
        match self.state {
            // What comes in the clear between <proceed/> and the handshake is not the server's, or soon will not be
            // trusted to be: it must not be taken for the first words inside TLS.
            State::Securing => {
                return self.close(CloseReason::Failed {
                    why: "bytes before the TLS handshake".into(),
                });
            }
            State::Closed
            | State::Finishing {
                ending: Ending::ClosedByServer | Ending::Fault(_),
                ..
            } => return,
            State::Opening | State::Open(_) | State::Finishing { .. } | State::Closing { .. } => {}
        }
        self.reader.push(bytes);
        loop {
            let item = match self.reader.poll_item() {
                Ok(Some(item)) => item,
                Ok(None) => return,
                Err(error) => return self.fault(error.into(), now),
            };
            let handled = match item {
                StreamItem::Header(header) => self.on_header(header),
                StreamItem::Element(element) => self.on_element(element, now),
                StreamItem::Close => {
                    self.on_closed_by_server(now);
                    Ok(())
                }
            };
            if let Err(fault) = handled {
                return self.fault(fault, now);
            }
            if let State::Securing
            | State::Closed
            | State::Finishing {
                ending: Ending::ClosedByServer,
                ..
            } = self.state
            {
                return;
            }
        }
    }

    fn on_secured(&mut self, certificate: Option<Certificate>) {
        if let State::Securing = self.state {
            self.security = Security::Tls(certificate);
            self.restart();
        }
    }

    /// RFC 6120 §4.3.3: after TLS and after SASL everything that was known of the stream is forgotten.
    fn restart(&mut self) {
        self.reader = StreamReader::new(if self.proved.is_empty() {
            self.site.before_authentication
        } else {
            self.site.after_authentication
        });
        self.state = State::Opening;
    }

    // ---- Stream header and features (RFC 6120 §4.3, §4.7)

    fn on_header(&mut self, header: StreamHeader) -> Result<(), Fault> {
        let State::Opening = self.state else {
            return Err(Fault::new("bad-format", "a second stream header"));
        };
        let open = self.check_header(&header);
        let to = header.from.as_deref().and_then(|from| Domain::new(from).ok());
        let id = self.ids.next();
        match open {
            Ok((from, to_domain)) => {
                let open = Open {
                    external_offered: self.offers_external(from.as_ref()),
                    management_offered: self.site.offer_management && matches!(self.sasl, Sasl::Done { .. }),
                    from,
                    to: to_domain,
                    id,
                };
                let mut answer = wire::header(Some(&open.to), open.from.as_ref(), Some(&open.id));
                self.write_features(&open, &mut answer);
                self.send(answer);
                self.state = State::Open(open);
                Ok(())
            }
            Err(fault) => {
                // RFC 6120 §4.9.1.2: even then our header goes before the error. It names only what is ours.
                let far = header.to.as_deref().and_then(|to| Domain::new(to).ok());
                let far = far.filter(|far| self.site.far.contains(far));
                self.send(wire::header(far.as_ref(), to.as_ref(), Some(&id)));
                self.close_with(fault);
                Ok(())
            }
        }
    }

    fn check_header(&self, header: &StreamHeader) -> Result<(Option<Domain>, Domain), Fault> {
        let to = match header.to.as_deref().map(Domain::new) {
            Some(Ok(to)) if self.site.far.contains(&to) => to,
            Some(Ok(to)) => return Err(Fault::new("host-unknown", format!("{to} is not a domain of a peer"))),
            Some(Err(_)) | None => return Err(Fault::new("host-unknown", "the stream header names no domain")),
        };
        if !wire::is_version_1(header.version.as_deref()) {
            return Err(Fault::new("unsupported-version", "streams before 1.0 have no TLS"));
        }
        // RFC 6120 §4.7.1 wants `from` between servers; without one only dialback is left, which names the domain itself.
        let from = match header.from.as_deref().map(Domain::new) {
            None => None,
            Some(Ok(from)) if self.site.local.contains(&from) => Some(from),
            Some(Ok(from)) => {
                return Err(Fault::new(
                    "invalid-from",
                    format!("{from} is not a domain of this site"),
                ));
            }
            Some(Err(_)) => return Err(Fault::new("improper-addressing", "from is not a domain")),
        };
        match (&self.sasl, &from) {
            (Sasl::Done { from: proved }, Some(from)) if from != proved => Err(Fault::new(
                "invalid-from",
                "from is not the domain that was authenticated",
            )),
            (Sasl::Done { from: proved }, None) => Ok((Some(proved.clone()), to)),
            (Sasl::Done { .. } | Sasl::Open { .. } | Sasl::Challenged { .. }, _) => Ok((from, to)),
        }
    }

    /// XEP-0178 §3: EXTERNAL is offered to whom it can succeed for. ejabberd tries it whenever it is offered.
    fn offers_external(&self, from: Option<&Domain>) -> bool {
        let (Security::Tls(Some(certificate)), Some(from)) = (&self.security, from) else {
            return false;
        };
        !matches!(self.sasl, Sasl::Done { .. }) && certificate.trusted && certificate.proves(from)
    }

    fn write_features(&self, open: &Open, out: &mut Markup) {
        out.raw("<stream:features>");
        let tls = matches!(self.security, Security::Tls(_));
        if !tls && self.site.require_tls {
            // RFC 6120 §5.3.1: where TLS is mandatory nothing else is offered before it.
            out.raw("<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'><required/></starttls>");
        } else {
            if !tls {
                out.empty("starttls", ns::TLS);
            }
            if open.external_offered {
                out.raw("<mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>");
                out.raw("<mechanism>EXTERNAL</mechanism></mechanisms>");
            }
            // Also after authentication: a server may bring more of its domains (XEP-0220 §2.6).
            out.raw("<dialback xmlns='urn:xmpp:features:dialback'><errors/></dialback>");
        }
        if let Sasl::Done { .. } = self.sasl {
            if open.management_offered {
                out.empty("sm", ns::MANAGEMENT);
            }
            // XEP-0478. No idle-seconds: we do not end idle streams.
            out.raw("<limits xmlns='urn:xmpp:stream-limits:0'><max-bytes>");
            out.text(&self.site.after_authentication.stanza_bytes_max.to_string());
            out.raw("</max-bytes></limits>");
        }
        // Never XEP-0288: neither server uses it as shipped, and one direction per stream is easier to account for.
        out.raw("</stream:features>");
    }

    // ---- Elements

    fn on_element(&mut self, element: Element, now: Now) -> Result<(), Fault> {
        let tls = matches!(self.security, Security::Tls(_));
        match (element.namespace.as_str(), element.name.as_str()) {
            (ns::STREAM, "error") => {
                self.send_raw(wire::CLOSE);
                self.close(wire::read_stream_error(&element));
                return Ok(());
            }
            (ns::TLS, "starttls") => return self.on_starttls(tls),
            _ if !tls && self.site.require_tls => return Err(Fault::new("policy-violation", "TLS is required")),
            // Also after our closing tag: what was on its way is not lost (RFC 6120 §4.4).
            (ns::SERVER, "message" | "presence" | "iq") => return self.on_stanza(element.bytes),
            _ => {}
        }
        let open = match &self.state {
            State::Open(open) | State::Finishing { open, .. } => open.clone(),
            // The reader gives a header before any element; and what cannot be answered is not looked at.
            State::Securing | State::Opening | State::Closing { .. } | State::Closed => return Ok(()),
        };
        match (element.namespace.as_str(), element.name.as_str()) {
            (ns::MANAGEMENT, name) => self.on_management(name, &element, &open),
            (ns::DIALBACK, "result") => self.on_result(&element, &open),
            (ns::DIALBACK, "verify") => self.on_verify(&element),
            (ns::SASL, name) => self.on_sasl(name, &element, &open, now),
            // XEP-0288 §2.2: it is for after an offer, and there was none; so it means nothing here.
            (ns::BIDI, "bidi") => Ok(()),
            _ => Err(Fault::new("unsupported-stanza-type", "unknown top-level element")),
        }
    }

    /// RFC 6120 §5.4.2
    fn on_starttls(&mut self, tls: bool) -> Result<(), Fault> {
        let State::Open(_) = self.state else {
            return Ok(());
        };
        if tls || !self.proved.is_empty() {
            self.send_raw("<failure xmlns='urn:ietf:params:xml:ns:xmpp-tls'/></stream:stream>");
            self.close(CloseReason::Failed {
                why: "STARTTLS on a stream that is past it".into(),
            });
            return Ok(());
        }
        self.check_nothing_unread()?;
        self.send_raw("<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>");
        self.outputs.push_back(Output::StartTls);
        // What was asked in the clear is not answered inside TLS.
        self.verifications.clear();
        self.state = State::Securing;
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

    // ---- Stanzas (RFC 6120 §8.1, §10)

    fn on_stanza(&mut self, bytes: Bytes) -> Result<(), Fault> {
        if self.proved.is_empty() {
            return Err(Fault::new("not-authorized", "a stanza before authentication"));
        }
        let stanza = Stanza::parse(bytes).map_err(|error| match error {
            StanzaError::NotAStanza => Fault::new("unsupported-stanza-type", "not a stanza"),
            StanzaError::Malformed => Fault::new("bad-format", "a stanza that cannot be read"),
        })?;
        let pair = self.pair_of(&stanza)?;
        self.received += 1;
        self.outputs.push_back(Output::Stanza {
            n: self.received,
            pair,
            stanza,
        });
        Ok(())
    }

    /// RFC 6120 §8.1.1.2 and §8.1.2.2: between servers both addresses are there, and `from` is of a validated domain.
    fn pair_of(&mut self, stanza: &Stanza) -> Result<DomainPair, Fault> {
        let (Some(from), Some(to)) = (stanza.from(), stanza.to()) else {
            return Err(Fault::new("improper-addressing", "a stanza without from or to"));
        };
        let (from, to) = (domain_of(&from), domain_of(&to));
        if let Some((last_from, last_to, pair)) = &self.last_pair
            && last_from == from
            && last_to == to
        {
            return Ok(pair.clone());
        }
        let local = Domain::new(from).map_err(|_| Fault::new("invalid-from", "from is not an address"))?;
        if !self.proved.contains(&local) {
            let why = format!("{local} is not authenticated on this stream");
            return Err(Fault::new("invalid-from", why));
        }
        let far = Domain::new(to).map_err(|_| Fault::new("improper-addressing", "to is not an address"))?;
        // Not only the pairs that were negotiated: who sends is proved, and all far domains are equally ours. Prosody
        // and ejabberd take it the same way.
        if !self.site.far.contains(&far) {
            return Err(Fault::new("host-unknown", format!("{far} is not a domain of a peer")));
        }
        let pair = DomainPair { local, far };
        self.last_pair = Some((from.to_owned(), to.to_owned(), pair.clone()));
        Ok(pair)
    }

    // ---- SASL EXTERNAL (RFC 6120 §6, XEP-0178)

    fn on_sasl(&mut self, name: &str, element: &Element, open: &Open, now: Now) -> Result<(), Fault> {
        match (&self.sasl, name) {
            (Sasl::Done { .. }, _) => Err(Fault::new("policy-violation", "SASL after its success")),
            (Sasl::Open { .. }, "auth") => {
                let node = element.node();
                if !open.external_offered || node.attribute("mechanism") != Some("EXTERNAL") {
                    self.sasl_failed("invalid-mechanism", now)
                } else if node.text.is_empty() {
                    self.sasl = Sasl::Challenged {
                        failures: self.sasl.failures(),
                    };
                    self.send_raw("<challenge xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>");
                    Ok(())
                } else {
                    self.authorize(&node.text, open, now)
                }
            }
            (Sasl::Challenged { .. }, "response") => self.authorize(&element.node().text, open, now),
            (Sasl::Challenged { .. }, "abort") => self.sasl_failed("aborted", now),
            (Sasl::Open { .. } | Sasl::Challenged { .. }, _) => self.sasl_failed("malformed-request", now),
        }
    }

    fn authorize(&mut self, authzid: &str, open: &Open, now: Now) -> Result<(), Fault> {
        let Some(authzid) = wire::decode_authzid(authzid) else {
            return self.sasl_failed("incorrect-encoding", now);
        };
        let Some(from) = &open.from else {
            return self.sasl_failed("not-authorized", now);
        };
        // EXTERNAL was offered because the certificate proves the header's `from`; it proves nothing else here.
        if !authzid.is_empty() && Domain::new(&authzid).as_ref() != Ok(from) {
            return self.sasl_failed("invalid-authzid", now);
        }
        self.check_nothing_unread()?;
        let pair = DomainPair {
            local: from.clone(),
            far: open.to.clone(),
        };
        self.sasl = Sasl::Done { from: from.clone() };
        self.prove(pair, Method::External);
        self.send_raw("<success xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>");
        // A verdict that comes later would be about a stream id that is no longer this stream's.
        self.verifications.clear();
        self.restart();
        Ok(())
    }

    /// RFC 6120 §6.4.5: the server may try again, "at least 2 and no more than 5" times, or use dialback.
    fn sasl_failed(&mut self, condition: &str, now: Now) -> Result<(), Fault> {
        let mut failure = Markup::new();
        failure.raw("<failure xmlns='urn:ietf:params:xml:ns:xmpp-sasl'><");
        failure.raw(condition);
        failure.raw("/></failure>");
        self.send(failure);
        let failures = self.sasl.failures() + 1;
        self.sasl = Sasl::Open { failures };
        if failures > SASL_RETRIES_MAX {
            self.fault(Fault::new("policy-violation", "too many attempts to authenticate"), now);
        }
        Ok(())
    }

    fn prove(&mut self, pair: DomainPair, how: Method) {
        self.proved.insert(pair.local.clone());
        self.outputs.push_back(Output::Authenticated { pair, how });
    }

    // ---- Dialback (XEP-0220)

    /// We as the receiving server: the server proves a domain with a key (§2.2.1).
    fn on_result(&mut self, element: &Element, open: &Open) -> Result<(), Fault> {
        let request = read_dialback(element)?;
        if request.answer.is_some() {
            // §3: believing one would let anybody speak for any domain.
            return Err(Fault::new(
                "invalid-from",
                "an answer to a db:result that we did not send",
            ));
        }
        let refuse = |condition| dialback::result_answer(&request.to, &request.from, Answer::Error(condition));
        if !self.site.far.contains(&request.to) {
            self.send(refuse("item-not-found"));
            return Ok(());
        }
        if !self.site.local.contains(&request.from) {
            // Only our own server is asked, and it does not speak for this domain.
            self.send(refuse("not-acceptable"));
            return Ok(());
        }
        if self.verifications.len() >= VERIFICATIONS_MAX {
            self.send(refuse("resource-constraint"));
            return Ok(());
        }
        let pair = DomainPair {
            local: request.from,
            far: request.to,
        };
        if self.verifications.values().any(|asked| *asked == pair) {
            // Asked already: that answer will be this one's too.
            return Ok(());
        }
        self.requests += 1;
        self.verifications.insert(self.requests, pair.clone());
        self.outputs.push_back(Output::Verify {
            request: self.requests,
            pair,
            stream_id: open.id.clone(),
            key: request.key,
        });
        Ok(())
    }

    fn on_verdict(&mut self, request: u64, verdict: Verdict, now: Now) {
        // A stream that has ended or begun anew meanwhile has no use for it.
        let Some(pair) = self.verifications.remove(&request) else {
            return;
        };
        let State::Open(_) = self.state else {
            return;
        };
        let answer = |answer| dialback::result_answer(&pair.far, &pair.local, answer);
        match verdict {
            Verdict::Valid => {
                self.send(answer(Answer::Valid));
                // From here on stanzas may come, but only in elements that have not begun yet.
                self.reader.set_limits(self.site.after_authentication);
                self.prove(pair, Method::Dialback);
            }
            // §2.1.2: "might send a dialback error such as <forbidden/>" where closing would take others with it.
            Verdict::Invalid if !self.proved.is_empty() => self.send(answer(Answer::Error("forbidden"))),
            Verdict::Invalid => {
                self.send(answer(Answer::Invalid));
                // §2.2.1: "MUST close the XML stream".
                self.fault(Fault::new("not-authorized", "the dialback key is not valid"), now);
            }
            // §2.5: "MUST send a <remote-server-not-found/> dialback error".
            Verdict::Error => self.send(answer(Answer::Error("remote-server-not-found"))),
        }
    }

    /// We as the authoritative server: was this key made by us, for a far domain? (§2.2.2) No authentication is needed
    /// to ask: ejabberd opens a connection for the question alone.
    fn on_verify(&mut self, element: &Element) -> Result<(), Fault> {
        let request = read_dialback(element)?;
        if request.answer.is_some() {
            return Err(Fault::new(
                "invalid-from",
                "an answer to a db:verify that we did not send",
            ));
        }
        let answer = dialback::answer_verify(&request, |domain| self.site.far.contains(domain), &self.site.secret);
        match answer {
            Some(answer) => self.send(answer),
            None => return Err(Fault::new("bad-format", "a db:verify without an id")),
        }
        Ok(())
    }

    // ---- Stream management (XEP-0198)

    fn on_management(&mut self, name: &str, element: &Element, open: &Open) -> Result<(), Fault> {
        match (name, &mut self.management) {
            ("enable", None) if open.management_offered => {
                self.management = Some(Inbound::new(self.received, self.committed));
                // Whatever `resume` says: without the attribute in the answer there is no resumption (§3).
                self.send_raw("<enabled xmlns='urn:xmpp:sm:3'/>");
            }
            // Not offered, or twice.
            ("enable", _) => self.management_failed("unexpected-request"),
            ("resume", _) => self.management_failed("feature-not-implemented"),
            ("r", Some(management)) => {
                if let Some(h) = management.on_request(self.received) {
                    self.send(wire::ack(h));
                }
            }
            ("a", Some(_)) => match wire::handled_count(element) {
                // Nothing was sent this way, so nothing can have been handled.
                Some(0) => {}
                Some(_) => {
                    return Err(Fault::new(
                        "undefined-condition",
                        "an acknowledgement of what was not sent",
                    ));
                }
                None => return Err(Fault::new("bad-format", "an acknowledgement without a count")),
            },
            _ => {
                return Err(Fault::new(
                    "unsupported-stanza-type",
                    "stream management that is not enabled",
                ));
            }
        }
        Ok(())
    }

    fn management_failed(&mut self, condition: &str) {
        let mut failed = Markup::new();
        failed.raw("<failed xmlns='urn:xmpp:sm:3'>");
        failed.empty(condition, ns::STANZA_ERRORS);
        failed.raw("</failed>");
        self.send(failed);
    }

    fn on_committed(&mut self, upto: u64, now: Now) {
        assert!(upto <= self.received, "what was not received cannot be on disk");
        self.committed = self.committed.max(upto);
        let h = self
            .management
            .as_mut()
            .and_then(|management| management.on_committed(upto));
        match &self.state {
            State::Open(_) | State::Finishing { .. } => {
                if let Some(h) = h {
                    self.send(wire::ack(h));
                }
            }
            State::Securing | State::Opening | State::Closing { .. } | State::Closed => {}
        }
        if self.committed == self.received {
            self.finished(now);
        }
    }

    // ---- The end

    fn on_drain(&mut self, now: Now) {
        match &self.state {
            State::Open(_) => self.end(Ending::Drain, now),
            // There is no stream that could be closed.
            State::Securing | State::Opening => self.close(CloseReason::Drained),
            State::Finishing { .. } | State::Closing { .. } | State::Closed => {}
        }
    }

    fn on_closed_by_server(&mut self, now: Now) {
        match &self.state {
            State::Closing { .. } => self.close(CloseReason::Drained),
            State::Open(_) | State::Finishing { .. } => self.end(Ending::ClosedByServer, now),
            State::Securing | State::Opening | State::Closed => {}
        }
    }

    fn on_eof(&mut self, now: Now) {
        match &self.state {
            State::Closed => {}
            State::Closing { .. } => self.close(CloseReason::Drained),
            State::Finishing { ending, .. } => {
                let drained = matches!(ending, Ending::Drain);
                // The server may still read what is known by now, but is not waited for.
                self.finished(now);
                if drained {
                    self.close(CloseReason::Drained);
                }
            }
            State::Securing | State::Opening | State::Open(_) => self.close(CloseReason::Eof),
        }
    }

    fn on_timeout(&mut self, now: Now) {
        let Some(deadline) = self.poll_timeout().filter(|deadline| deadline.at <= now.mono) else {
            return;
        };
        match &self.state {
            State::Finishing { .. } => self.finished(now),
            State::Opening | State::Open(_) => {
                self.fault(Fault::new("connection-timeout", "not authenticated in time"), now)
            }
            State::Securing | State::Closing { .. } => self.close(CloseReason::Timeout(deadline.why)),
            State::Closed => {}
        }
    }

    fn fault(&mut self, fault: Fault, now: Now) {
        match &self.state {
            State::Open(_) | State::Finishing { .. } => self.end(Ending::Fault(fault), now),
            State::Opening => {
                // RFC 6120 §4.9.1.2: the error comes inside a stream.
                let id = self.ids.next();
                self.send(wire::header(None, None, Some(&id)));
                self.close_with(fault);
            }
            // Our closing tag is out: nothing may follow it.
            State::Closing { .. } | State::Securing => {
                self.close(CloseReason::Failed { why: fault.why });
            }
            State::Closed => {}
        }
    }

    /// Ends the stream; at once, or when what was received is on disk and can be acknowledged.
    fn end(&mut self, ending: Ending, now: Now) {
        let state = mem::replace(&mut self.state, State::Closed);
        let (open, until) = match state {
            State::Open(open) => (open, now.mono + FINISH_MAX),
            State::Finishing { open, until, .. } => (open, until),
            state @ (State::Securing | State::Opening | State::Closing { .. } | State::Closed) => {
                self.state = state;
                return;
            }
        };
        self.state = State::Finishing { open, ending, until };
        if self.management.is_none() || self.committed == self.received {
            self.finished(now);
        }
    }

    /// Carries the ending out, if there is one.
    fn finished(&mut self, now: Now) {
        let state = mem::replace(&mut self.state, State::Closed);
        let State::Finishing { ending, .. } = state else {
            self.state = state;
            return;
        };
        if let Some(h) = self.management.as_mut().and_then(Inbound::on_close) {
            self.send(wire::ack(h));
        }
        match ending {
            Ending::Drain => {
                self.send_raw(wire::CLOSE);
                self.state = State::Closing {
                    until: now.mono + CLOSE_MAX,
                };
            }
            Ending::ClosedByServer => {
                self.send_raw(wire::CLOSE);
                self.close(CloseReason::ClosedByServer);
            }
            Ending::Fault(fault) => self.close_with(fault),
        }
    }

    fn close_with(&mut self, fault: Fault) {
        self.send(wire::stream_error(fault.condition, &fault.why, None));
        self.close(CloseReason::OurError {
            condition: fault.condition,
            why: fault.why,
        });
    }

    fn close(&mut self, reason: CloseReason) {
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

impl Sasl {
    fn failures(&self) -> u32 {
        match self {
            Self::Open { failures } | Self::Challenged { failures } => *failures,
            Self::Done { .. } => 0,
        }
    }
}

fn read_dialback(element: &Element) -> Result<Dialback, Fault> {
    Dialback::read(&element.node()).ok_or_else(|| Fault::new("improper-addressing", "dialback without from or to"))
}

/// From the connection to the first proved domain, dialback included. ejabberd gives up after 30 s and Prosody after
/// 90 s; a verification over a connection of its own may take 30 s of ours.
const NEGOTIATION_MAX: Duration = Duration::from_secs(60);
/// A commit takes milliseconds, or the disk is in trouble. Prosody waits 5 s for our closing tag.
const FINISH_MAX: Duration = Duration::from_secs(3);
/// The server is on the same machine or network; what it still has to send is what its socket holds.
const CLOSE_MAX: Duration = Duration::from_secs(10);
/// Four attempts in all: a server that does not know by then will not learn it.
const SASL_RETRIES_MAX: u32 = 3;
/// Open verifications of one stream; each costs a connection. A server with more domains is told to try again.
const VERIFICATIONS_MAX: usize = 16;
