"""The cases of each op: shapes, and the code a PyTorch expert would write instead. A file here is an op's cases."""

import importlib
import pkgutil


def find():
    """Op → ``cases(device, quick)``, of every file here; the quick ones are the most telling of all."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").cases for name in names}


CASES = find()
