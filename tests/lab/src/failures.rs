//! What has failed, said once more at the end.
//!
//! A test that fails in a [`crate::World`] shows what everything in it has logged. That is long, and of a long output often only the
//! end is kept. So panics are remembered and said again below the logs: all of this process, because the output of
//! the test that fails last is the end of the whole run.

use std::{
    panic,
    sync::{Mutex, Once, PoisonError},
};

/// The first characters of a failure tell what it is; a few of them fit where only some kilobytes are kept.
const CHARS_MAX: usize = 1500;

/// Whoever has so many failures starts with the first ones.
const KEPT_MAX: usize = 20;

static SEEN: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Begins to remember panics of all threads. They are reported as before.
pub(crate) fn remember() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            report(info);
            let thread = std::thread::current();
            let text = format!("{}: {info}", thread.name().unwrap_or("a thread"));
            let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
            if seen.len() < KEPT_MAX {
                seen.push(text.chars().take(CHARS_MAX).collect());
            }
        }));
    });
}

/// All panics so far.
pub(crate) fn remembered() -> String {
    let seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    seen.iter().map(|text| format!("failed: {text}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A panic is remembered with its thread and its message, cut where it becomes long.
    #[test]
    fn a_panic_is_said_again() {
        remember();
        let broken = std::thread::Builder::new()
            .name("the unlucky one".to_owned())
            .spawn(|| panic!("it broke: {}", "x".repeat(2 * CHARS_MAX)))
            .unwrap();
        assert!(broken.join().is_err());
        let said = remembered();
        assert!(
            said.contains("failed: the unlucky one: ") && said.contains("it broke: xxx"),
            "{said}"
        );
        assert!(
            said.lines().all(|line| line.len() <= CHARS_MAX + "failed: ".len()),
            "{said}"
        );
    }
}
