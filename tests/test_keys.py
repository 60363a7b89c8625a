"""Who a value is, how it is laid down and read back, and which code a result depends on."""

import json
import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from stetholib.minerva_math import Variant
from stetholib.models.answering import Answer
from stetholib.models.sums import DocumentSums
from stetholib.sae_features import Heard, ScoreRule
from stetholib.store.artefacts import Store
from stetholib.store.code import code_of
from stetholib.store.values import Input, Lazy, hashed, identity_of, packed, unpacked


@dataclass(frozen=True)
class Point:
    x: float
    y: object = None


@dataclass(frozen=True)
class Place:
    x: float
    y: object = None


TABLE = pd.DataFrame({"n": [1, 2], "x": [0.5, 1.5]})
DIFFERENT = [
    1,
    1.0,
    True,
    "1",
    0,
    False,
    0.0,
    -0.0,
    None,
    "None",
    "",
    float("nan"),
    float("inf"),
    [],
    {},
    [1],
    [1.0],
    ["1"],
    [[1]],
    [1, 2],
    [2, 1],
    [[1, 2]],
    [[1], [2]],
    {"a": 1},
    {"a": 1.0},
    {"b": 1},
    {1: "a"},
    {"1": "a"},
    {(1, 2): "a"},
    {"a": 1, "b": 2},
    torch.tensor([1, 2]),
    torch.tensor([1.0, 2.0]),
    torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    torch.tensor([[1.0, 2.0]]),
    torch.tensor([[1.0], [2.0]]),
    torch.tensor([2.0, 1.0]),
    torch.tensor(1.0),
    torch.tensor([]),
    np.array([1.0, 2.0]),
    np.array([1.0, 2.0], dtype="float32"),
    np.array([[1.0, 2.0]]),
    TABLE,
    TABLE.astype({"n": float}),
    TABLE.rename(columns={"n": "m"}),
    TABLE[["x", "n"]],
    TABLE.iloc[::-1],
    TABLE.assign(x=[0.5, 1.25]),
    TABLE.set_axis([1, 2]),
    Point(1.0),
    Point(1),
    Place(1.0),
    Point(1.0, [Point(2.0)]),
    Point(1.0, [Point(3.0)]),
    Point(1.0, torch.tensor([1])),
    packed,
    hashed,
    Input.of("a", lambda: 1),
    Input.of("b", lambda: 1),
]


def test_no_two_different_values_are_one():
    assert len({json.dumps(identity_of(value)) for value in DIFFERENT}) == len(DIFFERENT)
    assert len({hashed(value) for value in DIFFERENT}) == len(DIFFERENT)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, "a", None), (1, "a", None)),
        ((1, 2), [1, 2]),
        ({"a": [1, 2]}, OrderedDict(a=(1, 2))),
        (torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3)),
        (torch.arange(6.0).reshape(2, 3).T, torch.arange(6.0).reshape(2, 3).T.contiguous()),
        (torch.ones(2, requires_grad=True), torch.ones(2)),
        (np.arange(6.0).reshape(2, 3).T, np.arange(6.0).reshape(2, 3).T.copy()),
        (TABLE, TABLE.copy()),
        (Point(1.0, [TABLE]), Point(1.0, [TABLE.copy()])),
        (Input.of("a", lambda: 1), Input.of("a", lambda: 2)),
        (float("nan"), float("nan")),
    ],
)
def test_equal_values_are_one_wherever_they_lie(one, other):
    assert identity_of(one) == identity_of(other) or str(identity_of(one)) == str(identity_of(other))
    assert hashed(one) == hashed(other)


def closure(value):
    def inner():
        return value

    return inner


@pytest.mark.parametrize(
    "value",
    [
        lambda x: x,
        closure(1),
        object(),
        torch.nn.Linear(1, 1),
        {1, 2},
        b"bytes",
        Path("/tmp"),
        Point,
        iter([1]),
        np.array([object()]),
        print,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_identity_is_refused_wherever_it_lies(value, tmp_path):
    for given in (value, [value], {"a": {"b": value}}, Point(1.0, value)):
        with pytest.raises(TypeError, match="has no identity"):
            identity_of(given)
    with pytest.raises(TypeError, match="has no identity"):
        Store(tmp_path).made(adds, 1, value)
    assert not list(tmp_path.iterdir())


def test_an_open_file_and_a_method_have_no_identity(tmp_path):
    with (tmp_path / "x").open("w") as handle, pytest.raises(TypeError, match="has no identity"):
        identity_of(handle)
    with pytest.raises(TypeError, match="has no identity"):
        identity_of(Answer("a", 1, "b", 1, "eos").__eq__)


def same(one, other):
    """Equal in type and value, all the way down."""
    if isinstance(one, Lazy):
        one = dict(one)
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)
    if isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other)
        return True
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__)
    return one == other or (one != one and other != other)


def around(value, folder):
    """A value through the store's files and back, the JSON among them."""
    from safetensors.torch import save_file

    tensors, tables = {}, {}
    node = packed(value, tensors, tables)
    if tensors:
        save_file(tensors, folder / "tensors.safetensors")
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet")
    return unpacked(json.loads(json.dumps(node, sort_keys=True)), folder)


SUMS = DocumentSums(torch.rand(2), torch.rand(2, 3), torch.rand(2, 3), torch.rand(2, 3), torch.rand(2, 4, 3))


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        0.1,
        float("nan"),
        float("inf"),
        "é\u2028",
        [],
        (),
        {},
        [1, (2, [3, None]), "x"],
        {"b": 1, "a": (1, 2)},
        {2: "two", 10: "ten", 1: "one"},
        {(0, "q"): 1.5, (10, "o"): 2.5},
        {(0, "q"): torch.arange(3.0), (1, "q"): torch.ones(2, 2)},
        {1: [torch.arange(3), torch.tensor(2.5)], "1x": {"t": torch.ones(1, dtype=torch.bfloat16)}},
        torch.arange(6.0).reshape(2, 3).T,
        torch.tensor(True),
        torch.zeros(0, 3),
        np.array([1.0, np.nan]),
        np.arange(4).reshape(2, 2),
        np.array(2.5),
        TABLE,
        TABLE.assign(x=[np.nan, 1 / 3], word=["a", None]),
        pd.DataFrame({"x": []}),
        [TABLE, {"t": TABLE.iloc[:1]}],
        Variant("full", "raw", (0, 1, 2), 0.5),
        [Answer("a", 1, "b c", 2, "eos")],
        ScoreRule(),
        Heard(TABLE, {"corpus.0": SUMS}, {0: torch.eye(2), 1: torch.ones(2, 2)}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_comes_back_as_it_was(value, tmp_path):
    found = around(value, tmp_path)
    assert same(
        replace(found, sums=dict(found.sums), covariance=dict(found.covariance)) if isinstance(found, Heard) else found, value
    )


def test_numbers_of_numpy_come_back_as_pythons(tmp_path):
    found = around({"n": np.int64(3), "x": np.float64(0.1), "b": np.bool_(True)}, tmp_path)
    assert same(found, {"n": 3, "x": 0.1, "b": True})


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.nn.Linear(1, 1), Point(1.0), lambda: 1, Path("x"), TABLE["n"]])
def test_what_cannot_be_read_back_is_not_laid_down(value):
    for given in (value, [value], {"a": value}):
        with pytest.raises(TypeError, match="a stage cannot return"):
            packed(given, {}, {})


def adds(one, other):
    return one + other


RUNS = []


def listed(text, fine):
    RUNS.append("listed")
    return {"rows": pd.DataFrame({"n": [len(text), 2]}), "plain": [1, 2], "t": {"inner": torch.arange(2.0)}, "fine": fine}


def counted(found, factor):
    RUNS.append("counted")
    return float(found["rows"]["n"].sum()) * factor


def test_a_value_is_a_fresh_copy_each_time(tmp_path):
    made = Store(tmp_path).made(listed, "abc", 1)
    first = made.value
    first["plain"].append(3), first["t"]["inner"].add_(5), first["rows"].drop(columns="n", inplace=True)
    assert same(
        dict(made.value), {"rows": pd.DataFrame({"n": [3, 2]}), "plain": [1, 2], "t": {"inner": torch.arange(2.0)}, "fine": 1}
    )


def test_a_stage_made_anew_with_the_same_content_disturbs_nobody_downstream(tmp_path):
    RUNS.clear()
    first = Store(tmp_path).made(listed, "abc", 1)
    assert Store(tmp_path).made(counted, first, 2).value == 10.0 and RUNS == ["listed", "counted"]
    shutil.rmtree(first.folder)
    other = Store(tmp_path).made(listed, "abc", 1)  # lost, and made anew
    again = Store(tmp_path).made(listed, "xyz", 1)  # another key, but the same result
    assert other.identity == first.identity == again.identity and again.name != first.name
    assert [Store(tmp_path).made(counted, one, 2).value for one in (other, again)] == [10.0, 10.0]
    assert RUNS == ["listed", "counted", "listed", "listed"]
    changed = Store(tmp_path).made(listed, "abc", 2)
    assert changed.identity != first.identity and Store(tmp_path).made(counted, changed, 2).value == 10.0
    assert RUNS[-2:] == ["listed", "counted"]


def test_an_input_is_opened_only_where_a_stage_must_run(tmp_path):
    opened = []
    given = Input.of("who", lambda: opened.append(1) or 5)
    for _ in range(2):
        assert Store(tmp_path).made(adds, given, 2).value == 7
    assert opened == [1]
    store = Store(tmp_path)
    derived = store.derived(adds, given, 3)
    assert opened == [1] and derived.identity == store.key(adds, given, 3)
    for _ in range(2):
        with derived.opened() as value:
            assert value == 8
    assert opened == [1, 1]


FILES = {
    "here.py": '''
"""A module."""

from stetholib import far
from stetholib.middle import between, Tool

SCALE = 2


def stage(x):
    """What it does."""
    return between(x) * SCALE


def by_module(x):
    return far.away(x)


def by_value(tool, x):
    return tool.turn(x)


def lazily(x):
    from stetholib.late import last

    return last(x)


def unrelated(x):
    return x - 1
''',
    "middle.py": """
from stetholib.far import away


class Base:
    def turn(self, x):
        return x


class Tool(Base):
    STEP = 3

    def turn(self, x):
        return x + self.STEP


def between(x):
    return away(x) + 1


def beside(x):
    return x
""",
    "far.py": """
FACTOR = 7


def away(x):
    return x * FACTOR


def other(x):
    return x
""",
    "late.py": """
def last(x):
    return x
""",
}
NAMES = ("stage", "by_module", "by_value", "lazily", "unrelated")
ASK = "import json; from stetholib import here; from stetholib.store.code import code_of; "
ASK += f"print(json.dumps({{n: code_of(getattr(here, n)) for n in {NAMES}}}))"


class Package:
    """A package of a few modules with the store's own code, whose hashes another process takes."""

    def __init__(self, folder):
        self.folder = folder / "stetholib"
        self.folder.mkdir()
        (self.folder / "__init__.py").touch()
        shutil.copytree(ROOT / "stetholib" / "store", self.folder / "store", ignore=shutil.ignore_patterns("__pycache__"))
        for name, text in FILES.items():
            (self.folder / name).write_text(text)

    def codes(self, **changes):
        """The hashes after a change: module=(before, after)."""
        for module, (before, after) in changes.items():
            text = FILES[f"{module}.py"]
            assert text.count(before) == 1
            (self.folder / f"{module}.py").write_text(text.replace(before, after))
        env = dict(os.environ, PYTHONPATH=str(self.folder.parent), PYTHONDONTWRITEBYTECODE="1")
        done = subprocess.run([sys.executable, "-c", ASK], cwd=self.folder.parent, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for module in changes:
            (self.folder / f"{module}.py").write_text(FILES[f"{module}.py"])
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return Package(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def before(package):
    return package.codes()


@pytest.mark.parametrize(
    ("module", "old", "new", "moved"),
    [
        ("here", '"""What it does."""', '"""What it does, in other words."""\n    # and why', ""),
        ("here", '"""A module."""', '"""The same module."""', ""),
        ("middle", "def between(x):\n", 'def between(x):\n    """Says more."""\n', ""),
        ("here", "return x - 1", "return x - 2", "unrelated"),
        ("here", "SCALE = 2", "SCALE = 3", "stage"),
        ("middle", "away(x) + 1", "away(x) + 2", "stage"),
        ("middle", "def beside(x):\n    return x", "def beside(x):\n    return -x", ""),
        ("far", "x * FACTOR", "x / FACTOR", "stage by_module"),
        ("far", "FACTOR = 7", "FACTOR = 8", "stage by_module"),
        ("far", "def other(x):\n    return x", "def other(x):\n    return -x", ""),
        ("middle", "x + self.STEP", "x - self.STEP", "by_value"),
        ("middle", "STEP = 3", "STEP = 4", "by_value"),
        ("middle", "def turn(self, x):\n        return x\n", "def turn(self, x):\n        return -x\n", "by_value"),
        ("late", "return x", "return -x", "lazily"),
        ("far", "FACTOR = 7", "FACTOR = 7\nprint", "stage by_module"),
    ],
)
def test_only_what_a_function_can_reach_changes_its_code(package, before, module, old, new, moved):
    after = package.codes(**{module: (old, new)})
    assert {name for name in NAMES if after[name] != before[name]} == set(moved.split())


def test_a_functions_name_and_decorator_do_not_hide_its_code():
    assert len({code_of(one) for one in (adds, counted, listed, Point, Place)}) == 5
    for odd in (lambda: 1, closure(1)):
        with pytest.raises(TypeError, match="has no identity: give a plain function of a module"):
            code_of(odd)
