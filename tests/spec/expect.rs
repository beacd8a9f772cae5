//! Tests that read like the wire: what the server sends us, what we send, what we tell the rest of the house.

use std::{collections::VecDeque, fmt::Debug, sync::Arc, time::Duration};

use bytes::Bytes;
use narrows::{
    codec::xml::Limits,
    stanza::{Domain, DomainPair},
    stream::{
        Certificate, CloseReason, InitiatingStream, ReceivingStream, Site, dialback::Secret, initiating, receiving,
    },
    time::{Mono, Now, Wall},
};

/// What stands for a stream id of ours in an expected text.
const ID: &str = "{id}";
const ID_LEN: usize = 32;

pub fn domain(text: &str) -> Domain {
    Domain::new(text).unwrap()
}

pub fn pair(local: &str, far: &str) -> DomainPair {
    DomainPair {
        local: domain(local),
        far: domain(far),
    }
}

/// `ship.example` and its rooms are ours, `shore.example` and its rooms the peer's.
pub fn site() -> Site {
    let domains = |names: &[&str]| names.iter().map(|name| domain(name)).collect();
    Site {
        local: domains(&["ship.example", "conference.ship.example"]),
        far: domains(&["shore.example", "conference.shore.example"]),
        require_tls: true,
        offer_management: true,
        use_management: true,
        before_authentication: Limits::BEFORE_AUTHENTICATION,
        after_authentication: Limits::AFTER_AUTHENTICATION,
        secret: Secret::new([9; 32]),
    }
}

/// What [`site`]'s secret makes.
pub fn key(receiving: &str, originating: &str, id: &str) -> String {
    site().secret.key(&domain(receiving), &domain(originating), id).unwrap()
}

/// A trusted certificate for these names.
pub fn certificate(names: &[&str]) -> Option<Certificate> {
    Some(Certificate {
        trusted: true,
        dns: names.iter().map(|name| name.to_string()).collect(),
        ..Certificate::default()
    })
}

/// Either stream, as far as the tests tell them apart.
pub trait Machine {
    type Input;
    type Output: Clone + Debug + PartialEq;

    fn bytes(bytes: Bytes) -> Self::Input;
    fn secured(certificate: Option<Certificate>) -> Self::Input;
    fn timeout() -> Self::Input;
    fn as_sent(output: &Self::Output) -> Option<&Bytes>;
    fn close(reason: CloseReason) -> Self::Output;
    fn as_close(output: &Self::Output) -> Option<&CloseReason>;
    fn start_tls() -> Self::Output;
    fn handle(&mut self, input: Self::Input, now: Now);
    fn poll_output(&mut self) -> Option<Self::Output>;
    fn timeout_at(&self) -> Option<Mono>;
}

macro_rules! machine {
    ($stream:ty, $module:ident) => {
        impl Machine for $stream {
            type Input = $module::Input;
            type Output = $module::Output;

            fn bytes(bytes: Bytes) -> Self::Input {
                $module::Input::Bytes(bytes)
            }
            fn secured(certificate: Option<Certificate>) -> Self::Input {
                $module::Input::Secured(certificate)
            }
            fn timeout() -> Self::Input {
                $module::Input::Timeout
            }
            fn as_sent(output: &Self::Output) -> Option<&Bytes> {
                match output {
                    $module::Output::Send(bytes) => Some(bytes),
                    _ => None,
                }
            }
            fn close(reason: CloseReason) -> Self::Output {
                $module::Output::Close(reason)
            }
            fn as_close(output: &Self::Output) -> Option<&CloseReason> {
                match output {
                    $module::Output::Close(reason) => Some(reason),
                    _ => None,
                }
            }
            fn start_tls() -> Self::Output {
                $module::Output::StartTls
            }
            fn handle(&mut self, input: Self::Input, now: Now) {
                <$stream>::handle(self, input, now)
            }
            fn poll_output(&mut self) -> Option<Self::Output> {
                <$stream>::poll_output(self)
            }
            fn timeout_at(&self) -> Option<Mono> {
                self.poll_timeout().map(|deadline| deadline.at)
            }
        }
    };
}

machine!(ReceivingStream, receiving);
machine!(InitiatingStream, initiating);

/// What came out, in order; bytes that were sent in a row are one text.
#[derive(Clone, Debug, PartialEq)]
pub enum Event<Output> {
    Sent(String),
    Other(Output),
}

/// A stream, what it has put out and nobody has looked at yet, and a clock.
pub struct Expect<M: Machine> {
    pub machine: M,
    pub events: VecDeque<Event<M::Output>>,
    /// The stream id in what was last sent.
    pub id: String,
    now: Now,
}

/// A stream that the server opens towards us.
pub fn receiving(site: Site) -> Expect<ReceivingStream> {
    Expect::new(ReceivingStream::new(Arc::new(site), [1; 32], start(), false))
}

/// A stream that we open towards the server, in the name of `shore.example`.
pub fn initiating(site: Site) -> Expect<InitiatingStream> {
    initiating_for(site, initiating::Purpose::Deliver)
}

pub fn initiating_for(site: Site, purpose: initiating::Purpose) -> Expect<InitiatingStream> {
    let pair = pair("ship.example", "shore.example");
    Expect::new(InitiatingStream::new(
        Arc::new(site),
        pair,
        purpose,
        [1; 32],
        start(),
        false,
    ))
}

pub fn start() -> Now {
    Now {
        mono: Mono::from_start(Duration::from_secs(1000)),
        wall: Wall(0),
    }
}

impl<M: Machine> Expect<M> {
    pub fn new(machine: M) -> Self {
        Self {
            machine,
            events: VecDeque::new(),
            id: String::new(),
            now: start(),
        }
    }

    /// The server sends this.
    #[track_caller]
    pub fn receives(&mut self, xml: &str) -> &mut Self {
        let bytes = Bytes::copy_from_slice(xml.as_bytes());
        self.handle(M::bytes(bytes))
    }

    #[track_caller]
    pub fn handle(&mut self, input: M::Input) -> &mut Self {
        self.machine.handle(input, self.now);
        while let Some(output) = self.machine.poll_output() {
            let closed = self
                .events
                .iter()
                .any(|event| matches!(event, Event::Other(other) if M::as_close(other).is_some()));
            assert!(!closed, "nothing follows a close, but: {output:?}");
            match (M::as_sent(&output), self.events.back_mut()) {
                (Some(bytes), Some(Event::Sent(text))) => text.push_str(std::str::from_utf8(bytes).unwrap()),
                (Some(bytes), _) => self
                    .events
                    .push_back(Event::Sent(String::from_utf8(bytes.to_vec()).unwrap())),
                (None, _) => self.events.push_back(Event::Other(output)),
            }
        }
        self
    }

    /// The next thing we send begins with this; `{id}` stands for a stream id.
    #[track_caller]
    pub fn sends(&mut self, expected: &str) -> &mut Self {
        let Some(Event::Sent(sent)) = self.events.front_mut() else {
            panic!("expected to send {expected}\nbut next is {:?}", self.events.front());
        };
        let mut rest = sent.as_str();
        for (index, part) in expected.split(ID).enumerate() {
            if index > 0 {
                self.id = rest[..ID_LEN].to_owned();
                assert!(
                    self.id.bytes().all(|byte| byte.is_ascii_hexdigit()),
                    "no stream id at {rest}"
                );
                rest = &rest[ID_LEN..];
            }
            let Some(after) = rest.strip_prefix(part) else {
                panic!("expected to send {expected}\nbut sent          {sent}");
            };
            rest = after;
        }
        if rest.is_empty() {
            self.events.pop_front();
        } else {
            *sent = rest.to_owned();
        }
        self
    }

    /// The next thing we say to the house.
    #[track_caller]
    pub fn gives(&mut self, expected: M::Output) -> &mut Self {
        assert_eq!(self.events.pop_front(), Some(Event::Other(expected)));
        self
    }

    /// Nothing more was sent or said.
    #[track_caller]
    pub fn is_quiet(&mut self) -> &mut Self {
        assert_eq!(self.events, []);
        self
    }

    #[track_caller]
    pub fn starts_tls(&mut self) -> &mut Self {
        self.gives(M::start_tls()).is_quiet()
    }

    #[track_caller]
    pub fn secured(&mut self, certificate: Option<Certificate>) -> &mut Self {
        self.handle(M::secured(certificate))
    }

    #[track_caller]
    pub fn closes(&mut self, reason: CloseReason) -> &mut Self {
        self.gives(M::close(reason)).is_quiet()
    }

    /// A stream error with this condition, our closing tag, and the end.
    #[track_caller]
    pub fn refuses(&mut self, condition: &str) -> &mut Self {
        let start = format!("<stream:error><{condition} xmlns='urn:ietf:params:xml:ns:xmpp-streams'/>");
        self.sends(&start);
        let Some(Event::Sent(rest)) = self.events.pop_front() else {
            panic!("a stream error without an end");
        };
        assert!(rest.ends_with("</stream:error></stream:stream>"), "{rest}");
        let Some(Event::Other(output)) = self.events.pop_front() else {
            panic!("a stream error and no close");
        };
        match M::as_close(&output) {
            Some(CloseReason::OurError { condition: said, .. }) => assert_eq!(*said, condition),
            _ => panic!("expected the stream error {condition}, not {output:?}"),
        }
        self.is_quiet()
    }

    /// We end for another reason, and that is what metrics call it.
    #[track_caller]
    pub fn ends_as(&mut self, label: &str) -> &mut Self {
        let Some(Event::Other(output)) = self.events.pop_front() else {
            panic!("expected the end");
        };
        assert_eq!(M::as_close(&output).expect("a close").as_label(), label, "{output:?}");
        self.is_quiet()
    }

    /// Lets time pass, and the deadline if it is over.
    #[track_caller]
    pub fn waits(&mut self, seconds: u64) -> &mut Self {
        self.now.mono = self.now.mono + Duration::from_secs(seconds);
        if self.machine.timeout_at().is_some_and(|at| at <= self.now.mono) {
            self.handle(M::timeout());
        }
        self
    }
}

// ---- The parts of a negotiation that many tests begin with

pub const NS: &str =
    "xmlns='jabber:server' xmlns:stream='http://etherx.jabber.org/streams' xmlns:db='jabber:server:dialback'";

/// A server's header, as short as it may be.
pub fn header(from: &str, to: &str) -> String {
    format!("<?xml version='1.0'?><stream:stream {NS} from='{from}' to='{to}' version='1.0'>")
}

pub fn header_with_id(from: &str, to: &str, id: &str) -> String {
    format!("<?xml version='1.0'?><stream:stream {NS} from='{from}' to='{to}' id='{id}' version='1.0'>")
}

pub const STARTTLS: &str = "<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>";
pub const PROCEED: &str = "<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>";
pub const STARTTLS_FEATURES: &str =
    "<stream:features><starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'><required/></starttls></stream:features>";
pub const DIALBACK_FEATURES: &str =
    "<stream:features><dialback xmlns='urn:xmpp:features:dialback'><errors/></dialback></stream:features>";
pub const EXTERNAL_FEATURES: &str = "<stream:features><mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>\
     <mechanism>EXTERNAL</mechanism></mechanisms>\
     <dialback xmlns='urn:xmpp:features:dialback'><errors/></dialback></stream:features>";
pub const SUCCESS: &str = "<success xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>";

impl Expect<ReceivingStream> {
    /// Up to the server's certificate, and the header after it.
    #[track_caller]
    pub fn tls(&mut self, certificate: Option<Certificate>) -> &mut Self {
        self.receives(&header("ship.example", "shore.example"))
            .sends(&header_with_id("shore.example", "ship.example", "{id}"))
            .sends(STARTTLS_FEATURES)
            .receives(STARTTLS)
            .sends(PROCEED)
            .starts_tls()
            .secured(certificate)
            .is_quiet()
            .receives(&header("ship.example", "shore.example"))
            .sends(&header_with_id("shore.example", "ship.example", "{id}"))
    }

    /// TLS without a certificate: dialback is offered.
    #[track_caller]
    pub fn tls_for_dialback(&mut self) -> &mut Self {
        self.tls(None).sends(DIALBACK_FEATURES).is_quiet()
    }

    /// Authenticated by dialback, `ship.example` to `shore.example`.
    #[track_caller]
    pub fn dialed_back(&mut self) -> &mut Self {
        self.tls_for_dialback()
            .receives("<db:result from='ship.example' to='shore.example'>k</db:result>");
        let stream_id = self.id.clone();
        self.gives(receiving::Output::Verify {
            request: 1,
            pair: pair("ship.example", "shore.example"),
            stream_id,
            key: "k".to_owned(),
        })
        .verdict(1, narrows::stream::Verdict::Valid)
        .sends("<db:result from='shore.example' to='ship.example' type='valid'/>")
        .gives(receiving::Output::Authenticated {
            pair: pair("ship.example", "shore.example"),
            how: narrows::stream::Method::Dialback,
        })
        .is_quiet()
    }

    /// Authenticated by EXTERNAL, up to and without the features after it.
    #[track_caller]
    pub fn authenticated(&mut self) -> &mut Self {
        self.tls(certificate(&["ship.example"]))
            .sends(EXTERNAL_FEATURES)
            .receives("<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='EXTERNAL'>c2hpcC5leGFtcGxl</auth>")
            .gives(receiving::Output::Authenticated {
                pair: pair("ship.example", "shore.example"),
                how: narrows::stream::Method::External,
            })
            .sends(SUCCESS)
            .is_quiet()
            .receives(&header("ship.example", "shore.example"))
            .sends(&header_with_id("shore.example", "ship.example", "{id}"))
    }

    /// Authenticated by EXTERNAL, all features read.
    #[track_caller]
    pub fn ready(&mut self) -> &mut Self {
        self.authenticated();
        let Some(Event::Sent(features)) = self.events.pop_front() else {
            panic!("no features");
        };
        assert!(
            features.starts_with("<stream:features>") && features.ends_with("</stream:features>"),
            "{features}"
        );
        self.is_quiet()
    }

    #[track_caller]
    pub fn verdict(&mut self, request: u64, verdict: narrows::stream::Verdict) -> &mut Self {
        self.handle(receiving::Input::Verdict { request, verdict })
    }

    #[track_caller]
    pub fn committed(&mut self, upto: u64) -> &mut Self {
        self.handle(receiving::Input::Committed { upto })
    }

    /// The next output is this stanza.
    #[track_caller]
    pub fn gives_stanza(&mut self, n: u64, pair: DomainPair, bytes: &str) -> &mut Self {
        match self.events.pop_front() {
            Some(Event::Other(receiving::Output::Stanza {
                n: count,
                pair: of,
                stanza,
            })) => {
                assert_eq!((count, of, stanza.bytes().as_ref()), (n, pair, bytes.as_bytes()));
            }
            other => panic!("expected a stanza, not {other:?}"),
        }
        self
    }
}

impl Expect<InitiatingStream> {
    /// Up to TLS, and our header in it.
    #[track_caller]
    pub fn connected(&mut self) -> &mut Self {
        let ours = header("shore.example", "ship.example");
        self.handle(initiating::Input::Connected)
            .sends(&ours)
            .is_quiet()
            .receives(&header_with_id("ship.example", "shore.example", "s1"))
            .is_quiet()
            .receives(STARTTLS_FEATURES)
            .sends(STARTTLS)
            .is_quiet()
            .receives(PROCEED)
            .starts_tls()
            .secured(None)
            .sends(&ours)
            .is_quiet()
            .receives(&header_with_id("ship.example", "shore.example", "s2"))
            .is_quiet()
    }

    /// Authenticated by EXTERNAL; the server's header after it has come.
    #[track_caller]
    pub fn authenticated(&mut self) -> &mut Self {
        self.connected()
            .receives(EXTERNAL_FEATURES)
            .sends("<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='EXTERNAL'>c2hvcmUuZXhhbXBsZQ==</auth>")
            .is_quiet()
            .receives(SUCCESS)
            .sends(&header("shore.example", "ship.example"))
            .is_quiet()
            .receives(&header_with_id("ship.example", "shore.example", "s3"))
            .is_quiet()
    }

    /// Stanzas may be written, without XEP-0198.
    #[track_caller]
    pub fn ready(&mut self) -> &mut Self {
        self.authenticated()
            .receives("<stream:features/>")
            .gives(initiating::Output::Ready {
                acks: false,
                stanza_bytes_max: None,
            })
            .is_quiet()
    }

    /// Stanzas may be written, with XEP-0198.
    #[track_caller]
    pub fn managed(&mut self) -> &mut Self {
        self.authenticated()
            .receives("<stream:features><sm xmlns='urn:xmpp:sm:3'/></stream:features>")
            .sends("<enable xmlns='urn:xmpp:sm:3'/>")
            .is_quiet()
            .receives("<enabled xmlns='urn:xmpp:sm:3'/>")
            .gives(initiating::Output::Ready {
                acks: true,
                stanza_bytes_max: None,
            })
            .is_quiet()
    }

    #[track_caller]
    pub fn writes(&mut self, stanzas: &[&str]) -> &mut Self {
        let stanzas = stanzas
            .iter()
            .map(|stanza| Bytes::copy_from_slice(stanza.as_bytes()))
            .collect();
        self.handle(initiating::Input::Write(stanzas))
    }
}
