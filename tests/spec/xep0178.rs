//! XEP-0178 and RFC 6120 §6: SASL EXTERNAL, in both roles.

use narrows::stream::{Certificate, Method, initiating, receiving};

use crate::expect::*;

fn auth(text: &str) -> String {
    format!("<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='EXTERNAL'>{text}</auth>")
}

fn failure(condition: &str) -> String {
    format!("<failure xmlns='urn:ietf:params:xml:ns:xmpp-sasl'><{condition}/></failure>")
}

fn authenticated() -> receiving::Output {
    receiving::Output::Authenticated {
        pair: pair("ship.example", "shore.example"),
        how: Method::External,
    }
}

/// §3: EXTERNAL is offered to a server whose certificate is trusted and is for the domain it says to be, and to no other.
#[test]
fn offered_to_whom_it_can_succeed_for() {
    let untrusted = certificate(&["ship.example"]).map(|certificate| Certificate {
        trusted: false,
        ..certificate
    });
    for refused in [
        None,
        untrusted,
        certificate(&["conference.ship.example"]),
        certificate(&[]),
    ] {
        receiving(site())
            .tls(refused)
            .sends(DIALBACK_FEATURES)
            .is_quiet()
            .receives(&auth("="))
            .sends(&failure("invalid-mechanism"))
            .is_quiet();
    }
    receiving(site())
        .tls(certificate(&["conference.ship.example", "ship.example"]))
        .sends(EXTERNAL_FEATURES)
        .is_quiet();
}

/// A header that does not say who it is from is offered dialback only.
#[test]
fn not_offered_to_nobody() {
    receiving(site())
        .receives(&header("ship.example", "shore.example"))
        .sends(&header_with_id("shore.example", "ship.example", "{id}"))
        .sends(STARTTLS_FEATURES)
        .receives(STARTTLS)
        .sends(PROCEED)
        .starts_tls()
        .secured(certificate(&["ship.example"]))
        .receives(&format!("<stream:stream {NS} to='shore.example' version='1.0'>"))
        .sends(&format!(
            "<?xml version='1.0'?><stream:stream {NS} from='shore.example' id='{{id}}' version='1.0'>"
        ))
        .sends(DIALBACK_FEATURES)
        .is_quiet();
}

/// RFC 6120 §6.4.2: the identity is the header's, said again in base64, or left empty, or asked for.
#[test]
fn accepts_the_ways_to_say_the_identity() {
    let offered = || {
        let mut stream = receiving(site());
        stream.tls(certificate(&["ship.example"])).sends(EXTERNAL_FEATURES);
        stream
    };
    for text in ["=", "c2hpcC5leGFtcGxl", "U0hJUC5leGFtcGxl"] {
        offered()
            .receives(&auth(text))
            .gives(authenticated())
            .sends(SUCCESS)
            .is_quiet();
    }
    let challenged = || {
        let mut stream = offered();
        stream
            .receives("<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='EXTERNAL'/>")
            .sends("<challenge xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>")
            .is_quiet();
        stream
    };
    for text in ["=", "", "c2hpcC5leGFtcGxl"] {
        challenged()
            .receives(&format!(
                "<response xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>{text}</response>"
            ))
            .gives(authenticated())
            .sends(SUCCESS)
            .is_quiet();
    }
    challenged()
        .receives("<abort xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>")
        .sends(&failure("aborted"))
        .is_quiet()
        .receives(&auth("="))
        .gives(authenticated());
}

/// RFC 6120 §6.5: each way to get it wrong has its own condition, and leaves the stream open.
#[test]
fn says_what_is_wrong() {
    for (element, condition) in [
        (auth("c2hvcmUuZXhhbXBsZQ=="), "invalid-authzid"),
        (auth("Y29uZmVyZW5jZS5zaGlwLmV4YW1wbGU="), "invalid-authzid"),
        (auth("ship.example"), "incorrect-encoding"),
        (auth("/w=="), "incorrect-encoding"),
        (auth("=").replace("EXTERNAL", "PLAIN"), "invalid-mechanism"),
        (auth("=").replace(" mechanism='EXTERNAL'", ""), "invalid-mechanism"),
        (
            "<response xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>".to_owned(),
            "malformed-request",
        ),
    ] {
        receiving(site())
            .tls(certificate(&["ship.example"]))
            .sends(EXTERNAL_FEATURES)
            .receives(&element)
            .sends(&failure(condition))
            .is_quiet()
            // And may try again.
            .receives(&auth("="))
            .gives(authenticated());
    }
}

/// RFC 6120 §6.4.5: three times it may try again, then the stream is over.
#[test]
fn tries_are_bounded() {
    let mut stream = receiving(site());
    stream.tls_for_dialback();
    for _ in 0..3 {
        stream
            .receives(&auth("="))
            .sends(&failure("invalid-mechanism"))
            .is_quiet();
    }
    stream
        .receives(&auth("="))
        .sends(&failure("invalid-mechanism"))
        .refuses("policy-violation");
}

/// A failure does not stand in dialback's way: ejabberd goes on with it on the same stream.
#[test]
fn dialback_follows_a_failure() {
    let mut stream = receiving(site());
    stream
        .tls(None)
        .sends(DIALBACK_FEATURES)
        .receives(&auth("="))
        .sends(&failure("invalid-mechanism"))
        .receives("<db:result from='ship.example' to='shore.example'>k</db:result>");
    let stream_id = stream.id.clone();
    stream.gives(receiving::Output::Verify {
        request: 1,
        pair: pair("ship.example", "shore.example"),
        stream_id,
        key: "k".to_owned(),
    });
}

/// RFC 6120 §6.4.6: the stream begins anew, for the same domain, with EXTERNAL no longer offered.
#[test]
fn the_stream_after_success() {
    receiving(site())
        .authenticated()
        .sends(
            "<stream:features><dialback xmlns='urn:xmpp:features:dialback'><errors/></dialback>\
             <sm xmlns='urn:xmpp:sm:3'/>\
             <limits xmlns='urn:xmpp:stream-limits:0'><max-bytes>524288</max-bytes></limits></stream:features>",
        )
        .is_quiet()
        .receives(&auth("="))
        .refuses("policy-violation");
}

/// RFC 6120 §4.9.3.10 invalid-from: the authenticated domain cannot be exchanged for another in the header after it.
#[test]
fn the_identity_stays() {
    receiving(site())
        .tls(certificate(&["ship.example", "conference.ship.example"]))
        .sends(EXTERNAL_FEATURES)
        .receives(&auth("="))
        .gives(authenticated())
        .sends(SUCCESS)
        .receives(&header("conference.ship.example", "shore.example"))
        .sends(&header_with_id("shore.example", "conference.ship.example", "{id}"))
        .refuses("invalid-from");
}

/// What is sent before the new stream is not taken into it.
#[test]
fn nothing_is_carried_over_success() {
    receiving(site())
        .tls(certificate(&["ship.example"]))
        .sends(EXTERNAL_FEATURES)
        .receives(&format!(
            "{}<message from='a@ship.example' to='b@shore.example'/>",
            auth("=")
        ))
        .refuses("policy-violation");
}

/// As the initiating entity: our identity is the far domain's, and after success everything begins anew.
#[test]
fn we_authenticate_as_the_far_domain() {
    initiating(site())
        .authenticated()
        .receives("<stream:features/>")
        .gives(initiating::Output::Ready {
            acks: false,
            stanza_bytes_max: None,
        })
        .is_quiet();
}

/// As the initiating entity: a failure is followed by dialback on the same stream, if the server knows it.
#[test]
fn we_dial_back_after_a_failure() {
    let mut stream = initiating(site());
    stream
        .connected()
        .receives(EXTERNAL_FEATURES)
        .sends(&auth("c2hvcmUuZXhhbXBsZQ=="))
        .receives(&failure("not-authorized"))
        .sends(&format!(
            "<db:result from='shore.example' to='ship.example'>{}</db:result>",
            key("ship.example", "shore.example", "s2")
        ))
        .is_quiet();
    let plain = "<stream:stream xmlns='jabber:server' xmlns:stream='http://etherx.jabber.org/streams' \
                 from='ship.example' to='shore.example' id='s2' version='1.0'>";
    let without_dialback = "<stream:features><mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>\
                            <mechanism>EXTERNAL</mechanism></mechanisms></stream:features>";
    let mut site = site();
    site.require_tls = true;
    initiating(site)
        .handle(initiating::Input::Connected)
        .sends(&header("shore.example", "ship.example"))
        .receives(plain)
        .receives(STARTTLS_FEATURES)
        .sends(STARTTLS)
        .receives(PROCEED)
        .starts_tls()
        .secured(None)
        .sends(&header("shore.example", "ship.example"))
        .receives(plain)
        .receives(without_dialback)
        .sends(&auth("c2hvcmUuZXhhbXBsZQ=="))
        .receives(&failure("not-authorized"))
        .refuses("undefined-condition");
}

/// As the initiating entity: a challenge after everything was said is aborted; then the failure comes.
#[test]
fn we_abort_a_challenge() {
    initiating(site())
        .connected()
        .receives(EXTERNAL_FEATURES)
        .sends(&auth("c2hvcmUuZXhhbXBsZQ=="))
        .receives("<challenge xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>")
        .sends("<abort xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>")
        .receives(&failure("aborted"))
        .sends("<db:result ");
}

/// As the initiating entity: words of SASL that nothing was said for end the stream.
#[test]
fn we_refuse_unexpected_success() {
    initiating(site())
        .connected()
        .receives(SUCCESS)
        .refuses("unsupported-stanza-type");
    initiating(site())
        .ready()
        .receives(&failure("not-authorized"))
        .refuses("unsupported-stanza-type");
    initiating(site())
        .ready()
        .receives(PROCEED)
        .refuses("unsupported-stanza-type");
}

/// As the initiating entity: a server that offers nothing that we can do is left.
#[test]
fn we_need_some_way_to_authenticate() {
    let plain = "<stream:stream xmlns='jabber:server' xmlns:stream='http://etherx.jabber.org/streams' \
                 from='ship.example' id='s1' version='1.0'>";
    let mut site = site();
    site.require_tls = false;
    initiating(site)
        .handle(initiating::Input::Connected)
        .sends(&header("shore.example", "ship.example"))
        .receives(plain)
        .receives(
            "<stream:features><mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>\
             <mechanism>EXTERNAL</mechanism></mechanisms></stream:features>",
        )
        .refuses("undefined-condition");
}
