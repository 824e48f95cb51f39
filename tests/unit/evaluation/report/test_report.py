"""The report of results that are whole, and of results that lack nearly everything."""

from __future__ import annotations

import json

import pytest

from sgt_titan.evaluation.report import plots
from sgt_titan.evaluation.report.html import page
from sgt_titan.evaluation.report.terminal import WIDTH, render
from sgt_titan.evaluation.report.words import conclusions, number, percent
from tests.unit.evaluation.made_up import attack, e, parsed, results


def test_the_page_stands_alone_and_shows_nobody_s_script():
    text = page(results())
    found = parsed(text)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in found.links) and found.scripts == 0
    assert len(found.ids) == len(set(found.ids)), "ids of two figures collide"
    assert "&lt;script&gt;alert(1)" in text and "\x1b" not in text
    assert text.count("<figure>") == 5
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)


def test_the_table_of_attacks_is_a_line_an_attack_and_the_threat_model_on_demand():
    """One row each, under its threat model; what it sees is folded away, and a phone gets fewer columns."""
    found = results()
    attacks = found["mechanisms"]["sgt"]["attacks"]
    attacks["averaging"] = attack("averaging", 0.9, ["K obfuscations of each prompt"], kind="repeats")
    attacks["inverter"] |= {"guesses": {"top1": e(0.16)}, "difference": {"top1": e(0.64, 0.6, 0.68)}}
    text = page(found)
    parsed(text)
    body = text[text.index("<div class='wide attacks'>") :]
    body = body[: body.index("</table>")]
    assert body.count("<summary>") == len(attacks) and body.count("class='group'") == 2
    assert (
        body.index("one observation of each prompt")
        < body.index("learned inverter")
        < body.index("K fresh observations")
    )
    assert "64.0% [60.0, 68.0]" in body and "class='more'" in body and "has not converged" in body.lower()
    head = text[text.index("<div class='head'>") :]
    assert "guesses 16.0%" in head and head.index("class='head'") < head.index("Kept and read") < head.index("Attacks")
    assert "looking added 64.0%" in " ".join(render(found).split())


def test_certificates_say_no_bound_where_there_is_none():
    found = results()
    bounds = {"prior": None, "fano": 0.83, "distortion": 0.71}
    certificate = {"nats_per_token": e(3.1), "nats_per_prompt": e(160), "bounds": bounds, "smallest": 0.71}
    found["mechanisms"]["sgt"]["certificate"] = certificate
    text = page(found)
    parsed(text)
    certified = text[text.index("What nobody can exceed") :]
    assert certified.index("at most 71.0%") < certified.index("at most 83.0%") < certified.index("no bound")
    assert "Nobody can read more than 71.0%" in text and "at most 71.0%" in render(found)
    certificate |= {"bounds": dict.fromkeys(bounds), "smallest": None}
    assert "Nobody can read more" not in page(found) and "no bound" in render(found)


def test_an_example_glows_by_what_it_reveals():
    found = results()
    found["mechanisms"]["sgt"]["examples"][0] |= {"pieces": ["<s>", "dark", "<b>"], "nats": [None, 0.1, 9.0]}
    text = page(found)
    parsed(text)
    assert "<div class='glow'><u title='sent in clear'>&lt;s&gt;</u>" in text and "title='9.0 nats'>&lt;b&gt;" in text
    assert "class='glow'" not in page(results())


def test_the_page_is_the_same_every_time():
    assert page(results()) == page(results())


@pytest.mark.parametrize("lacking", [(), ("about",), ("mechanisms",), ("no_prompt",)])
def test_whatever_is_missing(lacking):
    found = {key: value for key, value in results().items() if key not in lacking}
    parsed(page(found))
    render(found)
    for name in list(results()["mechanisms"]["sgt"]):
        bare = json.loads(json.dumps(found))
        bare.get("mechanisms", {}).get("sgt", {}).pop(name, None)
        parsed(page(bare))
        render(bare)
    render({})
    parsed(page({}))


def test_the_terminal_leads_with_the_best_attacker():
    text = render(results())
    assert "BEST ATTACKER: learned inverter reads at least 80.0% [78.0, 82.0]" in text.splitlines()[3]
    assert "still learning when his budget ended" in text and "still learning" in page(results())
    settled = results()
    for part in settled["mechanisms"]["sgt"]["attacks"].values():
        part["notes"] = []
    assert "reads 80.0%" in render(settled) and "still learning" not in render(settled) + page(settled)
    assert max(map(len, text.splitlines())) <= WIDTH and "\x1b" not in text
    assert "N = 1,234" in text and "at most 78.0% at this N" in text and "ln V = 8.318" in text


def test_the_best_of_few_is_not_called_the_best_attacker():
    found = results()
    sgt = found["mechanisms"]["sgt"]
    sgt["not_run"] = ["sequence attacker", "left <to> right"]
    text, whole = render(found), page(found)
    run = sum(attack.get("kind") != "guess" for attack in sgt["attacks"].values())
    assert f"BEST OF THE {run} ATTACKS THAT WERE RUN: learned inverter reads" in text and "BEST ATTACKER" not in text
    assert f"by the best of the {run} attacks that were run" in whole and "left &lt;to&gt; right" in whole
    assert "these were not run, and any of them may read more: sequence attacker, left <to> right." in " ".join(
        text.split()
    )
    sgt["attacks"] = {"nearest_l2": sgt["attacks"]["nearest_l2"]}
    sgt["best"] = "nearest_l2"
    assert "ONLY ATTACK THAT WAS RUN: " in render(found)


def test_words_are_not_kinder_than_the_numbers():
    bad, good = " ".join(conclusions(results(0.8))), " ".join(conclusions(results(0.04, nearest=0.01)))
    assert "must be taken for readable" in bad and "16 times safer" in bad and "not converged" in bad
    assert "must be taken" not in good and "no proof" in good
    assert "Without the SGT's weights the best is known plaintext: 70.0%" in bad
    assert "ln V / D = 0.043" in bad


def test_a_benchmark_says_of_how_many_questions():
    found = results()
    one = {"accuracy": e(0.5, 0.4, 0.6, n=49), "shots": 0, "chance": 0.0, "note": "1 prompts left out: <why>"}
    found["mechanisms"]["sgt"]["benchmarks"] = {"ifeval": one}
    assert "ifeval, 0-shot, N = 49, chance 0.0% (1 prompts left out: &lt;why&gt;)" in page(found)


def test_numbers():
    assert percent(e(0.1234, 0.1, 0.2), interval=True) == "12.3% [10.0, 20.0]"
    assert percent(None) == percent({"value": None}) == number(None) == "-"
    assert number({"value": "inf", "low": None, "high": None, "n": 0}, interval=True) == "unbounded"


def test_figures_are_none_without_data():
    assert plots.histogram({}) is plots.bars({}) is plots.by_class({}) is plots.curve({}) is plots.plane({}) is None
