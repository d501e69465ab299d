//! A job of the mover: its stages, how far they are, and how it is told of.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::driver::Fault;
use super::super::events::Event;
use super::super::layout::Part;
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
    /// The parts of the rows, moved one after the other.
    pub(super) parts: Arc<[Part]>,
    /// Rows of each stage.
    pub(super) stage_rows: usize,
    /// Stages submitted so far.
    pub(super) submitted: usize,
    /// The end of the last stage submitted.
    pub(super) last: Option<Event>,
    pub(super) end: End,
}

/// A load that has not ended.
#[derive(Debug)]
pub(super) struct OpenLoad {
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
        parts: Arc<[Part]>,
        stage_rows: usize,
    ) -> Self {
        let row_bytes: usize = parts.iter().map(|part| part.bytes).sum();
        let bytes = rows.len() as u64 * row_bytes as u64;
        let end = End { name, direction, bytes, submitted: Instant::now() };
        Self { direction, rows, blocks, after, parts, stage_rows, submitted: 0, last: None, end }
    }

    /// The next stage.
    pub(super) fn stage(&self) -> lane::Stage<'_> {
        let (part, number) = (self.submitted / self.part_stages(), self.submitted % self.part_stages());
        let first = number * self.stage_rows;
        let next = first..self.rows.len().min(first + self.stage_rows);
        lane::Stage { rows: &self.rows[next.clone()], blocks: &self.blocks[next], part: &self.parts[part] }
    }

    /// Stages of one part.
    pub(super) fn part_stages(&self) -> usize {
        self.rows.len().div_ceil(self.stage_rows)
    }

    pub(super) fn stages(&self) -> usize {
        self.part_stages() * self.parts.len()
    }

    pub(super) fn is_submitted(&self) -> bool {
        self.submitted >= self.stages()
    }
}

impl OpenLoad {
    /// One more stage is done.
    pub(super) fn stage_ended(&mut self, now: Instant) {
        self.done += 1;
        self.seen = Some((self.seen.map_or(now, |(first, _)| first), now));
    }

    /// When it will have ended, as far as its own speed tells: that of its stages after the first one, which also waited
    /// for what was on the bus, and for its kernel. None: nobody knows yet.
    pub(super) fn left(&self, now: Instant) -> Option<Duration> {
        let (first, last) = self.seen.filter(|_| self.done > 1 && !self.failed)?;
        let (steps, left) =
            (u32::try_from(self.done - 1).ok()?, u32::try_from(self.stages - self.done).ok()?);
        let rest = last.saturating_duration_since(first) / steps * left;
        Some(rest.saturating_sub(now.saturating_duration_since(last)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_goes_on_at_the_speed_of_its_last_stages() {
        let (start, ms) = (Instant::now(), Duration::from_millis);
        let mut load =
            OpenLoad { stages: 45, done: 0, seen: None, parts: Vec::new(), parts_total: 1, failed: false };
        assert_eq!(load.left(start), None);
        load.stage_ended(start + ms(9));
        assert_eq!(load.left(start + ms(9)), None, "one stage tells when it began to move, not how fast");
        for stage in 1..15 {
            load.stage_ended(start + ms(9 + 2 * stage));
        }
        assert_eq!(load.left(start + ms(37)), Some(ms(60)));
        assert_eq!(load.left(start + ms(38)), Some(ms(59)));
        assert_eq!(load.left(start + ms(200)), Some(ms(0)), "it should have ended");
        load.failed = true;
        assert_eq!(load.left(start + ms(38)), None);
    }
}
