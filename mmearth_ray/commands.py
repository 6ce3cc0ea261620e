"""A command with subcommands: `python -m PACKAGE NAME PLACE ... key=value ...`, its help and its errors."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmearth_ray.errors import UsageError
from mmearth_ray.settings import help_text, load
from mmearth_ray.storage import is_remote, locate


@dataclass(frozen=True)
class Command:
    """One subcommand: its positional arguments, what it does, its settings, and the function that runs it.

    An argument is a path or, if it is among `urls`, the URL of an object store as well.
    Settings and function are looked up when they are needed, so that the help of one command loads no other.
    """

    places: tuple[str, ...]
    meaning: str
    settings: Callable[[], type]
    run: Callable[[list[Any], Any], int]
    urls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """The subcommands of one program."""

    name: str
    meaning: str
    commands: Mapping[str, Command]

    def run(self, arguments: list[str]) -> int:
        """Run one subcommand and return its exit code.  Raises UsageError for a wrong command, argument or setting."""
        if not arguments or arguments[0] in ("--help", "-h", "help"):
            print(self.overview())
            if not arguments:
                raise UsageError(f"name a command: {', '.join(self.commands)}")
            return 0
        name, *rest = arguments
        if name not in self.commands:
            raise UsageError(f"there is no command '{name}'; the commands are {', '.join(self.commands)}")
        if any(argument in ("--help", "-h") for argument in rest):
            print(self.describe(name))
            return 0
        command = self.commands[name]
        places = rest[: len(command.places)]
        wrong = [given for given in places if given.startswith("-") or not given or re.match(r"[a-z_.]+=", given)]
        if len(places) < len(command.places) or wrong:
            raise UsageError(f"usage: {self.usage(name)}")
        options = load(command.settings(), (), rest[len(places) :])
        located = [locate(text, name) for name, text in zip(command.places, places, strict=True)]
        for name, place in zip(command.places, located, strict=True):
            if is_remote(place) and name not in command.urls:
                raise UsageError(f"{name}={place}: must be a path on this machine")
        return command.run(located, options)

    def usage(self, name: str) -> str:
        return " ".join([self.name, name, *self.commands[name].places, "[key=value ...]"])

    def overview(self) -> str:
        """Help for the whole: every subcommand, then the keys of each."""
        width = max(12, max(map(len, self.commands)) + 2)
        parts = [self.meaning, *(f"  {name:<{width}}{command.meaning}" for name, command in self.commands.items())]
        return "\n".join([*parts, "", *("\n" + self.describe(name) for name in self.commands)])

    def describe(self, name: str) -> str:
        """Help for one subcommand: its usage, its meaning, its keys with defaults."""
        command = self.commands[name]
        return f"usage: {self.usage(name)}\n{command.meaning}\n\n{help_text(command.settings())}"
