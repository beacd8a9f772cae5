//! RFC 6120: streams, STARTTLS, stream errors, stanzas between servers.

use narrows::stream::{CloseReason, initiating, receiving};

use crate::expect::*;

// ---- §4.7 Stream attributes, §4.9.3 stream errors about the header

/// §4.7: our header is a stream between servers with both addresses, after a declaration, and each has an id of its own.
///
/// Open a stream, and after TLS again.
#[test]
fn answers_with_a_header_of_its_own() {
    let mut stream = receiving(site());
    stream
        .receives(&header("ship.example", "conference.shore.example"))
        .sends(
            "<?xml version='1.0'?><stream:stream xmlns='jabber:server' \
             xmlns:stream='http://etherx.jabber.org/streams' xmlns:db='jabber:server:dialback' \
             from='conference.shore.example' to='ship.example' id='{id}' version='1.0'>",
        )
        .sends(STARTTLS_FEATURES)
        .is_quiet();
    let first = stream.id.clone();
    stream
        .receives(STARTTLS)
        .sends(PROCEED)
        .starts_tls()
        .secured(None)
        .receives(&header("ship.example", "shore.example"))
        .sends(&header_with_id("shore.example", "ship.example", "{id}"));
    assert_ne!(first, stream.id);
}

/// §4.9.3.6 host-unknown: a header for a domain that is no peer's, or for none, is refused inside a stream of ours.
#[test]
fn refuses_a_header_for_nobody() {
    let anonymous = format!("<?xml version='1.0'?><stream:stream {NS} to='ship.example' id='{{id}}' version='1.0'>");
    for to in ["to='elsewhere.example'", "to=''", "to='a b'", "to='ship.example'", ""] {
        receiving(site())
            .receives(&format!("<stream:stream {NS} from='ship.example' {to} version='1.0'>"))
            .sends(&anonymous)
            .refuses("host-unknown");
    }
}

/// §4.9.3.9, §4.9.3.10: who says to be somebody else than our server gets no further; who does not say is asked later.
#[test]
fn judges_the_header_from() {
    for (from, condition) in [("elsewhere.example", "invalid-from"), ("a b", "improper-addressing")] {
        let mut stream = receiving(site());
        stream.receives(&header(from, "shore.example"));
        stream.sends("<?xml version='1.0'?><stream:stream ");
        let Some(Event::Sent(sent)) = stream.events.front_mut() else {
            panic!("nothing sent");
        };
        *sent = sent.split_once("version='1.0'>").unwrap().1.to_owned();
        stream.refuses(condition);
    }
    receiving(site())
        .receives(&format!("<stream:stream {NS} to='shore.example' version='1.0'>"))
        .sends(&format!(
            "<?xml version='1.0'?><stream:stream {NS} from='shore.example' id='{{id}}' version='1.0'>"
        ))
        .sends(STARTTLS_FEATURES)
        .is_quiet();
}

/// §4.9.3.25: a stream before 1.0 has no features, so no TLS either.
#[test]
fn refuses_old_versions() {
    for version in ["", "version='0.9'"] {
        receiving(site())
            .receives(&format!(
                "<stream:stream {NS} from='ship.example' to='shore.example' {version}>"
            ))
            .sends(&header_with_id("shore.example", "ship.example", "{id}"))
            .refuses("unsupported-version");
    }
}

/// §4.9.1.2: whatever comes instead of a header, the error is inside a stream.
#[test]
fn refuses_what_is_no_stream() {
    for (bytes, condition) in [
        ("GET / HTTP/1.1\r\n\r\n", "not-well-formed"),
        ("<!DOCTYPE stream [<!ENTITY a 'b'>]><stream:stream>", "restricted-xml"),
        (
            "<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' version='1.0'>",
            "invalid-namespace",
        ),
    ] {
        receiving(site())
            .receives(bytes)
            .sends(&format!(
                "<?xml version='1.0'?><stream:stream {NS} id='{{id}}' version='1.0'>"
            ))
            .refuses(condition);
    }
}

/// §4.9.3: what the XML layer refuses ends the stream with its condition, and nothing after it is read.
#[test]
fn refuses_bad_xml() {
    let long = format!(
        "<message from='a@ship.example' to='b@shore.example'><body>{}</body></message>",
        "x".repeat(600_000)
    );
    for (bytes, condition) in [
        ("<message><body></message>", "not-well-formed"),
        ("<!-- hello --><message/>", "restricted-xml"),
        ("<?php ?>", "restricted-xml"),
        ("text", "bad-format"),
        (long.as_str(), "policy-violation"),
    ] {
        receiving(site())
            .ready()
            .receives(bytes)
            .refuses(condition)
            .receives("<message from='a@ship.example' to='b@shore.example'/>")
            .is_quiet();
    }
}

/// §13.12: before authentication a stream may cost little.
#[test]
fn limits_are_small_before_authentication() {
    let long = format!(
        "<db:result from='ship.example' to='shore.example'>{}</db:result>",
        "x".repeat(20_000)
    );
    receiving(site())
        .tls_for_dialback()
        .receives(&long)
        .refuses("policy-violation");
}

// ---- §5 STARTTLS

/// §5.3.1: with TLS required, nothing but STARTTLS is offered or accepted before it.
#[test]
fn nothing_goes_before_required_tls() {
    for element in [
        "<db:result from='ship.example' to='shore.example'>k</db:result>",
        "<db:verify from='ship.example' to='shore.example' id='i'>k</db:verify>",
        "<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='EXTERNAL'>=</auth>",
        "<message from='a@ship.example' to='b@shore.example'/>",
        "<enable xmlns='urn:xmpp:sm:3'/>",
    ] {
        receiving(site())
            .receives(&header("ship.example", "shore.example"))
            .sends(&header_with_id("shore.example", "ship.example", "{id}"))
            .sends(STARTTLS_FEATURES)
            .receives(element)
            .refuses("policy-violation");
    }
}

/// §5.3.1: where TLS is a choice, it is offered beside dialback.
#[test]
fn offers_dialback_beside_optional_tls() {
    let mut site = site();
    site.require_tls = false;
    receiving(site)
        .receives(&header("ship.example", "shore.example"))
        .sends(&header_with_id("shore.example", "ship.example", "{id}"))
        .sends(
            "<stream:features><starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>\
             <dialback xmlns='urn:xmpp:features:dialback'><errors/></dialback></stream:features>",
        )
        .is_quiet();
}

/// §5.4.2.2: STARTTLS inside TLS is answered with a failure, and the stream is over.
#[test]
fn refuses_tls_twice() {
    receiving(site())
        .tls_for_dialback()
        .receives(STARTTLS)
        .sends("<failure xmlns='urn:ietf:params:xml:ns:xmpp-tls'/></stream:stream>")
        .ends_as("failed");
}

/// §5.4.3.3: what is sent in the clear behind `<starttls/>` is not taken into TLS, nor what comes before the handshake.
#[test]
fn nothing_is_carried_into_tls() {
    let opened = || {
        let mut stream = receiving(site());
        stream
            .receives(&header("ship.example", "shore.example"))
            .sends(&header_with_id("shore.example", "ship.example", "{id}"))
            .sends(STARTTLS_FEATURES);
        stream
    };
    opened()
        .receives(&format!("{STARTTLS}{}", header("ship.example", "shore.example")))
        .refuses("policy-violation");
    // White space is a keepalive.
    opened().receives(&format!("{STARTTLS}\n ")).sends(PROCEED).starts_tls();
    opened()
        .receives(STARTTLS)
        .sends(PROCEED)
        .starts_tls()
        .receives("<stream:stream>")
        .ends_as("failed");

    let mut initiating = initiating(site());
    initiating
        .handle(initiating::Input::Connected)
        .sends(&header("shore.example", "ship.example"))
        .receives(&header_with_id("ship.example", "shore.example", "s1"))
        .receives(STARTTLS_FEATURES)
        .sends(STARTTLS)
        .receives(&format!(
            "{PROCEED}{}",
            header_with_id("ship.example", "shore.example", "s2")
        ))
        .refuses("policy-violation");
}

/// §5: we begin TLS wherever it is offered, and do without it only if we may.
#[test]
fn initiating_wants_tls() {
    let unsecured = |require_tls| {
        let mut site = site();
        site.require_tls = require_tls;
        let mut stream = initiating(site);
        stream
            .handle(initiating::Input::Connected)
            .sends(&header("shore.example", "ship.example"))
            .receives(&header_with_id("ship.example", "shore.example", "s1"));
        stream
    };
    unsecured(true).receives(DIALBACK_FEATURES).refuses("policy-violation");
    unsecured(false)
        .receives(DIALBACK_FEATURES)
        .sends(&format!(
            "<db:result from='shore.example' to='ship.example'>{}</db:result>",
            key("ship.example", "shore.example", "s1")
        ))
        .is_quiet();
    unsecured(false)
        .receives("<stream:features><starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/></stream:features>")
        .sends(STARTTLS)
        .is_quiet();
    unsecured(true)
        .receives(STARTTLS_FEATURES)
        .sends(STARTTLS)
        .receives("<failure xmlns='urn:ietf:params:xml:ns:xmpp-tls'/></stream:stream>")
        .sends("</stream:stream>")
        .ends_as("failed");
}

/// XEP-0368: with direct TLS the first header is already inside it.
#[test]
fn direct_tls_needs_no_starttls() {
    use narrows::stream::{InitiatingStream, ReceivingStream, initiating::Purpose};
    use std::sync::Arc;
    Expect::new(ReceivingStream::new(Arc::new(site()), [1; 32], start(), true))
        .is_quiet()
        .secured(None)
        .receives(&header("ship.example", "shore.example"))
        .sends(&header_with_id("shore.example", "ship.example", "{id}"))
        .sends(DIALBACK_FEATURES)
        .is_quiet();
    let pair = pair("ship.example", "shore.example");
    Expect::new(InitiatingStream::new(
        Arc::new(site()),
        pair,
        Purpose::Deliver,
        [1; 32],
        start(),
        true,
    ))
    .handle(initiating::Input::Connected)
    .is_quiet()
    .secured(None)
    .sends(&header("shore.example", "ship.example"))
    .is_quiet();
}

// ---- §4.7 as the initiating entity

/// §4.7: a server that answers for others than those we asked for, or without an id, or as of old, is not ours.
#[test]
fn initiating_judges_the_answer() {
    for (header, condition) in [
        (
            header_with_id("conference.ship.example", "shore.example", "s1"),
            "invalid-from",
        ),
        (
            header_with_id("ship.example", "conference.shore.example", "s1"),
            "invalid-from",
        ),
        (header("ship.example", "shore.example"), "bad-format"),
        (header_with_id("ship.example", "shore.example", ""), "bad-format"),
        (
            format!("<stream:stream {NS} from='ship.example' id='s1'>"),
            "unsupported-version",
        ),
    ] {
        initiating(site())
            .handle(initiating::Input::Connected)
            .sends(&crate::expect::header("shore.example", "ship.example"))
            .receives(&header)
            .is_quiet()
            .receives(STARTTLS_FEATURES)
            .refuses(condition);
    }
}

/// §4.9: the server's stream error is the reason that is reported, also right after a header that says nothing.
/// §4.9.3.19: also `see-other-host`: where the server is was configured, and is not learnt.
#[test]
fn the_servers_stream_error_is_reported() {
    let error = |condition: &str| {
        format!(
            "<stream:error><{condition} xmlns='urn:ietf:params:xml:ns:xmpp-streams'/>\
             <text xmlns='urn:ietf:params:xml:ns:xmpp-streams'>Idle\nconnection</text></stream:error></stream:stream>"
        )
    };
    let reason = |condition: &str| CloseReason::ServerError {
        condition: condition.to_owned(),
        text: "Idle connection".to_owned(),
    };
    initiating(site())
        .handle(initiating::Input::Connected)
        .sends(&header("shore.example", "ship.example"))
        .receives(&format!(
            "<stream:stream {NS} id='x' version='1.0'>{}",
            error("host-unknown")
        ))
        .sends("</stream:stream>")
        .closes(reason("host-unknown"));
    initiating(site())
        .ready()
        .receives(&error("see-other-host"))
        .sends("</stream:stream>")
        .closes(reason("see-other-host"));
    receiving(site())
        .ready()
        .receives(&error("connection-timeout"))
        .sends("</stream:stream>")
        .closes(reason("connection-timeout"));
    assert_eq!(reason("connection-timeout").as_label(), "idle");
}

// ---- §8, §10 Stanzas between servers

/// §8.1: a stanza of an authenticated domain to a far domain is given out as it came, counted, with its pair.
#[test]
fn gives_stanzas_as_they_came() {
    let stanzas = [
        "<message to='b@shore.example/x@y' from='a@ship.example/r' id='1'><body>a &amp; b</body></message>",
        "<presence from='SHIP.example' to='room@conference.shore.example/nick'/>",
        "<iq type='get' id='2' from='ship.example' to='shore.example'><ping xmlns='urn:xmpp:ping'/></iq>",
    ];
    receiving(site())
        .ready()
        .receives(&stanzas.concat())
        .gives_stanza(1, pair("ship.example", "shore.example"), stanzas[0])
        .gives_stanza(2, pair("ship.example", "conference.shore.example"), stanzas[1])
        .gives_stanza(3, pair("ship.example", "shore.example"), stanzas[2])
        .is_quiet()
        .receives(" \n ")
        .is_quiet();
}

/// §4.9.3.12 not-authorized: nothing is accepted before it is known from whom.
#[test]
fn refuses_stanzas_before_authentication() {
    receiving(site())
        .tls_for_dialback()
        .receives("<message from='a@ship.example' to='b@shore.example'/>")
        .refuses("not-authorized");
}

/// §8.1.1.2, §8.1.2.2, §4.9.3: stanzas without addresses, from others or to others end the stream.
#[test]
fn refuses_stanzas_that_are_not_the_servers_to_send() {
    for (stanza, condition) in [
        ("<message to='b@shore.example'/>", "improper-addressing"),
        ("<message from='a@ship.example'/>", "improper-addressing"),
        (
            "<message from='a@conference.ship.example' to='b@shore.example'/>",
            "invalid-from",
        ),
        ("<message from='a@shore.example' to='b@shore.example'/>", "invalid-from"),
        (
            "<message from='a@ship.example.evil.example' to='b@shore.example'/>",
            "invalid-from",
        ),
        (
            "<message from='evil.example/a@ship.example' to='b@shore.example'/>",
            "invalid-from",
        ),
        ("<message from='' to='b@shore.example'/>", "invalid-from"),
        ("<message from='a@ship.example' to='b@ship.example'/>", "host-unknown"),
        (
            "<message from='a@ship.example' to='b@elsewhere.example'/>",
            "host-unknown",
        ),
        ("<message from='a@ship.example' to=''/>", "improper-addressing"),
        (
            "<stanza from='a@ship.example' to='b@shore.example'/>",
            "unsupported-stanza-type",
        ),
        (
            "<message xmlns='jabber:client' from='a@ship.example' to='b@shore.example'/>",
            "unsupported-stanza-type",
        ),
        ("<x xmlns='urn:example'/>", "unsupported-stanza-type"),
    ] {
        // Twice: what was judged once must not open a way for the next.
        receiving(site())
            .ready()
            .receives("<message from='a@ship.example' to='b@shore.example'/>")
            .gives_stanza(
                1,
                pair("ship.example", "shore.example"),
                "<message from='a@ship.example' to='b@shore.example'/>",
            )
            .receives(stanza)
            .refuses(condition);
    }
}

/// §4.5: streams between servers go one way. A stanza on one that we opened has no authenticated sender.
#[test]
fn refuses_stanzas_against_the_direction() {
    initiating(site())
        .ready()
        .receives("<message from='a@ship.example' to='b@shore.example'/>")
        .refuses("not-authorized");
    initiating(site())
        .ready()
        .receives("<x xmlns='urn:example'/>")
        .refuses("unsupported-stanza-type");
}

/// Stanzas are written as they are, and only while the stream is open.
#[test]
fn writes_stanzas_as_they_are() {
    let mut stream = initiating(site());
    stream
        .writes(&["<message/>"])
        .is_quiet()
        .ready()
        .writes(&["<message/>", "<presence/>"])
        .sends("<message/><presence/>")
        .is_quiet()
        .writes(&[])
        .is_quiet()
        .handle(initiating::Input::Drain)
        .sends("</stream:stream>")
        .writes(&["<message/>"])
        .is_quiet();
}

// ---- §4.4 Closing

/// §4.4: a stream that the server closes is closed on both sides.
#[test]
fn answers_the_closing_tag() {
    receiving(site())
        .ready()
        .receives("</stream:stream>")
        .sends("</stream:stream>")
        .closes(CloseReason::ClosedByServer);
    initiating(site())
        .ready()
        .receives("</stream:stream>")
        .sends("</stream:stream>")
        .closes(CloseReason::ClosedByServer);
}

/// §4.4: after our closing tag we read on until the server's, and send nothing more.
#[test]
fn drains_until_the_server_closes() {
    let stanza = "<message from='a@ship.example' to='b@shore.example'/>";
    receiving(site())
        .ready()
        .handle(receiving::Input::Drain)
        .sends("</stream:stream>")
        .is_quiet()
        .receives(stanza)
        .gives_stanza(1, pair("ship.example", "shore.example"), stanza)
        .receives("<db:verify from='ship.example' to='shore.example' id='i'>k</db:verify><starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>")
        .is_quiet()
        .receives("</stream:stream>")
        .closes(CloseReason::Drained);
    receiving(site())
        .ready()
        .handle(receiving::Input::Drain)
        .sends("</stream:stream>")
        .handle(receiving::Input::Eof)
        .closes(CloseReason::Drained);
    receiving(site())
        .ready()
        .handle(receiving::Input::Drain)
        .sends("</stream:stream>")
        .waits(9)
        .is_quiet()
        .waits(1)
        .ends_as("timeout");
    // A bad stanza then still ends it, in silence.
    receiving(site())
        .ready()
        .handle(receiving::Input::Drain)
        .sends("</stream:stream>")
        .receives("<message from='a@elsewhere.example' to='b@shore.example'/>")
        .ends_as("failed");
    initiating(site())
        .ready()
        .handle(initiating::Input::Drain)
        .sends("</stream:stream>")
        .waits(29)
        .is_quiet()
        .waits(1)
        .ends_as("timeout");
}

/// A connection that ends without a word is reported as that, and only once.
#[test]
fn reports_the_end_of_the_connection() {
    receiving(site())
        .ready()
        .handle(receiving::Input::Eof)
        .closes(CloseReason::Eof)
        .handle(receiving::Input::Eof)
        .receives("<message/>")
        .handle(receiving::Input::Drain)
        .waits(100)
        .is_quiet();
    initiating(site())
        .handle(initiating::Input::Eof)
        .closes(CloseReason::Eof)
        .handle(initiating::Input::Connected)
        .is_quiet();
}

// ---- Time

/// §4.6.4: who does not authenticate within a minute is sent away, wherever it stands; who has is left in peace.
#[test]
fn negotiation_is_bounded() {
    receiving(site())
        .waits(59)
        .is_quiet()
        .waits(1)
        .sends(&format!(
            "<?xml version='1.0'?><stream:stream {NS} id='{{id}}' version='1.0'>"
        ))
        .refuses("connection-timeout");
    // The clock is the connection's, not the stream's.
    receiving(site())
        .waits(30)
        .tls_for_dialback()
        .waits(30)
        .refuses("connection-timeout");
    receiving(site())
        .receives(&header("ship.example", "shore.example"))
        .sends(&header_with_id("shore.example", "ship.example", "{id}"))
        .sends(STARTTLS_FEATURES)
        .receives(STARTTLS)
        .sends(PROCEED)
        .starts_tls()
        .waits(60)
        .ends_as("timeout");
    receiving(site()).ready().waits(7 * 24 * 3600).is_quiet();
    receiving(site()).dialed_back().waits(7 * 24 * 3600).is_quiet();

    initiating(site()).waits(29).is_quiet().waits(1).ends_as("timeout");
    initiating(site())
        .connected()
        .waits(30)
        .sends("</stream:stream>")
        .ends_as("timeout");
    initiating(site()).ready().waits(7 * 24 * 3600).is_quiet();
}
