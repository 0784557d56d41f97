"""The names of a model's state, and what wrappers around a model put in front of them."""

import re
from collections.abc import Collection

from zerofl.errors import some

WRAPPERS = {
    "_orig_mod": "torch.compile adds",
    "module": "DataParallel and DistributedDataParallel add",
    "_module": "Opacus's GradSampleModule adds",
}
"""The part of a name, and who adds it: the wrapped model is the wrapper's attribute of that name."""

_PART = re.compile(rf"(?:(?<=\.)|^)({'|'.join(WRAPPERS)})\.")


def differing_names(given: Collection[str], expected: Collection[str]) -> str:
    """In words, how the names of a state differ from those expected, and which wrapper did it if one did."""
    more = [name for name in given if name not in expected]
    missing = [name for name in expected if name not in given]
    parts = [f"{what} {some(names)}" for what, names in (("has", more), ("lacks", missing)) if names]
    return f"{' and '.join(parts)}{wrapper_hint(given, expected)}; expected {', '.join(expected)}"


def wrapper_hint(given: Collection[str], expected: Collection[str]) -> str:
    """What to do, if a wrapper's part is what names differ by; else nothing."""
    for names, others, verb in ((given, expected, "give back"), (expected, given, "send out")):
        odd = [name for name in names if name not in others and _PART.sub("", name) in others]
        if odd:
            found = dict.fromkeys(part for name in odd for part in _PART.findall(name))
            who = " and ".join(f"{part + '.'!r} is what {WRAPPERS[part]}" for part in found)
            in_front = all(name.startswith(".".join(found) + ".") for name in odd)
            inside = ".".join(["model", *found, "state_dict()"]) if in_front else "its names without that part"
            return f" ({who}: {verb} the model inside, {inside})"
    return ""
