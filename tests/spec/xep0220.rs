//! XEP-0220: Server Dialback, in all its roles.

use narrows::stream::{CloseReason, Method, Verdict, initiating, receiving};

use crate::expect::*;

fn verify(request: u64, of: (&str, &str), stream_id: &str, key: &str) -> receiving::Output {
    receiving::Output::Verify {
        request,
        pair: pair(of.0, of.1),
        stream_id: stream_id.to_owned(),
        key: key.to_owned(),
    }
}

fn authenticated(local: &str, far: &str) -> receiving::Output {
    receiving::Output::Authenticated {
        pair: pair(local, far),
        how: Method::Dialback,
    }
}

fn error(element: &str, from: &str, to: &str, id: &str, error_type: &str, condition: &str) -> String {
    format!(
        "<db:{element} from='{from}' to='{to}'{id} type='error'><error type='{error_type}'>\
         <{condition} xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error></db:{element}>"
    )
}

// ---- §2.2.1 We are the receiving server

/// The key goes to the authoritative server with this stream's id; its word opens the stream.
#[test]
fn a_valid_key_opens_the_stream() {
    let stanza = "<message from='a@ship.example' to='b@shore.example'/>";
    receiving(site())
        .dialed_back()
        .receives(stanza)
        .gives_stanza(1, pair("ship.example", "shore.example"), stanza)
        .is_quiet();
}

/// "MUST close the XML stream", where nobody else is on it.
#[test]
fn an_invalid_key_closes_the_stream() {
    let mut stream = receiving(site());
    stream
        .tls_for_dialback()
        .receives("<db:result from='ship.example' to='shore.example'>k</db:result>");
    let id = stream.id.clone();
    stream
        .gives(verify(1, ("ship.example", "shore.example"), &id, "k"))
        .verdict(1, Verdict::Invalid)
        .sends("<db:result from='shore.example' to='ship.example' type='invalid'/>")
        .refuses("not-authorized");
}

/// §2.1.2: on a stream that others are on, an invalid key is a dialback error. §2.6: several pairs share a stream, and
/// each verdict opens it for its own domain.
#[test]
fn each_domain_is_proved_by_itself() {
    let room = "<presence from='room@conference.ship.example/n' to='b@shore.example'/>";
    let request = "<db:result from='conference.ship.example' to='shore.example'>k2</db:result>";
    let asked = || {
        let mut stream = receiving(site());
        stream.dialed_back().receives(request);
        let id = stream.id.clone();
        stream
            .gives(verify(2, ("conference.ship.example", "shore.example"), &id, "k2"))
            .is_quiet();
        stream
    };
    asked()
        .verdict(2, Verdict::Valid)
        .sends("<db:result from='shore.example' to='conference.ship.example' type='valid'/>")
        .gives(authenticated("conference.ship.example", "shore.example"))
        .receives(room)
        .gives_stanza(1, pair("conference.ship.example", "shore.example"), room)
        .is_quiet();
    asked()
        .verdict(2, Verdict::Invalid)
        .sends(&error(
            "result",
            "shore.example",
            "conference.ship.example",
            "",
            "auth",
            "forbidden",
        ))
        .is_quiet()
        .receives("<presence from='ship.example' to='shore.example'/>")
        .gives_stanza(
            1,
            pair("ship.example", "shore.example"),
            "<presence from='ship.example' to='shore.example'/>",
        )
        .receives(room)
        .refuses("invalid-from");
    asked().receives(room).refuses("invalid-from");
}

/// §2.5: a server that cannot be asked is an error, not a verdict; the server may try again.
#[test]
fn an_unanswered_question_is_an_error() {
    let mut stream = receiving(site());
    stream
        .tls_for_dialback()
        .receives("<db:result from='ship.example' to='shore.example'>k</db:result>");
    let id = stream.id.clone();
    stream
        .gives(verify(1, ("ship.example", "shore.example"), &id, "k"))
        .verdict(1, Verdict::Error)
        .sends(&error(
            "result",
            "shore.example",
            "ship.example",
            "",
            "cancel",
            "remote-server-not-found",
        ))
        .is_quiet()
        .receives("<db:result from='ship.example' to='shore.example'>k</db:result>")
        .gives(verify(2, ("ship.example", "shore.example"), &id, "k"))
        .is_quiet();
}

/// A verdict counts once, and only for a question that is open.
#[test]
fn stray_verdicts_are_nothing() {
    receiving(site())
        .tls_for_dialback()
        .verdict(1, Verdict::Valid)
        .is_quiet();
    receiving(site())
        .dialed_back()
        .verdict(1, Verdict::Valid)
        .is_quiet()
        .verdict(7, Verdict::Invalid)
        .is_quiet();
    // The stream that it was about has begun anew under another id.
    let mut stream = receiving(site());
    stream
        .tls(certificate(&["ship.example"]))
        .sends(EXTERNAL_FEATURES)
        .receives("<db:result from='conference.ship.example' to='shore.example'>k</db:result>");
    let id = stream.id.clone();
    stream
        .gives(verify(1, ("conference.ship.example", "shore.example"), &id, "k"))
        .receives("<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='EXTERNAL'>=</auth>")
        .gives(receiving::Output::Authenticated {
            pair: pair("ship.example", "shore.example"),
            how: Method::External,
        })
        .sends(SUCCESS)
        .verdict(1, Verdict::Valid)
        .is_quiet();
}

/// §2.2.1: an unknown target is a dialback error and "MUST NOT result in closing of the stream". So is a sender that is
/// not our server's: nobody could be asked about it.
#[test]
fn strangers_are_dialback_errors() {
    receiving(site())
        .tls_for_dialback()
        .receives("<db:result from='ship.example' to='elsewhere.example'>k</db:result>")
        .sends(&error(
            "result",
            "elsewhere.example",
            "ship.example",
            "",
            "cancel",
            "item-not-found",
        ))
        .is_quiet()
        .receives("<db:result from='elsewhere.example' to='shore.example'>k</db:result>")
        .sends(&error(
            "result",
            "shore.example",
            "elsewhere.example",
            "",
            "modify",
            "not-acceptable",
        ))
        .is_quiet()
        .receives("<db:result from='shore.example' to='shore.example'>k</db:result>")
        .sends(&error(
            "result",
            "shore.example",
            "shore.example",
            "",
            "modify",
            "not-acceptable",
        ))
        .is_quiet();
}

/// The same question twice is asked once; and more than a few open questions are refused.
#[test]
fn questions_are_bounded() {
    let mut site = site();
    for n in 0..20 {
        site.local.insert(domain(&format!("s{n}.ship.example")));
    }
    let mut stream = receiving(site);
    stream.tls_for_dialback();
    let id = stream.id.clone();
    for n in 0..16 {
        let local = format!("s{n}.ship.example");
        let request = format!("<db:result from='{local}' to='shore.example'>k</db:result>");
        stream
            .receives(&request)
            .gives(verify(n + 1, (&local, "shore.example"), &id, "k"))
            .is_quiet();
        if n < 15 {
            stream.receives(&request).is_quiet();
        }
    }
    stream
        .receives("<db:result from='s16.ship.example' to='shore.example'>k</db:result>")
        .sends(&error(
            "result",
            "shore.example",
            "s16.ship.example",
            "",
            "wait",
            "resource-constraint",
        ))
        .is_quiet();
}

/// §3: answers that nobody asked for are the known attack; they end the stream, before authentication and after it.
#[test]
fn refuses_answers_that_were_not_asked_for() {
    for answer in [
        "<db:result from='ship.example' to='shore.example' type='valid'/>",
        "<db:result from='ship.example' to='shore.example' type='invalid'/>",
        "<db:result from='ship.example' to='shore.example' type='error'/>",
        "<db:result from='ship.example' to='shore.example' type='whatever'/>",
        "<db:verify from='ship.example' to='shore.example' id='i' type='valid'/>",
    ] {
        receiving(site())
            .tls_for_dialback()
            .receives(answer)
            .refuses("invalid-from");
        receiving(site()).ready().receives(answer).refuses("invalid-from");
    }
}

/// Dialback without addresses cannot be answered.
#[test]
fn refuses_dialback_without_addresses() {
    for element in [
        "<db:result to='shore.example'>k</db:result>",
        "<db:result from='ship.example'>k</db:result>",
        "<db:result from='a b' to='shore.example'>k</db:result>",
        "<db:verify from='ship.example' id='i'>k</db:verify>",
    ] {
        receiving(site())
            .tls_for_dialback()
            .receives(element)
            .refuses("improper-addressing");
    }
    receiving(site())
        .tls_for_dialback()
        .receives("<db:verify from='ship.example' to='shore.example'>k</db:verify>")
        .refuses("bad-format");
    receiving(site())
        .tls_for_dialback()
        .receives("<db:other from='ship.example' to='shore.example'/>")
        .refuses("unsupported-stanza-type");
}

/// Without TLS dialback is enough where the site allows it.
#[test]
fn dialback_in_the_clear_where_allowed() {
    let mut site = site();
    site.require_tls = false;
    let mut stream = receiving(site);
    stream
        .receives(&header("ship.example", "shore.example"))
        .sends(&header_with_id("shore.example", "ship.example", "{id}"))
        .sends("<stream:features><starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>")
        .sends("<dialback xmlns='urn:xmpp:features:dialback'><errors/></dialback></stream:features>")
        .receives("<db:result from='ship.example' to='shore.example'>k</db:result>");
    let id = stream.id.clone();
    stream
        .gives(verify(1, ("ship.example", "shore.example"), &id, "k"))
        .verdict(1, Verdict::Valid)
        .sends("<db:result from='shore.example' to='ship.example' type='valid'/>")
        .gives(authenticated("ship.example", "shore.example"))
        .is_quiet()
        .receives(STARTTLS)
        .sends("<failure xmlns='urn:ietf:params:xml:ns:xmpp-tls'/></stream:stream>")
        .ends_as("failed");
}

// ---- §2.2.2 We are the authoritative server

/// Whoever asks is told whether a key is ours; before authentication, because ejabberd asks on a connection of its own.
#[test]
fn answers_for_the_far_domains() {
    let ours = key("ship.example", "conference.shore.example", "D60");
    let asks =
        |to: &str, id: &str, key: &str| format!("<db:verify from='ship.example' to='{to}' id='{id}'>{key}</db:verify>");
    receiving(site())
        .tls_for_dialback()
        .receives(&asks("conference.shore.example", "D60", &ours))
        .sends("<db:verify from='conference.shore.example' to='ship.example' id='D60' type='valid'/>")
        // XEP-0220 shows keys with line breaks around them.
        .receives(&asks("conference.shore.example", "D60", &format!("\n  {ours}\n")))
        .sends("<db:verify from='conference.shore.example' to='ship.example' id='D60' type='valid'/>")
        .receives(&asks("shore.example", "D60", &ours))
        .sends("<db:verify from='shore.example' to='ship.example' id='D60' type='invalid'/>")
        .receives(&asks("conference.shore.example", "D61", &ours))
        .sends("<db:verify from='conference.shore.example' to='ship.example' id='D61' type='invalid'/>")
        // "is not a stream error and therefore MUST NOT result in closing of the stream"
        .receives(&asks("elsewhere.example", "D60", &ours))
        .sends(&error(
            "verify",
            "elsewhere.example",
            "ship.example",
            " id='D60'",
            "cancel",
            "item-not-found",
        ))
        .receives(&asks("shore.example", "&apos;&lt;x/>", "k"))
        .sends("<db:verify from='shore.example' to='ship.example' id='&apos;&lt;x/&gt;' type='invalid'/>")
        .is_quiet()
        .receives("</stream:stream>")
        .sends("</stream:stream>")
        .closes(CloseReason::ClosedByServer);
}

/// The same on a stream that we opened.
#[test]
fn answers_on_an_initiating_stream_too() {
    let ours = key("ship.example", "shore.example", "x");
    initiating(site())
        .ready()
        .receives(&format!(
            "<db:verify from='ship.example' to='shore.example' id='x'>{ours}</db:verify>"
        ))
        .sends("<db:verify from='shore.example' to='ship.example' id='x' type='valid'/>")
        .is_quiet();
}

// ---- §2.1.1 We are the initiating server

fn dialing() -> Expect<narrows::stream::InitiatingStream> {
    let mut stream = initiating(site());
    stream
        .connected()
        .receives(DIALBACK_FEATURES)
        .sends(&format!(
            "<db:result from='shore.example' to='ship.example'>{}</db:result>",
            key("ship.example", "shore.example", "s2")
        ))
        .is_quiet();
    stream
}

/// The stream is ready when the server says so; with or without the key and id that Prosody adds.
#[test]
fn ready_when_the_server_says_so() {
    for answer in [
        "<db:result from='ship.example' to='shore.example' type='valid'/>",
        "<db:result from='ship.example' to='shore.example' type='valid' id='s2'>0123</db:result>",
    ] {
        dialing()
            .receives(answer)
            .gives(initiating::Output::Ready {
                acks: false,
                stanza_bytes_max: None,
            })
            .is_quiet();
    }
}

/// §2.1.1: invalid or in error, nothing is sent; the reason is the server's.
#[test]
fn not_ready_when_the_server_refuses() {
    dialing()
        .receives("<db:result from='ship.example' to='shore.example' type='invalid'/>")
        .sends("</stream:stream>")
        .closes(CloseReason::Failed {
            why: "the server says that the dialback key is not valid".into(),
        });
    dialing()
        .receives(&error(
            "result",
            "ship.example",
            "shore.example",
            "",
            "cancel",
            "remote-server-not-found",
        ))
        .sends("</stream:stream>")
        .closes(CloseReason::Failed {
            why: "the server could not verify the dialback key: remote-server-not-found".into(),
        });
}

/// "MUST ensure that the 'from' and 'to' attributes in this response correlate to a request that was sent over the same
/// XML stream".
#[test]
fn only_our_own_answer_counts() {
    for answer in [
        "<db:result from='conference.ship.example' to='shore.example' type='valid'/>",
        "<db:result from='ship.example' to='conference.shore.example' type='valid'/>",
        "<db:result from='shore.example' to='ship.example' type='valid'/>",
        "<db:verify from='ship.example' to='shore.example' id='s2' type='valid'/>",
    ] {
        dialing().receives(answer).refuses("invalid-from");
    }
    dialing()
        .receives("<db:result from='ship.example' to='shore.example'>k</db:result>")
        .refuses("not-authorized");
    // Too early, and once more.
    let valid = "<db:result from='ship.example' to='shore.example' type='valid'/>";
    initiating(site()).connected().receives(valid).refuses("invalid-from");
    initiating(site()).ready().receives(valid).refuses("invalid-from");
}

// ---- §2.1.2 We ask the authoritative server

fn asking() -> Expect<narrows::stream::InitiatingStream> {
    let purpose = initiating::Purpose::Verify {
        request: 5,
        stream_id: "our-id".to_owned(),
        key: "their<key".to_owned(),
    };
    let mut stream = initiating_for(site(), purpose);
    stream
        .connected()
        .receives(EXTERNAL_FEATURES)
        .sends("<db:verify from='shore.example' to='ship.example' id='our-id'>their&lt;key</db:verify>")
        .is_quiet();
    stream
}

fn verified(verdict: Verdict) -> initiating::Output {
    initiating::Output::Verified { request: 5, verdict }
}

/// The question goes out after TLS, without authentication; the answer is passed on and the connection closed.
#[test]
fn asks_and_closes() {
    for (answer, verdict) in [
        ("type='valid'/>", Verdict::Valid),
        ("type='invalid'/>", Verdict::Invalid),
        ("type='valid'>their&lt;key</db:verify>", Verdict::Valid),
        (
            "type='error'><error type='cancel'><item-not-found xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error></db:verify>",
            Verdict::Error,
        ),
        ("type='perhaps'/>", Verdict::Error),
    ] {
        asking()
            .receives(&format!(
                "<db:verify from='ship.example' to='shore.example' id='our-id' {answer}"
            ))
            .gives(verified(verdict))
            .sends("</stream:stream>")
            .closes(CloseReason::Done);
    }
}

/// "MUST ensure that the values of the 'from', 'to' and 'id attributes correlate": any other answer is refused, and is an
/// error to whom waits for it.
#[test]
fn only_the_answer_to_the_question_counts() {
    for answer in [
        "<db:verify from='ship.example' to='shore.example' id='other-id' type='valid'/>",
        "<db:verify from='ship.example' to='shore.example' type='valid'/>",
        "<db:verify from='conference.ship.example' to='shore.example' id='our-id' type='valid'/>",
        "<db:verify from='ship.example' to='conference.shore.example' id='our-id' type='valid'/>",
        "<db:result from='ship.example' to='shore.example' id='our-id' type='valid'/>",
    ] {
        let mut stream = asking();
        stream.receives(answer).sends("<stream:error><invalid-from ");
        stream.events.pop_front();
        stream.gives(verified(Verdict::Error)).ends_as("our_error");
    }
    // Before the question was asked.
    let mut stream = initiating(site());
    stream
        .connected()
        .receives("<db:verify from='ship.example' to='shore.example' id='our-id' type='valid'/>")
        .refuses("invalid-from");
}

/// However the connection ends, the question gets an answer, and one only.
#[test]
fn a_question_always_gets_an_answer() {
    asking()
        .handle(initiating::Input::Eof)
        .gives(verified(Verdict::Error))
        .closes(CloseReason::Eof);
    asking()
        .waits(30)
        .sends("</stream:stream>")
        .gives(verified(Verdict::Error))
        .ends_as("timeout");
    asking()
        .handle(initiating::Input::Drain)
        .sends("</stream:stream>")
        .gives(verified(Verdict::Error))
        .closes(CloseReason::Drained);
    asking()
        .receives(
            "<stream:error><not-authorized xmlns='urn:ietf:params:xml:ns:xmpp-streams'/></stream:error></stream:stream>",
        )
        .sends("</stream:stream>")
        .gives(verified(Verdict::Error))
        .ends_as("server_error");
    let purpose = initiating::Purpose::Verify {
        request: 5,
        stream_id: "our-id".to_owned(),
        key: "k".to_owned(),
    };
    initiating_for(site(), purpose)
        .handle(initiating::Input::Eof)
        .gives(verified(Verdict::Error))
        .closes(CloseReason::Eof);
}
