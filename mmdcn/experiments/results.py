# SPDX-License-Identifier: Apache-2.0
"""The results of finished runs, in one JSON file per dataset that can be committed."""

import json
from pathlib import Path
from typing import TypedDict

from mmdcn.utils.files import replacing


class Result(TypedDict):
    """The sha256 of a run's settings, and its metrics under the names of MMEngine."""

    settings: str
    metrics: dict[str, float]


class Results:
    """The results in a folder: `DATA.json` contains `{CONFIG: {'seed_K': Result}}` and is read only once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, dict[str, dict[str, Result]]] = {}

    def path(self, data: str) -> Path:
        """Return the file of a dataset."""
        return self.folder / f'{data}.json'

    def find(self, data: str, config: str, seed: int) -> Result | None:
        """Return the result of a run, or None if the run is not finished."""
        return self._of(data).get(config, {}).get(f'seed_{seed}')

    def keep(self, data: str, config: str, seed: int, result: Result) -> None:
        """Add the result of a run, and write the file."""
        of_data = self._of(data)
        of_data.setdefault(config, {})[f'seed_{seed}'] = result
        with replacing(self.path(data)) as file:
            file.write_text(json.dumps(of_data, indent=2, sort_keys=True) + '\n')

    def _of(self, data: str) -> dict[str, dict[str, Result]]:
        if data not in self._read:
            path = self.path(data)
            self._read[data] = json.loads(path.read_text()) if path.exists() else {}
        return self._read[data]
