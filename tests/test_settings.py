"""Settings: defaults, YAML and arguments in order of precedence, and an error for each way to get them wrong."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from mmearth_ray import settings
from mmearth_ray.errors import UsageError
from mmearth_ray.settings import flatten, key, section


@dataclass(frozen=True)
class Engine:
    power: float = key(1.5, "kilowatts", above=0, below=100)
    cylinders: int | None = key(None, "how many", at_least=1, at_most=12)
    fuel: str = key("diesel", "what it burns", among=("diesel", "petrol"))


@dataclass(frozen=True)
class Boat:
    name: str = key("Ada", "what is painted on the bow")
    ports: list[str] = key(["Kiel"], "where it calls")
    cargo: dict[str, list[str]] = key({}, "goods by hold")
    sail: bool = key(False, "whether it has one")
    engine: Engine = section(Engine)


def load(*arguments: str, files: tuple[Path, ...] = ()) -> Boat:
    return settings.load(Boat, files, arguments)


def error_of(*arguments: str, files: tuple[Path, ...] = ()) -> str:
    with pytest.raises(UsageError) as caught:
        load(*arguments, files=files)
    message = str(caught.value)
    assert "\n" not in message
    return message


def yaml(tmp_path: Path, text: str, name: str = "boat.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_without_files_and_arguments_the_defaults_hold() -> None:
    assert load() == Boat()


def test_later_files_win_over_earlier_ones_and_arguments_over_files(tmp_path: Path) -> None:
    first = yaml(tmp_path, "name: Bea\nengine: {power: 3, cylinders: 4}\nports: [Oslo, Bergen]", "first.yaml")
    second = yaml(tmp_path, "engine:\n  power: 5", "second.yaml")
    boat = load("engine.power=7", "engine.power=8", "sail=true", files=(first, second))
    assert boat == Boat(name="Bea", ports=["Oslo", "Bergen"], sail=True, engine=Engine(power=8, cylinders=4))
    assert load("engine.cylinders=null", files=(first,)).engine.cylinders is None
    assert load("ports=[]", files=(first,)).ports == []


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load(files=(yaml(tmp_path, "# nothing yet\n"), yaml(tmp_path, "", "empty.yaml"))) == Boat()


def test_values_of_a_mapping_are_set_one_by_one() -> None:
    assert load("cargo.fore=[salt,fish]", "cargo.aft=[]").cargo == {"fore": ["salt", "fish"], "aft": []}


def test_the_default_of_a_list_or_mapping_is_not_shared() -> None:
    assert Boat().ports is not Boat().ports
    assert Boat().cargo is not Boat().cargo


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("engine.powr=3", "engine.powr=3: there is no key 'engine.powr'; did you mean engine.power?"),
        ("power=3", "power=3: there is no key 'power'; did you mean engine.power?"),
        ("xyzzy=3", "xyzzy=3: there is no key 'xyzzy'; --help lists the keys"),
        ("engine.power=much", "engine.power=much: engine.power must be of type float; --help tells what it means"),
        ("engine.cylinders=1.5", "engine.cylinders=1.5: engine.cylinders must be of type int | None; --help"),
        ("name=null", "name=null: name must be of type str"),
        ("sail=perhaps", "sail=perhaps: sail must be of type bool"),
        ("ports=Kiel", "ports=Kiel: ports must be of type list[str]"),
        ("ports=[[Kiel]]", "ports=[['Kiel']]: must be a list of plain values"),
        ("cargo.fore=5", "cargo.fore=5: cargo must be of type dict[str, list[str]]"),
        ("engine=5", "engine=5: a section holds keys and values"),
        ("engine.power=0", "engine.power=0.0: must be above 0"),
        ("engine.power=100", "engine.power=100.0: must be below 100"),
        ("engine.power=.inf", "engine.power=inf: must be a finite number"),
        ("engine.power=nan", "engine.power=nan: must be a finite number"),
        ("engine.cylinders=0", "engine.cylinders=0: must be at least 1"),
        ("engine.cylinders=13", "engine.cylinders=13: must be at most 12"),
        ("engine.fuel=coal", "engine.fuel=coal: must be one of diesel, petrol"),
        ("sail", "'sail' is not of the form key=value; --help lists the keys"),
        ("=true", "'=true' is not of the form key=value"),
        ("the sail=true", "'the sail=true' is not of the form key=value"),
        ("ports=[Kiel", "ports=[Kiel: the value cannot be read ("),
        ("name=${nowhere}", "a reference ${...} cannot be resolved: Interpolation key 'nowhere' not found"),
    ],
)
def test_a_wrong_argument_is_answered_with_key_bound_and_remedy(argument: str, message: str) -> None:
    assert error_of(argument).startswith(message)


@pytest.mark.parametrize("argument", ["engine.power=0.001", "engine.power=99.9", "engine.cylinders=1", "engine.cylinders=12"])
def test_bounds_are_inclusive_or_exclusive_as_they_say(argument: str) -> None:
    name, _, value = argument.partition("=")
    assert flatten(load(argument))[name] == float(value)


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.yaml"
    assert error_of(files=(nowhere,)) == f"cannot read the configuration {nowhere}: No such file or directory"
    broken = yaml(tmp_path, "engine: {power: 3")
    assert error_of(files=(broken,)).startswith(f"{broken} is not valid YAML: ")
    listing = yaml(tmp_path, "- name\n- ports\n")
    assert error_of(files=(listing,)) == f"{listing} must hold keys and values, such as `train: {{steps: 100}}`"
    unknown = yaml(tmp_path, "engine: {pwer: 3}")
    assert error_of(files=(unknown,)) == f"{unknown}: there is no key 'engine.pwer'; did you mean engine.power?"
    wrong = yaml(tmp_path, "engine: {power: [3]}")
    assert error_of(files=(wrong,)).startswith(f"{wrong}: engine.power must be of type float")


@pytest.mark.parametrize(
    "boat",
    [
        Boat(),
        Boat(name="null", ports=[], sail=True, engine=Engine(power=1e-8, cylinders=3)),
        Boat(name="split == 'train' and id in [\"1\"]", ports=["1", "true", "a: b", "#"], cargo={"fore": ["x"], "aft": []}),
        Boat(name="", ports=["~", "1e5", " spaced "]),
    ],
)
def test_settings_written_as_yaml_load_to_an_equal_object(boat: Boat, tmp_path: Path) -> None:
    assert load(files=(yaml(tmp_path, settings.to_yaml(boat)),)) == boat


def test_flatten_gives_every_setting_once_by_its_dotted_name() -> None:
    assert settings.flatten(Boat(name="Bea")) == {
        "name": "Bea", "ports": ["Kiel"], "cargo": {}, "sail": False,
        "engine.power": 1.5, "engine.cylinders": None, "engine.fuel": "diesel",
    }  # fmt: skip


def test_help_says_every_key_its_default_and_its_meaning() -> None:
    text = settings.help_text(Boat)
    lines = [line.split("  ") for line in text.splitlines() if line]
    shown = {parts[1]: parts[-1].strip() for parts in lines}
    assert shown == {
        "name=Ada": "what is painted on the bow", "ports=[Kiel]": "where it calls", "cargo={}": "goods by hold",
        "sail=false": "whether it has one", "engine.power=1.5": "kilowatts", "engine.cylinders=null": "how many",
        "engine.fuel=diesel": "what it burns (diesel | petrol)",
    }  # fmt: skip
    assert "\n\n  engine.power" in text  # a section begins after a blank line


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("12_0", "12_0"),
        ("1.10", "1.10"),
        ("true", "true"),
        ("a: [b", "a: [b"),
        ("x=y", "x=y"),
        ("", ""),
        ("'12'", "12"),
        ('"a\\"b"', 'a"b'),
        ("'it''s'", "it's"),
        ("''", ""),
        ("'train' == split", "'train' == split"),
        ("'a' < id < 'b'", "'a' < id < 'b'"),
        ('"a" != "b"', '"a" != "b"'),
        ("'", "'"),
    ],
)
def test_text_given_as_an_argument_is_taken_as_it_stands(given: str, text: str) -> None:
    assert load(f"name={given}").name == text
