# SPDX-License-Identifier: Apache-2.0
"""Data loading for training and test runs."""

from mmdcn.datasets.loading import ImageError, LoadImageFromFile

__all__ = ['ImageError', 'LoadImageFromFile']
