//! XEP-0185: the keys that we send are those that we later say to be ours.

use narrows::stream::initiating;

use crate::expect::*;

/// The key on an initiating stream is valid when the server asks for it on a receiving one.
///
/// Take it from one stream's `<db:result/>` and ask another stream about it.
#[test]
fn our_keys_verify() {
    let mut stream = initiating(site());
    stream.connected().receives(DIALBACK_FEATURES);
    let Some(Event::Sent(sent)) = stream.events.pop_front() else {
        panic!("no key");
    };
    let key = sent.split(['>', '<']).nth(2).unwrap();
    assert_eq!(key.len(), 64);
    let verdict = |id: &str, key: &str, answer: &str| {
        receiving(site())
            .tls_for_dialback()
            .receives(&format!(
                "<db:verify from='ship.example' to='shore.example' id='{id}'>{key}</db:verify>"
            ))
            .sends(&format!(
                "<db:verify from='shore.example' to='ship.example' id='{id}' type='{answer}'/>"
            ))
            .is_quiet();
    };
    verdict("s2", key, "valid");
    verdict("s1", key, "invalid");
    verdict("s2", &key[1..], "invalid");
    verdict("s2", "", "invalid");
}

/// A stream id that could be confused with the other fields of a key is refused (CVE-2016-0756).
#[test]
fn no_key_for_confusable_ids() {
    for id in ["a b", "a\u{a0}b"] {
        initiating(site())
            .handle(initiating::Input::Connected)
            .sends(&header("shore.example", "ship.example"))
            .receives(&header_with_id("ship.example", "shore.example", "s1"))
            .receives(STARTTLS_FEATURES)
            .sends(STARTTLS)
            .receives(PROCEED)
            .starts_tls()
            .secured(None)
            .sends(&header("shore.example", "ship.example"))
            .receives(&header_with_id("ship.example", "shore.example", id))
            .receives(DIALBACK_FEATURES)
            .refuses("bad-format");
    }
}
