"""`sightline hf -- COMMAND`: the name in every process, and a command that otherwise runs as if started without it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sightline.cli import hf
from sightline.cli import main as cli

REGISTERED = """
import os, sys
from transformers import Trainer  # imports the models in the middle of its own import
from transformers import AttentionInterface, AttentionMaskInterface
names = "sightline" in AttentionInterface().valid_keys(), "sightline" in AttentionMaskInterface().valid_keys()
print("rank", os.environ.get("RANK"), *names, flush=True)
"""
WAITS = "import sys; print([type(finder).__name__ for finder in sys.meta_path].count('RegisterAfterModels'))"
CUSTOMIZED = "import sys; print('customized', __name__, sys.modules['sitecustomize'].MARK)"


def run(*command: str, path: str | Path | None = None, **settings) -> subprocess.CompletedProcess:
    """Run `sightline hf -- COMMAND` in a process; `path` stands first on its PYTHONPATH."""
    paths = os.pathsep.join(filter(None, [str(path or ""), os.environ.get("PYTHONPATH", ""), os.getcwd()]))
    words = [sys.executable, "-m", "sightline", "hf", "--", *command]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, **settings)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help(argv, capsys) -> None:
    assert cli.run(["hf", *argv]) == 0
    assert capsys.readouterr().out.startswith("usage: sightline hf -- COMMAND")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--", "no-such-tool", "train"], "command 'no-such-tool' is neither on PATH nor in "),
        (["--"], "needs a command, such as: sightline hf -- trl sft --help"),
        (["--verbose", "--", "trl"], "unknown option '--verbose'; sightline hf takes none"),
    ],
)
def test_wrong_input_ends_with_2(argv, message, capsys) -> None:
    assert cli.run(["hf", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_tool_beside_the_interpreter_is_found(monkeypatch) -> None:
    """The environment of Sightline need not be activated."""
    monkeypatch.setenv("PATH", "")
    name = Path(sys.executable).name
    assert hf.find_program([name]) == str(Path(sys.executable).parent / name)


def test_startup_is_first_and_keeps_the_rest() -> None:
    assert hf.startup_environment({"PYTHONPATH": "/a:/b"}) == {"PYTHONPATH": f"{hf.STARTUP}{os.pathsep}/a:/b"}
    assert hf.startup_environment({"HOME": "/h"}) == {"HOME": "/h", "PYTHONPATH": str(hf.STARTUP)}
    assert hf.startup_environment({"PYTHONPATH": ""})["PYTHONPATH"] == str(hf.STARTUP)  # no empty entry: that is "."


def test_standard_streams_and_exit_code_are_those_of_the_command() -> None:
    program = "import sys; print(sys.stdin.read().upper()); print('problem', file=sys.stderr); sys.exit(7)"
    done = run(sys.executable, "-c", program, input="typed")
    assert (done.returncode, done.stdout, done.stderr) == (7, "TYPED\n", "problem\n")


@pytest.mark.skipif(os.name != "posix", reason="Windows has no exec")
def test_signals_reach_the_command() -> None:
    """The command has replaced the process of `sightline`, so its number and its end are those of the command."""
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    words = [sys.executable, "-m", "sightline", "hf", "--", sys.executable, "-c", program]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and int(process.stdout.readline()) == process.pid
    process.send_signal(signal.SIGTERM)  # SIGINT is ignored where the tests run in the background of a shell
    process.communicate(timeout=50)
    assert process.returncode == -signal.SIGTERM


def test_the_name_is_registered_in_two_processes(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(REGISTERED)
    done = run("torchrun", "--nproc-per-node", "2", str(script))
    assert sorted(done.stdout.splitlines()) == ["rank 0 True True", "rank 1 True True"], done.stderr


def test_the_name_is_registered_in_a_process_and_in_those_it_spawns(tmp_path) -> None:
    script = tmp_path / "script.py"
    body = "\n".join(f"    {line}" for line in REGISTERED.strip().splitlines())
    script.write_text(
        f"import multiprocessing\n\ndef work():\n{body}\n\nif __name__ == '__main__':\n    work()\n"
        "    process = multiprocessing.get_context('spawn').Process(target=work)\n    process.start(); process.join()\n"
    )
    done = run(sys.executable, str(script))
    assert done.stdout.splitlines() == ["rank None True True"] * 2, done.stderr


def test_a_process_without_models_imports_nothing_of_sightline() -> None:
    program = "import sys, transformers; print([name for name in sys.modules if name.startswith('sightline')])"
    assert run(sys.executable, "-c", program).stdout == "[]\n"


def test_the_hidden_sitecustomize_runs_under_its_own_name(tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text("MARK = 3\n" + CUSTOMIZED)
    done = run(sys.executable, "-c", "import sitecustomize; print(sitecustomize.MARK)", path=tmp_path)
    assert done.stdout.splitlines()[-2:] == ["customized sitecustomize 3", "3"], done.stderr


def test_an_error_of_the_hidden_sitecustomize_is_reported_and_does_no_harm(tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text("raise RuntimeError('broken on its own')")
    done = run(sys.executable, "-c", WAITS, path=tmp_path)
    assert "broken on its own" in done.stderr and done.stdout == "1\n"


def test_nested_commands(tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text("MARK = 4\n" + CUSTOMIZED)
    nested = (sys.executable, "-m", "sightline", "hf", "--", sys.executable, "-c", WAITS)
    done = run(*nested, path=tmp_path)
    assert done.stdout.splitlines()[-2:] == ["customized sitecustomize 4", "1"], done.stderr


def test_an_isolated_interpreter_runs_without_the_name() -> None:
    assert run(sys.executable, "-I", "-c", WAITS).stdout == "0\n"


def test_an_environment_without_sightline_gets_a_warning(tmp_path) -> None:
    """The models of transformers still import there; a model that asks for the name is refused by transformers."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "other")], check=True)
    package = tmp_path / "modules" / "transformers"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "modeling_utils.py").write_text("DEFINED = 5")
    interpreter = str(tmp_path / "other" / "bin" / "python")
    environment = hf.startup_environment(os.environ | {"PYTHONPATH": str(package.parent)})
    program = "import transformers.modeling_utils as models; print(models.DEFINED)"
    done = subprocess.run([interpreter, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout == "5\n" and f"started {interpreter}, which does not find sightline; install it" in done.stderr
