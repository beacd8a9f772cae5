//! Stanzas that are the same but for `to` become one cast.
