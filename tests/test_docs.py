# SPDX-License-Identifier: Apache-2.0
"""The documentation is true: its code runs and prints what the page says, and its links lead somewhere."""

import os
import re
import subprocess
from pathlib import Path

import conformance
import numpy as np
import pytest
from code_blocks import find_blocks, run_blocks
from mmengine.config import Config
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md']
PAGES += [*sorted((ROOT / 'docs').glob('*.md')), *sorted(ROOT.glob('configs/**/*.md'))]
CHANGELOG = ROOT / 'CHANGELOG.md'
each_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.parametrize('page', [page for page in PAGES if any(find_blocks(page))], ids=lambda page: page.name)
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    (tmp_path / 'images/tutorial').mkdir(parents=True)
    for block, printed in run_blocks(page):
        assert block.printed in (None, printed), f'the block on line {block.line}'
        if '_base_' in block.code:
            assert Config.fromstring(block.code, '.py').model.type == 'FasterRCNN'
    for drawn in tmp_path.glob('images/**/*.png'):  # fonts differ between versions of matplotlib, by little
        pixels, committed = (
            np.asarray(Image.open(path).convert('L'), dtype=float)
            for path in (drawn, page.parent / drawn.relative_to(tmp_path))
        )
        assert pixels.shape == committed.shape
        assert abs(pixels - committed).mean() < 4


@each_page
def test_a_link_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target, anchor in re.findall(r'\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)', page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r'^#+ (.*)$', file.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings]


@pytest.mark.parametrize('page', PAGES[1:], ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_to_markdown_leads_to_a_page_of_the_site(page: Path) -> None:
    """Sphinx warns of any other, and `make docs` fails."""
    targets = re.findall(r'\]\((?!https?:)([^)#\s]+\.md)', page.read_text())
    assert [target for target in targets if (page.parent / target).resolve() not in (*PAGES[1:], CHANGELOG)] == []


@each_page
def test_a_line_of_a_page_is_short_enough_to_compare(page: Path) -> None:
    lines = [line for line in page.read_text().splitlines() if len(line) > 120]
    assert [line for line in lines if not line.startswith('|')] == []  # the row of a table cannot be broken


@each_page
def test_a_test_that_a_page_names_exists(page: Path) -> None:
    sources = ''.join(path.read_text() for path in (ROOT / 'tests').glob('*.py'))
    names = re.findall(r'`(test_[a-z0-9_]+)`', page.read_text())
    assert [name for name in names if f'def {name}(' not in sources] == []


def test_the_conformance_page_lists_every_test() -> None:
    lines = list(conformance.tables())
    for path in sorted((ROOT / 'tests').glob('test_*.py')):
        names = re.findall(r'^def (test_\w+)', path.read_text(), re.MULTILINE)
        assert names == [promise.test for promise in conformance.find_promises(path)]
        assert any(f'(../tests/{path.name})' in line for line in lines)


def test_the_name_of_a_test_has_at_most_70_characters() -> None:
    promises = [promise for path in (ROOT / 'tests').glob('test_*.py') for promise in conformance.find_promises(path)]
    assert [promise.test for promise in promises if len(promise.test) > 70] == []


def test_a_promise_is_the_name_of_a_test_as_prose_and_its_docstring(tmp_path: Path) -> None:
    file = tmp_path / 'test_x.py'
    file.write_text('def test_a_nan_offset_gives_nan_on_cuda(device):\n    """Of two\n    lines.\n\n    More."""\n')
    promise = conformance.Promise(
        'test_a_nan_offset_gives_nan_on_cuda', 'A NaN offset gives NaN on CUDA', 'Of two lines.', 'CPU, CUDA'
    )
    assert list(conformance.find_promises(file)) == [promise]


@each_page
def test_a_script_that_a_page_names_exists(page: Path) -> None:
    scripts = re.findall(r'\b(?:tools|benchmarks|demo|tests)/[a-z0-9_/]+\.(?:py|sh)\b', page.read_text())
    assert [script for script in scripts if not (ROOT / script).exists()] == []


def test_ci_runs_the_lint_and_the_tests(tmp_path: Path) -> None:
    """With the targets `lint`, `test` and `test-mmcv` of make."""
    (tmp_path / 'make').write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / 'make').chmod(0o755)
    env = os.environ | {'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
    result = subprocess.run([ROOT / '.ci/run'], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ['lint', 'test', 'test-mmcv']
