"""The command `moe-fair`."""

from moe_fair.cli.app import app as app
from moe_fair.cli.run import main as main
