"""Holds dashboards against Grafana's own schema, as its foundation SDK has it: `schema.py FILE...` says what is wrong and fails, or says nothing.

The SDK's classes are generated from the schema, but its reader takes anything: it passes over fields that it does not know and keeps values
of any type. So what was read is looked through here, value by value, against the types that the classes declare, and is written again: what
is in the file and not in what was written is no field of Grafana's.
"""

import enum
import json
import sys
import types
import typing

from grafana_foundation_sdk.cog import plugins, variants
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.runtime import Runtime, UnknownDataquery
from grafana_foundation_sdk.models import dashboard

# What the data source for Prometheus reads of an annotation beside the dashboard's schema
# (packages/grafana-prometheus of Grafana: the fields of an annotation query).
ANNOTATION_OF_PROMETHEUS = {"step", "titleFormat", "textFormat", "useValueForTime"}


def fits(value, hint, path):
    """Gives what is wrong with a value of this declared type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (typing.Any, object):
        # Options of a panel and the like: what a plugin's class has read carries its types with it.
        return fields(value, path) if hasattr(value, "to_json") else []
    if origin in (typing.Union, types.UnionType):
        # Of several classes the one that the reader chose, so that it is told what is wrong inside.
        of_class = [one for one in arguments if isinstance(one, type) and type(value) is one]
        wrong = [fits(value, one, path) for one in of_class or arguments]
        return min(wrong, key=len) if all(wrong) else []
    if hint is type(None):
        return [] if value is None else [f"{path}: {value!r} instead of nothing"]
    if origin is list:
        if not isinstance(value, list):
            return [f"{path}: {value!r} is not a list"]
        return [wrong for i, one in enumerate(value) for wrong in fits(one, arguments[0], f"{path}[{i}]")]
    if origin is dict:
        if not isinstance(value, dict):
            return [f"{path}: {value!r} is not an object"]
        return [wrong for key, one in value.items() for wrong in fits(one, arguments[1], f"{path}.{key}")]
    if origin is typing.Literal:
        return [] if value in arguments else [f"{path}: {value!r} is none of {arguments}"]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        known = [one.value for one in hint]
        return [] if value in known else [f"{path}: {value!r} is none of {known}"]
    if hint is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        return [] if good else [f"{path}: {value!r} is not a number"]
    if hint in (int, str, bool):
        good = isinstance(value, hint) and isinstance(value, bool) == (hint is bool)
        return [] if good else [f"{path}: {value!r} is not of type {hint.__name__}"]
    if isinstance(value, UnknownDataquery):
        return [f"{path}: a query of no data source that there is"]
    if not isinstance(value, hint):
        return [f"{path}: {value!r} is no {hint.__name__}"]
    return fields(value, path)


def fields(value, path):
    hints = typing.get_type_hints(type(value), {**vars(typing), **vars(sys.modules[type(value).__module__])})
    return [wrong for name, hint in hints.items() for wrong in fits(getattr(value, name, None), hint, f"{path}.{name}")]


def lost(given, written, path):
    """Gives what is in the file and not in what Grafana would have of it."""
    if isinstance(given, dict) and isinstance(written, dict):
        known = ANNOTATION_OF_PROMETHEUS if path.startswith("annotations.list[") else set()
        wrong = [f"{path}: Grafana knows no {key!r} here" for key in given.keys() - written.keys() - known]
        for key in given.keys() & written.keys():
            wrong += lost(given[key], written[key], f"{path}.{key}".lstrip("."))
        return wrong
    if isinstance(given, list) and isinstance(written, list) and len(given) == len(written):
        return [one for i, pair in enumerate(zip(given, written)) for one in lost(*pair, f"{path}[{i}]")]
    return [] if given == written else [f"{path}: {given!r} is read as {written!r}"]


def check(file):
    with open(file, encoding="utf-8") as opened:
        given = json.load(opened)
    wrong = [
        f"{panel['title']}: there is no panel of type {panel['type']!r}"
        for panel in given["panels"]
        if panel["type"] != "row" and Runtime().panelcfg_config(panel["type"]) is None
    ]
    read = dashboard.Dashboard.from_json(given)
    written = json.loads(json.dumps(read, cls=JSONEncoder))
    return wrong + fields(read, "") + lost(given, written, "")


def main():
    plugins.register_default_plugins()
    wrong = [f"{file}: {one}" for file in sys.argv[1:] for one in check(file)]
    print("\n".join(wrong), end="\n" if wrong else "")
    sys.exit(1 if wrong or not sys.argv[1:] else 0)


main()
