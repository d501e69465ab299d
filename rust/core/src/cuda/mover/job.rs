//! A job of the mover: its stages, how far they are, and how it is told of.

use std::time::{Duration, Instant};

use super::super::driver::Fault;
use super::super::events::Event;
use super::config::Cut;
use super::lane;
use crate::copy::Direction;

/// A job of which not every stage is submitted.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) direction: Direction,
    pub(super) rows: Vec<u32>,
    pub(super) blocks: Vec<u32>,
    /// What the first stage's kernel waits for.
    pub(super) after: Option<Event>,
    cut: Cut,
    /// Stages submitted so far.
    pub(super) submitted: usize,
    /// The end of the last stage submitted.
    pub(super) last: Option<Event>,
    pub(super) end: End,
}

/// A load tells its own speed by so many stages; before that the last load's is more to be trusted.
const TELLING_STAGES: usize = 4;

/// How long bytes took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Speed {
    bytes: u64,
    time: Duration,
}

impl Speed {
    #[expect(clippy::cast_precision_loss, reason = "a forecast")]
    fn time_for(&self, bytes: u64) -> Duration {
        self.time.mul_f64(bytes as f64 / self.bytes as f64)
    }
}

/// A load that has not ended.
#[derive(Debug)]
pub(super) struct OpenLoad {
    pub(super) end: End,
    pub(super) stages: usize,
    pub(super) done: usize,
    /// When the first stage and the last one so far were seen to be done.
    pub(super) seen: Option<(Instant, Instant)>,
    /// The ends of the parts that were submitted.
    pub(super) parts: Vec<Event>,
    pub(super) parts_total: usize,
    /// It will be told as failed.
    pub(super) failed: bool,
}

/// How far a load is, for somebody who waits for a part of it.
pub(super) enum Progress {
    /// Nothing of it runs any more, or it is not known.
    Ended,
    /// A stage is to be submitted, by who asked.
    Waiting(Job),
    /// Another thread is submitting a stage.
    AtWork,
    /// It failed, and its end is awaited.
    Failed,
    /// With this event the part is there.
    Submitted(Event),
}

/// How a job is told of.
#[derive(Clone, Copy, Debug)]
pub(super) struct End {
    pub(super) name: u64,
    pub(super) direction: Direction,
    pub(super) bytes: u64,
    pub(super) submitted: Instant,
}

/// A stage that the GPU may be working on.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) event: Event,
    /// Its job's name.
    pub(super) name: u64,
    /// The job that ends with it, and whether it succeeds.
    pub(super) end: Option<(End, bool)>,
}

/// What a stage's submission gave.
pub(super) enum Submitted {
    /// It is done with this event.
    Stage(Event),
    /// It failed; with these events nothing of it runs any more.
    Failed(Vec<Event>),
    /// It failed, and nobody can tell until when parts of it run.
    Unknown(Fault),
}

impl Job {
    pub(super) fn new(
        name: u64,
        direction: Direction,
        (rows, blocks): (Vec<u32>, Vec<u32>),
        after: Option<Event>,
        cut: Cut,
    ) -> Self {
        let row_bytes: usize = cut.iter().map(|slice| slice.part.bytes).sum();
        let bytes = rows.len() as u64 * row_bytes as u64;
        let end = End { name, direction, bytes, submitted: Instant::now() };
        Self { direction, rows, blocks, after, cut, submitted: 0, last: None, end }
    }

    /// The next stage, of a job that is not submitted.
    pub(super) fn stage(&self) -> lane::Stage<'_> {
        let (place, number) = self.at();
        let (slice, rows) = (&self.cut[place], self.rows.len());
        let first = number * slice.stage_rows(rows);
        let next = first..rows.min(first + slice.stage_rows(rows));
        lane::Stage { rows: &self.rows[next.clone()], blocks: &self.blocks[next], part: &slice.part }
    }

    pub(super) fn stages(&self) -> usize {
        self.cut.iter().map(|slice| slice.stages(self.rows.len())).sum()
    }

    pub(super) fn is_submitted(&self) -> bool {
        self.at().0 == self.cut.len()
    }

    /// Whether the stage that was submitted last was the last one of a part.
    pub(super) fn is_part_submitted(&self) -> bool {
        self.at().1 == 0
    }

    /// Where the next stage is: the place of its slice, or the end of all, and its number there.
    fn at(&self) -> (usize, usize) {
        let mut number = self.submitted;
        for (place, slice) in self.cut.iter().enumerate() {
            let stages = slice.stages(self.rows.len());
            if number < stages {
                return (place, number);
            }
            number -= stages;
        }
        (self.cut.len(), 0)
    }
}

impl OpenLoad {
    pub(super) fn new(job: &Job) -> Self {
        let parts_total = job.cut.len();
        let parts = Vec::with_capacity(parts_total);
        Self { end: job.end, stages: job.stages(), done: 0, seen: None, parts, parts_total, failed: false }
    }

    /// One more stage is done.
    pub(super) fn stage_ended(&mut self, now: Instant) {
        self.done += 1;
        self.seen = Some((self.seen.map_or(now, |(first, _)| first), now));
    }

    /// That of the stages after the first one, which also waited for what was on the bus, and for its kernel.
    pub(super) fn speed(&self) -> Option<Speed> {
        let (first, last) = self.seen.filter(|_| self.done > 1)?;
        Some(Speed { bytes: self.bytes(self.done - 1), time: last.saturating_duration_since(first) })
    }

    /// When it will have ended, if it goes on as it did, or at first as the load `before`; `alone`: the bus does nothing
    /// else. None: nobody knows yet.
    pub(super) fn left(&self, before: Option<Speed>, alone: bool, now: Instant) -> Option<Duration> {
        if self.failed {
            // A failed stage ends once for each of its events, so that more are done than there are.
            return None;
        }
        let own = self.speed().filter(|_| self.done >= TELLING_STAGES || before.is_none());
        let (speed, since, stages) = match self.seen {
            Some((_, last)) => (own.or(before)?, last, self.stages - self.done),
            // One more: its first bytes have to be scattered too.
            None if alone => (before?, self.end.submitted, self.stages + 1),
            None => return None,
        };
        let waited = now.saturating_duration_since(since);
        if self.seen.is_none() && waited > speed.time_for(self.bytes(TELLING_STAGES)) {
            return None;
        }
        Some(speed.time_for(self.bytes(stages)).saturating_sub(waited))
    }

    /// Of so many stages, which are about as large.
    fn bytes(&self, stages: usize) -> u64 {
        self.end.bytes * stages as u64 / self.stages as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(number: u64) -> Duration {
        Duration::from_millis(number)
    }

    /// A load of 45 stages.
    fn load(submitted: Instant) -> OpenLoad {
        let end = End { name: 1, direction: Direction::Load, bytes: 45_000_000, submitted };
        OpenLoad { end, stages: 45, done: 0, seen: None, parts: Vec::new(), parts_total: 1, failed: false }
    }

    #[test]
    fn a_load_goes_on_at_the_speed_of_its_last_stages() {
        let start = Instant::now();
        let mut load = load(start);
        assert_eq!(load.left(None, true, start), None);
        load.stage_ended(start + ms(9));
        assert_eq!(
            load.left(None, true, start + ms(9)),
            None,
            "that tells when it began to move, not how fast"
        );
        for stage in 1..15 {
            load.stage_ended(start + ms(9 + 2 * stage));
        }
        let before = Some(Speed { bytes: 1, time: ms(1) });
        assert_eq!(load.left(before, false, start + ms(37)), Some(ms(60)));
        assert_eq!(load.left(None, false, start + ms(38)), Some(ms(59)));
        assert_eq!(load.left(None, true, start + ms(200)), Some(ms(0)), "it should have ended");
        load.failed = true;
        assert_eq!(load.left(None, true, start + ms(38)), None);
        for _ in 15..=45 {
            load.stage_ended(start + ms(38));
        }
        assert_eq!(load.left(None, true, start + ms(38)), None, "a failed stage ends several times");
    }

    #[test]
    fn a_load_begins_at_the_speed_of_the_one_before() {
        let start = Instant::now();
        let (mut load, before) = (load(start), Some(Speed { bytes: 10_000_000, time: ms(20) }));
        assert_eq!(load.left(before, false, start), None, "others go first, for how long is not known");
        assert_eq!(load.left(before, true, start + ms(2)), Some(ms(90)), "45 stages and a kernel");
        assert_eq!(load.left(before, true, start + ms(9)), None, "4 of its stages should have ended");
        load.stage_ended(start + ms(9));
        load.stage_ended(start + ms(10));
        assert_eq!(load.left(before, false, start + ms(12)), Some(ms(84)));
        load.stage_ended(start + ms(11));
        assert_eq!(load.left(before, false, start + ms(12)), Some(ms(83)));
        load.stage_ended(start + ms(12));
        assert_eq!(load.left(before, false, start + ms(12)), Some(ms(41)), "now it tells by itself");
    }
}
