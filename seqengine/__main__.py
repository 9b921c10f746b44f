"""`python -m seqengine` is the `seqengine` command; the one place where a lower floor calls the launchers."""

import sys

if __name__ == "__main__":
    from seqengine.launch.cli import main

    sys.exit(main())
