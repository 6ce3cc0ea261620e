"""The command line: every command has its help, and a wrong one is answered without Ray."""

import subprocess
import sys

import pytest

from mmearth_ray.errors import UsageError
from mmearth_ray.evaluate.__main__ import PROGRAM, main


def test_help_names_every_command_and_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in PROGRAM.commands)
    for word in ("fractions=[0.01,0.05,0.1,0.5,1.0]", "seeds=5", "protocols=[knn,logistic,probe,finetune]", "recipe=converged",
                 "normalisation=dataset", "bootstrap=1000", "out=runs/label-efficiency"):  # fmt: skip
        assert word in said


def test_wrong_commands_are_answered_in_one_line() -> None:
    with pytest.raises(UsageError, match="there is no command 'convert'"):
        main(["convert"])
    with pytest.raises(UsageError, match="convert-geobench SET OUT"):
        main(["convert-geobench", "somewhere"])
    with pytest.raises(UsageError, match="did you mean fractions"):
        main(["label-efficiency", "fraction=[1.0]"])
    with pytest.raises(UsageError, match="protocols"):
        main(["label-efficiency", "protocols=[forest]"])


def test_a_wrong_command_is_answered_without_ray_and_torch() -> None:
    code = ("import sys\nfrom mmearth_ray.evaluate.__main__ import main\n"
            "try:\n    main(['label-efficiency', 'seeds=0'])\nexcept ValueError as error:\n    print(error)\n"
            "print([name for name in ('ray', 'torch', 'sklearn') if name in sys.modules])")  # fmt: skip
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["seeds=0: must be at least 1", "[]"]
