"""Every language and every help page says what the nodes and the web part of today have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lora2_tools.locales import (
    NODES,
    PREFIX,
    SECTION,
    SOURCE,
    WORDS,
    complaints,
    flat,
    languages,
    load,
    node_texts,
    web_texts,
    words,
)

ROOT = Path(__file__).resolve().parents[2]
HELP = ROOT / "web" / "docs"
PAGES = sorted(HELP.rglob("*.md"))
SCRIPTS = sorted((ROOT / "web").rglob("*.mjs")) + sorted((ROOT / "web").glob("*.js"))
OTHERS = [language for language in languages() if language != SOURCE]
# Words that are the same in every language: names of sockets, terms of the trade, units.
ALIKE = {"CFG", "CLIP", "Checkpointing", "EMA", "Gradient", "LORA2", "Loss", "MODEL", "Min-SNR-γ"}
ALIKE |= {"Pause", "Seed", "Trigger", "VAE", "h", "min", "s"}
# What `t` is called with, and the keys that this may be: "a", or one of x ? "a" : "b".
_CALL = re.compile(r"(?<![\w.])t\(\s*(`[^`]*`|[^,()]+)")
_KEY = re.compile(r"(?:^|[?:])\s*[\"'](\w+)[\"']")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
# An input in a table of a help page: `seed`, or <code>batch_<wbr>size</code> where it may break in
# the narrow panel; in other languages with the label before it.
_ROW = re.compile(r"^\| (?:(.+?)<br>)?(?:`(\w+)`|<code>([\w<>]+)</code>) \|", re.M)


@pytest.fixture(scope="module")
def object_info(server: Any) -> dict[str, Any]:
    """What the booted server says of our nodes."""
    found = server.get("/object_info")
    return {name: info for name, info in found.items() if name.startswith(PREFIX)}


def _texts(language: str) -> Iterator[tuple[str, str]]:
    for file in (NODES, WORDS):
        yield from flat(load(language, file))


def _inputs(info: dict[str, Any]) -> set[str]:
    return {name for kind in ("required", "optional") for name in info["input"].get(kind, {})}


def _rows(page: Path) -> list[tuple[str, str, str]]:
    return _ROW.findall(page.read_text(encoding="utf-8"))


def test_the_languages_are_there():
    assert languages() == ["de", "en"]


def test_english_is_what_the_nodes_say(object_info: dict[str, Any]):
    assert load(SOURCE, NODES) == node_texts(object_info), "run: python3 tools/locales.py"


def test_every_node_and_socket_has_words(object_info: dict[str, Any]):
    english = load(SOURCE, NODES)
    assert len(english) == len(object_info) == 13
    for name, info in object_info.items():
        assert english[name]["display_name"] and english[name]["description"]
        given = english[name].get("inputs", {})
        assert given.keys() == _inputs(info)
        assert all(socket["name"] and socket["tooltip"] for socket in given.values())
        assert list(english[name]["outputs"]) == [str(n) for n in range(len(info["output"]))]


def test_english_is_what_the_scripts_say():
    assert load(SOURCE, WORDS) == web_texts(), "run: python3 tools/locales.py"


@pytest.mark.parametrize("language", OTHERS)
def test_a_translation_is_complete_and_has_nothing_stale(language: str):
    assert list(complaints(language)) == []


@pytest.mark.parametrize("language", OTHERS)
def test_a_translation_is_one(language: str):
    source, other = dict(_texts(SOURCE)), dict(_texts(language))
    same = {name: text for name, text in other.items() if text == source.get(name)}
    plain = {name: _PLACEHOLDER.sub("", text).split() for name, text in same.items()}
    assert {name for name, words_ in plain.items() if not ALIKE.issuperset(words_)} == set()
    assert all(text.strip() for text in other.values())


@pytest.mark.parametrize("language", OTHERS)
def test_a_translation_has_every_placeholder(language: str):
    source, other = dict(_texts(SOURCE)), dict(_texts(language))
    for name, text in source.items():
        assert set(_PLACEHOLDER.findall(other.get(name, ""))) == set(_PLACEHOLDER.findall(text)), (
            name
        )


@pytest.mark.parametrize("language", languages())
def test_no_text_is_syntax_to_the_front_end(language: str):
    # vue-i18n reads @ as a link to another message, | as a choice of plurals, {} as a value.
    for name, text in _texts(language):
        assert not re.search(r"[@|]", text), name
        own = name.startswith(f"{SECTION}.")
        assert not re.search(r"[{}]", _PLACEHOLDER.sub("", text) if own else text), name


def _asked(script: str) -> Iterator[re.Pattern[str]]:
    """Yield what a key has to look like for each call; of `state_${…}` only the start is known."""
    for given in _CALL.findall(script):
        if given[0] == "`":
            yield re.compile(re.escape(given[1:].split("${")[0]) + r"\w+")
        else:
            yield from map(re.compile, _KEY.findall(given))


def test_every_word_that_a_script_asks_for_is_there():
    known = load(SOURCE, WORDS)[SECTION]
    asked = [
        (key, script.name)
        for script in SCRIPTS
        for key in _asked(script.read_text(encoding="utf-8"))
    ]
    assert asked
    for key, script in asked:
        assert any(map(key.fullmatch, known)), f"{script} asks for {key.pattern!r}"


def test_words_and_calls_of_a_script_are_found():
    script = 'const english = {\n  a_b: "one {n}",\n  c:\n    "two \\"2\\"",\n};\n'
    script += 'let x = {\n  d: "3",\n};\n'
    assert words(script) == {"a_b": "one {n}", "c": 'two "2"'}
    assert words('define({\n  e: "fo" +\n    "ur",\n});\n') == {"e": "four"}
    script = 't("a", {}); t(`s_${x ? "n" : y}`); at("n"); s.t("n"); t(\n  "b"); t(x ? "c" : "d")'
    assert [key.pattern for key in _asked(script)] == ["a", r"s_\w+", "b", "c", "d"]


def test_the_server_hands_out_all_languages(server: Any):
    told = server.get("/i18n")
    for language in languages():
        assert told[language][SECTION] == load(language, WORDS)[SECTION]
        ours = load(language, NODES)
        assert {name: told[language]["nodeDefs"][name] for name in ours} == ours


def test_every_node_has_a_help_page(object_info: dict[str, Any]):
    assert {page.stem for page in HELP.glob("*.md")} == object_info.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(HELP).as_posix())
def test_a_help_page_names_every_input_and_no_other(page: Path, object_info: dict[str, Any]):
    # English ones are <node>.md, others <node>/<language>.md: where the front end looks.
    node = page.stem if page.parent == HELP else page.parent.name
    rows = [(label, a or b.replace("<wbr>", "")) for label, a, b in _rows(page)]
    assert sorted(name for _, name in rows) == sorted(_inputs(object_info[node]))
    if page.parent != HELP:
        labels = load(page.stem, NODES)[node].get("inputs", {})
        assert {name: label for label, name in rows} == {n: s["name"] for n, s in labels.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(HELP).as_posix())
def test_a_help_page_is_served(page: Path, server: Any, object_info: dict[str, Any]):
    [module] = {info["python_module"] for info in object_info.values()}
    pack = module.removeprefix("custom_nodes.")
    path = f"/extensions/{pack}/docs/{page.relative_to(HELP).as_posix()}"
    assert server.fetch(path) == page.read_bytes()
