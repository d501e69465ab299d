//! Servers that answer nonsense: bounded time, bounded memory, no row taken for a value.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;

use super::{config, tier};
use crate::tier::fake::{Rows, key, space};
use crate::tier::format::encode_record;
use crate::tier::redis::RedisConfig;
use crate::tier::space::Generation;
use crate::tier::{Reason, Stored, Tier};

/// A server that answers whatever it is asked with `answer`, on each connection, and then waits or ends it.
fn serve(answer: Vec<u8>, ends: bool) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    thread::spawn(move || {
        // As long as the test asks; the thread ends with the process.
        while let Ok((mut stream, _)) = listener.accept() {
            let answer = answer.clone();
            thread::spawn(move || {
                let mut question = vec![0; 65_536];
                let _ = stream.read(&mut question);
                let _ = stream.write_all(&answer);
                while !ends && stream.read(&mut question).is_ok_and(|read| read > 0) {}
            });
        }
    });
    address
}

fn record() -> Vec<u8> {
    let record = encode_record(&space("a"), Generation([1; 16]));
    [format!("${}\r\n", record.len()).as_bytes(), &record, b"\r\n"].concat()
}

/// Everything that can be asked of a server that answers `answer`: whether it seems to have the value. Nothing else
/// may succeed.
fn ask_everything(answer: &[u8], ends: bool) -> bool {
    let address = serve(answer.to_vec(), ends);
    let config = RedisConfig { timeout: Duration::from_millis(60), ..config(format!("redis://{address}")) };
    let tier = tier(space("a"), &config);
    let rows = Rows::new(1, 4096);
    let chunk = rows.chunk(1, &[0]);
    let mut present = false;
    for _ in 0..2 {
        let ended = tier.get(&chunk);
        assert!(ended.as_ref().is_err_and(|refusal| refusal.reason != Reason::Internal), "{ended:?}");
        present |= tier.present(&[key(1)]) == Ok(vec![true]);
    }
    let stored = tier.put(&chunk);
    assert!(!matches!(stored, Ok(Stored::Written(_))), "{stored:?}");
    present || stored.is_ok()
}

#[test]
fn nonsense_is_refused() {
    let with_record = |rest: &[u8]| [record(), record(), rest.to_vec()].concat();
    for answer in [
        b"".to_vec(),
        b"\r\n".to_vec(),
        b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
        b"+OK\r\n".to_vec(),
        b":1\r\n".to_vec(),
        b"-LOADING Redis is loading the dataset in memory\r\n".to_vec(),
        b"-MOVED 1234 127.0.0.1:6381\r\n".to_vec(),
        b"$99999999999999999999\r\n".to_vec(),
        b"$9223372036854775807\r\n".to_vec(),
        b"$-9223372036854775808\r\n".to_vec(),
        b"$96\r\nshort\r\n".to_vec(),
        b"*1000000000\r\n".to_vec(),
        b"*1\r\n*1\r\n*1\r\n".to_vec(),
        b"%1\r\n+a\r\n+b\r\n".to_vec(),
        vec![b'+'; 100_000],
        vec![0xff; 10_000],
        with_record(b"$4096\r\n"),
        with_record(&[b"$4096\r\n", &[0; 4096][..], b"\r\n"].concat()),
        with_record(b"$2147483648\r\n"),
        // No such value, no room for its part, and room for its header.
        [record(), b":0\r\n-OOM no room\r\n+OK\r\n".to_vec()].concat(),
        with_record(b"+QUEUED\r\n"),
        with_record(b"*2\r\n$1\r\na\r\n:1\r\n"),
    ] {
        for ends in [true, false] {
            assert!(!ask_everything(&answer, ends));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn random_bytes_are_refused(
        pieces in prop::collection::vec(
            prop_oneof![
                Just(b"\r\n".to_vec()), Just(b"$".to_vec()), Just(b"*".to_vec()), Just(b":1\r\n".to_vec()),
                Just(b"-E\r\n".to_vec()), Just(b"$-1\r\n".to_vec()), Just(record()),
                prop::collection::vec(any::<u8>(), 0..40), "[0-9]{1,20}".prop_map(String::into_bytes),
            ],
            0..12,
        ),
    ) {
        // By chance it may say that there is such a value.
        let _ = ask_everything(&pieces.concat(), true);
    }
}
