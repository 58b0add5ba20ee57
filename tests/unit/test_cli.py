import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import megarlx
from megarlx.cli import COMMANDS, main

REPOSITORY = Path(__file__).resolve().parents[2]
SPARSE = """\
model = {vocab_size = 97, hidden_size = 64, heads = 4, layers = 2, intermediate_size = 128}
training = {steps = 9, sequence_length = 32, sequences_per_step = 8}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(SPARSE)
    return path


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_version_and_help_are_told(capsys):
    for option, said in (
        ("--version", f"megarlx {megarlx.__version__}\n"),
        ("--help", "commands:"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([option])
        assert ended.value.code == 0
        assert said in capsys.readouterr().out


def test_help_lists_every_command_and_each_command_has_help(capsys):
    assert main([]) == 2
    listed = capsys.readouterr().out
    width = max(map(len, COMMANDS))
    for name, command in COMMANDS.items():
        assert f"  {name:<{width}}  {command.summary}" in listed
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert command.summary.split(",")[0] in capsys.readouterr().out


def test_unknown_command_names_the_nearest(capsys):
    assert main(["docter"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "megarlx: unknown command 'docter'; did you mean 'doctor'? "
        f"Commands: {', '.join(COMMANDS)}\n"
    )
    assert main(["zzz"]) == 2
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["config", "--help"]])
def test_help_imports_neither_torch_nor_numpy(arguments):
    code = (
        "import sys; sys.argv[0] = 'megarlx'\n"
        "from megarlx.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    ended = python("-c", code, *arguments)
    assert ended.stdout.splitlines()[-1] == "[]", ended.stderr


def test_doctor_needs_nothing_but_the_standard_library():
    code = (
        "import sys, importlib\n"
        "importlib.import_module('megarlx.doctor.command')\n"
        "names = {m.split('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(sorted(n for n in names if not n.startswith(('_', 'sitecustom'))))"
    )
    assert python("-S", "-c", code).stdout == "['megarlx']\n"


def test_config_prints_the_resolved_json(config, capsys):
    assert (
        main(["config", str(config), "--set", "training.steps=7", "--set", "layout.tensor=2"]) == 0
    )
    resolved = json.loads(capsys.readouterr().out)
    assert (resolved["training"]["steps"], resolved["layout"]["tensor"]) == (7, 2)
    assert resolved["model"]["head_dim"] == 16


def test_config_tells_all_errors_on_stderr_without_a_traceback(config):
    ended = python(
        "-m", "megarlx", "config", str(config), "--set", "a=1", "--set", "training.steps=x"
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 2
    assert "Traceback" not in ended.stderr


def test_help_config_prints_every_key_as_plain_text_where_no_terminal_is():
    ended = python("-m", "megarlx", "config", "--help-config")
    assert ended.returncode == 0
    assert "training.sequences_per_microbatch = 1   an integer of at least 1\n" in ended.stdout
    assert "\x1b" not in ended.stdout


@pytest.mark.parametrize("arguments", [["config"], ["config", "a.toml", "--help-config"]])
def test_config_wants_a_file_or_help_but_not_both(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "CONFIG.toml" in capsys.readouterr().err


def test_reader_that_goes_away_is_no_error_message(config):
    command = f"{sys.executable} -m megarlx config --help-config | head -1"
    ended = subprocess.run(
        ["sh", "-c", command],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout.count("\n") == 1
    assert ended.stderr == ""
