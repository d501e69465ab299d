//! The disk tier: the contract on real directories, then what only disks do.

mod every_call;
mod quota;
mod rig;

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};

use rig::{DiskRig, Medium};
use rustix::fs::OFlags;

use crate::tier::fake::{Rows, contract, space};
use crate::tier::{Reason, Stored, Tier};

mod uring {
    super::contract::tests!(super::DiskRig::new(true, true, 1));
}

mod plain {
    super::contract::tests!(super::DiskRig::new(true, false, 1));
}

mod buffered_in_three_directories {
    super::contract::tests!(super::DiskRig::new(false, true, 3));
}

#[test]
fn nobody_else_may_read() {
    let (medium, rows) = (Medium::new(1), Rows::new(1, 4096));
    let tier = medium.tier(space("a"), u64::MAX);
    tier.put(&rows.chunk(1, &[0])).expect("stored");
    let mut seen = 0;
    for path in medium.everything() {
        let metadata = fs::symlink_metadata(&path).expect("there");
        let mode = metadata.permissions().mode() & 0o777;
        assert_eq!(mode, if metadata.is_dir() { 0o700 } else { 0o600 }, "{}", path.display());
        seen += 1;
    }
    // Root, namespace, generation, fan; usage, record, value.
    assert_eq!(seen, 7);
}

#[test]
fn what_takes_a_values_place_is_neither_followed_nor_waited_for() {
    let (medium, rows) = (Medium::new(1), Rows::new(2, 4096));
    let tier = medium.tier(space("a"), u64::MAX);
    let chunk = rows.chunk(1, &[0]);
    tier.put(&chunk).expect("stored");
    let path = medium.values().pop().expect("stored");
    let secret = medium.path(0).join("secret");
    fs::rename(&path, &secret).expect("renamed");
    symlink(&secret, &path).expect("linked");
    assert!(tier.get(&chunk).is_err(), "a link to the very value");
    assert!(matches!(tier.put(&chunk), Ok(Stored::Written(_))));
    assert_eq!(tier.get(&chunk), Ok(()));
    fs::remove_file(&path).expect("removed");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .expect("a FIFO");
    assert!(fs::symlink_metadata(&path).expect("there").file_type().is_fifo());
    assert!(tier.get(&chunk).is_err());
}

#[test]
fn transfers_may_wait() {
    let medium = Medium::new(1);
    medium.files.create_directories(&medium.path(0)).expect("made");
    for direct in [false, true] {
        let path = medium.path(0).join(direct.to_string());
        let Ok(created) = medium.files.create(&path, direct) else {
            assert!(direct, "only O_DIRECT is not to be had everywhere");
            continue;
        };
        for file in [created, medium.files.open_to_read(&path, direct).expect("there")] {
            let flags = rustix::fs::fcntl_getfl(&file).expect("open");
            assert!(!flags.contains(OFlags::NONBLOCK), "{flags:?}");
            assert_eq!(flags.contains(OFlags::DIRECT), direct, "{flags:?}");
        }
    }
}

#[test]
fn a_directory_that_was_taken_away_comes_back() {
    let (medium, rows) = (Medium::new(1), Rows::new(2, 4096));
    let tier = medium.tier(space("a"), u64::MAX);
    rows.fill(&[0], 1);
    let (chunk, stored) = (rows.chunk(1, &[0]), rows.read(&[0]));
    for _ in 0..3 {
        tier.put(&chunk).expect("stored");
        fs::remove_dir_all(medium.path(0)).expect("removed");
        assert_eq!(tier.get(&chunk).expect_err("gone").reason, Reason::Absent);
        assert_eq!(tier.present(&[chunk.key]), Ok(vec![false]));
        rows.fill(&[0], 1);
        assert!(matches!(tier.put(&chunk), Ok(Stored::Written(_))));
        rows.fill(&[0], 2);
        assert_eq!(tier.get(&chunk), Ok(()));
        assert!(rows.read(&[0]) == stored);
    }
}

#[test]
fn directories_share_the_keys_and_fail_alone() {
    let (medium, rows) = (Medium::new(3), Rows::new(1, 4096));
    let tier = medium.tier(space("a"), u64::MAX);
    let keys: Vec<_> = (0..60).map(|name| rows.chunk(name, &[0]).key).collect();
    for name in 0..60 {
        tier.put(&rows.chunk(name, &[0])).expect("stored");
    }
    let in_each: Vec<usize> = (0..3).map(|number| medium.values_in(number).len()).collect();
    assert!(in_each.iter().all(|&count| count >= 8), "{in_each:?}");
    assert_eq!(in_each.iter().sum::<usize>(), 60);
    fs::remove_dir_all(medium.path(1)).expect("removed");
    fs::write(medium.path(1), "a file").expect("written");
    let present = tier.present(&keys).expect("answered");
    let loaded: Vec<bool> = (0..60).map(|name| tier.get(&rows.chunk(name, &[0])).is_ok()).collect();
    assert_eq!(present, loaded);
    assert_eq!(loaded.iter().filter(|&&loaded| !loaded).count(), in_each[1]);
    // The order in which directories are named does not matter.
    let shuffled = medium.shuffled_tier(space("a"));
    assert_eq!(shuffled.present(&keys), Ok(present));
}

#[test]
fn files_of_nothing_are_not_there() {
    let (medium, rows) = (Medium::new(1), Rows::new(1, 4096));
    let tier = medium.tier(space("a"), u64::MAX);
    let chunk = rows.chunk(1, &[0]);
    tier.put(&chunk).expect("stored");
    let path = medium.values().pop().expect("stored");
    fs::write(&path, "").expect("written");
    assert_eq!(tier.present(&[chunk.key]), Ok(vec![false]));
    assert!(matches!(tier.put(&chunk), Ok(Stored::Written(_))), "a broken file hinders no store");
    assert_eq!(tier.get(&chunk), Ok(()));
}
