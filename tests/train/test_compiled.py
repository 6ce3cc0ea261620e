"""The gate before a compiled step: equal steps pass, others are refused and leave no trace.

Compilers are stood in for by functions that take the place of inductor's, so that the tests need neither minutes nor g++.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_objective import make_batch, make_objective

from mmearth_ray.errors import DataError
from mmearth_ray.objective import Objective
from mmearth_ray.train.compiled import compile_checked

# Dynamo itself does what PyTorch warns of: it makes instances of autograd functions and looks at gradients of inner tensors.
pytestmark = pytest.mark.filterwarnings("ignore")


def _check(objective: Objective, backend: Any, precision: str = "fp32") -> None:
    batch = make_batch()
    totals = objective.valid_counts(batch).sum(0)
    compile_checked(objective, batch, totals, 1.0, precision=precision, autocast=nullcontext, backend=backend)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def _faithful(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
    return graph.forward


def _careless(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
    """Rounds what every graph gives to 8 bits."""

    def run(*arguments: Any) -> Any:
        return [
            r.bfloat16().to(r.dtype) if torch.is_tensor(r) and r.is_floating_point() else r for r in graph.forward(*arguments)
        ]

    return run


def _broken(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
    raise RuntimeError("no compiler here\nand a long tale")


def test_a_compiled_step_that_is_the_same_passes_and_stays_compiled() -> None:
    objective = make_objective()
    names = [name for name, _ in objective.named_parameters()]
    _check(objective, _faithful)
    assert objective._compiled_call_impl is not None
    assert [name for name, _ in objective.named_parameters()] == names
    assert all(p.grad is None for p in objective.parameters())


def test_a_compiled_step_that_differs_is_refused() -> None:
    objective = make_objective()
    with pytest.raises(DataError, match=r"train.compile=true changes the step: the loss by .*use train.compile=false"):
        _check(objective, _careless)
    assert objective._compiled_call_impl is None


def test_a_compiler_that_fails_ends_in_one_line() -> None:
    objective = make_objective()
    with pytest.raises(DataError, match=r"train.compile=true failed: .*; use train.compile=false") as caught:
        _check(objective, _broken)
    assert "\n" not in str(caught.value)
    assert objective._compiled_call_impl is None
