# SPDX-License-Identifier: Apache-2.0
"""Measure time and peak memory of candidates in turn, in one process, so that their ratios are meaningful."""

import ctypes
import gc
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch

Call = Callable[[], object]
Build = Callable[[], Call]
# Idle threads of ONNX Runtime and OpenMP spin for a while, and would take a core from the next candidate.
SETTLE_SECONDS = 0.2
WAKE_SECONDS = 0.02  # of calls before each timing: threads that have just woken up may share a core for some ms
LONG_SECONDS = 0.5  # calls of this duration need no wake-up call before each timing
# Of one timing. Shorter calls are repeated: on a CPU the first after a pause is slow, on a GPU the host's work then
# overlaps with the kernels, as in training.
LEAST_SECONDS = 0.005
WAITING = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')  # environment variables that control how OpenMP's threads wait
BUSY_LOOP = 'import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100_000))'


@dataclass
class Measurement:
    """The times of one candidate on one input."""

    seconds: list[float]
    peak_bytes: int | None  # without the given and returned tensors; None if it cannot be measured

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the interquartile range, divided by the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def measure(
    candidates: dict[str, Call], device: str, repeats: int, memory: bool = True, wall: bool = False
) -> dict[str, Measurement]:
    """Run each candidate once to warm up, then time all of them in turn, `repeats` times.

    On a GPU, times are measured with CUDA events, or with `wall` one call at a time by the clock of the host.
    """
    timer = time_events if device == 'cuda' and not wall else partial(time_once, device=device)
    warm_ups = {name: time_once(call, device) for name, call in candidates.items()}
    peaks = {name: peak_memory(call, device) if memory else None for name, call in candidates.items()}
    if device == 'cuda':  # where the first call also compiles and tunes
        warm_ups = {name: time_once(call, device) for name, call in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, call in candidates.items():
            if device == 'cpu':
                time.sleep(SETTLE_SECONDS)
                if warm_ups[name] < LONG_SECONDS:
                    repeated(call, math.ceil(WAKE_SECONDS / warm_ups[name]))()
            count = 1 if wall and device == 'cuda' else math.ceil(LEAST_SECONDS / warm_ups[name])
            seconds[name].append(timer(repeated(call, count)) / count)
    return {name: Measurement(seconds[name], peaks[name]) for name in candidates}


def compiled_mmcv_ops() -> ModuleType:
    """Return `mmcv.ops`.

    Raises:
        ImportError: If mmcv runs on mmdcn's operators, so that mmdcn would be compared with itself.
    """
    from mmcv import _ext, ops

    if _ext.__file__.endswith('.py'):
        raise ImportError('mmcv is installed without its own operators; `make bench` compiles them')
    return ops


def repeated(call: Call, count: int) -> Call:
    def run() -> None:
        for _ in range(count):
            call()

    return run if count > 1 else call


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Keep this number of cores busy inside the context, as other programs would."""
    loops = [subprocess.Popen([sys.executable, '-c', BUSY_LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def time_once(call: Call, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def time_events(call: Call) -> float:
    """Measure the time on an idle GPU with CUDA events; it includes the time in which the GPU waits for the host."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def synchronize(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def peak_memory(call: Call, device: str) -> int | None:
    """Measure the peak memory of a call, without the memory in use before it and the tensors that it returns."""
    gc.collect()
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        returned = call()
        return torch.cuda.max_memory_allocated() - before - _bytes(returned)
    reset = Path('/proc/self/clear_refs')
    if not reset.exists():
        return None
    _return_free_memory()
    reset.write_text('5')  # resets the peak of the resident memory to its current size
    before = _status('VmRSS')
    returned = call()
    return max(0, _status('VmHWM') - before - _bytes(returned))


def _bytes(returned: object) -> int:
    arrays = returned if isinstance(returned, tuple | list) else (returned,)
    return sum(getattr(array, 'nbytes', 0) for array in arrays)


def _return_free_memory() -> None:
    """Make glibc return freed memory to the system; a call that reuses it would not raise the resident size."""
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
        trim(0)


def _status(key: str) -> int:
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(f'{key}:'):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def machine(device: str, packages: tuple[str, ...]) -> dict[str, str]:
    """Describe the machine and the versions of the packages."""
    facts = {
        'processor': _processor(),
        'instructions': torch.backends.cpu.get_cpu_capability(),
        'threads': str(torch.get_num_threads()),
        'waiting': ', '.join(f'{k}={os.environ[k]}' for k in WAITING if k in os.environ) or "OpenMP's default",
        'system': f'{platform.system()} {platform.machine()}, Python {platform.python_version()}',
    }
    if device == 'cuda':
        facts['gpu'] = (
            f'{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}'
        )
    for package in packages:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = 'not installed'
    return facts


def _processor() -> str:
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return f'{names[0]} x {len(names)}' if names else platform.processor()
