# SPDX-License-Identifier: Apache-2.0
"""What a run needs around its data."""

from mmdcn.datasets.loading import LoadImageFromFile

__all__ = ['LoadImageFromFile']
