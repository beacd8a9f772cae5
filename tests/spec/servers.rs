//! What Prosody 0.12.3 and ejabberd 23.01 really send, byte for byte (domains and keys replaced), however it is cut.

use std::sync::Arc;

use bytes::Bytes;
use narrows::{
    stanza::Domain,
    stream::{
        Certificate, InitiatingStream, Method, ReceivingStream, Verdict,
        initiating::{self, Purpose},
        receiving,
    },
};
use proptest::prelude::*;

use crate::expect::*;

/// What happens to a stream, in turns: nobody speaks out of turn in these.
#[derive(Clone)]
enum Turn<I> {
    Receives(String),
    Handle(I),
}

use Turn::{Handle, Receives};

/// Plays the turns, what is received cut into pieces by `cut`; gives everything that came out.
fn play<M: Machine>(
    machine: M,
    turns: &[Turn<M::Input>],
    mut cut: impl FnMut(&str) -> Vec<usize>,
) -> Vec<Event<M::Output>>
where
    M::Input: Clone,
{
    let mut stream = Expect::new(machine);
    for turn in turns {
        match turn {
            Receives(text) => {
                let mut rest = text.as_bytes();
                let mut taken = 0;
                for at in cut(text) {
                    let (piece, after) = rest.split_at(at - taken);
                    stream.handle(M::bytes(Bytes::copy_from_slice(piece)));
                    (rest, taken) = (after, at);
                }
                stream.handle(M::bytes(Bytes::copy_from_slice(rest)));
            }
            Handle(input) => {
                stream.handle(input.clone());
            }
        }
    }
    stream.events.into()
}

/// However the bytes are cut, the same comes out: in one piece, byte by byte, and cut in two at every place.
fn same_however_cut<M: Machine>(new: impl Fn() -> M, turns: &[Turn<M::Input>]) -> Vec<Event<M::Output>>
where
    M::Input: Clone,
{
    let whole = play(new(), turns, |_| vec![]);
    assert_eq!(
        play(new(), turns, |text| (1..text.len()).collect()),
        whole,
        "byte by byte"
    );
    let longest = turns
        .iter()
        .map(|turn| if let Receives(text) = turn { text.len() } else { 0 })
        .max()
        .unwrap();
    for at in 1..longest {
        let cut = play(new(), turns, |text| if at < text.len() { vec![at] } else { vec![] });
        assert_eq!(cut, whole, "cut at {at}");
    }
    whole
}

/// The last thing that was sent, and everything else.
fn summary<O: Clone>(events: &[Event<O>]) -> (Vec<String>, Vec<O>) {
    let mut sent = Vec::new();
    let mut other = Vec::new();
    for event in events {
        match event {
            Event::Sent(text) => sent.push(text.clone()),
            Event::Other(output) => other.push(output.clone()),
        }
    }
    (sent, other)
}

const PROSODY_HEADER: &str = "<?xml version='1.0'?><stream:stream id='' version='1.0' to='shore.example' xml:lang='en' \
    from='conference.ship.example' xmlns='jabber:server' xmlns:db='jabber:server:dialback' \
    xmlns:stream='http://etherx.jabber.org/streams'>";
const EJABBERD_HEADER: &str = "<?xml version='1.0'?><stream:stream version='1.0' xml:lang='en' \
    xmlns:db='jabber:server:dialback' xmlns:stream='http://etherx.jabber.org/streams' to='shore.example' \
    from='ship.example' xmlns='jabber:server'>";
/// After STARTTLS.
const EJABBERD_HEADER_AGAIN: &str = "<?xml version='1.0'?><stream:stream version='1.0' \
    xmlns:db='jabber:server:dialback' xmlns:stream='http://etherx.jabber.org/streams' to='shore.example' \
    from='ship.example' xmlns='jabber:server'>";

fn text(text: &str) -> Turn<receiving::Input> {
    Receives(text.to_owned())
}

fn new_receiving() -> ReceivingStream {
    ReceivingStream::new(Arc::new(site()), [1; 32], start(), false)
}

/// Prosody with a trusted certificate: EXTERNAL, a room's stanzas, XEP-0198 enabled behind them, and requests.
fn prosody_external() -> Vec<Turn<receiving::Input>> {
    vec![
        text(PROSODY_HEADER),
        text("<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"),
        Handle(receiving::Input::Secured(certificate(&[
            "ship.example",
            "conference.ship.example",
        ]))),
        text(PROSODY_HEADER),
        text(
            "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='EXTERNAL'>Y29uZmVyZW5jZS5zaGlwLmV4YW1wbGU=</auth>",
        ),
        text(PROSODY_HEADER),
        text(
            "<presence to='b1@shore.example/r1' xml:lang='en' from='room1@conference.ship.example/adam'>\
             <x xmlns='vcard-temp:x:update'><photo/></x>\
             <occupant-id xmlns='urn:xmpp:occupant-id:0' id='9oMXw8yhxKhox3i9hGqxJZQvZ3M6Op1eFu45DpSr+yE='/>\
             <x xmlns='http://jabber.org/protocol/muc#user'><item role='participant' affiliation='none'/></x></presence>\
             <message type='groupchat' to='b1@shore.example/r1' from='room1@conference.ship.example'><subject/></message>\
             <enable xmlns='urn:xmpp:sm:3'/>",
        ),
        text(
            "<message id='t0' to='b1@shore.example/r' type='groupchat' xml:lang='en' \
             from='room1@conference.ship.example/alice'><body>sm test 0</body></message>\
             <message id='t0' to='b2@shore.example/r' type='groupchat' xml:lang='en' \
             from='room1@conference.ship.example/alice'><body>sm test 0</body></message>\
             <r xmlns='urn:xmpp:sm:3'/>",
        ),
        Handle(receiving::Input::Committed { upto: 4 }),
        text(" "),
        text("</stream:stream>"),
    ]
}

/// ejabberd with a certificate that is not trusted: dialback.
fn ejabberd_dialback() -> Vec<Turn<receiving::Input>> {
    let untrusted = certificate(&["ship.example"]).map(|certificate| Certificate {
        trusted: false,
        ..certificate
    });
    vec![
        text(EJABBERD_HEADER),
        text("<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"),
        Handle(receiving::Input::Secured(untrusted)),
        text(EJABBERD_HEADER_AGAIN),
        text(
            "<db:result to='shore.example' from='ship.example'>ebb7f61dfb9d42e241178d047ea06ea0acbf45a340808ee77c377b6098bfd4de</db:result>",
        ),
        Handle(receiving::Input::Verdict {
            request: 1,
            verdict: Verdict::Valid,
        }),
        text(
            "<message xml:lang='en' to='x@shore.example' from='alice@ship.example/p' type='chat' id='p1'><body>x</body></message>",
        ),
        text(
            "<stream:error><connection-timeout xmlns='urn:ietf:params:xml:ns:xmpp-streams'/>\
             <text xml:lang='en' xmlns='urn:ietf:params:xml:ns:xmpp-streams'>Idle connection</text></stream:error></stream:stream>",
        ),
    ]
}

/// Prosody gets through: authenticated by EXTERNAL, four stanzas, the last two acknowledged, closed in peace.
#[test]
fn prosody_authenticates_and_counts() {
    let (sent, other) = summary(&same_however_cut(new_receiving, &prosody_external()));
    assert_eq!(sent.last().unwrap(), "<a xmlns='urn:xmpp:sm:3' h='2'/></stream:stream>");
    assert_eq!(other.len(), 7, "{other:?}");
    assert!(matches!(&other[0], receiving::Output::StartTls));
    assert_eq!(
        other[1],
        receiving::Output::Authenticated {
            pair: pair("conference.ship.example", "shore.example"),
            how: Method::External
        }
    );
    assert!(
        other[2..6]
            .iter()
            .all(|output| matches!(output, receiving::Output::Stanza { .. }))
    );
}

/// ejabberd gets through: verified by dialback, one stanza, and an idle stream's end that is no fault.
#[test]
fn ejabberd_is_verified() {
    let (sent, other) = summary(&same_however_cut(new_receiving, &ejabberd_dialback()));
    assert_eq!(sent.last().unwrap(), "</stream:stream>");
    assert!(matches!(&other[1], receiving::Output::Verify { key, .. } if key.starts_with("ebb7f61d")));
    assert!(matches!(
        &other[2],
        receiving::Output::Authenticated {
            how: Method::Dialback,
            ..
        }
    ));
    assert!(matches!(&other[3], receiving::Output::Stanza { n: 1, .. }));
    assert!(matches!(&other[4], receiving::Output::Close(reason) if reason.as_label() == "idle"));
}

/// ejabberd's connection that only asks: TLS, one question, and gone.
#[test]
fn ejabberd_asks_on_a_connection_of_its_own() {
    let key = key("ship.example", "shore.example", "9632502539465940731");
    let turns = [
        text(EJABBERD_HEADER),
        text("<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"),
        Handle(receiving::Input::Secured(None)),
        text(EJABBERD_HEADER_AGAIN),
        text(&format!(
            "<db:verify id='9632502539465940731' to='shore.example' from='ship.example'>{key}</db:verify>"
        )),
        text("</stream:stream>"),
    ];
    let (sent, _) = summary(&same_however_cut(new_receiving, &turns));
    assert!(
        sent.last().unwrap().ends_with(
            "<db:verify from='shore.example' to='ship.example' id='9632502539465940731' type='valid'/></stream:stream>"
        ),
        "{sent:?}"
    );
}

fn hears(text: &str) -> Turn<initiating::Input> {
    Receives(text.to_owned())
}

fn new_initiating() -> InitiatingStream {
    let pair = pair("ship.example", "shore.example");
    InitiatingStream::new(Arc::new(site()), pair, Purpose::Deliver, [1; 32], start(), false)
}

fn stanzas() -> Turn<initiating::Input> {
    Handle(initiating::Input::Write(vec![Bytes::from_static(
        b"<message from='x@shore.example/r' to='alice@ship.example' id='in1'><body>hi</body></message>",
    )]))
}

/// Prosody as the receiving server, once without a CA that it trusts (dialback) and once with (EXTERNAL and XEP-0198).
#[test]
fn prosody_lets_us_in() {
    let header = |id: &str| {
        hears(&format!(
            "<?xml version='1.0'?><stream:stream id='{id}' version='1.0' to='shore.example' xml:lang='en' \
             from='ship.example' xmlns='jabber:server' xmlns:db='jabber:server:dialback' \
             xmlns:stream='http://etherx.jabber.org/streams'>"
        ))
    };
    let begin = || {
        vec![
            Handle(initiating::Input::Connected),
            header("0a3661b1-6324-4b03-8473-532ab6f7d30e"),
            hears(
                "<stream:features><starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'><required/></starttls>\
                 <dialback xmlns='urn:xmpp:features:dialback'/></stream:features>",
            ),
            hears("<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"),
            Handle(initiating::Input::Secured(None)),
            header("744c5885-1431-4f9d-92b4-bc88c8a00598"),
        ]
    };
    let mut dialback = begin();
    dialback.extend([
        hears("<stream:features><dialback xmlns='urn:xmpp:features:dialback'/></stream:features>"),
        hears(
            "<db:result from='ship.example' type='valid' to='shore.example' \
             id='744c5885-1431-4f9d-92b4-bc88c8a00598'>0123456789abcdef</db:result>",
        ),
        stanzas(),
        hears("</stream:stream>"),
    ]);
    let (sent, other) = summary(&same_however_cut(new_initiating, &dialback));
    let key = key("ship.example", "shore.example", "744c5885-1431-4f9d-92b4-bc88c8a00598");
    assert!(
        sent.iter().any(|text| text.ends_with(&format!(">{key}</db:result>"))),
        "{sent:?}"
    );
    assert!(sent.last().unwrap().ends_with("</body></message></stream:stream>"));
    assert_eq!(
        other[1],
        initiating::Output::Ready {
            acks: false,
            stanza_bytes_max: None
        }
    );

    let mut external = begin();
    external.extend([
        hears(
            "<stream:features><mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'><mechanism>EXTERNAL</mechanism>\
             </mechanisms><dialback xmlns='urn:xmpp:features:dialback'/></stream:features>",
        ),
        hears("<success xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>"),
        header("e6249108-eb2b-4d66-b0ee-c3e5b1f851d2"),
        hears(
            "<stream:features><sm xmlns='urn:xmpp:sm:2'><optional/></sm><sm xmlns='urn:xmpp:sm:3'><optional/></sm>\
             <c ver='x' node='http://prosody.im' hash='sha-1' xmlns='http://jabber.org/protocol/caps'/></stream:features>",
        ),
        hears("<enabled xmlns='urn:xmpp:sm:3'/>"),
        stanzas(),
        hears("<a h='1' xmlns='urn:xmpp:sm:3'/>"),
    ]);
    let (sent, other) = summary(&same_however_cut(new_initiating, &external));
    assert!(sent.last().unwrap().ends_with("</message><r xmlns='urn:xmpp:sm:3'/>"));
    assert_eq!(
        other[1..],
        [
            initiating::Output::Ready {
                acks: true,
                stanza_bytes_max: None
            },
            initiating::Output::Confirmed { stanzas: 1 }
        ]
    );
}

/// Prosody as Debian ships it, without a CA that it trusts: it says so, and that is what the operator reads.
#[test]
fn prosody_does_not_trust_us() {
    let turns = [
        Handle(initiating::Input::Connected),
        hears(
            "<?xml version='1.0'?><stream:stream id='1' version='1.0' to='shore.example' xml:lang='en' \
             from='ship.example' xmlns='jabber:server' xmlns:db='jabber:server:dialback' \
             xmlns:stream='http://etherx.jabber.org/streams'>",
        ),
        hears(
            "<stream:error><not-authorized xmlns='urn:ietf:params:xml:ns:xmpp-streams'/>\
             <text xmlns='urn:ietf:params:xml:ns:xmpp-streams'>Your server&apos;s certificate is not trusted</text>\
             </stream:error></stream:stream>",
        ),
    ];
    let (_, other) = summary(&same_however_cut(new_initiating, &turns));
    let [initiating::Output::Close(reason)] = other.as_slice() else {
        panic!("{other:?}");
    };
    assert_eq!(
        reason.to_string(),
        "the server sent the stream error not-authorized: Your server's certificate is not trusted"
    );
}

/// ejabberd as the receiving server: EXTERNAL is offered, fails, and dialback follows on the same stream.
#[test]
fn ejabberd_lets_us_in_after_a_failure() {
    let header = |id: &str| {
        hears(&format!(
            "<?xml version='1.0'?><stream:stream id='{id}' version='1.0' xml:lang='en' \
             xmlns:db='jabber:server:dialback' xmlns:stream='http://etherx.jabber.org/streams' to='shore.example' \
             from='ship.example' xmlns='jabber:server'>"
        ))
    };
    let turns = [
        Handle(initiating::Input::Connected),
        header("9632502539465940731"),
        hears(
            "<stream:features><starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'><required/></starttls></stream:features>",
        ),
        hears("<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"),
        Handle(initiating::Input::Secured(None)),
        header("11872566838604215490"),
        hears(
            "<stream:features><mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'><mechanism>EXTERNAL</mechanism>\
             </mechanisms><dialback xmlns='urn:xmpp:features:dialback'><errors/></dialback></stream:features>",
        ),
        hears(
            "<failure xmlns='urn:ietf:params:xml:ns:xmpp-sasl'><not-authorized/>\
             <text xml:lang='en'>self signed certificate</text></failure>",
        ),
        hears("<db:result type='valid' to='shore.example' from='ship.example'/>"),
        stanzas(),
    ];
    let (sent, other) = summary(&same_however_cut(new_initiating, &turns));
    let key = key("ship.example", "shore.example", "11872566838604215490");
    assert!(sent.iter().any(|text| text.contains(&key)), "{sent:?}");
    assert_eq!(other.len(), 2, "{other:?}");
    assert!(matches!(other[1], initiating::Output::Ready { acks: false, .. }));
}

/// ejabberd in the clear offers an empty list of mechanisms.
#[test]
fn ejabberd_in_the_clear_wants_dialback() {
    let mut site = site();
    site.require_tls = false;
    initiating(site)
        .handle(initiating::Input::Connected)
        .sends(&header("shore.example", "ship.example"))
        .receives(&header_with_id("ship.example", "shore.example", "7678016599714471887"))
        .receives(
            "<stream:features><mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>\
             <dialback xmlns='urn:xmpp:features:dialback'><errors/></dialback></stream:features>",
        )
        .sends(&format!(
            "<db:result from='shore.example' to='ship.example'>{}</db:result>",
            key("ship.example", "shore.example", "7678016599714471887")
        ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// The same comes out however often and wherever the bytes are cut.
    #[test]
    fn same_in_any_pieces(seed in proptest::collection::vec(0usize..4000, 0..40)) {
        for turns in [prosody_external(), ejabberd_dialback()] {
            let whole = play(new_receiving(), &turns, |_| vec![]);
            let cut = play(new_receiving(), &turns, |text| {
                let mut places: Vec<_> = seed.iter().map(|place| place % text.len()).filter(|place| *place > 0).collect();
                places.sort_unstable();
                places.dedup();
                places
            });
            prop_assert_eq!(cut, whole);
        }
    }

    /// Whatever a server sends and whatever happens to it, no stanza comes out unless its domain was proved, no count goes
    /// beyond the disk, and nothing follows the end.
    #[test]
    fn no_order_of_events_breaks_the_rules(from in 0usize..4, events in proptest::collection::vec(0usize..28, 0..60)) {
        let mut stream = Expect::new(new_receiving());
        let (mut received, mut committed, mut enabled_at) = (0, 0, None);
        let mut proved: Vec<Domain> = Vec::new();
        // One wrong word ends a stream: begin some of them where the words are other ones.
        match from {
            0 => {}
            1 => {
                stream.tls(certificate(&["ship.example"])).sends(EXTERNAL_FEATURES);
            },
            2 => {
                stream.ready();
            },
            _ => {
                stream.ready().receives("<enable xmlns='urn:xmpp:sm:3'/>").sends("<enabled xmlns='urn:xmpp:sm:3'/>");
                enabled_at = Some(0);
            }
        }
        if from >= 2 {
            proved.push(domain("ship.example"));
        }
        let mut asked = Vec::new();
        for event in events {
            let input = match event {
                0..=3 => bytes(EJABBERD_HEADER),
                4 | 5 => bytes("<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"),
                6 => receiving::Input::Secured(None),
                7 | 8 => receiving::Input::Secured(certificate(&["ship.example"])),
                9 | 10 => bytes("<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='EXTERNAL'>=</auth>"),
                11 => bytes("<db:result from='ship.example' to='shore.example'>k</db:result>"),
                12 => bytes("<db:result from='conference.ship.example' to='shore.example'>k</db:result>"),
                13 => receiving::Input::Verdict { request: asked.len() as u64, verdict: Verdict::Valid },
                14 => receiving::Input::Verdict { request: 1, verdict: Verdict::Invalid },
                15..=19 => bytes("<message from='a@ship.example' to='b@shore.example'/>"),
                20 => bytes("<message from='a@conference.ship.example' to='b@shore.example'/>"),
                21 => bytes("<enable xmlns='urn:xmpp:sm:3'/>"),
                22 | 23 => bytes("<r xmlns='urn:xmpp:sm:3'/>"),
                24 | 25 => {
                    committed = received.min(committed + 1);
                    receiving::Input::Committed { upto: committed }
                }
                26 => bytes("</stream:stream>"),
                _ => receiving::Input::Drain,
            };
            let before = received;
            stream.handle(input);
            for output in stream.events.drain(..) {
                match output {
                    Event::Sent(text) => {
                        if text.contains("<enabled ") {
                            enabled_at = Some(before);
                        }
                        for h in text.split(" h='").skip(1) {
                            let h: u64 = h.split('\'').next().unwrap().parse().unwrap();
                            prop_assert!(h + enabled_at.unwrap() <= committed.max(enabled_at.unwrap()));
                        }
                    }
                    Event::Other(receiving::Output::Authenticated { pair, .. }) => proved.push(pair.local),
                    Event::Other(receiving::Output::Verify { pair, .. }) => asked.push(pair),
                    Event::Other(receiving::Output::Stanza { n, pair, .. }) => {
                        received += 1;
                        prop_assert_eq!(n, received);
                        prop_assert!(proved.contains(&pair.local));
                    }
                    Event::Other(receiving::Output::Close(_)) => return Ok(()),
                    Event::Other(receiving::Output::Send(_) | receiving::Output::StartTls) => {}
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever a server answers, no stanza is written before the stream is ready, no count is passed on that goes back or
    /// beyond what was written, and a question gets one answer, before the end.
    #[test]
    fn no_order_of_answers_breaks_the_rules(from in 0usize..4, events in proptest::collection::vec(0usize..26, 0..60), asks: bool) {
        let header = "<stream:stream xmlns='jabber:server' xmlns:stream='http://etherx.jabber.org/streams' \
                      xmlns:db='jabber:server:dialback' from='ship.example' to='shore.example' id='s1' version='1.0'>";
        let stanza = "<message from='b@shore.example' to='a@ship.example'/>";
        let asks = asks && from < 2;
        let purpose = match asks {
            true => Purpose::Verify { request: 1, stream_id: "q".to_owned(), key: "k".to_owned() },
            false => Purpose::Deliver,
        };
        let mut stream = initiating_for(site(), purpose);
        let (mut ready, mut written, mut confirmed, mut verdicts) = (from >= 2, 0, 0, 0);
        match from {
            0 => {}
            1 => {
                stream.connected();
            },
            2 => {
                stream.ready();
            },
            _ => {
                stream.managed();
            },
        }
        for event in events {
            let input = match event {
                0 | 1 => initiating::Input::Connected,
                2..=5 => initiating::Input::Bytes(header.into()),
                6 | 7 => initiating::Input::Bytes(STARTTLS_FEATURES.into()),
                8 | 9 => initiating::Input::Bytes(EXTERNAL_FEATURES.into()),
                10 => initiating::Input::Bytes(DIALBACK_FEATURES.into()),
                11 => initiating::Input::Bytes("<stream:features><sm xmlns='urn:xmpp:sm:3'/></stream:features>".into()),
                12 | 13 => initiating::Input::Bytes(PROCEED.into()),
                14 | 15 => initiating::Input::Secured(None),
                16 => initiating::Input::Bytes(SUCCESS.into()),
                17 => initiating::Input::Bytes("<enabled xmlns='urn:xmpp:sm:3'/>".into()),
                18 => initiating::Input::Bytes("<db:result from='ship.example' to='shore.example' type='valid'/>".into()),
                19 => initiating::Input::Bytes("<db:verify from='ship.example' to='shore.example' id='q' type='valid'/>".into()),
                20 | 21 => initiating::Input::Write(vec![stanza.into()]),
                22 => initiating::Input::Bytes(format!("<a xmlns='urn:xmpp:sm:3' h='{written}'/>").into()),
                23 => initiating::Input::Bytes("<a xmlns='urn:xmpp:sm:3' h='1'/>".into()),
                24 => initiating::Input::Bytes("</stream:stream>".into()),
                _ => initiating::Input::Drain,
            };
            stream.handle(input);
            for output in stream.events.drain(..) {
                match output {
                    Event::Sent(text) => {
                        let stanzas = text.matches("<message").count() as u64;
                        prop_assert!(stanzas == 0 || ready);
                        written += stanzas;
                    }
                    Event::Other(initiating::Output::Ready { .. }) => {
                        prop_assert!(!ready && !asks);
                        ready = true;
                    }
                    Event::Other(initiating::Output::Confirmed { stanzas }) => {
                        prop_assert!(confirmed < stanzas && stanzas <= written);
                        confirmed = stanzas;
                    }
                    Event::Other(initiating::Output::Verified { .. }) => verdicts += 1,
                    Event::Other(initiating::Output::Close(_)) => {
                        prop_assert_eq!(verdicts, usize::from(asks));
                        return Ok(());
                    }
                    Event::Other(initiating::Output::Send(_) | initiating::Output::StartTls) => {}
                }
            }
            prop_assert_eq!(verdicts, 0);
        }
    }
}

fn bytes(text: &str) -> receiving::Input {
    receiving::Input::Bytes(Bytes::copy_from_slice(text.as_bytes()))
}
