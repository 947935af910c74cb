# SPDX-License-Identifier: Apache-2.0
"""Support for torch's tracers: a layer is one node for torch.fx, and an explained error for torch.jit.script."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

from torch import fx


class OneNode:
    """A base class that makes a layer one node for torch.fx, like the layers of torch; it must be the first base.

    The graph then runs the layer itself, with its hooks, its checks and its types under autocast. Quantization in FX
    graph mode leaves the layer in floating point.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if 'forward' in vars(cls):
            cls.forward = _as_one_node(cls.forward)  # type: ignore[attr-defined]

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse to be compiled; torch.jit.script calls this method of each module of a model.

        Raises:
            NotImplementedError: Always; the message names alternatives.
        """
        raise NotImplementedError(
            f'torch.jit.script cannot compile the Python of mmdcn.{type(self).__name__}: use torch.jit.trace, whose '
            'file loads in every process that has imported mmdcn, or torch.export, or torch.compile'
        )


def _as_one_node(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def one_node(self: Any, *args: Any, **kwargs: Any) -> Any:
        proxy = next((each for each in (*args, *kwargs.values()) if isinstance(each, fx.Proxy)), None)
        if proxy is None:
            return forward(self, *args, **kwargs)
        tracer: Any = proxy.tracer
        if self is tracer.root:
            raise NotImplementedError(
                f'torch.fx treats mmdcn.{type(self).__name__} as one node, so it cannot trace the layer on its own: '
                'trace nn.Sequential(layer)'
            )
        return tracer.create_proxy('call_module', tracer.path_of_module(self), args, kwargs)

    return one_node
