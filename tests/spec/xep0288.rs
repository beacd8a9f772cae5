//! XEP-0288: bidirectional streams are neither offered nor used.

use crate::expect::*;

/// §2.2: `<bidi/>` without an offer means nothing, before authentication and after it.
#[test]
fn bidi_is_ignored() {
    let bidi = "<bidi xmlns='urn:xmpp:bidi'/>";
    receiving(site()).tls_for_dialback().receives(bidi).is_quiet();
    receiving(site()).ready().receives(bidi).is_quiet();
}

/// §2.1: offered to us, it is not taken up.
#[test]
fn bidi_is_not_asked_for() {
    initiating(site())
        .connected()
        .receives(
            "<stream:features><bidi xmlns='urn:xmpp:features:bidi'/>\
             <dialback xmlns='urn:xmpp:features:dialback'><errors/></dialback></stream:features>",
        )
        .sends("<db:result ");
}
