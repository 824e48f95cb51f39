"""Detectors of other projects, as finders: a row each. Nothing of them is needed; a missing one is refused.

Their models are looked for on this machine and never downloaded, whatever the libraries do by themselves. Name of a
finder: ``spacy:MODEL`` and ``presidio:MODEL`` (a spaCy model, by package or directory), ``gliner:DIR``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sgt_titan.errors import UserError
from sgt_titan.private.spans import Finder, Span

# Their labels -> our kinds; what is not listed is not a private value, or has a pattern: a DATE of theirs is mostly
# "today" and "two weeks", and days of the calendar are found by ``patterns``.
LABELS = {
    "PERSON": "name", "PER": "name", "GPE": "place", "LOC": "place", "LOCATION": "place", "FAC": "place",
    "ORG": "org", "ORGANIZATION": "org", "NRP": "term", "NORP": "term", "EMAIL_ADDRESS": "email",
    "PHONE_NUMBER": "phone", "CREDIT_CARD": "card", "IBAN_CODE": "iban", "IP_ADDRESS": "ip", "URL": "url",
    "US_SSN": "ssn", "MEDICAL_LICENSE": "code", "CRYPTO": "secret",
}  # fmt: skip
GLINER_LABELS = {"person": "name", "location": "place", "organization": "org"}


MODEL = "en_core_web_sm"
# GLiNER reads so many words at most, by its own splitter, and leaves out the rest of a text without an error.
GLINER_WORDS, GLINER_OVERLAP = 300, 30
_GLINER_WORD = re.compile(r"\w+(?:[-_]\w+)*|\S")


def _spacy(model: str) -> Finder:
    import spacy

    nlp = spacy.load(model or MODEL)

    def found(text: str) -> Iterator[Span]:
        for entity in nlp(text).ents:
            if entity.label_ in LABELS:
                yield Span(entity.start_char, entity.end_char, LABELS[entity.label_])

    return found


def _presidio(model: str) -> Finder:
    import spacy
    import tldextract
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer.nlp_engine import NlpEngineProvider

    model = model or MODEL
    spacy.load(model)  # Presidio downloads one that is not there
    tldextract.extract = tldextract.TLDExtract(suffix_list_urls=())  # type: ignore[assignment]  # it asks the internet for a list of domains
    setup = {"nlp_engine_name": "spacy", "models": [{"lang_code": "en", "model_name": model}]}
    engine = AnalyzerEngine(
        nlp_engine=NlpEngineProvider(nlp_configuration=setup).create_engine(), supported_languages=["en"]
    )

    def found(text: str) -> Iterator[Span]:
        for result in engine.analyze(text=text, language="en"):
            if result.entity_type in LABELS:
                yield Span(result.start, result.end, LABELS[result.entity_type])

    return found


def _gliner(model: str) -> Finder:
    from gliner import GLiNER

    if not model:
        raise UserError("private: gliner needs the directory of its model: gliner:DIR")
    loaded = GLiNER.from_pretrained(model, local_files_only=True)

    def found(text: str) -> Iterator[Span]:
        for start, stop in _windows(text):
            for entity in loaded.predict_entities(text[start:stop], list(GLINER_LABELS)):
                yield Span(start + entity["start"], start + entity["end"], GLINER_LABELS[entity["label"]])

    return found


def _windows(text: str) -> Iterator[tuple[int, int]]:
    """Pieces that overlap, so that a name at the end of one is whole in the next."""
    words = [match.span() for match in _GLINER_WORD.finditer(text)]
    for first in range(0, max(len(words) - GLINER_OVERLAP, 1) if words else 0, GLINER_WORDS - GLINER_OVERLAP):
        part = words[first : first + GLINER_WORDS]
        yield part[0][0], part[-1][1]


DETECTORS: dict[str, Callable[[str], Finder]] = {"spacy": _spacy, "presidio": _presidio, "gliner": _gliner}
_EXTRAS = {"spacy": "detectors", "presidio": "detectors", "gliner": "gliner"}


def load_detector(name: str, model: str) -> Finder:
    """Raises UserError if it is not installed or its model is not on this machine; the finder, where it fails."""
    try:
        detector: Any = DETECTORS[name](model)
    except ModuleNotFoundError as error:
        raise UserError(
            f"private: {name} needs {error.name}; pip install 'sgt-titan[{_EXTRAS[name]}]', or leave {name} out"
        ) from None
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a library does about a model that is damaged or not there
        raise UserError(
            f"private: {name} cannot load its model ({type(error).__name__}); it is not downloaded from here: put it "
            "on this machine and name its directory after a colon"
        ) from None

    def found(text: str) -> Iterable[Span]:
        try:
            return list(detector(text))
        except Exception as error:  # a text that is too long for it, for one; what it says may hold the text
            raise UserError(
                f"private: {name} failed on a text of {len(text)} characters ({type(error).__name__}), and nothing is "
                f"sent; leave {name} out, or send less at once"
            ) from None

    return found
