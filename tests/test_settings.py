"""Settings: defaults, YAML and arguments in order of precedence, and an error for each way to get them wrong."""

import sys
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
    assert load("ports=Kiel", files=(first,)).ports == ["Kiel"]


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
        ("enigne.power=3", "enigne.power=3: there is no key 'enigne.power'; did you mean engine.power?"),
        ("xyzzy=3", "xyzzy=3: there is no key 'xyzzy'; --help lists the keys"),
        ("engine.power=much", "engine.power=much: engine.power must be a number; --help tells what it means"),
        ("engine.cylinders=1.5", "engine.cylinders=1.5: engine.cylinders must be a whole number or null; --help"),
        ("name=null", "name=null: name must be text"),
        ("sail=perhaps", "sail=perhaps: sail must be true or false"),
        ("ports=7", "ports=7: ports must be a list of text"),
        ("ports=[[Kiel]]", "ports=[['Kiel']]: must be a list of plain values"),
        ("cargo.fore=5", "cargo.fore=5: cargo must be lists of text by name"),
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
        ("ports=/data/a: b", "ports=/data/a: b: ports must be a list of text"),
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
    assert error_of(files=(wrong,)).startswith(f"{wrong}: engine.power must be a number")


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


@dataclass(frozen=True)
class Plain:
    number: int = key(3, "a whole number")
    maybe: int | None = key(4, "one or none")
    real: float = key(0.5, "a number", at_most=1e6)
    flag: bool = key(False, "yes or no")
    text: str = key("a", "text")
    note: str | None = key("b", "text or none")
    words: list[str] = key(["c"], "several texts")
    numbers: list[int] = key([1], "several whole numbers")
    reals: list[float] = key([1.0], "several numbers")


NUMBERS = ["0", "-0", "7", "-7", "+7", "007", "010", "1_000", "0x10", "1.0", "-2.50", ".5", "1.", "1e3", "1e+3", "1:30"]
WORDS = ["true", "True", "false", "yes", "no", "On", "y", "null", "Null", "~", "", "a", "fp32", "56/8", "a-b", "-a", "a.b",
         "e3", "inf", ".inf", "nan", "2020-01-01", "a b", "a: b", "a:b", "#", "'a'", '"a"', "'", "$a", "${a}", "=", "<<",
         " 7", "7 ", "é", "*a", "&a", "!a", "@a", "`a", "|", ">", "%a", "{}", "?", "-"]  # fmt: skip
TEXTS = [*NUMBERS, *WORDS, *(f"[{text}]" for text in NUMBERS + WORDS), "[1,2]", "[ 1 , 2 ]", "[a,b]", "[a,]", "[,a]", "[a,,b]",
         "[[1]]", "[1", "1]", "[1,x]", "[56/8, 112/16]", "[atto,true]", "[1.10,a]"]  # fmt: skip


def plain_or_none(argument: str) -> Plain | None:
    try:
        return settings.load_plain(Plain, [argument])
    except UsageError:
        return None


@pytest.mark.parametrize("name", flatten(Plain()))
def test_what_is_read_without_omegaconf_is_what_omegaconf_reads(name: str) -> None:
    read = {text: plain for text in TEXTS if (plain := plain_or_none(f"{name}={text}")) is not None}
    assert len(read) >= 2
    for text, plain in read.items():
        assert plain == settings.load(Plain, [], [f"{name}={text}"]), text


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("number=12", 12), ("number=-3", -3), ("maybe=null", None), ("maybe=", None), ("maybe=5", 5), ("real=2", 2.0),
        ("real=1e-3", 0.001), ("real=-1.5", -1.5), ("flag=true", True), ("flag=false", False), ("text=12_0", "12_0"),
        ("text=", ""), ("note=null", None), ("note=x=y", "x=y"), ("words=[56/8, 112/16]", ["56/8", "112/16"]), ("words=[]", []),
        ("words=[atto,fp32]", ["atto", "fp32"]), ("numbers=[1, -2]", [1, -2]), ("reals=[1,2.5]", [1.0, 2.5]),
    ],
)  # fmt: skip
def test_plain_values_are_read_without_omegaconf(argument: str, value: object) -> None:
    found = flatten(settings.load_plain(Plain, [argument]))[argument.partition("=")[0]]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("engine.powr=3", "engine.powr=3: there is no key 'engine.powr'; did you mean engine.power?"),
        ("engine=3", "engine=3: a section holds keys and values"),
        ("engine.power=much", "engine.power=much: engine.power must be a number; --help tells what it means; without"),
        ("sail=perhaps", "sail=perhaps: sail must be true or false"),
        ("cargo=x", "cargo=x: cargo must be lists of text by name"),
        ("engine.power=100", "engine.power=100.0: must be below 100"),
        ("engine.fuel=coal", "engine.fuel=coal: must be one of diesel, petrol"),
        ("sail", "'sail' is not of the form key=value; --help lists the keys"),
    ],
)
def test_a_wrong_argument_is_answered_alike_without_omegaconf(argument: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings.load_plain(Boat, [argument])
    assert str(caught.value).startswith(message)
    assert error_of(argument).startswith(message.removesuffix("; without"))


def test_sections_are_reached_without_omegaconf() -> None:
    arguments = ["engine.power=7", "engine.power=8", "engine.cylinders=4", "name=Bea", "ports=[Oslo,Bergen]"]
    assert settings.load_plain(Boat, arguments) == load(*arguments)


def test_load_reads_plain_arguments_where_omegaconf_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    assert load("engine.power=7", "ports=[Oslo]") == Boat(ports=["Oslo"], engine=Engine(power=7))


def test_an_item_of_the_wrong_type_is_answered_with_the_name_of_its_list() -> None:
    with pytest.raises(UsageError, match=r"^numbers=\[a\]: numbers must be a list of whole numbers; --help tells what"):
        settings.load(Plain, [], ["numbers=[a]"])
