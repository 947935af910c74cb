# SPDX-License-Identifier: Apache-2.0
"""A step of gpu_check.py: a process with a time limit."""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOG_BYTES = 150_000  # maximum log size of each step
FAILURES = 100  # maximum number of recorded failures of each step
OUTCOME = '(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)'
TEST_RESULT = re.compile(rf'\[gw\d+\] \[ *\d+%\] {OUTCOME} (tests/.*)|(tests/\S.*?) {OUTCOME}\b')  # with xdist; without


@dataclass
class Step:
    """A process with a time limit, and its output."""

    name: str
    command: list[str]
    limit: float  # seconds
    env: dict[str, str] = field(default_factory=dict)
    cwd: Path = ROOT
    quiet: Callable[[str], bool] = lambda line: False  # which lines to leave out of the log
    status: str = 'not started'
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)  # number of tests by outcome
    failures: list[str] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)
    logged: int = 0
    process: subprocess.Popen | None = None
    reader: threading.Thread | None = None
    started: float = 0.0

    def start(self, log: Path) -> None:
        say(f'{self.name}: started, at most {self.limit:.0f} s')
        self.started, self.status = time.monotonic(), 'running'
        env = {**os.environ, 'PYTHONUNBUFFERED': '1', **self.env}
        options: dict[str, Any] = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            self.process = subprocess.Popen(
                self.command, cwd=self.cwd, env=env, start_new_session=True, text=True, errors='replace', **options
            )
        except OSError as error:
            self.status = f'not started: {error}'
            say(f'{self.name}: {self.status}')
            return
        self.reader = threading.Thread(target=self.read, args=(log,), daemon=True)
        self.reader.start()

    def read(self, log: Path) -> None:
        """Log the output of the process, and count its tests."""
        assert self.process is not None and self.process.stdout is not None
        with log.open('a') as file:
            for line in self.process.stdout:
                line = line.rstrip()
                result = TEST_RESULT.match(line)
                if result:
                    outcome, test = result[1] or result[4], result[2] or result[3]
                    self.counts[outcome.lower()] = self.counts.get(outcome.lower(), 0) + 1
                    if outcome in ('FAILED', 'ERROR'):
                        self.fail(test)
                if self.quiet(line) or self.logged > LOG_BYTES:
                    continue
                self.tail = [*self.tail[-39:], without_folders(line)[:400]]
                self.logged += file.write(f'{self.name}| {line[:1000]}\n')
                file.flush()

    def fail(self, what: str) -> None:
        if what not in self.failures and len(self.failures) < FAILURES:
            self.failures.append(what)
            say(f'{self.name}: FAILED {what}')

    def done(self) -> bool:
        """Stop the process if it exceeds its limit, and return whether it has ended."""
        if self.process is None:
            return True
        late = time.monotonic() - self.started > self.limit
        if not late and self.process.poll() is None:
            return False
        kill(self.process)
        code = self.process.wait()
        assert self.reader is not None
        self.reader.join(5)
        self.seconds = time.monotonic() - self.started
        if late:
            self.status = f'late: stopped after {self.seconds:.0f} s'
        else:
            self.status = 'passed' if code == 0 else f'failed with status {code}'
        say(f'{self.name}: {self.status}, {self.seconds:.1f} s {self.progress()}')
        if self.status != 'passed':
            print('\n'.join(f'    {line}' for line in self.tail[-6:]), flush=True)
        self.process = None
        return True

    def progress(self) -> str:
        return ', '.join(f'{count} {outcome}' for outcome, count in list(self.counts.items()))

    def record(self) -> dict[str, Any]:
        """Return the record of the step; `read` may still be adding to it."""
        ended_well = self.status in ('passed', 'running')
        return {
            'name': self.name,
            'status': self.status,
            'seconds': self.seconds,
            'counts': dict(self.counts),
            'failures': list(self.failures),
            'tail': [] if ended_well else self.tail[-12:],
        }


BEGAN = time.monotonic()


def say(text: str) -> None:
    print(f'[{time.monotonic() - BEGAN:5.1f} s] {text}', flush=True)


def kill(process: subprocess.Popen) -> None:
    """Kill a process and all processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def without_folders(line: str) -> str:
    """Replace absolute folders by …, because the results are committed."""
    return re.sub(r'(?<![\w.])/(?:[\w.+-]+/)+', '…/', line)
