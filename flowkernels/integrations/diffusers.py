"""Diffusers' transformers, told by the names of their classes: where the trunk ends and what the final layer is."""

from torch import nn

from flowkernels._checks import expect
from flowkernels.fuse_head import FinalLayer


def _class_of(module: nn.Module) -> str | None:
    """Which of the transformers known here it is, or is derived from."""
    return next((c.__name__ for c in type(module).__mro__ if c.__name__ in _LAYERS), None)


def final_layer(net: nn.Module, path: str = "") -> FinalLayer | None:
    """The final layer of the first transformer in `net` that is known here; None if there is none."""
    for name, module in net.named_modules(prefix=path):
        if (known := _class_of(module)) is not None:
            return _LAYERS[known](module, f"{name}." if name else "")
    return None


def _expect_module(owner: nn.Module, path: str, prefix: str, kind: type[nn.Module]) -> None:
    module = owner.get_submodule(path)
    name = f"torch.nn.{kind.__name__} as {prefix + path!r}"
    expect(isinstance(module, kind), "velocity", f"a {name}; head= names another one", f"a {type(module).__name__}")


def _norm(layer: nn.LayerNorm) -> dict:
    return dict(norm=layer.eps, norm_weight=layer.weight, norm_bias=layer.bias)


def _continuous(owner: nn.Module, prefix: str, patch: int | None) -> FinalLayer:
    """`norm_out`, an AdaLayerNormContinuous called with the tokens and the embedding; then `proj_out`."""
    for path, kind in (("norm_out.norm", nn.LayerNorm), ("norm_out.linear", nn.Linear), ("proj_out", nn.Linear)):
        _expect_module(owner, path, prefix, kind)
    return FinalLayer(prefix + "norm_out", prefix + "proj_out", _after_continuous, patch=patch)


def _after_continuous(net: nn.Module, layer: FinalLayer, args: tuple, kwargs: dict, also) -> dict:
    z, embedding = (*args, *kwargs.values())
    norm = net.get_submodule(layer.stop)
    scale, shift = norm.linear(norm.silu(embedding).to(z.dtype)).chunk(2, dim=1)
    return dict(z=z, **_norm(norm.norm), scale=scale, shift=shift)


def _sd3(owner: nn.Module, prefix: str) -> FinalLayer:
    return _continuous(owner, prefix, owner.config.patch_size)


def _flux(owner: nn.Module, prefix: str) -> FinalLayer:
    """Its state is packed: the tokens' outputs are the state as they come."""
    return _continuous(owner, prefix, None)


def _dit(owner: nn.Module, prefix: str) -> FinalLayer:
    """`proj_out_1` makes the modulation, the shift first; then come `norm_out` and `proj_out_2`."""
    for path, kind in (("proj_out_1", nn.Linear), ("norm_out", nn.LayerNorm), ("proj_out_2", nn.Linear)):
        _expect_module(owner, path, prefix, kind)
    stop, linear, also = (prefix + path for path in ("norm_out", "proj_out_2", "proj_out_1"))
    return FinalLayer(stop, linear, _after_dit, also=also, patch=owner.patch_size)


def _after_dit(net: nn.Module, layer: FinalLayer, args: tuple, kwargs: dict, also) -> dict:
    shift, scale = also.chunk(2, dim=1)
    return dict(z=args[0], **_norm(net.get_submodule(layer.stop)), scale=scale, shift=shift)


_LAYERS = {"SD3Transformer2DModel": _sd3, "FluxTransformer2DModel": _flux, "DiTTransformer2DModel": _dit}
