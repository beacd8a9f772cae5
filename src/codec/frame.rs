//! Link frames.
