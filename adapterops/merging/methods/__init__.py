"""The merge methods, one file a family; importing this fills `adapterops.merging.registry.METHODS`, in this order."""

import importlib

_FILES = ("linear", "svd", "ties", "pruning", "della", "breadcrumbs", "sce", "span", "knots", "tsv", "iso")

for _name in _FILES:
    importlib.import_module(f"{__name__}.{_name}")
