"""The command ``coded-torch``: its output and its exit codes."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import coded_torch
from coded_torch import CodedWrapper, codes, stragglers, workers
from coded_torch.cli import CommandError, find_factory, progress, seconds, usage
from coded_torch.cli.main import main
from coded_torch.demo import digits, lenet5


def run(line):
    """Run a command, and return its exit code."""
    try:
        return main(line.split() if isinstance(line, str) else line)
    except SystemExit as ended:  # argparse ends the process itself
        return ended.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fly", "invalid choice: 'fly'"),
        ("demo --wings 2", "unrecognized arguments: --wings 2"),
        ("job models:here --mean --bounds 0", "must be two numbers, LOW,HIGH, got '0'"),
        ("demo --settings 1,2", "--settings: must be triples N,K,S with 1 <= K <= N <= 65536"),
        ("demo --settings 6,7,1", "--settings: must be triples N,K,S with 1 <= K <= N <= 655"),
        ("demo --seed one", "--seed: invalid int value: 'one'"),
        ("demo --seed 99999999999999999999", "demo: --seed must fit 64 bits"),
        ("demo --device abacus", "--device: invalid choice: 'abacus' (choose from"),
        ("demo --device cuda:99", "--device: invalid choice: 'cuda:99'"),
        ("compare --inputs x.pt", "the following arguments are required: MODEL"),
        ("compare a:b", "the following arguments are required: --inputs"),
        ("compare nowhere:net --inputs x.pt", "got no module 'nowhere'"),
        ("compare torch:nothing --inputs x.pt", "got no 'nothing' in torch"),
        ("compare torch --inputs x.pt", "a class in a Python module, got 'torch'"),
        ("compare torch.nn:Tanh --inputs none.pt", "cannot be read: no file matches 'none.pt'"),
        ("compare torch.nn:ReLU --inputs i.pt", "the module must return floating-point tensors"),
        ("compare torch.nn:Tanh --inputs nan.pt", "must return finite outputs, got NaN"),
        ("compare torch.nn:Tanh --inputs folder.png", "folder.png must be a regular file"),
        ("compare torch.nn:Tanh --inputs dict.pt", "x=a,y=b: the file has ['x', 'y']"),
        ("compare torch.nn:Tanh --inputs x.pt --settings 5,5,5", "0 <= S < N, got '5,5,5'"),
        ("compare torch.nn:Tanh --inputs x.pt --seed -1", "seeds must be at least 0, got -1"),
        (
            "compare torch.nn:Tanh --inputs x.pt --batch-size 400",
            "two batches, 800, got 480: take more",
        ),
        ("compare torch.nn:Tanh --inputs x.pt --batch-size 0", "--batch-size must be at least 1"),
        ("compare ./mine:make --inputs x.pt", "a Python module, got './mine:make'"),
        ("compare a:b --inputs x.pt --output x", "--output: must end in .pdf, .png or .svg, in a"),
        ("demo --output nowhere/demo.png", "in a folder that exists, got nowhere/demo.png"),
        (
            "plan --deadline 2sms",
            "--deadline: must be a duration, such as 0.2, 200ms or 2s, got '2",
        ),
        ("plan --deadline soon", "--deadline: must be a duration, such as 0.2, 200ms or 2s, got"),
        ("plan --conditions murphy", "--conditions: invalid choice: 'murphy'"),
    ],
)
def test_bad_values_are_said_and_end_with_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    torch.save(torch.ones(480, 1), tmp_path / "x.pt")
    torch.save(torch.ones(480, 1).long(), tmp_path / "i.pt")
    torch.save(torch.ones(480, 1) / 0 * 0, tmp_path / "nan.pt")
    torch.save(dict.fromkeys("xy", torch.ones(480, 1)), tmp_path / "dict.pt")
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("coded-torch")
    assert message in err
    assert sorted(os.listdir(tmp_path)) == ["dict.pt", "folder.png", "i.pt", "nan.pt", "x.pt"]


def test_a_missing_extra_says_how_to_get_it(monkeypatch, capsys, tmp_path):
    (tmp_path / "x.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run(f"compare torch.nn:Tanh --inputs {tmp_path / 'x.parquet'}") == 2
    assert capsys.readouterr().err == (
        "coded-torch compare: pyarrow must be installed: pip install 'coded_torch[job]'\n"
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("demo") == 2
    assert capsys.readouterr().err == (
        "coded-torch demo: matplotlib must be installed: pip install 'coded_torch[demo]'\n"
    )


@pytest.mark.parametrize(
    ("text", "value"), [("200ms", 0.2), (".2", 0.2), ("2s", 2.0), ("1e-3s", 1e-3), ("0", 0.0)]
)
def test_durations(text, value):
    assert seconds(text) == pytest.approx(value)


def test_options_stand_in_groups_with_defaults_of_their_command(capsys):
    assert run("serve --help") == 0
    text = capsys.readouterr().out
    titles = ["model", "workers", "endpoints instead of processes", "requests and answers"]
    places = [text.index(f"\n{title}:\n") for title in [*titles, "server"]]
    assert places == sorted(places)
    assert "10 deadlines, at least 1s" in " ".join(text.split())
    assert run("job --help") == 0
    assert "counts as hung [30s]" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["serve", "job", "compare", "tune", "plan"])
def test_help_ends_with_an_example_of_its_options(command, capsys):
    assert run(f"{command} --help") == 0
    options, example = capsys.readouterr().out.split(f"Example: coded-torch {command} ")
    assert {*re.findall(r"--[a-z-]+", example)} <= {*re.findall(r"--[a-z-]+", options)}


def test_help_and_version(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert run("") == 0
    assert capsys.readouterr().out == out
    for command in ("demo", "compare", "tune", "serve", "job", "plan", "info"):
        assert f"\n  {command} " in out
        assert run([command, "--help"]) == 0
    assert "99.9 % of the requests" in capsys.readouterr().out
    assert run("--version") == 0
    assert capsys.readouterr().out == f"coded_torch {coded_torch.__version__}\n"


def test_the_version_needs_no_torch():
    program = (
        "import sys, coded_torch_command; sys.argv = ['coded-torch', '--version'];"
        " sys.exit(coded_torch_command.main() or 'torch' in sys.modules)"
    )
    line = [sys.executable, "-c", program]
    printed = subprocess.run(line, check=True, capture_output=True, text=True, timeout=60).stdout
    assert printed == f"coded_torch {coded_torch.__version__}\n"


def test_info(capsys):
    assert run("info") == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["coded_torch"] == coded_torch.__version__
    assert lines["torch"] == torch.__version__
    assert lines["python"].startswith(sys.version.split()[0])
    assert lines["devices"].startswith("cpu")
    assert lines["threads"].startswith(f"{torch.get_num_threads()} of ")
    for built in ("cpu", "cuda"):
        assert lines[built].startswith("kernels")


def test_info_needs_a_card_and_places_that_exist(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert run("info --device cuda") == 2
    assert capfd.readouterr().err == "coded-torch info: torch has no CUDA device here\n"
    assert run("info --json card.json") == 2
    must = "coded-torch info: --json, --tests and --quick need --device cuda\n"
    assert capfd.readouterr().err == must
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert run(f"info --device cuda --tests {tmp_path}") == 2
    must = "coded-torch info: --tests must be the folder of the sources, with tests, got "
    assert capfd.readouterr().err == f"{must}{tmp_path}\n"
    assert run(f"info --device cuda --json {tmp_path}/none/card.json") == 2
    must = "coded-torch info: --json cannot be written: [Errno 2] No such file"
    assert capfd.readouterr().err.startswith(must)


def test_an_output_that_nobody_reads_stops_the_work(tmp_path):
    code = "from coded_torch.cli.main import main; raise SystemExit(main())"
    line = f'{{ "$0" -c "{code}" info; echo $? > code; }} | true'
    # The checkout, which -c looks at first, may not be built.
    shell = ["sh", "-c", line, sys.executable]
    done = subprocess.run(shell, capture_output=True, timeout=60, cwd=tmp_path)
    assert done.stderr == b""
    assert (tmp_path / "code").read_text() == "2\n"


def test_an_error_whose_first_line_is_empty_is_shown():
    with pytest.raises(CommandError, match=r"^why$"), usage():
        raise ValueError("\nwhy\nand more")


def test_demo_prints_tables_and_saves_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("coded_torch.cli.main.digits", lambda: [x[:740] for x in digits()])
    output = tmp_path / "picture.png"
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert run(f"demo --settings 6,3,3 --seed 5 --output {output}") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Device cpu, seed 5." in out
    shown = out[out.index("The first 20 digits") :]
    arrived, estimated, model, decoded = (line.split()[-20:] for line in shown.splitlines()[1:5])
    assert [a if e == "." else e for a, e in zip(arrived, estimated, strict=True)].count(".") == 0
    assert sum(a == b for a, b in zip(arrived, model, strict=True)) == 20 - arrived.count(".") > 0
    assert sum(a == b for a, b in zip(decoded, model, strict=True)) >= 10
    found = re.search(r"([\d,]+) answers are computed, ([\d,]+) are estimated", out)
    computed, estimated = (int(number.replace(",", "")) for number in found.groups())
    assert computed + estimated == 720 > computed
    error, bound = map(float, re.findall(r"([\d.]+) in the median", out))
    assert error < bound < 4 * error
    held, right = map(float, re.findall(r"([\d.]+)%", out)[:2])
    assert held > 90
    assert right > 90
    assert "N = 6 workers, K = 3 inputs per group, S = 3 workers lost" in out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    for scheme in ("the paper's scheme", "Berrut", "Lagrange, ordered", "replication"):
        assert f"\n  {scheme} " in out
    assert out.endswith(f": {output}\n")
    assert output.read_bytes().startswith(b"\x89PNG")
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_compare_takes_a_model_and_files(tmp_path, monkeypatch, capsys):
    images, labels = digits()
    torch.save(images[:250], tmp_path / "images.pt")
    np.save(tmp_path / "labels.npy", labels[:250].numpy())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text("from coded_torch.demo import lenet5 as net\n")
    line = "compare nets:net --inputs images.pt --labels labels.npy --batch-size 120 --settings"
    assert run([*line.split(), "9,8,1 6,4,2", "--output", "out.png"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for shown in (
        "Device cpu, seed 0.\n\nN = 9 workers, K = 8",
        "N = 6 workers, K = 4",
        "RelAcc",
        "\nRelAcc  ",
    ):
        assert shown in out
    assert run("compare nets:net --inputs images.pt --batch-size 50 --settings 6,4,2") == 0
    unlabelled = capsys.readouterr().out
    assert "RelAcc" not in unlabelled
    assert "\nBest on 4 batches at N = 6, K = 4, S = 2: " in unlabelled
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "\n± or ×/÷  " in unlabelled
    assert run("compare nets:net --inputs images.pt --batch-size 120 --settings 6,4,2") == 0
    of_one_batch = capsys.readouterr().out
    assert "±" not in of_one_batch
    assert "No intervals and no best scheme: only one batch was left" in of_one_batch
    np.save(tmp_path / "labels.npy", labels[:251].numpy())
    assert run([*line.split(), "9,8,1"]) == 2
    assert "--labels cannot be read: it must have 250 rows, got 251" in capsys.readouterr().err


def test_compare_names_inputs_that_forward_takes_by_keyword_only(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keyword_only.py").write_text(
        "import torch\n"
        "class net(torch.nn.Module):\n"
        "    def forward(self, *, x):\n"
        "        return x\n"
    )
    np.save("rows.npy", np.zeros((8, 2), np.float32))
    line = "compare keyword_only:net --inputs rows.npy --columns x=rows --batch-size 4"
    assert run(f"{line} --settings 6,4,2") == 2
    assert "forward takes x by keyword only; give a MODEL whose" in capsys.readouterr().err


def test_tune_prints_the_code_with_the_numbers_that_answer_best(tmp_path, monkeypatch, capsys):
    torch.save(digits()[0][:200], tmp_path / "images.pt")
    monkeypatch.chdir(tmp_path)
    line = "tune coded_torch.demo:lenet5 --inputs images.pt --batch-size 40 --code"
    assert run([*line.split(), "RegressionCode", "--settings", "9,8,1 6,4,2"]) == 0
    device, first, second = capsys.readouterr().out.splitlines()
    assert device == "Device cpu, seed 0."
    assert first.startswith("Best at N = 9, K = 8, S = 1: CodedWrapper(model, codes.Regression")
    code = eval(second.partition("model, ")[2].removesuffix(")"), {"codes": codes})
    pool = workers.LocalWorkers(stragglers.Uniform(2, seed=0))
    wrapper = CodedWrapper(lenet5(), codes.RegressionCode(4, 6), workers=pool)
    assert repr(code) == repr(coded_torch.tune(wrapper, digits()[0][:200].split(40)))
    assert run([*line.split(), "SplineCode", "--batch-size", "0"]) == 2
    assert "tune: --batch-size must be at least 1" in capsys.readouterr().err


def test_commands_write_pictures_of_different_names(tmp_path, monkeypatch, compared):
    """Commands that run one after the other in a folder keep each other's results."""

    class Drawn:
        records = ()

        def draw(self):
            return Figure()

        def verdict(self):
            return ""

    compared(lambda *_, **__: Drawn())
    monkeypatch.chdir(tmp_path)
    torch.save(torch.ones(480, 1), "x.pt")
    for line in ("demo", "compare torch.nn:Tanh --inputs x.pt"):
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        assert run(line) == 0
        assert {path: path.read_bytes() for path in before} == before
        assert len([*tmp_path.iterdir()]) == len(before) + 1


@pytest.fixture
def compared(monkeypatch):
    """Replace the comparison by a function, which gets its arguments."""

    def replace(function):
        monkeypatch.setattr(coded_torch, "compare", function)

    return replace


def test_interrupt(compared, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    compared(interrupt)
    assert run("demo") == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_factory_is_a_function_a_class_or_a_module_of_torch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kinds.py").write_text(
        "from torch.nn import Tanh\nmodel = Tanh()\nnumber = 3\ndef make(): return model"
    )
    model = find_factory("kinds:model")()
    assert type(model) is torch.nn.Tanh
    assert find_factory("kinds:make")() is model
    assert type(find_factory("kinds:Tanh")()) is torch.nn.Tanh
    for name, got in {
        "kinds:missing": "no 'missing' in kinds",
        "nowhere.kinds:make": "no module 'nowhere.kinds'",
        "kinds:number": "int",
    }.items():
        with pytest.raises(CommandError, match=re.escape(f"in a Python module, got {got}")):
            find_factory(name)


def test_a_checkout_does_not_hide_the_installed_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.py").write_text("from torch.nn import Tanh as make")
    find_factory("beside:make")
    assert sys.path[0] == str(tmp_path)
    (tmp_path / "coded_torch").mkdir()
    find_factory("beside:make")
    assert sys.path[-1] == str(tmp_path)


def test_progress_is_a_line_per_minute_where_there_is_no_terminal(capsys, monkeypatch):
    times = iter([0.0, 40.0, 70.0, 90.0, 131.0, 140.0])
    monkeypatch.setattr("coded_torch.cli.time.monotonic", lambda: next(times))
    assert [*progress([*"abcde"], "batches")] == [*"abcde"]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["batches: 2 of 5, 0:01:45 left", "batches: 4 of 5, 0:00:33 left"]
