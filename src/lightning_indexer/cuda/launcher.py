"""Loading compiled kernels onto a device and launching them on torch's current stream.

A `Kernel` is made once per specialisation and device. A launch packs its arguments into a buffer of the calling thread
and calls the driver: no synchronisation, no allocation, so that it can be captured in a CUDA graph. What Python adds
to the driver's own time is under 2 us (measured against a driver that does nothing).
"""

import contextlib
import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from lightning_indexer.cuda.compiler import OLDEST_ARCH, Binary, Specialisation, build

# Kinds of kernel parameters, as `struct` spells them
POINTER, INT64, INT32, FLOAT32 = "P", "q", "i", "f"

_STATIC_SHARED_LIMIT = 48 * 1024  # more needs the kernel's consent
_INVALID_CONTEXT = 201
_FIRST_ARCH_SPECIFIC = 9  # from Hopper on, "a" architectures have the tensor instructions that kernels may want

_kernels: dict[tuple[Specialisation, int], "Kernel"] = {}
_kernels_lock = threading.Lock()


class LaunchError(RuntimeError):
    """The driver refused a launch; the message names the kernel, the grid and the arguments."""


class Kernel:
    """One compiled kernel on one device.

    Args:
        specialisation: what it was made from (for messages).
        binary: what `build` gave.
        device_index: torch's index of the device.
        parameters: name and kind of each kernel parameter, in order.
        threads: per block.
        shared_bytes: dynamic shared memory per block.
        overlaps: it may be started while the kernel before it in the stream still runs (programmatic dependent launch)
            and waits for that one's results itself.
    """

    def __init__(
        self,
        specialisation: Specialisation,
        binary: Binary,
        device_index: int,
        parameters: Mapping[str, str],
        *,
        threads: int,
        shared_bytes: int = 0,
        overlaps: bool = False,
    ) -> None:
        from cuda.bindings import driver

        self.specialisation = specialisation
        self.binary = binary
        self.device_index = device_index
        self.threads = threads
        self.shared_bytes = shared_bytes
        self.overlaps = overlaps
        self._names = tuple(parameters)
        self._arguments = _ArgumentBuffer("".join(parameters.values()))
        self._library, self._function = _load(specialisation, binary, device_index, shared_bytes)
        self._submit: Callable[..., Any] = _OverlappingLaunch() if overlaps else driver.cuLaunchKernel

    def launch(self, grid: tuple[int, int, int], *arguments: float) -> None:
        """Enqueue on the current stream of this kernel's device.

        Args:
            grid: blocks in x, y and z, each at least 1.
            arguments: one number per parameter; addresses as `tensor.data_ptr()` gives them. The caller keeps the
                tensors alive for the stream, as torch's allocator does for tensors used on the stream they live on.
        Raises:
            LaunchError: the driver refused.
        """
        if torch._C._cuda_getDevice() != self.device_index:  # torch.cuda.current_device() at a third of its cost
            with torch.cuda.device(self.device_index):
                self.launch(grid, *arguments)
            return
        pack_into, values, address = self._arguments.place
        try:
            pack_into(values, 0, *arguments)
        except (struct.error, OverflowError) as error:
            raise LaunchError(f"{self._describe(grid, arguments)}: {error}") from error
        status = self._enqueue(grid, address)
        if status == _INVALID_CONTEXT:  # a thread that has not used CUDA before
            _make_context_current(self.device_index)
            status = self._enqueue(grid, address)
        if status:
            raise LaunchError(f"{self._describe(grid, arguments)}: {_error_text(status)}")

    def _enqueue(self, grid: tuple[int, int, int], address: int) -> int:
        stream = torch._C._cuda_getCurrentRawStream(self.device_index)
        status: int
        (status,) = self._submit(self._function, *grid, self.threads, 1, 1, self.shared_bytes, stream, address, 0)
        return status

    def _describe(self, grid: tuple[int, int, int], arguments: tuple[float, ...]) -> str:
        named = [f"{name}={value}" for name, value in zip(self._names, arguments, strict=False)]
        return (
            f"launch of {self.specialisation} on cuda:{self.device_index} with grid {grid}, {self.threads} threads, "
            f"{self.shared_bytes} bytes of shared memory and {len(arguments)} of {len(self._names)} arguments "
            f"({', '.join(named)}) failed"
        )


class _ArgumentBuffer(threading.local):
    """Where one kernel's arguments lie while the driver copies them: one buffer per thread, made on first use.

    place: what packs arguments, the buffer to pack them into, and the address of the array of their addresses. (One
    attribute, because each access of a thread's own attribute costs as much as packing three arguments.)
    """

    def __init__(self, kinds: str) -> None:
        layout = struct.Struct("@" + kinds)
        ends = [struct.calcsize("@" + kinds[: i + 1]) for i in range(len(kinds))]
        values = (ctypes.c_uint64 * (layout.size // 8 + 1))()
        first = ctypes.addressof(values)
        places = [first + end - struct.calcsize(kind) for end, kind in zip(ends, kinds, strict=True)]
        self._places = (ctypes.c_void_p * len(places))(*places)
        self.place = (layout.pack_into, values, ctypes.addressof(self._places))


class _OverlappingLaunch(threading.local):
    """Stands in for `cuLaunchKernel`: the kernel need not wait for the end of the one before it. One per thread."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        value = driver.CUlaunchAttributeValue()
        value.programmaticStreamSerializationAllowed = 1
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value = value
        self._config = driver.CUlaunchConfig()
        self._config.attrs, self._config.numAttrs = [attribute], 1
        self._launch = driver.cuLaunchKernelEx

    def __call__(
        self,
        function: object,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        block_x: int,
        block_y: int,
        block_z: int,
        shared_bytes: int,
        stream: int,
        arguments: int,
        extra: int,
    ) -> Any:
        config = self._config
        config.gridDimX, config.gridDimY, config.gridDimZ = grid_x, grid_y, grid_z
        config.blockDimX, config.blockDimY, config.blockDimZ = block_x, block_y, block_z
        config.sharedMemBytes, config.hStream = shared_bytes, stream
        return self._launch(config, function, arguments, extra)


def load_kernel(
    specialisation: Specialisation,
    device_index: int,
    parameters: Mapping[str, str],
    *,
    threads: int,
    shared_bytes: int = 0,
    overlaps: bool = False,
) -> Kernel:
    """The kernel of a specialisation on a device, built and loaded the first time it is asked for; see `Kernel`.

    How a specialisation is launched must follow from it: later calls get the kernel of the first.
    """
    key = (specialisation, device_index)
    kernel = _kernels.get(key)
    if kernel is None:
        with _kernels_lock:
            kernel = _kernels.get(key)
            if kernel is None:
                kernel = _kernels[key] = Kernel(
                    specialisation,
                    build(specialisation),
                    device_index,
                    parameters,
                    threads=threads,
                    shared_bytes=shared_bytes,
                    overlaps=overlaps,
                )
    return kernel


@functools.cache
def device_arch(device_index: int) -> str:
    """Architecture to compile for: "sm_80", "sm_90a". Raises NotImplementedError for a GPU that is too old."""
    major, minor = torch.cuda.get_device_capability(device_index)
    if major * 10 + minor < OLDEST_ARCH:
        raise NotImplementedError(
            f"lightning_indexer's CUDA kernels need sm_{OLDEST_ARCH} or newer, got sm_{major}{minor} "
            f"({torch.cuda.get_device_name(device_index)}); impl='reference' serves it"
        )
    return f"sm_{major}{minor}{'a' if major >= _FIRST_ARCH_SPECIFIC else ''}"


def _load(
    specialisation: Specialisation, binary: Binary, device_index: int, shared_bytes: int
) -> tuple[object, object]:
    """Library (to be kept) and function in the device's context, with leave to use the shared memory."""
    from cuda.bindings import driver
    from cuda.core import ObjectCode

    with torch.cuda.device(device_index), _during_capture():
        _make_context_current(device_index)
        library = ObjectCode.from_cubin(binary.code)
        kernel = driver.CUkernel(int(library.get_kernel(binary.symbol).handle))
        if shared_bytes + binary.shared_bytes > _STATIC_SHARED_LIMIT:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, kernel, driver.CUdevice(device_index))
            if status:
                raise LaunchError(f"{specialisation}: {shared_bytes} bytes of shared memory: {_error_text(status)}")
        status, function = driver.cuKernelGetFunction(kernel)  # loads now, not within the first launch
        if status:
            raise LaunchError(f"{specialisation} cannot be loaded on cuda:{device_index}: {_error_text(status)}")
    return library, function


@contextlib.contextmanager
def _during_capture() -> Iterator[None]:
    """Let this thread load code although a stream of the process may be capturing a graph."""
    from cuda.bindings import driver

    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    _, before = driver.cuThreadExchangeStreamCaptureMode(relaxed)
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(before)


def _make_context_current(device_index: int) -> None:
    """Give the calling thread the context that torch uses on this device."""
    from cuda.bindings import driver

    status, context = driver.cuDevicePrimaryCtxRetain(driver.CUdevice(device_index))
    if not status:
        (status,) = driver.cuCtxSetCurrent(context)
    if status:
        raise LaunchError(f"no CUDA context on cuda:{device_index}: {_error_text(status)}")


def _error_text(status: int) -> str:
    from cuda.bindings import driver

    _, name = driver.cuGetErrorName(driver.CUresult(status))
    _, text = driver.cuGetErrorString(driver.CUresult(status))
    return f"{name.decode()} ({text.decode()})" if name and text else f"driver error {int(status)}"
