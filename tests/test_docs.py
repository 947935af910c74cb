# SPDX-License-Identifier: Apache-2.0
"""Every Python block of the documentation runs."""

import re
from pathlib import Path

import pytest
from mmengine.config import Config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
BLOCKS = [
    pytest.param(block, id=f'{page.name}-{number}')
    for page in PAGES
    for number, block in enumerate(re.findall(r'^```python\n(.*?)^```', page.read_text(), re.DOTALL | re.MULTILINE))
]


@pytest.mark.parametrize('block', BLOCKS)
def test_a_block_of_code_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write a file
    if '_base_' in block:
        assert Config.fromstring(block, '.py').model.type == 'FasterRCNN'
    else:
        exec(compile(block, 'block', 'exec'), {})


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_a_link_of_a_page_leads_to_a_file(page: Path) -> None:
    targets = re.findall(r'\]\((?!https?:)([^)#]+)\)', page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_a_test_that_a_page_names_exists(page: Path) -> None:
    sources = ''.join(path.read_text() for path in (ROOT / 'tests').glob('*.py'))
    names = re.findall(r'`(test_[a-z0-9_]+)`', page.read_text())
    assert [name for name in names if f'def {name}(' not in sources] == []
