//! Templates that both ends of a connection have seen, and what comes after what.
//!
//! Who enters a room is told what the one before was told: each occupant's presence, the history, the subject. So a template that
//! was seen is named by its number, and one that comes where it came the last time is not even named: for each recipient both
//! ends know the template that it got last, and for each template the one that followed it. Nothing here knows what a room is.
//!
//! Both ends change this in step, with each whole entry in the order of the connection. At most [`TEMPLATES_MAX`] templates in
//! [`TEMPLATES_BYTES_MAX`] bytes are kept; the one that was not used for longest goes first.

use std::collections::BTreeMap;

use bytes::Bytes;

/// Rosters and history of some rooms of a hundred occupants, and what is said meanwhile.
pub const TEMPLATES_MAX: usize = 4096;
/// Memory for them, with [`BESIDE_BYTES`] for each: a peer cannot make us keep more.
pub const TEMPLATES_BYTES_MAX: usize = 1 << 20;
/// What stands beside a template here, about.
const BESIDE_BYTES: usize = 192;

/// Names a template for the life of a connection. None is used twice; the first is 1.
pub type Number = u64;

/// Stands before what a recipient gets first.
const START: Number = 0;

/// Where to look for the next template of a recipient. Others may lie between (an occupant that is new), have changed, or be missing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Guess {
    /// What followed the last one before.
    Next,
    /// What was to come before the last one, which was not foreseen.
    Inserted,
    /// What follows that, or follows what was to come: one was left out, or changed.
    Replaced,
}

impl Guess {
    pub const ALL: [Self; 3] = [Self::Next, Self::Inserted, Self::Replaced];
}

/// How far a recipient has come.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Trail {
    last: Number,
    /// What was to come when something else came; 0 if nothing was.
    missed: Number,
}

/// What is known of a template.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Found {
    Whole(Number),
    /// The same bytes with the address at another place: Prosody writes attributes in an order of their own for each kind of copy.
    Moved(Number),
    Nothing,
}

#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Key {
    template: Bytes,
    to_at: u32,
}

#[derive(Debug)]
struct Known {
    key: Key,
    /// The one that followed it; [`START`] if none did.
    next: Number,
    used: u64,
}

#[derive(Debug, Default)]
pub struct Templates {
    known: BTreeMap<Number, Known>,
    by_key: BTreeMap<Key, Number>,
    /// In the order of their last use.
    by_use: BTreeMap<u64, Number>,
    uses: u64,
    last: Number,
    bytes: usize,
    /// What a recipient got first that got nothing before.
    first: Number,
}

impl Templates {
    /// What is known of a template, for who writes it.
    pub fn find(&self, template: &Bytes, to_at: u32) -> Found {
        // Sharing the bytes is all that this clone does.
        let key = Key {
            template: template.clone(),
            to_at,
        };
        if let Some(number) = self.by_key.get(&key) {
            return Found::Whole(*number);
        }
        let first = Key { to_at: 0, ..key };
        match self.by_key.range(&first..).next() {
            Some((key, number)) if key.template == first.template => Found::Moved(*number),
            Some(_) | None => Found::Nothing,
        }
    }

    /// The template with a number and the place of its address, if it is (still) known.
    pub fn get(&self, number: Number) -> Option<(&Bytes, u32)> {
        self.known
            .get(&number)
            .map(|known| (&known.key.template, known.key.to_at))
    }

    /// How many templates ago this one was new.
    pub fn age(&self, number: Number) -> u64 {
        self.last - number
    }

    pub fn of_age(&self, age: u64) -> Option<Number> {
        self.last
            .checked_sub(age)
            .filter(|number| self.known.contains_key(number))
    }

    pub fn guess(&self, trail: Trail, guess: Guess) -> Option<Number> {
        match guess {
            Guess::Next => self.after(trail.last),
            Guess::Inserted => self.foreseen(trail),
            Guess::Replaced => self.foreseen(trail).and_then(|foreseen| self.after(foreseen)),
        }
    }

    /// Notes that a known template came, to the recipient with this trail if it was one.
    pub fn again(&mut self, number: Number, trail: Option<&mut Trail>) {
        if let Some(known) = self.known.get_mut(&number) {
            self.uses += 1;
            self.by_use.remove(&known.used);
            self.by_use.insert(self.uses, number);
            known.used = self.uses;
            self.follow(number, trail);
        }
    }

    /// Notes that a new template came.
    pub fn add(&mut self, template: &Bytes, to_at: u32, trail: Option<&mut Trail>) {
        let bytes = template.len() + BESIDE_BYTES;
        while self.known.len() >= TEMPLATES_MAX || self.bytes + bytes > TEMPLATES_BYTES_MAX {
            let Some((_, oldest)) = self.by_use.pop_first() else {
                break;
            };
            if let Some(known) = self.known.remove(&oldest) {
                self.bytes -= known.key.template.len() + BESIDE_BYTES;
                self.by_key.remove(&known.key);
            }
        }
        self.last += 1;
        self.uses += 1;
        // Own memory: a piece of an entry would keep all of it alive.
        let key = Key {
            template: Bytes::copy_from_slice(template),
            to_at,
        };
        self.bytes += bytes;
        self.by_key.insert(key.clone(), self.last);
        self.by_use.insert(self.uses, self.last);
        let known = Known {
            key,
            next: START,
            used: self.uses,
        };
        self.known.insert(self.last, known);
        self.follow(self.last, trail);
    }

    fn follow(&mut self, number: Number, trail: Option<&mut Trail>) {
        let Some(trail) = trail else { return };
        let was_foreseen = Guess::ALL
            .map(|guess| self.guess(*trail, guess))
            .contains(&Some(number));
        trail.missed = match self.foreseen(*trail) {
            Some(foreseen) if !was_foreseen => foreseen,
            Some(_) | None => START,
        };
        match trail.last {
            START => self.first = number,
            last => {
                if let Some(last) = self.known.get_mut(&last) {
                    last.next = number;
                }
            }
        }
        trail.last = number;
    }

    fn foreseen(&self, trail: Trail) -> Option<Number> {
        self.if_known(trail.missed).or_else(|| self.after(trail.last))
    }

    fn after(&self, number: Number) -> Option<Number> {
        self.if_known(match number {
            START => self.first,
            number => self.known.get(&number)?.next,
        })
    }

    fn if_known(&self, number: Number) -> Option<Number> {
        self.known.contains_key(&number).then_some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets a recipient with this trail get these.
    fn tell(templates: &mut Templates, trail: &mut Trail, texts: &str) {
        for text in texts.chars() {
            let text = Bytes::from(text.to_string());
            match templates.find(&text, 0) {
                Found::Whole(number) => templates.again(number, Some(trail)),
                Found::Moved(_) | Found::Nothing => templates.add(&text, 0, Some(trail)),
            }
        }
    }

    fn guessed(templates: &Templates, trail: Trail) -> [Option<String>; 3] {
        Guess::ALL.map(|guess| {
            let (text, _) = templates.get(templates.guess(trail, guess)?)?;
            Some(String::from_utf8_lossy(text).into_owned())
        })
    }

    /// After what was inserted, changed or left out, one of the guesses is what comes next.
    #[test]
    fn guesses_what_comes_next() {
        let mut templates = Templates::default();
        let guesses = |templates: &mut Templates, texts: &str| {
            let mut trail = Trail::default();
            tell(templates, &mut trail, texts);
            guessed(templates, trail).map(Option::unwrap_or_default)
        };
        guesses(&mut templates, "abcde");
        assert_eq!(guesses(&mut templates, ""), ["a", "a", "b"]);
        assert_eq!(guesses(&mut templates, "ab"), ["c", "c", "d"]);
        // New after `b`: the old ones follow.
        assert_eq!(guesses(&mut templates, "abX"), ["", "c", "d"]);
        assert_eq!(guesses(&mut templates, "abXc"), ["d", "d", "e"]);
        // In place of the X: what followed it.
        assert_eq!(guesses(&mut templates, "abY"), ["", "X", "c"]);
        // `d` has gone.
        assert_eq!(guesses(&mut templates, "abYce"), ["", "", ""]);
        assert_eq!(guesses(&mut templates, "abYc"), ["e", "e", ""]);
    }

    /// What is not used goes first, whatever else was said meanwhile, and nobody guesses what is gone.
    #[test]
    fn forgets_what_was_not_used_for_longest() {
        let mut templates = Templates::default();
        let mut trail = Trail::default();
        tell(&mut templates, &mut trail, "ab");
        for number in 0..3 * TEMPLATES_MAX {
            templates.add(&format!("line {number}").into(), 0, None);
            if number % 1000 == 0 {
                tell(&mut templates, &mut Trail::default(), "a");
            }
            assert!(templates.known.len() <= TEMPLATES_MAX && templates.bytes <= TEMPLATES_BYTES_MAX);
            assert_eq!(templates.known.len(), templates.by_use.len());
        }
        assert!(matches!(templates.find(&"a".into(), 0), Found::Whole(_)));
        assert!(matches!(templates.find(&"a".into(), 1), Found::Moved(_)));
        assert_eq!(templates.find(&"b".into(), 0), Found::Nothing);
        assert_eq!(guessed(&templates, trail), [None, None, None]);
        templates.add(&vec![b'x'; TEMPLATES_BYTES_MAX / 2].into(), 0, None);
        assert!(templates.bytes <= TEMPLATES_BYTES_MAX);
        assert_eq!(templates.by_key.len(), templates.known.len());
    }
}
