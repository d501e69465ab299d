//! TLS: values through a proxy that ends it, and servers that are not to be trusted.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::pki_types::PrivateKeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use tempfile::TempDir;

use super::server::Server;
use super::{config, tier};
use crate::tier::fake::{Rows, key, space};
use crate::tier::redis::RedisTier;
use crate::tier::{Stored, Tier};

/// A certificate for `name`, and a directory with the file to trust it by.
fn certificate(name: &str) -> (TempDir, Arc<ServerConfig>) {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed([name.to_owned()]).expect("made");
    let directory = tempfile::tempdir().expect("a directory");
    fs::write(directory.path().join("ca.pem"), cert.pem()).expect("written");
    let key = PrivateKeyDer::try_from(signing_key.serialize_der()).expect("a key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.expect("versions").with_no_client_auth();
    (directory, Arc::new(builder.with_single_cert(vec![cert.der().clone()], key).expect("a pair")))
}

/// Ends the TLS of each connection and passes on what is in it to `server`, as long as the process lives.
fn proxy(server: String, config: Arc<ServerConfig>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let (config, server) = (Arc::clone(&config), server.clone());
            thread::spawn(move || {
                let tls = StreamOwned::new(ServerConnection::new(config).expect("a configuration"), stream);
                pass(tls, TcpStream::connect(server).expect("up"));
            });
        }
    });
    address
}

/// Passes bytes both ways until one end closes.
fn pass(mut tls: StreamOwned<ServerConnection, TcpStream>, mut plain: TcpStream) {
    for stream in [&tls.sock, &plain] {
        stream.set_read_timeout(Some(Duration::from_millis(1))).expect("set");
    }
    while pass_some(&mut tls, &mut plain) && pass_some(&mut plain, &mut tls) {}
}

/// Passes what comes now; false at the end.
fn pass_some(from: &mut impl Read, to: &mut impl Write) -> bool {
    let mut bytes = vec![0; 65_536];
    match from.read(&mut bytes) {
        Ok(0) => false,
        Ok(read) => to.write_all(&bytes[..read]).is_ok(),
        Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
    }
}

fn trusting(directory: &TempDir) -> String {
    format!("?ssl_ca_certs={}/ca.pem", directory.path().display())
}

#[test]
fn values_go_through_tls() {
    let server = Server::start(&["--requirepass", "secret"]);
    let (directory, certificate) = certificate("localhost");
    let port = proxy(server.address(), certificate).port();
    let tier =
        tier(space("a"), &config(format!("rediss://:secret@localhost:{port}{}", trusting(&directory))));
    let rows = Rows::new(4, 3 << 20);
    rows.fill(&[0, 1], 1);
    assert!(matches!(tier.put(&rows.chunk(1, &[0, 1])), Ok(Stored::Written(_))));
    assert_eq!(tier.present(&[key(1), key(2)]), Ok(vec![true, false]));
    assert_eq!(tier.get(&rows.chunk(1, &[3, 2])), Ok(()));
    assert!(rows.read(&[3, 2]) == rows.read(&[0, 1]));
}

#[test]
fn servers_that_are_not_to_be_trusted_are_not_talked_to() {
    let server = Server::start(&[]);
    let ((ours, config_of_ours), (theirs, config_of_theirs)) =
        (certificate("localhost"), certificate("other.host"));
    let rows = Rows::new(1, 4096);
    let put = |config_of_server: &Arc<ServerConfig>, trusted: &str| {
        let port = proxy(server.address(), Arc::clone(config_of_server)).port();
        let config = config(format!("rediss://localhost:{port}{trusted}"));
        // A machine without any certificates refuses when the tier is made.
        let tier = RedisTier::with(space("a"), &config, Duration::ZERO).ok()?;
        tier.put(&rows.chunk(1, &[0])).ok()
    };
    // Another certificate, the right one for another name, and one that no authority of the system has signed.
    assert_eq!(put(&config_of_ours, &trusting(&theirs)), None);
    assert_eq!(put(&config_of_theirs, &trusting(&theirs)), None);
    assert_eq!(put(&config_of_ours, ""), None);
    assert!(server.names().is_empty());
    assert!(put(&config_of_ours, &trusting(&ours)).is_some());
    assert_eq!(put(&config_of_ours, "?ssl_ca_certs=/none"), None);
}
