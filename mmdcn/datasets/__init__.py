# SPDX-License-Identifier: Apache-2.0
"""What a run needs around its data."""

from mmdcn.datasets.loading import ImageError, LoadImageFromFile

__all__ = ['ImageError', 'LoadImageFromFile']
