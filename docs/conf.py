# SPDX-License-Identifier: Apache-2.0
"""The documentation site. Its source folder is the checkout, so that a link between two pages works in both."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'docs/_ext')]

from mmdcn.version import __version__  # noqa: E402

project = 'mmdcn'
release = version = __version__
copyright = 'the authors of mmdcn'

root_doc = 'docs/index'
include_patterns = ['docs/*.md', 'CHANGELOG.md', 'CONTRIBUTING.md', 'configs/**.md']
exclude_patterns = ['.*', 'build', 'data', 'dist', 'experiments', 'work_dirs', '*.egg-info']

extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
    'sphinx_copybutton',
    'sphinx_design',
    'sphinx-mathjax-offline',
    'api',
    'conformance',
]
myst_enable_extensions = ['colon_fence', 'dollarmath']
myst_heading_anchors = 4
default_role = 'code'

autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'

html_theme = 'pydata_sphinx_theme'
html_title = 'mmdcn'
html_extra_path = ['_root']  # leads from / to the start page
html_show_sourcelink = False
html_static_path = ['_static']
html_css_files = ['site.css']
html_theme_options = {
    'logo': {'text': 'mmdcn'},
    'navbar_center': [],
    'navigation_with_keys': False,
    'globaltoc_maxdepth': 1,
    'secondary_sidebar_items': ['page-toc'],
    'footer_start': ['copyright'],
    'footer_end': [],
}
html_sidebars = {'docs/index': [], '**': ['globaltoc.html']}
