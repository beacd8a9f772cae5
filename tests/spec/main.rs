//! What the specifications say, section by section, against the pure machines.

mod expect;
mod rfc6120;
mod servers;
mod xep0178;
mod xep0185;
mod xep0198;
mod xep0220;
mod xep0288;
mod xep0478;
