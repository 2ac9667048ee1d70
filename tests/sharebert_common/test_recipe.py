"""Values of recipes that are paths: what YAML or a shell would change."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field
from pydantic.dataclasses import dataclass

from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT, find, load, parse, split_words


@dataclass(config=STRICT, kw_only=True)
class Inner:
    path: str = ""
    maybe: str | None = "default"
    paths: list[str] = field(default_factory=list)


@dataclass(config=STRICT, kw_only=True)
class Example:
    run: str = ""
    steps: int = 1
    rate: float | None = None
    texts_or_one: str | list[str] = ""
    numbers: dict[str, str | int] = field(default_factory=dict)
    on: bool = False
    data: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    "run", ["/x/run #7", "/x/run#7", "#7", "/x/a b ", "/x/ö #1: \"quoted\" 'too'", "/x/a=b #c", "/x/tab\t#7"]
)
def test_the_command_line_has_no_comments(run: str) -> None:
    assert load(Example, None, [f"run={run}"]).run == run
    assert load(Example, None, [f"data.path={run}"]).data.path == run


def test_yaml_in_overrides_still_works(tmp_path: Path) -> None:
    made = load(Example, None, ["data.paths=[a, 'b #2', \"c\"]", "steps= 3", 'run="7"'])
    assert (made.data.paths, made.steps, made.run) == (["a", "b #2", "c"], 3, "7")
    with pytest.raises(BadInput, match="steps"):
        load(Example, None, ["steps=3 #four"])
    file = tmp_path / "example.yaml"
    file.write_text("run: /x/run #7 is a comment here\n")
    assert load(Example, file).run == "/x/run"


def test_the_home_is_expanded_in_every_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "example.yaml"
    file.write_text("run: ~/runs/a\ndata:\n  paths: [~/b, c~/d, ~nobody-at-all/e]\n")
    made = load(Example, "~/example.yaml", ["data.path=~/c #1"])
    assert made.run == f"{tmp_path}/runs/a"
    assert made.data.paths == [f"{tmp_path}/b", "c~/d", "~nobody-at-all/e"]
    assert made.data.path == f"{tmp_path}/c #1"
    assert find("~/example.yaml") == file


def test_a_path_with_an_equals_sign_is_no_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-3").mkdir()
    (tmp_path / "steps=3").mkdir()
    words = ["/runs/lr=1e-3/export", "random:/runs/a=b", "./steps=3", "lr=1e-3", "steps=3", "data.path=/a=b", "stepz=3"]
    paths, overrides = split_words(words, Example)
    assert paths == ["/runs/lr=1e-3/export", "random:/runs/a=b", "./steps=3", "lr=1e-3"]
    assert overrides == ["steps=3", "data.path=/a=b", "stepz=3"], "a wrong key is told to the user"


@pytest.mark.parametrize(
    "text",
    [
        "2024",
        "off",
        "null",
        "1:30",
        "/x/run: 7",
        "/x/a:",
        "{a}",
        "[a]/x",
        "[a]",
        "> a",
        "1e3",
        "- a",
        "*a",
        "&a b",
        "%a",
    ],
)
def test_a_key_that_is_a_text_takes_the_text(text: str) -> None:
    """YAML would read a number, a boolean, null, a mapping, a list, an alias, or nothing that it knows."""
    assert load(Example, None, [f"run={text}"]).run == text
    assert load(Example, None, [f"data.path={text}"]).data.path == text


def test_what_is_no_plain_text_is_still_yaml() -> None:
    given = ["run='a b'", "data.maybe=null", "texts_or_one=[a, b]", "numbers={a: 1}", "numbers.b=x", "on=yes"]
    made = load(Example, None, given)
    assert (made.run, made.data.maybe, made.texts_or_one, made.numbers, made.on) == (
        "a b",
        None,
        ["a", "b"],
        {"a": 1, "b": "x"},
        True,
    )
    assert load(Example, None, ["texts_or_one=[a]/b"]).texts_or_one == "[a]/b"
    assert load(Example, None, ["data.maybe=off"]).data.maybe == "off"


def test_the_home_alone_is_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(Example, None, ["run=~"]).run == str(tmp_path)


@pytest.mark.parametrize("given", ["clean.languages=no", "clean.languages=[no]"])
def test_a_boolean_is_no_list_and_no_text(given: str) -> None:
    from data_prep.recipe import PrepRecipe

    with pytest.raises(BadInput, match=r'YAML read.*\["no"\]'):
        load(PrepRecipe, None, ["output=o", "source.paths=x", given])


@pytest.mark.parametrize("given", ["steps=on", "rate=yes", "numbers.a=off"])
def test_a_boolean_is_no_number(given: str) -> None:
    with pytest.raises(BadInput, match="write a number") as raised:
        load(Example, None, [given])
    assert str(raised.value).startswith(f"command line: {given.partition('=')[0]}: YAML reads on, off, yes")


@pytest.mark.parametrize("given", [".inf", "-.inf", ".nan", "1e999"])
def test_numbers_are_finite(given: str) -> None:
    with pytest.raises(BadInput, match=r"^command line: rate: Input should be a finite number"):
        load(Example, None, [f"rate={given}"])


def test_each_error_names_where_its_key_was_given(tmp_path: Path) -> None:
    file = tmp_path / "example.yaml"
    file.write_text("steps: many\nrun: 7\n")
    with pytest.raises(BadInput) as raised:
        load(Example, file, ["rate=much", "data.pathz=a"])
    text = str(raised.value)
    assert text.index(f"{file}: run: YAML reads this as a number") < text.index(
        "steps: Input should be a valid integer"
    )
    assert "command line: rate: Input" in text
    assert "data.pathz: unknown key; did you mean 'path" in text.partition("command line: ")[2]
    with pytest.raises(BadInput, match=r"^command line: 'rate=\[': not readable as YAML"):
        load(Example, file, ["rate=["])
    with pytest.raises(BadInput, match=r"^command line: data: has no value; give it one, or leave it out"):
        load(Example, None, ["data=null"])


def test_a_mapping_where_a_plain_value_is_short_for_one() -> None:
    """On the command line too: the short form is a text, and a mapping is no text."""
    from pretrain.recipe import TrainRecipe

    given = [
        "run=r",
        "data={dataset: d, global_batch: 2, micro_batch: 2}",
        'model={"hidden_size": 64, "factor_size": 8}',
    ]
    recipe = load(TrainRecipe, None, given)
    assert (recipe.model.hidden_size, recipe.model.factor_size, recipe.model.size) == (64, 8, None)
    assert load(TrainRecipe, None, [*given[:2], "model=sharebert-small"]).model.size == "sharebert-small"


@pytest.mark.parametrize(
    "short", ["model=sharebert-small", "model={size: sharebert-small}", "model.size=sharebert-small"]
)
@pytest.mark.parametrize("first", [True, False])
def test_a_short_key_and_keys_inside_it_in_any_order(short: str, first: bool) -> None:
    from pretrain.recipe import TrainRecipe

    inside = "model.hidden_dropout_prob=0.3"
    data = ["run=r", "data.global_batch=2", "data.micro_batch=2", "data=d"]
    recipe = load(TrainRecipe, None, [*data, *((short, inside) if first else (inside, short))])
    assert (recipe.model.size, recipe.model.hidden_dropout_prob) == ("sharebert-small", 0.3)
    assert ([data.path for data in recipe.data.dataset], recipe.data.global_batch) == (["d"], 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("source.paths=", "source.paths: has no value; give it one, or leave it out"),
        (
            "source.paths=[a, 1]",
            "source.paths.1: YAML reads this as a number; put it in quotes if it is a text (got 1)",
        ),
        ("source.paths=[[a]]", "source.paths.0: Input should be a valid string (got ['a'])"),
        ("source.paths={a: b}", "source.paths: Input should be a valid string (got {'a': 'b'})"),
    ],
)
def test_a_key_of_several_types_is_named_as_the_recipe_has_it(given: str, said: str) -> None:
    from data_prep.recipe import PrepRecipe

    with pytest.raises(BadInput) as raised:
        load(PrepRecipe, None, ["output=o", given])
    assert str(raised.value) == f"command line: {said}"


def test_a_key_of_two_kinds_of_number_is_one_line() -> None:
    @dataclass(config=STRICT, kw_only=True)
    class Recipe:
        size: Annotated[int, Field(ge=2)] | Annotated[float, Field(gt=0, lt=1)] | Literal["all"] = 2

    with pytest.raises(BadInput) as raised:
        parse(Recipe, {"size": -1}, "recipe")
    assert str(raised.value) == "recipe: size: Input should be greater than or equal to 2 (got -1)"


def test_keys_in_place_of_the_recipe_are_named() -> None:
    with pytest.raises(BadInput, match=r"^output=o: the recipe comes first, before key=value \(shipped: "):
        find("output=o")
