# SPDX-License-Identifier: Apache-2.0
"""Load images from files, and report damaged ones."""

from typing import Any

from mmcv.transforms import loading

from mmdcn.registry import TRANSFORMS


class ImageError(OSError):
    """An image file that is missing or damaged; the message names it."""


@TRANSFORMS.register_module()
class LoadImageFromFile(loading.LoadImageFromFile):
    """mmcv's LoadImageFromFile, but with an error for truncated images that names the file.

    OpenCV, mmcv's default, fills the missing part of a truncated image with grey and reports no error. Pillow raises
    one, so it is the default here.

    Raises:
        ImageError: If the file is missing or is not a complete image.
    """

    def __init__(self, *args: Any, imdecode_backend: str = 'pillow', **kwargs: Any) -> None:
        super().__init__(*args, imdecode_backend=imdecode_backend, **kwargs)

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Load `results['img_path']` into `results['img']`, [H, W, 3], BGR, 0 to 255."""
        try:
            return super().transform(results)
        except (
            OSError,
            SyntaxError,
            AssertionError,
        ) as error:  # Pillow raises SyntaxError for a broken PNG
            raise ImageError(
                f'{results["img_path"]} could not be read as an image ({error}). If the file is there, it is '
                'truncated or damaged: make or download it again.'
            ) from error
