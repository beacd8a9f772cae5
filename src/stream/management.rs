//! Stream management counters (XEP-0198). (Being written.)
