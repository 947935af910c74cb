# SPDX-License-Identifier: Apache-2.0
"""Test, sanitize and measure mmdcn on a GPU within minutes, and report on one page which goals it meets.

Each step runs in its own process with a time limit, and does not stop the others. All results so far are written every
few seconds.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from gpu_check_page import combined_charts, page, summary
from gpu_check_site import find_site, unpack_peers
from gpu_check_step import BEGAN, Step, kill, say

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / 'benchmarks'
STEPS = ('tests', 'sanitize', 'bench', 'resnet', 'kernels')  # those that run by default
TOOLS = ('memcheck', 'racecheck', 'synccheck', 'initcheck')
DEFORMOPS_PARTS = 5  # processes that compile the configurations of a shape
RESERVE = 12  # seconds for the page and the charts
POLL_SECONDS = 0.5
REPORT_SECONDS = 5
PROBE = """
import torch, mmdcn
from mmdcn.ops import deform_conv2d
torch.manual_seed(0)
call = torch.randn(2, 64, 9, 8), torch.randn(2, 18, 7, 6), torch.randn(64, 64, 3, 3)
expected = deform_conv2d(*call)
got = deform_conv2d(*(tensor.cuda() for tensor in call)).cpu()
print(f'torch {torch.__version__}, {torch.cuda.get_device_name()}, {mmdcn.__file__}, max difference to the CPU '
      f'{(got - expected).abs().max():.1e} of {expected.abs().max():.1e}')
"""


class Check:
    """The steps of the check, and the folder for their results."""

    def __init__(self, args: argparse.Namespace, site: Path) -> None:
        self.args, self.site, self.work = args, site, args.work.resolve()
        self.out = args.out.resolve()
        self.results = self.work / 'results'
        self.results.mkdir(parents=True)
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = self.out / 'gpu-check.log'
        self.log.write_text('')
        self.steps: list[Step] = []
        self.triton_cache = self.work / 'triton'
        self.peers = unpack_peers(args.peers, self.work / 'peers')
        path = [str(site), *map(str, self.peers), os.environ.get('PYTHONPATH', '')]
        self.env = {
            'PYTHONPATH': os.pathsep.join(filter(None, path)),
            'TRITON_CACHE_DIR': str(self.triton_cache),
        }

    def left(self) -> float:
        return self.args.limit - RESERVE - (time.monotonic() - BEGAN)

    def run(self, *steps: Step) -> None:
        """Run steps concurrently, each up to its own limit and the time that is left for the whole check."""
        for step in steps:
            self.steps.append(step)
            step.env = {**self.env, **step.env}
            step.limit = min(step.limit, self.left())
            if step.limit < 3:
                step.status = 'not run: no time left'
                say(f'{step.name}: {step.status}')
            else:
                step.start(self.log)
        running, said = list(steps), time.monotonic()
        try:
            while running:
                time.sleep(POLL_SECONDS)
                running = [step for step in running if not step.done()]
                if running and time.monotonic() - said > REPORT_SECONDS:
                    said = time.monotonic()
                    say('; '.join(f'{step.name} {step.progress()}'.strip() for step in running))
                    self.write()
        finally:
            for step in running:
                if step.process is not None:
                    kill(step.process)
            self.write()

    def write(self) -> dict[str, Any]:
        """Write all results so far as JSON and as a page."""
        steps = [step.record() for step in self.steps]
        record = {
            'commit': self.args.commit,
            'seconds': round(time.monotonic() - BEGAN, 1),
            'steps': steps,
            'groups': {path.stem: json.loads(path.read_text()) for path in sorted(self.results.glob('*.json'))},
        }
        (self.out / 'gpu-check.part').write_text(json.dumps(record, separators=(',', ':')))
        (self.out / 'gpu-check.part').replace(self.out / 'gpu-check.json')
        (self.out / 'gpu-check.md').write_text(page(record))
        return record


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def test_step(work: Path, limit: float) -> Step:
    """Run the CUDA tests of all operators; a worker that hangs or loses its GPU does not stop the others."""
    options = ['-vv', '-p', 'no:cacheprovider', '--tb=short', '--continue-on-collection-errors']
    options += ['-k', 'cuda and not aotinductor']  # which compiles C++ for minutes
    if importlib.util.find_spec('xdist'):
        options += ['-n', '8', '--dist', 'worksteal', '--max-worker-restart', '40']
    if importlib.util.find_spec('pytest_timeout'):
        options += ['--timeout', '75', '--timeout-method', 'thread']
    tests = sorted(
        f'tests/{path.name}' for pattern in ('deform_*', 'nms') for path in (work / 'tests').glob(f'test_{pattern}.py')
    )
    env = {'OMP_NUM_THREADS': '2', 'TORCHINDUCTOR_COMPILE_THREADS': '1'}
    return Step('tests', python('-m', 'pytest', *options, *tests), limit, env, work, uninteresting)


def uninteresting(line: str) -> bool:
    """Return whether a line only says that a test starts, passes or is skipped, or is empty."""
    return ' PASSED ' in line or ' SKIPPED ' in line or line.startswith('tests/') or not line


def sanitizer_steps(work: Path, limit: float, expression: str) -> list[Step]:
    program = shutil.which('compute-sanitizer') or '/usr/local/cuda/bin/compute-sanitizer'
    steps = []
    for tool in TOOLS:
        options = [
            '--tool',
            tool,
            '--error-exitcode',
            '1',
            '--log-file',
            str(work / f'{tool}.log'),
            '--print-limit',
            '50',
        ]
        if tool == 'memcheck':
            options += ['--report-api-errors', 'no']  # torch handles API calls that may fail
        if tool != 'initcheck':  # initcheck must see the writes of all kernels
            options += ['--kernel-regex', 'kns=mmdcn']
        pytest = python(
            '-m', 'pytest', '-vv', '--durations=3', '-p', 'no:cacheprovider', '--tb=short', '-k', expression
        )
        tests = [f'tests/test_{name}.py' for name in ('deform_conv2d', 'deform_conv2d_kernels', 'deform_roi_pool')]
        # The tools see memory in torch's cache as allocated and initialised, so caching is switched off.
        env = {'PYTORCH_NO_CUDA_MEMORY_CACHING': '1', 'OMP_NUM_THREADS': '1'}
        steps.append(Step(tool, [program, *options, *pytest, *tests], limit, env, work, uninteresting))
    return steps


def read_sanitizer(step: Step, log: Path) -> None:
    """Count the sanitizer's errors; those in mmdcn's kernels fail the step, those in torch's kernels do not."""
    if not log.is_file():
        return
    ours, others = sanitizer_errors(log.read_text(errors='replace'))
    step.counts['errors in mmdcn'], step.counts['errors elsewhere'] = len(ours), len(others)
    for error in ours:
        step.fail(error)
    step.tail += [f'elsewhere: {error}' for error in others[:5]]
    tests_passed = step.counts.get('passed', 0) > 0 and not any(step.counts.get(k) for k in ('failed', 'error'))
    if step.status == 'failed with status 1' and tests_passed and not ours:
        step.status = 'passed'


def sanitizer_errors(log: str) -> tuple[list[str], list[str]]:
    """Return the reports in compute-sanitizer's log that name a kernel of mmdcn, and the others, one line each."""
    ours, others = [], []
    for block in re.split(r'^=========\s*$', log, flags=re.MULTILINE):
        lines = [line.removeprefix('=========').strip() for line in block.splitlines()]
        lines = [
            line for line in lines if line and not re.match(r'COMPUTE-SANITIZER|\w+ SUMMARY|Target application', line)
        ]
        if lines:
            text = ' | '.join(lines[:4])[:300]
            (ours if any('mmdcn::' in line for line in lines) else others).append(text)
    return ours, others


def bench(check: Check, operator: str, groups: list[str], limit: float) -> None:
    """Measure the groups in one process; if a group ends it, continue with the next group in a new process."""
    end = time.monotonic() + limit
    while groups and end - time.monotonic() > 3:
        name = f'bench {operator} {" ".join(groups)}'
        command = python(BENCHMARKS / 'run.py', operator, '--device', 'cuda', '--cases', *groups)
        step = Step(name, [*command, '--repeats', '11', '--out', str(check.results)], end - time.monotonic())
        step.quiet = lambda line: 'case/s' in line or 's/case' in line
        check.run(step)
        groups = [group for group in groups if not list(check.results.glob(f'{operator}-{group}-*.png'))][1:]


def run_tests(check: Check) -> None:
    steps, args = [], check.args
    if 'tests' in args.steps:
        steps.append(test_step(check.work, 110))
    sanitizers = sanitizer_steps(check.work, 110, args.sanitize) if 'sanitize' in args.steps else []
    check.run(*steps, *sanitizers)
    for step in sanitizers:
        read_sanitizer(step, check.work / f'{step.name}.log')


def run_benchmarks(check: Check) -> None:
    steps = check.args.steps
    if 'bench' in steps:
        bench(check, 'deform_conv2d', ['bf16', 'fp16', 'batch-1', 'stages'], 80)
        bench(check, 'deform_roi_pool', ['levels', 'fp16'], 25)
    if 'resnet' in steps:
        check.run(Step('resnet', python(BENCHMARKS / 'resnet.py', '--out', check.results), 40))
    if 'kernels' in steps:
        step = Step('kernels', python(BENCHMARKS / 'kernel_times.py'), 30)
        step.quiet = lambda line: line.startswith('USDT:')  # of torch's profiler
        check.run(step)
    if 'bench' in steps:
        bench(check, 'deform_conv2d', ['new', 'new-batch-1', 'variants'], 45)


def run_deformops(check: Check) -> None:
    """Compile deformops' kernels in many processes, since the benchmark would compile them one by one; then measure."""
    command = python(BENCHMARKS / 'check_deformops.py')
    parts = product(enumerate(('c3', 'c4', 'c5')), range(DEFORMOPS_PARTS))
    check.run(
        *(
            Step(f'deformops {stage} {part}', [*command, f'{i}', '--part', f'{part}', f'{DEFORMOPS_PARTS}'], 400)
            for (i, stage), part in parts
        )
    )
    for tuned in check.triton_cache.rglob('*.autotune.json'):
        tuned.unlink()  # tuned while other processes ran; the compiled kernels are kept
    bench(check, 'deform_conv2d', ['deformops'], 90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        '--steps',
        nargs='+',
        choices=(*STEPS, 'deformops'),
        default=STEPS,
        help='the steps to run; deformops takes minutes to compile',
    )
    parser.add_argument(
        '--site', type=Path, help='folder with mmdcn and its CUDA library; by default the wheel in dist'
    )
    parser.add_argument('--peers', type=Path, help='folder with the wheel of deformops, or with the package')
    parser.add_argument('--limit', type=float, default=300, help='time limit for the whole check in seconds')
    parser.add_argument('--work', type=Path, default=Path('build/gpu-check'), help='folder for temporary files')
    parser.add_argument('--out', type=Path, default=Path('build/gpu-check-results'), help='folder for the results')
    parser.add_argument('--commit', default=commit(), help='the commit that the page names')
    parser.add_argument(
        '--sanitize',
        default='cuda and (float32 or bfloat16) and test_output_and_every_gradient and (everything or several)'
        ' or test_fused_kernels_on_cuda and bfloat16 and 64'
        ' or test_gradients_at_once_on_cuda and bfloat16 and lanes',
        help='tests for the sanitizers, an expression for pytest -k',
    )
    args = parser.parse_args()
    if 'deformops' in args.steps and not (args.peers and args.peers.is_dir()):
        parser.error(f'deformops needs --peers, a folder with its wheel, got {args.peers}')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('stopped'))  # also ends the steps, see Check.run
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    check = Check(args, find_site(args.site, args.work.resolve()))
    shutil.copytree(ROOT / 'tests', check.work / 'tests', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / 'pyproject.toml', check.work)

    check.run(Step('probe', python('-c', PROBE), 60, cwd=check.work))
    run_tests(check)
    run_benchmarks(check)
    if 'deformops' in args.steps:
        run_deformops(check)
    record = check.write()
    print(summary(record), flush=True)
    combined_charts(record, check.out)
    unhappy = [step.name for step in check.steps if step.status != 'passed' and not step.name.startswith('deformops')]
    say(f'did not pass: {", ".join(unhappy)}' if unhappy else 'done')
    sys.exit(bool(unhappy))


def commit() -> str:
    result = subprocess.run(
        ['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or 'unknown'


if __name__ == '__main__':
    main()
