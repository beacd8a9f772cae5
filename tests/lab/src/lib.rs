//! Two sites on one machine.
