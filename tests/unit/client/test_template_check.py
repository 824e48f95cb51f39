import pytest

from sgt_titan.client import StainedGlassTransform, template_check
from sgt_titan.client.template_check import check_template
from sgt_titan.errors import UserError
from tests.serving_kit import edit_json, make_export, with_chat_template


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes too long"),
        ("{{ 'a' * 10 ** 10 }}", "makes far too much"),
        ("{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "makes far too much"),
    ],
)
def test_what_would_hang_or_fill_the_process(template, message, monkeypatch):
    monkeypatch.setattr(template_check, "CPU_SECONDS", 1)
    with pytest.raises(UserError, match=message):
        check_template(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{{ raise_exception('never') }}",
        "{% generation %}{{ strftime_now('%Y') }}{% endgeneration %}{{ tools | tojson(indent=4) }}",
        "{% this is none",
    ],
)
def test_what_is_small_or_fails_is_let_through(template):
    check_template(template)


def test_it_is_asked_at_load(chat_trunk, tmp_path, monkeypatch):
    """Whoever changes a template can change its fingerprint too."""
    monkeypatch.setattr(template_check, "CPU_SECONDS", 1)
    export = make_export(chat_trunk, tmp_path / "export")
    with_chat_template(export, "{{ 'b' * 10 ** 10 }}{% for m in messages %}{{ m.content }}{% endfor %}")
    edit_json(export / "config.json", fingerprints={})
    with pytest.warns(UserWarning), pytest.raises(UserError, match="makes far too much"):
        StainedGlassTransform.from_pretrained(export)
