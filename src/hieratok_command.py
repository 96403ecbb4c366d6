"""Start the command `hieratok` before its package, whose imports take seconds that `--help` need not wait for."""

import sys
from importlib.util import find_spec, module_from_spec


def main() -> int:
    """Run `hieratok_hf.cli.main`, and the package's `__init__` once a command is known and its arguments are right."""
    spec = find_spec("hieratok_hf")
    assert spec is not None and spec.loader is not None  # they are installed together
    package = sys.modules[spec.name] = module_from_spec(spec)
    from hieratok_hf.cli.main import main as run

    return run(load_package=lambda: spec.loader.exec_module(package))
