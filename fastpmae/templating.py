"""Pages from templates beside the code: whatever is put into one becomes text there, unless it is marked."""

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def html_page(package: str, template: str, /, **values: Any) -> str:
    """The HTML page of a template, one of the folder `templates` in a package; every value is escaped."""
    return _environment(package, autoescape=True).get_template(template).render(values)


def text_page(package: str, template: str, escape: Callable[[str], str], /, **values: Any) -> str:
    """The page of a template in another markup than HTML: `escape` makes a value text there, all but `Markup`."""

    def as_text(value: Any) -> str:
        return value if isinstance(value, Markup) else escape(str(value))

    environment = _environment(package, autoescape=False)
    environment.finalize = as_text
    return environment.get_template(template).render(values)


def _environment(package: str, *, autoescape: bool) -> Environment:
    return Environment(
        loader=PackageLoader(package),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
