//! The ways to a server: TCP, TLS over TCP, or a Unix socket.

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::url::Address;
use crate::{Error, ErrorKind as Kind, Result};

/// An open way to a server.
pub(super) enum Stream {
    Tcp(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
    Unix(UnixStream),
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp(_) => "Tcp",
            Self::Tls(_) => "Tls",
            Self::Unix(_) => "Unix",
        })
    }
}

/// Whom TLS trusts: the certificates in the file `authorities`, else those of the system.
pub(super) fn tls_config(authorities: Option<&str>) -> Result<Arc<ClientConfig>> {
    let invalid = |message: String| Error::new(Kind::InvalidArgument, message);
    let mut roots = RootCertStore::empty();
    match authorities {
        Some(path) => {
            let refused = |error: &dyn fmt::Display| invalid(format!("the certificates in {path}: {error}"));
            let file = File::open(path).map_err(|error| refused(&error))?;
            for certificate in CertificateDer::pem_reader_iter(file) {
                roots.add(certificate.map_err(|error| refused(&error))?).map_err(|error| refused(&error))?;
            }
        }
        None => {
            // Those that are of no use are left out, as everywhere.
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if roots.is_empty() {
        return Err(invalid(
            "TLS has no certificate to trust: name a file by ssl_ca_certs in the URL".to_owned(),
        ));
    }
    // Named, since another crate of the process may have brought another one.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.map_err(|error| invalid(format!("TLS: {error}")))?;
    Ok(Arc::new(config.with_root_certificates(roots).with_no_client_auth()))
}

impl Stream {
    /// Over TCP, and over TLS where there is a configuration.
    pub(super) fn connect(
        (host, port): &Address,
        tls: Option<&Arc<ClientConfig>>,
        limit: Duration,
    ) -> io::Result<Self> {
        let stream = connect_tcp(host, *port, limit)?;
        let Some(config) = tls else { return Ok(Self::Tcp(stream)) };
        let name = ServerName::try_from(host.clone()).map_err(io::Error::other)?;
        let client = ClientConnection::new(Arc::clone(config), name).map_err(io::Error::other)?;
        // The handshake is part of the first command, and of its time.
        Ok(Self::Tls(Box::new(StreamOwned::new(client, stream))))
    }

    /// Over a Unix socket.
    pub(super) fn unix(path: &str, limit: Duration) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        // A server that takes no connection for now lets us wait: without this, as long as it hangs.
        set_socket_timeout(&socket, Timeout::Send, Some(limit))?;
        match connect(&socket, &SocketAddrUnix::new(path)?) {
            Err(Errno::AGAIN) => Err(ErrorKind::TimedOut.into()),
            ended => Ok(Self::Unix(ended.map(|()| UnixStream::from(socket))?)),
        }
    }

    /// A call may wait so long.
    pub(super) fn limit_calls(&self, limit: Duration) -> io::Result<()> {
        let tcp = match self {
            Self::Unix(stream) => {
                stream.set_read_timeout(Some(limit))?;
                return stream.set_write_timeout(Some(limit));
            }
            Self::Tcp(stream) => stream,
            Self::Tls(stream) => &stream.sock,
        };
        tcp.set_read_timeout(Some(limit))?;
        tcp.set_write_timeout(Some(limit))
    }
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(bytes),
            Self::Tls(stream) => stream.read(bytes),
            Self::Unix(stream) => stream.read(bytes),
        }
    }

    fn read_vectored(&mut self, slices: &mut [IoSliceMut]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read_vectored(slices),
            Self::Tls(stream) => stream.read_vectored(slices),
            Self::Unix(stream) => stream.read_vectored(slices),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write_vectored(slices),
            Self::Tls(stream) => stream.write_vectored(slices),
            Self::Unix(stream) => stream.write_vectored(slices),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Tls(stream) => stream.flush(),
            Self::Tcp(_) | Self::Unix(_) => Ok(()),
        }
    }
}

fn connect_tcp(host: &str, port: u16, limit: Duration) -> io::Result<TcpStream> {
    let mut error = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, limit) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(refused) => error = refused,
        }
    }
    Err(error)
}
