//! Namespaces, by the names the specifications give them.

/// RFC 6120 §4.8.3: the content namespace between servers.
pub const SERVER: &str = "jabber:server";
/// RFC 6120 §4.8.1
pub const STREAM: &str = "http://etherx.jabber.org/streams";
/// RFC 6120 §4.9.2
pub const STREAM_ERRORS: &str = "urn:ietf:params:xml:ns:xmpp-streams";
/// RFC 6120 §8.3.3
pub const STANZA_ERRORS: &str = "urn:ietf:params:xml:ns:xmpp-stanzas";
/// RFC 6120 §5
pub const TLS: &str = "urn:ietf:params:xml:ns:xmpp-tls";
/// RFC 6120 §6
pub const SASL: &str = "urn:ietf:params:xml:ns:xmpp-sasl";
/// XEP-0220
pub const DIALBACK: &str = "jabber:server:dialback";
/// XEP-0220 §4
pub const DIALBACK_FEATURE: &str = "urn:xmpp:features:dialback";
/// XEP-0198
pub const MANAGEMENT: &str = "urn:xmpp:sm:3";
/// XEP-0478
pub const STREAM_LIMITS: &str = "urn:xmpp:stream-limits:0";
/// XEP-0288
pub const BIDI: &str = "urn:xmpp:bidi";
/// XEP-0288 §2.1, the stream feature.
pub const BIDI_FEATURE: &str = "urn:xmpp:features:bidi";
/// XEP-0045, on the presence of who enters a room.
pub const MUC: &str = "http://jabber.org/protocol/muc";
/// XEP-0045
pub const MUC_USER: &str = "http://jabber.org/protocol/muc#user";

/// XEP-0203
pub const DELAY: &str = "urn:xmpp:delay";
/// XEP-0045 §9
pub const MUC_ADMIN: &str = "http://jabber.org/protocol/muc#admin";
/// XEP-0045 §10
pub const MUC_OWNER: &str = "http://jabber.org/protocol/muc#owner";
/// XEP-0199
pub const PING: &str = "urn:xmpp:ping";
/// XEP-0030
pub const DISCO_INFO: &str = "http://jabber.org/protocol/disco#info";
/// XEP-0030
pub const DISCO_ITEMS: &str = "http://jabber.org/protocol/disco#items";
/// XEP-0359
pub const STANZA_ID: &str = "urn:xmpp:sid:0";
/// XEP-0421
pub const OCCUPANT_ID: &str = "urn:xmpp:occupant-id:0";
/// XEP-0060 §7.1.2.1: what a node tells its subscribers.
pub const PUBSUB_EVENT: &str = "http://jabber.org/protocol/pubsub#event";
/// XEP-0033
pub const ADDRESS: &str = "http://jabber.org/protocol/address";
/// XEP-0334
pub const HINTS: &str = "urn:xmpp:hints";
