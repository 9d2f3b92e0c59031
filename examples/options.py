"""The command line of the examples."""

import argparse
import warnings


def is_quick(story: str | None) -> bool:
    """Parse the command line, and ignore two warnings that don't concern the examples.

    Args:
        story: docstring of the example, for ``--help``.

    Returns:
        Whether ``--quick`` was given.
    """
    parser = argparse.ArgumentParser(description=story, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="train on little data, to test that the example runs")
    warnings.filterwarnings("ignore", ".*does not have many workers")  # the data is in memory
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning uses an API that torch deprecated
    return bool(parser.parse_args().quick)
