//! What differs between any two runs of one scenario, and is therefore not compared as it is.
//!
//! Servers make ids, stamps and hashes. A [`Masked`] stanza has placeholders for them, and lists the values that stood
//! there: two runs agree when the skeletons are equal and one renaming turns the values of the one into those of the
//! other. So a reference (the same stanza-id for every recipient, the same occupant-id for every message) is compared,
//! while the value is not. Stamps are the exception: two messages of one second share one in Prosody, so they prove
//! nothing about each other.

use super::xml::{Element, Node};
use crate::client::{DISCO_ITEMS, MUC_ADMIN, MUC_USER, OWN_ID};

const SID: &str = "urn:xmpp:sid:0";
const MAM: &str = "urn:xmpp:mam:2";
const MAM_TMP: &str = "urn:xmpp:mam:tmp";
const RSM: &str = "http://jabber.org/protocol/rsm";
const OCCUPANT_ID: &str = "urn:xmpp:occupant-id:0";
const DELAY: &str = "urn:xmpp:delay";
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
        _ => None,
    };
    if let Some((name, kind)) = attribute
        && let Some(value) = element.attrs.get_mut(name)
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
    // Lists of items come in the order of a server's hash table.
    if matches!(element.ns.as_str(), MUC_USER | MUC_ADMIN | DISCO_ITEMS | ROSTER) {
        sort_items(&mut element.children);
    }
    for node in &mut element.children {
        if let Node::Element(child) = node {
            below(child, values);
        }
    }
}

/// Sorts every run of `<item/>`s among themselves.
fn sort_items(children: &mut [Node]) {
    let is_item = |node: &Node| matches!(node, Node::Element(element) if element.name == "item");
    for run in children.chunk_by_mut(|one, other| is_item(one) && is_item(other)) {
        run.sort_by_cached_key(|node| match node {
            Node::Element(element) => element.canonical(),
            Node::Text(text) => text.clone(),
        });
    }
}
