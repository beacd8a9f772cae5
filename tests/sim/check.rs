//! What the promises say, once everything has come to rest.

use std::collections::{BTreeMap, BTreeSet};

use narrows::relay::Drop;

use crate::{
    said::{self, Copy, What},
    world::{Faults, Site, World},
};

/// What happened, so that a run which tested nothing is noticed.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub said: u64,
    pub copies: u64,
    pub casts: u64,
    pub parts: u64,
    pub cuts: u64,
    pub silences: u64,
    pub lane_breaks: u64,
    pub kills: u64,
    pub drains: u64,
    pub disks_replaced: u64,
    pub refusals: u64,
    pub refused: u64,
    pub oversize: u64,
    pub set_aside: u64,
    pub answers: u64,
    pub inbox_full: u64,
    pub forged: u64,
    pub unaccepted_lost: u64,
    pub in_doubt_lost: u64,
    pub disk_lost: u64,
    pub disk_doubled: u64,
    pub superseded: u64,
}

impl Tally {
    fn fields(&mut self) -> [&mut u64; 22] {
        [
            &mut self.said,
            &mut self.copies,
            &mut self.casts,
            &mut self.parts,
            &mut self.cuts,
            &mut self.silences,
            &mut self.lane_breaks,
            &mut self.kills,
            &mut self.drains,
            &mut self.disks_replaced,
            &mut self.refusals,
            &mut self.refused,
            &mut self.oversize,
            &mut self.set_aside,
            &mut self.answers,
            &mut self.inbox_full,
            &mut self.forged,
            &mut self.unaccepted_lost,
            &mut self.in_doubt_lost,
            &mut self.disk_lost,
            &mut self.disk_doubled,
            &mut self.superseded,
        ]
    }

    pub fn add(&mut self, mut other: Self) {
        for (sum, more) in self.fields().into_iter().zip(other.fields()) {
            *sum += *more;
        }
    }

    /// Every fault that the worlds were to have happened in some of them, and no other.
    pub fn assert_covers(&self, faults: Faults) {
        assert!(self.copies > self.casts, "too little was said");
        assert_eq!(self.parts > 0, !faults.oversize, "large ones that arrived");
        let processes_end = faults.kills || faults.replaced;
        for (what, count, expected) in [
            ("cuts", self.cuts, faults.link),
            ("lane breaks", self.lane_breaks, faults.lanes),
            ("kills", self.kills, faults.kills),
            ("drains", self.drains, faults.drains),
            ("disks replaced", self.disks_replaced, faults.replaced),
            ("refusals by servers", self.refusals, faults.poison),
            ("set aside", self.set_aside, faults.poison),
            ("over the server's limit", self.oversize, faults.oversize),
            ("refused for want of room", self.refused, faults.small_queues),
            ("links closed for want of room", self.inbox_full, faults.small_queues),
            (
                "answers",
                self.answers,
                faults.small_queues || faults.oversize || faults.poison,
            ),
            ("forged", self.forged, faults.forged),
            ("lost before they were accepted", self.unaccepted_lost, processes_end),
            ("lost with a disk", self.disk_lost, faults.replaced),
        ] {
            assert_eq!(count > 0, expected, "{what}: {count}");
        }
        // These are rare: a plain run may go without.
        let many = self.said > 100_000;
        for (what, count, expected) in [
            ("lost in doubt", self.in_doubt_lost, processes_end),
            ("doubled by a lost disk", self.disk_doubled, faults.replaced),
        ] {
            assert!(expected || count == 0, "{what}: {count}");
            assert!(!expected || !many || count > 0, "{what}: {count}");
        }
    }
}

impl World {
    /// Holds everything that was said against everything that was heard.
    pub fn check(&mut self) {
        let [a, b] = &self.sites;
        let [ends_a, ends_b] = self.ends;
        for (from, to, ends) in [(a, b, ends_a), (b, a, ends_b)] {
            check_copies(from, to, &mut self.tally);
            check_answers(from, to, self.faults, &mut self.tally);
            check_order(to);
            // P2: one cast for all copies of a broadcast that come within a window. What the relay has seen a part of only, it takes
            // for the whole once more: after a start in the midst of a broadcast to either room, or a refusal.
            let more = 2 * ends + from.refused.len() as u64;
            let (casts, due) = (from.casts, from.casts_due);
            assert!(
                due <= casts && casts <= due + more,
                "{casts} casts of {}, {due} due",
                from.name
            );
            self.tally.casts += from.casts;
            self.tally.refused += from.refused.len() as u64;
            check_drops(from, to, self.faults, &mut self.tally);
        }
    }
}

/// P1, P3, §5 rule 4: what was accepted is heard once, byte for byte, and nothing else is.
fn check_copies(from: &Site, to: &Site, tally: &mut Tally) {
    let mut counts: BTreeMap<&Copy, u64> = BTreeMap::new();
    for copy in to.heard.iter().filter(|copy| !copy.error) {
        *counts.entry(copy).or_default() += 1;
    }
    let known: BTreeSet<&Copy> = from.accepted.iter().chain(&from.abandoned).collect();
    for (copy, count) in &counts {
        assert!(known.contains(*copy), "nobody said {copy:?}");
        let again = to.told_again.get(*copy).copied().unwrap_or_default();
        assert!(*count <= 1 + again, "heard {count} times: {copy:?}");
        assert!(
            !copy.is_poison() && !to.is_over_limit(copy),
            "read what it does not take: {copy:?}"
        );
        tally.disk_doubled += count - 1;
        tally.parts += u64::from(copy.bytes.len() > 3000);
    }
    for copy in from.accepted.iter().filter(|copy| !counts.contains_key(copy)) {
        if copy.is_poison() || to.is_over_limit(copy) {
            // Set aside: see check_answers.
        } else if to.doubtful.contains(copy) {
            tally.in_doubt_lost += 1;
        } else if to.gone_with_disk.contains(copy) {
            tally.disk_lost += 1;
        } else if from
            .accepted
            .iter()
            .chain(counts.keys().copied())
            .any(|later| copy.gives_way_to(later))
        {
            tally.superseded += 1;
        } else {
            panic!("lost: {copy:?}");
        }
    }
    tally.unaccepted_lost += from.abandoned.iter().filter(|copy| !counts.contains_key(copy)).count() as u64;
    let doubtful = to.doubtful.len() as u64;
    assert!(
        doubtful <= to.in_doubt || !to.gone_with_disk.is_empty(),
        "{doubtful} in doubt, {} counted",
        to.in_doubt
    );
}

/// P3, P5: whoever may be told that a stanza was not delivered is told, once; a room never is.
fn check_answers(from: &Site, to: &Site, faults: Faults, tally: &mut Tally) {
    let mut answers: BTreeMap<u64, u64> = BTreeMap::new();
    for copy in from.heard.iter().filter(|copy| copy.error) {
        *answers.entry(copy.number).or_default() += 1;
        tally.answers += 1;
    }
    let not_taken = |copy: &&Copy| copy.is_poison() || to.is_over_limit(copy);
    let far = from.accepted.iter().filter(not_taken);
    let may: BTreeSet<u64> = far
        .clone()
        .chain(from.abandoned.iter().filter(not_taken))
        .chain(&from.refused)
        .filter(|copy| copy.kind().is_answerable())
        .map(|copy| copy.number)
        .collect();
    for (number, count) in &answers {
        assert!(may.contains(number), "nobody may be told about {number}");
        assert!(*count == 1 || faults.replaced, "told {count} times about {number}");
    }
    // An answer crosses as any stanza does, and may be lost as any.
    let excused = |copy: &Copy| {
        let mut lost = from.doubtful.iter().chain(&from.gone_with_disk);
        to.doubtful.contains(copy)
            || to.gone_with_disk.contains(copy)
            || lost.any(|lost| lost.error && lost.number == copy.number)
    };
    for copy in far.filter(|copy| copy.kind().is_answerable()) {
        assert!(
            answers.contains_key(&copy.number) || excused(copy),
            "nobody was told: {copy:?}"
        );
    }
    // What is refused at once is answered from memory.
    if !faults.kills && !faults.drains && !faults.replaced {
        for copy in from.refused.iter().filter(|copy| copy.kind().is_answerable()) {
            assert!(answers.contains_key(&copy.number), "nobody was told: {copy:?}");
        }
    }
}

/// P4: each sender's stanzas reach each recipient in order, and a room's talk does, whoever speaks. A presence may be overtaken by words,
/// and overtakes none. What is told again is compared by its first time.
fn check_order(to: &Site) {
    let mut last: BTreeMap<(&str, u64, &str), u64> = BTreeMap::new();
    let mut talk: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    let mut status: BTreeMap<(&str, u64, &str), u64> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for copy in to.heard.iter().filter(|copy| !copy.error && seen.insert(*copy)) {
        let Copy { flow, to, number, .. } = copy;
        let after = |before: Option<u64>| {
            assert!(
                before.is_none_or(|before| before < *number),
                "{copy:?} came after {before:?}"
            );
        };
        let sender = (flow.as_str(), copy.sender(), to.as_str());
        if copy.kind() == What::RoomPresence {
            after(status.insert(sender, *number));
            let newest = talk.entry((flow, to)).or_default();
            *newest = (*newest).max(*number);
            continue;
        }
        after(last.insert(sender, *number));
        if copy.kind() == What::RoomMessage {
            after(talk.insert((flow, to), *number));
        }
    }
}

/// P6: what is dropped is counted, and nothing is dropped but what must be.
fn check_drops(from: &Site, to: &Site, faults: Faults, tally: &mut Tally) {
    let dropped = |reason| to.dropped.get(&reason).copied().unwrap_or_default();
    let not_honest = dropped(Drop::Malformed) + dropped(Drop::WrongSender) + dropped(Drop::WrongRecipient);
    let forged = if faults.forged && from.name == 'a' {
        // What is no stanza at all our own side does not put on the link, though it was on its disk.
        let copies = said::forged(from.name, to.name).into_iter();
        copies.filter(said::crosses).count() as u64
    } else {
        0
    };
    if faults.forged && to.name == 'a' {
        assert!(not_honest > 0, "what is no stanza is counted on the side that holds it");
    } else {
        assert_eq!(not_honest, forged, "dropped as forged");
    }
    tally.forged += not_honest;
    assert_eq!(dropped(Drop::OverPeerLimit) + dropped(Drop::AnswerQueueFull), 0);
    let (refused, oversize) = (dropped(Drop::RefusedByServer), dropped(Drop::OverServerLimit));
    if !faults.kills && !faults.replaced {
        let count = |which: &dyn Fn(&Copy) -> bool| from.accepted.iter().filter(|copy| which(copy)).count() as u64;
        assert_eq!(
            oversize,
            count(&|copy| to.is_over_limit(copy)),
            "over the server's limit"
        );
        assert_eq!(
            refused,
            count(&|copy| copy.is_poison() && !to.is_over_limit(copy)),
            "refused by the server"
        );
    }
    tally.set_aside += refused;
    tally.oversize += oversize;
}
