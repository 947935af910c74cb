# SPDX-License-Identifier: Apache-2.0
"""Test every checkpoint published by mmdcn, and compare its average precision with its metafile."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from math import nan
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from mmdcn import zoo
from mmdcn.engine.launch import LaunchError, check_data, read_config, run
from mmdcn.utils.tables import print_table

METRICS = {'box AP': 'coco/bbox_mAP', 'mask AP': 'coco/segm_mAP'}
TOLERANCE = 0.1  # points; test results are rounded to this


def measure(model: zoo.Model) -> dict[str, float]:
    """Run tools/test.py on a model by its name, and return its metrics in points."""
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
    """Yield the name of each metric, both values, and whether they agree; a missing value is NaN and does not agree."""
    for name in sorted(expected.keys() | seen.keys()):
        pair = [metrics.get(name, nan) for metrics in (expected, seen)]
        yield name, *pair, abs(pair[0] - pair[1]) < 1.01 * TOLERANCE


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    models = [model for model in zoo.models() if model.sha256]
    if not models:
        raise LaunchError('no model of a metafile has a SHA256, so there is no checkpoint to test')
    for model in models:
        check_data(read_config(model.config), 'test')
    rows = []
    wrong = 0
    for model in tqdm(models, unit='model'):
        for name, expected, seen, agrees in compare(model.metrics, measure(model)):
            wrong += not agrees
            rows.append((model.name, name, f'{expected:.1f}', f'{seen:.1f}', 'yes' if agrees else 'NO'))
    print_table(('model', 'metric', 'expected', 'seen', 'agrees'), rows)
    if wrong:
        raise LaunchError(f'{wrong} of {len(rows)} metrics differ from the metafiles')


if __name__ == '__main__':
    sys.exit(run(main))
