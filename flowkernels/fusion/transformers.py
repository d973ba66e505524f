"""The final layers of diffusers' transformers, known by class name and structure.

A further family of diffusers is an entry of `FAMILIES`: the name of its class, which is looked for in modules of
`diffusers` alone, and a function (module, prefix of its path) that says by a `FinalLayer` where its trunk ends and
which modules come after, and, by that layer's `arguments`, what `linear_euler` takes of them. `fuse_head` proves the
rest. The docstring of `fuse_head` and docs/diffusers.md name the families. A test is a small network of random weights,
in tests/test_fuse_head.py. What touches its pipelines beyond that, such as a scheduler, is in integrations/.

Nothing of diffusers is imported before a network of such a class is met.
"""

from torch import nn

from flowkernels._checks import expect
from flowkernels.fusion.final_layer import FinalLayer


def _class_of(module: nn.Module) -> type[nn.Module] | None:
    """Which of the transformers known here it is, or is derived from."""
    kinds = (c for c in type(module).__mro__ if c.__module__.startswith("diffusers."))
    return next((c for c in kinds if c.__name__ in FAMILIES), None)


def final_layer(net: nn.Module, path: str = "") -> FinalLayer | None:
    """The final layer of the first transformer in `net` that is known here; None if there is none."""
    for name, module in net.named_modules(prefix=path):
        if (known := _class_of(module)) is not None:
            layer = FAMILIES[known.__name__](module, f"{name}." if name else "")
            own = type(module).forward is known.forward and "forward" not in vars(module)
            expected = f"a {known.__name__} with its class's forward; head={layer.linear!r} fuses the Linear alone"
            expect(own, "velocity", expected, f"{type(module).__name__} with a forward of its own")
            return layer
    return None


def _norm(layer: nn.LayerNorm) -> dict:
    return dict(norm=layer.eps, norm_weight=layer.weight, norm_bias=layer.bias)


def _continuous(owner: nn.Module, prefix: str, patch: int | None) -> FinalLayer:
    """`norm_out`, an AdaLayerNormContinuous called with the tokens and the embedding; then `proj_out`."""
    from diffusers.models.normalization import AdaLayerNormContinuous

    stop, linear = prefix + "norm_out", prefix + "proj_out"
    computed = (stop, AdaLayerNormContinuous), (stop + ".norm", nn.LayerNorm)
    return FinalLayer(stop, linear, _after_continuous, patch=patch, computed=computed)


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
    stop, linear, also = (prefix + path for path in ("norm_out", "proj_out_2", "proj_out_1"))
    computed = ((stop, nn.LayerNorm),)
    return FinalLayer(stop, linear, _after_dit, also=also, patch=owner.patch_size, computed=computed)


def _after_dit(net: nn.Module, layer: FinalLayer, args: tuple, kwargs: dict, also) -> dict:
    shift, scale = also.chunk(2, dim=1)
    return dict(z=args[0], **_norm(net.get_submodule(layer.stop)), scale=scale, shift=shift)


FAMILIES = {"SD3Transformer2DModel": _sd3, "FluxTransformer2DModel": _flux, "DiTTransformer2DModel": _dit}
