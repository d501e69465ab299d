//! Where a Redis is, and who asks: the URL forms that users write.

use std::fmt;

use crate::{Error, ErrorKind, Result};

const PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26_379;

/// What sentinels call the server where the URL does not say.
const MASTER: &str = "mymaster";

/// A host and its port.
pub(super) type Address = (String, u16);

/// How the server is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Route {
    Tcp(Address),
    /// With the file of the certificates to trust, if not those of the system.
    Tls(Address, Option<String>),
    Unix(String),
    /// By asking one of these for the server of that name.
    Sentinel(Vec<Address>, String),
    /// By asking one of these who has what.
    Cluster(Vec<Address>),
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let many = |addresses: &[Address]| {
            addresses.iter().map(|(host, port)| format!("{host}:{port}")).collect::<Vec<_>>().join(", ")
        };
        match self {
            Self::Tcp((host, port)) | Self::Tls((host, port), _) => write!(f, "{host}:{port}"),
            Self::Unix(path) => f.write_str(path),
            Self::Sentinel(sentinels, master) => write!(f, "{master} of {}", many(sentinels)),
            Self::Cluster(nodes) => f.write_str(&many(nodes)),
        }
    }
}

/// A Redis as its URL names it.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) route: Route,
    pub(super) user: Option<String>,
    pub(super) password: Option<String>,
    pub(super) database: u32,
}

/// Without the password.
impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target")
            .field("route", &self.route)
            .field("user", &self.user)
            .field("database", &self.database)
            .finish_non_exhaustive()
    }
}

impl Target {
    /// Reads `redis://[[user]:password@]host[:port][/database]` (also written `resp` or `valkey`),
    /// `unix://[[user]:password@]/path[?db=database]` and
    /// `redis-sentinel://[[user]:password@]host[:port][,…][/master[/database]]` and
    /// `redis-cluster://[[user]:password@]host[:port][,…]`.
    pub(super) fn parse(url: &str) -> Result<Self> {
        let (scheme, rest) = url.split_once("://").ok_or_else(|| invalid("it has no scheme://"))?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        // A password may contain anything but an at sign, which is written as %40.
        let (login, place) = rest.rsplit_once('@').unwrap_or(("", rest));
        let (user, password) = match login.split_once(':') {
            Some((user, password)) => (decode(user)?, decode(password)?),
            None => (None, decode(login)?),
        };
        let field = |name| query.split('&').find_map(|field| field.strip_prefix(name));
        let mut database = field("db=").unwrap_or("0");
        let route = match scheme {
            "redis" | "resp" | "valkey" | "rediss" => {
                let (host, path) = place.split_once('/').unwrap_or((place, ""));
                database = if path.is_empty() { database } else { path };
                let address = address(host, PORT)?;
                match scheme {
                    "rediss" => Route::Tls(address, decode(field("ssl_ca_certs=").unwrap_or_default())?),
                    _ => Route::Tcp(address),
                }
            }
            "unix" => Route::Unix(decode(place)?.ok_or_else(|| invalid("it names no socket"))?),
            "redis-sentinel" => {
                let (hosts, path) = place.split_once('/').unwrap_or((place, ""));
                let (master, path) = path.split_once('/').unwrap_or((path, ""));
                database = if path.is_empty() { database } else { path };
                let master = if master.is_empty() { MASTER } else { master };
                Route::Sentinel(addresses(hosts, SENTINEL_PORT)?, master.to_owned())
            }
            "redis-cluster" => Route::Cluster(addresses(place.trim_end_matches('/'), PORT)?),
            _ => {
                return Err(invalid(
                    "its scheme is none of redis, resp, valkey, rediss, unix, redis-sentinel and redis-cluster",
                ));
            }
        };
        let database = database.parse().map_err(|_| invalid("its database is no number"))?;
        Ok(Self { route, user, password, database })
    }
}

/// Never with the URL itself, which may hold a password.
fn invalid(why: &str) -> Error {
    Error::new(ErrorKind::InvalidArgument, format!("the URL of the Redis is not understood: {why}"))
}

fn addresses(text: &str, port: u16) -> Result<Vec<Address>> {
    text.split(',').map(|text| address(text, port)).collect()
}

fn address(text: &str, port: u16) -> Result<Address> {
    let (host, rest) = match text.strip_prefix('[') {
        // IPv6, in brackets since it has colons.
        Some(text) => text.split_once(']').ok_or_else(|| invalid("a bracket is not closed"))?,
        None => text.split_at(text.find(':').unwrap_or(text.len())),
    };
    let port = match rest.strip_prefix(':') {
        Some(port) => port.parse().map_err(|_| invalid("a port is no number"))?,
        None if rest.is_empty() => port,
        None => return Err(invalid("something follows the host")),
    };
    if host.is_empty() || host.contains('/') {
        return Err(invalid("it names no host"));
    }
    Ok((host.to_owned(), port))
}

/// Percent-decoded; None for nothing.
fn decode(text: &str) -> Result<Option<String>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = rest.get(..2).and_then(|digits| str::from_utf8(digits).ok());
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(byte.ok_or_else(|| invalid("a % is not followed by two hexadecimal digits"))?);
        rest = &rest[2..];
    }
    let text = String::from_utf8(bytes).map_err(|_| invalid("it is not UTF-8"))?;
    Ok((!text.is_empty()).then_some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Route {
        Route::Tcp((host.to_owned(), port))
    }

    #[test]
    fn urls_of_every_form_are_read() {
        let sentinels = vec![("a".to_owned(), 26_379), ("::1".to_owned(), 1)];
        for (url, route, user, password, database) in [
            ("redis://host", tcp("host", 6379), None, None, 0),
            ("valkey://host:1/3", tcp("host", 1), None, None, 3),
            ("resp://:pass%40word@[::1]:7/", tcp("::1", 7), None, Some("pass@word"), 0),
            ("redis://me:a:b@host?db=2", tcp("host", 6379), Some("me"), Some("a:b"), 2),
            (
                "rediss://:p@host/1?ssl_ca_certs=/a%20b.pem",
                Route::Tls(("host".to_owned(), 6379), Some("/a b.pem".to_owned())),
                None,
                Some("p"),
                1,
            ),
            ("rediss://host:1", Route::Tls(("host".to_owned(), 1), None), None, None, 0),
            ("redis://secret@host", tcp("host", 6379), None, Some("secret"), 0),
            ("unix:///run/redis.sock?db=4", Route::Unix("/run/redis.sock".to_owned()), None, None, 4),
            ("unix://me:p@/s", Route::Unix("/s".to_owned()), Some("me"), Some("p"), 0),
            (
                "redis-sentinel://:p@a,[::1]:1/main/5",
                Route::Sentinel(sentinels.clone(), "main".into()),
                None,
                Some("p"),
                5,
            ),
            (
                "redis-cluster://me:p@a,b:1",
                Route::Cluster(vec![("a".to_owned(), 6379), ("b".to_owned(), 1)]),
                Some("me"),
                Some("p"),
                0,
            ),
            ("redis-sentinel://a,[::1]:1", Route::Sentinel(sentinels, "mymaster".into()), None, None, 0),
        ] {
            let target = Target::parse(url).expect(url);
            assert_eq!(target.route, route, "{url}");
            assert_eq!((target.user.as_deref(), target.password.as_deref()), (user, password), "{url}");
            assert_eq!(target.database, database, "{url}");
            assert!(!format!("{target:?}").contains("pass"), "{target:?}");
        }
    }

    #[test]
    fn other_urls_are_refused_without_being_repeated() {
        for url in [
            "secret",
            "http://secret",
            "redis://",
            "redis://secret:x",
            "redis://[secret",
            "redis://[::1]secret",
            "redis://a/secret",
            "redis://a%zz:secret@b",
            "redis://%ff:secret@b",
            "unix://",
            "redis-sentinel://a,,secret",
            "redis-cluster://a/secret",
        ] {
            let error = Target::parse(url).expect_err(url);
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }
}
