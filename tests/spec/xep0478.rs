//! XEP-0478: what size of stanza is taken, said and heard.

use narrows::stream::initiating;

use crate::expect::*;

/// §2: we say the size that our parser refuses beyond, once it is in force, and no time, because we close no idle stream.
#[test]
fn we_say_our_limit_after_authentication() {
    let mut site = site();
    site.after_authentication.stanza_bytes_max = 123_456;
    site.offer_management = false;
    receiving(site)
        .authenticated()
        .sends(
            "<stream:features><dialback xmlns='urn:xmpp:features:dialback'><errors/></dialback>\
             <limits xmlns='urn:xmpp:stream-limits:0'><max-bytes>123456</max-bytes></limits></stream:features>",
        )
        .is_quiet();
}

/// §2: the server's limit is passed on; what is no number is no limit.
#[test]
fn we_hear_the_servers_limit() {
    for (text, stanza_bytes_max) in [
        ("10000", Some(10_000)),
        (" 524288\n", Some(524_288)),
        ("", None),
        ("-1", None),
        ("x", None),
    ] {
        initiating(site())
            .authenticated()
            .receives(&format!(
                "<stream:features><limits xmlns='urn:xmpp:stream-limits:0'><max-bytes>{text}</max-bytes>\
                 <idle-seconds>600</idle-seconds></limits></stream:features>"
            ))
            .gives(initiating::Output::Ready {
                acks: false,
                stanza_bytes_max,
            })
            .is_quiet();
    }
}

/// §3: "It is acceptable for the limits on a stream to change whenever new stream features are announced": the last ones
/// count, and they do not last if the next features have none.
#[test]
fn the_last_features_count() {
    let limits = |bytes| format!("<limits xmlns='urn:xmpp:stream-limits:0'><max-bytes>{bytes}</max-bytes></limits>");
    let mechanisms =
        "<mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'><mechanism>EXTERNAL</mechanism></mechanisms>";
    for (after, stanza_bytes_max) in [(limits(500_000), Some(500_000)), (String::new(), None)] {
        initiating(site())
            .connected()
            .receives(&format!(
                "<stream:features>{mechanisms}{}</stream:features>",
                limits(10_000)
            ))
            .sends("<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='EXTERNAL'>c2hvcmUuZXhhbXBsZQ==</auth>")
            .receives(SUCCESS)
            .sends(&header("shore.example", "ship.example"))
            .receives(&header_with_id("ship.example", "shore.example", "s3"))
            .receives(&format!("<stream:features>{after}</stream:features>"))
            .gives(initiating::Output::Ready {
                acks: false,
                stanza_bytes_max,
            });
    }
}
