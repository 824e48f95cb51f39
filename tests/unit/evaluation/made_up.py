"""Made-up results of an evaluation, for whatever reads them, and a parser for pages."""

# ruff: noqa: E501  (a table of made-up results)

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br", "link", "path", "use", "rect", "line", "circle", "polyline", "image"}


def e(value, low=None, high=None, n=100):
    return {"value": value, "low": value if low is None else low, "high": value if high is None else high, "n": n}


def attack(title, top1, sees, **more):
    kinds = {kind: e(top1) for kind in ("frequent", "word", "piece", "number", "punctuation", "marked")}
    return {
        "title": title, "sees": sees, "seconds": 1.0, "flops": 1e12, "notes": [], "top1": e(top1, top1 - 0.02, top1 + 0.02),
        "top10": e(min(1.0, top1 + 0.1)), "content_top1": e(top1), "marked_top1": e(top1), "span_exact": e(top1 / 2),
        "similarity": e(top1), "classes": kinds, "pii": {"exact_micro": e(0.3), "fuzzy_micro": e(0.4), "fuzzy_macro": e(0.4)},
        **more,
    }  # fmt: skip


def results(best=0.8, nearest=0.05):
    curve = {"axis": "training steps", "at": [0, 10, 20], "top1": [e(0.1), e(0.5), e(best)], "extra": [3.0, 1.0, 0.5],
             "extra_label": "loss, nats"}  # fmt: skip
    sgt = {
        "title": "this SGT",
        "facts": {"std": 0.6, "mean_norm": 1.1},
        "privacy": {
            "nn_fr": e(1 - nearest, n=1234), "rank_entropy": e(0.8), "rank_entropy_ceiling": 0.78, "mi": e(3.0),
            "mi_log_mean_exp": e(2.5), "mi_log_mean_exp_ceiling": 2.77, "pac_adv_uniform": 0.4, "pac_adv_lm": 1.0,
            "lm_top1": e(0.6),
        },
        "histogram": {"edges": [1, 2, 4, 8], "counts": [5, 3, 2]},
        "utility": {"perplexity": e(6.0), "kept": e(0.61, 0.56, 0.67), "kl": e(0.3), "agreement": e(0.78)},
        "attacks": {
            "nearest_l2": attack("nearest neighbour, L2", nearest, ["one obfuscation of each prompt"]),
            "known_plaintext": attack("known plaintext", best - 0.1, ["m known (token, obfuscation) pairs"]),
            "inverter": attack("learned inverter", best, ["the SGT and its weights"], curve=curve,
                               notes=["has not converged: more would read more"]),
        },
        "best": "inverter",
        "examples": [{"prompt": "<script>alert(1)</script> \x1b[31m", "guesses": {"inverter": "a & b"}, "answer_clean": "x",
                      "answer_obfuscated": "y"}],
    }  # fmt: skip
    noise = {"title": "constant noise, std 1", "facts": {"std": 1.0, "epsilon": 300.0}, "privacy": {"nn_fr": e(0.1)},
             "utility": {"kept": e(0.2), "kl": e(0.9)}, "attacks": {"nearest_l2": attack("nn", 0.9, ["x"])}}  # fmt: skip
    about = {"export": "out/export", "trunk": "demo", "data": "demo", "rows": 4, "hidden_tokens": 1234, "vocab": 4096,
             "width": 192, "ln_vocab": 8.318, "suite": "quick", "seed": 0, "held_out": True, "notes": [],
             "versions": {"torch": "2.13"}, "command": "sgt-titan evaluate out/export"}  # fmt: skip
    return {"format": 1, "about": about, "no_prompt": {"perplexity": e(9.5), "ways": {"hidden": 9.5}},
            "mechanisms": {"sgt": sgt, "noise-1": noise}}  # fmt: skip


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links, self.ids, self.scripts = [], [], [], 0

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src", "xlink:href"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def parsed(text):
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    return parser
