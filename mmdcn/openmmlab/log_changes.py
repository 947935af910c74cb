# SPDX-License-Identifier: Apache-2.0
"""Log what a switch has changed."""

from mmengine.logging import print_log


def log_changes(heading: str, items: list[str]) -> None:
    """Log a list, unless it is empty."""
    if items:
        print_log('\n  '.join([f'{heading}:', *items]), logger='current')
