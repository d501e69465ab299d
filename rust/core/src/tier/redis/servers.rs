//! Connections to the Redis of a target: made, logged in, kept for the next caller.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustls::ClientConfig;

use super::stream::{Stream, tls_config};
use super::url::{Address, Route, Target};
use super::wire::{Connection, Reply, command};
use crate::Result;
use crate::tier::{Reason, Refusal};

/// What a server that is there needs to take a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// Connections and their target.
#[derive(Debug)]
pub(super) struct Servers {
    target: Target,
    tls: Option<Arc<ClientConfig>>,
    limit: Duration,
    idle: Mutex<Vec<Connection>>,
}

/// Why a command came to nothing.
#[derive(Debug)]
pub(super) enum Fault {
    /// The connection failed.
    Connection(io::Error),
    /// The server answered, or was not asked.
    Refused(Refusal),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Connection(error)
    }
}

impl From<Reason> for Fault {
    fn from(reason: Reason) -> Self {
        Self::Refused(reason.into())
    }
}

impl Servers {
    pub(super) fn new(target: Target, limit: Duration) -> Result<Self> {
        let tls = match &target.route {
            Route::Tls(_, authorities) => Some(tls_config(authorities.as_deref())?),
            _ => None,
        };
        Ok(Self { target, tls, limit, idle: Mutex::default() })
    }

    /// Runs `work` on a connection of its own. If that was kept and has died meanwhile, `work` runs once more.
    pub(super) fn run<T>(
        &self,
        work: impl Fn(&mut Connection) -> std::result::Result<T, Fault>,
    ) -> std::result::Result<T, Refusal> {
        let kept = self.idle.lock().pop();
        if let Some(connection) = kept {
            match self.run_on(connection, &work) {
                Err(Fault::Connection(error)) if error.kind() != ErrorKind::TimedOut => {
                    // What else was kept has died of the same.
                    self.idle.lock().clear();
                }
                ended => return ended.map_err(|fault| self.refusal(fault)),
            }
        }
        let connected = self.connect();
        connected.and_then(|connection| self.run_on(connection, &work)).map_err(|fault| self.refusal(fault))
    }

    fn run_on<T>(
        &self,
        mut connection: Connection,
        work: impl Fn(&mut Connection) -> std::result::Result<T, Fault>,
    ) -> std::result::Result<T, Fault> {
        connection.limit(self.limit)?;
        let ended = work(&mut connection);
        if connection.is_clean() {
            self.idle.lock().push(connection);
        }
        ended
    }

    fn refusal(&self, fault: Fault) -> Refusal {
        match fault {
            Fault::Refused(refusal) => refusal,
            Fault::Connection(error) => {
                let late = error.kind() == ErrorKind::TimedOut;
                let reason = if late { Reason::Late } else { Reason::Io };
                Refusal::new(reason, format!("{}: {error}", self.target.route))
            }
        }
    }

    fn connect(&self) -> std::result::Result<Connection, Fault> {
        let limit = self.limit.min(CONNECT_LIMIT);
        let stream = match &self.target.route {
            Route::Tcp(address) | Route::Tls(address, _) => {
                Stream::connect(address, self.tls.as_ref(), limit)?
            }
            Route::Unix(path) => Stream::unix(path, limit)?,
            // Its nodes are targets of their own.
            Route::Cluster(_) => return Err(Reason::Internal.into()),
            Route::Sentinel(sentinels, master) => {
                Stream::connect(&find_master(sentinels, master, limit)?, None, limit)?
            }
        };
        let mut connection = Connection::new(stream);
        connection.limit(limit)?;
        self.log_in(&mut connection)?;
        Ok(connection)
    }

    fn log_in(&self, connection: &mut Connection) -> std::result::Result<(), Fault> {
        let Target { user, password, database, .. } = &self.target;
        let mut commands = Vec::new();
        let mut count = 0;
        if let Some(password) = password {
            match user {
                Some(user) => command(&mut commands, &[b"AUTH", user.as_bytes(), password.as_bytes()]),
                None => command(&mut commands, &[b"AUTH", password.as_bytes()]),
            }
            count += 1;
        }
        if *database != 0 {
            command(&mut commands, &[b"SELECT", database.to_string().as_bytes()]);
            count += 1;
        }
        connection.send(&commands, count)?;
        for _ in 0..count {
            expect_ok(connection.reply()?)?;
        }
        Ok(())
    }
}

/// The server that the first sentinel to answer names.
fn find_master(sentinels: &[Address], master: &str, limit: Duration) -> std::result::Result<Address, Fault> {
    let mut fault = Fault::from(Reason::Io);
    for sentinel in sentinels {
        match ask_sentinel(sentinel, master, limit) {
            Ok(address) => return Ok(address),
            Err(failed) => fault = failed,
        }
    }
    Err(fault)
}

fn ask_sentinel(sentinel: &Address, master: &str, limit: Duration) -> std::result::Result<Address, Fault> {
    let mut connection = Connection::new(Stream::connect(sentinel, None, limit)?);
    connection.limit(limit)?;
    let mut commands = Vec::new();
    command(&mut commands, &[b"SENTINEL", b"get-master-addr-by-name", master.as_bytes()]);
    connection.send(&commands, 1)?;
    let words = match connection.reply()? {
        Reply::Array(words) => words,
        other => return Err(unexpected(other)),
    };
    let text = |word: Option<&Reply>| match word {
        Some(Reply::Bulk(Some(bytes))) => String::from_utf8(bytes.clone()).ok(),
        _ => None,
    };
    let port = text(words.get(1)).and_then(|port| port.parse().ok());
    match (text(words.first()), port) {
        (Some(host), Some(port)) => Ok((host, port)),
        _ => Err(Fault::Refused(Refusal::new(Reason::Io, format!("{sentinel:?} knows no {master}")))),
    }
}

/// Whether the server did what it was asked for.
pub(super) fn expect_ok(reply: Reply) -> std::result::Result<(), Fault> {
    match reply {
        Reply::Simple(_) => Ok(()),
        other => Err(unexpected(other)),
    }
}

/// What a reply means that is none of those hoped for.
pub(super) fn unexpected(reply: Reply) -> Fault {
    let Reply::Error(error) = reply else {
        return Fault::Refused(Refusal::new(Reason::Io, "a reply of another kind than asked for"));
    };
    let reason = match error.split(' ').next() {
        Some("OOM") => Reason::NoSpace,
        Some("NOAUTH" | "WRONGPASS" | "NOPERM") => Reason::Denied,
        // A replica now: the sentinels, or the name, will lead to the master.
        Some("READONLY") => return Fault::Connection(io::Error::other(error)),
        _ => Reason::Io,
    };
    Fault::Refused(Refusal::new(reason, error))
}
