//! Unsigned numbers in as few bytes as they need (LEB128), and a reader that cannot run off the end.
