"""The gate before a compiled step: equal steps pass, others are refused and leave no trace.

Compilers are stood in for by functions that take the place of inductor's, so that the tests need neither minutes nor g++.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_objective import PATCH, SIDE, TARGETS, make_batch, make_objective

from mmearth_ray.errors import DataError
from mmearth_ray.keys import Optimizer
from mmearth_ray.objective import Objective
from mmearth_ray.train import engine as engine_module
from mmearth_ray.train.compiled import compile_checked
from mmearth_ray.train.engine import DDPEngine

# Dynamo itself does what PyTorch warns of: it makes instances of autograd functions and looks at gradients of inner tensors.
pytestmark = pytest.mark.filterwarnings("ignore")


def _check(objective: Objective, backend: Any, precision: str = "fp32", side: int = SIDE) -> None:
    batch = make_batch(side=side)
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


def test_every_image_size_is_compiled_and_checked_for_itself() -> None:
    seen: list[int] = []

    def faithful(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        seen.extend({e.shape[-1] for e in examples if torch.is_tensor(e) and e.dtype is torch.uint16})
        return graph.forward

    objective = make_objective(TARGETS[:1], others=(2 * PATCH,))
    _check(objective, faithful, side=SIDE)
    _check(objective, faithful, side=2 * SIDE)
    assert list(dict.fromkeys(seen)) == [SIDE, 2 * SIDE]
    known = len(seen)
    _check(objective, faithful, side=SIDE)
    assert len(seen) == known


def test_the_engine_checks_each_size_when_it_first_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, checked = make_objective(others=(2 * PATCH,)), list[int]()
    monkeypatch.setattr(engine_module, "compile_checked", lambda o, batch, *_, **__: checked.append(o.patch_size(batch)))
    engine = DDPEngine(objective, Optimizer(), torch.device("cpu"), compiled=True)
    for side in (SIDE, SIDE, 2 * SIDE, SIDE, 2 * SIDE):
        batch = make_batch(side=side)
        engine.backward(batch, objective.valid_counts(batch).sum(0), 1.0, last=True)
        engine.step(1e-3)
    assert checked == [PATCH, 2 * PATCH]
