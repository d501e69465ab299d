//! `KvLayers` for Python: tensors taken in by `DLPack`.

use std::sync::Arc;

use dlpark::ffi::{DLDevice, DLDeviceType};
use dlpark::python::{ImportedDlpack, from_dlpack};
use dlpark::tensor::TensorRef;
use dlpark::{AllocationDeleter, DlpackFlags};
use lmcache_core::Layer;
use pyo3::exceptions::{PyBufferError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::convert::invalid;
use crate::error::{guarded_py, to_python};

#[pyclass(frozen, module = "lmcache_rs._core")]
pub struct KvLayers {
    pub(super) layers: Arc<lmcache_core::KvLayers>,
}

#[pymethods]
impl KvLayers {
    #[new]
    fn new(tensors: &Bound<'_, PyAny>) -> PyResult<Self> {
        guarded_py(|| take_in(tensors))
    }

    #[getter]
    fn layers(&self) -> usize {
        self.layers.layers().len()
    }

    #[getter]
    fn blocks(&self) -> u32 {
        self.layers.blocks()
    }

    #[getter]
    fn page_bytes(&self) -> Vec<usize> {
        self.layers.layers().iter().map(|layer| layer.page_bytes).collect()
    }

    #[getter]
    fn row_bytes(&self) -> usize {
        self.layers.row_bytes()
    }

    fn __repr__(&self) -> String {
        let layers = &self.layers;
        format!(
            "<KvLayers of {} layers, {} blocks of {} bytes>",
            layers.layers().len(),
            layers.blocks(),
            layers.row_bytes()
        )
    }
}

/// Tensors in, and what keeps each of them.
fn take_in(tensors: &Bound<'_, PyAny>) -> PyResult<KvLayers> {
    if tensors.hasattr("__dlpack__")? {
        return Err(invalid("one tensor was given, not a sequence of one a layer: put it into a list"));
    }
    let mut layers = Vec::new();
    let mut keep: Vec<AllocationDeleter> = Vec::new();
    let mut common_blocks = None;
    for (number, tensor) in tensors.try_iter()?.enumerate() {
        let imported = import(number, &tensor?)?;
        let (layer, blocks) = {
            let view =
                imported.validate().map_err(|error| invalid(format!("KV tensor {number}: {error}")))?;
            layer(number, &view)?
        };
        let expected = *common_blocks.get_or_insert(blocks);
        if blocks != expected {
            return Err(invalid(format!("KV tensor {number} has {blocks} blocks, tensor 0 has {expected}")));
        }
        layers.push(layer);
        keep.push(imported.into_deleter());
    }
    // SAFETY: DLPack's producers promise memory of this shape until the deleter runs, which `keep` does not do
    // before it is dropped; `layer` computed page and stride from that shape. That nobody else uses a block while it
    // is copied is asked of the caller in the stub.
    let layers = unsafe { lmcache_core::KvLayers::new(layers, common_blocks.unwrap_or(1), Box::new(keep)) };
    layers.map(|layers| KvLayers { layers: Arc::new(layers) }).map_err(|error| to_python(&error))
}

/// Takes ownership of one tensor: writable, and not a copy.
fn import(number: usize, tensor: &Bound<'_, PyAny>) -> PyResult<ImportedDlpack> {
    let py = tensor.py();
    if !tensor.hasattr("__dlpack__")? {
        return Err(invalid(format!("KV tensor {number} is {}, which has no __dlpack__", tensor.get_type())));
    }
    let imported = from_dlpack(tensor.as_borrowed(), None, None).or_else(|error| {
        // Producers from before DLPack 1.0 know no `max_version`.
        if !error.is_instance_of::<PyTypeError>(py) {
            return Err(error);
        }
        from_dlpack(tensor.call_method0("__dlpack__")?.as_borrowed(), None, None)
    });
    let imported = imported.map_err(|error| refusal(py, number, error))?;
    if imported.flags().contains(DlpackFlags::READ_ONLY) {
        return Err(invalid(format!(
            "KV tensor {number} is read-only: loads write into it, give a writable one"
        )));
    }
    if imported.flags().contains(DlpackFlags::IS_COPIED) {
        return Err(invalid(format!(
            "KV tensor {number} came as a copy: loads would not reach the original"
        )));
    }
    Ok(imported)
}

/// What a producer raises when it cannot share (numpy: read-only arrays; torch: other devices and layouts) is a wrong
/// argument; anything else is its own affair.
fn refusal(py: Python<'_>, number: usize, error: PyErr) -> PyErr {
    let usual = error.is_instance_of::<PyBufferError>(py)
        || error.is_instance_of::<PyRuntimeError>(py)
        || error.is_instance_of::<PyTypeError>(py)
        || error.is_instance_of::<PyValueError>(py);
    if !usual {
        return error;
    }
    let said = error.value(py).to_string();
    let first_line = said.lines().next().unwrap_or_default();
    let refused = invalid(format!(
        "KV tensor {number} cannot be shared by DLPack, which needs writable strided memory of the CPU: {first_line}"
    ));
    refused.set_cause(py, Some(error));
    refused
}

/// Where the blocks of a tensor [blocks, ...] lie.
fn layer(number: usize, view: &TensorRef<'_>) -> PyResult<(Layer, usize)> {
    check_device(number, view.device())?;
    let Some((&blocks, rest)) = view.shape().split_first() else {
        return Err(invalid(format!(
            "KV tensor {number} has no dimensions: its first is that of the blocks"
        )));
    };
    let bits = usize::from(view.dtype().bits) * usize::from(view.dtype().lanes);
    if bits % 8 != 0 {
        return Err(invalid(format!(
            "KV tensor {number} has elements of {bits} bits: pass it viewed as uint8"
        )));
    }
    let strides =
        view.strides_or_compact().map_err(|error| invalid(format!("KV tensor {number}: {error}")))?;
    let Some(elements) = dense_elements(rest, &strides[1..]) else {
        return Err(invalid(format!(
            "the blocks of KV tensor {number} are not contiguous: shape {:?}, strides {strides:?}",
            view.shape()
        )));
    };
    let element_bytes = bits / 8;
    let block_stride = usize::try_from(strides[0]).map_err(|_| {
        invalid(format!("the blocks of KV tensor {number} go backwards: strides {strides:?}"))
    })?;
    let blocks =
        usize::try_from(blocks).map_err(|_| invalid(format!("KV tensor {number} has {blocks} blocks")))?;
    // SAFETY: the address is only computed, from what `validate` has checked.
    let base = unsafe { view.offset_bytes_ptr() }
        .map_err(|error| invalid(format!("KV tensor {number}: {error}")))?;
    let layer = Layer {
        base: base.cast_mut(),
        block_stride: block_stride.saturating_mul(element_bytes),
        page_bytes: elements * element_bytes,
    };
    Ok((layer, blocks))
}

/// Pinned memory is ordinary memory to us.
fn check_device(number: usize, device: DLDevice) -> PyResult<()> {
    if device.device_type == DLDeviceType::CPU || device.device_type == DLDeviceType::CUDAHOST {
        return Ok(());
    }
    Err(invalid(format!(
        "KV tensor {number} is on device {}:{} of DLPack, not on the CPU (1:0)",
        device.device_type.0, device.device_id
    )))
}

/// Elements of a block when they fill one run of memory, in whatever order its dimensions lie (vLLM permutes them).
fn dense_elements(shape: &[i64], strides: &[i64]) -> Option<usize> {
    let mut dimensions: Vec<(i64, i64)> =
        strides.iter().copied().zip(shape.iter().copied()).filter(|&(_, size)| size != 1).collect();
    dimensions.sort_unstable();
    let elements =
        dimensions.iter().try_fold(1, |run, &(stride, size)| (stride == run).then_some(run * size))?;
    usize::try_from(elements).ok()
}
