//! What differs between any two runs of one scenario, and is therefore not compared as it is.
//!
//! Servers make ids, stamps and hashes. A [`Masked`] stanza has placeholders for them, and lists the values that stood
//! there: two runs agree when the skeletons are equal and one renaming turns the values of the one into those of the
//! other. So a reference (the same stanza-id for every recipient, the same occupant-id for every message) is compared,
//! while the value is not. Stamps are the exception: two messages of one second share one in Prosody, so they prove
//! nothing about each other.

use super::xml::{Element, Node};
use crate::client::{DISCO_INFO, DISCO_ITEMS, MUC_ADMIN, MUC_USER, OWN_ID};

const SID: &str = "urn:xmpp:sid:0";
const MAM: &str = "urn:xmpp:mam:2";
const MAM_TMP: &str = "urn:xmpp:mam:tmp";
const RSM: &str = "http://jabber.org/protocol/rsm";
const FORMS: &str = "jabber:x:data";
const OCCUPANT_ID: &str = "urn:xmpp:occupant-id:0";
const DELAY: &str = "urn:xmpp:delay";
const PUBSUB: &str = "http://jabber.org/protocol/pubsub";
const PUBSUB_EVENT: &str = "http://jabber.org/protocol/pubsub#event";
const ROSTER: &str = "jabber:iq:roster";

/// A kind of value that the servers make.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Volatile {
    /// The id of a stanza, when no script has made it.
    Id,
    /// Where an archive keeps a message: stanza-id, archived, the result of a query and its page marks.
    Archive,
    /// HMAC of an occupant's address with a secret of the server.
    Occupant,
    /// An item that a server publishes for a user: ejabberd does for the avatar in a vCard.
    Item,
    /// The version of a roster.
    Version,
}

/// A stanza without what differs in every run.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Masked {
    pub skeleton: String,
    pub values: Vec<(Volatile, String)>,
}

pub fn mask(stanza: &Element) -> Masked {
    let mut stanza = stanza.clone();
    let mut values = Vec::new();
    let id = stanza.attrs.get_mut("id").filter(|id| !id.starts_with(OWN_ID));
    if let Some(id) = id {
        hide(Volatile::Id, id, &mut values);
    }
    below(&mut stanza, &mut values);
    Masked {
        skeleton: stanza.canonical(),
        values,
    }
}

fn hide(kind: Volatile, value: &mut String, values: &mut Vec<(Volatile, String)>) {
    values.push((kind, std::mem::replace(value, format!("#{kind:?}"))));
}

fn below(element: &mut Element, values: &mut Vec<(Volatile, String)>) {
    let attribute = match (element.ns.as_str(), element.name.as_str()) {
        (SID, "stanza-id") | (MAM_TMP, "archived") | (MAM, "result") => Some(("id", Volatile::Archive)),
        (OCCUPANT_ID, "occupant-id") => Some(("id", Volatile::Occupant)),
        (ROSTER, "query") => Some(("ver", Volatile::Version)),
        (PUBSUB | PUBSUB_EVENT, "item") => Some(("id", Volatile::Item)),
        _ => None,
    };
    if let Some((name, kind)) = attribute
        && let Some(value) = element.attrs.get_mut(name).filter(|value| !value.starts_with(OWN_ID))
    {
        hide(kind, value, values);
    }
    if element.ns == DELAY
        && let Some(stamp) = element.attrs.get_mut("stamp")
    {
        *stamp = "#Stamp".to_owned();
    }
    if element.ns == RSM && matches!(element.name.as_str(), "first" | "last") {
        for node in &mut element.children {
            if let Node::Text(text) = node {
                hide(Volatile::Archive, text, values);
            }
        }
    }
    // Sets come in the order of a server's hash table.
    match element.ns.as_str() {
        MUC_USER | MUC_ADMIN | DISCO_ITEMS | ROSTER => sort(&mut element.children, |child| child.name == "item"),
        FORMS => sort(&mut element.children, |child| child.name == "field"),
        DISCO_INFO | RSM => sort(&mut element.children, |_| true),
        _ => {}
    }
    for node in &mut element.children {
        if let Node::Element(child) = node {
            below(child, values);
        }
    }
}

/// Whether it tells where the room's archive keeps a message.
pub fn is_archive_id(element: &Element) -> bool {
    matches!(
        (element.ns.as_str(), element.name.as_str()),
        (SID, "stanza-id") | (MAM_TMP, "archived")
    )
}

/// Sorts every run of such elements among themselves.
fn sort(children: &mut [Node], is_of_set: impl Fn(&Element) -> bool) {
    let is_of_set = |node: &Node| matches!(node, Node::Element(element) if is_of_set(element));
    for run in children.chunk_by_mut(|one, other| is_of_set(one) && is_of_set(other)) {
        run.sort_by_cached_key(|node| match node {
            Node::Element(element) => element.canonical(),
            Node::Text(text) => text.clone(),
        });
    }
}

/// Whether a server asks for the meaning of a capabilities hash (XEP-0115 §6.2). Whom it asks, on behalf of whom and when
/// depends on what it has heard first and on what it still remembers: that is its own affair, and not compared.
pub fn is_capabilities_request(stanza: &Element) -> bool {
    let query = stanza.child(DISCO_INFO, "query").and_then(|query| query.attr("node"));
    let own = stanza.attr("id").is_some_and(|id| id.starts_with(OWN_ID));
    !own && stanza.name == "iq" && stanza.attr("type") == Some("get") && query.is_some_and(|node| node.contains('#'))
}
