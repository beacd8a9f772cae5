//! The words of XMPP: addresses, stanzas, stanza errors, namespaces.
//!
//! A [`Stanza`] is the bytes that came and the places in them that we read. The bytes are
//! never written anew: what goes out is what came in, with another `to` at most.

mod address;
mod error;
mod escape;
pub mod ns;
#[expect(
    clippy::module_inception,
    reason = "`Stanza` is the word that the floor is named after"
)]
mod stanza;

pub use address::{AddressError, Domain, DomainPair, bare, domain_of, matches, resource_of};
pub use error::{Condition, ErrorType, answer, bounce, refused_result};
pub use escape::{escape_attribute, escape_text};
pub use stanza::{Child, Kind, NodeEvent, Stanza, StanzaError};
