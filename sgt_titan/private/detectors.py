"""Detectors of other projects, as finders: a row each. Nothing of them is needed; a missing one is refused.

Their models are looked for on this machine and never downloaded. Name of a finder: ``spacy:PATH_OR_PACKAGE``,
``gliner:PATH``, ``presidio`` (with whatever model its installation has).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sgt_titan.errors import UserError
from sgt_titan.private.spans import Finder, Span

# Their labels -> our kinds; what is not listed is not a private value, or has a pattern.
LABELS = {
    "PERSON": "name", "PER": "name", "GPE": "place", "LOC": "place", "LOCATION": "place", "FAC": "place",
    "ORG": "org", "ORGANIZATION": "org", "NRP": "term", "NORP": "term", "EMAIL_ADDRESS": "email",
    "PHONE_NUMBER": "phone", "CREDIT_CARD": "card", "IBAN_CODE": "iban", "IP_ADDRESS": "ip", "URL": "url",
    "US_SSN": "ssn", "DATE": "text", "DATE_TIME": "text", "MEDICAL_LICENSE": "code", "CRYPTO": "secret",
}  # fmt: skip
GLINER_LABELS = {"person": "name", "location": "place", "organization": "org"}


def _spacy(model: str) -> Finder:
    import spacy

    nlp = spacy.load(model or "en_core_web_sm")

    def found(text: str) -> Iterator[Span]:
        for entity in nlp(text).ents:
            if entity.label_ in LABELS:
                yield Span(entity.start_char, entity.end_char, LABELS[entity.label_])

    return found


def _presidio(model: str) -> Finder:
    from presidio_analyzer import AnalyzerEngine

    engine = AnalyzerEngine()

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
        for entity in loaded.predict_entities(text, list(GLINER_LABELS)):
            yield Span(entity["start"], entity["end"], GLINER_LABELS[entity["label"]])

    return found


DETECTORS: dict[str, Callable[[str], Finder]] = {"spacy": _spacy, "presidio": _presidio, "gliner": _gliner}
_PACKAGES = {"spacy": "spacy", "presidio": "presidio-analyzer", "gliner": "gliner"}


def load_detector(name: str, model: str) -> Finder:
    """Raises UserError if it is not installed or its model is not on this machine."""
    try:
        detector: Any = DETECTORS[name](model)
    except ModuleNotFoundError as error:
        raise UserError(
            f"private: {name} needs {error.name}; pip install {_PACKAGES[name]}, or leave {name} out"
        ) from None
    except (OSError, ValueError, SystemExit) as error:
        raise UserError(
            f"private: {name} cannot load its model ({type(error).__name__}); it is not downloaded from here: put it "
            "on this machine and name its directory after a colon"
        ) from None
    return detector
