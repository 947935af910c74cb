# SPDX-License-Identifier: Apache-2.0
"""Inference with the models of the zoo."""

from typing import Any

import mmdet.apis
from mmengine.config import Config

from mmdcn.checkpoints import zoo


class DetInferencer(mmdet.apis.DetInferencer):
    """mmdet's inferencer, which accepts the names of mmdcn's model zoo.

    Args:
        model: The name of a model in the zoo; or, together with `weights`, a config or the path of one.
        weights: The path or address of a checkpoint; by default that of the model in the zoo.
        device: The device of the detector; by default a GPU if there is one.

    The other arguments, and those of a call, are mmdet's.

    Raises:
        mmdcn.zoo.ZooError: If the zoo has no such model, or its weights cannot be found or fetched.
    """

    def _load_model_from_metafile(self, model: str) -> tuple[Config, str]:
        found = zoo.find(model)
        return Config.fromfile(found.config), found.weights

    def _get_transform_idx(self, pipeline_cfg: list[dict[str, Any]], name: tuple[str | type, ...]) -> int:
        # mmdet 3.3.0 looks for the transform that loads images only by its name without a scope.
        return super()._get_transform_idx(pipeline_cfg, (*name, 'mmdcn.LoadImageFromFile'))
