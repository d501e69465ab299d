//! `tier_namespace`, `Tier` and `TierQueue` for Python.

use std::sync::Arc;

use lmcache_core as core;
use lmcache_core::{
    Counted, DiskConfig, DiskDirectory, DiskTier, Ended, Key, Namespace, Reason, RedisConfig, RedisTier,
    RowMemory, Seal, Space, Stored, TierOutcome, TierQueueConfig,
};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::convert::{CLOSE_DEFAULT, Count, Numbers, Timeout, detached, invalid};
use crate::error::{TierError, guarded, guarded_py};
use crate::memory::host_pool::HostPool;

pub fn add_to(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(tier_namespace, module)?)?;
    module.add_class::<Tier>()?;
    module.add_class::<TierQueue>()
}

#[pyfunction]
#[expect(clippy::needless_pass_by_value, reason = "pyo3 extracts owned values")]
fn tier_namespace(py: Python<'_>, properties: Vec<(String, String)>) -> Bound<'_, PyBytes> {
    PyBytes::new(py, Namespace::new(&properties).as_bytes())
}

/// Has no `repr` of its own: nothing of a URL or a secret can get into one.
#[pyclass(frozen, module = "lmcache_rs._core")]
struct Tier(Arc<dyn core::Tier>);

#[pymethods]
impl Tier {
    #[staticmethod]
    #[pyo3(signature = (namespace, rank, ranks, secret, directories, direct = true, io_uring = true))]
    #[expect(clippy::too_many_arguments, reason = "Python names them")]
    fn disk(
        py: Python<'_>,
        namespace: &[u8],
        rank: Count<u32>,
        ranks: Count<u32>,
        secret: Option<&[u8]>,
        directories: Vec<(String, Count<u64>)>,
        direct: bool,
        io_uring: bool,
    ) -> PyResult<Self> {
        let space = space(namespace, rank, ranks, secret)?;
        let directory =
            |(path, quota): (String, Count<u64>)| DiskDirectory { path: path.into(), quota_bytes: quota.0 };
        let directories = directories.into_iter().map(directory).collect();
        let config = DiskConfig { directories, direct, io_uring };
        detached(py, || DiskTier::new(space, &config)).map(|tier| Self(Arc::new(tier)))
    }

    #[staticmethod]
    #[expect(clippy::too_many_arguments, reason = "Python names them")]
    fn redis(
        py: Python<'_>,
        namespace: &[u8],
        rank: Count<u32>,
        ranks: Count<u32>,
        secret: Option<&[u8]>,
        url: String,
        prefix: String,
        ttl_s: Option<Timeout>,
        timeout_s: Timeout,
    ) -> PyResult<Self> {
        let space = space(namespace, rank, ranks, secret)?;
        let config = RedisConfig { url, prefix, ttl: ttl_s.map(|ttl| ttl.0), timeout: timeout_s.0 };
        detached(py, || RedisTier::new(space, &config)).map(|tier| Self(Arc::new(tier)))
    }

    fn check(&self, py: Python<'_>) -> PyResult<()> {
        let ended = detached(py, || Ok(self.0.check()))?;
        ended.map_err(|refusal| TierError::new_err(refusal.to_string()))
    }

    fn reset(&self, py: Python<'_>) -> PyResult<()> {
        let ended = detached(py, || Ok(self.0.reset()))?;
        ended.map_err(|refusal| TierError::new_err(refusal.to_string()))
    }
}

fn space(namespace: &[u8], rank: Count<u32>, ranks: Count<u32>, secret: Option<&[u8]>) -> PyResult<Space> {
    let bytes = namespace.try_into().map_err(|_| {
        invalid(format!("namespace has {} bytes, those of tier_namespace have 32", namespace.len()))
    })?;
    let seal = secret.map_or(Seal::Checksum, Seal::from_secret);
    guarded(|| Space::new(Namespace::from_bytes(bytes), rank.0, ranks.0, seal))
}

#[pyclass(frozen, module = "lmcache_rs._core")]
struct TierQueue {
    /// Always there, but in drop.
    queue: Option<core::TierQueue>,
}

/// What a task brought.
#[derive(IntoPyObject)]
enum Brought<'py> {
    Bytes(u64),
    /// For each key 0 or 1.
    Answer(Bound<'py, PyBytes>),
    /// Why it was refused, where the reason does not say all.
    Cause(String),
}

/// Job, chunk, reason of a refusal, what it brought, seconds.
type Told<'py> = (u64, usize, Option<&'static str>, Brought<'py>, f64);

#[pymethods]
impl TierQueue {
    #[new]
    fn new(
        py: Python<'_>,
        tier: &Tier,
        threads: Count<usize>,
        stores_max: Count<usize>,
        loads_max: Count<usize>,
        wait_s: Timeout,
    ) -> PyResult<Self> {
        let tier = Arc::clone(&tier.0);
        let (threads, stores_max, loads_max) = (threads.0, stores_max.0, loads_max.0);
        let config = TierQueueConfig { threads, stores_max, loads_max, wait: wait_s.0 };
        detached(py, || core::TierQueue::new(tier, &config)).map(|queue| Self { queue: Some(queue) })
    }

    #[expect(clippy::too_many_arguments, reason = "Python names them")]
    fn store(
        &self,
        py: Python<'_>,
        job: Count<u64>,
        pool: &HostPool,
        keys: &[u8],
        positions: Numbers,
        counts: Numbers,
        rows: Numbers,
    ) -> PyResult<()> {
        let (queue, keys) = (self.get()?, parse_keys(keys)?);
        detached(py, move || queue.store(job.0, chunks(&pool.pool, keys, &positions.0, &counts.0, &rows.0)?))
    }

    #[expect(clippy::too_many_arguments, reason = "Python names them")]
    fn load(
        &self,
        py: Python<'_>,
        job: Count<u64>,
        pool: &HostPool,
        keys: &[u8],
        positions: Numbers,
        counts: Numbers,
        rows: Numbers,
    ) -> PyResult<()> {
        let (queue, keys) = (self.get()?, parse_keys(keys)?);
        detached(py, move || queue.load(job.0, chunks(&pool.pool, keys, &positions.0, &counts.0, &rows.0)?))
    }

    fn find(&self, py: Python<'_>, job: Count<u64>, keys: &[u8]) -> PyResult<()> {
        let (queue, keys) = (self.get()?, parse_keys(keys)?);
        detached(py, || queue.find(job.0, keys))
    }

    fn poll<'py>(&self, py: Python<'py>) -> PyResult<Vec<Told<'py>>> {
        let queue = self.get()?;
        let ended = detached(py, || queue.poll())?;
        Ok(ended.into_iter().map(|outcome| told(py, outcome)).collect())
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let queue = self.get()?;
        let counters = detached(py, || queue.counters())?;
        let dict = PyDict::new(py);
        for (name, value) in [
            ("stored_chunks", counters.stores.chunks),
            ("stored_bytes", counters.stores.bytes),
            ("present", counters.present),
            ("loaded_chunks", counters.loads.chunks),
            ("loaded_bytes", counters.loads.bytes),
            ("finds", counters.finds.chunks),
        ] {
            dict.set_item(name, value)?;
        }
        let refusing = [("store", &counters.stores), ("load", &counters.loads), ("find", &counters.finds)];
        for (name, counted) in refusing {
            for (reason, count) in refusals(counted) {
                dict.set_item(format!("{name}_refused:{reason}"), count)?;
            }
        }
        Ok(dict)
    }

    fn wait(&self, py: Python<'_>, timeout_s: Timeout) -> PyResult<()> {
        let queue = self.get()?;
        detached(py, || queue.wait(timeout_s.0))
    }

    fn drain(&self, py: Python<'_>, timeout_s: Timeout) -> PyResult<bool> {
        let queue = self.get()?;
        detached(py, || queue.drain(timeout_s.0))
    }

    #[pyo3(signature = (timeout_s = Timeout(CLOSE_DEFAULT)), text_signature = "($self, timeout_s=5.0)")]
    fn close(&self, py: Python<'_>, timeout_s: Timeout) -> PyResult<bool> {
        let queue = self.get()?;
        detached(py, || queue.close(timeout_s.0))
    }
}

impl TierQueue {
    fn get(&self) -> PyResult<&core::TierQueue> {
        self.queue.as_ref().ok_or_else(|| invalid("this TierQueue is being dropped"))
    }
}

impl Drop for TierQueue {
    fn drop(&mut self) {
        // Waits for threads: without the GIL.
        let queue = self.queue.take();
        let _ = guarded_py(|| {
            Python::attach(|py| py.detach(|| drop(queue)));
            Ok(())
        });
    }
}

/// Keys of 32 bytes, one after the other.
fn parse_keys(bytes: &[u8]) -> PyResult<Vec<Key>> {
    let (keys, rest) = bytes.as_chunks();
    if !rest.is_empty() {
        return Err(invalid(format!("{} bytes are no whole number of keys of 32 bytes", bytes.len())));
    }
    Ok(keys.iter().copied().map(Key::from_bytes).collect())
}

/// The chunks with these keys, positions and numbers of rows.
fn chunks(
    pool: &core::HostPool,
    keys: Vec<Key>,
    positions: &[u32],
    counts: &[u32],
    rows: &[u32],
) -> core::Result<Vec<core::Chunk>> {
    let invalid = |message| core::Error::new(core::ErrorKind::InvalidArgument, message);
    let (named, placed, counted) = (keys.len(), positions.len(), counts.len());
    if placed != named || counted != named {
        return Err(invalid(format!("{named} keys, {placed} positions, {counted} counts: not as many each")));
    }
    let total: u64 = counts.iter().map(|&count| u64::from(count)).sum();
    if total != rows.len() as u64 {
        return Err(invalid(format!("counts of {total} rows in all, and {} rows", rows.len())));
    }
    let mut rest = rows;
    let chunk = |((key, &position), &count): ((Key, &u32), &u32)| {
        let (rows, after) = rest.split_at(count as usize);
        rest = after;
        Ok(core::Chunk { key, position, memory: RowMemory::new(pool, rows)? })
    };
    keys.into_iter().zip(positions).zip(counts).map(chunk).collect()
}

fn told(py: Python<'_>, outcome: TierOutcome) -> Told<'_> {
    let answer = |found: Vec<bool>| {
        let found: Vec<u8> = found.into_iter().map(u8::from).collect();
        Brought::Answer(PyBytes::new(py, &found))
    };
    let (refusal, brought) = match outcome.ended {
        Ended::Stored(Ok(Stored::Written(bytes))) | Ended::Loaded(Ok(bytes)) => (None, Brought::Bytes(bytes)),
        Ended::Stored(Ok(Stored::Present)) => (None, Brought::Bytes(0)),
        Ended::Found(Ok(found)) => (None, answer(found)),
        Ended::Stored(Err(refusal)) | Ended::Loaded(Err(refusal)) | Ended::Found(Err(refusal)) => {
            (Some(refusal.reason.name()), Brought::Cause(refusal.cause))
        }
    };
    (outcome.job, outcome.index, refusal, brought, outcome.seconds)
}

/// What was refused, by reason.
fn refusals(counted: &Counted) -> impl Iterator<Item = (&'static str, u64)> + '_ {
    let counts = Reason::ALL.iter().map(|&reason| (reason.name(), counted.refused(reason)));
    counts.filter(|&(_, count)| count > 0)
}
