# SPDX-License-Identifier: Apache-2.0
"""Find mmdcn and its peers for gpu_check.py."""

import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def unpack(wheel: Path, folder: Path) -> Path:
    """Unpack a wheel, and return the folder."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def find_site(site: Path | None, work: Path) -> Path:
    """Return the folder with mmdcn: `site`, or if it is None, the unpacked wheel that `make wheel` has left in dist."""
    if site is not None:
        if not list(site.glob('mmdcn/_C_cuda*.so')):
            raise SystemExit(f'--site {site} must hold mmdcn/_C_cuda.abi3.so, the CUDA library, but does not')
        return site.resolve()
    wheels = list((ROOT / 'dist').glob('mmdcn-*.whl'))
    if len(wheels) != 1:
        raise SystemExit(f'dist must hold one wheel of mmdcn, got {len(wheels)}: run `make wheel`, or pass --site')
    return unpack(wheels[0], work / 'site')


def unpack_peers(folder: Path | None, target: Path) -> list[Path]:
    """Unpack the wheels of a folder, and return the folder of the packages: the folder itself if it has no wheels."""
    if folder is None or not folder.is_dir():
        return []
    wheels = sorted(folder.glob('*.whl'))
    for wheel in wheels:
        unpack(wheel, target)
    return [target if wheels else folder.resolve()]
