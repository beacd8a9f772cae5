//! The kinds of value that the configuration is made of. Each is read from text once and is right from then on.

use std::{fmt, net::SocketAddr, str::FromStr, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    queue::{
        class::Class,
        rules::{self, Type},
    },
    stanza,
};

/// A span of time, written like `50ms`, `30s`, `12h`.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Period(pub Duration);

/// A span of time, or `off`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PeriodOrOff {
    Off,
    Every(Period),
}

/// A number of bytes, written like `64KiB`, `2GiB`.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Size(pub u64);

/// An address to listen on: an IP address and a port.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ListenAddress(pub SocketAddr);

/// An address to connect to: a host name or an IP address, and a port.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HostPort {
    /// Without the brackets that an IPv6 address is written in.
    pub host: String,
    pub port: u16,
}

/// A sidecar's public key: 32 bytes of Ed25519 in base64, as `narrows keygen` prints it.
#[derive(Clone, Copy, Eq, PartialEq)]
pub struct PublicKey(pub [u8; 32]);

/// What a site or a peer is called in logs, file names and metrics.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Name(String);

/// An XMPP domain (RFC 7622 §3.2).
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Domain(pub stanza::Domain);

/// The address of a room, in which each `*` stands for any characters, or none.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct RoomPattern(String);

/// A number of bytes, or `off` for no limit.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SizeOrOff {
    Off,
    Upto(Size),
}

/// A number, or `off` for no limit.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CountOrOff {
    Off,
    Upto(u64),
}

/// A class of what waits. Not `control`, which is ours.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ClassName(pub Class);

/// The type of a stanza.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct StanzaType(pub Type);

/// A namespace, in which each `*` stands for any characters, and perhaps an element's name.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Payload(pub rules::Payload);

/// A domain, a bare or a full address, in which each `*` stands for any characters, or none.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AddressPattern(pub rules::Pattern);

impl Period {
    pub const fn from_millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }

    pub const fn from_secs(secs: u64) -> Self {
        Self(Duration::from_secs(secs))
    }
}

impl PeriodOrOff {
    pub const fn period(self) -> Option<Duration> {
        match self {
            Self::Off => None,
            Self::Every(period) => Some(period.0),
        }
    }
}

impl From<Option<Duration>> for PeriodOrOff {
    fn from(period: Option<Duration>) -> Self {
        period.map_or(Self::Off, |period| Self::Every(Period(period)))
    }
}

impl From<u64> for SizeOrOff {
    fn from(bytes: u64) -> Self {
        match bytes {
            u64::MAX => Self::Off,
            bytes => Self::Upto(Size(bytes)),
        }
    }
}

impl SizeOrOff {
    pub const fn value(self) -> u64 {
        match self {
            Self::Off => u64::MAX,
            Self::Upto(size) => size.0,
        }
    }
}

impl From<u64> for CountOrOff {
    fn from(count: u64) -> Self {
        match count {
            u64::MAX => Self::Off,
            count => Self::Upto(count),
        }
    }
}

impl CountOrOff {
    pub const fn value(self) -> u64 {
        match self {
            Self::Off => u64::MAX,
            Self::Upto(count) => count,
        }
    }
}

impl Name {
    /// A name is part of file names and metric labels, so it is short and plain.
    const LENGTH_MAX: usize = 48;

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl RoomPattern {
    /// Bytes: a room's name and a domain have at most 1023 each (RFC 7622 §3.1).
    const LENGTH_MAX: usize = 2047;

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What is behind the `@`.
    pub fn domain(&self) -> &str {
        stanza::domain_of(&self.0)
    }
}

impl PublicKey {
    pub const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl FromStr for Period {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text)
            .map(Self)
            .map_err(|_| format!("`{text}` is not a period: write a number and a unit, like `50ms`, `30s` or `12h`"))
    }
}

impl FromStr for PeriodOrOff {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            text => text
                .parse()
                .map(Self::Every)
                .map_err(|error: String| format!("{error}, or `off`")),
        }
    }
}

/// The units of [`Size`], largest first. Networks count in thousands and memory in 1024s, so both are read.
const SIZE_UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("B", 1),
];

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error =
            || format!("`{text}` is not a size: write a whole number and a unit, like `512B`, `64KiB` or `2GiB`");
        let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(error)?;
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| error())?;
        let unit = unit.trim_start();
        let (_, factor) = SIZE_UNITS
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(unit))
            .ok_or_else(error)?;
        number.checked_mul(*factor).map(Self).ok_or_else(error)
    }
}

impl FromStr for SizeOrOff {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            text => text
                .parse()
                .map(Self::Upto)
                .map_err(|error: String| format!("{error}, or `off`")),
        }
    }
}

impl FromStr for ClassName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = || Class::ALL.into_iter().filter(|class| *class != Class::Control);
        let found = all().find(|class| class.as_label() == text).map(Self);
        let names = || list(&mut all().map(Class::as_label));
        found.ok_or_else(|| format!("`{text}` is not a class, only {}", names()))
    }
}

impl FromStr for StanzaType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Type::ALL.into_iter().find(|of| of.as_str() == text).map(Self);
        let all = || list(&mut Type::ALL.into_iter().map(Type::as_str));
        found.ok_or_else(|| format!("`{text}` is not a type of stanza, only {}", all()))
    }
}

fn list(words: &mut dyn Iterator<Item = &'static str>) -> String {
    words.collect::<Vec<_>>().join(", ")
}

impl FromStr for Payload {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (namespace, name) = match text.split_once(' ') {
            Some((namespace, name)) => (namespace, Some(name)),
            None => (text, None),
        };
        let plain =
            |part: &str| !part.is_empty() && part.len() <= Self::LENGTH_MAX && !part.contains([' ', '<', '>', '&']);
        // A name with a colon is a prefix that means nothing here.
        if !plain(namespace) || name.is_some_and(|name| !plain(name) || name.contains([':', '*', '/'])) {
            return Err(format!(
                "`{text}` is not a payload: write a namespace, and after a space an element's name if only that is meant, like `urn:xmpp:mam:2 result`"
            ));
        }
        Ok(Self(rules::Payload {
            namespace: namespace.to_owned(),
            name: name.map(str::to_owned),
        }))
    }
}

impl Payload {
    /// Bytes of a namespace or name: real ones have less than 100.
    const LENGTH_MAX: usize = 1023;
}

impl FromStr for AddressPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // An address that it matches must be one; a `*` in its domain would not be.
        let example = text.replace('*', "x");
        match example.parse::<jid::Jid>() {
            Ok(_) if text.len() <= Self::LENGTH_MAX => Ok(Self(rules::Pattern::new(text))),
            Ok(_) | Err(_) => Err(format!(
                "`{text}` is not an address: write a domain, a room or user, or one with a resource, with `*` for any characters, like `*@conference.a.example`"
            )),
        }
    }
}

impl AddressPattern {
    /// Bytes: three parts of at most 1023 each (RFC 7622 §3.1), `@` and `/`.
    const LENGTH_MAX: usize = 3071;

    /// Between `@` and `/`, if there are any.
    pub fn domain(&self) -> &str {
        stanza::domain_of(self.0.as_str())
    }
}

impl FromStr for ListenAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self).map_err(|_| {
            format!("`{text}` is not an address to listen on: write an IP address and a port, like `127.0.0.1:5299` or `[::]:5270`")
        })
    }
}

impl FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error = || {
            format!(
                "`{text}` is not an address to connect to: write a host and a port, like `shore.example:5270`, `192.0.2.7:5270` or `[2001:db8::7]:5270`"
            )
        };
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(Self {
                host: address.ip().to_string(),
                port: address.port(),
            });
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(error)?;
        let port = port.parse().map_err(|_| error())?;
        // RFC 1123 §2.1, and underscores, which some internal zones have.
        let plain = !host.is_empty()
            && host.len() <= 253
            && host
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'));
        if !plain || port == 0 {
            return Err(error());
        }
        Ok(Self {
            host: host.to_owned(),
            port,
        })
    }
}

impl FromStr for PublicKey {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let hint = "the peer's `narrows keygen` printed it, and `narrows pubkey FILE` prints it again";
        let bytes = STANDARD
            .decode(text)
            .map_err(|_| format!("not a public key: it is not base64; {hint}"))?;
        let length = bytes.len();
        let key = bytes
            .try_into()
            .map_err(|_| format!("not a public key: it has {length} bytes instead of 32; {hint}"))?;
        Ok(Self(key))
    }
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric())
            && text.len() <= Self::LENGTH_MAX
            && text
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'));
        if plain {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!(
                "`{text}` is not a name: up to {} letters, digits, `-`, `_` and `.`, a letter or digit first",
                Self::LENGTH_MAX
            ))
        }
    }
}

impl FromStr for Domain {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // A server's domain has no local part, resource or port; the library would take some of these.
        if text.contains(['@', '/', ':', '*']) && text.parse::<std::net::Ipv6Addr>().is_err() {
            return Err(format!(
                "`{text}` is not a domain: write it alone, like `conference.a.example`"
            ));
        }
        stanza::Domain::new(text)
            .map(Self)
            .map_err(|error| format!("`{text}` is {error}"))
    }
}

impl FromStr for RoomPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // An address that it matches must be one; a `*` in its domain would not be.
        let example = text.replace('*', "x");
        match example.parse::<jid::Jid>() {
            Ok(jid) if jid.node().is_some() && jid.resource().is_none() && text.len() <= Self::LENGTH_MAX => {
                Ok(Self(text.to_lowercase()))
            }
            Ok(_) | Err(_) => Err(format!(
                "`{text}` is not the address of a room: write it with `*` for any characters, like `*@conference.a.example`"
            )),
        }
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // humantime separates the parts by spaces; a YAML value reads better in one piece.
        f.write_str(&humantime::format_duration(self.0).to_string().replace(' ', ""))
    }
}

impl fmt::Display for PeriodOrOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Every(period) => period.fmt(f),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, factor) = SIZE_UNITS
            .into_iter()
            .find(|(_, factor)| self.0 != 0 && self.0.is_multiple_of(*factor))
            .unwrap_or(("B", 1));
        write!(f, "{}{unit}", self.0 / factor)
    }
}

impl fmt::Display for SizeOrOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Upto(size) => size.fmt(f),
        }
    }
}

impl fmt::Display for ClassName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_label())
    }
}

impl fmt::Display for StanzaType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for AddressPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for RoomPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Reads, writes and describes a type by its text.
macro_rules! text_value {
    ($type:ident, $expecting:literal, $pattern:literal, $description:literal) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl serde::de::Visitor<'_> for Visitor {
                    type Value = $type;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expecting)
                    }

                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$type, E> {
                        text.parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_str(Visitor)
            }
        }

        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({
                    "type": "string",
                    "pattern": $pattern,
                    "description": $description,
                })
            }
        }
    };
}

text_value!(
    Period,
    "a period like `50ms`, `30s` or `12h`",
    r"^([0-9]+ *[a-zA-Z]+ *)+$",
    "A span of time: a number and a unit, like 50ms, 30s, 12h."
);
text_value!(
    PeriodOrOff,
    "a period like `30s`, or `off`",
    r"^(off|([0-9]+ *[a-zA-Z]+ *)+)$",
    "A span of time, like 30s, or off."
);
text_value!(
    Size,
    "a size like `64KiB` or `2GiB`",
    r"^[0-9]+ *([kKmMgGtT][iI]?)?[bB]$",
    "A number of bytes: a whole number and a unit, like 64KiB, 2GiB."
);
text_value!(
    SizeOrOff,
    "a size like `64KiB`, or `off`",
    r"^(off|[0-9]+ *([kKmMgGtT][iI]?)?[bB])$",
    "A number of bytes, like 64KiB, or off."
);
text_value!(
    ClassName,
    "a class like `bulk`",
    r"^(urgent|message|iq|presence|state|bulk)$",
    "A class of what waits."
);
text_value!(
    StanzaType,
    "a type of stanza like `groupchat`",
    r"^[a-z]+$",
    "The type of a stanza; normal and available stand for none."
);
text_value!(
    Payload,
    "a namespace like `urn:xmpp:avatar:*`",
    r"^[^ <>&]+( [^ <>&:*/]+)?$",
    "A namespace; each * stands for any characters, or none. After a space an element's name, if only that is meant."
);
text_value!(
    AddressPattern,
    "an address like `*@conference.a.example`",
    r"^[^ ]+$",
    "A domain, a bare or a full address; each * stands for any characters, or none."
);
text_value!(
    ListenAddress,
    "an IP address and a port, like `127.0.0.1:5299`",
    r"^.+:[0-9]+$",
    "An IP address and a port, like 127.0.0.1:5299 or [::]:5270."
);
text_value!(
    HostPort,
    "a host and a port, like `shore.example:5270`",
    r"^.+:[0-9]+$",
    "A host name or IP address and a port, like shore.example:5270."
);
text_value!(
    PublicKey,
    "a public key: 32 bytes in base64",
    r"^[A-Za-z0-9+/]{43}=$",
    "A public key as `narrows keygen` prints it: 32 bytes in base64."
);
text_value!(
    Name,
    "a name",
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,47}$",
    "Letters, digits, `-`, `_` and `.`."
);
text_value!(Domain, "a domain", r"^[^@/:*]+$", "An XMPP domain.");
text_value!(
    RoomPattern,
    "the address of a room, like `*@conference.a.example`",
    r"^[^@/]+@[^@/]+$",
    "A room's address; each * stands for any characters, or none."
);

impl<'de> Deserialize<'de> for CountOrOff {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = CountOrOff;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number, or `off`")
            }

            fn visit_u64<E: serde::de::Error>(self, count: u64) -> Result<CountOrOff, E> {
                Ok(CountOrOff::Upto(count))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<CountOrOff, E> {
                match text {
                    "off" => Ok(CountOrOff::Off),
                    text => Err(E::invalid_value(serde::de::Unexpected::Str(text), &self)),
                }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl Serialize for CountOrOff {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => serializer.serialize_str("off"),
            Self::Upto(count) => serializer.serialize_u64(*count),
        }
    }
}

impl JsonSchema for CountOrOff {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "CountOrOff".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "oneOf": [{"type": "integer", "minimum": 0}, {"const": "off"}],
            "description": "A whole number, or off.",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown is what can be written, and a number without a unit is refused.
    #[test]
    fn sizes_have_units_and_read_back() {
        for (text, bytes) in [
            ("64KiB", 65_536),
            ("2GiB", 2 << 30),
            ("1kB", 1000),
            ("512B", 512),
            ("0B", 0),
        ] {
            let size: Size = text.parse().unwrap();
            assert_eq!(size, Size(bytes));
            assert_eq!(size.to_string().parse::<Size>().unwrap(), size);
        }
        for text in ["64", "", "KiB", "-1B", "1.5MiB", "1XB", "99999999TiB"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    /// As above, for time.
    #[test]
    fn periods_have_units_and_read_back() {
        for text in ["50ms", "30s", "12h", "1m30s", "0s"] {
            let period: Period = text.parse().unwrap();
            assert_eq!(period.to_string(), text);
        }
        for text in ["50", "", "ms", "-1s", "1parsec"] {
            assert!(text.parse::<Period>().is_err(), "{text}");
        }
        assert_eq!("off".parse(), Ok(PeriodOrOff::Off));
    }

    /// Hosts may be names or addresses of both families; a port is needed.
    #[test]
    fn host_and_port_are_both_needed() {
        for text in ["shore.example:5270", "192.0.2.7:5270", "[2001:db8::7]:5270"] {
            assert_eq!(text.parse::<HostPort>().unwrap().to_string(), text);
        }
        for text in [
            "shore.example",
            "shore.example:",
            ":5270",
            "a b:1",
            "shore.example:0",
            "2001:db8::7",
            "x:70000",
        ] {
            assert!(text.parse::<HostPort>().is_err(), "{text}");
        }
    }

    /// A key is 32 bytes; anything else is named as what it is.
    #[test]
    fn public_keys_have_32_bytes() {
        let key = PublicKey([7; 32]);
        assert_eq!(key.to_string().parse(), Ok(key));
        assert!("AAAA".parse::<PublicKey>().unwrap_err().contains("3 bytes"));
        assert!("ssh-ed25519".parse::<PublicKey>().unwrap_err().contains("base64"));
    }

    /// Names go into file names and labels, domains into stream headers.
    #[test]
    fn names_and_domains_are_checked() {
        assert!("ship-1".parse::<Name>().is_ok());
        for text in ["", ".", "../x", "a b", "é", "-x", &"x".repeat(49)] {
            assert!(text.parse::<Name>().is_err(), "{text}");
        }
        assert_eq!("A.Example".parse::<Domain>().unwrap().to_string(), "a.example");
        for text in ["", "a@b.example", "a.example/x", "a.example:5269", "*.a.example", "a b"] {
            assert!(text.parse::<Domain>().is_err(), "{text}");
        }
    }

    /// A pattern must be able to match a room, whose address is in lower case and has no resource.
    #[test]
    fn room_patterns_are_checked() {
        for (text, read) in [
            ("*@conference.a.example", "*@conference.a.example"),
            ("Ops-*@*.A.example", "ops-*@*.a.example"),
            ("*@*", "*@*"),
            ("über@a.example", "über@a.example"),
        ] {
            let pattern: RoomPattern = text.parse().unwrap();
            assert_eq!(pattern.as_str(), read);
        }
        assert_eq!("*@*.a.example".parse::<RoomPattern>().unwrap().domain(), "*.a.example");
        let long = format!("{}*@a.example", "*".repeat(2040));
        for text in [
            "",
            "*",
            "a.example",
            "@a.example",
            "a@",
            "a@b@c",
            "a@b/c",
            "*@*/x",
            "a b@c",
            &long,
        ] {
            assert!(text.parse::<RoomPattern>().is_err(), "{text}");
        }
    }
}
