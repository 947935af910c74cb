# SPDX-License-Identifier: Apache-2.0
"""Test every checkpoint of mmdcn's own, and compare its average precision with that of its metafile."""

import json
import subprocess
import sys
from collections.abc import Iterator
from math import nan
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from mmdcn import zoo
from mmdcn.engine.launch import LaunchError, run
from mmdcn.utils.tables import print_table

METRICS = {'box AP': 'coco/bbox_mAP', 'mask AP': 'coco/segm_mAP'}
TOLERANCE = 0.1  # points; what a test prints is rounded to that


def measure(model: zoo.Model) -> dict[str, float]:
    """Run tools/test.py on a model by its name, and give what it measures, in points."""
    test = Path(__file__).with_name('test.py')
    with TemporaryDirectory() as folder:
        command = [sys.executable, test, model.config, model.name, '--work-dir', folder]
        result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if result.returncode != 0:
            raise LaunchError(f'{model.name} could not be tested:\n{result.stderr.strip()}')
        (file,) = Path(folder).glob('*/*.json')
        metrics = json.loads(file.read_text())
    return {name: 100 * metrics[key] for name, key in METRICS.items() if key in metrics}


def compare(expected: dict[str, float], seen: dict[str, float]) -> Iterator[tuple[str, float, float, bool]]:
    """Return the name of each metric, both figures, and whether they agree; a missing one is NaN, which does not."""
    for name in sorted(expected.keys() | seen.keys()):
        pair = [metrics.get(name, nan) for metrics in (expected, seen)]
        yield name, *pair, abs(pair[0] - pair[1]) < 1.01 * TOLERANCE


def main() -> None:
    models = [model for model in zoo.models() if model.sha256]
    if not models:
        raise LaunchError('no checkpoint of mmdcn is shipped yet: no model of a metafile has a SHA256')
    rows = []
    wrong = 0
    for model in tqdm(models):
        for name, expected, seen, agrees in compare(model.metrics, measure(model)):
            wrong += not agrees
            rows.append((model.name, name, f'{expected:.1f}', f'{seen:.1f}', 'yes' if agrees else 'NO'))
    print_table(('model', 'metric', 'expected', 'seen', 'agrees'), rows)
    if wrong:
        raise LaunchError(f'{wrong} of {len(rows)} figures differ from those of the metafiles')


if __name__ == '__main__':
    sys.exit(run(main))
