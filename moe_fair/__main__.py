"""`python -m moe_fair`, as `accelerate launch -m moe_fair` starts it."""

from moe_fair.cli import main

if __name__ == "__main__":
    main()
