"""Write what follows from elsewhere: the chart's README from the comments of values.yaml, and the
part of values.schema.json that knows the gateway's settings. `--check` compares instead.

Needs the gateway alone, so that the unit tests can compare too.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

from pydantic import SecretStr

from gateway.settings import Settings

CHART: Final = Path(__file__).parent / "payment-gateway"

OWNED: Final = frozenset(
    {
        "connection_age_max_s",
        "embedded_dir",
        "environment",
        "listen_address",
        "metrics_address",
        "notifications_address",
        "postgres_dsn",
        "redis_url",
        "tls_certificate_file",
        "tls_client_ca_file",
        "tls_key_file",
        "transport",
        "trusted_front",
    }
)
"""Settings that follow from other values of the chart (`gateway.variables` in _helpers.tpl)."""

_README_HEAD = """\
# payment-gateway

The gateway for Kubernetes 1.30 or newer. `docs/deploy.md` says how to install, upgrade and roll
back; `ci/` has values for the usual cases.

```
helm install payments helm/payment-gateway -n payments --create-namespace -f my-values.yaml
```

Written from `values.yaml` by `python helm/chart_files.py`; do not edit.
"""


# --- values.schema.json ---------------------------------------------------------------------------


def setting_schema(name: str) -> dict[str, Any]:
    """JSON Schema of one setting, with its bounds."""
    field = Settings.model_fields[name]
    schema: dict[str, Any] = {"description": field.description}
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        return schema | {"enum": list(get_args(annotation))}
    types: dict[object, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}
    schema["type"] = types[annotation]
    words = {"Ge": "minimum", "Gt": "exclusiveMinimum", "Le": "maximum", "Lt": "exclusiveMaximum"}
    for rule in field.metadata:
        word = words.get(type(rule).__name__)
        if word is not None:
            bound = getattr(rule, type(rule).__name__.lower())
            schema[word] = int(bound) if bound == int(bound) else bound
    return schema


def schema_text() -> str:
    """values.schema.json with the settings that exist."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    free = [name for name in Settings.model_fields if name not in OWNED]
    secret = [name for name in free if Settings.model_fields[name].annotation is SecretStr]
    schema["properties"]["settings"]["properties"] = {
        name: setting_schema(name) for name in free if name not in secret
    }
    reference = {"$ref": "#/definitions/secretReference"}
    schema["properties"]["secretSettings"]["properties"] = dict.fromkeys(free, reference)
    _require(schema)
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


_EMPTY: Final = ("null", '""', "{}", "[]")


def _require(schema: dict[str, Any]) -> None:
    """Have the schema refuse `null`, which takes a value away, where a template needs the value.

    Lists and maps that nothing is written about may be taken away, and what is empty anyway.
    """

    def needed(place: dict[str, Any], default: str) -> bool:
        if "$ref" in place:
            place = schema["definitions"][place["$ref"].rpartition("/")[2]]
        if place.get("type") == "object":
            return "properties" in place
        return default not in _EMPTY and (place.get("type") != "array" or "minItems" in place)

    required: dict[str, set[str]] = {}
    for path, default, _ in documented_values((CHART / "values.yaml").read_text(encoding="utf-8")):
        *parents, name = path.split(".")
        place, above = schema, ""
        for parent in parents:
            required.setdefault(above, set()).add(parent)
            place, above = place["properties"][parent], f"{above}.{parent}"
        if path and needed(place["properties"][name], default):
            required.setdefault(above, set()).add(name)
    for above, names in required.items():
        place = schema
        for parent in above.split(".")[1:]:
            place = place["properties"][parent]
        place["required"] = sorted(names)


# --- README.md ------------------------------------------------------------------------------------

_LONG: Final = "see values.yaml"
"""The default of a value that goes on over several lines."""
_KEY = re.compile(r"( *)([A-Za-z]\w*):(?: (.*))?")


def documented_values(text: str) -> list[tuple[str, str, str]]:
    """Section headings as ("", heading, ""), and values as (path, default, meaning), in order.

    Reads the forms that values.yaml is written in, with two spaces a level. Raises ValueError for a
    value that no comment documents.
    """
    rows: list[tuple[str, str, str]] = []
    path: list[str] = []
    meaning: list[str] = []
    below: int | None = None  # the depth of a documented value that goes on over further lines
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        stripped = line.strip()
        if stripped.startswith("## "):
            rows.append(("", stripped.removeprefix("## "), ""))
        elif stripped.startswith("# -- "):
            meaning = [stripped.removeprefix("# -- ")]
        elif stripped.startswith("#"):
            if meaning:
                meaning.append(stripped.removeprefix("#").strip())
        elif match := _KEY.fullmatch(line):
            depth = len(match[1]) // 2
            if below is not None and depth > below and not meaning:
                continue
            below = None
            path = [*path[:depth], match[2]]
            following = lines[number] if number < len(lines) else ""
            if match[3] is None and not meaning:
                if not following.startswith("  " * (depth + 1)):
                    raise ValueError(f"values.yaml:{number}: {'.'.join(path)} has no value")
            elif not meaning:
                raise ValueError(f"values.yaml:{number}: {'.'.join(path)} has no comment")
            else:
                default = match[3] if match[3] is not None else _LONG
                rows.append((".".join(path), default, " ".join(meaning)))
                below = depth if match[3] is None else None
            meaning = []
        elif stripped and below is None:
            raise ValueError(f"values.yaml:{number}: a line of an unknown form")
    return rows


def readme_text() -> str:
    """README.md."""
    rows = documented_values((CHART / "values.yaml").read_text(encoding="utf-8"))
    lines = [_README_HEAD, "## Names"]
    path_before = ""
    for path, default, meaning in rows:
        if not path:
            lines += ["", f"## {default}"]
        else:
            if not path_before:
                lines += ["", "| Value | Default | Meaning |", "|---|---|---|"]
            shown = default if default == _LONG else f"`{default}`"
            lines.append(f"| `{path}` | {shown} | {meaning.replace('|', '&#124;')} |")
        path_before = path
    return "\n".join(lines) + "\n"


def main(*, check: bool) -> int:
    """Write, or compare; the exit status."""
    stale = []
    for name, text in (("values.schema.json", schema_text()), ("README.md", readme_text())):
        path = CHART / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if check:
            stale.append(name)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    for name in stale:
        print(f"{CHART / name} is stale: run python helm/chart_files.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
