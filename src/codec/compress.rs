//! zstd streams with a shipped dictionary.
