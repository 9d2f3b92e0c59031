"""What the examples read off the command line."""

import argparse
import warnings


def is_quick(story: str | None) -> bool:
    """Whether ``--quick`` was given; two warnings that say nothing about an example are silenced on the way.

    Args:
        story: the example's docstring, for ``--help``.
    """
    parser = argparse.ArgumentParser(description=story, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little data: shows that it runs, not what it reaches")
    warnings.filterwarnings("ignore", ".*does not have many workers")  # the data lie in memory
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning uses what torch has just deprecated
    return bool(parser.parse_args().quick)
