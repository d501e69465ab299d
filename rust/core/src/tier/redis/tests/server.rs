//! A real `redis-server` of a test's own, and a plain client that looks at what is in it.

use std::env;
use std::net::TcpListener;
use std::process::{self, Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::super::stream::Stream;
use super::super::url::Address;
use super::super::wire::{Connection, Reply, command};
use super::LONG;

/// Ports that a server tries.
const ATTEMPTS_MAX: usize = 10;

/// A server, ended when it is dropped.
pub(super) struct Server {
    child: Child,
    port: u16,
    arguments: Vec<String>,
    directory: tempfile::TempDir,
}

impl Server {
    /// A server with nothing in it, which writes nothing to disk.
    pub(super) fn start(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let port = server_port();
        let child = spawn(port, &arguments, directory.path());
        let mut server = Self { child, port, arguments, directory };
        // Somebody may have been quicker to take the port.
        for _ in 0..ATTEMPTS_MAX {
            if server.comes_up() {
                return server;
            }
            server.port = server_port();
            server.child = spawn(server.port, &server.arguments, server.directory.path());
        }
        panic!("the redis-server ends at once");
    }

    pub(super) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(super) fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    pub(super) fn socket(&self) -> String {
        self.directory.path().join("socket").to_str().expect("a text").to_owned()
    }

    /// Ends it at once, with what is in it.
    pub(super) fn kill(&mut self) {
        self.child.kill().expect("running");
        self.child.wait().expect("ended");
    }

    /// Starts it again at the same port, empty unless it was told to save.
    pub(super) fn restart(&mut self) {
        self.child = spawn(self.port, &self.arguments, self.directory.path());
        assert!(self.comes_up(), "the redis-server ends at once");
    }

    /// Lets it hang, or go on.
    pub(super) fn signal(&self, signal: rustix::process::Signal) {
        let process = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(process, signal).expect("running");
    }

    /// Waits until it serves, or has ended.
    fn comes_up(&mut self) -> bool {
        let end = Instant::now() + LONG;
        // By its socket, where nobody else answers.
        while !answers(&self.socket()) {
            if self.child.try_wait().expect("ours").is_some() {
                return false;
            }
            assert!(Instant::now() < end, "the redis-server does not come up");
            thread::sleep(Duration::from_millis(5));
        }
        true
    }

    fn place(&self) -> Address {
        ("127.0.0.1".to_owned(), self.port)
    }

    fn with_connection<T>(&self, words: &[&[u8]], read: impl FnOnce(&mut Connection) -> T) -> T {
        let mut connection = Connection::new(Stream::connect(&self.place(), None, LONG).expect("up"));
        connection.limit(LONG).expect("set");
        let mut text = Vec::new();
        command(&mut text, words);
        connection.send(&text, 1).expect("up");
        read(&mut connection)
    }

    fn ask(&self, words: &[&[u8]]) -> Reply {
        self.with_connection(words, |connection| connection.reply().expect("an answer"))
    }

    /// All names in database 0, a few at a time since replies here are short.
    pub(super) fn names(&self) -> Vec<String> {
        let text =
            "local names = redis.call('KEYS', '*'); table.sort(names); return names[tonumber(ARGV[1])]";
        let name = |number: usize| match self.ask(&[
            b"EVAL",
            text.as_bytes(),
            b"0",
            number.to_string().as_bytes(),
        ]) {
            Reply::Bulk(Some(name)) => Some(String::from_utf8(name).expect("a text")),
            _ => None,
        };
        (1..).map_while(name).collect()
    }

    /// The bytes of a value, read through its hexadecimal pieces, since values here may be long.
    pub(super) fn get(&self, name: &str) -> Option<Vec<u8>> {
        let Reply::Integer(1) = self.ask(&[b"EXISTS", name.as_bytes()]) else { return None };
        let Reply::Integer(length) = self.ask(&[b"STRLEN", name.as_bytes()]) else { panic!("no value") };
        let mut bytes = Vec::new();
        while bytes.len() < usize::try_from(length).expect("a length") {
            let (from, to) = (bytes.len().to_string(), (bytes.len() + 8191).to_string());
            match self.ask(&[b"GETRANGE", name.as_bytes(), from.as_bytes(), to.as_bytes()]) {
                Reply::Bulk(Some(piece)) => bytes.extend(piece),
                other => panic!("{other:?}"),
            }
        }
        Some(bytes)
    }

    /// Whether it has the slot of the name; always, where there is no cluster.
    pub(super) fn is_owner(&self, name: &str) -> bool {
        matches!(self.ask(&[b"EXISTS", name.as_bytes()]), Reply::Integer(_))
    }

    /// The slot of a name.
    pub(super) fn slot(&self, name: &str) -> i64 {
        match self.ask(&[b"CLUSTER", b"KEYSLOT", name.as_bytes()]) {
            Reply::Integer(slot) => slot,
            other => panic!("{other:?}"),
        }
    }

    /// The answer to a command that has none but a text.
    pub(super) fn text(&self, words: &[&str]) -> String {
        let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
        match self.ask(&words) {
            Reply::Simple(text) => text,
            Reply::Bulk(Some(bytes)) => String::from_utf8(bytes).expect("a text"),
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn set(&self, name: &str, bytes: &[u8]) {
        assert_eq!(self.ask(&[b"SET", name.as_bytes(), bytes]), Reply::Simple("OK".to_owned()));
    }

    pub(super) fn remove(&self, name: &str) {
        assert_eq!(self.ask(&[b"DEL", name.as_bytes()]), Reply::Integer(1), "{name}");
    }

    /// How long a value stays; -1: for good.
    pub(super) fn ttl_ms(&self, name: &str) -> i64 {
        match self.ask(&[b"PTTL", name.as_bytes()]) {
            Reply::Integer(ttl) => ttl,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn configure(&self, name: &str, value: &str) {
        let reply = self.ask(&[b"CONFIG", b"SET", name.as_bytes(), value.as_bytes()]);
        assert_eq!(reply, Reply::Simple("OK".to_owned()));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether the server behind the socket has read what it starts with.
fn answers(socket: &str) -> bool {
    let Ok(stream) = Stream::unix(socket, LONG) else { return false };
    let mut connection = Connection::new(stream);
    let mut text = Vec::new();
    command(&mut text, &[b"PING"]);
    let asked = connection.limit(LONG).and_then(|()| connection.send(&text, 1));
    match asked.and_then(|()| connection.reply()) {
        // Who wants a password first serves.
        Ok(Reply::Error(error)) => !error.starts_with("LOADING"),
        answer => answer.is_ok(),
    }
}

/// A port for a server and one 10,000 above, where a cluster's nodes talk to each other. Both below those that the system gives
/// to whoever asks for any: all connections of these tests have such a one.
fn server_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let candidate = || {
        let number = process::id().wrapping_mul(101).wrapping_add(NEXT.fetch_add(1, Ordering::SeqCst));
        10_000 + u16::try_from(number % 12_000).expect("small")
    };
    let is_free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
    let mut candidates = (0..1000).map(|_| candidate());
    candidates.find(|&port| is_free(port) && is_free(port + 10_000)).expect("a port")
}

/// A port that nobody listens at.
pub(super) fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("bound").port()
}

fn spawn(port: u16, arguments: &[String], directory: &std::path::Path) -> Child {
    let program = env::var("LMCACHE_RS_REDIS_SERVER").unwrap_or_else(|_| "redis-server".to_owned());
    Command::new(program)
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--unixsocket"])
        .arg(directory.join("socket"))
        .args(arguments)
        .current_dir(directory)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("these tests need redis-server: install it, or name it in LMCACHE_RS_REDIS_SERVER")
}
