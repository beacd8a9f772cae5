//! Which entry, and how much of it, crosses next.
