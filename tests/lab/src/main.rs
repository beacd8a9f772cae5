//! Tries the lab by hand.
fn main() {}
