"""`python -m moe_fair.cli`."""

from moe_fair.cli import main

main()
