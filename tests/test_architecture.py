"""The architecture: who may import whom, where names may stand, and that a new modality costs one row."""

import ast
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from tiny_earth import make_block

import mmearth_ray
from mmearth_ray.modalities import TABLE, ClassCode, Kind, Level, Modality, tasks
from mmearth_ray.model.mpmae import build_mpmae, initialise
from mmearth_ray.objective import Objective
from mmearth_ray.report.reconstruction import build_reconstruction, draw_reconstruction
from mmearth_ray.report.tile import build_tile, draw_tile
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.shards.schema import arrow_schema
from mmearth_ray.shards.stats import normalisation
from mmearth_ray.shards.write import write_shard
from mmearth_ray.stream.prepare import Batch, SampleSpec, valid_mask
from mmearth_ray.stream.source import open_source
from mmearth_ray.train.loop import to_device

ROOT = Path(mmearth_ray.__file__).parent
MAX_FILE, MAX_FUNCTION = 300, 60

# A room (a module or a sub-package of mmearth_ray) imports from itself and from rooms before it.
ROOMS = ("", "errors", "patience", "storage", "copies", "files", "modalities", "progress", "plain", "settings",
         "commands", "cluster", "tasks", "report", "keys", "config", "shards", "stream", "model", "losses", "objective",
         "checkpoints", "experiment", "evaluate", "train", "adapters", "pretrain", "plan", "doctor", "__main__")  # fmt: skip
# Packages that only these modules may import, at any scope; a name ending in a dot stands for a whole room.
ONLY_IN = {
    "ray": ("cluster", "tasks", "shards.build", "stream.pipeline", "train.board", "train.launch", "train.room", "evaluate.",
            "doctor.cluster"),
    "deepspeed": ("train.zero",),
    "sklearn": ("evaluate.",),
    "rasterio": ("evaluate.datasets.convert_geotiffs",),
    "omegaconf": ("settings",),
    "yaml": ("settings",),
    "h5py": ("shards.", "evaluate."),
    "fsspec": ("storage",),
    # the type, where a place can only be remote
    "upath": ("storage", "copies", "shards.read", "stream.shard", "train.commit"),
    "matplotlib": ("report.",),
    "wandb": ("train.trackers",),
    "tensorboard": ("train.trackers",),
    "torch": ("model.", "losses", "objective", "checkpoints.", "experiment", "train.", "adapters.", "evaluate.", "plan.",
              "doctor.needs", "doctor.group"),
}  # fmt: skip
# Rooms that know modalities by their rows only, but for what converts published data sets.
NAMELESS = (
    "stream",
    "model",
    "losses",
    "objective",
    "train",
    "report",
    "experiment",
    "pretrain",
    "config",
    "checkpoints",
    "adapters",
    "doctor",
    "plan",
    "evaluate",
)
CONVERTERS = "evaluate.datasets.convert_"


def module_name(path: Path) -> str:
    """`stream.plan` for mmearth_ray/stream/plan.py, `stream` for its package, "" for mmearth_ray itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


def imports(module: str, *, at_load: bool = False) -> Iterator[str]:
    """Full dotted names that a module imports at any scope, or only those that loading it imports."""
    nodes = list(tree(module).body) if at_load else list(ast.walk(tree(module)))
    unread = {id(inner) for node in nodes if is_for_checkers(node) for inner in ast.walk(node)}
    for node in nodes:
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; write mmearth_ray in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_for_checkers(node: ast.AST) -> bool:
    """Whether this is an `if TYPE_CHECKING:`, which never runs."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def own(name: str) -> str | None:
    """The module of this package behind an imported name, or None where it is not ours."""
    if name.split(".")[0] != "mmearth_ray":
        return None
    inner = name.removeprefix("mmearth_ray").removeprefix(".")
    return inner if inner in SOURCES else inner.rpartition(".")[0]


def loaded_with(module: str) -> set[str]:
    """Top-level packages that loading a module loads, through modules of ours."""
    seen, waiting, packages = {module}, [module], set()
    while waiting:
        for name in imports(waiting.pop(), at_load=True):
            inner = own(name)
            if inner is None:
                packages.add(name.split(".")[0])
            elif inner not in seen:
                seen.add(inner)
                waiting.append(inner)
    return packages


def docstrings(module: str) -> set[int]:
    """Ids of the constants that are docstrings, or strings that describe the attribute above them."""
    return {
        id(node.value) for node in ast.walk(tree(module)) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def test_every_module_belongs_to_a_room() -> None:
    unknown = {name.split(".")[0] for name in SOURCES} - set(ROOMS)
    assert not unknown, f"give {unknown} a place in ROOMS"


@pytest.mark.parametrize("module", SOURCES)
def test_a_room_imports_only_from_rooms_before_it(module: str) -> None:
    here = ROOMS.index(module.split(".")[0])
    for name in imports(module):
        inner = own(name)
        if inner is not None:
            assert inner in SOURCES, f"{module} imports {name}, which is no module"
            assert ROOMS.index(inner.split(".")[0]) <= here, f"{module} imports {inner}"


def test_no_two_modules_import_each_other_by_any_way_round() -> None:
    edges = {module: {inner for name in imports(module) if (inner := own(name)) is not None} for module in SOURCES}
    left = dict(edges)
    while free := [module for module, needs in left.items() if not needs & left.keys() - {module}]:
        left = {module: needs for module, needs in left.items() if module not in free}
    assert not left, f"these import each other: {sorted(left)}"


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_heavy_package_is_imported_only_where_it_may_be(package: str) -> None:
    users = {module for module in SOURCES if any(name.split(".")[0] == package for name in imports(module))}
    allowed = {m for m in SOURCES for a in ONLY_IN[package] if m == a or (a.endswith(".") and m.startswith(a))}
    assert users <= allowed, f"{package} is imported by {sorted(users - allowed)}"


@pytest.mark.parametrize("module", [m for m in SOURCES if m.split(".")[0] in ("model", "losses", "objective", "files")])
def test_model_and_losses_need_neither_ray_nor_omegaconf_nor_arrow_even_indirectly(module: str) -> None:
    assert not loaded_with(module) & {"ray", "omegaconf", "yaml", "pyarrow", "h5py", "matplotlib", "upath"}


@pytest.mark.parametrize("module", [m for m in SOURCES if m.split(".")[0] == "report"])
def test_reports_need_neither_torch_nor_ray_even_indirectly(module: str) -> None:
    assert not loaded_with(module) & {"torch", "ray", "safetensors"}


@pytest.mark.parametrize("module", ["pretrain", "doctor.__main__", "shards.__main__", "evaluate.__main__"])
def test_a_wrong_command_is_answered_without_loading_ray(module: str) -> None:
    assert "ray" not in loaded_with(module)


@pytest.mark.parametrize("module", [m for m in SOURCES if m.split(".")[0] in NAMELESS and not m.startswith(CONVERTERS)])
def test_modality_names_stay_in_the_table(module: str) -> None:
    names, described = {m.name for m in TABLE}, docstrings(module)
    hits = [f"line {node.lineno}: {node.value}" for node in ast.walk(tree(module))
            if isinstance(node, ast.Constant) and node.value in names and id(node) not in described]  # fmt: skip
    assert not hits, f"{module} knows a modality by name: {hits}"


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_says_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(tree(module))


@pytest.mark.parametrize("module", SOURCES)
def test_files_and_functions_fit_the_reader(module: str) -> None:
    lines = len(SOURCES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE, f"{module} has {lines} lines"
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{module}.{node.name} has {length} lines"


INVENTED = (
    Modality(
        name="soil", level=Level.PIXEL, kind=Kind.CONTINUOUS, bands=("moisture", "ph"), dtype="int16", units=("%", "1"),
        bounds=((0, 100), (0, 14)), missing=(-1,), display=("moisture",), source="invented",
    ),
    Modality(
        name="rock", level=Level.PIXEL, kind=Kind.CATEGORICAL, bands=("type",), dtype="uint8", missing=(0,), source="invented",
        classes=(ClassCode(3, "granite"), ClassCode(70, "basalt"), ClassCode(200, "chalk")),
    ),
    Modality(
        name="wind", level=Level.IMAGE, kind=Kind.CONTINUOUS, bands=("east", "north", "up"), dtype="float32",
        units=("m/s",) * 3, bounds=((-90, 90),) * 3, source="invented",
    ),
)  # fmt: skip
SIZE, TILES, PATCH = 16, 6, 8


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A data set of a table with three rows more; the first tile lacks them."""
    rng = np.random.default_rng(0)
    layers = {
        "soil": rng.integers(0, 14, (TILES, 2, SIZE, SIZE)).astype(np.int16),
        "rock": rng.choice(np.array([3, 70, 200], np.uint8), (TILES, 1, SIZE, SIZE)),
        "wind": rng.normal(0, 9, (TILES, 3)).astype(np.float32),
    }
    block, present = make_block(range(TILES), SIZE, TILES), np.arange(TILES) > 0
    block = replace(block, layers=block.layers | layers, present=block.present | dict.fromkeys(layers, present))
    path, table = tmp_path_factory.mktemp("extended"), TABLE + INVENTED
    record = write_shard(path / "part.parquet", [block], SIZE, table=table)
    return Manifest(path, "extended", SIZE, (record,), {}, table=table)


def test_a_row_more_in_the_table_becomes_columns_statistics_heads_loss_and_counts(extended: Manifest) -> None:
    columns = {name for m in INVENTED for name in (*m.columns, m.present_column)}
    assert columns <= set(arrow_schema(SIZE, extended.table).names)
    assert not columns & set(arrow_schema(SIZE).names)
    entry = tasks()[0]
    arrays = {m.name: normalisation(extended.statistics, m) for m in (entry, *INVENTED) if m.kind is Kind.CONTINUOUS}
    assert all(np.isfinite(mean).all() for name, (mean, _) in arrays.items() if name != entry.name)
    spec = SampleSpec(0, SIZE, PATCH, 1, input=entry, targets=INVENTED, normalise_targets=frozenset({"soil"}),
                      known={name: np.isfinite(mean) for name, (mean, _) in arrays.items()})  # fmt: skip
    batch = next(open_source([extended], "", spec).batches([(0, TILES)]))
    full = [3 * PATCH**2 * 2, 3 * PATCH**2, 3]
    assert batch["count"].tolist() == [[0, 0, 0] if tile == "0" else full for tile in batch["id"].tolist()]

    model = build_mpmae(size="atto", in_channels=12, image_size=SIZE, patch_size=PATCH, targets=INVENTED, decoder_width=8)
    initialise(model, "uniform", torch.Generator().manual_seed(0))
    heads = {**model.decoder.pixel_heads, **model.decoder.image_heads}
    assert {name: head.get_parameter("bias").numel() for name, head in heads.items()} == {
        "soil": PATCH**2 * 2, "rock": PATCH**2 * 3, "wind": 3,
    }  # fmt: skip
    objective = Objective(model, input=entry, targets=INVENTED, statistics=arrays, normalise_targets=frozenset({"soil"}))
    tensors = to_device(batch, torch.device("cpu"))
    assert objective.valid_counts(tensors).tolist() == batch["count"].tolist()
    loss, errors = objective(tensors, torch.from_numpy(batch["count"].sum(0)), 1.0)
    loss.backward()
    assert loss.isfinite()
    assert (errors > 0).all()
    for head in heads.values():
        gradient = head.get_parameter("weight").grad
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.norm() > 0

    samples = [sample_of(objective, spec, batch, 1)]
    assert {"soil", "rock", "wind"} <= panels(build_reconstruction(samples, INVENTED, entry, PATCH, "invented"))
    figure = Path(str(extended.directory)) / "reconstruction.png"
    draw_reconstruction(figure, samples, INVENTED, entry, PATCH, "invented")
    assert imread(figure).size


def sample_of(objective: Objective, spec: SampleSpec, batch: Batch, place: int) -> dict[str, Any]:
    """One sample in the form that figures take."""
    visible = np.zeros(spec.patches, bool)
    visible[batch["visible"][place]] = True
    shown = objective.reconstruct(to_device(batch, torch.device("cpu")))
    parts = {part: {name: shown[name][part][place].numpy() for name in shown} for part in ("truth", "prediction", "valid")}
    valid = valid_mask(spec, spec.input, batch)[place]
    return {"id": "1", "visible": visible.reshape(2, 2), "input": batch[spec.input.name][place], "input_valid": valid, **parts}


def panels(figure: Figure) -> set[str]:
    """The first words of every panel's title."""
    return {axes.get_title(loc="left").split(" · ")[0] for axes in figure.axes}


def test_a_row_more_in_the_table_becomes_panels_of_a_tiles_figure(extended: Manifest, tmp_path: Path) -> None:
    names = [name for m in INVENTED for name in m.columns]
    table = pq.read_table(extended.directory / "part.parquet", columns=names).slice(1, 1)
    tile = {}
    for m in INVENTED:
        values = [table[name][0].as_py() for name in m.columns]
        raw = b"".join(values) if m.level is Level.PIXEL else np.array(values, m.dtype).tobytes()
        tile[m.name] = np.frombuffer(raw, m.dtype).reshape(len(values), *((SIZE, SIZE) if m.level is Level.PIXEL else ()))
    titles = panels(build_tile(tile, extended.table, "A tile", {"id": "1"}))
    assert {"soil", "rock", "wind"} <= titles
    draw_tile(tmp_path / "tile.png", tile, extended.table, "A tile", {"id": "1"})
    assert imread(tmp_path / "tile.png").size
