//! Transfers by `preadv` and `pwritev`, each done when it is begun.

use std::collections::VecDeque;
use std::io;

use super::{Lane, Transfer, Way};

/// Results that were not asked for yet.
#[derive(Debug, Default)]
pub(in super::super) struct PlainLane {
    ended: VecDeque<(usize, io::Result<usize>)>,
}

impl Lane for PlainLane {
    unsafe fn begin(&mut self, number: usize, transfer: Transfer) {
        let Transfer { file, way, memory, memory_count, offset } = transfer;
        let result = match (i32::try_from(memory_count), libc::off_t::try_from(offset)) {
            (Ok(count), Ok(offset)) => {
                // SAFETY: file and memory are there, as the caller promises.
                let moved = unsafe {
                    match way {
                        Way::ToFile => libc::pwritev(file, memory, count, offset),
                        Way::FromFile => libc::preadv(file, memory, count, offset),
                    }
                };
                usize::try_from(moved).map_err(|_| io::Error::last_os_error())
            }
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        };
        self.ended.push_back((number, result));
    }

    fn ended(&mut self, _wait: bool) -> Option<(usize, io::Result<usize>)> {
        self.ended.pop_front()
    }
}
