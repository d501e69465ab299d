//! Events, made once and used again: an `Event` stands for a point of a stream until its last clone is dropped.

use std::sync::Arc;

use super::driver::{Driver, DriverResult, Entered, RawEvent, Stream};
use crate::pool::Owner;
use crate::sync::Mutex;

/// Events that nobody holds. A wait that was submitted keeps the point it waits for, so that an event can be recorded
/// anew as soon as nobody here will ask for it or make somebody wait for it.
#[derive(Debug)]
pub(crate) struct EventPool {
    driver: Arc<dyn Driver>,
    free: Mutex<Vec<RawEvent>>,
    owner: Owner,
}

/// A recorded event.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    lent: Arc<Lent>,
}

#[derive(Debug)]
struct Lent {
    raw: RawEvent,
    pool: Arc<EventPool>,
}

impl EventPool {
    pub(crate) fn new(driver: Arc<dyn Driver>) -> Arc<Self> {
        Arc::new(Self { driver, free: Mutex::default(), owner: Owner::this_process() })
    }

    /// What was submitted to the stream until now.
    pub(crate) fn record(self: &Arc<Self>, stream: Stream) -> DriverResult<Event> {
        let free = self.free.lock().pop();
        let raw = free.map_or_else(|| self.driver.create_event(), Ok)?;
        let event = Event { lent: Arc::new(Lent { raw, pool: Arc::clone(self) }) };
        self.driver.record(raw, stream)?;
        Ok(event)
    }
}

impl Event {
    /// Whether the GPU has got there.
    pub(crate) fn is_done(&self) -> DriverResult<bool> {
        self.lent.pool.driver.query(self.lent.raw)
    }

    /// Makes what is submitted to the stream from now on wait for it.
    pub(crate) fn hold_back(&self, stream: Stream) -> DriverResult<()> {
        self.lent.pool.driver.wait(stream, self.lent.raw)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.pool.free.lock().push(self.raw);
    }
}

impl Drop for EventPool {
    fn drop(&mut self) {
        if !self.owner.is_here() {
            return;
        }
        let Ok(_entered) = Entered::new(self.driver.as_ref()) else { return };
        for event in self.free.get_mut().drain(..) {
            // What the driver refuses here it keeps until the process ends.
            let _ = self.driver.destroy_event(event);
        }
    }
}
