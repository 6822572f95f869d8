"""One file per objective: its loss, a pure function, and its module. Each module is importable from here by name."""

from __future__ import annotations

import importlib
import pkgutil

from lit_align.module import AlignModule

__all__: list[str] = []

for _found in pkgutil.iter_modules(__path__):
    _file = importlib.import_module(f"{__name__}.{_found.name}")
    for _name, _value in vars(_file).items():
        if isinstance(_value, type) and issubclass(_value, AlignModule) and _value.__module__ == _file.__name__:
            globals()[_name] = _value
            __all__.append(_name)
