"""The command ``coded-torch``: what it prints, where, and its exit codes."""

import os
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure

import coded_torch
from coded_torch.cli.main import main
from coded_torch.codes import SplineCode
from coded_torch.demo.lenet5 import digits
from coded_torch.evaluation.compare import Comparison, Row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("fly", "invalid choice: 'fly'"),
        ("demo --wings 2", "unrecognized arguments: --wings 2"),
        ("demo --num-data two", "--num-data: invalid int value: 'two'"),
        ("demo --num-data 0", "--num-data: must be at least 1, got 0"),
        ("demo --num-data 241 --num-workers 600", "--num-data must be at most 240, the digits"),
        ("demo --num-data 7 --num-workers 6", "--num-data must be at most 6, the workers, got 7"),
        ("demo --num-workers 0", "--num-workers: must be at least 1, got 0"),
        ("demo --num-workers 1000000000", "--num-workers: must be at most 65536, got 1000000000"),
        ("demo --num-stragglers -1", "--num-stragglers: must be at least 0, got -1"),
        ("demo --num-stragglers 100", "--num-stragglers must be at most 99, "),
        ("demo --num-workers 8 --num-stragglers 9", "--num-stragglers must be at most 7, "),
        ("demo --seed -1", "--seed: must be at least 0, got -1"),
        ("demo --seed 9223372036854775808", "--seed: must be at most 9223372036854775807, "),
        ("demo --device abacus", "--device: must be one of cpu"),
        ("demo --device meta", "--device: must be one of cpu"),
        ("demo --device cuda:99", "got 'cuda:99'"),
        ("compare m:f --inputs f --device cuda:99", "--device: must be one of cpu"),
        ("compare --inputs x.pt", "the following arguments are required: MODULE:FACTORY"),
        ("compare a:b", "the following arguments are required: --inputs"),
        ("compare nowhere:net --inputs x.pt", "No module named 'nowhere'"),
        ("compare torch:nothing --inputs x.pt", "module 'torch' has no function 'nothing'"),
        ("compare torch --inputs x.pt", "MODULE:FACTORY must name both, got 'torch'"),
        ("compare torch.nn:Tanh --inputs none.pt", "--inputs cannot be read: [Errno 2]"),
        ("compare torch.nn:Tanh --inputs folder.png", "--inputs cannot be read: [Errno 21]"),
        ("compare torch.nn:Tanh --inputs x.pt --settings 1,2", "--settings: must be N,K,S"),
        ("compare torch.nn:Tanh --inputs x.pt --settings 4,5,1", "1 <= K <= N and 0 <= S < N"),
        ("compare torch.nn:Tanh --inputs x.pt --batch-size 0", "--batch-size: must be at least 1"),
        ("compare a:b --inputs x.pt --output x", "--output: must end in .pdf, .png, .svg, got x"),
        ("demo --output nowhere/demo.png", "--output: must be in a folder that exists"),
        ("demo --output demo", "--output: must end in .pdf, .png, .svg, got demo"),
    ],
)
def test_bad_values_get_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    torch.save(torch.ones(480, 1), tmp_path / "x.pt")
    assert main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("coded-torch")
    assert message in err
    assert sorted(os.listdir(tmp_path)) == ["folder.png", "x.pt"]


def test_cuda_needs_a_device(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["demo", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == (
        "coded-torch demo: argument --device: must be one of cpu, got 'cuda' "
        "(see coded-torch demo --help)\n"
    )


@pytest.mark.parametrize("extra", ["matplotlib", "tqdm"])
def test_a_missing_extra_says_how_to_get_it(extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, extra, None)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == (
        f"coded-torch demo needs {extra}: pip install 'coded_torch[demo]'\n"
    )


def test_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for command in ("demo", "compare", "serve", "plan", "info"):
        assert f"\n    {command} " in out
    assert main(["bench"]) == 2


def test_version(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"coded_torch {coded_torch.__version__}\n"


def test_info(capsys):
    assert main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["coded_torch"] == coded_torch.__version__
    assert lines["torch"] == torch.__version__
    assert lines["python"].startswith(sys.version.split()[0])
    assert lines["devices"].startswith("cpu")
    assert lines["threads"].startswith(f"{torch.get_num_threads()} of ")
    for built in ("cpu", "cuda"):
        assert lines[built].startswith("kernels")


@pytest.mark.parametrize("command", ["info", "--help", "demo"])
@pytest.mark.parametrize(
    ("redirection", "reason"),
    [(">&-", "it is closed"), ("> /dev/full", "[Errno 28] No space left on device")],
)
def test_standard_output_that_cannot_be_written(command, redirection, reason, tmp_path):
    """One line, and before the work: the demo would take longer than this may."""
    code = "from coded_torch.cli.main import main; raise SystemExit(main())"
    line = f'"$0" -c "{code}" {command} {redirection}'
    # Elsewhere than in the checkout, whose package is not built, and which -c looks at first.
    shell = ["sh", "-c", line, sys.executable]
    done = subprocess.run(shell, capture_output=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.decode() == f"coded-torch: standard output cannot be written: {reason}\n"


def test_a_reader_that_has_seen_enough(tmp_path):
    code = "from coded_torch.cli.main import main; raise SystemExit(main())"
    line = f'{{ "$0" -c "{code}" info; echo $? >&2; }} | true'
    # Elsewhere than in the checkout, whose package is not built, and which -c looks at first.
    shell = ["sh", "-c", line, sys.executable]
    done = subprocess.run(shell, capture_output=True, timeout=60, cwd=tmp_path)
    assert done.stderr.decode() == "1\n"


def test_demo_prints_a_table_and_saves_a_picture(tmp_path, capsys):
    output = tmp_path / "picture.png"
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert main(f"demo --num-workers 6 --num-data 3 --seed 5 --output {output}".split()) == 0
    out, err = capsys.readouterr()
    assert err == ""  # the progress bar is for terminals
    assert "Seed 5." in out
    assert "N = 6 workers, K = 3 inputs a group: 1,920 answers" in out
    assert "\n  all answer                     1,920          0  " in out
    for situation in ("3 lost", "3 lost, replication"):
        assert f"\n  {situation} " in out
    assert "N = 6 workers, K = 3 inputs a group, S = 3 workers lost" in out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    for scheme in ("the paper's scheme", "Berrut", "Lagrange, ordered", "replication"):
        assert f"\n  {scheme} " in out
    assert out.endswith(f": {output}\n")
    assert output.read_bytes().startswith(b"\x89PNG")
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_demo_compares_the_two_settings_and_draws_the_first(tmp_path, monkeypatch):
    seen = []

    def compare(model, batches, settings, *, labels, seed):
        seen.append((len(batches), len(labels), *settings))
        return Comparison(
            [Row(settings[0], "mine", SplineCode(2, 3), [1.0, 0.1], [1.0, 0.1], None)]
        )

    monkeypatch.setattr("coded_torch.cli.main.compare", compare)
    assert main(["demo", "--output", str(tmp_path / "picture.svg")]) == 0
    assert seen[:2] == [(8, 8, (100, 20, 60)), (8, 8, (24, 20, 4))]
    assert seen[2:] == [(4, 4, (100, 20, lost)) for lost in range(0, 100, 20)]
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")


def test_compare_takes_a_model_and_files(tmp_path, monkeypatch, capsys):
    images, labels = digits()
    torch.save(images[:250], tmp_path / "images.pt")
    torch.save(labels[:250], tmp_path / "labels.pt")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text("from coded_torch.demo.lenet5 import lenet5 as net\n")
    line = "compare nets:net --inputs images.pt --labels labels.pt --batch-size 120"
    assert main(f"{line} --settings 9,8,1 6,4,2 --output out.png".split()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "N = 9 workers, K = 8" in out
    assert "N = 6 workers, K = 4" in out
    assert "RelAcc" in out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert main(["compare", "nets:net", "--inputs", "images.pt"]) == 2
    assert "batches must hold at least two" in capsys.readouterr().err
    torch.save({"images": images}, tmp_path / "images.pt")
    assert main(["compare", "nets:net", "--inputs", "images.pt"]) == 2
    assert "--inputs must be a dense, strided tensor, got dict" in capsys.readouterr().err


def test_a_picture_that_cannot_be_saved(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    arguments = f"demo --num-workers 2 --num-data 1 --output {tmp_path / 'picture.png'}"
    assert main(arguments.split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--output cannot be written: [Errno 28] No space left on device" in err


def test_interrupt(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("coded_torch.cli.main.compare", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
