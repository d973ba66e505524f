# ruff: noqa: F401, others import them from here
"""Torch's private names, all that the package uses: here they are looked at when a new torch comes out.

Tried on torch 2.6, 2.13 and 2.14 on the CPU; `scripts/test_versions` tries the ends of the range.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch._C import (
    DisableTorchFunction,  # in a block no function mode or subclass is asked
    DisableTorchFunctionSubclass,  # the same, of subclasses alone
)
from torch._C import _functorch as functorch  # which tensors live inside a transform of torch.func, and what is in them
from torch._C import _get_function_stack_at as function_mode  # by its number
from torch._C import _get_tracing_state as tracing_state  # of torch.jit.trace, None outside
from torch._C import _len_torch_dispatch_stack as number_of_modes  # of dispatch modes that are on
from torch._C import _len_torch_function_stack as number_of_function_modes
from torch._C._functorch import peek_interpreter_stack as innermost_transform  # of torch.func, None outside
from torch._higher_order_ops.while_loop import while_loop  # a loop that stays one in a compiled graph
from torch._ops import OpOverload  # what a dispatch mode is called with
from torch.autograd import _profiler_enabled as profiler_enabled  # by torch.profiler
from torch.nn.modules import module as of_all_modules  # GLOBAL_HOOKS are in it
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # of any number of dimensions
from torch.nn.modules.dropout import _DropoutNd as Dropout  # of any number of dimensions
from torch.utils import _device as of_devices  # CURRENT_DEVICE says it sooner than torch.get_default_device()
from torch.utils._python_dispatch import (
    TorchDispatchMode,  # sees every operation
    is_traceable_wrapper_subclass,  # a tensor made of others, which it names
)
from torch.utils._pytree import (
    tree_flatten,  # nested containers and their leaves
    tree_leaves,  # the leaves alone
    tree_map,  # the same containers of other leaves
    tree_unflatten,  # the containers that a list of leaves was
)

raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # of a device's number; None in a torch without CUDA
# whether the backward that runs keeps its graph, to go through it again
graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
DelayedError = torch._C._functions.DelayedError  # a function whose backward raises
without_memory = torch.Tensor._make_wrapper_subclass  # a tensor of a subclass, of a shape and without values
add_each_ = torch._foreach_add_  # numbers to the tensors of a list, as arguments of a launch
scale_each_ = torch._foreach_mul_  # the tensors of a list, by a number or a tensor of one
lerp_each_ = torch._foreach_lerp_  # towards the tensors of another list, by a number
norms_of_each = torch._foreach_norm  # of a list's tensors, `[]` each
CALL_MODULE = nn.Module._call_impl  # what calls a forward with its hooks; a frame of it is a module that runs

# Attributes of a module: what runs before and after its forward, backward, and what it holds
FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
HELD = ("_parameters", "_buffers", "_modules")
# Of a sparse tensor: the methods that give the tensors it is made of
COMPRESSED = {
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values")),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values")),
}
SPARSE_PARTS = {torch.sparse_coo: ("_indices", "_values"), **COMPRESSED}
NOT_IN_STATE = "_non_persistent_buffers_set"  # names of buffers that no state dict has
COMPILED_CALL = "_compiled_call_impl"  # of `Module.compile()`, in the place of CALL_MODULE
OF_COMPILER = (COMPILED_CALL, "_is_torch_compile")  # that the compiler leaves on a module
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")  # of all modules, in `of_all_modules`
COMPILED = "torch._dynamo.eval_frame.OptimizedModule"  # the class of torch.compile's wrapper
COMPILED_MODULE = "_orig_mod"  # its attribute with what is compiled
TYPED_STORAGE = "_typed_storage"  # of a tensor: a method that takes its memory

# Functions that a file of torch.save calls
REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
REBUILD_TENSOR = tuple(f"torch._utils._rebuild_tensor_v{i}" for i in (2, 3))

# Attributes that are read where they are needed: by a function each would cost more than it does
ATTRIBUTES = {
    "_apply": "overridden in a module, it moves more than parameters with `.to(device)`",
    "_buffers": "of a module, by name",
    "_cdata": "where the storage of a tensor is, also of one without memory",
    "_compiled_call_impl": "COMPILED_CALL, None where a module is not compiled",
    "_current_level": "of torch.autograd.forward_ad: -1 outside of dual_level",
    "_forward_pre_hooks": "of a module, by number",
    "_indices": "of a sparse tensor, coalesced or not",
    "_is_zerotensor": "whether a tensor is zeros without memory, as forward-mode differentiation makes them",
    "_modules": "of a module, by name",
    "_parameters": "of a module, by name",
    "_schema": "of an operation: its name, its arguments and which of them it writes to",
    "_values": "of a sparse tensor, coalesced or not",
    "_version": "how often the memory of a tensor was written to by operations",
}


def compiler_errors() -> tuple[type[Exception], ...]:
    """What torch.compile raises for a function that it does not take whole. Not imported before: it takes a second."""
    from torch._dynamo import exc

    return exc.TorchDynamoException, *([exc.FailOnRecompileLimitHit] if hasattr(exc, "FailOnRecompileLimitHit") else [])


def modes_are_on() -> bool:
    """Whether a mode sees what is made now, and may hand on something else: of dispatch, or of functions, but for a
    default device's."""
    n = number_of_function_modes()
    others = n > 0 and any(type(function_mode(i)) is not of_devices.DeviceContext for i in range(n))
    return others or number_of_modes() > 0


def untraced(f: Callable) -> Callable:
    """f, which torch.compile leaves as it is, with all that f calls. The compiler is not imported for that."""

    @functools.wraps(f)
    def run(*args, **kwargs):
        if "torch._dynamo" not in sys.modules:
            return f(*args, **kwargs)
        return torch.compiler.disable(f)(*args, **kwargs)

    return run


_STANCE = threading.Lock()
_eager: list = []  # for each context that is open the stance, of the first alone


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """A context in which what torch.compile has made runs as it was written. Without, under a dispatch mode, it would
    run so for ever after. The stance is the process's: of several threads the first sets it and the last resets it."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with _STANCE:
        _eager.append(None if _eager else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _STANCE:
            if len(_eager) == 1:
                _eager[0].__exit__(None, None, None)
                _eager.clear()
            else:
                _eager.pop()


def float32_products() -> tuple[str, ...]:
    """How precise float32's products are to be, "highest" or "ieee" where nothing was asked for. Set for one backend
    apart (since torch 2.9), after which torch raises where it is asked about all, it is told for each."""
    try:
        return (torch.get_float32_matmul_precision(),)
    except RuntimeError:
        each = torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        return tuple({"none": "ieee"}.get(b.fp32_precision, b.fp32_precision) for b in each)


def float32_convolutions():
    """The same of cuDNN's convolutions: a text, or a boolean before torch 2.9."""
    cudnn = torch.backends.cudnn
    return cudnn.conv.fp32_precision if hasattr(cudnn, "conv") else cudnn.allow_tf32


def keeps_parametrized() -> bool:
    """Inside torch.nn.utils.parametrize.cached(), which keeps weights as they were at their first use."""
    return bool(getattr(nn.utils.parametrize, "_cache_enabled", 0))


def store_of(group) -> tuple | None:
    """(the store that the processes of a group met by, the group's timeout); None where torch does not tell."""
    from torch import distributed as dist

    find = getattr(dist.distributed_c10d, "_get_process_group_store", None)
    if find is None:
        return None
    store = find(group)
    for device in dist.get_backend_config(group).split(","):
        options = getattr(group._get_backend(torch.device(device.split(":")[0])), "options", None)
        if hasattr(options, "_timeout"):
            return store, options._timeout
    return store, store.timeout
