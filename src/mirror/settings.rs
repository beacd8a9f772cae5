//! How rooms are mirrored: what an administrator has decided, as plain values.
//!
//! The defaults are those of the configuration, which explains each of them.

use std::time::Duration;

use crate::stanza::matches;

/// When users of a far room see what they say themselves.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Echo {
    /// When the room has sent it back.
    Reflect,
    /// At once.
    Local,
    /// `Reflect` while the link is up and quick enough, else `Local`.
    Auto,
}

/// What near users are shown of occupants beyond a link that is down.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SplitNear {
    /// That they have left.
    Leave,
    /// That they are away.
    Away,
    /// Nothing.
    Hold,
}

/// What a room shows of its occupants beyond a link that is down.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SplitFar {
    /// That they have left: they are out of it until the link is back.
    Leave,
    /// That they are away.
    Away,
    /// Nothing.
    Hold,
}

/// What becomes of a wish to enter a far room while the link is down.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SplitJoin {
    /// It is refused, for now.
    Refuse,
    /// Those who are beside each other let it in, if the room is open; the room decides when the link is back.
    Provisional,
}

/// An echo for some rooms.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RoomRule {
    /// The room's bare JID in lower case; each `*` stands for any characters, or none.
    pub pattern: String,
    pub echo: Echo,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MirrorSettings {
    /// Without it the pair is exact: everything crosses as it is.
    pub enabled: bool,
    /// For rooms of which no rule says anything else.
    pub echo: Echo,
    /// The round trip up to which [`Echo::Auto`] reflects.
    pub echo_rtt_max: Duration,
    /// The first that matches wins.
    pub rooms: Vec<RoomRule>,
    /// How long the link may be down before anybody is told.
    pub split_hold: Duration,
    pub split_near: SplitNear,
    pub split_far: SplitFar,
    pub split_join: SplitJoin,
    /// How long answers of service discovery are given again; zero: never.
    pub disco_lifetime: Duration,
    /// What has waited longer is delivered with the time at which it was sent (XEP-0203).
    pub delay_stamp_after: Duration,
}

impl MirrorSettings {
    /// The echo of a room, given by its bare JID as [prepared](https://www.rfc-editor.org/rfc/rfc7622#section-3).
    pub fn echo_of(&self, room: &str) -> Echo {
        let rule = self.rooms.iter().find(|rule| matches(&rule.pattern, room));
        rule.map_or(self.echo, |rule| rule.echo)
    }
}

impl Default for MirrorSettings {
    fn default() -> Self {
        Self {
            enabled: true,
            echo: Echo::Auto,
            echo_rtt_max: Duration::from_secs(2),
            rooms: Vec::new(),
            split_hold: Duration::from_secs(5 * 60),
            split_near: SplitNear::Leave,
            split_far: SplitFar::Away,
            split_join: SplitJoin::Refuse,
            disco_lifetime: Duration::from_secs(10 * 60),
            delay_stamp_after: Duration::from_secs(5),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first rule that matches decides; where none does, the echo of all rooms.
    #[test]
    fn first_rule_that_matches_wins() {
        let rule = |pattern: &str, echo| RoomRule {
            pattern: pattern.to_owned(),
            echo,
        };
        let settings = MirrorSettings {
            rooms: vec![
                rule("court@c.example", Echo::Reflect),
                rule("*@c.example", Echo::Local),
                rule("ops@c.example", Echo::Reflect),
            ],
            ..MirrorSettings::default()
        };
        assert_eq!(settings.echo_of("court@c.example"), Echo::Reflect);
        assert_eq!(settings.echo_of("ops@c.example"), Echo::Local);
        assert_eq!(settings.echo_of("ops@d.example"), Echo::Auto);
    }
}
