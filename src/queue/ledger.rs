//! How much of each class waits, wherever it is: eight bytes for each number.

use std::collections::VecDeque;

use super::class::{Class, Classes};
use crate::codec::position::Seq;

/// How much waits.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Level {
    pub entries: u64,
    pub bytes: u64,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    bytes: u32,
    /// `None` while it is not known: an earlier process has written it, and it has not been read since.
    class: Option<Class>,
}

#[derive(Debug)]
pub struct Ledger {
    /// The number of the first.
    first: Seq,
    held: VecDeque<Held>,
    levels: [Level; Class::COUNT],
    /// Before these numbers there is none of the class: where to look for its oldest.
    from: [Seq; Class::COUNT],
}

impl Ledger {
    /// Numbers up to `acked` are done with, those up to `last` wait, and nothing is known of them.
    pub fn new(acked: Seq, last: Seq) -> Self {
        let unknown = Held { bytes: 0, class: None };
        let count = last.0.saturating_sub(acked.0) as usize;
        Self {
            first: Seq(acked.0 + 1),
            held: std::iter::repeat_n(unknown, count).collect(),
            levels: Default::default(),
            from: [Seq(acked.0 + 1); Class::COUNT],
        }
    }

    pub fn level(&self, class: Class) -> Level {
        self.levels[class as usize]
    }

    /// The lowest number of a class that waits.
    pub fn oldest(&mut self, class: Class) -> Option<Seq> {
        if self.level(class).entries == 0 {
            return None;
        }
        // What was passed over once is not looked at again: a queue of a million is asked every second.
        let from = self.from[class as usize].max(self.first);
        let mut held = self.held.iter().skip(self.index(from)?);
        let passed = held.position(|held| held.class == Some(class))?;
        let oldest = Seq(from.0 + passed as u64);
        self.from[class as usize] = oldest;
        Some(oldest)
    }

    pub fn class(&self, seq: Seq) -> Option<Class> {
        self.held.get(self.index(seq)?)?.class
    }

    /// Whether one more would be one too many.
    pub fn is_full(&self, class: Class, classes: &Classes) -> bool {
        let (level, settings) = (self.level(class), &classes[class]);
        level.entries >= settings.entries_max || level.bytes >= settings.bytes_max
    }

    /// A number is of this class, and holds so many bytes: a new one, or one that was not known.
    pub fn set(&mut self, seq: Seq, class: Class, bytes: usize) {
        let Some(index) = self.index(seq) else { return };
        while self.held.len() <= index {
            self.held.push_back(Held { bytes: 0, class: None });
        }
        let held = Held {
            bytes: u32::try_from(bytes).unwrap_or(u32::MAX),
            class: Some(class),
        };
        let before = std::mem::replace(&mut self.held[index], held);
        self.count_out(before);
        let from = &mut self.from[class as usize];
        *from = seq.min(*from);
        let level = &mut self.levels[class as usize];
        level.entries += 1;
        level.bytes += u64::from(held.bytes);
    }

    /// It grows.
    pub fn add(&mut self, seq: Seq, bytes: usize) {
        if let Some(held) = self.index(seq).and_then(|index| self.held.get(index))
            && let Some(class) = held.class
        {
            self.set(seq, class, held.bytes as usize + bytes);
        }
    }

    /// It is with the peer, or given up.
    pub fn clear(&mut self, seq: Seq) {
        if let Some(held) = self.index(seq).and_then(|index| self.held.get_mut(index)) {
            let before = std::mem::replace(held, Held { bytes: 0, class: None });
            self.count_out(before);
        }
    }

    pub fn advance_to(&mut self, acked: Seq) {
        while self.first <= acked
            && let Some(held) = self.held.pop_front()
        {
            self.count_out(held);
            self.first.0 += 1;
        }
        self.first = self.first.max(Seq(acked.0 + 1));
    }

    fn count_out(&mut self, held: Held) {
        if let Some(class) = held.class {
            let level = &mut self.levels[class as usize];
            level.entries -= 1;
            level.bytes -= u64::from(held.bytes);
        }
    }

    fn index(&self, seq: Seq) -> Option<usize> {
        usize::try_from(seq.0.checked_sub(self.first.0)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What goes out was counted in, in any order, also what an earlier process has written.
    #[test]
    fn levels_follow_what_waits() {
        let mut ledger = Ledger::new(Seq(2), Seq(4));
        ledger.set(Seq(5), Class::Iq, 10);
        ledger.add(Seq(5), 5);
        ledger.set(Seq(3), Class::Message, 7);
        assert_eq!(ledger.level(Class::Iq), Level { entries: 1, bytes: 15 });
        assert_eq!(
            (ledger.class(Seq(3)), ledger.class(Seq(4))),
            (Some(Class::Message), None)
        );
        let mut classes = Classes::default();
        classes[Class::Iq].bytes_max = 15;
        assert!(ledger.is_full(Class::Iq, &classes) && !ledger.is_full(Class::Message, &classes));
        ledger.clear(Seq(5));
        ledger.advance_to(Seq(3));
        assert_eq!(ledger.levels, [Level::default(); Class::COUNT]);
        ledger.set(Seq(9), Class::Bulk, 1);
        ledger.advance_to(Seq(20));
        ledger.set(Seq(21), Class::Bulk, 1);
        assert_eq!(ledger.level(Class::Bulk).entries, 1);
    }

    /// The oldest of a class is found again when the one before it is gone, and when an earlier one turns out to be of the class.
    #[test]
    fn the_oldest_of_a_class_is_found() {
        let mut ledger = Ledger::new(Seq(2), Seq(4));
        assert_eq!(ledger.oldest(Class::Message), None);
        ledger.set(Seq(5), Class::Message, 1);
        ledger.set(Seq(6), Class::Iq, 1);
        ledger.set(Seq(7), Class::Message, 1);
        assert_eq!(ledger.oldest(Class::Message), Some(Seq(5)));
        assert_eq!(ledger.oldest(Class::Iq), Some(Seq(6)));
        // An earlier process's, read back from the disk.
        ledger.set(Seq(4), Class::Message, 1);
        assert_eq!(ledger.oldest(Class::Message), Some(Seq(4)));
        ledger.clear(Seq(4));
        ledger.advance_to(Seq(5));
        assert_eq!(ledger.oldest(Class::Message), Some(Seq(7)));
        ledger.set(Seq(7), Class::Control, 0);
        assert_eq!(ledger.oldest(Class::Message), None);
        assert_eq!(ledger.oldest(Class::Control), Some(Seq(7)));
    }
}
