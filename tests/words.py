"""List prose that breaks the rules: ``python tests/words.py [FILES]``.

A docstring or comment starts with a verb, or with an article and a noun. A noun is repeated, not
replaced by "those of", "theirs" or a clause with "what". A tuned number has a comment. The
glossary's words stand for its terms.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

#: A first word that begins a fragment, and one that begins a fragment or a condition.
_FRAGMENT = (
    "those|that|what|whatever|whoever|who|whom|whether|which|how|why|of|than|and|or|but|nor|else|"
    "it|they|theirs|its|their|such|likewise|same"
)
_CONDITION = "where|when|as|by|for|in|on|with|without|from|only|also|so"
OPENERS = re.compile(rf"(?:{_FRAGMENT}|{_CONDITION})\b", re.I)
#: A comment that is a whole sentence may begin with its condition.
FRAGMENT = re.compile(rf"(?:{_FRAGMENT})\b|(?:{_CONDITION})\b(?!.*[.)]$)", re.I | re.S)
#: A pronoun or a clause that stands where a noun belongs.
PRONOUNS = re.compile(
    r"\b(?:those (?:of|that|which|who|for|with|in|by)|that of|what(?:ever)?\b(?!\?)|who(?:m)?ever|"
    r"theirs|likewise|the (?:latter|former)|it is there|in full it is|which when)\b|; none:",
    re.I,
)
#: A word that the glossary replaces, by the term that it stands for.
NOT_IN_GLOSSARY = {
    "worker": r"machines?|liars?|adversar(?:y|ies)",
    "group": r"chunks?",
    "part": r"pieces?",
    "hedge": r"re-?ask(?:s|ed|ing)?",
    "predicted": r"guess(?:es|ed|ing)?",
    "decoder": r"curves?",
}
REPLACED = re.compile("|".join(rf"\b(?:{words})\b" for words in NOT_IN_GLOSSARY.values()), re.I)
#: Words that stay, each in the file where it means something else than the glossary's term.
EXCEPTIONS = {
    ("faults.py", "adversaries"): "the argument, after the papers' attack model",
}
#: Public names that hold such a word in another sense.
NAMES = {
    "CurveCode": "its answers lie on a curve, a function of a point",
    "CurveOptions": "the options of such a code",
    "Job": "a part with its request and module, in the queue of a pool",
    "job": "such a part; or a command that answers a whole file",
    "Task": "the description of a request: inputs, outputs and how they are divided",
    "task": "such a description",
    "task_of": "a function that makes one",
    "max_task_retries": "an argument of Ray",
    "adversaries": "the argument, after the papers' attack model",
}
_NUMBER = (ast.Constant, ast.UnaryOp, ast.BinOp, ast.Tuple)


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield each comment's first line and text; lines that follow each other are one."""
    block: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        alone = not token.line[: token.start[1]].strip()
        if block and not (alone and token.start[0] == last + 1):
            yield first, " ".join(block)
            block = []
        if not block:
            first = token.start[0]
        block.append(token.string.lstrip("#: "))
        last = token.start[0] if alone else -1
    if block:
        yield first, " ".join(block)


def _docstrings(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """Yield the line and text of each docstring, and whether its name is public."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)) is not None:
            yield node.body[0].lineno, text, not getattr(node, "name", "").startswith("_")


def _is_tuned(value: ast.expr) -> bool:
    """Return whether an expression consists of numbers only."""
    leaves = [n for n in ast.walk(value) if isinstance(n, ast.Constant)]
    numbers = [n for n in leaves if type(n.value) in (int, float)]
    return isinstance(value, _NUMBER) and bool(numbers) and len(numbers) == len(leaves)


def _constants(tree: ast.Module, commented: set[int]) -> Iterator[tuple[int, str]]:
    """Yield the module-level numbers that have no comment beside or above them."""
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and value is not None and _is_tuned(value):
            lines = range(node.lineno - 1, (node.end_lineno or node.lineno) + 1)
            if not commented & set(lines):
                yield node.lineno, f"{target.id} has no comment"


def _prose(text: str) -> str:
    """Return a docstring without code: examples, literals, mathematics, roles and directives."""
    text = re.sub(r"^\s*>>> .*?(?=^\s*$|\Z)", "", text, flags=re.M | re.S)
    text = re.sub(r"^ *\.\. (?:math|code).*?(?=^\S|\Z)", "", text, flags=re.M | re.S)
    text = re.sub(r"(?<![\w*])\*[A-Z][^*]+\*", "X", text)  # the title of a paper
    return re.sub(r"``.*?``|:\w+:`.*?`|\"[^\"\n]*\"", "X", text, flags=re.S)


def _names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and text of each public name that holds a word which the glossary replaces."""
    replaced = re.compile(f"{REPLACED.pattern}|\\b(?:tasks?|jobs?)\\b", re.I)
    for node in ast.walk(tree):
        name = getattr(node, "name", getattr(node, "arg", None))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        if (
            not isinstance(name, str)
            or name.startswith(("_", "test_"))
            or isinstance(node, ast.alias)
        ):
            continue
        words = re.sub(r"_|(?<=[a-z])(?=[A-Z])", " ", name)
        if replaced.search(words) and name not in NAMES:
            yield node.lineno, name


def faults(path: Path) -> list[tuple[int, str, str]]:
    """Return line, rule and text of everything in a file that breaks a rule."""
    source = path.read_text()
    tree = ast.parse(source)
    found = []
    comments = list(_comments(source))
    for line, text in comments:
        if text.startswith(("type:", "noqa", "!", "-*-", "pragma")):
            continue
        if FRAGMENT.match(text):
            found.append((line, "opening", text))
        elif PRONOUNS.search(_prose(text)):
            found.append((line, "pronoun", text))
    for line, text, public in _docstrings(tree):
        prose = _prose(text)
        if OPENERS.match(prose):
            found.append((line, "opening", text.splitlines()[0]))
        for match in PRONOUNS.finditer(prose):
            found.append((line, "pronoun", _around(prose, match)))
        if public:
            for match in REPLACED.finditer(prose):
                if (path.name, match[0].lower()) in EXCEPTIONS:
                    continue
                found.append((line, "glossary", _around(prose, match)))
    found += [(line, "name", name) for line, name in _names(tree)]
    # A block of comments ends on the line above its number.
    commented = {line + i for line, text in comments for i in range(text.count(" ") // 8 + 2)}
    commented |= {
        t.start[0]
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }
    found += [(line, "constant", text) for line, text in _constants(tree, commented)]
    return sorted(found)


def _around(text: str, match: re.Match[str]) -> str:
    return " ".join(text[max(0, match.start() - 30) : match.end() + 30].split())


if __name__ == "__main__":
    given = [Path(name) for name in sys.argv[1:]] or [Path("coded_torch")]
    files = [
        file for path in given for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])
    ]
    count = 0
    for file in files:
        for line, rule, text in faults(file):
            print(f"{file}:{line}: {rule}: {text}")
            count += 1
    print(f"{count} in {len(files)} files")
