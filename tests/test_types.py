"""Every public argument and result has a type; what a checker makes of them is tests/typed_use.py's."""

import inspect
import re
from pathlib import Path

import pytest

import flowkernels as fk
from flowkernels.integrations import diffusers, host_loops, k_diffusion


def public():
    """(name, function) of all that a caller calls."""
    for name in fk.__all__:
        thing = getattr(fk, name)
        if inspect.isclass(thing):
            for member, found in vars(thing).items():
                function = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
                if inspect.isfunction(function) and (not member.startswith("_") or member == "__init__"):
                    yield f"{name}.{member}", function
        elif inspect.isroutine(thing):
            yield name, thing
    yield from (
        (name, getattr(module, name)) for module in (diffusers, host_loops, k_diffusion) for name in module.__all__
    )


@pytest.mark.parametrize(("name", "function"), list(public()), ids=[name for name, _ in public()])
def test_arguments_and_results_have_types(name, function):
    signature = inspect.signature(function)
    arguments = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    assert [p.name for p in arguments if p.annotation is p.empty] == []
    assert signature.return_annotation is not signature.empty or name.endswith(".__init__")


def test_every_public_name_is_checked():
    text = (Path(__file__).with_name("typed_use.py")).read_text()
    assert set(re.findall(r"\bfk\.(\w+)", text)) >= set(fk.__all__)


def test_nothing_is_ignored_as_a_whole():
    for path in [*Path(fk.__file__).parent.rglob("*.py"), Path(__file__).with_name("typed_use.py")]:
        blanket = re.search(r"#\s*(type:\s*ignore|pyright:\s*(ignore|basic|off))(?!\[)", path.read_text())
        assert blanket is None, path
