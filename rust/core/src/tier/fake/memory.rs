//! A tier in memory: the format and the contract without a medium.

use std::collections::BTreeMap;
use std::slice;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::Key;
use crate::tier::format::{HEADER_BYTES, Header, decode_record, encode_record};
use crate::tier::space::{Generation, hex};
use crate::tier::{Chunk, Reason, Refusal, Space, Stored, Tier};

/// What survives a `MemoryTier`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Medium(Arc<Mutex<Content>>);

#[derive(Debug, Default)]
struct Content {
    records: BTreeMap<String, Vec<u8>>,
    values: BTreeMap<String, Vec<u8>>,
}

impl Medium {
    pub(crate) fn values(&self) -> Vec<String> {
        self.0.lock().values.keys().cloned().collect()
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        self.0.lock().values[name].clone()
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        self.0.lock().values.insert(name.to_owned(), bytes.to_vec());
    }

    pub(crate) fn lose_records(&self) {
        self.0.lock().records.clear();
    }
}

/// A tier whose values are in a `Medium`.
#[derive(Clone, Debug)]
pub(crate) struct MemoryTier {
    space: Space,
    medium: Medium,
}

impl MemoryTier {
    pub(crate) fn new(space: Space, medium: Medium) -> Self {
        Self { space, medium }
    }

    fn namespace(&self) -> String {
        hex(self.space.namespace.as_bytes())
    }

    fn name(&self, generation: Generation, key: &Key, rank: u32) -> String {
        format!("{}/{}/{}-{rank}", self.namespace(), hex(&generation.0), hex(key.as_bytes()))
    }

    fn generation(&self) -> Option<Generation> {
        decode_record(&self.space, self.medium.0.lock().records.get(&self.namespace())?)
    }

    /// Under one lock: of several first stores all write to the same generation.
    fn generation_or_new(&self) -> Result<Generation, Refusal> {
        let records = &mut self.medium.0.lock().records;
        if let Some(generation) =
            records.get(&self.namespace()).and_then(|record| decode_record(&self.space, record))
        {
            return Ok(generation);
        }
        let generation = Generation::draw()?;
        records.insert(self.namespace(), encode_record(&self.space, generation).to_vec());
        Ok(generation)
    }

    fn verify(&self, value: &[u8], expected: &Header, bytes: usize) -> Result<(), Reason> {
        if value.len() != HEADER_BYTES + bytes {
            return Err(Reason::Truncated);
        }
        let header = Header(*value.first_chunk().ok_or(Reason::Internal)?);
        let promised = header.verify(&self.space, expected)?;
        let fits = self.space.seal.of(&value[HEADER_BYTES..]) == promised;
        if fits { Ok(()) } else { Err(Reason::Corrupt) }
    }
}

impl Tier for MemoryTier {
    fn put(&self, chunk: &Chunk) -> Result<Stored, Refusal> {
        let generation = self.generation_or_new()?;
        let name = self.name(generation, &chunk.key, self.space.rank);
        if self.medium.0.lock().values.contains_key(&name) {
            return Ok(Stored::Present);
        }
        let mut header = Header::new(&self.space, generation, chunk);
        let mut payload = Vec::new();
        for segment in chunk.memory.segments() {
            // SAFETY: the rows are the value's as long as it is stored.
            payload.extend_from_slice(unsafe { segment.as_slice() });
        }
        header.seal(&self.space, &self.space.seal.of(&payload));
        self.medium.write(&name, &[&header.0[..], &payload].concat());
        Ok(Stored::Written(payload.len() as u64))
    }

    fn get(&self, chunk: &Chunk) -> Result<(), Refusal> {
        let generation = self.generation().ok_or(Reason::Absent)?;
        let name = self.name(generation, &chunk.key, self.space.rank);
        let value = self.medium.0.lock().values.get(&name).cloned().ok_or(Reason::Absent)?;
        let expected = Header::new(&self.space, generation, chunk);
        if let Err(reason) = self.verify(&value, &expected, chunk.memory.bytes()) {
            self.medium.0.lock().values.remove(&name);
            return Err(reason.into());
        }
        let mut rest = &value[HEADER_BYTES..];
        for segment in chunk.memory.segments() {
            let (here, after) = rest.split_at(segment.bytes);
            rest = after;
            // SAFETY: the rows are the value's as long as it is loaded.
            unsafe { slice::from_raw_parts_mut(segment.base.as_ptr(), segment.bytes) }.copy_from_slice(here);
        }
        Ok(())
    }

    fn present(&self, keys: &[Key]) -> Result<Vec<bool>, Refusal> {
        let Some(generation) = self.generation() else { return Ok(vec![false; keys.len()]) };
        let values = &self.medium.0.lock().values;
        let has = |key: &Key| {
            (0..self.space.ranks).all(|rank| values.contains_key(&self.name(generation, key, rank)))
        };
        Ok(keys.iter().map(has).collect())
    }

    fn check(&self) -> Result<(), Refusal> {
        Ok(())
    }

    fn reset(&self) -> Result<(), Refusal> {
        let record = encode_record(&self.space, Generation::draw()?);
        self.medium.0.lock().records.insert(self.namespace(), record.to_vec());
        Ok(())
    }
}
