//! XEP-0198: stream management without resumption, in both roles.

use narrows::stream::{CloseReason, initiating, receiving};

use crate::expect::*;

const M: &str = "<message from='a@ship.example' to='b@shore.example'/>";
const ENABLE: &str = "<enable xmlns='urn:xmpp:sm:3'/>";
const ENABLED: &str = "<enabled xmlns='urn:xmpp:sm:3'/>";
const R: &str = "<r xmlns='urn:xmpp:sm:3'/>";

fn a(h: u32) -> String {
    format!("<a xmlns='urn:xmpp:sm:3' h='{h}'/>")
}

fn failed(condition: &str) -> String {
    format!("<failed xmlns='urn:xmpp:sm:3'><{condition} xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></failed>")
}

/// A stream on which the server has enabled it.
fn managed() -> Expect<narrows::stream::ReceivingStream> {
    let mut stream = receiving(site());
    stream.ready().receives(ENABLE).sends(ENABLED).is_quiet();
    stream
}

fn take_stanzas(stream: &mut Expect<narrows::stream::ReceivingStream>, numbers: std::ops::RangeInclusive<u64>) {
    for n in numbers {
        stream.gives_stanza(n, pair("ship.example", "shore.example"), M);
    }
}

/// §4: stanzas count from `<enable/>`, and are acknowledged when they are on disk, never before.
#[test]
fn acknowledges_what_is_on_disk() {
    let mut stream = receiving(site());
    stream.ready().receives(&M.repeat(2));
    take_stanzas(&mut stream, 1..=2);
    stream
        .receives(ENABLE)
        .sends(ENABLED)
        .receives(&format!("{M}{M}{M}{R}"));
    take_stanzas(&mut stream, 3..=5);
    stream
        .is_quiet()
        .committed(2)
        .is_quiet()
        .committed(4)
        .is_quiet()
        .committed(5)
        .sends(&a(3))
        .is_quiet()
        .receives(R)
        .sends(&a(3))
        .is_quiet();
}

/// §4: the answer to a request does not cover what came after it, unless that is on disk as well.
#[test]
fn later_stanzas_do_not_hold_an_answer_back() {
    let mut stream = managed();
    stream.receives(&format!("{M}{R}{M}{R}{M}"));
    take_stanzas(&mut stream, 1..=3);
    stream
        .committed(1)
        .sends(&a(1))
        .is_quiet()
        .committed(3)
        .sends(&a(3))
        .is_quiet();
}

/// §3: it is offered only after SASL, and only if it is wanted; asking for it otherwise fails and harms nothing.
#[test]
fn enabled_only_where_it_was_offered() {
    let mut without = site();
    without.offer_management = false;
    receiving(without)
        .ready()
        .receives(ENABLE)
        .sends(&failed("unexpected-request"))
        .is_quiet();
    receiving(site())
        .dialed_back()
        .receives(ENABLE)
        .sends(&failed("unexpected-request"))
        .is_quiet();
    receiving(site())
        .tls_for_dialback()
        .receives(ENABLE)
        .sends(&failed("unexpected-request"))
        .is_quiet();
    managed()
        .receives(ENABLE)
        .sends(&failed("unexpected-request"))
        .is_quiet();
}

/// §5: a stream is not resumed, whatever the server hopes for.
#[test]
fn no_resumption() {
    receiving(site())
        .ready()
        .receives("<enable xmlns='urn:xmpp:sm:3' resume='true' max='600'/>")
        .sends(ENABLED)
        .is_quiet();
    receiving(site())
        .ready()
        .receives("<resume xmlns='urn:xmpp:sm:3' previd='x' h='3'/>")
        .sends(&failed("feature-not-implemented"))
        .is_quiet();
}

/// Counting without having agreed to count ends the stream, as does a count of what was never sent.
#[test]
fn refuses_counts_out_of_place() {
    receiving(site()).ready().receives(R).refuses("unsupported-stanza-type");
    receiving(site())
        .ready()
        .receives(&a(0))
        .refuses("unsupported-stanza-type");
    managed()
        .receives(&a(0))
        .is_quiet()
        .receives(&a(1))
        .refuses("undefined-condition");
    managed().receives("<a xmlns='urn:xmpp:sm:3'/>").refuses("bad-format");
    managed()
        .receives("<t xmlns='urn:xmpp:sm:3'/>")
        .refuses("unsupported-stanza-type");
    receiving(site())
        .ready()
        .receives("<r xmlns='urn:xmpp:sm:2'/>")
        .refuses("unsupported-stanza-type");
}

/// Prosody bounces what is not acknowledged when a stream closes, and the room then expels: so whoever closes, and why
/// ever, what is on disk is acknowledged first, and what is on its way to disk is waited for.
#[test]
fn acknowledges_before_the_end() {
    // The server closes.
    let mut stream = managed();
    stream.receives(&format!("{M}{M}</stream:stream>"));
    take_stanzas(&mut stream, 1..=2);
    stream
        .is_quiet()
        .committed(1)
        .is_quiet()
        .committed(2)
        .sends(&a(2))
        .sends("</stream:stream>")
        .closes(CloseReason::ClosedByServer);

    // The server closes, and the connection with it: nobody is waited for, but what is known is said.
    let mut stream = managed();
    stream.receives(&format!("{M}{M}</stream:stream>"));
    take_stanzas(&mut stream, 1..=2);
    stream
        .committed(1)
        .handle(receiving::Input::Eof)
        .sends(&a(1))
        .sends("</stream:stream>")
        .closes(CloseReason::ClosedByServer);
    let mut stream = managed();
    stream.receives(M);
    take_stanzas(&mut stream, 1..=1);
    stream
        .handle(receiving::Input::Drain)
        .is_quiet()
        .handle(receiving::Input::Eof)
        .sends("</stream:stream>")
        .closes(CloseReason::Drained);

    // We close; a request is still open.
    let mut stream = managed();
    stream.receives(&format!("{M}{R}"));
    take_stanzas(&mut stream, 1..=1);
    stream.handle(receiving::Input::Drain).is_quiet().receives(M);
    take_stanzas(&mut stream, 2..=2);
    stream
        .committed(1)
        .sends(&a(1))
        .is_quiet()
        .committed(2)
        .sends(&a(2))
        .sends("</stream:stream>")
        .is_quiet()
        .receives("</stream:stream>")
        .closes(CloseReason::Drained);

    // One bad stanza behind two good ones; what follows it is not read.
    let mut stream = managed();
    stream.receives(&format!(
        "{M}{M}<message from='x@elsewhere.example' to='b@shore.example'/>{M}"
    ));
    take_stanzas(&mut stream, 1..=2);
    stream
        .is_quiet()
        .receives(M)
        .is_quiet()
        .committed(2)
        .sends(&a(2))
        .refuses("invalid-from");
}

/// A disk that does not answer does not hold a stream open for ever; what is on disk is acknowledged.
#[test]
fn waiting_for_the_disk_is_bounded() {
    let mut stream = managed();
    stream.receives(&format!("{M}{M}"));
    take_stanzas(&mut stream, 1..=2);
    stream
        .committed(1)
        .handle(receiving::Input::Drain)
        .is_quiet()
        .waits(2)
        .is_quiet()
        .waits(1)
        .sends(&a(1))
        .sends("</stream:stream>")
        .is_quiet();
}

/// As the initiating entity: enabled when it is offered and wanted; ready only when the server has answered.
#[test]
fn we_enable_it_when_offered() {
    initiating(site()).managed();
    let ready = |acks| initiating::Output::Ready {
        acks,
        stanza_bytes_max: None,
    };
    initiating(site())
        .authenticated()
        .receives(
            "<stream:features><sm xmlns='urn:xmpp:sm:2'/><sm xmlns='urn:xmpp:sm:3'><optional/></sm></stream:features>",
        )
        .sends(ENABLE)
        .receives(&failed("unexpected-request"))
        .gives(ready(false))
        .writes(&[M])
        .sends(M)
        .is_quiet();
    let mut without = site();
    without.use_management = false;
    initiating(without)
        .authenticated()
        .receives("<stream:features><sm xmlns='urn:xmpp:sm:3'/></stream:features>")
        .gives(ready(false))
        .is_quiet();
    initiating(site())
        .authenticated()
        .receives("<stream:features><sm xmlns='urn:xmpp:sm:2'/></stream:features>")
        .gives(ready(false))
        .is_quiet();
}

/// As the initiating entity: a request ends each batch, and what comes back is passed on as a count.
#[test]
fn we_ask_after_each_batch() {
    let confirmed = |stanzas| initiating::Output::Confirmed { stanzas };
    initiating(site())
        .managed()
        .writes(&[M, M])
        .sends(&format!("{M}{M}{R}"))
        .is_quiet()
        .writes(&[M])
        .sends(&format!("{M}{R}"))
        .is_quiet()
        .receives(&a(2))
        .gives(confirmed(2))
        .is_quiet()
        .receives(&a(2))
        .is_quiet()
        .receives(&a(3))
        .gives(confirmed(3))
        .is_quiet();
}

/// As the initiating entity: no stanza comes this way, so our own count stays 0.
#[test]
fn we_have_handled_nothing() {
    initiating(site()).managed().receives(R).sends(&a(0)).is_quiet();
}

/// §6: a count beyond what was sent, or below what was acknowledged, ends the stream; nothing of it is passed on.
#[test]
fn we_refuse_impossible_counts() {
    let mut stream = initiating(site());
    stream
        .managed()
        .writes(&[M, M])
        .sends(&format!("{M}{M}{R}"))
        .receives(&a(3))
        .sends(
            "<stream:error><undefined-condition xmlns='urn:ietf:params:xml:ns:xmpp-streams'/>\
             <text xmlns='urn:ietf:params:xml:ns:xmpp-streams' xml:lang='en'>h is 3, but only 2 were sent</text>\
             <handled-count-too-high xmlns='urn:xmpp:sm:3' h='3' send-count='2'/></stream:error></stream:stream>",
        )
        .ends_as("our_error");
    initiating(site())
        .managed()
        .writes(&[M, M])
        .sends(&format!("{M}{M}{R}"))
        .receives(&a(2))
        .gives(initiating::Output::Confirmed { stanzas: 2 })
        .receives(&a(1))
        .refuses("undefined-condition");
    for bad in [
        "<a xmlns='urn:xmpp:sm:3'/>",
        "<a xmlns='urn:xmpp:sm:3' h='-1'/>",
        "<a xmlns='urn:xmpp:sm:3' h='4294967296'/>",
    ] {
        initiating(site()).managed().receives(bad).refuses("bad-format");
    }
    initiating(site())
        .ready()
        .receives(&a(0))
        .refuses("unsupported-stanza-type");
    initiating(site())
        .ready()
        .receives(R)
        .refuses("unsupported-stanza-type");
    initiating(site())
        .ready()
        .receives(ENABLED)
        .refuses("unsupported-stanza-type");
}

/// As the initiating entity: acknowledgements still count while the stream is being closed.
#[test]
fn we_count_while_draining() {
    initiating(site())
        .managed()
        .writes(&[M])
        .sends(&format!("{M}{R}"))
        .handle(initiating::Input::Drain)
        .sends("</stream:stream>")
        .is_quiet()
        .receives(&format!("{R}{}</stream:stream>", a(1)))
        .gives(initiating::Output::Confirmed { stanzas: 1 })
        .closes(CloseReason::Drained);
}

/// As the initiating entity: a server that takes what we send and never says so is left, after a long time without progress.
#[test]
fn we_do_not_wait_for_ever() {
    initiating(site())
        .managed()
        .waits(10_000)
        .is_quiet()
        .writes(&[M, M])
        .sends(&format!("{M}{M}{R}"))
        .waits(599)
        .receives(&a(1))
        .gives(initiating::Output::Confirmed { stanzas: 1 })
        .waits(599)
        .is_quiet()
        .waits(1)
        .sends("</stream:stream>")
        .ends_as("timeout");
}
