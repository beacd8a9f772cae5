//! The little XML that model servers and clients need: they wrote all of it themselves, so its form is known.

use bytes::Bytes;

use super::server::Flavour;

/// An attribute of the first tag.
pub fn attribute<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let tag = &text[..text.find('>')?];
    let mut at = 0;
    while let Some(found) = tag[at..].find(name) {
        let start = at + found;
        let value = &tag[start + name.len()..];
        if tag[..start].ends_with(' ')
            && let Some(value) = value.strip_prefix("='")
        {
            return value.split('\'').next();
        }
        at = start + name.len();
    }
    None
}

/// The name of the first element.
pub fn name(text: &str) -> &str {
    let name = text.trim_start_matches('<');
    name.split([' ', '/', '>']).next().unwrap_or_default()
}

/// What stands between the first tag and its end.
pub fn inner(text: &str) -> &str {
    let Some(open) = text.find('>') else { return "" };
    match text.rfind("</") {
        Some(close) if !text[..open].ends_with('/') => &text[open + 1..close],
        Some(_) | None => "",
    }
}

/// The elements of a text, one after the other.
pub fn elements(text: &str) -> Vec<&str> {
    let mut elements = Vec::new();
    let (mut depth, mut start, mut at) = (0, 0, 0);
    while let Some(open) = text[at..].find('<').map(|open| at + open) {
        let Some(close) = text[open..].find('>').map(|close| open + close) else {
            break;
        };
        let tag = &text[open..=close];
        if depth == 0 {
            start = open;
        }
        if tag.starts_with("</") {
            depth -= 1;
        } else if !tag.ends_with("/>") {
            depth += 1;
        }
        if depth == 0 {
            elements.push(&text[start..=close]);
        }
        at = close + 1;
    }
    elements
}

/// The first child of this name.
pub fn child<'a>(text: &'a str, of_name: &str) -> Option<&'a str> {
    elements(inner(text)).into_iter().find(|child| name(child) == of_name)
}

/// The `x` of a room's words to its occupants (XEP-0045, `muc#user`).
pub fn muc_user(text: &str) -> Option<&str> {
    let mut children = elements(inner(text)).into_iter();
    children.find(|child| name(child) == "x" && attribute(child, "xmlns") == Some(MUC_USER))
}

pub const MUC_USER: &str = "http://jabber.org/protocol/muc#user";

/// Whether an `x` of `muc#user` has this status.
pub fn has_status(x: &str, code: &str) -> bool {
    let mut children = elements(inner(x)).into_iter();
    children.any(|child| name(child) == "status" && attribute(child, "code") == Some(code))
}

/// An element as this server writes it. Prosody's attributes come in the order of a hash, which `salt` stands for; ejabberd's in its
/// own. What differs only in a value comes in the same order.
pub fn write(flavour: Flavour, salt: u64, name: &str, attributes: &[(&str, Option<&str>)], payload: &str) -> Bytes {
    let mut order: Vec<usize> = (0..attributes.len()).collect();
    if flavour == Flavour::Prosody {
        order.rotate_left(salt as usize % attributes.len());
        if salt.is_multiple_of(3) {
            order.reverse();
        }
    }
    let mut text = format!("<{name}");
    for at in order {
        if let (name, Some(value)) = attributes[at] {
            text += &format!(" {name}='{value}'");
        }
    }
    if payload.is_empty() {
        text += "/>";
    } else {
        text += &format!(">{payload}</{name}>");
    }
    text.into()
}

/// Children as this server passes them on: ejabberd puts what it knows last.
pub fn recode(flavour: Flavour, payload: &str) -> String {
    match flavour {
        Flavour::Prosody => payload.to_owned(),
        Flavour::Ejabberd => {
            let is_known = |child: &&str| {
                let known = ["body", "subject", "thread", "show", "status", "priority"];
                known.contains(&name(child))
            };
            let (known, unknown): (Vec<_>, Vec<_>) = elements(payload).into_iter().partition(is_known);
            unknown.concat() + &known.concat()
        }
    }
}

pub fn text(bytes: &Bytes) -> &str {
    std::str::from_utf8(bytes).expect("servers write UTF-8")
}
