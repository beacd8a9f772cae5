//! What a stanza of a room says (XEP-0045), as far as a mirror must understand it.

use std::collections::BTreeSet;

use super::words::mark_of;
use crate::{codec::xml::Node, stanza::ns};

/// XEP-0045 §5.1 and §5.2, in the words of the room: they are only ever compared and repeated.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Item {
    pub affiliation: String,
    pub role: String,
    pub nick: Option<String>,
    pub jid: Option<String>,
}

/// The `x` in `muc#user` of a presence.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct MucUser {
    pub items: Vec<Item>,
    pub codes: BTreeSet<u16>,
    pub destroyed: bool,
}

/// XEP-0045 §15.6.2
pub const SELF_PRESENCE: u16 = 110;
pub const NEW_ROOM: u16 = 201;
pub const BANNED: u16 = 301;
pub const MEMBERS_ONLY: u16 = 322;
pub const NEW_NICK: u16 = 303;
/// Removed because of an error or a lost server.
pub const LOST: u16 = 333;

impl MucUser {
    /// Of somebody about whom no more is known.
    pub fn gone() -> Self {
        let item = Item {
            affiliation: "none".to_owned(),
            role: "none".to_owned(),
            ..Item::default()
        };
        Self {
            items: vec![item],
            ..Self::default()
        }
    }

    pub fn of(node: &Node) -> Option<Self> {
        let x = node.child(ns::MUC_USER, "x")?;
        let items = x.children_in(ns::MUC_USER).filter(|child| child.name == "item");
        let item = |node: &Node| Item {
            affiliation: node.attribute("affiliation").unwrap_or("none").to_owned(),
            role: node.attribute("role").unwrap_or_default().to_owned(),
            nick: node.attribute("nick").map(str::to_owned),
            jid: node.attribute("jid").map(str::to_owned),
        };
        let codes = x.children_in(ns::MUC_USER).filter(|child| child.name == "status");
        Some(Self {
            items: items.map(item).collect(),
            codes: codes.filter_map(|code| code.attribute("code")?.parse().ok()).collect(),
            destroyed: x.child(ns::MUC_USER, "destroy").is_some(),
        })
    }

    /// The occupant's role and affiliation, as a mark.
    pub fn standing(&self) -> u64 {
        let item = self.items.first();
        let of = |part: fn(&Item) -> &String| item.map_or(&[][..], |item| part(item).as_bytes());
        mark_of(&[of(|item| &item.role), of(|item| &item.affiliation)])
    }

    pub fn is_self(&self) -> bool {
        self.codes.contains(&SELF_PRESENCE)
    }

    fn is_nick_change(&self) -> bool {
        self.codes.contains(&NEW_NICK)
    }

    /// Of an unavailable presence: the nick under which the occupant goes on.
    pub fn new_nick(&self) -> Option<&str> {
        let new = self.items.iter().find_map(|item| item.nick.as_deref());
        new.filter(|_| self.is_nick_change())
    }

    /// Of an unavailable presence: whether the occupant is out. With another role it is only hidden: Prosody's way to
    /// withdraw whom `presencebroadcast` excludes.
    fn is_leave(&self) -> bool {
        self.destroyed
            || self
                .items
                .iter()
                .all(|item| item.role.is_empty() || item.role == "none")
    }

    /// Whether somebody has left of his own will: nobody has put him out, and he does not go on under another nick.
    pub fn is_plain_leave(&self) -> bool {
        self.is_leave() && !self.destroyed && self.codes.iter().all(|&code| code == SELF_PRESENCE)
    }

    /// Whether it tells its recipients that they are out themselves. ejabberd tells so of a room that is destroyed without saying whose
    /// presence it is (measured): each occupant gets the one of its own nick.
    pub fn is_own_leave(&self) -> bool {
        self.destroyed || self.is_self() && !self.is_nick_change() && self.is_leave()
    }

    pub fn role(&self) -> &str {
        self.items.first().map_or("", |item| &item.role)
    }
}
