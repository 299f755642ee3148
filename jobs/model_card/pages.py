"""Render a card as Markdown or as one HTML page with plots, without other files."""

from __future__ import annotations

from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from jobs.model_card.content import Card

_SPECIAL = str.maketrans({character: f"\\{character}" for character in "\\`*_{}[]<>()#|~"})


def render_html(card: Card) -> str:
    """Return the card as HTML. Texts from the ledger are escaped."""
    environment = _environment(autoescape=True)
    style = (resources.files("jobs.pipeline.report") / "page.css").read_text()
    return environment.from_string(_template("card.html")).render(
        card=card,
        style=Markup(style),  # noqa: S704 - our own file
    )


def render_markdown(card: Card) -> str:
    """Return the card as Markdown. Texts from the ledger are escaped, so they cannot become links or markup."""
    environment = _environment(autoescape=False)
    environment.filters["md"] = _escaped
    return environment.from_string(_template("card.md")).render(card=card)


def _escaped(text: str) -> str:
    return " ".join(text.split()).translate(_SPECIAL)


def _environment(*, autoescape: bool) -> Environment:
    return Environment(  # Markdown is not HTML; `md` escapes it
        autoescape=autoescape,  # noqa: S701
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _template(name: str) -> str:
    return (resources.files("jobs.model_card") / name).read_text()
