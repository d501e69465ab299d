//! A real `redis-server` of a test's own, and a plain client that looks at what is in it.

use std::env;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::super::stream::Stream;
use super::super::url::Address;
use super::super::wire::{Connection, Reply, command};
use super::LONG;

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
        // A cluster's nodes talk to each other 10,000 above.
        let port = (0..1000).map(|_| free_port()).find(|&port| port < 55_000).expect("a port");
        let child = spawn(port, &arguments, directory.path());
        let server = Self { child, port, arguments, directory };
        server.wait();
        server
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

    /// Starts it again at the same port, empty.
    pub(super) fn restart(&mut self) {
        self.child = spawn(self.port, &self.arguments, self.directory.path());
        self.wait();
    }

    /// Lets it hang, or go on.
    pub(super) fn signal(&self, signal: rustix::process::Signal) {
        let process = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(process, signal).expect("running");
    }

    fn wait(&self) {
        let end = Instant::now() + LONG;
        while Stream::connect(&self.place(), None, LONG).is_err() {
            assert!(Instant::now() < end, "the redis-server does not come up");
            thread::sleep(Duration::from_millis(5));
        }
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
