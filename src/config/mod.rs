//! The configuration: one YAML file, read whole and checked before anything starts.
//!
//! Every key has its meaning, default and reason here, and from here they get into `config/schema.json` (for editors)
//! and `config/example.yaml` (for people); tests hold the three together. [`Config::load`] reports all mistakes at
//! once, each with its line, column and a suggestion, so that a file is put right in one go.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{codec::xml, mirror};

mod check;
mod queue;
mod read;
mod values;

pub use queue::{Classes, Direction, Match, Rule, StanzaKind};
pub use read::{ConfigError, Warning};
pub use values::{
    AddressPattern, ClassName, CountOrOff, Domain, HostPort, ListenAddress, Name, Payload, Period, PeriodOrOff,
    PublicKey, RoomPattern, Size, SizeOrOff, StanzaType,
};

/// The configuration of one narrows sidecar.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What this site is called in logs, metrics and the peer's status.
    ///
    /// No default: two sites must not have the same name.
    pub site: Name,

    /// The directory that holds what must survive a restart: the queues, and by default the certificates.
    ///
    /// No default: it needs a local disk that is kept (SQLite's write-ahead log does not work on a network share).
    pub data_dir: PathBuf,

    /// Settings for a kind of link, in place of the defaults: `lan`, `vsat`, `satcom` or `hf` (`config/hf.yaml` and so on). Keys that stand in
    /// this file win, a list as a whole.
    ///
    /// Default: none; the defaults are for a satellite link of some kbit/s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<Profile>,

    /// The server that this sidecar stands beside.
    pub local: Local,

    /// The S2S streams between this sidecar and the local server.
    #[serde(default)]
    pub legs: Legs,

    /// The connection between the sidecars.
    pub link: Link,

    /// The sites at the other ends of the links.
    ///
    /// No default. A stanza for a domain that is neither local nor a peer's is refused.
    #[schemars(length(min = 1))]
    pub peers: Vec<Peer>,

    /// What may wait, for how long and how much.
    #[serde(default)]
    pub queue: Queue,

    /// Rooms kept near their users, and what people see of a link that is slow or down.
    #[serde(default)]
    pub mirror: Mirror,

    /// Metrics, health and status over HTTP.
    #[serde(default)]
    pub admin: Admin,

    /// The log, on stderr.
    #[serde(default)]
    pub log: Log,
}

/// A kind of link.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    Lan,
    Vsat,
    Satcom,
    Hf,
}

impl Profile {
    #[cfg(test)]
    const ALL: [Self; 4] = [Self::Lan, Self::Vsat, Self::Satcom, Self::Hf];

    fn as_str(self) -> &'static str {
        match self {
            Self::Lan => "lan",
            Self::Vsat => "vsat",
            Self::Satcom => "satcom",
            Self::Hf => "hf",
        }
    }

    /// What it puts in place of the defaults, and why.
    fn text(self) -> &'static str {
        match self {
            Self::Lan => include_str!("../../config/lan.yaml"),
            Self::Vsat => include_str!("../../config/vsat.yaml"),
            Self::Satcom => include_str!("../../config/satcom.yaml"),
            Self::Hf => include_str!("../../config/hf.yaml"),
        }
    }
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Local {
    /// The domains of the local server, components included: far sites may write to these and to no others.
    ///
    /// No default.
    #[schemars(length(min = 1))]
    pub domains: Vec<Domain>,

    /// Where the local server takes S2S connections: a host and a port.
    ///
    /// Default: none; then the DNS is asked for the domain's SRV records, as any server would do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<HostPort>,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Legs {
    /// Where the local server finds the far domains: the addresses that DNS or the server's own override gives for them.
    ///
    /// A server that finds nobody there puts the far users out of its rooms at once, so it is well to have these sockets held by
    /// systemd (`ListenStream=` of a `.socket` unit, the same addresses): then connections wait while narrows restarts. Sockets that
    /// are passed in this way are used.
    ///
    /// Default `127.0.0.1:5299`: the server is on the same machine and has 5269 itself.
    #[schemars(length(min = 1))]
    pub listen: Vec<ListenAddress>,

    /// The directory of the CA that vouches for the far domains towards the local server, made by `narrows ca init`.
    ///
    /// Default: `ca` in `data_dir`, unless `certificate` is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificates: Option<PathBuf>,

    /// A certificate for the far domains from the site's own PKI, in place of `certificates`.
    ///
    /// Default: none. It must name every far domain, and allow both server and client authentication.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<CertificateFiles>,

    /// A PEM file of the CAs that the local server's own certificate is checked against.
    ///
    /// Default: none; then the system's own are used. A server that proves itself by neither can still use dialback.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trust: Option<PathBuf>,

    /// Whether stanzas are only exchanged with the local server under TLS.
    ///
    /// Default `true`, as both servers have it. `false` is for a server on the same machine that has no TLS.
    pub require_tls: bool,

    /// Whether streams that we open go on only if the server's certificate is good for its domain.
    ///
    /// Default `false`: the server is on this machine or this LAN, and often has a certificate of its own making. `true` is for
    /// a server across a network that others use too.
    pub verify_server: bool,

    /// Whether acknowledgements (XEP-0198) are used with the local server.
    ///
    /// Default `auto`: on the streams that we open, with a server that speaks it. `on`: also on those that the server opens. `off`:
    /// never; a server that has it is then asked for pings in its place, as one that has not.
    ///
    /// `on` trades one loss for a worse one. When narrows is killed, Prosody returns to the room what was not acknowledged, and
    /// the room puts those occupants out. Measured, with 30 messages a second for 5 far occupants and 12 kills: `auto` lost 7
    /// messages of 912 and nobody fell out; `on` put out all occupants in 4 of 12 kills, and who is out hears nothing until he
    /// enters again.
    pub management: Management,

    /// How many streams towards the local server share one pair of domains, from 1 to 8. What goes to one user or one room
    /// stays on one stream and in order; what goes to different ones may then overtake.
    ///
    /// Default `1`: the order is that of a plain stream. Prosody as shipped reads at most 30 kB/s from each stream, which a
    /// large room fills: better lift that limit for the far domains (`unlimited_jids`), or else raise this.
    #[schemars(range(min = 1, max = 8))]
    pub lanes: u8,

    /// The longest wait before a stream to the local server is tried again.
    ///
    /// Default `15s`: a server that was restarted is found soon, one that is away for hours costs next to nothing.
    pub reconnect_max: Period,

    /// How many connections from the local server may be open at once.
    ///
    /// Default `256`: one per pair of domains and direction is usual, a cluster opens one per node.
    #[schemars(range(min = 1, max = 65536))]
    pub connections_max: u32,

    /// What one stanza from the local server may cost. A larger one closes its stream (`policy-violation`).
    pub limits: Limits,
}

/// A certificate chain and its private key, both PEM.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateFiles {
    /// The certificate, then its issuers.
    pub chain: PathBuf,

    /// The private key of the first certificate.
    pub key: PathBuf,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Management {
    Auto,
    On,
    Off,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Bytes of one stanza.
    ///
    /// Default `512KiB`: what Prosody and ejabberd themselves accept from other servers.
    pub stanza_bytes: Size,

    /// How deep elements may be nested in a stanza.
    ///
    /// Default `64`: real stanzas stay below 20.
    #[schemars(range(min = 8, max = 1024))]
    pub depth: u16,

    /// How many attributes and namespace declarations one element may have.
    ///
    /// Default `64`: real ones stay below 16.
    #[schemars(range(min = 8, max = 1024))]
    pub attributes: u16,

    /// How many elements one stanza may hold.
    ///
    /// Default `16384`: the member list of a very large room is one stanza.
    #[schemars(range(min = 64, max = 1_000_000))]
    pub elements: u32,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// The file with this sidecar's private key, made by `narrows keygen`.
    ///
    /// No default. Only its owner may be able to read it.
    pub private_key: PathBuf,

    /// Where peers connect to this sidecar.
    ///
    /// Default: none; then this side only dials. One of the two sides must listen, both may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<ListenAddress>,

    /// How long an acknowledgement waits for something to ride on before it is sent alone.
    ///
    /// Default `5s`: alone it costs 80 to 130 bytes in both directions, as much as a chat line, and nothing waits for it but
    /// the peer's disk. Many entries are acknowledged sooner.
    #[serde(default = "Link::ack_delay")]
    pub ack_delay: Period,

    /// How long nothing may be heard before the peer is asked for a sign of life, or `off` where every byte is paid for. While
    /// nothing else is said, the time doubles up to `keepalive_max`.
    ///
    /// Default `60s`: some 2 bytes a second at most. With `off`, a dead link is noticed when something is to be sent.
    #[serde(default = "Link::keepalive")]
    pub keepalive: PeriodOrOff,

    /// The longest time between two signs of life.
    ///
    /// Default `8m`: NATs and firewalls forget idle connections, and most wait longer than this.
    #[serde(default = "Link::keepalive_max")]
    pub keepalive_max: Period,

    /// How long the peer may be silent while an answer is due before another connection is tried beside the present one.
    /// On a slow path, four round trips if that is longer.
    ///
    /// Default `3s`: a link that is back after an outage is used at once, though TCP would wait.
    #[serde(default = "Link::quiet_after")]
    pub quiet_after: Period,

    /// How long the peer may be silent while an answer is due before the connection is given up. On a slow path, eight round
    /// trips if that is longer.
    ///
    /// Default `15s`: longer than `quiet_after`, so that a full queue in a modem does not look like an outage, and far less
    /// than TCP's own minutes. Raise it where a line stalls for longer without being down.
    #[serde(default = "Link::dead_after")]
    pub dead_after: Period,

    /// The longest wait before the peer is dialled again.
    ///
    /// Default `3s`: a link that is back is used at once. One attempt without an answer costs 60 bytes and the kernel's repeats.
    #[serde(default = "Link::reconnect_max")]
    pub reconnect_max: Period,

    /// How many bytes are gathered, at most, into one flush of the compression.
    ///
    /// Default `4KiB`: 3.4 s at 9600 bit/s. A larger batch compresses better and lets urgent stanzas wait longer.
    #[serde(default = "Link::batch_bytes")]
    pub batch_bytes: Size,

    /// The piece in which a large stanza crosses; others may go in between.
    ///
    /// Default `1KiB`: 0.9 s at 9600 bit/s, before compression.
    #[serde(default = "Link::fragment_bytes")]
    pub fragment_bytes: Size,

    /// How what crosses is compressed. Both sides must agree; `off` wins.
    ///
    /// Default `zstd`. `off` is for a link that is thick, or where the sizes of stanzas must tell nothing of their content.
    #[serde(default = "Link::compression")]
    pub compression: Compression,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    Zstd,
    Off,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// What the peer is called in logs, metrics and the name of its database.
    ///
    /// No default. Renaming a peer starts an empty queue.
    pub name: Name,

    /// The domains that this peer speaks for, components included.
    ///
    /// No default. Stanzas from other domains that it sends are dropped and counted.
    #[schemars(length(min = 1))]
    pub domains: Vec<Domain>,

    /// The peer's public key.
    ///
    /// No default: `narrows keygen` at the peer's side printed it.
    pub public_key: PublicKey,

    /// Where the peer listens.
    ///
    /// Default: none; then this side waits to be dialled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connect: Option<HostPort>,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Queue {
    /// How many bytes may wait for each peer, in each direction. Beyond it new stanzas are refused (`resource-constraint`,
    /// type `wait`); what was accepted stays.
    ///
    /// Default `1GiB`: ten days of a 9600 bit/s link even if nothing compressed; the disk needs twice as much.
    pub bytes_max: Size,

    /// How many entries may wait for each peer, in each direction.
    ///
    /// Default `1000000`: opens in well under a second after a crash.
    #[schemars(range(min = 1000))]
    pub entries_max: u64,

    /// How long copies of one stanza for more recipients are gathered before the stanza is sent.
    ///
    /// Default `50ms`: a server's 100 copies come within 23 ms, once within 44 ms. `0s` gathers only what came in one read.
    pub collapse_window: Period,

    /// The classes that something waits in, by urgency. Each gets its share of the link, and what must stay in order does all the same.
    pub classes: Classes,

    /// What is decided about certain stanzas. The rules are asked in their order. The first that matches and drops a stanza, or says its class
    /// or expiry, is the last one asked; after one that strips, the next see what is left.
    ///
    /// Default: none. Each stanza is held against each rule, so 100 are the most.
    #[schemars(length(max = 100))]
    pub rules: Vec<Rule>,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mirror {
    /// Whether this side knows the rooms that pass it, and acts on it: for users here in far rooms, and for far users in rooms here.
    /// Each site decides for itself.
    ///
    /// Default `true`: in an outage people talk on with those near them, see who is out of reach, and nobody has to enter again.
    /// With `false` every stanza crosses as it is, in an outage it waits, and nobody is told.
    pub enabled: bool,

    /// When users see what they say themselves in a room of a far site. `reflect`: when the room has sent it back, as without
    /// narrows. `local`: at once; the room's own copy is not shown again. `auto`: `reflect` while the link is up and its round trip
    /// takes no longer than `echo_rtt_max`, else `local`.
    ///
    /// Default `auto`: on a good link all is as the room has it, on a slow one nobody waits for his own words. What is shown at
    /// once may stand in another order at its author's site than in the room, and lacks the id that some rooms give (XEP-0359). So even
    /// `local` is only for plain messages of those who may speak, in rooms that give no such ids. All else waits for the room; only
    /// while the link is down, messages do not.
    pub echo: Echo,

    /// The longest round trip with which `auto` still waits for the room.
    ///
    /// Default `2s`: three satellite hops. Beyond it people begin to say things twice.
    pub echo_rtt_max: Period,

    /// Rooms with an echo of their own. Of several that match, the first counts.
    ///
    /// Default: none; then all rooms have the `echo` above.
    #[schemars(length(max = 100))]
    pub rooms: Vec<MirrorRoom>,

    /// What people are shown while the link is down.
    pub split: Split,

    /// How long what a far service or room says of itself (service discovery, XEP-0030) is given again without asking it, or `off`.
    ///
    /// Default `10m`: clients ask at every login and whenever they enter a room. A change at the far site may be unseen here for so
    /// long.
    pub disco_lifetime: PeriodOrOff,

    /// How long a stanza may wait before it is delivered with the time at which it was sent (XEP-0203), as clients then show it.
    ///
    /// Default `5s`: below it the time of arrival is right enough, and the stanza stays as it was sent.
    pub delay_stamp_after: Period,
}

/// Rooms with an echo of their own.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MirrorRoom {
    /// The room's address, in which each `*` stands for any characters, or none.
    ///
    /// No default.
    #[serde(rename = "match")]
    pub pattern: RoomPattern,

    /// `reflect`, `local` or `auto`, as above.
    ///
    /// No default.
    pub echo: Echo,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Echo {
    Reflect,
    Local,
    Auto,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Split {
    /// How long the link may be down before anybody is told. Until then what is said waits, and nothing else is seen of it.
    ///
    /// Default `5m`: a link that comes and goes would otherwise fill every room with people who leave and return. The longer it
    /// is, the longer people talk to those whom nothing reaches, without knowing it.
    pub hold: Period,

    /// What users here see after that of the occupants beyond the link, in rooms of the far site. `leave`: they have left. `away`:
    /// they are away. `hold`: nothing. When the link is back, they are shown as they are then.
    ///
    /// Default `leave`: it is clear to everyone who does not hear. `away` is quieter in large rooms.
    pub near: SplitNear,

    /// What rooms here show after that of the occupants beyond the link. `away`: they are away. `hold`: nothing. `leave`: they have left;
    /// when the link is back they enter again, are told what has changed, and what the room's history has of what was said
    /// meanwhile (20 lines in servers as shipped); if that may not be all, they are told so. Taken up by whoever enters after it is set.
    ///
    /// Default `away`: it is the truth. As with `hold` they remain occupants, so what the room says waits for them, all of it. `leave`
    /// is for rooms in which those who do not hear must not stand, or where nothing may wait.
    pub far: SplitFar,

    /// What becomes of a user's wish to enter a far room meanwhile. `refuse`: it gets an error that clients take for "later".
    /// `provisional`: who is in the room here lets the user in, if the room has said that it is open to all, and the nick is free as
    /// far as is known; the room decides when the link is back, and who is refused then is told so.
    ///
    /// Default `refuse`: it is the truth. With `provisional` people may talk for hours whom the room does not let in after all.
    pub join: SplitJoin,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SplitNear {
    Leave,
    Away,
    Hold,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SplitFar {
    Leave,
    Away,
    Hold,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SplitJoin {
    Refuse,
    Provisional,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Admin {
    /// Where `/metrics`, `/healthz`, `/readyz`, `/status` and `/trace` are served over plain HTTP, and `POST /reload` has this file read again.
    ///
    /// Default `127.0.0.1:9275`: there is no password, so it stays on the machine. `narrows status` and `narrows reload` ask here.
    pub listen: ListenAddress,

    /// What of users may be seen here by whoever asks for it: `nothing`, `addresses`, or `bodies` (addresses too).
    ///
    /// Default `nothing`: rooms have numbers in place of names, and `narrows trace` hides addresses and bodies. `addresses`: names of rooms in
    /// `narrows top`, `/status` and `/`, and `narrows trace --addresses`. `bodies`: also `narrows trace --bodies`, which shows what people
    /// write to each other to everybody who may connect to this port.
    pub show: Shown,

    /// Of how many rooms of each peer the metrics tell the bytes (`narrows_room_bytes_total`), by their addresses.
    ///
    /// Default `0`: none. Each room is a series in Prometheus for as long as that keeps them, and its address is personal data. A room gets
    /// one when it causes a good part of all bytes, and keeps it until a restart; the others are `other`.
    #[schemars(range(max = 100))]
    pub room_metrics: u8,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Shown {
    Nothing,
    Addresses,
    Bodies,
}

#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// What is logged: `error`, `warn`, `info`, `debug` or `trace`. The environment variable `RUST_LOG` overrides it.
    ///
    /// Default `info`: starts, stops, links that come and go. `debug` has lines for each stanza.
    pub level: Level,

    /// How a line is written: `text`, or `json` for collectors.
    ///
    /// Default `text`; under systemd without time stamps and with the journal's priorities.
    pub format: Format,

    /// Whether users' addresses are shown.
    ///
    /// Default `false`: a log outlives the purpose for which it was written. Message bodies are never shown.
    pub show_addresses: bool,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    Text,
    Json,
}

/// How we prove to the local server that we are the far domains.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Identity {
    /// The directory of our own CA.
    Ca(PathBuf),
    Files {
        chain: PathBuf,
        key: PathBuf,
    },
}

impl Config {
    /// Reads and checks the file. All mistakes come at once.
    pub fn load(path: &Path) -> Result<(Self, Vec<Warning>), Vec<ConfigError>> {
        Self::load_with(path, |_| None)
    }

    /// As [`load`](Self::load); `own_key` reads the public key that belongs to the private key in a file, if it can,
    /// so that a peer that was given our own key is found.
    pub fn load_with(
        path: &Path,
        own_key: impl FnOnce(&Path) -> Option<PublicKey>,
    ) -> Result<(Self, Vec<Warning>), Vec<ConfigError>> {
        let text = read_text(path).map_err(|error| vec![ConfigError::unreadable(path, &error)])?;
        Self::parse(path, &text, own_key)
    }

    /// As [`load_with`](Self::load_with), of a text; `path` is for messages.
    pub fn parse(
        path: &Path,
        text: &str,
        own_key: impl FnOnce(&Path) -> Option<PublicKey>,
    ) -> Result<(Self, Vec<Warning>), Vec<ConfigError>> {
        let under = |profile: &str| {
            let profile = serde_yaml::from_str::<Profile>(profile).ok()?;
            Some((profile.as_str(), profile.text()))
        };
        read::read(path, text, under, |config: &Self, report| {
            check::check(config, own_key, report)
        })
    }

    pub fn identity(&self) -> Identity {
        match (&self.legs.certificate, &self.legs.certificates) {
            (Some(files), _) => Identity::Files {
                chain: files.chain.clone(),
                key: files.key.clone(),
            },
            (None, Some(directory)) => Identity::Ca(directory.clone()),
            (None, None) => Identity::Ca(self.data_dir.join("ca")),
        }
    }

    /// The JSON Schema of the file, for editors.
    pub fn schema() -> serde_json::Value {
        schemars::schema_for!(Self).to_value()
    }
}

/// A thousand peers take less than a quarter of this; what is larger is another file.
const FILE_BYTES_MAX: u64 = 1 << 20;

fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let length = File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if length as u64 > FILE_BYTES_MAX {
        return Err(io::Error::other("it is larger than 1 MiB"));
    }
    Ok(text)
}

impl Limits {
    /// For streams that have proved who they are.
    pub fn after_authentication(&self) -> xml::Limits {
        xml::Limits {
            stanza_bytes_max: usize::try_from(self.stanza_bytes.0).unwrap_or(usize::MAX),
            depth_max: self.depth.into(),
            attributes_max: self.attributes.into(),
            elements_max: self.elements as usize,
        }
    }

    /// For streams that anybody may have opened. Stream headers, features, SASL and dialback elements are below 4 KiB and
    /// 4 deep; four times that is for what nobody has thought of. It is no key, because there is nothing to gain by changing it.
    pub fn before_authentication(&self) -> xml::Limits {
        xml::Limits {
            stanza_bytes_max: 16 << 10,
            depth_max: 16,
            attributes_max: 32,
            elements_max: 128,
        }
    }
}

impl Default for Legs {
    fn default() -> Self {
        Self {
            listen: vec![ListenAddress(([127, 0, 0, 1], 5299).into())],
            certificates: None,
            certificate: None,
            trust: None,
            require_tls: true,
            verify_server: false,
            management: Management::Auto,
            lanes: 1,
            reconnect_max: Period::from_secs(15),
            connections_max: 256,
            limits: Limits::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            stanza_bytes: Size(512 << 10),
            depth: 64,
            attributes: 64,
            elements: 16_384,
        }
    }
}

impl Link {
    fn ack_delay() -> Period {
        Period::from_secs(5)
    }

    fn keepalive() -> PeriodOrOff {
        PeriodOrOff::Every(Period::from_secs(60))
    }

    fn keepalive_max() -> Period {
        Period::from_secs(480)
    }

    fn quiet_after() -> Period {
        Period::from_secs(3)
    }

    fn dead_after() -> Period {
        Period::from_secs(15)
    }

    fn reconnect_max() -> Period {
        Period::from_secs(3)
    }

    fn batch_bytes() -> Size {
        Size(4 << 10)
    }

    fn fragment_bytes() -> Size {
        Size(1 << 10)
    }

    fn compression() -> Compression {
        Compression::Zstd
    }
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            bytes_max: Size(1 << 30),
            entries_max: 1_000_000,
            collapse_window: Period::from_millis(50),
            classes: Classes::default(),
            rules: Vec::new(),
        }
    }
}

impl Mirror {
    /// The same without YAML, for the mirror itself.
    pub fn settings(&self) -> mirror::MirrorSettings {
        let rule = |room: &MirrorRoom| mirror::RoomRule {
            pattern: room.pattern.as_str().to_owned(),
            echo: room.echo.into(),
        };
        mirror::MirrorSettings {
            enabled: self.enabled,
            echo: self.echo.into(),
            echo_rtt_max: self.echo_rtt_max.0,
            rooms: self.rooms.iter().map(rule).collect(),
            split_hold: self.split.hold.0,
            split_near: match self.split.near {
                SplitNear::Leave => mirror::SplitNear::Leave,
                SplitNear::Away => mirror::SplitNear::Away,
                SplitNear::Hold => mirror::SplitNear::Hold,
            },
            split_far: match self.split.far {
                SplitFar::Leave => mirror::SplitFar::Leave,
                SplitFar::Away => mirror::SplitFar::Away,
                SplitFar::Hold => mirror::SplitFar::Hold,
            },
            split_join: match self.split.join {
                SplitJoin::Refuse => mirror::SplitJoin::Refuse,
                SplitJoin::Provisional => mirror::SplitJoin::Provisional,
            },
            disco_lifetime: self.disco_lifetime.period().unwrap_or_default(),
            delay_stamp_after: self.delay_stamp_after.0,
        }
    }
}

impl From<Echo> for mirror::Echo {
    fn from(echo: Echo) -> Self {
        match echo {
            Echo::Reflect => Self::Reflect,
            Echo::Local => Self::Local,
            Echo::Auto => Self::Auto,
        }
    }
}

impl Default for Mirror {
    fn default() -> Self {
        Self {
            enabled: true,
            echo: Echo::Auto,
            echo_rtt_max: Period::from_secs(2),
            rooms: Vec::new(),
            split: Split::default(),
            disco_lifetime: PeriodOrOff::Every(Period::from_secs(10 * 60)),
            delay_stamp_after: Period::from_secs(5),
        }
    }
}

impl Default for Split {
    fn default() -> Self {
        Self {
            hold: Period::from_secs(5 * 60),
            near: SplitNear::Leave,
            far: SplitFar::Away,
            join: SplitJoin::Refuse,
        }
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            listen: ListenAddress(([127, 0, 0, 1], 9275).into()),
            show: Shown::Nothing,
            room_metrics: 0,
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: Level::Info,
            format: Format::Text,
            show_addresses: false,
        }
    }
}

#[cfg(test)]
mod tests;
