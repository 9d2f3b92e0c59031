"""Minimal bindings of the CUDA driver through ctypes, without torch or other packages.

The driver's library is part of every NVIDIA driver, in one version, unlike the CUDA runtime, which would have to be
searched for. TensorRT uses the device's primary context, and so does this file.
"""

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from lightning_accel.errors import EngineError

_POINTER = ctypes.c_uint64  # CUdeviceptr; contexts and streams are void*
_HANDLE = ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGetCount": (ctypes.POINTER(ctypes.c_int),),
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDeviceGetName": (ctypes.c_char_p, ctypes.c_int, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(_HANDLE), ctypes.c_int),
    "cuCtxSetCurrent": (_HANDLE,),
    "cuMemAlloc_v2": (ctypes.POINTER(_POINTER), ctypes.c_size_t),
    "cuMemFree_v2": (_POINTER,),
    "cuMemcpyHtoD_v2": (_POINTER, _HANDLE, ctypes.c_size_t),
    "cuMemcpyDtoH_v2": (_HANDLE, _POINTER, ctypes.c_size_t),
    "cuStreamCreate": (ctypes.POINTER(_HANDLE), ctypes.c_uint),
    "cuStreamSynchronize": (_HANDLE,),
    "cuStreamDestroy_v2": (_HANDLE,),
    "cuStreamBeginCapture_v2": (_HANDLE, ctypes.c_int),
    "cuStreamEndCapture": (_HANDLE, ctypes.POINTER(_HANDLE)),
    "cuGraphInstantiateWithFlags": (ctypes.POINTER(_HANDLE), _HANDLE, ctypes.c_ulonglong),
    "cuGraphLaunch": (_HANDLE, _HANDLE),
    "cuGraphExecDestroy": (_HANDLE,),
    "cuGraphDestroy": (_HANDLE,),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}


@functools.cache
def _driver() -> Any | None:
    """Return the driver's library, initialized, or ``None`` without a driver or without a GPU."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    count = ctypes.c_int()
    if library.cuInit(0) != 0 or library.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value < 1:
        return None
    return library


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU and a driver that answers."""
    return _driver() is not None


def gpu_name() -> str | None:
    """Name of the first GPU, e.g. ``"NVIDIA L4"``; ``None`` without one."""
    if _driver() is None:
        return None
    name = ctypes.create_string_buffer(256)
    _call("cuDeviceGetName", name, len(name), _device())
    return name.value.decode()


def make_current() -> None:
    """Make the first GPU's primary context current in the calling thread; memory and streams need one."""
    _call("cuCtxSetCurrent", _primary_context())


class DeviceArray:
    """GPU memory for one array, which grows on demand."""

    def __init__(self) -> None:
        self._pointer = _POINTER()
        self._capacity = 0

    def reserve(self, size: int) -> int:
        """Allocate at least ``size`` bytes; returns the address."""
        if size > self._capacity:
            self.free()
            _call("cuMemAlloc_v2", ctypes.byref(self._pointer), size)
            self._capacity = size
        return self._pointer.value

    def upload(self, array: np.ndarray) -> int:
        """Copy a contiguous array to the GPU; returns the address."""
        address = self.reserve(max(array.nbytes, 1))
        if array.nbytes:
            _call("cuMemcpyHtoD_v2", address, array.ctypes.data, array.nbytes)
        return address

    def download(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Copy the memory back as an array of this shape and dtype."""
        array = np.empty(shape, dtype)
        if array.nbytes:
            _call("cuMemcpyDtoH_v2", array.ctypes.data, self._pointer, array.nbytes)
        return array

    def free(self) -> None:
        """Free the memory; a second call has no effect."""
        if self._capacity:
            _call("cuMemFree_v2", self._pointer)
            self._pointer, self._capacity = _POINTER(), 0


class Stream:
    """A CUDA stream."""

    def __init__(self) -> None:
        handle = _HANDLE()
        _call("cuStreamCreate", ctypes.byref(handle), 0)  # 0: ordered after the copies, which run on stream 0
        self.handle = handle.value or 0

    def synchronize(self) -> None:
        """Wait until all work in the stream is done."""
        _call("cuStreamSynchronize", self.handle)

    def destroy(self) -> None:
        """Free the stream."""
        _call("cuStreamDestroy_v2", self.handle)


class Graph:
    """CUDA graph: work recorded from a stream and launched with one call instead of one for each kernel.

    Args:
        stream: stream of the work.
        work: enqueues the work; must neither synchronize nor allocate. Its result is not checked here.
    """

    def __init__(self, stream: Stream, work: Callable[[], None]) -> None:
        recorded, executable = _HANDLE(), _HANDLE()
        _call("cuStreamBeginCapture_v2", stream.handle, 1)  # 1: calls of other threads are allowed
        try:
            work()
        finally:  # an open capture would record the stream's next work
            _call("cuStreamEndCapture", stream.handle, ctypes.byref(recorded))
        _call("cuGraphInstantiateWithFlags", ctypes.byref(executable), recorded, 0)
        _call("cuGraphDestroy", recorded)
        self._handle = executable.value or 0

    def launch(self, stream: Stream) -> None:
        """Enqueue the work."""
        _call("cuGraphLaunch", self._handle, stream.handle)

    def destroy(self) -> None:
        """Free the graph."""
        _call("cuGraphExecDestroy", self._handle)


def _device() -> int:
    device = ctypes.c_int()
    _call("cuDeviceGet", ctypes.byref(device), 0)
    return device.value


@functools.cache  # retained for the lifetime of the process, as in the CUDA runtime
def _primary_context() -> int:
    context = _HANDLE()
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), _device())
    return context.value or 0


def _call(name: str, *arguments: Any) -> None:
    driver = _driver()
    if driver is None:
        raise EngineError(f"{name} needs an NVIDIA GPU and its driver; this machine has none.")
    if code := getattr(driver, name)(*arguments):
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        raise EngineError(f"{name} failed: {(text.value or b'unknown error').decode()} (CUDA error {code}).")
