//! Where our server is (RFC 6120 §3.2, XEP-0368).
//!
//! A configured `host:port` is taken as it is. Without one, `_xmpps-server._tcp` and `_xmpp-server._tcp` are asked for
//! together and ordered as one set; where there is neither, the domain's own addresses with port 5269. What comes back is a
//! bounded list of addresses to try, in order.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Mutex,
    time::{Duration, SystemTime},
};

use hickory_resolver::{
    TokioResolver,
    net::NetError,
    proto::rr::{Name, RData, RecordType},
};

use crate::stanza::Domain;

/// RFC 6120 §14.7
const SERVER_PORT: u16 = 5269;

/// More SRV records than any cluster has; they fit into one UDP answer.
const RECORDS_MAX: usize = 16;

/// Addresses of one host.
const ADDRESSES_MAX: usize = 8;

/// Addresses of one server, all together: with 10 s for each, a round through all that are dead takes under 3 minutes.
const TARGETS_MAX: usize = 16;

/// One query, tried twice by the resolver: a local resolver that does not answer in 3 s is down.
const QUERY_TIMEOUT: Duration = Duration::from_secs(3);

/// Where to find a domain's server.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Location {
    /// By SRV, else by the domain's addresses.
    LookUp,
    /// A host name or an IP address, and its port, from the configuration.
    Fixed { host: String, port: u16 },
}

/// One address to try.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Target {
    pub address: SocketAddr,
    /// TLS from the first byte (XEP-0368).
    pub direct_tls: bool,
}

/// One SRV record.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Service {
    pub priority: u16,
    pub weight: u16,
    pub host: String,
    pub port: u16,
    pub direct_tls: bool,
}

#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DnsError {
    #[error("{0:?} cannot be asked for in DNS")]
    Name(String),
    /// RFC 2782: the target `.` says that the service is decidedly not available at this domain.
    #[error("the SRV records of {0} say that it has no XMPP server")]
    NotOffered(Domain),
    #[error("no address for {name}: {error}")]
    NoAddress { name: String, error: String },
    #[error("the resolver configuration cannot be read: {0}")]
    Configuration(String),
}

/// The order in which RFC 2782 wants records tried: by priority, and within one by weighted draw. `draw(n)` gives a
/// number in `0..=n`.
pub fn order(mut services: Vec<Service>, draw: &mut dyn FnMut(u64) -> u64) -> Vec<Service> {
    // "place all those with weight 0 at the beginning of the list"
    services.sort_by_key(|service| (service.priority, service.weight != 0));
    let mut ordered = Vec::with_capacity(services.len());
    while let Some(first) = services.first() {
        let priority = first.priority;
        let same = services.iter().take_while(|service| service.priority == priority);
        let weights: u64 = same.map(|service| u64::from(service.weight)).sum();
        let drawn = draw(weights).min(weights);
        let mut sum = 0;
        let chosen = services.iter().position(|service| {
            sum += u64::from(service.weight);
            sum >= drawn
        });
        ordered.push(services.remove(chosen.unwrap_or(0)));
    }
    ordered
}

/// A domain in the form in which DNS and certificates hold it (RFC 5890 A-labels).
pub fn ascii(domain: &str) -> Option<String> {
    let name = Name::from_utf8(domain).ok()?.to_ascii();
    let name = name.strip_suffix('.').unwrap_or(&name);
    (!name.is_empty()).then(|| name.to_owned())
}

/// The resolver that `/etc/resolv.conf` and `/etc/hosts` describe, made anew when they change.
#[derive(Default)]
pub struct Resolver {
    current: Mutex<Option<(Stamp, TokioResolver)>>,
}

type Stamp = [Option<SystemTime>; 2];

impl std::fmt::Debug for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Resolver(..)")
    }
}

impl Resolver {
    /// The addresses to try for `domain`'s server, in order; not empty. `draw` as in [`order`].
    pub async fn targets(
        &self,
        domain: &Domain,
        location: &Location,
        mut draw: impl FnMut(u64) -> u64 + Send,
    ) -> Result<Vec<Target>, DnsError> {
        let services = match location {
            Location::Fixed { host, port } => vec![Service {
                priority: 0,
                weight: 0,
                host: host.clone(),
                port: *port,
                direct_tls: false,
            }],
            Location::LookUp => order(self.services(domain).await?, &mut draw),
        };
        let mut targets = Vec::new();
        let mut failure = None;
        for service in services {
            match self.addresses(&service.host, location).await {
                Ok(addresses) => targets.extend(addresses.into_iter().map(|address| Target {
                    address: SocketAddr::new(address, service.port),
                    direct_tls: service.direct_tls,
                })),
                Err(error) => failure = Some(error),
            }
            if targets.len() >= TARGETS_MAX {
                break;
            }
        }
        targets.truncate(TARGETS_MAX);
        match (targets.is_empty(), failure) {
            (false, _) => Ok(targets),
            (true, Some(failure)) => Err(failure),
            (true, None) => Err(DnsError::NotOffered(domain.clone())),
        }
    }

    async fn services(&self, domain: &Domain) -> Result<Vec<Service>, DnsError> {
        let fallback = || Service {
            priority: 0,
            weight: 0,
            host: domain.as_str().to_owned(),
            port: SERVER_PORT,
            direct_tls: false,
        };
        // An IP literal is a legal domain (RFC 7622 §3.2), and has no records.
        if domain.as_str().trim_matches(['[', ']']).parse::<IpAddr>().is_ok() {
            return Ok(vec![fallback()]);
        }
        let (direct, starttls) = tokio::join!(
            self.srv("_xmpps-server._tcp", domain, true),
            self.srv("_xmpp-server._tcp", domain, false)
        );
        match (direct?, starttls?) {
            (None, None) => Ok(vec![fallback()]),
            (direct, starttls) => {
                let offered: Vec<_> = direct.into_iter().chain(starttls).flatten().collect();
                if offered.is_empty() {
                    return Err(DnsError::NotOffered(domain.clone()));
                }
                Ok(offered)
            }
        }
    }

    /// `None`: there are no records, or they cannot be had, which RFC 6120 §3.2.1 treats alike. An empty list: there is
    /// the one with the target `.`.
    async fn srv(&self, service: &str, domain: &Domain, direct_tls: bool) -> Result<Option<Vec<Service>>, DnsError> {
        let name = absolute(&format!("{service}.{domain}"))?;
        let answer = match self.resolver()?.lookup(name, RecordType::SRV).await {
            Ok(answer) => answer,
            Err(error) => {
                if !error.is_no_records_found() {
                    tracing::debug!(%domain, service, %error, "SRV look-up failed; going on as if there were no records.");
                }
                return Ok(None);
            }
        };
        let mut records = answer
            .answers()
            .iter()
            .filter_map(|record| match &record.data {
                RData::SRV(srv) => Some(srv),
                _ => None,
            })
            .take(RECORDS_MAX)
            .peekable();
        if records.peek().is_none() {
            return Ok(None);
        }
        let offered = records.filter(|srv| !srv.target.is_root()).map(|srv| Service {
            priority: srv.priority,
            weight: srv.weight,
            host: srv.target.to_ascii(),
            port: srv.port,
            direct_tls,
        });
        Ok(Some(offered.collect()))
    }

    async fn addresses(&self, host: &str, location: &Location) -> Result<Vec<IpAddr>, DnsError> {
        if let Ok(address) = host.trim_matches(['[', ']']).parse() {
            return Ok(vec![address]);
        }
        let name = match location {
            // A name that an administrator wrote may be a short one; one that DNS gave never is.
            Location::Fixed { .. } => Name::from_utf8(host).map_err(|_| DnsError::Name(host.to_owned()))?,
            Location::LookUp => absolute(host)?,
        };
        let no_address = |error: NetError| DnsError::NoAddress {
            name: host.to_owned(),
            error: error.to_string(),
        };
        let answer = self.resolver()?.lookup_ip(name).await.map_err(no_address)?;
        Ok(answer.iter().take(ADDRESSES_MAX).collect())
    }

    fn resolver(&self) -> Result<TokioResolver, DnsError> {
        let changed = |path| std::fs::metadata(path).and_then(|meta| meta.modified()).ok();
        let stamp = [changed("/etc/resolv.conf"), changed("/etc/hosts")];
        let mut current = self.current.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((known, resolver)) = &*current
            && *known == stamp
        {
            return Ok(resolver.clone());
        }
        let configuration = |error: NetError| DnsError::Configuration(error.to_string());
        let mut builder = TokioResolver::builder_tokio().map_err(configuration)?;
        builder.options_mut().timeout = QUERY_TIMEOUT;
        let resolver = builder.build().map_err(configuration)?;
        *current = Some((stamp, resolver.clone()));
        Ok(resolver)
    }
}

/// An absolute name, so that no search domain is put behind it.
fn absolute(name: &str) -> Result<Name, DnsError> {
    let mut absolute = Name::from_utf8(name).map_err(|_| DnsError::Name(name.to_owned()))?;
    absolute.set_fqdn(true);
    Ok(absolute)
}

impl From<DnsError> for io::Error {
    fn from(error: DnsError) -> Self {
        Self::other(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(host: &str, priority: u16, weight: u16) -> Service {
        Service {
            priority,
            weight,
            host: host.to_owned(),
            port: SERVER_PORT,
            direct_tls: false,
        }
    }

    fn hosts(services: Vec<Service>, mut draw: impl FnMut(u64) -> u64) -> String {
        let ordered = order(services, &mut draw);
        ordered
            .into_iter()
            .map(|service| service.host)
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// A lower priority number comes first, whatever the weights, and no record is lost.
    #[test]
    fn lower_priority_comes_first() {
        let services = vec![service("c", 20, 900), service("b", 10, 0), service("a", 5, 1)];
        for drawn in [0, 1, u64::MAX] {
            assert_eq!(hosts(services.clone(), |_| drawn), "a b c");
        }
    }

    /// Within a priority, a draw picks the record whose running sum of weights reaches it (RFC 2782): weight 0 only by drawing 0.
    #[test]
    fn weights_decide_within_a_priority() {
        let services = vec![service("one", 0, 1), service("three", 0, 3), service("zero", 0, 0)];
        let first = |drawn| hosts(services.clone(), |_| drawn).split(' ').next().unwrap().to_owned();
        assert_eq!(first(0), "zero");
        assert_eq!(first(1), "one");
        assert_eq!(first(2), "three");
        assert_eq!(first(4), "three");
        // A draw beyond what was asked for is held to the largest.
        assert_eq!(first(99), "three");
    }

    /// Over all draws, each record comes first as often as its weight says.
    #[test]
    fn draws_are_proportional() {
        let services = vec![service("a", 0, 10), service("b", 0, 30), service("c", 0, 60)];
        let mut firsts = std::collections::BTreeMap::new();
        for drawn in 1..=100 {
            let mut draws = [drawn].into_iter();
            let ordered = hosts(services.clone(), |n| draws.next().unwrap_or(n));
            *firsts.entry(ordered[..1].to_owned()).or_insert(0) += 1;
        }
        let firsts: Vec<_> = firsts.into_iter().collect();
        assert_eq!(firsts, [("a".into(), 10), ("b".into(), 30), ("c".into(), 60)]);
    }

    /// A configured IP address needs no resolver.
    #[tokio::test]
    async fn a_fixed_address_is_taken_as_it_is() {
        let resolver = Resolver::default();
        let domain = Domain::new("b.example").unwrap();
        for (host, address) in [
            ("127.0.0.1", "127.0.0.1:5300"),
            ("::1", "[::1]:5300"),
            ("[::1]", "[::1]:5300"),
        ] {
            let location = Location::Fixed {
                host: host.to_owned(),
                port: 5300,
            };
            let targets = resolver.targets(&domain, &location, |_| 0).await.unwrap();
            let expected = Target {
                address: address.parse().unwrap(),
                direct_tls: false,
            };
            assert_eq!(targets, [expected]);
        }
    }

    /// `localhost` is in the hosts file of every machine, and the usual thing to write.
    #[tokio::test]
    async fn localhost_is_found() {
        let location = Location::Fixed {
            host: "localhost".to_owned(),
            port: 5300,
        };
        let domain = Domain::new("b.example").unwrap();
        let targets = Resolver::default().targets(&domain, &location, |_| 0).await.unwrap();
        assert!(
            targets.iter().any(|target| target.address.ip().is_loopback()),
            "{targets:?}"
        );
    }

    /// DNS and certificates see an internationalised domain in its ASCII form.
    #[test]
    fn domains_become_ascii() {
        assert_eq!(ascii("bücher.example").as_deref(), Some("xn--bcher-kva.example"));
        assert_eq!(ascii("a.example").as_deref(), Some("a.example"));
    }
}
