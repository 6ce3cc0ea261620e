"""The engines: the same gradients, losses and weights whichever holds the model, in whatever layout.

Two groups of processes run all cases, in an environment without a compiler, where a killed compilation has left its lock.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_cases import RATE, Case, furthest, losses, result, run_cases
from groups import in_a_group

from mmearth_ray.config import load
from mmearth_ray.errors import UsageError
from mmearth_ray.train.parts import fill

ENGINES = ("ddp", "zero1", "zero2", "zero3")
STEPS = 5
REFERENCE = Case("ddp", steps=STEPS)
PARITY = {
    1: [REFERENCE, Case("zero1", 2, STEPS), Case("zero2", 4, STEPS), Case("zero3", 2, STEPS)],
    2: [
        Case("ddp", 4, STEPS),
        Case("zero1", 1, STEPS),
        Case("zero2", 2, STEPS),
        Case("zero3", 4, STEPS, kept_whole=500, live=10**8),
    ],
}
CLIPPED = ("train.clip=0.5",)
DECAYED = ("optimizer.weight_decay=0.9",)
TWICE = ("train.activation_checkpointing=true",)
LOW = ("train.precision=bf16",)
OFFLOADED = ("train.offload=true",)
LOW_TOLERANCE = 2e-2
CHOICES = {
    CLIPPED: ("ddp", "zero1", "zero3"),
    DECAYED: ("ddp", "zero3"),
    TWICE: ("ddp", "zero3"),
    LOW: ("ddp", "zero3"),
    OFFLOADED: ("zero2", "zero3"),
}
LOW_CLIPPED = (*CLIPPED, *LOW)
TOGETHER = {
    ("zero1", LOW_CLIPPED): LOW_CLIPPED,
    ("zero3", LOW_CLIPPED): LOW_CLIPPED,
    ("zero3", (*OFFLOADED, *CLIPPED)): CLIPPED,
    ("zero2", (*OFFLOADED, *LOW)): LOW,
    ("zero3", (*OFFLOADED, *LOW)): LOW,
    ("zero3", (*TWICE, *LOW)): LOW,
    ("zero3", (*OFFLOADED, *TWICE, *LOW_CLIPPED)): LOW_CLIPPED,
}
"""What is asked for at once, and the part of it that has to give the same under ddp."""
COMBINED = [Case("ddp", 2, settings=LOW_CLIPPED), *(Case(engine, 2, settings=settings) for engine, settings in TOGETHER)]
CHOSEN = [Case(engine, 2, settings=settings) for settings, engines in CHOICES.items() for engine in engines]
SPOILT = [Case(engine, 2, steps=3, spoilt=2) for engine in ENGINES]
SKIPS = ("train.nonfinite=skip",)
SKIPPING = {
    SKIPS: ENGINES,
    (*SKIPS, "train.clip=0.5", "train.precision=bf16"): ("ddp", "zero3"),
    (*SKIPS, "train.offload=true"): ("zero2", "zero3"),
}
SKIPPED = [Case(engine, 2, 4, settings, spoilt=2) for settings, engines in SKIPPING.items() for engine in engines]
LEFT_OUT = [replace(case, spoilt=0, left_out=2) for case in SKIPPED]
HUGE = [
    Case(engine, steps=3, settings=settings, spoilt=2, by=by)
    for by, settings, engines in ((1e25, (), ENGINES), (1e25, CLIPPED, ("ddp", "zero2")), (1e25, OFFLOADED, ("zero2", "zero3")),
                                  (2e38, (), ("ddp", "zero1")))
    for engine in engines
]  # fmt: skip
SAVED = {
    1: [Case("ddp", saves="ddp"), Case("zero3", 2, saves="zero3")],
    2: [Case("zero2", 2, saves="zero2"), Case("zero3", 2, settings=LOW, saves="low")],
}
RESUMED = {
    2: [Case("zero3", 2, resumes="ddp/step-00000002"), Case("zero1", resumes="zero3/step-00000002")],
    1: [Case("ddp", resumes="zero2/step-00000002"), Case("zero2", resumes="zero2/step-00000002")],
}
LOWERED = {
    2: [Case(engine, 2, settings=LOW, resumes="ddp/step-00000002") for engine in ("ddp", "zero3")],
    1: [Case(engine, 2, resumes="low/step-00000002") for engine in ("ddp", "zero3")],
}
"""Those that go on in another precision."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what all cases found is."""
    found = tmp_path_factory.mktemp("engines")
    extensions = found / "extensions"
    for operator in ("deepspeed_shm_comm", "cpu_adam", "fused_adam"):
        (extensions / operator).mkdir(parents=True)
        (extensions / operator / "lock").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(found / "nothing"))
        patch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
        in_a_group(1, found, run_cases, found, [*PARITY[1], *SAVED[1], *HUGE])
        both = [*PARITY[2], *RESUMED[2], *SAVED[2], *LOWERED[2], *CHOSEN, *COMBINED, *SPOILT, *SKIPPED, *LEFT_OUT]
        in_a_group(2, found, run_cases, found, both)
        in_a_group(1, found, run_cases, found, [*RESUMED[1], *LOWERED[1]])
    return found


@pytest.mark.parametrize(("workers", "case"), [(w, c) for w, cases in PARITY.items() for c in cases], ids=str)
def test_gradients_and_losses_are_the_same_under_every_engine_and_layout(workers: int, case: Case, folder: Path) -> None:
    found, expected = result(folder, workers, case), result(folder, 1, REFERENCE)
    gradients = [value / 0.1 for value in expected["first"].values()]  # exp_avg after one step, over 1 - beta1
    assert torch.nn.utils.get_total_norm(gradients) > 1
    distance, name = furthest(found["first"], expected["first"])
    assert distance <= 1e-4, name
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5, abs=1e-5)
    assert losses(expected)[-1] < losses(expected)[0]
    assert found["counts"] == [float(STEPS)] * len(found["counts"])


def test_gradients_are_clipped_only_where_asked_and_alike(folder: Path) -> None:
    expected = result(folder, 2, Case("ddp", 2, settings=CLIPPED))
    norm = torch.nn.utils.get_total_norm([value / 0.1 for value in expected["first"].values()])
    assert float(norm) == pytest.approx(0.5, rel=1e-3)
    for engine in ("zero1", "zero3"):
        found = result(folder, 2, Case(engine, 2, settings=CLIPPED))
        assert furthest(found["first"], expected["first"])[0] <= 1e-4, engine
        assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
        unclipped = result(folder, 2, next(case for case in PARITY[2] if case.engine == engine))
        whole = torch.nn.utils.get_total_norm([value / 0.1 for value in unclipped["first"].values()])
        assert whole > 10


def test_every_group_keeps_its_weight_decay(folder: Path) -> None:
    expected = result(folder, 2, Case("ddp", 2, settings=DECAYED))
    plain = result(folder, 2, Case("zero3", 2, settings=CLIPPED))
    found = result(folder, 2, Case("zero3", 2, settings=DECAYED))
    assert found["groups"] == [(RATE, 0.9, 0.9, 0.95), (RATE, 0.0, 0.9, 0.95)]
    for name, value in expected["weights"].items():
        assert torch.allclose(found["weights"][name], value, atol=1e-5), name
    plain = result(folder, 2, Case("zero3", 2, settings=CLIPPED))["weights"]
    moved = {name for name, value in expected["weights"].items() if not torch.allclose(value, plain[name], atol=1e-6)}
    assert any(name.endswith("grn.gamma") for name in moved)  # of one dimension, as all parameters are once they are in parts


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_that_is_not_finite_changes_nothing_from_then_on(engine: str, folder: Path) -> None:
    found = result(folder, 2, Case(engine, 2, steps=3, spoilt=2))
    assert [step["applied"] for step in found["steps"]] == [True, False, False]
    assert all(value.isfinite().all() for value in found["weights"].values())
    expected = result(folder, 2, Case("ddp", 2, steps=3, spoilt=2))
    for name, value in expected["weights"].items():
        assert torch.allclose(found["weights"][name], value, atol=1e-6), name
    assert found["counts"] == [1.0] * len(found["counts"])


@pytest.mark.parametrize("case", SKIPPED, ids=str)
def test_a_step_that_is_skipped_is_as_if_it_had_not_been_made(case: Case, folder: Path) -> None:
    found, expected = result(folder, 2, case), result(folder, 2, replace(case, spoilt=0, left_out=2))
    assert [step["applied"] for step in found["steps"]] == [True, False, True, True]
    assert [step["loss"] for step in found["steps"] if step["applied"]] == losses(expected)
    assert found["counts"] == expected["counts"] == [3.0] * len(found["counts"])
    for name, value in expected["weights"].items():
        assert torch.equal(found["weights"][name], value), name


@pytest.mark.parametrize("case", HUGE, ids=str)
def test_gradients_of_any_size_are_treated_alike(case: Case, folder: Path) -> None:
    """The square of 1e25 is no float32.  Neither is the norm of several times 2e38, which they are themselves."""
    found = result(folder, 1, case)
    expected = result(folder, 1, replace(case, engine="ddp", settings=case.settings if case.settings == CLIPPED else ()))
    assert [step["applied"] for step in found["steps"]] == [True, case.by == 1e25, case.by == 1e25]
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    for name, value in expected["weights"].items():
        assert value.isfinite().all()
        assert torch.allclose(found["weights"][name], value, atol=1e-5), name


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_computing_activations_twice_changes_nothing(engine: str, folder: Path) -> None:
    found, plain = result(folder, 2, Case(engine, 2, settings=TWICE)), result(folder, 1, REFERENCE)
    assert furthest(found["first"], plain["first"])[0] <= 1e-4
    assert losses(found) == pytest.approx(losses(plain)[:2], rel=1e-5)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_offloading_changes_nothing(engine: str, folder: Path) -> None:
    found, plain = result(folder, 2, Case(engine, 2, settings=OFFLOADED)), result(folder, 1, REFERENCE)
    assert furthest(found["first"], plain["first"])[0] <= 1e-4
    assert losses(found) == pytest.approx(losses(plain)[:2], rel=1e-5)


def test_low_precision_is_that_of_autocast_and_weights_stay_float32(folder: Path) -> None:
    expected, plain = result(folder, 2, Case("ddp", 2, settings=LOW)), result(folder, 1, REFERENCE)
    assert losses(expected) != losses(plain)[:2]
    assert losses(expected) == pytest.approx(losses(plain)[:2], rel=1e-2)
    found = result(folder, 2, Case("zero3", 2, settings=LOW))
    assert losses(found) == pytest.approx(losses(expected), rel=2e-3)
    assert {value.dtype for value in found["weights"].values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in found["weights"].values())


@pytest.mark.parametrize(("engine", "settings"), TOGETHER, ids=str)
def test_choices_work_together(engine: str, settings: tuple[str, ...], folder: Path) -> None:
    found = result(folder, 2, Case(engine, 2, settings=settings))
    expected = result(folder, 2, Case("ddp", 2, settings=TOGETHER[engine, settings]))
    low = LOW[0] in settings
    assert furthest(found["first"], expected["first"])[0] <= (LOW_TOLERANCE if low else 1e-4)
    assert losses(found) == pytest.approx(losses(expected), rel=2e-3 if low else 1e-5)
    norm = float(torch.nn.utils.get_total_norm([value / 0.1 for value in found["first"].values()]))
    assert norm == pytest.approx(0.5, rel=1e-3) if CLIPPED[0] in settings else norm > 10
    assert {value.dtype for value in found["weights"].values()} == {torch.float32}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_checkpoint_goes_on_in_another_precision(workers: int, folder: Path) -> None:
    """Weights and moments are float32 in either: what goes on is as near to the other engine as if all were in one."""
    plain = losses(result(folder, 1, REFERENCE))[2:4]
    ddp, zero3 = (result(folder, workers, case) for case in LOWERED[workers])
    assert losses(zero3) == pytest.approx(losses(ddp), rel=2e-3 if workers == 2 else 1e-5)
    assert losses(ddp) != plain
    assert losses(ddp) == pytest.approx(plain, rel=1e-2)
    for found in (ddp, zero3):
        assert found["counts"] == [4.0] * len(found["counts"])
        assert {value.dtype for value in found["weights"].values()} == {torch.float32}


@pytest.mark.parametrize(("workers", "case"), [(w, c) for w, cases in RESUMED.items() for c in cases], ids=str)
def test_a_checkpoint_goes_on_under_another_engine(workers: int, case: Case, folder: Path) -> None:
    found, expected = result(folder, workers, case), result(folder, 1, REFERENCE)
    assert losses(found) == pytest.approx(losses(expected)[2:4], rel=1e-5)
    assert found["counts"] == [4.0] * len(found["counts"])
    if case.engine != "ddp":
        assert [decay for _, decay, *_ in found["groups"]] == [0.05, 0.0]
        assert found["own_counts"] == len(found["counts"]) == 2


def test_nothing_was_compiled_and_ddp_never_loads_deepspeed(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "extensions").rglob("*") if path.is_file()) == ["lock"] * 3
    assert not result(folder, 1, REFERENCE)["deepspeed"]
    assert result(folder, 1, PARITY[1][1])["deepspeed"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.engine=zero2", "model.image_size=32", "model.image_sizes=[32,64]"], "train.engine=ddp or model.image_sizes"),
        (["train.engine=zero1", "train.compile=true"], "train.compile=true does not work with train.engine=zero1"),
        (["train.activation_checkpointing=true", "train.compile=true"], "set train.activation_checkpointing=false"),
        (["train.offload=true"], "train.offload=true needs train.engine=zero2 or zero3; it is ddp"),
        (["train.offload=true", "train.engine=zero1"], "it is zero1"),
        (["train.offload=true", "train.engine=zero3", "train.gpus=false"], "is for GPUs"),
        (["train.clip=-1"], "train.clip=-1"),
    ],
)
def test_what_does_not_fit_an_engine_is_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        load(arguments)
    assert "\n" not in str(caught.value)


def test_filling_takes_values_by_name() -> None:
    module = torch.nn.Linear(2, 1)
    fill(module, {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])})
    assert np.allclose(module.weight.detach(), [[1.0, 2.0]])
    assert float(module.bias.detach()) == 3.0
