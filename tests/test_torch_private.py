"""Private names of torch stand in flowkernels/runtime/torch_private.py alone."""

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import flowkernels
from flowkernels.runtime import torch_private

ROOT = Path(flowkernels.__file__).parent
HERE = Path(torch_private.__file__)
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != HERE]

OWNERS = (torch, Tensor, nn.Module, torch._C, torch.autograd, forward_ad, torch.cuda, torch.utils, torch.compiler)
OWNERS += (nn.modules.module, nn.modules.dropout, nn.modules.batchnorm, nn.utils.parametrize, torch.UntypedStorage)
OWNERS += (torch.ops.aten.add.Tensor,)
PRIVATE = {name for owner in OWNERS for name in dir(owner)} | set(vars(nn.Module())) | {"_dynamo", "_orig_mod"}
PRIVATE = {name for name in PRIVATE if name.startswith("_") and not name.startswith("__")}


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def privates(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, name) of what code names of torch's that is private, attributes of its own objects aside."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            known = node.attr in PRIVATE and node.attr not in torch_private.ATTRIBUTES
            found += [(node.lineno, ast.unparse(node))] * known
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value if " " not in node.value else ""
            found += [(node.lineno, text)] * (text in PRIVATE or (text.startswith("torch.") and is_private(text)))
    return [(line, name) for line, name in found if is_private(name)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_file_names_a_private_of_torch(path):
    assert privates(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("from torch.autograd import _profiler_enabled as on", "torch.autograd._profiler_enabled"),
        ("import torch._dynamo", "torch._dynamo"),
        ("torch._foreach_add_(a, b)", "torch._foreach_add_"),
        ("getattr(module, '_backward_hooks')", "_backward_hooks"),
        ("module._backward_hooks", "module._backward_hooks"),
        ("KIND = 'torch._utils._rebuild_tensor_v2'", "torch._utils._rebuild_tensor_v2"),
    ],
)
def test_what_counts_as_a_private_of_torch(code, name):
    assert (1, name) in privates(ast.parse(code))


def test_every_attribute_is_there_and_used():
    used = {n.attr for path in FILES for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    assert torch_private.ATTRIBUTES.keys() <= PRIVATE
    assert torch_private.ATTRIBUTES.keys() <= used


def test_what_runs_uncompiled_is_compiled_after_the_last_of_several_threads():
    """The first to begin is not the last to end."""
    runs = []

    def compiler(graph, inputs):
        runs.append(1)
        return graph

    first, second = torch_private.uncompiled(), torch_private.uncompiled()
    double = torch.compile(lambda x: x + x, backend=compiler)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    double(torch.ones(2))
    assert not runs
    second.__exit__(None, None, None)
    double(torch.ones(2))
    assert runs
