"""`python -m moe_core` is `moe-core`."""

from moe_core.cli import main

if __name__ == "__main__":
    main()
