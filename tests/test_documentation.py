"""What the README and the docstrings show is what happens."""

import contextlib
import doctest
import importlib.util
import inspect
import io
import json
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import coded_torch
from coded_torch.cli.main import main

from .serve.test_command import running

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
#: The packages and modules that users import from.
PUBLIC = ("codes", "linear", "nn", "serve", "stragglers", "surrogates", "workers")
PUBLIC = ["coded_torch", *(f"coded_torch.{name}" for name in PUBLIC)]
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
MODULES = [
    m.name
    for m in pkgutil.walk_packages(coded_torch.__path__, "coded_torch.")
    if not m.name.startswith(("coded_torch._ops", "coded_torch._plan"))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    assert doctest.testmod(importlib.import_module(name), optionflags=OPTIONS).failed == 0


@pytest.mark.parametrize("name", ["science", "guides/your_own", "guides/means"])
def test_the_examples_of_pages_show_what_happens(name):
    page = str(ROOT / "notebooks" / f"{name}.md")
    result = doctest.testfile(page, module_relative=False, optionflags=OPTIONS)
    assert result.attempted > 5
    assert result.failed == 0


@pytest.fixture
def ran(tmp_path, monkeypatch, capsys):
    """Return a function that returns what a script of a page prints, in a folder of the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def run(script, *arguments):
        if "dataclass" in (tmp_path / script).read_text():  # threads look for it in the main script
            return subprocess.check_output([sys.executable, script], text=True, timeout=120)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        # Workers import the script, by its path, as the main one.
        runpy.run_path(str(tmp_path / script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def example(tmp_path, ran):
    """Return a function that returns an example's output, and the output that its page shows."""

    def run(page, name):
        text = (ROOT / page).read_text()
        block = re.search(rf"<!-- example: {name} -->(.*?)<!-- end -->", text, re.S)[1]
        script, shown = re.findall(r"```\w+\n(.*?)```", block, re.S)
        (tmp_path / "example.py").write_text(script)
        return ran("example.py"), shown

    return run


def door(name):
    """Return the code of a door of README, which has at most ten lines."""
    block = re.search(rf"<!-- example: {name} -->\n```python\n(.*?)```", README, re.S)[1]
    assert len([line for line in block.splitlines() if line]) <= 10
    return block


def test_the_door_of_rows_computes_every_row(tmp_path, ran):
    (tmp_path / "example.py").write_text(door("rows"))
    assert re.match(r"rows +240 of 240 computed,.* 0 estimated", ran("example.py"))


def test_the_door_of_codes_decodes_as_readme_says(capsys):
    names = {}
    exec(door("codes"), names)
    printed = capsys.readouterr().out
    expected = names["model"](names["batch"]).argmax(1)
    for answers in (names["decoded"], names["answers"]):
        same = (answers.argmax(1) == expected).double().mean()
        assert f"here, {same:.0%} have the model's class".replace("%", " %") in README
        assert printed == f"{same:.0%} of the classes\n"
    assert len(names["report"].received) == len(names["arrived"]) == 20


def test_readme_shows_what_compare_prints():
    """The page's example runs below."""
    page = (ROOT / "notebooks" / "science.md").read_text()
    ((shown,), (printed,)) = (
        re.findall(rf"example: {name} -->.*?```text\n(.*?)```", text, re.S)
        for name, text in (("compare", README), ("researcher", page))
    )
    assert shown == printed


def test_the_tutorials_example_prints_its_output(example, tmp_path, capsys):
    text = (ROOT / "notebooks" / "tutorial.md").read_text()
    factory = re.search(r"<!-- example: factory -->\n```python\n(.*?)```", text, re.S)[1]
    (tmp_path / "my_model.py").write_text(factory)
    printed, shown = example("notebooks/tutorial.md", "tutorial")
    assert printed == shown
    assert main(["serve", "my_model:make", "--example", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"][0]["shape"] == [1, 4]


def test_the_researchers_example_prints_its_output(example):
    """Rounding, which processors differ in, may choose another tuned number."""
    (*printed,), (*shown,) = (
        text.splitlines() for text in example("notebooks/science.md", "researcher")
    )
    assert [line[:30] for line in printed] == [line[:30] for line in shown]
    for ours, theirs in zip(printed[2:], shown[2:], strict=True):
        if "Lagrange" not in ours:  # its error is that of rounding
            numbers = [[float(x) for x in re.findall(r"[\d.]+", y[30:])] for y in (ours, theirs)]
            assert numbers[0] == pytest.approx(numbers[1], rel=0.1)


def test_the_reference_of_commands_has_every_option():
    pytest.importorskip("latex2mathml")  # of the extra docs
    pytest.importorskip("sphinx")
    path = ROOT / "notebooks" / "conf.py"
    spec = importlib.util.spec_from_file_location("conf", path)
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    found = {name: dict(every) for name, _, every in conf.commands()}
    assert len(found) >= 6
    for name, every in found.items():
        with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
            main([name, "--help"])
        flags = set(re.findall(r"^  (?:-h, )?(--[\w-]+)", shown.getvalue(), re.M))
        assert flags <= set(re.findall(r"--[\w-]+", " ".join(every)))
        assert all(every.values())
    assert found["serve"]["--deadline DURATION"].endswith(" [0.2s]")
    assert found["demo"]["--seed SEED"].endswith("[0]")  # 0 is a default as any other
    assert ".. commands::" in (ROOT / "notebooks" / "reference" / "commands.rst").read_text()


def sections():
    """The sections of the page "Your model": their titles, and their commands."""
    text = (ROOT / "notebooks" / "guides" / "your_model.md").read_text()
    for section in text.split("\n## ")[1:]:
        shell = "".join(re.findall(r"```sh\n(.*?)```", section, re.S))
        if shell:
            client = re.search(r"# (ask\w*\.py)\n|$", section)[1]
            yield pytest.param(shell.splitlines(), client, id=section.partition("\n")[0])


@pytest.mark.parametrize(("commands", "client"), [*sections()])
def test_your_model_works_as_the_page_says(commands, client, ran, tmp_path, monkeypatch, capsys):
    text = (ROOT / "notebooks" / "guides" / "your_model.md").read_text()
    files = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", text, re.S))
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        monkeypatch.delitem(sys.modules, name[:-3], raising=False)
    shown = {}
    for command in commands:
        program, first, *more = shlex.split(command)
        if program == "python":
            shown[first] = ran(first)
        elif first == "serve" and "--example" not in more:
            with running(*more, cwd=tmp_path) as (_, port):
                shown[client] = ran(client, f"127.0.0.1:{port}")
        else:
            assert main([first, *more]) == 0
            shown[first] = capsys.readouterr().out
    expected = {
        "job": "This run: 80 rows computed, 0 estimated, 0 failed;",
        "compare": "no redundancy, regression",
        "serve": r'"name":"input","datatype":"FP32","shape":\[1,3,64,64\]',
        "ask.py": r"^1 3 .*\n2 7 .*\n$",
        "ask_strings.py": "^2 True$",
        "kill_one.py": "^256 embeddings, error 0.0, 0 estimated$",
        "fixed_batch.py": "^11 answers$",
        "made_there.py": "^6 answers$",
        "my_module.py": r"^\(100, 3\)$",
        "my_strings.py": r"^12 12$",
        "my_outputs.py": r"^\(2, 6, 4\)\n\(6, 5, 50\)$",
    }
    for command, output in shown.items():
        assert re.search(expected.get(command, "^$"), output), command


def test_comments_name_benchmarks_that_exist():
    files = [path for x in ("coded_torch", "csrc") for path in (ROOT / x).rglob("*.*")]
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} | {"results"}
    cited = {}
    for path in files:
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
            text = re.sub(r"\n\s*(?:#:?|//)", "", path.read_text())  # a comment in one line
            names_here = re.findall(r"\bbenchmarks[ ./]([a-z_]+)(?:[;,)]|\.py)", text)
            cited |= dict.fromkeys(names_here, path.name)
    assert {"waiting", "distances"} <= cited.keys()
    assert {name: cited[name] for name in cited.keys() - names} == {}


def test_pages_that_everybody_reads_are_short():
    for name, most in {
        "README.md": 110,
        "CONTRIBUTING.md": 66,
        "benchmarks/README.md": 250,
    }.items():
        assert len((ROOT / name).read_text().splitlines()) <= most
    measured = r"<!-- table.*?end -->|<!--.*?-->|```.*?```"
    assert len(re.sub(measured, "", README, flags=re.S).split()) <= 1100


def title_of(path):
    if path.suffix == ".ipynb":
        text = "".join(json.loads(path.read_text())["cells"][0]["source"])
    else:
        text = path.read_text()
    return text.splitlines()[0].removeprefix("# ")


def test_the_sidebar_is_short_and_titles_are_unique():
    pages = ROOT / "notebooks"
    sidebar = re.findall(r"```{toctree}\n(?::.*\n)*\n([^`]*)```", (pages / "index.md").read_text())
    entries = [re.sub(r".*<(.*)>", r"\1", x) for block in sidebar for x in block.split("\n") if x]
    assert 18 <= len(entries) <= 25
    paths = [x for kind in ("md", "rst", "ipynb") for x in pages.rglob(f"*.{kind}")]
    paths += [ROOT / "benchmarks" / "README.md", ROOT / "csrc" / "README.md"]
    titles = Counter(title_of(path) for path in paths)
    assert [title for title, times in titles.items() if times > 1] == []
    words = [word for title in titles for word in title.split()]
    assert {words.count(word) for word in ("Serving", "Waiting", "Codes", "Surrogates")} <= {0, 1}


@pytest.mark.parametrize("name", ["five", "lost"])
def test_coded_computing_in_five_minutes_prints_its_output(example, name):
    printed, shown = example("notebooks/five_minutes.md", name)
    assert printed == shown


def test_codes_run_on_real_workers(example):
    printed, shown = example("notebooks/guides/codes.md", "processes")
    assert printed == shown
    printed, shown = example("notebooks/guides/codes.md", "choose")
    found = [re.findall(r"^Best on 3|\w+Code", text) for text in (printed, shown)]
    assert found[0] == found[1] == ["Best on 3", "RegressionCode", "SplineCode"]


def test_one_version_is_named_everywhere():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()
    assert f"`v{version}`" in (ROOT / "CONTRIBUTING.md").read_text()
    notes = subprocess.run([ROOT / ".ci" / "notes", version], capture_output=True, text=True)
    highlights, moving, *_ = notes.stdout.split("\n### ")
    assert highlights.count("\n- ") == 5
    assert moving.startswith("Moving from ")
    assert "### Added" in notes.stdout


def test_files_that_pages_tell_contributors_to_change_exist():
    pages = (ROOT / "CONTRIBUTING.md", ROOT / "notebooks" / "architecture.md")
    named = [re.findall(r"`(coded_torch/[\w/.]+)`", page.read_text()) for page in pages]
    assert min(map(len, named)) >= 10
    assert [path for path in {*named[0], *named[1]} if not (ROOT / path).exists()] == []


#: Numbers of README that are settings of what it shows, or measured by the test of the door.
SETTINGS = {"2 %", "20", "24", "94 %", "4", "3", "5.3", "3.10", "95 %", "2", "5", "800"}


def test_every_other_number_of_readme_is_generated():
    text = re.sub(r"<!-- value.*?end -->|<!--.*?-->|```.*?```|`[^`]*`", "", README, flags=re.S)
    text = re.sub(r"!?\[[^\]]*\]\(http[^)]*\)|!\[.*?\]|\]\([^)]*\)", "", text)
    assert {
        x.strip() for x in re.findall(r"(?<![\w.-])\d[\d.,]*\d(?: %)?|(?<![\w.-])\d(?: %)?", text)
    } <= SETTINGS


def test_each_version_of_the_pages_has_a_folder(tmp_path):
    built, site = tmp_path / "built", tmp_path / "site"
    for text, revision, first in (
        ("main", "main", "latest"),
        ("old", "v0.9.1", "0.9"),
        ("first", "v0.10.0", "0.10"),
        ("patched", "v0.10.1", "0.10"),
        ("old", "v0.9.2", "0.10"),
        ("main", "main", "0.10"),
    ):
        built.mkdir(exist_ok=True)
        (built / "index.html").write_text(text)
        subprocess.run([ROOT / ".ci" / "publish", built, site, revision], check=True)
        assert f"url={first}/index.html" in (site / "index.html").read_text()
    assert json.loads((site / "versions.json").read_text()) == ["latest", "0.10", "0.9"]
    pages = {path.parent.name: path.read_text() for path in site.glob("*/index.html")}
    assert pages == {"latest": "main", "0.10": "patched", "0.9": "old"}


def test_public_names_are_documented():
    for name in {*MODULES} - {"coded_torch.testing.helpers"}:
        module = importlib.import_module(name)
        own = {k: v for k, v in vars(module).items() if getattr(v, "__module__", None) == name}
        listed = getattr(module, "__all__", own)
        for public in own.keys() & {x for x in listed if not x.startswith("_")}:
            value = own[public]
            if inspect.isclass(value) or inspect.isroutine(value):
                assert value.__doc__, f"{name}.{public} has no docstring"


def test_the_reference_has_every_public_name_once():
    pages = (ROOT / "notebooks" / "reference").glob("*.rst")
    text = "\n".join(path.read_text() for path in pages)
    shown = re.findall(r"^\.\. automodule:: (\S+)\n((?:   .*\n|\n(?=   ))*)", text, re.M)
    values = []
    alone = []  # objects with a directive of their own; Sphinx warns if a page shows one twice
    for name in re.findall(r"^\.\. auto(?:class|function):: (\S+)$", text, re.M):
        module, _, public = name.rpartition(".")
        alone.append(getattr(importlib.import_module(module), public))
    for name, options in shown:
        module = importlib.import_module(name)
        listed = re.search(r":members:(.*)", options)
        names = {x.strip() for x in listed[1].split(",")} - {""} if listed else set()
        names |= set(module.__all__) if listed and not names else set()
        for excluded in re.findall(r":exclude-members: (.*)", options):
            names -= {word.strip() for word in excluded.split(",")}
        names |= set(re.findall(r"py:data:: (\w+)", options))
        values += [getattr(module, each) for each in names]
    for name in PUBLIC:
        module = importlib.import_module(name)
        for each in module.__all__:
            value = getattr(module, each)
            documented = any(value is shown for shown in (*values, *alone))
            assert inspect.ismodule(value) or documented, f"{name}.{each}"
    defined = [value for value in values if inspect.isclass(value) or inspect.isroutine(value)]
    assert [value for value, times in Counter(defined).items() if times > 1] == []
